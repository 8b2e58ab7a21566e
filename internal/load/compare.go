package load

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// A Comparison puts the figures of two runs side by side.
type Comparison struct {
	Before time.Time `json:"before_started"`

	// Differences are the settings in which the runs differ, such as "conns: 10, was 5".
	// If there are any, the figures say little.
	Differences []string `json:"differences"`

	Figures []Figure `json:"figures"`
}

// A Figure is one figure of two runs.
type Figure struct {
	Name   string  `json:"name"`
	Before float64 `json:"before"`
	After  float64 `json:"after"`

	// Change is After relative to Before: 0.1 is 10 % more. It is nil if Before is zero.
	Change *float64 `json:"change"`
}

// ReadReport reads a report in JSON, as echod load --json prints it.
func ReadReport(in io.Reader) (*Report, error) {
	text, err := io.ReadAll(in)
	if err != nil {
		return nil, fmt.Errorf("reading a report: %w", err)
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		return nil, fmt.Errorf("reading a report: %w", err)
	}
	for _, name := range []string{"echoes", "echo_latency", "echoes_per_second"} {
		if fields[name] == nil {
			return nil, errors.New("not a report of echod load --json: it lacks " + name)
		}
	}
	r := &Report{}
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("reading a report: %w", err)
	}
	for _, f := range figures(r) {
		if f.After < 0 {
			return nil, fmt.Errorf("reading a report: %s is negative", f.Name)
		}
	}
	return r, nil
}

// handshakeFigure is a figure of runs over TLS.
const handshakeFigure = "handshake_p99_seconds"

// figures returns what a comparison shows of a report, as After.
func figures(r *Report) []Figure {
	return []Figure{
		{Name: "echoes_per_second", After: r.PerSecond},
		{Name: "echo_p50_seconds", After: r.Echo.P50},
		{Name: "echo_p90_seconds", After: r.Echo.P90},
		{Name: "echo_p99_seconds", After: r.Echo.P99},
		{Name: "echo_p999_seconds", After: r.Echo.P999},
		{Name: "echo_max_seconds", After: r.Echo.Max},
		{Name: "connect_p99_seconds", After: r.Connect.P99},
		{Name: handshakeFigure, After: r.Handshake.P99},
		{Name: "without_service_max_seconds", After: r.Outage.Max},
		{Name: "lost", After: float64(r.Echoes.Lost)},
		{Name: "corrupted", After: float64(r.Echoes.Corrupted)},
		{Name: "refused", After: float64(r.Connects.Missed())},
		{Name: "disconnects", After: float64(r.Ends.Unannounced())},
	}
}

// Compare compares the report of a run with that of one before it.
func (r *Report) Compare(before *Report) *Comparison {
	c := &Comparison{Before: before.Started, Differences: []string{}}
	for _, s := range []struct {
		name     string
		now, was any
	}{
		{"address", r.Address, before.Address},
		{"conns", r.Conns, before.Conns},
		{"sizes", r.Sizes, before.sizes()},
		{"load", r.model(), before.model()},
		{"pipeline", r.Pipeline, before.Pipeline},
		{"ramp", r.Ramp, before.Ramp},
		{"churn", r.Churn, before.Churn},
		{"reconnect", r.Reconnect, before.Reconnect},
		{"duration", r.Planned, before.Planned},
	} {
		if s.now != s.was {
			c.Differences = append(c.Differences, fmt.Sprintf("%s: %v, was %v", s.name, s.now, s.was))
		}
	}
	was := figures(before)
	for i, f := range figures(r) {
		f.Before = was[i].After
		if f.Name == handshakeFigure && f.Before == 0 && f.After == 0 {
			continue // no TLS
		}
		if f.Before != 0 {
			f.Change = new(f.After/f.Before - 1)
		}
		c.Figures = append(c.Figures, f)
	}
	return c
}

// sizes returns the distribution of sizes. Reports of old versions have only one size.
func (r *Report) sizes() string {
	if r.Sizes == "" {
		return FixedSize(r.Size).String()
	}
	return r.Sizes
}

// model describes what was offered.
func (r *Report) model() string {
	switch {
	case len(r.Stages) > 1:
		var stages []string
		for _, s := range r.Stages {
			stages = append(stages, fmt.Sprintf("%g/s for %gs", s.Rate, s.Seconds))
		}
		return strings.Join(stages, ", ")
	case r.Rate > 0:
		return fmt.Sprintf("%g/s", r.Rate)
	case r.Think != "":
		return "closed, think time " + r.Think
	}
	return "closed"
}
