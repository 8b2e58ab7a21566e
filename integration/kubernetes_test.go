//go:build unix

package integration

import (
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/oasdiff/yaml"

	"echod/control"
)

// container has the fields that these tests use of the example's container. The test in packaging/kubernetes
// checks the example against the types of Kubernetes.
type container struct {
	Args []string
	Env  []struct{ Name, Value string }

	StartupProbe, ReadinessProbe, LivenessProbe probe

	Resources struct{ Limits memory }
}

type probe struct {
	HTTPGet                          struct{ Path string }
	FailureThreshold, TimeoutSeconds int
}

type memory struct{ Memory string }

// bytes parses a quantity such as 256Mi.
func (m memory) bytes(t *testing.T) int {
	t.Helper()
	number, ok := strings.CutSuffix(m.Memory, "Mi")
	n, err := strconv.Atoi(number)
	if err != nil || !ok {
		t.Fatalf("the memory limit is %q, want it in Mi", m.Memory)
	}
	return n << 20
}

// example reads the container of packaging/kubernetes/echod.yaml.
func example(t *testing.T) container {
	t.Helper()
	text, _, _ := strings.Cut(readFile(t, "../packaging/kubernetes/echod.yaml"), "\n---\n")
	var deployment struct {
		Spec struct {
			Template struct {
				Spec struct{ Containers []container }
			}
		}
	}
	_, err := yaml.Unmarshal([]byte(text), &deployment, yaml.DecodeOpts{})
	check(t, err)
	all := deployment.Spec.Template.Spec.Containers
	if len(all) != 1 {
		t.Fatalf("%d containers", len(all))
	}
	return all[0]
}

// startExample runs echod with the container's arguments, on other ports and with other files.
func startExample(t *testing.T) (*echod, container) {
	t.Helper()
	c := example(t)
	socket, certs := filepath.Join(shortDir(t), "c"), t.TempDir()
	certificate(t, certs, "secret")
	args := slices.Clone(c.Args)
	for i, a := range args {
		switch name, value, _ := strings.Cut(a, "="); {
		case name == "--listen" && strings.HasPrefix(value, "tls://"):
			args[i] = "--listen=tls://127.0.0.1:0"
		case name == "--listen", name == "--http":
			args[i] = name + "=127.0.0.1:0"
		case name == "--control":
			args[i] = name + "=" + socket
		case name == "--tls-cert":
			args[i] = name + "=" + filepath.Join(certs, "cert.pem")
		case name == "--tls-key":
			args[i] = name + "=" + filepath.Join(certs, "key.pem")
		}
	}
	cmd := commandOf(append([]string{built(t, echodBinary)}, args...)...)
	cmd.Env = environment("ECHOD_LOG_FORMAT=json")
	e := launch(t, cmd, socket)
	e.addr = e.awaitLog("listening", "tls", "false").str("address")
	return e, c
}

// The example's probes stay quiet through two hiccups in a row, of a second and a half each: the node is busy, or its
// disk hangs. Each probe asks when the hiccup begins, and none finds a failure to act on.
func TestKubernetesProbesStayQuiet(t *testing.T) {
	slow(t)
	t.Parallel()
	e, c := startExample(t)
	probes := map[string]probe{"startup": c.StartupProbe, "readiness": c.ReadinessProbe, "liveness": c.LivenessProbe}
	failures := make(map[string]int)
	for range 2 {
		e.signal(syscall.SIGSTOP)
		results := make(chan string, len(probes))
		for name, p := range probes {
			go func() {
				if !p.succeeds(e.web()) {
					results <- name
					return
				}
				results <- ""
			}()
		}
		time.Sleep(1500 * time.Millisecond) // the hiccup
		e.signal(syscall.SIGCONT)
		for range probes {
			failures[<-results]++
		}
	}
	delete(failures, "")
	for name, p := range probes {
		if n := failures[name]; n >= p.FailureThreshold {
			t.Errorf("the %s probe failed %d times in a row, and acts at %d", name, n, p.FailureThreshold)
		}
	}
	if len(failures) > 0 {
		t.Errorf("failed probes: %v, want none", failures)
	}
}

// succeeds asks as the kubelet does.
func (p probe) succeeds(address string) bool {
	client := &http.Client{
		Timeout: time.Duration(p.TimeoutSeconds) * time.Second, Transport: &http.Transport{DisableKeepAlives: true},
	}
	resp, err := client.Get("http://" + address + p.HTTPGet.Path)
	if err != nil {
		return false
	}
	_ = resp.Body.Close()
	return resp.StatusCode >= 200 && resp.StatusCode < 400
}

// echod runs with the container's arguments and answers its probes.
func TestKubernetesExampleRuns(t *testing.T) {
	t.Parallel()
	e, c := startExample(t)
	check(t, e.served().leave())
	e.expectWeb(c.LivenessProbe.HTTPGet.Path, http.StatusOK, "")
	e.expectWeb(c.ReadinessProbe.HTTPGet.Path, http.StatusOK, "")
	e.pause(control.PauseRequest{})
	e.expectWeb(c.LivenessProbe.HTTPGet.Path, http.StatusOK, "")
	e.expectWeb(c.ReadinessProbe.HTTPGet.Path, http.StatusServiceUnavailable, "")
	if found := e.log.find("a drain can take longer than --stop-timeout"); len(found) > 0 {
		t.Error(found[0].text)
	}
}
