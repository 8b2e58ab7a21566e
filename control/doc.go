// Package control drives a server from outside: by an HTTP API on a Unix socket, by signals, and from Go
// by a client of that API. It wires all of them to the server as actors of a run group
// (github.com/oklog/run), so that the parts of a program start together and end in the right order.
//
// A Plane is the control plane of one server: the API that openapi.yaml describes, served on a socket
// that Listen opens. A Client talks to it. Signals says what signals mean. ServerActor is the server's own part.
//
// # The order of the end
//
// Signals and the control plane only ask for the drain. The control plane then serves on until the server
// has stopped, and says truthfully how far the drain is; only then does everything end. So add the
// server's actor first, then those that ask, and the control plane last: a run group interrupts its
// actors one after another, in the order in which they were added, and the control plane's interrupt
// returns when the server has stopped.
//
// # Goroutines
//
//   - Each actor runs on a goroutine of the run group, which starts it, interrupts it and waits for it.
//   - The control plane has a goroutine for each of its connections, 48 at the most, and for that of each probe, started by
//     net/http. When the server has stopped, the control plane's interrupt waits for them a moment, and
//     then closes what is left.
//   - A pause while connected has one more, which waits for its caller's end. The request's own closes
//     the connection under it, and waits for it.
//   - A Lease has one, which reads why the hold ended. Lease.Close stops it and waits for it. The
//     Client's other goroutines are net/http's; Client.Close ends those that are idle.
//
// The package imports echod/server, which knows nothing of it.
package control
