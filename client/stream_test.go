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
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// numbered is a source of n lines. Their keys are their numbers.
func numbered(n int) iter.Seq2[Item[int], error] {
	return func(yield func(Item[int], error) bool) {
		for i := range n {
			if !yield(Item[int]{i, fmt.Appendf(nil, "line %d\n", i)}, nil) {
				return
			}
		}
	}
}

// An outcome is everything that a stream of numbered items has returned.
type outcome struct {
	keys []int         // in the order of the results
	errs map[int]error // of items, by key
	sent map[int]int   // how often an item was sent, by key; at least 1
	err  error         // the last error
}

// collect reads all results. It fails the test if an item has two results, or an
// echo differs.
func collect(t *testing.T, results iter.Seq2[Result[int], error]) outcome {
	t.Helper()
	o := outcome{errs: map[int]error{}, sent: map[int]int{}}
	for r, err := range results {
		if o.err != nil {
			t.Error("a result follows the last error")
		}
		if o.err = err; err != nil {
			continue
		}
		if o.sent[r.Key] > 0 {
			t.Errorf("item %d has two results", r.Key)
		}
		o.keys = append(o.keys, r.Key)
		o.sent[r.Key] = max(r.Sent, 1)
		if r.Err != nil {
			o.errs[r.Key] = r.Err
		} else if want := fmt.Sprintf("line %d\n", r.Key); string(r.Data) != want {
			t.Errorf("item %d is %q, want %q", r.Key, r.Data, want)
		}
	}
	return o
}

// wantAll fails the test unless each of n items has come back.
func (o outcome) wantAll(t *testing.T, n int) {
	t.Helper()
	if o.err != nil || len(o.keys) != n || len(o.errs) > 0 {
		t.Errorf("%d of %d items have a result, errors %v, last error: %v", len(o.keys), n, o.errs, o.err)
	}
}

func (o outcome) inOrder() bool {
	for i, key := range o.keys {
		if i != key {
			return false
		}
	}
	return true
}

// eachLine calls handle with each line until the connection ends or handle returns
// false.
func eachLine(conn net.Conn, handle func(line string) bool) {
	lines := bufio.NewReader(conn)
	for {
		line, err := lines.ReadString('\n')
		if err != nil || !handle(line) {
			return
		}
	}
}

// jittery echoes line by line, after delays of up to 10 ms of the bubble's time.
func jittery(conn net.Conn) {
	eachLine(conn, func(line string) bool {
		time.Sleep(rand.N(10 * time.Millisecond))
		_, _ = io.WriteString(conn, line)
		return true
	})
}

// silent reads everything and echoes nothing.
func silent(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

// announces echoes n lines, announces a shutdown, and echoes until the client
// half-closes.
func announces(n int) behaviour {
	return func(conn net.Conn) {
		i := 0
		eachLine(conn, func(line string) bool {
			if i == n {
				_, _ = io.WriteString(conn, "SHUTDOWN 5 SIGTERM\n")
			}
			i++
			_, _ = io.WriteString(conn, line)
			return true
		})
	}
}

// dies echoes n lines and two more bytes, and closes.
func dies(n int) behaviour {
	return func(conn net.Conn) {
		if i := 0; n > 0 {
			eachLine(conn, func(line string) bool {
				i++
				_, _ = io.WriteString(conn, line)
				return i < n
			})
		}
		_, _ = io.WriteString(conn, "li")
	}
}

func TestStreamOrder(t *testing.T) {
	t.Run("ordered results come in the order of the items", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			opts := StreamOptions{Dial: pipes(t, jittery, jittery, jittery, jittery), Ordered: true}
			o := collect(t, Stream(t.Context(), "memory", numbered(500), opts))
			o.wantAll(t, 500)
			if !o.inOrder() {
				t.Errorf("the order is %v", o.keys)
			}
		})
	})
	t.Run("unordered results do not wait for slower ones", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			opts := StreamOptions{Dial: pipes(t, jittery, jittery, jittery, jittery)}
			o := collect(t, Stream(t.Context(), "memory", numbered(500), opts))
			o.wantAll(t, 500)
			if o.inOrder() {
				t.Error("results are in the order of the items")
			}
		})
	})
	t.Run("small limits do not break the order", func(t *testing.T) {
		opts := StreamOptions{Conns: 7, InFlight: 50, InFlightBytes: 200, Ordered: true}
		o := collect(t, Stream(within(t), listen(t, echoes), numbered(5000), opts))
		o.wantAll(t, 5000)
		if !o.inOrder() {
			t.Error("results are not in the order of the items")
		}
	})
	t.Run("items of any size come back, empty ones too", func(t *testing.T) {
		sizes := []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, 3 << 20, 0, 5}
		source := func(yield func(Item[int], error) bool) {
			for i, size := range sizes {
				if !yield(Item[int]{i, bytes.Repeat([]byte{'a' + byte(i)}, size)}, nil) {
					return
				}
			}
		}
		i := 0
		opts := StreamOptions{Conns: 3, InFlightBytes: 1 << 20, Ordered: true}
		for r, err := range Stream(within(t), listen(t, echoes), source, opts) {
			if err != nil || r.Err != nil || r.Key != i || len(r.Data) != sizes[i] {
				t.Fatalf("result %d is of item %d, %d bytes, %v, %v", i, r.Key, len(r.Data), r.Err, err)
			}
			i++
		}
		if i != len(sizes) {
			t.Errorf("%d results, want %d", i, len(sizes))
		}
	})
}

// TestStreamBackpressure checks how many items are taken from the source and not
// handled by the consumer.
func TestStreamBackpressure(t *testing.T) {
	for name, tt := range map[string]struct {
		opts   StreamOptions
		most   int64
		server behaviour
	}{
		"InFlight": {StreamOptions{InFlight: 10}, 10, echoes},
		// Ten items of 7 bytes, and one that waits for room.
		"InFlightBytes":                       {StreamOptions{InFlightBytes: 70}, 11, echoes},
		"InFlight while the server is silent": {StreamOptions{InFlight: 10, StallTimeout: -1}, 10, silent},
		"InFlight of one item per connection": {StreamOptions{InFlight: 4}, 4, echoes},
		"InFlight of fewer items than Conns":  {StreamOptions{InFlight: 1}, 1, echoes},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var taken, handled atomic.Int64
				source := func(yield func(Item[int], error) bool) {
					for range 100 {
						if !yield(Item[int]{int(taken.Add(1)), []byte("line 9\n")}, nil) {
							return
						}
					}
				}
				tt.opts.Dial = pipes(t, tt.server, tt.server, tt.server, tt.server)
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				peak := int64(0)
				for range Stream(ctx, "memory", source, tt.opts) {
					synctest.Wait() // until the source is blocked
					peak = max(peak, taken.Load()-handled.Load())
					handled.Add(1)
				}
				if peak != tt.most {
					t.Errorf("at most %d items were in flight, want %d", peak, tt.most)
				}
			})
		})
	}
}

// TestStreamIdle checks that a consumer can tell when to flush.
func TestStreamIdle(t *testing.T) {
	for _, ordered := range []bool{false, true} {
		t.Run(fmt.Sprintf("ordered %v", ordered), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const n = 10
				atOnce := func(conn net.Conn) {
					all := make([]byte, n*len("line 0\n"))
					_, _ = io.ReadFull(conn, all)
					_, _ = conn.Write(all)
					silent(conn)
				}
				i := 0
				opts := StreamOptions{Conns: 1, Ordered: ordered, Dial: pipes(t, atOnce)}
				for r, err := range Stream(t.Context(), "memory", numbered(n), opts) {
					if err != nil {
						t.Fatal(err)
					}
					synctest.Wait() // until all echoes have arrived
					if i++; i > 1 && r.Idle != (i == n) {
						t.Errorf("result %d of %d: Idle = %v", i, n, r.Idle)
					}
				}
				if i != n {
					t.Errorf("%d results, want %d", i, n)
				}
			})
		})
	}
}

// TestStreamEnds also checks, by the end of each bubble, that no goroutine is left.
func TestStreamEnds(t *testing.T) {
	errStop := errors.New("stop")
	t.Run("when the consumer stops, and so does the source", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ended := false
			source := func(yield func(Item[int], error) bool) {
				defer func() { ended = true }()
				numbered(1000)(yield)
			}
			n := 0
			opts := StreamOptions{Dial: pipes(t, jittery, jittery, jittery, jittery)}
			for range Stream(t.Context(), "memory", source, opts) {
				if n++; n == 10 {
					break
				}
			}
			if !ended {
				t.Error("the source still runs")
			}
		})
	})
	t.Run("when the source fails, after what was taken has come back", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			source := func(yield func(Item[int], error) bool) {
				numbered(20)(yield)
				yield(Item[int]{}, errStop)
			}
			opts := StreamOptions{Dial: pipes(t, jittery, jittery, jittery, jittery)}
			o := collect(t, Stream(t.Context(), "memory", source, opts))
			if !errors.Is(o.err, errStop) {
				t.Errorf("the last error is %v, want %v", o.err, errStop)
			}
			o.err = nil
			o.wantAll(t, 20)
		})
	})
	t.Run("when the context ends, with a result for each item taken", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			time.AfterFunc(time.Second, func() { cancel(errStop) })
			hung, taken := hangs(t), 0
			source := func(yield func(Item[int], error) bool) {
				numbered(1000)(func(item Item[int], err error) bool { taken++; return yield(item, err) })
			}
			opts := StreamOptions{InFlight: 12, Dial: pipes(t, hung, hung, hung, hung)}
			o := collect(t, Stream(ctx, "memory", source, opts))
			if !errors.Is(o.err, errStop) || taken == 0 || len(o.keys) != taken || len(o.errs) != taken {
				t.Fatalf("%d taken, %d results, %d errors, last error: %v", taken, len(o.keys), len(o.errs), o.err)
			}
			for key, err := range o.errs {
				if !errors.Is(err, errStop) || !errors.Is(err, ErrUnfinished) {
					t.Errorf("item %d: %v, want ErrUnfinished and %v", key, err, errStop)
				}
			}
		})
	})
	t.Run("while the source waits, which the caller ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			items := make(chan Item[int], 1)
			items <- Item[int]{0, []byte("line 0\n")}
			var last error
			opts := StreamOptions{Dial: pipes(t)}
			for r, err := range Stream(t.Context(), "memory", FromChannel(ctx, items), opts) {
				if err != nil {
					last = err
					items <- Item[int]{1, []byte("line 1\n")} // too late: nothing takes it
					synctest.Wait()
					cancel()
				} else if !errors.Is(r.Err, ErrUnfinished) {
					t.Errorf("item %d: %v, want ErrUnfinished", r.Key, r.Err)
				}
			}
			if !errors.Is(last, errRefused) {
				t.Errorf("the last error is %v, want %v", last, errRefused)
			}
		})
	})
	t.Run("when the context of FromChannel ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancelCause(t.Context())
			items := make(chan Item[int])
			go func() {
				for item := range numbered(3) {
					items <- item
				}
				cancel(errStop)
			}()
			opts := StreamOptions{Conns: 1, Dial: pipes(t, echoes)}
			o := collect(t, Stream(t.Context(), "memory", FromChannel(ctx, items), opts))
			if !errors.Is(o.err, errStop) {
				t.Errorf("the last error is %v, want %v", o.err, errStop)
			}
			o.err = nil
			o.wantAll(t, 3)
		})
	})
}

func TestStreamClosesItsConnections(t *testing.T) {
	var made, closed atomic.Int64
	address := listen(t, announces(30), dies(3), echoes)
	dial := func(ctx context.Context, address string) (net.Conn, error) {
		conn, err := DialConn(ctx, address, nil)
		if err != nil {
			return nil, err
		}
		made.Add(1)
		return closeCounter{conn.(*net.TCPConn), sync.OnceFunc(func() { closed.Add(1) })}, nil
	}
	opts := StreamOptions{Conns: 3, Dial: dial, Reconnect: &Backoff{Min: time.Millisecond}}
	collect(t, Stream(within(t), address, numbered(2000), opts)).wantAll(t, 2000)
	if made.Load() < 3 || made.Load() != closed.Load() {
		t.Errorf("%d connections were made, %d closed", made.Load(), closed.Load())
	}
}

type closeCounter struct {
	*net.TCPConn
	count func()
}

func (c closeCounter) Close() error {
	c.count()
	return c.TCPConn.Close()
}

// BenchmarkLines compares two ways to echo short lines over the loopback interface:
// one after the other over one connection, and as a stream over 16.
func BenchmarkLines(b *testing.B) {
	line := []byte("a line of some sixty bytes, like the row of a common table...\n")
	b.Run("loop", func(b *testing.B) {
		c, err := Dial(b.Context(), listen(b, echoes), Options{})
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		b.SetBytes(int64(len(line)))
		for b.Loop() {
			if _, err := c.Echo(b.Context(), line); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("stream", func(b *testing.B) {
		address := listen(b, echoes)
		b.SetBytes(int64(len(line)))
		b.ReportAllocs()
		source := func(yield func(Item[int], error) bool) {
			for b.Loop() {
				if !yield(Item[int]{Data: line}, nil) {
					return
				}
			}
		}
		for r, err := range Stream(b.Context(), address, source, StreamOptions{Conns: 16, Ordered: true}) {
			if err != nil || r.Err != nil {
				b.Fatal(err, r.Err)
			}
		}
	})
}
