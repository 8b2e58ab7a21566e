//go:build unix

package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"echod/control"
)

// TestCompletionInShells presses Tab in real shells. They complete what is known, and offer no files for the rest.
func TestCompletionInShells(t *testing.T) {
	slow(t)
	t.Parallel()
	dir := shortDir(t)
	check(t, os.Symlink(built(t, echodBinary), filepath.Join(dir, "echod")))
	check(t, os.WriteFile(filepath.Join(dir, "a-file"), nil, 0o600))
	e := start(t)
	e.pause(control.PauseRequest{Reason: "backup"})
	for name, shell := range map[string]struct{ argv, setup string }{
		"bash": {"bash --norc --noprofile -i", ". /usr/share/bash-completion/bash_completion; . <(echod completion bash)"},
		"zsh":  {"zsh -f -i", "autoload -Uz compinit && compinit -u -D; . <(echod completion zsh)"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := exec.LookPath(name); err != nil {
				missing(t, name+" is not installed")
			}
			if _, err := os.Stat("/usr/share/bash-completion/bash_completion"); name == "bash" && err != nil {
				missing(t, "bash-completion is not installed")
			}
			s := newScreen(t, 120, 40, "cd "+dir+" && export PATH="+dir+":$PATH PS1='%% ' ECHOD_CONTROL="+e.socket+" && exec "+shell.argv)
			s.awaits(`^%%? *$`)
			s.types(shell.setup + "; clear; echo ready")
			s.presses("Enter")
			s.awaits(`\Aready$`)
			for _, tt := range []struct{ typed, completed string }{
				{"echod ctl pause --mode re", "echod ctl pause --mode reject"},
				{"echod --log-level=w", "echod --log-level=warn"},
				{"echod ctl conns --so", "echod ctl conns --sort"},
				{"echod ctl set at-l", "echod ctl set at-limit="},
				{"echod ctl set log-level=d", "echod ctl set log-level=debug"},
				{"echod ctl resume ", "echod ctl resume h1"},
				{"echod serve --env-file a-", "echod serve --env-file a-file"},
				{"echod send --encoding shi", "echod send --encoding shift_jis"},
			} {
				s.presses("C-u")
				s.types(tt.typed)
				s.presses("Tab")
				s.awaits(`^%%? *` + regexp.QuoteMeta(tt.completed) + ` ?$`)
			}
			s.presses("C-u")
			s.types("echod serve --grace a-")
			s.presses("Tab")
			s.types("end")
			s.awaits(`^%%? *echod serve --grace a-end$`) // not a-file
		})
	}
}
