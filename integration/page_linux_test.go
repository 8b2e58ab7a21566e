package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"echod/control"
)

// tab is a page in a new Chromium.
type tab struct {
	t   *testing.T
	ctx context.Context

	mu         sync.Mutex
	complaints []string // errors of the script, violations of the policy, files that did not load; guarded by mu
}

func newTab(t *testing.T) *tab {
	t.Helper()
	opts := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(require(t, "chromium", "chromium-browser", "google-chrome")),
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true),
	)
	if os.Geteuid() == 0 {
		opts = append(opts, chromedp.NoSandbox)
	}
	ctx, _ := chromedp.NewExecAllocator(t.Context(), opts...)
	ctx, _ = chromedp.NewContext(ctx)
	b := &tab{t: t, ctx: ctx}
	t.Cleanup(func() { _ = chromedp.Cancel(ctx) }) // waits until the browser has ended
	check(t, chromedp.Listen(ctx, func(event any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch e := event.(type) {
		case *log.EventEntryAdded:
			b.complaints = append(b.complaints, e.Entry.Text)
		case *runtime.EventExceptionThrown:
			b.complaints = append(b.complaints, e.ExceptionDetails.Text)
		}
	}))
	_, err := chromedp.Call(ctx, log.Enable, cdp.Empty{})
	check(t, err)
	return b
}

// do runs actions, and bounds their time.
func (b *tab) do(actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	ctx, cancel := context.WithTimeoutCause(b.ctx, patience, errImpatient)
	defer cancel()
	check(b.t, chromedp.Do(ctx, actions...))
}

// value returns what a script evaluates to.
func value[T any](b *tab, script string) T {
	b.t.Helper()
	ctx, cancel := context.WithTimeoutCause(b.ctx, patience, errImpatient)
	defer cancel()
	v, err := chromedp.Run(ctx, chromedp.Evaluate[T](script))
	check(b.t, err)
	return v
}

// shows waits until an element of the page has the texts.
func (b *tab) shows(id string, texts ...string) {
	b.t.Helper()
	for _, text := range texts {
		element := fmt.Sprintf("(document.getElementById(%q)?.innerText ?? '')", id)
		_, err := chromedp.Run(b.ctx, chromedp.Poll[bool](fmt.Sprintf("%s.includes(%q)", element, text),
			chromedp.WithPollingInterval(50*time.Millisecond), chromedp.WithPollingTimeout(patience)))
		if err != nil {
			b.t.Fatalf("%s does not show %q but %q: %v", id, text, value[string](b, element), err)
		}
	}
}

// picture writes a picture of the page into the directory that ECHOD_TEST_PICTURES names, if it names one.
func (b *tab) picture(name string) {
	b.t.Helper()
	dir := os.Getenv("ECHOD_TEST_PICTURES")
	if dir == "" {
		return
	}
	png, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
	check(b.t, err)
	check(b.t, os.WriteFile(filepath.Join(dir, name+".png"), png, 0o644))
}

// accessible returns the nodes of the accessibility tree.
func (b *tab) accessible() (nodes []accessibleNode) {
	b.t.Helper()
	tree, err := chromedp.Call(b.ctx, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
	check(b.t, err)
	text := func(v *accessibility.Value) (s string) {
		if v != nil {
			_ = json.Unmarshal(v.Value, &s) // stays empty if it is no text
		}
		return s
	}
	for _, n := range tree.Nodes {
		nodes = append(nodes, accessibleNode{text(n.Role), text(n.Name)})
	}
	return nodes
}

type accessibleNode struct{ role, name string }

func TestStatusPage(t *testing.T) {
	slow(t)
	e := start(t, "--http", "127.0.0.1:0", "--max-conns", "200", "--grace", "1m")
	page := "http://" + e.web() + "/"
	crowd := e.crowd(60)
	talk := func() {
		for i, p := range crowd {
			check(t, p.echo(strings.Repeat("x", 200*i)+"\n"))
		}
	}
	talk()
	b := newTab(t)

	t.Log("it is live, and follows what happens")
	b.do(chromedp.Navigate(page))
	b.shows("link", "Live")
	b.shows("state", "60 clients connected", "running")
	talk()
	check(t, crowd[0].Close())
	b.shows("state", "59 clients connected")
	b.shows("closed", "client-closed")
	b.picture("status-running")

	t.Log("what an operator says is text")
	const markup = `<img src=x onerror="document.title='broken'">`
	hold := e.pause(control.PauseRequest{Reason: markup, TTL: 10 * time.Minute})
	b.shows("state", markup, "echod ctl resume "+hold.ID)

	t.Log("the search works by keyboard, and keeps the focus while the page updates")
	client := crowd[20].LocalAddr().String()
	b.do(chromedp.Focus(chromedp.ID("q")), chromedp.KeyEvent(client))
	b.shows("connections", "1 of 59 connections match", client)
	e.resume()
	b.shows("state", "running")
	if focus := value[string](b, "document.activeElement.id"); focus != "q" {
		t.Errorf("the focus is in %q", focus)
	}
	if query := value[string](b, "new URLSearchParams(location.search).get('q')"); query != client {
		t.Errorf("the page's address asks for %q", query)
	}
	b.do(chromedp.KeyEvent(kb.Tab), chromedp.KeyEvent("n")) // selects an order by its first letter
	if order := value[string](b, "document.activeElement.value"); order != "newest" {
		t.Errorf("Tab and n chose the order %q", order)
	}

	t.Log("everything has a name for those who do not see it")
	found := map[string]int{}
	for _, n := range b.accessible() {
		found[n.role]++
		switch n.role {
		case "searchbox", "combobox", "button", "image", "region", "heading", "link":
			if n.name == "" {
				t.Errorf("a %s has no name", n.role)
			}
		}
	}
	for _, role := range []string{"searchbox", "combobox", "button", "image", "region", "heading", "link", "table", "status"} {
		if found[role] == 0 {
			t.Errorf("the page has no %s: %v", role, found)
		}
	}

	t.Log("a phone, in dark mode")
	_, err := chromedp.Call(b.ctx, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: "dark"}},
	})
	check(t, err)
	const phone = 390
	b.do(chromedp.EmulateViewport(phone, 844, chromedp.EmulateMobile), chromedp.Navigate(page))
	b.shows("link", "Live")
	b.picture("status-phone")
	if width := value[int](b, "document.documentElement.scrollWidth"); width > phone {
		t.Errorf("the page is %d wide on a phone of %d", width, phone)
	}
	if color := value[string](b, "getComputedStyle(document.body).backgroundColor"); color != "rgb(15, 20, 25)" {
		t.Errorf("the background is %s in dark mode", color)
	}

	t.Log("a drain counts down")
	e.signal(syscall.SIGTERM)
	b.shows("state", "draining", "59 clients told", "Clients that stay are closed in 5")
	b.mu.Lock()
	if len(b.complaints) > 0 {
		t.Errorf("the page complained: %q", b.complaints)
	}
	b.mu.Unlock()
	for _, p := range crowd[1:] {
		check(t, p.Close())
	}
	e.wait(0)
	b.shows("link", "No connection to the server")
}

// TestStatusPageWithoutScript reads the page as a browser that runs no scripts.
func TestStatusPageWithoutScript(t *testing.T) {
	slow(t)
	e := start(t, "--http", "127.0.0.1:0")
	p := e.served()
	b := newTab(t)
	_, err := chromedp.Call(b.ctx, emulation.SetScriptExecutionDisabled, emulation.SetScriptExecutionDisabledParams{Value: true})
	check(t, err)
	b.do(chromedp.Navigate("http://" + e.web() + "/?q=" + p.LocalAddr().String()))
	var all strings.Builder
	for _, n := range b.accessible() {
		fmt.Fprintln(&all, n.name)
	}
	for _, want := range []string{"running", "1 client connected", p.LocalAddr().String(), "Reload the page"} {
		if !strings.Contains(all.String(), want) {
			t.Errorf("the page lacks %q:\n%s", want, all.String())
		}
	}
}
