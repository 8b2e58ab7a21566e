package client

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestStreamReconnects(t *testing.T) {
	t.Run("what did not come back is sent again", func(t *testing.T) {
		address := listen(t, dies(10), dies(0), dies(500), dies(1), echoes)
		opts := StreamOptions{Conns: 2, Ordered: true, Reconnect: &Backoff{Min: time.Millisecond}}
		o := collect(t, Stream(within(t), address, numbered(3000), opts))
		o.wantAll(t, 3000)
		if !o.inOrder() {
			t.Error("results are not in the order of the items")
		}
		again := 0
		for _, times := range o.sent {
			if times > 1 {
				again++
			}
		}
		if again == 0 {
			t.Error("no item was sent twice, although connections have died")
		}
	})
	t.Run("after a notice nothing is sent twice", func(t *testing.T) {
		var notices, reconnects atomic.Int64
		address := listen(t, announces(30), announces(30), echoes)
		o := collect(t, Stream(within(t), address, numbered(2000), StreamOptions{
			Conns: 1, Reconnect: &Backoff{Min: time.Millisecond},
			OnNotice:    func(Notice) { notices.Add(1) },
			OnReconnect: func(error) { reconnects.Add(1) },
		}))
		o.wantAll(t, 2000)
		for key, times := range o.sent {
			if times != 1 {
				t.Errorf("item %d was sent %d times", key, times)
			}
		}
		if notices.Load() != 2 || reconnects.Load() != 2 {
			t.Errorf("%d notices, %d reconnects, want 2 of each", notices.Load(), reconnects.Load())
		}
	})
	t.Run("a server that does not close after the half-close is left", func(t *testing.T) {
		stays := func(conn net.Conn) {
			_, _ = io.WriteString(conn, "SHUTDOWN 60 x\n")
			all, _ := io.ReadAll(conn) // until the half-close
			_, _ = conn.Write(all)
			<-t.Context().Done()
		}
		collect(t, Stream(within(t), listen(t, stays, echoes), numbered(1000), StreamOptions{
			Conns: 1, Reconnect: &Backoff{Min: time.Millisecond}, StallTimeout: -1,
		})).wantAll(t, 1000)
	})
	t.Run("without Reconnect other connections finish what they have sent", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			late := func(conn net.Conn) { // answers long after the other connection has ended
				got := make([]byte, chunkSize)
				n, _ := conn.Read(got)
				time.Sleep(time.Second)
				_, _ = conn.Write(got[:n])
				silent(conn)
			}
			soon := func(conn net.Conn) { // when the other connection has something to send
				time.Sleep(time.Millisecond)
				dies(3)(conn)
			}
			opts := StreamOptions{Conns: 2, InFlight: 100, Dial: pipes(t, soon, late)}
			o := collect(t, Stream(t.Context(), "memory", numbered(1000), opts))
			if o.err == nil || !strings.Contains(o.err.Error(), "stream to memory: server closed the connection") {
				t.Errorf("the last error is %v", o.err)
			}
			if came := len(o.keys) - len(o.errs); came <= 3 {
				t.Errorf("%d items came back, all from the first connection", came)
			}
			for key, err := range o.errs {
				if !errors.Is(err, o.err) {
					t.Errorf("item %d: %v, want the error of the stream", key, err)
				}
			}
		})
	})
}

func TestStreamGivesUp(t *testing.T) {
	malformed := func(_ context.Context, address string) (net.Conn, error) {
		return nil, &net.AddrError{Err: "missing port", Addr: address}
	}
	for name, tt := range map[string]struct {
		opts StreamOptions
		want string
		took time.Duration // not checked if negative
	}{
		"at once without Reconnect": {StreamOptions{}, "connect to memory: connection refused", 0},
		"after Retries": {
			StreamOptions{Conns: 1, Reconnect: &Backoff{Retries: 3}},
			"gave up after 3 retries: connect to memory: connection refused", -1,
		},
		"at once with a malformed address": {
			StreamOptions{Dial: malformed, Reconnect: &Backoff{}}, "address memory: missing port", 0,
		},
		"after MaxElapsed": {
			StreamOptions{Reconnect: &Backoff{MaxElapsed: time.Minute}},
			"gave up after 1m0s: connect to memory: connection refused", time.Minute,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				tt.opts.InFlight = 7
				if tt.opts.Dial == nil {
					tt.opts.Dial = pipes(t)
				}
				o := collect(t, Stream(t.Context(), "memory", numbered(1000), tt.opts))
				if o.err == nil || o.err.Error() != tt.want || len(o.keys) == 0 || len(o.keys) != len(o.errs) {
					t.Errorf("%d results, %d errors, last error: %v, want %s", len(o.keys), len(o.errs), o.err, tt.want)
				}
				if took := time.Since(start); tt.took >= 0 && took != tt.took {
					t.Errorf("gave up after %v, want %v", took, tt.took)
				}
			})
		})
	}
	t.Run("not while one connection gets echoes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			opts := StreamOptions{
				Dial: pipes(t, jittery), Conns: 3,
				Reconnect: &Backoff{MaxElapsed: 10 * time.Second, Max: time.Second},
			}
			start := time.Now()
			collect(t, Stream(t.Context(), "memory", numbered(5000), opts)).wantAll(t, 5000)
			if took := time.Since(start); took < 20*time.Second {
				t.Errorf("the stream took only %v, so MaxElapsed was not tested", took)
			}
		})
	})
	t.Run("not while the server is full for all other connections", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const n = 10_000 // 50 s for one connection
			full := slices.Repeat([]behaviour{answers(0, "BUSY\n")}, 10_000)
			var dials atomic.Int64
			dial := pipes(t, append([]behaviour{jittery}, full...)...)
			opts := StreamOptions{
				Conns: 8, Reconnect: &Backoff{Max: 4 * time.Second, MaxElapsed: time.Minute},
				Dial: func(ctx context.Context, address string) (net.Conn, error) {
					dials.Add(1)
					return dial(ctx, address)
				},
			}
			collect(t, Stream(t.Context(), "memory", numbered(n), opts)).wantAll(t, n)
			// Each of the 7 others waits for 2 s on average, once its waits have grown.
			if most := int64(1 + 7*50); dials.Load() > most {
				t.Errorf("%d attempts to connect, want at most %d", dials.Load(), most)
			}
		})
	})
}

func TestStreamItemFails(t *testing.T) {
	t.Run("when its echo differs", func(t *testing.T) {
		corrupts := func(conn net.Conn) {
			eachLine(conn, func(line string) bool {
				if strings.HasSuffix(line, "77\n") {
					line = strings.ToUpper(line)
				}
				_, _ = io.WriteString(conn, line)
				return true
			})
		}
		opts := StreamOptions{Reconnect: &Backoff{Min: time.Millisecond}}
		o := collect(t, Stream(within(t), listen(t, corrupts), numbered(300), opts))
		if o.err != nil || len(o.keys) != 300 || len(o.errs) != 3 {
			t.Errorf("%d results, errors %v, last error: %v", len(o.keys), o.errs, o.err)
		}
		for _, key := range []int{77, 177, 277} {
			if _, ok := errors.AsType[*CorruptionError](o.errs[key]); !ok {
				t.Errorf("item %d: %v, want a CorruptionError", key, o.errs[key])
			}
		}
	})
	t.Run("when it ends every connection", func(t *testing.T) {
		rejects5 := func(conn net.Conn) {
			eachLine(conn, func(line string) bool {
				if line == "line 5\n" {
					return false
				}
				_, _ = io.WriteString(conn, line)
				return true
			})
		}
		o := collect(t, Stream(within(t), listen(t, rejects5), numbered(5000), StreamOptions{
			Conns: 2, InFlight: 10, Attempts: 3, Reconnect: &Backoff{Min: time.Microsecond, Max: time.Millisecond},
		}))
		if o.err != nil || len(o.keys) != 5000 || len(o.errs) != 1 || o.errs[5] == nil {
			t.Fatalf("%d results, errors %v, last error: %v", len(o.keys), o.errs, o.err)
		}
		if got := o.errs[5].Error(); !strings.HasPrefix(got, "gave up after 3 connections: ") {
			t.Errorf("item 5: %s", got)
		}
	})
	t.Run("not when the server is down", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			down := func(conn net.Conn) { _, _ = conn.Read(make([]byte, 1)) } // like a proxy without a backend
			script := slices.Concat([]behaviour{dies(10)}, slices.Repeat([]behaviour{down}, 50), []behaviour{echoes})
			opts := StreamOptions{Conns: 1, Attempts: 3, Reconnect: &Backoff{}, Dial: pipes(t, script...)}
			collect(t, Stream(t.Context(), "memory", numbered(100), opts)).wantAll(t, 100)
		})
	})
}

func TestStreamStall(t *testing.T) {
	t.Run("a stalled connection is replaced after StallTimeout", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var reasons []error
			start := time.Now()
			o := collect(t, Stream(t.Context(), "memory", numbered(100), StreamOptions{
				Conns: 1, Dial: pipes(t, hangs(t), echoes), StallTimeout: 5 * time.Second, Reconnect: &Backoff{Min: 1},
				OnReconnect: func(err error) { reasons = append(reasons, err) },
			}))
			o.wantAll(t, 100)
			if took := time.Since(start).Round(time.Millisecond); took != 5*time.Second {
				t.Errorf("the stream took %v, want 5s", took)
			}
			if len(reasons) != 1 || !errors.Is(reasons[0], errStalled) {
				t.Errorf("reasons to reconnect: %v, want %v", reasons, errStalled)
			}
		})
	})
	t.Run("a connection that cannot be written to is replaced sooner", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			start := time.Now()
			broken := true
			dial := pipes(t, hangs(t), echoes)
			firstBroken := func(ctx context.Context, address string) (net.Conn, error) {
				conn, err := dial(ctx, address)
				if broken {
					conn, broken = unwritable{conn}, false
				}
				return conn, err
			}
			opts := StreamOptions{Conns: 1, Reconnect: &Backoff{Min: 1}, Dial: firstBroken}
			collect(t, Stream(t.Context(), "memory", numbered(100), opts)).wantAll(t, 100)
			if took := time.Since(start).Round(time.Millisecond); took != abortTimeout {
				t.Errorf("the stream took %v, want %v", took, abortTimeout)
			}
		})
	})
	t.Run("other connections continue", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const n, inFlight = 2000, 40
			start, prompt := time.Now(), 0
			late := func(conn net.Conn) {
				time.Sleep(time.Second) // until the silent connection has its share
				echoes(conn)
			}
			opts := StreamOptions{
				Conns: 4, InFlight: inFlight, StallTimeout: time.Hour, Reconnect: &Backoff{},
				Dial: pipes(t, silent, late, late, late, echoes),
			}
			for r, err := range Stream(t.Context(), "memory", numbered(n), opts) {
				if err != nil || r.Err != nil {
					t.Fatal(r.Err, err)
				}
				if time.Since(start) < time.Hour {
					prompt++
				}
			}
			if want := n - inFlight/4; prompt != want {
				t.Errorf("%d items came back before the silent connection was closed, want %d", prompt, want)
			}
		})
	})

	// slow echoes what it reads, up to size bytes, after 0.9 s.
	slow := func(size int) behaviour {
		return func(conn net.Conn) {
			buf := make([]byte, size)
			for {
				n, err := conn.Read(buf)
				if err != nil {
					return
				}
				time.Sleep(900 * time.Millisecond)
				_, _ = conn.Write(buf[:n])
			}
		}
	}
	t.Run("a slow connection is not stalled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			opts := StreamOptions{Conns: 1, InFlight: 1, Dial: pipes(t, slow(1)), StallTimeout: time.Second}
			collect(t, Stream(t.Context(), "memory", numbered(10), opts)).wantAll(t, 10)
		})
	})
	t.Run("a connection without anything to send is not stalled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			source := func(yield func(Item[int], error) bool) {
				for item := range numbered(3) {
					time.Sleep(time.Hour)
					if !yield(item, nil) {
						return
					}
				}
			}
			opts := StreamOptions{Conns: 1, Dial: pipes(t, slow(100)), StallTimeout: time.Second}
			collect(t, Stream(t.Context(), "memory", source, opts)).wantAll(t, 3)
		})
	})
}

// MaxElapsed counts from the last echo, also if the server accepts connections and hangs.
func TestStreamGivesUpOnAServerThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hangs := func(context.Context, string) (net.Conn, error) {
			near, far := net.Pipe()
			go func() { _, _ = io.Copy(io.Discard, far) }()
			return near, nil
		}
		began := time.Now()
		items := func(yield func(Item[int], error) bool) { yield(Item[int]{Data: []byte("x\n")}, nil) }
		var last error
		for _, err := range Stream(t.Context(), "memory", items, StreamOptions{Dial: hangs, Reconnect: &Backoff{MaxElapsed: 3 * time.Second}}) {
			last = err
		}
		if took := time.Since(began); last == nil || !strings.Contains(last.Error(), "gave up after 3s") || took != 3*time.Second {
			t.Errorf("%v after %v, want to give up after 3s", last, took)
		}
	})
}
