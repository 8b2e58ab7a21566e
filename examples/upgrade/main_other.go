//go:build !linux

// Command upgrade needs Linux.
package main

func main() {}
