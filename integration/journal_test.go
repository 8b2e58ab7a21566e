//go:build unix

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// journal records the lines that a process writes to stderr. Tests can wait for lines.
type journal struct {
	mu      sync.Mutex
	lines   []entry
	partial []byte
	ended   bool          // the process has exited
	grown   chan struct{} // closed and replaced with each write
}

// entry is a line. msg is not empty if it is a log entry.
type entry struct {
	text   string
	msg    string
	time   time.Time
	fields map[string]any
}

func newJournal() *journal { return &journal{grown: make(chan struct{})} }

func parseEntry(text string) entry {
	e := entry{text: text}
	if json.Unmarshal([]byte(text), &e.fields) == nil {
		e.msg, _ = e.fields["msg"].(string)
		e.time, _ = time.Parse(time.RFC3339Nano, e.str("time"))
	}
	return e
}

// str returns a field as text, or the empty string.
func (e entry) str(field string) string {
	if v, ok := e.fields[field]; ok {
		return fmt.Sprint(v)
	}
	return ""
}

// num returns a numeric field, or -1.
func (e entry) num(field string) int {
	if v, ok := e.fields[field].(float64); ok {
		return int(v)
	}
	return -1
}

// has reports whether e has this message and these fields (name, value, name, value...).
func (e entry) has(msg string, fields ...string) bool {
	ok := e.msg == msg
	for i := 0; ok && i < len(fields); i += 2 {
		ok = e.str(fields[i]) == fields[i+1]
	}
	return ok
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.partial = append(j.partial, p...)
	for {
		line, rest, found := bytes.Cut(j.partial, []byte("\n"))
		if !found {
			break
		}
		j.lines = append(j.lines, parseEntry(string(line)))
		j.partial = rest
	}
	j.wake()
	return len(p), nil
}

// end notes that the process has exited.
func (j *journal) end() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ended = true
	j.wake()
}

func (j *journal) wake() {
	close(j.grown)
	j.grown = make(chan struct{})
}

// look returns the lines so far, whether there will be no more, and a channel that is closed with the next line.
func (j *journal) look() (lines []entry, ended bool, grown <-chan struct{}) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.lines[:len(j.lines):len(j.lines)], j.ended, j.grown
}

// String returns all lines.
func (j *journal) String() string {
	lines, _, _ := j.look()
	var all strings.Builder
	for _, e := range lines {
		all.WriteString(e.text + "\n")
	}
	return all.String()
}

// find returns the entries so far with this message and these fields.
func (j *journal) find(msg string, fields ...string) (found []entry) {
	lines, _, _ := j.look()
	for _, e := range lines {
		if e.has(msg, fields...) {
			found = append(found, e)
		}
	}
	return found
}

// await waits for the n-th entry with this message and these fields.
func (j *journal) await(ctx context.Context, n int, msg string, fields ...string) (entry, error) {
	for {
		_, ended, grown := j.look() // before the search, so that no line is missed
		if found := j.find(msg, fields...); len(found) >= n {
			return found[n-1], nil
		}
		if ended {
			return entry{}, fmt.Errorf("no log entry %q %v, and the process has exited", msg, fields)
		}
		select {
		case <-grown:
		case <-ctx.Done():
			return entry{}, fmt.Errorf("no log entry %q %v: %w", msg, fields, context.Cause(ctx))
		}
	}
}

var errImpatient = errors.New("it took too long")

// within returns a context with a timeout.
func within(t testing.TB, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, errImpatient)
	t.Cleanup(cancel)
	return ctx
}
