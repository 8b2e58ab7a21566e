// Package server serves connections of any stream protocol, one goroutine each, and stops gracefully. It does for
// other protocols what net/http.Server does for HTTP.
//
// Write a [Handler], make a [Server] with [New], and [Server.Serve] a listener. The server admits connections within
// [Limits]; it can be paused and resumed while it serves ([Server.Pause]); and it drains ([Server.Shutdown],
// [Server.Drain]): it stops accepting, tells every client, gives them time, and then closes. No byte that was read is
// lost, and no client that reads its notice and leaves is reset. [Server.Status], [Server.Conns] and
// [Server.Subscribe] show what the server does. The server sends nothing to clients unless [Options] has a [Notifier].
//
// # The life of a connection
//
// An accepted connection enters the connection table. [WrapConn] prepares it, if there is one. Admission then
// decides: the connection waits, is rejected, or is served by the handler. When the handler returns, or the server
// ends the connection, the server sends pending messages, half-closes, lingers for the client's FIN, closes, and
// counts the close [Reason]. All counting is done under one lock, so that accepted = open + closed at every instant.
//
// # Upgrades
//
// A program can replace itself without closing connections. The old process calls [Server.HandOver], the new one
// [ReceiveOffer] and [Server.TakeOver], each with one end of a Unix socket pair ([NewUnixLink]). Handlers opt in as a
// [Resumer]. If anything fails before the new process owns the connections, the old one continues to serve them. The
// project's docs/embedding.md says what a program has to do, and examples/upgrade is one.
//
// # Goroutines
//
//   - Serve accepts on the goroutine that called it. It returns when the server has stopped. A listener without
//     SetDeadline has an additional goroutine, which Serve waits for.
//   - Each connection has one goroutine, for WrapConn, the handler, and its end. Another one exists only while a
//     notice waits for a client that does not read. They end with the connection, at the latest when the drain closes
//     it, and the drain waits for them. If a handler ignores its context, the drain logs that, and does not wait for
//     the handler and its OnClose.
//   - The sweeper closes idle and stalled connections. The first Serve starts it; the drain stops it and waits for it.
//   - The drain runs on a goroutine of its own, which ends with the server. Serve, Shutdown, Drain, Close and Done wait
//     for it. Functions of RegisterOnShutdown run on goroutines that the drain waits for.
//   - A probe has one goroutine, because the lock that it takes may never be released. There is one at most. Probe waits
//     for it until its context ends.
//   - After HandOver one goroutine reports to the successor how the connections that the server keeps end, and another
//     one receives requests from it. After TakeOver one receives these reports. The drain waits for all of them.
//
// A hold with a TTL has a timer, which is stopped when the hold ends.
//
// # Files
//
// From the bottom up; a file mostly uses those before it:
//
//   - sys_*.go: the platforms. lock.go: a value that is reached only under its lock.
//   - conn.go (what a handler sees), serve.go (from the handler's call to the close), write.go (writes and notices),
//     copy.go (the echo's fast path), tls.go: the connection. listen.go: the listener.
//   - state.go, table.go: everything under the one lock.
//   - accept.go, handshake.go, admission.go: from the accept queue to the handler. pause.go: holds. shutdown.go (the
//     calls), drain.go (the steps), schedule.go (when each client is told): the drain. timeouts.go: idle, stalled and
//     old connections.
//   - handover.go (the predecessor), takeover.go (the successor), handover_freeze.go (connections during the freeze),
//     handover_kept.go (connections that stay with the predecessor), handover_wire.go (the messages),
//     handover_link.go (descriptors over a Unix socket): the handover to another process.
//   - server.go, options.go, settings.go, access.go, handler.go, notifier.go, certificates.go, status.go, events.go,
//     probe.go, enums.go, errors.go: what users call and set.
package server
