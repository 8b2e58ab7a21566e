package server

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

// drainNotice is the notice of a drain that ends after left.
func drainNotice(reason string, deadline time.Time, left time.Duration) Notice {
	return Notice{Kind: NoticeDrain, Reason: reason, Deadline: deadline, Left: left}
}

func TestLineNotifier(t *testing.T) {
	deadline := time.Date(2026, 11, 23, 12, 0, 4, 1, time.FixedZone("", 3600))
	for template, want := range map[string]string{
		DefaultNoticeTemplate:  "SHUTDOWN 5 TERM\n",
		"SHUTDOWN":             "SHUTDOWN",
		"":                     "",
		`{deadline}\r\n`:       "2026-11-23T11:00:04Z\r\n",
		"{seconds}{seconds}":   "55",
		`\x00\u00e9\t{}{A}{ a`: "\x00é\t{}{A}{ a",
		`\xff`:                 "\xff",
		`\\{reason}`:           `\TERM`,
	} {
		t.Run("renders "+template, func(t *testing.T) {
			n, err := ParseLineNotifier(template)
			if err != nil {
				t.Fatal(err)
			}
			wantEqual(t, "notice", string(n.Notice(drainNotice("TERM", deadline, 4001*time.Millisecond))), want)
		})
	}

	n := DefaultLineNotifier()
	for what, tt := range map[string]struct {
		notice Notice
		want   string
	}{
		"a pause":               {Notice{Kind: NoticeReject, Rejected: ReasonRejectedPaused}, "PAUSED\n"},
		"the limit":             {Notice{Kind: NoticeReject, Rejected: ReasonRejectedLimit}, "BUSY\n"},
		"a drain that is over":  {Notice{Kind: NoticeReject, Rejected: ReasonRejectedDraining, Reason: "x"}, "SHUTDOWN 0 x\n"},
		"an operator's message": {Notice{Kind: NoticeMessage, Text: "hello"}, "NOTICE hello\n"},
		"a message in mid-line": {Notice{Kind: NoticeMessage, Text: "hello", MidLine: true}, "\nNOTICE hello\n"},
	} {
		t.Run("tells of "+what, func(t *testing.T) { wantEqual(t, "notice", string(n.Notice(tt.notice)), tt.want) })
	}

	t.Run("a template without a newline is sent as it is in mid-line too", func(t *testing.T) {
		n, err := ParseLineNotifier("SHUTDOWN")
		if err != nil {
			t.Fatal(err)
		}
		notice := drainNotice("x", deadline, 0)
		notice.MidLine = true
		wantEqual(t, "notice", string(n.Notice(notice)), "SHUTDOWN")
	})

	t.Run("rounds seconds up", func(t *testing.T) {
		for left, want := range map[time.Duration]string{
			-time.Hour: "0", 0: "0", 1: "1", time.Second: "1", time.Second + 1: "2", 90 * time.Minute: "5400",
		} {
			wantEqual(t, left.String(), string(n.Notice(drainNotice("", deadline, left))), "SHUTDOWN "+want+" \n")
		}
	})

	t.Run("does not expand placeholders in the reason", func(t *testing.T) {
		wantEqual(t, "notice", string(n.Notice(drainNotice("{seconds}", deadline, 0))), "SHUTDOWN 0 {seconds}\n")
	})

	t.Run("cuts a reason that is repeated too often", func(t *testing.T) {
		n, err := ParseLineNotifier(strings.Repeat("{reason}", 100))
		if err != nil {
			t.Fatal(err)
		}
		got := n.Notice(drainNotice(strings.Repeat("é", 500), deadline, 0))
		if len(got) > maxRendered || len(got) < maxRendered/2 || !utf8.Valid(got) {
			t.Errorf("the notice has %d bytes, valid: %t; want at most %d, all valid", len(got), utf8.Valid(got), maxRendered)
		}
	})

	for template, want := range map[string]string{
		`{sseconds}`:              "unknown placeholder {sseconds}",
		`\q`:                      `bad escape at "\\q"`,
		`ends in \`:               "bad escape",
		"\xff":                    "not valid UTF-8",
		strings.Repeat("x", 1025): "at most 1024",
	} {
		t.Run("a bad template is refused: "+want, func(t *testing.T) {
			n, err := ParseLineNotifier(template)
			wantErrText(t, "ParseLineNotifier", err, want)
			if n != nil {
				t.Error("there is a notifier beside the error")
			}
		})
	}
}

func TestCheckText(t *testing.T) {
	for _, good := range []string{"", "backup", "sauvegarde à midi", strings.Repeat("x", 1024)} {
		if err := CheckText(good); err != nil {
			t.Errorf("CheckText(%q): %v", good, err)
		}
	}
	for bad, want := range map[string]string{
		"a\nb": "control character", "a\rb": "control character", "\x1b[2J": "control character", "\u0085": "control character",
		"a\u2028b": "control character", "a\u202eb": "control character",
		"\xff": "not valid UTF-8", strings.Repeat("x", 1025): "at most 1024",
	} {
		wantErrText(t, "CheckText", CheckText(bad), want)
	}
}

func FuzzParseLineNotifier(f *testing.F) {
	for _, seed := range []string{DefaultNoticeTemplate, "SHUTDOWN", "", `{seconds} {reason} {deadline}\r\n`, `\x7breason}`, "é{}", `\xff`, "\xff"} {
		f.Add(seed)
	}
	notice := drainNotice("why", time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC), time.Second)
	f.Fuzz(func(t *testing.T, template string) {
		plain := !strings.ContainsAny(template, `\{`)
		n, err := ParseLineNotifier(template)
		if err != nil {
			if n != nil {
				t.Error("there is a notifier beside the error")
			}
			if plain && utf8.ValidString(template) && len(template) <= maxNotice {
				t.Errorf("plain text %q is refused: %v", template, err)
			}
			return
		}
		got := string(n.Notice(notice))
		if plain && got != template {
			t.Errorf("plain text %q is sent as %q", template, got)
		}
		for _, open := range []string{"{seconds}", "{reason}", "{deadline}"} {
			if strings.Contains(got, open) && !strings.Contains(got, "{"+open) && strings.Count(n.template, "{") == strings.Count(n.template, open) {
				t.Errorf("notice %q is sent with an open placeholder: %q", template, got)
			}
		}
		if again := string(n.Notice(notice)); again != got {
			t.Errorf("rendered twice: %q and %q", got, again)
		}
	})
}
