package load

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

var errRefused error = &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}

// runs runs opts against the server in memory, where time takes no time.
func runs(t *testing.T, opts Options) *Report {
	t.Helper()
	opts.Address = "in memory"
	r, err := Run(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func expect(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// all are faults of each kind, and what becomes of 100 messages.
var all = faults{
	3: drop, 4: drop, 10: duplicate, 20: corrupt, 21: corrupt, 30: swap, 40: misdeliver,
	50: announce("NOTICE hello\n"), 60: drop, 70: corrupt, 71: duplicate, 72: swap, 80: announce("NOTICE hello\n"),
}

var allOf100 = Echoes{Sent: 100, Returned: 94, Reordered: 2, Duplicated: 2, Lost: 3, Corrupted: 3, Foreign: 1}

func times(e Echoes, n int64) Echoes {
	return Echoes{
		Sent: n * e.Sent, Returned: n * e.Returned, Late: n * e.Late, Reordered: n * e.Reordered, Duplicated: n * e.Duplicated,
		Lost: n * e.Lost, Corrupted: n * e.Corrupted, Foreign: n * e.Foreign,
	}
}

func TestEachFaultIsReportedAsWhatItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, all.serve), Conns: 5, Rate: 500, Duration: time.Second})
		expect(t, "echoes", r.Echoes, times(allOf100, 5))
		expect(t, "notices", r.Notices, Notices{Messages: 10})
		expect(t, "connects", r.Connects, Connects{Tried: 5, Made: 5})
		expect(t, "ends", r.Ends, Ends{Left: 5})
		why := strings.Join(r.Judge(Bounds{}), "; ")
		for _, want := range []string{"15 messages lost", "15 messages corrupted", "10 messages duplicated", "10 messages came back out of order", "5 messages came back on a connection"} {
			if !strings.Contains(why, want) {
				t.Errorf("the verdict lacks %q: %s", want, why)
			}
		}
	})
}

func TestEachFaultIsReportedAsWhatItIsOverTCP(t *testing.T) {
	var d net.Dialer
	plain := func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	for name, dial := range map[string]func(context.Context, string) (net.Conn, error){"the system's own way": nil, "any connection": plain} {
		r, err := Run(t.Context(), Options{
			Address: overTCP(t, all.serve), Dial: dial, Conns: 20, Rate: 10000, Duration: 200 * time.Millisecond, Late: time.Hour, Loops: 3,
		})
		if err != nil {
			t.Fatal(err)
		}
		expect(t, "echoes, "+name, r.Echoes, times(allOf100, 20))
	}
}

// TestDelay: a message that takes longer is late, and so are those that wait behind it, though they come.
func TestDelay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// A message each 100 ms; the tenth takes 1.55 s: it is late, and those due up to 0.5 s after it.
		server := faults{10: delay(1550 * time.Millisecond)}
		r := runs(t, Options{Dial: inMemory(t, server.serve), Rate: 10, Duration: 4 * time.Second})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 40, Returned: 40, Late: 6})
		if r.Echo.Max < 1.54 || r.Echo.Max > 1.56 || r.Echo.P50 > 0.001 {
			t.Errorf("median %v s and max %v s, want nothing and 1.55 s", r.Echo.P50, r.Echo.Max)
		}
		if why := r.Judge(Bounds{}); why != nil {
			t.Errorf("judged bad: %q", why)
		}
		if why := r.Judge(Bounds{P99: new(time.Second)}); len(why) != 1 || !strings.Contains(why[0], "p99 of echoes is 1.55") {
			t.Errorf("judged %q, want the p99 to be too high", why)
		}
	})
}

// TestSchedule: messages are sent when they are due, those of one connection evenly.
func TestSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var at []time.Duration
		server := func(conn net.Conn) {
			defer conn.Close()
			m := make([]byte, 64)
			for {
				if _, err := io.ReadFull(conn, m); err != nil {
					return
				}
				at = append(at, time.Since(start))
				_, _ = conn.Write(m)
			}
		}
		r := runs(t, Options{Dial: inMemory(t, server), Conns: 1, Rate: 4, Duration: 2 * time.Second})
		want := []time.Duration{}
		for i := range time.Duration(8) {
			want = append(want, i*250*time.Millisecond)
		}
		expect(t, "when they were sent", at, want)
		expect(t, "echoes", r.Echoes, Echoes{Sent: 8, Returned: 8})
	})
}

// TestAsManyAsTheRateSays: to the message, whatever the schedule's resolution.
func TestAsManyAsTheRateSays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for rate, want := range map[float64]int64{1: 1, 7: 4, 4999: 2500, 6000: 3000, 12345.6: 6173} {
			r := runs(t, Options{Dial: inMemory(t, faults{}.serve), Conns: 7, Rate: rate, Duration: 500 * time.Millisecond})
			expect(t, "echoes", r.Echoes, Echoes{Sent: want, Returned: want})
		}
	})
}

// TestRamp: a connection is opened when its turn comes, and takes part in the rate from then on.
func TestRamp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, faults{}.serve), Conns: 4, Rate: 40, Ramp: 4 * time.Second, Duration: 6 * time.Second})
		// Ten a second on each, for 6, 5, 4 and 3 s, and the first of each is due within 0.1 s.
		if got := r.Echoes; got.Sent != 180 || got.Returned != got.Sent {
			t.Errorf("%+v, want 180", got)
		}
		if r.Series[5].Open != 1 || r.Series[25].Open != 3 || r.Series[45].Open != 4 {
			t.Errorf("open after 0.5, 2.5 and 4.5 s: %d, %d, %d", r.Series[5].Open, r.Series[25].Open, r.Series[45].Open)
		}
	})
}

// TestBacklog: what is due while nothing can be sent is sent later, and counts from when it was due.
func TestBacklog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, faults{0: delay(time.Second)}.serve), Rate: 100, Pipeline: 1, Duration: 2 * time.Second, Late: time.Hour})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 200, Returned: 200})
		if r.Echo.P90 < 0.5 || r.Echo.P50 > 0.2 || r.Echo.Max < 0.99 { // half of them waited, up to a second
			t.Errorf("latencies %+v", r.Echo)
		}
	})
}

// TestClosedModel: each connection waits for its echo.
func TestClosedModel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := func(conn net.Conn) {
			defer conn.Close()
			for {
				m := make([]byte, 640)
				n, err := conn.Read(m)
				if err != nil {
					return
				}
				time.Sleep(100 * time.Millisecond)
				_, _ = conn.Write(m[:n])
			}
		}
		r := runs(t, Options{Dial: inMemory(t, server), Conns: 3, Pipeline: 2, Duration: 1050 * time.Millisecond})
		if r.Echoes.Sent != 3*2*11 || r.Echoes.Returned != r.Echoes.Sent {
			t.Errorf("%+v: want 2 under way on each of 3 connections, 11 times", r.Echoes)
		}
	})
}

// TestALateMessageHoldsUpNoOthers: in the closed model a lost message would else end its connection's part.
func TestALateMessageHoldsUpNoOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runs(t, Options{Dial: inMemory(t, faults{0: drop, 1: delay(1500 * time.Millisecond), 2: hangUp}.serve), Duration: 2500 * time.Millisecond, NoReconnect: true})
		if e := r.Echoes; e.Sent < 3 || e.Lost != e.Sent-1 || e.Late != 1 {
			t.Errorf("%+v", e)
		}
	})
}

// TestInterrupted: the run ends early, in order, with its report.
func TestInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(errors.New("enough")) })
		shown := 0
		r, err := Run(ctx, Options{
			Address: "in memory", Dial: inMemory(t, faults{}.serve), Rate: 10, Duration: time.Hour,
			OnProgress: func(Progress) { shown++ },
		})
		if err != nil {
			t.Fatal(err)
		}
		if e := r.Echoes; e.Sent < 10 || e.Sent > 11 || e.Returned != e.Sent { // one is due in the very moment
			t.Errorf("%+v", e)
		}
		if r.Lasted < 0.99 || r.Lasted > 1.02 || shown < 4 {
			t.Errorf("lasted %v s, progress said %d times", r.Lasted, shown)
		}
	})
}

// TestHurried: who does not want to wait any more for what is under way has the report at once.
func TestHurried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent := func(conn net.Conn) {
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}
		hurry := make(chan struct{})
		time.AfterFunc(2*time.Second, func() { close(hurry) })
		began := time.Now()
		r := runs(t, Options{Dial: inMemory(t, silent), Rate: 10, Duration: time.Second, DrainWait: time.Hour, Hurry: hurry})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 10, Lost: 10})
		if took := time.Since(began); took > 2100*time.Millisecond {
			t.Errorf("took %v", took)
		}
	})
}

// TestASilentServer: what never comes is lost when the run's patience is over.
func TestASilentServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent := func(conn net.Conn) {
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}
		began := time.Now()
		r := runs(t, Options{Dial: inMemory(t, silent), Rate: 10, Duration: time.Second, DrainWait: 3 * time.Second})
		expect(t, "echoes", r.Echoes, Echoes{Sent: 10, Lost: 10})
		if took := time.Since(began); took > 4100*time.Millisecond {
			t.Errorf("took %v", took)
		}
	})
}

func TestOptionsThatMakeNoSense(t *testing.T) {
	for _, o := range []Options{
		{},
		{Address: "a"},
		{Address: "a:"},
		{Address: "::1"},
		{Address: "a:1", Size: MinSize - 1},
		{Address: "a:1", Rate: -1},
		{Address: "a:1", Rate: math.NaN()},
		{Address: "a:1", Rate: math.Inf(1)},
		{Address: "a:1", Conns: -1},
		{Address: "a:1", Duration: -1},
	} {
		if _, err := Run(t.Context(), o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

// TestALargeMessageIsWrittenBitByBit: when there is room again the rest goes on, though nothing has come back.
func TestALargeMessageIsWrittenBitByBit(t *testing.T) {
	r, err := Run(t.Context(), Options{Address: overTCP(t, faults{}.serve), Size: 16 << 20, Duration: 50 * time.Millisecond, Late: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	if e := r.Echoes; e.Sent == 0 || e.Returned != e.Sent {
		t.Errorf("%+v", e)
	}
}

// TestWhatIsLateIsBounded: a server that reads and never answers does not make the load generator keep all that it was sent.
func TestWhatIsLateIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent := func(conn net.Conn) {
			_, _ = io.Copy(io.Discard, conn)
			_ = conn.Close()
		}
		for size, most := range map[int]int64{64: maxLate/64 + 100, 10_000: maxLate/10_000 + 100, 100_000: 200} {
			r := runs(t, Options{Dial: inMemory(t, silent), Rate: 20_000, Size: size, Pipeline: 100, Duration: 5 * time.Second, Late: 10 * time.Millisecond})
			if e := r.Echoes; e.Sent > most || e.Sent < most/2 || e.Lost != e.Sent || e.Sent+e.Unsent != 100_000 {
				t.Errorf("of %d bytes: %+v, want up to %d sent", size, e, most)
			}
		}
	})
}
