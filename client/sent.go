package client

// maxIdleSent is the capacity, in bytes, above which an empty sentBytes gives
// its memory back.
const maxIdleSent = 256 << 10

// sentBytes is the part of what was sent that is still needed, addressed by
// offsets into the whole stream. The zero value is an empty stream.
type sentBytes struct {
	buf   []byte // buf[head:] is needed
	head  int
	start int64 // offset of buf[head]
}

// end returns the offset after the last byte.
func (s *sentBytes) end() int64 { return s.start + int64(len(s.buf)-s.head) }

// between returns the bytes of [from, to), valid until the next append.
func (s *sentBytes) between(from, to int64) []byte {
	return s.buf[s.head+int(from-s.start) : s.head+int(to-s.start)]
}

// append adds p at the end. It moves what is needed only when at least as much
// has been discarded or room for as much again is made, so that in the long run
// each byte is copied a constant number of times.
func (s *sentBytes) append(p []byte) {
	live := s.buf[s.head:]
	if s.head > 0 && len(s.buf)+len(p) > cap(s.buf) {
		if need := len(live) + len(p); len(live) > s.head || need > cap(s.buf) {
			s.buf = make([]byte, len(live), 2*need)
		}
		s.buf = s.buf[:copy(s.buf, live)]
		s.head = 0
	}
	s.buf = append(s.buf, p...)
}

// discard forgets what lies before offset to.
func (s *sentBytes) discard(to int64) {
	s.head += int(to - s.start)
	s.start = to
	if s.head == len(s.buf) {
		s.buf, s.head = s.buf[:0], 0
		if cap(s.buf) > maxIdleSent {
			s.buf = nil
		}
	}
}

// truncate forgets the last n bytes.
func (s *sentBytes) truncate(n int) { s.buf = s.buf[:len(s.buf)-n] }
