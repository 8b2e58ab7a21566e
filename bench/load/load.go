// Package load is the load generator of the benchmark: one thread and one epoll loop, lean enough to keep a
// server busy from a core of its own. It checks every byte that comes back.
//
// Each function runs on its caller's goroutine; there are no others.
package load

import "time"

// A Spec says what to do to a server.
type Spec struct {
	Address string // numeric, IPv4: 127.0.0.1:7000
	PID     int    // the server's process, whose CPU time is measured
	Conns   int    // at a time
	Size    int    // of a message, in bytes
	Depth   int    // how many messages are under way on each connection
	Churn   bool   // a connection is for one message only
	Notice  string // a line that may come between the echoes of messages; empty when none may

	Warmup   time.Duration // before anything counts
	Duration time.Duration // that counts
	Patience time.Duration // for an echo that is still to come; zero means 10 s

	// Corrected makes up for messages that were not sent while the server held up its clients, as HdrHistogram does for what
	// is called coordinated omission: a load that waits for its echo would else see a pause once, however long it is.
	Corrected bool
}

// A Result is what happened between the end of the warm-up and the end of the run.
type Result struct {
	Echoes    int64         // messages that came back whole and right
	Elapsed   time.Duration // wall time
	ServerCPU time.Duration // user and system time of the server's process
	LoadCPU   time.Duration // of this process
	// The time from the write of a message, or with Churn from the connect, to the read of its last byte.
	P50, P99, P999, Max time.Duration
}

// CPUPerEcho is the server's CPU time for each message.
func (r Result) CPUPerEcho() time.Duration { return r.ServerCPU / time.Duration(max(1, r.Echoes)) }

// PerSecond is how many messages came back in a second.
func (r Result) PerSecond() float64 { return float64(r.Echoes) / r.Elapsed.Seconds() }
