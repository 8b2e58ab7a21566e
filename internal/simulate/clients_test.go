package simulate

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

// clientConn is what a client needs of its connection.
type clientConn interface {
	net.Conn
	CloseWrite() error
	Reset()
}

// trace records what one client did and saw, for the model.
type trace struct {
	plan clientPlan

	mu   sync.Mutex
	cond *sync.Cond

	conn            clientConn // nil until connected
	connected       time.Time  // zero: the connection was refused
	sent            int        // bytes that the network accepted
	offered         int        // bytes that the client has tried to send
	sending         bool       // a write is in progress
	finished        time.Time  // when the client half-closed
	closed          time.Time  // when the client closed or reset, before the server ended the stream
	wasReset        bool       // closed with an RST
	got             []byte
	lastGot         time.Time     // when the last byte arrived
	lastSent        time.Time     // when the network accepted the last byte
	lastMoved       time.Time     // a byte moved in either direction
	longestQuiet    time.Duration // without a byte in either direction, before lastMoved
	end             error         // io.EOF, or why reading failed
	endAt           time.Time
	told            time.Time // when it read the notice to leave
	toldFor         string    // the reason in that notice
	notReadingSince time.Time // zero while it reads
	stoppedReading  bool      // it has stopped reading at least once
	done            bool      // its goroutines have ended
	served          int       // bytes that the service had echoed at the handover
}

// content is what client id sends from byte n on: lines of lower-case letters. No line begins like a notice.
func content(id, n int, p []byte) {
	for i := range p {
		at := n + i
		switch {
		case (at+id)%23 == 22:
			p[i] = '\n'
		default:
			p[i] = 'a' + byte((at*7+at/23*3+at/598+id)%26)
		}
	}
}

// Why clients are told to leave.
const (
	toldDrain   = "test"
	toldEvict   = "evict"
	toldUpgrade = "upgrade"
	toldAge     = "max-age"
)

var (
	shutdownWord = []byte("SHUTDOWN ")
	errGivenUp   = errors.New("the client gave up")
)

func newTrace(p clientPlan) *trace {
	t := &trace{plan: p}
	t.cond = sync.NewCond(&t.mu)
	return t
}

// run is the client: it connects, takes its steps, and reads until the end of the stream. It returns when both have
// ended.
func (t *trace) run(dial func(*clientPlan) (clientConn, error), log func(string, ...any)) {
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.done = true
	}()
	time.Sleep(t.plan.Start)
	nc, err := dial(&t.plan)
	if err != nil {
		log("client %d: refused", t.plan.ID)
		return
	}
	t.mu.Lock()
	t.conn, t.connected, t.lastMoved = nc, time.Now(), time.Now()
	t.mu.Unlock()
	var reader sync.WaitGroup
	reader.Go(func() { t.read(nc, log) })
	t.takeSteps(nc, log)
	reader.Wait()
	_ = nc.Close()
}

// read reads until the stream ends, with breaks as the steps say.
func (t *trace) read(nc clientConn, log func(string, ...any)) {
	random := rand.New(rand.NewPCG(uint64(t.plan.ID), 0x72656164))
	p := make([]byte, 32<<10)
	for {
		t.mu.Lock()
		for !t.notReadingSince.IsZero() && t.closed.IsZero() {
			t.cond.Wait()
		}
		t.mu.Unlock()
		n, err := nc.Read(p[:1+random.IntN(len(p))])
		t.mu.Lock()
		if n > 0 {
			t.got = append(t.got, p[:n]...)
			t.lastGot = time.Now()
			t.move()
			if t.told.IsZero() {
				if i := bytes.Index(t.got, shutdownWord); i >= 0 && bytes.IndexByte(t.got[i:], '\n') >= 0 {
					line, _, _ := bytes.Cut(t.got[i:], []byte("\n"))
					t.told, t.toldFor = time.Now(), string(line[bytes.LastIndexByte(line, ' ')+1:])
					log("client %d: told %q", t.plan.ID, line)
				}
			}
		}
		if err != nil {
			if t.closed.IsZero() {
				t.end, t.endAt = err, time.Now()
				log("client %d: %v after %d bytes", t.plan.ID, err, len(t.got))
			}
			t.cond.Broadcast()
			t.mu.Unlock()
			if !t.plan.Floods {
				_ = nc.Close()
			}
			return
		}
		t.cond.Broadcast()
		t.mu.Unlock()
	}
}

// move notes that a byte has lastMoved. The caller holds mu.
func (t *trace) move() {
	t.longestQuiet = max(t.longestQuiet, time.Since(t.lastMoved))
	t.lastMoved = time.Now()
}

// ended reports whether the stream has ended for the client. The caller holds mu.
func (t *trace) ended() bool { return t.end != nil || !t.closed.IsZero() }

// waitFor waits until cond, or the end of the stream, or the notice for a client that heeds it, for d at most.
func (t *trace) waitFor(d time.Duration, cond func() bool) {
	stop := time.AfterFunc(d, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.cond.Broadcast()
	})
	defer stop.Stop()
	until := time.Now().Add(d)
	t.mu.Lock()
	defer t.mu.Unlock()
	for !cond() && !t.ended() && !t.mustHeed() && time.Now().Before(until) {
		t.cond.Wait()
	}
}

// mustHeed reports whether the client was told, and heeds that. The caller holds mu.
func (t *trace) mustHeed() bool { return t.plan.Heeds && !t.told.IsZero() }

// forever is longer than any history.
const forever = 24 * time.Hour

func (t *trace) takeSteps(nc clientConn, log func(string, ...any)) {
	for _, s := range t.plan.Steps {
		t.mu.Lock()
		stop := t.ended() || t.mustHeed()
		t.mu.Unlock()
		if stop && s.Do != "close" && s.Do != "reset" {
			break
		}
		switch s.Do {
		case "send":
			t.send(nc, s.N)
		case "wait":
			t.waitFor(s.D, func() bool { return false })
		case "stopreading":
			t.stopReading(s.D)
		case "await":
			t.waitFor(forever, func() bool { return len(t.got) >= t.sent && t.notReadingSince.IsZero() })
		case "finish":
			t.finish(nc, log)
		case "close", "reset":
			t.leave(nc, s.Do == "reset", log)
			return
		}
	}
	// It stays, or leaves when it is told.
	t.waitFor(forever, func() bool { return !t.told.IsZero() })
	if t.plan.Leaves >= 0 {
		t.mu.Lock()
		told := !t.told.IsZero() && !t.ended()
		t.mu.Unlock()
		if told {
			time.Sleep(t.plan.Leaves)
			t.finish(nc, log)
		}
	}
	if t.plan.Floods {
		t.mu.Lock()
		for !t.ended() {
			t.cond.Wait()
		}
		t.mu.Unlock()
		t.flood(nc)
	}
	t.mu.Lock()
	for !t.ended() {
		t.cond.Wait()
	}
	t.mu.Unlock()
}

// send sends the next n bytes.
func (t *trace) send(nc clientConn, n int) {
	t.mu.Lock()
	from := t.sent
	if !t.finished.IsZero() || t.sent != t.offered {
		t.mu.Unlock()
		return
	}
	t.offered += n
	t.sending = true
	t.mu.Unlock()
	p := make([]byte, n)
	content(t.plan.ID, from, p)
	for len(p) > 0 {
		k, err := nc.Write(p[:min(len(p), 4<<10)])
		p = p[k:]
		t.mu.Lock()
		t.sent += k
		t.lastSent = time.Now()
		t.move()
		heed := t.mustHeed()
		if heed {
			t.offered = t.sent
		}
		t.mu.Unlock()
		if err != nil || heed {
			break
		}
	}
	t.mu.Lock()
	t.sending = false
	t.mu.Unlock()
}

// flood sends for a while although the server has ended the stream.
func (t *trace) flood(nc clientConn) {
	for range 20 {
		if _, err := nc.Write([]byte("too late\n")); err != nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	_ = nc.Close()
}

// stopReading stops reading for d. The steps go on meanwhile.
func (t *trace) stopReading(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.notReadingSince.IsZero() {
		return
	}
	t.notReadingSince, t.stoppedReading = time.Now(), true
	time.AfterFunc(d, t.resumeReading)
}

// resumeReading lets the client read again.
func (t *trace) resumeReading() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.notReadingSince = time.Time{}
	t.cond.Broadcast()
}

func (t *trace) finish(nc clientConn, log func(string, ...any)) {
	t.mu.Lock()
	if t.finished.IsZero() && !t.ended() {
		t.finished = time.Now()
		log("client %d: half-closes after sending %d", t.plan.ID, t.sent)
	}
	t.mu.Unlock()
	_ = nc.CloseWrite()
}

func (t *trace) leave(nc clientConn, reset bool, log func(string, ...any)) {
	t.mu.Lock()
	if !t.ended() {
		t.closed, t.wasReset = time.Now(), reset
		log("client %d: %s after sending %d", t.plan.ID, map[bool]string{true: "resets", false: "closes"}[reset], t.sent)
	}
	t.cond.Broadcast()
	t.mu.Unlock()
	if reset {
		nc.Reset()
	} else {
		_ = nc.Close()
	}
}

// giveUp ends a client at the end of the history.
func (t *trace) giveUp() {
	t.mu.Lock()
	nc := t.conn
	if !t.ended() {
		t.end, t.endAt = errGivenUp, time.Now()
	}
	t.notReadingSince = time.Time{}
	t.cond.Broadcast()
	t.mu.Unlock()
	if nc != nil {
		_ = nc.Close()
	}
}

// sawReset reports whether the server reset the connection.
func (t *trace) sawReset() bool {
	return errors.Is(t.end, syscall.ECONNRESET) || errors.Is(t.end, syscall.EPIPE)
}

// sawEOF reports whether the stream ended cleanly.
func (t *trace) sawEOF() bool { return errors.Is(t.end, io.EOF) }

// lag is how long it can take until what the server writes at once has reached a client that reads.
func (t *trace) lag() time.Duration {
	rounds := 2 + 4<<10/t.plan.Window
	return time.Duration(2*rounds)*t.plan.Delay + t.plan.Handler.Think
}

// readsPromptly reports whether the client has read all the time, so that the server's bounds are enough for it.
func (t *trace) readsPromptly() bool {
	return !t.stoppedReading && t.lag() < flushTime/2 && t.plan.Handler.Hang == 0
}

// parse splits what a client has received into the echo of what it sent, of which it returns the length, and the
// server's notices. A notice is a line of its own: if the byte before it is not the end of a line, a newline comes first.
//
// An added newline can look like one of the client's own. Then the echo may be a byte longer or shorter, and read says
// which length is expected.
func (t *trace) parse(read int) (echo int, notices []string, err error) {
	at := []int{0} // where the echo may be
	choose := func() int {
		if slices.Contains(at, read) {
			return read
		}
		return slices.Max(at)
	}
	rest := t.got
	sent := func(p int, chunk []byte) bool {
		if p+len(chunk) > t.offered {
			return false
		}
		want := make([]byte, len(chunk))
		content(t.plan.ID, p, want)
		return bytes.Equal(want, chunk)
	}
	for {
		i := bytes.IndexAny(rest, "SNPB")
		chunk, isLast := rest, i < 0
		if !isLast {
			chunk = rest[:i]
		}
		var next []int
		for _, p := range at {
			if (isLast || len(chunk) == 0 || chunk[len(chunk)-1] == '\n') && sent(p, chunk) {
				next = append(next, p+len(chunk))
			}
			if n := len(chunk) - 1; !isLast && n > 0 && chunk[n] == '\n' && chunk[n-1] != '\n' && sent(p, chunk[:n]) {
				next = append(next, p+n)
			}
			if isLast && len(chunk) > 0 && chunk[len(chunk)-1] == '\n' && !t.sawEOF() && sent(p, chunk[:len(chunk)-1]) {
				next = append(next, p+len(chunk)-1) // a notice was cut off after its newline
			}
		}
		if at = next; len(at) == 0 {
			return 0, notices, fmt.Errorf("%q after %d bytes and %d notices is neither echo nor notice", clip(chunk), len(t.got)-len(rest), len(notices))
		}
		if isLast {
			return choose(), notices, nil
		}
		rest = rest[i:]
		end := bytes.IndexByte(rest, '\n')
		if end < 0 {
			if t.sawEOF() && t.readsPromptly() { // otherwise the server may have given up in the middle
				return 0, notices, fmt.Errorf("the notice %q is cut off", clip(rest))
			}
			return choose(), notices, nil
		}
		notices = append(notices, string(rest[:end]))
		rest = rest[end+1:]
	}
}

func clip(p []byte) []byte { return p[:min(len(p), 60)] }
