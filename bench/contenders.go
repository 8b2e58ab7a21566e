package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// A contender is a server that is measured.
type contender struct {
	Name  string
	About string
	// source is a Go package, a C file, or a Python script.
	source string
	// tags are Go's build tags.
	tags string
	// module is the Go module whose version the report shows.
	module string
	// args returns its arguments, from its address and a private directory. If nil, the address is the only argument.
	args func(address, dir string) []string
}

// Names that the report highlights.
const (
	subject = "echod"
	floor   = "floor"
	netCopy = "net, io.Copy"
	net4KiB = "net, 4 KiB"
)

// rivals are the servers that the goals for CPU time refer to.
var rivals = []string{"gnet", "netpoll", "nbio", netCopy}

// controlSocket is the path of the subject's control socket.
func controlSocket(dir string) string { return filepath.Join(dir, "control.sock") }

var contenders = []contender{
	{
		Name: subject,
		About: "this project's server with everything on: control socket, connection table, counters, limits, " +
			"idle and stall timeouts, notices, log",
		source: "../cmd/echod",
		args: func(address, dir string) []string {
			return []string{
				"serve", "--listen", address, "--control", controlSocket(dir), "--grace", grace.String(),
				"--idle-timeout", "1h", "--max-conns-per-ip", "20000", "--log-format", "json",
			}
		},
	},
	{
		Name: floor, About: "an epoll loop in C with one thread: the cost of the kernel, and little else",
		source: "peers/floor/floor.c",
	},
	{
		Name: "gnet", About: "event loops", source: "./peers/gnet", tags: "poll_opt",
		module: "github.com/panjf2000/gnet/v2",
	},
	{
		Name: "netpoll", About: "event loops that pass requests to goroutines", source: "./peers/netpoll",
		module: "github.com/cloudwego/netpoll",
	},
	{Name: "nbio", About: "event loops", source: "./peers/nbio", module: "github.com/lesismal/nbio"},
	{
		Name: "evio", About: "event loops; it cannot disable Nagle's algorithm, which delays it in bulk",
		source: "./peers/evio", module: "github.com/tidwall/evio",
	},
	{
		Name: "tcpserver", About: "a goroutine per connection, from a pool", source: "./peers/tcpserver",
		module: "github.com/maurice2k/tcpserver",
	},
	{
		Name: net4KiB, About: "package net, a goroutine per connection, Read and Write with a buffer of 4 KiB",
		source: "./peers/net4k",
	},
	{
		Name: netCopy, About: "package net, a goroutine per connection, io.Copy, which uses splice",
		source: "./peers/netcopy",
	},
	{
		Name: "fortio", About: "the tcp-echo of a load testing tool", source: "fortio.org/fortio",
		module: "fortio.org/fortio",
		args: func(address, _ string) []string {
			return []string{"tcp-echo", "-quiet", "-tcp-port", address}
		},
	},
	{Name: "python", About: "ThreadingTCPServer of Python's standard library", source: "peers/python/server.py"},
}

// built is a contender that is ready to run.
type built struct {
	contender
	command []string // without the arguments
	version string
}

// buildAll builds the contenders into dir. It lists those for which this machine has no compiler or interpreter in
// missing.
func buildAll(ctx context.Context, dir string, chosen []contender) (ready []built, missing []string, err error) {
	for _, c := range chosen {
		tool := map[string]string{".c": "cc", ".py": "python3"}[filepath.Ext(c.source)]
		if tool != "" {
			if _, err := exec.LookPath(tool); err != nil {
				missing = append(missing, c.Name+" ("+tool+" is not installed)")
				continue
			}
		}
		b, err := build(ctx, dir, c)
		if err != nil {
			return nil, nil, fmt.Errorf("building %s: %w", c.Name, err)
		}
		ready = append(ready, b)
	}
	return ready, missing, nil
}

func build(ctx context.Context, dir string, c contender) (b built, err error) {
	binary := filepath.Join(dir, strings.NewReplacer(" ", "", ",", "-").Replace(c.Name))
	b = built{contender: c, command: []string{binary}}
	switch filepath.Ext(c.source) {
	case ".c":
		if err := run(ctx, "", "cc", "-O2", "-o", binary, c.source); err != nil {
			return b, err
		}
		b.version, err = firstLine(ctx, "cc", "--version")
	case ".py":
		b.command = []string{"python3", c.source}
		b.version, err = firstLine(ctx, "python3", "--version")
	default:
		where, source := "", c.source
		if rest, ok := strings.CutPrefix(source, "../"); ok { // a package of the module above
			where, source = "..", "./"+rest
			if binary, err = filepath.Abs(binary); err != nil {
				return b, err
			}
		}
		if err := run(ctx, where, "go", "build", "-trimpath", "-buildvcs=false", "-tags", c.tags, "-o", binary,
			source); err != nil {
			return b, err
		}
		switch {
		case c.Name == subject:
			b.version, err = firstLine(ctx, "git", "describe", "--always", "--dirty")
		case c.module != "":
			b.version, err = firstLine(ctx, "go", "list", "-m", "-f", "{{.Version}}", c.module)
		}
	}
	return b, err
}

// run runs a command in a directory. An error includes its output.
func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(slices.Concat([]string{name}, args), " "), err, out)
	}
	return nil
}

// firstLine returns the first line that a command prints.
func firstLine(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w", name, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return line, nil
}
