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

// manifest is what matters here of the objects of Kubernetes that the example has.
type manifest struct {
	Kind string
	Spec struct {
		Template struct {
			Spec struct {
				TerminationGracePeriodSeconds int
				SecurityContext               struct{ RunAsUser int }
				Containers                    []container
			}
		}
		Ports []struct {
			Port       int
			TargetPort string
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

// arg is the value of a flag.
func (c container) arg(t *testing.T, name string) string {
	t.Helper()
	for _, a := range c.Args {
		if value, ok := strings.CutPrefix(a, "--"+name+"="); ok {
			return value
		}
	}
	t.Fatalf("there is no --%s in %q", name, c.Args)
	return ""
}

// port is the number of a named port.
func (c container) port(t *testing.T, name string) string {
	t.Helper()
	for _, p := range c.Ports {
		if p.Name == name {
			return strconv.Itoa(p.ContainerPort)
		}
	}
	t.Fatalf("there is no port %s in %+v", name, c.Ports)
	return ""
}

// example reads the deployment, its container, and the service in front of it.
func example(t *testing.T) (deployment, service manifest, c container) {
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
		default:
			t.Errorf("there is a %q", m.Kind)
		}
	}
	if n := len(deployment.Spec.Template.Spec.Containers); n != 1 || len(service.Spec.Ports) != 1 {
		t.Fatalf("%d containers, and a service of %d ports", n, len(service.Spec.Ports))
	}
	return deployment, service, deployment.Spec.Template.Spec.Containers[0]
}

func TestKubernetesExampleIsSound(t *testing.T) {
	t.Parallel()
	deployment, service, c := example(t)
	pod := deployment.Spec.Template.Spec
	delay, grace := seconds(t, c.arg(t, "drain-delay")), seconds(t, c.arg(t, "grace"))
	stop := time.Duration(pod.TerminationGracePeriodSeconds) * time.Second
	if takes := delay + grace + 2*time.Second; takes > stop {
		t.Errorf("a pod is killed after %v, and its drain may take %v", stop, takes)
	}
	if told := seconds(t, c.arg(t, "stop-timeout")); told != stop {
		t.Errorf("echod is told that it has %v to stop, and has %v", told, stop)
	}
	ready := c.ReadinessProbe
	if noticed := time.Duration(ready.PeriodSeconds*ready.FailureThreshold) * time.Second; noticed == 0 || noticed > delay/2 {
		t.Errorf("that it is not ready is noticed after %v, of the %v for which it still accepts", noticed, delay)
	}
	for address, name := range map[string]string{c.arg(t, "listen"): service.Spec.Ports[0].TargetPort, c.arg(t, "http"): ready.HTTPGet.Port} {
		if _, port, err := net.SplitHostPort(address); err != nil || port != c.port(t, name) {
			t.Errorf("it listens on %s, and the port named %s is %s", address, name, c.port(t, name))
		}
	}
	if dir := filepath.Dir(c.arg(t, "control")); len(c.VolumeMounts) != 1 || c.VolumeMounts[0].MountPath != dir {
		t.Errorf("nothing is mounted where the control socket is to be, on %s: %+v", dir, c.VolumeMounts)
	}

	// The image has what is run, where it is run, as who runs it.
	image := readFile(t, "../packaging/kubernetes/Dockerfile")
	for _, want := range []string{
		`(?m)^COPY dist/echod-linux-\S+ ` + strings.Join(c.Command, " ") + `$`,
		`(?m)^USER ` + strconv.Itoa(pod.SecurityContext.RunAsUser) + `:`,
	} {
		if !regexp.MustCompile(want).MatchString(image) {
			t.Errorf("the Dockerfile has no %s", want)
		}
	}
}

// The container's own arguments, with other ports and another place for the socket, and its own probes.
func TestKubernetesExampleRuns(t *testing.T) {
	t.Parallel()
	_, _, c := example(t)
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
	if found := e.log.find("a drain may take longer than the supervisor waits: it would be killed halfway"); len(found) > 0 {
		t.Error(found[0].text)
	}
}
