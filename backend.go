// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/logical"
)

// backend is one mount of the secrets engine.
type backend struct {
	*framework.Backend

	transport http.RoundTripper // shared by all clients of the mount
	throttle  *throttle         // likewise
	metrics   *metrics
	// enterprise tells whether Vault keeps observations and events. The community edition
	// would drop them, after two calls for each credential.
	enterprise func() bool

	// configMu is held by whoever changes config or makes or deletes admin keys, from
	// reading config to writing it: config writes, rotations, and their rollback. It
	// guards what is about the schedule of rotations:
	configMu         sync.Mutex
	retryRotation    time.Time // when a rotation that failed may be tried again
	rotationFailures int       // in a row
	expiryWarned     time.Time // when the log was last told that the admin key ends soon

	mu     sync.RWMutex
	client *client // of the stored config; nil until it is needed. Guarded by mu.

	roles atomic.Pointer[roleCache]

	unsettled sync.Map // names of issued credentials whose entries in the write-ahead log must stay
	underWay  sync.Map // reservations that are not settled yet, by their first name

	sweepFrom string // the clean-up entry that the next sweep begins after; only periodic uses it
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
	b := &backend{transport: transport, throttle: newThrottle(), metrics: newMetrics()}
	b.forgetRoles()
	b.enterprise = sync.OnceValue(func() bool {
		env, err := b.System().PluginEnv(context.Background())
		return err != nil || strings.HasPrefix(env.GetVaultVersionMetadata(), "ent")
	})
	b.Backend = &framework.Backend{
		BackendType:    logical.TypeLogical,
		RunningVersion: version,
		Help:           strings.TrimSpace(backendHelp),
		Paths: framework.PathAppend(
			pathConfig(b),
			pathRoles(b),
			pathCreds(b),
			pathMetrics(b),
		),
		Secrets: []*framework.Secret{secretAPIKey(b)},
		PathsSpecial: &logical.Paths{
			LocalStorage:    []string{framework.WALPrefix, cleanupPrefix},
			SealWrapStorage: []string{configPath},
		},
		Invalidate:        b.invalidate,
		PeriodicFunc:      b.periodic,
		RotateCredential:  b.rotateCredential,
		WALRollback:       b.rollback,
		WALRollbackMinAge: walMinAge,
	}
	return b
}

// invalidInput is the framework's error for a value of the wrong type, which it quotes.
var invalidInput = regexp.MustCompile(`^Field validation failed: error converting input for field "([a-z_]+)"`)

// HandleRequest bounds every request: Vault gives most of them no deadline of their own.
func (b *backend) HandleRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	timeout := requestTimeout
	if req.Operation == logical.RollbackOperation {
		timeout = rollbackTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	resp, err := b.Backend.HandleRequest(ctx, req)
	if err == nil && resp.IsError() {
		// A value of the wrong type may be a key: say what is allowed instead.
		if m := invalidInput.FindStringSubmatch(resp.Error().Error()); m != nil {
			return logical.ErrorResponse("%s does not take this value: %s", m[1], b.Route(req.Path).Fields[m[1]].Description), nil
		}
	}
	return resp, err
}

// HandleExistenceCheck leaves a value of the wrong type for HandleRequest to refuse: the
// framework's own error would quote it.
func (b *backend) HandleExistenceCheck(ctx context.Context, req *logical.Request) (checked, exists bool, err error) {
	checked, exists, err = b.Backend.HandleExistenceCheck(ctx, req)
	if invalid := (errutil.UserError{}); errors.As(err, &invalid) {
		return true, true, nil
	}
	return checked, exists, err
}

// invalidate drops what is cached of a storage entry that another node has changed.
func (b *backend) invalidate(_ context.Context, key string) {
	switch {
	case key == configPath:
		b.setClient(nil)
		b.forgetRoles()
	case strings.HasPrefix(key, rolePrefix):
		b.forgetRoles()
	}
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
		b.client = b.newClient(cfg)
	}
	b.client.inflight.Add(1)
	return b.client, nil
}

// useClient runs fn with the current client. When OpenAI refuses its key, the key may have
// been rotated, here or by another node: fn runs again if config now holds another one. fn
// makes one call that is not repeatable at the most, so that a refused one was not done.
func (b *backend) useClient(ctx context.Context, s logical.Storage, fn func(*client) error) error {
	for {
		c, err := b.acquireClient(ctx, s)
		if err != nil {
			return err
		}
		err = fn(c)
		c.inflight.Done()
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
	}
}

// organization returns the id of the organization that config has.
func (b *backend) organization(ctx context.Context, s logical.Storage) (id string, err error) {
	err = b.useClient(ctx, s, func(c *client) error { id = c.config.OrganizationID; return nil })
	return id, err
}

var errOtherOrganization = errors.New("config has another organization than")

// useClientOf is useClient for what belongs to an organization; "": not known. To another one
// it would not exist, which looks as if it were deleted.
func (b *backend) useClientOf(ctx context.Context, s logical.Storage, organization string, fn func(*client) error) error {
	return b.useClient(ctx, s, func(c *client) error {
		if organization != "" && organization != c.config.OrganizationID {
			return fmt.Errorf("%w %q", errOtherOrganization, organization)
		}
		return fn(c)
	})
}

// Kinds of write-ahead-log entries.
const (
	walCredential = "credential"        // data: pendingCredentials
	walIssued     = "issued_credential" // data: issuedCredential
	walAdminKey   = "admin_api_key"     // data: pendingAdminKey
)

const (
	// walMinAge is how old an entry must be before it is rolled back. A request ends within
	// requestTimeout and undoTimeout, and begins within roleCacheTime of its entry (whose role
	// was cached first), so one that is older belongs to no request that may still succeed. It
	// is short because disabling the mount throws younger entries away.
	walMinAge = 2 * time.Minute
	// walGrace is how long after its keys must have expired the rollback of credentials is
	// still tried.
	walGrace = 24 * time.Hour
	// settleTime is how long after the plugin's answer Vault has its lease for certain. If it
	// can't store the lease, it revokes the credential at once.
	settleTime    = 10 * time.Second
	settleTimeout = 10 * time.Second // of one write of it
	settleTries   = 5                // of each write, settleTime apart
	// reserveTime is how long names can be taken from a reservation, which has at most
	// maxReserved of them.
	reserveTime = 5 * time.Second
	maxReserved = 32
)

// pendingCredentials is written before accounts or keys are made. Names are unique; ids are
// not known yet.
type pendingCredentials struct {
	OrganizationID   string    `json:"organization_id,omitempty"`
	ProjectID        string    `json:"project_id"`
	ServiceAccountID string    `json:"service_account_id,omitempty"` // where only keys are made
	Names            []string  `json:"names"`
	Lost             bool      `json:"lost,omitempty"`   // nobody got what has these names
	Expires          time.Time `json:"expires,omitzero"` // no key outlives this; zero: it may
}

// issuedCredential is written before a credential is handed out, under its name. It keeps
// rollback from deleting the credential, and itself is deleted when its pendingCredentials are
// gone and Vault has the lease for certain. Where the process or Vault ends before, the lease
// may never have been stored: then the entry lives until the lease's end.
type issuedCredential struct {
	lease
	LeaseEnd time.Time `json:"lease_end"` // by then a lease has been renewed or revoked
}

// errNotDue keeps an entry of what is in use or under way, without a word in the log.
var errNotDue = errors.New("not due")

// putWAL is framework.PutWAL under an id of our own, which may be there already.
func putWAL(ctx context.Context, s logical.Storage, id, kind string, data any) error {
	return putJSON(ctx, s, framework.WALPrefix+id, framework.WALEntry{Kind: kind, Data: data, CreatedAt: time.Now().Unix()})
}

func putIssued(ctx context.Context, s logical.Storage, l *lease, end time.Time) error {
	return putWAL(ctx, s, l.WALID, walIssued, issuedCredential{*l, end})
}

// reservation is an entry of pendingCredentials under way, guarded by its role's mu until open
// is 0. Reads of a role that come at once or follow each other closely share one.
type reservation struct {
	pendingCredentials
	role  *cachedRole
	walID string
	taken int         // of its names
	open  int         // credentials whose end is not known yet, and 1 while names can be taken
	lost  []string    // names under which something may be left at OpenAI
	timer *time.Timer // ends the taking of names
}

// perRead matches templates whose names may depend on who asks, or when.
var perRead = regexp.MustCompile(`\.DisplayName|time|\.[^A-Z]|\$`)

// reserve returns a name for a new credential that is in the write-ahead log. A reservation has
// a name for each read that waits for it, or twice as many as were taken from the one before.
// The caller calls release.
func (b *backend) reserve(ctx context.Context, req *logical.Request, r *cachedRole) (res *reservation, name string, err error) {
	if perRead.MatchString(r.ServiceAccountNameTemplate) {
		r = &cachedRole{role: r.role, name: r.name} // shared with nobody
	}
	r.waiting.Add(1)
	defer r.waiting.Add(-1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if res = r.reserved; res == nil || res.taken == len(res.Names) {
		count := int(r.waiting.Load())
		if res != nil {
			count = max(count, 2*res.taken)
		}
		res = &reservation{role: r, open: 1}
		res.ProjectID, res.ServiceAccountID = r.ProjectID, r.ServiceAccountID
		if res.OrganizationID, err = b.organization(ctx, req.Storage); err != nil {
			return nil, "", err
		}
		if !r.UnexpiringKeys {
			res.Expires = time.Now().Add(reserveTime + requestTimeout + r.MaxTTL + keyGrace)
		}
		for range min(count, maxReserved) {
			if name, err = b.credentialName(ctx, req, r); err != nil {
				return nil, "", err
			}
			res.Names = append(res.Names, name)
		}
		if res.walID, err = framework.PutWAL(ctx, req.Storage, walCredential, res.pendingCredentials); err != nil {
			return nil, "", fmt.Errorf("writing write-ahead log: %w", err)
		}
		b.underWay.Store(res.Names[0], nil)
		r.reserved = res
		res.timer = time.AfterFunc(reserveTime, func() {
			b.release(req.Storage, res, func() { res.Names = res.Names[:res.taken] })
		})
	}
	name = res.Names[res.taken]
	res.taken++
	res.open++
	if res.taken == len(res.Names) && res.timer.Stop() {
		res.open--
	}
	return res, name, nil
}

// release ends one use of a reservation, after note; the last one has it settled.
func (b *backend) release(s logical.Storage, res *reservation, note func()) {
	res.role.mu.Lock()
	note()
	res.open--
	last := res.open == 0
	res.role.mu.Unlock()
	if last {
		b.settle(s, res)
	}
}

// settle takes a reservation out of the write-ahead log, but what rollback has to look for.
// Entries of what was issued follow later: they must be there for as long as the reservation's
// names them, and until Vault has the leases. What keeps failing stays.
func (b *backend) settle(s logical.Storage, res *reservation) {
	write := func(fn func(ctx context.Context) error) (err error) {
		for range settleTries {
			ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
			err = fn(ctx)
			cancel()
			if err == nil {
				return nil
			}
			time.Sleep(settleTime)
		}
		return err
	}
	err := write(func(ctx context.Context) error {
		if len(res.lost) == 0 {
			return framework.DeleteWAL(ctx, s, res.walID)
		}
		left := res.pendingCredentials
		left.Names, left.Lost = res.lost, true
		return putWAL(ctx, s, res.walID, walCredential, left)
	})
	time.AfterFunc(settleTime, func() {
		for _, name := range res.Names {
			// An entry that stays is harmless: see rollback.
			if _, stays := b.unsettled.LoadAndDelete(name); !stays && err == nil {
				err = write(func(ctx context.Context) error { return framework.DeleteWAL(ctx, s, name) })
			}
		}
		b.underWay.Delete(res.Names[0])
	})
}

// rollback undoes what a write-ahead-log entry stands for; nil deletes the entry. Vault
// calls it about every minute for each entry older than walMinAge, and logs no error.
func (b *backend) rollback(ctx context.Context, req *logical.Request, kind string, data any) error {
	err := ctx.Err() // the tick is over: not worth a line in the log
	if err == nil && b.passive() {
		err = errNotDue
	}
	if err != nil {
		return err
	}
	var pending pendingCredentials
	switch kind {
	case walCredential:
		if err = decode(data, &pending); err == nil {
			err = b.rollbackCredentials(ctx, req.Storage, pending)
		}
	case walIssued:
		var p issuedCredential
		if err = decode(data, &p); err == nil && time.Now().Before(p.LeaseEnd) {
			err = errNotDue
		}
		if err == nil { // sweep finds that most of them are gone already
			_, err = b.rememberCleanup(ctx, req.Storage, &p.lease, 0)
		}
	case walAdminKey:
		var p pendingAdminKey
		if err = decode(data, &p); err == nil {
			err = b.rollbackAdminKey(ctx, req.Storage, p)
		}
	default:
		err = fmt.Errorf("unknown kind of write-ahead-log entry %q", kind)
	}
	if errors.Is(err, errNotDue) {
		return err
	}
	b.metrics.add(metricRollbacks, 1, "kind", kind, "result", result(err))
	if err != nil && !pending.Expires.IsZero() && time.Since(pending.Expires) > walGrace {
		b.Logger().Error("gave up a rollback: the keys have expired, but their accounts may still exist",
			"project_id", pending.ProjectID, "names", pending.Names, "error", err)
		return nil
	}
	if err != nil {
		b.Logger().Error("rollback failed, will be tried again", "kind", kind, "error", err)
	}
	return err
}

// decode reads what storage gives back as a map.
func decode(data, out any) error {
	raw, err := json.Marshal(data)
	if err == nil {
		err = json.Unmarshal(raw, out)
	}
	return err
}

// rollbackCredentials deletes the accounts or keys of creates whose end nobody saw. Finding
// none is success: they were never made, or went with their project.
func (b *backend) rollbackCredentials(ctx context.Context, s logical.Storage, p pendingCredentials) error {
	var names []string
	for _, name := range p.Names {
		if _, open := b.underWay.Load(name); open {
			return errNotDue // the clock has been changed, or storage is slow
		}
		var issued *framework.WALEntry
		var err error
		if !p.Lost {
			issued, err = framework.GetWAL(ctx, s, name)
		}
		if err != nil {
			return fmt.Errorf("reading write-ahead log: %w", err)
		}
		if issued == nil {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	return b.useClientOf(ctx, s, p.OrganizationID, func(c *client) error {
		found, err := c.credentialsNamed(ctx, p.ProjectID, p.ServiceAccountID, names)
		if c.projectGone(ctx, p.ProjectID, err) {
			return nil
		}
		for _, l := range found {
			if err := c.deleteCredential(ctx, &l); err != nil {
				return fmt.Errorf("deleting %q: %w", l.key(), err)
			}
			b.Logger().Info("rolled back a credential that was never handed out", "project_id", p.ProjectID, "id", l.key())
		}
		return err
	})
}

const (
	// cleanupPrefix is where credentials are remembered that are still to be deleted at OpenAI.
	cleanupPrefix = "cleanup/"
	// maxRevokeFailures is after how many failures the plugin takes a revocation over. Vault
	// gives up at its sixth, and would then try once a day.
	maxRevokeFailures = 5
	revokeTimeout     = 60 * time.Second // of the calls of a revocation: leaves time to remember it
	sweepWorkers      = 16
)

// cleanup is the storage entry "cleanup/<id>" of a credential whose revocation failed, or whose
// lease Vault may never have stored.
type cleanup struct {
	lease
	Failures int `json:"failures"`
}

// key is unique to the credential.
func (l *lease) key() string {
	if l.KeyOnly {
		return l.APIKeyID
	}
	return l.ServiceAccountID
}

// deleteCredential deletes what a lease stands for at OpenAI.
func (b *backend) deleteCredential(ctx context.Context, s logical.Storage, l *lease) error {
	return b.useClientOf(ctx, s, l.OrganizationID, func(c *client) error { return c.deleteCredential(ctx, l) })
}

// rememberCleanup counts failed more revocations and returns their count. From here on sweep
// tries too.
func (b *backend) rememberCleanup(ctx context.Context, s logical.Storage, l *lease, failed int) (failures int, err error) {
	c := cleanup{lease: *l}
	if _, err := getJSON(ctx, s, cleanupPrefix+l.key(), &c); err != nil {
		return 0, err
	}
	c.Failures += failed
	return c.Failures, putJSON(ctx, s, cleanupPrefix+l.key(), c)
}

// sweep works clean-up entries off until ctx ends, beginning where the last one stopped.
// They belong to this cluster's leases, so that it runs on performance secondaries too.
func (b *backend) sweep(ctx context.Context, s logical.Storage) {
	if ctx.Err() != nil {
		return // a rotation has used up the tick
	}
	ids, err := s.List(ctx, cleanupPrefix)
	if err != nil {
		b.Logger().Error("listing clean-up entries failed", "error", err)
		return
	}
	start, found := slices.BinarySearch(ids, b.sweepFrom)
	if found {
		start++
	}
	ids = append(ids[start:], ids[:start]...)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var failures atomic.Int64 // there may be very many: one line tells of them
	for batch := range slices.Chunk(ids, sweepWorkers) {
		var workers sync.WaitGroup
		for _, id := range batch {
			workers.Go(func() {
				err := b.sweepOne(ctx, s, id)
				b.metrics.add(metricSweeps, 1, "result", result(err))
				if err != nil && failures.Add(1) == 1 {
					b.Logger().Warn("clean-up failed, will be tried again", "id", id, "error", err)
				}
				if errors.Is(err, errNotConfigured) || isStatus(err, http.StatusUnauthorized) {
					cancel() // it is the same for all
				}
			})
		}
		workers.Wait()
		b.sweepFrom = batch[len(batch)-1]
		if ctx.Err() != nil {
			break // the next tick goes on from here
		}
	}
}

// sweepOne deletes what an entry stands for, and then the entry.
func (b *backend) sweepOne(ctx context.Context, s logical.Storage, id string) error {
	var c cleanup
	if found, err := getJSON(ctx, s, cleanupPrefix+id, &c); err != nil || !found {
		return err
	}
	if err := b.deleteCredential(ctx, s, &c.lease); err != nil {
		return err
	}
	if err := s.Delete(ctx, cleanupPrefix+id); err != nil {
		return err
	}
	b.Logger().Info("cleaned up a credential", "project_id", c.ProjectID,
		"service_account_id", c.ServiceAccountID, "api_key_id", c.APIKeyID, "failures", c.Failures)
	return nil
}

// Of one tick: Vault's state lock is held meanwhile.
const (
	rollbackTimeout = 30 * time.Second // all of it
	periodicTimeout = 20 * time.Second // rotation and sweep, which come before rollback
)

// periodic is called by Vault about every minute, on every node. Its work is bounded
// and its errors are only logged: Vault would drop them.
func (b *backend) periodic(ctx context.Context, req *logical.Request) error {
	ctx, cancel := context.WithTimeout(ctx, periodicTimeout)
	defer cancel()
	if b.WriteSafeReplicationState() {
		b.rotatePeriodically(ctx, req)
	}
	if !b.passive() {
		b.sweep(ctx, req.Storage)
	}
	return nil
}

// passive tells whether this node leaves to others what has to be done for leases.
func (b *backend) passive() bool {
	return b.System().ReplicationState().HasState(consts.ReplicationDRSecondary | consts.ReplicationPerformanceStandby)
}

// change names a change of state as the log, Vault's observations and its events do.
type change struct {
	log         string
	observation string // below openai/; a failure ends in /fail
	event       string // below openai/; a failure ends in -fail
	detail      bool   // log a success at debug level only
}

var (
	credIssued    = change{"credential issued", "credential/create/success", "creds-create", true}
	credRenewed   = change{"credential renewed", "credential/renew", "creds-renew", true}
	credRevoked   = change{"credential revoked", "credential/revoke", "creds-revoke", true}
	roleWritten   = change{"role written", "role/write", "role-write", false}
	roleDeleted   = change{"role deleted", "role/delete", "role-delete", false}
	configWritten = change{"config written", "config/write", "config-write", false}
	configDeleted = change{"config deleted", "config/delete", "config-delete", false}
	keyRotated    = change{"admin API key rotated", "rotate-root/success", "rotate-root", false}
)

// report tells of a change, or of err that kept it from happening: in the log, and as an
// observation and an event where Vault has these. pairs are names and values, plain and
// never secret.
func (b *backend) report(ctx context.Context, req *logical.Request, c change, err error, pairs ...any) {
	log, text, observation, event := b.Logger().Info, c.log, c.observation, c.event
	pairs = append(pairs, "mount", req.MountPoint, "request_id", req.ID)
	switch {
	case err != nil:
		pairs = append(pairs, "error", err.Error())
		log, text, event = b.Logger().Warn, "failed: "+c.log, c.event+"-fail"
		observation = strings.TrimSuffix(c.observation, "/success") + "/fail"
	case c.detail:
		log = b.Logger().Debug
	}
	log(text, pairs...)
	if !b.enterprise() {
		return
	}
	data := make(map[string]any, len(pairs)/2)
	metadata := []string{
		logical.EventMetadataModified, strconv.FormatBool(err == nil),
		logical.EventMetadataOperation, event, "path", req.Path,
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		name, value := fmt.Sprint(pairs[i]), fmt.Sprint(pairs[i+1])
		data[name] = value
		metadata = append(metadata, name, value)
	}
	_ = b.RecordObservationWithRequest(ctx, req, "openai/"+observation, data)
	_ = logical.SendEvent(ctx, b, "openai/"+event, metadata...)
}

// failure returns what a handler's answer says went wrong; nil: nothing.
func failure(resp *logical.Response, err error) error {
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	return err
}

// result is the metrics' label for err.
func result(err error) string {
	if err != nil {
		return "failure"
	}
	return "success"
}

// Names of the metrics that count, without metricPrefix.
const (
	metricPrefix        = "vault_openai_"
	metricCredentials   = "credential_operations_total" // #nosec G101 -- a name, not a credential
	metricHandedOver    = "revocations_handed_over_total"
	metricRequests      = "api_requests_total"
	metricDuration      = "api_request_duration_seconds"
	metricRetries       = "api_retries_total"
	metricRateLimitWait = "api_rate_limit_wait_seconds_total"
	metricRotations     = "rotations_total"
	metricRollbacks     = "rollbacks_total"
	metricSweeps        = "cleanups_total"
)

// family is a metric as the metrics path shows it.
type family struct {
	name, kind, help string
	labels           []string
}

var families = []family{
	{metricCredentials, "counter", "Credentials issued, renewed and revoked.", []string{"role", "operation", "result"}},
	{metricHandedOver, "counter", "Revocations taken over from Vault after repeated failures.", nil},
	{metricRequests, "counter", "Requests sent to OpenAI, retries included, by HTTP status; error: no answer.", []string{"operation", "status"}},
	{metricDuration, "histogram", "Duration of a request to OpenAI, waits not included.", []string{"operation"}},
	{metricRetries, "counter", "Requests repeated, by the HTTP status of the one before; connection: no answer.", []string{"reason"}},
	{metricRateLimitWait, "counter", "Time that calls spent waiting for OpenAI's rate limit.", nil},
	{metricRotations, "counter", "Rotations of the admin API key.", []string{"trigger", "result"}},
	{metricRollbacks, "counter", "Rollbacks of write-ahead-log entries.", []string{"kind", "result"}},
	{metricSweeps, "counter", "Attempts to clean up credentials.", []string{"result"}},
	{"cleanups_pending", "gauge", "Credentials that wait to be cleaned up at OpenAI.", nil},
	{"admin_key_last_rotation_timestamp_seconds", "gauge", "When the admin API key was written or rotated.", nil},
	{"admin_key_next_rotation_timestamp_seconds", "gauge", "When the admin API key is due; absent: never.", nil},
	{"admin_key_expiry_timestamp_seconds", "gauge", "When the admin API key expires at OpenAI; absent: never.", nil},
	{"admin_keys_pending_deletion", "gauge", "Replaced admin API keys still to be deleted at OpenAI.", nil},
	{"build_info", "gauge", "Always 1, with the versions of the plugin and of Go.", []string{"version", "goversion"}},
}

// durationBuckets are the upper bounds of metricDuration's buckets, in seconds.
var durationBuckets = []float64{0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25}

// maxSeries bounds the memory that metrics take: credentials of further roles are counted
// with role "other".
const maxSeries = 5000

// metrics counts what a mount does, since the plugin's process has started.
type metrics struct {
	mu     sync.Mutex
	series map[string]map[string]float64 // by name, then by labels as Prometheus writes them
	size   int                           // series of all names
}

// newMetrics returns metrics whose bounded series are there from the start, at 0, so that
// Prometheus sees the first event too.
func newMetrics() *metrics {
	m := &metrics{series: map[string]map[string]float64{}}
	m.add(metricHandedOver, 0)
	m.add(metricRateLimitWait, 0)
	for _, result := range []string{"success", "failure"} {
		m.add(metricSweeps, 0, "result", result)
		for _, kind := range []string{walCredential, walIssued, walAdminKey} {
			m.add(metricRollbacks, 0, "kind", kind, "result", result)
		}
		for _, trigger := range []string{"manual", managerPlugin, managerVault} {
			m.add(metricRotations, 0, "trigger", trigger, "result", result)
		}
	}
	return m
}

// add counts n more. labels are names and values.
func (m *metrics) add(name string, n float64, labels ...string) {
	text := labelText(labels)
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.series[name][text]; !ok {
		if m.size++; m.size > maxSeries && name == metricCredentials {
			labels[1] = "other"
			text = labelText(labels)
		}
		if m.series[name] == nil {
			m.series[name] = map[string]float64{}
		}
	}
	m.series[name][text] += n
}

var labelEscaper = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// labelText writes labels, names and values, as Prometheus' text format has them.
func labelText(labels []string) string {
	text := ""
	for i := 0; i+1 < len(labels); i += 2 {
		text += "," + labels[i] + `="` + labelEscaper.Replace(labels[i+1]) + `"`
	}
	return strings.TrimPrefix(text, ",")
}

// observe counts a request to OpenAI that took d.
func (m *metrics) observe(operation string, d time.Duration) {
	for _, bound := range durationBuckets {
		if d.Seconds() <= bound {
			m.add(metricDuration+"_bucket", 1, "operation", operation, "le", fmt.Sprint(bound))
		}
	}
	m.add(metricDuration+"_bucket", 1, "operation", operation, "le", "+Inf")
	m.add(metricDuration+"_sum", d.Seconds(), "operation", operation)
	m.add(metricDuration+"_count", 1, "operation", operation)
}

// gather returns the values by name and by labels.
func (b *backend) gather(ctx context.Context, s logical.Storage) (map[string]map[string]float64, error) {
	b.metrics.mu.Lock()
	all := make(map[string]map[string]float64, len(families))
	for name, series := range b.metrics.series {
		all[name] = maps.Clone(series)
	}
	b.metrics.mu.Unlock()
	set := func(name, labels string, value float64) { all[name] = map[string]float64{labels: value} }
	set("build_info", labelText([]string{"version", version, "goversion", runtime.Version()}), 1)
	cleanups, err := s.List(ctx, cleanupPrefix)
	if err != nil {
		return nil, fmt.Errorf("listing clean-up entries: %w", err)
	}
	set("cleanups_pending", "", float64(len(cleanups)))
	cfg, err := getConfig(ctx, s)
	if err != nil || cfg == nil {
		return all, err
	}
	set("admin_keys_pending_deletion", "", float64(len(cfg.PendingDeletion)))
	for name, t := range map[string]time.Time{
		"admin_key_last_rotation_timestamp_seconds": cfg.LastRotatedTime,
		"admin_key_next_rotation_timestamp_seconds": cfg.nextRotation(time.Now()),
		"admin_key_expiry_timestamp_seconds":        cfg.AdminKeyExpires,
	} {
		if !t.IsZero() {
			set(name, "", float64(t.Unix()))
		}
	}
	return all, nil
}

// compareLabels orders the series of a family: by their labels, buckets by their bound.
func compareLabels(x, y string) int {
	x, xBound, _ := strings.Cut(x, `,le="`)
	y, yBound, _ := strings.Cut(y, `,le="`)
	xLimit, _ := strconv.ParseFloat(strings.TrimSuffix(xBound, `"`), 64)
	yLimit, _ := strconv.ParseFloat(strings.TrimSuffix(yBound, `"`), 64)
	return cmp.Or(cmp.Compare(x, y), cmp.Compare(xLimit, yLimit))
}

// series returns the names of the family's series: a histogram has three.
func (f family) series() []string {
	if f.kind == "histogram" {
		return []string{f.name + "_bucket", f.name + "_sum", f.name + "_count"}
	}
	return []string{f.name}
}

// prometheus writes all in Prometheus' text format, version 0.0.4.
func prometheus(all map[string]map[string]float64) []byte {
	var out bytes.Buffer
	for _, f := range families {
		if len(all[f.series()[0]]) == 0 {
			continue
		}
		fmt.Fprintf(&out, "# HELP %s%s %s\n# TYPE %s%s %s\n", metricPrefix, f.name, f.help, metricPrefix, f.name, f.kind)
		for _, name := range f.series() {
			for _, labels := range slices.SortedFunc(maps.Keys(all[name]), compareLabels) {
				value := strconv.FormatFloat(all[name][labels], 'f', -1, 64)
				if labels != "" {
					labels = "{" + labels + "}"
				}
				fmt.Fprintf(&out, "%s%s%s %s\n", metricPrefix, name, labels, value)
			}
		}
	}
	return out.Bytes()
}
