// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/logging"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/openaisim"
)

// env is a mount with its storage and a simulated OpenAI.
type env struct {
	t       *testing.T
	sim     *openaisim.Server
	b       *backend
	storage *testStorage
	system  *logical.StaticSystemView
	log     *logBuffer
}

// newEnv returns a mount without config. Nothing in it uses the network, so that it
// works inside a testing/synctest bubble.
func newEnv(t *testing.T) *env {
	t.Helper()
	e := &env{
		t:       t,
		sim:     openaisim.New(),
		storage: &testStorage{Storage: &logical.InmemStorage{}},
		system:  &logical.StaticSystemView{DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: 32 * 24 * time.Hour},
		log:     &logBuffer{},
	}
	e.restart()
	t.Cleanup(func() { e.noSecrets("the log", e.log.String()) })
	return e
}

// newConfiguredEnv returns a mount with config and a role "web".
func newConfiguredEnv(t *testing.T) *env {
	t.Helper()
	e := newEnv(t)
	e.configure(nil)
	e.ok(logical.CreateOperation, "roles/web", map[string]any{"project_id": openaisim.DefaultProject})
	return e
}

// restart replaces the backend by a new one on the same storage, as a new plugin process.
func (e *env) restart() {
	e.t.Helper()
	e.b = newBackend(e.sim.Transport())
	err := e.b.Setup(context.Background(), &logical.BackendConfig{
		Logger: logging.NewVaultLoggerWithWriter(e.log, 1), // 1: trace
		System: e.system, StorageView: e.storage,
	})
	if err != nil {
		e.t.Fatal(err)
	}
}

// configure writes config with the simulator's first admin key, and extra over it.
func (e *env) configure(extra map[string]any) *logical.Response {
	e.t.Helper()
	key, id := e.sim.AdminKey()
	data := map[string]any{"admin_api_key": key, "admin_api_key_id": id, "organization_id": openaisim.DefaultOrganization}
	for name, value := range extra {
		data[name] = value
	}
	return e.ok(logical.CreateOperation, "config", data)
}

// do makes a request as Vault does.
func (e *env) do(op logical.Operation, path string, data map[string]any) (*logical.Response, error) {
	return e.b.HandleRequest(context.Background(), &logical.Request{
		Operation: op, Path: path, Data: data, Storage: e.storage, MountPoint: "openai/", DisplayName: "token",
	})
}

// ok makes a request that must succeed.
func (e *env) ok(op logical.Operation, path string, data map[string]any) *logical.Response {
	e.t.Helper()
	resp, err := e.do(op, path, data)
	if err := failure(resp, err); err != nil {
		e.t.Fatalf("%s %s: %v", op, path, err)
	}
	return resp
}

// refused makes a request that must be the caller's mistake (a 400), with every text of
// want in its message.
func (e *env) refused(op logical.Operation, path string, data map[string]any, want ...string) {
	e.t.Helper()
	resp, err := e.do(op, path, data)
	if err != nil || !resp.IsError() {
		e.t.Errorf("%s %s %v: got response %v and error %v, want an error response", op, path, data, resp, err)
		return
	}
	for _, text := range want {
		if !strings.Contains(resp.Error().Error(), text) {
			e.t.Errorf("%s %s %v: got %q, want it to contain %q", op, path, data, resp.Error(), text)
		}
	}
	e.noSecrets("an error", resp.Error().Error())
}

// creds reads a credential of the role.
func (e *env) creds(role string) *logical.Response {
	e.t.Helper()
	resp := e.ok(logical.ReadOperation, "creds/"+role, nil)
	// Vault gives the lease back as JSON, without the data.
	resp.Secret.IssueTime = time.Now()
	return resp
}

// lease makes a request about a lease as Vault does: its internal data have been JSON.
func (e *env) lease(op logical.Operation, secret *logical.Secret) (*logical.Response, error) {
	e.t.Helper()
	stored := *secret
	stored.InternalData = map[string]any{}
	if err := decode(secret.InternalData, &stored.InternalData); err != nil {
		e.t.Fatal(err)
	}
	return e.b.HandleRequest(context.Background(), &logical.Request{
		Operation: op, Path: "creds/x", Secret: &stored, Storage: e.storage, MountPoint: "openai/",
	})
}

// revoke revokes a lease, which must succeed.
func (e *env) revoke(secret *logical.Secret) {
	e.t.Helper()
	if err := failure(e.lease(logical.RevokeOperation, secret)); err != nil {
		e.t.Fatalf("revoke: %v", err)
	}
}

// tick is Vault's periodic call: rotation, sweep, rollback of the old enough entries.
func (e *env) tick() {
	e.t.Helper()
	_, _ = e.do(logical.RollbackOperation, "", nil)
}

// keys returns the storage keys below a prefix.
func (e *env) keys(prefix string) []string {
	e.t.Helper()
	list, err := e.storage.Storage.List(context.Background(), prefix)
	if err != nil {
		e.t.Fatal(err)
	}
	return list
}

// config returns the stored config.
func (e *env) config() *config {
	e.t.Helper()
	cfg, err := getConfig(context.Background(), e.storage.Storage)
	if err != nil || cfg == nil {
		e.t.Fatalf("config: got %v, %v", cfg, err)
	}
	return cfg
}

// noSecrets fails the test if text holds anything like a key.
func (e *env) noSecrets(where, text string) {
	e.t.Helper()
	if strings.Contains(strings.ReplaceAll(text, "sk-***", ""), "sk-") {
		e.t.Errorf("%s shows a key", where)
	}
}

// logBuffer is a log that several goroutines write.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

var _ io.Writer = (*logBuffer)(nil)

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// testStorage is storage that fails on demand.
type testStorage struct {
	logical.Storage

	mu sync.Mutex
	// fault, where set, is asked before each operation (get, put, delete or list) on a key;
	// its error is the operation's.
	fault func(verb, key string) error
}

// setFault makes f the storage's fault; nil: none.
func (s *testStorage) setFault(f func(verb, key string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

func (s *testStorage) check(verb, key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault == nil {
		return nil
	}
	return s.fault(verb, key)
}

func (s *testStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if err := s.check("get", key); err != nil {
		return nil, err
	}
	return s.Storage.Get(ctx, key)
}

func (s *testStorage) Put(ctx context.Context, entry *logical.StorageEntry) error {
	if err := s.check("put", entry.Key); err != nil {
		return err
	}
	return s.Storage.Put(ctx, entry)
}

func (s *testStorage) Delete(ctx context.Context, key string) error {
	if err := s.check("delete", key); err != nil {
		return err
	}
	return s.Storage.Delete(ctx, key)
}

func (s *testStorage) List(ctx context.Context, prefix string) ([]string, error) {
	if err := s.check("list", prefix); err != nil {
		return nil, err
	}
	return s.Storage.List(ctx, prefix)
}

// TestLife is a credential's life: issued, used, renewed, revoked.
func TestLife(t *testing.T) {
	e := newConfiguredEnv(t)
	e.sim.ResetCalls()
	resp := e.creds("web")
	if got := len(e.sim.Calls()); got != 1 {
		t.Errorf("calls to OpenAI for a credential: got %d, want 1", got)
	}
	if got := e.keys(framework.WALPrefix); len(got) != 0 {
		t.Errorf("write-ahead-log entries after a credential: got %v, want none", got)
	}
	key := resp.Data["api_key"].(string)
	if !e.sim.Use(key) {
		t.Error("the key is not accepted")
	}
	if err := failure(e.lease(logical.RenewOperation, resp.Secret)); err != nil {
		t.Errorf("renew: %v", err)
	}
	e.revoke(resp.Secret)
	if e.sim.Use(key) {
		t.Error("the key is accepted after its lease was revoked")
	}
	if got := e.sim.ServiceAccounts(openaisim.DefaultProject); len(got) != 0 {
		t.Errorf("service accounts after revocation: got %v, want none", got)
	}
}
