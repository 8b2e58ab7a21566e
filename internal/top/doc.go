// Package top shows a running server on a terminal, as it changes: its state, its rates over the last minute and
// its connections, and drives it by keys. It knows what it shows from the control socket alone.
//
// The model holds what is shown, and changes only by messages: from the terminal, and from the goroutines that talk to the server.
//
// # Goroutines
//
// Besides those of bubbletea, which draws and reads keys and ends its own, Run starts five, ends them by their
// context, and waits for them:
//
//   - poll asks for the status at each interval,
//   - list for the connections, no more often than the server bears,
//   - follow reads events into a queue, and deliver hands them on in batches, so that thousands a second cost
//     as few pictures as one,
//   - carry does what the operator has asked for, one thing at a time.
package top
