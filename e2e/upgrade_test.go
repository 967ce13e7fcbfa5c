// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"crypto/sha256"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

// The binary is replaced under the older plugin's storage and leases.
func TestUpgradeInPlace(t *testing.T) {
	t.Parallel()
	binary := filepath.Join(pluginDir, "oldplugin")
	build := exec.CommandContext(t.Context(), "go", "build", "-tags", "e2e", "-o", binary, "./oldplugin")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the older plugin: %v\n%s", err, out)
	}
	text, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	for _, version := range harness.Versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			server, err := harness.Start(t.Context(), options(version))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(server.Close)
			v := newVault(t, server)
			sim := openaisim.New()
			openai := httptest.NewServer(sim)
			t.Cleanup(openai.Close)
			e := &engine{v, "openai", sim, openai.URL}
			oldKey, oldID := sim.AdminKey()

			v.cli("plugin", "register", fmt.Sprintf("-sha256=%x", sha256.Sum256(text)), "-command=oldplugin", "secret", harness.PluginName)
			v.cli("secrets", "enable", "-path="+e.mount, harness.PluginName)
			v.cli("write", e.mount+"/config", "admin_api_key="+oldKey, "admin_api_key_id="+oldID,
				"organization_id="+organization, "api_endpoint="+openai.URL+"/v1/")
			v.cli("write", e.mount+"/roles/app", "project_id="+project)
			leases := []creds{e.creds(), e.creds(), e.creds(), e.creds()}

			// An unversioned entry in the catalog hides a versioned one until the mount is told.
			v.cli("plugin", "register", "-sha256="+pluginSum, "-version="+pluginVersion, "secret", harness.PluginName)
			v.cli("secrets", "tune", "-plugin-version="+pluginVersion, e.mount)
			v.cli("plugin", "reload", "-plugin="+harness.PluginName)

			config := e.json("read", e.mount+"/config")["data"].(map[string]any)
			for field, want := range map[string]any{
				"admin_api_key_id": oldID, "organization_id": organization, "api_endpoint": openai.URL + "/v1", "rotation_manager": "none",
			} {
				if got := config[field]; got != want {
					t.Errorf("config: %s: got %v, want %v", field, got, want)
				}
			}
			role := e.json("read", e.mount+"/roles/app")["data"].(map[string]any)
			for field, want := range map[string]any{"project_id": project, "ttl": 3600.0, "max_ttl": 86400.0, "enforce_key_expiry": true} {
				if got := role[field]; got != want {
					t.Errorf("role: %s: got %v, want %v", field, got, want)
				}
			}

			// The older plugin's leases were not renewable, and are not now.
			if result := v.CLI(t.Context(), "lease", "renew", leases[0].lease); result.Code == 0 {
				t.Error("a lease that was issued as not renewable was renewed")
			}
			e.cli("lease", "revoke", "-sync", leases[0].lease)
			e.mustWork(leases[0], false)
			e.mustWork(leases[1], true)

			// Tidy knows nothing of the older plugin's accounts.
			if answer := e.tidy(); answer["found"] != 0.0 || answer["failed"] != 0.0 || len(e.accounts()) != 3 {
				t.Errorf("tidy: got %v, want none found and 3 accounts", answer)
			}

			// What was issued before lives through a rotation and a restart.
			newID := e.json("write -force", e.mount+"/config/rotate")["data"].(map[string]any)["admin_api_key_id"]
			if keys := sim.AdminKeys(); len(keys) != 1 || keys[0].ID != newID || newID == oldID {
				t.Errorf("admin keys: got %v, want only %v", keys, newID)
			}
			e.cli("lease", "revoke", "-sync", leases[1].lease)
			e.mustWork(leases[1], false)
			e.Kill()
			if err := e.Run(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := e.Unseal(t.Context()); err != nil {
				t.Fatal(err)
			}
			e.mustWork(leases[2], true)
			after := e.creds()
			e.mustWork(after, true)
			e.cli("lease", "renew", after.lease)
			e.api("PUT", "sys/leases/revoke-prefix/"+e.mount, nil, http.StatusNoContent)
			e.awaitAccounts(0, 20*time.Second)
		})
	}
}
