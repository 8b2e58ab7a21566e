package server

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"testing"
	"time"
)

// tlsConfigs returns the configurations of a server and of a client that trusts it.
func tlsConfigs(t *testing.T) (forServer, forClient *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{{127, 0, 0, 1}}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, &tls.Config{RootCAs: roots}
}

// serveTLS starts a server behind TLS, and connects a client.
func serveTLS(t *testing.T, h Handler, o Options) (*Server, *tls.Conn, net.Addr) {
	t.Helper()
	forServer, forClient := tlsConfigs(t)
	ln := listen(t)
	s, _ := newServer(t, h, o)
	serve(t, s, tls.NewListener(ln, forServer))
	forClient.ServerName = "127.0.0.1"
	c := tls.Client(dialTCP(t, ln.Addr()), forClient)
	return s, c, ln.Addr()
}

func TestTLSIsServedToldAndEndedCleanly(t *testing.T) {
	s, c, addr := serveTLS(t, Echo, Options{})
	send(t, c, "hello")
	receives(t, c, "hello")
	silent := dialTCP(t, addr) // never even begins the handshake
	awaitConns(t, s, 2)
	s.StartDrain(DrainOptions{Grace: 2 * time.Second, Reason: "x"})
	receives(t, c, "\nSHUTDOWN 2 x\n")
	send(t, c, "last words")
	_ = c.CloseWrite()
	receivesAll(t, c, "last words")
	<-s.Done()
	if took := reportOf(s.Report()).Took; took > 2*time.Second+budget {
		t.Errorf("drain took %v, want at most the grace of 2s and %v", took, budget)
	}
	_ = silent
	wantClosed(t, s, map[Reason]uint64{ReasonClientLeft: 1, ReasonDeadline: 1})
}

// TLS's own Close waits five seconds for its farewell to be taken. Below it is a fake connection,
// whose window is shut to the last byte, and real time, since TLS waits on mutexes.
func TestG6ATLSClientThatNeverReadsIsClosedWithinTheBudget(t *testing.T) {
	const grace = 100 * time.Millisecond
	forServer, forClient := tlsConfigs(t)
	forClient.ServerName = "127.0.0.1"
	ln := newFakeListener()
	s, _ := newServer(t, HandlerFunc(untilWriteFails), Options{})
	serve(t, s, tls.NewListener(ln, forServer))
	nc, err := ln.dialFrom("198.51.100.1")
	if err != nil {
		t.Fatal(err)
	}
	if err := tls.Client(nc, forClient).Handshake(); err != nil {
		t.Fatal(err)
	}
	if _, took := shutdownIn(t, s, grace, "x"); took > grace+budget {
		t.Errorf("drain took %v, want at most the grace of %v and %v", took, grace, budget)
	}
}

// untilWriteFails writes for as long as it can.
func untilWriteFails(_ context.Context, c *Conn) error {
	p := make([]byte, 64<<10)
	for {
		if _, err := c.Write(p); err != nil {
			return err
		}
	}
}
