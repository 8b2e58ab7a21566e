package control

import (
	"fmt"
	"os"
	"time"

	"echod/internal/text"
	"echod/server"
)

// The types below are the API's JSON, described by openapi.yaml. Times are RFC 3339; fields named _seconds are in
// seconds.

// Status answers GET /v1/status.
type Status struct {
	State         string            `json:"state"`
	PID           int               `json:"pid"`
	Version       string            `json:"version"`
	Started       time.Time         `json:"started"`
	UptimeSeconds float64           `json:"uptime_seconds"`
	Listeners     []Listener        `json:"listeners"`
	Connections   int               `json:"connections"`
	Phases        map[string]int    `json:"phases"` // open connections by phase, without zeros
	Accepted      uint64            `json:"accepted"`
	Closed        map[string]uint64 `json:"closed"`
	BytesIn       uint64            `json:"bytes_in"`
	BytesOut      uint64            `json:"bytes_out"`
	Notices       Notices           `json:"notices"`
	Holds         []Hold            `json:"holds"`
	Drain         *Drain            `json:"drain,omitempty"`
	Predecessor   *Predecessor      `json:"predecessor,omitempty"` // missing when it has ended

	LostHolds []Hold `json:"lost_holds,omitempty"` // holds that a restart has ended; they do not pause the server

	Certificates []Certificate `json:"certificates,omitempty"` // of TLS listeners, the default first

	Told int `json:"told"` // open connections whose clients were told to leave
	// The maximum number of connections served at once; missing if there is no limit. at_limit says whether new clients
	// wait or are rejected when the server is full.
	MaxConns *int   `json:"max_conns,omitempty"`
	AtLimit  string `json:"at_limit"`
	Full     bool   `json:"full"`

	LimitsReached []ReachedLimit `json:"limits_reached"` // that keep new clients out now

	SettingsChanged []SettingChange `json:"settings_changed"` // changed at runtime, with the initial values

	// The defaults of a drain.
	GraceSeconds      float64 `json:"grace_seconds"`
	DrainDelaySeconds float64 `json:"drain_delay_seconds"`
	SpreadSeconds     float64 `json:"spread_seconds"`

	MaxConnAgeSeconds float64 `json:"max_conn_age_seconds"` // 0 means no limit
}

// ReachedLimit is a limit that keeps new clients out now.
type ReachedLimit struct {
	Name    string `json:"name"` // of the setting
	Value   string `json:"value"`
	Clients int    `json:"clients,omitempty"` // how many have reached a limit per client
	Then    string `json:"then"`              // what happens to further clients: wait or reject
}

// Process is a process of a server.
type Process struct {
	PID     int    `json:"pid"`
	Version string `json:"version"`
}

// Predecessor is the process that handed over to this one. It still serves connections that were not handed over.
type Predecessor struct {
	Process
	Connections int `json:"connections"` // connections that it still serves; they count as open
}

// Notices counts the notices of drains and of POST /v1/notify since the start.
type Notices struct {
	Sent   uint64 `json:"sent"`
	Failed uint64 `json:"failed"`
}

// Listener is an open listener. The accept queue is missing on systems that do not report it.
type Listener struct {
	Address          string `json:"address"`
	TLS              bool   `json:"tls,omitempty"`
	AcceptQueue      *int   `json:"accept_queue,omitempty"`
	AcceptQueueLimit *int   `json:"accept_queue_limit,omitempty"`
}

// Hold keeps the server paused until it is released.
type Hold struct {
	ID      string     `json:"id"`
	Reason  string     `json:"reason"`
	Mode    string     `json:"mode"`
	Since   time.Time  `json:"since"`
	Expires *time.Time `json:"expires,omitempty"`
	UID     *int       `json:"uid,omitempty"` // of the process that placed it, if known
	PID     *int       `json:"pid,omitempty"`

	User   string `json:"user,omitempty"`   // name of uid
	Claims string `json:"claims,omitempty"` // what the caller says about itself, unverified

	Evict         bool    `json:"evict,omitempty"`          // the connected clients are sent away
	SpreadSeconds float64 `json:"spread_seconds,omitempty"` // time over which clients are told, from since

	GraceSeconds *float64 `json:"grace_seconds,omitempty"` // set with evict: the time of each client after it is told
}

// Drain is the drain in progress or the finished drain.
type Drain struct {
	Since          time.Time  `json:"since"`
	AcceptingUntil *time.Time `json:"accepting_until,omitempty"` // set if there is a delay; new clients are served until then
	TellingUntil   *time.Time `json:"telling_until,omitempty"`   // set if there is a spread; the last client is told then
	Deadline       time.Time  `json:"deadline"`
	Reason         string     `json:"reason"`
	Told           int        `json:"told"`   // clients that were told to leave
	Untold         int        `json:"untold"` // clients that are being served and were not told yet
	Notified       int        `json:"notified"`
	NoticeFailed   int        `json:"notice_failed"`
}

// Conn is an open connection.
type Conn struct {
	ID          uint64    `json:"id"`
	Remote      string    `json:"remote"`
	Local       string    `json:"local"`
	State       string    `json:"state"`
	Opened      time.Time `json:"opened"`
	IdleSeconds float64   `json:"idle_seconds"`
	BytesIn     uint64    `json:"bytes_in"`
	BytesOut    uint64    `json:"bytes_out"`
	Notified    bool      `json:"notified"`

	Drain  *ConnDrain        `json:"drain,omitempty"`  // set when its client was told to leave
	Labels map[string]string `json:"labels,omitempty"` // set by the handler
}

// ConnDrain says when and why a connection is closed.
type ConnDrain struct {
	Deadline time.Time `json:"deadline"`
	Reason   string    `json:"reason"`
}

// ClosedConn is a closed connection.
type ClosedConn struct {
	ID              uint64    `json:"id"`
	Remote          string    `json:"remote"`
	Local           string    `json:"local"`
	Reason          string    `json:"reason"`
	Opened          time.Time `json:"opened"`
	Closed          time.Time `json:"closed"`
	DurationSeconds float64   `json:"duration_seconds"`
	BytesIn         uint64    `json:"bytes_in"`
	BytesOut        uint64    `json:"bytes_out"`
	Notified        bool      `json:"notified"`

	Labels map[string]string `json:"labels,omitempty"` // set by the handler
	Error  string            `json:"error,omitempty"`  // of the handler or the handshake
}

// Conns answers GET /v1/conns.
type Conns struct {
	Connections []Conn `json:"connections"`
	Next        string `json:"next,omitempty"` // cursor of the next page, if there is one
}

// ClosedConns answers GET /v1/conns/closed, the latest first.
type ClosedConns struct {
	Connections []ClosedConn `json:"connections"`
}

// Change answers requests that change something, with the change and the new state.
type Change struct {
	Changed  bool   `json:"changed"`
	State    string `json:"state"`
	Released *int   `json:"released,omitempty"` // number of holds
	Killed   *int   `json:"killed,omitempty"`   // number of connections
	Drain    *Drain `json:"drain,omitempty"`

	ExtendedSeconds *float64 `json:"extended_seconds,omitempty"` // time by which the deadline of the drain was moved
}

// Upgraded answers POST /v1/upgrade.
type Upgraded struct {
	PID           int            `json:"pid"` // of the successor
	HandedOver    int            `json:"handed_over"`
	Behind        map[string]int `json:"behind"` // connections that the predecessor still serves, by the reason
	FrozenSeconds float64        `json:"frozen_seconds"`
	TookSeconds   float64        `json:"took_seconds"`
}

// Notified answers POST /v1/notify.
type Notified struct {
	Sent   int `json:"sent"`
	Failed int `json:"failed"`
}

// Waited answers GET /v1/wait.
type Waited struct {
	State       string `json:"state"`
	Connections int    `json:"connections"`
}

// Released is the last line of POST /v1/pause?while=connected. It is sent if the hold ends before the connection.
type Released struct {
	Released string `json:"released"` // why the hold ended
	State    string `json:"state"`
}

// Event is a line of GET /v1/events. Of the fields below Type, only those of that type are set.
type Event struct {
	ID     uint64      `json:"id"` // for GET /v1/events?after=
	Time   time.Time   `json:"time"`
	Type   string      `json:"type"`
	State  string      `json:"state,omitempty"`
	Conn   *Conn       `json:"conn,omitempty"`
	Closed *ClosedConn `json:"closed,omitempty"`
	Hold   *Hold       `json:"hold,omitempty"`
	Cause  string      `json:"cause,omitempty"`
	Missed int         `json:"missed,omitempty"`

	ReleasedBy *Caller `json:"released_by,omitempty"`

	Settings  []SettingChange `json:"settings,omitempty"`
	ChangedBy *Caller         `json:"changed_by,omitempty"`
}

// Caller identifies the process that released a hold or changed settings through the control socket.
type Caller struct {
	UID    int    `json:"uid"`
	PID    int    `json:"pid"`
	User   string `json:"user,omitempty"`   // name of uid
	Claims string `json:"claims,omitempty"` // unverified
}

func wireStatus(st server.Status, version string) Status {
	out := Status{
		State: st.State.String(), PID: os.Getpid(), Version: version,
		Started: st.Started, UptimeSeconds: time.Since(st.Started).Seconds(),
		Listeners:   []Listener{},
		Connections: st.Connections, Phases: map[string]int{}, Accepted: st.Accepted, Closed: map[string]uint64{},
		BytesIn: st.BytesIn, BytesOut: st.BytesOut, Notices: Notices{Sent: st.NoticesSent, Failed: st.NoticesFailed},
		AtLimit: st.AtLimit.String(), Full: st.Full, SettingsChanged: wireChanges(st.Settings),
		LimitsReached: []ReachedLimit{},
		Holds:         []Hold{}, GraceSeconds: st.Grace.Seconds(), DrainDelaySeconds: st.DrainDelay.Seconds(),
		SpreadSeconds: st.Spread.Seconds(), MaxConnAgeSeconds: st.MaxAge.Seconds(), Told: st.Told,
	}
	if st.MaxConns > 0 {
		out.MaxConns = &st.MaxConns
	}
	for _, l := range st.Listeners {
		wl := Listener{Address: l.Address.String(), TLS: l.TLS}
		if l.AcceptQueue >= 0 {
			wl.AcceptQueue, wl.AcceptQueueLimit = &l.AcceptQueue, &l.AcceptQueueLimit
		}
		out.Listeners = append(out.Listeners, wl)
	}
	for _, l := range st.ReachedLimits {
		out.LimitsReached = append(out.LimitsReached, wireReachedLimit(l))
	}
	for phase, n := range st.Phases {
		out.Phases[phase.String()] = n
	}
	for why, n := range st.Closed {
		out.Closed[why.String()] = n
	}
	for _, h := range st.Holds {
		out.Holds = append(out.Holds, NewHold(h))
	}
	out.Drain = wireDrain(st.Drain)
	return out
}

func wireReachedLimit(l server.ReachedLimit) ReachedLimit {
	then := server.LimitQueue
	if l.Rejects {
		then = server.LimitReject
	}
	return ReachedLimit{Name: l.Setting, Value: l.Value, Clients: l.Clients, Then: then.String()}
}

// String says for people which limit is reached, and what that means for new clients.
func (l ReachedLimit) String() string {
	switch {
	case l.Clients > 0:
		return fmt.Sprintf("%s %s is reached by %s: their new connections are rejected", l.Name, l.Value,
			text.Count(l.Clients, "client"))
	case l.Then == server.LimitReject.String():
		return fmt.Sprintf("%s %s is reached: new clients are rejected", l.Name, l.Value)
	default:
		return fmt.Sprintf("%s %s is reached: new clients wait in the accept queue", l.Name, l.Value)
	}
}

// NewHold returns the API's form of a hold.
func NewHold(h server.HoldInfo) Hold {
	out := Hold{ID: h.ID, Reason: h.Reason, Mode: h.Mode.String(), Since: h.Since}
	if !h.Expires.IsZero() {
		out.Expires = &h.Expires
	}
	if h.By.PID != 0 {
		out.UID, out.PID, out.User, out.Claims = &h.By.UID, &h.By.PID, h.By.User, h.By.Claims
	}
	if out.Evict, out.SpreadSeconds = h.Evict, h.Spread.Seconds(); h.Evict {
		out.GraceSeconds = new(max(0, h.Grace).Seconds())
	}
	return out
}

func wireDrain(d *server.DrainInfo) *Drain {
	if d == nil {
		return nil
	}
	out := &Drain{
		Since: d.Since, Deadline: d.Deadline, Reason: d.Reason, Notified: d.Notified,
		NoticeFailed: d.NoticeFailed, Told: d.Told, Untold: d.Untold,
	}
	if d.AcceptUntil.After(d.Since) {
		out.AcceptingUntil = &d.AcceptUntil
	}
	if d.TellUntil.After(d.AcceptUntil) {
		out.TellingUntil = &d.TellUntil
	}
	return out
}

func wireConn(c server.ConnInfo) Conn {
	out := Conn{
		ID: c.ID, Remote: c.Remote.String(), Local: c.Local.String(), State: c.Phase.String(), Opened: c.Opened,
		IdleSeconds: c.Idle.Seconds(), BytesIn: c.BytesIn, BytesOut: c.BytesOut, Notified: c.Notified, Labels: c.Labels,
	}
	if !c.DrainDeadline.IsZero() {
		out.Drain = &ConnDrain{Deadline: c.DrainDeadline, Reason: c.DrainReason}
	}
	return out
}

func wireClosed(c server.ClosedConn) ClosedConn {
	out := ClosedConn{
		ID: c.ID, Remote: c.Remote.String(), Local: c.Local.String(), Reason: c.Reason.String(),
		Opened: c.Opened, Closed: c.Closed, DurationSeconds: c.Closed.Sub(c.Opened).Seconds(),
		BytesIn: c.BytesIn, BytesOut: c.BytesOut, Notified: c.Notified, Labels: c.Labels,
	}
	if c.Err != nil {
		out.Error = atMost(maxDetail, c.Err.Error())
	}
	return out
}

func wireEvent(e server.Event) Event {
	out := Event{ID: e.ID, Time: e.Time, Type: string(e.Type), Cause: e.Cause, Missed: e.Missed}
	if e.State != 0 {
		out.State = e.State.String()
	}
	if e.Conn != nil {
		out.Conn = new(wireConn(*e.Conn))
	}
	if e.Closed != nil {
		out.Closed = new(wireClosed(*e.Closed))
	}
	if e.Hold != nil {
		out.Hold = new(NewHold(*e.Hold))
	}
	by := &Caller{UID: e.By.UID, PID: e.By.PID, User: e.By.User, Claims: e.By.Claims}
	switch {
	case by.PID == 0:
	case e.Type == server.EventSettings:
		out.ChangedBy = by
	default:
		out.ReleasedBy = by
	}
	if e.Type == server.EventSettings {
		out.Settings = wireChanges(e.Settings)
	}
	return out
}
