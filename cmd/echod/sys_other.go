//go:build !unix

package main

// On this platform the directories for control sockets belong to the user.

func checkOwnDirectory(string) error           { return nil }
func checkOwnDirectoryAndParents(string) error { return nil }
func checkParents(string) error                { return nil }

// This platform has no job control.
func ignoreBackgroundWrite() {}
