package control

import "golang.org/x/sys/unix"

// peerOf asks who connected: LOCAL_PEERCRED and LOCAL_PEERPID of sys/un.h.
func peerOf(fd int) peer {
	cred, err := unix.GetsockoptXucred(fd, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	if err != nil {
		return peer{}
	}
	pid, err := unix.GetsockoptInt(fd, unix.SOL_LOCAL, unix.LOCAL_PEERPID)
	if err != nil {
		return peer{}
	}
	return peer{uid: int(cred.Uid), pid: pid}
}
