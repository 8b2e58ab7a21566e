package control

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"echod/internal/text"
	"echod/server"
)

// MaxCallers is the maximum number of open connections of a Plane's listener; 15 % of the process's limit on open files
// if that is less. At the limit, a new connection closes the idlest. The program needs that many spare files for each
// listener of a Plane.
const MaxCallers = 48

// Bounds on what callers can make a Plane hold.
const (
	headerTimeout  = 5 * time.Second  // to receive a request's headers
	requestTimeout = 10 * time.Second // to receive a request's body
	answerTimeout  = 10 * time.Second // to send an answer, or one line of a stream
	idleTimeout    = 30 * time.Second // between two requests on a connection
	maxHeader      = 8 << 10          // bytes
	lingerTimeout  = 100 * time.Millisecond
)

// Options configures a Plane. The zero value is usable.
type Options struct {
	Version string // of the program, shown in the status
	// Logger logs every request that may change something, with the uid and pid of its caller if they are known.
	// Do not sample these lines: a flood could hide one. Nil logs nothing.
	Logger *zap.Logger
	// Metrics answers GET /metrics. If it is nil, the path does not exist.
	Metrics http.Handler
	// OnRequest is called after each answer with the path of the route (empty for unknown paths), the method and the
	// status code. Calls are concurrent. It is not called for requests made by Probe. It may be nil.
	OnRequest func(route, method string, code int)

	// Upgrade answers POST /v1/upgrade. It replaces the running program, and gives up after timeout; zero means the
	// program's default. If Upgrade is nil, the path does not exist.
	Upgrade func(ctx context.Context, timeout time.Duration) (Upgraded, error)

	// LostHolds are the holds that ended with the previous process. The status shows them.
	LostHolds []Hold

	// Predecessor describes the process that handed over to this one. Nil means that there was none.
	Predecessor *Process
	// Fixed are the settings of the program that cannot change while it runs, for GET /v1/settings.
	Fixed []Setting

	// Certificates are shown in the status, and reloaded by POST /v1/certificates/reload. Nil means none.
	Certificates Certificates

	// TLSConfig makes a Plane from NewWeb serve HTTPS. It must have a certificate. Nil means HTTP.
	TLSConfig *tls.Config
	// Debug answers GET requests below /debug/ of a Plane made by NewWeb, for example net/http/pprof. If it is nil, the
	// paths do not exist.
	Debug http.Handler
	// Hosts lists the names by which callers may address a Plane made by NewWeb, without ports. IP addresses,
	// "localhost" and "echod" are always allowed. See NewWeb.
	Hosts []string
}

// Plane is the control plane of one server: an http.Handler with the API of openapi.yaml. All methods may be
// called concurrently.
//
// Any http.Server can serve a Plane. Waits, events and pauses while connected need HTTP/1.1, and the log of callers
// needs ConnContext. Serve and Actor set up both.
type Plane struct {
	// Set once.
	srv          *server.Server
	version      string
	predecessor  *Process
	log          *zap.Logger
	onRequest    func(route, method string, code int)
	routes       []route
	mux          *http.ServeMux
	http         *http.Server
	lostHolds    []Hold
	fixed        []Setting
	certificates Certificates        // nil if there are none
	readOnly     bool                // no request changes anything, so none is logged
	https        bool                // Options.TLSConfig was set; net/http also sets http.TLSConfig itself, for HTTP/2
	hosts        map[string]struct{} // allowed names in the Host header; nil means any
	linger       time.Duration       // time for requests in progress after the server has stopped
	history      *history            // nil if there is no status page

	leaving    atomic.Bool // Leave was called
	streams    streams
	maxCallers int

	mu        sync.Mutex
	listeners []*callerListener // guarded by mu
}

// An endpoint answers a request. If it returns an error, the Plane answers with a Problem.
type endpoint func(w *response, r *http.Request) error

// route is an endpoint with its method and its http.ServeMux pattern.
type route struct {
	method, pattern string
	answer          endpoint
}

// New returns the control plane of srv.
func New(srv *server.Server, opts Options) *Plane {
	p := newPlane(srv, opts)
	p.handle([]route{
		{http.MethodGet, "/v1/status", p.getStatus},
		{http.MethodGet, "/v1/conns", p.getConns},
		{http.MethodDelete, "/v1/conns", p.deleteConns},
		{http.MethodGet, "/v1/conns/closed", p.getClosed},
		{http.MethodGet, "/v1/clients", p.getClients},
		{http.MethodDelete, "/v1/conns/{id}", p.deleteConn},
		{http.MethodPost, "/v1/pause", p.postPause},
		{http.MethodPost, "/v1/resume", p.postResume},
		{http.MethodDelete, "/v1/holds/{id}", p.deleteHold},
		{http.MethodPost, "/v1/notify", p.postNotify},
		{http.MethodGet, "/v1/settings", p.getSettings},
		{http.MethodPatch, "/v1/settings", p.patchSettings},
		{http.MethodPost, "/v1/certificates/reload", p.postReload},
		{http.MethodPost, "/v1/shutdown", p.postShutdown},
		{http.MethodDelete, "/v1/shutdown", p.deleteShutdown},
		{http.MethodGet, "/v1/wait", p.getWait},
		{http.MethodGet, "/v1/events", p.getEvents},
	}, metricsRoutes(opts.Metrics), upgradeRoutes(opts.Upgrade))
	return p
}

func upgradeRoutes(upgrade func(context.Context, time.Duration) (Upgraded, error)) []route {
	if upgrade == nil {
		return nil
	}
	return []route{{http.MethodPost, "/v1/upgrade", postUpgrade(upgrade)}}
}

func metricsRoutes(h http.Handler) []route {
	if h == nil {
		return nil
	}
	return []route{{http.MethodGet, "/metrics", fromHandler(h)}}
}

// showsFigures reports whether GET requests for a path are answered with figures of the connections.
func showsFigures(path string) bool {
	return path == "/metrics" || path == "/{$}" || strings.HasPrefix(path, "/v1/") && !isLongLived(path)
}

// figures makes the endpoint answer with figures of the process that serves the connections. It must collect them before
// it begins to answer. In an upgrade the answer waits for the end, and is discarded if another process serves then:
// that process may have answered somebody already, and counters must not go back.
func (p *Plane) figures(answer endpoint) endpoint {
	return func(w *response, r *http.Request) error {
		if !callerFrom(r.Context()).probe {
			w.confirm = p.srv.AwaitOwner
		}
		return answer(w, r)
	}
}

// newPlane returns a Plane without routes.
func newPlane(srv *server.Server, opts Options) *Plane {
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	p := &Plane{
		srv: srv, version: opts.Version, predecessor: opts.Predecessor, lostHolds: opts.LostHolds, fixed: opts.Fixed,
		certificates: opts.Certificates, log: opts.Logger, onRequest: opts.OnRequest,
		mux: http.NewServeMux(), linger: lingerTimeout, maxCallers: MaxCallers,
	}
	if files, limited := openFilesLimit(); limited {
		p.maxCallers = min(MaxCallers, max(3, files*15/100))
	}
	p.streams.max, p.streams.maxKept = p.maxCallers*2/3, p.maxCallers/3
	errorLog, _ := zap.NewStdLogAt(p.log, zap.WarnLevel) // fails only for an unknown level
	p.http = &http.Server{
		Handler:           p,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      answerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          errorLog,
		ConnContext:       ConnContext,
		ConnState:         markIdle,
	}
	return p
}

// handle adds routes. The mux matches paths only, so that wrong methods are also answered with a Problem.
func (p *Plane) handle(tables ...[]route) {
	p.routes = slices.Concat(tables...)
	methods := map[string]map[string]endpoint{}
	for _, route := range p.routes {
		if methods[route.pattern] == nil {
			methods[route.pattern] = map[string]endpoint{}
		}
		answer := route.answer
		if route.method == http.MethodGet && showsFigures(route.pattern) {
			answer = p.figures(answer)
		}
		methods[route.pattern][route.method] = answer
	}
	for pattern, byMethod := range methods {
		label := strings.NewReplacer("{id}", "*", "{rest...}", "*", "{$}", "").Replace(pattern)
		p.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer := w.(*response)
			answer.route = label
			if !mayChange(r.Method) && !p.allowsHost(r) {
				answer.err = refuseHost(answer)
				return
			}
			answer.err = endpointFor(byMethod, r.Method)(answer, r)
		})
	}
	p.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.(*response).err = notFound("nothing is at %s", shorten(r.URL.Path))
	})
}

// endpointFor returns the endpoint for a method, or one that refuses it. HEAD is answered like GET, and net/http omits
// the body.
func endpointFor(endpoints map[string]endpoint, method string) endpoint {
	if answer, ok := endpoints[method]; ok {
		return answer
	}
	if answer, ok := endpoints[http.MethodGet]; ok && method == http.MethodHead {
		return answer
	}
	return func(w *response, r *http.Request) error {
		var allowed []string
		for method := range endpoints {
			allowed = append(allowed, method)
		}
		if endpoints[http.MethodGet] != nil && !isLongLived(r.URL.Path) {
			allowed = append(allowed, http.MethodHead)
		}
		slices.Sort(allowed)
		return refuseMethod(w, r, strings.Join(allowed, ", "))
	}
}

// isLongLived reports whether GET requests for a path are streams or waits, which do not support HEAD.
func isLongLived(path string) bool { return path == "/v1/wait" || path == "/v1/events" }

func refuseMethod(w *response, r *http.Request, allowed string) error {
	w.Header().Set("Allow", allowed)
	return &Problem{
		Type: ProblemMethod, Title: "Method not allowed", Status: http.StatusMethodNotAllowed,
		Detail: shorten(r.Method) + " is not allowed here: want " + allowed,
	}
}

// ServeHTTP answers one request, and logs it with its caller if it may change something.
func (p *Plane) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer := &response{ResponseWriter: w}
	defer answer.close()
	who := callerFrom(r.Context())
	who.markServing()
	if mayChange(r.Method) {
		who.identify(r)
	}

	switch clean := path.Clean(r.URL.Path); {
	case clean != r.URL.Path && clean+"/" != r.URL.Path: // the mux would answer with a redirect
		answer.err = notFound("nothing is at %s", shorten(r.URL.Path))
	case mayChange(r.Method) && who.hasLeft():
		answer.err = errCallerGone
	case p.srv.HandedOver() && !who.probe && r.URL.Path != "/livez" && r.URL.Path != "/readyz":
		answer.err = server.ErrHandedOver // only the successor can answer
	default:
		p.mux.ServeHTTP(answer, r)
	}
	if answer.discarded != nil {
		answer.err, answer.discarded = answer.discarded, nil
		clear(answer.Header())
	}
	answer.confirm = nil
	if answer.err != nil {
		p.problemOf(answer.err).write(answer)
	}
	p.auditRequest(answer, r, answer.err)
	if p.onRequest != nil && !who.probe {
		p.onRequest(answer.route, knownMethod(r.Method), answer.status)
	}
}

// mayChange reports whether requests with this method may change something.
func mayChange(method string) bool { return method != http.MethodGet && method != http.MethodHead }

// knownMethod returns method, or "other" for unusual ones, so that the label of the metrics has few values.
func knownMethod(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPatch, http.MethodDelete:
		return method
	}
	return "other"
}

// auditRequest logs a request that may change something, once.
func (p *Plane) auditRequest(answer *response, r *http.Request, err error) {
	if p.readOnly || answer.logged || !mayChange(r.Method) {
		return
	}
	answer.logged = true
	fields := []zap.Field{
		zap.String("method", text.Printable(shorten(r.Method))),
		zap.String("path", text.Printable(shorten(r.URL.Path))),
	}
	fields = append(fields, callerFrom(r.Context()).fields()...)
	if err != nil {
		problem := p.problemOf(err)
		fields = append(fields, zap.Int("status", problem.Status), zap.String("error", text.Printable(problem.Error())))
	}
	p.log.Info("control request", fields...)
}

// fromHandler makes an endpoint of a handler. The request's context ends when the caller disconnects.
func fromHandler(h http.Handler) endpoint {
	return func(w *response, r *http.Request) error {
		h.ServeHTTP(w, r)
		return nil
	}
}

// answerJSON answers with v.
func answerJSON(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // an error means that the caller has left
	return nil
}

// response is the http.ResponseWriter of one request. It records the status. After hijack it writes directly to the
// connection.
type response struct {
	http.ResponseWriter
	route  string // path of the route, with * for arguments; empty if the path is unknown
	err    error  // from the endpoint
	status int    // 0 until the answer begins
	logged bool   // auditRequest has logged the request

	confirm   func() error // nil, or whether the answer may begin
	discarded error        // the answer was not begun, because confirm returned this
	hijacked
}

// mayBegin calls confirm before an answer begins.
func (w *response) mayBegin() bool {
	if confirm := w.confirm; confirm != nil {
		w.confirm, w.discarded = nil, confirm()
	}
	return w.discarded == nil
}

// Unwrap is for http.ResponseController. net/http/pprof uses it to extend the write deadline for a profile.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Serve answers requests on ln until Shutdown is called. It always returns an error, and closes ln.
// After Shutdown the error is http.ErrServerClosed.
func (p *Plane) Serve(ln net.Listener) error { return p.serve(p.addListener(ln)) }

// addListener bounds the connections of ln, and adds it to the listeners that Probe checks.
func (p *Plane) addListener(ln net.Listener) *callerListener {
	l := newCallerListener(ln, p.maxCallers)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listeners = append(p.listeners, l)
	return l
}

func (p *Plane) serve(l *callerListener) error {
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.listeners = slices.DeleteFunc(p.listeners, func(other *callerListener) bool { return other == l })
	}()
	if p.history != nil {
		ctx, stop := context.WithCancelCause(context.Background())
		var sampling sync.WaitGroup
		sampling.Go(func() { p.history.sample(ctx) })
		defer sampling.Wait()
		defer stop(http.ErrServerClosed)
	}
	if p.https {
		return p.http.ServeTLS(l, "", "")
	}
	return p.http.Serve(l)
}

// Shutdown closes the listeners and waits until all requests are answered, including waits, events and pauses. When
// ctx ends first, it closes their connections and returns ctx's error. It does not stop the server that the Plane
// controls.
func (p *Plane) Shutdown(ctx context.Context) error {
	err := p.http.Shutdown(ctx)
	if err != nil {
		_ = p.http.Close()
	}
	return errors.Join(err, p.streams.shutdown(ctx)) // net/http does not wait for hijacked connections
}

// Actor returns the run.Group pair that serves the Plane on ln until the server has stopped. If the Plane
// fails earlier, execute returns at once: its error becomes the group's, and the group's interrupts begin the drain.
func (p *Plane) Actor(ln net.Listener) (execute func() error, interrupt func(error)) {
	l := p.addListener(ln)
	execute = func() error {
		err := p.serve(l)
		if p.leaving.Load() {
			<-p.srv.Done()
			return nil
		}
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		p.log.Error("control plane failed", zap.Error(err)) // logged here, because the group returns the error only after the drain
		return fmt.Errorf("control plane: %w", err)
	}
	interrupt = func(error) {
		p.srv.StartDrain(server.DrainOptions{Reason: "stopping", Final: true})
		<-p.srv.Done()
		ctx, cancel := context.WithTimeoutCause(context.Background(), p.linger, http.ErrServerClosed)
		defer cancel()
		_ = p.Shutdown(ctx) // closes the connections of callers that do not read their answer in time
	}
	return execute, interrupt
}

// Leave stops accepting callers, because another process serves the listeners now. It leaves the files of Unix sockets.
// Requests in progress are answered; the answer to a wait is that the caller must repeat it. Leave closes idle
// connections, so that further requests reach the other process.
func (p *Plane) Leave() {
	p.leaving.Store(true)
	p.http.SetKeepAlivesEnabled(false)
	p.mu.Lock()
	listeners := slices.Clone(p.listeners)
	p.mu.Unlock()
	for _, l := range listeners {
		switch ln := l.Listener.(type) {
		case *socket:
			_ = ln.close(false)
		case *net.UnixListener:
			ln.SetUnlinkOnClose(false)
		}
		_ = l.Close()
	}
}

// ServerActor returns the run.Group pair that serves srv on its listeners, and drains srv when it is
// interrupted. Add it first: the other actors' interrupts wait for the drain.
func ServerActor(srv *server.Server, listeners ...server.Listener) (execute func() error, interrupt func(error)) {
	execute = func() error {
		errs := make([]error, len(listeners))
		var serving sync.WaitGroup
		for i, ln := range listeners {
			serving.Go(func() { errs[i] = srv.ServeListener(ln) })
		}
		serving.Wait()
		<-srv.Done() // also without listeners
		for i, err := range errs {
			if errors.Is(err, server.ErrServerClosed) {
				errs[i] = nil
			}
		}
		return errors.Join(errs...)
	}
	interrupt = func(error) { srv.StartDrain(server.DrainOptions{Reason: "stopping", Final: true}) }
	return execute, interrupt
}
