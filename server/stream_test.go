package server

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

func TestG5WhoStopsWhenToldGetsEveryByteAndACleanEnd(t *testing.T) {
	const clients = 200
	s, addr := serveTCP(t, Echo, Options{})
	var warm, all sync.WaitGroup
	warm.Add(clients)
	rng := rand.New(rand.NewPCG(1, 2))
	data := [][]byte{randomBytes(rng, 1<<20, true), randomBytes(rng, 1<<20, false)}
	streamers := make([]*streamer, clients)
	for i := range streamers {
		streamers[i] = newStreamer(dialTCP(t, addr))
	}
	for i, c := range streamers {
		rng := rand.New(rand.NewPCG(uint64(i), 0))
		all.Go(func() { c.stream(rng, data[i%2]) })
		all.Go(func() { c.receive(t, &warm) })
	}
	warm.Wait()
	rep, took := shutdownIn(t, s, 20*time.Second, "upgrade")
	all.Wait()
	if rep.Notified != clients || rep.NoticeFailed != 0 || rep.Left != clients || took > 19*time.Second {
		t.Errorf("after %v: %+v, want %d notified, and all of them left by themselves", took, rep, clients)
	}
	wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: clients})
}

// streamer sends pieces of random bytes until it is told of the drain.
type streamer struct {
	*net.TCPConn
	told chan struct{}
	// flight holds a token for each piece on its way: more would fill megabytes of the kernel's buffers.
	flight chan struct{}
	sent   []byte // for the receiving goroutine, once streamed is closed
	// streamed is closed when the stream has ended.
	streamed chan struct{}
}

func newStreamer(c *net.TCPConn) *streamer {
	return &streamer{TCPConn: c, told: make(chan struct{}), flight: make(chan struct{}, 30), streamed: make(chan struct{})}
}

func (c *streamer) stream(rng *rand.Rand, data []byte) {
	defer close(c.streamed)
	defer c.CloseWrite()
	for {
		select {
		case <-c.told:
			return
		case c.flight <- struct{}{}:
		}
		at := rng.IntN(len(data) - streamPiece)
		n, err := c.Write(data[at : at+streamPiece])
		c.sent = append(c.sent, data[at:at+n]...)
		if err != nil {
			return
		}
	}
}

// streamPiece is of no size that buffers have.
const streamPiece = 1021

// receive checks that what comes back is what was sent, with one notice in it, on a line of its own.
func (c *streamer) receive(t *testing.T, warm *sync.WaitGroup) {
	notice := []byte("SHUTDOWN 20 upgrade\n")
	var got []byte
	isWarm, told, landed := false, false, 0
	buf := make([]byte, 16<<10)
	for {
		n, err := c.Read(buf)
		from := max(0, len(got)-len(notice))
		got = append(got, buf[:n]...)
		for ; (landed+1)*streamPiece <= len(got); landed++ {
			select {
			case <-c.flight:
			default: // it was the notice that made it a whole piece
			}
		}
		if !isWarm && (len(got) > 20_000 || err != nil) {
			isWarm = true
			warm.Done()
		}
		if !told && (bytes.Contains(got[from:], notice) || err != nil) {
			told = true
			close(c.told)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Errorf("client received %d bytes and then: %v", len(got), err)
			return
		}
	}
	before, after, found := bytes.Cut(got, notice)
	if !found {
		t.Errorf("client was not told")
		return
	}
	if len(before) > 0 && before[len(before)-1] != '\n' {
		t.Errorf("the notice does not stand on a line of its own: it follows %q", before[max(0, len(before)-10):])
	}
	<-c.streamed
	ownNewline := bytes.TrimSuffix(before, []byte("\n"))
	if !bytes.Equal(append(bytes.Clone(before), after...), c.sent) && !bytes.Equal(append(bytes.Clone(ownNewline), after...), c.sent) {
		t.Errorf("of %d bytes sent %d came back around the notice, equal up to byte %d",
			len(c.sent), len(before)+len(after), commonPrefix(before, c.sent))
	}
}
