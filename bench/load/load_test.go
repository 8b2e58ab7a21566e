package load

import (
	"crypto/tls"
	"io"
	"net"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// serve starts a server and returns its address.
func serve(t *testing.T, handle func(net.Conn)) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			nc, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer nc.Close()
				handle(nc)
			}()
		}
	}()
	return ln.Addr().String()
}

func echo(nc net.Conn) { _, _ = io.Copy(nc, nc) }

// specFor returns a short load on a server in this process.
func specFor(address string) Spec {
	return Spec{
		Address: address, PID: os.Getpid(), Conns: 8, Size: 64, Depth: 1,
		Warmup: time.Millisecond, Duration: 50 * time.Millisecond,
	}
}

func TestRunCountsEchoes(t *testing.T) {
	address := serve(t, echo)
	for name, change := range map[string]func(*Spec){
		"one at a time": func(*Spec) {},
		"pipelined":     func(s *Spec) { s.Depth = 16 },
		"bulk":          func(s *Spec) { s.Size = 1 << 20 },
		"churn":         func(s *Spec) { s.Churn = true },
		"one byte":      func(s *Spec) { s.Size = 1 },
	} {
		t.Run(name, func(t *testing.T) {
			spec := specFor(address)
			change(&spec)
			r, err := Run(spec)
			if err != nil {
				t.Fatal(err)
			}
			if r.Echoes == 0 || r.Elapsed < spec.Duration || r.ServerCPU <= 0 || r.LoadCPU <= 0 {
				t.Errorf("result %+v, want all fields set", r)
			}
			if r.P50 <= 0 || r.P50 > r.P99 || r.P99 > r.P999 || r.P999 > r.Max {
				t.Errorf("latencies %v, %v, %v, %v: want them to rise", r.P50, r.P99, r.P999, r.Max)
			}
		})
	}
}

// A server must not be fast because it does something else than echoing.
func TestRunDetectsWrongEchoes(t *testing.T) {
	for name, fault := range map[string]struct {
		change func(p []byte) []byte // changes the answer to the third read
		want   string
	}{
		"corrupted": {func(p []byte) []byte { p[len(p)/2]++; return p }, "something else than the echo"},
		"lost":      {func(p []byte) []byte { return p[1:] }, "something else than the echo"},
		"doubled":   {func(p []byte) []byte { return append(p, p...) }, "something else than the echo"},
		"ended":     {func([]byte) []byte { return nil }, "ended the stream after"},
	} {
		t.Run(name, func(t *testing.T) {
			address := serve(t, func(nc net.Conn) {
				buf := make([]byte, 4096)
				for reads := 1; ; reads++ {
					n, err := nc.Read(buf)
					if err != nil {
						return
					}
					answer := buf[:n:n]
					if reads == 3 {
						answer = fault.change(answer)
					}
					if len(answer) == 0 {
						return
					}
					if _, err := nc.Write(answer); err != nil {
						return
					}
				}
			})
			if _, err := Run(specFor(address)); err == nil || !strings.Contains(err.Error(), fault.want) {
				t.Errorf("error %v, want one with %q", err, fault.want)
			}
		})
	}
}

// Notices may come between messages if the spec has them, and nowhere else.
func TestRunAcceptsNotices(t *testing.T) {
	const notice = "NOTICE hi\n"
	address := serve(t, func(nc net.Conn) {
		buf := make([]byte, 64)
		for {
			if _, err := io.ReadFull(nc, buf); err != nil {
				return
			}
			if _, err := io.WriteString(nc, string(buf)+"\n"+notice); err != nil {
				return
			}
		}
	})
	spec := specFor(address)
	if _, err := Run(spec); err == nil {
		t.Error("a notice passed as an echo")
	}
	spec.Notice = notice
	if r, err := Run(spec); err != nil || r.Echoes == 0 {
		t.Errorf("with notices: %+v, %v", r, err)
	}
	spec.Size = 100 // notices now come inside messages
	if _, err := Run(spec); err == nil {
		t.Error("a notice inside a message passed")
	}
}

func TestRunRefusesBadAddresses(t *testing.T) {
	for _, address := range []string{"", "localhost:7", "127.0.0.1", "[::1]:7"} {
		if _, err := Run(specFor(address)); err == nil || !strings.Contains(err.Error(), "want IPv4 and a port") {
			t.Errorf("address %q: error %v", address, err)
		}
	}
}

// A server that ignores one of its clients must not win.
func TestRunDetectsMissingEchoes(t *testing.T) {
	var first atomic.Bool
	address := serve(t, func(nc net.Conn) {
		if first.CompareAndSwap(false, true) {
			_, _ = io.Copy(io.Discard, nc)
			return
		}
		echo(nc)
	})
	spec := specFor(address)
	spec.Timeout = 20 * time.Millisecond
	if _, err := Run(spec); err == nil || !strings.Contains(err.Error(), "on 1 of 8 connections the echo did not come") {
		t.Errorf("error %v, want one for a missing echo", err)
	}
}

// A pause of a third of the run must show in the p99.
func TestCorrectedLatenciesShowAPause(t *testing.T) {
	const pause = 100 * time.Millisecond
	address := serve(t, func(nc net.Conn) {
		buf := make([]byte, 64)
		began, paused := time.Now(), false
		for {
			if _, err := io.ReadFull(nc, buf); err != nil {
				return
			}
			if !paused && time.Since(began) > pause {
				paused = true
				time.Sleep(pause)
			}
			if _, err := nc.Write(buf); err != nil {
				return
			}
		}
	})
	spec := specFor(address)
	spec.Conns, spec.Duration, spec.Warmup, spec.Corrected = 1, 3*pause, 10*time.Millisecond, true
	r, err := Run(spec)
	if err != nil {
		t.Fatal(err)
	}
	if r.P99 < pause/2 {
		t.Errorf("p99 is %v, which does not show a pause of %v", r.P99, pause)
	}
}

func TestHoldTimesOut(t *testing.T) {
	address := serve(t, func(nc net.Conn) { _, _ = io.Copy(io.Discard, nc) })
	held, err := Hold(Spec{Address: address, Conns: 1, Size: 64, Timeout: 20 * time.Millisecond})
	if err == nil {
		held.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "no echo within") {
		t.Errorf("error %v, want a timeout", err)
	}
}

func TestHoldSendsOneMessagePerConnection(t *testing.T) {
	heard := make(chan int, 10)
	address := serve(t, func(nc net.Conn) {
		buf := make([]byte, 4096)
		n, _ := nc.Read(buf)
		_, _ = nc.Write(buf[:n])
		heard <- n
		_, _ = nc.Read(buf) // to the end
	})
	held, err := Hold(Spec{Address: address, Conns: cap(heard), Size: 64})
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for range cap(heard) {
		if n := <-heard; n != 64 {
			t.Errorf("a connection sent %d bytes, want 64", n)
		}
	}
}

func TestRunOverTLS(t *testing.T) {
	web := httptest.NewTLSServer(nil) // for its certificate
	defer web.Close()
	over := func(handle func(net.Conn)) func(net.Conn) {
		return func(nc net.Conn) { handle(tls.Server(nc, &tls.Config{Certificates: web.TLS.Certificates})) }
	}
	for name, churn := range map[string]bool{"lasting connections": false, "a connection for each message": true} {
		t.Run(name, func(t *testing.T) {
			spec := specFor(serve(t, over(echo)))
			spec.TLS, spec.Churn = true, churn
			r, err := Run(spec)
			if err != nil || r.Echoes == 0 || r.ServerCPU == 0 {
				t.Errorf("got %+v, %v", r, err)
			}
		})
	}
	t.Run("wrong echoes are errors", func(t *testing.T) {
		spec := specFor(serve(t, over(func(nc net.Conn) {
			_, _ = nc.Read(make([]byte, 64))
			_, _ = nc.Write(make([]byte, 64))
		})))
		spec.TLS = true
		if _, err := Run(spec); err == nil {
			t.Error("no error")
		}
	})
	t.Run("idle connections are held", func(t *testing.T) {
		spec := specFor(serve(t, over(echo)))
		spec.TLS = true
		h, err := Hold(spec)
		if err != nil || len(h.sessions) != spec.Conns {
			t.Fatalf("%+v, %v", h, err)
		}
		h.Close()
	})
}

func TestPulseMeasuresEachMessage(t *testing.T) {
	spec := specFor(serve(t, echo))
	h, err := Hold(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	done := make(chan struct{})
	time.AfterFunc(50*time.Millisecond, func() { close(done) })
	r, err := h.Pulse(done, time.Millisecond)
	if err != nil || r.Echoes < int64(spec.Conns) || r.Max <= 0 {
		t.Errorf("measured %+v, %v; want echoes on every connection", r, err)
	}
}
