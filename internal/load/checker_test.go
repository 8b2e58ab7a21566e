package load

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"echod/client"
)

// A script takes decisions from the bytes of a fuzzer; when they are used up, all are 0.
type script []byte

func (s *script) next(n int) int {
	if len(*s) == 0 {
		return 0
	}
	b := (*s)[0]
	*s = (*s)[1:]
	return int(b) % n
}

// faulty is a stream of echoes with faults in it, and what a checker is to find.
type faulty struct {
	stream  []byte
	notices int
	want    Echoes
}

func (f *faulty) notice(text string) {
	if n := len(f.stream); n > 0 && f.stream[n-1] != '\n' {
		f.stream = append(f.stream, '\n')
	}
	f.stream = append(f.stream, text...)
	f.notices++
}

// put appends a message, perhaps with a notice within or before it.
func (f *faulty) put(s *script, m []byte) {
	if s.next(8) == 7 {
		at := s.next(len(m) + 1)
		if at == len(m)-1 && m[at] != '\n' {
			at++ // or nobody could know that it was not whole
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
func distort(s *script, messages [][]byte, foreign []byte) *faulty {
	f := &faulty{}
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
			if bytes.Equal(m, messages[i]) { // a newline that became one
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

func FuzzChecker(f *testing.F) {
	f.Add([]byte{})
	for op := range byte(12) {
		f.Add([]byte{5, 3, op, 1, 2, 3, 0, op, 7, op, op, 9, 1, 2, op, 77, 7, 7, 7})
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		s := script(data)
		size := MinSize + s.next(3)*13
		n := 1 + s.next(20)
		sum := newTally()
		notices := 0
		c := newChecker(origin{1, 2}, size, time.Second, sum, func(client.Notice) { notices++ })
		var messages [][]byte
		for i := range n {
			c.begin(0)
			messages = append(messages, bytes.Clone(c.unwritten(int64(i)*int64(size))))
		}
		foreign := origin{1, 3}.template(size)
		number(foreign, uint64(s.next(3)))
		d := distort(&s, messages, foreign)
		for rest := d.stream; len(rest) > 0; {
			k := min(len(rest), 1+s.next(256))
			c.feed(rest[:k], time.Millisecond)
			rest = rest[k:]
		}
		sum.Echoes.Lost = c.end()
		if diff := cmp.Diff(d.want, sum.Echoes); diff != "" || notices != d.notices {
			t.Errorf("%d notices found, want %d; counts (-want +got):\n%s\n%q", notices, d.notices, diff, d.stream)
		}
	})
}

func TestAMessageThatWasCutIsLostAndNotCorrupted(t *testing.T) {
	for _, end := range []string{"", "\nSHUTDOWN 0 SIGTERM\n", "\nSHUTDOWN 0 SIG"} {
		for cut := range MinSize - 1 {
			sum := newTally()
			c := newChecker(origin{1, 1}, MinSize, time.Second, sum, func(client.Notice) {})
			c.begin(0)
			c.begin(0)
			all := c.unwritten(0)
			c.feed(all[:MinSize], 0)
			if cut > 0 {
				c.feed(append(bytes.Clone(all[MinSize:][:cut]), end...), 0)
			}
			if lost := c.end(); lost != 1 || sum.Echoes.Returned != 1 || sum.Echoes.Corrupted != 0 {
				t.Errorf("cut after %d bytes, then %q: %d lost, %+v; want 1 returned, 1 lost", cut, end, lost, sum.Echoes)
			}
		}
	}
}

func TestLateIsCountedFromWhenItWasDue(t *testing.T) {
	sum := newTally()
	c := newChecker(origin{1, 1}, MinSize, time.Second, sum, nil)
	c.begin(0)
	c.begin(100 * time.Millisecond)
	c.feed(c.unwritten(0), 1100*time.Millisecond)
	if sum.Echoes.Late != 1 || sum.Echoes.Returned != 2 {
		t.Errorf("%+v, want 2 returned and the first late", sum.Echoes)
	}
}

// What was not written is not lost when the connection ends, but what was begun to be written is.
func TestRetract(t *testing.T) {
	for written, want := range map[int64]int{0: 3, 1: 2, MinSize: 2, MinSize + 1: 1, 3 * MinSize: 0} {
		c := newChecker(origin{1, 1}, MinSize, time.Second, newTally(), nil)
		for range 3 {
			c.begin(0)
		}
		if got := len(c.retract(written)); got != want {
			t.Errorf("after %d bytes %d messages are taken back, want %d", written, got, want)
		}
		if lost := c.end(); lost != int64(3-want) {
			t.Errorf("after %d bytes %d messages are lost, want %d", written, lost, 3-want)
		}
	}
}

func TestMessageForm(t *testing.T) {
	for _, size := range []int{MinSize, MinSize + 1, MinSize + 2, 64, 1000} {
		m := origin{0xdeadbeef, 42}.template(size)
		number(m, 0xab_cdef_0123)
		if len(m) != size || bytes.IndexByte(m, '\n') != size-1 {
			t.Fatalf("%q is not a line of %d bytes", m, size)
		}
		if from, seq, ok := parse(m, size); !ok || from != (origin{0xdeadbeef, 42}) || seq != 0xab_cdef_0123 {
			t.Errorf("%q reads as %v %x %v", m, from, seq, ok)
		}
		for i := range m {
			m[i] ^= 1
			if _, _, ok := parse(m, size); ok {
				t.Errorf("%q, changed at %d, is taken for a message", m, i)
			}
			m[i] ^= 1
		}
	}
}

// TestJunkHidesNoLoss: what is broken stands for messages that are missing in its place, and for no others.
func TestJunkHidesNoLoss(t *testing.T) {
	const size = 64
	junk := bytes.Repeat([]byte("x"), 10*size)
	for _, tt := range []struct {
		what string
		came func(m [][]byte) [][]byte
		want Echoes
	}{
		{
			"a greeting, and losses later",
			func(m [][]byte) [][]byte { return [][]byte{junk, []byte("\n"), m[0], m[1], m[3], m[4], m[6], m[9]} },
			Echoes{Returned: 6, Lost: 4, Unexpected: 10},
		},
		{
			"more junk than is missing there",
			func(m [][]byte) [][]byte {
				return [][]byte{m[0], junk, []byte("\n"), m[2], m[3], m[4], m[5], m[6], m[8], m[9]}
			},
			Echoes{Returned: 8, Lost: 1, Corrupted: 1, Unexpected: 9},
		},
		{
			"less",
			func(m [][]byte) [][]byte { return [][]byte{m[0], junk[:size-1], []byte("\n"), m[3], m[4], m[5], m[6]} },
			Echoes{Returned: 5, Lost: 4, Corrupted: 1},
		},
		{
			"a message never sent, a loss later, and one that comes once more",
			func(m [][]byte) [][]byte {
				invented := origin{1, 1}.template(size)
				number(invented, 77)
				return [][]byte{invented, m[0], m[1], m[3], m[4], m[5], m[6], m[7], m[8], m[9], m[9]}
			},
			Echoes{Returned: 9, Lost: 1, Duplicated: 1, Unexpected: 1},
		},
		{
			"where one was missing that comes later",
			func(m [][]byte) [][]byte { return append([][]byte{junk[:size-1], []byte("\n"), m[1], m[0]}, m[2:]...) },
			Echoes{Returned: 10, Reordered: 1, Unexpected: 1},
		},
		{
			"backwards, with its newline first",
			func(m [][]byte) [][]byte {
				last := bytes.Clone(m[9])
				slices.Reverse(last)
				return append(m[:9:9], last)
			},
			Echoes{Returned: 9, Corrupted: 1},
		},
	} {
		sum := newTally()
		c := newChecker(origin{1, 1}, size, time.Second, sum, func(client.Notice) {})
		var messages [][]byte
		for i := range int64(10) {
			c.begin(0)
			messages = append(messages, bytes.Clone(c.unwritten(i*size)))
		}
		c.feed(bytes.Join(tt.came(messages), nil), 0)
		sum.Echoes.Lost = c.end()
		if diff := cmp.Diff(tt.want, sum.Echoes); diff != "" {
			t.Errorf("%s: (-want +got):\n%s", tt.what, diff)
		}
	}
}
