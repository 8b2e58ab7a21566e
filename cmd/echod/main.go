// Echod is a graceful multi-client TCP echo server, the command that controls it, and a client.
//
// This is the only place that reads flags, the environment and signals, and that exits the process.
// Its goroutines are the actors of the run group in serve.go, which waits for all of them, and in the
// client commands those that the packages they use start and await.
package main

import (
	"context"
	"io"
	"os"
)

func main() {
	os.Exit(execute(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// execute carries out one command line, and returns the exit code.
func execute(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(context.Background())
	return report(cmd, err)
}
