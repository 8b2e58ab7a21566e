package control

import (
	"bytes"
	"cmp"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"maps"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	humanize "github.com/dustin/go-humanize"

	"echod/internal/text"
	"echod/server"
)

// The status page, at / of a Plane made by NewWeb. The server renders it, and escapes texts from clients and operators. The
// page's script only replaces sections by new ones from the server. Without the script the page does not update itself.

//go:embed page
var pageFiles embed.FS

// pagePolicy is the Content-Security-Policy. It lets the browser load only the page's own files.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"form-action 'self'; base-uri 'none'; frame-ancestors 'none'; " +
	"require-trusted-types-for 'script'; trusted-types echod"

const (
	pageConns   = 50          // connections shown
	pageEvery   = time.Second // between two updates
	pageRest    = 50          // minimum pause after an update, as a multiple of the time that the update took
	pageMaxText = 100         // maximum length of a search, in bytes
)

var pageTemplate = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"comma": formatCount,
	"count": text.Count[int],
}).ParseFS(pageFiles, "page/page.html"))

// formatCount formats an int or a uint64 with separators.
func formatCount(n any) string {
	if unsigned, ok := n.(uint64); ok {
		return humanize.Comma(int64(unsigned))
	}
	return humanize.Comma(int64(n.(int)))
}

// pageRoutes returns the routes of the page, its files and its updates.
func (p *Plane) pageRoutes() []route {
	routes := []route{
		{http.MethodGet, "/{$}", p.getPage},
		{http.MethodGet, "/page/events", p.getPageEvents},
	}
	for _, name := range []string{"page.css", "page.js", "icon.svg"} {
		routes = append(routes, route{http.MethodGet, "/page/" + name, getPageFile})
	}
	return routes
}

// pageQuery holds the values of the page's form.
type pageQuery struct {
	Text string // part of a connection's id, address, state or label
	Sort string
}

// pageSorts are the orders of the connections. The first one is the default.
var pageSorts = []string{"oldest", "newest", "idle", "bytes"}

func decodePageQuery(r *http.Request) (q pageQuery, err error) {
	q.Sort = pageSorts[0]
	anyText := func(raw json.RawMessage) error { // decodeQuery passes 42 as a number, but a search is always text
		if json.Unmarshal(raw, &q.Text) != nil {
			q.Text = string(raw)
		}
		if len(q.Text) > pageMaxText {
			return fmt.Errorf("more than %d bytes", pageMaxText)
		}
		return nil
	}
	sort := func(raw json.RawMessage) error {
		if json.Unmarshal(raw, &q.Sort) != nil || !slices.Contains(pageSorts, q.Sort) {
			return errors.New(shorten(string(raw)) + " is not one of " + strings.Join(pageSorts, ", "))
		}
		return nil
	}
	return q, decodeQuery(r, fields{"q": anyText, "sort": sort})
}

func (p *Plane) getPage(w *response, r *http.Request) error {
	q, err := decodePageQuery(r)
	if err != nil {
		return err
	}
	var page bytes.Buffer
	if err := pageTemplate.Execute(&page, p.view(q)); err != nil {
		return fmt.Errorf("rendering the status page: %w", err)
	}
	pageHeaders(w.Header(), "text/html; charset=utf-8")
	_, _ = w.Write(page.Bytes()) // an error means that the caller has left
	return nil
}

func pageHeaders(h http.Header, contentType string) {
	h.Set("Content-Type", contentType)
	h.Set("Content-Security-Policy", pagePolicy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cache-Control", "no-store") // an upgrade may change the page
}

func getPageFile(w *response, r *http.Request) error {
	file, err := pageFiles.ReadFile(r.URL.Path[1:])
	if err != nil {
		return fmt.Errorf("reading a file of the status page: %w", err)
	}
	types := map[string]string{
		".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
	}
	pageHeaders(w.Header(), types[path.Ext(r.URL.Path)])
	_, _ = w.Write(file) // an error means that the caller has left
	return nil
}

// getPageEvents sends the sections of the page that have changed, as server-sent events (HTML standard, section 9.2).
func (p *Plane) getPageEvents(w *response, r *http.Request) error {
	q, err := decodePageQuery(r)
	if err != nil {
		return err
	}
	s, err := p.stream(w, r, false)
	if err != nil {
		return err
	}
	pageHeaders(s.Header(), "text/event-stream")
	s.WriteHeader(http.StatusOK)
	if _, err := fmt.Fprint(s.response, "retry: 2000\n\n"); err != nil {
		return nil // the caller has left
	}

	sent := map[string]string{}
	update := func() error {
		view := p.view(q)
		events := map[string]string{"title": view.Title()}
		for _, section := range []string{"state", "limits", "traffic", "connections", "closed"} {
			var html strings.Builder
			if err := pageTemplate.ExecuteTemplate(&html, section, view); err != nil {
				return fmt.Errorf("rendering the status page: %w", err)
			}
			events[section] = html.String()
		}
		var out bytes.Buffer
		for _, name := range slices.Sorted(maps.Keys(events)) {
			if sent[name] == events[name] {
				continue
			}
			sent[name] = events[name]
			event := "section"
			if name == "title" {
				event = name
			}
			data, _ := json.Marshal(events[name]) // a string can always be encoded
			fmt.Fprintf(&out, "event: %s\ndata: %s\n\n", event, data)
		}
		if out.Len() == 0 {
			out.WriteString(":\n\n") // shows that the connection is alive
		}
		return s.sendBytes(p, out.Bytes())
	}
	for {
		began := time.Now()
		if update() != nil {
			return nil // the caller has left
		}
		next := time.NewTimer(max(pageEvery, pageRest*time.Since(began)))
		select {
		case <-next.C:
		case <-s.ctx.Done():
			next.Stop()
			return nil
		}
	}
}

// pageView holds the values that the page shows.
type pageView struct {
	Version string
	Query   pageQuery
	Sorts   []string
	Status  server.Status
	Summary string
	Why     []string
	Holds   []pageHold
	Act     []pageAction
	Limits  []pageLimit
	Traffic traffic
	Found   string
	Conns   []pageConn
	Since   string

	ClosedTotal uint64
	Closed      []pageReason
}

type (
	pageHold struct{ ID, Reason, Clients, Since, Ends, By string }

	// pageAction is a command that the page suggests to the operator.
	pageAction struct{ To, Command string }

	// pageLimit is a figure and its limit; 0 means no limit.
	pageLimit struct {
		What       string
		Now, Limit uint64
		Then       string // what happens at the limit
	}

	pageConn struct {
		ID                                uint64
		Remote, State, Open, Idle, Labels string
		In, Out                           uint64
		Told                              bool
	}

	pageReason struct {
		Reason  server.Reason
		Count   uint64
		Meaning string
	}
)

// High returns the value above which the figure is close to its limit.
func (l pageLimit) High() uint64 { return l.Limit * 9 / 10 }

// Percent returns the used part of the limit, in percent.
func (l pageLimit) Percent() uint64 { return l.Now * 100 / max(1, l.Limit) }

// Title returns the document's title.
func (v pageView) Title() string {
	return fmt.Sprintf("%s · %s · echod", v.Status.State, text.Count(v.Status.Connections, "connection"))
}

// view returns the current values of the page.
func (p *Plane) view(q pageQuery) pageView {
	p.history.addSample()
	now, st := time.Now(), p.srv.Status()
	v := pageView{
		Version: p.version, Query: q, Sorts: pageSorts, Status: st, Traffic: p.history.traffic(),
		Since: st.Started.Format("2006-01-02 15:04:05 MST"),
	}
	v.describeState(now)
	v.listLimits()
	v.listConns(p.srv, now)
	for _, why := range server.Reasons() {
		if n := st.Closed[why]; n > 0 {
			v.ClosedTotal += n
			v.Closed = append(v.Closed, pageReason{why, n, reasonMeanings[why]})
		}
	}
	slices.SortStableFunc(v.Closed, func(a, b pageReason) int { return cmp.Compare(b.Count, a.Count) })
	return v
}

// describeState describes the state of the server, the reason, the end, and commands that change it.
func (v *pageView) describeState(now time.Time) {
	st := v.Status
	connected := text.Count(st.Connections, "client") + " connected"
	switch st.State {
	case server.StateStarting:
		v.Summary = "The server does not accept connections yet."
	case server.StateRunning:
		v.Summary = "New clients are served. " + connected + "."
		if st.Full {
			v.Summary = "The connection limit is reached. " + connected + "."
		}
		v.Act = []pageAction{{"Stop accepting for a while", "echod ctl pause"}, {"Shut down", "echod ctl shutdown"}}
	case server.StatePaused:
		v.Summary = "New clients are not served. " + connected + "."
		v.Act = []pageAction{{"Shut down", "echod ctl shutdown"}}
	case server.StateDraining:
		v.Summary = "The server is shutting down. " + connected + "."
		v.Act = []pageAction{
			{"Shorten the time", "echod ctl shutdown --grace 5s"}, {"Close everything now", "echod ctl shutdown --now"},
		}
	case server.StateStopped:
		v.Summary = "The server has stopped."
	}
	if st.State == server.StateRunning {
		for _, l := range st.ReachedLimits {
			v.Why = append(v.Why, wireReachedLimit(l).String()+".")
		}
	}
	for _, h := range st.Holds {
		v.Holds = append(v.Holds, newPageHold(h, now))
	}
	if d := st.Drain; d != nil && st.State == server.StateDraining {
		v.Why = append(v.Why, fmt.Sprintf("Reason: %s.", d.Reason))
		if d.AcceptUntil.After(now) {
			v.Why = append(v.Why, "New clients are served for another "+formatDuration(d.AcceptUntil.Sub(now))+". Nobody has been told yet.")
		}
		v.Why = append(v.Why, fmt.Sprintf("Clients that stay are closed in %s. %s told, %s could not be told.",
			formatDuration(max(0, d.Deadline.Sub(now))), text.Count(d.Notified, "client"), formatCount(d.NoticeFailed)))
	}
	if st.KeptByPredecessor > 0 {
		v.Why = append(v.Why, "The program was upgraded. Its predecessor still serves "+text.Count(st.KeptByPredecessor, "connection")+".")
	}
}

func newPageHold(h server.HoldInfo, now time.Time) pageHold {
	hold := pageHold{
		ID: h.ID, Reason: h.Reason, Since: formatDuration(now.Sub(h.Since)) + " ago", Ends: "when it is released",
		Clients: map[server.PauseMode]string{
			server.PauseQueue: "wait in the accept queue", server.PauseReject: "are rejected",
		}[h.Mode],
	}
	if !h.Expires.IsZero() {
		hold.Ends = "in " + formatDuration(max(0, h.Expires.Sub(now)))
	}
	if h.By.PID != 0 {
		hold.By = fmt.Sprintf("uid %d, pid %d", h.By.UID, h.By.PID)
		if h.By.User != "" {
			hold.By = fmt.Sprintf("%s (%s)", h.By.User, hold.By)
		}
	}
	return hold
}

func (v *pageView) listLimits() {
	st := v.Status
	served := uint64(st.Phases[server.PhaseServing])
	then := "new clients wait in the accept queue"
	if st.AtLimit == server.LimitReject {
		then = "new clients are told BUSY and closed"
	}
	v.Limits = append(v.Limits, pageLimit{"Connections served", served, uint64(st.MaxConns), then})
	for _, ln := range st.Listeners {
		if ln.AcceptQueue >= 0 {
			v.Limits = append(v.Limits, pageLimit{
				"Accept queue of " + ln.Address.String(), uint64(ln.AcceptQueue), uint64(ln.AcceptQueueLimit),
				"the kernel ignores new clients, which try again",
			})
		}
	}
}

func (v *pageView) listConns(srv *server.Server, now time.Time) {
	var found []server.ConnInfo
	all := 0
	for c := range srv.Conns() {
		all++
		if matchesSearch(c, v.Query.Text) {
			found = append(found, c)
		}
	}
	switch v.Query.Sort {
	case "newest":
		slices.Reverse(found)
	case "idle":
		slices.SortStableFunc(found, func(a, b server.ConnInfo) int { return cmp.Compare(b.Idle, a.Idle) })
	case "bytes":
		slices.SortStableFunc(found, func(a, b server.ConnInfo) int {
			return cmp.Compare(b.BytesIn+b.BytesOut, a.BytesIn+a.BytesOut)
		})
	}
	shown := found[:min(len(found), pageConns)]
	switch {
	case all == 0:
		v.Found = "No client is connected."
	case len(found) == 0:
		v.Found = "None of " + text.Count(all, "connection") + " matches."
	case len(found) < all:
		v.Found = fmt.Sprintf("%s of %s match, %s shown.", formatCount(len(found)), text.Count(all, "connection"), formatCount(len(shown)))
	default:
		v.Found = fmt.Sprintf("%s, %s shown.", text.Count(all, "connection"), formatCount(len(shown)))
	}
	for _, c := range shown {
		v.Conns = append(v.Conns, pageConn{
			ID: c.ID, Remote: c.Remote.String(), State: c.Phase.String(), Open: formatDuration(now.Sub(c.Opened)),
			Idle: formatDuration(c.Idle), In: c.BytesIn, Out: c.BytesOut, Told: c.Notified, Labels: labelText(c.Labels),
		})
	}
}

// matchesSearch reports whether a connection's id is the searched text, or its address, state or labels contain the text.
func matchesSearch(c server.ConnInfo, wanted string) bool {
	if wanted == "" || strconv.FormatUint(c.ID, 10) == wanted {
		return true
	}
	wanted = strings.ToLower(wanted)
	return strings.Contains(strings.ToLower(c.Remote.String()), wanted) || strings.Contains(c.Phase.String(), wanted) ||
		strings.Contains(strings.ToLower(labelText(c.Labels)), wanted)
}

func labelText(labels map[string]string) string {
	var all []string
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		all = append(all, key+"="+labels[key])
	}
	return strings.Join(all, ", ")
}

// formatDuration formats a duration, such as 3 s, 4 min 5 s or 2 h 3 min.
func formatDuration(d time.Duration) string {
	s := int64(d.Round(time.Second) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%d s", s)
	case s < 3600:
		return fmt.Sprintf("%d min %d s", s/60, s%60)
	case s < 24*3600:
		return fmt.Sprintf("%d h %d min", s/3600, s/60%60)
	default:
		return fmt.Sprintf("%d d %d h", s/(24*3600), s/3600%24)
	}
}

// reasonMeanings explains the close reasons.
var reasonMeanings = map[server.Reason]string{
	server.ReasonClientClosed:         "the client ended its stream",
	server.ReasonClientLeft:           "the client ended its stream after it was told to leave",
	server.ReasonClientReset:          "the connection broke",
	server.ReasonIdleTimeout:          "no byte moved for the idle timeout",
	server.ReasonStalled:              "the client took nothing for the stall timeout while data waited for it",
	server.ReasonHandlerDone:          "the handler was done",
	server.ReasonHandlerError:         "the handler returned an error",
	server.ReasonHandlerPanic:         "the handler panicked",
	server.ReasonKilled:               "an operator closed it",
	server.ReasonRejectedPaused:       "rejected: the server was paused",
	server.ReasonRejectedAddressLimit: "rejected: its address or user has too many connections",
	server.ReasonRejectedRate:         "rejected: too many new connections in a short time",
	server.ReasonRejectedDenied:       "rejected: its address may not connect",
	server.ReasonRejectedLimit:        "rejected: a limit was reached",
	server.ReasonRejectedDraining:     "rejected: the server was shutting down",
	server.ReasonRejectedHandshake:    "a trusted proxy sent no valid PROXY header",
	server.ReasonDeadline:             "stayed until the end of the grace period",
	server.ReasonForced:               "closed by a forced shutdown",
	server.ReasonLost:                 "stayed with the predecessor of an upgrade, which died",
	server.ReasonHandshakeFailed:      "the TLS handshake failed or took too long",
	server.ReasonEvicted:              "stayed until the end of its grace period after a pause that evicts clients",
	server.ReasonMaxAge:               "stayed until the end of its grace period after it had reached the maximum age",
}
