//go:build unix

package integration

import (
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"
)

// echodRun runs the program to its end.
func echodRun(t testing.TB, args ...string) result {
	t.Helper()
	return run(t, commandOf(append([]string{built(t, echodBinary)}, args...)...))
}

func TestServeUsage(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args  []string
		named string
	}{
		{[]string{"--grace", "-1s"}, "--grace -1s"},
		{[]string{"--grace", "soon"}, "--grace"},
		{[]string{"--idle-timeout", "-1s"}, "--idle-timeout"},
		{[]string{"--stall-timeout", "-1s"}, "--stall-timeout"},
		{[]string{"--max-conns", "-1"}, "--max-conns -1"},
		{[]string{"--max-conns-per-ip", "-1"}, "--max-conns-per-ip -1"},
		{[]string{"--at-limit", "maybe"}, `--at-limit "maybe"`},
		{[]string{"--notice", "{minutes}"}, "--notice"},
		{[]string{"--notice", `\q`}, "--notice"},
		{[]string{"--log-level", "loud"}, `--log-level "loud"`},
		{[]string{"--log-format", "xml"}, `--log-format "xml"`},
		{[]string{"--control-mode", "0999"}, `--control-mode "0999"`},
		{[]string{"--control-group", "no such group"}, `--control-group "no such group"`},
		{[]string{"--listen", "here"}, `--listen "here"`},
		{[]string{"--max-conns", "many"}, `invalid argument "many" for "--max-conns" flag` + "\n"},
		{[]string{"--listen", ""}, `--listen ""`},
		{[]string{"--listen", "here"}, `--listen "here"`},
		{[]string{"--port", "7"}, "--port"},
		{[]string{"serve", "now"}, `"now"`},
		{[]string{"clt"}, `unknown command "clt": did you mean ctl?`},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			got := echodRun(t, append(tt.args, "--listen", "127.0.0.1:0", "--control", filepath.Join(shortDir(t), "c"))...)
			got.expect(t, 2, ``, tt.named)
			if !strings.HasSuffix(got.stderr, "--help'.\n") {
				t.Errorf("no word of help: %q", got.stderr)
			}
		})
	}
}

func TestCouldNotStart(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := shortDir(t)
	file := filepath.Join(dir, "file")
	check(t, os.WriteFile(file, []byte("mine"), 0o600))
	for _, tt := range []struct {
		name, listen, control, named string
	}{
		{"port in use", e.addr, filepath.Join(dir, "c"), "--listen " + e.addr + ": address already in use"},
		{"no such address", "192.0.2.1:0", filepath.Join(dir, "c"), "--listen 192.0.2.1:0: cannot assign requested address"},
		{"control socket live", "127.0.0.1:0", e.socket, e.socket + ": in use by a running server: give this server another --control"},
		{"control socket is a file", "127.0.0.1:0", file, "not a socket"},
		{"control socket without a directory", "127.0.0.1:0", filepath.Join(dir, "no", "c"), "no such file or directory"},
		{"control socket path too long", "127.0.0.1:0", filepath.Join(dir, strings.Repeat("x", 200)), "no more than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := echodRun(t, "--listen", tt.listen, "--control", tt.control)
			if got.code != 1 || !strings.Contains(got.stderr, tt.named) {
				t.Errorf("exit code %d, stderr %q, want 1 and %q", got.code, got.stderr, tt.named)
			}
		})
	}
	if kept, err := os.ReadFile(file); string(kept) != "mine" {
		t.Errorf("the file is %q now (%v)", kept, err)
	}
	check(t, e.served().leave())
	e.expectState("running")
}

// TestEnvironmentVariables stand in for flags, and give way to them.
func TestEnvironmentVariables(t *testing.T) {
	t.Parallel()
	binary := built(t, echodBinary)
	socket := filepath.Join(shortDir(t), "c")
	second, err := net.Listen("tcp", "127.0.0.1:0") // a port that is free
	check(t, err)
	addr := second.Addr().String()
	check(t, second.Close())
	cmd := commandOf(binary, "--grace", "40s")
	cmd.Env = environment("ECHOD_LISTEN=127.0.0.1:0,"+addr, "ECHOD_CONTROL="+socket, "ECHOD_GRACE=1h", "ECHOD_LOG_FORMAT=json",
		"ECHOD_NOTICE=BYE {seconds}\\n", "ECHOD_MAX_CONNS=1", "ECHOD_AT_LIMIT=reject", "ECHOD_IDLE_TIMEOUT=")
	e := launch(t, cmd, socket)
	e.awaitLog("listening", "address", addr)
	p := e.served()
	check(t, e.dial().expectRest("BUSY\n"))

	ctl := commandOf(binary, "ctl", "shutdown")
	ctl.Env = environment("ECHOD_CONTROL="+socket, "ECHOD_CTL_REASON=variable")
	run(t, ctl).expect(t, 0, `draining, (40|39\.\d)s left\n`, "")
	check(t, p.expect("BYE 40\n")) // the flag wins
	if got := e.status().Drain.Reason; got != "variable" {
		t.Errorf("the reason is %q", got)
	}
	check(t, p.leave())
	e.wait(0)

	for variable, code := range map[string]int{"ECHOD_GRACE=soon": 2, "ECHOD_MAX_CONNS=many": 2, "ECHOD_AT_LIMIT=maybe": 2} {
		bad := commandOf(binary, "--listen", "127.0.0.1:0", "--control", socket)
		bad.Env = environment(variable)
		_, value, _ := strings.Cut(variable, "=")
		run(t, bad).expect(t, code, ``, value)
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	echodRun(t, "version").expect(t, 0, `echod \S+ \(go[^,]+, `+runtime.GOOS+`/`+runtime.GOARCH+`\)\n`, "")
}

// TestCompletion: what it prints is a script.
func TestCompletion(t *testing.T) {
	t.Parallel()
	for _, shell := range []string{"bash", "zsh", "fish"} {
		t.Run(shell, func(t *testing.T) {
			got := echodRun(t, "completion", shell)
			if got.code != 0 || !strings.Contains(got.stdout, "echod") {
				t.Fatalf("exit code %d, %q, %q", got.code, got.stdout, got.stderr)
			}
			if shell == "bash" {
				check := commandOf(require(t, "bash"), "-n")
				check.Stdin = strings.NewReader(got.stdout)
				run(t, check).expect(t, 0, ``, "")
			}
		})
	}
}

// TestHelp goes through the commands that the help shows: each is described, in lines that fit a terminal.
func TestHelp(t *testing.T) {
	t.Parallel()
	var seen int
	var visit func(command []string)
	visit = func(command []string) {
		got := echodRun(t, append(command, "--help")...)
		if seen++; got.code != 0 || got.stdout == "" || got.stderr != "" {
			t.Errorf("echod %s --help: exit code %d, stdout %q, stderr %q", strings.Join(command, " "), got.code, got.stdout, got.stderr)
		}
		for line := range strings.Lines(got.stdout) {
			own := len(command) == 0 || command[0] != "completion" // whose words are cobra's
			if wide := utf8.RuneCountInString(strings.TrimRight(line, "\n")); own && wide >= 100 {
				t.Errorf("echod %s --help has a long line: %s", strings.Join(command, " "), line)
			}
		}
		_, commands, _ := strings.Cut(got.stdout, "\nAvailable Commands:\n")
		commands, _, _ = strings.Cut(commands, "\n\n")
		for line := range strings.Lines(commands) {
			visit(append(command[:len(command):len(command)], strings.Fields(line)[0]))
		}
	}
	visit(nil)
	if seen < 15 {
		t.Errorf("only %d commands found", seen)
	}
}

// TestGraceOfZero tells the clients and closes at once.
func TestGraceOfZero(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "0s")
	p := e.served()
	begun := e.signal(syscall.SIGTERM)
	check(t, p.expectRest("SHUTDOWN 0 SIGTERM\n"))
	_ = p.Close()
	e.wait(0)
	if took := e.gone.Sub(begun); took > 2*time.Second {
		t.Errorf("the process was gone after %s", took)
	}
}
