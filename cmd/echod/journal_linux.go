package main

import (
	"fmt"
	"io/fs"
	"syscall"
)

// deviceAndInode names a file as $JOURNAL_STREAM does.
func deviceAndInode(info fs.FileInfo) string {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return "unknown"
	}
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}
