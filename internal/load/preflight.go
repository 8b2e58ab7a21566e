package load

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"echod/client"
)

// A target is one of the server's IP addresses.
type target struct {
	network, address string
	tls              *tls.Config  // nil for none
	made, failed     atomic.Int64 // connects
}

// portAdvice says what to do if there are too few local ports.
const portAdvice = "use fewer connections or less churn, or widen net.ipv4.ip_local_port_range"

// prepare resolves the address, and checks that this machine can open that many
// connections. It is better to fail now than in the middle of the run.
func (r *run) prepare(ctx context.Context) error {
	if limit, used := fileLimit(); limit > 0 && r.opts.Conns+used+filesPerWorker*r.opts.Threads > limit {
		return r.tooFewFiles()
	}
	if r.opts.Dial != nil {
		return nil
	}
	address, err := client.ParseAddress(r.opts.Address)
	if err != nil {
		return err
	}
	r.raw = !address.TLS
	if address.Network != "tcp" {
		r.targets = []*target{{network: address.Network, address: address.Addr}}
		return nil
	}
	host, port, err := net.SplitHostPort(address.Addr)
	if err != nil {
		return err
	}
	number, err := net.DefaultResolver.LookupPort(ctx, "tcp", port)
	if err != nil {
		return err
	}
	host = cmp.Or(host, "localhost")
	hosts, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return err
	}
	var config *tls.Config
	if address.TLS {
		config = cmp.Or(r.opts.TLS, &tls.Config{}).Clone()
		config.ServerName = cmp.Or(config.ServerName, host)
	}
	for _, h := range hosts {
		r.targets = append(r.targets,
			&target{network: "tcp", address: net.JoinHostPort(h, strconv.Itoa(number)), tls: config})
	}
	if err := checkPorts(localPorts(), len(hosts), r.opts.Conns); err != nil {
		return fmt.Errorf("load on %s: %w", r.opts.Address, err)
	}
	return nil
}

// checkPorts returns an error if this machine has too few local ports. Each serves
// one connection to each address. Zero ports means that the number is not known.
func checkPorts(ports, addresses, conns int) error {
	if ports == 0 || conns <= ports*addresses {
		return nil
	}
	return fmt.Errorf("this machine has %d local ports for %d connections: %s", ports*addresses, conns,
		portAdvice)
}

// filesPerWorker is how many files a worker opens besides its connections.
const filesPerWorker = 6

func (r *run) tooFewFiles() error {
	return fmt.Errorf("load on %s: too many open files for %d connections: raise the limit (ulimit -n)",
		r.opts.Address, r.opts.Conns)
}

// outOfFiles reports whether this machine cannot open more connections. The server is
// not to blame.
func outOfFiles(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// openFiles returns how many files this process has open, as far as the system tells.
func openFiles() int {
	entries, err := os.ReadDir("/dev/fd")
	if err != nil {
		return 16 // a guess: standard streams, the runtime's poller, output files
	}
	return len(entries)
}

// dial connects to the server. It starts with target n, and tries the others if that
// fails.
func (r *run) dial(ctx context.Context, n int) (dialed, error) {
	if r.opts.Dial != nil {
		conn, err := r.opts.Dial(ctx, r.opts.Address)
		return dialed{conn: conn}, err
	}
	var first error
	for i := range r.targets {
		t := r.targets[(n+i)%len(r.targets)]
		d, err := t.dial(ctx, len(r.targets)-i)
		if err == nil {
			return d, nil
		}
		if first == nil {
			first = err
		}
		if ctx.Err() != nil || outOfFiles(err) {
			break
		}
	}
	return dialed{}, first
}

// dial connects to the target. It leaves time for the others if it is one of several.
func (t *target) dial(ctx context.Context, of int) (dialed, error) {
	if deadline, ok := ctx.Deadline(); ok && of > 1 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, time.Until(deadline)/time.Duration(of), errDialTimeout)
		defer cancel()
	}
	d, err := t.dialConn(ctx)
	if err != nil {
		t.failed.Add(1)
		return d, err
	}
	t.made.Add(1)
	return d, nil
}

func (t *target) dialConn(ctx context.Context) (d dialed, err error) {
	d.conn, err = new(net.Dialer).DialContext(ctx, t.network, t.address)
	if err != nil || t.tls == nil {
		return d, err
	}
	began := time.Now()
	session := tls.Client(d.conn, t.tls)
	if err := session.HandshakeContext(ctx); err != nil {
		_ = d.conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return d, &handshakeError{err}
	}
	return dialed{conn: session, handshake: time.Since(began), resumed: session.ConnectionState().DidResume}, nil
}

// A handshakeError says why a TLS handshake failed.
type handshakeError struct{ err error }

func (e *handshakeError) Error() string {
	return "TLS handshake: " + strings.TrimPrefix(withoutAddress(e.err), "tls: ")
}

func (e *handshakeError) Unwrap() error { return e.err }
