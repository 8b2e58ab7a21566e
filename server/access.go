package server

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/time/rate"
)

// Access says which addresses may connect. Clients without an IP address, such as those of Unix sockets, always may.
type Access struct {
	// Allow and Deny are ranges of addresses. If Allow is not empty, addresses outside of all ranges are denied. If an
	// address is in several ranges, the smallest range decides. If the same range is in both, Deny decides.
	Allow, Deny []netip.Prefix
}

// maxRanges bounds the length of Allow and of Deny, because every new connection is compared with all ranges.
const maxRanges = 1000

// allows reports whether addr may connect.
func (a Access) allows(addr netip.Addr) bool {
	allowed, denied := longestPrefix(a.Allow, addr), longestPrefix(a.Deny, addr)
	return denied < 0 && len(a.Allow) == 0 || allowed > denied
}

// longestPrefix returns the length of the longest prefix that contains addr, or -1 if none does.
func longestPrefix(ranges []netip.Prefix, addr netip.Addr) int {
	bits := -1
	for _, r := range ranges {
		if r.Bits() > bits && r.Contains(addr) {
			bits = r.Bits()
		}
	}
	return bits
}

func (a Access) check() error {
	var errs []error
	for name, ranges := range map[string][]netip.Prefix{"Allow": a.Allow, "Deny": a.Deny} {
		if len(ranges) > maxRanges {
			errs = append(errs, fmt.Errorf("option Access.%s: %d ranges: at most %d are allowed",
				name, len(ranges), maxRanges))
		}
		for _, r := range ranges {
			if !r.IsValid() || r.Addr().Is4In6() {
				errs = append(errs, fmt.Errorf("option Access.%s: %s is not a range of addresses", name, r))
			}
		}
	}
	return errors.Join(errs...)
}

// ParseRange parses an address, such as 10.1.2.3, or a range of addresses, such as 10.0.0.0/8. An IPv4-mapped one
// becomes that of IPv4.
func ParseRange(text string) (netip.Prefix, error) {
	prefix, err := parseRange(text)
	if err != nil {
		return prefix, fmt.Errorf("%q: want an address or a range such as 10.0.0.0/8: %w", text, err)
	}
	return prefix.Masked(), nil
}

var errNoRange = errors.New("it is neither")

func parseRange(text string) (netip.Prefix, error) {
	addr, err := netip.ParseAddr(text)
	switch {
	case err == nil && addr.Zone() != "":
		return netip.Prefix{}, errors.New("it has a zone")
	case err == nil:
		return netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()), nil
	case !strings.Contains(text, "/"):
		return netip.Prefix{}, errNoRange
	}
	prefix, err := netip.ParsePrefix(text)
	const mapped = 96 // bits before the IPv4 address in an IPv4-mapped one
	switch {
	case err != nil:
		return netip.Prefix{}, errNoRange
	case !prefix.Addr().Is4In6():
		return prefix, nil
	case prefix.Bits() < mapped:
		return netip.Prefix{}, errors.New("it covers more than the IPv4-mapped addresses")
	default:
		return netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-mapped), nil
	}
}

// Rate is how many new connections are admitted in a time. N may come at once; then places become free at an even
// pace. The zero Rate is unlimited.
type Rate struct {
	N   int
	Per time.Duration
}

var rateUnits = map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}

// ParseRate parses a rate such as 20/s, 100/m or 5/h. A number alone is per second, and 0 is unlimited.
func ParseRate(text string) (Rate, error) {
	number, unit, ok := strings.Cut(text, "/")
	n, err := strconv.Atoi(number)
	per := time.Second
	if ok {
		per = rateUnits[unit]
	}
	if err != nil || n < 0 || per == 0 {
		return Rate{}, fmt.Errorf("%q: want a rate such as 20/s, 100/m or 5/h, or 0", text)
	}
	if n == 0 {
		return Rate{}, nil
	}
	return Rate{N: n, Per: per}, nil
}

// String returns the rate in the form of ParseRate, if it has one.
func (r Rate) String() string {
	if r == (Rate{}) {
		return "0"
	}
	for unit, per := range rateUnits {
		if per == r.Per {
			return fmt.Sprintf("%d/%s", r.N, unit)
		}
	}
	return fmt.Sprintf("%d/%s", r.N, r.Per)
}

func (r Rate) check() error {
	if r != (Rate{}) && (r.N <= 0 || r.Per <= 0) {
		return fmt.Errorf("%d in %s is not a rate", r.N, r.Per)
	}
	return nil
}

func (r Rate) limiter() *rate.Limiter {
	if r == (Rate{}) {
		return rate.NewLimiter(rate.Inf, 0)
	}
	return rate.NewLimiter(rate.Limit(float64(r.N)/r.Per.Seconds()), r.N)
}

// rateLimits counts new connections for Limits.MaxConnRate and MaxConnRateTotal.
type rateLimits struct {
	perAddress Rate
	total      *rate.Limiter
	clients    lockedValue[clientLimiters]
}

// clientLimiters holds the limiters of recent clients in two generations. When the newer generation is full, the
// older one is dropped. So the memory is bounded, and the limiter of a client that keeps connecting is kept.
type clientLimiters struct{ newer, older map[netip.Addr]*rate.Limiter }

// maxLimiters is the number of addresses in a generation.
const maxLimiters = 8192

func newRateLimits(l Limits) *rateLimits {
	return &rateLimits{perAddress: l.MaxConnRate, total: l.MaxConnRateTotal.limiter()}
}

// allowsClient takes a place for a client, and reports whether there was one.
func (r *rateLimits) allowsClient(client netip.Addr, now time.Time) (ok bool) {
	if r.perAddress == (Rate{}) {
		return true
	}
	r.clients.With(func(c *clientLimiters) {
		limiter := c.newer[client]
		if limiter == nil {
			if limiter = c.older[client]; limiter == nil {
				limiter = r.perAddress.limiter()
			}
			if c.newer == nil || len(c.newer) >= maxLimiters {
				c.newer, c.older = make(map[netip.Addr]*rate.Limiter), c.newer
			}
			c.newer[client] = limiter
		}
		ok = limiter.AllowN(now, 1)
	})
	return ok
}

// untilNext returns the time until the total rate allows a connection.
func (r *rateLimits) untilNext(now time.Time) time.Duration {
	missing := 1 - r.total.TokensAt(now)
	if missing <= 0 || r.total.Limit() == rate.Inf {
		return 0
	}
	return time.Duration(missing / float64(r.total.Limit()) * float64(time.Second))
}

// reachedRates lists the rates that keep new clients out.
func (l *activeSettings) reachedRates(now time.Time) (reached []ReachedLimit) {
	if l.rates == nil { // of a zero Server
		return nil
	}
	if n := l.rates.clientsAtRate(now); n > 0 {
		reached = append(reached, ReachedLimit{
			Setting: "max-conn-rate", Value: l.limits.MaxConnRate.String(), Clients: n, Rejects: true,
		})
	}
	if l.rates.untilNext(now) > 0 {
		reached = append(reached, ReachedLimit{
			Setting: "max-conn-rate-total", Value: l.limits.MaxConnRateTotal.String(), Rejects: l.limits.AtLimit == LimitReject,
		})
	}
	return reached
}

// clientsAtRate counts the clients whose next connection would be rejected.
func (r *rateLimits) clientsAtRate(now time.Time) (n int) {
	r.clients.With(func(c *clientLimiters) {
		for client, limiter := range c.newer {
			if limiter.TokensAt(now) < 1 {
				n++
			}
			delete(c.older, client) // or it counts twice
		}
		for _, limiter := range c.older {
			if limiter.TokensAt(now) < 1 {
				n++
			}
		}
	})
	return n
}

// checkAccess checks whether c's address may connect, and counts it for the rates. It returns the reason if c is
// refused, and otherwise 0. It is called once for each connection, when the client's address is known.
//
// With LimitQueue the total rate rejects no connection, because the accept loop waits for it.
func (s *Server) checkAccess(c *Conn) Reason {
	set := s.activeSettings()
	now := time.Now()
	if addr := addrOf(c.RemoteAddr()).WithZone(""); addr.IsValid() {
		switch {
		case !set.access.allows(addr):
			return ReasonRejectedDenied
		case !set.rates.allowsClient(set.limits.clientAddr(addr), now):
			return ReasonRejectedRate
		}
	}
	if set.limits.AtLimit == LimitQueue {
		set.rates.total.ReserveN(now, 1)
		return 0
	}
	if !set.rates.total.AllowN(now, 1) {
		return ReasonRejectedRate
	}
	return 0
}

// clientAddr returns the address that identifies a client. For an IPv6 address that is its prefix.
func (l *Limits) clientAddr(addr netip.Addr) netip.Addr {
	if !addr.Is4() {
		if prefix, err := addr.Prefix(l.IPv6Prefix); err == nil {
			return prefix.Addr()
		}
	}
	return addr
}
