package records

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// Open opens a source: stdin if the name is "-", which Close leaves open, a URL if
// it begins with http:// or https://, and otherwise a file. User, password and query
// of a URL are used, and never shown.
//
// The end of the context ends all reading, with its cause. Exceptions are a read of
// stdin, a read of a file on a system that cannot interrupt it, and the opening of a
// named pipe that has no writer.
func Open(ctx context.Context, name string, stdin io.Reader, opts Options) (*Source, error) {
	var in *input
	var err error
	switch {
	case name == "-":
		in = newInput(ctx, stdin, PublicName(name))
	case isURL(name):
		in, err = openURL(ctx, name, opts)
	default:
		in, err = openFile(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	return newSource(in, opts)
}

// PublicName returns the name that Open gives to the source of that name.
func PublicName(name string) string {
	switch {
	case name == "-":
		return "standard input"
	case !isURL(name):
		return name
	}
	u, err := url.Parse(name)
	if err != nil {
		return "URL" // any part of it may be secret
	}
	return publicName(u)
}

func isURL(name string) bool {
	scheme, _, _ := strings.Cut(strings.ToLower(name), "://")
	return scheme == "http" || scheme == "https"
}

// An input is where the bytes come from, before they are unpacked and decoded.
type input struct {
	name  string
	ctx   context.Context
	r     io.Reader
	size  int64        // at the start; -1 means unknown
	close func() error // may be called again

	file      interface{ Stat() (fs.FileInfo, error) } // a regular file, or nil
	modified  time.Time                                // of file, at the start
	url       bool
	validator string // of a URL's response
	resumed   bool   // began at Options.From

	err      error // of r, which stays
	consumed atomic.Int64
}

func newInput(ctx context.Context, r io.Reader, name string) *input {
	in := &input{name: name, ctx: ctx, r: r, size: -1, close: func() error { return nil }}
	if f, ok := r.(interface{ Stat() (fs.FileInfo, error) }); ok {
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			in.file, in.size, in.modified = f, info.Size(), info.ModTime()
		}
	}
	return in
}

// openFile opens a file, named pipe or device.
func openFile(ctx context.Context, name string) (*input, error) {
	f, err := os.Open(name)
	if err != nil {
		if path, ok := errors.AsType[*fs.PathError](err); ok {
			err = path.Err
		}
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, errors.Join(fmt.Errorf("read %s: is a directory", name), f.Close())
	}
	in := newInput(ctx, f, name)
	// A pipe or a terminal may have nothing to read for long. Regular files have no
	// deadlines, and need none.
	stop := context.AfterFunc(ctx, func() { _ = f.SetReadDeadline(time.Unix(1, 0)) })
	in.close = func() error {
		stop()
		if err := f.Close(); !errors.Is(err, fs.ErrClosed) {
			return err
		}
		return nil
	}
	return in, nil
}

func (in *input) Read(p []byte) (n int, err error) {
	if in.err != nil {
		return 0, in.err
	}
	if in.ctx.Err() == nil {
		n, err = in.r.Read(p)
		in.consumed.Add(int64(n))
	}
	if in.ctx.Err() != nil {
		err = context.Cause(in.ctx)
	} else if file, ok := errors.AsType[*fs.PathError](err); ok {
		err = file.Err // the rest is in the error of the source
	}
	if err == io.EOF {
		err = in.end()
	}
	in.err = err
	return n, err
}

// end returns io.EOF, or an error if a regular file ends before the size that it had. Files
// of /proc and /sys are shorter than their size, but do not change.
func (in *input) end() error {
	consumed := in.consumed.Load()
	if in.file == nil || consumed >= in.size {
		return io.EOF
	}
	info, err := in.file.Stat()
	if err != nil || info.Size() == in.size && info.ModTime().Equal(in.modified) {
		return io.EOF
	}
	return fmt.Errorf("the file shrank while it was read: it had %d bytes, and ends after %d", in.size, consumed)
}
