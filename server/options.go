package server

import (
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
)

// Defaults of Options and fixed bounds of a connection's end. The times add up so that a drain is over
// 1.7 s after its deadline whatever clients and handlers do: promised are two, and machines are busy.
const (
	DefaultGrace        = 5 * time.Second
	DefaultStallTimeout = 30 * time.Second

	flushTimeout  = 1 * time.Second         // for what was read to be written back, once a connection is told to end
	lingerTimeout = 400 * time.Millisecond  // for the client's FIN after ours
	lingerBytes   = 16 << 20                // discarded meanwhile at most: more than two kernels have under way
	abortAfter    = 1450 * time.Millisecond // after the deadline, what is still open is closed under its handler
	abandonAfter  = 250 * time.Millisecond  // after that, handlers that ignore their context are left behind

	notifyTimeout = 1 * time.Second // for Notify's texts to be taken by the kernel
)

// AtLimit says what becomes of a client that comes when MaxConns are being served.
type AtLimit int

const (
	// Wait leaves it in the kernel's accept queue until a place is free. It is the zero value.
	Wait AtLimit = iota
	// Reject accepts it, says BUSY and closes.
	Reject
)

// Options configures a Server. The zero value is ready to use. New keeps a copy.
type Options struct {
	// Logger receives what the server does; nil logs nothing.
	Logger *zap.Logger

	// Notice is sent to every client when a drain begins; nil means DefaultNotice.
	Notice *Notice

	// Grace is the time that clients have from the begin of a drain that names none itself. Zero means
	// DefaultGrace; negative means none: clients are told and closed at once.
	Grace time.Duration

	// DrainDelay is how long a drain that has begun goes on accepting before it tells anybody; the grace begins after it. It is for
	// load balancers, which take a while to notice that the server is not ready any more. A pause that stands goes on meanwhile, and
	// ends with it at the latest. Zero: not at all.
	DrainDelay time.Duration

	// MaxConns is how many connections are served at once. Zero, and any number above it, means as
	// many as the process's limit on open files allows, less a reserve of up to 128 for listeners, the
	// control plane, rejections and the drain. Where the system has no such limit, zero is unlimited.
	MaxConns int
	// AtLimit says what becomes of clients beyond MaxConns.
	AtLimit AtLimit
	// MaxConnsPerIP is how many connections are served at once from one client address; more are told
	// BUSY and closed, whatever AtLimit says, lest one client hold up the others. Zero is unlimited.
	MaxConnsPerIP int

	// IdleTimeout closes a connection on which no byte moved in either direction for so long. Zero: never.
	IdleTimeout time.Duration
	// StallTimeout closes a connection whose client has acknowledged nothing for so long while a write
	// to it was blocked. Zero means DefaultStallTimeout; negative: never.
	StallTimeout time.Duration

	// Identify, when not nil, says who each client is before the connection comes to the gate. One that it fails for is closed without
	// a word. Connections that are not identified yet count towards MaxConns.
	Identify Identify

	// OnClose, when not nil, is called once for every connection after it was closed, on that
	// connection's goroutine; so it is called concurrently. A drain waits for it as for a handler: at the
	// most until 1.7 s after its deadline.
	OnClose func(ClosedConn)
}

// resolve returns o with its zero values replaced by what they stand for, or an error that names
// each option that makes no sense.
func (o Options) resolve() (Options, error) {
	var errs []error
	bad := func(name string, v any) {
		errs = append(errs, fmt.Errorf("option %s: %v is negative", name, v))
	}
	if o.MaxConns < 0 {
		bad("MaxConns", o.MaxConns)
	}
	if o.MaxConnsPerIP < 0 {
		bad("MaxConnsPerIP", o.MaxConnsPerIP)
	}
	if o.IdleTimeout < 0 {
		bad("IdleTimeout", o.IdleTimeout)
	}
	if o.DrainDelay < 0 {
		bad("DrainDelay", o.DrainDelay)
	}
	if o.AtLimit != Wait && o.AtLimit != Reject {
		errs = append(errs, fmt.Errorf("option AtLimit: unknown value %d", o.AtLimit))
	}
	if len(errs) > 0 {
		return o, errors.Join(errs...)
	}

	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Notice == nil {
		o.Notice = &Notice{template: "SHUTDOWN {seconds} {reason}\n"}
	}
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	if o.StallTimeout == 0 {
		o.StallTimeout = DefaultStallTimeout
	}
	if ceiling, _, ok := files(); ok && (o.MaxConns == 0 || o.MaxConns > ceiling) {
		if o.MaxConns > ceiling {
			o.Logger.Warn("fewer connections than asked for: the limit on open files allows no more",
				zap.Int("asked", o.MaxConns), zap.Int("max_conns", ceiling))
		}
		o.MaxConns = ceiling
	}
	return o, nil
}

// Files kept for other than served connections.
const (
	fileReserve  = 128
	maxRejecting = 32 // of the reserve, for rejections that linger at the same time
)

// files says how many connections the limit on open files leaves room for, and how many more a drain
// may take from the accept queue; not ok means no limit.
func files() (ceiling, extra int, ok bool) {
	limit, ok := openFilesLimit()
	if !ok {
		return 0, 0, false
	}
	reserve := min(fileReserve, limit/2)
	return max(1, limit-reserve), reserve / 4, true
}
