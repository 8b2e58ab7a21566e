//go:build unix

package integration

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// sources lists the files of this repository whose names end in ext.
func sources(t *testing.T, ext string) (paths []string) {
	t.Helper()
	check(t, filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() && (strings.HasPrefix(d.Name(), ".") && d.Name() != ".." || d.Name() == "dist" || d.Name() == "out") {
			return fs.SkipDir
		}
		if strings.HasSuffix(path, ext) {
			paths = append(paths, path)
		}
		return err
	}))
	return paths
}

var (
	code    = regexp.MustCompile("(?ms)^```.*?^```$")
	heading = regexp.MustCompile(`(?m)^#+ +(.+)$`)
	links   = regexp.MustCompile(`\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"`)
)

// anchors lists the anchors of a page's headings, as GitHub names them.
func anchors(page string) (names []string) {
	for _, h := range heading.FindAllStringSubmatch(code.ReplaceAllString(page, ""), -1) {
		name := strings.ToLower(strings.TrimSpace(h[1]))
		name = regexp.MustCompile(`[^\p{L}\p{N}_ -]`).ReplaceAllString(name, "")
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}

func TestDocsLinks(t *testing.T) {
	t.Parallel()
	found := 0
	for _, path := range sources(t, ".md") {
		text := readFile(t, path)
		for _, m := range links.FindAllStringSubmatch(code.ReplaceAllString(text, ""), -1) {
			link := m[1] + m[2]
			if strings.Contains(link, "://") {
				continue
			}
			found++
			file, anchor, _ := strings.Cut(link, "#")
			target := path
			if file != "" {
				target = filepath.Join(filepath.Dir(path), file)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s, which does not exist", path, link)
			} else if anchor != "" && !slices.Contains(anchors(readFile(t, target)), anchor) {
				t.Errorf("%s links to %s: %s has the anchors %q", path, link, target, anchors(readFile(t, target)))
			}
		}
	}
	if found < 10 {
		t.Errorf("found only %d links", found)
	}
}

// logged lists the log messages in the code, with their levels. A message ends at a colon; an explanation follows it.
func logged(t *testing.T) map[string]string {
	t.Helper()
	messages := make(map[string]string)
	for _, path := range sources(t, ".go") {
		if dir := strings.Split(filepath.ToSlash(path), "/")[1]; strings.HasSuffix(path, "_test.go") || dir != "server" && dir != "control" && dir != "cmd" {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		check(t, err)
		ast.Inspect(file, func(n ast.Node) bool {
			level, text := logLine(n)
			switch text := text.(type) {
			case nil:
			case *ast.BasicLit:
				message, err := strconv.Unquote(text.Value)
				check(t, err)
				message, _, _ = strings.Cut(message, ":")
				if had, ok := messages[message]; ok && had != level {
					level = had + ", " + level
				}
				messages[message] = level
			default:
				t.Errorf("%s logs something other than a string literal", path)
			}
			return true
		})
	}
	return messages
}

// logLine returns the level and the text that a node logs: log.Info("text"), log.Check(zap.InfoLevel, "text"), or a
// zapcore.Entry.
func logLine(n ast.Node) (level string, text ast.Expr) {
	levelOf := func(x ast.Expr) string { // zap.InfoLevel
		return strings.ToLower(strings.TrimSuffix(x.(*ast.SelectorExpr).Sel.Name, "Level"))
	}
	switch n := n.(type) {
	case *ast.CallExpr:
		method, ok := n.Fun.(*ast.SelectorExpr)
		if !ok || !isLogger(method.X) {
			return "", nil
		}
		switch method.Sel.Name {
		case "Debug", "Info", "Warn", "Error":
			return strings.ToLower(method.Sel.Name), n.Args[0]
		case "Check":
			return levelOf(n.Args[0]), n.Args[1]
		}
	case *ast.CompositeLit:
		if name, ok := n.Type.(*ast.SelectorExpr); !ok || name.Sel.Name != "Entry" {
			return "", nil
		}
		for _, e := range n.Elts {
			switch field := e.(*ast.KeyValueExpr); field.Key.(*ast.Ident).Name {
			case "Level":
				level = levelOf(field.Value)
			case "Message":
				text = field.Value
			}
		}
	}
	return level, text
}

// isLogger reports whether an expression looks like a logger: log, s.log, a.srv.log, o.Logger.
func isLogger(x ast.Expr) bool {
	name := ""
	switch x := x.(type) {
	case *ast.Ident:
		name = x.Name
	case *ast.SelectorExpr:
		name = x.Sel.Name
	}
	return name == "log" || name == "Logger"
}

// TestDocsExplainLogMessages compares the table in docs/operations.md with the messages in the code.
func TestDocsExplainLogMessages(t *testing.T) {
	t.Parallel()
	page := readFile(t, "../docs/operations.md")
	_, page, ok := strings.Cut(page, "| message | level | |\n")
	if !ok {
		t.Fatal("found no table of messages")
	}
	table, _, _ := strings.Cut(page, "\n\n")
	explained := make(map[string]string)
	for row := range strings.Lines(table) {
		cells := strings.Split(row, " | ")
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[0], -1) {
			explained[m[1]] = cells[1]
		}
	}
	messages := logged(t)
	if len(messages) < 20 {
		t.Fatalf("found only %d messages", len(messages))
	}
	for _, m := range slices.Sorted(maps.Keys(messages)) {
		if level, ok := explained[m]; !ok {
			t.Errorf("%q (%s) is not in the table", m, messages[m])
		} else if level != messages[m] {
			t.Errorf("%q has level %s, the table says %s", m, messages[m], level)
		}
	}
	for _, m := range slices.Sorted(maps.Keys(explained)) {
		if _, ok := messages[m]; !ok {
			t.Errorf("%q is in the table, but never logged", m)
		}
	}
}

// TestDocsExplainReasonsAndMetrics compares docs/operations.md with what a server exports.
func TestDocsExplainReasonsAndMetrics(t *testing.T) {
	t.Parallel()
	page := readFile(t, "../docs/operations.md")
	e := start(t, "--http", "0")
	got := e.scrape()
	got["echod_signals_total"], got["echod_control_requests_total"], got["echod_log_entries_dropped_total"] = 0, 0, 0 // appear with the first one
	for series := range got {
		name, labels, _ := strings.Cut(series, "{")
		if reason, ok := strings.CutPrefix(labels, `reason="`); ok && name == "echod_connections_closed_total" {
			if reason = strings.TrimSuffix(reason, `"}`); !strings.Contains(page, fmt.Sprintf("`%s`", reason)) {
				t.Errorf("the reason %s is not in docs/operations.md", reason)
			}
		}
		name = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(name, "")
		if strings.HasPrefix(name, "echod_") && !regexp.MustCompile("`"+name+"[`{]").MatchString(page) {
			t.Errorf("the metric %s is not in docs/operations.md", name)
		}
	}
	for _, m := range regexp.MustCompile("`(echod_[a-z_]+)").FindAllStringSubmatch(page, -1) {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(got)), func(series string) bool { return strings.HasPrefix(series, m[1]) }) {
			t.Errorf("docs/operations.md has the metric %s, which does not exist", m[1])
		}
	}
}

// TestDocsFlags checks that docs/flags.md has the help text of each command. With ECHOD_UPDATE=1 it writes the file.
func TestDocsFlags(t *testing.T) {
	t.Parallel()
	const path = "../docs/flags.md"
	var page strings.Builder
	page.WriteString("# Flags\n\nThe help text of each command. `ECHOD_UPDATE=1 go test -run TestDocsFlags ./integration` writes this page.\n")
	var add func(command ...string)
	add = func(command ...string) {
		help := run(t, commandOf(append(append([]string{built(t, echodBinary)}, command...), "--help")...))
		if help.code != 0 {
			t.Fatalf("echod %q --help: %+v", command, help)
		}
		fmt.Fprintf(&page, "\n## %s\n\n```\n%s```\n", strings.Join(append([]string{"echod"}, command...), " "), help.stdout)
		_, commands, _ := strings.Cut(help.stdout, "Available Commands:\n")
		for line := range strings.Lines(commands) {
			name, ok := strings.CutPrefix(line, "  ")
			if !ok {
				break
			}
			if name, _, _ = strings.Cut(name, " "); name != "completion" && name != "help" {
				add(append(slices.Clone(command), name)...)
			}
		}
	}
	add()
	if os.Getenv("ECHOD_UPDATE") == "1" {
		check(t, os.WriteFile(path, []byte(page.String()), 0o644))
	}
	if diff := cmp.Diff(page.String(), readFile(t, path)); diff != "" {
		t.Errorf("docs/flags.md is not what the commands say (-want +got):\n%s", diff)
	}
}

// TestDocsControlAPI checks that docs/reference.md has each path of openapi.yaml.
func TestDocsControlAPI(t *testing.T) {
	t.Parallel()
	page := readFile(t, "../docs/reference.md")
	paths := regexp.MustCompile(`(?m)^  (/\S+):$`).FindAllStringSubmatch(readFile(t, "../control/openapi.yaml"), -1)
	if len(paths) < 10 {
		t.Fatalf("found only %d paths in openapi.yaml", len(paths))
	}
	for _, path := range paths {
		if !regexp.MustCompile(regexp.QuoteMeta(path[1]) + "[`?]").MatchString(page) {
			t.Errorf("docs/reference.md does not have %s", path[1])
		}
	}
}

// TestDocsDependencies compares the table in docs/dependencies.md with go.mod.
func TestDocsDependencies(t *testing.T) {
	t.Parallel()
	var want, got []string
	for _, m := range regexp.MustCompile(`(?m)^\t(\S+) v\S+$`).FindAllStringSubmatch(readFile(t, "../go.mod"), -1) {
		want = append(want, m[1])
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z.]+/\\S+)` \\|").FindAllStringSubmatch(readFile(t, "../docs/dependencies.md"), -1) {
		got = append(got, m[1])
	}
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("docs/dependencies.md does not list the direct dependencies of go.mod (-want +got):\n%s", diff)
	}
}

// TestDocsChangelog checks the headings: Unreleased, then versions with dates, latest first. Each tag has an entry.
func TestDocsChangelog(t *testing.T) {
	t.Parallel()
	log := readFile(t, "../CHANGELOG.md")
	headings := regexp.MustCompile(`(?m)^## (.*)$`).FindAllStringSubmatch(log, -1)
	if len(headings) < 2 || headings[0][1] != "[Unreleased]" {
		t.Fatalf("the headings are %q, want [Unreleased] and versions", headings)
	}
	last := ""
	for _, h := range headings[1:] {
		m := regexp.MustCompile(`^\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$`).FindStringSubmatch(h[1])
		if m == nil {
			t.Errorf("the heading %q is not [X.Y.Z] - YYYY-MM-DD", h[1])
		} else if last != "" && m[2] > last {
			t.Errorf("version %s of %s comes after one of %s", m[1], m[2], last)
		} else {
			last = m[2]
		}
	}
	git, err := exec.LookPath("git")
	if err != nil {
		return // and no tags
	}
	tags := run(t, commandOf(git, "--git-dir=../.git", "tag", "--list", "v*"))
	for tag := range strings.FieldsSeq(tags.stdout) {
		if !strings.Contains(log, "\n## ["+strings.TrimPrefix(tag, "v")+"] - ") {
			t.Errorf("CHANGELOG.md has no entry for %s", tag)
		}
	}
}

// TestDocsPromises checks that each promise in CONTRIBUTING.md has a test or a subtest whose name begins with its
// number, in each package that the table names.
func TestDocsPromises(t *testing.T) {
	t.Parallel()
	rows := regexp.MustCompile(`(?m)^\| (G\d+) \|.*\| (.*) \|$`).FindAllStringSubmatch(readFile(t, "../CONTRIBUTING.md"), -1)
	if len(rows) != 16 {
		t.Errorf("found %d promises, want 16", len(rows))
	}
	testNames := regexp.MustCompile(`(?m)^(?:func Test|\s*t\.Run\(")(G\d+)\D`)
	tested := map[string]bool{} // such as "server G1"
	for _, row := range rows {
		dirs := regexp.MustCompile("`([a-z]+)`").FindAllStringSubmatch(row[2], -1)
		if len(dirs) == 0 {
			t.Errorf("no package is named for %s", row[1])
		}
		for _, dir := range dirs {
			if _, known := tested[dir[1]]; !known {
				tested[dir[1]] = true
				files, err := filepath.Glob(filepath.Join("..", dir[1], "*_test.go"))
				check(t, err)
				for _, file := range files {
					for _, name := range testNames.FindAllStringSubmatch(readFile(t, file), -1) {
						tested[dir[1]+" "+name[1]] = true
					}
				}
			}
			if !tested[dir[1]+" "+row[1]] {
				t.Errorf("%s has no test of %s", dir[1], row[1])
			}
		}
	}
}

// TestREADME compiles the README's program in a module of its own, with the 'go mod edit' command that the README
// gives, and runs it.
func TestREADME(t *testing.T) {
	t.Parallel()
	readme := readFile(t, "../README.md")
	if n := strings.Count(readme, "\n"); n > 120 {
		t.Errorf("README.md has %d lines, want at most 120", n)
	}
	block := regexp.MustCompile("(?s)```go\n(.*?)```").FindStringSubmatch(readme)
	edit := regexp.MustCompile(`(?m)^go (mod edit -require .*) && go mod tidy$`).FindStringSubmatch(readme)
	if block == nil || edit == nil {
		t.Fatal("README.md has no Go program, or no 'go mod edit' command")
	}

	dir := t.TempDir()
	root, err := filepath.Abs("..")
	check(t, err)
	goCommand := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(within(t, 10*patience), "go", args...) // with empty caches it takes minutes
		cmd.Dir = dir
		cmd.Env = environment("GOFLAGS=-mod=mod")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %q: %v: %s", args, err, out)
		}
	}
	var program strings.Builder
	program.WriteString("package main\n\nimport (\n")
	for name, path := range map[string]string{
		"bufio": "bufio", "context": "context", "errors": "errors", "fmt": "fmt", "log": "log", "os": "os",
		"signal": "os/signal", "strings": "strings", "syscall": "syscall", "time": "time", "server": modulePath(t) + "/server",
	} {
		if strings.Contains(block[1], name+".") {
			fmt.Fprintf(&program, "\t%q\n", path)
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0") // for a free port
	check(t, err)
	addr := ln.Addr().String()
	check(t, ln.Close())
	fmt.Fprintf(&program, ")\n\nfunc main() {\n%s}\n", strings.ReplaceAll(block[1], "127.0.0.1:7777", addr))
	check(t, os.WriteFile(filepath.Join(dir, "main.go"), []byte(program.String()), 0o600))
	goCommand("mod", "init", "example.org/shout")
	check(t, os.WriteFile(filepath.Join(dir, "go.sum"), []byte(readFile(t, "../go.sum")), 0o600))
	goCommand(strings.Fields(strings.ReplaceAll(edit[1], "=../echod", "="+root))...)
	goCommand("vet", ".")
	goCommand("build", "-o", "shout", ".")

	p := startProgram(t, filepath.Join(dir, "shout"))
	var client *peer
	poll(t, "the program to listen", func() bool {
		var err error
		client, err = connectSoon(addr)
		return err == nil
	})
	defer client.Close()
	check(t, client.send("hello\n"))
	check(t, client.expect("HELLO\n"))
	check(t, p.cmd.Process.Signal(os.Interrupt))
	check(t, client.expect("SHUTDOWN 10 deploy\n"))
	check(t, client.leave())
	p.ends("")
}
