package client

import (
	"bytes"
	"cmp"
	"slices"
)

const (
	// maxParses bounds the parses that a decoder follows. Only several sent lines
	// in a row that look like notices reach it. The decoder then drops the parse
	// in which the echo has advanced least.
	maxParses = 8

	// maxExcerpt bounds the excerpts in a CorruptionError, in bytes.
	maxExcerpt = 32
)

// A decoder separates echo from notices in the stream that a server sends. It
// does no I/O. The caller passes what it sends to expect and what it receives to
// feed, and gets the echo from ready and take.
//
// The received stream is the sent stream with notices inserted. Each notice is a
// whole line, and a newline precedes it if the byte before it was not one. If the
// client sends lines that look like notices, or empty lines, the bytes received
// so far may have several parses. The decoder follows all of them, byte by byte,
// and drops a parse at the first byte that contradicts it. Usually there is one.
//
// The content of the echo is known in advance and is the same in all parses.
// Parses differ in how far the echo has advanced and in what is a notice.
type decoder struct {
	sent      sentBytes
	confirmed int64 // offset up to which the echo has come back
	taken     int64 // offset up to which the caller has taken the echo

	parses []parse // never empty
	spare  []parse // memory of the previous parses, for reuse

	midLine bool   // the last byte received was not a newline
	line    []byte // the line being received, while some parse takes it for a notice
}

// A parse is one possible explanation of everything received so far.
type parse struct {
	pos int64 // offset in the sent stream up to which the echo has come back

	// inNotice means that the line being received is a notice.
	inNotice bool

	// owesNewline means that the last newline counted in pos was the one that
	// precedes a notice. The newline that was sent follows the notices.
	owesNewline bool

	// pending holds the notices of this parse that were not reported yet, because
	// other parses lack them. Parses share the array, so it is only appended to
	// after slices.Clip.
	pending []Notice
}

func newDecoder() *decoder { return &decoder{parses: []parse{{}}} }

// expect announces that p is about to be sent.
func (d *decoder) expect(p []byte) { d.sent.append(p) }

// unexpect withdraws the last n expected bytes, which were not sent after all. It
// keeps those that have already come back.
func (d *decoder) unexpect(n int) {
	arrived := max(d.confirmed, slices.MaxFunc(d.parses, comparePos).pos)
	d.sent.truncate(min(n, int(d.sent.end()-arrived)))
}

// outstanding returns the number of sent bytes whose echo was not taken.
func (d *decoder) outstanding() int { return int(d.sent.end() - d.taken) }

// ready returns the echo that has come back and was not taken. It is valid until
// the next call of another method.
func (d *decoder) ready() []byte { return d.sent.between(d.taken, d.confirmed) }

// take marks the first n bytes of ready as taken.
func (d *decoder) take(n int) {
	d.taken += int64(n)
	d.trim()
}

// feed processes received bytes and returns the notices found in them. The error
// is a *CorruptionError. After an error, feed must not be called again.
func (d *decoder) feed(p []byte) ([]Notice, error) {
	var notices []Notice
	for len(p) > 0 {
		if n := d.matchRun(p); n > 0 {
			p = p[n:]
			continue
		}
		if !d.step(p[0]) {
			return notices, d.corruption(p)
		}
		if p[0] == '\n' {
			notices = append(notices, d.resolve()...)
		}
		p = p[1:]
	}
	notices = append(notices, d.resolve()...)
	d.trim()
	return notices, nil
}

// matchRun is the fast path for the middle of a line, where a single parse can
// only continue to match. It returns how many bytes of p it has matched.
func (d *decoder) matchRun(p []byte) int {
	s := &d.parses[0]
	if len(d.parses) > 1 || s.inNotice || !d.midLine {
		return 0
	}
	if i := bytes.IndexByte(p, '\n'); i >= 0 {
		p = p[:i]
	}
	want := d.sent.between(s.pos, d.sent.end())
	n := min(len(p), len(want))
	if !bytes.Equal(p[:n], want[:n]) {
		n = 0
		for p[n] == want[n] {
			n++
		}
	}
	s.pos += int64(n)
	return n
}

// step advances every parse by one byte. If none can continue, it reports false
// and leaves the parses as they were.
func (d *decoder) step(c byte) bool {
	newline, lineStart := c == '\n', !d.midLine
	var mayBecome, isNotice bool // the line, with c, as a notice
	var notice Notice
	if lineStart || len(d.line) > 0 {
		if newline {
			notice, isNotice = ParseNotice(string(d.line))
		}
		d.line = append(d.line, c)
		mayBecome = !newline && mayBecomeNotice(d.line)
	}

	next := d.spare[:0]
	collecting := false
	keep := func(s parse) {
		collecting = collecting || s.inNotice
		if lineStart || newline {
			next = addParse(next, s)
		} else { // in the middle of a line, parses neither fork nor join
			next = append(next, s)
		}
	}
	for _, s := range d.parses {
		if s.inNotice {
			if mayBecome {
				keep(s)
			} else if isNotice {
				keep(parse{pos: s.pos, owesNewline: s.owesNewline, pending: append(slices.Clip(s.pending), notice)})
			}
			continue
		}
		switch {
		case s.owesNewline:
			// Only the owed newline can follow, or another notice.
			if newline {
				keep(parse{pos: s.pos, pending: s.pending})
			}
		case s.pos < d.sent.end() && d.sent.between(s.pos, s.pos+1)[0] == c:
			keep(parse{pos: s.pos + 1, pending: s.pending})
			if newline && !lineStart {
				keep(parse{pos: s.pos + 1, pending: s.pending, owesNewline: true, inNotice: true})
			}
		case newline && !lineStart:
			keep(parse{pos: s.pos, pending: s.pending, inNotice: true})
		}
		if lineStart && mayBecome {
			s.inNotice = true
			keep(s)
		}
	}
	if len(next) == 0 {
		return false
	}
	d.parses, d.spare = next, d.parses
	d.midLine = !newline
	if newline || !collecting {
		d.line = d.line[:0]
	}
	return true
}

// addParse adds s to parses, unless an equivalent parse is there.
func addParse(parses []parse, s parse) []parse {
	for _, o := range parses {
		if o.pos == s.pos && o.inNotice == s.inNotice && o.owesNewline == s.owesNewline {
			return parses
		}
	}
	parses = append(parses, s)
	if len(parses) > maxParses {
		least := slices.MinFunc(parses, comparePos).pos
		i := slices.IndexFunc(parses, func(o parse) bool { return o.pos == least })
		parses = slices.Delete(parses, i, i+1)
	}
	return parses
}

func comparePos(a, b parse) int { return cmp.Compare(a.pos, b.pos) }

// resolve confirms the echo and returns the notices on which all parses agree.
//
// A parse in which the whole echo has come back is believed at once, because the
// next byte may never come. The other parses are kept: the beginning of a notice
// may look like a short message.
func (d *decoder) resolve() []Notice {
	lead := slices.MaxFunc(d.parses, comparePos)
	complete := lead.pos == d.sent.end()
	if complete {
		d.confirm(lead.pos)
	} else {
		d.confirm(slices.MinFunc(d.parses, comparePos).pos)
	}

	var notices []Notice
	for _, n := range lead.pending {
		lacks := func(s parse) bool { return !slices.Contains(s.pending, n) }
		if !complete && slices.ContainsFunc(d.parses, lacks) {
			continue
		}
		for i := range d.parses {
			s := &d.parses[i]
			if at := slices.Index(s.pending, n); at >= 0 {
				s.pending = slices.Concat(s.pending[:at], s.pending[at+1:])
			}
		}
		notices = append(notices, n)
	}
	return notices
}

// finish ends the stream. It returns the notices that were still ambiguous and
// the number of bytes whose echo never came.
//
// If the echo is incomplete, it prefers a parse in which the server has announced
// the end of the connection.
func (d *decoder) finish() (notices []Notice, missing int) {
	best := slices.MaxFunc(d.parses, comparePos)
	if best.pos < d.sent.end() {
		announced := slices.DeleteFunc(slices.Clone(d.parses), func(s parse) bool {
			return !slices.ContainsFunc(s.pending, Notice.Ends)
		})
		if len(announced) > 0 {
			best = slices.MaxFunc(announced, comparePos)
		}
	}
	d.parses = []parse{{pos: best.pos}}
	d.confirm(best.pos)
	return best.pending, int(d.sent.end() - d.confirmed)
}

func (d *decoder) confirm(pos int64) { d.confirmed = max(d.confirmed, pos) }

// trim discards sent bytes that were taken and that no parse needs.
func (d *decoder) trim() {
	d.sent.discard(min(d.taken, slices.MinFunc(d.parses, comparePos).pos))
}

// corruption describes the bytes p that no parse allows. It takes the parse in
// which the echo has advanced most.
func (d *decoder) corruption(p []byte) *CorruptionError {
	got := p
	if len(d.line) > 0 {
		got = slices.Concat(d.line, p[1:])
	}
	pos := slices.MaxFunc(d.parses, comparePos).pos
	d.confirm(pos)
	want := d.sent.between(pos, min(pos+maxExcerpt, d.sent.end()))
	return &CorruptionError{
		Offset: pos,
		Want:   bytes.Clone(want),
		Got:    bytes.Clone(got[:min(maxExcerpt, len(got))]),
	}
}

// maxIdleSent is the capacity, in bytes, above which an empty sentBytes frees its
// memory.
const maxIdleSent = 256 << 10

// sentBytes holds the part of the sent stream that is still needed. Offsets count
// from the beginning of the stream. The zero value is an empty stream.
type sentBytes struct {
	buf   []byte // buf[head:] is needed
	head  int
	start int64 // offset of buf[head]
}

// end returns the offset after the last byte.
func (s *sentBytes) end() int64 { return s.start + int64(len(s.buf)-s.head) }

// between returns the bytes of [from, to). They are valid until the next append.
func (s *sentBytes) between(from, to int64) []byte {
	return s.buf[s.head+int(from-s.start) : s.head+int(to-s.start)]
}

// append adds p at the end. It moves the live bytes only if at least as many were
// discarded, or into a buffer of twice the size. So on average each byte is copied
// a constant number of times.
func (s *sentBytes) append(p []byte) {
	live := s.buf[s.head:]
	if s.head > 0 && len(s.buf)+len(p) > cap(s.buf) {
		if need := len(live) + len(p); len(live) > s.head || need > cap(s.buf) {
			s.buf = make([]byte, len(live), 2*need)
		}
		s.buf = s.buf[:copy(s.buf, live)]
		s.head = 0
	}
	s.buf = append(s.buf, p...)
}

// discard drops the bytes before offset to.
func (s *sentBytes) discard(to int64) {
	s.head += int(to - s.start)
	s.start = to
	if s.head == len(s.buf) {
		s.buf, s.head = s.buf[:0], 0
		if cap(s.buf) > maxIdleSent {
			s.buf = nil
		}
	}
}

// truncate drops the last n bytes.
func (s *sentBytes) truncate(n int) { s.buf = s.buf[:len(s.buf)-n] }
