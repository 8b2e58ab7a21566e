//go:build unix

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"echod/control"
)

// TestScripts runs the scripts in testdata/script: sessions on the command line. Besides testscript's own
// commands they have:
//
//   - exits CODE PROGRAM [ARG...] runs a program and checks its exit code.
//   - server [FLAG...] starts a server. $ADDR is its address, $ECHOD_CONTROL its control socket, $LOG the file
//     with its log once it has exited.
//   - client [N] connects clients, and waits until they are served. client-waits connects one that is not.
//   - reads TEXT checks what the first client reads next. $N is a newline.
//   - leaves closes all clients, and waits for the end of their streams.
//   - signal NAME sends the server a signal.
//   - exited CODE waits for the server's exit and checks its exit code.
//   - json TYPE checks that the last stdout is one JSON object of this type of package control.
func TestScripts(t *testing.T) {
	t.Parallel()
	bin := filepath.Dir(built(t, echodBinary))
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			env.Values["session"] = &session{}
			env.Vars = append(env.Vars, "GORACE=atexit_sleep_ms=0", "MYUID="+strconv.Itoa(os.Getuid()), "N=\n",
				"PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH"), "TMPDIR="+env.WorkDir)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits": func(ts *testscript.TestScript, _ bool, args []string) {
				code := 0
				err := ts.Exec(args[1], args[2:]...)
				if exit, ok := errors.AsType[*exec.ExitError](err); ok {
					code = exitCode(exit.ProcessState)
				} else {
					ts.Check(err)
				}
				if strconv.Itoa(code) != args[0] {
					ts.Fatalf("exit code %d, want %s", code, args[0])
				}
			},
			"server": func(ts *testscript.TestScript, _ bool, args []string) {
				s, tb := of(ts), scriptTB{t, ts}
				socket := ts.MkAbs("c")
				flags := append([]string{"serve", "--log-format", "json", "--listen", "127.0.0.1:0"}, args...)
				if ts.Getenv("DEFAULT_CONTROL") == "" {
					flags = append(flags, "--control", socket)
					ts.Setenv("ECHOD_CONTROL", socket)
				}
				cmd := exec.Command(built(tb, echodBinary), flags...)
				for _, name := range []string{"TMPDIR", "XDG_RUNTIME_DIR", "RUNTIME_DIRECTORY", "XDG_CACHE_HOME", "HOME"} {
					cmd.Env = append(cmd.Env, name+"="+ts.Getenv(name))
				}
				for line := range strings.SplitSeq(ts.Getenv("SERVER_ENV"), " ") {
					cmd.Env = append(cmd.Env, line)
				}
				s.server, s.peers = launch(tb, cmd, socket), nil
				ts.Setenv("ADDR", s.server.addr)
			},
			"client": func(ts *testscript.TestScript, _ bool, args []string) {
				n := 1
				if len(args) > 0 {
					n, _ = strconv.Atoi(args[0])
				}
				of(ts).peers = append(of(ts).peers, of(ts).server.crowd(n)...)
			},
			"client-waits": func(ts *testscript.TestScript, _ bool, _ []string) {
				of(ts).peers = append(of(ts).peers, of(ts).server.dial())
			},
			"reads": func(ts *testscript.TestScript, _ bool, args []string) { ts.Check(of(ts).peers[0].expect(args[0])) },
			"leaves": func(ts *testscript.TestScript, _ bool, _ []string) {
				for _, p := range of(ts).peers {
					ts.Check(p.leave())
				}
			},
			"signal": func(ts *testscript.TestScript, _ bool, args []string) {
				signals := map[string]syscall.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "QUIT": syscall.SIGQUIT, "HUP": syscall.SIGHUP}
				of(ts).server.signal(signals[args[0]])
			},
			"exited": func(ts *testscript.TestScript, _ bool, args []string) {
				code, err := strconv.Atoi(args[0])
				ts.Check(err)
				of(ts).server.wait(code)
				ts.Check(os.WriteFile(ts.MkAbs("log"), []byte(of(ts).server.log.String()), 0o600))
				ts.Setenv("LOG", ts.MkAbs("log"))
			},
			"json": func(ts *testscript.TestScript, _ bool, args []string) {
				types := []any{control.Status{}, control.Conns{}, control.ClosedConns{}, control.Hold{}, control.Change{}, control.Notified{}, control.Waited{}, control.Settings{}, control.SettingsChanged{}}
				i := slices.IndexFunc(types, func(v any) bool { return reflect.TypeOf(v).Name() == args[0] })
				dec := json.NewDecoder(strings.NewReader(ts.ReadFile("stdout")))
				dec.DisallowUnknownFields()
				if err := dec.Decode(reflect.New(reflect.TypeOf(types[i])).Interface()); err != nil || dec.More() {
					ts.Fatalf("not one %s: %v", args[0], err)
				}
			},
		},
	})
}

// session is the state of a script.
type session struct {
	server *echod
	peers  []*peer
}

func of(ts *testscript.TestScript) *session { return ts.Value("session").(*session) }

// scriptTB lets a script use what is written for tests. Failures end the script.
type scriptTB struct {
	testing.TB
	ts *testscript.TestScript
}

func (tb scriptTB) Helper()                           {}
func (tb scriptTB) Cleanup(f func())                  { tb.ts.Defer(f) }
func (tb scriptTB) Context() context.Context          { return context.Background() } // the test's has ended when the script cleans up
func (tb scriptTB) Failed() bool                      { return false }
func (tb scriptTB) Logf(format string, args ...any)   { tb.ts.Logf(format, args...) }
func (tb scriptTB) Error(args ...any)                 { tb.ts.Fatalf("%s", fmt.Sprint(args...)) }
func (tb scriptTB) Errorf(format string, args ...any) { tb.ts.Fatalf(format, args...) }
func (tb scriptTB) Fatal(args ...any)                 { tb.ts.Fatalf("%s", fmt.Sprint(args...)) }
func (tb scriptTB) Fatalf(format string, args ...any) { tb.ts.Fatalf(format, args...) }
