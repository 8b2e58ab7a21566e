package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"echod/control"
	"echod/server"
)

// TestTablesFit: tables fit into 80 columns for any answer of the server, and --wide shows everything.
func TestTablesFit(t *testing.T) {
	long := control.Conn{
		ID: 12345678, Remote: "[2001:db8:1111:2222:3333:4444:5555:6666]:65535", Local: "[2001:db8::1]:9999", State: "rejecting",
		Opened: time.Now().Add(-1000 * time.Hour), IdleSeconds: 86399, BytesIn: 999999999, BytesOut: 1 << 60, Notified: true,
		Labels: map[string]string{server.LabelSubject: "CN=" + strings.Repeat("x", 100)},
	}
	usual := control.Conn{
		ID: 123456, Remote: "255.255.255.255:65535", State: "rejecting", Opened: long.Opened, IdleSeconds: 86399,
		BytesIn: 999999999, BytesOut: 1 << 60,
	}
	leaving := long
	leaving.Drain = &control.ConnDrain{Deadline: time.Now().Add(1000 * time.Hour), Reason: strings.Repeat("maintenance ", 20)}
	for name, conns := range map[string][]control.Conn{
		"long": {long, usual}, "usual": {usual}, "leaving": {leaving, long, usual},
	} {
		var out, wide bytes.Buffer
		if err := showConns(&out, conns, false); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(out.String()) {
			if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > tableWidth {
				t.Errorf("%s: a line has %d columns: %q", name, n, line)
			}
		}
		if name == "usual" && !strings.Contains(out.String(), "255.255.255.255:65535") {
			t.Errorf("%s: an IPv4 address was cut:\n%s", name, &out)
		}
		if err := showConns(&wide, conns, true); err != nil || strings.Contains(wide.String(), "…") {
			t.Errorf("with --wide: %v\n%s", err, &wide)
		}
	}
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0.0s", 99 * time.Millisecond: "0.0s", 59999 * time.Millisecond: "59.9s", time.Minute: "1m00s", 3599 * time.Second: "59m59s",
		26 * time.Hour: "26h00m", 47*time.Hour + 59*time.Minute: "47h59m", 48 * time.Hour: "2d00h", 999 * 24 * time.Hour: "999d00h",
	} {
		if got := age(d); got != want {
			t.Errorf("age(%s) is %q, want %q", d, got, want)
		}
	}
}
