//go:build unix

package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"echod/control"
)

// expect checks a result: stdout matches a pattern as a whole, stderr contains a text or is empty.
func (r result) expect(t testing.TB, code int, stdout, stderr string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d; stdout %q, stderr %q", r.code, code, r.stdout, r.stderr)
	}
	if !regexp.MustCompile(`\A(?s:` + stdout + `)\z`).MatchString(r.stdout) {
		t.Errorf("stdout is %q, want %s", r.stdout, stdout)
	}
	if !strings.Contains(r.stderr, stderr) || stderr == "" && r.stderr != "" {
		t.Errorf("stderr is %q, want %q", r.stderr, stderr)
	}
}

// TestCtlSpeaksToPeople goes through all commands, on a server with two clients.
func TestCtlSpeaksToPeople(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.crowd(2)
	for _, tt := range []struct {
		args   string
		code   int
		stdout string
		stderr string
	}{
		{"status", 0, `state +running\nlistening +127\.0\.0\.1:\d+, 0 of \d+ in the accept queue\nconnections +2 open, 2 accepted\n` +
			`bytes +26 B in, 26 B out\nup +\S+, started \S+ \S+\nprocess +\d+, version devel\n`, ""},
		{"resume", 0, `nothing to resume: the server is running\n`, ""},
		{"pause --reason backup --ttl 1h", 0, `paused: hold h1, "backup", expires in (59m\S+|1h\S+), by uid \d+, pid \d+\n`, ""},
		{"pause --mode reject", 0, `paused: hold h2, mode reject, by uid \d+, pid \d+\n`, ""},
		{"status", 0, `state +paused\nhold +h1, "backup".*\nhold +h2, mode reject.*\nlistening.*`, ""},
		{"resume h1", 0, `released h1: the server is paused\n`, ""},
		{"resume h1", 1, ``, `echod: no such hold: "h1"`},
		{"resume", 0, `released 1 hold: the server is running\n`, ""},
		{"conns --limit 1", 0, `ID +REMOTE +LOCAL +STATE +OPEN +IDLE +IN +OUT +NOTIFIED\n1 +127\.0\.0\.1:\d+ +127\.0\.0\.1:\d+ +serving +\S+ +\S+ +13 B +13 B +no\n`, ""},
		{"conns --min-idle 1h", 0, `ID[^\n]*\n`, ""},
		{"notify maintenance at noon", 0, `sent to 2 clients, 0 failed\n`, ""},
		{"wait --connections 2 --state running", 0, `running with 2 connections\n`, ""},
		{"wait --connections 7 --timeout 10ms", 3, ``, "the wait timed out: the server is running with 2 connections"},
		{"kill 99 1", 1, `killed connection 1\n`, "no such connection: 99"},
		{"kill 99", 1, ``, "no such connection: 99"},
		{"kill --min-idle 1h", 0, `killed 0 connections\n`, ""},
		{"closed --limit 0", 0, `ID +REMOTE +REASON +CLOSED +DURATION +IN +OUT +NOTIFIED\n`, ""},
		{"kill --all", 0, `killed 1 connection\n`, ""},
		{"wait --connections 0", 0, `running with 0 connections\n`, ""},
		{"closed", 0, `ID[^\n]*\n(\d +127\.0\.0\.1:\d+ +killed +\d\d:\d\d:\d\d +\S+ +13 B +\d+ B +no\n){2}`, ""},
		{"pause --mode gentle", 1, ``, `mode: unknown mode "gentle"`},
		{"wait --state asleep", 1, ``, `state: `},
		{"shutdown --grace 20s --reason upgrade", 0, `(draining|stopped), (\S+|no time) left\n`, ""},
	} {
		t.Run(tt.args, func(t *testing.T) { e.ctl(strings.Fields(tt.args)...).expect(t, tt.code, tt.stdout, tt.stderr) })
	}
	e.wait(0)
	e.ctl("status").expect(t, 2, "", "no server answers on control socket "+e.socket)
}

// TestCtlWhileDraining: what the server refuses is an error, and says until when.
func TestCtlWhileDraining(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "30s")
	p := e.served()
	e.ctl("shutdown", "--reason", "upgrade").expect(t, 0, `draining, (30|29\.\d)s left\n`, "")
	check(t, p.expect("SHUTDOWN 30 upgrade\n"))
	e.ctl("pause").expect(t, 1, ``, "the server is draining until 20")
	e.ctl("resume").expect(t, 1, ``, "the server is draining until 20")
	e.ctl("wait", "--state", "running").expect(t, 1, ``, "the server is draining until 20")
	e.ctl("pause", "--", "true").expect(t, 1, ``, "the server is draining until 20")
	e.ctl("status").expect(t, 0, `state +draining\ndrain +upgrade, \S+ left, 1 notified, 0 could not be notified\n.*`, "")
	e.ctl("conns").expect(t, 0, `ID.*serving.*yes\n`, "")
	e.ctl("shutdown", "--grace", "1h").expect(t, 0, `draining, \S+ left, unchanged: a drain can only be shortened\n`, "")
	e.ctl("shutdown", "--grace", "20s").expect(t, 0, `draining, (20|19\.\d)s left\n`, "")
	e.ctl("shutdown", "--now").expect(t, 0, `(draining|stopped), .*left\n`, "")
	e.wait(0)
}

// TestCtlSpeaksJSON: with --json, what comes is the API's answer and nothing else.
func TestCtlSpeaksJSON(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.served()
	for _, tt := range []struct {
		args string
		into any
	}{
		{"status", new(control.Status)},
		{"conns", new(control.Conns)},
		{"closed", new(control.ClosedConns)},
		{"pause", new(control.Hold)},
		{"resume", new(control.Change)},
		{"notify hello", new(control.Notified)},
		{"wait --state running", new(control.Waited)},
		{"kill 1", new(control.Change)},
		{"shutdown", new(control.Change)},
	} {
		t.Run(tt.args, func(t *testing.T) {
			got := e.ctl(append([]string{"--json"}, strings.Fields(tt.args)...)...)
			if got.code != 0 || got.stderr != "" {
				t.Errorf("exit code %d, stderr %q", got.code, got.stderr)
			}
			dec := json.NewDecoder(strings.NewReader(got.stdout))
			dec.DisallowUnknownFields()
			if err := dec.Decode(tt.into); err != nil || dec.More() {
				t.Errorf("%q: %v", got.stdout, err)
			}
		})
	}
	e.wait(0)
}

// TestCtlEvents shows what happens to the server's end, and can be interrupted.
func TestCtlEvents(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
	argv := e.ctlCommand("events").Args
	events, interrupted := startProgram(t, argv...), startProgram(t, argv...)
	// Nothing says that they have subscribed: make events until each shows one.
	seen := make(chan struct{})
	go func() {
		defer close(seen)
		for _, p := range []*program{events, interrupted} {
			_, _ = p.stdout.ReadString('\n')
		}
	}()
	for subscribed := false; !subscribed; {
		e.pause(control.PauseRequest{Reason: "probe"})
		e.resume()
		select {
		case <-seen:
			subscribed = true
		default:
		}
	}
	check(t, interrupted.cmd.Process.Signal(syscall.SIGINT))
	interrupted.exits(0) // the way in which it is meant to end

	p := e.served()
	check(t, p.leave())
	e.awaitOpen(0)
	e.pause(control.PauseRequest{Reason: "lunch"})
	e.signal(syscall.SIGTERM)
	e.wait(0)
	events.readsUpTo("opened    conn 1 from " + p.LocalAddr().String() + "\n")
	events.readsUpTo("closed    conn 1 from " + p.LocalAddr().String() + ": client-closed, 6 B in, 6 B out\n")
	events.readsUpTo(`"lunch", `)
	events.readsUpTo("state     paused\n")
	events.readsUpTo("state     draining\n")
	events.readsUpTo("the server is draining until")
	events.readsUpTo("state     stopped\n")
	events.ends("")
}

// TestCtlUsage: what makes no sense is exit code 64, and says where help is.
func TestCtlUsage(t *testing.T) {
	t.Parallel()
	e := start(t)
	for _, args := range []string{
		"", "stop", "status now", "kill", "kill all", "kill 1 --all", "notify", "wait", "pause true", "shutdown --now --grace 1s",
		"status --verbose", "wait --connections many", "pause --ttl soon",
		"pause --ttl 0s", "pause --ttl -1s", "pause --json -- true",
	} {
		t.Run("ctl "+args, func(t *testing.T) {
			e.ctl(strings.Fields(args)...).expect(t, 64, ``, "--help'.\n")
		})
	}
	e.ctl("pause", "true").expect(t, 64, ``, "echod ctl pause -- true")
}

// TestCtlTrustsNobodyElsesDirectory: in a place open to all, anybody could pose as a server.
func TestCtlTrustsNobodyElsesDirectory(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	private := filepath.Join(dir, fmt.Sprintf("echod-%d", syscall.Getuid()))
	check(t, os.Mkdir(private, 0o700))
	check(t, os.Chmod(private, 0o777))
	ln, err := net.Listen("unix", filepath.Join(private, "control.sock"))
	check(t, err)
	defer ln.Close()
	cmd := commandOf(built(t, echodBinary), "ctl", "status")
	cmd.Env = environment("TMPDIR=" + dir)
	run(t, cmd).expect(t, 2, ``, "skipped "+private+": other users can write to it\n")
}

// TestCtlIgnoresWhatIsTheServers: both often share an environment.
func TestCtlIgnoresWhatIsTheServers(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
	cmd := e.ctlCommand("shutdown", "--now")
	cmd.Env = environment("ECHOD_GRACE=7s", "ECHOD_CONTROL=off", "ECHOD_LISTEN=127.0.0.1:1")
	run(t, cmd).expect(t, 0, `(draining|stopped), .* left\n`, "")
	e.wait(0)
}

// TestCtlFindsTheServer in the default places, and says where it looked.
func TestCtlFindsTheServer(t *testing.T) {
	t.Parallel()
	binary := built(t, echodBinary)
	for _, tt := range []struct{ variable, path string }{
		{"RUNTIME_DIRECTORY", "/control.sock"},
		{"XDG_RUNTIME_DIR", "/echod/control.sock"},
		{"TMPDIR", fmt.Sprintf("/echod-%d/control.sock", syscall.Getuid())},
	} {
		t.Run(tt.variable, func(t *testing.T) {
			dir := shortDir(t)
			env := environment(tt.variable+"="+dir, "TMPDIR="+dir)
			ctl := func() result {
				cmd := commandOf(binary, "ctl", "status")
				cmd.Env = env
				return run(t, cmd)
			}
			ctl().expect(t, 2, ``, "no server found: looked at "+dir+tt.path)
			serve := commandOf(binary, "--log-format", "json", "--listen", "127.0.0.1:0")
			serve.Env = env
			e := launch(t, serve, dir+tt.path)
			if got := e.awaitLog("control socket open").str("path"); got != dir+tt.path {
				t.Errorf("the control socket is %s, want %s", got, dir+tt.path)
			}
			ctl().expect(t, 0, `state +running\n.*`, "")
		})
	}
}
