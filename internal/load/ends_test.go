package load

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestHeedsNotices: told SHUTDOWN in the middle of an echo, a connection waits for what is under way, half-closes, reads to
// the end, and another takes its place.
func TestHeedsNotices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		draining := faults{5: func(s *faultyConn, m []byte) {
			announce("SHUTDOWN 5 SIGTERM\n")(s, m)
		}}
		r := runs(t, Options{Dial: inMemory(t, draining.serve, draining.serve, nil, faults{}.serve), Conns: 2, Rate: 100, Duration: 2 * time.Second})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 200, Returned: 200})
		expect(t, "connects", r.Connects, Connects{Tried: 5, Made: 4, Refused: 1})
		expect(t, "notices", r.Notices, Notices{Shutdown: 2, Heeded: 2})
		expect(t, "ends", r.Ends, Ends{Left: 2, Noticed: 2})
		if r.Reconnects != 2 || r.Outage.Clients != 2 || r.Outage.Max <= 0 || r.Outage.Max > 0.4 {
			t.Errorf("%d reconnects, outage %+v", r.Reconnects, r.Outage)
		}
		if why := r.Judge(Bounds{Refused: new(int64(0)), Outage: new(time.Nanosecond)}); len(why) != 2 {
			t.Errorf("judged %q, want it to say the refused connect and the outage", why)
		}
	})
}

// TestWaitsForWhatIsUnderWay: a connection that is told to go does not half-close before all has come back.
func TestWaitsForWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		first := faults{5: announceFirst("SHUTDOWN 5 SIGTERM\n")}
		r := runs(t, Options{Dial: inMemory(t, first.serve, faults{}.serve), Rate: 10, Duration: 2 * time.Second})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 20, Returned: 20})
		expect(t, "notices", r.Notices, Notices{Shutdown: 1, Heeded: 1})
	})
}

// TestAConnectionThatComesTooLate: at the end of the run nobody is left who dials, nor what came of it.
func TestAConnectionThatComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		near, far := pipes()
		late := func(ctx context.Context, _ string) (net.Conn, error) {
			<-ctx.Done()
			time.Sleep(time.Minute) // longer than the run waits for anything else
			return near, nil
		}
		runs(t, Options{Dial: late, Duration: time.Second, Timeout: time.Hour})
		if _, err := far.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("the connection is still open: %v", err)
		}
	})
}

// TestTurnedAway: a server that says so has lost nothing; what it was sent is sent again.
func TestTurnedAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, word := range []string{"PAUSED\n", "BUSY\n", "SHUTDOWN 0 SIGTERM\n"} {
			turnsAway := func(conn net.Conn) {
				_, _ = conn.Write([]byte(word))
				_ = conn.(pipe).CloseWrite()
				_, _ = io.Copy(io.Discard, conn)
				_ = conn.Close()
			}
			r := runs(t, Options{Dial: inMemory(t, turnsAway, turnsAway, faults{}.serve), Rate: 10, Duration: 2 * time.Second})
			expect(t, word+"connects", r.Connects, Connects{Tried: 3, Made: 3, TurnedAway: 2})
			if e := r.Echoes; e.Returned != 20 || e.Lost != 0 || e.Sent != e.Returned+e.TurnedAway || e.TurnedAway == 0 {
				t.Errorf("%q: %+v", word, e)
			}
			if why := r.Judge(Bounds{}); why != nil {
				t.Errorf("judged %q", why)
			}
		}
	})
}

// TestHangUp: what was under way on a connection that ends is lost.
func TestHangUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, faults{10: hangUp}.serve, faults{}.serve), Rate: 100, Duration: time.Second})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 100, Returned: 99, Lost: 1})
		expect(t, "ends", r.Ends, Ends{Left: 1, Closed: 1})
		if why := r.Judge(Bounds{Lost: new(int64(1))}); why != nil {
			t.Errorf("judged %q, though one may be lost", why)
		}
		if why := r.Judge(Bounds{Lost: new(int64(1)), Disconnects: new(int64(0))}); len(why) != 1 {
			t.Errorf("judged %q, though it disconnected", why)
		}
	})
}

// TestChurn: connections are made anew, and nothing is lost, nor anybody without service.
func TestChurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, faults{}.serve), Conns: 3, Rate: 300, Churn: 100 * time.Millisecond, Duration: 3 * time.Second})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 900, Returned: 900})
		if r.Ends.Left != r.Connects.Made || r.Reconnects != r.Connects.Made-3 || r.Connects.Made < 45 || r.Connects.Made > 180 {
			t.Errorf("connects %+v, ends %+v, reconnects %d", r.Connects, r.Ends, r.Reconnects)
		}
		expect(t, "outage", r.Outage, Outage{})
	})
}

// TestNoReconnect: a connection that ends is not made again, and what is due then is not sent.
func TestNoReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, faults{49: hangUp}.serve), Rate: 100, Duration: time.Second, NoReconnect: true})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 50, Returned: 49, Lost: 1, Unsent: 50})
		expect(t, "connects", r.Connects, Connects{Tried: 1, Made: 1})
		if r.Outage.Max < 0.5 || r.Outage.Max > 0.52 {
			t.Errorf("outage %+v, want half a second, to the end", r.Outage)
		}
	})
}

// TestNobodyThere: a run without a server ends, and is judged.
func TestNobodyThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, nil), Rate: 10, Duration: time.Second})
		if r.Echoes.Unsent != 10 || r.Connects.Refused == 0 || r.Connects.Tried != r.Connects.Refused {
			t.Errorf("%+v, %+v", r.Echoes, r.Connects)
		}
		if why := r.Judge(Bounds{}); len(why) != 2 {
			t.Errorf("judged %q", why)
		}
		expect(t, "errors", r.Errors, []string{"connect: connection refused"})
	})
}

// TestALostMessageHoldsUpNoChurn: a connection that is to be made anew does not wait for what will not come.
func TestALostMessageHoldsUpNoChurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dropsLast := func(conn net.Conn) { // what comes after 20 messages on each connection
			faults{20: func(s *faultyConn, _ []byte) { _, _ = io.Copy(io.Discard, s.lines) }}.serve(conn)
		}
		r := runs(t, Options{Dial: inMemory(t, dropsLast, faults{}.serve), Rate: 20, Churn: 2 * time.Second, Duration: 10 * time.Second, Late: 500 * time.Millisecond})
		if e := r.Echoes; e.Sent != 200 || e.Lost == 0 || e.Lost != e.Sent-e.Returned {
			t.Errorf("%+v", e)
		}
		if r.Ends.Left != r.Connects.Made || r.Echo.Max > 2.5 { // the longest churn, a while before it is late, and not the patience at the end
			t.Errorf("ends %+v of %d connections, max %v s", r.Ends, r.Connects.Made, r.Echo.Max)
		}
	})
}

// TestABlackHole: an attempt that is under way when the run has waited long enough was one, and led nowhere.
func TestABlackHole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hole := func(ctx context.Context, _ string) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		r := runs(t, Options{Dial: hole, Duration: 2 * time.Second, Timeout: time.Minute})
		expect(t, "connects", r.Connects, Connects{Tried: 1, TimedOut: 1})
		expect(t, "outage", r.Outage, Outage{Clients: 1, Median: 2, Max: 2})
		if why := r.Judge(Bounds{Refused: new(int64(0)), Outage: new(time.Second)}); len(why) != 3 {
			t.Errorf("judged %q, want that nothing came back and both bounds", why)
		}
	})
}

// TestNoReconnectWhereNobodyIs: the first attempt is the last one.
func TestNoReconnectWhereNobodyIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, nil), Duration: time.Second, NoReconnect: true})
		expect(t, "connects", r.Connects, Connects{Tried: 1, Refused: 1})
	})
}

// TestWhatIsNotInOrder: a connection that is reset after the half-close, or not ended at all, was not left in order.
func TestWhatIsNotInOrder(t *testing.T) {
	resets := func(conn net.Conn) {
		defer conn.Close()
		_, _ = io.Copy(conn, conn)
		_ = conn.(*net.TCPConn).SetLinger(0)
	}
	stays := make(chan struct{})
	defer close(stays)
	noEnd := func(conn net.Conn) {
		defer conn.Close()
		_, _ = io.Copy(conn, conn)
		<-stays
	}
	for what, tt := range map[string]struct {
		server func(net.Conn)
		want   Ends
		said   string
	}{
		"reset":  {resets, Ends{Reset: 3}, "read: connection reset by peer"},
		"no end": {noEnd, Ends{Failed: 3}, errNoEnd.Error()},
	} {
		r, err := Run(t.Context(), Options{Address: overTCP(t, tt.server), Conns: 3, Rate: 100, Duration: 100 * time.Millisecond, DrainWait: 300 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		expect(t, what+", ends", r.Ends, tt.want)
		expect(t, what+", errors", r.Errors, []string{tt.said})
	}
}

// TestANoticeIsNotHeededByAReset: though all had come back.
func TestANoticeIsNotHeededByAReset(t *testing.T) {
	resets := func(conn net.Conn) {
		defer conn.Close()
		_, _ = io.WriteString(conn, "SHUTDOWN 5 SIGTERM\n")
		_, _ = io.Copy(conn, conn)
		_ = conn.(*net.TCPConn).SetLinger(0)
	}
	r, err := Run(t.Context(), Options{Address: overTCP(t, resets), Rate: 100, Duration: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if r.Notices.Shutdown == 0 || r.Notices.Heeded != 0 || r.Ends.Noticed != r.Connects.Made {
		t.Errorf("notices %+v, ends %+v", r.Notices, r.Ends)
	}
}

// TestOutOfFilesIsNoFaultOfTheServer: the run ends, and says which limit it is.
func TestOutOfFilesIsNoFaultOfTheServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		full := func(context.Context, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("socket", syscall.EMFILE)}
		}
		_, err := Run(t.Context(), Options{Address: "in memory", Dial: full, Conns: 7, Duration: time.Hour, Loops: 2})
		if err == nil || !strings.Contains(err.Error(), "7 connections: raise the limit (ulimit -n)") {
			t.Errorf("%v", err)
		}
	})
}
