//go:build unix

package integration

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"echod/internal/load"
)

// loadRun is an echod load that runs.
type loadRun struct {
	t              testing.TB
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
}

func startLoad(t testing.TB, address string, args ...string) *loadRun {
	t.Helper()
	l := &loadRun{t: t, cmd: exec.Command(built(t, echodBinary),
		append([]string{"load", "--address", address}, args...)...)}
	l.cmd.Stdout, l.cmd.Stderr, l.cmd.Env = &l.stdout, &l.stderr, environment()
	check(t, l.cmd.Start())
	overdue := time.AfterFunc(2*patience, func() { _ = l.cmd.Process.Kill() })
	t.Cleanup(func() {
		if overdue.Stop() && l.cmd.ProcessState == nil {
			_ = l.cmd.Process.Kill()
			_ = l.cmd.Wait()
		}
	})
	return l
}

// loadResult is a report with what is wrong.
type loadResult struct {
	load.Report
	Failed     []string         `json:"failed"`
	Comparison *load.Comparison `json:"comparison"`
}

// report waits for the end of a run with --json, and checks its exit code.
func (l *loadRun) report(code int) loadResult {
	l.t.Helper()
	_ = l.cmd.Wait()
	if got := exitCode(l.cmd.ProcessState); got != code {
		l.t.Fatalf("exit code %d, want %d: %s\n%s", got, code, l.stderr.String(), l.stdout.String())
	}
	var v loadResult
	if err := json.Unmarshal(l.stdout.Bytes(), &v); err != nil {
		l.t.Fatalf("%v\n%s", err, l.stdout.String())
	}
	return v
}

func TestLoadWritesItsFiles(t *testing.T) {
	t.Parallel()
	e := start(t)
	dir := t.TempDir()
	plot, table, log := filepath.Join(dir, "p.svg"), filepath.Join(dir, "h.hgrm"), filepath.Join(dir, "h.hlog")
	tail, series, metrics := filepath.Join(dir, "q.svg"), filepath.Join(dir, "s.csv"), filepath.Join(dir,
		"m.prom")
	flags := []string{"load", "--address", e.addr, "--conns", "4", "--rate", "500", "--duration", "1s"}
	got := run(t, commandOf(append([]string{built(t, echodBinary)},
		append(flags, "--plot", plot, "--hdr", table, "--max-lost", "0", "--max-refused", "0")...)...))
	if got.code != 0 || got.stderr != "" {
		t.Fatalf("code %d, stderr %q", got.code, got.stderr)
	}
	for _, want := range []string{
		"4 tried, 4 made", "500 sent, 500 returned", " 0 lost",
		"All messages came back", "p99.99",
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("the report lacks %q:\n%s", want, got.stdout)
		}
	}
	if got := run(t, commandOf(append([]string{built(t, echodBinary)},
		append(flags, "--json", "--hdr", log, "--plot-percentiles", tail, "--csv", series, "--prometheus",
			metrics)...)...)); got.code != 0 || got.stderr != "" {
		t.Fatalf("code %d, stderr %q", got.code, got.stderr)
	}

	for _, picture := range []string{plot, tail} {
		for dec := xml.NewDecoder(strings.NewReader(readFile(t, picture))); ; {
			if _, err := dec.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s is not XML: %v", picture, err)
			}
		}
	}
	percentiles, err := os.ReadFile(table)
	check(t, err)
	if !strings.Contains(string(percentiles), "1/(1-Percentile)") ||
		!strings.Contains(string(percentiles), "500") {
		t.Errorf("the table of percentiles:\n%s", percentiles)
	}
	written, err := os.ReadFile(log)
	check(t, err)
	echoes, intervals := int64(0), 0
	for reader := hdrhistogram.NewHistogramLogReader(bytes.NewReader(written)); ; {
		h, err := reader.NextIntervalHistogram()
		check(t, err)
		if h == nil {
			break
		}
		if h.Tag() == "echo" {
			echoes, intervals = echoes+h.TotalCount(), intervals+1
		}
	}
	if echoes != 500 || intervals < 2 {
		t.Errorf("the histogram log has %d echoes in %d seconds, want 500 in 2", echoes, intervals)
	}
	if head := readFile(t, series); !strings.HasPrefix(head,
		"at_seconds,offered_per_second,echoes_per_second,") || strings.Count(head, "\n") < 10 {
		t.Errorf("the CSV file:\n%s", head)
	}
	if text := readFile(t, metrics); !strings.Contains(text, `echod_load_messages_total{kind="returned"} 500`) {
		t.Errorf("the metrics:\n%s", text)
	}
}

// In the open model latency counts from when a message was due, so a server that stops for a second shows a second,
// although waiting clients would send hardly anything meanwhile.
func TestLoadShowsAStall(t *testing.T) {
	for _, pipeline := range []string{"0", "1"} { // 0 is the default; with 1, messages wait to be sent
		t.Run("pipeline "+pipeline, func(t *testing.T) {
			t.Parallel()
			e := start(t)
			l := startLoad(t, e.addr, "--conns", "8", "--rate", "1000", "--duration", "4s", "--late", "30s",
				"--drain-wait", "20s",
				"--pipeline", pipeline, "--json")
			e.awaitOpen(8)
			poll(t, "a third of a second of messages", func() bool { return e.status().BytesIn >= 25_000 })
			e.signal(syscall.SIGSTOP)
			time.Sleep(time.Second)
			e.signal(syscall.SIGCONT)
			v := l.report(0)
			if v.Echoes.Sent != 4000 || v.Echoes.Returned != 4000 || v.Echoes.Lost != 0 {
				t.Errorf("%+v: want 4000 sent and returned", v.Echoes)
			}
			if v.Echo.P999 < 0.5 || v.Echo.P999 > 5 {
				t.Errorf("p99.9 is %v s, want about a second", v.Echo.P999)
			}
			if v.Echo.P90 < 0.2 { // a quarter of the messages were due during the stall
				t.Errorf("p90 is %v s, though a quarter of the messages had to wait", v.Echo.P90)
			}
		})
	}
}

// Ctrl-C ends the run, but does not hide what was wrong with it.
func TestLoadInterruptedStillFails(t *testing.T) {
	t.Parallel()
	e := start(t)
	l := startLoad(t, e.addr, "--rate", "100", "--duration", "1h", "--json", "--max-p999", "1ns")
	poll(t, "some echoes", func() bool { return e.status().BytesOut >= 1000 })
	check(t, l.cmd.Process.Signal(syscall.SIGINT))
	if v := l.report(1); v.Echoes.Sent != v.Echoes.Returned || len(v.Failed) != 1 ||
		!strings.Contains(l.stderr.String(), v.Failed[0]) {
		t.Errorf("%+v, failed %q, stderr %q", v.Echoes, v.Failed, l.stderr.String())
	}
}

// A second Ctrl-C ends the wait for what is in flight. The report is still printed.
func TestLoadInterruptedTwiceStopsWaiting(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer ln.Close()
	l := startLoad(t, ln.Addr().String(), "--rate", "100", "--duration", "1h", "--drain-wait", "1h", "--json")
	conn, err := ln.Accept()
	check(t, err)
	defer conn.Close()
	message := make([]byte, 64)
	for range 10 {
		_, err := io.ReadFull(conn, message)
		check(t, err)
		_, err = conn.Write(message)
		check(t, err)
	}
	_, err = io.ReadFull(conn, message) // this one stays in flight
	check(t, err)
	reported := make(chan struct{})
	go func() { // two signals of one kind in a row may be delivered as one
		for {
			select {
			case <-reported:
				return
			case <-time.After(pollEvery):
				_ = l.cmd.Process.Signal(syscall.SIGINT)
			}
		}
	}()
	v := l.report(1)
	close(reported)
	if v.Echoes.Lost == 0 || v.Echoes.Lost != v.Echoes.Sent-v.Echoes.Returned {
		t.Errorf("%+v: want some lost", v.Echoes)
	}
}

// Clients heed the notice and connect to the new server, so a restart loses nothing.
func TestLoadAcrossARestart(t *testing.T) {
	t.Parallel()
	e := start(t, "--grace", "20s")
	l := startLoad(t, e.addr, "--conns", "16", "--rate", "1000", "--duration", "3s", "--json",
		"--max-disconnects", "0", "--timeout", "20s")
	e.awaitOpen(16)
	poll(t, "some messages", func() bool { return e.status().BytesIn >= 25_000 })
	e.signal(syscall.SIGTERM)
	e.wait(0)
	start(t, "--listen", e.addr)
	v := l.report(0)
	if v.Echoes.Sent != 3000 || v.Echoes.Returned != 3000 {
		t.Errorf("%+v: want 3000 sent and returned", v.Echoes)
	}
	if v.Notices.Shutdown != 16 || v.Notices.Heeded != 16 || v.Ends.Noticed != 16 || v.Reconnects != 16 ||
		v.Outage.Clients != 16 {
		t.Errorf("notices %+v, ends %+v, %d reconnects, outage %+v: want 16 of each", v.Notices, v.Ends,
			v.Reconnects, v.Outage)
	}
}

// What was in flight when the server was killed is reported as lost.
func TestLoadAcrossAKill(t *testing.T) {
	t.Parallel()
	e := start(t)
	l := startLoad(t, e.addr, "--conns", "16", "--rate", "4000", "--duration", "2s", "--json",
		"--max-disconnects", "3")
	e.awaitOpen(16)
	e.signal(syscall.SIGSTOP) // so that something is in flight for certain
	time.Sleep(200 * time.Millisecond)
	e.signal(syscall.SIGKILL)
	e.wait(128 + int(syscall.SIGKILL))
	start(t, "--listen", e.addr)
	v := l.report(1)
	if v.Echoes.Lost == 0 || v.Echoes.Sent != v.Echoes.Returned+v.Echoes.Lost || v.Echoes.Corrupted != 0 {
		t.Errorf("%+v: want some lost, and the rest returned", v.Echoes)
	}
	// While no process listens on the port, a client can connect to itself, because the port is an ephemeral one.
	ended := v.Ends.Unannounced()
	if ended < 16 || v.Reconnects != ended {
		t.Errorf("ends %+v, %d reconnects: want as many, 16 or more", v.Ends, v.Reconnects)
	}
	said := strings.Join(v.Failed, "; ")
	if !strings.Contains(said, "lost") ||
		!strings.Contains(said, fmt.Sprintf("%d connections ended without a notice: more than 3", ended)) {
		t.Errorf("failed for %q", said)
	}
	if !strings.Contains(l.stderr.String(), said) {
		t.Errorf("stderr says %q, want %q", l.stderr.String(), said)
	}
}

// Any echo server will do.
func TestLoadAgainstAnotherServer(t *testing.T) {
	t.Parallel()
	socat := require(t, "socat")
	port := freePorts(t, 1)[0]
	server := commandOf(socat, "TCP-LISTEN:"+port+",bind=127.0.0.1,reuseaddr,fork", "PIPE")
	check(t, server.Start())
	t.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait()
	})
	v := startLoad(t, "127.0.0.1:"+port, "--conns", "5", "--rate", "500", "--duration", "1s", "--json",
		"--size", "100", "--drain-wait", "20s").report(0)
	if v.Echoes.Sent != 500 || v.Echoes.Returned != 500 {
		t.Errorf("%+v", v.Echoes)
	}
}

func TestLoadOnATerminal(t *testing.T) {
	t.Parallel()
	e := start(t)
	term, _ := openTerminal(t)
	term.types(`$ECHOD load --address ` + e.addr + ` --conns 3 --rate 100 --duration 1h; echo "code=$?"` + "\n")
	term.awaits(`\d/1h0m0s  lost 0  notices 0  reconnects 0  3 open  \d+/s of 100  p99 `) // the progress line
	term.types(ctrlC)
	term.awaits(`All messages came back, once and in order`)
	term.awaits(`(?m)^code=0$`)
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"client-closed": 3})
}

// If there are too few files, the server is not blamed.
func TestLoadWithoutEnoughFiles(t *testing.T) {
	t.Parallel()
	e := start(t)
	for conns, code := range map[string]int{"20": 0, "60": 1, "200": 1} {
		got := run(t, commandOf("sh", "-c", `ulimit -n 70; exec "$@"`, "sh", built(t, echodBinary), "load",
			"--address", e.addr, "--conns", conns, "--rate", "100", "--duration", "300ms"))
		if got.code != code || code == 1 &&
			!strings.Contains(got.stderr,
				"too many open files for "+conns+" connections: raise the limit (ulimit -n)") {
			t.Errorf("%s connections: code %d, %s\n%s", conns, got.code, got.stderr, got.stdout)
		}
	}
}
