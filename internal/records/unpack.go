package records

import (
	"archive/zip"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

const (
	// packedBuffer is how much of packed input is read at once, in bytes.
	packedBuffer = 64 << 10

	// maxZstdWindow bounds the memory for zstd, in bytes. RFC 8878 asks of
	// every decoder to support 8 MB; levels up to 19 need no more.
	maxZstdWindow = 8 << 20

	// maxXZDictionary bounds the memory for xz, in bytes: that of xz -9.
	maxXZDictionary = 64 << 20
)

// A container is a compressed, archive or binary format.
type container struct {
	magic string
	name  string
	read  bool   // this package unpacks it
	hint  string // what the user can do if it does not
}

// containers are recognised by their first bytes. The second entry of zstd is a frame
// to be skipped: the lower four bits of its first byte may be anything.
var containers = []container{
	{magic: "\x1f\x8b", name: "gzip", read: true},
	{magic: "\x28\xb5\x2f\xfd", name: "zstd", read: true},
	{magic: "\x50\x2a\x4d\x18", name: "zstd", read: true},
	{magic: "BZh", name: "bzip2", read: true},
	{magic: "\xfd7zXZ\x00", name: "xz", read: true},
	{magic: "PK\x03\x04", name: "zip", read: true},
	{magic: "PK\x05\x06", name: "zip", read: true}, // without members
	{magic: "7z\xbc\xaf\x27\x1c", name: "7-Zip", hint: "unpack it with 7z"},
	{magic: "Rar!\x1a\x07", name: "RAR", hint: "unpack it with unrar"},
	{magic: "\x1f\x9d", name: "compress", hint: "unpack it with zcat, into standard input"},
	{magic: "\x04\x22\x4d\x18", name: "lz4", hint: "unpack it with lz4 -dc, into standard input"},
	{magic: "LZIP\x01", name: "lzip", hint: "unpack it with lzip -dc, into standard input"},
	{magic: "\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", name: "a Microsoft Office document", hint: "save it as CSV"},
	{magic: "PAR1", name: "Parquet", hint: "convert it to CSV"},
	{magic: "SQLite format 3\x00", name: "an SQLite database", hint: "export it as CSV"},
	{magic: "%PDF-", name: "PDF", hint: "it contains no records"},
}

// sniff returns what the data in r is packed in, or nil. It reads only as many bytes as it needs, because a person
// may be typing them.
func sniff(r *bufio.Reader) *container {
	for n := 1; ; n++ {
		peeked, err := r.Peek(n)
		if err != nil {
			return nil // reading will return it
		}
		start := string(peeked)
		if start[0]&0xf0 == 0x50 && (n == 1 || start[1] == '*') {
			start = "\x50" + start[1:]
		}
		possible := false
		for i, c := range containers {
			if start == c.magic {
				return &containers[i]
			}
			possible = possible || strings.HasPrefix(c.magic, start)
		}
		if !possible {
			return nil
		}
	}
}

// isTar reports whether what r begins with, as far as it was read already, is a tar
// archive.
func isTar(r *bufio.Reader) bool {
	const at, magic = 257, "ustar"
	header, _ := r.Peek(min(r.Buffered(), at+len(magic)))
	return len(header) == at+len(magic) && string(header[at:]) == magic
}

// unpack returns a reader of the content of in, and whether that differs from the input.
// The reader is a *bufio.Reader or an *unpacker. Blocks, unlike text, may be archives.
func unpack(in *input, format Format) (r io.Reader, unpacked bool, err error) {
	packed := bufio.NewReaderSize(in, packedBuffer)
	c := sniff(packed)
	switch {
	case c == nil && format != Raw && isTar(packed):
		return nil, false, errTar
	case c == nil:
		return packed, false, checkPackedName(in)
	case !c.read && format == Raw, c.name == "zip" && format == Raw:
		return packed, false, nil
	case !c.read:
		return nil, false, fmt.Errorf("%s is not supported: %s", c.name, c.hint)
	}
	u := &unpacker{in: in, packed: packed, kind: c.name}
	switch c.name {
	case "gzip":
		u.r, err = newGzipReader(packed)
	case "zstd":
		// With a concurrency of one it starts no goroutines, and need not be closed.
		u.r, err = zstd.NewReader(packed, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxZstdWindow))
	case "bzip2":
		u.r = bzip2.NewReader(packed)
	case "xz":
		if err = checkXZ(packed); err == nil {
			u.r, err = xz.NewReader(packed)
		}
	case "zip":
		u.r, err = openZip(in, packed)
	}
	if err != nil {
		return nil, false, u.explain(err)
	}
	if format != Raw {
		content := bufio.NewReader(u.r)
		_, _ = content.Peek(512) // the next read returns the same error
		if isTar(content) {
			return nil, false, errTar
		}
		u.r = content
	}
	return u, true, nil
}

// An adviceError is an error that tells the user what to do instead.
type adviceError string

func (e adviceError) Error() string { return string(e) }

const (
	errTar = adviceError("tar archives are not supported: extract a member with tar -xO, into standard input")

	errWindow = adviceError("zstd needs a window of more than 8 MiB, as after zstd --ultra or --long; " +
		"unpack it with zstd -dc --long=31, into standard input")
	errDictionary = adviceError("xz needs a dictionary of more than 64 MiB; unpack it with xz -dc, into standard input")
	errXZFilter   = adviceError("xz uses a filter that is not supported; unpack it with xz -dc, into standard input")

	errZipStream    = adviceError("zip is read from regular files only: save it first, or unpack it with funzip")
	errZipEmpty     = adviceError("the zip archive has no members")
	errZipEncrypted = adviceError("the zip archive is encrypted: unpack it with unzip")
)

// checkPackedName returns an error if a file has the name of a packed file, but not its content. URLs are not checked,
// because servers may unpack what they send.
func checkPackedName(in *input) error {
	kinds := map[string]string{
		".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".tbz2": "bzip2",
		".xz": "xz", ".txz": "xz", ".zip": "zip",
	}
	kind := kinds[strings.ToLower(path.Ext(in.name))]
	if kind == "" || in.url || in.err != nil && in.err != io.EOF {
		return nil
	}
	return fmt.Errorf("the name says %s, and the content is not; --verbatim sends it as it is", kind)
}

// An unpacker wraps a decompressor and explains its errors.
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

// Buffered returns how much was read and not unpacked.
func (u *unpacker) Buffered() int { return u.packed.Buffered() }

func (u *unpacker) explain(err error) error {
	if _, ok := errors.AsType[adviceError](err); ok {
		return err
	}
	at := u.in.consumed.Load() - int64(u.packed.Buffered())
	switch {
	case u.in.err != nil && u.in.err != io.EOF:
		return u.in.err // the input failed; the packed data may be intact
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return fmt.Errorf("%s data ends too early, after %d bytes", u.kind, at)
	case errors.Is(err, zstd.ErrWindowSizeExceeded):
		return errWindow
	default:
		return fmt.Errorf("%s data is damaged before byte %d: %w", u.kind, at, err)
	}
}

// gzipReader reads members, and the zeros with which tapes pad the last of them.
type gzipReader struct {
	r  *bufio.Reader
	gz *gzip.Reader
}

func newGzipReader(r *bufio.Reader) (*gzipReader, error) {
	gz, err := gzip.NewReader(r)
	if err != nil {
		return nil, err
	}
	gz.Multistream(false)
	return &gzipReader{r, gz}, nil
}

func (g *gzipReader) Read(p []byte) (int, error) {
	for {
		n, err := g.gz.Read(p)
		if n > 0 || err != io.EOF {
			if err == io.EOF {
				err = nil // comes again
			}
			return n, err
		}
		if err := g.skipPadding(); err != nil {
			return 0, err
		}
		if next, _ := g.r.Peek(2); string(next) != "\x1f\x8b" && (len(next) == 2 || next[0] != 0x1f) {
			return 0, gzip.ErrHeader
		}
		if err := g.gz.Reset(g.r); err != nil {
			return 0, err
		}
		g.gz.Multistream(false)
	}
}

// skipPadding skips zeros. It returns io.EOF if there is nothing else.
func (g *gzipReader) skipPadding() error {
	for {
		c, err := g.r.ReadByte()
		if err != nil {
			return err
		}
		if c != 0 {
			return g.r.UnreadByte()
		}
	}
}

// checkXZ refuses a first block that needs much memory, or a filter that is not
// supported, before memory is allocated for it.
func checkXZ(r *bufio.Reader) error {
	const streamHeader = 12
	const lzma2 = 0x21
	start, err := r.Peek(streamHeader + 8)
	if err != nil || start[streamHeader] == 0 {
		return nil // damaged or empty: reading will tell
	}
	size := (int(start[streamHeader]) + 1) * 4
	block, err := r.Peek(streamHeader + size)
	if err != nil {
		return nil
	}
	block = block[streamHeader:]
	at := 2
	for _, optional := range []byte{0x40, 0x80} { // the optional sizes are numbers of variable length
		if block[1]&optional != 0 {
			for at < size-1 && block[at] >= 0x80 {
				at++
			}
			at++
		}
	}
	if at+3 > size {
		return nil
	}
	if block[1]&3 != 0 || block[at] != lzma2 {
		return errXZFilter
	}
	// The size is encoded as 2 or 3 times a power of two; 40 is the largest valid code.
	if bits := int(block[at+2]); bits > 40 || int64(2|bits&1)<<(bits/2+11) > maxXZDictionary {
		return errDictionary
	}
	return nil
}

// openZip opens the only member of a zip archive, whose directory is at its end.
func openZip(in *input, packed *bufio.Reader) (io.Reader, error) {
	file, ok := in.r.(io.ReaderAt)
	if !ok || in.size < 0 || in.consumed.Load() != int64(packed.Buffered()) {
		return nil, errZipStream
	}
	archive, err := zip.NewReader(zipInput{in, file}, in.size)
	if err != nil {
		return nil, err
	}
	var member *zip.File
	for _, f := range archive.File {
		if f.FileInfo().IsDir() {
			continue
		}
		if member != nil {
			return nil, adviceError(fmt.Sprintf(
				"the zip archive has %d members: extract one with unzip -p, into standard input", len(archive.File)))
		}
		member = f
	}
	switch {
	case member == nil:
		return nil, errZipEmpty
	case member.Flags&1 != 0:
		return nil, errZipEncrypted
	}
	packed.Reset(bytes.NewReader(nil))
	in.consumed.Store(0)
	return member.Open()
}

// zipInput counts what is read of an archive.
type zipInput struct {
	in *input
	r  io.ReaderAt
}

func (z zipInput) ReadAt(p []byte, off int64) (int, error) {
	if z.in.ctx.Err() != nil {
		return 0, z.in.ctx.Err()
	}
	n, err := z.r.ReadAt(p, off)
	if off+int64(len(p)) < z.in.size { // the directory at the end does not count
		z.in.consumed.Store(max(z.in.consumed.Load(), off+int64(n)))
	}
	return n, err
}
