// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

// curl makes a request as people do by hand, which must get the wanted status, and returns
// the answer. The token is that of s.
func (e *engine) curl(s *harness.Server, method, path, body string, want int) map[string]any {
	e.t.Helper()
	// As Vault's documents write it: curl then says that the body is a form.
	cmd := exec.CommandContext(e.t.Context(), "curl", "--silent", "--show-error", "--header", "X-Vault-Token: "+s.Token,
		"--request", method, "--data", body, "--write-out", "\n%{http_code}", s.Addr+"/v1/"+e.mount+"/"+path)
	out, err := cmd.CombinedOutput()
	end := max(0, bytes.LastIndexByte(out, '\n'))
	text, status := strings.TrimSpace(string(out[:end])), strings.TrimSpace(string(out[end:]))
	if err != nil || status != fmt.Sprint(want) {
		e.t.Fatalf("curl %s %s %s: got %s %s (%v), want %d", method, path, harness.Mask(body), status, harness.Mask(text), err, want)
	}
	var answer map[string]any
	if text != "" {
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			e.t.Fatalf("curl %s %s: %v: %s", method, path, err, harness.Mask(text))
		}
	}
	return answer
}

// needCurl skips a test where there is no curl.
func needCurl(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skipf("WARNING: not tested: %v", err)
	}
}

// show is what reading a path shows.
func (e *engine) show(path string) map[string]any {
	e.t.Helper()
	return e.api("GET", e.mount+"/"+path, nil, http.StatusOK)["data"].(map[string]any)
}

// refused runs vault write, which must get a 400 that says something.
func (e *engine) refused(text string, args ...string) {
	e.t.Helper()
	result := e.CLI(e.t.Context(), append([]string{"write"}, args...)...)
	if result.Code == 0 || !strings.Contains(result.Stderr, "Code: 400") || !strings.Contains(result.Stderr, text) {
		e.t.Errorf("vault write %s: got exit status %d and %q, want a 400 that says %q",
			harness.Mask(strings.Join(args, " ")), result.Code, harness.Mask(result.Stderr), text)
	}
}

// nulls is JSON that sets documented fields of a path to null, and others as given.
func nulls(path string, others map[string]any) string {
	data := map[string]any{}
	for _, field := range documented[path] {
		data[field] = nil
	}
	maps.Copy(data, others)
	text, err := json.Marshal(data)
	if err != nil {
		panic(err)
	}
	return string(text)
}

// A field that is null is as if it were not named: by curl and by the CLI, for a new entry
// and for one that is there.
func TestRealNull(t *testing.T) {
	needCurl(t)
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		dir := t.TempDir()
		byCLI := func(path, body string) {
			t.Helper()
			write(t, dir+"/body.json", body)
			e.cli("write", e.mount+"/"+path, "@"+dir+"/body.json")
		}
		same := func(what string, got, want map[string]any) {
			t.Helper()
			if !reflect.DeepEqual(got, want) {
				t.Errorf("%s: got %v, want %v", what, got, want)
			}
		}

		// Roles: the new one has the defaults, the old one what it had.
		e.cli("write", e.mount+"/roles/plain", "project_id="+project)
		body := nulls("roles/{name}", map[string]any{"project_id": project})
		for _, method := range []string{"PUT", "POST"} {
			e.curl(e.Server, method, "roles/"+strings.ToLower(method), body, http.StatusNoContent)
		}
		byCLI("roles/cli", body)
		for _, name := range []string{"put", "post", "cli"} {
			same("new role by "+name, e.show("roles/"+name), e.show("roles/plain"))
		}
		account := e.sim.AddServiceAccount(project, "the-team", "member")
		for name, fields := range map[string][]string{
			"scoped": {"scopes=api.responses.write", "service_account_role=owner", "enforce_key_expiry=false",
				"service_account_name_template=x-{{.RandomSuffix}}", "service_account_description=y", "ttl=10m", "max_ttl=20m"},
			"account": {"service_account_id=" + account},
		} {
			path := "roles/" + name
			e.cli(append([]string{"write", e.mount + "/" + path, "project_id=" + project}, fields...)...)
			before := e.show(path)
			e.curl(e.Server, "PUT", path, nulls("roles/{name}", nil), http.StatusNoContent)
			same("role "+name+" after curl", e.show(path), before)
			byCLI(path, nulls("roles/{name}", nil))
			same("role "+name+" after vault write", e.show(path), before)
		}
		e.curl(e.Server, "PUT", "roles/none", nulls("roles/{name}", nil), http.StatusBadRequest) // still lacks project_id

		// Config, with its schedule, which the SDK parses.
		for _, fields := range [][]string{
			{"rotation_schedule=0 3 * * 0", "rotation_window=2h", "admin_key_ttl=720h"},
			{"rotation_schedule=", "admin_key_ttl=0", "rotation_period=720h", "disable_automated_rotation=true"},
		} {
			e.cli(append([]string{"write", e.mount + "/config"}, fields...)...)
			before := e.show("config")
			e.curl(e.Server, "PUT", "config", nulls("config", nil), http.StatusNoContent)
			same("config after curl", e.show("config"), before)
			byCLI("config", nulls("config", nil))
			same("config after vault write", e.show("config"), before)
		}
		e.curl(e.Server, "PUT", "config", nulls("config", map[string]any{"disable_automated_rotation": false, "rotation_period": 86400}),
			http.StatusNoContent)
		if got := e.show("config")["rotation_period"]; got != 86400.0 {
			t.Errorf("rotation_period beside nulls: got %v, want 86400", got)
		}
		before := e.show("config")
		e.curl(e.Server, "PUT", "config", nulls("config", map[string]any{"admin_api_key": "sk-admin-of-nobody"}), http.StatusBadRequest)
		same("config after a key that is not proved", e.show("config"), before)
		e.cli("delete", e.mount+"/config")
		key, _ := e.sim.AdminKey()
		e.curl(e.Server, "PUT", "config", nulls("config", map[string]any{
			"admin_api_key": key, "organization_id": organization, "api_endpoint": e.url + "/v1"}), http.StatusNoContent)
		for field, want := range map[string]any{"rotation_period": 0.0, "rotation_schedule": "", "admin_key_ttl": 0.0,
			"disable_automated_rotation": false, "rotation_manager": "none"} {
			if got := e.show("config")[field]; got != want {
				t.Errorf("new config: %s: got %v, want %v", field, got, want)
			}
		}

		// What takes parameters.
		for _, method := range []string{"PUT", "POST"} {
			answer := e.curl(e.Server, method, "creds/app", `{"ttl":null}`, http.StatusOK)
			if got := answer["lease_duration"]; got != 3600.0 {
				t.Errorf("lease_duration with a ttl that is null: got %v, want 3600", got)
			}
		}
		data := e.curl(e.Server, "PUT", "tidy", nulls("tidy", nil), http.StatusOK)["data"].(map[string]any)
		if data["mount_id"] != e.mountID() || data["dry_run"] != false || data["projects"] != 1.0 {
			t.Errorf("tidy with nulls: got %v, want a pass of its own", data)
		}
	})
}

// Tools send the parameters of a credential by PUT or POST: that is like a read. The
// application's policy allows it.
func TestRealParameters(t *testing.T) {
	needCurl(t)
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		app := e.holding("application", "")
		fields := slices.Sorted(maps.Keys(e.json("read", e.mount+"/creds/app")["data"].(map[string]any)))
		check := func(what string, answer map[string]any, seconds float64) {
			t.Helper()
			data, _ := answer["data"].(map[string]any)
			if got := slices.Sorted(maps.Keys(data)); !slices.Equal(got, fields) {
				t.Fatalf("%s: got the fields %v, want %v as of a read", what, got, fields)
			}
			if answer["lease_duration"] != seconds || answer["renewable"] != true {
				t.Errorf("%s: got a lease of %v s, renewable %v, want %v s", what, answer["lease_duration"], answer["renewable"], seconds)
			}
			c := creds{data["api_key"].(string), data["api_key_id"].(string), data["service_account"].(string),
				data["service_account_id"].(string), answer["lease_id"].(string)}
			e.mustWork(c, true)
			life := time.Duration(seconds) * time.Second
			checkTime(t, what+": expiry of the key", e.expiry(c), time.Now().Add(life), time.Now().Add(life+70*time.Second))
			if result := app.CLI(t.Context(), "lease", "renew", c.lease); result.Code != 0 {
				t.Errorf("%s: vault lease renew: %s", what, result.Stderr)
			}
			e.cli("lease", "revoke", "-sync", c.lease)
			e.mustWork(c, false)
		}

		for _, args := range [][]string{{"write", "openai/creds/app", "ttl=15m"}, {"read", "openai/creds/app", "ttl=15m"},
			{"write", "-force", "openai/creds/app"}} {
			result := app.CLI(t.Context(), slices.Insert(slices.Clone(args), 1, "-format=json")...)
			var answer map[string]any
			if err := json.Unmarshal([]byte(result.Stdout), &answer); err != nil {
				t.Fatalf("vault %s: %v: %s", strings.Join(args, " "), err, harness.Mask(result.Stderr))
			}
			want := 900.0
			if args[1] == "-force" {
				want = 3600
			}
			check("vault "+strings.Join(args, " "), answer, want)
		}
		for body, want := range map[string]float64{`{"ttl":"15m"}`: 900, `{"ttl":"900"}`: 900, `{"ttl":900}`: 900, `{}`: 3600, ``: 3600} {
			for _, method := range []string{"PUT", "POST"} {
				check(method+" "+body, e.curl(app, method, "creds/app", body, http.StatusOK), want)
			}
		}
		for path, body := range map[string]string{"creds/app": `{"ttl":"25h"}`, "creds/nobody": `{"ttl":"15m"}`} {
			for _, method := range []string{"PUT", "POST"} {
				e.curl(e.Server, method, path, body, http.StatusBadRequest)
			}
		}
	})
}

// Terraform and OpenTofu write data_json, read the same fields back, and plan a change
// where the two differ as JSON. What README names as normalized is all that differs.
func TestRealReadsBack(t *testing.T) {
	needCurl(t)
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		key, id := e.sim.AdminKey()
		for path, text := range map[string]string{
			"config": fmt.Sprintf(`{"admin_api_key_id":%q,"admin_key_ttl":172800,"api_endpoint":%q,"disable_automated_rotation":false,
				"organization_id":%q,"rotation_schedule":"0 3 * * *","rotation_window":7200}`, id, e.url+"/v1", organization),
			"roles/app": fmt.Sprintf(`{"enforce_key_expiry":true,"max_ttl":86400,"project_id":%q,
				"scopes":["api.responses.write","api.model.request"],"service_account_description":" as it is ",
				"service_account_name_template":"x-{{.RandomSuffix}}","service_account_role":"owner","ttl":3600}`, project),
		} {
			var dataJSON, got bytes.Buffer
			if err := json.Compact(&dataJSON, []byte(text)); err != nil {
				t.Fatal(err)
			}
			for range 2 { // apply, and apply again
				e.curl(e.Server, "PUT", path, dataJSON.String(), http.StatusNoContent)
				shown := e.show(path)
				var written map[string]any
				json.Unmarshal(dataJSON.Bytes(), &written)
				for field := range written {
					written[field] = shown[field]
				}
				got.Reset()
				encoder := json.NewEncoder(&got)
				encoder.SetEscapeHTML(false)
				encoder.Encode(written)
				if got, want := strings.TrimSpace(got.String()), dataJSON.String(); got != want {
					t.Errorf("%s: reads back as\n%s, written was\n%s", path, got, want)
				}
			}
		}
		want := "[api.responses.write api.model.request]"
		order := func(what string) {
			t.Helper()
			data := e.json("read", e.mount+"/creds/app")["data"].(map[string]any)
			shown := e.json("read", e.mount+"/roles/app")["data"].(map[string]any)
			i := slices.IndexFunc(e.sim.ProjectKeys(project), func(k openaisim.ProjectKey) bool { return k.ID == data["api_key_id"] })
			if i < 0 {
				t.Fatal("OpenAI does not have the key")
			}
			for where, got := range map[string]any{"role": shown["scopes"], "creds": data["scopes"], "OpenAI": e.sim.ProjectKeys(project)[i].Scopes} {
				if fmt.Sprint(got) != want {
					t.Errorf("%s: scopes of %s: got %v, want %s", what, where, got, want)
				}
			}
		}
		order("PUT")
		e.cli("write", e.mount+"/roles/app", "scopes=api.model.request,api.responses.write,api.model.request")
		want = "[api.model.request api.responses.write]"
		order("vault write, one of them twice")

		e.cli("write", e.mount+"/config", "admin_api_key="+key, "api_endpoint="+e.url+"/v1/", "rotation_window=3h", "admin_key_ttl=3d")
		shown := e.show("config")
		if shown["api_endpoint"] != e.url+"/v1" || shown["rotation_window"] != 10800.0 || shown["admin_key_ttl"] != 259200.0 {
			t.Errorf("normalized as README says: got %v", shown)
		}
	})
}

// Files end in a line break. Ids and keys that come from files lose it.
func TestRealFiles(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		dir := t.TempDir()
		account := e.sim.AddServiceAccount(project, "the-team", "member")
		key, id := e.sim.AdminKey()
		config, role := e.mount+"/config", e.mount+"/roles/team"
		file := func(field, text string) string {
			write(t, filepath.Join(dir, field), text)
			return field + "=@" + filepath.Join(dir, field)
		}
		for _, end := range []string{"\n", "\r\n", " \n\n"} {
			e.cli("delete", config)
			e.cli("delete", role)
			e.cli("write", config, file("admin_api_key", key+end), file("admin_api_key_id", id+end),
				file("organization_id", organization+end), file("api_endpoint", e.url+"/v1"+end))
			e.cli("write", role, file("project_id", project+end), file("service_account_id", account+end))
			for _, test := range []struct{ path, field, want string }{
				{"config", "admin_api_key_id", id}, {"config", "organization_id", organization}, {"config", "api_endpoint", e.url + "/v1"},
				{"roles/team", "project_id", project}, {"roles/team", "service_account_id", account},
			} {
				if got := e.show(test.path)[test.field]; got != test.want {
					t.Errorf("%s from a file that ends in %q: got %q, want %q", test.field, end, got, test.want)
				}
			}
			e.mustWork(e.creds(), true)
			e.json("read", e.mount+"/creds/team")
			data := e.json("write", e.mount+"/tidy", "dry_run=true", file("mount_id", "gone22"+end))["data"].(map[string]any)
			if got := data["mount_id"]; got != "gone22" {
				t.Errorf("mount_id from a file that ends in %q: got %q, want gone22", end, got)
			}
		}
		before := fmt.Sprint(e.show("config"), e.show("roles/team"))
		for _, inside := range []string{" ", "\n"} {
			e.refused("admin_api_key", config, file("admin_api_key", key[:12]+inside+key[12:]))
			e.refused("admin_api_key_id", config, file("admin_api_key_id", id[:6]+inside+id[6:]))
			e.refused("organization_id", config, file("organization_id", organization[:4]+inside+organization[4:]))
			e.refused("api_endpoint", config, "admin_api_key="+key, file("api_endpoint", e.url+inside+"/v1"))
			e.refused("project_id", role, file("project_id", project[:4]+inside+project[4:]))
			e.refused("service_account_id", role, file("service_account_id", account[:9]+inside+account[9:]))
		}
		if got := fmt.Sprint(e.show("config"), e.show("roles/team")); got != before {
			t.Errorf("refused writes changed something: got %s, want %s", got, before)
		}
	})
}

// A credential lives over TLS with a private authority, at an OpenAI that asks for a
// certificate. Who has none is told so, and nobody is shown the key.
func TestRealMutualTLS(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		m, err := harness.NewMutualTLS("127.0.0.1")
		if err != nil {
			t.Fatal(err)
		}
		sim := openaisim.New()
		serve := func(http2 bool) string {
			server := httptest.NewUnstartedServer(sim)
			server.TLS, server.Config.ErrorLog, server.EnableHTTP2 = m.Server.Clone(), log.New(io.Discard, "", 0), http2
			server.StartTLS()
			t.Cleanup(server.Close)
			return server.URL
		}
		e := &engine{v, "mutual", sim, serve(true)}
		skip := len(v.Log())
		v.cli("secrets", "enable", "-path="+e.mount, harness.PluginName)
		t.Cleanup(func() {
			if result := v.CLI(context.Background(), "secrets", "disable", e.mount); result.Code != 0 {
				t.Errorf("vault secrets disable: %s", harness.Mask(result.Stderr))
			}
		})

		dir, config := t.TempDir(), e.mount+"/config"
		for name, text := range map[string]string{"ca.pem": m.CA, "cert.pem": m.Certificate, "key.pem": m.ClientKey} {
			write(t, filepath.Join(dir, name), text)
		}
		key, _ := sim.AdminKey()
		known := []string{config, "admin_api_key=" + key, "organization_id=" + organization, "api_endpoint=" + e.url + "/v1"}
		ca, certificate, clientKey := "ca_certificate=@"+dir+"/ca.pem", "client_certificate=@"+dir+"/cert.pem", "client_key=@"+dir+"/key.pem"
		e.refused("certificate signed by unknown authority", known...)
		// By HTTP/2 a client that has no certificate may see no more than a broken pipe.
		e.refused("client_certificate", append(slices.Clone(known[:3]), ca, "api_endpoint="+serve(false)+"/v1")...)
		e.refused("client_key", append(known, ca, certificate)...)
		e.refused("client_key", append(known, ca, certificate, "client_key=@"+dir+"/cert.pem")...)
		e.refused("ca_certificate", append(known, "ca_certificate=@"+dir+"/key.pem", certificate, clientKey)...)
		e.api("GET", config, nil, http.StatusNotFound)
		if got := len(sim.Calls()); got != 0 {
			t.Errorf("calls that got through before there is a right config: got %d, want none", got)
		}

		e.cli(append([]string{"write"}, append(known, ca, certificate, clientKey)...)...)
		e.cli("write", e.mount+"/roles/app", "project_id="+project, "scopes=api.responses.write")
		shown := e.config()
		if shown["ca_certificate"] != m.CA || shown["client_certificate"] != m.Certificate || shown["client_key"] != nil {
			t.Errorf("config: got %v, want both certificates as written and no key", slices.Sorted(maps.Keys(shown)))
		}
		e.refused("admin_api_key", config, "ca_certificate=")
		e.refused("admin_api_key", config, "client_certificate=", "client_key=")
		works := func(c creds, want bool) {
			t.Helper()
			if got := sim.Use(c.key); got != want {
				t.Errorf("OpenAI accepts the key of %s: got %v, want %v", c.account, got, want)
			}
		}
		c := e.creds()
		works(c, true)
		e.cli("lease", "renew", c.lease)
		e.cli("write", "-force", e.mount+"/config/rotate")
		e.killPlugin() // the next process has all from storage
		next := e.creds()
		for _, c := range []creds{c, next} {
			works(c, true)
			e.cli("lease", "revoke", "-sync", c.lease)
			works(c, false)
		}
		e.awaitAccounts(0, time.Second)
		secret := strings.Split(m.ClientKey, "\n")[1]
		if log := v.Log()[skip:]; strings.Contains(log, "PRIVATE KEY") || strings.Contains(log, secret[:20]) {
			t.Error("the server's log has the client's key in it")
		}
	})
}

// doomed is a further mount with the same OpenAI and n leases, and an admin key of its own
// that somebody has deleted there.
func (e *engine) doomed(mount string, n int, fields ...string) (dead *engine, held []creds) {
	e.t.Helper()
	dead = e.another(mount)
	dead.cli(append([]string{"write", mount + "/roles/app", "project_id=" + project}, fields...)...)
	value, id := e.sim.AddAdminKey("of " + mount)
	dead.cli("write", mount+"/config", "admin_api_key="+value)
	for range n {
		held = append(held, dead.creds())
	}
	admin, _ := e.sim.AdminKey()
	req, err := http.NewRequestWithContext(e.t.Context(), http.MethodDelete, e.url+"/v1/organization/admin_api_keys/"+id, nil)
	if err != nil {
		e.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+admin)
	resp, err := http.DefaultClient.Do(req)
	if err != nil || resp.StatusCode != http.StatusOK {
		e.t.Fatalf("deleting the admin key of %s: %v %v", mount, resp, err)
	}
	resp.Body.Close()
	return dead, held
}

// disable runs vault secrets disable until it succeeds, at most so many times.
func (e *engine) disable(most int) {
	e.t.Helper()
	start, said := time.Now(), ""
	for runs := 1; ; runs++ {
		result := e.CLI(e.t.Context(), "secrets", "disable", e.mount)
		if result.Code == 0 {
			e.t.Logf("%s was disabled at run %d, after %s", e.mount, runs, time.Since(start).Round(10*time.Millisecond))
			break
		}
		if said = result.Stderr; runs == most {
			e.t.Fatalf("%d runs of vault secrets disable: %s", runs, harness.Mask(said))
		}
	}
	if said != "" && !strings.Contains(said, "401") {
		e.t.Errorf("a run that failed: got %q, want that it names the 401", harness.Mask(said))
	}
}

// A mount whose admin key is dead is disabled by a handful of runs, however many leases it
// has. What is left at OpenAI is found by the tidy of another mount, which deletes what is
// past its end; TestTidyAfterDisabledMount waits for that.
func TestRealDisableWithDeadKey(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		kept := e.creds()
		left := map[string]bool{kept.accountID: true}
		for _, n := range []int{8, 50} {
			dead, held := e.doomed(fmt.Sprintf("dead-%d", n), n)
			id := dead.mountID()
			for _, c := range held {
				left[c.accountID] = true
			}
			dead.disable(6)
			if got := e.accounts(); !maps.Equal(got, left) {
				t.Errorf("accounts after the disabling: got %d, want %d", len(got), len(left))
			}
			e.mustWork(held[0], true) // until its expiry, which is set
			e.expiry(held[0])

			gone := e.sim.AddServiceAccount(project, "vault-app"+suffix(id, dueAfter+2*time.Minute), "member")
			answer := e.json("write", e.mount+"/tidy", "mount_id="+id, "dry_run=true")["data"].(map[string]any)
			if answer["found"] != float64(n+1) || fmt.Sprint(answer["leftover"]) != fmt.Sprint([]string{gone}) || answer["deleted"] != 0.0 {
				t.Errorf("dry run: got %v, want %d found, of which %s is due", answer, n+1, gone)
			}
			answer = e.json("write", e.mount+"/tidy", "mount_id="+id)["data"].(map[string]any)
			if got := e.accounts(); answer["deleted"] != 1.0 || answer["failed"] != 0.0 || !maps.Equal(got, left) {
				t.Errorf("tidy: got %v and %d accounts, want 1 deleted and %d accounts", answer, len(got), len(left))
			}
		}

		// The other way, also after a run that has failed.
		forced, _ := e.doomed("forced", 3)
		if result := forced.CLI(t.Context(), "secrets", "disable", forced.mount); result.Code == 0 {
			t.Error("vault secrets disable with a dead key: got success, want a failure first")
		}
		forced.cli("lease", "revoke", "-force", "-prefix", forced.mount+"/")
		forced.disable(1)
		if got := e.irrevocable(); got != 0.0 {
			t.Errorf("irrevocable leases: got %v, want 0", got)
		}
		e.mustWork(kept, true)
	})
}
