// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"regexp"
	"slices"
	"strings"
	"time"
)

// JWKS and JWT. Where OpenAI's documents leave a question open:
//   - a JWKS has keys and nothing else, and at least one of them;
//   - a key is RSA of at least 2048 bits, or EC P-256, with registered public members only;
//     use, alg and key_ops, if given, say that it verifies RS256 or ES256;
//   - exp has no leeway, nbf and iat have clockSkew;
//   - of an aud that is a list, one has to be the provider's audience;
//   - a JWT can be exchanged more than once, and may live for any time.
const (
	clockSkew  = 60 * time.Second
	minRSABits = 2048
)

// jwk is an uploaded public key.
type jwk struct {
	id     string // kid
	alg    string // RS256 or ES256
	public interface{ Equal(crypto.PublicKey) bool }
	ready  time.Time // does not count before
}

var (
	publicMembers = []string{"kty", "n", "e", "crv", "x", "y", "kid", "alg", "use", "key_ops",
		"x5u", "x5c", "x5t", "x5t#S256"}
	privateMembers = []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"}
)

// decodeObject decodes a JSON object; its numbers are json.Number.
func decodeObject(text []byte) (map[string]any, error) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	var v map[string]any
	if err := decoder.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); err != io.EOF || v == nil {
		return nil, errors.New("not a JSON object")
	}
	return v, nil
}

func parseJWKS(name string, raw json.RawMessage) (any, error) {
	set, err := decodeObject(raw)
	keys, ok := set["keys"].([]any)
	if err != nil || !ok || len(set) != 1 {
		return nil, badRequest(name, "invalid_type", "Invalid type for '%s': expected an object with keys alone.", name)
	}
	if len(keys) == 0 {
		return nil, badRequest(name+".keys", "invalid_value", "Invalid '%s.keys': expected at least one key.", name)
	}
	var v verification
	if v.jwks, err = json.Marshal(set); err != nil { // not raw, which may have a member twice
		return nil, err
	}
	for _, key := range keys {
		members, _ := key.(map[string]any)
		k, err := parseJWK(members)
		if err != nil {
			return nil, badRequest(name+".keys", "invalid_jwk", "Invalid key in '%s': %s.", name, err)
		}
		if slices.ContainsFunc(v.keys, func(other jwk) bool { return other.id == k.id }) {
			return nil, badRequest(name+".keys", "invalid_jwk", "Invalid '%s': duplicate kid '%s'.", name, k.id)
		}
		v.keys = append(v.keys, k)
	}
	return v, nil
}

func parseJWK(members map[string]any) (k jwk, err error) {
	for name := range members {
		switch {
		case slices.Contains(privateMembers, name):
			return k, errors.New("it has the private member " + name)
		case !slices.Contains(publicMembers, name):
			return k, errors.New("it has the unknown member " + name)
		}
	}
	if k.id, _ = members["kid"].(string); k.id == "" {
		return k, errors.New("it has no kid")
	}
	switch members["kty"] {
	case "RSA":
		k.alg = "RS256"
		k.public, err = parseRSA(members)
	case "EC":
		k.alg = "ES256"
		k.public, err = parseEC(members)
	default:
		err = errors.New("kty is not RSA or EC")
	}
	if err != nil {
		return k, err
	}
	for name, want := range map[string]string{"alg": k.alg, "use": "sig"} {
		if got, there := members[name]; there && got != want {
			return k, errors.New(name + " is not " + want)
		}
	}
	if got, there := members["key_ops"]; there {
		if ops, _ := got.([]any); !slices.Equal(ops, []any{"verify"}) {
			return k, errors.New("key_ops is not verify alone")
		}
	}
	return k, nil
}

func parseRSA(members map[string]any) (*rsa.PublicKey, error) {
	n, errN := number(members["n"])
	e, errE := number(members["e"])
	switch {
	case errN != nil || errE != nil:
		return nil, errors.New("n or e is not a number in base64url")
	case n.BitLen() < minRSABits || n.Bit(0) == 0:
		return nil, errors.New("n is even or shorter than 2048 bits")
	case e.BitLen() > 31 || e.Int64() < 3 || e.Bit(0) == 0:
		return nil, errors.New("e is not an odd number from 3 to 2^31-1")
	}
	return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
}

func parseEC(members map[string]any) (*ecdsa.PublicKey, error) {
	x, errX := octets(members["x"])
	y, errY := octets(members["y"])
	if members["crv"] != "P-256" || errX != nil || errY != nil || len(x) != 32 || len(y) != 32 {
		return nil, errors.New("it is not of the curve P-256")
	}
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), slices.Concat([]byte{4}, x, y))
	if err != nil {
		return nil, errors.New("x and y are not on the curve")
	}
	return key, nil
}

// octets decodes base64url without padding, newlines and surplus bits.
func octets(v any) ([]byte, error) {
	text, ok := v.(string)
	if !ok || strings.ContainsAny(text, "\r\n") {
		return nil, errors.New("not base64url")
	}
	return base64.RawURLEncoding.Strict().DecodeString(text)
}

// number decodes a number, which has no leading zeros: RFC 7518, section 2.
func number(v any) (*big.Int, error) {
	b, err := octets(v)
	if err != nil || len(b) == 0 || b[0] == 0 {
		return nil, errors.New("not a number in base64url")
	}
	return new(big.Int).SetBytes(b), nil
}

// ready is when a key counts that is uploaded in place of v: later, unless v has it.
func (v *verification) ready(k jwk, later time.Time) time.Time {
	for _, old := range v.keys {
		if old.id == k.id && old.public.Equal(k.public) {
			return old.ready
		}
	}
	return later
}

var jwtPattern = regexp.MustCompile(`^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$`)

// verifyJWT returns the claims of a JWT that p vouches for, and how long it still lives.
// Its errors are those of the token endpoint.
func (p *provider) verifyJWT(token string, now time.Time) (map[string]any, time.Duration, error) {
	malformed := oauthError(400, "invalid_subject_token", "The subject token is not a JWT.")
	if !jwtPattern.MatchString(token) {
		return nil, 0, malformed
	}
	parts := strings.Split(token, ".")
	var decoded [3][]byte
	for i, part := range parts {
		var err error
		if decoded[i], err = octets(part); err != nil {
			return nil, 0, malformed
		}
	}
	header, errHeader := decodeObject(decoded[0])
	claims, errClaims := decodeObject(decoded[1])
	if errHeader != nil || errClaims != nil {
		return nil, 0, malformed
	}
	key, err := p.keyFor(header, now)
	if err != nil {
		return nil, 0, err
	}
	if !key.verify([]byte(parts[0]+"."+parts[1]), decoded[2]) {
		return nil, 0, badJWT("its signature is wrong")
	}
	life, err := p.checkClaims(claims, now)
	return claims, life, err
}

func badJWT(reason string) error {
	return oauthError(401, "invalid_subject_token", "The subject token is refused: %s.", reason)
}

// keyFor finds the key that a JWT names in its header.
func (p *provider) keyFor(header map[string]any, now time.Time) (*jwk, error) {
	alg, _ := header["alg"].(string)
	id, _ := header["kid"].(string)
	_, critical := header["crit"]
	switch {
	case alg != "RS256" && alg != "ES256":
		return nil, badJWT("its alg is not RS256 or ES256")
	case id == "":
		return nil, badJWT("it has no kid")
	case critical:
		return nil, badJWT("its header has crit")
	case p.verification.jwks == nil:
		return nil, badJWT("the keys of its issuer could not be fetched")
	}
	for i := range p.verification.keys {
		key := &p.verification.keys[i]
		if key.id != id || now.Before(key.ready) {
			continue
		}
		if key.alg != alg {
			return nil, badJWT("its key is for another alg")
		}
		return key, nil
	}
	return nil, badJWT("its kid is none of the provider's keys")
}

func (k *jwk) verify(signed, signature []byte) bool {
	digest := sha256.Sum256(signed)
	switch public := k.public.(type) {
	case *rsa.PublicKey:
		return rsa.VerifyPKCS1v15(public, crypto.SHA256, digest[:], signature) == nil
	case *ecdsa.PublicKey:
		if len(signature) != 64 {
			return false
		}
		r, s := new(big.Int).SetBytes(signature[:32]), new(big.Int).SetBytes(signature[32:])
		return ecdsa.Verify(public, digest[:], r, s)
	}
	return false
}

// checkClaims checks the claims of a JWT with a good signature, and returns how long it lives.
func (p *provider) checkClaims(claims map[string]any, now time.Time) (time.Duration, error) {
	issuer, _ := claims["iss"].(string)
	subject, _ := claims["sub"].(string)
	audiences, _ := claims["aud"].([]any)
	if one, ok := claims["aud"].(string); ok {
		audiences = []any{one}
	}
	expires, hasExp := claimTime(claims["exp"])
	issued, hasIat := claimTime(claims["iat"])
	notBefore, hasNbf := claimTime(claims["nbf"])
	_, nbf := claims["nbf"]
	switch {
	case issuer == "" || strings.TrimSuffix(issuer, "/") != strings.TrimSuffix(p.Issuer, "/"):
		return 0, badJWT("its iss is not the provider's issuer")
	case !slices.Contains(audiences, any(p.Audience)):
		return 0, badJWT("its aud is not the provider's audience")
	case subject == "":
		return 0, badJWT("it has no sub")
	case !hasExp || !hasIat || nbf && !hasNbf:
		return 0, badJWT("its exp, iat or nbf is not a time")
	case issued.After(now.Add(clockSkew)):
		return 0, badJWT("its iat is in the future")
	case nbf && notBefore.After(now.Add(clockSkew)):
		return 0, badJWT("its nbf is in the future")
	case !now.Before(expires):
		return 0, badJWT("it has expired")
	}
	return expires.Sub(now), nil
}

// claimTime is a time in seconds since 1970, to the microsecond, up to the year 9999.
func claimTime(v any) (time.Time, bool) {
	number, _ := v.(json.Number)
	seconds, err := number.Float64()
	if err != nil || seconds < 0 || seconds > 253402300799 {
		return time.Time{}, false
	}
	return time.UnixMicro(int64(seconds * 1e6)), true
}
