package control

import (
	"context"
	"errors"
	"net/http"
	"time"

	"echod/server"
)

// Certificates are what a Plane shows and reloads: a *server.Certificates.
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

// ReloadCertificates makes the server load its certificates again if their files have changed.
func (c *Client) ReloadCertificates(ctx context.Context) (out Reloaded, err error) {
	return out, c.call(ctx, http.MethodPost, "/v1/certificates/reload", nil, nil, &out)
}
