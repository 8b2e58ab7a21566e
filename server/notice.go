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

// DefaultNotice is the template of the notice that a drain sends to every client.
const DefaultNotice = `SHUTDOWN {seconds} {reason}\n`

// What a rejected client is told.
const (
	noticePaused = "PAUSED\n"
	noticeBusy   = "BUSY\n"
)

// maxNotice bounds a template, a reason and an operator's text, in bytes. It is far below what a
// fresh connection's send buffer takes at once.
const maxNotice = 1024

// A Notice is a parsed template of what clients are sent when a drain begins. It is immutable.
type Notice struct{ template string }

var placeholder = regexp.MustCompile(`\{[a-z]+\}`)

// ParseNotice parses a template. {seconds} stands for the grace left, rounded up to whole seconds,
// {reason} for the drain's reason and {deadline} for its end (RFC 3339, UTC); escapes are Go's. A
// template that ends in a newline is sent as a line of its own; any other is sent exactly as it is,
// and an empty one sends nothing.
func ParseNotice(template string) (*Notice, error) {
	if len(template) > maxNotice {
		return nil, fmt.Errorf("notice of %d bytes: at most %d are allowed", len(template), maxNotice)
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
			return nil, fmt.Errorf("notice %q: unknown placeholder %s: want {seconds}, {reason} or {deadline}", template, p)
		}
	}
	return &Notice{template: text.String()}, nil
}

// render gives the bytes to send when the drain ends at deadline.
func (n *Notice) render(reason string, now, deadline time.Time) []byte {
	seconds := max(0, int64(math.Ceil(deadline.Sub(now).Seconds())))
	return []byte(strings.NewReplacer(
		"{seconds}", strconv.FormatInt(seconds, 10),
		"{reason}", reason,
		"{deadline}", deadline.UTC().Format(time.RFC3339),
	).Replace(n.template))
}

// CheckText returns an error that says what is wrong with s as a part of a notice: clients read
// notices as lines, so s must be one line of printable text of at most 1,024 bytes.
func CheckText(s string) error {
	switch {
	case len(s) > maxNotice:
		return fmt.Errorf("%d bytes: at most %d are allowed", len(s), maxNotice)
	case !utf8.ValidString(s):
		return fmt.Errorf("%q is not valid UTF-8", s)
	case strings.ContainsFunc(s, unicode.IsControl):
		return fmt.Errorf("%q has a control character: it must be one line of text", s)
	}
	return nil
}
