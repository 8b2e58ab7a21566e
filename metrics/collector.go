package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"echod/server"
)

// collector reads a server's own figures at each scrape: they are of one instant, and agree with one another.
type collector struct{ status func() server.Status }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("echod_"+name, help, labels, nil)
}

var (
	stateDesc       = desc("state", "1 for the state that the server is in, 0 for the others.", "state")
	transitionsDesc = desc("state_transitions_total", "How often each state was entered.", "state")
	holdsDesc       = desc("holds", "Holds that stand: the server is paused while there is one.")
	connsDesc       = desc("connections", "Open connections, by phase.", "phase")
	connsLimitDesc  = desc("connections_limit", "How many connections are served at once. Absent where it is unlimited.")
	acceptedDesc    = desc("connections_accepted_total", "Connections accepted, those that were turned away included.")
	closedDesc      = desc("connections_closed_total", "Connections closed, by reason.", "reason")
	rejectedDesc    = desc("connections_rejected_total", "Connections turned away, by reason. They count as closed too.", "reason")
	bytesDesc       = desc("bytes_total", "Bytes read from clients (in) and written to them (out).", "direction")
	noticesDesc     = desc("notices_total", "Notices to clients, by whether the kernel took them.", "result")
	queueDesc       = desc("accept_queue_length", "Clients that wait in the kernel to be accepted.", "listener")
	limitDesc       = desc("accept_queue_limit", "How many clients can wait in the kernel.", "listener")
	drainDesc       = desc("drain_duration_seconds", "How long the drain took, once it is over.")
)

var states = []server.State{server.Starting, server.Running, server.Paused, server.Draining, server.Stopped}

// rejections are the close reasons of connections that were turned away, by the label's value.
var rejections = map[string]server.Reason{
	"paused": server.RejectedPaused, "limit": server.RejectedLimit, "draining": server.RejectedDraining,
	"unidentified": server.RejectedUnidentified,
}

// Describe is prometheus.Collector's.
func (c collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		stateDesc, transitionsDesc, holdsDesc, connsDesc, connsLimitDesc, acceptedDesc, closedDesc,
		rejectedDesc, bytesDesc, noticesDesc, queueDesc, limitDesc, drainDesc,
	} {
		ch <- d
	}
}

// Collect is prometheus.Collector's.
func (c collector) Collect(ch chan<- prometheus.Metric) {
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
		gauge(stateDesc, is, s.String())
		if s != server.Starting { // which nothing leads to
			counter(transitionsDesc, st.Transitions[s], s.String())
		}
	}
	gauge(holdsDesc, float64(len(st.Holds)))
	for phase := server.Waiting; phase <= server.Closing; phase++ {
		gauge(connsDesc, float64(st.Phases[phase]), phase.String())
	}
	if st.MaxConns > 0 {
		gauge(connsLimitDesc, float64(st.MaxConns))
	}
	counter(acceptedDesc, st.Accepted)
	for _, why := range server.Reasons() { // all of them, or a rate would miss the first of each
		counter(closedDesc, st.Closed[why], why.String())
	}
	for label, why := range rejections {
		counter(rejectedDesc, st.Closed[why], label)
	}
	counter(bytesDesc, st.BytesIn, "in")
	counter(bytesDesc, st.BytesOut, "out")
	counter(noticesDesc, st.NoticesSent, "sent")
	counter(noticesDesc, st.NoticesFailed, "failed")
	for _, ln := range st.Listeners {
		if ln.AcceptQueue >= 0 {
			gauge(queueDesc, float64(ln.AcceptQueue), ln.Address.String())
			gauge(limitDesc, float64(ln.AcceptQueueLimit), ln.Address.String())
		}
	}
	ch <- drainHistogram(st)
}

// drainHistogram has the one drain that a server can have, once it is over.
func drainHistogram(st server.Status) prometheus.Metric {
	buckets := make(map[float64]uint64, len(drainBuckets))
	var count uint64
	var took float64
	if st.Drain != nil && st.State == server.Stopped {
		count, took = 1, st.Drain.Ended.Sub(st.Drain.Since).Seconds()
	}
	for _, bound := range drainBuckets {
		buckets[bound] = 0
		if count == 1 && took <= bound {
			buckets[bound] = 1
		}
	}
	return prometheus.MustNewConstHistogram(drainDesc, count, took, buckets)
}
