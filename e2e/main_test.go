// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

// Package e2e tests the plugin on real Vault servers, with the real vault command line
// and a simulated OpenAI.
package e2e

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

const (
	project       = openaisim.DefaultProject
	organization  = openaisim.DefaultOrganization
	pluginVersion = "v0.0.1-e2e"
)

var (
	pluginDir string
	pluginSum string                         // SHA-256
	binaries  = map[string]string{}          // vault executables by version
	shared    = map[string]*harness.Server{} // running servers by version
)

func TestMain(m *testing.M) { os.Exit(runTests(m)) }

func runTests(m *testing.M) int {
	ctx := context.Background()
	var err error
	if pluginDir, err = os.MkdirTemp("", "vpso-plugin-"); err != nil {
		return fail(err)
	}
	defer os.RemoveAll(pluginDir)
	if pluginSum, err = harness.BuildPlugin(ctx, pluginDir, pluginVersion); err != nil {
		return fail(err)
	}
	// The go tool holds back what tests print; who waits for a build wants to know.
	out, err := os.OpenFile("/dev/tty", os.O_WRONLY, 0)
	if err != nil {
		out = os.Stderr
	}
	for _, version := range harness.Versions {
		if binaries[version], err = harness.Vault(ctx, version, out); err != nil {
			return fail(err)
		}
	}
	defer func() {
		for _, s := range shared {
			s.Close()
		}
	}()
	// Tests that are parallel mostly wait; Go's own limit is the number of processors.
	if err := flag.Set("test.parallel", "16"); err != nil {
		return fail(err)
	}
	return m.Run()
}

func fail(err error) int {
	fmt.Fprintln(os.Stderr, harness.Mask(err.Error()))
	return 1
}

// options run a server of a version with all that it can log.
func options(version string) harness.Options {
	return harness.Options{Binary: binaries[version], PluginDir: pluginDir, LogLevel: "trace"}
}

// eachVersion runs fn on the shared server of each version, which knows the plugin.
func eachVersion(t *testing.T, fn func(t *testing.T, v vault)) {
	t.Helper()
	for _, version := range harness.Versions {
		t.Run(version, func(t *testing.T) {
			server := shared[version]
			if server == nil {
				var err error
				if server, err = harness.Start(context.Background(), options(version)); err != nil {
					t.Fatal(err)
				}
				shared[version] = server
				register(t, newVault(t, server))
			}
			fn(t, newVault(t, server))
		})
	}
}

// ownServer runs a server for one test, which knows the plugin.
func ownServer(t *testing.T, version string) vault {
	t.Helper()
	server, err := harness.Start(t.Context(), options(version))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(server.Close)
	v := newVault(t, server)
	register(t, v)
	return v
}

func register(t *testing.T, v vault) {
	t.Helper()
	v.cli("plugin", "register", "-sha256="+pluginSum, "secret", harness.PluginName)
}

// vault is a server as one test uses it.
type vault struct {
	*harness.Server
	t *testing.T
}

// newVault prints what the server logs from now on, if the test fails.
func newVault(t *testing.T, server *harness.Server) vault {
	skip := len(server.Log())
	t.Cleanup(func() {
		if t.Failed() {
			log := server.Log()[skip:]
			const most = 30000
			t.Logf("log of the server at %s:\n%s", server.Addr, harness.Mask(log[max(0, len(log)-most):]))
		}
	})
	return vault{server, t}
}

// cli runs a command that must succeed and returns what it printed.
func (v vault) cli(args ...string) string {
	v.t.Helper()
	result := v.CLI(v.t.Context(), args...)
	if result.Code != 0 {
		v.t.Fatalf("vault %s: exit status %d\n%s", harness.Mask(strings.Join(args, " ")), result.Code,
			harness.Mask(result.Stdout+result.Stderr))
	}
	return result.Stdout
}

// json runs a command, of one or more words, that must succeed and decodes what it printed.
func (v vault) json(command string, args ...string) map[string]any {
	v.t.Helper()
	var answer map[string]any
	text := v.cli(slices.Concat(strings.Fields(command), []string{"-format=json"}, args)...)
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		v.t.Fatalf("vault %s: %v\n%s", command, err, harness.Mask(text))
	}
	return answer
}

// api makes a request that must get the wanted status and returns the answer.
func (v vault) api(method, path string, in any, want int) map[string]any {
	v.t.Helper()
	status, answer, err := v.API(v.t.Context(), method, path, in)
	if err != nil || status != want {
		v.t.Fatalf("%s %s: got %d %v (%v), want %d", method, path, status, answer["errors"], err, want)
	}
	return answer
}

// until waits for a condition.
func (v vault) until(d time.Duration, fn func() error) {
	v.t.Helper()
	if err := harness.Until(v.t.Context(), d, fn); err != nil {
		v.t.Fatal(err)
	}
}

// engine is a mount with a role "app", and an OpenAI of its own.
type engine struct {
	vault
	mount string
	sim   *openaisim.Server
	url   string // of the simulator, without /v1
}

// newEngine enables and configures the plugin as the README tells it. The mount is
// disabled at the test's end, and none of its keys may be in the log.
func newEngine(v vault) *engine {
	v.t.Helper()
	sim := openaisim.New()
	server := httptest.NewServer(sim)
	e := &engine{v, "openai", sim, server.URL}
	key, _ := sim.AdminKey()
	skip := len(v.Log())
	v.t.Cleanup(func() {
		if result := e.CLI(context.Background(), "secrets", "disable", e.mount); result.Code != 0 {
			v.t.Errorf("vault secrets disable: %s", harness.Mask(result.Stderr))
		}
		server.Close()
		if log := v.Log()[skip:]; strings.Contains(log, "sk-admin-") || strings.Contains(log, "sk-svcacct-") {
			v.t.Error("the server's log has an API key in it")
		}
	})
	v.cli("secrets", "enable", "-path="+e.mount, harness.PluginName)
	v.cli("write", e.mount+"/config", "admin_api_key="+key, "organization_id="+organization, "api_endpoint="+e.url+"/v1")
	v.cli("write", e.mount+"/roles/app", "project_id="+project)
	sim.ResetCalls()
	return e
}

// creds are what an application gets.
type creds struct{ key, keyID, account, accountID, lease string }

// creds reads a credential of the role app.
func (e *engine) creds(args ...string) creds {
	e.t.Helper()
	answer := e.json("read", append([]string{e.mount + "/creds/app"}, args...)...)
	data := answer["data"].(map[string]any)
	text := func(name string) string { s, _ := data[name].(string); return s }
	return creds{text("api_key"), text("api_key_id"), text("service_account"), text("service_account_id"), answer["lease_id"].(string)}
}

// mustWork checks whether OpenAI accepts the key of c.
func (e *engine) mustWork(c creds, want bool) {
	e.t.Helper()
	req, err := http.NewRequestWithContext(e.t.Context(), http.MethodGet, e.url+"/v1/models", nil)
	if err != nil {
		e.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+c.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		e.t.Fatal(err)
	}
	resp.Body.Close()
	if got := resp.StatusCode == http.StatusOK; got != want {
		e.t.Errorf("OpenAI accepts the key of %s: got %v (%d), want %v", c.account, got, resp.StatusCode, want)
	}
}

// awaitAccounts waits until the project has n service accounts.
func (e *engine) awaitAccounts(n int, d time.Duration) {
	e.t.Helper()
	e.until(d, func() error {
		if got := len(e.sim.ServiceAccounts(project)); got != n {
			return fmt.Errorf("OpenAI has %d service accounts, want %d", got, n)
		}
		return nil
	})
}

// expiry is when OpenAI expires the key of c.
func (e *engine) expiry(c creds) time.Time {
	e.t.Helper()
	for _, key := range e.sim.ProjectKeys(project) {
		if key.ID == c.keyID {
			return key.Expires
		}
	}
	e.t.Fatalf("OpenAI does not have the key of %s", c.account)
	return time.Time{}
}
