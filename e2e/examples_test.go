// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"net/http"
	"os"
	"strings"

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
