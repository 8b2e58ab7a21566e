package server

import (
	"fmt"
	"io"
	"runtime"
	"testing"
)

// Counted is what the whole process allocates, of which the client's share is nothing. Now and then the runtime allocates
// something of its own. The race detector makes a sync.Pool lose a quarter of what is put back, which is two allocations.
func TestEchoAllocatesNothing(t *testing.T) {
	for _, size := range []int{64, buffers[smallBuffer].bytes, buffers[mediumBuffer].bytes} { // the others make for larger buffers
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			_, address := serveTCP(t, Echo, Options{})
			nc := dialTCP(t, address)
			message, echo := make([]byte, size), make([]byte, size)
			roundTrips := func(n int) {
				for range n {
					if _, err := nc.Write(message); err != nil {
						t.Fatal(err)
					}
					if _, err := io.ReadFull(nc, echo); err != nil {
						t.Fatal(err)
					}
				}
			}
			const n = 1000
			most := uint64(n / 20)
			if raceEnabled {
				most = 3 * n // of up to four reads a message
			}
			roundTrips(100) // what is made once, such as a buffer
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			roundTrips(n)
			runtime.ReadMemStats(&after)
			if made := after.Mallocs - before.Mallocs; made > most {
				t.Errorf("%d echoes of %d bytes cost %d allocations, want next to none", n, size, made)
			}
		})
	}
}
