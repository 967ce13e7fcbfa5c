// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
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
	secretType = "openai_api_key" // #nosec G101 -- a name, not a credential

	defaultEndpoint     = "https://api.openai.com/v1"
	defaultTTL          = time.Hour
	defaultMaxTTL       = 24 * time.Hour
	maxKeyLife          = 365 * 24 * time.Hour // OpenAI's limit of expires_in_seconds
	defaultNameTemplate = "vault-{{.RoleName}}-{{.RandomSuffix}}"
	defaultDescription  = "Service account created by Vault"
	maxNameLength       = 64  // characters of a service account's name
	maxTemplateLength   = 256 // bytes

	// keyGrace is how long OpenAI lets a key live after its lease's end, for clocks that
	// differ and answers that are slow. A renewal asks for renewSlack less, which is as long
	// as its answer can take, so that the key never reaches past issue time + max_ttl + keyGrace.
	keyGrace   = time.Minute
	renewSlack = attemptTimeout
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
	// AdminKeyTTL is the life of the keys that rotation makes; 0: without end.
	AdminKeyTTL time.Duration `json:"admin_key_ttl,omitempty"`
	// AdminKeyExpires is when OpenAI expires the present key; zero: never, or not known.
	AdminKeyExpires time.Time `json:"admin_key_expires,omitzero"`
}

// getJSON reads a storage entry into out; false when there is none.
func getJSON(ctx context.Context, s logical.Storage, key string, out any) (bool, error) {
	entry, err := s.Get(ctx, key)
	if err == nil && entry != nil {
		err = entry.DecodeJSON(out)
	}
	if err != nil {
		return false, fmt.Errorf("reading %s: %w", key, err)
	}
	return entry != nil, nil
}

func putJSON(ctx context.Context, s logical.Storage, key string, value any) error {
	entry, err := logical.StorageEntryJSON(key, value)
	if err == nil {
		err = s.Put(ctx, entry)
	}
	if err != nil {
		return fmt.Errorf("storing %s: %w", key, err)
	}
	return nil
}

// getConfig reads the config; nil when there is none.
func getConfig(ctx context.Context, s logical.Storage) (*config, error) {
	cfg := &config{}
	found, err := getJSON(ctx, s, configPath, cfg)
	if err != nil || !found {
		return nil, err
	}
	cfg.APIEndpoint = strings.TrimRight(cfg.APIEndpoint, "/") // as the older plugin may have it
	return cfg, nil
}

// toResponseData is what reading config shows: everything but the key.
func (cfg *config) toResponseData() map[string]any {
	data := map[string]any{
		"admin_api_key_id":     cfg.AdminAPIKeyID,
		"organization_id":      cfg.OrganizationID,
		"api_endpoint":         cfg.APIEndpoint,
		"admin_key_ttl":        int64(cfg.AdminKeyTTL.Seconds()),
		"admin_key_expires_at": formatTime(cfg.AdminKeyExpires),
		"last_rotated":         formatTime(cfg.LastRotatedTime),
		"next_rotation":        formatTime(cfg.nextRotation(time.Now())),
		"rotation_manager":     cmp.Or(cfg.RotationManager, managerNone),
		"pending_deletion":     append([]string{}, cfg.PendingDeletion...),
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

// unixTime is a time as OpenAI gives it: seconds, 0 for none.
func unixTime(seconds int64) time.Time {
	if seconds <= 0 {
		return time.Time{}
	}
	return time.Unix(seconds, 0)
}

// The parts of the table of paths. A field is a request's or an answer's.

type fieldMap = map[string]*framework.FieldSchema

func field(t framework.FieldType, description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: t, Description: description}
}

// required is a field that every request must have had once, or that every answer has.
func required(t framework.FieldType, description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: t, Description: description, Required: true}
}

func defaulted(t framework.FieldType, value any, description string) *framework.FieldSchema {
	return &framework.FieldSchema{Type: t, Description: description, Default: value}
}

// sensitive marks a field whose value is a secret.
func sensitive(f *framework.FieldSchema) *framework.FieldSchema {
	f.DisplayAttrs = &framework.DisplayAttributes{Sensitive: true}
	return f
}

// operation is handled by the node that gets it; verb and suffix name it in OpenAPI. Its
// answer has the fields, or no content where there are none.
func operation(handler framework.OperationFunc, verb, suffix, summary string, fields fieldMap) *framework.PathOperation {
	status := http.StatusOK
	if fields == nil {
		status = http.StatusNoContent
	}
	return &framework.PathOperation{
		Callback: handler, Summary: summary,
		DisplayAttrs: &framework.DisplayAttributes{OperationVerb: verb, OperationSuffix: suffix},
		Responses:    map[int][]framework.Response{status: {{Description: http.StatusText(status), Fields: fields}}},
	}
}

// forwarded makes a performance standby or secondary pass the operation on to where
// storage can be written.
func forwarded(op *framework.PathOperation) *framework.PathOperation {
	op.ForwardPerformanceStandby, op.ForwardPerformanceSecondary = true, true
	return op
}

func pathConfig(b *backend) []*framework.Path {
	fields := fieldMap{
		"admin_api_key":     sensitive(required(framework.TypeString, "Admin API key of the OpenAI organization. Required. Never returned.")),
		"admin_api_key_id":  field(framework.TypeString, "ID of that very key (key_…), which a rotation deletes. Found at OpenAI when absent."),
		"organization_id":   required(framework.TypeString, "ID of the OpenAI organization (org-…). Required."),
		"api_endpoint":      defaulted(framework.TypeString, defaultEndpoint, "Base URL of the OpenAI API: https, or http to a loopback address. Default "+defaultEndpoint+"."),
		"admin_key_ttl":     field(framework.TypeDurationSecond, "Life of the admin keys that rotation makes: at least twice the time between scheduled rotations, at most 365 days. Default 0: without end."),
		"verify_connection": defaulted(framework.TypeBool, true, "Whether this write proves the key against OpenAI before it is stored: true or false. Not stored itself. Default true."),
	}
	addRotationFields(fields)
	shown := fieldMap{
		"admin_api_key_id":     required(framework.TypeString, "ID of the admin API key."),
		"organization_id":      required(framework.TypeString, "ID of the organization."),
		"api_endpoint":         required(framework.TypeString, "Base URL of the OpenAI API."),
		"admin_key_ttl":        required(framework.TypeDurationSecond, "Life of the admin keys that rotation makes, in seconds; 0: without end."),
		"admin_key_expires_at": required(framework.TypeString, "When OpenAI expires the present key (RFC 3339, UTC); empty: never, or not known."),
		"last_rotated":         required(framework.TypeString, "When the key was written or rotated (RFC 3339, UTC)."),
		"next_rotation":        required(framework.TypeString, "When the key is due next (RFC 3339, UTC); empty: never."),
		"rotation_manager":     required(framework.TypeString, "Who rotates on schedule: vault, plugin or none."),
		"pending_deletion":     required(framework.TypeCommaStringSlice, "IDs of replaced admin keys still to be deleted at OpenAI."),
	}
	addRotationFields(shown)
	rotated := fieldMap{
		"admin_api_key_id": required(framework.TypeString, "ID of the new admin API key."),
		"rotated_time":     required(framework.TypeString, "When it was put to use (RFC 3339, UTC)."),
	}
	write := forwarded(operation(b.configWrite, "configure", "", "Configure the admin API key and how it is rotated.", nil))
	return []*framework.Path{{
		Pattern:      configPath,
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai"},
		Fields:       fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.ReadOperation:   operation(b.configRead, "read", "configuration", "Read the configuration, without the admin API key.", shown),
			logical.DeleteOperation: forwarded(operation(b.configDelete, "delete", "configuration", "Delete the configuration. Leases are not revoked at OpenAI without one.", nil)),
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (bool, error) {
			cfg, err := getConfig(ctx, req.Storage)
			return cfg != nil, err
		},
		HelpSynopsis: "Configure the Admin API key of the OpenAI organization and how it is rotated.", HelpDescription: configHelpDescription,
	}, {
		Pattern:      configPath + "/rotate",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.UpdateOperation: forwarded(operation(b.configRotate, "rotate", "admin-api-key", "Replace the admin API key by a new one and delete the old one.", rotated)),
		},
		HelpSynopsis: "Replace the Admin API key by a new one and delete the old one.", HelpDescription: rotateHelpDescription,
	}}
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
		checkCtx, cancel := context.WithTimeout(ctx, checkTimeout)
		defer cancel()
		key, err := b.newClient(&cfg).ownKey(checkCtx)
		if err != nil {
			return logical.ErrorResponse(verificationFailed(err)), nil
		}
		cfg.AdminAPIKeyID, cfg.AdminKeyExpires = key.ID, unixTime(key.ExpiresAt)
	} else if cfg.AdminAPIKeyID == "" {
		return logical.ErrorResponse("admin_api_key_id is required: with verify_connection=false it is not looked up at OpenAI"), nil
	}

	resp := &logical.Response{}
	if cfg.AdminAPIKey != was.AdminAPIKey {
		cfg.LastRotatedTime = time.Now()
	}
	if was.OrganizationID != "" && cfg.OrganizationID != was.OrganizationID {
		resp.AddWarning("organization_id has changed: revoking leases of the former organization fails until config has it again")
		warnOfPending(resp, cfg.PendingDeletion)
		cfg.PendingDeletion = nil
	}
	if !cfg.AdminKeyExpires.IsZero() && cfg.nextRotation(time.Now()).IsZero() {
		resp.AddWarning("the admin API key expires at " + formatTime(cfg.AdminKeyExpires) + " and no rotation is scheduled: rotate or replace it before")
	}
	if cfg.RotationManager, err = b.registerRotation(ctx, req.MountPoint, was, &cfg); err != nil {
		return nil, err
	}
	if cfg.RotationManager == managerPlugin && cfg.RotationPolicy != "" {
		resp.AddWarning("rotation_policy has no effect: this Vault has no rotation manager, so the plugin rotates by itself")
	}
	if err := putJSON(ctx, req.Storage, configPath, &cfg); err != nil {
		return nil, err
	}
	b.setClient(nil)
	b.forgetRoles()
	b.retryRotation, b.rotationFailures = time.Time{}, 0
	b.report(ctx, req, configWritten, nil, "admin_api_key_id", cfg.AdminAPIKeyID, "organization_id", cfg.OrganizationID, "rotation_manager", cfg.RotationManager)
	return warningsOnly(resp), nil
}

// warningsOnly returns resp if it warns of anything, so that a plain success has no body.
func warningsOnly(resp *logical.Response) *logical.Response {
	if len(resp.Warnings) == 0 {
		return nil
	}
	return resp
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

// setText sets a field that the request names, and setSeconds likewise.
func setText(d *framework.FieldData, name string, field *string) {
	if v, ok := d.GetOk(name); ok {
		*field = v.(string)
	}
}

func setSeconds(d *framework.FieldData, name string, field *time.Duration) {
	if v, ok := d.GetOk(name); ok {
		*field = time.Duration(v.(int)) * time.Second
	}
}

// update sets the fields that d names and checks the whole. Its error is the caller's.
func (cfg *config) update(d *framework.FieldData) error {
	v, keyGiven := d.GetOk("admin_api_key")
	if keyGiven {
		key := strings.TrimSpace(v.(string)) // a line break comes along from stdin
		if key != cfg.AdminAPIKey {
			cfg.AdminAPIKeyID, cfg.AdminKeyExpires = "", time.Time{} // of the former key
		}
		cfg.AdminAPIKey = key
	}
	setText(d, "admin_api_key_id", &cfg.AdminAPIKeyID)
	setText(d, "organization_id", &cfg.OrganizationID)
	setSeconds(d, "admin_key_ttl", &cfg.AdminKeyTTL)
	if v, ok := d.GetOk("api_endpoint"); ok || cfg.APIEndpoint == "" {
		if v == nil || v.(string) == "" {
			v = defaultEndpoint
		}
		endpoint, err := parseEndpoint(v.(string))
		if err != nil {
			return err
		}
		// Who may write config but does not know the key must not get it sent to himself.
		if cfg.APIEndpoint != "" && cfg.APIEndpoint != endpoint && !keyGiven {
			return errors.New("api_endpoint can only be changed together with admin_api_key, which would be sent there")
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
	case !validID(cfg.OrganizationID):
		return errors.New("organization_id is required: 1 to 128 letters, digits, - or _")
	}
	return cfg.updateRotation(d)
}

var adminKeyPattern = regexp.MustCompile(`^[!-~]{8,512}$`)

// hostPattern is a name or an address, an IPv6 address in brackets, perhaps with a port.
var hostPattern = regexp.MustCompile(`^([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?$`)

// parseEndpoint checks api_endpoint and trims its trailing slashes. Its error does not
// quote the value, which may hold a password.
func parseEndpoint(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || !hostPattern.MatchString(u.Host) || u.Opaque != "" {
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
	case u.User != nil || strings.ContainsAny(s, "?#") || slices.Contains(strings.Split(u.Path, "/"), ".."):
		return "", errors.New("api_endpoint must not have user information, a query, a fragment or .. in its path")
	case u.Scheme != "https" && (u.Scheme != "http" || !loopback):
		return "", errors.New("api_endpoint must be https: plain http is only for a loopback address")
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
	b.report(ctx, req, configDeleted, nil, "admin_api_key_id", cfg.AdminAPIKeyID)
	resp := &logical.Response{}
	resp.AddWarning("leases are not revoked at OpenAI until config is written again; the admin key itself still exists there")
	warnOfPending(resp, cfg.PendingDeletion)
	return resp, nil
}

// warnOfPending names replaced admin keys that config forgets.
func warnOfPending(resp *logical.Response, ids []string) {
	if len(ids) > 0 {
		resp.AddWarning("these replaced admin keys are still at OpenAI, delete them there: " + strings.Join(ids, ", "))
	}
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
	// Scopes restrict the keys; none: they can do what their account can.
	Scopes []string `json:"scopes,omitempty"`
	// ServiceAccountRole is of an account that is made for a scoped key; empty: member.
	ServiceAccountRole string `json:"service_account_role,omitempty"`
	// ServiceAccountID is the account that keys are made on; empty: each has its own. Its
	// name is what OpenAI said when the role was written.
	ServiceAccountID   string `json:"service_account_id,omitempty"`
	ServiceAccountName string `json:"service_account_name,omitempty"`
}

// getRole reads a role; nil when there is none.
func getRole(ctx context.Context, s logical.Storage, name string) (*role, error) {
	r := newRole()
	found, err := getJSON(ctx, s, rolePrefix+name, r)
	if err != nil || !found {
		return nil, err
	}
	if r.MaxTTL <= 0 {
		r.MaxTTL = defaultMaxTTL
	}
	if r.TTL <= 0 {
		r.TTL = min(defaultTTL, r.MaxTTL)
	}
	return r, nil
}

// roleCache holds the roles that credentials were read from lately. A change, of config too, throws
// all of it away, so that what was read from storage before the change is not found after it.
type roleCache struct {
	sync.Map // of *cachedRole, by name
	made     time.Time
}

// cachedRole is what reads of a role share.
type cachedRole struct {
	*role
	name        string
	mountMaxTTL time.Duration // 0: none

	waiting  atomic.Int32 // reads that want a name
	mu       sync.Mutex   // held while one gets it
	reserved *reservation // the latest one; nil at first
}

// roleCacheTime is how long a roleCache is used, and so how late a change of the mount's
// maximum TTL is seen. A change of a role is seen at once. With requestTimeout and undoTimeout
// it is less than walMinAge.
const roleCacheTime = 10 * time.Second

func (b *backend) forgetRoles() { b.roles.Store(&roleCache{made: time.Now()}) }

// cachedRole returns a role to read credentials from; nil when there is none.
func (b *backend) cachedRole(ctx context.Context, s logical.Storage, name string) (*cachedRole, error) {
	cache := b.roles.Load()
	if time.Since(cache.made) > roleCacheTime {
		cache = &roleCache{made: time.Now()}
		b.roles.Store(cache)
	}
	if r, ok := cache.Load(name); ok {
		return r.(*cachedRole), nil
	}
	r, err := getRole(ctx, s, name)
	if err != nil || r == nil {
		return nil, err
	}
	found := &cachedRole{role: r, name: name, mountMaxTTL: b.System().MaxLeaseTTL()}
	if found.mountMaxTTL == 0 {
		return found, nil // it could not be read, as far as we know
	}
	cached, _ := cache.LoadOrStore(name, found)
	return cached.(*cachedRole), nil
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
		"scopes":                        append([]string{}, r.Scopes...),
		"service_account_role":          r.ServiceAccountRole,
		"service_account_id":            r.ServiceAccountID,
	}
}

func pathRoles(b *backend) []*framework.Path {
	settings := fieldMap{
		"project_id":                    required(framework.TypeString, "ID of the OpenAI project that the service accounts are in (proj_…). Required."),
		"service_account_name_template": defaulted(framework.TypeString, defaultNameTemplate, "Template of the name of a service account, or of a key where service_account_id is set. Must give another name each time. Default "+defaultNameTemplate+"."),
		"service_account_description":   defaulted(framework.TypeString, defaultDescription, "Description, kept with the role only: OpenAI has no such field. Default \""+defaultDescription+"\"."),
		"ttl":                           defaulted(framework.TypeDurationSecond, int(defaultTTL.Seconds()), "TTL of a lease when its reader asks for none. More than 0, at most max_ttl. Default 1h."),
		"max_ttl":                       defaulted(framework.TypeDurationSecond, int(defaultMaxTTL.Seconds()), "Longest TTL of a lease, renewals included. More than 0, at most 365 days. Default 24h."),
		"enforce_key_expiry":            defaulted(framework.TypeBool, true, "Whether OpenAI itself expires a key, about a minute after its lease's end: true or false. Default true."),
		"scopes":                        field(framework.TypeCommaStringSlice, "Scopes that the keys are restricted to, like api.responses.write. Default: none, the keys can do what their service account can."),
		"service_account_role":          field(framework.TypeString, "Role of a service account that is made for a key with scopes: member or owner. Default member."),
		"service_account_id":            field(framework.TypeString, "ID of an existing service account that keys are made on (svc_acct_…). Default: each key gets an account of its own."),
	}
	fields := maps.Clone(settings)
	fields["name"] = required(framework.TypeString, "Name of the role.")
	names := fieldMap{"keys": field(framework.TypeStringSlice, "Names of the roles.")}
	write := forwarded(operation(b.roleWrite, "write", "", "Create or update a role.", nil))
	return []*framework.Path{{
		Pattern:      rolePrefix + "?$",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "roles"},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ListOperation: operation(b.roleList, "list", "", "List the roles.", names),
		},
		HelpSynopsis: "List the roles.", HelpDescription: "The names of the roles, in alphabetical order.",
	}, {
		Pattern:      rolePrefix + framework.GenericNameRegex("name"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "role"},
		Fields:       fields,
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.CreateOperation: write,
			logical.UpdateOperation: write,
			logical.ReadOperation:   operation(b.roleRead, "read", "", "Read a role.", settings),
			logical.DeleteOperation: forwarded(operation(b.roleDelete, "delete", "", "Delete a role. Its leases live on, but can't be renewed.", nil)),
		},
		ExistenceCheck: func(ctx context.Context, req *logical.Request, d *framework.FieldData) (bool, error) {
			r, err := getRole(ctx, req.Storage, d.Get("name").(string))
			return r != nil, err
		},
		HelpSynopsis: "Manage what creds/<name> hands out.", HelpDescription: roleHelpDescription,
	}}
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
	defer b.forgetRoles()
	name := d.Get("name").(string)
	if err := req.Storage.Delete(ctx, rolePrefix+name); err != nil {
		return nil, fmt.Errorf("deleting role %q: %w", name, err)
	}
	b.report(ctx, req, roleDeleted, nil, "name", name)
	return nil, nil
}

// roleWrite stores what the request names over what is there. Nothing is stored unless
// all of it is right, as OpenAI sees it too; only an OpenAI that can't be asked is let pass.
func (b *backend) roleWrite(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	defer b.forgetRoles()
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
	field, value := "project_id", r.ProjectID
	checkCtx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	err = b.useClient(checkCtx, req.Storage, func(c *client) error {
		p, err := c.getProject(checkCtx, r.ProjectID)
		if err != nil {
			return err
		}
		if p.Status == "archived" {
			return &apiError{Status: http.StatusBadRequest, Message: "the project is archived"}
		}
		sample.ProjectName = p.Name
		if r.ServiceAccountID != "" {
			field, value = "service_account_id", r.ServiceAccountID
			account, err := c.getServiceAccount(checkCtx, r.ProjectID, r.ServiceAccountID)
			if err != nil {
				return err
			}
			r.ServiceAccountName = account.Name
			if account.Role == "none" {
				resp.AddWarning("service_account_id has no role in the project, so that its keys can do nothing")
			}
		}
		return nil
	})
	switch {
	case errors.Is(err, errNotConfigured):
		return logical.ErrorResponse(err.Error()), nil
	case isRefused(err) && !isStatus(err, http.StatusTooManyRequests):
		return logical.ErrorResponse("%s %q was refused: %s", field, value, err), nil
	case err != nil:
		resp.AddWarning(fmt.Sprintf("%s %q is stored unchecked: %s", field, value, err))
	}
	if err := checkNameTemplate(r.ServiceAccountNameTemplate, sample); err != nil {
		return logical.ErrorResponse("service_account_name_template %s", err), nil
	}
	if limit := b.System().MaxLeaseTTL(); limit > 0 && r.MaxTTL > limit {
		resp.AddWarning(fmt.Sprintf("max_ttl %s is more than the mount's maximum of %s, which bounds the leases", r.MaxTTL, limit))
	}

	if err := putJSON(ctx, req.Storage, rolePrefix+name, r); err != nil {
		return nil, err
	}
	b.report(ctx, req, roleWritten, nil, "name", name, "project_id", r.ProjectID)
	return warningsOnly(resp), nil
}

// update sets the fields that d names and checks what needs no call. Its error is the
// caller's.
func (r *role) update(d *framework.FieldData) error {
	setText(d, "project_id", &r.ProjectID)
	setText(d, "service_account_name_template", &r.ServiceAccountNameTemplate)
	setText(d, "service_account_description", &r.ServiceAccountDescription)
	setText(d, "service_account_role", &r.ServiceAccountRole)
	was := r.ServiceAccountID
	setText(d, "service_account_id", &r.ServiceAccountID)
	if r.ServiceAccountID != was {
		r.ServiceAccountName = ""
	}
	setSeconds(d, "ttl", &r.TTL)
	setSeconds(d, "max_ttl", &r.MaxTTL)
	if _, named := d.Raw["ttl"]; !named && r.TTL == 0 {
		r.TTL = min(defaultTTL, r.MaxTTL) // a new role
	}
	if v, ok := d.GetOk("enforce_key_expiry"); ok {
		r.UnexpiringKeys = !v.(bool)
	}
	if v, ok := d.GetOk("scopes"); ok {
		r.Scopes = slices.Compact(slices.Sorted(slices.Values(v.([]string))))
	}
	invalidScope := func(s string) bool { return !scopePattern.MatchString(s) }
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
	case len(r.Scopes) > 100 || slices.ContainsFunc(r.Scopes, invalidScope):
		return errors.New("scopes must be at most 100 names like api.responses.write")
	case r.ServiceAccountRole != "" && r.ServiceAccountRole != "member" && r.ServiceAccountRole != "owner":
		return errors.New("service_account_role must be member or owner")
	case r.ServiceAccountID != "" && !validID(r.ServiceAccountID):
		return errors.New("service_account_id must be 1 to 128 letters, digits, - or _")
	case r.ServiceAccountID != "" && r.ServiceAccountRole != "":
		return errors.New("service_account_role and service_account_id exclude each other: an existing account keeps its role")
	case r.ServiceAccountRole != "" && len(r.Scopes) == 0:
		return errors.New("service_account_role needs scopes: OpenAI makes an account with an unrestricted key a member")
	}
	return nil
}

var scopePattern = regexp.MustCompile(`^[a-z][A-Za-z0-9._:-]{0,127}$`)

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
func renderName(raw string, data nameData) (string, error) {
	// One role must not be able to exhaust the process that serves all mounts: no loops, short
	// values, no function that multiplies what it is given by much.
	if len(raw) > maxTemplateLength || loopPattern.MatchString(raw) {
		return "", fmt.Errorf("must be at most %d bytes and have no range, define, template or block", maxTemplateLength)
	}
	for _, text := range []*string{&data.RoleName, &data.ProjectName, &data.DisplayName} {
		*text = (*text)[:min(len(*text), maxTemplateLength)]
	}
	options := []template.Opt{
		template.Template(raw),
		template.Function("random", randomText),
		template.Function("replace", boundedReplace),
	}
	for _, name := range []string{"html", "js", "urlquery", "print", "printf", "println"} {
		options = append(options, template.Function(name, func(...any) (string, error) {
			return "", fmt.Errorf("the function %s is not available", name)
		}))
	}
	t, err := template.NewTemplate(options...)
	name := ""
	if err == nil {
		name, err = t.Generate(data)
	}
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
	if find == "" || len(s)*(1+len(replacement)) > 1<<16 {
		return "", errors.New("replace takes a text to find, and gives at most 64 KiB")
	}
	return strings.ReplaceAll(s, find, replacement), nil
}

// checkNameTemplate refuses a template whose names are empty, too long, or the same twice.
func checkNameTemplate(raw string, data nameData) error {
	var names [2]string
	for i, suffix := range []string{"0123456789", "abcdefghij"} {
		data.RandomSuffix = suffix
		name, err := renderName(raw, data)
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
		return errors.New("must give another name each time: use {{.RandomSuffix}}")
	}
	return nil
}

// credentialName makes the name of a new service account or key. It is unique, since
// rollback finds what is lost by its name: what lacks the whole suffix gets it.
func (b *backend) credentialName(ctx context.Context, req *logical.Request, r *cachedRole) (string, error) {
	suffix, err := randomText(10)
	if err != nil {
		return "", err
	}
	data := nameData{RoleName: r.name, RandomSuffix: suffix, ProjectID: r.ProjectID, DisplayName: req.DisplayName}
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
	if cut := name[:min(len(name), maxNameLength)]; len(name) > len(cut) || !strings.Contains(name, suffix) {
		name = strings.Trim(cut[:min(len(cut), maxNameLength-1-len(suffix))]+"-"+suffix, "-")
	}
	return name, nil
}

func pathCreds(b *backend) []*framework.Path {
	ttl := field(framework.TypeDurationSecond, "TTL of the lease. More than 0, at most the role's max_ttl. Default: the role's ttl.")
	ttl.Query = true
	// Leases belong to the cluster that issues them: only standbys pass this on.
	read := operation(b.credsRead, "generate", "", "Make an API key under a new lease.", secretFields())
	read.ForwardPerformanceStandby = true
	return []*framework.Path{{
		Pattern:      "creds/" + framework.GenericNameRegex("name"),
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: "credentials"},
		Fields:       fieldMap{"name": required(framework.TypeString, "Name of the role."), "ttl": ttl},
		Operations:   map[logical.Operation]framework.OperationHandler{logical.ReadOperation: read},
		HelpSynopsis: "Make an API key under a new lease.", HelpDescription: credsHelpDescription,
	}}
}

// secretFields are what a caller of creds gets.
func secretFields() fieldMap {
	return fieldMap{
		"api_key":            sensitive(required(framework.TypeString, "The OpenAI API key.")),
		"api_key_id":         required(framework.TypeString, "ID of the API key."),
		"service_account":    required(framework.TypeString, "Name of the service account."),
		"service_account_id": required(framework.TypeString, "ID of the service account."),
		"project_id":         required(framework.TypeString, "ID of the project."),
		"organization_id":    required(framework.TypeString, "ID of the organization."),
		"scopes":             required(framework.TypeStringSlice, "What the key is restricted to; empty: all that its account can do."),
		"expires_at":         required(framework.TypeString, "When OpenAI itself expires the key unless the lease is renewed (RFC 3339, UTC); empty: never."),
	}
}

// lease is the internal data of a lease. The older plugin wrote the first three.
type lease struct {
	APIKeyID         string `json:"api_key_id"`
	ServiceAccountID string `json:"service_account_id"`
	ProjectID        string `json:"project_id"`
	OrganizationID   string `json:"organization_id,omitempty"`
	Role             string `json:"role,omitempty"`
	KeyExpires       bool   `json:"key_expires,omitempty"` // OpenAI expires the key, so that a renewal must move that
	KeyOnly          bool   `json:"key_only,omitempty"`    // revocation leaves the account
	WALID            string `json:"wal_id,omitempty"`      // of its issuedCredential, while there is one: the name
}

// leaseOf reads what a lease holds.
func leaseOf(secret *logical.Secret) (*lease, error) {
	l := &lease{}
	if err := decode(secret.InternalData, l); err != nil {
		return nil, fmt.Errorf("reading the lease: %w", err)
	}
	if !validID(l.ProjectID) || !validID(l.key()) {
		return nil, errors.New("the lease lacks the ids of what it stands for")
	}
	return l, nil
}

// reportCredential counts and reports what became of a lease; err: it failed.
func (b *backend) reportCredential(ctx context.Context, req *logical.Request, c change, operation string, l *lease, start time.Time, err error) {
	b.metrics.add(metricCredentials, 1, "role", l.Role, "operation", operation, "result", result(err))
	b.report(ctx, req, c, err, "name", l.Role, "project_id", l.ProjectID, "service_account_id", l.ServiceAccountID,
		"api_key_id", l.APIKeyID, "duration", time.Since(start).Round(time.Millisecond).String())
}

func secretAPIKey(b *backend) *framework.Secret {
	return &framework.Secret{
		Type:   secretType,
		Fields: secretFields(),
		Renew:  b.credRenew,
		Revoke: b.credRevoke,
	}
}

// credsRead makes a key. Its name is in the write-ahead log first, since a create whose answer
// is lost can only be found again by name. An entry that spares the key until its lease's end
// comes last, and without that nothing is handed out.
func (b *backend) credsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (resp *logical.Response, err error) {
	roleName := d.Get("name").(string)
	r, err := b.cachedRole(ctx, req.Storage, roleName)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("role %q does not exist", roleName), nil
	}
	start := time.Now()
	l := &lease{ProjectID: r.ProjectID, ServiceAccountID: r.ServiceAccountID, Role: roleName, KeyOnly: r.ServiceAccountID != ""}
	defer func() { b.reportCredential(ctx, req, credIssued, "issue", l, start, failure(resp, err)) }()

	ttl, warning, err := r.leaseTTL(d)
	if err != nil {
		return logical.ErrorResponse(err.Error()), nil
	}
	reserved, name, err := b.reserve(ctx, req, r)
	if err != nil {
		return answerError("preparing the credential", err)
	}
	lost := false // something may be left under this name
	defer func() {
		// Not at once: the answer waits for nobody, and Vault stores the lease first.
		time.AfterFunc(time.Second, func() {
			b.release(req.Storage, reserved, func() {
				if lost {
					reserved.lost = append(reserved.lost, name)
				}
			})
		})
	}()
	var expiresIn time.Duration
	if !r.UnexpiringKeys {
		expiresIn = min(ttl+keyGrace, maxKeyLife)
	}
	l.OrganizationID, l.KeyExpires = reserved.OrganizationID, expiresIn > 0
	g, err := b.create(ctx, req.Storage, r.role, name, expiresIn, l)
	if err == nil {
		// Vault drops the answer to a request that has ended, and then knows of no lease.
		l.WALID = name
		err = errors.Join(putIssued(ctx, req.Storage, l, time.Now().Add(ttl+keyGrace)), ctx.Err())
	}
	if err != nil {
		lost = !b.undo(ctx, req.Storage, l, notDone(err))
		return answerError("creating "+g.step, err)
	}

	internal := map[string]any{}
	if err := decode(l, &internal); err != nil {
		return nil, err
	}
	resp = b.Secret(secretType).Response(map[string]any{
		"api_key":            g.key.Value,
		"api_key_id":         g.key.ID,
		"service_account":    g.account,
		"service_account_id": l.ServiceAccountID,
		"project_id":         r.ProjectID,
		"organization_id":    l.OrganizationID,
		"scopes":             append([]string{}, r.Scopes...),
		"expires_at":         formatTime(unixTime(g.key.ExpiresAt)),
	}, internal)
	resp.Secret.TTL, resp.Secret.MaxTTL = ttl, r.MaxTTL
	if warning != "" {
		resp.AddWarning(warning)
	}
	if expiresIn > 0 && g.key.ExpiresAt == 0 {
		resp.AddWarning("OpenAI did not take over the key's expiry: only revocation ends this key")
	}
	return resp, nil
}

// undo deletes what a failed create has made, as far as l tells, and returns whether nothing is
// left; nothingMade: of what l does not tell there is nothing either. It also works when ctx has
// ended: else rollback would have to look through the project's accounts.
func (b *backend) undo(ctx context.Context, s logical.Storage, l *lease, nothingMade bool) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if l.key() == "" {
		return nothingMade
	}
	if l.WALID != "" { // or rollback would spare it
		walCtx, cancel := context.WithTimeout(ctx, undoTimeout/2)
		defer cancel()
		_ = framework.DeleteWAL(walCtx, s, l.WALID)
	}
	return b.deleteCredential(ctx, s, l) == nil
}

// leaseTTL returns the TTL of a new lease, and a warning where it is not what was asked for.
// Its error is the caller's.
func (r *cachedRole) leaseTTL(d *framework.FieldData) (ttl time.Duration, warning string, err error) {
	ttl = r.TTL
	setSeconds(d, "ttl", &ttl)
	if ttl <= 0 || ttl > r.MaxTTL {
		return 0, "", fmt.Errorf("ttl must be more than 0 and at most the role's max_ttl of %s", r.MaxTTL)
	}
	// Vault would shorten the lease behind our back, and the key would outlive it.
	if limit := r.mountMaxTTL; limit > 0 && ttl > limit {
		return limit, fmt.Sprintf("ttl of %s is more than the mount's maximum and was shortened to %s", ttl, limit), nil
	}
	return ttl, "", nil
}

// grant is what create has made, besides the ids in its lease.
type grant struct {
	account string // its name
	key     *apiKey
	step    string // what was being made, for errors
}

// create makes what the role says: a key on an account of its own (one call), a key on an
// existing account (one call), or an account, its role and its scoped key (three calls),
// so that a key which is not restricted never exists. l gets the ids of what was made.
func (b *backend) create(ctx context.Context, s logical.Storage, r *role, name string, expiresIn time.Duration, l *lease) (g grant, err error) {
	if l.KeyOnly {
		g.account = r.ServiceAccountName
	} else {
		g.step, g.account = "service account", name
		keyless := len(r.Scopes) > 0
		err = b.useClientOf(ctx, s, l.OrganizationID, func(c *client) error {
			account, err := c.createServiceAccount(ctx, r.ProjectID, name, keyless, expiresIn)
			if err != nil {
				return err
			}
			l.ServiceAccountID, g.key = account.ID, account.APIKey
			return nil
		})
		if err == nil && !keyless {
			l.APIKeyID = g.key.ID
		}
		if err != nil || !keyless {
			return g, err
		}
		g.step = "role of service account"
		err = b.useClient(ctx, s, func(c *client) error {
			return c.setServiceAccountRole(ctx, r.ProjectID, l.ServiceAccountID, cmp.Or(r.ServiceAccountRole, "member"))
		})
		if err != nil {
			return g, err
		}
	}
	g.step = "API key"
	err = b.useClientOf(ctx, s, l.OrganizationID, func(c *client) (err error) {
		if g.key, err = c.createAPIKey(ctx, r.ProjectID, l.ServiceAccountID, name, r.Scopes, expiresIn); err == nil {
			l.APIKeyID = g.key.ID
		}
		return err
	})
	return g, err
}

// answerError turns an error of OpenAI into a handler's answer. What OpenAI refused is
// the request's fault, a 400; an admin key that is not accepted is not.
func answerError(doing string, err error) (*logical.Response, error) {
	var e *apiError
	if errors.As(err, &e) && (e.Param == "expires_in_seconds" || strings.Contains(e.Message, "expires_in_seconds")) {
		err = fmt.Errorf("%w; where OpenAI limits a key's life, the role needs enforce_key_expiry=true and a lower ttl and max_ttl", err)
	}
	if errors.Is(err, errNotConfigured) || isRefused(err) && !isStatus(err, http.StatusUnauthorized, http.StatusTooManyRequests) {
		return logical.ErrorResponse("%s: %s", doing, err), nil
	}
	return nil, fmt.Errorf("%s: %w", doing, err)
}

// credRenew extends a lease: the key's expiry at OpenAI first, so that the key never ends
// before its lease.
func (b *backend) credRenew(ctx context.Context, req *logical.Request, _ *framework.FieldData) (resp *logical.Response, err error) {
	start := time.Now()
	l, err := leaseOf(req.Secret)
	if err != nil {
		return nil, err
	}
	defer func() { b.reportCredential(ctx, req, credRenewed, "renew", l, start, failure(resp, err)) }()
	r, err := getRole(ctx, req.Storage, l.Role)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("role %q of this lease does not exist any more", l.Role), nil
	}
	if l.WALID != "" {
		// The lease's end may move, to its last one at most; it never comes earlier.
		entry, err := framework.GetWAL(ctx, req.Storage, l.WALID)
		if err == nil && entry != nil {
			var issued issuedCredential
			err = decode(entry.Data, &issued)
			if end := req.Secret.IssueTime.Add(r.MaxTTL + keyGrace); err == nil && end.After(issued.LeaseEnd) {
				err = putIssued(ctx, req.Storage, l, end)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("moving the lease's end in the write-ahead log: %w", err)
		}
	}
	if l.KeyExpires {
		// What Vault will make of the lease when it gets our answer.
		ttl, _, err := framework.CalculateTTL(b.System(), req.Secret.Increment, r.TTL, 0, r.MaxTTL, 0, req.Secret.IssueTime)
		if err != nil {
			return logical.ErrorResponse("lease can't be renewed: %s", err), nil
		}
		limit := r.MaxTTL
		if mount := b.System().MaxLeaseTTL(); mount > 0 {
			limit = min(limit, mount)
		}
		life := keyLife{
			ttl:   min(ttl+keyGrace-renewSlack, maxKeyLife),
			until: req.Secret.IssueTime.Add(limit + keyGrace - renewSlack),
		}
		err = b.useClient(ctx, req.Storage, func(c *client) error {
			return c.setKeyLife(ctx, l.ProjectID, l.APIKeyID, life)
		})
		if err != nil {
			return answerError("moving the key's expiry", err)
		}
	}
	req.Secret.TTL, req.Secret.MaxTTL = r.TTL, r.MaxTTL
	return &logical.Response{Secret: req.Secret}, nil
}

// credRevoke deletes what a lease stands for at OpenAI; what is gone already is revoked.
// Vault tries again after an error, so what fails is remembered, for sweep, and after
// maxRevokeFailures it is sweep's alone.
func (b *backend) credRevoke(ctx context.Context, req *logical.Request, _ *framework.FieldData) (_ *logical.Response, err error) {
	start := time.Now()
	l, err := leaseOf(req.Secret)
	if err != nil {
		return nil, err
	}
	callCtx, cancel := context.WithTimeout(ctx, revokeTimeout)
	defer cancel()
	b.unsettled.Store(l.WALID, nil) // its entry, if there is one, may be all that remembers the credential
	err = b.deleteCredential(callCtx, req.Storage, l)
	b.reportCredential(ctx, req, credRevoked, "revoke", l, start, err)
	var failures int
	var cleanupErr error
	if err != nil {
		failures, cleanupErr = b.rememberCleanup(ctx, req.Storage, l, 1)
	}
	if cleanupErr == nil {
		if _, kept := b.unsettled.LoadAndDelete(l.WALID); !kept { // settle has passed it by
			_ = framework.DeleteWAL(ctx, req.Storage, l.WALID)
		}
	}
	if err == nil {
		return nil, nil
	}
	if cleanupErr == nil && failures >= maxRevokeFailures {
		b.metrics.add(metricHandedOver, 1)
		b.Logger().Error("revocation keeps failing: Vault is told that it is done, and the plugin tries until OpenAI confirms",
			"project_id", l.ProjectID, "service_account_id", l.ServiceAccountID, "api_key_id", l.APIKeyID, "failures", failures)
		return nil, nil
	}
	return nil, errors.Join(fmt.Errorf("deleting %q: %w", l.key(), err), cleanupErr)
}

func pathMetrics(b *backend) []*framework.Path {
	format := field(framework.TypeString, "prometheus: Prometheus' text format. Default: data, by metric and labels.")
	format.Query = true
	shown := fieldMap{}
	for _, f := range families {
		for _, name := range f.series() {
			shown[metricPrefix+name] = field(framework.TypeFloat, f.help)
			if len(f.labels) > 0 {
				shown[metricPrefix+name].Type = framework.TypeMap // of labels to value
			}
		}
	}
	return []*framework.Path{{
		Pattern:      "metrics",
		DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "openai"},
		Fields:       fieldMap{"format": format},
		Operations: map[logical.Operation]framework.OperationHandler{
			logical.ReadOperation: operation(b.metricsRead, "read", "metrics", "Read what this mount has counted on this node.", shown),
		},
		HelpSynopsis: "Read what this mount has counted on this node.", HelpDescription: metricsHelpDescription,
	}}
}

func (b *backend) metricsRead(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
	all, err := b.gather(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	data := map[string]any{}
	switch d.Get("format").(string) {
	case "prometheus":
		data[logical.HTTPContentType] = "text/plain; version=0.0.4; charset=utf-8"
		data[logical.HTTPRawBody] = prometheus(all)
		data[logical.HTTPStatusCode] = http.StatusOK
	case "":
		for name, values := range all {
			data[metricPrefix+name] = values
			if value, ok := values[""]; ok {
				data[metricPrefix+name] = value
			}
		}
	default:
		return logical.ErrorResponse("format must be prometheus or absent"), nil
	}
	return &logical.Response{Data: data}, nil
}

const backendHelp = `
The OpenAI secrets engine makes OpenAI service accounts with API keys on demand and
deletes them when their lease ends. Give it an Admin API key with "config", describe
what to hand out with "roles/<name>", and read keys from "creds/<name>". It rotates
its own Admin API key with "config/rotate" or on a schedule.
`

// The long help texts of the paths.
const (
	configHelpDescription = `
The write is proved against OpenAI before anything is stored, unless
verify_connection=false. A later write changes the fields that it names and keeps the
others. admin_api_key_id must be the id of that very key, since a rotation deletes the
key with this id; when it is absent, the key is looked for among the organization's.

rotation_period (seconds or a duration) or rotation_schedule (cron, UTC; with
rotation_window of at least an hour if wanted) rotates the key by itself;
disable_automated_rotation=true suspends that. rotation_manager shows who does it:
Vault's rotation manager where there is one (Enterprise), else the plugin, which looks
once a minute. With admin_key_ttl the keys that rotation makes expire at OpenAI, so
that a stolen one ends by itself. The key is never returned.
`
	rotateHelpDescription = `
Makes a new Admin API key at OpenAI, proves it, stores it, and deletes the old one when
the calls that use it have ended. After a failure config holds a key that works. An old
key that could not be deleted is named in a warning and in config's pending_deletion,
and is deleted later.
`
	roleHelpDescription = `
A role names the OpenAI project (project_id), what its keys may do, how they are called
(service_account_name_template) and how long their leases run (ttl, max_ttl). There are
three kinds:

    neither scopes nor service_account_id
        Each key gets a service account of its own, with all that a member of the
        project can do. One call to OpenAI.
    scopes
        Each key gets a service account of its own (service_account_role: member or
        owner), and is restricted to the scopes. Three calls.
    service_account_id, with or without scopes
        Keys are made on this existing account, with its usage, roles and limits.
        Revocation deletes the key and never the account. One call.

The template can use .RoleName, .RandomSuffix, .ProjectID, .ProjectName and
.DisplayName (of the token that asks), and Vault's functions random, uuid, truncate,
truncate_sha256, lowercase, uppercase, replace, sha256, base64, unix_time,
unix_time_millis and timestamp. Other characters than letters, digits, - and _ become
-; names have at most 64 characters. .ProjectName costs a call, once.

With enforce_key_expiry (the default) OpenAI itself expires a key about a minute after
its lease, even if Vault is lost. Set it to false for gateways that do not know
expires_in_seconds.
`
	credsHelpDescription = `
Each read makes a new API key as the role says. The lease can be renewed up to the
role's max_ttl; when it ends or is revoked the key's service account is deleted, and
the key with it. Where the role names an existing account, only the key is deleted.
`
	metricsHelpDescription = `
With format=prometheus the answer is Prometheus' text format, to be scraped through
Vault with a token whose policy may read this path; else it is data, by metric and
labels. Counters begin at 0 when the plugin's process starts, and each Vault node
counts what it did itself.
`
)
