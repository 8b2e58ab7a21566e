package server

import (
	"crypto/tls"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// openFiles returns what this process's files are, by descriptor.
func openFiles(t *testing.T) map[string]string {
	t.Helper()
	const dir = "/proc/self/fd"
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := make(map[string]string)
	for _, e := range entries {
		if what, err := os.Readlink(dir + "/" + e.Name()); err == nil { // else it was the directory's own
			files[e.Name()] = what
		}
	}
	return files
}

// Whatever is tried: every way in which a connection, a pause, a subscription and a server can end.
func TestG9GoroutinesAndFilesComeBack(t *testing.T) {
	pollerWarmUp(t)
	goroutines := goleak.IgnoreCurrent()
	files := openFiles(t)
	for _, end := range []func(*Server){
		func(s *Server) { _ = s.Close() },
		func(s *Server) { shutdownIn(t, s, 100*time.Millisecond, "x") },
		func(s *Server) { s.StartDrain(DrainOptions{Grace: Off, Reason: "x"}); s.Force("y"); <-s.Done() },
	} {
		tryEverything(t, end)
	}
	if err := goleak.Find(goroutines); err != nil {
		t.Error(err)
	}
	wantEqual(t, "open files", openFiles(t), files)
}

// pollerWarmUp has the runtime open what it keeps.
func pollerWarmUp(t *testing.T) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
}

func tryEverything(t *testing.T, end func(*Server)) {
	t.Helper()
	s, _ := newServer(t, commanded, Options{Timeouts: Timeouts{Stall: 50 * time.Millisecond}, Limits: Limits{MaxConnsPerIP: 100}})
	forServer, forClient := tlsConfigs(t)
	forClient.ServerName = "127.0.0.1"
	lns := []net.Listener{listen(t), listen(t), listen(t)}
	served := make(chan error, len(lns))
	go func() { served <- s.Serve(lns[0]) }()
	go func() { served <- s.ServeListener(Listener{Listener: lns[1], Inherited: true}) }()
	go func() { served <- s.Serve(tls.NewListener(lns[2], forServer)) }()

	sub := s.Subscribe()
	defer sub.Close()
	var clients []net.Conn
	for _, ln := range lns[:2] {
		for _, word := range []string{"hello", "panic", "goexit", ""} {
			c := dialTCP(t, ln.Addr())
			send(t, c, word)
			clients = append(clients, c)
		}
		reset := dialTCP(t, ln.Addr())
		_ = reset.SetLinger(0)
		_ = reset.Close()
		gone := dialTCP(t, ln.Addr())
		_ = gone.Close()
	}
	secret := tls.Client(dialTCP(t, lns[2].Addr()), forClient)
	send(t, secret, "hello")
	receives(t, secret, "hello")
	clients = append(clients, secret, dialTCP(t, lns[2].Addr()))

	_, _ = s.Pause(PauseOptions{TTL: time.Hour})
	_, _ = s.Pause(PauseOptions{TTL: time.Nanosecond})
	clients = append(clients, dialTCP(t, lns[0].Addr()))
	if _, err := s.Pause(PauseOptions{Mode: PauseReject}); err != nil {
		t.Error(err)
	}
	rejected := dialTCP(t, lns[0].Addr())
	receives(t, rejected, "PAUSED\n")
	clients = append(clients, rejected)
	_ = s.Kill(1)
	_, _, _ = s.Notify(t.Context(), "hello")
	if _, err := s.Resume(Caller{}); err != nil {
		t.Error(err)
	}
	_, _ = s.Pause(PauseOptions{TTL: time.Hour})
	clients = append(clients, dialTCP(t, lns[0].Addr()))
	end(s)
	for range lns {
		wantErr(t, "Serve", <-served, ErrServerClosed)
	}
	for _, c := range clients {
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	}
}
