package server

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"
)

func TestListen(t *testing.T) {
	for address, network := range map[string]string{"127.0.0.1:0": "tcp", "tcp://127.0.0.1:0": "tcp", unixAddress(filepath.Join(t.TempDir(), "s")): "unix"} {
		t.Run(network+" at "+address, func(t *testing.T) {
			ln, err := Listen(t.Context(), address)
			skipWithoutUnixSockets(t, err)
			if err != nil {
				t.Fatal(err)
			}
			s, _ := newServer(t, Echo, Options{})
			serve(t, s, ln)
			wantEqual(t, "network", ln.Addr().Network(), network)
			echoed(t, dialTo(t, ln.Addr()), "x")
		})
	}
	for _, address := range []string{"udp://127.0.0.1:0", "unix://relative", "unix:///no/such/dir/s", "tls://127.0.0.1:0", "nowhere"} {
		t.Run("refuses "+address, func(t *testing.T) {
			ln, err := Listen(t.Context(), address)
			wantErrText(t, "Listen", err, address)
			if ln != nil {
				t.Error("there is a listener beside the error")
			}
		})
	}
	t.Run("a cancelled context is an error", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := Listen(ctx, "localhost:0")
		wantErr(t, "Listen", err, context.Canceled)
	})
}

// TestAcceptQueue covers what becomes of clients in the accept queue of real listeners when a drain begins.
func TestAcceptQueue(t *testing.T) {
	forServer, forClient := tlsConfigs(t)
	plain := func(nc net.Conn) stream { return nc.(stream) }
	for name, tt := range map[string]struct {
		listen func(*testing.T) net.Listener // returns a listener that the client dials at its Addr
		client func(net.Conn) stream
	}{
		"TCP":             {func(t *testing.T) net.Listener { return listen(t) }, plain},
		"Unix":            {func(t *testing.T) net.Listener { return listenUnix(t) }, plain},
		"wrapped":         {func(t *testing.T) net.Listener { return wrappingListener{listen(t)} }, plain},
		"tls.NewListener": {func(t *testing.T) net.Listener { return tls.NewListener(listen(t), forServer) }, func(nc net.Conn) stream { return tls.Client(nc, forClient) }},
	} {
		t.Run("clients are told and served at a drain: "+name, func(t *testing.T) {
			const clients = 20
			s, _ := newServer(t, Echo, Options{})
			if _, err := s.Pause(PauseOptions{}); err != nil {
				t.Fatal(err)
			}
			ln := tt.listen(t)
			served := serve(t, s, ln)
			var queue []stream
			for range clients {
				queue = append(queue, tt.client(dialTo(t, ln.Addr())))
			}
			awaitPaused(t, s)
			s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
			for _, c := range queue {
				receives(t, c, "SHUTDOWN 20 x\n")
				send(t, c, "last words\n")
				_ = c.CloseWrite()
				receivesAll(t, c, "last words\n")
				_ = c.Close()
			}
			wantErr(t, "Serve", next(t, served), ErrServerClosed)
			wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: clients})
		})

		t.Run("clients are served when their listener is closed: "+name, func(t *testing.T) {
			const clients = 20
			s, _ := newServer(t, Echo, Options{})
			h, err := s.Pause(PauseOptions{})
			if err != nil {
				t.Fatal(err)
			}
			ln := tt.listen(t)
			served := serve(t, s, ln)
			var queue []stream
			for range clients {
				queue = append(queue, tt.client(dialTo(t, ln.Addr())))
			}
			awaitPaused(t, s)
			wantErr(t, "CloseListener", s.CloseListener(ln), nil)
			h.Release()
			for _, c := range queue {
				echoed(t, c, "x")
			}
			wantErr(t, "Serve", next(t, served), net.ErrClosed)
			if nc, err := net.Dial(ln.Addr().Network(), ln.Addr().String()); err == nil {
				_ = nc.Close()
				t.Error("a client could connect to the closed listener")
			}
		})

		t.Run("clients are told and not reset if the drain began before Serve: "+name, func(t *testing.T) {
			s, _ := newServer(t, Echo, Options{})
			ln := tt.listen(t)
			var queue []stream
			for range 5 { // a rejection has a second, which includes a TLS handshake
				queue = append(queue, tt.client(dialTo(t, ln.Addr())))
			}
			s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
			next(t, s.Done())
			served := serve(t, s, ln)
			for _, c := range queue {
				receivesAll(t, c, "SHUTDOWN 0 x\n")
				_ = c.Close()
			}
			wantErr(t, "Serve", next(t, served), ErrServerClosed)
		})
	}
}

// awaitPaused waits until a server that was paused before serves.
func awaitPaused(t *testing.T, s *Server) {
	t.Helper()
	if err := s.AwaitStatus(t.Context(), func(st State, _ int) bool { return st == StatePaused }); err != nil {
		t.Fatal(err)
	}
}

func TestTLSListener(t *testing.T) {
	start := func(t *testing.T, h Handler) (*Server, net.Addr, *tls.Conn) {
		forServer, forClient := tlsConfigs(t)
		ln := listen(t)
		s, _ := newServer(t, h, Options{})
		serve(t, s, tls.NewListener(ln, forServer))
		return s, ln.Addr(), tls.Client(dialTCP(t, ln.Addr()), forClient)
	}

	t.Run("a client is told and ended with close_notify", func(t *testing.T) {
		s, addr, c := start(t, Echo)
		echoed(t, c, "hello")
		dialTCP(t, addr) // never begins the handshake
		awaitConns(t, s, 2)
		s.StartDrain(DrainOptions{Grace: 2 * time.Second, Reason: "x"})
		receives(t, c, "\nSHUTDOWN 2 x\n")
		send(t, c, "last words")
		_ = c.CloseWrite()
		receivesAll(t, c, "last words")
		next(t, s.Done())
		if took := report(t, s).Took; took > 2*time.Second+budget {
			t.Errorf("drain took %v, want at most the grace period of 2s and %v", took, budget)
		}
		wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: 1, ReasonDeadline: 1})
	})

	// crypto/tls cannot continue a handshake that was interrupted.
	t.Run("a drain does not interrupt the handshake of an idle handler", func(t *testing.T) {
		s, _, c := start(t, lineProtocol(false))
		awaitConns(t, s, 1)
		conn := s.openConns()[0]
		await(t, "the handler to read", func() bool { return conn.idle.Load() != idleMarked && Phase(conn.phase.Load()) == PhaseServing })
		s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
		next(t, s.Draining())
		await(t, "the drain of the connection", func() bool { _, draining := conn.DrainDeadline(); return draining })
		receivesAll(t, c, "SHUTDOWN 20 x\n")
	})

	// crypto/tls waits five seconds for its close_notify to be taken.
	t.Run("a client that never reads cannot delay the end", func(t *testing.T) {
		const grace = 100 * time.Millisecond
		forServer, forClient := tlsConfigs(t)
		ln := newFakeListener()
		s, _ := newServer(t, untilWriteFails, Options{})
		serve(t, s, tls.NewListener(ln, forServer))
		nc, err := ln.dialFrom("198.51.100.1")
		if err != nil {
			t.Fatal(err)
		}
		if err := tls.Client(nc, forClient).Handshake(); err != nil {
			t.Fatal(err)
		}
		if _, took := drainIn(s, grace, "x"); took > grace+budget {
			t.Errorf("drain took %v, want at most the grace period of %v and %v", took, grace, budget)
		}
	})

	t.Run("the TLS session and the socket are accessible", func(t *testing.T) {
		_, _, c := start(t, HandlerFunc(func(_ context.Context, c *Conn) error {
			if _, err := c.Read(make([]byte, 1)); err != nil {
				return err
			}
			state, ok := c.TLS()
			if _, err := c.SyscallConn(); !ok || !state.HandshakeComplete || err != nil {
				_, err := io.WriteString(c, "no session, or no socket")
				return err
			}
			return nil
		}))
		send(t, c, "x")
		receivesAll(t, c, "")
	})
}
