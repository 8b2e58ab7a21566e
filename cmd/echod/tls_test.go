package main

import (
	"cmp"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

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
		"an unknown rule for clients":            {withTLS, tlsFlags{certs: []string{"c"}, keys: []string{"k"}, clientAuth: "maybe"}, `--tls-client-auth "maybe"`},
		"a rule for clients without authorities": {withTLS, tlsFlags{certs: []string{"c"}, keys: []string{"k"}, clientAuth: "require"}, "needs --tls-client-ca"},
		"a file that does not exist":             {withTLS, tlsFlags{certs: []string{"none.pem"}, keys: []string{"k"}}, "none.pem"},
	} {
		t.Run(name, func(t *testing.T) {
			tt.flags.minVersion = cmp.Or(tt.flags.minVersion, "1.2")
			if _, err := tt.flags.load(tt.listen, nil, zap.NewNop()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one that says %q", err, tt.want)
			}
		})
	}
	t.Run("no TLS address needs no certificate", func(t *testing.T) {
		if certs, err := (tlsFlags{minVersion: "1.2"}).load([]string{":9999"}, nil, zap.NewNop()); certs != nil || err != nil {
			t.Errorf("got %v, %v; want neither", certs, err)
		}
	})
	for text, want := range map[string]uint16{"1.2": tls.VersionTLS12, "1.3": tls.VersionTLS13} {
		t.Run("the lowest version is "+text, func(t *testing.T) {
			dir := t.TempDir()
			writeTestCertificate(t, dir)
			flags := tlsFlags{certs: []string{filepath.Join(dir, "cert.pem")}, keys: []string{filepath.Join(dir, "key.pem")}, minVersion: text}
			certs, err := flags.load(withTLS, nil, zap.NewNop())
			if err != nil {
				t.Fatal(err)
			}
			if got := certs.Config().MinVersion; got != want {
				t.Errorf("MinVersion %s, want %s", tls.VersionName(got), tls.VersionName(want))
			}
		})
	}
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

// writeTestCertificate writes a certificate that signs itself, and its key, to cert.pem and key.pem.
func writeTestCertificate(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		"cert.pem": {Type: "CERTIFICATE", Bytes: cert}, "key.pem": {Type: "PRIVATE KEY", Bytes: secret},
	} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
