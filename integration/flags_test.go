//go:build unix

package integration

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

func TestSeveralListeners(t *testing.T) {
	t.Parallel()
	e := start(t, "--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--grace", "20s")
	if st := e.status(); len(st.Listeners) != 3 {
		t.Errorf("listeners %+v", st.Listeners)
	}
	var peers []*peer
	for _, addr := range e.addrs {
		p, err := connect(addr)
		check(t, err)
		defer p.Close()
		check(t, p.echo("hello\n"))
		peers = append(peers, p)
	}
	e.pause(control.PauseRequest{})
	for _, addr := range e.addrs {
		p, err := connect(addr)
		check(t, err)
		defer p.Close()
		peers = append(peers, p)
	}
	if n := len(e.admitted()); n != 3 {
		t.Errorf("%d admitted, want 3: a pause applies to all listeners", n)
	}
	e.signal(syscall.SIGTERM)
	for _, p := range peers {
		check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
		check(t, p.leave())
	}
	e.wait(0)
}

func TestIPv6(t *testing.T) {
	t.Parallel()
	probe, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("no IPv6: %v", err)
	}
	_ = probe.Close()
	e := start(t, "--listen", "[::1]:0", "--max-conns-per-ip", "1", "--grace", "20s")
	p := e.served()
	check(t, e.dial().expectRest("BUSY\n"))
	conns, err := e.control.Conns(within(t, patience), 1, control.ConnFilter{})
	check(t, err)
	if got := conns.Connections[0].Remote; got != p.LocalAddr().String() {
		t.Errorf("the client is %s, want %s", got, p.LocalAddr())
	}
	e.signal(syscall.SIGTERM)
	check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
	check(t, p.leave())
	e.wait(0)
}

func TestLimitQueuesClients(t *testing.T) {
	t.Parallel()
	e := start(t, "--max-conns", "2", "--grace", "20s")
	first, second := e.served(), e.served()
	waiting := e.dial()
	check(t, waiting.send("waiting\n"))
	if st := e.status(); st.Connections != 2 || e.queued(st) != 1 {
		t.Errorf("%d open, %d waiting, want 2 and 1", st.Connections, e.queued(st))
	}
	check(t, first.leave())
	check(t, waiting.expect("waiting\n"))
	another := e.dial() // a drain accepts it in spite of the limit
	e.signal(syscall.SIGTERM)
	for _, p := range []*peer{second, waiting, another} {
		check(t, p.expect("SHUTDOWN 20 SIGTERM\n"))
		check(t, p.echo("served on\n"))
		check(t, p.leave())
	}
	e.wait(0)
}

func TestLimitRejectsClients(t *testing.T) {
	t.Parallel()
	e := start(t, "--max-conns", "2", "--at-limit", "reject")
	first, _ := e.served(), e.served()
	check(t, e.dial().expectRest("BUSY\n"))
	check(t, first.leave())
	check(t, first.Close())
	_, err := e.control.Wait(within(t, patience), control.WaitRequest{Connections: new(1)})
	if err != nil { // the rejected client may linger
		t.Fatal(err)
	}
	e.served()
	e.expectAccounts(map[string]uint64{"client-closed": 1, "rejected-limit": 1})
}

func TestLimitPerAddress(t *testing.T) {
	t.Parallel()
	e := start(t, "--max-conns-per-ip", "2")
	e.served()
	e.served()
	check(t, e.dial().expectRest("BUSY\n"))
	elsewhere := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}, Timeout: patience}
	nc, err := elsewhere.DialContext(t.Context(), "tcp", e.addr)
	if err != nil {
		t.Skipf("no second loopback address: %v", err)
	}
	defer nc.Close()
	check(t, nc.SetDeadline(time.Now().Add(patience)))
	_, err = nc.Write([]byte("x"))
	check(t, err)
	if n, err := nc.Read(make([]byte, 1)); n != 1 {
		t.Errorf("the other address is not served: %v", err)
	}
}

func TestIdleTimeout(t *testing.T) {
	t.Parallel()
	const timeout = 300 * time.Millisecond
	e := start(t, "--idle-timeout", timeout.String())
	p := e.served()
	since := time.Now()
	check(t, p.expectRest(""))
	if idle := time.Since(since); idle < timeout*9/10 {
		t.Errorf("closed after %s", idle)
	}
	_ = p.Close()
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"idle-timeout": 1})
}

func TestStallTimeout(t *testing.T) {
	t.Parallel()
	e := start(t, "--stall-timeout", "300ms")
	p := e.dial()
	p.flood() // until the server closes
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"stalled": 1})
}

func TestNoticeTemplates(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, template, want string }{
		{"default", "SHUTDOWN {seconds} {reason}\\n", "\nSHUTDOWN 20 SIGTERM\n"},
		{"without a newline", "SHUTDOWN", "SHUTDOWN"},
		{"escapes", `\x01bye\t{reason}\u00e9\n`, "\n\x01bye\tSIGTERM\u00e9\n"},
		{"nothing", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := start(t, "--grace", "20s", "--notice", tt.template)
			p := e.dial()
			check(t, p.echo("no newline"))
			e.signal(syscall.SIGTERM)
			e.awaitLog("draining")
			check(t, p.expect(tt.want))
			check(t, p.echo("no newline"))
			check(t, p.leave())
			e.wait(0)
		})
	}
	t.Run("deadline", func(t *testing.T) {
		t.Parallel()
		e := start(t, "--grace", "20s", "--notice", `{deadline}\n`)
		p := e.served()
		e.signal(syscall.SIGTERM)
		line, err := p.in.ReadString('\n')
		check(t, err)
		said, err := time.Parse(time.RFC3339, strings.TrimSpace(line))
		check(t, err)
		if deadline := e.status().Drain.Deadline; !said.Equal(deadline.Truncate(time.Second)) {
			t.Errorf("the notice says %s, the deadline is %s", said, deadline)
		}
		check(t, p.leave())
		e.wait(0)
	})
}

func TestControlSocketModes(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		flags []string
		want  os.FileMode
	}{
		{nil, 0o600},
		{[]string{"--control-mode", "0660", "--control-group", fmt.Sprint(os.Getgid())}, 0o660},
	} {
		e := start(t, tt.flags...)
		info, err := os.Stat(e.socket)
		check(t, err)
		if info.Mode().Perm() != tt.want {
			t.Errorf("with %q the mode is %o, want %o", tt.flags, info.Mode().Perm(), tt.want)
		}
	}
}

func TestControlOff(t *testing.T) {
	t.Parallel()
	dir := shortDir(t)
	cmd := commandOf(built(t, echodBinary), "--control", "off", "--listen", "127.0.0.1:0", "--log-format", "json")
	cmd.Env = environment("RUNTIME_DIRECTORY="+dir, "TMPDIR="+dir)
	e := launch(t, cmd, filepath.Join(dir, "control.sock"))
	check(t, e.served().leave())
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("files left: %v (%v)", left, err)
	}
	e.signal(syscall.SIGTERM)
	e.wait(0)
}

// TestGraceOfZero: clients are notified, and closed at once.
func TestGraceOfZero(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "0s")
	p := e.served()
	begun := e.signal(syscall.SIGTERM)
	check(t, p.expectRest("SHUTDOWN 0 SIGTERM\n"))
	_ = p.Close()
	e.wait(0)
	if took := e.gone.Sub(begun); took > 2*time.Second {
		t.Errorf("the process exited after %s", took)
	}
}
