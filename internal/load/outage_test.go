package load

import (
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// TestAStallIsAnOutage: who is connected and gets nothing is as much without service as who is not.
func TestAStallIsAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tt := range []struct {
			what   string
			server faults
			want   float64 // seconds
		}{
			{"stalls for 2.5 s", faults{10: delay(2500 * time.Millisecond)}, 2.5},
			{"never answers", faults{0: func(s *faultyConn, _ []byte) { _, _ = io.Copy(io.Discard, s.lines); s.over = true }}, 5},
			{"is slow, but not late", faults{10: delay(900 * time.Millisecond)}, 0},
			{"loses one of many", faults{10: drop}, 0},
		} {
			r := runs(t, Options{Dial: inMemory(t, tt.server.serve), Rate: 10, Duration: 5 * time.Second})
			if got := r.Outage.Max; got < tt.want-0.01 || got > tt.want+0.01 {
				t.Errorf("a server that %s: %v s without service, want %v", tt.what, got, tt.want)
			}
		}
	})
}

// TestSlowIsNoOutage: echoes that are all late, but keep coming, are service.
func TestSlowIsNoOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, lagging(1500*time.Millisecond)), Rate: 10, Duration: 10 * time.Second})
		if e := r.Echoes; e.Returned != 100 || e.Late != 100 {
			t.Errorf("%+v", e)
		}
		if got := r.Outage.Max; got < 1.4 || got > 1.6 { // until the first has come
			t.Errorf("%v s without service, want 1.5", got)
		}
	})
}

// TestOwnStallIsNoOutage: what this side has sent late has not been kept waiting by the server.
func TestOwnStallIsNoOutage(t *testing.T) {
	l := &loop{run: &run{opts: Options{Rate: 10, Late: time.Second, Size: MinSize, Pipeline: 100}}, tally: newTally()}
	u := &user{loop: l, phase: serving, socket: full{}, check: newChecker(origin{1, 1}, MinSize, time.Second, l.tally, nil)}
	u.again = []time.Duration{time.Second} // due then, and sent at 3 s
	u.begin(3 * time.Second)
	u.lookForLate(3*time.Second + 10*time.Millisecond)
	if u.inOut {
		t.Errorf("an outage since %v", u.outage)
	}
}

// full is a socket that takes nothing.
type full struct{ socket }

func (full) write([]byte) (int, error) { return 0, errWouldBlock }
func (full) awaitRoom(bool) error      { return nil }

// lagging echoes everything a while after it has come.
func lagging(by time.Duration) func(net.Conn) {
	return func(conn net.Conn) {
		type piece struct {
			data []byte
			due  time.Time
		}
		pieces := make(chan piece, 1000)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for p := range pieces {
				time.Sleep(time.Until(p.due))
				_, _ = conn.Write(p.data)
			}
		}()
		for {
			data := make([]byte, 640)
			n, err := conn.Read(data)
			if err != nil {
				break
			}
			pieces <- piece{data[:n], time.Now().Add(by)}
		}
		close(pieces)
		<-done
		_ = conn.Close()
	}
}

// TestAnOutageBeginsWithTheNotice, and what still comes over the connection that is to end does not end it.
func TestAnOutageBeginsWithTheNotice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		draining := faults{5: func(s *faultyConn, m []byte) {
			s.say([]byte("SHUTDOWN 5 SIGTERM\n"))
			time.Sleep(200 * time.Millisecond)
			s.say(m)
			_, _ = io.Copy(io.Discard, s.lines)
			time.Sleep(300 * time.Millisecond)
			s.over = true
		}}
		r := runs(t, Options{Dial: inMemory(t, draining.serve, faults{}.serve), Rate: 10, Duration: 3 * time.Second})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 30, Returned: 30})
		if got := r.Outage.Max; got < 0.5 || got > 0.7 { // and the pause before it connects
			t.Errorf("%v s without service, want 0.5 and up to 0.2", got)
		}
	})
}

// TestWhoIsGivenTimeIsNotTurnedAway: with a grace, what was sent and does not come back is lost.
func TestWhoIsGivenTimeIsNotTurnedAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		breaksItsWord := func(conn net.Conn) {
			_, _ = io.ReadFull(conn, make([]byte, DefaultSize))
			_, _ = io.WriteString(conn, "SHUTDOWN 5 SIGTERM\n")
			_ = conn.Close()
		}
		r := runs(t, Options{Dial: inMemory(t, breaksItsWord, faults{}.serve), Rate: 10, Duration: 2 * time.Second})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 20, Returned: 19, Lost: 1})
		expect(t, "connects", r.Connects, Connects{Tried: 2, Made: 2})
	})
}
