package control

import "golang.org/x/sys/unix"

func init() {
	peerOf = func(fd int) (uid, pid int) { // LOCAL_PEERCRED and LOCAL_PEERPID of sys/un.h
		cred, err := unix.GetsockoptXucred(fd, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
		if err != nil {
			return 0, 0
		}
		if pid, err = unix.GetsockoptInt(fd, unix.SOL_LOCAL, unix.LOCAL_PEERPID); err != nil {
			return 0, 0
		}
		return int(cred.Uid), pid
	}
}
