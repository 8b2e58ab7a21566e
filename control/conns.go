package control

import (
	"bufio"
	"cmp"
	"container/heap"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"echod/server"
)

// Lists of connections: filters, order and pages.

// ConnFilter selects the connections that match all of it. The zero value selects all.
type ConnFilter struct {
	Remote   []string      // the client's address is in one of these ranges; "unix" is clients of Unix sockets
	MinIdle  time.Duration // no byte has moved for at least this long
	Identity string        // the client's certificate has this name; * stands for any text
}

func (f ConnFilter) query() url.Values {
	query := url.Values{}
	if len(f.Remote) > 0 {
		query.Set("remote", strings.Join(f.Remote, ","))
	}
	if f.MinIdle != 0 {
		query.Set("min_idle", f.MinIdle.String())
	}
	if f.Identity != "" {
		query.Set("identity", f.Identity)
	}
	return query
}

// connFilter is a ConnFilter as requests have it.
type connFilter struct {
	remote   []netip.Prefix
	unix     bool
	minIdle  time.Duration
	identity string
	given    bool // a filter is in the request
}

// fields returns the filter's parameters, and more.
func (f *connFilter) fields(more fields) fields {
	for name, decode := range map[string]decoder{
		"remote": f.decodeRemote, "min_idle": durationField(&f.minIdle), "identity": lineField(&f.identity),
	} {
		more[name] = func(raw json.RawMessage) error {
			f.given = true
			return decode(raw)
		}
	}
	return more
}

// decodeRemote takes ranges that are separated by commas.
func (f *connFilter) decodeRemote(raw json.RawMessage) error {
	var list string
	if err := unmarshal(raw, &list, "a range such as 10.0.0.0/8"); err != nil {
		return err
	}
	for part := range strings.SplitSeq(list, ",") {
		if part == "unix" {
			f.unix = true
			continue
		}
		r, err := server.ParseRange(part)
		if err != nil {
			return err
		}
		f.remote = append(f.remote, r)
	}
	return nil
}

func (f *connFilter) matches(c server.ConnInfo) bool {
	return c.Idle >= f.minIdle && f.matchesRemote(c.Remote) && hasIdentity(c, f.identity)
}

func (f *connFilter) matchesRemote(remote net.Addr) bool {
	if len(f.remote) == 0 && !f.unix {
		return true
	}
	if remote.Network() == "unix" {
		return f.unix
	}
	addr := ipOf(remote)
	return slices.ContainsFunc(f.remote, func(r netip.Prefix) bool { return r.Contains(addr) })
}

// ipOf returns the IP address in a, or the zero Addr if there is none.
func ipOf(a net.Addr) netip.Addr {
	if tcp, ok := a.(*net.TCPAddr); ok {
		return tcp.AddrPort().Addr().Unmap().WithZone("")
	}
	ap, _ := netip.ParseAddrPort(a.String())
	return ap.Addr().Unmap().WithZone("")
}

// connOrders are the orders of a list of connections. A list is sorted by the key, and by id where keys are equal.
var connOrders = map[string]func(server.ConnInfo) uint64{
	"opened": func(server.ConnInfo) uint64 { return 0 },
	"idle":   func(c server.ConnInfo) uint64 { return uint64(max(0, c.Active.UnixNano())) }, // the idlest first
	"in":     func(c server.ConnInfo) uint64 { return math.MaxUint64 - c.BytesIn },          // the most first
	"out":    func(c server.ConnInfo) uint64 { return math.MaxUint64 - c.BytesOut },
}

const orderNames = "opened, idle, in or out"

// maxPage bounds a page in another order than opened, because such a page is kept in memory.
const maxPage = 1000

// listPosition is the position of a connection in a list. A cursor is the position of the last connection of a page.
type listPosition struct {
	Sort string `json:"s"`
	Key  uint64 `json:"k"`
	ID   uint64 `json:"i"`
}

func (p listPosition) compare(q listPosition) int {
	return cmp.Or(cmp.Compare(p.Key, q.Key), cmp.Compare(p.ID, q.ID))
}

func (p listPosition) cursor() string {
	text, _ := json.Marshal(p) // encoding this type cannot fail
	return base64.RawURLEncoding.EncodeToString(text)
}

func decodeCursor(to *listPosition) decoder {
	return func(raw json.RawMessage) error {
		var s string
		err := json.Unmarshal(raw, &s)
		if err == nil {
			raw, err = base64.RawURLEncoding.DecodeString(s)
		}
		if err == nil {
			err = json.Unmarshal(raw, to)
		}
		if err != nil || to.ID == 0 {
			return errors.New("it is not the value of next in an earlier answer")
		}
		return nil
	}
}

func (p *Plane) getConns(w *response, r *http.Request) error {
	var filter connFilter
	limit, sort, after := -1, "", listPosition{}
	err := decodeQuery(r, filter.fields(fields{
		"limit": countField(&limit), "sort": lineField(&sort), "cursor": decodeCursor(&after),
	}))
	if err != nil {
		return err
	}
	sort = cmp.Or(sort, after.Sort, "opened")
	key := connOrders[sort]
	switch {
	case key == nil:
		return invalid("sort", "%q: want %s", shorten(sort), orderNames)
	case after.Sort != "" && after.Sort != sort:
		return invalid("cursor", "it belongs to a list in the order %s", shorten(after.Sort))
	case sort == "opened":
		p.streamConns(w, &filter, limit, after)
		return nil
	case limit < 0 || limit > maxPage:
		limit = maxPage
	}
	page := connPage{limit: limit}
	for c := range p.srv.Conns() {
		at := listPosition{sort, key(c), c.ID}
		if filter.matches(c) && (after.ID == 0 || at.compare(after) > 0) {
			page.add(at, c)
		}
	}
	list := newConnWriter(w)
	rows, more := page.sorted()
	for _, row := range rows {
		if list.add(wireConn(row.conn)) != nil {
			return nil // the caller has left
		}
	}
	if more && len(rows) > 0 {
		list.next = rows[len(rows)-1].position.cursor()
	}
	list.end()
	return nil
}

// streamConns writes a list in the order opened, without keeping it in memory.
func (p *Plane) streamConns(w *response, filter *connFilter, limit int, after listPosition) {
	list := newConnWriter(w)
	var last uint64
	for c := range p.srv.Conns() {
		if c.ID <= after.ID || !filter.matches(c) {
			continue
		}
		if limit >= 0 && list.length >= limit {
			if last > 0 {
				list.next = listPosition{Sort: "opened", ID: last}.cursor()
			}
			break
		}
		if last = c.ID; list.add(wireConn(c)) != nil {
			return // the caller has left
		}
	}
	list.end()
}

// connPage holds the first connections of a list, up to limit. It is a heap with the last of them on top.
type connPage struct {
	limit int
	more  bool // there are more than limit
	rows  []pageRow
}

type pageRow struct {
	position listPosition
	conn     server.ConnInfo
}

func (p *connPage) add(at listPosition, c server.ConnInfo) {
	switch {
	case len(p.rows) < p.limit:
		heap.Push(p, pageRow{at, c})
		return
	case p.limit > 0 && at.compare(p.rows[0].position) < 0:
		p.rows[0] = pageRow{at, c}
		heap.Fix(p, 0)
	}
	p.more = true
}

func (p *connPage) sorted() (rows []pageRow, more bool) {
	slices.SortFunc(p.rows, func(a, b pageRow) int { return a.position.compare(b.position) })
	return p.rows, p.more
}

// Len, Less, Swap, Push and Pop implement heap.Interface.
func (p *connPage) Len() int           { return len(p.rows) }
func (p *connPage) Less(i, j int) bool { return p.rows[i].position.compare(p.rows[j].position) > 0 }
func (p *connPage) Swap(i, j int)      { p.rows[i], p.rows[j] = p.rows[j], p.rows[i] }
func (p *connPage) Push(row any)       { p.rows = append(p.rows, row.(pageRow)) }
func (p *connPage) Pop() any           { panic("a page only grows") }

// connWriter writes the JSON of Conns one connection at a time, so that a list of any length takes little memory.
type connWriter struct {
	out    *bufio.Writer
	lines  *json.Encoder
	length int
	next   string
}

func newConnWriter(w http.ResponseWriter) *connWriter {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := bufio.NewWriterSize(w, 32<<10)
	_, _ = out.WriteString(`{"connections":[`) // a bufio.Writer keeps its first error for Flush
	return &connWriter{out: out, lines: json.NewEncoder(out)}
}

// add writes c. An error means that the caller has left.
func (l *connWriter) add(c Conn) error {
	if l.length > 0 {
		_ = l.out.WriteByte(',')
	}
	l.length++
	return l.lines.Encode(c)
}

func (l *connWriter) end() {
	_ = l.out.WriteByte(']')
	if l.next != "" {
		_, _ = fmt.Fprintf(l.out, `,"next":%q`, l.next)
	}
	_, _ = l.out.WriteString("}\n")
	_ = l.out.Flush()
}

func (p *Plane) deleteConns(w *response, r *http.Request) error {
	var all bool
	var filter connFilter
	if err := decodeQuery(r, filter.fields(fields{"all": boolField(&all)})); err != nil {
		return err
	}
	if all == filter.given {
		return invalid("all", "want either all=true, or one or more of remote, min_idle and identity")
	}
	n := p.srv.KillFunc(filter.matches)
	return p.answerChange(w, Change{Changed: n > 0, Killed: &n})
}

// Peer sums up the connections of one client address.
type Peer struct {
	Address     string    `json:"address"` // an IPv4 address, an IPv6 prefix, or uid=N for a Unix socket
	Connections int       `json:"connections"`
	Oldest      time.Time `json:"oldest"`
	IdleSeconds float64   `json:"idle_seconds"` // of the least idle connection
	BytesIn     uint64    `json:"bytes_in"`
	BytesOut    uint64    `json:"bytes_out"`
}

// Peers answers GET /v1/clients. Addresses with the most connections come first.
type Peers struct {
	Clients []Peer `json:"clients"`
	Total   int    `json:"total"` // number of addresses, including those beyond the limit
}

func (p *Plane) getClients(w *response, r *http.Request) error {
	var filter connFilter
	limit := -1
	if err := decodeQuery(r, filter.fields(fields{"limit": countField(&limit)})); err != nil {
		return err
	}
	bits := p.srv.Settings().Limits.IPv6Prefix
	peers := map[string]*Peer{}
	for c := range p.srv.Conns() {
		if !filter.matches(c) {
			continue
		}
		address := peerAddress(c.Remote, bits)
		peer := peers[address]
		if peer == nil {
			peer = &Peer{Address: address, Oldest: c.Opened, IdleSeconds: c.Idle.Seconds()}
			peers[address] = peer
		}
		peer.Connections++
		peer.IdleSeconds = min(peer.IdleSeconds, c.Idle.Seconds())
		peer.BytesIn += c.BytesIn
		peer.BytesOut += c.BytesOut
	}
	out := Peers{Clients: []Peer{}, Total: len(peers)}
	for _, peer := range peers {
		out.Clients = append(out.Clients, *peer)
	}
	slices.SortFunc(out.Clients, func(a, b Peer) int {
		return cmp.Or(cmp.Compare(b.Connections, a.Connections), strings.Compare(a.Address, b.Address))
	})
	if limit >= 0 && limit < len(out.Clients) {
		out.Clients = out.Clients[:limit]
	}
	return answerJSON(w, http.StatusOK, out)
}

// peerAddress returns the address that identifies a client.
func peerAddress(remote net.Addr, ipv6Prefix int) string {
	if cred, ok := remote.(server.Credentials); ok {
		return "uid=" + strconv.Itoa(cred.UID)
	}
	addr := ipOf(remote)
	switch {
	case !addr.IsValid():
		return remote.Network()
	case addr.Is6() && ipv6Prefix < addr.BitLen():
		prefix, _ := addr.Prefix(ipv6Prefix)
		return prefix.String()
	}
	return addr.String()
}

// ListRequest selects connections for a list, and its order.
type ListRequest struct {
	ConnFilter
	Sort   string // "opened" (the default), "idle" (the idlest first), "in" or "out" (the most bytes first)
	Limit  int    // of a page; negative means all, or 1,000 in another order than opened
	Cursor string // Next of the previous page; empty means the first page
}

// ConnPage returns a page of the open connections. Connections that change their place in the order between two
// pages may be in both or in neither.
func (c *Client) ConnPage(ctx context.Context, req ListRequest) (out Conns, err error) {
	query := req.query()
	for name, value := range map[string]string{"sort": req.Sort, "cursor": req.Cursor} {
		if value != "" {
			query.Set(name, value)
		}
	}
	if req.Limit >= 0 {
		query.Set("limit", strconv.Itoa(req.Limit))
	}
	return out, c.call(ctx, http.MethodGet, "/v1/conns", query, nil, &out)
}

// Conns returns up to limit open connections that match the filter, the oldest first. A negative limit means all.
func (c *Client) Conns(ctx context.Context, limit int, filter ConnFilter) (out Conns, err error) {
	return c.ConnPage(ctx, ListRequest{ConnFilter: filter, Limit: limit})
}

// Clients returns up to limit client addresses that have connections matching the filter. A negative limit means all.
func (c *Client) Clients(ctx context.Context, limit int, filter ConnFilter) (out Peers, err error) {
	query := filter.query()
	if limit >= 0 {
		query.Set("limit", strconv.Itoa(limit))
	}
	return out, c.call(ctx, http.MethodGet, "/v1/clients", query, nil, &out)
}
