package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// Zero values of StreamOptions.
const (
	defaultConns         = 4
	defaultItemsPerConn  = 64
	defaultInFlightBytes = 4 << 20
	defaultStallTimeout  = 30 * time.Second
	defaultAttempts      = 5
)

// StreamOptions says how [Stream] sends. The zero value is usable.
type StreamOptions struct {
	// Dial makes each connection; nil means TCP.
	Dial DialFunc

	// Conns is how many connections there are at most. They are made when there
	// is something to send. Zero means 4.
	Conns int

	// InFlight bounds the items that have been taken from the source and whose
	// result has not been handled by the consumer. A connection has its share of
	// them under way at the most. Zero means 64 for each connection.
	InFlight int

	// InFlightBytes bounds the bytes of those items; a single item may be
	// longer. Zero means 4 MiB.
	InFlightBytes int

	// Ordered hands the results out in the order of the items. Otherwise they
	// come as the echoes do.
	Ordered bool

	// Reconnect, if not nil, makes a connection that ends be made again, and what
	// had not come back be sent again. Its waits grow while nothing comes back over
	// the connection itself; its limits count from the last time that anything came back
	// over any. If it is nil, the first connection that ends, ends the stream.
	Reconnect *Backoff

	// StallTimeout is how long not a byte may come back over a connection while something
	// is due, before it is given up. Zero means 30 s, less than zero for ever.
	StallTimeout time.Duration

	// Attempts is how many connections in a row may end with the same item as the next
	// that is due, while others come back, before the item is given up. Zero means 5.
	Attempts int

	// OnNotice, if not nil, is called with each notice, and OnReconnect with the
	// reason before each wait for another connection; by several goroutines at a time.
	OnNotice    func(Notice)
	OnReconnect func(reason error)
}

// An Item is something to send. Key is the caller's, to know it by.
type Item[K any] struct {
	Key  K
	Data []byte // not to be changed until the item's result has come
}

// A Result says what became of an item. Err is nil when its echo has come back: byte
// for byte Data.
type Result[K any] struct {
	Item[K]
	Err error

	// Sent is how often the item was sent. A server may have seen it as often.
	Sent int

	// Idle says that no other result is ready: a good moment to flush what was written.
	Idle bool
}

// ErrUnfinished is wrapped by the errors of items that were taken, and had not come back
// when the stream ended. They may be sent again.
var ErrUnfinished = errors.New("the stream ended before its echo came")

var (
	errReturned = errors.New("the consumer of the results has returned")
	errFinished = errors.New("everything has come back")
	errStalled  = errors.New("nothing has come back in time")
	errLeft     = errors.New("all that was sent has come back")
)

// Stream sends items over several connections at once, and returns what became of
// each. It takes no more from the source than may be in flight, so that a slow server
// or consumer slows the source down.
//
// Each item taken from the source has exactly one result, unless the consumer breaks
// off. An echo that differs, which is a *[CorruptionError], and an item that was given up
// are errors of that item alone. An error of the source ends the stream once everything
// taken before has come back. When connections are no longer to be had, nothing more is sent, and
// when the context ends connections are closed: what does not come back has that as its
// error. In all three cases the error itself is the last that is yielded, with an empty Result.
//
// When the server announces its end, each connection finishes what is outstanding,
// half-closes, and with opts.Reconnect is made again.
//
// The iterator is for single use. A panic of the source ends the program. The source is ranged over by a goroutine of Stream's,
// which is awaited before the iteration ends, however it ends. A source that waits for
// something must heed a context of the caller's, as that of [FromChannel] does, and the caller
// end it when the last error is yielded, or before breaking off.
func Stream[K any](ctx context.Context, address string, items iter.Seq2[Item[K], error], opts StreamOptions) iter.Seq2[Result[K], error] {
	return func(yield func(Result[K], error) bool) {
		s := newStream[K](ctx, address, opts)
		var running sync.WaitGroup
		running.Go(func() { s.run(items) })
		defer running.Wait()
		defer s.end(errReturned)
		for e := range s.completed {
			for e = s.order.put(e); e != nil; e = s.order.next() {
				if !yield(Result[K]{Item: e.Item, Err: e.err, Sent: e.sent, Idle: len(s.completed) == 0 && !s.order.ready()}, nil) {
					return
				}
				s.release(e)
			}
		}
		if s.failure != nil {
			yield(Result[K]{}, s.failure)
		}
	}
}

// FromChannel makes a source of a channel. It ends when the channel is closed, or with
// the context's cause.
func FromChannel[K any](ctx context.Context, items <-chan Item[K]) iter.Seq2[Item[K], error] {
	return func(yield func(Item[K], error) bool) {
		for {
			select {
			case item, ok := <-items:
				if !ok || !yield(item, nil) {
					return
				}
			case <-ctx.Done():
				yield(Item[K]{}, context.Cause(ctx))
				return
			}
		}
	}
}

// An entry is an item on its way. It belongs to whoever holds it: the feeder, a
// channel, a connection, the consumer.
type entry[K any] struct {
	Item[K]
	index  int64 // its place in the source
	weight int64 // the room for bytes that it takes
	end    int64 // where it ends in what its connection sends
	sent   int
	err    error
	suspicion
}

// stream is one call of Stream.
type stream[K any] struct {
	address string
	opts    StreamOptions

	// ctx ends with the caller's, and when all is over: connections are closed. intake
	// ends before, with what is fatal: nothing more is sent, and what is due may still come.
	ctx, intake context.Context
	end, halt   context.CancelCauseFunc

	items, bytes *semaphore.Weighted // room for what is in flight

	// Each has room for all that may be in flight, so that nobody waits to send.
	queue     chan *entry[K]
	again     chan *entry[K] // to be sent once more
	completed chan *entry[K]

	offering sync.Mutex // held while an entry is taken, which ends with intake
	over     bool       // guarded by offering: nothing more is taken

	unfinished sync.WaitGroup // the entries that are not completed
	progress   atomic.Int64   // how many have come back
	sourceErr  error          // set before ctx ends with errFinished
	failure    error          // why not all was taken or sent; set before completed is closed
	order      order[K]       // the consumer's
}

func newStream[K any](ctx context.Context, address string, opts StreamOptions) *stream[K] {
	if opts.Dial == nil {
		opts.Dial = dialTCP
	}
	opts.Conns = max(cmp.Or(opts.Conns, defaultConns), 1)
	opts.InFlight = max(cmp.Or(opts.InFlight, opts.Conns*defaultItemsPerConn), 1)
	opts.InFlightBytes = max(cmp.Or(opts.InFlightBytes, defaultInFlightBytes), 1)
	opts.StallTimeout = cmp.Or(opts.StallTimeout, defaultStallTimeout)
	opts.Attempts = max(cmp.Or(opts.Attempts, defaultAttempts), 1)
	s := &stream[K]{
		address: address, opts: opts,
		items:     semaphore.NewWeighted(int64(opts.InFlight)),
		bytes:     semaphore.NewWeighted(int64(opts.InFlightBytes)),
		queue:     make(chan *entry[K], opts.InFlight),
		again:     make(chan *entry[K], opts.InFlight),
		completed: make(chan *entry[K], opts.InFlight),
	}
	if opts.Ordered {
		s.order.waiting = make([]*entry[K], opts.InFlight)
	}
	s.ctx, s.end = context.WithCancelCause(ctx)
	s.intake, s.halt = context.WithCancelCause(s.ctx)
	return s
}

// run is the goroutine that starts the others and awaits them.
func (s *stream[K]) run(items iter.Seq2[Item[K], error]) {
	var feeder, conns sync.WaitGroup
	defer feeder.Wait()
	feeder.Go(func() {
		s.sourceErr = s.feed(items)
		s.unfinished.Wait()
		s.end(errFinished)
	})
	for range s.opts.Conns {
		conns.Go(func() { (&streamConn[K]{stream: s, room: make(chan struct{}, 1)}).run() })
	}
	conns.Wait()
	s.finish()
}

// finish completes what no connection will send, and ends the results. The source may still be waiting.
func (s *stream[K]) finish() {
	s.offering.Lock()
	defer s.offering.Unlock()
	s.over = true
	for _, left := range []chan *entry[K]{s.again, s.queue} {
		for len(left) > 0 {
			s.complete(<-left, s.unfinishedBy())
		}
	}
	if s.failure = context.Cause(s.intake); errors.Is(s.failure, errFinished) {
		s.failure = s.sourceErr
	}
	close(s.completed)
}

// unfinishedBy is the error of an entry that has not come back, nor will.
func (s *stream[K]) unfinishedBy() error {
	return fmt.Errorf("%w: %w", ErrUnfinished, context.Cause(s.intake))
}

// feed takes items from the source while there is room for them. It returns the source's error.
func (s *stream[K]) feed(items iter.Seq2[Item[K], error]) error {
	if s.items.Acquire(s.intake, 1) != nil {
		return nil
	}
	var index int64
	for item, err := range items {
		if err != nil {
			return err
		}
		if !s.offer(&entry[K]{Item: item, index: index}) {
			break
		}
		index++
		if s.items.Acquire(s.intake, 1) != nil { // before the next is taken
			break
		}
	}
	return nil
}

// offer hands an entry to the connections. It reports false, and takes nothing, once all is over.
func (s *stream[K]) offer(e *entry[K]) bool {
	s.offering.Lock()
	defer s.offering.Unlock()
	if s.over {
		return false
	}
	s.unfinished.Add(1)
	e.weight = int64(min(len(e.Data), s.opts.InFlightBytes))
	switch {
	case e.weight == 0:
		s.complete(e, nil)
	case s.bytes.Acquire(s.intake, e.weight) != nil:
		e.weight = 0
		s.complete(e, s.unfinishedBy())
	default:
		s.queue <- e
	}
	return true
}

// complete says what has become of an entry.
func (s *stream[K]) complete(e *entry[K], err error) {
	if e.err = err; err == nil {
		s.progress.Add(1)
	}
	s.completed <- e
	s.unfinished.Done()
}

// release makes room for another.
func (s *stream[K]) release(e *entry[K]) {
	s.items.Release(1)
	s.bytes.Release(e.weight)
}

// order puts entries back into the order of the source. Its zero value leaves them as they come.
type order[K any] struct {
	waiting []*entry[K] // by index modulo its length, which is as many as are in flight
	due     int64       // index of the next
}

// put takes an entry, and returns one whose turn it is, or nil.
func (o *order[K]) put(e *entry[K]) *entry[K] {
	if o.waiting == nil {
		return e
	}
	o.waiting[o.place(e.index)] = e
	return o.next()
}

// ready reports whether next has one.
func (o *order[K]) ready() bool { return o.waiting != nil && o.waiting[o.place(o.due)] != nil }

// next returns another one whose turn it is, or nil.
func (o *order[K]) next() *entry[K] {
	if !o.ready() {
		return nil
	}
	e := o.waiting[o.place(o.due)]
	o.waiting[o.place(o.due)] = nil
	o.due++
	return e
}

func (o *order[K]) place(index int64) int64 { return index % int64(len(o.waiting)) }
