package load

import (
	"fmt"
	"strconv"
	"time"
)

// Bounds are what a run must keep to. A nil field is none.
type Bounds struct {
	P99, P999   *time.Duration // of echoes
	ConnectP99  *time.Duration
	Lost        *int64         // messages
	Refused     *int64         // connects that led to no service, in whatever way
	Outage      *time.Duration // time without service, of the client that had the most
	Disconnects *int64         // ends of connections that no notice announced
}

// Judge returns why the run is not as it should be, in words: messages lost (more
// than b allows, if it says so), corrupted, unexpected, duplicated, reordered or foreign, due
// but never sent, nothing returned at all, or a bound broken.
func (r *Report) Judge(b Bounds) []string {
	var why []string
	say := func(format string, args ...any) { why = append(why, fmt.Sprintf(format, args...)) }
	e := r.Echoes
	if e.Returned == 0 {
		say("nothing came back")
	}
	for _, fault := range []struct {
		n    int64
		what string
	}{
		{e.Corrupted, "corrupted"},
		{e.Unexpected, "came though nobody had sent them"},
		{e.Duplicated, "duplicated"},
		{e.Reordered, "came back out of order"},
		{e.Foreign, "came back on a connection that had not sent them"},
		{e.Unsent, "were due, and no connection would take them"},
	} {
		if fault.n > 0 {
			say("%s %s", messages(fault.n), fault.what)
		}
	}
	switch {
	case b.Lost == nil && e.Lost > 0:
		say("%s lost", messages(e.Lost))
	case b.Lost != nil && e.Lost > *b.Lost:
		say("%s lost: more than %d", messages(e.Lost), *b.Lost)
	}
	if n := r.Connects.Missed(); b.Refused != nil && n > *b.Refused {
		say("connects that led to no service: %d, more than %d", n, *b.Refused)
	}
	if n := r.Ends.Unannounced(); b.Disconnects != nil && n > *b.Disconnects {
		say("connections that ended without a notice: %d, more than %d", n, *b.Disconnects)
	}
	for _, bound := range []struct {
		what  string
		is    float64
		limit *time.Duration
	}{
		{"p99 of echoes", r.Echo.P99, b.P99},
		{"p99.9 of echoes", r.Echo.P999, b.P999},
		{"p99 of connects", r.Connect.P99, b.ConnectP99},
		{"longest time without service", r.Outage.Max, b.Outage},
	} {
		if is := time.Duration(bound.is * float64(time.Second)); bound.limit != nil && is > *bound.limit {
			say("%s is %v: more than %v", bound.what, is.Round(time.Microsecond), *bound.limit)
		}
	}
	return why
}

func messages(n int64) string {
	if n == 1 {
		return "1 message"
	}
	return strconv.FormatInt(n, 10) + " messages"
}
