package control

import (
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"echod/server"
)

// agentRig is a server with an Agent.
type agentRig struct {
	*rig
	address string
}

func newAgentRig(t *testing.T, opts server.Options) agentRig {
	t.Helper()
	ln, err := server.Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, opts, func(r *rig) actor { return pair(NewAgent(r.srv, ln, zap.NewNop()).Actor()) })
	return agentRig{r, ln.Addr().String()}
}

// asks returns what the agent answers. It sends a question, as HAProxy does with agent-send.
func (r agentRig) asks(t *testing.T) string {
	t.Helper()
	c, err := net.DialTimeout("tcp", r.address, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, "echod1\n"); err != nil {
		t.Fatal(err)
	}
	all, err := io.ReadAll(c)
	if err != nil {
		t.Fatalf("after %q: %v", all, err)
	}
	return string(all)
}

func TestAgent(t *testing.T) {
	t.Run("a paused or draining server wants no new clients", testAgentStates)
	t.Run("at the connection limit, the answer follows what new clients get", testAgentFull)
	t.Run("silent callers do not block others", testAgentSilentCallers)
	t.Run("a server that does not respond is down", testAgentDown)
}

func testAgentStates(t *testing.T) {
	r := newAgentRig(t, server.Options{})
	wantEqual(t, "running", r.asks(t), "up ready\n")
	h, err := r.srv.Pause(server.PauseOptions{Reason: "backup"})
	if err != nil {
		t.Fatal(err)
	}
	wantEqual(t, "paused", r.asks(t), "up drain\n")
	h.Release()
	wantEqual(t, "resumed", r.asks(t), "up ready\n")
	c := r.echoClient(t)
	r.srv.StartDrain(server.DrainOptions{Grace: time.Minute, Delay: time.Minute})
	wantEqual(t, "draining", r.asks(t), "up drain\n")
	_ = c.Close()
	_ = r.srv.Close()
	<-r.ended
	if c, err := net.Dial("tcp", r.address); err == nil {
		_ = c.Close()
		t.Error("the agent's listener is open after the end")
	}
}

func testAgentFull(t *testing.T) {
	for mode, want := range map[server.LimitMode]string{
		server.LimitQueue: "up ready\n", server.LimitReject: "up drain\n",
	} {
		r := newAgentRig(t, server.Options{Limits: server.Limits{MaxConns: 1, AtLimit: mode}})
		r.echoClient(t)
		wantEqual(t, mode.String(), r.asks(t), want)
	}
}

func testAgentSilentCallers(t *testing.T) {
	r := newAgentRig(t, server.Options{})
	for range 10 * maxAgentCallers {
		c, err := net.Dial("tcp", r.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	wantEqual(t, "beside silent callers", r.asks(t), "up ready\n")
}

func testAgentDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv, err := server.New(server.Echo, server.Options{Notifier: server.DefaultLineNotifier()})
		if err != nil {
			t.Fatal(err)
		}
		deaf := stuckListener{newPipeListener(), make(chan struct{})}
		var serving sync.WaitGroup
		serving.Go(func() { _ = srv.Serve(deaf) })
		<-deaf.entered
		calls := newPipeListener()
		agent := NewAgent(srv, calls, nil)
		execute, _ := agent.Actor()
		serving.Go(func() { _ = execute() })
		time.Sleep(probeTimeout + agentProbeEvery)
		c, err := calls.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		line, _ := io.ReadAll(c)
		got := string(line)
		if !strings.HasPrefix(got, "down #") || !strings.Contains(got, "is stuck") || strings.Count(got, "\n") != 1 {
			t.Errorf("a server whose accept loop is stuck: %q, want down and why", got)
		}
		agent.Leave()
		_ = deaf.Close()
		_ = srv.Close()
		serving.Wait()
	})
}
