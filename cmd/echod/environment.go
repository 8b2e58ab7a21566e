package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Environment variables that set flags.

// envName returns the name of the environment variable for a flag: ECHOD_FLAG for the server's flags, and
// ECHOD_CTL_FLAG, ECHOD_SEND_FLAG and so on for those of the other commands. The other commands have their own variables,
// because they often run in the server's environment.
func envName(cmd *cobra.Command, flag string) string {
	path := strings.Fields(cmd.CommandPath())
	name := "echod-"
	if len(path) > 1 && path[1] != "serve" {
		name += path[1] + "-"
	}
	return strings.ToUpper(strings.ReplaceAll(name+flag, "-", "_"))
}

// fromVariable marks a flag that was set from its environment variable.
const fromVariable = "echod_variable"

// setFromEnvironment sets each flag that was not given from its environment variable, if that is not
// empty. For a flag that may be repeated the variable holds a comma-separated list.
func setFromEnvironment(cmd *cobra.Command) error {
	environ, err := envOf(cmd)
	if err != nil {
		return err
	}
	values := map[string]string{}
	for _, line := range environ {
		name, value, _ := strings.Cut(line, "=")
		values[name] = value
	}
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		name := envName(cmd, f.Name)
		value := values[name]
		if err != nil || f.Changed || value == "" || !hasVariable(f) {
			return
		}
		f.Annotations = map[string][]string{fromVariable: {name}}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			err = list.Replace(strings.Split(value, ","))
			f.Changed = true // Replace does not set it
		} else {
			err = cmd.Flags().Set(f.Name, value)
		}
		if err != nil {
			err = usageError{fmt.Errorf("environment variable %s: %w", name, flagError(err))}
		}
	})
	return err
}

// envOf returns the variables that a command uses, in the form of os.Environ: those in the file of --env-file
// replace the process's own.
func envOf(cmd *cobra.Command) ([]string, error) {
	file := cmd.Flags().Lookup("env-file")
	if file == nil || file.Value.String() == "" {
		return os.Environ(), nil
	}
	return readVariables(file.Value.String())
}

// hasVariable reports whether an environment variable can set a flag. --check and --env-file have none, because a server
// with --check in its environment would never start.
func hasVariable(f *pflag.Flag) bool {
	return f.Name != "help" && f.Name != "check" && f.Name != "env-file"
}

// flagError returns an error of pflag without the part from strconv, which repeats the value.
func flagError(err error) error {
	text, _, _ := strings.Cut(err.Error(), ": strconv.")
	return errors.New(text)
}

// nameVariable adds the name of the environment variable to a usage error that begins with a flag, if the flag's
// value comes from there.
func nameVariable(cmd *cobra.Command, err error) error {
	if _, ok := errors.AsType[usageError](err); !ok || cmd == nil {
		return err
	}
	name, isFlag := strings.CutPrefix(err.Error(), "--")
	if end := strings.IndexAny(name, " :"); end >= 0 {
		name = name[:end]
	}
	if f := cmd.Flags().Lookup(name); isFlag && f != nil && f.Annotations[fromVariable] != nil {
		return usageError{fmt.Errorf("environment variable %s: %w", f.Annotations[fromVariable][0], err)}
	}
	return err
}

// An unknownVariable is an environment variable that belongs to no flag.
type unknownVariable struct {
	name    string
	nearest string // the known variable whose name is most like it
}

// unknownVariables returns the variables that begin with ECHOD_ and belong to no command. They are not errors, because
// after a downgrade the variables of the newer version may still be set.
func unknownVariables(root *cobra.Command, environ []string) (unknown []unknownVariable) {
	known := variables(root, nil)
	for _, line := range environ {
		name, _, _ := strings.Cut(line, "=")
		if strings.HasPrefix(name, "ECHOD_") && !slices.Contains(known, name) && !isReservedName(name) {
			unknown = append(unknown, unknownVariable{name, nearestName(name, known)})
		}
	}
	slices.SortFunc(unknown, func(a, b unknownVariable) int { return strings.Compare(a.name, b.name) })
	return unknown
}

// variables returns the variables of a command and of those below it.
func variables(cmd *cobra.Command, names []string) []string {
	cmd.InitDefaultHelpFlag()
	cmd.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if hasVariable(f) {
			names = append(names, envName(cmd, f.Name))
		}
	})
	for _, sub := range cmd.Commands() {
		names = variables(sub, names)
	}
	return names
}

// isReservedName reports whether a variable that begins with ECHOD_ is not a setting: an upgrade has set it, or
// Kubernetes for a service named echod.
func isReservedName(name string) bool {
	for _, prefix := range []string{"ECHOD_INTERNAL_", "ECHOD_SERVICE_", "ECHOD_PORT_"} {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return name == "ECHOD_PORT"
}

// nearestName returns the known name that differs from name in the fewest letters.
func nearestName(name string, known []string) string {
	names := &cobra.Command{}
	for _, k := range known {
		names.AddCommand(&cobra.Command{Use: k, Run: func(*cobra.Command, []string) {}})
	}
	for distance := 1; distance < len(name); distance++ {
		names.SuggestionsMinimumDistance = distance
		if near := names.SuggestionsFor(name); len(near) > 0 {
			return near[0]
		}
	}
	return ""
}

// readVariables reads a file of environment variables as systemd's EnvironmentFile= does: a variable in each line,
// quotes around a value, comments after # and ;, and a backslash that joins two lines.
func readVariables(path string) (environ []string, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("--env-file: %w", err)
	}
	for line := range strings.Lines(strings.ReplaceAll(string(text), "\\\n", "")) {
		line = strings.TrimSpace(line)
		if line == "" || strings.ContainsRune("#;", rune(line[0])) {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("--env-file %s: %q: want NAME=VALUE", path, line)
		}
		environ = append(environ, strings.TrimSpace(name)+"="+unquote(strings.TrimSpace(value)))
	}
	return environ, nil
}

// unquote removes quotes and backslashes from a value. Single quotes keep everything. Within double quotes a
// backslash escapes only a few characters.
func unquote(value string) string {
	var out strings.Builder
	quote := byte(0)
	for i := 0; i < len(value); i++ {
		switch c := value[i]; {
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		case quote != 0 && c == quote:
			quote = 0
		case c == '\\' && quote != '\'' && i+1 < len(value):
			if i++; quote == '"' && !strings.ContainsRune("\"\\`$", rune(value[i])) {
				out.WriteByte('\\')
			}
			out.WriteByte(value[i])
		default:
			out.WriteByte(c)
		}
	}
	return out.String()
}
