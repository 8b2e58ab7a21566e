//go:build linux

// Command upgrade is a server that replaces itself by the program on disk without closing a connection. Its line
// protocol keeps a variable for each session, which survives: "name Ada" sets it, and "hello" answers "hello, Ada".
//
//	go build -o /tmp/greeter ./upgrade && /tmp/greeter -listen 127.0.0.1:7777
//	nc 127.0.0.1 7777                              # name Ada, then hello
//	go build -o /tmp/greeter ./upgrade             # a new version
//	kill -USR2 PID                                 # the client stays connected
//
// The new process is a child of the old one, which exits: a supervisor that watches the PID needs more, as in
// cmd/echod.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"echod/server"
)

// linkFD is the descriptor of the link to the predecessor, and linkVariable says that there is one.
const (
	linkFD       = 3
	linkVariable = "GREETER_LINK"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix(fmt.Sprintf("%d: ", os.Getpid()))
	address := flag.String("listen", "127.0.0.1:7777", "serve at this `address`")
	flag.Parse()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGUSR2)

	srv, err := server.New(greeter{}, server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	listeners, err := listen(srv, *address)
	if err != nil {
		log.Fatal(err)
	}
	for _, l := range listeners {
		go func() { _ = srv.ServeListener(l) }() // Shutdown and HandOver end it
		log.Print("serving ", l.Addr())
	}
	for {
		select {
		case <-srv.Done():
			return
		case sig := <-signals:
			if sig != syscall.SIGUSR2 {
				srv.StartDrain(server.DrainOptions{Reason: sig.String()})
				continue
			}
			if err := upgrade(srv); err != nil {
				log.Print("still serving: ", err)
			}
		}
	}
}

// listen takes over from the predecessor if there is one, and opens a listener otherwise.
func listen(srv *server.Server, address string) ([]server.Listener, error) {
	if os.Getenv(linkVariable) == "" {
		ln, err := server.Listen(context.Background(), address)
		return []server.Listener{{Listener: ln}}, err
	}
	if err := os.Unsetenv(linkVariable); err != nil {
		return nil, err
	}
	link, err := linkOf(os.NewFile(linkFD, "link"))
	if err != nil {
		return nil, err
	}
	offer, err := server.ReceiveOffer(context.Background(), link)
	if err != nil {
		return nil, err
	}
	return offer.Listeners, srv.TakeOver(context.Background(), offer, offer.Listeners)
}

// upgrade starts the program on disk and hands over to it. An error means that nothing has changed.
func upgrade(srv *server.Server) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	far := os.NewFile(uintptr(fds[1]), "link")
	defer far.Close()
	link, err := linkOf(os.NewFile(uintptr(fds[0]), "link"))
	if err != nil {
		return err
	}
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), linkVariable+"=1")
	cmd.ExtraFiles = []*os.File{far} // becomes linkFD
	if err := cmd.Start(); err != nil {
		return errors.Join(err, link.Close())
	}
	_ = far.Close() // so that the link ends if the successor does
	kill := func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	report, err := srv.HandOver(context.Background(), link, server.HandoverOptions{Kill: kill})
	if err != nil {
		kill()
		return err
	}
	log.Printf("handed %d connections over to %d in %v", report.HandedOver, cmd.Process.Pid, report.Frozen)
	return cmd.Process.Release()
}

// linkOf makes a link of a descriptor, which it closes.
func linkOf(f *os.File) (server.Link, error) {
	defer f.Close()
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		return nil, errors.New("the link is not a Unix socket")
	}
	return server.NewUnixLink(uc)
}

// greeter is a Resumer: its state is the session's name.
type greeter struct{}

func (g greeter) ServeConn(ctx context.Context, c *server.Conn) error {
	return g.ResumeConn(ctx, c, []byte("stranger"))
}

func (greeter) ResumeConn(_ context.Context, c *server.Conn, state []byte) error {
	name := string(state)
	r := bufio.NewReader(c)
	for {
		if r.Buffered() == 0 { // otherwise a part of the next request has been read, and would be lost
			c.MarkIdle()
		}
		line, err := r.ReadString('\n')
		switch {
		case errors.Is(err, server.ErrHandover):
			return server.Handover([]byte(name))
		case errors.Is(err, server.ErrDraining):
			return nil
		case err != nil:
			return err
		}
		switch verb, argument, _ := strings.Cut(strings.TrimSpace(line), " "); verb {
		case "name":
			name = argument
		case "hello":
			if _, err := fmt.Fprintf(c, "hello, %s\n", name); err != nil {
				return err
			}
		default:
			if _, err := fmt.Fprintln(c, "want name or hello"); err != nil {
				return err
			}
		}
	}
}
