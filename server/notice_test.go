package server

import (
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestNoticeRendersItsPlaceholders(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.FixedZone("", 3600))
	for template, want := range map[string]string{
		DefaultNoticeTemplate:  "SHUTDOWN 5 TERM\n",
		"SHUTDOWN":             "SHUTDOWN",
		"":                     "",
		`{deadline}\r\n`:       "2026-11-23T11:00:05Z\r\n",
		"{seconds}{seconds}":   "55",
		`\x00\u00e9\t{}{A}{ a`: "\x00é\t{}{A}{ a",
		`\xff`:                 "\xff",
		`\\{reason}`:           `\TERM`,
	} {
		n, err := ParseLineNotifier(template)
		if err != nil {
			t.Errorf("ParseLineNotifier(%q): %v", template, err)
			continue
		}
		if got := string(n.render(drainNotice("TERM", now.Add(4001*time.Millisecond), 4001*time.Millisecond))); got != strings.ReplaceAll(want, "00:05Z", "00:04Z") {
			t.Errorf("notice %q renders as %q, want %q", template, got, want)
		}
	}
}

func drainNotice(reason string, deadline time.Time, left time.Duration) Notice {
	return Notice{Kind: NoticeDrain, Reason: reason, Deadline: deadline, Left: left}
}

func TestNoticeRoundsSecondsUp(t *testing.T) {
	n, err := ParseLineNotifier("{seconds}")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for left, want := range map[time.Duration]string{
		-time.Hour: "0", 0: "0", 1: "1", time.Second: "1", time.Second + 1: "2", 90 * time.Minute: "5400",
	} {
		if got := string(n.render(drainNotice("", now, left))); got != want {
			t.Errorf("with %v left the notice says %s seconds, want %s", left, got, want)
		}
	}
}

// A reason is text of an operator's: what looks like a placeholder in it is not one.
func TestNoticeDoesNotExpandItsReason(t *testing.T) {
	n, err := ParseLineNotifier("{reason}")
	if err != nil {
		t.Fatal(err)
	}
	if got := string(n.render(drainNotice("{seconds}", time.Now(), 0))); got != "{seconds}" {
		t.Errorf("reason {seconds} renders as %q", got)
	}
}

func TestParseNoticeRefuses(t *testing.T) {
	for template, want := range map[string]string{
		`{sseconds}`:              "unknown placeholder {sseconds}",
		`\q`:                      `bad escape at "\\q"`,
		`ends in \`:               "bad escape",
		"\xff":                    "not valid UTF-8",
		strings.Repeat("x", 1025): "at most 1024",
	} {
		n, err := ParseLineNotifier(template)
		wantErrText(t, "ParseLineNotifier", err, want)
		if n != nil {
			t.Errorf("ParseLineNotifier(%q) returned a notice beside its error", template)
		}
	}
}

func TestCheckTextWantsOneLineOfText(t *testing.T) {
	for _, good := range []string{"", "backup", "sauvegarde à midi", strings.Repeat("x", 1024)} {
		if err := CheckText(good); err != nil {
			t.Errorf("CheckText(%q): %v", good, err)
		}
	}
	for bad, want := range map[string]string{
		"a\nb": "control character", "a\rb": "control character", "\x1b[2J": "control character", "\u0085": "control character",
		"\xff": "not valid UTF-8", strings.Repeat("x", 1025): "at most 1024",
	} {
		wantErrText(t, "CheckText", CheckText(bad), want)
	}
}

func FuzzParseNotice(f *testing.F) {
	for _, seed := range []string{DefaultNoticeTemplate, "SHUTDOWN", "", `{seconds} {reason} {deadline}\r\n`, `\x7breason}`, "é{}", `\xff`, "\xff"} {
		f.Add(seed)
	}
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, template string) {
		n, err := ParseLineNotifier(template)
		if err != nil {
			if n != nil {
				t.Error("a notice beside an error")
			}
			if plain := !strings.ContainsAny(template, `\{`) && utf8.ValidString(template) && len(template) <= maxNotice; plain {
				t.Errorf("plain text %q is refused: %v", template, err)
			}
			return
		}
		got := string(n.render(drainNotice("why", now, time.Second)))
		if !strings.ContainsAny(template, `\{`) && got != template {
			t.Errorf("plain text %q is sent as %q", template, got)
		}
		for _, left := range []string{"{seconds}", "{reason}", "{deadline}"} {
			if strings.Contains(got, left) && !strings.Contains(got, "{"+left) && strings.Count(n.template, "{") == strings.Count(n.template, left) {
				t.Errorf("notice %q is sent with an open placeholder: %q", template, got)
			}
		}
		if again := string(n.render(drainNotice("why", now, time.Second))); again != got {
			t.Errorf("rendered twice: %q and %q", got, again)
		}
	})
}
