package client

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// numbered is a source of n lines.
func numbered(n int) iter.Seq2[Item[int], error] {
	return func(yield func(Item[int], error) bool) {
		for i := range n {
			if !yield(Item[int]{i, fmt.Appendf(nil, "line %d\n", i)}, nil) {
				return
			}
		}
	}
}

// outcome is all that came out of a stream.
type outcome struct {
	order []int
	errs  map[int]error // of items
	sent  map[int]int   // how often
	err   error
}

func collect(t *testing.T, results iter.Seq2[Result[int], error]) outcome {
	t.Helper()
	o := outcome{errs: map[int]error{}, sent: map[int]int{}}
	for r, err := range results {
		if o.err != nil {
			t.Error("there is a result behind the error that is to be the last")
		}
		if o.err = err; err != nil {
			continue
		}
		if o.sent[r.Key] > 0 {
			t.Errorf("item %d has two results", r.Key)
		}
		o.order = append(o.order, r.Key)
		o.sent[r.Key] = max(r.Sent, 1)
		if r.Err != nil {
			o.errs[r.Key] = r.Err
		} else if want := fmt.Sprintf("line %d\n", r.Key); string(r.Data) != want {
			t.Errorf("item %d is %q, want %q", r.Key, r.Data, want)
		}
	}
	return o
}

// wantAll fails the test unless each of n items has come back, once.
func (o outcome) wantAll(t *testing.T, n int) {
	t.Helper()
	if o.err != nil || len(o.order) != n || len(o.errs) > 0 {
		t.Errorf("%d of %d items have a result, errors %v, at last: %v", len(o.order), n, o.errs, o.err)
	}
}

func (o outcome) wantOrder(t *testing.T) {
	t.Helper()
	for i, key := range o.order {
		if i != key {
			t.Fatalf("result %d is of item %d", i, key)
		}
	}
}

// jittery echoes line by line, some later than others.
func jittery(conn net.Conn) {
	lines := bufio.NewReader(conn)
	for {
		line, err := lines.ReadString('\n')
		if err != nil {
			return
		}
		time.Sleep(rand.N(10 * time.Millisecond)) // of the bubble's time
		_, _ = io.WriteString(conn, line)
	}
}

func TestStreamBringsEverythingBack(t *testing.T) {
	const n = 5000
	address := listen(t, echoes)
	collect(t, Stream(t.Context(), address, numbered(n), StreamOptions{})).wantAll(t, n)
	o := collect(t, Stream(t.Context(), address, numbered(n), StreamOptions{Conns: 7, InFlight: 50, InFlightBytes: 200, Ordered: true}))
	o.wantAll(t, n)
	o.wantOrder(t)
}

func TestStreamOrders(t *testing.T) {
	const n = 500
	for _, ordered := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			dial := pipes(t, jittery, jittery, jittery, jittery)
			o := collect(t, Stream(t.Context(), "memory", numbered(n), StreamOptions{Dial: locked(dial), Ordered: ordered}))
			o.wantAll(t, n)
			if ordered {
				o.wantOrder(t)
			} else if inOrder(o.order) {
				t.Error("the slow ones have held up the others")
			}
		})
	}
}

func inOrder(keys []int) bool {
	for i, key := range keys {
		if i != key {
			return false
		}
	}
	return true
}

// locked makes a dial function safe for concurrent use.
func locked(dial DialFunc) DialFunc {
	var mu sync.Mutex
	return func(ctx context.Context, address string) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		return dial(ctx, address)
	}
}

// An item of any size comes back, and one of none has a result, too.
func TestStreamTakesItemsOfAnySize(t *testing.T) {
	sizes := []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, 3 << 20, 0, 5}
	source := func(yield func(Item[int], error) bool) {
		for i, size := range sizes {
			if !yield(Item[int]{i, bytes.Repeat([]byte{'a' + byte(i)}, size)}, nil) {
				return
			}
		}
	}
	i := 0
	for r, err := range Stream(t.Context(), listen(t, echoes), source, StreamOptions{Conns: 3, InFlightBytes: 1 << 20, Ordered: true}) {
		if err != nil || r.Err != nil || r.Key != i || len(r.Data) != sizes[i] {
			t.Fatalf("result %d is of item %d, %d bytes, %v, %v", i, r.Key, len(r.Data), r.Err, err)
		}
		i++
	}
	if i != len(sizes) {
		t.Errorf("%d results, want %d", i, len(sizes))
	}
}

// No more is taken from the source than may be in flight, while nothing comes back and while nobody takes the results.
func TestStreamHoldsTheSourceBack(t *testing.T) {
	for name, c := range map[string]struct {
		opts StreamOptions
		most int64
		how  behaviour
	}{
		"by number, echoes": {StreamOptions{InFlight: 10}, 10, echoes},
		"by bytes, echoes":  {StreamOptions{InFlightBytes: 70}, 11, echoes}, // of 7 bytes each; the last waits for room
		"by number, none":   {StreamOptions{InFlight: 10, StallTimeout: -1}, 10, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var taken, handled atomic.Int64
				source := func(yield func(Item[int], error) bool) {
					for item, err := range numbered(10) { // so that all are as long
						item.Key = int(taken.Add(1))
						if !yield(item, err) {
							return
						}
					}
					for range 90 {
						if !yield(Item[int]{int(taken.Add(1)), []byte("line 9\n")}, nil) {
							return
						}
					}
				}
				c.opts.Dial = locked(pipes(t, c.how, c.how, c.how, c.how))
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				for range Stream(ctx, "memory", source, c.opts) {
					synctest.Wait() // the others do what they can
					if got := taken.Load() - handled.Load(); got > c.most {
						t.Fatalf("%d items are in flight, want at most %d", got, c.most)
					}
					handled.Add(1)
				}
				if got := handled.Load(); c.how == nil || got == 0 {
					t.Errorf("%d items were handled", got)
				}
			})
		})
	}
}

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

// tells echoes n lines, announces its end, and echoes what comes until the client half-closes.
func tells(n int) behaviour {
	return func(conn net.Conn) {
		lines := bufio.NewReader(conn)
		for i := 0; ; i++ {
			line, err := lines.ReadString('\n')
			if err != nil {
				return
			}
			if i == n {
				_, _ = io.WriteString(conn, "SHUTDOWN 5 SIGTERM\n")
			}
			_, _ = io.WriteString(conn, line)
		}
	}
}

func TestStreamHeedsNotices(t *testing.T) {
	var notices, reconnects atomic.Int64
	address := listen(t, tells(30), tells(30), echoes)
	o := collect(t, Stream(t.Context(), address, numbered(2000), StreamOptions{
		Conns: 1, Reconnect: &Backoff{Min: time.Millisecond},
		OnNotice:    func(Notice) { notices.Add(1) },
		OnReconnect: func(error) { reconnects.Add(1) },
	}))
	o.wantAll(t, 2000)
	for key, times := range o.sent {
		if times != 1 {
			t.Errorf("item %d was sent %d times: what was outstanding has not been waited for", key, times)
		}
	}
	if notices.Load() != 2 || reconnects.Load() != 2 {
		t.Errorf("%d notices, %d reconnects, want 2 of each", notices.Load(), reconnects.Load())
	}
}

// dies echoes n lines and some of the next, and is gone.
func dies(n int) behaviour {
	return func(conn net.Conn) {
		lines := bufio.NewReader(conn)
		for range n {
			line, err := lines.ReadString('\n')
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, line)
		}
		_, _ = io.WriteString(conn, "li")
	}
}

func TestStreamSendsAgainWhatDidNotComeBack(t *testing.T) {
	address := listen(t, dies(10), dies(0), dies(500), dies(1), echoes)
	o := collect(t, Stream(t.Context(), address, numbered(3000), StreamOptions{Conns: 2, Ordered: true, Reconnect: &Backoff{Min: time.Millisecond}}))
	o.wantAll(t, 3000)
	o.wantOrder(t)
	again := 0
	for _, times := range o.sent {
		if times > 1 {
			again++
		}
	}
	if again == 0 {
		t.Error("nothing was sent twice, where connections have died")
	}
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

// An echo that differs is an error of its item, and the others go on.
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

// An item that ends every connection is given up, and does not take the others with it.
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

// A server that is gone says nothing about the item that it was sent last.
func TestStreamBlamesNoItemForAServerThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		gone := func(conn net.Conn) { _, _ = conn.Read(make([]byte, 1)) } // such as a proxy without a server
		script := slices.Concat([]behaviour{dies(10)}, slices.Repeat([]behaviour{gone}, 50), []behaviour{echoes})
		opts := StreamOptions{Conns: 1, Attempts: 3, Reconnect: &Backoff{}, Dial: pipes(t, script...)}
		collect(t, Stream(t.Context(), "memory", numbered(100), opts)).wantAll(t, 100)
	})
}

// A connection that the server does not end is ended when what was sent has come back.
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

// A server that is full for all but one connection costs no item anything.
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

// A connection that does not answer has its share, and no more: the others go on.
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

// Every connection that was made is closed.
func TestStreamClosesItsConnections(t *testing.T) {
	var made, closed atomic.Int64
	address := listen(t, tells(30), dies(3), echoes)
	dial := func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := dialTCP(ctx, address)
		if err != nil {
			return nil, err
		}
		made.Add(1)
		return counted{conn.(*net.TCPConn), sync.OnceFunc(func() { closed.Add(1) })}, nil
	}
	opts := StreamOptions{Conns: 3, Dial: dial, Reconnect: &Backoff{Min: time.Millisecond}}
	collect(t, Stream(t.Context(), address, numbered(2000), opts)).wantAll(t, 2000)
	if made.Load() < 3 || made.Load() != closed.Load() {
		t.Errorf("%d connections were made, %d closed", made.Load(), closed.Load())
	}
}

type counted struct {
	*net.TCPConn
	closed func()
}

func (c counted) Close() error {
	c.closed()
	return c.TCPConn.Close()
}

// Who writes results can tell when to flush.
func TestStreamSaysWhenNothingMoreIsReady(t *testing.T) {
	for _, ordered := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const n = 10
			atOnce := func(conn net.Conn) {
				all := make([]byte, n*len("line 0\n"))
				_, _ = io.ReadFull(conn, all)
				_, _ = conn.Write(all)
				_, _ = io.Copy(io.Discard, conn)
			}
			i := 0
			for r, err := range Stream(t.Context(), "memory", numbered(n), StreamOptions{Conns: 1, Ordered: ordered, Dial: pipes(t, atOnce)}) {
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait() // all have come
				if i++; i > 1 && r.Idle != (i == n) {
					t.Errorf("result %d of %d is said to be idle: %v", i, n, r.Idle)
				}
			}
		})
	}
}

func TestStreamGivesUp(t *testing.T) {
	for name, c := range map[string]struct {
		opts StreamOptions
		want string
	}{
		"at once, without Reconnect":             {StreamOptions{}, "connect to memory: connection refused"},
		"after some retries":                     {StreamOptions{Conns: 1, Reconnect: &Backoff{Retries: 3}}, "gave up after 3 retries: connect to memory: connection refused"},
		"at once, where there is no sense in it": {StreamOptions{Dial: nowhere, Reconnect: &Backoff{}}, "connect to memory: address memory: missing port"},
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

// Retries count from the last time that anything came back, over whichever connection.
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

// What comes slowly is not stalled.
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

// What is quiet because there is nothing to send is not stalled.
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

// The end of a stream does not wait for a source that waits: the caller ends that.
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
