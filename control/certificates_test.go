package control

import (
	"context"
	"testing"
	"testing/synctest"

	"echod/server"
)

func TestIdentity(t *testing.T) {
	const subject, names = `CN=worker 7,O=Example\\, Inc.`, "worker.example.com,ops@example.com,spiffe://example.com/worker"
	for name, tt := range map[string]struct {
		pattern string
		want    bool
	}{
		"nothing":                       {"", true},
		"the subject":                   {subject, true},
		"the common name":               {"worker 7", true},
		"a part of the common name":     {"worker", false},
		"a DNS name":                    {"worker.example.com", true},
		"a mail address":                {"ops@example.com", true},
		"a URI":                         {"spiffe://example.com/worker", true},
		"a domain":                      {"*.example.com", true},
		"another domain":                {"*.example.org", false},
		"the start of a URI":            {"spiffe://example.com/*", true},
		"both ends":                     {"worker*com", true},
		"parts in their order":          {"*CN=*Inc.*", true},
		"parts in another order":        {"*Inc.*CN=*", false},
		"overlapping parts":             {"worker 7*7", false},
		"anything":                      {"*", true},
		"two names and what is between": {"worker.example.com,ops@example.com", false},
	} {
		t.Run(name, func(t *testing.T) {
			c := server.ConnInfo{Labels: map[string]string{server.LabelSubject: subject, server.LabelNames: names}}
			wantEqual(t, "match", hasIdentity(c, tt.pattern), tt.want)
		})
	}
	t.Run("a client without a certificate has none", func(t *testing.T) {
		wantEqual(t, "match", hasIdentity(server.ConnInfo{}, "*"), false)
	})
	t.Run("it selects the connections that are listed and killed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			subjects := []string{"CN=a", "CN=b", "CN=a"}
			r := newBubble(t, server.Options{ConnContext: func(ctx context.Context, c *server.Conn) context.Context {
				if err := c.SetLabel(server.LabelSubject, subjects[c.ID()-1]); err != nil {
					t.Error(err)
				}
				return ctx
			}})
			for range subjects {
				r.echoClient(t)
			}
			var ids []uint64
			for _, c := range must[Conns](t)(r.client.Conns(t.Context(), -1, ConnFilter{Identity: "a"})).Connections {
				ids = append(ids, c.ID)
			}
			wantEqual(t, "listed", ids, []uint64{1, 3})
			change := must[Change](t)(r.client.KillMatching(t.Context(), ConnFilter{Identity: "a"}))
			wantEqual(t, "killed", change.Killed, new(2))
			r.awaitConns(t, 1)
			left := must[Conns](t)(r.client.Conns(t.Context(), -1, ConnFilter{})).Connections
			wantEqual(t, "who is left", left[0].ID, uint64(2))
		})
	})
}
