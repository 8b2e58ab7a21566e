package top

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"

	"echod/control"
)

// patience bounds each wait for something that should come at once.
const patience = 20 * time.Second

// fake is a control plane.
type fake struct {
	events chan string // lines of the stream; an empty one ends it
	status func(w http.ResponseWriter)
}

// startFeed starts all goroutines of a feed against a fake, and returns the messages that they send.
func startFeed(t *testing.T, f *fake, interval time.Duration) (*feed, <-chan tea.Msg) {
	t.Helper()
	dir, err := os.MkdirTemp("", "top")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	ln, err := net.Listen("unix", filepath.Join(dir, "c"))
	if err != nil {
		t.Fatal(err)
	}
	f.events = make(chan string)
	srv := &http.Server{Handler: f}
	client := control.NewClient(ln.Addr().String())
	feed := newFeed(client, interval)
	messages := make(chan tea.Msg)
	ctx, cancel := context.WithCancelCause(t.Context())
	feed.send = func(msg tea.Msg) {
		select {
		case messages <- msg:
		case <-ctx.Done():
		}
	}
	var parts sync.WaitGroup
	parts.Go(func() { _ = srv.Serve(ln) })
	for _, part := range []func(context.Context){feed.poll, feed.list, feed.follow, feed.deliver, feed.act} {
		parts.Go(func() { part(ctx) })
	}
	t.Cleanup(func() {
		cancel(errors.New("the test is over"))
		_ = srv.Close()
		parts.Wait()
		client.Close()
	})
	return feed, messages
}

func (f *fake) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/v1/status":
		f.status(w)
	case "/v1/conns":
		fmt.Fprint(w, `{"connections":[{"id":7}]}`)
	case "/v1/conns/closed":
		fmt.Fprint(w, `{"connections":[]}`)
	case "/v1/events":
		w.WriteHeader(http.StatusOK)
		_ = http.NewResponseController(w).Flush()
		for {
			select {
			case line := <-f.events:
				if line == "" {
					return
				}
				fmt.Fprintln(w, line)
				_ = http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}
}

func running(w http.ResponseWriter) { fmt.Fprint(w, `{"state":"running","pid":1}`) }

func refused(w http.ResponseWriter) {
	w.WriteHeader(http.StatusServiceUnavailable)
	fmt.Fprint(w, `{"type":"urn:echod:problem:busy","title":"busy"}`)
}

// awaitMsg waits for a message of type M that matches.
func awaitMsg[M any](t *testing.T, messages <-chan tea.Msg, match func(M) bool) {
	t.Helper()
	late := time.After(patience)
	for {
		select {
		case msg := <-messages:
			if m, ok := msg.(M); ok && match(m) {
				return
			}
		case <-late:
			t.Fatalf("no matching %T", *new(M))
		}
	}
}

func TestMissedEventsCauseAList(t *testing.T) {
	f := &fake{status: running}
	// With this interval there is no other list.
	_, messages := startFeed(t, f, time.Hour)
	listed := func(m listMsg) bool { return len(m.open) == 1 && m.open[0].ID == 7 }
	awaitMsg(t, messages, listed)
	f.events <- `{"type":"opened","conn":{"id":8}}`
	awaitMsg(t, messages, func(m eventsMsg) bool { return m.events[0].Conn.ID == 8 })
	f.events <- `{"type":"missed","missed":3}`
	awaitMsg(t, messages, listed)
}

func TestEventStreamReconnects(t *testing.T) {
	f := &fake{status: running}
	_, messages := startFeed(t, f, time.Millisecond)
	for id := range 3 {
		f.events <- fmt.Sprintf(`{"type":"opened","conn":{"id":%d}}`, id)
		awaitMsg(t, messages, func(m eventsMsg) bool { return m.events[0].Conn.ID == uint64(id) })
		f.events <- ""
	}
}

func TestActionRefreshesStatus(t *testing.T) {
	f := &fake{status: running}
	feed, messages := startFeed(t, f, time.Hour)
	if !feed.do(func(context.Context, *control.Client) (string, error) { return "done", nil }) {
		t.Fatal("the action was refused")
	}
	awaitMsg(t, messages, func(m doneMsg) bool { return m.result == "done" && m.err == nil })
	awaitMsg(t, messages, func(m statusMsg) bool { return m.status.PID == 1 })
	if !feed.do(failing(errors.ErrUnsupported)) {
		t.Fatal("the second action was refused")
	}
	awaitMsg(t, messages, func(m doneMsg) bool { return errors.Is(m.err, errors.ErrUnsupported) })
}

func TestRefusedStatusMeansLost(t *testing.T) {
	f := &fake{status: refused}
	_, messages := startFeed(t, f, time.Millisecond)
	awaitMsg(t, messages, func(m lostMsg) bool {
		problem, ok := errors.AsType[*control.Problem](m.err)
		return ok && problem.Title == "busy"
	})
}

func TestEventQueueLimit(t *testing.T) {
	q := newQueue()
	for range maxQueued + 1 {
		q.put(control.Event{})
	}
	if events, dropped := q.take(); len(events) != maxQueued || !dropped {
		t.Errorf("%d events, dropped: %v", len(events), dropped)
	}
	q.put(control.Event{})
	if events, dropped := q.take(); len(events) != 1 || dropped {
		t.Errorf("then %d events, dropped: %v", len(events), dropped)
	}
}
