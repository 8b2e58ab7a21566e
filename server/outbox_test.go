package server

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestNoticeStandsOnItsOwnLine(t *testing.T) {
	for sent, want := range map[string]string{
		"":            "SHUTDOWN 5 x\n",
		"line\n":      "line\nSHUTDOWN 5 x\n",
		"no newline":  "no newline\nSHUTDOWN 5 x\n",
		"two\nhalves": "two\nhalves\nSHUTDOWN 5 x\n",
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, Echo, Options{})
			c := r.dial(t)
			c.send(t, sent)
			r.StartDrain(DrainOptions{Grace: 5 * time.Second, Reason: "x"})
			c.ends(t, want)
		})
	}
}

func TestNoticeWithoutNewlineIsSentExactlyAsItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, err := ParseLineNotifier("SHUTDOWN")
		if err != nil {
			t.Fatal(err)
		}
		r := newRig(t, Echo, Options{Notifier: n})
		c := r.dial(t)
		c.send(t, "abc")
		r.StartDrain(DrainOptions{Grace: time.Second, Reason: "x"})
		pass(acceptorsStop)
		c.has(t, "abcSHUTDOWN")
		if _, _, err := r.Notify(t.Context(), "more"); err != nil {
			t.Errorf("Notify: %v", err)
		}
		c.ends(t, "\nNOTICE more\n")
	})
}

func TestEmptyNoticeSendsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n, err := ParseLineNotifier("")
		if err != nil {
			t.Fatal(err)
		}
		r := newRig(t, Echo, Options{Notifier: n})
		c := r.dial(t)
		rep, _ := shutdownIn(t, r.Server, time.Second, "x")
		c.ends(t, "")
		if rep.Notified+rep.NoticeFailed != 0 {
			t.Errorf("report %+v, want nobody notified and none failed", rep)
		}
		for _, closed := range r.Closed() {
			if closed.Notified {
				t.Error("connection counts as notified")
			}
		}
	})
}

// The handler's write is stuck half-way while the notice is posted: it must come after the whole write.
func TestNoticeNeverLandsInsideAWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		record := strings.Repeat("record ", writeChunk/5) + "end\n" // more than one chunk
		h := HandlerFunc(func(ctx context.Context, c *Conn) error {
			for range 3 {
				if _, err := c.Write([]byte(record)); err != nil {
					return err
				}
			}
			return untilDone(ctx, c)
		})
		r := newRig(t, h, Options{Timeouts: Timeouts{Stall: -1}})
		c := r.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
		pass(acceptorsStop)
		c.SetWindow(10 * len(record))
		synctest.Wait()
		got := c.arrived()
		if rest := strings.ReplaceAll(got, record, ""); rest != "SHUTDOWN 60 x\n" {
			t.Errorf("beside whole records the client received %.80q, want the notice", rest)
		}
	})
}

// After a write that was cut short nothing more may follow: the client could not tell what it is.
func TestNothingFollowsATornWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(ctx context.Context, c *Conn) error {
			_, _ = c.Read(make([]byte, 1)) // the window is set
			_ = c.SetWriteDeadline(time.Now().Add(time.Second))
			if n, err := c.Write([]byte("half|half")); n != 5 || err == nil {
				t.Errorf("Write: %d, %v; want 5 bytes and an error", n, err)
			}
			_ = c.SetWriteDeadline(time.Time{})
			if _, err := c.Write([]byte("more")); err == nil {
				t.Error("a write after a torn one succeeded")
			}
			return untilDone(ctx, c)
		})
		r := newRig(t, h, Options{})
		c := r.dial(t)
		c.SetWindow(5)
		c.send(t, "x")
		pass(2 * time.Second)
		c.SetWindow(fakeWindow)
		if sent, failed, _ := r.Notify(t.Context(), "hello"); sent != 0 || failed != 1 {
			t.Errorf("Notify: %d sent, %d failed; want 0 and 1", sent, failed)
		}
		rep, _ := shutdownIn(t, r.Server, time.Second, "x")
		if rep.NoticeFailed != 1 {
			t.Errorf("report %+v, want one notice failed", rep)
		}
		c.ends(t, "half|")
	})
}

func TestHandlersCloseWriteEndsNoticesToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := HandlerFunc(func(ctx context.Context, c *Conn) error {
			_, _ = c.Write([]byte("bye\n"))
			if err := c.CloseWrite(); err != nil {
				t.Errorf("CloseWrite: %v", err)
			}
			return untilDone(ctx, c)
		})
		r := newRig(t, h, Options{})
		c := r.dial(t)
		rep, _ := shutdownIn(t, r.Server, time.Second, "x")
		if rep.Notified != 0 || rep.NoticeFailed != 1 {
			t.Errorf("report %+v, want one notice failed", rep)
		}
		c.ends(t, "bye\n")
	})
}

// All of a drain's ways to meet a client lead to one notice.
func TestEachClientIsToldExactlyOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Limits: Limits{MaxConns: 20}})
		var clients []*client
		for range 40 { // half of them are still in the accept queue
			clients = append(clients, r.dial(t))
		}
		r.StartDrain(DrainOptions{Grace: 3 * time.Second, Reason: "a"})
		r.StartDrain(DrainOptions{Grace: 2 * time.Second, Reason: "b"})
		rep, _ := shutdownIn(t, r.Server, time.Second, "c")
		for i, c := range clients {
			if got := strings.Count(c.arrived(), "SHUTDOWN"); got != 1 {
				t.Errorf("client %d was told %d times, want once", i, got)
			}
		}
		wantEqual(t, "notified", rep.Notified, len(clients))
	})
}

// It is admitted before the notices go out, and looks whether it is to be told only after.
func TestClientAdmittedRightBeforeTheNoticesIsToldOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := make(chan struct{})
		log := zap.NewNop().WithOptions(zap.WrapCore(func(zapcore.Core) zapcore.Core {
			core, _ := observer.New(zap.DebugLevel)
			return zapcore.RegisterHooks(core, func(e zapcore.Entry) error {
				if e.Message == "connection opened" {
					<-told
				}
				return nil
			})
		}))
		r := newRig(t, Echo, Options{Logger: log})
		c := r.dial(t)
		r.StartDrain(DrainOptions{Grace: time.Minute, Reason: "x"})
		pass(2 * acceptorsStop)
		close(told)
		c.has(t, "SHUTDOWN 60 x\n")
		wantEqual(t, "notified", r.Status().Drain.Notified, 1)
	})
}

func TestOnlySoManyTextsWaitForOneThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Echo, Options{Timeouts: Timeouts{Stall: -1}})
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
	})
}
