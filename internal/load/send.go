package load

import (
	"errors"
	"time"
)

// maxUnwritten is how much may wait for room in a connection, in bytes, before no
// more messages are made.
const maxUnwritten = 256 << 10

// maxLate is up to how much may be under way on a connection, in bytes, if some of
// it is late; it is at least twice what may be under way otherwise.
const maxLate = 4 << 20

// send begins as many messages as may be under way and are due, and writes, as long
// as the connection takes them.
func (u *user) send(now time.Duration) {
	if u.phase != serving {
		u.write(now)
		return
	}
	for u.begin(now) {
		if u.write(now); u.phase != serving || len(u.check.unwritten(u.written)) > 0 {
			break
		}
	}
	if u.phase == serving && u.loop.ending && !u.waiting() {
		u.leave(byEnd, now)
	}
}

// begin begins messages that are due, as many as there is room for at once, and
// reports whether there is something to write.
func (u *user) begin(now time.Duration) bool {
	for room := u.room(); room > 0 && len(u.check.unwritten(u.written)) < maxUnwritten; room-- {
		due, ok := u.next(now)
		if !ok {
			break
		}
		if u.check.outstanding() == 0 {
			u.asked = now
		}
		u.check.begin(due)
	}
	return len(u.check.unwritten(u.written)) > 0
}

// room is how many more messages may be under way. What is late holds up no others,
// until there is so much of it that to keep more would cost too much memory.
func (u *user) room() int {
	opts := &u.loop.run.opts
	holding := u.check.outstanding()
	if holding*opts.Size < max(maxLate, 2*opts.Pipeline*opts.Size) {
		holding -= u.overdue
	}
	return opts.Pipeline - holding
}

// next takes the next message that is due.
func (u *user) next(now time.Duration) (due time.Duration, ok bool) {
	l := u.loop
	switch {
	case len(u.again) > 0:
		due, u.again = u.again[0], u.again[1:]
		return due, true
	case l.run.opts.Rate > 0:
		if u.taken == u.fallen {
			return 0, false
		}
		u.taken++
		return l.run.schedule.due(u.index, u.taken-1), true
	}
	return now, !l.ending
}

// write writes what is to be sent, as far as there is room.
func (u *user) write(now time.Duration) {
	p := u.check.unwritten(u.written)
	if len(p) == 0 {
		return
	}
	n, err := u.socket.write(p)
	u.written += int64(n)
	size := int64(u.loop.run.opts.Size)
	begun := (u.written + size - 1) / size
	u.loop.tally.Echoes.Sent += begun - u.counted
	u.counted = begun
	if err != nil && !errors.Is(err, errWouldBlock) {
		return // reading tells why, after what came before
	}
	if err := u.socket.awaitRoom(n < len(p)); err != nil {
		u.ended(err, now)
	}
}
