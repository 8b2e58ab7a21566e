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

// Off disables an option: no timeout, no limit, no grace period. Zero means the option's documented default. Any
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
	// Logger is the server's logger. Nil logs nothing.
	Logger *zap.Logger
	// QuietConns suppresses the log lines "connection opened" and "connection closed".
	QuietConns bool

	// Notifier encodes the server's own messages to clients: on a drain, on a rejection, and from an operator. If it is
	// nil, the server sends none. Conn.SetNotifier replaces it for one connection.
	Notifier Notifier

	Limits   Limits
	Timeouts Timeouts
	// Drain holds the defaults of every drain.
	Drain  DrainOptions
	Access Access
	// LogLevel, when not nil, is the level of Logger, for Settings.LogLevel.
	LogLevel *zap.AtomicLevel

	// WrapConn, when not nil, prepares each connection before it is admitted: it reads a PROXY header, performs a TLS
	// handshake, or authenticates the client.
	WrapConn WrapConn
	// TLSConfig is the configuration for ServeTLS and ListenAndServeTLS, which copy it. Other listeners do not use
	// it.
	TLSConfig *tls.Config
	// BaseContext, when not nil, returns the parent of the contexts of the connections that come from ln.
	BaseContext func(ln net.Listener) context.Context
	// ConnContext, when not nil, returns the parent of the handler's context for an admitted connection; ctx is the
	// context from BaseContext. It is called on the connection's goroutine.
	ConnContext func(ctx context.Context, c *Conn) context.Context
	// CancelWhenGone cancels the handler's context with ErrClientGone about a second after the client has closed or
	// reset the connection, even if the handler is not reading. As in net/http, a half-close counts as closing. It
	// works only for sockets on unix systems.
	CancelWhenGone bool
	// ConnState, when not nil, is called when a connection enters a phase, on one of the server's goroutines. It is
	// called concurrently and must not block.
	ConnState func(c *Conn, p Phase)
	// OnClose, when not nil, is called once for each connection after it is closed. Calls for different connections
	// may be concurrent. A drain waits for OnClose as it does for a handler.
	OnClose func(ClosedConn)
}

// Limits bounds the resources that clients can use.
type Limits struct {
	// MaxConns is the maximum number of connections served at once. Zero means as many as the process's limit on open
	// files allows, minus ReservedFiles; a larger number is lowered to that. Off means no limit, not even that of
	// open files.
	//
	// Connections in a handshake (WrapConn, TLS) do not count: the server admits, queues or rejects the client after
	// its handshake. MaxHandshakes bounds them.
	MaxConns int
	// AtLimit says what happens to clients beyond MaxConns.
	AtLimit LimitMode
	// MaxConnsPerIP is the maximum number of connections served at once from one client address. The server rejects
	// more, regardless of AtLimit, so that one client cannot block the accept queue. It also bounds the client's TLS
	// handshakes: at the limit, the oldest one is closed for a new one. Zero and Off mean no limit.
	MaxConnsPerIP int
	// MaxConnsPerUID is like MaxConnsPerIP, for one user id on Unix sockets. It needs a system that reports user ids. Zero
	// and Off mean no limit.
	MaxConnsPerUID int
	// MaxConnRate bounds the rate of new connections from one client address. Further ones are rejected with
	// ReasonRejectedRate.
	MaxConnRate Rate
	// MaxConnRateTotal bounds the rate of new connections from all addresses. With LimitQueue further clients wait in the
	// accept queue. With LimitReject they are rejected.
	MaxConnRateTotal Rate
	// IPv6Prefix is the number of leading bits of an IPv6 address that identify a client for MaxConnsPerIP and
	// MaxConnRate. Zero means 64, because a site usually has at least a /64 (RFC 6177). IPv4 addresses, also when
	// mapped into IPv6, are compared in full.
	IPv6Prefix int
	// MaxHandshakes is the maximum number of connections in WrapConn or in a TLS handshake. At the limit, new clients wait
	// in the accept queue until a handshake ends. If the oldest one takes more than a second, it is closed for a new one.
	// Zero means DefaultMaxHandshakes.
	MaxHandshakes int
	// ReservedFiles is the number of open files that are kept free for the rest of the process.
	// Zero means 160, or half of the process's limit if that is less. Servers in one process share the remaining
	// files.
	ReservedFiles int
}

// Timeouts bounds the time that clients can take.
type Timeouts struct {
	// Idle is the time without traffic in either direction after which a connection is closed. While data waits for
	// the client, Stall applies instead. Zero and Off mean never.
	Idle time.Duration
	// Stall is the time after which a connection is closed if data waits for the client and the client's kernel
	// acknowledges none of it. The receive window of a slow reader opens in large steps, 64 or 128 KiB on loopback. A
	// client that reads less than one step per timeout counts as stalled: at 30 s, one that reads less than about 4
	// KiB/s. The connection is closed at most a quarter of the timeout late. Zero means DefaultStallTimeout, Off
	// means never.
	Stall time.Duration
	// MaxAge is the age at which the client of a connection is told to leave, with a jitter of ten percent in either
	// direction. The client then has Options.Drain.Grace. With a maximum age, long-lived clients reconnect and spread
	// over the servers of a fleet. Zero and Off mean no limit.
	MaxAge time.Duration
	// Handshake bounds WrapConn and the TLS handshake together. Zero means DefaultHandshakeTimeout.
	Handshake time.Duration
}

// Bounds on the end of a connection. Together they end a drain about 1.6 s after its deadline, whatever clients and
// handlers do. The promise is two seconds, which leaves a margin for busy machines.
const (
	flushTimeout   = 1 * time.Second         // for writing what was read, when the server ends a connection
	lingerTimeout  = 300 * time.Millisecond  // for the client's FIN after the server's
	lingerBytes    = 64 << 20                // maximum number of bytes discarded in that time
	abortAfter     = 1350 * time.Millisecond // after the deadline, connections are closed while their handlers run
	abandonAfter   = 150 * time.Millisecond  // after that, the server stops without handlers that ignore their context
	orphanTimeout  = 10 * time.Second        // for the kernel to deliver unsent data of a closed connection
	messageTimeout = 1 * time.Second         // for the kernel to accept the messages of Notify
)

// withDefaults returns o with its zero values replaced by their defaults, or an error that names each invalid option.
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
	for name, r := range map[string]Rate{
		"MaxConnRate": o.Limits.MaxConnRate, "MaxConnRateTotal": o.Limits.MaxConnRateTotal,
	} {
		if err := r.check(); err != nil {
			errs = append(errs, fmt.Errorf("option Limits.%s: %w", name, err))
		}
	}
	if err := o.Access.check(); err != nil {
		errs = append(errs, err)
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
		o.Notifier = silentNotifier{}
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

// spareFiles is how many of the ReservedFiles are for rejected connections and for those that a drain accepts.
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
