package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fewFiles is the role of a server that runs out of files when told to.
const fewFiles = "few-files"

func init() { roles[fewFiles] = serveWithFewFiles }

func TestG11AServerThatIsReallyOutOfFilesRecovers(t *testing.T) {
	child := startWithFewFiles(t)
	first := dialTCP(t, child.addr)
	send(t, first, "x\n")
	receives(t, first, "x\n")

	child.does(t, "exhaust")
	queued := dialTCP(t, child.addr)
	send(t, queued, "y\n")
	_ = queued.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if n, err := queued.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a client was served with no file left: %d bytes, %v", n, err)
	}
	send(t, first, "still here\n")
	receives(t, first, "still here\n")

	child.does(t, "free")
	_ = queued.SetReadDeadline(time.Now().Add(30 * time.Second))
	receives(t, queued, "y\n")

	child.does(t, "exhaust")
	late := dialTCP(t, child.addr)
	child.does(t, "drain")
	for _, c := range []net.Conn{first, queued, late} { // each that leaves makes room for the next
		receives(t, c, "SHUTDOWN ")
		_ = c.(*net.TCPConn).CloseWrite()
		if rest, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(rest), " x\n") {
			t.Errorf("client received the notice's end %q, %v", rest, err)
		}
	}
	child.does(t, "wait")
}

type fewFilesChild struct {
	in   io.Writer
	out  *bufio.Reader
	addr net.Addr
}

func startWithFewFiles(t *testing.T) *fewFilesChild {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(context.Background(), self) // it ends with its input
	cmd.Env = append(os.Environ(), roleEnv+"="+fewFiles)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil && !t.Failed() {
			t.Errorf("child: %v", err)
		}
	})
	child := &fewFilesChild{in: in, out: bufio.NewReader(out)}
	child.addr, err = net.ResolveTCPAddr("tcp", child.does(t, "listen"))
	if err != nil {
		t.Fatal(err)
	}
	return child
}

// does has the child do something, and returns what it answers.
func (c *fewFilesChild) does(t *testing.T, what string) string {
	t.Helper()
	if _, err := fmt.Fprintln(c.in, what); err != nil {
		t.Fatalf("telling the child to %s: %v", what, err)
	}
	answer, err := c.out.ReadString('\n')
	if err != nil {
		t.Fatalf("telling the child to %s: %v", what, err)
	}
	return strings.TrimSpace(answer)
}

// serveWithFewFiles is the child.
func serveWithFewFiles() {
	must := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "child:", err)
			os.Exit(1)
		}
	}
	must(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 64, Max: 64}))
	s, err := New(Echo, Options{Notifier: DefaultLineNotifier()})
	must(err)
	served := make(chan error, 1)
	var hoard []*os.File
	for commands := bufio.NewScanner(os.Stdin); commands.Scan(); {
		answer := "done"
		switch commands.Text() {
		case "listen":
			ln, err := net.Listen("tcp4", "127.0.0.1:0")
			must(err)
			answer = ln.Addr().String()
			go func() { served <- s.Serve(ln) }()
		case "exhaust":
			for {
				f, err := os.Open(os.DevNull)
				if err != nil {
					break
				}
				hoard = append(hoard, f)
			}
		case "free":
			for _, f := range hoard {
				must(f.Close())
			}
			hoard = nil
		case "drain":
			s.StartDrain(DrainOptions{Grace: 20 * time.Second, Reason: "x"})
		case "wait":
			if err := <-served; !errors.Is(err, ErrServerClosed) {
				must(err)
			}
		}
		fmt.Println(answer)
	}
	must(s.Close())
}
