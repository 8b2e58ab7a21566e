package load

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// A Report is the result of a run. Times are in seconds.
type Report struct {
	Address   string          `json:"address"`
	Addresses []TargetCount   `json:"addresses,omitempty"` // the IP addresses of Address; none with Options.Dial
	Started   time.Time       `json:"started"`
	Conns     int             `json:"conns"`
	Size      int             `json:"size"`  // the mean
	Sizes     string          `json:"sizes"` // see ParseSizes
	Rate      float64         `json:"rate"`  // zero for the closed model; the mean of all stages
	Stages    []ReportedStage `json:"stages,omitempty"`
	Think     string          `json:"think,omitempty"` // see ParseRange
	Pipeline  int             `json:"pipeline"`

	Late      float64 `json:"late_seconds"`
	Churn     float64 `json:"churn_seconds"` // zero means never
	Ramp      float64 `json:"ramp_seconds"`
	Timeout   float64 `json:"timeout_seconds"`
	DrainWait float64 `json:"drain_wait_seconds"`
	Reconnect bool    `json:"reconnect"`

	// Planned is for how long messages were to be sent. Lasted is for how long they
	// were. Took includes the wait for the last echo.
	Planned float64 `json:"planned_seconds"`
	Lasted  float64 `json:"lasted_seconds"`
	Took    float64 `json:"took_seconds"`

	Counts
	Errors []string `json:"errors"` // of connects and connections, the first few different ones

	// OfferedPerSecond is how many messages became due each second while they were
	// sent. It is zero in the closed model. PerSecond is how many echoes came back each
	// second, until the last one.
	OfferedPerSecond float64 `json:"offered_per_second"`
	PerSecond        float64 `json:"echoes_per_second"`

	Outage  Outage  `json:"without_service"`
	Connect Latency `json:"connect_latency"` // from the attempt to the connection, with its TLS handshake
	Echo    Latency `json:"echo_latency"`    // from when a message was due to its last byte
	Series  []Point `json:"series"`

	Handshake Latency `json:"handshake_latency"` // of TLS; without TLS the count is zero

	histograms *interval
}

// A ReportedStage is a Stage.
type ReportedStage struct {
	Rate    float64 `json:"rate"`
	Seconds float64 `json:"seconds"`
}

// A TargetCount counts the connects to one address.
type TargetCount struct {
	Address string `json:"address"`
	Made    int64  `json:"made"`
	Failed  int64  `json:"failed"`
}

// Outage says for how long clients were without service. An outage begins with a
// notice that ends the connection, with an end that no notice announced, or with the
// start of a connect that failed. It ends with the first echo on a later connection, or
// with the run. Replacing a connection because of Options.Churn is not an outage. Nor
// is a late message while others come back. But if nothing came back for longer than
// Options.Late although something was sent, there is an outage since then, until the
// next echo.
type Outage struct {
	Clients int     `json:"clients"`        // that had an outage
	Median  float64 `json:"median_seconds"` // over all clients, of the sum of their outages
	Max     float64 `json:"max_seconds"`
}

// Latency is a distribution, in seconds.
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
		P50: percentile(h, 50), P90: percentile(h, 90), P99: percentile(h, 99), P999: percentile(h,
			99.9), P9999: percentile(h, 99.99),
		Max: percentile(h, 100),
	}
}

func (r *run) report(workers []*worker) *Report {
	opts := &r.opts
	outage := Outage{}
	var outages []float64
	lasted, due := time.Duration(0), int64(0)
	for _, w := range workers {
		lasted = max(lasted, w.drainAt)
		due += w.dueSum
		for _, u := range w.users {
			outages = append(outages, u.total.Seconds())
			if u.total > 0 {
				outage.Clients++
			}
		}
	}
	slices.Sort(outages)
	outage.Median, outage.Max = outages[len(outages)/2], outages[len(outages)-1]
	took := max(lasted, r.lastEcho)
	report := &Report{
		Address: opts.Address, Started: r.began, Conns: opts.Conns,
		Size: opts.Sizes.Mean(), Sizes: opts.Sizes.String(), Pipeline: opts.Pipeline,
		Late: opts.Late.Seconds(), Churn: opts.Churn.Seconds(), Ramp: opts.Ramp.Seconds(),
		Timeout:   opts.Timeout.Seconds(),
		DrainWait: opts.DrainWait.Seconds(), Reconnect: !opts.NoReconnect,
		Planned: opts.Duration.Seconds(), Lasted: lasted.Seconds(), Took: took.Seconds(),
		Counts: r.total, Errors: append([]string{}, r.errs...),
		OfferedPerSecond: perSecond(due, lasted), PerSecond: perSecond(r.total.Echoes.Returned, took),
		Outage:  outage,
		Connect: latencyOf(r.latencies.total.connect), Echo: latencyOf(r.latencies.total.echo),
		Handshake:  latencyOf(r.latencies.total.handshake),
		Series:     series(r.points, r.step, lasted, time.Since(r.began), r.schedule.rate),
		histograms: r.latencies.total,
	}
	if opts.Think.Max > 0 {
		report.Think = opts.Think.String()
	}
	messages := 0.0
	for _, s := range opts.Stages {
		report.Stages = append(report.Stages, ReportedStage{s.Rate, s.Duration.Seconds()})
		messages += s.Rate * s.Duration.Seconds()
	}
	report.Rate = messages / opts.Duration.Seconds()
	for _, t := range r.targets {
		report.Addresses = append(report.Addresses, TargetCount{t.address, t.made.Load(), t.failed.Load()})
	}
	return report
}

func perSecond(n int64, d time.Duration) float64 {
	return float64(n) / max(d, time.Nanosecond).Seconds()
}

// Limits are what a run must keep to. A nil field sets no limit.
type Limits struct {
	P99, P999   *time.Duration // of echoes
	ConnectP99  *time.Duration
	Lost        *int64         // messages
	Refused     *int64         // connects that failed or were turned away
	Outage      *time.Duration // time without service, of the client that had the most
	Disconnects *int64         // connections that ended without a notice
}

// Failures returns what is wrong with a run, in words. Messages that were lost (more
// than allowed, if there is a limit), corrupted, unexpected, duplicated, reordered,
// foreign or never sent are wrong. So is a run without any echo, one that this machine
// could not carry out, and one that breaks a limit.
func (r *Report) Failures(limits Limits) []string {
	var failures []string
	add := func(format string, args ...any) { failures = append(failures, fmt.Sprintf(format, args...)) }
	e := r.Echoes
	if e.Returned == 0 {
		add("no echo came back")
	}
	for _, fault := range []struct {
		n    int64
		what string
	}{
		{e.Corrupted, "corrupted"},
		{e.Unexpected, "received that were never sent"},
		{e.Duplicated, "duplicated"},
		{e.Reordered, "out of order"},
		{e.Foreign, "received on a connection that had not sent them"},
		{e.Unsent, "due, but never sent: no connection could take them"},
	} {
		if fault.n > 0 {
			add("%s %s", count(fault.n, "message"), fault.what)
		}
	}
	switch {
	case limits.Lost == nil && e.Lost > 0:
		add("%s lost", count(e.Lost, "message"))
	case limits.Lost != nil && e.Lost > *limits.Lost:
		add("%s lost: more than %d", count(e.Lost, "message"), *limits.Lost)
	}
	if n := r.Connects.Missed(); limits.Refused != nil && n > *limits.Refused {
		was := "were"
		if n == 1 {
			was = "was"
		}
		add("%s failed or %s turned away: more than %d", count(n, "connect"), was, *limits.Refused)
	}
	if n := r.Ends.Unannounced(); limits.Disconnects != nil && n > *limits.Disconnects {
		add("%s ended without a notice: more than %d", count(n, "connection"), *limits.Disconnects)
	}
	for _, limit := range []struct {
		what  string
		got   float64
		limit *time.Duration
	}{
		{"p99 of echoes", r.Echo.P99, limits.P99},
		{"p99.9 of echoes", r.Echo.P999, limits.P999},
		{"p99 of connects", r.Connect.P99, limits.ConnectP99},
		{"longest time without service", r.Outage.Max, limits.Outage},
	} {
		if got := time.Duration(limit.got * float64(time.Second)); limit.limit != nil && got > *limit.limit {
			add("%s is %v: more than %v", limit.what, got.Round(time.Microsecond), *limit.limit)
		}
	}
	if n := r.Connects.NoPort; n > 0 {
		add("%s failed because this machine ran out of local ports, which is not the server's fault: %s",
			count(n, "connect"), portAdvice)
	}
	return failures
}

// count formats a number with its noun, such as 1 message or 2 messages.
func count(n int64, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return strconv.FormatInt(n, 10) + " " + noun + "s"
}
