package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"net"
	"strconv"
	"time"

	"go.uber.org/zap"
)

// Off disables an option: no timeout, no limit, no grace period. A zero option means its documented default. Any
// other negative value is an error.
const Off = -1

// Defaults of Options.
const (
	DefaultGrace            = 5 * time.Second
	DefaultStallTimeout     = 30 * time.Second
	DefaultHandshakeTimeout = 10 * time.Second
	DefaultMaxHandshakes    = 1024
	DefaultIPv6Prefix       = 64
)

// Options configures a Server. The zero value is ready to use. New keeps a copy.
type Options struct {
	// Logger receives what the server does. Nil logs nothing.
	Logger *zap.Logger
	// QuietConns leaves out the log lines for each connection that is opened or closed.
	QuietConns bool

	// Notifier encodes what clients are told on a drain, on a rejection, and for an operator's message. Nil: the server
	// itself sends nothing to clients. Conn.SetNotifier replaces it for one connection.
	Notifier Notifier

	Limits   Limits
	Timeouts Timeouts
	// Drain holds the defaults of every drain.
	Drain DrainOptions

	// WrapConn, when not nil, prepares each connection before it is admitted: it reads a PROXY header, performs a TLS
	// handshake, or authenticates the client.
	WrapConn WrapConn
	// TLSConfig is the configuration of ServeTLS and ListenAndServeTLS, which copy it. Other listeners do not use it.
	TLSConfig *tls.Config
	// BaseContext, when not nil, returns the parent of the contexts of the connections that come from ln.
	BaseContext func(ln net.Listener) context.Context
	// ConnContext, when not nil, returns the parent of the handler's context for a connection that was admitted; ctx
	// is what BaseContext returned. It is called on the connection's goroutine.
	ConnContext func(ctx context.Context, c *Conn) context.Context
	// CancelWhenGone cancels the handler's context with ErrClientGone about a second after the client closed or reset
	// the connection, also while the handler does not read. As in net/http a half-close counts as closing.
	// It needs a socket, and a unix system.
	CancelWhenGone bool
	// ConnState, when not nil, is called when a connection enters a phase, on one of the server's goroutines. It is
	// called concurrently and must not block.
	ConnState func(c *Conn, p Phase)
	// OnClose, when not nil, is called once for each connection after it was closed, on the connection's goroutine.
	// It is called concurrently. A drain waits for it as for a handler.
	OnClose func(ClosedConn)
}

// Limits bounds what clients can take.
type Limits struct {
	// MaxConns is how many connections are served at once. Zero means as many as the process's limit on open files
	// allows, less ReservedFiles; a larger number is lowered to that. Off means no limit, also not by open files.
	//
	// With LimitQueue a connection in its handshake (WrapConn, TLS) counts too. While clients wait for a place, one whose
	// handshake has taken more than a second is closed for the next client. With LimitReject it does not count: the client
	// is served or rejected when its handshake is over.
	MaxConns int
	// AtLimit is what happens to clients beyond MaxConns.
	AtLimit LimitMode
	// MaxConnsPerIP is how many connections are served at once from one client address. More are rejected, whatever
	// AtLimit says, so that one client cannot block the accept queue. A client may also have no more TLS handshakes at
	// once than that: its oldest is ended for a new one. Zero and Off mean no limit.
	MaxConnsPerIP int
	// MaxConnsPerUID is the same for one user id on Unix sockets, where the system tells it. Zero and Off mean no limit.
	MaxConnsPerUID int
	// IPv6Prefix is how many bits of an IPv6 address identify a client for MaxConnsPerIP. Zero means 64, because a
	// site usually has a /64 at least (RFC 6177). IPv4 addresses count whole, also when they are mapped into IPv6.
	IPv6Prefix int
	// MaxHandshakes is how many connections may be in WrapConn or in a TLS handshake at once. At the limit the one that
	// has been there for longest is closed for a new one. Zero means DefaultMaxHandshakes.
	MaxHandshakes int
	// ReservedFiles is how many of the open files that the process may have are kept for other uses than serving.
	// Zero means 160, or half of the process's limit if that is less. Servers in one process share what is left.
	ReservedFiles int
}

// Timeouts bounds how long clients can take.
type Timeouts struct {
	// Idle closes a connection on which no byte moved in either direction for so long. While data waits for the client,
	// Stall decides instead. Zero and Off mean never.
	Idle time.Duration
	// Stall closes a connection whose client took nothing for so long while data waited for it. A client counts as
	// taking data when its kernel acknowledges bytes. A slow reader opens its receive window in large steps, on
	// loopback of 64 or 128 KiB: one that reads less than a step per timeout counts as stalled, which is 4 KiB/s for
	// 30 s. The connection is closed after at most a quarter more than the timeout. Zero means DefaultStallTimeout,
	// Off means never.
	Stall time.Duration
	// MaxAge is how old a connection becomes before its client is told to leave, with a jitter of ten percent in either
	// direction, so that the clients of a fleet spread over its servers again and again. The client then has
	// Options.Drain.Grace. Zero and Off mean no limit.
	MaxAge time.Duration
	// Handshake bounds WrapConn and the TLS handshake together. Zero means DefaultHandshakeTimeout.
	Handshake time.Duration
}

// Bounds on the end of a connection. They add up so that a drain is over about 1.6 s after its deadline whatever
// clients and handlers do. Two seconds are promised, and machines are busy.
const (
	flushTimeout   = 1 * time.Second         // for writing what was read, when the server ends a connection
	lingerTimeout  = 300 * time.Millisecond  // for the client's FIN after ours
	lingerBytes    = 64 << 20                // discarded in that time, at most
	abortAfter     = 1350 * time.Millisecond // after the deadline connections are closed under their handlers
	abandonAfter   = 150 * time.Millisecond  // after that, handlers that ignore their context are left behind
	orphanTimeout  = 10 * time.Second        // for the kernel to deliver what is unsent when a connection is closed
	messageTimeout = 1 * time.Second         // for Notify's texts to be taken by the kernel
)

// withDefaults returns o with its zero values replaced by their defaults, or an error that names each option that
// makes no sense.
func (o Options) withDefaults() (Options, error) {
	var errs []error
	for _, opt := range []struct {
		name  string
		value int64
		text  string
	}{
		{"Limits.MaxConns", int64(o.Limits.MaxConns), strconv.Itoa(o.Limits.MaxConns)},
		{"Limits.MaxConnsPerIP", int64(o.Limits.MaxConnsPerIP), strconv.Itoa(o.Limits.MaxConnsPerIP)},
		{"Limits.MaxConnsPerUID", int64(o.Limits.MaxConnsPerUID), strconv.Itoa(o.Limits.MaxConnsPerUID)},
		{"Timeouts.Idle", int64(o.Timeouts.Idle), o.Timeouts.Idle.String()},
		{"Timeouts.Stall", int64(o.Timeouts.Stall), o.Timeouts.Stall.String()},
		{"Timeouts.MaxAge", int64(o.Timeouts.MaxAge), o.Timeouts.MaxAge.String()},
	} {
		if opt.value < Off {
			errs = append(errs, fmt.Errorf("option %s: %s is negative", opt.name, opt.text))
		}
	}
	for _, opt := range []struct {
		name  string
		value int64
		text  string
	}{
		{"Limits.IPv6Prefix", int64(o.Limits.IPv6Prefix), strconv.Itoa(o.Limits.IPv6Prefix)},
		{"Limits.MaxHandshakes", int64(o.Limits.MaxHandshakes), strconv.Itoa(o.Limits.MaxHandshakes)},
		{"Limits.ReservedFiles", int64(o.Limits.ReservedFiles), strconv.Itoa(o.Limits.ReservedFiles)},
		{"Timeouts.Handshake", int64(o.Timeouts.Handshake), o.Timeouts.Handshake.String()},
	} {
		if opt.value < 0 {
			errs = append(errs, fmt.Errorf("option %s: %s is negative, and it cannot be off", opt.name, opt.text))
		}
	}
	if o.Limits.IPv6Prefix > 128 {
		errs = append(errs, fmt.Errorf("option Limits.IPv6Prefix: %d: an address has 128 bits", o.Limits.IPv6Prefix))
	}
	if o.Limits.AtLimit != LimitQueue && o.Limits.AtLimit != LimitReject {
		errs = append(errs, fmt.Errorf("option Limits.AtLimit: unknown value %d", o.Limits.AtLimit))
	}
	if err := o.Drain.check(); err != nil {
		errs = append(errs, fmt.Errorf("option Drain: %w", err))
	}
	if len(errs) > 0 {
		return o, errors.Join(errs...)
	}

	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Notifier == nil {
		o.Notifier = silent{}
	}
	o.Limits = o.Limits.withDefaults(o.Logger)
	o.Timeouts = o.Timeouts.withDefaults()
	o.Drain = o.Drain.withDefaults(DrainOptions{Grace: DefaultGrace, Delay: Off, Reason: "shutdown"})
	return o, nil
}

func (l Limits) withDefaults(log *zap.Logger) Limits {
	if l.IPv6Prefix == 0 {
		l.IPv6Prefix = DefaultIPv6Prefix
	}
	if l.MaxHandshakes == 0 {
		l.MaxHandshakes = DefaultMaxHandshakes
	}
	l.MaxConnsPerIP, l.MaxConnsPerUID = max(0, l.MaxConnsPerIP), max(0, l.MaxConnsPerUID)
	files, limited := openFilesLimit()
	switch {
	case l.MaxConns == Off || !limited && l.MaxConns == 0:
		l.MaxConns = math.MaxInt
	case limited:
		if l.ReservedFiles == 0 {
			l.ReservedFiles = min(160, files/2)
		}
		most := max(1, files-l.ReservedFiles)
		if l.MaxConns > most {
			log.Warn("lowered the limit on connections: the limit on open files allows no more",
				zap.Int("asked", l.MaxConns), zap.Int("max_conns", most), zap.Int("open_files_limit", files))
		}
		if l.MaxConns == 0 || l.MaxConns > most {
			l.MaxConns = most
		}
		l.MaxHandshakes = min(l.MaxHandshakes, max(1, most/2))
	}
	return l
}

// spareFiles is how many of ReservedFiles connections may take that are rejected, or that a drain accepts.
func (l Limits) spareFiles() int { return l.ReservedFiles / 4 }

func (t Timeouts) withDefaults() Timeouts {
	t.Idle, t.MaxAge = max(0, t.Idle), max(0, t.MaxAge)
	switch t.Stall {
	case 0:
		t.Stall = DefaultStallTimeout
	case Off:
		t.Stall = 0
	}
	if t.Handshake == 0 {
		t.Handshake = DefaultHandshakeTimeout
	}
	return t
}
