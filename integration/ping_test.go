//go:build unix

package integration

import (
	"os/exec"
	"syscall"
	"testing"

	"echod/control"
)

// An interrupt before the first ping is done is not a success.
func TestPingInterrupted(t *testing.T) {
	t.Parallel()
	e := start(t)
	_, err := e.control.Pause(t.Context(), control.PauseRequest{})
	check(t, err)
	cmd := exec.Command(built(t, echodBinary), "ping", "-W", "30", e.addr)
	check(t, cmd.Start())
	poll(t, "the ping to connect", func() bool { return e.queued(e.status()) > 0 })
	check(t, cmd.Process.Signal(syscall.SIGTERM))
	_ = cmd.Wait()
	if got := exitCode(cmd.ProcessState); got != 128+int(syscall.SIGTERM) {
		t.Errorf("exit code %d, want 143", got)
	}
}

func TestPingUntilCtrlC(t *testing.T) {
	t.Parallel()
	e := start(t)
	term, _ := openTerminal(t)
	term.types(`$ECHOD ping -c 0 -i 1ms ` + e.addr + `; echo "code=$?"` + "\n")
	term.awaits(`seq=3 `)
	term.types(ctrlC)
	term.awaits(`\d+ sent, \d+ returned, 0% lost`)
	term.awaits(`(?m)^code=0$`)
}
