package main

import (
	"context"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"echod/control"
	"echod/server"
)

// fixedSettings returns the server's flags that cannot change while it runs. Listeners that systemd passes replace the
// default of --listen.
func fixedSettings(flags *pflag.FlagSet, listeners []server.Listener) (fixed []control.Setting) {
	var passed []string
	for _, ln := range listeners {
		if ln.Inherited {
			passed = append(passed, ln.Addr().String()+" (systemd)")
		}
	}
	changeable := server.SettingNames()
	flags.VisitAll(func(f *pflag.Flag) {
		if !hasVariable(f) || slices.Contains(changeable, f.Name) {
			return
		}
		value := f.Value.String()
		if list, ok := f.Value.(pflag.SliceValue); ok {
			value = strings.Join(list.GetSlice(), ",")
		}
		if f.Name == "listen" && len(passed) > 0 {
			if f.Changed {
				passed = append([]string{value}, passed...)
			}
			value = strings.Join(passed, ",")
		}
		fixed = append(fixed, control.Setting{Name: f.Name, Value: value})
	})
	return fixed
}

func (ctl *ctl) settingsCommand() *cobra.Command {
	var wide bool
	cmd := &cobra.Command{
		Use:   "settings",
		Short: "Show the server's settings, and which were changed since it started",
		Args:  usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				list, err := c.Settings(ctx)
				if err != nil {
					return err
				}
				t := newTable("SETTING\tVALUE~\tAT START~\tCHANGES")
				for _, s := range list.Settings {
					atStart, changes := "", "with ctl set"
					if s.Value != s.AtStart {
						atStart = valueOrNone(s.AtStart)
					}
					if !s.Changeable {
						changes = "on restart"
					}
					t.row(s.Name, valueOrNone(s.Value), atStart, changes)
				}
				return t.print(out, wide)
			})
		},
	}
	addWideFlag(cmd, &wide)
	return cmd
}

// valueOrNone returns value, or a word for an empty one.
func valueOrNone(value string) string {
	if value == "" {
		return "-"
	}
	return value
}

func (ctl *ctl) setCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "set SETTING=VALUE...",
		Short: "Change settings while the server runs: all of them, or none",
		Long: `Change settings while the server runs: all of them, or none.

The settings and their values are those of the server's flags; 'echod ctl settings' lists
them. SETTING+=RANGE and SETTING-=RANGE add a range to a list and remove it. The changes
take effect at once and last until the server restarts; an upgrade keeps them.`,
		Example: `  echod ctl set max-conns=500 idle-timeout=1m log-level=debug
  echod ctl set deny+=203.0.113.0/24`,
		Args:              usageArgs(cobra.MinimumNArgs(1)),
		ValidArgsFunction: completeSettings,
		RunE: func(cmd *cobra.Command, args []string) error {
			values, err := parseAssignments(args)
			if err != nil {
				return err
			}
			return ctl.withClient(cmd, func(ctx context.Context, c *control.Client, out io.Writer) error {
				changed, err := c.ChangeSettings(ctx, values)
				if err != nil {
					return err
				}
				if !changed.Changed {
					return printLine(out, "nothing changed: these values are in force already")
				}
				for _, c := range changed.Changes {
					if err := printLine(out, "%s: %s -> %s", c.Name, valueOrNone(c.Old), valueOrNone(c.New)); err != nil {
						return err
					}
				}
				return printLine(out, "in force until the server restarts; an upgrade keeps it")
			})
		},
	}
}

// parseAssignments parses arguments such as max-conns=500 and deny+=192.0.2.1.
func parseAssignments(args []string) (map[string]any, error) {
	values := map[string]any{}
	for _, arg := range args {
		name, value, ok := strings.Cut(arg, "=")
		if !ok || name == "" {
			return nil, usagef("%q: want SETTING=VALUE, such as max-conns=500", arg)
		}
		operator := name[len(name)-1]
		name = strings.ReplaceAll(strings.TrimRight(name, "+-"), "_", "-")
		before, given := values[name]
		edit, isEdit := before.(control.ListEdit)
		switch {
		case given && (!isEdit || operator != '+' && operator != '-'):
			return nil, usagef("%s is given twice", name)
		case operator == '+':
			edit.Add = append(edit.Add, strings.Split(value, ",")...)
			values[name] = edit
		case operator == '-':
			edit.Remove = append(edit.Remove, strings.Split(value, ",")...)
			values[name] = edit
		default:
			values[name] = value
		}
	}
	return values, nil
}

// settingValues are the values that the shell offers for a setting.
var settingValues = map[string][]string{
	"at-limit": {"wait", "reject"}, "log-level": {"debug", "info", "warn", "error"},
}

// completeSettings completes SETTING= and, where the values are known, VALUE.
func completeSettings(_ *cobra.Command, args []string, begun string,
) (offers []cobra.Completion, _ cobra.ShellCompDirective) {
	name, _, hasValue := strings.Cut(begun, "=")
	if hasValue {
		for _, value := range settingValues[name] {
			offers = append(offers, name+"="+value)
		}
		return offers, cobra.ShellCompDirectiveNoFileComp
	}
	for _, name := range server.SettingNames() {
		if !slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, name+"=") }) {
			offers = append(offers, name+"=")
		}
	}
	return offers, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
}
