package integration

// memoryInKiB says that the kernel tells a process's memory in KiB, which it does on Linux.
const memoryInKiB = true
