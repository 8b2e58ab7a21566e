package load

import (
	"math"
	"time"
)

// The resolution of the open model's schedule: what falls due within it is sent
// together. To wake up for every message would cost more than the message; many at
// once would wait for one another in the server. So it is the time of four
// messages, within these bounds.
const (
	finest   = 200 * time.Microsecond
	coarsest = time.Millisecond
	together = 4
)

func resolution(rate float64) time.Duration {
	each := time.Duration(min(together/rate, 1) * float64(time.Second))
	return min(max(each, finest), coarsest).Truncate(finest)
}

// never is later than any run.
const never = time.Duration(1<<63 - 1)

// A schedule says when the messages of the open model are due. The nth of all is
// due n/rate after the start, from client n modulo the number of clients, unless
// that one is not to be there yet.
type schedule struct {
	conns int
	rate  float64 // messages a second, more than zero
	total float64 // messages
	ramp  time.Duration
	grid  time.Duration // the resolution
}

func newSchedule(o *Options) schedule {
	return schedule{
		conns: o.Conns, rate: o.Rate, total: math.Ceil(o.Rate*o.Duration.Seconds() - 1e-6),
		ramp: o.Ramp, grid: resolution(o.Rate),
	}
}

// due returns when the kth message of a client is due, counted from the start;
// never, if there is none.
func (s *schedule) due(index int, k int64) time.Duration {
	n := float64(index) + float64(k)*float64(s.conns)
	if n >= s.total {
		return never
	}
	return time.Duration(n / s.rate * float64(time.Second)).Truncate(s.grid)
}

// begins returns when a client is to connect.
func (s *schedule) begins(index int) time.Duration {
	return time.Duration(float64(s.ramp) * float64(index) / float64(s.conns))
}

// first returns which message of a client is the first that it is there for.
func (s *schedule) first(index int) int64 {
	begins := s.begins(index)
	k := int64(begins.Seconds() * s.rate / float64(s.conns))
	for k > 0 && s.due(index, k-1) >= begins {
		k--
	}
	for s.due(index, k) < begins {
		k++
	}
	return k
}
