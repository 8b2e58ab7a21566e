package load

import (
	"bytes"
	"math/rand/v2"
)

// What a connection sends is an endless random pattern, begun at a place of its own, so that no byte
// can be lost, doubled or come back on another connection unseen.
const (
	period  = 65521   // a prime: no size of message divides it
	longest = 1 << 20 // at a time
)

var pattern = func() []byte {
	random := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, period+longest)
	for i := range period {
		p[i] = byte(random.Uint32())
	}
	for i := period; i < len(p); i += period {
		copy(p[i:], p[:period])
	}
	return p
}()

// expect returns n bytes of what is sent from offset on; n is at most longest.
func expect(phase int, offset int64, n int) []byte {
	at := int((int64(phase) + offset) % period)
	return pattern[at : at+n]
}

// right reports whether got is what was sent from offset on.
func right(phase int, offset int64, got []byte) bool {
	return bytes.Equal(got, expect(phase, offset, len(got)))
}
