package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// ListenAndServeTLS listens at address, as Listen does, and serves over TLS; see ServeTLS. The address may also be
// tls://host:port.
func (s *Server) ListenAndServeTLS(address, certFile, keyFile string) error {
	if s.log == nil {
		return errNotNew
	}
	if rest, ok := strings.CutPrefix(address, tlsScheme); ok {
		address = "tcp://" + rest
	}
	config, err := s.tlsConfig(certFile, keyFile)
	if err != nil {
		return err
	}
	ln, err := Listen(context.Background(), address)
	if err != nil {
		return err
	}
	return s.ServeListener(Listener{Listener: ln, TLSConfig: config})
}

const tlsScheme = "tls://"

// ServeTLS accepts connections from ln and serves them over TLS, with a copy of Options.TLSConfig. The files hold the
// certificate and its key in PEM form; the certificate's issuers follow it in the same file. Both names may be empty if
// Options.TLSConfig brings a certificate. For anything else see ServeListener and Listener.TLSConfig.
func (s *Server) ServeTLS(ln net.Listener, certFile, keyFile string) error {
	if s.log == nil {
		_ = ln.Close()
		return errNotNew
	}
	config, err := s.tlsConfig(certFile, keyFile)
	if err != nil {
		_ = ln.Close()
		return err
	}
	return s.ServeListener(Listener{Listener: ln, TLSConfig: config})
}

// tlsConfig returns a copy of Options.TLSConfig, with the certificate in the files if they are named.
func (s *Server) tlsConfig(certFile, keyFile string) (*tls.Config, error) {
	config := new(tls.Config)
	if s.opts.TLSConfig != nil {
		config = s.opts.TLSConfig.Clone()
	}
	if certFile == "" && keyFile == "" && hasCertificate(config) {
		return config, nil
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, fmt.Errorf("server: loading the certificate: %w", err)
	}
	config.Certificates = []tls.Certificate{cert}
	return config, nil
}

func hasCertificate(config *tls.Config) bool {
	return len(config.Certificates) > 0 || config.GetCertificate != nil || config.GetConfigForClient != nil
}

var errNoCertificate = errors.New("server: serve: the TLS configuration has no certificate")

// TLS returns a WrapConn that performs the server's side of a TLS handshake. A handler starts TLS in the middle of a
// connection with
//
//	err := c.Wrap(ctx, server.TLS(config))
//
// A listener that serves TLS from the first byte on has a TLSConfig instead. A failed handshake returns a
// *HandshakeError.
func TLS(config *tls.Config) WrapConn {
	return func(ctx context.Context, nc net.Conn) (net.Conn, error) {
		session := tls.Server(&tlsTransport{Conn: nc}, config)
		if err := session.HandshakeContext(ctx); err != nil {
			return nil, explainHandshake(session, err)
		}
		return session, nil
	}
}

// tlsTransport is the stream below a TLS session that the server made. Unlike crypto/tls, it can report whether a
// read would wait for the client. The goroutine that reads the session owns its fields.
type tlsTransport struct {
	net.Conn
	buffered bool // Read does not read from the stream, and fails with errNothingBuffered

	rest   []byte  // what await has read and Read has not returned
	ahead  *buffer // that holds rest; nil if no buffer has to be given back
	err    error   // what await has read; Read returns it once
	single bool    // await has read exactly one record, and Read has read nothing else since
}

// await waits for input, reads it into a buffer of this size, and keeps it for Read.
func (t *tlsTransport) await(w *readWaiter, size bufferSize) {
	buf, n, err := w.wait(size)
	if buf != nil {
		t.ahead, t.rest = buf, buf.bytes[:n]
	}
	t.single = isOneRecord(t.rest)
	if err != nil {
		t.err = &net.OpError{Op: "read", Net: t.LocalAddr().Network(), Source: t.LocalAddr(), Addr: t.RemoteAddr(), Err: err}
	}
}

// errNothingBuffered is a temporary error: crypto/tls keeps the others and returns them forever.
var errNothingBuffered net.Error = nothingBuffered{}

type nothingBuffered struct{}

func (nothingBuffered) Error() string   { return "nothing buffered" }
func (nothingBuffered) Timeout() bool   { return true }
func (nothingBuffered) Temporary() bool { return true }

// isOneRecord reports whether data is a whole record with application data (RFC 8446, 5.1), if it begins with one.
func isOneRecord(data []byte) bool {
	const header, applicationData = 5, 23
	return len(data) > header && data[0] == applicationData && header+int(data[3])<<8+int(data[4]) == len(data)
}

// release gives the buffer back, and keeps what is in it.
func (t *tlsTransport) release() {
	if t.ahead != nil {
		t.rest = slices.Clone(t.rest)
		t.ahead.giveBack()
		t.ahead = nil
	}
}

// Read reads from the stream.
func (t *tlsTransport) Read(p []byte) (int, error) {
	if len(t.rest) > 0 {
		n := copy(p, t.rest)
		if t.rest = t.rest[n:]; len(t.rest) == 0 {
			t.release()
			t.rest = nil
		}
		return n, nil
	}
	if err := t.err; err != nil {
		t.err = nil
		return 0, err
	}
	if t.buffered {
		return 0, errNothingBuffered
	}
	t.single = false
	return t.Conn.Read(p)
}

// tlsSession returns the TLS session that the connection reads and writes, and what is below it; transport is nil
// unless the server made the session.
func tlsSession(nc net.Conn) (session *tls.Conn, transport *tlsTransport) {
	session, _ = nc.(*tls.Conn)
	if session != nil {
		transport, _ = session.NetConn().(*tlsTransport)
	}
	return session, transport
}

// isTLS reports whether a write that ended halfway makes nc useless, also when no byte of it was counted as written.
func isTLS(nc net.Conn) bool {
	_, ok := nc.(interface{ ConnectionState() tls.ConnectionState })
	return ok
}

// session does what run does, for a TLS session. While the client is silent it waits for the socket instead of the
// session, and so needs no buffer and no deep stack.
func (cp *copier) session(session *tls.Conn, transport *tlsTransport) (int64, error) {
	defer cp.finish()
	defer transport.release()
	c := cp.src
	var waiter *readWaiter
	if raw := rawConn(transport.Conn); raw != nil {
		waiter = newReadWaiter(raw)
	}
	starved := false // the session has received nothing that it has not returned
	for {
		var n int
		var err error
		if cp.buf == nil {
			cp.buf = takeBuffer(cp.size)
		}
		if !starved {
			n, starved = cp.readBuffered(0, session, transport)
		}
		if n == 0 {
			if starved && waiter != nil {
				if c.idle.Load() != idleNo {
					if err := c.refuseIdleRead(); err != nil {
						return cp.written, err
					}
				}
				cp.release()
				transport.await(waiter, min(cp.size, mediumBuffer))
				cp.buf = takeBuffer(cp.size)
			}
			n, err = c.Read(cp.buf.bytes)
			if starved = transport.single && n < len(cp.buf.bytes); err == nil && !starved {
				n, starved = cp.readBuffered(n, session, transport)
			}
		}
		if n > 0 {
			cp.read, cp.rest = n, cp.buf.bytes[:n:n]
			if werr := cp.writeRest(); werr != nil {
				return cp.written, werr
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return cp.written, nil
		case err != nil:
			return cp.written, err
		}
	}
}

// readBuffered appends to the first n bytes of the buffer what the session has received already. It returns their new
// number, and whether the session has nothing more. Other errors than that are left to the next read.
func (cp *copier) readBuffered(n int, session *tls.Conn, transport *tlsTransport) (total int, starved bool) {
	c := cp.src
	before := n
	transport.buffered = true
	for n < len(cp.buf.bytes) {
		m, err := session.Read(cp.buf.bytes[n:])
		n += m
		if err != nil {
			starved = err == error(errNothingBuffered)
			break
		}
	}
	transport.buffered = false
	if n > before {
		if c.idle.Load() != idleNo {
			c.endIdle(true)
		}
		c.bytesIn.Add(uint64(n - before))
		c.touch()
	}
	return n, starved
}

// Labels of a connection whose client has identified itself by a certificate that was verified.
const (
	LabelSubject = "tls_subject" // for example "CN=client,O=Example"
	LabelNames   = "tls_names"   // DNS names, mail and IP addresses and URIs, separated by commas
)

// labelIdentity sets the labels of a client with a certificate. Names that are too long for a label are cut off, and
// characters that a log should not have are escaped.
func (c *Conn) labelIdentity() {
	state, ok := c.TLS()
	if !ok || len(state.VerifiedChains) == 0 {
		return
	}
	leaf := state.VerifiedChains[0][0]
	names := slices.Concat(leaf.DNSNames, leaf.EmailAddresses)
	for _, ip := range leaf.IPAddresses {
		names = append(names, ip.String())
	}
	for _, uri := range leaf.URIs {
		names = append(names, uri.String())
	}
	_ = c.SetLabel(LabelSubject, labelText(leaf.Subject.String()))         // a label that labelText made is valid
	for len(strings.Join(names, ",")) > maxLabelLength && len(names) > 1 { // half a name could be another client's
		names = names[:len(names)-1]
	}
	_ = c.SetLabel(LabelNames, labelText(strings.Join(names, ",")))
}

func labelText(text string) string {
	if CheckText(text) != nil {
		text = strconv.QuoteToASCII(text)
	}
	if len(text) > maxLabelLength {
		text = strings.ToValidUTF8(text[:maxLabelLength], "")
	}
	return text
}

// HandshakeFailure says why a TLS handshake failed. Its values are stable, for use in metrics.
type HandshakeFailure string

// The reasons.
const (
	HandshakeTimeout        HandshakeFailure = "timeout"         // it took longer than Timeouts.Handshake
	HandshakeNotTLS         HandshakeFailure = "not-tls"         // the client sent something else, such as plain text
	HandshakeNoCertificate  HandshakeFailure = "no-certificate"  // the client sent no certificate, and must
	HandshakeBadCertificate HandshakeFailure = "bad-certificate" // the client's certificate is not trusted
	HandshakeRefused        HandshakeFailure = "refused"         // by the client, for example over our certificate
	HandshakeIncompatible   HandshakeFailure = "incompatible"    // no common version, cipher suite or protocol
	HandshakeAborted        HandshakeFailure = "aborted"         // the client closed or reset the connection in it
	HandshakeOther          HandshakeFailure = "other"
)

// HandshakeFailures returns every HandshakeFailure, in a stable order.
func HandshakeFailures() []HandshakeFailure {
	return []HandshakeFailure{
		HandshakeTimeout, HandshakeNotTLS, HandshakeNoCertificate, HandshakeBadCertificate, HandshakeRefused,
		HandshakeIncompatible, HandshakeAborted, HandshakeOther,
	}
}

// HandshakeError is the error of a TLS handshake. ClosedConn.Err has it for a connection that was closed because of it.
type HandshakeError struct {
	Failure HandshakeFailure
	Err     error // crypto/tls's
}

var handshakeTexts = map[HandshakeFailure]string{
	HandshakeTimeout:        "the client did not complete it in time",
	HandshakeNotTLS:         "the client does not speak TLS",
	HandshakeNoCertificate:  "the client sent no certificate, and one is required",
	HandshakeBadCertificate: "the client's certificate is not trusted",
	HandshakeRefused:        "the client refused",
	HandshakeIncompatible:   "the client and the server have nothing in common",
	HandshakeAborted:        "the client closed the connection",
}

// Error explains the failure, followed by the error of crypto/tls.
func (e *HandshakeError) Error() string {
	text := "TLS handshake: "
	if explanation := handshakeTexts[e.Failure]; explanation != "" {
		text += explanation + ": "
	}
	if header, ok := errors.AsType[tls.RecordHeaderError](e.Err); ok && e.Failure == HandshakeNotTLS {
		return fmt.Sprintf("%sit began with %q", text, header.RecordHeader[:])
	}
	return text + strings.TrimPrefix(e.Err.Error(), "tls: ")
}

// Unwrap returns Err.
func (e *HandshakeError) Unwrap() error { return e.Err }

// explainHandshake makes a HandshakeError of an error of crypto/tls. It leaves alone the EOF and the reset of a client
// that sent nothing, which is what a load balancer's health check may do.
func explainHandshake(session *tls.Conn, err error) error {
	if began := session.ConnectionState().Version != 0; !began &&
		(errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)) {
		return err
	}
	return &HandshakeError{Failure: handshakeFailure(err), Err: err}
}

// Texts of errors that crypto/tls does not export.
const (
	textNoCertificate = "didn't provide a certificate"
	opRemoteAlert     = "remote error"
)

var textsIncompatible = []string{
	"unsupported versions", "no cipher suite supported", "unsupported application protocols",
	"no ECDHE curve", "does not support",
}

func handshakeFailure(err error) HandshakeFailure {
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return HandshakeTimeout
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return HandshakeNotTLS
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return HandshakeBadCertificate
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == opRemoteAlert {
		return HandshakeRefused
	}
	text := err.Error()
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET),
		errors.Is(err, syscall.EPIPE):
		return HandshakeAborted
	case strings.Contains(text, textNoCertificate):
		return HandshakeNoCertificate
	case slices.ContainsFunc(textsIncompatible, func(part string) bool { return strings.Contains(text, part) }):
		return HandshakeIncompatible
	default:
		return HandshakeOther
	}
}

// closeNotify ends the TLS session, bounded by flushTimeout; crypto/tls itself would give a client that does not read
// five seconds. After a write that ended halfway it sends nothing.
func (c *Conn) closeNotify() {
	half, ok := c.nc.(halfCloser)
	if !ok || c.writeBroken {
		return
	}
	timer := time.AfterFunc(flushTimeout, func() { _ = c.sock.SetWriteDeadline(longAgo) })
	defer timer.Stop()
	_ = half.CloseWrite()
}
