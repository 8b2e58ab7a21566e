//go:build !linux

package load

// newPoller returns the one that serves connections of every kind.
func newPoller(_, _ bool, _ pace) (poller, error) { return newConnPoller(), nil }
