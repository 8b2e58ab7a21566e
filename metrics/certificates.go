package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"echod/server"
)

// certificateCollector exports the certificates that a server shows to TLS clients.
type certificateCollector struct {
	certs            *server.Certificates
	notAfter, reload *prometheus.Desc
}

func newCertificateCollector(certs *server.Certificates) certificateCollector {
	return certificateCollector{
		certs: certs,
		notAfter: prometheus.NewDesc("echod_tls_certificate_not_after_timestamp_seconds",
			"When a certificate in use expires, as a Unix timestamp.", []string{"file"}, nil),
		reload: prometheus.NewDesc("echod_tls_certificate_reloads_total",
			"How often changed certificates were loaded, and how often that failed.", []string{"result"}, nil),
	}
}

// Describe sends the descriptions of all metrics.
func (c certificateCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.notAfter
	ch <- c.reload
}

// Collect sends the figures of the certificates in use.
func (c certificateCollector) Collect(ch chan<- prometheus.Metric) {
	seen := make(map[string]bool)
	for _, info := range c.certs.Infos() {
		if !seen[info.CertFile] {
			seen[info.CertFile] = true
			ch <- prometheus.MustNewConstMetric(c.notAfter, prometheus.GaugeValue, float64(info.NotAfter.Unix()),
				info.CertFile)
		}
	}
	loaded, failed := c.certs.Reloads()
	ch <- prometheus.MustNewConstMetric(c.reload, prometheus.CounterValue, float64(loaded), "loaded")
	ch <- prometheus.MustNewConstMetric(c.reload, prometheus.CounterValue, float64(failed), "failed")
}
