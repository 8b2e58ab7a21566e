package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"echod/internal/text"
	"echod/server"
)

// ask sends text on conn, and returns a reader for the answer.
func ask(t *testing.T, conn net.Conn, text string) *bufio.Reader {
	t.Helper()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	return bufio.NewReader(conn)
}

// wantClosed checks that the server closes conn, and returns what came before.
func wantClosed(t *testing.T, conn io.Reader) string {
	t.Helper()
	text, err := io.ReadAll(conn)
	if err != nil {
		t.Errorf("reading until the end: %v", err)
	}
	return string(text)
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, errors.New("it took too long"))
	t.Cleanup(cancel)
	return ctx
}

const getStatus = "GET /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n"

// badCallers are callers that occupy connections. Each uses its own connection.
var badCallers = []struct {
	name string
	call func(io.Writer)
}{
	{"that send nothing", func(io.Writer) {}},
	{"that send half a header", func(w io.Writer) { _, _ = io.WriteString(w, "GET /v1/sta") }},
	{"whose header trickles in", func(w io.Writer) {
		for _, err := io.WriteString(w, "GET /v1/status HTTP/1.1\r\nX: "); err == nil; _, err = io.WriteString(w, "x") {
			time.Sleep(100 * time.Millisecond)
		}
	}},
	{"that send half a body", func(w io.Writer) {
		_, _ = io.WriteString(w, "POST /v1/pause HTTP/1.1\r\nHost: echod\r\nContent-Length: 100\r\n\r\n{")
	}},
	{"that do not read the answer", func(w io.Writer) { _, _ = io.WriteString(w, getStatus) }},
	{"that keep the connection after an answer", func(w io.Writer) {
		_, _ = io.WriteString(w, getStatus)
		if r, ok := w.(io.Reader); ok {
			_, _ = io.Copy(io.Discard, r)
		}
	}},
	{"that wait", func(w io.Writer) {
		_, _ = io.WriteString(w, "GET /v1/wait?connections=9999 HTTP/1.1\r\nHost: echod\r\n\r\n")
	}},
	{"that follow the events and do not read them", func(w io.Writer) {
		_, _ = io.WriteString(w, "GET /v1/events HTTP/1.1\r\nHost: echod\r\n\r\n")
	}},
}

func TestG16AnswersWithinASecond(t *testing.T) {
	for _, bad := range badCallers {
		for _, state := range []string{"running", "draining"} {
			t.Run("the control socket answers at once while "+state+", with callers "+bad.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					r := newBubble(t, server.Options{Drain: server.DrainOptions{Grace: time.Hour}})
					r.echoClient(t)
					if state == "draining" {
						r.srv.StartDrain(server.DrainOptions{Reason: "upgrade"})
						synctest.Wait()
					}
					var calling sync.WaitGroup
					t.Cleanup(calling.Wait) // after the connections are closed
					for range 3 * MaxCallers {
						conn := r.rawConn(t)
						calling.Go(func() { bad.call(conn) })
						synctest.Wait()
					}
					time.Sleep(50 * time.Millisecond)
					began := time.Now()
					wantEqual(t, "state", must[Status](t)(r.client.Status(t.Context())).State, state)
					wantEqual(t, "time until the answer", time.Since(began), time.Duration(0))
					if open := r.plane.listeners[0].count(); open > MaxCallers {
						t.Errorf("%d connections are open, want at most %d", open, MaxCallers)
					}
				})
			})
		}
	}
	for _, path := range []string{"/livez", "/readyz", "/metrics"} {
		t.Run("probes are answered at once with callers that do not read "+path, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { testProbes(t, path) })
		})
	}
	t.Run("pauses while connected are kept", testKeptPauses)
	t.Run("forgotten waits do not make a pause fail", testForgottenWaits)
	t.Run("a request that is not read yet outlasts silent connections", testUnread)
	t.Run("out of files, the idlest caller gives way", testOutOfFiles)
	t.Run("an answer that is not written yet is not cut off", testUnwritten)
	t.Run("connections that linger after their answer give way", testLingering)
}

func testProbes(t *testing.T, path string) {
	endless := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for chunk := make([]byte, 1<<16); ; {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	ln := newPipeListener()
	newBubble(t, server.Options{}, func(r *rig) actor {
		return pair(NewWeb(r.srv, Options{Metrics: endless}).Actor(ln))
	})
	call := func(path string) *bufio.Reader {
		nc, err := ln.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = nc.Close() })
		go func() { _, _ = fmt.Fprintf(nc, "GET %s HTTP/1.1\r\nHost: echod\r\n\r\n", path) }()
		return bufio.NewReader(nc)
	}
	for range 2 * MaxCallers {
		call(path)
	}
	synctest.Wait()
	began := time.Now()
	answer, err := http.ReadResponse(call("/livez"), nil)
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "status", answer.StatusCode, http.StatusOK)
	wantEqual(t, "time until the answer", time.Since(began), time.Duration(0))
}

func testKeptPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		for range MaxCallers / 3 {
			pauseByHand(t, r.rawConn(t), "")
			time.Sleep(time.Minute)
		}
		_, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{})
		wantEqual(t, "status of one more", wantProblem(t, err, ProblemBusy).Status, http.StatusServiceUnavailable)
		for range 2 * MaxCallers {
			ask(t, r.rawConn(t), "GET /v1/events HTTP/1.1\r\nHost: echod\r\n\r\n")
			synctest.Wait()
		}
		wantEqual(t, "holds", len(r.srv.Status().Holds), MaxCallers/3)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{})) // an ordinary one is still possible
	})
}

func testForgottenWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		ctx, cancel := context.WithCancel(t.Context())
		collect := r.follow(ctx, t) // the oldest, and not the idlest
		time.Sleep(time.Second)
		first := make(chan error, 1)
		go func() {
			_, err := r.client.Wait(t.Context(), WaitRequest{State: "draining"})
			first <- err
		}()
		time.Sleep(time.Second)
		for range MaxCallers*2/3 - 2 {
			ask(t, r.rawConn(t), "GET /v1/wait?connections=9999 HTTP/1.1\r\nHost: echod\r\n\r\n")
			time.Sleep(time.Second)
		}
		wantEqual(t, "requests that last", r.plane.streams.count(), MaxCallers*2/3)
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
		synctest.Wait()
		lease, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{})
		if err != nil {
			t.Fatal(err)
		}
		defer lease.Close()
		problem := wantProblem(t, receive(t, "the answer to the oldest wait", first), ProblemBusy)
		wantEqual(t, "its status", problem.Status, http.StatusServiceUnavailable)
		synctest.Wait()
		cancel()
		var seen []string
		for _, e := range collect() {
			seen = append(seen, e.Type)
		}
		wantEqual(t, "events", seen, []string{"hold", "state", "hold"})
	})
}

// testUnread has a flood of connections come before net/http has read a caller's request.
func testUnread(t *testing.T) {
	path := filepath.Join(shortDir(t), "s")
	socket := listenControl(t, path)
	defer socket.Close()
	l := newCallerListener(socket, 4)
	dial := func(text string) net.Conn {
		t.Helper()
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		ask(t, conn, text)
		accepted, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = accepted.Close() })
		return conn
	}
	first := dial("")
	asking := dial(getStatus)
	for range 20 {
		dial("")
	}
	if _, err := first.Read(make([]byte, 1)); err == nil {
		t.Error("the first caller, which was silent, is still connected")
	}
	if _, err := asking.Write([]byte("x")); err != nil {
		t.Errorf("the caller that has sent a request: %v", err)
	}
}

func testOutOfFiles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipeListener()
		l := newCallerListener(ln, MaxCallers)
		idle, err := ln.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer idle.Close()
		if _, err := l.Accept(); err != nil {
			t.Fatal(err)
		}
		accepted := make(chan net.Conn, 1)
		go func() {
			c, _ := l.Accept()
			accepted <- c
		}()
		ln.fail <- &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", syscall.EMFILE)}
		if _, err := idle.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("the idle caller reads %v, want the end", err)
		}
		if _, err := ln.Dial(t.Context()); err != nil {
			t.Fatal(err)
		}
		_ = (<-accepted).Close()
	})
}

// testUnwritten has a flood of connections come while net/http writes an answer, after ServeHTTP has returned.
func testUnwritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		answer := ask(t, r.rawConn(t), getStatus) // a pipe has no buffer
		synctest.Wait()
		for range 2 * MaxCallers {
			r.rawConn(t)
			synctest.Wait()
		}
		resp, err := http.ReadResponse(answer, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(resp.Body); err != nil {
			t.Error(err)
		}
	})
}

// testLingering has callers whose bodies are too large: net/http keeps their connections for half a second after the
// answer, so that they can read it.
func testLingering(t *testing.T) {
	r := newRig(t, server.Options{})
	wait := make(chan error, 1)
	go func() {
		_, err := r.client.Wait(t.Context(), WaitRequest{Connections: new(1)})
		wait <- err
	}()
	r.awaitStreams(t, 1)
	huge := fmt.Sprintf("POST /v1/pause HTTP/1.1\r\nHost: echod\r\nContent-Length: %d\r\n\r\n%s", 1<<20, strings.Repeat(" ", maxBody+1))
	for range 3 * MaxCallers {
		conn := r.rawConn(t)
		if text := wantClosed(t, ask(t, conn, huge)); !strings.HasPrefix(text, "HTTP/1.1 413 ") {
			t.Fatalf("the answer is %q: want 413", text)
		}
		_ = conn.Close()
	}
	r.echoClient(t)
	wantEqual(t, "error of the wait", receive(t, "the wait", wait), nil)
}

func TestHalfClose(t *testing.T) {
	r := newRig(t, server.Options{})
	c := r.echoClient(t)
	halfClosed := func(t *testing.T, request string) net.Conn {
		t.Helper()
		conn := r.rawConn(t)
		ask(t, conn, request)
		if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	post := func(path, body string) string {
		return fmt.Sprintf("POST %s HTTP/1.1\r\nHost: echod\r\nContent-Length: %d\r\n\r\n%s", path, len(body), body)
	}
	for _, request := range []struct{ text, want string }{
		{getStatus, `"state":"running"`},
		{post("/v1/notify", `{"text":"hello"}`), `{"sent":1,"failed":0}`},
		{"GET /v1/wait?state=draining&timeout=50ms HTTP/1.1\r\nHost: echod\r\n\r\n", "408 Request Timeout"},
	} {
		t.Run(strings.Fields(request.text)[1]+" is answered whole", func(t *testing.T) {
			if got := wantClosed(t, halfClosed(t, request.text)); !strings.Contains(got, request.want) {
				t.Errorf("the answer is %q, want %q in it", got, request.want)
			}
		})
	}
	t.Run("events continue", func(t *testing.T) {
		lines := bufio.NewReader(halfClosed(t, "GET /v1/events HTTP/1.1\r\nHost: echod\r\n\r\n"))
		for line := ""; line != "\r\n"; {
			line, _ = lines.ReadString('\n')
		}
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
		must[Change](t)(r.client.Resume(t.Context()))
		for _, kind := range []string{"hold", "state", "released", "state"} {
			var e Event
			readJSON(t, lines, &e)
			wantEqual(t, "type", e.Type, kind)
		}
	})
	t.Run("a caller that then closes ends its wait", func(t *testing.T) {
		r.awaitStreams(t, 0)
		conn := halfClosed(t, "GET /v1/wait?connections=9999 HTTP/1.1\r\nHost: echod\r\n\r\n")
		r.awaitStreams(t, 1)
		_ = conn.Close()
		r.awaitStreams(t, 0)
	})
	wantEqual(t, "notice", receive(t, "the notice", c.lines), "NOTICE hello\n")
}

// TestGoneCaller has requests read only after their callers have given up, as when the server was stopped.
func TestGoneCaller(t *testing.T) {
	srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(shortDir(t), "control.sock")
	socket := listenControl(t, path)
	for _, request := range []string{"POST /v1/pause", "POST /v1/pause?while=connected", "POST /v1/shutdown", "DELETE /v1/conns?all=true"} {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		ask(t, conn, request+" HTTP/1.1\r\nHost: echod\r\nContent-Length: 0\r\n\r\n")
		_ = conn.Close()
	}
	events := srv.Subscribe()
	plane := New(srv, Options{})
	served := make(chan error, 1)
	go func() { served <- plane.Serve(socket) }()
	client := NewClient(path)
	defer client.Close()
	st := must[Status](t)(client.Status(t.Context()))
	wantEqual(t, "state", st.State, "starting")
	if err := plane.Shutdown(within(t, patience)); err != nil { // once all requests are answered
		t.Error(err)
	}
	wantEqual(t, "what Serve returns", errors.Is(<-served, http.ErrServerClosed), true)
	_ = srv.Close()
	var seen []string
	for e := range events.Events(t.Context()) {
		seen = append(seen, string(e.Type)+" "+e.State.String())
	}
	wantEqual(t, "events", seen, []string{"state draining", "state stopped"})
}

func TestBounds(t *testing.T) {
	t.Run("huge headers are refused", func(t *testing.T) {
		r := newRig(t, server.Options{})
		conn := r.rawConn(t)
		go func() {
			_, _ = fmt.Fprintf(conn, "GET /v1/status HTTP/1.1\r\nHost: echod\r\nX: %s\r\n\r\n", strings.Repeat("x", 64<<10))
		}()
		answer, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil || answer != "HTTP/1.1 431 Request Header Fields Too Large\r\n" {
			t.Errorf("the answer is %q, %v: want 431", answer, err)
		}
	})
	t.Run("huge bodies are refused", func(t *testing.T) {
		r := newRig(t, server.Options{})
		for _, size := range []int{maxBody, 1 << 20} {
			body := `{"reason":"` + strings.Repeat("x", size) + `"}`
			got := r.do(t, http.MethodPost, "/v1/pause", body)
			wantEqual(t, "status", got.status, http.StatusRequestEntityTooLarge)
			want := `{"type":"urn:echod:problem:too-large","title":"Request too large","status":413,"detail":"body: more than 16384 bytes","field":"body"}` + "\n"
			wantEqual(t, "answer", got.body, want)
			wantEqual(t, "state", r.srv.Status().State, server.StateRunning)
		}
	})
	t.Run("slow headers end the connection", func(t *testing.T) {
		for _, sent := range []string{"", "GET", "GET /v1/status HTTP/1.1\r\nHost: echod\r\n"} {
			synctest.Test(t, func(t *testing.T) {
				r := newBubble(t, server.Options{})
				conn := r.rawConn(t)
				began := time.Now()
				if got := wantClosed(t, ask(t, conn, sent)); got != "" && !strings.HasPrefix(got, "HTTP/1.1 400 ") {
					t.Errorf("the answer is %q: want none, or 400", got)
				}
				wantEqual(t, "time given", time.Since(began), headerTimeout)
			})
		}
	})
	t.Run("slow headers get no more time", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newBubble(t, server.Options{})
			conn := r.rawConn(t)
			go func() { _, _ = io.Copy(io.Discard, conn) }()
			began := time.Now()
			for {
				if _, err := io.WriteString(conn, "G"); err != nil {
					break
				}
				time.Sleep(600 * time.Millisecond)
			}
			wantEqual(t, "time until a byte was refused", time.Since(began), headerTimeout+400*time.Millisecond)
		})
	})
	t.Run("slow bodies end the connection", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newBubble(t, server.Options{})
			began := time.Now()
			wantClosed(t, ask(t, r.rawConn(t), "POST /v1/pause HTTP/1.1\r\nHost: echod\r\nContent-Length: 10\r\n\r\n{"))
			if took := time.Since(began); took < requestTimeout || took > requestTimeout+time.Second {
				t.Errorf("the connection was closed after %s: want %s", took, requestTimeout)
			}
			wantEqual(t, "state", r.srv.Status().State, server.StateRunning)
		})
	})
	t.Run("idle connections are closed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			r := newBubble(t, server.Options{})
			lines := ask(t, r.rawConn(t), getStatus)
			resp, err := http.ReadResponse(lines, nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			wantClosed(t, lines)
			wantEqual(t, "time given", time.Since(began), idleTimeout)
		})
	})
}

func TestProbe(t *testing.T) {
	t.Run("finds the plane alive", testProbeAlive)
	t.Run("needs no place among the callers", testProbePlace)
	t.Run("finds a plane that does not accept", testProbeDeaf)
	t.Run("finds a plane that does not answer", testProbeMute)
}

func testProbeAlive(t *testing.T) {
	r := newRig(t, server.Options{})
	var mu sync.Mutex
	seen := 0
	r.plane.onRequest = func(string, string, int) {
		mu.Lock()
		defer mu.Unlock()
		seen++
	}
	if err := os.Chmod(r.socket, 0); err != nil { // as systemd's may be for this process
		t.Fatal(err)
	}
	errs := make([]error, 8)
	var probes sync.WaitGroup
	for i := range errs {
		probes.Go(func() {
			for n := 0; n < 20 && errs[i] == nil; n++ {
				errs[i] = r.plane.Probe(within(t, patience))
			}
		})
	}
	probes.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(r.socket, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Status(t.Context()); err != nil {
		t.Errorf("a caller after that: %v", err)
	}
	mu.Lock()
	defer mu.Unlock()
	wantEqual(t, "requests reported to OnRequest", seen, 1) // the caller's
}

func testProbePlace(t *testing.T) {
	r := newRig(t, server.Options{})
	for range MaxCallers {
		ask(t, r.rawConn(t), getStatus)
	}
	for r.plane.listeners[0].count() < MaxCallers {
		time.Sleep(time.Millisecond)
	}
	for range 3 {
		if err := r.plane.Probe(within(t, patience)); err != nil {
			t.Error(err)
		}
	}
	wantEqual(t, "callers", r.plane.listeners[0].count(), MaxCallers)
}

// stuckListener does not return from Accept, even after its deadline.
type stuckListener struct {
	net.Listener
	entered chan struct{}
}

func (l stuckListener) Accept() (net.Conn, error) {
	close(l.entered)
	return l.Listener.Accept()
}

func (l stuckListener) SetDeadline(time.Time) error { return nil }

func testProbeDeaf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
		if err != nil {
			t.Fatal(err)
		}
		defer srv.Close()
		plane := New(srv, Options{})
		const unserved = "probing the control plane: it is not served"
		if err := plane.Probe(t.Context()); err == nil || err.Error() != unserved {
			t.Errorf("before it is served: %v, want %s", err, unserved)
		}
		ln := stuckListener{newPipeListener(), make(chan struct{})}
		served := make(chan error, 1)
		go func() { served <- plane.Serve(ln) }()
		<-ln.entered
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if err := plane.Probe(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the probe says %v, want that time ran out", err)
			}
			cancel()
		}
		if err := plane.Shutdown(t.Context()); err != nil {
			t.Error(err)
		}
		<-served
	})
}

func testProbeMute(t *testing.T) {
	r := newRig(t, server.Options{})
	held, release := make(chan struct{}), make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	var holding sync.WaitGroup
	holding.Go(func() { // holds the server's lock, without which there is no status
		_ = r.srv.AwaitStatus(ctx, func(server.State, int) bool {
			close(held)
			<-release
			return true
		})
	})
	<-held
	probed, stop := context.WithTimeout(t.Context(), 20*time.Millisecond)
	if err := r.plane.Probe(probed); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the probe says %v, want that time ran out", err)
	}
	stop()
	close(release)
	holding.Wait()
	cancel()
	if err := r.plane.Probe(within(t, patience)); err != nil {
		t.Errorf("after that: %v", err)
	}
}

func TestAudit(t *testing.T) {
	if peerOf == nil {
		t.Skip("this platform does not tell who calls")
	}
	who := map[string]any{"uid": int64(os.Getuid()), "pid": int64(os.Getpid())}
	t.Run("holds name who placed them", func(t *testing.T) {
		r := newRig(t, server.Options{})
		hold := must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
		wantEqual(t, "uid", hold.UID, new(os.Getuid()))
		wantEqual(t, "pid", hold.PID, new(os.Getpid()))
		lease, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{})
		if err != nil {
			t.Fatal(err)
		}
		defer lease.Close()
		wantEqual(t, "pid of a lease", lease.Hold.PID, new(os.Getpid()))
		info := r.srv.Status().Holds[0]
		wantEqual(t, "uid and pid in the server", [2]int{info.By.UID, info.By.PID}, [2]int{os.Getuid(), os.Getpid()})
	})
	t.Run("every change is logged with its caller", func(t *testing.T) {
		r := newRig(t, server.Options{})
		r.echoClient(t)
		for _, request := range []struct {
			method, target, body string
			status               int
			problem              string
		}{
			{"POST", "/v1/pause", `{"reason":"backup"}`, http.StatusCreated, ""},
			{"DELETE", "/v1/holds/h1", ``, http.StatusOK, ""},
			{"POST", "/v1/resume", ``, http.StatusOK, ""},
			{"POST", "/v1/notify", `{"text":"hello"}`, http.StatusOK, ""},
			{"DELETE", "/v1/conns/1", ``, http.StatusOK, ""},
			{"DELETE", "/v1/conns?all=true", ``, http.StatusOK, ""},
			{"DELETE", "/v1/holds/h9", ``, http.StatusNotFound, `no such hold: "h9"`},
			{"POST", "/v1/pause", `{"ttl":"-1s"}`, http.StatusBadRequest, "ttl: -1s is negative"},
			{"POST", "/v1/shutdown", `{"grace":"1h"}`, http.StatusAccepted, ""},
			{"PATCH", "/v1/status", ``, http.StatusMethodNotAllowed, "PATCH is not allowed here: want GET, HEAD"},
			{"POST", "/v1/%C2%9B31m%E2%80%AE", ``, http.StatusNotFound, `nothing is at /v1/\u009b31m\u202e`},
		} {
			r.logs.TakeAll()
			what := request.method + " " + request.target
			wantEqual(t, what+": status", r.do(t, request.method, request.target, request.body).status, request.status)
			r.do(t, http.MethodGet, "/v1/status", "") // on the same connection, so that the line above has been written

			req, _ := http.NewRequest(request.method, "http://echod"+request.target, nil)
			want := map[string]any{"method": request.method, "path": text.Printable(req.URL.Path), "uid": who["uid"], "pid": who["pid"], "user": userName(t)}
			if request.problem != "" {
				want["status"], want["error"] = int64(request.status), request.problem
			}
			lines := r.logs.FilterMessage("control request").All()
			if len(lines) != 1 {
				t.Errorf("%s: %d lines in the log: want one", what, len(lines))
				continue
			}
			wantEqual(t, what+": line in the log", lines[0].ContextMap(), want)
			wantEqual(t, what+": level", lines[0].Level, zap.InfoLevel)
		}
	})
	t.Run("released holds name who released them", func(t *testing.T) {
		r := newRig(t, server.Options{})
		events := r.srv.Subscribe()
		defer events.Close()
		hold := must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{Reason: "backup"}))
		must[Change](t)(r.client.ReleaseHold(t.Context(), hold.ID))
		must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{Reason: "upgrade"}))
		must[Change](t)(r.client.Resume(t.Context()))
		lines := r.logs.FilterMessage("hold released").All()
		wantEqual(t, "lines in the log", len(lines), 2)
		for i, reason := range []string{"backup", "upgrade"} {
			got := lines[i].ContextMap()
			want := map[string]any{"reason": reason, "placed_by_uid": who["uid"], "placed_by_pid": who["pid"], "released_by_uid": who["uid"], "released_by_pid": who["pid"]}
			for key, value := range want {
				wantEqual(t, reason+": "+key, got[key], value)
			}
		}
		released := 0
		for e := range events.Events(t.Context()) {
			if e.Type == server.EventHoldReleased {
				wantEqual(t, "who released it, in the event", e.By, server.Caller{UID: os.Getuid(), PID: os.Getpid(), User: userName(t)})
				if released++; released == 2 {
					break
				}
			}
		}
	})
	t.Run("what a caller claims about itself is shown with its hold, and logged", func(t *testing.T) {
		r := newRig(t, server.Options{})
		for claims, want := range map[string]string{
			"sudo user alice, login uid 1000": "sudo user alice, login uid 1000",
			"\u202etwisted":                   "", // no line of text
			strings.Repeat("x", maxClaims+1):  "",
		} {
			r.logs.TakeAll()
			r.client.Claims = claims
			r.client.Close() // claims belong to a request, not to a connection
			hold := must[Hold](t)(r.client.Pause(t.Context(), PauseRequest{}))
			wantEqual(t, "claims of the hold", hold.Claims, want)
			wantEqual(t, "user of the hold", hold.User, userName(t))
			must[Change](t)(r.client.Resume(t.Context()))
			got, _ := r.logs.FilterMessage("hold released").All()[0].ContextMap()["released_by_claims"].(string)
			wantEqual(t, "claims in the log", got, want)
		}
	})
	t.Run("reading is not logged", func(t *testing.T) {
		r := newRig(t, server.Options{})
		for _, target := range []string{"/v1/status", "/v1/conns", "/v1/nothing", "/v1/conns?limit=x"} {
			r.do(t, http.MethodGet, target, "")
		}
		wantEqual(t, "lines in the log", r.logs.FilterMessage("control request").Len(), 0)
	})
	t.Run("lines stay short", func(t *testing.T) {
		r := newRig(t, server.Options{})
		long := strings.Repeat("0123456789", 600)
		r.logs.TakeAll()
		r.do(t, http.MethodDelete, "/v1/holds/"+long, "")
		r.do(t, http.MethodPost, "/v1/pause", `{"`+long+`":1}`)
		r.do(t, http.MethodGet, "/v1/status", "")
		lines := r.logs.FilterMessage("control request").All()
		wantEqual(t, "lines in the log", len(lines), 2)
		for _, line := range lines {
			for key, value := range line.ContextMap() {
				if text, ok := value.(string); ok && len(text) > maxDetail+10 {
					t.Errorf("%s has %d bytes: want at most %d", key, len(text), maxDetail+10)
				}
			}
		}
	})
}

// userName is the name of the user that runs the test.
func userName(t *testing.T) string {
	t.Helper()
	u, err := user.LookupId(strconv.Itoa(os.Getuid()))
	if err != nil {
		t.Skip("the user has no name")
	}
	return u.Username
}
