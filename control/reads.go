package control

import (
	"bufio"
	"encoding/json"
	"net/http"
	"time"
)

// Endpoints that change nothing and answer at once.

func (p *Plane) getStatus(w *response, r *http.Request) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	st := p.srv.Status()
	status := wireStatus(st, p.version)
	if st.HasPredecessor && p.predecessor != nil {
		status.Predecessor = &Predecessor{*p.predecessor, st.Behind}
	}
	status.LostHolds = p.lostHolds
	status.Certificates = wireCertificates(p.certificates)
	return answerJSON(w, http.StatusOK, status)
}

func (p *Plane) getConns(w *response, r *http.Request) error {
	limit, minIdle, identity := -1, time.Duration(0), ""
	if err := decodeQuery(r, fields{"limit": count(&limit), "min_idle": duration(&minIdle), "identity": line(&identity)}); err != nil {
		return err
	}
	list := newConnWriter(w)
	for c := range p.srv.Conns() {
		if limit >= 0 && list.length >= limit {
			break
		}
		if c.Idle >= minIdle && hasIdentity(c, identity) && list.add(wireConn(c)) != nil {
			return nil // the caller has gone
		}
	}
	list.end()
	return nil
}

func (p *Plane) getClosed(w *response, r *http.Request) error {
	limit := -1
	if err := decodeQuery(r, fields{"limit": count(&limit)}); err != nil {
		return err
	}
	list := ClosedConns{Connections: []ClosedConn{}}
	for _, c := range p.srv.Closed() {
		if limit >= 0 && len(list.Connections) >= limit {
			break
		}
		list.Connections = append(list.Connections, wireClosed(c))
	}
	return answerJSON(w, http.StatusOK, list)
}

// connWriter writes Conns one connection at a time, so that a list of any length takes little memory.
type connWriter struct {
	out    *bufio.Writer
	lines  *json.Encoder
	length int
}

func newConnWriter(w http.ResponseWriter) *connWriter {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := bufio.NewWriterSize(w, 32<<10)
	_, _ = out.WriteString(`{"connections":[`) // a bufio.Writer keeps its first error for Flush
	return &connWriter{out: out, lines: json.NewEncoder(out)}
}

// add writes c. An error means that the caller has gone.
func (l *connWriter) add(c Conn) error {
	if l.length > 0 {
		_ = l.out.WriteByte(',')
	}
	l.length++
	return l.lines.Encode(c)
}

func (l *connWriter) end() {
	_, _ = l.out.WriteString("]}\n")
	_ = l.out.Flush()
}
