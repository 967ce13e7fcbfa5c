// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/helper/template"
	"github.com/hashicorp/vault/sdk/logical"
)

// secretType and tokenSecretType are what Vault files leases under; the older plugin's is the first.
const (
	secretType      = "openai_api_key"      // #nosec G101 -- a name, not a credential
	tokenSecretType = "openai_access_token" // #nosec G101 -- a name, not a credential

	// apiKeyType and accessToken are the values of credential_type.
	apiKeyType  = "api_key"
	accessToken = "access_token"
)

// toResponseData is what reading config shows: everything but the key.
func (cfg *config) toResponseData() map[string]any {
	data := map[string]any{
		"admin_api_key_id": cfg.AdminAPIKeyID, "organization_id": cfg.OrganizationID, "api_endpoint": cfg.APIEndpoint,
		"ca_certificate": cfg.CACertificate, "client_certificate": cfg.ClientCertificate,
		"admin_key_ttl":        int64(cfg.AdminKeyTTL.Seconds()),
		"admin_key_expires_at": formatTime(cfg.AdminKeyExpires),
		"last_rotated":         formatTime(cfg.LastRotatedTime),
		"next_rotation":        formatTime(cfg.nextRotation(time.Now())),
		"rotation_manager":     cmp.Or(cfg.RotationManager, managerNone),
		"pending_deletion":     append([]string{}, cfg.PendingDeletion...),
		"creating":             cfg.creatingNames(),
	}
	cfg.PopulateAutomatedRotationData(data)
	return data
}

type (
	fieldMap   = map[string]*framework.FieldSchema // describes the fields of a request or of an answer, by name
	fieldData  = framework.FieldData               // the fields of a request
	operations = map[logical.Operation]framework.OperationHandler
)

// The types of fields.
const (
	text     = framework.TypeString
	duration = framework.TypeDurationSecond
	boolean  = framework.TypeBool
	texts    = framework.TypeCommaStringSlice
	number   = framework.TypeInt
)

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

// secret is a field whose value is a secret.
func secret(description string) *framework.FieldSchema {
	f := required(text, description)
	f.DisplayAttrs = &framework.DisplayAttributes{Sensitive: true}
	return f
}

// display gives the paths and operations their names in OpenAPI.
func display(suffix string) *framework.DisplayAttributes {
	return &framework.DisplayAttributes{OperationPrefix: "openai", OperationSuffix: suffix}
}

// operation is handled by the node that gets it; verb and suffix name it in OpenAPI. Its answer has the fields, or no
// content where there are none.
func operation(run framework.OperationFunc, verb, suffix, summary string, fields fieldMap) *framework.PathOperation {
	status := http.StatusOK
	if fields == nil {
		status = http.StatusNoContent
	}
	return &framework.PathOperation{
		Callback: run, Summary: summary,
		DisplayAttrs: &framework.DisplayAttributes{OperationVerb: verb, OperationSuffix: suffix},
		Responses:    map[int][]framework.Response{status: {{Description: http.StatusText(status), Fields: fields}}},
	}
}

// forwarded makes a performance standby or secondary pass the operation on to where storage can be written.
func forwarded(op *framework.PathOperation) *framework.PathOperation {
	op.ForwardPerformanceStandby, op.ForwardPerformanceSecondary = true, true
	return op
}

// exists tells whether there is an entry: those of config and of roles have the names of their paths.
func exists(ctx context.Context, req *logical.Request, _ *fieldData) (bool, error) {
	entry, err := req.Storage.Get(ctx, req.Path)
	return entry != nil, err
}

func pathConfig(b *backend) []*framework.Path {
	fields := fieldMap{
		"admin_api_key": secret("Admin API key of the OpenAI organization. Required. Never returned."),
		"admin_api_key_id": field(text,
			"ID of that very key (key_…), which a rotation deletes. Found at OpenAI when absent."),
		"organization_id": required(text, "ID of the OpenAI organization (org-…). Required."),
		"api_endpoint": defaulted(text, defaultEndpoint,
			"Base URL of the OpenAI API: https, or http to a loopback address. Default "+defaultEndpoint+"."),
		"ca_certificate":     field(text, "Certificates in PEM that are trusted beside the system's. Default: none."),
		"client_certificate": field(text, "Certificate in PEM for an organization with mutual TLS. Default: none."),
		"client_key":         secret("Key in PEM of client_certificate. Never returned. Default: none."),
		"admin_key_ttl": field(duration, "Life of the admin keys that rotation makes: at least twice the time between "+
			"scheduled rotations, at most 365 days. Default 0: without end."),
		// These are parsed by the SDK's helper.
		"rotation_period":   field(duration, "Time between rotations. Excludes rotation_schedule. Default: none."),
		"rotation_schedule": field(text, "Times of rotations: cron with five fields, in UTC. Default: none."),
		"rotation_window":   field(duration, "How late a scheduled rotation may start: at least 1h. Default: none."),
		"rotation_policy":   field(text, "Name of a rotation policy of Vault Enterprise. Default: none."),
		"disable_automated_rotation": field(boolean,
			"Whether the schedule is suspended: true or false. Default false."),
	}
	fields["client_key"].Required = false
	shown := maps.Clone(fields)
	delete(shown, "admin_api_key")
	delete(shown, "client_key")
	fields["verify_connection"] = defaulted(boolean, true,
		"Whether this write proves the key at OpenAI before it is stored: true or false. Not stored. Default true.")
	shown["admin_key_expires_at"] = required(text, "When OpenAI expires the key (RFC 3339); empty: never or unknown.")
	shown["last_rotated"] = required(text, "When the key was written or rotated (RFC 3339, UTC).")
	shown["next_rotation"] = required(text, "When the key is due next (RFC 3339, UTC); empty: never.")
	shown["rotation_manager"] = required(text, "Who rotates on schedule: vault, plugin or none.")
	shown["pending_deletion"] = required(texts, "IDs of admin keys still to be deleted at OpenAI.")
	shown["creating"] = required(texts, "Names of admin keys that a rotation began to make and that OpenAI may have.")
	shown["mount_id"] = required(text, "The tag in the names of what this mount makes at OpenAI.")
	write := forwarded(operation(b.configWrite, "configure", "", "Configure the admin API key and its rotation.", nil))
	rotate := forwarded(operation(b.configRotate, "rotate", "admin-api-key",
		"Replace the admin API key by a new one and delete the old one.", fieldMap{
			"admin_api_key_id": required(text, "ID of the new admin API key."),
			"rotated_time":     required(text, "When it was put to use (RFC 3339, UTC)."),
		}))
	return []*framework.Path{{
		Pattern: configPath, DisplayAttrs: display(""),
		Fields: fields,
		Operations: operations{
			logical.CreateOperation: write, logical.UpdateOperation: write,
			logical.ReadOperation: operation(b.configRead, "read", "configuration",
				"Read the configuration, without the admin API key.", shown),
			logical.DeleteOperation: forwarded(operation(b.configDelete, "delete", "configuration",
				"Delete the configuration. Leases are not revoked at OpenAI without one.", nil)),
		},
		ExistenceCheck: exists,
		HelpSynopsis:   "Configure the Admin API key and how it is rotated.", HelpDescription: configHelpDescription,
	}, {
		Pattern: configPath + "/rotate", DisplayAttrs: display(""),
		Operations:   operations{logical.UpdateOperation: rotate},
		HelpSynopsis: "Replace the Admin API key by a new one.", HelpDescription: rotateHelpDescription,
	}}
}

func (b *backend) configRead(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil || cfg == nil {
		return nil, err
	}
	data := cfg.toResponseData()
	data["mount_id"] = b.mountID
	return &logical.Response{Data: data}, nil
}

// configWrite stores what the request names over what is there. Nothing is stored unless all of it is right.
func (b *backend) configWrite(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	b.configMu.Lock()
	defer b.configMu.Unlock()
	was, err := getConfig(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	was = cmp.Or(was, &config{})
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
		return logical.ErrorResponse("admin_api_key_id is required with verify_connection=false"), nil
	}

	resp := &logical.Response{}
	if cfg.AdminAPIKey != was.AdminAPIKey {
		cfg.LastRotatedTime = time.Now()
		if was.Rotated {
			text := "a rotation made the replaced admin API key, it is still at OpenAI: " + was.AdminAPIKeyID
			resp.AddWarning(text)
			b.Logger().Warn(text)
		}
	}
	b.forgetElsewhere(resp, was, &cfg)
	if next, end := cfg.nextRotation(time.Now()), cfg.AdminKeyExpires; !end.IsZero() &&
		(next.IsZero() || next.After(end)) {
		resp.AddWarning("the admin API key expires at " + formatTime(end) +
			" and no rotation is scheduled before: rotate or replace it")
	}
	if cfg.RotationManager, err = b.registerRotation(ctx, req.MountPoint, &cfg); err != nil {
		return nil, err
	}
	if cfg.RotationManager != managerVault && cfg.RotationPolicy != "" {
		resp.AddWarning("rotation_policy has no effect: Vault's rotation manager does not rotate this key")
	}
	err = putJSON(ctx, req.Storage, configPath, &cfg)
	b.invalidate(ctx, configPath) // also after an error: it may have been stored
	if err != nil {
		return nil, errors.Join(err, b.reregister(ctx, req))
	}
	b.retries.Clear()
	b.report(ctx, req, "config-write", nil, "admin_api_key_id", cfg.AdminAPIKeyID,
		"organization_id", cfg.OrganizationID, "rotation_manager", cfg.RotationManager)
	return resp, nil
}

// forgetElsewhere warns of what a change from was to cfg leaves behind in another organization, and takes off cfg the
// ids of keys to be deleted there. Those that another endpoint told are forgotten too: it may have been of somebody who
// does not know the admin key, and has not got to decide what that deletes.
func (b *backend) forgetElsewhere(resp *logical.Response, was, cfg *config) {
	if was.OrganizationID != "" && cfg.OrganizationID != was.OrganizationID {
		resp.AddWarning("organization_id has changed: until it is back, leases of the former one can't be revoked, " +
			"nor its keys of static roles deleted")
	}
	if cfg.OrganizationID != was.OrganizationID || cfg.APIEndpoint != cmp.Or(was.APIEndpoint, defaultEndpoint) {
		b.warnOfKeys(resp, was)
		cfg.PendingDeletion = nil
	}
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
	return "the admin API key could not be verified: " + err.Error() +
		"; check api_endpoint, or store without asking OpenAI: verify_connection=false"
}

// setID sets a field that the request names to an id or a key, without the line break that comes along from a file.
// setText and setSeconds set others.
func setID(d *fieldData, name string, field *string) {
	setText(d, name, field)
	*field = strings.TrimSpace(*field)
}

func setText(d *fieldData, name string, field *string) {
	if v, ok := d.GetOk(name); ok {
		*field = v.(string)
	}
}

func setSeconds(d *fieldData, name string, field *time.Duration) {
	if v, ok := d.GetOk(name); ok {
		*field = time.Duration(v.(int)) * time.Second
	}
}

// update sets the fields that d names and checks the whole. Its error is the caller's.
func (cfg *config) update(d *fieldData) error {
	was := *cfg
	_, keyGiven := d.GetOk("admin_api_key")
	setID(d, "admin_api_key", &cfg.AdminAPIKey)
	if cfg.AdminAPIKey != was.AdminAPIKey {
		cfg.AdminAPIKeyID, cfg.AdminKeyExpires, cfg.Rotated = "", time.Time{}, false // of the former key
	}
	setID(d, "admin_api_key_id", &cfg.AdminAPIKeyID)
	setID(d, "organization_id", &cfg.OrganizationID)
	setSeconds(d, "admin_key_ttl", &cfg.AdminKeyTTL)
	setText(d, "ca_certificate", &cfg.CACertificate)
	setText(d, "client_certificate", &cfg.ClientCertificate)
	setText(d, "client_key", &cfg.ClientKey)
	setID(d, "api_endpoint", &cfg.APIEndpoint)
	var err error
	if cfg.APIEndpoint, err = parseEndpoint(cmp.Or(cfg.APIEndpoint, defaultEndpoint)); err != nil {
		return err
	}
	if _, err := cfg.tlsConfig(); err != nil {
		return err
	}
	// Who may write config but does not know the key must not get it sent to himself.
	moved := cfg.APIEndpoint != cmp.Or(was.APIEndpoint, defaultEndpoint) || cfg.CACertificate != was.CACertificate ||
		cfg.ClientCertificate != was.ClientCertificate || cfg.ClientKey != was.ClientKey
	if was.AdminAPIKey != "" && moved && !keyGiven {
		return errors.New("api_endpoint, ca_certificate, client_certificate and client_key can only be changed " +
			"together with admin_api_key, which would be sent there")
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

// parseEndpoint checks api_endpoint and trims its trailing slashes. Its error does not quote the value, which may
// hold a password.
func parseEndpoint(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || !hostPattern.MatchString(u.Host) || u.Opaque != "" {
		return "", errors.New("api_endpoint must be a URL like " + defaultEndpoint)
	}
	port, err := strconv.ParseUint(cmp.Or(u.Port(), "443"), 10, 16)
	loopback := u.Hostname() == "localhost" || net.ParseIP(u.Hostname()).IsLoopback()
	switch {
	case err != nil || port == 0:
		return "", errors.New("api_endpoint has a port that is not 1 to 65535")
	case u.User != nil || strings.ContainsAny(s, "?#") || slices.Contains(strings.Split(u.Path, "/"), ".."):
		return "", errors.New("api_endpoint must not have user information, a query, a fragment or .. in its path")
	case u.Scheme != "https" && (u.Scheme != "http" || !loopback):
		return "", errors.New("api_endpoint must be https: plain http is only for a loopback address")
	}
	return strings.TrimRight(u.String(), "/"), nil
}

func (b *backend) configDelete(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	b.configMu.Lock()
	defer b.configMu.Unlock()
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil || cfg == nil {
		return nil, err
	}
	if _, err := b.registerRotation(ctx, req.MountPoint, &config{}); err != nil {
		return nil, err
	}
	err = req.Storage.Delete(ctx, configPath)
	b.invalidate(ctx, configPath)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("deleting config: %w", err), b.reregister(ctx, req))
	}
	b.report(ctx, req, "config-delete", nil, "admin_api_key_id", cfg.AdminAPIKeyID)
	resp := &logical.Response{}
	resp.AddWarning("until config is written again, leases are not revoked at OpenAI, and keys of static roles are " +
		"neither rotated nor deleted; the admin key is still there: " + cfg.AdminAPIKeyID)
	b.warnOfKeys(resp, cfg)
	return resp, nil
}

// reregister arranges the rotation of what is stored after all, when storing something else has failed.
func (b *backend) reregister(ctx context.Context, req *logical.Request) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	cfg, err := getConfig(ctx, req.Storage)
	if err == nil {
		_, err = b.registerRotation(ctx, req.MountPoint, cmp.Or(cfg, &config{}))
	}
	return err
}

// warnOfKeys names, in the answer and in the log, the admin keys at OpenAI that config forgets.
func (b *backend) warnOfKeys(resp *logical.Response, cfg *config) {
	warn := func(what string, list []string) {
		if len(list) > 0 {
			resp.AddWarning(what + strings.Join(list, ", "))
			b.Logger().Warn(what + strings.Join(list, ", "))
		}
	}
	warn("these admin keys are still at OpenAI, delete them there: ", cfg.PendingDeletion)
	warn("a rotation began to make admin keys of these names, delete them if OpenAI has them: ", cfg.creatingNames())
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
		"credential_type":               cmp.Or(r.CredentialType, apiKeyType),
	}
}

func pathRoles(b *backend) []*framework.Path {
	settings := fieldMap{
		"project_id": required(text, "ID of the OpenAI project that the service accounts are in (proj_…). Required."),
		"service_account_name_template": defaulted(text, defaultNameTemplate,
			"Template of the name of an account, or of a key on an existing account. Default "+defaultNameTemplate+"."),
		"service_account_description": defaulted(text, defaultDescription,
			"Kept with the role only: OpenAI has no such field. Default \""+defaultDescription+"\"."),
		"ttl": defaulted(duration, int(defaultTTL.Seconds()),
			"TTL of a lease when its reader asks for none. More than 0, at most max_ttl. Default 1h."),
		"max_ttl": defaulted(duration, int(defaultMaxTTL.Seconds()),
			"Longest TTL of a lease, renewals included. At most 365 days, default 24h; with access_token both are 1h."),
		"enforce_key_expiry": defaulted(boolean, true,
			"Whether OpenAI itself expires a key, about a minute after its lease's end: true or false. Default true."),
		"scopes": field(texts,
			"Scopes that keys are restricted to, like api.responses.write. Default: none, all that the account can."),
		"service_account_role": field(text,
			"Role of a service account that is made for a key with scopes: member or owner. Default member."),
		"service_account_id": field(text,
			"ID of an existing service account that keys or tokens are of. Default: each key has one of its own."),
		"credential_type": defaulted(text, apiKeyType, "What creds hands out, fixed with the first write: api_key, or "+
			"access_token, which needs config/identity and service_account_id. Default api_key."),
	}
	fields := maps.Clone(settings)
	settings["subject"] = field(text, "The sub of the JWTs that a role of access tokens exchanges.")
	fields["name"] = required(text, "Name of the role.")
	names := fieldMap{"keys": field(framework.TypeStringSlice, "Names of the roles.")}
	write := forwarded(operation(b.roleWrite, "write", "", "Create or update a role.", nil))
	return []*framework.Path{{
		Pattern: rolePrefix + "?$", DisplayAttrs: display("roles"),
		Operations:   operations{logical.ListOperation: operation(b.roleList, "list", "", "List the roles.", names)},
		HelpSynopsis: "List the roles.", HelpDescription: "The names of the roles, in alphabetical order.",
	}, {
		Pattern: rolePrefix + framework.GenericNameRegex("name"), DisplayAttrs: display("role"),
		Fields: fields,
		Operations: operations{
			logical.CreateOperation: write, logical.UpdateOperation: write,
			logical.ReadOperation: operation(b.roleRead, "read", "", "Read a role.", settings),
			logical.DeleteOperation: forwarded(operation(b.roleDelete, "delete", "",
				"Delete a role. Its leases live on, but can't be renewed.", nil)),
		},
		ExistenceCheck: exists,
		HelpSynopsis:   "Manage what creds/<name> hands out.", HelpDescription: roleHelpDescription,
	}}
}

func (b *backend) roleList(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	names, err := req.Storage.List(ctx, rolePrefix)
	if err != nil {
		return nil, fmt.Errorf("listing roles: %w", err)
	}
	return logical.ListResponse(names), nil
}

func (b *backend) roleRead(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	r, err := getRole(ctx, req.Storage, d.Get("name").(string))
	if err != nil || r == nil {
		return nil, err
	}
	data := r.toResponseData()
	if r.CredentialType == accessToken {
		data["subject"] = b.subject(d.Get("name").(string))
	}
	return &logical.Response{Data: data}, nil
}

// roleDelete deletes the role, so that it hands out no more, and then its rule at OpenAI, which a role that is gone
// already may have left there.
func (b *backend) roleDelete(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	name, ofKeys := d.Get("name").(string), false
	remove := func() error {
		was, err := getRole(ctx, req.Storage, name)
		if err == nil {
			err = req.Storage.Delete(ctx, rolePrefix+name)
		}
		if err != nil {
			return fmt.Errorf("deleting role %q: %w", name, err)
		}
		ofKeys = was != nil && was.CredentialType != accessToken || was == nil && ofKeys
		return nil
	}
	if err := remove(); err != nil { // at once: a lock may be held for as long as OpenAI takes
		return nil, err
	}
	defer b.lock(rolePrefix + name).Unlock()
	if err := remove(); err != nil { // what a write has stored that was under way
		return nil, err
	}
	b.report(ctx, req, "role-delete", nil, "name", name)
	if ofKeys {
		return nil, nil
	}
	resp := &logical.Response{}
	b.identityMu.Lock()
	defer b.identityMu.Unlock()
	id, err := getIdentity(ctx, req.Storage)
	if err == nil && id != nil && id.ProviderID != "" {
		err = b.useProvider(ctx, req.Storage, id, func(c *client) error {
			own := func(f federated) bool { return f.Name == b.ruleName(name) }
			return c.deleteFederated(ctx, rule, rulesPath(id.ProviderID), "", own)
		})
	}
	if cannotManage(err) {
		resp.AddWarning(fmt.Sprintf("the plugin changed nothing at OpenAI (%s): a rule with the matcher sub=%s may be "+
			"there still", err, b.subject(name)))
	} else if err != nil {
		return answerError(fmt.Errorf("the role is deleted, but not its federation rule, delete it again: %w", err))
	}
	return resp, nil
}

// roleWrite stores what the request names over what is there. Nothing is stored unless all of it is right, as OpenAI
// sees it too. If OpenAI cannot be reached, the role is stored with a warning.
func (b *backend) roleWrite(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	name, resp := d.Get("name").(string), &logical.Response{}
	defer b.lock(rolePrefix + name).Unlock()
	was, err := getRole(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	r := *cmp.Or(was, newRole())
	if err := r.update(d); err != nil {
		return logical.ErrorResponse(err.Error()), nil
	}
	sample := nameData{RoleName: name, RandomSuffix: newSuffix("sample", time.Now()), ProjectID: r.ProjectID}
	if _, err := renderName(r.ServiceAccountNameTemplate, sample); err != nil {
		return logical.ErrorResponse("service_account_name_template %s", err), nil
	}
	if r.CredentialType == accessToken {
		b.identityMu.Lock()
		defer b.identityMu.Unlock()
		err = b.checkTokenRole(ctx, req.Storage, name, was, &r, resp)
	} else {
		err = b.checkRole(ctx, req.Storage, "", &r, resp)
	}
	if err != nil {
		return answerError(err)
	}
	if limit := b.System().MaxLeaseTTL(); limit > 0 && r.MaxTTL > limit {
		resp.AddWarning(fmt.Sprintf("max_ttl %s is more than the mount's maximum of %s", r.MaxTTL, limit))
	}
	if err := putJSON(ctx, req.Storage, rolePrefix+name, &r); err != nil {
		return nil, err
	}
	b.report(ctx, req, "role-write", nil, "name", name, "project_id", r.ProjectID)
	return resp, nil
}

// checkRole asks OpenAI about what the role names, in the organization if that is known, adds warnings and fills in the
// account's name. If OpenAI can't be asked, that is a warning.
func (b *backend) checkRole(ctx context.Context, s logical.Storage, organization string, r *role,
	to *logical.Response) error {
	field, value := "project_id", r.ProjectID
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	err := b.useClient(ctx, s, organization, func(c *client) error {
		p, err := c.getProject(ctx, r.ProjectID)
		if err == nil && p.Status == "archived" {
			err = &apiError{Status: http.StatusBadRequest, Message: "the project is archived"}
		}
		if err != nil || r.ServiceAccountID == "" {
			return err
		}
		field, value = "service_account_id", r.ServiceAccountID
		account, err := c.getServiceAccount(ctx, r.ProjectID, r.ServiceAccountID)
		if err == nil {
			r.ServiceAccountName = account.Name
			if account.Role == "none" {
				to.AddWarning("service_account_id has no role in the project, so that its keys can do nothing")
			}
			if _, _, ok := parseName(account.Name); ok {
				to.AddWarning("a Vault mount made service_account_id for a lease, and deletes it when that lease ends")
			}
		}
		return err
	})
	switch {
	case adminKeyRefused(err):
		return err
	case isJudged(err):
		return fmt.Errorf("%s %q was refused: %w", field, value, err)
	case err != nil:
		to.AddWarning(fmt.Sprintf("%s %q is stored unchecked: %s", field, value, err))
	}
	return nil
}

// update sets the fields that d names and checks what needs no call. Its error is the caller's.
func (r *role) update(d *fieldData) error {
	before := *r
	setID(d, "project_id", &r.ProjectID)
	setText(d, "service_account_name_template", &r.ServiceAccountNameTemplate)
	setText(d, "service_account_description", &r.ServiceAccountDescription)
	setID(d, "service_account_role", &r.ServiceAccountRole)
	setID(d, "service_account_id", &r.ServiceAccountID)
	if r.ServiceAccountID != before.ServiceAccountID {
		r.ServiceAccountName = ""
	}
	if setID(d, "credential_type", &r.CredentialType); r.CredentialType == accessToken && before.TTL == 0 {
		r.MaxTTL = maxTokenLife
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
		r.Scopes = nil
		for _, scope := range v.([]string) { // in their order, each once
			if !slices.Contains(r.Scopes, scope) {
				r.Scopes = append(r.Scopes, scope)
			}
		}
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
		return fmt.Errorf("ttl must be more than 0 and at most max_ttl: they are %s and %s", r.TTL, r.MaxTTL)
	case len(r.Scopes) > 100 || slices.ContainsFunc(r.Scopes, invalidScope):
		return errors.New("scopes must be at most 100 names like api.responses.write")
	case r.ServiceAccountRole != "" && r.ServiceAccountRole != "member" && r.ServiceAccountRole != "owner":
		return errors.New("service_account_role must be member or owner")
	case r.ServiceAccountID != "" && !validID(r.ServiceAccountID):
		return errors.New("service_account_id must be 1 to 128 letters, digits, - or _")
	case r.ServiceAccountID != "" && r.ServiceAccountRole != "":
		return errors.New("service_account_role and service_account_id exclude each other: the account keeps its role")
	case r.ServiceAccountRole != "" && len(r.Scopes) == 0:
		return errors.New("service_account_role needs scopes: an account with an unrestricted key is made a member")
	}
	return r.checkKind(&before)
}

// checkKind checks what depends on the kind of credential; before is the role as it was, without a TTL if it is new.
func (r *role) checkKind(before *role) error {
	if r.CredentialType == apiKeyType {
		r.CredentialType = ""
	}
	switch {
	case r.CredentialType != "" && r.CredentialType != accessToken:
		return errors.New("credential_type must be api_key or access_token")
	case before.TTL != 0 && (r.CredentialType != before.CredentialType || r.CredentialType == accessToken &&
		(r.ServiceAccountID != before.ServiceAccountID || r.ProjectID != before.ProjectID)):
		return errors.New("credential_type and, with access_token, project_id and service_account_id are fixed: " +
			"delete the role and write it anew")
	case r.CredentialType == "":
		return nil
	case r.ServiceAccountID == "":
		return errors.New("service_account_id is required with credential_type=access_token")
	case r.MaxTTL > maxTokenLife:
		return errors.New("max_ttl must be at most 1h with credential_type=access_token: no token lives longer")
	case r.UnexpiringKeys:
		return errors.New("enforce_key_expiry must be true with credential_type=access_token: tokens always expire")
	}
	return nil
}

var scopePattern = regexp.MustCompile(`^[a-z][A-Za-z0-9._:-]{0,127}$`)

// nameData is what a name template can use.
type nameData struct {
	RoleName     string
	RandomSuffix string // see newSuffix
	ProjectID    string
	ProjectName  string // costs a call when it is not yet known
	DisplayName  string // of the token that asks
}

var (
	invalidInName = regexp.MustCompile(`[^A-Za-z0-9_-]+`)
	// endlessTemplate matches what lets a short template run for long, or write much. One process serves all mounts.
	endlessTemplate = regexp.MustCompile(`(?s)\{\{.*\b(range|define|template|block|print\w*|html|js|urlquery)\b|` +
		`base64.*base64`)
)

// boundedRandom and boundedReplace take the place of functions that Vault's templates have.
func boundedRandom(n int) (string, error) {
	if n < 1 || n > maxNameLength {
		return "", fmt.Errorf("random takes 1 to %d characters", maxNameLength)
	}
	return strings.ToLower(crand.Text() + crand.Text() + crand.Text())[:n], nil
}

func boundedReplace(find, replacement, s string) (string, error) {
	if (len(s)+1)*(len(replacement)+1) > 1<<16 {
		return "", errors.New("replace gives at most 64 KiB")
	}
	return strings.ReplaceAll(s, find, replacement), nil
}

// renderName makes a name that OpenAI takes and that ends in "-" and the suffix: what is not a letter, digit, - or _
// becomes -, and what is too long is cut before the suffix.
func renderName(raw string, data nameData) (string, error) {
	if len(raw) > 256 || endlessTemplate.MatchString(raw) {
		return "", errors.New("must be at most 256 bytes, without range, define, template, print, html, js, urlquery")
	}
	t, err := template.NewTemplate(template.Template(raw),
		template.Function("random", boundedRandom), template.Function("replace", boundedReplace))
	name := ""
	if err == nil {
		name, err = t.Generate(data)
	}
	if err != nil {
		return "", fmt.Errorf("is not valid: %w", err)
	}
	name = strings.TrimSuffix(strings.Trim(invalidInName.ReplaceAllString(name, "-"), "-"), data.RandomSuffix)
	name = strings.Trim(name[:min(len(name), maxNameLength-1-suffixLength)], "-")
	return cmp.Or(name, "vault") + "-" + data.RandomSuffix, nil
}

// credentialName makes the name of a new service account or key of the role.
func (c *client) credentialName(ctx context.Context, r *role, data nameData) (name string, err error) {
	if strings.Contains(r.ServiceAccountNameTemplate, ".ProjectName") {
		if data.ProjectName, err = c.projectName(ctx, r.ProjectID); err != nil {
			return "", err
		}
	}
	if name, err = renderName(r.ServiceAccountNameTemplate, data); err != nil {
		return "", fmt.Errorf("service_account_name_template %w", err)
	}
	return name, nil
}

func pathCreds(b *backend) []*framework.Path {
	ttl := field(duration, "TTL of the lease. More than 0, at most the role's max_ttl. Default: the role's ttl.")
	ttl.Query = true
	// Leases belong to the cluster that issues them: only standbys pass this on.
	read := operation(b.credsRead, "generate", "", "Make an API key or access token under a new lease.", secretFields())
	read.ForwardPerformanceStandby = true
	return []*framework.Path{{
		Pattern: "creds/" + framework.GenericNameRegex("name"), DisplayAttrs: display("credentials"),
		Fields:       fieldMap{"name": required(framework.TypeString, "Name of the role."), "ttl": ttl},
		Operations:   operations{logical.ReadOperation: read, logical.UpdateOperation: read}, // some tools send by PUT
		HelpSynopsis: "Make an API key or access token under a new lease.", HelpDescription: credsHelpDescription,
	}}
}

// secretFields are what a caller of creds gets.
func secretFields() fieldMap {
	return fieldMap{
		"api_key":            secret("The OpenAI API key."),
		"api_key_id":         required(text, "ID of the API key."),
		"service_account":    required(text, "Name of the service account."),
		"service_account_id": required(text, "ID of the service account."),
		"project_id":         required(text, "ID of the project."),
		"organization_id":    required(text, "ID of the organization."),
		"scopes": required(framework.TypeStringSlice,
			"What the key is restricted to; empty: all that its account can do."),
		"expires_at": required(text,
			"When OpenAI itself expires the key unless the lease is renewed (RFC 3339, UTC); empty: never."),
	}
}

// reportCredential counts and reports that a lease was issued, renewed or revoked; err: that failed.
func (b *backend) reportCredential(ctx context.Context, req *logical.Request, operation string, l *lease, err error) {
	b.metrics.add("credential_operations_total", 1, "role", l.Role, "operation", operation, "result", result(err))
	b.report(ctx, req, "creds-"+operation, err, "name", l.Role, "project_id", l.ProjectID,
		"service_account_id", l.ServiceAccountID, "api_key_id", l.APIKeyID)
}

// tokenRevoke only reports: OpenAI has no way to end a token before its time.
func (b *backend) tokenRevoke(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	l := &lease{}
	err := remarshal(req.Secret.InternalData, l)
	b.reportCredential(ctx, req, "revoke", l, err)
	return nil, nil
}

// credsRead makes a credential. Nothing is stored: OpenAI expires the key, and the name tells tidy when the account
// can be deleted if Vault never got the answer.
func (b *backend) credsRead(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	roleName := d.Get("name").(string)
	r, err := getRole(ctx, req.Storage, roleName)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("role %q does not exist", roleName), nil
	}
	ttl, warning, err := r.leaseTTL(d, b.System().MaxLeaseTTL())
	if err != nil {
		return logical.ErrorResponse(err.Error()), nil
	}
	l := &lease{
		ProjectID: r.ProjectID, ServiceAccountID: r.ServiceAccountID, Role: roleName, KeyExpires: !r.UnexpiringKeys,
		KeyOnly: r.ServiceAccountID != "", End: endOf(time.Now(), r.MaxTTL).Unix(),
	}
	kind, scopes, key := secretType, r.Scopes, (*apiKey)(nil)
	if r.CredentialType == accessToken {
		kind = tokenSecretType
		asked := ttl
		key, ttl, scopes, err = b.issueToken(ctx, req.Storage, r, l, ttl)
		if asked-ttl > clockTolerance/10 {
			warning = fmt.Sprintf("OpenAI's token lives %s, not %s: check this machine's clock", ttl, asked)
		}
	} else {
		key, err = b.issue(ctx, req, r, l, ttl)
	}
	if !isMistake(err) { // who may read creds must not fill the log
		b.reportCredential(ctx, req, "issue", l, err)
	}
	if err != nil {
		return answerError(err)
	}

	account := l.Name
	if l.KeyOnly {
		account = r.ServiceAccountName
	}
	internal := map[string]any{}
	if err := remarshal(l, &internal); err != nil {
		return nil, err
	}
	resp := b.Secret(kind).Response(map[string]any{
		"api_key": key.Value, "api_key_id": l.APIKeyID,
		"service_account": account, "service_account_id": l.ServiceAccountID,
		"project_id": r.ProjectID, "organization_id": l.OrganizationID, "scopes": append([]string{}, scopes...),
		"expires_at": formatTime(unixTime(key.ExpiresAt)),
	}, internal)
	resp.Secret.TTL, resp.Secret.MaxTTL = ttl, r.MaxTTL
	if warning != "" {
		resp.AddWarning(warning)
	}
	if l.KeyExpires && key.ExpiresAt == 0 {
		resp.AddWarning("OpenAI did not take over the key's expiry: only revocation ends this key")
	}
	return resp, nil
}

// leaseTTL returns the TTL of a new lease, and a warning where it is not what was asked for. limit is the mount's
// maximum; 0: not known. Its error is the caller's.
func (r *role) leaseTTL(d *fieldData, limit time.Duration) (ttl time.Duration, warning string, err error) {
	ttl = r.TTL
	setSeconds(d, "ttl", &ttl)
	if ttl <= 0 || ttl > r.MaxTTL {
		err = fmt.Errorf("ttl must be more than 0 and at most the role's max_ttl of %s", r.MaxTTL)
		if r.CredentialType == accessToken {
			err = fmt.Errorf("%w: OpenAI's access tokens live at most 1h", err)
		}
		return 0, "", err
	}
	// Vault would shorten the lease behind our back, and the key would outlive it.
	if limit > 0 && ttl > limit {
		return limit, fmt.Sprintf("ttl of %s is more than the mount's maximum and was shortened to %s", ttl, limit), nil
	}
	return ttl, "", nil
}

// errNoUUID is an error of a Vault that does not tell BackendUUID.
var errNoUUID = errors.New("this mount has no UUID of Vault's, from which the names of accounts are made")

// issue makes a credential whose lease is l, and fills in what l lacks. What a failure leaves at OpenAI is undone.
func (b *backend) issue(ctx context.Context, req *logical.Request, r *role, l *lease, ttl time.Duration) (
	key *apiKey, err error) {
	if b.mountID == "" {
		return nil, errNoUUID
	}
	data := nameData{
		RoleName: l.Role, RandomSuffix: newSuffix(b.mountID, unixTime(l.End)),
		ProjectID: r.ProjectID, DisplayName: req.DisplayName,
	}
	err = b.useClient(ctx, req.Storage, "", func(c *client) (err error) {
		l.OrganizationID = c.config.OrganizationID
		l.Name, err = c.credentialName(ctx, r, data)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("preparing the credential: %w", err)
	}
	var expiresIn time.Duration
	if l.KeyExpires {
		expiresIn = min(ttl+keyGrace, maxKeyLife)
	}
	key, err = b.create(ctx, req.Storage, r, expiresIn, l)
	switch {
	case err != nil:
	case unixTime(key.CreatedAt).Add(r.MaxTTL + keyGrace - clockTolerance).After(unixTime(l.End)):
		err = fmt.Errorf("this machine's clock is behind OpenAI's, which says %s: set it right",
			formatTime(unixTime(key.CreatedAt)))
	case time.Now().Round(0).Add(ttl + keyGrace).After(unixTime(l.End)):
		err = errors.New("the credential has become too old: the clock was set, or this machine was asleep")
	default:
		err = ctx.Err() // Vault drops the answer to a request that has ended
	}
	if err != nil {
		b.undo(ctx, req.Storage, l, err)
	}
	return key, err
}

// issueToken exchanges a JWT about the role for an access token, whose lease is l. It returns the token, how long it
// lives and what it is restricted to. Nothing is left at OpenAI but the token, which ends by itself; one that can do
// more than the role says is thrown away.
func (b *backend) issueToken(ctx context.Context, s logical.Storage, r *role, l *lease, ttl time.Duration) (
	key *apiKey, life time.Duration, scopes []string, err error) {
	signer, err := b.getSigner(ctx, s)
	if err != nil {
		return nil, 0, nil, err
	}
	defer func() { b.metrics.add("token_exchanges_total", 1, "result", result(err)) }()
	l.OrganizationID = signer.OrganizationID
	start := time.Now()
	t, err := signer.exchange(ctx, b.subject(l.Role), r.ServiceAccountID, ttl)
	if err != nil {
		return nil, 0, nil, fmt.Errorf("exchanging for an access token: %w", err)
	}
	// The lease must not outlive the token, and a TTL of 0 would be Vault's default.
	life = min(ttl, time.Duration(t.ExpiresIn)*time.Second) - time.Since(start)
	if life < time.Second {
		return nil, 0, nil, errutil.UserError{Err: "the exchange took longer than the token lives: raise ttl"}
	}
	scopes = strings.Fields(t.Scope)
	beyond := func(scope string) bool { return !slices.Contains(r.Scopes, scope) }
	if len(r.Scopes) > 0 && (len(scopes) == 0 || slices.ContainsFunc(scopes, beyond)) {
		return nil, 0, nil, fmt.Errorf("the token could do more than the role's scopes, and was thrown away: the rule "+
			"at OpenAI gives %q; write the role again or, if an operator made the rule, restrict it there",
			cmp.Or(signer.client.clean(t.Scope), "all that the account can"))
	}
	return &apiKey{Value: t.Value, ExpiresAt: time.Now().Add(life).Unix()}, life, scopes, nil
}

// create makes what the role says: a key on an account of its own (one call), a key on an existing account (one
// call), or an account, its role and its scoped key (three calls), so that a key which is not restricted never
// exists. l gets the ids of what was made.
func (b *backend) create(ctx context.Context, s logical.Storage, r *role, expiresIn time.Duration, l *lease) (
	key *apiKey, err error) {
	step := func(what string, fn func(*client) error) error {
		if err := b.useClient(ctx, s, l.OrganizationID, fn); err != nil {
			return fmt.Errorf("creating %s: %w", what, err)
		}
		return nil
	}
	scoped := len(r.Scopes) > 0
	if !l.KeyOnly {
		err = step("service account", func(c *client) error {
			account, err := c.createServiceAccount(ctx, r.ProjectID, l.Name, scoped, expiresIn)
			if err == nil {
				l.ServiceAccountID, key = account.ID, account.APIKey
			}
			return err
		})
	}
	if err == nil && !l.KeyOnly && scoped {
		err = step("role of service account", func(c *client) error {
			return c.setServiceAccountRole(ctx, r.ProjectID, l.ServiceAccountID, cmp.Or(r.ServiceAccountRole, "member"))
		})
	}
	if err == nil && (l.KeyOnly || scoped) {
		err = step("API key", func(c *client) (err error) {
			key, err = c.createAPIKey(ctx, r.ProjectID, l.ServiceAccountID, l.Name, r.Scopes, expiresIn)
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	l.APIKeyID = key.ID
	return key, nil
}

// undo sees to it that nothing stays of a create that failed with cause: what is known by its id is deleted at once,
// or remembered in storage; else, if OpenAI may have made something, its name is remembered in memory. It also works
// when ctx has ended.
func (b *backend) undo(ctx context.Context, s logical.Storage, l *lease, cause error) {
	if l.id() == "" {
		if !notDone(cause) {
			b.addLost(l)
		}
		return
	}
	ctx = context.WithoutCancel(ctx)
	deleteCtx, cancel := context.WithTimeout(ctx, undoTimeout/2)
	defer cancel()
	if b.revokeAtOpenAI(deleteCtx, s, l) == nil {
		return
	}
	storeCtx, cancel := context.WithTimeout(ctx, undoTimeout/2)
	defer cancel()
	if _, err := b.addCleanup(storeCtx, s, l, 0); err != nil {
		b.addLost(l)
	}
}

// isMistake tells whether err is a caller's mistake that was found without OpenAI.
func isMistake(err error) bool { return errors.As(err, new(errutil.UserError)) }

// answerError turns an error of OpenAI into a handler's answer. What OpenAI refused is the request's fault, a 400; an
// admin key that is not accepted is not.
func answerError(err error) (*logical.Response, error) {
	var e *apiError
	if errors.As(err, &e) && (e.Param == "expires_in_seconds" || strings.Contains(e.Message, "expires_in_seconds")) {
		err = fmt.Errorf("%w; where OpenAI limits a key's life, a role needs enforce_key_expiry=true and a lower ttl "+
			"and max_ttl, a static role less time between rotations and a lower overlap", err)
	}
	if isJudged(err) || isMistake(err) {
		return logical.ErrorResponse(err.Error()), nil
	}
	return nil, err
}

// credRenew extends a lease, up to the role's max_ttl and to the end that its name has: the key's expiry at OpenAI
// first, so that the key never ends before its lease.
func (b *backend) credRenew(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	l, err := leaseOf(req.Secret)
	if err != nil {
		return nil, err
	}
	r, err := getRole(ctx, req.Storage, l.Role)
	if err != nil {
		return nil, err
	}
	if r == nil {
		return logical.ErrorResponse("role %q of this lease does not exist any more", l.Role), nil
	}
	issued := req.Secret.IssueTime
	maxTTL := min(r.MaxTTL, unixTime(l.End).Add(-keyGrace).Sub(issued))
	if maxTTL < time.Second { // CalculateTTL would take 0 for no maximum
		return logical.ErrorResponse("lease can't be renewed: it is past its end"), nil
	}
	// What Vault will make of the lease when it gets our answer.
	ttl, _, err := framework.CalculateTTL(b.System(), req.Secret.Increment, r.TTL, 0, maxTTL, 0, issued)
	if err != nil {
		return logical.ErrorResponse("lease can't be renewed: %s", err), nil
	}
	if l.KeyExpires {
		err = b.useClient(ctx, req.Storage, l.OrganizationID, func(c *client) error {
			return c.setKeyLife(ctx, l.ProjectID, l.APIKeyID, min(ttl+keyGrace, maxKeyLife))
		})
	}
	b.reportCredential(ctx, req, "renew", l, err)
	if err != nil {
		return answerError(fmt.Errorf("moving the key's expiry: %w", err))
	}
	req.Secret.TTL, req.Secret.MaxTTL = r.TTL, maxTTL
	return &logical.Response{Secret: req.Secret}, nil
}

// adminKeyRefused tells whether err is the same for all that the admin key does, or there is none.
func adminKeyRefused(err error) bool {
	return errors.Is(err, errNotConfigured) || isStatus(err, http.StatusUnauthorized, http.StatusForbidden)
}

// maxRevokeFailures is after how many failures the plugin takes a revocation over. Vault gives up at its sixth, and
// would then try once a day. A revocation whose turn did not come at a rate limit is taken over at once: Vault's tries
// would only stand in the queue.
const maxRevokeFailures = 5

// credRevoke deletes what a lease stands for at OpenAI; what is gone already is revoked. Vault tries again after an
// error. Sweep tries too, and after maxRevokeFailures only sweep does.
func (b *backend) credRevoke(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	l, err := leaseOf(req.Secret)
	if err != nil {
		return nil, err
	}
	callCtx, cancel := context.WithTimeout(ctx, requestTimeout-undoTimeout) // leaves time to store
	defer cancel()
	err = b.revokeAtOpenAI(callCtx, req.Storage, l)
	b.reportCredential(ctx, req, "revoke", l, err)
	if !adminKeyRefused(err) {
		b.refusals.Store(0)
	}
	if err == nil {
		return nil, nil
	}
	failures, cleanupErr := b.addCleanup(ctx, req.Storage, l, 1)
	if adminKeyRefused(err) {
		failures = max(failures, int(b.refusals.Add(1))) // it is the same for each lease of the mount
	}
	limited := errors.Is(err, errRateLimit) || isStatus(err, http.StatusTooManyRequests)
	if cleanupErr == nil && (failures >= maxRevokeFailures || limited) {
		b.metrics.add("revocations_handed_over_total", 1)
		b.Logger().Error("revocation taken over: Vault is told that it is done, the plugin goes on until it is",
			"project_id", l.ProjectID, "id", l.id(), "failures", failures, "error", err)
		return nil, nil
	}
	return nil, errors.Join(fmt.Errorf("deleting %q: %w", l.id(), err), cleanupErr)
}

// addCleanup remembers a credential for sweep, with failed more failures, and returns their count.
func (b *backend) addCleanup(ctx context.Context, s logical.Storage, l *lease, failed int) (failures int, err error) {
	entry := *l
	if _, err := getJSON(ctx, s, cleanupPrefix+l.id(), &entry); err != nil {
		return 0, err
	}
	entry.Failures += failed
	return entry.Failures, putJSON(ctx, s, cleanupPrefix+l.id(), entry)
}

// sweep works the clean-up entries off, in an order of chance: an entry that keeps failing does not keep the others
// waiting.
func (b *backend) sweep(ctx context.Context, s logical.Storage) {
	ids, failed := s.List(ctx, cleanupPrefix)
	rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	for _, id := range ids {
		err := b.sweepOne(ctx, s, id)
		failed = cmp.Or(failed, err)
		if _, ok := errors.AsType[*apiError](err); ok && !isRefused(err) || adminKeyRefused(err) || ctx.Err() != nil {
			break // it is the same for all
		}
	}
	if failed != nil {
		b.Logger().Warn("clean-up failed, will be tried again", "error", failed)
	}
}

// sweepOne deletes what an entry stands for, and then the entry.
func (b *backend) sweepOne(ctx context.Context, s logical.Storage, id string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	defer func() { b.metrics.add("cleanups_total", 1, "result", result(err)) }()
	var l lease
	if _, err = getJSON(ctx, s, cleanupPrefix+id, &l); err != nil || l.id() == "" {
		return err
	}
	if err = b.revokeAtOpenAI(ctx, s, &l); err != nil {
		return fmt.Errorf("deleting %q: %w", id, err)
	}
	b.Logger().Info("cleaned up a credential", "project_id", l.ProjectID,
		"service_account_id", l.ServiceAccountID, "api_key_id", l.APIKeyID, "failures", l.Failures)
	return s.Delete(ctx, cleanupPrefix+id)
}

const (
	maxLost       = 1000             // creates that are remembered
	searchTime    = 10 * time.Minute // so long a lost create is looked for at each tick,
	lostTime      = 24 * time.Hour   // and so long by each full pass: OpenAI may carry it out late
	firstPass     = 2 * time.Minute  // after the process started
	passInterval  = time.Hour        // between the starts of two full passes
	retryInterval = 10 * time.Minute // after the end of one that failed
	passTimeout   = 50 * time.Minute
	tidyWait      = 30 * time.Second // so long a pass by hand is waited for
	maxListed     = 100              // ids in an answer of tidy
	maxErrors     = 10               // texts in it

	// README promises that nothing of a name stays for longer after its end, a pass's own time apart.
	_ = uint(75*time.Minute - tidyMargin - passInterval - time.Minute)
)

func (b *backend) addLost(l *lease) {
	b.lostMu.Lock()
	defer b.lostMu.Unlock()
	if len(b.lost) >= maxLost {
		b.Logger().Error("too many lost creates: this one stays until its end", "name", l.Name)
		return
	}
	l.At = time.Now()
	b.lost[l.Name] = *l
}

// lostSince returns the lost creates that are not older than age, and forgets those that are older than lostTime.
func (b *backend) lostSince(age time.Duration) map[string]lease {
	b.lostMu.Lock()
	defer b.lostMu.Unlock()
	maps.DeleteFunc(b.lost, func(_ string, l lease) bool { return time.Since(l.At) > lostTime })
	found := maps.Clone(b.lost)
	maps.DeleteFunc(found, func(_ string, l lease) bool { return time.Since(l.At) > age })
	return found
}

// pass is one run of tidy over projects.
type pass struct {
	mountID string           // the tag that is looked for; empty: only what is lost
	lost    map[string]lease // creates of this mount that are looked for by their names
	dryRun  bool

	started, finished time.Time
	projects, found   int // looked through; accounts and keys with the tag
	deleted, failed   int
	leftover, errs    []string
	undated           bool // an answer had no Date
}

// fail counts err, if it is one.
func (p *pass) fail(err error) {
	if err == nil {
		return
	}
	if p.failed++; len(p.errs) < maxErrors {
		p.errs = append(p.errs, err.Error())
	}
}

// wants tells whether the pass has to do with what has this name.
func (p *pass) wants(name string) bool {
	_, lost := p.lost[name]
	tag, _, ok := parseName(name)
	return lost || ok && tag == p.mountID
}

// due tells whether something of this name, which the pass wants, is to be deleted: it is lost or, by now, past the end
// in its name by tidyMargin. now is zero when that is not known.
func (p *pass) due(name string, now time.Time) bool {
	if _, ok := p.lost[name]; ok {
		return true
	}
	p.undated = p.undated || now.IsZero()
	_, end, _ := parseName(name)
	return end.Add(tidyMargin).Before(now)
}

// tidyProject deletes what is due in a project: accounts, but those with a key that may have a lease, and keys on
// accounts.
func (b *backend) tidyProject(ctx context.Context, s logical.Storage, p *pass, organization, id string) error {
	var found []lease
	var now time.Time
	err := b.useClient(ctx, s, organization, func(c *client) (err error) {
		found, now, err = c.credentialsNamed(ctx, id, p.wants)
		return err
	})
	if err != nil {
		return fmt.Errorf("project %s: %w", id, err)
	}
	p.found += len(found)
	inUse := map[string]bool{} // accounts, by their ids
	for _, l := range found {
		inUse[l.ServiceAccountID] = inUse[l.ServiceAccountID] || l.KeyOnly && !p.due(l.Name, now)
	}
	for _, l := range found {
		if p.due(l.Name, now) && (l.KeyOnly || !inUse[l.ServiceAccountID]) {
			if err := b.tidyOne(ctx, s, p, &l); err != nil {
				p.fail(fmt.Errorf("project %s, %s: %w", id, l.id(), err))
			}
		}
	}
	return nil
}

// isHeld tells whether a role names the account, or a static role the account or the key.
func isHeld(ctx context.Context, s logical.Storage, l *lease) (held bool, err error) {
	roles, err := getAll(ctx, s, rolePrefix, getRole)
	for _, r := range roles {
		held = held || !l.KeyOnly && r.ServiceAccountID == l.ServiceAccountID
	}
	static, staticErr := listStatic(ctx, s)
	for _, r := range static {
		for _, k := range append(r.Former, r.Key) {
			held = held || k.ServiceAccountID == l.ServiceAccountID && (!l.KeyOnly || k.APIKeyID == l.APIKeyID)
		}
	}
	return held, cmp.Or(err, staticErr)
}

// tidyOne deletes an account or key that is due, unless it is held, perhaps since a moment ago.
func (b *backend) tidyOne(ctx context.Context, s logical.Storage, p *pass, l *lease) error {
	held, err := isHeld(ctx, s, l)
	if held || err != nil {
		return err
	}
	if !p.dryRun {
		err = b.revokeAtOpenAI(ctx, s, l)
		b.metrics.add("tidy_deletions_total", 1, "result", result(err))
	}
	if p.dryRun || err != nil {
		p.leftover = append(p.leftover, l.id())
		return err
	}
	p.deleted++
	b.Logger().Info("deleted what was left behind", "name", l.Name, "project_id", l.ProjectID, "id", l.id())
	b.lostMu.Lock()
	defer b.lostMu.Unlock()
	delete(b.lost, l.Name)
	return nil
}

// inBackground runs work, which mu keeps from running twice at once, until it is done, passTimeout is over or Clean is
// called; nil: it runs already.
func (b *backend) inBackground(mu *sync.Mutex, work func(ctx context.Context)) (done chan struct{}) {
	if !mu.TryLock() {
		return nil
	}
	done = make(chan struct{})
	go func() {
		defer close(done)
		defer mu.Unlock()
		ctx, cancel := context.WithTimeout(b.lifetime, passTimeout)
		defer cancel()
		work(ctx)
	}()
	return done
}

// tidyPeriodically deletes what is known to be left at OpenAI and, when it is time, runs a full pass. It does so
// outside of Vault's tick, which holds a lock.
func (b *backend) tidyPeriodically(s logical.Storage) {
	b.inBackground(&b.sweepMu, func(ctx context.Context) { b.sweep(ctx, s) })
	b.inBackground(&b.seekMu, func(ctx context.Context) { b.seekLost(ctx, s) })
	b.inBackground(&b.passMu, func(ctx context.Context) {
		if _, err := b.getClient(ctx, s); err != nil || time.Now().Before(b.nextPass) {
			return // err: there is no config, or it can't be read
		}
		b.nextPass = time.Now().Add(passInterval)
		if p := b.tidy(ctx, s, &pass{mountID: b.mountID, lost: b.lostSince(lostTime)}, nil); p.failed > 0 {
			b.nextPass = time.Now().Add(retryInterval)
		}
	})
}

// seekLost looks for creates that were lost lately, and deletes what it finds.
func (b *backend) seekLost(ctx context.Context, s logical.Storage) {
	p := &pass{lost: b.lostSince(searchTime)}
	projects := map[string]string{} // organizations by project
	for _, l := range p.lost {
		projects[l.ProjectID] = l.OrganizationID
	}
	for id, organization := range projects {
		p.fail(b.tidyProject(ctx, s, p, organization, id))
	}
	if p.failed > 0 {
		b.Logger().Warn("looking for lost creates failed, will be tried again", "errors", p.errs)
	}
}

// tidy is a full pass: over the projects of these ids, or over all active ones of the organization. The order is of
// chance, so that a pass that is cut off by passTimeout leaves out other projects than the one before.
func (b *backend) tidy(ctx context.Context, s logical.Storage, p *pass, ids []string) *pass {
	p.started = time.Now()
	var organization string
	all := ids
	p.fail(b.useClient(ctx, s, "", func(c *client) (err error) {
		organization = c.config.OrganizationID
		if len(ids) == 0 {
			all, err = c.activeProjects(ctx)
		}
		return err
	}))
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	for _, id := range all {
		err := b.tidyProject(ctx, s, p, organization, id)
		if p.fail(err); err == nil {
			p.projects++
		}
	}
	if p.undated {
		p.fail(errors.New("OpenAI's answers have no Date: nothing was deleted by the end in its name"))
	}
	p.finished = time.Now()
	b.lastPass.Store(p)
	var err error
	if p.failed > 0 {
		err = errors.New(strings.Join(p.errs, "; "))
		b.Logger().Warn("tidy could not do all", "failed", p.failed, "error", err)
	}
	if p.mountID == b.mountID && !p.dryRun && len(ids) == 0 {
		b.metrics.add("tidy_passes_total", 1, "result", result(err))
		b.lastFull.Store(p.finished.Unix())
	}
	b.Logger().Info("tidy has ended", "mount_id", p.mountID, "projects", p.projects, "found", p.found,
		"deleted", p.deleted)
	return p
}

var mountIDPattern = regexp.MustCompile(`^[a-z2-7]{6}$`)

func pathTidy(b *backend) []*framework.Path {
	shown := fieldMap{
		"mount_id": required(text, "The tag in the names that the pass looked for."),
		"dry_run":  required(boolean, "Whether the pass deleted nothing."),
		"started":  required(text, "When the pass began (RFC 3339, UTC); empty: none did since the plugin started."),
		"finished": required(text, "When the pass ended (RFC 3339, UTC)."),
		"projects": required(number, "Number of projects looked through."),
		"found":    required(number, "Number of accounts and keys whose names have the tag."),
		"deleted":  required(number, "Number of those that were deleted."),
		"failed":   required(number, "Number of projects and deletions that failed."),
		"leftover": required(texts, "IDs of what is due and still there, also after a dry run; at most 100."),
		"pending":  required(texts, "IDs of credentials whose revocation failed, to be cleaned up; at most 100."),
		"errors":   required(texts, "What the pass could not do, at most 10 texts."),
	}
	run := operation(b.tidyWrite, "run", "tidy", "Delete what was left behind at OpenAI.", shown)
	read := operation(b.tidyRead, "read", "tidy-status", "Read what the last pass did.", shown)
	run.ForwardPerformanceStandby, read.ForwardPerformanceStandby = true, true
	return []*framework.Path{{
		Pattern: "tidy", DisplayAttrs: display(""),
		Fields: fieldMap{
			"dry_run":     defaulted(boolean, false, "Whether to only list what is due: true or false. Default false."),
			"mount_id":    field(text, "The mount_id of a lost mount, to delete what it left. Default: this mount's."),
			"project_ids": field(texts, "IDs of projects to look through. Default: the organization's active ones."),
		},
		Operations:   operations{logical.UpdateOperation: run, logical.ReadOperation: read},
		HelpSynopsis: "Delete what was left behind at OpenAI.", HelpDescription: tidyHelpDescription,
	}}
}

func (b *backend) tidyWrite(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	p := &pass{mountID: b.mountID, dryRun: d.Get("dry_run").(bool)}
	setID(d, "mount_id", &p.mountID)
	p.mountID = cmp.Or(p.mountID, b.mountID)
	ids := slices.Compact(slices.Sorted(slices.Values(d.Get("project_ids").([]string))))
	switch {
	case b.mountID == "":
		return nil, errNoUUID
	case !mountIDPattern.MatchString(p.mountID):
		return logical.ErrorResponse("mount_id must be 6 letters a to z or digits 2 to 7"), nil
	case slices.ContainsFunc(ids, func(id string) bool { return !validID(id) }):
		return logical.ErrorResponse("project_ids must each be 1 to 128 letters, digits, - or _"), nil
	}
	for _, id := range ids {
		err := b.useClient(ctx, req.Storage, "", func(c *client) error { _, err := c.getProject(ctx, id); return err })
		if isNotFound(err) {
			return answerError(fmt.Errorf("project_ids: %q: %w", id, err))
		}
	}
	if _, err := b.getClient(ctx, req.Storage); err != nil {
		return answerError(err)
	}
	if p.mountID == b.mountID {
		p.lost = b.lostSince(lostTime)
	}
	s := req.Storage
	done := b.inBackground(&b.passMu, func(ctx context.Context) { b.tidy(ctx, s, p, ids) })
	if done == nil {
		return logical.ErrorResponse("a pass is under way: read tidy, and try again when it has ended"), nil
	}
	wait, cancel := context.WithTimeout(ctx, tidyWait)
	defer cancel()
	select {
	case <-done:
		return b.tidyRead(ctx, req, d)
	case <-wait.Done():
	}
	resp, err := b.tidyRead(ctx, req, d)
	if err == nil {
		resp.AddWarning("the pass goes on, and this is what the one before it did: read tidy later")
	}
	return resp, err
}

func (b *backend) tidyRead(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	pending, err := req.Storage.List(ctx, cleanupPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing clean-up entries: %w", err)
	}
	p := cmp.Or(b.lastPass.Load(), &pass{mountID: b.mountID})
	return &logical.Response{Data: map[string]any{
		"mount_id": p.mountID, "dry_run": p.dryRun,
		"started": formatTime(p.started), "finished": formatTime(p.finished),
		"projects": p.projects, "found": p.found, "deleted": p.deleted, "failed": p.failed,
		"leftover": append([]string{}, p.leftover[:min(len(p.leftover), maxListed)]...),
		"pending":  append([]string{}, pending[:min(len(pending), maxListed)]...),
		"errors":   append([]string{}, p.errs...),
	}}, nil
}

func pathMetrics(b *backend) []*framework.Path {
	format := field(text, "prometheus: Prometheus' text format. Default: data, by metric and labels.")
	format.Query = true
	shown := fieldMap{}
	for _, f := range families {
		for _, name := range f.series() {
			shown[metricPrefix+name] = field(framework.TypeFloat, f.help)
			if f.labels != "" {
				shown[metricPrefix+name] = field(framework.TypeMap, f.help+" By "+f.labels+".")
			}
		}
	}
	read := operation(b.metricsRead, "read", "metrics", "Read what this mount has counted on this node.", shown)
	return []*framework.Path{{
		Pattern: "metrics", DisplayAttrs: display(""),
		Fields:       fieldMap{"format": format},
		Operations:   operations{logical.ReadOperation: read},
		HelpSynopsis: "Read what this mount has counted on this node.", HelpDescription: metricsHelpDescription,
	}}
}

func (b *backend) metricsRead(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	all, err := b.gather(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	data := map[string]any{}
	switch d.Get("format").(string) {
	case "prometheus":
		data[logical.HTTPContentType] = "text/plain; version=0.0.4; charset=utf-8"
		data[logical.HTTPRawBody] = all.prometheus()
		data[logical.HTTPStatusCode] = http.StatusOK
	case "":
		for _, f := range families {
			for _, name := range f.series() {
				if value, ok := all[name][""]; ok {
					data[metricPrefix+name] = value
				} else if len(all[name]) > 0 {
					data[metricPrefix+name] = all[name]
				}
			}
		}
	default:
		return logical.ErrorResponse("format must be prometheus or absent"), nil
	}
	return &logical.Response{Data: data}, nil
}

const backendHelp = `
The OpenAI secrets engine makes OpenAI service accounts with API keys on demand and deletes them when their lease ends.
Give it an Admin API key with "config", describe what to hand out with "roles/<name>", and read keys from
"creds/<name>". It rotates its own Admin API key with "config/rotate" or on a schedule. With "config/identity" it hands
out access tokens for which it needs no Admin API key. A key that many read without a lease, and that is rotated for
them, is described with "static-roles/<name>" and read from "static-creds/<name>".
`

// The long help texts of the paths.
const (
	configHelpDescription = `
A write is proved at OpenAI before anything is stored. It changes the fields that it names and keeps the others.
rotation_manager shows who rotates by rotation_period or rotation_schedule: Vault's rotation manager where there is one
(Enterprise), else the plugin, which looks once a minute.
`
	rotateHelpDescription = `
Makes a new Admin API key at OpenAI, proves it, stores it, and deletes the old one. Calls that still use the old one
are repeated with the new one. After a failure config holds a key that works. An old key that could not be deleted is
named in a warning and in config's pending_deletion, and is deleted later.
`
	roleHelpDescription = `
A role names the OpenAI project, what its keys may do, how they are called and how long their leases run. There are
three kinds. With neither scopes nor service_account_id, each key gets a service account of its own, with all that a
member of the project can do. With scopes it also gets one of its own (service_account_role), and is restricted to the
scopes. With service_account_id, keys are made on this existing account, and revocation never deletes the account.

With credential_type=access_token a role hands out access tokens of an existing account, for at most an hour, without
the Admin API: see config/identity. Its write makes a federation rule at OpenAI, and its delete deletes that.

The template can use .RoleName, .RandomSuffix, .ProjectID, .ProjectName and .DisplayName (of the token that asks), and
the functions of Vault's user name templates. What is not a letter, digit, - or _ becomes -. A name ends in - and
.RandomSuffix, 19 characters from which tidy knows it: where the template does not end so, both are appended, and what
is longer than 64 characters is cut before them.
`
	credsHelpDescription = `
Each read makes a new API key as the role says. The lease can be renewed up to the role's max_ttl; when it ends or is
revoked, the service account is deleted with its key. Where the role names an existing account, only the key is. An
access token, also in api_key, lasts as long as its lease, which can't be renewed; revocation does not end it.
`
	identityHelpDescription = `
Makes a key that signs JWTs, and the mount an identity provider (workload identity federation) at OpenAI with the
public key. Roles with credential_type=access_token then exchange JWTs for tokens, without the Admin API key, which may
be deleted after the set-up. With a config the plugin makes the provider. Without one, or with identity_provider_id, an
operator makes it, with the issuer, audience and jwks that a read shows. All but identity_provider_id is fixed: delete
the identity and write it anew. A delete also deletes the provider and the rules that the plugin made.
`
	identityRotateHelpDescription = `
Publishes a new key beside the present one, waits until OpenAI accepts a JWT of it, and signs with it from then on. The
former key stays published for as long as a token of it can live. Where the plugin can't give OpenAI the keys, it
answers the new jwks and goes on signing with the present key until it is called with confirm=true.
`
	tidyHelpDescription = `
The name of each account and key that this mount makes tells which mount made it (mount_id) and by when nobody can have
a lease of it. A pass lists the accounts and keys of the organization's active projects and deletes those that have
this mount's mount_id and are past their end by ten minutes, and those whose creation failed although OpenAI carried it
out. It never deletes an account that a role names, nor anything of another name. A pass runs two to three minutes
after the plugin's process starts and then each hour. A write runs one now and waits for it up to 30 seconds. Of a
mount that is lost it deletes only what is past its end. A read shows the last pass.
`
	metricsHelpDescription = `
Prometheus scrapes this through Vault, with a token whose policy may read this path. Counters begin at 0 when the
plugin's process starts, and each Vault node counts what it did itself.
`
)
