package main

import (
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// A machine is what the benchmark ran on.
type machine struct {
	CPU    string
	CPUs   int
	Memory uint64 // bytes
	Kernel string
	Go     string
}

func thisMachine() (m machine, err error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return m, fmt.Errorf("asking for the kernel's version: %w", err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return m, fmt.Errorf("asking for the size of the memory: %w", err)
	}
	cpu := "unknown"
	text, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return m, err
	}
	for line := range strings.Lines(string(text)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			cpu = strings.TrimSpace(value)
			break
		}
	}
	return machine{
		CPU: cpu, CPUs: runtime.NumCPU(), Memory: info.Totalram * uint64(info.Unit),
		Kernel: unix.ByteSliceToString(name.Sysname[:]) + " " + unix.ByteSliceToString(name.Release[:]), Go: runtime.Version(),
	}, nil
}
