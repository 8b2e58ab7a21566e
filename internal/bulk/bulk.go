// Package bulk is the work of "echod send": it streams the records of files, URLs and standard input through a
// server, writes what comes back, and keeps book of what does not.
//
// Its goroutines: those of client.Stream, one of which reads the inputs; one that opens an input and one that reads
// standard input, which cannot be interrupted and stay behind when all else ends first; and one that draws the progress, which [Run] awaits.
package bulk

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"golang.org/x/time/rate"

	"echod/client"
	"echod/internal/records"
)

// Options says what is sent, and what becomes of it.
type Options struct {
	Address string
	Inputs  []string // as records.Open takes them
	Stdin   io.Reader
	Records records.Options
	Stream  client.StreamOptions

	Rate   float64 // the most records in a second; 0 is as many as the server takes
	Strict bool    // stop at the first malformed record

	Out    *Target // what came back
	Failed *Failed // what did not, to be sent again; nil: it is only counted
	State  *State  // where to go on another time; nil: nowhere

	Display Display
}

// ErrStopped says that there was more to send when the run was stopped.
var ErrStopped = errors.New("stopped before the end")

var errStrict = errors.New("stopped at a malformed record")

// Run sends everything. When stop ends it reads no more, and finishes what is in flight; when ctx ends it ends. The error
// says why not all was read, or written; what was sent and did not come back is in the summary alone.
func Run(ctx, stop context.Context, opts Options) (Summary, error) {
	reading, cancel := context.WithCancelCause(stop)
	defer cancel(nil)
	r := &run{opts: opts, reading: reading, cancel: cancel, tally: newTally(opts.Inputs), out: bufio.NewWriterSize(opts.Out, 64<<10)}
	r.reached = opts.State.reached()
	r.tally.earlier = r.reached.Malformed + r.reached.Failed
	if opts.Rate > 0 {
		burst := max(1, int(opts.Rate/100)) // a wait takes its time, too: at the most a hundred in a second
		r.limiter = rate.NewLimiter(rate.Limit(opts.Rate), burst)
	}
	opts.Stream.OnNotice = r.notice
	opts.Stream.OnReconnect = r.reconnect

	shown := opts.Display.show(r.tally)
	began := time.Now()
	err := r.stream(ctx, opts.Stream)
	if stop.Err() != nil && errors.Is(err, context.Cause(stop)) {
		err = ErrStopped
	}
	if err == nil && !r.readAll {
		err = ErrStopped
	}
	if flushed := r.flush(); err == nil { // else it is the same, or follows from it
		err = flushed
	}
	if err = errors.Join(err, opts.Failed.close(), opts.Out.close()); err == nil {
		err = opts.State.remove()
	} else {
		err = errors.Join(err, opts.State.save())
	}
	shown()
	summary := r.tally.summary(time.Since(began))
	summary.Unread = !r.readAll
	return summary, err
}

// run is one Run.
type run struct {
	opts    Options
	reading context.Context // ends when no more is to be read
	cancel  context.CancelCauseFunc
	limiter *rate.Limiter // nil: none
	tally   *tally
	header  []string // of the inputs so far, if they have one
	out     *bufio.Writer
	reached reached // by what was handled
	readAll bool    // the inputs, to their ends; the stream's until it ends

	unflushed []key // what is in out and Failed, or may be
}

// stream handles what becomes of each record, and returns why there are no more.
func (r *run) stream(ctx context.Context, opts client.StreamOptions) error {
	var last error
	for result, err := range client.Stream(ctx, r.opts.Address, r.items, opts) {
		if err == nil {
			err = r.handle(result)
		}
		if err != nil && last == nil {
			last = err
			r.cancel(err) // the stream may be waiting for the input
		}
	}
	return last
}

func (r *run) handle(result client.Result[key]) error {
	k := result.Key
	r.tally.resent.Add(int64(max(result.Sent-1, 0)))
	var err error
	switch toCome := r.opts.State != nil; { // of what is not settled, in another run
	case k.malformed != nil:
		r.tally.malformed.Add(1)
		r.say(r.explain(k.malformed))
		if r.opts.Strict && toCome {
			return nil
		}
		r.reached.Malformed++
		err = r.opts.Failed.addMalformed(r.tally.header(k), k.malformed)
	case errors.Is(result.Err, client.ErrUnfinished):
		r.tally.unfinished.Add(1)
		if toCome {
			return nil
		}
		err = r.opts.Failed.add(r.tally.header(k), result.Data)
	case result.Err != nil:
		r.tally.failed.Add(1)
		r.say(fmt.Errorf("%s: %w", r.tally.place(k), result.Err))
		r.reached.Failed++
		err = r.opts.Failed.add(r.tally.header(k), result.Data)
	default:
		r.tally.came(k, len(result.Data))
		r.write(result)
	}
	if err != nil {
		return err
	}
	r.tally.inputs[k.input].settled(k)
	r.unflushed = append(r.unflushed, k)
	if result.Idle || r.out.Buffered() > r.out.Size()/2 || len(r.unflushed) >= mostUnflushed {
		return r.flush()
	}
	return nil
}

const mostUnflushed = 1000

// write writes what has come back. Records stay apart, also behind a last line without a newline.
func (r *run) write(result client.Result[key]) {
	if r.reached.MidLine {
		_ = r.out.WriteByte('\n') // the error stays
	}
	_, _ = r.out.Write(result.Data)
	r.reached.MidLine = result.Key.unended
}

// flush writes what is buffered. Only then those records are settled: what cannot be written is sent another time.
func (r *run) flush() error {
	if err := r.out.Flush(); err != nil {
		return fmt.Errorf("writing what came back: %w", err)
	}
	if err := r.opts.Failed.flush(); err != nil {
		return err
	}
	r.reached.Output, r.reached.Failures = r.opts.Out.saved(), r.opts.Failed.target().saved()
	r.opts.State.settle(r.unflushed, r.reached)
	r.unflushed = r.unflushed[:0]
	return r.opts.State.checkpoint()
}

// explain says what to do about a record that is too long.
func (r *run) explain(e *records.Error) error {
	if !e.Cut {
		return e
	}
	kept := ""
	if r.opts.Failed != nil {
		kept = fmt.Sprintf("; not kept in %s", r.opts.Failed.target().file.Name())
	}
	return fmt.Errorf("%w (--max-record allows more%s)", e, kept)
}

// say tells of a failure, of the first ones only.
func (r *run) say(err error) {
	const most = 10
	switch n := r.tally.said.Add(1); {
	case n <= most:
		r.opts.Display.Say(err.Error())
	case n == most+1:
		r.opts.Display.Say("more failures are only counted")
	}
}

// notice tells of a notice, which comes over each connection, once.
func (r *run) notice(n client.Notice) {
	if r.tally.newNotice(n) {
		r.opts.Display.Say(Describe(n))
	}
}

// reconnect tells why connections are made again, unless a notice has told it. That comes from each of them, and again and again while
// the server is away.
func (r *run) reconnect(reason error) {
	r.tally.reconnects.Add(1)
	if _, told := errors.AsType[*client.NoticeError](reason); told {
		return
	}
	if op, is := errors.AsType[*net.OpError](reason); is && op.Op != "dial" {
		reason = op.Err // without the ports, which are others each time
	}
	limit := ""
	if most := r.opts.Stream.Reconnect.MaxElapsed; most > 0 {
		limit = fmt.Sprintf(", for at most %s without an echo", most)
	}
	if text := reason.Error(); r.tally.newReason(text) {
		r.opts.Display.Say(fmt.Sprintf("%s: connecting again%s", text, limit))
	}
}

// Describe says a notice in words.
func Describe(n client.Notice) string {
	switch n.Kind {
	case client.NoticeShutdown:
		return fmt.Sprintf("the server stops in %s: %s", n.Grace, n.Text)
	case client.NoticePaused:
		return "the server is paused"
	case client.NoticeBusy:
		return "the server is at its limit"
	default:
		return "notice: " + n.Text
	}
}
