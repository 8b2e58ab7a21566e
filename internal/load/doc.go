// Package load puts load on an echo server (RFC 862) and finds out what became of
// each message: whether it came back, how late, broken, twice, out of order, or
// never. [Run] does one run and returns its [Report]; [Report.Judge] says what is
// wrong with it.
//
// # Messages
//
// A message is a line of [Options].Size bytes that holds the run, the connection,
// a sequence number and a checksum. What comes back is told apart by these:
//
//   - returned: whole and right; late, if it took longer than Options.Late, and
//     reordered, if one that was sent later had come before
//   - duplicated: right, but it had come before
//   - corrupted: no message of this form, or one that was never sent, in the place
//     of one that is missing, which is not lost as well. Broken bytes in a row
//     count by their number, as one message for each Options.Size
//   - unexpected: the same where no message is missing
//   - foreign: right, but sent on another connection, or by another run
//   - lost: nothing had come in its place when the connection ended, or when the
//     run had waited for Options.DrainWait at its end
//
// A server's notices (package echod/client) are no echoes, even in the middle of a
// message. Of one that ends the connection, what is under way is awaited; then the
// connection is half-closed, read to its end, and made anew. A connection that is
// turned away by a notice has lost nothing: its messages count as turned away.
//
// One thing nobody can know: whether a message whose last byte, the newline, comes
// after a notice would have had it, if something else comes there.
//
// # Time
//
// In the open model ([Options].Rate) the schedule says when each message is due, to
// between 0.2 and 1 ms: about four at a time, or more at high rates. Its latency counts from then, whether a connection could take it or not:
// so a server that stalls shows all the waits that it inflicts, and not only those
// of the few messages that happened to be under way (coordinated omission). In the
// closed model latency counts from when the message was made.
//
// Latency ends when the message had come to this machine, where the system tells
// (Linux, by SO_TIMESTAMPNS), and else when it was read. So this side may be busy
// without making the server look slow. Of messages that were read together all end
// with the last.
//
// # Goroutines
//
//   - Run starts Options.Loops loops and awaits them. Each carries its share of the
//     clients, on Linux by itself alone; it holds a thread then.
//   - A loop starts one for each connect, and awaits all before it returns.
//   - With Options.Dial, or not on Linux, a connection has one that reads and one
//     that writes. They end when the loop closes it, and the loop awaits them.
package load
