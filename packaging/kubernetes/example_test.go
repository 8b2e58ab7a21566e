// Package kubernetes tests the example for Kubernetes against its types.
package kubernetes

import (
	"net"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"
)

// manifest is the example, decoded.
type manifest struct {
	deployment appsv1.Deployment
	service    corev1.Service
	budget     policyv1.PodDisruptionBudget
	policy     networkingv1.NetworkPolicy
}

// decode decodes the example. Unknown, misspelled and repeated fields are errors, as are further objects.
func decode(t *testing.T) (m manifest, pod corev1.PodSpec, c corev1.Container) {
	t.Helper()
	text, err := os.ReadFile("echod.yaml")
	if err != nil {
		t.Fatal(err)
	}
	objects := map[string]any{
		"apps/v1 Deployment": &m.deployment, "v1 Service": &m.service, "policy/v1 PodDisruptionBudget": &m.budget,
		"networking.k8s.io/v1 NetworkPolicy": &m.policy,
	}
	for document := range strings.SplitSeq(string(text), "\n---\n") {
		var kind metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(document), &kind); err != nil {
			t.Fatal(err)
		}
		name := kind.APIVersion + " " + kind.Kind
		into, ok := objects[name]
		if !ok {
			t.Fatalf("unexpected or repeated object %s", name)
		}
		if err := yaml.UnmarshalStrict([]byte(document), into); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		delete(objects, name)
	}
	if len(objects) > 0 {
		t.Errorf("missing objects: %v", objects)
	}
	pod = m.deployment.Spec.Template.Spec
	if len(pod.Containers) != 1 {
		t.Fatalf("%d containers, want 1", len(pod.Containers))
	}
	return m, pod, pod.Containers[0]
}

// arguments returns the values of the container's flags.
func arguments(c corev1.Container) map[string][]string {
	args := make(map[string][]string)
	for _, a := range c.Args {
		name, value, _ := strings.Cut(a, "=")
		args[name] = append(args[name], value)
	}
	return args
}

// duration returns the value of a flag that is given once.
func duration(t *testing.T, args map[string][]string, name string) time.Duration {
	t.Helper()
	if len(args[name]) != 1 {
		t.Fatalf("%s is given %d times, want once", name, len(args[name]))
	}
	d, err := time.ParseDuration(args[name][0])
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestStop(t *testing.T) {
	_, pod, c := decode(t)
	args := arguments(c)
	delay, grace := duration(t, args, "--drain-delay"), duration(t, args, "--grace")
	stop := time.Duration(*pod.TerminationGracePeriodSeconds) * time.Second
	if longest := delay + grace + 2*time.Second; longest > stop {
		t.Errorf("the kubelet kills a pod after %v, and its drain can take %v", stop, longest)
	}
	if told := duration(t, args, "--stop-timeout"); told != stop {
		t.Errorf("--stop-timeout is %v, terminationGracePeriodSeconds %v", told, stop)
	}
	ready := c.ReadinessProbe
	noticed := time.Duration(ready.PeriodSeconds*ready.FailureThreshold) * time.Second
	if noticed == 0 || noticed > delay/2 {
		t.Errorf("the kubelet notices after %v that the pod is not ready; it accepts clients for %v", noticed, delay)
	}
}

// What a probe waits for is longer than a hiccup, and one failure has no effect.
func TestProbes(t *testing.T) {
	_, _, c := decode(t)
	for name, probe := range map[string]*corev1.Probe{
		"startup": c.StartupProbe, "readiness": c.ReadinessProbe, "liveness": c.LivenessProbe,
	} {
		if probe == nil || probe.HTTPGet == nil {
			t.Errorf("no HTTP %s probe", name)
			continue
		}
		if probe.TimeoutSeconds < 2 || probe.FailureThreshold < 2 {
			t.Errorf("a short hiccup fails the %s probe: timeout %d s, failures %d", name, probe.TimeoutSeconds,
				probe.FailureThreshold)
		}
		if want := map[bool]string{true: "/readyz", false: "/livez"}[name == "readiness"]; probe.HTTPGet.Path != want {
			t.Errorf("the %s probe asks %s, want %s", name, probe.HTTPGet.Path, want)
		}
		if probe.HTTPGet.Port != intstr.FromString("http") {
			t.Errorf("the %s probe asks port %s", name, probe.HTTPGet.Port.String())
		}
	}
}

func TestRollout(t *testing.T) {
	m, _, _ := decode(t)
	rolling := m.deployment.Spec.Strategy.RollingUpdate
	if rolling == nil || rolling.MaxUnavailable.IntValue() != 0 || rolling.MaxSurge.IntValue() < 1 {
		t.Errorf("a rollout takes pods away before it adds others: %+v", rolling)
	}
	budget := m.budget.Spec
	if budget.MaxUnavailable == nil || budget.MaxUnavailable.IntValue() != 1 || int(*m.deployment.Spec.Replicas) < 2 {
		t.Errorf("the budget allows %v pods of %d to be evicted at a time", budget.MaxUnavailable,
			*m.deployment.Spec.Replicas)
	}
	labels := m.deployment.Spec.Template.Labels
	for name, selector := range map[string]map[string]string{
		"deployment": m.deployment.Spec.Selector.MatchLabels, "service": m.service.Spec.Selector,
		"budget": budget.Selector.MatchLabels, "network policy": m.policy.Spec.PodSelector.MatchLabels,
	} {
		for key, value := range selector {
			if labels[key] != value {
				t.Errorf("the %s selects %s=%s, and the pods have %v", name, key, value, labels)
			}
		}
		if len(selector) == 0 {
			t.Errorf("the %s selects every pod", name)
		}
	}
}

// Go may use half of the memory limit. The other half is for socket buffers.
func TestMemory(t *testing.T) {
	_, _, c := decode(t)
	limit := c.Resources.Limits.Memory().Value()
	if limit == 0 || c.Resources.Requests.Memory().Value() != limit {
		t.Errorf("memory: limit %d, request %s; want a limit, and as much requested", limit, c.Resources.Requests.Memory())
	}
	i := slices.IndexFunc(c.Env, func(v corev1.EnvVar) bool { return v.Name == "GOMEMLIMIT" })
	if i < 0 {
		t.Fatal("GOMEMLIMIT is not set")
	}
	mebibytes, err := strconv.ParseInt(strings.TrimSuffix(c.Env[i].Value, "MiB"), 10, 64)
	if err != nil || mebibytes<<20*2 != limit {
		t.Errorf("GOMEMLIMIT is %s, the memory limit %d; want half of it", c.Env[i].Value, limit)
	}
}

func TestSecurity(t *testing.T) {
	m, pod, c := decode(t)
	if token := pod.AutomountServiceAccountToken; token == nil || *token {
		t.Error("the pod gets a token")
	}
	if sc := pod.SecurityContext; !*sc.RunAsNonRoot || *sc.RunAsGroup == 0 ||
		sc.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("the pod is not confined: %+v", sc)
	}
	if sc := c.SecurityContext; *sc.AllowPrivilegeEscalation || !*sc.ReadOnlyRootFilesystem ||
		!slices.Equal(sc.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("the container is not confined: %+v", sc)
	}
	for _, rule := range m.policy.Spec.Ingress {
		for _, p := range rule.Ports {
			if health := p.Port.String() == "http"; health != (len(rule.From) > 0) {
				t.Errorf("the network policy opens %s to %v", p.Port, rule.From)
			}
		}
	}
	if len(m.policy.Spec.Ingress) != 2 {
		t.Errorf("the network policy has %d rules, want one for clients and one for the health port",
			len(m.policy.Spec.Ingress))
	}
}

// Flags, ports, volumes, Secret and image agree with each other.
func TestAgreement(t *testing.T) {
	m, pod, c := decode(t)
	args := arguments(c)
	ports := make(map[string]string) // numbers by name
	for _, p := range c.Ports {
		ports[p.Name] = strconv.Itoa(int(p.ContainerPort))
	}
	listening := make(map[string]bool)
	for _, address := range slices.Concat(args["--listen"], args["--http"]) {
		_, port, err := net.SplitHostPort(strings.TrimPrefix(address, "tls://"))
		if err != nil {
			t.Error(err)
		}
		listening[port] = true
	}
	for name, port := range ports {
		if !listening[port] {
			t.Errorf("nothing listens on port %s (%s)", port, name)
		}
	}
	if len(listening) != len(ports) {
		t.Errorf("echod listens on %v, the container has ports %v", listening, ports)
	}
	for _, p := range m.service.Spec.Ports {
		if ports[p.TargetPort.String()] != strconv.Itoa(int(p.Port)) {
			t.Errorf("the service's port %d goes to %s of %v", p.Port, p.TargetPort.String(), ports)
		}
	}

	volumes := make(map[string]corev1.Volume) // by the path where they are mounted
	for _, mount := range c.VolumeMounts {
		if mount.SubPath != "" {
			t.Errorf("%s is a subPath, which is never updated", mount.MountPath)
		}
		i := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == mount.Name })
		if i < 0 {
			t.Fatalf("no volume %s", mount.Name)
		}
		volumes[mount.MountPath] = pod.Volumes[i]
	}
	if v := volumes[path.Dir(args["--control"][0])]; v.EmptyDir == nil {
		t.Errorf("the control socket is not in an emptyDir: %+v", v)
	}
	for flag, key := range map[string]string{"--tls-cert": corev1.TLSCertKey, "--tls-key": corev1.TLSPrivateKeyKey} {
		v := volumes[path.Dir(args[flag][0])]
		if v.Secret == nil || path.Base(args[flag][0]) != key {
			t.Errorf("%s=%s is not %s of a Secret", flag, args[flag][0], key)
		} else if *v.Secret.DefaultMode != 0o440 || pod.SecurityContext.FSGroup == nil {
			t.Errorf("mode %o, group %v; want a key that only the pod's group may read", *v.Secret.DefaultMode,
				pod.SecurityContext.FSGroup)
		}
	}

	image, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`(?m)^COPY dist/echod-linux-\S+ ` + strings.Join(c.Command, " ") + `$`,
		`(?m)^USER ` + strconv.FormatInt(*pod.SecurityContext.RunAsUser, 10) + `:`,
	} {
		if !regexp.MustCompile(want).Match(image) {
			t.Errorf("the Dockerfile does not match %s", want)
		}
	}
}
