package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"image/color"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/template"
	"time"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
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
	"old": func(o outcome) string {
		if o.OldGone < 0 {
			return "not within the run"
		}
		return seconds(o.OldGone)
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

// draw draws how the connections ended in a rollout, the best on top.
func (r *report) draw(path string) error {
	rows := r.Part("upgrade", "restart", "reload", "lame")
	bad := func(o outcome) int64 { return 1000*o.Reset + 100*o.Closed + 10*o.Refused + o.Told }
	slices.SortStableFunc(rows, func(a, b row) int { return int(bad(b.Outcome) - bad(a.Outcome)) })
	p := plot.New()
	p.Title.Text = fmt.Sprintf("What became of %d connections in a rollout", clients)
	p.X.Label.Text = "connections"
	p.X.Max = clients
	p.Legend.Top = true
	p.Legend.Left = false
	var names []string
	told, closed, reset := make(plotter.Values, len(rows)), make(plotter.Values, len(rows)), make(plotter.Values, len(rows))
	for i, row := range rows {
		name := row.Server + ", " + row.Case
		if row.Clients != "" {
			name += " (" + row.Clients + ")"
		}
		names = append(names, name)
		told[i] = float64(max(0, min(row.Outcome.Told, clients)-row.Outcome.Closed-row.Outcome.Reset))
		closed[i], reset[i] = float64(row.Outcome.Closed), float64(row.Outcome.Reset)
	}
	var below *plotter.BarChart
	for _, bars := range []struct {
		name   string
		values plotter.Values
		color  color.Color
	}{
		{"told, then left in order", told, color.RGBA{0x44, 0xaa, 0x99, 0xff}},
		{"closed", closed, color.RGBA{0xdd, 0xaa, 0x33, 0xff}},
		{"reset", reset, color.RGBA{0xbb, 0x33, 0x44, 0xff}},
	} {
		chart, err := plotter.NewBarChart(bars.values, vg.Points(11))
		if err != nil {
			return err
		}
		chart.Horizontal, chart.Color, chart.LineStyle.Width = true, bars.color, 0
		if below != nil {
			chart.StackOn(below)
		}
		below = chart
		p.Add(chart)
		p.Legend.Add(bars.name, chart)
	}
	p.NominalY(names...)
	return p.Save(vg.Points(720), vg.Points(float64(60+20*len(rows))), path)
}
