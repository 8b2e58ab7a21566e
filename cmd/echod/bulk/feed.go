package bulk

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"echod/client"
	"echod/client/records"
)

// key is what is known of a record besides its data.
type key struct {
	input        int // which of the inputs
	number, line int64
	malformed    *records.Error // nil: there is data
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
}

// input yields the records of one input, and reports whether more are wanted.
func (r *run) input(i int, yield func(client.Item[key], error) bool) (more bool, err error) {
	if r.opts.State.complete(i) {
		return true, nil
	}
	name := r.opts.Inputs[i]
	source, err := records.Open(r.reading, name, r.opts.Stdin, r.opts.Records)
	if err != nil {
		return false, err
	}
	defer func() {
		r.tally.closed(i)
		if name != stdin { // which may still be in a read
			_ = source.Close()
		}
	}()
	r.tally.opened(i, source)
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
		item := client.Item[key]{Key: key{input: i, number: record.Number, line: record.Line}, Data: record.Data}
		if malformed, is := errors.AsType[*records.Error](err); is {
			item.Key = key{input: i, number: malformed.Number, line: malformed.Line, malformed: malformed}
		} else if err != nil {
			return false, err
		}
		if r.opts.State.has(item.Key) {
			r.tally.skipped.Add(1)
			continue
		}
		if r.limiter != nil && r.limiter.Wait(r.reading) != nil {
			return false, context.Cause(r.reading)
		}
		r.opts.State.take(item.Key)
		if !yield(item, nil) {
			return false, nil
		}
		if item.Key.malformed != nil && r.opts.Strict {
			return false, errStrict
		}
	}
	r.opts.State.read(i)
	return true, nil
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
			defer close(came)
			for record, err := range all {
				select {
				case came <- read{record, err}:
				case <-r.reading.Done():
					return
				}
			}
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
