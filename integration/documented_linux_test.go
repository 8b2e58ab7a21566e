package integration

import (
	"fmt"
	"math/rand/v2"
	"net"
	"regexp"
	"slices"
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
	t.Run("quick answers", func(t *testing.T) { s.testQuickAnswers(t, docs) })
	t.Run("the address changes in every state of the units", s.testChangeOfAddress)
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
	{"systemctl enable --now echod.socket echod.service", nil},
	{"systemctl reload echod", func(t *testing.T, s *systemd) { s.sh(t, "echo ECHOD_MAX_CONNS=300 >/etc/default/echod") }},
	{"echod ctl upgrade", nil},
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

// answers are the questions of docs/operations.md, in an order in which an operator could ask them. Each command
// succeeds, and its output matches the pattern.
var answers = []struct{ prepare, command, pattern string }{
	{"", "echod serve --check --env-file /etc/default/echod", `(?m)^the configuration is valid: .*ECHOD_DRAIN_DELAY`},
	{"", "echod ctl set max-conns=500", `(?m)^max-conns: \d+ -> 500$`},
	{"", "echod ctl settings", `(?m)^max-conns +500 +\d+ +with ctl set$(.|\n)*^listen +127\.0\.0\.1:\d+ \(systemd\) `},
	{"echod ctl set allow=127.0.0.0/8", "echod ctl set allow=10.0.0.0/8,192.0.2.7", `allow: 127.0.0.0/8 -> 10.0.0.0/8,192.0.2.7/32`},
	{"echod ctl set allow=", "echod ctl clients", `(?m)^127\.0\.0\.1 +2 `},
	{"", "echod ctl conns --sort idle --limit 20", `(?m)^\d+ +127\.0\.0\.1:\d+ +serving `},
	{"", "echod ctl kill --remote 203.0.113.0/24", `killed 0 connections`},
	{"", "echod ctl closed", `REASON`},
	{"echod ctl pause --reason backup --ttl 1h", "echod ctl status", `(?m)^hold +h1, "backup", .*expires in (1h|59m).*, by root \(uid 0, pid \d+\)$`},
	{"echod ping -W 50ms $ADDR; true", "echod ctl resume", `released 1 hold`},
	{"", "echod ctl status", `(?m)^a drain +would take .* at most: 1m0s delay, `},
	{"", "echod ctl pause --evict --spread 30s --grace 1m", `evicts clients within 30s with 1m0s grace`},
	{"sleep 0.1; echod ctl resume", "echod ctl shutdown --spread 30s --grace 1m", `draining, 2m30s left`},
	{"", "echod ctl status", `(?m)^drain +control, .* left, `},
	{"", "echod ctl shutdown --cancel", `cancelled: the server is running`},
	{"echod ctl set drain-delay=0 && echod ctl shutdown --grace 1m", "echod ctl conns", `(?m)CLOSES IN +BECAUSE\n.* 59\.\ds +control`},
	{"", "echod ctl shutdown --extend 30s", `draining, .* left: extended by .* only, because the supervisor would kill`},
}

// testQuickAnswers asks the questions of docs/operations.md that echod answers.
func (s *systemd) testQuickAnswers(t *testing.T, docs string) {
	_, table, found := strings.Cut(docs, "\n## Quick answers\n")
	table, _, _ = strings.Cut(table, "\n## ")
	if !found {
		t.Fatal("docs/operations.md has no quick answers")
	}
	for _, m := range regexp.MustCompile("`(echod (?:ctl|serve) [^`]+)`").FindAllStringSubmatch(table, -1) {
		if !slices.ContainsFunc(answers, func(a struct{ prepare, command, pattern string }) bool { return a.command == m[1] }) {
			t.Errorf("the test does not run %q", m[1])
		}
	}
	s.sh(t, "echo ECHOD_DRAIN_DELAY=1m >/etc/default/echod; systemctl stop echod.socket echod.service")
	s.ctl(t, "start", "echod.socket", "echod.service")
	defer s.sh(t, "systemctl stop echod.socket echod.service; rm /etc/default/echod")
	s.peer(t)
	s.peer(t)
	for _, a := range answers {
		if !strings.Contains(table, "`"+a.command+"`") {
			t.Errorf("the quick answers do not have %q", a.command)
		}
		if a.prepare != "" {
			s.sh(t, strings.ReplaceAll(a.prepare, "$ADDR", s.addr))
		}
		r := run(t, s.command("sh", "-c", a.command))
		t.Logf("$ %s\n%s%s", a.command, r.stdout, r.stderr)
		if r.code != 0 || !regexp.MustCompile(a.pattern).MatchString(r.stdout) {
			t.Errorf("%s: exit code %d, want output like %s", a.command, r.code, a.pattern)
		}
	}
	s.sh(t, "echod ctl shutdown --now")
}

// testChangeOfAddress changes the address of echod.socket as documented, from each state that the units can be in. A
// restart of the socket alone does as well.
func (s *systemd) testChangeOfAddress(t *testing.T) {
	for _, state := range []struct{ name, prepare string }{
		{"all stopped", "true"},
		{"only the socket runs", "systemctl start echod.socket"},
		{"all run", "systemctl start echod.socket echod.service"},
		{"all enabled, and stopped", "systemctl enable echod.socket echod.service"},
		{"a client has started the service", "systemctl start echod.socket && systemctl start echod.service"},
		{"the control socket runs too", "systemctl enable --now echod-control.socket && systemctl restart echod.service"},
		{"only the control socket runs", "systemctl start echod-control.socket"},
	} {
		for _, command := range []string{"systemctl restart echod.socket echod.service", "systemctl restart echod.socket"} {
			s.sh(t, "systemctl disable --now echod-control.socket echod.socket echod.service && "+state.prepare)
			s.addr = "127.0.0.1:" + freePorts(t, 1)[0]
			s.write(t, "echod.socket.d/20-test.conf", "[Socket]\nListenStream=\nListenStream="+s.addr+"\n")
			s.ctl(t, "daemon-reload")
			s.sh(t, command)
			check(t, s.peer(t).Close()) // starts the service, if the command has not
			s.expectServing(t, command+", "+state.name)
		}
	}
	s.sh(t, "systemctl disable --now echod-control.socket echod.socket echod.service")
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
