package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"echod/client"
	"echod/control"
	"echod/internal/text"
)

func newPingCommand() *cobra.Command {
	p := pinger{interval: secondsFlag(time.Second), timeout: secondsFlag(5 * time.Second)}
	cmd := &cobra.Command{
		Use:   "ping [HOST:PORT]",
		Short: "Connect, send a message and wait for its echo",
		Long: `Connect, send a message and wait for its echo, and say how long each step took.

Each ping resolves the name and makes a connection of its own, as a new client would.
Over TLS, tls= is the part of connect= that the handshake took. A server that is paused,
full or shutting down says so, and the ping fails with that reason. A server that is
paused without saying so accepts no connections: the ping connects, and no echo comes.
Ctrl-C ends the pings, with a summary.

If a ping fails, the control socket of the server says why: who paused it, and until when.
That is the socket of --control, or one that 'echod ctl' would find, if its server listens
on the address. The control socket of another machine cannot be asked.

--json prints an object for each ping, and one for the summary. "result" is one of ok,
dns, refused, reset, timeout, no-echo, paused, busy, shutdown, closed, wrong-echo, error.
If the control socket was asked, "server_state" is its answer.

Exit status, as of ping(8): 0 if at least one echo came back, 1 if none did, 2 for usage
errors or if the name could not be resolved, 128 plus the signal's number if a signal
came before the first ping was done.`,
		Example: `  echod ping
  echod ping -c 5 -i 0.2 -W 1 echo.example:9999
  echod ping --quiet                in a health check, for its exit status
  echod ping -c 0 --json | jq .     until Ctrl-C`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			p.out, p.err = cmd.OutOrStdout(), cmd.ErrOrStderr()
			if len(args) > 0 {
				p.address = args[0]
			}
			if err := p.check(); err != nil {
				return err
			}
			return p.runUntilSignal(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	f.StringVar(&p.address, "address", "127.0.0.1:9999",
		"`address` of the server, if HOST:PORT is not given: host:port,\ntls://host:port or unix:///path")
	f.IntVarP(&p.count, "count", "c", 1, "`number` of pings; 0 means until Ctrl-C")
	f.VarP(&p.interval, "interval", "i", "`time` from one ping to the next: seconds, or with a unit")
	f.VarP(&p.timeout, "timeout", "W", "`time` to wait for a ping: seconds, or with a unit")
	f.BoolVarP(&p.ipv4, "ipv4", "4", false, "use IPv4 only")
	f.BoolVarP(&p.ipv6, "ipv6", "6", false, "use IPv6 only")
	f.IntVarP(&p.size, "size", "s", 64, "`bytes` of the message, including its newline")
	p.tlsFlags.add(f)
	f.StringVar(&p.control, "control", "", "`path` of the server's control socket, to ask why a ping failed")
	f.BoolVar(&p.json, "json", false, "print JSON, one object per line")
	f.BoolVarP(&p.quiet, "quiet", "q", false, "print nothing; if no echo came back, the reason goes to stderr")
	cmd.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	return cmd
}

// A secondsFlag is a flag for a time. A number without a unit is in seconds, as in ping(8).
type secondsFlag time.Duration

func (s *secondsFlag) Set(text string) error {
	if n, err := strconv.ParseFloat(text, 64); err == nil && math.Abs(n) < 1e9 {
		*s = secondsFlag(n * float64(time.Second))
		return nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return errors.New("want a number of seconds, or a time such as 200ms")
	}
	*s = secondsFlag(d)
	return nil
}

func (s *secondsFlag) String() string { return time.Duration(*s).String() }
func (s *secondsFlag) Type() string   { return "time" }

// pinger is one run of echod ping.
type pinger struct {
	address, control  string
	tlsFlags          clientTLS
	count, size       int
	interval, timeout secondsFlag
	ipv4, ipv6        bool
	json, quiet       bool
	out, err          io.Writer

	tls     *tls.Config
	target  client.Address
	host    string // empty for a Unix socket
	port    string
	results []pingResult
}

// A pingResult is the outcome of a ping. Times are in seconds, and nil for steps that were not completed.
type pingResult struct {
	Type    string   `json:"type"` // ping
	Seq     int      `json:"seq"`
	Address string   `json:"address"`
	Remote  string   `json:"remote,omitempty"` // IP address and port
	Bytes   int      `json:"bytes"`
	Result  string   `json:"result"`
	Error   string   `json:"error,omitempty"`
	DNS     *float64 `json:"dns_seconds,omitempty"`     // nil for an IP address
	Connect *float64 `json:"connect_seconds,omitempty"` // with the TLS handshake
	TLS     *float64 `json:"tls_seconds,omitempty"`     // the handshake alone; nil without TLS
	Echo    *float64 `json:"echo_seconds,omitempty"`

	ServerState string `json:"server_state,omitempty"` // of a failed ping, according to the control socket

	err error
}

const pingOK = "ok"

func (p *pinger) check() error {
	var err error
	if p.address, err = p.tlsFlags.address(p.address); err != nil {
		return err
	}
	if p.target, err = client.ParseAddress(p.address); err != nil {
		return usageError{err}
	}
	if p.target.Network == "tcp" {
		if p.host, p.port, err = net.SplitHostPort(p.target.Addr); err != nil {
			return usageError{err}
		}
		if p.host == "" {
			p.host = "localhost"
		}
	}
	switch {
	case p.count < 0:
		return usagef("--count %d: must not be negative", p.count)
	case p.size < 1:
		return usagef("--size %d: must be at least 1", p.size)
	case p.interval < 0:
		return usagef("--interval %s: must not be negative", p.interval.String())
	case p.timeout <= 0:
		return usagef("--timeout %s: must be longer than 0", p.timeout.String())
	case p.ipv4 && p.ipv6:
		return usagef("-4 and -6: at most one of them")
	case (p.ipv4 || p.ipv6) && p.target.Network != "tcp":
		return usagef("-4 and -6: not for a Unix socket")
	}
	return nil
}

// runUntilSignal runs until all pings are done or a signal arrives. After a signal it
// prints the summary, too, and the pings so far decide the exit status.
func (p *pinger) runUntilSignal(ctx context.Context) error {
	var outcome error
	_ = interruptible(ctx, func(ctx context.Context) error {
		outcome = p.run(ctx)
		return nil
	})
	return outcome
}

func (p *pinger) run(ctx context.Context) error {
	if p.quiet {
		p.out = io.Discard
	}
	var err error
	if p.tls, err = p.tlsFlags.config(p.err); err != nil {
		return err
	}
	began := time.Now()
	ticker := time.NewTicker(max(time.Duration(p.interval), time.Nanosecond))
	defer ticker.Stop()
	for ctx.Err() == nil {
		r := p.ping(ctx, len(p.results)+1)
		if r.err != nil && ctx.Err() != nil {
			break // an interrupted ping does not count
		}
		if r.err != nil {
			p.askServer(ctx, &r)
		}
		p.results = append(p.results, r)
		if err := p.print(r); err != nil {
			return err
		}
		if len(p.results) == p.count {
			break
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
		}
	}
	if len(p.results) == 0 {
		return context.Cause(ctx)
	}
	if p.count != 1 || p.json {
		if err := p.summarize(time.Since(began)); err != nil {
			return err
		}
	}
	return p.result()
}

// result returns nil if at least one echo came back.
func (p *pinger) result() error {
	unresolved := 0
	for _, r := range p.results {
		switch r.Result {
		case pingOK:
			return nil
		case "dns":
			unresolved++
		}
	}
	exit := &exitError{code: exitFailed}
	if unresolved == len(p.results) {
		exit.code = exitUsage
	}
	if p.quiet || p.count == 1 && !p.json {
		exit.err = fmt.Errorf("ping %s: %w", p.address, p.results[len(p.results)-1].err)
	}
	return exit
}

// ping resolves the name, connects and waits for one echo.
func (p *pinger) ping(ctx context.Context, seq int) (r pingResult) {
	r = pingResult{Type: "ping", Seq: seq, Address: p.address, Bytes: p.size}
	limit := time.Duration(p.timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errPingTimeout)
	defer cancel()
	ctx, reject := context.WithCancelCause(ctx)
	defer reject(nil)
	fail := func(result, timeout string, err error) pingResult {
		if errors.Is(err, errPingTimeout) {
			r.Result, r.err = result, fmt.Errorf(timeout, limit)
		} else {
			err = pingError(err)
			r.Result, r.err = pingResultOf(err), err
		}
		r.Error = r.err.Error()
		return r
	}
	began := time.Now()
	hosts, err := p.resolve(ctx)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fail("dns", "name not resolved within %s", err)
	}
	if p.needsLookup() {
		r.DNS = new(time.Since(began).Seconds())
	}
	began = time.Now()
	dial := func(ctx context.Context, _ string) (net.Conn, error) { return p.dial(ctx, hosts, &r) }
	var told *client.NoticeError // a notice counts even if the server does not close the connection
	onNotice := func(n client.Notice) {
		if n.Ends() {
			told = &client.NoticeError{Notice: n}
			if n.Grace == 0 {
				reject(told)
			}
		}
	}
	c, err := client.Dial(ctx, p.address, client.Options{Dial: dial, OnNotice: onNotice})
	if err != nil {
		return fail("timeout", "no connection within %s", err)
	}
	defer c.Close()
	r.Connect = new(time.Since(began).Seconds())
	began = time.Now()
	if _, err = c.Echo(ctx, []byte(strings.Repeat("p", p.size-1)+"\n")); err != nil {
		if told != nil {
			err = told
		}
		return fail("no-echo", "connected, but no echo within %s", err)
	}
	r.Echo, r.Result = new(time.Since(began).Seconds()), pingOK
	return r
}

// askTime is how long a ping waits for the control socket.
const askTime = time.Second

// askServer asks the control socket why a ping failed, and adds that to the error.
func (p *pinger) askServer(ctx context.Context, r *pingResult) {
	ctx, cancel := context.WithTimeoutCause(ctx, askTime, errPingTimeout)
	defer cancel()
	var st *control.Status
	if p.control != "" {
		st = statusOf(ctx, p.control)
	} else {
		st = statusAt(ctx, p.dialled(ctx, *r))
	}
	why := ""
	switch {
	case st != nil:
		r.ServerState = st.State
		why = whyUnserved(*st, r.Result)
	case r.Result == "no-echo":
		why = "the server may be paused"
	}
	if why != "" {
		r.err = fmt.Errorf("%w: %s", r.err, why)
		r.Error = r.err.Error()
	}
}

// dialled returns the addresses that a ping has dialled.
func (p *pinger) dialled(ctx context.Context, r pingResult) (addresses []string) {
	switch {
	case p.host == "":
		return []string{p.target.Addr}
	case r.Remote != "":
		return []string{r.Remote}
	}
	hosts, err := p.resolve(ctx)
	if err != nil {
		return nil
	}
	for _, host := range hosts {
		addresses = append(addresses, net.JoinHostPort(host.Unmap().String(), p.port))
	}
	return addresses
}

// whyUnserved says why a server does not serve new clients, after a ping with this result. It is empty if the server
// does.
func whyUnserved(st control.Status, result string) string {
	var state string
	var words []string
	switch {
	case st.Drain != nil:
		state, words = "shutdown", []string{describeDrain(*st.Drain)}
	case len(st.Holds) > 0:
		state = "paused"
		for _, h := range st.Holds {
			words = append(words, "hold "+describeHold(h))
		}
	case len(st.LimitsReached) > 0:
		for _, l := range st.LimitsReached {
			words = append(words, l.String())
		}
	case result == "no-echo":
		words = []string{"the control socket says that the server is running"}
	}
	why := strings.Join(words, "; ")
	switch {
	case result == state: // the server has told the client
		return why
	case state == "paused":
		return "the server is paused: " + why
	case state == "shutdown":
		return "the server is draining: " + why
	default:
		return why
	}
}

// needsLookup reports whether the host is a name that has to be resolved.
func (p *pinger) needsLookup() bool {
	_, err := netip.ParseAddr(p.host)
	return p.host != "" && err != nil
}

// resolve returns the IP addresses of the host that may be used.
func (p *pinger) resolve(ctx context.Context) ([]netip.Addr, error) {
	if p.host == "" {
		return nil, nil
	}
	network := "ip"
	switch {
	case p.ipv4:
		network = "ip4"
	case p.ipv6:
		network = "ip6"
	}
	hosts, err := net.DefaultResolver.LookupNetIP(ctx, network, p.host)
	if err == nil && len(hosts) == 0 {
		err = &net.DNSError{Err: "no suitable address", Name: p.host, IsNotFound: true}
	}
	if a, ok := errors.AsType[*net.AddrError](err); ok { // an IP address of the other family
		err = &net.DNSError{Err: a.Err, Name: p.host, IsNotFound: true}
	}
	return hosts, err
}

// dial connects to the first address that answers. It stores the address and the time of
// the TLS handshake in r. The addresses share the time equally.
func (p *pinger) dial(ctx context.Context, hosts []netip.Addr, r *pingResult) (net.Conn, error) {
	if p.host == "" {
		return client.DialConn(ctx, p.address, nil)
	}
	var first error
	for i, host := range hosts {
		address := net.JoinHostPort(host.Unmap().String(), p.port)
		conn, err := p.dialOne(ctx, address, len(hosts)-i, r)
		if err == nil {
			r.Remote = address
			return conn, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// dialOne connects to one address, within its share of the time.
func (p *pinger) dialOne(ctx context.Context, address string, of int, r *pingResult) (net.Conn, error) {
	if deadline, ok := ctx.Deadline(); ok && of > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, time.Until(deadline)/time.Duration(of), errPingTimeout)
		defer cancel()
	}
	conn, err := client.DialConn(ctx, address, nil)
	if err != nil || !p.target.TLS {
		return conn, err
	}
	config := &tls.Config{}
	if p.tls != nil {
		config = p.tls.Clone()
	}
	config.ServerName = cmp.Or(config.ServerName, p.host)
	began := time.Now()
	session := tls.Client(conn, config)
	if err := session.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	r.TLS = new(time.Since(began).Seconds())
	return session, nil
}

var errPingTimeout = errors.New("timed out")

// pingResultOf classifies the error of a ping.
func pingResultOf(err error) string {
	if notice, ok := errors.AsType[*client.NoticeError](err); ok {
		switch notice.Notice.Kind {
		case client.NoticePaused:
			return "paused"
		case client.NoticeBusy:
			return "busy"
		default:
			return "shutdown"
		}
	}
	if _, ok := errors.AsType[*wrongEchoError](err); ok {
		return "wrong-echo"
	}
	if _, ok := errors.AsType[*net.DNSError](err); ok {
		return "dns"
	}
	switch timeout, _ := errors.AsType[net.Error](err); {
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case timeout != nil && timeout.Timeout():
		return "timeout"
	}
	if _, ok := errors.AsType[*client.EndError](err); ok {
		return "closed"
	}
	return "error"
}

// A wrongEchoError says what the server sent instead of the echo.
type wrongEchoError struct{ *client.CorruptionError }

func (e *wrongEchoError) Error() string { return fmt.Sprintf("got %q instead of the echo", e.Got) }

// pingError removes the address from an error of package client, because it was
// printed already.
func pingError(err error) error {
	if wrong, ok := errors.AsType[*client.CorruptionError](err); ok {
		return &wrongEchoError{wrong}
	}
	if _, ok := errors.AsType[*net.DNSError](err); ok {
		return err
	}
	if inner := errors.Unwrap(err); inner != nil {
		return inner
	}
	return err
}

// print prints a ping. It does not print a single failed one, which is the command's error.
func (p *pinger) print(r pingResult) error {
	switch {
	case p.json:
		return printJSONLine(p.out, r)
	case r.err != nil && p.count == 1:
		return nil
	}
	from := p.address
	if r.DNS != nil && r.Remote != "" {
		from += " (" + r.Remote + ")"
	}
	var err error
	if r.err != nil {
		err = printLine(p.out, "from %s: seq=%d: %s", from, r.Seq, r.Error)
	} else {
		dns, handshake := "", ""
		if r.DNS != nil {
			dns = " dns=" + formatLatency(*r.DNS)
		}
		if r.TLS != nil {
			handshake = " tls=" + formatLatency(*r.TLS)
		}
		bytes := "bytes"
		if r.Bytes == 1 {
			bytes = "byte"
		}
		err = printLine(p.out, "%d %s from %s: seq=%d%s connect=%s%s echo=%s", r.Bytes, bytes, from, r.Seq,
			dns, formatLatency(*r.Connect), handshake, formatLatency(*r.Echo))
	}
	if err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	return nil
}

func printJSONLine(out io.Writer, v any) error {
	if err := json.NewEncoder(out).Encode(v); err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	return nil
}

// A pingSummary sums up all pings.
type pingSummary struct {
	Type     string         `json:"type"` // summary
	Address  string         `json:"address"`
	Sent     int            `json:"sent"`
	Returned int            `json:"returned"`
	Results  map[string]int `json:"results"`
	Took     float64        `json:"took_seconds"`
	DNS      *pingSpread    `json:"dns,omitempty"` // nil if no ping has resolved a name
	Connect  *pingSpread    `json:"connect,omitempty"`
	TLS      *pingSpread    `json:"tls,omitempty"`
	Echo     *pingSpread    `json:"echo,omitempty"`
}

// A pingSpread sums up times. Deviation is the standard deviation, which ping(8)
// calls mdev.
type pingSpread struct {
	Min       float64 `json:"min_seconds"`
	Mean      float64 `json:"mean_seconds"`
	Max       float64 `json:"max_seconds"`
	Deviation float64 `json:"deviation_seconds"`
}

// String returns the spread as ping(8) prints it.
func (s *pingSpread) String() string {
	return fmt.Sprintf("%.3f/%.3f/%.3f/%.3f ms", s.Min*1e3, s.Mean*1e3, s.Max*1e3, s.Deviation*1e3)
}

func newPingSpread(results []pingResult, step func(pingResult) *float64) *pingSpread {
	s := pingSpread{Min: math.Inf(1)}
	n, sum, squares := 0.0, 0.0, 0.0
	for _, r := range results {
		if t := step(r); t != nil && r.err == nil {
			n, sum, squares = n+1, sum+*t, squares+*t**t
			s.Min, s.Max = min(s.Min, *t), max(s.Max, *t)
		}
	}
	if n == 0 {
		return nil
	}
	s.Mean = sum / n
	s.Deviation = math.Sqrt(max(0, squares/n-s.Mean*s.Mean))
	return &s
}

// summarize prints the summary.
func (p *pinger) summarize(took time.Duration) error {
	s := pingSummary{
		Type: "summary", Address: p.address, Sent: len(p.results), Results: map[string]int{}, Took: took.Seconds(),
		DNS:     newPingSpread(p.results, func(r pingResult) *float64 { return r.DNS }),
		Connect: newPingSpread(p.results, func(r pingResult) *float64 { return r.Connect }),
		TLS:     newPingSpread(p.results, func(r pingResult) *float64 { return r.TLS }),
		Echo:    newPingSpread(p.results, func(r pingResult) *float64 { return r.Echo }),
	}
	for _, r := range p.results {
		s.Results[r.Result]++
	}
	s.Returned = s.Results[pingOK]
	if p.json {
		return printJSONLine(p.out, s)
	}
	lost := 100 * float64(s.Sent-s.Returned) / float64(s.Sent)
	if s.Returned > 0 {
		lost = min(lost, 99.9) // so that it is not rounded to 100
	}
	fmt.Fprintf(p.out, "\n--- %s echod ping statistics ---\n%d sent, %d returned, %.3g%% lost",
		text.Printable(p.address), s.Sent, s.Returned, lost)
	for _, result := range slices.Sorted(maps.Keys(s.Results)) {
		if result != pingOK {
			fmt.Fprintf(p.out, ", %d %s", s.Results[result], result)
		}
	}
	_, err := fmt.Fprintf(p.out, ", time %s\n", formatDuration(took))
	for _, step := range []struct {
		name string
		*pingSpread
	}{{"dns", s.DNS}, {"connect", s.Connect}, {"tls", s.TLS}, {"echo", s.Echo}} {
		if step.pingSpread != nil {
			_, err = fmt.Fprintf(p.out, "%7s min/avg/max/mdev = %s\n", step.name, step.pingSpread)
		}
	}
	if err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	return nil
}
