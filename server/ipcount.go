package server

// ipCounts says how many connections there are by client address. Nil counts nothing. Clients without an IP
// address are not counted.
type ipCounts map[ipKey]uint32

// ipKey is an address in as many bytes as it has: a netip.Addr takes half as many again, for each client.
type ipKey [16]byte

func (n ipCounts) of(c *Conn) int {
	key, ok := n.key(c)
	if !ok {
		return 0
	}
	return int(n[key])
}

func (n ipCounts) enter(c *Conn) {
	if key, ok := n.key(c); ok {
		n[key]++
	}
}

func (n ipCounts) leave(c *Conn) {
	key, ok := n.key(c)
	switch {
	case !ok:
	case n[key] > 1:
		n[key]--
	default:
		delete(n, key)
	}
}

func (n ipCounts) key(c *Conn) (key ipKey, ok bool) {
	if n == nil {
		return key, false
	}
	ip := c.ip()
	return ip.As16(), ip.IsValid()
}
