package control

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"echod/server"
)

// ask sends text on conn, and returns a reader of what comes back.
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
		t.Errorf("reading what the server has to say: %v", err)
	}
	return string(text)
}

func TestHugeHeadersAreRefused(t *testing.T) {
	r := newRig(t, server.Options{})
	conn := r.rawConn(t)
	go func() {
		_, _ = fmt.Fprintf(conn, "GET /v1/status HTTP/1.1\r\nHost: echod\r\nX: %s\r\n\r\n", strings.Repeat("x", 1<<20))
	}()
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || answer != "HTTP/1.1 431 Request Header Fields Too Large\r\n" {
		t.Errorf("the answer is %q, %v: want 431", answer, err)
	}
}

func TestHugeBodiesAreRefused(t *testing.T) {
	for _, size := range []int{maxBody, 1 << 20} {
		r := newRig(t, server.Options{})
		body := `{"reason":"` + strings.Repeat("x", size) + `"}`
		got := r.do(t, http.MethodPost, "/v1/pause", body)
		wantEqual(t, "status", got.status, http.StatusRequestEntityTooLarge)
		want := `{"type":"urn:echod:problem:too-large","title":"Request too large","status":413,"detail":"body: more than 16384 bytes","field":"body"}` + "\n"
		wantEqual(t, "answer", got.body, want)
		wantEqual(t, "state", r.srv.Status().State, server.Running)
	}
}

func TestSlowHeadersEndTheConnection(t *testing.T) {
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
}

func TestHeadersThatTrickleGetNoMoreTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		go func() { _, _ = io.Copy(io.Discard, conn) }()
		began := time.Now()
		sent := 0
		for {
			if _, err := io.WriteString(conn, "G"); err != nil {
				break
			}
			sent++
			time.Sleep(600 * time.Millisecond)
		}
		wantEqual(t, "bytes taken", sent, 9)
		wantEqual(t, "time until a byte was refused", time.Since(began), headerTimeout+400*time.Millisecond)
	})
}

func TestSlowBodiesEndTheConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		began := time.Now()
		wantClosed(t, ask(t, conn, "POST /v1/pause HTTP/1.1\r\nHost: echod\r\nContent-Length: 10\r\n\r\n{"))
		if took := time.Since(began); took < requestTimeout || took > requestTimeout+time.Second {
			t.Errorf("the connection was closed after %s: want %s", took, requestTimeout)
		}
		wantEqual(t, "state", r.srv.Status().State, server.Running)
	})
}

func TestIdleConnectionsAreClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		lines := ask(t, conn, "GET /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n")
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
}

func TestStreamsNeedAConnectionThatCanBeTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		w := &plainWriter{header: http.Header{}}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/pause?while=connected", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		r.plane.ServeHTTP(w, req)
		wantEqual(t, "status", w.status, http.StatusInternalServerError)
		wantEqual(t, "problem", strings.Contains(w.body.String(), ProblemUnexpected), true)
		wantEqual(t, "state", r.srv.Status().State, server.Running)
	})
}

// plainWriter is a response of a server that cannot hand over its connections, as with HTTP/2.
type plainWriter struct {
	header http.Header
	status int
	body   strings.Builder
}

func (w *plainWriter) Header() http.Header         { return w.header }
func (w *plainWriter) WriteHeader(status int)      { w.status = status }
func (w *plainWriter) Write(p []byte) (int, error) { return w.body.Write(p) }
