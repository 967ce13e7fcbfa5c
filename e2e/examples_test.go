// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
)

const examples = "../examples/"

// example reads an example and replaces what a user would replace: pairs of old and new.
func (e *engine) example(file string, pairs ...string) string {
	e.t.Helper()
	text, err := os.ReadFile(examples + file)
	if err != nil {
		e.t.Fatal(err)
	}
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(string(text), pairs[i]) {
			e.t.Fatalf("%s lacks %q", file, pairs[i])
		}
	}
	return strings.NewReplacer(pairs...).Replace(string(text))
}

// holding returns the server as somebody uses it who holds a token of an example policy.
func (e *engine) holding(policy, displayName string) *harness.Server {
	e.t.Helper()
	e.api("PUT", "sys/policies/acl/"+policy, map[string]any{
		"policy": strings.ReplaceAll(e.example("policies/"+policy+".hcl"), "my-role", "app")}, http.StatusNoContent)
	answer := e.api("POST", "auth/token/create", map[string]any{
		"policies": []string{policy}, "display_name": displayName, "ttl": "10m"}, http.StatusOK)
	server := *e.Server
	server.Token = dig(answer, "auth", "client_token").(string)
	return &server
}

// start runs a command that ends with the test, or with this process: the shell around it
// waits for the end of its standard input. If the test fails, it prints what it said.
func start(t *testing.T, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", append([]string{"-c", `"$@" & pid=$!; read line; kill -9 $pid; wait`, "sh"}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Wait()
		log.Close()
		if text, _ := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("%s said:\n%s", strings.Join(args[:2], " "), harness.Mask(string(text)))
		}
	})
}

// localAddress is an address of this machine that nobody listens on.
func localAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// Each policy allows what its holder needs and nothing else.
func TestExamplePolicies(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		e.cli("write", e.mount+"/roles/other", "project_id="+project)
		e.cli("write", e.mount+"/static-roles/app", "project_id="+project, "rotation_period=24h",
			"service_account_id="+e.sim.AddServiceAccount(project, "gateway", "member"))
		for _, test := range []struct {
			method, path                      string
			operator, application, prometheus int
		}{
			{"GET", "openai/config", 200, 403, 403},
			{"POST", "openai/config", 204, 403, 403},
			{"PUT", "openai/config/rotate", 200, 403, 403},
			{"POST", "openai/config/identity", 204, 403, 403},
			{"GET", "openai/config/identity", 200, 403, 403},
			{"PUT", "openai/config/identity/rotate", 200, 403, 403},
			{"DELETE", "openai/config/identity", 204, 403, 403},
			{"LIST", "openai/roles", 200, 403, 403},
			{"GET", "openai/roles/app", 200, 403, 403},
			{"POST", "openai/roles/app", 204, 403, 403},
			{"GET", "openai/creds/app", 403, 200, 403},
			{"PUT", "openai/creds/app", 403, 200, 403},
			{"POST", "openai/creds/app", 403, 200, 403},
			{"GET", "openai/creds/other", 403, 403, 403},
			{"PUT", "openai/creds/other", 403, 403, 403},
			{"LIST", "openai/static-roles", 200, 403, 403},
			{"POST", "openai/static-roles/app", 204, 403, 403},
			{"GET", "openai/static-roles/app", 200, 403, 403},
			{"GET", "openai/static-creds/app", 403, 200, 403},
			{"GET", "openai/static-creds/other", 403, 403, 403},
			{"PUT", "openai/rotate-role/app", 200, 403, 403},
			{"GET", "openai/metrics", 200, 403, 200},
			{"GET", "openai/tidy", 200, 403, 403},
			{"PUT", "openai/tidy", 200, 403, 403},
			{"GET", "sys/metrics", 403, 403, 200},
			{"LIST", "sys/leases/lookup/openai/creds/app", 200, 403, 403},
			{"PUT", "sys/leases/revoke-prefix/openai/creds/app", 204, 403, 403},
			{"GET", "sys/mounts", 403, 403, 403},
		} {
			for policy, want := range map[string]int{"application": test.application, "operator": test.operator, "prometheus": test.prometheus} {
				status, answer, err := e.holding(policy, "").API(t.Context(), test.method, test.path, map[string]any{})
				if err != nil || status != want {
					t.Errorf("%s: %s %s: got %d %v (%v), want %d", policy, test.method, test.path, status, answer["errors"], err, want)
				}
			}
		}
		app := e.holding("application", "")
		_, answer, _ := app.API(t.Context(), "GET", "openai/creds/app", nil)
		for _, action := range []string{"renew", "revoke"} {
			if status, answer, err := app.API(t.Context(), "PUT", "sys/leases/"+action, map[string]any{"lease_id": answer["lease_id"]}); err != nil || status >= 300 {
				t.Errorf("application: %s: got %d %v (%v)", action, status, answer["errors"], err)
			}
		}
		_, answer, _ = app.API(t.Context(), "GET", "openai/creds/app", nil)
		lease, _ := answer["lease_id"].(string)
		if result := app.CLI(t.Context(), "lease", "revoke", lease); result.Code != 0 {
			t.Errorf("application: vault lease revoke: %s", result.Stderr)
		}
	})
}

// What applications of Vault Agent and Vault Proxy have is a key that works, at any
// moment, while leases are renewed, run out and are followed by others.
func TestAgentAndProxy(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		t.Parallel() // the versions with each other
		e := newEngine(v)
		e.cli("write", e.mount+"/roles/app", "ttl=6s", "max_ttl=20s")
		e.holding("application", "")
		e.cli("auth", "enable", "approle")
		t.Cleanup(func() { e.CLI(context.Background(), "auth", "disable", "approle") })
		e.cli("write", "auth/approle/role/app", "token_policies=application", "token_ttl=10m")

		dir, address := t.TempDir(), localAddress(t)
		write(t, dir+"/role-id", e.json("read", "auth/approle/role/app/role-id")["data"].(map[string]any)["role_id"].(string))
		write(t, dir+"/secret-id", e.json("write -force", "auth/approle/role/app/secret-id")["data"].(map[string]any)["secret_id"].(string))
		write(t, dir+"/openai.env.ctmpl", e.example("agent/openai.env.ctmpl", "my-role", "app"))
		write(t, dir+"/agent.hcl", e.example("agent/agent.hcl", "https://vault.example.com:8200", e.Addr, "/etc/vault-agent/", dir+"/",
			"/run/my-app/", dir+"/", `["systemctl", "try-restart", "my-app.service"]`, `["sh", "-c", "echo >>`+dir+`/restarts"]`))
		write(t, dir+"/proxy.hcl", e.example("proxy/proxy.hcl", "https://vault.example.com:8200", e.Addr, "/etc/vault-proxy/", dir+"/", "127.0.0.1:8100", address))
		e.sim.ResetCalls()
		binary := binaries[t.Name()[strings.LastIndex(t.Name(), "/")+1:]]
		start(t, binary, "agent", "-config="+dir+"/agent.hcl")
		start(t, binary, "proxy", "-config="+dir+"/proxy.hcl")

		sources := map[string]func() string{
			"agent": func() string {
				text, _ := os.ReadFile(dir + "/openai.env")
				_, key, _ := strings.Cut(string(text), "OPENAI_API_KEY=")
				key, _, _ = strings.Cut(key, "\n")
				return key
			},
			"proxy": func() string {
				req, _ := http.NewRequest("GET", "http://"+address+"/v1/openai/creds/app", nil)
				req.Header.Set("X-Vault-Request", "true")
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					return ""
				}
				defer resp.Body.Close()
				var answer struct {
					Data struct {
						Key string `json:"api_key"`
					}
				}
				json.NewDecoder(resp.Body).Decode(&answer)
				return answer.Data.Key
			},
		}
		keys := map[string][]string{}
		look := func() error {
			for name, read := range sources {
				key := read()
				if key != "" && !slices.Contains(keys[name], key) {
					keys[name] = append(keys[name], key)
				}
				// Between the look at the key and the trial it may have been replaced.
				if !e.sim.Use(key) && key == read() && len(keys[name]) > 0 {
					t.Errorf("%s: key %d is dead", name, len(keys[name]))
				}
				if len(keys[name]) < 2 {
					return fmt.Errorf("%s has handed out %d keys", name, len(keys[name]))
				}
			}
			return nil
		}
		e.until(time.Minute, look)
		for range 20 { // also a while later
			look()
			time.Sleep(50 * time.Millisecond)
		}

		renewals := map[string]int{}
		for _, c := range e.sim.Calls() {
			if c.Method == "POST" && strings.Contains(c.Path, "/api_keys/key_") {
				renewals[c.Path]++
			}
		}
		counts := slices.Sorted(maps.Values(renewals))
		slices.Reverse(counts)
		t.Logf("keys handed out: %d by the agent, %d by the proxy; renewals by key: %v", len(keys["agent"]), len(keys["proxy"]), counts)
		if len(counts) < 2 || counts[1] < 3 {
			t.Errorf("renewals by key: got %v, want at least 3 of both first keys", counts)
		}
		if restarts, _ := os.ReadFile(dir + "/restarts"); len(restarts) < 2 {
			t.Errorf("the application was restarted %d times, want at least 2", len(restarts))
		}
		for name, got := range keys {
			e.until(10*time.Second, func() error {
				if e.sim.Use(got[0]) {
					return fmt.Errorf("the first key of %s still works", name)
				}
				return nil
			})
		}
	})
}

// The job of the example runs as it stands, with an identity that a JWT proves.
func TestCIJob(t *testing.T) {
	for _, tool := range []string{"curl", "jq"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("WARNING: not tested: %v", err)
		}
	}
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		signer, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		public, _ := x509.MarshalPKIXPublicKey(&signer.PublicKey)
		e.cli("auth", "enable", "jwt")
		t.Cleanup(func() { e.CLI(context.Background(), "auth", "disable", "jwt") })
		e.cli("write", "auth/jwt/config", "jwt_validation_pubkeys="+string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})))
		e.api("PUT", "sys/policies/acl/openai-ci", map[string]any{"policy": e.example("policies/application.hcl", "my-role", "ci")}, http.StatusNoContent)

		text := e.example("ci/gitlab-ci.yaml", "proj_example", project, "make evaluate",
			`curl -sSf -o /dev/null -H "Authorization: Bearer $OPENAI_API_KEY" `+e.url+`/v1/models && echo "$OPENAI_API_KEY"`)
		head, body, _ := strings.Cut(text, "\nevaluate:")
		_, setUp, _ := strings.Cut(head, "Beforehand:")
		_, script, _ := strings.Cut(body, "- |\n")
		run := func(script string, env ...string) string {
			cmd := exec.CommandContext(t.Context(), "sh", "-euc", script)
			cmd.Env = append([]string{"PATH=" + filepath.Dir(binaries[harness.Versions[0]]) + ":" + os.Getenv("PATH"), "VAULT_ADDR=" + e.Addr}, env...)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, harness.Mask(string(out)))
			}
			return string(out)
		}
		run(strings.ReplaceAll(strings.ReplaceAll(setUp, "\n#   ", "\n"), "\n#", "\n"), "VAULT_TOKEN="+e.Token)
		claims, _ := json.Marshal(map[string]any{"aud": "https://vault.example.com", "project_path": "my-org/my-app", "exp": time.Now().Add(time.Minute).Unix()})
		jwt := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"RS256"}`)) + "." + base64.RawURLEncoding.EncodeToString(claims)
		sum := sha256.Sum256([]byte(jwt))
		signature, err := rsa.SignPKCS1v15(rand.Reader, signer, crypto.SHA256, sum[:])
		if err != nil {
			t.Fatal(err)
		}
		key := strings.TrimSpace(run(script, "ID_TOKEN="+jwt+"."+base64.RawURLEncoding.EncodeToString(signature)))
		if !strings.HasPrefix(key, "sk-svcacct-") || e.sim.Use(key) {
			t.Errorf("the job's key: got %q, which works after it: %v", harness.Mask(key), e.sim.Use(key))
		}
		e.awaitAccounts(0, 10*time.Second)
	})
}

// Terraform compares what it reads with what it wrote. What else can be checked of the
// files here is their syntax.
func TestTerraformAndKubernetes(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		for path, data := range map[string]map[string]any{
			"config":        {"organization_id": organization, "rotation_period": 2592000.0},
			"roles/my-role": {"project_id": project, "ttl": 3600.0, "max_ttl": 86400.0, "scopes": []any{"api.responses.write"}},
		} {
			e.api("PUT", e.mount+"/"+path, data, http.StatusNoContent)
			got := e.api("GET", e.mount+"/"+path, nil, http.StatusOK)["data"].(map[string]any)
			for field, want := range data {
				if !reflect.DeepEqual(got[field], want) {
					t.Errorf("%s: %s: got %v, want %v as written", path, field, got[field], want)
				}
			}
		}
	})
	manifests, err := filepath.Glob(examples + "*/*.y*ml")
	if err != nil || len(manifests) < 5 {
		t.Fatalf("manifests: got %v (%v)", manifests, err)
	}
	for _, check := range [][]string{
		{"terraform", "fmt", "-check", "-recursive", examples},
		append([]string{"python3", "-c", "import sys, yaml\nfor f in sys.argv[1:]: list(yaml.safe_load_all(open(f)))"}, manifests...),
	} {
		if out, err := exec.CommandContext(t.Context(), check[0], check[1:]...).CombinedOutput(); err != nil {
			if errors.Is(err, exec.ErrNotFound) || strings.Contains(string(out), "No module named 'yaml'") {
				t.Logf("WARNING: not checked, %s is not here: %v", check[0], err)
				continue
			}
			t.Errorf("%s: %v\n%s", check[0], err, out)
		}
	}
}
