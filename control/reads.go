package control

import (
	"net/http"
)

// Endpoints that change nothing and answer at once.

func (p *Plane) getStatus(w *response, r *http.Request) error {
	if err := decodeQuery(r, nil); err != nil {
		return err
	}
	st := p.srv.Status()
	status := wireStatus(st, p.version)
	if st.HasPredecessor && p.predecessor != nil {
		status.Predecessor = &Predecessor{*p.predecessor, st.KeptByPredecessor}
	}
	status.LostHolds = p.lostHolds
	status.Certificates = wireCertificates(p.certificates)
	return answerJSON(w, http.StatusOK, status)
}

func (p *Plane) getClosed(w *response, r *http.Request) error {
	limit := -1
	if err := decodeQuery(r, fields{"limit": countField(&limit)}); err != nil {
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
