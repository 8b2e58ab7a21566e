package integration

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestDocumentedCommands runs the commands of docs/operations.md as an operator would, in six orders, under a real
// systemd and while clients connect. After each, the service listens where it should, and answers echod ctl.
func TestDocumentedCommands(t *testing.T) {
	slow(t)
	s := startSystemd(t, map[string]string{
		"echod.service":                       readFile(t, "../packaging/systemd/echod.service"),
		"echod.socket":                        readFile(t, "../packaging/systemd/echod.socket"),
		"echod-control.socket":                readFile(t, "../packaging/systemd/echod-control.socket"),
		"echod-control.socket.d/10-test.conf": "[Socket]\nSocketMode=0600\nSocketGroup=root\n",
		"echod.service.d/10-test.conf":        "[Service]\nEnvironment=ECHOD_GRACE=200ms GORACE=atexit_sleep_ms=0\n",
	})
	s.sh(t, "install -m 755 /run/test/echod /usr/bin/echod && mkdir -p /etc/default")
	docs := readFile(t, "../docs/operations.md")
	for order := range 6 {
		t.Run(fmt.Sprintf("order %d", order+1), func(t *testing.T) { s.testOrder(t, docs, uint64(order)) })
	}
}

// documented are the commands. before prepares one.
var documented = []struct {
	command string
	before  func(t *testing.T, s *systemd)
}{
	{"systemctl restart echod.socket echod.service", func(t *testing.T, s *systemd) {
		s.addr = "127.0.0.1:" + freePorts(t, 1)[0]
		s.write(t, "echod.socket.d/20-test.conf", "[Socket]\nListenStream=\nListenStream="+s.addr+"\n")
		s.ctl(t, "daemon-reload") // systemctl edit does
	}},
	{"systemctl enable echod-control.socket && systemctl restart echod.service", nil},
	{"echod serve --check --env-file /etc/default/echod && systemctl restart echod", func(t *testing.T, s *systemd) {
		s.sh(t, "echo ECHOD_MAX_CONNS=400 >/etc/default/echod")
	}},
	{"echod ctl set max-conns=500 idle-timeout=1m log-level=debug", nil},
	{"echod ctl set allow=10.0.0.0/8,192.0.2.7", nil},
	{"echod ctl set deny+=203.0.113.0/24", func(t *testing.T, s *systemd) { s.sh(t, "echod ctl set allow=") }},
	{"echod ctl kill --remote 203.0.113.0/24", nil},
	{"systemctl stop echod.socket echod.service", nil},
}

func (s *systemd) testOrder(t *testing.T, docs string, seed uint64) {
	s.addr = "127.0.0.1:" + freePorts(t, 1)[0]
	s.write(t, "echod.socket.d/20-test.conf", "[Socket]\nListenStream=\nListenStream="+s.addr+"\n")
	s.ctl(t, "daemon-reload")
	s.ctl(t, "start", "echod.socket", "echod.service")
	defer func() {
		s.ctl(t, "disable", "--now", "echod-control.socket")
		s.ctl(t, "stop", "echod.socket", "echod.service")
		s.sh(t, "rm -f /etc/default/echod")
	}()
	var clients sync.WaitGroup
	var mu sync.Mutex
	addr, stop := s.addr, make(chan struct{})
	defer clients.Wait()
	defer close(stop)
	clients.Go(func() {
		for ticks := time.NewTicker(5 * time.Millisecond); ; {
			select {
			case <-stop:
				ticks.Stop()
				return
			case <-ticks.C:
			}
			mu.Lock()
			at := addr
			mu.Unlock()
			if nc, err := net.Dial("tcp", at); err == nil {
				_ = nc.Close()
			}
		}
	})
	for _, i := range rand.New(rand.NewPCG(seed, 0)).Perm(len(documented)) {
		d := documented[i]
		for part := range strings.SplitSeq(d.command, " && ") {
			if !strings.Contains(docs, part) {
				t.Errorf("docs/operations.md does not have %q", part)
			}
		}
		if d.before != nil {
			d.before(t, s)
		}
		mu.Lock()
		addr = s.addr
		mu.Unlock()
		t.Log(d.command)
		s.sh(t, d.command)
		if strings.HasPrefix(d.command, "systemctl stop") {
			s.ctl(t, "start", "echod.socket", "echod.service")
		}
		if strings.Contains(d.command, "allow=10") {
			if r := run(t, s.command("echod", "ctl", "status")); r.code != 0 {
				t.Fatalf("status: %+v", r)
			}
			s.sh(t, "echod ctl set allow=") // or this test's client is denied
		}
		s.expectServing(t, d.command)
	}
}

// expectServing checks that the service listens at s.addr alone, and serves.
func (s *systemd) expectServing(t *testing.T, after string) {
	t.Helper()
	s.awaitProperty(t, "ActiveState", func(state string) bool { return state == "active" })
	r := run(t, s.command("echod", "ctl", "status"))
	if r.code != 0 || strings.Count(r.stdout, "listening") != 1 || !strings.Contains(r.stdout, " "+s.addr+",") {
		t.Fatalf("after %q it listens elsewhere than on %s: %+v", after, s.addr, r)
	}
	p := s.peer(t)
	check(t, p.Close())
}

// sh runs a shell command, and fails the test if it fails.
func (s *systemd) sh(t *testing.T, command string) {
	t.Helper()
	if r := run(t, s.command("sh", "-c", command)); r.code != 0 {
		t.Fatalf("%s: %+v", command, r)
	}
}
