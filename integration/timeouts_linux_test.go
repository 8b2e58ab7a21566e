package integration

import (
	"io"
	"sync"
	"testing"
	"time"
)

// TestStallTimeoutSlowReaders reads slowly and steadily while data waits all the time. The client's kernel opens its
// receive window in large steps, so that the server sees nothing for up to half a minute, or two.
func TestStallTimeoutSlowReaders(t *testing.T) {
	t.Parallel()
	long(t)
	for name, c := range map[string]struct {
		flags []string
		rate  int64 // bytes a second
		span  time.Duration
	}{
		"4 KiB/s, with the default of 30 s": {nil, 4 << 10, 2 * time.Minute},
		"512 B/s, with 5 minutes":           {[]string{"--stall-timeout", "5m"}, 512, 7 * time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := start(t, c.flags...)
			p := e.dial()
			check(t, p.SetDeadline(time.Time{}))
			var feeder sync.WaitGroup
			feeder.Go(p.feed)
			defer feeder.Wait()
			defer p.Close()
			everySecond := time.NewTicker(time.Second) // the client's pace
			defer everySecond.Stop()
			for began := time.Now(); time.Since(began) < c.span; <-everySecond.C {
				if _, err := io.CopyN(io.Discard, p.in, c.rate); err != nil {
					t.Fatalf("after %s: %v", time.Since(began), err)
				}
			}
			if st := e.status(); st.Connections != 1 {
				t.Errorf("closed: %v", st.Closed)
			}
		})
	}
}

// feed writes until the connection is closed.
func (p *peer) feed() {
	block := make([]byte, 32<<10)
	for {
		if _, err := p.Write(block); err != nil {
			return
		}
	}
}
