package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"echod/bench/load"
)

// The load is this test binary, started again.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == loadCommand {
		if err := loadMain(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// missing skips the test because the machine lacks something. With ECHOD_TEST_REQUIRE=1 the test fails.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("ECHOD_TEST_REQUIRE") == "1" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// TestSuite builds and runs every contender in every shape for a moment, and writes a report.
func TestSuite(t *testing.T) {
	place, err := pinned()
	if err != nil {
		missing(t, err.Error())
	}
	dir := t.TempDir()
	ready, notBuilt, err := buildAll(t.Context(), dir, slices.Concat(contenders, tlsContenders))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range notBuilt {
		missing(t, m)
	}
	var progress bytes.Buffer
	s := &suite{
		contenders: ready, places: []placement{place, unpinned()}, shapes: slices.Concat(shapes, tlsShapes),
		rounds: map[string]int{pinnedName: 1, unpinnedName: 1}, length: 20 * time.Millisecond,
		holding: []int{20, 60}, holdRounds: 1, settle: 10 * time.Millisecond,
		crowd: 100, besideRounds: 1, besideLength: 1200 * time.Millisecond,
		progress: &progress, results: &results{Began: time.Now(), Crowd: 100},
	}
	for i := range s.shapes { // fewer connections, to be quick
		s.shapes[i].Conns = min(s.shapes[i].Conns, 100)
	}
	s.splitTLS()
	if err := s.run(t.Context()); err != nil {
		t.Fatalf("%v\n%s", err, progress.String())
	}
	if failures := s.results.Failures(); len(failures) > 0 {
		t.Errorf("failed: %s", strings.Join(failures, "\n"))
	}
	for _, run := range s.results.Beside {
		if (run.Times > 0) != (run.Disturbance != disturbances[0].Name) {
			t.Errorf("%s, %s: %s was made %d times", run.Shape, run.Place, run.Disturbance, run.Times)
		}
	}

	out := t.TempDir()
	if err := os.Mkdir(plotsDir(out), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.results.save(resultsFile(out)); err != nil {
		t.Fatal(err)
	}
	again, err := readResults(resultsFile(out))
	if err != nil {
		t.Fatal(err)
	}
	var summary bytes.Buffer
	if err := write(again, out, &summary); err != nil {
		t.Fatal(err)
	}
	report, err := os.ReadFile(filepath.Join(out, "benchmarks.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range ready {
		for what, text := range map[string]string{"report": string(report), "summary": summary.String()} {
			if !strings.Contains(text, b.Name) {
				t.Errorf("the %s does not contain %s", what, b.Name)
			}
		}
	}
	for _, plot := range []string{"cpu.svg", "latency.svg", "memory.svg", "churn.svg"} {
		text, err := os.ReadFile(filepath.Join(plotsDir(out), plot))
		if err != nil || !strings.Contains(string(text), subject) {
			t.Errorf("%s: error %v, or it does not show %s", plot, err, subject)
		}
	}
}

func TestStartFailureHasNameAndStderr(t *testing.T) {
	b := built{contender: contender{Name: "broken"}, command: []string{"sh", "-c", "echo no such luck >&2; exit 3"}}
	_, err := start(t.Context(), b, nil)
	for _, want := range []string{"broken", "no such luck", "3"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
}

func TestChoose(t *testing.T) {
	name := func(s string) string { return s }
	all := []string{"a", "b, c", "d"}
	if got, err := choose("letter", "d;b, c", all, name); err != nil || strings.Join(got, "|") != "b, c|d" {
		t.Errorf("chosen %q, %v", got, err)
	}
	if got, err := choose("letter", "", all, name); err != nil || len(got) != 3 {
		t.Errorf("no names: %q, %v, want all", got, err)
	}
	if _, err := choose("letter", "e", all, name); err == nil || !strings.Contains(err.Error(), `unknown letter "e"`) {
		t.Errorf("error %v, want one with the unknown name", err)
	}
}

// sampleResults returns results of three rounds, in each of which the machine is slower. The subject takes subjectCPU
// per echo, gnet 10 µs and the floor 8 µs.
func sampleResults(subjectCPU time.Duration) *results {
	r := &results{Crowd: 15000}
	for name, cpu := range map[string]time.Duration{subject: subjectCPU, "gnet": 10 * time.Microsecond, floor: 8 * time.Microsecond} {
		r.Contenders = append(r.Contenders, participant{Name: name})
		for round := range 3 {
			slowness := time.Duration(round + 1)
			r.Runs = append(r.Runs, shapeRun{
				Place: pinnedName, Shape: shapes[0].Name, Name: name, Round: round,
				Result: load.Result{Echoes: 10, Elapsed: time.Second, ServerCPU: 10 * cpu * slowness, LoadCPU: time.Second / 2},
			})
		}
	}
	return r
}

func TestGoals(t *testing.T) {
	for _, c := range []struct {
		cpu     time.Duration
		reached []bool
	}{
		{10 * time.Microsecond, []bool{true, true}},
		{11 * time.Microsecond, []bool{false, true}},
		{12 * time.Microsecond, []bool{false, false}},
	} {
		goals := sampleResults(c.cpu).Goals()
		if len(goals) != 2 || goals[0].Reached != c.reached[0] || goals[1].Reached != c.reached[1] {
			t.Errorf("%v: goals %+v, want reached: %v", c.cpu, goals, c.reached)
		}
	}
}

func TestTableIsSortedByCPUTime(t *testing.T) {
	lines := sampleResults(9*time.Microsecond).Table(pinnedName, shapes[0])
	if len(lines) != 3 {
		t.Fatalf("lines %+v, want 3", lines)
	}
	for i, want := range []line{
		{Name: floor, CPU: "16.0", Range: "8.00–24.0", Floor: "1.00", Rival: "0.80"},
		{Name: subject, Own: true, CPU: "18.0", Range: "9.00–27.0", Floor: "1.12", Rival: "0.90"},
		{Name: "gnet", CPU: "20.0", Range: "10.0–30.0", Floor: "1.25", Rival: "1.00"},
	} {
		want.PerSecond, want.P50, want.P99, want.P999, want.Loads = "10", "0.00", "0.00", "0.00", "50 %"
		if lines[i] != want {
			t.Errorf("line %d is %+v, want %+v", i, lines[i], want)
		}
	}
}

func TestDelayIsTheLeastOfTheLongestWaits(t *testing.T) {
	r := new(results)
	for _, run := range []struct {
		place, disturbance string
		longest            time.Duration
	}{
		{pinnedName, disturbances[0].Name, 3 * time.Millisecond},
		{pinnedName, disturbances[0].Name, 80 * time.Millisecond}, // other work of the machine
		{pinnedName, listing, 7 * time.Millisecond},
		{pinnedName, listing, 90 * time.Millisecond},
		{unpinnedName, disturbances[0].Name, 2 * time.Millisecond},
		{unpinnedName, listing, 20 * time.Millisecond},
	} {
		r.Beside = append(r.Beside, disturbedRun{
			Place: run.place, Shape: shapes[0].Name, Disturbance: run.disturbance, Result: load.Result{Max: run.longest},
		})
	}
	if got, ok := r.delay(listing); !ok || got != 18 {
		t.Errorf("delayed by %v ms, %t; want 18", got, ok)
	}
}

// TestUpgrades upgrades the real program under a few connections.
func TestUpgrades(t *testing.T) {
	b, err := build(t.Context(), t.TempDir(), contenders[0])
	if err != nil {
		t.Fatal(err)
	}
	s, err := measureUpgrades(t.Context(), b, 60, 10, 1)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Frozen) != 1 || s.Frozen[0] <= 0 || s.Gap <= 0 || s.Before <= 0 || s.Peak < s.Before || s.After <= 0 {
		t.Errorf("measured %+v; want figures in all fields", s)
	}
}
