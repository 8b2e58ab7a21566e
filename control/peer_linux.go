package control

import "golang.org/x/sys/unix"

// peerOf asks who connected: unix(7), SO_PEERCRED.
func peerOf(fd int) peer {
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return peer{}
	}
	return peer{uid: int(cred.Uid), pid: int(cred.Pid)}
}
