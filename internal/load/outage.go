package load

import "time"

// outages are the times for which a user is without service.
type outages struct {
	without time.Duration // so far
	outage  time.Duration // since when there is one
	inOut   bool
	echo    time.Duration // when something came back last
	asked   time.Duration // when something was sent, after all before it had come back
}

// serviceGone begins an outage, unless there is one.
func (o *outages) serviceGone(since time.Duration) {
	if !o.inOut {
		o.outage, o.inOut = since, true
	}
}

// served takes that something has come back. It ends an outage, if nothing bad is
// known of the connection.
func (o *outages) served(now time.Duration, well bool) {
	o.echo = now
	if o.inOut && well {
		o.without += now - o.outage
		o.inOut = false
	}
}
