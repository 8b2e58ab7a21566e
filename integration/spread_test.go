//go:build unix

package integration

import (
	"bufio"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestSpread drains a server with 5,000 clients with --spread. Each client that is told connects to another server at
// once, as clients behind a load balancer do. In no second do more than twice as many reconnect as on average.
func TestSpread(t *testing.T) {
	slow(t)
	const clients, spread = 5000, 10 * time.Second
	old, next := start(t, "--grace", "30s"), start(t)

	var lock sync.Mutex
	var reconnects []time.Time
	reconnect := func() error {
		c, err := net.Dial("tcp", next.addr)
		if err != nil {
			return err
		}
		lock.Lock()
		reconnects = append(reconnects, time.Now())
		lock.Unlock()
		return c.Close()
	}
	var connected, ended sync.WaitGroup
	connected.Add(clients)
	places := make(chan struct{}, 100) // for connects at the same time: the accept queue is bounded
	for range clients {
		ended.Go(func() {
			places <- struct{}{}
			c, err := net.Dial("tcp", old.addr)
			<-places
			connected.Done()
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			line, err := bufio.NewReader(c).ReadString('\n')
			if err != nil || !strings.HasPrefix(line, "SHUTDOWN 30 ") {
				t.Errorf("client read %q, %v", line, err)
				return
			}
			if err := reconnect(); err != nil {
				t.Error(err)
			}
		})
	}
	connected.Wait()
	old.awaitOpen(clients)
	if r := old.ctl("shutdown", "--spread", spread.String()); r.code != 0 {
		t.Fatalf("ctl shutdown: %+v", r)
	}
	ended.Wait()
	old.wait(0)

	slices.SortFunc(reconnects, time.Time.Compare)
	busiest := 0
	for first, last := 0, 0; last < len(reconnects); last++ {
		for reconnects[last].Sub(reconnects[first]) >= time.Second {
			first++
		}
		busiest = max(busiest, last-first+1)
	}
	mean := clients / int(spread/time.Second)
	t.Logf("%d clients reconnected within %v, and %d in the busiest second: the mean is %d", len(reconnects),
		reconnects[len(reconnects)-1].Sub(reconnects[0]).Round(time.Millisecond), busiest, mean)
	if len(reconnects) != clients || busiest > 2*mean {
		t.Errorf("%d clients reconnected, %d of them in one second: want %d, at most %d", len(reconnects), busiest, clients, 2*mean)
	}
}
