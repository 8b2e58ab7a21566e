package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// A server is a program that clients connect to.
type server struct {
	name    string
	program string // in binaries
	about   string // how it is configured, and by which advice
	proxy   bool   // it is in front of an echo server that is never restarted
	master  bool   // its first process stays through a reload, and only manages workers
	start   func(*site) error
}

// A rollout is one case: what happens to a server under load.
type rollout struct {
	server  *server
	what    string
	why     string // what explains the outcome
	tls     bool
	ignores bool          // the clients ignore notices
	churn   time.Duration // after which clients connect anew; 0: never
	act     func(*site) error
	run     func(*site) (outcome, error) // in place of the load, for another protocol
}

func (c rollout) clients() string {
	switch {
	case c.run != nil:
		return "NATS"
	case c.ignores && c.tls:
		return "TLS, ignore notices"
	case c.ignores:
		return "ignore notices"
	case c.tls:
		return "TLS"
	case c.churn != 0:
		return fmt.Sprintf("connect anew every %v", c.churn)
	}
	return ""
}

func (c rollout) name() string {
	if c.clients() == "" {
		return c.server.name + ", " + c.what
	}
	return c.server.name + ", " + c.what + " (" + c.clients() + ")"
}

var (
	echod = &server{
		name: "echod", program: "echod", start: startEchod,
		about: "`--grace 5s`, otherwise its defaults.",
	}
	echodSocket = &server{
		name: "echod, socket activation", program: "echod", start: startEchodActivated,
		about: "The same, with a listener that the parent process keeps open, as systemd does for `echod.socket`.",
	}
	nginx = &server{
		name: "nginx stream", program: "nginx", proxy: true, master: true, start: startNginx(""),
		about: "A stream proxy in front of an echo server that runs all the time. Default settings: an old worker stays until " +
			"its last client leaves. A restart is what Debian's unit does: SIGQUIT, after 5 s SIGTERM, and a new start.",
	}
	nginxBounded = &server{
		name: "nginx stream, worker_shutdown_timeout 5s", program: "nginx", proxy: true, master: true,
		start: startNginx("worker_shutdown_timeout 5s;"),
		about: "The same, with the directive that closes the connections of old workers after a time.",
	}
	haproxy = &server{
		name: "HAProxy", program: "haproxy", proxy: true, start: startHAProxy(""),
		about: "A TCP proxy in front of the same echo server, in master-worker mode with `expose-fd listeners`, as its " +
			"management guide advises for reloads. A restart is what Debian's unit does: SIGTERM, and a new start.",
	}
	haproxyBounded = &server{
		name: "HAProxy, hard-stop-after 5s", program: "haproxy", proxy: true, start: startHAProxy("hard-stop-after 5s"),
		about: "It is configured as above, and with the setting that its documentation recommends for old processes that do not exit.",
	}
	tableflip = &server{
		name: "tableflip", program: "tableflip",
		start: func(s *site) error { return s.serve("tableflip", s.address) },
		about: "An echo server on cloudflare/tableflip, written as its README shows. SIGHUP upgrades; the old process waits up " +
			"to 5 s for its connections.",
	}
	netDrain = &server{
		name: "net, drain by hand", program: "netdrain",
		start: func(s *site) error { return s.serve("netdrain", s.address) },
		about: "An echo server on package net. On SIGTERM it closes the listener, and waits up to 5 s for its connections.",
	}
	python = &server{
		name: "Python ThreadingTCPServer", program: "python3",
		start: func(s *site) error { return s.serve("python3", "peers/python/server.py", s.address) },
		about: "The example of the module socketserver, with a larger accept queue. It handles no signals.",
	}
	nats = &server{
		name: "nats-server", program: "nats-server", start: startNATS,
		about: "Its clients speak its own protocol, send a PING every 100 ms, and stay when told. `lame_duck_duration: 30s` " +
			"is the shortest that it allows; `lame_duck_grace_period: 5s`.",
	}
)

var cases = []rollout{
	{
		server: echod, what: "upgrade", act: ctl("upgrade"),
		why: "The old process hands each connection to the new one, in the middle of its stream (docs/design.md).",
	},
	{
		server: echod, what: "upgrade", tls: true, act: ctl("upgrade"),
		why: "A TLS session cannot be handed over. The old process keeps these clients for `--upgrade-keep`, then tells them.",
	},
	{
		server: echod, what: "restart", act: restart(syscall.SIGTERM, 2*grace),
		why: "Clients are told, wait for messages in flight, and connect to the new process. Until it listens, connects are refused.",
	},
	{
		server: echod, what: "restart", ignores: true, act: restart(syscall.SIGTERM, 2*grace),
		why: "The server closes clients that stay at the end of the grace period, after it has echoed everything.",
	},
	{
		server: echodSocket, what: "restart", act: restart(syscall.SIGTERM, 2*grace),
		why: "The listener outlives the process, so new connections wait in its accept queue.",
	},
	{
		server: echodSocket, what: "restart", ignores: true, act: restart(syscall.SIGTERM, 2*grace),
		why: "As above. The server closes clients that ignore the notice at the end of the grace period.",
	},
	{
		server: nginx, what: "reload", act: signalled(syscall.SIGHUP),
		why: "The old worker keeps its connections, with the old code and settings, until the last client leaves.",
	},
	{
		server: nginx, what: "reload", tls: true, act: signalled(syscall.SIGHUP), why: "The same.",
	},
	{
		server: nginxBounded, what: "reload", act: signalled(syscall.SIGHUP),
		why: "After the timeout the old worker closes its connections. Clients are not told.",
	},
	{
		server: nginx, what: "restart", act: func(s *site) error {
			if err := s.signal(syscall.SIGQUIT, 0); err != nil {
				return err
			}
			wait(s.ctx, grace)
			return restart(syscall.SIGTERM, grace)(s)
		},
		why: "After SIGQUIT, nginx closes the listener and waits for its clients, but does not tell them. SIGTERM then ends their connections.",
	},
	{
		server: haproxy, what: "reload", act: signalled(syscall.SIGUSR2),
		why: "The new worker takes the listener. The old one keeps its connections until the last client leaves.",
	},
	{server: haproxy, what: "reload", tls: true, act: signalled(syscall.SIGUSR2), why: "The same."},
	{
		server: haproxyBounded, what: "reload", act: signalled(syscall.SIGUSR2),
		why: "After the time the old worker closes its connections. Clients are not told.",
	},
	{
		server: haproxy, what: "restart", act: restart(syscall.SIGTERM, grace),
		why: "SIGTERM ends the process at once.",
	},
	{
		server: tableflip, what: "upgrade", act: signalled(syscall.SIGHUP),
		why: "The listener is passed to the new process. Connections are not: they end with the old process.",
	},
	{
		server: netDrain, what: "restart", act: restart(syscall.SIGTERM, 2*grace),
		why: "Nothing tells the clients, so they stay until the process exits. Until the new process starts, nothing listens.",
	},
	{
		server: python, what: "restart", act: restart(syscall.SIGTERM, grace),
		why: "The default action of SIGTERM ends the process.",
	},
	{
		server: nats, what: "lame duck mode", run: lameDuck,
		why: "An INFO message tells the clients. After the grace period the server closes them at random times within the duration.",
	},
	{
		server: echod, what: "pause of 2 s", churn: 2 * time.Second, act: func(s *site) error {
			if err := ctl("pause", "--reason", "comparison")(s); err != nil {
				return err
			}
			wait(s.ctx, 2*time.Second)
			return ctl("resume")(s)
		},
		why: "New clients wait in the accept queue. On resume they are served, oldest first.",
	},
	{
		server: haproxy, what: "pause of 2 s", churn: 2 * time.Second, act: func(s *site) error {
			if err := haproxyCommand(s, "disable frontend f"); err != nil {
				return err
			}
			wait(s.ctx, 2*time.Second)
			return haproxyCommand(s, "enable frontend f")
		},
		why: "`disable frontend` stops listening, so new clients are refused.",
	},
	{server: echod, what: "kill and start", act: restart(syscall.SIGKILL, grace), why: "The kernel ends all connections at once: with an RST if the server had not read all data, otherwise with a FIN."},
	{server: nginx, what: "kill and start", act: killAll, why: "The same."},
	{server: haproxy, what: "kill and start", act: killAll, why: "The same."},
	{server: netDrain, what: "kill and start", act: restart(syscall.SIGKILL, grace), why: "The same."},
}

// haproxyCommand sends a command to HAProxy's runtime API.
func haproxyCommand(s *site, command string) error {
	c, err := net.Dial("unix", s.path("h"))
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, command+"\n"); err != nil {
		return err
	}
	answer, err := io.ReadAll(c)
	if err == nil && strings.TrimSpace(string(answer)) != "" {
		err = fmt.Errorf("HAProxy answers %q to %q", answer, command)
	}
	return err
}

// signalled sends a signal to the server.
func signalled(sig syscall.Signal) func(*site) error {
	return func(s *site) error { return s.signal(sig, 0) }
}

// restart ends the server by a signal, kills it if it has not ended after a time, and starts it again.
func restart(sig syscall.Signal, wait time.Duration) func(*site) error {
	return func(s *site) error {
		if err := s.signal(sig, wait); err != nil {
			return err
		}
		return s.startAgain()
	}
}

// killAll kills the server with its workers, and starts it again.
func killAll(s *site) error {
	for _, pid := range s.pids() {
		if pid != s.procs[0].cmd.Process.Pid { // the echo server behind it
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	<-s.server.ended
	return s.startAgain()
}

// startAgain starts the server again, with the same arguments.
func (s *site) startAgain() error {
	old := s.server.cmd
	cmd := exec.Command(old.Path, old.Args[1:]...)
	cmd.Env, cmd.ExtraFiles = old.Env, old.ExtraFiles
	p, err := s.spawn(cmd)
	if err != nil {
		return err
	}
	s.server = p
	return s.await(p)
}

func echodArgs(s *site) []string {
	args := []string{"serve", "--control", s.path("c"), "--grace", grace.String()}
	if s.tls {
		return append(args, "--listen", "tls://"+s.address, "--tls-cert", s.path("cert.pem"), "--tls-key", s.path("key.pem"))
	}
	return append(args, "--listen", s.address)
}

func startEchod(s *site) error { return s.serve("echod", echodArgs(s)...) }

// listen returns the file of a listener.
func listen(address string) (*os.File, error) {
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	return ln.(*net.TCPListener).File()
}

// startEchodActivated passes a listener to echod, as systemd does (sd_listen_fds(3)). The shell sets LISTEN_PID.
func startEchodActivated(s *site) error {
	ln, err := listen(s.address)
	if err != nil {
		return err
	}
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, s.bin["echod"], "serve", "--control", s.path("c"),
		"--grace", grace.String())
	cmd.Env = append(os.Environ(), "LISTEN_FDS=1", "LISTEN_FDNAMES=echo")
	cmd.ExtraFiles = []*os.File{ln}
	p, err := s.spawn(cmd)
	if err != nil {
		return err
	}
	s.server = p
	return s.await(p)
}

// ctl runs echod ctl.
func ctl(args ...string) func(*site) error {
	return func(s *site) error {
		return s.run("echod", append([]string{"ctl", "--control", s.path("c")}, args...)...)
	}
}

func startNginx(settings string) func(*site) error {
	return func(s *site) error {
		ssl, certificate := "", ""
		if s.tls {
			ssl = " ssl"
			certificate = fmt.Sprintf("ssl_certificate %s; ssl_certificate_key %s;", s.path("cert.pem"), s.path("key.pem"))
		}
		config := fmt.Sprintf(`load_module /usr/lib/nginx/modules/ngx_stream_module.so;
user root;
daemon off;
pid %[1]s/nginx.pid;
error_log %[1]s/error.log;
%[2]s
events { worker_connections 1024; }
stream { server { listen %[3]s%[4]s; %[5]s proxy_pass %[6]s; } }
`, s.dir, settings, s.address, ssl, certificate, s.backend)
		if err := os.WriteFile(s.path("nginx.conf"), []byte(config), 0o644); err != nil {
			return err
		}
		return s.serve("nginx", "-p", s.dir, "-c", s.path("nginx.conf"))
	}
}

func startHAProxy(settings string) func(*site) error {
	return func(s *site) error {
		ssl := ""
		if s.tls {
			ssl = " ssl crt " + s.path("both.pem")
		}
		config := fmt.Sprintf(`global
	stats socket %[1]s/h level admin expose-fd listeners
	%[2]s
defaults
	mode tcp
	timeout connect 5s
	timeout client 1m
	timeout server 1m
frontend f
	bind %[3]s%[4]s
	default_backend b
backend b
	server s %[5]s
`, s.dir, settings, s.address, ssl, s.backend)
		if err := os.WriteFile(s.path("haproxy.cfg"), []byte(config), 0o644); err != nil {
			return err
		}
		return s.serve("haproxy", "-Ws", "-f", s.path("haproxy.cfg"))
	}
}
