package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"echod/server"
)

// Bounds on what callers can make the control plane hold.
const (
	headerTimeout  = 5 * time.Second  // for a request's headers to arrive
	requestTimeout = 10 * time.Second // for its body
	answerTimeout  = 10 * time.Second // for the caller to take the answer, or a line of a stream
	idleTimeout    = 30 * time.Second // between requests of one connection
	maxHeader      = 8 << 10          // bytes
	maxConnections = 48               // more wait in the kernel's queue
	maxStreams     = 32               // of these, requests that last: waits, events and pauses while connected
	lingerTimeout  = 100 * time.Millisecond
)

// Options configures a Plane.
type Options struct {
	Version string      // of the program, for the status
	Logger  *zap.Logger // nil logs nothing
	// Metrics answers GET /metrics; nil: there is no such path.
	Metrics http.Handler
	// OnRequest is told of every answer, but for those to Probe: the path of the route, empty where there is none such; the method, and the status code.
	// It is called concurrently; nil is not called.
	OnRequest func(route, method string, code int)
	// Pprof adds /debug/pprof/ to a plane made by NewWeb.
	Pprof bool
}

// Plane is the control plane of one server: an HTTP API, described by openapi.yaml. It is an
// http.Handler that may be mounted anywhere, over HTTP/1 where it is to answer waits, events and pauses while
// connected; Actor serves it on a socket of its own.
type Plane struct {
	srv     *server.Server
	version string
	log     *zap.Logger
	routes  []route
	streams chan struct{} // one token for each stream
	http    *http.Server
	door    *limitedListener // where Actor serves; nil before
	linger  time.Duration    // for answers under way when the server has stopped

	onRequest func(route, method string, code int)
	readOnly  bool // nothing here changes anything
}

// An endpoint answers one method of one path. What it returns is the caller's answer.
type endpoint func(c *caller, r *http.Request, arg string) error

// route is a path, whose last segment may be "*" for an argument, with its endpoints by method.
type route struct {
	path    string
	methods map[string]endpoint
	lasts   bool // an answer may take as long as its caller likes
}

// New makes the control plane of srv.
func New(srv *server.Server, opts Options) *Plane {
	p := newPlane(srv, opts)
	p.routes = []route{
		{"/v1/status", map[string]endpoint{http.MethodGet: p.getStatus}, false},
		{"/v1/conns", map[string]endpoint{http.MethodGet: p.getConns, http.MethodDelete: p.deleteConns}, false},
		{"/v1/conns/closed", map[string]endpoint{http.MethodGet: p.getClosed}, false},
		{"/v1/conns/*", map[string]endpoint{http.MethodDelete: p.deleteConn}, false},
		{"/v1/pause", map[string]endpoint{http.MethodPost: p.postPause}, false},
		{"/v1/resume", map[string]endpoint{http.MethodPost: p.postResume}, false},
		{"/v1/holds/*", map[string]endpoint{http.MethodDelete: p.deleteHold}, false},
		{"/v1/notify", map[string]endpoint{http.MethodPost: p.postNotify}, false},
		{"/v1/shutdown", map[string]endpoint{http.MethodPost: p.postShutdown}, false},
		{"/v1/wait", map[string]endpoint{http.MethodGet: p.getWait}, true},
		{"/v1/events", map[string]endpoint{http.MethodGet: p.getEvents}, true},
	}
	p.serveMetrics(opts.Metrics)
	return p
}

// newPlane makes a plane without routes.
func newPlane(srv *server.Server, opts Options) *Plane {
	if opts.Logger == nil {
		opts.Logger = zap.NewNop()
	}
	p := &Plane{
		srv: srv, version: opts.Version, log: opts.Logger, onRequest: opts.OnRequest,
		streams: make(chan struct{}, maxStreams), linger: lingerTimeout,
	}
	errorLog, _ := zap.NewStdLogAt(p.log, zap.WarnLevel) // fails only for an unknown level
	p.http = &http.Server{
		Handler:           p,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      answerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          errorLog,
		ConnContext:       withPeer,
	}
	return p
}

// ServeHTTP answers one request. Whatever would change something is logged with who asked for it.
func (p *Plane) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := &caller{ResponseWriter: w}
	defer c.end()
	route, err := p.dispatch(c, r)
	if err != nil {
		p.problemOf(err).write(c)
	}
	p.logRequest(c, r, err)
	if p.onRequest != nil && !peerFrom(r.Context()).probe {
		p.onRequest(route, knownMethod(r.Method), c.status)
	}
}

// knownMethod keeps callers from making up ever new methods, each of which would be remembered.
func knownMethod(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodDelete:
		return method
	}
	return "other"
}

// logRequest logs, once, what would change something.
func (p *Plane) logRequest(c *caller, r *http.Request, err error) {
	if p.readOnly || c.logged || r.Method == http.MethodGet || r.Method == http.MethodHead {
		return
	}
	c.logged = true
	var refused []zap.Field
	if err != nil {
		problem := p.problemOf(err)
		refused = []zap.Field{zap.Int("status", problem.Status), zap.Error(problem)}
	}
	p.log.Info("control request", slices.Concat(
		[]zap.Field{zap.String("method", shorten(r.Method)), zap.String("path", shorten(r.URL.Path))},
		peerFrom(r.Context()).fields(), refused)...)
}

// dispatch answers a request, and returns the path of its route.
func (p *Plane) dispatch(c *caller, r *http.Request) (path string, err error) {
	for _, route := range p.routes {
		arg, ok := route.match(r.URL.Path)
		if !ok {
			continue
		}
		answer, ok := route.methods[r.Method]
		if !ok && r.Method == http.MethodHead && !route.lasts {
			answer, ok = route.methods[http.MethodGet]
		}
		if ok && route.lasts {
			return route.path, p.stream(c, r, answer)
		}
		if ok {
			return route.path, answer(c, r, arg)
		}
		allowed := strings.Join(slices.Sorted(maps.Keys(route.methods)), ", ")
		c.Header().Set("Allow", allowed)
		return route.path, &Problem{
			Type: ProblemMethod, Title: "Method not allowed", Status: http.StatusMethodNotAllowed,
			Detail: shorten(r.Method) + " is not allowed here: want " + allowed,
		}
	}
	return "", notFound("nothing is at %s", shorten(r.URL.Path))
}

func (r route) match(path string) (arg string, ok bool) {
	prefix, wild := strings.CutSuffix(r.path, "*")
	if !wild {
		return "", path == r.path
	}
	arg, ok = strings.CutPrefix(path, prefix)
	return arg, ok && arg != "" && !strings.Contains(arg, "/")
}

// stream lets a request last. It bounds how many do, so that there is always room for the others.
func (p *Plane) stream(c *caller, r *http.Request, next endpoint) error {
	select {
	case p.streams <- struct{}{}:
	default:
		return &Problem{
			Type: ProblemBusy, Title: "Too many streams", Status: http.StatusServiceUnavailable,
			Detail: "too many waits, events and pauses are under way: try again later",
		}
	}
	ctx, err := c.takeOver(r.Context())
	c.leave = append(c.leave, func() { <-p.streams })
	if err != nil {
		return err
	}
	return next(c, r.WithContext(ctx), "")
}

// answer writes v as the answer.
func answer(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // an error means that the caller has gone
	return nil
}

// Actor returns the run.Group pair that serves the plane on ln. It serves until the server has
// stopped, so that it can be asked about the drain to the end. Where it cannot, it returns at once, for
// its error to be the group's, and the group's interrupts begin the drain.
func (p *Plane) Actor(ln net.Listener) (execute func() error, interrupt func(error)) {
	p.door = limit(ln, maxConnections)
	execute = func() error {
		err := p.http.Serve(p.door)
		if errors.Is(err, http.ErrServerClosed) {
			return nil
		}
		p.log.Error("the control plane has failed", zap.Error(err)) // the group's end may be long in coming
		return fmt.Errorf("control plane: %w", err)
	}
	interrupt = func(error) {
		p.srv.Drain(0, "stopping")
		<-p.srv.Done()
		ctx, cancel := context.WithTimeoutCause(context.Background(), p.linger, http.ErrServerClosed)
		defer cancel()
		if p.http.Shutdown(ctx) != nil {
			_ = p.http.Close()
		}
		p.awaitStreams(ctx)
	}
	return execute, interrupt
}

// awaitStreams waits for the streams to say their last line: net/http does not know of those that it
// handed over. It takes their places, of which no new ones are wanted any more.
func (p *Plane) awaitStreams(ctx context.Context) {
	for range cap(p.streams) {
		select {
		case p.streams <- struct{}{}:
		case <-ctx.Done():
			return
		}
	}
}
