package main

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// listening serves connections until the test is over.
func listening(t *testing.T, serve func(net.Conn)) (address string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() {
		_ = ln.Close()
		all.Wait()
	})
	all.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				serve(conn)
			})
		}
	})
	return ln.Addr().String()
}

func aPing(address string) *pinger {
	return &pinger{address: address, count: 1, size: 64, interval: time.Millisecond, timeout: time.Minute, out: io.Discard}
}

// TestPingInterruptedIsNoSuccess: unless something has come back before.
func TestPingInterruptedIsNoSuccess(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	interrupted := &exitError{130, errors.New("interrupted")}
	silent := listening(t, func(conn net.Conn) {
		cancel(interrupted)
		_, _ = io.Copy(io.Discard, conn)
	})
	for _, count := range []int{1, 3} {
		p := aPing(silent)
		p.count = count
		if err := p.run(ctx); !errors.Is(err, interrupted) {
			t.Errorf("--count %d: %v, want %v", count, err, interrupted)
		}
	}

	ctx, cancel = context.WithCancelCause(t.Context())
	echoes := listening(t, func(conn net.Conn) {
		_, _ = io.Copy(conn, conn)
		cancel(interrupted)
	})
	p := aPing(echoes)
	p.count = 0
	if err := p.run(ctx); err != nil || len(p.echoes) == 0 {
		t.Errorf("%v after %d echoes", err, len(p.echoes))
	}
}

func TestPingSaysInWordsWhatIsNoEcho(t *testing.T) {
	greets := listening(t, func(conn net.Conn) {
		_, _ = io.WriteString(conn, "220 smtp ready\r\n")
		_, _ = io.Copy(io.Discard, conn)
	})
	err := aPing(greets).run(t.Context())
	if want := `ping ` + greets + `: got "220 smtp ready\r\n", which is no echo`; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}

// TestPingSummary: least, mean, most and deviation in their places, and hardly all lost is not all.
func TestPingSummary(t *testing.T) {
	var out strings.Builder
	p := pinger{address: "there", out: &out, sent: 2000}
	ms := func(all ...time.Duration) (d []time.Duration) {
		for _, n := range all {
			d = append(d, n*time.Millisecond)
		}
		return d
	}
	p.connects, p.echoes = ms(1), ms(2, 4, 4, 4, 5, 5, 7, 9)
	p.summary(3 * time.Second)
	const want = `
--- there echod ping statistics ---
2000 sent, 8 returned, 99.6% lost, time 3s
connect min/avg/max/mdev = 1.000/1.000/1.000/0.000 ms
   echo min/avg/max/mdev = 2.000/5.000/9.000/2.000 ms
`
	if out.String() != want {
		t.Errorf("got %s\nwant %s", out.String(), want)
	}
	for echoes, want := range map[int]string{1: " 99.9% lost", 0: " 100% lost", 2000: " 0% lost", 1999: " 0.05% lost"} {
		out.Reset()
		p.echoes = make([]time.Duration, echoes)
		p.connects = p.echoes
		p.summary(0)
		if !strings.Contains(out.String(), want) {
			t.Errorf("%d returned: %s, want%s", echoes, out.String(), want)
		}
	}
}

// TestPingTimesItsParts: neither is in the other, and the pings begin at an interval.
func TestPingTimesItsParts(t *testing.T) {
	slow := listening(t, func(conn net.Conn) {
		m := make([]byte, 64)
		for {
			if _, err := io.ReadFull(conn, m); err != nil {
				return
			}
			time.Sleep(50 * time.Millisecond) // to tell it from nothing
			_, _ = conn.Write(m)
		}
	})
	p := aPing(slow)
	p.count, p.interval = 2, 200*time.Millisecond
	began := time.Now()
	if err := p.run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < 250*time.Millisecond {
		t.Errorf("two pings took %v, though the second begins after 200 ms and takes 50", took)
	}
	for i := range p.echoes {
		if p.echoes[i] < 50*time.Millisecond || p.connects[i] >= p.echoes[i] {
			t.Errorf("connect %v, echo %v: want 50 ms for the echo", p.connects[i], p.echoes[i])
		}
	}
}
