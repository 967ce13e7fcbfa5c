// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// sign makes a JWT, whose key is RSA's or EC's.
func sign(t *testing.T, key crypto.Signer, header, claims obj) string {
	t.Helper()
	text := b64([]byte(encode(t, header))) + "." + b64([]byte(encode(t, claims)))
	digest := sha256.Sum256([]byte(text))
	if ec, ok := key.(*ecdsa.PrivateKey); ok {
		r, s, err := ecdsa.Sign(rand.Reader, ec, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return text + "." + b64(slices.Concat(r.FillBytes(make([]byte, 32)), s.FillBytes(make([]byte, 32))))
	}
	return text + "." + b64(must(key.Sign(rand.Reader, digest[:], crypto.SHA256)))
}

// federation is a server with a provider and a rule, and a JWT that the rule matches.
type federation struct {
	*Server
	provider, account, rule string
	header, claims          obj
}

// newFederation makes a federation, for a synctest bubble. The JWT lives for 10 minutes.
func newFederation(t *testing.T, provider, rule obj) *federation {
	t.Helper()
	f := &federation{Server: New()}
	f.provider = newProvider(t, f.Server, provider)
	f.rule, f.account = newRule(t, f.Server, f.provider, rule)
	f.header = obj{"alg": "RS256", "typ": "JWT", "kid": "one"}
	now := time.Now().Unix()
	f.claims = obj{"iss": "https://vault.invalid", "aud": "aud", "sub": "s", "iat": now, "exp": now + 600}
	return f
}

func (f *federation) jwt(t *testing.T, claims obj) string {
	t.Helper()
	return sign(t, rsaKeys()[0], f.header, with(f.claims, claims))
}

// request is the body of an exchange.
func (f *federation) request(jwt string) obj {
	return obj{
		"grant_type": grantType, "subject_token_type": subjectTypes[0], "subject_token": jwt,
		"identity_provider_id": f.provider, "service_account_id": f.account,
	}
}

// post sends a body to the token endpoint.
func post(t *testing.T, s *Server, body string, header ...string) (int, answerMap) {
	t.Helper()
	const url = "https://auth.openai.com/oauth/token"
	req, err := http.NewRequestWithContext(t.Context(), "POST", url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	return send(t, s, req)
}

// token is an exchange that must succeed.
func (f *federation) token(t *testing.T, claims obj) answerMap {
	t.Helper()
	status, a := post(t, f.Server, encode(t, f.request(f.jwt(t, claims))))
	if status != 200 {
		t.Fatalf("got %d %v, want 200", status, a)
	}
	return a
}

// denied is an exchange that must fail so, in OAuth's form.
func denied(t *testing.T, s *Server, what, body string, status int, code string, header ...string) {
	t.Helper()
	got, a := post(t, s, body, header...)
	text, described := a["error_description"].(string)
	if got != status || a["error"] != code || !described || text == "" || len(a) != 2 || strings.Contains(text, "eyJ") {
		t.Errorf("%s: got %d %v, want %d %s", what, got, a, status, code)
	}
}

func TestExchange(t *testing.T) {
	rsaKeys() // outside of the bubble
	synctest.Test(t, func(t *testing.T) {
		f := newFederation(t, nil, nil)
		a := f.token(t, nil)
		value := a.str("access_token")
		if !strings.HasPrefix(value, "eyJ") || strings.Count(value, ".") != 2 {
			t.Errorf("got token %s", value)
		}
		same(t, "answer", a, answerMap{"access_token": value, "token_type": "Bearer", "expires_in": 600.0,
			"issued_token_type": "urn:ietf:params:oauth:token-type:access_token"})
		id := f.Tokens()[0].ID
		same(t, "token", f.Tokens(), []Token{{ID: id, ServiceAccountID: f.account, RuleID: f.rule, Scopes: []string{},
			Created: time.Now(), Expires: time.Now().Add(10 * time.Minute)}})
		ok(t, f.Server, "GET", "/v1/models", "", value)
		refused(t, f.Server, "GET", projectPath, "", 401, "invalid_api_key", value)
		refused(t, f.Server, "GET", providerPath, "", 401, "invalid_api_key", value)
		calls := slices.DeleteFunc(f.Calls(), func(c Call) bool { return c.KeyID != id && c.Path != "/oauth/token" })
		same(t, "calls of the token", len(calls), 4)
		same(t, "exchange", []any{calls[0].Method, calls[0].Host, calls[0].Status, calls[0].Processed, calls[0].KeyID},
			[]any{"POST", "auth.openai.com", 200, true, ""})
		state := f.snapshot()
		same(t, "id in the state", strings.Contains(state, id), true)
		same(t, "value in calls or state", strings.Contains(encode(t, f.Calls())+state, "eyJ"), false)
		same(t, "tokens differ", f.token(t, nil).str("access_token") == value, false)

		// The life is whole seconds, an hour at most, and never longer than the JWT's.
		now := float64(time.Now().Unix())
		for exp, want := range map[float64]float64{now + 1: 1, now + 1.75: 1, now + 3600: 3600, now + 86400: 3600} {
			same(t, "expires_in", f.token(t, obj{"exp": exp})["expires_in"], any(want))
		}
		time.Sleep(10*time.Minute - 1)
		same(t, "works", f.Use(value), true)
		time.Sleep(time.Nanosecond)
		same(t, "works later", f.Use(value), false)
		refused(t, f.Server, "GET", "/v1/models", "", 401, "invalid_api_key", value)
		same(t, "tokens left", len(f.Tokens()), 2)
	})
}

func TestExchangeRequest(t *testing.T) {
	rsaKeys()
	synctest.Test(t, func(t *testing.T) {
		f := newFederation(t, nil, nil)
		good := f.request(f.jwt(t, nil))
		for _, change := range []obj{
			{"grant_type": nil}, {"subject_token_type": nil}, {"subject_token": nil}, {"identity_provider_id": nil},
			{"service_account_id": nil}, {"subject_token": ""}, {"subject_token": 1}, {"service_account_id": null},
			{"subject_token_type": "urn:ietf:params:oauth:token-type:access_token"}, {"audience": "a"},
			{"requested_token_type": accessToken}, {"expires_in": 60}, {"scope": []string{}},
		} {
			denied(t, f.Server, encode(t, change), encode(t, with(good, change)), 400, "invalid_request")
		}
		for what, body := range map[string]string{"empty": "", "array": "[]", "cut": "{", "form": "grant_type=x"} {
			denied(t, f.Server, what, body, 400, "invalid_request")
		}
		body := encode(t, good)
		denied(t, f.Server, "form", body, 400, "invalid_request", "Content-Type", "application/x-www-form-urlencoded")
		admin, _ := f.AdminKey()
		denied(t, f.Server, "admin key", body, 400, "invalid_request", "Authorization", "Bearer "+admin)
		denied(t, f.Server, "authorization", body, 400, "invalid_request", "Authorization", "")
		for name, want := range map[string]struct {
			status int
			code   string
		}{
			"grant_type":           {400, "unsupported_grant_type"},
			"identity_provider_id": {401, "invalid_client"},
			"service_account_id":   {400, "invalid_target"},
		} {
			denied(t, f.Server, name, encode(t, with(good, obj{name: "unknown"})), want.status, want.code)
		}
		same(t, "tokens", len(f.Tokens()), 0)

		for _, change := range []obj{
			nil, {"subject_token_type": subjectTypes[1]}, {"client_id": "c"}, {"scope": "api.all.write"},
		} {
			status, a := post(t, f.Server, encode(t, with(good, change)))
			same(t, "status with "+encode(t, change), status, 200)
			same(t, "scope", a["scope"], nil)
		}
		status, a := call(t, f.Server, "POST", "/v1/oauth/token", body)
		same(t, "below /v1", []any{status, a.str("error", "type")}, []any{404, "invalid_request_error"})
	})
}

func TestExchangeJWT(t *testing.T) {
	rsaKeys()
	synctest.Test(t, func(t *testing.T) {
		f := newFederation(t, obj{"verification": uploaded(rsaJWK("one", rsaKeys()[0]), ecJWK("ec", ecKey()))}, nil)
		now := time.Now().Unix()
		bad := func(what, jwt string, status int) {
			t.Helper()
			denied(t, f.Server, what, encode(t, f.request(jwt)), status, "invalid_subject_token")
		}
		for _, change := range []obj{
			{"iss": nil}, {"iss": "https://other.invalid"}, {"iss": "https://vault.invalid//"}, {"iss": 1},
			{"aud": nil}, {"aud": "other"}, {"aud": []string{"other"}}, {"aud": []string{}}, {"aud": "AUD"},
			{"sub": nil}, {"sub": ""}, {"sub": 1},
			{"exp": nil}, {"exp": now}, {"exp": now - 1}, {"exp": "9999999999"}, {"exp": 1e300}, {"exp": -1},
			{"exp": float64(now) + 0.5}, // less than a second
			{"iat": nil}, {"iat": now + 61}, {"iat": "0"}, {"nbf": now + 61}, {"nbf": "0"}, {"nbf": null},
		} {
			bad(encode(t, change), f.jwt(t, change), 401)
		}
		for _, change := range []obj{
			{"iss": "https://vault.invalid/"}, {"aud": []string{"other", "aud"}}, {"iat": now + 60}, {"nbf": now + 60},
			{"nbf": now - 60}, {"iat": 0}, {"jti": "x"}, {"exp": float64(now) + 600.5},
		} {
			f.token(t, change)
		}
		key := rsaKeys()[0]
		for _, change := range []obj{
			{"kid": nil}, {"kid": "two"}, {"kid": ""}, {"kid": 1}, {"kid": "ec"}, {"alg": nil}, {"alg": "none"},
			{"alg": "HS256"}, {"alg": "RS512"}, {"alg": "PS256"}, {"alg": "ES256"}, {"crit": []string{"x"}},
		} {
			bad(encode(t, change), sign(t, key, with(f.header, change), f.claims), 401)
		}
		good := f.jwt(t, nil)
		parts := strings.Split(good, ".")
		other := strings.Split(f.jwt(t, obj{"sub": "other"}), ".")
		bad("other key", sign(t, rsaKeys()[1], f.header, f.claims), 401)
		bad("other claims", parts[0]+"."+other[1]+"."+parts[2], 401)
		bad("no signature", parts[0]+"."+parts[1]+".AAAA", 401)
		ec := sign(t, ecKey(), obj{"alg": "ES256", "kid": "ec"}, f.claims)
		bad("cut signature", strings.Join(strings.Split(ec, ".")[:2], ".")+"."+b64(make([]byte, 63)), 401)
		for what, jwt := range map[string]string{
			"text": "text", "two parts": parts[0] + "." + parts[1], "unsigned": parts[0] + "." + parts[1] + ".",
			"four parts": good + ".AAAA", "padding": good + "=", "space": " " + good, "surplus bits": good[:len(good)-1] + "_",
			"header": b64([]byte("[]")) + "." + parts[1] + "." + parts[2],
			"claims": parts[0] + "." + b64([]byte("{} {}")) + "." + parts[2],
		} {
			bad(what, jwt, 400)
		}
		status, a := post(t, f.Server, encode(t, f.request(ec)))
		same(t, "ES256", []any{status, a["token_type"]}, []any{200, "Bearer"})
	})
}

func TestExchangeRules(t *testing.T) {
	rsaKeys()
	synctest.Test(t, func(t *testing.T) {
		f := newFederation(t, nil, nil)
		path := providerPath + "/" + f.provider
		rulePath := path + "/federation_rules/" + f.rule
		update := func(path string, change obj) { t.Helper(); ok(t, f.Server, "POST", path, encode(t, change)) }
		body := encode(t, f.request(f.jwt(t, nil)))
		update(rulePath, obj{"enabled": false})
		denied(t, f.Server, "rule disabled", body, 403, "access_denied")
		update(rulePath, obj{"enabled": true})
		update(path, obj{"enabled": false})
		denied(t, f.Server, "provider disabled", body, 403, "unauthorized_client")
		update(path, obj{"enabled": true})
		update(path, obj{"issuer": "https://vault.invalid/"})
		f.token(t, nil)
		update(path, obj{"audience": "other"})
		denied(t, f.Server, "audience changed", body, 401, "invalid_subject_token")
		f.token(t, obj{"aud": "other"})
		update(path, obj{"audience": "aud"})
		update(path, obj{"verification": obj{"type": "discovery", "discovery_url": nil}})
		denied(t, f.Server, "discovery", body, 401, "invalid_subject_token")
		update(path, obj{"verification": uploaded(rsaJWK("one", rsaKeys()[0]))})
		other := f.AddServiceAccount(DefaultProject, "other", "member")
		ruleless := encode(t, with(f.request(f.jwt(t, nil)), obj{"service_account_id": other}))
		denied(t, f.Server, "account without a rule", ruleless, 403, "access_denied")
		f.token(t, nil)
		ok(t, f.Server, "DELETE", rulePath, "")
		denied(t, f.Server, "rule deleted", body, 403, "access_denied")
		ok(t, f.Server, "DELETE", path, "")
		denied(t, f.Server, "provider deleted", body, 401, "invalid_client")
		same(t, "tokens live on", len(f.Tokens()), 3)

		f = newFederation(t, nil, nil)
		f.token(t, nil)
		body = encode(t, f.request(f.jwt(t, nil)))
		ok(t, f.Server, "DELETE", accountPath+"/"+f.account, "")
		denied(t, f.Server, "account deleted", body, 400, "invalid_target")
		same(t, "tokens", len(f.Tokens()), 0)
		f.AddProject("proj_old", "Old")
		account := f.AddServiceAccount("proj_old", "a", "member")
		newRule(t, f.Server, f.provider, obj{"project_id": "proj_old", "service_account_id": account})
		f.account = account
		value := f.token(t, nil).str("access_token")
		f.ArchiveProject("proj_old")
		refused(t, f.Server, "GET", "/v1/models", "", 401, "invalid_api_key", value)
		denied(t, f.Server, "project archived", encode(t, f.request(f.jwt(t, nil))), 400, "invalid_target")
	})
}

func TestExchangeMatchers(t *testing.T) {
	rsaKeys()
	synctest.Test(t, func(t *testing.T) {
		f := newFederation(t, obj{"attribute_transformations": []obj{
			{"attribute": "openai.repo", "expression": "assertion.job.repo"},
			{"attribute": "openai.sub", "expression": "assertion.sub"},
			{"attribute": "openai.cel", "expression": "assertion.sub.upperAscii()"},
		}}, nil)
		rule := providerPath + "/" + f.provider + "/federation_rules/" + f.rule
		const matches = 200
		for _, test := range []struct {
			matchers, claims obj
			status           int
		}{
			{obj{"sub": "vault:m:r"}, obj{"sub": "vault:m:r"}, matches},
			{obj{"sub": "vault:m:r"}, obj{"sub": "vault:m:R"}, 403},
			{obj{"sub": "vault:m:*"}, obj{"sub": "vault:m:r"}, matches},
			{obj{"sub": "vault:m:*"}, obj{"sub": "vault:m:"}, matches},
			{obj{"sub": "vault:m:*"}, obj{"sub": "vault:n:r"}, 403},
			{obj{"sub": "s"}, obj{"sub": "s*"}, 403},
			{obj{"x": "1"}, obj{"x": 1}, 403},
			{obj{"x": 1}, obj{"x": "1"}, 403},
			{obj{"x": 1}, obj{"x": 1.0}, matches},
			{obj{"x": 1.5}, obj{"x": 1.5}, matches},
			{obj{"x": 9007199254740993}, obj{"x": 9007199254740992}, 403},
			{obj{"x": true}, obj{"x": true}, matches},
			{obj{"x": true}, obj{"x": "true"}, 403},
			{obj{"x": false}, obj{"y": 1}, 403},
			{obj{"x": "a*"}, obj{"x": []string{"ab"}}, 403},
			{obj{"x": "a", "sub": "s"}, obj{"x": "a"}, matches},
			{obj{"x": "a", "sub": "t"}, obj{"x": "a"}, 403},
			{obj{"openai.repo": "r*"}, obj{"job": obj{"repo": "rr"}}, matches},
			{obj{"openai.repo": "r*"}, obj{"job": "rr"}, 403},
			{obj{"openai.repo": "r*"}, obj{"openai.repo": "rr"}, 403},
			{obj{"openai.sub": "s", "iss": "https://vault.invalid"}, nil, matches},
			{obj{"openai.cel": "S"}, nil, 403},
			{obj{"openai.none": "s"}, nil, 403},
		} {
			ok(t, f.Server, "POST", rule, encode(t, obj{"attribute_matchers": test.matchers}))
			body := encode(t, f.request(f.jwt(t, test.claims)))
			if test.status == matches {
				status, a := post(t, f.Server, body)
				same(t, encode(t, []obj{test.matchers, test.claims, obj(a)}), status, matches)
			} else {
				denied(t, f.Server, encode(t, []obj{test.matchers, test.claims}), body, test.status, "access_denied")
			}
		}
	})
}

func TestTokenScopes(t *testing.T) {
	rsaKeys()
	synctest.Test(t, func(t *testing.T) {
		f := newFederation(t, nil, nil)
		rule := providerPath + "/" + f.provider + "/federation_rules/" + f.rule
		try := func(what, wantScope string, works bool) {
			t.Helper()
			a := f.token(t, nil)
			scope, there := a["scope"].(string)
			same(t, what+": scope", []any{scope, there}, []any{wantScope, wantScope != ""})
			same(t, what+": Use", f.Use(a.str("access_token")), works)
			if works {
				ok(t, f.Server, "GET", "/v1/models", "", a.str("access_token"))
			} else {
				refused(t, f.Server, "GET", "/v1/models", "", 403, "insufficient_permissions", a.str("access_token"))
			}
		}
		restrict := func(scopes ...string) {
			t.Helper()
			ok(t, f.Server, "POST", rule, encode(t, obj{"permissions": obj{"type": "restricted", "scopes": scopes}}))
		}
		try("default", "", true)
		for _, scope := range modelScopes {
			restrict(scope)
			try("one scope", scope, true)
			restrict("api.responses.write", scope)
			try("two scopes", "api.responses.write "+scope, true)
		}
		restrict("api.responses.write")
		try("another scope", "api.responses.write", false)
		f.SetTokenScope("api.all.read api.all.write")
		try("widened", "api.all.read api.all.write", true)
		f.SetTokenScope("none")
		try("none", "", true)
		f.SetTokenScope("")
		try("as the rule says", "api.responses.write", false)
		ok(t, f.Server, "POST", rule, `{"permissions":{"type":"service_account_default"}}`)
		try("default again", "", true)
		// A token of an account without a role can do nothing.
		f.account = f.AddServiceAccount(DefaultProject, "none", "none")
		newRule(t, f.Server, f.provider, obj{"service_account_id": f.account})
		try("no role", "", false)
		ok(t, f.Server, "POST", accountPath+"/"+f.account, `{"role":"member"}`)
		try("role", "", true)
	})
}

func TestJWKSDelay(t *testing.T) {
	rsaKeys()
	synctest.Test(t, func(t *testing.T) {
		f := newFederation(t, nil, nil)
		path := providerPath + "/" + f.provider
		one, two := rsaJWK("one", rsaKeys()[0]), rsaJWK("two", rsaKeys()[1])
		upload := func(keys ...obj) {
			t.Helper()
			ok(t, f.Server, "POST", path, encode(t, obj{"verification": uploaded(keys...)}))
		}
		works := func(what string, first, second bool) {
			t.Helper()
			for kid, want := range map[string]bool{"one": first, "two": second} {
				key := rsaKeys()[0]
				if kid == "two" {
					key = rsaKeys()[1]
				}
				body := encode(t, f.request(sign(t, key, with(f.header, obj{"kid": kid}), f.claims)))
				if status, _ := post(t, f.Server, body); !want {
					denied(t, f.Server, what, body, 401, "invalid_subject_token")
				} else if status != 200 {
					t.Errorf("%s: got %d for key %s, want 200", what, status, kid)
				}
			}
		}
		works("without a delay", true, false)
		f.SetJWKSDelay(10 * time.Second)
		upload(one, two)
		works("uploaded", true, false)
		time.Sleep(5 * time.Second)
		upload(two, one) // does not start anew
		ok(t, f.Server, "POST", path, `{"name":"n"}`)
		time.Sleep(5*time.Second - 1)
		works("shortly before", true, false)
		time.Sleep(time.Nanosecond)
		works("after the delay", true, true)
		upload(two)
		works("removed", false, true)
		upload(two, rsaJWK("one", rsaKeys()[1])) // another key of the same kid
		time.Sleep(10 * time.Second)
		works("other key", false, true)
		upload(one, two)
		works("changed", false, true)
		time.Sleep(10 * time.Second)
		works("changed and counted", true, true)
		f.provider = newProvider(t, f.Server, nil)
		newRule(t, f.Server, f.provider, obj{"service_account_id": f.account})
		works("new provider", false, false)
		time.Sleep(10 * time.Second)
		works("new provider, later", true, false)
	})
}

func TestExchangeFaultsAndLimits(t *testing.T) {
	rsaKeys()
	synctest.Test(t, func(t *testing.T) {
		f := newFederation(t, nil, nil)
		body := encode(t, f.request(f.jwt(t, nil)))
		for status, code := range map[int]string{
			500: "server_error", 503: "server_error", 429: "temporarily_unavailable", 400: "invalid_request",
		} {
			f.Inject(Fault{Path: "^/oauth/token$", Status: status})
			denied(t, f.Server, "fault", body, status, code)
		}
		f.Inject(Fault{Status: 403, Body: `{"error":"access_denied","error_description":"d"}`, Process: true})
		denied(t, f.Server, "body", body, 403, "access_denied")
		same(t, "tokens", len(f.Tokens()), 1)
		f.Inject(Fault{Status: 502, Late: time.Second, Path: "oauth"})
		denied(t, f.Server, "late", body, 502, "server_error")
		time.Sleep(time.Second)
		same(t, "tokens", len(f.Tokens()), 2)
		f.Inject(Fault{Kind: "redirect"})
		status, _ := post(t, f.Server, body)
		same(t, "redirect", status, 307)
		last := f.Calls()[len(f.Calls())-1]
		same(t, "call", []any{last.Path, last.Status, last.Processed}, []any{"/oauth/token", 307, false})

		f.SetEndpointLimit(6, 1, false, true)
		denied(t, f.Server, "authorization does not count", body, 400, "invalid_request", "Authorization", "Bearer x")
		f.token(t, nil)
		denied(t, f.Server, "over the limit", body, 429, "temporarily_unavailable")
		ok(t, f.Server, "GET", projectPath, "") // another endpoint
		time.Sleep(10 * time.Second)
		denied(t, f.Server, "a refusal counts", "{}", 400, "invalid_request")
		denied(t, f.Server, "over the limit again", body, 429, "temporarily_unavailable")
		f.SetEndpointLimit(0, 0, false, false)
		f.SetRateLimit(1, 1)
		f.token(t, nil)
		denied(t, f.Server, "over the rate", body, 429, "temporarily_unavailable")
	})
}

func TestExchangeOverHTTP(t *testing.T) {
	s := New()
	server := httptest.NewServer(s)
	defer server.Close()
	f := &federation{Server: s, provider: newProvider(t, s, nil), header: obj{"alg": "RS256", "kid": "one"}}
	f.rule, f.account = newRule(t, s, f.provider, nil)
	now := time.Now().Unix()
	f.claims = obj{"iss": "https://vault.invalid", "aud": "aud", "sub": "s", "iat": now, "exp": now + 300}
	do := func(path, body string) (int, answerMap) {
		t.Helper()
		resp, err := http.Post(server.URL+path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var a answerMap
		if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, a
	}
	for path, body := range map[string]string{
		"jwksdelay": `{"duration":"10s"}`, "tokenscope": `{"scope":"api.all.read"}`,
	} {
		status, _ := do("/_sim/"+path, body)
		same(t, path, status, 200)
	}
	same(t, "delay", s.jwksDelay, 10*time.Second)
	status, a := do("/oauth/token", encode(t, f.request(f.jwt(t, nil))))
	same(t, "exchange", []any{status, a["scope"]}, []any{200, "api.all.read"})
	if life := a["expires_in"].(float64); life < 290 || life > 300 {
		t.Errorf("expires_in: got %v, want nearly 300", life)
	}
	same(t, "works", s.Use(a.str("access_token")), true)
	status, a = do("/oauth/token", "{}")
	same(t, "refusal", []any{status, a["error"]}, []any{400, "invalid_request"})
}

func TestExchangeConcurrency(t *testing.T) {
	s := New()
	f := &federation{Server: s, provider: newProvider(t, s, nil), header: obj{"alg": "RS256", "kid": "one"}}
	f.rule, f.account = newRule(t, s, f.provider, nil)
	now := time.Now().Unix()
	f.claims = obj{"iss": "https://vault.invalid", "aud": "aud", "sub": "s", "iat": now, "exp": now + 300}
	body := encode(t, f.request(f.jwt(t, nil)))
	path := providerPath + "/" + f.provider
	keys := encode(t, obj{"verification": uploaded(rsaJWK("one", rsaKeys()[0]), rsaJWK("two", rsaKeys()[1]))})
	done := make(chan int)
	for range 8 {
		go func() {
			made := 0
			for range 20 {
				if status, a := post(t, s, body); status == 200 && s.Use(a.str("access_token")) {
					made++
				}
				call(t, s, "POST", path, keys)
				call(t, s, "POST", path+"/federation_rules/"+f.rule, `{"name":"n"}`)
				s.Providers()
				s.Rules()
				s.Tokens()
				s.snapshot()
			}
			done <- made
		}()
	}
	for range 8 {
		same(t, "tokens", <-done, 20)
	}
}
