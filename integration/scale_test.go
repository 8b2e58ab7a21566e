//go:build unix

package integration

import (
	"fmt"
	"syscall"
	"testing"
	"time"
)

// TestG4FifteenThousandClientsAreToldAndClosedByFIN: each is told once. Half of them leave when told, the others have the
// whole grace, and all of them see a clean end of stream. One goroutine plays them all, one after another: what comes to
// the others meanwhile waits in their sockets.
func TestG4FifteenThousandClientsAreToldAndClosedByFIN(t *testing.T) {
	slow(t)
	const n = 15_000
	var limit syscall.Rlimit
	check(t, syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit))
	const others = 256 // files that this process and the server have besides
	if files := uint64(limit.Cur); files < n+others {
		missing(t, fmt.Sprintf("the limit on open files, %d, lets no %d clients be played", files, n))
	}
	const grace = 10 * time.Second // of which the telling and leaving takes a fraction, on a busy machine too
	e := start(t, "--grace", grace.String())
	peers := make([]*peer, n)
	began := time.Now()
	for i := range peers {
		peers[i] = e.served()
	}
	t.Logf("%d clients were connected and served within %s", n, time.Since(began))

	checkPeer := func(i int, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("client %d of %d: %v", i, n, err)
		}
	}
	begun := e.signal(syscall.SIGTERM)
	for i, p := range peers {
		checkPeer(i, p.SetDeadline(time.Now().Add(patience)))
		checkPeer(i, p.expect("SHUTDOWN 10 SIGTERM\n"))
	}
	t.Logf("the last was told %s after the signal", time.Since(begun))

	stay := n / 2 // the first of those who stay
	for i, p := range peers[:stay] {
		checkPeer(i, p.CloseWrite())
	}
	for i, p := range peers[:stay] {
		checkPeer(i, p.expectRest(""))
		checkPeer(i, p.Close())
	}
	t.Logf("half of them had left %s after the signal", time.Since(begun))

	for i, p := range peers[stay:] {
		checkPeer(stay+i, p.expectRest("")) // a FIN: a reset would be an error
		if took := time.Since(begun); took < grace {
			t.Fatalf("client %d was closed %s before the deadline", stay+i, grace-took)
		}
		checkPeer(stay+i, p.Close())
	}
	t.Logf("the last was closed %s after the deadline", time.Since(begun)-grace)

	e.wait(0)
	took := e.gone.Sub(begun)
	if took > goneBy(grace) {
		t.Errorf("the process was gone after %s, want at most %s", took, goneBy(grace))
	}
	t.Logf("the process was gone after %s", took)
	sum := e.awaitLog("drained")
	if sum.num("notified") != n || sum.num("notices_failed") != 0 ||
		sum.num("left_by_themselves") != stay || sum.num("closed_at_deadline") != n-stay {
		t.Errorf("the summary is %s", sum.text)
	}
}
