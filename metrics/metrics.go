// Package metrics shows a server to Prometheus. Names and units follow its conventions:
// https://prometheus.io/docs/practices/naming/. It starts no goroutine.
package metrics

import (
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"echod/server"
)

// Metrics counts what a server does not count itself, and shows both. Make one with New, give the server
// its OnClose, and Watch the server. All methods may be called concurrently.
type Metrics struct {
	registry  *prometheus.Registry
	signals   *prometheus.CounterVec
	requests  *prometheus.CounterVec
	durations prometheus.Histogram
	handler   http.Handler
}

// New makes the metrics of a program of the given version.
func New(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		signals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "echod_signals_total", Help: "Signals received, by name.",
		}, []string{"signal"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "echod_control_requests_total", Help: "Requests answered on the control socket and over HTTP, by route, method and status code.",
		}, []string{"route", "method", "code"}),
		durations: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "echod_connection_duration_seconds", Help: "How long connections were open, of those that have closed.", Buckets: connectionBuckets,
		}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "echod_build_info", Help: "1, with the version as a label.", ConstLabels: prometheus.Labels{"version": version},
	})
	build.Set(1)
	m.registry.MustRegister(build, m.signals, m.requests, m.durations,
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector())
	m.handler = promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
	return m
}

// Buckets in seconds. Connections of an echo live for a moment or for days, drains as long as their grace.
var (
	connectionBuckets = []float64{0.01, 0.1, 1, 10, 60, 600, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600}
	drainBuckets      = []float64{0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 900, 3600}
)

// Watch shows srv. It is for one server, once.
func (m *Metrics) Watch(srv *server.Server) { m.registry.MustRegister(collector{srv.Status}) }

// OnClose counts a closed connection; it is for server.Options.
func (m *Metrics) OnClose(c server.ClosedConn) { m.durations.Observe(c.Closed.Sub(c.Opened).Seconds()) }

// Signal counts a signal, by its name.
func (m *Metrics) Signal(name string) { m.signals.WithLabelValues(name).Inc() }

// Request counts a request to the control plane, by the path of its route.
func (m *Metrics) Request(route, method string, code int) {
	m.requests.WithLabelValues(route, method, strconv.Itoa(code)).Inc()
}

// ServeHTTP answers with all metrics, in the format that the request asks for.
func (m *Metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) { m.handler.ServeHTTP(w, r) }
