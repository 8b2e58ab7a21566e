package client

import (
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxNotice bounds a notice, in bytes without its newline. Otherwise a server
// that never ends the line could make the client use any amount of memory.
const maxNotice = 4 << 10

// A NoticeKind is the kind of a [Notice].
type NoticeKind int

// The kinds of notice. All but NoticeMessage announce the end of the connection.
const (
	NoticeShutdown NoticeKind = iota + 1 // the server is draining, or rejected the connection because it is
	NoticePaused                         // the server rejected the connection because it is paused
	NoticeBusy                           // the server rejected the connection because it is at its limit
	NoticeMessage                        // a message from the server's operator
)

// String returns the first word of the notice.
func (k NoticeKind) String() string {
	switch k {
	case NoticeShutdown:
		return "SHUTDOWN"
	case NoticePaused:
		return "PAUSED"
	case NoticeBusy:
		return "BUSY"
	case NoticeMessage:
		return "NOTICE"
	default:
		return "NoticeKind(" + strconv.Itoa(int(k)) + ")"
	}
}

// A Notice is a line that the server has inserted into the stream.
type Notice struct {
	Kind NoticeKind

	// Grace is the time until the server closes the connection, in whole seconds.
	// It is zero if the server rejected the connection. Only NoticeShutdown has it.
	Grace time.Duration

	// Text is the reason of a NoticeShutdown or the text of a NoticeMessage.
	Text string
}

// Ends reports whether the notice announces the end of the connection.
func (n Notice) Ends() bool { return n.Kind != NoticeMessage }

// String returns the notice in the form that the server sends, without the newline.
func (n Notice) String() string {
	switch n.Kind {
	case NoticeShutdown:
		return n.Kind.String() + " " + strconv.FormatInt(int64(n.Grace/time.Second), 10) + " " + n.Text
	case NoticeMessage:
		return n.Kind.String() + " " + n.Text
	default:
		return n.Kind.String()
	}
}

// ParseNotice parses a line without its newline. It reports false if the line is
// not a notice. A notice has at most 4 KiB and is valid UTF-8. It has no control
// characters other than tabs, because they could manipulate a terminal.
//
// A line of this form may also be an echo. Only a [Client] or a [Stream], which
// know what was sent, can tell.
func ParseNotice(line string) (Notice, bool) {
	if len(line) > maxNotice || !utf8.ValidString(line) || strings.ContainsFunc(line, isControl) {
		return Notice{}, false
	}
	word, rest, hasRest := strings.Cut(line, " ")
	switch {
	case word == NoticePaused.String() && !hasRest:
		return Notice{Kind: NoticePaused}, true
	case word == NoticeBusy.String() && !hasRest:
		return Notice{Kind: NoticeBusy}, true
	case word == NoticeMessage.String() && hasRest:
		return Notice{Kind: NoticeMessage, Text: rest}, true
	case word == NoticeShutdown.String():
		seconds, reason, ok := strings.Cut(rest, " ")
		if !ok {
			return Notice{}, false
		}
		grace, ok := parseSeconds(seconds)
		if !ok {
			return Notice{}, false
		}
		return Notice{Kind: NoticeShutdown, Grace: grace, Text: reason}, true
	}
	return Notice{}, false
}

func isControl(r rune) bool { return unicode.IsControl(r) && r != '\t' }

// parseSeconds parses decimal digits without a sign or leading zeros, within the
// range of a time.Duration.
func parseSeconds(s string) (time.Duration, bool) {
	n, err := strconv.ParseUint(s, 10, 63)
	if err != nil || n > math.MaxInt64/uint64(time.Second) || s[0] == '0' && s != "0" {
		return 0, false
	}
	return time.Duration(n) * time.Second, true
}

// mayBecomeNotice reports whether line may be the beginning of a notice. It may
// report true wrongly, but never false. It takes constant time, because the
// decoder calls it for every byte.
func mayBecomeNotice(line []byte) bool {
	const maxDigits = 10 // of the longest time.Duration in seconds
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
