package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"echod/server"
)

// malformed makes a malformed request. Some of them leave the server waiting for more.
func malformed(rnd *rand.Rand) (what, request string) {
	noise := func(n int) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		return string(b)
	}
	targets := []string{"/v1/pause", "/v1/pause?while=connected", "/v1/resume", "/v1/notify", "/v1/shutdown", "/v1/conns", "/v1/status", "/v1/" + noise(5)}
	target := targets[rnd.IntN(len(targets))]
	post := func(header, body string) string {
		return "POST " + target + " HTTP/1.1\r\nHost: echod\r\n" + header + "\r\n" + body
	}
	switch what = []string{
		"noise", "long noise", "noise for a body", "half a body", "huge header", "many headers", "bad chunk", "two lengths",
		"half a header", "nothing", "huge body", "bad method", "another protocol", "many requests", "stray bytes",
	}[rnd.IntN(15)]; what {
	case "noise":
		return what, noise(rnd.IntN(200)) + "\r\n\r\n"
	case "long noise":
		return what, noise(100_000)
	case "noise for a body":
		n := rnd.IntN(500)
		return what, post(fmt.Sprintf("Content-Length: %d\r\n", n), noise(n))
	case "half a body":
		return what, post("Content-Length: 1000\r\n", `{"reason":"x`)
	case "huge header":
		return what, post("X: "+strings.Repeat("x", 64<<10)+"\r\n", "")
	case "many headers":
		return what, post(strings.Repeat("X: y\r\n", 5000), "")
	case "bad chunk":
		return what, post("Transfer-Encoding: chunked\r\n", "zz\r\n"+noise(20))
	case "two lengths":
		return what, post("Content-Length: 5\r\nContent-Length: 6\r\n", `{}`)
	case "half a header":
		return what, "GET /v1/status HTTP/1.1\r\nHost: ech"
	case "nothing":
		return what, ""
	case "huge body":
		return what, post("Content-Length: 200000\r\n", `{"reason":"`+strings.Repeat("x", 200_000-11))
	case "bad method":
		return what, "P\x00ST /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n"
	case "another protocol":
		return what, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + noise(100)
	case "many requests":
		return what, strings.Repeat("GET /v1/nothing HTTP/1.1\r\nHost: echod\r\n\r\n", 20)
	default:
		return what, "GET /v1/conns HTTP/1.1\r\nHost: echod\r\n\r\n" + noise(300)
	}
}

// TestMalformedRequests makes malformed requests while clients echo. Echoes come back whole and in time, every request
// is answered or its connection closed, and no file is left open.
func TestMalformedRequests(t *testing.T) {
	const requests, attackers, echoers = 400, 32, 4
	before := openFiles(t)
	r := newRig(t, server.Options{Drain: server.DrainOptions{Grace: time.Minute}}, func(r *rig) actor {
		r.plane.http.ReadHeaderTimeout = 200 * time.Millisecond
		r.plane.http.ReadTimeout = 400 * time.Millisecond
		r.plane.http.IdleTimeout = 400 * time.Millisecond
		return actor{}
	})

	ctx, cancel := context.WithCancelCause(t.Context())
	var echoing, attacking sync.WaitGroup
	for range echoers {
		echoing.Go(func() { r.echoUntil(ctx, t) })
	}
	next := make(chan uint64)
	for range attackers {
		attacking.Go(func() {
			for seed := range next {
				r.attack(t, seed)
			}
		})
	}
	for seed := range uint64(requests) {
		next <- seed
	}
	close(next)
	attacking.Wait()

	// The server answers, and no request was taken for a good one.
	st := must[Status](t)(r.client.Status(t.Context()))
	if st.State == "draining" {
		t.Error("a malformed request began a drain")
	}
	cancel(errors.New("enough"))
	echoing.Wait()
	r.awaitConns(t, 0)

	// The run group ends once every connection has.
	r.client.Close()
	r.srv.StartDrain(server.DrainOptions{Reason: "done"})
	receive(t, "the end", r.ended)
	if after := openFiles(t); after > before { // fewer if one of an earlier test was still being closed
		t.Errorf("%d files are open, want at most %d, as before", after, before)
	}
}

// echoUntil echoes lines until ctx ends.
func (r *rig) echoUntil(ctx context.Context, t *testing.T) {
	conn, err := r.dialEcho(t.Context())
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	got := make([]byte, 4096)
	for n := 0; ctx.Err() == nil; n++ {
		line := []byte(strings.Repeat(fmt.Sprint(n, " "), 1000)[:1+n%len(got)])
		_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := conn.Write(line); err != nil {
			t.Errorf("sending line %d: %v", n, err)
			return
		}
		if _, err := io.ReadFull(conn, got[:len(line)]); err != nil || string(got[:len(line)]) != string(line) {
			t.Errorf("line %d does not come back as it was: %v", n, err)
			return
		}
	}
}

// attack makes one malformed request, and either waits for the server or closes at once.
func (r *rig) attack(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	conn, err := r.dialControl(t.Context())
	if err != nil {
		t.Errorf("seed %d: %v", seed, err)
		return
	}
	defer conn.Close()
	what, request := malformed(rnd)
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, request); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("seed %d, %s: the server stopped reading without closing", seed, what)
	}
	switch rnd.IntN(3) {
	case 0:
		return
	case 1:
		_ = conn.(*net.UnixConn).CloseWrite()
	}
	if strings.Contains(request, "while=connected") {
		return // may be a good request, which lasts
	}
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("seed %d, %s: the server did not close", seed, what)
	}
}

// openFiles returns the number of open files, or -1 if it is not known.
func openFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(files)
}
