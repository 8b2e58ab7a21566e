package main

import (
	"bytes"
	"io"
	"sync/atomic"
	"time"
)

const (
	logBacklog     = 4096                   // writes that may wait for a slow reader
	logFlush       = 250 * time.Millisecond // for them to be taken when the process ends
	stacksPatience = time.Second            // for a reader to take the stacks of all goroutines
)

// logSink writes the log without ever blocking its caller: behind stderr may be a terminal that was
// stopped with Ctrl-S, or a program that has stopped reading, and neither may stop the server. What finds
// no room is dropped, and said to be once the reader goes on; so is what it could not be given.
//
// Its goroutine is started by newLogSink and ends with close. Where stderr still blocks then, it ends with
// the process.
type logSink struct {
	out   io.Writer
	raw   io.Writer                // stderr, for what is no entry of the log
	lost  func(lines int64) []byte // gives the line that says so
	queue chan logWrite
	drops atomic.Int64
	quit  chan struct{}
	done  chan struct{}
}

type logWrite struct {
	text    []byte
	raw     bool
	written chan struct{} // closed then; may be nil
}

func newLogSink(out, raw io.Writer, lost func(lines int64) []byte) *logSink {
	s := &logSink{
		out: out, raw: raw, lost: lost, queue: make(chan logWrite, logBacklog),
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	go s.run()
	return s
}

// Write never fails and never blocks.
func (s *logSink) Write(p []byte) (int, error) {
	s.put(logWrite{text: bytes.Clone(p)})
	return len(p), nil
}

// Sync has nothing to do: close waits for what was written.
func (s *logSink) Sync() error { return nil }

func (s *logSink) put(w logWrite) bool {
	select {
	case s.queue <- w:
		return true
	default:
		s.drops.Add(1)
		return false
	}
}

func (s *logSink) run() {
	defer close(s.done)
	for {
		select {
		case w := <-s.queue:
			s.write(w)
		case <-s.quit:
			for len(s.queue) > 0 {
				s.write(<-s.queue)
			}
			return
		}
	}
}

func (s *logSink) write(w logWrite) {
	out := s.out
	if w.raw {
		out = s.raw
	}
	if _, err := out.Write(w.text); err != nil {
		s.drops.Add(1)
	}
	if w.written != nil {
		close(w.written)
	}
	if n := s.drops.Swap(0); n > 0 {
		if _, err := s.out.Write(s.lost(n)); err != nil {
			s.drops.Add(n) // there is nowhere left to tell of an error
		}
	}
}

// close ends the sink, once its reader has taken what was written, or logFlush has passed.
func (s *logSink) close() {
	close(s.quit)
	select {
	case <-s.done:
	case <-time.After(logFlush):
	}
}

// stacks writes to stderr what is no entry of the log, after all that was logged before, and waits for its reader to have taken it: the
// process is about to end.
type stacks struct{ *logSink }

func (s stacks) Write(p []byte) (int, error) {
	written := make(chan struct{})
	if s.put(logWrite{text: p, raw: true, written: written}) {
		select {
		case <-written:
		case <-time.After(stacksPatience):
		}
	}
	return len(p), nil
}
