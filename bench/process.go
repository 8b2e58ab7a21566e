package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A process is a contender that runs.
type process struct {
	cmd     *exec.Cmd
	exited  chan error
	stderr  *os.File
	address string
	dir     string // its own
}

// patience is how long a server has to listen, and to end when asked to.
const patience = 5 * time.Second

// start runs b on the given CPUs, and returns once it accepts connections.
func start(ctx context.Context, b built, on cpus) (*process, error) {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return nil, err
	}
	p := &process{dir: dir, exited: make(chan error, 1)}
	if err := p.launch(ctx, b, on); err != nil {
		p.stderr.Close() // nil, where it did not come to that, is no harm
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

// dieWithParent keeps a server or a load from outliving this process, whatever becomes of it.
func dieWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }

// freeAddress finds a port that nobody listens on.
func freeAddress(ctx context.Context) (string, error) {
	var lc net.ListenConfig
	ln, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("looking for a free port: %w", err)
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

func (p *process) awaitListening() error {
	for began := time.Now(); time.Since(began) < patience; time.Sleep(5 * time.Millisecond) {
		select {
		case err := <-p.exited:
			p.exited <- err
			return fmt.Errorf("it ended: %w", errors.Join(err, p.said()))
		default:
		}
		if nc, err := net.Dial("tcp4", p.address); err == nil {
			return nc.Close()
		}
	}
	return fmt.Errorf("it does not listen on %s after %v", p.address, patience)
}

// said is what the process wrote to stderr, as an error; nil when that was nothing.
func (p *process) said() error {
	text, err := os.ReadFile(p.stderr.Name())
	if err != nil || len(text) == 0 {
		return err
	}
	return errors.New(strings.TrimSpace(string(text[max(0, len(text)-1000):])))
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop ends the process, asking first.
func (p *process) stop() error {
	defer os.RemoveAll(p.dir)
	defer p.stderr.Close()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited: // how does not matter: most of the contenders do not handle the signal
		return nil
	case <-time.After(patience):
	}
	if err := p.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("ending process %d: %w", p.pid(), err)
	}
	<-p.exited
	return nil
}

// resident is how much memory the process has in RAM, in bytes.
func (p *process) resident() (int64, error) {
	// Not the cheaper figure in /proc/PID/status, which each CPU brings up to date when it likes.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p.pid()))
	if err != nil {
		return 0, fmt.Errorf("reading how much memory is in use: %w", err)
	}
	for line := range bytes.Lines(text) {
		if fields := strings.Fields(string(line)); len(fields) == 3 && fields[0] == "Rss:" {
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.New("reading how much memory is in use: there is no Rss line")
}

// cpus are the CPUs that a process may use; all of them when empty.
type cpus []int

// run calls start, which starts a process, so that the process is bound to the CPUs.
func (c cpus) run(start func() error) error {
	if len(c) == 0 {
		return start()
	}
	// A child inherits the affinity of the thread that forks it.
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

// placement says which CPUs the server and the load get.
type placement struct {
	Name         string
	server, load cpus
}

// pinned gives the server one CPU, and the load another.
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
		return placement{}, errors.New("binding the server and the load to a CPU each takes two CPUs")
	}
	return placement{Name: pinnedName, server: cpus{have[1]}, load: cpus{have[0]}}, nil
}

func unpinned() placement { return placement{Name: unpinnedName} }
