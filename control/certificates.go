package control

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"echod/server"
)

// Certificates is the part of *server.Certificates that a Plane uses.
type Certificates interface {
	Infos() []server.CertificateInfo
	Reload() (changed bool, err error)
}

// Certificate is a certificate that the server shows to clients.
type Certificate struct {
	File             string    `json:"file"`
	Subject          string    `json:"subject"`
	Names            []string  `json:"names"` // DNS names and IP addresses
	NotBefore        time.Time `json:"not_before"`
	NotAfter         time.Time `json:"not_after"`
	ExpiresInSeconds float64   `json:"expires_in_seconds"` // negative if it has expired
	Loaded           time.Time `json:"loaded"`
}

// Reloaded answers POST /v1/certificates/reload.
type Reloaded struct {
	Changed      bool          `json:"changed"`
	Certificates []Certificate `json:"certificates"`
}

func (p *Plane) postReload(w *response, r *http.Request) error {
	if err := errors.Join(decodeQuery(r, nil), decodeBody(w, r, nil)); err != nil {
		return err
	}
	if p.certificates == nil {
		return notFound("the server has no certificates: it does not serve TLS")
	}
	changed, err := p.certificates.Reload()
	if err != nil {
		return &Problem{
			Type: ProblemCertificate, Title: "The certificates cannot be loaded",
			Status: http.StatusUnprocessableEntity,
			Detail: err.Error() + "; the old ones stay in use",
		}
	}
	return answerJSON(w, http.StatusOK, Reloaded{Changed: changed, Certificates: wireCertificates(p.certificates)})
}

func wireCertificates(c Certificates) []Certificate {
	if c == nil {
		return nil
	}
	out := []Certificate{}
	for _, info := range c.Infos() {
		out = append(out, Certificate{
			File: info.CertFile, Subject: info.Subject, Names: append([]string{}, info.Names...),
			NotBefore: info.NotBefore, NotAfter: info.NotAfter, ExpiresInSeconds: time.Until(info.NotAfter).Seconds(),
			Loaded: info.Loaded,
		})
	}
	return out
}

// hasIdentity reports whether a name in the client's certificate matches pattern: its subject, as it is listed, the
// subject's common name, or an alternative name. In the pattern, * stands for any text. Every client matches an empty
// one.
func hasIdentity(c server.ConnInfo, pattern string) bool {
	if pattern == "" {
		return true
	}
	subject, ok := c.Labels[server.LabelSubject]
	if !ok {
		return false
	}
	if matchesPattern(subject, pattern) {
		return true
	}
	for part := range strings.SplitSeq(subject, ",") {
		if name, ok := strings.CutPrefix(part, "CN="); ok && matchesPattern(name, pattern) {
			return true
		}
	}
	for name := range strings.SplitSeq(c.Labels[server.LabelNames], ",") {
		if name != "" && matchesPattern(name, pattern) {
			return true
		}
	}
	return false
}

// matchesPattern reports whether s is pattern, in which * stands for any text.
func matchesPattern(s, pattern string) bool {
	first, rest, found := strings.Cut(pattern, "*")
	s, ok := strings.CutPrefix(s, first)
	if !found || !ok {
		return ok && s == ""
	}
	for {
		var part string
		part, rest, found = strings.Cut(rest, "*")
		if !found {
			return strings.HasSuffix(s, part)
		}
		_, s, ok = strings.Cut(s, part)
		if !ok {
			return false
		}
	}
}

// ReloadCertificates makes the server load its certificates again if their files have changed.
func (c *Client) ReloadCertificates(ctx context.Context) (out Reloaded, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/certificates/reload", nil, nil, &out)
}
