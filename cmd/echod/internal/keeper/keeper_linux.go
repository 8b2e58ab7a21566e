// Package keeper implements the process that keeps the PID which a supervisor, a shell or a container knows, after an
// upgrade has replaced the server. A keeper forwards signals to the process that serves, and returns its exit code.
//
// The keeper is the server's first process. When that process has nothing left to serve, it executes itself again. It
// keeps its PID, children and terminal, and frees the memory that it used as a server. A process that starts as a keeper
// runs in this package's init. Packages are initialized in the order of their import paths. So only the packages of the
// standard library that this one needs are initialized before it, and it must not import other modules. The keeper then
// needs less than 1 MB of its own, and catches signals early.
//
// Goroutines: none besides that of os/signal.
package keeper

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// variable is the environment variable that makes a process a keeper. Its value has the descriptor of the keeper's pipe,
// the pid of the process that serves, and the name of this process, which executing /proc/self/exe would lose.
const variable = "ECHOD_INTERNAL_KEEPER"

func init() {
	state := os.Getenv(variable)
	if state == "" {
		return
	}
	k, name, err := parse(state)
	if err != nil {
		fmt.Fprintf(os.Stderr, "echod: %s: %v\n", variable, err)
		os.Exit(1)
	}
	caught := make(chan os.Signal, 16)
	catch(caught)
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0)
	os.Exit(k.run(caught, nil))
}

// Keeper tracks which process serves. Its methods may be called concurrently.
type Keeper struct {
	pipe *os.File // each process that serves writes its pid to it

	mu      sync.Mutex
	serving int // guarded by mu
}

// New makes this process the parent of all processes that its children start and leave, if adopt is set. A successor
// that serves writes its pid and a newline to report.
func New(adopt bool) (k *Keeper, report *os.File, err error) {
	if adopt {
		const setChildSubreaper = 36 // prctl(2)
		if _, _, err := syscall.RawSyscall6(syscall.SYS_PRCTL, setChildSubreaper, 1, 0, 0, 0, 0); err != 0 {
			return nil, nil, fmt.Errorf("becoming the parent of the successor: %w", err)
		}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	return &Keeper{pipe: r}, w, nil
}

func parse(state string) (k *Keeper, name string, err error) {
	var fd, serving int
	if _, err := fmt.Sscanf(state, "%d %d %s", &fd, &serving, &name); err != nil {
		return nil, "", err
	}
	syscall.CloseOnExec(fd)
	return &Keeper{pipe: os.NewFile(uintptr(fd), "keeper"), serving: serving}, name, nil
}

// Starting records that the process pid serves after an upgrade, or is starting to. Zero means that the start failed.
func (k *Keeper) Starting(pid int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.serving = pid
}

// Serving returns the pid of the process that serves; zero if it is this one. It also empties the pipe.
func (k *Keeper) Serving() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	raw, err := k.pipe.SyscallConn()
	if err != nil {
		return k.serving
	}
	var lines []byte
	_ = raw.Read(func(fd uintptr) bool {
		var block [512]byte
		for {
			n, err := syscall.Read(int(fd), block[:]) // does not block, because os.Pipe makes the descriptor non-blocking
			if err == syscall.EINTR {
				continue
			}
			if n <= 0 {
				return true
			}
			lines = append(lines, block[:n]...)
		}
	})
	for line := range strings.FieldsSeq(string(lines)) {
		if pid, err := strconv.Atoi(line); err == nil {
			k.serving = pid
		}
	}
	return k.serving
}

// Signal sends a signal to the process that serves.
func (k *Keeper) Signal(sig os.Signal) {
	if s, ok := sig.(syscall.Signal); ok {
		if pid := k.Serving(); pid != 0 {
			_ = syscall.Kill(pid, s)
		}
	}
}

// settle is the time for which a keeper catches signals before it executes itself. A signal that arrives while it does
// is not forwarded. Signals often follow an upgrade, so the keeper waits until that is unlikely.
const settle = 10 * time.Second

// Keep makes this process the keeper until no child is left, and returns the exit code of the process that served last.
// caught has the signals that arrived until now, and takes the next ones. Usually Keep does not return, because the
// process becomes another program.
func (k *Keeper) Keep(caught chan os.Signal) (code int) {
	catch(caught)
	return k.run(caught, time.After(settle))
}

// shrink frees the memory that the process used as a server.
func (k *Keeper) shrink(caught chan os.Signal) {
	// For a few milliseconds, until the new program catches signals, a signal ends this process. It is not lost, because
	// the process that serves notices the end, and drains.
	signal.Stop(caught)
	for len(caught) > 0 {
		k.Signal(<-caught)
	}
	_ = k.execute()
	catch(caught) // the process continues without having executed itself
	debug.SetGCPercent(10)
	debug.FreeOSMemory()
}

// execute executes this program again, as a keeper. It returns only an error.
func (k *Keeper) execute() error {
	if os.Getpid() == 1 {
		return errors.New("the kernel drops signals to PID 1 that it does not catch")
	}
	name, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		return err
	}
	raw, err := k.pipe.SyscallConn()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the new program inherits this thread's signal mask
	defer runtime.UnlockOSThread()
	defer block(syscall.SIGUSR1, syscall.SIGUSR2)() // Go's runtime unblocks the others when it starts
	var failed error
	err = raw.Control(func(fd uintptr) {
		state := fmt.Sprintf("%s=%d %d %s", variable, fd, k.Serving(), strings.TrimSpace(string(name)))
		if _, _, no := syscall.RawSyscall(syscall.SYS_FCNTL, fd, syscall.F_SETFD, 0); no != 0 {
			failed = no
			return
		}
		// The program of this process. The one on disk may be another version, or may have been removed.
		failed = syscall.Exec("/proc/self/exe", os.Args, []string{state, "GOMAXPROCS=1"})
		syscall.CloseOnExec(int(fd))
	})
	return cmp.Or(err, failed)
}

// block blocks signals on this thread, which the caller has locked, until unblock is called. Blocked signals stay pending.
func block(signals ...syscall.Signal) (unblock func()) {
	var set, before uint64
	for _, sig := range signals {
		set |= 1 << (sig - 1)
	}
	change := func(how uintptr, set, before *uint64) {
		_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGPROCMASK, how, uintptr(unsafe.Pointer(set)),
			uintptr(unsafe.Pointer(before)), unsafe.Sizeof(*set), 0, 0)
	}
	const sigBlock, sigSetMask = 0, 2
	change(sigBlock, &set, &before)
	return func() { change(sigSetMask, &before, nil) }
}

// catch catches the signals of a keeper, except those that were ignored when the process started.
func catch(caught chan<- os.Signal) {
	for _, sig := range []os.Signal{
		syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2,
		syscall.SIGCHLD, syscall.SIGTSTP, syscall.SIGCONT,
	} {
		if !signal.Ignored(sig) {
			signal.Notify(caught, sig)
		}
	}
}

// run runs the keeper until there are no more children. After settle it shrinks the process.
func (k *Keeper) run(caught chan os.Signal, settled <-chan time.Time) (code int) {
	codes := make(map[int]int) // nonzero exit codes of children that have ended
	for {
		serving := k.Serving()
		if !reap(codes) {
			return codes[serving]
		}
		select {
		case <-settled:
			if len(codes) == 0 { // otherwise the last process is ending, and its code would be lost
				k.shrink(caught)
			}
		case sig := <-caught:
			switch {
			case sig == syscall.SIGCHLD:
			case sig != syscall.SIGTSTP:
				k.Signal(sig)
			case isJob():
				k.Signal(syscall.SIGSTOP)
				_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP) // until SIGCONT
			}
		}
	}
}

// isJob reports whether a shell with job control has started this process. Otherwise nothing would continue the process
// after a stop, and the kernel ignores SIGTSTP, too.
func isJob() bool {
	parent := os.Getppid()
	if parent == 0 {
		return false
	}
	session := func(pid int) uintptr {
		id, _, _ := syscall.RawSyscall(syscall.SYS_GETSID, uintptr(pid), 0, 0)
		return id
	}
	group, err := syscall.Getpgid(parent)
	return err == nil && session(parent) == session(0) && group != syscall.Getpgrp()
}

// reap reaps the children that have ended. It returns false if none is left.
func reap(codes map[int]int) (left bool) {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		switch {
		case err == syscall.EINTR:
			continue
		case err != nil:
			return false // ECHILD
		case pid == 0:
			return true
		}
		code := status.ExitStatus()
		if status.Signaled() {
			code = 128 + int(status.Signal())
		}
		if code != 0 {
			codes[pid] = code
		}
	}
}
