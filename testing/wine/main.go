// Wine prints what an emulated Windows lacks that the tests need: 'make check-systems' runs it before them. On Windows 10
// and later each line ends in <nil>, the last one if links may be created.
package main

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
)

func main() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	fmt.Println("Unix sockets:", unixSocket(filepath.Join(dir, "socket")))
	fmt.Println("os.RemoveAll (FileDispositionInformationEx):", removeAll(filepath.Join(dir, "tree")))
	fmt.Println("symbolic links to directories:", symlink(filepath.Join(dir, "real"), filepath.Join(dir, "link")))
	_ = os.RemoveAll(dir)
}

func unixSocket(path string) error {
	ln, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	return ln.Close()
}

func removeAll(dir string) error {
	return cmp.Or(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "file"), nil, 0o600), os.RemoveAll(dir))
}

func symlink(dir, link string) error {
	err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "file"), nil, 0o600), os.Symlink(filepath.Base(dir), link))
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(link, "file"))
	return err
}
