// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

const (
	adminPath   = "/v1/organization/admin_api_keys"
	projectPath = "/v1/organization/projects/" + DefaultProject
	accountPath = projectPath + "/service_accounts"
	keyPath     = projectPath + "/api_keys"
)

// answerMap is a decoded answer.
type answerMap map[string]any

func (a answerMap) str(path ...string) string {
	var v any = map[string]any(a)
	for _, name := range path {
		m, _ := v.(map[string]any)
		v = m[name]
	}
	text, _ := v.(string)
	return text
}

// call makes a call with the first admin key, or the key given.
func call(t *testing.T, s *Server, method, path, body string, key ...string) (int, answerMap) {
	t.Helper()
	value, _ := s.AdminKey()
	if len(key) > 0 {
		value = key[0]
	}
	req, err := http.NewRequestWithContext(t.Context(), method, "https://api.openai.com"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+value)
	req.Header.Set("Content-Type", "application/json")
	return send(t, s, req)
}

func send(t *testing.T, s *Server, req *http.Request) (int, answerMap) {
	t.Helper()
	resp, err := s.Transport().RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", req.Method, req.URL.Path, err)
	}
	var a answerMap
	if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
		t.Fatalf("%s %s: %v", req.Method, req.URL.Path, err)
	}
	if resp.Header.Get("X-Request-Id") == "" {
		t.Errorf("%s %s: no x-request-id", req.Method, req.URL.Path)
	}
	return resp.StatusCode, a
}

// ok is a call that must succeed.
func ok(t *testing.T, s *Server, method, path, body string, key ...string) answerMap {
	t.Helper()
	status, a := call(t, s, method, path, body, key...)
	if status != 200 {
		t.Fatalf("%s %s %s: got %d %v, want 200", method, path, body, status, a)
	}
	return a
}

// refused is a call that must be answered with this status and code, in OpenAI's form.
func refused(t *testing.T, s *Server, method, path, body string, status int, code string, key ...string) {
	t.Helper()
	got, a := call(t, s, method, path, body, key...)
	if got != status || a.str("error", "code") != code {
		t.Errorf("%s %s %s: got %d %v, want %d %s", method, path, body, got, a, status, code)
	}
	e, _ := a["error"].(map[string]any)
	_, param := e["param"]
	if a.str("error", "message") == "" || a.str("error", "type") == "" || !param {
		t.Errorf("%s %s %s: got %v, want an error in OpenAI's form", method, path, body, a)
	}
}

// snapshot is what the server holds, without the time.
func (s *Server) snapshot() string {
	s.lock()
	defer s.mu.Unlock()
	m := s.state().(map[string]any)
	delete(m, "now")
	text, _ := json.Marshal(m)
	return string(text)
}

func same[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestRefusals(t *testing.T) {
	s := New()
	s.AddProject("proj_old", "Old")
	s.ArchiveProject("proj_old")
	account := ok(t, s, "POST", accountPath, `{"name":"a"}`)
	short := ok(t, s, "POST", accountPath, `{"name":"short","expires_in_seconds":1}`)
	s.Advance(time.Second)
	accountID := accountPath + "/" + account.str("id")
	key := keyPath + "/" + account.str("api_key", "id")
	oldPath := "/v1/organization/projects/proj_old"
	before := s.snapshot()

	for _, test := range []struct {
		method, path, body string
		status             int
		code               string
	}{
		{"GET", "/v1", "", 404, ""},
		{"GET", "/v2/models", "", 404, ""},
		{"GET", "/v1/organization/users", "", 404, ""},
		{"PUT", accountID, "{}", 404, ""},
		{"GET", accountPath + "/", "", 404, ""},
		{"GET", projectPath + "%2Fservice_accounts", "", 404, "not_found"},

		{"GET", "/v1/organization/projects/proj_none", "", 404, "not_found"},
		{"GET", "/v1/organization/projects/proj_none/service_accounts", "", 404, "not_found"},
		{"GET", accountPath + "/svc_acct_none", "", 404, "not_found"},
		{"DELETE", accountPath + "/svc_acct_none", "", 404, "not_found"},
		{"DELETE", keyPath + "/key_none", "", 404, "not_found"},
		{"GET", adminPath + "/key_none", "", 404, "not_found"},
		{"DELETE", adminPath + "/" + account.str("api_key", "id"), "", 404, "not_found"},

		{"GET", accountPath + "?limit=0", "", 400, "integer_below_min_value"},
		{"GET", adminPath + "?limit=101", "", 400, "integer_above_max_value"},
		{"GET", keyPath + "?limit=x", "", 400, "invalid_type"},
		{"GET", keyPath + "?limit=1&limit=2", "", 400, "invalid_value"},
		{"GET", keyPath + "?after=key_none", "", 400, "invalid_value"},
		{"GET", keyPath + "?after=" + account.str("id"), "", 400, "invalid_value"},
		{"GET", adminPath + "?after=" + DefaultProject, "", 400, "invalid_value"},
		{"GET", keyPath + "?after=", "", 400, "empty_string"},
		{"GET", keyPath + "?owner_project_access=all", "", 400, "invalid_value"},
		{"GET", adminPath + "?order=up", "", 400, "invalid_value"},
		{"GET", accountPath + "?order=asc", "", 400, "unknown_parameter"},
		{"GET", projectPath + "?x=1", "", 400, "unknown_parameter"},
		{"GET", projectPath + "?x=%zz", "", 400, "invalid_query"},
		{"GET", "/v1/organization/projects?include_archived=1", "", 400, "invalid_type"},

		{"POST", accountPath, "", 400, "missing_required_parameter"},
		{"POST", accountPath, "{}", 400, "missing_required_parameter"},
		{"POST", accountPath, "{", 400, "invalid_json"},
		{"POST", accountPath, "null", 400, "invalid_json"},
		{"POST", accountPath, `{"name":"a"} {}`, 400, "invalid_json"},
		{"POST", accountPath, `{"name":"` + strings.Repeat("a", maxBody) + `"}`, 400, "invalid_json"},
		{"POST", accountPath, `{"name":null}`, 400, "invalid_type"},
		{"POST", accountPath, `{"name":1}`, 400, "invalid_type"},
		{"POST", accountPath, `{"name":""}`, 400, "empty_string"},
		{"POST", accountPath, `{"name":"a","role":"owner"}`, 400, "unknown_parameter"},
		{"POST", accountPath, `{"name":"a","create_service_account_only":1}`, 400, "invalid_type"},
		{"POST", accountPath, `{"name":"a","create_service_account_only":true,"expires_in_seconds":1}`, 400, "invalid_value"},
		{"POST", accountPath, `{"name":"a","expires_in_seconds":0}`, 400, "integer_below_min_value"},
		{"POST", accountPath, `{"name":"a","expires_in_seconds":31536001}`, 400, "integer_above_max_value"},
		{"POST", accountPath, `{"name":"a","expires_in_seconds":1.5}`, 400, "invalid_type"},
		{"POST", accountPath, `{"name":"a","expires_in_seconds":"60"}`, 400, "invalid_type"},
		{"POST", accountID, `{"role":"none"}`, 400, "invalid_value"},
		{"POST", accountID, `{"description":"a"}`, 400, "unknown_parameter"},
		{"POST", accountID + "/api_keys", `{"scopes":"api.all.read"}`, 400, "invalid_type"},
		{"POST", accountID + "/api_keys", `{"scopes":[null]}`, 400, "invalid_type"},
		{"POST", accountID + "/api_keys", `{"scopes":null}`, 400, "invalid_type"},
		{"POST", accountID + "/api_keys", `{"scopes":[""]}`, 400, "invalid_value"},
		{"POST", accountID + "/api_keys", `{"scopes":["all read"]}`, 400, "invalid_value"},
		{"POST", accountID + "/api_keys", `{"expires_in_seconds":null}`, 400, "invalid_type"},
		{"POST", key, "{}", 400, "missing_required_parameter"},
		{"POST", key, `{"name":"a"}`, 400, "unknown_parameter"},
		{"POST", key, `{"expires_in_seconds":null}`, 400, "invalid_type"},
		{"POST", keyPath + "/" + short.str("api_key", "id"), `{"expires_in_seconds":60}`, 400, "api_key_expired"},
		{"POST", adminPath, `{}`, 400, "missing_required_parameter"},
		{"POST", adminPath, `{"name":"a","expires_in_seconds":null}`, 400, "invalid_type"},
		{"POST", adminPath, `{"name":"a","scopes":[]}`, 400, "unknown_parameter"},
		{"POST", "/v1/organization/projects", `{"name":"a","residency":"MOON"}`, 400, "invalid_value"},
		{"POST", "/v1/organization/projects", `{"name":"a","residency":"GLOBAL","geography":"US"}`, 400, "invalid_value"},
		{"POST", projectPath + "/archive", `{"name":"a"}`, 400, "unknown_parameter"},

		{"GET", oldPath + "/service_accounts", "", 400, "project_archived"},
		{"GET", oldPath + "/service_accounts/svc_acct_none", "", 400, "project_archived"},
		{"POST", oldPath + "/service_accounts", `{"name":"a"}`, 400, "project_archived"},
		{"DELETE", oldPath + "/service_accounts/svc_acct_none", "", 400, "project_archived"},
		{"POST", oldPath + "/service_accounts/svc_acct_none/api_keys", `{}`, 400, "project_archived"},
		{"DELETE", oldPath + "/api_keys/key_none", "", 400, "project_archived"},
		{"GET", oldPath + "/api_keys/key_none", "", 404, "not_found"},
		{"POST", oldPath, `{"name":"a"}`, 400, "project_archived"},
		{"POST", oldPath + "/archive", "", 400, "project_archived"},
	} {
		refused(t, s, test.method, test.path, test.body, test.status, test.code)
	}
	same(t, "state after refusals", s.snapshot(), before)
	for _, c := range s.Calls()[2:] {
		if c.Processed {
			t.Errorf("%s %s: recorded as processed", c.Method, c.Path)
		}
	}
}

func TestAuthentication(t *testing.T) {
	s := New()
	admin, adminID := s.AdminKey()
	account := ok(t, s, "POST", accountPath, `{"name":"a"}`)
	project := account.str("api_key", "value")
	request := func(path string, header ...string) (int, answerMap) {
		req, _ := http.NewRequest("GET", "https://api.openai.com"+path, nil)
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		return send(t, s, req)
	}
	for _, test := range []struct {
		name, path string
		header     []string
		status     int
		code       string
	}{
		{"none", adminPath, nil, 401, ""},
		{"other scheme", adminPath, []string{"Authorization", "Basic " + admin}, 401, ""},
		{"unknown", adminPath, []string{"Authorization", "Bearer " + admin + "x"}, 401, "invalid_api_key"},
		{"project key", adminPath, []string{"Authorization", "Bearer " + project}, 401, "invalid_api_key"},
		{"admin key for models", "/v1/models", []string{"Authorization", "Bearer " + admin}, 401, "invalid_api_key"},
		{"other organization", adminPath, []string{"Authorization", "Bearer " + admin, "OpenAI-Organization", "org-other"}, 401, "mismatched_organization"},
		{"own organization", adminPath, []string{"Authorization", "Bearer " + admin, "OpenAI-Organization", DefaultOrganization}, 200, ""},
		{"models", "/v1/models", []string{"Authorization", "bearer " + project}, 200, ""},
	} {
		status, a := request(test.path, test.header...)
		if status != test.status || a.str("error", "code") != test.code {
			t.Errorf("%s: got %d %v, want %d %s", test.name, status, a, test.status, test.code)
		}
	}

	made := ok(t, s, "POST", adminPath, `{"name":"short","expires_in_seconds":10}`)
	ok(t, s, "GET", projectPath, "", made.str("value"))
	same(t, "live admin keys", len(s.AdminKeys()), 2)
	s.Advance(10 * time.Second)
	refused(t, s, "GET", projectPath, "", 401, "invalid_api_key", made.str("value"))
	same(t, "live admin keys after expiry", len(s.AdminKeys()), 1)

	s.SetKeyDelay(time.Minute)
	made = ok(t, s, "POST", adminPath, `{"name":"late"}`)
	refused(t, s, "GET", projectPath, "", 401, "invalid_api_key", made.str("value"))
	s.Advance(time.Minute)
	ok(t, s, "GET", projectPath, "", made.str("value"))

	s.ResetCalls()
	ok(t, s, "DELETE", adminPath+"/"+adminID, "") // a key can delete itself
	refused(t, s, "GET", projectPath, "", 401, "invalid_api_key")
	for _, c := range s.Calls() {
		same(t, "key id of a call", c.KeyID, adminID)
	}
	text, _ := json.Marshal(s.Calls())
	if text = append(text, s.snapshot()...); strings.Contains(string(text), "sk-") {
		t.Error("a key's value is in the calls or the state")
	}
}

// TestDirectly: what a test makes and counts without a call.
func TestDirectly(t *testing.T) {
	s := New()
	account := s.AddServiceAccount(DefaultProject, "an account", "member")
	id := s.AddKey(DefaultProject, account, "a key")
	same(t, "names", s.Names(DefaultProject), map[string]string{account: "an account", id: "a key"})
	same(t, "owner", s.ProjectKeys(DefaultProject)[0].ServiceAccountID, account)
	ok(t, s, "GET", projectPath, "")
	refused(t, s, "DELETE", projectPath+"/service_accounts/svc_x", "", 404, "not_found")
	got := []int{s.CountCalls("", "/projects/"), s.CountCalls("DELETE", ""), s.CountCalls("GET", "", 404, 429),
		s.CountCalls("", "", 200, 404), s.CountCalls("", "admin_api_keys")}
	same(t, "calls", got, []int{2, 1, 0, 2, 0})
	s.Fail("GET", "admin_api_keys$", 403)
	for range 2 {
		refused(t, s, "GET", adminPath, "", 403, "")
	}
	s.AddAdminKey("there")
	same(t, "admin keys", []bool{s.HasAdminKey("there"), s.HasAdminKey("here")}, []bool{true, false})
	for text, want := range map[string]bool{"sk-***": false, "sk-admin-x": true, "sk-*** sk-x": true, "": false,
		`"a\nsk-x"`: true, "kid=ask-b_sk-c-sk-d": false, "key=sk-x": true,
		"sk-*** eyJhbGciOi.e30.x": true, "-----BEGIN PRIVATE KEY-----": true, "-----BEGIN CERTIFICATE-----": false} {
		same(t, text, ShowsKey(text), want)
	}
}

func TestAdminKeys(t *testing.T) {
	s := New()
	_, first := s.AdminKey()
	made := ok(t, s, "POST", adminPath, `{"name":"second","expires_in_seconds":60}`)
	value, id := made.str("value"), made.str("id")
	if !strings.HasPrefix(value, "sk-admin-") || len(value) != 164 || !strings.HasPrefix(id, "key_") {
		t.Errorf("got a value of %d bytes and id %s", len(value), id)
	}
	same(t, "redacted", made.str("redacted_value"), "sk-admin..."+value[161:])
	same(t, "life", made["expires_at"].(float64)-made["created_at"].(float64), 60)
	got := ok(t, s, "GET", adminPath+"/"+id, "", value)
	delete(made, "value")
	if made["last_used_at"] != nil || got["last_used_at"] == nil {
		t.Errorf("last used: got %v then %v", made["last_used_at"], got["last_used_at"])
	}
	got["last_used_at"] = nil
	same(t, "admin key", got, made)
	same(t, "never expires", ok(t, s, "GET", adminPath+"/"+first, "")["expires_at"], nil)

	d := ok(t, s, "DELETE", adminPath+"/"+id, "")
	same(t, "deletion", d, answerMap{"id": id, "object": "organization.admin_api_key.deleted", "deleted": true})
	refused(t, s, "DELETE", adminPath+"/"+id, "", 404, "not_found")
	refused(t, s, "GET", projectPath, "", 401, "invalid_api_key", value)
	same(t, "left", s.AdminKeys()[0].ID, first)

	redacted := map[string]bool{}
	for range 200 {
		s.AddAdminKey("many")
	}
	for _, k := range s.admins {
		redacted[k.redacted()] = true
	}
	same(t, "different redacted values", len(redacted), 201)
}

func TestServiceAccounts(t *testing.T) {
	s := New()
	made := ok(t, s, "POST", accountPath, `{"name":"a","expires_in_seconds":60,"create_service_account_only":null}`)
	id, value, keyID := made.str("id"), made.str("api_key", "value"), made.str("api_key", "id")
	if !strings.HasPrefix(id, "svc_acct_") || !strings.HasPrefix(value, "sk-svcacct-") || !strings.HasPrefix(keyID, "key_") {
		t.Errorf("got ids %s and %s", id, keyID)
	}
	same(t, "key name", made.str("api_key", "name"), "Secret Key")
	same(t, "accounts", s.ServiceAccounts(DefaultProject), []ServiceAccount{{id, "a", "member"}})
	delete(made, "api_key")
	same(t, "account", ok(t, s, "GET", accountPath+"/"+id, ""), made)
	same(t, "key works", s.Use(value), true)
	s.Advance(time.Minute)
	same(t, "key works after expiry", s.Use(value), false)
	same(t, "keys", s.ProjectKeys(DefaultProject)[0].ServiceAccountID, id)

	second := ok(t, s, "POST", accountPath+"/"+id+"/api_keys", "")
	third := ok(t, s, "POST", accountPath+"/"+id+"/api_keys", `{"name":"k","scopes":["api.all.read"],"expires_in_seconds":60}`)
	same(t, "name", second.str("name")+" "+third.str("name"), "Secret Key k")
	same(t, "expiry", second["expires_at"], nil)
	same(t, "scopes", s.ProjectKeys(DefaultProject)[2].Scopes, []string{"api.all.read"})
	d := ok(t, s, "DELETE", keyPath+"/"+second.str("id"), "")
	same(t, "deletion", d, answerMap{"id": second.str("id"), "object": "organization.project.api_key.deleted", "deleted": true})
	same(t, "deleted key works", s.Use(second.str("value")), false)
	same(t, "other key works", s.Use(third.str("value")), true)
	same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 1)

	d = ok(t, s, "DELETE", accountPath+"/"+id, "")
	same(t, "deletion", d, answerMap{"id": id, "object": "organization.project.service_account.deleted", "deleted": true})
	same(t, "key of deleted account works", s.Use(third.str("value")), false)
	same(t, "keys", len(s.ProjectKeys(DefaultProject)), 0)
	refused(t, s, "GET", keyPath+"/"+third.str("id"), "", 404, "not_found")
	refused(t, s, "DELETE", accountPath+"/"+id, "", 404, "not_found")
}

func TestAccountWithoutRole(t *testing.T) {
	s := New()
	made := ok(t, s, "POST", accountPath, `{"name":"only","create_service_account_only":true}`)
	if key, there := made["api_key"]; !there || key != nil || made.str("role") != "none" {
		t.Errorf("got %v, want role none and api_key null", made)
	}
	id := made.str("id")
	key := ok(t, s, "POST", accountPath+"/"+id+"/api_keys", `{"scopes":[]}`)
	refused(t, s, "GET", "/v1/models", "", 403, "insufficient_permissions", key.str("value"))
	for access, want := range map[string]int{"": 0, "?owner_project_access=active": 0, "?owner_project_access=inactive": 1, "?owner_project_access=any": 1} {
		list := ok(t, s, "GET", keyPath+access, "")
		same(t, "keys listed with "+access, len(list["data"].([]any)), want)
	}
	got := ok(t, s, "POST", accountPath+"/"+id, `{"role":"owner","name":"b"}`)
	same(t, "role and name", got.str("role")+" "+got.str("name"), "owner b")
	same(t, "key works", s.Use(key.str("value")), true)
	same(t, "keys listed", len(ok(t, s, "GET", keyPath, "")["data"].([]any)), 1)
}

func TestUpdateKey(t *testing.T) {
	s := New()
	made := ok(t, s, "POST", accountPath, `{"name":"a","expires_in_seconds":60}`)
	path, value := keyPath+"/"+made.str("api_key", "id"), made.str("api_key", "value")
	s.Advance(50 * time.Second)
	got := ok(t, s, "POST", path, `{"expires_in_seconds":60}`) // from now, not from the creation
	if _, there := got["value"]; there {
		t.Error("the update shows the value")
	}
	same(t, "owner", got["owner"].(map[string]any)["service_account"].(map[string]any)["id"], made["id"])
	s.Advance(59 * time.Second)
	same(t, "works", s.Use(value), true)
	before := s.ProjectKeys(DefaultProject)[0]
	ok(t, s, "POST", path, `{"scopes":["api.model.read","api.responses.write"]}`)
	before.Scopes = []string{"api.model.read", "api.responses.write"}
	same(t, "key", s.ProjectKeys(DefaultProject)[0], before)
	ok(t, s, "POST", path, `{"scopes":[],"expires_in_seconds":2}`)
	same(t, "scopes", len(s.ProjectKeys(DefaultProject)[0].Scopes), 0)
	s.Advance(2 * time.Second)
	refused(t, s, "POST", path, `{"scopes":[]}`, 400, "api_key_expired")
	ok(t, s, "DELETE", path, "")
}

func TestPolicy(t *testing.T) {
	s := New()
	made := ok(t, s, "POST", accountPath, `{"name":"a"}`)
	s.SetMaxKeyLife(100)
	for _, path := range []string{adminPath, accountPath, accountPath + "/" + made.str("id") + "/api_keys"} {
		refused(t, s, "POST", path, `{"name":"b"}`, 400, "api_key_expiration_policy")
		refused(t, s, "POST", path, `{"name":"b","expires_in_seconds":101}`, 400, "api_key_expiration_policy")
		ok(t, s, "POST", path, `{"name":"b","expires_in_seconds":100}`)
	}
	key := keyPath + "/" + made.str("api_key", "id")
	refused(t, s, "POST", key, `{"expires_in_seconds":101}`, 400, "api_key_expiration_policy")
	ok(t, s, "POST", key, `{"scopes":[]}`)
	ok(t, s, "POST", accountPath, `{"name":"c","create_service_account_only":true}`)
	same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 3)
}

func TestProjects(t *testing.T) {
	s := New()
	made := ok(t, s, "POST", "/v1/organization/projects", `{"name":"p","residency":"GLOBAL","external_key_id":"x"}`)
	id := made.str("id")
	same(t, "status", made.str("status"), "active")
	same(t, "residency", made.str("residency"), "GLOBAL")
	same(t, "project", ok(t, s, "GET", "/v1/organization/projects/"+id, ""), made)
	made = ok(t, s, "POST", "/v1/organization/projects/"+id, `{"name":"q","external_key_id":null}`)
	same(t, "updated", made.str("name")+made.str("external_key_id"), "qx")

	account := ok(t, s, "POST", "/v1/organization/projects/"+id+"/service_accounts", `{"name":"a"}`)
	got := ok(t, s, "POST", "/v1/organization/projects/"+id+"/archive", "")
	same(t, "status", got.str("status"), "archived")
	same(t, "archived at", got["archived_at"] != nil, true)
	same(t, "key works", s.Use(account.str("api_key", "value")), false)
	same(t, "accounts", len(s.ServiceAccounts(id))+len(s.ProjectKeys(id)), 0)
	same(t, "keys listed", len(ok(t, s, "GET", "/v1/organization/projects/"+id+"/api_keys", "")["data"].([]any)), 0)
	for query, want := range map[string]int{"": 1, "?include_archived=false": 1, "?include_archived=true": 2} {
		list := ok(t, s, "GET", "/v1/organization/projects"+query, "")
		same(t, "projects with "+query, len(list["data"].([]any)), want)
	}
}

func TestPages(t *testing.T) {
	s := New()
	empty := ok(t, s, "GET", accountPath, "")
	same(t, "empty", empty, answerMap{"object": "list", "data": []any{}, "first_id": nil, "last_id": nil, "has_more": false})
	var ids []string
	for i := range 45 {
		ids = append(ids, s.AddServiceAccount(DefaultProject, fmt.Sprint(i), "member"))
	}
	list := func(path, query string) (got []string, pages int) {
		t.Helper()
		for after := ""; ; pages++ {
			a := ok(t, s, "GET", path+"?"+query+after, "")
			data := a["data"].([]any)
			for _, v := range data {
				got = append(got, answerMap(v.(map[string]any)).str("id"))
			}
			if len(data) > 0 && (a.str("first_id") != got[len(got)-len(data)] || a.str("last_id") != got[len(got)-1]) {
				t.Errorf("got first_id %s, last_id %s", a.str("first_id"), a.str("last_id"))
			}
			if a["has_more"] != true {
				return got, pages + 1
			}
			after = "&after=" + a.str("last_id")
		}
	}
	for query, want := range map[string]int{"": 3, "limit=45": 1, "limit=44": 2, "limit=1": 45} {
		got, pages := list(accountPath, query)
		same(t, "order with "+query, got, ids)
		same(t, "pages with "+query, pages, want)
	}
	same(t, "default limit", len(ok(t, s, "GET", accountPath, "")["data"].([]any)), 20)
	// A cursor keeps its place when its object is deleted.
	ok(t, s, "DELETE", accountPath+"/"+ids[9], "")
	a := ok(t, s, "GET", accountPath+"?limit=1&after="+ids[9], "")
	same(t, "after a deleted one", a.str("first_id"), ids[10])
	a = ok(t, s, "GET", accountPath+"?after="+ids[44], "")
	same(t, "after the last", len(a["data"].([]any)), 0)

	var keys []string
	for range 5 {
		s.AddAdminKey("k")
	}
	for _, k := range s.AdminKeys() {
		keys = append(keys, k.ID)
	}
	got, _ := list(adminPath, "limit=2&order=asc")
	same(t, "ascending", got, keys)
	slices.Reverse(keys)
	got, _ = list(adminPath, "limit=2&order=desc")
	same(t, "descending", got, keys)
	ok(t, s, "DELETE", adminPath+"/"+keys[2], "")
	a = ok(t, s, "GET", adminPath+"?order=desc&after="+keys[2], "")
	same(t, "descending after a deleted one", a.str("first_id"), keys[3])
}

func TestContentType(t *testing.T) {
	s := New()
	admin, _ := s.AdminKey()
	for contentType, want := range map[string]int{
		"": 400, "text/plain": 400, "application/x-www-form-urlencoded": 400,
		"application/json": 200, "Application/JSON; charset=utf-8": 200,
	} {
		req, _ := http.NewRequest("POST", "https://api.openai.com"+accountPath, strings.NewReader(`{"name":"a"}`))
		req.Header.Set("Authorization", "Bearer "+admin)
		req.Header.Set("Content-Type", contentType)
		status, _ := send(t, s, req)
		same(t, "Content-Type "+contentType, status, want)
	}
}

func TestLax(t *testing.T) {
	s := New()
	s.SetLax(true)
	account := ok(t, s, "POST", accountPath, `{"name":"a","create_service_account_only":true,"expires_in_seconds":1}`)
	list := ok(t, s, "GET", accountPath+"?limit=0&after=after", "")
	same(t, "listed", len(list["data"].([]any)), 1)
	ok(t, s, "POST", accountPath+"/"+account.str("id")+"/api_keys", `{"scopes":["string"]}`)
	ok(t, s, "POST", "/v1/organization/projects", `{"name":"a","residency":"GLOBAL","geography":"US"}`)
	refused(t, s, "GET", accountPath+"?limit=101", "", 400, "integer_above_max_value")
}

func TestRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.SetRateLimit(4, 2)
		ok(t, s, "GET", projectPath, "")
		ok(t, s, "GET", projectPath, "")
		admin, _ := s.AdminKey()
		for _, want := range []struct{ ms, seconds string }{{"250", "1"}, {"150", "1"}} {
			req, _ := http.NewRequest("GET", "https://api.openai.com"+projectPath, nil)
			req.Header.Set("Authorization", "Bearer "+admin)
			resp, err := s.Transport().RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			same(t, "status", resp.StatusCode, 429)
			same(t, "Retry-After-Ms", resp.Header.Get("Retry-After-Ms"), want.ms)
			same(t, "Retry-After", resp.Header.Get("Retry-After"), want.seconds)
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(50 * time.Millisecond)
		ok(t, s, "GET", projectPath, "") // as told
		refused(t, s, "GET", projectPath, "", 429, "rate_limit_exceeded")
		s.Advance(time.Hour)
		ok(t, s, "GET", projectPath, "")
		ok(t, s, "GET", projectPath, "")
		refused(t, s, "GET", projectPath, "", 429, "rate_limit_exceeded") // no more than the burst
		s.SetRateLimit(0, 0)
		ok(t, s, "GET", projectPath, "")
	})
}

func TestLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.SetLatency(10 * time.Second)
		start := time.Now()
		ok(t, s, "GET", projectPath, "")
		same(t, "latency", time.Since(start), 10*time.Second)
		for i, test := range []struct {
			patience time.Duration
			accounts int
		}{{4 * time.Second, 0}, {6 * time.Second, 1}} {
			ctx, cancel := context.WithTimeout(t.Context(), test.patience)
			defer cancel()
			start := time.Now()
			_, err := s.Transport().RoundTrip(createRequest(ctx, s))
			same(t, "error", err, context.DeadlineExceeded)
			same(t, "waited", time.Since(start), test.patience)
			same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), test.accounts)
			c := s.Calls()[1+i]
			same(t, "status", c.Status, 0)
			same(t, "processed", c.Processed, test.accounts == 1)
		}
	})
}

func createRequest(ctx context.Context, s *Server) *http.Request {
	admin, _ := s.AdminKey()
	req, err := http.NewRequestWithContext(ctx, "POST", "https://api.openai.com"+accountPath, strings.NewReader(`{"name":"a"}`))
	if err != nil {
		panic(err)
	}
	req.Header.Set("Authorization", "Bearer "+admin)
	req.Header.Set("Content-Type", "application/json")
	return req
}

func TestFaults(t *testing.T) {
	for _, test := range []struct {
		name   string
		fault  Fault
		status int    // 0: an error
		op     string // of the *net.OpError
		err    error
		body   func(resp *http.Response, body string) bool
	}{
		{"status", Fault{Status: 503}, 503, "", nil, func(_ *http.Response, body string) bool {
			var a answerMap
			return json.Unmarshal([]byte(body), &a) == nil && a.str("error", "type") == "server_error"
		}},
		{"default status", Fault{}, 500, "", nil, nil},
		{"header and body", Fault{Status: 429, Header: http.Header{"retry-after": {"7"}}, Body: "slow down"}, 429, "", nil,
			func(resp *http.Response, body string) bool {
				return body == "slow down" && resp.Header.Get("Retry-After") == "7"
			}},
		{"close", Fault{Kind: "close"}, 0, "read", syscall.ECONNRESET, nil},
		{"refuse", Fault{Kind: "refuse"}, 0, "dial", syscall.ECONNREFUSED, nil},
		{"malformed", Fault{Kind: "malformed"}, 200, "", nil, func(_ *http.Response, body string) bool { return !json.Valid([]byte(body)) }},
		{"oversized", Fault{Kind: "oversized"}, 200, "", nil, func(_ *http.Response, body string) bool {
			return json.Valid([]byte(body)) && len(body) > 1<<20
		}},
		{"redirect", Fault{Kind: "redirect"}, 307, "", nil, func(resp *http.Response, _ string) bool {
			return resp.Header.Get("Location") == "https://"+RedirectHost+accountPath
		}},
	} {
		for _, process := range []bool{false, true} {
			s := New()
			test.fault.Process = process
			s.Inject(test.fault)
			status := 0
			resp, err := s.Transport().RoundTrip(createRequest(t.Context(), s))
			if err == nil {
				status = resp.StatusCode
				body, _ := io.ReadAll(resp.Body)
				if test.body != nil && !test.body(resp, string(body)) {
					t.Errorf("%s: got header %v and %d bytes of body", test.name, resp.Header, len(body))
				}
			}
			var op *net.OpError
			if test.err != nil && (!errors.Is(err, test.err) || !errors.As(err, &op) || op.Op != test.op) {
				t.Errorf("%s: got error %v, want %s and %v", test.name, err, test.op, test.err)
			}
			same(t, test.name+": status", status, test.status)
			process = process && test.fault.Kind != "refuse"
			same(t, test.name+": accounts made", len(s.ServiceAccounts(DefaultProject)) == 1, process)
			same(t, test.name+": recorded", []any{s.Calls()[0].Status, s.Calls()[0].Processed}, []any{test.status, process})
			ok(t, s, "GET", projectPath, "") // hit once
		}
	}
}

func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.Inject(Fault{Kind: "hang", Process: true})
		client := &http.Client{Transport: s.Transport(), Timeout: 5 * time.Second}
		start := time.Now()
		_, err := client.Do(createRequest(t.Context(), s))
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got error %v, want a timeout", err)
		}
		same(t, "waited", time.Since(start), 5*time.Second)
		same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 1)
	})
}

func TestFaultQueue(t *testing.T) {
	s := New()
	s.Inject(Fault{Method: "GET", Path: `/projects/[^/]+$`, Skip: 1, Times: 2, Status: 502})
	s.Inject(Fault{Method: "GET", Status: 503})
	s.Inject(Fault{Method: "DELETE", Times: -1, Status: 504})
	got := []int{}
	for _, c := range []struct{ method, path string }{
		{"GET", projectPath}, // passes the first fault, meets the second
		{"GET", projectPath}, {"POST", accountPath}, {"GET", accountPath},
		{"GET", projectPath}, {"GET", projectPath},
		{"DELETE", accountPath + "/x"}, {"DELETE", accountPath + "/x"},
	} {
		body := ""
		if c.method == "POST" {
			body = `{"name":"a"}`
		}
		status, _ := call(t, s, c.method, c.path, body)
		got = append(got, status)
	}
	same(t, "statuses", got, []int{503, 502, 200, 200, 502, 200, 504, 504})
	s.ClearFaults()
	refused(t, s, "DELETE", accountPath+"/x", "", 404, "not_found")

	for _, f := range []Fault{{Path: "("}, {Kind: "explode"}, {Late: -1}} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("Inject(%+v) did not panic", f)
				}
			}()
			s.Inject(f)
		}()
	}
}

func TestRedirectIsSeen(t *testing.T) {
	s := New()
	s.Inject(Fault{Kind: "redirect"})
	client := &http.Client{Transport: s.Transport()}
	if _, err := client.Do(createRequest(t.Context(), s)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("got error %v, want a refused connection", err)
	}
	same(t, "host", s.Calls()[1].Host, RedirectHost)
}

func TestHTTP(t *testing.T) {
	s := New()
	server := httptest.NewServer(s)
	defer server.Close()
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	do := func(ctx context.Context) (*http.Response, error) {
		req := createRequest(ctx, s)
		req.URL.Scheme, req.URL.Host = "http", strings.TrimPrefix(server.URL, "http://")
		resp, err := client.Do(req)
		if err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		return resp, err
	}
	for _, test := range []struct {
		kind   string
		status int
	}{{"", 500}, {"close", 0}, {"refuse", 0}, {"malformed", 200}, {"oversized", 200}, {"redirect", 307}} {
		s.Inject(Fault{Kind: test.kind})
		resp, err := do(t.Context())
		if test.status == 0 {
			if !errors.Is(err, io.EOF) {
				t.Errorf("%s: got %v, want EOF", test.kind, err)
			}
		} else if err != nil || resp.StatusCode != test.status || resp.Header.Get("X-Request-Id") == "" {
			t.Errorf("%q: got %v %v, want %d with x-request-id", test.kind, resp, err, test.status)
		}
	}
	same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 0)

	s.Inject(Fault{Kind: "hang"})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := do(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: got %v, want a timeout", err)
	}
	resp, err := do(t.Context())
	if err != nil || resp.StatusCode != 200 {
		t.Errorf("after the faults: got %v %v, want 200", resp, err)
	}
	same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 1)
	resp, err = http.Get(server.URL + "/")
	if err != nil || resp.StatusCode != 404 {
		t.Errorf("other path: got %v %v, want 404", resp, err)
	}
}

func TestControl(t *testing.T) {
	s := New()
	control := func(method, path, body string) (int, string) {
		t.Helper()
		req := httptest.NewRequest(method, "/_sim/"+path, strings.NewReader(body))
		w := httptest.NewRecorder()
		s.ServeHTTP(w, req)
		return w.Code, w.Body.String()
	}
	for _, c := range []struct{ method, path, body, want string }{
		{"POST", "projects", `{"id":"p","name":"P"}`, `{"id":"p"}`},
		{"POST", "accounts", `{"project":"p","id":"a","name":"A","role":"member"}`, `{"id":"a"}`},
		{"POST", "keys", `{"project":"p","account":"a","id":"k","name":"K","value":"v"}`, `{"id":"k","value":"v"}`},
		{"POST", "adminkeys", `{"id":"admin","name":"Admin","value":"w"}`, `{"id":"admin","value":"w"}`},
	} {
		status, body := control(c.method, c.path, c.body)
		same(t, c.path, status, 200)
		same(t, c.path, body, c.want)
	}
	same(t, "key works", s.Use("v"), true)
	ok(t, s, "GET", projectPath, "", "w")
	_, body := control("GET", "calls", "")
	var calls []Call
	if err := json.Unmarshal([]byte(body), &calls); err != nil || len(calls) != 1 || calls[0].KeyID != "admin" {
		t.Errorf("calls: got %s", body)
	}
	_, body = control("GET", "state", "")
	for _, want := range []string{`"id":"admin"`, `"service_accounts":[{"id":"a","name":"A","role":"member"}]`, `"id":"k"`, `"service_accounts":[]`} {
		if !strings.Contains(body, want) {
			t.Errorf("state: got %s, want %s in it", body, want)
		}
	}
	for _, c := range []struct{ method, path, body string }{
		{"POST", "faults", `{"method":"GET","path":"models","skip":1,"times":2,"status":503,` +
			`"header":{"Retry-After":["1"]},"body":"b","process":true,"late":"1m30s","kind":""}`},
		{"POST", "latency", `{"duration":"2ms"}`},
		{"POST", "keydelay", `{"duration":"1h"}`},
		{"POST", "advance", `{"duration":"1h"}`},
		{"POST", "ratelimit", `{"per_second":1.5,"burst":3}`},
		{"POST", "maxkeylife", `{"seconds":60}`},
		{"POST", "lax", `{"on":true}`},
		{"POST", "endpointlimit", `{"per_minute":8,"burst":2,"window":true,"headers":true}`},
		{"POST", "date", `{"mode":"none"}`},
		{"POST", "gonestatus", `{"status":410,"typed":true}`},
		{"POST", "adminaccess", `{"id":"admin","access":"read"}`},
		{"POST", "archive", `{"id":"p"}`},
		{"DELETE", "calls", ""},
	} {
		status, body := control(c.method, c.path, c.body)
		same(t, c.method+" "+c.path, fmt.Sprint(status, body), "200{}")
	}
	f := *s.faults[0]
	f.path = nil
	want := Fault{
		Method: "GET", Path: "models", Skip: 1, Times: 2, Status: 503, Header: http.Header{"Retry-After": {"1"}},
		Body: "b", Process: true, Late: 90 * time.Second,
	}
	same(t, "fault", f, want)
	same(t, "more settings", []any{s.endpointLimit, s.dateless, s.goneStatus, s.goneTyped, s.admins[1].access},
		[]any{limiter{capacity: 8, headers: true, quota: 8}, true, 410, true, "read"})
	text, _ := json.Marshal(want)
	control("POST", "faults", string(text))
	f = *s.faults[1]
	f.path = nil
	same(t, "fault written and read", f, want)
	same(t, "settings", []any{s.latency, s.keyDelay, s.offset, s.limit.rate, s.limit.capacity},
		[]any{2 * time.Millisecond, time.Hour, time.Hour, 1.5, 3.0})
	same(t, "other settings", []any{s.maxKeyLife, s.lax, s.Use("v"), len(s.Calls())}, []any{60, true, false, 0})
	control("DELETE", "faults", "")
	same(t, "faults", len(s.faults), 0)

	for _, c := range []struct{ method, path, body string }{
		{"GET", "nothing", ""}, {"POST", "faults", "{"}, {"POST", "faults", `{"path":"("}`}, {"POST", "faults", `{"kinds":"close"}`},
		{"POST", "faults", `{"late":"1"}`}, {"POST", "faults", `{"late":1}`}, {"POST", "faults", `{"late":"-1s"}`},
		{"POST", "date", `{"mode":"x"}`}, {"POST", "gonestatus", `{"status":200}`},
		{"POST", "adminaccess", `{"id":"x","access":"all"}`}, {"POST", "adminaccess", `{"id":"admin","access":"x"}`},
		{"POST", "latency", `{"duration":"1"}`}, {"POST", "projects", `{"id":"p"}`}, {"POST", "archive", `{"id":"q"}`},
		{"POST", "accounts", `{"project":"p","role":"member"}`}, {"POST", "accounts", `{"project":"` + DefaultProject + `","role":"x"}`},
		{"POST", "keys", `{"project":"` + DefaultProject + `","account":"x"}`}, {"POST", "adminkeys", `{"value":"w"}`},
	} {
		status, body := control(c.method, c.path, c.body)
		if status != 400 || !strings.Contains(body, `"error":`) {
			t.Errorf("%s %s %s: got %d %s, want 400", c.method, c.path, c.body, status, body)
		}
	}
}

func TestConcurrency(t *testing.T) {
	s := New()
	s.Inject(Fault{Method: "GET", Path: "models", Status: 503, Times: 10})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			for range 10 {
				a := ok(t, s, "POST", accountPath, `{"name":"a","expires_in_seconds":60}`)
				ok(t, s, "GET", accountPath+"?limit=100", "")
				call(t, s, "GET", "/v1/models", "", a.str("api_key", "value"))
				if i%2 == 0 {
					ok(t, s, "DELETE", accountPath+"/"+a.str("id"), "")
				}
				s.Advance(time.Millisecond)
				s.ServiceAccounts(DefaultProject)
				s.ProjectKeys(DefaultProject)
				s.AdminKeys()
				s.Calls()
			}
		})
	}
	wg.Wait()
	same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 100)
	same(t, "keys", len(s.ProjectKeys(DefaultProject)), 100)
	same(t, "calls", len(s.Calls()), 20*10*3+100)
	hit := 0
	for _, c := range s.Calls() {
		if c.Status == 503 {
			hit++
		}
	}
	same(t, "faults", hit, 10)
}
