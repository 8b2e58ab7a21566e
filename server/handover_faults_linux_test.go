package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// faultyLink calls fault before it sends and after it receives each message, with a name such as "send ack 2": the
// direction, the type, and its number among those.
type faultyLink struct {
	Link
	fault func(step string)
	seen  map[string]int
}

func (l *faultyLink) step(direction string, message []byte) {
	var m handoverMessage
	head, _, _ := bytes.Cut(message, []byte{'\n'})
	_ = json.Unmarshal(head, &m)
	name := direction + " " + m.Type
	l.seen[name]++
	l.fault(fmt.Sprintf("%s %d", name, l.seen[name]))
}

func (l *faultyLink) Send(message []byte, files []any) error {
	l.step("send", message)
	return l.Link.Send(message, files)
}

func (l *faultyLink) Receive() (message []byte, files []any, err error) {
	if message, files, err = l.Link.Receive(); err == nil {
		l.step("receive", message)
	}
	return message, files, err
}

func withFault(l Link, fault func(step string)) Link {
	return &faultyLink{l, fault, make(map[string]int)}
}

// The environment of a successor in a separate process.
const (
	faultStepEnv   = "ECHOD_TEST_FAULT_STEP"
	faultSignalEnv = "ECHOD_TEST_FAULT_SIGNAL"
)

func init() { roles["successor"] = playSuccessor }

// playSuccessor takes over from the link at descriptor 3, and serves until it is killed. At the step that the
// environment names it sends itself a signal.
func playSuccessor() {
	f := os.NewFile(3, "link")
	nc, err := net.FileConn(f)
	if err != nil {
		panic(err)
	}
	link, err := NewUnixLink(nc.(*net.UnixConn))
	if err != nil {
		panic(err)
	}
	at := os.Getenv(faultStepEnv)
	link = withFault(link, func(step string) {
		if step != at {
			return
		}
		sig := syscall.SIGKILL
		if os.Getenv(faultSignalEnv) == "STOP" {
			sig = syscall.SIGSTOP
		}
		_ = syscall.Kill(os.Getpid(), sig)
		select {} // the signal arrives a moment later
	})
	offer, err := ReceiveOffer(context.Background(), link)
	if err != nil {
		return
	}
	s, err := New(Echo, Options{})
	if err != nil {
		panic(err)
	}
	if err := s.TakeOver(context.Background(), offer, offer.Listeners); err != nil {
		return
	}
	_ = s.ServeListener(offer.Listeners[0])
}

// startSuccessor starts a successor process with a fault, and returns this end of the link.
func startSuccessor(t *testing.T, step, signal string) (*exec.Cmd, Link) {
	t.Helper()
	near, far := linkPair(t)
	file, err := far.(unixLink).File()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), roleEnv+"=successor", faultStepEnv+"="+step, faultSignalEnv+"="+signal)
	cmd.ExtraFiles = []*os.File{file}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = file.Close()
	_ = far.Close()
	return cmd, near
}

// successorSteps are the steps of the successor before it owns the connections.
var successorSteps = []string{
	"receive offer 1", "send ready 1", "receive conns 1", "send ack 1", "receive conns 2", "send ack 2",
	"receive final 1", "send ack 3", "receive commit 1", "send ack 4",
}

// TestG12HandoverFaults kills or stops a successor, a separate process, at each step before it owns the connections.
// The predecessor continues to serve, and ends the successor.
func TestG12HandoverFaults(t *testing.T) {
	for _, signal := range []string{"KILL", "STOP"} {
		t.Run(signal, func(t *testing.T) {
			g, addr := firstGeneration(t, Echo, Options{})
			c := dialTCP(t, addr)
			_ = c.SetDeadline(time.Time{})
			echoed(t, c, "before")
			steps := successorSteps
			if signal == "STOP" && os.Getenv("ECHOD_TEST_SLOW") != "1" {
				steps = steps[:len(steps)-2] // after the commit was sent, the predecessor waits for five seconds
			}
			for _, step := range steps {
				cmd, link := startSuccessor(t, step, signal)
				kill := func() {
					_ = cmd.Process.Kill()
					_ = cmd.Wait()
				}
				ctx, cancel := context.WithTimeoutCause(t.Context(), 10*time.Second, errors.New("not ready"))
				if signal == "STOP" {
					// Once the process has stopped, the predecessor would only wait for its bounds.
					go func() {
						_ = unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil)
						cancel()
					}()
				}
				_, err := g.HandOver(ctx, link, HandoverOptions{Kill: kill, FreezeTimeout: 3 * time.Second})
				cancel()
				if err == nil {
					t.Fatalf("%s: the handover succeeded", step)
				}
				kill()
				echoed(t, c, "after "+step)
				late := dialTCP(t, addr)
				echoed(t, late, "new after "+step)
				_ = late.Close()
				awaitConns(t, g.Server, 1)
			}
			_ = g.Close()
			g.served.Wait()
		})
	}
}

// TestG12HandoverDrain begins a drain before each message of the predecessor. The client is told once, and the drain is
// carried out by the predecessor alone, or, once the commit has begun, by the successor.
func TestG12HandoverDrain(t *testing.T) {
	for _, step := range []string{
		"send offer 1", "receive ready 1", "send conns 1", "receive ack 1", "send conns 2", "receive ack 2",
		"send final 1", "receive ack 3", "send commit 1", "receive ack 4",
	} {
		t.Run(step, func(t *testing.T) {
			g, addr := firstGeneration(t, Echo, Options{})
			c := dialTCP(t, addr)
			echoed(t, c, "before\n")
			near, far := linkPair(t)
			var begun atomic.Bool
			near = withFault(near, func(now string) {
				if now == step {
					begun.Store(true)
					g.StartDrain(DrainOptions{Grace: time.Minute, Reason: "stop"})
				}
			})
			successor, _ := newServer(t, Echo, Options{})
			taken := make(chan error, 1)
			go func() {
				taken <- func() error {
					offer, err := ReceiveOffer(context.Background(), far)
					if err != nil {
						_ = far.Close()
						return err
					}
					if err := successor.TakeOver(context.Background(), offer, offer.Listeners); err != nil {
						return err
					}
					return successor.ServeListener(offer.Listeners[0])
				}()
			}()
			o := HandoverOptions{Kill: func() {}, FreezeTimeout: 10 * time.Second}
			_, err := g.HandOver(context.Background(), near, o)
			committed := step == "send commit 1" || step == "receive ack 4"
			if !begun.Load() || (err == nil) != committed {
				t.Fatalf("drain begun: %t; handing over: %v; want a handover only after the commit", begun.Load(), err)
			}
			if _, draining := errors.AsType[*DrainingError](err); err != nil && !draining {
				t.Errorf("handing over: %v; want a DrainingError", err)
			}
			receives(t, c, "SHUTDOWN ")
			_ = c.CloseWrite()
			rest, err := io.ReadAll(c)
			if err != nil || bytes.Contains(rest, []byte("SHUTDOWN")) || !bytes.HasSuffix(rest, []byte(" stop\n")) {
				t.Errorf("after SHUTDOWN the client read %q, %v; want one notice and the end", rest, err)
			}
			_ = g.Close()
			g.served.Wait()
			_ = successor.Close()
			<-taken
		})
	}
}
