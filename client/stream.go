package client

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// Defaults of StreamOptions.
const (
	defaultConns         = 4
	defaultItemsPerConn  = 64
	defaultInFlightBytes = 4 << 20
	defaultStallTimeout  = 30 * time.Second
	defaultAttempts      = 5
)

// StreamOptions configures a [Stream]. The zero value is usable.
type StreamOptions struct {
	// TLSConfig is used for tls:// addresses, as in Options.
	TLSConfig *tls.Config

	// Dial makes the connections. Nil means [DialConn] with TLSConfig.
	Dial DialFunc

	// Conns is the maximum number of connections. A connection is made when there
	// is something to send on it. Zero means 4.
	Conns int

	// InFlight is the maximum number of items in flight: items that were taken from
	// the source and whose result the consumer has not handled. Each connection
	// sends at most an equal share of them ahead of the echo. Zero means 64 for
	// each connection.
	InFlight int

	// InFlightBytes is the maximum number of bytes in these items. A single item
	// may be larger. One more item may have been taken from the source and wait for
	// room. Zero means 4 MiB.
	InFlightBytes int

	// Ordered returns the results in the order of the items. If it is false, they
	// are returned in the order of the echoes.
	Ordered bool

	// Reconnect, if not nil, makes a connection again when it ends, and sends again
	// what had not come back. Waits are reset by an echo on the same connection,
	// limits by an echo on any connection. If Reconnect is nil, the stream ends
	// with the first connection that ends.
	Reconnect *Backoff

	// StallTimeout is the time after which a connection is closed if nothing comes
	// back while an echo is outstanding. It also limits the time to connect. Zero
	// means 30 s, or Reconnect.MaxElapsed if that is shorter. A negative value means
	// no limit.
	StallTimeout time.Duration

	// Attempts is the number of connections that may end with the same item next in
	// line, while other items come back. After that the item fails, so that an item
	// that makes a server close the connection cannot block the others. Zero means
	// 5.
	Attempts int

	// OnNotice, if not nil, is called with each notice. It must be safe for
	// concurrent use.
	OnNotice func(Notice)

	// OnReconnect, if not nil, is called before each wait for a new connection, with
	// the reason. It must be safe for concurrent use.
	OnReconnect func(reason error)
}

// An Item is something to send.
type Item[K any] struct {
	Key  K      // identifies the item to the caller
	Data []byte // must not be changed before the item's result is returned
}

// A Result says what became of an item.
type Result[K any] struct {
	Item[K]

	// Err is nil if the echo came back and was identical to Data.
	Err error

	// Sent is the number of times that the item was sent, which is also the largest
	// number of times that a server can have received it.
	Sent int

	// Idle means that no other result is ready. It is a good time to flush buffered
	// output.
	Idle bool
}

// Stream sends items over several connections to the server at address, and
// returns the result of each. It takes no more items from the source than may be
// in flight, so a slow server or a slow consumer slows the source down.
//
// Each item taken from the source has exactly one result, unless the consumer
// stops the iteration. If the echo of an item differs, or the item has used up its
// attempts, only that item fails. A differing echo is a [*CorruptionError].
//
// These events end the stream. Each is reported as the last error, with an empty
// Result:
//
//   - The source yields an error. Stream first waits for the echo of all items
//     taken before.
//   - A connection ends, and opts.Reconnect is nil or its limits are reached.
//     Nothing more is sent. Other connections finish what they have sent.
//   - The context ends. All connections are closed.
//
// Items whose echo did not come back before the end fail with [ErrUnfinished].
//
// When the server announces a shutdown, each connection finishes its outstanding
// items and half-closes. With opts.Reconnect, it is then made again.
//
// The iterator can be used once. A goroutine of Stream ranges over the source, and
// the iteration waits for that goroutine before it ends. So a source that blocks
// must also end by itself: use a context, as [FromChannel] does, and cancel it
// when the last error is returned or before stopping the iteration. A panic of the
// source ends the program.
func Stream[K any](
	ctx context.Context, address string, items iter.Seq2[Item[K], error], opts StreamOptions,
) iter.Seq2[Result[K], error] {
	return func(yield func(Result[K], error) bool) {
		s := newStream[K](ctx, address, opts)
		var running sync.WaitGroup
		running.Go(func() { s.run(items) })
		defer running.Wait()
		defer s.cancel(errConsumerDone)
		for e := range s.completed {
			for e = s.order.put(e); e != nil; e = s.order.next() {
				idle := len(s.completed) == 0 && !s.order.ready()
				if !yield(Result[K]{Item: e.Item, Err: e.err, Sent: e.sent, Idle: idle}, nil) {
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

// FromChannel returns a source of the items received from a channel. It ends when
// the channel is closed, or with the context's cause when the context ends.
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

// An inFlightItem is an item in flight. At any time one goroutine or channel owns it: the
// feeder, a channel of the stream, a connection, or the consumer.
type inFlightItem[K any] struct {
	Item[K]
	index    int64 // position in the source
	weight   int64 // bytes acquired from stream.bytes
	end      int64 // offset of its end in what its connection sends
	sent     int   // number of times sent
	err      error
	failures failureCount
}

// A stream is one call of Stream.
type stream[K any] struct {
	address string
	opts    StreamOptions // with defaults filled in

	// ctx ends with the caller's context, and when all is done. Connections are
	// then closed. sendCtx ends earlier, on a fatal error: nothing more is sent,
	// but outstanding echoes are received.
	ctx, sendCtx context.Context
	cancel       context.CancelCauseFunc // of ctx
	stopSending  context.CancelCauseFunc // of sendCtx

	items, bytes *semaphore.Weighted // limits of what is in flight

	// The capacity of each channel is InFlight, so sending to them never blocks.
	queue     chan *inFlightItem[K] // to be sent for the first time
	resend    chan *inFlightItem[K] // to be sent again
	completed chan *inFlightItem[K]

	queueMu     sync.Mutex // held while an entry is queued, at most until sendCtx ends
	queueClosed bool       // guarded by queueMu

	incomplete sync.WaitGroup // entries that are not completed
	echoes     atomic.Int64   // number of items that have come back
	began      time.Time
	lastEcho   atomic.Int64 // time of the last echo of any byte, in ns since began
	sourceErr  error        // set before ctx ends with errAllDone
	failure    error        // why the stream ended early; set before completed is closed
	order      reorderBuffer[K]
}

func newStream[K any](ctx context.Context, address string, opts StreamOptions) *stream[K] {
	opts.Conns = max(cmp.Or(opts.Conns, defaultConns), 1)
	opts.InFlight = max(cmp.Or(opts.InFlight, opts.Conns*defaultItemsPerConn), 1)
	opts.InFlightBytes = max(cmp.Or(opts.InFlightBytes, defaultInFlightBytes), 1)
	opts.StallTimeout = cmp.Or(opts.StallTimeout, defaultStallTimeout)
	opts.Attempts = max(cmp.Or(opts.Attempts, defaultAttempts), 1)
	if r := opts.Reconnect; r != nil && r.MaxElapsed > 0 && opts.StallTimeout > 0 {
		opts.StallTimeout = min(opts.StallTimeout, r.MaxElapsed)
	}
	s := &stream[K]{
		address: address, opts: opts, began: time.Now(),
		items:     semaphore.NewWeighted(int64(opts.InFlight)),
		bytes:     semaphore.NewWeighted(int64(opts.InFlightBytes)),
		queue:     make(chan *inFlightItem[K], opts.InFlight),
		resend:    make(chan *inFlightItem[K], opts.InFlight),
		completed: make(chan *inFlightItem[K], opts.InFlight),
	}
	if opts.Ordered {
		s.order.waiting = make([]*inFlightItem[K], opts.InFlight)
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	s.sendCtx, s.stopSending = context.WithCancelCause(s.ctx)
	return s
}

// run starts the other goroutines and waits for them.
func (s *stream[K]) run(items iter.Seq2[Item[K], error]) {
	var feeder, conns sync.WaitGroup
	defer feeder.Wait()
	feeder.Go(func() {
		s.sourceErr = s.feed(items)
		s.incomplete.Wait()
		s.cancel(errAllDone)
	})
	for range s.opts.Conns {
		conns.Go(func() { (&streamConn[K]{stream: s, slotFreed: make(chan struct{}, 1)}).run() })
	}
	conns.Wait()
	s.finish()
}

// finish completes the entries that no connection will send, and closes
// completed. The source may still be blocked.
func (s *stream[K]) finish() {
	s.queueMu.Lock()
	defer s.queueMu.Unlock()
	s.queueClosed = true
	for _, left := range []chan *inFlightItem[K]{s.resend, s.queue} {
		for len(left) > 0 {
			s.complete(<-left, s.unfinishedError())
		}
	}
	if s.failure = context.Cause(s.sendCtx); errors.Is(s.failure, errAllDone) {
		s.failure = s.sourceErr
	}
	close(s.completed)
}

// unfinishedError returns the error of an entry that will not come back.
func (s *stream[K]) unfinishedError() error {
	return fmt.Errorf("%w: %w", ErrUnfinished, context.Cause(s.sendCtx))
}

// feed takes items from the source while they may be in flight. It returns the
// source's error.
func (s *stream[K]) feed(items iter.Seq2[Item[K], error]) error {
	if s.items.Acquire(s.sendCtx, 1) != nil {
		return nil
	}
	var index int64
	for item, err := range items {
		if err != nil {
			return err
		}
		if !s.enqueue(&inFlightItem[K]{Item: item, index: index}) {
			break
		}
		index++
		if s.items.Acquire(s.sendCtx, 1) != nil { // before the next item is taken
			break
		}
	}
	return nil
}

// enqueue queues an entry for the connections. It reports false if the queue is
// closed.
func (s *stream[K]) enqueue(e *inFlightItem[K]) bool {
	s.queueMu.Lock()
	defer s.queueMu.Unlock()
	if s.queueClosed {
		return false
	}
	s.incomplete.Add(1)
	e.weight = int64(min(len(e.Data), s.opts.InFlightBytes))
	switch {
	case e.weight == 0:
		s.complete(e, nil)
	case s.bytes.Acquire(s.sendCtx, e.weight) != nil:
		e.weight = 0
		s.complete(e, s.unfinishedError())
	default:
		s.queue <- e
	}
	return true
}

// complete passes an entry to the consumer. A nil err means that it came back.
func (s *stream[K]) complete(e *inFlightItem[K], err error) {
	if e.err = err; err == nil {
		s.echoes.Add(1)
	}
	s.completed <- e
	s.incomplete.Done()
}

// release makes room for another item after the consumer has handled e.
func (s *stream[K]) release(e *inFlightItem[K]) {
	s.items.Release(1)
	s.bytes.Release(e.weight)
}

// A reorderBuffer restores the order of the source. The zero value passes entries
// on as they come. Only the consumer uses it.
type reorderBuffer[K any] struct {
	waiting []*inFlightItem[K] // by index modulo InFlight, its length
	want    int64              // index of the next entry to return
}

// put adds an entry and returns the next one in order, or nil if it is not there.
func (o *reorderBuffer[K]) put(e *inFlightItem[K]) *inFlightItem[K] {
	if o.waiting == nil {
		return e
	}
	o.waiting[o.slot(e.index)] = e
	return o.next()
}

// ready reports whether next would return an entry.
func (o *reorderBuffer[K]) ready() bool { return o.waiting != nil && o.waiting[o.slot(o.want)] != nil }

// next returns the next entry in order, or nil if it is not there.
func (o *reorderBuffer[K]) next() *inFlightItem[K] {
	if !o.ready() {
		return nil
	}
	e := o.waiting[o.slot(o.want)]
	o.waiting[o.slot(o.want)] = nil
	o.want++
	return e
}

func (o *reorderBuffer[K]) slot(index int64) int64 { return index % int64(len(o.waiting)) }
