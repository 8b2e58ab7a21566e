package server

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// A Notifier encodes the server's own messages to a client in the client's protocol. Notice returns nil to send
// nothing. The server sends the bytes between two writes of the handler, never inside one. Notice is called
// concurrently and must not block.
type Notifier interface {
	Notice(n Notice) []byte
}

// NotifierFunc makes a function a Notifier.
type NotifierFunc func(n Notice) []byte

// Notice calls f.
func (f NotifierFunc) Notice(n Notice) []byte { return f(n) }

// NoticeKind is the kind of a notice.
type NoticeKind int

const (
	// NoticeDrain: the connection is being drained. Each client is told once.
	NoticeDrain NoticeKind = iota + 1
	// NoticeReject: the connection is not served. It is closed afterwards.
	NoticeReject
	// NoticeMessage: an operator has a message for the client (Server.Notify).
	NoticeMessage
)

// Notice is a message of the server itself to a client.
type Notice struct {
	Kind NoticeKind
	// Rejected is why the connection is not served, for NoticeReject.
	Rejected Reason
	// Reason and Deadline are those of the drain, for NoticeDrain and for ReasonRejectedDraining. The reason of an
	// eviction is that of the pause, or "evicted"; that of a connection's age is "max-age".
	Reason   string
	Deadline time.Time
	// Left is the time until Deadline.
	Left time.Duration
	// Closed is the close reason at Deadline, for NoticeDrain: ReasonDeadline if the server stops,
	// ReasonEvicted or ReasonMaxAge if only the connection ends.
	Closed Reason
	// Text is the operator's message: one line of printable text, for NoticeMessage.
	Text string
	// MidLine means that the last byte sent to this client was not a newline.
	MidLine bool
}

// silentNotifier sends nothing.
type silentNotifier struct{}

func (silentNotifier) Notice(Notice) []byte { return nil }

// DefaultNoticeTemplate is the template of the notice that LineNotifier sends on a drain.
const DefaultNoticeTemplate = `SHUTDOWN {seconds} {reason}\n`

// Rejections and messages of LineNotifier.
const (
	linePaused  = "PAUSED\n"
	lineBusy    = "BUSY\n"
	wordMessage = "NOTICE"
)

// Bounds in bytes, far below what the send buffer of a fresh connection takes at once.
const (
	maxNotice   = 1024 // of a template, of a reason, and of an operator's text
	maxRendered = 4096 // of a notice in which the reason is repeated
)

// LineNotifier speaks the echo daemon's line protocol: SHUTDOWN, PAUSED, BUSY and NOTICE. If the last byte sent to the
// client was not a newline, a newline goes first, so that each notice is a line of its own. It is immutable.
type LineNotifier struct {
	template string // parsed; with placeholders
}

var placeholder = regexp.MustCompile(`\{[a-z]+\}`)

// ParseLineNotifier makes a LineNotifier whose notice of a drain follows template. {seconds} is the grace period that
// is left, rounded up to whole seconds, {reason} the reason of the drain and {deadline} its end (RFC 3339, UTC).
// Escapes are Go's. A template that does not end in a newline is sent exactly as it is, and an empty one sends nothing.
func ParseLineNotifier(template string) (*LineNotifier, error) {
	if len(template) > maxNotice {
		return nil, fmt.Errorf("notice has %d bytes: at most %d are allowed", len(template), maxNotice)
	}
	if !utf8.ValidString(template) {
		return nil, fmt.Errorf("notice %q is not valid UTF-8: write other bytes as escapes", template)
	}
	var text strings.Builder
	for rest := template; rest != ""; {
		r, multibyte, tail, err := strconv.UnquoteChar(rest, 0)
		if err != nil {
			return nil, fmt.Errorf("notice %q: bad escape at %q", template, rest)
		}
		if multibyte {
			text.WriteRune(r)
		} else {
			text.WriteByte(byte(r))
		}
		rest = tail
	}
	for _, p := range placeholder.FindAllString(text.String(), -1) {
		if p != "{seconds}" && p != "{reason}" && p != "{deadline}" {
			return nil, fmt.Errorf("notice %q: unknown placeholder %s: want {seconds}, {reason} or {deadline}",
				template, p)
		}
	}
	return &LineNotifier{template: text.String()}, nil
}

// DefaultLineNotifier returns the LineNotifier of DefaultNoticeTemplate.
func DefaultLineNotifier() *LineNotifier {
	return &LineNotifier{template: "SHUTDOWN {seconds} {reason}\n"}
}

// Notice implements Notifier.
func (l *LineNotifier) Notice(n Notice) []byte {
	var text string
	switch {
	case n.Kind == NoticeDrain || n.Rejected == ReasonRejectedDraining:
		text = l.render(n)
	case n.Kind == NoticeMessage:
		text = wordMessage + " " + n.Text + "\n"
	case n.Rejected == ReasonRejectedPaused:
		text = linePaused
	case n.Rejected == ReasonRejectedDenied:
		return nil // a denied client gets no information
	default:
		text = lineBusy
	}
	if n.MidLine && strings.HasSuffix(text, "\n") {
		text = "\n" + text
	}
	return []byte(text)
}

// render fills in the template. If the template repeats the reason, render cuts the reason so that the notice has at
// most maxRendered bytes.
func (l *LineNotifier) render(n Notice) string {
	seconds := max(0, int64(math.Ceil(n.Left.Seconds())))
	text := strings.ReplaceAll(l.template, "{seconds}", strconv.FormatInt(seconds, 10))
	text = strings.ReplaceAll(text, "{deadline}", n.Deadline.UTC().Format(time.RFC3339))
	reason := n.Reason
	if places := strings.Count(text, "{reason}"); places > 1 {
		most := max(0, (maxRendered-len(text))/places)
		for len(reason) > most {
			_, size := utf8.DecodeLastRuneInString(reason)
			reason = reason[:len(reason)-size]
		}
	}
	return strings.ReplaceAll(text, "{reason}", reason) // last, because a reason may contain braces
}

// CheckText returns an error if s cannot be a part of a notice. Clients read notices as lines, and
// operators read them on terminals: s must be one line of at most 1,024 bytes of UTF-8, without control characters,
// line separators and marks that change the direction of text.
func CheckText(s string) error {
	switch {
	case len(s) > maxNotice:
		return fmt.Errorf("it has %d bytes: at most %d are allowed", len(s), maxNotice)
	case !utf8.ValidString(s):
		return fmt.Errorf("%q is not valid UTF-8", s)
	case strings.ContainsFunc(s, isUnsafe):
		return fmt.Errorf("%q has a control character: it must be one line of text", s)
	}
	return nil
}

// isUnsafe reports whether r could change what a reader of a terminal or of a line protocol sees.
func isUnsafe(r rune) bool {
	return unicode.IsControl(r) || unicode.In(r, unicode.Zl, unicode.Zp, unicode.Bidi_Control)
}
