package server_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"strings"
	"time"

	"echod/server"
)

// A protocol of one's own on a graceful server.
func Example() {
	upper := server.HandlerFunc(func(_ context.Context, c *server.Conn) error {
		lines := bufio.NewScanner(c)
		for lines.Scan() {
			if _, err := fmt.Fprintln(c, strings.ToUpper(lines.Text())); err != nil {
				return err
			}
		}
		return lines.Err()
	})
	srv, err := server.New(upper, server.Options{Limits: server.Limits{MaxConnsPerIP: 10}})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := server.Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(ln)
	defer srv.Close()

	fmt.Print(ask(ln.Addr(), "hello\n"))
	// Output: HELLO
}

func ExampleServer_Shutdown() {
	srv, addr := start(server.Echo)

	client, err := net.Dial("tcp", addr.String())
	if err != nil {
		log.Fatal(err)
	}
	left := make(chan struct{})
	go func() { // a client that leaves when it is told to
		defer close(left)
		notice, _ := bufio.NewReader(client).ReadString('\n')
		fmt.Print("client: ", notice)
		_ = client.Close()
	}()
	_ = srv.AwaitStatus(context.Background(), func(_ server.State, connections int) bool { return connections == 1 })

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = srv.Shutdown(ctx)
	report, _ := srv.Report()
	<-left
	fmt.Printf("%d told, %d left by themselves, %d closed at the deadline, error: %v\n",
		report.Notified, report.Left, report.AtDeadline, err)
	// Output:
	// client: SHUTDOWN 30 shutdown
	// 1 told, 1 left by themselves, 0 closed at the deadline, error: <nil>
}

func ExampleServer_WhilePaused() {
	srv, _ := start(server.Echo)
	defer srv.Close()

	err := srv.WhilePaused(context.Background(), "backup", func(ctx context.Context) error {
		fmt.Println("nobody new is served:", srv.Status().State)
		return ctx.Err() // a long job would watch ctx, which ends when somebody resumes
	})
	fmt.Println("again:", srv.Status().State, err)
	// Output:
	// nobody new is served: paused
	// again: running <nil>
}

// A handler that has something to say before it goes, and does not wait for the client to leave.
func ExampleConn_Draining() {
	clock := server.HandlerFunc(func(ctx context.Context, c *server.Conn) error {
		tick := time.NewTicker(time.Minute)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				fmt.Fprintln(c, "tick")
			case <-c.Draining():
				_, err := fmt.Fprintln(c, "the clock stops")
				return err
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
	})
	srv, addr := start(clock)
	client, err := net.Dial("tcp", addr.String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	_ = srv.AwaitStatus(context.Background(), func(_ server.State, connections int) bool { return connections == 1 })

	srv.StartDrain(server.DrainOptions{Grace: 10 * time.Second, Reason: "upgrade"})
	all, err := io.ReadAll(client)
	fmt.Printf("%s%v\n", all, err)
	_ = client.Close()
	<-srv.Done()
	// Output:
	// SHUTDOWN 10 upgrade
	// the clock stops
	// <nil>
}

// start serves h on the loopback, and returns when it does.
func start(h server.Handler) (*server.Server, net.Addr) {
	srv, err := server.New(h, server.Options{Notifier: server.DefaultLineNotifier()})
	if err != nil {
		log.Fatal(err)
	}
	ln, err := server.Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	go srv.Serve(ln)
	_ = srv.AwaitStatus(context.Background(), func(state server.State, _ int) bool { return state == server.StateRunning })
	return srv, ln.Addr()
}

// ask sends text and returns all that comes back.
func ask(addr net.Addr, text string) string {
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		log.Fatal(err)
	}
	defer c.Close()
	_, _ = io.WriteString(c, text)
	_ = c.(*net.TCPConn).CloseWrite()
	answer, err := io.ReadAll(c)
	if err != nil {
		log.Fatal(err)
	}
	return string(answer)
}
