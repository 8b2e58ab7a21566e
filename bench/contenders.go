package main

import "path/filepath"

// A contender is a server that takes part.
type contender struct {
	Name  string
	About string
	// source is what it is built from: a Go package, a C file, or a Python script, which is run as it is.
	source string
	// tags are Go's build tags.
	tags string
	// module is the Go module whose version the report names.
	module string
	// args are its arguments, given its address and a directory of its own; the address alone when nil.
	args func(address, dir string) []string
}

// The names that the report singles out.
const (
	subject = "echod"
	floor   = "floor"
	netCopy = "net, io.Copy"
	net4KiB = "net, 4 KiB"
)

// rivals are those that the goals for CPU time are set against.
var rivals = []string{"gnet", "netpoll", "nbio", netCopy}

// controlSocket is where the subject's control plane listens, in its own directory.
func controlSocket(dir string) string { return filepath.Join(dir, "control.sock") }

var contenders = []contender{
	{
		Name: subject, About: "this project's server with everything on: control socket, connection table, counters, limits, idle and stall timeouts, notices, log",
		source: "../cmd/echod",
		args: func(address, dir string) []string {
			return []string{
				"serve", "--listen", address, "--control", controlSocket(dir), "--grace", grace.String(),
				"--idle-timeout", "1h", "--max-conns-per-ip", "20000", "--log-format", "json",
			}
		},
	},
	{Name: floor, About: "a raw epoll loop in C with one thread: what the kernel costs, and next to nothing else", source: "peers/floor/floor.c"},
	{Name: "gnet", About: "event loops", source: "./peers/gnet", tags: "poll_opt", module: "github.com/panjf2000/gnet/v2"},
	{Name: "netpoll", About: "event loops, which hand requests to goroutines", source: "./peers/netpoll", module: "github.com/cloudwego/netpoll"},
	{Name: "nbio", About: "event loops", source: "./peers/nbio", module: "github.com/lesismal/nbio"},
	{Name: "evio", About: "event loops; it cannot turn Nagle's algorithm off, which holds it up in bulk", source: "./peers/evio", module: "github.com/tidwall/evio"},
	{Name: "tcpserver", About: "a goroutine per connection, from a pool", source: "./peers/tcpserver", module: "github.com/maurice2k/tcpserver"},
	{Name: net4KiB, About: "package net, a goroutine per connection, Read and Write with a buffer of 4 KiB", source: "./peers/net4k"},
	{Name: netCopy, About: "package net, a goroutine per connection, io.Copy, which splices", source: "./peers/netcopy"},
	{
		Name: "fortio", About: "the tcp-echo of a load testing tool", source: "fortio.org/fortio", module: "fortio.org/fortio",
		args: func(address, _ string) []string {
			return []string{"tcp-echo", "-quiet", "-tcp-port", address}
		},
	},
	{Name: "python", About: "ThreadingTCPServer of Python's standard library", source: "peers/python/server.py"},
}
