package integration

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

// fleet is a load balancer in front of three servers, as the comment in an example of packaging/ starts them.
type fleet struct {
	t       *testing.T
	front   string            // where clients connect
	text    string            // the example
	replace *strings.Replacer // of the example's ports, files and names
	tls     bool              // clients speak TLS
	roots   *x509.CertPool
	ca      string // file
	program string // the servers' own copy, which an upgrade can replace
	flags   []string
	nodes   []*echod
	log     *journal
	stats   string // path of HAProxy's socket for commands
}

// fleetOptions says how a fleet differs from the example.
type fleetOptions struct {
	tls     bool // clients speak TLS
	servers bool // so do the servers, though the example starts them without
}

func startFleet(t *testing.T, example string, opts fleetOptions) *fleet {
	t.Helper()
	f := &fleet{
		t: t, tls: opts.tls, text: readFile(t, "../packaging/"+example), nodes: make([]*echod, 3), log: newJournal(),
		program: filepath.Join(shortDir(t), "echod"), stats: filepath.Join(shortDir(t), "s"),
	}
	copyFile(t, built(t, leanBinary), f.program)
	dir := t.TempDir()
	f.roots = certificate(t, dir, "echo")
	f.ca = filepath.Join(dir, "cert.pem")
	key, both := filepath.Join(dir, "key.pem"), filepath.Join(dir, "both.pem")
	check(t, os.WriteFile(both, []byte(readFile(t, f.ca)+readFile(t, key)), 0o600))
	pairs := []string{
		"/etc/echod/tls.crt", f.ca, "/etc/echod/tls.key", key,
		"/etc/haproxy/ca.crt", f.ca, "/etc/haproxy/haproxy.pem", both,
		"/etc/nginx/echo.crt", f.ca, "/etc/nginx/echo.key", key, "/etc/nginx/ca.crt", f.ca, "echo.example", "localhost",
	}
	free := freePorts(t, 10)
	for i, port := range []string{"9100", "9101", "9102", "9103", "9201", "9202", "9203", "9301", "9302", "9303"} {
		pairs = append(pairs, port, free[i])
	}
	f.replace, f.front = strings.NewReplacer(pairs...), "127.0.0.1:"+free[0]
	if opts.servers {
		f.text = strings.Replace(f.text, "--listen 127", "--listen tls://127", 1)
		f.flags = []string{"--tls-cert", f.ca, "--tls-key", key}
	}
	f.flags = append(f.flags, "--log-format", "json", "--upgrade-keep", "2s")
	for i := range f.nodes {
		f.startNode(i)
	}
	f.startBalancer(strings.HasPrefix(example, "nginx"))
	poll(t, "an echo through the load balancer", func() bool { return f.echo() == nil })
	return f
}

// startNode starts the i-th server with the command in the example's comment.
func (f *fleet) startNode(i int) {
	f.t.Helper()
	command := regexp.MustCompile(`(?s)\n# +echod (serve .*?) &\n`).FindStringSubmatch(f.text)
	if command == nil {
		f.t.Fatal("the example has no echod command")
	}
	line := strings.NewReplacer("\\\n#", "", "$n", fmt.Sprint(i+1)).Replace(command[1])
	args := append(strings.Fields(f.replace.Replace(line)), f.flags...)
	socket := filepath.Join(shortDir(f.t), "c")
	for k := range args {
		if args[k] == "--control" {
			args[k+1] = socket
		}
	}
	f.nodes[i] = launch(f.t, commandOf(append([]string{f.program}, args...)...), socket)
}

// startBalancer starts HAProxy or nginx with the example. HAProxy may not send a client that one server refuses to
// another: it has to take the server out of service before. nginx has no other way.
func (f *fleet) startBalancer(nginx bool) {
	f.t.Helper()
	path := filepath.Join(f.t.TempDir(), "config")
	config, argv, test := f.replace.Replace(f.text), []string(nil), []string(nil)
	if nginx {
		program := require(f.t, "nginx")
		const module = "/usr/lib/nginx/modules/ngx_stream_module.so"
		if _, err := os.Stat(module); err == nil {
			config = strings.Replace(config, "# load_module modules/ngx_stream_module.so;", "load_module "+module+";", 1)
		}
		argv = []string{program, "-e", "stderr", "-c", path, "-g", "daemon off; pid " + f.stats + ";"}
		test = append([]string{program, "-t", "-q"}, argv[1:]...)
	} else {
		program := haproxy.find(f.t)[0]
		for _, c := range []struct{ line, instead string }{
			{"\toption redispatch\n", "\tno option redispatch\n"},
			{"\tretries 3\n", "\tretries 0\n"},
			{"global\n", "global\n\tstats socket " + f.stats + " mode 600\n"},
		} {
			if !strings.Contains(config, c.line) {
				f.t.Fatalf("the example does not have %q", c.line)
			}
			config = strings.Replace(config, c.line, c.instead, 1)
		}
		argv = []string{program, "-db", "-f", path}
		test = []string{program, "-c", "-f", path}
	}
	check(f.t, os.WriteFile(path, []byte(config), 0o600))
	if out, err := exec.Command(test[0], test[1:]...).CombinedOutput(); err != nil {
		f.t.Fatalf("the configuration is rejected: %v\n%s", err, out)
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = f.log, f.log
	cmd.WaitDelay = patience
	check(f.t, cmd.Start())
	f.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // nginx's workers end with their master
		_ = cmd.Wait()
		if f.t.Failed() {
			f.t.Logf("log of the load balancer:\n%s", f.log)
		}
	})
}

// dial connects a client through the load balancer.
func (f *fleet) dial(limit time.Duration) (net.Conn, error) {
	c, err := net.DialTimeout("tcp", f.front, limit)
	if err != nil {
		return nil, err
	}
	if f.tls {
		c = tls.Client(c, &tls.Config{RootCAs: f.roots, ServerName: "localhost"})
	}
	return c, c.SetDeadline(time.Now().Add(limit))
}

// echo connects, expects an echo within a second, and leaves.
func (f *fleet) echo() error {
	c, err := f.dial(time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	return echoOn(c, "hello\n")
}

// echoOn sends text and reads its echo.
func echoOn(c net.Conn, text string) error {
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if n, err := io.ReadFull(c, got); string(got) != text {
		return fmt.Errorf("got %q (%w), want %q", got[:n], err, text)
	}
	return nil
}

// load starts a load that fails if a connect fails, or a connection ends without a notice.
func (f *fleet) load(args ...string) *loadRun {
	f.t.Helper()
	address := f.front
	if f.tls {
		address = "tls://" + address
		args = append(args, "--tls-ca", f.ca)
	}
	args = append(args, "--duration", "50s", "--json", "--max-refused", "0", "--max-disconnects", "0")
	return startLoad(f.t, address, args...)
}

// underLoad does something to one server after the other, while clients stay and others come and go. It returns what
// became of those that stay.
func (f *fleet) underLoad(what string, do func(i int)) loadResult {
	f.t.Helper()
	const staying = 20
	runs := []*loadRun{
		f.load("--conns", fmt.Sprint(staying), "--rate", "200"),
		f.load("--conns", "10", "--rate", "100", "--churn", "500ms"),
	}
	poll(f.t, "all clients", func() bool {
		open := 0
		for _, node := range f.nodes {
			open += node.status().Connections
		}
		return open >= staying
	})
	for i := range f.nodes {
		do(i)
	}
	results := make([]loadResult, len(runs))
	for i, l := range runs {
		check(f.t, l.cmd.Process.Signal(syscall.SIGINT))
		v := l.report(0)
		if v.Echoes.Sent == 0 || v.Echoes.Sent != v.Echoes.Returned || v.Connects.Tried != v.Connects.Made ||
			v.Notices.Heeded != v.Notices.Shutdown {
			f.t.Errorf("%s: %+v, %+v, %+v", what, v.Connects, v.Echoes, v.Notices)
		}
		f.t.Logf("%s: %d connects, %d failed; %d messages, %d lost; %d told, %d heeded; without service %+v",
			what, v.Connects.Tried, v.Connects.Tried-v.Connects.Made, v.Echoes.Sent, v.Echoes.Lost, v.Notices.Shutdown, v.Notices.Heeded, v.Outage)
		results[i] = v
	}
	return results[0]
}

// restart restarts the i-th server, and waits until it gets clients.
func (f *fleet) restart(i int) {
	f.t.Helper()
	f.nodes[i].signal(syscall.SIGTERM)
	f.nodes[i].wait(0)
	f.startNode(i)
	poll(f.t, "clients of the restarted server", func() bool { return f.nodes[i].status().Accepted >= 3 })
}

// upgrade replaces the i-th server's program.
func (f *fleet) upgrade(i int) {
	f.t.Helper()
	node := f.nodes[i]
	before := node.status()
	copyFile(f.t, built(f.t, leanBinary), f.program)
	if got := node.ctl("upgrade"); got.code != 0 {
		f.t.Fatalf("upgrade: %+v", got)
	}
	node.control.Close() // a connection that is kept alive still leads to the predecessor
	after := node.status()
	if after.PID == before.PID {
		f.t.Errorf("process %d still serves", after.PID)
	}
	if f.tls {
		node.awaitLog("drained") // the connections that stayed with the predecessor have left
	}
	// HAProxy gives a server that has most of the lasting clients no new ones.
	poll(f.t, "clients of the upgraded server", func() bool { return node.status().BytesIn > after.BytesIn })
}

// arrived returns how many clients the servers have got: accepted, or in the accept queue.
func (f *fleet) arrived() (n int) {
	f.t.Helper()
	for _, node := range f.nodes {
		st := node.status()
		n += int(st.Accepted) + node.queued(st)
	}
	return n
}

// pauseAll pauses all servers. Clients that come then wait, for longer than the load balancer's timeout for a
// connect, and are served on resume.
func (f *fleet) pauseAll(nginx bool) {
	f.t.Helper()
	before := f.arrived()
	for _, node := range f.nodes {
		node.pause(control.PauseRequest{Reason: "fleet"})
	}
	if !nginx {
		poll(f.t, "the load balancer to see the pause", func() bool {
			return strings.Contains(f.log.String(), "echods has no server available")
		})
	}
	const clients = 6
	waiting := make(chan error, clients)
	for range clients {
		go func() {
			c, err := f.dial(patience)
			if err == nil {
				err = echoOn(c, "hello\n")
				_ = c.Close()
			}
			waiting <- err
		}()
	}
	poll(f.t, "the clients to arrive", func() bool { return f.arrived() == before+clients })
	select {
	case err := <-waiting:
		f.t.Errorf("a client did not wait: %v", err)
		waiting <- err
	case <-time.After(2500 * time.Millisecond): // the examples' timeout for a connect is 2 s
	}
	for _, node := range f.nodes {
		_, err := node.control.Resume(within(f.t, patience))
		check(f.t, err)
	}
	for range clients {
		if err := <-waiting; err != nil {
			f.t.Errorf("a client that waited: %v", err)
		}
	}
}

// without takes a server out of service, and expects that HAProxy sends new clients to the others.
func (f *fleet) without(what string, out func(node *echod)) {
	f.t.Helper()
	out(f.nodes[0])
	poll(f.t, "clients only at the servers that are not "+what, func() bool {
		for range 2 * len(f.nodes) {
			if f.echo() != nil {
				return false
			}
		}
		return true
	})
}

// expectDrained checks that HAProxy shows the first server as drained by its agent, and not as down.
func (f *fleet) expectDrained() {
	f.t.Helper()
	c, err := net.Dial("unix", f.stats)
	check(f.t, err)
	defer c.Close()
	_, err = io.WriteString(c, "show stat\n")
	check(f.t, err)
	text, err := io.ReadAll(c)
	check(f.t, err)
	if !regexp.MustCompile(`(?m)^echods,echod1,.*,DRAIN \(agent\),`).Match(text) {
		f.t.Errorf("HAProxy does not show the paused server as drained:\n%s", text)
	}
}

// TestFleet runs the examples of packaging/ for HAProxy and nginx: three servers behind each. Rolling restarts and
// upgrades fail no connect and lose no message. Clients of paused servers wait.
func TestFleet(t *testing.T) {
	slow(t)
	for name, c := range map[string]struct {
		example string
		fleetOptions
	}{
		"HAProxy":                    {"haproxy/haproxy.cfg", fleetOptions{}},
		"HAProxy with agent checks":  {"haproxy/haproxy-agent.cfg", fleetOptions{}},
		"HAProxy passes TLS through": {"haproxy/haproxy.cfg", fleetOptions{tls: true, servers: true}},
		"HAProxy encrypts TLS again": {"haproxy/haproxy-tls.cfg", fleetOptions{tls: true}},
		"nginx":                      {"nginx/nginx.conf", fleetOptions{}},
		"nginx passes TLS through":   {"nginx/nginx.conf", fleetOptions{tls: true, servers: true}},
		"nginx encrypts TLS again":   {"nginx/nginx-tls.conf", fleetOptions{tls: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := startFleet(t, c.example, c.fleetOptions)
			defer killAll(t, f.program) // before the cleanup, which waits until no process has the servers' stderr
			nginx := strings.HasPrefix(c.example, "nginx")
			if got := f.underLoad("restart", f.restart); got.Notices.Heeded == 0 {
				t.Error("no client was told of a restart")
			}
			if got := f.underLoad("upgrade", f.upgrade); got.Notices.Shutdown != 0 && !c.tls {
				t.Errorf("clients were told %d times of an upgrade, which is not theirs to see", got.Notices.Shutdown)
			}
			f.pauseAll(nginx)
			if nginx {
				return // it sends clients to servers that are paused or hang, too
			}
			f.without("paused", func(node *echod) { node.pause(control.PauseRequest{Reason: "fleet"}) })
			if strings.Contains(c.example, "agent") {
				f.expectDrained()
			}
			_, err := f.nodes[0].control.Resume(within(t, patience))
			check(t, err)
			f.without("frozen", func(node *echod) { check(t, syscall.Kill(node.status().PID, syscall.SIGSTOP)) })
		})
	}
}
