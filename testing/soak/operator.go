package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"echod/control"
)

// operate performs operators' actions and faults, one after another. From time to time it makes all clients leave, so
// that the watcher can compare figures.
func (p *phase) operate(ctx context.Context, d time.Duration) {
	restEvery := min(max(d/8, 12*time.Second), 2*time.Minute)
	nextRest := time.Now().Add(restEvery)
	type action struct {
		weight int
		kind   string
		do     func(context.Context) error
	}
	deeds := []action{
		{3, "pause", p.pauseHold},
		{2, "pause-reject", p.pauseReject},
		{2, "pause-crash", p.pauseCrash},
		{3, "kill", p.killOne},
		{1, "kill-idle", p.killIdle},
		{2, "notify", p.notifyAll},
		{4, "upgrade", p.upgrade},
		{2, "restart", p.restart},
		{1, "restart-control", p.restartByControl},
		{1, "force", p.force},
		{1, "sigkill", p.crash},
		{2, "sigstop", p.freeze},
		{1, "files", p.exhaust},
	}
	var queue []action // actions left of a shuffled round, so that short runs have all kinds
	for ctx.Err() == nil {
		pause(ctx, time.Duration(200+p.rng.IntN(1200))*time.Millisecond)
		if time.Now().After(nextRest) {
			p.disconnectClients()
			p.watch.checkIdle(ctx)
			p.admitClients()
			nextRest = time.Now().Add(restEvery)
		}
		if ctx.Err() != nil {
			return
		}
		if len(queue) == 0 {
			for _, x := range deeds {
				queue = append(queue, slices.Repeat([]action{x}, p.settings.weight(x.kind, x.weight))...)
			}
			p.rng.Shuffle(len(queue), func(i, k int) { queue[i], queue[k] = queue[k], queue[i] })
		}
		if len(queue) == 0 {
			continue // -mix leaves no fault
		}
		x := queue[0]
		queue = queue[1:]
		p.countFault(x.kind)
		if err := x.do(ctx); err != nil && ctx.Err() == nil {
			p.violate("%s: %v", x.kind, err)
		}
	}
}

func (p *phase) within() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), busyTimeout)
}

// serving lists the connections that are being served.
func (p *phase) serving(ctx context.Context) (ids map[uint64]bool, err error) {
	list, err := p.control.Conns(ctx, -1, control.ConnFilter{})
	ids = make(map[uint64]bool)
	for _, c := range list.Connections {
		if c.State == "serving" {
			ids[c.ID] = true
		}
	}
	return ids, err
}

func (p *phase) pauseHold(context.Context) error {
	ctx, cancel := p.within()
	defer cancel()
	hold, err := p.control.Pause(ctx, control.PauseRequest{Reason: "soak"})
	if err != nil {
		return err
	}
	before, err := p.serving(ctx)
	if err != nil {
		return err
	}
	time.Sleep(time.Duration(100+p.rng.IntN(1500)) * time.Millisecond)
	after, err := p.serving(ctx)
	if err != nil {
		return err
	}
	for id := range after {
		if !before[id] {
			p.violate("connection %d was admitted during a pause", id)
		}
	}
	_, err = p.control.ReleaseHold(ctx, hold.ID)
	return err
}

func (p *phase) pauseReject(context.Context) error {
	ctx, cancel := p.within()
	defer cancel()
	hold, err := p.control.Pause(ctx, control.PauseRequest{Reason: "soak", Mode: "reject"})
	if err != nil {
		return err
	}
	time.Sleep(time.Duration(100+p.rng.IntN(500)) * time.Millisecond)
	_, err = p.control.ReleaseHold(ctx, hold.ID)
	return err
}

// pauseCrash pauses the server while a caller is connected, and closes that connection without a release.
func (p *phase) pauseCrash(context.Context) error {
	nc, err := net.DialTimeout("unix", p.socket, busyTimeout)
	if err != nil {
		return err
	}
	defer nc.Close()
	_ = nc.SetDeadline(time.Now().Add(busyTimeout))
	if _, err := nc.Write([]byte("POST /v1/pause?while=connected HTTP/1.1\r\nHost: echod\r\nContent-Length: 0\r\n\r\n")); err != nil {
		return err
	}
	if _, err := nc.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	time.Sleep(time.Duration(p.rng.IntN(500)) * time.Millisecond)
	_ = nc.Close()
	return p.awaitState("running")
}

func (p *phase) awaitState(want string) error {
	ctx, cancel := p.within()
	defer cancel()
	_, err := p.control.Wait(ctx, control.WaitRequest{State: want})
	return err
}

func (p *phase) killOne(context.Context) error {
	ctx, cancel := p.within()
	defer cancel()
	list, err := p.control.Conns(ctx, 200, control.ConnFilter{})
	if err != nil || len(list.Connections) == 0 {
		return err
	}
	change, err := p.control.Kill(ctx, list.Connections[p.rng.IntN(len(list.Connections))].ID)
	if err != nil {
		return nil // it has left meanwhile
	}
	p.expectKilled(*change.Killed)
	return nil
}

func (p *phase) killIdle(context.Context) error {
	ctx, cancel := p.within()
	defer cancel()
	change, err := p.control.KillMatching(ctx, control.ConnFilter{MinIdle: 2 * time.Second})
	if err == nil && change.Killed != nil {
		p.expectKilled(*change.Killed)
	}
	return err
}

func (p *phase) notifyAll(context.Context) error {
	ctx, cancel := p.within()
	defer cancel()
	_, err := p.control.Notify(ctx, "soak")
	return err
}

// upgrade requires that another process serves afterwards, and that no client notices, except those over TLS.
func (p *phase) upgrade(ctx context.Context) error {
	before, err := p.status(ctx)
	if err != nil {
		return err
	}
	if err := p.signal(syscall.SIGUSR2); err != nil {
		return err
	}
	for end := time.Now().Add(busyTimeout); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if now, err := p.status(context.Background()); err == nil && now.PID != before.PID {
			p.watch.upgraded()
			return nil
		}
	}
	p.countFault("upgrade rolled back")
	return fmt.Errorf("process %d still serves after %s", before.PID, busyTimeout)
}

// restart ends the server by a signal, and requires that it exits in time and with the right code.
func (p *phase) restart(context.Context) error {
	sig := []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP}[p.rng.IntN(4)]
	return p.endBy("restart", func() error { return p.signal(sig) })
}

func (p *phase) restartByControl(context.Context) error {
	return p.endBy("restart", func() error {
		within, cancel := p.within()
		defer cancel()
		_, err := p.control.Shutdown(within, control.ShutdownRequest{Reason: "soak"})
		return err
	})
}

// lateness is how long after its deadline a drain may end on a busy machine.
const lateness = 10 * time.Second

func (p *phase) endBy(why string, begin func() error) error {
	done := p.begin(disruption{why: why, drain: true}) // clients may be refused, but not cut off
	defer done()
	if err := begin(); err != nil {
		return err
	}
	code, err := p.wait(grace + lateness)
	if err == nil && code != 0 {
		err = fmt.Errorf("exit code %d", code)
	}
	if err != nil {
		p.kill()
	}
	if started := p.start(); started != nil {
		return started
	}
	return err
}

func (p *phase) force(context.Context) error {
	done := p.disrupt("forced end", true)
	defer done()
	if err := p.signal(syscall.SIGTERM); err != nil {
		return err
	}
	time.Sleep(time.Duration(p.rng.IntN(1000)) * time.Millisecond)
	_ = p.signal(syscall.SIGTERM) // it may have ended
	code, err := p.wait(lateness)
	if err == nil && code != 0 && code != 128+int(syscall.SIGTERM) {
		err = fmt.Errorf("exit code %d", code)
	}
	if err != nil {
		p.kill()
	}
	if started := p.start(); started != nil {
		return started
	}
	return err
}

// crash kills the process that serves. The first process must not outlive it.
func (p *phase) crash(ctx context.Context) error {
	st, err := p.status(ctx)
	if err != nil {
		return err
	}
	done := p.disrupt("SIGKILL", true)
	defer done()
	_ = syscall.Kill(st.PID, syscall.SIGKILL)
	_, err = p.wait(busyTimeout)
	p.kill()
	if started := p.start(); started != nil {
		return started
	}
	return err
}

func (p *phase) freeze(ctx context.Context) error {
	st, err := p.status(ctx)
	if err != nil {
		return err
	}
	end := p.watch.frozen()
	defer end()
	_ = syscall.Kill(st.PID, syscall.SIGSTOP)
	time.Sleep(time.Duration(100+p.rng.IntN(1500)) * time.Millisecond)
	return syscall.Kill(st.PID, syscall.SIGCONT)
}

// exhaust connects more clients than the server has files, and requires that it still answers its operator.
func (p *phase) exhaust(ctx context.Context) error {
	crowd := make([]net.Conn, 0, p.settings.files+100)
	defer func() {
		for _, nc := range crowd {
			_ = nc.Close()
		}
	}()
	for range cap(crowd) {
		nc, err := net.DialTimeout("tcp", p.tcp, 2*time.Second)
		if err != nil {
			break
		}
		crowd = append(crowd, nc)
	}
	if _, err := p.status(ctx); err != nil {
		return fmt.Errorf("no answer at the limit of open files: %w", err)
	}
	time.Sleep(time.Duration(p.rng.IntN(1000)) * time.Millisecond)
	return nil
}

// checkLog reports data races, panics and errors in the server's log.
func (p *phase) checkLog() {
	text, err := os.ReadFile(p.log.Name())
	if err != nil {
		p.violate("%v", err)
	}
	for _, bad := range []string{"DATA RACE", "panic:", "handler panicked", "fatal error:", `"level":"error"`} {
		if n := strings.Count(string(text), bad); n > 0 {
			at := strings.Index(string(text), bad)
			p.violate("%q stands %d times in the log, first: %.400s", bad, n, text[max(0, at-100):])
		}
	}
}
