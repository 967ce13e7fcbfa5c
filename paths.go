// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/helper/template"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	configPath = "config"
	rolePrefix = "roles/"

	// secretType is what Vault files leases under; the older plugin's is the same.
	secretType = "openai_api_key"

	defaultEndpoint     = "https://api.openai.com/v1"
	defaultTTL          = time.Hour
	defaultMaxTTL       = 24 * time.Hour
	maxKeyLife          = 365 * 24 * time.Hour // OpenAI's limit of expires_in_seconds
	defaultNameTemplate = "vault-{{.RoleName}}-{{.RandomSuffix}}"
	defaultDescription  = "Service account created by Vault"
	maxNameLength       = 64  // characters of a service account's name
	maxTemplateLength   = 256 // bytes

	// keyGrace is how long OpenAI lets a key live after its lease's end, for clocks that
	// differ and answers that are slow. A renewal asks for renewSlack less, so that even
	// a slow one never reaches past issue time + max_ttl + keyGrace.
	keyGrace   = time.Minute
	renewSlack = 5 * time.Second
)

// config is the storage entry "config". The older plugin's entry has the fields up to
// and including AutomatedRotationParams.
type config struct {
	AdminAPIKey    string `json:"admin_api_key"`
	AdminAPIKeyID  string `json:"admin_api_key_id"` // empty in entries of the earliest versions
	APIEndpoint    string `json:"api_endpoint"`     // without a trailing slash
	OrganizationID string `json:"organization_id"`
	// LastRotatedTime is when the key was written or rotated.
	LastRotatedTime time.Time `json:"last_rotated_time"`
	automatedrotationutil.AutomatedRotationParams

	// RotationManager is who rotates on schedule: one of the manager constants; empty in
	// the older plugin's entries.
	RotationManager string `json:"rotation_manager,omitempty"`
	// PendingDeletion are the ids of replaced admin keys that OpenAI still has.
	PendingDeletion []string `json:"pending_deletion,omitempty"`
}

// getConfig reads the config; nil when there is none.
func getConfig(ctx context.Context, s logical.Storage) (*config, error) {
	entry, err := s.Get(ctx, configPath)
	if err != nil {
		return nil, fmt.Errorf("reading config: %w", err)
	}
	if entry == nil {
		return nil, nil
	}
	cfg := &config{}
	if err := entry.DecodeJSON(cfg); err != nil {
		return nil, fmt.Errorf("decoding config: %w", err)
	}
	cfg.APIEndpoint = strings.TrimRight(cfg.APIEndpoint, "/")
	return cfg, nil
}

func putConfig(ctx context.Context, s logical.Storage, cfg *config) error {
	entry, err := logical.StorageEntryJSON(configPath, cfg)
	if err != nil {
		return fmt.Errorf("encoding config: %w", err)
	}
	if err := s.Put(ctx, entry); err != nil {
		return fmt.Errorf("storing config: %w", err)
	}
	return nil
}

// toResponseData is what reading config shows: everything but the key.
func (cfg *config) toResponseData() map[string]any {
	data := map[string]any{
		"admin_api_key_id": cfg.AdminAPIKeyID,
		"organization_id":  cfg.OrganizationID,
		"api_endpoint":     cfg.APIEndpoint,
		"last_rotated":     formatTime(cfg.LastRotatedTime),
		"next_rotation":    formatTime(cfg.nextRotation(time.Now())),
		"rotation_manager": cfg.manager(),
		"pending_deletion": slices.Concat([]string{}, cfg.PendingDeletion),
	}
	cfg.PopulateAutomatedRotationData(data)
	return data
}

// formatTime gives RFC 3339 in UTC, and nothing for no time.
func formatTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

// noContent and responds make the Responses of an operation; each says what it answers.
func noContent() map[int][]framework.Response {
	return map[int][]framework.Response{http.StatusNoContent: {{Description: http.StatusText(http.StatusNoContent)}}}
}

func responds(fields map[string]*framework.FieldSchema) map[int][]framework.Response {
	return map[int][]framework.Response{http.StatusOK: {{Description: http.StatusText(http.StatusOK), Fields: fields}}}
}

func pathConfig(b *backend) []*framework.Path {
	fields := map[string]*framework.FieldSchema{
		"admin_api_key": {
			Type:         framework.TypeString,
			Description:  "Admin API key of the OpenAI organization. Required. Never returned.",
			Required:     true,
			DisplayAttrs: &framework.DisplayAttributes{Name: "Admin API key", Sensitive: true},
		},
		"admin_api_key_id": {
			Type:        framework.TypeString,
			Description: "ID of that very key (key_…), which a rotation deletes. Found at OpenAI when absent.",
		},
		"organization_id": {
			Type:        framework.TypeString,
			Description: "ID of the OpenAI organization (org-…). Required.",
			Required:    true,
		},
		"api_endpoint": {
			Type:        framework.TypeString,
			Description: "Base URL of the OpenAI API: https, or http to a loopback address. Default " + defaultEndpoint + ".",
			Default:     defaultEndpoint,
		},
		"verify_connection": {
			Type:        framework.TypeBool,
			Description: "Whether this write proves the key against OpenAI before it is stored. Not stored itself. Default true.",
			Default:     true,
		},
	}
	automatedrotationutil.AddAutomatedRotationFields(fields)
	shown := map[string]*framework.FieldSchema{
		"admin_api_key_id": {Type: framework.TypeString, Required: true, Description: "ID of the admin API key."},
		"organization_id":  {Type: framework.TypeString, Required: true, Description: "ID of the organization."},
		"api_endpoint":     {Type: framework.TypeString, Required: true, Description: "Base URL of the OpenAI API."},
		"last_rotated":     {Type: framework.TypeString, Required: true, Description: "When the key was written or rotated (RFC 3339, UTC)."},
		"next_rotation":    {Type: framework.TypeString, Required: true, Description: "When the key is due next (RFC 3339, UTC); empty: never."},
		"rotation_manager": {Type: framework.TypeString, Required: true, Description: "Who rotates on schedule: vault, plugin or none."},
		"pending_deletion": {Type: framework.TypeCommaStringSlice, Required: true, Description: "IDs of replaced admin keys still to be deleted at OpenAI."},
	}
	automatedrotationutil.AddAutomatedRotationFields(shown)

	return []*framework.Path{
		{
			Pattern:      configPath,
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai"},
			Fields:       fields,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.CreateOperation: &framework.PathOperation{
					Callback:                    b.configWrite,
					Summary:                     "Configure the admin API key and how it is rotated.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "configure"},
					Responses:                   noContent(),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
				logical.UpdateOperation: &framework.PathOperation{
					Callback:                    b.configWrite,
					Summary:                     "Configure the admin API key and how it is rotated.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "configure"},
					Responses:                   noContent(),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.configRead,
					Summary:      "Read the configuration, without the admin API key.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read", OperationSuffix: "configuration"},
					Responses:    responds(shown),
				},
				logical.DeleteOperation: &framework.PathOperation{
					Callback:                    b.configDelete,
					Summary:                     "Delete the configuration. Leases can't be revoked without one.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "delete", OperationSuffix: "configuration"},
					Responses:                   noContent(),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			ExistenceCheck: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (bool, error) {
				cfg, err := getConfig(ctx, req.Storage)
				return cfg != nil, err
			},
			HelpSynopsis:    configHelpSynopsis,
			HelpDescription: configHelpDescription,
		},
		{
			Pattern:      configPath + "/rotate",
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.UpdateOperation: &framework.PathOperation{
					Callback:     b.configRotate,
					Summary:      "Replace the admin API key by a new one and delete the old one.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "rotate", OperationSuffix: "admin-api-key"},
					Responses: responds(map[string]*framework.FieldSchema{
						"admin_api_key_id": {Type: framework.TypeString, Required: true, Description: "ID of the new admin API key."},
						"rotated_time":     {Type: framework.TypeString, Required: true, Description: "When it was put to use (RFC 3339, UTC)."},
					}),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			HelpSynopsis:    rotateHelpSynopsis,
			HelpDescription: rotateHelpDescription,
		},
	}
}

func (b *backend) configRead(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil || cfg == nil {
		return nil, err
	}
	return &logical.Response{Data: cfg.toResponseData()}, nil
}

// configWrite stores what the request names over what is there. Nothing is stored
// unless all of it is right.
func (b *backend) configWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	b.configMu.Lock()
	defer b.configMu.Unlock()
	was, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	if was == nil {
		was = &config{}
	}
	cfg := *was
	if err := cfg.update(d); err != nil {
		return logical.ErrorResponse(err.Error()), nil
	}
	if d.Get("verify_connection").(bool) {
		id, err := newClient(&cfg, b.transport, b.throttle).adminKeyID(ctx)
		if err != nil {
			return logical.ErrorResponse(verificationFailed(err)), nil
		}
		cfg.AdminAPIKeyID = id
	} else if cfg.AdminAPIKeyID == "" {
		return logical.ErrorResponse("admin_api_key_id is required: with verify_connection=false it is not looked up at OpenAI"), nil
	}

	resp := &logical.Response{}
	if cfg.AdminAPIKey != was.AdminAPIKey {
		cfg.LastRotatedTime = time.Now()
	}
	if was.OrganizationID != "" && cfg.OrganizationID != was.OrganizationID {
		resp.AddWarning("organization_id has changed: leases issued in the former organization can't be revoked with the new key")
	}
	if cfg.RotationManager, err = b.registerRotation(ctx, req.MountPoint, was, &cfg); err != nil {
		return nil, err
	}
	if cfg.RotationManager == managerPlugin && cfg.RotationPolicy != "" {
		resp.AddWarning("rotation_policy has no effect: this Vault has no rotation manager, so the plugin rotates by itself")
	}
	if err := putConfig(ctx, req.Storage, &cfg); err != nil {
		return nil, err
	}
	b.setClient(nil)
	b.retryRotation, b.rotationFailures = time.Time{}, 0
	b.Logger().Info("config written", "admin_api_key_id", cfg.AdminAPIKeyID, "organization_id", cfg.OrganizationID, "rotation_manager", cfg.RotationManager)
	if len(resp.Warnings) == 0 {
		return nil, nil
	}
	return resp, nil
}

// verificationFailed says what to do about an error that proving the admin key met.
func verificationFailed(err error) string {
	switch {
	case isStatus(err, http.StatusUnauthorized, http.StatusForbidden):
		return "admin_api_key or organization_id was refused: " + err.Error()
	case isNotFound(err):
		return "admin_api_key_id does not exist: " + err.Error()
	case errors.Is(err, errKeyID):
		return err.Error()
	}
	return "the admin API key could not be verified: " + err.Error() + "; check api_endpoint, or store without asking OpenAI: verify_connection=false"
}

// update sets the fields that d names and checks the whole. Its error is the caller's.
func (cfg *config) update(d *framework.FieldData) error {
	if v, ok := d.GetOk("admin_api_key"); ok {
		if v.(string) != cfg.AdminAPIKey {
			cfg.AdminAPIKeyID = "" // of the former key
		}
		cfg.AdminAPIKey = v.(string)
	}
	if v, ok := d.GetOk("admin_api_key_id"); ok {
		cfg.AdminAPIKeyID = v.(string)
	}
	if v, ok := d.GetOk("organization_id"); ok {
		cfg.OrganizationID = v.(string)
	}
	if v, ok := d.GetOk("api_endpoint"); ok || cfg.APIEndpoint == "" {
		if v == nil || v.(string) == "" {
			v = defaultEndpoint
		}
		endpoint, err := parseEndpoint(v.(string))
		if err != nil {
			return err
		}
		cfg.APIEndpoint = endpoint
	}
	switch {
	case cfg.AdminAPIKey == "":
		return errors.New("admin_api_key is required")
	case !adminKeyPattern.MatchString(cfg.AdminAPIKey):
		return errors.New("admin_api_key must be 8 to 512 printable ASCII characters without spaces")
	case cfg.AdminAPIKeyID != "" && !validID(cfg.AdminAPIKeyID):
		return errors.New("admin_api_key_id must be 1 to 128 letters, digits, - or _")
	case cfg.OrganizationID == "":
		return errors.New("organization_id is required")
	case !validID(cfg.OrganizationID):
		return errors.New("organization_id must be 1 to 128 letters, digits, - or _")
	}
	return cfg.updateRotation(d)
}

var adminKeyPattern = regexp.MustCompile(`^[!-~]{8,512}$`)

// parseEndpoint checks api_endpoint and trims its trailing slashes. Its error does not
// quote the value, which may hold a password.
func parseEndpoint(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || u.Opaque != "" || strings.HasSuffix(u.Host, ":") {
		return "", errors.New("api_endpoint must be a URL like " + defaultEndpoint)
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return "", errors.New("api_endpoint has a port that is not 1 to 65535")
		}
	}
	ip := net.ParseIP(u.Hostname())
	loopback := u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
	switch {
	case u.User != nil:
		return "", errors.New("api_endpoint must not have user information")
	case strings.ContainsAny(s, "?#"):
		return "", errors.New("api_endpoint must not have a query or a fragment")
	case slices.Contains(strings.Split(u.Path, "/"), ".."):
		return "", errors.New("api_endpoint must not have .. in its path")
	case u.Scheme == "http" && !loopback:
		return "", errors.New("api_endpoint must be https: plain http is only for a loopback address")
	case u.Scheme != "https" && u.Scheme != "http":
		return "", errors.New("api_endpoint must be https")
	}
	return strings.TrimRight(u.String(), "/"), nil
}

func (b *backend) configDelete(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	b.configMu.Lock()
	defer b.configMu.Unlock()
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil || cfg == nil {
		return nil, err
	}
	if _, err := b.registerRotation(ctx, req.MountPoint, cfg, &config{}); err != nil {
		return nil, err
	}
	if err := req.Storage.Delete(ctx, configPath); err != nil {
		return nil, fmt.Errorf("deleting config: %w", err)
	}
	b.setClient(nil)
	b.Logger().Info("config deleted", "admin_api_key_id", cfg.AdminAPIKeyID)
	resp := &logical.Response{}
	resp.AddWarning("leases can't be revoked until config is written again; the admin key itself still exists at OpenAI")
	if len(cfg.PendingDeletion) > 0 {
		resp.AddWarning("these replaced admin keys are still at OpenAI, delete them there: " + strings.Join(cfg.PendingDeletion, ", "))
	}
	return resp, nil
}

// role is the storage entry "roles/<name>". The older plugin's entry has the fields up
// to and including MaxTTL.
type role struct {
	ProjectID                  string        `json:"project_id"`
	ServiceAccountNameTemplate string        `json:"service_account_name_template"`
	ServiceAccountDescription  string        `json:"service_account_description"`
	TTL                        time.Duration `json:"ttl"`     // nanoseconds
	MaxTTL                     time.Duration `json:"max_ttl"` // nanoseconds

	// UnexpiringKeys is the opposite of enforce_key_expiry, so that its absence in an
	// older entry means the default.
	UnexpiringKeys bool `json:"unexpiring_keys,omitempty"`
}

// getRole reads a role; nil when there is none.
func getRole(ctx context.Context, s logical.Storage, name string) (*role, error) {
	entry, err := s.Get(ctx, rolePrefix+name)
	if err != nil {
		return nil, fmt.Errorf("reading role %q: %w", name, err)
	}
	if entry == nil {
		return nil, nil
	}
	r := newRole()
	if err := entry.DecodeJSON(r); err != nil {
		return nil, fmt.Errorf("decoding role %q: %w", name, err)
	}
	if r.MaxTTL <= 0 {
		r.MaxTTL = defaultMaxTTL
	}
	if r.TTL <= 0 {
		r.TTL = min(defaultTTL, r.MaxTTL)
	}
	return r, nil
}

// newRole returns a role with the defaults; its TTL depends on MaxTTL, see update.
func newRole() *role {
	return &role{
		ServiceAccountNameTemplate: defaultNameTemplate,
		ServiceAccountDescription:  defaultDescription,
		MaxTTL:                     defaultMaxTTL,
	}
}

func (r *role) toResponseData() map[string]any {
	return map[string]any{
		"project_id":                    r.ProjectID,
		"service_account_name_template": r.ServiceAccountNameTemplate,
		"service_account_description":   r.ServiceAccountDescription,
		"ttl":                           int64(r.TTL.Seconds()),
		"max_ttl":                       int64(r.MaxTTL.Seconds()),
		"enforce_key_expiry":            !r.UnexpiringKeys,
	}
}

func pathRoles(b *backend) []*framework.Path {
	name := &framework.FieldSchema{
		Type:        framework.TypeString,
		Description: "Name of the role.",
		Required:    true,
	}
	settings := map[string]*framework.FieldSchema{
		"project_id": {
			Type:        framework.TypeString,
			Description: "ID of the OpenAI project that the service accounts are made in (proj_…). Required.",
			Required:    true,
		},
		"service_account_name_template": {
			Type:        framework.TypeString,
			Description: "Template of a service account's name. Must give another name each time. Default " + defaultNameTemplate + ".",
			Default:     defaultNameTemplate,
		},
		"service_account_description": {
			Type:        framework.TypeString,
			Description: "Description, kept with the role only: OpenAI has no such field. Default \"" + defaultDescription + "\".",
			Default:     defaultDescription,
		},
		"ttl": {
			Type:        framework.TypeDurationSecond,
			Description: "TTL of a lease when its reader asks for none. More than 0, at most max_ttl. Default 1h.",
			Default:     int(defaultTTL.Seconds()),
		},
		"max_ttl": {
			Type:        framework.TypeDurationSecond,
			Description: "Longest TTL of a lease, renewals included. At most 365 days. Default 24h.",
			Default:     int(defaultMaxTTL.Seconds()),
		},
		"enforce_key_expiry": {
			Type:        framework.TypeBool,
			Description: "Whether OpenAI itself expires a key, about a minute after its lease's end. Default true.",
			Default:     true,
		},
	}
	fields := map[string]*framework.FieldSchema{"name": name}
	for field, schema := range settings {
		fields[field] = schema
	}

	return []*framework.Path{
		{
			Pattern:      rolePrefix + "?$",
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "roles"},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ListOperation: &framework.PathOperation{
					Callback:     b.roleList,
					Summary:      "List the roles.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "list"},
					Responses: responds(map[string]*framework.FieldSchema{
						"keys": {Type: framework.TypeStringSlice, Description: "Names of the roles."},
					}),
				},
			},
			HelpSynopsis:    "List the roles.",
			HelpDescription: "The names of the roles, in alphabetical order.",
		},
		{
			Pattern:      rolePrefix + framework.GenericNameRegex("name"),
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "role"},
			Fields:       fields,
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.CreateOperation: &framework.PathOperation{
					Callback:                    b.roleWrite,
					Summary:                     "Create or update a role.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "write"},
					Responses:                   noContent(),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
				logical.UpdateOperation: &framework.PathOperation{
					Callback:                    b.roleWrite,
					Summary:                     "Create or update a role.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "write"},
					Responses:                   noContent(),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
				logical.ReadOperation: &framework.PathOperation{
					Callback:     b.roleRead,
					Summary:      "Read a role.",
					DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
					Responses:    responds(settings),
				},
				logical.DeleteOperation: &framework.PathOperation{
					Callback:                    b.roleDelete,
					Summary:                     "Delete a role. Its leases live on, but can't be renewed.",
					DisplayAttrs:                &framework.DisplayAttributes{OperationVerb: "delete"},
					Responses:                   noContent(),
					ForwardPerformanceStandby:   true,
					ForwardPerformanceSecondary: true,
				},
			},
			ExistenceCheck: func(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
				r, err := getRole(ctx, req.Storage, d.Get("name").(string))
				return r != nil, err
			},
			HelpSynopsis:    roleHelpSynopsis,
			HelpDescription: roleHelpDescription,
		},
	}
}

func (b *backend) roleList(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	names, err := req.Storage.List(ctx, rolePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing roles: %w", err)
	}
	return logical.ListResponse(names), nil
}

func (b *backend) roleRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	r, err := getRole(ctx, req.Storage, d.Get("name").(string))
	if err != nil || r == nil {
		return nil, err
	}
	return &logical.Response{Data: r.toResponseData()}, nil
}

func (b *backend) roleDelete(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	if err := req.Storage.Delete(ctx, rolePrefix+name); err != nil {
		return nil, fmt.Errorf("deleting role %q: %w", name, err)
	}
	b.Logger().Info("role deleted", "role", name)
	return nil, nil
}

// roleWrite stores what the request names over what is there. Nothing is stored unless
// all of it is right, the project included; only an OpenAI that can't be asked is let pass.
func (b *backend) roleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	r, err := getRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	if r == nil {
		r = newRole()
	}
	if err := r.update(d); err != nil {
		return logical.ErrorResponse(err.Error()), nil
	}

	resp := &logical.Response{}
	sample := nameData{RoleName: name, ProjectID: r.ProjectID, ProjectName: "project", DisplayName: "token"}
	err = b.useClient(ctx, req.Storage, func(c *client) error {
		p, err := c.getProject(ctx, r.ProjectID)
		if err == nil && p.Status == "archived" {
			err = &apiError{Status: http.StatusBadRequest, Message: "the project is archived"}
		}
		if err == nil {
			sample.ProjectName = p.Name
		}
		return err
	})
	if err != nil {
		if errors.Is(err, errNotConfigured) {
			return logical.ErrorResponse(err.Error()), nil
		}
		if isRefused(err) && !isStatus(err, http.StatusTooManyRequests) {
			return logical.ErrorResponse("project_id %q was refused: %s", r.ProjectID, err), nil
		}
		resp.AddWarning(fmt.Sprintf("project_id %q is stored unchecked: %s", r.ProjectID, err))
	}
	if err := checkNameTemplate(r.ServiceAccountNameTemplate, sample); err != nil {
		return logical.ErrorResponse("service_account_name_template %s", err), nil
	}
	if limit := b.System().MaxLeaseTTL(); limit > 0 && r.MaxTTL > limit {
		resp.AddWarning(fmt.Sprintf("max_ttl %s is more than the mount's maximum of %s, which bounds the leases", r.MaxTTL, limit))
	}

	entry, err := logical.StorageEntryJSON(rolePrefix+name, r)
	if err != nil {
		return nil, fmt.Errorf("encoding role %q: %w", name, err)
	}
	if err := req.Storage.Put(ctx, entry); err != nil {
		return nil, fmt.Errorf("storing role %q: %w", name, err)
	}
	b.Logger().Info("role written", "role", name, "project_id", r.ProjectID)
	if len(resp.Warnings) == 0 {
		return nil, nil
	}
	return resp, nil
}

// update sets the fields that d names and checks what needs no call. Its error is the
// caller's.
func (r *role) update(d *framework.FieldData) error {
	if v, ok := d.GetOk("project_id"); ok {
		r.ProjectID = v.(string)
	}
	if v, ok := d.GetOk("service_account_name_template"); ok {
		r.ServiceAccountNameTemplate = v.(string)
	}
	if v, ok := d.GetOk("service_account_description"); ok {
		r.ServiceAccountDescription = v.(string)
	}
	if v, ok := d.GetOk("ttl"); ok {
		r.TTL = time.Duration(v.(int)) * time.Second
	}
	if v, ok := d.GetOk("max_ttl"); ok {
		r.MaxTTL = time.Duration(v.(int)) * time.Second
	}
	if _, named := d.Raw["ttl"]; !named && r.TTL == 0 {
		r.TTL = min(defaultTTL, r.MaxTTL) // a new role
	}
	if v, ok := d.GetOk("enforce_key_expiry"); ok {
		r.UnexpiringKeys = !v.(bool)
	}
	switch {
	case r.ProjectID == "":
		return errors.New("project_id is required")
	case !validID(r.ProjectID):
		return errors.New("project_id must be 1 to 128 letters, digits, - or _")
	case len(r.ServiceAccountDescription) > 1024:
		return errors.New("service_account_description must be at most 1024 bytes")
	case r.MaxTTL <= 0 || r.MaxTTL > maxKeyLife:
		return errors.New("max_ttl must be more than 0 and at most 365 days")
	case r.TTL <= 0 || r.TTL > r.MaxTTL:
		return errors.New("ttl must be more than 0 and at most max_ttl")
	}
	return nil
}

// nameData is what a name template can use.
type nameData struct {
	RoleName     string
	RandomSuffix string // 10 lower-case letters and digits, 50 random bits
	ProjectID    string
	ProjectName  string // costs a call when it is not yet known
	DisplayName  string // of the token that asks
}

// renderName makes an account's name that OpenAI takes: what is not a letter, digit,
// - or _ becomes -. Its length is not bounded here.
func renderName(raw string, data nameData, overrides ...template.Opt) (string, error) {
	// One role must not be able to exhaust the process that serves all mounts: no loops,
	// no function that multiplies what it is given.
	if len(raw) > maxTemplateLength || loopPattern.MatchString(raw) {
		return "", fmt.Errorf("must be at most %d bytes and have no range, define, template or block", maxTemplateLength)
	}
	options := []template.Opt{
		template.Template(raw),
		template.Function("random", func(n int) (string, error) { return randomText(n) }),
		template.Function("replace", boundedReplace),
	}
	for _, name := range []string{"html", "js", "urlquery", "printf"} {
		options = append(options, template.Function(name, func(...any) (string, error) {
			return "", fmt.Errorf("the function %s is not available", name)
		}))
	}
	t, err := template.NewTemplate(append(options, overrides...)...)
	if err != nil {
		return "", fmt.Errorf("is not valid: %w", err)
	}
	name, err := t.Generate(data)
	if err != nil {
		return "", fmt.Errorf("is not valid: %w", err)
	}
	return strings.Trim(invalidInName.ReplaceAllString(name, "-"), "-"), nil
}

var (
	loopPattern   = regexp.MustCompile(`\{\{-?\s*(range|define|template|block)\b`)
	invalidInName = regexp.MustCompile(`[^A-Za-z0-9_-]+`)
)

// randomText returns n random lower-case letters and digits.
func randomText(n int) (string, error) {
	if n < 1 || n > maxNameLength {
		return "", fmt.Errorf("random takes 1 to %d characters", maxNameLength)
	}
	text := ""
	for len(text) < n {
		text += strings.ToLower(rand.Text())
	}
	return text[:n], nil
}

func boundedReplace(find, replacement, s string) (string, error) {
	if find == "" || len(s) > 1024 {
		return "", errors.New("replace takes a text to find and at most 1024 bytes to search")
	}
	return strings.ReplaceAll(s, find, replacement), nil
}

// checkNameTemplate refuses a template whose names are empty, too long, or not unique:
// rollback finds a lost account by its name. Two samples of everything random share
// their first five characters, so that a template which keeps no more is refused too;
// clocks stand still.
func checkNameTemplate(raw string, data nameData) error {
	var names [2]string
	for i := range names {
		sample := "abcde" + strings.Repeat(strconv.Itoa(i), maxNameLength)
		data.RandomSuffix = sample[:10]
		fixed := func(...any) string { return "0" }
		name, err := renderName(raw, data,
			template.Function("random", func(n int) (string, error) {
				_, err := randomText(n)
				return sample[:min(max(n, 0), maxNameLength)], err
			}),
			template.Function("uuid", func() string { return sample[:36] }),
			template.Function("unix_time", fixed),
			template.Function("unix_time_millis", fixed),
			template.Function("timestamp", fixed),
		)
		if err != nil {
			return err
		}
		names[i] = name
	}
	switch {
	case names[0] == "":
		return errors.New("renders an empty name")
	case len(names[0]) > maxNameLength:
		return fmt.Errorf("renders %d characters, at most %d are allowed", len(names[0]), maxNameLength)
	case names[0] == names[1]:
		return errors.New("must give another name each time: use {{.RandomSuffix}}, {{random 10}} or {{uuid}}")
	}
	return nil
}

// accountName makes the name of a new service account, unique also for roles of the
// older plugin, whose templates nobody checked.
func (b *backend) accountName(ctx context.Context, req *logical.Request, roleName string, r *role) (string, error) {
	suffix, err := randomText(10)
	if err != nil {
		return "", err
	}
	data := nameData{RoleName: roleName, RandomSuffix: suffix, ProjectID: r.ProjectID, DisplayName: req.DisplayName}
	if strings.Contains(r.ServiceAccountNameTemplate, ".ProjectName") {
		err := b.useClient(ctx, req.Storage, func(c *client) (err error) {
			data.ProjectName, err = c.projectName(ctx, r.ProjectID)
			return err
		})
		if err != nil {
			return "", err
		}
	}
	name, err := renderName(r.ServiceAccountNameTemplate, data)
	if err != nil {
		return "", fmt.Errorf("service_account_name_template %w", err)
	}
	if !strings.Contains(name, suffix) && checkNameTemplate(r.ServiceAccountNameTemplate, data) != nil {
		name += "-" + suffix
	}
	if len(name) > maxNameLength { // a long display or project name
		sum := sha256.Sum256([]byte(name))
		name = fmt.Sprintf("%s-%x", name[:maxNameLength-17], sum[:8])
	}
	return name, nil
}

func pathCreds(b *backend) []*framework.Path {
	return []*framework.Path{
		{
			Pattern:      "creds/" + framework.GenericNameRegex("name"),
			DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "credentials"},
			Fields: map[string]*framework.FieldSchema{
				"name": {
					Type:        framework.TypeString,
					Description: "Name of the role.",
					Required:    true,
				},
				"ttl": {
					Type:        framework.TypeDurationSecond,
					Description: "TTL of the lease. More than 0, at most the role's max_ttl. Default: the role's ttl.",
					Query:       true,
				},
			},
			Operations: map[logical.Operation]framework.OperationHandler{
				logical.ReadOperation: &framework.PathOperation{
					Callback:                  b.credsRead,
					Summary:                   "Make a service account with an API key under a new lease.",
					DisplayAttrs:              &framework.DisplayAttributes{OperationVerb: "generate"},
					Responses:                 responds(secretFields()),
					ForwardPerformanceStandby: true,
				},
			},
			HelpSynopsis:    credsHelpSynopsis,
			HelpDescription: credsHelpDescription,
		},
	}
}

// secretFields are what a caller of creds gets.
func secretFields() map[string]*framework.FieldSchema {
	return map[string]*framework.FieldSchema{
		"api_key": {
			Type: framework.TypeString, Required: true, Description: "The OpenAI API key.",
			DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		},
		"api_key_id":         {Type: framework.TypeString, Required: true, Description: "ID of the API key."},
		"service_account":    {Type: framework.TypeString, Required: true, Description: "Name of the service account."},
		"service_account_id": {Type: framework.TypeString, Required: true, Description: "ID of the service account."},
		"project_id":         {Type: framework.TypeString, Required: true, Description: "ID of the project."},
		"organization_id":    {Type: framework.TypeString, Required: true, Description: "ID of the organization."},
		"expires_at": {
			Type: framework.TypeString, Required: true,
			Description: "When OpenAI itself expires the key unless the lease is renewed (RFC 3339, UTC); empty: never.",
		},
	}
}

// secretAPIKey is the type of the leases. Internal data of a lease (the first three are
// all that the older plugin wrote): api_key_id, service_account_id, project_id; role;
// key_expires, whether OpenAI expires the key so that a renewal must move that.
func secretAPIKey(b *backend) *framework.Secret {
	return &framework.Secret{
		Type:   secretType,
		Fields: secretFields(),
		Renew:  b.credRenew,
		Revoke: b.credRevoke,
	}
}

// credsRead makes a service account with a key: one call to OpenAI. The write-ahead-log
// entry comes first, since a create whose answer is lost can only be found again by name;
// it is deleted last, and without that nothing is handed out.
func (b *backend) credsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	roleName := d.Get("name").(string)
	r, err := getRole(ctx, req.Storage, roleName)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("role %q does not exist", roleName), nil
	}
	ttl := r.TTL
	if v, ok := d.GetOk("ttl"); ok {
		ttl = time.Duration(v.(int)) * time.Second
		if ttl <= 0 || ttl > r.MaxTTL {
			return logical.ErrorResponse("ttl must be more than 0 and at most the role's max_ttl of %s", r.MaxTTL), nil
		}
	}
	var warning string
	// Vault would shorten the lease behind our back, and the key would outlive it.
	if limit := b.System().MaxLeaseTTL(); limit > 0 && ttl > limit {
		warning = fmt.Sprintf("ttl of %s is more than the mount's maximum and was shortened to %s", ttl, limit)
		ttl = limit
	}
	var expiresIn time.Duration
	if !r.UnexpiringKeys {
		expiresIn = min(ttl+keyGrace, maxKeyLife)
	}
	name, err := b.accountName(ctx, req, roleName, r)
	if err != nil {
		return answerError("naming the service account", err)
	}

	walID, err := framework.PutWAL(ctx, req.Storage, walServiceAccount, walAccount{ProjectID: r.ProjectID, Name: name})
	if err != nil {
		return nil, fmt.Errorf("writing write-ahead log: %w", err)
	}
	var account *serviceAccount
	var organizationID string
	err = b.useClient(ctx, req.Storage, func(c *client) (err error) {
		organizationID = c.config.OrganizationID
		account, err = c.createServiceAccount(ctx, r.ProjectID, name, expiresIn)
		return err
	})
	if err != nil {
		if notDone(err) {
			if walErr := framework.DeleteWAL(ctx, req.Storage, walID); walErr != nil {
				b.Logger().Warn("deleting write-ahead-log entry failed, rollback will", "role", roleName, "error", walErr)
			}
		}
		return answerError("creating service account", err)
	}
	// Past this point the account exists; rollback deletes it unless the entry is gone.
	if ctx.Err() != nil {
		return nil, fmt.Errorf("creating service account: nobody waits for it any more: %w", ctx.Err())
	}
	if err := framework.DeleteWAL(ctx, req.Storage, walID); err != nil {
		return nil, fmt.Errorf("deleting write-ahead-log entry: %w", err)
	}

	key := account.APIKey
	expiresAt := ""
	if key.ExpiresAt > 0 {
		expiresAt = formatTime(time.Unix(key.ExpiresAt, 0))
	}
	resp := b.Secret(secretType).Response(map[string]any{
		"api_key":            key.Value,
		"api_key_id":         key.ID,
		"service_account":    name,
		"service_account_id": account.ID,
		"project_id":         r.ProjectID,
		"organization_id":    organizationID,
		"expires_at":         expiresAt,
	}, map[string]any{
		"api_key_id":         key.ID,
		"service_account_id": account.ID,
		"project_id":         r.ProjectID,
		"role":               roleName,
		"key_expires":        expiresIn > 0,
	})
	resp.Secret.TTL = ttl
	resp.Secret.MaxTTL = r.MaxTTL
	if warning != "" {
		resp.AddWarning(warning)
	}
	if expiresIn > 0 && key.ExpiresAt == 0 {
		resp.AddWarning("OpenAI did not take over the key's expiry: only revocation ends this key")
	}
	b.Logger().Debug("service account created", "role", roleName, "project_id", r.ProjectID,
		"service_account", name, "service_account_id", account.ID, "api_key_id", key.ID, "ttl", ttl)
	return resp, nil
}

// answerError turns an error of OpenAI into a handler's answer. What OpenAI refused is
// the request's fault, a 400; an admin key that is not accepted is not.
func answerError(doing string, err error) (*logical.Response, error) {
	if errors.Is(err, errNotConfigured) ||
		isRefused(err) && !isStatus(err, http.StatusUnauthorized, http.StatusTooManyRequests) {
		return logical.ErrorResponse("%s: %s", doing, err), nil
	}
	return nil, fmt.Errorf("%s: %w", doing, err)
}

// credRenew extends a lease: the key's expiry at OpenAI first, so that the key never ends
// before its lease.
func (b *backend) credRenew(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	roleName, _ := req.Secret.InternalData["role"].(string)
	r, err := getRole(ctx, req.Storage, roleName)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("role %q of this lease does not exist any more", roleName), nil
	}
	if expires, _ := req.Secret.InternalData["key_expires"].(bool); expires {
		// What Vault will make of the lease when it gets our answer.
		now := time.Now().Truncate(time.Second)
		ttl, _, err := framework.CalculateTTL(b.System(), req.Secret.Increment, r.TTL, 0, r.MaxTTL, 0, req.Secret.IssueTime)
		if err != nil {
			return logical.ErrorResponse("lease can't be renewed: %s", err), nil
		}
		projectID, keyID, _, err := leaseIDs(req.Secret)
		if err != nil {
			return nil, err
		}
		expiry := now.Add(min(ttl+keyGrace-renewSlack, maxKeyLife))
		err = b.useClient(ctx, req.Storage, func(c *client) error {
			return c.setKeyExpiry(ctx, projectID, keyID, expiry)
		})
		if err != nil {
			return answerError("moving the key's expiry", err)
		}
	}
	req.Secret.TTL = r.TTL
	req.Secret.MaxTTL = r.MaxTTL
	b.Logger().Debug("lease renewed", "role", roleName, "api_key_id", req.Secret.InternalData["api_key_id"])
	return &logical.Response{Secret: req.Secret}, nil
}

// leaseIDs reads the ids that a lease holds.
func leaseIDs(secret *logical.Secret) (projectID, keyID, accountID string, err error) {
	projectID, _ = secret.InternalData["project_id"].(string)
	keyID, _ = secret.InternalData["api_key_id"].(string)
	accountID, _ = secret.InternalData["service_account_id"].(string)
	if !validID(projectID) || !validID(accountID) {
		err = errors.New("the lease lacks a valid project_id or service_account_id")
	}
	return projectID, keyID, accountID, err
}

// credRevoke deletes the service account of a lease and with it the key. An account that
// is gone already is revoked. Vault tries again after an error.
func (b *backend) credRevoke(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
	projectID, keyID, accountID, err := leaseIDs(req.Secret)
	if err != nil {
		return nil, err
	}
	err = b.useClient(ctx, req.Storage, func(c *client) error {
		return c.deleteServiceAccount(ctx, projectID, accountID)
	})
	if err != nil {
		b.Logger().Warn("revocation failed", "project_id", projectID, "service_account_id", accountID, "error", err)
		return nil, fmt.Errorf("deleting service account %q: %w", accountID, err)
	}
	b.Logger().Debug("lease revoked", "project_id", projectID, "service_account_id", accountID, "api_key_id", keyID)
	return nil, nil
}

const backendHelp = `
The OpenAI secrets engine makes OpenAI service accounts with API keys on demand and
deletes them when their lease ends. Give it an Admin API key with "config", describe
what to hand out with "roles/<name>", and read keys from "creds/<name>". It rotates
its own Admin API key with "config/rotate" or on a schedule.
`

const (
	configHelpSynopsis    = "Configure the Admin API key of the OpenAI organization and how it is rotated."
	configHelpDescription = `
The write is proved against OpenAI before anything is stored, unless
verify_connection=false. A later write changes the fields that it names and keeps the
others. admin_api_key_id must be the id of that very key, since a rotation deletes the
key with this id; when it is absent, the key is looked for among the organization's.

rotation_period (seconds or a duration) or rotation_schedule (cron, UTC; with
rotation_window of at least an hour if wanted) rotates the key by itself;
disable_automated_rotation=true suspends that. rotation_manager shows who does it:
Vault's rotation manager where there is one (Enterprise), else the plugin, which looks
once a minute. The key is never returned.
`
	rotateHelpSynopsis    = "Replace the Admin API key by a new one and delete the old one."
	rotateHelpDescription = `
Makes a new Admin API key at OpenAI, proves it, stores it, and deletes the old one when
the calls that use it have ended. After a failure config holds a key that works. An old
key that could not be deleted is named in a warning and in config's pending_deletion,
and is deleted later.
`
	roleHelpSynopsis    = "Manage what creds/<name> hands out."
	roleHelpDescription = `
A role names the OpenAI project (project_id), how its service accounts are called
(service_account_name_template) and how long their leases run (ttl, max_ttl). The
template can use .RoleName, .RandomSuffix, .ProjectID, .ProjectName and .DisplayName,
and Vault's functions random, uuid, truncate, truncate_sha256, lowercase, uppercase,
replace, sha256, base64, unix_time, unix_time_millis and timestamp. Other characters
than letters, digits, - and _ become -; names have at most 64 characters.
With enforce_key_expiry (the default) OpenAI itself expires a key about a minute after
its lease, even if Vault is lost.
`
	credsHelpSynopsis    = "Make a service account with an API key under a new lease."
	credsHelpDescription = `
Each read makes a new service account with one API key. The lease can be renewed up to
the role's max_ttl; when it ends or is revoked the account is deleted, and its key with it.
`
)
