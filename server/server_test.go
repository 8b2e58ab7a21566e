package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

func TestServe(t *testing.T) {
	t.Run("an error that makes accepting impossible drains the server", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		broken := errors.New("broken")
		r.ln.failWith(func() error { return broken })
		r.dial(t)
		began := time.Now()
		pass(acceptorsTimeout)
		c.has(t, "SHUTDOWN 5 accept error\n")
		if !r.ln.isClosed() {
			t.Error("Serve left its listener open")
		}
		c.leave(t)
		wantErr(t, "Serve", <-r.served, broken)
		wantEqual(t, "duration", time.Since(began), acceptorsTimeout)
	}))

	t.Run("such an error ends only its listener if another one is served", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		other := &rig{Server: r.Server, ln: newFakeListener()}
		other.served = serve(t, r.Server, other.ln)
		c := r.dial(t)
		broken := errors.New("broken")
		r.ln.failWith(func() error { return broken })
		r.dial(t)
		wantErr(t, "Serve", <-r.served, broken)
		if !r.ln.isClosed() {
			t.Error("Serve left its listener open")
		}
		wantEqual(t, "errors logged", len(r.messages("cannot accept any more")), 1)
		c.echoes(t, "x")
		other.dial(t).echoes(t, "y")
		other.ln.failWith(func() error { return broken }) // the last one
		other.dial(t)
		wantState(t, r.Server, StateDraining, 2)
	}))

	t.Run("a client that was accepted when such an error came is served", bubbled(func(t *testing.T) {
		fake := newFakeListener()
		r := newRigOn(t, plainListener{fake}, fake, Echo, Options{})
		other := newFakeListener()
		serve(t, r.Server, other) // keeps the server running
		synctest.Wait()
		broken := errors.New("broken")
		failed := false
		fake.failWith(func() error {
			if failed {
				return nil
			}
			failed = true
			return broken
		})
		c := r.dial(t)
		wantErr(t, "Serve", <-r.served, broken)
		c.echoes(t, "x")
	}))

	t.Run("returns net.ErrClosed when the owner closes the listener", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		other := &rig{Server: r.Server, ln: newFakeListener()}
		served := serve(t, r.Server, other.ln)
		c := r.dial(t)
		_ = r.ln.Close()
		wantErr(t, "Serve", <-r.served, net.ErrClosed)
		wantState(t, r.Server, StateRunning, 1)
		c.echoes(t, "x")
		other.dial(t).echoes(t, "y")
		_ = r.Close()
		wantErr(t, "Serve of the other listener", <-served, ErrServerClosed)
	}))

	t.Run("a drain stops every listener", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		other := &rig{Server: r.Server, ln: newFakeListener()}
		other.served = serve(t, r.Server, other.ln)
		a, b := r.dial(t), other.dial(t)
		r.drain(time.Second, "TERM")
		a.ends(t, "SHUTDOWN 1 TERM\n")
		b.ends(t, "SHUTDOWN 1 TERM\n")
		wantErr(t, "first Serve", <-r.served, ErrServerClosed)
		wantErr(t, "second Serve", <-other.served, ErrServerClosed)
		if !r.ln.isClosed() || !other.ln.isClosed() {
			t.Error("a listener was left open")
		}
	}))

	t.Run("called during a drain it serves its queue and waits for the end", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.dial(t)
		r.drain(time.Minute, "TERM")
		late := &rig{Server: r.Server, ln: newFakeListener()}
		queued := late.dial(t)
		began := time.Now()
		served := serve(t, r.Server, late.ln)
		pass(time.Second)
		queued.has(t, "SHUTDOWN 60 TERM\n")
		queued.echoes(t, "x")
		wantErr(t, "Serve", <-served, ErrServerClosed)
		wantEqual(t, "duration", time.Since(began), time.Minute+lingerTimeout)
		if !late.ln.isClosed() {
			t.Error("Serve left its listener open")
		}
	}))

	t.Run("called after a drain it rejects its queue without resets", bubbled(func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		s.StartDrain(DrainOptions{Grace: time.Hour, Reason: "TERM"})
		<-s.Done()
		r := &rig{Server: s, ln: newFakeListener()}
		clients := []*client{r.dial(t), r.dial(t), r.dial(t)}
		clients[0].send(t, "unread input")
		served := make(chan error, 1)
		go func() { served <- s.Serve(r.ln) }()
		for _, c := range clients {
			c.ends(t, "SHUTDOWN 0 TERM\n")
		}
		wantErr(t, "Serve", <-served, ErrServerClosed)
		if !r.ln.isClosed() {
			t.Error("Serve left its listener open")
		}
		wantClosed(t, s, map[Reason]uint64{ReasonRejectedDraining: 3})
		wantEqual(t, "rejected in the report, which was final", report(t, s).Rejected, 0)
	}))

	t.Run("called after a drain it returns although the process is out of files", bubbled(func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		_ = s.Close()
		r := &rig{Server: s, ln: newFakeListener()}
		outOfFiles(r)
		r.dial(t)
		wantErr(t, "Serve", s.Serve(r.ln), ErrServerClosed)
	}))

	t.Run("refuses invalid listeners", func(t *testing.T) {
		s, _ := newServer(t, nil, Options{})
		wantErrText(t, "Serve(nil)", s.Serve(nil), "listener is nil")
		ln := newFakeListener()
		wantErrText(t, "Serve without a handler", s.Serve(ln), "handler")
		if !ln.isClosed() {
			t.Error("Serve left its listener open")
		}
		wantErrText(t, "ListenAndServe", s.ListenAndServe("nowhere:at:all"), "nowhere")
	})
}

func TestListenAndServe(t *testing.T) {
	s, _ := newServer(t, Echo, Options{})
	served := make(chan error, 1)
	go func() { served <- s.ListenAndServe("127.0.0.1:0") }()
	if err := s.AwaitStatus(t.Context(), func(st State, _ int) bool { return st == StateRunning }); err != nil {
		t.Fatal(err)
	}
	echoed(t, dialTCP(t, s.Status().Listeners[0].Address), "x")
	_ = s.Close()
	wantErr(t, "ListenAndServe", <-served, ErrServerClosed)
}

func TestServeListener(t *testing.T) {
	t.Run("each listener may have its own handler and WrapConn", bubbled(func(t *testing.T) {
		s, _ := newServer(t, nil, Options{WrapConn: addressLine})
		says := func(text string) Handler {
			return HandlerFunc(func(_ context.Context, c *Conn) error { _, err := io.WriteString(c, text); return err })
		}
		a, b := &rig{Server: s, ln: newFakeListener()}, &rig{Server: s, ln: newFakeListener()}
		serveListener(t, s, Listener{Listener: a.ln, Handler: says("a")})
		serveListener(t, s, Listener{Listener: b.ln, Handler: says("b"), WrapConn: func(_ context.Context, nc net.Conn) (net.Conn, error) {
			return nc, nil
		}})
		first, second := a.dial(t), b.dial(t)
		first.has(t, "") // waits for its address
		first.send(t, "local\n")
		first.ends(t, "a")
		second.ends(t, "b")
	}))
}

func TestCloseListener(t *testing.T) {
	t.Run("serves the accept queue, and other clients are not affected",
		inBubble(Echo, Options{Limits: Limits{MaxConns: 2}}, func(t *testing.T, r *rig) {
			other := &rig{Server: r.Server, ln: newFakeListener()}
			other.served = serve(t, r.Server, other.ln)
			a, b := r.dial(t), r.dial(t)
			queued := r.dial(t)
			took := elapsed(func() { wantErr(t, "CloseListener", r.CloseListener(r.ln), nil) })
			wantEqual(t, "duration", took, time.Duration(0))
			queued.send(t, "x")
			pass(time.Minute)
			queued.has(t, "") // waits for a place, as before
			a.leave(t)
			queued.has(t, "x")
			wantErr(t, "Serve", <-r.served, net.ErrClosed)
			if !r.ln.isClosed() {
				t.Error("the listener is open")
			}
			b.echoes(t, "y")
			b.leave(t)
			other.dial(t).echoes(t, "z")
			wantState(t, r.Server, StateRunning, 2)
			wantErr(t, "CloseListener again", r.CloseListener(r.ln), ErrNoListener)
		}))

	t.Run("the last listener may be closed and replaced", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		wantErr(t, "CloseListener", r.CloseListener(r.ln), nil)
		wantErr(t, "Serve", <-r.served, net.ErrClosed)
		wantState(t, r.Server, StateRunning, 1)
		next := &rig{Server: r.Server, ln: newFakeListener()}
		serve(t, r.Server, next.ln)
		next.dial(t).echoes(t, "x")
		c.echoes(t, "y")
	}))

	t.Run("before ServeListener, the queue is still served", bubbled(func(t *testing.T) {
		s, _ := newServer(t, Echo, Options{})
		early := &rig{Server: s, ln: newFakeListener()}
		queued := early.dial(t)
		for range 2 {
			wantErr(t, "CloseListener", s.CloseListener(early.ln), nil)
		}
		wantErr(t, "Serve", <-serve(t, s, early.ln), net.ErrClosed)
		queued.echoes(t, "x")
		if !early.ln.isClosed() {
			t.Error("the listener is open")
		}
		wantErr(t, "CloseListener after Serve", s.CloseListener(early.ln), ErrNoListener)
		next := &rig{Server: s, ln: newFakeListener()}
		serve(t, s, next.ln)
		next.dial(t).echoes(t, "y")
		for i := range maxKnownListeners + 1 {
			want := error(nil)
			if i == maxKnownListeners {
				want = ErrNoListener
			}
			wantErr(t, "CloseListener of one that is never served", s.CloseListener(newFakeListener()), want)
		}
	}))

	t.Run("works for a listener without deadlines", bubbled(func(t *testing.T) {
		fake := newFakeListener()
		ln := plainListener{fake}
		r := newRigOn(t, ln, fake, Echo, Options{})
		r.dial(t).echoes(t, "x")
		wantErr(t, "CloseListener", r.CloseListener(ln), nil)
		wantErr(t, "Serve", <-r.served, net.ErrClosed)
	}))

	t.Run("a drain during it continues", inBubble(Echo, Options{Limits: Limits{MaxConns: 1}}, func(t *testing.T, r *rig) {
		served, queued := r.dial(t), r.dial(t)
		wantErr(t, "CloseListener", r.CloseListener(r.ln), nil)
		pass(time.Second)
		r.drain(5*time.Second, "x")
		pass(acceptorsTimeout)
		served.has(t, "SHUTDOWN 5 x\n")
		queued.has(t, "SHUTDOWN 5 x\n")
	}))
}

// namelessListener and its connections have no addresses.
type (
	namelessListener struct{ *fakeListener }
	namelessConn     struct{ net.Conn }
)

func (l namelessListener) Addr() net.Addr { return nil }

func (l namelessListener) Accept() (net.Conn, error) {
	nc, err := l.fakeListener.Accept()
	if err != nil {
		return nil, err
	}
	return namelessConn{nc}, nil
}

func (namelessConn) LocalAddr() net.Addr  { return nil }
func (namelessConn) RemoteAddr() net.Addr { return nil }

func TestListenerWithoutAddress(t *testing.T) {
	for _, inherited := range []bool{false, true} {
		t.Run(fmt.Sprintf("inherited %t", inherited), bubbled(func(t *testing.T) {
			s, _ := newServer(t, Echo, Options{Limits: Limits{MaxConnsPerIP: 1}})
			fake := newFakeListener()
			served := serveListener(t, s, Listener{Listener: namelessListener{fake}, Inherited: inherited})
			c := (&rig{Server: s, ln: fake}).dial(t)
			c.echoes(t, "x")
			wantEqual(t, "address", s.Status().Listeners[0].Address.String(), "unknown")
			for info := range s.Conns() {
				wantEqual(t, "remote", info.Remote.String(), "unknown")
				wantEqual(t, "local", info.Local.String(), "unknown")
			}
			wantErr(t, "Probe", s.Probe(t.Context()), nil)
			s.StartDrain(DrainOptions{Grace: time.Second})
			wantErr(t, "Serve", <-served, ErrServerClosed)
		}))
	}
}

func TestZeroServer(t *testing.T) {
	s := new(Server)
	ln := newFakeListener()
	_, pauseErr := s.Pause(PauseOptions{})
	_, resumeErr := s.Resume(Caller{})
	_, _, notifyErr := s.Notify(t.Context(), "hello")
	for what, err := range map[string]error{
		"Serve": s.Serve(ln), "ListenAndServe": s.ListenAndServe("127.0.0.1:0"), "Shutdown": s.Shutdown(t.Context()),
		"Close": s.Close(), "Pause": pauseErr, "Resume": resumeErr, "Notify": notifyErr, "Probe": s.Probe(t.Context()),
		"WhilePaused": s.WhilePaused(t.Context(), "", func(context.Context) error { return nil }),
		"AwaitStatus": s.AwaitStatus(t.Context(), func(State, int) bool { return false }),
	} {
		wantErr(t, what, err, errNotNew)
	}
	wantErr(t, "Kill", s.Kill(1), ErrNoConn)
	wantErr(t, "ReleaseHold", s.ReleaseHold("h1", Caller{}), ErrNoHold)
	wantErr(t, "CloseListener", s.CloseListener(ln), ErrNoListener)
	if !ln.isClosed() {
		t.Error("Serve left its listener open")
	}
}

func TestServerDraining(t *testing.T) {
	t.Run("is closed when clients have been told", inBubble(Echo, Options{Drain: DrainOptions{Delay: time.Second}}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.drain(time.Minute, "x")
		began := time.Now()
		<-r.Draining()
		if took := time.Since(began); took < time.Second {
			t.Errorf("it was closed after %v, want the delay of 1s", took)
		}
		synctest.Wait()
		c.has(t, "SHUTDOWN 60 x\n")
	}))
}
