package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"echod/internal/bulk"
)

// openFiles opens what is written to, and looks whether what is read is there, before anything is sent or overwritten.
func (s *sender) openFiles(opts *bulk.Options) (err error) {
	if err := s.checkFiles(opts.Inputs); err != nil {
		return err
	}
	if s.resume != "" {
		if opts.State, err = bulk.OpenState(s.resume, opts.Inputs, opts.Records); err != nil {
			return err
		}
	}
	opts.Out = bulk.Stream(s.out)
	if s.output != "" {
		if opts.Out, err = bulk.OpenTarget(s.output); err != nil {
			return err
		}
	}
	if s.failed != "" {
		if opts.Failed, err = bulk.OpenFailed(s.failed, opts.Records); err != nil {
			return err
		}
	}
	return bulk.Prepare(opts.Out, opts.Failed, opts.State)
}

// namedFile is a file that is read or written, which need not be there.
type namedFile struct {
	name string
	info os.FileInfo // nil: it is not there
}

func statFile(name string) (namedFile, error) {
	info, err := os.Stat(name)
	return namedFile{name, info}, err
}

// is reports whether two are one regular file, or will be.
func (f namedFile) is(other namedFile) bool {
	if f.info != nil && other.info != nil {
		return f.info.Mode().IsRegular() && os.SameFile(f.info, other.info)
	}
	a, errA := filepath.Abs(f.name)
	b, errB := filepath.Abs(other.name)
	return f.info == nil && other.info == nil && errA == nil && errB == nil && a == b
}

// checkFiles checks that no file is written to that is read, or written to as another.
func (s *sender) checkFiles(inputs []string) error {
	var known []namedFile
	for _, name := range inputs {
		switch stdin, isFile := s.in.(*os.File); {
		case name == "-" && isFile:
			if info, err := stdin.Stat(); err == nil {
				known = append(known, namedFile{"standard input", info})
			}
		case name == "-" || strings.Contains(name, "://"):
		default:
			file, err := statFile(name)
			if failed, is := errors.AsType[*os.PathError](err); is {
				return fmt.Errorf("read %s: %w", name, failed.Err)
			}
			known = append(known, file)
		}
	}
	read := len(known)
	for _, target := range []struct{ flag, path string }{{"output", s.output}, {"failed", s.failed}, {"resume", s.resume}} {
		if target.path == "" {
			continue
		}
		file, _ := statFile(target.path) // what is wrong with it, opening tells
		for i, other := range known {
			switch {
			case !file.is(other):
			case i < read:
				return usagef("--%s %s: it is to be read, and not to be written to", target.flag, target.path)
			default:
				return usagef("--%s %s: it is to be written to for another flag", target.flag, target.path)
			}
		}
		known = append(known, file)
	}
	return nil
}
