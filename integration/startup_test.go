//go:build unix

package integration

import (
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// From the first client that connects, a signal is a drain: the clients are notified and can finish.
func TestG15SignalDuringStart(t *testing.T) {
	t.Parallel()
	overEach(t, testSignalDuringStart)
}

func testSignalDuringStart(t *testing.T, over transport) {
	t.Parallel()
	for name, sig := range map[string]syscall.Signal{"SIGTERM": syscall.SIGTERM, "SIGINT": syscall.SIGINT, "SIGHUP": syscall.SIGHUP} {
		for range 3 {
			e := over.startUnawaited(t, "--grace", "20s")
			p, err := e.connectWithin(aMoment)
			for end := time.Now().Add(patience); err != nil && time.Now().Before(end); p, err = e.connectWithin(aMoment) {
				// No pause: the signal has to arrive as early as possible.
			}
			check(t, err)
			defer p.Close()
			e.signal(sig)
			check(t, p.send("hello\n"))
			got := make([]byte, len("hello\nSHUTDOWN 20 "+name+"\n"))
			_, err = io.ReadFull(p.in, got)
			check(t, err)
			if echo, err := onlyOnce(string(got), "SHUTDOWN 20 "+name+"\n"); err != nil || echo != "hello\n" {
				t.Errorf("the client got %q (%v)", got, err)
			}
			check(t, p.leave())
			e.wait(0)
		}
	}
}

// startUnawaited starts a server on a free port, or on its Unix socket, and does not wait until it listens.
func (tr transport) startUnawaited(t *testing.T, flags ...string) *echod {
	t.Helper()
	return tr.startWith(t, func(flags ...string) *echod {
		addr := "127.0.0.1:" + freePorts(t, 1)[0]
		for i, flag := range flags {
			flags[i] = strings.Replace(flag, "127.0.0.1:0", addr, 1)
		}
		cmd := exec.Command(built(t, leanBinary), append([]string{
			"serve", "--log-format", "json", "--control", filepath.Join(shortDir(t), "c"),
		}, flags...)...)
		e := spawn(t, cmd, "")
		e.addr = addr
		return e
	}, flags...)
}

// A shell without job control starts its background jobs with SIGINT ignored, and nohup with SIGHUP.
func TestIgnoredSignalsStayIgnored(t *testing.T) {
	t.Parallel()
	sh := require(t, "sh")
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGHUP} {
		e := startAs(t, []string{sh, "-c", `trap "" INT HUP; exec "$@"`, "sh"}, "--grace", "20s")
		p := e.served()
		e.signal(sig)
		e.signal(sig)
		check(t, p.echo("still served\n"))
		e.expectState("running")
		e.signal(syscall.SIGTERM)
		check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
		check(t, p.leave())
		e.wait(0)
	}
	e := start(t)
	ctl := startProgram(t, sh, "-c", `trap "" INT; echo ready; exec "$@"`, "sh", built(t, echodBinary), "ctl", "--control", e.socket, "wait", "--connections", "1")
	ctl.reads("ready\n")
	check(t, ctl.cmd.Process.Signal(syscall.SIGINT))
	e.served()
	ctl.ends("running with 1 connection\n")
}

func TestAddresses(t *testing.T) {
	t.Parallel()
	port := func(address string) string { return address[strings.LastIndex(address, ":"):] }
	dial := func(t *testing.T, address string) error {
		t.Helper()
		p, err := connectSoon(address)
		if err == nil {
			_ = p.Close()
		}
		return err
	}
	if ln, err := net.Listen("tcp", "[::1]:0"); err != nil {
		t.Skipf("no IPv6: %v", err)
	} else {
		_ = ln.Close()
	}
	t.Run("0.0.0.0 is IPv4 only", func(t *testing.T) {
		e := start(t, "--listen", "0.0.0.0:0", "--http", "0.0.0.0:0")
		for _, address := range []string{e.addr, e.awaitLog("http open").str("address")} {
			check(t, dial(t, "127.0.0.1"+port(address)))
			if dial(t, "[::1]"+port(address)) == nil {
				t.Errorf("%s answers on IPv6", address)
			}
		}
	})
	t.Run("an empty host is both families", func(t *testing.T) {
		e := start(t, "--listen", ":0", "--http", ":0")
		for _, address := range []string{e.addr, e.awaitLog("http open").str("address")} {
			check(t, dial(t, "127.0.0.1"+port(address)))
			check(t, dial(t, "[::1]"+port(address)))
		}
	})
	t.Run("0.0.0.0 and [::] can share a port", func(t *testing.T) {
		shared := ":" + freePorts(t, 1)[0]
		e := start(t, "--listen", "[::]"+shared, "--listen", "0.0.0.0"+shared)
		check(t, dial(t, "127.0.0.1"+shared))
		check(t, dial(t, "[::1]"+shared))
		if n := len(e.status().Listeners); n != 2 {
			t.Errorf("%d listeners", n)
		}
	})
	t.Run("a port alone for --http is on the loopback interface", func(t *testing.T) {
		e := start(t, "--http", "0")
		if address := e.awaitLog("http open").str("address"); !strings.HasPrefix(address, "127.0.0.1:") {
			t.Errorf("http is on %s", address)
		}
	})
	t.Run("a Unix socket", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "echo")
		e := start(t, "--listen", "unix://"+path, "--grace", "20s")
		nc, err := net.Dial("unix", path)
		check(t, err)
		defer nc.Close()
		_, err = io.WriteString(nc, "hello\n")
		check(t, err)
		check(t, nc.(*net.UnixConn).CloseWrite())
		if got, err := io.ReadAll(nc); err != nil || string(got) != "hello\n" {
			t.Errorf("the echo is %q (%v)", got, err)
		}
		e.signal(syscall.SIGTERM)
		e.wait(0)
	})
}
