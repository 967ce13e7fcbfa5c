// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
)

// withPolicy returns a token with one of the example policies, for this mount and role.
func (e *engine) withPolicy(name string) *harness.Server {
	e.t.Helper()
	text, err := os.ReadFile("../examples/policies/" + name + ".hcl")
	if err != nil {
		e.t.Fatal(err)
	}
	policy := strings.NewReplacer("openai/", e.mount+"/", "my-role", "app").Replace(string(text))
	e.api("PUT", "sys/policies/acl/"+e.mount+"-"+name, map[string]any{"policy": policy}, http.StatusNoContent)
	answer := e.api("POST", "auth/token/create", map[string]any{"policies": []string{e.mount + "-" + name}}, http.StatusOK)
	server := *e.Server
	server.Token = dig(answer, "auth", "client_token").(string)
	return &server
}

// TestPolicies: each example policy allows what it is for, and nothing beside it.
func TestPolicies(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		for _, tt := range []struct {
			policy, method, path string
			in                   any
			want                 int
		}{
			{"application", "GET", "creds/app", nil, 200},
			{"application", "GET", "config", nil, 403},
			{"application", "GET", "roles/app", nil, 403},
			{"application", "GET", "metrics", nil, 403},
			{"prometheus", "GET", "metrics?format=prometheus", nil, 200},
			{"prometheus", "GET", "creds/app", nil, 403},
			{"operator", "GET", "config", nil, 200},
			{"operator", "POST", "config/rotate", nil, 200},
			{"operator", "POST", "roles/app", map[string]any{"ttl": "30m"}, 204},
			{"operator", "GET", "creds/app", nil, 403},
		} {
			status, _, err := e.withPolicy(tt.policy).API(t.Context(), tt.method, e.mount+"/"+tt.path, tt.in)
			// A text answer is no JSON.
			if status != tt.want || err != nil && !strings.Contains(tt.path, "prometheus") {
				t.Errorf("%s: %s %s: got %d (%v), want %d", tt.policy, tt.method, tt.path, status, err, tt.want)
			}
		}
		if status, _, err := e.withPolicy("operator").API(t.Context(), "PUT", "sys/leases/revoke-prefix/"+e.mount+"/creds/app", nil); status != 204 {
			t.Errorf("operator: revoking a role's leases: got %d (%v), want 204", status, err)
		}
		e.awaitAccounts(0, 10*time.Second)
	})
}

// runExample runs an example of Vault Agent or Proxy, logged in by AppRole with the policy
// of an application, until the test ends. pairs are what to replace in its configuration.
func (e *engine) runExample(command, file string, pairs ...string) (dir string) {
	e.t.Helper()
	e.withPolicy("application")
	_, _, _ = e.API(e.t.Context(), "POST", "sys/auth/approle", map[string]any{"type": "approle"}) // perhaps it is there
	e.api("POST", "auth/approle/role/"+e.mount, map[string]any{"token_policies": e.mount + "-application"}, http.StatusNoContent)
	dir = e.t.TempDir()
	for name, value := range map[string]any{
		"role-id":   dig(e.api("GET", "auth/approle/role/"+e.mount+"/role-id", nil, http.StatusOK), "data", "role_id"),
		"secret-id": dig(e.api("POST", "auth/approle/role/"+e.mount+"/secret-id", nil, http.StatusOK), "data", "secret_id"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value.(string)), 0o600); err != nil {
			e.t.Fatal(err)
		}
	}
	pairs = append(pairs, "https://vault.example.com:8200", e.Addr, "/etc/openai-app", dir, "/run/openai-app", dir, "openai/creds/my-role", e.mount+"/creds/app")
	files, err := filepath.Glob("../examples/" + command + "/*")
	if err != nil {
		e.t.Fatal(err)
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			e.t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), []byte(strings.NewReplacer(pairs...).Replace(string(text))), 0o600); err != nil {
			e.t.Fatal(err)
		}
	}
	var log bytes.Buffer
	cmd := exec.Command(binaries["1.21.1"], command, "-config="+file)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &log, &log
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if e.t.Failed() {
			e.t.Logf("vault %s:\n%s", command, harness.Mask(log.String()))
		}
	})
	return dir
}

// TestAgent lets the real Vault Agent keep a file for longer than one lease can last: its
// key lives at each moment, over renewals and a new key.
func TestAgent(t *testing.T) {
	e := newEngine(ownServer(t, "1.21.1"))
	e.cli("write", e.mount+"/roles/app", "ttl=6s", "max_ttl=20s")
	file := filepath.Join(e.runExample("agent", "agent.hcl"), "openai.env")
	read := func() (string, error) {
		text, err := os.ReadFile(file)
		key, found := strings.CutPrefix(strings.TrimSpace(string(text)), "OPENAI_API_KEY=")
		if err == nil && (!found || !e.sim.Use(key)) {
			err = fmt.Errorf("the file holds no living key")
		}
		return key, err
	}
	e.until(15*time.Second, func() error { _, err := read(); return err })
	keys := map[string]bool{}
	for end := time.Now().Add(32 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		key, err := read()
		if err != nil {
			t.Fatal(err)
		}
		keys[key] = true
	}
	renewals := 0
	for _, call := range e.sim.Calls() {
		if call.Method == "POST" && strings.Contains(call.Path, "/api_keys/") && call.Status == http.StatusOK {
			renewals++
		}
	}
	t.Logf("%d renewals, %d keys", renewals, len(keys))
	if renewals < 3 || len(keys) < 2 {
		t.Errorf("got %d renewals and %d keys, want 3 and 2 at least", renewals, len(keys))
	}
}

// TestProxy lets two readers share a key through the real Vault Proxy.
func TestProxy(t *testing.T) {
	e := newEngine(ownServer(t, "1.21.1"))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	listener.Close()
	e.runExample("proxy", "proxy.hcl", "127.0.0.1:8100", addr)
	read := func() (key string, err error) {
		resp, err := http.Get("http://" + addr + "/v1/" + e.mount + "/creds/app")
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		var answer struct {
			Data struct {
				APIKey string `json:"api_key"`
			}
		}
		if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusOK {
			return "", fmt.Errorf("status %d: %v", resp.StatusCode, err)
		}
		return answer.Data.APIKey, nil
	}
	var first string
	e.until(15*time.Second, func() (err error) { first, err = read(); return err })
	second, err := read()
	if err != nil || second != first || !e.sim.Use(first) {
		t.Errorf("the second reader got another key or a dead one (%v)", err)
	}
}
