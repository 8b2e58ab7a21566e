package control

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"echod/server"
)

const (
	term = syscall.SIGTERM
	intr = syscall.SIGINT
	quit = syscall.SIGQUIT
	hup  = syscall.SIGHUP
)

// signalled is a rig with a signal actor and one client that stays until the server closes.
type signalled struct {
	*rig
	began   time.Time
	client  *echoClient
	in      chan os.Signal
	signals *Signals
	stacks  stacksSeen
}

// grace is the server's grace period in the tests of signals.
const grace = 10 * time.Second

func newSignalled(t *testing.T) *signalled {
	t.Helper()
	s := &signalled{began: time.Now(), in: make(chan os.Signal, 16)}
	s.rig = newBubble(t, server.Options{Notifier: server.DefaultLineNotifier(), Drain: server.DrainOptions{Grace: grace}}, func(r *rig) actor {
		s.stacks.rig = r
		s.signals = NewSignals(r.srv, s.in, r.plane.log, &s.stacks)
		return pair(s.signals.Actor())
	})
	s.client = s.echoClient(t)
	return s
}

// stacksSeen receives the stacks, and records the state of the server at that time.
type stacksSeen struct {
	rig     *rig
	text    string
	drain   *server.DrainInfo
	clients int
}

func (s *stacksSeen) Write(p []byte) (int, error) {
	st := s.rig.srv.Status()
	s.text, s.drain, s.clients = s.text+string(p), st.Drain, st.Connections
	return len(p), nil
}

// shutdown is a step that is not a signal: a shutdown through the control socket.
type shutdown struct{ grace time.Duration }

func (shutdown) Signal()          {}
func (s shutdown) String() string { return fmt.Sprintf("shutdown in %s", s.grace) }

// pause is a step that pauses the server.
type pause struct{}

func (pause) Signal()        {}
func (pause) String() string { return "pause" }

// take takes a step and waits for its immediate effects.
func (s *signalled) take(t *testing.T, step os.Signal) {
	t.Helper()
	switch step := step.(type) {
	case shutdown:
		must[Change](t)(s.rig.client.Shutdown(t.Context(), ShutdownRequest{Grace: &step.grace}))
	case pause:
		must[Hold](t)(s.rig.client.Pause(t.Context(), PauseRequest{}))
	default:
		s.in <- step
	}
	synctest.Wait()
}

// TestSignals is the table of the design: what each signal does in each state.
func TestSignals(t *testing.T) {
	for _, row := range []struct {
		given []os.Signal   // earlier steps
		sig   os.Signal     // the signal under test
		begun string        // reason of the drain after it
		left  time.Duration // time left of the drain; each step takes a second
		force bool
	}{
		// While running or paused, each signal begins the drain.
		{nil, term, "SIGTERM", grace, false},
		{nil, intr, "SIGINT", grace, false},
		{nil, quit, "SIGQUIT", grace, false},
		{nil, hup, "SIGHUP", grace, false},
		{[]os.Signal{pause{}}, term, "SIGTERM", grace, false},
		{[]os.Signal{pause{}}, intr, "SIGINT", grace, false},
		{[]os.Signal{pause{}}, quit, "SIGQUIT", grace, false},
		{[]os.Signal{pause{}}, hup, "SIGHUP", grace, false},
		{[]os.Signal{pause{}, hup}, term, "SIGHUP", grace - 1*time.Second, false},

		// In a drain begun by HUP, the first other signal changes nothing and the second forces.
		{[]os.Signal{hup}, term, "SIGHUP", grace - 1*time.Second, false},
		{[]os.Signal{hup}, intr, "SIGHUP", grace - 1*time.Second, false},
		{[]os.Signal{hup}, quit, "SIGHUP", grace - 1*time.Second, false},
		{[]os.Signal{hup}, hup, "SIGHUP", grace - 1*time.Second, false},
		{[]os.Signal{hup, term}, term, "SIGHUP", 0, true},
		{[]os.Signal{hup, intr}, quit, "SIGHUP", 0, true},

		// The same holds for a drain begun through the control socket, with a longer or shorter grace period.
		{[]os.Signal{shutdown{time.Minute}}, term, "control", 59 * time.Second, false},
		{[]os.Signal{shutdown{time.Minute}}, intr, "control", 59 * time.Second, false},
		{[]os.Signal{shutdown{time.Minute}}, quit, "control", 59 * time.Second, false},
		{[]os.Signal{shutdown{time.Minute}}, hup, "control", 59 * time.Second, false},
		{[]os.Signal{shutdown{4 * time.Second}}, term, "control", 3 * time.Second, false},
		{[]os.Signal{shutdown{time.Minute}, term}, term, "control", 0, true},
		{[]os.Signal{shutdown{time.Minute}, hup}, term, "control", 58 * time.Second, false},
		{[]os.Signal{pause{}, shutdown{time.Minute}}, term, "control", 59 * time.Second, false},

		// In a drain begun by a signal, the second signal forces.
		{[]os.Signal{term}, term, "SIGTERM", 0, true},
		{[]os.Signal{term}, intr, "SIGTERM", 0, true},
		{[]os.Signal{term}, quit, "SIGTERM", 0, true},
		{[]os.Signal{intr}, intr, "SIGINT", 0, true},
		{[]os.Signal{intr}, term, "SIGINT", 0, true},
		{[]os.Signal{quit}, term, "SIGQUIT", 0, true},
		{[]os.Signal{quit}, quit, "SIGQUIT", 0, true},
		{[]os.Signal{pause{}, term}, term, "SIGTERM", 0, true},
		{[]os.Signal{term, shutdown{time.Minute}}, term, "SIGTERM", 0, true},

		// HUP never counts: TERM and HUP come in pairs, in either order.
		{[]os.Signal{term}, hup, "SIGTERM", grace - 1*time.Second, false},
		{[]os.Signal{term, hup}, hup, "SIGTERM", grace - 2*time.Second, false},
		{[]os.Signal{hup, hup}, term, "SIGHUP", grace - 2*time.Second, false},
		{[]os.Signal{hup, term}, hup, "SIGHUP", grace - 2*time.Second, false},
		{[]os.Signal{term, hup}, term, "SIGTERM", 0, true},
		{[]os.Signal{hup, hup, hup, term}, intr, "SIGHUP", 0, true},
	} {
		t.Run(fmt.Sprint(append(row.given, row.sig)), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSignalled(t)
				for _, step := range row.given {
					s.take(t, step)
					time.Sleep(time.Second)
				}
				s.logs.TakeAll()
				now := time.Now()
				s.take(t, row.sig)

				drain := s.srv.Status().Drain
				wantEqual(t, "reason of the drain", drain.Reason, row.begun)
				wantEqual(t, "time left", drain.Deadline.Sub(now), row.left)
				begins := drain.Since.Equal(now)
				switch {
				case row.force:
					wantEqual(t, "signal that forced the end", s.signals.Forced(), row.sig)
					wantLine(t, s, "second signal received; closing everything now")
					<-s.ended
					if took := time.Since(now); took > time.Second {
						t.Errorf("closing by force took %s", took)
					}
				case begins:
					wantLine(t, s, "signal received")
				default:
					wantLine(t, s, "signal received")
					wantLine(t, s, "drain already in progress; its deadline is unchanged")
				}
				wantEqual(t, "stacks written", s.stacks.text != "", row.force && row.sig == quit)
				if !row.force {
					wantEqual(t, "clients left", s.srv.Status().Connections, 1)
					<-s.ended
					wantEqual(t, "signal that forced the end", s.signals.Forced(), nil)
					if late := time.Since(now) - row.left; late < 0 || late > 2*time.Second {
						t.Errorf("the end came %s after the deadline", late)
					}
				}
				wantEqual(t, "what the run group returns", s.err, nil)
			})
		})
	}
}

// wantLine checks that the log has one line with this message, and that it names the signal.
func wantLine(t *testing.T, s *signalled, message string) {
	t.Helper()
	lines := s.logs.FilterMessage(message).All()
	if len(lines) != 1 {
		t.Errorf("%q is %d times in the log: want once", message, len(lines))
		return
	}
	if name, ok := lines[0].ContextMap()["signal"].(string); !ok || !strings.HasPrefix(name, "SIG") {
		t.Errorf("%q does not name the signal: %v", message, lines[0].ContextMap())
	}
}

func TestSignalsStacks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSignalled(t)
		s.take(t, term)
		s.take(t, quit)
		for _, name := range []string{"(*Signals).handle", "(*Conn).serve", "(*Server).runDrain"} {
			if !strings.Contains(s.stacks.text, name) {
				t.Errorf("the stacks lack %s", name)
			}
		}
		wantEqual(t, "clients while they were written", s.stacks.clients, 1)
		wantEqual(t, "deadline while they were written", s.stacks.drain.Deadline.Sub(s.began), grace)
	})
}

func TestSignalsAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
		if err != nil {
			t.Fatal(err)
		}
		in := make(chan os.Signal, 1)
		s := NewSignals(srv, in, zap.NewNop(), nil)
		srv.StartDrain(server.DrainOptions{Reason: "done"})
		<-srv.Done()
		s.handle(term, 2)
		wantEqual(t, "signal that forced the end", s.Forced(), nil)
	})
}

func TestSignalNames(t *testing.T) {
	for sig, want := range map[os.Signal]string{
		intr: "SIGINT", term: "SIGTERM", quit: "SIGQUIT", hup: "SIGHUP", syscall.SIGKILL: "killed",
	} {
		wantEqual(t, "name", SignalName(sig), want)
	}
}
