package load

import (
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Connects counts attempts to connect. Tried is the sum of the others except
// TurnedAway and Resumed, which are parts of Made.
type Connects struct {
	Tried      int64 `json:"tried"`
	Made       int64 `json:"made"`
	Refused    int64 `json:"refused"`
	Reset      int64 `json:"reset"`         // by the peer, while connecting
	TimedOut   int64 `json:"timed_out"`     // after Options.Timeout, by the system, or at the end of the run
	NoPort     int64 `json:"no_local_port"` // this machine had no local port left: not the server's fault
	Failed     int64 `json:"failed"`        // for any other reason
	TurnedAway int64 `json:"turned_away"`   // by a notice, before any echo

	NoHandshake int64 `json:"handshake_failed"` // the TLS handshake failed, or was not over in time
	Resumed     int64 `json:"resumed"`          // TLS sessions of earlier connections
}

// Missed returns how many attempts failed because of the server or the network.
func (c Connects) Missed() int64 {
	return c.Refused + c.Reset + c.TimedOut + c.Failed + c.TurnedAway + c.NoHandshake
}

// Echoes counts messages. Sent is the sum of Returned, Lost, Corrupted and TurnedAway.
type Echoes struct {
	Sent       int64 `json:"sent"`        // at least one byte was written
	Returned   int64 `json:"returned"`    // came back intact
	Late       int64 `json:"late"`        // part of Returned: took longer than Options.Late
	Reordered  int64 `json:"reordered"`   // part of Returned: came after a message that was sent later
	Duplicated int64 `json:"duplicated"`  // came back once more
	Lost       int64 `json:"lost"`        // never came back
	Corrupted  int64 `json:"corrupted"`   // came back broken
	Unexpected int64 `json:"unexpected"`  // broken or never sent, and no message is missing in their place
	Foreign    int64 `json:"foreign"`     // came back on a connection that had not sent them
	TurnedAway int64 `json:"turned_away"` // sent on a connection that was turned away
	Unsent     int64 `json:"unsent"`      // due, but no connection could take them
}

// Notices counts the server's notices. All except Messages end the connection.
type Notices struct {
	Shutdown int64 `json:"shutdown"`
	Paused   int64 `json:"paused"`
	Busy     int64 `json:"busy"`
	Messages int64 `json:"messages"`
	Heeded   int64 `json:"heeded"` // part of the others: the client left in order, with nothing outstanding
}

// Seen returns how many notices arrived.
func (n Notices) Seen() int64 { return n.Shutdown + n.Paused + n.Busy + n.Messages }

// Ends counts how connections ended.
type Ends struct {
	Left    int64 `json:"left"`    // in order, by the client: at the end of the run, or by Options.Churn
	Noticed int64 `json:"noticed"` // after a notice
	Closed  int64 `json:"closed"`  // by the server, without a notice
	Reset   int64 `json:"reset"`   // by the server or something in between
	Failed  int64 `json:"failed"`  // for any other reason
}

// Unannounced returns how many connections ended against the client's will and
// without a notice.
func (e Ends) Unannounced() int64 { return e.Closed + e.Reset + e.Failed }

// Counts is what a run, or a part of it, counted.
type Counts struct {
	Connects Connects `json:"connects"`
	Echoes   Echoes   `json:"echoes"`
	Notices  Notices  `json:"notices"`
	Ends     Ends     `json:"ends"`

	// Reconnects counts connections that replaced one that had ended. A connection
	// that a notice turned away does not count.
	Reconnects int64 `json:"reconnects"`
}

func (c *Counts) add(o *Counts) {
	c.Connects.Tried += o.Connects.Tried
	c.Connects.Made += o.Connects.Made
	c.Connects.Refused += o.Connects.Refused
	c.Connects.Reset += o.Connects.Reset
	c.Connects.TimedOut += o.Connects.TimedOut
	c.Connects.NoPort += o.Connects.NoPort
	c.Connects.Failed += o.Connects.Failed
	c.Connects.TurnedAway += o.Connects.TurnedAway
	c.Connects.NoHandshake += o.Connects.NoHandshake
	c.Connects.Resumed += o.Connects.Resumed
	c.Echoes.Sent += o.Echoes.Sent
	c.Echoes.Returned += o.Echoes.Returned
	c.Echoes.Late += o.Echoes.Late
	c.Echoes.Reordered += o.Echoes.Reordered
	c.Echoes.Duplicated += o.Echoes.Duplicated
	c.Echoes.Lost += o.Echoes.Lost
	c.Echoes.Corrupted += o.Echoes.Corrupted
	c.Echoes.Unexpected += o.Echoes.Unexpected
	c.Echoes.Foreign += o.Echoes.Foreign
	c.Echoes.TurnedAway += o.Echoes.TurnedAway
	c.Echoes.Unsent += o.Echoes.Unsent
	c.Notices.Shutdown += o.Notices.Shutdown
	c.Notices.Paused += o.Notices.Paused
	c.Notices.Busy += o.Notices.Busy
	c.Notices.Messages += o.Notices.Messages
	c.Notices.Heeded += o.Notices.Heeded
	c.Ends.Left += o.Ends.Left
	c.Ends.Noticed += o.Ends.Noticed
	c.Ends.Closed += o.Ends.Closed
	c.Ends.Reset += o.Ends.Reset
	c.Ends.Failed += o.Ends.Failed
	c.Reconnects += o.Reconnects
}

// open returns how many connections are open.
func (c *Counts) open() int64 {
	e := c.Ends
	return c.Connects.Made - e.Left - e.Noticed - e.Closed - e.Reset - e.Failed
}

// maxLatency is the largest latency that a histogram holds. Longer ones count as this one.
const maxLatency = time.Hour

// newHistogram returns a histogram in nanoseconds with three significant digits,
// from a tenth of a microsecond.
func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(100, int64(maxLatency), 3) }

// newWindowHistogram returns a histogram in nanoseconds with two significant digits,
// from a microsecond. It is small because it is merged often.
func newWindowHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(1000, int64(maxLatency), 2)
}

func record(h *hdrhistogram.Histogram, latency time.Duration) {
	_ = h.RecordValue(int64(min(max(latency, 0), maxLatency))) // always within the range
}

// percentile returns a percentile in seconds.
func percentile(h *hdrhistogram.Histogram, percent float64) float64 {
	return time.Duration(h.ValueAtPercentile(percent)).Seconds()
}

// A tally is what one worker has counted since the run last collected it.
type tally struct {
	Counts
	window *hdrhistogram.Histogram // echoes since the last collection
	second *interval               // the present second
}

func newTally() *tally { return &tally{window: newWindowHistogram(), second: newInterval()} }

// echo counts a message that has come back.
func (t *tally) echo(latency time.Duration) {
	t.Echoes.Returned++
	record(t.second.echo, latency)
	record(t.window, latency)
}

// reset empties the counts and the window.
func (t *tally) reset() {
	t.Counts = Counts{}
	t.window.Reset()
}
