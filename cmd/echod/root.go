package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newRootCommand() *cobra.Command {
	root := newServeCommand("echod")
	root.Short = "A graceful TCP echo server"
	root.Long = `echod serves every TCP client what it sends. It can be paused and resumed while it
runs (echod ctl), and when it is told to stop it tells every client, gives them
time, and only then closes.

Without a command it serves, as 'echod serve' does. Try it:

  echod                        the server; another terminal, then:
  nc 127.0.0.1 9999            a client
  echod ctl status             what it is doing
  echod top                    the same, as it changes
  echod ctl pause -- COMMAND   admit nobody while COMMAND runs

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
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		text, _, _ := strings.Cut(err.Error(), ": strconv.") // which has said enough
		return usageError{errors.New(text)}
	})
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return fromEnvironment(cmd) }
	root.AddCommand(newServeCommand("serve"), newCtlCommand(), newTopCommand())
	root.AddCommand(newSendCommand(), newLoadCommand(), newPingCommand(), newVersionCommand())
	root.AddCommand(generators()...)
	return root
}

// variable names the environment variable that stands in for a flag: ECHOD_FLAG for the server's, and
// ECHOD_CTL_FLAG, ECHOD_SEND_FLAG and so on for those of the commands that often share its environment.
func variable(cmd *cobra.Command, flag string) string {
	path := strings.Fields(cmd.CommandPath())
	name := "echod-"
	if len(path) > 1 && path[1] != "serve" {
		name += path[1] + "-"
	}
	return strings.ToUpper(strings.ReplaceAll(name+flag, "-", "_"))
}

// fromEnvironment sets each flag that was not given from its variable, if that is set and not empty.
// A flag that may be repeated takes a list with commas.
func fromEnvironment(cmd *cobra.Command) error {
	var err error
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		name := variable(cmd, f.Name)
		value := os.Getenv(name)
		if err != nil || f.Changed || value == "" || f.Name == "help" {
			return
		}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			err = list.Replace(strings.Split(value, ","))
			f.Changed = true // pflag does so for the others only
		} else if cmd.Flags().Set(f.Name, value) != nil {
			err = fmt.Errorf("not what --%s takes", f.Name)
		}
		if err != nil {
			err = usagef("environment variable %s=%q: %w", name, value, err)
		}
	})
	return err
}
