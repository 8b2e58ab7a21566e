// Qemu prints what the emulator qemu-user gets wrong that the tests need: 'make check-systems' runs it before them. On
// Linux itself the first line has more than 4 bytes, and the second says 2.
package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"syscall"
	"unsafe"
)

func main() {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	client, err := net.Dial("tcp", ln.Addr().String())
	check(err)
	served, err := ln.Accept()
	check(err)
	raw, err := served.(*net.TCPConn).SyscallConn()
	check(err)
	_, err = client.Write([]byte("abc"))
	check(err)
	const tcpINQ = 36 // also the type of the control message
	check(raw.Read(func(fd uintptr) bool {
		var info [256]byte
		size := uint32(len(info))
		_, _, errno := syscall.Syscall6(syscall.SYS_GETSOCKOPT, fd, syscall.IPPROTO_TCP, syscall.TCP_INFO,
			uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
		fmt.Printf("bytes of TCP_INFO: %d (error %d), state %d of 1\n", size, errno, info[0])
		check(syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpINQ, 1))
		control := make([]byte, 64)
		_, n, _, _, err := syscall.Recvmsg(int(fd), make([]byte, 1), control, 0)
		messages, _ := syscall.ParseSocketControlMessage(control[:n])
		for _, m := range messages {
			fmt.Println("bytes left, by TCP_INQ:", binary.NativeEndian.Uint32(m.Data), "of 2", err)
		}
		return true
	}))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
