package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/pires/go-proxyproto"

	"echod/server"
)

func init() {
	// nginx writes IPv4 addresses into TCP6 headers when a client and the server differ in family.
	proxyproto.V1AcceptIPv4InTCP6 = true
	// proxyproto bounds headers because of untrusted senders. Our proxies are trusted, and have a time limit.
	proxyproto.MaxV2HeaderSize = math.MaxUint16
}

// trustUnix stands for all clients of Unix sockets.
var trustUnix = netip.Prefix{}

// parseTrusted parses the address ranges of proxies, and the word unix. An IPv4-mapped range becomes an IPv4 range.
func parseTrusted(ranges []string) (trusted []netip.Prefix, err error) {
	for _, text := range ranges {
		if strings.TrimSpace(text) == "unix" {
			trusted = append(trusted, trustUnix)
			continue
		}
		prefix, err := server.ParseRange(strings.TrimSpace(text))
		if err != nil {
			return nil, usagef("--proxy-protocol %w", err)
		}
		trusted = append(trusted, prefix)
	}
	return trusted, nil
}

// readProxyHeaders returns a WrapConn that reads the PROXY header, version 1 or 2, of connections from trusted addresses.
// It reads nothing from other connections.
func readProxyHeaders(trusted []netip.Prefix) server.WrapConn {
	return func(_ context.Context, nc net.Conn) (net.Conn, error) {
		if !isTrusted(trusted, nc.RemoteAddr()) {
			return nc, nil
		}
		client, err := readProxyClient(nc)
		switch {
		case err != nil:
			return nil, err
		case client == nil:
			return nc, nil
		default:
			return server.WithRemoteAddr(nc, client), nil
		}
	}
}

// isTrusted reports whether remote is in trusted, or is a Unix socket if these are trusted.
func isTrusted(trusted []netip.Prefix, remote net.Addr) bool {
	if remote.Network() == "unix" {
		return slices.Contains(trusted, trustUnix)
	}
	from, err := netip.ParseAddrPort(remote.String())
	addr := from.Addr().Unmap().WithZone("") // in the form of the ranges
	return err == nil && slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// readProxyClient reads a PROXY header, and returns the client's address; nil if the header has none.
func readProxyClient(nc net.Conn) (net.Addr, error) {
	raw, err := readProxyHeader(nc)
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = errTruncated
	}
	if err != nil {
		return nil, fmt.Errorf("reading the PROXY header: %w", err)
	}
	if isV2(raw) && raw[familyV2]>>4 == unspecified {
		return nil, nil // the proxy does not know the client's address
	}
	header, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(raw)))
	if err != nil {
		return nil, fmt.Errorf("reading the PROXY header %.40q: %w", raw, err)
	}
	client, ok := header.SourceAddr.(*net.TCPAddr)
	if header.Command.IsLocal() || !ok {
		return nil, nil // the proxy's own connection, such as a health check
	}
	return client, nil
}

// Signatures and sizes of the two versions, see https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt.
const (
	signatureV1 = "PROXY "
	signatureV2 = "\r\n\r\n\x00\r\nQUIT\n"
	maxV1       = 107
	fixedV2     = 16 // bytes before the addresses and TLVs, which have up to 65,535 bytes

	familyV2    = 13 // offset of the byte whose upper half is the address family
	unspecified = 0  // AF_UNSPEC
)

var (
	errNoHeader  = errors.New("not a PROXY header")
	errTruncated = errors.New("the connection ended inside it")
)

func isV2(raw []byte) bool { return string(raw[:len(signatureV1)]) == signatureV2[:len(signatureV1)] }

// readProxyHeader reads a header, and no byte after it. The error wraps io.EOF if the stream ended
// before the first byte, and io.ErrUnexpectedEOF if it ended inside the header.
func readProxyHeader(r io.Reader) ([]byte, error) {
	raw := make([]byte, len(signatureV1), maxV1)
	if _, err := io.ReadFull(r, raw); err != nil {
		return nil, err
	}
	switch {
	case string(raw) == signatureV1:
		return readV1(r, raw)
	case isV2(raw):
		return readV2(r, raw)
	default:
		return nil, fmt.Errorf("%w: it begins with %q", errNoHeader, raw)
	}
}

// readV1 reads byte by byte, because it must not read a byte after the newline.
func readV1(r io.Reader, raw []byte) ([]byte, error) {
	for len(raw) < maxV1 {
		next := raw[len(raw) : len(raw)+1]
		if err := readMore(r, next); err != nil {
			return nil, err
		}
		raw = raw[:len(raw)+1]
		if next[0] == '\n' {
			return raw, nil
		}
	}
	return nil, fmt.Errorf("%w: no end of line within %d bytes", errNoHeader, maxV1)
}

func readV2(r io.Reader, raw []byte) ([]byte, error) {
	start := len(raw)
	raw = raw[:fixedV2]
	if err := readMore(r, raw[start:]); err != nil {
		return nil, err
	}
	length := int(binary.BigEndian.Uint16(raw[fixedV2-2:]))
	if string(raw[:len(signatureV2)]) != signatureV2 {
		return nil, fmt.Errorf("%w: it begins with %q", errNoHeader, raw[:len(signatureV2)])
	}
	raw = slices.Grow(raw, length)[:fixedV2+length]
	return raw, readMore(r, raw[fixedV2:])
}

// readMore fills p with the next bytes of a header.
func readMore(r io.Reader, p []byte) error {
	_, err := io.ReadFull(r, p)
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
