package server

import "fmt"

// State is where a server is in its life:
//
//	starting -> running <-> paused -> draining -> stopped
//
// with running -> draining too. Draining is final: nothing leads back.
type State int

// The states, in the order of a server's life.
const (
	Starting State = iota + 1 // made, and Serve not yet called
	Running                   // accepting and serving
	Paused                    // serving what it has, admitting nobody: at least one hold stands
	Draining                  // told to stop: clients are notified, after a delay if there is to be one, and have until the deadline
	Stopped                   // every connection is closed
)

var stateNames = [...]string{Starting: "starting", Running: "running", Paused: "paused", Draining: "draining", Stopped: "stopped"}

// String gives the state's name as logs, the control plane and metrics show it.
func (s State) String() string {
	if s < Starting || s > Stopped {
		return fmt.Sprintf("State(%d)", int(s))
	}
	return stateNames[s]
}

// ParseState is the inverse of String.
func ParseState(name string) (State, error) {
	for s := Starting; s <= Stopped; s++ {
		if stateNames[s] == name {
			return s, nil
		}
	}
	return 0, fmt.Errorf("unknown state %q: want starting, running, paused, draining or stopped", name)
}
