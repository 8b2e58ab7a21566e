package control

import (
	"errors"
	"net"
	"sync"

	"echod/server"
)

// ServerActor returns the run.Group pair that serves srv on its listeners. Add it first: interrupts run
// in the order in which actors were added, and this one begins the drain that the others wait for.
// No actor of this package returns before the server has stopped, except a control plane that fails: a
// group's error is that of the first actor to return.
func ServerActor(srv *server.Server, listeners ...net.Listener) (execute func() error, interrupt func(error)) {
	execute = func() error {
		errs := make([]error, len(listeners))
		var serving sync.WaitGroup
		for i, ln := range listeners {
			serving.Go(func() { errs[i] = srv.Serve(ln) })
		}
		serving.Wait()
		<-srv.Done() // there may be no listeners
		for i, err := range errs {
			if errors.Is(err, server.ErrServerClosed) {
				errs[i] = nil
			}
		}
		return errors.Join(errs...)
	}
	interrupt = func(error) { srv.Drain(0, "stopping") }
	return execute, interrupt
}
