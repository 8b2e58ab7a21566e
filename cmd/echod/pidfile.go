package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// pidFile is the path of a file with the pid of the serving process. After an upgrade that is the successor. If the path
// is empty, there is no file.
type pidFile string

// check returns the error that write would return.
func (p pidFile) check() error {
	if p == "" {
		return nil
	}
	path := string(p)
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return fmt.Errorf("--pid-file %s: is a directory", path)
	}
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("--pid-file %s: %w", path, withoutPath(err))
	}
	return errors.Join(file.Close(), os.Remove(file.Name()))
}

// write writes this process's pid to the file, atomically.
func (p pidFile) write() error {
	if p == "" {
		return nil
	}
	path := string(p)
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err == nil {
		_, err = fmt.Fprintln(file, os.Getpid())
		err = errors.Join(err, file.Chmod(0o644), file.Close())
		if err == nil {
			err = os.Rename(file.Name(), path)
		}
		if err != nil {
			_ = os.Remove(file.Name())
		}
	}
	if err != nil {
		return fmt.Errorf("--pid-file %s: %w", path, withoutPath(err))
	}
	return nil
}

// remove removes the file if it has this process's pid.
func (p pidFile) remove() error {
	if p == "" {
		return nil
	}
	content, err := os.ReadFile(string(p))
	if err != nil || strings.TrimSpace(string(content)) != strconv.Itoa(os.Getpid()) {
		return nil // the file is another server's, or does not exist
	}
	if err := os.Remove(string(p)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
