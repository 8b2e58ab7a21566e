package load

import (
	"errors"
	"net"
	"slices"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// A Report is what a run has found out. Times are in seconds.
type Report struct {
	Address  string    `json:"address"`
	Started  time.Time `json:"started"`
	Conns    int       `json:"conns"`
	Size     int       `json:"size"`
	Rate     float64   `json:"rate"` // zero for the closed model
	Pipeline int       `json:"pipeline"`

	Late      float64 `json:"late_seconds"`
	Churn     float64 `json:"churn_seconds"` // zero for never
	Ramp      float64 `json:"ramp_seconds"`
	Timeout   float64 `json:"timeout_seconds"`
	DrainWait float64 `json:"drain_wait_seconds"`
	Reconnect bool    `json:"reconnect"`

	// Planned and Lasted are for how long messages were to fall due and did; then
	// the run waited for what was under way.
	Planned float64 `json:"planned_seconds"`
	Lasted  float64 `json:"lasted_seconds"`

	Counts
	Errors []string `json:"errors"` // of connects and connections, a few of them

	// PerSecond is how many echoes came back in a second, on average.
	PerSecond float64 `json:"echoes_per_second"`
	Outage    Outage  `json:"without_service"`
	Connect   Latency `json:"connect_latency"` // from the attempt to the connection
	Echo      Latency `json:"echo_latency"`    // from when it was due to its last byte
	Series    []Point `json:"series"`
	histogram histogram
}

type histogram struct{ connect, echo *hdrhistogram.Histogram }

// Outage says for how long clients were without service. An outage begins with a
// notice that ends the connection, with an end that nothing announced, or with the
// begin of an attempt to connect that failed. It ends with the first echo over a
// later connection, or with the run. Connections made anew by Options.Churn are
// none. Nor is a message that is late, as long as others come back: but when for
// more than Options.Late nothing has, though a message was due, that is an outage
// since then, and ends with the next echo.
type Outage struct {
	Clients int     `json:"clients"`        // that had one
	Median  float64 `json:"median_seconds"` // over all clients, of the sum of each
	Max     float64 `json:"max_seconds"`
}

// Latency is a distribution in seconds.
type Latency struct {
	Count int64   `json:"count"`
	Mean  float64 `json:"mean_seconds"`
	P50   float64 `json:"p50_seconds"`
	P90   float64 `json:"p90_seconds"`
	P99   float64 `json:"p99_seconds"`
	P999  float64 `json:"p999_seconds"`
	P9999 float64 `json:"p9999_seconds"`
	Max   float64 `json:"max_seconds"`
}

func latencyOf(h *hdrhistogram.Histogram) Latency {
	if h.TotalCount() == 0 {
		return Latency{}
	}
	return Latency{
		Count: h.TotalCount(), Mean: h.Mean() / float64(time.Second),
		P50: percentile(h, 50), P90: percentile(h, 90), P99: percentile(h, 99), P999: percentile(h, 99.9), P9999: percentile(h, 99.99),
		Max: percentile(h, 100),
	}
}

func (r *run) report(loops []*loop) *Report {
	opts := &r.opts
	echo, connect := newHistogram(), newHistogram()
	var without []float64
	out := Outage{}
	lasted := time.Duration(0)
	for _, l := range loops {
		echo.Merge(l.tally.echoes)
		connect.Merge(l.tally.connect)
		lasted = max(lasted, l.endedAt)
		for _, u := range l.users {
			without = append(without, u.without.Seconds())
			if u.without > 0 {
				out.Clients++
			}
		}
	}
	slices.Sort(without)
	out.Median, out.Max = without[len(without)/2], without[len(without)-1]
	return &Report{
		Address: opts.Address, Started: r.began, Conns: opts.Conns, Size: opts.Size, Rate: opts.Rate, Pipeline: opts.Pipeline,
		Late: opts.Late.Seconds(), Churn: opts.Churn.Seconds(), Ramp: opts.Ramp.Seconds(), Timeout: opts.Timeout.Seconds(),
		DrainWait: opts.DrainWait.Seconds(), Reconnect: !opts.NoReconnect,
		Planned: opts.Duration.Seconds(), Lasted: lasted.Seconds(),
		Counts: r.total, Errors: append([]string{}, r.errs...),
		PerSecond: float64(r.total.Echoes.Returned) / max(lasted, time.Nanosecond).Seconds(),
		Outage:    out, Connect: latencyOf(connect), Echo: latencyOf(echo),
		Series:    series(r.points, r.step, lasted, time.Since(r.began)),
		histogram: histogram{connect, echo},
	}
}

// plain says err without the address, which the reader knows.
func plain(err error) string {
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		err = op.Err
	}
	return err.Error()
}
