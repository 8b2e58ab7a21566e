package load

import (
	"net"
	"runtime"
	"sync"
	"time"
)

const (
	// sweepEvery is how often each user is asked whether it has something to do by
	// itself: reconnect, leave, wait no longer.
	sweepEvery = 10 * time.Millisecond

	// window is how often the run takes in what a loop has counted.
	window = 100 * time.Millisecond

	// readBuffer is how much is read at once, in bytes.
	readBuffer = 256 << 10
)

// A dialed is the outcome of dialing.
type dialed struct {
	user *user
	conn net.Conn
	err  error
	at   time.Duration
}

// A loop carries a part of the users, on one goroutine.
type loop struct {
	run   *run
	users []*user
	poll  poller
	tally *tally
	buf   []byte

	// The open model: whose message falls due next, and the how manieth.
	turn  int
	round int64
	dirty []*user // to whom messages have fallen due

	ending  bool
	endedAt time.Duration
	failed  error // why the run cannot go on

	dials sync.WaitGroup // those that dial for the users

	mu    sync.Mutex // guards inbox
	inbox []dialed
}

func newLoop(r *run, number int) (*loop, error) {
	pace := pace{began: r.began}
	if r.opts.Rate > 0 {
		pace.every = r.schedule.grid
	}
	poll, err := newPoller(r.opts.Dial == nil, runtime.GOMAXPROCS(0) > r.opts.Loops, pace)
	if err != nil {
		return nil, err
	}
	l := &loop{run: r, poll: poll, tally: newTally(), buf: make([]byte, readBuffer)}
	for i := number; i < r.opts.Conns; i += r.opts.Loops {
		u := &user{loop: l, slot: len(l.users), index: i, phase: absent, wake: r.schedule.begins(i)}
		if r.opts.Rate > 0 {
			u.taken = r.schedule.first(i)
			u.fallen = u.taken
		}
		l.users = append(l.users, u)
	}
	return l, nil
}

func (l *loop) now() time.Duration { return time.Since(l.run.began) }

// deliver hands the outcome of dialing over. Any goroutine may call it.
func (l *loop) deliver(d dialed) {
	l.mu.Lock()
	l.inbox = append(l.inbox, d)
	l.mu.Unlock()
	l.poll.wake()
}

// carry carries the load to the end of the run.
func (l *loop) carry() error {
	defer l.close()
	now := l.now()
	sweep, flush := now, now+window
	for {
		if !l.ending && (now >= l.run.opts.Duration || l.run.stopped()) {
			l.end(now)
		}
		if now >= sweep {
			for _, u := range l.users {
				u.tick(now)
			}
			sweep = now + sweepEvery
		}
		due := l.fallDue(now)
		if now >= flush {
			l.run.absorb(l, flush-window)
			flush += (now - flush).Truncate(window) + window
		}
		if l.ending && (l.allGone() || now >= l.endedAt+l.run.opts.DrainWait || l.run.hurried.Load()) {
			for _, u := range l.users {
				u.finish(now)
			}
			l.run.absorb(l, flush-window)
			return nil
		}
		ready, err := l.poll.wait(max(0, min(sweep, due, flush)-l.now()))
		if err != nil {
			return err
		}
		for _, u := range ready {
			u.ready()
		}
		now = l.now()
		for _, d := range l.take() {
			d.user.connected(d, now)
		}
		if l.failed != nil {
			return l.failed
		}
	}
}

// take returns what the inbox holds.
func (l *loop) take() []dialed {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.inbox
	l.inbox = nil
	return d
}

// fallDue sends what has become due, and returns when the next message does.
func (l *loop) fallDue(now time.Duration) time.Duration {
	if l.run.opts.Rate == 0 || l.ending {
		return never
	}
	for {
		u := l.users[l.turn]
		due := l.run.schedule.due(u.index, l.round)
		if due > now {
			l.flushDirty(now)
			return due
		}
		if l.round >= u.fallen { // else it is not there yet
			u.fallen = l.round + 1
			if !u.dirty {
				u.dirty = true
				l.dirty = append(l.dirty, u)
			}
		}
		if l.turn++; l.turn == len(l.users) {
			l.turn, l.round = 0, l.round+1
		}
	}
}

func (l *loop) flushDirty(now time.Duration) {
	for _, u := range l.dirty {
		u.dirty = false
		if u.phase == serving {
			u.send(now)
		}
	}
	l.dirty = l.dirty[:0]
}

// end begins the end of the run: what has fallen due is still sent, and then every
// connection is left in order.
func (l *loop) end(now time.Duration) {
	l.fallDue(min(now, l.run.opts.Duration))
	l.ending, l.endedAt = true, min(now, l.run.opts.Duration)
	for _, u := range l.users {
		switch {
		case u.waiting():
		case u.phase == serving:
			u.leave(byEnd, now)
		default:
			u.settle()
		}
	}
}

func (l *loop) allGone() bool {
	for _, u := range l.users {
		if u.phase != gone {
			return false
		}
	}
	return true
}

// close closes what there still is, and awaits those that dial.
func (l *loop) close() {
	for _, u := range l.users {
		if u.socket != nil {
			u.socket.close()
		}
		if u.phase == dialing {
			u.stopDialing(errOver)
		}
	}
	l.dials.Wait()
	for _, d := range l.take() {
		if d.conn != nil {
			_ = d.conn.Close()
		}
	}
	l.poll.close()
}
