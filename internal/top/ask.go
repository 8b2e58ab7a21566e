package top

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"

	"echod/control"
)

// What the operator can have done. Each question says what will happen; the server says what has.

func (m *model) askPause() dialog {
	return &entry{prompt: "Pause, for what reason? ", accept: func(reason string) dialog {
		reason = strings.TrimSpace(reason)
		because := ""
		if reason != "" {
			because = fmt.Sprintf(" (%s)", reason)
		}
		return &confirmation{
			fmt.Sprintf("Pause the server%s: new clients wait until it is resumed; who is connected (%s) notices nothing. y/N", because, humanize.Comma(int64(m.status.Connections))),
			func(ctx context.Context, c *control.Client) (string, error) {
				h, err := c.Pause(ctx, control.PauseRequest{Reason: reason, Mode: "hold"})
				return "paused: hold " + h.ID, err
			},
		}
	}}
}

// maxReason is how much of a hold's reason a question shows, in cells.
const maxReason = 30

func (m *model) askResume() dialog {
	if len(m.status.Holds) == 0 {
		m.say("nothing to resume: the server is "+m.status.State, false)
		return nil
	}
	var holds []string
	for _, h := range m.status.Holds {
		holds = append(holds, strings.TrimSpace(h.ID+" "+clip(printable(h.Reason), maxReason, m.glyphs.cut)))
	}
	return &confirmation{
		fmt.Sprintf("Resume the server: %s released (%s), and new clients are served. y/N", are(len(holds), "hold"), listed(holds, 3)),
		func(ctx context.Context, c *control.Client) (string, error) {
			change, err := c.Resume(ctx)
			if err != nil {
				return "", err
			}
			return fmt.Sprintf("released %s: the server is %s", count(*change.Released, "hold"), change.State), nil
		},
	}
}

func (m *model) askKill() dialog {
	at := m.table.index()
	if at < 0 || m.history {
		m.say("select an open connection first, with the arrows or j and k", false)
		return nil
	}
	r := m.table.shown[at]
	return &confirmation{
		fmt.Sprintf("Kill connection %d from %s, open for %s: what was read of it is written back, then it is closed. y/N", r.ID, r.Remote, span(m.now.Sub(r.Opened))),
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
	who, meanwhile := are(m.status.Connections, "client"), "new clients are served"
	if len(m.status.Holds) > 0 { // which a drain ends when it accepts no more
		who, meanwhile = count(m.status.Connections, "client")+" and all who wait are", "it stays paused"
	}
	before, grace := "", "closed at once"
	if delay := seconds(m.status.DrainDelaySeconds); delay > 0 {
		before = fmt.Sprintf("%s for %v more, then ", meanwhile, delay)
	}
	if own := seconds(m.status.GraceSeconds); own > 0 {
		grace = fmt.Sprintf("given %v to finish", own)
	}
	return &confirmation{
		fmt.Sprintf("Drain the server: %s%s told and %s; then it stops. y/N", before, who, grace),
		func(ctx context.Context, c *control.Client) (string, error) {
			change, err := c.Shutdown(ctx, control.ShutdownRequest{})
			return shutdownSaid(change), err
		},
	}
}

func (m *model) askForce() dialog {
	left := "now"
	if d := m.status.Drain; d != nil {
		left = fmt.Sprintf("now, %s before their time is up", span(d.Deadline.Sub(m.now)))
	}
	return &confirmation{
		fmt.Sprintf("End the drain: %s closed %s; then the server stops. y/N", are(m.status.Connections, "client"), left),
		func(ctx context.Context, c *control.Client) (string, error) {
			change, err := c.Shutdown(ctx, control.ShutdownRequest{Now: true})
			return shutdownSaid(change), err
		},
	}
}

func shutdownSaid(change control.Change) string {
	if change.Drain == nil {
		return "the server is " + change.State
	}
	return fmt.Sprintf("the server is %s, until %s at the latest", change.State, change.Drain.Deadline.Local().Format(time.TimeOnly))
}

// are makes the subject of a sentence.
func are(n int, noun string) string {
	if n == 1 {
		return "1 " + noun + " is"
	}
	return count(n, noun) + " are"
}

// listed names the first few.
func listed(names []string, most int) string {
	if more := len(names) - most; more > 0 {
		return strings.Join(names[:most], ", ") + fmt.Sprintf(" and %d more", more)
	}
	return strings.Join(names, ", ")
}
