package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// patience bounds the wait for a server to start or to answer.
const patience = 15 * time.Second

// binaries are the paths of programs by their name; empty if one is not installed.
type binaries map[string]string

// buildAll builds our own programs, and finds the others.
func buildAll(ctx context.Context, dir string) (binaries, error) {
	bin := binaries{}
	for name, pkg := range map[string]string{
		"echod": "../cmd/echod", "tableflip": "./peers/tableflip", "netdrain": "./peers/netdrain", "backend": "./peers/netcopy",
	} {
		bin[name] = filepath.Join(dir, name)
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", bin[name], pkg)
		if strings.HasPrefix(pkg, "../") {
			cmd.Dir, cmd.Args[len(cmd.Args)-1] = "..", "./"+pkg[len("../"):]
		}
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("building %s: %w\n%s", name, err, out)
		}
	}
	for _, name := range []string{"nginx", "haproxy", "nats-server", "python3", "openssl"} {
		bin[name], _ = exec.LookPath(name) // empty: not installed
	}
	return bin, nil
}

// site is where one case runs: a directory, addresses, and the processes that the case has started.
type site struct {
	ctx     context.Context
	dir     string
	bin     binaries
	address string // of the server
	backend string // of the echo server behind a proxy
	tls     bool
	procs   []*process
	server  *process // the one that was started last
}

type process struct {
	cmd    *exec.Cmd
	output bytes.Buffer
	ended  chan struct{} // closed when it has ended
}

func newSite(ctx context.Context, bin binaries, dir string, tls bool) (*site, error) {
	s := &site{ctx: ctx, dir: dir, bin: bin, tls: tls}
	for _, address := range []*string{&s.address, &s.backend} {
		ln, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		*address = ln.Addr().String()
		_ = ln.Close()
	}
	if !tls {
		return s, nil
	}
	cmd := exec.CommandContext(ctx, bin["openssl"], "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
		"-nodes", "-days", "2", "-subj", "/CN=localhost", "-keyout", s.path("key.pem"), "-out", s.path("cert.pem"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("making a certificate: %w\n%s", err, out)
	}
	both := append(s.read("cert.pem"), s.read("key.pem")...)
	return s, os.WriteFile(s.path("both.pem"), both, 0o600)
}

func (s *site) path(name string) string { return filepath.Join(s.dir, name) }

func (s *site) read(name string) []byte {
	b, _ := os.ReadFile(s.path(name)) // a missing file fails where it is used
	return b
}

func (s *site) port() string {
	_, port, _ := net.SplitHostPort(s.address)
	return port
}

// spawn starts a program. Its output is kept for errors.
func (s *site) spawn(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, ended: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.output, &p.output
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go func() { // ends with the process; close waits for it
		_ = cmd.Wait()
		close(p.ended)
	}()
	s.procs = append(s.procs, p)
	return p, nil
}

// serve starts the server, and waits until it answers.
func (s *site) serve(program string, args ...string) error {
	p, err := s.spawn(exec.Command(s.bin[program], args...))
	if err != nil {
		return err
	}
	s.server = p
	return s.await(p)
}

// await waits until the address accepts connections.
func (s *site) await(p *process) error {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) { // there is nothing to wait on in another process
		c, err := net.Dial("tcp", s.address)
		if err == nil {
			return c.Close()
		}
		select {
		case <-p.ended:
			return fmt.Errorf("%s ended: %s", filepath.Base(p.cmd.Path), p.output.String())
		default:
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s does not answer: %w", filepath.Base(p.cmd.Path), err)
		}
	}
}

// signal sends a signal to the server, and returns once it has ended if wait is not 0; after that time it is killed.
func (s *site) signal(sig syscall.Signal, wait time.Duration) error {
	p := s.server
	if err := p.cmd.Process.Signal(sig); err != nil {
		return err
	}
	if wait == 0 {
		return nil
	}
	select {
	case <-p.ended:
	case <-time.After(wait):
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
	return nil
}

// run runs a command to its end.
func (s *site) run(program string, args ...string) error {
	out, err := exec.CommandContext(s.ctx, s.bin[program], args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w\n%s", program, strings.Join(args, " "), err, out)
	}
	return nil
}

// close ends all processes with their descendants.
func (s *site) close() {
	for _, pid := range s.pids() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, p := range s.procs {
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// pids returns the running processes of the server and their descendants. A successor whose parent has ended is found by
// its arguments, which contain the case's directory or address.
func (s *site) pids() (pids []int) {
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		args, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || len(args) == 0 {
			continue // it has ended
		}
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if s.owns(pid, string(args)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

func (s *site) owns(pid int, args string) bool {
	if pid == os.Getpid() || strings.Contains(args, "\x00load\x00") {
		return false
	}
	if strings.Contains(args, s.dir) || strings.Contains(args, s.address) {
		return true
	}
	parent := parentOf(pid) // nginx's workers have a title in place of arguments
	return slices.ContainsFunc(s.procs, func(p *process) bool { return p.cmd.Process.Pid == parent })
}

func parentOf(pid int) int {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 2 {
		return 0
	}
	parent, _ := strconv.Atoi(fields[1])
	return parent
}

// outcome is what the clients saw, and when no old process was left.
type outcome struct {
	Connections int64 // made
	Closed      int64 // by the server, without a notice
	Told        int64 // by a notice
	Reset       int64
	Refused     int64 // attempts to connect that were refused, reset or timed out
	Lost        int64 // messages that were sent and did not come back
	Gap         float64
	OldGone     float64 // seconds; negative: not before the clients had gone
	Failed      string  // why the operation failed
}

// loadReport is the part of load's report that the comparison needs.
type loadReport struct {
	Connects struct {
		Made, Refused, Reset, Failed int64
		TimedOut                     int64 `json:"timed_out"`
		NoHandshake                  int64 `json:"no_handshake"`
	}
	Echoes  struct{ Lost int64 }
	Notices struct{ Shutdown int64 }
	Ends    struct{ Closed, Reset, Failed int64 }
	Outage  struct {
		Max float64 `json:"max_seconds"`
	} `json:"without_service"`
	Latency struct {
		Max float64 `json:"max_seconds"`
	} `json:"echo_latency"`
}

// runCase starts the server and the load, operates on the server, and waits for the load.
func runCase(ctx context.Context, c rollout, bin binaries, dir string) (outcome, error) {
	s, err := newSite(ctx, bin, dir, c.tls)
	if err != nil {
		return outcome{}, err
	}
	defer s.close()
	if c.server.proxy {
		if _, err := s.spawn(exec.Command(bin["backend"], s.backend)); err != nil {
			return outcome{}, err
		}
	}
	if err := c.server.start(s); err != nil {
		return outcome{}, err
	}
	if c.run != nil {
		return c.run(s)
	}
	old := slices.DeleteFunc(s.pids(), func(pid int) bool {
		return c.server.proxy && pid == s.procs[0].cmd.Process.Pid || c.server.master && pid == s.server.cmd.Process.Pid
	})

	args := []string{
		"load", "--json", "--conns", strconv.Itoa(clients), "--rate", strconv.Itoa(rate), "--duration", lasts.String(),
		"--drain-wait", "2s", "--timeout", "2s", "--late", "10s",
	}
	if c.tls {
		args = append(args, "--address", "tls://"+s.address, "--tls-ca", s.path("cert.pem"), "--tls-insecure")
		args = slices.DeleteFunc(args, func(a string) bool { return a == "--tls-ca" || a == s.path("cert.pem") })
	} else {
		args = append(args, "--address", s.address)
	}
	if c.ignores {
		args = append(args, "--ignore-notices")
	}
	if c.churn != 0 {
		args = append(args, "--churn", c.churn.String())
	}
	load := exec.Command(bin["echod"], args...)
	var stdout, stderr bytes.Buffer
	load.Stdout, load.Stderr = &stdout, &stderr
	if err := load.Start(); err != nil {
		return outcome{}, err
	}
	began := time.Now()
	loaded := make(chan struct{})
	go func() { // ends with the load, which is bounded in time
		_ = load.Wait() // exit code 1 says that messages were lost
		close(loaded)
	}()
	defer func() {
		_ = load.Process.Kill()
		<-loaded
	}()

	wait(ctx, time.Until(began.Add(actAfter)))
	var o outcome
	acted := time.Now()
	if err := c.act(s); err != nil {
		o.Failed = err.Error()
	}
	o.OldGone = -1
	for done := c.churn != 0; !done; { // a pause has no old code
		if !s.serves(old) {
			o.OldGone = time.Since(acted).Seconds()
			break
		}
		select {
		case <-loaded:
			done = true
		case <-time.After(10 * time.Millisecond): // to look again
		}
	}
	select {
	case <-loaded:
	case <-time.After(lasts + patience):
		return outcome{}, errors.New("the load does not end")
	}
	if acted.Add(time.Duration(o.OldGone * float64(time.Second))).After(began.Add(lasts - 100*time.Millisecond)) {
		o.OldGone = -1 // the clients went first
	}
	var r loadReport
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		return outcome{}, fmt.Errorf("reading the load's report: %w\n%s", err, stderr.String())
	}
	o.Connections = r.Connects.Made
	o.Closed, o.Reset = r.Ends.Closed, r.Ends.Reset+r.Ends.Failed
	o.Told = r.Notices.Shutdown
	o.Refused = r.Connects.Refused + r.Connects.Reset + r.Connects.TimedOut + r.Connects.Failed + r.Connects.NoHandshake
	o.Lost, o.Gap = r.Echoes.Lost, max(r.Outage.Max, r.Latency.Max)
	return o, ctx.Err()
}

// serves reports whether one of the processes has a socket of the server's address open (proc_pid_net(5), proc_pid_fd(5)).
func (s *site) serves(pids []int) bool {
	table, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		return true
	}
	port, _ := strconv.Atoi(s.port())
	local := fmt.Sprintf(":%04X", port)
	sockets := map[string]bool{}
	for line := range strings.Lines(string(table)) {
		if fields := strings.Fields(line); len(fields) > 9 && strings.HasSuffix(fields[1], local) {
			sockets["socket:["+fields[9]+"]"] = true
		}
	}
	for _, pid := range pids {
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // empty if it has ended
		for _, file := range files {
			if to, err := os.Readlink(file); err == nil && sockets[to] {
				return true
			}
		}
	}
	return false
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
