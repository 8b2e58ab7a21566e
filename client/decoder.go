package client

import (
	"bytes"
	"cmp"
	"slices"
)

const (
	// maxReadings bounds what a decoder keeps in mind. It is reached only by
	// several sent lines in a row that are notices by their form; the readings
	// in which the echo has come furthest are kept then.
	maxReadings = 8

	// maxShown bounds the excerpts, in bytes, that a CorruptionError holds.
	maxShown = 32
)

// A decoder tells echoes from notices in the stream that a server sends. It does
// no input or output of its own: expect tells it what is being sent, feed gives
// it what was received, and take hands out the echoes.
//
// What is received is what was sent, with notices inserted: each a line of its
// own, with a newline before it if the byte before that was not one. Where the
// client itself sends lines that look like notices, or empty lines, the first
// bytes received can often be read in more than one way. So the decoder follows
// every possible reading, byte by byte, and drops each at the first byte that
// contradicts it. Nearly always there is just one.
//
// Since an echo is known beforehand, its bytes are right in whichever reading.
// Readings differ in how far the echo has come, and in what is a notice.
type decoder struct {
	sent      sentBytes
	confirmed int64 // offset up to which the echo is taken to have come back
	taken     int64 // offset up to which it was handed out

	readings []reading // never empty
	spare    []reading // the memory of the previous readings

	midLine bool   // the last byte received was not a newline
	line    []byte // the line being received, while a reading takes it for a notice
}

// A reading is one way to understand everything received so far.
type reading struct {
	pos int64 // how much of what was sent has come back

	// inNotice says that the line being received is a notice.
	inNotice bool

	// owed says that the last newline counted in pos was really the one that
	// goes before a notice. The newline that was sent comes after the notices.
	owed bool

	// pending are notices of this reading not yet reported, as other readings
	// have none of them. It is never appended to in place: readings share it.
	pending []Notice
}

func newDecoder() *decoder { return &decoder{readings: []reading{{}}} }

// expect says that p is about to be sent.
func (d *decoder) expect(p []byte) { d.sent.append(p) }

// retract takes back the last n bytes expected, which were not sent after all.
func (d *decoder) retract(n int) {
	arrived := max(d.confirmed, slices.MaxFunc(d.readings, byPos).pos)
	d.sent.truncate(min(n, int(d.sent.end()-arrived)))
}

// outstanding returns the number of bytes sent whose echo was not handed out.
func (d *decoder) outstanding() int { return int(d.sent.end() - d.taken) }

// ready returns the echo that has come back and was not handed out, valid until
// the next call of another method.
func (d *decoder) ready() []byte { return d.sent.between(d.taken, d.confirmed) }

// take hands out the first n bytes of ready.
func (d *decoder) take(n int) {
	d.taken += int64(n)
	d.trim()
}

// feed takes in what was received, and returns the notices found in it. Its
// error is a *CorruptionError, after which the decoder must not be fed again.
func (d *decoder) feed(p []byte) ([]Notice, error) {
	var notices []Notice
	for len(p) > 0 {
		if n := d.run(p); n > 0 {
			p = p[n:]
			continue
		}
		if !d.step(p[0]) {
			return notices, d.corrupted(p)
		}
		if p[0] == '\n' {
			notices = append(notices, d.settle()...)
		}
		p = p[1:]
	}
	notices = append(notices, d.settle()...)
	d.trim()
	return notices, nil
}

// run is the fast way through the middle of a line, where a single reading can
// only go on matching. It returns how much of p it has matched.
func (d *decoder) run(p []byte) int {
	r := &d.readings[0]
	if len(d.readings) > 1 || r.inNotice || !d.midLine {
		return 0
	}
	if i := bytes.IndexByte(p, '\n'); i >= 0 {
		p = p[:i]
	}
	want := d.sent.between(r.pos, d.sent.end())
	n := min(len(p), len(want))
	if !bytes.Equal(p[:n], want[:n]) {
		n = 0
		for p[n] == want[n] {
			n++
		}
	}
	r.pos += int64(n)
	return n
}

// step takes every reading one byte further. It reports false, and leaves the
// readings as they were, if none can go on.
func (d *decoder) step(c byte) bool {
	lineStart := !d.midLine
	var mayBecome, isNotice bool
	var notice Notice
	if lineStart || len(d.line) > 0 {
		if c == '\n' {
			notice, isNotice = ParseNotice(string(d.line))
		}
		d.line = append(d.line, c)
		mayBecome = c != '\n' && mayBecomeNotice(d.line)
	}

	next := d.spare[:0]
	collecting := false
	keep := func(r reading) {
		collecting = collecting || r.inNotice
		if lineStart || c == '\n' {
			next = addReading(next, r)
		} else { // in mid-line readings neither fork nor meet
			next = append(next, r)
		}
	}
	for _, r := range d.readings {
		if r.inNotice {
			if mayBecome {
				keep(r)
			} else if isNotice {
				keep(reading{pos: r.pos, owed: r.owed, pending: append(slices.Clip(r.pending), notice)})
			}
			continue
		}
		newline := c == '\n'
		switch {
		case r.owed:
			// Only the newline that is owed may come, or another notice.
			if newline {
				keep(reading{pos: r.pos, pending: r.pending})
			}
		case r.pos < d.sent.end() && d.sent.between(r.pos, r.pos+1)[0] == c:
			keep(reading{pos: r.pos + 1, pending: r.pending})
			if newline && !lineStart {
				keep(reading{pos: r.pos + 1, pending: r.pending, owed: true, inNotice: true})
			}
		case newline && !lineStart:
			keep(reading{pos: r.pos, pending: r.pending, inNotice: true})
		}
		if lineStart && mayBecome {
			r.inNotice = true
			keep(r)
		}
	}
	if len(next) == 0 {
		return false
	}
	d.readings, d.spare = next, d.readings
	d.midLine = c != '\n'
	if c == '\n' || !collecting {
		d.line = d.line[:0]
	}
	return true
}

// addReading adds r to readings unless one is there that will go the same way.
func addReading(readings []reading, r reading) []reading {
	for _, o := range readings {
		if o.pos == r.pos && o.inNotice == r.inNotice && o.owed == r.owed {
			return readings
		}
	}
	readings = append(readings, r)
	if len(readings) > maxReadings {
		hindmost := slices.MinFunc(readings, byPos).pos
		i := slices.IndexFunc(readings, func(o reading) bool { return o.pos == hindmost })
		readings = slices.Delete(readings, i, i+1)
	}
	return readings
}

func byPos(a, b reading) int { return cmp.Compare(a.pos, b.pos) }

// settle confirms the echo and returns the notices on which all readings agree.
//
// A reading in which everything sent has come back is believed: its caller must
// not wait for a next byte that may never come. The others are kept all the same,
// for the beginning of a notice may look like the whole of a short message.
func (d *decoder) settle() []Notice {
	lead := slices.MaxFunc(d.readings, byPos)
	complete := lead.pos == d.sent.end()
	if complete {
		d.confirm(lead.pos)
	} else {
		d.confirm(slices.MinFunc(d.readings, byPos).pos)
	}

	var notices []Notice
	for _, n := range lead.pending {
		lacks := func(r reading) bool { return !slices.Contains(r.pending, n) }
		if !complete && slices.ContainsFunc(d.readings, lacks) {
			continue
		}
		for i := range d.readings {
			r := &d.readings[i]
			if at := slices.Index(r.pending, n); at >= 0 {
				r.pending = slices.Concat(r.pending[:at], r.pending[at+1:])
			}
		}
		notices = append(notices, n)
	}
	return notices
}

// finish says that nothing more will be received. It returns the notices that
// had been in doubt and the number of bytes whose echo never came.
//
// If not everything has come back, a reading in which the server has said that
// it ends the connection is the likeliest.
func (d *decoder) finish() (notices []Notice, missing int) {
	best := slices.MaxFunc(d.readings, byPos)
	if best.pos < d.sent.end() {
		told := slices.Clone(d.readings)
		told = slices.DeleteFunc(told, func(r reading) bool {
			return !slices.ContainsFunc(r.pending, Notice.Ends)
		})
		if len(told) > 0 {
			best = slices.MaxFunc(told, byPos)
		}
	}
	d.readings = []reading{{pos: best.pos}}
	d.confirm(best.pos)
	return best.pending, int(d.sent.end() - d.confirmed)
}

func (d *decoder) confirm(pos int64) { d.confirmed = max(d.confirmed, pos) }

// trim forgets what was handed out and is needed by no reading.
func (d *decoder) trim() {
	d.sent.discard(min(d.taken, slices.MinFunc(d.readings, byPos).pos))
}

// corrupted believes the reading that had come furthest, and describes what came
// instead of its echo, of which the last part is p.
func (d *decoder) corrupted(p []byte) *CorruptionError {
	got := p
	if len(d.line) > 0 {
		got = slices.Concat(d.line, p[1:])
	}
	pos := slices.MaxFunc(d.readings, byPos).pos
	d.confirm(pos)
	want := d.sent.between(pos, min(pos+maxShown, d.sent.end()))
	return &CorruptionError{
		Offset: pos,
		Want:   bytes.Clone(want),
		Got:    bytes.Clone(got[:min(maxShown, len(got))]),
	}
}
