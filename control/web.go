package control

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/pprof"
	"strings"
	"time"

	"echod/server"
)

// probeTimeout is how long a server may take to prove that it is alive: longer than the longest pause of an accept loop that is out of
// files, one second.
const probeTimeout = 3 * time.Second

// NewWeb makes the read-only plane of srv, for probes, Prometheus and people: nothing on it changes anything, so that it may
// be reached by more than the control socket.
//
//	/livez      200 while the accept loops and the books work, also when paused or draining; else 503
//	/readyz     200 while new clients are served, or wait at the connection limit; else, also where that turns them away, 503
//	/v1/status  as on the control socket
//	/metrics    opts.Metrics
//	/debug/pprof/  with opts.Pprof
//
// The bodies of the first two say why.
func NewWeb(srv *server.Server, opts Options) *Plane {
	p := newPlane(srv, opts)
	p.readOnly = true
	p.http.SetKeepAlivesEnabled(false) // or so many idle callers could keep probes out for long
	get := func(e endpoint) map[string]endpoint { return map[string]endpoint{http.MethodGet: e} }
	p.routes = []route{
		{"/livez", get(p.getLive), false},
		{"/readyz", get(p.getReady), false},
		{"/v1/status", get(p.getStatus), false},
	}
	p.serveMetrics(opts.Metrics)
	if opts.Pprof {
		p.routes = append(p.routes,
			route{"/debug/pprof/", get(handled(pprof.Index)), false},
			route{"/debug/pprof/cmdline", get(handled(pprof.Cmdline)), false},
			route{"/debug/pprof/profile", get(handled(pprof.Profile)), false},
			route{"/debug/pprof/symbol", get(handled(pprof.Symbol)), false},
			route{"/debug/pprof/trace", get(handled(pprof.Trace)), false},
			route{"/debug/pprof/*", get(handled(pprof.Index)), false},
		)
	}
	return p
}

// handled makes an endpoint of a handler.
func handled(h http.HandlerFunc) endpoint {
	return func(w *caller, r *http.Request, _ string) error {
		h(w, r)
		return nil
	}
}

// serveMetrics adds the route of the metrics, if there are some.
func (p *Plane) serveMetrics(h http.Handler) {
	if h != nil {
		p.routes = append(p.routes, route{"/metrics", map[string]endpoint{http.MethodGet: handled(h.ServeHTTP)}, false})
	}
}

var errProbeTimeout = errors.New("the probe timed out")

func (p *Plane) getLive(w *caller, r *http.Request, _ string) error {
	ctx, cancel := context.WithTimeoutCause(r.Context(), probeTimeout, errProbeTimeout)
	defer cancel()
	if err := p.srv.Probe(ctx); err != nil {
		return say(w, http.StatusServiceUnavailable, err.Error())
	}
	return say(w, http.StatusOK, "alive: "+p.srv.Status().State.String())
}

func (p *Plane) getReady(w *caller, _ *http.Request, _ string) error {
	st := p.srv.Status()
	open := plural(st.Connections, "connection")
	switch {
	case st.State != server.Running:
		return say(w, http.StatusServiceUnavailable, unready(st))
	case st.Full && st.AtLimit == server.Reject:
		return say(w, http.StatusServiceUnavailable, "not ready: full, with "+open)
	case st.Full:
		return say(w, http.StatusOK, "ready: full, with "+open+": new clients wait for a place")
	default:
		return say(w, http.StatusOK, "ready: "+open)
	}
}

// unready says why a server is not ready.
func unready(st server.Status) string {
	text := "not ready: " + st.State.String()
	switch {
	case st.Drain != nil:
		text += fmt.Sprintf(" (%s), until %s", st.Drain.Reason, st.Drain.Deadline.Format(time.RFC3339))
	case len(st.Holds) > 0:
		var holds []string
		for _, h := range st.Holds {
			holds = append(holds, fmt.Sprintf("%s %q", h.ID, h.Reason))
		}
		text += " by " + strings.Join(holds[:min(len(holds), 10)], ", ")
		if more := len(holds) - 10; more > 0 {
			text += fmt.Sprintf(" and %d more", more)
		}
	}
	return text
}

// say answers with a line of text.
func say(w http.ResponseWriter, status int, text string) error {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = fmt.Fprintln(w, text) // an error means that the caller has gone
	return nil
}
