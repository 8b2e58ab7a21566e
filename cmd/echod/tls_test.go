package main

import (
	"crypto/tls"
	"strings"
	"testing"

	"go.uber.org/zap"
)

func TestTLSFlags(t *testing.T) {
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	withTLS := []string{"127.0.0.1:9999", "tls://127.0.0.1:9998"}
	for name, tt := range map[string]struct {
		listen []string
		flags  tlsFlags
		want   string
	}{
		"a certificate without a listener":       {[]string{":9999"}, tlsFlags{certs: []string{"c"}, keys: []string{"k"}}, "need --listen or --http tls://"},
		"a listener without a certificate":       {withTLS, tlsFlags{}, "needs --tls-cert and --tls-key"},
		"fewer keys than certificates":           {withTLS, tlsFlags{certs: []string{"a", "b"}, keys: []string{"k"}}, "one key for each certificate"},
		"an old version":                         {withTLS, tlsFlags{certs: []string{"c"}, keys: []string{"k"}, minVersion: "1.1"}, `--tls-min-version "1.1"`},
		"an unknown rule for clients":            {withTLS, tlsFlags{certs: []string{"c"}, keys: []string{"k"}, minVersion: "1.2", clientAuth: "maybe"}, `--tls-client-auth "maybe"`},
		"a rule for clients without authorities": {withTLS, tlsFlags{certs: []string{"c"}, keys: []string{"k"}, minVersion: "1.2", clientAuth: "require"}, "needs --tls-client-ca"},
		"a file that does not exist":             {withTLS, tlsFlags{certs: []string{"none.pem"}, keys: []string{"k"}, minVersion: "1.2"}, "none.pem"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := tt.flags.load(tt.listen, nil, zap.NewNop()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one that says %q", err, tt.want)
			}
		})
	}
	t.Run("no TLS address needs no certificate", func(t *testing.T) {
		if certs, err := (tlsFlags{}).load([]string{":9999"}, nil, zap.NewNop()); certs != nil || err != nil {
			t.Errorf("got %v, %v; want neither", certs, err)
		}
	})
	t.Run("suites with CBC are left out", func(t *testing.T) {
		if len(authenticatedSuites()) == 0 {
			t.Error("no suites are left")
		}
		for _, id := range authenticatedSuites() {
			if name := tls.CipherSuiteName(id); strings.Contains(name, "CBC") {
				t.Errorf("%s is offered", name)
			}
		}
	})
}
