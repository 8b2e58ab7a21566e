package client

import (
	"cmp"
	"flag"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// More checks than rapid's default: they take microseconds each. The
	// command line, which is parsed later, goes before.
	if err := cmp.Or(flag.Set("rapid.checks", "3000"), flag.Set("rapid.nofailfile", "true")); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}
