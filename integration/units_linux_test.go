package integration

import (
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// setting is what a unit sets something to, once.
func setting(t *testing.T, unit, name string) string {
	t.Helper()
	found := regexp.MustCompile(`(?m)^`+name+`=(.*)$`).FindAllStringSubmatch(unit, -1)
	if len(found) != 1 {
		t.Fatalf("the unit sets %s %d times, want once", name, len(found))
	}
	return found[0][1]
}

func TestUnitsFitWhatEchodDoes(t *testing.T) {
	t.Parallel()
	unit := readFile(t, "../packaging/systemd/echod.service")
	stop := setting(t, unit, "TimeoutStopSec")
	if told := setting(t, unit, "Environment=ECHOD_STOP_TIMEOUT"); told != stop {
		t.Errorf("echod is told that it has %s to stop, and has %s", told, stop)
	}
	if seconds(t, stop) < time.Minute {
		t.Errorf("a stop may take %s: that is short for a drain", stop)
	}
	// A probe may take 3 s, and is made every half of the interval.
	if watchdog := seconds(t, setting(t, unit, "WatchdogSec")); watchdog < 2*3*time.Second || watchdog > 30*time.Second {
		t.Errorf("the watchdog bites after %v: too soon for a slow machine, or too late for clients", watchdog)
	}
	if n, err := strconv.Atoi(setting(t, unit, "LimitNOFILE")); err != nil || n < 1<<15 {
		t.Errorf("there may be %d open files (%v): a file for each connection", n, err)
	}
	for _, name := range []string{"NotifyAccess", "RuntimeDirectory", "EnvironmentFile"} {
		setting(t, unit, name)
	}
}

// Every setting that the file for administrators shows is one that there is.
func TestDefaultsNameRealFlags(t *testing.T) {
	t.Parallel()
	help := run(t, commandOf(built(t, echodBinary), "serve", "--help")).stdout
	named := regexp.MustCompile(`\bECHOD_([A-Z_]+)`).FindAllStringSubmatch(readFile(t, "../packaging/default"), -1)
	if len(named) < 4 {
		t.Errorf("only %q are shown", named)
	}
	for _, n := range named {
		flag := "--" + strings.ReplaceAll(strings.ToLower(n[1]), "_", "-")
		if !strings.Contains(help, " "+flag+" ") {
			t.Errorf("%s is shown, and there is no %s", n[0], flag)
		}
	}
	// And taken as it is, it is one that echod starts with.
	cmd := commandOf(built(t, echodBinary), "serve", "--listen", "127.0.0.1:0", "--control", filepath.Join(shortDir(t), "c"))
	cmd.Env = environment("ECHOD_LOG_FORMAT=json")
	for _, line := range regexp.MustCompile(`(?m)^#?(ECHOD_[A-Z_]+=.*)$`).FindAllStringSubmatch(readFile(t, "../packaging/default"), -1) {
		variable := line[1]
		if strings.HasPrefix(variable, "ECHOD_HTTP=") {
			variable = "ECHOD_HTTP=" + freePorts(t, 1)[0] // that one may be taken here
		}
		cmd.Env = append(cmd.Env, variable)
	}
	e := launch(t, cmd, cmd.Args[len(cmd.Args)-1])
	check(t, e.served().leave())
}

// maxExposure is what systemd may think of the service: 0 is nothing, 10 is everything.
const maxExposure = "15" // tenths

func TestSystemdUnitsAreTightAndSound(t *testing.T) {
	analyze := require(t, "systemd-analyze")
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
		// It is not installed where this runs.
		s.write(t, name, strings.ReplaceAll(text, "/usr/bin/echod", built(t, echodBinary)))
	}
	if r := run(t, commandOf(verify...)); r.code != 0 || r.stdout+r.stderr != "" {
		t.Errorf("systemd-analyze verify: %d\n%s%s", r.code, r.stdout, r.stderr)
	}
}
