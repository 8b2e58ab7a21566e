package control

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"echod/internal/text"
	"echod/server"
)

// Bounds on what a Client accepts from a server that hangs or misbehaves.
const (
	silenceTimeout = 5 * time.Second       // for an answer to begin, and between its parts
	busyRetry      = 50 * time.Millisecond // between attempts to connect to a server whose queue is full
	busyTimeout    = 4 * time.Second       // to get into a server's full queue; less than silenceTimeout
	maxAnswer      = 64 << 20              // bytes
	maxLine        = 1 << 20               // bytes of a line of a stream
)

// Client talks to a control plane. All methods may be called concurrently. Their errors are a *Problem if the server
// refused, an *UnreachableError if no server answered, or the cause of ctx.
type Client struct {
	path string
	http *http.Client
	// Claims describes the program's user, such as who called sudo: one line of at most 256 bytes. The server shows
	// it with holds and in the log, as unverified. Set it before the first call.
	Claims string
	// OnAnswer, if not nil, is called with the unchanged body of each answer, or with each line of a stream, but not
	// with Problems. For the last line of a Lease it is called on another goroutine. Set OnAnswer before the first
	// call.
	OnAnswer func(body []byte)
}

// NewClient returns a client of the control socket at path. It connects when it is used.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) { return dialSocket(ctx, path) }
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// dialSocket connects to the socket at path. The path always names a file, even with a leading @. While the server's
// queue is full, dialSocket retries.
func dialSocket(ctx context.Context, path string) (net.Conn, error) {
	if strings.HasPrefix(path, "@") {
		path = "./" + path
	}
	address, done, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer done()
	giveUp := time.After(busyTimeout)
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", address)
		if err == nil || !isBusy(err) {
			return conn, err
		}
		select {
		case <-time.After(busyRetry):
		case <-giveUp:
			return nil, errBusy
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Path returns the path of the control socket.
func (c *Client) Path() string { return c.path }

// Close closes idle connections. Calls may still be made after it.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// UnreachableError means that no server answered on the control socket, or did not complete its answer.
type UnreachableError struct {
	Path string
	Err  error
}

var (
	errNoAnswer = fmt.Errorf("it sent nothing for %s", silenceTimeout)
	errBusy     = errors.New("its queue of connections is full")
)

// Error returns the message for the user.
func (e *UnreachableError) Error() string {
	switch {
	case errors.Is(e.Err, io.EOF) || errors.Is(e.Err, io.ErrUnexpectedEOF):
		return fmt.Sprintf("the server on control socket %s went away before it had answered", e.Path)
	case errors.Is(e.Err, fs.ErrPermission):
		return fmt.Sprintf("control socket %s may not be used by this user: permission denied", e.Path)
	case errors.Is(e.Err, errNoAnswer):
		return fmt.Sprintf("the server on control socket %s does not answer: %v", e.Path, e.Err)
	case errors.Is(e.Err, errBusy):
		return fmt.Sprintf("the server on control socket %s is busy: %v", e.Path, e.Err)
	}
	return fmt.Sprintf("no server answers on control socket %s: %v", e.Path, withoutPath(e.Err))
}

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// PauseRequest says how to pause. The zero value is a hold without a reason that lasts until it is released.
type PauseRequest struct {
	Reason string
	TTL    time.Duration // zero: until released
	Mode   string        // "hold" or "reject"; empty means hold
	Evict  bool          // send the connected clients away
	Spread time.Duration // tell them one after another in this time; zero: all at once

	Grace *time.Duration // that each of them has; nil means the server's own
}

func (p PauseRequest) body() map[string]any {
	body := map[string]any{"reason": p.Reason}
	if p.TTL != 0 {
		body["ttl"] = p.TTL.String()
	}
	if p.Mode != "" {
		body["mode"] = p.Mode
	}
	if p.Evict {
		body["evict"] = true
	}
	if p.Spread != 0 {
		body["spread"] = p.Spread.String()
	}
	if p.Grace != nil {
		body["grace"] = p.Grace.String()
	}
	return body
}

// Upgrade replaces the running program with the one on disk, and keeps the connections. It gives up after timeout;
// zero means the server's default.
func (c *Client) Upgrade(ctx context.Context, timeout time.Duration) (Upgraded, error) {
	body := map[string]string{}
	if timeout != 0 {
		body["timeout"] = timeout.String()
	}
	var out Upgraded
	if err := c.checkAlive(ctx); err != nil {
		return out, err
	}
	return out, c.callWithin(ctx, 0, http.MethodPost, "/v1/upgrade", nil, body, &out)
}

// ShutdownRequest says how to drain. The zero value is the server's own drain.
type ShutdownRequest struct {
	Reason string         // told to clients; empty means "control"
	Grace  *time.Duration // nil means the server's own
	Spread *time.Duration // tell clients one after another in this time; nil means the server's own
	Now    bool           // close everything now

	Predecessor bool // drain only what stayed with the predecessor of an upgrade
}

// WaitRequest is the condition to wait for: a state, a number of open connections, or both.
type WaitRequest struct {
	State       string         // empty means any
	Connections *int           // nil means any number
	Timeout     *time.Duration // nil means none but the context's
}

// Status returns the server's status.
func (c *Client) Status(ctx context.Context) (out Status, err error) {
	return out, c.call(ctx, http.MethodGet, "/v1/status", nil, nil, &out)
}

// Closed returns up to limit of the last closed connections (negative: all that the server remembers).
func (c *Client) Closed(ctx context.Context, limit int) (out ClosedConns, err error) {
	query := url.Values{}
	if limit >= 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	return out, c.call(ctx, http.MethodGet, "/v1/conns/closed", query, nil, &out)
}

// Kill closes one connection.
func (c *Client) Kill(ctx context.Context, id uint64) (out Change, err error) {
	return out, c.call(ctx, http.MethodDelete, "/v1/conns/"+strconv.FormatUint(id, 10), nil, nil, &out)
}

// KillAll closes all connections.
func (c *Client) KillAll(ctx context.Context) (out Change, err error) {
	return out, c.call(ctx, http.MethodDelete, "/v1/conns", url.Values{"all": {"true"}}, nil, &out)
}

// KillMatching closes the connections that match the filter.
func (c *Client) KillMatching(ctx context.Context, filter ConnFilter) (out Change, err error) {
	query := filter.query()
	query.Set("min_idle", filter.MinIdle.String()) // the server refuses a request without any parameter
	return out, c.call(ctx, http.MethodDelete, "/v1/conns", query, nil, &out)
}

// Pause pauses the server until the returned hold is released.
func (c *Client) Pause(ctx context.Context, req PauseRequest) (out Hold, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/pause", nil, req.body(), &out)
}

// Resume releases the only hold. If there are several, the error is a *Problem of type ProblemHolds, which lists them.
func (c *Client) Resume(ctx context.Context) (out Change, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/resume", nil, nil, &out)
}

// ResumeAll releases all holds.
func (c *Client) ResumeAll(ctx context.Context) (out Change, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/resume", nil, map[string]any{"all": true}, &out)
}

// ReleaseHold releases the hold with the given id.
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
	if req.Spread != nil {
		body["spread"] = req.Spread.String()
	}
	if req.Now {
		body["now"] = true
	}
	if req.Predecessor {
		body["predecessor"] = true
	}
	return out, c.call(ctx, http.MethodPost, "/v1/shutdown", nil, body, &out)
}

// ExtendShutdown moves the deadline of the drain by at most d; see Change.ExtendedSeconds.
func (c *Client) ExtendShutdown(ctx context.Context, d time.Duration) (out Change, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/shutdown", nil, map[string]any{"extend": d.String()}, &out)
}

// CancelShutdown cancels the drain while no client has been told. The error is a *Problem of type ProblemNotDraining if
// there is none, and of type ProblemDraining if it is too late.
func (c *Client) CancelShutdown(ctx context.Context) (out Change, err error) {
	return out, c.call(ctx, http.MethodDelete, "/v1/shutdown", nil, nil, &out)
}

// Wait returns when the condition is true. The error is a *Problem of type ProblemTimeout if it did not become true in
// time, and of type ProblemDraining if it cannot become true any more.
func (c *Client) Wait(ctx context.Context, req WaitRequest) (out Waited, err error) {
	if err := c.checkAlive(ctx); err != nil {
		return out, err
	}
	query := url.Values{}
	if req.State != "" {
		query.Set("state", req.State)
	}
	if req.Connections != nil {
		query.Set("connections", strconv.Itoa(*req.Connections))
	}
	for began := time.Now(); ; {
		if req.Timeout != nil {
			query.Set("timeout", max(0, *req.Timeout-time.Since(began)).String())
		}
		if err = c.callWithin(ctx, 0, http.MethodGet, "/v1/wait", query, nil, &out); !isUpgraded(err) || ctx.Err() != nil {
			return out, err
		}
	}
}

// isUpgraded reports whether err means that the server was upgraded. The next request reaches the successor.
// closedUnanswered reports whether the server closed the connection before it answered.
func closedUnanswered(err error) bool {
	unreachable, ok := errors.AsType[*UnreachableError](err)
	return ok && (errors.Is(unreachable.Err, io.EOF) || errors.Is(unreachable.Err, syscall.ECONNRESET) ||
		errors.Is(unreachable.Err, syscall.EPIPE))
}

func isUpgraded(err error) bool {
	problem, ok := errors.AsType[*Problem](err)
	return ok && problem.Type == ProblemUpgraded
}

// Events ranges over the events from now on, until ctx is done or the server has stopped. An error ends it. It
// continues after an upgrade, and misses no event.
func (c *Client) Events(ctx context.Context) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) { c.eventsFrom(ctx, url.Values{}, yield) }
}

// EventsAfter is like Events, but begins after the event with the given id. An event of type "missed" replaces those
// that the server no longer has.
func (c *Client) EventsAfter(ctx context.Context, id uint64) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		c.eventsFrom(ctx, url.Values{"after": {strconv.FormatUint(id, 10)}}, yield)
	}
}

func (c *Client) eventsFrom(ctx context.Context, query url.Values, yield func(Event, error) bool) {
	for {
		last, more := c.readEvents(ctx, query, yield)
		if !more || last.Type != string(server.EventUpgraded) {
			return
		}
		query.Set("after", strconv.FormatUint(last.ID, 10))
	}
}

// readEvents reads events until the stream ends, and returns the last one. It reports that there are no more if yield
// returns false or after an error.
func (c *Client) readEvents(ctx context.Context, query url.Values, yield func(Event, error) bool) (last Event, more bool) {
	resp, err := c.stream(ctx, http.MethodGet, "/v1/events", query, nil)
	if err != nil {
		yield(Event{}, err)
		return last, false
	}
	defer resp.Body.Close()
	lines := newLines(resp.Body)
	for {
		var e Event
		if err := c.readLine(ctx, lines, &e); err != nil {
			if ctx.Err() != nil || errors.Is(err, io.EOF) {
				return last, ctx.Err() == nil
			}
			yield(Event{}, err)
			return last, false
		}
		if last = e; !yield(e, nil) {
			return last, false
		}
	}
}

// Lease is a hold that depends on a connection. The server releases it when the process that holds it dies.
type Lease struct {
	Hold     Hold
	body     io.ReadCloser
	ended    chan struct{}
	released Released // set before ended is closed
}

// PauseWhileConnected pauses the server until the lease is closed, ctx is done, or the process dies.
func (c *Client) PauseWhileConnected(ctx context.Context, req PauseRequest) (*Lease, error) {
	resp, err := c.stream(ctx, http.MethodPost, "/v1/pause", url.Values{"while": {"connected"}}, req.body())
	if err != nil {
		return nil, err
	}
	lines := newLines(resp.Body)
	l := &Lease{body: resp.Body, ended: make(chan struct{})}
	if err := c.readLine(ctx, lines, &l.Hold); err != nil {
		_ = resp.Body.Close()
		return nil, err
	}
	go l.await(ctx, c, lines)
	return l, nil
}

// await is the goroutine that reads why the server ended the hold; Close waits for it.
func (l *Lease) await(ctx context.Context, c *Client, lines *bufio.Scanner) {
	defer close(l.ended)
	if c.readLine(ctx, lines, &l.released) != nil {
		l.released = Released{Released: "the connection to the server has ended"}
	}
}

// Ended returns a channel that is closed when the hold or the connection has ended.
func (l *Lease) Ended() <-chan struct{} { return l.ended }

// EndReason returns why the hold ended. Call it after Ended is closed.
func (l *Lease) EndReason() string { return l.released.Released }

// Close closes the connection. The server then releases the hold, possibly after Close has returned. To release it
// before, call ReleaseHold first.
func (l *Lease) Close() {
	_ = l.body.Close()
	<-l.ended
}

// checkAlive checks that the server answers. It is called before a request whose answer may take any time.
func (c *Client) checkAlive(ctx context.Context) error {
	alive, err := c.send(ctx, http.MethodHead, "/v1/status", nil, nil, silenceTimeout)
	if err != nil {
		return err
	}
	return alive.Body.Close()
}

func (c *Client) call(ctx context.Context, method, path string, query url.Values, body, out any) error {
	return c.callWithin(ctx, silenceTimeout, method, path, query, body, out)
}

// callWithin makes a request and decodes its answer. quiet is how long the server may take to begin or continue its
// answer; 0 means any time.
func (c *Client) callWithin(
	ctx context.Context, quiet time.Duration, method, path string, query url.Values, body, out any,
) error {
	resp, err := c.send(ctx, method, path, query, body, quiet)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return c.requestError(ctx, err)
	}
	if len(answer) > maxAnswer {
		return fmt.Errorf("control socket %s answers with more than %d MiB", c.path, maxAnswer>>20)
	}
	return c.decode(answer, out)
}

// stream makes a request whose answer begins at once and continues as a stream of lines.
func (c *Client) stream(ctx context.Context, method, path string, query url.Values, body any) (*http.Response, error) {
	resp, err := c.send(ctx, method, path, query, body, silenceTimeout)
	if err == nil {
		resp.Body.(*answerBody).timer.setTimeout(0)
	}
	return resp, err
}

// upgradeRetries is how often a request is repeated during an upgrade, until the successor accepts.
const upgradeRetries = 50

// send makes a request and returns its answer; a problem is returned as an error. It retries during an upgrade. The
// process that is replaced refuses requests, or closes a connection that it accepted in the last moment. Only a GET is
// repeated after that, because the server may have carried out another request.
func (c *Client) send(
	ctx context.Context, method, path string, query url.Values, body any, quiet time.Duration,
) (resp *http.Response, err error) {
	for range upgradeRetries {
		resp, err = c.sendOnce(ctx, method, path, query, body, quiet)
		if !isUpgraded(err) && (method != http.MethodGet || !closedUnanswered(err)) {
			break
		}
		select {
		case <-time.After(busyRetry):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	return resp, err
}

func (c *Client) sendOnce(
	ctx context.Context, method, path string, query url.Values, body any, quiet time.Duration,
) (*http.Response, error) {
	var content io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return nil, fmt.Errorf("encoding the request: %w", err)
		}
		content = bytes.NewReader(encoded)
	}
	target := url.URL{Scheme: "http", Host: "echod", Path: path, RawQuery: query.Encode()}
	watched, watch := withSilenceTimer(ctx, quiet)
	req, err := http.NewRequestWithContext(watched, method, target.String(), content)
	if err != nil {
		watch.stop()
		return nil, fmt.Errorf("making the request: %w", err)
	}
	if c.Claims != "" {
		req.Header.Set(claimsHeader, c.Claims)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		defer watch.stop()
		return nil, c.requestError(watched, err)
	}
	watch.reset()
	resp.Body = &answerBody{ReadCloser: resp.Body, ctx: watched, timer: watch}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	var problem Problem
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(&problem); err != nil || problem.Type == "" {
		return nil, fmt.Errorf("control socket %s answers %s", c.path, text.Printable(shorten(resp.Status)))
	}
	return nil, &problem
}

// silenceTimer ends a request's context when the server has sent nothing for too long.
type silenceTimer struct {
	cancel  context.CancelCauseFunc
	timer   *time.Timer
	timeout time.Duration // 0 means none
}

func withSilenceTimer(ctx context.Context, timeout time.Duration) (context.Context, *silenceTimer) {
	ctx, cancel := context.WithCancelCause(ctx)
	const never = time.Duration(math.MaxInt64) // until reset
	w := &silenceTimer{cancel: cancel, timer: time.AfterFunc(never, func() { cancel(errNoAnswer) }), timeout: timeout}
	w.reset()
	return ctx, w
}

func (w *silenceTimer) setTimeout(timeout time.Duration) {
	w.timeout = timeout
	w.reset()
}

// reset restarts the time limit.
func (w *silenceTimer) reset() {
	if w.timeout == 0 {
		w.timer.Stop()
		return
	}
	w.timer.Reset(w.timeout)
}

func (w *silenceTimer) stop() {
	w.timer.Stop()
	w.cancel(nil)
}

// answerBody is the body of an answer that must not stall.
type answerBody struct {
	io.ReadCloser
	ctx   context.Context
	timer *silenceTimer
}

// Read fails with errNoAnswer when the server has sent nothing for too long.
func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if n > 0 {
		b.timer.reset()
	}
	if err != nil && errors.Is(context.Cause(b.ctx), errNoAnswer) {
		err = errNoAnswer
	}
	return n, err
}

// Close ends the request.
func (b *answerBody) Close() error {
	defer b.timer.stop()
	return b.ReadCloser.Close()
}

// requestError returns the error for a request that could not be sent, or whose answer could not be read.
func (c *Client) requestError(ctx context.Context, err error) error {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errNoAnswer):
		err = cause
	case cause != nil:
		return cause
	}
	if ue, ok := errors.AsType[*url.Error](err); ok {
		err = ue.Err
	}
	return &UnreachableError{Path: c.path, Err: err}
}

// newLines returns a scanner for the lines of a stream. It drops an incomplete last line.
func newLines(r io.Reader) *bufio.Scanner {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	lines.Split(func(data []byte, _ bool) (advance int, token []byte, err error) {
		if end := bytes.IndexByte(data, '\n') + 1; end > 0 {
			return end, data[:end], nil
		}
		return 0, nil, nil
	})
	return lines
}

func (c *Client) readLine(ctx context.Context, lines *bufio.Scanner, out any) error {
	if lines.Scan() {
		return c.decode(bytes.Clone(lines.Bytes()), out)
	}
	err := lines.Err()
	if errors.Is(err, bufio.ErrTooLong) {
		return fmt.Errorf("control socket %s answers with a line of more than %d MiB", c.path, maxLine>>20)
	}
	return c.requestError(ctx, cmp.Or(err, io.EOF))
}

func (c *Client) decode(answer []byte, out any) error {
	if err := json.Unmarshal(answer, out); err != nil {
		return fmt.Errorf("control socket %s answers with something other than the control API: %w", c.path, err)
	}
	if c.OnAnswer != nil {
		c.OnAnswer(answer)
	}
	return nil
}
