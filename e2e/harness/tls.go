// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"time"
)

// MutualTLS is a server that demands a certificate of its clients, and what a client needs
// to reach it. A private authority has signed the certificates of both.
type MutualTLS struct {
	Server                     *tls.Config
	CA, Certificate, ClientKey string // PEM; the last two are the client's
}

// NewMutualTLS makes one for a server at an IP address.
func NewMutualTLS(address string) (*MutualTLS, error) {
	ca := &x509.Certificate{Subject: pkix.Name{CommonName: "private authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	authority, err := sign(ca, ca, &caKey.PublicKey, caKey)
	if err != nil {
		return nil, err
	}
	pair := func(template *x509.Certificate) (certificate, key string, err error) {
		template.KeyUsage = x509.KeyUsageDigitalSignature
		private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return "", "", err
		}
		certificate, certificateErr := sign(template, ca, &private.PublicKey, caKey)
		der, keyErr := x509.MarshalPKCS8PrivateKey(private)
		return certificate, toPEM("PRIVATE KEY", der), errors.Join(certificateErr, keyErr)
	}
	m := &MutualTLS{CA: authority}
	certificate, key, err := pair(&x509.Certificate{Subject: pkix.Name{CommonName: "simulated OpenAI"},
		IPAddresses: []net.IP{net.ParseIP(address)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	if err != nil {
		return nil, err
	}
	server, err := tls.X509KeyPair([]byte(certificate), []byte(key))
	if err != nil {
		return nil, err
	}
	m.Certificate, m.ClientKey, err = pair(&x509.Certificate{Subject: pkix.Name{CommonName: "Vault"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	m.Server = &tls.Config{Certificates: []tls.Certificate{server}, ClientCAs: x509.NewCertPool(),
		ClientAuth: tls.RequireAndVerifyClientCert}
	m.Server.ClientCAs.AppendCertsFromPEM([]byte(authority))
	return m, err
}

// sign returns a certificate in PEM that is valid for some hours.
func sign(template, parent *x509.Certificate, key *ecdsa.PublicKey, parentKey *ecdsa.PrivateKey) (string, error) {
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key, parentKey)
	return toPEM("CERTIFICATE", der), err
}

func toPEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}
