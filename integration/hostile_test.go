//go:build unix

package integration

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestHostileMix attacks a server from all sides for a minute: broken PROXY headers, resets, callers of the control socket
// and of --http that are silent, slow or send nonsense, while operators pause, notify and kill. A well-behaved client is
// echoed throughout, and the drain at the end is clean.
func TestHostileMix(t *testing.T) {
	long(t)
	const lasts = time.Minute
	web := "127.0.0.1:" + freePorts(t, 1)[0]
	e := start(t, "--proxy-protocol", "127.0.0.1/32", "--http", web, "--pprof", "--grace", "10s", "--max-conns", "200")
	end := time.Now().Add(lasts)
	var attackers sync.WaitGroup
	attack := func(n int, f func(random *rand.Rand) error) {
		for i := range n {
			attackers.Go(func() {
				random := rand.New(rand.NewPCG(uint64(i), 1))
				for time.Now().Before(end) {
					if err := f(random); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
	}
	junk := func(random *rand.Rand) []byte {
		p := make([]byte, random.IntN(300))
		for i := range p {
			p[i] = byte(random.Uint32())
		}
		return p
	}
	// hold connects, sends, and goes, with a reset every other time. Being refused or cut off is what an attacker gets.
	hold := func(random *rand.Rand, network, address string, sent []byte) error {
		nc, err := net.DialTimeout(network, address, patience)
		if err != nil {
			return nil
		}
		defer nc.Close()
		_, _ = nc.Write(sent)
		_ = nc.SetReadDeadline(time.Now().Add(time.Duration(random.IntN(300)) * time.Millisecond))
		_, _ = nc.Read(make([]byte, 1))
		if tcp, ok := nc.(*net.TCPConn); ok && random.IntN(2) == 0 {
			_ = tcp.SetLinger(0)
		}
		return nil
	}
	const header = "PROXY TCP4 203.0.113.9 10.0.0.1 5555 9999\r\n"
	attack(4, func(r *rand.Rand) error { return hold(r, "tcp", e.addr, junk(r)) })
	attack(2, func(r *rand.Rand) error { return hold(r, "tcp", e.addr, append([]byte("PROXY "), junk(r)...)) })
	attack(2, func(r *rand.Rand) error { return hold(r, "tcp", e.addr, append([]byte(header), junk(r)...)) })
	attack(4, func(r *rand.Rand) error { return hold(r, "unix", e.socket, junk(r)) })
	attack(2, func(r *rand.Rand) error {
		return hold(r, "unix", e.socket, []byte("POST /v1/pause HTTP/1.1\r\nContent-Le"))
	})
	attack(4, func(r *rand.Rand) error { return hold(r, "tcp", web, junk(r)) })
	attack(1, func(r *rand.Rand) error {
		return hold(r, "tcp", web, []byte("GET /debug/pprof/profile?seconds=1 HTTP/1.1\r\nHost: echod\r\n\r\n"))
	})
	attack(1, func(r *rand.Rand) error {
		for _, args := range [][]string{
			{"pause", "--ttl", "200ms"}, {"resume"}, {"notify", "hello"}, {"kill", "--min-idle", "1h"}, {"conns"}, {"status"},
		} {
			if got := e.ctl(args...); got.code != 0 && got.code != 1 {
				return fmt.Errorf("ctl %s: exit code %d, %s", strings.Join(args, " "), got.code, got.stderr)
			}
		}
		return nil
	})
	attack(1, func(*rand.Rand) error {
		client := http.Client{Timeout: patience}
		resp, err := client.Get("http://" + web + "/livez")
		if err != nil {
			return err
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("/livez answers %s", resp.Status)
		}
		return nil
	})

	good := e.dial()
	check(t, good.send(header+"begin\n"))
	check(t, good.expect("begin\n"))
	for n := 0; time.Now().Before(end); n++ {
		line := fmt.Sprintf("line %d\n", n)
		check(t, good.send(line))
		for {
			got, err := good.in.ReadString('\n')
			check(t, err)
			if got == line {
				break
			}
			if !strings.HasPrefix(got, "NOTICE hello") {
				t.Fatalf("got %q, want %q or the operator's notice", got, line)
			}
		}
	}
	attackers.Wait()
	e.signal(syscall.SIGTERM)
	for got := ""; !strings.HasPrefix(got, "SHUTDOWN 10 SIGTERM"); {
		var err error
		got, err = good.in.ReadString('\n')
		check(t, err)
	}
	check(t, good.leave())
	e.wait(0)
}
