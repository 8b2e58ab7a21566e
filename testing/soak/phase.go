package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"
)

// A phase is a soak of one build of the program.
type phase struct {
	*server
	settings   settings
	name       string
	seed       uint64
	rng        *rand.Rand // the operator's
	transports []transport
	proxies    []*toxiproxy.Proxy
	watch      *watcher

	leaving atomic.Pointer[chan struct{}] // closed while all clients are to leave
	began   time.Time
	took    time.Duration

	mu          sync.Mutex
	faults      map[string]int // by kind
	disruptions []disruption
	outcomes    map[outcomeKind]int64
	byTransport map[string]int64
	cuts        []outcome
	bytes       int64
	refused     int64
	kills       int // connections that the operator has killed
	explained   int // clients that a disruption cut off
	cutByKill   int // of these, by a kill
	cutLate     int // of these, at the deadline of a drain, after this process got no CPU time
	halts       []halt
	lost        int // without
	violation   []string
	unlisted    int // violations beyond those that are listed
}

// A disruption is a time in which clients may be refused or cut off.
type disruption struct {
	from, until time.Time // until is zero while it lasts
	why         string
	cuts        bool // clients that are connected may be cut off
	drain       bool // it is a drain with the full grace period
	kills       int  // only so many
}

func newPhase(s settings, name, program string, seed uint64) (*phase, error) {
	srv, err := newServer(program, s.out, s.files)
	if err != nil {
		return nil, err
	}
	p := &phase{
		server: srv, settings: s, name: name, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)),
		faults: make(map[string]int), outcomes: make(map[outcomeKind]int64), byTransport: make(map[string]int64),
	}
	p.watch = newWatcher(p)
	p.admitClients()
	return p, nil
}

// connectTimeout limits a connect. While the server is at its connection limit, a connect waits.
const connectTimeout = busyTimeout

func (p *phase) makeTransports() error {
	dial := func(network, address string) func() (net.Conn, error) {
		return func() (net.Conn, error) { return net.DialTimeout(network, address, connectTimeout) }
	}
	p.transports = []transport{
		{name: "tcp", dial: dial("tcp", p.tcp)},
		{name: "unix", dial: dial("unix", p.unix)},
		{name: "tls", dial: func() (net.Conn, error) { return dialTLS(p.tls, p.clientTLS) }},
	}
	api := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	for name, toxics := range map[string][]string{
		"slow network": {
			`{"type":"latency","stream":"downstream","attributes":{"latency":40,"jitter":20}}`,
			`{"type":"latency","stream":"upstream","attributes":{"latency":40}}`,
		},
		"thin network":      {`{"type":"bandwidth","stream":"downstream","attributes":{"rate":200}}`},
		"chopping network":  {`{"type":"slicer","stream":"upstream","attributes":{"average_size":64,"size_variation":32,"delay":100}}`},
		"resetting network": {`{"type":"reset_peer","stream":"upstream","attributes":{"timeout":1500}}`},
		"silent network":    {`{"type":"timeout","stream":"downstream","attributes":{"timeout":2000}}`},
		"cutting network":   {`{"type":"limit_data","stream":"downstream","attributes":{"bytes":20000}}`},
	} {
		proxy := toxiproxy.NewProxy(api, name, "127.0.0.1:0", p.tcp)
		if err := proxy.Start(); err != nil {
			return fmt.Errorf("starting a proxy: %w", err)
		}
		p.proxies = append(p.proxies, proxy)
		for _, toxic := range toxics {
			if _, err := proxy.Toxics.AddToxicJson(strings.NewReader(toxic)); err != nil {
				return fmt.Errorf("toxic %s: %w", toxic, err)
			}
		}
		p.transports = append(p.transports, transport{
			name: name, dial: dial("tcp", proxy.Listen), proxied: true, slow: name == "chopping network",
		})
	}
	return nil
}

// breaks reports whether a transport breaks connections. Of its clients only corrupted bytes are a violation.
func (t transport) breaks() bool {
	switch t.name {
	case "resetting network", "silent network", "cutting network":
		return true
	}
	return false
}

// run runs the phase for d.
func (p *phase) run(ctx context.Context, d time.Duration) {
	p.began = time.Now()
	defer func() { p.took = time.Since(p.began) }()
	defer p.server.close()
	if err := errors.Join(p.makeTransports(), p.start()); err != nil {
		p.violate("%v", err)
		return
	}
	ctx, stop := context.WithTimeout(ctx, d)
	defer stop()
	var tasks, watching sync.WaitGroup
	watchCtx, stopWatching := context.WithCancel(context.Background())
	watching.Go(func() { p.watch.run(watchCtx) })
	watching.Go(func() { p.watch.followEvents(watchCtx) })
	watching.Go(func() { p.recordHalts(watchCtx) })
	p.watch.checkIdle(ctx) // the first figures, of a server without clients
	for i := range p.settings.clients {
		tasks.Go(func() { p.client(ctx, uint64(i)) })
	}
	for i := range p.settings.rude {
		tasks.Go(func() { p.rudeClient(ctx, uint64(i)) })
	}
	tasks.Go(func() { p.rudeCaller(ctx) })
	p.operate(ctx, d)
	stop()
	p.disconnectClients()
	tasks.Wait()
	p.finish()
	stopWatching()
	watching.Wait()
	for _, proxy := range p.proxies {
		proxy.Stop()
	}
}

// finish drains the server, which has no clients any more.
func (p *phase) finish() {
	p.watch.checkIdle(context.Background())
	p.watch.expectNoMoreEvents.Store(true)
	done := p.disrupt("the last drain", true)
	_ = p.signal(15)
	code, err := p.wait(grace + 30*time.Second)
	done()
	if err != nil || code != 0 {
		p.violate("the last drain: exit code %d, %v", code, err)
	}
	if left := p.processes(); len(left) > 0 {
		p.violate("%d processes are left after the end", len(left))
	}
	p.checkLog()
	p.checkCuts()
}

// disconnectClients tells the clients to leave, and admitClients lets new ones connect.
func (p *phase) disconnectClients() { close(*p.leaving.Load()) }

func (p *phase) admitClients() { p.leaving.Store(new(make(chan struct{}))) }

// client runs one session after another.
func (p *phase) client(ctx context.Context, n uint64) {
	rng := rand.New(rand.NewPCG(p.seed, 100+n))
	for ctx.Err() == nil {
		leave := *p.leaving.Load()
		select {
		case <-leave:
			pause(ctx, 50*time.Millisecond)
			continue
		default:
		}
		tr := p.transports[rng.IntN(len(p.transports))]
		began := time.Now()
		nc, err := tr.dial()
		if err != nil {
			p.connectFailed(tr, began, err)
			pause(ctx, time.Duration(100+rng.IntN(400))*time.Millisecond)
			continue
		}
		s := newSession(nc, tr, rng)
		o := s.run(rng, leave)
		p.count(s, o)
		wait := 50
		if o.kind == refused {
			wait = 500
		}
		pause(ctx, time.Duration(rng.IntN(wait))*time.Millisecond)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (p *phase) connectFailed(tr transport, began time.Time, err error) {
	p.mu.Lock()
	p.refused++
	p.mu.Unlock()
	if !tr.proxied {
		p.checkLater(outcome{
			kind: cut, connecting: true, at: time.Now(),
			detail: fmt.Sprintf("%s: cannot connect: %v, after %s", tr.name, err, time.Since(began).Round(time.Millisecond)),
		})
	}
}

func (p *phase) count(s *session, o outcome) {
	p.mu.Lock()
	p.outcomes[o.kind]++
	p.byTransport[s.from.name]++
	p.bytes += s.got.Load()
	p.mu.Unlock()
	switch {
	case o.kind == corrupted:
		p.violate("%s", o.detail)
	case o.kind == refused || o.kind == cut || o.kind == stuck:
		if !s.from.breaks() {
			p.checkLater(o)
		}
	}
}

// checkLater keeps an outcome until it is known which disruptions there were at that time.
func (p *phase) checkLater(o outcome) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cuts = append(p.cuts, o)
}

// disrupt begins a disruption: clients may be refused and, if cuts is true, cut off. The caller ends it.
func (p *phase) disrupt(why string, cuts bool) (end func()) {
	return p.begin(disruption{why: why, cuts: cuts})
}

// begin begins d. The caller ends it.
func (p *phase) begin(d disruption) (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := len(p.disruptions)
	d.from = time.Now()
	p.disruptions = append(p.disruptions, d)
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.disruptions[i].until = time.Now()
	}
}

// expectKilled records that an operator kills n clients now.
func (p *phase) expectKilled(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.kills += n
	now := time.Now()
	p.disruptions = append(p.disruptions, disruption{from: now.Add(-time.Second), until: now.Add(time.Second), why: "kill", cuts: true, kills: n})
}

// slack is how long after a fault a client may notice it.
const slack = 5 * time.Second

// A halt is a time in which this process got no CPU time: the machine was suspended, or far too busy.
type halt struct{ from, until time.Time }

// Bounds of halts.
const (
	heartbeat    = 50 * time.Millisecond
	shortestHalt = 500 * time.Millisecond // longer than a busy scheduler delays a goroutine
	longHalt     = time.Second            // in a drain, after which a client may miss its deadline
)

// recordHalts records when this process got no CPU time, until ctx ends.
func (p *phase) recordHalts(ctx context.Context) {
	for last := time.Now(); ctx.Err() == nil; {
		pause(ctx, heartbeat)
		now := time.Now()
		if now.Sub(last) > shortestHalt {
			p.mu.Lock()
			p.halts = append(p.halts, halt{last, now})
			p.mu.Unlock()
		}
		last = now
	}
}

// halted returns how long the halts were in a period. p.mu is held, or the phase has ended.
func (p *phase) halted(from, until time.Time) (total time.Duration) {
	for _, h := range p.halts {
		begin, end := h.from, h.until
		if begin.Before(from) {
			begin = from
		}
		if end.After(until) {
			end = until
		}
		total += max(0, end.Sub(begin))
	}
	return total
}

// missedDeadline reports whether a client was cut off at the deadline of a drain, and could not use its grace period
// because this process, with all clients, got no CPU time. The server closes by the clock. G5 promises the bytes to
// clients that read within the grace period.
func (p *phase) missedDeadline(o outcome, d *disruption) bool {
	return d.drain && !o.connecting && !o.at.Before(d.from.Add(grace)) && p.halted(d.from, o.at) >= longHalt
}

// checkCuts reports clients that were cut off or refused while no disruption allowed it.
func (p *phase) checkCuts() {
	p.mu.Lock()
	cuts, disruptions := p.cuts, p.disruptions
	p.mu.Unlock()
	for _, o := range cuts {
		explained := false
		for i := range disruptions {
			e := &disruptions[i]
			if o.at.Before(e.from) || !e.until.IsZero() && o.at.After(e.until.Add(slack)) {
				continue
			}
			if p.missedDeadline(o, e) {
				p.cutLate++
				log.Printf("cut off at the deadline, after a halt: %s", o.detail)
				explained = true
				break
			}
			if !e.cuts && !o.connecting {
				continue
			}
			if e.why == "kill" {
				if o.connecting || e.kills == 0 {
					continue
				}
				e.kills--
				p.cutByKill++
			}
			explained = true
			break
		}
		if explained {
			p.explained++
			continue
		}
		p.lost++
		p.violate("without a reason: %s, at %s", o.detail, o.at.Format(time.StampMilli))
	}
}

const maxViolations = 50

func (p *phase) violate(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.violation) >= maxViolations {
		p.unlisted++
		return
	}
	log.Printf("VIOLATION: %s", text)
	p.violation = append(p.violation, text)
}

// rudeClient floods, resets, stays silent, or sends garbage.
func (p *phase) rudeClient(ctx context.Context, n uint64) {
	rng := rand.New(rand.NewPCG(p.seed, 10_000+n))
	for ctx.Err() == nil {
		select {
		case <-*p.leaving.Load():
			pause(ctx, 50*time.Millisecond)
			continue
		default:
		}
		address := p.tcp
		if rng.IntN(3) == 0 {
			address = p.tls
		}
		nc, err := net.DialTimeout("tcp", address, time.Second)
		if err != nil {
			pause(ctx, 200*time.Millisecond)
			continue
		}
		_ = nc.SetDeadline(time.Now().Add(time.Duration(rng.IntN(4000)) * time.Millisecond))
		what := rng.IntN(5)
		p.countFault([]string{"flood, read nothing", "reset", "silent", "TLS garbage", "half a message, then reset"}[what])
		switch what {
		case 0:
			block := make([]byte, 64<<10)
			for err == nil {
				_, err = nc.Write(block)
			}
		case 1:
			_, _ = nc.Write(pattern[:1000])
			_ = nc.(*net.TCPConn).SetLinger(0)
		case 2:
			_, _ = nc.Read(make([]byte, 1))
		case 3:
			hello := tls.Client(nc, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
			_ = hello.Handshake()
			_, _ = nc.Write(pattern[:300])
		default:
			_, _ = nc.Write(pattern[:1+rng.IntN(100_000)])
			_, _ = nc.Read(make([]byte, 100))
			_ = nc.(*net.TCPConn).SetLinger(0)
		}
		_ = nc.Close()
	}
}

// rudeCaller sends broken or slow requests to the control socket and the HTTP listener.
func (p *phase) rudeCaller(ctx context.Context) {
	rng := rand.New(rand.NewPCG(p.seed, 20_000))
	for ctx.Err() == nil {
		pause(ctx, time.Duration(100+rng.IntN(400))*time.Millisecond)
		network, address := "unix", p.socket
		if rng.IntN(2) == 0 {
			network, address = "tcp", p.http
		}
		nc, err := net.DialTimeout(network, address, time.Second)
		if err != nil {
			continue
		}
		_ = nc.SetDeadline(time.Now().Add(300 * time.Millisecond))
		_, _ = nc.Write([]byte([]string{
			"GET /v1/status HTTP/1.1\r\nHost: x\r\n", "POST /v1/pause HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n{",
			"DELETE /v1/conns?all=yes HTTP/1.1\r\nHost: x\r\n\r\n", "\x00\x01\x02", "GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n",
		}[rng.IntN(5)]))
		_, _ = nc.Read(make([]byte, 100))
		_ = nc.Close()
		p.countFault("rude caller")
	}
}

// countFault counts a fault.
func (p *phase) countFault(kind string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults[kind]++
}
