package metrics

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"echod/server"
)

// series maps the names of a scrape to the values of each label. Prometheus itself adds job and instance.
type series map[string]map[string][]string

var (
	sampleLine = regexp.MustCompile(`(?m)^([a-z_]+)(?:\{(.*)\})? \S+$`)
	matcher    = regexp.MustCompile(`([a-z_]+)\s*(=~|=|!=|!~)\s*"([^"]*)"`)
	selector   = regexp.MustCompile(`\b((?:echod|process|go)_[a-z_]+)(?:\{([^}]*)\})?`)
	grouping   = regexp.MustCompile(`\b(?:by|without)\s*\(([^)]*)\)`)
	shown      = regexp.MustCompile(`\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}`)
)

func seriesOf(text string) series {
	all := make(series)
	for _, sample := range sampleLine.FindAllStringSubmatch(text, -1) {
		labels := all[sample[1]]
		if labels == nil {
			labels = map[string][]string{"job": nil, "instance": nil}
			all[sample[1]] = labels
		}
		for _, label := range matcher.FindAllStringSubmatch(sample[2], -1) {
			labels[label[1]] = append(labels[label[1]], label[3])
		}
	}
	return all
}

// check lists the metrics, labels and values that a query or its legend names and that do not exist.
func (all series) check(query, legend string) (problems []string) {
	var labels []string // of all metrics in the query
	found := selector.FindAllStringSubmatch(query, -1)
	if len(found) == 0 && !strings.Contains(query, "up{") {
		problems = append(problems, "no metric")
	}
	for _, sel := range found {
		name := sel[1]
		have, ok := all[name]
		if !ok {
			problems = append(problems, name)
			continue
		}
		for label := range have {
			labels = append(labels, label)
		}
		for _, m := range matcher.FindAllStringSubmatch(sel[2], -1) {
			label, values := m[1], strings.Split(m[3], "|")
			if _, ok := have[label]; !ok {
				problems = append(problems, name+"{"+label+"}")
			} else if label != "job" && label != "instance" { // their values are Prometheus's
				for _, v := range values {
					if !slices.Contains(have[label], v) {
						problems = append(problems, fmt.Sprintf("%s{%s=%q}", name, label, v))
					}
				}
			}
		}
	}
	wanted := shown.FindAllStringSubmatch(legend, -1)
	for _, g := range grouping.FindAllStringSubmatch(query, -1) {
		for label := range strings.SplitSeq(g[1], ",") {
			if label = strings.TrimSpace(label); !slices.Contains(labels, label) {
				problems = append(problems, "by "+label)
			}
		}
	}
	if by := regexp.MustCompile(`\bby\s*\(([^)]*)\)`).FindStringSubmatch(query); by != nil {
		labels = strings.Split(strings.ReplaceAll(by[1], " ", ""), ",") // the query drops the others
	} else if strings.HasPrefix(query, "sum (") || strings.HasPrefix(query, "min (") {
		labels = nil
	}
	for _, l := range wanted {
		if !slices.Contains(labels, l[1]) && !strings.Contains(query, "up{") {
			problems = append(problems, "{{"+l[1]+"}}")
		}
	}
	return problems
}

// scraped returns the series of a server.
func scraped(t *testing.T) series {
	t.Helper()
	m := New("1.2.3")
	serve(t, m, server.Options{Limits: server.Limits{MaxConns: 10}})
	m.Signal("SIGTERM")
	m.Request("/v1/status", "GET", 200)
	m.Request("/v1/upgrade", "POST", 500)
	m.OnClose(server.ClosedConn{Err: &server.HandshakeError{Failure: server.HandshakeNotTLS}})
	m.OnClose(server.ClosedConn{Err: &server.HandshakeError{Failure: server.HandshakeAborted}})
	m.WatchCertificates(selfSigned(t))
	return seriesOf(scrape(t, m))
}

// selfSigned returns a certificate that signs itself.
func selfSigned(t *testing.T) *server.Certificates {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	pair := server.CertificatePair{CertFile: filepath.Join(dir, "cert.pem"), KeyFile: filepath.Join(dir, "key.pem")}
	for file, block := range map[string]*pem.Block{
		pair.CertFile: {Type: "CERTIFICATE", Bytes: cert}, pair.KeyFile: {Type: "PRIVATE KEY", Bytes: secret},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	certs, err := server.LoadCertificates(server.CertificateOptions{Pairs: []server.CertificatePair{pair}})
	if err != nil {
		t.Fatal(err)
	}
	return certs
}

func TestPackagingNamesExistingSeries(t *testing.T) {
	t.Run("the dashboard", testDashboard)
	t.Run("the alerts and their tests", testAlerts)
}

func testDashboard(t *testing.T) {
	all := scraped(t)
	raw, err := os.ReadFile("../packaging/grafana/echod.json")
	if err != nil {
		t.Fatal(err)
	}
	type query struct{ Expr, LegendFormat string }
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []query
		}
		Annotations struct{ List []query }
		Templating  struct {
			List []struct{ Name, Type, Query string }
		}
	}
	if err := json.Unmarshal(raw, &dashboard); err != nil || len(dashboard.Panels) == 0 {
		t.Fatalf("%d panels, error %v", len(dashboard.Panels), err)
	}
	for _, p := range dashboard.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("panel %q has no query", p.Title)
		}
		for _, q := range p.Targets {
			if problems := all.check(q.Expr, q.LegendFormat); problems != nil {
				t.Errorf("panel %q names %q, which does not exist: %s", p.Title, problems, q.Expr)
			}
		}
	}
	for _, q := range dashboard.Annotations.List {
		if problems := all.check(q.Expr, ""); problems != nil {
			t.Errorf("an annotation names %q, which does not exist: %s", problems, q.Expr)
		}
	}
	for _, v := range dashboard.Templating.List {
		if problems := all.check(v.Query, ""); v.Type == "query" && problems != nil {
			t.Errorf("variable %s names %q, which does not exist: %s", v.Name, problems, v.Query)
		}
	}
}

// testAlerts also checks that the rules' tests use exactly the labels that exist: with others they would prove nothing.
func testAlerts(t *testing.T) {
	all := scraped(t)
	rules, err := os.ReadFile("../packaging/prometheus/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	alerts := regexp.MustCompile(`(?s)- alert: (\w+)\n\s+expr: ([^\n]*)\n(.*?)(?:\n\n|$)`).FindAllStringSubmatch(string(rules), -1)
	if len(alerts) != strings.Count(string(rules), "- alert:") {
		t.Fatalf("understood %d alerts of %d", len(alerts), strings.Count(string(rules), "- alert:"))
	}
	for _, a := range alerts {
		if problems := all.check(a[2], a[3]); problems != nil {
			t.Errorf("%s names %q, which does not exist: %s", a[1], problems, a[2])
		}
	}
	tests, err := os.ReadFile("../packaging/prometheus/alerts_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	given := regexp.MustCompile(`series: '([a-z_]+)\{([^}]*)\}'`).FindAllStringSubmatch(string(tests), -1)
	if len(given) != strings.Count(string(tests), "series: '") {
		t.Fatalf("understood %d series of %d", len(given), strings.Count(string(tests), "series: '"))
	}
	for _, g := range given {
		var labels []string
		for _, m := range matcher.FindAllStringSubmatch(g[2], -1) {
			labels = append(labels, m[1])
		}
		want := []string{"instance", "job"}
		for label := range all[g[1]] {
			if !slices.Contains(want, label) {
				want = append(want, label)
			}
		}
		slices.Sort(labels)
		slices.Sort(want)
		if !slices.Equal(labels, want) {
			t.Errorf("a test has %s with the labels %q, want %q", g[1], labels, want)
		}
	}
}
