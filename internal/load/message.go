package load

import (
	"fmt"
	"hash/crc32"
)

// A message is a line of exactly so many bytes:
//
//	5f0c9a1e 0000002a 000000a01b ................ 9d3c44f1
//	run      conn     sequence   padding          CRC-32C of all before it
//
// in lower-case hexadecimal, so that by its form it is never a notice. The
// sequence number counts from 0 on each connection.
const (
	seqAt     = 18 // where the sequence number is
	seqDigits = 10
	sumDigits = 8
	headSize  = seqAt + seqDigits + 1 // with the blank after it
	tailSize  = sumDigits + 1         // with the newline

	// MinSize is the size, in bytes, of the smallest message.
	MinSize = headSize + tailSize
)

// padding is what fills a message up. Its period divides no usual size of a
// buffer, so that a shift shows.
const padding = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// An origin is where a message is from.
type origin struct {
	run  uint32 // random
	conn uint32 // counts the run's connections from 1
}

// template returns a message of size bytes whose sequence number and checksum are
// still to be filled in.
func (o origin) template(size int) []byte {
	m := fmt.Appendf(make([]byte, 0, size), "%08x %08x %0*x ", o.run, o.conn, seqDigits, 0)
	for len(m) < size-tailSize {
		m = append(m, padding[:min(len(padding), size-tailSize-len(m))]...)
	}
	if len(m) > headSize {
		m[len(m)-1] = ' '
	}
	return append(m[:size-tailSize], "00000000\n"...)
}

// number makes the template m the message with this sequence number.
func number(m []byte, seq uint64) {
	const digits = "0123456789abcdef"
	for i := seqAt + seqDigits - 1; i >= seqAt; i-- {
		m[i] = digits[seq&15]
		seq >>= 4
	}
	body := m[:len(m)-tailSize]
	sum := crc32.Checksum(body, castagnoli)
	for i := len(m) - 2; i >= len(body); i-- {
		m[i] = digits[sum&15]
		sum >>= 4
	}
}

// parse reads a message of size bytes, its newline included. It reports false for
// what is none, or has been changed on its way.
func parse(m []byte, size int) (from origin, seq uint64, ok bool) {
	if len(m) != size || m[size-1] != '\n' {
		return origin{}, 0, false
	}
	body := m[:size-tailSize]
	sum, ok := hexNumber(m[size-tailSize : size-1])
	if !ok || uint32(sum) != crc32.Checksum(body, castagnoli) {
		return origin{}, 0, false
	}
	run, okRun := hexNumber(m[:8])
	conn, okConn := hexNumber(m[9:17])
	seq, okSeq := hexNumber(m[seqAt : seqAt+seqDigits])
	return origin{uint32(run), uint32(conn)}, seq, okRun && okConn && okSeq
}

// hexNumber reads lower-case hexadecimal, and nothing else.
func hexNumber(digits []byte) (n uint64, ok bool) {
	for _, d := range digits {
		switch {
		case '0' <= d && d <= '9':
			n = n<<4 | uint64(d-'0')
		case 'a' <= d && d <= 'f':
			n = n<<4 | uint64(d-'a'+10)
		default:
			return 0, false
		}
	}
	return n, true
}
