//go:build !unix

package main

// The directories for control sockets are the user's own on this platform.

func checkOwnDirectory(string) error           { return nil }
func checkOwnDirectoryAndParents(string) error { return nil }
func checkParents(string) error                { return nil }

// There are no jobs to stop on this platform.
func ignoreBackgroundWrite() {}
