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
	mathrand "math/rand/v2"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/helper/locksutil"
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

// backoff is when a scheduled rotation that failed may be tried again.
type backoff struct {
	until    time.Time
	failures int // in a row
}

// rotateDue rotates the key in a storage entry if its schedule says so, and not too soon after failures. A rotation
// that succeeds ends the backoff, as does a write of config.
func (b *backend) rotateDue(entry string, sc *schedule, rotate func() error) {
	found, _ := b.retries.LoadOrStore(entry, backoff{})
	retry := found.(backoff)
	now := time.Now()
	next := sc.nextRotation(now)
	clockWasAhead := sc.LastRotatedTime.After(now.Add(clockTolerance))
	if next.IsZero() || now.Before(next) && !clockWasAhead || now.Before(retry.until) || rotate() == nil {
		return
	}
	retry.until = now.Add(min(minRotateRetry<<min(retry.failures, 10), maxRotateRetry))
	retry.failures++
	b.retries.CompareAndSwap(entry, found, retry) // unless a write of config has come meanwhile
}

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
	if err := cfg.schedule.update(d); err != nil || cfg.AdminKeyTTL == 0 {
		return err
	}
	switch _, gap := cfg.gaps(time.Now()); {
	case gap == 0:
		return errors.New("admin_key_ttl needs rotation_period or rotation_schedule, and no " +
			"disable_automated_rotation: the key would expire without a successor")
	case cfg.AdminKeyTTL/2 < gap:
		return fmt.Errorf("admin_key_ttl must be at least twice the longest time between rotations, %s", gap)
	case cfg.AdminKeyTTL > maxKeyLife:
		return errors.New("admin_key_ttl must be at most 365 days")
	}
	return nil
}

// update sets the rotation fields that d names. Its error is the caller's.
func (sc *schedule) update(d *fieldData) error {
	// The helper takes the window only together with the schedule; a schedule that is already stored will do.
	if _, named := d.Raw["rotation_window"]; named && sc.RotationSchedule != "" {
		if _, named := d.Raw["rotation_schedule"]; !named {
			d.Raw["rotation_schedule"] = sc.RotationSchedule
		}
	}
	if times, _ := d.GetOk("rotation_schedule"); strings.Contains(fmt.Sprint(times), "TZ=") { // cron panics at "TZ="
		return errors.New("rotation_schedule is in UTC and takes no time zone")
	}
	if err := sc.ParseAutomatedRotationFields(d); err != nil {
		return err
	}
	if sc.RotationSchedule == "" {
		sc.RotationWindow = 0
	}
	switch {
	case sc.RotationPeriod != 0 && sc.RotationSchedule != "":
		return errors.New("rotation_period and rotation_schedule exclude each other: clear one, with " +
			"rotation_period=0 or rotation_schedule=\"\"")
	case sc.RotationSchedule != "" && !sc.DisableAutomatedRotation && sc.nextRotation(time.Now()).IsZero():
		return errors.New("rotation_schedule has no time to come")
	case sc.RotationWindow != 0:
		if err := rotation.DefaultScheduler.ValidateRotationWindow(int(sc.RotationWindow.Seconds())); err != nil {
			return err
		}
	}
	return nil
}

// gaps returns the shortest and the longest time between scheduled rotations within a year; 0 when there are none. A
// schedule of each minute takes about half a second.
func (sc *schedule) gaps(now time.Time) (shortest, longest time.Duration) {
	if sc.DisableAutomatedRotation {
		return 0, 0
	}
	times, err := rotation.DefaultScheduler.Parse(sc.RotationSchedule)
	if sc.RotationPeriod != 0 || err != nil {
		return sc.RotationPeriod, sc.RotationPeriod
	}
	last := now.UTC()
	for next := times.Next(last); !next.IsZero() && last.Sub(now) <= maxKeyLife; next = times.Next(next) {
		gap := next.Sub(last)
		if longest = max(longest, gap); last.After(now) { // else it is a part of one
			shortest = min(cmp.Or(shortest, gap), gap)
		}
		last = next
	}
	return cmp.Or(shortest, longest), longest
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
func (sc *schedule) nextRotation(now time.Time) time.Time {
	if sc.ShouldDeregisterRotationJob() {
		return time.Time{}
	}
	last := sc.LastRotatedTime
	if sc.RotationPeriod != 0 {
		return last.Add(sc.RotationPeriod)
	}
	times, err := rotation.DefaultScheduler.Parse(sc.RotationSchedule)
	if err != nil {
		return time.Time{} // refused when it is written
	}
	if opened := now.Add(-sc.RotationWindow); sc.RotationWindow > 0 && opened.After(last) {
		last = opened
	}
	return times.Next(last.UTC())
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
		resp.AddWarning("the new key is in use, but these could not be deleted yet and will be later: " +
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
	err = await(ctx, proofTimeout, func(ctx context.Context) error {
		_, err := next.getAdminKey(ctx, key.ID)
		return err
	})
	if err != nil { // seekCreating deletes it: a 404 now might mean that OpenAI does not know it yet
		return nil, fmt.Errorf("proving the new admin API key: %w", err)
	}
	err = putJSON(ctx, s, configPath, &after)
	b.invalidate(ctx, configPath) // also after an error: it may have been stored
	if err != nil {               // seekCreating spares the key that config holds
		return nil, err
	}
	b.retries.Delete(configPath)
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
	cfg.Creating = append(cfg.Creating, creatingKey{name, cfg.OrganizationID, "", time.Now()})
	if err := putJSON(ctx, s, configPath, cfg); err != nil {
		return nil, err
	}
	key, err := c.createAdminKey(ctx, name, cfg.AdminKeyTTL)
	if err == nil {
		return key, nil
	}
	if notDone(err) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout) // a wait for a turn ends with ctx
		defer cancel()
		cfg.Creating = cfg.Creating[:len(cfg.Creating)-1]
		err = errors.Join(err, putJSON(ctx, s, configPath, cfg))
	}
	return nil, fmt.Errorf("creating admin API key: %w", err)
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

// deletePending deletes the admin keys that are replaced, or were never put to use, and takes them off cfg's list. What
// fails stays on it for the next time. The caller holds configMu.
func (b *backend) deletePending(ctx context.Context, s logical.Storage, cfg *config, c *client) {
	var left []string
	for _, id := range cfg.PendingDeletion {
		if id == cfg.AdminAPIKeyID {
			continue // config holds it after all
		}
		if err := c.deleteAdminKey(ctx, id); err != nil {
			b.Logger().Warn("deleting an admin API key failed, will be tried again", "id", id, "error", err)
			left = append(left, id)
		}
	}
	if len(left) == len(cfg.PendingDeletion) {
		return
	}
	cfg.PendingDeletion = left
	if err := putJSON(ctx, s, configPath, cfg); err != nil {
		b.Logger().Warn("admin API keys are deleted, but config still lists them", "error", err)
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

// seekCreating looks for the admin keys that a rotation began to make. What is found goes on the list of those to be
// deleted. What is not found stays in Creating for lostTime, by OpenAI's clock, since OpenAI may carry it out late. The
// caller holds configMu.
func (b *backend) seekCreating(ctx context.Context, s logical.Storage, cfg *config, c *client) error {
	var due []string // names, but none of another organization, nor of a rotation that may be under way on another node
	for _, k := range cfg.Creating {
		age := time.Since(k.Since) // below 0: a clock was ahead
		if k.OrganizationID == cfg.OrganizationID && (age > creatingRest || age < -clockTolerance) {
			due = append(due, k.Name)
		}
	}
	if len(due) == 0 {
		return nil
	}
	var found []string
	keys, now, err := c.adminKeysWhere(ctx, func(k adminKey) bool { return slices.Contains(due, k.Name) })
	if err != nil {
		return fmt.Errorf("looking for admin API keys that a rotation began to make: %w", err)
	}
	for _, k := range keys {
		found = append(found, k.Name)
		cfg.PendingDeletion = append(cfg.PendingDeletion, k.ID)
	}
	left := slices.DeleteFunc(slices.Clone(cfg.Creating), func(k creatingKey) bool {
		gone := slices.Contains(found, k.Name) || k.Since.Add(lostTime).Before(now)
		return k.OrganizationID == cfg.OrganizationID && gone
	})
	if len(left) == len(cfg.Creating) {
		return nil
	}
	cfg.Creating = left
	if err := putJSON(ctx, s, configPath, cfg); err != nil {
		return err
	}
	b.deletePending(ctx, s, cfg, c)
	return nil
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
	if cfg.RotationManager == managerPlugin {
		b.rotateDue(configPath, &cfg.schedule, func() error {
			_, err := b.rotate(ctx, req, managerPlugin)
			return err
		})
	}
}

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
	next := cmp.Or(id.Next, &signingKey{})
	return map[string]any{
		"issuer": id.Issuer, "audience": id.Audience, "token_endpoint": id.TokenEndpoint,
		"ca_certificate": id.CACertificate, "identity_provider_id": id.ProviderID, "mount_id": b.mountID,
		"key_id": id.Key.KeyID, "next_key_id": next.KeyID, "jwks": string(jwks),
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

// update sets the fields that d names. Its error is the caller's.
func (id *identity) update(d *fieldData) (err error) {
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
	}
	return nil
}

var errNotVouched = errutil.UserError{Err: "token_endpoint must be the default or on api_endpoint's host, and " +
	"ca_certificate none or that of config, where the plugin makes the provider: else make it at OpenAI, and write " +
	"its identity_provider_id"}

// vouchesFor tells whether the admin key may make OpenAI trust the identity: its JWTs must go to OpenAI or where config
// says. Else who may write config/identity but not config could get the organization's tokens sent to himself.
func (cfg *config) vouchesFor(id *identity) bool {
	tokens, err := url.Parse(id.TokenEndpoint)
	api, apiErr := url.Parse(cfg.APIEndpoint)
	return err == nil && apiErr == nil && (id.TokenEndpoint == defaultTokenEndpoint || tokens.Host == api.Host) &&
		(id.CACertificate == "" || id.CACertificate == cfg.CACertificate)
}

// identityWrite makes the identity or, where it is there, brings its provider and rules at OpenAI in line with it. The
// identity is stored before the provider is made, so that the next write or delete finds by name what a crash leaves.
func (b *backend) identityWrite(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	b.identityMu.Lock()
	defer b.identityMu.Unlock()
	defer b.invalidate(ctx, identityPath) // also after an error: it may have been stored
	id, err := getIdentity(ctx, req.Storage)
	if err == nil && b.mountID == "" {
		err = errNoUUID
	}
	if err != nil {
		return nil, err
	}
	id = cmp.Or(id, &identity{Issuer: "https://" + b.providerName() + ".invalid", Audience: defaultEndpoint,
		TokenEndpoint: defaultTokenEndpoint})
	if err := id.update(d); err != nil {
		return logical.ErrorResponse(err.Error()), nil
	}
	made := id.Key == nil
	if made {
		if id.Key, err = newSigningKey(); err == nil {
			err = putJSON(ctx, req.Storage, identityPath, id)
		}
	}
	if err != nil {
		return nil, err
	}
	resp := &logical.Response{}
	err = b.saveProvider(ctx, req.Storage, id, true)
	managed := err == nil
	switch {
	case cannotManage(err):
		resp.AddWarning(fmt.Sprintf("the plugin changed nothing at OpenAI (%s): the provider there must have the "+
			"issuer, audience and jwks that reading config/identity shows, and identity_provider_id be its id", err))
		err = nil
	case made && notDone(err): // nothing is stored that is refused
		err = errors.Join(err, req.Storage.Delete(ctx, identityPath))
	}
	if err == nil {
		err = putJSON(ctx, req.Storage, identityPath, id)
	}
	if err == nil && managed {
		err = b.saveRules(ctx, req.Storage, id, resp)
	}
	if err != nil {
		return answerError(err)
	}
	b.report(ctx, req, "identity-write", nil, "identity_provider_id", id.ProviderID, "key_id", id.Key.KeyID)
	return resp, nil
}

// saveRules gives OpenAI the rules of all roles of access tokens: a new provider has none.
func (b *backend) saveRules(ctx context.Context, s logical.Storage, id *identity, to *logical.Response) error {
	roles, err := tokenRoles(ctx, s)
	for name, r := range roles {
		if err := b.saveRule(ctx, s, id, name, r); err != nil {
			to.AddWarning(fmt.Sprintf("role %q may lack its rule, write it again: %s", name, err))
		}
	}
	return err
}

// errOperator means that the plugin leaves the provider alone.
var errOperator = errors.New("the plugin did not make the identity provider")

// cannotManage tells whether err means that the plugin can't change providers and rules at OpenAI, so that an operator
// has to. The admin key may be deleted after the set-up.
func cannotManage(err error) bool {
	return errors.Is(err, errOperator) || errors.Is(err, errOtherOrganization) || adminKeyRefused(err)
}

// useProvider runs fn, which changes the provider or its rules at OpenAI, unless an operator made the provider.
func (b *backend) useProvider(ctx context.Context, s logical.Storage, id *identity, fn func(*client) error) error {
	if id.ProviderID != "" && id.OrganizationID == "" {
		return errOperator
	}
	return b.useClient(ctx, s, id.OrganizationID, fn)
}

// saveProvider gives OpenAI the identity. Only on a write of the identity it makes the provider, unless there is one of
// the id that is known or of this mount's name. It never turns one on: somebody may have turned it off to stop a thief.
// The config that vouches for the identity is that of the call. Another may have been there when the identity was
// stored, with an endpoint that told the id of somebody else's provider.
func (b *backend) saveProvider(ctx context.Context, s logical.Storage, id *identity, write bool) error {
	in := map[string]any{
		"name": b.providerName(), "issuer": id.Issuer, "audience": id.Audience,
		"verification": map[string]any{"type": "uploaded_jwks", "jwks": id.jwks()},
	}
	fixed := map[string]any{"type": "oidc"}
	if !write && id.OrganizationID == "" {
		return errOperator
	}
	err := b.useProvider(ctx, s, id, func(c *client) error {
		if !c.config.vouchesFor(id) {
			return errNotVouched
		}
		saved, err := c.saveFederated(ctx, provider, providersPath, id.ProviderID, in, fixed)
		if write && isNotFound(err) {
			saved, err = c.saveFederated(ctx, provider, providersPath, "", in, fixed)
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
	defer b.invalidate(ctx, identityPath) // also after an error: it may have been stored
	id, err := getIdentity(ctx, req.Storage)
	if err != nil || id == nil {
		return nil, err
	}
	err = b.useProvider(ctx, req.Storage, id, func(c *client) error {
		named := func(p federated) bool { return p.Name == b.providerName() }
		err := c.deleteFederated(ctx, provider, providersPath, id.ProviderID, named)
		if err == nil && id.ProviderID != "" { // a late POST may have made a second one
			err = c.deleteFederated(ctx, provider, providersPath, "", named)
		}
		return err
	})
	resp := &logical.Response{}
	if cannotManage(err) && id.ProviderID != "" {
		resp.AddWarning(fmt.Sprintf("the plugin changed nothing at OpenAI (%s): identity provider %q is there still, "+
			"turn it off or delete it: until then its key works", err, id.ProviderID))
	} else if err != nil && !cannotManage(err) {
		return answerError(fmt.Errorf("deleting the identity provider: %w", err))
	}
	if err := req.Storage.Delete(ctx, identityPath); err != nil {
		return nil, fmt.Errorf("deleting config/identity: %w", err)
	}
	b.report(ctx, req, "identity-delete", nil, "identity_provider_id", id.ProviderID)
	return resp, nil
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
	defer b.invalidate(ctx, identityPath) // also after an error: it may have been stored
	id, err := getIdentity(ctx, req.Storage)
	if err != nil || id == nil {
		return answerError(cmp.Or(err, error(errNoIdentity)))
	}
	confirm := d.Get("confirm").(bool)
	switch {
	case time.Now().Before(id.FormerUntil):
		return logical.ErrorResponse("the former key is published until %s, as a token of it may live: rotate after "+
			"that; a stolen key is ended by turning the provider off at OpenAI", formatTime(id.FormerUntil)), nil
	case confirm && id.Next == nil:
		return logical.ErrorResponse("there is no new key to confirm: rotate without confirm first"), nil
	case id.Next == nil:
		if id.Next, err = newSigningKey(); err == nil {
			err = putJSON(ctx, req.Storage, identityPath, id)
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

// useNext lets the new key sign once OpenAI accepts it for some role. Without a role there is nothing that could break.
func (b *backend) useNext(ctx context.Context, s logical.Storage, id *identity) error {
	next, err := b.newSigner(id, id.Next)
	roles, rolesErr := tokenRoles(ctx, s)
	if err = errors.Join(err, rolesErr); err == nil {
		err = await(ctx, checkTimeout, func(ctx context.Context) (err error) {
			for name, r := range roles {
				if _, err = next.exchange(ctx, b.subject(name), r.ServiceAccountID, clockTolerance); !notAccepted(err) {
					return err
				}
			}
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("proving the new key: %w", err)
	}
	id.Former, id.FormerUntil = id.Key.jwk, time.Now().Add(requestTimeout+maxTokenLife)
	id.Key, id.Next = id.Next, nil
	return putJSON(ctx, s, identityPath, id)
}

// withdrawFormer is the part of periodic that takes the former key off OpenAI's when no token of it can be alive.
func (b *backend) withdrawFormer(ctx context.Context, s logical.Storage) {
	if !b.identityMu.TryLock() {
		return
	}
	defer b.identityMu.Unlock()
	id, err := getIdentity(ctx, s)
	latest := time.Now().Add(requestTimeout + maxTokenLife)
	if err == nil && id != nil && id.FormerUntil.After(latest) { // the clock was ahead at the rotation
		id.FormerUntil = latest
		err = putJSON(ctx, s, identityPath, id)
	}
	if err == nil && (id == nil || id.FormerUntil.IsZero() || time.Now().Before(id.FormerUntil)) {
		return
	}
	if err == nil {
		err = b.saveProvider(ctx, s, id, false)
	}
	if errors.Is(err, errNotConfigured) || errors.Is(err, errOtherOrganization) {
		return // until the admin key is there again
	}
	if err == nil || errors.Is(err, errOperator) { // then he has to: jwks lacks the key from now on
		b.Logger().Info("the former signing key is not needed any more", "key_id", id.Former.KeyID, "error", err)
		b.invalidate(ctx, identityPath) // storage may have carried the rotation out late, after a token was read
		id.Former, id.FormerUntil = jwk{}, time.Time{}
		err = putJSON(ctx, s, identityPath, id)
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
	err := b.useProvider(ctx, s, id, func(c *client) error {
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
	roles, rolesErr := tokenRoles(ctx, s)
	if err = errors.Join(err, rolesErr); err != nil {
		return err
	}
	for other, o := range roles {
		if other != name && o.ServiceAccountID == r.ServiceAccountID {
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

const (
	staticGrace   = 24 * time.Hour  // at least so long a static role's key outlives a rotation that was missed
	staticOverdue = 2 * time.Minute // after its time a rotation is overdue: the plugin looks each minute
	maxFormer     = 2               // replaced keys of a static role that live
	maxStatic     = 8               // static roles that are worked on at once: the calls a minute that there may be
)

// errStaticLimit is an error of a rotation that would leave more keys than there may be.
var errStaticLimit = errutil.UserError{Err: "two replaced keys still live, or 50 lost ones are looked for: wait " +
	"until overlap has passed, or end the replaced ones with overlap=0"}

// exists tells whether the entry is a role.
func (r *staticRole) exists() bool { return r.Key.APIKeyID != "" }

// getStatic reads the entry of a static role; an empty one when there is none.
func getStatic(ctx context.Context, s logical.Storage, name string) (*staticRole, error) {
	r, err := getJSON(ctx, s, staticPrefix+name, &staticRole{})
	return cmp.Or(r, &staticRole{}), err
}

// listStatic reads all static roles, by name.
func listStatic(ctx context.Context, s logical.Storage) (map[string]*staticRole, error) {
	roles, err := getAll(ctx, s, staticPrefix, getStatic)
	maps.DeleteFunc(roles, func(_ string, r *staticRole) bool { return !r.exists() })
	return roles, err
}

// changeStatic changes what is stored of a static role by now: another node may have written it. An entry that has
// become empty is deleted. It also works when ctx has ended: a wait for a turn at OpenAI ends so. The caller holds the
// role's lock.
func changeStatic(ctx context.Context, s logical.Storage, name string, change func(*staticRole) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	r, err := getStatic(ctx, s, name)
	if err == nil {
		err = change(r)
	}
	switch {
	case err != nil:
		return err
	case !r.exists() && len(r.Former)+len(r.Creating) == 0:
		return s.Delete(ctx, staticPrefix+name)
	}
	return putJSON(ctx, s, staticPrefix+name, r)
}

// retire makes the present key a former one. No former key then lives for longer than overlap.
func (r *staticRole) retire(overlap time.Duration) {
	until := time.Now().Add(overlap)
	if r.exists() {
		r.Key.Value, r.Key.Until = "", cmp.Or(r.Key.Expires, until)
		r.Former = append(r.Former, r.Key)
	}
	for i := range r.Former {
		if r.Former[i].Until.After(until) {
			r.Former[i].Until = until
		}
	}
}

// forget takes a name off Creating, and tells whether it was there.
func (r *staticRole) forget(name string) bool {
	n := len(r.Creating)
	r.Creating = slices.DeleteFunc(r.Creating, func(k creatingKey) bool { return k.Name == name })
	return len(r.Creating) < n
}

func pathStatic(b *backend) []*framework.Path {
	settings := fieldMap{
		"project_id":         required(text, "ID of the OpenAI project of the service account (proj_…). Required."),
		"service_account_id": required(text, "ID of the existing service account that the key is made on. Required."),
		"scopes":             field(texts, "Scopes that the key is restricted to. Default: none, all the account can."),
		"rotation_period":    field(duration, "Time between rotations: at least 1m. Excludes rotation_schedule."),
		"rotation_schedule":  field(text, "Times of rotations: cron with five fields, in UTC. Default: none."),
		"overlap": field(duration, "How long a replaced key works: 0 or more, less than the time between rotations. "+
			"Default of the first write: 1h, or half that time."),
	}
	fields, shown := maps.Clone(settings), maps.Clone(settings)
	fields["name"] = required(text, "Name of the static role.")
	name := fieldMap{"name": fields["name"]}
	shown["api_key_id"] = required(text, "ID of the present key.")
	shown["expires_at"] = required(text, "When OpenAI itself expires the key (RFC 3339, UTC); empty: never.")
	shown["last_rotated"] = required(text, "When the key was made (RFC 3339, UTC).")
	shown["next_rotation"] = required(text, "When it is due to be replaced (RFC 3339, UTC).")
	creds := maps.Clone(shown)
	shown["former_api_key_ids"] = required(texts, "IDs of replaced keys that still work.")
	creds["api_key"] = secret("The OpenAI API key.")
	creds["organization_id"] = required(text, "ID of the organization.")
	creds["last_vault_rotation"] = required(text, "The same as last_rotated, for tools that know it by this name.")
	creds["ttl"] = required(duration, "Seconds until next_rotation; 0 when it is overdue.")
	list := operation(b.staticList, "list", "", "List the static roles.",
		fieldMap{"keys": field(framework.TypeStringSlice, "Names of the static roles.")})
	write := forwarded(operation(b.staticWrite, "write", "", "Create or update a static role.", nil))
	return []*framework.Path{{
		Pattern: staticPrefix + "?$", DisplayAttrs: display("static-roles"),
		Operations:   operations{logical.ListOperation: list},
		HelpSynopsis: "List the static roles.", HelpDescription: staticHelpDescription,
	}, {
		Pattern: staticPrefix + framework.GenericNameRegex("name"), DisplayAttrs: display("static-role"),
		Fields: fields,
		Operations: operations{
			logical.CreateOperation: write, logical.UpdateOperation: write,
			logical.ReadOperation:   operation(b.staticRead, "read", "", "Read a static role, without its key.", shown),
			logical.DeleteOperation: forwarded(operation(b.staticDelete, "delete", "", "Delete it and its keys.", nil)),
		},
		ExistenceCheck: exists, // what is left of a deleted role counts too: its name is written again by an update
		HelpSynopsis:   "Manage a key that many read and that is rotated.", HelpDescription: staticHelpDescription,
	}, {
		Pattern: "static-creds/" + framework.GenericNameRegex("name"), DisplayAttrs: display("static-credentials"),
		Fields: name,
		Operations: operations{
			logical.ReadOperation: operation(b.staticRead, "read", "", "Read the key of a static role.", creds),
		},
		HelpSynopsis: "Read the key of a static role.", HelpDescription: staticHelpDescription,
	}, {
		Pattern: "rotate-role/" + framework.GenericNameRegex("name"), DisplayAttrs: display("static-role"),
		Fields: name,
		Operations: operations{
			logical.UpdateOperation: forwarded(operation(b.staticWrite, "rotate", "", "Replace the key now.",
				fieldMap{"api_key_id": shown["api_key_id"], "rotated_time": shown["last_rotated"]})),
		},
		HelpSynopsis: "Replace the key of a static role by a new one.", HelpDescription: staticHelpDescription,
	}}
}

func (b *backend) staticList(ctx context.Context, req *logical.Request, _ *fieldData) (*logical.Response, error) {
	roles, err := listStatic(ctx, req.Storage)
	if err != nil {
		return nil, err
	}
	return logical.ListResponse(slices.Sorted(maps.Keys(roles))), nil
}

// staticRead shows a static role, or hands out its key. It asks OpenAI nothing.
func (b *backend) staticRead(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	creds, now := strings.HasPrefix(req.Path, "static-creds/"), time.Now()
	r, err := getStatic(ctx, req.Storage, d.Get("name").(string))
	switch {
	case err != nil || !r.exists() && !creds:
		return nil, err
	case !r.exists():
		return logical.ErrorResponse("static role %q does not exist", d.Get("name")), nil
	case creds && !r.Key.Expires.IsZero() && !now.Before(r.Key.Expires):
		return nil, errors.New("the key has expired, since its rotation fails: see Vault's log")
	}
	next := r.nextRotation(now)
	data := map[string]any{
		"project_id": r.ProjectID, "service_account_id": r.ServiceAccountID, "scopes": append([]string{}, r.Scopes...),
		"rotation_period": int64(r.RotationPeriod.Seconds()), "rotation_schedule": r.RotationSchedule,
		"overlap": int64(r.Overlap.Seconds()), "api_key_id": r.Key.APIKeyID, "expires_at": formatTime(r.Key.Expires),
		"last_rotated": formatTime(r.LastRotatedTime), "next_rotation": formatTime(next),
	}
	if creds {
		data["api_key"], data["organization_id"] = r.Key.Value, r.Key.OrganizationID
		data["last_vault_rotation"] = data["last_rotated"]
		data["ttl"] = int64(max(0, next.Sub(now)).Seconds())
	} else {
		former := []string{}
		for _, k := range r.Former {
			former = append(former, k.APIKeyID)
		}
		data["former_api_key_ids"] = former
	}
	return &logical.Response{Data: data}, nil
}

// keyLife returns how long a new key of the role lives at OpenAI. Its error is the caller's: the times do not fit.
func (r *staticRole) keyLife() (life time.Duration, err error) {
	shortest, longest := r.gaps(time.Now())
	least := longest + r.Overlap + staticGrace
	switch {
	case shortest < time.Minute: // a schedule has whole minutes
		err = errors.New("rotation_period must be at least 1m, or there must be a rotation_schedule")
	case r.Overlap >= shortest:
		err = fmt.Errorf("overlap is %s, and must be less than the shortest time between rotations, %s: write it too",
			r.Overlap, shortest)
	case longest > maxKeyLife-r.Overlap-staticGrace: // the sum may overflow
		err = errors.New("the longest time between rotations (rotation_period, rotation_schedule), overlap and a day " +
			"must together be at most 365 days")
	}
	return min(least+longest, maxKeyLife), err
}

// update sets the fields that d names and checks what needs no call. It returns the role of the same project, account
// and scopes. Its error is the caller's.
func (r *staticRole) update(d *fieldData) (*role, error) {
	target := newRole()
	target.TTL = defaultTTL // a static role has none
	target.ProjectID, target.ServiceAccountID, target.Scopes = r.ProjectID, r.ServiceAccountID, r.Scopes
	if err := cmp.Or(target.update(d), r.schedule.update(d)); err != nil {
		return nil, err
	}
	r.ProjectID, r.ServiceAccountID, r.Scopes = target.ProjectID, target.ServiceAccountID, target.Scopes
	if r.ServiceAccountID == "" {
		return nil, errors.New("service_account_id is required")
	}
	if _, named := d.Raw["overlap"]; !named && !r.exists() {
		shortest, _ := r.gaps(time.Now())
		r.Overlap = min(time.Hour, shortest/2).Truncate(time.Second)
	}
	setSeconds(d, "overlap", &r.Overlap)
	_, err := r.keyLife()
	return target, err
}

// staticWrite makes a new key: for a rotation by hand, and for a write of the role unless that changes nothing.
func (b *backend) staticWrite(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	name, byHand, resp := d.Get("name").(string), strings.HasPrefix(req.Path, "rotate-role/"), &logical.Response{}
	defer b.lock(staticPrefix + name).Unlock()
	r, err := getStatic(ctx, req.Storage, name)
	if err != nil {
		return nil, err
	}
	if byHand && !r.exists() {
		return logical.ErrorResponse("static role %q does not exist", name), nil
	}
	was, target := *r, (*role)(nil)
	if !byHand { // what is stored may not fit any more at this time of the year
		if target, err = r.update(d); err != nil {
			return logical.ErrorResponse(err.Error()), nil
		}
	}
	changed := !reflect.DeepEqual(&was, r)
	if changed {
		err = b.checkRole(ctx, req.Storage, "", target, resp)
	}
	if err == nil && (changed || byHand) {
		if err = b.rotateStatic(ctx, req, name, r); err == nil {
			b.settleStatic(ctx, req.Storage, name, resp)
		}
	}
	if err != nil {
		return answerError(err)
	}
	if byHand {
		resp.Data = map[string]any{"api_key_id": r.Key.APIKeyID, "rotated_time": formatTime(r.LastRotatedTime)}
	}
	return resp, nil
}

// staticDelete leaves an entry without a key until all keys of the role are deleted or have a clean-up entry. The keys
// that OpenAI still has are an error, since disabling the mount would forget them.
func (b *backend) staticDelete(ctx context.Context, req *logical.Request, d *fieldData) (*logical.Response, error) {
	name := d.Get("name").(string)
	defer b.lock(staticPrefix + name).Unlock()
	err := changeStatic(ctx, req.Storage, name, func(r *staticRole) error {
		r.retire(0)
		*r = staticRole{Former: r.Former, Creating: r.Creating}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("deleting static role %q: %w", name, err)
	}
	b.retries.Delete(staticPrefix + name)
	b.report(ctx, req, "static-role-delete", nil, "name", name)
	resp := &logical.Response{}
	b.settleStatic(ctx, req.Storage, name, resp)
	if len(resp.Warnings) > 0 { // no success, after which Terraform would disable the mount
		return logical.ErrorResponse("the static role is deleted, but do not disable the mount yet: %s",
			strings.Join(resp.Warnings, "; ")), nil
	}
	return nil, nil
}

// beginStatic stores the name of a new key, l, for a static role that is to be as next, and returns how long the key is
// to live.
func (b *backend) beginStatic(ctx context.Context, s logical.Storage, l *lease, next *staticRole) (
	life time.Duration, err error) {
	now := time.Now()
	c, err := b.getClient(ctx, s)
	if err == nil && b.mountID == "" {
		err = errNoUUID
	}
	if err != nil {
		return 0, err
	}
	life, _ = next.keyLife() // what does not fit at this time of the year fitted when it was written
	l.OrganizationID, l.End = c.config.OrganizationID, endOf(now, life).Unix()
	suffix := newSuffix(b.mountID, unixTime(l.End))
	l.Name, _ = renderName(defaultNameTemplate, nameData{RoleName: l.Role, RandomSuffix: suffix})
	return life, changeStatic(ctx, s, l.Role, func(r *staticRole) error {
		live := slices.DeleteFunc(slices.Clone(r.Former), func(k staticKey) bool {
			clockWasAhead := k.Until.After(now.Add(r.Overlap + clockTolerance))
			return !k.Until.After(now) || clockWasAhead
		})
		full := len(live) >= maxFormer || len(r.Creating) >= maxCreating
		if next.Overlap > 0 && full || len(r.Creating) >= maxLost {
			return errStaticLimit
		}
		r.Creating = append(r.Creating, creatingKey{l.Name, l.OrganizationID, l.ProjectID, now})
		return nil
	})
}

// rotateStatic makes a key for a static role that is to be as next, and stores both. The caller holds the role's lock.
// What a fault or a crash leaves, by the step that came last:
//
//	name stored  nothing, or a new key that nobody has: settleStatic finds it by its name
//	key made     likewise
//	key stored   both keys work; settleStatic deletes the old one when overlap is over
func (b *backend) rotateStatic(ctx context.Context, req *logical.Request, name string, next *staticRole) (err error) {
	s, existed := req.Storage, next.exists()
	l := &lease{ProjectID: next.ProjectID, ServiceAccountID: next.ServiceAccountID, Role: name, KeyOnly: true}
	defer func() {
		if isMistake(err) && req.Operation != logical.RollbackOperation {
			return
		}
		if err == nil || existed { // names that never come to be would make series without end
			b.metrics.add("static_rotations_total", 1, "role", name, "result", result(err))
		}
		b.report(ctx, req, "static-rotate", err, "name", name, "project_id", l.ProjectID,
			"service_account_id", l.ServiceAccountID, "api_key_id", l.APIKeyID)
	}()
	life, err := b.beginStatic(ctx, s, l, next)
	if err != nil {
		return err
	}
	key, err := b.create(ctx, s, &role{ProjectID: next.ProjectID, Scopes: next.Scopes}, life, l)
	if notDone(err) {
		undo := func(r *staticRole) error { r.forget(l.Name); return nil }
		err = errors.Join(err, changeStatic(ctx, s, name, undo))
	}
	if err != nil {
		return err
	}
	err = changeStatic(ctx, s, name, func(r *staticRole) error {
		if r.Key.APIKeyID != next.Key.APIKeyID || !r.forget(l.Name) {
			return errors.New("another node has written or deleted the role, or given up the new key")
		}
		r.retire(next.Overlap)
		next.LastRotatedTime, next.Former, next.Creating = time.Now(), r.Former, r.Creating
		next.Key = staticKey{lease: *l, Value: key.Value, Expires: unixTime(key.ExpiresAt)}
		*r = *next
		return nil
	})
	if err == nil {
		b.retries.Delete(staticPrefix + name)
	}
	return err
}

// seekStatic looks for a key that a rotation began to make. One that is found becomes a former key whose time has come.
// What is not found stays for lostTime, by OpenAI's clock, since OpenAI may carry it out late.
func (b *backend) seekStatic(ctx context.Context, s logical.Storage, name string, k creatingKey) error {
	var found []lease
	var now time.Time
	err := b.useClient(ctx, s, k.OrganizationID, func(c *client) (err error) {
		found, now, err = c.credentialsNamed(ctx, k.ProjectID, func(n string) bool { return n == k.Name })
		return err
	})
	// An account of that name is not ours. Where OpenAI tells no Date, the end in the name is for tidy.
	found = slices.DeleteFunc(found, func(l lease) bool { return !l.KeyOnly })
	over := len(found) > 0 || k.Since.Add(lostTime).Before(now) || time.Since(k.Since) > 2*lostTime
	if err != nil && !errors.Is(err, errOtherOrganization) {
		return err
	}
	if !over {
		b.staticSought.Store(k.Name, time.Now())
		return nil
	}
	b.staticSought.Delete(k.Name)
	return changeStatic(ctx, s, name, func(r *staticRole) error {
		known := r.forget(k.Name) // else another node has put it to use
		for i := 0; known && i < len(found); i++ {
			r.Former = append(r.Former, staticKey{lease: found[i]})
		}
		return nil
	})
}

// settleStatic deletes what rotations of a static role have left at OpenAI: replaced keys whose time has come, and then
// keys that rotations began to make, which become replaced keys of the next time. What is to be deleted gets a clean-up
// entry first, with which sweep goes on. The caller holds the role's lock.
func (b *backend) settleStatic(ctx context.Context, s logical.Storage, name string, to *logical.Response) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout) // others wait for the lock
	defer cancel()
	r, failed := getStatic(ctx, s, name)
	for _, k := range r.Former {
		if time.Now().Before(k.Until) {
			continue
		}
		_, err := b.addCleanup(ctx, s, &k.lease, 0)
		if err == nil {
			err = changeStatic(ctx, s, name, func(r *staticRole) error {
				r.Former = slices.DeleteFunc(r.Former, func(f staticKey) bool { return f.APIKeyID == k.APIKeyID })
				return nil
			})
		}
		if err == nil {
			err = b.sweepOne(ctx, s, k.APIKeyID)
		}
		if err != nil {
			to.AddWarning("a replaced key could not be deleted yet, it is tried each minute: " + k.APIKeyID)
		}
		failed = cmp.Or(failed, err)
	}
	for _, k := range r.Creating { // looked for at each tick at first, and later each hour
		last, _ := b.staticSought.Load(k.Name)
		sought, _ := last.(time.Time)
		if time.Since(k.Since).Abs() < searchTime || time.Since(sought) > time.Hour-time.Minute {
			failed = cmp.Or(failed, b.seekStatic(ctx, s, name, k))
		}
	}
	if failed != nil {
		b.Logger().Warn("deleting keys of a static role failed, will be tried again", "name", name, "error", failed)
	}
}

// staticPeriodically rotates the keys of static roles that are due, and deletes what rotations have left: outside of
// Vault's tick, which holds a lock, a few at once and each in bounded time, so that one that hangs does not keep the
// others from it.
func (b *backend) staticPeriodically(req *logical.Request) {
	b.inBackground(&b.staticMu, func(ctx context.Context) {
		names, err := req.Storage.List(ctx, staticPrefix)
		if err != nil {
			b.Logger().Error("listing static roles failed", "error", err)
		}
		mathrand.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		var group sync.WaitGroup
		slots := make(chan struct{}, maxStatic)
		for _, name := range names {
			if put(ctx, slots) == nil {
				group.Go(func() { b.tendStatic(ctx, req, name); <-slots })
			}
		}
		group.Wait()
	})
}

// tendStatic is staticPeriodically for one role. It does nothing while the role is being changed.
func (b *backend) tendStatic(ctx context.Context, req *logical.Request, name string) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	lock := locksutil.LockForKey(b.roleLocks, staticPrefix+name)
	if !lock.TryLock() {
		return
	}
	defer lock.Unlock()
	if r, err := getStatic(ctx, req.Storage, name); err == nil && r.exists() {
		b.rotateDue(staticPrefix+name, &r.schedule, func() error { return b.rotateStatic(ctx, req, name, r) })
	}
	b.settleStatic(ctx, req.Storage, name, &logical.Response{})
}

const staticHelpDescription = `
A static role is one key that many read, for what can't follow a lease. It is made on an existing service account when
the role is written, and replaced as scheduled, by rotate-role/<name>, and by each write that changes the role. A
replaced key works until overlap, which is less than the time between rotations, has passed, or until it expires, and is
then deleted: who reads static-creds/<name> at least once in that time always has a key that works. A read asks OpenAI
nothing.

At most two replaced keys live: what would make a third one is refused, but for a write of overlap=0, which ends them
all. A key expires at OpenAI after twice the longest time between rotations, overlap and a day, at most 365 days; an
expired key is an error. Deleting a static role deletes its keys, never the service account.
`
