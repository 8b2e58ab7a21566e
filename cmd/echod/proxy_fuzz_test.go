package main

import (
	"bytes"
	"encoding/hex"
	"io"
	"strings"
	"testing"
)

// FuzzReadProxyHeader checks that a header is read within its bounds, that not a byte after it is consumed, and that the
// error of a bad one says what it is about.
func FuzzReadProxyHeader(f *testing.F) {
	v2, err := hex.DecodeString(strings.ReplaceAll("0d0a0d0a000d0a515549540a 21 11 000c cb007109 0a000001 15b3 270f", " ", ""))
	if err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{
		"", "PROXY ", "PROXY UNKNOWN\r\n", "PROXY TCP4 203.0.113.9 10.0.0.1 5555 9999\r\n", "PROXY TCP6 2001:db8::9 ::1 5555 9999\r\n",
		"PROXY TCP4 203.0.113.9", "PROXY " + strings.Repeat("x", 200), "GET / HTTP/1.1\r\n", string(v2), string(v2[:14]), string(v2[:20]),
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		const after = "data of the client"
		input := bytes.NewReader(append(bytes.Clone(sent), after...))
		header, err := readProxyHeader(input)
		rest, _ := io.ReadAll(input)
		if len(header) > fixedV2+1<<16 {
			t.Errorf("header of %d bytes", len(header))
		}
		if err == nil && string(header)+string(rest) != string(sent)+after {
			t.Errorf("header %q and rest %q, of %q", header, rest, sent)
		}
		client, err := readProxyClient(fromProxy{remote: "10.1.2.3:4", sent: strings.NewReader(string(sent))})
		if err != nil && (client != nil || !strings.Contains(err.Error(), "PROXY header")) {
			t.Errorf("client %v, error %v; want one that names the header", client, err)
		}
	})
}
