//go:build unix

package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"
)

func TestG1EchoIsByteForByteWhatWasSent(t *testing.T) {
	t.Parallel()
	e := start(t)
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	for _, tt := range []struct{ name, data string }{
		{"every byte there is", string(every)},
		{"one byte", "x"},
		{"no newline at the end", "line\nand a rest"},
		{"only newlines", "\n\n\r\n\n"},
		{"not UTF-8, and what looks like notices", "\xff\xfe\x00SHUTDOWN 5 SIGTERM\nPAUSED\nBUSY\n"},
		{"telnet's commands", "\xff\xf4\xff\xfd\x06"},
		{"a buffer less one", string(randomBytes(1, 4095))},
		{"a buffer", string(randomBytes(2, 4096))},
		{"a buffer and one", string(randomBytes(3, 4097))},
		{"large", string(randomBytes(4, 1<<20+1))},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := e.dial()
			sent := make(chan error, 1)
			go func() { sent <- p.sendAll(tt.data) }()
			err := p.expectRest(tt.data)
			check(t, <-sent)
			check(t, err)
		})
	}
}

func (p *peer) sendAll(data string) error {
	if err := p.send(data); err != nil {
		return err
	}
	return p.CloseWrite()
}

func TestG1ManyClientsGetTheirOwnBytesInOrder(t *testing.T) {
	t.Parallel()
	e := start(t)
	const clients, size = 16, 512 << 10
	each(t, clients, func(i int) error {
		p, err := connect(e.addr)
		if err != nil {
			return err
		}
		defer p.Close()
		data := randomBytes(uint64(i), size)
		sent := make(chan error, 1)
		go func() { sent <- p.sendInPieces(uint64(i), data) }()
		got, err := p.rest()
		if sendErr := <-sent; sendErr != nil {
			return sendErr
		}
		if err == nil && !bytes.Equal([]byte(got), data) {
			err = fmt.Errorf("%d bytes came back, and not those %d that were sent", len(got), size)
		}
		return err
	})
	e.awaitOpen(0)
	st := e.status()
	if st.BytesIn != clients*size || st.BytesOut != clients*size {
		t.Errorf("%d bytes in and %d out, want %d of each", st.BytesIn, st.BytesOut, clients*size)
	}
}

// sendInPieces sends data in writes of all sizes, and ends the stream.
func (p *peer) sendInPieces(seed uint64, data []byte) error {
	sizes := rand.New(rand.NewPCG(seed, 0))
	for len(data) > 0 {
		n := min(len(data), 1+sizes.IntN(20_000))
		if _, err := p.Write(data[:n]); err != nil {
			return err
		}
		data = data[n:]
	}
	return p.CloseWrite()
}

// randomBytes is n bytes that depend on seed alone.
func randomBytes(seed uint64, n int) []byte {
	data := make([]byte, n)
	_, _ = io.ReadFull(randomStream(seed), data)
	return data
}

func randomStream(seed uint64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}

// TestG1EchoComesAtOnce: bytes do not wait for a newline, nor for more of their kind.
func TestG1EchoComesAtOnce(t *testing.T) {
	t.Parallel()
	e := start(t)
	p := e.dial()
	check(t, p.SetDeadline(time.Now().Add(patience)))
	for _, b := range []string{"a", "\x00", "\xff", "b"} {
		check(t, p.echo(b))
	}
	check(t, p.leave())
}
