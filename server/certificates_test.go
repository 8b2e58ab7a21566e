package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// certificateDir is a directory with a certificate, as Certificates load it.
type certificateDir struct {
	dir   string
	store *Certificates
	logs  *observer.ObservedLogs
}

func newCertificateDir(t *testing.T, cert tls.Certificate) certificateDir {
	t.Helper()
	d := certificateDir{dir: t.TempDir()}
	certFile, keyFile := writeCertificate(t, d.dir, cert)
	core, logs := observer.New(zap.DebugLevel)
	store, err := LoadCertificates(CertificateOptions{Pairs: []CertificatePair{{certFile, keyFile}}, Logger: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	d.store, d.logs = store, logs
	return d
}

// replace replaces the certificate in one step for each file.
func (d certificateDir) replace(t *testing.T, cert tls.Certificate) {
	t.Helper()
	for _, file := range []string{"cert.pem", "key.pem"} {
		d.replaceFile(t, cert, file)
	}
}

func (d certificateDir) replaceFile(t *testing.T, cert tls.Certificate, file string) {
	t.Helper()
	other := t.TempDir()
	writeCertificate(t, other, cert)
	if err := os.Rename(filepath.Join(other, file), filepath.Join(d.dir, file)); err != nil {
		t.Fatal(err)
	}
}

// serves returns the subject of the certificate in use.
func (d certificateDir) serves() string { return d.store.Infos()[0].Subject }

func TestCertificates(t *testing.T) {
	first, second := newCertificate(t, "first", nil), newCertificate(t, "second", nil)

	t.Run("are loaded again when their files are renamed into place", func(t *testing.T) {
		d := newCertificateDir(t, first)
		d.replace(t, second)
		if changed, err := d.store.Reload(); !changed || err != nil {
			t.Errorf("Reload: %t, %v; want a change", changed, err)
		}
		wantEqual(t, "certificate", d.serves(), "CN=second")
		if changed, err := d.store.Reload(); changed || err != nil {
			t.Errorf("Reload of the same files: %t, %v; want no change", changed, err)
		}
	})

	t.Run("are loaded again when a symbolic link on the way to them is swapped", func(t *testing.T) {
		root := t.TempDir()
		for name, cert := range map[string]tls.Certificate{"1": first, "2": second} {
			if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil {
				t.Fatal(err)
			}
			writeCertificate(t, filepath.Join(root, name), cert)
		}
		link := filepath.Join(root, "current")
		if err := os.Symlink("1", link); err != nil {
			t.Skip(err)
		}
		if _, err := os.Stat(filepath.Join(link, "cert.pem")); err != nil {
			t.Skip("wine does not follow it: ", err)
		}
		store, err := LoadCertificates(CertificateOptions{Pairs: []CertificatePair{{filepath.Join(link, "cert.pem"), filepath.Join(link, "key.pem")}}})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("2", link+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(link+".new", link); errors.Is(err, os.ErrPermission) {
			t.Skip("Windows does not replace a link to a directory: ", err)
		} else if err != nil {
			t.Fatal(err)
		}
		if changed, err := store.Reload(); !changed || err != nil {
			t.Errorf("Reload: %t, %v; want a change", changed, err)
		}
		wantEqual(t, "certificate", store.Infos()[0].Subject, "CN=second")
	})

	t.Run("stay when the new ones are bad, which is logged once", func(t *testing.T) {
		for name, spoil := range map[string]func(t *testing.T, d certificateDir){
			"another key":   func(t *testing.T, d certificateDir) { d.replaceFile(t, second, "key.pem") },
			"a missing key": func(_ *testing.T, d certificateDir) { _ = os.Remove(filepath.Join(d.dir, "key.pem")) },
			"no PEM": func(_ *testing.T, d certificateDir) {
				_ = os.WriteFile(filepath.Join(d.dir, "cert.pem"), []byte("x"), 0o600)
			},
			"expired": func(t *testing.T, d certificateDir) {
				d.replace(t, newCertificateUntil(t, "old", time.Now().Add(-time.Minute)))
			},
		} {
			t.Run(name, func(t *testing.T) {
				d := newCertificateDir(t, first)
				spoil(t, d)
				for range 2 {
					if changed, err := d.store.Reload(); changed || err == nil {
						t.Errorf("Reload: %t, %v; want an error", changed, err)
					}
				}
				wantEqual(t, "certificate", d.serves(), "CN=first")
				wantEqual(t, "log lines", d.logs.FilterLevelExact(zap.ErrorLevel).Len(), 1)
				if d.store.Err() == nil {
					t.Error("Err: nil, want the error")
				}
				d.replace(t, second)
				if changed, err := d.store.Reload(); !changed || err != nil || d.store.Err() != nil {
					t.Errorf("Reload of good files: %t, %v; want a change", changed, err)
				}
			})
		}
	})

	t.Run("are watched, and a replacement in two steps is no error", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			time.Sleep(time.Until(first.Leaf.NotAfter.Add(-30 * time.Minute))) // a bubble begins in the year 2000
			d := newCertificateDir(t, first)
			ctx, cancel := context.WithCancelCause(t.Context())
			stopped := make(chan error)
			go func() { stopped <- d.store.Watch(ctx) }()
			d.replaceFile(t, second, "cert.pem")
			pass(watchInterval)
			d.replaceFile(t, second, "key.pem")
			pass(watchInterval)
			wantEqual(t, "certificate", d.serves(), "CN=second")
			wantEqual(t, "errors", d.logs.FilterLevelExact(zap.ErrorLevel).Len(), 0)
			d.replaceFile(t, first, "key.pem")
			pass(2 * watchInterval)
			wantEqual(t, "errors after two looks at a bad pair", d.logs.FilterLevelExact(zap.ErrorLevel).Len(), 1)
			cancel(ErrServerClosed)
			wantErr(t, "Watch", <-stopped, ErrServerClosed)
		})
	})

	t.Run("are logged before they expire, once for each step", func(t *testing.T) {
		const life = 90 * 24 * time.Hour
		synctest.Test(t, func(t *testing.T) {
			d := newCertificateDir(t, newCertificateUntil(t, "first", time.Now().Add(life)))
			warned := func() int { return d.logs.FilterMessage("certificate expires soon").Len() }
			look := func(left time.Duration) {
				time.Sleep(time.Until(d.store.Infos()[0].NotAfter.Add(-left)))
				d.store.check(time.Now())
				d.store.check(time.Now())
			}
			for _, step := range []struct {
				left time.Duration
				want int
			}{{15 * 24 * time.Hour, 0}, {13 * 24 * time.Hour, 1}, {6 * 24 * time.Hour, 2}, {2 * 24 * time.Hour, 3}, {time.Hour, 4}} {
				look(step.left)
				wantEqual(t, "warnings", warned(), step.want)
			}
			look(-time.Minute)
			wantEqual(t, "expired", d.logs.FilterMessage("certificate has expired").Len(), 1)
		})
	})

	t.Run("are chosen by the name that the client asks for", func(t *testing.T) {
		var pairs []CertificatePair
		roots := x509.NewCertPool()
		for _, cert := range []tls.Certificate{first, second} {
			certFile, keyFile := writeCertificate(t, t.TempDir(), cert)
			pairs = append(pairs, CertificatePair{certFile, keyFile})
			roots.AddCert(cert.Leaf)
		}
		store, err := LoadCertificates(CertificateOptions{Pairs: pairs})
		if err != nil {
			t.Fatal(err)
		}
		ln := listen(t)
		s, _ := newServer(t, Echo, Options{})
		serveListener(t, s, Listener{Listener: ln, TLSConfig: store.Config()})
		for asked, want := range map[string]string{"first": "first", "second": "second", "127.0.0.1": "first"} {
			c := dialTLS(t, ln.Addr(), &tls.Config{RootCAs: roots, ServerName: asked})
			if err := c.Handshake(); err != nil {
				t.Errorf("asking for %s: %v", asked, err)
				continue
			}
			wantEqual(t, "certificate", c.ConnectionState().PeerCertificates[0].Subject.CommonName, want)
		}
	})

	t.Run("of authorities decide about clients, whose names become labels", func(t *testing.T) {
		certFile, keyFile := writeCertificate(t, t.TempDir(), first)
		caFile, _ := writeCertificate(t, t.TempDir(), second)
		third := newCertificate(t, "third", nil)
		store, err := LoadCertificates(CertificateOptions{
			Pairs: []CertificatePair{{certFile, keyFile}}, ClientCAFile: caFile,
			Config: &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert},
		})
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AddCert(first.Leaf)
		ln := listen(t)
		s, logs := newServer(t, Echo, Options{})
		serveListener(t, s, Listener{Listener: ln, TLSConfig: store.Config()})
		dial := func(name string, authority tls.Certificate) *tls.Conn {
			cert := newCertificate(t, name, &authority)
			return dialTLS(t, ln.Addr(), &tls.Config{
				RootCAs: roots, ServerName: "first",
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
			})
		}
		echoed(t, dial("alice", second), "hello")
		want := map[string]string{LabelSubject: "CN=alice", LabelNames: "alice,127.0.0.1"}
		for info := range s.Conns() {
			wantEqual(t, "labels", info.Labels, want)
		}
		wantEqual(t, "labels in the log", logs.FilterMessage("connection opened").All()[0].ContextMap()["labels"], any(want))

		otherFile, _ := writeCertificate(t, t.TempDir(), third)
		if err := os.Rename(otherFile, caFile); err != nil {
			t.Fatal(err)
		}
		if changed, err := store.Reload(); !changed || err != nil {
			t.Fatalf("Reload: %v, %v", changed, err)
		}
		echoed(t, dial("bob", third), "hello")
		if _, err := dial("mallory", second).Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "unknown certificate authority") {
			t.Errorf("a client of the authority that was replaced: %v", err)
		}
	})

	t.Run("name the file that cannot be loaded", func(t *testing.T) {
		certFile, keyFile := writeCertificate(t, t.TempDir(), first)
		for name, o := range map[string]CertificateOptions{
			"no files": {},
			"missing":  {Pairs: []CertificatePair{{"missing", keyFile}}},
			keyFile:    {Pairs: []CertificatePair{{certFile, keyFile}}, ClientCAFile: keyFile},
		} {
			_, err := LoadCertificates(o)
			wantErrText(t, "LoadCertificates", err, name)
		}
	})
}

func TestG14NoHandshakeFailsWhileCertificatesAreReplaced(t *testing.T) {
	first, second := newCertificate(t, "first", nil), newCertificate(t, "second", nil)
	roots := x509.NewCertPool()
	roots.AddCert(first.Leaf)
	roots.AddCert(second.Leaf)
	d := newCertificateDir(t, first)
	ln := listen(t)
	s, _ := newServer(t, Echo, Options{})
	serveListener(t, s, Listener{Listener: ln, TLSConfig: d.store.Config()})
	var done atomic.Bool
	var handshakes atomic.Int64
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for !done.Load() {
				c := dialTLS(t, ln.Addr(), &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"})
				if err := c.Handshake(); err != nil {
					t.Errorf("handshake: %v", err)
					return
				}
				handshakes.Add(1)
				_ = c.Close()
			}
		})
	}
	for i := range unlessRace(100) {
		d.replace(t, []tls.Certificate{second, first}[i%2])
		if _, err := d.store.Reload(); err != nil {
			t.Error(err)
		}
		for before := handshakes.Load(); handshakes.Load() < before+2 && !t.Failed(); {
			time.Sleep(time.Millisecond) // until clients have seen it
		}
	}
	done.Store(true)
	clients.Wait()
}

func newCertificateUntil(t *testing.T, name string, notAfter time.Time) tls.Certificate {
	t.Helper()
	return signCertificate(t, name, notAfter, nil)
}

// resumes connects to a server with config, and reports whether the session of an earlier connection was resumed.
func resumes(t *testing.T, config *tls.Config, sessions tls.ClientSessionCache) bool {
	t.Helper()
	ln := listen(t)
	near := dialTCP(t, ln.Addr())
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
	served := make(chan error, 1)
	go func() {
		session := tls.Server(far, config)
		_, err := session.Write([]byte("x")) // the client takes a ticket with its first read
		served <- errors.Join(err, session.Close())
	}()
	c := tls.Client(near, &tls.Config{InsecureSkipVerify: true, ServerName: "server", ClientSessionCache: sessions})
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Fatal(err)
	}
	return c.ConnectionState().DidResume
}

func TestTicketKeys(t *testing.T) {
	certFile, keyFile := writeCertificate(t, t.TempDir(), newCertificate(t, "server", nil))
	load := func(t *testing.T, keys []byte) *Certificates {
		t.Helper()
		s, err := LoadCertificates(CertificateOptions{Pairs: []CertificatePair{{certFile, keyFile}}, TicketKeys: keys})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	rotate := func(s *Certificates, after time.Duration) {
		s.state.With(func(st *certificatesState) { s.rotateTicketKeys(st, time.Now().Add(after), false) })
	}
	t.Run("are the same in another process that was given them", func(t *testing.T) {
		sessions := tls.NewLRUClientSessionCache(1)
		first := load(t, nil)
		wantEqual(t, "resumed at first", resumes(t, first.Config(), sessions), false)
		wantEqual(t, "resumed by the next process", resumes(t, load(t, first.TicketKeys()).Config(), sessions), true)
		wantEqual(t, "resumed by a stranger", resumes(t, load(t, nil).Config(), sessions), false)
	})
	t.Run("are kept when certificates are replaced", func(t *testing.T) {
		d := newCertificateDir(t, newCertificate(t, "server", nil))
		sessions := tls.NewLRUClientSessionCache(1)
		resumes(t, d.store.Config(), sessions)
		d.replace(t, newCertificate(t, "server", nil))
		if changed, err := d.store.Reload(); !changed || err != nil {
			t.Fatal(changed, err)
		}
		wantEqual(t, "resumed", resumes(t, d.store.Config(), sessions), true)
	})
	t.Run("change twice a day, and open tickets for half a day more", func(t *testing.T) {
		s := load(t, nil)
		old := string(s.TicketKeys())
		rotate(s, ticketKeyUse-time.Hour)
		wantEqual(t, "keys before half a day is over", string(s.TicketKeys()), old)
		rotate(s, ticketKeyUse+time.Hour)
		keys, err := parseTicketKeys(s.TicketKeys())
		if err != nil || len(keys) != 2 {
			t.Fatalf("after half a day there are %d keys, %v; want 2", len(keys), err)
		}
		sessions := tls.NewLRUClientSessionCache(1)
		resumes(t, load(t, []byte(old)).Config(), sessions)
		wantEqual(t, "resumed with a ticket of the last key", resumes(t, s.Config(), sessions), true)
		rotate(s, ticketKeyLife+time.Hour)
		resumes(t, load(t, []byte(old)).Config(), sessions)
		wantEqual(t, "resumed with an expired key", resumes(t, s.Config(), sessions), false)
	})
	t.Run("are refused if they are damaged, and not shown", func(t *testing.T) {
		const secret = "c2VjcmV0"
		for _, damaged := range []string{"", "x", `[{"key":"` + secret + `"}]`, "[{}]"} {
			_, err := LoadCertificates(CertificateOptions{Pairs: []CertificatePair{{certFile, keyFile}}, TicketKeys: []byte(damaged)})
			if err == nil || strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%q: error %v", damaged, err)
			}
		}
	})
}
