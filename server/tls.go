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
			return nil, toHandshakeError(session, err)
		}
		return session, nil
	}
}

// tlsTransport is the stream below a TLS session that the server made. Unlike crypto/tls, it can report whether a
// read would wait for the client. The goroutine that reads the session owns its fields.
type tlsTransport struct {
	net.Conn
	bufferedOnly bool // Read returns only pending bytes, and otherwise errNothingBuffered

	pending   []byte  // bytes that readAhead has read and Read has not returned
	aheadBuf  *buffer // buffer that holds pending; nil if pending is a copy
	err       error   // error of readAhead, which Read returns once
	oneRecord bool    // readAhead has read exactly one record, and Read has read nothing else since
}

// readAhead waits for input, reads it into a buffer of the given size, and keeps it for Read.
func (t *tlsTransport) readAhead(w *readWaiter, size bufferSize) {
	buf, n, err := w.wait(size)
	if buf != nil {
		t.aheadBuf, t.pending = buf, buf.bytes[:n]
	}
	t.oneRecord = isOneRecord(t.pending)
	if err != nil {
		t.err = &net.OpError{Op: "read", Net: t.LocalAddr().Network(), Source: t.LocalAddr(), Addr: t.RemoteAddr(), Err: err}
	}
}

// errNothingBuffered is a temporary error, because crypto/tls returns any other error again in each later read.
var errNothingBuffered net.Error = nothingBuffered{}

type nothingBuffered struct{}

func (nothingBuffered) Error() string   { return "nothing buffered" }
func (nothingBuffered) Timeout() bool   { return true }
func (nothingBuffered) Temporary() bool { return true }

// isOneRecord reports whether data is exactly one record with application data (RFC 8446, 5.1). It
// assumes that data begins with a record.
func isOneRecord(data []byte) bool {
	const header, applicationData = 5, 23
	return len(data) > header && data[0] == applicationData && header+int(data[3])<<8+int(data[4]) == len(data)
}

// releaseBuffer releases the buffer, and keeps a copy of pending.
func (t *tlsTransport) releaseBuffer() {
	if t.aheadBuf != nil {
		t.pending = slices.Clone(t.pending)
		t.aheadBuf.put()
		t.aheadBuf = nil
	}
}

// Read reads from the stream.
func (t *tlsTransport) Read(p []byte) (int, error) {
	if len(t.pending) > 0 {
		n := copy(p, t.pending)
		if t.pending = t.pending[n:]; len(t.pending) == 0 {
			t.releaseBuffer()
			t.pending = nil
		}
		return n, nil
	}
	if err := t.err; err != nil {
		t.err = nil
		return 0, err
	}
	if t.bufferedOnly {
		return 0, errNothingBuffered
	}
	t.oneRecord = false
	return t.Conn.Read(p)
}

// tlsSession returns the TLS session in nc, or nil. transport is the stream below it if the server made the session, and
// otherwise nil.
func tlsSession(nc net.Conn) (session *tls.Conn, transport *tlsTransport) {
	session, _ = nc.(*tls.Conn)
	if session != nil {
		transport, _ = session.NetConn().(*tlsTransport)
	}
	return session, transport
}

// isTLS reports whether nc is a TLS session. After a failed write a TLS session is unusable, even if no byte was
// counted as written.
func isTLS(nc net.Conn) bool {
	_, ok := nc.(interface{ ConnectionState() tls.ConnectionState })
	return ok
}

// copyTLS copies from a TLS session that the server has made. While the client is silent, it waits for the socket
// instead of the session. So it needs no buffer and no deep stack then.
func (cp *copier) copyTLS(session *tls.Conn, transport *tlsTransport) (int64, error) {
	defer cp.finish()
	defer transport.releaseBuffer()
	c := cp.src
	var waiter *readWaiter
	if raw := rawConn(transport.Conn); raw != nil {
		waiter = newReadWaiter(raw)
	}
	empty := false // the session has returned everything that it has received
	for {
		var n int
		var err error
		if cp.buf == nil {
			cp.buf = getBuffer(cp.size)
		}
		if !empty {
			n, empty = cp.readBuffered(0, session, transport)
		}
		if n == 0 {
			if empty && waiter != nil {
				if c.idle.Load() != idleUnmarked {
					if err := c.idleReadError(); err != nil {
						return cp.written, err
					}
				}
				cp.releaseBuffer()
				transport.readAhead(waiter, min(cp.size, mediumBuffer))
				cp.buf = getBuffer(cp.size)
			}
			n, err = c.Read(cp.buf.bytes)
			if empty = transport.oneRecord && n < len(cp.buf.bytes); err == nil && !empty {
				n, empty = cp.readBuffered(n, session, transport)
			}
		}
		if n > 0 {
			cp.buf.setRead(n)
			if werr := cp.writeUnwritten(); werr != nil {
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

// readBuffered reads what the session has already received, without waiting, into the buffer after its first n bytes.
// It returns the new number of bytes, and whether the session has nothing more. The next read returns any other
// error.
func (cp *copier) readBuffered(n int, session *tls.Conn, transport *tlsTransport) (total int, empty bool) {
	c := cp.src
	before := n
	transport.bufferedOnly = true
	for n < len(cp.buf.bytes) {
		m, err := session.Read(cp.buf.bytes[n:])
		n += m
		if err != nil {
			empty = err == error(errNothingBuffered)
			break
		}
	}
	transport.bufferedOnly = false
	if n > before {
		if c.idle.Load() != idleUnmarked {
			c.endIdle(true)
		}
		c.bytesIn.Add(uint64(n - before))
		c.markActive()
	}
	return n, empty
}

// Labels of a connection whose client has a verified certificate.
const (
	LabelSubject = "tls_subject" // for example "CN=client,O=Example"
	LabelNames   = "tls_names"   // DNS names, mail and IP addresses and URIs, separated by commas
)

// setIdentityLabels sets the labels of a client with a verified certificate. It cuts text that is too long for a label,
// and escapes unprintable characters.
func (c *Conn) setIdentityLabels() {
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
	_ = c.SetLabel(LabelSubject, labelText(leaf.Subject.String())) // the result of labelText is a valid label
	// Whole names are dropped, because a part of a name could be the name of another client.
	for len(strings.Join(names, ",")) > maxLabelLength && len(names) > 1 {
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

// The failures.
const (
	HandshakeTimeout        HandshakeFailure = "timeout"         // it took longer than Timeouts.Handshake
	HandshakeNotTLS         HandshakeFailure = "not-tls"         // the client sent something else, such as plain text
	HandshakeNoCertificate  HandshakeFailure = "no-certificate"  // the client sent no certificate, and one is required
	HandshakeBadCertificate HandshakeFailure = "bad-certificate" // the client's certificate is not trusted
	HandshakeRefused        HandshakeFailure = "refused"         // the client refused, for example the server's certificate
	HandshakeIncompatible   HandshakeFailure = "incompatible"    // no common version, cipher suite or protocol
	HandshakeAborted        HandshakeFailure = "aborted"         // the client closed or reset the connection during the handshake
	HandshakeOther          HandshakeFailure = "other"
)

// HandshakeFailures returns every HandshakeFailure, in a stable order.
func HandshakeFailures() []HandshakeFailure {
	return []HandshakeFailure{
		HandshakeTimeout, HandshakeNotTLS, HandshakeNoCertificate, HandshakeBadCertificate, HandshakeRefused,
		HandshakeIncompatible, HandshakeAborted, HandshakeOther,
	}
}

// HandshakeError is the error of a TLS handshake. It is ClosedConn.Err of a connection that was closed because of it.
type HandshakeError struct {
	Failure HandshakeFailure
	Err     error // the error of crypto/tls
}

var handshakeTexts = map[HandshakeFailure]string{
	HandshakeTimeout:        "the client did not complete it in time",
	HandshakeNotTLS:         "the client does not speak TLS",
	HandshakeNoCertificate:  "the client sent no certificate, and one is required",
	HandshakeBadCertificate: "the client's certificate is not trusted",
	HandshakeRefused:        "the client refused",
	HandshakeIncompatible:   "the client and the server have no version, cipher suite or protocol in common",
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

// toHandshakeError makes a HandshakeError of an error of crypto/tls. It returns the EOF or the reset of a client that
// sent nothing unchanged, because health checks of load balancers connect and close.
func toHandshakeError(session *tls.Conn, err error) error {
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

// closeNotify sends close_notify to end the TLS session, for flushTimeout at most. crypto/tls alone would wait five
// seconds for a client that does not read. After a failed write closeNotify sends nothing.
func (c *Conn) closeNotify() {
	half, ok := c.nc.(halfCloser)
	if !ok || c.writeBroken {
		return
	}
	timer := time.AfterFunc(flushTimeout, func() { _ = c.sock.SetWriteDeadline(aLongTimeAgo) })
	defer timer.Stop()
	_ = half.CloseWrite()
}
