package integration

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"echod/control"
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
	silent, err := net.Dial("tcp", web) // must not delay others
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

// install puts a new certificate into a directory in the namespaces of systemd, readable by a group.
func (s *systemd) install(t *testing.T, dir, name string, gid int) (roots *x509.CertPool) {
	t.Helper()
	made := t.TempDir()
	roots = certificate(t, made, name)
	dir = filepath.Join("/proc", s.pid, "root", dir)
	check(t, os.MkdirAll(dir, 0o750))
	check(t, os.Chown(dir, 0, gid))
	for _, file := range []string{"cert.pem", "key.pem"} {
		next := filepath.Join(dir, "."+file)
		check(t, os.WriteFile(next, []byte(readFile(t, filepath.Join(made, file))), 0o640))
		check(t, os.Chown(next, 0, gid))
		check(t, os.Rename(next, filepath.Join(dir, file)))
	}
	return roots
}

// shows connects over TLS, and returns the common name in the server's certificate. The client trusts only roots.
func shows(t *testing.T, addr string, roots *x509.CertPool, sessions tls.ClientSessionCache) (name string, resumed bool) {
	t.Helper()
	c, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: roots, ServerName: "localhost", ClientSessionCache: sessions})
	if err != nil {
		return err.Error(), false
	}
	defer c.Close()
	check(t, c.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(c, "hello\n")
	check(t, err)
	_, err = io.ReadFull(c, make([]byte, len("hello\n")))
	check(t, err)
	state := c.ConnectionState()
	return state.PeerCertificates[0].Subject.CommonName, state.DidResume
}

// testTLSCredentials: only root can read the key, and systemd passes it to the service's dynamic user. It is there for
// the successor of an upgrade, too.
func (s *systemd) testTLSCredentials(t *testing.T) {
	addr := "127.0.0.1:" + freePorts(t, 1)[0]
	roots := s.install(t, "/etc/echod-root", "credential", 0)
	s.fresh(t, "LoadCredential=tls.crt:/etc/echod-root/cert.pem", "LoadCredential=tls.key:/etc/echod-root/key.pem",
		"Environment=ECHOD_LISTEN=tls://"+addr, "ExecReload=", "ExecReload=/run/test/echod ctl upgrade")
	sessions := tls.NewLRUClientSessionCache(1)
	if name, resumed := shows(t, addr, roots, sessions); name != "credential" || resumed {
		t.Errorf("the server shows %q, resumed %t", name, resumed)
	}
	before := s.property(t, "MainPID")
	s.ctl(t, "reload", "echod.service")
	s.awaitProperty(t, "MainPID", func(now string) bool { return now != before })
	if name, resumed := shows(t, addr, roots, sessions); name != "credential" || !resumed {
		t.Errorf("after an upgrade the server shows %q, resumed %t", name, resumed)
	}
	roots = s.install(t, "/etc/echod-root", "renewed", 0)
	s.ctl(t, "restart", "echod.service") // systemd copies credentials at the start
	if name, _ := shows(t, addr, roots, nil); name != "renewed" {
		t.Errorf("after a restart the server shows %q", name)
	}
}

// testTLSFiles: the service's group may read the files, and the server sees that they were replaced.
func (s *systemd) testTLSFiles(t *testing.T) {
	group, err := user.LookupGroup("adm") // any will do
	check(t, err)
	gid, err := strconv.Atoi(group.Gid)
	check(t, err)
	addr := "127.0.0.1:" + freePorts(t, 1)[0]
	roots := s.install(t, "/etc/echod-group", "first", gid)
	s.fresh(t, "SupplementaryGroups=adm",
		"Environment=ECHOD_LISTEN=tls://"+addr+" ECHOD_TLS_CERT=/etc/echod-group/cert.pem ECHOD_TLS_KEY=/etc/echod-group/key.pem")
	if name, _ := shows(t, addr, roots, nil); name != "first" {
		t.Errorf("the server shows %q", name)
	}
	roots = s.install(t, "/etc/echod-group", "second", gid)
	poll(t, "the server to see the second certificate", func() bool {
		name, _ := shows(t, addr, roots, nil)
		return name == "second"
	})
	roots = s.install(t, "/etc/echod-group", "third", gid)
	plane := control.NewClient(s.socket)
	defer plane.Close()
	_, err = plane.ReloadCertificates(within(t, patience))
	check(t, err)
	if name, _ := shows(t, addr, roots, nil); name != "third" {
		t.Errorf("after reload-certs the server shows %q", name)
	}
}
