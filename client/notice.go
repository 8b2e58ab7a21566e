package client

import (
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxNotice bounds a notice line, in bytes without its newline. It keeps a
// server that never ends its line from growing the client's memory.
const maxNotice = 4 << 10

// NoticeKind says what a [Notice] is about.
type NoticeKind int

// The kinds of notice. All but Message mean that the server ends the
// connection.
const (
	Shutdown NoticeKind = iota + 1 // the server is draining, or refused the connection because it is
	Paused                         // the server refused the connection because it is paused
	Busy                           // the server refused the connection because it is at its limit
	Message                        // words from the server's operator
)

// String returns the word that begins the notice's line.
func (k NoticeKind) String() string {
	switch k {
	case Shutdown:
		return "SHUTDOWN"
	case Paused:
		return "PAUSED"
	case Busy:
		return "BUSY"
	case Message:
		return "NOTICE"
	default:
		return "NoticeKind(" + strconv.Itoa(int(k)) + ")"
	}
}

// A Notice is a line that the server put into the stream on its own account.
type Notice struct {
	Kind NoticeKind

	// Grace is the time, in whole seconds, that a Shutdown leaves before the
	// server closes the connection. Zero if the server had refused it.
	Grace time.Duration

	// Text is the reason of a Shutdown or the text of a Message, else empty.
	Text string
}

// Ends reports whether the notice announces the end of the connection.
func (n Notice) Ends() bool { return n.Kind != Message }

// String returns the notice as the server writes it, without the newline.
func (n Notice) String() string {
	switch n.Kind {
	case Shutdown:
		return n.Kind.String() + " " + strconv.FormatInt(int64(n.Grace/time.Second), 10) + " " + n.Text
	case Message:
		return n.Kind.String() + " " + n.Text
	default:
		return n.Kind.String()
	}
}

// ParseNotice reads a notice from a line without its newline. It reports false
// for any other line, for one longer than 4 KiB or not valid UTF-8, and for one
// that holds control characters other than tabs, which could play tricks on a
// terminal.
//
// A line of this form may just as well be an echo: only a [Client], which knows
// what it has sent, can tell the two apart.
func ParseNotice(line string) (Notice, bool) {
	if len(line) > maxNotice || !utf8.ValidString(line) || strings.ContainsFunc(line, isControl) {
		return Notice{}, false
	}
	word, rest, hasRest := strings.Cut(line, " ")
	switch {
	case word == Paused.String() && !hasRest:
		return Notice{Kind: Paused}, true
	case word == Busy.String() && !hasRest:
		return Notice{Kind: Busy}, true
	case word == Message.String() && hasRest:
		return Notice{Kind: Message, Text: rest}, true
	case word == Shutdown.String():
		seconds, reason, ok := strings.Cut(rest, " ")
		if !ok {
			return Notice{}, false
		}
		grace, ok := parseSeconds(seconds)
		if !ok {
			return Notice{}, false
		}
		return Notice{Kind: Shutdown, Grace: grace, Text: reason}, true
	}
	return Notice{}, false
}

func isControl(r rune) bool { return unicode.IsControl(r) && r != '\t' }

// parseSeconds accepts what a server prints: decimal digits without a sign or
// needless zeros, within the range of a time.Duration.
func parseSeconds(s string) (time.Duration, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil || n > math.MaxInt64/uint64(time.Second) || s[0] == '0' && s != "0" {
		return 0, false
	}
	return time.Duration(n) * time.Second, true
}

// mayBecomeNotice reports whether line, the beginning of a line, may grow into
// a notice. It never says no wrongly, and takes constant time for the sake of
// its caller, who asks after every byte.
func mayBecomeNotice(line []byte) bool {
	const maxDigits = 10 // those of the longest time.Duration in seconds
	if len(line) > maxNotice {
		return false
	}
	for _, head := range [...]string{"SHUTDOWN ", "PAUSED", "BUSY", "NOTICE "} {
		n := min(len(line), len(head))
		if string(line[:n]) != head[:n] {
			continue
		}
		switch rest := line[n:]; head {
		case "SHUTDOWN ":
			for i, c := range rest {
				if c < '0' || c > '9' {
					return c == ' ' && i > 0
				}
				if i >= maxDigits {
					return false
				}
			}
			return true
		case "NOTICE ":
			return true
		default:
			return len(rest) == 0
		}
	}
	return false
}
