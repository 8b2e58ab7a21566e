package server

import (
	"context"
	"fmt"
	"net"
)

// Listen opens a TCP listener whose clients a drain resets least: unlike net.Listen's it speaks plain
// TCP, since the filter that keeps new handshakes out of a queue that is being emptied cannot be set
// on Multipath TCP. Serve takes any other listener too.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listening: %w", err)
	}
	return ln, nil
}

// Inherited marks ln as one whose accept queue belongs to another process too, such as systemd's: a
// drain just stops accepting from it, and leaves those who wait in the queue to the successor.
func Inherited(ln net.Listener) net.Listener { return inheritedListener{ln} }

type inheritedListener struct{ net.Listener }
