//go:build unix

package integration

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// passedSocket is a socket that a supervisor passes to the server, as systemd does; see sd_listen_fds(3).
type passedSocket struct {
	name string
	ln   interface{ File() (*os.File, error) }
}

// activated returns a command that runs a server with these sockets.
func activated(t *testing.T, sockets []passedSocket, flags ...string) *exec.Cmd {
	t.Helper()
	names := make([]string, len(sockets))
	args := append([]string{"-c", `LISTEN_PID=$$ exec "$0" "$@"`, built(t, echodBinary), "serve", "--log-format", "json"}, flags...)
	cmd := exec.Command(require(t, "sh"), args...)
	for i, s := range sockets {
		names[i] = s.name
		file, err := s.ln.File()
		check(t, err)
		t.Cleanup(func() { _ = file.Close() })
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	cmd.Env = environment(fmt.Sprintf("LISTEN_FDS=%d", len(sockets)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	return cmd
}

func tcpSocket(t *testing.T) *net.TCPListener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	t.Cleanup(func() { _ = ln.Close() })
	return ln.(*net.TCPListener)
}

func unixSocket(t *testing.T) (ln *net.UnixListener, path string) {
	t.Helper()
	path = filepath.Join(shortDir(t), "c")
	listener, err := net.Listen("unix", path)
	check(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	return listener.(*net.UnixListener), path
}

func TestSocketActivation(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{"by default": nil, "with --control": {"--control"}} {
		t.Run("sockets are used by their names "+name, func(t *testing.T) {
			t.Parallel()
			one, two := tcpSocket(t), tcpSocket(t)
			plane, path := unixSocket(t)
			if flags != nil {
				flags = append(flags, path)
			}
			e := launch(t, activated(t, []passedSocket{{"echo", one}, {"control", plane}, {"echo", two}}, flags...), path)
			e.awaitLog("control socket open", "path", path)
			for _, ln := range []*net.TCPListener{one, two} {
				p, err := connect(ln.Addr().String())
				check(t, err)
				defer p.Close()
				check(t, p.echo("hello\n"))
			}
			if st := e.status(); st.PID != e.pid || len(st.Listeners) != 2 || st.Accepted != 2 {
				t.Errorf("the control socket says %+v", st)
			}
			_, err := e.control.Shutdown(within(t, patience), control.ShutdownRequest{Now: true})
			check(t, err)
			e.wait(0)
		})
	}

	echo, other := tcpSocket(t), tcpSocket(t)
	plane, path := unixSocket(t)
	second, _ := unixSocket(t)
	for name, c := range map[string]struct {
		sockets []passedSocket
		flags   []string
		want    string
	}{
		"another name":         {[]passedSocket{{"echo", echo}, {"http", other}}, nil, `socket "http", ` + other.Addr().String() + `: want FileDescriptorName=echo or control`},
		"a control over TCP":   {[]passedSocket{{"control", other}}, nil, "want a single Unix socket"},
		"two controls":         {[]passedSocket{{"control", plane}, {"control", second}}, nil, "want a single Unix socket"},
		"another control path": {[]passedSocket{{"control", plane}}, []string{"--control", "/elsewhere"}, "--control /elsewhere: systemd passes another control socket, " + path},
		"control off":          {[]passedSocket{{"control", plane}}, []string{"--control", "off"}, "--control off: systemd passes another control socket, " + path},
	} {
		t.Run("it is an error to pass "+name, func(t *testing.T) {
			t.Parallel()
			if got := run(t, activated(t, c.sockets, c.flags...)); got.code != 1 || !strings.Contains(got.stderr, c.want) {
				t.Errorf("exit code %d, %q; want 1, and %q in it", got.code, got.stderr, c.want)
			}
		})
	}
}

// The server cannot know whether a successor comes. The kernel would reset the clients in the queue when the supervisor
// closes the socket too.
func TestG4DrainServesTheQueueOfAnInheritedSocket(t *testing.T) {
	t.Parallel()
	ln := tcpSocket(t)
	path := filepath.Join(shortDir(t), "c")
	e := launch(t, activated(t, []passedSocket{{"echo", ln}}, "--control", path, "--grace", "20s"), path)
	e.addr = ln.Addr().String()
	e.pause(control.PauseRequest{})
	waiting := make([]*peer, 20)
	for i := range waiting {
		waiting[i] = e.dial()
	}
	e.signal(syscall.SIGTERM)
	for _, p := range waiting {
		check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
		check(t, p.echo("served\n"))
	}
	later := e.dial() // left to a successor
	for _, p := range waiting {
		check(t, p.leave())
	}
	e.wait(0)
	check(t, ln.SetDeadline(time.Now().Add(patience)))
	served, err := ln.Accept()
	check(t, err)
	defer served.Close()
	if served.RemoteAddr().String() != later.LocalAddr().String() {
		t.Errorf("the successor's first client is %s, want %s", served.RemoteAddr(), later.LocalAddr())
	}
}
