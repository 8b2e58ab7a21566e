package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// Certificates loads certificates from files, and loads them again when the files change. Clients get the first
// certificate that is valid for the name they ask for, or else the first of all. New certificates apply to new
// handshakes; existing connections and session tickets stay valid. All methods may be called concurrently.
type Certificates struct {
	opts       CertificateOptions
	log        *zap.Logger
	baseConfig *tls.Config
	current    atomic.Pointer[loadedCertificates]
	state      lockedValue[certificatesState]
}

// CertificateOptions configures Certificates.
type CertificateOptions struct {
	// Pairs are the files of the certificates. At least one is required.
	Pairs []CertificatePair
	// ClientCAFile holds the certificates, in PEM form, of authorities that sign clients' certificates. Empty means
	// Config.ClientCAs.
	ClientCAFile string
	// Config is what all handshakes have in common, such as MinVersion and ClientAuth. Its Certificates, GetCertificate
	// and GetConfigForClient are not used. Nil means crypto/tls's defaults.
	Config *tls.Config
	// TicketKeys is the result of Certificates.TicketKeys in another process. Clients of that process can then resume
	// their sessions with this one. Nil means new keys.
	TicketKeys []byte
	// Logger logs files that are loaded or cannot be loaded, and certificates that expire soon. Nil logs nothing.
	Logger *zap.Logger
}

// CertificatePair names the file of a certificate, followed by those of its issuers, and the file of its key, in PEM
// form.
type CertificatePair struct{ CertFile, KeyFile string }

// CertificateInfo describes a certificate in use.
type CertificateInfo struct {
	CertFile            string
	Subject             string
	Names               []string // DNS names and IP addresses
	NotBefore, NotAfter time.Time
	Loaded              time.Time
}

// loadedCertificates holds the certificates from one load of the files.
type loadedCertificates struct {
	config *tls.Config
	infos  []CertificateInfo
}

// certificatesState is the state between two checks of the files.
type certificatesState struct {
	tickets  []ticketKey // the newest first
	loaded   fingerprint // of the files in use
	failing  fingerprint // of files that could not be loaded at the last check
	reported fingerprint // of files whose error was logged
	warned   map[string]time.Duration
	reloads  uint64
	failures uint64
	err      error // of the last attempt to load
}

type fingerprint [sha256.Size]byte

// LoadCertificates loads certificates. The error names the file that is missing or wrong.
func LoadCertificates(opts CertificateOptions) (*Certificates, error) {
	if len(opts.Pairs) == 0 {
		return nil, errors.New("loading certificates: no files are named")
	}
	s := &Certificates{opts: opts, log: cmp.Or(opts.Logger, zap.NewNop())}
	if opts.Config != nil {
		s.baseConfig = opts.Config.Clone()
	} else {
		s.baseConfig = new(tls.Config)
	}
	s.baseConfig.GetCertificate = nil
	s.baseConfig.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.current.Load().config, nil }
	tickets, err := parseTicketKeys(opts.TicketKeys)
	if err != nil {
		return nil, err
	}
	files, err := s.read()
	if err != nil {
		return nil, err
	}
	loaded, err := s.parse(files)
	if err != nil {
		return nil, err
	}
	s.current.Store(loaded)
	s.state.With(func(st *certificatesState) {
		st.tickets = tickets
		st.loaded, st.warned = files.fingerprint(), make(map[string]time.Duration)
		s.rotateTicketKeys(st, time.Now(), true)
		s.warnExpiry(st, time.Now())
	})
	return s, nil
}

// Config returns the configuration for Listener.TLSConfig. It always uses the certificates loaded last.
func (s *Certificates) Config() *tls.Config { return s.baseConfig }

// Infos describes the certificates in use, in the order of CertificateOptions.Pairs.
func (s *Certificates) Infos() []CertificateInfo { return slices.Clone(s.current.Load().infos) }

// Reloads returns how often changed files were loaded, and how often that failed.
func (s *Certificates) Reloads() (loaded, failed uint64) {
	s.state.With(func(st *certificatesState) { loaded, failed = st.reloads, st.failures })
	return loaded, failed
}

// Err returns why the files cannot be loaded as they are now; nil if they can.
func (s *Certificates) Err() (err error) {
	s.state.With(func(st *certificatesState) { err = st.err })
	return err
}

// watchInterval is the time between two checks of the files.
const watchInterval = time.Second

// Watch loads the files when their contents have changed, and changes the keys of session tickets twice a day. It
// checks once a second. It returns the cause of ctx when that ends. If files cannot be loaded, it logs that, and the
// certificates in use stay. A certificate and its key are seldom replaced at the same instant, so an error is logged
// only if the next check finds the same files.
func (s *Certificates) Watch(ctx context.Context) error {
	tick := time.NewTicker(watchInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case now := <-tick.C:
			s.check(now)
		}
	}
}

func (s *Certificates) check(now time.Time) {
	s.state.With(func(st *certificatesState) {
		_, _ = s.reloadIfChanged(st, true) // logged
		s.rotateTicketKeys(st, now, false)
		s.warnExpiry(st, now)
	})
}

// Reload loads the files now if they have changed, and reports whether they have. If they cannot be loaded, the
// certificates in use stay.
func (s *Certificates) Reload() (changed bool, err error) {
	s.state.With(func(st *certificatesState) { changed, err = s.reloadIfChanged(st, false) })
	return changed, err
}

// reloadIfChanged loads the files if they have changed. With patient, it logs files that cannot be loaded only if the
// previous call found the same files.
func (s *Certificates) reloadIfChanged(st *certificatesState, patient bool) (changed bool, err error) {
	files, err := s.read()
	now := files.fingerprint()
	if err == nil && now == st.loaded {
		st.err, st.failing = nil, fingerprint{}
		return false, nil
	}
	var loaded *loadedCertificates
	if err == nil {
		loaded, err = s.parse(files)
	}
	if err == nil {
		err = s.refuseExpired(loaded)
	}
	if err != nil {
		if patient && st.failing != now {
			st.failing = now
			return false, err
		}
		st.err = err
		if st.reported != now {
			st.reported = now
			st.failures++
			s.log.Error("cannot load the changed certificates, keeping the old ones", zap.Error(err))
		}
		return false, err
	}
	s.current.Store(loaded)
	st.loaded, st.failing, st.reported, st.err = now, fingerprint{}, fingerprint{}, nil
	st.reloads++
	clear(st.warned)
	for _, info := range loaded.infos {
		s.log.Info("certificate loaded", zap.String("file", info.CertFile), zap.String("subject", info.Subject),
			zap.Strings("names", info.Names), zap.Time("expires", info.NotAfter))
	}
	return true, nil
}

// certificateFiles holds the contents of the files, in the order of the options.
type certificateFiles struct {
	certs, keys [][]byte
	clientCAs   []byte
	missing     error
}

func (s *Certificates) read() (files certificateFiles, err error) {
	read := func(name string) []byte {
		content, e := os.ReadFile(name)
		if err == nil && e != nil {
			err = fmt.Errorf("loading certificates: %w", e)
		}
		return content
	}
	for _, pair := range s.opts.Pairs {
		files.certs = append(files.certs, read(pair.CertFile))
		files.keys = append(files.keys, read(pair.KeyFile))
	}
	if s.opts.ClientCAFile != "" {
		files.clientCAs = read(s.opts.ClientCAFile)
	}
	files.missing = err
	return files, err
}

// fingerprint returns a hash of the contents.
func (f certificateFiles) fingerprint() fingerprint {
	h := sha256.New()
	for _, content := range slices.Concat(f.certs, f.keys, [][]byte{f.clientCAs}) {
		_, _ = fmt.Fprintf(h, "%d:", len(content))
		_, _ = h.Write(content)
	}
	_, _ = fmt.Fprint(h, f.missing)
	return fingerprint(h.Sum(nil))
}

func (s *Certificates) parse(files certificateFiles) (*loadedCertificates, error) {
	loaded := &loadedCertificates{config: s.baseConfig.Clone()}
	loaded.config.GetConfigForClient = nil
	loaded.config.Certificates = nil
	for i, pair := range s.opts.Pairs {
		cert, err := tls.X509KeyPair(files.certs[i], files.keys[i])
		if err != nil {
			return nil, fmt.Errorf("loading certificate %s with key %s: %w", pair.CertFile, pair.KeyFile, err)
		}
		loaded.config.Certificates = append(loaded.config.Certificates, cert)
		loaded.infos = append(loaded.infos, describeCertificate(pair.CertFile, cert.Leaf))
	}
	if s.opts.ClientCAFile != "" {
		loaded.config.ClientCAs = x509.NewCertPool()
		if !loaded.config.ClientCAs.AppendCertsFromPEM(bytes.TrimSpace(files.clientCAs)) {
			return nil, fmt.Errorf("loading certificates of authorities from %s: the file has none in PEM form",
				s.opts.ClientCAFile)
		}
	}
	return loaded, nil
}

func describeCertificate(file string, leaf *x509.Certificate) CertificateInfo {
	info := CertificateInfo{
		CertFile: file, Subject: labelText(leaf.Subject.String()),
		NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, Loaded: time.Now(),
	}
	for _, name := range leaf.DNSNames {
		info.Names = append(info.Names, labelText(name))
	}
	for _, ip := range leaf.IPAddresses {
		info.Names = append(info.Names, ip.String())
	}
	return info
}

// refuseExpired returns an error if an expired certificate would replace one that is valid.
func (s *Certificates) refuseExpired(loaded *loadedCertificates) error {
	now, current := time.Now(), s.current.Load()
	for i, info := range loaded.infos {
		if info.NotAfter.Before(now) && current.infos[i].NotAfter.After(now) {
			return fmt.Errorf("loading certificate %s: it expired at %s", info.CertFile,
				info.NotAfter.Format(time.RFC3339))
		}
	}
	return nil
}

// expiryWarnings are the times before the end of a certificate at which a warning is logged, longest first.
var expiryWarnings = []time.Duration{14 * 24 * time.Hour, 7 * 24 * time.Hour, 3 * 24 * time.Hour, 24 * time.Hour, 0}

// warnExpiry logs certificates that expire soon, once for each of expiryWarnings. Only the last quarter of a
// certificate's life counts, so that short-lived ones are not always about to expire.
func (s *Certificates) warnExpiry(st *certificatesState, now time.Time) {
	for _, info := range s.current.Load().infos {
		left := info.NotAfter.Sub(now)
		for _, step := range slices.Backward(expiryWarnings) {
			if left > min(step, info.NotAfter.Sub(info.NotBefore)/4) {
				continue
			}
			if before, ok := st.warned[info.CertFile]; ok && before <= step {
				break
			}
			st.warned[info.CertFile] = step
			fields := []zap.Field{
				zap.String("file", info.CertFile), zap.String("subject", info.Subject),
				zap.Time("expires", info.NotAfter),
			}
			if left <= 0 {
				s.log.Error("certificate has expired", fields...)
			} else {
				s.log.Warn("certificate expires soon", append(fields, zap.Duration("left", left.Round(time.Minute)))...)
			}
			break
		}
	}
}

// ticketKey is a key with which session tickets are encrypted for half a day.
type ticketKey struct {
	Key     []byte    `json:"key"` // ticketKeySize bytes
	Created time.Time `json:"created"`
}

// Bounds of ticket keys. A ticket is valid for at most a day, although crypto/tls promises clients a week. So a
// stolen key decrypts the tickets of one day only.
const (
	ticketKeySize = 32
	ticketKeyUse  = 12 * time.Hour   // for which new tickets are encrypted with a key
	ticketKeyLife = 2 * ticketKeyUse // for which a key decrypts tickets
	maxTicketKeys = int(ticketKeyLife/ticketKeyUse) + 1
)

// TicketKeys returns the keys of session tickets, for CertificateOptions.TicketKeys in the process that serves next.
// They are secret: with them, recorded connections of TLS 1.2 clients that resumed a session can be decrypted.
func (s *Certificates) TicketKeys() (keys []byte) {
	s.state.With(func(st *certificatesState) { keys, _ = json.Marshal(st.tickets) }) // encoding this type cannot fail
	return keys
}

// parseTicketKeys is the inverse of Certificates.TicketKeys. Its errors do not contain the keys.
func parseTicketKeys(encoded []byte) (keys []ticketKey, err error) {
	if encoded == nil {
		return nil, nil
	}
	if json.Unmarshal(encoded, &keys) != nil {
		return nil, errors.New("reading the keys of session tickets: not what Certificates.TicketKeys returns")
	}
	for _, k := range keys {
		if len(k.Key) != ticketKeySize {
			return nil, fmt.Errorf("reading the keys of session tickets: a key of %d bytes: want %d", len(k.Key), ticketKeySize)
		}
	}
	return keys[:min(len(keys), maxTicketKeys)], nil // another version may keep more
}

// rotateTicketKeys makes a new key if the newest is older than ticketKeyUse, and drops keys that are older than
// ticketKeyLife. With apply, it also sets keys that have not changed.
func (s *Certificates) rotateTicketKeys(st *certificatesState, now time.Time, apply bool) {
	if len(st.tickets) == 0 || now.Sub(st.tickets[0].Created) >= ticketKeyUse {
		fresh := ticketKey{Key: make([]byte, ticketKeySize), Created: now}
		_, _ = rand.Read(fresh.Key) // never fails
		st.tickets = slices.Insert(st.tickets, 0, fresh)
		apply = true
	}
	if !apply {
		return
	}
	st.tickets = slices.DeleteFunc(st.tickets, func(k ticketKey) bool { return now.Sub(k.Created) >= ticketKeyLife })
	var keys [][ticketKeySize]byte
	for _, k := range st.tickets {
		keys = append(keys, [ticketKeySize]byte(k.Key))
	}
	s.baseConfig.SetSessionTicketKeys(keys) // for the certificates that are loaded next
	s.current.Load().config.SetSessionTicketKeys(keys)
}
