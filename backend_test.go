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
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/logging"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"

	"vault-plugin-secrets-openai/internal/openaisim"
)

// env is a mount with its storage and a simulated OpenAI.
type env struct {
	t       testing.TB
	sim     *openaisim.Server
	wire    *wire // to the simulator
	b       *backend
	storage *testStorage
	system  *logical.StaticSystemView
	log     *logBuffer
	who     string          // display name of the token that asks
	secret  *logical.Secret // a lease to work with, where a test needs one
}

// newEnv returns a mount without config. Nothing in it uses the network, so that it
// works inside a testing/synctest bubble.
func newEnv(t testing.TB) *env {
	t.Helper()
	e := &env{
		t:       t,
		sim:     openaisim.New(),
		storage: &testStorage{Storage: &logical.InmemStorage{}},
		system:  &logical.StaticSystemView{DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: 32 * 24 * time.Hour},
		log:     &logBuffer{},
		who:     "token",
	}
	e.wire = &wire{RoundTripper: e.sim.Transport()}
	e.restart()
	t.Cleanup(func() { e.noSecrets("the log", e.log.String()) })
	return e
}

// newConfiguredEnv returns a mount with config and a role "web".
func newConfiguredEnv(t testing.TB) *env {
	t.Helper()
	e := newEnv(t)
	e.configure(nil)
	e.ok(logical.CreateOperation, "roles/web", map[string]any{"project_id": openaisim.DefaultProject})
	return e
}

// restart replaces the backend by a new one on the same storage, as a new plugin process.
func (e *env) restart() {
	e.t.Helper()
	e.b = newBackend(e.wire)
	err := e.b.Setup(context.Background(), &logical.BackendConfig{
		Logger: logging.NewVaultLoggerWithWriter(e.log, 1), // 1: trace
		System: testSystem{e.system}, StorageView: e.storage,
	})
	if err != nil {
		e.t.Fatal(err)
	}
}

// crash is restart, but what the process before it still does reaches storage no more.
func (e *env) crash() {
	e.t.Helper()
	e.storage.setFault(func(string, string) error { return errors.New("the process has ended") })
	e.storage = &testStorage{Storage: e.storage.Storage}
	e.restartOn(nil, nil)
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
		Operation: op, Path: path, Data: data, Storage: e.storage, MountPoint: "openai/", DisplayName: e.who,
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
		e.t.Errorf("%s %s %v: got response %v and error %v, want an error response", op, path, keyPattern.ReplaceAllString(fmt.Sprint(data), "sk-***"), resp, err)
		return
	}
	for _, text := range want {
		if !strings.Contains(resp.Error().Error(), text) {
			e.t.Errorf("%s %s %v: got %q, want it to contain %q", op, path, keyPattern.ReplaceAllString(fmt.Sprint(data), "sk-***"), resp.Error(), text)
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

// renew renews a lease, which must succeed, and returns the TTL that Vault then gives it.
func (e *env) renew(secret *logical.Secret) time.Duration {
	e.t.Helper()
	resp, err := e.lease(logical.RenewOperation, secret)
	if err := failure(resp, err); err != nil {
		e.t.Fatalf("renew: %v", err)
	}
	ttl := resp.Secret.TTL
	if secret.Increment > 0 {
		ttl = secret.Increment
	}
	return min(ttl, time.Until(secret.IssueTime.Add(resp.Secret.MaxTTL)))
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

// pending returns the write-ahead-log entries but those of credentials that were handed out.
// It gives those of pending credentials the time that their reservations may take.
func (e *env) pending() (ids []string) {
	e.t.Helper()
	for end := time.Now().Add(reserveTime + 2*time.Second); ; time.Sleep(100 * time.Millisecond) {
		ids = nil
		reserved := false
		for _, id := range e.keys(framework.WALPrefix) {
			entry, err := framework.GetWAL(context.Background(), e.storage.Storage, id)
			if err != nil {
				e.t.Fatal(err)
			}
			if entry != nil && entry.Kind != walIssued {
				ids = append(ids, id)
				reserved = reserved || entry.Kind == walCredential
			}
		}
		if !reserved || time.Now().After(end) {
			return ids
		}
	}
}

// put stores an entry as it is.
func (e *env) put(key, json string) {
	e.t.Helper()
	if err := e.storage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte(json)}); err != nil {
		e.t.Fatal(err)
	}
}

// stored returns all that is in storage, as text to compare.
func (e *env) stored() string {
	e.t.Helper()
	entries := map[string]string{}
	keys, err := logical.CollectKeys(context.Background(), e.storage.Storage)
	for _, key := range keys {
		var entry *logical.StorageEntry
		if entry, err = e.storage.Storage.Get(context.Background(), key); err == nil && entry != nil {
			entries[key] = string(entry.Value)
		}
	}
	if err != nil {
		e.t.Fatal(err)
	}
	return fmt.Sprint(entries)
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

// testSystem is a Vault without a rotation manager.
type testSystem struct{ *logical.StaticSystemView }

func (testSystem) RegisterRotationJob(context.Context, *rotation.RotationJobConfigureRequest) (string, error) {
	return "", automatedrotationutil.ErrRotationManagerUnsupported
}

func (testSystem) DeregisterRotationJob(context.Context, *rotation.RotationJobDeregisterRequest) error {
	return nil
}

// wire records the requests to OpenAI.
type wire struct {
	http.RoundTripper

	mu       sync.Mutex
	requests []string    // method, path below /v1 with query, body
	header   http.Header // of the last one
}

func (w *wire) RoundTrip(req *http.Request) (*http.Response, error) {
	text := req.Method + " " + strings.TrimPrefix(req.URL.RequestURI(), "/v1")
	if req.Body != nil {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return nil, err
		}
		text += " " + string(body)
		req = req.Clone(req.Context())
		req.Body = io.NopCloser(bytes.NewReader(body))
	}
	w.mu.Lock()
	w.requests, w.header = append(w.requests, text), req.Header
	w.mu.Unlock()
	return w.RoundTripper.RoundTrip(req)
}

// sent returns the requests since the last time that it was asked.
func (e *env) sent() []string {
	e.wire.mu.Lock()
	defer e.wire.mu.Unlock()
	requests := e.wire.requests
	e.wire.requests = nil
	return requests
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
	if err := errors.Join(s.check("list", prefix), ctx.Err()); err != nil {
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

// TestPathTable walks over the paths: what Vault's help and OpenAPI document need is there,
// secrets are marked, and what writes is forwarded to where storage can be written.
func TestPathTable(t *testing.T) {
	secrets := map[string]bool{"admin_api_key": true, "api_key": true}
	checkFields := func(where string, fields map[string]*framework.FieldSchema) {
		for name, field := range fields {
			if field.Description == "" {
				t.Errorf("%s, field %s: no description", where, name)
			}
			if got := field.DisplayAttrs != nil && field.DisplayAttrs.Sensitive; got != secrets[name] {
				t.Errorf("%s, field %s: sensitive: got %v, want %v", where, name, got, secrets[name])
			}
		}
	}
	b := newBackend(nil)
	var got []string
	for _, path := range b.Paths {
		if path.HelpSynopsis == "" || path.HelpDescription == "" {
			t.Errorf("%s: no help", path.Pattern)
		}
		if path.DisplayAttrs == nil || path.DisplayAttrs.OperationPrefix != "openai" {
			t.Errorf("%s: no operation prefix", path.Pattern)
		}
		if _, creates := path.Operations[logical.CreateOperation]; creates != (path.ExistenceCheck != nil) {
			t.Errorf("%s: create operation: %v, existence check: %v", path.Pattern, creates, path.ExistenceCheck != nil)
		}
		checkFields(path.Pattern, path.Fields)
		for op, handler := range path.Operations {
			where := path.Pattern + " " + string(op)
			got = append(got, where)
			properties := handler.Properties()
			if handler.Handler() == nil || properties.Summary == "" || properties.DisplayAttrs == nil || properties.DisplayAttrs.OperationVerb == "" {
				t.Errorf("%s: lacks a callback, a summary or a verb", where)
			}
			if len(properties.Responses) != 1 {
				t.Errorf("%s: got %d responses, want 1", where, len(properties.Responses))
			}
			for status, responses := range properties.Responses {
				for _, r := range responses {
					checkFields(where, r.Fields)
					if r.Description == "" || (status == http.StatusOK) != (len(r.Fields) > 0) {
						t.Errorf("%s: response %d with %d fields, described as %q", where, status, len(r.Fields), r.Description)
					}
				}
			}
			writes := op == logical.CreateOperation || op == logical.UpdateOperation || op == logical.DeleteOperation
			creds := strings.HasPrefix(path.Pattern, "creds/") // writes to its own cluster's storage only
			if properties.ForwardPerformanceStandby != (writes || creds) || properties.ForwardPerformanceSecondary != writes {
				t.Errorf("%s: forwarded by standby: %v, by secondary: %v", where, properties.ForwardPerformanceStandby, properties.ForwardPerformanceSecondary)
			}
		}
	}
	for _, secret := range b.Secrets {
		checkFields(secret.Type, secret.Fields)
	}
	slices.Sort(got)
	want := []string{
		"config create", "config delete", "config read", "config update", "config/rotate update",
		"creds/" + framework.GenericNameRegex("name") + " read", "metrics read",
		"roles/" + framework.GenericNameRegex("name") + " create", "roles/" + framework.GenericNameRegex("name") + " delete",
		"roles/" + framework.GenericNameRegex("name") + " read", "roles/" + framework.GenericNameRegex("name") + " update",
		"roles/?$ list",
	}
	if !slices.Equal(got, want) {
		t.Errorf("operations:\n got %q\nwant %q", got, want)
	}
	if b.Help == "" {
		t.Error("the engine has no help")
	}
}

// TestAnswers checks real answers against the schema that Vault's OpenAPI document shows.
func TestAnswers(t *testing.T) {
	e := newConfiguredEnv(t)
	scoped := map[string]any{"project_id": openaisim.DefaultProject, "scopes": "api.all.read", "max_ttl": "300d"}
	e.failing(openaisim.Fault{Method: "DELETE", Path: "admin_api_keys", Status: 403})
	for _, tt := range []struct {
		op   logical.Operation
		path string
		data map[string]any
	}{
		{logical.ListOperation, "roles", nil},
		{logical.ReadOperation, "config", nil},
		{logical.UpdateOperation, "config", map[string]any{"rotation_period": "30d", "rotation_policy": "p"}},
		{logical.UpdateOperation, "config/rotate", nil},
		{logical.ReadOperation, "config", nil},
		{logical.CreateOperation, "roles/scoped", scoped},
		{logical.ListOperation, "roles", nil},
		{logical.ReadOperation, "roles/web", nil},
		{logical.ReadOperation, "roles/scoped", nil},
		{logical.ReadOperation, "creds/web", nil},
		{logical.ReadOperation, "creds/scoped", nil},
		{logical.ReadOperation, "metrics", nil},
		{logical.ReadOperation, "metrics", map[string]any{"format": "prometheus"}},
		{logical.DeleteOperation, "roles/scoped", nil},
		{logical.DeleteOperation, "config", nil},
		{logical.ReadOperation, "metrics", nil},
	} {
		t.Run(string(tt.op)+" "+tt.path, func(t *testing.T) {
			resp := e.ok(tt.op, tt.path, tt.data)
			schema.ValidateResponse(t, schema.GetResponseSchema(t, e.b.Route(tt.path), tt.op), resp, true)
		})
	}
}

// bad is a value of a field that must be refused.
type bad struct {
	field string
	value any    // nil: the field is missing, where there is nothing yet
	want  string // in the message, besides the field's name
}

// refusesAll writes valid with each bad value in it, where there is nothing yet and where
// there is something, and checks that nothing is stored and that OpenAI is not asked.
func (e *env) refusesAll(path string, valid map[string]any, tests []bad) {
	e.t.Helper()
	refused := func(op logical.Operation, data map[string]any, tt bad) {
		e.t.Helper()
		before := e.stored()
		e.refused(op, path, data, tt.field, tt.want)
		if got := e.stored(); got != before {
			e.t.Errorf("%s %s with %s=%v: storage has changed", op, path, tt.field, tt.value)
		}
	}
	e.sent()
	for _, tt := range tests {
		data := maps.Clone(valid)
		data[tt.field] = tt.value
		maps.DeleteFunc(data, func(_ string, value any) bool { return value == nil })
		refused(logical.CreateOperation, data, tt)
	}
	if got := e.sent(); len(got) != 0 {
		e.t.Errorf("%s: asked OpenAI about bad input: %q", path, got)
	}
	e.ok(logical.CreateOperation, path, valid)
	for _, tt := range tests {
		if tt.value != nil {
			refused(logical.UpdateOperation, map[string]any{tt.field: tt.value}, tt)
		}
	}
}

// aMap is a value of the wrong type for every field. What it holds must not be quoted.
var aMap = map[string]any{"value": "sk-admin-simulated-secret"}

// badDurations are what no duration field takes.
func badDurations(field string) (tests []bad) {
	for _, value := range []any{"soon", -1, "-1h", "999999999999h", int64(math.MaxInt64), aMap, []any{"1h", "2h"}} {
		tests = append(tests, bad{field, value, ""})
	}
	return tests
}

func TestConfigBadInput(t *testing.T) {
	e := newEnv(t)
	key, id := e.sim.AdminKey()
	valid := map[string]any{"admin_api_key": key, "admin_api_key_id": id, "organization_id": openaisim.DefaultOrganization}
	tests := slices.Concat([]bad{
		{"admin_api_key", nil, "required"},
		{"admin_api_key", "", "required"},
		{"admin_api_key", "short", "8 to 512"},
		{"admin_api_key", strings.Repeat("k", 513), "8 to 512"},
		{"admin_api_key", "sk-admin-simulated secret", "without spaces"},
		{"admin_api_key", "sk-admin-simulated\r\nX-Header: secret", "printable"},
		{"admin_api_key", aMap, ""},
		{"admin_api_key", []any{"sk-admin-simulated-secret"}, ""},
		{"admin_api_key_id", "key_x/../y", "letters"},
		{"admin_api_key_id", strings.Repeat("k", 129), "128"},
		{"admin_api_key_id", aMap, ""},
		{"organization_id", nil, "required"},
		{"organization_id", "", "required"},
		{"organization_id", "org-sim\nX-Header: x", "letters"},
		{"organization_id", strings.Repeat("o", 129), "128"},
		{"organization_id", aMap, ""},
		{"api_endpoint", aMap, ""},
		{"verify_connection", "perhaps", "true or false"},
		{"verify_connection", aMap, "true or false"},
		{"disable_automated_rotation", "perhaps", ""},
		{"rotation_policy", aMap, ""},
		{"rotation_schedule", "now and then", ""},
		{"rotation_schedule", "61 * * * *", ""},
		{"rotation_schedule", "* * * * * *", ""},
		{"rotation_schedule", "TZ=Europe/Berlin 0 3 * * 0", "time zone"},
		{"rotation_schedule", "CRON_TZ=UTC 0 3 * * 0", "time zone"},
		{"rotation_schedule", "0 3 30 2 *", "no time to come"},
		{"rotation_period", "soon", "between rotations"},
		{"rotation_schedule", aMap, ""},
		{"rotation_window", "1h", "rotation_schedule"},
		{"admin_key_ttl", 3600, "rotation_period"},
	}, badDurations("rotation_period"), badDurations("rotation_window"), badDurations("admin_key_ttl"))
	for _, endpoint := range []string{
		"api.openai.com", "api.openai.com/v1", "/v1", "https://", "https:///v1", "https:api.openai.com", "://x", "%", "https://exa mple/v1",
		"https://api.openai.com:0", "https://api.openai.com:65536/v1", "https://api.openai.com:-1", "https://api.openai.com:x", "https://api.openai.com:/v1",
		"https://api.openai.com:443:443/v1", "https://::1/v1", "https://[::1/v1", "https://api.openai.com/v1\n",
		"https://user:sk-password@api.openai.com/v1", "https://user@api.openai.com/v1", "https://@api.openai.com/v1",
		"https://api.openai.com/v1?key=sk-secret", "https://api.openai.com/v1?", "https://api.openai.com/v1#part", "https://api.openai.com/v1#",
		"http://api.openai.com/v1", "http://10.0.0.1/v1", "http://localhost.example.com/v1", "http://127.0.0.1.example.com/v1", "http://0.0.0.0/v1",
		"ftp://api.openai.com", "file:///etc/passwd", "unix:///run/x.sock", "javascript:alert(1)", "ws://127.0.0.1",
		"https://api.openai.com/v1/../v2", "https://api.openai.com/..", "https://api.openai.com/%2e%2e/v1", "https://api.openai.com/v1/.%2E",
	} {
		tests = append(tests, bad{"api_endpoint", endpoint, ""})
	}
	e.refusesAll("config", valid, tests)

	// What is wrong only together.
	for _, tt := range []struct {
		data map[string]any
		want []string
	}{
		{map[string]any{"rotation_period": 3600, "rotation_schedule": "0 0 * * *"}, []string{"rotation_period", "rotation_schedule"}},
		{map[string]any{"rotation_schedule": "0 0 * * *", "rotation_window": 60}, []string{"rotation_window"}},
		{map[string]any{"rotation_period": 3600, "rotation_window": 3600}, []string{"rotation_window"}},
		{map[string]any{"rotation_period": 3600, "admin_key_ttl": 7199}, []string{"admin_key_ttl", "2h"}},
		{map[string]any{"rotation_period": 3600, "admin_key_ttl": 365*86400 + 1}, []string{"admin_key_ttl", "365 days"}},
		{map[string]any{"rotation_schedule": "0 0 1 * *", "admin_key_ttl": "61d"}, []string{"admin_key_ttl"}},
		{map[string]any{"rotation_period": 3600, "admin_key_ttl": 7200, "disable_automated_rotation": true}, []string{"admin_key_ttl", "disable_automated_rotation"}},
	} {
		before := e.stored()
		e.refused(logical.UpdateOperation, "config", tt.data, tt.want...)
		if e.stored() != before {
			t.Errorf("%v: storage has changed", tt.data)
		}
	}
	e.ok(logical.UpdateOperation, "config", map[string]any{"rotation_period": 3600, "admin_key_ttl": 7200})
	e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_schedule": "0 0 * * *"}, "rotation_period", "rotation_schedule")
	e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_period": 0}, "admin_key_ttl")
}

// wants compares an answer's data, all of it.
func (e *env) wants(resp *logical.Response, want map[string]any) {
	e.t.Helper()
	if resp == nil {
		e.t.Errorf("got no answer, want %v", want)
	} else if got, want := fmt.Sprint(resp.Data), fmt.Sprint(want); got != want {
		e.t.Errorf("answer:\n got %s\nwant %s", got, want)
	}
}

func TestConfig(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		if resp := e.ok(logical.ReadOperation, "config", nil); resp != nil {
			t.Errorf("read before it is written: got %v, want nothing", resp.Data)
		}
		if resp := e.ok(logical.DeleteOperation, "config", nil); resp != nil {
			t.Errorf("delete before it is written: got %v, want nothing", resp)
		}
		for _, path := range []string{"creds/web", "roles/web"} {
			e.put("roles/web", `{"project_id":"proj_sim"}`)
			e.refused(map[string]logical.Operation{"creds/web": logical.ReadOperation, "roles/web": logical.UpdateOperation}[path], path, nil, "not configured", "config")
		}
		e.refused(logical.UpdateOperation, "config/rotate", nil, "not configured")

		if resp := e.configure(nil); resp != nil {
			t.Errorf("write: got %v, want no content", resp)
		}
		key, id := e.sim.AdminKey()
		want := map[string]any{
			"admin_api_key_id": id, "organization_id": "org-sim", "api_endpoint": "https://api.openai.com/v1",
			"admin_key_ttl": 0, "admin_key_expires_at": "", "last_rotated": "2000-01-01T00:00:00Z", "next_rotation": "",
			"rotation_manager": "none", "pending_deletion": []string{}, "rotation_schedule": "", "rotation_window": 0,
			"rotation_period": 0, "disable_automated_rotation": false, "rotation_policy": "",
		}
		e.wants(e.ok(logical.ReadOperation, "config", nil), want)

		time.Sleep(time.Hour)
		for _, step := range []struct{ write, changes map[string]any }{
			{map[string]any{"api_endpoint": "http://localhost:8080/v1//", "admin_api_key": key + "\n"}, map[string]any{"api_endpoint": "http://localhost:8080/v1"}},
			{map[string]any{}, nil},
			{
				map[string]any{"rotation_period": "36h"},
				map[string]any{"rotation_period": 129600, "next_rotation": "2000-01-02T12:00:00Z", "rotation_manager": "plugin"},
			},
			{map[string]any{"admin_key_ttl": "72h"}, map[string]any{"admin_key_ttl": 259200}},
			{
				map[string]any{"disable_automated_rotation": true, "admin_key_ttl": 0},
				map[string]any{"disable_automated_rotation": true, "admin_key_ttl": 0, "next_rotation": "", "rotation_manager": "none"},
			},
			{
				map[string]any{"rotation_period": 0, "rotation_schedule": "0 6 * * SAT", "rotation_window": 7200, "disable_automated_rotation": false},
				map[string]any{
					"rotation_period": 0, "rotation_schedule": "0 6 * * SAT", "rotation_window": 7200, "disable_automated_rotation": false,
					"next_rotation": "2000-01-01T06:00:00Z", "rotation_manager": "plugin",
				},
			},
			{map[string]any{"rotation_window": 10800}, map[string]any{"rotation_window": 10800}},
			{map[string]any{"rotation_schedule": ""}, map[string]any{"rotation_schedule": "", "rotation_window": 0, "next_rotation": "", "rotation_manager": "none"}},
			{map[string]any{"api_endpoint": "", "admin_api_key": key}, map[string]any{"api_endpoint": "https://api.openai.com/v1"}},
		} {
			e.ok(logical.UpdateOperation, "config", step.write)
			maps.Copy(want, step.changes)
			e.wants(e.ok(logical.ReadOperation, "config", nil), want)
		}

		other, otherID := e.sim.AddAdminKey("other")
		e.ok(logical.UpdateOperation, "config", map[string]any{"admin_api_key": other})
		maps.Copy(want, map[string]any{"admin_api_key_id": otherID, "last_rotated": "2000-01-01T01:00:00Z"})
		e.wants(e.ok(logical.ReadOperation, "config", nil), want)
		if resp := e.ok(logical.UpdateOperation, "config", map[string]any{"organization_id": "org-other", "verify_connection": false}); resp == nil || len(resp.Warnings) != 1 {
			t.Errorf("another organization: got %v, want a warning", resp)
		}

		resp := e.ok(logical.DeleteOperation, "config", nil)
		if resp == nil || !strings.Contains(strings.Join(resp.Warnings, " "), "revoked") {
			t.Errorf("delete: got %v, want a warning about leases", resp)
		}
		if got := e.keys(""); !slices.Equal(got, []string{"roles/"}) {
			t.Errorf("storage after delete: got %v, want the roles only", got)
		}
		e.refused(logical.ReadOperation, "creds/web", nil, "not configured")
	})
}

func TestEndpoints(t *testing.T) {
	e := newEnv(t)
	for given, want := range map[string]string{
		"https://api.openai.com/v1":        "https://api.openai.com/v1",
		"https://api.openai.com/v1/":       "https://api.openai.com/v1",
		"https://eu.api.openai.com:8443//": "https://eu.api.openai.com:8443",
		"https://[2001:db8::1]:443/v1":     "https://[2001:db8::1]:443/v1",
		"http://127.0.0.1:8080/v1":         "http://127.0.0.1:8080/v1",
		"http://[::1]:8080/v1":             "http://[::1]:8080/v1",
		"http://localhost/v1..2":           "http://localhost/v1..2",
	} {
		e.configure(map[string]any{"api_endpoint": given, "verify_connection": false})
		if got := e.ok(logical.ReadOperation, "config", nil).Data["api_endpoint"]; got != want {
			t.Errorf("api_endpoint %s: got %v, want %s", given, got, want)
		}
	}
	if got := e.sent(); len(got) != 0 {
		t.Errorf("with verify_connection=false OpenAI was asked: %q", got)
	}
	key, _ := e.sim.AdminKey()
	e.refused(logical.UpdateOperation, "config", map[string]any{"admin_api_key": key[:100], "verify_connection": false}, "admin_api_key_id is required", "verify_connection")
}

// TestConfigProof is about what a write of config asks OpenAI, and what it makes of the answer.
func TestConfigProof(t *testing.T) {
	keys := func(redacted ...string) func(*env, map[string]any) {
		return func(e *env, data map[string]any) {
			list := []map[string]any{{"id": "key_other", "redacted_value": "sk-admin...???"}, {"id": "key_short", "redacted_value": "?"}}
			for i, r := range redacted {
				key := data["admin_api_key"].(string)
				list = append(list, map[string]any{"id": fmt.Sprintf("key_%d", i), "redacted_value": strings.ReplaceAll(r, "$", key[len(key)-3:])})
			}
			body, _ := json.Marshal(map[string]any{"data": list})
			e.failing(openaisim.Fault{Method: "GET", Path: "admin_api_keys$", Status: 200, Body: string(body)})
			delete(data, "admin_api_key_id")
		}
	}
	fault := func(f openaisim.Fault) func(*env, map[string]any) {
		return func(e *env, _ map[string]any) { e.failing(f) }
	}
	set := func(field string, value any) func(*env, map[string]any) {
		return func(_ *env, data map[string]any) { data[field] = value }
	}
	unverified := []string{"admin API key could not be verified", "verify_connection=false"}
	for name, tt := range map[string]struct {
		prepare func(*env, map[string]any)
		id      string   // that is found then; empty: refused
		want    []string // in the refusal
	}{
		"id given": {func(*env, map[string]any) {}, "first", nil},
		"id found": {func(_ *env, data map[string]any) { delete(data, "admin_api_key_id") }, "first", nil},
		"found on the second page": {func(e *env, data map[string]any) {
			for range 120 {
				e.sim.AddAdminKey("filler")
			}
			data["admin_api_key"], data["admin_api_key_id"] = e.sim.AddAdminKey("last")
			delete(data, "admin_api_key_id")
		}, "last", nil},
		"another form of redaction": {keys("sk-admin-sim*****$"), "key_0", nil},
		"none fits":                 {keys(), "", []string{"admin_api_key_id is required", "0 of"}},
		"several fit":               {keys("sk-admin...$", "sk-...$"), "", []string{"admin_api_key_id is required", "2 of"}},
		"an id that is not for URLs": {func(e *env, data map[string]any) {
			key := data["admin_api_key"].(string)
			e.failing(openaisim.Fault{Method: "GET", Path: "admin_api_keys$", Status: 200, Body: `{"data":[{"id":"../x","redacted_value":"sk-admin...` + key[len(key)-3:] + `"}]}`})
			delete(data, "admin_api_key_id")
		}, "", []string{"admin_api_key_id is required"}},
		"id of another key":     {func(e *env, data map[string]any) { _, data["admin_api_key_id"] = e.sim.AddAdminKey("other") }, "", []string{"admin_api_key_id", "another key"}},
		"unknown id":            {set("admin_api_key_id", "key_nowhere"), "", []string{"admin_api_key_id does not exist", "404"}},
		"refused key":           {set("admin_api_key", "sk-admin-simulated-unknown"), "", []string{"admin_api_key", "refused", "401 invalid_api_key", "request id req_"}},
		"refused organization":  {set("organization_id", "org-other"), "", []string{"organization_id", "refused", "401 mismatched_organization"}},
		"forbidden":             {fault(openaisim.Fault{Status: 403}), "", []string{"admin_api_key or organization_id was refused", "403"}},
		"refused connection":    {fault(openaisim.Fault{Kind: "refuse"}), "", append(unverified, "connection refused")},
		"closed connection":     {fault(openaisim.Fault{Kind: "close"}), "", append(unverified, "connection reset")},
		"hanging":               {fault(openaisim.Fault{Kind: "hang"}), "", append(unverified, "timed out")},
		"malformed":             {fault(openaisim.Fault{Kind: "malformed"}), "", append(unverified, "not the JSON")},
		"empty":                 {fault(openaisim.Fault{Status: 200, Body: `{}`}), "", append(unverified, "lacks")},
		"oversized":             {fault(openaisim.Fault{Kind: "oversized"}), "", append(unverified, "1 MiB")},
		"redirecting":           {fault(openaisim.Fault{Kind: "redirect"}), "", append(unverified, "redirects are not followed", "api_endpoint")},
		"404 of another server": {fault(openaisim.Fault{Status: 404, Body: "<html>"}), "", append(unverified, "404", "api_endpoint")},
		"server error":          {fault(openaisim.Fault{Status: 500}), "", append(unverified, "500")},
		"rate limit":            {fault(openaisim.Fault{Status: 429}), "", append(unverified, "429")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newEnv(t)
				key, id := e.sim.AdminKey()
				e.put("config", `{"admin_api_key":"sk-admin-simulated-old","admin_api_key_id":"key_old","organization_id":"org-old","api_endpoint":"https://old/v1"}`)
				before, start := e.stored(), time.Now()
				data := map[string]any{"admin_api_key": key, "admin_api_key_id": id, "organization_id": openaisim.DefaultOrganization}
				tt.prepare(e, data)
				if tt.id == "" {
					e.refused(logical.UpdateOperation, "config", data, tt.want...)
					if got := e.stored(); got != before {
						t.Errorf("storage after a refusal: got %s, want %s", got, before)
					}
				} else {
					e.ok(logical.UpdateOperation, "config", data)
					all := e.sim.AdminKeys()
					want := map[string]string{"first": id, "last": all[len(all)-1].ID}
					if got := e.config().AdminAPIKeyID; got != cmp.Or(want[tt.id], tt.id) {
						t.Errorf("admin_api_key_id: got %s, want %s", got, cmp.Or(want[tt.id], tt.id))
					}
				}
				if took := time.Since(start); took > 75*time.Second {
					t.Errorf("took %s, want at most 75s", took)
				}
			})
		})
	}
}

// failing makes OpenAI fail until further notice.
func (e *env) failing(f openaisim.Fault) {
	f.Times = -1
	e.sim.Inject(f)
}

// TestStorageFaults fails each storage access of each path: it is an inner error, no key is
// handed out, nothing is at OpenAI, and storage is as it was.
func TestStorageFaults(t *testing.T) {
	role := map[string]any{"project_id": openaisim.DefaultProject, "ttl": "2h"}
	for _, tt := range []struct {
		op        logical.Operation
		path      string
		data      map[string]any
		verb, key string // of the access that fails
	}{
		{logical.ReadOperation, "config", nil, "get", "config"},
		{logical.UpdateOperation, "config", map[string]any{"rotation_period": 3600}, "get", "config"},
		{logical.UpdateOperation, "config", map[string]any{"rotation_period": 3600}, "put", "config"},
		{logical.DeleteOperation, "config", nil, "get", "config"},
		{logical.DeleteOperation, "config", nil, "delete", "config"},
		{logical.UpdateOperation, "config/rotate", nil, "get", "config"},
		{logical.UpdateOperation, "config/rotate", nil, "put", "wal/"},
		{logical.ListOperation, "roles", nil, "list", "roles/"},
		{logical.ReadOperation, "roles/web", nil, "get", "roles/web"},
		{logical.UpdateOperation, "roles/web", role, "get", "roles/web"},
		{logical.UpdateOperation, "roles/web", role, "get", "config"},
		{logical.UpdateOperation, "roles/web", role, "put", "roles/web"},
		{logical.DeleteOperation, "roles/web", nil, "delete", "roles/web"},
		{logical.ReadOperation, "creds/web", nil, "get", "roles/web"},
		{logical.ReadOperation, "creds/web", nil, "get", "config"},
		{logical.ReadOperation, "creds/web", nil, "put", "wal/"},
		{logical.ReadOperation, "metrics", nil, "get", "config"},
	} {
		t.Run(string(tt.op)+" "+tt.path+" "+tt.verb+" "+tt.key, func(t *testing.T) {
			e := newConfiguredEnv(t)
			e.restart() // so that config has to be read
			before := e.stored()
			e.storage.setFault(func(verb, key string) error {
				if verb == tt.verb && strings.HasPrefix(key, tt.key) {
					return errors.New("storage fault")
				}
				return nil
			})
			resp, err := e.do(tt.op, tt.path, tt.data)
			warned := resp != nil && tt.path == "roles/web" && tt.key == "config" && strings.Contains(fmt.Sprint(resp.Warnings), "storage fault")
			if (err == nil || resp != nil || !strings.Contains(err.Error(), "storage fault")) && !warned {
				t.Errorf("got %v and error %v, want the storage's error", resp, err)
			}
			if got := len(e.sim.ServiceAccounts(openaisim.DefaultProject)); got != 0 {
				t.Errorf("service accounts: got %d, want none", got)
			}
			e.storage.setFault(nil)
			if !warned && e.stored() != before {
				t.Error("storage has changed")
			}
			e.creds("web")
		})
	}
}

func TestRoleBadInput(t *testing.T) {
	e := newEnv(t)
	e.configure(nil)
	tests := slices.Concat([]bad{
		{"project_id", nil, "required"},
		{"project_id", "", "required"},
		{"project_id", "proj_x/../../admin_api_keys", "letters"},
		{"project_id", "proj_x?limit=1", "letters"},
		{"project_id", strings.Repeat("p", 129), "128"},
		{"project_id", aMap, ""},
		{"service_account_name_template", aMap, ""},
		{"service_account_description", strings.Repeat("d", 1025), "1024"},
		{"service_account_description", aMap, ""},
		{"ttl", 0, "more than 0"},
		{"ttl", "25h", "max_ttl"},
		{"max_ttl", 0, "more than 0"},
		{"max_ttl", "366d", "365 days"},
		{"max_ttl", "59m", "ttl must be"}, // less than ttl
		{"enforce_key_expiry", "perhaps", "true or false"},
		{"enforce_key_expiry", aMap, "true or false"},
		{"scopes", "api.all.read,API ALL", "names like"},
		{"scopes", []string{strings.Repeat("s", 129)}, "names like"},
		{"scopes", manyScopes(101), "100"},
		{"scopes", aMap, ""},
		{"service_account_role", "none", "member or owner"},
		{"service_account_role", "admin", "member or owner"},
		{"service_account_role", "member", "scopes"}, // without scopes
		{"service_account_role", aMap, ""},
		{"service_account_id", "svc_acct_x/api_keys", "letters"},
		{"service_account_id", strings.Repeat("s", 129), "128"},
		{"service_account_id", aMap, ""},
	}, badDurations("ttl"), badDurations("max_ttl"))
	valid := map[string]any{"project_id": openaisim.DefaultProject, "ttl": "1h"}
	e.refusesAll("roles/web", valid, tests)

	account := e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")
	e.ok(logical.UpdateOperation, "roles/web", map[string]any{"scopes": "api.all.read", "service_account_role": "owner"})
	e.refused(logical.UpdateOperation, "roles/web", map[string]any{"service_account_id": account}, "service_account_role", "service_account_id", "exclude")
	e.refused(logical.UpdateOperation, "roles/web", map[string]any{"scopes": ""}, "service_account_role needs scopes")
	e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_id": account, "service_account_role": ""})
	e.ok(logical.UpdateOperation, "roles/web", map[string]any{"scopes": manyScopes(100)})
}

func manyScopes(n int) (scopes []string) {
	for i := range n {
		scopes = append(scopes, fmt.Sprintf("api.s%d.read", i))
	}
	return scopes
}

func TestRole(t *testing.T) {
	e := newEnv(t)
	e.configure(nil)
	account := e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")
	e.wants(e.ok(logical.ListOperation, "roles", nil), map[string]any{})
	if resp := e.ok(logical.ReadOperation, "roles/web.1", nil); resp != nil {
		t.Errorf("read before it is written: got %v, want nothing", resp.Data)
	}
	want := map[string]any{
		"project_id": "proj_sim", "service_account_name_template": "vault-{{.RoleName}}-{{.RandomSuffix}}",
		"service_account_description": "Service account created by Vault", "ttl": 3600, "max_ttl": 86400, "enforce_key_expiry": true,
		"scopes": []string{}, "service_account_role": "", "service_account_id": "",
	}
	for i, step := range []struct{ write, changes map[string]any }{
		{map[string]any{"project_id": "proj_sim"}, nil},
		{map[string]any{}, nil},
		{map[string]any{"ttl": "90m", "max_ttl": "365d"}, map[string]any{"ttl": 5400, "max_ttl": 31536000}},
		{map[string]any{"ttl": 7200, "max_ttl": 7200}, map[string]any{"ttl": 7200, "max_ttl": 7200}},
		{map[string]any{"enforce_key_expiry": false}, map[string]any{"enforce_key_expiry": false}},
		{
			map[string]any{"service_account_description": "for tests", "enforce_key_expiry": "true"},
			map[string]any{"service_account_description": "for tests", "enforce_key_expiry": true},
		},
		{
			map[string]any{"scopes": []string{"api.b.read", "api.a.read", "api.b.read"}, "service_account_role": "owner"},
			map[string]any{"scopes": []string{"api.a.read", "api.b.read"}, "service_account_role": "owner"},
		},
		{map[string]any{"service_account_role": "", "service_account_id": account}, map[string]any{"service_account_role": "", "service_account_id": account}},
		{map[string]any{"scopes": ""}, map[string]any{"scopes": []string{}}},
		{map[string]any{"service_account_id": ""}, map[string]any{"service_account_id": ""}},
	} {
		op := []logical.Operation{logical.CreateOperation, logical.UpdateOperation}[min(i, 1)]
		if resp := e.ok(op, "roles/web.1", step.write); (resp != nil) != (step.changes["max_ttl"] == 31536000) { // over the mount's maximum
			t.Errorf("write %v: got %v", step.write, resp)
		}
		maps.Copy(want, step.changes)
		e.wants(e.ok(logical.ReadOperation, "roles/web.1", nil), want)
	}
	e.ok(logical.CreateOperation, "roles/short", map[string]any{"project_id": "proj_sim", "max_ttl": "10m"})
	if got := e.ok(logical.ReadOperation, "roles/short", nil).Data["ttl"]; got != int64(600) {
		t.Errorf("ttl with a max_ttl below its default: got %v, want 600", got)
	}
	e.wants(e.ok(logical.ListOperation, "roles/", nil), map[string]any{"keys": []string{"short", "web.1"}})
	for range 2 {
		if resp := e.ok(logical.DeleteOperation, "roles/web.1", nil); resp != nil {
			t.Errorf("delete: got %v, want no content", resp)
		}
	}
	e.wants(e.ok(logical.ListOperation, "roles", nil), map[string]any{"keys": []string{"short"}})
	e.refused(logical.ReadOperation, "creds/web.1", nil, `role "web.1" does not exist`)
}

// TestRoleProof is about what a write of a role asks OpenAI, and what it makes of the answer.
func TestRoleProof(t *testing.T) {
	project, account := "^/organization/projects/[^/]+$", "/service_accounts/"
	const checked = "checked" // accepted without a warning
	for name, tt := range map[string]struct {
		fault   *openaisim.Fault
		data    map[string]any
		refusal []string // that the caller's mistake is answered with; checked; empty: stored with a warning
		calls   int      // 0: as many as time allows
	}{
		"project":                       {nil, nil, []string{checked}, 1},
		"account":                       {nil, map[string]any{"service_account_id": "member"}, []string{checked}, 2},
		"account without a role":        {nil, map[string]any{"service_account_id": "none"}, nil, 2},
		"unknown project":               {nil, map[string]any{"project_id": "proj_nowhere"}, []string{"project_id", "proj_nowhere", "404", "request id req_"}, 1},
		"archived project":              {nil, map[string]any{"project_id": "proj_archived"}, []string{"project_id", "proj_archived", "archived"}, 1},
		"unknown account":               {nil, map[string]any{"service_account_id": "svc_acct_nowhere"}, []string{"service_account_id", "svc_acct_nowhere", "404"}, 2},
		"refused key":                   {&openaisim.Fault{Status: 401}, nil, []string{"401"}, 1},
		"refused connection":            {&openaisim.Fault{Kind: "refuse"}, nil, nil, 4},
		"closed connection":             {&openaisim.Fault{Kind: "close"}, nil, nil, 4},
		"hanging":                       {&openaisim.Fault{Kind: "hang"}, nil, nil, 0},
		"hanging later":                 {&openaisim.Fault{Kind: "hang", Path: account}, map[string]any{"service_account_id": "member"}, nil, 0},
		"malformed":                     {&openaisim.Fault{Kind: "malformed"}, nil, nil, 1},
		"another project":               {&openaisim.Fault{Status: 200, Body: `{"id":"proj_other","status":"active"}`}, nil, nil, 1},
		"oversized":                     {&openaisim.Fault{Kind: "oversized"}, nil, nil, 1},
		"redirecting":                   {&openaisim.Fault{Kind: "redirect"}, nil, nil, 1},
		"server error":                  {&openaisim.Fault{Status: 500}, nil, nil, 4},
		"no retry wanted":               {&openaisim.Fault{Status: 500, Header: http.Header{"X-Should-Retry": {"false"}}}, nil, nil, 1},
		"a retry wanted":                {&openaisim.Fault{Status: 400, Header: http.Header{"X-Should-Retry": {"true"}}}, nil, []string{"project_id"}, 4},
		"time-out at OpenAI":            {&openaisim.Fault{Status: 408}, nil, nil, 4},
		"conflict":                      {&openaisim.Fault{Status: 409}, nil, nil, 4},
		"a short spell of errors":       {&openaisim.Fault{Status: 503, Times: 3}, nil, []string{checked}, 4},
		"a short spell of lost answers": {&openaisim.Fault{Kind: "close", Process: true, Times: 3}, nil, []string{checked}, 4},
		"rate limit, once":              {&openaisim.Fault{Status: 429, Times: 1}, nil, []string{checked}, 2},
		"rate limit without end":        {&openaisim.Fault{Status: 429, Header: http.Header{"Retry-After": {"50"}}}, nil, nil, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				e.sim.AddProject("proj_archived", "Archived")
				e.sim.ArchiveProject("proj_archived")
				data := map[string]any{"ttl": "2h"}
				maps.Copy(data, tt.data)
				if role := data["service_account_id"]; role == "member" || role == "none" {
					data["service_account_id"] = e.sim.AddServiceAccount(openaisim.DefaultProject, "app", role.(string))
				}
				if f := tt.fault; f != nil {
					f.Times, f.Path = cmp.Or(f.Times, -1), cmp.Or(f.Path, project)
					e.sim.Inject(*f)
				}
				e.sent()
				before, start := e.stored(), time.Now()
				switch {
				case len(tt.refusal) == 0:
					resp := e.ok(logical.UpdateOperation, "roles/web", data)
					if resp == nil || len(resp.Warnings) != 1 {
						t.Fatalf("got %v, want one warning", resp)
					}
					if tt.fault != nil && !strings.Contains(resp.Warnings[0], "unchecked: ") {
						t.Errorf("warning: got %q", resp.Warnings[0])
					}
					e.noSecrets("a warning", resp.Warnings[0])
				case tt.refusal[0] == checked:
					if resp := e.ok(logical.UpdateOperation, "roles/web", data); resp != nil {
						t.Errorf("got %v, want no content", resp)
					}
				default:
					e.refused(logical.UpdateOperation, "roles/web", data, tt.refusal...)
				}
				refused := len(tt.refusal) > 0 && tt.refusal[0] != checked
				if got := e.stored() != before; got == refused {
					t.Errorf("storage has changed: got %v, want %v", got, !refused)
				}
				if got := e.sent(); len(got) != cmp.Or(tt.calls, len(got)) {
					t.Errorf("calls to OpenAI: got %q, want %d", got, tt.calls)
				}
				if took := time.Since(start); took > 75*time.Second {
					t.Errorf("took %s, want at most 75s", took)
				}
				for _, c := range e.sim.Calls() {
					if c.Host == openaisim.RedirectHost {
						t.Error("a redirect was followed")
					}
				}
			})
		})
	}
}

// TestExistingAccountName: creds never names an account that it is not about.
func TestExistingAccountName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		first, second := e.sim.AddServiceAccount("proj_sim", "first", "member"), e.sim.AddServiceAccount("proj_sim", "second", "member")
		e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_id": first})
		if got := e.creds("web").Data["service_account"]; got != "first" {
			t.Errorf("service_account: got %v, want first", got)
		}
		e.sim.Inject(openaisim.Fault{Method: "GET", Times: 4})
		e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_id": second})
		if got := e.creds("web").Data; got["service_account_id"] != second || got["service_account"] == "first" {
			t.Errorf("got account %v named %v, want %s", got["service_account_id"], got["service_account"], second)
		}
	})
}

// multiplied is a template that makes 4 MiB of 8 bytes, and would make far more.
const multiplied = `{{$a:="xxxxxxxx"}}{{$a:=replace "x" $a $a}}{{$b:=replace "x" $a "xxxxxxxxxxxxxxxx"}}{{$c:=replace "x" $b $a}}` +
	`{{$d:=replace "x" $c $a}}{{truncate 1 $d}}{{.RandomSuffix}}`

func TestNameTemplates(t *testing.T) {
	e := newConfiguredEnv(t)
	e.who = "oidc-Jané Doe@example.com"
	for _, tt := range []struct{ template, want string }{ // want: the name's pattern, or what is in the refusal
		{"vault-{{.RoleName}}-{{.RandomSuffix}}", `^vault-web\.1-[a-z0-9]{10}$`},
		{"{{.ProjectID}}_{{.RandomSuffix}}", `^proj_sim_[a-z0-9]{10}$`},
		{"{{.ProjectName}}-{{.RandomSuffix}}", `^Simulated-project-[a-z0-9]{10}$`},
		{"{{.DisplayName}}-{{.RandomSuffix}}", `^oidc-Jan-Doe-example-com-[a-z0-9]{10}$`},
		{"{{.DisplayName | truncate 7 | lowercase}}-{{uuid}}", `^oidc-ja-[0-9a-f-]{36}-[a-z0-9]{10}$`},
		{"{{random 20 | uppercase}}", `^[A-Z0-9]{20}-[a-z0-9]{10}$`},
		{"-ä {{.RandomSuffix}} ö-", `^[a-z0-9]{10}$`},
		{"{{.RoleName | replace \"web\" \"app\"}}{{.RandomSuffix}}", `^app-1[a-z0-9]{10}$`},
		{strings.Repeat("x", 54) + "{{.RandomSuffix}}", `^x{54}[a-z0-9]{10}$`},
		{"", "empty|missing"},
		{" ", "empty"},
		{"äöü", "empty"},
		{"{{/* nothing */}}", "empty"},
		{"fixed", "another name each time"},
		{"{{.RoleName}}-{{.ProjectID}}-{{.ProjectName}}-{{.DisplayName}}", "another name each time"},
		{"{{.RandomSuffix | truncate 64 | sha256 | replace \"a\" \"b\" | truncate 1 | replace \"x\" \"y\" | len | eq 1}}", "another name each time"},
		{strings.Repeat("x", 55) + "{{.RandomSuffix}}", "64"},
		{strings.Repeat("x", 240) + "{{.RandomSuffix}}", "256 bytes"},
		{"{{.RandomSuffix", "not valid"},
		{"{{.RandomSuffix}}{{end}}", "not valid"},
		{"{{.Random}}", "not valid"},
		{"{{.RoleName.RandomSuffix}}", "not valid"},
		{"{{nope}}{{.RandomSuffix}}", "not valid"},
		{"{{random 0}}{{.RandomSuffix}}", "not valid"},
		{"{{random 1000000000}}", "not valid"},
		{"{{truncate -1 .RandomSuffix}}", "not valid"},
		{"{{range 1000000000}}x{{end}}{{.RandomSuffix}}", "no range"},
		{"{{- \trange $i := 1000000000}}x{{end}}{{.RandomSuffix}}", "no range"},
		{"{{define \"x\"}}{{template \"x\"}}{{end}}{{.RandomSuffix}}", "no range"},
		{"{{template \"template\" .}}{{.RandomSuffix}}", "no range"},
		{"{{block \"x\" .}}{{end}}{{.RandomSuffix}}", "no range"},
		{"{{printf \"%1000000000d\" 1}}{{.RandomSuffix}}", "printf"},
		{"{{print .}}{{.RandomSuffix}}", "print"},
		{"{{println .}}{{.RandomSuffix}}", "println"},
		{"{{html .RoleName}}{{.RandomSuffix}}", "html"},
		{"{{js .RoleName}}{{.RandomSuffix}}", "js"},
		{"{{urlquery .RoleName}}{{.RandomSuffix}}", "urlquery"},
		{"{{.RandomSuffix | replace \"\" \"xxxxxxxx\"}}", "replace"},
		{multiplied, "replace"},
	} {
		data := map[string]any{"project_id": openaisim.DefaultProject, "service_account_name_template": tt.template}
		if !strings.HasPrefix(tt.want, "^") {
			before := e.stored()
			resp, err := e.do(logical.UpdateOperation, "roles/web.1", data)
			if err != nil || !resp.IsError() {
				t.Errorf("template %q: got %v and error %v, want a refusal", tt.template, resp, err)
			} else if got := resp.Error().Error(); !strings.Contains(got, "service_account_name_template") || !regexp.MustCompile(tt.want).MatchString(got) {
				t.Errorf("template %q: got %q, want it to contain service_account_name_template and %q", tt.template, got, tt.want)
			}
			if e.stored() != before {
				t.Errorf("template %q: storage has changed", tt.template)
			}
			continue
		}
		e.ok(logical.UpdateOperation, "roles/web.1", data)
		names := e.names("web.1", 2)
		want := strings.ReplaceAll(tt.want, `\.`, "-")
		if !regexp.MustCompile(want).MatchString(names[0]) || names[0] == names[1] {
			t.Errorf("template %q: got names %q, want them different and like %s", tt.template, names, want)
		}
	}
}

// names returns the names of n new credentials, as OpenAI has them.
func (e *env) names(role string, n int) (names []string) {
	e.t.Helper()
	for range n {
		data := e.creds(role).Data
		accounts := e.sim.ServiceAccounts(openaisim.DefaultProject)
		if last := accounts[len(accounts)-1]; last.ID != data["service_account_id"] || last.Name != data["service_account"] {
			e.t.Errorf("got %v, want OpenAI's %v", data["service_account"], last)
		}
		names = append(names, data["service_account"].(string))
	}
	return names
}

// TestNamesUnique: rollback finds a lost account by its name, so no two may be the same,
// whatever the template of an older role and the asking token make of it.
func TestNamesUnique(t *testing.T) {
	e := newConfiguredEnv(t)
	for _, tt := range []struct{ template, who string }{
		{"fixed", "token"},
		{"{{.RoleName}}-{{truncate 1 .RandomSuffix}}", "token"},
		{"{{unix_time}}", "token"},
		{"{{.DisplayName}}-{{.RandomSuffix}}", strings.Repeat("long", 50)},
		{"{{.RandomSuffix}}-{{.DisplayName}}", strings.Repeat("long", 50)},
		{"{{.DisplayName}}-{{.RandomSuffix}}", ""},
		{"{{.DisplayName}}-{{.RandomSuffix}}", "…"},
		{"{{.DisplayName}}-{{.RandomSuffix}}", "{{.RandomSuffix}}\r\n\x00"},
		{"{{.DisplayName}}", "---"},
	} {
		template, _ := json.Marshal(tt.template)
		e.put("roles/old", `{"project_id":"proj_sim","service_account_name_template":`+string(template)+`,"ttl":3600000000000,"max_ttl":7200000000000}`)
		e.who = tt.who
		names := e.names("old", 30)
		for _, name := range names {
			if !regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_-]{0,62}[A-Za-z0-9])?$`).MatchString(name) {
				t.Errorf("%q for %q: got the name %q, which is not valid", tt.template, tt.who, name)
			}
		}
		slices.Sort(names)
		if got := len(slices.Compact(names)); got != 30 {
			t.Errorf("%q for %q: got %d different names, want 30", tt.template, tt.who, got)
		}
	}
}

// TestProjectNameCalls: a project's name costs a call where a template uses it, once.
func TestProjectNameCalls(t *testing.T) {
	e := newConfiguredEnv(t)
	e.ok(logical.CreateOperation, "roles/named", map[string]any{"project_id": "proj_sim", "service_account_name_template": "{{.ProjectName}}-{{.RandomSuffix}}"})
	e.restart()
	e.sent()
	for i, want := range []int{2, 1, 1} {
		e.creds("named")
		if got := e.sent(); len(got) != want || want == 2 && got[0] != "GET /organization/projects/proj_sim" {
			t.Errorf("credential %d: got calls %q, want %d", i, got, want)
		}
	}
	e.creds("web")
	if got := e.sent(); len(got) != 1 {
		t.Errorf("credential of a role that does not use it: got calls %q, want 1", got)
	}
}

const accountsPath = "/organization/projects/proj_sim/service_accounts"

// TestCreds issues and revokes a credential of each kind of role.
func TestCreds(t *testing.T) {
	issue := "POST " + accountsPath + ` {"expires_in_seconds":3660,"name":"NAME"}`
	keyless := "POST " + accountsPath + ` {"create_service_account_only":true,"name":"NAME"}`
	member, owner := "POST "+accountsPath+`/ACCOUNT {"role":"member"}`, "POST "+accountsPath+`/ACCOUNT {"role":"owner"}`
	key := "POST " + accountsPath + "/ACCOUNT/api_keys "
	account, only := "DELETE "+accountsPath+"/ACCOUNT", "DELETE /organization/projects/proj_sim/api_keys/KEY"
	for name, tt := range map[string]struct {
		role   map[string]any
		issue  []string // the requests to OpenAI
		revoke string
	}{
		"own account":          {nil, []string{issue}, account},
		"without expiry":       {map[string]any{"enforce_key_expiry": false}, []string{"POST " + accountsPath + ` {"name":"NAME"}`}, account},
		"scoped":               {map[string]any{"scopes": "api.b.write,api.a.read"}, []string{keyless, member, key + `{"expires_in_seconds":3660,"name":"NAME","scopes":["api.a.read","api.b.write"]}`}, account},
		"scoped, owner":        {map[string]any{"scopes": "api.a.read", "service_account_role": "owner"}, []string{keyless, owner, key + `{"expires_in_seconds":3660,"name":"NAME","scopes":["api.a.read"]}`}, account},
		"scoped, no expiry":    {map[string]any{"scopes": "api.a.read", "enforce_key_expiry": false}, []string{keyless, member, key + `{"name":"NAME","scopes":["api.a.read"]}`}, account},
		"existing":             {map[string]any{"service_account_id": "ACCOUNT"}, []string{key + `{"expires_in_seconds":3660,"name":"NAME"}`}, only},
		"existing, no expiry":  {map[string]any{"service_account_id": "ACCOUNT", "enforce_key_expiry": false}, []string{key + `{"name":"NAME"}`}, only},
		"existing with scopes": {map[string]any{"service_account_id": "ACCOUNT", "scopes": "api.a.read"}, []string{key + `{"expires_in_seconds":3660,"name":"NAME","scopes":["api.a.read"]}`}, only},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				existing := e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")
				role, exists := maps.Clone(tt.role), tt.role["service_account_id"] != nil
				if exists {
					role["service_account_id"] = existing
				}
				e.ok(logical.UpdateOperation, "roles/web", role)
				e.sent()
				start := time.Now()
				resp := e.creds("web")

				keys := e.sim.ProjectKeys(openaisim.DefaultProject)
				accounts := e.sim.ServiceAccounts(openaisim.DefaultProject)
				made := accounts[len(accounts)-1]
				if len(keys) != 1 || keys[0].ServiceAccountID != made.ID || (made.ID == existing) != exists {
					t.Fatalf("at OpenAI: got keys %v of %v, want one", keys, accounts)
				}
				k, expires := keys[0], tt.role["enforce_key_expiry"] == nil
				scopes, _ := tt.role["scopes"].(string)
				sorted := slices.Sorted(strings.SplitSeq(scopes, ","))
				if scopes == "" {
					sorted = []string{}
				}
				if !slices.Equal(k.Scopes, sorted) {
					t.Errorf("scopes at OpenAI: got %q, want %q", k.Scopes, sorted)
				}
				if want, _ := tt.role["service_account_role"].(string); made.Role != cmp.Or(want, "member") {
					t.Errorf("role of the account: got %s, want %s", made.Role, cmp.Or(want, "member"))
				}
				if want := start.Add(time.Hour + time.Minute); expires && !k.Expires.Equal(want) || !expires && !k.Expires.IsZero() {
					t.Errorf("the key expires at %v, want %v: %v", k.Expires, expires, want)
				}
				text := ""
				if expires {
					text = "2000-01-01T01:01:00Z"
				}
				value := resp.Data["api_key"].(string)
				e.wants(resp, map[string]any{
					"api_key": value, "api_key_id": k.ID, "service_account": made.Name, "service_account_id": made.ID,
					"project_id": "proj_sim", "organization_id": "org-sim", "scopes": sorted, "expires_at": text,
				})
				if !e.sim.Use(value) {
					t.Error("the key is not accepted")
				}
				if s := resp.Secret; s.TTL != time.Hour || s.MaxTTL != 24*time.Hour || !s.Renewable || len(resp.Warnings) != 0 {
					t.Errorf("lease: got ttl %s, max_ttl %s, renewable %v, warnings %q", s.TTL, s.MaxTTL, s.Renewable, resp.Warnings)
				}
				e.noSecrets("the lease", fmt.Sprint(resp.Secret.InternalData))
				e.noSecrets("storage besides config", strings.ReplaceAll(e.stored(), e.config().AdminAPIKey, ""))
				h, admin := e.wire.header, e.config().AdminAPIKey
				for header, want := range map[string]string{
					"Authorization": "Bearer " + admin, "OpenAI-Organization": "org-sim", "Content-Type": "application/json", "User-Agent": "vault-plugin-secrets-openai",
				} {
					if got := h.Get(header); got != want {
						t.Errorf("header %s: got %q, want %q", header, got, want)
					}
				}
				ids := strings.NewReplacer(made.ID, "ACCOUNT", k.ID, "KEY", resp.Data["service_account"].(string), "NAME", k.Name, "NAME")
				if got := ids.Replace(strings.Join(e.sent(), "\n")); got != strings.Join(tt.issue, "\n") {
					t.Errorf("requests:\n got %s\nwant %s", got, strings.Join(tt.issue, "\n"))
				}

				e.revoke(resp.Secret)
				if got := ids.Replace(strings.Join(e.sent(), "\n")); got != tt.revoke {
					t.Errorf("requests of the revocation: got %s, want %s", got, tt.revoke)
				}
				if got := e.sim.ServiceAccounts(openaisim.DefaultProject); len(got) != 1 || got[0].ID != existing || e.sim.Use(value) {
					t.Errorf("accounts after revocation: got %v, want those that were there; key accepted: %v", got, e.sim.Use(value))
				}
				if got := e.sim.ProjectKeys(openaisim.DefaultProject); len(got) != 0 {
					t.Errorf("keys after revocation: got %v, want none", got)
				}
			})
		})
	}
}

func TestCredsTTL(t *testing.T) {
	for _, tt := range []struct {
		ttl, maxTTL string
		mount       time.Duration // its maximum; 0: it can't be had
		asked       any
		want        time.Duration // 0: refused
	}{
		{"1h", "24h", 768 * time.Hour, nil, time.Hour},
		{"1h", "24h", 768 * time.Hour, 1, time.Second},
		{"1h", "24h", 768 * time.Hour, "90m", 90 * time.Minute},
		{"1h", "24h", 768 * time.Hour, "24h", 24 * time.Hour},
		{"1h", "24h", 768 * time.Hour, 86401, 0},
		{"1h", "24h", 768 * time.Hour, 0, 0},
		{"1h", "24h", 768 * time.Hour, "", 0},
		{"1h", "24h", 768 * time.Hour, "-1h", 0},
		{"1h", "24h", 768 * time.Hour, "soon", 0},
		{"1h", "24h", 768 * time.Hour, int64(math.MaxInt64), 0},
		{"1h", "24h", 768 * time.Hour, aMap, 0},
		{"12h", "24h", 6 * time.Hour, nil, 6 * time.Hour},
		{"1h", "24h", 6 * time.Hour, "7h", 6 * time.Hour},
		{"1h", "24h", 0, "7h", 7 * time.Hour},
		{"365d", "365d", 10000 * time.Hour, nil, 365 * 24 * time.Hour},
	} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			e.ok(logical.UpdateOperation, "roles/web", map[string]any{"ttl": tt.ttl, "max_ttl": tt.maxTTL})
			e.system.MaxLeaseTTLVal = tt.mount
			data := map[string]any{"ttl": tt.asked}
			if tt.asked == nil {
				data = nil
			}
			if tt.want == 0 {
				e.refused(logical.ReadOperation, "creds/web", data, "ttl")
				if got := e.sim.ServiceAccounts(openaisim.DefaultProject); len(got) != 0 {
					t.Errorf("ttl %v: got accounts %v, want none", tt.asked, got)
				}
				return
			}
			resp := e.ok(logical.ReadOperation, "creds/web", data)
			if resp.Secret.TTL != tt.want {
				t.Errorf("ttl %v of %s at most %s, mount %s: got %s, want %s", tt.asked, tt.ttl, tt.maxTTL, tt.mount, resp.Secret.TTL, tt.want)
			}
			over := e.sim.ProjectKeys(openaisim.DefaultProject)[0].Expires.Sub(time.Now().Add(tt.want))
			if want := min(time.Minute, 365*24*time.Hour-tt.want); over != want {
				t.Errorf("ttl %v: the key outlives its lease by %s, want %s", tt.asked, over, want)
			}
			if warned := len(resp.Warnings) > 0; warned != (tt.mount == 6*time.Hour) {
				t.Errorf("ttl %v, mount %s: got warnings %q", tt.asked, tt.mount, resp.Warnings)
			}
		})
	}
}

// TestRenewal: each renewal moves the key's expiry at OpenAI with its lease's end, but never
// past the longest life.
func TestRenewal(t *testing.T) {
	for name, role := range map[string]map[string]any{
		"own account": {}, "scoped": {"scopes": "api.a.read"}, "existing": {"service_account_id": "x"}, "without expiry": {"enforce_key_expiry": false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				role := maps.Clone(role)
				if role["service_account_id"] != nil {
					role["service_account_id"] = e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")
				}
				role["max_ttl"] = "3h"
				e.ok(logical.UpdateOperation, "roles/web", role)
				e.sim.SetLatency(6 * time.Second)
				start := time.Now()
				resp := e.ok(logical.ReadOperation, "creds/web", nil)
				resp.Secret.IssueTime = time.Now() // when Vault gets the answer
				e.sent()
				for _, step := range []struct{ wait, increment, want time.Duration }{ // want: the lease's new TTL
					{1500 * time.Millisecond, 0, time.Hour},
					{50 * time.Minute, 0, time.Hour},
					{time.Minute, 10 * time.Minute, 10 * time.Minute},
					{9 * time.Minute, 2 * time.Hour, 2 * time.Hour},
					{100 * time.Minute, 0, 0},
					{18 * time.Minute, 0, 0},
				} {
					time.Sleep(step.wait)
					resp.Secret.Increment = step.increment
					ttl := e.renew(resp.Secret)
					if step.want != 0 && (ttl > step.want || ttl < step.want-time.Minute) {
						t.Errorf("after %s: got ttl %s, want %s", time.Since(start), ttl, step.want)
					}
					expires := e.sim.ProjectKeys(openaisim.DefaultProject)[0].Expires
					if role["enforce_key_expiry"] != nil {
						if got := e.sent(); len(got) != 0 || !expires.IsZero() {
							t.Errorf("the key expires at %v, after requests %q; want none", expires, got)
						}
						continue
					}
					if over := expires.Sub(time.Now().Add(ttl)); over < 0 || over > time.Minute {
						t.Errorf("after %s: the key outlives its lease by %s, want 0 to 1m", time.Since(start), over)
					}
					if latest := resp.Secret.IssueTime.Add(3*time.Hour + time.Minute); expires.After(latest) {
						t.Errorf("after %s: the key expires at %s, want %s at the latest", time.Since(start), expires, latest)
					}
					if got := e.sent(); len(got) != 1 || !strings.HasPrefix(got[0], "POST /organization/projects/proj_sim/api_keys/key_") {
						t.Errorf("requests of a renewal: got %q, want one", got)
					}
				}
				time.Sleep(3 * time.Minute)
				if role["enforce_key_expiry"] == nil {
					if err := failure(e.lease(logical.RenewOperation, resp.Secret)); err == nil {
						t.Error("renewed past max_ttl")
					}
				}
			})
		})
	}
}

// TestRenewalRefused: what can't be renewed is an error, and the key keeps its expiry.
func TestRenewalRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		prepare func(*env)
		want    string
		inner   bool // not the caller's mistake
	}{
		"deleted role":   {func(e *env) { e.ok(logical.DeleteOperation, "roles/web", nil) }, `role "web"`, false},
		"no config":      {func(e *env) { e.ok(logical.DeleteOperation, "config", nil) }, "not configured", false},
		"expired key":    {func(e *env) { e.sim.Advance(2 * time.Hour) }, "Expired", false},
		"policy":         {func(e *env) { e.sim.SetMaxKeyLife(600) }, "ttl and max_ttl", false},
		"unreachable":    {func(e *env) { e.failing(openaisim.Fault{Kind: "refuse"}) }, "no answer from", true},
		"server error":   {func(e *env) { e.failing(openaisim.Fault{Status: 500}) }, "500", true},
		"storage":        {func(e *env) { e.storage.setFault(func(string, string) error { return errors.New("fault") }) }, "fault", true},
		"archived":       {func(e *env) { e.sim.ArchiveProject(openaisim.DefaultProject) }, "archived", false},
		"deleted at all": {func(e *env) { e.failing(openaisim.Fault{Status: 404}) }, "404", false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				secret := e.creds("web").Secret
				before := fmt.Sprint(e.sim.ProjectKeys(openaisim.DefaultProject))
				tt.prepare(e)
				resp, err := e.lease(logical.RenewOperation, secret)
				if failed := failure(resp, err); failed == nil || !strings.Contains(failed.Error(), tt.want) || (err != nil) != tt.inner {
					t.Errorf("got %v and error %v, want %q (inner: %v)", resp, err, tt.want, tt.inner)
				}
				if got := fmt.Sprint(e.sim.ProjectKeys(openaisim.DefaultProject)); got != before && name != "archived" {
					t.Errorf("keys: got %s, want %s", got, before)
				}
			})
		})
	}
}

// TestRevokeGone: what is gone already is revoked; what may still be there is not.
func TestRevokeGone(t *testing.T) {
	notFound := `{"error":{"message":"No such project","type":"invalid_request_error","code":"not_found"}}`
	for name, tt := range map[string]struct {
		prepare func(*env, string)
		want    string // of the error; empty: revoked
	}{
		"account deleted": {func(e *env, key string) {
			e.sim.Inject(openaisim.Fault{Method: "DELETE", Kind: "close", Process: true})
		}, ""},
		"project archived": {func(e *env, _ string) { e.sim.ArchiveProject(openaisim.DefaultProject) }, ""},
		"project deleted":  {func(e *env, _ string) { e.failing(openaisim.Fault{Status: 404, Body: notFound}) }, ""},
		"project forgotten": {func(e *env, _ string) {
			e.failing(openaisim.Fault{Method: "DELETE", Status: 400})
			e.failing(openaisim.Fault{Method: "GET", Status: 404, Body: notFound})
		}, ""},
		"project is active":     {func(e *env, _ string) { e.failing(openaisim.Fault{Method: "DELETE", Status: 400}) }, "400"},
		"no access":             {func(e *env, _ string) { e.failing(openaisim.Fault{Status: 403}) }, "403"},
		"404 of another server": {func(e *env, _ string) { e.failing(openaisim.Fault{Status: 404, Body: "<html>no such page"}) }, "404"},
		"mistyped endpoint": {func(e *env, _ string) {
			key, id := e.sim.AdminKey()
			e.ok(logical.UpdateOperation, "config", map[string]any{
				"api_endpoint": "https://api.openai.com/v2", "admin_api_key": key, "admin_api_key_id": id, "verify_connection": false,
			})
		}, "404"},
		"deletion not confirmed": {func(e *env, _ string) {
			e.failing(openaisim.Fault{Method: "DELETE", Status: 200, Body: `{"deleted":false}`})
		}, "lacks"},
		"no config": {func(e *env, _ string) { e.ok(logical.DeleteOperation, "config", nil) }, "not configured"},
	} {
		for _, existing := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, existing account %v", name, existing), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newConfiguredEnv(t)
					if existing {
						e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_id": e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")})
					}
					resp := e.creds("web")
					tt.prepare(e, resp.Data["api_key"].(string))
					err := failure(e.lease(logical.RevokeOperation, resp.Secret))
					if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
						t.Errorf("got error %v, want %q", err, tt.want)
					}
				})
			})
		}
	}
}

// TestOlderPlugin reads what the older plugin stored and revokes what it leased.
func TestOlderPlugin(t *testing.T) {
	for _, withID := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			e := newEnv(t)
			key, id := e.sim.AdminKey()
			stored := `{"admin_api_key":"` + key + `","admin_api_key_id":"` + id + `","api_endpoint":"https://api.openai.com/v1/","organization_id":"org-sim",` +
				`"last_rotated_time":"1999-12-31T12:00:00Z","rotation_schedule":"","rotation_window":0,"rotation_period":2592000000000000,` +
				`"disable_automated_rotation":false,"rotation_policy":""}`
			if !withID {
				stored = strings.Replace(stored, `"admin_api_key_id":"`+id+`",`, "", 1)
			}
			e.put("config", stored)
			e.put("roles/web", `{"project_id":"proj_sim","service_account_name_template":"vault-{{.RoleName}}-{{.RandomSuffix}}",`+
				`"service_account_description":"Service account created by Vault","ttl":7200000000000,"max_ttl":14400000000000}`)
			cfg := e.ok(logical.ReadOperation, "config", nil).Data
			for name, want := range map[string]string{
				"api_endpoint": "https://api.openai.com/v1", "organization_id": "org-sim", "last_rotated": "1999-12-31T12:00:00Z",
				"rotation_period": "2.592e+06", "next_rotation": "2000-01-30T12:00:00Z",
			} {
				if got := fmt.Sprint(cfg[name]); got != want {
					t.Errorf("config %s: got %s, want %s", name, got, want)
				}
			}
			e.wants(e.ok(logical.ReadOperation, "roles/web", nil), map[string]any{
				"project_id": "proj_sim", "service_account_name_template": "vault-{{.RoleName}}-{{.RandomSuffix}}",
				"service_account_description": "Service account created by Vault", "ttl": 7200, "max_ttl": 14400, "enforce_key_expiry": true,
				"scopes": []string{}, "service_account_role": "", "service_account_id": "",
			})
			resp := e.creds("web")
			old := &logical.Secret{InternalData: map[string]any{
				"secret_type": "openai_api_key", "api_key_id": resp.Data["api_key_id"], "service_account_id": resp.Data["service_account_id"], "project_id": "proj_sim",
			}}
			e.ok(logical.UpdateOperation, "config/rotate", nil)
			if err := failure(e.lease(logical.RenewOperation, old)); err == nil {
				t.Error("a lease without a role was renewed")
			}
			e.revoke(old)
			if got := e.sim.ServiceAccounts(openaisim.DefaultProject); len(got) != 0 {
				t.Errorf("accounts: got %v, want none", got)
			}
			if got := e.sim.AdminKeys(); len(got) != 1 || got[0].ID == id {
				t.Errorf("admin keys: got %v, want a new one", got)
			}
			for _, data := range []map[string]any{{"project_id": "proj_sim"}, {"project_id": "proj/../x", "service_account_id": "svc_acct_x"}, {"project_id": 1}} {
				data["secret_type"] = "openai_api_key"
				if err := failure(e.lease(logical.RevokeOperation, &logical.Secret{InternalData: data})); err == nil {
					t.Errorf("lease %v: revoked without an error", data)
				}
			}
		})
	}
}

// TestKeyLifePolicy: where OpenAI caps a key's life, the error says which fields to change.
func TestKeyLifePolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, scopes := range []string{"", "api.a.read"} {
			e := newConfiguredEnv(t)
			e.sim.SetMaxKeyLife(600)
			for _, role := range []map[string]any{
				{"scopes": scopes}, {"scopes": scopes, "enforce_key_expiry": false}, {"service_account_id": e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")},
			} {
				e.ok(logical.UpdateOperation, "roles/web", role)
				e.refused(logical.ReadOperation, "creds/web", nil, "expires_in_seconds", "600", "enforce_key_expiry", "ttl and max_ttl")
			}
			e.ok(logical.UpdateOperation, "roles/web", map[string]any{"enforce_key_expiry": true})
			e.ok(logical.ReadOperation, "creds/web", map[string]any{"ttl": 540})
			if got, wal := e.sim.ServiceAccounts(openaisim.DefaultProject), e.pending(); len(got) != 1 || len(wal) != 0 {
				t.Errorf("got accounts %v and write-ahead log %v, want the existing account only", got, wal)
			}
		}
	})
}

// TestConcurrent issues and revokes keys on an existing account and accounts of their own,
// while config and role are written and the admin key is rotated.
func TestConcurrent(t *testing.T) {
	e := newConfiguredEnv(t)
	account := e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")
	e.ok(logical.CreateOperation, "roles/app", map[string]any{"project_id": openaisim.DefaultProject, "service_account_id": account})
	var workers sync.WaitGroup
	for i := range 10 {
		workers.Go(func() {
			for range 10 {
				for _, role := range []string{"app", "web"} {
					resp, err := e.do(logical.ReadOperation, "creds/"+role, nil)
					if err := failure(resp, err); err != nil {
						t.Errorf("creds/%s: %v", role, err)
						return
					}
					if err := failure(e.lease(logical.RevokeOperation, resp.Secret)); err != nil {
						t.Errorf("revoke: %v", err)
					}
				}
			}
			path, data := "config/rotate", map[string]any(nil)
			if i%2 == 0 {
				path, data = "roles/app", map[string]any{"ttl": 3600 + i}
			}
			if resp, err := e.do(logical.UpdateOperation, path, data); failure(resp, err) != nil {
				t.Errorf("%s: %v", path, failure(resp, err))
			}
		})
	}
	workers.Wait()
	keys, accounts := e.sim.ProjectKeys(openaisim.DefaultProject), e.sim.ServiceAccounts(openaisim.DefaultProject)
	if len(keys) != 0 || len(accounts) != 1 || accounts[0].ID != account {
		t.Errorf("got keys %v and accounts %v, want the existing account only", keys, accounts)
	}
	if got := e.sim.AdminKeys(); len(got) != 1 || got[0].ID != e.config().AdminAPIKeyID {
		t.Errorf("admin keys: got %v, want config's only", got)
	}
}

// TestFailedCreds is about what a caller sees, and what is left at OpenAI and in the
// write-ahead log, when OpenAI fails a credential's creation.
func TestFailedCreds(t *testing.T) {
	const caller, inner = true, false // whose mistake it is
	header := func(name, value string) http.Header { return http.Header{name: {value}} }
	shouldRetry := header("X-Should-Retry", "true")
	for name, tt := range map[string]struct {
		fault    openaisim.Fault
		want     string // in the error; empty: a credential
		mistake  bool
		accounts int // left at OpenAI
		pending  int // entries left in the write-ahead log
		calls    int // 0: as many as time allows
		wait     time.Duration
	}{
		"refused connection, once": {openaisim.Fault{Kind: "refuse", Times: 1}, "", inner, 1, 0, 2, 0},
		"refused connection":       {openaisim.Fault{Kind: "refuse"}, "connection refused", inner, 0, 0, 4, 0},
		"closed":                   {openaisim.Fault{Kind: "close"}, "connection reset", inner, 0, 1, 1, 0},
		"closed after processing":  {openaisim.Fault{Kind: "close", Process: true}, "connection reset", inner, 1, 1, 1, 0},
		"hanging":                  {openaisim.Fault{Kind: "hang"}, "timed out", inner, 0, 1, 1, 25 * time.Second},
		"hanging after processing": {openaisim.Fault{Kind: "hang", Process: true}, "timed out", inner, 1, 1, 1, 25 * time.Second},
		"malformed":                {openaisim.Fault{Kind: "malformed", Process: true}, "not the JSON", inner, 1, 1, 1, 0},
		"empty":                    {openaisim.Fault{Status: 200, Body: "{}", Process: true}, "lacks", inner, 1, 1, 1, 0},
		"nothing":                  {openaisim.Fault{Status: 204, Body: " ", Process: true}, "not the JSON", inner, 1, 1, 1, 0},
		"no key":                   {openaisim.Fault{Status: 200, Body: `{"id":"svc_acct_1","api_key":null}`, Process: true}, "lacks", inner, 1, 1, 1, 0},
		"no value":                 {openaisim.Fault{Status: 200, Body: `{"id":"svc_acct_1","api_key":{"id":"key_1"}}`, Process: true}, "lacks", inner, 1, 1, 1, 0},
		"id not fit for a URL":     {openaisim.Fault{Status: 200, Body: `{"id":"a/../b","api_key":{"id":"key_1","value":"sk-x"}}`, Process: true}, "lacks", inner, 1, 1, 1, 0},
		"oversized":                {openaisim.Fault{Kind: "oversized", Process: true}, "1 MiB", inner, 1, 1, 1, 0},
		"redirecting":              {openaisim.Fault{Kind: "redirect"}, "redirects are not followed", inner, 0, 1, 1, 0},
		"server error":             {openaisim.Fault{Status: 500}, "500", inner, 0, 1, 1, 0},
		"500, a retry wanted":      {openaisim.Fault{Status: 500, Header: shouldRetry, Process: true}, "500", inner, 1, 1, 1, 0},
		"bad gateway":              {openaisim.Fault{Status: 502, Body: "<html>bad gateway", Process: true}, "502", inner, 1, 1, 1, 0},
		"time-out":                 {openaisim.Fault{Status: 408}, "408", inner, 0, 1, 1, 0},
		"conflict":                 {openaisim.Fault{Status: 409}, "409", inner, 0, 1, 1, 0},
		"bad request":              {openaisim.Fault{Status: 400}, "400", caller, 0, 0, 1, 0},
		"400, a retry wanted":      {openaisim.Fault{Status: 400, Header: shouldRetry}, "400", caller, 0, 0, 1, 0},
		"refused key":              {openaisim.Fault{Status: 401}, "401", inner, 0, 0, 1, 0},
		"forbidden":                {openaisim.Fault{Status: 403}, "403", caller, 0, 0, 1, 0},
		"no such project":          {openaisim.Fault{Status: 404}, "404", caller, 0, 0, 1, 0},
		"limited once":             {openaisim.Fault{Status: 429, Times: 1}, "", inner, 1, 0, 2, 0},
		"Retry-After":              {openaisim.Fault{Status: 429, Times: 1, Header: header("Retry-After", "7")}, "", inner, 1, 0, 2, 7 * time.Second},
		"Retry-After, fraction":    {openaisim.Fault{Status: 429, Times: 1, Header: header("Retry-After", "1.5")}, "", inner, 1, 0, 2, 1500 * time.Millisecond},
		"Retry-After-Ms":           {openaisim.Fault{Status: 429, Times: 1, Header: http.Header{"Retry-After-Ms": {"2500"}, "Retry-After": {"60"}}}, "", inner, 1, 0, 2, 2500 * time.Millisecond},
		"Retry-After, date":        {openaisim.Fault{Status: 429, Times: 1, Header: header("Retry-After", "Sat, 01 Jan 2000 00:00:20 GMT")}, "", inner, 1, 0, 2, 20 * time.Second},
		"Retry-After, past":        {openaisim.Fault{Status: 429, Times: 1, Header: header("Retry-After", "Fri, 31 Dec 1999 00:00:00 GMT")}, "", inner, 1, 0, 2, 0},
		"Retry-After, a day":       {openaisim.Fault{Status: 429, Times: 1, Header: header("Retry-After", "86400")}, "", inner, 1, 0, 2, time.Minute},
		"Retry-After, nonsense":    {openaisim.Fault{Status: 429, Times: 2, Header: header("Retry-After", "-Inf")}, "", inner, 1, 0, 3, 0},
		"limited, no retry wanted": {openaisim.Fault{Status: 429, Header: header("X-Should-Retry", "false")}, "429", inner, 0, 0, 1, 0},
		"limited without end":      {openaisim.Fault{Status: 429}, "429", inner, 0, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				tt.fault.Method, tt.fault.Times = "POST", cmp.Or(tt.fault.Times, -1)
				e.sim.Inject(tt.fault)
				e.sent()
				start := time.Now()
				resp, err := e.do(logical.ReadOperation, "creds/web", nil)
				failed := failure(resp, err)
				if tt.want == "" && (failed != nil || !e.sim.Use(resp.Data["api_key"].(string))) {
					t.Errorf("got error %v, or a key that is refused", failed)
				}
				if tt.want != "" {
					switch {
					case failed == nil:
						t.Fatalf("got a credential, want an error")
					case !strings.Contains(failed.Error(), tt.want) || resp.IsError() != tt.mistake:
						t.Errorf("got %v and error %v, want %q (the caller's mistake: %v)", resp, err, tt.want, tt.mistake)
					case tt.fault.Kind == "" && !strings.Contains(failed.Error(), "lacks") && !strings.Contains(failed.Error(), "request id req_"):
						t.Errorf("got %v, want a request id", failed)
					}
					e.noSecrets("an error", failed.Error())
				}
				if took := time.Since(start); took > 75*time.Second || took < tt.wait || tt.wait > 0 && took > tt.wait+time.Second {
					t.Errorf("took %s, want %s and at most 75s", took, tt.wait)
				}
				if got := len(e.sim.ServiceAccounts(openaisim.DefaultProject)); got != tt.accounts {
					t.Errorf("accounts at OpenAI: got %d, want %d", got, tt.accounts)
				}
				if got := len(e.pending()); got != tt.pending {
					t.Errorf("entries in the write-ahead log: got %d, want %d", got, tt.pending)
				}
				if got := e.sent(); tt.calls > 0 && len(got) != tt.calls {
					t.Errorf("requests: got %q, want %d", got, tt.calls)
				}
				// What is left goes by itself, and the next credential works.
				e.sim.ClearFaults()
				for range 4 {
					time.Sleep(time.Minute)
					e.tick()
				}
				want := 1
				if tt.want != "" {
					want = 0
				}
				if got := len(e.sim.ServiceAccounts(openaisim.DefaultProject)); got != want {
					t.Errorf("accounts after rollback: got %d, want %d", got, want)
				}
				e.creds("web")
			})
		})
	}
}

// TestScopedFaults fails each step of a scoped key: nothing stays, and an unrestricted key
// never exists.
func TestScopedFaults(t *testing.T) {
	for step := range 3 {
		for name, fault := range map[string]openaisim.Fault{
			"refused": {Status: 400}, "server error": {Status: 500}, "lost": {Kind: "close", Process: true}, "hanging": {Kind: "hang"}, "malformed": {Kind: "malformed", Process: true},
		} {
			t.Run(fmt.Sprintf("step %d %s", step+1, name), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newConfiguredEnv(t)
					e.ok(logical.UpdateOperation, "roles/web", map[string]any{"scopes": "api.a.read"})
					path := []string{"/service_accounts$", "/service_accounts/[^/]+$", "/api_keys$"}[step]
					e.failing(func() openaisim.Fault { fault.Method, fault.Path = "POST", path; return fault }())
					resp, err := e.do(logical.ReadOperation, "creds/web", nil)
					if failure(resp, err) == nil {
						t.Error("got a credential, want an error")
					}
					for _, k := range e.sim.ProjectKeys(openaisim.DefaultProject) {
						if !slices.Equal(k.Scopes, []string{"api.a.read"}) {
							t.Errorf("got a key with scopes %q", k.Scopes)
						}
					}
					accounts, pending := e.sim.ServiceAccounts(openaisim.DefaultProject), e.pending()
					if step > 0 && name != "hanging" && len(accounts)+len(pending) != 0 || len(accounts) > len(pending) {
						t.Errorf("got accounts %v and %d entries in the write-ahead log", accounts, len(pending))
					}
				})
			})
		}
	}
}

// TestMasking: whatever OpenAI says of a key shows it in no error, warning or log.
func TestMasking(t *testing.T) {
	const odd = "AdminKey/without+the:usual=form!" // not masked by its form
	for _, echo := range []string{
		"Incorrect API key provided: " + odd + ".", "key=" + odd + "&x", "sk-admin-simulated-abc", "'sk-proj-simulated'\r\nsk-x", strings.Repeat("a", 499) + odd,
	} {
		body, _ := json.Marshal(map[string]any{"error": map[string]any{"message": echo, "type": echo, "code": echo, "param": echo}})
		e := newConfiguredEnv(t)
		lease := e.creds("web").Secret
		e.put("config", `{"admin_api_key":"`+odd+`","admin_api_key_id":"key_x","organization_id":"org-sim","api_endpoint":"https://api.openai.com/v1"}`)
		e.restart()
		e.failing(openaisim.Fault{Status: 400, Body: string(body), Header: http.Header{"X-Request-Id": {echo}}})
		var texts []string
		for _, do := range []func() (*logical.Response, error){
			func() (*logical.Response, error) { return e.do(logical.UpdateOperation, "config", nil) },
			func() (*logical.Response, error) { return e.do(logical.UpdateOperation, "config/rotate", nil) },
			func() (*logical.Response, error) { return e.do(logical.UpdateOperation, "roles/web", nil) },
			func() (*logical.Response, error) { return e.do(logical.ReadOperation, "creds/web", nil) },
			func() (*logical.Response, error) { return e.lease(logical.RenewOperation, lease) },
			func() (*logical.Response, error) { return e.lease(logical.RevokeOperation, lease) },
		} {
			resp, err := do()
			failed := failure(resp, err)
			if failed == nil {
				t.Fatalf("got %v, want an error", resp)
			}
			texts = append(texts, failed.Error())
		}
		texts = append(texts, e.log.String())
		for _, text := range texts {
			if strings.Contains(text, odd) || strings.Contains(text, odd[:20]) || strings.ContainsAny(strings.TrimSuffix(text, "\n"), "\r\x00") {
				t.Errorf("OpenAI's %q shows in %q", echo, text)
			}
			e.noSecrets("an error", text)
		}
	}
}

// TestRealServer is about the transport: connections are used again, redirects are not
// followed, and an answer that does not end is cut.
func TestRealServer(t *testing.T) {
	e := newEnv(t)
	var opened, followed atomic.Int64
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { followed.Add(1) }))
	defer elsewhere.Close()
	var mode atomic.Value
	mode.Store("")
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch mode.Load() {
		case "redirect":
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		case "endless":
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		default:
			e.sim.ServeHTTP(w, r)
		}
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.Add(1)
		}
	}
	server.Start()
	defer server.Close()
	transport := newTransport()
	defer transport.CloseIdleConnections()
	e.wire.RoundTripper = transport
	e.configure(map[string]any{"api_endpoint": server.URL + "/v1"})
	e.ok(logical.CreateOperation, "roles/web", map[string]any{"project_id": openaisim.DefaultProject})
	for range 20 {
		e.revoke(e.creds("web").Secret)
	}
	if got := opened.Load(); got != 1 {
		t.Errorf("connections for 42 calls in a row: got %d, want 1", got)
	}
	var workers sync.WaitGroup
	for range 16 {
		workers.Go(func() {
			for range 10 {
				if resp, err := e.do(logical.ReadOperation, "creds/web", nil); failure(resp, err) != nil {
					t.Error(failure(resp, err))
				}
			}
		})
	}
	workers.Wait()
	// A call that gets another's connection, while its own is opened, leaves that to later ones.
	if got := opened.Load(); got > 1+2*16 {
		t.Errorf("connections for 160 calls, 16 at once: got %d, want about 16", got)
	}
	for _, tt := range []struct{ mode, want string }{{"redirect", "redirects are not followed"}, {"endless", "larger than 1 MiB"}} {
		mode.Store(tt.mode)
		resp, err := e.do(logical.ReadOperation, "creds/web", nil)
		if failed := failure(resp, err); failed == nil || !strings.Contains(failed.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.mode, failed, tt.want)
		}
	}
	if got := followed.Load(); got != 0 {
		t.Errorf("requests to where the redirect points: got %d, want 0", got)
	}
}

// TestOtherNode: another node has rotated the admin key. This one goes on with the new key:
// from storage, once, when OpenAI refuses the old one, or at once when Vault tells it.
func TestOtherNode(t *testing.T) {
	for _, told := range []bool{false, true} {
		for name, do := range map[string]func(*env, *logical.Secret) error{
			"issue":  func(e *env, _ *logical.Secret) error { return failure(e.do(logical.ReadOperation, "creds/web", nil)) },
			"renew":  func(e *env, s *logical.Secret) error { return failure(e.lease(logical.RenewOperation, s)) },
			"revoke": func(e *env, s *logical.Secret) error { return failure(e.lease(logical.RevokeOperation, s)) },
			"role":   func(e *env, _ *logical.Secret) error { return failure(e.do(logical.UpdateOperation, "roles/web", nil)) },
		} {
			e := newConfiguredEnv(t)
			secret := e.creds("web").Secret
			other := *e
			other.restart()
			other.ok(logical.UpdateOperation, "config/rotate", nil)
			want := 2
			if told {
				e.b.Backend.Invalidate(context.Background(), "config")
				want = 1
			}
			e.sent()
			if err := do(e, secret); err != nil {
				t.Errorf("%s, told: %v: %v", name, told, err)
			}
			if got := e.sent(); len(got) != want {
				t.Errorf("%s, told: %v: got requests %q, want %d", name, told, got, want)
			}

			// The key is refused although nobody has rotated it.
			e.failing(openaisim.Fault{Status: 401})
			if err := do(e, secret); err == nil || !strings.Contains(err.Error(), "401") {
				t.Errorf("%s, refused key: got %v, want 401", name, err)
			}
			if got := e.sent(); len(got) != 1 {
				t.Errorf("%s, refused key: got requests %q, want 1", name, got)
			}
		}
	}
}

// TestRoleCache: reads of credentials share what one of them has read of a role, and see each
// change of it at once, wherever that was made.
func TestRoleCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		reads := 0
		e.storage.setFault(func(verb, key string) error {
			if verb == "get" && key == "roles/web" {
				reads++
			}
			return nil
		})
		expect := func(when string, ttl time.Duration, wantReads int) {
			t.Helper()
			reads = 0
			if got := e.creds("web").Secret.TTL; got != ttl || reads != wantReads {
				t.Errorf("%s: got ttl %s and %d reads of the role, want %s and %d", when, got, reads, ttl, wantReads)
			}
		}
		expect("first", time.Hour, 1)
		expect("second", time.Hour, 0)
		e.ok(logical.UpdateOperation, "roles/web", map[string]any{"ttl": "2h"})
		expect("written", 2*time.Hour, 1)
		e.ok(logical.DeleteOperation, "roles/web", nil)
		e.refused(logical.ReadOperation, "creds/web", nil, "does not exist")
		e.ok(logical.CreateOperation, "roles/web", map[string]any{"project_id": openaisim.DefaultProject})
		expect("made again", time.Hour, 1)

		other := *e // another node
		other.restart()
		other.ok(logical.UpdateOperation, "roles/web", map[string]any{"ttl": "3h"})
		e.b.Backend.Invalidate(t.Context(), "roles/web")
		expect("told by Vault", 3*time.Hour, 1)

		e.system.MaxLeaseTTLVal = 0 // as when it can't be read
		time.Sleep(roleCacheTime + time.Second)
		expect("without the mount's maximum", 3*time.Hour, 1)
		e.system.MaxLeaseTTLVal = 90 * time.Minute
		expect("mount tuned", 90*time.Minute, 1)
		expect("mount tuned, second", 90*time.Minute, 0)

		// A change while the role is read: what was read before it must not stay.
		e.b.forgetRoles()
		changed := false
		e.storage.Storage = &hooks{Storage: e.storage.Storage, afterGet: func(key string) {
			if key == "roles/web" && !changed {
				changed = true
				e.ok(logical.UpdateOperation, "roles/web", map[string]any{"ttl": "4m"})
			}
		}}
		expect("before a change", 90*time.Minute, 2) // one is the change's
		expect("changed meanwhile", 4*time.Minute, 1)
	})
}

// hooks is storage with functions around its operations, where set.
type hooks struct {
	logical.Storage
	afterGet, beforePut, afterPut func(key string)
	beforeDelete                  func(ctx context.Context, key string) error
}

func (h *hooks) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	entry, err := h.Storage.Get(ctx, key)
	if h.afterGet != nil {
		h.afterGet(key)
	}
	return entry, err
}

func (h *hooks) Put(ctx context.Context, entry *logical.StorageEntry) error {
	if h.beforePut != nil {
		h.beforePut(entry.Key)
	}
	err := h.Storage.Put(ctx, entry)
	if h.afterPut != nil {
		h.afterPut(entry.Key)
	}
	return err
}

func (h *hooks) Delete(ctx context.Context, key string) error {
	if h.beforeDelete != nil {
		if err := h.beforeDelete(ctx, key); err != nil {
			return err
		}
	}
	return h.Storage.Delete(ctx, key)
}

// TestLog: one line at info for each change of state, credentials and reads at debug.
func TestLog(t *testing.T) {
	e := newConfiguredEnv(t)
	e.ok(logical.ReadOperation, "config", nil)
	e.ok(logical.ReadOperation, "roles/web", nil)
	e.ok(logical.ListOperation, "roles", nil)
	resp := e.creds("web")
	e.renew(resp.Secret)
	e.revoke(resp.Secret)
	e.ok(logical.UpdateOperation, "config/rotate", nil)
	e.refused(logical.ReadOperation, "creds/web", map[string]any{"ttl": 0})
	e.failing(openaisim.Fault{Status: 401})
	if _, err := e.do(logical.UpdateOperation, "config/rotate", nil); err == nil {
		t.Error("rotation with a refused key: got no error")
	}
	e.ok(logical.DeleteOperation, "roles/web", nil)
	e.ok(logical.ReadOperation, "metrics", nil)
	e.ok(logical.DeleteOperation, "config", nil)
	var got []string
	line := regexp.MustCompile(`^\S+ \[([A-Z]+)\] +((?:failed: )?.*?): (.*)$`)
	for text := range strings.Lines(e.log.String()) {
		m := line.FindStringSubmatch(strings.TrimSpace(text))
		if m == nil {
			t.Fatalf("line %q of the log", text)
		}
		got = append(got, m[1]+" "+m[2])
		if strings.Contains(m[2], "credential") && !strings.Contains(m[2], "failed") {
			for _, name := range []string{"name=web", "project_id=proj_sim", "service_account_id=" + resp.Data["service_account_id"].(string), "api_key_id=key_", "mount=openai/", "duration="} {
				if !strings.Contains(m[3], name) {
					t.Errorf("%q lacks %s", text, name)
				}
			}
		}
	}
	want := []string{
		"INFO config written", "INFO role written", "DEBUG credential issued", "DEBUG credential renewed", "DEBUG credential revoked",
		"INFO admin API key rotated", "WARN failed: credential issued", "WARN failed: admin API key rotated", "INFO role deleted", "INFO config deleted",
	}
	if !slices.Equal(got, want) {
		t.Errorf("log:\n got %q\nwant %q", got, want)
	}
}

// recorder takes Vault's observations and events, by type.
type recorder struct {
	observations map[string]map[string]any
	events       map[string]map[string]any
}

func (r *recorder) RecordObservationFromPlugin(_ context.Context, name string, data map[string]any) error {
	r.observations[name] = data
	return nil
}

func (r *recorder) SendEvent(_ context.Context, name logical.EventType, event *logical.EventData) error {
	r.events[string(name)] = event.Metadata.AsMap()
	return nil
}

// TestReported: Vault Enterprise gets an observation and an event of each change, with ids and
// without secrets; the community edition, which would drop them, gets none.
func TestReported(t *testing.T) {
	for metadata, want := range map[string]bool{"": false, "ent": true, "ent.hsm.fips1403": true, "error": true} {
		e := newEnv(t)
		r := &recorder{map[string]map[string]any{}, map[string]map[string]any{}}
		e.system.PluginEnvironment = &logical.PluginEnvironment{VaultVersionMetadata: metadata}
		system := logical.SystemView(testSystem{e.system})
		if metadata == "error" {
			system = failingSystem{testSystem{e.system}}
		}
		err := e.b.Setup(t.Context(), &logical.BackendConfig{
			Logger: e.b.Logger(), System: system, StorageView: e.storage, ObservationRecorder: r, EventsSender: r,
		})
		if err != nil {
			t.Fatal(err)
		}
		e.configure(nil)
		e.ok(logical.CreateOperation, "roles/web", map[string]any{"project_id": openaisim.DefaultProject})
		resp := e.creds("web")
		e.renew(resp.Secret)
		e.revoke(resp.Secret)
		e.ok(logical.UpdateOperation, "config/rotate", nil)
		failed := e.creds("web")
		e.failing(openaisim.Fault{Status: 401})
		for _, err := range []error{
			failure(e.do(logical.ReadOperation, "creds/web", nil)), failure(e.do(logical.UpdateOperation, "config/rotate", nil)),
			failure(e.lease(logical.RenewOperation, failed.Secret)), failure(e.lease(logical.RevokeOperation, failed.Secret)),
		} {
			if err == nil {
				t.Error("got success from a key that is refused")
			}
		}
		e.ok(logical.DeleteOperation, "roles/web", nil)
		e.ok(logical.DeleteOperation, "config", nil)
		if !want {
			if len(r.observations)+len(r.events) != 0 {
				t.Errorf("metadata %q: got %v and %v, want no observations and events", metadata, r.observations, r.events)
			}
			continue
		}
		readme, err := os.ReadFile("README.md")
		if err != nil {
			t.Fatal(err)
		}
		for name, data := range r.observations {
			if !strings.Contains(string(readme), "`"+name+"`") {
				t.Errorf("README lacks observation %s", name)
			}
			for field, value := range data {
				if _, plain := value.(string); !plain {
					t.Errorf("%s: %s is %T, want a string", name, field, value)
				}
			}
		}
		if got := slices.Sorted(maps.Keys(r.observations)); len(got) != 12 {
			t.Errorf("observations: got %q, want 12", got)
		}
		for name, data := range r.events {
			if !strings.Contains(string(readme), "`"+strings.TrimSuffix(name, "-fail")+"`") {
				t.Errorf("README lacks event %s", name)
			}
			if got := data["modified"] == "true"; got == strings.HasSuffix(name, "-fail") {
				t.Errorf("%s: got modified %v", name, got)
			}
			if name != "openai/"+data["operation"].(string) || data["path"] == "" {
				t.Errorf("%s: got operation %v and path %v", name, data["operation"], data["path"])
			}
		}
		if got := slices.Sorted(maps.Keys(r.events)); len(got) != 12 {
			t.Errorf("events: got %q, want 12", got)
		}
		if got := r.events["openai/creds-create"]["service_account_id"]; got != failed.Data["service_account_id"] {
			t.Errorf("the event of a credential: got account %v, want %v", got, failed.Data["service_account_id"])
		}
		if got := r.observations["openai/credential/create/fail"]["error"]; !strings.Contains(fmt.Sprint(got), "401") {
			t.Errorf("the observation of a failure: got error %v, want OpenAI's", got)
		}
		e.noSecrets("an observation or an event", fmt.Sprint(r.observations, r.events))
	}
}

// failingSystem can't tell what Vault it is.
type failingSystem struct{ testSystem }

func (failingSystem) PluginEnv(context.Context) (*logical.PluginEnvironment, error) {
	return nil, errors.New("no answer")
}

// series reads the metrics in both formats, checks the text's form and that both say the
// same, and returns the values by name and labels.
func (e *env) series() map[string]float64 {
	e.t.Helper()
	resp := e.ok(logical.ReadOperation, "metrics", map[string]any{"format": "prometheus"})
	if got, want := resp.Data[logical.HTTPContentType], "text/plain; version=0.0.4; charset=utf-8"; got != want || resp.Data[logical.HTTPStatusCode] != 200 {
		e.t.Errorf("got status %v and content type %v, want 200 and %s", resp.Data[logical.HTTPStatusCode], got, want)
	}
	text := string(resp.Data[logical.HTTPRawBody].([]byte))
	sample := regexp.MustCompile(`^([a-z_]+)(?:\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\})? ([0-9.]+)$`)
	all, seen := map[string]float64{}, map[string]bool{}
	family, kind := "", ""
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines)-1; i++ {
		if name, ok := strings.CutPrefix(lines[i], "# HELP "); ok {
			name, help, _ := strings.Cut(name, " ")
			wantType := "# TYPE " + name + " "
			if help == "" || seen[name] || !strings.HasPrefix(lines[i+1], wantType) || !strings.HasPrefix(name, metricPrefix) {
				e.t.Errorf("family %q: no help, no type, twice, or without prefix", name)
			}
			seen[name], family, kind = true, name, strings.TrimPrefix(lines[i+1], wantType)
			if (kind == "counter") != strings.HasSuffix(name, "_total") {
				e.t.Errorf("%s is a %s", name, kind)
			}
			i++
			continue
		}
		m := sample.FindStringSubmatch(lines[i])
		if m == nil {
			e.t.Fatalf("line %q", lines[i])
		}
		id := m[1]
		if m[2] != "" {
			id += "{" + m[2] + "}"
		}
		value, err := strconv.ParseFloat(m[3], 64)
		if _, twice := all[id]; twice || err != nil {
			e.t.Errorf("%s: twice, or %v", id, err)
		}
		all[id] = value
		suffix := strings.TrimPrefix(m[1], family)
		if suffix != "" && (kind != "histogram" || suffix != "_bucket" && suffix != "_sum" && suffix != "_count") {
			e.t.Errorf("%s is among %s, a %s", id, family, kind)
		}
	}
	if lines[len(lines)-1] != "" {
		e.t.Error("the last line does not end")
	}

	data := map[string]float64{}
	for name, value := range e.ok(logical.ReadOperation, "metrics", nil).Data {
		switch value := value.(type) {
		case float64:
			data[name] = value
		case map[string]float64:
			for labels, v := range value {
				data[name+"{"+labels+"}"] = v
			}
		default:
			e.t.Errorf("%s is a %T", name, value)
		}
	}
	for id, value := range all {
		if v, ok := data[id]; !ok || v != value {
			e.t.Errorf("%s: as data %v, want %v as in the text", id, v, value)
		}
		delete(data, id)
	}
	if len(data) != 0 {
		e.t.Errorf("the text lacks %v", data)
	}
	return all
}

// checkBuckets checks a histogram's buckets in Prometheus' text: they are in order, each
// counts what those before it do, and the last one counts all.
func checkBuckets(t *testing.T, text string) {
	t.Helper()
	var bound, count float64
	for _, m := range regexp.MustCompile(`(?m)^(.*)_bucket\{(.*),le="(.*)"\} (.*)$`).FindAllStringSubmatch(text, -1) {
		b, _ := strconv.ParseFloat(m[3], 64)
		c, _ := strconv.ParseFloat(m[4], 64)
		if b <= bound || c < count {
			t.Errorf("%s: bucket %v with %v after %v with %v", m[2], b, c, bound, count)
		}
		bound, count = b, c
		if math.IsInf(b, 1) {
			if all := m[1] + "_count{" + m[2] + "} " + m[4] + "\n"; !strings.Contains(text, all) {
				t.Errorf("there is no %q", all)
			}
			bound, count = 0, 0
		}
	}
}

// TestMetricsCount: after issuing 3, revoking 2 and one provoked error exactly these numbers
// come out.
func TestMetricsCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.sim.SetLatency(200 * time.Millisecond)
		e.configure(nil)
		e.ok(logical.CreateOperation, "roles/web", map[string]any{"project_id": openaisim.DefaultProject})
		for i := range 3 {
			if resp := e.creds("web"); i > 0 {
				e.revoke(resp.Secret)
			}
		}
		e.sim.Inject(openaisim.Fault{Method: "POST"})
		if _, err := e.do(logical.ReadOperation, "creds/web", nil); err == nil {
			t.Error("got a credential, want an error")
		}
		e.refused(logical.ReadOperation, "metrics", map[string]any{"format": "json"}, "format")
		want := map[string]float64{
			`credential_operations_total{role="web",operation="issue",result="success"}`:  3,
			`credential_operations_total{role="web",operation="issue",result="failure"}`:  1,
			`credential_operations_total{role="web",operation="revoke",result="success"}`: 2,
			`revocations_handed_over_total`:                                               0,
			`api_requests_total{operation="get_admin_api_key",status="200"}`:              1,
			`api_requests_total{operation="get_project",status="200"}`:                    1,
			`api_requests_total{operation="create_service_account",status="200"}`:         3,
			`api_requests_total{operation="create_service_account",status="500"}`:         1,
			`api_requests_total{operation="delete_service_account",status="200"}`:         2,
			`api_rate_limit_wait_seconds_total`:                                           0,
			`cleanups_pending`:                                                            0,
			`admin_key_last_rotation_timestamp_seconds`:                                   946684800,
			`admin_keys_pending_deletion`:                                                 0,
			`build_info{version="",goversion="` + runtime.Version() + `"}`:                1,
		}
		for _, labels := range []string{
			`cleanups_total{`, `rollbacks_total{kind="credential",`, `rollbacks_total{kind="issued_credential",`, `rollbacks_total{kind="admin_api_key",`,
			`rotations_total{trigger="manual",`, `rotations_total{trigger="plugin",`, `rotations_total{trigger="vault",`,
		} {
			want[labels+`result="success"}`], want[labels+`result="failure"}`] = 0, 0
		}
		for operation, calls := range map[string]float64{"get_admin_api_key": 1, "get_project": 1, "create_service_account": 4, "delete_service_account": 2} {
			label := `{operation="` + operation + `"`
			want["api_request_duration_seconds_count"+label+"}"] = calls
			want["api_request_duration_seconds_sum"+label+"}"] = calls / 5
			for _, bound := range []string{"0.25", "0.5", "1", "2.5", "5", "10", "25", "+Inf"} {
				want["api_request_duration_seconds_bucket"+label+`,le="`+bound+`"}`] = calls
			}
		}
		got := e.series()
		for id, value := range want {
			if v, ok := got[metricPrefix+id]; !ok || math.Abs(v-value) > 1e-6 {
				t.Errorf("%s: got %v, want %v", id, v, value)
			}
			delete(got, metricPrefix+id)
		}
		for id, value := range got {
			if !strings.Contains(id, `le="0.`) || value != 0 {
				t.Errorf("besides these: %s %v", id, value)
			}
		}
		resp := e.ok(logical.ReadOperation, "metrics", map[string]any{"format": "prometheus"})
		checkBuckets(t, string(resp.Data[logical.HTTPRawBody].([]byte)))
	})
}

// TestMetricFamilies sees each series of each family move, on success and on failure, and
// no other result with it.
func TestMetricFamilies(t *testing.T) {
	read := func(path string) func(*env) {
		return func(e *env) { _, _ = e.do(logical.ReadOperation, path, nil) }
	}
	update := func(path string, data map[string]any) func(*env) {
		return func(e *env) { _, _ = e.do(logical.UpdateOperation, path, data) }
	}
	lease := func(op logical.Operation, times int) func(*env) {
		return func(e *env) {
			for range times {
				_, _ = e.lease(op, e.secret)
			}
		}
	}
	fails := openaisim.Fault{Status: 500}
	leave := func(e *env) { // an account whose fate is unknown, and a revocation that failed
		e.sim.Inject(openaisim.Fault{Method: "POST", Kind: "close", Process: true})
		_, _ = e.do(logical.ReadOperation, "creds/web", nil)
		e.failing(openaisim.Fault{Method: "DELETE"})
		_, _ = e.lease(logical.RevokeOperation, e.secret)
		e.sim.ClearFaults()
		time.Sleep(3 * time.Minute)
	}
	leaveKey := func(e *env) { // a new admin key whose fate is unknown
		e.sim.Inject(openaisim.Fault{Method: "POST", Kind: "close", Process: true})
		_, _ = e.do(logical.UpdateOperation, "config/rotate", nil)
		time.Sleep(3 * time.Minute)
	}
	schedule := func(e *env) {
		e.ok(logical.UpdateOperation, "config", map[string]any{"rotation_period": 3600})
		time.Sleep(time.Hour)
	}
	nothing := func(*env) {}
	tests := []struct {
		series  string // without prefix
		prepare func(*env)
		fault   *openaisim.Fault // that do meets
		do      func(*env)
		want    float64 // how far it moves
	}{
		{`credential_operations_total{role="web",operation="issue",result="success"}`, nothing, nil, read("creds/web"), 1},
		{`credential_operations_total{role="web",operation="issue",result="failure"}`, nothing, &fails, read("creds/web"), 1},
		{`credential_operations_total{role="web",operation="renew",result="success"}`, nothing, nil, lease(logical.RenewOperation, 1), 1},
		{`credential_operations_total{role="web",operation="renew",result="failure"}`, nothing, &fails, lease(logical.RenewOperation, 1), 1},
		{`credential_operations_total{role="web",operation="revoke",result="success"}`, nothing, nil, lease(logical.RevokeOperation, 1), 1},
		{`credential_operations_total{role="web",operation="revoke",result="failure"}`, nothing, &fails, lease(logical.RevokeOperation, 1), 1},
		{`revocations_handed_over_total`, nothing, &fails, lease(logical.RevokeOperation, 5), 1},
		{`api_requests_total{operation="create_service_account",status="200"}`, nothing, nil, read("creds/web"), 1},
		{`api_requests_total{operation="create_service_account",status="500"}`, nothing, &fails, read("creds/web"), 1},
		{`api_requests_total{operation="create_service_account",status="error"}`, nothing, &openaisim.Fault{Kind: "close"}, read("creds/web"), 1},
		{`api_request_duration_seconds_count{operation="delete_service_account"}`, nothing, nil, lease(logical.RevokeOperation, 1), 1},
		{`api_request_duration_seconds_sum{operation="delete_service_account"}`, func(e *env) { e.sim.SetLatency(2 * time.Second) }, nil, lease(logical.RevokeOperation, 1), 2},
		{`api_request_duration_seconds_bucket{operation="create_service_account",le="+Inf"}`, nothing, &openaisim.Fault{Kind: "hang"}, read("creds/web"), 1},
		{`api_retries_total{reason="500"}`, nothing, &openaisim.Fault{Times: 2}, lease(logical.RevokeOperation, 1), 2},
		{`api_retries_total{reason="connection"}`, nothing, &openaisim.Fault{Kind: "refuse", Times: 1}, read("creds/web"), 1},
		{`api_retries_total{reason="429"}`, nothing, &openaisim.Fault{Status: 429, Times: 1}, read("creds/web"), 1},
		{`api_rate_limit_wait_seconds_total`, nothing, &openaisim.Fault{Status: 429, Times: 1, Header: http.Header{"Retry-After": {"7"}}}, read("creds/web"), 7},
		{`rotations_total{trigger="manual",result="success"}`, nothing, nil, update("config/rotate", nil), 1},
		{`rotations_total{trigger="manual",result="failure"}`, nothing, &fails, update("config/rotate", nil), 1},
		{`rotations_total{trigger="plugin",result="success"}`, schedule, nil, (*env).tick, 1},
		{`rotations_total{trigger="plugin",result="failure"}`, schedule, &fails, (*env).tick, 1},
		{`rollbacks_total{kind="credential",result="success"}`, leave, nil, (*env).tick, 1},
		{`rollbacks_total{kind="credential",result="failure"}`, leave, &openaisim.Fault{Status: 403}, (*env).tick, 1},
		{`rollbacks_total{kind="admin_api_key",result="success"}`, leaveKey, nil, (*env).tick, 1},
		{`rollbacks_total{kind="admin_api_key",result="failure"}`, leaveKey, &openaisim.Fault{Status: 403}, (*env).tick, 1},
		{`cleanups_total{result="success"}`, leave, nil, (*env).tick, 1},
		{`cleanups_total{result="failure"}`, leave, &openaisim.Fault{Status: 403}, (*env).tick, 1},
		{`cleanups_pending`, nothing, &fails, lease(logical.RevokeOperation, 1), 1},
		{`cleanups_pending`, leave, nil, (*env).tick, -1},
		{`admin_key_last_rotation_timestamp_seconds`, func(*env) { time.Sleep(time.Hour) }, nil, update("config/rotate", nil), 3600},
		{`admin_key_last_rotation_timestamp_seconds`, func(*env) { time.Sleep(time.Hour) }, &fails, update("config/rotate", nil), 0},
		{`admin_key_next_rotation_timestamp_seconds`, nothing, nil, update("config", map[string]any{"rotation_period": 3600}), 946684800 + 3600},
		{`admin_key_expiry_timestamp_seconds`, func(e *env) {
			e.ok(logical.UpdateOperation, "config", map[string]any{"rotation_period": 3600, "admin_key_ttl": 7200})
		}, nil, update("config/rotate", nil), 946684800 + 7200},
		{`admin_keys_pending_deletion`, nothing, &openaisim.Fault{Method: "DELETE", Status: 403}, update("config/rotate", nil), 1},
		{`build_info{version="",goversion="` + runtime.Version() + `"}`, nothing, nil, func(*env) {}, 0},
		{`credential_operations_total{role="a\"b\\c\nd",operation="revoke",result="success"}`, func(e *env) { e.secret.InternalData["role"] = "a\"b\\c\nd" }, nil, lease(logical.RevokeOperation, 1), 1},
	}
	tested := map[string]bool{}
	for _, tt := range tests {
		name, _, _ := strings.Cut(tt.series, "{")
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			name = strings.TrimSuffix(name, suffix)
		}
		tested[name] = true
		t.Run(tt.series, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				e.secret = e.creds("web").Secret
				tt.prepare(e)
				before := e.series()
				if f := tt.fault; f != nil {
					fault := *f
					fault.Times = cmp.Or(f.Times, -1)
					e.sim.Inject(fault)
				}
				tt.do(e)
				after := e.series()
				if _, ok := after[metricPrefix+tt.series]; !ok {
					t.Errorf("there is no such series in %v", after)
				}
				if got := after[metricPrefix+tt.series] - before[metricPrefix+tt.series]; math.Abs(got-tt.want) > 1e-6 {
					t.Errorf("moved by %v, want %v", got, tt.want)
				}
				opposite := strings.NewReplacer(`"success"`, `"failure"`, `"failure"`, `"success"`).Replace(tt.series)
				if got := after[metricPrefix+opposite] - before[metricPrefix+opposite]; opposite != tt.series && got != 0 {
					t.Errorf("%s moved too, by %v", opposite, got)
				}
			})
		})
	}
	for _, f := range families {
		if !tested[f.name] {
			t.Errorf("no test sees %s move", f.name)
		}
	}
}

// TestMetricsBound: however many roles there are, the metrics take bounded memory and lose
// no count.
func TestMetricsBound(t *testing.T) {
	e := newEnv(t)
	const roles, workers = 8000, 4
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for i := range roles {
				e.b.metrics.add(metricCredentials, 1, "role", fmt.Sprint("r", i), "operation", "issue", "result", "success")
			}
		})
	}
	group.Wait()
	count, sum := 0, 0.0
	for id, value := range e.series() {
		if strings.Contains(id, metricCredentials) {
			count, sum = count+1, sum+value
		}
	}
	if count > maxSeries+workers || sum != roles*workers {
		t.Errorf("got %d series with a sum of %v, want at most %d and %d", count, sum, maxSeries, roles*workers)
	}
}

// FuzzAnswer gives OpenAI's answers: nothing panics, no error shows a key, and what is handed
// out is a key with ids that can go into a URL.
func FuzzAnswer(f *testing.F) {
	for _, body := range []string{
		``, `null`, `{}`, `[]`, `"`, `{"id":"svc_acct_1","name":"n","role":"member","api_key":{"id":"key_1","value":"sk-svcacct-simulated","expires_at":1e300}}`,
		`{"id":"svc_acct_1","api_key":{"id":"../x","value":"sk-x"}}`, `{"id":"proj_sim","status":"archived"}`, `{"deleted":true}`,
		`{"data":[{"id":"key_1","redacted_value":"sk-admin...abc"}],"has_more":true,"last_id":"key_1"}`, `{"data":null,"has_more":true}`,
		`{"error":{"message":"Incorrect API key provided: sk-admin-simulated-abc","type":"x","code":1,"param":{}}}`, `{"error":{"message":"sk-\u0000sk-","type":"\n"}}`,
	} {
		for _, status := range []int{200, 204, 307, 400, 401, 404, 429, 500} {
			f.Add(status, body, "5", "true")
		}
	}
	f.Fuzz(func(t *testing.T, status int, body, retryAfter, shouldRetry string) {
		if status < 200 || status > 599 {
			return
		}
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			lease := e.creds("web").Secret
			e.wire.RoundTripper = roundTripper(func(req *http.Request) (*http.Response, error) {
				return &http.Response{
					StatusCode: status, Body: io.NopCloser(strings.NewReader(body)), Request: req,
					Header: http.Header{"Retry-After": {retryAfter}, "X-Should-Retry": {shouldRetry}, "X-Request-Id": {shouldRetry}},
				}, nil
			})
			for _, r := range []struct {
				op   logical.Operation
				path string
			}{{logical.UpdateOperation, "config"}, {logical.UpdateOperation, "roles/web"}, {logical.UpdateOperation, "config/rotate"}, {logical.ReadOperation, "creds/web"}} {
				start := time.Now()
				resp, err := e.do(r.op, r.path, map[string]any{"ttl": "1h"})
				if failed := failure(resp, err); failed != nil {
					e.noSecrets("an error", failed.Error())
				} else if r.path == "creds/web" && (!validID(resp.Data["api_key_id"].(string)) || !validID(resp.Data["service_account_id"].(string)) || resp.Data["api_key"] == "") {
					t.Errorf("handed out %v", resp.Data["api_key_id"])
				}
				if took := time.Since(start); took > 75*time.Second {
					t.Errorf("%s took %s", r.path, took)
				}
			}
			for _, op := range []logical.Operation{logical.RenewOperation, logical.RevokeOperation} {
				if failed := failure(e.lease(op, lease)); failed != nil {
					e.noSecrets("an error", failed.Error())
				}
			}
			e.tick()
		})
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (r roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return r(req) }

// FuzzNameTemplate writes a role with a template: it is refused, or gives names that are
// valid and never the same, in bounded time and memory.
func FuzzNameTemplate(f *testing.F) {
	for _, template := range []string{
		defaultNameTemplate, "", "{{", "{{.DisplayName | truncate 5}}{{random 12}}", "{{uuid}}", multiplied, "{{range 9}}{{end}}", "{{printf \"%99d\" 1}}",
		"{{with $x := .RandomSuffix}}{{$x}}{{else}}{{end}}", "{{timestamp \"2006\" | base64 | base64}}{{.RandomSuffix}}", "{{if .}}{{.RandomSuffix}}{{end}}",
		"{{slice .RandomSuffix 2 5}}", "{{index .RandomSuffix 1}}", "{{call .RoleName}}", "{{len .}}", "{{- /* x */ -}} {{.RandomSuffix}}", "{{.ProjectName}}{{.RandomSuffix}}",
	} {
		f.Add("web", template, "token")
		f.Add("w.e-b_1", template, "oidc-Jané\x00{{.X}}"+strings.Repeat("long", 40))
	}
	f.Fuzz(func(t *testing.T, role, template, who string) {
		e := newEnv(t)
		e.configure(nil)
		e.who = who
		start := time.Now()
		resp, err := e.do(logical.CreateOperation, "roles/"+role, map[string]any{"project_id": openaisim.DefaultProject, "service_account_name_template": template})
		if failure(resp, err) == nil && err == nil && len(e.keys("roles/")) > 0 {
			for range 3 {
				resp, err := e.do(logical.ReadOperation, "creds/"+role, nil)
				if failed := failure(resp, err); failed != nil && !strings.Contains(failed.Error(), "service_account_name_template") {
					t.Errorf("role %q: %v", role, failed)
				}
			}
		}
		names := map[string]bool{}
		for _, account := range e.sim.ServiceAccounts(openaisim.DefaultProject) {
			if names[account.Name] || !regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`).MatchString(account.Name) {
				t.Errorf("name %q: not valid, or twice", account.Name)
			}
			names[account.Name] = true
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("took %s", took)
		}
	})
}

// FuzzEndpoint writes api_endpoint: it is refused, or requests go to exactly this place, with
// TLS or to a loopback address.
func FuzzEndpoint(f *testing.F) {
	for _, endpoint := range []string{
		defaultEndpoint, "https://api.openai.com/v1/", "http://127.0.0.1:8080/v1", "http://[::1]/v1", "http://localhost/v1", "https://a:b@c/", "https://h:443:444",
		"https://h/v1?x", "https://h/#", "HTTPS://H/%2e%2e/", "https://[fe80::1%25eth0]:1/", "http://127.0.0.1.example.com", "https://h\\@x/", "//h", "",
	} {
		f.Add(endpoint)
	}
	f.Fuzz(func(t *testing.T, endpoint string) {
		synctest.Test(t, func(t *testing.T) {
			e := newEnv(t)
			key, id := e.sim.AdminKey()
			var sent *url.URL
			e.wire.RoundTripper = roundTripper(func(req *http.Request) (*http.Response, error) {
				sent = req.URL
				return nil, errors.New("no network")
			})
			data := map[string]any{
				"admin_api_key": key, "admin_api_key_id": id, "organization_id": openaisim.DefaultOrganization, "api_endpoint": endpoint, "verify_connection": false,
			}
			if resp, err := e.do(logical.CreateOperation, "config", data); err != nil {
				t.Fatal(err)
			} else if resp.IsError() {
				return
			}
			stored := e.ok(logical.ReadOperation, "config", nil).Data["api_endpoint"].(string)
			_, _ = e.do(logical.UpdateOperation, "config/rotate", nil)
			if sent == nil {
				t.Fatalf("endpoint %q is stored as %q but can't be called", endpoint, stored)
			}
			host := sent.Hostname()
			loopback := host == "localhost" || net.ParseIP(host).IsLoopback()
			if sent.Scheme != "https" && !(sent.Scheme == "http" && loopback) || sent.User != nil || sent.RawQuery != "" || sent.Fragment != "" {
				t.Errorf("endpoint %q is called as %s", endpoint, sent)
			}
			if want := stored + "/organization/admin_api_keys/" + id; sent.String() != want || strings.Contains(sent.Path, "/../") {
				t.Errorf("endpoint %q is called as %s, want %s", endpoint, sent, want)
			}
			if _, err := net.ResolveTCPAddr("tcp", net.JoinHostPort("127.0.0.1", cmp.Or(sent.Port(), "443"))); err != nil {
				t.Errorf("endpoint %q: %v", endpoint, err)
			}
			e.configure(map[string]any{"api_endpoint": stored, "verify_connection": false})
			if got := e.ok(logical.ReadOperation, "config", nil).Data["api_endpoint"]; got != stored {
				t.Errorf("endpoint %q: stored as %q, and that as %q", endpoint, stored, got)
			}
		})
	})
}

// FuzzRetryAfter answers once with 429: the next attempt comes within a minute.
func FuzzRetryAfter(f *testing.F) {
	for _, value := range []string{"", "0", "1", "1.5", "-1", "1e400", "NaN", "+Inf", "0x10", "Sat, 01 Jan 2000 00:00:20 GMT", "Fri, 31 Dec 9999 23:59:59 GMT", "soon", "1_0"} {
		f.Add(value, "")
		f.Add("7", value)
	}
	f.Fuzz(func(t *testing.T, after, ms string) {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			e.sim.Inject(openaisim.Fault{Status: 429, Header: http.Header{"Retry-After": {after}, "Retry-After-Ms": {ms}}})
			start := time.Now()
			e.creds("web")
			if took := time.Since(start); took > time.Minute+time.Second {
				t.Errorf("took %s", took)
			}
		})
	})
}

// BenchmarkCreds issues and revokes a credential, with an OpenAI that answers at once.
func BenchmarkCreds(b *testing.B) {
	e := newConfiguredEnv(b)
	e.b = newBackend(e.sim.Transport())
	if err := e.b.Setup(context.Background(), &logical.BackendConfig{System: testSystem{e.system}, StorageView: e.storage}); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		e.revoke(e.creds("web").Secret)
		e.sim.ResetCalls()
	}
}

// BenchmarkMetricsAdd counts on all processors at once, as requests do.
func BenchmarkMetricsAdd(b *testing.B) {
	m := newMetrics()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			m.add(metricCredentials, 1, "role", "web", "operation", "issue", "result", "success")
		}
	})
}

// vaultSystem is the system view of a Vault with or without a rotation manager, whose
// replication state can be set.
type vaultSystem struct {
	logical.StaticSystemView
	err          error // of registering; nil: there is a rotation manager
	registered   []rotation.RotationJobConfigureRequest
	deregistered []rotation.RotationJobDeregisterRequest
}

// errCommunity is what the community edition answers, as it arrives over gRPC.
var errCommunity = errors.New("rpc error: code = Internal desc = error registering rotation job: " + automatedrotationutil.ErrRotationManagerUnsupported.Error())

func (s *vaultSystem) RegisterRotationJob(_ context.Context, r *rotation.RotationJobConfigureRequest) (string, error) {
	if s.err == nil {
		s.registered = append(s.registered, *r)
	}
	return "", s.err
}

func (s *vaultSystem) DeregisterRotationJob(_ context.Context, r *rotation.RotationJobDeregisterRequest) error {
	s.deregistered = append(s.deregistered, *r)
	return nil
}

// restartOn is restart with another system view or another way to OpenAI; nil: as it was.
func (e *env) restartOn(system logical.SystemView, transport http.RoundTripper) {
	e.t.Helper()
	if system == nil {
		system = e.b.System()
	}
	if transport == nil {
		transport = e.b.transport
	}
	e.b = newBackend(transport)
	err := e.b.Setup(context.Background(), &logical.BackendConfig{
		Logger: logging.NewVaultLoggerWithWriter(e.log, 1), System: system, StorageView: e.storage,
	})
	if err != nil {
		e.t.Fatal(err)
	}
}

// newVaultEnv is newConfiguredEnv on such a Vault.
func newVaultEnv(t *testing.T, err error) (*env, *vaultSystem) {
	t.Helper()
	e := newConfiguredEnv(t)
	system := &vaultSystem{StaticSystemView: *e.system, err: err}
	e.restartOn(system, nil)
	return e, system
}

// set updates config, which must succeed.
func (e *env) set(data map[string]any) *logical.Response {
	e.t.Helper()
	return e.ok(logical.UpdateOperation, "config", data)
}

// shown reads a field of config.
func (e *env) shown(field string) any {
	e.t.Helper()
	return e.ok(logical.ReadOperation, "config", nil).Data[field]
}

// expectShown checks a field of config.
func (e *env) expectShown(field string, want any) {
	e.t.Helper()
	if got := e.shown(field); got != want {
		e.t.Errorf("%s in config: got %v, want %v", field, got, want)
	}
}

// metric reads a metric that has no labels.
func (e *env) metric(name string) any {
	e.t.Helper()
	return e.ok(logical.ReadOperation, "metrics", nil).Data[metricPrefix+name]
}

// ticks makes Vault's periodic call each minute for d.
func (e *env) ticks(d time.Duration) {
	e.t.Helper()
	for range d / time.Minute {
		time.Sleep(time.Minute)
		e.tick()
	}
}

// callOpenAI makes a call with an admin key, past the plugin and its faults.
func (e *env) callOpenAI(key, method, path, body string) (status int, answer map[string]any) {
	e.t.Helper()
	req, err := http.NewRequest(method, "https://simulated/v1/organization/"+path, strings.NewReader(body))
	if err != nil {
		e.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Content-Type", "application/json")
	resp, err := e.sim.Transport().RoundTrip(req)
	if err == nil {
		err = json.NewDecoder(resp.Body).Decode(&answer)
	}
	if err != nil {
		e.t.Fatal(err)
	}
	return resp.StatusCode, answer
}

// keyWorks fails the test unless OpenAI accepts the key in storage.
func (e *env) keyWorks(s logical.Storage, when string) {
	e.t.Helper()
	cfg, err := getConfig(context.Background(), s)
	if err != nil || cfg == nil {
		e.t.Fatalf("%s: config: got %v, %v", when, cfg, err)
	}
	if status, _ := e.callOpenAI(cfg.AdminAPIKey, http.MethodGet, "admin_api_keys", ""); status != http.StatusOK {
		e.t.Errorf("%s: the key in config is answered %d, want 200", when, status)
	}
}

// oneKey fails the test unless the only live admin key is that of config, made by a
// rotation or the first one, and nothing is left to do.
func (e *env) oneKey() {
	e.t.Helper()
	e.keyWorks(e.storage.Storage, "in the end")
	cfg, keys := e.config(), e.sim.AdminKeys()
	_, first := e.sim.AdminKey()
	if len(keys) != 1 || keys[0].ID != cfg.AdminAPIKeyID || keys[0].ID != first && !strings.HasPrefix(keys[0].Name, "vault-admin-") {
		e.t.Errorf("live admin keys: got %v, want the one of config alone, %q", keys, cfg.AdminAPIKeyID)
	}
	if len(cfg.PendingDeletion) != 0 {
		e.t.Errorf("pending deletion: got %v, want none", cfg.PendingDeletion)
	}
	e.nothingPending()
}

// nothingPending fails the test if there are write-ahead-log or clean-up entries.
func (e *env) nothingPending() {
	e.t.Helper()
	if got := append(e.keys(cleanupPrefix), e.pending()...); len(got) != 0 {
		e.t.Errorf("write-ahead-log and clean-up entries: got %d, want none", len(got))
	}
}

// accounts fails the test unless the simulator has n service accounts and n keys.
func (e *env) accounts(n int) {
	e.t.Helper()
	accounts, keys := e.sim.ServiceAccounts(openaisim.DefaultProject), e.sim.ProjectKeys(openaisim.DefaultProject)
	if len(accounts) != n || len(keys) != n {
		e.t.Errorf("service accounts and keys: got %d and %d, want %d", len(accounts), len(keys), n)
	}
}

// logged counts the lines of the log that hold text.
func (e *env) logged(level, text string) (n int) {
	for line := range strings.Lines(e.log.String()) {
		if strings.Contains(line, "["+level+"]") && strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// countCalls counts the calls to OpenAI of a method whose path contains part.
func (e *env) countCalls(method, part string) (n int) {
	for _, c := range e.sim.Calls() {
		if c.Method == method && strings.Contains(c.Path, part) {
			n++
		}
	}
	return n
}

// always makes calls be answered with status from now on.
func (e *env) always(method, path string, status int) {
	e.sim.Inject(openaisim.Fault{Method: method, Path: path, Status: status, Times: -1})
}

// stepFault is what befalls one step of a request, a storage operation or an exchange
// with OpenAI, or that step and all later ones.
type stepFault struct {
	name    string
	effect  bool // the step takes effect, but its answer is lost
	all     bool // no later step takes effect either, until the request has ended
	restart bool // and then the plugin's process ends
	cancel  bool // the request's context ends at the step
	arrives bool // then: the step's answer arrives all the same
	refused bool // of a call to OpenAI: the connection is refused
	status  int  // of a call to OpenAI: this is answered
}

var stepFaults = []stepFault{
	{name: "crash before", all: true, restart: true},
	{name: "crash after", all: true, restart: true, effect: true},
	{name: "outage before", all: true},
	{name: "outage after", all: true, effect: true},
	{name: "failure"},
	{name: "refused", refused: true},
	{name: "answer lost", effect: true},
	{name: "429", status: http.StatusTooManyRequests},
	{name: "500 after processing", effect: true, status: http.StatusInternalServerError},
	{name: "cancelled before", cancel: true},
	{name: "cancelled after", cancel: true, effect: true},
	{name: "cancelled with the answer", cancel: true, effect: true, arrives: true},
}

// roundTrip is a transport.
type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// steps stands between a mount and its storage and OpenAI.
type steps struct {
	logical.Storage
	transport http.RoundTripper
	each      func() // called before each step

	fault  stepFault
	at     int // the step that the fault befalls, from 1
	cancel context.CancelFunc
	n      int         // steps so far
	on     atomic.Bool // while the request runs; other steps are not counted
}

var errStep = errors.New("injected failure")

// step takes a step whose effect it is given.
func (s *steps) step(effect func() error) error {
	if s.each != nil {
		s.each()
	}
	if !s.on.Load() {
		return effect()
	}
	s.n++
	switch {
	case s.n < s.at || s.n > s.at && !s.fault.all:
		return effect()
	case s.n > s.at:
		return errStep
	}
	if s.fault.effect {
		if err := effect(); err != nil || s.fault.arrives {
			s.cancel()
			return err
		}
	}
	if s.fault.cancel {
		s.cancel()
		return context.Canceled
	}
	return errStep
}

// The storage is one that does not look at the context.

func (s *steps) Get(ctx context.Context, key string) (entry *logical.StorageEntry, err error) {
	ctx = context.WithoutCancel(ctx)
	err = s.step(func() error { entry, err = s.Storage.Get(ctx, key); return err })
	return entry, err
}

func (s *steps) Put(ctx context.Context, entry *logical.StorageEntry) error {
	return s.step(func() error { return s.Storage.Put(context.WithoutCancel(ctx), entry) })
}

func (s *steps) Delete(ctx context.Context, key string) error {
	return s.step(func() error { return s.Storage.Delete(context.WithoutCancel(ctx), key) })
}

func (s *steps) List(ctx context.Context, prefix string) (keys []string, err error) {
	err = s.step(func() error { keys, err = s.Storage.List(context.WithoutCancel(ctx), prefix); return err })
	return keys, err
}

func (s *steps) RoundTrip(req *http.Request) (resp *http.Response, err error) {
	err = s.step(func() error { resp, err = s.transport.RoundTrip(req); return err })
	switch {
	case err == nil:
		return resp, nil
	case !errors.Is(err, errStep):
		return nil, err
	case s.fault.refused:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	case s.fault.status != 0:
		body := `{"error":{"message":"Injected.","type":"server_error"}}`
		return &http.Response{StatusCode: s.fault.status, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: req}, nil
	}
	return nil, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
}

// newSteps puts steps between the mount and the rest.
func newSteps(e *env) *steps {
	s := &steps{Storage: e.storage.Storage, transport: e.sim.Transport()}
	e.storage.Storage = s
	e.restartOn(nil, s)
	return s
}

// run makes a request that meets fault at its step number at. It tells whether the request came as far.
func (s *steps) run(e *env, fault stepFault, at int, op logical.Operation, path string) (resp *logical.Response, err error, reached bool) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s.fault, s.at, s.cancel, s.n = fault, at, cancel, 0
	s.on.Store(true)
	resp, err = e.b.HandleRequest(ctx, &logical.Request{Operation: op, Path: path, Storage: e.storage, MountPoint: "openai/"})
	s.on.Store(false)
	if fault.restart {
		e.crash()
	}
	return resp, failure(resp, err), s.n >= at
}

// everyStep runs test in a bubble of its own for each fault at each step, and fails if
// there are fewer than enough steps. test tells whether its request reached step at.
func everyStep(t *testing.T, enough int, test func(t *testing.T, fault stepFault, at int) (reached bool)) {
	for _, fault := range stepFaults {
		t.Run(fault.name, func(t *testing.T) {
			for at, reached := 1, true; reached && !t.Failed(); at++ {
				synctest.Test(t, func(t *testing.T) {
					reached = test(t, fault, at)
					if t.Failed() {
						t.Logf("the fault was at step %d", at)
					}
				})
				if !reached && at <= enough {
					t.Errorf("steps: got %d, want at least %d", at-1, enough)
				}
			}
		})
	}
}

// TestRotationFaults: whatever a rotation meets at whatever step, config holds a working
// key at any moment, and a few minutes later that is the only one.
func TestRotationFaults(t *testing.T) {
	for _, test := range []struct {
		name   string
		op     logical.Operation
		path   string
		enough int // at least so many steps
		set    func(*env)
	}{
		// config, own key, entry, new key, proof, config, entry, old key, config
		{"manual", logical.UpdateOperation, "config/rotate", 9, func(*env) {}},
		// a proof that takes a while
		{"slow proof", logical.UpdateOperation, "config/rotate", 11, func(e *env) { e.sim.SetKeyDelay(250 * time.Millisecond) }},
		// with the key of an earlier rotation still to be deleted
		{"left over", logical.UpdateOperation, "config/rotate", 10, func(e *env) {
			e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Status: http.StatusForbidden})
			e.ok(logical.UpdateOperation, "config/rotate", nil)
		}},
		{"scheduled", logical.RollbackOperation, "", 11, func(e *env) {
			e.set(map[string]any{"rotation_period": "1h"})
			time.Sleep(time.Hour)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			everyStep(t, test.enough, func(t *testing.T, fault stepFault, at int) bool {
				e, _ := newVaultEnv(t, errCommunity)
				test.set(e)
				before := e.config().AdminAPIKeyID
				s := newSteps(e)
				s.each = func() { e.keyWorks(s.Storage, fmt.Sprintf("at step %d", s.n)) }
				resp, err, reached := s.run(e, fault, at, test.op, test.path)
				e.keyWorks(s.Storage, "after the request")
				if rotated := e.config().AdminAPIKeyID; test.path != "" && err == nil && (rotated == before || rotated != resp.Data["admin_api_key_id"]) {
					t.Errorf("answered success with %v, and the key in config is %q, before %q", resp.Data, rotated, before)
				}
				e.tick() // entries are too young
				e.creds("web")
				e.ticks(4 * time.Minute)
				e.oneKey()
				e.ok(logical.UpdateOperation, "config/rotate", nil)
				e.oneKey()
				return reached
			})
		})
	}
}

// TestRotationProof is about a new key that OpenAI does not know yet.
func TestRotationProof(t *testing.T) {
	for _, test := range []struct {
		delay time.Duration
		ok    bool
	}{{0, true}, {3 * time.Second, true}, {12 * time.Second, true}, {time.Hour, false}} {
		t.Run(test.delay.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				e.sim.SetKeyDelay(test.delay)
				start := time.Now()
				err := failure(e.do(logical.UpdateOperation, "config/rotate", nil))
				if got := err == nil; got != test.ok {
					t.Errorf("rotation with a key accepted after %v: got %v, want success %v", test.delay, err, test.ok)
				}
				if took := time.Since(start); took > 30*time.Second {
					t.Errorf("rotation: took %v, want at most 30s", took)
				}
				if got := e.countCalls(http.MethodGet, "/admin_api_keys/"); got > 12 {
					t.Errorf("proofs: got %d calls, want at most 12", got)
				}
				e.oneKey()
				_, first := e.sim.AdminKey()
				if got := e.config().AdminAPIKeyID != first; got != test.ok {
					t.Errorf("new key in config: got %v, want %v", got, test.ok)
				}
			})
		})
	}
}

// TestPendingDeletion: an old key that can't be deleted is shown, told once, and deleted
// by later periodic calls. That it is gone already counts as deleted.
func TestPendingDeletion(t *testing.T) {
	for _, status := range []int{403, 404, 429, 500} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				old := e.config().AdminAPIKeyID
				e.always(http.MethodDelete, "admin_api_keys", status)
				resp := e.ok(logical.UpdateOperation, "config/rotate", nil)
				want := []string{old}
				if status == http.StatusNotFound {
					want = []string{}
				}
				if got := e.shown("pending_deletion"); !slices.Equal(got.([]string), want) {
					t.Errorf("pending_deletion: got %v, want %v", got, want)
				}
				if got := len(resp.Warnings); got != len(want) || got == 1 && !strings.Contains(resp.Warnings[0], old) {
					t.Errorf("warnings: got %v, want %d that name the old key", resp.Warnings, len(want))
				}
				if got, want := e.metric("admin_keys_pending_deletion"), float64(len(want)); got != want {
					t.Errorf("metric: got %v, want %v", got, want)
				}
				if status == http.StatusNotFound {
					return // the simulator has not really deleted it
				}
				e.ticks(3 * time.Minute)
				if got := e.shown("pending_deletion"); !slices.Equal(got.([]string), want) {
					t.Errorf("pending_deletion while OpenAI fails: got %v, want %v", got, want)
				}
				e.sim.ClearFaults()
				e.ticks(time.Minute)
				e.oneKey()
				if resp := e.ok(logical.UpdateOperation, "config/rotate", nil); len(resp.Warnings) != 0 {
					t.Errorf("warnings of the next rotation: got %v, want none", resp.Warnings)
				}
			})
		})
	}
}

// TestRotationsAtOnce: they come one after the other, and each succeeds.
func TestRotationsAtOnce(t *testing.T) {
	e := newConfiguredEnv(t)
	e.sim.SetLatency(2 * time.Millisecond)
	ids := sync.Map{}
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			resp, err := e.do(logical.UpdateOperation, "config/rotate", nil)
			if err := failure(resp, err); err != nil {
				t.Errorf("rotate: %v", err)
				return
			}
			if _, twice := ids.LoadOrStore(resp.Data["admin_api_key_id"], true); twice {
				t.Errorf("two rotations answered the same key")
			}
		})
	}
	group.Wait()
	e.oneKey()
}

// TestRotationWaitsForCalls: calls in flight on the old key end before it is deleted; those that
// take too long are no reason to keep it for good, and succeed with the new key.
func TestRotationWaitsForCalls(t *testing.T) {
	for _, test := range []struct {
		slow    time.Duration
		waits   bool
		pending int
	}{{10 * time.Second, true, 0}, {24 * time.Second, false, 1}} {
		t.Run(test.slow.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				var slowed atomic.Bool
				e.restartOn(nil, roundTrip(func(req *http.Request) (resp *http.Response, err error) {
					if strings.HasSuffix(req.URL.Path, "/service_accounts") && slowed.CompareAndSwap(false, true) {
						if err := sleep(req.Context(), test.slow); err != nil {
							return nil, err
						}
					}
					return e.sim.Transport().RoundTrip(req)
				}))
				start := time.Now()
				var ended time.Duration
				var group sync.WaitGroup
				group.Go(func() {
					e.creds("web")
					ended = time.Since(start)
				})
				synctest.Wait()
				resp := e.ok(logical.UpdateOperation, "config/rotate", nil)
				if took := time.Since(start); took < min(test.slow, 20*time.Second) || took > 21*time.Second {
					t.Errorf("rotation: took %v, want that it waits for the call of %v, up to 20s", took, test.slow)
				}
				if got := len(resp.Warnings); got != test.pending {
					t.Errorf("warnings: got %v, want %d", resp.Warnings, test.pending)
				}
				e.tick()
				group.Wait()
				if got := e.countCalls(http.MethodPost, "/service_accounts"); (got == 1) != test.waits {
					t.Errorf("creations: got %d, want a second one only when the rotation could not wait", got)
				}
				if ended > test.slow+time.Second {
					t.Errorf("the call ended after %v, want %v", ended, test.slow)
				}
				e.oneKey()
				e.accounts(1)
			})
		})
	}
}

// TestRotatedElsewhere: a call whose key another node has rotated away, even twice, goes on with the new one.
func TestRotatedElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		other := *e
		other.restart()
		rotations := 2
		e.restartOn(nil, roundTrip(func(req *http.Request) (*http.Response, error) {
			if req.Method == http.MethodPost && rotations > 0 {
				rotations--
				other.ok(logical.UpdateOperation, "config/rotate", nil)
			}
			return e.sim.Transport().RoundTrip(req)
		}))
		e.creds("web")
		if got := e.countCalls(http.MethodPost, "/service_accounts"); got != 3 {
			t.Errorf("creations: got %d, want the third to succeed", got)
		}
		e.oneKey()
		e.accounts(1)
	})
}

// TestRotationUnderLoad: issuing and revoking never notices rotations.
func TestRotationUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		e.sim.SetLatency(50 * time.Millisecond)
		end := time.Now().Add(10 * time.Second)
		var issued, failed atomic.Int64
		var group sync.WaitGroup
		for range 16 {
			group.Go(func() {
				for time.Now().Before(end) {
					resp, err := e.do(logical.ReadOperation, "creds/web", nil)
					if err := failure(resp, err); err != nil {
						failed.Add(1)
						t.Errorf("creds: %v", err)
						return
					}
					if err := failure(e.lease(logical.RevokeOperation, resp.Secret)); err != nil {
						failed.Add(1)
						t.Errorf("revoke: %v", err)
					}
					issued.Add(1)
				}
			})
		}
		rotations := 0
		for ; time.Now().Before(end); rotations++ {
			time.Sleep(time.Second)
			e.ok(logical.UpdateOperation, "config/rotate", nil)
		}
		group.Wait()
		t.Logf("%d credentials, %d rotations, %d failures", issued.Load(), rotations, failed.Load())
		if issued.Load() < 1400 || rotations < 7 {
			t.Errorf("got %d credentials and %d rotations, want 1400 and 7", issued.Load(), rotations)
		}
		for _, c := range e.sim.Calls() {
			if c.Status != http.StatusOK {
				t.Errorf("%s %s was answered %d: a rotation did not wait", c.Method, c.Path, c.Status)
				break
			}
		}
		e.oneKey()
		e.accounts(0)
	})
}

// TestWrongKeyID: an id that is not the key's can't be configured, nor rotated with.
func TestWrongKeyID(t *testing.T) {
	e := newEnv(t)
	key, _ := e.sim.AdminKey()
	_, other := e.sim.AddAdminKey("somebody else's")
	data := map[string]any{"admin_api_key": key, "admin_api_key_id": other, "organization_id": openaisim.DefaultOrganization}
	e.refused(logical.CreateOperation, "config", data, "admin_api_key_id", other)
	data["verify_connection"] = false
	e.ok(logical.CreateOperation, "config", data)
	if err := failure(e.do(logical.UpdateOperation, "config/rotate", nil)); err == nil || !strings.Contains(err.Error(), other) {
		t.Errorf("rotation with the id of another key: got %v, want an error that names it", err)
	}
	if got := len(e.sim.AdminKeys()); got != 2 {
		t.Errorf("live admin keys: got %d, want both", got)
	}
	e.nothingPending()
}

// TestRotationSchedule: where Vault has no rotation manager the plugin rotates from its
// periodic function, by period or by cron schedule in UTC.
func TestRotationSchedule(t *testing.T) {
	defer func(zone *time.Location) { time.Local = zone }(time.Local)
	time.Local = time.FixedZone("elsewhere", 5*60*60+30*60) // schedules are in UTC all the same
	period := map[string]any{"rotation_period": "90m"}
	hourly := map[string]any{"rotation_schedule": "30 * * * *"}
	nightly := map[string]any{"rotation_schedule": "0 3 * * *", "rotation_window": "2h"}
	for _, test := range []struct {
		name   string
		config map[string]any
		change map[string]any // written after down
		down   time.Duration  // Vault is down so long, from midnight (UTC) on
		up     time.Duration  // and then up so long, with a periodic call each minute
		want   string         // times of the rotations, in UTC
	}{
		{"period", period, nil, 0, 5 * time.Hour, "01:30 03:00 04:30"},
		{"period missed", period, nil, 4 * time.Hour, 2 * time.Hour, "04:01 05:31"},
		{"schedule", hourly, nil, 0, 3 * time.Hour, "00:30 01:30 02:30"},
		{"schedule missed", hourly, nil, 2 * time.Hour, time.Hour, "02:01 02:30"},
		{"window", nightly, nil, 0, 28 * time.Hour, "03:00 03:00"},
		{"in the window", nightly, nil, 4*time.Hour + 50*time.Minute, 24 * time.Hour, "04:51 03:00"},
		{"after the window", nightly, nil, 5 * time.Hour, 24 * time.Hour, "03:00"},
		{"disabled", period, map[string]any{"disable_automated_rotation": true}, 2 * time.Hour, 10 * time.Hour, ""},
		{"cleared", period, map[string]any{"rotation_period": 0}, 2 * time.Hour, 10 * time.Hour, ""},
		{"shortened", period, map[string]any{"rotation_period": "20m"}, 10 * time.Minute, time.Hour, "00:20 00:40 01:00"},
		{"lengthened", period, map[string]any{"rotation_period": "3h"}, 2 * time.Hour, 2 * time.Hour, "03:00"},
		{"new schedule", hourly, map[string]any{"rotation_schedule": "45 * * * *"}, 20 * time.Minute, time.Hour, "00:45"},
		{"schedule for period", period, map[string]any{"rotation_schedule": "45 * * * *", "rotation_period": 0}, 20 * time.Minute, 3 * time.Hour, "00:45 01:45 02:45"},
	} {
		for _, err := range []error{errCommunity, errors.New("rpc error: code = Unimplemented desc = unknown method")} {
			t.Run(test.name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e, system := newVaultEnv(t, err)
					e.set(test.config)
					e.expectShown("rotation_manager", "plugin")
					time.Sleep(test.down)
					e.restartOn(system, nil)
					if test.change != nil {
						e.set(test.change)
					}
					var got []string
					for range test.up / time.Minute {
						before := e.config().AdminAPIKeyID
						next, _ := time.Parse(time.RFC3339, e.shown("next_rotation").(string))
						e.ticks(time.Minute)
						now := time.Now().UTC()
						rotated := e.config().AdminAPIKeyID != before
						if rotated {
							got = append(got, now.Format("15:04"))
							if shown := e.shown("last_rotated"); shown != formatTime(now) {
								t.Errorf("last_rotated: got %v, want %v", shown, formatTime(now))
							}
						}
						if due := !next.IsZero() && !next.After(now); due != rotated {
							t.Errorf("next_rotation at %v: got %v, and rotated is %v", now, next, rotated)
						}
					}
					if got := strings.Join(got, " "); got != test.want {
						t.Errorf("rotations: got %q, want %q", got, test.want)
					}
					e.oneKey()
				})
			})
		}
	}
}

// TestRotationFields: which of the fields go together, and what is stored stays.
func TestRotationFields(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := newVaultEnv(t, errCommunity)
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_period": 60, "rotation_schedule": "* * * * *"}, "rotation_period", "rotation_schedule")
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_window": 3600}, "rotation_window")
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_schedule": "every day"}, "rotation_schedule")
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_schedule": "* * * * *", "rotation_window": 60}, "rotation_window")
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_period": -60}, "rotation_period")
		e.expectShown("rotation_manager", "none")

		e.set(map[string]any{"rotation_schedule": "0 3 * * *"})
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_period": 3600}, "rotation_schedule")
		e.set(map[string]any{"rotation_window": 7200})
		e.expectShown("rotation_window", float64(7200))
		e.expectShown("rotation_schedule", "0 3 * * *")
		e.set(map[string]any{"organization_id": openaisim.DefaultOrganization})
		e.expectShown("rotation_window", float64(7200))
		e.set(map[string]any{"rotation_schedule": "", "rotation_period": 3600})
		e.expectShown("rotation_window", float64(0))
		e.expectShown("next_rotation", "2000-01-01T01:00:00Z")
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_schedule": "* * * * *"}, "rotation_period")
		if resp := e.set(map[string]any{"rotation_policy": "p"}); resp == nil || len(resp.Warnings) != 1 {
			t.Errorf("rotation_policy without a rotation manager: got %v, want one warning", resp)
		}
		e.set(map[string]any{"rotation_period": 0})
		e.expectShown("next_rotation", "")
		e.expectShown("rotation_manager", "none")
	})
}

// TestRotationRetry: a scheduled rotation that fails is tried again after 1, 2, 4 … minutes, up to an
// hour. A config write ends that.
func TestRotationRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := newVaultEnv(t, errCommunity)
		e.set(map[string]any{"rotation_period": "1h"})
		e.always(http.MethodPost, "/admin_api_keys$", 500)
		e.ticks(time.Hour - time.Minute)
		e.sim.ResetCalls()
		var got []int
		for minute := range 250 {
			e.ticks(time.Minute)
			if n := e.countCalls(http.MethodPost, "/admin_api_keys"); n > len(got) {
				got = append(got, minute)
			}
		}
		if want := []int{0, 1, 3, 7, 15, 31, 63, 123, 183, 243}; !slices.Equal(got, want) {
			t.Errorf("attempts: got minutes %v, want %v", got, want)
		}
		e.set(map[string]any{"rotation_period": "30m"})
		e.ticks(time.Minute)
		if got := e.countCalls(http.MethodPost, "/admin_api_keys"); got != 11 {
			t.Errorf("attempts after a config write: got %d, want 11", got)
		}
		e.sim.ClearFaults()
		e.ticks(5 * time.Minute)
		e.oneKey()
		e.ticks(30 * time.Minute)
		if got := e.countCalls(http.MethodPost, "/admin_api_keys"); got != 13 {
			t.Errorf("creations after OpenAI has recovered: got %d, want 13", got)
		}
		e.always(http.MethodPost, "/admin_api_keys$", 403)
		e.ticks(27 * time.Minute)
		if got := e.countCalls(http.MethodPost, "/admin_api_keys"); got != 15 {
			t.Errorf("attempts: got %d, want 15: a minute after the first failure comes the second", got)
		}
		e.nothingPending() // a refused key needs no rollback
	})
}

// TestRotationReplication: only the active node of the primary rotates by itself.
func TestRotationReplication(t *testing.T) {
	for _, test := range []struct {
		name           string
		state          consts.ReplicationState
		local          bool
		rotates, sweep bool
	}{
		{"primary", consts.ReplicationPerformancePrimary, false, true, true},
		{"standby", consts.ReplicationPerformanceStandby, false, false, false},
		{"secondary", consts.ReplicationPerformanceSecondary, false, false, true},
		{"secondary, local mount", consts.ReplicationPerformanceSecondary, true, true, true},
		{"DR secondary", consts.ReplicationDRSecondary, false, false, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, system := newVaultEnv(t, errCommunity)
				e.set(map[string]any{"rotation_period": "1h"})
				_, first := e.sim.AdminKey()
				resp := e.creds("web")
				e.always(http.MethodDelete, "/service_accounts/", 403)
				if err := failure(e.lease(logical.RevokeOperation, resp.Secret)); err == nil {
					t.Error("revoke: got success, want an error")
				}
				e.sim.ClearFaults()
				system.ReplicationStateVal, system.LocalMountVal = test.state, test.local
				e.ticks(3 * time.Hour)
				if got := e.config().AdminAPIKeyID != first; got != test.rotates {
					t.Errorf("rotated: got %v, want %v", got, test.rotates)
				}
				if got := len(e.keys(cleanupPrefix)) == 0; got != test.sweep {
					t.Errorf("swept: got %v, want %v", got, test.sweep)
				}
				if !test.rotates {
					if err := failure(e.do(logical.RotationOperation, "config", nil)); err == nil {
						t.Error("rotation by Vault: got success, want an error")
					}
				}
			})
		})
	}
}

// TestRotationByVault: where Vault has a rotation manager, that alone rotates on schedule.
func TestRotationByVault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, system := newVaultEnv(t, nil)
		e.set(map[string]any{"rotation_schedule": "0 3 * * *", "rotation_window": 7200, "rotation_policy": "p"})
		e.expectShown("rotation_manager", "vault")
		want := rotation.RotationJobConfigureRequest{
			Name: "openai-admin-api-key", MountPoint: "openai/", ReqPath: "config",
			RotationSchedule: "0 3 * * *", RotationWindow: 2 * time.Hour, RotationPolicy: "p",
		}
		if got := system.registered; len(got) != 1 || got[0] != want {
			t.Errorf("registered: got %+v, want %+v", got, want)
		}
		_, first := e.sim.AdminKey()
		e.ticks(25 * time.Hour)
		if got := e.config().AdminAPIKeyID; got != first {
			t.Error("the plugin rotated by itself")
		}
		e.ok(logical.RotationOperation, "config", nil)
		if got := e.config().AdminAPIKeyID; got == first {
			t.Error("Vault's rotation has not rotated")
		}
		e.oneKey()
		e.always(http.MethodPost, "/admin_api_keys$", 403)
		if err := failure(e.do(logical.RotationOperation, "config", nil)); err == nil {
			t.Error("failing rotation: got success, want an error, for Vault to try again")
		}

		e.set(map[string]any{"rotation_schedule": "", "rotation_period": 3600})
		if got := system.registered; len(got) != 2 || got[1].RotationPeriod != time.Hour || got[1].RotationSchedule != "" {
			t.Errorf("registered after a change: got %+v, want a period of 1h", got)
		}
		job := rotation.RotationJobDeregisterRequest{MountPoint: "openai/", ReqPath: "config"}
		for i, write := range []map[string]any{{"disable_automated_rotation": true}, {"disable_automated_rotation": false}, {"rotation_period": 0}, {"rotation_period": 3600}, nil} {
			if write != nil {
				e.set(write)
			} else {
				e.ok(logical.DeleteOperation, "config", nil)
			}
			if got, want := len(system.deregistered), i/2+1; got != want || system.deregistered[got-1] != job {
				t.Errorf("deregistered after %v: got %+v, want %d of %+v", write, system.deregistered, want, job)
			}
		}
		if got := len(system.registered); got != 4 {
			t.Errorf("registered: got %d times, want 4", got)
		}

		system.err = errors.New("no rotation for you")
		key, id := e.sim.AddAdminKey("next")
		e.configure(map[string]any{"admin_api_key": key, "admin_api_key_id": id})
		if err := failure(e.do(logical.UpdateOperation, "config", map[string]any{"rotation_period": 3600})); err == nil {
			t.Error("config with a registration that fails: got success, want an error")
		}
		e.expectShown("rotation_period", float64(0))
	})
}

// TestRotationTakenOver: the older plugin's config, which says nothing of who rotates, is taken over by
// the first periodic call.
func TestRotationTakenOver(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
	}{{errCommunity, "plugin"}, {nil, "vault"}} {
		t.Run(test.want, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e, system := newVaultEnv(t, test.err)
				key, id := e.sim.AdminKey()
				old := fmt.Sprintf(`{"admin_api_key":%q,"admin_api_key_id":%q,"api_endpoint":"https://api.openai.com/v1","organization_id":"org-sim",
					"last_rotated_time":%q,"rotation_schedule":"","rotation_window":0,"rotation_period":3600000000000,"disable_automated_rotation":false,"rotation_policy":""}`,
					key, id, time.Now().Format(time.RFC3339Nano))
				if err := e.storage.Put(context.Background(), &logical.StorageEntry{Key: configPath, Value: []byte(old)}); err != nil {
					t.Fatal(err)
				}
				e.restartOn(system, nil)
				e.ticks(time.Minute)
				e.expectShown("rotation_manager", test.want)
				e.expectShown("rotation_period", float64(3600))
				e.ticks(time.Hour)
				if got, want := e.config().AdminAPIKeyID != id, test.want == "plugin"; got != want {
					t.Errorf("the plugin has rotated: got %v, want %v", got, want)
				}
				if got, want := len(system.registered) == 1, test.want == "vault"; got != want {
					t.Errorf("registered: got %v, want %v", system.registered, want)
				}
			})
		})
	}
}

// TestAdminKeyTTL is about admin keys that expire by themselves.
func TestAdminKeyTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := newVaultEnv(t, errCommunity)
		const day = 24 * time.Hour
		time.Sleep(2*day + 10*time.Hour) // to a Monday morning
		for _, test := range []struct {
			schedule string
			period   time.Duration
			ttl      time.Duration
			disable  bool
			ok       bool
		}{
			{ttl: day},
			{period: 12 * time.Hour, ttl: day, ok: true},
			{period: 12 * time.Hour, ttl: day, disable: true},
			{period: 12 * time.Hour, ttl: day - time.Second},
			{period: 12 * time.Hour, ttl: -day},
			{period: 12 * time.Hour, ttl: 365 * day, ok: true},
			{period: 12 * time.Hour, ttl: 365*day + time.Second},
			{period: 200 * day, ttl: 365 * day},
			{schedule: "0 3 * * *", ttl: 2 * day, ok: true},
			{schedule: "0 3 * * *", ttl: 2*day - time.Second},
			{schedule: "0 3 * * *", ttl: 2 * day, disable: true},
			{schedule: "0 3 * * 1-5", ttl: 6 * day, ok: true}, // from Friday to Monday
			{schedule: "0 3 * * 1-5", ttl: 6*day - time.Second},
			{schedule: "0 3 1 * *", ttl: 62 * day, ok: true},
			{schedule: "0 3 1 * *", ttl: 61 * day},
			{schedule: "* 9-17 * * 1-5", ttl: 6 * day, ok: true},
			{schedule: "* 9-17 * * 1-5", ttl: 2 * day}, // many short gaps come before the long one
			{schedule: "0 * * 1-6 *", ttl: 30 * day},   // likewise
			{schedule: "0 3 29 2 *", ttl: 365 * day},   // every four years
		} {
			data := map[string]any{
				"admin_key_ttl": int(test.ttl.Seconds()), "disable_automated_rotation": test.disable,
				"rotation_schedule": test.schedule, "rotation_period": int(test.period.Seconds()),
			}
			if test.ok {
				e.set(data)
				e.expectShown("admin_key_ttl", int64(test.ttl.Seconds()))
				e.set(map[string]any{"admin_key_ttl": 0})
			} else {
				e.refused(logical.UpdateOperation, "config", data, "admin_key_ttl")
			}
		}

		e.set(map[string]any{"rotation_period": int((10 * day).Seconds()), "rotation_schedule": "", "admin_key_ttl": int((20 * day).Seconds())})
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_period": 0}, "admin_key_ttl")
		e.refused(logical.UpdateOperation, "config", map[string]any{"rotation_period": int((11 * day).Seconds())}, "admin_key_ttl")
		e.refused(logical.UpdateOperation, "config", map[string]any{"disable_automated_rotation": true}, "admin_key_ttl")
		e.expectShown("admin_key_expires_at", "") // the first key's
		e.ok(logical.UpdateOperation, "config/rotate", nil)
		expires := time.Now().Add(20 * day)
		if got := e.sim.AdminKeys()[0].Expires; !got.Equal(expires) {
			t.Errorf("the new key's expiry at OpenAI: got %v, want %v", got, expires)
		}
		e.expectShown("admin_key_expires_at", formatTime(expires))
		if got := e.metric("admin_key_expiry_timestamp_seconds"); got != float64(expires.Unix()) {
			t.Errorf("metric: got %v, want %v", got, expires.Unix())
		}

		// Rotations fail from now on.
		e.always(http.MethodPost, "/admin_api_keys$", 403)
		time.Sleep(13*day - 2*time.Minute)
		e.ticks(time.Minute)
		if got := e.logged("WARN", "expires soon"); got != 0 {
			t.Errorf("warnings more than a week before the key's end: got %d, want none", got)
		}
		e.ticks(6 * time.Hour)
		if got := e.logged("WARN", "expires soon"); got != 6 {
			t.Errorf("warnings in six hours: got %d, want one an hour", got)
		}
		e.sim.ClearFaults()
		e.ticks(2 * time.Hour)
		e.oneKey()
		warned := e.logged("WARN", "expires soon")
		if e.ticks(6 * time.Hour); e.logged("WARN", "expires soon") != warned {
			t.Error("warned after the rotation had succeeded")
		}

		// A life so short that the key always ends soon, with rotations in time.
		e.set(map[string]any{"rotation_period": int(day.Seconds()), "admin_key_ttl": int((2 * day).Seconds())})
		e.ok(logical.UpdateOperation, "config/rotate", nil)
		if e.ticks(50 * time.Hour); e.logged("WARN", "expires soon") != warned {
			t.Error("warned of a key whose successor was on time")
		}
		e.always(http.MethodPost, "/admin_api_keys$", 403)
		if e.ticks(26 * time.Hour); e.logged("WARN", "expires soon") == warned {
			t.Error("did not warn of a key whose successor was late")
		}
	})
}

// TestExpiringKey: config warns when its key ends and nothing will replace it.
func TestExpiringKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := newVaultEnv(t, errCommunity)
		key, _ := e.sim.AdminKey()
		_, made := e.callOpenAI(key, http.MethodPost, "admin_api_keys", `{"name":"ends","expires_in_seconds":86400}`)
		data := map[string]any{"admin_api_key": made["value"], "admin_api_key_id": made["id"]}
		end := "2000-01-02T00:00:00Z"
		if resp := e.set(data); resp == nil || len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], end) {
			t.Errorf("config with a key that ends: got %v, want one warning with %s", resp, end)
		}
		e.expectShown("admin_key_expires_at", end)
		if resp := e.set(map[string]any{"rotation_period": 3600}); resp != nil {
			t.Errorf("config with a key that ends, and a schedule: got %v, want no warning", resp.Warnings)
		}
		e.ok(logical.UpdateOperation, "config/rotate", nil)
		e.expectShown("admin_key_expires_at", "")
	})
}

// kinds are the kinds of roles: what a role has, how many calls a credential takes, and
// the role that its account has, where that exists already.
var kinds = []struct {
	name    string
	role    map[string]any
	steps   int // of issuing a credential, in storage and at OpenAI
	account string
}{
	{"plain", map[string]any{}, 5, ""}, // role, config, entry, account, entry
	{"scoped", map[string]any{"scopes": "api.responses.write"}, 7, ""},
	{"existing account", map[string]any{}, 5, "member"},
	{"existing account with scopes", map[string]any{"scopes": "api.responses.write"}, 5, "owner"},
	{"existing account without a role", map[string]any{}, 5, "none"},
}

// TestCredsFaults: whatever issuing a credential meets at whatever step, a few minutes later
// OpenAI has nothing that was not handed out, and all that was.
func TestCredsFaults(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) {
			lost := map[string]int{}
			everyStep(t, kind.steps, func(t *testing.T, fault stepFault, at int) bool {
				e := newConfiguredEnv(t)
				kind.role["project_id"] = openaisim.DefaultProject
				there := 0
				if kind.account != "" {
					there = 1
					kind.role["service_account_id"] = e.sim.AddServiceAccount(openaisim.DefaultProject, "there", kind.account)
				}
				e.ok(logical.CreateOperation, "roles/r", kind.role)
				have := func(want int, when string) {
					accounts, keys := e.sim.ServiceAccounts(openaisim.DefaultProject), e.sim.ProjectKeys(openaisim.DefaultProject)
					if len(accounts) != max(want, there) || len(keys) != want {
						t.Errorf("%s: got %d accounts and %d keys, want %d and %d", when, len(accounts), len(keys), max(want, there), want)
					}
				}
				s := newSteps(e)
				resp, err, reached := s.run(e, fault, at, logical.ReadOperation, "creds/r")
				if fault.cancel && err == nil && reached {
					t.Error("a credential was handed out though nobody waited for it any more")
				}
				e.tick() // entries are too young
				want := 0
				if err == nil {
					want = 1
				}
				e.ticks(4 * time.Minute)
				if err != nil && fault.all && len(e.sim.ProjectKeys(openaisim.DefaultProject)) == 1 {
					// All ended when the last entry was there and Vault had no answer yet, which
					// looks as if Vault had ended right after it.
					have(1, "before the lease's end")
					if lost[fault.name]++; len(e.keys(framework.WALPrefix)) != 1 {
						t.Error("nothing remembers a credential that was lost on its way to Vault")
					}
					e.ticks(time.Hour)
				}
				have(want, "after rollback")
				if err == nil {
					if kind.account != "none" && !e.sim.Use(resp.Data["api_key"].(string)) {
						t.Error("the key that was handed out is not accepted")
					}
					e.revoke(resp.Secret)
					have(0, "after revocation")
				}
				e.ticks(time.Hour)
				e.nothingPending()
				if got := e.keys(framework.WALPrefix); len(got) != 0 {
					t.Errorf("write-ahead-log entries an hour later: got %d, want none", len(got))
				}
				return reached
			})
			for fault, n := range lost {
				if n > 1 {
					t.Errorf("%s: steps that lose a credential on its way: got %d, want only the last", fault, n)
				}
			}
		})
	}
}

// TestIssued is about a process, or all of Vault, that ends right after a credential was
// handed out: whether Vault has its lease is not known, and both must end well.
func TestIssued(t *testing.T) {
	for name, crash := range map[string]func(e *env){
		"crash": (*env).crash,
		"entry not deleted": func(e *env) {
			e.storage.setFault(func(verb, key string) error {
				if verb == "delete" {
					return errors.New("storage fault")
				}
				return nil
			})
			time.Sleep((settleTries + 2) * settleTime)
			e.storage.setFault(nil)
		},
	} {
		for _, account := range []bool{false, true} {
			t.Run(fmt.Sprint(name, account), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newConfiguredEnv(t)
					there := 0
					if account {
						there = 1
						e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_id": e.sim.AddServiceAccount(openaisim.DefaultProject, "there", "member")})
					}
					renewed, expired, lost := e.creds("web"), e.creds("web"), e.creds("web")
					crash(e)
					e.sim.ResetCalls()
					e.ticks(59 * time.Minute)
					if calls := e.sim.Calls(); len(calls) != 0 {
						t.Errorf("calls to OpenAI while the leases may be in use: got %v, want none", calls)
					}
					if got := e.keys(framework.WALPrefix); len(got) != 3 {
						t.Errorf("write-ahead-log entries: got %d, want 3", len(got))
					}
					e.storage.setFault(func(verb, key string) error {
						if verb == "put" {
							return errors.New("storage fault")
						}
						return nil
					})
					if err := failure(e.lease(logical.RenewOperation, renewed.Secret)); err == nil {
						t.Error("renewal whose entry stays: got success, want an error")
					}
					e.storage.setFault(nil)
					resp, err := e.lease(logical.RenewOperation, renewed.Secret)
					if failure(resp, err) != nil {
						t.Fatal(err)
					}
					renewed.Secret.InternalData = resp.Secret.InternalData
					time.Sleep(10 * time.Minute)
					e.revoke(expired.Secret)
					e.ticks(30 * time.Minute)
					if got := e.sim.ProjectKeys(openaisim.DefaultProject); len(got) != 1 || got[0].ID != renewed.Data["api_key_id"] {
						t.Errorf("keys after the leases' end: got %d, want the renewed one only", len(got))
					}
					if got := len(e.sim.ServiceAccounts(openaisim.DefaultProject)); got != 1 {
						t.Errorf("accounts: got %d, want 1", got)
					}
					if !e.sim.Use(renewed.Data["api_key"].(string)) {
						t.Error("the renewed key is not accepted")
					}
					if e.sim.Use(lost.Data["api_key"].(string)) {
						t.Error("the key without a lease is accepted")
					}
					// The longest life that a lease can have now is more than it was at the renewal.
					e.ok(logical.UpdateOperation, "roles/web", map[string]any{"max_ttl": "48h"})
					for range 27 {
						e.renew(renewed.Secret)
						e.ticks(55 * time.Minute)
					}
					if !e.sim.Use(renewed.Data["api_key"].(string)) {
						t.Error("the key that was renewed past the longest life of before is not accepted")
					}
					e.revoke(renewed.Secret)
					e.ticks(48 * time.Hour)
					if got := len(e.sim.ServiceAccounts(openaisim.DefaultProject)); got != there {
						t.Errorf("accounts in the end: got %d, want %d", got, there)
					}
					if got := append(e.keys(framework.WALPrefix), e.keys(cleanupPrefix)...); len(got) != 0 {
						t.Errorf("write-ahead-log and clean-up entries: got %d, want none", len(got))
					}
					if got := e.logged("ERROR", ""); got != 0 {
						t.Errorf("errors in the log: got %d, want none", got)
					}
				})
			})
		}
	}
}

// TestIssuedSettles: a process that lives on deletes the entry of what it handed out.
func TestIssuedSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		resp := e.creds("web")
		time.Sleep(settleTime)
		if got := e.keys(framework.WALPrefix); len(got) != 1 {
			t.Errorf("write-ahead-log entries before: got %d, want 1", len(got))
		}
		time.Sleep(2 * time.Second)
		if got := e.keys(framework.WALPrefix); len(got) != 0 {
			t.Errorf("write-ahead-log entries after: got %d, want none", len(got))
		}
		again, err := e.lease(logical.RenewOperation, resp.Secret)
		if failure(again, err) != nil {
			t.Fatal(err)
		}
		again.Secret.IssueTime = resp.Secret.IssueTime
		count := e.storageCalls()
		e.renew(again.Secret)
		if want := map[string]int{"get": 2}; !maps.Equal(count, want) { // the role, and the entry that is not there
			t.Errorf("storage operations of a second renewal: got %v, want %v", count, want)
		}
		e.accounts(1)
	})
	// Storage that is slow, but not too slow for each of several entries.
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		e.storage.Storage = &hooks{Storage: e.storage.Storage, beforeDelete: func(ctx context.Context, _ string) error {
			time.Sleep(settleTimeout - time.Second)
			return ctx.Err()
		}}
		for range 7 { // 1, 2, 4
			e.creds("web")
		}
		time.Sleep(2 * time.Minute)
		if got := e.keys(framework.WALPrefix); len(got) != 0 {
			t.Errorf("write-ahead-log entries after slow deletions: got %d, want none", len(got))
		}
	})
	// Storage that fails for a while.
	for _, at := range []time.Duration{0, 8 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			for range 7 {
				e.creds("web")
			}
			time.Sleep(at)
			e.storage.setFault(func(verb, key string) error { return errors.New("storage fault") })
			time.Sleep(20 * time.Second)
			e.storage.setFault(nil)
			e.ticks(2 * time.Minute)
			if got := e.keys(framework.WALPrefix); len(got) != 0 {
				t.Errorf("write-ahead-log entries after a fault at %v: got %d, want none", at, len(got))
			}
			e.b.underWay.Range(func(any, any) bool {
				t.Error("a reservation that was settled is under way")
				return false
			})
			e.accounts(7)
		})
	}
}

// TestIssuedOutlivesRole: a lease that was issued just before a crash keeps its key to its end,
// also when its role has become shorter and renewals fail.
func TestIssuedOutlivesRole(t *testing.T) {
	for _, change := range []struct {
		maxTTL string
		status int // of moving the key's end
	}{{"1h", 0}, {"8h", http.StatusInternalServerError}} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			e.ok(logical.UpdateOperation, "roles/web", map[string]any{"ttl": "12h", "max_ttl": "24h"})
			resp := e.creds("web")
			e.crash()
			e.ticks(6 * time.Hour)
			e.ok(logical.UpdateOperation, "roles/web", map[string]any{"ttl": "1h", "max_ttl": change.maxTTL})
			if change.status != 0 {
				e.always(http.MethodPost, "/api_keys/", change.status)
			}
			if err := failure(e.lease(logical.RenewOperation, resp.Secret)); err == nil {
				t.Errorf("renewal after max_ttl became %s: got success, want an error", change.maxTTL)
			}
			e.ticks(4 * time.Hour)
			if !e.sim.Use(resp.Data["api_key"].(string)) {
				t.Errorf("two hours before its lease's end, after max_ttl became %s, the key is not accepted", change.maxTTL)
			}
			e.ticks(3 * time.Hour)
			e.accounts(0)
		})
	}
}

// TestUndoneAfterIssue: a request that ends when all was done leaves nothing, not even where
// its deletion fails and the process ends.
func TestUndoneAfterIssue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		puts := 0
		e.storage.Storage = &hooks{Storage: e.storage.Storage, afterPut: func(string) {
			if puts++; puts == 2 {
				cancel()
			}
		}}
		e.always(http.MethodDelete, "", http.StatusInternalServerError)
		resp, err := e.b.HandleRequest(ctx, &logical.Request{Operation: logical.ReadOperation, Path: "creds/web", Storage: e.storage})
		if err := failure(resp, err); !errors.Is(err, context.Canceled) {
			t.Errorf("creds: got error %v, want that the request was cancelled", err)
		}
		e.accounts(1)
		e.crash()
		e.sim.ClearFaults()
		e.ticks(4 * time.Minute)
		e.accounts(0)
	})
}

// TestLostIsNotSpared, nor left to rollback for nothing, where the entry of what was issued
// can't be deleted.
func TestLostIsNotSpared(t *testing.T) {
	for _, hangs := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			e.sim.SetLatency(50 * time.Millisecond)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			puts := 0
			storage := hooks{Storage: e.storage.Storage, afterPut: func(key string) {
				if puts++; puts != 2 {
					return
				}
				cancel()
				e.storage.Storage.(*hooks).beforeDelete = func(ctx context.Context, deleted string) error {
					if deleted != key {
						return nil
					}
					if hangs {
						<-ctx.Done()
					}
					return errors.New("storage fault")
				}
			}}
			e.storage.Storage = &storage
			if !hangs {
				e.always(http.MethodDelete, "", http.StatusInternalServerError)
			}
			resp, err := e.b.HandleRequest(ctx, &logical.Request{Operation: logical.ReadOperation, Path: "creds/web", Storage: e.storage})
			if err := failure(resp, err); !errors.Is(err, context.Canceled) {
				t.Errorf("creds: got error %v, want that the request was cancelled", err)
			}
			if hangs {
				e.accounts(0)
			} else {
				e.accounts(1)
			}
			e.sim.ClearFaults()
			e.ticks(10 * time.Minute)
			e.accounts(0)
		})
	}
}

// TestRollbackUnderWay: what is under way is not rolled back, whatever the clock says.
func TestRollbackUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		age := func() {
			for _, id := range e.keys(framework.WALPrefix) {
				entry, err := framework.GetWAL(t.Context(), e.storage.Storage, id)
				if err != nil {
					t.Fatal(err)
				}
				entry.CreatedAt -= int64((2 * walMinAge).Seconds())
				if err := putJSON(t.Context(), e.storage.Storage, framework.WALPrefix+id, entry); err != nil {
					t.Fatal(err)
				}
			}
		}
		e.restartOn(nil, roundTrip(func(req *http.Request) (*http.Response, error) {
			resp, err := e.wire.RoundTrip(req)
			if req.Method == http.MethodPost {
				age()
				e.tick()
			}
			return resp, err
		}))
		resp := e.creds("web")
		time.Sleep(time.Second / 2) // not when the plugin deletes: age would put the entry back
		for range 30 {
			age()
			e.tick()
			time.Sleep(time.Second)
		}
		if !e.sim.Use(resp.Data["api_key"].(string)) {
			t.Error("a credential was handed out that rollback had deleted")
		}
		if got := e.logged("ERROR", ""); got != 0 {
			t.Errorf("errors in the log: got %d, want none", got)
		}
		for what, got := range e.metric("rollbacks_total").(map[string]float64) {
			if got != 0 {
				t.Errorf("rollbacks: got %v of %s, want none", got, what)
			}
		}
	})
	// The entry is deleted late, and storage is so slow that a rollback which began before
	// would not find what spares the credentials.
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		var have []*logical.Response
		for range 7 { // 1, 2, 4
			have = append(have, e.creds("web"))
		}
		var last string // the entry of four names
		for _, id := range e.keys(framework.WALPrefix) {
			entry, err := framework.GetWAL(t.Context(), e.storage.Storage, id)
			if err != nil {
				t.Fatal(err)
			}
			var p pendingCredentials
			if err := decode(entry.Data, &p); err == nil && len(p.Names) == 4 {
				last = id
			}
		}
		e.storage.setFault(func(verb, key string) error {
			if verb == "delete" && key == framework.WALPrefix+last {
				return errors.New("storage fault")
			}
			return nil
		})
		time.Sleep(8 * time.Second)
		e.storage.setFault(nil) // before the second try
		entry, err := framework.GetWAL(t.Context(), e.storage.Storage, last)
		if err != nil || entry == nil {
			t.Fatalf("entry: got %v, %v", entry, err)
		}
		entry.CreatedAt -= int64((2 * walMinAge).Seconds())
		if err := putJSON(t.Context(), e.storage.Storage, framework.WALPrefix+last, entry); err != nil {
			t.Fatal(err)
		}
		e.storage.Storage = &hooks{Storage: e.storage.Storage, afterGet: func(key string) {
			if key != framework.WALPrefix+last {
				time.Sleep(5 * time.Second)
			}
		}}
		e.tick()
		time.Sleep(time.Minute)
		for _, resp := range have {
			if !e.sim.Use(resp.Data["api_key"].(string)) {
				t.Error("a rollback has deleted what was handed out")
			}
		}
		if got := e.keys(framework.WALPrefix); len(got) != 0 {
			t.Errorf("write-ahead-log entries: got %d, want none", len(got))
		}
	})
}

// TestPassiveNode: what is to be undone or cleaned up is left to the active node.
func TestPassiveNode(t *testing.T) {
	for _, state := range []consts.ReplicationState{consts.ReplicationPerformanceStandby, consts.ReplicationDRSecondary} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			e.lostAnswer()
			secret := e.creds("web").Secret
			e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Status: http.StatusInternalServerError, Times: 4})
			if err := failure(e.lease(logical.RevokeOperation, secret)); err == nil {
				t.Error("revocation: got success, want an error")
			}
			time.Sleep(time.Minute)
			e.sim.ResetCalls()
			e.system.ReplicationStateVal = state
			e.ticks(10 * time.Minute)
			if calls := e.sim.Calls(); len(calls) != 0 || e.logged("ERROR", "rollback") != 0 {
				t.Errorf("calls to OpenAI: got %v, want none", calls)
			}
			e.accounts(2)
			e.system.ReplicationStateVal = 0
			e.ticks(2 * time.Minute)
			e.accounts(0)
		})
	}
}

// TestRevokedAtOnce: Vault revokes once, and right away, what it can't store the lease of. The
// process may end meanwhile, or storage fail.
func TestRevokedAtOnce(t *testing.T) {
	for _, crash := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			secret := e.creds("web").Secret
			e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Kind: "hang", Times: -1})
			var group sync.WaitGroup
			group.Go(func() {
				if err := failure(e.lease(logical.RevokeOperation, secret)); err == nil {
					t.Error("revocation: got success, want an error")
				}
			})
			time.Sleep(30 * time.Second) // enough for the reservation to settle
			synctest.Wait()
			if crash {
				e.crash()
			} else {
				e.storage.setFault(func(string, string) error { return errors.New("storage fault") })
			}
			time.Sleep(2 * time.Minute)
			group.Wait()
			e.storage.setFault(nil)
			e.sim.ClearFaults()
			e.ticks(62 * time.Minute)
			e.accounts(0)
			if got := e.keys(framework.WALPrefix); len(got) != 0 {
				t.Errorf("write-ahead-log entries: got %d, want none", len(got))
			}
		})
	}
	// Entries that were kept for a revocation under way are gone when it has ended.
	for _, kind := range []string{"slow", "hang"} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			secret := e.creds("web").Secret
			if kind == "slow" {
				e.sim.SetLatency(25 * time.Second)
			} else {
				e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Kind: kind, Times: -1})
			}
			if err := failure(e.lease(logical.RevokeOperation, secret)); (err == nil) != (kind == "slow") {
				t.Errorf("%s revocation: got %v", kind, err)
			}
			if got := e.keys(framework.WALPrefix); len(got) != 0 {
				t.Errorf("write-ahead-log entries after a %s revocation: got %d, want none", kind, len(got))
			}
		})
	}
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		for _, wait := range []time.Duration{0, time.Minute} {
			secret := e.creds("web").Secret
			time.Sleep(wait)
			e.storage.setFault(func(verb, key string) error {
				if strings.HasPrefix(key, cleanupPrefix) {
					return errors.New("storage fault")
				}
				return nil
			})
			e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Status: http.StatusInternalServerError, Times: 4})
			if err := failure(e.lease(logical.RevokeOperation, secret)); err == nil {
				t.Error("revocation: got success, want an error")
			}
			e.storage.setFault(nil)
			e.revoke(secret)
			time.Sleep(time.Minute)
		}
		e.b.unsettled.Range(func(name, _ any) bool {
			t.Errorf("%v, which is revoked, is still remembered in memory", name)
			return false
		})
		e.accounts(0)
	})
}

// TestReadsDoNotWait for the storage operations of others: neither for the answer, when all
// is done, nor at all, when their names are not shared; and those that have to wait do it
// together. A mutex is waited for, so this is in real time.
func TestReadsDoNotWait(t *testing.T) {
	const patience = 10 * time.Second
	read := func(e *env) chan error {
		done := make(chan error, 1)
		go func() { done <- failure(e.do(logical.ReadOperation, "creds/web", nil)) }()
		return done
	}
	finish := func(t *testing.T, what string, done chan error) {
		t.Helper()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
		case <-time.After(patience):
			t.Errorf("%s: not answered within %v", what, patience)
		}
	}
	// blockPut makes the nth put from now on wait until it is let go.
	blockPut := func(e *env, nth int32) (reached, letGo chan struct{}, puts *atomic.Int32) {
		reached, letGo, puts = make(chan struct{}), make(chan struct{}), &atomic.Int32{}
		e.storage.Storage = &hooks{Storage: e.storage.Storage, beforePut: func(string) {
			if puts.Add(1) == nth {
				close(reached)
				<-letGo
			}
		}}
		return reached, letGo, puts
	}

	t.Run("with the answer", func(t *testing.T) {
		e := newConfiguredEnv(t)
		reached, letGo, _ := blockPut(e, 2)
		atOpenAI, answer := make(chan struct{}), make(chan struct{})
		var once sync.Once
		e.restartOn(nil, roundTrip(func(req *http.Request) (*http.Response, error) {
			once.Do(func() { close(atOpenAI); <-answer })
			return e.wire.RoundTrip(req)
		}))
		first := read(e)
		<-atOpenAI
		second := read(e)
		<-reached
		close(answer)
		finish(t, "a read while the next one's entry is stored", first)
		close(letGo)
		finish(t, "the next read", second)
	})

	t.Run("names of their own", func(t *testing.T) {
		e := newConfiguredEnv(t)
		e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_name_template": "{{.DisplayName}}-{{.RandomSuffix}}"})
		reached, letGo, _ := blockPut(e, 1)
		first := read(e)
		<-reached
		finish(t, "a read while another's entry is stored", read(e))
		close(letGo)
		finish(t, "the other read", first)
	})

	t.Run("a burst", func(t *testing.T) {
		e := newConfiguredEnv(t)
		reached, letGo, puts := blockPut(e, 1)
		reads := []chan error{read(e)}
		<-reached
		for range 9 {
			reads = append(reads, read(e))
		}
		r, err := e.b.cachedRole(t.Context(), e.storage, "web")
		if err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(patience); r.waiting.Load() < 10 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
		close(letGo)
		for _, done := range reads {
			finish(t, "a read of a burst", done)
		}
		if got := puts.Load(); got != 12 {
			t.Errorf("puts of ten reads at once: got %d, want one for the first, one for the others and ten for what was issued", got)
		}
	})
}

// TestReservations: reads that follow each other closely share entries of the write-ahead log,
// of as many names as they need; single reads have their own.
func TestReservations(t *testing.T) {
	reserved := func(e *env) (names []int) { // of each entry
		for _, id := range e.keys(framework.WALPrefix) {
			entry, err := framework.GetWAL(context.Background(), e.storage.Storage, id)
			if err != nil {
				t.Fatal(err)
			}
			var p pendingCredentials
			if err := decode(entry.Data, &p); entry.Kind == walCredential && err == nil {
				names = append(names, len(p.Names))
			}
		}
		slices.Sort(names)
		return names
	}
	expect := func(t *testing.T, when string, got, want []int) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("names of the entries %s: got %v, want %v", when, got, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		count := e.storageCalls()
		for range 100 {
			e.creds("web")
		}
		if count["put"] != 100+8 { // 1, 2, 4, 8, 16, 32, 32, 32
			t.Errorf("puts for 100 credentials: got %d, want 108", count["put"])
		}
		expect(t, "at once", reserved(e), []int{1, 2, 4, 8, 16, 32, 32, 32})
		time.Sleep(3 * time.Second)
		expect(t, "when all but the last are used up", reserved(e), []int{32})
		time.Sleep(4 * time.Second)
		expect(t, "when nobody came", reserved(e), nil)
		e.creds("web")
		expect(t, "of twice as many as were taken", reserved(e), []int{10}) // 5 of the last 32
		time.Sleep(roleCacheTime)
		e.creds("web")
		expect(t, "of a single read", reserved(e), []int{1})
		e.accounts(102)
	})
	for _, template := range []string{"{{.DisplayName}}-{{.RandomSuffix}}", "{{unix_time}}-{{.RandomSuffix}}", "{{timestamp \"2006\"}}-{{.RandomSuffix}}", "{{.}}-{{.RandomSuffix}}", "{{with $}}{{.}}{{end}}-{{.RandomSuffix}}"} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_name_template": template})
			for _, who := range []string{"alice", "bob", "carol"} {
				e.who = who
				if got := e.creds("web").Data["service_account"].(string); strings.Contains(template, "Display") && !strings.HasPrefix(got, who) {
					t.Errorf("name for %s: got %s", who, got)
				}
			}
			expect(t, "of "+template, reserved(e), []int{1, 1, 1})
		})
	}
	// Names belong to the role as it was.
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		e.sim.AddProject("proj_other", "other")
		e.creds("web")
		e.creds("web")
		e.ok(logical.UpdateOperation, "roles/web", map[string]any{"project_id": "proj_other"})
		e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Path: "service_accounts$", Process: true})
		if err := failure(e.do(logical.ReadOperation, "creds/web", nil)); err == nil {
			t.Error("creds: got success, want an error")
		}
		e.crash()
		e.ticks(4 * time.Minute)
		if got := e.sim.ServiceAccounts("proj_other"); len(got) != 0 {
			t.Errorf("accounts in the other project: got %v, want none", got)
		}
		e.accounts(2)
	})
}

// TestSharedReservation: of credentials that share an entry, one was issued, one was issued and
// renewed, one was lost at OpenAI or still is under way, and one was never made. Whenever the
// process ends, and whatever storage then does not take, the issued ones stay and the lost one goes.
func TestSharedReservation(t *testing.T) {
	all := func(verb, key string) error { return errors.New("storage fault") }
	for name, fault := range map[string]func(verb, key string) error{
		"none": nil,
		"put":  func(verb, _ string) error { return map[string]error{"put": errors.New("storage fault")}[verb] },
		"delete": func(verb, _ string) error {
			return map[string]error{"delete": errors.New("storage fault")}[verb]
		},
		"all": all,
	} {
		for _, kind := range []string{"close", "hang"} {
			for _, account := range []bool{false, true} {
				for _, after := range []int{0, 1, 2, 4, 5, 6, 7, 11, 12, 13, 16, 17, 24, 25, 26, 27, 35, 36, 37, 45} { // seconds
					synctest.Test(t, func(t *testing.T) {
						e := newConfiguredEnv(t)
						there := 0
						if account {
							there = 1
							e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_id": e.sim.AddServiceAccount(openaisim.DefaultProject, "there", "member")})
						}
						e.ok(logical.UpdateOperation, "roles/web", map[string]any{"ttl": "10m", "max_ttl": "30m"})
						var have []*logical.Response
						for range 5 { // 1, 2, 2 of 4
							have = append(have, e.creds("web"))
						}
						issued, renewed := have[3], have[4]
						e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Kind: kind, Process: true})
						var group sync.WaitGroup
						group.Go(func() {
							if err := failure(e.do(logical.ReadOperation, "creds/web", nil)); err == nil {
								t.Error("creds: got success, want an error")
							}
						})
						synctest.Wait()
						e.storage.setFault(fault)
						time.Sleep(time.Duration(after) * time.Second)
						e.storage.setFault(nil)
						resp, err := e.lease(logical.RenewOperation, renewed.Secret)
						if failure(resp, err) != nil {
							t.Fatal(err)
						}
						e.crash()
						e.ticks(8 * time.Minute)
						group.Wait()
						if got := len(e.sim.ProjectKeys(openaisim.DefaultProject)); got != 5 {
							t.Errorf("keys after rollback: got %d, want the 5 that were issued", got)
						}
						if !e.sim.Use(issued.Data["api_key"].(string)) || !e.sim.Use(renewed.Data["api_key"].(string)) {
							t.Error("a key that was issued is not accepted")
						}
						resp.Secret.IssueTime = renewed.Secret.IssueTime
						e.renew(resp.Secret)
						e.ticks(6 * time.Minute)
						if !e.sim.Use(renewed.Data["api_key"].(string)) {
							t.Error("the key that was renewed twice is not accepted")
						}
						for _, r := range have {
							e.revoke(r.Secret)
						}
						e.ticks(30 * time.Minute)
						e.nothingPending()
						if got := len(e.sim.ServiceAccounts(openaisim.DefaultProject)) + len(e.sim.ProjectKeys(openaisim.DefaultProject)); got != there {
							t.Errorf("accounts and keys in the end: got %d, want %d", got, there)
						}
						if got := e.keys(framework.WALPrefix); len(got) != 0 {
							t.Errorf("write-ahead-log entries in the end: got %d, want none", len(got))
						}
						if t.Failed() {
							t.Logf("storage fault: %s, at OpenAI: %s, existing account: %v, ended after %d s", name, kind, account, after)
						}
					})
					if t.Failed() {
						return
					}
				}
			}
		}
	}
}

// lostAnswer reads a credential whose creation at OpenAI is answered 500 after it was
// carried out, and returns its name.
func (e *env) lostAnswer() string {
	e.t.Helper()
	e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Path: "service_accounts$", Process: true})
	if err := failure(e.do(logical.ReadOperation, "creds/web", nil)); err == nil {
		e.t.Fatal("creds: got success, want an error")
	}
	accounts := e.sim.ServiceAccounts(openaisim.DefaultProject)
	return accounts[len(accounts)-1].Name
}

// TestRollbackPages: rollback finds the account on whatever page, and spares all those whose
// names are only alike.
func TestRollbackPages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		for i := range 230 {
			e.sim.AddServiceAccount(openaisim.DefaultProject, fmt.Sprint("other-", i), "member")
		}
		name := e.lostAnswer()
		for _, alike := range []string{name + "-2", name[:len(name)-1], "x" + name, strings.ToUpper(name), name + " "} {
			e.sim.AddServiceAccount(openaisim.DefaultProject, alike, "member")
		}
		e.ticks(time.Minute)
		if got := len(e.sim.ServiceAccounts(openaisim.DefaultProject)); got != 236 {
			t.Errorf("accounts before the entry is old enough: got %d, want 236", got)
		}
		e.ticks(2 * time.Minute)
		accounts := e.sim.ServiceAccounts(openaisim.DefaultProject)
		if len(accounts) != 235 || slices.ContainsFunc(accounts, func(a openaisim.ServiceAccount) bool { return a.Name == name }) {
			t.Errorf("accounts after rollback: got %d, want 235 without %q", len(accounts), name)
		}
		e.nothingPending()
	})
}

// TestRollbackGivesUp a day after the key must have expired, and never where it does not.
func TestRollbackGivesUp(t *testing.T) {
	for _, expiring := range []bool{true, false} {
		t.Run(fmt.Sprint(expiring), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				e.ok(logical.UpdateOperation, "roles/web", map[string]any{"enforce_key_expiry": expiring, "ttl": "1h", "max_ttl": "2h"})
				e.lostAnswer()
				e.always(http.MethodGet, "service_accounts$", 403)
				time.Sleep(26 * time.Hour)
				e.sim.ResetCalls()
				e.tick()
				if got := len(e.keys(framework.WALPrefix)); got != 1 || e.countCalls(http.MethodGet, "service_accounts") == 0 {
					t.Errorf("entries a day after the lease's end: got %d, want that it is still tried", got)
				}
				time.Sleep(10 * time.Minute)
				e.tick()
				if got := len(e.keys(framework.WALPrefix)) == 0; got != expiring {
					t.Errorf("given up: got %v, want %v", got, expiring)
				}
				if got := e.logged("ERROR", "gave up") == 1; got != expiring {
					t.Errorf("told that it was given up: got %v, want %v", got, expiring)
				}
				if got := e.metric("rollbacks_total").(map[string]float64)[`kind="credential",result="success"`]; got != 0 {
					t.Errorf("successful rollbacks: got %v, want 0", got)
				}
				if got := e.logged("ERROR", "rollback failed"); got == 0 {
					t.Error("failing rollbacks are not logged")
				}
				time.Sleep(100 * 24 * time.Hour)
				e.sim.ClearFaults()
				e.tick()
				if got := len(e.sim.ServiceAccounts(openaisim.DefaultProject)) == 0; got == expiring {
					t.Errorf("deleted in the end: got %v, want %v", got, !expiring)
				}
			})
		})
	}
}

// storageCalls counts the operations on storage from now on, by verb.
func (e *env) storageCalls() map[string]int {
	count := map[string]int{}
	e.storage.setFault(func(verb, key string) error {
		count[verb]++
		return nil
	})
	return count
}

// TestStorageCost: a credential costs one entry, unless another has just reserved its name a
// second, and their deletion; its end costs nothing.
func TestStorageCost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		e.creds("web")
		time.Sleep(roleCacheTime / 2)
		for i, want := range []map[string]int{{"put": 2}, {"put": 1}} {
			count := e.storageCalls()
			resp := e.creds("web")
			if !maps.Equal(count, want) {
				t.Errorf("storage operations of credential %d: got %v, want %v", i, count, want)
			}
			count = e.storageCalls()
			e.revoke(resp.Secret)
			if len(count) != 0 {
				t.Errorf("storage operations of a revocation: got %v, want none", count)
			}
		}
		count := e.storageCalls()
		time.Sleep(2 * settleTime)
		synctest.Wait()
		if want := map[string]int{"delete": 4}; !maps.Equal(count, want) { // an entry of two names; three were issued
			t.Errorf("storage operations afterwards: got %v, want %v", count, want)
		}
	})
}

// TestRevokeShortFault: three failures in a row are over within the call.
func TestRevokeShortFault(t *testing.T) {
	for _, fault := range []openaisim.Fault{
		{Status: 500}, {Status: 503, Header: http.Header{"Retry-After": {"5"}}}, {Status: 429, Header: http.Header{"Retry-After": {"5"}}},
		{Kind: "close"}, {Kind: "refuse"}, {Kind: "close", Process: true},
	} {
		t.Run(fmt.Sprint(fault.Status, fault.Kind), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				resp := e.creds("web")
				fault.Method, fault.Times = http.MethodDelete, 3
				e.sim.Inject(fault)
				start := time.Now()
				e.revoke(resp.Secret)
				if took := time.Since(start); took > 20*time.Second {
					t.Errorf("revocation: took %v, want at most 20s", took)
				}
				e.accounts(0)
				e.nothingPending()
			})
		})
	}
}

// TestRevokeHandedOver: a revocation that keeps failing is remembered, and after its fifth
// failure it is the plugin's alone, which tries until OpenAI confirms.
func TestRevokeHandedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		e.ok(logical.CreateOperation, "roles/key", map[string]any{
			"project_id": openaisim.DefaultProject, "service_account_id": e.sim.AddServiceAccount(openaisim.DefaultProject, "there", "member"),
		})
		secrets := []*logical.Secret{e.creds("web").Secret, e.creds("key").Secret}
		e.always(http.MethodDelete, "projects", 500)
		for attempt := 1; attempt <= 6; attempt++ {
			for i, secret := range secrets {
				start := time.Now()
				err := failure(e.lease(logical.RevokeOperation, secret))
				if (err == nil) != (attempt >= 5) {
					t.Errorf("attempt %d: got %v, want an error up to the fourth", attempt, err)
				}
				if took := time.Since(start); took > 60*time.Second {
					t.Errorf("attempt %d: took %v, want at most 60s", attempt, took)
				}
				id := []string{"service_account_id", "api_key_id"}[i]
				entry, err := e.storage.Get(t.Context(), cleanupPrefix+secret.InternalData[id].(string))
				if err != nil || entry == nil || !strings.Contains(string(entry.Value), fmt.Sprintf(`"failures":%d`, attempt)) {
					t.Errorf("attempt %d: clean-up entry: got %v, %v, want that count", attempt, entry, err)
				}
			}
			if got, want := e.logged("ERROR", "revocation keeps failing"), 2*max(0, attempt-4); got != want {
				t.Errorf("attempt %d: error lines: got %d, want %d", attempt, got, want)
			}
		}
		if got := e.metric(metricHandedOver).(float64); got < 2 {
			t.Errorf("metric: got %v handed over, want 2", got)
		}
		e.ticks(5 * time.Minute)
		e.b.unsettled.Range(func(name, _ any) bool {
			t.Errorf("%v, which a clean-up entry remembers, is also remembered in memory", name)
			return false
		})
		if got := e.metric("cleanups_pending"); got != float64(2) {
			t.Errorf("metric: got %v clean-ups pending, want 2", got)
		}
		e.restart()
		e.sim.ClearFaults()
		e.ticks(time.Minute)
		if accounts, keys := e.sim.ServiceAccounts(openaisim.DefaultProject), e.sim.ProjectKeys(openaisim.DefaultProject); len(accounts) != 1 || len(keys) != 0 {
			t.Errorf("after OpenAI has recovered: got accounts %v and keys %v, want the existing account alone", accounts, keys)
		}
		if got := e.metric("cleanups_pending"); got != float64(0) {
			t.Errorf("metric: got %v clean-ups pending, want 0", got)
		}
		e.nothingPending()
	})
}

// TestRevokeStorageFault: where the failure can't be remembered, Vault is told of both.
func TestRevokeStorageFault(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		secret := e.creds("web").Secret
		e.always(http.MethodDelete, "projects", 403)
		e.storage.setFault(func(verb, key string) error {
			if verb == "put" {
				return errStep
			}
			return nil
		})
		for range 7 {
			err := failure(e.lease(logical.RevokeOperation, secret))
			if err == nil || !strings.Contains(err.Error(), errStep.Error()) || !strings.Contains(err.Error(), "403") {
				t.Errorf("revoke: got %v, want both failures", err)
			}
		}
		// Vault may not try again, as when it could not store the lease.
		e.storage.setFault(nil)
		e.sim.ClearFaults()
		e.ticks(30 * time.Minute)
		e.accounts(1)
		e.ticks(35 * time.Minute)
		e.accounts(0)
		e.nothingPending()
	})
}

// TestTakeoverCount: the failures that lead to a takeover are those of revocations.
func TestTakeoverCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		secret := e.creds("web").Secret
		e.crash()
		e.always(http.MethodDelete, "projects", 403)
		time.Sleep(62 * time.Minute)
		e.tick() // the entry becomes one for clean-up
		if got := len(e.keys(cleanupPrefix)); got != 1 {
			t.Errorf("clean-up entries: got %d, want 1", got)
		}
		for attempt := 1; attempt <= maxRevokeFailures; attempt++ {
			if err := failure(e.lease(logical.RevokeOperation, secret)); (err == nil) != (attempt == maxRevokeFailures) {
				t.Errorf("attempt %d: got %v, want a takeover at the fifth", attempt, err)
			}
		}
		e.sim.ClearFaults()
		e.tick()
		e.accounts(0)
		e.nothingPending()
	})
}

// TestOtherOrganization: to another organization's key nothing of the former one exists, which
// must not pass for a revocation.
func TestOtherOrganization(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		e.failing(openaisim.Fault{Method: http.MethodDelete, Path: "/admin_api_keys/"})
		e.ok(logical.UpdateOperation, "config/rotate", nil)
		e.sim.ClearFaults()
		first, second := e.creds("web").Secret, e.creds("web").Secret
		e.lostAnswer()
		old := e.config()
		if len(old.PendingDeletion) != 1 {
			t.Fatalf("admin keys pending deletion: got %d, want 1", len(old.PendingDeletion))
		}
		e.always("", "", http.StatusNotFound) // as OpenAI would say of the other organization's things
		resp := e.set(map[string]any{
			"organization_id": "org-other", "admin_api_key": "sk-admin-other", "admin_api_key_id": "key_other", "verify_connection": false,
		})
		if got := fmt.Sprint(resp.Warnings); !strings.Contains(got, "former organization") || !strings.Contains(got, old.PendingDeletion[0]) {
			t.Errorf("warnings: got %s, want the former organization and its key", got)
		}
		if got := e.config().PendingDeletion; len(got) != 0 {
			t.Errorf("the former organization's admin keys pending deletion: got %q, want none", got)
		}
		for attempt := 1; attempt <= maxRevokeFailures; attempt++ {
			if err := failure(e.lease(logical.RevokeOperation, first)); (err == nil) != (attempt == maxRevokeFailures) {
				t.Errorf("revocation %d: got %v, want an error before the takeover", attempt, err)
			}
		}
		if err := failure(e.lease(logical.RevokeOperation, second)); err == nil || !strings.Contains(err.Error(), openaisim.DefaultOrganization) {
			t.Errorf("revocation: got %v, want an error that names %s", err, openaisim.DefaultOrganization)
		}
		e.ticks(10 * time.Minute)
		e.accounts(3)
		e.sim.ClearFaults()
		e.set(map[string]any{
			"organization_id": old.OrganizationID, "admin_api_key": old.AdminAPIKey, "admin_api_key_id": old.AdminAPIKeyID,
		})
		e.ticks(2 * time.Minute)
		e.accounts(0)
		e.nothingPending()
	})
}

// TestOrganizationChangesMeanwhile: a name that was reserved in one organization is not used in
// another one, where rollback would look for it in vain.
func TestOrganizationChangesMeanwhile(t *testing.T) {
	for _, account := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			e := newConfiguredEnv(t)
			if account {
				e.ok(logical.UpdateOperation, "roles/web", map[string]any{"service_account_id": e.sim.AddServiceAccount(openaisim.DefaultProject, "there", "member")})
			}
			change := func(organization string) {
				e.set(map[string]any{"organization_id": organization, "verify_connection": false})
			}
			if account { // by another node
				other := *e
				other.restart()
				change = func(organization string) {
					other.set(map[string]any{"organization_id": organization, "verify_connection": false})
					e.b.Backend.Invalidate(t.Context(), configPath)
				}
			}
			e.creds("web")
			e.creds("web") // with a second name reserved, for nobody yet
			puts := 0
			e.storage.Storage = &hooks{Storage: e.storage.Storage, afterPut: func(key string) {
				if puts++; puts == 2 { // the first is of the second name's credential
					change("org-other")
				}
			}}
			e.creds("web")
			e.sim.ResetCalls()
			resp, err := e.do(logical.ReadOperation, "creds/web", nil)
			if err := failure(resp, err); err == nil || !strings.Contains(err.Error(), openaisim.DefaultOrganization) {
				t.Errorf("creds: got %v, want an error that names the former organization", err)
			}
			if calls := e.sim.Calls(); len(calls) != 0 {
				t.Errorf("calls to OpenAI: got %v, want none", calls)
			}
			change(openaisim.DefaultOrganization)
			e.creds("web")
			e.creds("web") // once more with a second name
			change("org-other")
			resp, err = e.do(logical.ReadOperation, "creds/web", nil)
			if err := failure(resp, err); err == nil || errors.Is(err, errOtherOrganization) {
				t.Errorf("creds after the change: got %v, want what OpenAI answers", err)
			}
			if got := len(e.sim.ProjectKeys(openaisim.DefaultProject)); got != 5 {
				t.Errorf("keys: got %d, want 5", got)
			}
			e.nothingPending()
		})
	}
}

// TestTemplateMemory: what a template makes of a long name of a token or a role is bounded.
func TestTemplateMemory(t *testing.T) {
	raw := "{{.DisplayName" + strings.Repeat("|base64", 28) + "|truncate 20}}-{{.RandomSuffix}}"
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	name, err := renderName(raw, nameData{DisplayName: strings.Repeat("n", 100_000), RandomSuffix: "0123456789"})
	runtime.ReadMemStats(&after)
	if err != nil || !strings.HasSuffix(name, "-0123456789") {
		t.Errorf("got %q, %v, want a name", name, err)
	}
	if got := after.TotalAlloc - before.TotalAlloc; got > 64<<20 {
		t.Errorf("memory for a name: got %d MiB, want at most 64", got>>20)
	}
}

// TestRevokeOutage: an hour of failures ends with every account gone, no lease given up by Vault, and
// nobody's help.
func TestRevokeOutage(t *testing.T) {
	hang := openaisim.Fault{Kind: "hang", Times: -1}
	for _, fault := range []openaisim.Fault{
		{Status: 500, Times: -1}, {Status: 429, Times: -1}, {Status: 429, Times: -1, Header: http.Header{"Retry-After": {"20"}}},
		{Status: 401, Times: -1}, {Kind: "refuse", Times: -1}, hang,
	} {
		t.Run(fmt.Sprint(fault.Status, fault.Kind, fault.Header), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				var secrets []*logical.Secret
				for range 30 {
					secrets = append(secrets, e.creds("web").Secret)
				}
				e.sim.Inject(fault)
				end := time.Now().Add(time.Hour)
				var group sync.WaitGroup
				var worst atomic.Int64
				for _, secret := range secrets {
					group.Go(func() { // Vault's schedule
						for attempt := 1; attempt <= 6; attempt++ {
							start := time.Now()
							err := failure(e.lease(logical.RevokeOperation, secret))
							worst.Store(max(worst.Load(), int64(time.Since(start))))
							if err == nil {
								return
							}
							time.Sleep(10 * time.Second << attempt)
						}
						t.Error("a lease became irrevocable")
					})
				}
				for time.Now().Before(end) {
					e.ticks(time.Minute)
				}
				group.Wait()
				if worst := time.Duration(worst.Load()); worst > 70*time.Second {
					t.Errorf("longest revocation: %v, want at most 70s: Vault ends it at 90s", worst)
				}
				e.accounts(30)
				e.sim.ClearFaults()
				e.ticks(3 * time.Minute)
				e.accounts(0)
				e.nothingPending()
			})
		})
	}
}

// TestSweepBound: a periodic call over very many clean-up entries is bounded, and the
// next one goes on where it stopped.
func TestSweepBound(t *testing.T) {
	for _, status := range []int{0, 500, 403} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				entries := 100_000
				if status != 0 {
					entries = 20_000
				}
				e := newConfiguredEnv(t)
				for i := range entries {
					id := fmt.Sprintf("svc_acct_%06d", i)
					entry, err := logical.StorageEntryJSON(cleanupPrefix+id, map[string]any{"project_id": openaisim.DefaultProject, "service_account_id": id, "failures": 5})
					if err == nil {
						err = e.storage.Put(t.Context(), entry)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				e.sim.SetLatency(47 * time.Millisecond) // so that no call ends just when the time is up
				if status != 0 {
					e.always(http.MethodDelete, "projects", status)
				}
				var tried []string
				for tick := range 2 {
					e.sim.ResetCalls()
					start := time.Now()
					e.tick()
					if took := time.Since(start); took > 30*time.Second {
						t.Errorf("periodic call: took %v, want at most 30s", took)
					}
					paths := map[string]bool{}
					for _, c := range e.sim.Calls() {
						if c.Method == http.MethodDelete {
							paths[c.Path] = true
						}
					}
					if len(paths) < 50 || len(paths) > 10_000 {
						t.Errorf("entries tried in tick %d: got %d, want 50 to 10,000", tick, len(paths))
					}
					for path := range paths {
						tried = append(tried, path[strings.LastIndex(path, "/")+1:])
					}
				}
				slices.Sort(tried)
				if again := len(tried) - len(slices.Compact(slices.Clone(tried))); again != 0 {
					t.Errorf("entries tried in both ticks: got %d, want none", again)
				}
				if last := fmt.Sprintf("svc_acct_%06d", len(tried)-1); tried[len(tried)-1] != last {
					t.Errorf("last entry tried: got %s, want %s: none may be left out", tried[len(tried)-1], last)
				}
				if lines := e.logged("WARN", "clean-up failed"); lines > 200 {
					t.Errorf("log: got %d lines of two ticks, want at most 200", lines)
				}
			})
		})
	}
}

// TestPeriodicUnconfigured: without config, periodic work waits, and says so once a tick.
func TestPeriodicUnconfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		e.lostAnswer()
		for range 50 {
			secret := e.creds("web").Secret
			e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Status: 403})
			if err := failure(e.lease(logical.RevokeOperation, secret)); err == nil {
				t.Fatal("revoke: got success, want an error")
			}
		}
		e.ok(logical.DeleteOperation, "config", nil)
		time.Sleep(5 * time.Minute)
		lines := strings.Count(e.log.String(), "\n")
		e.tick()
		if got := strings.Count(e.log.String(), "\n") - lines; got < 1 || got > 5 {
			t.Errorf("log lines of a tick: got %d, want 1 to 5", got)
		}
		e.configure(nil)
		e.failing(openaisim.Fault{Method: http.MethodDelete, Status: 401})
		e.sim.ResetCalls()
		e.tick()
		if got := e.countCalls(http.MethodDelete, "service_accounts"); got > sweepWorkers {
			t.Errorf("deletions with a refused key: got %d, want at most %d", got, sweepWorkers)
		}
		e.sim.ClearFaults()
		e.tick()
		e.accounts(0)
		e.nothingPending()
	})
}

// TestRateLimit: revocations that come all at once drain at OpenAI's pace, about in the
// order in which they came, without many calls in vain.
func TestRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 200
		e := newConfiguredEnv(t)
		var secrets []*logical.Secret
		for range n {
			secrets = append(secrets, e.creds("web").Secret)
		}
		e.sim.ResetCalls()
		e.sim.SetLatency(50 * time.Millisecond)
		e.sim.SetRateLimit(20, 20)
		start := time.Now()
		var mu sync.Mutex
		var order []int
		var group sync.WaitGroup
		for i, secret := range secrets {
			group.Go(func() {
				time.Sleep(time.Duration(i) * time.Microsecond) // they come in this order
				if err := failure(e.lease(logical.RevokeOperation, secret)); err != nil {
					t.Errorf("revoke: %v", err)
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, i)
			})
		}
		group.Wait()
		took, calls := time.Since(start), e.sim.Calls()
		refused, displaced := 0, 0
		for _, c := range calls {
			if c.Status == http.StatusTooManyRequests {
				refused++
			}
		}
		for rank, i := range order {
			displaced += max(rank-i, i-rank)
		}
		t.Logf("%d revocations: %v, %d of %d calls refused, mean displacement %d", n, took, refused, len(calls), displaced/n)
		if took > 11500*time.Millisecond {
			t.Errorf("took %v, want at most 11.5s", took)
		}
		if got := 100 * refused / len(calls); got >= 35 {
			t.Errorf("calls refused: got %d %%, want less than 35 %%", got)
		}
		if got := displaced / n; got > 40 { // at random it is 67
			t.Errorf("mean distance from the order of arrival: got %d places, want at most 40", got)
		}
		e.accounts(0)

		e.sim.SetRateLimit(0, 0)
		work := func(calls int) time.Duration {
			start, left := time.Now(), atomic.Int64{}
			left.Store(int64(calls))
			for range 32 {
				group.Go(func() {
					for left.Add(-1) >= 0 {
						e.creds("web")
					}
				})
			}
			group.Wait()
			return time.Since(start)
		}
		t.Logf("500 credentials when the limit is lifted: %v", work(500))
		if took := work(320); took > time.Second {
			t.Errorf("320 credentials by 32 workers: took %v, want 0.5s as without a limit", took)
		}
	})
}

// TestRateLimitDeadline: a call whose time is up while it waits says what it waited for, and
// leaves nothing for rollback.
func TestRateLimitDeadline(t *testing.T) {
	for _, after := range [][]string{{"1"}, {"30"}, {""}, {"1", "30"}} { // asked of the callers
		t.Run(strings.Join(after, "-"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				e := newConfiguredEnv(t)
				e.sim.SetLatency(time.Duration(len(after)-1) * 100 * time.Millisecond)
				for i, seconds := range after {
					times := 1
					if i == len(after)-1 {
						times = -1
					}
					e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Status: 429, Times: times, Header: http.Header{"Retry-After": {seconds}}})
				}
				ctx, cancel := context.WithTimeout(t.Context(), 5300*time.Millisecond)
				defer cancel()
				var group sync.WaitGroup
				for i := range after {
					group.Go(func() {
						time.Sleep(time.Duration(i) * 10 * time.Millisecond)
						resp, err := e.b.HandleRequest(ctx, &logical.Request{Operation: logical.ReadOperation, Path: "creds/web", Storage: e.storage})
						if err == nil || resp != nil || !strings.Contains(err.Error(), "429") {
							t.Errorf("creds: got %v, %v, want an error (no 400) that says 429", resp, err)
						}
					})
				}
				group.Wait()
				if got := e.countCalls(http.MethodPost, "service_accounts"); got > 10 {
					t.Errorf("calls in 5.3s: got %d, want at most 10", got)
				}
				e.nothingPending()
			})
		})
	}
}

// TestWaitingSaysWhy: a call that is never sent says what it waited for.
func TestWaitingSaysWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		wait := func(want string) {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, err := e.b.HandleRequest(ctx, &logical.Request{Operation: logical.ReadOperation, Path: "creds/web", Storage: e.storage})
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q in it", err, want)
			}
		}
		e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Status: 429, Header: http.Header{"Retry-After": {"30"}}})
		wait("429")
		wait("waiting for OpenAI's rate limit")
		for range maxCalls {
			e.b.throttle.slots <- struct{}{}
		}
		wait("waiting for other calls to OpenAI")
	})
}

// TestConcurrency is for the race detector: all that a mount can be asked at once.
func TestConcurrency(t *testing.T) {
	e := newConfiguredEnv(t)
	var workers, others sync.WaitGroup
	done := make(chan struct{})
	for range 8 {
		workers.Go(func() {
			for range 20 {
				resp, err := e.do(logical.ReadOperation, "creds/web", nil)
				if err := failure(resp, err); err != nil {
					t.Errorf("creds: %v", err)
					return
				}
				for _, op := range []logical.Operation{logical.RenewOperation, logical.RevokeOperation} {
					resp.Secret.IssueTime = time.Now()
					if err := failure(e.lease(op, resp.Secret)); err != nil {
						t.Errorf("%s: %v", op, err)
					}
				}
			}
		})
	}
	for name, act := range map[string]func() error{
		"rotate": func() error { return failure(e.do(logical.UpdateOperation, "config/rotate", nil)) },
		"config write": func() error {
			return failure(e.do(logical.UpdateOperation, "config", map[string]any{"rotation_policy": "p"}))
		},
		"config read": func() error { return failure(e.do(logical.ReadOperation, "config", nil)) },
		"role write":  func() error { return failure(e.do(logical.UpdateOperation, "roles/web", map[string]any{"ttl": "30m"})) },
		"metrics":     func() error { return failure(e.do(logical.ReadOperation, "metrics", nil)) },
		"invalidate":  func() error { e.b.InvalidateKey(t.Context(), configPath); return nil },
		"tick":        func() error { e.tick(); return nil },
	} {
		others.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				if err := act(); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				time.Sleep(time.Millisecond)
			}
		})
	}
	workers.Wait()
	close(done)
	others.Wait()
	e.tick()
	e.oneKey()
	e.accounts(0)
}

// TestPeriodicBound: all of a periodic call is over in time when OpenAI does not answer, since
// Vault can't be sealed meanwhile.
func TestPeriodicBound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e, _ := newVaultEnv(t, errCommunity)
		e.set(map[string]any{"rotation_period": "1h"})
		for range 20 {
			e.lostAnswer()
		}
		time.Sleep(time.Hour)
		e.sim.Inject(openaisim.Fault{Kind: "hang", Times: -1})
		for range 3 {
			start := time.Now()
			e.tick()
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("periodic call: took %v, want at most 30s", took)
			}
		}
		if got := e.logged("ERROR", "listing"); got != 0 {
			t.Errorf("errors of a sweep that has no time: got %d, want none", got)
		}
		e.sim.ClearFaults()
		e.ticks(2 * time.Minute)
		e.accounts(0)
		e.nothingPending()
	})
}

// TestPeriodicShares: an admin key whose deletion hangs does not keep credentials from being
// cleaned up.
func TestPeriodicShares(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newConfiguredEnv(t)
		resp := e.creds("web")
		e.failing(openaisim.Fault{Method: http.MethodDelete, Status: http.StatusForbidden})
		e.ok(logical.UpdateOperation, "config/rotate", nil)
		if err := failure(e.lease(logical.RevokeOperation, resp.Secret)); err == nil {
			t.Error("revocation: got success, want an error")
		}
		e.sim.ClearFaults()
		e.failing(openaisim.Fault{Method: http.MethodDelete, Path: "/admin_api_keys/", Kind: "hang"})
		e.tick()
		e.accounts(0)
		if got := e.config().PendingDeletion; len(got) != 1 {
			t.Errorf("admin keys pending deletion: got %d, want 1", len(got))
		}
		e.sim.ClearFaults()
		e.tick()
		e.oneKey()
	})
}

// TestMetricsDocumented: whoever adds a metric adds it to README and to the dashboard.
func TestMetricsDocumented(t *testing.T) {
	for _, file := range []string{"README.md", "examples/grafana/dashboard.json"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if !strings.Contains(string(text), metricPrefix+f.name) {
				t.Errorf("%s lacks %s", file, metricPrefix+f.name)
			}
		}
	}
}

// TestKeyStaysAtItsEndpoint: who may write config, but does not know the key, can't have it
// sent elsewhere.
func TestKeyStaysAtItsEndpoint(t *testing.T) {
	e := newConfiguredEnv(t)
	before := e.config()
	for _, data := range []map[string]any{
		{"api_endpoint": "https://example.com/v1"},
		{"api_endpoint": "https://example.com/v1", "verify_connection": false},
	} {
		e.refused(logical.UpdateOperation, "config", data, "api_endpoint", "admin_api_key")
	}
	e.ok(logical.UpdateOperation, "config", map[string]any{"api_endpoint": before.APIEndpoint})
	if got := e.config(); got.APIEndpoint != before.APIEndpoint {
		t.Errorf("endpoint: got %q, want %q", got.APIEndpoint, before.APIEndpoint)
	}
}

// TestExistenceCheck leaves bad input to the write, whose answer does not quote it.
func TestExistenceCheck(t *testing.T) {
	e := newConfiguredEnv(t)
	for path, want := range map[string]bool{"config": true, "roles/web": true, "roles/other": false} {
		if _, got, err := e.b.HandleExistenceCheck(context.Background(), &logical.Request{Path: path, Operation: logical.CreateOperation, Storage: e.storage}); got != want || err != nil {
			t.Errorf("%s: got %v (%v), want %v", path, got, err, want)
		}
	}
	secret := map[string]any{"admin_api_key": map[string]any{"x": "sk-admin-secret"}}
	_, _, err := e.b.HandleExistenceCheck(context.Background(), &logical.Request{Path: "config", Operation: logical.CreateOperation, Data: secret, Storage: e.storage})
	if err != nil {
		t.Errorf("bad input: got error %v, want none", err)
	}
	e.refused(logical.UpdateOperation, "config", secret, "admin_api_key does not take this value")
}

// TestSlowRenewal: however long a renewal waits, the key outlives the lease that Vault makes
// of its answer, by no more than a minute, and never goes past the longest life.
func TestSlowRenewal(t *testing.T) {
	limited := func(seconds string) *openaisim.Fault {
		return &openaisim.Fault{Status: 429, Header: http.Header{"Retry-After": {seconds}}}
	}
	for name, tt := range map[string]struct {
		fault   *openaisim.Fault
		latency time.Duration
	}{
		"slow answer": {nil, 24 * time.Second}, "slow errors": {&openaisim.Fault{Times: 2}, 20 * time.Second},
		"limited": {limited("40"), 0}, "limited for a minute": {limited("60"), 0}, "limited, slow answer": {limited("45"), 12 * time.Second},
	} {
		for i, age := range []time.Duration{30 * time.Minute, 90 * time.Minute, 90 * time.Minute} { // bounded by ttl, by max_ttl, by the mount
			t.Run(fmt.Sprint(name, i), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newConfiguredEnv(t)
					e.ok(logical.UpdateOperation, "roles/web", map[string]any{"ttl": "1h", "max_ttl": []string{"2h", "2h", "3h"}[i]})
					e.system.MaxLeaseTTLVal = 2 * time.Hour
					secret := e.ok(logical.ReadOperation, "creds/web", map[string]any{"ttl": "2h"}).Secret
					secret.IssueTime = time.Now().Add(300 * time.Millisecond) // when Vault has the answer
					time.Sleep(age)
					e.sim.SetLatency(tt.latency)
					if tt.fault != nil {
						e.sim.Inject(*tt.fault)
					}
					ttl := min(e.renew(secret), time.Until(secret.IssueTime.Add(2*time.Hour)))
					end := time.Now().Add(ttl)
					expires := e.sim.ProjectKeys(openaisim.DefaultProject)[0].Expires
					if over := expires.Sub(end); over < 0 || over > time.Minute {
						t.Errorf("the key outlives its lease by %s, want 0 to 1m", over)
					}
				})
			})
		}
	}
}
