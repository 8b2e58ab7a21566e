package top

import (
	"slices"
	"strings"
	"unicode"

	tea "charm.land/bubbletea/v2"
)

// A dialog has the keys for itself until it is over.
type dialog interface {
	// press takes a key, and gives the dialog that follows; nil is none.
	press(m *model, key tea.KeyPressMsg) dialog
}

// entry is a line that the operator types.
type entry struct {
	prompt string
	text   []rune
	typed  func(text string)        // after each change; may be nil
	accept func(text string) dialog // on enter, gives what follows
	cancel func()                   // on escape; may be nil
}

// maxEntry is how much can be typed, in characters: less than the server takes as a reason.
const maxEntry = 200

func (e *entry) insert(text string) {
	for _, r := range text {
		if unicode.IsPrint(r) && len(e.text) < maxEntry {
			e.text = append(e.text, r)
		}
	}
}

func (e *entry) press(m *model, key tea.KeyPressMsg) dialog {
	switch key.String() {
	case "enter":
		return e.accept(string(e.text))
	case "esc", "ctrl+g":
		if e.cancel != nil {
			e.cancel()
		}
		return nil
	case "backspace", "ctrl+h":
		e.text = e.text[:max(0, len(e.text)-1)]
	case "ctrl+w":
		kept := strings.TrimRightFunc(string(e.text), unicode.IsSpace)
		e.text = []rune(kept[:strings.LastIndexFunc(kept, unicode.IsSpace)+1])
	case "ctrl+u":
		e.text = e.text[:0]
	default:
		e.insert(key.Text)
	}
	m.typed(e)
	return e
}

func (m *model) typed(e *entry) {
	if e.typed != nil {
		e.typed(string(e.text))
	}
}

// confirmation asks whether to do what its question says. Anything but y is a no.
type confirmation struct {
	question string
	do       action
}

func (c *confirmation) press(m *model, key tea.KeyPressMsg) dialog {
	switch {
	case !slices.Contains([]string{"y", "Y"}, key.Text):
		m.say("nothing was done", false)
	case m.server.do(c.do):
		m.busy = true
	default:
		m.say("the server has not answered to what was asked before", true)
	}
	return nil
}
