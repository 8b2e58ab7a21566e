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
// it begins with http:// or https://, else a file. A user name and a password in
// the URL are used, and shown nowhere, as little as the URL's query.
//
// The end of the context ends all reading, with its cause. Only a read of stdin
// that waits for input, or one of a file on a system that cannot interrupt it, is
// first waited for, and so is opening a named pipe to which nobody writes.
func Open(ctx context.Context, name string, stdin io.Reader, opts Options) (*Source, error) {
	var in *input
	var err error
	switch {
	case name == "-":
		in = newInput(ctx, stdin, PublicName(name))
	case isURL(name):
		in, err = openURL(ctx, name, opts.HTTP)
	default:
		in, err = openFile(ctx, name)
	}
	if err != nil {
		return nil, err
	}
	return newSource(in, opts)
}

// PublicName returns what Open calls the source of that name in errors, once it is open.
func PublicName(name string) string {
	switch {
	case name == "-":
		return "standard input"
	case !isURL(name):
		return name
	}
	u, err := url.Parse(name)
	if err != nil {
		return "URL" // nobody knows what in it is secret
	}
	return publicName(u)
}

func isURL(name string) bool {
	scheme, _, _ := strings.Cut(strings.ToLower(name), "://")
	return scheme == "http" || scheme == "https"
}

// An input is where the bytes come from, before they are unpacked.
type input struct {
	name  string
	ctx   context.Context
	r     io.Reader
	size  int64        // -1 means unknown
	close func() error // may be called again

	validator string // of a URL's answer

	err      error // of r; it stays
	consumed atomic.Int64
}

func newInput(ctx context.Context, r io.Reader, name string) *input {
	in := &input{name: name, ctx: ctx, r: r, size: -1, close: func() error { return nil }}
	if f, ok := r.(interface{ Stat() (fs.FileInfo, error) }); ok {
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			in.size = info.Size()
		}
	}
	return in
}

// openFile opens a file, named pipe or device.
func openFile(ctx context.Context, name string) (*input, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, errors.Join(fmt.Errorf("read %s: is a directory", name), f.Close())
	}
	in := newInput(ctx, f, name)
	// A pipe or terminal may have nothing to read for long. Regular files have no
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
		err = file.Err // the rest is said already
	}
	in.err = err
	return n, err
}
