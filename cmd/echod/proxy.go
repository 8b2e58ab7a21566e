package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/pires/go-proxyproto"

	"echod/server"
)

// parseTrusted reads the ranges of addresses that a PROXY header is expected from. They are compared with addresses that are neither
// mapped nor have a zone.
func parseTrusted(ranges []string) (trusted []netip.Prefix, err error) {
	for _, text := range ranges {
		prefix, err := parseRange(strings.TrimSpace(text))
		if err != nil {
			return nil, usagef("--proxy-protocol %q: want an address or a range such as 10.0.0.0/8: %w", text, err)
		}
		trusted = append(trusted, prefix.Masked())
	}
	return trusted, nil
}

func parseRange(text string) (netip.Prefix, error) {
	addr, err := netip.ParseAddr(text)
	switch {
	case err == nil && addr.Zone() != "":
		return netip.Prefix{}, errors.New("it has a zone")
	case err == nil:
		return netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen()), nil
	case !strings.Contains(text, "/"):
		return netip.Prefix{}, errors.New("it is neither")
	}
	prefix, err := netip.ParsePrefix(text)
	const mapped = 96 // bits before an IPv4 address in IPv6
	switch {
	case err != nil:
		return netip.Prefix{}, errors.New("it is neither")
	case !prefix.Addr().Is4In6():
		return prefix, nil
	case prefix.Bits() < mapped:
		return netip.Prefix{}, errors.New("it reaches beyond the IPv4 addresses")
	default:
		return netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-mapped), nil
	}
}

// proxied reads the PROXY header, of version 1 or 2, of connections that come from a trusted address. What others
// send is theirs, whatever it looks like.
func proxied(trusted []netip.Prefix) server.Identify {
	return func(nc net.Conn) (*net.TCPAddr, error) {
		from, err := netip.ParseAddrPort(nc.RemoteAddr().String())
		if err != nil || !slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(from.Addr().Unmap().WithZone("")) }) {
			return nil, nil
		}
		raw, err := readProxyHeader(nc)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errCut
		}
		if err != nil {
			return nil, fmt.Errorf("reading the PROXY header: %w", err)
		}
		if isV2(raw) && raw[familyV2]>>4 == unspecified {
			return nil, nil // the proxy cannot say, such as for a client of a family of its own
		}
		header, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(raw)))
		if err != nil {
			return nil, fmt.Errorf("reading the PROXY header %.40q: %w", raw, err)
		}
		if header.Command.IsLocal() {
			return nil, nil // the proxy's own connection, such as a health check
		}
		client, _ := header.SourceAddr.(*net.TCPAddr) // nil where the proxy says that it does not know
		return client, nil
	}
}

// Bounds and marks of the two versions, https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt.
const (
	markV1     = "PROXY "
	markV2     = "\r\n\r\n\x00\r\nQUIT\n"
	longestV1  = 107
	fixedV2    = 16
	longestTLV = 4096 // what proxies add to an address; the protocol would allow 65,535

	familyV2    = 13 // the byte whose upper half is the family
	unspecified = 0  // AF_UNSPEC
)

var (
	errNoHeader = errors.New("it is none")
	errCut      = errors.New("the connection has ended within it")
)

func isV2(raw []byte) bool { return string(raw[:len(markV1)]) == markV2[:len(markV1)] }

// readProxyHeader reads a header, and not a byte of what follows it. The error wraps io.EOF where nothing came at all, and
// io.ErrUnexpectedEOF where it was cut.
func readProxyHeader(r io.Reader) ([]byte, error) {
	raw := make([]byte, len(markV1), fixedV2+longestTLV)
	if _, err := io.ReadFull(r, raw); err != nil {
		return nil, err
	}
	switch {
	case string(raw) == markV1:
		return readToNewline(r, raw)
	case isV2(raw):
		return readV2(r, raw)
	default:
		return nil, fmt.Errorf("%w: it begins with %q", errNoHeader, raw)
	}
}

func readToNewline(r io.Reader, raw []byte) ([]byte, error) {
	for len(raw) < longestV1 {
		next := raw[len(raw) : len(raw)+1]
		if err := readMore(r, next); err != nil {
			return nil, err
		}
		raw = raw[:len(raw)+1]
		if next[0] == '\n' {
			return raw, nil
		}
	}
	return nil, fmt.Errorf("%w: the line does not end within %d bytes", errNoHeader, longestV1)
}

func readV2(r io.Reader, raw []byte) ([]byte, error) {
	begun := len(raw)
	raw = raw[:fixedV2]
	if err := readMore(r, raw[begun:]); err != nil {
		return nil, err
	}
	length := int(binary.BigEndian.Uint16(raw[fixedV2-2:]))
	if string(raw[:len(markV2)]) != markV2 || length > longestTLV {
		return nil, fmt.Errorf("%w: it begins with %q, of %d bytes more", errNoHeader, raw[:len(markV2)], length)
	}
	raw = raw[:fixedV2+length]
	return raw, readMore(r, raw[fixedV2:])
}

// readMore fills p with what a header that has begun goes on with.
func readMore(r io.Reader, p []byte) error {
	_, err := io.ReadFull(r, p)
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
