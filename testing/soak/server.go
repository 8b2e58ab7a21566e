package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"echod/control"
)

const (
	grace       = 6 * time.Second
	stallAfter  = 5 * time.Second
	busyTimeout = 60 * time.Second // for anything that should happen soon; the machine is busy
)

// A server is echod, through all its restarts and upgrades. Its addresses stay the same.
type server struct {
	program, dir string
	files        int
	tcp, tls     string // host:port
	http         string
	unix         string // path
	socket       string // of the control plane
	clientTLS    *tls.Config
	control      *control.Client
	log          *os.File

	lineage atomic.Int64 // grows with each start; an upgrade continues the counters, and stays in the lineage

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan error // of cmd
}

func newServer(program, dir string, files int) (*server, error) {
	sockets, err := os.MkdirTemp("", "soak") // a short path
	if err != nil {
		return nil, err
	}
	s := &server{
		program: program, dir: sockets, files: files,
		unix: filepath.Join(sockets, "echo"), socket: filepath.Join(sockets, "control"),
	}
	for _, address := range []*string{&s.tcp, &s.tls, &s.http} {
		if *address, err = freeAddress(); err != nil {
			return nil, err
		}
	}
	if s.clientTLS, err = writeCertificate(sockets); err != nil {
		return nil, err
	}
	if s.log, err = os.Create(filepath.Join(dir, filepath.Base(program)+".log")); err != nil {
		return nil, err
	}
	s.control = control.NewClient(s.socket)
	return s, nil
}

func freeAddress() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}

// writeCertificate writes a certificate and its key, and returns a configuration for clients that trust it.
func writeCertificate(dir string) (*tls.Config, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "soak"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * 24 * time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	err = errors.Join(os.WriteFile(filepath.Join(dir, "cert.pem"), cert, 0o600),
		os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(cert)
	return &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"}, err
}

// start starts a process and waits until it answers.
func (s *server) start() error {
	cmd := exec.Command("sh", "-c", `ulimit -n "$0"; exec "$@"`, strconv.Itoa(s.files), s.program, "serve", "--log-format", "json",
		"--listen", s.tcp, "--listen", "tls://"+s.tls, "--listen", "unix://"+s.unix, "--control", s.socket, "--http", s.http, "--pprof",
		"--tls-cert", filepath.Join(s.dir, "cert.pem"), "--tls-key", filepath.Join(s.dir, "key.pem"),
		"--grace", grace.String(), "--stall-timeout", stallAfter.String(), "--upgrade-timeout", "30s", "--upgrade-keep", "2s")
	cmd.Stderr = s.log
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	s.mu.Lock()
	s.cmd, s.exited = cmd, exited
	s.mu.Unlock()
	s.lineage.Add(1)
	for end := time.Now().Add(busyTimeout); ; time.Sleep(20 * time.Millisecond) {
		if _, err := s.status(context.Background()); err == nil {
			return nil
		}
		select {
		case err := <-exited:
			exited <- err
			return fmt.Errorf("echod does not start: %w", err)
		default:
		}
		if time.Now().After(end) {
			return errors.New("echod does not answer after its start")
		}
	}
}

// status requests the status. G16 promises an answer within a second.
func (s *server) status(ctx context.Context) (control.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return s.control.Status(ctx)
}

// signal signals the first process, which passes it on to the one that serves.
func (s *server) signal(sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cmd.Process.Signal(sig)
}

// wait waits for the exit of the first process, and returns its exit code.
func (s *server) wait(d time.Duration) (code int, err error) {
	s.mu.Lock()
	cmd, exited := s.cmd, s.exited
	s.mu.Unlock()
	select {
	case err := <-exited:
		exited <- err
		return cmd.ProcessState.ExitCode(), nil
	case <-time.After(d):
		return 0, fmt.Errorf("echod has not exited after %s", d)
	}
}

// kill kills every process that is left.
func (s *server) kill() {
	for _, pid := range s.processes() {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	_, _ = s.wait(busyTimeout)
}

func (s *server) close() {
	s.kill()
	s.control.Close()
	_ = s.log.Close()
	_ = os.RemoveAll(s.dir)
}

// processes lists the processes that run the program.
func (s *server) processes() (pids []int) {
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, link := range links {
		exe, err := os.Readlink(link)
		if err != nil || strings.TrimSuffix(exe, " (deleted)") != s.program {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

var web = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// get reads a page of the --http listener.
func (s *server) get(path string) (string, error) {
	res, err := web.Get("http://" + s.http + path)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s", path, res.Status)
	}
	return string(body), err
}

// metrics reads all samples, by name with labels.
func (s *server) metrics() (map[string]float64, error) {
	text, err := s.get("/metrics")
	if err != nil {
		return nil, err
	}
	samples := make(map[string]float64)
	for line := range strings.Lines(text) {
		i := strings.LastIndexByte(strings.TrimSpace(line), ' ')
		if strings.HasPrefix(line, "#") || i < 0 {
			continue
		}
		if v, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64); err == nil {
			samples[line[:i]] = v
		}
	}
	return samples, nil
}
