package integration

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

// Messages of 1 MB on 64 connections take less than 64 MB of memory: the load generator keeps no copy of what
// is in flight.
func TestLoadMemory(t *testing.T) {
	t.Parallel()
	e := start(t)
	cmd := exec.Command(built(t, leanBinary), "load", "--address", e.addr, "--conns", "64", "--size", "1000000",
		"--duration", "300ms", "--late", "1m", "--drain-wait", "1m", "--max-lost", "0")
	cmd.Env = environment()
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	check(t, cmd.Start())
	memory := watchMemory(cmd.Process.Pid)
	_ = cmd.Wait()
	if code := exitCode(cmd.ProcessState); code != 0 {
		t.Fatalf("exit status %d: %s", code, output.String())
	}
	const limit = 64 << 10
	if kib, known := memory(); known && kib > limit {
		t.Errorf("%d KiB, want at most %d", kib, limit)
	}
}

// A machine with too few local ports is told so, before the run if possible. The server is not blamed. The test
// has a separate network namespace with 51 ports.
func TestLoadWithoutEnoughPorts(t *testing.T) {
	t.Parallel()
	unshare, sh := require(t, "unshare"), require(t, "sh")
	require(t, "ip")
	const script = `ip link set lo up && echo "40000 40050" > /proc/sys/net/ipv4/ip_local_port_range || exit 99
"$0" serve --listen 127.0.0.1:9825 --control off 2>/dev/null & server=$!
until "$0" ping -q 127.0.0.1:9825 2>/dev/null; do sleep .05; done # which nothing else tells
"$0" load --address 127.0.0.1:9825 --duration 2s --max-refused 0 "$@"; code=$?
kill $server; wait $server
exit $code`
	for _, tt := range []struct{ flags, stdout, stderr string }{
		{"--conns 100 --rate 500", "", "this machine has 51 local ports for 100 connections"},
		{
			"--conns 20 --rate 500 --churn 50ms", " without a local port",
			"ran out of local ports, which is not the server's fault",
		},
	} {
		args := append([]string{"-rn", sh, "-c", script, built(t, echodBinary)}, strings.Fields(tt.flags)...)
		got := run(t, commandOf(append([]string{unshare}, args...)...))
		if got.code == 99 || strings.HasPrefix(got.stderr, "unshare: ") {
			missing(t, "network namespaces cannot be made: "+got.stderr)
		}
		if got.code != 1 || !strings.Contains(got.stdout, tt.stdout) || !strings.Contains(got.stderr, tt.stderr) ||
			strings.Contains(got.stderr, "turned away") {
			t.Errorf("%s: exit status %d\n%s\n%s", tt.flags, got.code, got.stdout, got.stderr)
		}
	}
}
