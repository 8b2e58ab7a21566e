package load

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"echod/client"
)

// newTestChecker returns a checker that ignores notices, and its counts.
func newTestChecker(sizes Sizes) (*checker, *tally) {
	sum := newTally()
	return newChecker(origin{1, 1}, newPadding(sizes.Max()), sizes, time.Second, sum,
		func(client.Notice) {}), sum
}

// write takes everything that a checker has to be written, in pieces of n bytes.
func write(c *checker, n int) []byte {
	var all []byte
	for buf := make([]byte, n); ; {
		p := buf[:c.fill(buf)]
		if len(p) == 0 {
			return all
		}
		all = append(all, p...)
		c.wrote(len(p))
	}
}

// A script makes decisions from the bytes of a fuzzer. When they are used up, all
// decisions are 0.
type script []byte

func (s *script) next(n int) int {
	if len(*s) == 0 {
		return 0
	}
	b := (*s)[0]
	*s = (*s)[1:]
	return int(b) % n
}

// faultyStream is a stream of echoes with faults, and what a checker has to find.
type faultyStream struct {
	stream  []byte
	notices int
	want    Echoes
}

func (f *faultyStream) notice(text string) {
	if n := len(f.stream); n > 0 && f.stream[n-1] != '\n' {
		f.stream = append(f.stream, '\n')
	}
	f.stream = append(f.stream, text...)
	f.notices++
}

// put appends a message, perhaps with a notice inside or before it.
func (f *faultyStream) put(s *script, m []byte) {
	if s.next(8) == 7 {
		at := s.next(len(m) + 1)
		if at == len(m)-1 && m[at] != '\n' {
			at++ // the ambiguous case
		}
		f.stream = append(f.stream, m[:at]...)
		f.notice([]string{"SHUTDOWN 5 SIGTERM\n", "NOTICE back soon\n", "PAUSED\n"}[s.next(3)])
		if s.next(4) == 3 {
			f.notice("NOTICE again\n")
		}
		m = m[at:]
	}
	f.stream = append(f.stream, m...)
}

// distort makes a faulty stream of messages that were all sent.
func distort(s *script, messages [][]byte, foreign []byte) *faultyStream {
	f := &faultyStream{}
	for i := 0; i < len(messages); i++ {
		m := messages[i]
		switch s.next(12) {
		case 7:
			f.want.Lost++
			continue
		case 8:
			f.put(s, m)
			f.want.Duplicated++
		case 9:
			m = bytes.Clone(m)
			at := s.next(len(m))
			if broken := byte('!' + s.next(90)); m[at] != broken {
				m[at] = broken
			} else {
				m[at] = '~'
			}
			if s.next(5) == 4 {
				m[at] = '\n'
			}
			if bytes.Equal(m, messages[i]) { // a newline that was replaced by one
				break
			}
			f.put(s, m)
			f.want.Corrupted++
			continue
		case 10:
			if i+1 == len(messages) {
				break
			}
			f.put(s, messages[i+1])
			f.want.Reordered++
			f.want.Returned++
			i++
		case 11:
			f.put(s, foreign)
			f.want.Foreign++
		}
		f.put(s, m)
		f.want.Returned++
	}
	return f
}

// FuzzChecker feeds a faulty stream in pieces. With messages of one size every fault is
// recognised exactly. With mixed sizes, it is unknown which of two missing messages
// was the broken one, but their sum is known, and nothing else is counted.
func FuzzChecker(f *testing.F) {
	f.Add([]byte{})
	for op := range byte(12) {
		f.Add([]byte{5, 3, op, 1, 2, 3, 0, op, 7, op, op, 9, 1, 2, op, 77, 7, 7, 7})
		f.Add([]byte{3, 9, op, 1, 7, 3, 0, op, 7, op, op, 9, 1, 2, op, 77, 7, 7, 7})
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s := script(data)
		low := MinSize + s.next(3)*13
		high := low
		if s.next(2) == 1 {
			high += 200
		}
		sizes, err := ParseSizes(fmt.Sprintf("%d-%d", low, high))
		if err != nil {
			t.Fatal(err)
		}
		n := 1 + s.next(20)
		c, sum := newTestChecker(sizes)
		notices := 0
		c.onNotice = func(client.Notice) { notices++ }
		var messages [][]byte
		for range n {
			c.begin(0, low+s.next(high-low+1))
			messages = append(messages, write(c, 1+s.next(50)))
		}
		foreign := makeMessage(origin{1, 3}, uint64(s.next(3)), low)
		d := distort(&s, messages, foreign)
		for rest := d.stream; len(rest) > 0; {
			k := min(len(rest), 1+s.next(256))
			c.feed(rest[:k], time.Millisecond)
			rest = rest[k:]
		}
		sum.Echoes.Lost = c.finish()
		if high > low {
			d.want.Lost += d.want.Corrupted - sum.Echoes.Corrupted
			d.want.Corrupted = sum.Echoes.Corrupted
		}
		if diff := cmp.Diff(d.want, sum.Echoes); diff != "" || notices != d.notices {
			t.Errorf("%d notices found, want %d; counts (-want +got):\n%s\n%q", notices, d.notices, diff,
				d.stream)
		}
	})
}

func TestChecker(t *testing.T) {
	t.Run("a message that was cut off is lost and not corrupted", func(t *testing.T) {
		for _, end := range []string{"", "\nSHUTDOWN 0 SIGTERM\n", "\nSHUTDOWN 0 SIG"} {
			for cut := range MinSize - 1 {
				c, sum := newTestChecker(FixedSize(MinSize))
				c.begin(0, MinSize)
				c.begin(0, MinSize)
				all := write(c, 1000)
				c.feed(all[:MinSize], 0)
				if cut > 0 {
					c.feed(append(bytes.Clone(all[MinSize:][:cut]), end...), 0)
				}
				if lost := c.finish(); lost != 1 || sum.Echoes.Returned != 1 || sum.Echoes.Corrupted != 0 {
					t.Errorf("cut after %d bytes, then %q: %d lost, %+v; want 1 returned, 1 lost", cut, end,
						lost, sum.Echoes)
				}
			}
		}
	})
	t.Run("a message is late counting from when it was due", func(t *testing.T) {
		c, sum := newTestChecker(FixedSize(MinSize))
		c.begin(0, MinSize)
		c.begin(100*time.Millisecond, MinSize)
		c.feed(write(c, 1000), 1100*time.Millisecond)
		if sum.Echoes.Late != 1 || sum.Echoes.Returned != 2 {
			t.Errorf("%+v, want 2 returned and the first one late", sum.Echoes)
		}
	})
	t.Run("messages that were not begun to be written are withdrawn", func(t *testing.T) {
		for written, want := range map[int]int{0: 3, 1: 2, MinSize: 2, MinSize + 1: 1, 2*MinSize + 100: 0} {
			sizes, _ := ParseSizes("38-138")
			c, _ := newTestChecker(sizes)
			for _, size := range []int{MinSize, MinSize, 138} {
				c.begin(0, size)
			}
			begun := c.wrote(written)
			if got := len(c.retract()); got != want || begun != int64(3-want) {
				t.Errorf("after %d bytes %d messages are begun and %d withdrawn, want %d and %d", written,
					begun, got, 3-want, want)
			}
			if lost := c.finish(); lost != int64(3-want) {
				t.Errorf("after %d bytes %d messages are lost, want %d", written, lost, 3-want)
			}
		}
	})
	t.Run("what is written does not depend on the pieces", func(t *testing.T) {
		sizes, _ := ParseSizes("38-300")
		var want []byte
		for seq, size := range []int{38, 39, 300, 64} {
			want = append(want, makeMessage(origin{1, 1}, uint64(seq), size)...)
		}
		for piece := 1; piece < 500; piece++ {
			c, _ := newTestChecker(sizes)
			for _, size := range []int{38, 39, 300, 64} {
				c.begin(0, size)
			}
			if got := write(c, piece); !bytes.Equal(got, want) {
				t.Fatalf("in pieces of %d bytes: wrote %q, want %q", piece, got, want)
			}
		}
	})
	t.Run("a message that was guessed before it was written is not an echo", func(t *testing.T) {
		c, sum := newTestChecker(FixedSize(64))
		c.begin(0, 64)
		c.begin(0, 64)
		c.wrote(64)
		c.feed(makeMessage(origin{1, 1}, 1, 64), 0)
		c.retract()
		if lost := c.finish(); lost != 0 || sum.Echoes.Returned != 0 || sum.Echoes.Corrupted != 1 {
			t.Errorf("%+v, %d lost, want 1 corrupted", sum.Echoes, lost)
		}
	})
	t.Run("memory does not grow with the size of messages", func(t *testing.T) {
		c, _ := newTestChecker(FixedSize(1 << 20))
		for range 1000 {
			c.begin(0, 1<<20)
		}
		if n := cap(c.flights); n > 2000 {
			t.Errorf("%d flights for 1000 messages", n)
		}
	})
}

// Broken bytes count for the messages that are missing at their place, and hide no other loss.
func TestCheckerBrokenBytes(t *testing.T) {
	const size = 64
	junk := bytes.Repeat([]byte("x"), 10*size)
	for _, tt := range []struct {
		name    string
		arrived func(m [][]byte) [][]byte
		want    Echoes
	}{
		{
			"a greeting, and losses later",
			func(m [][]byte) [][]byte {
				return [][]byte{
					junk, []byte("\n"), m[0], m[1], m[3], m[4], m[6],
					m[9],
				}
			},
			Echoes{Returned: 6, Lost: 4, Unexpected: 10},
		},
		{
			"more than is missing there",
			func(m [][]byte) [][]byte {
				return [][]byte{m[0], junk, []byte("\n"), m[2], m[3], m[4], m[5], m[6], m[8], m[9]}
			},
			Echoes{Returned: 8, Lost: 1, Corrupted: 1, Unexpected: 9},
		},
		{
			"less than is missing there",
			func(m [][]byte) [][]byte {
				return [][]byte{
					m[0], junk[:size-1], []byte("\n"), m[3], m[4], m[5],
					m[6],
				}
			},
			Echoes{Returned: 5, Lost: 4, Corrupted: 1},
		},
		{
			"one and a bit in the place of two",
			func(m [][]byte) [][]byte {
				return append([][]byte{m[0], junk[:size+size/4], []byte("\n")}, m[3:]...)
			},
			Echoes{Returned: 8, Lost: 1, Corrupted: 1},
		},
		{
			"one and most of another in the place of two",
			func(m [][]byte) [][]byte {
				return append([][]byte{m[0], junk[:size+size*3/4], []byte("\n")}, m[3:]...)
			},
			Echoes{Returned: 8, Corrupted: 2},
		},
		{
			"a message never sent, a loss later, and a duplicate",
			func(m [][]byte) [][]byte {
				invented := makeMessage(origin{1, 1}, 77, size)
				return [][]byte{invented, m[0], m[1], m[3], m[4], m[5], m[6], m[7], m[8], m[9], m[9]}
			},
			Echoes{Returned: 9, Lost: 1, Duplicated: 1, Unexpected: 1},
		},
		{
			"in the place of a message that arrives later",
			func(m [][]byte) [][]byte {
				return append([][]byte{junk[:size-1], []byte("\n"), m[1], m[0]},
					m[2:]...)
			},
			Echoes{Returned: 10, Reordered: 1, Unexpected: 1},
		},
		{
			"a message backwards, newline first",
			func(m [][]byte) [][]byte {
				last := bytes.Clone(m[9])
				slices.Reverse(last)
				return append(m[:9:9], last)
			},
			Echoes{Returned: 9, Corrupted: 1},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, sum := newTestChecker(FixedSize(size))
			var messages [][]byte
			for range 10 {
				c.begin(0, size)
				messages = append(messages, write(c, 1000))
			}
			c.feed(bytes.Join(tt.arrived(messages), nil), 0)
			sum.Echoes.Lost = c.finish()
			expect(t, "echoes", sum.Echoes, tt.want)
		})
	}
	t.Run("a small one is lost and a large one is broken: nothing was received that was not sent", func(t *testing.T) {
		sizes, _ := ParseSizes("64:9,6400:1")
		c, sum := newTestChecker(sizes)
		var messages [][]byte
		for _, size := range []int{64, 6400, 64, 64, 64} {
			c.begin(0, size)
			messages = append(messages, write(c, 10000))
		}
		messages[1][0] = '?'
		c.feed(bytes.Join(messages[1:4], nil), 0)
		sum.Echoes.Lost = c.finish()
		if e := sum.Echoes; e.Unexpected != 0 || e.Returned != 2 || e.Corrupted+e.Lost != 3 || e.Corrupted == 0 {
			t.Errorf("%+v, want 2 returned, 3 lost or corrupted, and nothing unexpected", e)
		}
	})
	t.Run("a large message counts as one among small ones", func(t *testing.T) {
		sizes, _ := ParseSizes("64:9,6400:1")
		c, sum := newTestChecker(sizes)
		var messages [][]byte
		for _, size := range []int{64, 6400, 64} {
			c.begin(0, size)
			messages = append(messages, write(c, 10000))
		}
		messages[1][3000] ^= 1
		c.feed(bytes.Join(messages, nil), 0)
		sum.Echoes.Lost = c.finish()
		expect(t, "echoes", sum.Echoes, Echoes{Returned: 2, Corrupted: 1})
	})
}

func TestMessage(t *testing.T) {
	for _, size := range []int{MinSize, MinSize + 1, MinSize + 2, 64, 1000} {
		m := makeMessage(origin{0xdeadbeef, 42}, 0xab_cdef_0123, size)
		if len(m) != size || bytes.IndexByte(m, '\n') != size-1 {
			t.Fatalf("%q is not a line of %d bytes", m, size)
		}
		if from, seq, ok := parseMessage(m); !ok || from != (origin{0xdeadbeef, 42}) || seq != 0xab_cdef_0123 {
			t.Errorf("%q reads as %v %x %v", m, from, seq, ok)
		}
		for i := range m {
			m[i] ^= 1
			if _, _, ok := parseMessage(m); ok {
				t.Errorf("%q, changed at %d, is taken for a message", m, i)
			}
			m[i] ^= 1
		}
	}
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]struct{ max, mean int }{
		"64": {64, 64}, "64-100": {100, 82}, "64:9,164:1": {164, 74}, "38-40:1,1000:3": {1000, 760},
	} {
		s, err := ParseSizes(text)
		if err != nil || s.Max() != want.max || s.Mean() != want.mean || s.String() != text {
			t.Errorf("%s: max %d, mean %d, %q, %v; want %+v", text, s.Max(), s.Mean(), s.String(), err, want)
		}
	}
	for _, text := range []string{
		"", "x", "64-", "64-63", "37", "64:0", "64:-1", "64:x", "64,,",
		"1099511627776", "64:NaN",
	} {
		if s, err := ParseSizes(text); err == nil {
			t.Errorf("%q is accepted as %v", text, s)
		}
	}
	t.Run("sizes are drawn by weight", func(t *testing.T) {
		s, _ := ParseSizes("100:3,200-300:1")
		counts := map[int]int{}
		for range 40000 {
			counts[s.pick()]++
		}
		if n := counts[100]; n < 29000 || n > 31000 {
			t.Errorf("%d of 40,000 have 100 bytes, want about 30,000", n)
		}
		if len(counts) != 102 {
			t.Errorf("%d different sizes, want 102", len(counts))
		}
	})
}
