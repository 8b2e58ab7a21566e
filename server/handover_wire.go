package server

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"
)

// handoverFormat is the version of the format. Adding fields needs no new version, because readers ignore unknown
// fields. The offer has the same form in every version, so that a process can read the version of another.
const handoverFormat = 2

// handoverBatch is how many descriptors are sent with one message. SCM_MAX_FD of unix(7) allows 253.
const handoverBatch = 200

// The messages. The predecessor sends an offer, and the successor answers that it is ready. Then come any number of
// batches of connections, the final state, and the commit, each acknowledged. After the commit the predecessor reports
// the ends of connections that it keeps, and drains that were requested in the meantime.
//
// A message is a line of JSON, followed by the records of connections. Only the final state and the commit are sent
// while no connection is served. So the final state has the records of those connections only that have changed since
// they were sent ahead, and the records are binary.
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

// handoverMessage is any message. The comments say which types of message have a field.
type handoverMessage struct {
	Type  string `json:"type"`
	Error string `json:"error,omitempty"` // error

	Format    int                `json:"format,omitempty"` // offer
	Program   string             `json:"program,omitempty"`
	Data      []byte             `json:"data,omitempty"`
	Listeners []handoverListener `json:"listeners,omitempty"` // offer: their descriptors come first
	Extra     []string           `json:"extra,omitempty"`     // offer: their descriptors come after those of Listeners

	// ready: a connection that waits for admission can be handed over although it had a handshake: the successor knows
	// handoverConn.Submitted, and does not expect another one.
	KnowsSubmitted bool `json:"knows_submitted,omitempty"`

	Recent []handoverClosed `json:"recent,omitempty"` // conns, final: closed since the last message, newest first
	Gone   []uint64         `json:"gone,omitempty"`   // final: connections that were sent ahead and are not handed over
	Count  int              `json:"count,omitempty"`  // final: number of connections that are handed over

	Kept        []handoverKept    `json:"behind,omitempty"` // final
	LastID      uint64            `json:"last_id,omitempty"`
	LastHold    uint64            `json:"last_hold,omitempty"`
	Accepted    uint64            `json:"accepted,omitempty"`
	BytesIn     uint64            `json:"bytes_in,omitempty"`
	BytesOut    uint64            `json:"bytes_out,omitempty"`
	Closed      map[string]uint64 `json:"closed,omitempty"`
	Transitions map[string]uint64 `json:"transitions,omitempty"`
	Holds       []HoldInfo        `json:"holds,omitempty"`
	Settings    []handoverSetting `json:"settings,omitempty"` // those that were changed at runtime

	NoticesSent   uint64 `json:"notices_sent,omitempty"`
	NoticesFailed uint64 `json:"notices_failed,omitempty"`

	FirstEvent uint64            `json:"first_event,omitempty"`
	LastEvent  uint64            `json:"last_event,omitempty"`
	Events     []json.RawMessage `json:"events,omitempty"` // conns, final: those since the last message, oldest first

	HoldIDs []string `json:"hold_ids,omitempty"` // hold-conns: one descriptor each

	Ends  []handoverEnd `json:"ends,omitempty"`  // ended
	Drain *DrainOptions `json:"drain,omitempty"` // drain
	Force bool          `json:"force,omitempty"`

	records []byte // conns: one record for each descriptor; final: the records that have changed
}

// send sends the message with files.
func (m handoverMessage) send(link Link, files []any) error {
	payload, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(m.records) > 0 {
		payload = append(append(payload, '\n'), m.records...)
	}
	return link.Send(payload, files)
}

// receiveMessage receives a message and the files that came with it. After an error there are no files.
func receiveMessage(link Link) (m handoverMessage, files []any, err error) {
	payload, files, err := link.Receive()
	if err != nil {
		return m, nil, err
	}
	head, records, _ := bytes.Cut(payload, []byte{'\n'})
	if err := json.Unmarshal(head, &m); err != nil {
		closeFiles(files)
		return m, nil, fmt.Errorf("reading a handover message: %w", err)
	}
	m.records = records
	return m, files, nil
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

// handoverConn is the record of a connection that is handed over.
type handoverConn struct {
	ID                          uint64
	Listener                    int  // index in the offer
	Waiting                     bool // it is not admitted yet
	Submitted                   bool // its handshake is over, and it was published as opened
	Opened, Active              time.Time
	BytesIn, BytesOut           uint64
	LastByte                    byte
	WriteClosed                 bool
	Notified                    bool
	Remote                      string // set if it differs from the socket's remote address
	Labels                      map[string]string
	ReadDeadline, WriteDeadline time.Time
	DrainDeadline               time.Time
	DrainReason                 string
	DrainClosed                 string // the close reason at the deadline
	State                       []byte // of the handler
	Unsent                      []byte // rest of notices, which is sent first
}

// Tags of the fields of a record. They never change their meaning.
const (
	tagID = iota + 1
	tagListener
	tagWaiting
	tagOpened
	tagActive
	tagBytesIn
	tagBytesOut
	tagLastByte
	tagWriteClosed
	tagNotified
	tagRemote
	tagLabels
	tagReadDeadline
	tagWriteDeadline
	tagDrainDeadline
	tagDrainReason
	tagState
	tagUnsent
	tagDrainClosed
	tagSubmitted
)

// append appends the record to p. A field is a byte and a uvarint. The upper seven bits of the byte are the field's
// tag. If its lowest bit is 0, the uvarint is the value. If it is 1, the uvarint is the length of the value, which
// follows. Fields that are zero are left out. A reader skips tags that it does not know.
func (r *handoverConn) append(p []byte) []byte {
	number := func(tag byte, v uint64) {
		if v != 0 {
			p = binary.AppendUvarint(append(p, tag<<1), v)
		}
	}
	flag := func(tag byte, v bool) {
		if v {
			number(tag, 1)
		}
	}
	at := func(tag byte, t time.Time) {
		if !t.IsZero() {
			number(tag, uint64(t.UnixNano()))
		}
	}
	text := func(tag byte, v []byte) {
		if len(v) > 0 {
			p = append(binary.AppendUvarint(append(p, tag<<1|1), uint64(len(v))), v...)
		}
	}
	number(tagID, r.ID)
	number(tagListener, uint64(r.Listener))
	flag(tagWaiting, r.Waiting)
	at(tagOpened, r.Opened)
	at(tagActive, r.Active)
	number(tagBytesIn, r.BytesIn)
	number(tagBytesOut, r.BytesOut)
	number(tagLastByte, uint64(r.LastByte))
	flag(tagWriteClosed, r.WriteClosed)
	flag(tagNotified, r.Notified)
	text(tagRemote, []byte(r.Remote))
	if len(r.Labels) > 0 {
		labels, _ := json.Marshal(r.Labels) // encoding a map of strings cannot fail
		text(tagLabels, labels)
	}
	at(tagReadDeadline, r.ReadDeadline)
	at(tagWriteDeadline, r.WriteDeadline)
	at(tagDrainDeadline, r.DrainDeadline)
	text(tagDrainReason, []byte(r.DrainReason))
	text(tagState, r.State)
	text(tagUnsent, r.Unsent)
	text(tagDrainClosed, []byte(r.DrainClosed))
	flag(tagSubmitted, r.Submitted)
	return p
}

var errDamagedRecord = errors.New("the record of a connection is damaged")

// parse reads a record that append made, in this version or in another one.
func (r *handoverConn) parse(p []byte) error {
	for len(p) > 0 {
		key := p[0]
		v, n := binary.Uvarint(p[1:])
		if n <= 0 {
			return errDamagedRecord
		}
		p = p[1+n:]
		if key&1 == 0 {
			r.setNumber(key>>1, v)
			continue
		}
		if v > uint64(len(p)) {
			return errDamagedRecord
		}
		if err := r.setText(key>>1, p[:v:v]); err != nil {
			return err
		}
		p = p[v:]
	}
	return nil
}

func (r *handoverConn) setNumber(tag byte, v uint64) {
	switch tag {
	case tagID:
		r.ID = v
	case tagListener:
		r.Listener = int(v)
	case tagWaiting:
		r.Waiting = v != 0
	case tagOpened:
		r.Opened = time.Unix(0, int64(v))
	case tagActive:
		r.Active = time.Unix(0, int64(v))
	case tagSubmitted:
		r.Submitted = v != 0
	case tagBytesIn:
		r.BytesIn = v
	case tagBytesOut:
		r.BytesOut = v
	case tagLastByte:
		r.LastByte = byte(v)
	case tagWriteClosed:
		r.WriteClosed = v != 0
	case tagNotified:
		r.Notified = v != 0
	case tagReadDeadline:
		r.ReadDeadline = time.Unix(0, int64(v))
	case tagWriteDeadline:
		r.WriteDeadline = time.Unix(0, int64(v))
	case tagDrainDeadline:
		r.DrainDeadline = time.Unix(0, int64(v))
	}
}

func (r *handoverConn) setText(tag byte, v []byte) error {
	switch tag {
	case tagRemote:
		r.Remote = string(v)
	case tagLabels:
		return json.Unmarshal(v, &r.Labels)
	case tagDrainReason:
		r.DrainReason = string(v)
	case tagDrainClosed:
		r.DrainClosed = string(v)
	case tagState:
		r.State = v
	case tagUnsent:
		r.Unsent = v
	}
	return nil
}

// appendRecord appends a record and its length to the records of a message.
func appendRecord(records, record []byte) []byte {
	return append(binary.AppendUvarint(records, uint64(len(record))), record...)
}

// parseRecords parses the records of a message. The records share the memory of p.
func parseRecords(p []byte) (records []handoverConn, err error) {
	for len(p) > 0 {
		length, n := binary.Uvarint(p)
		if n <= 0 || length > uint64(len(p)-n) {
			return nil, errDamagedRecord
		}
		p = p[n:]
		var r handoverConn
		if err := r.parse(p[:length]); err != nil {
			return nil, err
		}
		records = append(records, r)
		p = p[length:]
	}
	return records, nil
}

// handoverKept is a connection that the predecessor keeps.
type handoverKept struct {
	ID     uint64    `json:"id"`
	Remote string    `json:"remote"`
	Opened time.Time `json:"opened"`
	Why    string    `json:"why"`

	// Bytes at the time of the handover. The successor counts them until it receives the final figures.
	BytesIn  uint64 `json:"bytes_in,omitempty"`
	BytesOut uint64 `json:"bytes_out,omitempty"`
}

// handoverEnd reports the end of a connection that the predecessor kept.
type handoverEnd struct {
	ID       uint64 `json:"id"`
	Reason   string `json:"reason"`
	BytesIn  uint64 `json:"bytes_in,omitempty"`
	BytesOut uint64 `json:"bytes_out,omitempty"`
}

// handoverClosed is a ClosedConn in JSON.
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

func newHandoverClosed(c ClosedConn) handoverClosed {
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

func (r handoverClosed) closedConn() ClosedConn {
	c := ClosedConn{
		ID: r.ID, Remote: textAddr(r.Remote), Local: textAddr(r.Local), Opened: r.Opened, Closed: r.Closed,
		Reason:  parseReason(r.Reason),
		BytesIn: r.BytesIn, BytesOut: r.BytesOut, Notified: r.Notified, Labels: r.Labels,
	}
	if r.Err != "" {
		c.Err = errors.New(r.Err)
	}
	return c
}

// handoverEvent is an Event in JSON.
type handoverEvent struct {
	ID       uint64          `json:"id"`
	Time     time.Time       `json:"time"`
	Type     EventType       `json:"type"`
	State    string          `json:"state,omitempty"`
	Conn     *handoverOpened `json:"conn,omitempty"`
	Closed   *handoverClosed `json:"closed,omitempty"`
	Hold     *HoldInfo       `json:"hold,omitempty"`
	Cause    string          `json:"cause,omitempty"`
	By       *Caller         `json:"by,omitempty"`
	Missed   int             `json:"missed,omitempty"`
	Settings []SettingChange `json:"settings,omitempty"`
}

// handoverOpened is the ConnInfo in an EventOpened.
type handoverOpened struct {
	ID     uint64            `json:"id"`
	Remote string            `json:"remote"`
	Local  string            `json:"local"`
	Phase  Phase             `json:"phase"`
	Opened time.Time         `json:"opened"`
	Labels map[string]string `json:"labels,omitempty"`
}

// maxHandoverEvents bounds the events that are handed over, in bytes. The oldest ones are left out.
const maxHandoverEvents = 1 << 20

// recordEvents encodes events, oldest first. It leaves out the oldest ones beyond maxHandoverEvents.
func recordEvents(events []Event) (records []json.RawMessage) {
	size := 0
	for _, e := range slices.Backward(events) {
		r := handoverEvent{
			ID: e.ID, Time: e.Time, Type: e.Type, Hold: e.Hold, Cause: e.Cause, Missed: e.Missed, Settings: e.Settings,
		}
		if e.By != (Caller{}) {
			r.By = &e.By
		}
		if e.Type == EventState {
			r.State = e.State.String()
		}
		if c := e.Conn; c != nil {
			r.Conn = &handoverOpened{
				ID: c.ID, Remote: c.Remote.String(), Local: c.Local.String(), Phase: c.Phase, Opened: c.Opened, Labels: c.Labels,
			}
		}
		if e.Closed != nil {
			r.Closed = new(newHandoverClosed(*e.Closed))
		}
		record, err := json.Marshal(r)
		if size += len(record); err != nil || size > maxHandoverEvents {
			break
		}
		records = append(records, record)
	}
	slices.Reverse(records)
	return records
}

// parseEvent decodes an event of any version.
func parseEvent(record json.RawMessage) (e Event, err error) {
	var r handoverEvent
	if err := json.Unmarshal(record, &r); err != nil {
		return e, err
	}
	e = Event{ID: r.ID, Time: r.Time, Type: r.Type, Hold: r.Hold, Cause: r.Cause, Missed: r.Missed, Settings: r.Settings}
	if r.By != nil {
		e.By = *r.By
	}
	if r.Type == EventState {
		if e.State, err = ParseState(r.State); err != nil {
			return e, err
		}
	}
	if c := r.Conn; c != nil {
		e.Conn = &ConnInfo{
			ID: c.ID, Remote: textAddr(c.Remote), Local: textAddr(c.Local), Phase: c.Phase, Opened: c.Opened, Active: c.Opened,
			Labels: c.Labels,
		}
	}
	if r.Closed != nil {
		e.Closed = new(r.Closed.closedConn())
	}
	return e, nil
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

// textAddr is an address that is known only as text.
type textAddr string

func (a textAddr) Network() string { return "tcp" }
func (a textAddr) String() string  { return string(a) }

// parseAddr returns the TCP address in s, or a textAddr if s is none.
func parseAddr(s string) net.Addr {
	if addr, err := net.ResolveTCPAddr("tcp", s); err == nil && addr.IP != nil {
		return addr
	}
	return textAddr(s)
}
