//go:build !(linux || darwin || freebsd || netbsd || openbsd || dragonfly || windows)

package bulk

import "os"

const openNoFollow = 0

func inForeground(*os.File) bool { return true }

func canDraw(*os.File) bool { return false }
