//go:build !linux

package main

import "io/fs"

// deviceAndInode: there is no journal here.
func deviceAndInode(fs.FileInfo) string { return "unknown" }
