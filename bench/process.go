package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"echod/bench/load"
)

// A process is a running contender.
type process struct {
	cmd     *exec.Cmd
	exited  chan error
	stderr  *os.File
	address string
	dir     string   // private
	behind  *process // the server behind this one; nil: none
}

// serverTimeout bounds how long a server takes to listen, and to stop.
const serverTimeout = 5 * time.Second

// start runs b on the given CPUs, and returns once it accepts connections.
func start(ctx context.Context, b built, on cpus) (*process, error) {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return nil, err
	}
	p := &process{dir: dir, exited: make(chan error, 1)}
	if err := p.launch(ctx, b, on); err != nil {
		p.stderr.Close() // may be nil
		if p.behind != nil {
			err = errors.Join(err, p.behind.stop())
		}
		os.RemoveAll(dir)
		return nil, fmt.Errorf("starting %s: %w", b.Name, err)
	}
	if err := p.awaitListening(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting %s: %w", b.Name, err), p.stop())
	}
	return p, nil
}

func (p *process) launch(ctx context.Context, b built, on cpus) (err error) {
	if p.address, err = freeAddress(ctx); err != nil {
		return err
	}
	if p.stderr, err = os.Create(filepath.Join(p.dir, "stderr")); err != nil {
		return err
	}
	if err := writeCertificate(certFiles(p.dir)); err != nil {
		return err
	}
	if b.config != nil {
		plain := b
		plain.contender, plain.command = contenders[0], b.behind
		if p.behind, err = start(ctx, plain, on); err != nil {
			return err
		}
		text := b.config(p.address, p.dir, p.behind.address)
		if err := os.WriteFile(filepath.Join(p.dir, "config"), []byte(text), 0o600); err != nil {
			return err
		}
	}
	args := []string{p.address}
	if b.args != nil {
		args = b.args(p.address, p.dir)
	}
	p.cmd = exec.CommandContext(ctx, b.command[0], append(b.command[1:len(b.command):len(b.command)], args...)...)
	p.cmd.Stderr = p.stderr
	p.cmd.SysProcAttr = dieWithParent()
	if err := on.run(p.cmd.Start); err != nil {
		return err
	}
	go func() { p.exited <- p.cmd.Wait() }()
	return nil
}

// makeCertificate makes a certificate for 127.0.0.1 that signs itself, and its key, in PEM.
var makeCertificate = sync.OnceValues(func() (pair [2][]byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour), IPAddresses: []net.IP{{127, 0, 0, 1}}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return pair, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	pair[0] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert})
	pair[1] = pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
	return pair, err
})

// writeCertificate writes the certificate and its key to files.
func writeCertificate(certFile, keyFile string) error {
	pair, err := makeCertificate()
	if err == nil {
		err = os.WriteFile(certFile, pair[0], 0o600)
	}
	if err == nil {
		err = os.WriteFile(keyFile, pair[1], 0o600)
	}
	return err
}

// dieWithParent makes the kernel kill a child when this process dies.
func dieWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }

// freeAddress returns an unused loopback address.
func freeAddress(ctx context.Context) (string, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("finding a free port: %w", err)
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

func (p *process) awaitListening() error {
	for began := time.Now(); time.Since(began) < serverTimeout; time.Sleep(5 * time.Millisecond) {
		select {
		case err := <-p.exited:
			p.exited <- err
			return fmt.Errorf("exited: %w", errors.Join(err, p.stderrText()))
		default:
		}
		if nc, err := net.Dial("tcp4", p.address); err == nil {
			return nc.Close()
		}
	}
	return fmt.Errorf("not listening on %s after %v", p.address, serverTimeout)
}

// stderrText returns the end of what the process wrote to stderr as an error, or nil.
func (p *process) stderrText() error {
	text, err := os.ReadFile(p.stderr.Name())
	if err != nil || len(text) == 0 {
		return err
	}
	return errors.New(strings.TrimSpace(string(text[max(0, len(text)-1000):])))
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// behindPID returns the pid of the server behind this one; 0 if there is none.
func (p *process) behindPID() int {
	if p.behind == nil {
		return 0
	}
	return p.behind.pid()
}

// stop sends SIGTERM, and SIGKILL after serverTimeout.
func (p *process) stop() error {
	if p.behind != nil {
		defer p.behind.stop()
	}
	defer os.RemoveAll(p.dir)
	defer p.stderr.Close()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited: // with any status: most contenders do not handle the signal
		return nil
	case <-time.After(serverTimeout):
	}
	if err := p.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("ending process %d: %w", p.pid(), err)
	}
	<-p.exited
	return nil
}

// resident returns the resident memory in bytes, with that of the server behind this one.
func (p *process) resident() (total int64, err error) {
	if p.behind != nil {
		if total, err = p.behind.resident(); err != nil {
			return 0, err
		}
	}
	own, err := residentOf(p.pid(), "Rss:")
	return total + own, err
}

// residentOf returns the resident memory of a process in bytes: a line of /proc/PID/smaps_rollup. Rss counts all of it,
// and Pss only a part of what it shares with others.
func residentOf(pid int, name string) (int64, error) {
	// The figure in /proc/PID/status is cheaper, but each CPU updates it with a delay.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, fmt.Errorf("reading the resident memory: %w", err)
	}
	for line := range bytes.Lines(text) {
		if fields := strings.Fields(string(line)); len(fields) == 3 && fields[0] == name {
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("reading the resident memory: no %s line", name)
}

// cpus are the CPUs that a process may use. Empty means all.
type cpus []int

// run calls start, which starts a process, with the affinity that the process is to inherit.
func (c cpus) run(start func() error) error {
	if len(c) == 0 {
		return start()
	}
	// A child inherits the affinity of the thread that starts it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var before, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return fmt.Errorf("reading the CPU affinity: %w", err)
	}
	for _, cpu := range c {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("binding to CPUs %v: %w", []int(c), err)
	}
	defer func() { _ = unix.SchedSetaffinity(0, &before) }()
	return start()
}

// The names of the placements.
const (
	pinnedName   = "pinned"
	unpinnedName = "unpinned"
)

// placement is the CPUs of the server and of the load.
type placement struct {
	Name         string
	server, load cpus
}

// pinned gives the server one CPU and the load another.
func pinned() (placement, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return placement{}, fmt.Errorf("reading the CPU affinity: %w", err)
	}
	var have []int
	for cpu := range 64 * len(set) {
		if set.IsSet(cpu) {
			have = append(have, cpu)
		}
	}
	if len(have) < 2 {
		return placement{}, errors.New("pinning needs two CPUs: one for the server, one for the load")
	}
	return placement{Name: pinnedName, server: cpus{have[1]}, load: cpus{have[0]}}, nil
}

func unpinned() placement { return placement{Name: unpinnedName} }

// The load runs in a separate process: this program, started with loadCommand and a job as its arguments. It prints
// the result as JSON.
const loadCommand = "load"

// A job is what the load does.
type job string

const (
	jobRun     job = "run"     // put load on the server and print a load.Result
	jobHold    job = "hold"    // open connections, print null, keep them open until stdin ends
	jobPulse   job = "pulse"   // the same, and send a message each pulseInterval, print a load.Result
	jobBusy    job = "busy"    // put load on the server until stdin ends, print a load.Result
	jobDrain   job = "drain"   // open connections, stop the server, print a load.Drained
	jobDisturb job = "disturb" // make a disturbance once a second until stdin ends, and print the number
)

// loadMain is the main function of the load's process.
func loadMain(args []string, in io.Reader, out io.Writer) error {
	if len(args) != 2 {
		return errors.New("want a job and its spec")
	}
	answer := json.NewEncoder(out)
	if job(args[0]) == jobDisturb {
		var d disturbance
		if err := json.Unmarshal([]byte(args[1]), &d); err != nil {
			return fmt.Errorf("reading the disturbance: %w", err)
		}
		times, err := d.repeat(ended(in))
		if err != nil {
			return err
		}
		return answer.Encode(times)
	}
	var spec load.Spec
	if err := json.Unmarshal([]byte(args[1]), &spec); err != nil {
		return fmt.Errorf("reading the spec: %w", err)
	}
	switch job(args[0]) {
	case jobRun:
		result, err := load.Run(spec)
		if err != nil {
			return err
		}
		return answer.Encode(result)
	case jobBusy:
		result, err := load.RunUntil(spec, ended(in))
		if err != nil {
			return err
		}
		return answer.Encode(result)
	}
	held, err := load.Hold(spec)
	if err != nil {
		return err
	}
	defer held.Close()
	switch job(args[0]) {
	case jobHold:
		if err := answer.Encode(nil); err != nil {
			return err
		}
		return held.ReadUntil(ended(in))
	case jobPulse:
		if err := answer.Encode(nil); err != nil {
			return err
		}
		pulses, err := held.Pulse(ended(in), pulseInterval)
		if err != nil {
			return err
		}
		return answer.Encode(pulses)
	}
	drained, err := held.Drain()
	if err != nil {
		return err
	}
	return answer.Encode(drained)
}

// ended returns a channel that is closed when in ends. Its goroutine ends with in or with the process.
func ended(in io.Reader) <-chan struct{} {
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(io.Discard, in)
	}()
	return done
}

// A loader is a running load.
type loader struct {
	cmd    *exec.Cmd
	stdin  io.Closer // closing it ends the load
	out    *json.Decoder
	stderr bytes.Buffer
}

// startLoad starts a load.
func startLoad(ctx context.Context, j job, spec any, on cpus) (*loader, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	l := &loader{cmd: exec.CommandContext(ctx, self, loadCommand, string(j), string(text))}
	l.cmd.SysProcAttr = dieWithParent()
	in, err := l.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	l.stdin = in
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	l.out = json.NewDecoder(out)
	l.cmd.Stderr = &l.stderr
	if err := on.run(l.cmd.Start); err != nil {
		return nil, fmt.Errorf("starting the load: %w", err)
	}
	return l, nil
}

// answer decodes the next value that the load prints.
func (l *loader) answer(into any) error {
	err := l.out.Decode(into)
	if err == nil {
		return nil
	}
	if failed := l.end(); failed != nil {
		return failed // the reason
	}
	return fmt.Errorf("reading the load's answer: %w", err)
}

// end tells the load to end, and waits for it.
func (l *loader) end() error {
	_ = l.stdin.Close()
	if err := l.cmd.Wait(); err != nil {
		return fmt.Errorf("the load: %w: %s", err, bytes.TrimSpace(l.stderr.Bytes()))
	}
	return nil
}

// measure puts one load on a server.
func measure(ctx context.Context, p *process, s shape, length time.Duration, on cpus) (r load.Result, err error) {
	l, err := startLoad(ctx, jobRun, s.spec(p, length), on)
	if err != nil {
		return r, err
	}
	if err := l.answer(&r); err != nil {
		return r, err
	}
	return r, l.end()
}

// A machine describes where the benchmark ran.
type machine struct {
	CPU    string
	CPUs   int
	Memory uint64 // bytes
	Kernel string
	Go     string
}

func thisMachine() (m machine, err error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return m, fmt.Errorf("reading the kernel's version: %w", err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("reading the memory size: %w", err)
	}
	cpu := "unknown"
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			cpu = strings.TrimSpace(value)
			break
		}
	}
	return machine{
		CPU: cpu, CPUs: runtime.NumCPU(), Memory: info.Totalram * uint64(info.Unit),
		Kernel: unix.ByteSliceToString(name.Sysname[:]) + " " + unix.ByteSliceToString(name.Release[:]),
		Go:     runtime.Version(),
	}, nil
}
