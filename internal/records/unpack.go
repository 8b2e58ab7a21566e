package records

import (
	"bufio"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
)

const (
	// packedBuffer is how much of packed input is read at once, in bytes.
	packedBuffer = 64 << 10

	// maxZstdWindow bounds the memory for zstd, in bytes. RFC 8878 asks of
	// every decoder to support 8 MB; levels up to 19 need no more.
	maxZstdWindow = 8 << 20
)

var errWindow = fmt.Errorf("zstd wants a window of more than %d MiB, as after zstd --ultra or --long; "+
	"unpack it with zstd -dc --long=31, into standard input", maxZstdWindow>>20)

// magics are what packed data begins with. In the last, which begins a frame that
// zstd skips, the lower half of the first byte may be anything.
var magics = map[string]string{
	"\x1f\x8b":         "gzip",
	"\x28\xb5\x2f\xfd": "zstd",
	"\x50\x2a\x4d\x18": "zstd",
}

// sniff returns how the data in r is packed, or "". It waits for no more bytes
// than it takes to tell, since a person may be typing them.
func sniff(r *bufio.Reader) (kind string) {
	for n, possible := 1, true; possible; n++ {
		magic, err := r.Peek(n)
		if err != nil {
			return "" // reading will tell
		}
		start := string(magic)
		if start[0]&0xf0 == 0x50 {
			start = "\x50" + start[1:]
		}
		possible = false
		for magic, kind := range magics {
			if start == magic {
				return kind
			}
			possible = possible || strings.HasPrefix(magic, start)
		}
	}
	return ""
}

// unpack returns a reader of what in holds, unpacked if it is packed.
func unpack(in *input) (io.Reader, error) {
	packed := bufio.NewReaderSize(in, packedBuffer)
	u := &unpacker{in: in, packed: packed, kind: sniff(packed)}
	var err error
	switch u.kind {
	case "gzip":
		u.r, err = gzip.NewReader(packed)
	case "zstd":
		// With a concurrency of one it starts no goroutines, and need not be closed.
		u.r, err = zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdWindow))
	default:
		return packed, belied(in)
	}
	if err != nil {
		return nil, u.explain(err)
	}
	return u, nil
}

// belied returns an error if the input's name says that it is packed, which it is
// not, unless it cannot be read at all.
func belied(in *input) error {
	kinds := map[string]string{".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
	kind := kinds[strings.ToLower(path.Ext(in.name))]
	if kind == "" || in.err != nil && in.err != io.EOF {
		return nil
	}
	return fmt.Errorf("not packed by %s, whatever its name says", kind)
}

// An unpacker explains the errors of what unpacks.
type unpacker struct {
	r      io.Reader
	kind   string
	in     *input
	packed *bufio.Reader // between in and r
}

func (u *unpacker) Read(p []byte) (int, error) {
	n, err := u.r.Read(p)
	if err != nil && err != io.EOF {
		err = u.explain(err)
	}
	return n, err
}

// Buffered is how much was read and not unpacked.
func (u *unpacker) Buffered() int { return u.packed.Buffered() }

func (u *unpacker) explain(err error) error {
	at := u.in.consumed.Load() - int64(u.packed.Buffered())
	switch {
	case u.in.err != nil && u.in.err != io.EOF:
		return u.in.err // nothing wrong with what came before it
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fmt.Errorf("%s data ends too early, after %d bytes", u.kind, at)
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return errWindow
	default:
		return fmt.Errorf("%s data is damaged before byte %d: %w", u.kind, at, err)
	}
}
