package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Client talks to a control plane. All methods may be called concurrently. Their errors are a *Problem
// where the server refused, an *UnreachableError where no server was there, or ctx's.
type Client struct {
	path string
	http *http.Client
	// OnAnswer, when not nil, gets each answer's body as it came, a line at a time in a stream, but no
	// problems: they are errors. A lease's last line comes from a goroutine of its own. Set it before
	// the first call.
	OnAnswer func(body []byte)
}

// NewClient makes a client of the control socket at path. It connects when it is used.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// Path is the control socket's.
func (c *Client) Path() string { return c.path }

// Close closes the connections that are kept for further calls.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// UnreachableError says that no server answered on the control socket, or not to the end.
type UnreachableError struct {
	Path string
	Err  error
}

func (e *UnreachableError) Error() string {
	if errors.Is(e.Err, io.EOF) || errors.Is(e.Err, io.ErrUnexpectedEOF) {
		return fmt.Sprintf("the server on control socket %s went away before it had answered", e.Path)
	}
	if errors.Is(e.Err, fs.ErrPermission) {
		return fmt.Sprintf("control socket %s may not be used by this user: permission denied", e.Path)
	}
	return fmt.Sprintf("no server answers on control socket %s: %v", e.Path, bare(e.Err))
}

// Unwrap gives why.
func (e *UnreachableError) Unwrap() error { return e.Err }

// PauseRequest says how to pause; the zero value is a hold with neither reason nor end.
type PauseRequest struct {
	Reason string
	TTL    time.Duration // zero: until released
	Mode   string        // "hold" or "reject"; empty means hold
}

func (p PauseRequest) body() map[string]any {
	body := map[string]any{"reason": p.Reason}
	if p.TTL != 0 {
		body["ttl"] = p.TTL.String()
	}
	if p.Mode != "" {
		body["mode"] = p.Mode
	}
	return body
}

// ShutdownRequest says how to drain.
type ShutdownRequest struct {
	Reason string         // in the notice; empty means "control"
	Grace  *time.Duration // nil: the server's own
	Now    bool           // close everything now
}

// WaitRequest says what to wait for: a state, a number of open connections, or both at once.
type WaitRequest struct {
	State       string         // empty: any
	Connections *int           // nil: any number
	Timeout     *time.Duration // nil: none but the context's
}

// Status asks for the server's status.
func (c *Client) Status(ctx context.Context) (out Status, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/status", nil, nil, &out)
}

// Conns asks for up to limit open connections (negative: all) that have been idle for at least minIdle.
func (c *Client) Conns(ctx context.Context, limit int, minIdle time.Duration) (out Conns, err error) {
	query := url.Values{}
	if limit >= 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	if minIdle != 0 {
		query.Set("min_idle", minIdle.String())
	}
	return out, c.call(ctx, http.MethodGet, "/v1/conns", query, nil, &out)
}

// Closed asks for up to limit closed connections (negative: all that are remembered).
func (c *Client) Closed(ctx context.Context, limit int) (out ClosedConns, err error) {
	query := url.Values{}
	if limit >= 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	return out, c.call(ctx, http.MethodGet, "/v1/conns/closed", query, nil, &out)
}

// Kill ends one connection.
func (c *Client) Kill(ctx context.Context, id uint64) (out Change, err error) {
	return out, c.call(ctx, http.MethodDelete, "/v1/conns/"+strconv.FormatUint(id, 10), nil, nil, &out)
}

// KillAll ends all connections.
func (c *Client) KillAll(ctx context.Context) (out Change, err error) {
	return out, c.call(ctx, http.MethodDelete, "/v1/conns", url.Values{"all": {"true"}}, nil, &out)
}

// KillIdle ends the connections that have been idle for at least minIdle.
func (c *Client) KillIdle(ctx context.Context, minIdle time.Duration) (out Change, err error) {
	return out, c.call(ctx, http.MethodDelete, "/v1/conns", url.Values{"min_idle": {minIdle.String()}}, nil, &out)
}

// Pause pauses the server until the hold that it returns is released.
func (c *Client) Pause(ctx context.Context, req PauseRequest) (out Hold, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/pause", nil, req.body(), &out)
}

// Resume releases all holds.
func (c *Client) Resume(ctx context.Context) (out Change, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/resume", nil, nil, &out)
}

// ReleaseHold releases one hold.
func (c *Client) ReleaseHold(ctx context.Context, id string) (out Change, err error) {
	return out, c.call(ctx, http.MethodDelete, "/v1/holds/"+id, nil, nil, &out)
}

// Notify sends a line of text to every client.
func (c *Client) Notify(ctx context.Context, text string) (out Notified, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/notify", nil, map[string]any{"text": text}, &out)
}

// Shutdown begins the drain, or shortens it.
func (c *Client) Shutdown(ctx context.Context, req ShutdownRequest) (out Change, err error) {
	body := map[string]any{}
	if req.Reason != "" {
		body["reason"] = req.Reason
	}
	if req.Grace != nil {
		body["grace"] = req.Grace.String()
	}
	if req.Now {
		body["now"] = true
	}
	return out, c.call(ctx, http.MethodPost, "/v1/shutdown", nil, body, &out)
}

// Wait returns when what is asked for holds. A *Problem of type ProblemTimeout says that it did not in time,
// one of type ProblemDraining that it never will.
func (c *Client) Wait(ctx context.Context, req WaitRequest) (out Waited, err error) {
	query := url.Values{}
	if req.State != "" {
		query.Set("state", req.State)
	}
	if req.Connections != nil {
		query.Set("connections", strconv.Itoa(*req.Connections))
	}
	if req.Timeout != nil {
		query.Set("timeout", req.Timeout.String())
	}
	return out, c.call(ctx, http.MethodGet, "/v1/wait", query, nil, &out)
}

// Events ranges over what happens from now on, until ctx is done, the server has stopped, or the caller
// has enough. An error ends it.
func (c *Client) Events(ctx context.Context) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		resp, err := c.send(ctx, http.MethodGet, "/v1/events", nil, nil)
		if err != nil {
			yield(Event{}, err)
			return
		}
		defer resp.Body.Close()
		lines := bufio.NewReader(resp.Body)
		for {
			var e Event
			if err := c.readLine(ctx, lines, &e); err != nil {
				if ctx.Err() == nil && !errors.Is(err, io.EOF) {
					yield(Event{}, err)
				}
				return
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// A Lease is a hold that lasts as long as its connection: the server releases it when the process that has it
// dies.
type Lease struct {
	Hold  Hold
	body  io.ReadCloser
	ended chan struct{}
	why   Released // once ended is closed
}

// PauseWhileConnected pauses the server until the lease is closed, ctx is done, or the process dies.
func (c *Client) PauseWhileConnected(ctx context.Context, req PauseRequest) (*Lease, error) {
	resp, err := c.send(ctx, http.MethodPost, "/v1/pause", url.Values{"while": {"connected"}}, req.body())
	if err != nil {
		return nil, err
	}
	lines := bufio.NewReader(resp.Body)
	l := &Lease{body: resp.Body, ended: make(chan struct{})}
	if err := c.readLine(ctx, lines, &l.Hold); err != nil {
		_ = resp.Body.Close()
		return nil, err
	}
	go l.await(ctx, c, lines)
	return l, nil
}

// await reads why the server ended the hold; Close waits for it.
func (l *Lease) await(ctx context.Context, c *Client, lines *bufio.Reader) {
	defer close(l.ended)
	if c.readLine(ctx, lines, &l.why) != nil {
		l.why = Released{Released: "the connection to the server has ended"}
	}
}

// Ended is closed when the server has ended the hold before Close did.
func (l *Lease) Ended() <-chan struct{} { return l.ended }

// Why says, after Ended, why the hold ended.
func (l *Lease) Why() string { return l.why.Released }

// Close gives the connection up, and with it the hold, which the server releases at once, but after this
// returns: release it with ReleaseHold before, where that matters.
func (l *Lease) Close() {
	_ = l.body.Close()
	<-l.ended
}

func (c *Client) call(ctx context.Context, method, path string, query url.Values, body, out any) error {
	resp, err := c.send(ctx, method, path, query, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return c.failed(ctx, err)
	}
	return c.decode(answer, out)
}

// send returns an answer that is not a problem.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, body any) (*http.Response, error) {
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encoding the request: %w", err)
		}
		content = bytes.NewReader(encoded)
	}
	target := url.URL{Scheme: "http", Host: "echod", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, target.String(), content)
	if err != nil {
		return nil, fmt.Errorf("making the request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.failed(ctx, err)
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	var problem Problem
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&problem); err != nil || problem.Type == "" {
		return nil, fmt.Errorf("control socket %s answers %s", c.path, resp.Status)
	}
	return nil, &problem
}

// failed says why a request was not sent, or its answer not read: ctx has ended, or the server gone.
func (c *Client) failed(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if ue, ok := errors.AsType[*url.Error](err); ok {
		err = ue.Err
	}
	return &UnreachableError{Path: c.path, Err: err}
}

func (c *Client) readLine(ctx context.Context, r *bufio.Reader, out any) error {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return c.failed(ctx, err)
	}
	return c.decode(line, out)
}

func (c *Client) decode(answer []byte, out any) error {
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("control socket %s answers what is not understood: %w", c.path, err)
	}
	if c.OnAnswer != nil {
		c.OnAnswer(answer)
	}
	return nil
}
