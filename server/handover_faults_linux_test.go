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

func init() {
	roles["successor"] = playSuccessor
	roles["predecessor"] = playPredecessor
}

// fault sends this process a signal at the step that the environment names.
func fault(step string) {
	if step != os.Getenv(faultStepEnv) {
		return
	}
	sig := syscall.SIGKILL
	if os.Getenv(faultSignalEnv) == "STOP" {
		sig = syscall.SIGSTOP
	}
	_ = syscall.Kill(os.Getpid(), sig)
	time.Sleep(100 * time.Millisecond) // the signal arrives a moment later
}

// inheritedLink is the link at descriptor 3, with the fault.
func inheritedLink() Link {
	nc, err := net.FileConn(os.NewFile(3, "link"))
	if err != nil {
		panic(err)
	}
	link, err := NewUnixLink(nc.(*net.UnixConn))
	if err != nil {
		panic(err)
	}
	return withFault(link, fault)
}

// playSuccessor takes over from the link, and serves until it is killed.
func playSuccessor() {
	limitFiles()
	link := inheritedLink()
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

// plainEcho is an echo that cannot be resumed.
var plainEcho = HandlerFunc(func(_ context.Context, c *Conn) error {
	_, err := io.Copy(c, c)
	return err
})

// playPredecessor serves the listeners at descriptors 4 and 5, the second one with a handler that cannot be resumed. It
// hands over when all clients of the test are there, and keeps what stays behind for an hour.
func playPredecessor() {
	s, err := New(Echo, Options{})
	if err != nil {
		panic(err)
	}
	for i, h := range []Handler{Echo, plainEcho} {
		f := os.NewFile(uintptr(4+i), "listener")
		ln, err := net.FileListener(f)
		if err != nil {
			panic(err)
		}
		_ = f.Close()
		go func() { _ = s.ServeListener(Listener{Listener: ln, Handler: h}) }()
	}
	_ = s.AwaitStatus(context.Background(), func(_ State, open int) bool { return open == handedClients+1 })
	_, err = s.HandOver(context.Background(), inheritedLink(), HandoverOptions{
		Kill: func() {}, Keep: time.Hour, FreezeTimeout: 20 * time.Second, SafePointTimeout: 10 * time.Second,
		Committed: func() { fault("committed") },
	})
	if err != nil {
		panic(err)
	}
	<-s.Done()
}

// handedClients is how many clients playPredecessor hands over.
const handedClients = 3

// startRole starts this program as another process of a handover, with a fault, and returns this end of the link. files
// become its descriptors 4 and so on.
func startRole(t *testing.T, role, step, signal string, files ...*os.File) (*exec.Cmd, Link) {
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
	cmd.Env = append(os.Environ(), roleEnv+"="+role, faultStepEnv+"="+step, faultSignalEnv+"="+signal)
	cmd.ExtraFiles = append([]*os.File{file}, files...)
	cmd.Stderr = os.Stderr
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
				cmd, link := startRole(t, "successor", step, signal)
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

// TestG12HandoverOwnerFaults kills or stops either process once the successor owns the connections.
func TestG12HandoverOwnerFaults(t *testing.T) {
	for _, step := range []string{"receive ack 4", "committed", "send ended 1"} {
		t.Run("the predecessor is killed at "+step, func(t *testing.T) { testPredecessorDies(t, step) })
	}
	for _, step := range []string{"receive ack 4", "committed"} {
		t.Run("the predecessor is stopped at "+step, func(t *testing.T) { testPredecessorStops(t, step) })
	}
	t.Run("the successor is killed", testOwnerDies)
}

// orphans is a server in this process that has taken over from a predecessor in another one.
type orphans struct {
	*Server
	process *exec.Cmd      // the predecessor
	owned   []*net.TCPConn // clients that were handed over
	kept    *net.TCPConn   // a client that stayed with the predecessor
	addr    net.Addr
}

func takeOverFrom(t *testing.T, step, signal string) (o orphans) {
	t.Helper()
	var files []*os.File
	var addrs []net.Addr
	for range 2 {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		_ = ln.Close()
		defer f.Close()
		files, addrs = append(files, f), append(addrs, ln.Addr())
	}
	process, link := startRole(t, "predecessor", step, signal, files...)
	o = orphans{process: process, addr: addrs[0]}
	t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	})
	for range handedClients {
		o.owned = append(o.owned, dialTCP(t, addrs[0]))
	}
	o.kept = dialTCP(t, addrs[1])
	for _, c := range append(o.owned, o.kept) {
		echoed(t, c, "before\n")
	}
	offer, err := ReceiveOffer(t.Context(), link)
	if err != nil {
		t.Fatal(err)
	}
	o.Server, _ = newServer(t, Echo, Options{})
	for i, l := range offer.Listeners {
		if l.Addr().String() == addrs[1].String() {
			offer.Listeners[i].Handler = plainEcho
		}
	}
	if err := o.TakeOver(t.Context(), offer, offer.Listeners); err != nil {
		t.Fatal(err)
	}
	for _, l := range offer.Listeners {
		serveListener(t, o.Server, l)
	}
	return o
}

// serves checks that the clients that were handed over are served, and new ones, and that the counters agree.
func (o *orphans) serves(t *testing.T, behind int) {
	t.Helper()
	for _, c := range o.owned {
		echoed(t, c, "after\n")
	}
	late := dialTCP(t, o.addr)
	echoed(t, late, "new\n")
	_ = late.Close()
	awaitConns(t, o.Server, len(o.owned)+behind)
	st := o.Status()
	wantEqual(t, "behind", st.KeptByPredecessor, behind)
	wantBalanced(t, st)
}

func wantBalanced(t *testing.T, st Status) {
	t.Helper()
	closed := uint64(0)
	for _, n := range st.Closed {
		closed += n
	}
	wantEqual(t, "accepted", st.Accepted, uint64(st.Connections)+closed)
}

func testPredecessorDies(t *testing.T, step string) {
	o := takeOverFrom(t, step, "KILL")
	if step == "send ended 1" {
		o.serves(t, 1)
		_ = o.kept.CloseWrite() // the predecessor dies before it reports that
	}
	if rest, err := io.ReadAll(o.kept); len(rest) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the client of the dead process received %q, %v", rest, err)
	}
	await(t, "the predecessor's end to be noticed", func() bool { return !o.Status().HasPredecessor })
	o.serves(t, 0)
	wantClosed(t, o.Server, map[Reason]uint64{ReasonLost: 1, ReasonClientClosed: o.Status().Closed[ReasonClientClosed]})
	wantErr(t, "draining it", o.DrainPredecessor(DrainOptions{}, false), ErrNoPredecessor)
}

func testPredecessorStops(t *testing.T, step string) {
	o := takeOverFrom(t, step, "STOP")
	if err := unix.Waitid(unix.P_PID, o.process.Process.Pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	o.serves(t, 1)
	if err := o.process.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	echoed(t, o.kept, "continued\n")
	o.serves(t, 1)
	_ = o.kept.CloseWrite()
	receivesAll(t, o.kept, "")
	awaitConns(t, o.Server, len(o.owned))
	o.serves(t, 0)
	if err := o.process.Wait(); err != nil {
		t.Errorf("the predecessor: %v", err)
	}
	wantEqual(t, "lost", o.Status().Closed[ReasonLost], uint64(0))
}

// testOwnerDies: the clients of the dead successor see their connections end, and nothing else. The predecessor goes on
// with what it kept.
func testOwnerDies(t *testing.T) {
	g, addr := firstGeneration(t, Echo, Options{})
	second, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.served.Go(func() { _ = g.ServeListener(Listener{Listener: second, Handler: plainEcho}) })
	owned, kept := dialTCP(t, addr), dialTCP(t, second.Addr())
	echoed(t, owned, "before\n")
	echoed(t, kept, "before\n")
	process, link := startRole(t, "successor", "", "")
	report, err := g.HandOver(t.Context(), link, HandoverOptions{Kill: func() {}, Keep: time.Hour, FreezeTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "handed over", report.HandedOver, 1)
	echoed(t, owned, "after\n")
	_ = process.Process.Kill()
	_ = process.Wait()
	_, _ = owned.Write([]byte("to nobody\n"))
	if rest, err := io.ReadAll(owned); len(rest) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the client of the dead process received %q, %v", rest, err)
	}
	echoed(t, kept, "kept\n")
	wantEqual(t, "connections of the predecessor", g.Status().Connections, 1)
	_ = kept.Close()
	g.served.Wait()
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
