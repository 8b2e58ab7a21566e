package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"time"
)

// store holds the values and executes commands.
type store struct {
	lastCall time.Duration // how long an idle connection may still send a command once it is drained

	mu     sync.Mutex
	values map[string]string
}

// command executes a command and writes the reply.
func (st *store) command(w *bufio.Writer, args []string) {
	st.mu.Lock()
	defer st.mu.Unlock()

	switch name := strings.ToUpper(args[0]); {
	case name == "PING" && len(args) == 1:
		fmt.Fprint(w, "+PONG\r\n")
	case name == "PING" && len(args) == 2, name == "ECHO" && len(args) == 2:
		writeBulk(w, args[1])
	case name == "SET" && len(args) == 3:
		if st.values == nil {
			st.values = make(map[string]string)
		}
		st.values[args[1]] = args[2]
		fmt.Fprint(w, "+OK\r\n")
	case name == "GET" && len(args) == 2:
		if value, ok := st.values[args[1]]; ok {
			writeBulk(w, value)
		} else {
			fmt.Fprint(w, "$-1\r\n")
		}
	case name == "DEL" && len(args) > 1:
		before := len(st.values)
		for _, key := range args[1:] {
			delete(st.values, key)
		}
		fmt.Fprintf(w, ":%d\r\n", before-len(st.values))
	default:
		writeError(w, fmt.Sprintf("ERR unknown command or wrong number of arguments: %q", name))
	}
}

// The limits of a command. They bound what one client can make the server allocate.
const (
	maxArgs  = 1024
	maxBytes = 1 << 20
)

// errProtocol is what all errors of malformed commands wrap.
var errProtocol = errors.New("ERR protocol error")

// readCommand reads an array of bulk strings, such as "*2\r\n$3\r\nGET\r\n$1\r\nk\r\n". The error is io.EOF only
// between two commands.
func readCommand(r *bufio.Reader) ([]string, error) {
	n, err := readLength(r, '*', maxArgs)
	if err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, fmt.Errorf("%w: empty command", errProtocol)
	}
	args := make([]string, n)
	left := maxBytes
	for i := range args {
		size, err := readLength(r, '$', left)
		if err == nil {
			left -= size
			args[i], err = readBulk(r, size)
		}
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, err
		}
	}
	return args, nil
}

// readLength reads a line such as "*2\r\n".
func readLength(r *bufio.Reader, kind byte, most int) (int, error) {
	line, err := r.ReadSlice('\n')
	if errors.Is(err, bufio.ErrBufferFull) {
		return 0, fmt.Errorf("%w: line too long", errProtocol)
	}
	if err != nil {
		if errors.Is(err, io.EOF) && len(line) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return 0, err
	}
	digits, ok := bytes.CutSuffix(line[1:], []byte("\r\n"))
	if !ok || line[0] != kind {
		return 0, fmt.Errorf("%w: expected %q and a length, got %q", errProtocol, kind, line)
	}
	n, err := strconv.Atoi(string(digits))
	if err != nil || n < 0 || n > most {
		return 0, fmt.Errorf("%w: length %q is not in 0..%d", errProtocol, digits, most)
	}
	return n, nil
}

// readBulk reads size bytes and the line end behind them.
func readBulk(r io.Reader, size int) (string, error) {
	p := make([]byte, size+2)
	if _, err := io.ReadFull(r, p); err != nil {
		return "", err
	}
	text, ok := strings.CutSuffix(string(p), "\r\n")
	if !ok {
		return "", fmt.Errorf("%w: no line end after %d bytes", errProtocol, size)
	}
	return text, nil
}

// writeBulk and writeError leave errors to the Flush that follows: a bufio.Writer remembers the first one.
func writeBulk(w *bufio.Writer, s string) { fmt.Fprintf(w, "$%d\r\n%s\r\n", len(s), s) }

// writeError writes a reply that begins with a word such as ERR, and must be one line.
func writeError(w *bufio.Writer, text string) { fmt.Fprintf(w, "-%s\r\n", text) }
