package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"echod/server"
)

// pauseByHand asks for a pause on conn as a caller without our client would, and reads the hold.
func pauseByHand(t *testing.T, conn net.Conn, more string) (Hold, *bufio.Reader) {
	t.Helper()
	_, err := io.WriteString(conn, "POST /v1/pause?while=connected HTTP/1.1\r\nHost: echod\r\nContent-Length: 19\r\n\r\n"+`{"reason":"backup"}`+more)
	if err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(conn)
	resp, err := http.ReadResponse(lines, nil) // its Close would wait for the stream's end
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "status", resp.StatusCode, http.StatusCreated)
	wantEqual(t, "type", resp.Header.Get("Content-Type"), "application/jsonl")
	lines = bufio.NewReader(resp.Body)
	var hold Hold
	readJSON(t, lines, &hold)
	wantEqual(t, "Location", resp.Header.Get("Location"), "/v1/holds/"+hold.ID)
	return hold, lines
}

// readJSON reads a line of a stream.
func readJSON(t *testing.T, lines *bufio.Reader, out any) {
	t.Helper()
	line, err := lines.ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(line, out); err != nil {
		t.Fatal(err)
	}
}

func TestPauseWhileConnectedDiesWithItsCaller(t *testing.T) {
	for _, caller := range []struct {
		name  string
		tail  string // in the same packet as the request
		leave func(*testing.T, net.Conn)
	}{
		{"closes", "", func(_ *testing.T, c net.Conn) { _ = c.Close() }},
		{"half-closes", "", func(_ *testing.T, c net.Conn) { _ = c.(*net.UnixConn).CloseWrite() }},
		{"sent one byte too many", "\n", func(_ *testing.T, c net.Conn) { _ = c.Close() }},
		{"sends a byte later", "", func(t *testing.T, c net.Conn) {
			if _, err := io.WriteString(c, "\n"); err != nil {
				t.Error(err)
			}
			_ = c.Close()
		}},
		{"sent another request behind it", "GET /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n", func(_ *testing.T, c net.Conn) { _ = c.Close() }},
	} {
		t.Run(caller.name, func(t *testing.T) {
			r := newRig(t, server.Options{})
			conn := r.rawConn(t)
			hold, _ := pauseByHand(t, conn, caller.tail)
			wantEqual(t, "state", r.srv.Status().State, server.StatePaused)
			wantEqual(t, "reason", hold.Reason, "backup")
			caller.leave(t, conn)
			r.await(t, server.StateRunning)
		})
	}
}

func TestStreamsGiveTheirPlaceUpWhenTheirCallerGoes(t *testing.T) {
	for _, request := range []string{"GET /v1/wait?connections=9999", "GET /v1/events", "POST /v1/pause?while=connected"} {
		t.Run(request, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newBubble(t, server.Options{})
				conn := r.rawConn(t)
				ask(t, conn, request+" HTTP/1.1\r\nHost: echod\r\n\r\n")
				synctest.Wait()
				wantEqual(t, "places taken", r.plane.streams.count(), 1)
				ask(t, conn, "\n") // the byte after which net/http no longer looks
				_ = conn.Close()
				synctest.Wait()
				wantEqual(t, "places taken once the caller has gone", r.plane.streams.count(), 0)
			})
		})
	}
}

func TestPauseWhileConnectedOutlastsEveryTimeLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		conn := r.rawConn(t)
		pauseByHand(t, conn, "\n")
		ask(t, conn, "GET /v1/status HTTP/1.1\r\nHost: echod\r\n\r\n") // which nobody answers
		time.Sleep(24 * time.Hour)
		wantEqual(t, "state a day later", r.srv.Status().State, server.StatePaused)
		_ = conn.Close()
		r.await(t, server.StateRunning)
	})
}

func TestPauseWhileConnectedSaysWhyItEnds(t *testing.T) {
	for _, end := range []struct {
		name string
		end  func(*rig)
		want Released
	}{
		{"resumed", func(r *rig) { _, _ = r.srv.Resume(server.Caller{}) }, Released{server.ErrResumed.Error(), "running"}},
		{"released", func(r *rig) { _ = r.srv.ReleaseHold("h1", server.Caller{}) }, Released{server.ErrReleased.Error(), "running"}},
		{"expired", func(*rig) { time.Sleep(time.Minute) }, Released{server.ErrExpired.Error(), "running"}},
		{"drained", func(r *rig) { r.srv.StartDrain(server.DrainOptions{Reason: "SIGTERM"}) }, Released{"", "draining"}},
	} {
		t.Run(end.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newBubble(t, server.Options{})
				r.echoClient(t) // keeps the drain from being over at once
				lease, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{TTL: time.Minute})
				if err != nil {
					t.Fatal(err)
				}
				defer lease.Close()
				wantEqual(t, "state", r.srv.Status().State, server.StatePaused)
				end.end(r)
				<-lease.Ended()
				if end.want.Released == "" {
					end.want.Released = (&server.DrainingError{Deadline: r.srv.Status().Drain.Deadline}).Error()
				}
				wantEqual(t, "last line", lease.why, end.want)
				wantEqual(t, "why", lease.Why(), end.want.Released)
			})
		})
	}
}

func TestProgramEndsOnlyWhenTheLastLineOfAPauseIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newBubble(t, server.Options{})
		_, lines := pauseByHand(t, r.rawConn(t), "")
		r.srv.StartDrain(server.DrainOptions{Reason: "SIGTERM"})
		<-r.srv.Done() // at once: there are no connections
		synctest.Wait()
		select {
		case <-r.ended:
			t.Error("the actors have returned before the caller was told")
		default:
		}
		var last Released
		readJSON(t, lines, &last)
		wantEqual(t, "state", last.State == "draining" || last.State == "stopped", true)
		<-r.ended
	})
}

func TestLeaseIsGivenUpByClosingIt(t *testing.T) {
	r := newRig(t, server.Options{})
	lease, err := r.client.PauseWhileConnected(t.Context(), PauseRequest{Reason: "backup"})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "holds", len(r.srv.Status().Holds), 1)
	wantEqual(t, "hold", lease.Hold.Reason, "backup")
	lease.Close()
	lease.Close()
	r.await(t, server.StateRunning)
}

func TestLeaseIsGivenUpByItsContext(t *testing.T) {
	r := newRig(t, server.Options{})
	ctx, cancel := context.WithCancelCause(t.Context())
	lease, err := r.client.PauseWhileConnected(ctx, PauseRequest{})
	if err != nil {
		t.Fatal(err)
	}
	defer lease.Close()
	cancel(errors.New("done"))
	r.await(t, server.StateRunning)
	<-lease.Ended()
	wantEqual(t, "why", lease.Why(), "the connection to the server has ended")
}

func TestStreamsNeedHijack(t *testing.T) {
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
		wantEqual(t, "state", r.srv.Status().State, server.StateRunning)
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
