// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"
)

// fake is a backend with a secret, and records what Vault does to it.
type fake struct {
	*framework.Backend

	mu        sync.Mutex
	uuids     []string
	cleaned   int
	ticks     []time.Time
	revokes   []time.Time
	requests  []logical.Request // renewals and revocations
	deadlines []time.Duration   // of ticks and revocations; 0: none
	revokeErr error
	slowTick  time.Duration
}

func (f *fake) record(ctx context.Context, note func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	left := time.Duration(0)
	if end, ok := ctx.Deadline(); ok {
		left = time.Until(end)
	}
	f.deadlines = append(f.deadlines, left)
	note()
}

// secret records renewals and revocations.
func (f *fake) secret() *framework.Secret {
	secret := &framework.Secret{Type: "key", DefaultDuration: 2 * time.Hour}
	secret.Renew = func(
		_ context.Context, req *logical.Request, _ *framework.FieldData,
	) (*logical.Response, error) {
		f.requests = append(f.requests, *req)
		req.Secret.TTL, req.Secret.MaxTTL = time.Hour, 4*time.Hour
		return &logical.Response{Secret: req.Secret}, nil
	}
	secret.Revoke = func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
		f.record(ctx, func() { f.revokes, f.requests = append(f.revokes, time.Now()), append(f.requests, *req) })
		return nil, f.revokeErr
	}
	return secret
}

// factory makes a backend that reports to f. The latest is f.Backend.
func (f *fake) factory(ctx context.Context, config *logical.BackendConfig) (logical.Backend, error) {
	f.uuids = append(f.uuids, config.BackendUUID)
	secret := f.secret()
	issue := func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
		if err := req.Storage.Put(ctx, &logical.StorageEntry{Key: "issued/" + req.ID}); err != nil {
			return nil, err
		}
		return secret.Response(map[string]any{"n": 1}, map[string]any{"n": 2, "who": req.DisplayName}), nil
	}
	write := func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
		_, deadline := ctx.Deadline()
		if delay := d.Get("delay").(int); delay > 0 {
			select {
			case <-time.After(time.Duration(delay) * time.Second):
			case <-ctx.Done():
			}
		}
		err := req.Storage.Put(ctx, &logical.StorageEntry{Key: req.Path, Value: []byte(req.Operation)})
		config.Logger.Info("written", "path", req.Path)
		return &logical.Response{Data: map[string]any{"op": string(req.Operation), "deadline": deadline}}, err
	}
	stop := make(chan struct{})
	go func() { <-stop }() // a goroutine that only Clean ends
	b := &framework.Backend{
		Secrets: []*framework.Secret{secret},
		Paths: []*framework.Path{{
			Pattern: "creds", Callbacks: map[logical.Operation]framework.OperationFunc{logical.ReadOperation: issue},
		}, {
			Pattern: "things/(?P<name>.+)",
			Fields: map[string]*framework.FieldSchema{
				"name": {Type: framework.TypeString}, "delay": {Type: framework.TypeInt},
			},
			Callbacks: map[logical.Operation]framework.OperationFunc{"create": write, "update": write},
			ExistenceCheck: func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (bool, error) {
				entry, err := req.Storage.Get(ctx, req.Path)
				return entry != nil, err
			},
		}},
		PeriodicFunc: func(ctx context.Context, _ *logical.Request) error {
			f.record(ctx, func() { f.ticks = append(f.ticks, time.Now()) })
			time.Sleep(f.slowTick)
			return nil
		},
		WALRollback: func(context.Context, *logical.Request, string, any) error { return nil },
		Clean:       func(context.Context) { f.cleaned++; close(stop) },
	}
	f.Backend = b
	return b, b.Setup(ctx, config)
}

// mount runs test with a mount in a bubble.
func mount(t *testing.T, test func(t *testing.T, v *Vault, f *fake)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		test(t, New(t, f.factory), f)
	})
}

func check[T comparable](t *testing.T, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func issue(t *testing.T, v *Vault) *Lease {
	t.Helper()
	lease, err := v.Issue("creds", nil)
	if err != nil {
		t.Fatal(err)
	}
	return lease
}

// TestRequests outside of a bubble: create and update, deadlines, the log.
func TestRequests(t *testing.T) {
	f := &fake{}
	v := New(t, f.factory)
	for _, want := range []string{"create", "update"} {
		resp, err := v.Write("things/x", nil)
		if err != nil || resp.Data["op"] != want || resp.Data["deadline"] != false {
			t.Errorf("write: got %v, %v, want %s without a deadline", resp, err, want)
		}
	}
	check(t, "lines of the log", v.Log.Count("info", "things/x"), 2)
	check(t, "errors in the log", v.Log.Count("error", ""), 0)
	check(t, "backend", v.Backend(), logical.Backend(f.Backend))
	other := &fake{}
	New(t, other.factory)
	if f.uuids[0] == "" || f.uuids[0] == other.uuids[0] {
		t.Errorf("UUIDs of two mounts: %q, %q", f.uuids, other.uuids)
	}
}

// TestCancelled: a request ends with its context, after 90 seconds, and with Close.
func TestCancelled(t *testing.T) {
	mount(t, func(t *testing.T, v *Vault, f *fake) {
		slow := map[string]any{"delay": 300}
		start := time.Now()
		if _, err := v.Write("things/x", slow); !errors.Is(err, context.Canceled) {
			t.Errorf("slow request: got %v, want that it was cancelled", err)
		}
		check(t, "cancelled after", time.Since(start), 90*time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := v.DoContext(ctx, logical.UpdateOperation, "things/x", slow); !errors.Is(err, ctx.Err()) {
			t.Errorf("request of a client that has gone: got %v", err)
		}
		check(t, "writes", len(v.Storage.All()), 0)
		go func() { _, _ = v.Write("things/x", slow) }()
		synctest.Wait()
		start = time.Now()
		v.Close()
		check(t, "Close took", time.Since(start), 0)
	})
}

// TestStorage: faults, lost answers, counts, and the raw way round them.
func TestStorage(t *testing.T) {
	mount(t, func(t *testing.T, v *Vault, f *fake) {
		broken := errors.New("broken")
		fail := func(verb, key string) error {
			if verb == "put" && key == "things/x" {
				return broken
			}
			return nil
		}
		v.Storage.Fail("put", "things/")
		_, err := v.Write("things/x", nil)
		check(t, "fault", err, ErrInjected)
		check(t, "entries", len(v.Storage.All()), 0)
		v.Storage.SetFault(nil)
		v.Storage.SetAfter(fail)
		_, err = v.Write("things/x", nil)
		check(t, "lost answer", err, broken)
		check(t, "effect", v.Storage.All()["things/x"], "create")
		v.Storage.SetAfter(nil)
		if got, want := v.Storage.Counts(), map[string]int{"get": 2, "put": 2}; !maps.Equal(got, want) {
			t.Errorf("counts: got %v, want %v", got, want)
		}
		v.Storage.ResetCounts()
		v.Storage.Set("things/deep/y", "z")
		check(t, "value", v.Storage.All()["things/deep/y"], "z")
		if got := v.Storage.Keys("things/"); !slices.Equal(got, []string{"deep/", "x"}) {
			t.Errorf("keys: got %q", got)
		}
		check(t, "counts of a test's own", len(v.Storage.Counts()), 0)
		v.Storage.SetFault(func(string, string) error { return ErrHang })
		start := time.Now()
		if _, err := v.Write("things/x", nil); !errors.Is(err, context.Canceled) {
			t.Errorf("hanging storage: got %v", err)
		}
		check(t, "storage hung for", time.Since(start), requestTime)
		v.Storage.SetFault(nil)
		if _, err := framework.PutWAL(t.Context(), v.Storage, "kind", 1); err != nil {
			t.Fatal(err)
		}
		v.Run(10 * time.Minute)
		check(t, "young entries of the write-ahead log", len(v.Storage.Keys(framework.WALPrefix)), 1)
		v.Run(time.Minute)
		check(t, "old entries", len(v.Storage.Keys(framework.WALPrefix)), 0)
	})
}

// TestLease: a lease is JSON, clamped, renewed, revoked.
func TestLease(t *testing.T) {
	mount(t, func(t *testing.T, v *Vault, f *fake) {
		v.System.MaxLeaseTTLVal = 90 * time.Minute
		v.DisplayName = "me"
		lease := issue(t, v)
		check(t, "data", lease.Data["n"], any(1.0))
		check(t, "warnings", len(lease.Warnings), 1)
		check(t, "clamped TTL", lease.Expires.Sub(lease.Issued), 90*time.Minute)
		v.System.MaxLeaseTTLVal = vaultTTL
		time.Sleep(time.Hour)
		for _, renewal := range []struct{ increment, want time.Duration }{
			{0, time.Hour}, {5 * time.Hour, 3 * time.Hour},
		} {
			if err := v.Renew(lease, renewal.increment); err != nil {
				t.Fatal(err)
			}
			check(t, "renewed TTL", time.Until(lease.Expires), renewal.want)
		}
		v.DropNext()
		check(t, "revocation whose answer is lost", v.Revoke(lease), errDropped)
		check(t, "leases after it", len(v.Leases()), 1)
		check(t, "revocation", v.Revoke(lease), nil)
		check(t, "leases", len(v.Leases()), 0)
		if v.Revoke(lease) == nil || v.Renew(lease, 0) == nil {
			t.Error("a lease that is gone can be revoked or renewed")
		}
		for i, req := range f.requests {
			check(t, "internal data", req.Secret.InternalData["n"], any(2.0))
			check(t, "display name", req.Secret.InternalData["who"], any("me"))
			check(t, "time of issue", req.Secret.IssueTime, lease.Issued)
			check(t, "data present", req.Data != nil, i == 0)
			check(t, "lease id", req.Secret.LeaseID, "")
		}
		check(t, "increment", f.requests[1].Secret.Increment, 5*time.Hour)
		check(t, "deadline", f.deadlines[0], requestTime)
		v.DropNext()
		_, err := v.Issue("creds", nil)
		check(t, "issue whose answer is lost", err, errDropped)
		check(t, "leases", len(v.Leases()), 0)
		check(t, "what the plugin did", len(v.Storage.Keys("issued/")), 2)
	})
}

// TestRun: ticks each minute, one at a time; retries of a revocation until it is irrevocable.
func TestRun(t *testing.T) {
	mount(t, func(t *testing.T, v *Vault, f *fake) {
		start := time.Now()
		lease := issue(t, v)
		v.Run(90 * time.Second)
		v.Run(30 * time.Second)
		check(t, "ticks", len(f.ticks), 2)
		check(t, "second tick after", f.ticks[1].Sub(start), 2*time.Minute)
		check(t, "its deadline", f.deadlines[1], requestTime)
		f.slowTick = 100 * time.Second
		v.Run(4 * time.Minute)
		check(t, "ticks with slow ones", len(f.ticks), 4)
		f.slowTick = 0
		f.revokeErr = errors.New("no")
		v.Run(3 * time.Hour)
		got := []time.Duration{}
		for _, at := range f.revokes {
			got = append(got, at.Sub(lease.Expires))
		}
		want := []time.Duration{0, 20, 60, 140, 300, 620}
		for i := range want {
			want[i] *= time.Second
		}
		if !slices.Equal(got, want) || !lease.Irrevocable || lease.Attempts != 6 {
			t.Errorf("attempts: got %v, %+v, want %v", got, lease, want)
		}
		v.Run(24 * time.Hour)
		check(t, "attempts a day later", len(f.revokes), 7)
		f.revokeErr = logical.ErrUnsupportedOperation
		lease = issue(t, v)
		v.Run(3 * time.Hour)
		check(t, "irrevocable at once", lease.Irrevocable && lease.Attempts == 1, true)
		f.revokeErr = nil
		lease = issue(t, v)
		v.Run(2 * time.Hour)
		check(t, "lease held", slices.Contains(v.Leases(), lease), false)
		check(t, "revoked at", f.revokes[len(f.revokes)-1], lease.Expires)
	})
}

// TestProcesses: restart, crash in the midst of a request, crash of Vault.
func TestProcesses(t *testing.T) {
	mount(t, func(t *testing.T, v *Vault, f *fake) {
		lease := issue(t, v)
		first := v.Backend()
		go func() { _, _ = v.Write("things/slow", map[string]any{"delay": 5}) }()
		synctest.Wait()
		v.Restart()
		check(t, "entry of a request that Restart has waited for", v.Storage.All()["things/slow"], "create")
		check(t, "cleaned up", f.cleaned, 1)
		if v.Backend() == first || f.uuids[0] != f.uuids[1] {
			t.Error("restart: the same backend, or another UUID")
		}
		check(t, "leases", len(v.Leases()), 1)
		for name, hook := range map[string]func(func(string, string) error){
			"before": v.Storage.SetFault, "after": v.Storage.SetAfter,
		} {
			hook(func(verb, _ string) error {
				if verb == "put" {
					hook(nil)
					v.Crash()
				}
				return nil
			})
			_, err := v.Issue("creds", nil)
			check(t, "issue with a crash "+name, err, errProcess)
		}
		check(t, "puts that had an effect", len(v.Storage.Keys("issued/")), 2)
		check(t, "cleaned up by crashes", f.cleaned, 1)
		f.revokeErr = errors.New("no")
		v.Run(time.Until(lease.Expires.Add(time.Second)))
		check(t, "attempts", lease.Attempts, 1)
		v.CrashVault()
		v.Run(5 * time.Second)
		check(t, "attempts of the new Vault", lease.Attempts, 1)
		check(t, "revocations", len(f.revokes), 2)
		v.Close()
		check(t, "cleaned up by Close", f.cleaned, len(f.uuids))
	})
}

// TestCrashVaultLosesLease that is about to be registered; and what has crashed sends nothing.
func TestCrashVaultLosesLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var networks []http.RoundTripper
		f := &fake{}
		v := New(t, func(ctx context.Context, config *logical.BackendConfig) (logical.Backend, error) {
			networks = append(networks, Network(config))
			return f.factory(ctx, config)
		})
		v.Wire.Connect(answers(204))
		v.Storage.SetAfter(func(string, string) error { time.Sleep(time.Second); return nil })
		go func() {
			if _, err := v.Issue("creds", nil); err == nil {
				t.Error("issue while Vault crashes: got no error")
			}
		}()
		synctest.Wait()
		v.CrashVault()
		time.Sleep(time.Minute)
		check(t, "leases", len(v.Leases()), 0)
		for i, want := range []error{context.Canceled, nil} {
			_, err := networks[i].RoundTrip(httptest.NewRequest("GET", "/v1/x", nil))
			check(t, "error of a process's network", err, want)
		}
		Same(t, "sent", v.Wire.Sent(), "[GET /x ]")
	})
}

// TestRestore: storage and leases are as they were.
func TestRestore(t *testing.T) {
	mount(t, func(t *testing.T, v *Vault, f *fake) {
		lease := issue(t, v)
		before, expires := v.Storage.All(), lease.Expires
		s := v.Snapshot()
		time.Sleep(90 * time.Minute)
		issue(t, v)
		if err := v.Renew(lease, 0); err != nil {
			t.Fatal(err)
		}
		v.Restore(s)
		if got := v.Storage.All(); !maps.Equal(got, before) {
			t.Errorf("storage: got %v, want %v", got, before)
		}
		check(t, "leases", len(v.Leases()), 1)
		check(t, "end of the lease", lease.Expires, expires)
		check(t, "revocations", len(f.revokes), 0)
		check(t, "processes", len(f.uuids), 2)
		check(t, "revocation", v.Revoke(lease), nil)
	})
}

// TestDisable stops at the first failure; with force it does not.
func TestDisable(t *testing.T) {
	for _, force := range []bool{false, true} {
		mount(t, func(t *testing.T, v *Vault, f *fake) {
			issue(t, v)
			issue(t, v)
			f.revokeErr = errors.New("no")
			if force {
				v.ForceDisable()
			} else {
				if err := v.Disable(); !errors.Is(err, f.revokeErr) || !v.System.Tainted() {
					t.Errorf("disable: got %v, tainted %v", err, v.System.Tainted())
				}
				check(t, "revocations", len(f.revokes), 1)
				check(t, "leases", len(v.Leases()), 2)
				_, err := v.Write("things/x", nil)
				check(t, "request to a tainted mount", err, logical.ErrUnsupportedPath)
				f.revokeErr = nil
				check(t, "disable", v.Disable(), nil)
			}
			check(t, "leases", len(v.Leases()), 0)
			check(t, "entries", len(v.Storage.All()), 0)
			check(t, "cleaned up", f.cleaned, 1)
			v.Run(time.Hour)
		})
	}
}

// TestSystem: what the plugin sees of Vault.
func TestSystem(t *testing.T) {
	f := &fake{}
	v := New(t, f.factory)
	job := &rotation.RotationJobConfigureRequest{MountPoint: MountPoint, ReqPath: "config", RotationPeriod: time.Hour}
	_, err := f.System().RegisterRotationJob(t.Context(), job)
	if err == nil || !strings.Contains(err.Error(), "not supported in Vault community edition") {
		t.Errorf("rotation job on CE: got %v", err)
	}
	v.System.RotationErr = nil
	for range 2 {
		if _, err := f.System().RegisterRotationJob(t.Context(), job); err != nil {
			t.Fatal(err)
		}
	}
	check(t, "jobs", len(v.System.Jobs()), 1)
	end := &rotation.RotationJobDeregisterRequest{MountPoint: MountPoint, ReqPath: "config"}
	check(t, "deregistering", f.System().DeregisterRotationJob(t.Context(), end), nil)
	check(t, "jobs", len(v.System.Jobs()), 0)
	check(t, "history", len(v.System.Registered())*10+len(v.System.Deregistered()), 21)
	v.System.PluginEnvErr = errors.New("no answer")
	_, err = f.System().PluginEnv(t.Context())
	check(t, "environment", err, v.System.PluginEnvErr)
	check(t, "event", logical.SendEvent(t.Context(), f, "openai/x", "path", "creds"), nil)
	check(t, "recorded", v.System.Events()[0].Data["path"], any("creds"))
	check(t, "observation", f.RecordObservation(t.Context(), "openai/y", map[string]any{"n": 1}), nil)
	check(t, "recorded", v.System.Observations()[0].Type, "openai/y")
	if f.RecordObservation(t.Context(), "openai/y", map[string]any{"n": []string{}}) == nil {
		t.Error("an observation with a list: got no error")
	}
}
