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

// key identifies a record.
type key struct {
	input        int // index of the input
	number, line int64
	malformed    *records.Error // nil: there is data
	unended      bool           // it has no newline: what is written after it must begin a new line
	end          int64          // offset in the input, as records.Source.Consumed
	start        start          // where a later run can begin in order to send it again
	digest       digest         // of the records up to it
}

// An inputError is an error of one input. It does not end the run.
type inputError struct{ error }

func (e inputError) Unwrap() error { return e.error }

// items is the source of the stream: the records of all inputs, one input after another.
// An input that cannot be read does not end the run.
func (r *run) items(yield func(client.Item[key], error) bool) {
	for i := range r.opts.Inputs {
		more, err := r.input(i, yield)
		if bad, ok := errors.AsType[inputError](err); ok {
			r.tally.inputs[i].bad.Store(true)
			r.tally.badInputs.Add(1)
			r.opts.Display.Error(r.withHint(bad.error).Error())
			if err = nil; r.opts.Strict {
				err = ErrStrict
			}
		}
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
		in.before.Store(max(in.size, 0))
		in.read.Store(true)
		return true, nil
	}
	source, err := r.open(i)
	if err != nil {
		return true, r.asInputError(err)
	}
	stdin := r.opts.Inputs[i] == stdinName
	defer func() {
		if !stdin { // which another goroutine may still be reading
			_ = source.Close()
		}
	}()
	in.source.Store(source)
	check, err := r.opts.State.open(i, source)
	if err != nil {
		return true, inputError{err}
	}
	if n := check.from.Records; n > 0 {
		r.tally.skipped.Add(n)
		in.before.Store(check.from.Bytes)
	}
	all := source.All()
	if stdin {
		all = r.interruptible(all)
	}
	send := func(item client.Item[key]) (bool, error) {
		if r.limiter != nil && r.limiter.Wait(r.reading) != nil {
			return false, context.Cause(r.reading)
		}
		r.opts.State.take(item.Key)
		if !yield(item, nil) {
			return false, nil
		}
		if item.Key.malformed != nil && r.opts.Strict {
			return false, ErrStrict
		}
		return true, nil
	}
	for record, err := range all {
		malformed, isMalformed := errors.AsType[*records.Error](err)
		if err != nil && !isMalformed {
			return true, r.asInputError(err)
		}
		if r.reading.Err() != nil {
			return false, context.Cause(r.reading)
		}
		if err := r.sameHeader(source); err != nil {
			return true, inputError{err}
		}
		k := key{input: i, number: record.Number, line: record.Line, unended: record.Unended, end: source.Consumed()}
		if isMalformed {
			k.number, k.line, k.malformed = malformed.Number, malformed.Line, malformed
		}
		in.taken.Add(1)
		k.start, k.digest = check.next(source, record, malformed)
		item := client.Item[key]{Key: k, Data: record.Data}
		if k.number > check.before {
			if more, err := send(item); err != nil || !more {
				return more, err
			}
			continue
		}
		// An earlier run read this record. What it did not finish is sent again, but
		// only when the input has turned out to be the same.
		if r.opts.State.has(k) {
			r.tally.skipped.Add(1)
			in.before.Store(k.end)
			in.finished(k)
		} else {
			check.pending = append(check.pending, item)
		}
		if k.number < check.before {
			continue
		}
		if err := check.verify(source.Name()); err != nil {
			return true, inputError{err}
		}
		for _, item := range check.pending {
			if more, err := send(item); err != nil || !more {
				return more, err
			}
		}
		check.pending = nil
	}
	if err := check.atEnd(source.Name()); err != nil {
		return true, inputError{err}
	}
	r.tally.replaced.Add(source.Replaced())
	in.read.Store(true)
	r.opts.State.read(i)
	return true, nil
}

// asInputError marks err as that of an input, unless reading was ended.
func (r *run) asInputError(err error) error {
	if r.reading.Err() != nil {
		return context.Cause(r.reading)
	}
	return inputError{err}
}

// open opens an input in a separate goroutine, which is left behind if reading ends
// first: nothing interrupts the opening of a named pipe without a writer.
func (r *run) open(i int) (*records.Source, error) {
	opts := r.opts.Records
	opts.From = r.opts.State.from(i)
	opts.HTTP.OnRetry = r.retry
	type opened struct {
		*records.Source
		err error
	}
	result := make(chan opened)
	go func() {
		source, err := records.Open(r.reading, r.opts.Inputs[i], r.opts.Stdin, opts)
		select {
		case result <- opened{source, err}:
		case <-r.reading.Done():
			if err == nil {
				_ = source.Close()
			}
		}
	}()
	select {
	case o := <-result:
		return o.Source, o.err
	case <-r.reading.Done():
		return nil, context.Cause(r.reading)
	}
}

// sameHeader checks that the failed records of all inputs fit into one file, under one
// header.
func (r *run) sameHeader(source *records.Source) error {
	header := source.Header()
	switch {
	case header == nil || r.opts.Failed == nil:
	case r.header == nil:
		r.header = header
	case !slices.Equal(r.header, header):
		return fmt.Errorf("read %s: its columns differ from those of the input before, and --failed has one header",
			source.Name())
	}
	return nil
}

// stdinName is the name of standard input.
const stdinName = "-"

type readResult struct {
	records.Record
	err error
}

// interruptible ranges over records in a separate goroutine, which is left behind if
// reading ends first: nothing interrupts the read of a terminal or a pipe.
func (r *run) interruptible(all iter.Seq2[records.Record, error]) iter.Seq2[records.Record, error] {
	return func(yield func(records.Record, error) bool) {
		results := make(chan readResult)
		go func() {
			for record, err := range all {
				select {
				case results <- readResult{record, err}:
				case <-r.reading.Done():
					return // without closing results, which would mean the end of the input
				}
			}
			close(results)
		}()
		for {
			select {
			case result, ok := <-results:
				if !ok || !yield(result.Record, result.err) {
					return
				}
			case <-r.reading.Done():
				yield(records.Record{}, context.Cause(r.reading))
				return
			}
		}
	}
}
