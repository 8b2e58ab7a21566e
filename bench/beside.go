package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"echod/bench/load"
)

// A disturbance is what an operator has done once a second, to a crowd of silent connections, while others are served.
type disturbance struct {
	Name   string
	Method string // empty for nothing
	Path   string
	Body   string
	Notice string // that clients see
	Socket string // of the control plane
	Crowd  int    // how many stay, and so are told; others may leave at that moment
}

// The first is the measure for the others.
var disturbances = []disturbance{
	{Name: "nothing"},
	{Name: listing, Method: http.MethodGet, Path: "/v1/conns"},
	{Name: "a notice", Method: http.MethodPost, Path: "/v1/notify", Body: `{"text":"hello"}`, Notice: "NOTICE hello\n"},
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

func (s *suite) besideCrowd(ctx context.Context, p *process, place placement) (err error) {
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
				s.say("%s beside %s idle ones, %s, with %s, round %d", sh.Title, thousands(s.crowd), place.Name, d.Name, round+1)
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

// disturbed measures, with d once a second.
func (s *suite) disturbed(ctx context.Context, p *process, sh shape, place placement, d disturbance) (run besideRun, err error) {
	run = besideRun{Place: place.Name, Shape: sh.Name, Disturbance: d.Name}
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
	_ = operator.hangUp.Close()
	if err := operator.answer(&run.Times); err != nil {
		return run, errors.Join(fmt.Errorf("the operator: %w", err), l.end())
	}
	return run, errors.Join(l.end(), operator.end())
}

// keep makes the disturbance once a second until done is closed, and returns how often.
func (d disturbance) keep(done <-chan struct{}) (times int, err error) {
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
		return fmt.Errorf("%d clients were told, and %d were not, of whom %d stay", told.Sent, told.Failed, d.Crowd)
	}
	return nil
}
