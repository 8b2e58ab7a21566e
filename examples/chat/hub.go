package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"echod/server"
)

const (
	queueLength = 256         // messages that may wait for one member
	lastWrite   = time.Second // how long a member that was dropped has to take what is queued
)

// errTooSlow is why a member was dropped. The server logs it, and keeps it in ClosedConn.Err.
var errTooSlow = fmt.Errorf("%d messages behind", queueLength)

// hub holds the rooms. It never waits for a client while it holds its lock.
type hub struct {
	mu    sync.Mutex
	rooms map[string]room
}

type room map[*member]struct{}

type member struct {
	conn  *server.Conn
	queue chan string // closed when the member has left its room
	slow  bool        // guarded by hub.mu until queue is closed
}

// ServeConn puts the client into the room that its first line names, and passes on its lines. A second goroutine sends
// it the lines of the others.
func (h *hub) ServeConn(_ context.Context, c *server.Conn) error {
	r := bufio.NewReader(c)
	line, err := readLine(r)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	name, nick, ok := strings.Cut(line, " ")
	if !ok || name == "" || nick == "" {
		_, err := io.WriteString(c, "* send a room and your name\n")
		return err
	}
	// Labels show who this is in logs and listings, and refuse what is not printable.
	if err := errors.Join(c.SetLabel("room", name), c.SetLabel("nick", nick)); err != nil {
		_, err := fmt.Fprintf(c, "* %v\n", err)
		return err
	}

	m := &member{conn: c, queue: make(chan string, queueLength)}
	var writer sync.WaitGroup
	writer.Go(m.write)
	h.join(name, m, "* "+nick+" is here\n")
	for err == nil {
		if line, err = readLine(r); err != nil {
			break
		}
		if bad := server.CheckText(line); bad != nil { // such as escape sequences for the others' terminals
			_, err = fmt.Fprintf(c, "* %v\n", bad)
			continue
		}
		h.send(name, nick+": "+line+"\n")
	}
	h.leave(name, m, "* "+nick+" has left\n")
	writer.Wait()

	switch {
	case m.slow:
		return errTooSlow
	case errors.Is(err, io.EOF):
		return nil
	}
	return err
}

func (h *hub) join(name string, m *member, greeting string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.rooms == nil {
		h.rooms = make(map[string]room)
	}
	if h.rooms[name] == nil {
		h.rooms[name] = make(room)
	}
	h.rooms[name][m] = struct{}{}
	h.sendLocked(name, greeting)
}

func (h *hub) leave(name string, m *member, farewell string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.rooms[name][m]; ok { // it was not dropped
		h.removeLocked(name, m)
	}
	h.sendLocked(name, farewell)
}

func (h *hub) send(name, message string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.sendLocked(name, message)
}

// sendLocked puts a message into the queue of each member of a room, and drops the members whose queue is full.
func (h *hub) sendLocked(name, message string) {
	for m := range h.rooms[name] {
		select {
		case m.queue <- message:
		default:
			m.slow = true
			h.removeLocked(name, m)
			// End the read that ServeConn waits in at once, and the writer's writes soon. An error means that the
			// connection has ended already.
			_ = m.conn.SetReadDeadline(time.Now())
			_ = m.conn.SetWriteDeadline(time.Now().Add(lastWrite))
		}
	}
}

func (h *hub) removeLocked(name string, m *member) {
	delete(h.rooms[name], m)
	if len(h.rooms[name]) == 0 {
		delete(h.rooms, name)
	}
	close(m.queue)
}

// write sends the queue to the client until the member has left the room. A member that was dropped is told why, if it
// takes what is queued in time.
func (m *member) write() {
	for message := range m.queue {
		if _, err := io.WriteString(m.conn, message); err != nil {
			return // reading fails too
		}
	}
	if m.slow {
		_, _ = fmt.Fprintf(m.conn, "* dropped: %v\n", errTooSlow)
	}
}

// readLine reads a line of at most 4,096 bytes without its end. The error is io.EOF at the end of the stream.
func readLine(r *bufio.Reader) (string, error) {
	line, err := r.ReadSlice('\n')
	return strings.TrimRight(string(line), "\r\n"), err
}
