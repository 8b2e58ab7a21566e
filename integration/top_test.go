//go:build unix

package integration

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"echod/control"
)

// screen is a program, such as echod top, in a terminal of a given size, as tmux draws it.
type screen struct {
	t    testing.TB
	tmux []string
	pid  int // of echod top
}

// top starts echod top on a screen of this size. settings are environment variables.
func (e *echod) top(columns, rows int, settings ...string) *screen {
	e.t.Helper()
	dir := shortDir(e.t)
	// The shell prints top's exit code, and whether it restored the terminal's settings.
	script := fmt.Sprintf(`before=$(stty -g); env LC_ALL=C.UTF-8 %s sh -c 'echo $$ >"$0" && exec "$@"' '%s' '%s' top --control '%s' --interval 100ms;
echo "code=$?"; [ "$before" != "$(stty -g)" ] || echo 'settings as before'; exec cat`, strings.Join(settings, " "), filepath.Join(dir, "pid"), built(e.t, echodBinary), e.socket)
	s := newScreen(e.t, columns, rows, script)
	poll(e.t, "echod top to start", func() bool {
		text, err := os.ReadFile(filepath.Join(dir, "pid"))
		s.pid, _ = strconv.Atoi(strings.TrimSpace(string(text)))
		return err == nil && s.pid > 0
	})
	return s
}

// newScreen runs a shell command in a terminal of a given size.
func newScreen(t testing.TB, columns, rows int, command string) *screen {
	t.Helper()
	s := &screen{t: t, tmux: []string{tmux.find(t)[0], "-S", filepath.Join(shortDir(t), "tmux"), "-f", os.DevNull, "-u"}}
	s.call("new-session", "-d", "-x", strconv.Itoa(columns), "-y", strconv.Itoa(rows), command)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the screen shows:\n%s", s.shows())
		}
		_ = run(t, s.command("kill-server"))
	})
	return s
}

func (s *screen) command(args ...string) *exec.Cmd {
	return commandOf(append(s.tmux[:len(s.tmux):len(s.tmux)], args...)...)
}

func (s *screen) call(args ...string) string {
	s.t.Helper()
	got := run(s.t, s.command(args...))
	if got.code != 0 {
		s.t.Fatalf("tmux %q: %s", args, got.stderr)
	}
	return got.stdout
}

// shows returns the text on the screen.
func (s *screen) shows() string {
	s.t.Helper()
	return s.call("capture-pane", "-p")
}

// presses presses keys, named as in tmux.
func (s *screen) presses(keys ...string) {
	s.t.Helper()
	s.call(append([]string{"send-keys"}, keys...)...)
}

// types types text.
func (s *screen) types(text string) {
	s.t.Helper()
	s.call("send-keys", "-l", text)
}

// awaits waits until the screen matches all patterns, and returns the submatches of the first.
func (s *screen) awaits(patterns ...string) (found []string) {
	s.t.Helper()
	poll(s.t, "the screen to show "+strings.Join(patterns, " and "), func() bool {
		text := s.shows()
		for i, pattern := range patterns {
			match := regexp.MustCompile(`(?m)` + pattern).FindStringSubmatch(text)
			if match == nil {
				return false
			}
			if i == 0 {
				found = match
			}
		}
		return true
	})
	return found
}

// awaitsNot waits until the screen does not match pattern.
func (s *screen) awaitsNot(pattern string) {
	s.t.Helper()
	poll(s.t, "the screen not to show "+pattern, func() bool { return !regexp.MustCompile(`(?m)` + pattern).MatchString(s.shows()) })
}

// awaitsEnd waits until top exits with this code, and checks that it restored the terminal.
func (s *screen) awaitsEnd(code int) {
	s.t.Helper()
	s.awaits(fmt.Sprintf(`^code=%d$`, code), `^settings as before$`)
	if flags := strings.TrimSpace(s.call("display-message", "-p", "#{alternate_on} #{cursor_flag} #{keypad_cursor_flag} #{mouse_any_flag}")); flags != "0 1 0 0" {
		s.t.Errorf("alternate screen, cursor, keypad, mouse are %s after the end, want 0 1 0 0", flags)
	}
}

var sizes = []struct{ columns, rows int }{{80, 24}, {200, 50}, {40, 10}}

func TestTopScreenSizes(t *testing.T) {
	t.Parallel()
	for _, size := range sizes {
		t.Run(fmt.Sprintf("%dx%d", size.columns, size.rows), func(t *testing.T) {
			t.Parallel()
			e := start(t)
			p := e.served()
			e.crowd(2)
			s := e.top(size.columns, size.rows)
			s.awaits(`^ running +.*pid `+strconv.Itoa(e.pid)+` +up `, `^connections +3 open, 3 accepted`, `\d `+p.LocalAddr().String()+` `)
			if size.rows > 10 {
				s.awaits(`^listening +`+regexp.QuoteMeta(e.addr), `accepts .*/s.*in .*B/s`, `RATE▼`, `serving`)
			}
			check(t, p.leave())
			s.awaits(`^connections +2 open, 3 accepted`)
			s.awaitsNot(` ` + p.LocalAddr().String() + ` +serving`)
			for line := range strings.SplitSeq(strings.TrimSuffix(s.shows(), "\n"), "\n") {
				if n := len([]rune(line)); n > size.columns {
					t.Errorf("a line of %d columns: %q", n, line)
				}
			}
			if size.rows < 50 {
				s.presses("Tab")
			}
			s.awaits(`^ +1 127\.0.*client-closed`)
			s.presses("q")
			s.awaitsEnd(0)
		})
	}
}

func TestTopPause(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.served()
	s := e.top(80, 24)
	s.awaits(`^ running `, `^connections +1 open`)
	s.presses("p")
	s.awaits(`^Reason for the pause:`)
	s.types("nightly backupp")
	s.presses("BSpace", "Enter")
	s.awaits(`^Pause the server \(nightly backup\)\? .*\n?.*y/N`)
	e.expectState("running")
	s.presses("y")
	s.awaits(`^ paused `, `^hold h1 +"nightly backup", for `)
	st := e.status()
	if st.State != "paused" || len(st.Holds) != 1 || st.Holds[0].Reason != "nightly backup" {
		t.Errorf("the server is %s with %+v", st.State, st.Holds)
	}
	s.presses("u")
	s.awaits(`^Resume the server\? This releases 1 hold \(h1 nightly backup\)\. y/N`)
	s.presses("n")
	s.awaits(`^cancelled`)
	e.expectState("paused")
	s.presses("u", "y")
	s.awaits(`^ running `)
	s.awaitsNot(`^hold h1`)
	e.expectState("running")
}

// TestTopPausedServer: top on a paused server shows the pause first: who placed it, why, and when it ends.
func TestTopPausedServer(t *testing.T) {
	t.Parallel()
	for _, size := range sizes {
		t.Run(fmt.Sprintf("%dx%d", size.columns, size.rows), func(t *testing.T) {
			t.Parallel()
			e := start(t, "--max-conns", "1")
			e.served()
			e.pause(control.PauseRequest{Reason: "backup", TTL: time.Hour})
			e.dial()
			s := e.top(size.columns, size.rows)
			s.awaits(`\A paused `, `\A.*\nhold h1 +"backup", `)
			if size.columns >= 80 {
				s.awaits(`expires in 59m\d\ds, by .*uid `+strconv.Itoa(os.Getuid())+`, pid `+strconv.Itoa(os.Getpid()),
					`^listening +.*, 1 of \d+ in the accept queue`, `^full +max-conns 1 is reached: new clients wait`)
			}
		})
	}
}

func TestTopKill(t *testing.T) {
	t.Parallel()
	e := start(t)
	stays := e.served()
	p := e.served()
	s := e.top(80, 24)
	s.awaits(`^connections +2 open`, ` 1 `+stays.LocalAddr().String(), ` 2 `+p.LocalAddr().String())
	s.presses("x")
	s.awaits(`^select an open connection first`)
	s.presses("End")
	s.awaits(`^> +2 `)
	s.presses("x")
	s.awaits(`^Close connection 2 from ` + p.LocalAddr().String())
	s.presses("y")
	check(t, p.expectRest(""))
	s.awaits(`^connections +1 open`)
	check(t, stays.echo("still there\n"))
	s.presses("Tab")
	s.awaits(p.LocalAddr().String() + ` +killed`)
}

func TestTopSortAndFilter(t *testing.T) {
	t.Parallel()
	e := start(t)
	quiet := e.served()
	busy := e.dial()
	check(t, busy.echo(strings.Repeat("x", 5000)+"\n"))
	s := e.top(80, 24)
	order := func(first, second *peer) string {
		return `(?s) ` + first.LocalAddr().String() + ` .* ` + second.LocalAddr().String() + ` `
	}
	s.presses("s") // from RATE to ID
	s.awaits(`ID▲`, order(quiet, busy))
	s.presses("r")
	s.awaits(`ID▼`, order(busy, quiet))
	s.presses("S", "S") // back to OUT
	s.awaits(`OUT▼`, order(busy, quiet))
	s.presses("r")
	s.awaits(`OUT▲`, order(quiet, busy))
	s.presses("/")
	s.types(busy.LocalAddr().String())
	s.awaits(` ` + busy.LocalAddr().String() + ` +serving`)
	s.awaitsNot(` ` + quiet.LocalAddr().String() + ` +serving`)
	s.presses("Enter")
	s.awaits(`^1 of 2 connections, filtered by "` + busy.LocalAddr().String() + `"`)
	s.presses("Escape")
	s.awaits(`^2 connections`, order(quiet, busy))
}

func TestTopDrain(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "60s")
	p := e.served()
	s := e.top(80, 24)
	s.awaits(`^connections +1 open`)
	s.presses("D")
	s.awaits(`^Drain the server\? It notifies 1 client, gives them 1m0s to finish, and stops\.\sy/N`)
	s.presses("y")
	check(t, p.expect("SHUTDOWN 60 control\n"))
	left := s.awaits(`^draining +control: (\d+)s left, 1 notified, 0 failed`, `^ draining `)
	s.awaitsNot(`^draining +control: ` + left[1] + `s left`)
	s.presses("p", "Enter", "y")
	s.awaits(`^the server refused: .*draining`)
	check(t, p.leave())
	e.wait(0)
	s.awaits(`^ stopped `, `^stopped +the server stopped`)
	s.presses("p")
	s.awaits(`^the server does not answer`)
	s.presses("q")
	s.awaitsEnd(0)
}

func TestTopReconnects(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.served()
	s := e.top(80, 24)
	s.awaits(`^connections +1 open`)
	e.signal(syscall.SIGKILL)
	<-e.exited
	s.awaits(`^ gone `, `^gone +connection lost`)
	s.awaitsNot(` serving `)
	successor := start(t, "--control", e.socket)
	successor.served()
	s.awaits(`^ running .*pid `+strconv.Itoa(successor.pid), `^connections +1 open, 1 accepted`, ` serving `)
	successor.served()
	s.awaits(`^connections +2 open`, `^ +2 127.0.0.1`)
}

func TestTopServerHangs(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.served()
	s := e.top(80, 24)
	s.awaits(`^connections +1 open`, ` serving `)
	e.signal(syscall.SIGSTOP)
	defer e.signal(syscall.SIGCONT)
	s.awaits(`^ no answer `, `^no answer +for .*no answer within 2s`, ` serving `)
	e.signal(syscall.SIGCONT)
	s.awaits(`^ running `)
}

func TestTopRestoresTheTerminal(t *testing.T) {
	t.Parallel()
	e := start(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			s := (&echod{t: t, socket: e.socket}).top(80, 24)
			s.awaits(`^ running `)
			check(t, syscall.Kill(s.pid, sig))
			s.awaitsEnd(128 + int(sig))
		})
	}
	t.Run("Ctrl-C", func(t *testing.T) {
		t.Parallel()
		s := (&echod{t: t, socket: e.socket}).top(80, 24)
		s.awaits(`^ running `)
		s.presses("C-c")
		s.awaitsEnd(0)
	})
}

var colour = regexp.MustCompile("\x1b\\[[0-9;]*m")

// colours returns the colour sequences on the screen.
func (s *screen) colours() (set []string) {
	s.t.Helper()
	for _, sequence := range colour.FindAllString(s.call("capture-pane", "-e", "-p"), -1) {
		for code := range strings.SplitSeq(strings.Trim(sequence, "\x1b[m"), ";") {
			if n, _ := strconv.Atoi(code); n >= 30 && n != 39 && n != 49 {
				set = append(set, sequence)
			}
		}
	}
	return set
}

func TestTopNoColor(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.served()
	coloured := e.top(80, 24)
	coloured.awaits(`^ running `, `127.0.0.1.*serving`)
	if len(coloured.colours()) == 0 {
		t.Error("no colours by default")
	}
	for _, setting := range []string{"NO_COLOR=yes", "ECHOD_TOP_NO_COLOR=true"} {
		s := e.top(80, 24, setting)
		s.awaits(`^ running `, `127.0.0.1.*serving`)
		s.presses("Down")
		s.awaits(`^> +1 127.0.0.1`)
		if set := s.colours(); len(set) > 0 {
			t.Errorf("%s: colours %q", setting, set)
		}
	}
}

func TestTopASCII(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.served()
	s := e.top(80, 24, "LC_ALL=C")
	s.awaits(`RATEv`, `127.0.0.1.*serving`)
	if found := regexp.MustCompile(`[^\x00-\x7f]`).FindString(s.shows()); found != "" {
		t.Errorf("the screen shows %q", found)
	}
}

func TestTopNoServer(t *testing.T) {
	t.Parallel()
	e := start(t)
	e.signal(syscall.SIGTERM)
	e.wait(0)
	s := e.top(80, 24)
	s.awaits(`^echod: no server answers on control socket `)
	s.awaitsEnd(2)
}

// A terminal that cannot move its cursor gets no escape sequences.
func TestTopDumbTerminal(t *testing.T) {
	t.Parallel()
	e := start(t)
	for _, name := range []string{"dumb", ""} {
		cmd := commandOf(built(t, echodBinary), "top", "--control", e.socket)
		cmd.Env = environment("TERM=" + name)
		tty, err := pty.Start(cmd)
		check(t, err)
		got, _ := io.ReadAll(tty) // its end is EIO on Linux
		_ = tty.Close()
		_ = cmd.Wait()
		if want := fmt.Sprintf("and TERM is %q", name); !strings.Contains(string(got), want) || strings.Contains(string(got), "\x1b") {
			t.Errorf("TERM=%s: the terminal got %q, want %q and no escape sequences", name, got, want)
		}
		if code := exitCode(cmd.ProcessState); code != 2 {
			t.Errorf("TERM=%s: exit code %d, want 2", name, code)
		}
	}
}

// Ctrl-Z returns to the shell, and fg to top.
func TestTopSuspend(t *testing.T) {
	t.Parallel()
	e := start(t)
	term, _ := openTerminal(t)
	term.types(`$ECHOD top --control ` + e.socket + "\n")
	term.awaits(`running`)
	term.types("\x1a")
	term.awaits(`prompt> $`)
	term.types("echo $((40+2))\n")
	term.awaits(`(?m)^42$`)
	term.types("fg\n")
	term.awaits(`(?s)42.*running`)
	term.types("q")
	term.awaits(`(?s)42.*running.*prompt> $`)
}
