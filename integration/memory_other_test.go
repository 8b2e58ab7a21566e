//go:build unix && !linux

package integration

const memoryInKiB = false
