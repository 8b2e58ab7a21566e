package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"echod/server"
)

// Options configures a Collector and Durations.
type Options struct {
	// Labels are added to every metric, for example to tell two servers in one process apart.
	Labels prometheus.Labels
}

// Collector is a prometheus.Collector for the figures of a server's status. Each scrape reads one consistent
// snapshot. It may be registered with any registry, and used concurrently.
type Collector struct {
	status func() server.Status

	state, transitions, holds, conns, connsLimit, accepted, closed *prometheus.Desc
	rejected, bytes, notices, queue, queueLimit, behind, drain     *prometheus.Desc
}

// NewCollector returns a collector for srv.
func NewCollector(srv *server.Server, opts Options) *Collector { return newCollector(srv.Status, opts) }

func newCollector(status func() server.Status, opts Options) *Collector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("echod_"+name, help, labels, opts.Labels)
	}
	return &Collector{
		status:      status,
		state:       desc("state", "1 for the server's state, 0 for the others.", "state"),
		transitions: desc("state_transitions_total", "How often the server entered each state.", "state"),
		holds:       desc("holds", "Holds in force. The server is paused while there is one."),
		conns:       desc("connections", "Open connections, by phase.", "phase"),
		connsLimit: desc("connections_limit",
			"How many connections are served at once. Missing if there is no limit."),
		accepted: desc("connections_accepted_total", "Connections accepted, rejected ones included."),
		closed:   desc("connections_closed_total", "Connections closed, by reason.", "reason"),
		rejected: desc("connections_rejected_total", "Connections rejected, by reason. They count as closed too.",
			"reason"),
		bytes:      desc("bytes_total", "Bytes read from clients (in) and written to them (out).", "direction"),
		notices:    desc("notices_total", "Notices to clients, by whether the kernel took them.", "result"),
		queue:      desc("accept_queue_length", "Clients that wait in the kernel to be accepted.", "listener"),
		queueLimit: desc("accept_queue_limit", "How many clients can wait in the kernel.", "listener"),
		behind: desc("predecessor_connections",
			"Open connections that an upgrade has left with the old process. They have no phase here."),
		drain: desc("drain_duration_seconds", "How long the drain took, once it is over."),
	}
}

var states = []server.State{
	server.StateStarting, server.StateRunning, server.StatePaused, server.StateDraining,
	server.StateStopped,
}

// rejections are the close reasons of rejected connections, by the value of the label.
var rejections = map[string]server.Reason{
	"paused": server.ReasonRejectedPaused, "limit": server.ReasonRejectedLimit,
	"draining": server.ReasonRejectedDraining, "address-limit": server.ReasonRejectedAddressLimit,
	"rate": server.ReasonRejectedRate, "denied": server.ReasonRejectedDenied,
	"unidentified": server.ReasonRejectedHandshake,
}

// Describe sends the descriptions of all metrics.
func (c *Collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		c.state, c.transitions, c.holds, c.conns, c.connsLimit, c.accepted, c.closed,
		c.rejected, c.bytes, c.notices, c.queue, c.queueLimit, c.behind, c.drain,
	} {
		ch <- d
	}
}

// Collect sends the figures of the server's status.
func (c *Collector) Collect(ch chan<- prometheus.Metric) {
	st := c.status()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	for _, s := range states {
		is := 0.0
		if s == st.State {
			is = 1
		}
		gauge(c.state, is, s.String())
		if s != server.StateStarting { // never entered again
			counter(c.transitions, st.Transitions[s], s.String())
		}
	}
	gauge(c.holds, float64(len(st.Holds)))
	for phase := server.PhaseWaiting; phase <= server.PhaseClosing; phase++ {
		gauge(c.conns, float64(st.Phases[phase]), phase.String())
	}
	gauge(c.behind, float64(st.KeptByPredecessor))
	if st.MaxConns > 0 {
		gauge(c.connsLimit, float64(st.MaxConns))
	}
	counter(c.accepted, st.Accepted)
	for _, why := range server.Reasons() { // zeros too, or a rate would miss the first of each
		counter(c.closed, st.Closed[why], why.String())
	}
	for label, why := range rejections {
		counter(c.rejected, st.Closed[why], label)
	}
	counter(c.bytes, st.BytesIn, "in")
	counter(c.bytes, st.BytesOut, "out")
	counter(c.notices, st.NoticesSent, "sent")
	counter(c.notices, st.NoticesFailed, "failed")
	for _, ln := range st.Listeners {
		if ln.AcceptQueue >= 0 {
			gauge(c.queue, float64(ln.AcceptQueue), ln.Address.String())
			gauge(c.queueLimit, float64(ln.AcceptQueueLimit), ln.Address.String())
		}
	}
	ch <- c.drainHistogram(st)
}

// drainBuckets are in seconds: a drain takes as long as its grace period.
var drainBuckets = []float64{0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 900, 3600}

// drainHistogram holds the server's only drain, once it is over.
func (c *Collector) drainHistogram(st server.Status) prometheus.Metric {
	buckets := make(map[float64]uint64, len(drainBuckets))
	var count uint64
	var took float64
	if st.Drain != nil && st.State == server.StateStopped {
		count, took = 1, st.Drain.Ended.Sub(st.Drain.Since).Seconds()
	}
	for _, bound := range drainBuckets {
		buckets[bound] = 0
		if count == 1 && took <= bound {
			buckets[bound] = 1
		}
	}
	return prometheus.MustNewConstHistogram(c.drain, count, took, buckets)
}

// Durations is a prometheus.Collector for how long closed connections were open. Its OnClose belongs in the server's
// Options.
type Durations struct{ prometheus.Histogram }

// NewDurations returns a histogram without observations.
func NewDurations(opts Options) Durations {
	return Durations{prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "echod_connection_duration_seconds", Help: "How long closed connections were open.",
		ConstLabels: opts.Labels,
		Buckets:     []float64{0.01, 0.1, 1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600}, // in seconds
	})}
}

// OnClose observes a closed connection.
func (d Durations) OnClose(c server.ClosedConn) { d.Observe(c.Closed.Sub(c.Opened).Seconds()) }
