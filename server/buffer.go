package server

import (
	"sync"
	"sync/atomic"
)

// bufferSize is one of the sizes of buffer that WriteTo reads into.
type bufferSize int8

// The sizes. Half a megabyte moves bulk with as little CPU time as splice(2) does (docs/benchmarks.md).
const (
	smallBuffer bufferSize = iota
	mediumBuffer
	largeBuffer
)

var buffers = [...]struct {
	bytes int
	most  int32 // how many may be out at a time: a client that stalls keeps the one being written to it
	out   atomic.Int32
	pool  sync.Pool
}{
	smallBuffer:  {bytes: 4 << 10},
	mediumBuffer: {bytes: 64 << 10, most: 512},
	largeBuffer:  {bytes: 512 << 10, most: 64},
}

// after is the size to use after a read of n bytes into a buffer of size s: a larger one when that was
// full, a smaller one when that would have done, and would have the time before. It reports whether it would.
func (s bufferSize) after(n int, smallBefore bool) (next bufferSize, small bool) {
	small = s > smallBuffer && n < buffers[s-1].bytes
	switch {
	case s < largeBuffer && n == buffers[s].bytes:
		return s + 1, false
	case small && smallBefore:
		return s - 1, false
	default:
		return s, small
	}
}

// A buffer is on loan to one reader.
type buffer struct {
	bytes    []byte
	size     bufferSize
	receiver receiver
}

// takeBuffer returns a buffer of size s, or of the next smaller one of which there are some left.
func takeBuffer(s bufferSize) *buffer {
	for ; s > smallBuffer; s-- {
		if buffers[s].out.Add(1) <= buffers[s].most {
			break
		}
		buffers[s].out.Add(-1)
	}
	if b, ok := buffers[s].pool.Get().(*buffer); ok {
		return b
	}
	return &buffer{bytes: make([]byte, buffers[s].bytes), size: s}
}

func (b *buffer) giveBack() {
	if b.size > smallBuffer {
		buffers[b.size].out.Add(-1)
	}
	buffers[b.size].pool.Put(b)
}
