//go:build unix

package integration

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
)

func TestG1EchoIsExact(t *testing.T) {
	t.Parallel()
	overEach(t, testEchoIsExact)
}

func testEchoIsExact(t *testing.T, over transport) {
	t.Parallel()
	e := over.start(t)

	var every [256]byte
	for i := range every {
		every[i] = byte(i)
	}
	for name, data := range map[string]string{
		"every byte value":                      string(every[:]),
		"one byte":                              "x",
		"no newline at the end":                 "line\nand a rest",
		"only newlines":                         "\n\n\r\n\n",
		"invalid UTF-8 and text of notices":     "\xff\xfe\x00SHUTDOWN 5 SIGTERM\nPAUSED\nBUSY\n",
		"telnet commands":                       "\xff\xf4\xff\xfd\x06",
		"one byte less than the read buffer":    string(randomBytes(1, 4095)),
		"as many bytes as the read buffer":      string(randomBytes(2, 4096)),
		"one byte more than the read buffer":    string(randomBytes(3, 4097)),
		"more than all buffers on the way hold": string(randomBytes(4, 16<<20+1)),
	} {
		t.Run(name, func(t *testing.T) {
			p := e.dial()
			sent := make(chan error, 1)
			go func() { sent <- p.sendAndHalfClose(data) }()
			err := p.expectRest(data)
			check(t, <-sent)
			check(t, err)
		})
	}

	t.Run("a byte comes back at once", func(t *testing.T) {
		p := e.dial()
		for _, b := range []string{"a", "\x00", "\xff", "b"} {
			check(t, p.echo(b))
		}
		check(t, p.leave())
	})

	t.Run("many clients each get their own bytes in order", func(t *testing.T) {
		e := over.start(t)
		const clients, size = 16, 512 << 10
		each(t, clients, func(i int) error {
			p, err := e.connect()
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
				err = fmt.Errorf("%d bytes came back, which are not the %d that were sent", len(got), size)
			}
			return err
		})
		e.awaitOpen(0)
		st := e.status()
		if st.BytesIn != clients*size || st.BytesOut != clients*size {
			t.Errorf("%d bytes in and %d out, want %d of each", st.BytesIn, st.BytesOut, clients*size)
		}
	})
}

func (p *peer) sendAndHalfClose(data string) error {
	if err := p.send(data); err != nil {
		return err
	}
	return p.CloseWrite()
}

// sendInPieces sends data in writes of many sizes, and half-closes.
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

// randomBytes returns the first n bytes of randomStream(seed).
func randomBytes(seed uint64, n int) []byte {
	data := make([]byte, n)
	_, _ = io.ReadFull(randomStream(seed), data)
	return data
}

// randomStream returns a stream of bytes that depends on seed alone.
func randomStream(seed uint64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return rand.NewChaCha8(key)
}
