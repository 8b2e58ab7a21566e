package client

import (
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

func TestParseNotice(t *testing.T) {
	tests := []struct {
		line string
		want Notice
	}{
		{"SHUTDOWN 5 SIGTERM", Notice{NoticeShutdown, 5 * time.Second, "SIGTERM"}},
		{"SHUTDOWN 0 operator said so", Notice{NoticeShutdown, 0, "operator said so"}},
		{"SHUTDOWN 9223372036 x", Notice{NoticeShutdown, 9223372036 * time.Second, "x"}},
		{"SHUTDOWN 5 ", Notice{NoticeShutdown, 5 * time.Second, ""}},
		{"PAUSED", Notice{Kind: NoticePaused}},
		{"BUSY", Notice{Kind: NoticeBusy}},
		{"NOTICE backup\tat noon, déjà vu", Notice{Kind: NoticeMessage, Text: "backup\tat noon, déjà vu"}},
		{"NOTICE ", Notice{Kind: NoticeMessage}},
	}
	for _, tt := range tests {
		got, ok := ParseNotice(tt.line)
		if diff := cmp.Diff(tt.want, got); !ok || diff != "" {
			t.Errorf("ParseNotice(%q) = %v, %v (-want +got):\n%s", tt.line, got, ok, diff)
		}
		if got.String() != tt.line {
			t.Errorf("String() = %q, want %q", got, tt.line)
		}
		for i := range len(tt.line) + 1 {
			if !mayBecomeNotice([]byte(tt.line[:i])) {
				t.Errorf("mayBecomeNotice(%q) = false", tt.line[:i])
			}
		}
	}
}

func TestParseNoticeInvalid(t *testing.T) {
	for _, line := range []string{
		"", "hello", "SHUTDOWN", "SHUTDOWN 5", "SHUTDOWN  x", "SHUTDOWN -1 x", "SHUTDOWN +1 x", "SHUTDOWN 05 x",
		"SHUTDOWN 1.5 x", "SHUTDOWN 9223372037 x", "SHUTDOWN 99999999999999999999 x", "SHUTDOWN 5 a\x1b[2J",
		"PAUSED ", "PAUSED\r", "BUSY now", "paused", "NOTICE", "NOTICED x", "NOTICE a\nb",
		"NOTICE " + strings.Repeat("x", maxNotice),
	} {
		if n, ok := ParseNotice(line); ok {
			t.Errorf("ParseNotice(%q) = %v", line, n)
		}
	}
}

func TestMayBecomeNoticeInvalid(t *testing.T) {
	for _, line := range []string{"x", "SHUTX", "SHUTDOWN x", "SHUTDOWN  ", "SHUTDOWN 12345678901", "PAUSED ", "BUSYB", "NOTICES"} {
		if mayBecomeNotice([]byte(line)) {
			t.Errorf("mayBecomeNotice(%q) = true", line)
		}
	}
}

func TestParseNoticeRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		line := rapid.StringMatching(`(SHUTDOWN|NOTICE|BUSY|PAUSED)( [0-9]{1,11})?( .{0,8})?`).Draw(t, "line")
		if n, ok := ParseNotice(line); ok && n.String() != line {
			t.Fatalf("ParseNotice(%q).String() = %q", line, n)
		}
	})
}

func TestNoticeKind(t *testing.T) {
	if got := NoticeKind(0).String(); got != "NoticeKind(0)" {
		t.Errorf("NoticeKind(0).String() = %q", got)
	}
	for kind, ends := range map[NoticeKind]bool{NoticeShutdown: true, NoticePaused: true, NoticeBusy: true, NoticeMessage: false} {
		if got := (Notice{Kind: kind}).Ends(); got != ends {
			t.Errorf("%v ends = %v, want %v", kind, got, ends)
		}
	}
}

func TestErrors(t *testing.T) {
	end := &EndError{Missing: 3, Err: io.ErrUnexpectedEOF}
	tests := []struct {
		err  error
		want string
	}{
		{&EndError{Err: io.EOF}, "server closed the connection"},
		{end, "server closed the connection (bytes not echoed: 3)"},
		{&EndError{Err: errors.New("network is unreachable")}, "connection lost: network is unreachable"},
		{&NoticeError{Notice: Notice{NoticeShutdown, 5 * time.Second, "SIGTERM"}}, "server is shutting down (SIGTERM)"},
		{&NoticeError{Notice: Notice{Kind: NoticeShutdown}}, "server is shutting down"},
		{&NoticeError{Notice{Kind: NoticePaused}, end}, "server is paused: server closed the connection (bytes not echoed: 3)"},
		{&NoticeError{Notice: Notice{Kind: NoticeBusy}}, "server is at its connection limit"},
		{&CorruptionError{7, []byte("a"), []byte("b")}, `echo differs at offset 7: got "b", want "a"`},
	}
	for _, tt := range tests {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("%#v: %q, want %q", tt.err, got, tt.want)
		}
	}
	if err := error(&NoticeError{Notice{Kind: NoticePaused}, end}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%v does not match io.ErrUnexpectedEOF", err)
	}
}
