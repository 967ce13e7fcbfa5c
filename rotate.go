// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"
)

// Who rotates on schedule.
const (
	managerVault  = "vault"  // Vault's rotation manager (Enterprise), through rotateCredential
	managerPlugin = "plugin" // periodic, where Vault has no rotation manager
	managerNone   = "none"
)

const (
	proofTimeout   = 20 * time.Second // until a new admin key must be accepted by OpenAI
	maxProofWait   = 2 * time.Second  // between two tries of that
	minRotateRetry = time.Minute      // after a scheduled rotation failed, doubling
	maxRotateRetry = time.Hour

	// creatingRest is how long a key in Creating is left alone: another node may still be making it.
	creatingRest = 2 * time.Minute
	_            = uint(creatingRest - requestTimeout - undoTimeout)
	maxCreating  = 50
)

// errKeyID marks an admin_api_key_id that is not the key's, or that can't be found.
var errKeyID = errors.New("admin_api_key_id is required")

// ownKey proves the client's key and returns what OpenAI knows of it: under the configured id, if that is of this
// very key, else the only one whose redacted value fits.
func (c *client) ownKey(ctx context.Context) (*adminKey, error) {
	fits := func(k adminKey) bool { return k.fits(c.config.AdminAPIKey) }
	if id := c.config.AdminAPIKeyID; id != "" {
		k, err := c.getAdminKey(ctx, id)
		if err == nil && !fits(*k) {
			err = fmt.Errorf("%w: %q is the id of another key, which a rotation would delete", errKeyID, id)
		}
		return k, err
	}
	keys, _, err := c.adminKeysWhere(ctx, fits)
	if err == nil && len(keys) != 1 {
		err = fmt.Errorf("%w: %d of the organization's keys fit admin_api_key", errKeyID, len(keys))
	}
	if err != nil {
		return nil, err
	}
	return &keys[0], nil
}

// updateRotation sets the rotation fields that d names. Its error is the caller's.
func (cfg *config) updateRotation(d *fieldData) error {
	// The helper takes the window only together with the schedule; a schedule that is already stored will do.
	if _, named := d.Raw["rotation_window"]; named && cfg.RotationSchedule != "" {
		if _, named := d.Raw["rotation_schedule"]; !named {
			d.Raw["rotation_schedule"] = cfg.RotationSchedule
		}
	}
	if err := cfg.ParseAutomatedRotationFields(d); err != nil {
		return err
	}
	if cfg.RotationSchedule == "" {
		cfg.RotationWindow = 0
	}
	switch {
	case cfg.RotationPeriod != 0 && cfg.RotationSchedule != "":
		return errors.New("rotation_period and rotation_schedule exclude each other: clear one, with " +
			"rotation_period=0 or rotation_schedule=\"\"")
	case strings.Contains(cfg.RotationSchedule, "TZ="):
		return errors.New("rotation_schedule is in UTC and takes no time zone")
	case cfg.RotationSchedule != "" && !cfg.DisableAutomatedRotation && cfg.nextRotation(time.Now()).IsZero():
		return errors.New("rotation_schedule has no time to come")
	case cfg.RotationWindow != 0:
		if err := rotation.DefaultScheduler.ValidateRotationWindow(int(cfg.RotationWindow.Seconds())); err != nil {
			return err
		}
	}
	if cfg.AdminKeyTTL == 0 {
		return nil
	}
	switch gap := cfg.longestGap(time.Now()); {
	case gap == 0:
		return errors.New("admin_key_ttl needs rotation_period or rotation_schedule, and no " +
			"disable_automated_rotation: the key would expire without a successor")
	case cfg.AdminKeyTTL < 2*gap:
		return fmt.Errorf("admin_key_ttl must be at least twice the longest time between rotations, %s", 2*gap)
	case cfg.AdminKeyTTL > maxKeyLife:
		return errors.New("admin_key_ttl must be at most 365 days")
	}
	return nil
}

// longestGap returns the longest time between scheduled rotations within a year; 0 when there are none. A schedule of
// each minute takes about half a second.
func (cfg *config) longestGap(now time.Time) (longest time.Duration) {
	if cfg.DisableAutomatedRotation {
		return 0
	}
	if cfg.RotationPeriod != 0 {
		return cfg.RotationPeriod
	}
	schedule, err := rotation.DefaultScheduler.Parse(cfg.RotationSchedule)
	if err != nil {
		return 0
	}
	last := now.UTC()
	for next := schedule.Next(last); !next.IsZero() && last.Sub(now) <= maxKeyLife; next = schedule.Next(next) {
		longest, last = max(longest, next.Sub(last)), next
	}
	return longest
}

// registerRotation arranges who rotates cfg's key on schedule and returns the manager. As in Vault's own engines, a job
// is deregistered whether or not there was one.
func (b *backend) registerRotation(ctx context.Context, mountPoint string, cfg *config) (string, error) {
	if cfg.ShouldDeregisterRotationJob() {
		job := &rotation.RotationJobDeregisterRequest{MountPoint: mountPoint, ReqPath: configPath}
		if err := b.System().DeregisterRotationJob(ctx, job); err != nil && !noRotationManager(err) {
			return "", fmt.Errorf("deregistering rotation job: %w", err)
		}
		return managerNone, nil
	}
	_, err := b.System().RegisterRotationJob(ctx, &rotation.RotationJobConfigureRequest{
		Name: "openai-admin-api-key", MountPoint: mountPoint, ReqPath: configPath,
		RotationSchedule: cfg.RotationSchedule, RotationWindow: cfg.RotationWindow,
		RotationPeriod: cfg.RotationPeriod, RotationPolicy: cfg.RotationPolicy,
	})
	if noRotationManager(err) {
		return managerPlugin, nil
	}
	if err != nil {
		return "", fmt.Errorf("registering rotation job: %w", err)
	}
	return managerVault, nil
}

// noRotationManager tells whether err says that this Vault has no rotation manager. The error comes over gRPC, which
// keeps its text only.
func noRotationManager(err error) bool {
	return err != nil && (strings.Contains(err.Error(), automatedrotationutil.ErrRotationManagerUnsupported.Error()) ||
		strings.Contains(err.Error(), "Unimplemented"))
}

// nextRotation returns when the key is due: a time that has passed when it is overdue, zero for never. With a window,
// times whose window had closed before now are left out.
func (cfg *config) nextRotation(now time.Time) time.Time {
	if cfg.ShouldDeregisterRotationJob() {
		return time.Time{}
	}
	last := cfg.LastRotatedTime
	if cfg.RotationPeriod != 0 {
		return last.Add(cfg.RotationPeriod)
	}
	schedule, err := rotation.DefaultScheduler.Parse(cfg.RotationSchedule)
	if err != nil {
		return time.Time{} // refused when it is written
	}
	if opened := now.Add(-cfg.RotationWindow); cfg.RotationWindow > 0 && opened.After(last) {
		last = opened
	}
	return schedule.Next(last.UTC())
}

func (b *backend) configRotate(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	b.configMu.Lock()
	defer b.configMu.Unlock()
	cfg, err := b.rotate(ctx, req, "manual")
	if err != nil {
		return answerError(fmt.Errorf("rotating the admin API key: %w", err))
	}
	resp := &logical.Response{Data: map[string]any{
		"admin_api_key_id": cfg.AdminAPIKeyID,
		"rotated_time":     formatTime(cfg.LastRotatedTime),
	}}
	if len(cfg.PendingDeletion) > 0 {
		resp.AddWarning("the new key is in use, but these old ones could not be deleted yet and will be later: " +
			strings.Join(cfg.PendingDeletion, ", "))
	}
	return resp, nil
}

// rotateCredential is called by Vault's rotation manager.
func (b *backend) rotateCredential(ctx context.Context, req *logical.Request) error {
	b.configMu.Lock()
	defer b.configMu.Unlock()
	_, err := b.rotate(ctx, req, managerVault)
	return err
}

// rotate replaces the admin key and returns the new config. The caller holds configMu. What a fault or a crash
// leaves, by the step that came last:
//
//	name stored     nothing, or a new key that nobody has: seekCreating deletes it
//	new key made    likewise, and so when it was proved
//	new key stored  both keys work; the old one's id is in PendingDeletion
//	old key deleted its id is still in PendingDeletion: deleting it again is no error
//
// So config holds a working key at any moment. A call that uses the old key is repeated with the new one: see
// useClient.
func (b *backend) rotate(ctx context.Context, req *logical.Request, trigger string) (cfg *config, err error) {
	start, s := time.Now(), req.Storage
	defer func() {
		b.metrics.add("rotations_total", 1, "trigger", trigger, "result", result(err))
		pairs := []any{"trigger", trigger, "duration", time.Since(start).Round(time.Millisecond).String()}
		if err == nil {
			pairs = append(pairs, "admin_api_key_id", cfg.AdminAPIKeyID,
				"pending_deletion", strings.Join(cfg.PendingDeletion, ","))
		}
		b.report(ctx, req, "rotate-root", err, pairs...)
	}()
	if cfg, err = getConfig(ctx, s); err != nil {
		return nil, err
	}
	if cfg == nil {
		return nil, errNotConfigured
	}
	current := b.newClient(cfg)
	old, err := current.ownKey(ctx)
	if err != nil {
		return nil, fmt.Errorf("checking the present key: %w", err)
	}
	key, err := b.makeAdminKey(ctx, s, cfg, current)
	if err != nil {
		return nil, err
	}
	after := *cfg
	after.AdminAPIKey, after.AdminAPIKeyID, after.AdminKeyExpires = key.Value, key.ID, unixTime(key.ExpiresAt)
	after.LastRotatedTime, after.Rotated = time.Now(), true
	after.PendingDeletion = append(after.PendingDeletion, old.ID)
	after.Creating = cfg.Creating[:len(cfg.Creating)-1]
	next := b.newClient(&after)
	if err := next.awaitKey(ctx); err != nil {
		if current.deleteAdminKey(ctx, key.ID) == nil { // else seekCreating deletes it
			cfg.Creating = after.Creating
			err = errors.Join(err, putJSON(ctx, s, configPath, cfg))
		}
		return nil, fmt.Errorf("proving the new admin API key: %w", err)
	}
	if err := putJSON(ctx, s, configPath, &after); err != nil {
		b.setClient(nil) // whether it was stored is not known: seekCreating spares the key that config holds
		return nil, err
	}
	b.setClient(next)
	b.retryRotation, b.rotationFailures = time.Time{}, 0
	b.deletePending(ctx, s, &after, next)
	return &after, nil
}

// makeAdminKey makes a new admin key. Its name is stored first, as the last one of Creating, since a create whose
// answer is lost can only be found again by name.
func (b *backend) makeAdminKey(ctx context.Context, s logical.Storage, cfg *config, c *client) (*adminKey, error) {
	if len(cfg.Creating) >= maxCreating {
		return nil, fmt.Errorf("no more than %d admin keys are looked for at once whose creation failed", maxCreating)
	}
	name := "vault-admin-" + strings.ToLower(rand.Text()[:20])
	cfg.Creating = append(cfg.Creating, creatingKey{name, cfg.OrganizationID, time.Now()})
	if err := putJSON(ctx, s, configPath, cfg); err != nil {
		return nil, err
	}
	key, err := c.createAdminKey(ctx, name, cfg.AdminKeyTTL)
	if err == nil {
		return key, nil
	}
	if notDone(err) {
		cfg.Creating = cfg.Creating[:len(cfg.Creating)-1]
		err = errors.Join(err, putJSON(ctx, s, configPath, cfg))
	}
	return nil, fmt.Errorf("creating admin API key: %w", err)
}

// awaitKey waits until OpenAI accepts the client's own key.
func (c *client) awaitKey(ctx context.Context) error {
	return await(ctx, proofTimeout, func(ctx context.Context) error {
		_, err := c.getAdminKey(ctx, c.config.AdminAPIKeyID)
		return err
	})
}

// await tries for the time limit until what uses a new key is not refused, and returns the last try's error.
func await(ctx context.Context, limit time.Duration, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, maxProofWait) {
		err := try(ctx)
		if !notAccepted(err) || sleep(ctx, wait) != nil {
			return err
		}
	}
}

// notAccepted tells whether err may mean that OpenAI does not know a key, yet or any more.
func notAccepted(err error) bool {
	return isStatus(err, http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound)
}

// deletePending deletes the replaced admin keys that OpenAI still has and takes them off cfg's list. What fails stays
// on it for the next time. The caller holds configMu.
func (b *backend) deletePending(ctx context.Context, s logical.Storage, cfg *config, c *client) {
	var left []string
	for _, id := range cfg.PendingDeletion {
		if id == cfg.AdminAPIKeyID {
			continue // an operator has put it to use again
		}
		if err := c.deleteAdminKey(ctx, id); err != nil {
			b.Logger().Warn("deleting a replaced admin API key failed, will be tried again", "id", id, "error", err)
			left = append(left, id)
		}
	}
	if len(left) == len(cfg.PendingDeletion) {
		return
	}
	cfg.PendingDeletion = left
	if err := putJSON(ctx, s, configPath, cfg); err != nil {
		b.Logger().Warn("replaced admin API keys are deleted, but config still lists them", "error", err)
	}
}

// creatingNames returns the names of the keys in Creating.
func (cfg *config) creatingNames() []string {
	names := []string{}
	for _, k := range cfg.Creating {
		names = append(names, k.Name)
	}
	return names
}

// seekCreating deletes the admin keys that a rotation began to make, unless config holds them, and takes off cfg's list
// what was found. What is not found stays on it for lostTime, by OpenAI's clock, since OpenAI may carry it out late.
// The caller holds configMu.
func (b *backend) seekCreating(ctx context.Context, s logical.Storage, cfg *config, c *client) error {
	var due []string // names, but none of another organization, nor of a rotation that may be under way on another node
	for _, k := range cfg.Creating {
		if k.OrganizationID == cfg.OrganizationID && time.Since(k.Since) > creatingRest {
			due = append(due, k.Name)
		}
	}
	if len(due) == 0 {
		return nil
	}
	found := map[string]bool{}
	keys, now, err := c.adminKeysWhere(ctx, func(k adminKey) bool { return slices.Contains(due, k.Name) })
	if err != nil {
		return fmt.Errorf("looking for admin API keys that a rotation began to make: %w", err)
	}
	for _, k := range keys {
		if k.ID != cfg.AdminAPIKeyID {
			if deleteErr := c.deleteAdminKey(ctx, k.ID); deleteErr != nil {
				err = errors.Join(err, fmt.Errorf("deleting admin API key %q: %w", k.ID, deleteErr))
				now = time.Time{} // nothing is given up meanwhile
				continue
			}
			b.Logger().Info("deleted an admin API key that was never put to use", "admin_api_key_id", k.ID)
		}
		found[k.Name] = true
	}
	left := slices.DeleteFunc(slices.Clone(cfg.Creating), func(k creatingKey) bool {
		return k.OrganizationID == cfg.OrganizationID && (found[k.Name] || k.Since.Add(lostTime).Before(now))
	})
	if len(left) < len(cfg.Creating) {
		cfg.Creating = left
		err = errors.Join(err, putJSON(ctx, s, configPath, cfg))
	}
	return err
}

// rotatePeriodically is the part of periodic that is about the admin key: what is left of earlier rotations, and a
// scheduled one that is due.
func (b *backend) rotatePeriodically(ctx context.Context, req *logical.Request) {
	if !b.configMu.TryLock() {
		return
	}
	defer b.configMu.Unlock()
	cfg, err := getConfig(ctx, req.Storage)
	if err != nil {
		b.Logger().Error("periodic work failed", "error", err)
	}
	if err != nil || cfg == nil {
		return
	}
	c := b.newClient(cfg)
	tidyCtx, cancel := context.WithTimeout(ctx, tickTimeout/3) // leaves time for the rest
	defer cancel()
	b.deletePending(tidyCtx, req.Storage, cfg, c)
	if err := b.seekCreating(tidyCtx, req.Storage, cfg, c); err != nil {
		b.Logger().Warn("will be tried again", "error", err)
	}
	if cfg.RotationManager == "" { // the older plugin's config
		if cfg.RotationManager, err = b.registerRotation(ctx, req.MountPoint, cfg); err == nil {
			err = putJSON(ctx, req.Storage, configPath, cfg)
		}
		if err != nil {
			b.Logger().Error("taking over the older plugin's rotation settings failed", "error", err)
			return
		}
	}
	now := time.Now()
	next := cfg.nextRotation(now)
	if cfg.RotationManager != managerPlugin || next.IsZero() || now.Before(next) || now.Before(b.retryRotation) {
		return
	}
	if _, err := b.rotate(ctx, req, managerPlugin); err != nil {
		b.retryRotation = now.Add(min(minRotateRetry<<min(b.rotationFailures, 10), maxRotateRetry))
		b.rotationFailures++
	}
}

// What OpenAI knows this mount and a role of access tokens by: the names of the provider and of the rule, from which a
// crash's remains are found again, and the sub of the role's JWTs.
func (b *backend) providerName() string        { return "vault-" + b.mountID }
func (b *backend) ruleName(role string) string { return b.providerName() + "-" + role }
func (b *backend) subject(role string) string  { return "vault:" + b.mountID + ":" + role }

// newSigningKey makes a key for RS256.
func newSigningKey() (*signingKey, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("making a signing key: %w", err)
	}
	k := jwk{Type: "RSA", Use: "sig", Algorithm: "RS256", N: base64url(key.N.Bytes()), E: "AQAB"} // 65537, in every key
	sum := sha256.Sum256(fmt.Appendf(nil, `{"e":%q,"kty":"RSA","n":%q}`, k.E, k.N))
	k.KeyID = base64url(sum[:])
	return &signingKey{k, x509.MarshalPKCS1PrivateKey(key), time.Now()}, nil
}

// jwks returns the public keys that OpenAI has to have, in the order in which they come to sign.
func (id *identity) jwks() map[string][]jwk {
	keys := []jwk{id.Key.jwk}
	if id.Next != nil {
		keys = append(keys, id.Next.jwk)
	}
	if time.Now().Before(id.FormerUntil) {
		keys = slices.Insert(keys, 0, id.Former)
	}
	return map[string][]jwk{"keys": keys}
}

func (b *backend) identityData(id *identity) map[string]any {
	jwks, _ := json.Marshal(id.jwks()) // strings can always be encoded
	next := ""
	if id.Next != nil {
		next = id.Next.KeyID
	}
	return map[string]any{
		"issuer": id.Issuer, "audience": id.Audience, "token_endpoint": id.TokenEndpoint,
		"ca_certificate": id.CACertificate, "identity_provider_id": id.ProviderID, "mount_id": b.mountID,
		"key_id": id.Key.KeyID, "next_key_id": next, "jwks": string(jwks),
		"former_key_until": formatTime(id.FormerUntil),
	}
}

func pathIdentity(b *backend) []*framework.Path {
	fields := fieldMap{
		"issuer": field(text, "The iss of JWTs: 1 to 256 printable ASCII characters. Default: a URL with mount_id."),
		"audience": defaulted(text, defaultEndpoint,
			"The aud of the JWTs: 1 to 256 printable ASCII characters. Default "+defaultEndpoint+"."),
		"token_endpoint": defaulted(text, defaultTokenEndpoint,
			"URL for the exchange: https, or http to a loopback address. Default "+defaultTokenEndpoint+"."),
		"ca_certificate": field(text, "Certificates in PEM that are trusted there beside the system's. Default: none."),
		"identity_provider_id": field(text,
			"ID of the provider at OpenAI, where an operator makes it. Default: the plugin does, with config's key."),
	}
	shown := maps.Clone(fields)
	shown["mount_id"] = required(text, "The tag in the names of what this mount makes at OpenAI.")
	shown["key_id"] = required(text, "The kid of the key that signs.")
	shown["next_key_id"] = required(text, "The kid of the key that signs when a rotation has ended; empty: none began.")
	shown["former_key_until"] = required(text, "Until when OpenAI must have the former key (RFC 3339); empty: none.")
	shown["jwks"] = required(text, "The public keys that OpenAI has to have, as JSON (RFC 7517).")
	return []*framework.Path{{
		Pattern: identityPath, DisplayAttrs: display("identity"),
		Fields: fields,
		Operations: operations{
			logical.UpdateOperation: forwarded(operation(b.identityWrite, "configure", "identity",
				"Make the mount an identity provider.", nil)),
			logical.ReadOperation: operation(b.identityRead, "read", "identity", "Read its public part.", shown),
			logical.DeleteOperation: forwarded(operation(b.identityDelete, "delete", "identity",
				"Delete the identity, with the provider and the rules that the plugin made.", nil)),
		},
		HelpSynopsis: "Make the mount an identity provider of OpenAI's.", HelpDescription: identityHelpDescription,
	}, {
		Pattern: identityPath + "/rotate", DisplayAttrs: display("identity"),
		Fields: fieldMap{"confirm": defaulted(boolean, false,
			"Whether OpenAI has got the answered jwks from an operator: true or false. Default false.")},
		Operations: operations{
			logical.UpdateOperation: forwarded(operation(b.identityRotate, "rotate", "signing-key",
				"Replace the signing key by a new one.", shown)),
		},
		HelpSynopsis: "Replace the signing key by a new one.", HelpDescription: identityRotateHelpDescription,
	}}
}

func (b *backend) identityRead(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	id, err := getIdentity(ctx, req.Storage)
	if err != nil || id == nil {
		return nil, err
	}
	return &logical.Response{Data: b.identityData(id)}, nil
}

var identityPattern = regexp.MustCompile(`^[!-~]{1,256}$`)

// update sets the fields that d names. cfg is the config, nil if there is none. Its error is the caller's.
func (id *identity) update(d *fieldData, cfg *config) (err error) {
	was := *id
	setID(d, "issuer", &id.Issuer)
	setID(d, "audience", &id.Audience)
	setID(d, "token_endpoint", &id.TokenEndpoint)
	setID(d, "identity_provider_id", &id.ProviderID)
	setText(d, "ca_certificate", &id.CACertificate)
	if id.TokenEndpoint, err = parseEndpoint(id.TokenEndpoint); err != nil {
		own := strings.NewReplacer("api_endpoint", "token_endpoint", defaultEndpoint, defaultTokenEndpoint)
		return errors.New(own.Replace(err.Error()))
	}
	if _, err := (&config{CACertificate: id.CACertificate}).tlsConfig(); err != nil {
		return err
	}
	// Who may write the identity must not get a JWT of the present key, or a token for it, sent to himself.
	moved := id.Issuer != was.Issuer || id.Audience != was.Audience || id.TokenEndpoint != was.TokenEndpoint ||
		id.CACertificate != was.CACertificate
	switch {
	case !identityPattern.MatchString(id.Issuer):
		return errors.New("issuer must be 1 to 256 printable ASCII characters without spaces")
	case !identityPattern.MatchString(id.Audience):
		return errors.New("audience must be 1 to 256 printable ASCII characters without spaces")
	case id.ProviderID != "" && !validID(id.ProviderID):
		return errors.New("identity_provider_id must be 1 to 128 letters, digits, - or _")
	case moved && id.Key != nil:
		return errors.New("issuer, audience, token_endpoint and ca_certificate are fixed: delete config/identity " +
			"and write it anew, with a new key")
	case id.OrganizationID != "" && id.ProviderID != was.ProviderID:
		return errors.New("identity_provider_id is of a provider that the plugin made: delete config/identity first")
	case id.ProviderID == "" && cfg != nil && !cfg.vouchesFor(id):
		return errors.New("token_endpoint must be the default or on api_endpoint's host, and ca_certificate none or " +
			"that of config, where the plugin makes the provider: else make it at OpenAI, and write its " +
			"identity_provider_id")
	}
	return nil
}

// vouchesFor tells whether the admin key may make OpenAI trust the identity: its JWTs must go to OpenAI or where config
// says. Else who may write config/identity but not config could get the organization's tokens sent to himself.
func (cfg *config) vouchesFor(id *identity) bool {
	tokens, err := url.Parse(id.TokenEndpoint)
	api, apiErr := url.Parse(cfg.APIEndpoint)
	return err == nil && apiErr == nil && (id.TokenEndpoint == defaultTokenEndpoint || tokens.Host == api.Host) &&
		(id.CACertificate == "" || id.CACertificate == cfg.CACertificate)
}

// putIdentity stores id. The next token reads it, also after an error: it may have been stored.
func (b *backend) putIdentity(ctx context.Context, s logical.Storage, id *identity) error {
	defer b.dropSigner()
	return putJSON(ctx, s, identityPath, id)
}

// dropIdentity deletes the stored identity.
func (b *backend) dropIdentity(ctx context.Context, s logical.Storage) error {
	defer b.dropSigner()
	if err := s.Delete(ctx, identityPath); err != nil {
		return fmt.Errorf("deleting config/identity: %w", err)
	}
	return nil
}

// identityWrite makes the identity or, where it is there, brings its provider and rules at OpenAI in line with it. The
// identity is stored before the provider is made, so that the next write or delete finds by name what a crash leaves.
func (b *backend) identityWrite(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	b.identityMu.Lock()
	defer b.identityMu.Unlock()
	id, err := getIdentity(ctx, req.Storage)
	cfg, configErr := getConfig(ctx, req.Storage)
	if err = errors.Join(err, configErr); err == nil && b.mountID == "" {
		err = errNoUUID
	}
	if err != nil {
		return nil, err
	}
	id = cmp.Or(id, &identity{Issuer: "https://" + b.providerName() + ".invalid", Audience: defaultEndpoint,
		TokenEndpoint: defaultTokenEndpoint})
	if err := id.update(d, cfg); err != nil {
		return logical.ErrorResponse(err.Error()), nil
	}
	made := id.Key == nil
	if made {
		if id.Key, err = newSigningKey(); err == nil {
			err = b.putIdentity(ctx, req.Storage, id)
		}
	}
	if err != nil {
		return nil, err
	}
	resp := &logical.Response{}
	err = b.saveProvider(ctx, req.Storage, id, true)
	switch {
	case cannotManage(err):
		resp.AddWarning(fmt.Sprintf("the plugin changed nothing at OpenAI (%s): the provider there must have the "+
			"issuer, audience and jwks that reading config/identity shows, and identity_provider_id be its id", err))
		err = nil
	case made && notDone(err): // nothing is stored that OpenAI refuses
		return answerError(errors.Join(err, b.dropIdentity(ctx, req.Storage)))
	case err == nil:
		err = b.saveRules(ctx, req.Storage, id, resp)
	}
	if err != nil {
		return answerError(err)
	}
	if err := b.putIdentity(ctx, req.Storage, id); err != nil {
		return nil, err
	}
	b.report(ctx, req, "identity-write", nil, "identity_provider_id", id.ProviderID, "key_id", id.Key.KeyID)
	return warningsOnly(resp), nil
}

// saveRules gives OpenAI the rules of all roles of access tokens: a new provider has none.
func (b *backend) saveRules(ctx context.Context, s logical.Storage, id *identity, to *logical.Response) error {
	roles, err := getRoles(ctx, s)
	for name, r := range roles {
		if r.CredentialType == accessToken {
			if err := b.saveRule(ctx, s, id, name, r); err != nil {
				to.AddWarning(fmt.Sprintf("role %q may lack its rule, write it again: %s", name, err))
			}
		}
	}
	return err
}

// errOperator means that the plugin leaves the provider alone.
var errOperator = errors.New("an operator made the identity provider")

// cannotManage tells whether err means that the plugin can't change providers and rules at OpenAI, so that an operator
// has to. The admin key may be deleted after the set-up.
func cannotManage(err error) bool {
	return errors.Is(err, errOperator) || errors.Is(err, errOtherOrganization) || adminKeyRefused(err)
}

// saveProvider gives OpenAI the identity. On a write of the identity it also turns the provider on, and makes it unless
// there is one, of the id that is known or of this mount's name.
func (b *backend) saveProvider(ctx context.Context, s logical.Storage, id *identity, write bool) error {
	if id.ProviderID != "" && id.OrganizationID == "" {
		return errOperator
	}
	in := map[string]any{
		"name": b.providerName(), "issuer": id.Issuer, "audience": id.Audience,
		"verification": map[string]any{"type": "uploaded_jwks", "jwks": id.jwks()},
	}
	if write {
		in["enabled"] = true
	}
	err := b.useClient(ctx, s, id.OrganizationID, func(c *client) error {
		save := func(known string) (string, error) {
			return c.saveFederated(ctx, provider, providersPath, known, in, map[string]any{"type": "oidc"})
		}
		saved, err := save(id.ProviderID)
		if write && isNotFound(err) {
			saved, err = save("")
		}
		if err == nil {
			id.ProviderID, id.OrganizationID = saved, c.config.OrganizationID
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("saving the identity provider: %w", err)
	}
	return nil
}

// identityDelete deletes the provider with its rules at OpenAI, and then the identity.
func (b *backend) identityDelete(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	b.identityMu.Lock()
	defer b.identityMu.Unlock()
	id, err := getIdentity(ctx, req.Storage)
	if err != nil || id == nil {
		return nil, err
	}
	if err = errOperator; id.ProviderID == "" || id.OrganizationID != "" {
		err = b.useClient(ctx, req.Storage, id.OrganizationID, func(c *client) error {
			found, err := c.listFederated(ctx, provider, providersPath)
			for _, p := range found { // a POST that was carried out late may have made a second one
				if err == nil && (p.ID == id.ProviderID || p.Name == b.providerName()) {
					err = c.deleteProvider(ctx, p.ID)
				}
			}
			return err
		})
	}
	resp := &logical.Response{}
	if cannotManage(err) && id.ProviderID != "" {
		resp.AddWarning(fmt.Sprintf("the plugin changed nothing at OpenAI (%s): identity provider %q is there still",
			err, id.ProviderID))
	} else if err != nil && !cannotManage(err) {
		return answerError(fmt.Errorf("deleting the identity provider: %w", err))
	}
	if err := b.dropIdentity(ctx, req.Storage); err != nil {
		return nil, err
	}
	b.report(ctx, req, "identity-delete", nil, "identity_provider_id", id.ProviderID)
	return warningsOnly(resp), nil
}

// identityRotate replaces the signing key. The steps, after each of which a key signs that OpenAI has:
//
//	new key stored  as Next; a rotation that is begun again goes on with it
//	new key given   OpenAI has both; where an operator has to give it, the answer has jwks, and confirm goes on
//	new key proved  OpenAI accepts it
//	new key signs   Next is Key; the former one stays published until no token of it can be alive: withdrawFormer
func (b *backend) identityRotate(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	b.identityMu.Lock()
	defer b.identityMu.Unlock()
	id, err := getIdentity(ctx, req.Storage)
	if err != nil || id == nil {
		return answerError(cmp.Or(err, error(errNoIdentity)))
	}
	confirm := d.Get("confirm").(bool)
	switch {
	case time.Now().Before(id.FormerUntil):
		return logical.ErrorResponse("the former key is published until %s, as a token of it may live: rotate after "+
			"that, or delete config/identity to end it now", formatTime(id.FormerUntil)), nil
	case confirm && id.Next == nil:
		return logical.ErrorResponse("there is no new key to confirm: rotate without confirm first"), nil
	case id.Next == nil:
		if id.Next, err = newSigningKey(); err == nil {
			err = b.putIdentity(ctx, req.Storage, id)
		}
	}
	if err == nil {
		err = b.saveProvider(ctx, req.Storage, id, false)
	}
	if cannotManage(err) && !confirm {
		resp := &logical.Response{Data: b.identityData(id)}
		resp.AddWarning(fmt.Sprintf("the plugin changed nothing at OpenAI (%s): the present key goes on signing until "+
			"the provider there has all keys of this jwks and you rotate with confirm=true", err))
		return resp, nil
	}
	if err == nil || cannotManage(err) {
		err = b.useNext(ctx, req.Storage, id)
	}
	b.report(ctx, req, "identity-rotate", err, "key_id", id.Key.KeyID)
	if err != nil {
		return answerError(fmt.Errorf("rotating the signing key: %w", err))
	}
	return &logical.Response{Data: b.identityData(id)}, nil
}

// useNext lets the new key sign once OpenAI accepts it.
func (b *backend) useNext(ctx context.Context, s logical.Storage, id *identity) error {
	if err := b.proveNext(ctx, s, id); err != nil {
		return fmt.Errorf("proving the new key: %w", err)
	}
	id.Former, id.FormerUntil = id.Key.jwk, time.Now().Add(requestTimeout+maxTokenLife)
	id.Key, id.Next = id.Next, nil
	return b.putIdentity(ctx, s, id)
}

// proveNext waits until OpenAI accepts the new key for some role. Without a role there is nothing that could break.
func (b *backend) proveNext(ctx context.Context, s logical.Storage, id *identity) error {
	next, err := b.newSigner(id, id.Next)
	roles, rolesErr := getRoles(ctx, s)
	if err := errors.Join(err, rolesErr); err != nil {
		return err
	}
	return await(ctx, checkTimeout, func(ctx context.Context) (err error) {
		for name, r := range roles {
			if r.CredentialType == accessToken {
				_, err = next.exchange(ctx, b.subject(name), r.ServiceAccountID, time.Minute)
				if !notAccepted(err) {
					return err
				}
			}
		}
		return err
	})
}

// withdrawFormer is the part of periodic that takes the former key off OpenAI's when no token of it can be alive.
func (b *backend) withdrawFormer(ctx context.Context, s logical.Storage) {
	if !b.identityMu.TryLock() {
		return
	}
	defer b.identityMu.Unlock()
	id, err := getIdentity(ctx, s)
	if err == nil && (id == nil || id.FormerUntil.IsZero() || time.Now().Before(id.FormerUntil)) {
		return
	}
	if err == nil {
		saveCtx, cancel := context.WithTimeout(ctx, tickTimeout/3) // leaves time for the rest
		defer cancel()
		err = b.saveProvider(saveCtx, s, id, false)
	}
	if errors.Is(err, errNotConfigured) || errors.Is(err, errOtherOrganization) {
		return // until the admin key is there again
	}
	if err == nil || errors.Is(err, errOperator) { // then he has to: jwks lacks the key from now on
		b.Logger().Info("the former signing key is not needed any more", "key_id", id.Former.KeyID, "error", err)
		id.Former, id.FormerUntil = jwk{}, time.Time{}
		err = b.putIdentity(ctx, s, id)
	}
	if err != nil {
		b.Logger().Warn("taking off the former signing key failed, will be tried again", "error", err)
	}
}

// permissions are what the rule of a role allows.
func (r *role) permissions() map[string]any {
	if len(r.Scopes) == 0 {
		return map[string]any{"type": "service_account_default"}
	}
	return map[string]any{"type": "restricted", "scopes": r.Scopes}
}

// saveRule makes or changes the federation rule of a role. A crash before the role is stored leaves a rule that the
// next write or delete of the role finds by its name. The caller holds identityMu.
func (b *backend) saveRule(ctx context.Context, s logical.Storage, id *identity, name string, r *role) error {
	if id.OrganizationID == "" {
		return errOperator
	}
	err := b.useClient(ctx, s, id.OrganizationID, func(c *client) error {
		_, err := c.saveFederated(ctx, rule, rulesPath(id.ProviderID), "", map[string]any{
			"name": b.ruleName(name), "permissions": r.permissions(),
			"attribute_matchers": map[string]any{"sub": b.subject(name)},
		}, map[string]any{"project_id": r.ProjectID, "service_account_id": r.ServiceAccountID})
		return err
	})
	if err != nil {
		return fmt.Errorf("federation rule: %w", err)
	}
	return nil
}

// checkTokenRole is checkRole for a role of access tokens. It makes or changes the role's rule and, where an operator
// has to, warns of that, unless the stored role, was, needs the same rule. The caller holds identityMu.
func (b *backend) checkTokenRole(ctx context.Context, s logical.Storage, name string, was, r *role,
	to *logical.Response) error {
	id, err := getIdentity(ctx, s)
	if err == nil && (id == nil || id.ProviderID == "") {
		err = errNoIdentity
	}
	roles, rolesErr := getRoles(ctx, s)
	if err = errors.Join(err, rolesErr); err != nil {
		return err
	}
	for other, o := range roles {
		if other != name && o.CredentialType == accessToken && o.ServiceAccountID == r.ServiceAccountID {
			return errutil.UserError{Err: fmt.Sprintf("service_account_id is the account of role %q: OpenAI takes one "+
				"rule of a provider for an account", other)}
		}
	}
	if id.OrganizationID != "" {
		err = b.checkRole(ctx, s, id.OrganizationID, r, to)
	}
	if err == nil {
		err = b.saveRule(ctx, s, id, name, r)
	}
	if !cannotManage(err) {
		return err
	}
	if was == nil || !slices.Equal(was.Scopes, r.Scopes) {
		asJSON, _ := json.Marshal(r.permissions())
		to.AddWarning(fmt.Sprintf("the plugin changed nothing at OpenAI (%s): the provider needs a rule for project "+
			"%s and service account %s with the matcher sub=%s and permissions %s, or creds fail",
			err, r.ProjectID, r.ServiceAccountID, b.subject(name), asJSON))
	}
	return nil
}

// deleteRule deletes the rule of a role. The caller holds identityMu.
func (b *backend) deleteRule(ctx context.Context, s logical.Storage, name string) error {
	id, err := getIdentity(ctx, s)
	if err != nil || id == nil {
		return err
	}
	if id.OrganizationID == "" {
		return errOperator
	}
	return b.useClient(ctx, s, id.OrganizationID, func(c *client) error {
		return c.deleteRules(ctx, id.ProviderID, b.ruleName(name))
	})
}
