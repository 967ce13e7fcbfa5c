// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

// Oldplugin leaves in a mount what versions 0.0.8 to 0.1.0 of the older plugin left there:
// its config and roles in their exact JSON form, and leases with its secret type and
// internal data. Tests upgrade it in place. It also has leases that stand for nothing, given
// at once or after a wait, to measure what Vault itself can do.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
)

func main() {
	if err := plugin.ServeMultiplex(&plugin.ServeOpts{BackendFactoryFunc: factory}); err != nil {
		fmt.Fprintln(os.Stderr, "oldplugin:", err)
		os.Exit(1)
	}
}

// config and role are stored entries; durations are nanoseconds.
type config struct {
	AdminAPIKey     string    `json:"admin_api_key"`
	AdminAPIKeyID   string    `json:"admin_api_key_id"`
	APIEndpoint     string    `json:"api_endpoint"`
	OrganizationID  string    `json:"organization_id"`
	LastRotatedTime time.Time `json:"last_rotated_time"`

	RotationSchedule         string        `json:"rotation_schedule"`
	RotationWindow           time.Duration `json:"rotation_window"`
	RotationPeriod           time.Duration `json:"rotation_period"`
	DisableAutomatedRotation bool          `json:"disable_automated_rotation"`
	RotationPolicy           string        `json:"rotation_policy"`
}

type role struct {
	ProjectID                  string        `json:"project_id"`
	ServiceAccountNameTemplate string        `json:"service_account_name_template"`
	ServiceAccountDescription  string        `json:"service_account_description"`
	TTL                        time.Duration `json:"ttl"`
	MaxTTL                     time.Duration `json:"max_ttl"`
}

func factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := &framework.Backend{BackendType: logical.TypeLogical}
	secret := &framework.Secret{
		Type:   "openai_api_key",
		Fields: map[string]*framework.FieldSchema{"api_key": {Type: framework.TypeString}},
		Revoke: func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
			return nil, nil
		},
	}
	b.Secrets = []*framework.Secret{secret}
	text := &framework.FieldSchema{Type: framework.TypeString}
	path := func(pattern string, op logical.Operation, handler framework.OperationFunc, fields ...string) *framework.Path {
		p := &framework.Path{
			Pattern: pattern, Fields: map[string]*framework.FieldSchema{},
			Operations: map[logical.Operation]framework.OperationHandler{op: &framework.PathOperation{Callback: handler}},
		}
		for _, name := range fields {
			p.Fields[name] = text
		}
		return p
	}
	b.Paths = []*framework.Path{
		path("config", logical.UpdateOperation, writeConfig, "admin_api_key", "admin_api_key_id", "api_endpoint", "organization_id"),
		path("roles/"+framework.GenericNameRegex("name"), logical.UpdateOperation, writeRole, "name", "project_id"),
		path("creds/"+framework.GenericNameRegex("name"), logical.ReadOperation,
			func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
				return readCreds(ctx, req.Storage, d.Get("name").(string), secret)
			}, "name"),
		path("nothing", logical.ReadOperation,
			func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
				wait, err := time.ParseDuration(d.Get("wait").(string))
				if err != nil {
					return logical.ErrorResponse("wait: %s", err), nil
				}
				time.Sleep(wait)
				resp := secret.Response(map[string]any{"api_key": "none"}, nil)
				resp.Secret.TTL = time.Hour
				return resp, nil
			}, "wait"),
	}
	return b, b.Setup(ctx, conf)
}

func put(ctx context.Context, s logical.Storage, key string, value any) (*logical.Response, error) {
	entry, err := logical.StorageEntryJSON(key, value)
	if err == nil {
		err = s.Put(ctx, entry)
	}
	return nil, err
}

func writeConfig(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	text := func(name string) string { return d.Get(name).(string) }
	return put(ctx, req.Storage, "config", config{
		AdminAPIKey: text("admin_api_key"), AdminAPIKeyID: text("admin_api_key_id"),
		APIEndpoint: text("api_endpoint"), OrganizationID: text("organization_id"), LastRotatedTime: time.Now(),
	})
}

func writeRole(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	return put(ctx, req.Storage, "roles/"+d.Get("name").(string), role{
		ProjectID:                  d.Get("project_id").(string),
		ServiceAccountNameTemplate: "vault-{{.RoleName}}-{{.RandomSuffix}}",
		ServiceAccountDescription:  "Service account created by Vault",
		TTL:                        time.Hour,
		MaxTTL:                     24 * time.Hour,
	})
}

func readCreds(ctx context.Context, s logical.Storage, name string, secret *framework.Secret) (*logical.Response, error) {
	var cfg config
	var r role
	for key, out := range map[string]any{"config": &cfg, "roles/" + name: &r} {
		entry, err := s.Get(ctx, key)
		if err != nil || entry == nil {
			return nil, fmt.Errorf("no %s (%v)", key, err)
		}
		if err := entry.DecodeJSON(out); err != nil {
			return nil, err
		}
	}
	body := fmt.Sprintf(`{"name": "vault-%s-%d"}`, name, time.Now().UnixNano())
	req, err := http.NewRequestWithContext(ctx, http.MethodPost,
		strings.TrimRight(cfg.APIEndpoint, "/")+"/organization/projects/"+r.ProjectID+"/service_accounts", bytes.NewReader([]byte(body)))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+cfg.AdminAPIKey)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var account struct {
		ID, Name string
		APIKey   struct{ ID, Value string } `json:"api_key"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&account); err != nil || account.APIKey.Value == "" {
		return nil, fmt.Errorf("OpenAI answered %d (%v)", resp.StatusCode, err)
	}
	answer := secret.Response(
		map[string]any{"api_key": account.APIKey.Value, "api_key_id": account.APIKey.ID,
			"service_account": account.Name, "service_account_id": account.ID},
		map[string]any{"api_key_id": account.APIKey.ID, "service_account_id": account.ID, "project_id": r.ProjectID})
	answer.Secret.TTL, answer.Secret.MaxTTL = r.TTL, r.MaxTTL
	return answer, nil
}
