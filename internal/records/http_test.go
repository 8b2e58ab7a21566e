package records

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// serve starts a server for the test, and returns its URL.
func serve(t *testing.T, handle http.HandlerFunc) string {
	t.Helper()
	server := httptest.NewServer(handle)
	t.Cleanup(server.Close)
	return server.URL
}

func TestURL(t *testing.T) {
	const text = "a\nb\n"
	gz := string(packGzip(t, text))
	for name, tt := range map[string]struct {
		handle http.HandlerFunc
		size   int64 // -1: unknown
		read   int64
	}{
		"length known": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(text)))
			io.WriteString(w, text)
		}, int64(len(text)), int64(len(text))},
		"length unknown": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, text)
			w.(http.Flusher).Flush()
		}, -1, int64(len(text))},
		"packed": {func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, gz)
		}, int64(len(gz)), int64(len(gz))},
		"encoded": {func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Accept-Encoding") != "identity" {
				t.Errorf("asked for the encoding %q", r.Header.Get("Accept-Encoding"))
			}
			w.Header().Set("Content-Encoding", "gzip")
			io.WriteString(w, gz)
		}, int64(len(gz)), int64(len(gz))},
		"redirected": {func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/there" {
				http.Redirect(w, r, "/there", http.StatusFound)
				return
			}
			io.WriteString(w, text)
		}, int64(len(text)), int64(len(text))},
		"with a password": {func(w http.ResponseWriter, r *http.Request) {
			if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" || r.FormValue("token") != "x" {
				w.WriteHeader(http.StatusUnauthorized)
			}
			io.WriteString(w, text)
		}, int64(len(text)), int64(len(text))},
	} {
		t.Run(name, func(t *testing.T) {
			host := strings.TrimPrefix(serve(t, tt.handle), "http://")
			s, err := Open(t.Context(), "HTTP://me:secret@"+host+"/data?token=x#y", nil, Options{})
			if err != nil {
				t.Fatal(err)
			}
			size, known := s.Size()
			if known != (tt.size >= 0) || size != max(tt.size, 0) {
				t.Errorf("size %d, %v; want %d", size, known, tt.size)
			}
			got, _, fatal := drain(t, s)
			if data(got) != text || fatal != nil || s.Consumed() != tt.read {
				t.Errorf("got %q, %v after %d bytes", data(got), fatal, s.Consumed())
			}
			if s.Name() != "http://"+host+"/data?..." {
				t.Errorf("name %s", s.Name())
			}
			if err := s.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
		})
	}
}

// An answer that is none, or ends too early, is an error that says so, and gives
// no secrets away.
func TestURLFails(t *testing.T) {
	for name, tt := range map[string]struct {
		handle http.HandlerFunc
		want   string // behind the URL
		got    string
	}{
		"status": {func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "go away", http.StatusForbidden)
		}, ": 403 Forbidden", ""},
		"partial": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusPartialContent)
		}, ": 206 Partial Content", ""},
		"redirects without end": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, r.URL.String()+"1", http.StatusFound)
		}, ": stopped after 10 redirects", ""},
		"encoding": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "br")
		}, `: sent in the encoding "br", which was not asked for`, ""},
		"no answer": {func(w http.ResponseWriter, _ *http.Request) {
			panic(http.ErrAbortHandler)
		}, ": connection closed without an answer", ""},
		"dropped, length known": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "a\nb\nincompl")
		}, ": connection closed after 11 of 100 bytes (records before: 2)", "a\nb\n"},
		"dropped, length unknown": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "a\nb\nincompl")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, ": connection closed after 11 bytes, before the end (records before: 2)", "a\nb\n"},
		"reset": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "a\nb\nincompl")
			w.(http.Flusher).Flush()
			conn, _, _ := http.NewResponseController(w).Hijack()
			conn.(*net.TCPConn).SetLinger(0)
			conn.Close()
		}, ": connection broke after 11 bytes: ", "a\nb\n"},
	} {
		t.Run(name, func(t *testing.T) {
			host := strings.TrimPrefix(serve(t, tt.handle), "http://")
			s, err := Open(t.Context(), "http://me:secret@"+host+"/data?token=secret", nil, Options{})
			var got []Record
			if err == nil {
				got, _, err = drain(t, s)
			}
			if want := "read http://" + host + "/data?..." + tt.want; err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("error %v, want %s", err, want)
			}
			if err != nil && (strings.Contains(err.Error(), "secret") || strings.HasSuffix(err.Error(), "EOF")) {
				t.Errorf("error %v", err)
			}
			// What came before a reset may be lost with it.
			if data(got) != tt.got && (name != "reset" || got != nil) {
				t.Errorf("got %q, want %q", data(got), tt.got)
			}
		})
	}
}

func TestURLRefused(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host := listener.Addr().String()
	listener.Close()
	for rawURL, want := range map[string]string{
		"http://me:secret@" + host + "/?secret": "read http://" + host + "/?...: dial tcp " + host + ": ",
		"http://me:se/cret@host/":               "read a URL: malformed",
		"http:///secret":                        "read a URL: malformed",
		"https://%zz":                           "read a URL: malformed",
	} {
		_, err := Open(t.Context(), rawURL, nil, Options{})
		if err == nil || !strings.HasPrefix(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: error %v, want %s", rawURL, err, want)
		}
	}
}

// The end of the context ends a download, with its cause.
func TestURLContextEnds(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "a\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	s, err := Open(ctx, url, nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for record, err := range s.All() {
		if err == nil {
			time.AfterFunc(time.Millisecond, func() { cancel(errEnough) }) // before or while it waits: all the same
		} else if !errors.Is(err, errEnough) {
			t.Errorf("got %v, %v", record, err)
		}
	}
	if s.err == nil {
		t.Error("no error")
	}
}

// Nothing is left of a download, whether all of it was read or not.
func TestURLLeavesNoConnection(t *testing.T) {
	for _, all := range []bool{true, false} {
		closed := make(chan struct{})
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "a\n")
			if !all {
				w.(http.Flusher).Flush()
				<-r.Context().Done()
			}
		}))
		server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateClosed {
				close(closed)
			}
		}
		server.Start()
		defer server.Close()
		s, err := Open(t.Context(), server.URL, nil, Options{})
		if err != nil {
			t.Fatal(err)
		}
		for range s.All() {
			if !all {
				break
			}
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		select {
		case <-closed:
		case <-time.After(10 * time.Second):
			t.Errorf("read all: %v: the connection is still open", all)
		}
	}
}

// trickle is a transport whose answers come a byte at a time, after pauses.
type trickle struct {
	pauses []time.Duration
	closed *bool
}

func (tr trickle) RoundTrip(req *http.Request) (*http.Response, error) {
	body := &trickleBody{ctx: req.Context(), trickle: tr}
	if err := body.pause(); err != nil {
		return nil, err
	}
	return &http.Response{StatusCode: http.StatusOK, Body: body, ContentLength: -1, Request: req}, nil
}

type trickleBody struct {
	ctx context.Context
	trickle
}

func (b *trickleBody) pause() error {
	pause := b.pauses[0]
	b.pauses = b.pauses[1:]
	select {
	case <-time.After(pause):
		return nil
	case <-b.ctx.Done():
		return b.ctx.Err()
	}
}

func (b *trickleBody) Read(p []byte) (int, error) {
	if len(b.pauses) == 0 {
		return 0, io.EOF
	}
	if err := b.pause(); err != nil {
		return 0, err
	}
	return copy(p, "\n"), nil
}

func (b *trickleBody) Close() error {
	*b.closed = true
	return nil
}

// A server that is slow is waited for; one from which nothing comes is given up.
// A user who is slow is not taken for a server that is.
func TestURLStalls(t *testing.T) {
	const slow, stalled = stallTimeout - time.Second, stallTimeout + time.Second
	for name, tt := range map[string]struct {
		pauses []time.Duration
		stalls bool
	}{
		"slow":             {[]time.Duration{slow, slow, slow}, false},
		"stalled":          {[]time.Duration{slow, slow, stalled}, true},
		"stalled at first": {[]time.Duration{stalled}, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				closed := false
				client := &http.Client{Transport: trickle{tt.pauses, &closed}}
				s, err := Open(t.Context(), "http://host/", nil, Options{HTTP: client})
				answered, n := err == nil, 0
				if answered {
					time.Sleep(stalled)
					for _, err = range s.All() {
						if err == nil {
							n++
							time.Sleep(stalled)
						}
					}
					if err := s.Close(); err != nil || !closed {
						t.Errorf("close: %v, of the body: %v", err, closed)
					}
				}
				want := len(tt.pauses) - 1 // the first is before the answer
				if tt.stalls {
					want--
				}
				if tt.stalls != errors.Is(err, errStalled) || n != max(want, 0) || answered != (len(tt.pauses) > 1) {
					t.Errorf("%d records, %v", n, err)
				}
			})
		})
	}
}
