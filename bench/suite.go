package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"time"

	"echod/bench/load"
)

// A suite is one run of everything.
type suite struct {
	contenders []built
	places     []placement
	shapes     []shape
	rounds     map[string]int // by placement
	length     time.Duration  // that each measurement counts
	holding    []int          // numbers of idle connections
	holdRounds int
	settle     time.Duration // that a server is left alone before its memory is looked at
	crowd      int           // silent connections for the drain, and for being beside; 0 leaves these out

	besideRounds int // how often is measured beside the crowd, with each disturbance
	besideLength time.Duration

	progress io.Writer
	results  *results
}

// grace is what the subject's clients are given at a drain.
const grace = 2 * time.Second

func (s *suite) run(ctx context.Context) error {
	for _, step := range []func(context.Context) error{s.runShapes, s.runMemory, s.runDrain, s.runBeside} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// each calls do with every contender, in an order of its own each round, so that none always follows the same.
func (s *suite) each(round int, do func(built) error) error {
	order := rand.New(rand.NewPCG(s.results.Seed, uint64(round))).Perm(len(s.contenders))
	for _, i := range order {
		b := s.contenders[i]
		if err := do(b); err != nil {
			return fmt.Errorf("%s: %w", b.Name, err)
		}
	}
	return nil
}

// runShapes measures every shape in every placement. The contenders take turns within a round: what else
// the machine does meets all of them.
func (s *suite) runShapes(ctx context.Context) error {
	for _, place := range s.places {
		for _, shape := range s.shapes {
			for round := range s.rounds[place.Name] {
				s.say("%s, %s, round %d", shape.Title, place.Name, round+1)
				err := s.each(round, func(b built) error {
					r, err := s.runShape(ctx, b, shape, place)
					if ctx.Err() != nil {
						return context.Cause(ctx)
					}
					s.results.Runs = append(s.results.Runs, shapeRun{
						Place: place.Name, Shape: shape.Name, Name: b.Name, Round: round, Result: r, Failed: reason(err),
					})
					if err != nil {
						s.say("  %s: %v", b.Name, err)
					}
					return nil
				})
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (s *suite) runShape(ctx context.Context, b built, shape shape, place placement) (r load.Result, err error) {
	p, err := start(ctx, b, place.server)
	if err != nil {
		return r, err
	}
	r, err = measure(ctx, p, shape, s.length, place.load)
	if stopped := p.stop(); err == nil {
		err = stopped
	}
	return r, err
}

// runMemory measures what idle connections cost.
func (s *suite) runMemory(ctx context.Context) error {
	for round := range s.holdRounds {
		for _, conns := range s.holding {
			s.say("memory of %d idle connections, round %d", conns, round+1)
			err := s.each(round, func(b built) error {
				m, err := s.memory(ctx, b, conns)
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				s.results.Memory = append(s.results.Memory, memoryRun{Name: b.Name, Memory: m, Failed: reason(err)})
				if err != nil {
					s.say("  %s: %v", b.Name, err)
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *suite) memory(ctx context.Context, b built, conns int) (m memory, err error) {
	p, err := start(ctx, b, nil)
	if err != nil {
		return m, err
	}
	defer p.stop()
	m.Conns = conns
	// One connection first, so that what the first one costs is not taken for what each costs.
	if m.Before, err = s.hold(ctx, p, 1); err != nil {
		return m, err
	}
	m.After, err = s.hold(ctx, p, conns)
	return m, err
}

// hold opens idle connections, and returns how much memory the server has then.
func (s *suite) hold(ctx context.Context, p *process, conns int) (bytes int64, err error) {
	l, err := s.startCrowd(ctx, jobHold, p, conns, nil)
	if err != nil {
		return 0, err
	}
	time.Sleep(s.settle)
	bytes, err = p.resident()
	if ended := l.end(); err == nil {
		err = ended
	}
	return bytes, err
}

// startCrowd opens connections that say one thing each, in a process of its own; it returns once all are open, unless the job
// is a drain.
func (s *suite) startCrowd(ctx context.Context, j job, p *process, conns int, on cpus) (*loader, error) {
	l, err := startLoad(ctx, j, load.Spec{Address: p.address, PID: p.pid(), Conns: conns, Size: 64}, on)
	if err != nil || j == jobDrain {
		return l, err
	}
	return l, l.answer(new(any))
}

// theSubject is this project's server, where it takes part.
func (s *suite) theSubject() (b built, ok bool) {
	for _, b := range s.contenders {
		if b.Name == subject {
			return b, true
		}
	}
	return b, false
}

// runDrain measures how soon clients are told, and closed.
func (s *suite) runDrain(ctx context.Context) error {
	b, ok := s.theSubject()
	if !ok || s.crowd == 0 {
		return nil
	}
	for round := range s.holdRounds {
		s.say("drain of %d connections, round %d", s.crowd, round+1)
		p, err := start(ctx, b, nil)
		if err != nil {
			return err
		}
		var d load.Drained
		l, err := s.startCrowd(ctx, jobDrain, p, s.crowd, nil)
		if err == nil {
			err = l.answer(&d)
		}
		if err == nil {
			err = l.end()
		}
		if stopped := p.stop(); err == nil {
			err = stopped
		}
		if err != nil {
			return fmt.Errorf("draining: %w", err)
		}
		s.results.Drains = append(s.results.Drains, d)
	}
	return nil
}

func (s *suite) say(format string, args ...any) { fmt.Fprintf(s.progress, format+"\n", args...) }
