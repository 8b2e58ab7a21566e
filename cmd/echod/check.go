package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"echod/control"
	"echod/server"
)

// check returns the error with which a server would fail to start with these flags. It accepts no client and leaves no
// file behind. It ignores addresses and sockets that are in use, usually by the running server.
func (f serveFlags) check(ctx context.Context, log *zap.Logger) error {
	if _, err := parseLevel(f.logLevel); err != nil {
		return err
	}
	_, sink, err := newLogger(zap.WarnLevel, f.logFormat, nil)
	if err != nil {
		return err
	}
	sink.close()
	p, err := f.prepare(nil, log)
	if err != nil {
		return err
	}
	if _, err := server.New(server.Echo, p.server); err != nil {
		return err
	}
	f.logLimitations(log)
	if err := f.checkUnopened(); err != nil {
		return err
	}
	if f.control != "" && f.control != "off" {
		if err := control.Check(f.control, p.control); err != nil {
			return err
		}
	}
	if f.http != "" {
		full, _, err := httpAddress(f.http)
		if err != nil {
			return err
		}
		if err := checkAddress(ctx, full); err != nil {
			return fmt.Errorf("--http %s: %w", f.http, withoutAddress(err))
		}
	}
	if f.agentCheck != "" {
		full, err := agentAddress(f.agentCheck)
		if err != nil {
			return err
		}
		if err := checkAddress(ctx, full); err != nil {
			return fmt.Errorf("--agent-check %s: %w", f.agentCheck, withoutAddress(err))
		}
	}
	for _, address := range f.listen {
		a, err := parseEchoAddress(address)
		switch {
		case err != nil:
			return err
		case a.path != "":
			if err := control.Check(a.path, p.echo.unix); err != nil {
				return fmt.Errorf("--listen: %w", err)
			}
		default:
			if err := checkAddress(ctx, a.hostPort); err != nil {
				return fmt.Errorf("--listen %s: %w", address, withoutAddress(err))
			}
		}
	}
	return nil
}

// checkAddress checks that this machine has the address and that the process may use the port. It binds a UDP socket,
// because a TCP listener could accept a client.
func checkAddress(ctx context.Context, hostPort string) error {
	if _, err := net.ResolveTCPAddr("tcp", hostPort); err != nil {
		return err
	}
	pc, err := new(net.ListenConfig).ListenPacket(ctx, "udp", hostPort)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil
	}
	if err == nil {
		_ = pc.Close()
	}
	return err
}

// checkCommand runs serve --check.
func checkCommand(cmd *cobra.Command, f serveFlags) error {
	log, sink, err := newLogger(zap.WarnLevel, "console", nil)
	if err != nil {
		return err
	}
	defer sink.close()
	if err := warnUnknownVariables(log, cmd); err != nil {
		return err
	}
	if err := f.check(cmd.Context(), log); err != nil {
		return err
	}
	return describeSources(cmd.OutOrStdout(), cmd)
}

// describeSources says that the configuration is valid and where it comes from, because a shell usually does not have the
// environment of the service.
func describeSources(out io.Writer, cmd *cobra.Command) error {
	var flags, names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		switch from := f.Annotations[fromVariable]; {
		case from != nil:
			names = append(names, from[0])
		case f.Changed && hasVariable(f):
			flags = append(flags, "--"+f.Name)
		}
	})
	text := "the configuration is valid"
	switch set := append(flags, names...); {
	case len(set) == 0:
		text += ": nothing is set, all values are the defaults"
	default:
		text += ": " + strings.Join(set, ", ")
	}
	_, err := fmt.Fprintln(out, text)
	return err
}

// warnUnknownVariables logs the variables that belong to no command.
func warnUnknownVariables(log *zap.Logger, cmd *cobra.Command) error {
	environ, err := envOf(cmd)
	if err != nil {
		return err
	}
	for _, v := range unknownVariables(cmd.Root(), environ) {
		log.Warn("unknown environment variable ignored", zap.String("variable", v.name), zap.String("nearest", v.nearest))
	}
	return nil
}
