package metrics

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"

	"echod/server"
)

// What the dashboard and the alert rules ask for has to be there, under the name that it has.
func TestDashboardAndAlertsAskForWhatThereIs(t *testing.T) {
	m := New("1.2.3")
	serve(t, m, server.Options{})
	m.Signal("SIGTERM")
	m.Request("/v1/status", "GET", 200)
	text := scrape(t, m)
	name := regexp.MustCompile(`\b(?:echod|process|go)_[a-z_]+\b`)
	for _, path := range []string{"../packaging/grafana/echod.json", "../packaging/prometheus/alerts.yml"} {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		names := name.FindAllString(string(raw), -1)
		if len(names) == 0 {
			t.Errorf("%s asks for nothing", path)
		}
		for _, n := range names {
			if !strings.Contains(text, "\n"+n+" ") && !strings.Contains(text, "\n"+n+"{") {
				t.Errorf("%s asks for %s, which there is not", path, n)
			}
		}
	}
	raw, err := os.ReadFile("../packaging/grafana/echod.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct{ Title string }
	}
	if err := json.Unmarshal(raw, &dashboard); err != nil || len(dashboard.Panels) == 0 {
		t.Errorf("%d panels, error %v", len(dashboard.Panels), err)
	}
}
