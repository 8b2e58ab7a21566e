//go:build !unix

package main

// The directories for control sockets are the user's own on this platform.

func checkOwn(string) error           { return nil }
func checkOwnAndParents(string) error { return nil }
func checkParents(string) error       { return nil }

// There are no jobs to stop on this platform.
func ignoreBackgroundWrite() {}
