// Command soak runs the real echod under clients, operators and faults that a seed determines, and checks its promises
// from outside all the time. It ends with a report, and with exit code 1 if a promise was broken.
//
// Run it with 'make soak TIME=1h'. The first half of the time it runs the program as released, the second half with
// the race detector.
//
// Goroutines: each phase has clients, rude clients and callers, one operator, one watcher and one reader of events. The
// phase stops them and waits for them. Toxiproxy has its own, which end with its proxies.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

type settings struct {
	time    time.Duration
	clients int
	rude    int
	files   int
	seed    uint64
	builds  []string
	mix     map[string]int // weights of faults, where they differ
	root    string
	out     string
}

func main() {
	var s settings
	var builds, mix string
	flag.DurationVar(&s.time, "time", time.Minute, "how long to run, all builds together")
	flag.IntVar(&s.clients, "clients", 60, "number of well-behaved clients at a time")
	flag.IntVar(&s.rude, "rude", 8, "number of rude clients at a time")
	flag.IntVar(&s.files, "files", 400, "open files limit of the server")
	flag.Uint64Var(&s.seed, "seed", 0, "seed of the random choices; 0 chooses one")
	flag.StringVar(&builds, "builds", "plain,race", "builds of echod to run, one after another")
	flag.StringVar(&mix, "mix", "", "weights of faults, if not the default, such as upgrade=20,sigkill=0; the report lists all faults")
	flag.StringVar(&s.root, "root", ".", "directory of the source")
	flag.StringVar(&s.out, "out", "", "directory for the report and the logs (default: a temporary one)")
	flag.Parse()
	s.builds = strings.Split(builds, ",")
	var err error
	if s.mix, err = parseMix(mix); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	if s.seed == 0 {
		s.seed = rand.Uint64()
	}
	log.SetFlags(log.Ltime)
	if signal.Ignored(syscall.SIGHUP) { // under nohup: the server inherits what is ignored, not what is caught
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	broken, err := soak(ctx, s)
	if err != nil {
		log.Print(err)
		os.Exit(2)
	}
	if broken {
		os.Exit(1)
	}
}

// parseMix parses kind=weight,…
func parseMix(text string) (map[string]int, error) {
	mix := make(map[string]int)
	for part := range strings.SplitSeq(text, ",") {
		if part == "" {
			continue
		}
		kind, number, _ := strings.Cut(part, "=")
		weight, err := strconv.Atoi(number)
		if err != nil || weight < 0 {
			return nil, fmt.Errorf("-mix %q: want kind=weight", part)
		}
		mix[kind] = weight
	}
	return mix, nil
}

// weight returns how often a fault of this kind comes in a round.
func (s settings) weight(kind string, usual int) int {
	if w, ok := s.mix[kind]; ok {
		return w
	}
	return usual
}

// soak runs all phases and writes the report.
func soak(ctx context.Context, s settings) (broken bool, err error) {
	if s.out == "" {
		if s.out, err = os.MkdirTemp("", "echod-soak-"); err != nil {
			return false, err
		}
	}
	if err := os.MkdirAll(s.out, 0o755); err != nil {
		return false, err
	}
	log.Printf("seed %d, in %s", s.seed, s.out)
	r := &report{settings: s, began: time.Now(), commit: commitOf(s.root)}
	program := func(name string) string { return filepath.Join(s.out, "echod-"+name) }
	for _, name := range s.builds {
		if err := build(ctx, s.root, program(name), name == "race"); err != nil {
			return false, err
		}
	}
	for i, name := range s.builds {
		p, err := newPhase(s, name, program(name), s.seed+uint64(i))
		if err != nil {
			return false, err
		}
		log.Printf("%s: %s", name, s.time/time.Duration(len(s.builds)))
		p.run(ctx, s.time/time.Duration(len(s.builds)))
		r.phases = append(r.phases, p.result())
		if ctx.Err() != nil {
			break
		}
	}
	r.took = time.Since(r.began)
	text := r.String()
	fmt.Print(text)
	path := filepath.Join(s.out, "report.md")
	return r.broken(), errors.Join(err, os.WriteFile(path, []byte(text), 0o644))
}

func build(ctx context.Context, root, path string, race bool) error {
	args := []string{"build", "-buildvcs=false", "-o", path}
	if race {
		args = append(args, "-race")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "./cmd/echod")...)
	cmd.Dir = root
	if !race {
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // as released
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building echod: %w\n%s", err, out)
	}
	return nil
}

func commitOf(root string) string {
	cmd := exec.Command("git", "describe", "--tags", "--always", "--dirty")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(out)) + ", " + runtime.Version()
}
