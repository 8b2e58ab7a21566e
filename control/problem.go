package control

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"echod/server"
)

// Problem is an error answer of the control plane (RFC 9457). Its types are stable.
type Problem struct {
	Type     string     `json:"type"`
	Title    string     `json:"title"`
	Status   int        `json:"status"`
	Detail   string     `json:"detail,omitempty"`
	Field    string     `json:"field,omitempty"`    // ProblemInvalid: the field or parameter
	State    string     `json:"state,omitempty"`    // ProblemDraining, ProblemNotDraining, ProblemTimeout
	Deadline *time.Time `json:"deadline,omitempty"` // ProblemDraining: latest end of the drain
	Holds    []Hold     `json:"holds,omitempty"`    // ProblemHolds: all holds
}

// Error returns the detail, or the title if there is none.
func (p *Problem) Error() string {
	if p.Detail == "" {
		return p.Title
	}
	return p.Detail
}

// The types of problems.
const (
	ProblemInvalid     = "urn:echod:problem:invalid"
	ProblemNotFound    = "urn:echod:problem:not-found"
	ProblemMethod      = "urn:echod:problem:method-not-allowed"
	ProblemTimeout     = "urn:echod:problem:timeout"
	ProblemDraining    = "urn:echod:problem:draining"
	ProblemNotDraining = "urn:echod:problem:not-draining"
	ProblemHolds       = "urn:echod:problem:several-holds"
	ProblemTooLarge    = "urn:echod:problem:too-large"
	ProblemBusy        = "urn:echod:problem:busy"
	ProblemUpgrade     = "urn:echod:problem:upgrade-failed"
	ProblemUpgrading   = "urn:echod:problem:upgrade-in-progress"
	ProblemUpgraded    = "urn:echod:problem:upgraded"
	ProblemCertificate = "urn:echod:problem:certificate"
	ProblemUnexpected  = "urn:echod:problem:unexpected"
)

func invalid(field, format string, args ...any) *Problem {
	return &Problem{
		Type: ProblemInvalid, Title: "Invalid request", Status: http.StatusBadRequest,
		Detail: field + ": " + fmt.Sprintf(format, args...), Field: field,
	}
}

func notFound(format string, args ...any) *Problem {
	return &Problem{
		Type: ProblemNotFound, Title: "Not found", Status: http.StatusNotFound, Detail: fmt.Sprintf(format, args...),
	}
}

// maxDetail bounds the detail of a problem, in bytes.
const maxDetail = 512

// problemOf returns the problem for err.
func (p *Plane) problemOf(err error) *Problem {
	problem := p.classify(err)
	problem.Detail, problem.Field = atMost(maxDetail, problem.Detail), shorten(problem.Field)
	return problem
}

func (p *Plane) classify(err error) *Problem {
	if problem, ok := errors.AsType[*Problem](err); ok {
		return problem
	}
	if draining, ok := errors.AsType[*server.DrainingError](err); ok {
		return &Problem{
			Type: ProblemDraining, Title: "The server is draining", Status: http.StatusConflict,
			Detail: err.Error(), State: p.srv.Status().State.String(), Deadline: &draining.Deadline,
		}
	}
	if errors.Is(err, server.ErrNotDraining) {
		return &Problem{
			Type: ProblemNotDraining, Title: "The server is not draining", Status: http.StatusConflict,
			Detail: err.Error(), State: p.srv.Status().State.String(),
		}
	}
	if errors.Is(err, server.ErrDrainFinal) {
		st := p.srv.Status()
		return &Problem{
			Type: ProblemDraining, Title: "The drain goes on", Status: http.StatusConflict, Detail: err.Error(),
			State: st.State.String(), Deadline: &cmp.Or(st.Drain, &server.DrainInfo{}).Deadline,
		}
	}
	if several, ok := errors.AsType[*server.HoldsError](err); ok {
		problem := &Problem{
			Type: ProblemHolds, Title: "Several holds exist", Status: http.StatusConflict, Detail: err.Error(),
			State: p.srv.Status().State.String(),
		}
		for _, h := range several.Holds {
			problem.Holds = append(problem.Holds, NewHold(h))
		}
		return problem
	}
	if errors.Is(err, server.ErrHandoverInProgress) {
		return &Problem{
			Type: ProblemUpgrading, Title: "Another upgrade is in progress", Status: http.StatusConflict,
			Detail: err.Error(),
		}
	}
	if errors.Is(err, server.ErrHandedOver) {
		return &Problem{
			Type: ProblemUpgraded, Title: "The server was upgraded", Status: http.StatusServiceUnavailable,
			Detail: "another process serves now: ask again",
		}
	}
	if errors.Is(err, server.ErrNoPredecessor) {
		return notFound("%v", err)
	}
	if errors.Is(err, server.ErrTooManyHolds) {
		return &Problem{
			Type: ProblemBusy, Title: "Too many holds", Status: http.StatusServiceUnavailable,
			Detail: err.Error(),
		}
	}
	if errors.Is(err, errCallerGone) {
		return &Problem{
			Type: ProblemTimeout, Title: "The caller has left", Status: http.StatusRequestTimeout,
			Detail: err.Error(), State: p.srv.Status().State.String(),
		}
	}
	if errors.Is(err, server.ErrNoHold) || errors.Is(err, server.ErrNoConn) {
		return notFound("%s", err)
	}
	return &Problem{
		Type: ProblemUnexpected, Title: "Unexpected error", Status: http.StatusInternalServerError, Detail: err.Error(),
	}
}

func (p *Problem) write(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p) // an error means that the caller has left
}
