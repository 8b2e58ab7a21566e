package load

import (
	"bytes"
	"time"

	"echod/client"
)

// maxNotice is the length, in bytes, of the longest notice.
const maxNotice = 4 << 10

// lines is what a checker keeps in mind while it reads line by line. A notice may
// split a message: "hel\nSHUTDOWN 5 SIGTERM\nlo\n" is the message "hello\n" and a
// notice, and so is "hello\nSHUTDOWN 5 SIGTERM\n\n".
type lines struct {
	reading bool
	line    []byte // what has come of the line

	// held is a line that is neither a message nor a notice. It is the first part
	// of a message if a notice comes next, and after it the rest.
	held      []byte
	holding   bool
	interrupt bool // a notice has come after it

	// owed says that the newline at the end of the last message was really the
	// one that goes before a notice: the message's own comes after it.
	owed, afterMessage bool

	junk int // bytes in a row that belong to no message
}

// begin starts to read line by line with what had come of a message.
// afterMessage says that one came before.
func (l *lines) begin(part []byte, afterMessage bool) {
	l.reading = true
	l.line = append(l.line[:0], part...)
	l.afterMessage = len(part) == 0 && (afterMessage || l.afterMessage)
}

// longest bounds what is kept of a line, in bytes.
func (c *checker) longest() int { return 8*c.size + maxNotice }

// feedLine takes what has come up to the end of the line, and returns the rest.
func (c *checker) feedLine(p []byte, now time.Duration) []byte {
	l := &c.lines
	i := bytes.IndexByte(p, '\n')
	if i < 0 {
		l.line = append(l.line, p...)
		if len(l.line) > c.longest() { // no line at all
			c.release()
			l.junk += len(l.line)
			l.line = l.line[:0]
		}
		return nil
	}
	l.line = append(l.line, p[:i+1]...)
	c.line(now)
	l.line = l.line[:0]
	l.reading = l.holding || l.owed || l.junk > 0 || c.broken > 0
	return p[i+1:]
}

// line takes the line that has come whole.
func (c *checker) line(now time.Duration) {
	l := &c.lines
	owed, afterMessage := l.owed, l.afterMessage
	l.owed, l.afterMessage = false, false

	if from, seq, ok := parse(l.line, c.size); ok {
		c.release()
		c.settle()
		c.message(from, seq, now)
		l.afterMessage = true
		return
	}
	text := l.line[:len(l.line)-1]
	if notice, ok := client.ParseNotice(string(text)); ok {
		l.interrupt = l.holding
		l.owed = owed || afterMessage
		c.onNotice(notice)
		return
	}
	if owed && len(text) == 0 {
		return
	}
	joined := l.line
	if l.holding && l.interrupt {
		l.held = append(l.held, l.line...)
		joined, l.holding = l.held, false
	} else {
		c.release()
	}
	// In what is longer, newlines may have gone, and the last message be whole.
	last := joined[max(0, len(joined)-c.size):]
	if from, seq, ok := parse(last, c.size); ok {
		l.junk += len(joined) - c.size
		c.settle()
		c.message(from, seq, now)
		l.afterMessage = true
		return
	}
	l.held = append(l.held[:0], joined[:len(joined)-1]...)
	l.holding, l.interrupt = true, false
	if len(l.held) > c.longest() {
		c.release()
	}
}

// release gives up the hope that the line that is held is part of a message.
func (c *checker) release() {
	l := &c.lines
	if l.holding {
		l.junk += len(l.held) + 1
		l.holding = false
	}
}

// settle counts for how many messages the broken bytes up to here would do: by their
// number, for a broken byte may have become a newline, or been one.
func (c *checker) settle() {
	l := &c.lines
	if l.junk > 0 {
		c.broken += int64(max(1, (l.junk+c.size/2)/c.size))
		l.junk = 0
	}
}

// endLines says that nothing more will come. What is shorter than a message then is
// one that was cut, and not broken.
func (c *checker) endLines() {
	l := &c.lines
	rest := len(l.line)
	switch {
	case l.holding && l.interrupt:
		rest += len(l.held) + 1
	case l.holding && len(l.held) > 0 && bytes.HasPrefix(c.sent[c.sentHead:], l.held): // with a part of a notice behind it
		rest = 0
	default:
		c.release()
	}
	if rest >= c.size {
		l.junk += rest
	}
	l.line, l.holding = l.line[:0], false
	c.settle()
}
