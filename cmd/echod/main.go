// Echod is a graceful multi-client TCP echo server, the command that controls it, and a client.
//
// Only this package reads flags, the environment and signals, and only main exits the process.
// Each subcommand has a file of its own.
//
// The goroutines of serve are the actors of its run group, which waits for all of them, and the log's
// writer. The client commands start none besides those of the packages that they use, and one that waits
// for signals (see onInterrupt).
package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func main() {
	if code, done := internalRole(); done {
		os.Exit(code)
	}
	os.Exit(execute(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// execute runs one command line and returns the exit code.
func execute(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRootCommand()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	correctZshCompletion(root)
	cmd, err := root.ExecuteContextC(context.Background())
	if err != nil {
		refuseOffer(err)
	}
	return printError(cmd, nameVariable(cmd, err))
}

// buildCommands are the commands of builds with certain tags; see gendocs.go.
var buildCommands []*cobra.Command

func newRootCommand() *cobra.Command {
	root := newServeCommand("echod")
	root.Short = "A graceful TCP echo server"
	root.Long = `echod sends every TCP client its data back. You can pause and resume it while it
runs (echod ctl). When it stops, it first notifies every client and gives them time
to finish.

Without a command it serves, like 'echod serve'. To try it:

  echod                        start the server; then, in another terminal:
  nc 127.0.0.1 9999            connect a client
  echod ctl status             show the server's state
  echod top                    watch the server
  echod ctl pause -- COMMAND   accept no new clients while COMMAND runs

` + serveHelp
	root.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		err := fmt.Errorf("unknown command %q", args[0])
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			err = fmt.Errorf("%w: did you mean %s?", err, strings.Join(near, " or "))
		}
		return usageError{err}
	}
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.SuggestionsMinimumDistance = 2
	root.CompletionOptions.DefaultShellCompDirective = nil // the other commands would inherit it
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{flagError(err)} })
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return setFromEnvironment(cmd) }
	root.AddCommand(newServeCommand("serve"), newCtlCommand(), newTopCommand())
	root.AddCommand(newSendCommand(), newLoadCommand(), newPingCommand(), newVersionCommand())
	root.AddCommand(buildCommands...)
	completeFlags(root)
	return root
}

// version is set by the linker.
var version = "devel"

func newVersionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  usageArgs(cobra.NoArgs),
		Run: func(cmd *cobra.Command, _ []string) {
			fmt.Fprintf(cmd.OutOrStdout(), "echod %s (%s, %s/%s)\n", version, runtime.Version(), runtime.GOOS,
				runtime.GOARCH)
		},
	}
}

// completeValues sets the values that the shell offers for a flag.
func completeValues(cmd *cobra.Command, flag string, values ...cobra.Completion) {
	complete := cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)
	if err := cmd.RegisterFlagCompletionFunc(flag, complete); err != nil {
		panic(err) // the flag does not exist, or has values already
	}
}

// correctZshCompletion corrects cobra's script for zsh, which mistakes an argument such as log-level=d for a flag.
func correctZshCompletion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	zsh, _, err := root.Find([]string{"completion", "zsh"})
	if err != nil {
		panic(err) // cobra has no such command any more
	}
	zsh.RunE = func(cmd *cobra.Command, _ []string) error {
		generate := root.GenZshCompletion
		if plain, _ := cmd.Flags().GetBool("no-descriptions"); plain {
			generate = root.GenZshCompletionNoDesc
		}
		var script bytes.Buffer
		if err := generate(&script); err != nil {
			return err
		}
		_, err := cmd.OutOrStdout().Write(bytes.ReplaceAll(script.Bytes(), []byte(`=~ '-.*='`), []byte(`=~ '^-.*='`)))
		return err
	}
}

// completeFlags makes the shell offer files for flags that take one, and nothing for other flags whose values are not
// known. The commands have registered the known ones.
func completeFlags(cmd *cobra.Command) {
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if _, registered := cmd.GetFlagCompletionFunc(f.Name); registered {
			return
		}
		switch kind, _ := pflag.UnquoteUsage(f); kind {
		case "file", "path":
			completeFiles(cmd, f.Name)
		default:
			completeValues(cmd, f.Name)
		}
	})
	for _, sub := range cmd.Commands() {
		completeFlags(sub)
	}
}

// completeFiles makes the shell offer files for a flag.
func completeFiles(cmd *cobra.Command, flag string) {
	complete := cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault)
	if err := cmd.RegisterFlagCompletionFunc(flag, complete); err != nil {
		panic(err)
	}
}
