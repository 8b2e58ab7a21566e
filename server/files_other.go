//go:build !unix

package server

func openFilesLimit() (int, bool) { return 0, false }
