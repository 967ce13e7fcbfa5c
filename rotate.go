// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
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
	ctx, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	for wait := 100 * time.Millisecond; ; wait = min(2*wait, maxProofWait) {
		_, err := c.getAdminKey(ctx, c.config.AdminAPIKeyID)
		if !isStatus(err, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound) {
			return err
		}
		if sleep(ctx, wait) != nil {
			return err
		}
	}
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
