// Package server serves connections of any stream protocol, one goroutine each, and stops gracefully:
// what net/http.Server is for HTTP, for a protocol of your own.
//
// Bring a [Handler], give New some [Options], and Serve a listener. The server then admits
// connections, within limits; it can be paused and resumed while it serves ([Server.Pause]); and it drains
// ([Server.Shutdown]): it stops accepting, tells every client, gives them time, and only then closes,
// in a way that loses no byte that was read and resets nobody who behaves. Each connection ends for
// exactly one [Reason]; [Server.Status], [Server.Conns] and [Server.Subscribe] show what goes on.
//
// # The way of a connection
//
// Accepted from the kernel's queue, it is put on the books and taken to the gate. There it waits,
// is turned away, or is admitted and served. When its handler returns, or it is told to end, what
// is pending is written, the stream half-closed, the client's own end awaited for a moment, and
// the connection closed, taken off the books and its reason counted. All these steps are taken under
// one lock, so the figures agree at every instant: accepted = open + closed.
//
// # Goroutines
//
//   - Accepting runs on the goroutine that called Serve, which returns when the server has stopped.
//   - Each connection has one goroutine, started by accepting, for its handler and its close; another
//     one exists only while a notice waits for a client that does not read. They end with the connection,
//     at the latest when the drain closes it, and the drain waits for them. The exception is
//     a handler that ignores its context: it is named in the log, and left behind with its OnClose.
//   - The sweeper looks for idle and stalled connections. Started by the first Serve; stopped and awaited
//     by the drain.
//   - The drain's conductor is started by Drain, Shutdown or Close and ends with the server; Serve,
//     Shutdown, Close and Done wait for it.
//
// A hold with a time to live has a timer, which is stopped when the hold ends.
package server
