// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// backend is one mount of the secrets engine.
type backend struct {
	*framework.Backend

	transport http.RoundTripper // shared by all clients of the mount
	throttle  *throttle         // likewise

	// configMu is held by whoever changes config or makes or deletes admin keys, from
	// reading config to writing it: config writes, rotations, and their rollback.
	configMu sync.Mutex
	// retryRotation is when a scheduled rotation that failed may be tried again, and
	// rotationFailures how often it failed in a row. Guarded by configMu.
	retryRotation    time.Time
	rotationFailures int

	mu     sync.RWMutex
	client *client // of the stored config; nil until it is needed. Guarded by mu.
}

// errNotConfigured is what everything that needs OpenAI answers without a config.
var errNotConfigured = errors.New("the OpenAI secrets engine is not configured: write config first")

// Factory makes the backend of a mount. Vault also calls it to register the plugin,
// without storage or system view: it does nothing but set up.
func Factory(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
	b := newBackend(newTransport())
	if err := b.Setup(ctx, conf); err != nil {
		return nil, fmt.Errorf("setting up the backend: %w", err)
	}
	return b, nil
}

func newBackend(transport http.RoundTripper) *backend {
	b := &backend{transport: transport, throttle: newThrottle()}
	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: version,
		Help:           strings.TrimSpace(backendHelp),
		Paths: framework.PathAppend(
			pathConfig(b),
			pathRoles(b),
			pathCreds(b),
		),
		Secrets: []*framework.Secret{secretAPIKey(b)},
		PathsSpecial: &logical.Paths{
			LocalStorage:    []string{framework.WALPrefix},
			SealWrapStorage: []string{configPath},
		},
		Invalidate:        b.invalidate,
		PeriodicFunc:      b.periodic,
		RotateCredential:  b.rotateCredential,
		WALRollback:       b.rollback,
		WALRollbackMinAge: walMinAge,
		Clean:             b.clean,
	}
	return b
}

// HandleRequest bounds every request: Vault gives most of them no deadline of their
// own. Once the time is up a handler leaves its write-ahead-log entries to rollback.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	return b.Backend.HandleRequest(ctx, req)
}

// invalidate drops what is cached of a storage entry that another node has changed.
func (b *backend) invalidate(_ context.Context, key string) {
	if key == configPath {
		b.setClient(nil)
	}
}

// clean closes idle connections when the mount is disabled or Vault is sealed.
func (b *backend) clean(context.Context) {
	(&http.Client{Transport: b.transport}).CloseIdleConnections()
}

// setClient makes c the client of later calls and returns the one before it.
func (b *backend) setClient(c *client) (previous *client) {
	b.mu.Lock()
	defer b.mu.Unlock()
	previous, b.client = b.client, c
	return previous
}

// acquireClient returns the current client, made from the stored config where there is
// none yet. The caller calls inflight.Done when it is through with it.
func (b *backend) acquireClient(ctx context.Context, s logical.Storage) (*client, error) {
	b.mu.RLock()
	c := b.client
	if c != nil {
		c.inflight.Add(1)
	}
	b.mu.RUnlock()
	if c != nil {
		return c, nil
	}

	b.mu.Lock()
	defer b.mu.Unlock()
	if b.client == nil {
		cfg, err := getConfig(ctx, s)
		if err != nil {
			return nil, err
		}
		if cfg == nil {
			return nil, errNotConfigured
		}
		b.client = newClient(cfg, b.transport, b.throttle)
	}
	b.client.inflight.Add(1)
	return b.client, nil
}

// useClient runs fn with the current client. When OpenAI refuses its key, another node
// may have rotated it: fn runs a second time if config now holds another key. fn makes
// one call that is not repeatable at the most, so that a refused one was not done.
func (b *backend) useClient(ctx context.Context, s logical.Storage, fn func(*client) error) error {
	run := func() (*client, error) {
		c, err := b.acquireClient(ctx, s)
		if err != nil {
			return nil, err
		}
		defer c.inflight.Done()
		return c, fn(c)
	}
	c, err := run()
	if !isStatus(err, http.StatusUnauthorized) {
		return err
	}
	cfg, configErr := getConfig(ctx, s)
	if configErr != nil || cfg == nil || cfg.AdminAPIKey == c.config.AdminAPIKey {
		return err
	}
	b.mu.Lock()
	if b.client == c {
		b.client = nil
	}
	b.mu.Unlock()
	_, err = run()
	return err
}

// Kinds of write-ahead-log entries.
const (
	walServiceAccount = "service_account" // data: walAccount
	walAdminKey       = "admin_api_key"   // data: walKey
)

// walMinAge is how old an entry must be before it is rolled back. A request ends within
// requestTimeout, so one that is older belongs to no request that may still succeed.
const walMinAge = 2 * time.Minute

// walAccount is written before a service account is made and deleted when its answer is
// on the way to the caller. Names are unique, ids are not known yet.
type walAccount struct {
	ProjectID string `json:"project_id"`
	Name      string `json:"name"`
}

// walKey is the same for an admin key that a rotation makes.
type walKey struct {
	Name string `json:"name"`
}

// rollback undoes what a write-ahead-log entry stands for; nil deletes the entry. Vault
// calls it about every minute for each entry older than walMinAge, and logs no error.
func (b *backend) rollback(ctx context.Context, req *logical.Request, kind string, data any) error {
	var err error
	switch kind {
	case walServiceAccount:
		var w walAccount
		if err = decodeWAL(data, &w); err == nil {
			err = b.rollbackAccount(ctx, req.Storage, w)
		}
	case walAdminKey:
		var w walKey
		if err = decodeWAL(data, &w); err == nil {
			err = b.rollbackAdminKey(ctx, req.Storage, w)
		}
	default:
		err = fmt.Errorf("unknown kind of write-ahead-log entry %q", kind)
	}
	if err != nil {
		b.Logger().Error("rollback failed, will be tried again", "kind", kind, "error", err)
	}
	return err
}

// decodeWAL reads the data of an entry, which comes back as a map.
func decodeWAL(data, out any) error {
	raw, err := json.Marshal(data)
	if err == nil {
		err = json.Unmarshal(raw, out)
	}
	if err != nil {
		return fmt.Errorf("reading write-ahead-log entry: %w", err)
	}
	return nil
}

// rollbackAccount deletes the account of a create whose end nobody saw. Finding none is
// success: it was never made, or went with its project.
func (b *backend) rollbackAccount(ctx context.Context, s logical.Storage, w walAccount) error {
	return b.useClient(ctx, s, func(c *client) error {
		ids, err := c.serviceAccountsNamed(ctx, w.ProjectID, w.Name)
		if err != nil {
			if isNotFound(err) || c.projectGone(ctx, w.ProjectID, err) {
				return nil
			}
			return fmt.Errorf("looking for service account %q: %w", w.Name, err)
		}
		for _, id := range ids {
			if err := c.deleteServiceAccount(ctx, w.ProjectID, id); err != nil {
				return fmt.Errorf("deleting service account %q: %w", id, err)
			}
			b.Logger().Info("rolled back a service account that was never handed out",
				"project_id", w.ProjectID, "service_account", w.Name, "service_account_id", id)
		}
		return nil
	})
}
