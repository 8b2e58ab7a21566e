package simulate

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"echod/control"
	"echod/server"
)

// world runs one history: servers, control planes, clients and operators. It records what happens, for the model.
type world struct {
	h             *history
	shape         shape
	began         time.Time
	platform      platform
	model         *model
	traces        []*trace
	opEvents      atomic.Int64 // changes whenever an operator begins or ends something
	opsInProgress atomic.Int32 // operators' requests in progress

	mu         sync.Mutex
	log        []string
	violations []violation
	byAddr     map[string]*trace
	owner      *generation // to which operators talk
	all        []*generation
	records    map[*trace]*connRecord
}

// violation is a broken invariant.
type violation struct {
	Rule, Detail string
	At           time.Duration
}

// connRecord is what the servers reported about one client's connection.
type connRecord struct {
	ids      []uint64
	accepted time.Time
	served   time.Time // when it was admitted
	admitted int       // how often
	closed   []server.ClosedConn
	closedBy *generation // the last one
}

// platform is the network below the servers.
type platform interface {
	// open starts the listeners of the first generation: of the echo, of the service, and of the control plane.
	open(g *generation) error
	dial(c *clientPlan) (clientConn, error)
	dialControl(g *generation) (net.Conn, error)
	// links makes the link between two generations, and the second one's control listener.
	links(from, to *generation, fault linkFault) (near, far server.Link, err error)
	// kill ends a generation as SIGKILL would.
	kill(g *generation)
	isDead(g *generation) bool
}

// generation is one server with its control plane, in a process of its own.
type generation struct {
	name    string
	srv     *server.Server
	plane   *control.Plane
	proc    *process // in a bubble
	echo    net.Listener
	service net.Listener
	control net.Listener
	serving sync.WaitGroup
	owned   bool // it has owned the connections
}

func newWorld(h *history, sh shape) *world {
	w := &world{h: h, shape: sh, began: time.Now(), byAddr: make(map[string]*trace), records: make(map[*trace]*connRecord)}
	w.model = newModel(w)
	for _, c := range h.Clients {
		t := newTrace(c)
		w.traces = append(w.traces, t)
		w.records[t] = &connRecord{}
	}
	return w
}

func (w *world) since() time.Duration { return time.Since(w.began) }

// note adds a line to the history that a person reads.
func (w *world) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.log = append(w.log, fmt.Sprintf("%9.3fs %s", w.since().Seconds(), fmt.Sprintf(format, args...)))
}

func (w *world) violate(rule, format string, args ...any) {
	detail := fmt.Sprintf(format, args...)
	w.mu.Lock()
	known := slices.ContainsFunc(w.violations, func(v violation) bool { return v.Rule == rule && v.Detail == detail })
	w.mu.Unlock()
	if known {
		return
	}
	w.note("VIOLATION of %q: %s", rule, detail)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.violations = append(w.violations, violation{rule, detail, w.since()})
}

// register makes the client known by the address that the server sees.
func (w *world) register(addr net.Addr, id int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.byAddr[addr.String()] = w.traces[slices.IndexFunc(w.traces, func(t *trace) bool { return t.plan.ID == id })]
}

func (w *world) traceOf(addr net.Addr) *trace {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.byAddr[addr.String()]
}

// options returns the server's options of the history.
func (w *world) options(g *generation) server.Options {
	p := w.h.Server
	o := server.Options{
		Logger:     zap.New(&errorCore{LevelEnabler: zapcore.ErrorLevel, w: w}),
		QuietConns: true,
		Notifier:   server.DefaultLineNotifier(),
		Limits:     server.Limits{MaxConns: server.Off, MaxConnsPerIP: p.PerAddress},
		Timeouts:   server.Timeouts{Idle: p.Idle, Stall: p.Stall, MaxAge: p.MaxAge},
		Drain:      server.DrainOptions{Grace: p.Grace, Delay: p.Delay, Spread: p.Spread},
		ConnState:  func(c *server.Conn, phase server.Phase) { w.sawPhase(g, c, phase) },
		OnClose:    func(c server.ClosedConn) { w.sawClose(g, c) },
	}
	if p.MaxConns > 0 {
		o.Limits.MaxConns = p.MaxConns
	}
	if p.RejectFull {
		o.Limits.AtLimit = server.LimitReject
	}
	return o
}

func (w *world) sawPhase(g *generation, c *server.Conn, phase server.Phase) {
	if w.platform.isDead(g) {
		return
	}
	t := w.traceOf(c.RemoteAddr())
	if t == nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	l := w.records[t]
	switch phase {
	case server.PhaseWaiting:
		l.ids = append(l.ids, c.ID())
		l.accepted = time.Now()
	case server.PhaseServing:
		l.admitted++
		if l.served.IsZero() {
			l.served = time.Now()
		}
	}
}

func (w *world) sawClose(g *generation, c server.ClosedConn) {
	if w.platform.isDead(g) {
		return
	}
	t := w.traceOf(c.Remote)
	if t == nil {
		return
	}
	w.mu.Lock()
	l := w.records[t]
	l.closed = append(l.closed, c)
	l.closedBy = g
	w.mu.Unlock()
	w.note("client %d: closed by %s, %v, in %d out %d", t.plan.ID, g.name, c.Reason, c.BytesIn, c.BytesOut)
}

// errorCore reports each error that a server logs as a violation, except those that a history causes on purpose: handlers
// that panic or ignore their context.
type errorCore struct {
	zapcore.LevelEnabler
	w *world
}

func (c *errorCore) With([]zapcore.Field) zapcore.Core { return c }

func (c *errorCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *errorCore) Write(e zapcore.Entry, _ []zapcore.Field) error {
	switch e.Message {
	case "handler panicked", "handler ignores its context, stopping without it":
	default:
		c.w.violate("no unexpected error is logged", "%s", e.Message)
	}
	return nil
}

func (c *errorCore) Sync() error { return nil }

// start starts the server of a generation on its listeners.
func (g *generation) start(w *world) error {
	srv, err := server.New(server.Echo, w.options(g))
	if err != nil {
		return err
	}
	g.srv, g.plane = srv, control.New(srv, control.Options{Version: g.name})
	return nil
}

func (g *generation) serve(w *world, echo, svc server.Listener) {
	svc.Handler = service{w}
	for _, l := range []server.Listener{echo, svc} {
		g.serving.Go(func() {
			if err := g.srv.ServeListener(l); !errors.Is(err, server.ErrServerClosed) && !w.platform.isDead(g) {
				w.violate("serving ends with the drain", "%s: %v", g.name, err)
			}
		})
	}
	g.serveControl()
}

func (g *generation) serveControl() { g.serving.Go(func() { _ = g.plane.Serve(g.control) }) }

// stop ends what is left of a generation.
func (g *generation) stop() {
	if g.srv != nil {
		_ = g.srv.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_ = g.plane.Shutdown(ctx)
		cancel()
	}
	g.serving.Wait()
}

// run runs the history and returns what was violated.
func (w *world) run() {
	first := &generation{name: "server 1", owned: true}
	if err := w.platform.open(first); err != nil {
		w.violate("a server starts", "%v", err)
		return
	}
	if err := first.start(w); err != nil {
		w.violate("a server starts", "%v", err)
		return
	}
	w.owner, w.all = first, []*generation{first}
	first.serve(w, server.Listener{Listener: first.echo}, server.Listener{Listener: first.service})
	_ = first.srv.AwaitStatus(context.Background(), func(st server.State, _ int) bool { return st == server.StateRunning })

	var clients, checks sync.WaitGroup
	for _, t := range w.traces {
		clients.Go(func() { t.run(w.platform.dial, w.note) })
	}
	over := make(chan struct{})
	checks.Go(func() { w.monitor(over) })
	w.operate()
	w.settle()
	w.finish()
	for _, t := range w.traces {
		t.resumeReading()
	}
	w.sleep(5 * w.shape.timeouts)
	for _, t := range w.traces {
		t.giveUp()
	}
	close(over)
	checks.Wait()
	clients.Wait()
	for _, g := range w.all {
		g.stop()
	}
	w.sleep(10 * w.shape.timeouts) // until handlers that hang have returned
	w.model.checkEnd()
	w.checkGoroutines()
}

func (w *world) sleep(d time.Duration) { time.Sleep(d) }

// current returns the generation that operators talk to.
func (w *world) current() *generation {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.owner
}

// operate performs the operators' actions. Messages and upgrades take time, so other actions run beside them.
func (w *world) operate() {
	var long sync.WaitGroup
	for _, op := range w.h.Ops {
		w.sleep(time.Until(w.began.Add(op.At)))
		if op.Do == "notify" || op.Do == "upgrade" {
			long.Go(func() { w.perform(op) })
			continue
		}
		w.perform(op)
	}
	w.sleep(time.Until(w.began.Add(w.h.Horizon)))
	long.Wait()
}

// settle resumes the server and leaves it alone for a while, unless it drains. Then every client must have been served.
func (w *world) settle() {
	if w.model.draining() {
		return
	}
	w.perform(opPlan{Do: "resume"})
	w.sleep(8 * w.shape.timeouts)
	if !w.model.draining() {
		w.model.checkSettled()
	}
}

// finish drains the server unless that has begun, and waits for its end.
func (w *world) finish() {
	if !w.model.draining() {
		w.perform(opPlan{Do: "drain", TTL: -1})
	}
	for _, g := range w.generations() {
		if g.srv == nil || !g.owned || w.platform.isDead(g) {
			continue
		}
		wait := max(0, time.Until(w.model.drainLimit(g))) + w.slack()
		select {
		case <-g.srv.Done():
		case <-time.After(wait):
			w.violate("a drain ends", "%s has not stopped by %v", g.name, w.model.drainLimit(g).Sub(w.began))
		}
	}
}

func (w *world) generations() []*generation {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.all)
}

// slack is how late something may be on a busy machine.
func (w *world) slack() time.Duration {
	if w.shape.sockets {
		return 10 * time.Second
	}
	return 20 * time.Millisecond
}

// monitor requests the status periodically, as a monitoring system would, and checks it.
func (w *world) monitor(over <-chan struct{}) {
	interval := w.shape.timeouts / 3
	for i := 0; ; i++ {
		select {
		case <-over:
			return
		case <-time.After(interval + time.Duration(i%7)*time.Millisecond + 1):
		}
		g := w.current()
		before, busy := w.opEvents.Load(), w.opsInProgress.Load() > 0
		status, err := w.status(g, i%4 == 0)
		if g != w.current() {
			continue // it has handed over, and no longer answers
		}
		if err != nil {
			select {
			case <-g.srv.Done():
			default:
				w.violate("the control plane answers", "GET /v1/status of %s: %v", g.name, err)
			}
			continue
		}
		exact := !busy && w.opEvents.Load() == before && w.opsInProgress.Load() == 0
		w.model.checkStatus(g, status, exact)
	}
}

// status requests the status, over the control plane's socket or by a direct call.
func (w *world) status(g *generation, socket bool) (control.Status, error) {
	var st control.Status
	if !socket {
		rec := &recorder{header: http.Header{}}
		r, err := http.NewRequest(http.MethodGet, "/v1/status", nil)
		if err != nil {
			return st, err
		}
		g.plane.ServeHTTP(rec, r)
		if rec.code != http.StatusOK {
			return st, fmt.Errorf("status code %d", rec.code)
		}
		return st, json.Unmarshal(rec.body.Bytes(), &st)
	}
	code, body, _, err := w.call(g, http.MethodGet, "/v1/status", "", false)
	if err == nil && code != http.StatusOK {
		err = fmt.Errorf("status code %d", code)
	}
	if err != nil {
		return st, err
	}
	return st, json.Unmarshal(body, &st)
}

// recorder is a minimal http.ResponseWriter.
type recorder struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) Write(p []byte) (int, error) { return r.body.Write(p) }
func (r *recorder) WriteHeader(code int)        { r.code = code }

// call makes a request on a connection of its own. With keep, it returns the connection after the first line of the
// answer, and the caller closes it.
func (w *world) call(g *generation, method, path, body string, keep bool) (code int, answer []byte, nc net.Conn, err error) {
	nc, err = w.platform.dialControl(g)
	if err != nil {
		return 0, nil, nil, err
	}
	if !keep {
		defer nc.Close()
	}
	_ = nc.SetDeadline(time.Now().Add(20 * time.Second))
	r, err := http.NewRequest(method, "http://echod"+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, nil, err
	}
	r.Close = !keep
	if err := r.Write(nc); err != nil {
		return 0, nil, nc, err
	}
	res, err := http.ReadResponse(bufio.NewReader(nc), r)
	if err != nil {
		return 0, nil, nc, err
	}
	if keep {
		line, err := bufio.NewReader(res.Body).ReadBytes('\n')
		return res.StatusCode, line, nc, err
	}
	answer, err = io.ReadAll(res.Body)
	return res.StatusCode, answer, nil, err
}

// checkGoroutines reports goroutines of this bubble that have not ended.
func (w *world) checkGoroutines() {
	if w.shape.sockets {
		return
	}
	buf := make([]byte, 1<<20)
	own := make([]byte, 200)
	own = own[:runtime.Stack(own, false)]
	bubble := bubbleOf(string(own))
	for dump := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		head, _, _ := strings.Cut(dump, "\n")
		if bubble == "" || bubbleOf(head) != bubble {
			continue
		}
		if strings.Contains(dump, "internal/synctest.Run(") || strings.Contains(dump, "testingSynctestTest(") || strings.Contains(dump, "checkGoroutines") {
			continue
		}
		lines := strings.Split(dump, "\n")
		w.violate("goroutines end", "%s", strings.Join(lines[:min(len(lines), 24)], "\n\t"))
	}
}

// bubbleOf returns "synctest bubble N" from a goroutine's header.
func bubbleOf(stack string) string {
	i := strings.Index(stack, "synctest bubble ")
	if i < 0 {
		return ""
	}
	end := strings.IndexAny(stack[i:], "],:")
	if end < 0 {
		return ""
	}
	return stack[i : i+end]
}

// snapshot copies what the servers have said about the clients.
func (w *world) snapshot() map[*trace]connRecord {
	w.mu.Lock()
	defer w.mu.Unlock()
	records := make(map[*trace]connRecord)
	for t, l := range w.records {
		records[t] = *l
	}
	return records
}
