package control

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"echod/server"
)

// TestPages: pages of a list in any order give each connection once, in order.
func TestPages(t *testing.T) {
	const conns, limit = 500, 7
	random := rand.New(rand.NewPCG(1, 2))
	now := time.Now()
	var all []server.ConnInfo
	for i := range conns {
		all = append(all, server.ConnInfo{
			ID: uint64(i + 1), Active: now.Add(-time.Duration(random.IntN(50)) * time.Second),
			BytesIn: random.Uint64N(20), BytesOut: random.Uint64(),
		})
	}
	for sort, key := range connOrders {
		want := slices.Clone(all)
		slices.SortStableFunc(want, func(a, b server.ConnInfo) int {
			return listPosition{sort, key(a), a.ID}.compare(listPosition{sort, key(b), b.ID})
		})
		var got []server.ConnInfo
		for after, more := (listPosition{}), true; more; {
			page := connPage{limit: limit}
			for _, c := range all {
				if at := (listPosition{sort, key(c), c.ID}); after.ID == 0 || at.compare(after) > 0 {
					page.add(at, c)
				}
			}
			var rows []pageRow
			if rows, more = page.sorted(); len(rows) > limit || more && len(rows) < limit {
				t.Fatalf("%s: a page has %d rows", sort, len(rows))
			}
			for _, row := range rows {
				got, after = append(got, row.conn), row.position
			}
		}
		wantEqual(t, sort+": all pages", got, want)
	}
	first := slices.MinFunc(all, func(a, b server.ConnInfo) int { return a.Active.Compare(b.Active) })
	wantEqual(t, "the idlest has the lowest key", connOrders["idle"](first) <= connOrders["idle"](all[0]), true)
}

// TestPagesWhileClientsComeAndGo: a connection that stays open is on exactly one page, whatever others do meanwhile.
func TestPagesWhileClientsComeAndGo(t *testing.T) {
	r := newRig(t, server.Options{})
	var goes []*echoClient // those with an even id
	for id := range 20 {
		if c := r.echoClient(t); id%2 == 1 {
			goes = append(goes, c)
		}
	}
	times := map[uint64]int{}
	for cursor, pages := "", 0; ; pages++ {
		page := must[Conns](t)(r.client.ConnPage(t.Context(), ListRequest{Limit: 3, Cursor: cursor}))
		for _, c := range page.Connections {
			times[c.ID]++
		}
		if cursor = page.Next; cursor == "" || pages == 100 {
			break
		}
		if len(goes) > 0 {
			_ = goes[0].Close()
			goes = goes[1:]
			r.awaitConns(t, 19)
			r.echoClient(t)
		}
	}
	for id := uint64(1); id < 20; id += 2 {
		wantEqual(t, fmt.Sprintf("connection %d is listed", id), times[id], 1)
	}
	for id, n := range times {
		wantEqual(t, fmt.Sprintf("connection %d is listed", id), n, 1)
	}
}

func TestConnFilterRemote(t *testing.T) {
	tcp := func(s string) net.Addr { return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(s)) }
	user := server.Credentials{UID: 7, PID: 1}
	for filter, tt := range map[string]struct{ yes, no []net.Addr }{
		"10.0.0.0/8":         {yes: []net.Addr{tcp("10.1.2.3:1"), tcp("[::ffff:10.1.2.3]:1")}, no: []net.Addr{tcp("11.1.2.3:1"), user}},
		"10.0.0.1,2001::/16": {yes: []net.Addr{tcp("10.0.0.1:1"), tcp("[2001::1]:1")}, no: []net.Addr{tcp("10.0.0.2:1")}},
		"unix":               {yes: []net.Addr{user}, no: []net.Addr{tcp("10.0.0.1:1")}},
	} {
		var f connFilter
		if err := f.decodeRemote(queryJSON(filter)); err != nil {
			t.Fatal(err)
		}
		for _, addr := range tt.yes {
			wantEqual(t, fmt.Sprintf("%s matches %s", filter, addr), f.matchesRemote(addr), true)
		}
		for _, addr := range tt.no {
			wantEqual(t, fmt.Sprintf("%s matches %s", filter, addr), f.matchesRemote(addr), false)
		}
	}
	for want, addr := range map[string]net.Addr{
		"10.0.0.1": tcp("10.0.0.1:1"), "2001:db8:1:2::/64": tcp("[2001:db8:1:2:3::4]:1"), "uid=7": user,
	} {
		wantEqual(t, "client of "+addr.String(), peerAddress(addr, 64), want)
	}
}

func TestClients(t *testing.T) {
	r := newRig(t, server.Options{})
	for range 3 {
		r.echoClient(t)
	}
	list := must[Peers](t)(r.client.Clients(t.Context(), -1, ConnFilter{}))
	wantEqual(t, "clients", list.Total, 1)
	wantEqual(t, "connections", list.Clients[0].Connections, 3)
	wantEqual(t, "bytes", list.Clients[0].BytesIn, uint64(18))
	list = must[Peers](t)(r.client.Clients(t.Context(), 0, ConnFilter{}))
	wantEqual(t, "with limit 0", list, Peers{Clients: []Peer{}, Total: 1})

	page := must[Conns](t)(r.client.ConnPage(t.Context(), ListRequest{Limit: 2}))
	wantEqual(t, "the first page", len(page.Connections), 2)
	page = must[Conns](t)(r.client.ConnPage(t.Context(), ListRequest{Limit: 2, Cursor: page.Next}))
	wantEqual(t, "the last page", page.Connections[0].ID, uint64(3))
	wantEqual(t, "next of the last page", page.Next, "")
	page = must[Conns](t)(r.client.ConnPage(t.Context(), ListRequest{Limit: 3, Sort: "idle"}))
	wantEqual(t, "next of a list that fits", page.Next, "")
	wantEqual(t, "the idlest", page.Connections[0].ID, uint64(1))
}
