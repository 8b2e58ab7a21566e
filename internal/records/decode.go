package records

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/text/encoding"
	"golang.org/x/text/encoding/htmlindex"
	"golang.org/x/text/encoding/ianaindex"
	"golang.org/x/text/transform"
)

// undecoded replaces what cannot be decoded. It is not valid UTF-8, so the later check of the text finds it, with its
// line and column.
const undecoded = 0xff

// byteOrderMarks lists byte order marks and their encodings. A longer mark comes before one that is its prefix.
var byteOrderMarks = []struct{ mark, encoding string }{
	{"\xff\xfe\x00\x00", "utf-32le"},
	{"\x00\x00\xfe\xff", "utf-32be"},
	{"\xff\xfe", "utf-16le"},
	{"\xfe\xff", "utf-16be"},
	{"\xef\xbb\xbf", "utf-8"},
}

// sniffMark returns the byte order mark that r begins with, or "". It reads only as many bytes as it needs, because a
// person may be typing them.
func sniffMark(r *bufio.Reader) (mark, encoding string) {
	for n := 1; n <= 4; n++ {
		start, err := r.Peek(n)
		possible := false
		for _, m := range byteOrderMarks {
			possible = possible || err == nil && len(m.mark) > n && strings.HasPrefix(m.mark, string(start))
		}
		if possible {
			continue
		}
		for _, m := range byteOrderMarks {
			if bytes.HasPrefix(start, []byte(m.mark)) {
				return m.mark, m.encoding
			}
		}
		return "", ""
	}
	return "", ""
}

// decode returns a reader of the text of r as UTF-8, and whether that differs from
// what r holds. It is the same if there is neither a mark nor a named encoding.
func decode(r io.Reader, opts Options) (text io.Reader, decoded bool, err error) {
	in, ok := r.(*bufio.Reader)
	if !ok {
		in = bufio.NewReader(r)
	}
	mark, name := sniffMark(in)
	if mark != "" && (name != "utf-8" || opts.Format == CSV || opts.Encoding != "") {
		if _, err := in.Discard(len(mark)); err != nil {
			return nil, false, err
		}
	}
	if mark == "" {
		name = opts.Encoding
	}
	if name == "" || mark != "" && name == "utf-8" && opts.Encoding == "" {
		return in, false, nil
	}
	t, err := decoderOf(name)
	if err != nil {
		return nil, false, err
	}
	if t == nil {
		return in, true, nil // UTF-8, which is checked later
	}
	return &decoder{transform.NewReader(in, t), in}, true, nil
}

type decoder struct {
	io.Reader
	in *bufio.Reader
}

// Buffered returns how much was read and not decoded.
func (d *decoder) Buffered() int { return d.in.Buffered() }

// CheckEncoding returns an error if the encoding of that name is not known. The empty
// name is UTF-8.
func CheckEncoding(name string) error {
	_, err := decoderOf(name)
	return err
}

// decoderOf returns what decodes an encoding, or nil for UTF-8.
func decoderOf(name string) (transform.Transformer, error) {
	switch strings.NewReplacer("-", "", "_", "").Replace(strings.ToLower(name)) { // spellings differ
	case "", "utf8", "utf8sig", "usascii", "ascii":
		return nil, nil
	case "utf16", "utf16le":
		return &utfDecoder{order: binary.LittleEndian, size: 2}, nil
	case "utf16be":
		return &utfDecoder{order: binary.BigEndian, size: 2}, nil
	case "utf32", "utf32le":
		return &utfDecoder{order: binary.LittleEndian, size: 4}, nil
	case "utf32be":
		return &utfDecoder{order: binary.BigEndian, size: 4}, nil
	}
	for _, name := range []string{name, strings.Replace(strings.ToLower(name), "latin-", "latin", 1)} {
		// Ask IANA's index first: HTML's index takes ISO-8859-1 for windows-1252.
		if e, err := ianaindex.IANA.Encoding(name); err == nil && e != nil {
			return markedDecoder(e), nil
		}
		if e, err := htmlindex.Get(name); err == nil && e != nil {
			return markedDecoder(e), nil
		}
	}
	const known = "utf-8, utf-16, iso-8859-1, windows-1252, shift_jis or gb18030"
	return nil, fmt.Errorf("unknown encoding %q: want one such as %s", name, known)
}

func markedDecoder(e encoding.Encoding) transform.Transformer {
	return transform.Chain(e.NewDecoder(), markUndecoded{})
}

// markUndecoded replaces U+FFFD, with which the decoders of x/text say that something
// cannot be decoded. Hardly any encoding except Unicode's contains that character itself.
type markUndecoded struct{ transform.NopResetter }

func (markUndecoded) Transform(dst, src []byte, atEOF bool) (nDst, nSrc int, err error) {
	const replacement = "\ufffd"
	for nSrc < len(src) {
		if nDst == len(dst) {
			return nDst, nSrc, transform.ErrShortDst
		}
		if src[nSrc] == replacement[0] {
			if !atEOF && !utf8.FullRune(src[nSrc:]) {
				return nDst, nSrc, transform.ErrShortSrc
			}
			if bytes.HasPrefix(src[nSrc:], []byte(replacement)) {
				dst[nDst] = undecoded
				nDst++
				nSrc += len(replacement)
				continue
			}
		}
		dst[nDst] = src[nSrc]
		nDst++
		nSrc++
	}
	return nDst, nSrc, nil
}

// utfDecoder decodes UTF-16 and UTF-32. Unlike the decoders of x/text it distinguishes
// U+FFFD in the source from what cannot be decoded.
type utfDecoder struct {
	transform.NopResetter
	order binary.ByteOrder
	size  int // of a unit, in bytes
}

func (d *utfDecoder) Transform(dst, src []byte, atEOF bool) (nDst, nSrc int, err error) {
	for nSrc < len(src) {
		if len(dst)-nDst < utf8.UTFMax {
			return nDst, nSrc, transform.ErrShortDst
		}
		r, n, complete := d.rune(src[nSrc:])
		if !complete && !atEOF {
			return nDst, nSrc, transform.ErrShortSrc
		}
		if nSrc += n; r < 0 {
			dst[nDst] = undecoded
			nDst++
			continue
		}
		nDst += utf8.EncodeRune(dst[nDst:], r)
	}
	return nDst, nSrc, nil
}

// rune returns the character that src begins with, or -1 if it cannot be decoded, and its
// length. complete is false if more of src could change the result.
func (d *utfDecoder) rune(src []byte) (r rune, n int, complete bool) {
	if len(src) < d.size {
		return -1, len(src), false
	}
	if d.size == 4 {
		u := d.order.Uint32(src)
		if u > utf8.MaxRune || !utf8.ValidRune(rune(u)) {
			return -1, 4, true
		}
		return rune(u), 4, true
	}
	r = rune(d.order.Uint16(src))
	if !utf16.IsSurrogate(r) {
		return r, 2, true
	}
	if r >= 0xdc00 { // the second of a pair, without the first
		return -1, 2, true
	}
	if len(src) < 4 {
		return -1, 2, false
	}
	if low := rune(d.order.Uint16(src[2:])); low >= 0xdc00 && low < 0xe000 {
		return utf16.DecodeRune(r, low), 4, true
	}
	return -1, 2, true
}
