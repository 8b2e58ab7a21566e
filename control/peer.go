package control

import (
	"context"
	"net"

	"go.uber.org/zap"
)

// peer is who is at the other end of a control connection. The zero value is unknown.
type peer struct {
	uid, pid int
	probe    bool // it is the plane itself
}

func (p peer) fields() []zap.Field {
	if p.pid == 0 {
		return nil
	}
	return []zap.Field{zap.Int("uid", p.uid), zap.Int("pid", p.pid)}
}

type peerKey struct{}

// withPeer is http.Server's ConnContext.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	switch outer := c.(type) {
	case probeConn:
		return context.WithValue(ctx, peerKey{}, peer{probe: true})
	case *limitedConn:
		c = outer.Conn
	}
	unixConn, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return ctx
	}
	var p peer
	if err := raw.Control(func(fd uintptr) { p = peerOf(int(fd)) }); err != nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, p)
}

func peerFrom(ctx context.Context) peer {
	p, _ := ctx.Value(peerKey{}).(peer)
	return p
}
