// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Vault-plugin-secrets-openai is a HashiCorp Vault secrets engine for OpenAI: it
// makes service accounts with API keys under Vault leases, removes them when the
// lease ends, and rotates the admin key that it does this with.
//
// Reading order: main.go; backend.go, the backend, its cached client, write-ahead
// log and periodic work; paths.go, the paths and what a lease holds; client.go, the
// OpenAI Admin API; rotate.go, rotation of the admin key.
//
// Storage, below the mount's own prefix:
//
//	config          the admin key and its settings (type config), seal-wrapped
//	roles/<name>    a role (type role)
//	cleanup/<id>    a credential still to be deleted at OpenAI (type cleanup)
//	wal/<id>        what may have to be undone: accounts or an admin key whose
//	                creation is not yet known to have ended well (a UUID), or a
//	                credential whose lease Vault may not have stored (the name of
//	                the account or key); holds no secret
package main

import (
	"fmt"
	"os"
	"regexp"

	"github.com/hashicorp/vault/sdk/plugin"
)

// version is set when a release is linked (-X main.version=v1.2.3). It is empty or
// semantic with a leading v: Vault refuses to register or mount anything else.
var version string

var versionPattern = regexp.MustCompile(`^v(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?$`)

func main() {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "vault-plugin-secrets-openai:", err)
		os.Exit(1)
	}
}

// serve answers Vault until Vault ends the process. One process serves all mounts
// of this plugin version; go-plugin's AutoMTLS secures the socket between them.
func serve() error {
	if version != "" && !versionPattern.MatchString(version) {
		return fmt.Errorf("built with version %q, which is not semantic with a leading v", version)
	}
	return plugin.ServeMultiplex(&plugin.ServeOpts{BackendFactoryFunc: Factory})
}
