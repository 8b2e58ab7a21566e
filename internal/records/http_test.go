package records

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// serve starts a web server for the test, and returns its URL.
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
			if user, password, _ := r.BasicAuth(); user != "me" || password != "secret" ||
				r.FormValue("token") != "x" {
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

// A response that fails, or ends too early, is an error without the secrets of the URL.
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
		}, `: the server uses the encoding "br", which was not asked for`, ""},
		"no answer": {func(w http.ResponseWriter, _ *http.Request) {
			panic(http.ErrAbortHandler)
		}, ": connection closed without a response", ""},
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
			s, err := Open(t.Context(), "http://me:secret@"+host+"/data?token=secret", nil, Options{HTTP: HTTPOptions{Retries: -1}})
			var got []Record
			if err == nil {
				got, _, err = drain(t, s)
			}
			if want := "read http://" + host + "/data?..." + tt.want; err == nil ||
				!strings.HasPrefix(err.Error(), want) {
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
		"http://me:se/cret@host/":               "read URL: malformed",
		"http:///secret":                        "read URL: malformed",
		"https://%zz":                           "read URL: malformed",
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
			time.AfterFunc(time.Millisecond, func() { cancel(errEnough) }) // before or while it waits
		} else if !errors.Is(err, errEnough) {
			t.Errorf("got %v, %v", record, err)
		}
	}
	if s.err == nil {
		t.Error("no error")
	}
}

// A download leaves no connection, whether all of it was read or not.
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

// trickle is a transport whose responses come a byte at a time, after pauses.
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

// A server from which nothing comes for a minute is given up. A slow server, and a slow
// consumer, are not.
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
				opts := HTTPOptions{Transport: trickle{tt.pauses, &closed}, Retries: -1}
				s, err := Open(t.Context(), "http://host/", nil, Options{HTTP: opts})
				responded, n := err == nil, 0
				if responded {
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
				want := len(tt.pauses) - 1 // the first is before the response
				if tt.stalls {
					want--
				}
				if tt.stalls != errors.Is(err, errStalled) || n != max(want, 0) ||
					responded != (len(tt.pauses) > 1) {
					t.Errorf("%d records, %v", n, err)
				}
			})
		})
	}
}

// transport answers requests in memory, so that a test in a bubble has its own time.
type transport func(*http.Request) *http.Response

func (tr transport) RoundTrip(req *http.Request) (*http.Response, error) {
	resp := tr(req)
	if resp == nil {
		return nil, io.EOF
	}
	resp.Request = req
	return resp, nil
}

// response returns a response whose body breaks after the first cut bytes, unless cut
// is negative.
func response(status int, header map[string]string, body string, cut int) *http.Response {
	resp := &http.Response{StatusCode: status, Header: http.Header{}, ContentLength: int64(len(body))}
	for name, value := range header {
		resp.Header.Set(name, value)
	}
	var r io.Reader = strings.NewReader(body)
	if cut >= 0 {
		r = io.MultiReader(strings.NewReader(body[:cut]), iotest.ErrReader(io.ErrUnexpectedEOF))
	}
	resp.Body = io.NopCloser(r)
	return resp
}

// A download that breaks continues from where it broke, or from the beginning if the
// server cannot, and never joins two versions.
func TestURLContinuesAfterABreak(t *testing.T) {
	const text = "one\ntwo\nthree\nfour\n"
	etag := map[string]string{"ETag": `"v1"`}
	partial := func(req *http.Request, cut int) *http.Response {
		var from int
		if _, err := fmt.Sscanf(req.Header.Get("Range"), "bytes=%d-", &from); err != nil {
			return response(200, etag, text, cut)
		}
		header := map[string]string{"ETag": `"v1"`, "Content-Range": fmt.Sprintf("bytes %d-%d/%d", from,
			len(text)-1, len(text))}
		if req.Header.Get("If-Range") != `"v1"` {
			return response(200, map[string]string{"ETag": `"v2"`}, strings.ToUpper(text), -1)
		}
		return response(206, header, text[from:], min(cut, len(text)-from))
	}
	for name, tt := range map[string]struct {
		serve func(req *http.Request, n int) *http.Response
		want  string // in the error
		got   string
		n     int // requests
	}{
		"by a range": {func(req *http.Request, n int) *http.Response {
			if n == 3 {
				return partial(req, -1)
			}
			return partial(req, 5)
		}, "", text, 3},
		"from the beginning": {func(_ *http.Request, n int) *http.Response {
			return response(200, nil, text, map[bool]int{true: 5, false: -1}[n == 1])
		}, "", text, 2},
		"changed, without a validator": {func(_ *http.Request, n int) *http.Response {
			if n == 1 {
				return response(200, nil, text, 5)
			}
			return response(200, nil, strings.ToUpper(text), -1)
		}, "it changed while it was read", "one\n", 2},
		"changed": {func(req *http.Request, n int) *http.Response {
			if n == 1 {
				return response(200, etag, text, 5)
			}
			return response(200, map[string]string{"ETag": `"v2"`}, text, -1)
		}, "it changed while it was read", "one\n", 2},
		"another range": {func(req *http.Request, n int) *http.Response {
			if n == 1 {
				return response(200, etag, text, 5)
			}
			return response(206, map[string]string{"ETag": `"v1"`, "Content-Range": "bytes 3-18/19"}, text[3:], -1)
		}, `asked for the bytes from 5, got "bytes 3-18/19"`, "one\n", 2},
		"refused for a while": {func(req *http.Request, n int) *http.Response {
			if n < 4 {
				return response(503, nil, "", -1)
			}
			return partial(req, -1)
		}, "", text, 4},
		"refused for good": {func(*http.Request, int) *http.Response {
			return response(502, nil, "", -1)
		}, "502 Bad Gateway (gave up after 5 retries)", "", 6},
		"not found": {func(*http.Request, int) *http.Response {
			return response(404, nil, "", -1)
		}, "404 Not Found", "", 1},
		"gone after a break": {func(req *http.Request, n int) *http.Response {
			if n == 1 {
				return partial(req, 5)
			}
			return nil
		}, "connection closed without a response (gave up after 5 retries)", "one\n", 6},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n, retries := 0, 0
				opts := Options{HTTP: HTTPOptions{
					Transport: transport(func(req *http.Request) *http.Response { n++; return tt.serve(req, n) }),
					OnRetry:   func(string, error, time.Duration) { retries++ },
				}}
				s, err := Open(t.Context(), "http://host/data", nil, opts)
				var got []Record
				if err == nil {
					got, _, err = drain(t, s)
				}
				if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want %q", err, tt.want)
				}
				if data(got) != tt.got || n != tt.n || retries != n-1 {
					t.Errorf("got %q after %d requests and %d retries, want %q after %d", data(got), n, retries,
						tt.got, tt.n)
				}
			})
		})
	}
}

// A server that names a time is asked again then, unless that is too long.
func TestURLRetryAfter(t *testing.T) {
	for value, want := range map[string]time.Duration{"120": 2 * time.Minute, "3600": -1} {
		synctest.Test(t, func(t *testing.T) {
			n, began := 0, time.Now()
			s, err := Open(t.Context(), "http://host/", nil, Options{HTTP: HTTPOptions{
				Transport: transport(func(*http.Request) *http.Response {
					if n++; n == 1 {
						return response(429, map[string]string{"Retry-After": value}, "", -1)
					}
					return response(200, nil, "a\n", -1)
				}),
			}})
			took := time.Since(began)
			if want < 0 {
				if err == nil || !strings.Contains(err.Error(), "429 Too Many Requests (retry after 1h0m0s)") ||
					took > 0 {
					t.Errorf("%s: %v after %v", value, err, took)
				}
				return
			}
			if err != nil || took != want {
				t.Errorf("%s: %v after %v, want %v", value, err, took, want)
				return
			}
			_ = s.Close()
		})
	}
}

// A later run can begin where an earlier one stopped, if the server still has the version.
func TestURLFromAPoint(t *testing.T) {
	const text = "a,b\n1,2\n3,4\n5,6\n"
	version := `"v1"`
	address := serve(t, func(w http.ResponseWriter, req *http.Request) {
		w.Header().Set("ETag", version)
		http.ServeContent(w, req, "", time.Time{}, strings.NewReader(text))
	})
	s, err := Open(t.Context(), address, nil, Options{Format: CSV})
	if err != nil {
		t.Fatal(err)
	}
	for range s.All() {
		break
	}
	from, ok := s.Point()
	if err := s.Close(); err != nil || !ok || from.Bytes != 8 || from.Records != 1 || from.Lines != 2 {
		t.Fatalf("the point after the first row is %+v, %v (%v)", from, ok, err)
	}
	for _, tt := range []struct{ version, want string }{
		{`"v1"`, `2 {"line":3,"a":"3","b":"4"} 3 {"line":4,"a":"5","b":"6"} `},
		{`"v2"`, `1 {"line":2,"a":"1","b":"2"} 2 {"line":3,"a":"3","b":"4"} 3 {"line":4,"a":"5","b":"6"} `},
	} {
		version = tt.version
		s, err := Open(t.Context(), address, nil, Options{Format: CSV, From: &from})
		if err != nil {
			t.Fatal(err)
		}
		var lines strings.Builder
		records, _, fatal := drain(t, s)
		for _, r := range records {
			fmt.Fprintf(&lines, "%d %s ", r.Number, strings.TrimSpace(string(r.Data)))
		}
		got := lines.String()
		if got != tt.want || fatal != nil || s.Resumed() != (version == `"v1"`) ||
			s.Consumed() != int64(len(text)) {
			t.Errorf("of version %s: %s(%v), resumed: %v, %d bytes consumed", version, got, fatal, s.Resumed(),
				s.Consumed())
		}
	}
}

// Redirects give neither the query nor the user's headers to others, and keep TLS.
func TestURLRedirects(t *testing.T) {
	var got http.Header
	other := serve(t, func(w http.ResponseWriter, req *http.Request) {
		got = req.Header
		io.WriteString(w, "a\n")
	})
	address := serve(t, func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/here" {
			got = req.Header
			return
		}
		http.Redirect(w, req, map[bool]string{true: "/here", false: other}[req.URL.Path == "/self"], http.StatusFound)
	})
	opts := Options{HTTP: HTTPOptions{Header: http.Header{"X-Key": {"secret"}}, UserAgent: "echod/1"}}
	for path, key := range map[string]string{"/self": "secret", "/other": ""} {
		s, err := Open(t.Context(), address+path+"?token=secret", nil, opts)
		if err != nil {
			t.Fatal(err)
		}
		drain(t, s)
		if got.Get("Referer") != "" || got.Get("X-Key") != key || got.Get("User-Agent") != "echod/1" {
			t.Errorf("%s: the headers are %v", path, got)
		}
	}
	secure := httptest.NewTLSServer(http.RedirectHandler(other, http.StatusFound))
	defer secure.Close()
	roots := x509.NewCertPool()
	if _, err := Open(t.Context(), secure.URL, nil, Options{}); err == nil ||
		!strings.Contains(err.Error(), "certificate") {
		t.Errorf("without its certificate: %v", err)
	}
	roots.AddCert(secure.Certificate())
	if _, err := Open(t.Context(), secure.URL, nil, Options{HTTP: HTTPOptions{RootCAs: roots}}); err == nil ||
		!strings.Contains(err.Error(), "refused a redirect from https to http") {
		t.Errorf("from https to http: %v", err)
	}
}

// Some servers name what is no encoding, or have unpacked what they send.
func TestURLContentEncodings(t *testing.T) {
	for path, coding := range map[string]string{"/a": "aws-chunked", "/b": "UTF-8", "/c": "GZIP", "/d": "aws-chunked, gzip", "/e.gz": ""} {
		address := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", coding)
			text := []byte("a\n")
			if strings.Contains(strings.ToLower(coding), "gzip") {
				text = packGzip(t, "a\n")
			}
			w.Write(text)
		})
		s, err := Open(t.Context(), address+path, nil, Options{})
		if err != nil {
			t.Errorf("%s: %v", coding, err)
			continue
		}
		if got, _, fatal := drain(t, s); data(got) != "a\n" || fatal != nil {
			t.Errorf("%s: got %q, %v", coding, data(got), fatal)
		}
	}
}
