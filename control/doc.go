// Package control lets other processes control a server: with an HTTP API on a Unix socket, a Go client of that API, probes
// over TCP, and signals.
//
// A Plane is an http.Handler with the API that openapi.yaml describes. Serve and Shutdown run it on a listener,
// usually one that Listen has opened. A Client makes requests to it. NewWeb makes a read-only Plane for probes and Prometheus.
// An Agent answers HAProxy's agent checks. Signals turns signals into drains.
//
// Programs that use github.com/oklog/run get an actor for each part: ServerActor, Plane.Actor, Agent.Actor and
// Signals.Actor.
//
// # Order of the actors
//
// Signals and the control plane only start a drain. The control plane then answers until the server has stopped, so
// that operators can follow the drain to its end. A run group interrupts its actors one after another in the order in
// which they were added. So add the server's actor first, then the signals, and the control plane last: its interrupt
// returns when the server has stopped.
//
// # Goroutines
//
//   - Each actor runs on a goroutine of the run group, which starts it, interrupts it and waits for it.
//   - A Plane has one goroutine per connection, started by net/http, for at most MaxCallers connections and
//     for each probe of its own. Shutdown waits for them until its context ends, and then closes them.
//   - Each listener of a Plane made by NewWeb has one that takes samples for the status page. Serve stops it and waits.
//   - An Agent has one that probes the server, and one per caller. Its actor waits for all of them.
//   - Each long-lived request (wait, events, pause while connected) has one more, which waits for the caller to
//     disconnect. The request closes the connection and waits for it.
//   - A socket from Listen has one that watches its file. Close stops it and waits for it.
//   - A Lease has one that reads why the hold ended. Lease.Close stops it and waits for it. The Client's other
//     goroutines are net/http's; Client.Close ends those that are idle.
//
// The package imports echod/server, which does not import it.
package control
