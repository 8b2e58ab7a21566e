package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"echod/server"
)

// holdsFile records the server's holds beside the control socket. A hold ends with its process: after a
// restart the new server reports the holds of the old one: their owners may rely on them.
type holdsFile struct {
	path string
	srv  *server.Server
	log  *zap.Logger
	mu   sync.Mutex // orders the updates
}

// recordedHold is a hold in the file.
type recordedHold struct {
	ID      string    `json:"id"`
	Reason  string    `json:"reason"`
	Since   time.Time `json:"since"`
	Expires time.Time `json:"expires,omitzero"`
}

// newHoldsFile returns nil unless only this user and root can write to the directory of the control socket.
func newHoldsFile(socket string, srv *server.Server, log *zap.Logger) *holdsFile {
	if !filepath.IsAbs(socket) || checkOwnAndParents(filepath.Dir(socket)) != nil {
		return nil
	}
	return &holdsFile{path: socket + ".holds", srv: srv, log: log}
}

// reportLost warns of the holds that the previous server had, and removes the file.
func (f *holdsFile) reportLost() {
	content, err := os.ReadFile(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var holds []recordedHold
	if err == nil {
		err = json.Unmarshal(content, &holds)
	}
	if err != nil {
		f.log.Warn("cannot read the holds of the previous server", zap.Error(err))
	}
	for _, h := range holds {
		if h.Expires.IsZero() || h.Expires.After(time.Now()) {
			f.log.Warn("a restart ended a pause",
				zap.String("hold", h.ID), zap.String("reason", h.Reason), zap.Time("since", h.Since))
		}
	}
	_ = os.Remove(f.path)
}

// onRequest updates the file after a request to the control plane. The drain of a paused server keeps it.
func (f *holdsFile) onRequest(_, method string, _ int) {
	if method == http.MethodGet {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	st := f.srv.Status()
	if st.State >= server.StateDraining {
		return
	}
	holds := make([]recordedHold, 0, len(st.Holds))
	for _, h := range st.Holds {
		holds = append(holds, recordedHold{h.ID, h.Reason, h.Since, h.Expires})
	}
	if err := f.write(holds); err != nil {
		f.log.Warn("cannot record the holds", zap.Error(err))
	}
}

func (f *holdsFile) write(holds []recordedHold) error {
	if len(holds) == 0 {
		if err := os.Remove(f.path); !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	content, err := json.Marshal(holds)
	if err != nil {
		return err
	}
	// A new file is renamed, so that a reader never sees half of it.
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
