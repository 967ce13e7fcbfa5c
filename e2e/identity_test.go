// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"errors"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
)

// newIdentity makes the engine's mount a provider, with a role "token" that has the scopes.
func (e *engine) newIdentity(scopes string) (account string) {
	e.t.Helper()
	account = e.sim.AddServiceAccount(project, "for tokens", "member")
	e.cli("write", e.mount+"/config/identity", "token_endpoint="+e.url+"/oauth/token")
	e.cli("write", e.mount+"/roles/token", "credential_type=access_token", "project_id="+project,
		"service_account_id="+account, "scopes="+scopes)
	return account
}

// token reads a token of the role, and returns it with its lease.
func (e *engine) token(role string, args ...string) (token, lease string, seconds float64) {
	e.t.Helper()
	answer := e.json("read", append([]string{e.mount + "/creds/" + role}, args...)...)
	if renewable := answer["renewable"]; renewable != false {
		e.t.Errorf("renewable: got %v, want false", renewable)
	}
	data := answer["data"].(map[string]any)
	return data["api_key"].(string), answer["lease_id"].(string), answer["lease_duration"].(float64)
}

// A mount that was set up needs no admin key any more: not to hand out tokens, nor to end
// leases, nor after the plugin or Vault has begun anew.
func TestKeyless(t *testing.T) {
	for _, version := range harness.Versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			e := newEngine(ownServer(t, version))
			e.newIdentity("api.model.read")
			e.cli("write", e.mount+"/roles/narrow", "credential_type=access_token", "project_id="+project,
				"service_account_id="+e.sim.AddServiceAccount(project, "narrow", "member"), "scopes=api.responses.write")
			status := func(token string) int {
				req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, e.url+"/v1/models", nil)
				req.Header.Set("Authorization", "Bearer "+token)
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				return resp.StatusCode
			}
			use := func(when string) (lease string) {
				t.Helper()
				e.sim.ResetCalls()
				token, lease, seconds := e.token("token", "ttl=5m")
				if calls := e.sim.Calls(); len(calls) != 1 || calls[0].Path != "/oauth/token" {
					t.Errorf("%s: calls to OpenAI: got %v, want the exchange alone", when, calls)
				}
				narrow, _, _ := e.token("narrow")
				if in, out := status(token), status(narrow); in != 200 || out != 403 {
					t.Errorf("%s: models within scopes, and outside: got %d and %d, want 200 and 403", when, in, out)
				}
				if seconds < 299 || seconds > 300 {
					t.Errorf("%s: lease_duration: got %v, want that of a token of 5 minutes", when, seconds)
				}
				return lease
			}
			lease := use("with config")
			if _, _, seconds := e.token("token"); seconds < 3598 || seconds > 3600 {
				t.Errorf("lease_duration by default: got %v, want an hour", seconds)
			}
			e.cli("delete", e.mount+"/config")
			use("without config")
			e.sim.ResetCalls()
			if result := e.CLI(t.Context(), "lease", "renew", lease); result.Code == 0 {
				t.Error("a token's lease was renewed")
			}
			e.cli("lease", "revoke", "-sync", lease)
			if n := len(e.sim.Calls()); n != 0 {
				t.Errorf("calls to OpenAI for a revocation: got %d, want 0", n)
			}
			e.cli("plugin", "reload", "-plugin="+harness.PluginName)
			use("after a reload")
			e.cli("operator", "seal")
			if err := e.Unseal(t.Context()); err != nil {
				t.Fatal(err)
			}
			lease = use("after seal and unseal")
			e.Kill()
			if err := errors.Join(e.Run(t.Context()), e.Unseal(t.Context())); err != nil {
				t.Fatal(err)
			}
			e.cli("lease", "revoke", "-sync", lease)
			use("after a restart")
			result := e.CLI(t.Context(), "read", e.mount+"/creds/token", "ttl=2h")
			if result.Code == 0 || !strings.Contains(result.Stderr, "OpenAI's access tokens live at most 1h") {
				t.Errorf("ttl=2h: got %d %s", result.Code, harness.Mask(result.Stderr))
			}
			identity := e.cli("read", e.mount+"/config/identity")
			for where, text := range map[string]string{"config/identity": identity, "the log": e.Log()} {
				if strings.Contains(text, "eyJhbGci") || strings.Contains(text, "private_key") ||
					strings.Contains(text, "PRIVATE") {
					t.Errorf("%s shows a JWT or a private key", where)
				}
			}
		})
	}
}

// Eight workers read tokens for 20 s while a new signing key takes 10 s to count at OpenAI.
func TestSigningKeyRotation(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		e.newIdentity("")
		e.sim.SetJWKSDelay(10 * time.Second)
		e.sim.SetLatency(100 * time.Millisecond) // or Vault has many thousand leases to end
		var mu sync.Mutex
		var failures []error
		count, end := 0, time.Now().Add(20*time.Second)
		var group sync.WaitGroup
		for range 8 {
			group.Go(func() {
				for time.Now().Before(end) {
					status, answer, err := e.API(t.Context(), "GET", e.mount+"/creds/token", nil)
					if err == nil && status != http.StatusOK {
						err = errors.New(harness.Mask(strings.Join(strings.Fields(answerErrors(answer)), " ")))
					}
					mu.Lock()
					if count++; err != nil {
						failures = append(failures, err)
					}
					mu.Unlock()
				}
			})
		}
		time.Sleep(3 * time.Second)
		before := e.sim.Providers()[0].KeyIDs
		start := time.Now()
		after := e.api("PUT", e.mount+"/config/identity/rotate", nil, http.StatusOK)["data"].(map[string]any)["key_id"]
		took := time.Since(start)
		if left := time.Until(end); left < 3*time.Second {
			t.Errorf("the rotation took %s: only %s are left", took, left)
		}
		group.Wait()
		keys := e.sim.Providers()[0].KeyIDs
		t.Logf("%d tokens, %d failures, rotation in %s", count, len(failures), took.Round(time.Millisecond))
		if len(failures) > 0 {
			t.Errorf("failures: got %d of %d, want 0: %v", len(failures), count, failures[0])
		}
		if len(keys) != 2 || keys[0] != before[0] || keys[1] != after {
			t.Errorf("keys at OpenAI: got %v, want %v and then %v", keys, before, after)
		}
		e.cli("delete", e.mount+"/config/identity")
		if left := len(e.sim.Providers()); left != 0 {
			t.Errorf("providers after the deletion: got %d, want 0", left)
		}
	})
}

// The application of the example always has a token that lives, over several of them, and so
// has one that reads the agent's file.
func TestTokenExamples(t *testing.T) {
	python, err := exec.LookPath("python3")
	if err != nil {
		t.Skipf("WARNING: not tested: %v", err)
	}
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		e.newIdentity("")
		e.cli("write", e.mount+"/roles/token", "ttl=5s")
		e.api("PUT", "sys/policies/acl/token", map[string]any{"policy": e.example("policies/application.hcl", "my-role", "token")},
			http.StatusNoContent)
		dir := t.TempDir()
		write(t, dir+"/token", e.Token)
		write(t, dir+"/openai.env.ctmpl", e.example("agent/openai-token.env.ctmpl", "my-role", "token"))
		start(t, binaries[t.Name()[strings.LastIndex(t.Name(), "/")+1:]], "agent", "-config="+agentConfig(t, e, dir))
		e.sim.ResetCalls()
		cmd := exec.CommandContext(t.Context(), python, examples+"python/openai_token.py")
		cmd.Env = []string{"VAULT_ADDR=" + e.Addr, "VAULT_TOKEN=" + e.json("token create", "-policy=token")["auth"].(map[string]any)["client_token"].(string),
			"OPENAI_ROLE=token", "OPENAI_BASE_URL=" + e.url + "/v1", "CALLS=40", "PAUSE=0.3"}
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Count(string(out), "models") != 40 {
			t.Errorf("application: %v\n%s", err, harness.Mask(string(out)))
		}
		exchanges := 0
		for _, c := range e.sim.Calls() {
			if c.Path == "/oauth/token" {
				exchanges++
			}
			if c.Status != http.StatusOK {
				t.Errorf("%s %s: got %d", c.Method, c.Path, c.Status)
			}
		}
		text, _ := os.ReadFile(dir + "/openai.env")
		_, token, _ := strings.Cut(string(text), "OPENAI_API_KEY=")
		token, _, _ = strings.Cut(token, "\n")
		if exchanges < 4 || !e.sim.Use(token) {
			t.Errorf("tokens: got %d by application and agent, want at least 4; the file's works: %v", exchanges, e.sim.Use(token))
		}
	})
}

// agentConfig writes the example's configuration of Vault Agent with a token in a file.
func agentConfig(t *testing.T, e *engine, dir string) string {
	t.Helper()
	text := e.example("agent/agent.hcl", "https://vault.example.com:8200", e.Addr, "/etc/vault-agent/", dir+"/",
		"/run/my-app/", dir+"/", `["systemctl", "try-restart", "my-app.service"]`, `["true"]`,
		`method "approle"`, `method "token_file"`, "role_id_file_path                   =", "token_file_path =")
	text = strings.ReplaceAll(text, dir+"/role-id", dir+"/token")
	write(t, dir+"/agent.hcl", text)
	return dir + "/agent.hcl"
}

// answerErrors are the errors of an answer of Vault's.
func answerErrors(answer map[string]any) (text string) {
	list, _ := answer["errors"].([]any)
	for _, e := range list {
		line, _ := e.(string)
		text += line + "\n"
	}
	return text
}
