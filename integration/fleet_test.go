//go:build unix

package integration

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// freePorts returns n free ports.
func freePorts(t *testing.T, n int) []string {
	t.Helper()
	ports := make([]string, n)
	for i := range ports {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		check(t, err)
		defer ln.Close() // at the end, so that no port is returned twice
		_, ports[i], err = net.SplitHostPort(ln.Addr().String())
		check(t, err)
	}
	return ports
}

// fleet is HAProxy in front of three servers, as in packaging/haproxy. HAProxy does not send a client that one server
// refuses to another: it has to take the server out of service before.
type fleet struct {
	t     *testing.T
	front string // where clients connect
	ports []string
	flags []string // of each server
	nodes []*echod
	log   *journal
}

func startFleet(t *testing.T) *fleet {
	t.Helper()
	haproxy := haproxy.find(t)[0]
	f := &fleet{t: t, ports: freePorts(t, 7), nodes: make([]*echod, 3), log: newJournal()}
	f.front = "127.0.0.1:" + f.ports[0]
	text := readFile(t, "../packaging/haproxy/haproxy.cfg")
	flags := regexp.MustCompile(`(?m)^# +(--proxy-protocol .*) &$`).FindStringSubmatch(text)
	if flags == nil {
		t.Fatal("haproxy.cfg has no echod command")
	}
	f.flags = strings.Fields(flags[1])
	for i := range f.nodes {
		f.startNode(i)
	}

	config := text
	for _, c := range []struct{ line, instead string }{{"\toption redispatch\n", "\tno option redispatch\n"}, {"\tretries 3\n", "\tretries 0\n"}} {
		if !strings.Contains(config, c.line) {
			t.Fatalf("haproxy.cfg does not have %q", c.line)
		}
		config = strings.Replace(config, c.line, c.instead, 1)
	}
	for i, port := range f.ports {
		standsFor := "9100"
		switch {
		case i > 3:
			standsFor = fmt.Sprint(9200 + i - 3)
		case i > 0:
			standsFor = fmt.Sprint(9100 + i)
		}
		config = regexp.MustCompile(`\b`+standsFor+`\b`).ReplaceAllString(config, port)
	}
	path := filepath.Join(t.TempDir(), "haproxy.cfg")
	check(t, os.WriteFile(path, []byte(config), 0o600))
	if out, err := exec.Command(haproxy, "-c", "-f", path).CombinedOutput(); err != nil {
		t.Fatalf("HAProxy rejects its configuration: %v\n%s", err, out)
	}
	cmd := exec.Command(haproxy, "-db", "-f", path)
	cmd.Stdout, cmd.Stderr = f.log, f.log
	cmd.WaitDelay = patience
	check(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	f.awaitServing()
	return f
}

// startNode starts the i-th server.
func (f *fleet) startNode(i int) {
	f.t.Helper()
	f.nodes[i] = start(f.t, append([]string{"--listen", "127.0.0.1:" + f.ports[1+i], "--http", "127.0.0.1:" + f.ports[4+i]}, f.flags...)...)
}

// awaitServing waits until HAProxy serves clients.
func (f *fleet) awaitServing() {
	f.t.Helper()
	for end := time.Now().Add(patience); ; {
		p, err := connect(f.front)
		if err == nil {
			err = p.echo("hello\n")
			_ = p.Close()
		}
		if err == nil {
			return
		}
		if time.Now().After(end) {
			f.t.Fatalf("no echo through HAProxy: %v", err)
		}
	}
}

// restart restarts the i-th server, and waits until HAProxy sends it clients.
func (f *fleet) restart(i int) {
	f.t.Helper()
	f.nodes[i].signal(syscall.SIGTERM)
	f.nodes[i].wait(0)
	f.startNode(i)
	for end := time.Now().Add(patience); f.nodes[i].status().Accepted < 3; { // HAProxy distributes connections evenly
		if time.Now().After(end) {
			f.t.Fatalf("HAProxy sends no clients to server %d after its restart", i)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// heeding is a client that reconnects on each notice, and counts its messages and echoes.
type heeding struct {
	sent, back, notices, connects int
}

func (h *heeding) run(front string, stop *atomic.Bool) error {
	for !stop.Load() {
		h.connects++
		if err := h.connection(front, stop); err != nil {
			return fmt.Errorf("after %d messages and %d notices: %w", h.sent, h.notices, err)
		}
	}
	return nil
}

// connection sends messages until it gets a notice.
func (h *heeding) connection(front string, stop *atomic.Bool) error {
	p, err := connect(front)
	if err != nil {
		return err
	}
	defer p.Close()
	for told := false; !told && !stop.Load(); {
		message := fmt.Sprintf("message %d\n", h.sent)
		if err := p.send(message); err != nil {
			return err
		}
		h.sent++
		for answered := false; !answered; {
			_ = p.SetDeadline(time.Now().Add(patience))
			line, err := p.in.ReadString('\n')
			switch {
			case err != nil:
				return fmt.Errorf("no echo of %q: %w", message, err)
			case strings.HasPrefix(line, "SHUTDOWN "):
				told = true
				h.notices++
			case line != message:
				return fmt.Errorf("got %q, want %q", line, message)
			default:
				answered = true
				h.back++
			}
		}
	}
	if err := p.CloseWrite(); err != nil {
		return err
	}
	rest, err := p.rest()
	if strings.HasPrefix(rest, "SHUTDOWN ") { // the notice came while this client was leaving
		rest = ""
	}
	if err == nil && rest != "" {
		err = fmt.Errorf("got %q before the end of the stream", rest)
	}
	return err
}

// During a rolling restart of three servers behind HAProxy no connect fails, and clients that reconnect on a notice
// lose no byte.
func TestRollingRestart(t *testing.T) {
	slow(t)
	f := startFleet(t)
	var stop atomic.Bool
	var clients sync.WaitGroup
	var passing atomic.Int64
	const stayers, passers = 20, 4
	errs := make([]error, stayers+passers)
	staying := make([]heeding, stayers)
	for i := range stayers {
		clients.Go(func() { errs[i] = staying[i].run(f.front, &stop) })
	}
	for i := range passers { // these connect, echo and leave, again and again
		clients.Go(func() {
			for !stop.Load() && errs[stayers+i] == nil {
				p, err := connect(f.front)
				if err == nil {
					err = p.echo("hello\n")
				}
				if err == nil {
					err = p.CloseWrite()
				}
				if err == nil {
					var rest string
					if rest, err = p.rest(); err == nil && rest != "" && !strings.HasPrefix(rest, "SHUTDOWN ") {
						err = fmt.Errorf("got %q before the end of the stream", rest)
					}
				}
				if p != nil {
					_ = p.Close()
				}
				errs[stayers+i] = err
				passing.Add(1)
			}
		})
	}
	finish := sync.OnceFunc(func() {
		stop.Store(true)
		clients.Wait()
		for i, err := range errs {
			if err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		}
	})
	defer finish() // a failed client can make a restart fail
	for i := range f.nodes {
		f.restart(i)
	}
	finish()
	sent, back, notices, connects := 0, 0, 0, 0
	for _, h := range staying {
		sent, back, notices, connects = sent+h.sent, back+h.back, notices+h.notices, connects+h.connects
	}
	if sent != back || notices == 0 || passing.Load() == 0 {
		t.Errorf("%d messages sent, %d echoed, %d notices, %d short clients", sent, back, notices, passing.Load())
	}
	t.Logf("%d messages, %d lost; %d connects of those who stay, %d notices; %d clients passed; 0 failed", sent, sent-back, connects, notices, passing.Load())

	// The servers list the clients' addresses, not HAProxy's.
	p, err := connect(f.front)
	check(t, err)
	defer p.Close()
	check(t, p.echo("hello\n"))
	found := false
	for _, node := range f.nodes {
		list, err := node.control.Conns(t.Context(), -1, control.ConnFilter{})
		check(t, err)
		for _, c := range list.Connections {
			found = found || c.Remote == p.LocalAddr().String()
		}
	}
	if !found {
		t.Errorf("no server lists the client %s", p.LocalAddr())
	}
}
