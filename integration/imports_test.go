//go:build unix

package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// TestImports pins the layout: imports run from cmd to internal, control, metrics and client, and from control and
// metrics to server. control also imports internal/text, which imports nothing of ours. A program that embeds server
// gets four small modules besides the standard library.
func TestImports(t *testing.T) {
	t.Parallel()
	module := modulePath(t)
	layers := []struct {
		name    string
		pattern string
		ours    []string // packages of this module that it may import, below the module's path
		modules []string // exactly the other modules that it imports; nil: any
	}{
		{"server", "../server/...", []string{"server"}, []string{"go.uber.org/multierr", "go.uber.org/zap", "golang.org/x/sys", "golang.org/x/time"}},
		{"client", "../client", []string{"client"}, []string{"golang.org/x/sync"}},
		{"load", "../internal/load", []string{"client", "internal/load"}, nil},
		{"records", "../internal/records", []string{"internal/records"}, []string{"github.com/klauspost/compress", "github.com/ulikunitz/xz", "golang.org/x/text"}},
		{"control", "../control/...", []string{"control", "internal/text", "server"}, nil},
		{"text", "../internal/text", []string{"internal/text"}, []string{"github.com/dustin/go-humanize"}},
		{"metrics", "../metrics/...", []string{"metrics", "server"}, nil},
		{"cmd", "../cmd/...", []string{"client", "cmd", "control", "internal", "metrics", "server"}, nil},
	}
	for _, layer := range layers {
		t.Run(layer.name, func(t *testing.T) {
			ours, modules := dependencies(t, module, layer.pattern)
			for _, pkg := range ours {
				if !slices.ContainsFunc(layer.ours, func(root string) bool { return isWithin(pkg, module+"/"+root) }) {
					t.Errorf("%s imports %s", layer.name, pkg)
				}
			}
			if layer.modules != nil && !slices.Equal(modules, layer.modules) {
				t.Errorf("%s imports the modules %q, want %q", layer.name, modules, layer.modules)
			}
		})
	}
}

// TestOnlyCmdReadsFlagsEnvironmentAndSignals reads the source files of all platforms, not only those built on this one.
func TestOnlyCmdReadsFlagsEnvironmentAndSignals(t *testing.T) {
	t.Parallel()
	elsewhere := []string{"../bench", "../cmd/echod", "../examples", "../integration", "../testing", "../tools"}
	scanned := 0
	err := filepath.WalkDir("..", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() {
			hidden := strings.HasPrefix(entry.Name(), ".") && name != ".."
			if hidden || entry.Name() == "testdata" || slices.Contains(elsewhere, filepath.ToSlash(name)) {
				return fs.SkipDir
			}
			return nil
		}
		if strings.HasSuffix(name, ".go") && !strings.HasSuffix(name, "_test.go") {
			scanned++
			checkProcessUse(t, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if scanned == 0 {
		t.Error("no source file found")
	}
}

// checkProcessUse reports each use of the process's arguments, environment, signals or exit in a source file.
func checkProcessUse(t *testing.T, name string) {
	t.Helper()
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, name, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	osName := ""
	for _, spec := range file.Imports {
		switch imported, _ := strconv.Unquote(spec.Path.Value); imported {
		case "flag", "os/signal":
			t.Errorf("%s: import of %s", fset.Position(spec.Pos()), imported)
		case "os":
			osName = "os"
			if spec.Name != nil {
				osName = spec.Name.Name
			}
		}
	}
	ast.Inspect(file, func(node ast.Node) bool {
		selector, ok := node.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		if pkg, ok := selector.X.(*ast.Ident); ok && pkg.Name == osName {
			switch selector.Sel.Name {
			case "Args", "Environ", "Exit", "ExpandEnv", "Getenv", "LookupEnv":
				t.Errorf("%s: use of os.%s", fset.Position(selector.Pos()), selector.Sel.Name)
			}
		}
		return true
	})
}

// modulePath is the path of this module, also after 'make module'.
func modulePath(t *testing.T) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m").Output()
	check(t, err)
	return strings.TrimSpace(string(out))
}

// dependencies lists what the packages that match pattern import, directly or not: packages of this module, and the
// other modules.
func dependencies(t *testing.T, module, pattern string) (ours, modules []string) {
	t.Helper()
	list := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath,Standard,DepOnly,Module", pattern)
	out, err := list.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		t.Fatalf("%v: %v\n%s", list, err, exit.Stderr)
	} else if err != nil {
		t.Fatal(err)
	}
	matched := false
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var pkg struct {
			ImportPath        string
			Standard, DepOnly bool
			Module            struct{ Path string }
		}
		if err := dec.Decode(&pkg); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		matched = matched || !pkg.DepOnly
		switch {
		case pkg.Standard:
		case isWithin(pkg.ImportPath, module):
			ours = append(ours, pkg.ImportPath)
		case !slices.Contains(modules, pkg.Module.Path):
			modules = append(modules, pkg.Module.Path)
		}
	}
	if !matched {
		t.Fatalf("%s matches no package", pattern)
	}
	slices.Sort(modules)
	return ours, modules
}

// isWithin reports whether the import path pkg is root or below it.
func isWithin(pkg, root string) bool {
	return pkg == root || strings.HasPrefix(pkg, root+"/")
}

// TestModuleRename renames the module in a copy of the tree with 'make module', as somebody does who publishes it under
// another path. Everything must build.
func TestModuleRename(t *testing.T) {
	t.Parallel()
	slow(t)
	makeCommand := gnuMake.find(t)[0]
	const path = "example.org/you/echod"
	dir := t.TempDir()
	copyTree(t, dir)
	inCopy := func(argv ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
		cmd.Dir, cmd.WaitDelay = dir, patience
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", argv, err, out)
		}
	}
	inCopy(makeCommand, "module", "MODULE="+path)
	if got := readFile(t, filepath.Join(dir, "go.mod")); !strings.HasPrefix(got, "module "+path+"\n") {
		t.Errorf("go.mod begins with %.60q", got)
	}
	if got := readFile(t, filepath.Join(dir, "README.md")); !strings.Contains(got, "go doc "+path+"/server") {
		t.Error("README.md has the old path")
	}
	inCopy("go", "vet", "./...")
	inCopy("go", "test", "-run", "^TestImports$", "./integration")
	for _, module := range []string{"bench", "examples", "testing"} {
		if _, err := os.Stat(filepath.Join(dir, module, "go.mod")); err == nil {
			inCopy("go", "-C", module, "vet", "./...")
		}
	}
}

// copyTree copies the sources of this repository to dir.
func copyTree(t *testing.T, dir string) {
	t.Helper()
	generated := []string{"../bin", "../dist", "../coverage", "../bench/out"}
	check(t, filepath.WalkDir("..", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		target := filepath.Join(dir, strings.TrimPrefix(name, ".."))
		switch {
		case entry.Name() == ".git", slices.Contains(generated, filepath.ToSlash(name)):
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		case entry.IsDir():
			return os.MkdirAll(target, 0o755)
		case !entry.Type().IsRegular():
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		return os.WriteFile(target, data, info.Mode())
	}))
}
