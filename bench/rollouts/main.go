// Command rollouts puts the same clients through a restart, a reload or upgrade, a pause and a kill of several TCP servers, and
// reports what the clients saw. It runs on Linux and uses loopback only.
//
// Goroutines: for each server and load, os/exec has one that copies its output. For NATS, each client has one. All have
// ended when a run returns.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// The load is the same for all.
const (
	clients  = 60
	rate     = 3000 // messages per second
	lasts    = 12 * time.Second
	actAfter = 3 * time.Second
	grace    = 5 * time.Second // for each server that has one
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := rolloutsMain(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "rollouts:", err)
		os.Exit(1)
	}
}

func rolloutsMain(ctx context.Context, args []string) error {
	set := flag.NewFlagSet("rollouts", flag.ExitOnError)
	only := set.String("only", "", "run only the cases whose name contains this `text`")
	out := set.String("out", "out", "`directory` for rollouts.json, comparison.md and its picture")
	render := set.Bool("render", false, "run nothing, but write the report again from rollouts.json")
	if err := set.Parse(args); err != nil {
		return err
	}
	if set.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", set.Arg(0))
	}
	if err := os.MkdirAll(*out, 0o755); err != nil {
		return err
	}
	results := filepath.Join(*out, "rollouts.json")
	if *render {
		r, err := readReport(results)
		if err != nil {
			return err
		}
		return r.write(*out)
	}
	r, err := runAll(ctx, *only)
	if err != nil {
		return err
	}
	if err := r.save(results); err != nil {
		return err
	}
	return r.write(*out)
}

// runAll runs the chosen cases one after another.
func runAll(ctx context.Context, only string) (*report, error) {
	dir, err := os.MkdirTemp("", "rollouts-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	fmt.Fprintln(os.Stderr, "building")
	bin, err := buildAll(ctx, dir)
	if err != nil {
		return nil, err
	}
	r, err := newReport(ctx, bin)
	if err != nil {
		return nil, err
	}
	for i, c := range cases {
		name := c.name()
		if !strings.Contains(name, only) {
			continue
		}
		if program := c.server.program; program != "" && bin[program] == "" {
			r.Missing = append(r.Missing, c.server.name)
			fmt.Fprintf(os.Stderr, "%s: not installed\n", name)
			continue
		}
		began := time.Now()
		caseDir := filepath.Join(dir, fmt.Sprint(i))
		if err := os.Mkdir(caseDir, 0o755); err != nil {
			return nil, err
		}
		o, err := runCase(ctx, c, bin, caseDir)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		r.Rows = append(r.Rows, row{Server: c.server.name, Case: c.what, Clients: c.clients(), Why: c.why, Outcome: o})
		fmt.Fprintf(os.Stderr, "%-55s %+v (%v)\n", name, o, time.Since(began).Round(time.Second))
	}
	if len(r.Rows) == 0 {
		return nil, errors.New("no case was run")
	}
	return r, nil
}
