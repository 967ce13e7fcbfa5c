// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

const providerPath = "/v1/" + providers

// obj is a JSON object.
type obj = map[string]any

func encode(t *testing.T, v any) string {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// with is o with other members; one that is nil is left out, and null stays.
func with(o, change obj) obj {
	made := maps.Clone(o)
	for name, v := range change {
		made[name] = v
		if v == nil {
			delete(made, name)
		}
	}
	return made
}

var null = json.RawMessage("null")

var (
	rsaKeys = sync.OnceValue(func() []*rsa.PrivateKey {
		var keys []*rsa.PrivateKey
		for range 2 {
			keys = append(keys, must(rsa.GenerateKey(rand.Reader, 2048)))
		}
		return keys
	})
	ecKey = sync.OnceValue(func() *ecdsa.PrivateKey { return must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)) })
)

var b64 = base64.RawURLEncoding.EncodeToString

func rsaJWK(kid string, key *rsa.PrivateKey) obj {
	return obj{"kty": "RSA", "kid": kid, "n": b64(key.N.Bytes()), "e": "AQAB", "alg": "RS256", "use": "sig"}
}

func ecJWK(kid string, key *ecdsa.PrivateKey) obj {
	point := must(key.PublicKey.Bytes())
	return obj{"kty": "EC", "kid": kid, "crv": "P-256", "x": b64(point[1:33]), "y": b64(point[33:])}
}

// uploaded is a verification with these keys.
func uploaded(keys ...obj) obj { return obj{"type": "uploaded_jwks", "jwks": obj{"keys": keys}} }

func newProvider(t *testing.T, s *Server, members obj) string {
	t.Helper()
	body := with(obj{
		"name": "vault", "issuer": "https://vault.invalid", "audience": "aud", "type": "oidc",
		"verification": uploaded(rsaJWK("one", rsaKeys()[0])),
	}, members)
	return ok(t, s, "POST", providerPath, encode(t, body)).str("id")
}

// deletedAnswer is the answer to a deletion.
func deletedAnswer(kind, id string) answerMap {
	return answerMap{"id": id, "object": "organization.workload_identity_" + kind + ".deleted", "deleted": true}
}

// updates makes updates one after the other. What they do not name has to stay.
func updates(t *testing.T, s *Server, path string, changes ...obj) {
	t.Helper()
	want := ok(t, s, "GET", path, "")
	for _, change := range changes {
		s.Advance(time.Minute)
		maps.Copy(want, change)
		want["updated_at"] = want["updated_at"].(float64) + 60
		same(t, "updated "+encode(t, change), ok(t, s, "POST", path, encode(t, change)), want)
		same(t, "read after "+encode(t, change), ok(t, s, "GET", path, ""), want)
	}
}

func TestProviders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		made := ok(t, s, "POST", providerPath, `{"name":"n","issuer":"https://i","audience":"a","type":"oidc"}`)
		id := made.str("id")
		path := providerPath + "/" + id
		want := answerMap{
			"object": "organization.workload_identity_provider", "id": id, "name": "n", "issuer": "https://i",
			"audience": "a", "type": "oidc", "enabled": true, "description": nil, "attribute_transformations": []any{},
			"verification": obj{"type": "discovery", "discovery_url": nil},
			"created_at":   float64(time.Now().Unix()), "updated_at": float64(time.Now().Unix()),
		}
		same(t, "created", made, want)
		same(t, "read", ok(t, s, "GET", path, ""), want)
		var jwks obj
		json.Unmarshal([]byte(encode(t, uploaded(rsaJWK("one", rsaKeys()[0]), ecJWK("two", ecKey())))), &jwks)
		updates(t, s, path, obj{"verification": jwks}, obj{"name": "m"}, obj{"issuer": "j"}, obj{"audience": "b"},
			obj{"description": "d"}, obj{"description": nil}, obj{"enabled": false}, obj{"description": "e"}, obj{},
			obj{"attribute_transformations": []any{obj{"attribute": "openai.a", "expression": "assertion.a"}}},
			obj{"attribute_transformations": []any{}})
		same(t, "provider", s.Providers()[0], Provider{
			ID: id, Name: "m", Issuer: "j", Audience: "b", Description: "e", KeyIDs: []string{"one", "two"},
			Created: time.Now(), Updated: time.Now().Add(11 * time.Minute),
		})
		discovery := obj{"type": "discovery", "discovery_url": "https://d"}
		updates(t, s, path, obj{"verification": discovery, "issuer": "https://i"})
		same(t, "keys", s.Providers()[0].KeyIDs, nil)
	})
}

func TestProviderList(t *testing.T) {
	s := New()
	id, other := newProvider(t, s, nil), newProvider(t, s, nil)
	for order, want := range map[string]string{"asc": id, "desc": other} {
		list := ok(t, s, "GET", providerPath+"?limit=1&order="+order, "")
		same(t, order, []any{list.str("last_id"), list["has_more"]}, []any{want, true})
		list = ok(t, s, "GET", providerPath+"?order="+order+"&after="+want, "")
		same(t, order+", rest", []any{len(list["data"].([]any)), list["has_more"]}, []any{1, false})
	}
	same(t, "deletion", ok(t, s, "DELETE", providerPath+"/"+id, ""), deletedAnswer("provider", id))
	refused(t, s, "GET", providerPath+"/"+id, "", 404, "not_found")
	refused(t, s, "DELETE", providerPath+"/"+id, "", 404, "not_found")
	same(t, "left", s.Providers()[0].ID, other)
}

func TestProviderRefusals(t *testing.T) {
	s := New()
	id := newProvider(t, s, nil)
	long := func(n int) string { return strings.Repeat("a", n) }
	attribute := func(name, expression string) obj { return obj{"attribute": name, "expression": expression} }
	many := slices.Repeat([]obj{attribute("openai.a", "e")}, 21)
	body := obj{"name": "n", "issuer": "https://i", "audience": "a", "type": "oidc"}
	const made = "attribute_transformations"
	for _, test := range []struct {
		change obj
		code   string
		param  string
	}{
		{obj{"name": ""}, "empty_string", "name"},
		{obj{"issuer": ""}, "empty_string", "issuer"},
		{obj{"audience": []string{"a"}}, "invalid_type", "audience"},
		{obj{"type": "saml"}, "invalid_value", "type"},
		{obj{"enabled": "yes"}, "invalid_type", "enabled"},
		{obj{"description": 1}, "invalid_type", "description"},
		{obj{"jwks": obj{}}, "unknown_parameter", "jwks"},
		{obj{made: obj{}}, "invalid_type", made},
		{obj{made: many}, "array_above_max_length", made},
		{obj{made: many[:2]}, "invalid_value", made},
		{obj{made: []obj{attribute("a", "e")}}, "invalid_value", made},
		{obj{made: []obj{attribute("openai.", "e")}}, "invalid_value", made},
		{obj{made: []obj{attribute("openai."+long(250), "e")}}, "string_above_max_length", made},
		{obj{made: []obj{attribute("openai.a", long(4097))}}, "string_above_max_length", made},
		{obj{made: []obj{{"attribute": "openai.a"}}}, "missing_required_parameter", made + ".expression"},
	} {
		created := encode(t, with(body, test.change))
		refused(t, s, "POST", providerPath, created, 400, test.code)
		_, a := call(t, s, "POST", providerPath, created)
		same(t, "param of "+created, a.str("error", "param"), test.param)
		if test.param != "type" {
			refused(t, s, "POST", providerPath+"/"+id, encode(t, test.change), 400, test.code)
		}
	}
	for _, name := range []string{"name", "issuer", "audience"} {
		refused(t, s, "POST", providerPath, encode(t, with(body, obj{name: nil})), 400, "missing_required_parameter")
		refused(t, s, "POST", providerPath+"/"+id, `{"`+name+`":null}`, 400, "invalid_type")
	}
	refused(t, s, "POST", providerPath, encode(t, with(body, obj{"type": nil})), 400, "missing_required_parameter")
	refused(t, s, "POST", providerPath+"/"+id, `{"type":"oidc"}`, 400, "unknown_parameter")
	refused(t, s, "GET", providerPath+"?service_account_id=x", "", 400, "unknown_parameter")
	refused(t, s, "GET", providerPath+"?after=x", "", 400, "invalid_value")
	refused(t, s, "GET", providerPath+"?limit=101", "", 400, "integer_above_max_value")
	refused(t, s, "POST", providerPath+"/wip_none", `{}`, 404, "not_found")
	same(t, "providers", len(s.Providers()), 1)
	same(t, "updated", s.Providers()[0].Updated, s.Providers()[0].Created)
	for range maxProviders - 1 {
		newProvider(t, s, nil)
	}
	refused(t, s, "POST", providerPath, encode(t, body), 400, "limit_exceeded")
	ok(t, s, "DELETE", providerPath+"/"+id, "")
	newProvider(t, s, nil)
	same(t, "providers", len(s.Providers()), maxProviders)
}

func TestVerificationRefusals(t *testing.T) {
	s := New()
	id := newProvider(t, s, nil)
	discovery := obj{"type": "discovery", "discovery_url": nil}
	jwks := func(v any) obj { return obj{"type": "uploaded_jwks", "jwks": v} }
	for _, test := range []struct {
		verification any
		code, param  string // param below verification
	}{
		{[]any{}, "invalid_type", ""},
		{obj{}, "missing_required_parameter", ".type"},
		{obj{"type": "none", "discovery_url": nil}, "invalid_value", ".type"},
		{obj{"type": "discovery"}, "missing_required_parameter", ".discovery_url"},
		{obj{"type": "discovery", "discovery_url": "http://d"}, "invalid_value", ".discovery_url"},
		{obj{"type": "discovery", "jwks": obj{}, "discovery_url": nil}, "unknown_parameter", ".jwks"},
		{obj{"type": "uploaded_jwks"}, "missing_required_parameter", ".jwks"},
		{jwks(nil), "invalid_type", ".jwks"},
		{jwks([]any{}), "invalid_type", ".jwks"},
		{jwks(obj{"keys": []any{}, "x": 1}), "invalid_type", ".jwks"},
		{jwks(obj{"keys": []any{}}), "invalid_value", ".jwks.keys"},
	} {
		body := encode(t, obj{"verification": test.verification})
		refused(t, s, "POST", providerPath+"/"+id, body, 400, test.code)
		made := `{"name":"n","issuer":"https://i","audience":"a","type":"oidc",` + body[1:]
		_, a := call(t, s, "POST", providerPath, made)
		same(t, "param of "+body, a.str("error", "param"), "verification"+test.param)
	}
	body := encode(t, obj{"verification": discovery, "issuer": "http://i"})
	refused(t, s, "POST", providerPath+"/"+id, body, 400, "invalid_value")
	refused(t, s, "POST", providerPath, `{"name":"n","issuer":"i","audience":"a","type":"oidc"}`, 400, "invalid_value")
	same(t, "providers", s.Providers()[0].Updated, s.Providers()[0].Created)
}

func TestJWKS(t *testing.T) {
	s := New()
	good, ec := rsaJWK("k", rsaKeys()[0]), ecJWK("k", ecKey())
	n, x, y := good["n"].(string), ec["x"].(string), ec["y"].(string)
	even := slices.Concat(rsaKeys()[0].N.Bytes()[:255], []byte{2})
	var bad []any
	for _, change := range []obj{
		{"kid": nil}, {"kid": ""}, {"kid": 1}, {"kty": nil}, {"kty": "oct"}, {"secret": "x"}, {"k": "AQAB"},
		{"d": "AQ"}, {"p": "AQ"}, {"q": "AQ"}, {"dp": "AQ"}, {"dq": "AQ"}, {"qi": "AQ"}, {"oth": []any{}},
		{"n": nil}, {"n": n + "="}, {"n": n + "\n"}, {"n": b64(even)}, {"n": b64(make([]byte, 256))},
		{"n": "AA" + n}, {"n": b64(append([]byte{0}, rsaKeys()[0].N.Bytes()...))}, {"n": strings.Repeat("/", 342)},
		{"n": b64(must(rsa.GenerateKey(rand.Reader, 1024)).N.Bytes())},
		{"e": nil}, {"e": "AQ"}, {"e": "BA"}, {"e": "AQAAAAE"}, {"e": 65537},
		{"alg": "RS512"}, {"alg": "ES256"}, {"alg": null}, {"use": "enc"}, {"use": 1},
		{"key_ops": []string{"sign", "verify"}}, {"key_ops": "verify"}, {"key_ops": []string{}},
	} {
		bad = append(bad, with(good, change))
	}
	for _, change := range []obj{
		{"d": "AQ"}, {"crv": "P-384"}, {"crv": nil}, {"x": y, "y": x}, {"x": "AQAB"}, {"y": nil}, {"alg": "RS256"},
		{"kty": "OKP"}, {"kty": "RSA"},
	} {
		bad = append(bad, with(ec, change))
	}
	for _, key := range append(bad, "key", nil, 1) {
		jwks := obj{"type": "uploaded_jwks", "jwks": obj{"keys": []any{key}}}
		body := encode(t, obj{"name": "n", "issuer": "i", "audience": "a", "type": "oidc", "verification": jwks})
		refused(t, s, "POST", providerPath, body, 400, "invalid_jwk")
	}
	body := obj{"name": "n", "issuer": "i", "audience": "a", "type": "oidc", "verification": uploaded(good, ec)}
	refused(t, s, "POST", providerPath, encode(t, body), 400, "invalid_jwk") // the same kid
	newProvider(t, s, obj{"verification": uploaded(
		with(good, obj{"key_ops": []string{"verify"}, "x5t": "AQAB", "kid": "a"}),
		with(good, obj{"alg": nil, "use": nil, "kid": "b"}), with(ec, obj{"alg": "ES256"}))})
	same(t, "keys", s.Providers()[0].KeyIDs, []string{"a", "b", "k"})
	// Of a member that is there twice, the last one counts and the other is not stored.
	twice := encode(t, with(body, obj{"verification": uploaded(good)}))
	made := ok(t, s, "POST", providerPath, strings.Replace(twice, `"keys":`, `"keys":[{"d":"private"}],"keys":`, 1))
	if text := encode(t, made); strings.Contains(text, "private") {
		t.Errorf("got %s", text)
	}
}

// newRule makes a service account, unless its id is given, and a rule for it.
func newRule(t *testing.T, s *Server, provider string, members obj) (id, account string) {
	t.Helper()
	account, given := members["service_account_id"].(string)
	if !given {
		account = s.AddServiceAccount(DefaultProject, "a", "member")
	}
	body := with(obj{
		"project_id": DefaultProject, "service_account_id": account, "attribute_matchers": obj{"sub": "s"},
	}, members)
	return ok(t, s, "POST", providerPath+"/"+provider+"/federation_rules", encode(t, body)).str("id"), account
}

func TestRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		provider := newProvider(t, s, nil)
		path := providerPath + "/" + provider + "/federation_rules"
		account := s.AddServiceAccount(DefaultProject, "a", "none")
		matchers := obj{"sub": "vault:*", "n": 1.5, "b": false, "openai.x": "y"}
		made := ok(t, s, "POST", path, encode(t, obj{
			"project_id": DefaultProject, "service_account_id": account, "attribute_matchers": matchers}))
		id := made.str("id")
		want := answerMap{
			"object": "organization.workload_identity_federation_rule", "id": id,
			"workload_identity_provider_id": provider, "project_id": DefaultProject, "service_account_id": account,
			"enabled": true, "name": nil, "description": nil, "attribute_matchers": matchers,
			"permissions": obj{"type": "service_account_default"},
			"created_at":  float64(time.Now().Unix()), "updated_at": float64(time.Now().Unix()),
		}
		same(t, "created", made, want)
		restricted := obj{"type": "restricted", "scopes": []any{"api.a.read", "api.b.write"}}
		updates(t, s, path+"/"+id, obj{"name": "n"}, obj{"description": "d"}, obj{"enabled": false},
			obj{"attribute_matchers": obj{"sub": "t"}}, obj{"permissions": restricted}, obj{"name": nil}, obj{})
		same(t, "rule", s.Rules()[0], Rule{
			ID: id, ProviderID: provider, ProjectID: DefaultProject, ServiceAccountID: account, Description: "d",
			Matchers: obj{"sub": "t"}, Scopes: []string{"api.a.read", "api.b.write"},
			Created: time.Now(), Updated: time.Now().Add(7 * time.Minute),
		})
		updates(t, s, path+"/"+id, obj{"permissions": obj{"type": "service_account_default"}})
		same(t, "scopes", s.Rules()[0].Scopes, nil)
		same(t, "empty", ok(t, s, "POST", path+"/"+id, `{"name":"","description":""}`)["description"], nil)
	})
}

// TestOperate: an operator's calls name the first provider and rule by words, meet no fault and are not recorded.
func TestOperate(t *testing.T) {
	s := New()
	s.Fail("", "", 500)
	jwks := obj{"type": "uploaded_jwks", "jwks": obj{"keys": []any{rsaJWK("one", rsaKeys()[0])}}}
	for _, name := range []string{"a", "b"} {
		id := s.Operate("POST", "", obj{"name": name, "issuer": "i", "audience": "a", "type": "oidc",
			"verification": jwks})
		same(t, "id", s.Providers()[len(s.Providers())-1].ID, id)
	}
	account := s.AddServiceAccount(DefaultProject, "a", "none")
	rule := s.Operate("POST", "/PROVIDER/federation_rules", obj{"project_id": DefaultProject,
		"service_account_id": account, "attribute_matchers": obj{"sub": "x"}})
	same(t, "rule", s.Rules()[0].ID, rule)
	s.Operate("POST", "/PROVIDER", obj{"enabled": false})
	same(t, "federation", s.Federation(), "2 providers, 1 enabled, 1 rules")
	same(t, "keys", s.KeyIDs(), []string{"one", "one"})
	func() {
		defer func() { same(t, "panics", recover() != nil, true) }()
		s.Operate("DELETE", "/PROVIDER", nil) // it has a rule
	}()
	s.Operate("DELETE", "/RULE", nil)
	s.Operate("DELETE", "/PROVIDER", nil)
	same(t, "federation", s.Federation(), "1 providers, 1 enabled, 0 rules")
	same(t, "calls", len(s.Calls()), 0)
}

func TestRuleList(t *testing.T) {
	s := New()
	provider, other := newProvider(t, s, nil), newProvider(t, s, nil)
	path := providerPath + "/" + provider + "/federation_rules"
	id, account := newRule(t, s, provider, nil)
	second, account2 := newRule(t, s, provider, nil)
	newRule(t, s, other, obj{"service_account_id": account}) // the same account, of another provider
	for query, want := range map[string][]string{
		"": {id, second}, "order=desc": {second, id}, "after=" + id: {second}, "limit=1": {id},
		"service_account_id=" + account2: {second}, "service_account_id=x": nil,
	} {
		var ids []string
		list := ok(t, s, "GET", path+"?"+query, "")
		for _, v := range list["data"].([]any) {
			ids = append(ids, answerMap(v.(obj)).str("id"))
		}
		same(t, "rules with "+query, ids, want)
		same(t, "more with "+query, list["has_more"], any(query == "limit=1"))
	}
	refused(t, s, "GET", providerPath+"/"+other+"/federation_rules/"+id, "", 404, "not_found")
	refused(t, s, "DELETE", providerPath+"/"+provider, "", 400, "workload_identity_provider_in_use")
	same(t, "deletion", ok(t, s, "DELETE", path+"/"+id, ""), deletedAnswer("federation_rule", id))
	refused(t, s, "DELETE", path+"/"+id, "", 404, "not_found")
	refused(t, s, "GET", path+"/"+id, "", 404, "not_found")
	// A rule outlives its account.
	ok(t, s, "DELETE", accountPath+"/"+account2, "")
	same(t, "rules", len(s.Rules()), 2)
	ok(t, s, "POST", path+"/"+second, `{"enabled":false}`)
	ok(t, s, "DELETE", path+"/"+second, "")
	ok(t, s, "DELETE", providerPath+"/"+provider, "")
	refused(t, s, "GET", path, "", 404, "not_found")
	refused(t, s, "DELETE", path+"/"+second, "", 404, "not_found")
}

func TestRuleRefusals(t *testing.T) {
	s := New()
	provider := newProvider(t, s, nil)
	path := providerPath + "/" + provider + "/federation_rules"
	rule, account := newRule(t, s, provider, nil)
	free := s.AddServiceAccount(DefaultProject, "free", "member")
	s.AddProject("proj_other", "Other")
	s.AddProject("proj_old", "Old")
	s.ArchiveProject("proj_old")
	body := obj{"project_id": DefaultProject, "service_account_id": free, "attribute_matchers": obj{"sub": "s"}}
	for _, test := range []struct {
		change obj
		code   string
		param  string
	}{
		{obj{"project_id": "proj_none"}, "invalid_value", "project_id"},
		{obj{"project_id": "proj_old"}, "project_archived", "project_id"},
		{obj{"project_id": "proj_other"}, "invalid_value", "service_account_id"},
		{obj{"service_account_id": "x"}, "invalid_value", "service_account_id"},
		{obj{"service_account_id": account}, "federation_rule_exists", "service_account_id"},
		{obj{"project_id": nil}, "missing_required_parameter", "project_id"},
		{obj{"service_account_id": nil}, "missing_required_parameter", "service_account_id"},
		{obj{"attribute_matchers": nil}, "missing_required_parameter", "attribute_matchers"},
		{obj{"enabled": 1}, "invalid_type", "enabled"},
		{obj{"workload_identity_provider_id": provider}, "unknown_parameter", "workload_identity_provider_id"},
	} {
		text := encode(t, with(body, test.change))
		refused(t, s, "POST", path, text, 400, test.code)
		_, a := call(t, s, "POST", path, text)
		same(t, "param of "+text, a.str("error", "param"), test.param)
	}
	for _, name := range []string{"project_id", "service_account_id"} {
		refused(t, s, "POST", path+"/"+rule, encode(t, obj{name: body[name]}), 400, "unknown_parameter")
	}
	refused(t, s, "POST", path, encode(t, with(body, obj{"name": 1})), 400, "invalid_type")
	refused(t, s, "POST", path, `{"name":null}`, 400, "missing_required_parameter")
	refused(t, s, "POST", providerPath+"/wip_none/federation_rules", encode(t, body), 404, "not_found")
	refused(t, s, "POST", path+"/wifr_none", `{}`, 404, "not_found")
	refused(t, s, "GET", path+"?service_account_id=", "", 400, "empty_string")
	same(t, "rules", len(s.Rules()), 1)
	same(t, "updated", s.Rules()[0].Updated, s.Rules()[0].Created)
	for range maxRules - 1 {
		newRule(t, s, provider, nil)
	}
	refused(t, s, "POST", path, encode(t, body), 400, "limit_exceeded")
	ok(t, s, "DELETE", path+"/"+rule, "")
	newRule(t, s, provider, obj{"service_account_id": free})
}

func TestMatcherAndPermissionRefusals(t *testing.T) {
	s := New()
	provider := newProvider(t, s, nil)
	path := providerPath + "/" + provider + "/federation_rules"
	rule, _ := newRule(t, s, provider, nil)
	free := s.AddServiceAccount(DefaultProject, "free", "member")
	body := obj{"project_id": DefaultProject, "service_account_id": free, "attribute_matchers": obj{"sub": "s"}}
	restricted := func(scopes any) obj { return obj{"type": "restricted", "scopes": scopes} }
	for _, test := range []struct {
		member      string
		value       any
		code, param string // param below member
	}{
		{"attribute_matchers", obj{}, "invalid_value", ""},
		{"attribute_matchers", null, "invalid_type", ""},
		{"attribute_matchers", []any{}, "invalid_type", ""},
		{"attribute_matchers", obj{"sub": null}, "invalid_type", ".sub"},
		{"attribute_matchers", obj{"sub": []string{"s"}}, "invalid_type", ".sub"},
		{"attribute_matchers", obj{"sub": obj{}}, "invalid_type", ".sub"},
		{"attribute_matchers", obj{"sub": ""}, "invalid_value", ".sub"},
		{"attribute_matchers", obj{"sub": "*"}, "invalid_value", ".sub"},
		{"attribute_matchers", obj{"sub": "a**"}, "invalid_value", ".sub"},
		{"attribute_matchers", obj{"sub": "a*b"}, "invalid_value", ".sub"},
		{"attribute_matchers", obj{"sub": "*a"}, "invalid_value", ".sub"},
		{"attribute_matchers", obj{"": "a"}, "invalid_value", ""},
		{"attribute_matchers", obj{"openai.": "a"}, "invalid_value", ""},
		{"permissions", obj{}, "missing_required_parameter", ".type"},
		{"permissions", "restricted", "invalid_type", ""},
		{"permissions", null, "invalid_type", ""},
		{"permissions", obj{"type": "all"}, "invalid_value", ".type"},
		{"permissions", obj{"type": "restricted"}, "missing_required_parameter", ".scopes"},
		{"permissions", restricted([]string{}), "invalid_value", ".scopes"},
		{"permissions", restricted("api.all.read"), "invalid_type", ".scopes"},
		{"permissions", restricted([]string{"all read"}), "invalid_value", ".scopes"},
		{"permissions", with(restricted([]string{"a.b"}), obj{"type": "service_account_default"}),
			"unknown_parameter", ".scopes"},
	} {
		change := obj{test.member: test.value}
		text := encode(t, with(body, change))
		refused(t, s, "POST", path, text, 400, test.code)
		refused(t, s, "POST", path+"/"+rule, encode(t, change), 400, test.code)
		_, a := call(t, s, "POST", path, text)
		same(t, "param of "+text, a.str("error", "param"), test.member+test.param)
	}
	same(t, "rules", len(s.Rules()), 1)
	same(t, "updated", s.Rules()[0].Updated, s.Rules()[0].Created)
}

func TestFederationAccess(t *testing.T) {
	s := New()
	provider := newProvider(t, s, nil)
	rule, account := newRule(t, s, provider, nil)
	path := providerPath + "/" + provider
	reader, id := s.AddAdminKey("reader")
	s.SetAdminKeyAccess(id, "read")
	key := ok(t, s, "POST", accountPath+"/"+account+"/api_keys", "").str("value")
	for _, p := range []string{providerPath, path, path + "/federation_rules", path + "/federation_rules/" + rule} {
		ok(t, s, "GET", p, "", reader)
		refused(t, s, "POST", p, "{}", 403, "insufficient_permissions", reader)
		refused(t, s, "GET", p, "", 401, "invalid_api_key", key)
	}
	for _, p := range []string{providerPath + "/wip_none", path + "/federation_rules/wifr_none"} {
		s.SetGoneStatus(410, true)
		refused(t, s, "DELETE", p, "", 410, "")
		refused(t, s, "GET", p, "", 404, "not_found")
	}
	refused(t, s, "DELETE", providerPath+"/wip_none/federation_rules/x", "", 404, "not_found")
	if state := s.snapshot(); !strings.Contains(state, fmt.Sprintf(`"id":%q`, rule)) ||
		!strings.Contains(state, fmt.Sprintf(`"id":%q`, provider)) || !strings.Contains(state, `"key_ids":["one"]`) {
		t.Errorf("state: got %s", state)
	}
}
