package control

import (
	"bufio"
	"encoding/json"
	"net/http"
)

// A listing writes Conns, a line for each connection, as they come: however many there are, it takes
// no memory to speak of.
type listing struct {
	out    *bufio.Writer
	lines  *json.Encoder
	length int
}

func newListing(w http.ResponseWriter) *listing {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	out := bufio.NewWriterSize(w, 32<<10)
	_, _ = out.WriteString(`{"connections":[`) // a bufio.Writer keeps its first error for Flush
	return &listing{out: out, lines: json.NewEncoder(out)}
}

// add writes c. An error means that the caller has gone.
func (l *listing) add(c Conn) error {
	if l.length > 0 {
		_ = l.out.WriteByte(',')
	}
	l.length++
	return l.lines.Encode(c)
}

func (l *listing) end() {
	_, _ = l.out.WriteString("]}\n")
	_ = l.out.Flush()
}
