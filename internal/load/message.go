package load

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"strconv"
	"strings"
)

// A message is one line:
//
//	5f0c9a1e 0000002a 000000a01b ................9d3c44f1
//	run      conn     sequence   padding         CRC-32C of everything before it
//
// All numbers are lower-case hexadecimal, so a message never looks like a notice.
// The sequence number counts from 0 on each connection.
const (
	seqOffset = 18
	seqDigits = 10
	sumDigits = 8
	headSize  = seqOffset + seqDigits + 1 // including the space before the padding
	tailSize  = sumDigits + 1             // including the newline

	// MinSize is the size of the smallest message, in bytes.
	MinSize = headSize + tailSize

	// MaxSize is the size of the largest message, in bytes.
	MaxSize = 1 << 30
)

// The period of the padding divides no common buffer size, so a shift is detected.
const paddingText = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+"

// newPadding returns the padding of the largest message of a run. Smaller messages
// use the beginning of it. All connections share one.
func newPadding(maxSize int) []byte {
	n := maxSize - MinSize
	return bytes.Repeat([]byte(paddingText), n/len(paddingText)+1)[:n]
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// An origin identifies the connection that sent a message.
type origin struct {
	run  uint32 // random
	conn uint32 // counts the connections of the run from 1
}

// A frame is the part of a message that is not padding.
type frame struct {
	head [headSize]byte
	tail [tailSize]byte
}

// A template makes the frames of the messages of one connection.
type template struct {
	frame
	prefixSum uint32 // checksum of the part before the sequence number
}

func (o origin) template() (t template) {
	putHex(t.head[:8], uint64(o.run))
	putHex(t.head[9:17], uint64(o.conn))
	t.head[8], t.head[17], t.head[headSize-1] = ' ', ' ', ' '
	t.tail[sumDigits] = '\n'
	t.prefixSum = crc32.Checksum(t.head[:seqOffset], castagnoli)
	return t
}

// fill makes f the frame of the message with this sequence number and padding.
func (t *template) fill(f *frame, seq uint64, padding []byte) {
	*f = t.frame
	putHex(f.head[seqOffset:seqOffset+seqDigits], seq)
	sum := crc32.Update(t.prefixSum, castagnoli, f.head[seqOffset:])
	putHex(f.tail[:sumDigits], uint64(crc32.Update(sum, castagnoli, padding)))
}

// runPrefix returns the bytes that start every message of the run.
func (o origin) runPrefix() []byte { return fmt.Appendf(nil, "%08x ", o.run) }

// parseMessage reads a message including its newline. It reports false if p is not
// a message or was changed in transit.
func parseMessage(p []byte) (from origin, seq uint64, ok bool) {
	if len(p) < MinSize || p[len(p)-1] != '\n' {
		return origin{}, 0, false
	}
	body := p[:len(p)-tailSize]
	sum, ok := parseHex(p[len(body) : len(p)-1])
	if !ok || uint32(sum) != crc32.Checksum(body, castagnoli) {
		return origin{}, 0, false
	}
	run, okRun := parseHex(p[:8])
	conn, okConn := parseHex(p[9:17])
	seq, okSeq := parseHex(p[seqOffset : seqOffset+seqDigits])
	return origin{uint32(run), uint32(conn)}, seq, okRun && okConn && okSeq
}

// putHex fills p with the last digits of n in lower-case hexadecimal.
func putHex(p []byte, n uint64) {
	const digits = "0123456789abcdef"
	for i := len(p) - 1; i >= 0; i-- {
		p[i] = digits[n&15]
		n >>= 4
	}
}

// parseHex reads lower-case hexadecimal. It accepts nothing else.
func parseHex(digits []byte) (n uint64, ok bool) {
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

// Sizes is a distribution of message sizes. The zero value means 64 bytes always.
type Sizes struct {
	ranges []sizeRange
	weight float64 // sum of all weights
}

// A sizeRange is a set of equally likely sizes, in bytes, both ends included.
type sizeRange struct {
	min, max int
	weight   float64
}

// FixedSize returns the distribution of messages that all have n bytes.
func FixedSize(n int) Sizes {
	return Sizes{ranges: []sizeRange{{n, n, 1}}, weight: 1}
}

// ParseSizes reads a distribution: one size ("64"), a range of equally likely sizes
// ("64-1024"), or several of these with weights ("64:90,1024-4096:9,65536:1").
func ParseSizes(text string) (Sizes, error) {
	var s Sizes
	for part := range strings.SplitSeq(text, ",") {
		sizes, weight, weighted := strings.Cut(part, ":")
		low, high, isRange := strings.Cut(sizes, "-")
		r := sizeRange{weight: 1}
		var err error
		if r.min, err = strconv.Atoi(low); err != nil {
			return Sizes{}, fmt.Errorf("size %q: want a number of bytes, such as 64, 64-1024 or 64:90,1024:10", part)
		}
		r.max = r.min
		if isRange {
			if r.max, err = strconv.Atoi(high); err != nil || r.max < r.min {
				return Sizes{}, fmt.Errorf("size %q: want a range such as 64-1024", part)
			}
		}
		if weighted {
			if r.weight, err = strconv.ParseFloat(weight, 64); err != nil || !(r.weight > 0) || r.weight > 1e9 {
				return Sizes{}, fmt.Errorf("size %q: want a positive weight after the colon", part)
			}
		}
		s.ranges = append(s.ranges, r)
		s.weight += r.weight
	}
	return s, s.validate()
}

func (s Sizes) validate() error {
	for _, r := range s.ranges {
		if r.min < MinSize {
			return fmt.Errorf("message size %d: at least %d bytes are needed for the sequence number "+
				"and the checksum", r.min, MinSize)
		}
		if r.max > MaxSize {
			return fmt.Errorf("message size %d: at most %d bytes", r.max, MaxSize)
		}
	}
	if len(s.ranges) > 100 {
		return errors.New("message sizes: at most 100 ranges")
	}
	return nil
}

// String returns the distribution in the form that ParseSizes reads.
func (s Sizes) String() string {
	var parts []string
	for _, r := range s.ranges {
		text := strconv.Itoa(r.min)
		if r.max > r.min {
			text += "-" + strconv.Itoa(r.max)
		}
		if len(s.ranges) > 1 {
			text += ":" + strconv.FormatFloat(r.weight, 'g', -1, 64)
		}
		parts = append(parts, text)
	}
	if parts == nil {
		return strconv.Itoa(DefaultSize)
	}
	return strings.Join(parts, ",")
}

// Max returns the largest size, in bytes.
func (s Sizes) Max() int {
	n := 0
	for _, r := range s.ranges {
		n = max(n, r.max)
	}
	return n
}

// Mean returns the mean size, in bytes, rounded.
func (s Sizes) Mean() int {
	sum := 0.0
	for _, r := range s.ranges {
		sum += r.weight * (float64(r.min) + float64(r.max)) / 2
	}
	return int(sum/s.weight + 0.5)
}

// Fixed reports whether all messages have the same size.
func (s Sizes) Fixed() bool { return len(s.ranges) == 1 && s.ranges[0].min == s.ranges[0].max }

// pick returns a random size.
func (s Sizes) pick() int {
	if s.Fixed() {
		return s.ranges[0].min
	}
	at := rand.Float64() * s.weight
	last := len(s.ranges) - 1
	for i, r := range s.ranges {
		if at -= r.weight; at < 0 || i == last {
			return r.min + rand.IntN(r.max-r.min+1)
		}
	}
	panic("unreachable")
}
