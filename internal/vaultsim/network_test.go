// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"strings"
	"testing"
)

// answers is a transport that answers with this status, and with the request's body.
type answers int

func (status answers) RoundTrip(req *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: int(status), Header: http.Header{}, Body: req.Body, Request: req}, nil
}

// TestWire: requests are recorded, and a fault can answer them, send them or do something between.
func TestWire(t *testing.T) {
	w := &Wire{}
	w.Connect(answers(200))
	send := func(body string) (status int, echo string) {
		t.Helper()
		const url = "https://api.openai.com/v1/x?y=1"
		req, err := http.NewRequestWithContext(t.Context(), "POST", url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Key", body)
		resp, err := w.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text)
	}
	expect := func(what, body string, wantStatus int) {
		t.Helper()
		status, echo := send(body)
		check(t, what+": status", status, wantStatus)
		check(t, what+": body", echo, body)
	}
	expect("no fault", "a", 200)
	check(t, "sent", w.HasSent("x?y=1 a"), true)
	Same(t, "requests", w.Sent(), "[POST /x?y=1 a]")
	check(t, "sent before", w.HasSent("a"), false)
	w.SetFault(func(req *http.Request, _ Send) (*http.Response, error) { return answers(500).RoundTrip(req) })
	expect("fault", "b", 500)
	calls := 0
	w.AfterCall(2, func() { calls++ })
	for i, want := range []int{0, 1, 1} {
		expect("after the second call", "c", 200)
		if calls != want {
			t.Errorf("calls after request %d: got %d, want %d", i, calls, want)
		}
	}
	w.BeforeEach(func(n int, req *http.Request) { calls = 10*n + len(req.Method) })
	expect("before each", "d", 200)
	expect("before each", "e", 200)
	check(t, "number and request", calls, 24)
	w.SetFault(nil)
	expect("no fault any more", "c", 200)
	check(t, "header", w.Header().Get("Key"), "c")
	check(t, "requests", len(w.Sent()), 7)
}

// TestServeTLS: a client needs the authority and, where that is demanded, the certificate.
func TestServeTLS(t *testing.T) {
	certificate, key := NewCertificate(t)
	pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
	if err != nil {
		t.Fatal(err)
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto+r.URL.Path) })
	for _, demanded := range []string{"", certificate} {
		address, ca := ServeTLS(t, handler, demanded)
		get := func(config *tls.Config) string {
			transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
			defer transport.CloseIdleConnections()
			resp, err := (&http.Client{Transport: transport}).Get(address)
			if err != nil {
				return "refused"
			}
			defer resp.Body.Close()
			body, _ := io.ReadAll(resp.Body)
			return string(body)
		}
		roots := x509.NewCertPool()
		check(t, "authority", roots.AppendCertsFromPEM([]byte(ca)), true)
		check(t, "unknown authority", get(&tls.Config{}), "refused")
		want := map[bool]string{true: "HTTP/2.0/v1", false: "refused"}[demanded == ""]
		check(t, "no certificate", get(&tls.Config{RootCAs: roots}), want)
		check(t, "certificate", get(&tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}), "HTTP/2.0/v1")
	}
}
