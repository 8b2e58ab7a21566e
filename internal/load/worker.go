package load

import (
	"net"
	"runtime"
	"sync"
	"time"
)

const (
	// sweepEvery is how often a worker checks the timeouts of its users.
	sweepEvery = 10 * time.Millisecond

	// window is how often the run collects what a worker has counted.
	window = 100 * time.Millisecond

	// bufferSize is how much is read or written at once, in bytes.
	bufferSize = 256 << 10
)

// A dialed is the outcome of a connect.
type dialed struct {
	user *user
	conn net.Conn
	err  error
	at   time.Duration

	handshake time.Duration // that TLS took; zero without TLS
	resumed   bool          // a TLS session
}

// A worker serves a share of the users, on one goroutine.
type worker struct {
	run     *run
	number  int
	users   []*user
	poll    poller
	tally   *tally
	in, out []byte // buffers for one read or write

	// The open model: the user whose message is due next, and the number of that
	// message.
	turn    int
	message int64
	due     []*user // users with messages that became due
	dueSum  int64   // messages that became due

	thinkers thinkers // the closed model
	lastEcho time.Duration

	draining bool
	drainAt  time.Duration
	failed   error // why the run cannot continue

	dials sync.WaitGroup

	mu    sync.Mutex // guards inbox
	inbox []dialed
}

func newWorker(r *run, number int) (*worker, error) {
	p := pace{began: r.began}
	if r.opts.open() {
		p.every = r.schedule.tick
	}
	poll, err := newPoller(r.raw, runtime.GOMAXPROCS(0) > r.opts.Threads, p)
	if err != nil {
		return nil, err
	}
	w := &worker{
		run: r, number: number, poll: poll, tally: newTally(), in: make([]byte, bufferSize),
		out: make([]byte, bufferSize),
	}
	for i := number; i < r.opts.Conns; i += r.opts.Threads {
		u := &user{worker: w, slot: len(w.users), index: i, phase: disconnected, wakeAt: r.schedule.starts(i)}
		if r.opts.open() {
			u.taken = r.schedule.firstMessage(i)
			u.due = u.taken
		}
		w.users = append(w.users, u)
	}
	return w, nil
}

func (w *worker) now() time.Duration { return time.Since(w.run.began) }

// deliver hands over the outcome of a connect. Any goroutine may call it.
func (w *worker) deliver(d dialed) {
	w.mu.Lock()
	w.inbox = append(w.inbox, d)
	w.mu.Unlock()
	w.poll.wake()
}

// work serves the users to the end of the run.
func (w *worker) work() error {
	defer w.close()
	now := w.now()
	sweep, collect := now, now+window
	second := time.Second
	for {
		if !w.draining && (now >= w.run.opts.Duration || w.run.stopping.Load()) {
			w.drain(now)
		}
		if now >= sweep {
			for _, u := range w.users {
				u.tick(now)
			}
			sweep = now + sweepEvery
		}
		due := min(w.sendDue(now), w.wakeThinkers(now))
		if now >= collect {
			w.run.collect(w, collect-window)
			collect += (now - collect).Truncate(window) + window
		}
		if now >= second {
			second = now.Truncate(time.Second) + time.Second
			w.run.finishSecond(w, int(now/time.Second))
		}
		if w.draining && (w.allDone() || now >= w.drainAt+w.run.opts.DrainWait || w.run.skipping.Load()) {
			for _, u := range w.users {
				u.finish(now)
			}
			w.run.collect(w, collect-window)
			w.run.finishSecond(w, int(now/time.Second)+1)
			return nil
		}
		ready, err := w.poll.wait(max(0, min(sweep, due, collect)-w.now()))
		if err != nil {
			return err
		}
		for _, u := range ready {
			u.ready()
		}
		now = w.now()
		for _, d := range w.takeInbox() {
			d.user.connected(d, now)
		}
		if w.failed != nil {
			return w.failed
		}
	}
}

func (w *worker) takeInbox() []dialed {
	w.mu.Lock()
	defer w.mu.Unlock()
	d := w.inbox
	w.inbox = nil
	return d
}

// sendDue sends the messages of the open model that have become due. It returns when
// the next one is due.
func (w *worker) sendDue(now time.Duration) time.Duration {
	if !w.run.opts.open() || w.draining {
		return never
	}
	for {
		u := w.users[w.turn]
		due := w.run.schedule.due(u.index, w.message)
		if due > now {
			w.flushDue(now)
			return due
		}
		if w.message >= u.due { // otherwise the user has not started yet
			u.due = w.message + 1
			w.dueSum++
			if !u.listed {
				u.listed = true
				w.due = append(w.due, u)
			}
		}
		if w.turn++; w.turn == len(w.users) {
			w.turn, w.message = 0, w.message+1
		}
	}
}

func (w *worker) flushDue(now time.Duration) {
	for _, u := range w.due {
		u.listed = false
		if u.phase == active {
			u.send(now)
		}
	}
	w.due = w.due[:0]
}

// wakeThinkers lets users send whose think time has ended. It returns when the next
// think time ends.
func (w *worker) wakeThinkers(now time.Duration) time.Duration {
	for {
		u, at := w.thinkers.next(now)
		if u == nil {
			return at
		}
		if u.phase == active {
			u.send(now)
		}
	}
}

// drain begins the end of the run: what is due is still sent, then every connection is
// left in order.
func (w *worker) drain(now time.Duration) {
	w.sendDue(min(now, w.run.opts.Duration))
	w.draining, w.drainAt = true, min(now, w.run.opts.Duration)
	for _, u := range w.users {
		switch {
		case u.hasUnsent():
		case u.phase == active:
			u.leave(leaveEnd, now)
		default:
			u.stopIfIdle()
		}
	}
}

func (w *worker) allDone() bool {
	for _, u := range w.users {
		if u.phase != done {
			return false
		}
	}
	return true
}

// close closes all connections and waits for the connects in progress.
func (w *worker) close() {
	for _, u := range w.users {
		if u.socket != nil {
			u.socket.close()
		}
		if u.phase == dialing {
			u.stopDialing(errRunOver)
		}
	}
	w.dials.Wait()
	for _, d := range w.takeInbox() {
		if d.conn != nil {
			_ = d.conn.Close()
		}
	}
	w.poll.close()
}
