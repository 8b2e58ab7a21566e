package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	"echod/bench/load"
)

// This file measures upgrades: the real program replaces itself while clients stay connected (echod ctl upgrade).

const (
	pulseInterval = time.Millisecond // between messages on connections that are otherwise idle
	busyConns     = 200              // that always have a message in flight, under load
	memorySample  = 20 * time.Millisecond
)

// upgradeResults are the measurements of upgrades. They are kept as JSON.
type upgradeResults struct {
	Machine machine
	Began   time.Time
	Version string
	Rounds  int // upgrades of each scene
	Scenes  []upgradeCase
}

// An upgradeCase is a server with Conns connections, of which Busy are busy, and its upgrades.
type upgradeCase struct {
	Conns, Busy int
	Frozen      []time.Duration // as the server says
	Took        []time.Duration // from the command to its answer
	// The longest times that a client waited for its echo: in all upgrades, and in as long a time without one.
	Gap, UsualGap time.Duration
	// Resident memory of all processes of the server, in bytes: before, the most during an upgrade, and after the last.
	Before, Peak, After int64
}

func upgradeMain(ctx context.Context, f flags) error {
	counts, rounds := []int{1000, 5000, 9000}, 5
	if f.quick {
		counts, rounds = []int{1000}, 2
	}
	if f.rounds > 0 {
		rounds = f.rounds
	}
	m, err := thisMachine()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-bin-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b, err := build(ctx, dir, contenders[0])
	if err != nil {
		return err
	}
	r := upgradeResults{Machine: m, Began: time.Now(), Version: b.version, Rounds: rounds}
	for _, conns := range counts {
		for _, busy := range []int{0, busyConns} {
			scene, err := measureUpgrades(ctx, b, conns, busy, rounds)
			if err != nil {
				return fmt.Errorf("%d connections, %d busy: %w", conns, busy, err)
			}
			fmt.Fprintf(os.Stderr, "%+v\n", scene)
			r.Scenes = append(r.Scenes, scene)
		}
	}
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(f.out, "upgrades.json"), text, 0o644); err != nil {
		return err
	}
	var page bytes.Buffer
	if err := upgradePage.Execute(&page, r); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(f.out, "benchmarks-upgrade.md"), page.Bytes(), 0o644)
}

// measureUpgrades upgrades a server rounds times, half a second apart.
func measureUpgrades(ctx context.Context, b built, conns, busy, rounds int) (s upgradeCase, err error) {
	s = upgradeCase{Conns: conns, Busy: busy}
	p, err := start(ctx, b, nil)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, p.stop()) }()
	const pause = 500 * time.Millisecond
	// First as long a time without upgrades, and then with them.
	for _, upgrades := range []bool{false, true} {
		l, err := startUpgradeLoad(ctx, p, conns, busy)
		if err != nil {
			return s, err
		}
		time.Sleep(pause)
		if upgrades {
			if s.Before, err = p.residentOfAll(); err != nil {
				return s, err
			}
		}
		for range rounds {
			if upgrades {
				if err := s.upgrade(ctx, b, p); err != nil {
					return s, errors.Join(err, l.close())
				}
			}
			time.Sleep(pause)
		}
		if upgrades {
			if s.After, err = p.residentOfAll(); err != nil {
				return s, err
			}
		}
		gap, err := l.longestGap()
		if err != nil {
			return s, err
		}
		if upgrades {
			s.Gap = gap
		} else {
			s.UsualGap = gap
		}
	}
	return s, nil
}

// upgrade upgrades the server once, and samples its memory meanwhile.
func (s *upgradeCase) upgrade(ctx context.Context, b built, p *process) error {
	sampled := make(chan int64)
	done := make(chan struct{})
	go func() {
		var most int64
		for tick := time.NewTicker(memorySample); ; {
			if now, err := p.residentOfAll(); err == nil {
				most = max(most, now)
			}
			select {
			case <-tick.C:
			case <-done:
				tick.Stop()
				sampled <- most
				return
			}
		}
	}()
	began := time.Now()
	args := []string{"ctl", "--control", controlSocket(p.dir), "upgrade", "--json"}
	out, err := exec.CommandContext(ctx, b.command[0], args...).Output()
	took := time.Since(began)
	close(done)
	s.Peak = max(s.Peak, s.Before, <-sampled) // between two samples it may have been more
	if err != nil {
		return fmt.Errorf("upgrading: %w\n%w", err, p.stderrText())
	}
	var answer struct {
		HandedOver    int            `json:"handed_over"`
		Behind        map[string]int `json:"behind"`
		FrozenSeconds float64        `json:"frozen_seconds"`
	}
	if err := json.Unmarshal(out, &answer); err != nil {
		return fmt.Errorf("reading the answer %q: %w", out, err)
	}
	if len(answer.Behind) > 0 || answer.HandedOver < s.Conns {
		return fmt.Errorf("%d of %d connections were handed over; behind: %v", answer.HandedOver, s.Conns, answer.Behind)
	}
	s.Took = append(s.Took, took)
	s.Frozen = append(s.Frozen, time.Duration(answer.FrozenSeconds*float64(time.Second)))
	return nil
}

// upgradeLoad is the load on a server that is upgraded: one process that holds connections and sends a message on one
// after another, and one whose connections are busy.
type upgradeLoad struct{ pulse, busy *loader }

func startUpgradeLoad(ctx context.Context, p *process, conns, busy int) (l upgradeLoad, err error) {
	spec := load.Spec{Address: p.address, PID: p.pid(), Conns: conns - busy, Size: 64, Depth: 1}
	if l.pulse, err = startLoad(ctx, jobPulse, spec, nil); err != nil {
		return l, err
	}
	var opened any
	if err := l.pulse.answer(&opened); err != nil || busy == 0 {
		return l, err
	}
	spec.Conns, spec.Warmup = busy, 200*time.Millisecond
	if l.busy, err = startLoad(ctx, jobBusy, spec, nil); err != nil {
		return l, errors.Join(err, l.close())
	}
	return l, nil
}

// longestGap ends the load, and returns the longest time that a client waited.
func (l upgradeLoad) longestGap() (gap time.Duration, err error) {
	for _, each := range []*loader{l.busy, l.pulse} {
		if each == nil {
			continue
		}
		_ = each.stdin.Close()
		var r load.Result
		if err := each.answer(&r); err != nil {
			return 0, err
		}
		if err := each.end(); err != nil {
			return 0, err
		}
		gap = max(gap, r.Max)
	}
	return gap, nil
}

func (l upgradeLoad) close() error {
	_, err := l.longestGap()
	return err
}

// residentOfAll returns the resident memory of the process and its descendants, in bytes.
func (p *process) residentOfAll() (bytes int64, err error) {
	for pids := []int{p.pid()}; len(pids) > 0; pids = pids[1:] {
		size, err := residentOf(pids[0], "Pss:")
		if err != nil {
			continue // it has exited
		}
		bytes += size
		lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[0]))
		for _, list := range lists {
			text, _ := os.ReadFile(list)
			for child := range strings.FieldsSeq(string(text)) {
				if pid, err := strconv.Atoi(child); err == nil {
					pids = append(pids, pid)
				}
			}
		}
	}
	return bytes, nil
}

func longest(all []time.Duration) time.Duration { return slices.Max(all) }

func middle(all []time.Duration) time.Duration {
	sorted := slices.Sorted(slices.Values(all))
	return sorted[(len(sorted)-1)/2]
}

var upgradePage = template.Must(template.New("upgrades").Funcs(template.FuncMap{
	"longest": longest, "middle": middle,
	"ms":  func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) },
	"mib": func(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) },
	"day": func(t time.Time) string { return t.UTC().Format("2006-01-02") },
}).Parse(`# Benchmarks of upgrades

` + "`make bench-upgrade`" + ` writes this page. It ran on {{day .Began}} with version {{.Version}}, on {{.Machine.CPUs}} CPUs
({{.Machine.CPU}}, {{.Machine.Kernel}}, {{.Machine.Go}}).

The server is the real program. ` + "`echod ctl upgrade`" + ` replaces it {{.Rounds}} times in a row while its clients stay connected. A
load generator holds the connections, and sends one message of 64 bytes every millisecond, on one connection after another. In the
busy rows a second load generator always has a message of 64 bytes in flight on each busy connection. Both check every byte. All
processes share the CPUs. No connection was closed, and all were handed over.

| connections | busy | frozen, median | frozen, longest | longest wait | without upgrades | command, median |
|--:|--:|--:|--:|--:|--:|--:|
{{range .Scenes}}| {{.Conns}} | {{.Busy}} | {{ms (middle .Frozen)}} | {{ms (longest .Frozen)}} | {{ms .Gap -}}
{{" "}}| {{ms .UsualGap}} | {{ms (middle .Took)}} |
{{end}}
Frozen is the time for which no process serves connections, as the server reports it. The longest wait is that of any message for
their echo, in all {{.Rounds}} upgrades. The column beside it is from an equally long time without upgrades.

| connections | busy | memory before | maximum during an upgrade | after {{.Rounds}} upgrades |
|--:|--:|--:|--:|--:|
{{range .Scenes}}| {{.Conns}} | {{.Busy}} | {{mib .Before}} | {{mib .Peak}} | {{mib .After}} |
{{end}}
Memory is the resident memory of all processes of the server; shared memory counts once. During an upgrade these are the predecessor
and the successor. Afterwards they are the successor and the process that was started first, which forwards signals and the exit code.
`))
