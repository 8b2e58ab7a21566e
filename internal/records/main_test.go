package records

import (
	"errors"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// drain reads all of s and closes it.
func drain(t *testing.T, s *Source) (got []Record, malformed []*Error, fatal error) {
	t.Helper()
	for record, err := range s.All() {
		bad, ok := errors.AsType[*Error](err)
		switch {
		case fatal != nil:
			t.Errorf("%v, %v came after the last error: %v", record, err, fatal)
		case err == nil:
			got = append(got, record)
		case ok:
			malformed = append(malformed, bad)
		default:
			fatal = err
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	return got, malformed, fatal
}

// read reads all of text, of which no error is expected to be the last.
func read(t *testing.T, text string, opts Options) ([]Record, []*Error) {
	t.Helper()
	s, err := New(strings.NewReader(text), "data", opts)
	if err != nil {
		t.Fatal(err)
	}
	got, malformed, fatal := drain(t, s)
	if fatal != nil {
		t.Fatal(fatal)
	}
	return got, malformed
}

func data(records []Record) string {
	var b strings.Builder
	for _, r := range records {
		b.Write(r.Data)
	}
	return b.String()
}
