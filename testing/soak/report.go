package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

type report struct {
	settings settings
	commit   string
	began    time.Time
	took     time.Duration
	phases   []result
}

// result is what a phase found.
type result struct {
	*phase
}

func (p *phase) result() result { return result{p} }

func (r *report) broken() bool {
	return slices.ContainsFunc(r.phases, func(p result) bool { return len(p.violation) > 0 })
}

// String returns the report as Markdown.
func (r *report) String() string {
	var out strings.Builder
	fmt.Fprintf(&out, "Soak of %s, begun %s, %s, seed %d: %d clients, %d rude ones, %d files.\n\n", r.commit,
		r.began.UTC().Format("2006-01-02 15:04 MST"), r.took.Round(time.Second), r.settings.seed, r.settings.clients, r.settings.rude, r.settings.files)
	header := []string{""}
	for _, p := range r.phases {
		header = append(header, p.name)
	}
	row := func(cells ...string) { fmt.Fprintf(&out, "| %s |\n", strings.Join(cells, " | ")) }
	row(header...)
	row(slices.Repeat([]string{"---"}, len(header))...)
	line := func(what string, value func(p result) string) {
		cells := []string{what}
		for _, p := range r.phases {
			cells = append(cells, value(p))
		}
		row(cells...)
	}
	number := func(what string, value func(p result) int64) {
		line(what, func(p result) string { return fmt.Sprint(value(p)) })
	}
	line("time", func(p result) string { return p.took.Round(time.Second).String() })
	number("connections of well-behaved clients", func(p result) int64 {
		n := int64(0)
		for _, more := range p.outcomes {
			n += more
		}
		return n
	})
	line("MB echoed and checked", func(p result) string { return fmt.Sprintf("%.1f", float64(p.bytes)/1e6) })
	for _, kind := range []outcomeKind{complete, leftWhenTold, rejected, refused, cut, stuck, corrupted} {
		number(string(kind), func(p result) int64 { return p.outcomes[kind] })
	}
	number("connects that failed", func(p result) int64 { return p.refused })
	number("connections that the operator killed", func(p result) int64 { return int64(p.kills) })
	number("cut off or refused, with a reason", func(p result) int64 { return int64(p.explained) })
	number("of these, at a deadline after this process got no CPU time", func(p result) int64 { return int64(p.cutLate) })
	line("times without CPU time; in all", func(p result) string {
		return fmt.Sprintf("%d; %s", len(p.halts), p.halted(p.began, p.began.Add(p.took)).Round(time.Millisecond))
	})
	number("**lost**: cut off or refused, without a reason", func(p result) int64 { return int64(p.lost) })
	number("status requests checked", func(p result) int64 { return p.watch.statuses.Load() })
	line("slowest status", func(p result) string { return p.watch.slowest.Round(time.Millisecond).String() })
	number("scrapes of metrics checked", func(p result) int64 { return p.watch.scrapes.Load() })
	number("events checked", func(p result) int64 { return p.watch.events.Load() })
	number("times without clients, compared", func(p result) int64 { return int64(len(p.watch.idleFigures)) })
	for _, figure := range []struct {
		what string
		of   func(figures) int64
	}{
		{"descriptors", func(f figures) int64 { return int64(f.fds) }},
		{"goroutines", func(f figures) int64 { return int64(f.goroutines) }},
		{"heap, KB", func(f figures) int64 { return f.heap / 1000 }},
		{"RSS, KB", func(f figures) int64 { return f.rss / 1000 }},
	} {
		of := figure.of
		line(figure.what+": at first, most, at last", func(p result) string {
			rests := p.watch.idleFigures
			if len(rests) == 0 {
				return "-"
			}
			most := int64(0)
			for _, f := range rests {
				most = max(most, of(f))
			}
			return fmt.Sprintf("%d, %d, %d", of(rests[0]), most, of(rests[len(rests)-1]))
		})
	}
	kinds := map[string]bool{}
	for _, p := range r.phases {
		for kind := range p.faults {
			kinds[kind] = true
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		number("fault: "+kind, func(p result) int64 { return int64(p.faults[kind]) })
	}
	number("**violations**", func(p result) int64 { return int64(len(p.violation) + p.unlisted) })
	for _, p := range r.phases {
		for _, text := range p.violation {
			fmt.Fprintf(&out, "\n- %s: %s", p.name, text)
		}
	}
	return out.String() + "\n"
}
