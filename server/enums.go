package server

import (
	"fmt"
	"slices"
)

// State is the state of a server:
//
//	starting -> running <-> paused -> draining -> stopped
//
// or running -> draining. From StateDraining only StateStopped follows, unless the drain is cancelled during its delay.
type State int

// The states, in the order of a server's life.
const (
	StateStarting State = iota + 1 // made by New; Serve was not called yet
	StateRunning                   // accepting and serving
	StatePaused                    // at least one hold exists: existing connections are served, and none is admitted
	StateDraining                  // after DrainOptions.Delay clients are told to leave, and have time until the deadline
	StateStopped                   // every connection is closed
)

var stateNames = [...]string{
	StateStarting: "starting", StateRunning: "running", StatePaused: "paused", StateDraining: "draining",
	StateStopped: "stopped",
}

// String returns the state's name as logs, the control plane and metrics show it.
func (s State) String() string { return enumName("State", stateNames[:], int(s)) }

// ParseState is the inverse of State.String.
func ParseState(name string) (State, error) {
	if i := slices.Index(stateNames[:], name); i >= int(StateStarting) {
		return State(i), nil
	}
	return 0, fmt.Errorf("unknown state %q: want starting, running, paused, draining or stopped", name)
}

// Phase is the state of a connection.
type Phase int32

// The phases. Only Options.ConnState gets PhaseClosed.
const (
	PhaseWaiting   Phase = iota + 1 // accepted, and in its handshake or waiting for admission
	PhaseServing                    // the handler runs
	PhaseRejecting                  // the client is told why it is not served
	PhaseClosing                    // writes are flushed, and the server waits for the client's FIN
	PhaseClosed
)

var phaseNames = [...]string{
	PhaseWaiting: "waiting", PhaseServing: "serving", PhaseRejecting: "rejecting", PhaseClosing: "closing",
	PhaseClosed: "closed",
}

// String returns the phase's name as the control plane shows it.
func (p Phase) String() string { return enumName("Phase", phaseNames[:], int(p)) }

// Reason is why a connection was closed. Each connection has exactly one: the first cause wins.
type Reason int

// The close reasons.
const (
	ReasonClientClosed         Reason = iota + 1 // the client ended its stream (EOF)
	ReasonClientReset                            // the client reset the connection, or the network lost it
	ReasonClientLeft                             // EOF from a client that had been told to leave
	ReasonIdleTimeout                            // no byte moved in either direction for Timeouts.Idle
	ReasonStalled                                // the client acknowledged nothing for Timeouts.Stall while data waited for it
	ReasonHandlerDone                            // the handler returned nil or closed the connection
	ReasonHandlerError                           // the handler returned an error
	ReasonHandlerPanic                           // the handler panicked
	ReasonKilled                                 // Server.Kill or Server.KillFunc
	ReasonRejectedPaused                         // rejected during a pause with PauseReject
	ReasonRejectedLimit                          // rejected because of Limits.MaxConns
	ReasonRejectedDraining                       // connected too late in a drain
	ReasonRejectedHandshake                      // WrapConn returned an error or took too long
	ReasonDeadline                               // still open when its grace period ended
	ReasonForced                                 // Server.Close or Server.Force
	ReasonLost                                   // kept by a predecessor that died; see Server.TakeOver
	ReasonHandshakeFailed                        // the TLS handshake failed or took too long
	ReasonEvicted                                // like ReasonDeadline, for an eviction; see PauseOptions.Evict
	ReasonMaxAge                                 // like ReasonDeadline, for a connection that had reached Timeouts.MaxAge
	ReasonRejectedAddressLimit                   // rejected because of Limits.MaxConnsPerIP or MaxConnsPerUID
	ReasonRejectedRate                           // rejected because of Limits.MaxConnRate or MaxConnRateTotal
	ReasonRejectedDenied                         // rejected because of Access
	reasonEnd

	reasonHandedOver Reason = -1 // not closed: another process serves it
)

var reasonNames = [reasonEnd]string{
	ReasonClientClosed: "client-closed", ReasonClientReset: "client-reset", ReasonClientLeft: "client-left",
	ReasonIdleTimeout: "idle-timeout", ReasonStalled: "stalled",
	ReasonHandlerDone: "handler-done", ReasonHandlerError: "handler-error", ReasonHandlerPanic: "handler-panic",
	ReasonKilled:               "killed",
	ReasonRejectedAddressLimit: "rejected-address-limit", ReasonRejectedRate: "rejected-rate",
	ReasonRejectedDenied: "rejected-denied",
	ReasonRejectedPaused: "rejected-paused", ReasonRejectedLimit: "rejected-limit",
	ReasonRejectedDraining:  "rejected-draining",
	ReasonRejectedHandshake: "rejected-unidentified",
	ReasonDeadline:          "deadline", ReasonForced: "forced", ReasonLost: "lost",
	ReasonHandshakeFailed: "handshake-failed",
	ReasonEvicted:         "evicted", ReasonMaxAge: "max-age",
}

// String returns the reason's name as logs, the control plane and metrics show it.
func (r Reason) String() string { return enumName("Reason", reasonNames[:], int(r)) }

// Reasons returns every close reason, in a stable order.
func Reasons() []Reason {
	all := make([]Reason, 0, reasonEnd-1)
	for r := Reason(1); r < reasonEnd; r++ {
		all = append(all, r)
	}
	return all
}

// PauseMode says what happens to clients that connect during a pause.
type PauseMode int

const (
	// PauseQueue leaves them in the kernel's accept queue and serves them on resume, oldest first. It is the zero
	// value.
	PauseQueue PauseMode = iota
	// PauseReject accepts them, sends NoticeReject, and closes.
	PauseReject
)

var pauseModeNames = [...]string{PauseQueue: "hold", PauseReject: "reject"}

// String returns the mode's name as the control plane shows it.
func (m PauseMode) String() string { return enumName("PauseMode", pauseModeNames[:], int(m)) }

// ParsePauseMode is the inverse of PauseMode.String. An empty name means PauseQueue.
func ParsePauseMode(name string) (PauseMode, error) {
	if name == "" {
		return PauseQueue, nil
	}
	if i := slices.Index(pauseModeNames[:], name); i >= 0 {
		return PauseMode(i), nil
	}
	return 0, fmt.Errorf("unknown mode %q: want hold or reject", name)
}

// LimitMode says what happens to clients that connect while Limits.MaxConns are being served.
type LimitMode int

const (
	// LimitQueue leaves them in the kernel's accept queue until a place is free. It is the zero value.
	LimitQueue LimitMode = iota
	// LimitReject accepts them, sends NoticeReject, and closes.
	LimitReject
)

var limitModeNames = [...]string{LimitQueue: "wait", LimitReject: "reject"}

// String returns the mode's name as flags and the control plane show it.
func (m LimitMode) String() string { return enumName("LimitMode", limitModeNames[:], int(m)) }

// ParseLimitMode is the inverse of LimitMode.String.
func ParseLimitMode(name string) (LimitMode, error) {
	if i := slices.Index(limitModeNames[:], name); i >= 0 {
		return LimitMode(i), nil
	}
	return 0, fmt.Errorf("unknown mode %q: want wait or reject", name)
}

func enumName(typ string, names []string, i int) string {
	if i < 0 || i >= len(names) || names[i] == "" {
		return fmt.Sprintf("%s(%d)", typ, i)
	}
	return names[i]
}
