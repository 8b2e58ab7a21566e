package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"echod/control"
	"echod/internal/text"
	"echod/server"
)

// tlsFlags holds the TLS flags of serve.
type tlsFlags struct {
	certs, keys []string
	clientCA    string
	clientAuth  string
	minVersion  string
}

func (f *tlsFlags) add(flags *pflag.FlagSet) {
	flags.StringArrayVar(&f.certs, "tls-cert", nil,
		"PEM `file` with a certificate for tls:// addresses, followed by\n"+
			"its issuers'; may be repeated, and clients get the one for the\n"+
			"name that they ask for (default: tls.crt among the credentials\n"+
			"that systemd passes)")
	flags.StringArrayVar(&f.keys, "tls-key", nil,
		"PEM `file` with the key of the --tls-cert in the same position\n(default: tls.key among the same credentials)")
	flags.StringVar(&f.clientCA, "tls-client-ca", "",
		"PEM `file` with the authorities that sign the certificates of\nclients")
	flags.StringVar(&f.clientAuth, "tls-client-auth", "",
		"`rule` for certificates of clients: require or optional\n"+
			"(default: require with --tls-client-ca, else none is requested)")
	flags.StringVar(&f.minVersion, "tls-min-version", "1.2", "lowest `version` of TLS: 1.2 or 1.3")
}

// Names of the credentials that systemd passes (LoadCredential=).
const (
	credentialCert = "tls.crt"
	credentialKey  = "tls.key"
)

// tlsScheme marks addresses that are served over TLS.
const tlsScheme = "tls://"

// load loads the certificates. It returns nil if no address needs them. ticketKeys are those of the predecessor.
// All errors but those of the files are usage errors.
func (f tlsFlags) load(addresses []string, ticketKeys []byte, log *zap.Logger) (*server.Certificates, error) {
	needed := slices.ContainsFunc(addresses, func(address string) bool { return strings.HasPrefix(address, tlsScheme) })
	certs, keys := f.certs, f.keys
	if dir := os.Getenv("CREDENTIALS_DIRECTORY"); needed && len(certs) == 0 && len(keys) == 0 && dir != "" {
		if _, err := os.Stat(filepath.Join(dir, credentialCert)); !errors.Is(err, fs.ErrNotExist) {
			certs, keys = []string{filepath.Join(dir, credentialCert)}, []string{filepath.Join(dir, credentialKey)}
		}
	}
	config := &tls.Config{CipherSuites: authenticatedSuites()}
	switch f.minVersion {
	case "1.2":
		config.MinVersion = tls.VersionTLS12
	case "1.3":
		config.MinVersion = tls.VersionTLS13
	default:
		return nil, usagef("--tls-min-version %q: want 1.2 or 1.3", f.minVersion)
	}
	if f.clientAuth != "" && f.clientAuth != "require" && f.clientAuth != "optional" {
		return nil, usagef("--tls-client-auth %q: want require or optional", f.clientAuth)
	}
	switch {
	case !needed && (len(certs) > 0 || len(keys) > 0 || f.clientCA != "" || f.clientAuth != ""):
		return nil, usagef("--tls-cert, --tls-key, --tls-client-ca, --tls-client-auth: need --listen or --http %shost:port",
			tlsScheme)
	case !needed:
		return nil, nil
	case len(certs) == 0:
		return nil, usagef("%s… needs --tls-cert and --tls-key", tlsScheme)
	case len(certs) != len(keys):
		return nil, usagef("--tls-cert and --tls-key: %s and %s: want one key for each certificate",
			text.Count(len(certs), "certificate"), text.Count(len(keys), "key"))
	}
	switch {
	case f.clientAuth != "" && f.clientCA == "":
		return nil, usagef("--tls-client-auth: needs --tls-client-ca")
	case f.clientAuth == "optional":
		config.ClientAuth = tls.VerifyClientCertIfGiven
	case f.clientCA != "":
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	opts := server.CertificateOptions{ClientCAFile: f.clientCA, Config: config, TicketKeys: ticketKeys, Logger: log}
	for i := range certs {
		opts.Pairs = append(opts.Pairs, server.CertificatePair{CertFile: certs[i], KeyFile: keys[i]})
	}
	return server.LoadCertificates(opts)
}

// authenticatedSuites returns the cipher suites of TLS 1.2 with authenticated encryption. It leaves out those with
// CBC, because of attacks such as Lucky Thirteen. All clients of the last ten years support the others.
func authenticatedSuites() (ids []uint16) {
	for _, suite := range tls.CipherSuites() {
		if strings.Contains(suite.Name, "_GCM_") || strings.Contains(suite.Name, "_CHACHA20_") {
			ids = append(ids, suite.ID)
		}
	}
	return ids
}

// withoutClientAuth returns a configuration that requests no client certificate, because probes have none.
func withoutClientAuth(config *tls.Config) *tls.Config {
	return &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		current, err := config.GetConfigForClient(hello)
		if err != nil {
			return nil, err
		}
		current = current.Clone()
		current.ClientAuth = tls.NoClientCert
		current.SessionTicketsDisabled = true
		return current, nil
	}}
}

// watchActor returns the run.Group pair that reloads certificates until it is interrupted. It never ends the group.
func watchActor(srv *server.Server, certs *server.Certificates) (execute func() error, interrupt func(error)) {
	ctx, cancel := context.WithCancelCause(context.Background())
	execute = func() error {
		_ = certs.Watch(ctx) // returns the cause of ctx
		return nil
	}
	interrupt = func(error) {
		<-srv.Done() // handshakes continue during the drain
		cancel(server.ErrServerClosed)
	}
	return execute, interrupt
}

const unixScheme = "unix://"

// listenUnix opens an echo listener on a Unix socket.
func (s *sockets) listenUnix(ctx context.Context, path string, opts control.SocketOptions) error {
	ln, err := control.Listen(ctx, path, opts)
	if err != nil {
		return fmt.Errorf("--listen: %w", err)
	}
	s.unix = append(s.unix, ln)
	s.echo = append(s.echo, server.Listener{Listener: control.UnwrapListener(ln)})
	return nil
}

// tlsAddresses returns the addresses of listeners with TLS, for the successor.
func tlsAddresses(listeners []server.Listener) (addresses []string) {
	for _, ln := range listeners {
		if ln.TLSConfig != nil {
			addresses = append(addresses, ln.Addr().String())
		}
	}
	return addresses
}

// adoptEcho configures listeners of a predecessor as listenEcho configures new ones.
func (s *sockets) adoptEcho(tlsAddresses []string, opts echoOptions) error {
	for i, ln := range s.echo {
		address := ln.Addr().String()
		switch {
		case slices.Contains(tlsAddresses, address) && opts.certs == nil:
			return fmt.Errorf("the predecessor hands over %s%s, and no certificate is given for it", tlsScheme, address)
		case slices.Contains(tlsAddresses, address):
			s.echo[i].TLSConfig = opts.certs.Config()
		case ln.Addr().Network() == "unix" && !ln.Inherited:
			adopted, err := control.Adopt(ln.Listener, opts.unix)
			if err != nil {
				return err
			}
			s.unix = append(s.unix, adopted)
		}
	}
	return nil
}
