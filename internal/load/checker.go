package load

import (
	"bytes"
	"time"

	"echod/client"
)

const (
	// maxMissing bounds how many missing messages a checker remembers in case they
	// still arrive. Any more count as lost.
	maxMissing = 1 << 16

	// maxNotice is the length of the longest notice, in bytes.
	maxNotice = 4 << 10

	// maxIdleLine is the size of a line's buffer that is kept when no line is read, in
	// bytes.
	maxIdleLine = 64 << 10
)

// A checker accounts for the messages of one connection. It does no
// I/O: begin announces a message to be sent, fill and wrote are for the writer,
// feed takes what arrives, and end says that nothing more will arrive.
//
// It keeps no copy of what was sent: a message is its frame and a piece of the
// padding that all connections share.
//
// Nearly always the next bytes are the next message, and the checker only compares them. Otherwise it reads line by
// line: a line may be a message that is out of order, a notice, or broken.
type checker struct {
	from      origin
	template  template
	runPrefix []byte
	padding   []byte
	maxSize   int           // of a message, in bytes
	meanSize  int           // of messages, in bytes
	late      time.Duration // a message that takes longer is late
	tally     *tally        // of the worker that owns the connection
	onNotice  func(client.Notice)

	// Messages [base, next) are outstanding: they were begun, and neither they nor a
	// later message have returned. flights[first:] describes them.
	base, next uint64
	flights    []flight
	first      int
	start, end int64 // the part of the stream that they take up
	arrived    int   // bytes of message base that have arrived

	written int64  // bytes of the stream
	sent    uint64 // messages [0, sent) have at least one byte written

	// missing are messages before base that have not returned, and when they were
	// due. forgotten is the number of those that are not in the map.
	missing   map[uint64]time.Duration
	forgotten int64

	// broken estimates, from the number of broken bytes, how many broken messages arrived since the last message
	// that came in order. corrupted is how many messages of this connection have been counted as corrupted.
	broken, corrupted int64

	lines lines
}

// A flight is an outstanding message.
type flight struct {
	due time.Duration
	end int64 // offset of the byte after it in the stream
	frame
}

func newChecker(from origin, padding []byte, sizes Sizes, late time.Duration, t *tally,
	onNotice func(client.Notice),
) *checker {
	return &checker{
		from: from, template: from.template(), runPrefix: from.runPrefix(), padding: padding,
		maxSize: sizes.Max(), meanSize: sizes.Mean(), late: late, tally: t, onNotice: onNotice,
	}
}

// begin appends a message to those that the writer must send.
func (c *checker) begin(due time.Duration, size int) {
	if c.first > 0 && len(c.flights) == cap(c.flights) && c.first >= len(c.flights)/2 {
		c.flights = c.flights[:copy(c.flights, c.flights[c.first:])]
		c.first = 0
	}
	c.end += int64(size)
	c.flights = append(c.flights, flight{due: due, end: c.end})
	c.template.fill(&c.flights[len(c.flights)-1].frame, c.next, c.padding[:size-MinSize])
	c.next++
}

// flight returns an outstanding message and where it starts in the stream.
func (c *checker) flight(seq uint64) (f *flight, start int64) {
	i := c.first + int(seq-c.base)
	start = c.start
	if seq > c.base {
		start = c.flights[i-1].end
	}
	return &c.flights[i], start
}

// unwritten returns how many bytes of the messages are still to be written.
func (c *checker) unwritten() int64 { return c.end - c.written }

// fill copies the next bytes to be written into p and returns their number.
func (c *checker) fill(p []byte) int {
	n := 0
	seq := c.sent
	if seq > c.base { // part of the last message may still be unwritten
		if f, _ := c.flight(seq - 1); f.end > c.written {
			seq--
		}
	}
	for ; seq < c.next && n < len(p); seq++ {
		f, start := c.flight(seq)
		skip := max(0, int(c.written-start))
		for _, part := range c.parts(f, int(f.end-start)) {
			if skip >= len(part) {
				skip -= len(part)
				continue
			}
			n += copy(p[n:], part[skip:])
			skip = 0
		}
	}
	return n
}

// parts returns the bytes of a message in three parts.
func (c *checker) parts(f *flight, size int) [3][]byte {
	return [3][]byte{f.head[:], c.padding[:size-MinSize], f.tail[:]}
}

// wrote says that the next n bytes were written. It returns how many messages these bytes begin.
func (c *checker) wrote(n int) int64 {
	c.written += int64(n)
	before := c.sent
	for c.sent < c.next {
		if _, start := c.flight(c.sent); start >= c.written {
			break
		}
		c.sent++
	}
	return int64(c.sent - before)
}

// retract withdraws the messages of which nothing was written, and returns when
// they were due.
func (c *checker) retract() []time.Duration {
	var due []time.Duration
	for _, f := range c.flights[len(c.flights)-int(c.next-c.sent):] {
		due = append(due, f.due)
	}
	c.flights = c.flights[:len(c.flights)-len(due)]
	c.next = c.sent
	c.end = c.start
	if c.next > c.base {
		c.end = c.flights[len(c.flights)-1].end
	}
	return due
}

// feed takes bytes that arrived at the given time.
func (c *checker) feed(p []byte, now time.Duration) {
	for len(p) > 0 {
		if c.lines.reading {
			p = c.feedLine(p, now)
			continue
		}
		size := 0
		if c.base < c.sent {
			size = int(c.flights[c.first].end - c.start)
		}
		n := min(len(p), size-c.arrived)
		if n <= 0 || !c.expected(p[:n], size) {
			c.startLines()
			continue
		}
		c.arrived += n
		p = p[n:]
		if c.arrived == size {
			c.returned(now - c.flights[c.first].due)
			c.pop()
		}
	}
}

// expected reports whether p continues message base.
func (c *checker) expected(p []byte, size int) bool {
	f := &c.flights[c.first]
	if c.start+int64(c.arrived+len(p)) > c.written {
		return false
	}
	if len(p) == size { // the usual case
		return bytes.Equal(p[:headSize], f.head[:]) && bytes.Equal(p[size-tailSize:], f.tail[:]) &&
			bytes.Equal(p[headSize:size-tailSize], c.padding[:size-MinSize])
	}
	skip := c.arrived
	for _, part := range c.parts(f, size) {
		if skip >= len(part) {
			skip -= len(part)
			continue
		}
		n := min(len(p), len(part)-skip)
		if !bytes.Equal(p[:n], part[skip:skip+n]) {
			return false
		}
		p, skip = p[n:], 0
	}
	return true
}

// pop removes message base from the outstanding ones.
func (c *checker) pop() {
	c.start = c.flights[c.first].end
	c.base++
	c.first++
	c.arrived = 0
	if c.base == c.next {
		c.flights, c.first = c.flights[:0], 0
	}
}

func (c *checker) returned(latency time.Duration) {
	c.tally.echo(latency)
	if latency > c.late {
		c.tally.Echoes.Late++
	}
}

// message takes an intact message that is, or may be, out of order.
func (c *checker) message(from origin, seq uint64, now time.Duration) {
	if from != c.from {
		c.tally.Echoes.Foreign++
		return
	}
	if seq >= c.sent { // well-formed, but never sent
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
	f, _ := c.flight(seq)
	due := f.due
	c.countBroken(int64(seq - c.base))
	for c.base < seq {
		c.skipMissing()
	}
	c.returned(now - due)
	c.pop()
}

// skipMissing gives up message base because a later one has arrived.
func (c *checker) skipMissing() {
	if len(c.missing) < maxMissing {
		if c.missing == nil {
			c.missing = make(map[uint64]time.Duration)
		}
		c.missing[c.base] = c.flights[c.first].due
	} else {
		c.forgotten++
	}
	c.pop()
}

// countBroken counts the broken messages since the last message that came in order. If messages are missing there,
// each of them counts as corrupted once. Further broken messages count as unexpected.
func (c *checker) countBroken(missing int64) {
	corrupted := min(c.broken, missing)
	c.corrupted += corrupted
	c.tally.Echoes.Corrupted += corrupted
	c.tally.Echoes.Unexpected += c.broken - corrupted
	c.broken = 0
}

// outstanding returns how many messages are in flight.
func (c *checker) outstanding() int { return int(c.next - c.base) }

// outstandingBytes returns how many bytes the messages in flight have.
func (c *checker) outstandingBytes() int64 { return c.end - c.start }

// overdue returns how many of the messages in flight are late. The caller has found that the first known ones are.
func (c *checker) overdue(known int, now time.Duration) int {
	n := min(known, c.outstanding())
	for _, f := range c.flights[c.first+n:] {
		if now-f.due <= c.late {
			break
		}
		n++
	}
	return n
}

// oldest returns when the first message in flight was due.
func (c *checker) oldest() time.Duration { return c.flights[c.first].due }

// dueTimes returns when the messages in flight were due.
func (c *checker) dueTimes() []time.Duration {
	var due []time.Duration
	for _, f := range c.flights[c.first:] {
		due = append(due, f.due)
	}
	return due
}

// finish says that nothing more will arrive. It returns how many messages have not
// come back, intact or broken.
func (c *checker) finish() int64 {
	c.endLines()
	c.countBroken(int64(c.outstanding()))
	unreturned := int64(c.outstanding()) + int64(len(c.missing)) + c.forgotten
	if more := c.corrupted - unreturned; more > 0 { // messages that were counted as corrupted arrived intact later
		c.tally.Echoes.Corrupted -= more
		c.tally.Echoes.Unexpected += more
		return 0
	}
	return unreturned - c.corrupted
}

// lines is the state of a checker that reads line by line. A notice may split a
// message: "hel\nSHUTDOWN 5 SIGTERM\nlo\n" is the message "hello\n" and a notice,
// and so is "hello\nSHUTDOWN 5 SIGTERM\n\n".
type lines struct {
	reading bool
	line    []byte // the part of the current line that has arrived

	// held is a line that is neither a message nor a notice. If a notice follows,
	// it is the first part of a message, and the line after the notice is the rest.
	held        []byte
	holding     bool
	interrupted bool // a notice followed it

	// newlineOwed says that the newline after the last message belongs to a notice.
	// The newline of the message is still to come.
	newlineOwed, afterMessage bool

	junk int // consecutive bytes that belong to no message
}

// startLines starts to read line by line, with what has arrived of message base.
func (c *checker) startLines() {
	l := &c.lines
	l.reading = true
	l.line = l.line[:0]
	if c.arrived > 0 {
		f := &c.flights[c.first]
		for _, part := range c.parts(f, int(f.end-c.start)) {
			l.line = append(l.line, part[:min(len(part), c.arrived-len(l.line))]...)
		}
	}
	l.afterMessage = len(l.line) == 0 && (c.base > 0 || l.afterMessage)
	c.arrived = 0
}

// maxLine bounds how much of a line is kept, in bytes.
func (c *checker) maxLine() int { return c.maxSize + min(7*c.maxSize, 64<<10) + maxNotice }

// feedLine takes what has arrived up to the end of the line. It returns the rest.
func (c *checker) feedLine(p []byte, now time.Duration) []byte {
	l := &c.lines
	i := bytes.IndexByte(p, '\n')
	if i < 0 {
		l.line = append(l.line, p...)
		if len(l.line) > c.maxLine() {
			c.release()
			l.junk += len(l.line)
			l.line = l.line[:0]
		}
		return nil
	}
	l.line = append(l.line, p[:i+1]...)
	c.line(now)
	l.line = l.line[:0]
	l.reading = l.holding || l.newlineOwed || l.junk > 0 || c.broken > 0
	if !l.reading && cap(l.line) > maxIdleLine {
		l.line, l.held = nil, nil
	}
	return p[i+1:]
}

// line takes a complete line.
func (c *checker) line(now time.Duration) {
	l := &c.lines
	newlineOwed, afterMessage := l.newlineOwed, l.afterMessage
	l.newlineOwed, l.afterMessage = false, false

	if from, seq, ok := parseMessage(l.line); ok {
		c.release()
		c.countBrokenBytes()
		c.message(from, seq, now)
		l.afterMessage = true
		return
	}
	text := l.line[:len(l.line)-1]
	if notice, ok := client.ParseNotice(string(text)); ok {
		l.interrupted = l.holding
		l.newlineOwed = newlineOwed || afterMessage
		c.onNotice(notice)
		return
	}
	if newlineOwed && len(text) == 0 {
		return
	}
	joined := l.line
	if l.holding && l.interrupted {
		l.held = append(l.held, l.line...)
		joined, l.holding = l.held, false
	} else {
		c.release()
	}
	if from, seq, size, ok := c.lastMessage(joined); ok {
		l.junk += len(joined) - size
		c.countBrokenBytes()
		c.message(from, seq, now)
		l.afterMessage = true
		return
	}
	l.held = append(l.held[:0], joined[:len(joined)-1]...)
	l.holding, l.interrupted = true, false
	if len(l.held) > c.maxLine() {
		c.release()
	}
}

// lastMessage finds an intact message at the end of a line whose earlier newlines
// may have been corrupted.
func (c *checker) lastMessage(line []byte) (from origin, seq uint64, size int, ok bool) {
	const attempts = 16 // each costs a checksum of the line
	at := len(line)
	for range attempts {
		if at = bytes.LastIndex(line[:at], c.runPrefix); at < 0 {
			break
		}
		if from, seq, ok = parseMessage(line[at:]); ok {
			return from, seq, len(line) - at, true
		}
	}
	return origin{}, 0, 0, false
}

// release treats the held line as junk, because it can no longer be part of a message.
func (c *checker) release() {
	l := &c.lines
	if l.holding {
		l.junk += len(l.held) + 1
		l.holding = false
	}
}

// countBrokenBytes converts the bytes that are no message into a number of broken messages. It goes by
// length, because a broken byte may have been a newline or have become one.
func (c *checker) countBrokenBytes() {
	junk := c.lines.junk
	c.lines.junk = 0
	if junk == 0 {
		return
	}
	n := int64(0)
	seq := c.base + uint64(c.broken)
	for seq < c.sent && junk > 0 {
		f, start := c.flight(seq)
		size := int(f.end - start)
		if junk < size-size/2 {
			junk = 0
			break
		}
		junk -= size
		n++
		seq++
	}
	if junk > 0 {
		n += int64((junk + c.meanSize/2) / c.meanSize)
	}
	c.broken += max(1, n)
}

// endLines says that nothing more will arrive. An incomplete message at the end was cut off, and does not count as
// broken.
func (c *checker) endLines() {
	l := &c.lines
	rest := len(l.line)
	switch {
	case l.holding && l.interrupted:
		rest += len(l.held) + 1
	case l.holding && len(l.held) > 0 && c.isPrefix(l.held): // the line is the beginning of a notice
		rest = 0
	default:
		c.release()
	}
	if rest >= c.nextSize() {
		l.junk += rest
	}
	l.line, l.holding = l.line[:0], false
	c.countBrokenBytes()
}

// isPrefix reports whether p is the beginning of message base.
func (c *checker) isPrefix(p []byte) bool {
	if c.base == c.sent || len(p) > c.nextSize() {
		return false
	}
	c.arrived = 0
	return c.expected(p, c.nextSize())
}

// nextSize returns the size of message base, or the mean if nothing is in flight.
func (c *checker) nextSize() int {
	if c.base == c.next {
		return c.meanSize
	}
	return int(c.flights[c.first].end - c.start)
}
