package integration

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestTLSHealth asks over HTTPS, also after the certificate was replaced and after an upgrade.
func TestTLSHealth(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	roots := certificate(t, dir, "first")
	cert := filepath.Join(dir, "cert.pem")
	e, _ := upgradable(t, "--http", "tls://127.0.0.1:0", "--tls-cert", cert, "--tls-key", filepath.Join(dir, "key.pem"), "--tls-client-ca", cert)
	web := e.web()
	answers := func(when, path, want string) {
		t.Helper()
		client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}, Timeout: patience}
		resp, err := client.Get("https://" + web + path)
		if err != nil {
			t.Errorf("%s: %v", when, err)
			return
		}
		defer resp.Body.Close()
		if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(body), want) {
			t.Errorf("%s: %s answers %s %q, %v; want 200 and %q", when, path, resp.Status, body, err, want)
		}
	}
	answers("at the start", "/livez", "alive")
	answers("at the start", "/metrics", "echod_tls_certificate_not_after_timestamp_seconds")
	roots = certificate(t, dir, "second")
	if got := e.ctl("reload-certs"); got.code != 0 {
		t.Fatalf("ctl reload-certs: %+v", got)
	}
	answers("after a reload", "/readyz", "ready")
	if got := e.ctl("upgrade"); got.code != 0 {
		t.Fatalf("ctl upgrade: %+v", got)
	}
	answers("after an upgrade", "/readyz", "ready")
	if resp, err := http.Get("http://" + web + "/livez"); err == nil {
		_ = resp.Body.Close()
		if resp.StatusCode == http.StatusOK {
			t.Error("it answers without TLS too")
		}
	}
	silent, err := net.Dial("tcp", web) // delays nobody
	check(t, err)
	defer silent.Close()
	answers("next to a silent caller", "/livez", "alive")
}

// TestTLSResumption resumes the session of a client with the program that an upgrade has started.
func TestTLSResumption(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	roots := certificate(t, dir, "server")
	e, _ := upgradable(t, "--listen", "tls://127.0.0.1:0", "--tls-cert", filepath.Join(dir, "cert.pem"), "--tls-key", filepath.Join(dir, "key.pem"))
	var addr string
	for _, ln := range e.status().Listeners {
		if ln.TLS {
			addr = ln.Address
		}
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		config := &tls.Config{RootCAs: roots, ServerName: "localhost", MaxVersion: version, ClientSessionCache: tls.NewLRUClientSessionCache(1)}
		resumed := func() bool {
			t.Helper()
			c, err := tls.Dial("tcp", addr, config)
			check(t, err)
			defer c.Close()
			check(t, c.SetDeadline(time.Now().Add(patience)))
			_, err = io.WriteString(c, "hello\n")
			check(t, err)
			_, err = io.ReadFull(c, make([]byte, len("hello\n"))) // the ticket comes before it
			check(t, err)
			return c.ConnectionState().DidResume
		}
		if resumed() {
			t.Errorf("%s: the first session is resumed", tls.VersionName(version))
		}
		pid := e.status().PID
		for range 2 {
			if got := e.ctl("upgrade"); got.code != 0 {
				t.Fatalf("ctl upgrade: %+v", got)
			}
		}
		if now := e.status().PID; now == pid {
			t.Errorf("process %d still serves", now)
		}
		if !resumed() {
			t.Errorf("%s: the session is not resumed after an upgrade", tls.VersionName(version))
		}
	}
}
