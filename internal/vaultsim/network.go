// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/logical"
)

// Send sends the request that a fault of the wire was asked about.
type Send = func() (*http.Response, error)

// Wire is the plugin's way to the network. It records the requests and can fail them.
type Wire struct {
	mu       sync.Mutex // guards what follows
	to       http.RoundTripper
	fault    func(req *http.Request, send Send) (*http.Response, error)
	requests []string
	header   http.Header
}

// Network returns the way to the network, by Vault.Wire, of the plugin process that was given
// config. When that process has ended, it sends nothing more and gives the context's error:
// Vault has no such thing, but nor does a process that was killed send anything.
func Network(config *logical.BackendConfig) http.RoundTripper {
	return &network{config.StorageView.(*view)}
}

type network struct{ view *view }

func (n *network) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := n.view.process.Err(); err != nil {
		return nil, err
	}
	return n.view.wire.RoundTrip(req)
}

// Connect makes requests go to another place than http.DefaultTransport.
func (w *Wire) Connect(to http.RoundTripper) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.to = to
}

// SetFault makes f answer each request of the plugin; nil: the place that Connect has named
// does. f may call send, at most once, and change the fault. It is called without a lock.
func (w *Wire) SetFault(f func(req *http.Request, send Send) (*http.Response, error)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = f
}

// AfterCall is a fault that calls do once, before the answer to the nth request from now on,
// counted from 1, arrives.
func (w *Wire) AfterCall(n int, do func()) {
	var answers atomic.Int64
	w.SetFault(func(_ *http.Request, send Send) (*http.Response, error) {
		resp, err := send()
		if answers.Add(1) == int64(n) {
			do()
		}
		return resp, err
	})
}

// BeforeEach is a fault that calls do before each request is sent, with its number from now on,
// counted from 1. The requests that do makes are counted too.
func (w *Wire) BeforeEach(do func(n int, req *http.Request)) {
	var n atomic.Int64
	w.SetFault(func(req *http.Request, send Send) (*http.Response, error) {
		do(int(n.Add(1)), req)
		return send()
	})
}

// RoundTrip records the request and has it answered.
func (w *Wire) RoundTrip(req *http.Request) (*http.Response, error) {
	text := req.Method + " " + strings.TrimPrefix(req.URL.RequestURI(), "/v1")
	if req.Body != nil {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return nil, err
		}
		text += " " + string(body)
		req = req.Clone(req.Context())
		req.Body = io.NopCloser(bytes.NewReader(body))
	}
	w.mu.Lock()
	w.requests, w.header = append(w.requests, text), req.Header
	fault, to := w.fault, w.to
	w.mu.Unlock()
	if to == nil {
		to = http.DefaultTransport
	}
	if fault == nil {
		return to.RoundTrip(req)
	}
	return fault(req, func() (*http.Response, error) { return to.RoundTrip(req) })
}

// Sent returns the requests since it was last called, as method, path below /v1 with its
// query, and body, if there is one, with a space between them.
func (w *Wire) Sent() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	requests := w.requests
	w.requests = nil
	return requests
}

// HasSent tells whether one of the requests since Sent was last called has text in it.
func (w *Wire) HasSent(text string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.ContainsFunc(w.requests, func(r string) bool { return strings.Contains(r, text) })
}

// Header returns the header of the last request.
func (w *Wire) Header() http.Header {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.header
}

// NewCertificate returns a certificate for clients that signs itself, and its key, in PEM. It
// is valid for 100 years.
func NewCertificate(tb testing.TB) (certificate, key string) {
	tb.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().AddDate(100, 0, 0), IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	raw, keyErr := x509.MarshalPKCS8PrivateKey(private)
	if err != nil || keyErr != nil {
		tb.Fatal(err, keyErr)
	}
	return PEM("CERTIFICATE", der), PEM("PRIVATE KEY", raw)
}

// PEM returns a block of this kind in PEM.
func PEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// ServeTLS serves handler over TLS until the test's end. It returns the base URL, which ends
// in /v1, and the private authority to trust, in PEM. Unless client is empty, each client must
// show the certificate client (PEM) or one that it has signed.
func ServeTLS(tb testing.TB, handler http.Handler, client string) (address, ca string) {
	tb.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.EnableHTTP2 = true
	if client != "" {
		server.TLS = &tls.Config{ClientCAs: x509.NewCertPool(), ClientAuth: tls.RequireAndVerifyClientCert}
		server.TLS.ClientCAs.AppendCertsFromPEM([]byte(client))
	}
	server.StartTLS()
	tb.Cleanup(server.Close)
	return server.URL + "/v1", PEM("CERTIFICATE", server.Certificate().Raw)
}
