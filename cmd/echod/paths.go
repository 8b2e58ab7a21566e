package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"echod/control"
)

const socketName = "control.sock"

// unitSocket is where echod-control.socket listens.
const unitSocket = "/run/echod-control.sock"

// runtimeDirectory is the directory that systemd made for the service; empty without one.
func runtimeDirectory() string {
	first, _, _ := strings.Cut(os.Getenv("RUNTIME_DIRECTORY"), ":")
	return first
}

// userDirectory is where a user's own server has its socket; empty without such a place.
func userDirectory() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "echod")
	}
	return ""
}

// privateDirectory is the place of last resort.
func privateDirectory() string {
	return filepath.Join(os.TempDir(), "echod-"+strconv.Itoa(os.Getuid()))
}

// serverSocket finds the default place for the control socket, making directories that only this
// user can enter.
func serverSocket() (string, error) {
	if dir := runtimeDirectory(); dir != "" {
		return filepath.Join(dir, socketName), nil
	}
	if dir := userDirectory(); dir != "" {
		if err := os.Mkdir(dir, 0o700); err == nil || os.IsExist(err) {
			return filepath.Join(dir, socketName), nil
		}
	}
	dir := privateDirectory()
	if err := os.Mkdir(dir, 0o700); err != nil && !os.IsExist(err) {
		return "", fmt.Errorf("making a directory for the control socket: %w", err)
	}
	if err := checkPrivate(dir); err != nil {
		return "", fmt.Errorf("control socket directory %s: %w", dir, err)
	}
	return filepath.Join(dir, socketName), nil
}

// clientSocket finds the server to talk to: the first place where one answers. A place that is open to
// all counts only when it is this user's: anybody could pose as a server there.
func clientSocket() (string, error) {
	private := privateDirectory()
	var places []string
	for _, dir := range []string{runtimeDirectory(), userDirectory(), private, "/run/echod"} {
		if dir != "" {
			places = append(places, filepath.Join(dir, socketName))
		}
	}
	places = append(places, unitSocket)
	for _, path := range places {
		c, err := net.Dial("unix", path)
		if errors.Is(err, fs.ErrPermission) {
			return "", &control.UnreachableError{Path: path, Err: err}
		}
		if err != nil {
			continue
		}
		_ = c.Close()
		if filepath.Dir(path) == private {
			if err := checkPrivate(private); err != nil {
				return "", &exitError{exitUnreachable, fmt.Errorf("control socket directory %s is not to be trusted: %w", private, err)}
			}
		}
		return path, nil
	}
	return "", &exitError{exitUnreachable, fmt.Errorf("no server answers: looked at %s (or name one with --control)", strings.Join(places, ", "))}
}

// controlClient makes a client of the control socket at path; where that is empty, of the one that a
// server in this environment would have, or of the default one.
func controlClient(path string) (*control.Client, error) {
	if path == "" {
		path = os.Getenv("ECHOD_CONTROL")
	}
	if path == "" || path == "off" {
		found, err := clientSocket()
		if err != nil {
			return nil, err
		}
		path = found
	}
	return control.NewClient(path), nil
}
