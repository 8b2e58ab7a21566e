//go:build unix

package integration

import (
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/oasdiff/yaml"

	"echod/control"
)

// manifest has the fields that these tests use of the example's Kubernetes objects.
type manifest struct {
	Kind string
	Spec struct {
		Template struct {
			Spec struct {
				TerminationGracePeriodSeconds int
				AutomountServiceAccountToken  *bool
				SecurityContext               struct {
					RunAsUser, RunAsGroup int
					SeccompProfile        struct{ Type string }
				}
				Containers []container
			}
		}
		Ports []struct {
			Port       int
			TargetPort string
		}
		Ingress []struct {
			From  []any
			Ports []struct{ Port string }
		}
	}
}

type container struct {
	Image         string
	Command, Args []string
	Ports         []struct {
		Name          string
		ContainerPort int
	}
	ReadinessProbe, LivenessProbe struct {
		HTTPGet                                         struct{ Path, Port string }
		PeriodSeconds, FailureThreshold, TimeoutSeconds int
	}
	VolumeMounts []struct{ MountPath string }
}

// arg returns the value of a flag.
func (c container) arg(t *testing.T, name string) string {
	t.Helper()
	for _, a := range c.Args {
		if value, ok := strings.CutPrefix(a, "--"+name+"="); ok {
			return value
		}
	}
	t.Fatalf("no --%s in %q", name, c.Args)
	return ""
}

// port returns the number of a named port.
func (c container) port(t *testing.T, name string) string {
	t.Helper()
	for _, p := range c.Ports {
		if p.Name == name {
			return strconv.Itoa(p.ContainerPort)
		}
	}
	t.Fatalf("no port %s in %+v", name, c.Ports)
	return ""
}

// example reads the deployment with its container, the service and the network policy.
func example(t *testing.T) (deployment, service, policy manifest, c container) {
	t.Helper()
	for text := range strings.SplitSeq(readFile(t, "../packaging/kubernetes/echod.yaml"), "\n---\n") {
		var m manifest
		_, err := yaml.Unmarshal([]byte(text), &m, yaml.DecodeOpts{})
		check(t, err)
		switch m.Kind {
		case "Deployment":
			deployment = m
		case "Service":
			service = m
		case "NetworkPolicy":
			policy = m
		default:
			t.Errorf("unexpected kind %q", m.Kind)
		}
	}
	if n := len(deployment.Spec.Template.Spec.Containers); n != 1 || len(service.Spec.Ports) != 1 {
		t.Fatalf("%d containers, and a service with %d ports", n, len(service.Spec.Ports))
	}
	return deployment, service, policy, deployment.Spec.Template.Spec.Containers[0]
}

func TestKubernetesExampleValues(t *testing.T) {
	t.Parallel()
	deployment, service, policy, c := example(t)
	pod := deployment.Spec.Template.Spec
	delay, grace := seconds(t, c.arg(t, "drain-delay")), seconds(t, c.arg(t, "grace"))
	stop := time.Duration(pod.TerminationGracePeriodSeconds) * time.Second
	if longest := delay + grace + 2*time.Second; longest > stop {
		t.Errorf("a pod is killed after %v, and its drain can take %v", stop, longest)
	}
	if told := seconds(t, c.arg(t, "stop-timeout")); told != stop {
		t.Errorf("--stop-timeout is %v, terminationGracePeriodSeconds is %v", told, stop)
	}
	ready := c.ReadinessProbe
	if noticed := time.Duration(ready.PeriodSeconds*ready.FailureThreshold) * time.Second; noticed == 0 || noticed > delay/2 {
		t.Errorf("Kubernetes notices after %v that the pod is not ready; it accepts clients for %v", noticed, delay)
	}
	if ready.FailureThreshold < 2 || ready.TimeoutSeconds < 2 {
		t.Errorf("one slow answer takes a pod out of service: %+v", ready)
	}
	if token := pod.AutomountServiceAccountToken; token == nil || *token || pod.SecurityContext.RunAsGroup == 0 || pod.SecurityContext.SeccompProfile.Type != "RuntimeDefault" {
		t.Errorf("the pod is not confined: token mounted %v, %+v", token, pod.SecurityContext)
	}
	for _, rule := range policy.Spec.Ingress {
		for _, p := range rule.Ports {
			if health := p.Port == ready.HTTPGet.Port; health != (len(rule.From) > 0) {
				t.Errorf("the network policy opens %q to %v", p.Port, rule.From)
			}
		}
	}
	if len(policy.Spec.Ingress) != 2 {
		t.Errorf("the network policy has %d rules, want one for each port", len(policy.Spec.Ingress))
	}
	for address, name := range map[string]string{c.arg(t, "listen"): service.Spec.Ports[0].TargetPort, c.arg(t, "http"): ready.HTTPGet.Port} {
		if _, port, err := net.SplitHostPort(address); err != nil || port != c.port(t, name) {
			t.Errorf("echod listens on %s, the port %s is %s", address, name, c.port(t, name))
		}
	}
	if dir := filepath.Dir(c.arg(t, "control")); len(c.VolumeMounts) != 1 || c.VolumeMounts[0].MountPath != dir {
		t.Errorf("no volume for the control socket at %s: %+v", dir, c.VolumeMounts)
	}

	// The image has the binary at that path, and runs as that user.
	image := readFile(t, "../packaging/kubernetes/Dockerfile")
	for _, want := range []string{
		`(?m)^COPY dist/echod-linux-\S+ ` + strings.Join(c.Command, " ") + `$`,
		`(?m)^USER ` + strconv.Itoa(pod.SecurityContext.RunAsUser) + `:`,
	} {
		if !regexp.MustCompile(want).MatchString(image) {
			t.Errorf("the Dockerfile does not match %s", want)
		}
	}
}

// echod runs with the container's arguments, on other ports, and answers its probes.
func TestKubernetesExampleRuns(t *testing.T) {
	t.Parallel()
	_, _, _, c := example(t)
	socket := filepath.Join(shortDir(t), "c")
	args := slices.Clone(c.Args)
	for i, a := range args {
		switch name, _, _ := strings.Cut(a, "="); name {
		case "--listen", "--http":
			args[i] = name + "=127.0.0.1:0"
		case "--control":
			args[i] = name + "=" + socket
		}
	}
	cmd := commandOf(append([]string{built(t, echodBinary)}, args...)...)
	cmd.Env = environment("ECHOD_LOG_FORMAT=json")
	e := launch(t, cmd, socket)
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
