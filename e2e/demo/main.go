// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Demo shows the engine on a real Vault dev server with a simulated OpenAI, from
// registration to a key that is used, revoked and refused, and to an access token after the
// admin key was deleted. With KEEP=1 in the environment
// all of it stays up until Ctrl-C.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer cancel()
	err := run(ctx)
	if ctx.Err() != nil {
		fmt.Println("\nInterrupted. Everything is stopped.")
		if os.Getenv("KEEP") == "" {
			os.Exit(130)
		}
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "\nThe demo failed:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "vpso-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)

	say("Building the plugin.")
	sum, err := harness.BuildPlugin(ctx, dir, "")
	if err != nil {
		return err
	}
	binary, err := exec.LookPath("vault")
	if err != nil {
		if binary, err = harness.Vault(ctx, harness.Versions[0], os.Stdout); err != nil {
			return err
		}
	}
	sim := openaisim.New()
	openai := httptest.NewServer(sim)
	defer openai.Close()
	say("Starting a simulated OpenAI at %s and a Vault dev server (%s).", openai.URL, binary)
	server, err := harness.Start(ctx, harness.Options{Binary: binary, PluginDir: dir, Dev: true})
	if err != nil {
		return err
	}
	defer server.Close()
	adminKey, _ := sim.AdminKey()
	d := &demo{ctx: ctx, server: server, openai: openai.URL}

	d.say("Register the plugin under its SHA-256, and enable it.")
	d.vault("plugin", "register", "-sha256="+sum, "secret", harness.PluginName)
	d.vault("secrets", "enable", "-path=openai", harness.PluginName)

	d.say("Give it an Admin API key. It proves the key before it stores it, and finds its id.")
	d.vault("write", "openai/config", "admin_api_key="+adminKey,
		"organization_id="+openaisim.DefaultOrganization, "api_endpoint="+openai.URL+"/v1")

	d.say("Describe what applications get.")
	d.vault("write", "openai/roles/my-role", "project_id="+openaisim.DefaultProject, "ttl=1h", "max_ttl=24h")

	d.say("An application asks for a key: a service account of its own, under a lease.")
	creds := d.vault("read", "openai/creds/my-role")
	key, lease := field(creds, "api_key"), field(creds, "lease_id")

	d.say("The key works at OpenAI.")
	d.use(key, http.StatusOK)

	d.say("The lease is revoked, and the service account is deleted.")
	d.vault("lease", "revoke", "-sync", lease)

	d.say("The key works no more.")
	d.use(key, http.StatusUnauthorized)
	if d.err == nil && len(sim.ServiceAccounts(openaisim.DefaultProject)) > 0 {
		d.err = errors.New("a service account is left at OpenAI")
	}
	account := sim.AddServiceAccount(openaisim.DefaultProject, "my-app", "member")

	d.say("Now without an admin key. The mount becomes an identity provider at OpenAI, with a signing key of its own.")
	d.vault("write", "openai/config/identity", "token_endpoint="+openai.URL+"/oauth/token")
	d.vault("write", "openai/roles/my-token", "credential_type=access_token", "project_id="+openaisim.DefaultProject,
		"service_account_id="+account)

	d.say("Vault forgets the admin key: nothing in it could manage the organization any more.")
	d.vault("delete", "openai/config")

	d.say("An application asks for an access token: one call, without the Admin API. It works until its end.")
	d.use(field(d.vault("read", "openai/creds/my-token", "ttl=5m"), "api_key"), http.StatusOK)
	if d.err != nil {
		return fmt.Errorf("%w\n%s", d.err, harness.Mask(server.Log()))
	}
	if os.Getenv("KEEP") == "" {
		say("Done. KEEP=1 leaves all of it running.")
		return nil
	}
	say("All of it runs until Ctrl-C. In another terminal:")
	fmt.Printf("export PATH=%s:\"$PATH\"\nexport VAULT_ADDR=%s\nexport VAULT_TOKEN=%s\nvault read openai/creds/my-token\n"+
		"curl -H \"Authorization: Bearer $(vault read -field=api_key openai/creds/my-token)\" %s/v1/models\n",
		filepath.Dir(binary), server.Addr, server.Token, openai.URL)
	<-ctx.Done()
	return nil
}

// demo runs the steps; after one that fails the others do nothing.
type demo struct {
	ctx    context.Context
	server *harness.Server
	openai string // URL of the simulator
	err    error
}

// say announces a step.
func (d *demo) say(text string) {
	if d.err == nil {
		say("%s", text)
	}
}

// vault shows and runs a command of the vault CLI, and returns what it printed.
func (d *demo) vault(args ...string) string {
	if d.err != nil {
		return ""
	}
	fmt.Printf("$ vault %s\n", strings.Join(args, " "))
	result := d.server.CLI(d.ctx, args...)
	fmt.Print(result.Stdout, result.Stderr)
	if result.Code != 0 {
		d.err = fmt.Errorf("vault %s: exit status %d", args[0], result.Code)
	}
	return result.Stdout
}

// use calls the simulated OpenAI with a key and checks the answer's status.
func (d *demo) use(key string, want int) {
	if d.err != nil {
		return
	}
	url := d.openai + "/v1/models"
	fmt.Printf("$ curl -H \"Authorization: Bearer %s\" %s\n", key, url)
	req, err := http.NewRequestWithContext(d.ctx, http.MethodGet, url, nil)
	if err != nil {
		d.err = err
		return
	}
	req.Header.Set("Authorization", "Bearer "+key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		d.err = err
		return
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	fmt.Printf("%s: %s\n", resp.Status, strings.TrimSpace(string(body)))
	if resp.StatusCode != want {
		d.err = fmt.Errorf("OpenAI answered %d, want %d", resp.StatusCode, want)
	}
}

// field returns the value of a line in a table that vault printed.
func field(table, name string) string {
	if m := regexp.MustCompile(`(?m)^` + name + `\s+(\S+)`).FindStringSubmatch(table); m != nil {
		return m[1]
	}
	return ""
}

func say(format string, args ...any) { fmt.Printf("\n# "+format+"\n", args...) }
