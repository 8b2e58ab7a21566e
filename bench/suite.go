package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"time"

	"echod/bench/load"
)

// Names of the shapes over TLS.
const (
	tlsSmall     = "tls-64x64B"
	tlsLarge     = "tls-64x64KiB"
	tlsHandshake = "tls-handshake"
)

// churn is the name of the shape whose connections carry one message each.
const churn = "churn"

// A shape is a kind of load.
type shape struct {
	Name  string // short, for tables and files
	Title string
	Conns int
	Size  int
	Depth int
	Churn bool
	TLS   bool
}

var shapes = []shape{
	{Name: "64x64B", Title: "64 connections of 64 B", Conns: 64, Size: 64, Depth: 1},
	{Name: "5000x64B", Title: "5,000 connections of 64 B", Conns: 5000, Size: 64, Depth: 1},
	{Name: "64x64KiB", Title: "64 connections of 64 KiB", Conns: 64, Size: 64 << 10, Depth: 1},
	{Name: "8x1MiB", Title: "8 connections of 1 MiB", Conns: 8, Size: 1 << 20, Depth: 1},
	{Name: "pipelined", Title: "64 connections of 64 B, 16 in flight on each", Conns: 64, Size: 64, Depth: 16},
	{Name: churn, Title: "64 at a time: connect, one echo of 64 B, close", Conns: 64, Size: 64, Depth: 1, Churn: true},
}

// tlsShapes are the shapes over TLS. In the last one each connection has its own handshake.
var tlsShapes = []shape{
	{Name: tlsSmall, Title: "64 connections of 64 B, over TLS", Conns: 64, Size: 64, TLS: true},
	{Name: tlsLarge, Title: "64 connections of 64 KiB, over TLS", Conns: 64, Size: 64 << 10, TLS: true},
	{Name: tlsHandshake, Title: "16 at a time: handshake, one echo of 64 B, close", Conns: 16, Size: 64, Churn: true, TLS: true},
}

// spec returns the load's specification for a measurement of p.
func (s shape) spec(p *process, length time.Duration) load.Spec {
	return load.Spec{
		Address: p.address, PID: p.pid(), Conns: s.Conns, Size: s.Size, Depth: s.Depth, Churn: s.Churn,
		TLS: s.TLS, BehindPID: p.behindPID(),
		Warmup: length / 4, Duration: length,
	}
}

// A suite is one run of all measurements.
type suite struct {
	contenders []built
	places     []placement
	shapes     []shape
	rounds     map[string]int // by placement
	length     time.Duration  // of each measurement
	holding    []int          // numbers of idle connections
	holdRounds int
	settle     time.Duration // before the memory of an idle server is read
	crowd      int           // idle connections, for the drain and for the disturbances; 0 skips both

	besideRounds int // measurements next to the crowd, with each disturbance
	besideLength time.Duration

	overTLS bool
	tls     *suite // the part over TLS; nil: none

	progress io.Writer
	results  *results
}

// grace is the subject's grace period.
const grace = 2 * time.Second

func (s *suite) run(ctx context.Context) error {
	for _, step := range []func(context.Context) error{s.runShapes, s.runMemory, s.runDrain, s.runDisturbed, s.runTLS} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// runTLS measures over TLS.
func (s *suite) runTLS(ctx context.Context) error {
	if s.tls == nil {
		return nil
	}
	s.say("over TLS")
	return s.tls.run(ctx)
}

// each calls do with every contender, in a different order each round, so that none always follows the same one.
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

// runShapes measures every shape in every placement. The contenders take turns within a round, so that other work of
// the machine affects all of them.
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
						Place: place.Name, Shape: shape.Name, Name: b.Name, Round: round, Result: r,
						Failed: reason(err),
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

// runMemory measures the memory of idle connections.
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
	// One connection first, so that the cost of the first one is not counted.
	if m.Before, err = s.hold(ctx, p, 1); err != nil {
		return m, err
	}
	m.After, err = s.hold(ctx, p, conns)
	return m, err
}

// hold opens idle connections, and returns the server's resident memory with them.
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

// startCrowd opens connections that send one message each, in a separate process. It returns when all are open,
// unless the job is a drain.
func (s *suite) startCrowd(ctx context.Context, j job, p *process, conns int, on cpus) (*loader, error) {
	l, err := startLoad(ctx, j, load.Spec{Address: p.address, PID: p.pid(), Conns: conns, Size: 64, TLS: s.overTLS}, on)
	if err != nil || j == jobDrain {
		return l, err
	}
	return l, l.answer(new(any))
}

// findSubject returns this project's server, if it is measured.
func (s *suite) findSubject() (b built, ok bool) {
	for _, b := range s.contenders {
		if b.Name == subject {
			return b, true
		}
	}
	return b, false
}

// runDrain measures how soon clients are told and closed.
func (s *suite) runDrain(ctx context.Context) error {
	b, ok := s.findSubject()
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

// A disturbance is an operator's request, made once a second while a crowd of idle connections is open and others are
// served.
type disturbance struct {
	Name   string
	Method string // empty: no request
	Path   string
	Body   string
	Notice string // what clients read
	Socket string // path of the control socket
	Crowd  int    // how many connections the request must reach
}

// The others are compared with the first.
var disturbances = []disturbance{
	{Name: "nothing"},
	{Name: listing, Method: http.MethodGet, Path: "/v1/conns"},
	{Name: "a notice", Method: http.MethodPost, Path: "/v1/notify", Body: `{"text":"hello"}`, Notice: "NOTICE hello\n"},
}

// listing is the name of the disturbance that lists all connections.
const listing = "a listing"

// A disturbedRun is a measurement next to idle connections, with a disturbance that was made Times times.
type disturbedRun struct {
	Place, Shape, Disturbance string
	Times                     int
	Result                    load.Result
}

// runDisturbed measures how much idle connections, and requests about all of them, delay clients that echo or connect.
func (s *suite) runDisturbed(ctx context.Context) error {
	b, ok := s.findSubject()
	if !ok || s.crowd == 0 {
		return nil
	}
	for _, place := range s.places {
		p, err := start(ctx, b, place.server)
		if err != nil {
			return err
		}
		err = s.measureDisturbed(ctx, p, place)
		if stopped := p.stop(); err == nil {
			err = stopped
		}
		if err != nil {
			return fmt.Errorf("next to a crowd: %w", err)
		}
	}
	return nil
}

func (s *suite) measureDisturbed(ctx context.Context, p *process, place placement) (err error) {
	crowd, err := s.startCrowd(ctx, jobHold, p, s.crowd, place.load)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, crowd.end()) }()
	for round := range s.besideRounds {
		for _, sh := range s.shapes {
			if sh.Name != shapes[0].Name && !sh.Churn {
				continue
			}
			for i := range disturbances {
				d := disturbances[(i+round)%len(disturbances)]
				s.say("%s next to %s idle ones, %s, with %s, round %d", sh.Title, thousands(s.crowd), place.Name,
					d.Name, round+1)
				run, err := s.disturbed(ctx, p, sh, place, d)
				if err != nil {
					return fmt.Errorf("with %s: %w", d.Name, err)
				}
				s.results.Beside = append(s.results.Beside, run)
			}
		}
	}
	return nil
}

// disturbed measures with d once a second.
func (s *suite) disturbed(ctx context.Context, p *process, sh shape, place placement,
	d disturbance,
) (run disturbedRun, err error) {
	run = disturbedRun{Place: place.Name, Shape: sh.Name, Disturbance: d.Name}
	d.Socket, d.Crowd = controlSocket(p.dir), s.crowd
	operator, err := startLoad(ctx, jobDisturb, d, place.load)
	if err != nil {
		return run, err
	}
	spec := sh.spec(p, s.besideLength)
	spec.Notice, spec.Corrected = d.Notice, true
	l, err := startLoad(ctx, jobRun, spec, place.load)
	if err != nil {
		return run, errors.Join(err, operator.end())
	}
	if err := l.answer(&run.Result); err != nil {
		return run, errors.Join(err, operator.end())
	}
	_ = operator.stdin.Close()
	if err := operator.answer(&run.Times); err != nil {
		return run, errors.Join(fmt.Errorf("the operator: %w", err), l.end())
	}
	return run, errors.Join(l.end(), operator.end())
}

// repeat makes the disturbance once a second until done is closed, and returns the number.
func (d disturbance) repeat(done <-chan struct{}) (times int, err error) {
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", d.Socket)
		},
	}}
	defer client.CloseIdleConnections()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return times, nil
		case <-tick.C:
		}
		if d.Method == "" {
			continue
		}
		if err := d.once(client); err != nil {
			return times, fmt.Errorf("%s: %w", d.Name, err)
		}
		times++
	}
}

func (d disturbance) once(client *http.Client) error {
	request, err := http.NewRequest(d.Method, "http://echod"+d.Path, strings.NewReader(d.Body))
	if err != nil {
		return err
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	if d.Notice == "" {
		_, err = io.Copy(io.Discard, answer.Body)
		return err
	}
	var told struct{ Sent, Failed int }
	if err := json.NewDecoder(answer.Body).Decode(&told); err != nil {
		return err
	}
	if told.Sent < d.Crowd {
		return fmt.Errorf("%d clients were told and %d were not, want at least %d told", told.Sent,
			told.Failed, d.Crowd)
	}
	return nil
}
