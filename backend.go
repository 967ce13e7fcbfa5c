// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/locksutil"
	"github.com/hashicorp/vault/sdk/logical"
)

// How long things take. The compiler checks the relations that follow each of them.
const (
	// requestTimeout bounds a request with its OpenAI calls and waits. Vault cancels most after 90 s
	// (default_max_request_duration) and gives a revocation 90 s: this leaves time to undo and to answer.
	requestTimeout = 75 * time.Second
	attemptTimeout = 25 * time.Second // one exchange with OpenAI
	undoTimeout    = 10 * time.Second // to undo a create that failed, after its request has ended
	tickTimeout    = 30 * time.Second // the work of a tick: Vault's state lock is held meanwhile

	// keyGrace is how long OpenAI lets a key live after its lease's end, for clocks that differ and answers that are
	// slow: OpenAI counts from when it gets the request, Vault counts the lease from the plugin's answer.
	keyGrace = time.Minute
	_        = uint(keyGrace - attemptTimeout)

	// tidyMargin is how long after the end in its name a credential is deleted. The end comes too early by as much as
	// this machine's clock was behind when the credential was made, and a create and a renewal may each wait.
	tidyMargin     = 10 * time.Minute
	clockTolerance = 5 * time.Minute // how far it may be behind
	_              = uint(tidyMargin - clockTolerance - 2*requestTimeout)
)

// schedule is when a key of the engine's own is rotated.
type schedule struct {
	// LastRotatedTime is when the key was written or rotated.
	LastRotatedTime time.Time `json:"last_rotated_time"`
	automatedrotationutil.AutomatedRotationParams
}

// config is the storage entry "config". The older plugin's entry has the fields up to and including schedule.
type config struct {
	AdminAPIKey    string `json:"admin_api_key"`
	AdminAPIKeyID  string `json:"admin_api_key_id"` // empty in entries of the earliest versions
	APIEndpoint    string `json:"api_endpoint"`     // without a trailing slash
	OrganizationID string `json:"organization_id"`
	schedule

	// RotationManager is who rotates on schedule: one of the manager constants of rotate.go; empty in the older
	// plugin's entries.
	RotationManager string        `json:"rotation_manager,omitempty"`
	Rotated         bool          `json:"rotated,omitempty"`          // a rotation of this mount made the key
	PendingDeletion []string      `json:"pending_deletion,omitempty"` // ids of keys to be deleted at OpenAI
	Creating        []creatingKey `json:"creating,omitempty"`         // begun by rotations; OpenAI may have them or not
	AdminKeyTTL     time.Duration `json:"admin_key_ttl,omitempty"`    // of keys that rotation makes; 0: without end
	AdminKeyExpires time.Time     `json:"admin_key_expires,omitzero"` // at OpenAI; zero: never, or not known
	// CACertificate, ClientCertificate and ClientKey are PEM for TLS with OpenAI; empty: the system's authorities
	// alone, and no certificate of our own.
	CACertificate     string `json:"ca_certificate,omitempty"`
	ClientCertificate string `json:"client_certificate,omitempty"`
	ClientKey         string `json:"client_key,omitempty"`
}

// creatingKey is an admin key, or a key of a static role, that is stored before OpenAI is asked to make it.
type creatingKey struct {
	Name           string    `json:"name"`
	OrganizationID string    `json:"organization_id"`
	ProjectID      string    `json:"project_id,omitempty"` // of a static role's key
	Since          time.Time `json:"since"`
}

// role is the storage entry "roles/<name>". The older plugin's entry has the fields up to and including MaxTTL.
type role struct {
	ProjectID                  string        `json:"project_id"`
	ServiceAccountNameTemplate string        `json:"service_account_name_template"`
	ServiceAccountDescription  string        `json:"service_account_description"`
	TTL                        time.Duration `json:"ttl"`     // nanoseconds
	MaxTTL                     time.Duration `json:"max_ttl"` // nanoseconds

	// UnexpiringKeys is the opposite of enforce_key_expiry, so that its absence in an older entry means the default.
	UnexpiringKeys     bool     `json:"unexpiring_keys,omitempty"`
	Scopes             []string `json:"scopes,omitempty"`               // of the keys; none: all that their account can
	ServiceAccountRole string   `json:"service_account_role,omitempty"` // of the account of a scoped key; empty: member
	// ServiceAccountID is the account that keys are made on; empty: each key has its own. ServiceAccountName is what
	// OpenAI called it when the role was written.
	ServiceAccountID   string `json:"service_account_id,omitempty"`
	ServiceAccountName string `json:"service_account_name,omitempty"`
	// CredentialType is accessToken, or empty for API keys.
	CredentialType string `json:"credential_type,omitempty"`
}

// identity is the storage entry "config/identity": what the mount needs to exchange its own JWTs for access tokens.
type identity struct {
	Issuer        string `json:"issuer"`
	Audience      string `json:"audience"`
	TokenEndpoint string `json:"token_endpoint"` // without a trailing slash
	CACertificate string `json:"ca_certificate,omitempty"`
	// ProviderID is what OpenAI calls the mount as an identity provider; empty: it does not know it yet.
	ProviderID string `json:"identity_provider_id,omitempty"`
	// OrganizationID is set when the plugin made the provider, in this organization; empty: an operator makes it.
	OrganizationID string `json:"organization_id,omitempty"`

	Key  *signingKey `json:"key"`            // signs
	Next *signingKey `json:"next,omitempty"` // signs when a rotation has ended that has begun; nil: none has
	// Former is the key that signed before the last rotation. It is published until no token of it can be alive.
	Former      jwk       `json:"former,omitzero"`
	FormerUntil time.Time `json:"former_until,omitzero"`
}

// signingKey is an RSA key: what is published of it, and the key itself.
type signingKey struct {
	jwk
	PrivateKey []byte    `json:"private_key"` // PKCS #1
	Created    time.Time `json:"created"`
}

// jwk is a public key as RFC 7517 has it. KeyID is its thumbprint (RFC 7638); N and E are in base64url.
type jwk struct {
	Type      string `json:"kty"`
	Use       string `json:"use"`
	Algorithm string `json:"alg"`
	KeyID     string `json:"kid"`
	N         string `json:"n"`
	E         string `json:"e"`
}

// lease tells what to delete at OpenAI. It is the internal data of a lease, of which the older plugin wrote the first
// three fields, and the storage entry "cleanup/<id>" of a credential that could not be deleted yet.
type lease struct {
	APIKeyID         string `json:"api_key_id"`
	ServiceAccountID string `json:"service_account_id"`
	ProjectID        string `json:"project_id"`
	OrganizationID   string `json:"organization_id,omitempty"`
	Role             string `json:"role,omitempty"`
	KeyExpires       bool   `json:"key_expires,omitempty"` // OpenAI expires the key, so that a renewal must move that
	KeyOnly          bool   `json:"key_only,omitempty"`    // revocation deletes the key and leaves the account
	End              int64  `json:"end,omitempty"`         // Unix seconds of the end that the name has
	Failures         int    `json:"failures,omitempty"`    // revocations that failed; of a clean-up entry

	// Of an account or key while it is made, or found in a list:
	Name string    `json:"-"`
	At   time.Time `json:"-"` // when its creation was lost
}

// staticRole is the storage entry "static-roles/<name>". One without a key is no role: it names what is left to be
// deleted of a role that was deleted, or whose first key was not stored.
type staticRole struct {
	ProjectID        string   `json:"project_id"`
	ServiceAccountID string   `json:"service_account_id"`
	Scopes           []string `json:"scopes,omitempty"`
	schedule
	Overlap  time.Duration `json:"overlap"` // how long a replaced key lives on
	Key      staticKey     `json:"key"`
	Former   []staticKey   `json:"former,omitempty"`   // replaced keys
	Creating []creatingKey `json:"creating,omitempty"` // of which it is not known whether OpenAI made them
}

type staticKey struct {
	lease
	Value   string    `json:"value,omitempty"`  // empty when it is replaced
	Expires time.Time `json:"expires,omitzero"` // at OpenAI; zero: never
	Until   time.Time `json:"until,omitzero"`   // when it is deleted, once it is replaced
}

// Where the entries are, and defaults of what is in them.
const (
	configPath    = "config"
	identityPath  = "config/identity"
	rolePrefix    = "roles/"
	staticPrefix  = "static-roles/"
	cleanupPrefix = "cleanup/"

	defaultEndpoint     = "https://api.openai.com/v1"
	defaultTTL          = time.Hour
	defaultMaxTTL       = 24 * time.Hour
	maxKeyLife          = 365 * 24 * time.Hour // OpenAI's limit of expires_in_seconds
	defaultNameTemplate = "vault-{{.RoleName}}-{{.RandomSuffix}}"
	defaultDescription  = "Service account created by Vault"
)

// getJSON reads a storage entry into out, and returns out; nil when there is none.
func getJSON[T any](ctx context.Context, s logical.Storage, key string, out *T) (*T, error) {
	entry, err := s.Get(ctx, key)
	if err == nil && entry == nil {
		return nil, nil
	}
	if err == nil {
		err = entry.DecodeJSON(out)
	}
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", key, err)
	}
	return out, nil
}

// getAll reads all entries below prefix, by name, each with get.
func getAll[T any](ctx context.Context, s logical.Storage, prefix string,
	get func(context.Context, logical.Storage, string) (*T, error)) (map[string]*T, error) {
	all := map[string]*T{}
	names, err := s.List(ctx, prefix)
	for i := 0; err == nil && i < len(names); i++ {
		all[names[i]], err = get(ctx, s, names[i])
	}
	maps.DeleteFunc(all, func(_ string, v *T) bool { return v == nil })
	return all, err
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

// remarshal copies in to out by way of JSON, as Vault does with a lease's internal data.
func remarshal(in, out any) error {
	raw, err := json.Marshal(in)
	if err == nil {
		err = json.Unmarshal(raw, out)
	}
	return err
}

// getConfig reads the config; nil when there is none.
func getConfig(ctx context.Context, s logical.Storage) (*config, error) {
	cfg, err := getJSON(ctx, s, configPath, &config{})
	if cfg != nil {
		cfg.APIEndpoint = strings.TrimRight(cfg.APIEndpoint, "/") // as the older plugin may have it
	}
	return cfg, err
}

// getIdentity reads the identity; nil when there is none, or one without a key.
func getIdentity(ctx context.Context, s logical.Storage) (*identity, error) {
	id, err := getJSON(ctx, s, identityPath, &identity{})
	if id == nil || id.Key == nil {
		return nil, err
	}
	return id, err
}

// newRole returns a role with the defaults; its TTL depends on MaxTTL, see update.
func newRole() *role {
	return &role{
		ServiceAccountNameTemplate: defaultNameTemplate, ServiceAccountDescription: defaultDescription,
		MaxTTL: defaultMaxTTL,
	}
}

// getRole reads a role; nil when there is none.
func getRole(ctx context.Context, s logical.Storage, name string) (*role, error) {
	r, err := getJSON(ctx, s, rolePrefix+name, newRole())
	if err != nil || r == nil {
		return nil, err
	}
	if r.MaxTTL = min(r.MaxTTL, maxKeyLife); r.MaxTTL <= 0 { // an older entry may have more
		r.MaxTTL = defaultMaxTTL
	}
	if r.TTL = min(r.TTL, r.MaxTTL); r.TTL <= 0 {
		r.TTL = min(defaultTTL, r.MaxTTL)
	}
	return r, nil
}

// tokenRoles reads the roles of access tokens, by name.
func tokenRoles(ctx context.Context, s logical.Storage) (map[string]*role, error) {
	roles, err := getAll(ctx, s, rolePrefix, getRole)
	maps.DeleteFunc(roles, func(_ string, r *role) bool { return r.CredentialType != accessToken })
	return roles, err
}

var idPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)

// validID tells whether id may go into a URL and into storage.
func validID(id string) bool { return idPattern.MatchString(id) }

// id returns the id of what the lease's revocation deletes: the key or the account. It is empty until that is made.
func (l *lease) id() string {
	if l.KeyOnly {
		return l.APIKeyID
	}
	return l.ServiceAccountID
}

// leaseOf reads what a lease holds.
func leaseOf(secret *logical.Secret) (*lease, error) {
	l := &lease{}
	if err := remarshal(secret.InternalData, l); err != nil {
		return nil, fmt.Errorf("reading the lease: %w", err)
	}
	if !validID(l.ProjectID) || !validID(l.id()) {
		return nil, errors.New("the lease lacks the ids of what it stands for")
	}
	return l, nil
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

// The name of each account or key that this plugin makes ends in "-" and a suffix of three parts, from which tidy
// knows, without a list of its own, that nobody can have a lease of it any more:
//
//	tag     6 characters: the mount that made it (mount_id)
//	end     5 characters: the minute since 1970, in base 36, by which no lease or key of it is alive
//	random  8 characters: 40 bits
const (
	suffixLength  = 6 + 5 + 8
	maxNameLength = 64 // characters of an account's name
)

// suffixPattern matches the end of a name. Tag and random are in the alphabet of base 32.
var suffixPattern = regexp.MustCompile(`-([a-z2-7]{6})([0-9a-z]{5})[a-z2-7]{8}$`)

// mountID returns the tag of a mount from the UUID that Vault keeps for it over restarts, nodes, restores and
// remounts (BackendUUID); empty when there is none.
func mountID(uuid string) string {
	if uuid == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(uuid))
	return strings.ToLower(base32.StdEncoding.EncodeToString(sum[:])[:6])
}

// endOf returns when nothing of a credential can be alive whose request began at start, as a whole minute. Vault
// counts the lease from the answer, at most requestTimeout later, and OpenAI ends the key keyGrace after the lease.
func endOf(start time.Time, maxTTL time.Duration) time.Time {
	end := start.Add(requestTimeout + maxTTL + keyGrace)
	return end.Add(time.Minute - time.Nanosecond).Truncate(time.Minute)
}

// newSuffix returns the suffix of a new name.
func newSuffix(tag string, end time.Time) string {
	return fmt.Sprintf("%s%05s%s", tag, strconv.FormatInt(end.Unix()/60, 36), strings.ToLower(rand.Text()[:8]))
}

// parseName returns the tag and the end that a name carries; false: it carries none.
func parseName(name string) (tag string, end time.Time, ok bool) {
	m := suffixPattern.FindStringSubmatch(name)
	if m == nil {
		return "", time.Time{}, false
	}
	minutes, _ := strconv.ParseInt(m[2], 36, 64)
	return m[1], time.Unix(60*minutes, 0), true
}

// backend is one mount of the secrets engine.
type backend struct {
	*framework.Backend

	mountID   string // the tag in the names of what this mount makes; empty: Vault gave no UUID
	transport http.RoundTripper
	throttle  *throttle // of the Admin API: all its clients share it, as they share transport
	metrics   *metrics
	// enterprise tells whether Vault keeps observations and events. The community edition drops them.
	enterprise func() bool

	mu       sync.Mutex   // guards client and signer
	client   *client      // of the stored config; nil until it is needed
	signer   *signer      // of the stored identity; likewise
	refusals atomic.Int32 // revocations in a row that were answered 401

	// configMu is held by whoever changes config or makes or deletes admin keys, from reading config to writing it.
	configMu     sync.Mutex
	roleLocks    []*locksutil.LockEntry // see lock
	staticSought sync.Map               // when names in Creating of static roles were last looked for
	retries      sync.Map               // of type backoff: scheduled rotations that failed, by the key's storage entry

	// identityMu is held by whoever changes the identity or what OpenAI has of it: the provider and its rules.
	identityMu sync.Mutex

	lostMu sync.Mutex
	lost   map[string]lease // creates of which OpenAI may have made something, or may yet, by name. Guarded by lostMu.

	lifetime context.Context      // ends with Clean
	lastPass atomic.Pointer[pass] // the last full pass of tidy that ended; nil: none
	lastFull atomic.Int64         // Unix seconds of the end of the last one over all projects; 0: none
	sweepMu  sync.Mutex           // held while sweep runs, and for good after Clean
	seekMu   sync.Mutex           // likewise, for seekLost
	passMu   sync.Mutex           // likewise, for a full pass of tidy; guards nextPass
	nextPass time.Time            // when the next one begins
	staticMu sync.Mutex           // likewise, for a pass over static roles
}

// What OpenAI knows this mount and a role of access tokens by: the names of the provider and of the rule, from which a
// crash's remains are found again, and the sub of the role's JWTs.
func (b *backend) providerName() string        { return "vault-" + b.mountID }
func (b *backend) ruleName(role string) string { return b.providerName() + "-" + role }
func (b *backend) subject(role string) string  { return "vault:" + b.mountID + ":" + role }

// Factory makes the backend of a mount. Vault also calls it to register the plugin, without storage, system view or
// UUID: it does nothing but set up.
func Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := newBackend(newTransport(), mountID(conf.BackendUUID))
	if err := b.Setup(ctx, conf); err != nil {
		return nil, fmt.Errorf("setting up the backend: %w", err)
	}
	return b, nil
}

func newBackend(transport http.RoundTripper, mountID string) *backend {
	b := &backend{mountID: mountID, transport: transport, throttle: newThrottle(), metrics: newMetrics()}
	b.roleLocks = locksutil.CreateLocks()
	b.lost, b.nextPass = map[string]lease{}, time.Now().Add(firstPass)
	b.enterprise = sync.OnceValue(func() bool {
		env, err := b.System().PluginEnv(context.Background())
		return err != nil || strings.HasPrefix(env.GetVaultVersionMetadata(), "ent")
	})
	lifetime, stop := context.WithCancel(context.Background())
	b.lifetime = lifetime
	clean := sync.OnceFunc(func() {
		stop()
		b.sweepMu.Lock() // waits for what runs to end, and keeps more from beginning
		b.seekMu.Lock()
		b.passMu.Lock()
		b.staticMu.Lock()
	})
	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: version,
		Help:           strings.TrimSpace(backendHelp),
		Paths: framework.PathAppend(pathConfig(b), pathIdentity(b), pathRoles(b), pathCreds(b), pathTidy(b),
			pathMetrics(b), pathStatic(b)),
		Secrets: []*framework.Secret{
			{Type: secretType, Fields: secretFields(), Renew: b.credRenew, Revoke: b.credRevoke},
			{Type: tokenSecretType, Fields: secretFields(), Revoke: b.tokenRevoke}, // not renewable
		},
		PathsSpecial: &logical.Paths{
			LocalStorage:    []string{cleanupPrefix}, // it belongs to this cluster's leases
			SealWrapStorage: []string{configPath, identityPath, staticPrefix},
		},
		Invalidate:       b.invalidate,
		PeriodicFunc:     b.periodic,
		RotateCredential: b.rotateCredential,
		Clean:            func(context.Context) { clean() },
	}
	return b
}

// HandleRequest bounds every request: Vault gives most of them no deadline of their own. It refuses values of the wrong
// type before the framework does, whose error would quote them: one may be a key.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (resp *logical.Response, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	maps.DeleteFunc(req.Data, func(_ string, v any) bool { return v == nil }) // null is the same as not named
	d := &framework.FieldData{Raw: req.Data}
	if path := b.Route(req.Path); path != nil {
		d.Schema = path.Fields
	}
	for name, field := range d.Schema {
		_, _, err := d.GetOkErr(name)
		empty := req.Data[name] == "" && (field.Type == boolean || field.Type == duration) // else it is false or 0
		if err != nil || empty {
			resp = logical.ErrorResponse("%s does not take this value: %s", name, field.Description)
		}
	}
	ofLease := req.Operation == logical.RenewOperation || req.Operation == logical.RevokeOperation
	if ofLease && b.System().ReplicationState().HasState(consts.ReplicationPerformanceStandby) {
		return nil, logical.ErrReadOnly // the active node does it: the framework passes on operations of paths only
	}
	if resp == nil {
		resp, err = b.Backend.HandleRequest(ctx, req)
	}
	if reflect.DeepEqual(resp, &logical.Response{}) {
		resp = nil // so that a success that the framework had nothing to warn of has no body
	}
	if err == nil && resp.IsError() {
		b.Logger().Debug("request refused", "path", req.Path, "operation", req.Operation, "error", resp.Error())
	}
	return resp, err
}

// HandleExistenceCheck asks without the values, which exists does not need: the framework would quote one of the wrong
// type in its error. HandleRequest refuses that.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checked, exists bool, err error) {
	bare := *req
	bare.Data = nil
	return b.Backend.HandleExistenceCheck(ctx, &bare)
}

// invalidate drops what is made from a storage entry that has changed, or may have, here or on another node: the next
// call or token makes it anew. Nothing else of storage is kept in memory.
func (b *backend) invalidate(_ context.Context, key string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch key {
	case configPath:
		b.client = nil
	case identityPath:
		b.signer = nil
	}
}

// lock locks the storage entry of a role or static role, and returns the lock. Whoever changes the role, or deletes the
// keys of a static one, holds it from reading the entry to writing it.
func (b *backend) lock(entry string) *locksutil.LockEntry {
	lock := locksutil.LockForKey(b.roleLocks, entry)
	lock.Lock()
	return lock
}

// periodic is called by Vault about every minute, on every node. Its errors are only logged: Vault would drop them.
func (b *backend) periodic(ctx context.Context, req *logical.Request) error {
	ctx, cancel := context.WithTimeout(ctx, tickTimeout)
	defer cancel()
	if b.WriteSafeReplicationState() {
		b.rotatePeriodically(ctx, req)
		b.withdrawFormer(ctx, req.Storage)
		b.staticPeriodically(req)
	}
	// What is left of credentials belongs to this cluster's leases, and to its active node.
	if !b.System().ReplicationState().HasState(consts.ReplicationDRSecondary | consts.ReplicationPerformanceStandby) {
		b.tidyPeriodically(req.Storage)
	}
	return nil
}

// report tells of a change, or of err that kept it from happening: in the log and, on Vault Enterprise, as an
// observation and an event named openai/<change>, or openai/<change>-fail. pairs are names and values, plain and
// never secret. Changes of credentials are logged at debug level: there are many.
func (b *backend) report(ctx context.Context, req *logical.Request, change string, err error, pairs ...any) {
	log := b.Logger().Info
	pairs = append(pairs, "mount", req.MountPoint, "request_id", req.ID)
	switch {
	case err != nil:
		change += "-fail"
		pairs = append(pairs, "error", err.Error())
		log = b.Logger().Warn
	case strings.HasPrefix(change, "creds-"):
		log = b.Logger().Debug
	}
	log(change, pairs...)
	if !b.enterprise() {
		return
	}
	data := make(map[string]any, len(pairs)/2)
	metadata := []string{
		logical.EventMetadataModified, strconv.FormatBool(err == nil),
		logical.EventMetadataOperation, change, "path", req.Path,
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		name, value := fmt.Sprint(pairs[i]), fmt.Sprint(pairs[i+1])
		data[name] = value
		metadata = append(metadata, name, value)
	}
	_ = b.RecordObservationWithRequest(ctx, req, "openai/"+change, data)
	_ = logical.SendEvent(ctx, b, "openai/"+change, metadata...)
}

// result is the metrics' label for err.
func result(err error) string {
	if err != nil {
		return "failure"
	}
	return "success"
}

const metricPrefix = "vault_openai_"

// family is a metric as the metrics path shows it. Its name lacks metricPrefix; labels are their names.
type family struct {
	name, kind, help, labels string
}

var families = []family{
	{"credential_operations_total", "counter", "Credentials issued, renewed and revoked.", "role, operation, result"},
	{"revocations_handed_over_total", "counter", "Revocations that the plugin took over from Vault.", ""},
	{"api_requests_total", "counter", "Requests to OpenAI, retries included; error: no answer.", "operation, status"},
	{"api_request_duration_seconds", "histogram", "Duration of a request to OpenAI.", "operation"},
	{"api_retries_total", "counter", "Requests repeated, by the HTTP status before; connection: no answer.", "reason"},
	{"api_rate_limit_wait_seconds_total", "counter", "Time that calls spent waiting for OpenAI's rate limit.", ""},
	{"rotations_total", "counter", "Rotations of the admin API key.", "trigger, result"},
	{"token_exchanges_total", "counter", "Exchanges of JWTs for access tokens, for creds.", "result"},
	{"signing_key_created_timestamp_seconds", "gauge", "When the key was made that signs; absent: no identity.", ""},
	{"cleanups_total", "counter", "Attempts to clean up credentials.", "result"},
	{"tidy_passes_total", "counter", "Full passes of tidy; failure: it could not do all.", "result"},
	{"tidy_deletions_total", "counter", "Deletions of what was lost, or past the end in its name.", "result"},
	{"tidy_last_pass_timestamp_seconds", "gauge", "When the last full pass of tidy ended; absent: none yet.", ""},
	{"lost_creates", "gauge", "Creates whose answer was lost, and that tidy looks for.", ""},
	{"cleanups_pending", "gauge", "Credentials that wait to be cleaned up at OpenAI.", ""},
	{"admin_key_last_rotation_timestamp_seconds", "gauge", "When the admin API key was written or rotated.", ""},
	{"admin_key_next_rotation_timestamp_seconds", "gauge", "When the admin API key is due; absent: never.", ""},
	{"admin_key_expiry_timestamp_seconds", "gauge", "When the admin API key expires at OpenAI; absent: never.", ""},
	{"admin_keys_pending_deletion", "gauge", "Admin API keys still to be deleted at OpenAI.", ""},
	{"static_rotations_total", "counter", "Rotations of static roles' keys.", "role, result"},
	{"static_key_last_rotation_timestamp_seconds", "gauge", "When a static role's key was made.", "role"},
	{"static_rotations_overdue", "gauge", "Static roles whose rotation is overdue by two minutes or more.", ""},
	{"build_info", "gauge", "Always 1, with the versions of the plugin and of Go.", "version, goversion"},
}

// durationBuckets are the upper bounds of the histogram's buckets, in seconds.
var durationBuckets = []float64{0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, math.Inf(1)}

// series are values by name, without metricPrefix, and by labels as Prometheus' text format has them within its braces.
type series map[string]map[string]float64

// add adds n. labels are names and values. No value has a quote: a role's name has none.
func (s series) add(name string, n float64, labels ...string) {
	var text []string
	for i := 0; i+1 < len(labels); i += 2 {
		text = append(text, labels[i]+`="`+labels[i+1]+`"`)
	}
	if s[name] == nil {
		s[name] = map[string]float64{}
	}
	s[name][strings.Join(text, ",")] += n
}

// metrics counts what a mount does, since the plugin's process has started.
type metrics struct {
	mu     sync.Mutex
	series series // guarded by mu
}

// newMetrics returns metrics whose bounded series are there from the start, so that Prometheus sees the first event
// too.
func newMetrics() *metrics {
	m := &metrics{series: series{}}
	m.add("revocations_handed_over_total", 0)
	m.add("api_rate_limit_wait_seconds_total", 0)
	for _, result := range []string{"success", "failure"} {
		for _, name := range []string{"cleanups_total", "tidy_passes_total", "tidy_deletions_total",
			"token_exchanges_total"} {
			m.add(name, 0, "result", result)
		}
		for _, trigger := range []string{"manual", managerPlugin, managerVault} {
			m.add("rotations_total", 0, "trigger", trigger, "result", result)
		}
	}
	return m
}

// add counts n more. labels are names and values.
func (m *metrics) add(name string, n float64, labels ...string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.series.add(name, n, labels...)
}

// observe counts a request to OpenAI that took d.
func (m *metrics) observe(operation string, d time.Duration) {
	const name = "api_request_duration_seconds"
	for _, bound := range durationBuckets {
		if d.Seconds() <= bound {
			m.add(name+"_bucket", 1, "operation", operation, "le", fmt.Sprint(bound))
		}
	}
	m.add(name+"_sum", d.Seconds(), "operation", operation)
	m.add(name+"_count", 1, "operation", operation)
}

// gather returns all there is to show.
func (b *backend) gather(ctx context.Context, s logical.Storage) (series, error) {
	all := series{}
	b.metrics.mu.Lock()
	for name, values := range b.metrics.series {
		all[name] = maps.Clone(values)
	}
	b.metrics.mu.Unlock()
	all.add("build_info", 1, "version", version, "goversion", runtime.Version())
	cleanups, err := s.List(ctx, cleanupPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing clean-up entries: %w", err)
	}
	all.add("cleanups_pending", float64(len(cleanups)))
	all.add("lost_creates", float64(len(b.lostSince(lostTime))))
	cfg, err := getConfig(ctx, s)
	id, idErr := getIdentity(ctx, s)
	static, staticErr := getAll(ctx, s, staticPrefix, getStatic)
	if err = cmp.Or(err, idErr, staticErr); err != nil {
		return nil, err
	}
	now := time.Now()
	all.add("static_rotations_overdue", 0)
	for name, r := range static {
		all.add("lost_creates", float64(len(r.Creating)))
		if !r.exists() {
			continue
		}
		all.add("static_key_last_rotation_timestamp_seconds", float64(r.LastRotatedTime.Unix()), "role", name)
		if now.Sub(r.nextRotation(now)) >= staticOverdue {
			all.add("static_rotations_overdue", 1)
		}
	}
	times := map[string]time.Time{}
	if cfg != nil {
		all.add("admin_keys_pending_deletion", float64(len(cfg.PendingDeletion)))
		times["admin_key_last_rotation"], times["admin_key_expiry"] = cfg.LastRotatedTime, cfg.AdminKeyExpires
		times["admin_key_next_rotation"] = cfg.nextRotation(now)
		times["tidy_last_pass"] = unixTime(b.lastFull.Load())
	}
	if id != nil {
		times["signing_key_created"] = id.Key.Created
	}
	for name, t := range times {
		if !t.IsZero() {
			all.add(name+"_timestamp_seconds", float64(t.Unix()))
		}
	}
	return all, nil
}

// series returns the names of the family's series: a histogram has three.
func (f family) series() []string {
	if f.kind == "histogram" {
		return []string{f.name + "_bucket", f.name + "_sum", f.name + "_count"}
	}
	return []string{f.name}
}

// byBound orders labels, those of buckets by their bound.
func byBound(x, y string) int {
	split := func(labels string) (others string, bound float64) {
		others, le, _ := strings.Cut(strings.TrimSuffix(labels, `"`), `,le="`)
		bound, _ = strconv.ParseFloat(le, 64)
		return others, bound
	}
	xOthers, xBound := split(x)
	yOthers, yBound := split(y)
	return cmp.Or(cmp.Compare(xOthers, yOthers), cmp.Compare(xBound, yBound))
}

// prometheus writes all in Prometheus' text format, version 0.0.4.
func (s series) prometheus() []byte {
	var out bytes.Buffer
	for _, f := range families {
		header := fmt.Sprintf("# HELP %[1]s %[2]s\n# TYPE %[1]s %[3]s\n", metricPrefix+f.name, f.help, f.kind)
		for _, name := range f.series() {
			for _, labels := range slices.SortedFunc(maps.Keys(s[name]), byBound) {
				value := strconv.FormatFloat(s[name][labels], 'f', -1, 64)
				braces := strings.TrimSuffix("{"+labels+"}", "{}")
				fmt.Fprintf(&out, "%s%s%s%s %s\n", header, metricPrefix, name, braces, value)
				header = ""
			}
		}
	}
	return out.Bytes()
}
