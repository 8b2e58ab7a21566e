package server

import "fmt"

// Reason says why a connection was closed. Each connection has exactly one: the first cause wins.
type Reason int

// The close reasons.
const (
	ClientClosed         Reason = iota + 1 // the client ended its stream (EOF)
	ClientReset                            // the connection broke: reset by the client, or lost
	ClientLeft                             // EOF from a client that had been notified of the drain
	IdleTimeout                            // no byte in either direction for Options.IdleTimeout
	Stalled                                // the client's receive window stayed shut for Options.StallTimeout
	HandlerDone                            // the handler returned nil, or closed the connection
	HandlerError                           // the handler returned an error
	HandlerPanic                           // the handler panicked
	Killed                                 // Server.Kill or Server.KillFunc
	RejectedPaused                         // came during a pause of mode Reject
	RejectedLimit                          // came over a connection limit
	RejectedDraining                       // came when the drain could give it no time
	RejectedUnidentified                   // came through a proxy that did not say properly for whom: Options.Identify failed
	Deadline                               // the drain's grace ran out
	Forced                                 // Server.Close
	reasonEnd
)

var reasonNames = [reasonEnd]string{
	ClientClosed: "client-closed", ClientReset: "client-reset", ClientLeft: "client-left",
	IdleTimeout: "idle-timeout", Stalled: "stalled",
	HandlerDone: "handler-done", HandlerError: "handler-error", HandlerPanic: "handler-panic",
	Killed:         "killed",
	RejectedPaused: "rejected-paused", RejectedLimit: "rejected-limit", RejectedDraining: "rejected-draining",
	RejectedUnidentified: "rejected-unidentified",
	Deadline:             "deadline", Forced: "forced",
}

// String gives the reason's name as logs, the control plane and metrics show it.
func (r Reason) String() string {
	if r < ClientClosed || r >= reasonEnd {
		return fmt.Sprintf("Reason(%d)", int(r))
	}
	return reasonNames[r]
}

// Reasons returns every close reason, in a stable order.
func Reasons() []Reason {
	all := make([]Reason, 0, reasonEnd-1)
	for r := ClientClosed; r < reasonEnd; r++ {
		all = append(all, r)
	}
	return all
}
