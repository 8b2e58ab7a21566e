package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/template"
	"time"
)

// report is everything that was measured.
type report struct {
	Date     time.Time
	Commit   string
	Machine  string
	Versions []version
	Servers  []participant
	Missing  []string `json:",omitempty"`
	Rows     []row
}

type version struct{ Name, Version string }

type participant struct{ Name, About string }

type row struct {
	Server, Case, Clients, Why string
	Outcome                    outcome
}

func newReport(ctx context.Context, bin binaries) (*report, error) {
	r := &report{Date: time.Now().UTC(), Machine: fmt.Sprintf("%d CPUs, %s", runtime.NumCPU(), kernel())}
	line := func(program string, args ...string) string {
		out, err := exec.CommandContext(ctx, program, args...).CombinedOutput()
		if err != nil {
			return ""
		}
		first, _, _ := strings.Cut(string(out), "\n")
		return strings.TrimSpace(first)
	}
	r.Commit = line("git", "rev-parse", "--short", "HEAD")
	r.Versions = []version{
		{"echod", "commit " + r.Commit},
		{"Go", runtime.Version()},
		{"tableflip", line("go", "list", "-m", "-f", "{{.Version}}", "github.com/cloudflare/tableflip")},
	}
	for _, p := range []struct{ name, flag string }{
		{"nginx", "-v"}, {"haproxy", "-v"}, {"nats-server", "--version"}, {"python3", "--version"},
	} {
		if bin[p.name] != "" {
			r.Versions = append(r.Versions, version{p.name, line(bin[p.name], p.flag)})
		}
	}
	seen := map[string]bool{}
	for _, c := range cases {
		if !seen[c.server.name] {
			seen[c.server.name] = true
			r.Servers = append(r.Servers, participant{c.server.name, c.server.about})
		}
	}
	return r, nil
}

func kernel() string {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease") // empty where there is no /proc
	return "Linux " + strings.TrimSpace(string(release))
}

func readReport(path string) (*report, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &report{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

func (r *report) save(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

//go:embed comparison.md.tmpl
var pageText string

var page = template.Must(template.New("comparison.md").Funcs(template.FuncMap{
	"old": func(r row) string {
		switch {
		case strings.HasPrefix(r.Case, "pause"):
			return ""
		case r.Outcome.OldGone < 0:
			return "not within the run"
		}
		return seconds(r.Outcome.OldGone)
	},
	"gap": func(o outcome) string {
		if o.Gap == 0 {
			return ""
		}
		return seconds(o.Gap)
	},
	"clients": func() int { return clients },
	"rate":    func() int { return rate },
	"lasts":   func() string { return lasts.String() },
	"after":   func() string { return actAfter.String() },
}).Parse(pageText))

func seconds(s float64) string {
	if s < 1 {
		return fmt.Sprintf("%.0f ms", s*1000)
	}
	return fmt.Sprintf("%.1f s", s)
}

// write writes the page and its picture.
func (r *report) write(dir string) error {
	var text bytes.Buffer
	if err := page.Execute(&text, r); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "comparison.md"), text.Bytes(), 0o644); err != nil {
		return err
	}
	return r.draw(filepath.Join(dir, "comparison.svg"))
}

// Part returns the rows whose case has one of the given words, for the page's tables.
func (r *report) Part(words ...string) (rows []row) {
	for _, row := range r.Rows {
		if slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(row.Case, w) }) {
			rows = append(rows, row)
		}
	}
	return rows
}

//go:embed comparison.svg.tmpl
var pictureText string

var picture = template.Must(template.New("comparison.svg").Parse(pictureText))

// The parts of a bar: the ways in which a connection can end, from best to worst.
var endings = []struct {
	name, color string
	of          func(o outcome) int64
}{
	{"stayed open", "#4477aa", func(o outcome) int64 { return clients - leftWhenTold(o) - o.Closed - o.Reset }},
	{"told, and left in order", "#44aa99", leftWhenTold},
	{"closed", "#ddaa33", func(o outcome) int64 { return o.Closed }},
	{"reset", "#bb3344", func(o outcome) int64 { return o.Reset }},
}

// leftWhenTold returns how many clients left after a notice, before the server closed them.
func leftWhenTold(o outcome) int64 { return max(0, min(o.Told, clients)-o.Closed-o.Reset) }

// draw draws how the connections ended in each rollout, the best on top.
func (r *report) draw(path string) error {
	rows := r.Part("upgrade", "restart", "reload", "lame")
	slices.SortStableFunc(rows, func(a, b row) int {
		for _, ending := range endings {
			if order := cmp.Compare(ending.of(b.Outcome), ending.of(a.Outcome)); order != 0 {
				return order
			}
		}
		return cmp.Compare(a.Outcome.Lost+a.Outcome.Refused, b.Outcome.Lost+b.Outcome.Refused)
	})
	const left, width, top, step = 400.0, 300.0, 74, 24
	type (
		part struct {
			X, Width float64
			Color    string
		}
		bar struct {
			Name, Note string
			Y, Text    int
			Parts      []part
		}
		key struct {
			Name, Color string
			X, Text     int
		}
	)
	view := struct {
		Clients, Height int
		Legend          []key
		Bars            []bar
	}{Clients: clients, Height: top + step*len(rows) + 10}
	for i, ending := range endings {
		x := 20 + []int{0, 110, 290, 370}[i]
		view.Legend = append(view.Legend, key{ending.name, ending.color, x, x + 18})
	}
	for i, row := range rows {
		b := bar{Name: row.Server + ", " + row.Case, Y: top + i*step, Text: top + i*step + 12}
		if row.Clients != "" {
			b.Name += " (" + row.Clients + ")"
		}
		x := left
		for _, ending := range endings {
			if n := ending.of(row.Outcome); n > 0 {
				w := float64(n) * width / clients
				b.Parts = append(b.Parts, part{x, w, ending.color})
				x += w
			}
		}
		var notes []string
		if n := row.Outcome.Refused; n > 0 {
			notes = append(notes, fmt.Sprintf("%d refused", n))
		}
		if n := row.Outcome.Lost; n > 0 {
			notes = append(notes, fmt.Sprintf("%d lost", n))
		}
		if row.Outcome.OldGone < 0 {
			notes = append(notes, "old code stays")
		}
		b.Note = strings.Join(notes, ", ")
		view.Bars = append(view.Bars, b)
	}
	var svg bytes.Buffer
	if err := picture.Execute(&svg, view); err != nil {
		return err
	}
	return os.WriteFile(path, svg.Bytes(), 0o644)
}
