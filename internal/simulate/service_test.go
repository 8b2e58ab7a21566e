package simulate

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"time"

	"echod/server"
)

// service is a handler that echoes one request after another, and behaves as the plan of each client says. At a handover
// it passes on how many bytes it has echoed.
type service struct{ w *world }

var errHandler = errors.New("the handler has had enough")

func (s service) ServeConn(ctx context.Context, c *server.Conn) error { return s.serve(ctx, c, 0) }

func (s service) ResumeConn(ctx context.Context, c *server.Conn, state []byte) error {
	echoed := int(binary.BigEndian.Uint64(state))
	if t := s.w.traceOf(c.RemoteAddr()); t != nil {
		t.mu.Lock()
		want := t.served
		t.mu.Unlock()
		if echoed != want {
			s.w.violate("a handler resumes with its state", "client %d: the handler resumed with %d bytes, and had returned %d", t.plan.ID, echoed, want)
		}
	}
	return s.serve(ctx, c, echoed)
}

func (s service) serve(ctx context.Context, c *server.Conn, echoed int) error {
	t := s.w.traceOf(c.RemoteAddr())
	if t == nil {
		return errors.New("unknown client")
	}
	plan := t.plan.Handler
	buf := make([]byte, 4<<10)
	for {
		c.MarkIdle()
		n, err := c.Read(buf)
		switch {
		case n > 0:
		case errors.Is(err, server.ErrHandover):
			t.mu.Lock()
			t.served = echoed
			t.mu.Unlock()
			return server.Handover(binary.BigEndian.AppendUint64(nil, uint64(echoed)))
		case errors.Is(err, server.ErrDraining) && !plan.ReturnsOnDrain:
			continue
		case errors.Is(err, io.EOF):
			return nil
		default:
			return err
		}
		if echoed == 0 {
			time.Sleep(plan.Hang)
		}
		if plan.Think > 0 {
			think := time.NewTimer(plan.Think)
			select {
			case <-think.C:
			case <-ctx.Done():
			}
			think.Stop()
		}
		written, err := c.Write(buf[:n])
		echoed += written
		switch {
		case err != nil:
			return err
		case plan.ErrorAfter > 0 && echoed >= plan.ErrorAfter:
			return errHandler
		case plan.PanicAfter > 0 && echoed >= plan.PanicAfter:
			panic("the handler panics")
		case plan.ReturnAfter > 0 && echoed >= plan.ReturnAfter:
			return nil
		}
	}
}
