package client

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

// feedAndTake feeds p to d and takes the echo that is then ready.
func feedAndTake(d *decoder, p []byte) (echo []byte, notices []Notice, err error) {
	notices, err = d.feed(p)
	echo = bytes.Clone(d.ready())
	d.take(len(echo))
	return echo, notices, err
}

func noticeLines(notices []Notice) []string {
	var s []string
	for _, n := range notices {
		s = append(s, n.String())
	}
	return s
}

func TestDecoder(t *testing.T) {
	const down, down7, word = "SHUTDOWN 5 SIGTERM", "SHUTDOWN 7 foo\n", "NOTICE a"
	tests := []struct {
		name    string
		sent    string
		recv    string
		notices []string
		missing int
	}{
		{"only echo", "hello\nworld\n", "hello\nworld\n", nil, 0},
		{"no newline", "hello", "hello", nil, 0},
		{"binary", "\x00\xff\n\n\r\n", "\x00\xff\n\n\r\n", nil, 0},
		{"only a notice", "", down + "\n", []string{down}, 0},
		{"before the echo", "hello\n", down + "\nhello\n", []string{down}, 0},
		{"after the echo", "hello\n", "hello\n" + down + "\n", []string{down}, 0},
		{"between lines", "a\nb\n", "a\n" + down + "\nb\n", []string{down}, 0},
		{"in the middle of a line", "hello\n", "hel\n" + down + "\nlo\n", []string{down}, 0},
		{"after an incomplete line", "hel", "hel\n" + down + "\n", []string{down}, 0},
		{"several in a row", "hello\n", "hel\nNOTICE x\n" + down + "\nNOTICE y\nlo\n", []string{"NOTICE x", down, "NOTICE y"}, 0},
		{"a line's own newline comes after the notice", "hel\nlo\n", "hel\n" + down + "\n\nlo\n", []string{down}, 0},
		{"a line's own newline comes after two notices", "hel\nlo\n", "hel\n" + down + "\nNOTICE x\n\nlo\n", []string{down, "NOTICE x"}, 0},
		{"a line's own newline comes after the notice, before empty lines", "hel\n\n\nlo\n", "hel\n" + down + "\n\n\n\nlo\n", []string{down}, 0},
		{"after a whole line, before an empty line", "hel\n\nlo\n", "hel\n" + down + "\n\nlo\n", []string{down}, 0},
		{"a line's own newline comes after the notice, at the end", "hel\n", "hel\n" + down + "\n\n", []string{down}, 0},
		{"a line looks like a notice and differs in the middle", down7, down + "\n" + down7, []string{down}, 0},
		{"a line continues with text that looks like a notice", "hel" + down7, "hel\n" + down + "\n" + down7, []string{down}, 0},
		{"a notice splits a line that looks like a notice", down7, "SHUTDOWN 7 f\n" + down + "\noo\n", []string{down}, 0},
		{"a line begins with the text of the notice", down + " and more\n", down + "\n" + down + " and more\n", []string{down}, 0},
		{"only a line that looks like a notice", down7, down7, nil, 0},
		{"a notice equals the line", word + "\n", word + "\n" + word + "\n", []string{word}, 0},
		{"a notice equals the line, and another splits it", word + "\n", word + "\nNOT\n" + down + "\nICE a\n", []string{word, down}, 0},
		{"a notice equals the next line and comes before the newline", "hel\n" + word + "\nfoo", "hel\n" + word + "\n\n" + word + "\nfoo", []string{word}, 0},
		{"the message is the first byte of the notice", "S", down + "\nS", []string{down}, 0},
		{"rejected", "hello\n", "PAUSED\n", []string{"PAUSED"}, 6},
		{"rejected, and the first line equals the rejection", "BUSY\nfoo\n", "BUSY\n", []string{"BUSY"}, 9},
		{"only a line that equals a rejection", "BUSY\n", "BUSY\n", nil, 0},
		{"cut off after a line that looks like a message", "NOTICE 1\nNOTICE 2\n", "NOTICE 1\n", nil, 9},
		{"cut off", "hello\n", "hel", nil, 3},
		{"cut off in a notice", "hello\n", "hel\nSHUTD", nil, 3},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, size := range []int{1, 2, 3, 5, 1000} {
				d := newDecoder()
				d.expect([]byte(tt.sent))
				var echo []byte
				var notices []Notice
				for chunk := range slices.Chunk([]byte(tt.recv), size) {
					e, n, err := feedAndTake(d, chunk)
					if err != nil {
						t.Fatalf("chunks of %d: feed(%q): %v", size, chunk, err)
					}
					echo, notices = append(echo, e...), append(notices, n...)
				}
				if tt.missing == 0 && d.outstanding() != 0 {
					t.Errorf("chunks of %d: outstanding before the end = %d, want 0", size, d.outstanding())
				}
				n, missing := d.finish()
				echo, notices = append(echo, d.ready()...), append(notices, n...)
				if diff := cmp.Diff(tt.notices, noticeLines(notices)); diff != "" {
					t.Errorf("chunks of %d: notices (-want +got):\n%s", size, diff)
				}
				if missing != tt.missing {
					t.Errorf("chunks of %d: missing = %d, want %d", size, missing, tt.missing)
				}
				if want := tt.sent[:len(tt.sent)-tt.missing]; string(echo) != want {
					t.Errorf("chunks of %d: echo = %q, want %q", size, echo, want)
				}
			}
		})
	}
}

func TestDecoderCorruption(t *testing.T) {
	tests := []struct {
		name, sent, recv string
		want             CorruptionError
	}{
		{"wrong byte", "hello\n", "heLlo\n", CorruptionError{2, []byte("llo\n"), []byte("Llo\n")}},
		{"nothing was sent", "", "x", CorruptionError{0, nil, []byte("x")}},
		{"more than was sent", "ab", "abc", CorruptionError{2, nil, []byte("c")}},
		{"a byte lost", "abc\n", "ac\n", CorruptionError{1, []byte("bc\n"), []byte("c\n")}},
		{"a newline without a notice", "hello\n", "hel\nlo\n", CorruptionError{3, []byte("lo\n"), []byte("lo\n")}},
		{"almost a notice", "hello\n", "SHUTDOWN x\n", CorruptionError{0, []byte("hello\n"), []byte("SHUTDOWN x\n")}},
		{"two newlines after a notice", "a\nb\n", "a\nBUSY\n\n\n", CorruptionError{2, []byte("b\n"), []byte("\n")}},
		{"a newline after a notice, before a line that needs none", "\nb\n", "\nBUSY\n\n", CorruptionError{1, []byte("b\n"), []byte("\n")}},
		{"a notice without end", "x", "NOTICE " + strings.Repeat("x", maxNotice), CorruptionError{0, []byte("x"), []byte("NOTICE " + strings.Repeat("x", maxExcerpt-7))}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := newDecoder()
			d.expect([]byte(tt.sent))
			_, _, err := feedAndTake(d, []byte(tt.recv))
			got, ok := errors.AsType[*CorruptionError](err)
			if !ok {
				t.Fatalf("error = %v, want a *CorruptionError", err)
			}
			if !bytes.Equal(got.Want, tt.want.Want) || !bytes.Equal(got.Got, tt.want.Got) || got.Offset != tt.want.Offset {
				t.Errorf("got %v, want %v", got, &tt.want)
			}
		})
	}
}

// TestDecoderReady checks when an echo becomes ready: not while it may still be a
// notice, but at once if nothing else is outstanding.
func TestDecoderReady(t *testing.T) {
	d := newDecoder()
	d.expect([]byte("NOTICE a\n"))
	if echo, notices, _ := feedAndTake(d, []byte("NOTICE a\n")); string(echo) != "NOTICE a\n" || notices != nil {
		t.Errorf("alone: echo %q, notices %v; want the echo", echo, notices)
	}
	d.expect([]byte("NOTICE a\nhel\n"))
	if echo, notices, _ := feedAndTake(d, []byte("NOTICE a\n")); len(echo) > 0 || notices != nil {
		t.Errorf("ambiguous: echo %q, notices %v; want neither", echo, notices)
	}
	if echo, notices, _ := feedAndTake(d, []byte("h")); string(echo) != "NOTICE a\nh" || notices != nil {
		t.Errorf("no longer ambiguous: echo %q, notices %v; want the echo", echo, notices)
	}
	d.expect([]byte("more\n"))
	if echo, _, _ := feedAndTake(d, []byte("el\n")); string(echo) != "el\n" {
		t.Errorf("end of a line: echo %q, want %q", echo, "el\n")
	}
}

func TestDecoderRetract(t *testing.T) {
	d := newDecoder()
	d.expect([]byte("hello"))
	d.unexpect(2)
	if echo, _, err := feedAndTake(d, []byte("hel")); string(echo) != "hel" || err != nil {
		t.Errorf("echo %q, error %v", echo, err)
	}
	if d.outstanding() != 0 {
		t.Errorf("outstanding = %d, want 0", d.outstanding())
	}
	d.expect([]byte("ab"))
	feedAndTake(d, []byte("a"))
	d.unexpect(2) // one of the two came back, so it was sent
	if _, missing := d.finish(); missing != 0 {
		t.Errorf("missing = %d, want 0", missing)
	}
}

// TestDecoderMemory keeps a constant number of bytes outstanding and checks that the
// decoder's memory stays near that number.
func TestDecoderMemory(t *testing.T) {
	const window, total = 16 << 10, 512 << 10
	for name, line := range map[string]string{
		"plain":     "hello, world\n",
		"unbroken":  strings.Repeat("x", 1000),
		"lookalike": "NOTICE a\n",
	} {
		t.Run(name, func(t *testing.T) {
			chunk := bytes.Repeat([]byte(line), window/len(line))
			d := newDecoder()
			d.expect(chunk)
			for n := 0; n < total; n += len(chunk) {
				d.expect(chunk)
				if _, _, err := feedAndTake(d, chunk); err != nil {
					t.Fatal(err)
				}
			}
			if got := cap(d.sent.buf); got > 8*window {
				t.Errorf("%d bytes of memory for %d outstanding", got, d.outstanding())
			}
		})
	}
}

// TestDecoderNoticeFlood sends notices while the echo is ambiguous, and checks that
// the decoder holds back only a few of them.
func TestDecoderNoticeFlood(t *testing.T) {
	d := newDecoder()
	d.expect([]byte(strings.Repeat("NOTICE a\nNOTICE b\n", 100) + "foo"))
	const flood = 10_000
	got := 0
	for range flood {
		_, notices, err := feedAndTake(d, []byte("NOTICE a\nNOTICE c\n"))
		if err != nil {
			t.Fatal(err)
		}
		got += len(notices)
		for _, s := range d.parses {
			if len(s.pending) > 2*maxParses {
				t.Fatalf("a parse holds back %d notices", len(s.pending))
			}
		}
	}
	if got < 2*flood-4*maxParses {
		t.Errorf("%d of %d notices reported", got, 2*flood)
	}
}

// A script is what a model of a server was sent and what it has answered.
type script struct {
	sent    []byte
	recv    []byte
	notices []string // that are in recv
}

// drawScript draws messages, splits them like the reads of a server, and inserts
// notices as a server does.
func drawScript(t *rapid.T, notice *rapid.Generator[string]) script {
	message := rapid.OneOf(
		rapid.SampledFrom([]string{
			"\n", "\n\n", "hel", "lo\n", "hello\n", "S", "NOT", "SHUTDOWN", "SHUTDOWN ", "SHUTDOWN 5 \n",
			"SHUTDOWN 7 foo\n", "SHUTDOWN 5 SIG\n", "NOTICE a\n", "NOTICE b\n", "PAUSED\n", "BUSY\n", "BUSYBODY\n", "x\nNOTICE a\n",
		}),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 20), func(b []byte) string { return string(b) }),
	)
	var s script
	s.sent = []byte(strings.Join(rapid.SliceOfN(message, 0, 8).Draw(t, "messages"), ""))
	insert := func() {
		for range rapid.SampledFrom([]int{0, 0, 0, 1, 1, 2}).Draw(t, "notices") {
			if n := len(s.recv); n > 0 && s.recv[n-1] != '\n' {
				s.recv = append(s.recv, '\n')
			}
			text := notice.Draw(t, "notice")
			s.recv = append(append(s.recv, text...), '\n')
			s.notices = append(s.notices, text)
		}
	}
	insert()
	for rest := s.sent; len(rest) > 0; {
		n := rapid.IntRange(1, len(rest)).Draw(t, "read")
		s.recv = append(s.recv, rest[:n]...)
		rest = rest[n:]
		insert()
	}
	return s
}

// play feeds the script to a decoder in pieces. It checks the echo and returns the
// notices.
func (s script) play(t *rapid.T) (notices []string) {
	d := newDecoder()
	d.expect(s.sent)
	var echo []byte
	for rest := s.recv; len(rest) > 0; {
		n := rapid.IntRange(1, len(rest)).Draw(t, "receive")
		e, got, err := feedAndTake(d, rest[:n])
		if err != nil {
			t.Fatalf("sent %q, received %q: %v", s.sent, s.recv, err)
		}
		echo, notices = append(echo, e...), append(notices, noticeLines(got)...)
		rest = rest[n:]
	}
	if !bytes.Equal(echo, s.sent) {
		t.Fatalf("sent %q, received %q: echo = %q", s.sent, s.recv, echo)
	}
	got, missing := d.finish()
	if missing != 0 {
		t.Fatalf("sent %q, received %q: %d bytes missing", s.sent, s.recv, missing)
	}
	return append(notices, noticeLines(got)...)
}

// TestDecoderModel draws messages and notices that differ, and checks that the
// decoder finds exactly the notices.
func TestDecoderModel(t *testing.T) {
	notice := rapid.SampledFrom([]string{"SHUTDOWN 5 SIGTERM", "SHUTDOWN 70 x", "NOTICE ab", "NOTICE backup at noon"})
	rapid.Check(t, func(t *rapid.T) {
		s := drawScript(t, notice)
		if diff := cmp.Diff(s.notices, s.play(t)); diff != "" {
			t.Fatalf("sent %q, received %q: notices (-want +got):\n%s", s.sent, s.recv, diff)
		}
	})
}

// TestDecoderModelEqualNotices draws notices that may equal a line that was sent.
// The decoder cannot know which of the two came first, and may take a part of a line
// for a notice. But the echo is complete, and no notice is lost.
func TestDecoderModelEqualNotices(t *testing.T) {
	notice := rapid.SampledFrom([]string{"SHUTDOWN 5 ", "SHUTDOWN 7 foo", "NOTICE a", "NOTICE b", "PAUSED", "BUSY", "SHUTDOWN 5 SIGTERM"})
	rapid.Check(t, func(t *rapid.T) {
		s := drawScript(t, notice)
		lost := slices.Clone(s.notices)
		for _, n := range s.play(t) {
			if i := slices.Index(lost, n); i >= 0 {
				lost = slices.Delete(lost, i, i+1)
			}
		}
		if len(lost) > 0 {
			t.Fatalf("sent %q, received %q: lost %q", s.sent, s.recv, lost)
		}
	})
}

func FuzzDecoder(f *testing.F) {
	f.Add([]byte("hello\n"), []byte("hel\nSHUTDOWN 5 SIGTERM\nlo\n"), uint8(3))
	f.Add([]byte("NOTICE a\nNOTICE a\n"), []byte("NOTICE a\nNOTICE a\nNOTICE a\n"), uint8(1))
	f.Add([]byte("hel\n\nBUSY\n"), []byte("hel\nBUSY\n\n\nBUSY\n"), uint8(200))
	f.Fuzz(func(t *testing.T, sent, recv []byte, size uint8) {
		d := newDecoder()
		d.expect(sent)
		var echo []byte
		inserted := 0
		for chunk := range slices.Chunk(recv, max(1, int(size))) {
			e, notices, err := feedAndTake(d, chunk)
			echo = append(echo, e...)
			for _, n := range notices {
				inserted += len(n.String()) + 1
			}
			if len(d.parses) > maxParses || len(d.line) > maxNotice {
				t.Fatalf("%d parses, a line of %d bytes", len(d.parses), len(d.line))
			}
			if err != nil {
				return
			}
		}
		if !bytes.HasPrefix(sent, echo) {
			t.Fatalf("echo %q is not what was sent", echo)
		}
		notices, missing := d.finish()
		for _, n := range notices {
			inserted += len(n.String()) + 1
		}
		if missing < 0 || missing > len(sent) || inserted > len(recv) {
			t.Fatalf("%d bytes missing, %d of notices", missing, inserted)
		}
	})
}
