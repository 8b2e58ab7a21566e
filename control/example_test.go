package control_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/oklog/run"
	"go.uber.org/zap"

	"echod/control"
	"echod/server"
)

// A server with a control plane and signals. Whatever ends it, clients get their grace period, and the control plane
// answers until the last of them has gone.
func Example() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()

	srv, err := server.New(server.Echo, server.Options{Drain: server.DrainOptions{Grace: 10 * time.Second}})
	if err != nil {
		fmt.Println(err)
		return
	}
	ln, err := server.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	socket, err := control.Listen(ctx, filepath.Join(dir, "control.sock"), control.SocketOptions{Mode: 0o600})
	if err != nil {
		_ = ln.Close()
		fmt.Println(err)
		return
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer signal.Stop(signals)

	var g run.Group
	g.Add(control.ServerActor(srv, server.Listener{Listener: ln}))
	g.Add(control.NewSignals(srv, signals, zap.NewNop(), os.Stderr).Actor())
	g.Add(control.New(srv, control.Options{Version: "1.0"}).Actor(socket))

	signals <- syscall.SIGTERM // as the signal that ends the program
	fmt.Println("ended:", g.Run())
	// Output: ended: <nil>
}

// serve runs a server with a control plane at path until stop is called.
func serve() (path string, stop func()) {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		panic(err)
	}
	path = filepath.Join(dir, "control.sock")
	srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
	if err != nil {
		panic(err)
	}
	socket, err := control.Listen(context.Background(), path, control.SocketOptions{Mode: 0o600})
	if err != nil {
		panic(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	var g run.Group
	g.Add(control.ServerActor(srv, server.Listener{Listener: ln}))
	g.Add(control.New(srv, control.Options{}).Actor(socket))
	ended := make(chan error, 1)
	go func() { ended <- g.Run() }()
	if err := srv.AwaitStatus(context.Background(), func(st server.State, _ int) bool { return st == server.StateRunning }); err != nil {
		panic(err)
	}
	return path, func() {
		srv.StartDrain(server.DrainOptions{Reason: "done"})
		<-ended
		_ = os.RemoveAll(dir)
	}
}

func ExampleClient() {
	path, stop := serve()
	defer stop()
	ctx := context.Background()

	c := control.NewClient(path)
	defer c.Close()
	hold, err := c.Pause(ctx, control.PauseRequest{Reason: "backup", TTL: time.Hour})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("holding", hold.ID, "for", hold.Reason)

	// A wait that times out is a problem.
	_, err = c.Wait(ctx, control.WaitRequest{State: "running", Timeout: new(time.Millisecond)})
	if problem, ok := errors.AsType[*control.Problem](err); ok && problem.Type == control.ProblemTimeout {
		fmt.Println(problem.Detail)
	}

	change, err := c.ReleaseHold(ctx, hold.ID)
	fmt.Println(change.State, err)
	// Output:
	// holding h1 for backup
	// the wait timed out: the server is paused with 0 connections
	// running <nil>
}

// A lease pauses the server until it is closed, or this process ends.
func ExampleClient_PauseWhileConnected() {
	path, stop := serve()
	defer stop()

	c := control.NewClient(path)
	defer c.Close()
	lease, err := c.PauseWhileConnected(context.Background(), control.PauseRequest{Reason: "backup"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer lease.Close()

	st, err := c.Status(context.Background())
	fmt.Println(st.State, err)
	// Output: paused <nil>
}

// A program without a run group serves the plane itself.
func ExamplePlane_Serve() {
	srv, err := server.New(server.Echo, server.Options{})
	if err != nil {
		fmt.Println(err)
		return
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0") // Listen opens a Unix socket, for changes too
	if err != nil {
		fmt.Println(err)
		return
	}
	plane := control.NewWeb(srv, control.Options{Version: "1.0"})
	served := make(chan error, 1)
	go func() { served <- plane.Serve(ln) }()

	resp, err := http.Get("http://" + ln.Addr().String() + "/readyz")
	if err != nil {
		fmt.Println(err)
		return
	}
	_ = resp.Body.Close()
	fmt.Println(resp.Status)

	_ = srv.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	fmt.Println(plane.Shutdown(ctx), <-served)
	// Output:
	// 503 Service Unavailable
	// <nil> http: Server closed
}
