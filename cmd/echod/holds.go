package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"echod/control"
	"echod/server"
)

// holdsFile records the server's holds in a file in $STATE_DIRECTORY, or beside the control socket. Holds end with the
// process. Their owners may rely on them, so after a restart the new server reports the holds of the previous one.
type holdsFile struct {
	path string
	srv  *server.Server
	log  *zap.Logger
	lost []control.Hold // holds of the previous server; set once
	mu   sync.Mutex     // orders the updates
}

// recordedHolds is the content of the file. Earlier versions wrote an array of holds, which is read, too.
type recordedHolds struct {
	Holds []control.Hold `json:"holds,omitempty"`
	Lost  []control.Hold `json:"lost,omitempty"` // for the successor of an upgrade
}

// newHoldsFile returns nil if other users than this one and root can write to the directory.
func newHoldsFile(socket string, srv *server.Server, log *zap.Logger) *holdsFile {
	path := socket + ".holds"
	if dir, _, _ := strings.Cut(os.Getenv("STATE_DIRECTORY"), ":"); dir != "" { // of systemd; it may list several
		path = filepath.Join(dir, "holds")
	}
	if !filepath.IsAbs(path) || checkOwnDirectoryAndParents(filepath.Dir(path)) != nil {
		return nil
	}
	return &holdsFile{path: path, srv: srv, log: log}
}

func (f *holdsFile) read() (recorded recordedHolds) {
	content, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return recorded
	}
	if err == nil {
		if err = json.Unmarshal(content, &recorded); err != nil {
			err = json.Unmarshal(content, &recorded.Holds)
		}
	}
	if err != nil {
		f.log.Warn("cannot read the holds of the previous server", zap.Error(err))
	}
	return recorded
}

// reportLost logs the holds of the previous server, and keeps them for the status.
func (f *holdsFile) reportLost() {
	for _, h := range f.read().Holds {
		if h.Expires == nil || h.Expires.After(time.Now()) {
			fields := []zap.Field{zap.String("hold", h.ID), zap.String("reason", h.Reason), zap.Time("since", h.Since)}
			if h.UID != nil && h.PID != nil {
				fields = append(fields, zap.Int("placed_by_uid", *h.UID), zap.Int("placed_by_pid", *h.PID))
			}
			f.log.Warn("a restart ended a pause", fields...)
			f.lost = append(f.lost, h)
		}
	}
	f.update()
}

// takeOver reads the lost holds that the predecessor of an upgrade has recorded.
func (f *holdsFile) takeOver() { f.lost = f.read().Lost }

// onRequest updates the file after a request to the control plane.
func (f *holdsFile) onRequest(_, method string, _ int) {
	if method == http.MethodGet {
		return
	}
	f.update()
}

func (f *holdsFile) update() {
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.srv.Status()
	if st.State >= server.StateDraining {
		return
	}
	recorded := recordedHolds{Lost: f.lost}
	for _, h := range st.Holds {
		recorded.Holds = append(recorded.Holds, control.NewHold(h))
	}
	if err := f.write(recorded); err != nil {
		f.log.Warn("cannot record the holds", zap.Error(err))
	}
}

func (f *holdsFile) write(recorded recordedHolds) error {
	if len(recorded.Holds)+len(recorded.Lost) == 0 {
		if err := os.Remove(f.path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	content, err := json.Marshal(recorded)
	if err != nil {
		return err
	}
	// A new file is renamed, so that a reader never sees a part of it.
	file, err := os.CreateTemp(filepath.Dir(f.path), filepath.Base(f.path)+".*")
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if closed := file.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(file.Name(), f.path)
	}
	if err != nil {
		_ = os.Remove(file.Name())
	}
	return err
}
