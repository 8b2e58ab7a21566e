package load

import (
	"bytes"
	"time"

	"echod/client"
)

// maxMissing bounds the messages of a connection that are remembered to be
// missing, in case they still come. What is beyond it counts as lost.
const maxMissing = 1 << 16

// A checker tells what becomes of the messages of one connection. It does no
// input or output: begin says that a message is to be sent, feed takes what has
// come back, and end says that nothing more will.
//
// Nearly always what comes is what was sent next, and comparing it with that is
// all there is to do. Else it is read line by line (lines.go): a line may be a
// message from elsewhere in the order, a notice, or broken.
type checker struct {
	from  origin
	size  int           // of a message, in bytes
	late  time.Duration // a message that takes longer is late
	tally *tally        // of the loop that owns this

	template []byte
	onNotice func(client.Notice)

	// The messages [base, next) are outstanding: sent, or to be sent, and not
	// come back, nor any that was sent after them.
	base, next uint64
	sent       []byte          // sent[sentHead:] are their bytes
	sentHead   int             //
	due        []time.Duration // due[dueHead:] is when they were due
	dueHead    int
	arrived    int // how many bytes of message base have come back

	// missing are messages before base that have not come back, and when they
	// were due; forgotten is how many there are besides.
	missing   map[uint64]time.Duration
	forgotten int64

	// broken is for how many messages the broken bytes since the last message in
	// its turn would do; corrupted is how many they have stood for.
	broken, corrupted int64

	lines lines
}

func newChecker(from origin, size int, late time.Duration, t *tally, onNotice func(client.Notice)) *checker {
	return &checker{from: from, size: size, late: late, tally: t, template: from.template(size), onNotice: onNotice}
}

// begin appends one more message to those that are to be sent.
func (c *checker) begin(due time.Duration) {
	if c.sentHead > 0 && len(c.sent)+c.size > cap(c.sent) && c.sentHead >= len(c.sent)/2 {
		c.sent = c.sent[:copy(c.sent, c.sent[c.sentHead:])]
		c.sentHead = 0
	}
	if c.dueHead > 0 && len(c.due) == cap(c.due) && c.dueHead >= len(c.due)/2 {
		c.due = c.due[:copy(c.due, c.due[c.dueHead:])]
		c.dueHead = 0
	}
	c.sent = append(c.sent, c.template...)
	number(c.sent[len(c.sent)-c.size:], c.next)
	c.due = append(c.due, due)
	c.next++
}

// unwritten returns the bytes of the messages after the first n bytes of all that
// were ever begun.
func (c *checker) unwritten(written int64) []byte {
	pending := int64(c.next)*int64(c.size) - written
	return c.sent[int64(len(c.sent))-pending:]
}

// retract takes back the messages of which not a byte has been written, and
// returns when they were due.
func (c *checker) retract(written int64) []time.Duration {
	size := int64(c.size)
	keep := max(c.base, uint64((written+size-1)/size))
	n := int(c.next - keep)
	c.next = keep
	c.sent = c.sent[:len(c.sent)-n*c.size]
	due := c.due[len(c.due)-n:]
	c.due = c.due[:len(c.due)-n]
	return due
}

// feed takes what has come back at the given time.
func (c *checker) feed(p []byte, now time.Duration) {
	for len(p) > 0 {
		if c.lines.reading {
			p = c.feedLine(p, now)
			continue
		}
		want := c.sent[c.sentHead+c.arrived:]
		n := min(len(p), len(want))
		if n == 0 || !bytes.Equal(p[:n], want[:n]) {
			n = c.wholeMessages(p[:n], want[:n])
			c.arrive(n, now)
			p = p[n:]
			c.lines.begin(c.sent[c.sentHead:c.sentHead+c.arrived], c.base > 0)
			c.arrived = 0
			continue
		}
		c.arrive(n, now)
		p = p[n:]
	}
}

// wholeMessages returns how much of got, which differs from want, are messages that
// have come back whole.
func (c *checker) wholeMessages(got, want []byte) int {
	n := 0
	for end := c.size - c.arrived; end <= len(got) && bytes.Equal(got[n:end], want[n:end]); end += c.size {
		n = end
	}
	return n
}

// arrive takes off the next n bytes of what is outstanding.
func (c *checker) arrive(n int, now time.Duration) {
	c.arrived += n
	for c.arrived >= c.size {
		c.arrived -= c.size
		c.returned(now - c.due[c.dueHead])
		c.pop()
	}
}

// pop takes message base off those that are outstanding.
func (c *checker) pop() {
	c.base++
	c.dueHead++
	c.sentHead += c.size
	if c.base == c.next {
		c.due, c.dueHead = c.due[:0], 0
		c.sent, c.sentHead = c.sent[:0], 0
	}
}

func (c *checker) returned(latency time.Duration) {
	c.tally.echo(latency)
	if latency > c.late {
		c.tally.Echoes.Late++
	}
}

// message takes a whole and right message that came out of order, or may have.
func (c *checker) message(from origin, seq uint64, now time.Duration) {
	if from != c.from {
		c.tally.Echoes.Foreign++
		return
	}
	if seq >= c.next { // right by its form, but never sent
		c.broken++
		return
	}
	if due, ok := c.missing[seq]; ok {
		delete(c.missing, seq)
		c.tally.Echoes.Reordered++
		c.returned(now - due)
		return
	}
	if seq < c.base {
		c.tally.Echoes.Duplicated++
		return
	}
	c.standFor(int64(seq - c.base))
	for c.base < seq {
		c.miss()
	}
	c.returned(now - c.due[c.dueHead])
	c.pop()
}

// miss gives message base up, since one that was sent after it has come.
func (c *checker) miss() {
	if len(c.missing) < maxMissing {
		if c.missing == nil {
			c.missing = make(map[uint64]time.Duration)
		}
		c.missing[c.base] = c.due[c.dueHead]
	} else {
		c.forgotten++
	}
	c.pop()
}

// standFor takes the broken bytes since the last message in its turn for the
// messages that are missing there, as far as they go.
func (c *checker) standFor(missing int64) {
	corrupted := min(c.broken, missing)
	c.corrupted += corrupted
	c.tally.Echoes.Corrupted += corrupted
	c.tally.Echoes.Unexpected += c.broken - corrupted
	c.broken = 0
}

// outstanding returns how many messages are under way.
func (c *checker) outstanding() int { return int(c.next - c.base) }

// overdue returns how many of the messages under way are late already: they hold
// up no others. The first so many are known to be.
func (c *checker) overdue(known int, now time.Duration) int {
	n := min(known, c.outstanding())
	for _, due := range c.due[c.dueHead+n:] {
		if now-due <= c.late {
			break
		}
		n++
	}
	return n
}

// oldest returns when the first of the messages under way was due.
func (c *checker) oldest() time.Duration { return c.due[c.dueHead] }

// end says that nothing more will come, and returns how many messages have not
// come back, in whatever condition.
func (c *checker) end() int64 {
	c.endLines()
	c.standFor(int64(c.outstanding()))
	unreturned := int64(c.outstanding()) + int64(len(c.missing)) + c.forgotten
	if more := c.corrupted - unreturned; more > 0 { // what they stood for has come later
		c.tally.Echoes.Corrupted -= more
		c.tally.Echoes.Unexpected += more
		return 0
	}
	return unreturned - c.corrupted
}
