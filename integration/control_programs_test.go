//go:build unix

package integration

import (
	"encoding/json"
	"maps"
	"strings"
	"testing"

	"echod/control"
)

func TestControlPrograms(t *testing.T) {
	t.Run("curl drives the control socket", testCurl)
	t.Run("curl shows problems", testCurlProblems)
	t.Run("jq reads what ctl prints", testJQ)
}

func testCurl(t *testing.T) {
	t.Parallel()
	curl := curl.find(t)[0]
	e := start(t, "--grace", "20s")
	p := e.served()
	call := func(args ...string) string {
		t.Helper()
		got := run(t, commandOf(append([]string{curl, "-sS", "--fail-with-body", "--unix-socket", e.socket}, args...)...))
		if got.code != 0 {
			t.Errorf("curl %q: exit code %d, %s%s", args, got.code, got.stdout, got.stderr)
		}
		return got.stdout
	}
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"http://echod/v1/status"}, `"state":"running"`},
		{[]string{"http://echod/v1/conns?limit=1"}, `"state":"serving"`},
		{[]string{"-d", `{"reason":"backup","ttl":"1m"}`, "http://echod/v1/pause"}, `"reason":"backup"`},
		{[]string{"http://echod/v1/status"}, `"state":"paused"`},
		{[]string{"-X", "POST", "http://echod/v1/resume"}, `"changed":true`},
		{[]string{"-d", `{"text":"hi"}`, "http://echod/v1/notify"}, `"sent":1`},
		{[]string{"http://echod/v1/wait?state=running"}, `"connections":1`},
		{[]string{"-X", "DELETE", "http://echod/v1/conns?all=true"}, `"killed":1`},
	} {
		if got := call(tt.args...); !strings.Contains(got, tt.want) {
			t.Errorf("curl %q shows %s, want %s", tt.args, got, tt.want)
		}
	}
	check(t, p.expectRest("NOTICE hi\n"))
	_ = p.Close()
	e.awaitOpen(0)
	if got := call("http://echod/v1/conns/closed"); !strings.Contains(got, `"reason":"killed"`) {
		t.Errorf("the closed connections are %s", got)
	}

	events := startProgram(t, curl, "-sS", "-N", "--unix-socket", e.socket, "http://echod/v1/events")
	holding := startProgram(t, curl, "-sS", "-N", "--unix-socket", e.socket, "-d", `{"reason":"held"}`, "http://echod/v1/pause?while=connected")
	holding.readsUpTo(`"reason":"held"`)
	e.expectState("paused")
	check(t, holding.cmd.Process.Kill())
	e.awaitState("running")
	call("-d", `{"reason":"curl"}`, "http://echod/v1/shutdown")
	events.readsUpTo(`"state":"stopped"}` + "\n")
	events.ends("")
	e.wait(0)
}

func testCurlProblems(t *testing.T) {
	t.Parallel()
	curl := curl.find(t)[0]
	e := start(t)
	got := run(t, commandOf(curl, "-sS", "-i", "--unix-socket", e.socket, "-d", `{"mode":"gentle"}`, "http://echod/v1/pause"))
	if !strings.Contains(got.stdout, "400 Bad Request") || !strings.Contains(got.stdout, "application/problem+json") {
		t.Errorf("the answer is %s", got.stdout)
	}
	_, body, _ := strings.Cut(got.stdout, "\r\n\r\n")
	var problem map[string]any
	check(t, json.Unmarshal([]byte(body), &problem))
	want := map[string]any{
		"type": control.ProblemInvalid, "title": "Invalid request", "status": 400.0, "field": "mode",
		"detail": `mode: unknown mode "gentle": want hold or reject`,
	}
	if !maps.Equal(problem, want) {
		t.Errorf("the problem is %v, want %v", problem, want)
	}
}

func testJQ(t *testing.T) {
	t.Parallel()
	jq, sh := require(t, "jq"), require(t, "sh")
	e := start(t)
	e.served()
	e.pause(control.PauseRequest{Reason: "for jq"})
	script := `"$0" ctl --control "$1" --json status | "$2" -r '"\(.state) \(.connections) \(.holds[0].reason)"'`
	got := run(t, commandOf(sh, "-c", script, built(t, echodBinary), e.socket, jq))
	if got.stdout != "paused 1 for jq\n" {
		t.Errorf("jq shows %q, %s", got.stdout, got.stderr)
	}
}
