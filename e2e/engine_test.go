// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
)

// From registration to a credential that works, is renewed and is revoked, with one call
// to OpenAI for each step.
func TestLifeOfACredential(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		version := strings.TrimPrefix(t.Name(), "TestLifeOfACredential/")
		if got := v.api("GET", "sys/seal-status", nil, http.StatusOK)["version"]; got != version {
			t.Errorf("server version: got %v, want %s", got, version)
		}
		e.cli("write", e.mount+"/roles/app", "ttl=10m", "max_ttl=1h")
		e.sim.ResetCalls()

		issued := time.Now()
		answer := e.json("read", e.mount+"/creds/app")
		data := answer["data"].(map[string]any)
		for _, field := range []string{"api_key", "api_key_id", "service_account", "service_account_id", "project_id", "organization_id", "expires_at"} {
			if text, _ := data[field].(string); text == "" {
				t.Errorf("answer lacks %s", field)
			}
		}
		if got, want := answer["lease_duration"], 600.0; got != want {
			t.Errorf("lease_duration: got %v, want %v", got, want)
		}
		if got := answer["renewable"]; got != true {
			t.Errorf("renewable: got %v, want true", got)
		}
		if got := len(e.sim.Calls()); got != 1 {
			t.Errorf("OpenAI calls of one credential: got %d, want 1: %v", got, e.sim.Calls())
		}
		c := creds{data["api_key"].(string), data["api_key_id"].(string), data["service_account"].(string),
			data["service_account_id"].(string), answer["lease_id"].(string)}
		e.mustWork(c, true)
		first := e.expiry(c)
		checkTime(t, "expiry of the key", first, issued.Add(10*time.Minute), issued.Add(11*time.Minute+10*time.Second))

		// The table that people see has the names that the README promises.
		table := e.cli("read", e.mount+"/creds/app")
		for _, name := range []string{"lease_id", "lease_duration", "lease_renewable", "api_key", "api_key_id", "service_account", "service_account_id"} {
			if !strings.Contains(table, "\n"+name+" ") {
				t.Errorf("vault read shows no %s", name)
			}
		}

		renewed := time.Now()
		e.sim.ResetCalls()
		answer = e.json("lease renew", "-increment=30m", c.lease)
		if got, want := answer["lease_duration"], 1800.0; got != want {
			t.Errorf("lease_duration after renewal: got %v, want %v", got, want)
		}
		if got := len(e.sim.Calls()); got != 1 {
			t.Errorf("OpenAI calls of a renewal: got %d, want 1", got)
		}
		second := e.expiry(c)
		checkTime(t, "expiry of the key after renewal", second, renewed.Add(30*time.Minute), renewed.Add(31*time.Minute+10*time.Second))
		e.mustWork(c, true)

		// Never past the issue time and max_ttl.
		e.json("lease renew", "-increment=100h", c.lease)
		checkTime(t, "expiry of the key after the longest renewal", e.expiry(c), issued.Add(59*time.Minute), issued.Add(61*time.Minute+2*time.Second))

		e.cli("lease", "revoke", c.lease)  // is queued
		e.awaitAccounts(1, 10*time.Second) // that of the table is left
		e.mustWork(c, false)
	})
}

func checkTime(t *testing.T, what string, got, low, high time.Time) {
	t.Helper()
	if got.Before(low.Truncate(time.Second)) || got.After(high) {
		t.Errorf("%s: got %s, want %s to %s", what, got, low, high)
	}
}

// What is registered with a version is mounted and reported with it.
func TestVersionedRegistration(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		const name = "openai-versioned"
		v.cli("plugin", "register", "-sha256="+pluginSum, "-command="+harness.PluginName, "-version="+pluginVersion, "secret", name)
		v.cli("secrets", "enable", "-path=versioned", "-plugin-version="+pluginVersion, name)
		defer v.cli("secrets", "disable", "versioned")
		mounts := v.json("secrets list", "-detailed")
		if got := mounts["versioned/"].(map[string]any)["running_plugin_version"]; got != pluginVersion {
			t.Errorf("running_plugin_version: got %v, want %s", got, pluginVersion)
		}
		wrong := strings.Repeat("0", 64)
		v.cli("plugin", "register", "-sha256="+wrong, "-command="+harness.PluginName, "secret", "openai-forged")
		if result := v.CLI(t.Context(), "secrets", "enable", "openai-forged"); result.Code == 0 {
			t.Error("a plugin with another SHA-256 was mounted")
		}
	})
}

func TestLeaseExpires(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		c := e.creds("ttl=3s")
		e.mustWork(c, true)
		e.awaitAccounts(0, 20*time.Second)
		e.mustWork(c, false)
	})
}

func TestDisableRevokesLeases(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		c := e.creds()
		e.creds()
		e.creds()
		e.awaitAccounts(3, time.Second)
		e.cli("secrets", "disable", e.mount)
		e.awaitAccounts(0, time.Second)
		e.mustWork(c, false)
	})
}

func TestRevokePrefix(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		for range 5 {
			e.creds()
		}
		e.cli("lease", "revoke", "-sync", "-prefix", e.mount+"/creds/app")
		e.awaitAccounts(0, time.Second)
	})
}

// What is at OpenAI's end already, or can never come back, counts as revoked.
func TestRevokeWhatIsGone(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		e.sim.AddProject("proj_old", "old")
		e.cli("write", e.mount+"/roles/old", "project_id=proj_old")
		lease := e.json("read", e.mount+"/creds/old")["lease_id"].(string)
		e.sim.ArchiveProject("proj_old")
		e.cli("lease", "revoke", "-sync", lease)

		c := e.creds()
		admin, _ := e.sim.AdminKey()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete,
			e.url+"/v1/organization/projects/"+project+"/service_accounts/"+c.accountID, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+admin)
		resp, err := http.DefaultClient.Do(req)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("deleting the account behind Vault's back: %v %v", resp, err)
		}
		resp.Body.Close()
		e.cli("lease", "revoke", "-sync", c.lease)
	})
}

// Leases, config and the plugin come back after the server was sealed, and after it was
// killed.
func TestSealAndRestart(t *testing.T) {
	t.Parallel()
	for _, version := range harness.Versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			e := newEngine(ownServer(t, version))
			e.cli("write", e.mount+"/roles/app", "project_id="+project, "ttl=10m", "max_ttl=20m")
			before := e.creds()
			short := e.creds("ttl=4s")

			e.cli("operator", "seal")
			time.Sleep(5 * time.Second) // the short lease ends meanwhile
			e.mustWork(short, true)     // within the minute of grace
			if err := e.Unseal(t.Context()); err != nil {
				t.Fatal(err)
			}
			e.awaitAccounts(1, 20*time.Second)
			e.mustWork(short, false)
			e.cli("lease", "renew", before.lease)

			sealed := e.creds()
			e.Kill()
			if err := errors.Join(e.Run(t.Context()), e.Unseal(t.Context())); err != nil {
				t.Fatal(err)
			}
			killed := e.creds()
			for _, c := range []creds{before, sealed, killed} {
				e.mustWork(c, true)
				e.cli("lease", "revoke", "-sync", c.lease)
				e.mustWork(c, false)
			}

			e.Stop()
			if err := errors.Join(e.Run(t.Context()), e.Unseal(t.Context())); err != nil {
				t.Fatal(err)
			}
			e.mustWork(e.creds(), true)
		})
	}
}

func TestReload(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		before := e.creds()
		e.cli("plugin", "reload", "-plugin="+harness.PluginName)
		after := e.creds()
		for _, c := range []creds{before, after} {
			e.mustWork(c, true)
			e.cli("lease", "renew", c.lease)
			e.cli("lease", "revoke", "-sync", c.lease)
			e.mustWork(c, false)
		}
	})
}

// The call after the plugin process was killed starts it again.
func TestPluginKilled(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		before := e.creds()
		pids, err := e.PluginPids()
		if err != nil || len(pids) == 0 {
			t.Fatalf("plugin processes: got %v (%v), want some", pids, err)
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
		after := e.creds()
		for _, c := range []creds{before, after} {
			e.mustWork(c, true)
			e.cli("lease", "revoke", "-sync", c.lease)
			e.mustWork(c, false)
		}
		if now, _ := e.PluginPids(); slices.Equal(now, pids) {
			t.Errorf("plugin processes are still %v", now)
		}
	})
}

func TestRotate(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		before := e.creds()
		_, oldID := e.sim.AdminKey()
		answer := e.json("write -force", e.mount+"/config/rotate")
		newID := answer["data"].(map[string]any)["admin_api_key_id"]
		keys := e.sim.AdminKeys()
		if len(keys) != 1 || keys[0].ID != newID || newID == oldID {
			t.Errorf("admin keys: got %d, want one with the id %v that is not %s", len(keys), newID, oldID)
		}
		e.mustWork(e.creds(), true)
		e.cli("lease", "revoke", "-sync", before.lease)
		e.mustWork(before, false)
	})
}

// Bad input is the caller's fault and changes nothing.
func TestBadInput(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		config, role := e.mount+"/config", e.mount+"/roles/app"
		before := []any{e.json("read", config)["data"], e.json("read", role)["data"]}
		for _, test := range []struct {
			path, field, value string
		}{
			{config, "admin_api_key", ""},
			{config, "admin_api_key", "not-a-key-of-anybody"},
			{config, "admin_api_key_id", "key_of_somebody_else"},
			{config, "admin_api_key_id", "../x"},
			{config, "organization_id", ""},
			{config, "organization_id", "org-other"},
			{config, "api_endpoint", "http://example.com/v1"},
			{config, "api_endpoint", "ftp://127.0.0.1/v1"},
			{config, "api_endpoint", "https://127.0.0.1:99999/v1"},
			{config, "api_endpoint", "https://user:pass@127.0.0.1/v1"},
			{config, "api_endpoint", "https://127.0.0.1/v1?x=y"},
			{config, "rotation_period", "-1"},
			{config, "rotation_schedule", "whenever"},
			{config, "verify_connection", "perhaps"},
			{role, "project_id", ""},
			{role, "project_id", "proj_unknown"},
			{role, "project_id", "proj_sim/../../admin_api_keys"},
			{role, "ttl", "0"},
			{role, "ttl", "-5"},
			{role, "ttl", "25h"},
			{role, "ttl", "soon"},
			{role, "max_ttl", "0"},
			{role, "max_ttl", "366d"},
			{role, "max_ttl", "99999999999999999999"},
			{role, "enforce_key_expiry", "sometimes"},
			{role, "service_account_name_template", "{{.RoleName"},
			{role, "service_account_name_template", "{{.Unknown}}"},
			{role, "service_account_name_template", strings.Repeat("x", 300) + "{{.RandomSuffix}}"},
			{role, "service_account_name_template", "{{range 1000000000000}}x{{end}}"},
		} {
			result := e.CLI(t.Context(), "write", test.path, test.field+"="+test.value)
			if result.Code == 0 || !strings.Contains(result.Stderr, "Code: 400") || !strings.Contains(result.Stderr, test.field) {
				t.Errorf("%s=%s: got exit status %d and %q, want a 400 that names the field",
					test.field, test.value, result.Code, harness.Mask(result.Stderr))
			}
		}
		for _, path := range []string{"creds/app?ttl=25h", "creds/app?ttl=0", "creds/app?ttl=-1", "creds/app?ttl=soon", "creds/nobody"} {
			e.api("GET", e.mount+"/"+path, nil, http.StatusBadRequest)
		}
		e.api("POST", config, map[string]any{"organization_id": []int{1}}, http.StatusBadRequest)
		e.api("POST", role, map[string]any{"max_ttl": map[string]any{"x": 1}}, http.StatusBadRequest)
		e.cli("lease", "revoke", "-sync", e.creds("ttl=24h").lease) // the maximum itself is no fault
		after := []any{e.json("read", config)["data"], e.json("read", role)["data"]}
		if got, want := fmt.Sprint(after), fmt.Sprint(before); got != want {
			t.Errorf("refused writes changed something: got %s, want %s", got, want)
		}

		e.cli("delete", config)
		e.api("GET", e.mount+"/creds/app", nil, http.StatusBadRequest)
		e.api("PUT", e.mount+"/config/rotate", nil, http.StatusBadRequest)
	})
}

// A follower serves clients too, and takes over with all leases when the active node is
// killed. It is not parallel: on a busy machine nodes elect others for want of heartbeats.
func TestCluster(t *testing.T) {
	for _, version := range harness.Versions {
		t.Run(version, func(t *testing.T) {
			nodes, err := harness.StartCluster(t.Context(), options(version), 3)
			if err != nil {
				t.Fatal(err)
			}
			for _, node := range nodes {
				t.Cleanup(node.Close)
			}
			register(t, newVault(t, nodes[0]))
			e := newEngine(newVault(t, nodes[1]))
			before := e.creds()
			e.mustWork(before, true)

			nodes[0].Kill()
			e.until(time.Minute, func() error {
				if !nodes[1].Active(t.Context()) && !nodes[2].Active(t.Context()) {
					return errors.New("no node has taken over")
				}
				return nil
			})
			if err := nodes[1].Await(t.Context()); err != nil {
				t.Fatal(err)
			}
			after := e.creds()
			for _, c := range []creds{before, after} {
				e.mustWork(c, true)
				e.cli("lease", "revoke", "-sync", c.lease)
				e.mustWork(c, false)
			}
			if err := errors.Join(nodes[0].Run(t.Context()), nodes[0].Unseal(t.Context())); err != nil {
				t.Error(err)
			}
		})
	}
}

// documented are the paths and fields that users may rely on.
var documented = map[string][]string{
	"config": {"admin_api_key", "admin_api_key_id", "organization_id", "api_endpoint", "ca_certificate", "client_certificate",
		"client_key", "verify_connection", "rotation_period", "rotation_schedule", "rotation_window", "rotation_policy",
		"disable_automated_rotation", "admin_key_ttl"},
	"config/rotate": {},
	"roles":         {},
	"roles/{name}": {"project_id", "service_account_name_template", "service_account_description", "ttl", "max_ttl",
		"enforce_key_expiry", "scopes", "service_account_role", "service_account_id", "credential_type"},
	"creds/{name}":           {"ttl"},
	"config/identity":        {"issuer", "audience", "token_endpoint", "ca_certificate", "identity_provider_id"},
	"config/identity/rotate": {"confirm"},
	"static-roles":           nil,
	"static-roles/{name}": {"project_id", "service_account_id", "scopes", "rotation_period", "rotation_schedule",
		"overlap"},
	"static-creds/{name}": nil,
	"rotate-role/{name}":  nil,
	"metrics":             {"format"},
	"tidy":                {"dry_run", "mount_id", "project_ids"},
}

// Every path is in Vault's OpenAPI document with its fields and answers, and has help
// that names them.
func TestHelpAndOpenAPI(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		document := e.json("read", "sys/internal/specs/openapi")
		if data, ok := document["data"].(map[string]any); ok {
			document = data
		}
		schemas, _ := dig(document, "components", "schemas").(map[string]any)
		paths := map[string]map[string]any{}
		for path, item := range document["paths"].(map[string]any) {
			if path, ok := strings.CutPrefix(path, "/"+e.mount+"/"); ok {
				paths[strings.TrimSuffix(path, "/")] = item.(map[string]any)
			}
		}
		if got, want := slices.Sorted(maps.Keys(paths)), slices.Sorted(maps.Keys(documented)); !slices.Equal(got, want) {
			t.Errorf("paths: got %v, want %v", got, want)
		}
		for path, want := range documented {
			fields := requestFields(paths[path], schemas)
			for _, field := range want {
				if !slices.Contains(fields, field) {
					t.Errorf("OpenAPI: %s lacks the field %s, has %v", path, field, fields)
				}
			}
			for method, operation := range paths[path] {
				operation, ok := operation.(map[string]any)
				if !ok || method == "parameters" {
					continue
				}
				if operation["summary"] == nil || operation["operationId"] == nil || operation["responses"] == nil {
					t.Errorf("OpenAPI: %s %s lacks summary, operationId or responses", method, path)
				}
			}
			help := e.cli("path-help", e.mount+"/"+strings.ReplaceAll(path, "{name}", "app"))
			for _, field := range fields {
				if field != "list" && !strings.Contains(help, field) { // Vault's own
					t.Errorf("path-help of %s does not name %s", path, field)
				}
			}
			if !strings.Contains(help, "## DESCRIPTION") || strings.Contains(help, "<no value>") {
				t.Errorf("path-help of %s: got %q", path, help)
			}
		}
		if help := e.cli("path-help", e.mount); !strings.Contains(help, "OpenAI") || !strings.Contains(help, "creds/") {
			t.Errorf("path-help of the mount: got %q", help)
		}
	})
}

// requestFields lists the body fields and query parameters of a path in an OpenAPI document.
func requestFields(item, schemas map[string]any) []string {
	var fields []string
	for _, operation := range item {
		operation, ok := operation.(map[string]any)
		if !ok {
			continue
		}
		parameters, _ := operation["parameters"].([]any)
		for _, p := range parameters {
			fields = append(fields, p.(map[string]any)["name"].(string))
		}
		// Vault loses the reference to the schema of a plugin's request, but not the schema.
		id, _ := operation["operationId"].(string)
		properties, _ := dig(schemas, camelCase(id)+"Request", "properties").(map[string]any)
		fields = slices.AppendSeq(fields, maps.Keys(properties))
	}
	return fields
}

// camelCase turns openai-write-role into OpenaiWriteRole.
func camelCase(id string) string {
	text := ""
	for word := range strings.SplitSeq(id, "-") {
		if word != "" {
			text += strings.ToUpper(word[:1]) + word[1:]
		}
	}
	return text
}

// dig follows names through nested objects; nil when one is missing.
func dig(value any, names ...string) any {
	for _, name := range names {
		object, _ := value.(map[string]any)
		value = object[name]
	}
	return value
}
