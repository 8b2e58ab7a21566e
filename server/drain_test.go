package server

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestG4ClientsInTheAcceptQueueAreToldAndServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 1}})
		served := r.dial(t)
		queue := []*client{r.dial(t), r.dial(t), r.dial(t)} // the limit keeps them there
		r.StartDrain(DrainOptions{Grace: 5 * time.Second, Reason: "TERM"})
		pass(acceptorsStop)
		for _, c := range append(queue, served) {
			c.has(t, "SHUTDOWN 5 TERM\n")
			c.send(t, "last words\n")
			c.has(t, "last words\n")
			c.leave(t)
		}
		<-r.Done()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonClientLeft: 4})
		rep := reportOf(r.Report())
		if rep.Notified != 4 || rep.NoticeFailed != 0 || rep.Left != 4 {
			t.Errorf("report %+v, want 4 notified, 0 failed, 4 left by themselves", rep)
		}
	})
}

func TestG4ClientsOfAPausedServerAreToldAndServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.ln.slip(1)
		h := r.pause(t, PauseOptions{})
		slipped, queued := r.dial(t), r.dial(t)
		wantPhases(t, r.Server, PhaseWaiting)
		r.StartDrain(DrainOptions{Grace: 5 * time.Second, Reason: "TERM"})
		pass(acceptorsStop)
		for _, c := range []*client{slipped, queued} {
			c.has(t, "SHUTDOWN 5 TERM\n")
			c.send(t, "x\n")
			c.has(t, "x\n")
			c.leave(t)
		}
		<-r.Done()
		if _, ok := errors.AsType[*DrainingError](h.Cause()); !ok {
			t.Errorf("cause of the hold's end is %v, want a *DrainingError", h.Cause())
		}
	})
}

func TestG4OneThatDoesNotReadDelaysNobodysNotice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Timeouts: Timeouts{Stall: -1}})
		deaf := r.dial(t)
		deaf.SetWindow(0)
		deaf.send(t, "x") // its handler is stuck in a write
		others := []*client{r.dial(t), r.dial(t)}
		r.StartDrain(DrainOptions{Grace: 5 * time.Second, Reason: "TERM"})
		pass(acceptorsStop)
		for _, c := range others {
			c.has(t, "SHUTDOWN 5 TERM\n")
			c.leave(t)
		}
		deaf.SetWindow(100)
		deaf.has(t, "x\nSHUTDOWN 5 TERM\n")
	})
}

func TestNoNoticeFailsWhereThereIsNothingToSay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(context.Context, *Conn) error { return nil })
		r := newRig(t, h, Options{Notifier: NotifierFunc(func(Notice) []byte { return nil })})
		c := r.dial(t)
		synctest.Wait() // it lingers: no notice can be sent any more
		rep, _ := shutdownIn(t, r.Server, time.Second, "x")
		if rep.Notified != 0 || rep.NoticeFailed != 0 || rep.Left != 1 {
			t.Errorf("report %+v, want one client that left and no notice", rep)
		}
		c.ends(t, "")
	})
}

func TestServerStopsAtOnceWhenTheLastClientHasLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Hour, Reason: "TERM"})
		pass(time.Minute)
		c.leave(t)
		select {
		case <-r.Done():
		default:
			t.Error("server has not stopped although the last client has left")
		}
		wantErr(t, "Serve", <-r.served, ErrServerClosed)
		wantState(t, r.Server, StateStopped, 0)
		if took := reportOf(r.Report()).Took; took != time.Minute {
			t.Errorf("drain took %v, want 1m", took)
		}
	})
}

func TestGraceIsTheDrainsOrElseTheOption(t *testing.T) {
	for name, tt := range map[string]struct {
		option, grace, want time.Duration
		notice              string
	}{
		"its own":            {option: time.Minute, grace: 1500 * time.Millisecond, want: 1500 * time.Millisecond, notice: "SHUTDOWN 2 x\n"},
		"the option's":       {option: time.Minute, want: time.Minute, notice: "SHUTDOWN 60 x\n"},
		"the default":        {want: DefaultGrace, notice: "SHUTDOWN 5 x\n"},
		"none":               {grace: -1, notice: "SHUTDOWN 0 x\n"},
		"none by the option": {option: -1, notice: "SHUTDOWN 0 x\n"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Echo, Options{Drain: DrainOptions{Grace: tt.option}})
				c := r.dial(t)
				began := time.Now()
				r.StartDrain(DrainOptions{Grace: tt.grace, Reason: "x"})
				wantEqual(t, "deadline", r.Status().Drain.Deadline.Sub(began), tt.want)
				c.ends(t, tt.notice)
				<-r.Done()
				wantEqual(t, "duration", time.Since(began), max(tt.want, quietTime))
				wantClosed(t, r.Server, map[Reason]uint64{ReasonDeadline: 1})
			})
		})
	}
}

func TestShutdownTakesTheDeadlineOfItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		leaver := r.dial(t)
		r.dial(t) // who stays
		go func() {
			_, _ = leaver.Read(make([]byte, 1<<10))
			_ = leaver.CloseWrite()
		}()
		rep, took := shutdownIn(t, r.Server, 3*time.Second, "upgrade")
		if want := 3*time.Second + lingerTimeout; took != want {
			t.Errorf("Shutdown took %v, want %v: the grace, and the linger for one who does not leave", took, want)
		}
		wantEqual(t, "report", rep, Report{
			DrainInfo: DrainInfo{
				Since: rep.Since, Ended: rep.Since.Add(took), AcceptUntil: rep.Since, Deadline: rep.Since.Add(3 * time.Second),
				Reason: "upgrade", Notified: 2,
			},
			Took: took, Left: 1, AtDeadline: 1,
		})
	})
}

func TestShutdownWhoseContextIsCancelledForces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.dial(t)
		enough := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(enough) })
		began := time.Now()
		err := r.Shutdown(ctx)
		wantErr(t, "Shutdown", err, context.Canceled)
		rep := reportOf(r.Report())
		wantEqual(t, "duration", time.Since(began), time.Second)
		if rep.Forced != 1 {
			t.Errorf("report %+v, want one forced", rep)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonForced: 1})
	})
}

func TestSecondShutdownShortensAndNeverProlongs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		began := time.Now()
		if !r.StartDrain(DrainOptions{Grace: time.Minute, Reason: "first"}) {
			t.Error("Drain says that it changed nothing")
		}
		pass(time.Second)
		if r.StartDrain(DrainOptions{Grace: time.Hour, Reason: "longer"}) {
			t.Error("Drain says that a longer grace changed something")
		}
		if !r.StartDrain(DrainOptions{Grace: 10 * time.Second, Reason: "shorter"}) {
			t.Error("Drain says that a shorter grace changed nothing")
		}
		first := r.Status().Drain
		wantEqual(t, "deadline", first.Deadline.Sub(began), 11*time.Second)
		wantEqual(t, "reason", first.Reason, "first")
		rep, took := shutdownIn(t, r.Server, time.Second, "third")
		wantEqual(t, "duration", took, time.Second+lingerTimeout)
		wantEqual(t, "reason", rep.Reason, "first")
		c.has(t, "SHUTDOWN 60 first\n") // told once, of what stood when the notices went out
	})
}

func TestShutdownAfterTheEndReportsTheSame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		r.dial(t)
		first, _ := shutdownIn(t, r.Server, time.Second, "a")
		second, took := shutdownIn(t, r.Server, time.Hour, "b")
		wantEqual(t, "second report", second, first)
		wantEqual(t, "duration of the second", took, time.Duration(0))
		if r.StartDrain(DrainOptions{Grace: Off, Reason: "c"}) {
			t.Error("Drain says that it changed something after the end")
		}
		if r.Force("d") {
			t.Error("Force says that it changed something after the end")
		}
		if err := r.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

func TestCloseDuringADrainClosesEverythingNow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Hour, Reason: "TERM"})
		pass(time.Second)
		if took := elapsed(func() { _ = r.Close() }); took != 0 {
			t.Errorf("Close took %v, want no time", took)
		}
		wantClosed(t, r.Server, map[Reason]uint64{ReasonForced: 1})
		c.has(t, "SHUTDOWN 3600 TERM\n")
	})
}

func TestForceDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, stubborn(t), Options{})
		r.dial(t)
		if took := elapsed(func() { wantEqual(t, "Force changed something", r.Force("now"), true) }); took != 0 {
			t.Errorf("Force took %v, want no time", took)
		}
		wantEqual(t, "Force changed something again", r.Force("again"), false)
		wantEqual(t, "reason", r.Status().Drain.Reason, "now")
		wantState(t, r.Server, StateDraining, 1)
		<-r.Done()
	})
}

func TestCloseTellsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		_ = r.Close()
		c.ends(t, "")
		if rep := reportOf(r.Report()); rep.Notified+rep.NoticeFailed != 0 {
			t.Errorf("report %+v, want no notice", rep)
		}
	})
}

func TestDrainReasonStaysOneLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{})
		c := r.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Second, Reason: "two\nlines"})
		c.ends(t, "SHUTDOWN 1 \"two\\nlines\"\n")
	})
}

func TestHandlerHearsOfTheDrainOnceItsClientIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(_ context.Context, c *Conn) error {
			<-c.Draining()
			_, err := c.Write([]byte("bye\n"))
			return err
		})
		r := newRig(t, h, Options{})
		clients := make([]*client, 300) // enough for a handler to be quicker than the notice, if it could
		for i := range clients {
			clients[i] = r.dial(t)
		}
		r.StartDrain(DrainOptions{Grace: time.Minute, Reason: "TERM"})
		for _, c := range clients {
			c.ends(t, "SHUTDOWN 60 TERM\nbye\n")
		}
		<-r.Done()
		wantClosed(t, r.Server, map[Reason]uint64{ReasonHandlerDone: uint64(len(clients))})
	})
}
