package load

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Over TLS each connection has a goroutine with a client of crypto/tls. It takes more CPU time than the epoll loop, so
// only the server's CPU time says how fast the server is. All servers get the same offer, so that they do the same work:
// X25519, and no session is resumed.

// tlsConfig does not verify the server, whose certificate was made for the run.
var tlsConfig = &tls.Config{InsecureSkipVerify: true, CurvePreferences: []tls.CurveID{tls.X25519}}

// A tlsRun is one run over TLS.
type tlsRun struct {
	spec   Spec
	opened atomic.Int64 // connections so far
	echoes atomic.Int64
	ending atomic.Bool // no new messages

	mu        sync.Mutex
	latencies *hdrhistogram.Histogram
}

// runTLS is Run over TLS.
func runTLS(spec Spec) (Result, error) {
	r := &tlsRun{spec: spec, latencies: hdrhistogram.New(1, int64(slowest), 3)}
	failed := make(chan error, spec.Conns)
	for range spec.Conns {
		go func() { failed <- r.client() }()
	}
	measured, err := r.measure(failed)
	r.ending.Store(true)
	for range spec.Conns {
		if ended := <-failed; err == nil {
			err = ended
		}
	}
	return measured, err
}

// measure measures for spec.Duration after the warm-up.
func (r *tlsRun) measure(failed chan error) (Result, error) {
	wait := func(d time.Duration) error {
		select {
		case <-time.After(d):
			return nil
		case err := <-failed:
			failed <- err
			return err
		}
	}
	if err := wait(r.spec.Warmup); err != nil {
		return Result{}, err
	}
	server, err := r.spec.serverCPU()
	if err != nil {
		return Result{}, err
	}
	own, err := cpuTime(0)
	if err != nil {
		return Result{}, err
	}
	r.mu.Lock()
	r.latencies.Reset()
	r.mu.Unlock()
	echoes, begun := r.echoes.Load(), time.Now()
	if err := wait(r.spec.Duration); err != nil {
		return Result{}, err
	}
	result := Result{Echoes: r.echoes.Load() - echoes, Elapsed: time.Since(begun)}
	if result.ServerCPU, err = r.spec.serverCPU(); err != nil {
		return Result{}, err
	}
	if result.LoadCPU, err = cpuTime(0); err != nil {
		return Result{}, err
	}
	result.ServerCPU -= server
	result.LoadCPU -= own
	r.mu.Lock()
	defer r.mu.Unlock()
	at := func(percent float64) time.Duration { return time.Duration(r.latencies.ValueAtPercentile(percent)) }
	result.P50, result.P99, result.P999, result.Max = at(50), at(99), at(99.9), time.Duration(r.latencies.Max())
	return result, nil
}

// serverCPU returns the CPU time of the server's processes.
func (s Spec) serverCPU() (time.Duration, error) {
	total, err := cpuTime(s.PID)
	if err == nil && s.BehindPID != 0 {
		var behind time.Duration
		behind, err = cpuTime(s.BehindPID)
		total += behind
	}
	return total, err
}

// client sends messages, with Churn each on its own connection, until the run ends.
func (r *tlsRun) client() error {
	buf := make([]byte, r.spec.Size)
	for !r.ending.Load() {
		began := time.Now()
		c, phase, err := r.dial()
		if err != nil {
			return err
		}
		for offset := int64(0); !r.ending.Load(); offset += int64(r.spec.Size) {
			if !r.spec.Churn {
				began = time.Now()
			}
			if err := echoOnce(c, phase, offset, buf); err != nil {
				c.Close()
				return err
			}
			r.echoes.Add(1)
			r.mu.Lock()
			_ = r.latencies.RecordValue(int64(min(time.Since(began), slowest)))
			r.mu.Unlock()
			if r.spec.Churn {
				break
			}
		}
		c.Close()
	}
	return nil
}

// echoOnce sends a message and checks its echo.
func echoOnce(c net.Conn, phase int, offset int64, buf []byte) error {
	if err := c.SetDeadline(time.Now().Add(echoTimeout)); err != nil {
		return err
	}
	if _, err := c.Write(expect(phase, offset, len(buf))); err != nil {
		return fmt.Errorf("writing to the server: %w", err)
	}
	if _, err := io.ReadFull(c, buf); err != nil {
		return fmt.Errorf("reading from the server: %w", err)
	}
	if !matches(phase, offset, buf) {
		return fmt.Errorf("after %d bytes the server sent something else than the echo", offset)
	}
	return nil
}

// dial connects and completes the handshake.
func (r *tlsRun) dial() (c *tls.Conn, phase int, err error) {
	n := int(r.opened.Add(1))
	from := source(n).Addr
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IP(from[:])}, Timeout: echoTimeout}
	nc, err := d.Dial("tcp4", r.spec.Address)
	if err != nil {
		return nil, 0, err
	}
	c = tls.Client(nc, tlsConfig)
	if err := c.SetDeadline(time.Now().Add(echoTimeout)); err != nil {
		nc.Close()
		return nil, 0, err
	}
	if err := c.Handshake(); err != nil {
		nc.Close()
		return nil, 0, fmt.Errorf("connection %s: handshake: %w", strconv.Itoa(n), err)
	}
	return c, n * 131 % period, nil
}

// holdTLS is Hold over TLS.
func holdTLS(spec Spec) (*Held, error) {
	r := &tlsRun{spec: spec}
	h := &Held{}
	buf := make([]byte, spec.Size)
	for range spec.Conns {
		c, phase, err := r.dial()
		if err == nil {
			h.sessions = append(h.sessions, c)
			err = echoOnce(c, phase, 0, buf)
		}
		if err != nil {
			h.Close()
			return nil, err
		}
	}
	return h, nil
}
