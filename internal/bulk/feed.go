package bulk

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"echod/client"
	"echod/internal/records"
)

// key is what is known of a record besides its data.
type key struct {
	input        int // which of the inputs
	number, line int64
	malformed    *records.Error // nil: there is data
	unended      bool           // what is written behind it begins a line
	end          int64          // in the input
}

// items is the source of the stream: the records of all inputs, one input after the other.
func (r *run) items(yield func(client.Item[key], error) bool) {
	for i := range r.opts.Inputs {
		more, err := r.input(i, yield)
		if err != nil {
			yield(client.Item[key]{}, err)
		}
		if err != nil || !more {
			return
		}
	}
	r.readAll = true
}

// input yields the records of one input, and reports whether more are wanted.
func (r *run) input(i int, yield func(client.Item[key], error) bool) (more bool, err error) {
	in := &r.tally.inputs[i]
	if r.opts.State.complete(i) {
		r.tally.skipped.Add(r.opts.State.records(i))
		in.before.Store(max(in.file, 0))
		in.done.Store(true)
		return true, nil
	}
	name := r.opts.Inputs[i]
	source, err := r.open(name)
	if err != nil {
		return false, err
	}
	defer func() {
		if name != stdin { // which may still be in a read
			_ = source.Close()
		}
	}()
	in.source.Store(source)
	if err := r.opts.State.opened(i, source); err != nil {
		return false, err
	}
	all := source.All()
	if name == stdin {
		all = r.interruptible(all)
	}
	for record, err := range all {
		if r.reading.Err() != nil {
			return false, context.Cause(r.reading)
		}
		if err := r.sameHeader(source); err != nil {
			return false, err
		}
		k := key{input: i, number: record.Number, line: record.Line, unended: record.Unended, end: source.Consumed()}
		if malformed, is := errors.AsType[*records.Error](err); is {
			k.number, k.line, k.malformed = malformed.Number, malformed.Line, malformed
		} else if err != nil {
			return false, err
		}
		in.taken.Add(1)
		if r.opts.State.has(k) {
			r.tally.skipped.Add(1)
			in.before.Store(k.end)
			in.settled(k)
			continue
		}
		if r.limiter != nil && r.limiter.Wait(r.reading) != nil {
			return false, context.Cause(r.reading)
		}
		r.opts.State.take(k)
		if !yield(client.Item[key]{Key: k, Data: record.Data}, nil) {
			return false, nil
		}
		if k.malformed != nil && r.opts.Strict {
			return false, errStrict
		}
	}
	in.done.Store(true)
	r.opts.State.read(i)
	return true, nil
}

// open opens an input in a goroutine of its own, which is left behind when reading ends first: to open a named pipe is
// a wait for somebody to write to it, that nothing ends.
func (r *run) open(name string) (*records.Source, error) {
	type opened struct {
		*records.Source
		err error
	}
	came := make(chan opened)
	go func() {
		source, err := records.Open(r.reading, name, r.opts.Stdin, r.opts.Records)
		select {
		case came <- opened{source, err}:
		case <-r.reading.Done():
			if err == nil {
				_ = source.Close()
			}
		}
	}()
	select {
	case o := <-came:
		return o.Source, o.err
	case <-r.reading.Done():
		return nil, context.Cause(r.reading)
	}
}

// sameHeader checks that what fails can stand in one file, under one header.
func (r *run) sameHeader(source *records.Source) error {
	header := source.Header()
	switch {
	case header == nil || r.opts.Failed == nil:
	case r.header == nil:
		r.header = header
	case !slices.Equal(r.header, header):
		return fmt.Errorf("%s has other columns than the input before: what fails of both cannot be in one file", source.Name())
	}
	return nil
}

// stdin is the name of standard input.
const stdin = "-"

type read struct {
	records.Record
	err error
}

// interruptible ranges over records in a goroutine of their own, which is left behind when reading ends first: to read a terminal or a pipe is a
// wait that nothing ends.
func (r *run) interruptible(all iter.Seq2[records.Record, error]) iter.Seq2[records.Record, error] {
	return func(yield func(records.Record, error) bool) {
		came := make(chan read)
		go func() {
			for record, err := range all {
				select {
				case came <- read{record, err}:
				case <-r.reading.Done():
					return // and not as if that were the end of the input
				}
			}
			close(came)
		}()
		for {
			select {
			case got, ok := <-came:
				if !ok || !yield(got.Record, got.err) {
					return
				}
			case <-r.reading.Done():
				yield(records.Record{}, context.Cause(r.reading))
				return
			}
		}
	}
}
