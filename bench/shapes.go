package main

import (
	"time"

	"echod/bench/load"
)

// churn is the name of the shape whose connections are for one message each.
const churn = "churn"

// A shape of load.
type shape struct {
	Name  string // short, for tables and files
	Title string
	Conns int
	Size  int
	Depth int
	Churn bool
}

var shapes = []shape{
	{Name: "64x64B", Title: "64 connections of 64 B", Conns: 64, Size: 64, Depth: 1},
	{Name: "5000x64B", Title: "5,000 connections of 64 B", Conns: 5000, Size: 64, Depth: 1},
	{Name: "64x64KiB", Title: "64 connections of 64 KiB", Conns: 64, Size: 64 << 10, Depth: 1},
	{Name: "8x1MiB", Title: "8 connections of 1 MiB", Conns: 8, Size: 1 << 20, Depth: 1},
	{Name: "pipelined", Title: "64 connections of 64 B, 16 under way on each", Conns: 64, Size: 64, Depth: 16},
	{Name: churn, Title: "64 at a time: connect, one echo of 64 B, close", Conns: 64, Size: 64, Depth: 1, Churn: true},
}

// spec is what the load is told for a run against p that counts for length.
func (s shape) spec(p *process, length time.Duration) load.Spec {
	return load.Spec{
		Address: p.address, PID: p.pid(), Conns: s.Conns, Size: s.Size, Depth: s.Depth, Churn: s.Churn,
		Warmup: length / 4, Duration: length,
	}
}
