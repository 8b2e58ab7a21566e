//go:build unix

package integration

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"

	"echod/control"
)

// terminal is an interactive shell on a pseudo terminal.
type terminal struct {
	t     testing.TB
	tty   *os.File
	mu    sync.Mutex
	shown bytes.Buffer
	grown chan struct{} // closed and replaced when shown grows
	over  chan struct{}
}

// openTerminal starts an interactive shell. Its variables: $ECHOD is the program, $SOCKET a path for a control socket.
func openTerminal(t testing.TB) (term *terminal, socket string) {
	t.Helper()
	socket = filepath.Join(shortDir(t), "c")
	cmd := commandOf(require(t, "sh"), "-i")
	cmd.Env = environment("PS1=prompt> ", "ENV=", "TERM=xterm", "ECHOD="+built(t, echodBinary), "SOCKET="+socket)
	blocking, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 40, Cols: 200})
	check(t, err)
	tty := closable(t, blocking)
	term = &terminal{t: t, tty: tty, grown: make(chan struct{}), over: make(chan struct{})}
	go term.show()
	t.Cleanup(func() {
		_ = tty.Close() // hangs up, which ends the programs in it
		<-term.over
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("the terminal shows:\n%s", term.screen())
		}
	})
	return term, socket
}

// closable returns a non-blocking copy of file. Closing it interrupts a Read. It closes the original.
func closable(t testing.TB, file *os.File) *os.File {
	t.Helper()
	fd, err := syscall.Dup(int(file.Fd()))
	check(t, err)
	syscall.CloseOnExec(fd)
	check(t, syscall.SetNonblock(fd, true))
	check(t, file.Close())
	return os.NewFile(uintptr(fd), file.Name())
}

// show collects the terminal's output until it is closed.
func (term *terminal) show() {
	defer close(term.over)
	block := make([]byte, 4<<10)
	for {
		n, err := term.tty.Read(block)
		term.mu.Lock()
		term.shown.Write(bytes.ReplaceAll(block[:n], []byte("\r"), nil))
		close(term.grown)
		term.grown = make(chan struct{})
		term.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (term *terminal) screen() string {
	term.mu.Lock()
	defer term.mu.Unlock()
	// BusyBox's shell asks for the position of the cursor at each prompt.
	return strings.ReplaceAll(term.shown.String(), "\x1b[6n", "")
}

// types sends text as if typed.
func (term *terminal) types(text string) {
	term.t.Helper()
	_, err := io.WriteString(term.tty, text)
	check(term.t, err)
}

// awaits waits until the output matches pattern, and returns the submatches.
func (term *terminal) awaits(pattern string) []string {
	term.t.Helper()
	want := regexp.MustCompile(pattern)
	impatient := within(term.t, patience).Done()
	for {
		term.mu.Lock()
		grown := term.grown
		term.mu.Unlock()
		if found := want.FindStringSubmatch(term.screen()); found != nil {
			return found
		}
		select {
		case <-grown:
		case <-impatient:
			term.t.Fatalf("timed out waiting for the terminal to show %s", pattern)
		}
	}
}

const (
	ctrlC         = "\x03"
	ctrlZ         = "\x1a"
	ctrlBackslash = "\x1c"
)

// serveIn starts a server in the terminal and returns a client of it.
func (term *terminal) serveIn(flags string) *peer {
	term.t.Helper()
	term.types(`$ECHOD --listen 127.0.0.1:0 --control $SOCKET ` + flags + `; echo "code=$?"` + "\n")
	addr := term.awaits(`(?m)^\S+ +INFO +listening +\{"address": "([^"]+)"`)[1] // console format, because stderr is a terminal
	p, err := connect(addr)
	check(term.t, err)
	term.t.Cleanup(func() { _ = p.Close() })
	check(term.t, p.echo("hello\n"))
	return p
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	t.Run("Ctrl-C drains", func(t *testing.T) {
		t.Parallel()
		term, _ := openTerminal(t)
		p := term.serveIn("--grace 20s")
		term.types(ctrlC)
		check(t, p.expect("SHUTDOWN 20 SIGINT\n"))
		term.awaits(`signal received +\{"signal": "SIGINT"\}`)
		term.awaits(`draining +\{"seconds_left": (20|1\d), "connections": 1\}`)
		check(t, p.echo("served in the drain\n"))
		check(t, p.leave())
		term.awaits(`drained +\{"reason": "SIGINT".*"notified": 1, .*"left_by_themselves": 1`)
		term.awaits(`(?m)^code=0$`)
	})
	t.Run("a second Ctrl-C forces", func(t *testing.T) {
		t.Parallel()
		term, _ := openTerminal(t)
		p := term.serveIn("--grace 60s")
		term.types(ctrlC)
		check(t, p.expect("SHUTDOWN 60 SIGINT\n"))
		term.types(ctrlC)
		term.awaits(`(?m)^code=130$`)
	})
	t.Run("a second Ctrl-backslash forces and shows the stacks", func(t *testing.T) {
		t.Parallel()
		term, _ := openTerminal(t)
		p := term.serveIn("--grace 60s")
		term.types(ctrlBackslash)
		check(t, p.expect("SHUTDOWN 60 SIGQUIT\n"))
		term.types(ctrlBackslash)
		term.awaits(`goroutine \d+ `)
		term.awaits(`(?m)^code=131$`)
	})
	// The terminal sends the signal to ctl and to the command. The command decides how it ends.
	t.Run("Ctrl-C during 'ctl pause -- COMMAND' reaches the command, and resumes", func(t *testing.T) {
		t.Parallel()
		e := start(t)
		term, _ := openTerminal(t)
		term.types(`$ECHOD ctl --control ` + e.socket + ` pause -- sh -c 'trap "echo caught; exit 9" INT; echo set; read x'; echo "code=$?"` + "\n")
		term.awaits(`set\n`)
		e.expectState("paused")
		term.types(ctrlC)
		term.awaits(`caught\n`)
		term.awaits(`(?m)^code=9$`)
		e.expectState("running")
	})
	t.Run("closing the terminal drains", testClosingATerminal)
}

func testClosingATerminal(t *testing.T) {
	t.Parallel()
	tmux := tmux.find(t)[0]
	dir := shortDir(t)
	call := func(args ...string) {
		t.Helper()
		if got := run(t, commandOf(append([]string{tmux, "-S", filepath.Join(dir, "tmux"), "-f", os.DevNull}, args...)...)); got.code != 0 {
			t.Fatalf("tmux %q: %s", args, got.stderr)
		}
	}
	log, socket := filepath.Join(dir, "log"), filepath.Join(dir, "c")
	check(t, syscall.Mkfifo(log, 0o600))
	// Opened for writing too, because opening a FIFO for reading waits for a writer.
	fifo, err := os.OpenFile(log, os.O_RDWR, 0)
	check(t, err)
	journal := newJournal()
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		_, _ = io.Copy(journal, fifo)
	}()
	t.Cleanup(func() {
		_ = fifo.Close()
		<-reading
	})
	call("new-session", "-d", "-s", "echod", fmt.Sprintf("exec '%s' --listen 127.0.0.1:0 --control '%s' --grace 20s 2>'%s'", built(t, echodBinary), socket, log))
	t.Cleanup(func() { _ = run(t, commandOf(tmux, "-S", filepath.Join(dir, "tmux"), "kill-server")) })
	listening, err := journal.await(within(t, patience), 1, "listening")
	check(t, err)
	p, err := connect(listening.str("address"))
	check(t, err)
	defer p.Close()
	check(t, p.echo("hello\n"))
	call("kill-session", "-t", "echod")
	check(t, p.expect("SHUTDOWN 20 SIGHUP\n"))
	check(t, p.leave())
	_, err = journal.await(within(t, patience), 1, "drained")
	check(t, err)
}

// startUnread starts a server, without a control socket, whose log is not read any more, such as on a terminal after
// Ctrl-S.
func startUnread(t *testing.T, flags ...string) (cmd *exec.Cmd, addr string) {
	t.Helper()
	fifo := filepath.Join(shortDir(t), "log")
	check(t, syscall.Mkfifo(fifo, 0o600))
	read, err := os.OpenFile(fifo, os.O_RDWR, 0) // for writing too, so that it does not wait for a writer
	check(t, err)
	t.Cleanup(func() { _ = read.Close() })
	write, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	check(t, err)
	cmd = commandOf(append([]string{built(t, echodBinary), "--log-format", "json", "--listen", "127.0.0.1:0", "--control", "off"}, flags...)...)
	cmd.Stderr, cmd.Env = write, environment()
	check(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	check(t, write.Close())
	for lines := bufio.NewReader(read); addr == ""; {
		line, err := lines.ReadString('\n')
		check(t, err)
		if e := parseEntry(line); e.msg == "listening" {
			addr = e.str("address")
		}
	}
	fill(t, fifo)
	return cmd, addr
}

func TestLogReaderStops(t *testing.T) {
	t.Parallel()
	for _, sig := range []struct {
		name string
		syscall.Signal
		grace time.Duration
		code  int
	}{{"SIGTERM", syscall.SIGTERM, time.Second, 0}, {"SIGQUIT", syscall.SIGQUIT, 20 * time.Second, 131}} {
		t.Run(sig.name, func(t *testing.T) {
			t.Parallel()
			cmd, addr := startUnread(t, "--grace", sig.grace.String())
			stayer, err := connect(addr)
			check(t, err)
			defer stayer.Close()
			for range 10 { // each adds lines to the log
				p, err := connect(addr)
				check(t, err)
				check(t, errors.Join(p.echo("hello\n"), p.leave(), p.Close()))
			}
			check(t, stayer.echo("still there\n"))
			sent := time.Now()
			check(t, cmd.Process.Signal(sig.Signal))
			check(t, stayer.expect(fmt.Sprintf("SHUTDOWN %.0f %s\n", sig.grace.Seconds(), sig.name)))
			most := exitLimit(sig.grace)
			if sig.code != 0 { // the second one forces the end, and does not wait for the stacks to be read
				check(t, cmd.Process.Signal(sig.Signal))
				most = sig.grace
			} else {
				check(t, stayer.expectRest(""))
			}
			_ = cmd.Wait()
			if took := time.Since(sent); took > most {
				t.Errorf("the process exited after %v, want at most %v", took, most)
			}
			if code := exitCode(cmd.ProcessState); code != sig.code {
				t.Errorf("exit code %d, want %d", code, sig.code)
			}
		})
	}
}

// fill writes to a pipe until it is full.
func fill(t *testing.T, fifo string) {
	t.Helper()
	fd, err := syscall.Open(fifo, syscall.O_WRONLY|syscall.O_NONBLOCK, 0)
	check(t, err)
	defer syscall.Close(fd)
	for _, size := range []int{4 << 10, 1} {
		for err = nil; err == nil; {
			_, err = syscall.Write(fd, make([]byte, size))
		}
	}
	if !errors.Is(err, syscall.EAGAIN) {
		t.Fatal(err)
	}
}

// TestLogReaderGone checks that the server survives when the reader of its log exits.
func TestLogReaderGone(t *testing.T) {
	t.Parallel()
	read, write, err := os.Pipe()
	check(t, err)
	socket := filepath.Join(shortDir(t), "c")
	cmd := commandOf(built(t, echodBinary), "--listen", "127.0.0.1:0", "--control", socket, "--grace", "20s")
	cmd.Stderr, cmd.Env = write, environment()
	check(t, cmd.Start())
	over := make(chan int, 1)
	go func() {
		_ = cmd.Wait()
		over <- exitCode(cmd.ProcessState)
	}()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	check(t, write.Close())
	client := control.NewClient(socket)
	defer client.Close()
	var journal strings.Builder
	addr := regexp.MustCompile(`"listening","address":"([^"]+)"`)
	for block := make([]byte, 4<<10); !addr.MatchString(journal.String()); {
		n, err := read.Read(block)
		check(t, err)
		journal.Write(block[:n])
	}
	check(t, read.Close())

	p, err := connect(addr.FindStringSubmatch(journal.String())[1])
	check(t, err)
	defer p.Close()
	check(t, p.echo("still there\n"))
	_, err = client.Pause(within(t, patience), control.PauseRequest{})
	check(t, err)
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, p.leave())
	select {
	case code := <-over:
		if code != 0 {
			t.Error("exit code " + strconv.Itoa(code))
		}
	case <-time.After(patience):
		t.Error("the server does not exit")
	}
}
