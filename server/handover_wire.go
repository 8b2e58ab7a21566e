package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"
)

// handoverFormat is the version of the format. Fields may be added without a new one: unknown fields are ignored.
const handoverFormat = 1

// handoverBatch is how many descriptors go with one message: SCM_MAX_FD of unix(7) allows 253.
const handoverBatch = 200

// The messages. The predecessor sends an offer, and the successor answers that it is ready. Then come any number of
// batches of connections, the final state, and the commit, each acknowledged. After the commit the predecessor reports
// the ends of connections that stayed behind, and drains that were asked for in the meantime.
const (
	msgOffer  = "offer"
	msgReady  = "ready"
	msgConns  = "conns"
	msgFinal  = "final"
	msgCommit = "commit"
	msgAck    = "ack"
	msgError  = "error"
	msgEnded  = "ended"
	msgDrain  = "drain"

	msgHoldConns = "hold-conns"
)

// handoverMessage is any message. The comments say which have a field.
type handoverMessage struct {
	Type  string `json:"type"`
	Error string `json:"error,omitempty"` // error

	Format    int                `json:"format,omitempty"` // offer
	Program   string             `json:"program,omitempty"`
	Data      []byte             `json:"data,omitempty"`
	Listeners []handoverListener `json:"listeners,omitempty"` // their descriptors come first,
	Extra     []string           `json:"extra,omitempty"`     // then those of the extra ones

	Conns []handoverConn `json:"conns,omitempty"` // conns: one descriptor each; final: all that are handed over

	Behind      []handoverBehind  `json:"behind,omitempty"` // final
	LastID      uint64            `json:"last_id,omitempty"`
	LastHold    uint64            `json:"last_hold,omitempty"`
	Accepted    uint64            `json:"accepted,omitempty"`
	BytesIn     uint64            `json:"bytes_in,omitempty"`
	BytesOut    uint64            `json:"bytes_out,omitempty"`
	Closed      map[string]uint64 `json:"closed,omitempty"`
	Transitions map[string]uint64 `json:"transitions,omitempty"`
	Holds       []HoldInfo        `json:"holds,omitempty"`
	Settings    []handoverSetting `json:"settings,omitempty"` // those that were changed at runtime
	Recent      []handoverClosed  `json:"recent,omitempty"`

	NoticesSent   uint64 `json:"notices_sent,omitempty"`
	NoticesFailed uint64 `json:"notices_failed,omitempty"`

	FirstEvent uint64 `json:"first_event,omitempty"`
	LastEvent  uint64 `json:"last_event,omitempty"`

	HoldIDs []string `json:"hold_ids,omitempty"` // hold-conns: one descriptor each

	Ends  []handoverEnd `json:"ends,omitempty"`  // ended
	Drain *DrainOptions `json:"drain,omitempty"` // drain
	Force bool          `json:"force,omitempty"`
}

type handoverListener struct {
	Address   string `json:"address"`
	Inherited bool   `json:"inherited,omitempty"`
}

// handoverSetting is a setting that was changed; see Settings.Set.
type handoverSetting struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// handoverConn is a connection that is handed over.
type handoverConn struct {
	ID            uint64            `json:"id"`
	Listener      int               `json:"listener"` // index in the offer
	Waiting       bool              `json:"waiting,omitempty"`
	Opened        time.Time         `json:"opened"`
	Active        time.Time         `json:"active"`
	BytesIn       uint64            `json:"bytes_in,omitempty"`
	BytesOut      uint64            `json:"bytes_out,omitempty"`
	LastByte      byte              `json:"last_byte,omitempty"`
	WriteClosed   bool              `json:"write_closed,omitempty"`
	Notified      bool              `json:"notified,omitempty"`
	Remote        string            `json:"remote,omitempty"` // where it differs from the socket's
	Labels        map[string]string `json:"labels,omitempty"`
	ReadDeadline  time.Time         `json:"read_deadline,omitzero"`
	WriteDeadline time.Time         `json:"write_deadline,omitzero"`
	DrainDeadline time.Time         `json:"drain_deadline,omitzero"`
	DrainReason   string            `json:"drain_reason,omitempty"`
	DrainClosed   string            `json:"drain_closed,omitempty"` // the close reason at the deadline
	State         []byte            `json:"state,omitempty"`        // of the handler
	Unsent        []byte            `json:"unsent,omitempty"`       // of notices; goes first
}

// handoverBehind is a connection that stays with the predecessor.
type handoverBehind struct {
	ID     uint64    `json:"id"`
	Remote string    `json:"remote"`
	Opened time.Time `json:"opened"`
	Why    string    `json:"why"`

	// When it was handed over. The successor counts them until it learns the final figures.
	BytesIn  uint64 `json:"bytes_in,omitempty"`
	BytesOut uint64 `json:"bytes_out,omitempty"`
}

// handoverEnd is the end of one that stayed behind.
type handoverEnd struct {
	ID       uint64 `json:"id"`
	Reason   string `json:"reason"`
	BytesIn  uint64 `json:"bytes_in,omitempty"`
	BytesOut uint64 `json:"bytes_out,omitempty"`
}

// handoverClosed is a ClosedConn.
type handoverClosed struct {
	ID       uint64            `json:"id"`
	Remote   string            `json:"remote"`
	Local    string            `json:"local"`
	Opened   time.Time         `json:"opened"`
	Closed   time.Time         `json:"closed"`
	Reason   string            `json:"reason"`
	BytesIn  uint64            `json:"bytes_in,omitempty"`
	BytesOut uint64            `json:"bytes_out,omitempty"`
	Notified bool              `json:"notified,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	Err      string            `json:"err,omitempty"`
}

func recordClosed(c ClosedConn) handoverClosed {
	r := handoverClosed{
		ID: c.ID, Remote: c.Remote.String(), Local: c.Local.String(), Opened: c.Opened, Closed: c.Closed,
		Reason:  c.Reason.String(),
		BytesIn: c.BytesIn, BytesOut: c.BytesOut, Notified: c.Notified, Labels: c.Labels,
	}
	if c.Err != nil {
		r.Err = c.Err.Error()
	}
	return r
}

func (r handoverClosed) conn() ClosedConn {
	c := ClosedConn{
		ID: r.ID, Remote: wireAddr(r.Remote), Local: wireAddr(r.Local), Opened: r.Opened, Closed: r.Closed,
		Reason:  parseReason(r.Reason),
		BytesIn: r.BytesIn, BytesOut: r.BytesOut, Notified: r.Notified, Labels: r.Labels,
	}
	if r.Err != "" {
		c.Err = errors.New(r.Err)
	}
	return c
}

// parseReason is the inverse of Reason.String. A reason that this version does not know counts as ReasonLost.
func parseReason(name string) Reason {
	for _, r := range Reasons() {
		if r.String() == name {
			return r
		}
	}
	return ReasonLost
}

// wireAddr is an address as it was sent.
type wireAddr string

func (a wireAddr) Network() string { return "tcp" }
func (a wireAddr) String() string  { return string(a) }

// parseAddr returns the TCP address in s, or one that only has the text.
func parseAddr(s string) net.Addr {
	if addr, err := net.ResolveTCPAddr("tcp", s); err == nil && addr.IP != nil {
		return addr
	}
	return wireAddr(s)
}

func receiveMessage(link Link) (m handoverMessage, files []any, err error) {
	payload, files, err := link.Receive()
	if err != nil {
		return m, nil, err
	}
	if err := json.Unmarshal(payload, &m); err != nil {
		return m, files, fmt.Errorf("reading a handover message: %w", err)
	}
	return m, files, nil
}
