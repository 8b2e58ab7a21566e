package load

import (
	"container/heap"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
)

// A Stage is a part of a run with a constant rate.
type Stage struct {
	Rate     float64 // messages a second; zero sends nothing
	Duration time.Duration
}

// ParseStages reads stages such as "100:30s,500:1m".
func ParseStages(text string) ([]Stage, error) {
	var stages []Stage
	for part := range strings.SplitSeq(text, ",") {
		rate, duration, ok := strings.Cut(part, ":")
		s := Stage{}
		var err error
		if s.Rate, err = strconv.ParseFloat(rate, 64); err == nil && ok {
			s.Duration, err = time.ParseDuration(duration)
		}
		if err != nil || !ok {
			return nil, fmt.Errorf("stage %q: want RATE:TIME, such as 100:30s", part)
		}
		stages = append(stages, s)
	}
	return stages, nil
}

// A Range is a random time between Min and Max. Max is at least Min.
type Range struct{ Min, Max time.Duration }

// ParseRange reads one time ("100ms") or a range of equally likely times ("50ms-200ms").
func ParseRange(text string) (Range, error) {
	low, high, isRange := strings.Cut(text, "-")
	r := Range{}
	var err error
	if r.Min, err = time.ParseDuration(low); err == nil {
		r.Max = r.Min
		if isRange {
			r.Max, err = time.ParseDuration(high)
		}
	}
	if err != nil || r.Max < r.Min {
		return Range{}, fmt.Errorf("time %q: want a time such as 100ms, or a range such as 50ms-200ms", text)
	}
	return r, nil
}

// String returns r in the form that ParseRange reads.
func (r Range) String() string {
	if r.Min == r.Max {
		return r.Min.String()
	}
	return r.Min.String() + "-" + r.Max.String()
}

func (r Range) pick() time.Duration { return r.Min + rand.N(r.Max-r.Min+1) }

// The open model's schedule has a resolution: messages that are due within it are
// sent together. Waking up for every message would cost more than the message. With
// many messages at once, on the other hand, they would queue up in the server. So the
// resolution is the time of a few messages, within bounds.
const (
	finestTick   = 200 * time.Microsecond
	coarsestTick = time.Millisecond
	tickMessages = 4
)

func tickFor(rate float64) time.Duration {
	d := time.Duration(min(tickMessages/rate, 1) * float64(time.Second))
	return min(max(d, finestTick), coarsestTick).Truncate(finestTick)
}

// never is later than the end of any run.
const never = time.Duration(1<<63 - 1)

// A schedule says when the messages of the open model are due. Message n of the run belongs to user n modulo the
// number of users. It is not sent if that user has not started yet.
type schedule struct {
	users  int
	stages []plannedStage
	total  float64 // messages
	ramp   time.Duration
	tick   time.Duration // the resolution
}

// A plannedStage is a stage with its beginning.
type plannedStage struct {
	Stage
	begins time.Duration
	first  float64 // number of the first message
}

func newSchedule(o *Options) schedule {
	s := schedule{users: o.Conns, ramp: o.Ramp}
	begins, highest := time.Duration(0), 0.0
	for _, stage := range o.Stages {
		s.stages = append(s.stages, plannedStage{Stage: stage, begins: begins, first: s.total})
		s.total += stage.Rate * stage.Duration.Seconds()
		begins += stage.Duration
		highest = max(highest, stage.Rate)
	}
	s.total = math.Ceil(s.total - 1e-6)
	s.tick = tickFor(highest)
	return s
}

// due returns when message k of a user is due, since the start of the run. It returns
// never if there is no such message.
func (s *schedule) due(user int, k int64) time.Duration {
	n := float64(user) + float64(k)*float64(s.users)
	if n >= s.total {
		return never
	}
	i := len(s.stages) - 1
	for s.stages[i].first > n {
		i--
	}
	stage := &s.stages[i]
	return (stage.begins + time.Duration((n-stage.first)/stage.Rate*float64(time.Second))).Truncate(s.tick)
}

// starts returns when a user is to connect.
func (s *schedule) starts(user int) time.Duration {
	return time.Duration(float64(s.ramp) * float64(user) / float64(s.users))
}

// firstMessage returns the number of the first message of a user after its start.
func (s *schedule) firstMessage(user int) int64 {
	starts := s.starts(user)
	low, high := int64(0), int64(s.total)/int64(s.users)+1
	for low < high {
		if mid := (low + high) / 2; s.due(user, mid) < starts {
			low = mid + 1
		} else {
			high = mid
		}
	}
	return low
}

// rate returns how many messages a second are offered at a time.
func (s *schedule) rate(at time.Duration) float64 {
	rate := 0.0
	for _, stage := range s.stages {
		if at >= stage.begins && at < stage.begins+stage.Duration {
			rate = stage.Rate
		}
	}
	if at < s.ramp {
		rate *= math.Ceil(float64(s.users)*float64(at)/float64(s.ramp)) / float64(s.users)
	}
	return rate
}

// thinkers are the users that wait for their think time, ordered by when it ends.
type thinkers []*user

func (t thinkers) Len() int           { return len(t) }
func (t thinkers) Less(i, j int) bool { return t[i].sendsAt < t[j].sendsAt }
func (t thinkers) Swap(i, j int)      { t[i], t[j] = t[j], t[i] }
func (t *thinkers) Push(u any)        { *t = append(*t, u.(*user)) }
func (t *thinkers) Pop() any {
	old := *t
	u := old[len(old)-1]
	*t = old[:len(old)-1]
	return u
}

// add makes a user wait before it sends again, unless it already does.
func (t *thinkers) add(u *user, until time.Duration) {
	if !u.thinking {
		u.thinking, u.sendsAt = true, until
		heap.Push(t, u)
	}
}

// next removes and returns a user that has thought for long enough. If there is none,
// it returns nil and when the next user will have thought long enough.
func (t *thinkers) next(now time.Duration) (*user, time.Duration) {
	if len(*t) == 0 {
		return nil, never
	}
	if at := (*t)[0].sendsAt; at > now {
		return nil, at
	}
	u := heap.Pop(t).(*user)
	u.thinking = false
	return u, 0
}
