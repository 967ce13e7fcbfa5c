// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// get makes a GET with the first admin key and returns the answer, whose body is closed.
func get(t *testing.T, s *Server, path string) *http.Response {
	t.Helper()
	admin, _ := s.AdminKey()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "https://api.openai.com"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+admin)
	resp, err := s.Transport().RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	return resp
}

func TestDate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.Advance(36 * time.Hour)
		date := func() string { t.Helper(); return get(t, s, projectPath).Header.Get("Date") }
		same(t, "date", date(), "Sun, 02 Jan 2000 12:00:00 GMT")
		s.Inject(Fault{Kind: "malformed"})
		same(t, "date of a fault", date(), "Sun, 02 Jan 2000 12:00:00 GMT")
		s.Inject(Fault{Header: http.Header{"Date": {"yesterday"}}})
		same(t, "date that a fault gives", date(), "yesterday")
		time.Sleep(time.Second)
		same(t, "date", get(t, s, "/v1/nothing").Header.Get("Date"), "Sun, 02 Jan 2000 12:00:01 GMT")
		s.SetLatency(10 * time.Second)
		same(t, "date when the answer was made", date(), "Sun, 02 Jan 2000 12:00:06 GMT")
		s.SetDate("none")
		_, there := get(t, s, projectPath).Header["Date"]
		same(t, "there is a date", there, false)
		s.SetDate("")
		same(t, "there is a date again", date() != "", true)
	})
}

func TestDateOverHTTP(t *testing.T) {
	s := New()
	s.Advance(240 * time.Hour)
	server := httptest.NewServer(s)
	defer server.Close()
	date := func(path string) (dates []string) {
		t.Helper()
		resp, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.Header["Date"]
	}
	got := date("/v1/models")
	if len(got) != 1 || !strings.HasSuffix(got[0], " GMT") {
		t.Fatalf("got dates %q, want one", got)
	}
	at, err := http.ParseTime(got[0])
	if off := time.Until(at) - 240*time.Hour; err != nil || off.Abs() > time.Minute {
		t.Errorf("got date %v, %v, off by %v", at, err, off)
	}
	s.SetDate("none")
	same(t, "dates", date("/v1/models"), nil)
}

// lose makes a call that a fault answers, and returns the status or the error.
func lose(t *testing.T, s *Server, f Fault, req *http.Request) (int, error) {
	t.Helper()
	s.Inject(f)
	resp, err := s.Transport().RoundTrip(req)
	if err != nil {
		return 0, err
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}

func TestLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		start := time.Now()
		req := createRequest(t.Context(), s)
		if _, err := lose(t, s, Fault{Kind: "close", Late: time.Minute}, req); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("got error %v, want a closed connection", err)
		}
		req.Header.Del("Content-Type") // the caller may do with it what it likes
		status, _ := lose(t, s, Fault{Status: 502, Late: 30 * time.Second}, createRequest(t.Context(), s))
		same(t, "status", status, 502)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := lose(t, s, Fault{Kind: "hang", Late: 2 * time.Hour, Process: true}, createRequest(ctx, s))
		same(t, "error", err, context.DeadlineExceeded)
		same(t, "answered at once", time.Since(start), 5*time.Second)
		s.ClearFaults()

		time.Sleep(25*time.Second - 1)
		same(t, "too early", len(s.ServiceAccounts(DefaultProject)), 0)
		time.Sleep(time.Nanosecond)
		same(t, "the first, which came second", len(s.ServiceAccounts(DefaultProject)), 1)
		same(t, "processed", []bool{s.Calls()[0].Processed, s.Calls()[1].Processed}, []bool{false, true})
		same(t, "time of the call", s.Calls()[1].Time.Equal(start), true)
		s.Advance(time.Hour)
		list := ok(t, s, "GET", accountPath, "")["data"].([]any)
		same(t, "accounts", len(list), 2)
		for i, late := range []time.Duration{30 * time.Second, time.Minute} {
			same(t, "created_at", list[i].(map[string]any)["created_at"], any(float64(start.Add(late).Unix())))
			same(t, "key created", s.ProjectKeys(DefaultProject)[i].Created.Equal(start.Add(late)), true)
		}
		time.Sleep(time.Hour)
		same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 3)
		same(t, "late calls left", len(s.late), 0)
	})
}

func TestLateWithoutEffect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		late := Fault{Late: time.Minute}
		// Refused on arrival, and not asked again.
		value, id := s.AddAdminKey("reader")
		s.SetAdminKeyAccess(id, "read")
		req := createRequest(t.Context(), s)
		req.Header.Set("Authorization", "Bearer "+value)
		lose(t, s, late, req)
		s.SetAdminKeyAccess(id, "all")
		s.SetKeyDelay(time.Second)
		value, _ = s.AddAdminKey("not ready")
		req = createRequest(t.Context(), s)
		req.Header.Set("Authorization", "Bearer "+value)
		lose(t, s, late, req)
		lose(t, s, Fault{Kind: "refuse", Late: time.Minute}, createRequest(t.Context(), s))
		same(t, "late calls", len(s.late), 0)

		// The key may die, but not the project; the deletion comes later than another.
		_, id = s.AdminKey()
		account := s.AddServiceAccount(DefaultProject, "a", "member")
		s.AddProject("proj_old", "Old")
		other := createRequest(t.Context(), s)
		other.URL.Path = strings.Replace(other.URL.Path, DefaultProject, "proj_old", 1)
		lose(t, s, late, other)
		del := createRequest(t.Context(), s)
		del.Method, del.Body = "DELETE", nil
		del.URL.Path += "/" + account
		lose(t, s, late, del)
		lose(t, s, late, createRequest(t.Context(), s))
		ok(t, s, "DELETE", accountPath+"/"+account, "")
		s.ArchiveProject("proj_old")
		ok(t, s, "DELETE", adminPath+"/"+id, "")
		time.Sleep(time.Minute)
		same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 1)
		same(t, "accounts of the archived project", len(s.ServiceAccounts("proj_old")), 0)
		var processed []bool
		for _, c := range s.Calls() {
			processed = append(processed, c.Processed)
		}
		same(t, "processed", processed, []bool{false, false, false, false, false, true, true, true})
	})
}

func TestEndpointLimitBucket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.SetEndpointLimit(6, 2, false, true)
		for range 2 {
			ok(t, s, "GET", projectPath, "")
			ok(t, s, "POST", projectPath, `{"name":"p"}`)
			ok(t, s, "GET", accountPath, "")
		}
		s.AddProject("proj_other", "Other")
		refused(t, s, "GET", "/v1/organization/projects/proj_other", "", 429, "rate_limit_exceeded") // the same endpoint
		refused(t, s, "POST", projectPath, `{}`, 429, "rate_limit_exceeded")
		time.Sleep(4 * time.Second)
		h := get(t, s, projectPath).Header
		for name, want := range map[string]string{
			"Retry-After": "6", "Retry-After-Ms": "6000", "X-Ratelimit-Limit-Requests": "6",
			"X-Ratelimit-Remaining-Requests": "0", "X-Ratelimit-Reset-Requests": "6s",
		} {
			same(t, name, h.Get(name), want)
		}
		refused(t, s, "GET", projectPath, "", 401, "invalid_api_key", "sk-admin-x")
		time.Sleep(6 * time.Second)
		ok(t, s, "GET", projectPath, "") // the refused calls did not count
		refused(t, s, "GET", projectPath, "", 429, "rate_limit_exceeded")

		s.SetEndpointLimit(8, 0, false, false)
		for range 8 {
			ok(t, s, "GET", projectPath, "")
		}
		resp := get(t, s, projectPath)
		same(t, "status", resp.StatusCode, 429)
		for name := range resp.Header {
			if strings.HasPrefix(name, "Retry-After") || strings.HasPrefix(name, "X-Ratelimit") {
				t.Errorf("got a header %s", name)
			}
		}
		s.SetEndpointLimit(0, 5, false, false)
		for range 20 {
			ok(t, s, "GET", projectPath, "")
		}
	})
}

func TestEndpointLimitWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		s.SetEndpointLimit(3, 1, true, true)
		time.Sleep(50 * time.Second)
		for range 3 {
			ok(t, s, "GET", projectPath, "") // the first begins the window
		}
		time.Sleep(20 * time.Second)
		same(t, "Retry-After", get(t, s, projectPath).Header.Get("Retry-After"), "40")
		time.Sleep(40*time.Second - 1)
		refused(t, s, "GET", projectPath, "", 429, "rate_limit_exceeded")
		time.Sleep(time.Nanosecond)
		for range 3 {
			ok(t, s, "GET", projectPath, "")
		}
		refused(t, s, "GET", projectPath, "", 429, "rate_limit_exceeded")
		// A call that one limit refuses does not count for the other.
		s.SetEndpointLimit(1, 0, true, false)
		s.SetRateLimit(0.001, 2)
		ok(t, s, "GET", projectPath, "")
		refused(t, s, "GET", projectPath, "", 429, "rate_limit_exceeded")
		ok(t, s, "GET", accountPath, "")
		refused(t, s, "GET", keyPath, "", 429, "rate_limit_exceeded")
		s.SetRateLimit(0, 0)
		ok(t, s, "GET", keyPath, "")
	})
}

func TestAdminKeyAccess(t *testing.T) {
	s := New()
	value, id := s.AddAdminKey("restricted")
	for access, want := range map[string]int{"read": 403, "write": 200, "all": 200} {
		s.SetAdminKeyAccess(id, access)
		ok(t, s, "GET", accountPath, "", value)
		for _, path := range []string{accountPath, adminPath} {
			status, a := call(t, s, "POST", path, `{"name":"a"}`, value)
			same(t, "status with "+access, status, want)
			if want == 403 {
				same(t, "error", a["error"], any(map[string]any{
					"type": "invalid_request_error", "code": "insufficient_permissions", "param": nil,
					"message": "You have insufficient permissions for this operation. Missing scopes: api.management.write.",
				}))
			}
		}
	}
	s.SetAdminKeyAccess(id, "read")
	refused(t, s, "DELETE", adminPath+"/"+id, "", 403, "insufficient_permissions", value)
	ok(t, s, "DELETE", adminPath+"/"+id, "") // the first key has all access
	defer func() {
		if recover() == nil {
			t.Error("SetAdminKeyAccess for a deleted key did not panic")
		}
	}()
	s.SetAdminKeyAccess(id, "all")
}

func TestGoneStatus(t *testing.T) {
	s := New()
	made := ok(t, s, "POST", accountPath, `{"name":"a"}`)
	account, key := accountPath+"/"+made.str("id"), keyPath+"/"+made.str("api_key", "id")
	s.SetGoneStatus(410, true)
	ok(t, s, "DELETE", key, "")
	ok(t, s, "DELETE", account, "")
	for _, path := range []string{key, account, accountPath + "/never", adminPath + "/key_none"} {
		s.SetGoneStatus(410, true)
		refused(t, s, "DELETE", path, "", 410, "")
		refused(t, s, "GET", path, "", 404, "not_found")
		for _, want := range []int{400, 404} {
			s.SetGoneStatus(want, false)
			status, a := call(t, s, "DELETE", path, "")
			_, typed := a["error"]
			same(t, "untyped answer", []any{status, typed, a.str("detail") != ""}, []any{want, false, true})
			refused(t, s, "GET", path, "", 404, "not_found")
		}
		s.SetGoneStatus(0, true)
		refused(t, s, "DELETE", path, "", 404, "not_found")
	}
	s.SetGoneStatus(410, true)
	refused(t, s, "DELETE", "/v1/organization/projects/proj_none/service_accounts/a", "", 404, "not_found")
}

// TestViews compares what is shown of keys and accounts with the fields of OpenAI's
// OpenAPI document and, for expires_at, of its Go SDK.
func TestViews(t *testing.T) {
	s := New()
	made := ok(t, s, "POST", accountPath, `{"name":"a","expires_in_seconds":60}`)
	id, keyID := made.str("id"), made.str("api_key", "id")
	fields := func(v any) (names []string) {
		for name := range v.(map[string]any) {
			names = append(names, name)
		}
		slices.Sort(names)
		return names
	}
	shown := ok(t, s, "GET", accountPath+"/"+id, "")
	same(t, "account", fields(map[string]any(shown)), []string{"created_at", "id", "name", "object", "role"})
	same(t, "created_at", shown["created_at"], made["created_at"])

	key := ok(t, s, "GET", keyPath+"/"+keyID, "")
	list := ok(t, s, "GET", keyPath, "")["data"].([]any)
	same(t, "the key as listed", answerMap(list[0].(map[string]any)), key)
	same(t, "key", fields(map[string]any(key)), []string{
		"created_at", "expires_at", "id", "last_used_at", "name", "object", "owner", "owner_project_access", "redacted_value",
	})
	same(t, "life", key["expires_at"].(float64)-key["created_at"].(float64), 60)
	value := made.str("api_key", "value")
	same(t, "redacted", key.str("redacted_value"), "sk-svcacct..."+value[len(value)-3:])
	same(t, "owner", fields(key["owner"]), []string{"service_account", "type"})
	owner := key["owner"].(map[string]any)["service_account"]
	same(t, "owner", fields(owner), []string{"created_at", "id", "name", "role"})
	same(t, "owner's creation", owner.(map[string]any)["created_at"], made["created_at"])
	ever := ok(t, s, "POST", accountPath+"/"+id+"/api_keys", "")
	same(t, "expires_at", ok(t, s, "GET", keyPath+"/"+ever.str("id"), "")["expires_at"], nil)

	_, first := s.AdminKey()
	admin := ok(t, s, "GET", adminPath+"/"+first, "")
	same(t, "admin key", fields(map[string]any(admin)), []string{
		"created_at", "expires_at", "id", "last_used_at", "name", "object", "owner", "redacted_value",
	})
	same(t, "owner", fields(admin["owner"]), []string{"created_at", "id", "name", "object", "role", "type"})

	s.AddProject("proj_unnamed", "") // in the SDK, names of projects and admin keys can be null
	_, unnamed := s.AddAdminKey("")
	for _, path := range []string{"/v1/organization/projects/proj_unnamed", adminPath + "/" + unnamed} {
		name, there := ok(t, s, "GET", path, "")["name"]
		same(t, "name of "+path, []any{name, there}, []any{nil, true})
	}
}

// TestUserKey: a project also has keys that users own. They look as OpenAI's Go SDK knows them, and outlive accounts.
func TestUserKey(t *testing.T) {
	s := New()
	account := s.AddServiceAccount(DefaultProject, "a", "member")
	s.AddKey(DefaultProject, account, "k")
	id := s.AddUserKey(DefaultProject, "k")
	same(t, "keys", s.Names(DefaultProject)[id], "k")
	same(t, "account", s.ProjectKeys(DefaultProject)[1].ServiceAccountID, "")
	same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 1)

	key := ok(t, s, "GET", keyPath+"/"+id, "")
	created := ok(t, s, "GET", projectPath, "")["created_at"]
	same(t, "owner", key["owner"], any(map[string]any{"type": "user", "user": map[string]any{
		"id": "user-sim", "name": "Simulated owner", "role": "owner", "email": "owner@openaisim.invalid", "created_at": created}}))
	same(t, "access", key.str("owner_project_access"), "active")
	same(t, "redacted", strings.HasPrefix(key.str("redacted_value"), "sk-proj..."), true)
	same(t, "listed", len(ok(t, s, "GET", keyPath, "")["data"].([]any)), 2)

	ok(t, s, "DELETE", accountPath+"/"+account, "")
	same(t, "left", ok(t, s, "GET", keyPath, "")["data"], any([]any{map[string]any(key)}))
	refused(t, s, "GET", accountPath+"/user-sim", "", 404, "not_found")
	ok(t, s, "POST", keyPath+"/"+id, `{"expires_in_seconds":60}`)
	ok(t, s, "DELETE", keyPath+"/"+id, "")
	refused(t, s, "GET", keyPath+"/"+id, "", 404, "not_found")
}

func TestLateOverHTTP(t *testing.T) {
	s := New()
	server := httptest.NewServer(s)
	defer server.Close()
	resp, err := http.Post(server.URL+"/_sim/faults", "application/json",
		strings.NewReader(`{"method":"POST","status":504,"late":"1h"}`))
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v %v", resp, err)
	}
	resp.Body.Close()
	req := createRequest(t.Context(), s)
	req.URL.Scheme, req.URL.Host = "http", strings.TrimPrefix(server.URL, "http://")
	resp, err = http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != 504 {
		t.Fatalf("got %v %v, want 504", resp, err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 0)
	s.Advance(time.Hour)
	same(t, "accounts", len(s.ServiceAccounts(DefaultProject)), 1)
}
