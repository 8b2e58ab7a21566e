//go:build unix

package integration

import (
	"errors"
	"fmt"
	"sync"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

const toldWithin = 500 * time.Millisecond

// goneBy is when the process must be gone, after a signal that gives a grace. To the promise comes what this process
// needs, whose hundreds of clients wake up at that very moment, to see the end: to be scheduled, to read the rest of the
// log, and to reap the child, while other packages' tests want the processors too.
func goneBy(grace time.Duration) time.Duration {
	const ownScheduling = 250 * time.Millisecond
	return grace + 2*time.Second + ownScheduling
}

var stopping = []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP}

// TestG4EveryoneIsToldAtOnce and G6: 300 clients are told at once, are served on, leave, and with
// the last the server goes, long before the deadline.
func TestG4EveryoneIsToldAtOnce(t *testing.T) {
	for _, sig := range stopping {
		t.Run(control.SignalName(sig), func(t *testing.T) {
			e := start(t, "--grace", "60s")
			peers := e.crowd(300)
			begun := e.signal(sig)
			e.expectTold(peers, begun, "SHUTDOWN 60 "+control.SignalName(sig)+"\n")
			e.awaitLog("signal received", "signal", control.SignalName(sig))
			each(t, len(peers), func(i int) error {
				for n := range 3 {
					if err := peers[i].echo(fmt.Sprintf("%d served on during the grace\n", n)); err != nil {
						return err
					}
				}
				return nil
			})
			e.expectState("draining")
			stays, leave := peers[0], peers[1:]
			each(t, len(leave), func(i int) error { return leave[i].leave() })
			check(t, stays.echo("still here\n"))
			left := time.Now()
			check(t, stays.leave())
			e.wait(0)
			// A server that waited for anything but the last client would wait for the end of its grace.
			if took := e.gone.Sub(left); took > 2*time.Second {
				t.Errorf("it took %s to stop after the last client had left", took)
			}
			if sum := e.awaitLog("drained"); sum.num("left_by_themselves") != 300 || sum.num("notices_failed") != 0 {
				t.Errorf("the summary is %s", sum.text)
			}
		})
	}
}

// expectTold checks that each of the peers reads the notice in time after begun.
func (e *echod) expectTold(peers []*peer, begun time.Time, notice string) {
	e.t.Helper()
	told := make([]time.Time, len(peers))
	each(e.t, len(peers), func(i int) error {
		err := peers[i].expect(notice)
		told[i] = time.Now()
		return err
	})
	last := begun
	for _, at := range told {
		if at.After(last) {
			last = at
		}
	}
	if took := last.Sub(begun); took > toldWithin {
		e.t.Errorf("the last of %d clients was told after %s, want %s", len(peers), took, toldWithin)
	} else {
		e.t.Logf("the last of %d clients was told after %s", len(peers), took)
	}
}

// TestG6FloodersChangeNothing: beside 20 clients that flood and never read, 300 others are told as quickly, served on,
// have the whole grace and then a clean end; and nothing keeps the process longer than two seconds after the deadline.
func TestG6FloodersChangeNothing(t *testing.T) {
	for _, sig := range stopping {
		t.Run(control.SignalName(sig), func(t *testing.T) {
			const grace = 1500 * time.Millisecond
			e := start(t, "--grace", grace.String())
			peers := e.crowd(300)
			var flooders sync.WaitGroup
			defer flooders.Wait()
			for range 20 {
				p := e.dial()
				flooders.Go(p.flood)
			}
			e.awaitOpen(320)
			e.awaitStalled(20)

			begun := e.signal(sig)
			e.expectTold(peers, begun, "SHUTDOWN 2 "+control.SignalName(sig)+"\n")
			each(t, len(peers), func(i int) error { return peers[i].echo("served on during the grace\n") })
			early := make([]time.Duration, len(peers))
			each(t, len(peers), func(i int) error {
				err := peers[i].expectRest("") // a FIN: a reset would be an error
				early[i] = grace - time.Since(begun)
				_ = peers[i].Close()
				return err
			})
			for i, d := range early {
				if d > 0 {
					t.Fatalf("client %d was closed %s before the deadline", i, d)
				}
			}
			e.wait(0)
			took := e.gone.Sub(begun)
			if took > goneBy(grace) {
				t.Errorf("the process was gone after %s, want at most %s", took, goneBy(grace))
			}
			t.Logf("the process was gone after %s", took)
			if sum := e.awaitLog("drained"); sum.num("closed_at_deadline")+sum.num("forced") != 320 {
				t.Errorf("the summary is %s", sum.text)
			}
		})
	}
}

// awaitStalled waits until so many connections cannot be written to any more. Nothing announces that: what shows it is
// that no byte moves from one look at them to the next.
func (e *echod) awaitStalled(n int) {
	e.t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); e.pass(50 * time.Millisecond) {
		conns, err := e.control.Conns(within(e.t, patience), -1, 50*time.Millisecond)
		check(e.t, err)
		stalled := 0
		for _, c := range conns.Connections {
			if c.BytesOut > 64<<10 {
				stalled++
			}
		}
		if stalled >= n {
			return
		}
	}
	e.t.Fatal("the flooders are still being written to")
}

// pass lets time pass on the server's clock, for what is about a span of time: a wait for what never comes runs out.
func (e *echod) pass(d time.Duration) {
	e.t.Helper()
	_, err := e.control.Wait(within(e.t, patience), control.WaitRequest{Connections: new(1 << 30), Timeout: &d})
	if problem, ok := errors.AsType[*control.Problem](err); !ok || problem.Type != control.ProblemTimeout {
		e.t.Fatalf("waiting for what never comes: %v", err)
	}
}

// TestIgnoredHangupStaysIgnored: under nohup a hangup means nothing.
func TestIgnoredHangupStaysIgnored(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		wrapper func(t *testing.T) []string
	}{
		{"nohup", func(t *testing.T) []string { return []string{require(t, "nohup")} }},
		{"trap in a shell", func(t *testing.T) []string {
			return []string{require(t, "sh"), "-c", `trap "" HUP; exec "$0" "$@"`}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := startAs(t, tt.wrapper(t), "--grace", "20s")
			p := e.served()
			e.signal(syscall.SIGHUP)
			e.signal(syscall.SIGTERM) // signals come in any order, but the hangup never does
			check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
			check(t, p.leave())
			e.wait(0)
			if seen := e.log.find("signal received", "signal", "SIGHUP"); len(seen) > 0 {
				t.Errorf("it was seen: %s", seen[0].text)
			}
		})
	}
}

// TestG6PairsOfSignalsForceNothing: supervisors and terminals send pairs. TERM and HUP together drain, and force nothing, whichever comes first.
func TestG6PairsOfSignalsForceNothing(t *testing.T) {
	t.Parallel()
	for _, pair := range [][2]syscall.Signal{{syscall.SIGTERM, syscall.SIGHUP}, {syscall.SIGHUP, syscall.SIGTERM}} {
		t.Run(control.SignalName(pair[0])+" first", func(t *testing.T) {
			e := start(t, "--grace", "20s")
			p := e.served()
			e.signal(pair[0])
			e.awaitLog("signal received", "signal", control.SignalName(pair[0]))
			e.signal(pair[1])
			e.awaitLog("drain already in progress; its deadline is unchanged", "signal", control.SignalName(pair[1]))
			check(t, p.expect("SHUTDOWN 20 "+control.SignalName(pair[0])+"\n"))
			check(t, p.echo("served on\n"))
			check(t, p.leave())
			e.wait(0)
		})
	}
}
