package records

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	connectTimeout = 10 * time.Second // for TCP, and again for TLS
	stallTimeout   = time.Minute      // without a byte, while one is expected
	maxRedirects   = 10

	defaultRetries = 5
	minRetryDelay  = 500 * time.Millisecond
	maxRetryDelay  = 15 * time.Second
	maxRetryAfter  = 5 * time.Minute // a download is given up if the server asks for a longer wait
)

// HTTPOptions configures how URLs are read. The zero value is usable.
type HTTPOptions struct {
	// Header is sent with each request, but not to other hosts after a redirect.
	// Its User-Agent, if any, replaces that of UserAgent.
	Header    http.Header
	UserAgent string // empty means "echod"

	// RootCAs verify servers; nil means those of the system.
	RootCAs *x509.CertPool

	// Retries is how often in a row, without a byte in between, a request is
	// repeated after a failure that may pass. Zero means 5, less than zero never.
	Retries int

	// OnRetry, if not nil, is called before each wait for another request.
	OnRetry func(name string, reason error, wait time.Duration)

	// Transport sends the requests; nil means one that gives up connecting after
	// 10 s, and uses the proxies of the environment.
	Transport http.RoundTripper
}

var (
	errStalled = fmt.Errorf("nothing came for %s", stallTimeout)
	errChanged = errors.New("it changed while it was read")
)

// openURL requests a URL. Errors contain publicName's form of the URL.
func openURL(ctx context.Context, rawURL string, opts Options) (*input, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" {
		return nil, errors.New("read URL: malformed") // any part of it may be secret
	}
	d := newDownload(ctx, u, opts.HTTP)
	if from := opts.From; from != nil && from.Validator != "" {
		d.base, d.got, d.validator = from.Bytes, from.Bytes, from.Validator
	}
	if err := d.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", d.name, err), d.Close())
	}
	in := newInput(ctx, d, d.name)
	in.url, in.size, in.close, in.validator = true, d.size, d.Close, d.validator
	in.resumed = d.base > 0
	in.consumed.Store(d.base)
	return in, nil
}

// publicName returns the URL without user, query and fragment, where secrets are.
func publicName(u *url.URL) string {
	name := (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
	if u.RawQuery != "" {
		name += "?..."
	}
	return name
}

// A download is the content of a URL, over as many requests as it takes.
type download struct {
	ctx    context.Context // the caller's
	name   string
	url    *url.URL
	opts   HTTPOptions
	client *http.Client

	validator string // of the first response
	size      int64  // -1 means unknown
	base      int64  // offset at which the download began
	got       int64  // offset up to which it has come
	sum       hash.Hash
	tries     int // requests in a row without a byte

	// Of the current request.
	body   io.ReadCloser // nil before the response
	cancel context.CancelCauseFunc
	reqCtx context.Context
	stall  *time.Timer // cancels; stopped while nothing is expected
	failed error       // why body failed; returned after the bytes that came before
}

func newDownload(ctx context.Context, u *url.URL, opts HTTPOptions) *download {
	if opts.UserAgent == "" {
		opts.UserAgent = "echod"
	}
	if opts.Transport == nil {
		opts.Transport = &http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			DialContext:         (&net.Dialer{Timeout: connectTimeout}).DialContext,
			TLSHandshakeTimeout: connectTimeout,
			TLSClientConfig:     &tls.Config{RootCAs: opts.RootCAs, MinVersion: tls.VersionTLS12},
			ForceAttemptHTTP2:   true,
			DisableKeepAlives:   true, // so that no connection is left behind
		}
	}
	d := &download{ctx: ctx, name: publicName(u), url: u, opts: opts, size: -1, sum: sha256.New()}
	d.client = &http.Client{Transport: opts.Transport, CheckRedirect: d.checkRedirect}
	return d
}

// checkRedirect follows no redirect from https to http. It sends no Referer, which would
// contain the query. It sends the user's headers only to the host that the user named.
func (d *download) checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("stopped after %d redirects", maxRedirects)
	}
	if via[len(via)-1].URL.Scheme == "https" && req.URL.Scheme != "https" {
		return fmt.Errorf("refused a redirect from https to %s", req.URL.Scheme)
	}
	req.Header.Del("Referer")
	if req.URL.Host != d.url.Host || req.URL.Scheme != d.url.Scheme {
		for name := range d.opts.Header {
			if name != "User-Agent" {
				req.Header.Del(name)
			}
		}
	}
	return nil
}

// A statusError is a response that is not the content.
type statusError struct {
	code       int
	retryAfter time.Duration // zero: the server says nothing
}

func (e *statusError) Error() string {
	text := strings.TrimSpace(strconv.Itoa(e.code) + " " + http.StatusText(e.code))
	if e.retryAfter > 0 {
		text += fmt.Sprintf(" (retry after %s)", e.retryAfter)
	}
	return text
}

// temporary reports whether the same request may succeed later.
func (e *statusError) temporary() bool {
	switch e.code {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// open requests the content behind what came so far, until it succeeds or gives up.
func (d *download) open() error {
	for {
		err := d.request()
		if err == nil {
			return nil
		}
		if err = d.explain(err); !d.retryable(err) {
			return err
		}
		if err := d.wait(err); err != nil {
			return err
		}
	}
}

// retryable reports whether another request may succeed after err. If no byte has come yet
// and the server cannot be reached, it is false: the address may be wrong.
func (d *download) retryable(err error) bool {
	if d.ctx.Err() != nil || errors.Is(err, errChanged) {
		return false
	}
	if status, ok := errors.AsType[*statusError](err); ok {
		return status.temporary()
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return false
	}
	if _, ok := errors.AsType[permanentError](err); ok {
		return false
	}
	if d.got > d.base || errors.Is(err, errStalled) {
		return true
	}
	timeout, ok := errors.AsType[net.Error](err)
	return ok && timeout.Timeout() || errors.Is(err, errNoResponse)
}

// wait waits before another request, as long as the server asks, or a random time that
// grows. If no other request should follow, it returns err and how many were made.
func (d *download) wait(err error) error {
	retries := cmp.Or(d.opts.Retries, defaultRetries)
	if d.tries >= retries {
		if d.tries > 0 {
			err = fmt.Errorf("%w (gave up after %d retries)", err, d.tries)
		}
		return err
	}
	bound := min(minRetryDelay<<min(d.tries, 10), maxRetryDelay)
	delay := bound/2 + rand.N(bound/2+1)
	if status, ok := errors.AsType[*statusError](err); ok && status.retryAfter > 0 {
		if delay = status.retryAfter; delay > maxRetryAfter {
			return err
		}
	}
	d.tries++
	if d.opts.OnRetry != nil {
		d.opts.OnRetry(d.name, err, delay)
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-d.ctx.Done():
		return context.Cause(d.ctx)
	}
}

// request requests the content behind what came so far, and returns once it is next in
// the body.
func (d *download) request() error {
	d.endRequest()
	d.reqCtx, d.cancel = context.WithCancelCause(d.ctx)
	cancel := d.cancel
	d.stall = time.AfterFunc(stallTimeout, func() { cancel(errStalled) })
	defer d.stall.Stop()
	req, err := http.NewRequestWithContext(d.reqCtx, http.MethodGet, d.url.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", d.opts.UserAgent)
	// Without it, net/http asks for gzip, unpacks it, and hides the length.
	req.Header.Set("Accept-Encoding", "identity")
	for name, values := range d.opts.Header {
		req.Header[name] = values
		if name == "Host" {
			req.Host = values[0]
		}
	}
	// A weak ETag does not promise the same bytes.
	ranged := d.got > 0 && d.validator != "" && !strings.HasPrefix(d.validator, "W/")
	if ranged {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", d.got))
		req.Header.Set("If-Range", d.validator)
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return err
	}
	d.body = resp.Body
	switch {
	case resp.StatusCode == http.StatusPartialContent && ranged:
		return d.continueWith(resp)
	case resp.StatusCode == http.StatusOK:
		if err := checkContentEncoding(resp.Header); err != nil {
			return err
		}
		return d.startWith(resp)
	default:
		return &statusError{resp.StatusCode, retryAfter(resp.Header)}
	}
}

func validatorOf(h http.Header) string { return cmp.Or(h.Get("ETag"), h.Get("Last-Modified")) }

// continueWith checks that a partial response begins where the content broke off.
func (d *download) continueWith(resp *http.Response) error {
	var first, last int64
	var size string
	contentRange := resp.Header.Get("Content-Range")
	n, err := fmt.Sscanf(contentRange, "bytes %d-%d/%s", &first, &last, &size)
	if err != nil || n != 3 || first != d.got {
		return permanentError{fmt.Errorf("asked for the bytes from %d, got %q", d.got, contentRange)}
	}
	if v := validatorOf(resp.Header); v != "" && v != d.validator {
		return errChanged
	}
	total, err := strconv.ParseInt(size, 10, 64)
	if err != nil || total < last+1 {
		return nil // "*"
	}
	if d.size >= 0 && d.size != total {
		return errChanged
	}
	d.size = total
	return nil
}

// startWith takes a response with the whole content. Of a continued download it skips what
// came already, if that is the same.
func (d *download) startWith(resp *http.Response) error {
	validator := validatorOf(resp.Header)
	if d.got == d.base {
		// Nothing was read yet: if it changed, its user will see.
		d.base, d.got = 0, 0
		d.size, d.validator = resp.ContentLength, validator
		d.sum.Reset()
		return nil
	}
	if d.validator != "" && validator != d.validator {
		return errChanged
	}
	again := sha256.New()
	if err := d.copy(io.Discard, d.base); err != nil {
		return err
	}
	if err := d.copy(again, d.got-d.base); err != nil {
		return err
	}
	if string(again.Sum(nil)) != string(d.sum.Sum(nil)) {
		return errChanged
	}
	return nil
}

// copy copies n bytes of the body, which does not stall as long as it delivers some.
func (d *download) copy(to io.Writer, n int64) error {
	_, err := io.CopyN(to, readerFunc(func(p []byte) (int, error) {
		d.stall.Reset(stallTimeout)
		return d.body.Read(p)
	}), n)
	if err == io.EOF {
		return errChanged // it is shorter
	}
	return err
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// checkContentEncoding refuses encodings that unpack does not recognise. Some servers name
// charsets, or how the content was stored.
func checkContentEncoding(h http.Header) error {
	for coding := range strings.SplitSeq(strings.Join(h.Values("Content-Encoding"), ","), ",") {
		switch strings.ToLower(strings.TrimSpace(coding)) {
		case "", "identity", "none", "aws-chunked", "utf-8", "utf8", "binary":
		case "gzip", "x-gzip", "zstd", "bzip2", "xz": // recognised by what it begins with
		default:
			return permanentError{fmt.Errorf("the server uses the encoding %q, which was not asked for", coding)}
		}
	}
	return nil
}

// A permanentError is a failure that will not pass.
type permanentError struct{ error }

// retryAfter returns how long a server asks to wait, or zero.
func retryAfter(h http.Header) time.Duration {
	value := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(value); err == nil {
		return max(time.Until(at), 0)
	}
	return 0
}

func (d *download) Read(p []byte) (int, error) {
	for {
		err := d.failed
		if err == nil {
			d.stall.Reset(stallTimeout)
			var n int
			n, err = d.body.Read(p)
			d.stall.Stop()
			if n > 0 {
				d.got += int64(n)
				d.sum.Write(p[:n])
				d.tries = 0
				if err != io.EOF {
					d.failed, err = err, nil
				}
				return n, err
			}
			if err == nil || err == io.EOF {
				return 0, err
			}
		}
		d.failed = nil
		if err = d.explain(err); !d.retryable(err) {
			return 0, err
		}
		if err := d.wait(err); err != nil {
			return 0, err
		}
		if err := d.open(); err != nil {
			return 0, err
		}
	}
}

var errNoResponse = errors.New("connection closed without a response")

// explain says what an error of a request, or of its body, means.
func (d *download) explain(err error) error {
	if d.reqCtx.Err() != nil {
		return context.Cause(d.reqCtx)
	}
	if request, ok := errors.AsType[*url.Error](err); ok {
		err = request.Err // without the URL and its secrets
	}
	_, status := errors.AsType[*statusError](err)
	_, permanent := errors.AsType[permanentError](err)
	switch {
	case status, permanent, errors.Is(err, errChanged):
		return err
	case d.body == nil && errors.Is(err, io.EOF):
		return errNoResponse
	case d.body == nil:
		return err
	case errors.Is(err, io.ErrUnexpectedEOF) && d.size >= 0:
		return fmt.Errorf("connection closed after %d of %d bytes", d.got, d.size)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("connection closed after %d bytes, before the end", d.got)
	default:
		return fmt.Errorf("connection broke after %d bytes: %w", d.got, err)
	}
}

// endRequest ends the current request, if there is one.
func (d *download) endRequest() {
	if d.cancel == nil {
		return
	}
	d.stall.Stop()
	d.cancel(errors.New("download closed"))
	if d.body != nil {
		_ = d.body.Close()
		d.body = nil
	}
}

// Close ends the download. A second Close returns nil.
func (d *download) Close() error {
	d.endRequest()
	return nil
}
