package server

import (
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

// roleEnv names what the test binary does instead of running tests: a key of roles.
const roleEnv = "ECHOD_TEST_ROLE"

var roles = make(map[string]func())

func TestMain(m *testing.M) {
	if play, ok := roles[os.Getenv(roleEnv)]; ok {
		play()
		return
	}
	goleak.VerifyTestMain(m)
}

// wantEqual reports a difference between got and want.
func wantEqual(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}
