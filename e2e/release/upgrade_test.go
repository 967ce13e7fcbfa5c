// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e && linux

package release

import (
	"path/filepath"
	"strings"
	"testing"

	"vault-plugin-secrets-openai/e2e/harness"
)

// TestUpgrade changes the version of a mount in place, up and back, with leases
// outstanding: each version renews and revokes what the other issued.
func TestUpgrade(t *testing.T) {
	dir := t.TempDir()
	v := startVault(t, harness.Options{Binary: vaultBinary(t), PluginDir: dir})
	for _, version := range []string{"v0.1.0", "v0.2.0"} {
		command := harness.PluginName + "_" + version
		run(t, script(t, root, []string{"VERSION=" + version}, "scripts/build", filepath.Join(dir, command)))
		v.cli("plugin", "register", "-sha256="+fileSum(t, filepath.Join(dir, command)),
			"-command="+command, "-version="+version, "secret", harness.PluginName)

		info := v.cli("plugin", "info", "-version="+version, "secret", harness.PluginName)
		wantText(t, "vault plugin info", info, version, command)
	}
	wantText(t, "vault plugin list", v.cli("plugin", "list", "secret"), "v0.1.0", "v0.2.0")

	o := startOpenAI(t, nil)
	v.cli("secrets", "enable", "-path=openai", "-plugin-version=v0.1.0", harness.PluginName)
	o.configure(v)
	upAndDown(t, v, o)
}

// upAndDown changes the mount openai from v0.1.0 to v0.2.0 and back.
func upAndDown(t *testing.T, v vault, o *openAI) {
	t.Helper()
	runs := func(version string) {
		t.Helper()
		v.cli("secrets", "tune", "-plugin-version="+version, "openai/")
		v.cli("plugin", "reload", "-plugin="+harness.PluginName)
		o.wantVersion(v, version)
	}
	o.wantVersion(v, "v0.1.0")
	a, b, c := v.issue(), v.issue(), v.issue()

	runs("v0.2.0")
	o.wantAccounts(t, a, b, c)
	v.cli("lease", "renew", b.Lease)
	v.cli("lease", "revoke", "-sync", a.Lease)
	d := v.issue()
	o.wantAccounts(t, b, c, d)

	runs("v0.1.0")
	o.wantAccounts(t, b, c, d)
	v.cli("lease", "renew", c.Lease)
	v.cli("lease", "renew", d.Lease)
	v.cli("lease", "revoke", "-sync", b.Lease)
	o.wantAccounts(t, c, d)
	v.cli("lease", "revoke", "-sync", "-prefix", "openai/creds")
	o.wantAccounts(t)
}

// wantVersion checks that the mount runs the version, as Vault, the metrics and OpenAI
// are told.
func (o *openAI) wantVersion(v vault, version string) {
	v.t.Helper()
	list := v.cli("secrets", "list", "-detailed")
	for line := range strings.Lines(list) {
		if strings.HasPrefix(line, "openai/") {
			wantText(v.t, "vault secrets list", line, version)
		}
	}
	wantText(v.t, "openai/metrics", v.cli("read", "-format=raw", "openai/metrics", "format=prometheus"), `version="`+version+`"`)
	v.cli("write", "openai/roles/app", "ttl=1h") // asks OpenAI for the project
	if got, want := o.userAgent(), harness.PluginName+"/"+version; got != want {
		v.t.Errorf("User-Agent: got %q, want %q", got, want)
	}
}

// wantText checks that text has all of the parts.
func wantText(t *testing.T, what, text string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%s does not show %q:\n%s", what, part, harness.Mask(text))
		}
	}
}
