package client

import (
	"bufio"
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

func TestStreamEndsWithItsConsumer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // whose end would not come with goroutines left
		ended := false
		source := func(yield func(Item[int], error) bool) {
			defer func() { ended = true }()
			numbered(1000)(yield)
		}
		n := 0
		for range Stream(t.Context(), "memory", source, StreamOptions{Dial: locked(pipes(t, jittery, jittery, jittery, jittery))}) {
			if n++; n == 10 {
				break
			}
		}
		if !ended {
			t.Error("the source goes on after the end")
		}
	})
}

func TestStreamFinishesWhatWasTakenBeforeTheSourceFailed(t *testing.T) {
	errSource := errors.New("disk on fire")
	synctest.Test(t, func(t *testing.T) {
		source := func(yield func(Item[int], error) bool) {
			numbered(20)(yield)
			yield(Item[int]{}, errSource)
		}
		o := collect(t, Stream(t.Context(), "memory", source, StreamOptions{Dial: locked(pipes(t, jittery, jittery, jittery, jittery))}))
		if !errors.Is(o.err, errSource) {
			t.Errorf("the stream ends with %v", o.err)
		}
		o.err = nil
		o.wantAll(t, 20)
	})
}

func TestStreamEndsWithItsContext(t *testing.T) {
	errStop := errors.New("stop")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second, func() { cancel(errStop) })
		stuck, taken := stalls(t), 0
		source := func(yield func(Item[int], error) bool) {
			numbered(1000)(func(item Item[int], err error) bool { taken++; return yield(item, err) })
		}
		o := collect(t, Stream(ctx, "memory", source, StreamOptions{InFlight: 12, Dial: locked(pipes(t, stuck, stuck, stuck, stuck))}))
		if !errors.Is(o.err, errStop) || taken == 0 || len(o.order) != taken || len(o.errs) != taken {
			t.Fatalf("%d taken, %d results, %d of them errors, at last: %v", taken, len(o.order), len(o.errs), o.err)
		}
		for key, err := range o.errs {
			if !errors.Is(err, errStop) {
				t.Errorf("item %d: %v", key, err)
			}
		}
	})
}

func TestStreamNeedsNoReconnectToFinishWhatIsDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := func(conn net.Conn) { // holds everything back until long after the other has ended
			got := make([]byte, chunkSize)
			n, _ := conn.Read(got)
			time.Sleep(time.Second)
			_, _ = conn.Write(got[:n])
			_, _ = io.Copy(io.Discard, conn)
		}
		soon := func(conn net.Conn) { // once the other has something to send
			time.Sleep(time.Millisecond)
			dies(3)(conn)
		}
		o := collect(t, Stream(t.Context(), "memory", numbered(1000), StreamOptions{Conns: 2, InFlight: 100, Dial: locked(pipes(t, soon, late))}))
		if o.err == nil || !strings.Contains(o.err.Error(), "stream to memory: server closed the connection") {
			t.Errorf("the stream ends with %v", o.err)
		}
		if came := len(o.order) - len(o.errs); came <= 3 {
			t.Errorf("%d came back, of the first connection only", came)
		}
		for key, err := range o.errs {
			if !errors.Is(err, o.err) {
				t.Errorf("item %d has the error %v, want the stream's", key, err)
			}
		}
	})
}

func TestStreamTellsCorruption(t *testing.T) {
	corrupts := func(conn net.Conn) {
		lines := bufio.NewReader(conn)
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				return
			}
			if strings.HasSuffix(line, "77\n") {
				line = strings.ToUpper(line)
			}
			_, _ = io.WriteString(conn, line)
		}
	}
	o := collect(t, Stream(t.Context(), listen(t, corrupts), numbered(300), StreamOptions{Reconnect: &Backoff{Min: time.Millisecond}}))
	if o.err != nil || len(o.order) != 300 || len(o.errs) != 3 {
		t.Errorf("%d results, errors %v, at last: %v", len(o.order), o.errs, o.err)
	}
	for _, key := range []int{77, 177, 277} {
		if _, is := errors.AsType[*CorruptionError](o.errs[key]); !is {
			t.Errorf("item %d has the error %v, want a CorruptionError", key, o.errs[key])
		}
	}
}

func TestStreamGivesAnItemUp(t *testing.T) {
	hates := func(conn net.Conn) {
		lines := bufio.NewReader(conn)
		for {
			line, err := lines.ReadString('\n')
			if err != nil || line == "line 5\n" {
				return
			}
			_, _ = io.WriteString(conn, line)
		}
	}
	o := collect(t, Stream(t.Context(), listen(t, hates), numbered(5000), StreamOptions{
		Conns: 2, InFlight: 10, Attempts: 3, Reconnect: &Backoff{Min: time.Microsecond, Max: time.Millisecond},
	}))
	if o.err != nil || len(o.order) != 5000 || len(o.errs) != 1 || o.errs[5] == nil {
		t.Fatalf("%d results, errors %v, at last: %v", len(o.order), o.errs, o.err)
	}
	if got := o.errs[5].Error(); !strings.HasPrefix(got, "gave up after 3 connections: ") {
		t.Errorf("item 5: %s", got)
	}
}

func TestStreamBlamesNoItemForAServerThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := func(conn net.Conn) { _, _ = conn.Read(make([]byte, 1)) } // such as a proxy without a server
		script := slices.Concat([]behaviour{dies(10)}, slices.Repeat([]behaviour{gone}, 50), []behaviour{echoes})
		opts := StreamOptions{Conns: 1, Attempts: 3, Reconnect: &Backoff{}, Dial: pipes(t, script...)}
		collect(t, Stream(t.Context(), "memory", numbered(100), opts)).wantAll(t, 100)
	})
}

func TestStreamLeavesAServerThatDoesNotClose(t *testing.T) {
	stays := func(conn net.Conn) {
		_, _ = io.WriteString(conn, "SHUTDOWN 5 SIGTERM\n")
		all, _ := io.ReadAll(conn) // to the half-close
		_, _ = conn.Write(all)
		<-t.Context().Done()
	}
	collect(t, Stream(t.Context(), listen(t, stays, echoes), numbered(1000), StreamOptions{
		Conns: 1, Reconnect: &Backoff{Min: time.Millisecond}, StallTimeout: -1,
	})).wantAll(t, 1000)
}

func TestStreamBlamesNoItemForAServerThatIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var first atomic.Bool
		serving, full := pipes(t, jittery), pipes(t, slices.Repeat([]behaviour{after(0, "BUSY\n")}, 10_000)...)
		tries := 0
		dial := locked(func(ctx context.Context, address string) (net.Conn, error) {
			if first.CompareAndSwap(false, true) {
				return serving(ctx, address)
			}
			tries++
			return full(ctx, address)
		})
		const n = 10_000 // 50 s for one connection
		opts := StreamOptions{Dial: dial, Conns: 8, Reconnect: &Backoff{Max: 4 * time.Second, MaxElapsed: time.Minute}}
		collect(t, Stream(t.Context(), "memory", numbered(n), opts)).wantAll(t, n)
		if most := 7 * 50; tries > most { // each waits for 2 s in the mean, once its waits have grown
			t.Errorf("%d attempts to connect, want at most %d", tries, most)
		}
	})
}

func TestStreamGoesOnBesideAConnectionThatDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		silent := func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }
		const n, inFlight = 2000, 40
		began, prompt := time.Now(), 0
		opts := StreamOptions{
			Conns: 4, InFlight: inFlight, StallTimeout: time.Hour, Reconnect: &Backoff{},
			Dial: locked(pipes(t, silent, echoes, echoes, echoes, echoes)),
		}
		for r, err := range Stream(t.Context(), "memory", numbered(n), opts) {
			if err != nil || r.Err != nil {
				t.Fatal(r.Err, err)
			}
			if time.Since(began) < time.Hour {
				prompt++
			}
		}
		if prompt != n-inFlight/4 {
			t.Errorf("%d of %d items came back before the silent connection was given up, want all but %d", prompt, n, inFlight/4)
		}
	})
}

func TestStreamGivesUp(t *testing.T) {
	for name, c := range map[string]struct {
		opts StreamOptions
		want string
	}{
		"at once, without Reconnect":             {StreamOptions{}, "connect to memory: connection refused"},
		"after some retries":                     {StreamOptions{Conns: 1, Reconnect: &Backoff{Retries: 3}}, "gave up after 3 retries: connect to memory: connection refused"},
		"at once, where there is no sense in it": {StreamOptions{Dial: nowhere, Reconnect: &Backoff{}}, "address memory: missing port"},
		"after some time":                        {StreamOptions{Reconnect: &Backoff{MaxElapsed: time.Minute}}, "gave up after 1m0s: connect to memory: connection refused"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				c.opts.InFlight = 7
				if c.opts.Dial == nil {
					c.opts.Dial = pipes(t)
				}
				o := collect(t, Stream(t.Context(), "memory", numbered(1000), c.opts))
				if o.err == nil || o.err.Error() != c.want || len(o.order) == 0 || len(o.order) != len(o.errs) {
					t.Errorf("%d results, %d of them errors, at last: %v", len(o.order), len(o.errs), o.err)
				}
				if c.opts.Reconnect != nil && c.opts.Reconnect.MaxElapsed > 0 && time.Since(began) != time.Minute {
					t.Errorf("gave up after %v", time.Since(began))
				}
			})
		})
	}
}

func nowhere(_ context.Context, address string) (net.Conn, error) {
	return nil, &net.AddrError{Err: "missing port", Addr: address}
}

func TestStreamGoesOnWhileOneConnectionServes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var first atomic.Bool
		serving := pipes(t, jittery)
		dial := locked(func(ctx context.Context, address string) (net.Conn, error) {
			if first.CompareAndSwap(false, true) {
				return serving(ctx, address)
			}
			return nil, errRefused
		})
		opts := StreamOptions{Dial: dial, Conns: 3, Reconnect: &Backoff{MaxElapsed: 10 * time.Second, Max: time.Second}}
		collect(t, Stream(t.Context(), "memory", numbered(5000), opts)).wantAll(t, 5000)
	})
}

func TestStreamGivesAStalledConnectionUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var reasons []error
		began := time.Now()
		o := collect(t, Stream(t.Context(), "memory", numbered(100), StreamOptions{
			Conns: 1, Dial: pipes(t, stalls(t), echoes), StallTimeout: 5 * time.Second, Reconnect: &Backoff{Min: 1},
			OnReconnect: func(err error) { reasons = append(reasons, err) },
		}))
		o.wantAll(t, 100)
		if took := time.Since(began).Round(time.Millisecond); took != 5*time.Second {
			t.Errorf("it took %v, want the stall timeout", took)
		}
		if len(reasons) != 1 || !errors.Is(reasons[0], errStalled) {
			t.Errorf("reconnected for %v", reasons)
		}
	})
}

func TestStreamIsPatientWithASlowConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(conn net.Conn) {
			buf := make([]byte, 1)
			for {
				if _, err := conn.Read(buf); err != nil {
					return
				}
				time.Sleep(900 * time.Millisecond)
				_, _ = conn.Write(buf)
			}
		}
		opts := StreamOptions{Conns: 1, InFlight: 1, Dial: pipes(t, slow), StallTimeout: time.Second}
		collect(t, Stream(t.Context(), "memory", numbered(10), opts)).wantAll(t, 10)
	})
}

func TestStreamIsPatientWithAnIdleConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		source := func(yield func(Item[int], error) bool) {
			for item := range numbered(3) {
				time.Sleep(time.Hour)
				if !yield(item, nil) {
					return
				}
			}
		}
		slow := func(conn net.Conn) {
			lines := bufio.NewReader(conn)
			for {
				line, err := lines.ReadString('\n')
				if err != nil {
					return
				}
				time.Sleep(900 * time.Millisecond)
				_, _ = io.WriteString(conn, line)
			}
		}
		opts := StreamOptions{Conns: 1, Dial: pipes(t, slow), StallTimeout: time.Second}
		collect(t, Stream(t.Context(), "memory", source, opts)).wantAll(t, 3)
	})
}

func TestStreamEndsWhileItsSourceWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		items := make(chan Item[int], 1)
		items <- Item[int]{0, []byte("line 0\n")}
		var last error
		for r, err := range Stream(t.Context(), "memory", FromChannel(ctx, items), StreamOptions{Dial: pipes(t)}) {
			if err != nil {
				last = err
				items <- Item[int]{1, []byte("line 1\n")} // too late: nobody takes it
				synctest.Wait()
				cancel()
			} else if !errors.Is(r.Err, ErrUnfinished) {
				t.Errorf("item %d: %v", r.Key, r.Err)
			}
		}
		if !errors.Is(last, errRefused) {
			t.Errorf("the stream ends with %v", last)
		}
	})
}

func TestFromChannelEndsWithItsContext(t *testing.T) {
	errStop := errors.New("stop")
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		items := make(chan Item[int])
		go func() {
			for item := range numbered(3) {
				items <- item
			}
			cancel(errStop)
		}()
		o := collect(t, Stream(t.Context(), "memory", FromChannel(ctx, items), StreamOptions{Conns: 1, Dial: pipes(t, echoes)}))
		if !errors.Is(o.err, errStop) {
			t.Errorf("the stream ends with %v", o.err)
		}
		o.err = nil
		o.wantAll(t, 3)
	})
}
