package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"echod/cmd/echod/internal/keeper"
	"echod/server"
)

// Variables by which the processes of an upgrade find each other.
const (
	envStarter = "ECHOD_INTERNAL_STARTER" // this process starts the successor, writes its pid to fd 6, and exits
	envLink    = "ECHOD_INTERNAL_LINK"    // descriptor of the link to the predecessor
	envGate    = "ECHOD_INTERNAL_GATE"    // descriptor that reports the end of file when the supervisor knows the successor
	envReport  = "ECHOD_INTERNAL_REPORT"  // descriptor to which a successor writes its pid, for the keeper
	envKept    = "ECHOD_INTERNAL_KEPT"    // a keeper reads the pipe of envReport
)

// A starter's descriptors. The successor gets the first three.
const (
	fdLink = 3 + iota
	fdGate
	fdReport
	fdPID
)

// process is a successor. It is not a child of this process: an intermediate process starts it and exits, so the
// supervisor or the keeper becomes its parent.
type process struct {
	pid  int
	pidf int      // pidfd
	gate *os.File // closing it lets the successor notify the supervisor
}

func (p process) kill() {
	_ = unix.PidfdSendSignal(p.pidf, unix.SIGKILL, nil, 0)
	fds := []unix.PollFd{{Fd: int32(p.pidf), Events: unix.POLLIN}} // readable once the process has ended
	for {
		if _, err := unix.Poll(fds, -1); err != unix.EINTR {
			break
		}
	}
	p.release()
}

func (p process) release() {
	_ = p.gate.Close()
	_ = unix.Close(p.pidf)
}

// kept is set in the first process, by its first upgrade: it becomes the keeper of all later processes.
var kept struct {
	*keeper.Keeper
	report *os.File // inherited by successors
}

// inheritedReport is the pipe to the keeper that a successor has inherited. The os.File must stay reachable, because its
// finalizer closes the descriptor.
var inheritedReport = sync.OnceValue(func() *os.File { return os.NewFile(fdReport, "report") })

// hasStableParent reports whether another process remains the parent after each upgrade: systemd or a keeper.
func hasStableParent() bool { return isUnit() || os.Getenv(envReport) != "" }

// isUnit reports whether this process is the main process of a systemd unit. Then systemd becomes the parent of the
// successor. NOTIFY_SOCKET alone does not show that, because containers and supervisors pass it to their processes.
func isUnit() bool {
	parent := os.Getppid()
	return underSystemd() && os.Getenv("INVOCATION_ID") != "" && os.Getpid() != 1 &&
		(parent == 1 || strconv.Itoa(parent) == os.Getenv("MANAGERPID")) // of the user's systemd
}

// startSuccessor starts the program on disk with the arguments and the environment of this one. It gives up when ctx
// ends.
func startSuccessor(ctx context.Context) (p process, link server.Link, err error) {
	path, err := exec.LookPath(os.Args[0])
	if err != nil {
		return p, nil, err
	}
	near, far, err := socketPair()
	if err != nil {
		return p, nil, err
	}
	defer far.Close()
	gateR, gateW, err := os.Pipe()
	if err != nil {
		return p, nil, err
	}
	defer gateR.Close()
	pidR, pidW, err := os.Pipe()
	if err != nil {
		return p, nil, err
	}
	defer pidR.Close()
	report, err := reportPipe()
	if err != nil {
		return p, nil, err
	}
	cmd := exec.Command(path, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{far, gateR, report, pidW}
	cmd.Env = append(successorEnviron(), envStarter+"=1")
	if !hasStableParent() {
		cmd.Env = append(cmd.Env, envKept+"=1")
	}
	err = cmd.Start()
	_ = pidW.Close()
	if err == nil {
		stop := context.AfterFunc(ctx, func() { _ = pidR.SetReadDeadline(time.Unix(1, 0)) })
		p.pid, err = readPID(pidR)
		if !stop() && err != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			_ = cmd.Process.Kill() // the program is not echod with upgrades, or it hangs
		}
		_ = cmd.Wait() // a starter exits at once
	}
	if err == nil {
		p.pidf, err = unix.PidfdOpen(p.pid, 0)
	}
	if err != nil {
		_ = near.Close()
		_ = gateW.Close()
		return p, nil, err
	}
	p.gate = gateW
	link, err = server.NewUnixLink(near)
	return p, link, err
}

// readPID reads the pid that the starter writes.
func readPID(r io.Reader) (int, error) {
	line, err := bufio.NewReader(io.LimitReader(r, 64)).ReadString('\n')
	if err != nil {
		return 0, errors.New("the program on disk did not start, or does not support upgrades")
	}
	return strconv.Atoi(strings.TrimSpace(line))
}

// successorEnviron is this process's environment without the variables that concern only this process.
func successorEnviron() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		switch name {
		case "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID", envLink, envGate, envReport, envStarter:
			return true // go-systemd pings the watchdog if WATCHDOG_PID is not set
		}
		return false
	})
}

func socketPair() (near *net.UnixConn, far *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fds[0]), "handover")
	defer f.Close()
	far = os.NewFile(uintptr(fds[1]), "handover")
	nc, err := net.FileConn(f)
	if err != nil {
		_ = far.Close()
		return nil, nil, err
	}
	return nc.(*net.UnixConn), far, nil
}

// reportPipe returns the pipe to which the successor writes its pid. At the first upgrade without systemd it makes this
// process the keeper, which is the parent of all later processes.
func reportPipe() (*os.File, error) {
	if os.Getenv(envReport) != "" {
		return inheritedReport(), nil
	}
	if kept.Keeper == nil {
		var err error
		if kept.Keeper, kept.report, err = keeper.New(!hasStableParent()); err != nil {
			return nil, err
		}
	}
	return kept.report, nil
}

// internalRole runs the starter if an upgrade started this process as one, and reports whether it did. It must be called
// first, because the command line and the environment are those of the server.
func internalRole() (code int, done bool) {
	if os.Getenv(envStarter) != "" {
		return runStarter(), true
	}
	return 0, false
}

// runStarter starts the successor and exits, so that the supervisor or the keeper becomes the successor's parent.
func runStarter() int {
	path, err := exec.LookPath(os.Args[0])
	if err != nil {
		return exitFailed
	}
	cmd := exec.Command(path, os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	for fd := fdLink; fd < fdPID; fd++ {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), "upgrade"))
	}
	cmd.Env = append(successorEnviron(), fmt.Sprintf("%s=%d", envLink, fdLink), fmt.Sprintf("%s=%d", envGate, fdGate),
		fmt.Sprintf("%s=%d", envReport, fdReport))
	// A terminal signals its foreground process group, and the first process forwards signals. With a process group of its
	// own the successor gets each signal once.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "echod: starting the successor:", err)
		return exitFailed
	}
	pids := os.NewFile(fdPID, "pid")
	fmt.Fprintln(pids, cmd.Process.Pid)
	return 0
}

// predecessorLink returns the link to the predecessor; nil if there is none. Later calls return nil.
func predecessorLink() (server.Link, error) {
	fd := os.Getenv(envLink)
	if fd == "" {
		return nil, nil
	}
	if err := os.Unsetenv(envLink); err != nil {
		return nil, err
	}
	n, err := strconv.Atoi(fd)
	if err != nil {
		return nil, fmt.Errorf("%s=%s: %w", envLink, fd, err)
	}
	ignoreBackgroundWrite() // the keeper is in the foreground of the terminal
	unix.CloseOnExec(fdGate)
	unix.CloseOnExec(fdReport)
	f := os.NewFile(uintptr(n), "handover")
	defer f.Close()
	nc, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("link to the predecessor: %w", err)
	}
	uc, ok := nc.(*net.UnixConn)
	if !ok {
		_ = nc.Close()
		return nil, errors.New("link to the predecessor: not a Unix socket")
	}
	return server.NewUnixLink(uc)
}

// gateTimeout bounds the wait for the predecessor to tell the supervisor.
const gateTimeout = 5 * time.Second

// tellKeeper tells the keeper, if it is another process, that the process pid serves. The predecessor does so before
// it answers the upgrade request, because the caller may send a signal next. The successor does so too, in case the
// predecessor dies.
func tellKeeper(pid int) {
	if os.Getenv(envReport) != "" {
		_, _ = fmt.Fprintln(inheritedReport(), pid) // under systemd no process reads it
	}
}

// keeperActor returns the run.Group pair that drains the server when its keeper has died. The program that started the
// keeper then assumes that the service has ended, and may start it again. execute is nil without a keeper.
func keeperActor(srv *server.Server, log *zap.Logger) (execute func() error, interrupt func(error)) {
	if os.Getenv(envKept) == "" {
		return nil, nil
	}
	// A copy of the descriptor, because waiting on the os.File would block tellKeeper.
	fd, err := unix.FcntlInt(fdReport, unix.F_DUPFD_CLOEXEC, 0)
	if err == nil {
		err = unix.SetNonblock(fd, true) // so that the poller can wait for it
	}
	if err != nil {
		log.Warn("cannot watch the keeper", zap.Error(err))
		return nil, nil
	}
	pipe := os.NewFile(uintptr(fd), "keeper")
	interrupted := make(chan struct{})
	execute = func() error {
		defer pipe.Close()
		if awaitReaderClosed(pipe) == nil {
			log.Error("the keeper, which was the first process, has died")
			srv.StartDrain(server.DrainOptions{Reason: "orphaned"})
		}
		<-interrupted // the group's error is that of the first actor that returns, which must not be this one
		return nil
	}
	return execute, func(error) {
		close(interrupted)
		_ = pipe.SetWriteDeadline(time.Unix(1, 0))
	}
}

// awaitReaderClosed waits until all reading ends of the pipe are closed.
func awaitReaderClosed(pipe *os.File) error {
	raw, err := pipe.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Write(func(fd uintptr) bool {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		return err == nil && n > 0 && fds[0].Revents&unix.POLLERR != 0
	})
}

// awaitSupervisor waits until the supervisor knows this successor, or until ctx ends.
func awaitSupervisor(ctx context.Context) {
	gate := os.NewFile(fdGate, "gate")
	defer gate.Close()
	_ = gate.SetReadDeadline(time.Now().Add(gateTimeout))
	stop := context.AfterFunc(ctx, func() { _ = gate.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_, _ = io.Copy(io.Discard, gate)
}

// tellSupervisor tells systemd that the successor is the main process, and waits until systemd has processed that. Before,
// systemd ignores the successor's notifications (sd_notify(3), MAINPID and BARRIER).
func tellSupervisor(successor process) {
	socket := os.Getenv("NOTIFY_SOCKET")
	if !isUnit() {
		return
	}
	if err := sdNotify(socket, fmt.Sprintf("MAINPID=%d", successor.pid)); err != nil {
		return
	}
	r, w, err := os.Pipe()
	if err != nil {
		return
	}
	defer r.Close()
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err == nil {
		_, _, err = conn.WriteMsgUnix([]byte("BARRIER=1"), unix.UnixRights(int(w.Fd())), nil)
		_ = conn.Close()
	}
	_ = w.Close()
	if err == nil {
		_ = r.SetReadDeadline(time.Now().Add(gateTimeout))
		_, _ = io.Copy(io.Discard, r)
	}
}

// successorPID is the pid of the process that serves after an upgrade of this one, or that is starting; 0 if there is none.
var successorPID atomic.Int64

// setSuccessor sets the pid of the process that serves after an upgrade of this one, or that is starting; 0 if there is none.
func setSuccessor(pid int) {
	successorPID.Store(int64(pid))
	if kept.Keeper != nil {
		kept.Starting(pid)
	}
}

// signalServing sends a signal to the process that serves. In the keeper, that may be a later successor.
func signalServing(sig os.Signal) {
	if kept.Keeper != nil {
		kept.Signal(sig)
	} else if s, ok := sig.(syscall.Signal); ok && successorPID.Load() != 0 {
		_ = syscall.Kill(int(successorPID.Load()), s)
	}
}

// notifyUpgrade relays the signal that requests an upgrade to c.
func notifyUpgrade(c chan<- os.Signal) { notifySignals(c, syscall.SIGUSR2) }

// keepIfUpgraded makes this process the keeper if it was the first process and has handed over. The program that started
// it then still has a process to watch, until the service ends. The keeper forwards signals to the serving process, and
// returns its exit code.
func keepIfUpgraded(caught chan os.Signal) error {
	if successorPID.Load() == 0 || hasStableParent() {
		return nil
	}
	_ = kept.report.Close()
	if code := kept.Keep(caught); code != 0 {
		return &exitError{code: code}
	}
	return nil
}
