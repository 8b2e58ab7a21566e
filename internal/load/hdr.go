package load

import (
	"fmt"
	"io"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// WritePercentiles writes the latencies of echoes, in milliseconds, in the form
// that HdrHistogram's own plotters read (.hgrm).
func (r *Report) WritePercentiles(w io.Writer) error {
	const ticksPerHalfDistance = 5
	if _, err := r.histogram.echo.PercentilesPrint(w, ticksPerHalfDistance, float64(time.Millisecond)); err != nil {
		return fmt.Errorf("writing percentiles: %w", err)
	}
	return nil
}

// WriteHistogramLog writes the latencies of echoes and connects, in nanoseconds, as
// a log in HdrHistogram's own form (.hlog), with the tags echo and connect.
func (r *Report) WriteHistogramLog(w io.Writer) error {
	log := hdrhistogram.NewHistogramLogWriter(w)
	begin, end := r.Started.UnixMilli(), r.Started.Add(time.Duration(r.Lasted*float64(time.Second))).UnixMilli()
	err := log.OutputLogFormatVersion()
	if err == nil {
		err = log.OutputStartTime(begin)
	}
	if err == nil {
		err = log.OutputLegend()
	}
	for _, h := range []struct {
		tag       string
		histogram *hdrhistogram.Histogram
	}{{"echo", r.histogram.echo}, {"connect", r.histogram.connect}} {
		if err == nil {
			h.histogram.SetTag(h.tag)
			h.histogram.SetStartTimeMs(begin)
			h.histogram.SetEndTimeMs(end)
			err = log.OutputIntervalHistogram(h.histogram)
		}
	}
	if err != nil {
		return fmt.Errorf("writing the histogram log: %w", err)
	}
	return nil
}
