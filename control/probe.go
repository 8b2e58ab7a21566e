package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
)

// Probe returns nil when the plane answers where Actor serves it: its accept loop comes round, and a request for the status is
// answered. It goes past the listener's address, which this process may not be allowed to open, and past the limit on
// connections, so that callers who take up all of them do not make the plane look dead. Call it after Actor, whose
// listener has to have a SetDeadline, as those of package net do.
func (p *Plane) Probe(ctx context.Context) error {
	if err := p.probe(ctx); err != nil {
		return fmt.Errorf("asking the control plane: %w", err)
	}
	return nil
}

func (p *Plane) probe(ctx context.Context) error {
	if p.door == nil {
		return errors.New("it is not served")
	}
	conn, err := p.door.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://echod/v1/status", nil)
	if err != nil {
		return err
	}
	request.Close = true
	var answer *http.Response
	if err = request.Write(conn); err == nil {
		answer, err = http.ReadResponse(bufio.NewReader(conn), request)
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return err
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return errors.New(answer.Status)
	}
	return nil
}
