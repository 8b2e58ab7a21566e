package server

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func ranges(texts ...string) (all []netip.Prefix) {
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

func TestAccessAllows(t *testing.T) {
	for _, tt := range []struct {
		allow, deny []netip.Prefix
		yes, no     []string
	}{
		{yes: []string{"192.0.2.1", "2001:db8::1"}},
		{deny: ranges("192.0.2.0/24"), yes: []string{"192.0.3.1", "2001:db8::1"}, no: []string{"192.0.2.1"}},
		{allow: ranges("192.0.2.0/24"), yes: []string{"192.0.2.1"}, no: []string{"192.0.3.1", "2001:db8::1"}},
		{
			allow: ranges("10.0.0.0/8"), deny: ranges("10.1.0.0/16"),
			yes: []string{"10.2.0.1"}, no: []string{"10.1.0.1", "192.0.2.1"},
		},
		{
			allow: ranges("0.0.0.0/0", "10.1.2.3/32"), deny: ranges("10.0.0.0/8"),
			yes: []string{"192.0.2.1", "10.1.2.3"}, no: []string{"10.1.2.4", "2001:db8::1"},
		},
		{allow: ranges("10.0.0.0/8"), deny: ranges("10.0.0.0/8"), no: []string{"10.0.0.1"}},
		{allow: ranges("2001:db8::/32"), yes: []string{"2001:db8::1"}, no: []string{"10.0.0.1"}},
	} {
		access := Access{Allow: tt.allow, Deny: tt.deny}
		for _, addr := range tt.yes {
			if !access.allows(netip.MustParseAddr(addr)) {
				t.Errorf("allow %v, deny %v: %s is denied", tt.allow, tt.deny, addr)
			}
		}
		for _, addr := range tt.no {
			if access.allows(netip.MustParseAddr(addr)) {
				t.Errorf("allow %v, deny %v: %s is allowed", tt.allow, tt.deny, addr)
			}
		}
	}
}

func TestParseRate(t *testing.T) {
	for text, want := range map[string]Rate{
		"20": {20, time.Second}, "20/s": {20, time.Second}, "1/m": {1, time.Minute}, "5/h": {5, time.Hour}, "0": {}, "0/m": {},
	} {
		got, err := ParseRate(text)
		if err != nil || got != want {
			t.Errorf("%q is %v, %v, want %v", text, got, err, want)
		}
		if again, err := ParseRate(got.String()); err != nil || again != want {
			t.Errorf("%q formatted and parsed again is %v, %v", text, again, err)
		}
	}
	for _, text := range []string{"", "x", "-1", "1/d", "1/", "/s", "1.5/s", "1/s/s"} {
		if got, err := ParseRate(text); err == nil {
			t.Errorf("%q is %v", text, got)
		}
	}
}

func TestAccess(t *testing.T) {
	t.Run("a denied client gets no notice and is counted", inBubble(Echo, Options{Access: Access{Deny: ranges("192.0.2.0/24")}}, func(t *testing.T, r *rig) {
		r.dialFrom(t, "192.0.2.1").ends(t, "")
		r.dialFrom(t, "::ffff:192.0.2.1").ends(t, "") // the same address, mapped into IPv6
		r.dialFrom(t, "192.0.3.1").echoes(t, "x\n")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedDenied: 2})
	}))

	t.Run("it changes at runtime for new clients only", inBubble(Echo, Options{}, func(t *testing.T, r *rig) {
		before := r.dialFrom(t, "192.0.2.1")
		set(t, r.Server, "allow=198.51.100.0/24, 2001:db8::/32")
		before.echoes(t, "x\n")
		r.dialFrom(t, "192.0.2.1").ends(t, "")
		r.dialFrom(t, "2001:db8::9").echoes(t, "x\n")
		set(t, r.Server, "allow=")
		r.dialFrom(t, "192.0.2.1").echoes(t, "x\n")
	}))

	t.Run("it applies during a pause and a drain", inBubble(Echo, Options{Access: Access{Deny: ranges("192.0.2.0/24")}}, func(t *testing.T, r *rig) {
		r.pause(t, PauseOptions{Mode: PauseReject})
		r.dialFrom(t, "192.0.2.1").ends(t, "")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedDenied: 1})
	}))

	t.Run("the address that WrapConn tells decides, before TLS", bubbled(func(t *testing.T) {
		asClient := func(_ context.Context, nc net.Conn) (net.Conn, error) {
			return WithRemoteAddr(nc, fakeAddr("203.0.113.1", 1)), nil
		}
		r := newRig(t, Echo, Options{WrapConn: asClient, Access: Access{Allow: ranges("203.0.113.0/24")}})
		r.dialFrom(t, "192.0.2.1").echoes(t, "x\n")
		set(t, r.Server, "allow=192.0.2.0/24")
		r.dialFrom(t, "192.0.2.1").ends(t, "")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedDenied: 1})
	}))

	t.Run("a TLS client is rejected before its handshake, and gets no plain text", bubbled(func(t *testing.T) {
		ln := newFakeListener()
		s, _ := newServer(t, Echo, Options{Limits: Limits{MaxConnRate: Rate{1, time.Hour}}})
		forServer, _ := tlsConfigs(t)
		serveListener(t, s, Listener{Listener: ln, TLSConfig: forServer})
		r := &rig{Server: s, ln: ln}
		r.dialFrom(t, "192.0.2.1")
		r.dialFrom(t, "192.0.2.1").ends(t, "")
		wantClosed(t, s, map[Reason]uint64{ReasonRejectedRate: 1})
	}))
}

func TestReachedLimits(t *testing.T) {
	limits := Limits{MaxConns: 4, MaxConnsPerIP: 2, MaxConnRate: Rate{3, time.Hour}, MaxConnRateTotal: Rate{5, time.Hour}}
	inBubble(Echo, Options{Limits: limits}, func(t *testing.T, r *rig) {
		reached := func(want ...ReachedLimit) {
			t.Helper()
			synctest.Wait()
			if got := r.Status().ReachedLimits; !slices.Equal(got, want) {
				t.Errorf("the limits %+v are reached, want %+v", got, want)
			}
		}
		perIP := ReachedLimit{Setting: "max-conns-per-ip", Value: "2", Clients: 1, Rejects: true}
		rate := ReachedLimit{Setting: "max-conn-rate", Value: "3/h", Clients: 1, Rejects: true}
		total := ReachedLimit{Setting: "max-conn-rate-total", Value: "5/h"}
		r.dialFrom(t, "198.51.100.1")
		reached()
		r.dialFrom(t, "198.51.100.1")
		reached(perIP)
		r.dialFrom(t, "198.51.100.1").ends(t, "BUSY\n")
		reached(perIP, rate)
		r.dialFrom(t, "198.51.100.2")
		last := r.dialFrom(t, "198.51.100.2")
		perIP.Clients = 2
		reached(ReachedLimit{Setting: "max-conns", Value: "4"}, perIP, rate, total)
		last.leave(t)
		perIP.Clients = 1
		reached(perIP, rate, total)
		pass(time.Hour)
		reached(perIP)
	})(t)

	t.Run("a client in both generations counts once", func(t *testing.T) {
		r := newRateLimits(Limits{MaxConnRate: Rate{1, time.Hour}})
		now := time.Now()
		first := netip.MustParseAddr("10.0.0.1")
		for i, addr := 0, first; i <= maxLimiters; i, addr = i+1, addr.Next() {
			r.allowsClient(addr, now)
		}
		r.allowsClient(first, now) // moves it from the older to the newer generation
		wantEqual(t, "clients at the rate", r.clientsAtRate(now), maxLimiters+1)
	})
}

func TestMaxConnRate(t *testing.T) {
	perAddress := Options{Limits: Limits{MaxConnRate: Rate{2, time.Minute}}}
	t.Run("more connections of one address are told BUSY until a place is free", inBubble(Echo, perAddress, func(t *testing.T, r *rig) {
		for range 2 {
			r.dialFrom(t, "192.0.2.1").leave(t)
		}
		r.dialFrom(t, "192.0.2.1").ends(t, "BUSY\n")
		r.dialFrom(t, "192.0.2.2").echoes(t, "x\n")
		wantEqual(t, "rejected by rate", r.Status().Closed[ReasonRejectedRate], uint64(1))
		pass(31 * time.Second)
		r.dialFrom(t, "192.0.2.1").echoes(t, "x\n")
		r.dialFrom(t, "192.0.2.1").ends(t, "BUSY\n")
	}))

	t.Run("IPv6 clients count by their prefix", inBubble(Echo, perAddress, func(t *testing.T, r *rig) {
		for i := range 2 {
			r.dialFrom(t, fmt.Sprintf("2001:db8::%d", i)).echoes(t, "x\n")
		}
		r.dialFrom(t, "2001:db8::ffff").ends(t, "BUSY\n")
	}))

	t.Run("addresses are dropped, the least active first", func(t *testing.T) {
		rates := newRateLimits(Limits{MaxConnRate: Rate{1, time.Hour}})
		now := time.Now()
		regular := netip.MustParseAddr("192.0.2.1")
		if !rates.allowsClient(regular, now) {
			t.Fatal("the first connection is rejected")
		}
		addr := netip.MustParseAddr("10.0.0.0")
		for range 10 * maxLimiters {
			addr = addr.Next()
			rates.allowsClient(addr, now)
			if rates.allowsClient(regular, now) {
				t.Fatal("an address that keeps coming was forgotten")
			}
		}
		rates.clients.With(func(c *clientLimiters) {
			if kept := len(c.newer) + len(c.older); kept > 2*maxLimiters {
				t.Errorf("%d addresses are kept, want at most %d", kept, 2*maxLimiters)
			}
		})
	})

	total := Options{Limits: Limits{MaxConnRateTotal: Rate{2, time.Minute}}}
	t.Run("over the rate in total clients wait in the accept queue", inBubble(Echo, total, func(t *testing.T, r *rig) {
		for range 5 {
			r.dial(t)
		}
		wantState(t, r.Server, StateRunning, 2)
		wantEqual(t, "accept queue", r.ln.queued(), 3)
		pass(31 * time.Second)
		wantState(t, r.Server, StateRunning, 3)
		set(t, r.Server, "max-conn-rate-total=0")
		pass(0)
		wantState(t, r.Server, StateRunning, 5)
	}))

	t.Run("a pause, a probe and a drain do not wait for it", inBubble(Echo, total, func(t *testing.T, r *rig) {
		for range 5 {
			r.dial(t)
		}
		if err := r.Probe(t.Context()); err != nil {
			t.Errorf("Probe: %v", err)
		}
		r.pause(t, PauseOptions{}).Release()
		r.drain(time.Minute, "x")
		wantState(t, r.Server, StateDraining, 5)
		wantClosed(t, r.Server, map[Reason]uint64{})
	}))

	rejecting := total
	rejecting.Limits.AtLimit = LimitReject
	t.Run("with LimitReject they are told BUSY", inBubble(Echo, rejecting, func(t *testing.T, r *rig) {
		r.dial(t)
		r.dial(t)
		r.dial(t).ends(t, "BUSY\n")
		wantClosed(t, r.Server, map[Reason]uint64{ReasonRejectedRate: 1})
	}))
}
