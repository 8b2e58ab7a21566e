package load

import (
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Connects Counts attempts to connect. Tried is the sum of the others but
// TurnedAway, which are of those Made.
type Connects struct {
	Tried      int64 `json:"tried"`
	Made       int64 `json:"made"`
	Refused    int64 `json:"refused"`
	Reset      int64 `json:"reset"`       // by the peer, while connecting
	TimedOut   int64 `json:"timed_out"`   // after Options.Timeout, by the system, or at the end of the run
	Failed     int64 `json:"failed"`      // in any other way
	TurnedAway int64 `json:"turned_away"` // by a notice, before anything had come back
}

// Missed is how many attempts led to no service.
func (c Connects) Missed() int64 {
	return c.Refused + c.Reset + c.TimedOut + c.Failed + c.TurnedAway
}

// Echoes Counts messages. Sent is the sum of Returned, Lost, Corrupted and TurnedAway.
type Echoes struct {
	Sent       int64 `json:"sent"`        // of which a byte at least was written
	Returned   int64 `json:"returned"`    // came back whole and right
	Late       int64 `json:"late"`        // of those returned: took longer than Options.Late
	Reordered  int64 `json:"reordered"`   // of those returned: came after one sent later
	Duplicated int64 `json:"duplicated"`  // came back once more
	Lost       int64 `json:"lost"`        // never came
	Corrupted  int64 `json:"corrupted"`   // came back broken
	Unexpected int64 `json:"unexpected"`  // broken, or never sent, and where no message is missing
	Foreign    int64 `json:"foreign"`     // came back on a connection that had not sent them
	TurnedAway int64 `json:"turned_away"` // sent on a connection that was turned away
	Unsent     int64 `json:"unsent"`      // were due, but no connection would take them
}

// Notices Counts what servers said. All but Messages end the connection.
type Notices struct {
	Shutdown int64 `json:"shutdown"`
	Paused   int64 `json:"paused"`
	Busy     int64 `json:"busy"`
	Messages int64 `json:"messages"`
	Heeded   int64 `json:"heeded"` // of those: the connection was left in order, with nothing outstanding
}

// Seen is how many there were.
func (n Notices) Seen() int64 { return n.Shutdown + n.Paused + n.Busy + n.Messages }

// Ends Counts how connections ended.
type Ends struct {
	Left    int64 `json:"left"`    // by this side, in order: at the end of the run, or by Options.Churn
	Noticed int64 `json:"noticed"` // after a notice
	Closed  int64 `json:"closed"`  // by the server, without a word
	Reset   int64 `json:"reset"`   // by the server, or what is between
	Failed  int64 `json:"failed"`  // in any other way
}

// Unannounced is how many ended by no will of this side and without a notice.
func (e Ends) Unannounced() int64 { return e.Closed + e.Reset + e.Failed }

// Counts are what a run Counts, or a part of it.
type Counts struct {
	Connects   Connects `json:"connects"`
	Echoes     Echoes   `json:"echoes"`
	Notices    Notices  `json:"notices"`
	Ends       Ends     `json:"ends"`
	Reconnects int64    `json:"reconnects"` // connections made in place of one that ended
}

func (c *Counts) add(o *Counts) {
	c.Connects.Tried += o.Connects.Tried
	c.Connects.Made += o.Connects.Made
	c.Connects.Refused += o.Connects.Refused
	c.Connects.Reset += o.Connects.Reset
	c.Connects.TimedOut += o.Connects.TimedOut
	c.Connects.Failed += o.Connects.Failed
	c.Connects.TurnedAway += o.Connects.TurnedAway
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

// slowest is the longest latency that is told from longer ones.
const slowest = time.Hour

// newHistogram returns one for the whole run: three digits, from a tenth of a
// microsecond on, in nanoseconds.
func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(100, int64(slowest), 3) }

// newWindowHistogram returns one for a part of the run: two digits, from a
// microsecond on, in nanoseconds. It is small, since it is merged often.
func newWindowHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1000, int64(slowest), 2) }

func record(h *hdrhistogram.Histogram, latency time.Duration) {
	_ = h.RecordValue(int64(min(max(latency, 0), slowest))) // within the range
}

// A tally is what one loop has counted: the histograms of the whole run, and the
// rest since it was last taken in by the run.
type tally struct {
	Counts
	window  *hdrhistogram.Histogram
	echoes  *hdrhistogram.Histogram
	connect *hdrhistogram.Histogram
}

func newTally() *tally {
	return &tally{window: newWindowHistogram(), echoes: newHistogram(), connect: newHistogram()}
}

// echo Counts a message that has come back.
func (t *tally) echo(latency time.Duration) {
	t.Echoes.Returned++
	record(t.echoes, latency)
	record(t.window, latency)
}

// open is how many connections there are.
func (c *Counts) open() int64 {
	e := c.Ends
	return c.Connects.Made - e.Left - e.Noticed - e.Closed - e.Reset - e.Failed
}
