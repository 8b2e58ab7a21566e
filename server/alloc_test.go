package server

import (
	"fmt"
	"io"
	"testing"
)

// Counted is what the whole process allocates, of which the client's share is nothing. The race detector makes a
// sync.Pool lose a quarter of what is put back, and so half an allocation for each message, which AllocsPerRun rounds down.
func TestEchoAllocatesNothing(t *testing.T) {
	for _, size := range []int{64, buffers[smallBuffer].bytes} { // the second makes for a larger buffer
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			_, address := serveTCP(t, Echo, Options{})
			nc := dialTCP(t, address)
			message, echo := make([]byte, size), make([]byte, size)
			roundTrip := func() {
				if _, err := nc.Write(message); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(nc, echo); err != nil {
					t.Fatal(err)
				}
			}
			for range 100 { // what is made once, such as a buffer
				roundTrip()
			}
			if n := testing.AllocsPerRun(1000, roundTrip); n != 0 {
				t.Errorf("an echo of %d bytes costs %v allocations, want none", size, n)
			}
		})
	}
}
