package control

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/oklog/run"
	"go.uber.org/zap"

	"echod/server"
)

// witness records the state of the server when each actor returned.
type witness struct {
	srv      *server.Server
	mu       sync.Mutex
	returned map[string]server.State
}

func (w *witness) watch(name string, a actor) (func() error, func(error)) {
	return func() error {
		err := a.execute()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.returned[name] = w.srv.Status().State
		return err
	}, a.interrupt
}

func TestG7ControlPlaneAnswersToTheEnd(t *testing.T) {
	t.Run("no actor returns before the server has stopped", testActorsEnd)
	t.Run("the control plane answers until the last connection has ended", testAnswersToTheEnd)
}

func testActorsEnd(t *testing.T) {
	broken := errors.New("no more room")
	for _, end := range []struct {
		name string
		end  func(parts)
		want error
		// control is the state in which the control plane's actor returns.
		control server.State
	}{
		{"a signal", func(p parts) { p.signals <- term }, nil, server.StateStopped},
		{"the program", func(p parts) { p.srv.StartDrain(server.DrainOptions{Reason: "program"}) }, nil, server.StateStopped},
		{"another actor", func(p parts) { p.stop(errDone) }, errDone, server.StateStopped},
		{"the listener", func(p parts) { p.echo.fail <- broken }, broken, server.StateStopped},
		{"the control plane", func(p parts) { p.socket.fail <- broken }, broken, server.StateRunning},
	} {
		t.Run(end.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier(), Drain: server.DrainOptions{Grace: grace}})
				if err != nil {
					t.Fatal(err)
				}
				echo, socket := newPipeListener(), newPipeListener()
				in := make(chan os.Signal, 1)
				other, stop := context.WithCancelCause(t.Context())
				w := &witness{srv: srv, returned: map[string]server.State{}}
				var g run.Group
				g.Add(w.watch("server", pair(ServerActor(srv, server.Listener{Listener: echo}))))
				g.Add(w.watch("signals", pair(NewSignals(srv, in, zap.NewNop(), io.Discard).Actor())))
				g.Add(w.watch("control", pair(New(srv, Options{}).Actor(socket))))
				g.Add(func() error { <-other.Done(); return context.Cause(other) }, func(error) { stop(errDone) })
				ended := make(chan error, 1)
				go func() { ended <- g.Run() }()

				conn, _ := echo.Dial(t.Context())
				defer conn.Close()
				go func() { _, _ = io.Copy(io.Discard, conn) }()
				synctest.Wait()
				began := time.Now()
				end.end(parts{srv, in, echo, socket, stop})

				if err := <-ended; !errors.Is(err, end.want) {
					t.Errorf("the run group returned %v: want %v", err, end.want)
				}
				if took := time.Since(began); took < grace || took > grace+2*time.Second {
					t.Errorf("the client had %s: want the whole grace period of %s", took, grace)
				}
				wantEqual(t, "states in which the actors returned", w.returned, map[string]server.State{
					"server": server.StateStopped, "signals": server.StateStopped, "control": end.control,
				})
			})
		})
	}
}

// parts are the parts of a program.
type parts struct {
	srv          *server.Server
	signals      chan<- os.Signal
	echo, socket *pipeListener
	stop         context.CancelCauseFunc // ends an actor of the program
}

var errDone = errors.New("done")

func testAnswersToTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSignalled(t)
		collect := s.follow(t.Context(), t)
		stopped := make(chan error, 1)
		go func() {
			_, err := s.rig.client.Wait(t.Context(), WaitRequest{State: "stopped"})
			stopped <- err
		}()
		s.take(t, term)
		for left := grace; left > 0; left -= time.Second {
			st := must[Status](t)(s.rig.client.Status(t.Context()))
			wantEqual(t, "state", st.State, "draining")
			wantEqual(t, "connections", st.Connections, 1)
			wantEqual(t, "time left", time.Until(st.Drain.Deadline), left)
			time.Sleep(time.Second)
		}
		<-s.ended
		wantEqual(t, "the wait for the end", <-stopped, nil)
		events := collect()
		wantEqual(t, "the last events", []string{events[0].State, events[1].Closed.Reason, events[2].State}, []string{"draining", "deadline", "stopped"})
		_, err := s.rig.client.Status(t.Context())
		if _, ok := errors.AsType[*UnreachableError](err); !ok {
			t.Errorf("after the end the error is %v: want an UnreachableError", err)
		}
	})
}

func TestActors(t *testing.T) {
	t.Run("the control plane ends soon after the server, whatever its callers do", testPlaneEnds)
	t.Run("a control plane that fails drains the server", testPlaneFails)
	t.Run("the end of an actor keeps the deadline of a drain", testDeadlineKept)
	t.Run("without listeners the server actor waits for the server", testNoListeners)
	t.Run("an actor interrupted before it serves closes its listener", testEarlyInterrupt)
	t.Run("the socket stays until the server has drained", testSocketStays)
}

func testPlaneEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{}, func(r *rig) actor {
			r.plane.linger = lingerTimeout
			return actor{}
		})
		pauseByHand(t, r.rawConn(t), "") // does not read the last line
		ask(t, r.rawConn(t), "GET /v1/events HTTP/1.1\r\nHost: echod\r\n\r\n")
		ask(t, r.rawConn(t), "POST /v1/pause HTTP/1.1\r\nHost: echod\r\nContent-Length: 100\r\n\r\n{")
		ask(t, r.rawConn(t), "GET /v1/status")
		synctest.Wait()
		r.srv.StartDrain(server.DrainOptions{Reason: "SIGTERM"})
		<-r.srv.Done()
		stopped := time.Now()
		<-r.ended
		if took := time.Since(stopped); took > lingerTimeout {
			t.Errorf("the control plane lingered for %s: want %s at the most", took, lingerTimeout)
		}
	})
}

func testPlaneFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
		if err != nil {
			t.Fatal(err)
		}
		socket := newPipeListener()
		var g run.Group
		g.Add(ServerActor(srv, server.Listener{Listener: newPipeListener()}))
		g.Add(New(srv, Options{}).Actor(socket))
		socket.fail <- errDone
		if err := g.Run(); !errors.Is(err, errDone) {
			t.Errorf("the run group returned %v: want %v", err, errDone)
		}
		wantEqual(t, "state", srv.Status().State, server.StateStopped)
	})
}

func testDeadlineKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := make(chan error)
		r := newBubble(t, server.Options{Drain: server.DrainOptions{Grace: time.Second}}, func(*rig) actor {
			return actor{func() error { return <-fail }, func(error) {}}
		})
		r.echoClient(t)
		began := time.Now()
		r.srv.StartDrain(server.DrainOptions{Grace: time.Minute, Reason: "upgrade"})
		fail <- errDone
		<-r.ended
		if took := time.Since(began); took < time.Minute {
			t.Errorf("the client had %s: want the whole minute", took)
		}
	})
}

func testNoListeners(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
		if err != nil {
			t.Fatal(err)
		}
		execute, interrupt := ServerActor(srv)
		returned := make(chan error, 1)
		go func() { returned <- execute() }()
		synctest.Wait()
		wantEqual(t, "actors returned before the interrupt", len(returned), 0)
		interrupt(nil)
		wantEqual(t, "error", <-returned, nil)
	})
}

func testEarlyInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
		if err != nil {
			t.Fatal(err)
		}
		socket := newPipeListener()
		execute, interrupt := New(srv, Options{}).Actor(socket)
		interrupt(nil)
		wantEqual(t, "error", execute(), nil)
		<-socket.done
	})
}

func testSocketStays(t *testing.T) {
	r := newRig(t, server.Options{Drain: server.DrainOptions{Grace: time.Hour}})
	c := r.echoClient(t)
	change := must[Change](t)(r.client.Shutdown(t.Context(), ShutdownRequest{}))
	wantEqual(t, "state", change.State, "draining")
	wantEqual(t, "notice", receive(t, "the notice", c.lines), "SHUTDOWN 3600 control\n")
	if _, err := os.Lstat(r.socket); err != nil {
		t.Errorf("while draining: %v", err)
	}
	_ = c.CloseWrite(t)
	<-r.ended
	left, err := filepath.Glob(filepath.Join(filepath.Dir(r.socket), "*"))
	wantEqual(t, "files left beside the socket", left, []string(nil))
	wantEqual(t, "error", err, nil)
	wantEqual(t, "what the run group returns", r.err, nil)
}

// CloseWrite ends the client's stream.
func (c *echoClient) CloseWrite(t *testing.T) error {
	t.Helper()
	half, ok := c.Conn.(interface {
		net.Conn
		CloseWrite() error
	})
	if !ok {
		t.Fatal("this connection cannot be half-closed")
	}
	return half.CloseWrite()
}

// After an upgrade a caller that keeps its connection open would ask a process that no longer owns the connections.
func TestLeaveClosesConnectionsThatAreKeptOpen(t *testing.T) {
	r := newRig(t, server.Options{})
	idle, busy := r.rawConn(t), r.rawConn(t)
	get := func(conn net.Conn, target string) *http.Response {
		answer, err := http.ReadResponse(ask(t, conn, "GET "+target+" HTTP/1.1\r\nHost: echod\r\n\r\n"), nil)
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		_, _ = io.Copy(io.Discard, answer.Body)
		return answer
	}
	wantEqual(t, "status before", get(idle, "/v1/status").StatusCode, http.StatusOK)
	answer := ask(t, busy, "GET /v1/wait?connections=1 HTTP/1.1\r\nHost: echod\r\n\r\n")
	r.awaitStreams(t, 1)
	r.plane.Leave()
	_ = idle.SetReadDeadline(time.Now().Add(idleTimeout / 3)) // the plane closes idle connections after idleTimeout anyway
	if n, err := idle.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the idle connection read %d bytes, %v; want an end", n, err)
	}
	r.echoClient(t)
	got, err := http.ReadResponse(answer, nil)
	if err != nil || got.StatusCode != http.StatusOK {
		t.Errorf("the request in progress was answered %v, %v", got, err)
	}
}

func TestServeAndShutdown(t *testing.T) {
	start := func(t *testing.T) (*server.Server, *Plane, *pipeListener, <-chan error) {
		srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
		if err != nil {
			t.Fatal(err)
		}
		plane, ln, served := New(srv, Options{}), newPipeListener(), make(chan error, 1)
		go func() { served <- plane.Serve(ln) }()
		return srv, plane, ln, served
	}
	dial := func(t *testing.T, ln *pipeListener) net.Conn {
		conn, err := ln.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	t.Run("Shutdown waits for a request in progress", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			srv, plane, ln, served := start(t)
			defer srv.Close()
			answer := ask(t, dial(t, ln), "GET /v1/wait?state=running&timeout=1m HTTP/1.1\r\nHost: echod\r\n\r\n")
			go func() { _, _ = io.Copy(io.Discard, answer) }()
			synctest.Wait()
			began := time.Now()
			wantEqual(t, "error", plane.Shutdown(t.Context()), nil)
			wantEqual(t, "time it took", time.Since(began), time.Minute)
			wantEqual(t, "what Serve returns", <-served, http.ErrServerClosed, cmpopts.EquateErrors())
		})
	})
	t.Run("Shutdown cuts it off when its context ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			srv, plane, ln, served := start(t)
			defer srv.Close()
			for _, request := range []string{"GET /v1/wait?state=running", "GET /v1/events", "POST /v1/pause?while=connected"} {
				ask(t, dial(t, ln), request+" HTTP/1.1\r\nHost: echod\r\n\r\n")
			}
			synctest.Wait()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			began := time.Now()
			wantEqual(t, "error", plane.Shutdown(ctx), context.DeadlineExceeded, cmpopts.EquateErrors())
			wantEqual(t, "time it took", time.Since(began), time.Second)
			wantEqual(t, "what Serve returns", <-served, http.ErrServerClosed, cmpopts.EquateErrors())
			wantEqual(t, "state of the server", srv.Status().State, server.StateStarting)
		})
	})
	t.Run("a plane serves several listeners", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			srv, plane, first, served := start(t)
			defer srv.Close()
			second, also := newPipeListener(), make(chan error, 1)
			go func() { also <- plane.Serve(second) }()
			for _, ln := range []*pipeListener{first, second} {
				resp, err := http.ReadResponse(ask(t, dial(t, ln), "HEAD /v1/status HTTP/1.1\r\nHost: echod\r\nConnection: close\r\n\r\n"), nil)
				if err != nil {
					t.Fatal(err)
				}
				wantEqual(t, "status", resp.StatusCode, http.StatusOK)
			}
			wantEqual(t, "error", plane.Shutdown(t.Context()), nil)
			for _, served := range []<-chan error{served, also} {
				wantEqual(t, "what Serve returns", <-served, http.ErrServerClosed, cmpopts.EquateErrors())
			}
		})
	})
}

func TestImportRegistersNothing(t *testing.T) {
	if _, pattern := http.DefaultServeMux.Handler(httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/debug/pprof/", http.NoBody)); pattern != "" {
		t.Errorf("the default mux serves %s", pattern)
	}
}
