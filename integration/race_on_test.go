//go:build unix && race

package integration

const raceEnabled = true
