// Package client talks to an echod server: it sends data, receives its echo, and
// understands the notices that the server puts in between.
//
// [Client.EchoLine] and [Client.Echo] send something and wait for it to come back.
// [Client.Send] and [Client.Receive], for raw bytes, and [Client.SendLine] and
// [Client.ReceiveLine] do the two halves apart, so that much can be under way.
//
// # Notices
//
// A server announces its end, a refusal or its operator's words by a line in the
// stream ([Notice]), even in the middle of an echo: "hello\n" may come back as
// "hel\nSHUTDOWN 5 SIGTERM\nlo\n". The client knows what it has sent, so it can
// tell any notice from any echo. It hands out the echo without the notices, calls
// Options.OnNotice, and once the connection ends returns a [NoticeError] that
// says why. What is neither echo nor notice is a [CorruptionError]; so is a notice
// of another form than echod's own, as its option --notice makes them.
//
// One thing nobody can know: when a line that was sent and a notice are equal, or
// when a piece of such a line is a notice by its form, which of them came first.
// The echo is then still whole.
//
// # Goroutines
//
//   - Echo and EchoLine start one that sends while the caller's receives. It
//     stops when all is sent, when receiving fails or with the context; Echo
//     awaits it before it returns.
//   - Stream starts one that owns the others of its iteration: one that ranges over
//     the source, and for each place of a connection one that receives and one that
//     sends. They end with the iteration, which awaits them.
//   - When a context ends during a call, the context package runs a function that
//     interrupts it; the call awaits that function.
//
// No goroutine stays behind between calls.
package client
