package server

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestNotice(t *testing.T) {
	for sent, want := range map[string]string{
		"":            "SHUTDOWN 5 x\n",
		"line\n":      "line\nSHUTDOWN 5 x\n",
		"no newline":  "no newline\nSHUTDOWN 5 x\n",
		"two\nhalves": "two\nhalves\nSHUTDOWN 5 x\n",
	} {
		t.Run("is a line of its own after "+sent, inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
			c := r.dial(t)
			c.send(t, sent)
			r.drain(5*time.Second, "x")
			c.ends(t, want)
		}))
	}

	// The handler's write is half sent when the notice is posted.
	t.Run("never lands inside a write", bubbled(func(t *testing.T) {
		record := strings.Repeat("record ", writeChunk/5) + "end\n" // more than one chunk
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			for range 3 {
				if _, err := c.Write([]byte(record)); err != nil {
					return err
				}
			}
			return untilDone(ctx, c)
		}), Options{Timeouts: Timeouts{Stall: Off}})
		c := r.dial(t)
		r.drain(time.Minute, "x")
		pass(acceptorsTimeout)
		c.SetWindow(10 * len(record))
		synctest.Wait()
		if rest := strings.ReplaceAll(c.arrived(), record, ""); rest != "SHUTDOWN 60 x\n" {
			t.Errorf("beside whole records the client received %.80q, want the notice", rest)
		}
	}))

	t.Run("is not sent after CloseWrite", inBubble(HandlerFunc(func(ctx context.Context, c *Conn) error {
		_, _ = c.Write([]byte("bye\n"))
		if err := c.CloseWrite(); err != nil {
			t.Errorf("CloseWrite: %v", err)
		}
		return untilDone(ctx, c)
	}), Options{}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		rep, _ := drainIn(r.Server, time.Second, "x")
		if rep.Notified != 0 || rep.NoticeFailed != 1 {
			t.Errorf("report %+v, want one failed notice", rep)
		}
		c.ends(t, "bye\n")
	}))

	t.Run("a bounded number waits for a client that does not read",
		inBubble(Echo, Options{Timeouts: Timeouts{Stall: Off}}, func(t *testing.T, r *rig) {
			c := r.dial(t)
			c.SetWindow(0)
			c.send(t, "x")
			for range maxMessages + 5 {
				if sent, failed, _ := r.Notify(t.Context(), "text"); sent != 0 || failed != 1 {
					t.Fatalf("Notify: %d sent, %d failed; want 0 and 1", sent, failed)
				}
			}
			c.SetWindow(fakeWindow)
			c.has(t, "x\n"+strings.Repeat("NOTICE text\n", maxMessages))
			if sent, failed, _ := r.Notify(t.Context(), "again"); sent != 1 || failed != 0 {
				t.Errorf("Notify when the client reads again: %d sent, %d failed; want 1 and 0", sent, failed)
			}
		}))
}

// TestSilence covers G13: the server adds no byte to a stream whose protocol did not ask for it.
func TestSilence(t *testing.T) {
	silent := NotifierFunc(func(Notice) []byte { return nil })
	for name, o := range map[string]Options{"by default": {}, "with a silent Notifier": {Notifier: silent}} {
		t.Run("G13 the server adds no byte "+name, bubbled(func(t *testing.T) {
			ln := newFakeListener()
			o.Limits = Limits{MaxConns: 1, AtLimit: LimitReject}
			s, err := New(Echo, o) // newServer would set a Notifier
			if err != nil {
				t.Fatal(err)
			}
			r := &rig{Server: s, ln: ln}
			r.served = serve(t, s, ln)
			c := r.dial(t)
			binary := "\x00\xff\n\x17 binary"
			c.echoes(t, binary)
			r.dial(t).ends(t, "") // over the limit
			h := r.pause(t, PauseOptions{Mode: PauseReject})
			r.dial(t).ends(t, "")
			h.Release()
			if sent, failed, err := r.Notify(t.Context(), "hello"); sent+failed != 0 || err != nil {
				t.Errorf("Notify: %d sent, %d failed, %v; want neither", sent, failed, err)
			}
			r.drain(time.Second, "x")
			pass(acceptorsTimeout)
			c.echoes(t, binary)
			c.ends(t, "")
			<-r.Done()
			rep := report(t, s)
			if rep.Notified+rep.NoticeFailed != 0 {
				t.Errorf("report %+v, want nobody notified and no failure", rep)
			}
			for _, closed := range s.Closed() {
				if closed.Notified {
					t.Errorf("connection %d counts as notified", closed.ID)
				}
			}
			st := s.Status()
			wantEqual(t, "bytes out", st.BytesOut, st.BytesIn)
		}))
	}
}

func TestNothingToSay(t *testing.T) {
	silent := NotifierFunc(func(Notice) []byte { return nil })
	t.Run("is no failure for a connection that lingers", inBubble(returns(nil), Options{Notifier: silent}, func(t *testing.T, r *rig) {
		c := r.dial(t)
		rep, _ := drainIn(r.Server, time.Second, "x")
		if rep.Notified != 0 || rep.NoticeFailed != 0 || rep.Left != 1 {
			t.Errorf("report %+v, want one client that left and no notice", rep)
		}
		c.ends(t, "")
	}))
}

func TestSetNotifier(t *testing.T) {
	// changing is a handler that changes its notifier after the first byte, and then echoes.
	changing := func(n Notifier) Handler {
		return HandlerFunc(func(ctx context.Context, c *Conn) error {
			if _, err := c.Read(make([]byte, 1)); err != nil {
				return err
			}
			c.SetNotifier(n)
			return Echo.ServeConn(ctx, c)
		})
	}
	bell := NotifierFunc(func(n Notice) []byte {
		if n.Kind == NoticeDrain {
			return []byte{7}
		}
		return []byte(n.Text)
	})

	t.Run("replaces the server's Notifier for one connection", inBubble(changing(bell), Options{}, func(t *testing.T, r *rig) {
		changed, other := r.dial(t), r.dial(t)
		changed.send(t, "!")
		if sent, failed, err := r.Notify(t.Context(), "hello"); sent != 2 || failed != 0 || err != nil {
			t.Errorf("Notify: %d sent, %d failed, %v; want 2 sent", sent, failed, err)
		}
		r.drain(time.Minute, "x")
		pass(acceptorsTimeout)
		changed.has(t, "hello\a")
		other.has(t, "NOTICE hello\nSHUTDOWN 60 x\n")
	}))

	t.Run("nil disables notices", inBubble(changing(nil), Options{}, func(t *testing.T, r *rig) {
		changed, other := r.dial(t), r.dial(t)
		changed.send(t, "!")
		if sent, failed, err := r.Notify(t.Context(), "hello"); sent != 1 || failed != 0 || err != nil {
			t.Errorf("Notify: %d sent, %d failed, %v; want 1 sent", sent, failed, err)
		}
		rep, _ := drainIn(r.Server, time.Second, "x")
		changed.ends(t, "")
		other.ends(t, "NOTICE hello\nSHUTDOWN 1 x\n")
		if rep.Notified != 1 || rep.NoticeFailed != 0 {
			t.Errorf("report %+v, want one notified and no failure", rep)
		}
	}))

	t.Run("drops what was not sent before", bubbled(func(t *testing.T) {
		changed := make(chan struct{})
		var conn *Conn
		r := newRig(t, HandlerFunc(func(ctx context.Context, c *Conn) error {
			conn = c
			_, err := c.Write([]byte("long text")) // blocks
			return err
		}), Options{Timeouts: Timeouts{Stall: Off}})
		served, far := newFakePair(r.ln.Addr(), fakeAddr("198.51.100.1", 1))
		c := &client{far}
		c.SetWindow(3)
		r.ln.hand(served)
		synctest.Wait()
		go func() {
			conn.SetNotifier(nil) // waits for the write
			close(changed)
		}()
		synctest.Wait()
		r.drain(time.Minute, "x")
		pass(acceptorsTimeout)
		c.SetWindow(fakeWindow)
		<-changed
		c.ends(t, "long text")
	}))
}
