package top

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"

	tea "charm.land/bubbletea/v2"

	"echod/control"
	"echod/internal/text"
)

// A dialog gets all keys until it ends.
type dialog interface {
	// press handles a key, and returns the dialog that follows; nil is none.
	press(m *model, key tea.KeyPressMsg) dialog
}

// entry is a dialog for a line of text.
type entry struct {
	prompt string
	text   []rune
	typed  func(text string)        // after each change; may be nil
	accept func(text string) dialog // on enter; returns the dialog that follows
	cancel func()                   // on escape; may be nil
}

// maxEntry is the maximum length in characters: less than the server accepts as a reason.
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

// confirmation asks a question and runs an action on y. Any other key cancels.
type confirmation struct {
	question string
	do       action
}

func (c *confirmation) press(m *model, key tea.KeyPressMsg) dialog {
	switch {
	case !slices.Contains([]string{"y", "Y"}, key.Text):
		m.say("cancelled", false)
	case m.doer.do(c.do):
		m.busy = true
	default:
		m.say("the server has not answered the last request yet", true)
	}
	return nil
}

func (m *model) askPause() dialog {
	return &entry{prompt: "Reason for the pause: ", accept: func(reason string) dialog {
		reason = strings.TrimSpace(reason)
		because := ""
		if reason != "" {
			because = fmt.Sprintf(" (%s)", reason)
		}
		return &confirmation{
			fmt.Sprintf("Pause the server%s? New clients wait until it is resumed; the %s continue. y/N",
				because, text.Count(m.status.Connections, "connection")),
			func(ctx context.Context, c *control.Client) (string, error) {
				h, err := c.Pause(ctx, control.PauseRequest{Reason: reason, Mode: "hold"})
				return "paused: hold " + h.ID, err
			},
		}
	}}
}

// maxReason is the width in cells that a question gives to a hold's reason.
const maxReason = 30

func (m *model) askResume() dialog {
	if len(m.status.Holds) == 0 {
		m.say("nothing to resume: the server is "+m.status.State, false)
		return nil
	}
	var holds []string
	for _, h := range m.status.Holds {
		holds = append(holds, strings.TrimSpace(text.Printable(h.ID)+" "+clip(text.Printable(h.Reason), maxReason, m.glyphs.ellipsis)))
	}
	return &confirmation{
		fmt.Sprintf("Resume the server? This releases %s (%s). y/N", text.Count(len(holds), "hold"),
			firstFew(holds, 3)),
		func(ctx context.Context, c *control.Client) (string, error) {
			change, err := c.ResumeAll(ctx)
			if err != nil {
				return "", err
			}
			return fmt.Sprintf("released %s: the server is %s", text.Count(*change.Released, "hold"), change.State), nil
		},
	}
}

func (m *model) askKill() dialog {
	at := m.table.index()
	if at < 0 || m.history {
		m.say("select an open connection first (arrow keys, j, k)", false)
		return nil
	}
	r := m.table.shown[at]
	return &confirmation{
		fmt.Sprintf("Close connection %d from %s, open for %s? It gets what was read back first. y/N",
			r.ID, r.Remote, span(m.now.Sub(r.Opened))),
		func(ctx context.Context, c *control.Client) (string, error) {
			_, err := c.Kill(ctx, r.ID)
			return fmt.Sprintf("killed connection %d", r.ID), err
		},
	}
}

func (m *model) askDrain() dialog {
	if m.status.State == "draining" {
		return m.askForce()
	}
	who, meanwhile := text.Count(m.status.Connections, "client"), "new clients are served"
	if len(m.status.Holds) > 0 { // the drain ends the pause when it stops accepting
		who, meanwhile = who+" and all waiting ones", "the server stays paused"
	}
	before, grace := "It", "closes them at once"
	if delay := seconds(m.status.DrainDelaySeconds); delay > 0 {
		before = fmt.Sprintf("For %v %s; then it", delay, meanwhile)
	}
	if own := seconds(m.status.GraceSeconds); own > 0 {
		grace = fmt.Sprintf("gives them %v to finish", own)
	}
	return &confirmation{
		fmt.Sprintf("Drain the server? %s notifies %s, %s, and stops. y/N", before, who, grace),
		func(ctx context.Context, c *control.Client) (string, error) {
			change, err := c.Shutdown(ctx, control.ShutdownRequest{})
			return describeShutdown(change), err
		},
	}
}

func (m *model) askForce() dialog {
	early := ""
	if d := m.status.Drain; d != nil {
		early = fmt.Sprintf(", %s before the deadline", span(d.Deadline.Sub(m.now)))
	}
	return &confirmation{
		fmt.Sprintf("End the drain? This closes %s now%s. y/N", text.Count(m.status.Connections, "connection"), early),
		func(ctx context.Context, c *control.Client) (string, error) {
			change, err := c.Shutdown(ctx, control.ShutdownRequest{Now: true})
			return describeShutdown(change), err
		},
	}
}

func describeShutdown(change control.Change) string {
	if change.Drain == nil {
		return "the server is " + change.State
	}
	deadline := change.Drain.Deadline.Local().Format(time.TimeOnly)
	return fmt.Sprintf("the server is %s until %s at the latest", change.State, deadline)
}

// firstFew lists up to most names, and how many more there are.
func firstFew(names []string, most int) string {
	if more := len(names) - most; more > 0 {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(names, ", ")
}
