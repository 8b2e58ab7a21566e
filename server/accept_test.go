package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
)

// outOfFiles makes accepting fail until ok is set.
func outOfFiles(r *rig) (ok *atomic.Bool, tries *atomic.Int64) {
	ok, tries = new(atomic.Bool), new(atomic.Int64)
	r.ln.failWith(func() error {
		tries.Add(1)
		if ok.Load() {
			return nil
		}
		return &os.SyscallError{Syscall: "accept4", Err: syscall.EMFILE}
	})
	return ok, tries
}

// temporary is an error of a listener that is not the kernel's.
type temporary bool

func (t temporary) Error() string   { return fmt.Sprintf("temporary: %t", bool(t)) }
func (t temporary) Temporary() bool { return bool(t) }

func TestAccept(t *testing.T) {
	t.Run("G11 it backs off while the process is out of files, and recovers", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		began := time.Now()
		var tries []time.Duration
		var short atomic.Bool
		short.Store(true)
		r.ln.failWith(func() error {
			tries = append(tries, time.Since(began))
			if short.Load() {
				return &os.SyscallError{Syscall: "accept4", Err: syscall.EMFILE}
			}
			return nil
		})
		c := r.dial(t)
		c.send(t, "x\n")
		pass(5 * time.Second)
		short.Store(false)
		pass(2 * time.Second)
		c.has(t, "x\n")
		ms := time.Millisecond
		wantEqual(t, "tries", tries, []time.Duration{
			0, 5 * ms, 15 * ms, 35 * ms, 75 * ms, 155 * ms, 315 * ms, 635 * ms, 1275 * ms,
			2275 * ms, 3275 * ms, 4275 * ms, 5275 * ms,
		})
		r.dial(t).echoes(t, "y\n")
		wantEqual(t, "warnings", len(r.messages("cannot accept, retrying")), 1)
		wantEqual(t, "messages of the recovery", len(r.messages("accepting again")), 1)
	}))

	t.Run("a connection that closes prompts a retry", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		open := r.dial(t)
		ok, _ := outOfFiles(r)
		next := r.dial(t)
		pass(4 * time.Second) // until the backoff is long
		ok.Store(true)
		wait := elapsed(func() {
			open.leave(t)
			next.echoes(t, "x\n")
		})
		wantEqual(t, "wait for the next try", wait, time.Duration(0))
	}))

	t.Run("temporary errors of any listener are retried", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		errs := []error{temporary(true), temporary(true), syscall.ECONNABORTED}
		r.ln.failWith(func() (err error) {
			if len(errs) > 0 {
				err, errs = errs[0], errs[1:]
			}
			return err
		})
		c := r.dial(t)
		pass(time.Second)
		c.echoes(t, "x")
		wantState(t, r.Server, StateRunning, 1)
	}))

	t.Run("a permanent error is final", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.ln.failWith(func() error { return temporary(false) })
		r.dial(t)
		wantErr(t, "Serve", <-r.served, temporary(false))
	}))

	t.Run("pauses and drains work while the process is out of files", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		served := r.dial(t)
		ok, _ := outOfFiles(r)
		queued := r.dial(t)
		pass(time.Second)
		r.pause(t, PauseOptions{}).Release()
		r.drain(10*time.Second, "TERM")
		pass(quietTime)
		served.has(t, "SHUTDOWN 10 TERM\n") // although the queue cannot be emptied yet
		ok.Store(true)
		served.leave(t)
		queued.has(t, "SHUTDOWN 10 TERM\n")
		queued.leave(t)
		<-r.Done()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 2})
	}))

	t.Run("a drain that never gets a file ends at its deadline", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		r.dial(t)
		_, tries := outOfFiles(r)
		r.dial(t)
		if _, took := drainIn(r.Server, 3*time.Second, "TERM"); took > 3*time.Second+budget {
			t.Errorf("drain took %v, want at most the grace period of 3s and %v", took, budget)
		}
		wantErr(t, "Serve", <-r.served, ErrServerClosed)
		if n := tries.Load(); n > 100 {
			t.Errorf("accepting was tried %d times: the loop spins", n)
		}
	}))

	t.Run("a queue that fills as fast as it is emptied does not delay a drain", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ln := newFakeListener()
			r := newRigOn(t, endlessListener{ln}, ln, Echo, Options{})
			if _, took := drainIn(r.Server, time.Second, "TERM"); took > time.Second+budget {
				t.Errorf("drain took %v, want at most the grace period of 1s and %v", took, budget)
			}
			if n := r.Status().Accepted; n > maxEmptied {
				t.Errorf("the drain accepted %d clients, want at most %d", n, maxEmptied)
			}
		})
	})
}

// endlessListener has a client in its queue whenever the queue is emptied.
type endlessListener struct{ *fakeListener }

func (l endlessListener) Accept() (net.Conn, error) {
	l.mu.Lock()
	emptying := !l.deadline.at.IsZero() && !l.deadline.passed()
	l.mu.Unlock()
	if emptying {
		if nc, err := l.dialFrom("198.51.100.1"); err == nil {
			_ = nc.Close()
		}
	}
	return l.fakeListener.Accept()
}

// addressLine is a WrapConn that reads the client's address from the first line, as from a PROXY header.
func addressLine(_ context.Context, nc net.Conn) (net.Conn, error) {
	var line []byte
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(nc, b); err != nil {
			return nil, err
		}
		if b[0] == '\n' {
			break
		}
		line = append(line, b[0])
	}
	if string(line) == "local" {
		return nc, nil
	}
	if ip := net.ParseIP(string(line)); ip != nil {
		return WithRemoteAddr(nc, &net.TCPAddr{IP: ip, Port: 7}), nil
	}
	return nil, errors.New("no address")
}

func TestWrapConn(t *testing.T) {
	wrapped := Options{WrapConn: addressLine}

	t.Run("its address is the one that listings and limits use",
		inBubble(Echo, Options{WrapConn: addressLine, Limits: Limits{MaxConnsPerIP: 1}}, func(t *testing.T, r *rig) {
			first := r.dial(t)
			wantPhases(t, r.Server, PhaseWaiting)
			first.send(t, "203.0.113.1\nhello\n")
			first.has(t, "hello\n")
			wantPhases(t, r.Server, PhaseServing)
			for info := range r.Conns() {
				wantEqual(t, "remote", info.Remote.String(), "203.0.113.1:7")
			}
			again, other, local := r.dial(t), r.dial(t), r.dial(t)
			again.send(t, "203.0.113.1\n")
			again.ends(t, "BUSY\n")
			other.send(t, "203.0.113.2\nhello\n")
			other.has(t, "hello\n")
			local.send(t, "local\nhello\n")
			local.has(t, "hello\n")
			first.leave(t)
			wantEqual(t, "closed", r.Closed()[0].Remote.String(), "203.0.113.1:7")
			back := r.dial(t)
			back.send(t, "203.0.113.1\nagain\n")
			back.has(t, "again\n")
		}))

	for name, sent := range map[string]string{"a refused client": "nobody\n", "a silent client": ""} {
		t.Run(name+" is logged and closed without a word", inBubble(Echo, wrapped, func(t *testing.T, r *rig) {
			c := r.dial(t)
			c.send(t, sent)
			pass(DefaultHandshakeTimeout)
			c.ends(t, "")
			wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedHandshake: 1})
			logged := r.messages("handshake failed")
			if len(logged) != 1 || logged[0].ContextMap()["remote"] != c.LocalAddr().String() {
				t.Errorf("logged %v, want one line with the client's address", logged)
			}
		}))
	}

	// A health check may only connect, and close or reset.
	for name, tt := range map[string]struct {
		leave func(*client)
		want  Reason
	}{
		"closes": {func(c *client) { _ = c.Close() }, ReasonClientClosed},
		"resets": {func(c *client) { c.Reset() }, ReasonClientReset},
	} {
		t.Run("a client that "+name+" before it sends anything is no fault", inBubble(Echo, wrapped, func(t *testing.T, r *rig) {
			tt.leave(r.dial(t))
			pass(lingerTimeout)
			wantClosed(t, r.Server, map[Reason]uint64{tt.want: 1})
			wantEqual(t, "warnings", r.logs.FilterLevelExact(zap.WarnLevel).Len(), 0)
		}))
	}

	t.Run("a panic costs its own connection only", inBubble(Echo, Options{
		WrapConn: func(ctx context.Context, nc net.Conn) (net.Conn, error) {
			if nc, err := addressLine(ctx, nc); err == nil {
				return nc, nil
			}
			panic("in WrapConn")
		},
	}, func(t *testing.T, r *rig) {
		good, bad := r.dial(t), r.dial(t)
		bad.send(t, "nobody\n")
		bad.ends(t, "")
		good.send(t, "local\nx")
		good.has(t, "x")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedHandshake: 1})
	}))

	t.Run("events name the client by its address", inBubble(Echo, wrapped, func(t *testing.T, r *rig) {
		sub := r.Subscribe()
		defer sub.Close()
		known, unknown := r.dial(t), r.dial(t)
		known.send(t, "203.0.113.1\n")
		known.leave(t)
		unknown.send(t, "nobody\n")
		unknown.ends(t, "")
		var got []string
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		for e := range sub.Events(ctx) {
			switch e.Type {
			case EventOpened:
				got = append(got, fmt.Sprint("opened ", e.Conn.ID, " ", e.Conn.Remote))
			case EventClosed:
				got = append(got, fmt.Sprint("closed ", e.Closed.ID, " ", e.Closed.Remote))
			}
		}
		proxy := unknown.LocalAddr().String()
		wantEqual(t, "events", got, []string{
			"opened 1 203.0.113.1:7", "closed 1 203.0.113.1:7", "opened 2 " + proxy, "closed 2 " + proxy,
		})
	}))

	t.Run("a server that rejects tells each client after its handshake",
		inBubble(Echo, Options{WrapConn: addressLine, Limits: Limits{MaxConns: 1, AtLimit: LimitReject}}, func(t *testing.T, r *rig) {
			slow, good, late := r.dial(t), r.dial(t), r.dial(t)
			good.send(t, "local\nx")
			good.has(t, "x") // slow has no place
			late.send(t, "local\n")
			late.ends(t, "BUSY\n")
			slow.send(t, "local\n")
			slow.ends(t, "BUSY\n")
		}))

	for name, prepare := range map[string]func(*testing.T, *rig){
		"while running":  func(*testing.T, *rig) {},
		"during a pause": func(t *testing.T, r *rig) { r.pause(t, PauseOptions{Mode: PauseReject}) },
		"during a delay": func(_ *testing.T, r *rig) { r.StartDrain(DrainOptions{Grace: time.Hour, Delay: time.Hour}) },
	} {
		t.Run("at MaxHandshakes the oldest is closed for a new one, "+name,
			inBubble(Echo, Options{WrapConn: addressLine, Limits: Limits{MaxHandshakes: 3}}, func(t *testing.T, r *rig) {
				prepare(t, r)
				var clients []*client
				for range 8 {
					clients = append(clients, r.dial(t))
				}
				for _, c := range clients[:5] {
					c.ends(t, "")
				}
				wantPhases(t, r.Server, PhaseWaiting, PhaseWaiting, PhaseWaiting)
				wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedHandshake: 5})
			}))
	}

	for name, tt := range map[string]struct {
		begin func(*testing.T, *rig)
		told  string
	}{
		"after a pause": {func(t *testing.T, r *rig) { _, _ = r.ResumeAll(Caller{}) }, ""},
		"in a drain":    {func(t *testing.T, r *rig) { r.drain(time.Hour, "x") }, "SHUTDOWN 3600 x\n"},
	} {
		t.Run("at MaxHandshakes a crowd waits in the accept queue, "+name,
			inBubble(Echo, Options{WrapConn: addressLine, Limits: Limits{MaxHandshakes: 3}}, func(t *testing.T, r *rig) {
				r.pause(t, PauseOptions{})
				var clients []*client
				for range 8 {
					clients = append(clients, r.dial(t))
				}
				tt.begin(t, r)
				pass(slowHandshake / 2)
				wantEqual(t, "in the accept queue", r.ln.queued(), 5)
				for _, c := range clients {
					c.send(t, "local\n")
				}
				for _, c := range clients {
					c.has(t, tt.told)
					c.echoes(t, "served\n")
				}
				wantClosed(t, r.Server, map[Reason]uint64{})
			}))
	}

	t.Run("a handshake that is over makes room for another one",
		inBubble(Echo, Options{WrapConn: addressLine, Limits: Limits{MaxHandshakes: 1}}, func(t *testing.T, r *rig) {
			for range 3 {
				c := r.dial(t)
				c.send(t, "local\nx")
				c.has(t, "x")
			}
			wantState(t, r.Server, StateRunning, 3)
		}))

	t.Run("a pause keeps a client waiting after its handshake", inBubble(Echo, wrapped, func(t *testing.T, r *rig) {
		c := r.dial(t)
		h := r.pause(t, PauseOptions{})
		c.send(t, "local\nx\n")
		c.has(t, "")
		wantPhases(t, r.Server, PhaseWaiting)
		h.Release()
		c.has(t, "x\n")
	}))

	t.Run("a client whose handshake ends during a drain is told", inBubble(Echo, wrapped, func(t *testing.T, r *rig) {
		c := r.dial(t)
		r.drain(2*time.Second, "x")
		pass(acceptorsTimeout)
		c.send(t, "local\n")
		c.has(t, "SHUTDOWN 2 x\n")
		c.leave(t)
		<-r.Done()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 1})
	}))

	t.Run("its context derives from BaseContext and ends at the timeout", bubbled(func(t *testing.T) {
		type key struct{}
		causes := make(chan error, 1)
		r := newRig(t, Echo, Options{
			BaseContext: func(net.Listener) context.Context { return context.WithValue(context.Background(), key{}, "base") },
			WrapConn: func(ctx context.Context, _ net.Conn) (net.Conn, error) {
				wantEqual(t, "value", ctx.Value(key{}), any("base"))
				<-ctx.Done()
				causes <- context.Cause(ctx)
				return nil, ctx.Err()
			},
			Timeouts: Timeouts{Handshake: time.Minute},
		})
		r.dial(t)
		pass(time.Minute)
		wantErr(t, "cause", <-causes, errHandshakeTimeout)
	}))

	t.Run("the stream that it returned is closed too", bubbled(func(t *testing.T) {
		closed := make(chan struct{})
		r := newRig(t, Echo, Options{WrapConn: func(_ context.Context, nc net.Conn) (net.Conn, error) {
			return closeReporter{nc, closed}, nil
		}})
		r.dial(t).leave(t)
		<-closed
	}))
}

// closeReporter reports its Close.
type closeReporter struct {
	net.Conn
	closed chan struct{}
}

func (c closeReporter) Close() error {
	close(c.closed)
	return c.Conn.Close()
}

func TestTimeForHandshakes(t *testing.T) {
	for name, c := range map[string]struct{ grace, want time.Duration }{
		"is bounded":                   {time.Hour, handshakeTime},
		"does not exceed the deadline": {time.Second, time.Second},
	} {
		t.Run(name, inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
			c1 := r.dial(t) // keeps the drain going
			r.drain(c.grace, "x")
			wantEqual(t, "time", (&acceptor{srv: r.Server}).handshakeTime(), c.want)
			_ = c1.Close()
		}))
	}
}
