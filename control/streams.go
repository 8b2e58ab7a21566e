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

// Long-lived requests: GET /v1/wait, GET /v1/events and POST /v1/pause?while=connected. They end when their caller
// disconnects.

var (
	errCallerGone = errors.New("the caller has closed its connection")
	errReplaced   = errors.New("ended for a newer request: too many waits, events and pauses are in progress")
	errWaitOver   = errors.New("the wait timed out")
	errShutDown   = errors.New("the control plane is shutting down")
)

// streams are the long-lived requests in progress.
type streams struct {
	max     int // maximum number; one more ends the idlest wait or stream of events
	maxKept int // maximum number of pauses while connected, which are never ended for another request

	mu      sync.Mutex
	open    map[*stream]struct{} // guarded by mu
	removed chan struct{}        // guarded by mu; closed when a stream was removed; nil unless shutdown waits for that
}

// stream is a long-lived request. Its context ends when the caller disconnects, or when the stream is ended for another
// request.
type stream struct {
	*response
	caller *caller
	ctx    context.Context
	cancel context.CancelCauseFunc
	kept   bool // never ended for another request

	// Guarded by streams.mu.
	active   time.Time // when the last line was sent
	replaced bool      // was ended for another request, and has not returned yet
}

// stream hijacks the connection of a request, and returns a stream for it. The error is a Problem if there are too many
// kept streams.
func (p *Plane) stream(w *response, r *http.Request, kept bool) (*stream, error) {
	if r.Method == http.MethodHead {
		return nil, refuseMethod(w, r, http.MethodGet)
	}
	s := &stream{response: w, caller: callerFrom(r.Context()), kept: kept, active: time.Now()}
	s.ctx, s.cancel = context.WithCancelCause(context.WithoutCancel(r.Context()))
	if err := p.streams.add(s); err != nil {
		s.cancel(err)
		return nil, err
	}
	w.cleanups = append(w.cleanups, func() { p.streams.remove(s) })
	if err := w.hijack(s.cancel, !kept); err != nil {
		return nil, err
	}
	if kept {
		s.caller.neverClose()
	}
	return s, nil
}

// add adds a stream. At the limit it ends the idlest one that is not kept.
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
	s.insertLocked(added)
	return nil
}

// insert adds a stream without checking the limits.
func (s *streams) insert(added *stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.insertLocked(added)
}

// insertLocked is insert for a caller that holds s.mu.
func (s *streams) insertLocked(added *stream) {
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
	if s.removed != nil {
		close(s.removed)
		s.removed = nil
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
		if s.removed == nil {
			s.removed = make(chan struct{})
		}
		ended := s.removed
		if err != nil {
			for open := range s.open {
				open.cancel(errShutDown)
				open.closeConn()
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

// send writes v as a line of JSON. An error means that the caller has left, or takes too long to read.
func (s *stream) send(p *Plane, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.sendBytes(p, append(line, '\n'))
}

// sendBytes writes a part of the answer. An error means that the caller has left, or takes too long to read.
func (s *stream) sendBytes(p *Plane, part []byte) error {
	if _, err := s.response.Write(part); err != nil {
		return err
	}
	s.caller.markActive()
	p.streams.mu.Lock()
	defer p.streams.mu.Unlock()
	s.active = time.Now()
	return nil
}

// start begins an answer that consists of lines of JSON.
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
	want := fields{"state": stateField(&wanted), "connections": countField(&open), "timeout": durationField(&timeout)}
	if err := decodeQuery(r, want); err != nil {
		return err
	}
	if wanted == server.StateStarting {
		return invalid("state", "a server that answers has started")
	}
	if wanted == 0 && open < 0 {
		return invalid("state", "missing: want state, connections or both")
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
	if err := decodeQuery(r, fields{"after": eventIDField(&after, &resumes)}); err != nil {
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

// pauseWhileConnected pauses the server until the caller disconnects.
func (p *Plane) pauseWhileConnected(w *response, r *http.Request, opts server.PauseOptions) error {
	s, err := p.stream(w, r, true)
	if err != nil {
		return err
	}
	opts.Conn = s.caller.raw // an upgrade hands it over with the hold
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

// holdWhileConnected returns when the hold has ended, or the caller has disconnected.
func (p *Plane) holdWhileConnected(s *stream, h *server.Hold) {
	select {
	case <-s.ctx.Done():
	case <-h.Done():
		if !errors.Is(h.Cause(), server.ErrHandedOver) { // the successor tells the caller when the hold ends
			_ = s.send(p, Released{Released: h.Cause().Error(), State: p.srv.Status().State.String()})
		}
	}
}

// ContinuePauses continues the pauses while connected of the predecessor. It is called once, after
// server.Server.TakeOver.
func (p *Plane) ContinuePauses() {
	holds, conns := p.srv.TakenOverHolds()
	for i, h := range holds {
		s := p.newInheritedStream(conns[i])
		go func() {
			defer s.close()
			defer h.Release()
			p.holdWhileConnected(s, h)
		}()
	}
}

// newInheritedStream returns a stream for a connection that was taken over. The predecessor has begun its answer.
func (p *Plane) newInheritedStream(nc net.Conn) *stream {
	w := &response{status: http.StatusCreated}
	s := &stream{response: w, caller: &caller{raw: nc}, kept: true, active: time.Now()}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	p.streams.insert(s)
	w.cleanups = append(w.cleanups, func() { p.streams.remove(s) })
	w.conn, w.header, w.started = nc, http.Header{}, true
	w.watchCaller(nc, nc, false, s.cancel)
	return s
}

// hijacked is the connection of a long-lived response. The Plane hijacks it and detects itself that the caller
// disconnects. net/http does not detect that if the caller has sent a byte after its request, such as a newline from a
// shell script. A pause would then outlive its owner.
type hijacked struct {
	mu       sync.Mutex
	conn     net.Conn // nil before hijack; guarded by mu
	header   http.Header
	started  bool     // the status line was written
	cleanups []func() // called by close
}

// hijack takes the connection over from net/http, which needs HTTP/1. It calls gone when the caller disconnects. A
// half-close counts as that unless mayHalfClose is true.
func (w *response) hijack(gone context.CancelCauseFunc, mayHalfClose bool) error {
	conn, buffered, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return fmt.Errorf("taking over the connection: %w", err)
	}
	_ = conn.SetDeadline(time.Time{})
	w.mu.Lock()
	w.conn, w.header = conn, http.Header{}
	w.mu.Unlock()
	w.watchCaller(conn, buffered, mayHalfClose, gone)
	return nil
}

// watchCaller calls gone when the caller disconnects or the response is closed.
func (w *response) watchCaller(conn net.Conn, in io.Reader, mayHalfClose bool, gone context.CancelCauseFunc) {
	ended := make(chan struct{})
	go awaitDisconnect(conn, in, mayHalfClose, gone, ended)
	w.cleanups = append(w.cleanups, func() {
		_ = conn.Close()
		<-ended
	})
}

// awaitDisconnect is the goroutine that waits until the caller disconnects. response.close waits for it.
func awaitDisconnect(conn net.Conn, buffered io.Reader, mayHalfClose bool, gone context.CancelCauseFunc,
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

// closeConn closes the connection of a long-lived response.
func (w *response) closeConn() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conn != nil {
		_ = w.conn.Close()
	}
}

// close calls the cleanups, the last one first.
func (w *response) close() {
	for i := len(w.cleanups) - 1; i >= 0; i-- {
		w.cleanups[i]()
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
	if !w.mayBegin() {
		return
	}
	if w.status == 0 {
		w.status = status
	}
	if w.conn == nil {
		w.ResponseWriter.WriteHeader(status)
		return
	}
	w.started = true
	w.header.Set("Connection", "close")
	w.header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	var head bytes.Buffer
	fmt.Fprintf(&head, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	_ = w.header.Write(&head) // writing to a buffer does not fail
	head.WriteString("\r\n")
	_, _ = w.Write(head.Bytes()) // after an error the stream's context ends
}

// Write writes a part of the answer. After hijack it fails if the caller does not read it within answerTimeout.
func (w *response) Write(p []byte) (int, error) {
	if !w.mayBegin() {
		return len(p), nil
	}
	if w.conn == nil {
		if w.status == 0 {
			w.status = http.StatusOK
		}
		return w.ResponseWriter.Write(p)
	}
	if !w.started {
		w.WriteHeader(http.StatusOK)
	}
	_ = w.conn.SetWriteDeadline(time.Now().Add(answerTimeout))
	return w.conn.Write(p)
}
