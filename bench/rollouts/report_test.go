package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestReport(t *testing.T) {
	r := &report{
		Date: time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC), Commit: "abc", Missing: []string{"nats-server"},
		Rows: []row{
			{"a", "upgrade", "", "why a", outcome{Connections: 60, OldGone: 0.2, Gap: 0.03}},
			{"b", "restart", "TLS", "why b", outcome{Closed: 1, Told: 2, Reset: 3, Refused: 4, Lost: 5, Gap: 6, OldGone: -1}},
			{"c", "kill and start", "", "The same.", outcome{Reset: 60, Failed: "it broke"}},
		},
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "rollouts.json")
	if err := r.save(path); err != nil {
		t.Fatal(err)
	}
	again, err := readReport(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.write(dir); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "comparison.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| a | upgrade |  | 0 | 0 | 0 | 0 | 0 | 30 ms | 200 ms |",
		"| b | restart | TLS | 1 | 2 | 3 | 4 | 5 | 6.0 s | not within the run |",
		"| c | kill and start |  | 0 | 0 | 60 | 0 | 0 |",
		"- **b, restart** (TLS): why b", "2026-01-02 at commit abc", "Not installed, and so not measured: nats-server.",
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the page lacks %q:\n%s", want, text)
		}
	}
	if svg, err := os.ReadFile(filepath.Join(dir, "comparison.svg")); err != nil || !strings.Contains(string(svg), "b, restart (TLS)") {
		t.Errorf("the picture lacks a case: %v", err)
	}
}

func TestCases(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range cases {
		if name := c.name(); seen[name] {
			t.Errorf("two cases are called %q", name)
		} else {
			seen[name] = true
		}
		if c.why == "" || (c.act == nil) == (c.run == nil) {
			t.Errorf("%s: needs an explanation and one way to run", c.name())
		}
	}
}
