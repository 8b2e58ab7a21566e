//go:build unix

package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// toxiproxyBinary is the path of a proxy that disturbs connections. It is built from the module of the development
// tools, so that users do not get its dependencies.
var toxiproxyBinary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(builds(), "toxiproxy")
	out, err := exec.Command("go", "build", "-modfile=../tools/go.mod", "-o", path,
		"github.com/Shopify/toxiproxy/v2/cmd/server").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building toxiproxy: %w\n%s", err, out)
	}
	return path, nil
})

// toxic is a proxy in front of a server.
type toxic struct {
	t       testing.TB
	control string
	front   string
}

func startToxic(t testing.TB, upstream string) *toxic {
	t.Helper()
	path, err := toxiproxyBinary()
	if err != nil {
		missing(t, err.Error())
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	_, port, err := net.SplitHostPort(ln.Addr().String())
	check(t, err)
	check(t, ln.Close())
	cmd := exec.Command(path, "-host", "127.0.0.1", "-port", port)
	cmd.Env = environment("LOG_LEVEL=error")
	check(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	x := &toxic{t: t, control: "http://127.0.0.1:" + port}
	proxy := map[string]any{"name": "echo", "listen": "127.0.0.1:0", "upstream": upstream, "enabled": true}
	var made struct{ Listen string }
	for end := time.Now().Add(patience); ; {
		err := x.post("/proxies", proxy, &made)
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
		time.Sleep(pollEvery) // until it listens
	}
	x.front = made.Listen
	return x
}

func (x *toxic) post(path string, body, answer any) error {
	text, err := json.Marshal(body)
	check(x.t, err)
	client := http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Post(x.control+path, "application/json", bytes.NewReader(text))
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode >= 300 {
		return fmt.Errorf("toxiproxy answers %s", res.Status)
	}
	return json.NewDecoder(res.Body).Decode(answer)
}

// adds disturbs what flows to clients.
func (x *toxic) adds(kind string, attributes map[string]any) {
	x.t.Helper()
	var answer any
	check(x.t, x.post("/proxies/echo/toxics",
		map[string]any{"type": kind, "stream": "downstream", "attributes": attributes}, &answer))
}

// Each kind of network fault is reported as what it is.
func TestLoadThroughABadNetwork(t *testing.T) {
	t.Parallel()
	slow(t)
	e := start(t)
	for _, tt := range []struct {
		kind       string
		attributes map[string]any
		flags      []string
		code       int
		want       func(v loadResult) bool
	}{
		{
			"latency",
			map[string]any{"latency": 300},
			[]string{"--rate", "100", "--late", "250ms", "--drain-wait", "20s"},
			0, func(v loadResult) bool {
				return v.Echoes.Late == v.Echoes.Sent && v.Echoes.Returned == 100 && v.Echo.P50 >= 0.3 &&
					v.Ends.Unannounced() == 0
			},
		},
		{ // nothing arrives, and 200 ms after the last message the connection ends
			"timeout",
			map[string]any{"timeout": 200},
			[]string{"--rate", "100", "--drain-wait", "1s"},
			1, func(v loadResult) bool {
				return v.Echoes.Returned == 0 && v.Echoes.Lost == v.Echoes.Sent && v.Echoes.Lost == 100 &&
					v.Ends.Closed == 2
			},
		},
		{
			"reset_peer",
			map[string]any{"timeout": 100},
			[]string{"--rate", "100", "--reconnect=false"},
			1, func(v loadResult) bool {
				return v.Ends.Reset == 2 && v.Ends.Closed == 0 &&
					v.Echoes.Lost == v.Echoes.Sent-v.Echoes.Returned && v.Echoes.Unsent > 0
			},
		},
		{ // 20 and a half messages
			"limit_data",
			map[string]any{"bytes": 20*64 + 32},
			[]string{"--rate", "100", "--reconnect=false", "--pipeline", "1"},
			1, func(v loadResult) bool {
				return v.Echoes.Returned == 2*20 && v.Echoes.Lost == 2 && v.Echoes.Corrupted == 0 &&
					v.Ends.Closed == 2 && v.Echoes.Unsent == 100-42
			},
		},
		{ // a stream may be cut into pieces
			"slicer",
			map[string]any{"average_size": 10, "size_variation": 9, "delay": 10},
			[]string{"--rate", "100", "--drain-wait", "20s"},
			0, func(v loadResult) bool { return v.Echoes.Returned == 100 && v.Echoes.Corrupted == 0 },
		},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			t.Parallel()
			x := startToxic(t, e.addr)
			x.adds(tt.kind, tt.attributes)
			v := startLoad(t, x.front,
				append(tt.flags, "--conns", "2", "--duration", "1s", "--json")...).report(tt.code)
			if !tt.want(v) {
				t.Errorf("%+v\n%+v\n%+v\necho %+v", v.Echoes, v.Connects, v.Ends, v.Echo)
			}
		})
	}
}
