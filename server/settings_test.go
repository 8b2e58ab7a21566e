package server

import (
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// set changes settings by name, from pairs such as max-conns=5.
func set(t *testing.T, s *Server, pairs ...string) []SettingChange {
	t.Helper()
	changes, err := s.Configure(Caller{UID: 7, PID: 8}, setAll(pairs...))
	if err != nil {
		t.Fatalf("Configure: %v", err)
	}
	return changes
}

func setAll(pairs ...string) func(*Settings) error {
	return func(s *Settings) error {
		for _, pair := range pairs {
			name, value, _ := strings.Cut(pair, "=")
			if err := s.Set(name, value); err != nil {
				return err
			}
		}
		return nil
	}
}

func TestConfigure(t *testing.T) {
	t.Run("a higher limit admits clients that wait", inBubble(Echo, Options{Limits: Limits{MaxConns: 1}}, func(t *testing.T, r *rig) {
		r.dial(t)
		waiting := r.dial(t)
		waiting.send(t, "x\n")
		waiting.has(t, "")
		set(t, r.Server, "max-conns=2")
		waiting.has(t, "x\n")
		r.dial(t)
		wantEqual(t, "accept queue", r.ln.queued(), 1)
	}))

	t.Run("a lower limit closes no connection, and applies to new clients", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		a, b := r.dial(t), r.dial(t)
		set(t, r.Server, "max-conns=1")
		a.echoes(t, "a\n")
		b.echoes(t, "b\n")
		late := r.dial(t)
		late.send(t, "c\n")
		wantEqual(t, "accept queue", r.ln.queued(), 1)
		a.leave(t)
		late.has(t, "")
		b.leave(t)
		late.has(t, "c\n")
	}))

	t.Run("at-limit=reject tells those that wait BUSY", inBubble(Echo, Options{Limits: Limits{MaxConns: 1}}, func(t *testing.T, r *rig) {
		r.dial(t)
		waiting := r.dial(t)
		set(t, r.Server, "at-limit=reject")
		waiting.ends(t, "BUSY\n")
	}))

	t.Run("a limit per address counts connections from before", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		first, _ := r.dialFrom(t, "192.0.2.1"), r.dialFrom(t, "192.0.2.1")
		set(t, r.Server, "max-conns-per-ip=2")
		r.dialFrom(t, "192.0.2.1").ends(t, "BUSY\n")
		first.leave(t)
		r.dialFrom(t, "192.0.2.1").echoes(t, "x\n")
		set(t, r.Server, "max-conns-per-ip=0")
		r.dialFrom(t, "192.0.2.1").echoes(t, "x\n")
		r.KillFunc(func(ConnInfo) bool { return true })
		pass(lingerTimeout)
		r.state.With(func(st *state) { wantEqual(t, "addresses kept when all have left", len(st.perClient), 0) })
	}))

	t.Run("timeouts take effect at once, also the first ones", inBubble(Echo, Options{Timeouts: Timeouts{Stall: Off}}, func(t *testing.T, r *rig) {
		r.dial(t)
		pass(time.Hour)
		wantState(t, r.Server, StateRunning, 1)
		set(t, r.Server, "idle-timeout=2m")
		pass(maxSweep + lingerTimeout)
		wantState(t, r.Server, StateRunning, 0)
		r.dial(t)
		set(t, r.Server, "idle-timeout=0s")
		pass(time.Hour)
		wantState(t, r.Server, StateRunning, 1)
	}))

	t.Run("a drain uses the new grace period, and one in progress does not change", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		set(t, r.Server, "grace=1m")
		r.drain(0, "x")
		c.has(t, "SHUTDOWN 60 x\n")
		set(t, r.Server, "grace=1s")
		pass(30 * time.Second)
		c.echoes(t, "still\n")
	}))

	t.Run("one invalid setting changes none", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		before := r.Settings()
		for text, change := range map[string]func(*Settings) error{
			`unknown setting: x`:             setAll("max-conns=5", "x=1"),
			`"many": want a number`:          setAll("grace=9s", "max-conns=many"),
			`"-1": want a number`:            setAll("grace=9s", "max-conns=-1"),
			`want a duration such as 1.5s`:   setAll("max-conns=5", "grace=9"),
			`"x": want a rate`:               setAll("max-conns=5", "max-conn-rate=x"),
			`"x": want an address`:           setAll("max-conns=5", "allow=10.0.0.0/8,x"),
			`at most`:                        setAll("grace=9s", "max-conns=1000000000"),
			`without Options.LogLevel`:       setAll("max-conns=5", "log-level=debug"),
			`option Timeouts.Idle`:           func(s *Settings) error { s.Limits.MaxConns, s.Timeouts.Idle = 5, -5; return nil },
			`it cannot change while`:         func(s *Settings) error { s.Limits.MaxConns, s.Limits.ReservedFiles = 5, 5; return nil },
			`of the caller`:                  func(s *Settings) error { s.Limits.MaxConns = 5; return errors.New("of the caller") },
			`unknown mode "later": want`:     setAll("max-conns=5", "at-limit=later"),
			`"loud": want debug, info, warn`: setAll("log-level=loud"),
		} {
			changes, err := r.Configure(Caller{}, change)
			wantErrText(t, text, err, text)
			wantEqual(t, "changes", len(changes), 0)
			if diff := diffSettings(before, r.Settings()); diff != nil {
				t.Errorf("%s: changed %v", text, diff)
			}
		}
	}))

	t.Run("changes are logged, published and shown with their caller", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		sub := r.Subscribe()
		defer sub.Close()
		want := []SettingChange{{"max-conns-per-ip", "0", "5"}, {"grace", "5s", "1m0s"}}
		wantEqual(t, "changes", set(t, r.Server, "grace=1m", "max-conns-per-ip=5", "idle-timeout=0s"), want)
		wantEqual(t, "changes in the status", r.Status().Settings, want)
		for e := range sub.Events(t.Context()) {
			wantEqual(t, "event", e.Type, EventSettings)
			wantEqual(t, "changes in the event", e.Settings, want)
			wantEqual(t, "caller", e.By, Caller{UID: 7, PID: 8})
			break
		}
		logged := r.messages("setting changed")
		wantEqual(t, "log lines", len(logged), 2)
		fields := logged[1].ContextMap()
		wantEqual(t, "log", fields, map[string]any{
			"setting": "grace", "old": "5s", "new": "1m0s", "uid": int64(7), "pid": int64(8),
		})
		set(t, r.Server, "grace=5s", "max-conns-per-ip=0")
		wantEqual(t, "changes once undone", len(r.Status().Settings), 0)
	}))

	t.Run("the log's level changes", bubbled(func(t *testing.T) {
		level := zap.NewAtomicLevelAt(zapcore.InfoLevel)
		r := newRig(t, Echo, Options{LogLevel: &level})
		set(t, r.Server, "log-level=debug")
		wantEqual(t, "level", level.Level(), zapcore.DebugLevel)
	}))

	t.Run("settings in force can be set again, whatever they are", bubbled(func(t *testing.T) {
		for _, o := range []Options{
			{},
			{Limits: Limits{MaxConns: Off, MaxConnsPerIP: Off}, Timeouts: Timeouts{Idle: Off, Stall: Off}, Drain: DrainOptions{Grace: Off, Delay: Off}},
			{Limits: Limits{MaxConns: 3, MaxConnRate: Rate{5, time.Minute}}, Drain: DrainOptions{Grace: time.Minute, Delay: time.Second}},
		} {
			s, _ := newServer(t, Echo, o)
			same := func(now *Settings) error { *now = s.Settings(); return nil }
			if changes, err := s.Configure(Caller{}, same); err != nil || len(changes) > 0 {
				t.Errorf("%+v: setting the same gives %v, %v", o, changes, err)
			}
		}
	}))

	t.Run("a zero Server refuses", func(t *testing.T) {
		_, err := new(Server).Configure(Caller{}, setAll())
		wantErr(t, "Configure", err, errNotNew)
	})
}

// TestG8ConfigureAtAnyTime: the counts per client always agree with the table, whenever settings change.
func TestG8ConfigureAtAnyTime(t *testing.T) {
	inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		random := rand.New(rand.NewPCG(1, 2))
		var clients []*client
		var configuring sync.WaitGroup
		for range 200 {
			switch {
			case random.IntN(3) > 0:
				clients = append(clients, r.dialFrom(t, []string{"192.0.2.1", "192.0.2.2", "2001:db8::1"}[random.IntN(3)]))
			case len(clients) > 0:
				i := random.IntN(len(clients))
				_ = clients[i].Close()
				clients = append(clients[:i], clients[i+1:]...)
			}
			value := []string{"0", "1", "9"}[random.IntN(3)]
			configuring.Go(func() { _, _ = r.Configure(Caller{}, setAll("max-conns-per-ip="+value)) })
		}
		configuring.Wait()
		set(t, r.Server, "max-conns-per-ip=500")
		pass(time.Second)
		r.state.With(func(st *state) {
			counted := 0
			for _, n := range st.perClient {
				counted += n
			}
			wantEqual(t, "connections counted per address", counted, st.admitted)
		})
		for _, c := range clients {
			_ = c.Close()
		}
		pass(time.Second)
		r.state.With(func(st *state) { wantEqual(t, "addresses kept", len(st.perClient), 0) })
	})(t)
}
