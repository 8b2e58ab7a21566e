package bulk

import (
	"os"

	"golang.org/x/sys/windows"
)

const openNoFollow = 0 // links need a privilege here

func inForeground(*os.File) bool { return true }

// canDraw turns on escape sequences in the console.
func canDraw(terminal *os.File) bool {
	handle := windows.Handle(terminal.Fd())
	var mode uint32
	if windows.GetConsoleMode(handle, &mode) != nil {
		return false
	}
	return windows.SetConsoleMode(handle, mode|windows.ENABLE_VIRTUAL_TERMINAL_PROCESSING) == nil
}
