// Package metrics exports a server's metrics to Prometheus, with the names and units of its conventions
// (https://prometheus.io/docs/practices/naming/).
//
// NewCollector is for programs with a registry of their own. New is for programs that have none: it adds the
// program's own metrics, and serves all of them over HTTP. The package starts no goroutines.
package metrics

import (
	"errors"
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"echod/server"
)

// Metrics are all metrics of a program with one server: the server's, and those of signals, control requests, the
// process and the Go runtime. All methods may be called concurrently.
//
// Give OnClose to the server's Options, then call Watch with the server.
type Metrics struct {
	registry   *prometheus.Registry
	signals    *prometheus.CounterVec
	requests   *prometheus.CounterVec
	dropped    *prometheus.CounterVec
	handshakes *prometheus.CounterVec
	durations  Durations
	handler    http.Handler
}

// New returns the metrics of a program of the given version.
func New(version string) *Metrics {
	m := &Metrics{
		registry: prometheus.NewRegistry(),
		signals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "echod_signals_total", Help: "Signals received, by name.",
		}, []string{"signal"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "echod_control_requests_total",
			Help: "Requests answered on the control socket and over HTTP, by route, method and status code.",
		}, []string{"route", "method", "code"}),
		dropped: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "echod_log_entries_dropped_total", Help: "Log entries dropped, by cause: sampling or a slow reader.",
		}, []string{"cause"}),
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "echod_tls_handshake_failures_total", Help: "TLS handshakes that failed, by reason.",
		}, []string{"reason"}),
		durations: NewDurations(Options{}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "echod_build_info", Help: "1, with the version as a label.",
		ConstLabels: prometheus.Labels{"version": version},
	})
	build.Set(1)
	for _, why := range server.HandshakeFailures() { // zeros too, or a rate would miss the first of each
		m.handshakes.WithLabelValues(string(why))
	}
	m.registry.MustRegister(build, m.signals, m.requests, m.dropped, m.durations,
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector())
	m.handler = promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
	return m
}

// Watch adds the metrics of srv. Call it once.
func (m *Metrics) Watch(srv *server.Server) { m.registry.MustRegister(NewCollector(srv, Options{})) }

// WatchCertificates adds the metrics of certificates and of TLS handshakes. Call it once.
func (m *Metrics) WatchCertificates(certs *server.Certificates) {
	m.registry.MustRegister(m.handshakes, newCertificateCollector(certs))
}

// OnClose counts a closed connection. It is for the server's Options.
func (m *Metrics) OnClose(c server.ClosedConn) {
	m.durations.OnClose(c)
	if failed, ok := errors.AsType[*server.HandshakeError](c.Err); ok {
		m.handshakes.WithLabelValues(string(failed.Failure)).Inc()
	}
}

// Signal counts a signal by its name.
func (m *Metrics) Signal(name string) { m.signals.WithLabelValues(name).Inc() }

// Request counts a request to the control plane. It is for control.Options.OnRequest.
func (m *Metrics) Request(route, method string, code int) {
	m.requests.WithLabelValues(route, method, strconv.Itoa(code)).Inc()
}

// LogDropped counts log entries that were dropped, by their cause.
func (m *Metrics) LogDropped(cause string, entries int64) {
	m.dropped.WithLabelValues(cause).Add(float64(entries))
}

// ServeHTTP answers with all metrics in the format that the request accepts.
func (m *Metrics) ServeHTTP(w http.ResponseWriter, r *http.Request) { m.handler.ServeHTTP(w, r) }
