// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

// read reads a credential of a role, which must succeed, and returns the whole answer.
func (e *engine) read(role string) map[string]any {
	e.t.Helper()
	return e.api("GET", e.mount+"/creds/"+role, nil, http.StatusOK)
}

// expectCalls checks which calls OpenAI has got since the last time, as method and path below
// the project.
func (e *engine) expectCalls(what string, want ...string) {
	e.t.Helper()
	var got []string
	for _, c := range e.sim.Calls() {
		got = append(got, c.Method+" "+strings.TrimPrefix(c.Path, "/organization/projects/"+project))
	}
	if !slices.Equal(got, want) {
		e.t.Errorf("%s: OpenAI got the calls %q, want %q", what, got, want)
	}
	e.sim.ResetCalls()
}

// keysOf returns the keys of a service account.
func (e *engine) keysOf(account string) []openaisim.ProjectKey {
	return slices.DeleteFunc(e.sim.ProjectKeys(project), func(k openaisim.ProjectKey) bool { return k.ServiceAccountID != account })
}

func TestScopedKey(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		e.cli("write", e.mount+"/roles/scoped", "project_id="+project, "scopes=api.responses.write,api.all.read", "service_account_role=owner", "ttl=10m")
		e.sim.ResetCalls()
		issued := time.Now()
		answer := e.read("scoped")
		data := answer["data"].(map[string]any)
		account := data["service_account_id"].(string)
		e.expectCalls("issue", "POST /service_accounts", "POST /service_accounts/"+account, "POST /service_accounts/"+account+"/api_keys")

		want := []string{"api.responses.write", "api.all.read"} // as they were written
		keys := e.keysOf(account)
		if len(keys) != 1 || keys[0].ID != data["api_key_id"] || !slices.Equal(keys[0].Scopes, want) {
			t.Fatalf("keys of the account: got %v, want %v alone with the scopes %v", keys, data["api_key_id"], want)
		}
		checkTime(t, "expiry of the key", keys[0].Expires, issued.Add(10*time.Minute), time.Now().Add(11*time.Minute))
		if role := e.sim.ServiceAccounts(project)[0].Role; role != "owner" {
			t.Errorf("role of the account: got %s, want owner", role)
		}
		if !e.sim.Use(data["api_key"].(string)) {
			t.Error("OpenAI refuses the key")
		}
		for field, want := range map[string]any{
			"scopes": fmt.Sprint(want), "project_id": project, "organization_id": organization,
			"expires_at": keys[0].Expires.UTC().Format(time.RFC3339),
		} {
			if got := fmt.Sprint(data[field]); got != want {
				t.Errorf("answer's %s: got %s, want %s", field, got, want)
			}
		}
		e.cli("lease", "renew", answer["lease_id"].(string))
		e.expectCalls("renewal", "POST /api_keys/"+keys[0].ID)
		if got := e.keysOf(account)[0].Scopes; len(got) != 2 {
			t.Errorf("scopes after a renewal: got %v, want %v", got, want)
		}
		e.cli("lease", "revoke", "-sync", answer["lease_id"].(string))
		e.expectCalls("revocation", "DELETE /service_accounts/"+account)
		e.awaitAccounts(0, time.Second)
	})
}

func TestExistingAccount(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		account := e.sim.AddServiceAccount(project, "the-team", "member")
		role := e.mount + "/roles/team"
		for _, bad := range [][]string{
			{"service_account_id=svc_acct_unknown"},
			{"service_account_id=../x"},
			{"service_account_id=" + account, "service_account_role=owner"},
		} {
			result := e.CLI(t.Context(), append([]string{"write", role, "project_id=" + project}, bad...)...)
			if result.Code == 0 || !strings.Contains(result.Stderr, "Code: 400") || !strings.Contains(result.Stderr, "service_account_id") {
				t.Errorf("%v: got exit status %d and %q, want a 400 that names service_account_id", bad, result.Code, result.Stderr)
			}
		}
		e.cli("write", role, "project_id="+project, "service_account_id="+account)
		e.sim.ResetCalls()

		answer := e.read("team")
		data := answer["data"].(map[string]any)
		e.expectCalls("issue", "POST /service_accounts/"+account+"/api_keys")
		if data["service_account_id"] != account || data["service_account"] != "the-team" || !e.sim.Use(data["api_key"].(string)) {
			t.Errorf("answer: got account %v %v, want %s the-team, and a key that works", data["service_account_id"], data["service_account"], account)
		}
		before := e.keysOf(account)[0].Expires
		e.cli("lease", "renew", "-increment=2h", answer["lease_id"].(string))
		e.expectCalls("renewal", "POST /api_keys/"+data["api_key_id"].(string))
		if after := e.keysOf(account)[0].Expires; after.Sub(before) < 50*time.Minute {
			t.Errorf("expiry after a renewal by an hour: got %s, before it was %s", after, before)
		}
		e.cli("lease", "revoke", "-sync", answer["lease_id"].(string))
		e.expectCalls("revocation", "DELETE /api_keys/"+data["api_key_id"].(string))
		e.awaitAccounts(1, time.Second)
		if n := len(e.keysOf(account)); n != 0 || e.sim.Use(data["api_key"].(string)) {
			t.Errorf("after the revocation: got %d keys, want none that works", n)
		}
	})
}

// An organization may limit the life of keys, and a gateway may not know expiry at all.
func TestKeyExpiryPolicy(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		role := e.mount + "/roles/app"
		refused := func(what string, args ...string) {
			t.Helper()
			result := e.CLI(t.Context(), args...)
			for _, want := range []string{"Code: 400", "enforce_key_expiry", "ttl", "max_ttl"} {
				if !strings.Contains(result.Stderr, want) {
					t.Errorf("%s: got exit status %d and %q, want %s in it", what, result.Code, harness.Mask(result.Stderr), want)
				}
			}
		}
		e.sim.SetMaxKeyLife(1800)
		refused("a lease of 1 h", "read", e.mount+"/creds/app")
		e.cli("write", role, "ttl=10m", "max_ttl=2h")
		c := e.creds()
		refused("a renewal by 1 h", "lease", "renew", "-increment=1h", c.lease)
		e.cli("lease", "renew", "-increment=20m", c.lease)
		e.cli("write", role, "enforce_key_expiry=false")
		refused("a key without expiry", "read", e.mount+"/creds/app")

		e.sim.SetMaxKeyLife(0)
		e.sim.ResetCalls()
		c = e.creds()
		if at := e.expiry(c); !at.IsZero() {
			t.Errorf("with enforce_key_expiry=false OpenAI expires the key at %s", at)
		}
		e.cli("lease", "renew", c.lease)
		e.expectCalls("issue and renewal", "POST /service_accounts") // nothing about expiry
		e.cli("lease", "revoke", "-sync", c.lease)
		e.mustWork(c, false)
	})
}

// OpenAI's usage page tells by the account's name who has asked for the key.
func TestNameTemplate(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		asks := e.holding("application", "ci.build")
		for template, want := range map[string]string{
			"{{.DisplayName}}-{{.RandomSuffix}}":                                              "token-ci-build-",
			"{{.ProjectName | lowercase}}_{{.RandomSuffix}}":                                  "simulated-project_",
			"{{.Unknown}}{{.RandomSuffix}}":                                                   "",
			"always-the-same":                                                                 "always-the-same-",
			"{{.RoleName}}-" + strings.Repeat("x", 100):                                       "app-" + strings.Repeat("x", 40) + "-",
			"{{.RoleName | uppercase | truncate 2}}-{{unix_time | truncate 1}}-{{random 20}}": "AP-1-",
		} {
			result := e.CLI(t.Context(), "write", e.mount+"/roles/app", "service_account_name_template="+template)
			if (result.Code == 0) != (want != "") {
				t.Errorf("template %s: got %d %s", template, result.Code, result.Stderr)
			}
			if want == "" {
				continue
			}
			status, answer, err := asks.API(t.Context(), "GET", e.mount+"/creds/app", nil)
			if name, _ := dig(answer, "data", "service_account").(string); err != nil || status != http.StatusOK || !strings.HasPrefix(name, want) || len(name) > 64 || endOf(name).IsZero() {
				t.Errorf("template %s: got %d %q (%v), want %s and a suffix, at most 64 characters", template, status, name, err, want)
			}
		}
		// The name of the project is asked for once.
		e.cli("write", e.mount+"/roles/app", "service_account_name_template={{.ProjectName}}-{{.RandomSuffix}}")
		e.sim.ResetCalls()
		e.read("app")
		e.expectCalls("issue with a name that is known", "POST /service_accounts")
	})
}

// Whatever fails half-way, nothing that nobody has is left at OpenAI; and a thousand keys
// leave the account that they were made on as it was. All of it on one server, while the
// ends in names pass.
func TestNoOrphans(t *testing.T) {
	t.Parallel()
	e := newEngine(ownServer(t, harness.Versions[0]))
	account := e.sim.AddServiceAccount(project, "the-team", "member")
	roleless := e.sim.AddServiceAccount(project, "no-role", "none")
	const others = 150 // more than a page
	for i := range others {
		e.addKey(account, fmt.Sprintf("other-%d", i))
	}
	for role, fields := range map[string][]string{
		"scoped": {"scopes=api.responses.write"}, "team": {"service_account_id=" + account}, "roleless": {"service_account_id=" + roleless},
		// What a killed process leaves is deleted after the end in its name.
		"scoped-brief": {"scopes=api.responses.write", "ttl=10s", "max_ttl=10s"}, "team-brief": {"service_account_id=" + account, "ttl=10s", "max_ttl=10s"},
	} {
		e.cli(slices.Concat([]string{"write", e.mount + "/roles/" + role, "project_id=" + project}, fields)...)
	}
	before := e.everything(project)
	e.sim.ResetCalls()
	start := time.Now()
	if err := e.issueMany("team", 1000, 16); err != nil {
		t.Fatal(err)
	}
	t.Logf("1,000 keys on one account took %s", time.Since(start).Round(time.Millisecond))
	e.cli("lease", "revoke", "-sync", "-prefix", e.mount+"/creds/team")
	count := map[string]int{}
	for _, c := range e.sim.Calls() {
		count[c.Method]++
	}
	delete(count, "GET") // of a pass of tidy
	if count["POST"] != 1000 || count["DELETE"] != 1000 || len(count) != 2 {
		t.Errorf("1,000 issues and revocations: OpenAI got %v calls, want 1,000 POST and 1,000 DELETE", count)
	}
	if got := len(e.keysOf(account)); got != others {
		t.Errorf("keys of the account after 1,000 revocations: got %d, want the %d that are not Vault's", got, others)
	}

	for _, role := range []string{"scoped-brief", "team-brief"} {
		e.killWhileIssuing(role)
	}
	forgotten := e.everything(project) // and what was there before
	end := e.lastEnd(forgotten)
	if len(forgotten) < len(before)+3 {
		t.Errorf("the killed processes left %d accounts and keys, want 3: nothing is tested", len(forgotten)-len(before))
	}

	const create, give, key = `service_accounts$`, `service_accounts/[^/]+$`, `api_keys$`
	refused := func(path string) openaisim.Fault { return openaisim.Fault{Method: "POST", Path: path, Status: 400} }
	lost := func(path string) openaisim.Fault {
		return openaisim.Fault{Method: "POST", Path: path, Kind: "close", Process: true}
	}
	undeletable := openaisim.Fault{Method: "DELETE", Status: 403}
	for _, test := range []struct {
		role   string
		faults []openaisim.Fault
	}{
		{"app", []openaisim.Fault{refused(create)}},
		{"app", []openaisim.Fault{lost(create)}},
		{"app", []openaisim.Fault{{Method: "POST", Path: create, Kind: "malformed", Process: true}}},
		{"scoped", []openaisim.Fault{refused(create)}},
		{"scoped", []openaisim.Fault{lost(create)}},
		{"scoped", []openaisim.Fault{refused(give)}},
		{"scoped", []openaisim.Fault{refused(give), undeletable}},
		{"scoped", []openaisim.Fault{refused(key)}},
		{"scoped", []openaisim.Fault{lost(key)}},
		{"scoped", []openaisim.Fault{lost(key), undeletable}},
		{"team", []openaisim.Fault{refused(key)}},
		{"team", []openaisim.Fault{lost(key)}},
		{"team", []openaisim.Fault{{Method: "POST", Path: key, Kind: "oversized", Process: true}}},
		{"roleless", []openaisim.Fault{lost(key)}},
	} {
		e.sim.ClearFaults()
		for _, f := range test.faults {
			e.sim.Inject(f)
		}
		status, answer, err := e.API(t.Context(), "GET", e.mount+"/creds/"+test.role, nil)
		if err != nil || status < 400 || answer["lease_id"] != nil {
			t.Errorf("creds of %s with %+v: got %d (%v), want an error", test.role, test.faults, status, err)
		}
	}
	e.sim.ClearFaults()
	t.Logf("the faults left %d accounts and keys", len(e.everything(project))-len(forgotten))
	if len(e.everything(project)) < len(forgotten)+4 {
		t.Error("the faults left too little: nothing is tested")
	}
	e.until(4*tick, func() error {
		if got := e.everything(project); !maps.Equal(got, forgotten) {
			return fmt.Errorf("OpenAI has %d accounts and keys, want %d: %v", len(got), len(forgotten), e.sim.ServiceAccounts(project))
		}
		return nil
	})

	e.awaitDue(end)
	if answer := e.tidy(); answer["failed"] != 0.0 {
		t.Errorf("tidy: got %v, want none failed", answer)
	}
	if got := e.everything(project); !maps.Equal(got, before) {
		t.Errorf("OpenAI has %d accounts and keys, want %d: %v", len(got), len(before), e.sim.ServiceAccounts(project))
	}
	if got := len(e.keysOf(account)); got != others {
		t.Errorf("keys of the account: got %d, want the %d that are not Vault's", got, others)
	}
}

// killWhileIssuing kills the plugin's process when OpenAI has made the key and not yet
// answered. Vault makes the call again, which may succeed; its lease is revoked.
func (e *engine) killWhileIssuing(role string) {
	e.t.Helper()
	e.sim.SetLatency(2 * time.Second)
	defer e.sim.SetLatency(0)
	e.sim.ResetCalls()
	done := make(chan any)
	go func() {
		_, answer, _ := e.API(context.Background(), "GET", e.mount+"/creds/"+role, nil)
		done <- answer["lease_id"]
	}()
	e.until(20*time.Second, func() error {
		for _, c := range e.sim.Calls() {
			if c.Processed && strings.HasSuffix(c.Path, "api_keys") {
				return nil
			}
		}
		return errors.New("no key was made")
	})
	e.killPlugin()
	e.sim.SetLatency(0)
	if lease, _ := (<-done).(string); lease != "" {
		e.cli("lease", "revoke", "-sync", lease)
	}
	// Vault starts the plugin again when it has seen that the process is gone.
	e.until(20*time.Second, func() error {
		status, _, err := e.API(e.t.Context(), "GET", e.mount+"/config", nil)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("reading config: %d", status)
		}
		return err
	})
}

// issueMany reads n credentials of a role, some at once, and returns the first error.
func (e *engine) issueMany(role string, n, workers int) error {
	jobs, errs := make(chan struct{}, n), make(chan error, workers)
	for range n {
		jobs <- struct{}{}
	}
	close(jobs)
	for range workers {
		go func() {
			var failed error
			for range jobs {
				status, answer, err := e.API(e.t.Context(), "GET", e.mount+"/creds/"+role, nil)
				if err == nil && status != http.StatusOK {
					text, _ := json.Marshal(answer["errors"])
					err = fmt.Errorf("creds/%s: %d %s", role, status, text)
				}
				failed = errors.Join(failed, err)
			}
			errs <- failed
		}()
	}
	var first error
	for range workers {
		if err := <-errs; first == nil {
			first = err
		}
	}
	return first
}
