package load

import (
	"encoding/csv"
	"fmt"
	"io"
	"reflect"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
)

// WritePercentiles writes the latencies of echoes, in milliseconds, as the table that
// HdrHistogram's plotters read (.hgrm).
func (r *Report) WritePercentiles(w io.Writer) error {
	const ticksPerHalfDistance = 5
	if _, err := r.histograms.echo.PercentilesPrint(w, ticksPerHalfDistance,
		float64(time.Millisecond)); err != nil {
		return fmt.Errorf("writing percentiles: %w", err)
	}
	return nil
}

// WriteCSV writes the time series as CSV, with the names of its JSON fields as header.
func (r *Report) WriteCSV(w io.Writer) error {
	out := csv.NewWriter(w)
	var header []string
	for f := range reflect.TypeFor[Point]().Fields() {
		header = append(header, f.Tag.Get("json"))
	}
	_ = out.Write(header) // Error reports it
	for _, p := range r.Series {
		var row []string
		for _, v := range reflect.ValueOf(p).Fields() {
			if v.CanInt() {
				row = append(row, strconv.FormatInt(v.Int(), 10))
			} else {
				row = append(row, strconv.FormatFloat(v.Float(), 'g', -1, 64))
			}
		}
		_ = out.Write(row)
	}
	out.Flush()
	if err := out.Error(); err != nil {
		return fmt.Errorf("writing CSV: %w", err)
	}
	return nil
}

// WritePrometheus writes the report in Prometheus' text format, for a textfile
// collector or a push gateway.
func (r *Report) WritePrometheus(w io.Writer) error {
	registry := prometheus.NewPedanticRegistry()
	if err := registry.Register(reportCollector{r}); err != nil {
		return fmt.Errorf("writing metrics: %w", err)
	}
	families, err := registry.Gather()
	if err != nil {
		return fmt.Errorf("writing metrics: %w", err)
	}
	enc := expfmt.NewEncoder(w, expfmt.NewFormat(expfmt.TypeTextPlain))
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return fmt.Errorf("writing metrics: %w", err)
		}
	}
	return nil
}

// A reportCollector presents a report as metrics.
type reportCollector struct{ *Report }

// Describe sends nothing: the collector is unchecked.
func (c reportCollector) Describe(chan<- *prometheus.Desc) {}

// Collect sends all metrics.
func (c reportCollector) Collect(ch chan<- prometheus.Metric) {
	gauge := func(name, help string, value float64, labels ...string) {
		c.send(ch, prometheus.GaugeValue, name, help, value, labels)
	}
	gauge("info", "The run; always 1.", 1, "address", c.Address, "sizes", c.Sizes)
	gauge("start_time_seconds", "When the run began, since the epoch.", float64(c.Started.UnixMilli())/1e3)
	gauge("connections", "Connections at a time.", float64(c.Conns))
	gauge("duration_seconds", "Time until the last echo.", c.Took)
	gauge("offered_messages_per_second", "Messages that became due; 0 in the closed model.", c.OfferedPerSecond)
	gauge("echoes_per_second", "Echoes that came back.", c.PerSecond)
	gauge("without_service_clients", "Clients that were without service for a while.",
		float64(c.Outage.Clients))
	gauge("without_service_max_seconds", "Time without service of the client that had the most.", c.Outage.Max)
	gauge("without_service_median_seconds", "Median time without service of all clients.", c.Outage.Median)
	c.counters(ch, "connects_total", "Attempts to connect by result; tried is all of them.", c.Connects)
	c.counters(ch, "messages_total", "Messages by what became of them; sent is all of them.", c.Echoes)
	c.counters(ch, "notices_total", "Notices from the server.", c.Notices)
	c.counters(ch, "ends_total", "Connections by how they ended.", c.Ends)
	c.send(ch, prometheus.CounterValue, "reconnects_total", "Connections that replaced another.",
		float64(c.Reconnects), nil)
	for _, l := range []struct {
		name, help string
		Latency
	}{
		{"connect_latency_seconds", "Time from the attempt to the connection, with its TLS handshake.", c.Connect},
		{"handshake_latency_seconds", "Time of the TLS handshake.", c.Handshake},
		{"echo_latency_seconds", "Time from when a message was due to its echo.", c.Echo},
	} {
		desc := prometheus.NewDesc("echod_load_"+l.name, l.help, nil, nil)
		ch <- prometheus.MustNewConstSummary(desc, uint64(l.Count), l.Mean*float64(l.Count),
			map[float64]float64{
				0.5: l.P50, 0.9: l.P90, 0.99: l.P99, 0.999: l.P999, 0.9999: l.P9999, 1: l.Max,
			})
	}
}

// counters sends a counter for each field of counts, with its JSON name as label.
func (c reportCollector) counters(ch chan<- prometheus.Metric, name, help string, counts any) {
	v := reflect.ValueOf(counts)
	for f, value := range v.Fields() {
		c.send(ch, prometheus.CounterValue, name, help, float64(value.Int()),
			[]string{"kind", f.Tag.Get("json")})
	}
}

// send sends a metric. labels are names and values in turn.
func (c reportCollector) send(ch chan<- prometheus.Metric, kind prometheus.ValueType, name, help string,
	value float64, labels []string,
) {
	var names, values []string
	for i := 0; i < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, strings.ToValidUTF8(labels[i+1], "\uFFFD"))
	}
	ch <- prometheus.MustNewConstMetric(prometheus.NewDesc("echod_load_"+name, help, names, nil), kind,
		value, values...)
}
