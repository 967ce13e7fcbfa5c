// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Package vaultsim is a small Vault for unit tests. It holds one mount of a logical.Backend
// and treats it as Vault 1.21 and its plugin protocol do: with leases, revocations that are
// tried again, a rollback each minute, restarts and crashes. The facts were read in Vault's
// source and seen with Vault CE.
//
// It uses no network of its own, and of the clock only time.Now and timers, so that it works inside a
// testing/synctest bubble. Close, which the test's clean-up calls, leaves no goroutine.
//
// Read vaultsim.go first, the mount and its requests; then lease.go, storage.go, system.go and
// network.go. steps.go makes a request fail at each of its steps; check.go has the checks that
// tests of a secrets engine need again and again.
package vaultsim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/helper/logging"
	"github.com/hashicorp/vault/sdk/logical"
)

// MountPoint is the path of the mount.
const MountPoint = "openai/"

// requestTime is Vault's default_max_request_duration. Vault cancels a request after it,
// and gives it to rollbacks and to revocations of expired leases as their deadline.
const requestTime = 90 * time.Second

var (
	// errProcess is what Vault gets from a plugin process that has ended.
	errProcess = errors.New("rpc error: code = Unavailable desc = error reading from server: EOF")
	errDropped = errors.New("vaultsim: the answer was dropped")
)

// Vault is a Vault with one mount. Its methods may be called from several goroutines; the
// exported fields are set by New, and DisplayName may be changed between requests.
type Vault struct {
	Storage     *Storage // of the mount; it stays when the plugin's process ends
	System      *System
	Log         *Log   // of the plugin, at trace level
	Wire        *Wire  // the plugin's network, if the test's factory takes it from Network
	DisplayName string // of the token that makes the requests of Do and Issue

	// Leaks tells whether a text shows a secret. Where the test has set it, no error or warning
	// that the methods of check.go see may do so, nor, when the test ends, the log.
	Leaks func(text string) bool

	tb       testing.TB
	factory  logical.Factory
	config   logical.BackendConfig // of each process, but for its StorageView
	started  time.Time             // Vault's rollbacks come each minute from then
	rollback chan struct{}         // holds an element while a rollback runs
	wake     chan struct{}         // gets an element when a lease has changed
	done     <-chan struct{}       // closed by Close
	finish   context.CancelFunc    // closes done

	mu        sync.Mutex // guards what follows, and the leases' fields
	process   *process
	crashed   []*process // to be cleaned up by Close
	leases    map[string]*Lease
	sequence  int  // of requests and leases
	vaultRuns int  // counts the runs of Vault itself: CrashVault and Restore begin a new one
	drop      bool // the next answer
	tainted   bool // the mount is being disabled
	ended     bool // the mount is disabled, or Close was called
}

// process is a run of the plugin's process.
type process struct {
	view    *view
	ready   chan struct{}   // closed when the process takes requests
	backend logical.Backend // once ready; nil: the factory failed
	end     context.CancelFunc
	calls   sync.WaitGroup             // requests in it
	cancels map[int]context.CancelFunc // of these requests; guarded by Vault.mu
}

// New enables the plugin: factory makes a backend, which is then initialized, as Vault does
// at enable, unseal and respawn. The mount's BackendUUID is the same in each process that
// the mount has in its life; another New has another one. The context that the factory gets
// ends when it returns, as over gRPC. The test's clean-up calls Close.
func New(tb testing.TB, factory logical.Factory) *Vault {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	v := &Vault{
		Storage: newStorage(), System: newSystem(), Log: &Log{}, Wire: &Wire{}, DisplayName: "token",
		tb: tb, factory: factory, started: time.Now(), leases: map[string]*Lease{},
		rollback: make(chan struct{}, 1), wake: make(chan struct{}, 1), done: ctx.Done(), finish: cancel,
	}
	v.config = logical.BackendConfig{
		Logger: logging.NewVaultLoggerWithWriter(v.Log, 1), // 1: trace
		System: v.System, EventsSender: v.System, ObservationRecorder: v.System,
		BackendUUID: newUUID(), Config: map[string]string{},
	}
	v.process = v.newProcess()
	tb.Cleanup(func() { v.NoSecrets("the log", v.Log.String()) })
	tb.Cleanup(v.Close)
	if err := v.start(v.process); err != nil {
		tb.Fatalf("enabling the mount: %v", err)
	}
	return v
}

func (v *Vault) newProcess() *process {
	ctx, cancel := context.WithCancel(context.Background())
	return &process{
		view:  &view{storage: v.Storage, wire: v.Wire, process: ctx},
		ready: make(chan struct{}), end: cancel, cancels: map[int]context.CancelFunc{},
	}
}

// start makes and initializes the backend of a process.
func (v *Vault) start(p *process) error {
	defer close(p.ready)
	ctx, cancel := context.WithCancel(p.view.process)
	defer cancel()
	config := v.config
	config.StorageView = p.view
	backend, err := v.factory(ctx, &config)
	if err != nil {
		v.tb.Errorf("factory: %v", err)
		return err
	}
	p.backend = backend
	err = backend.Initialize(ctx, &logical.InitializationRequest{Storage: p.view})
	if err != nil {
		v.config.Logger.Error("initializing the mount", "error", err)
	}
	return err
}

// stop ends a process in order: its requests are waited for, and its backend is cleaned up.
func (p *process) stop() {
	<-p.ready
	p.calls.Wait()
	if p.backend != nil {
		p.backend.Cleanup(context.Background())
	}
	p.cut()
}

// cut ends a process at once: what it still does in storage fails.
func (p *process) cut() {
	p.view.storage.mu.Lock()
	p.view.cut = true
	p.view.storage.mu.Unlock()
	p.end()
}

// cancel cancels the requests in a process.
func (v *Vault) cancel(p *process) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, cancel := range p.cancels {
		cancel()
	}
}

// replace makes a new process take the place of the old one, which end ends. Requests wait
// until the new process is ready. An error of its initialization is in the log, where Vault
// has it at unseal and respawn.
func (v *Vault) replace(end func(old *process)) {
	v.mu.Lock()
	if v.ended {
		v.mu.Unlock()
		return
	}
	old, p := v.process, v.newProcess()
	v.process = p
	v.mu.Unlock()
	end(old)
	_ = v.start(p)
}

// Restart ends the plugin's process in order and starts another one on the same storage, as
// a reload of the plugin does: Vault waits for the requests in it and calls Cleanup. It must
// not be called from a hook of the storage.
func (v *Vault) Restart() { v.replace((*process).stop) }

// Crash kills the plugin's process and starts another one, as Vault does at the next call.
// Requests in the old process are cancelled and give an error; what it still does changes no
// storage. Leases stay, with their counts of attempts, which Vault has. A hook of the
// storage may call Crash, to kill the process at that step. Close cleans the old backend up,
// so that its goroutines end.
func (v *Vault) Crash() { v.replace(v.kill) }

// CrashVault is Crash of Vault itself, with the plugin. A lease that was not yet registered
// is lost. The counts of failed revocations, which Vault has in memory only, begin again;
// leases whose end has passed are revoked after 5 seconds.
func (v *Vault) CrashVault() {
	v.replace(func(old *process) {
		v.kill(old)
		v.mu.Lock()
		defer v.mu.Unlock()
		v.loadLeases()
	})
}

func (v *Vault) kill(p *process) {
	p.cut()
	v.cancel(p)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.crashed = append(v.crashed, p)
}

// Close ends the mount and all goroutines, a Run included. Requests are cancelled first.
func (v *Vault) Close() {
	v.mu.Lock()
	processes := v.crashed
	v.crashed = nil
	if !v.ended {
		processes = append(processes, v.process)
	}
	v.ended = true
	v.mu.Unlock()
	v.finish()
	for _, p := range processes {
		v.cancel(p)
		p.stop()
	}
}

// Backend returns the backend of the plugin's process.
func (v *Vault) Backend() logical.Backend {
	v.mu.Lock()
	p := v.process
	v.mu.Unlock()
	<-p.ready
	return p.backend
}

// Do makes a request of a client. See DoContext.
func (v *Vault) Do(op logical.Operation, path string, data map[string]any) (*logical.Response, error) {
	return v.DoContext(context.Background(), op, path, data)
}

// Write makes a create or update request.
func (v *Vault) Write(path string, data map[string]any) (*logical.Response, error) {
	return v.Do(logical.UpdateOperation, path, data)
}

// DoContext makes a request of a client that goes away when ctx ends. The plugin's context
// has no deadline and is cancelled after 90 seconds. The data has been JSON: numbers are
// float64. For create and update Vault asks the path's existence check which of the two it
// is, and takes update where there is no check.
//
// An answer that comes after the context's end is lost, as over gRPC. Vault does not wait
// for it; DoContext does, so that a test finds the request's effects complete.
func (v *Vault) DoContext(
	ctx context.Context, op logical.Operation, path string, data map[string]any,
) (*logical.Response, error) {
	req := &logical.Request{Operation: op, Path: path, DisplayName: v.DisplayName}
	if err := viaJSON(data, &req.Data); err != nil {
		return nil, err
	}
	return v.clientRequest(ctx, req)
}

// clientRequest makes a request with the context that a client's request has.
func (v *Vault) clientRequest(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	ctx, cancel := context.WithCancel(noDeadline{ctx})
	defer cancel()
	defer time.AfterFunc(requestTime, cancel).Stop()
	return v.route(ctx, req)
}

// noDeadline hides the deadline of a context, but not its end.
type noDeadline struct{ context.Context }

func (noDeadline) Deadline() (time.Time, bool) { return time.Time{}, false }

// route makes a request of the plugin's process.
func (v *Vault) route(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	v.mu.Lock()
	background := req.Operation == logical.RevokeOperation || req.Operation == logical.RollbackOperation
	if v.ended || v.tainted && !background {
		v.mu.Unlock()
		return nil, logical.ErrUnsupportedPath
	}
	v.sequence++
	p, id := v.process, v.sequence
	p.cancels[id] = cancel
	p.calls.Add(1)
	v.mu.Unlock()
	defer func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		delete(p.cancels, id)
		p.calls.Done()
	}()
	<-p.ready
	if p.backend == nil {
		return nil, logical.ErrUnsupportedPath
	}
	req.ID, req.MountPoint, req.Storage = "request-"+strconv.Itoa(id), MountPoint, p.view
	resp, err := p.handle(ctx, req)
	switch {
	case p.view.process.Err() != nil:
		return nil, errProcess
	case err == nil && ctx.Err() != nil:
		return nil, ctx.Err()
	case Failure(resp, err) == nil && req.Operation != logical.RollbackOperation && v.dropped():
		return nil, errDropped
	}
	return resp, err
}

// handle gives a request to the backend, a create or update with the right operation.
func (p *process) handle(ctx context.Context, req *logical.Request) (*logical.Response, error) {
	if req.Operation == logical.CreateOperation || req.Operation == logical.UpdateOperation {
		checked, exists, err := p.backend.HandleExistenceCheck(ctx, req)
		if err != nil && !errors.Is(err, logical.ErrUnsupportedPath) {
			return nil, fmt.Errorf("existence check: %w", err)
		}
		req.Operation = logical.UpdateOperation
		if checked && !exists {
			req.Operation = logical.CreateOperation
		}
	}
	return p.backend.HandleRequest(ctx, req)
}

// DropNext makes Vault lose the next successful answer to a request, renewal or revocation, as
// when the client goes away in the last milliseconds: no lease is registered or removed, and
// the plugin is told nothing. The call gives an error.
func (v *Vault) DropNext() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.drop = true
}

func (v *Vault) dropped() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	drop := v.drop
	v.drop = false
	return drop
}

// Tick makes one rollback, as Vault's rollback manager does each minute on the active node:
// with a deadline of 90 seconds and one at a time for the mount. The framework's backend
// calls PeriodicFunc and then WALRollback. Vault ignores what they answer.
func (v *Vault) Tick() {
	select {
	case v.rollback <- struct{}{}:
		v.rollBack()
	case <-v.done:
	}
}

// tryTick is Tick, but does nothing while a rollback runs.
func (v *Vault) tryTick() {
	select {
	case v.rollback <- struct{}{}:
		v.rollBack()
	default:
	}
}

func (v *Vault) rollBack() {
	defer func() { <-v.rollback }()
	ctx, cancel := context.WithTimeout(context.Background(), requestTime)
	defer cancel()
	_, _ = v.route(ctx, logical.RollbackRequest(""))
}

// Snapshot is a copy of the mount's storage and leases.
type Snapshot struct {
	storage map[string]*logical.StorageEntry
	leases  map[*Lease]Lease
}

// Snapshot copies the storage and the leases, as a snapshot of Vault's storage has them.
func (v *Vault) Snapshot() *Snapshot {
	s := &Snapshot{storage: v.Storage.snapshot(), leases: map[*Lease]Lease{}}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, lease := range v.leases {
		s.leases[lease] = *lease
	}
	return s
}

// Restore puts a snapshot back. Vault ends the plugin's process, with its requests cancelled,
// and starts another one; BackendUUID stays. A lease that is not in the snapshot is
// forgotten without Revoke. Counts of failed revocations begin again, as after CrashVault.
func (v *Vault) Restore(s *Snapshot) {
	v.replace(func(old *process) {
		v.cancel(old)
		old.stop()
		v.Storage.restore(s.storage)
		v.mu.Lock()
		defer v.mu.Unlock()
		clear(v.leases)
		for lease, was := range s.leases {
			*lease = was
			v.leases[lease.ID] = lease
		}
		v.loadLeases()
	})
}

// Disable does what `vault secrets disable` does. From its beginning the mount is tainted and
// refuses other requests. There is a last rollback, then the leases are revoked one at a
// time. The first that fails ends it with its error: the mount stays, tainted, and Disable
// may be called again. Otherwise the backend is cleaned up and its storage deleted.
func (v *Vault) Disable() error {
	v.mu.Lock()
	if v.ended {
		v.mu.Unlock()
		return logical.ErrUnsupportedPath
	}
	v.tainted = true
	v.mu.Unlock()
	v.System.tainted.Store(true)
	v.Tick()
	for _, lease := range v.Leases() {
		if err := v.revoke(context.Background(), lease); err != nil {
			return fmt.Errorf("failed to revoke %q: %w", lease.ID, err)
		}
	}
	v.mu.Lock()
	v.ended = true
	p := v.process
	v.mu.Unlock()
	p.stop()
	v.Storage.restore(nil)
	return nil
}

// ForceDisable does what `vault lease revoke -force -prefix` and `vault secrets disable` do:
// each lease is revoked once, and is forgotten also if that fails.
func (v *Vault) ForceDisable() {
	for _, lease := range v.Leases() {
		_ = v.revoke(context.Background(), lease)
		v.mu.Lock()
		delete(v.leases, lease.ID)
		v.mu.Unlock()
	}
	if err := v.Disable(); err != nil {
		v.tb.Errorf("disabling without leases: %v", err)
	}
}

// viaJSON copies a value as JSON does.
func viaJSON(from, to any) error {
	text, err := json.Marshal(from)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, to)
}

// Failure returns what an answer says went wrong; nil: nothing. Vault treats an error
// response to a renewal or revocation as an error.
func Failure(resp *logical.Response, err error) error {
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	return err
}

// unrecoverable tells whether Vault gives a revocation up at its first failure. The errors
// are known by identity, since a wrapped one comes over gRPC as text.
func unrecoverable(err error) bool {
	return slices.Contains([]error{
		logical.ErrUnrecoverable, logical.ErrUnsupportedOperation, logical.ErrUnsupportedPath,
		logical.ErrInvalidRequest,
	}, err)
}
