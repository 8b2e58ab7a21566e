//go:build unix

package integration

import (
	"encoding/hex"
	"net"
	"strings"
	"testing"

	"echod/control"
)

// Headers, written by hand from the PROXY protocol's specification. They name the client 203.0.113.9 or 2001:db8::9.
var (
	headerV1     = "PROXY TCP4 203.0.113.9 198.51.100.1 5555 9999\r\n"
	headerV1IPv6 = "PROXY TCP6 2001:db8::9 2001:db8::1 5555 9999\r\n"
	headerV2     = headerOf("21 11 000c cb007109 c6336401 15b3 270f")
	headerV2IPv6 = headerOf("21 21 0024 20010db8000000000000000000000009 20010db8000000000000000000000001 15b3 270f")
	// With two TLVs, a checksum (type 3) and a name (type 2), which HAProxy adds on request.
	headerV2More = headerOf("21 11 001b cb007109 c6336401 15b3 270f 04 0004 00000000 02 0005 6563686f64")
	headerCheck  = headerOf("20 00 0000")
)

func headerOf(rest string) string {
	raw, err := hex.DecodeString(strings.ReplaceAll("0d0a0d0a000d0a515549540a"+rest, " ", ""))
	if err != nil {
		panic(err)
	}
	return string(raw)
}

func TestProxyClientAddress(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ header, client string }{
		"version 1":               {headerV1, "203.0.113.9:5555"},
		"version 1, IPv6":         {headerV1IPv6, "[2001:db8::9]:5555"},
		"version 2":               {headerV2, "203.0.113.9:5555"},
		"version 2, IPv6":         {headerV2IPv6, "[2001:db8::9]:5555"},
		"version 2, and what not": {headerV2More, "203.0.113.9:5555"},
		"unknown":                 {"PROXY UNKNOWN\r\n", ""},
		"the proxy's own check":   {headerCheck, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := start(t, "--proxy-protocol", "127.0.0.0/8")
			p := e.dial()
			check(t, p.send(c.header+"in one segment\n"))
			check(t, p.expect("in one segment\n"))
			check(t, p.echo("and later\n"))
			client := c.client
			if client == "" {
				client = p.LocalAddr().String()
			}
			list, err := e.control.Conns(within(t, patience), -1, control.ConnFilter{})
			check(t, err)
			if len(list.Connections) != 1 || list.Connections[0].Remote != client {
				t.Errorf("listed %+v, want one connection from %s", list.Connections, client)
			}
			check(t, p.leave())
			if got := e.awaitLog("connection closed").str("remote"); got != client {
				t.Errorf("the log names %s, want %s", got, client)
			}
			const echoed = uint64(len("in one segment\nand later\n")) // without the header
			if st := e.status(); st.BytesIn != echoed || st.BytesOut != echoed {
				t.Errorf("%d bytes in, %d out, want %d", st.BytesIn, st.BytesOut, echoed)
			}
		})
	}
}

func TestProxyHeaderInPieces(t *testing.T) {
	t.Parallel()
	e := start(t, "--proxy-protocol", "127.0.0.1")
	for _, header := range []string{headerV1, headerV2More} {
		p := e.dial()
		for i := range header {
			check(t, p.send(header[i:i+1]))
		}
		check(t, p.echo("hello\n"))
		check(t, p.leave())
	}
	e.awaitOpen(0)
	e.expectAccounts(map[string]uint64{"client-closed": 2})
}

func TestProxyLimitPerAddress(t *testing.T) {
	t.Parallel()
	e := start(t, "--proxy-protocol", "127.0.0.1", "--max-conns-per-ip", "1")
	first, other, second := e.dial(), e.dial(), e.dial()
	check(t, first.send(headerV1+"hello\n"))
	check(t, first.expect("hello\n"))
	check(t, other.send(headerV1IPv6+"hello\n"))
	check(t, other.expect("hello\n"))
	check(t, second.send(headerV2+"hello\n")) // the same address as the first one
	if err := second.expectRest("BUSY\n"); err != nil {
		t.Error(err)
	}
}

func TestProxyWithoutHeaderIsRejected(t *testing.T) {
	t.Parallel()
	for name, sent := range map[string]string{
		"data":               "hello, world\n",
		"a header that lies": "PROXY TCP4 nowhere 198.51.100.1 5555 9999\r\n",
		"an endless header":  "PROXY " + strings.Repeat("x", 4096),
		"half of one":        headerV2[:20], // and then nothing until the timeout
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := start(t, "--proxy-protocol", "127.0.0.1")
			p := e.dial()
			check(t, p.send(sent))
			if got, _ := p.rest(); got != "" {
				t.Errorf("the server sent %q", got)
			}
			e.awaitLog("handshake failed")
			e.awaitOpen(0)
			e.expectAccounts(map[string]uint64{"rejected-unidentified": 1})
			check(t, e.proxied(headerV1).leave()) // others are served
		})
	}
}

// More silent connections from a proxy than the process can have files leave files for the control socket.
func TestG11SilentProxyConnections(t *testing.T) {
	const files = 300
	e := startAs(t, fewFiles(t, files), "--proxy-protocol", "127.0.0.1", "--at-limit", "reject")
	for range 2 * files {
		p, err := connect(e.addr)
		check(t, err)
		defer p.Close()
	}
	for range 20 {
		if st := e.status(); st.Connections >= files-64 {
			t.Fatalf("%d connections open with a limit of %d files", st.Connections, files)
		}
	}
	for _, line := range e.log.find("cannot accept, retrying") {
		if why := line.str("error"); why != "the limit on open files is reached" { // the server's own, which keeps a reserve
			t.Errorf("out of files: %s", why)
		}
	}
}

func TestProxyHealthCheckIsNotLogged(t *testing.T) {
	t.Parallel()
	e := start(t, "--proxy-protocol", "127.0.0.1")
	check(t, e.dial().Close())
	e.awaitLog("connection closed", "reason", "client-closed")
	e.expectAccounts(map[string]uint64{"client-closed": 1})
	if lines := e.log.find("handshake failed"); len(lines) > 0 {
		t.Errorf("logged %s", lines[0].text)
	}
}

// proxied connects a peer that sends a header first, and waits until it is served.
func (e *echod) proxied(header string) *peer {
	e.t.Helper()
	p := e.dial()
	check(e.t, p.send(header+"hello\n"))
	check(e.t, p.expect("hello\n"))
	return p
}

func TestProxyHeaderFromUntrustedIsData(t *testing.T) {
	t.Parallel()
	e := start(t, "--proxy-protocol", "10.0.0.0/8,192.168.0.1")
	p := e.dial()
	check(t, p.echo(headerV1))
	list, err := e.control.Conns(within(t, patience), -1, control.ConnFilter{})
	check(t, err)
	if want := p.LocalAddr().String(); len(list.Connections) != 1 || list.Connections[0].Remote != want {
		t.Errorf("listed %+v, want one connection from %s", list.Connections, want)
	}
	check(t, p.leave())
}

// A listener for both families shows an IPv4 proxy with an IPv4-mapped address.
func TestProxyMappedAddress(t *testing.T) {
	t.Parallel()
	e := start(t, "--listen", "[::]:0", "--proxy-protocol", "127.0.0.1")
	_, port, err := net.SplitHostPort(e.addr)
	check(t, err)
	p, err := connect(net.JoinHostPort("127.0.0.1", port))
	check(t, err)
	defer p.Close()
	check(t, p.send(headerV1+"hello\n"))
	check(t, p.expect("hello\n"))
}
