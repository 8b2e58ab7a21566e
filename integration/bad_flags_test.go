//go:build unix

package integration

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// badFlags are values of the flags of serve with which it does not start, and what the error says. A flag that is given
// twice is one item with a space.
var badFlags = map[string][]struct{ value, others, want string }{
	"listen": {
		{"here", "", `--listen "here": want an address such as 127.0.0.1:9999`},
		{"127.0.0.1:", "", `--listen "127.0.0.1:": want an address`},
		{"127.0.0.1:99999", "", "--listen 127.0.0.1:99999: address 99999: invalid port"},
		{"192.0.2.1:0", "", "--listen 192.0.2.1:0: cannot assign requested address"},
		{"unix://here", "", "--listen unix://here: want an absolute path"},
		{"unix:///no/such/directory/s", "", "--listen: echo socket /no/such/directory/s: no such file or directory"},
		{"tls://127.0.0.1:0", "", "tls://… needs --tls-cert and --tls-key"},
		{"http://127.0.0.1:1", "", "want an address such as"},
		{"127.0.0.1:4242", "--listen 127.0.0.1:4242", "--listen 127.0.0.1:4242: --listen 127.0.0.1:4242 has this address already"},
	},
	"tls-cert":        {{"/no/such/file", "--listen tls://127.0.0.1:0 --tls-key /no/such/file", "/no/such/file"}},
	"tls-key":         {{"/no/such/file", "", "need --listen or --http tls://host:port"}},
	"tls-client-ca":   {{"/no/such/file", "", "need --listen or --http tls://host:port"}},
	"tls-client-auth": {{"maybe", "", `--tls-client-auth "maybe": want require or optional`}},
	"tls-min-version": {{"1.1", "", `--tls-min-version "1.1": want 1.2 or 1.3`}},
	"unix-mode":       {{"rw", "", `--unix-mode "rw": want an octal mode such as 0660`}},
	"unix-group":      {{"no such", "", `--unix-group "no such": no such group`}},
	"control": {
		{"/no/such/directory/c", "", "control socket /no/such/directory/c: no such file or directory"},
	},
	"control-mode":     {{"7777", "", `--control-mode "7777": want an octal mode such as 0660`}},
	"control-group":    {{"no such", "", `--control-group "no such": no such group`}},
	"grace":            {{"soon", "", "soon"}, {"-1s", "", "--grace -1s: must not be negative"}},
	"drain-delay":      {{"5", "", "missing unit"}, {"-1s", "", "--drain-delay -1s: must not be negative"}},
	"spread":           {{"-1s", "", "--spread -1s: must not be negative"}},
	"pid-file":         {{"/no/such/directory/pid", "", "--pid-file /no/such/directory/pid: no such file"}, {"/", "", "--pid-file /: is a directory"}},
	"upgrade-timeout":  {{"-1s", "", "--upgrade-timeout -1s: must not be negative"}},
	"upgrade-keep":     {{"-1s", "", "--upgrade-keep -1s: must not be negative"}},
	"stop-timeout":     {{"-1s", "", "--stop-timeout -1s: must not be negative"}},
	"notice":           {{`\q`, "", "--notice"}, {"{who}", "", "--notice"}},
	"max-conns":        {{"many", "", "many"}, {"-1", "", "--max-conns -1: must not be negative"}},
	"at-limit":         {{"maybe", "", `--at-limit "maybe": want wait or reject`}},
	"max-conns-per-ip": {{"-1", "", "--max-conns-per-ip -1: must not be negative"}},

	"max-conns-per-uid":   {{"-1", "", "--max-conns-per-uid -1: must not be negative"}},
	"max-conn-rate":       {{"20/d", "", `--max-conn-rate "20/d": want a rate such as 20/s`}},
	"max-conn-rate-total": {{"-1", "", `--max-conn-rate-total "-1": want a rate`}},
	"allow":               {{"10.0.0.0/33", "", `--allow "10.0.0.0/33": want an address or a range`}},
	"deny":                {{"here", "", `--deny "here": want an address or a range`}},
	"idle-timeout":        {{"-1s", "", "--idle-timeout -1s: must not be negative"}},
	"max-conn-age":        {{"-1s", "", "--max-conn-age -1s: must not be negative"}},
	"stall-timeout":       {{"-1s", "", "--stall-timeout -1s: must not be negative"}},
	"proxy-protocol":      {{"here", "", "--proxy-protocol"}},
	"http": {
		{"localhost:", "", `--http "localhost:": want a port such as 9090`},
		{"99999", "", `--http "99999": want a port`},
		{"192.0.2.1:0", "", "--http 192.0.2.1:0: cannot assign requested address"},
		{"tls://127.0.0.1:0", "", "tls://… needs --tls-cert and --tls-key"},
	},
	"http-host": {{"echo.example", "", "--http-host: needs --http"}, {"echo:9090", "--http 0", `--http-host "echo:9090": want a host name without a port`}},
	"pprof":     {{"maybe", "", "maybe"}, {"true", "", "--pprof: needs --http"}},
	"agent-check": {
		{"here", "", `--agent-check "here": want a port such as 9300`},
		{"tls://:9300", "", `--agent-check "tls://:9300": want a port such as 9300`},
		{"192.0.2.1:0", "", "--agent-check 192.0.2.1:0: cannot assign requested address"},
		{"4242", "--http :4242", "--agent-check 4242: --http :4242 has this address already"},
	},
	"log-level":  {{"loud", "", `"loud": want debug, info, warn or error`}},
	"log-format": {{"xml", "", `"xml": want console, json or journal`}},
}

// TestBadFlags: for each flag of serve there is a value with which it does not start. serve, serve --check and the
// flag's environment variable give the same error.
func TestBadFlags(t *testing.T) {
	slow(t)
	t.Parallel()
	program := built(t, echodBinary)
	help := run(t, commandOf(program, "serve", "--help"))
	flags := regexp.MustCompile(`(?m)^ +(?:-\w, )?--([a-z-]+)`).FindAllStringSubmatch(help.stdout, -1)
	if len(flags) < 30 {
		t.Fatalf("serve --help lists the flags %q", flags)
	}
	for _, m := range flags {
		if name := m[1]; badFlags[name] == nil && !slices.Contains([]string{"help", "check", "env-file"}, name) {
			t.Errorf("badFlags has no value for --%s", name)
		}
	}
	dir := shortDir(t)
	for _, name := range slices.Sorted(maps.Keys(badFlags)) {
		for _, bad := range badFlags[name] {
			t.Run(name+"="+strings.ReplaceAll(bad.value, "/", "|"), func(t *testing.T) {
				others := strings.Fields(bad.others)
				if name != "listen" && !strings.Contains(bad.others, "--listen") {
					others = append(others, "--listen", "127.0.0.1:0")
				}
				if name != "control" {
					others = append(others, "--control", filepath.Join(dir, "c"))
				}
				fails := func(env []string, args ...string) (text string, code int) {
					t.Helper()
					cmd := commandOf(append(append([]string{program, "serve"}, others...), args...)...)
					cmd.Env = environment(env...)
					r := run(t, cmd)
					if r.code == 0 || r.stdout != "" {
						t.Fatalf("%q: exit code %d, stdout %q", cmd.Args, r.code, r.stdout)
					}
					for line := range strings.Lines(r.stderr) { // without the log
						if line, ok := strings.CutPrefix(line, "echod: "); ok {
							text += line
						}
					}
					return text, r.code
				}
				flag := "--" + name + "=" + bad.value
				checked, checkedCode := fails(nil, flag, "--check")
				if !strings.Contains(checked, bad.want) {
					t.Errorf("serve --check %s says %q, want %q", flag, checked, bad.want)
				}
				if served, code := fails(nil, flag); served != checked || code != checkedCode {
					t.Errorf("serve %s says %q with exit code %d, and with --check %q with %d", flag, served, code, checked, checkedCode)
				}
				variable := "ECHOD_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
				if slices.Contains(others, "--"+name) { // the flag would take precedence
					return
				}
				set, code := fails([]string{variable + "=" + bad.value}, "--check")
				if !strings.Contains(set, bad.want) || code != checkedCode {
					t.Errorf("with %s=%s it says %q with exit code %d, want %q with %d", variable, bad.value, set, code, bad.want, checkedCode)
				}
			})
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("files left: %v (%v)", left, err)
	}
}
