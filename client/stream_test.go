package client

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
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

// An echo that differs is an error of its item, and the others go on.
// An item that ends every connection is given up, and does not take the others with it.
// A server that is gone says nothing about the item that it was sent last.
// A connection that the server does not end is ended when what was sent has come back.
// A server that is full for all but one connection costs no item anything.
// A connection that does not answer has its share, and no more: the others go on.
// Every connection that was made is closed.
func TestStreamClosesItsConnections(t *testing.T) {
	var made, closed atomic.Int64
	address := listen(t, tells(30), dies(3), echoes)
	dial := func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := DialConn(ctx, address, nil)
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

// Retries count from the last time that anything came back, over whichever connection.
// What comes slowly is not stalled.
// What is quiet because there is nothing to send is not stalled.
// The end of a stream does not wait for a source that waits: the caller ends that.
