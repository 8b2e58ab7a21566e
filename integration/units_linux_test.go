package integration

import (
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// setting returns the value of a setting that a unit must have exactly once.
func setting(t *testing.T, unit, name string) string {
	t.Helper()
	found := regexp.MustCompile(`(?m)^`+name+`=(.*)$`).FindAllStringSubmatch(unit, -1)
	if len(found) != 1 {
		t.Fatalf("the unit has %s %d times, want once", name, len(found))
	}
	return found[0][1]
}

func TestUnitValues(t *testing.T) {
	t.Parallel()
	unit := readFile(t, "../packaging/systemd/echod.service")
	stop := setting(t, unit, "TimeoutStopSec")
	if told := setting(t, unit, "Environment=ECHOD_STOP_TIMEOUT"); told != stop {
		t.Errorf("ECHOD_STOP_TIMEOUT is %s, TimeoutStopSec is %s", told, stop)
	}
	if seconds(t, stop) < time.Minute {
		t.Errorf("TimeoutStopSec=%s is short for a drain", stop)
	}
	// A probe may take 3 s, and runs every half of the interval.
	if watchdog := seconds(t, setting(t, unit, "WatchdogSec")); watchdog < 2*3*time.Second || watchdog > 30*time.Second {
		t.Errorf("WatchdogSec=%v is too short for a slow machine, or too long for clients", watchdog)
	}
	if n, err := strconv.Atoi(setting(t, unit, "LimitNOFILE")); err != nil || n < 1<<15 {
		t.Errorf("LimitNOFILE=%d (%v) is low: each connection needs a file", n, err)
	}
	for _, name := range []string{"NotifyAccess", "RuntimeDirectory", "EnvironmentFile"} {
		setting(t, unit, name)
	}
}

// Each setting in /etc/default/echod exists, and echod starts with all of them.
func TestDefaultsFile(t *testing.T) {
	t.Parallel()
	help := run(t, commandOf(built(t, echodBinary), "serve", "--help")).stdout
	named := regexp.MustCompile(`\bECHOD_([A-Z_]+)`).FindAllStringSubmatch(readFile(t, "../packaging/default"), -1)
	if len(named) < 4 {
		t.Errorf("found only %q", named)
	}
	for _, n := range named {
		flag := "--" + strings.ReplaceAll(strings.ToLower(n[1]), "_", "-")
		if !strings.Contains(help, " "+flag+" ") {
			t.Errorf("%s has no flag %s", n[0], flag)
		}
	}
	cmd := commandOf(built(t, echodBinary), "serve", "--listen", "127.0.0.1:0", "--control", filepath.Join(shortDir(t), "c"))
	cmd.Env = environment("ECHOD_LOG_FORMAT=json")
	for _, line := range regexp.MustCompile(`(?m)^#?(ECHOD_[A-Z_]+=.*)$`).FindAllStringSubmatch(readFile(t, "../packaging/default"), -1) {
		variable := line[1]
		if strings.HasPrefix(variable, "ECHOD_HTTP=") {
			variable = "ECHOD_HTTP=" + freePorts(t, 1)[0] // 9090 may be in use
		}
		cmd.Env = append(cmd.Env, variable)
	}
	e := launch(t, cmd, cmd.Args[len(cmd.Args)-1])
	check(t, e.served().leave())
}

// maxExposure is the limit for systemd-analyze security, in tenths: 0 is no exposure, 100 is full exposure.
const maxExposure = "15"

func TestSystemdAnalyze(t *testing.T) {
	analyze := analyze.find(t)[0]
	r := run(t, commandOf(analyze, "security", "--offline=true", "--threshold="+maxExposure, "--no-pager", "../packaging/systemd/echod.service"))
	overall := regexp.MustCompile(`Overall exposure level.*`).FindString(r.stdout)
	if r.code != 0 || overall == "" {
		t.Errorf("systemd-analyze security: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	t.Log(overall)

	s := &systemd{units: t.TempDir()}
	verify := []string{analyze, "verify", "--man=no"}
	for _, name := range []string{"echod.service", "echod.socket", "echod-control.socket"} {
		text := readFile(t, filepath.Join("../packaging/systemd", name))
		verify = append(verify, filepath.Join(s.units, name))
		// /usr/bin/echod may not exist here.
		s.write(t, name, strings.ReplaceAll(text, "/usr/bin/echod", built(t, echodBinary)))
	}
	if r := run(t, commandOf(verify...)); r.code != 0 || r.stdout+r.stderr != "" {
		t.Errorf("systemd-analyze verify: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}
