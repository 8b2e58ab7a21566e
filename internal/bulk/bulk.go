// Package bulk implements "echod send": it streams the records of files, URLs and
// standard input through a server, writes the echoes, and accounts for every record.
//
// Besides the goroutines of client.Stream, one of which reads the inputs, there are:
//   - one that opens an input, and one that reads standard input. Neither can be
//     interrupted on all platforms, so both are left behind if everything else ends first.
//   - one that displays the progress. [Run] starts it and waits for it.
package bulk

import (
	"bufio"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"golang.org/x/time/rate"

	"echod/client"
	"echod/internal/records"
)

// Options configures a run.
type Options struct {
	Address string
	Inputs  []string // as for records.Open
	Stdin   io.Reader
	Records records.Options
	Stream  client.StreamOptions

	Rate   float64 // records per second; zero means no limit
	Strict bool    // stop at the first malformed record, or input that cannot be read

	Out    *Output     // for the echoes
	Failed *FailedFile // for what did not come back; nil means that it is only counted
	State  *State      // for a later run to continue; nil means none

	Display Display
}

var (
	// ErrStopped is returned by a run that was stopped before the end of its inputs.
	ErrStopped = errors.New("stopped before the end of the input")

	// ErrStrict is returned by a run that Options.Strict stopped.
	ErrStrict = errors.New("stopped at the first malformed record or input")
)

// Run sends all records. When stop ends, it reads no more, and waits for what is in
// flight. When ctx ends, it ends. The error says why not everything was read, sent or
// written. Records and inputs that failed are only in the summary.
func Run(ctx, stop context.Context, opts Options) (Summary, error) {
	reading, cancel := context.WithCancelCause(stop)
	defer cancel(nil)
	r := &run{
		opts: opts, reading: reading, cancel: cancel,
		tally: newTally(opts.Inputs), out: bufio.NewWriterSize(opts.Out, 64<<10), progress: opts.State.progress(),
	}
	r.tally.earlier = r.progress.Malformed + r.progress.Failed
	if opts.Rate > 0 {
		// The limiter sleeps at most a hundred times a second.
		r.limiter = rate.NewLimiter(rate.Limit(opts.Rate), max(1, int(opts.Rate/100)))
	}
	opts.Stream.OnNotice = r.notice
	opts.Stream.OnReconnect = r.reconnect

	endDisplay := opts.Display.show(r.tally)
	began := time.Now()
	err := r.stream(ctx, opts.Stream)
	if stop.Err() != nil && errors.Is(err, context.Cause(stop)) || err == nil && !r.readAll {
		err = ErrStopped
	}
	if flushErr := r.flush(); err == nil { // otherwise err is the cause of flushErr, or the same
		err = flushErr
	}
	err = errors.Join(err, opts.Failed.close(), opts.Out.close())
	if err == nil && r.tally.badInputs.Load() == 0 {
		err = opts.State.remove()
	} else {
		err = errors.Join(err, opts.State.save())
	}
	endDisplay()
	summary := r.tally.summary(time.Since(began))
	summary.Unread = !r.readAll
	return summary, err
}

// run is the state of one Run.
type run struct {
	opts    Options
	reading context.Context // ends when the run should read no more
	cancel  context.CancelCauseFunc
	limiter *rate.Limiter // nil: none
	tally   *tally
	header  []string // of the inputs so far, if they have one
	readAll bool     // all inputs were read, or failed; owned by the stream until it ends

	out       *bufio.Writer
	progress  progress
	unflushed []key // of records that are in the buffers of out and Failed
}

// maxUnflushed bounds the records that are sent again after a crash.
const maxUnflushed = 1000

// stream handles the results, and returns why the stream ended.
func (r *run) stream(ctx context.Context, opts client.StreamOptions) error {
	var first error
	for result, err := range client.Stream(ctx, r.opts.Address, r.items, opts) {
		if err == nil {
			err = r.handle(result)
		}
		if err != nil && first == nil {
			first = err
			r.cancel(err) // the stream may be waiting for the input
		}
	}
	return first
}

func (r *run) handle(result client.Result[key]) error {
	k := result.Key
	r.tally.resent.Add(int64(max(result.Sent-1, 0)))
	later := r.opts.State != nil // a later run sends what is not done
	var err error
	switch {
	case k.malformed != nil:
		r.tally.malformed.Add(1)
		r.fail(r.explainMalformed(k.malformed))
		if r.opts.Strict && later {
			return nil
		}
		r.progress.Malformed++
		err = r.opts.Failed.addMalformed(r.tally.header(k), k.malformed)
	case errors.Is(result.Err, client.ErrUnfinished):
		r.tally.unfinished.Add(1)
		if later {
			return nil
		}
		err = r.opts.Failed.add(r.tally.header(k), result.Data)
	case result.Err != nil:
		r.tally.failed.Add(1)
		r.fail(fmt.Errorf("%s: %w", r.tally.place(k), result.Err))
		r.progress.Failed++
		err = r.opts.Failed.add(r.tally.header(k), result.Data)
	default:
		r.tally.returned(k, len(result.Data))
		r.write(result)
	}
	if err != nil {
		return err
	}
	r.tally.inputs[k.input].finished(k)
	r.unflushed = append(r.unflushed, k)
	if result.Idle || r.out.Buffered() > r.out.Size()/2 || len(r.unflushed) >= maxUnflushed {
		return r.flush()
	}
	return nil
}

// write writes an echo. A record after a last line without a newline begins a new line.
func (r *run) write(result client.Result[key]) {
	if r.progress.MidLine {
		_ = r.out.WriteByte('\n') // a bufio.Writer keeps its error
	}
	_, _ = r.out.Write(result.Data)
	r.progress.MidLine = result.Key.unended
}

// flush writes what is buffered. Only then are these records done: what could not be
// written is sent again by a later run.
func (r *run) flush() error {
	if err := r.out.Flush(); err != nil {
		return fmt.Errorf("writing the echoes: %w", err)
	}
	if err := r.opts.Failed.flush(); err != nil {
		return err
	}
	r.progress.Output, r.progress.Failures = r.opts.Out.saved(), r.opts.Failed.output().saved()
	r.opts.State.done(r.unflushed, r.progress)
	r.unflushed = r.unflushed[:0]
	return r.opts.State.checkpoint()
}

// explainMalformed says what to do about a malformed record.
func (r *run) explainMalformed(e *records.Error) error {
	err := r.withHint(e)
	if e.Cut && r.opts.Failed != nil {
		return fmt.Errorf("%w; not kept in %s", err, r.opts.Failed.output().name())
	}
	return err
}

// MaxRecordLimit is the largest value of --max-record, in bytes.
const MaxRecordLimit = 16 << 20

// withHint adds a hint to the error of a record or of a header: the option that would
// accept the input, if there is one.
func (r *run) withHint(err error) error {
	opts := r.opts.Records
	notClosed := strings.Contains(err.Error(), "not closed") // with the option, more would be read into the quotes
	hint := ""
	switch {
	case errors.Is(err, records.ErrTooLong) && opts.MaxRecord < MaxRecordLimit:
		hint = "--max-record allows more"
	case errors.Is(err, csv.ErrFieldCount):
		hint = "--allow-ragged accepts it"
	case errors.Is(err, csv.ErrBareQuote), errors.Is(err, csv.ErrQuote) && !opts.LazyQuotes && !notClosed:
		hint = "--lazy-quotes accepts it"
	case errors.Is(err, records.ErrNUL):
		hint = "--encoding utf-16le decodes it"
	case errors.Is(err, records.ErrEncoding) && opts.Encoding == "":
		hint = "--encoding NAME decodes it, --replace-invalid replaces it"
	case errors.Is(err, records.ErrEncoding):
		hint = "--replace-invalid replaces it"
	default:
		return err
	}
	return fmt.Errorf("%w (%s)", err, hint)
}

// fail reports a record that failed, if it is one of the first.
func (r *run) fail(err error) {
	const most = 10
	switch n := r.tally.reported.Add(1); {
	case n <= most:
		r.opts.Display.Error(err.Error())
	case n == most+1:
		r.opts.Display.Error("further failures are counted, and not reported")
	}
}

// notice reports a notice once, although each connection receives it.
func (r *run) notice(n client.Notice) {
	if r.tally.isNewNotice(n) {
		r.opts.Display.Say(Describe(n))
	}
}

// reconnect reports the reason for a new connection. A notice was reported already, and
// each connection has the same reason, again and again while the server is away.
func (r *run) reconnect(reason error) {
	r.tally.reconnects.Add(1)
	if _, ok := errors.AsType[*client.NoticeError](reason); ok {
		return
	}
	if op, ok := errors.AsType[*net.OpError](reason); ok && op.Op != "dial" {
		reason = op.Err // without the ports, which differ each time
	}
	limit := ""
	if most := r.opts.Stream.Reconnect.MaxElapsed; most > 0 {
		limit = fmt.Sprintf(", for at most %s without an echo", most)
	}
	if what := reason.Error(); r.tally.isNewReason(what) {
		r.opts.Display.Say(what + ": connecting again" + limit)
	}
}

// retry reports that the request of a URL is repeated.
func (r *run) retry(name string, reason error, wait time.Duration) {
	r.opts.Display.Say(fmt.Sprintf("read %s: %v: trying again in %s", name, reason,
		wait.Round(100*time.Millisecond)))
}

// Describe describes a notice in words.
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
