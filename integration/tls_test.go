//go:build unix

package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"echod/control"
)

var (
	openssl = kind{"OpenSSL 1.1.1 or later", [][]string{{"openssl"}}, "version", "OpenSSL "}
	python3 = kind{"Python 3", [][]string{{"python3"}}, "--version", "Python 3"}
)

// certificate makes a certificate for localhost that signs itself, and writes it to cert.pem and key.pem in dir.
func certificate(t testing.TB, dir, name string) (pool *x509.CertPool) {
	t.Helper()
	_, pool = keyPair(t, dir, name)
	return pool
}

// keyPair is certificate. It also returns the certificate with its key.
func keyPair(t testing.TB, dir, name string) (pair tls.Certificate, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{{127, 0, 0, 1}}, DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	check(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	check(t, err)
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for file, text := range map[string][]byte{
		"cert.pem": cert, "key.pem": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}),
	} {
		next := filepath.Join(dir, "."+file)
		check(t, os.WriteFile(next, text, 0o600))
		check(t, os.Rename(next, filepath.Join(dir, file)))
	}
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// tlsFlags makes a certificate in dir. It returns the flags that name it, and what clients trust.
func tlsFlags(t testing.TB, dir string) (flags []string, roots *x509.CertPool) {
	t.Helper()
	roots = certificate(t, dir, "first")
	return []string{"--tls-cert", filepath.Join(dir, "cert.pem"), "--tls-key", filepath.Join(dir, "key.pem")}, roots
}

// startTLS starts a server with TLS. It returns the directory of its certificate, and what its clients trust.
func startTLS(t testing.TB, flags ...string) (e *echod, dir string, roots *x509.CertPool) {
	t.Helper()
	dir = t.TempDir()
	more, roots := tlsFlags(t, dir)
	e = start(t, slices.Concat(flags, more, []string{"--listen", "tls://127.0.0.1:0"})...)
	e.connectWithin = func(timeout time.Duration) (*peer, error) { return connectTLS(e.addr, roots, timeout) }
	return e, dir, roots
}

// A client in Python shows what it reads, and ends at close_notify; an end without one is an error.
const pythonTLSClient = `
import os, socket, ssl, sys, threading
s = ssl.create_default_context(cafile=sys.argv[1]).wrap_socket(
    socket.create_connection(("127.0.0.1", int(sys.argv[2]))), server_hostname="localhost", suppress_ragged_eofs=False)
def say():
    for line in sys.stdin: s.sendall(line.encode())
threading.Thread(target=say, daemon=True).start()
while True:
    b = s.recv(4096)
    if not b: os._exit(0)
    sys.stdout.buffer.write(b); sys.stdout.buffer.flush()
`

// TestTLSClientPrograms runs the server against TLS clients that others wrote: they are served, told of a drain, and
// reach the end of the grace period, at which they see an orderly end.
func TestTLSClientPrograms(t *testing.T) {
	t.Parallel()
	for name, argv := range map[string]func(t *testing.T, ca, port string) []string{
		"openssl s_client": func(t *testing.T, ca, port string) []string {
			return append(openssl.find(t), "s_client", "-quiet", "-verify_return_error", "-CAfile", ca, "-connect", "127.0.0.1:"+port)
		},
		"ncat --ssl": func(t *testing.T, ca, port string) []string {
			return append(ncat.find(t), "--ssl-verify", "--ssl-trustfile", ca, "localhost", port)
		},
		"socat OPENSSL": func(t *testing.T, ca, port string) []string {
			return append(socat.find(t), "-", "OPENSSL:localhost:"+port+",pf=ip4,cafile="+ca)
		},
		"Python": func(t *testing.T, ca, port string) []string {
			return append(python3.find(t), "-c", pythonTLSClient, ca, port)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, dir, _ := startTLS(t, "--grace", "2s")
			_, port := e.hostPort()
			p := startProgram(t, argv(t, filepath.Join(dir, "cert.pem"), port)...)
			p.say("hello\n")
			p.reads("hello\n")
			e.signal(syscall.SIGTERM)
			p.reads("SHUTDOWN 2 SIGTERM\n")
			p.say("last words\n")
			p.reads("last words\n")
			if name == "ncat --ssl" {
				check(t, p.stdin.Close()) // it runs until its input ends
			}
			p.ends("")
			e.wait(0)
		})
	}
}

func TestTLSBehindHAProxy(t *testing.T) {
	t.Parallel()
	program := haproxy.find(t)[0]
	e, dir, roots := startTLS(t, "--proxy-protocol", "127.0.0.0/8")
	both := filepath.Join(dir, "both.pem")
	check(t, os.WriteFile(both, []byte(readFile(t, filepath.Join(dir, "cert.pem"))+readFile(t, filepath.Join(dir, "key.pem"))), 0o600))
	for name, line := range map[string]struct{ bind, server string }{
		"passthrough":  {"", "send-proxy-v2"},
		"re-encrypted": {"ssl crt " + both, "send-proxy-v2 ssl verify required sni str(localhost) ca-file " + filepath.Join(dir, "cert.pem")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			socket := filepath.Join(shortDir(t), "h")
			config := filepath.Join(t.TempDir(), "haproxy.cfg")
			check(t, os.WriteFile(config, fmt.Appendf(nil, `defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m
listen echo
    bind unix@%s %s
    server s1 %s %s
`, socket, line.bind, e.addr, line.server), 0o600))
			startProgram(t, program, "-db", "-f", config)
			var c *tls.Conn
			poll(t, "HAProxy listens", func() bool {
				nc, err := net.Dial("unix", socket)
				if err != nil {
					return false
				}
				c = tls.Client(nc, &tls.Config{RootCAs: roots, ServerName: "localhost"})
				return true
			})
			defer c.Close()
			check(t, c.SetDeadline(time.Now().Add(patience)))
			_, err := io.WriteString(c, "hello\n")
			check(t, err)
			got := make([]byte, len("hello\n"))
			if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello\n" {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// TestTLSScan lets testssl.sh look for weaknesses. It takes two minutes.
func TestTLSScan(t *testing.T) {
	long(t)
	t.Parallel()
	e, dir, _ := startTLS(t)
	_, port := e.hostPort()
	report := filepath.Join(dir, "report.json")
	cmd := commandOf(require(t, "testssl", "testssl.sh"), "--quiet", "--color", "0", "--warnings", "off", "--ip", "one",
		"--add-ca", filepath.Join(dir, "cert.pem"), "--jsonfile", report, "localhost:"+port)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Logf("testssl.sh: %v\n%s", err, out) // its status counts findings
	}
	var findings []struct{ ID, Severity, Finding string }
	check(t, json.Unmarshal([]byte(readFile(t, report)), &findings))
	fine := 0
	for _, f := range findings {
		switch {
		case f.Severity == "OK":
			fine++
		case f.Severity == "INFO", f.Severity == "DEBUG":
		case strings.HasPrefix(f.ID, "cert"), f.ID == "DNS_CAArecord": // the test's own certificate
		case f.ID == "TLS_session_ticket": // crypto/tls announces a week; Certificates forgets its keys after a day
		default:
			t.Errorf("%s: %s: %s", f.Severity, f.ID, f.Finding)
		}
	}
	if fine < 20 {
		t.Errorf("testssl.sh found only %d things in order: it has not done all checks", fine)
	}
}

// TestTLSCertificatesAreReplacedUnderLoad replaces the certificate while clients connect. The server finds out by itself,
// and through ctl when the test cannot wait.
func TestTLSCertificatesAreReplacedUnderLoad(t *testing.T) {
	t.Parallel()
	times := 20
	if slowToo() {
		times = 100
	}
	e, dir, roots := startTLS(t)
	var mu sync.Mutex
	trusted := []*x509.CertPool{roots}
	var over atomic.Bool
	var handshakes atomic.Int64
	var clients sync.WaitGroup
	defer clients.Wait()
	defer over.Store(true)
	for range 2 {
		clients.Go(func() {
			for !over.Load() {
				c, err := tls.Dial("tcp", e.addr, &tls.Config{
					InsecureSkipVerify: true, // checked below, against all that were in use
					VerifyConnection: func(state tls.ConnectionState) error {
						mu.Lock()
						defer mu.Unlock()
						for _, pool := range trusted {
							if _, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: pool, DNSName: "localhost"}); err == nil {
								return nil
							}
						}
						return fmt.Errorf("an unknown certificate")
					},
				})
				if err != nil {
					t.Errorf("handshake: %v", err)
					return
				}
				handshakes.Add(1)
				_ = c.Close()
			}
		})
	}
	for i := range times {
		mu.Lock()
		pool := certificate(t, dir, fmt.Sprint("replacement ", i))
		trusted = append(trusted, pool)
		mu.Unlock()
		if i%10 == 0 {
			if got := e.ctl("reload-certs"); got.code != 0 {
				t.Fatalf("ctl reload-certs: %+v", got)
			}
		}
		before := handshakes.Load()
		poll(t, "handshakes go on", func() bool { return handshakes.Load() > before || t.Failed() })
	}
	want := fmt.Sprint("CN=replacement ", times-1)
	poll(t, "the server has loaded the last certificate", func() bool { return e.status().Certificates[0].Subject == want })
	over.Store(true)
	clients.Wait()
	if failed := e.status().Closed["handshake-failed"]; failed != 0 {
		t.Errorf("%d of %d handshakes failed", failed, handshakes.Load())
	}
}

// TestTLSIdentity selects clients by the names in their certificates.
func TestTLSIdentity(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	clients := make(map[string]tls.Certificate)
	var authorities []byte
	for _, name := range []string{"worker 1", "worker 2", "other"} {
		clients[name], _ = keyPair(t, dir, name)
		authorities = append(authorities, readFile(t, filepath.Join(dir, "cert.pem"))...)
	}
	ca := filepath.Join(dir, "authorities.pem")
	check(t, os.WriteFile(ca, authorities, 0o600))
	e, _, roots := startTLS(t, "--tls-client-ca", ca, "--listen", "tls://127.0.0.1:0")
	second := e.addrs[1] // the same rules apply there
	for name, cert := range clients {
		address := e.addr
		if name == "worker 2" {
			address = second
		}
		c, err := tls.Dial("tcp", address, &tls.Config{RootCAs: roots, ServerName: "localhost", Certificates: []tls.Certificate{cert}})
		check(t, err)
		defer c.Close()
		check(t, c.SetDeadline(time.Now().Add(patience)))
		_, err = io.WriteString(c, name+"\n")
		check(t, err)
		_, err = io.ReadFull(c, make([]byte, len(name)+1))
		check(t, err)
	}
	for _, address := range e.addrs {
		c, err := tls.Dial("tcp", address, &tls.Config{RootCAs: roots, ServerName: "localhost"})
		check(t, err) // the alert comes after the client's end of the handshake
		defer c.Close()
		check(t, c.SetDeadline(time.Now().Add(patience)))
		if _, err := c.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "certificate required") {
			t.Errorf("a client without a certificate at %s: %v", address, err)
		}
	}
	got := e.ctl("conns", "--identity", "worker*")
	if lines := strings.Count(got.stdout, "CN=worker"); got.code != 0 || lines != 2 || strings.Contains(got.stdout, "other") {
		t.Errorf("ctl conns: %+v, want both workers", got)
	}
	if got := e.ctl("kill", "--identity", "worker 1"); got.code != 0 || got.stdout != "killed 1 connection\n" {
		t.Errorf("ctl kill: %+v, want one", got)
	}
	poll(t, "one worker to be gone", func() bool { return strings.Count(e.ctl("conns", "--identity", "*").stdout, "CN=") == 2 })
	if got := e.ctl("conns", "--identity", "worker 1"); strings.Contains(got.stdout, "CN=") {
		t.Errorf("ctl conns: %+v, want none", got)
	}
}

// TestTLSClients reports the handshakes of echod's own clients.
func TestTLSClients(t *testing.T) {
	t.Parallel()
	e, dir, _ := startTLS(t)
	own := func(args ...string) result {
		args = append([]string{built(t, echodBinary)}, append(args, "--tls", "--tls-server-name", "localhost")...)
		return run(t, commandOf(args...))
	}
	ca := filepath.Join(dir, "cert.pem")
	got := own("load", "--address", e.addr, "--tls-ca", ca, "--conns", "2", "--churn", "20ms", "--duration", "300ms")
	for _, want := range []string{`(?m)^handshakes +\d+ made, [1-9]\d* resumed, 0 failed$`, `(?m)^ +handshake( +[\d.]+ [µm]?s){6}$`, "All messages came back"} {
		if got.code != 0 || !regexp.MustCompile(want).MatchString(got.stdout) {
			t.Errorf("load: %+v; want %s", got, want)
		}
	}
	got = own("load", "--address", e.addr, "--tls-ca", ca, "--tls-resume=false", "--churn", "20ms", "--duration", "200ms")
	if want := regexp.MustCompile(`made, 0 resumed, 0 failed`); got.code != 0 || !want.MatchString(got.stdout) {
		t.Errorf("load without resumption: %+v; want %s", got, want)
	}
	got = own("load", "--address", e.addr, "--duration", "100ms", "--reconnect=false")
	if want := regexp.MustCompile(`0 made, 0 resumed, 1 failed(.|\n)* 0 lost(.|\n)*TLS handshake: failed to verify`); got.code != 1 || !want.MatchString(got.stdout) {
		t.Errorf("load that does not trust the server: %+v; want %s", got, want)
	}
	got = own("ping", e.addr, "--tls-ca", ca)
	if want := regexp.MustCompile(`connect=\S+ [µm]?s tls=\S+ [µm]?s echo=`); got.code != 0 || !want.MatchString(got.stdout) {
		t.Errorf("ping: %+v; want %s", got, want)
	}
}

// TestTLSCredentials proves what packages rely on: the certificate comes from systemd's credentials.
func TestTLSCredentials(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certificate(t, dir, "credential")
	check(t, os.Rename(filepath.Join(dir, "cert.pem"), filepath.Join(dir, "tls.crt")))
	check(t, os.Rename(filepath.Join(dir, "key.pem"), filepath.Join(dir, "tls.key")))
	e := startAs(t, []string{"env", "CREDENTIALS_DIRECTORY=" + dir}, "--listen", "tls://127.0.0.1:0")
	if got := e.status().Certificates; len(got) != 1 || got[0].Subject != "CN=credential" {
		t.Errorf("certificates %+v, want the one of the credentials", got)
	}
}

// TestUnixProxy believes a local proxy, which may use the socket.
func TestUnixProxy(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "echo")
	e := start(t, "--listen", "unix://"+path, "--proxy-protocol", "unix")
	c, err := net.Dial("unix", path)
	check(t, err)
	defer c.Close()
	check(t, c.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(c, headerV1+"hello\n")
	check(t, err)
	_, err = io.ReadFull(c, make([]byte, len("hello\n")))
	check(t, err)
	list, err := e.control.Conns(within(t, patience), -1, control.ConnFilter{})
	check(t, err)
	if got := list.Connections[0].Remote; got != "203.0.113.9:5555" {
		t.Errorf("listed as %s, want the client that the proxy names", got)
	}
}

// TestUnixEcho serves a Unix socket: with its mode, its client by name, and no file left at the end.
func TestUnixEcho(t *testing.T) {
	t.Parallel()
	path := filepath.Join(shortDir(t), "echo")
	stale, err := net.Listen("unix", path)
	check(t, err)
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	check(t, stale.Close())
	e := start(t, "--listen", "unix://"+path, "--unix-mode", "0620", "--max-conns-per-uid", "1")
	info, err := os.Lstat(path)
	check(t, err)
	if got := info.Mode().Perm(); got != 0o620 {
		t.Errorf("mode %o, want 620", got)
	}
	c, err := net.Dial("unix", path)
	check(t, err)
	defer c.Close()
	check(t, c.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(c, "hello\n")
	check(t, err)
	got := make([]byte, len("hello\n"))
	_, err = io.ReadFull(c, got)
	check(t, err)
	list, err := e.control.Conns(within(t, patience), -1, control.ConnFilter{})
	check(t, err)
	if want := fmt.Sprintf("uid=%d,pid=%d", os.Getuid(), os.Getpid()); list.Connections[0].Remote != want {
		t.Errorf("listed as %s, want %s", list.Connections[0].Remote, want)
	}
	second, err := net.Dial("unix", path)
	check(t, err)
	defer second.Close()
	if all, err := io.ReadAll(second); err != nil || string(all) != "BUSY\n" {
		t.Errorf("a second client got %q, %v; want BUSY", all, err)
	}
	e.signal(syscall.SIGTERM)
	if all, err := io.ReadAll(c); err != nil || string(all) != "SHUTDOWN 5 SIGTERM\n" {
		t.Errorf("the client got %q, %v", all, err)
	}
	e.wait(0)
	if _, err := os.Lstat(path); err == nil {
		t.Error("the file is left behind")
	}
}
