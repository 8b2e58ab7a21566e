package control

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"echod/internal/text"
	"echod/server"
)

// Long-lived requests, which end when their caller disconnects: GET /v1/wait, GET /v1/events and POST
// /v1/pause?while=connected.

var (
	errCallerGone = errors.New("the caller has closed its connection")
	errReplaced   = errors.New("ended for a newer request: too many waits, events and pauses are in progress")
	errWaitOver   = errors.New("the wait timed out")
	errShutDown   = errors.New("the control plane is shutting down")
)

// streams are the long-lived requests in progress.
type streams struct {
	max     int // maximum number; for one more, the idlest wait or stream of events is ended
	maxKept int // how many of them are pauses while connected, which are never ended for another

	mu    sync.Mutex
	open  map[*stream]struct{} // guarded by mu
	ended chan struct{}        // guarded by mu; closed when one has finished, if shutdown waits for that
}

// stream is a long-lived request. Its context ends when the caller disconnects, or when another request needs its
// place.
type stream struct {
	*response
	who    *caller
	ctx    context.Context
	cancel context.CancelCauseFunc
	kept   bool

	// Guarded by streams.mu.
	active   time.Time // of the last line sent
	replaced bool      // ended for another, and finishing
}

// stream makes a request long-lived. A kept stream is never ended for another one; the number of kept streams is
// bounded.
func (p *Plane) stream(w *response, r *http.Request, kept bool) (*stream, error) {
	if r.Method == http.MethodHead {
		return nil, refuseMethod(w, r, http.MethodGet)
	}
	s := &stream{response: w, who: callerFrom(r.Context()), kept: kept, active: time.Now()}
	s.ctx, s.cancel = context.WithCancelCause(context.WithoutCancel(r.Context()))
	if err := p.streams.add(s); err != nil {
		s.cancel(err)
		return nil, err
	}
	w.leave = append(w.leave, func() { p.streams.remove(s) })
	if err := w.hijack(s.cancel, !kept); err != nil {
		return nil, err
	}
	if kept {
		s.who.keep()
	}
	return s, nil
}

func (s *streams) add(added *stream) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	kept, open := 0, 0
	var idlest *stream
	for other := range s.open {
		if !other.replaced {
			open++
		}
		switch {
		case other.replaced:
		case other.kept:
			kept++
		case idlest == nil || other.active.Before(idlest.active):
			idlest = other
		}
	}
	if added.kept && kept >= s.maxKept {
		return &Problem{
			Type: ProblemBusy, Title: "Too many pauses", Status: http.StatusServiceUnavailable,
			Detail: fmt.Sprintf("%d pauses while connected are in progress: no more are allowed", s.maxKept),
		}
	}
	if open >= s.max {
		idlest.replaced = true
		idlest.cancel(errReplaced)
	}
	s.enterLocked(added)
	return nil
}

// enter adds a stream regardless of the limits.
func (s *streams) enter(added *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enterLocked(added)
}

// enterLocked adds a stream; s.mu is held.
func (s *streams) enterLocked(added *stream) {
	if s.open == nil {
		s.open = map[*stream]struct{}{}
	}
	s.open[added] = struct{}{}
}

func (s *streams) remove(removed *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	removed.cancel(nil)
	delete(s.open, removed)
	if s.ended != nil {
		close(s.ended)
		s.ended = nil
	}
}

// shutdown waits for the end of all long-lived requests. When ctx ends first, it closes their connections, and
// returns ctx's error.
func (s *streams) shutdown(ctx context.Context) error {
	var err error
	for done := ctx.Done(); ; {
		s.mu.Lock()
		if len(s.open) == 0 {
			s.mu.Unlock()
			return err
		}
		if s.ended == nil {
			s.ended = make(chan struct{})
		}
		ended := s.ended
		if err != nil {
			for open := range s.open {
				open.cancel(errShutDown)
				open.cutOff()
			}
		}
		s.mu.Unlock()
		select {
		case <-ended:
		case <-done:
			err, done = ctx.Err(), nil
		}
	}
}

// count returns the number of long-lived requests.
func (s *streams) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

// send writes v as a line. An error means that the caller has gone, or takes too long to read.
func (s *stream) send(p *Plane, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.sendBytes(p, append(line, '\n'))
}

// sendBytes writes a part of the answer. An error means that the caller has gone, or takes too long to read.
func (s *stream) sendBytes(p *Plane, part []byte) error {
	if _, err := s.response.Write(part); err != nil {
		return err
	}
	s.who.touch()
	p.streams.mu.Lock()
	defer p.streams.mu.Unlock()
	s.active = time.Now()
	return nil
}

// start begins an answer of lines.
func (s *stream) start(status int) {
	s.Header().Set("Content-Type", "application/jsonl")
	s.WriteHeader(status)
}

func (p *Plane) getWait(w *response, r *http.Request) error {
	var (
		wanted  server.State
		open    = -1
		timeout = time.Duration(-1)
	)
	want := fields{"state": state(&wanted), "connections": count(&open), "timeout": duration(&timeout)}
	if err := decodeQuery(r, want); err != nil {
		return err
	}
	if wanted == server.StateStarting {
		return invalid("state", "a server that answers has started")
	}
	if wanted == 0 && open < 0 {
		return invalid("state", "say what to wait for: state, connections or both")
	}
	s, err := p.stream(w, r, false)
	if err != nil {
		return err
	}
	ctx := s.ctx
	if timeout >= 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, errWaitOver)
		defer cancel()
	}

	var seen Waited
	var met bool
	err = p.srv.AwaitStatus(ctx, func(st server.State, connections int) bool {
		seen = Waited{State: st.String(), Connections: connections}
		met = (wanted == 0 || st == wanted) && (open < 0 || connections == open)
		never := st == server.StateStopped || st == server.StateDraining && wanted != 0 && wanted < server.StateDraining
		return met || never
	})
	switch {
	case errors.Is(err, errReplaced):
		return &Problem{
			Type: ProblemBusy, Title: "Too many requests that last", Status: http.StatusServiceUnavailable,
			Detail: err.Error(),
		}
	case errors.Is(err, server.ErrHandedOver):
		return err
	case err != nil:
		return &Problem{
			Type: ProblemTimeout, Title: "The wait timed out", Status: http.StatusRequestTimeout,
			Detail: "the wait timed out: the server is " + seen.State + " with " +
				text.Count(seen.Connections, "connection"),
			State: seen.State,
		}
	case !met:
		st := p.srv.Status()
		return &server.DrainingError{Deadline: cmp.Or(st.Drain, &server.DrainInfo{}).Deadline}
	default:
		return answerJSON(s, http.StatusOK, seen)
	}
}

func (p *Plane) getEvents(w *response, r *http.Request) error {
	var after uint64
	var resumes bool
	if err := decodeQuery(r, fields{"after": eventID(&after, &resumes)}); err != nil {
		return err
	}
	s, err := p.stream(w, r, false)
	if err != nil {
		return err
	}
	var sub *server.Subscription
	if resumes {
		sub = p.srv.SubscribeAfter(after)
	} else {
		sub = p.srv.Subscribe()
	}
	defer sub.Close()
	s.start(http.StatusOK)
	for e := range sub.Events(s.ctx) {
		if s.send(p, wireEvent(e)) != nil {
			return nil
		}
	}
	return nil
}

// pauseWhileConnected holds the server paused until the caller has gone.
func (p *Plane) pauseWhileConnected(w *response, r *http.Request, opts server.PauseOptions) error {
	s, err := p.stream(w, r, true)
	if err != nil {
		return err
	}
	opts.Conn = s.who.raw // an upgrade passes it on with the hold
	h, err := p.srv.Pause(opts)
	if err != nil {
		return err
	}
	defer h.Release()
	p.auditRequest(w, r, nil)
	s.Header().Set("Location", "/v1/holds/"+h.ID())
	s.start(http.StatusCreated)
	if s.send(p, NewHold(h.Info())) != nil {
		return nil
	}
	p.holdWhileConnected(s, h)
	return nil
}

// holdWhileConnected returns when the hold has ended, or the caller has gone.
func (p *Plane) holdWhileConnected(s *stream, h *server.Hold) {
	select {
	case <-s.ctx.Done():
	case <-h.Done():
		if !errors.Is(h.Cause(), server.ErrHandedOver) { // then the successor tells the caller
			_ = s.send(p, Released{Released: h.Cause().Error(), State: p.srv.Status().State.String()})
		}
	}
}

// Continue continues the pauses while connected that the server has taken over. It is called once, after
// server.Server.TakeOver.
func (p *Plane) Continue() {
	holds, conns := p.srv.TakenHolds()
	for i, h := range holds {
		s := p.continued(conns[i])
		go func() {
			defer s.close()
			defer h.Release()
			p.holdWhileConnected(s, h)
		}()
	}
}

// continued makes a stream of a connection that was taken over, whose answer has begun.
func (p *Plane) continued(nc net.Conn) *stream {
	w := &response{status: http.StatusCreated}
	s := &stream{response: w, who: &caller{raw: nc}, kept: true, active: time.Now()}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	p.streams.enter(s)
	w.leave = append(w.leave, func() { p.streams.remove(s) })
	w.conn, w.header, w.began = nc, http.Header{}, true
	w.watch(nc, nc, false, s.cancel)
	return s
}

// hijacked is the connection of a long-lived response. net/http does not notice that a caller disconnects if the
// caller has sent a byte after its request, such as a newline from a shell script. A pause would then outlive its
// owner. So the Plane hijacks the connection and watches it itself.
type hijacked struct {
	mu     sync.Mutex
	conn   net.Conn // nil before hijack; guarded by mu
	header http.Header
	began  bool     // the status line was written
	leave  []func() // called by close, the last one first
}

// hijack takes the connection over from net/http, and calls gone when the caller disconnects. A half-close counts as
// disconnecting unless mayHalfClose is true. It needs HTTP/1.
func (w *response) hijack(gone context.CancelCauseFunc, mayHalfClose bool) error {
	conn, buffered, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return fmt.Errorf("taking over the connection: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	w.mu.Lock()
	w.conn, w.header = conn, http.Header{}
	w.mu.Unlock()
	w.watch(conn, buffered, mayHalfClose, gone)
	return nil
}

// watch calls gone when the caller disconnects, until close.
func (w *response) watch(conn net.Conn, in io.Reader, mayHalfClose bool, gone context.CancelCauseFunc) {
	ended := make(chan struct{})
	go awaitEnd(conn, in, mayHalfClose, gone, ended)
	w.leave = append(w.leave, func() {
		_ = conn.Close()
		<-ended
	})
}

// awaitEnd is the goroutine that waits for the caller to disconnect; response.close waits for it.
func awaitEnd(conn net.Conn, buffered io.Reader, mayHalfClose bool, gone context.CancelCauseFunc,
	ended chan<- struct{},
) {
	defer close(ended)
	if _, err := io.Copy(io.Discard, buffered); err == nil && mayHalfClose {
		if own, ok := conn.(*callerConn); ok {
			conn = own.Conn
		}
		awaitHangup(conn)
	}
	gone(errCallerGone)
}

// cutOff closes the connection of a long-lived response.
func (w *response) cutOff() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conn != nil {
		_ = w.conn.Close()
	}
}

// close releases what the response holds.
func (w *response) close() {
	for i := len(w.leave) - 1; i >= 0; i-- {
		w.leave[i]()
	}
}

// Header returns the headers of the answer.
func (w *response) Header() http.Header {
	if w.conn != nil {
		return w.header
	}
	return w.ResponseWriter.Header()
}

// WriteHeader begins the answer.
func (w *response) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	if w.conn == nil {
		w.ResponseWriter.WriteHeader(status)
		return
	}
	w.began = true
	w.header.Set("Connection", "close")
	w.header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	var head bytes.Buffer
	fmt.Fprintf(&head, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	_ = w.header.Write(&head) // a buffer takes everything
	head.WriteString("\r\n")
	_, _ = w.Write(head.Bytes()) // if the caller has gone, the stream's context ends
}

// Write writes a part of the answer. After hijack it fails if the caller does not take it in answerTimeout.
func (w *response) Write(p []byte) (int, error) {
	if w.conn == nil {
		if w.status == 0 {
			w.status = http.StatusOK
		}
		return w.ResponseWriter.Write(p)
	}
	if !w.began {
		w.WriteHeader(http.StatusOK)
	}
	_ = w.conn.SetWriteDeadline(time.Now().Add(answerTimeout))
	return w.conn.Write(p)
}
