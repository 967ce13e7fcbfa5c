// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

const (
	maxAttempts  = 6                // to revoke an expired lease; then it is irrevocable
	retryBase    = 10 * time.Second // Vault waits 2^n times it after failure n; its jitter is left out
	restoreDelay = 5 * time.Second  // before Vault, just started, revokes a lease whose end has passed

	irrevocableInterval = 24 * time.Hour  // between the attempts for irrevocable leases
	irrevocableTime     = time.Minute     // the deadline of such an attempt
	vaultTTL            = 768 * time.Hour // Vault's limit and default for TTLs
)

// Lease is a lease that Vault holds. A test may read the fields while no Run, Renew or
// Revoke is under way; it changes none.
type Lease struct {
	ID          string         // Vault tells it to the client, not to the plugin
	Path        string         // of the request, without the mount's
	Data        map[string]any // what the client got, as JSON has it
	Warnings    []string       // of the last answer, Vault's own about the TTL included
	Issued      time.Time
	Expires     time.Time
	MaxTTL      time.Duration // as the plugin has set it; 0: the mount's
	Renewable   bool
	Attempts    int  // failed ones to revoke it after its end
	Irrevocable bool // Vault tries once a day only, and keeps the lease until one succeeds

	secret []byte    // JSON of the logical.Secret
	data   []byte    // JSON of the answer's data; that of a renewal takes its place
	due    time.Time // when Vault tries to revoke it
	busy   bool      // Vault is trying
}

// Leases returns the leases that Vault holds, by path and then by age.
func (v *Vault) Leases() []*Lease {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.SortedFunc(maps.Values(v.leases), byID)
}

func byID(x, y *Lease) int { return cmp.Compare(x.ID, y.ID) }

// Issue reads a credential. See IssueContext.
func (v *Vault) Issue(path string, data map[string]any) (*Lease, error) {
	return v.IssueContext(context.Background(), path, data)
}

// IssueContext reads a credential, and has Vault register the lease. Vault clamps the TTL to
// the mount's maximum and to the secret's MaxTTL, takes the mount's default for a TTL of 0,
// and stores secret and data as JSON. Where Vault can't register a lease it calls Revoke at
// once: for a test that is Issue and Revoke.
func (v *Vault) IssueContext(ctx context.Context, path string, data map[string]any) (*Lease, error) {
	v.mu.Lock()
	run := v.vaultRuns
	v.mu.Unlock()
	resp, err := v.DoContext(ctx, logical.ReadOperation, path, data)
	switch {
	case Failure(resp, err) != nil:
		return nil, Failure(resp, err)
	case resp == nil || resp.Secret == nil:
		return nil, errors.New("vaultsim: the answer has no secret")
	}
	lease := &Lease{Path: path, Issued: time.Now()}
	if err := v.update(lease, resp, 0); err != nil {
		return nil, fmt.Errorf("registering the lease: %w", err)
	}
	if err := json.Unmarshal(lease.data, &lease.Data); err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if run != v.vaultRuns {
		return nil, errProcess
	}
	v.sequence++
	lease.ID = fmt.Sprintf("%s%s/%08d", MountPoint, strings.TrimSuffix(path, "/"), v.sequence)
	v.leases[lease.ID] = lease
	v.changed()
	return lease, nil
}

// update puts the secret and the data of an answer into a lease, with the TTL that Vault
// calculates. v.mu is held, or nobody else knows the lease.
func (v *Vault) update(lease *Lease, resp *logical.Response, increment time.Duration) error {
	ttl, warnings, err := framework.CalculateTTL(
		v.System.limits(), increment, resp.Secret.TTL, 0, resp.Secret.MaxTTL, 0, lease.Issued)
	if err != nil {
		return err
	}
	secret := *resp.Secret
	secret.TTL = ttl
	text, err := json.Marshal(&secret)
	if err != nil {
		return err
	}
	data, err := json.Marshal(resp.Data)
	if err != nil {
		return err
	}
	lease.secret, lease.data = text, data
	lease.MaxTTL, lease.Renewable = secret.MaxTTL, secret.Renewable
	lease.Warnings = slices.Concat(resp.Warnings, warnings)
	lease.Expires = time.Now().Add(ttl)
	lease.due = lease.Expires
	return nil
}

// request returns the request of a renewal or revocation: with the secret and the data that
// Vault has stored, whose numbers are float64, the time of issue, and no lease id.
func (l *Lease) request(op logical.Operation, increment time.Duration) (*logical.Request, error) {
	req := &logical.Request{Operation: op, Path: l.Path, Secret: &logical.Secret{}}
	err := errors.Join(json.Unmarshal(l.secret, req.Secret), json.Unmarshal(l.data, &req.Data))
	req.Secret.IssueTime, req.Secret.Increment, req.Secret.LeaseID = l.Issued, increment, ""
	return req, err
}

// lookup returns a request about a lease, and the run of Vault that makes it.
func (v *Vault) lookup(l *Lease, op logical.Operation, increment time.Duration) (*logical.Request, int, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.leases[l.ID] != l:
		return nil, 0, errors.New("lease not found")
	case op == logical.RenewOperation && l.Expires.Before(time.Now()):
		return nil, 0, errors.New("lease expired")
	case op == logical.RenewOperation && !l.Renewable:
		return nil, 0, errors.New("lease is not renewable")
	}
	req, err := l.request(op, increment)
	return req, v.vaultRuns, err
}

// Renew renews a lease as a client's request does: without a deadline, cancelled after 90
// seconds. Vault takes the increment, if any, or the answer's TTL, and clamps it by the time
// of issue, the answer's MaxTTL and the mount's maximum. The answer's data, usually none,
// takes the place of what Vault gave to Renew and Revoke. An answer without a secret changes
// nothing.
func (v *Vault) Renew(lease *Lease, increment time.Duration) error {
	req, run, err := v.lookup(lease, logical.RenewOperation, increment)
	if err != nil {
		return err
	}
	resp, err := v.clientRequest(context.Background(), req)
	if err := Failure(resp, err); err != nil || resp == nil || resp.Secret == nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if run != v.vaultRuns || v.leases[lease.ID] != lease {
		return errProcess
	}
	defer v.changed()
	return v.update(lease, resp, increment)
}

// Revoke revokes a lease with a deadline of 90 seconds, as at its end, and removes it when
// that succeeds. A failure does not count as one of the attempts that Run makes. A lease
// that Vault does not hold is an error here: Vault would not call the plugin.
func (v *Vault) Revoke(lease *Lease) error {
	ctx, cancel := context.WithTimeout(context.Background(), requestTime)
	defer cancel()
	return v.revoke(ctx, lease)
}

func (v *Vault) revoke(ctx context.Context, lease *Lease) error {
	req, run, err := v.lookup(lease, logical.RevokeOperation, 0)
	if err != nil {
		return err
	}
	if err := Failure(v.route(ctx, req)); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if run != v.vaultRuns {
		return errProcess
	}
	delete(v.leases, lease.ID)
	return nil
}

// Run lets time pass for d. Each full minute since New it makes a rollback, unless the one
// before still runs. It revokes each lease at its end, with Vault's retries: up to 6 attempts,
// 20, 40, 80, 160 and 320 seconds apart, each with a deadline of 90 seconds; then the lease
// is irrevocable and is tried once a day. Rollbacks and revocations overlap. Run waits for
// those that it has begun, and so may take longer than d. One Run at a time.
func (v *Vault) Run(d time.Duration) {
	var work sync.WaitGroup
	defer work.Wait()
	nextTick := func(now time.Time) time.Time {
		return v.started.Add(now.Sub(v.started).Truncate(time.Minute) + time.Minute)
	}
	end, tick := time.Now().Add(d), nextTick(time.Now())
	for {
		now := time.Now()
		if !tick.After(now) {
			work.Go(v.tryTick)
			tick = nextTick(now)
		}
		due, next := v.due(now)
		for _, lease := range due {
			work.Go(func() { v.expire(lease) })
		}
		if !now.Before(end) {
			return
		}
		wait := min(end.Sub(now), tick.Sub(now))
		if !next.IsZero() {
			wait = min(wait, next.Sub(now))
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-v.wake:
		case <-v.done:
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// due returns the leases to revoke now, marked busy, and when the next one is due; zero: none.
func (v *Vault) due(now time.Time) (due []*Lease, next time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, lease := range v.leases {
		switch {
		case lease.busy:
		case !lease.due.After(now):
			lease.busy = true
			due = append(due, lease)
		case next.IsZero() || lease.due.Before(next):
			next = lease.due
		}
	}
	slices.SortFunc(due, byID)
	return due, next
}

// expire tries to revoke a lease that is due.
func (v *Vault) expire(lease *Lease) {
	v.mu.Lock()
	run, limit := v.vaultRuns, requestTime
	if lease.Irrevocable {
		limit = irrevocableTime
	}
	v.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	err := v.revoke(ctx, lease)
	v.mu.Lock()
	defer v.mu.Unlock()
	lease.busy = false
	defer v.changed()
	if err == nil || run != v.vaultRuns {
		return
	}
	if !lease.Irrevocable {
		lease.Attempts++
		lease.Irrevocable = lease.Attempts >= maxAttempts || unrecoverable(err)
	}
	lease.due = time.Now().Add(retryBase << lease.Attempts)
	if lease.Irrevocable {
		lease.due = time.Now().Add(irrevocableInterval)
	}
}

// loadLeases begins a new run of Vault, which has of the leases what storage has: that one
// is irrevocable, but not how often its revocation has failed. v.mu is held.
func (v *Vault) loadLeases() {
	v.vaultRuns++
	now := time.Now()
	for _, lease := range v.leases {
		lease.Attempts, lease.busy = 0, false
		lease.due = lease.Expires
		if !lease.due.After(now) {
			lease.due = now.Add(restoreDelay)
		}
		if lease.Irrevocable {
			lease.due = now.Add(irrevocableInterval)
		}
	}
	v.changed()
}

// changed makes Run look at the leases again.
func (v *Vault) changed() {
	select {
	case v.wake <- struct{}{}:
	default:
	}
}
