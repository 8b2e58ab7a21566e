//go:build !linux

package load

// newPoller returns a poller for connections of any kind.
func newPoller(_, _ bool, _ pace) (poller, error) { return newConnPoller(), nil }

// fileLimit returns zero: the limit is not known.
func fileLimit() (limit, used int) { return 0, 0 }

// localPorts returns zero: the number is not known.
func localPorts() int { return 0 }
