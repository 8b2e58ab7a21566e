package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"echod/bench/load"
)

// A disturbance is what an operator has done once a second, to a crowd of silent connections, while others are served.
type disturbance struct {
	Name   string
	method string
	path   string
	body   string
	notice string // that clients see
}

// The first is the measure for the others.
var disturbances = []disturbance{
	{Name: "nothing"},
	{Name: listing, method: http.MethodGet, path: "/v1/conns"},
	{Name: "a notice", method: http.MethodPost, path: "/v1/notify", body: `{"text":"hello"}`, notice: "NOTICE hello\n"},
}

// listing is the name of the disturbance that lists all connections.
const listing = "a listing"

// A besideRun is a measurement beside silent connections, with a disturbance that was made so many times.
type besideRun struct {
	Place, Shape, Disturbance string
	Times                     int
	Result                    load.Result
}

// runBeside measures what it costs clients, who echo or who connect, that there is a crowd, and that
// all of it is listed, or told something.
func (s *suite) runBeside(ctx context.Context) error {
	b, ok := s.theSubject()
	if !ok || s.crowd == 0 {
		return nil
	}
	for _, place := range s.places {
		p, err := start(ctx, b, place.server)
		if err != nil {
			return err
		}
		err = s.besideCrowd(ctx, p, place)
		if stopped := p.stop(); err == nil {
			err = stopped
		}
		if err != nil {
			return fmt.Errorf("beside a crowd: %w", err)
		}
	}
	return nil
}

func (s *suite) besideCrowd(ctx context.Context, p *process, place placement) error {
	crowd, err := s.startCrowd(ctx, jobHold, p, s.crowd, place.load)
	if err != nil {
		return err
	}
	for round := range s.besideRounds {
		for _, sh := range s.shapes {
			if sh.Name != shapes[0].Name && !sh.Churn {
				continue
			}
			for i := range disturbances {
				d := disturbances[(i+round)%len(disturbances)]
				s.say("%s beside %s idle ones, %s, with %s, round %d", sh.Title, thousands(s.crowd), place.Name, d.Name, round+1)
				run, err := s.disturbed(ctx, p, sh, place, d)
				if err != nil {
					return fmt.Errorf("with %s: %w", d.Name, err)
				}
				s.results.Beside = append(s.results.Beside, run)
			}
		}
	}
	return crowd.end()
}

// disturbed measures, with d once a second.
func (s *suite) disturbed(ctx context.Context, p *process, sh shape, place placement, d disturbance) (run besideRun, err error) {
	run = besideRun{Place: place.Name, Shape: sh.Name, Disturbance: d.Name}
	spec := sh.spec(p, s.besideLength)
	spec.Notice = d.notice
	l, err := startLoad(ctx, jobRun, spec, place.load)
	if err != nil {
		return run, err
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var operator sync.WaitGroup
	var failed error
	if d.method != "" {
		operator.Go(func() { run.Times, failed = d.keep(ctx, controlSocket(p.dir)) })
	}
	err = l.answer(&run.Result)
	stop(errMeasured)
	operator.Wait()
	if err != nil {
		return run, errors.Join(err, failed)
	}
	return run, errors.Join(l.end(), failed)
}

var errMeasured = errors.New("the measurement is over")

// keep makes the disturbance once a second until ctx ends, which is no error, and returns how often.
func (d disturbance) keep(ctx context.Context, socket string) (times int, err error) {
	client := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}
	defer client.CloseIdleConnections()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return times, nil
		case <-tick.C:
		}
		if err := d.once(context.WithoutCancel(ctx), client); err != nil {
			return times, err
		}
		times++
	}
}

func (d disturbance) once(ctx context.Context, client *http.Client) error {
	request, err := http.NewRequestWithContext(ctx, d.method, "http://echod"+d.path, strings.NewReader(d.body))
	if err != nil {
		return err
	}
	if d.body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	answer, err := client.Do(request)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	_, err = io.Copy(io.Discard, answer.Body)
	return err
}
