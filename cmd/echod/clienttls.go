package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/pflag"
)

// clientTLS holds the TLS flags of send, load and ping.
type clientTLS struct {
	on         bool
	ca         string
	cert, key  string
	serverName string
	insecure   bool
}

func (t *clientTLS) add(f *pflag.FlagSet) {
	f.BoolVar(&t.on, "tls", false, "use TLS, also for an address without tls://")
	f.StringVar(&t.ca, "tls-ca", "",
		"PEM `file` of the authorities that verify the server\n(default: those of the system)")
	f.StringVar(&t.cert, "tls-cert", "", "PEM `file` with this client's certificate")
	f.StringVar(&t.key, "tls-key", "", "PEM `file` with the certificate's key")
	f.StringVar(&t.serverName, "tls-server-name", "",
		"`name` that the server's certificate must have (default: the\nhost of the address)")
	f.BoolVar(&t.insecure, "tls-insecure", false,
		"do not verify the server: anybody can read and change what is\nsent")
}

// address returns address with the scheme tls:// if --tls is set.
func (t *clientTLS) address(address string) (string, error) {
	switch {
	case !t.on || strings.HasPrefix(address, tlsScheme):
		return address, nil
	case strings.HasPrefix(address, unixScheme):
		return "", usagef("--tls: not for a Unix socket")
	default:
		return tlsScheme + strings.TrimPrefix(address, "tcp://"), nil
	}
}

// config returns the configuration from the flags; nil if none is set. It writes a warning if the server is not
// verified.
func (t *clientTLS) config(warnings io.Writer) (*tls.Config, error) {
	if t.ca == "" && t.cert == "" && t.key == "" && t.serverName == "" && !t.insecure {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.serverName, InsecureSkipVerify: t.insecure}
	if t.insecure {
		fmt.Fprintln(warnings,
			"echod: --tls-insecure: the server is not verified; anybody on the way can read and change what is sent")
	}
	if t.ca != "" {
		pem, err := os.ReadFile(t.ca)
		if err != nil {
			return nil, usagef("--tls-ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, usagef("--tls-ca %s: it has no certificate in PEM", t.ca)
		}
	}
	if (t.cert == "") != (t.key == "") {
		return nil, usagef("--tls-cert and --tls-key: want both")
	}
	if t.cert != "" {
		cert, err := tls.LoadX509KeyPair(t.cert, t.key)
		if err != nil {
			return nil, usagef("--tls-cert %s: %w", t.cert, err)
		}
		config.Certificates = []tls.Certificate{cert}
	}
	return config, nil
}
