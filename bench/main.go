// Command bench measures echod beside other echo servers: CPU time for an echo, throughput, latency,
// memory of idle connections, churn, the drain and the listing of many connections. It runs on Linux.
//
// Each measurement starts a server as a process, puts load on it from another process, and stops it. The servers take
// turns, in several rounds.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	var err error
	if len(os.Args) > 1 && os.Args[1] == loadCommand {
		err = loadMain(os.Args[2:], os.Stdin, os.Stdout)
	} else {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		err = benchMain(ctx, os.Args[1:])
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// flags are the command line flags.
type flags struct {
	quick   bool
	upgrade bool
	only    string
	shapes  string
	rounds  int
	length  time.Duration
	tls     bool
	render  bool
	out     string
}

func benchMain(ctx context.Context, args []string) error {
	var f flags
	set := flag.NewFlagSet("bench", flag.ExitOnError)
	set.BoolVar(&f.quick, "quick", false, "take two minutes: one pinned round, and memory of 1,000 connections")
	set.BoolVar(&f.upgrade, "upgrade", false, "measure only upgrades of echod with connected clients")
	set.StringVar(&f.only, "only", "", "measure only these `servers`, such as echod;gnet")
	set.StringVar(&f.shapes, "shapes", "", "measure only these `shapes` of load, such as 64x64B;churn")
	set.IntVar(&f.rounds, "rounds", 0, "`number` of rounds instead of the default")
	set.DurationVar(&f.length, "time", 0, "`time` of each measurement instead of the default")
	set.StringVar(&f.out, "out", "out", "`directory` for results.json, benchmarks.md and its plots")
	set.BoolVar(&f.tls, "tls", false, "measure only over TLS")
	set.BoolVar(&f.render, "render", false, "measure nothing, but write the report again from results.json")
	if err := set.Parse(args); err != nil {
		return err
	}
	if set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	if err := os.MkdirAll(plotsDir(f.out), 0o755); err != nil {
		return err
	}
	if f.upgrade {
		return upgradeMain(ctx, f)
	}
	if f.render {
		r, err := readResults(resultsFile(f.out))
		if err != nil {
			return err
		}
		return write(r, f.out, os.Stdout)
	}
	r, err := measureAll(ctx, f)
	if err != nil {
		return err
	}
	if err := r.save(resultsFile(f.out)); err != nil {
		return err
	}
	return write(r, f.out, os.Stdout)
}

// plotsDir is the directory of the report's plots.
func plotsDir(out string) string { return filepath.Join(out, "benchmarks") }

func resultsFile(out string) string { return filepath.Join(out, "results.json") }

func measureAll(ctx context.Context, f flags) (*results, error) {
	s, err := f.suite()
	if err != nil {
		return nil, err
	}
	chosen, err := choose("server", f.only, slices.Concat(contenders, tlsContenders), func(c contender) string { return c.Name })
	if err != nil {
		return nil, err
	}
	if f.tls {
		chosen = slices.DeleteFunc(slices.Clone(chosen), func(c contender) bool { return !c.tls })
		s.crowd = 0
	}
	if s.results.Machine, err = thisMachine(); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "bench-bin-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	s.say("building")
	if s.contenders, s.results.Missing, err = buildAll(ctx, dir, chosen); err != nil {
		return nil, err
	}
	s.splitTLS()
	if err := s.run(ctx); err != nil {
		return nil, err
	}
	s.say("measured in %v", time.Since(s.results.Began).Round(time.Second))
	return s.results, nil
}

// splitTLS moves the measurements over TLS to a separate suite, which runs only pinned.
func (s *suite) splitTLS() {
	over := *s
	over.results = &results{Machine: s.results.Machine, Began: s.results.Began, Seed: s.results.Seed, Quick: s.results.Quick, Length: s.results.Length}
	over.overTLS, over.crowd, over.places = true, 0, s.places[:1]
	if n := len(s.holding); n > 0 {
		over.holding = s.holding[n/2 : n/2+1]
	}
	plainShape := func(sh shape) bool { return !sh.TLS }
	over.shapes = slices.DeleteFunc(slices.Clone(s.shapes), plainShape)
	s.shapes = slices.DeleteFunc(slices.Clone(s.shapes), func(sh shape) bool { return sh.TLS })
	var plain, overTLS []built
	for _, b := range s.contenders {
		own, r := &plain, s.results
		if b.tls {
			own, r = &overTLS, over.results
		}
		*own = append(*own, b)
		r.Contenders = append(r.Contenders, participant{b.Name, b.About, b.version})
	}
	s.contenders, over.contenders = plain, overTLS
	if len(over.shapes) > 0 && len(over.contenders) > 0 {
		s.tls, s.results.TLS = &over, over.results
	}
	if len(plain) == 0 {
		s.shapes, s.holding = nil, nil
	}
}

// suite returns the suite that the flags describe.
func (f flags) suite() (*suite, error) {
	place, err := pinned()
	if err != nil {
		return nil, err
	}
	s := &suite{
		places: []placement{place, unpinned()}, shapes: shapes,
		rounds: map[string]int{pinnedName: 7, unpinnedName: 3}, length: time.Second,
		holding: []int{1000, 5000, 15000}, holdRounds: 2, settle: time.Second, crowd: 15000,
		besideRounds: 4, besideLength: 5 * time.Second, // several disturbances in each
		progress: os.Stderr, results: &results{Began: time.Now(), Seed: uint64(time.Now().UnixNano()), Quick: f.quick},
	}
	if f.quick {
		s.places = s.places[:1]
		s.rounds = map[string]int{pinnedName: 1}
		s.length = 400 * time.Millisecond
		s.holding, s.holdRounds, s.crowd = []int{1000}, 1, 0
	}
	if f.shapes != "" {
		s.holdRounds, s.crowd = 0, 0
	}
	if f.rounds > 0 {
		for place := range s.rounds {
			s.rounds[place] = f.rounds
		}
	}
	if f.length > 0 {
		s.length = f.length
	}
	s.results.Length, s.results.Crowd = s.length, s.crowd
	s.shapes, err = choose("shape", f.shapes, slices.Concat(s.shapes, tlsShapes), func(s shape) string { return s.Name })
	return s, err
}

// choose returns the elements of all whose names are in names, separated by semicolons. Without names it returns all.
func choose[T any](what, names string, all []T, name func(T) string) (chosen []T, err error) {
	if names == "" {
		return all, nil
	}
	var known []string
	for _, v := range all {
		known = append(known, name(v))
	}
	wanted := strings.Split(names, ";")
	for _, w := range wanted {
		if !slices.Contains(known, w) {
			return nil, fmt.Errorf("unknown %s %q, want one of %s", what, w, strings.Join(known, "; "))
		}
	}
	for _, v := range all {
		if slices.Contains(wanted, name(v)) {
			chosen = append(chosen, v)
		}
	}
	return chosen, nil
}
