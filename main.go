// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Vault-plugin-secrets-openai is a HashiCorp Vault secrets engine for OpenAI. It makes service accounts with API keys
// under Vault leases, deletes them when the lease ends, and rotates the admin key that it does this with. It also signs
// JWTs and exchanges them for access tokens, without an admin key, and rotates keys that many read.
//
// Reading order: main.go; backend.go, what is stored, the names of credentials, the mount, log and metrics;
// client.go, the OpenAI Admin API and the exchange; paths.go, the paths, what a lease does, clean-up and tidy;
// rotate.go, the engine's own keys: the admin key, the signing key, and those of static roles.
//
// Storage, below the mount's own prefix. Nothing is written on the path of a credential:
//
//	config          the admin key and its settings (type config), seal-wrapped
//	config/identity the key that signs for access tokens, and its settings (type identity), seal-wrapped
//	roles/<name>    a role (type role)
//	cleanup/<id>    a credential that could not be deleted at OpenAI yet (type lease)
//
// Only rotations write these:
//
//	static-roles/<name>  a static role with its key (type staticRole), seal-wrapped
package main

import (
	"fmt"
	"os"
	"regexp"

	"github.com/hashicorp/vault/sdk/plugin"
)

// version is set when a release is linked (-X main.version=v1.2.3). It is empty or semantic with a leading v: Vault
// refuses to register or mount anything else.
var version string

var versionPattern = regexp.MustCompile(`^v((0|[1-9]\d*)\.){2}(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)

func main() {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "vault-plugin-secrets-openai:", err)
		os.Exit(1)
	}
}

// serve answers Vault until Vault ends the process. One process serves all mounts of this plugin version; go-plugin's
// AutoMTLS secures the socket between them.
func serve() error {
	if version != "" && !versionPattern.MatchString(version) {
		return fmt.Errorf("built with version %q, which is not semantic with a leading v", version)
	}
	return plugin.ServeMultiplex(&plugin.ServeOpts{BackendFactoryFunc: Factory})
}
