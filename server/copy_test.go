package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
)

// A client that ends its stream right behind its data has both arrive in one event.
func TestG1WriteToMissesNoEndOfStreamBehindData(t *testing.T) {
	onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
		_, dial := serve(Echo)
		var clients sync.WaitGroup
		defer clients.Wait()
		for range 300 {
			nc := dial()
			clients.Go(func() {
				sent := make([]byte, 1+rand.IntN(9000))
				for i := range sent {
					sent[i] = byte(rand.Uint32())
				}
				if _, err := nc.Write(sent); err != nil {
					t.Error(err)
				}
				if err := nc.CloseWrite(); err != nil {
					t.Error(err)
				}
				got, err := io.ReadAll(nc)
				if err != nil || !bytes.Equal(got, sent) {
					t.Errorf("%d of %d bytes came back, error %v", len(got), len(sent), err)
				}
			})
		}
	})
}

// A client that writes all before it reads makes the echo wait in the middle of its writes, with buffers of every size.
func TestG1WriteToLosesNothingWhenTheClientReadsLate(t *testing.T) {
	onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
		_, dial := serve(Echo)
		nc := dial()
		sent := make([]byte, 48<<20)
		for i := range sent {
			sent[i] = byte(i ^ i>>8 ^ i>>16)
		}
		var writer sync.WaitGroup
		defer writer.Wait()
		writer.Go(func() {
			for rest, size := sent, 1; len(rest) > 0; size = size*7%(1<<20) + 1 {
				n, err := nc.Write(rest[:min(size, len(rest))])
				if err != nil {
					t.Error(err)
					return
				}
				rest = rest[n:]
			}
			nc.CloseWrite()
		})
		if got, err := io.ReadAll(nc); err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d of %d bytes came back, or others; error %v", len(got), len(sent), err)
		}
	})
}

func TestWriteToAnotherWriterCountsWhatItTook(t *testing.T) {
	onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
		type result struct {
			n    int64
			err  error
			text string
		}
		results := make(chan result, 1)
		_, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
			var sink bytes.Buffer
			n, err := c.WriteTo(struct{ io.Writer }{&sink})
			results <- result{n, err, sink.String()}
			return err
		}))
		nc := dial()
		if _, err := io.WriteString(nc, "one two"); err != nil {
			t.Fatal(err)
		}
		nc.CloseWrite()
		if got, want := <-results, (result{7, nil, "one two"}); got != want {
			t.Errorf("WriteTo: %+v, want %+v", got, want)
		}
	})
}

type brokenWriter struct{ err error }

func (w brokenWriter) Write(p []byte) (int, error) { return len(p) / 2, w.err }

func TestWriteToReturnsTheErrorOfItsWriter(t *testing.T) {
	onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
		boom := errors.New("boom")
		for _, want := range []error{boom, io.ErrShortWrite} {
			errs := make(chan error, 1)
			counts := make(chan int64, 1)
			_, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
				w := brokenWriter{}
				if want == boom {
					w.err = boom
				}
				n, err := c.WriteTo(w)
				counts <- n
				errs <- err
				return nil
			}))
			if _, err := io.WriteString(dial(), "four"); err != nil {
				t.Fatal(err)
			}
			if n, err := <-counts, <-errs; n != 2 || !errors.Is(err, want) {
				t.Errorf("WriteTo = %d, %v; want 2, %v", n, err, want)
			}
		}
	})
}

type lyingWriter struct{}

func (lyingWriter) Write(p []byte) (int, error) { return len(p) + 1, nil }

type panickingWriter struct{}

func (panickingWriter) Write([]byte) (int, error) { panic("no") }

// A buffer that was not given back would count as out for ever.
func TestWriteToGivesItsBufferBackWhateverItsWriterDoes(t *testing.T) {
	for _, w := range []io.Writer{brokenWriter{errors.New("boom")}, lyingWriter{}, panickingWriter{}} {
		onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
			s, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
				cp := &copier{src: c, dst: w, size: largeBuffer}
				if raw := rawConn(c.nc); raw != nil {
					_, err := cp.run(raw)
					return err
				}
				_, err := cp.plain()
				return err
			}))
			if _, err := io.WriteString(dial(), "four"); err != nil {
				t.Fatal(err)
			}
			if err := s.AwaitStatus(t.Context(), func(_ State, open int) bool { return open == 0 && s.state.locked.value.accepted == 1 }); err != nil {
				t.Fatal(err)
			}
			if n := buffers[largeBuffer].inUse.Load(); n != 0 {
				t.Errorf("%d large buffers are out, want none", n)
			}
		})
	}
}

// An echo to a client that never stops sending, and reads all, must see that the connection is to end.
func TestWriteToHeedsTheEndOfAConnectionUnderFlood(t *testing.T) {
	onEachPath(t, func(t *testing.T, serve func(Handler) (*Server, func() stream)) {
		ended := make(chan error, 1)
		conns := make(chan *Conn, 1)
		_, dial := serve(HandlerFunc(func(_ context.Context, c *Conn) error {
			conns <- c
			_, err := io.Copy(c, c)
			ended <- err
			return err
		}))
		nc := dial()
		var flood sync.WaitGroup
		defer flood.Wait()
		defer nc.Close()
		flood.Go(func() {
			for block := make([]byte, 1<<10); ; {
				if _, err := nc.Write(block); err != nil {
					return
				}
			}
		})
		flood.Go(func() { _, _ = io.Copy(io.Discard, nc) })
		c := <-conns
		if err := c.srv.Kill(c.ID()); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; !errors.Is(err, ErrKilled) {
			t.Errorf("the echo ended with %v, want ErrKilled", err)
		}
	})
}

func TestBuffersGrowAndShrinkWithReads(t *testing.T) {
	for _, step := range []struct {
		size        bufferSize
		n           int
		smallBefore bool
		want        bufferSize
		small       bool
	}{
		{smallBuffer, 1, false, smallBuffer, false},
		{smallBuffer, 4 << 10, false, mediumBuffer, false},
		{mediumBuffer, 4 << 10, true, mediumBuffer, false},
		{mediumBuffer, 4<<10 - 1, false, mediumBuffer, true}, // may be the end of a message of 7 KiB
		{mediumBuffer, 4<<10 - 1, true, smallBuffer, false},
		{mediumBuffer, 64 << 10, true, largeBuffer, false},
		{largeBuffer, 64 << 10, false, largeBuffer, false},
		{largeBuffer, 64<<10 - 1, true, mediumBuffer, false},
		{largeBuffer, 512 << 10, false, largeBuffer, false},
	} {
		if got, small := step.size.after(step.n, step.smallBefore); got != step.want || small != step.small {
			t.Errorf("size %d after %d bytes, small before: %t: %d, small: %t; want %d, %t",
				step.size, step.n, step.smallBefore, got, small, step.want, step.small)
		}
	}
}

// Nothing else in this package's tests runs in parallel with this, so the counts are its own.
func TestLargeBuffersAreBounded(t *testing.T) {
	var out []*buffer
	for range buffers[largeBuffer].most {
		out = append(out, takeBuffer(largeBuffer))
	}
	more := takeBuffer(largeBuffer)
	if more.size != mediumBuffer || len(more.bytes) != 64<<10 {
		t.Errorf("beyond the bound there was one of size %d, want the next smaller", more.size)
	}
	more.giveBack()
	for _, b := range out {
		if b.size != largeBuffer {
			t.Errorf("within the bound there was one of size %d", b.size)
		}
		b.giveBack()
	}
	if n, m := buffers[largeBuffer].inUse.Load(), buffers[mediumBuffer].inUse.Load(); n != 0 || m != 0 {
		t.Errorf("all given back, and %d large and %d medium ones count as out", n, m)
	}
}
