package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"echod/internal/text"
	"echod/server"
)

// probeTimeout bounds a probe. It is longer than the maximum backoff of an accept loop that is out of files, which is one
// second.
const probeTimeout = 3 * time.Second

// NewWeb returns a read-only Plane for probes, Prometheus and browsers. It reveals less than a Plane from New, because more
// callers may reach it.
//
//	/           the status page, with the state, limits, traffic and connections; it updates itself
//	/livez      200 while the accept loops run, also when paused or draining; else 503
//	/readyz     200 while new clients are served, or wait at the connection limit; else 503
//	/v1/status  as on the control socket
//	/metrics    Options.Metrics
//	/debug/     Options.Debug
//
// The body of a probe's answer is a line with the reason. Probes are answered for every host name, because load balancers
// use names of their own. Other paths are answered with 421 for names that are not in Options.Hosts, to protect them
// against DNS rebinding.
func NewWeb(srv *server.Server, opts Options) *Plane {
	p := newPlane(srv, opts)
	p.readOnly = true
	p.history = &history{srv: srv}
	p.http.SetKeepAlivesEnabled(false) // each connection is closed after its answer
	p.http.TLSConfig, p.https = opts.TLSConfig, opts.TLSConfig != nil
	p.http.Protocols = new(http.Protocols)
	p.http.Protocols.SetHTTP1(true) // HTTP/2 helps only connections with many requests
	p.hosts = map[string]struct{}{"localhost": {}, "echod": {}}
	for _, name := range opts.Hosts {
		p.hosts[strings.ToLower(strings.TrimSuffix(name, "."))] = struct{}{}
	}
	routes := []route{
		{http.MethodGet, "/livez", p.getLive},
		{http.MethodGet, "/readyz", p.getReady},
		{http.MethodGet, "/v1/status", p.getStatus},
	}
	if opts.Debug != nil {
		routes = append(routes, route{http.MethodGet, "/debug/{rest...}", fromHandler(opts.Debug)})
	}
	p.handle(routes, p.pageRoutes(), metricsRoutes(opts.Metrics))
	return p
}

// allowsHost reports whether the name in the request's Host header is allowed. HTTP/1.0 requests may have no Host header.
func (p *Plane) allowsHost(r *http.Request) bool {
	if p.hosts == nil || r.Host == "" || r.URL.Path == "/livez" || r.URL.Path == "/readyz" {
		return true
	}
	name := r.Host
	if host, _, err := net.SplitHostPort(name); err == nil {
		name = host
	}
	if _, err := netip.ParseAddr(strings.Trim(name, "[]")); err == nil {
		return true
	}
	_, ok := p.hosts[strings.ToLower(strings.TrimSuffix(name, "."))]
	return ok
}

func refuseHost(w http.ResponseWriter) error {
	return answerText(w, http.StatusMisdirectedRequest,
		"this host name is not allowed: use an IP address, or allow the name")
}

var errProbeTimeout = errors.New("the probe timed out")

func (p *Plane) getLive(w *response, r *http.Request) error {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(r.Context()), probeTimeout, errProbeTimeout)
	defer cancel()
	if err := p.srv.Probe(ctx); err != nil {
		return answerText(w, http.StatusServiceUnavailable, err.Error())
	}
	return answerText(w, http.StatusOK, "alive: "+p.srv.Status().State.String())
}

func (p *Plane) getReady(w *response, _ *http.Request) error {
	ready, line := readiness(p.srv)
	if !ready {
		return answerText(w, http.StatusServiceUnavailable, line)
	}
	return answerText(w, http.StatusOK, line)
}

// readiness reports whether the server is ready for new clients, and why.
func readiness(srv *server.Server) (ready bool, line string) {
	st := srv.Status()
	open := text.Count(st.Connections, "connection")
	switch {
	case srv.HandedOver():
		return true, "ready: another process serves after an upgrade"
	case st.State != server.StateRunning:
		return false, notReady(st)
	case st.Full && st.AtLimit == server.LimitReject:
		return false, "not ready: full, with " + open
	case st.Full:
		return true, "ready: full, with " + open + ": new clients wait for a place"
	default:
		return true, "ready: " + open
	}
}

// notReady returns the reason why a server that is not running is not ready.
func notReady(st server.Status) string {
	line := "not ready: " + st.State.String()
	switch {
	case st.Drain != nil:
		line += fmt.Sprintf(" (%s), until %s", st.Drain.Reason, st.Drain.Deadline.Format(time.RFC3339))
	case len(st.Holds) > 0:
		const most = 10
		var holds []string
		for _, h := range st.Holds[:min(len(st.Holds), most)] {
			hold := fmt.Sprintf("%s %q", h.ID, h.Reason)
			if !h.Expires.IsZero() {
				hold += " until " + h.Expires.Format(time.RFC3339)
			}
			holds = append(holds, hold)
		}
		line += " by " + strings.Join(holds, ", ")
		if more := len(st.Holds) - most; more > 0 {
			line += fmt.Sprintf(" and %d more", more)
		}
	}
	return line
}

// answerText answers with a line.
func answerText(w http.ResponseWriter, status int, line string) error {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = fmt.Fprintln(w, text.Printable(line)) // an error means that the caller has left
	return nil
}
