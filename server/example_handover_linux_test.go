package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"echod/server"
)

// lineCounter answers each line with its number. The number is the state that a handover passes on.
type lineCounter struct{}

func (h lineCounter) ServeConn(ctx context.Context, c *server.Conn) error {
	return h.ResumeConn(ctx, c, []byte("0"))
}

func (lineCounter) ResumeConn(_ context.Context, c *server.Conn, state []byte) error {
	lines, err := strconv.Atoi(string(state))
	if err != nil {
		return err
	}
	in := bufio.NewReader(c)
	for {
		if in.Buffered() == 0 {
			c.MarkIdle() // the safe point: each line is answered, and nothing of the next one has been read
		}
		_, err := in.ReadString('\n')
		switch {
		case errors.Is(err, server.ErrHandover):
			return server.Handover([]byte(strconv.Itoa(lines)))
		case errors.Is(err, server.ErrDraining):
			return nil
		case err != nil:
			return err
		}
		lines++
		if _, err := fmt.Fprintln(c, lines); err != nil {
			return err
		}
	}
}

// A server hands its connections over to another one. Here both are in one process. Usually the second one is in a new
// process, which inherits one end of the socket pair; see examples/upgrade.
func ExampleResumer() {
	ctx := context.Background()
	predecessor, addr := start(lineCounter{}, server.Options{})
	client, err := net.Dial("tcp", addr.String())
	if err != nil {
		log.Fatal(err)
	}
	answers := bufio.NewScanner(client)
	ask := func() {
		fmt.Fprintln(client, "a line")
		answers.Scan()
		fmt.Println(answers.Text())
	}
	ask()

	near, far := socketPair()
	successor, err := server.New(lineCounter{}, server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		offer, err := server.ReceiveOffer(ctx, far)
		if err != nil {
			log.Fatal(err)
		}
		if err := successor.TakeOver(ctx, offer, offer.Listeners); err != nil {
			log.Fatal(err) // the predecessor continues to serve
		}
		for _, l := range offer.Listeners {
			go successor.ServeListener(l)
		}
	}()
	report, err := predecessor.HandOver(ctx, near, server.HandoverOptions{
		Kill: func() {}, // ends the new process, and waits for it
	})
	if err != nil {
		log.Fatal(err) // nothing has changed
	}
	fmt.Println("handed over:", report.HandedOver)
	ask()
	_ = client.Close()
	_ = successor.Close()
	// Output:
	// 1
	// handed over: 1
	// 2
}

// socketPair returns the two ends of a link.
func socketPair() (near, far server.Link) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		log.Fatal(err)
	}
	end := func(fd int) server.Link {
		f := os.NewFile(uintptr(fd), "link")
		defer f.Close()
		nc, err := net.FileConn(f)
		if err != nil {
			log.Fatal(err)
		}
		link, err := server.NewUnixLink(nc.(*net.UnixConn))
		if err != nil {
			log.Fatal(err)
		}
		return link
	}
	return end(fds[0]), end(fds[1])
}
