// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/hashicorp/vault/sdk/logical"
)

// ErrHang, as the error of a hook, makes the operation hang until its context or the
// plugin's process ends.
var ErrHang = errors.New("vaultsim: storage hangs")

// errCut is what a plugin's process gets that has ended.
var errCut = errors.New("vaultsim: the plugin's process has ended")

// Storage is the mount's storage, in memory. Its logical.Storage methods are for tests: they
// pass no hook and are not counted. The plugin's operations pass the hooks and are counted.
// They fail once their context has ended, as Vault's storage does over gRPC.
type Storage struct {
	mu      sync.Mutex // guards what follows, and view.cut
	entries map[string]*logical.StorageEntry
	fault   func(verb, key string) error
	after   func(verb, key string) error
	counts  map[string]int
}

var _ logical.Storage = (*Storage)(nil)

func newStorage() *Storage {
	return &Storage{entries: map[string]*logical.StorageEntry{}, counts: map[string]int{}}
}

// SetFault makes f be asked before each operation (get, put, delete or list) of the plugin;
// nil: none. Its error is the operation's, which then does nothing. f may sleep, cancel the
// request, change the hooks or call Crash: the operation looks at context and process again.
func (s *Storage) SetFault(f func(verb, key string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// SetAfter makes f be asked after each operation of the plugin that was done; nil: none. Its
// error is the operation's, whose effect stays, as when storage's answer is lost.
func (s *Storage) SetAfter(f func(verb, key string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.after = f
}

// Fail is a fault: each operation of this verb on keys with this prefix fails with ErrInjected.
func (s *Storage) Fail(failVerb, prefix string) {
	s.SetFault(func(verb, key string) error {
		if verb == failVerb && strings.HasPrefix(key, prefix) {
			return ErrInjected
		}
		return nil
	})
}

// Counts returns how often the plugin has used each verb since ResetCounts, failures of
// hooks included.
func (s *Storage) Counts() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.counts)
}

// ResetCounts sets all counts to 0.
func (s *Storage) ResetCounts() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.counts)
}

// Keys returns the names directly below prefix, without it; a folder's ends in a slash.
func (s *Storage) Keys(prefix string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list(prefix)
}

func (s *Storage) list(prefix string) []string {
	names := map[string]bool{}
	for key := range s.entries {
		if name, ok := strings.CutPrefix(key, prefix); ok {
			if folder, _, deeper := strings.Cut(name, "/"); deeper {
				name = folder + "/"
			}
			names[name] = true
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// All returns the values of all keys.
func (s *Storage) All() map[string]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[string]string, len(s.entries))
	for key, entry := range s.entries {
		all[key] = string(entry.Value)
	}
	return all
}

// Set stores an entry for a test: it passes no hook.
func (s *Storage) Set(key, value string) {
	_ = s.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte(value)}) // never fails
}

// Get is for tests: it passes no hook.
func (s *Storage) Get(_ context.Context, key string) (*logical.StorageEntry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return clone(s.entries[key]), nil
}

// Put is for tests: it passes no hook.
func (s *Storage) Put(_ context.Context, entry *logical.StorageEntry) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.entries[entry.Key] = clone(entry)
	return nil
}

// Delete is for tests: it passes no hook.
func (s *Storage) Delete(_ context.Context, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.entries, key)
	return nil
}

// List is for tests: it passes no hook.
func (s *Storage) List(_ context.Context, prefix string) ([]string, error) {
	return s.Keys(prefix), nil
}

func (s *Storage) snapshot() map[string]*logical.StorageEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.entries) // entries are never changed, only replaced
}

func (s *Storage) restore(entries map[string]*logical.StorageEntry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.entries)
	maps.Copy(s.entries, entries)
}

func clone(entry *logical.StorageEntry) *logical.StorageEntry {
	if entry == nil {
		return nil
	}
	return &logical.StorageEntry{Key: entry.Key, Value: bytes.Clone(entry.Value), SealWrap: entry.SealWrap}
}

// view is the storage as one process of the plugin has it.
type view struct {
	storage *Storage
	wire    *Wire
	process context.Context // ends with the process
	cut     bool            // the process has ended; guarded by storage.mu
}

// do makes an operation, with its hooks. The mutex is held for the effect only, so that none
// comes after the process's end.
func (w *view) do(ctx context.Context, verb, key string, effect func()) error {
	s := w.storage
	if err := w.alive(ctx, nil); err != nil {
		return err
	}
	s.mu.Lock()
	s.counts[verb]++
	fault, after := s.fault, s.after
	s.mu.Unlock()
	if fault != nil {
		if err := w.hang(ctx, fault(verb, key)); err != nil {
			return err
		}
	}
	if err := w.alive(ctx, effect); err != nil {
		return err
	}
	if after != nil {
		if err := w.hang(ctx, after(verb, key)); err != nil {
			return err
		}
	}
	return w.alive(context.Background(), nil)
}

// alive has the effect, unless the process or the context has ended.
func (w *view) alive(ctx context.Context, effect func()) error {
	w.storage.mu.Lock()
	defer w.storage.mu.Unlock()
	switch {
	case w.cut:
		return errCut
	case ctx.Err() != nil:
		return ctx.Err()
	case effect != nil:
		effect()
	}
	return nil
}

// hang waits if a hook's error says so.
func (w *view) hang(ctx context.Context, err error) error {
	if !errors.Is(err, ErrHang) {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-w.process.Done():
		return errCut
	}
}

func (w *view) Get(ctx context.Context, key string) (entry *logical.StorageEntry, err error) {
	err = w.do(ctx, "get", key, func() { entry = clone(w.storage.entries[key]) })
	if err != nil {
		return nil, err
	}
	return entry, nil
}

func (w *view) Put(ctx context.Context, entry *logical.StorageEntry) error {
	entry = clone(entry)
	return w.do(ctx, "put", entry.Key, func() { w.storage.entries[entry.Key] = entry })
}

func (w *view) Delete(ctx context.Context, key string) error {
	return w.do(ctx, "delete", key, func() { delete(w.storage.entries, key) })
}

func (w *view) List(ctx context.Context, prefix string) (names []string, err error) {
	err = w.do(ctx, "list", prefix, func() { names = w.storage.list(prefix) })
	if err != nil {
		return nil, err
	}
	return names, nil
}
