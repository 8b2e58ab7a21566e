package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

func startNATS(s *site) error {
	config := fmt.Sprintf("listen: %q\npid_file: %q\nlame_duck_duration: \"30s\"\nlame_duck_grace_period: \"5s\"\n",
		s.address, s.path("nats.pid"))
	if err := os.WriteFile(s.path("nats.conf"), []byte(config), 0o644); err != nil {
		return err
	}
	return s.serve("nats-server", "-c", s.path("nats.conf"))
}

// lameDuck connects clients, sends SIGUSR2, and waits until the server has closed them all.
func lameDuck(s *site) (o outcome, err error) {
	ends := make(chan natsEnd, clients)
	var running sync.WaitGroup
	conns := make([]net.Conn, 0, clients)
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
		running.Wait()
	}()
	for range clients {
		c, err := net.Dial("tcp", s.address)
		if err != nil {
			return o, err
		}
		conns = append(conns, c)
		running.Go(func() { ends <- natsClient(c) })
	}
	wait(s.ctx, actAfter)
	acted := time.Now()
	if err := s.signal(syscall.SIGUSR2, 0); err != nil {
		return o, err
	}
	o.Connections, o.OldGone = clients, -1
	deadline := time.After(time.Minute)
	for range clients {
		select {
		case end := <-ends:
			if end.told {
				o.Told++
			}
			if end.reset {
				o.Reset++
			} else {
				o.Closed++
			}
			o.Lost += int64(end.unanswered)
		case <-deadline:
			return o, errors.New("the clients were not closed within a minute")
		}
	}
	select {
	case <-s.server.ended:
		o.OldGone = time.Since(acted).Seconds()
	case <-deadline:
	}
	return o, nil
}

type natsEnd struct {
	told, reset bool
	unanswered  int // PINGs without a PONG
}

// natsClient speaks NATS until the server closes the connection.
func natsClient(c net.Conn) (end natsEnd) {
	stop := make(chan struct{})
	var pinging sync.WaitGroup
	defer pinging.Wait()
	defer close(stop)
	var mu sync.Mutex // guards end.unanswered
	if _, err := io.WriteString(c, "CONNECT {\"verbose\":false,\"lang\":\"go\",\"protocol\":1}\r\n"); err != nil {
		return natsEnd{reset: true}
	}
	pinging.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				if _, err := io.WriteString(c, "PING\r\n"); err != nil {
					return
				}
				mu.Lock()
				end.unanswered++
				mu.Unlock()
			}
		}
	})
	lines := bufio.NewScanner(c)
	for lines.Scan() {
		line := lines.Text()
		switch {
		case line == "PONG":
			mu.Lock()
			end.unanswered--
			mu.Unlock()
		case strings.HasPrefix(line, "INFO ") && strings.Contains(line, `"ldm":true`):
			end.told = true
		}
	}
	mu.Lock()
	defer mu.Unlock()
	end.reset = lines.Err() != nil
	return end
}
