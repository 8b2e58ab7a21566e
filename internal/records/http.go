package records

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

const (
	connectTimeout = 10 * time.Second // for TCP, and again for TLS
	stallTimeout   = time.Minute      // without a byte, while one is waited for
)

var errStalled = fmt.Errorf("nothing came for %s", stallTimeout)

// openURL requests a URL. Of the URL its errors have what publicName returns.
func openURL(ctx context.Context, rawURL string, client *http.Client) (*input, error) {
	u, err := url.Parse(rawURL)
	if err != nil || u.Host == "" {
		return nil, errors.New("read a URL: malformed") // so that nobody knows what in it is secret
	}
	if client == nil {
		client = newHTTPClient()
	}
	d := &download{client: client}
	d.ctx, d.cancel = context.WithCancelCause(ctx)
	d.stall = time.AfterFunc(stallTimeout, func() { d.cancel(errStalled) })
	name := publicName(u)
	if err := d.start(u); err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", name, err), d.Close())
	}
	in := newInput(ctx, d, name)
	in.size, in.close, in.validator = d.size, d.Close, d.validator
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

// newHTTPClient returns a client that is used for one download. It finds proxies
// as net/http does by default.
func newHTTPClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: connectTimeout}).DialContext,
		TLSHandshakeTimeout: connectTimeout,
		ForceAttemptHTTP2:   true,
		DisableKeepAlives:   true, // so that no connection is left behind
	}}
}

// A download is the body of an answer. That it is whole is checked by net/http.
type download struct {
	client *http.Client
	ctx    context.Context // of the request
	cancel context.CancelCauseFunc
	stall  *time.Timer // cancels; stopped while nothing is waited for

	body      io.ReadCloser // nil before the answer
	size      int64         // -1 means unknown
	validator string
	got       int64
}

// start requests u, and returns once the answer has begun.
func (d *download) start(u *url.URL) error {
	defer d.stall.Stop()
	req, err := http.NewRequestWithContext(d.ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	// Without, net/http asks for gzip, unpacks it, and hides the length.
	req.Header.Set("Accept-Encoding", "identity")
	answer, err := d.client.Do(req)
	if err != nil {
		return d.explain(err)
	}
	d.body, d.size = answer.Body, answer.ContentLength
	d.validator = cmp.Or(answer.Header.Get("ETag"), answer.Header.Get("Last-Modified"))
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("%d %s", answer.StatusCode, http.StatusText(answer.StatusCode))
	}
	switch coding := answer.Header.Get("Content-Encoding"); coding {
	case "", "identity", "gzip", "x-gzip", "zstd": // unpacked as what it begins with says
	default:
		return fmt.Errorf("sent in the encoding %q, which was not asked for", coding)
	}
	return nil
}

func (d *download) Read(p []byte) (int, error) {
	d.stall.Reset(stallTimeout)
	n, err := d.body.Read(p)
	d.stall.Stop()
	d.got += int64(n)
	if err != nil && err != io.EOF {
		err = d.explain(err)
	}
	return n, err
}

// explain says what err means.
func (d *download) explain(err error) error {
	if d.ctx.Err() != nil {
		return context.Cause(d.ctx)
	}
	if request, ok := errors.AsType[*url.Error](err); ok {
		err = request.Err // without the URL and its secrets
	}
	switch {
	case d.body == nil && errors.Is(err, io.EOF):
		return errors.New("connection closed without an answer")
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

func (d *download) Close() error {
	d.stall.Stop()
	d.cancel(errors.New("download closed"))
	if d.body == nil {
		return nil
	}
	return d.body.Close()
}
