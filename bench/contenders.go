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
	// source is a Go package, a C file, a Python script, or the name of an installed program.
	source string
	// tags are Go's build tags.
	tags string
	// module is the Go module whose version the report shows.
	module string
	// args returns its arguments, from its address and a private directory. If nil, the address is the only argument.
	args func(address, dir string) []string
	// config returns what the file config in the private directory has. backend is the address of the server behind this
	// one: a subject without TLS. Nil: there are neither.
	config func(address, dir, backend string) string
	// tls is whether it serves over TLS.
	tls bool
}

// Names that the report highlights.
const (
	subject = "echod"
	floor   = "floor"
	netCopy = "net, io.Copy"
	net4KiB = "net, 4 KiB"
	tls4KiB = "crypto/tls, 4 KiB"
	tlsCopy = "crypto/tls, io.Copy"
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

// certFiles are the files of the certificate in a contender's private directory.
func certFiles(dir string) (cert, key string) {
	return filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
}

// overTLS returns the arguments of a server: the address, the files of its certificate, and more.
func overTLS(more ...string) func(address, dir string) []string {
	return func(address, dir string) []string {
		cert, key := certFiles(dir)
		return append([]string{address, cert, key}, more...)
	}
}

// tlsContenders are servers that are measured over TLS. gnet, netpoll, evio and tcpserver have none.
var tlsContenders = []contender{
	{
		Name: subject, About: "as above, with `--listen tls://…`",
		source: "../cmd/echod", tls: true,
		args: func(address, dir string) []string {
			cert, key := certFiles(dir)
			return append(contenders[0].args("tls://"+address, dir), "--tls-cert", cert, "--tls-key", key)
		},
	},
	{Name: tls4KiB, About: "package crypto/tls, a goroutine per connection, Read and Write with a buffer of 4 KiB", source: "./peers/nettls", tls: true, args: overTLS("buffer")},
	{Name: tlsCopy, About: "package crypto/tls, a goroutine per connection, io.Copy", source: "./peers/nettls", tls: true, args: overTLS("copy")},
	{Name: "nbio", About: "event loops, and a copy of crypto/tls that does not block", source: "./peers/nbiotls", module: "github.com/lesismal/nbio", tls: true, args: overTLS()},
	{
		Name: "stunnel", About: "a proxy in C on OpenSSL, in front of echod without TLS; CPU time and memory are those of both",
		source: "stunnel", tls: true,
		args: func(_, dir string) []string { return []string{filepath.Join(dir, "config")} },
		config: func(address, dir, backend string) string {
			cert, key := certFiles(dir)
			return fmt.Sprintf("foreground = yes\npid =\ndebug = err\nsyslog = no\ncert = %s\nkey = %s\n"+
				"socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n[echo]\naccept = %s\nconnect = %s\n", cert, key, address, backend)
		},
	},
}

// built is a contender that is ready to run.
type built struct {
	contender
	command []string // without the arguments
	behind  []string // the command of the server behind it; nil: none
	version string
}

// buildAll builds the contenders into dir. It lists those for which this machine has no compiler or interpreter in
// missing.
func buildAll(ctx context.Context, dir string, chosen []contender) (ready []built, missing []string, err error) {
	for _, c := range chosen {
		tool := map[string]string{".c": "cc", ".py": "python3"}[filepath.Ext(c.source)]
		if c.config != nil {
			tool = c.source
		}
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
	binary := filepath.Join(dir, strings.NewReplacer(" ", "", ",", "-", "/", "-").Replace(c.Name))
	if c.tls {
		binary += "-tls"
	}
	b = built{contender: c, command: []string{binary}}
	if c.config != nil {
		behind, err := build(ctx, dir, contenders[0])
		b.command, b.behind = []string{c.source}, behind.command
		return b, err
	}
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
