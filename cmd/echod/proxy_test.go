package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
)

const v2Signature = "0d0a0d0a000d0a515549540a"

// fromProxy is a connection from remote, on which sent arrives.
type fromProxy struct {
	net.Conn
	remote string
	sent   *strings.Reader
}

func (c fromProxy) Read(p []byte) (int, error) { return c.sent.Read(p) }

func (c fromProxy) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.remote))
}

func unhex(t *testing.T, text string) string {
	t.Helper()
	raw, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

func TestProxyHeaderNamesTheClient(t *testing.T) {
	trusted, err := parseTrusted([]string{"10.0.0.0/8", " ::1", "::ffff:192.0.2.8 ", "::ffff:192.168.0.0/112", "fe80::/10"})
	if err != nil {
		t.Fatal(err)
	}
	wrap := readProxyHeaders(trusted)
	for name, c := range map[string]struct{ from, sent, client string }{
		"v1":                             {"10.1.2.3:4", "PROXY TCP4 203.0.113.9 10.0.0.1 5555 9999\r\n", "203.0.113.9:5555"},
		"v1, IPv6":                       {"[::1]:4", "PROXY TCP6 2001:db8::9 ::1 5555 9999\r\n", "[2001:db8::9]:5555"},
		"v1, unknown":                    {"10.1.2.3:4", "PROXY UNKNOWN\r\n", ""},
		"v2":                             {"10.1.2.3:4", unhex(t, v2Signature+"21 11 000c cb007109 0a000001 15b3 270f"), "203.0.113.9:5555"},
		"v2 with a TLV":                  {"10.1.2.3:4", unhex(t, v2Signature+"21 11 0011 cb007109 0a000001 15b3 270f 04 0002 0000"), "203.0.113.9:5555"},
		"v2 with all the TLVs that fit":  {"10.1.2.3:4", unhex(t, v2Signature+"21 11 ffff cb007109 0a000001 15b3 270f 04 fff0") + strings.Repeat("x", 0xfff0), "203.0.113.9:5555"},
		"v1, IPv6 to an IPv4 address":    {"10.1.2.3:4", "PROXY TCP6 2001:db8::9 192.0.2.1 5555 9999\r\n", "[2001:db8::9]:5555"},
		"v2, a health check":             {"10.1.2.3:4", unhex(t, v2Signature+"20 00 0000"), ""},
		"v2 of no family":                {"10.1.2.3:4", unhex(t, v2Signature+"21 00 0000"), ""},
		"v2 of no family, with bytes":    {"10.1.2.3:4", unhex(t, v2Signature+"21 00 0003 010203"), ""},
		"v2 of Unix sockets":             {"10.1.2.3:4", unhex(t, v2Signature+"21 31 00d8") + strings.Repeat("\x00", 0xd8), ""},
		"trusted by a mapped address":    {"192.0.2.8:4", "PROXY TCP4 203.0.113.9 10.0.0.1 5555 9999\r\n", "203.0.113.9:5555"},
		"trusted by a mapped range":      {"192.168.255.1:4", "PROXY TCP4 203.0.113.9 10.0.0.1 5555 9999\r\n", "203.0.113.9:5555"},
		"outside the mapped range":       {"192.169.0.1:4", "", ""},
		"link-local address with a zone": {"[fe80::1%eth0]:4", "PROXY TCP6 2001:db8::9 ::1 5555 9999\r\n", "[2001:db8::9]:5555"},
		"IPv4-mapped address":            {"[::ffff:10.1.2.3]:4", "PROXY TCP4 203.0.113.9 10.0.0.1 5555 9999\r\n", "203.0.113.9:5555"},
		"untrusted, all is data":         {"192.0.2.1:4", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			const data = "data of the client"
			nc := fromProxy{remote: c.from, sent: strings.NewReader(c.sent + data)}
			wrapped, err := wrap(t.Context(), nc)
			got := ""
			if wrapped != nil && wrapped != net.Conn(nc) {
				got = wrapped.RemoteAddr().String()
			}
			if err != nil || got != c.client {
				t.Errorf("client %q, error %v; want %q", got, err, c.client)
			}
			if rest, _ := io.ReadAll(nc); string(rest) != data {
				t.Errorf("left to read %q, want %q", rest, data)
			}
		})
	}
}

func TestProxyHeaderErrors(t *testing.T) {
	wrap := readProxyHeaders([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})
	for name, sent := range map[string]string{
		"nothing":             "",
		"data":                "hello, world\n",
		"cut":                 "PROXY TCP4 203.0.113.9",
		"too long":            "PROXY " + strings.Repeat("x", 200),
		"no such family":      "PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n",
		"v2, cut":             unhex(t, v2Signature+"21 11 000c cb00"),
		"v2, TLV cut":         unhex(t, v2Signature+"21 11 0011 cb007109 0a000001 15b3 270f 04"),
		"v2, wrong signature": unhex(t, "0d0a0d0a000d0a515549540b 21 11 0000"),
	} {
		t.Run(name, func(t *testing.T) {
			client, err := wrap(t.Context(), fromProxy{remote: "10.1.2.3:4", sent: strings.NewReader(sent)})
			if err == nil || client != nil || !strings.Contains(err.Error(), "PROXY header") {
				t.Errorf("client %v, error %v; want an error that names the header", client, err)
			}
		})
	}
}

func TestProxyRangeErrors(t *testing.T) {
	for _, wrong := range []string{"nowhere", "", "10.0.0.0/33", "fe80::1%eth0", "fe80::%eth0/10", "::ffff:0.0.0.0/95"} {
		_, err := parseTrusted([]string{"10.0.0.0/8", wrong})
		if usage, ok := errors.AsType[usageError](err); !ok || !strings.Contains(usage.Error(), fmt.Sprintf("%q", wrong)) {
			t.Errorf("%q: error %v, want a usage error that names the range", wrong, err)
		}
	}
}

// The server does not log clients that only connect.
func TestProxyHeaderMissing(t *testing.T) {
	wrap := readProxyHeaders([]netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})
	for sent, bare := range map[string]bool{"": true, "PRO": false, "PROXY ": false, "PROXY TCP4 1": false, v2Start(t): false} {
		_, err := wrap(t.Context(), fromProxy{remote: "10.1.2.3:4", sent: strings.NewReader(sent)})
		if errors.Is(err, io.EOF) != bare || !bare && !strings.HasSuffix(err.Error(), "the connection ended inside it") {
			t.Errorf("%q: error %v", sent, err)
		}
	}
}

func v2Start(t *testing.T) string {
	t.Helper()
	return unhex(t, v2Signature)[:6]
}
