// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/url"
	"os"
	"path"
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

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/locksutil"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/openaisim"
	"vault-plugin-secrets-openai/internal/vaultsim"
)

const ours = openaisim.DefaultProject

type (
	// requests are operation and path, like "read config", and what the request names.
	requests []struct {
		request string
		data    fields
	}
	fault  = openaisim.Fault
	fields = map[string]any // what a request names, or what an answer holds
)

// same compares two values as fmt prints them.
var same = vaultsim.Same

// after is the header of an answer that tells callers to wait for so many seconds.
func after(seconds string) http.Header { return http.Header{"Retry-After": {seconds}} }

// failIf fails the test if bad is true, with a message as fmt formats it.
func failIf(t testing.TB, bad bool, format string, args ...any) {
	t.Helper()
	if bad {
		t.Errorf(format, args...)
	}
}

// env is a mount in a small Vault, with a simulated OpenAI. Nothing in it uses the network, so that it works inside a
// testing/synctest bubble.
type env struct {
	*vaultsim.Vault
	t   testing.TB
	sim *openaisim.Server
}

// newEnv returns a mount without config.
func newEnv(t testing.TB) *env { return newEnvOn(t, openaisim.New()) }

// newEnvOn returns a further mount on an organization.
func newEnvOn(t testing.TB, sim *openaisim.Server) *env {
	t.Helper()
	vault := vaultsim.New(t, func(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
		b := newBackend(vaultsim.Network(conf), mountID(conf.BackendUUID))
		return b, b.Setup(ctx, conf)
	})
	vault.Leaks = openaisim.ShowsKey
	vault.Wire.Connect(sim.Transport())
	return &env{vault, t, sim}
}

// newConfiguredEnv returns a mount with config and a role "web".
func newConfiguredEnv(t testing.TB) *env {
	t.Helper()
	e := newEnv(t)
	e.configure(nil)
	e.OK("roles/web", fields{"project_id": ours})
	return e
}

// inBubble runs test on a configured mount with a virtual clock.
func inBubble(t *testing.T, test func(t *testing.T, e *env)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newConfiguredEnv(t)) })
}

// inBubbles runs test for each row of a table on a configured mount of its own with a virtual clock.
func inBubbles[T any](t *testing.T, table map[string]T, test func(t *testing.T, e *env, tt T)) {
	for name, tt := range table {
		t.Run(name, func(t *testing.T) { inBubble(t, func(t *testing.T, e *env) { test(t, e, tt) }) })
	}
}

// b is the backend of the present process.
func (e *env) b() *backend { return e.Backend().(*backend) }

// credentials returns the fields by which config knows the simulator's first admin key.
func (e *env) credentials() fields {
	key, id := e.sim.AdminKey()
	return fields{"admin_api_key": key, "admin_api_key_id": id, "organization_id": openaisim.DefaultOrganization}
}

// configure writes config with these credentials, and extra over them.
func (e *env) configure(extra fields) *logical.Response {
	e.t.Helper()
	data := e.credentials()
	maps.Copy(data, extra)
	return e.OK("config", data)
}

// lease reads a credential of the role, which must succeed.
func (e *env) lease(role string) *vaultsim.Lease {
	e.t.Helper()
	return e.MustIssue("creds/" + role)
}

// tokenRole writes a role of access tokens on an account of its own, and returns the account.
func (e *env) tokenRole(name string, extra fields) string {
	e.t.Helper()
	account := e.sim.AddServiceAccount(ours, "for "+name, "member")
	data := fields{"project_id": ours, "service_account_id": account, "credential_type": accessToken}
	maps.Copy(data, extra)
	e.OK("roles/"+name, data)
	return account
}

// staticRoleOn is what the write of a static role names.
func staticRoleOn(account, period string) fields {
	return fields{"project_id": ours, "service_account_id": account, "rotation_period": period}
}

// static writes a static role "gw" on an account of its own, and returns the account.
func (e *env) static(period string, more fields) (account string) {
	e.t.Helper()
	account = e.sim.AddServiceAccount(ours, "gateway", "member")
	data := staticRoleOn(account, period)
	maps.Copy(data, more)
	e.OK("static-roles/gw", data)
	return account
}

// testKey is a signing key: making one takes long.
var testKey = sync.OnceValues(newSigningKey)

// sign makes the mount a provider, with testKey, which must be shown nowhere until the test's end.
func (e *env) sign() {
	e.t.Helper()
	key, err := testKey()
	e.NoError(err)
	e.NoError(putJSON(context.Background(), e.Storage, identityPath, identity{Key: key, Audience: defaultEndpoint,
		Issuer: "https://" + e.b().providerName() + ".invalid", TokenEndpoint: defaultTokenEndpoint}))
	e.OK("config/identity", nil)
	private := base64.StdEncoding.EncodeToString(key.PrivateKey)[100:200]
	e.t.Cleanup(func() { e.OnlySealWrapped("private_key", "PRIVATE", private) })
	e.Leaks = func(text string) bool { return openaisim.ShowsKey(text) || strings.Contains(text, private) }
}

// keyless makes the mount a provider and writes a role "app" of access tokens.
func (e *env) keyless() {
	e.t.Helper()
	e.sign()
	e.tokenRole("app", nil)
}

// inKeylessBubble runs test on a mount that keyless has set up.
func inKeylessBubble(t *testing.T, test func(t *testing.T, e *env)) {
	t.Helper()
	inBubble(t, func(t *testing.T, e *env) { e.keyless(); test(t, e) })
}

// config returns the stored config, which must be there.
func (e *env) config() *config {
	e.t.Helper()
	cfg, err := getConfig(context.Background(), e.Storage)
	e.NoError(err)
	return cfg
}

// have checks how many accounts and project keys OpenAI has in the default project.
func (e *env) have(accounts, keys int, when string) {
	e.t.Helper()
	a, k := len(e.sim.ServiceAccounts(ours)), len(e.sim.ProjectKeys(ours))
	same(e.t, "accounts and keys "+when, []int{a, k}, []int{accounts, keys})
}

// quiet lets time pass until nothing works in the background any more.
func (e *env) quiet() {
	for _, mu := range []*sync.Mutex{&e.b().sweepMu, &e.b().seekMu, &e.b().passMu, &e.b().staticMu} {
		for !mu.TryLock() {
			time.Sleep(100 * time.Millisecond)
		}
		mu.Unlock()
	}
}

// callsFail makes the calls to OpenAI of a method ("": any) meet f from now on.
func (e *env) callsFail(method string, f fault) {
	f.Method, f.Times = method, -1
	e.sim.Inject(f)
}

// metric reads a metric: a number or, by labels, a map; nil where there is none.
func (e *env) metric(name string) any { return e.Get("metrics").Data[metricPrefix+name] }

// leftovers tells how many revocations and how many replaced admin keys are pending.
func (e *env) leftovers() string {
	e.quiet()
	return fmt.Sprint(len(e.Storage.Keys("cleanup/")), len(e.config().PendingDeletion))
}

// TestMountID: the tag of a mount follows from its UUID alone, in each process and each version.
func TestMountID(t *testing.T) {
	same(t, "tag of no UUID", mountID(""), "")
	same(t, "a tag", mountID("6ba7b810-9dad-11d1-80b4-00c04fd430c8"), "4wcv75")
}

// TestEndOf: the end is the first whole minute by which request, lease and key are over.
func TestEndOf(t *testing.T) {
	day := time.Date(2026, 11, 26, 0, 0, 0, 0, time.UTC)
	for _, tt := range []struct{ start, maxTTL, want time.Duration }{
		{0, time.Hour, 63 * time.Minute}, // 75 s for the request, 60 s for the key
		{45 * time.Second, time.Hour, 63 * time.Minute}, {45*time.Second + 1, time.Hour, 64 * time.Minute},
		{0, maxKeyLife, maxKeyLife + 3*time.Minute},
	} {
		same(t, fmt.Sprint("end of ", tt), endOf(day.Add(tt.start), tt.maxTTL).UTC(), day.Add(tt.want))
	}
}

// TestSuffix: what newSuffix writes, parseName reads, and no two suffixes are the same.
func TestSuffix(t *testing.T) {
	seen := map[string]bool{}
	for _, end := range []int64{60, 946684800, 1795677180, 60 * (36*36*36*36*36 - 1)} { // the last is in 2084
		for range 250 {
			suffix := newSuffix("abc234", time.Unix(end, 0))
			same(t, suffix, fmt.Sprint(len(suffix), seen[suffix]), "19 false")
			seen[suffix] = true
			for _, prefix := range []string{"", "web", "sk_ü", "a-bcdefg0000000000000"} {
				tag, got, ok := parseName(prefix + "-" + suffix)
				same(t, prefix+"-"+suffix, fmt.Sprint(tag, got.Unix(), ok), fmt.Sprint("abc234", end, true))
			}
		}
	}
}

// TestParseName: nothing is taken for a name of this plugin that only looks like one.
func TestParseName(t *testing.T) {
	const valid = "web-abc234gzzzz234567ab"
	_, _, ok := parseName(valid)
	same(t, valid+" parses", ok, true)
	for _, name := range []string{
		"", "-", "web", valid[4:], "web_" + valid[4:], "web" + valid[4:], "web." + valid[4:], // no hyphen before
		"web-" + valid[5:], "web-a" + valid[4:], valid + "a", valid + "-", valid + "\n", valid + " ", valid[:22],
		strings.ToUpper(valid), "web-ABC234gzzzz234567ab", "web-abc234GZZZZ234567ab", "web-abc234gzzzz234567aB",
		"web-abc214gzzzz234567ab", "web-abc284gzzzz234567ab", "web-abc234gzzzz234567a0", "web-abc234gzzzz234567a9",
		"web-abc-34gzzzz234567ab", "web-abc234gzz_z234567ab", "web-abc234gzzzz234567ä", "web-abc234gzzzz234567\x00b",
	} {
		if tag, end, ok := parseName(name); ok || tag != "" || !end.IsZero() {
			t.Errorf("%q: got %q, %s, %v, want that it does not parse", name, tag, end, ok)
		}
	}
}

// FuzzParseName: only the last 20 bytes of a name count, and they are what newSuffix writes.
func FuzzParseName(f *testing.F) {
	for _, name := range []string{"", "web-abc234gzzzz234567ab", "-abc234gzzzz234567ab", "a-abc234gzzzz234567ab-fixed",
		"web-abc234gzzzz234567ab\n", "ü-abc234-0000234567ab", "a-abc234zzzzzzzzzzzzz", "\xff-aaaaaa00000aaaaaaaa"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		tag, end, ok := parseName(name)
		last := name[max(0, len(name)-20):]
		otherTag, otherEnd, otherOK := parseName("web-abc234gzzzz234567ab" + last)
		failIf(t, len(last) == 20 && (otherTag != tag || !otherEnd.Equal(end) || otherOK != ok),
			"%q and its last 20 bytes differ", name)
		if suffix := newSuffix(tag, end); ok && last[:12] != "-"+suffix[:11] || !ok && (tag != "" || !end.IsZero()) {
			t.Errorf("%q: got %q, %s, %v, of which newSuffix makes %q", name, tag, end, ok, suffix)
		}
	})
}

// TestPathTable walks over the paths: what Vault's help and OpenAPI document need is there. What writes is forwarded to
// where storage can be written, and what is about a cluster's own leases to its active node.
func TestPathTable(t *testing.T) {
	b := newBackend(nil, "")
	same(t, "help of the engine is missing", b.Help == "", false)
	got := vaultsim.CheckPaths(t, b.Backend, "openai", "admin_api_key", "client_key", "api_key")
	same(t, "operations", strings.Join(got, ", "), "config create, config delete, config read, config update, "+
		"config/identity delete, config/identity read, config/identity update, config/identity/rotate update, "+
		"config/rotate update, creds/NAME read, creds/NAME update, metrics read, roles/?$ list, roles/NAME create, "+
		"roles/NAME delete, roles/NAME read, roles/NAME update, rotate-role/NAME update, static-creds/NAME read, "+
		"static-roles/?$ list, static-roles/NAME create, static-roles/NAME delete, static-roles/NAME read, "+
		"static-roles/NAME update, tidy read, tidy update")
	for _, path := range b.Paths {
		for op, handler := range path.Operations {
			own := strings.HasPrefix(path.Pattern, "creds/") || path.Pattern == "tidy"
			writes, p := !own && op != logical.ReadOperation && op != logical.ListOperation, handler.Properties()
			same(t, fmt.Sprint(path.Pattern, " ", op, ": forwarded by standby and secondary"),
				[]bool{p.ForwardPerformanceStandby, p.ForwardPerformanceSecondary}, []bool{writes || own, writes})
		}
	}
}

// TestAnswers checks real answers against the schema that Vault's OpenAPI document shows.
func TestAnswers(t *testing.T) {
	e := newConfiguredEnv(t)
	e.sim.Inject(fault{Method: "DELETE", Path: "admin_api_keys", Status: 403, Times: -1})
	token := fields{"project_id": ours, "credential_type": accessToken,
		"service_account_id": e.sim.AddServiceAccount(ours, "app", "member")}
	for _, tt := range (requests{
		{"list roles", nil}, {"read config", nil}, {"update config", fields{"rotation_period": "30d"}},
		{"update config/rotate", nil}, {"read config", nil},
		{"create roles/scoped", fields{"project_id": "proj_sim", "scopes": "api.all.read", "max_ttl": "300d"}},
		{"list roles", nil}, {"read roles/web", nil}, {"read roles/scoped", nil}, {"read creds/web", nil},
		{"read creds/scoped", nil}, {"read tidy", nil}, {"update tidy", fields{"project_ids": "proj_sim"}},
		{"read tidy", nil}, {"read metrics", nil}, {"read metrics", fields{"format": "prometheus"}},
		{"delete roles/scoped", nil}, {"update config/identity", nil}, {"create roles/app", token},
		{"read roles/app", nil}, {"read creds/app", nil}, {"read config/identity", nil},
		{"update config/identity/rotate", nil}, {"read config/identity", nil}, {"delete roles/app", nil},
		{"delete config/identity", nil}, {"delete config", nil}, {"read metrics", nil},
	}) {
		t.Run(tt.request, func(t *testing.T) {
			resp, err := e.Request(tt.request, tt.data)
			same(t, "error", vaultsim.Failure(resp, err), nil)
			op, path, _ := strings.Cut(tt.request, " ")
			want := schema.GetResponseSchema(t, e.b().Route(path), logical.Operation(op))
			schema.ValidateResponse(t, want, resp, true)
		})
	}
}

// TestEmpty: an empty text, as of a variable that is not set, is no boolean and no duration: it does not turn off an
// expiry, a proof, a dry run or a schedule, nor end the replaced keys of a static role.
func TestEmpty(t *testing.T) {
	e := newConfiguredEnv(t)
	e.static("24h", nil)
	first := e.reads("at first")
	for _, test := range []string{"roles/web enforce_key_expiry", "config verify_connection",
		"config disable_automated_rotation", "config rotation_period", "config admin_key_ttl", "tidy dry_run",
		"static-roles/gw overlap", "static-roles/gw rotation_period", "creds/web ttl"} {
		path, field, _ := strings.Cut(test, " ")
		resp, err := e.Write(path, fields{field: ""})
		e.Refusal(resp, err, field+" does not take this value")
	}
	same(t, "the key of the static role", e.reads("then"), first)
}

// TestUnknownField: who names what is no field of the path is told, since a misspelt "scopes" makes keys that are not
// restricted.
func TestUnknownField(t *testing.T) {
	e := newConfiguredEnv(t)
	e.sign()
	role := staticRoleOn(e.sim.AddServiceAccount(ours, "gateway", "member"), "24h")
	role["overlap"] = "1h"
	e.OK("static-roles/gw", role)
	for path, data := range map[string]fields{"config": {}, "config/rotate": {}, "config/identity": {},
		"config/identity/rotate": {}, "roles/web": {}, "roles/new": {"project_id": ours}, "creds/web": {},
		"static-roles/gw": {}, "rotate-role/gw": {}, "tidy": {"dry_run": true}} {
		data["scope"], data["unset"] = "api.all.read", nil
		e.Warned(path, e.Must("update "+path, data), 1, "[scope]")
	}
}

// TestFields: on each path, for each field of the path table, null is the same as a request without the field, on a
// new entry and on one whose values are not the defaults. White space at the ends of keys, ids and the like is dropped,
// and refused within.
func TestFields(t *testing.T) {
	certificate, key := vaultsim.NewCertificate(t)
	inBubble(t, func(t *testing.T, e *env) {
		account := e.sim.AddServiceAccount(ours, "app", "member")
		whole, other := e.credentials(), e.credentials()
		maps.Copy(whole, fields{"api_endpoint": "https://eu.api.openai.com/v1", "rotation_schedule": "0 0 * * *",
			"rotation_window": "2h", "admin_key_ttl": "72h", "ca_certificate": certificate,
			"client_certificate": certificate, "client_key": key})
		maps.Copy(other, fields{"rotation_policy": "p", "rotation_period": "24h", "disable_automated_rotation": true,
			"verify_connection": false})
		trimmed := regexp.MustCompile(`^(admin_api_key|.*_(ids?|endpoint|role|type)|issuer|audience)$`)
		e.sign()
		identity := fields{} // as it is: it is fixed
		for field := range e.b().Route("config/identity").Fields {
			identity[field] = e.Get("config/identity").Data[field]
		}
		// Names are in the path, and TestIdentityBadInput tries confirm.
		seen := map[string]bool{"rolesname": true, "credsname": true, "configconfirm": true}
		for _, tt := range (requests{
			{"update config", whole}, {"update config", other},
			{"update roles/new", fields{"project_id": ours, "ttl": "2h", "max_ttl": "3h", "scopes": "api.a.read",
				"service_account_name_template": "x", "service_account_description": "y", "enforce_key_expiry": false,
				"service_account_role": "owner"}},
			{"update roles/new",
				fields{"project_id": ours, "service_account_id": account, "credential_type": "api_key"}},
			{"update config/identity", identity},
			{"read creds/web", fields{"ttl": "15m"}}, {"update creds/web", fields{"ttl": "15m"}},
			{"update tidy", fields{"dry_run": true, "mount_id": "aaaaaa", "project_ids": ours}},
			{"read metrics", fields{"format": "prometheus"}},
		}) {
			_, path, _ := strings.Cut(tt.request, " ")
			if path != "config/identity" {
				_ = e.Storage.Delete(t.Context(), path) // config or the role; nothing else is stored by its path
			}
			e.CheckFields(tt.request, tt.data, trimmed)
			e.configure(nil)
			head, _, _ := strings.Cut(path, "/")
			for field := range tt.data {
				seen[head+field] = true
			}
		}
		for _, p := range e.b().Paths {
			for field := range p.Fields {
				head, _, _ := strings.Cut(strings.Trim(p.Pattern, "^$"), "/")
				static := strings.HasPrefix(head, "static-") || head == "rotate-role" // a write stores ids of chance
				failIf(t, !seen[head+field] && !static, "field %s of %s is not tried", field, p.Pattern)
			}
		}
	})
}

// TestStorageFaults fails a storage access of each path: an inner error, nothing at OpenAI, and storage is as it was.
func TestStorageFaults(t *testing.T) {
	data := map[string]fields{"config": {"rotation_period": 3600}, "roles/web": {"project_id": "proj_sim", "ttl": "2h"}}
	for _, test := range []string{ // operation, path, verb and key of the access that fails
		"read config get config", "update config get config", "update config put config", "delete config get config",
		"delete config delete config", "update config/rotate get config", "update config/rotate put config",
		"list roles list roles/", "read roles/web get roles/web", "update roles/web get roles/web",
		"update roles/web put roles/web", "delete roles/web delete roles/web", "read creds/web get roles/web",
		"read config/identity get config/identity", "update config/identity put config/identity",
		"read creds/web get config", "update tidy get config", "read metrics get config", "read metrics list cleanup/",
	} {
		t.Run(test, func(t *testing.T) {
			part := strings.Fields(test)
			e := newConfiguredEnv(t)
			e.Restart() // so that config has to be read
			e.Unchanged("fault", func() {
				e.Storage.Fail(part[2], part[3])
				resp, err := e.Request(part[0]+" "+part[1], data[part[1]])
				e.Fails(test, err, "injected failure")
				same(t, "answer", resp, "<nil>")
			})
			same(t, "admin keys", len(e.sim.AdminKeys()), 1)
			e.have(0, 0, "after the fault")
			e.Storage.SetFault(nil)
			e.lease("web")
		})
	}
	e := newConfiguredEnv(t)
	e.Restart()
	e.Storage.Fail("get", "config")
	e.Warned("role that can't be checked", e.OK("roles/web", data["roles/web"]), 1, "unchecked", "injected failure")
}

// aMap is a value of the wrong type for every field. What it holds must not be quoted.
var aMap = fields{"value": "sk-admin-simulated-secret"}

// badDurations are what no duration field takes.
var badDurations = []any{"soon", -1, "-1h", "999999999999h", int64(math.MaxInt64), aMap, []any{"1h", "2h"}}

// badEndpoints are what api_endpoint does not take.
var badEndpoints = []any{
	"api.openai.com", "api.openai.com/v1", "/v1", "https://", "https:///v1", "https:api.openai.com", "://x", "%",
	"https://exa mple/v1", "https://api.openai.com:-1", "https://api.openai.com:x", "https://api.openai.com:/v1",
	"https://api.openai.com:443:443/v1", "https://::1/v1", "https://[::1/v1", "https://u@h/v1", "http://0.0.0.0", aMap,
	"https://user:sk-password@api.openai.com/v1", "https://@api.openai.com/v1", "https://h/v1?key=sk-secret",
	"https://h/v1?", "https://h/v1#part", "https://h/v1#", "http://api.openai.com/v1", "http://10.0.0.1/v1",
	"http://localhost.example.com/v1", "http://127.0.0.1.example.com/v1", "ftp://api.openai.com", "file:///etc/passwd",
	"unix:///run/x.sock", "javascript:alert(1)", "ws://127.0.0.1", "https://h/v1/../v2", "https://h/..",
	"https://h/%2e%2e", "https://h/v1/.%2E",
}

// TestConfigBadInput: a bad value is refused with its field's name, and nobody has the key sent elsewhere without it.
func TestConfigBadInput(t *testing.T) {
	bads := vaultsim.Bads
	e := newEnv(t)
	e.RefusesAll("config", e.credentials(), slices.Concat(
		bads("admin_api_key", "required", nil, ""), bads("organization_id", "required", nil, ""),
		bads("admin_api_key", "8 to 512", "short", strings.Repeat("k", 513)),
		bads("admin_api_key", "printable ASCII characters without spaces", "sk-admin-simulated secret",
			"sk-admin-simulated\r\nX-Header: secret"),
		bads("admin_api_key", "", aMap, []any{"sk-admin-simulated-secret"}),
		bads("admin_api_key_id", "", "key_x/../y", strings.Repeat("k", 129), aMap),
		bads("organization_id", "", "org-sim\nX-Header: x", strings.Repeat("o", 129), aMap),
		bads("verify_connection", "true or false", "perhaps", aMap),
		bads("disable_automated_rotation", "true or false", "perhaps"), bads("rotation_policy", "", aMap),
		bads("rotation_schedule", "", "now and then", "61 * * * *", "* * * * * *", aMap),
		bads("rotation_schedule", "time zone", "TZ=Europe/Berlin 0 3 * * 0", "CRON_TZ=UTC 0 3 * * 0",
			"TZ=UTC", "CRON_TZ="),
		bads("rotation_schedule", "no time to come", "0 3 30 2 *"),
		bads("rotation_window", "rotation_schedule", "1h"), bads("admin_key_ttl", "rotation_period", 3600),
		bads("rotation_period", "", badDurations...), bads("rotation_window", "", badDurations...),
		bads("admin_key_ttl", "", badDurations...), bads("api_endpoint", "", badEndpoints...),
	))
	for _, verify := range []bool{true, false} {
		data := fields{"api_endpoint": "https://example.com/v1", "verify_connection": verify}
		e.Unchanged(data, func() { e.Refused("config", data, "api_endpoint", "together with admin_api_key") })
	}
	e.Refused("config", fields{"admin_api_key": "unknown-key", "verify_connection": false},
		"admin_api_key_id is required", "verify_connection")
}

// TestConfig: a write changes what it names, a read shows all but the key, a delete leaves the roles.
func TestConfig(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		var none *logical.Response
		e.Storage.Set("roles/web", `{"project_id":"proj_sim"}`)
		notConfigured := func() {
			t.Helper()
			same(t, "read", e.Get("config"), none)
			same(t, "delete", e.Must("delete config", nil), none)
			for _, path := range []string{"creds/web", "roles/web", "config/rotate", "tidy"} {
				resp, err := e.Write(path, nil)
				e.Refusal(resp, err, "not configured", "write config")
			}
		}
		notConfigured()
		same(t, "write", e.configure(nil), none)
		key, id := e.sim.AdminKey()
		want := fields{
			"admin_api_key_id": id, "organization_id": "org-sim", "api_endpoint": "https://api.openai.com/v1",
			"admin_key_ttl": 0, "admin_key_expires_at": "", "last_rotated": "2000-01-01T00:00:00Z", "next_rotation": "",
			"rotation_manager": "none", "pending_deletion": []string{}, "creating": []string{}, "rotation_schedule": "",
			"rotation_window": 0, "rotation_period": 0, "rotation_policy": "", "disable_automated_rotation": false,
			"mount_id": e.b().mountID, "ca_certificate": "", "client_certificate": "",
		}
		same(t, "config", e.Get("config").Data, want)
		time.Sleep(time.Hour)
		for _, step := range []struct{ write, shown fields }{ // shown: where it is not what was written
			{fields{"api_endpoint": "http://[::1]/v1/", "admin_api_key": key + "\n"},
				fields{"api_endpoint": "http://[::1]/v1"}}, {nil, nil}, {fields{"rotation_period": 129600},
				fields{"next_rotation": "2000-01-02T12:00:00Z", "rotation_manager": "plugin"}},
			{fields{"admin_key_ttl": "72h"}, fields{"admin_key_ttl": 259200}}, {fields{"admin_key_ttl": 0}, nil},
			{fields{"disable_automated_rotation": true}, fields{"next_rotation": "", "rotation_manager": "none"}},
			{fields{"rotation_period": 0, "rotation_schedule": "0 6 * * SAT", "disable_automated_rotation": "false"},
				fields{"next_rotation": "2000-01-01T06:00:00Z", "rotation_manager": "plugin"}},
			{fields{"api_endpoint": "", "admin_api_key": key}, fields{"api_endpoint": "https://api.openai.com/v1"}},
		} {
			e.OK("config", step.write)
			maps.Copy(want, step.write)
			maps.Copy(want, step.shown)
			delete(want, "admin_api_key")
			same(t, "config", e.Get("config").Data, want)
		}
		other, otherID := e.sim.AddAdminKey("other")
		e.OK("config", fields{"admin_api_key": other})
		maps.Copy(want, fields{"admin_api_key_id": otherID, "last_rotated": "2000-01-01T01:00:00Z"})
		same(t, "config", e.Get("config").Data, want)
		e.Warned("delete", e.Must("delete config", nil), 1, "not revoked", "admin key")
		same(t, "storage after delete", e.Storage.Keys(""), "[roles/]")
		notConfigured()
	})
}

// TestConfigWithoutUUID: without a UUID of Vault's, creds and tidy say so and ask OpenAI nothing; revocation works.
func TestConfigWithoutUUID(t *testing.T) {
	e := newConfiguredEnv(t)
	l := e.lease("web")
	e.b().mountID = mountID("")
	e.Wire.Sent()
	for request, data := range map[string]fields{"read creds/web": nil, "update tidy": {"mount_id": "abcdef"}} {
		resp, err := e.Request(request, data)
		same(t, request, fmt.Sprint(resp, " ", err), "<nil> "+errNoUUID.Error())
	}
	same(t, "requests", e.Wire.Sent(), []string{})
	e.MustRevoke(l)
	e.have(0, 0, "after revocation")
}

// TestConfigEndpoint: good endpoints are taken as they are, without a slash at the end.
func TestConfigEndpoint(t *testing.T) {
	for _, good := range []string{defaultEndpoint, "https://eu.api.openai.com:8443", "https://[2001:db8::1]:443/v1",
		"http://127.0.0.1:8080/v1", "http://[::1]:8080/v1", "http://localhost/v1..2", "https://my_gateway/a/b-c"} {
		got, err := parseEndpoint(good)
		slash, slashErr := parseEndpoint(good + "//")
		same(t, "endpoint", fmt.Sprint(got, err, slash, slashErr), fmt.Sprint(good, nil, good, nil))
	}
}

// FuzzEndpoint: an endpoint is refused, or requests go to exactly this place, with TLS or to a loopback address.
func FuzzEndpoint(f *testing.F) {
	for _, endpoint := range append(slices.Clone(badEndpoints), defaultEndpoint, "https://h/v1/", "http://[::1]/v1",
		"http://localhost:80/v1", "HTTPS://H/a/", "https://[fe80::1%25eth0]:1/", "https://h\\@x/", "") {
		f.Add(fmt.Sprint(endpoint))
	}
	f.Fuzz(func(t *testing.T, endpoint string) {
		got, err := parseEndpoint(endpoint)
		if err != nil {
			return
		}
		again, err := parseEndpoint(got)
		same(t, "what is stored, stored again", fmt.Sprint(again, err), fmt.Sprint(got, nil))
		req, err := http.NewRequest(http.MethodGet, got+adminKeysPath, nil)
		if err != nil || req.URL.String() != got+adminKeysPath || strings.Contains(req.URL.Path, "/../") {
			t.Fatalf("%q is stored as %q, but %v is called (%v)", endpoint, got, req, err)
		}
		u, host := req.URL, req.URL.Hostname()
		_, err = net.ResolveTCPAddr("tcp", net.JoinHostPort("127.0.0.1", cmp.Or(u.Port(), "443")))
		loopback := u.Scheme == "http" && (host == "localhost" || net.ParseIP(host).IsLoopback())
		failIf(t, u.Scheme != "https" && !loopback || u.User != nil || u.RawQuery+u.Fragment != "" || err != nil,
			"%q is called as %s (%v)", endpoint, u, err)
	})
}

// TestConfigProof: what a write of config asks OpenAI. Config is stored with the id of the very key, or is as it was.
func TestConfigProof(t *testing.T) {
	for _, tt := range []struct {
		field, value string // of the write
		list         string // answer to a search for the key: ids and redacted values, $ for its end; empty: the truth
		id, want     string // id: what is found then; want: texts in the refusal
	}{
		{"admin_api_key_id", "$first", "", "$first", ""}, {"admin_api_key_id", "", "", "$first", ""},
		{"admin_api_key", "$value", "", "$last", ""}, // which is on the second page
		{"admin_api_key_id", "", "key_0 sk-admin-sim*****$", "key_0", ""},
		{"admin_api_key_id", "", "key_0 sk-admin...???", "", "admin_api_key_id is required|0 of"},
		{"admin_api_key_id", "", "key_0 ?", "", "admin_api_key_id is required|0 of"},
		{"admin_api_key_id", "", "key_0 sk-admin...$|key_1 sk-...$", "", "admin_api_key_id is required|2 of"},
		{"admin_api_key_id", "", "../x sk-admin...$", "", "admin_api_key_id is required|0 of"},
		{"admin_api_key_id", "$last", "", "", "admin_api_key_id|another key"},
		{"admin_api_key_id", "key_x", "", "", "admin_api_key_id does not exist|404"},
		{"admin_api_key", "sk-admin-unknown", "", "", "admin_api_key|refused|401 invalid_api_key|id req_"},
		{"organization_id", "org-other", "", "", "organization_id|refused|401 mismatched_organization"},
	} {
		t.Run(tt.field+" "+tt.value+" "+tt.list, func(t *testing.T) {
			e := newEnv(t)
			for range 120 {
				e.sim.AddAdminKey("filler")
			}
			key, id := e.sim.AdminKey()
			last, lastID := e.sim.AddAdminKey("last")
			e.Storage.Set("config", `{"admin_api_key":"sk-old-key","admin_api_key_id":"key_x","organization_id":"o"}`)
			data := fields{"admin_api_key": key, "admin_api_key_id": "", "organization_id": "org-sim"}
			ids := map[string]string{"$first": id, "$last": lastID, "$value": last}
			data[tt.field] = cmp.Or(ids[tt.value], tt.value)
			if tt.list != "" {
				text := strings.NewReplacer("$", key[len(key)-3:], " ", `","redacted_value":"`, "|", `"},{"id":"`)
				list := `{"data":[{"id":"` + text.Replace(tt.list) + `"}]}`
				e.sim.Inject(fault{Method: "GET", Path: "admin_api_keys$", Status: 200, Body: list})
			}
			if tt.id == "" {
				e.Unchanged("refusal", func() { e.Refused("config", data, strings.Split(tt.want, "|")...) })
				return
			}
			e.OK("config", data)
			same(t, "admin_api_key_id", e.config().AdminAPIKeyID, cmp.Or(ids[tt.id], tt.id))
		})
	}
}

// TestConfigProofFaults: whatever befalls the question to OpenAI, a write ends in time. Config is not stored without a
// proof; a role is stored with a warning, unless OpenAI judged it.
func TestConfigProofFaults(t *testing.T) {
	const accepted, warned, refused, broken = "accepted", "warned", "refused", "broken"
	writes := map[string]fields{"config": {"rotation_period": "720h"}, "roles/web": {"ttl": "2h"}}
	type row struct {
		fault        fault
		config, role string // config: text in the refusal; empty: accepted
	}
	inBubbles(t, map[string]row{
		"refuse":          {fault{Kind: "refuse"}, "connection refused", warned},
		"hang":            {fault{Kind: "hang"}, "timed out", warned},
		"redirect":        {fault{Kind: "redirect"}, "redirects are not followed", warned},
		"another":         {fault{Status: 200, Body: `{"id":"another"}`}, "lacks", warned},
		"no OpenAI":       {fault{Status: 404, Body: "<html>"}, "could not be verified", refused},
		"401":             {fault{Status: 401}, "was refused", broken},
		"429":             {fault{Status: 429, Header: after("50")}, "429", warned},
		"500":             {fault{Status: 500}, "500", warned},
		"503 for a while": {fault{Status: 503, Times: 3}, "", accepted},
	}, func(t *testing.T, e *env, tt row) {
		tt.fault.Times = cmp.Or(tt.fault.Times, -1)
		for path, data := range writes {
			e.sim.ClearFaults()
			time.Sleep(2 * time.Minute) // until no rate limit is remembered
			e.sim.Inject(tt.fault)
			want, text := tt.role, "project_id"
			if path == "config" && want != accepted {
				want, text = refused, tt.config
			}
			before, start := e.Storage.All(), time.Now()
			switch resp, err := e.Write(path, data); want {
			case accepted:
				same(t, "answer", fmt.Sprint(resp, err), "<nil> <nil>")
			case warned:
				e.Warned("answer", resp, 1, "unchecked: ")
			case broken:
				same(t, "an error, not the caller's mistake", err != nil, true)
			default:
				e.Refusal(resp, err, text)
			}
			same(t, "storage is as it was", maps.Equal(e.Storage.All(), before), want == refused || want == broken)
			failIf(t, time.Since(start) > requestTimeout, "took %s", time.Since(start))
		}
	})
}

// TestConfigJob: a write or delete of config that could not be stored leaves the rotation job as it was registered.
func TestConfigJob(t *testing.T) {
	hourly, none := fields{"rotation_period": "1h"}, fields{"rotation_policy": "p"}
	suspended := fields{"rotation_period": "1h", "disable_automated_rotation": true}
	for name, tt := range map[string]struct{ before, write fields }{ // before nil: no config; write nil: it is deleted
		"first write": {nil, hourly}, "first job": {none, hourly}, "another": {hourly, fields{"rotation_period": "2h"}},
		"no more": {hourly, fields{"rotation_period": 0}}, "suspended": {hourly, suspended}, "delete": {hourly, nil},
		"not suspended": {suspended, fields{"disable_automated_rotation": false}},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			e.System.RotationErr = nil
			if tt.before != nil {
				e.configure(tt.before)
			}
			request, verb, data := "update config", "put", e.credentials()
			if maps.Copy(data, tt.write); tt.write == nil {
				request, verb = "delete config", "delete"
			}
			before := e.System.Jobs()
			e.Storage.Fail(verb, "config")
			_, err := e.Request(request, data)
			e.Fails(request, err, "injected failure")
			same(t, "jobs", e.System.Jobs(), before)
		})
	}
}

// TestConfigForgets: a change of organization and a delete name, in warnings and in the log, the admin keys that OpenAI
// may still have. What a rotation began to make stays in config with its organization.
func TestConfigForgets(t *testing.T) {
	e := newConfiguredEnv(t)
	elsewhere := fields{"organization_id": "org-other", "verify_connection": false}
	e.Warned("nothing to forget", e.OK("config", elsewhere), 1, "organization_id has changed",
		"static roles")
	same(t, "warnings in the log with nothing to forget", e.Log.Count("warn", ""), 0)
	e.configure(nil)
	cfg := e.config()
	cfg.PendingDeletion = []string{"key_one", "key_two"}
	cfg.Creating = []creatingKey{{"vault-admin-a", "org-sim", "", time.Now()},
		{"vault-admin-b", "org-b", "", time.Now()}}
	stored, _ := json.Marshal(cfg)
	names := []string{"key_one, key_two", "vault-admin-a, vault-admin-b"}
	e.Storage.Set("config", string(stored))
	e.Warned("delete", e.Must("delete config", nil), 3, append(names, "static roles")...)
	e.Storage.Set("config", string(stored))
	e.Warned("another field", e.OK("config", fields{"admin_key_ttl": 0}), 0)
	e.Warned("another organization", e.OK("config", elsewhere), 3, names...)
	for _, text := range names {
		same(t, "warnings in the log with "+text, e.Log.Count("warn", text), 2)
	}
	orgs := e.config().Creating[0].OrganizationID + " " + e.config().Creating[1].OrganizationID
	same(t, "what is left", fmt.Sprint(e.config().PendingDeletion, " ", orgs), "[] org-sim org-b")
}

// TestConfigMissing: ticks without config ask nothing and flood no log; with config, all that was left is deleted.
func TestConfigMissing(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		for range 30 {
			l := e.lease("web")
			e.sim.Inject(fault{Method: http.MethodDelete, Status: 400})
			same(t, "revocation failed", e.Revoke(l) != nil, true)
		}
		e.Must("delete config", nil)
		before := e.Log.Count("", "")
		e.Wire.Sent()
		e.Run(5 * time.Minute)
		lines := e.Log.Count("", "") - before
		failIf(t, lines > 5, "5 ticks without config: got %d lines of the log, want 5", lines)
		same(t, "calls without config", e.Wire.Sent(), "[]")
		e.configure(nil)
		e.Run(time.Minute)
		e.quiet()
		e.have(0, 0, "after a tick with config")
	})
}

// TestConfigFirstKeyAgain: a write that replaces a key which a rotation made warns, names its id and leaves it alive.
func TestConfigFirstKeyAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		first := e.credentials()
		unproved := vaultsim.With(first, "verify_connection", false)
		rotated := e.Must("update config/rotate", nil).Data["admin_api_key_id"].(string)
		e.Refused("config", first, "refused") // by the proof
		other, otherID := e.sim.AddAdminKey("other")
		for _, tt := range []struct {
			data fields
			want bool
		}{
			{fields{"admin_key_ttl": 0}, false}, {unproved, true}, {unproved, false},
			{fields{"admin_api_key": other, "admin_api_key_id": otherID}, false},
		} {
			resp := e.OK("config", tt.data)
			got := resp != nil && strings.Contains(fmt.Sprint(resp.Warnings), rotated)
			failIf(t, got != tt.want, "warned of the rotated key: %v, want %v", got, tt.want)
		}
		e.Run(3 * time.Hour)
		failIf(t, !strings.Contains(fmt.Sprint(e.sim.AdminKeys()), rotated) || e.leftovers() != "0 0",
			"got keys %v, and %s to delete", e.sim.AdminKeys(), e.leftovers())
	})
}

// TestRoleBadInput: a bad value of a role is refused with its field's name and stores nothing.
func TestRoleBadInput(t *testing.T) {
	bads := vaultsim.Bads
	e := newEnv(t)
	e.configure(nil)
	var scopes []string
	for i := range 101 {
		scopes = append(scopes, fmt.Sprintf("api.s%d.read", i))
	}
	e.RefusesAll("roles/web", fields{"project_id": ours, "ttl": "1h"}, slices.Concat(
		bads("project_id", "required", nil, ""),
		bads("project_id", "", "proj_x/../../admin_api_keys", "proj_x?limit=1", strings.Repeat("p", 129), aMap),
		bads("service_account_name_template", "", aMap, strings.Repeat("x", 257)),
		bads("service_account_name_template", "not valid", "", "{{.RandomSuffix", "{{.RandomSuffix}}{{end}}",
			"{{.Random}}", "{{.RoleName.RandomSuffix}}", "{{nope}}{{.RandomSuffix}}", "{{truncate -1 .RandomSuffix}}"),
		bads("service_account_description", "", strings.Repeat("d", 1025), aMap),
		bads("ttl", "more than 0", 0), bads("ttl", "max_ttl", "25h"), bads("ttl", "", badDurations...),
		bads("max_ttl", "more than 0", 0), bads("max_ttl", "365 days", "366d"), bads("max_ttl", "", badDurations...),
		bads("max_ttl", "ttl must be", "59m"), // less than ttl
		bads("enforce_key_expiry", "true or false", "perhaps", aMap),
		bads("scopes", "names like", "api.all.read,API ALL", []string{strings.Repeat("s", 129)}),
		bads("scopes", "", scopes, aMap), bads("service_account_role", "scopes", "member"), // without scopes
		bads("service_account_role", "member or owner", "none", "admin"), bads("service_account_role", "", aMap),
		bads("service_account_id", "", "svc_acct_x/api_keys", strings.Repeat("s", 129), aMap),
	))
	account := e.sim.AddServiceAccount(ours, "app", "member")
	e.OK("roles/web", fields{"scopes": "api.all.read", "service_account_role": "owner"})
	e.Refused("roles/web", fields{"service_account_id": account}, "service_account_role", "_id", "exclude")
	e.Refused("roles/web", fields{"scopes": ""}, "service_account_role needs scopes")
	e.OK("roles/web", fields{"service_account_id": account, "service_account_role": ""})
	e.OK("roles/web", fields{"scopes": scopes[1:]})
}

// TestRole: a write changes what it names, and a role that was deleted gives no credential.
func TestRole(t *testing.T) {
	e := newEnv(t)
	e.configure(nil)
	account := e.sim.AddServiceAccount(ours, "app", "member")
	exists := func() string {
		req := &logical.Request{Path: "roles/web.1", Operation: logical.CreateOperation, Storage: e.Storage}
		_, exists, err := e.b().HandleExistenceCheck(t.Context(), req)
		return fmt.Sprint(e.Must("list roles", nil).Data, e.Get("roles/web.1") != nil, exists, err)
	}
	same(t, "before it is written", exists(), "map[] false false <nil>")
	want := fields{
		"project_id": "proj_sim", "service_account_name_template": "vault-{{.RoleName}}-{{.RandomSuffix}}",
		"service_account_description": "Service account created by Vault", "ttl": 3600, "max_ttl": 86400,
		"enforce_key_expiry": true, "scopes": []string{}, "service_account_role": "", "service_account_id": "",
		"credential_type": "api_key",
	}
	for _, step := range []struct{ write, shown fields }{ // shown: where it is not what was written
		{fields{"project_id": "proj_sim"}, nil}, {nil, nil},
		{fields{"ttl": "90m", "max_ttl": "365d"}, fields{"ttl": 5400, "max_ttl": 31536000}},
		{fields{"ttl": 7200, "max_ttl": 7200}, nil}, {fields{"enforce_key_expiry": false}, nil},
		{fields{"service_account_description": "for tests", "enforce_key_expiry": "true"}, nil},
		{fields{"scopes": []string{"api.b.read", "api.a.read", "api.b.read"}, "service_account_role": "owner"},
			fields{"scopes": "[api.b.read api.a.read]"}},
		{fields{"service_account_role": "", "service_account_id": account}, nil},
		{fields{"scopes": ""}, fields{"scopes": "[]"}}, {fields{"service_account_id": ""}, nil},
	} {
		// The longest max_ttl is over the mount's maximum.
		e.Warned(step.write, e.OK("roles/web.1", step.write), strings.Count(fmt.Sprint(step.write), "365d"))
		maps.Copy(want, step.write)
		maps.Copy(want, step.shown)
		same(t, "role", e.Get("roles/web.1").Data, want)
	}
	e.OK("roles/short", fields{"project_id": "proj_sim", "max_ttl": "10m"})
	same(t, "ttl with a max_ttl below its default", e.Get("roles/short").Data["ttl"], 600)
	same(t, "when it is there", exists(), "map[keys:[short web.1]] true true <nil>")
	same(t, "delete", e.Must("delete roles/web.1", nil), (*logical.Response)(nil))
	same(t, "when it is deleted", exists(), "map[keys:[short]] false false <nil>")
	resp, err := e.Request("read creds/web.1", nil)
	e.Refusal(resp, err, `role "web.1" does not exist`)
}

// TestRoleProof: what OpenAI refuses of a role is not stored; what works but is no good idea is stored with a warning.
func TestRoleProof(t *testing.T) {
	own := newSuffix("aaaaaa", time.Now())
	for _, tt := range []struct {
		field, value     string // of an account: name and role, or an id
		calls            int
		refusal, warning string // texts in it; both empty: the role is stored
	}{
		{"project_id", "proj_sim", 1, "", ""}, {"project_id", "proj_x", 1, "project_id|proj_x|404|request id req_", ""},
		{"project_id", "proj_archived", 1, "project_id|proj_archived|archived", ""},
		{"service_account_id", "app member", 2, "", ""}, {"service_account_id", "svc_x", 2, "account_id|svc_x", ""},
		{"service_account_id", "app none", 2, "", "no role in the project"},
		{"service_account_id", "web-" + own + " member", 2, "", "Vault mount|when that lease ends"},
		{"service_account_id", "web-" + own + "- member", 2, "", ""},
		{"service_account_id", "web-b" + own[1:] + " member", 2, "", "Vault mount"}, // another one
	} {
		e := newConfiguredEnv(t)
		e.b().mountID = "aaaaaa"
		e.sim.AddProject("proj_archived", "Archived")
		e.sim.ArchiveProject("proj_archived")
		data := fields{"ttl": "2h", tt.field: tt.value}
		if name, role, ok := strings.Cut(tt.value, " "); ok {
			data[tt.field] = e.sim.AddServiceAccount(ours, name, role)
		}
		e.Wire.Sent()
		if tt.refusal != "" {
			e.Unchanged(data, func() { e.Refused("roles/web", data, strings.Split(tt.refusal, "|")...) })
		} else {
			e.Warned(data, e.OK("roles/web", data), min(len(tt.warning), 1), strings.Split(tt.warning, "|")...)
		}
		same(t, tt.value+": calls", len(e.Wire.Sent()), tt.calls)
	}
}

// TestRoleAccountName: creds never names an account that it is not about.
func TestRoleAccountName(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		for i, name := range []string{"first", "second"} {
			id := e.sim.AddServiceAccount(ours, name, "member")
			e.sim.Inject(fault{Method: "GET", Skip: 2 - 2*i, Times: 4}) // so that the second's name is not known
			e.OK("roles/web", fields{"service_account_id": id})
			got, want := e.lease("web").Data, id+[]string{"first", ""}[i]
			same(t, "account", fmt.Sprint(got["service_account_id"], got["service_account"]), want)
		}
	})
}

// TestRoleWrittenMeanwhile: what comes while a write waits for OpenAI is done after it, on what it has stored. No write
// lifts a restriction of another one, or brings back anything of a role that was deleted meanwhile.
func TestRoleWrittenMeanwhile(t *testing.T) {
	const described = " Service account created by Vault"
	restricted, longer := fields{"scopes": "api.a.read"}, fields{"ttl": "3h"}
	whole := fields{"project_id": ours, "ttl": "2h"}
	old := fields{"project_id": ours, "scopes": "api.a.read", "service_account_description": "old"}
	type row struct {
		before, write, meanwhile fields // of roles/new; meanwhile nil: it is deleted
		want                     string // scopes, ttl, description; empty: no role
	}
	inBubbles(t, map[string]row{
		"restricted": {whole, longer, restricted, "[api.a.read] 10800" + described}, "deleted": {old, longer, nil, ""},
		"same field": {whole, longer, fields{"ttl": "1h"}, "[] 3600" + described},
		"created":    {nil, whole, old, "[api.a.read] 7200 old"}, "all named": {old, whole, nil, ""},
	}, func(t *testing.T, e *env, tt row) {
		if tt.before != nil {
			e.OK("roles/new", tt.before)
		}
		var second sync.WaitGroup
		e.Wire.BeforeEach(func(n int, _ *http.Request) {
			if n == 1 && tt.meanwhile == nil {
				second.Go(func() { e.Must("delete roles/new", nil) })
			} else if n == 1 {
				second.Go(func() { e.OK("roles/new", tt.meanwhile) })
			}
			runtime.Gosched()
		})
		e.OK("roles/new", tt.write)
		second.Wait()
		if tt.want == "" {
			same(t, "role", e.Get("roles/new"), (*logical.Response)(nil))
			return
		}
		r := e.Get("roles/new").Data
		same(t, "role", fmt.Sprint(r["scopes"], " ", r["ttl"], " ", r["service_account_description"]), tt.want)
	})
}

// TestRoleDeletedAtOnce: a role that is deleted hands out no more, whatever else is under way with it or with what
// shares its lock.
func TestRoleDeletedAtOnce(t *testing.T) {
	locks, name := locksutil.CreateLocks(), ""
	for i := 0; name == ""; i++ {
		n := fmt.Sprint("r", i)
		if locksutil.LockForKey(locks, rolePrefix+n) == locksutil.LockForKey(locks, staticPrefix+"gw") {
			name = n
		}
	}
	for _, write := range []string{"static-roles/gw", "roles/" + name} {
		inBubble(t, func(t *testing.T, e *env) {
			e.OK("roles/"+name, fields{"project_id": ours})
			account := e.sim.AddServiceAccount(ours, "gateway", "member")
			data := staticRoleOn(account, "1h")
			if write != "static-roles/gw" {
				data = fields{"ttl": "2h"}
			}
			gone := false
			var second sync.WaitGroup
			e.Wire.BeforeEach(func(n int, _ *http.Request) {
				if n != 1 {
					return
				}
				second.Go(func() { e.Must("delete roles/"+name, nil) })
				for i := 0; i < 1_000_000 && !gone; i++ {
					gone = e.Storage.All()[rolePrefix+name] == ""
					runtime.Gosched()
				}
			})
			e.OK(write, data)
			second.Wait()
			same(t, write+": deleted while that waits for OpenAI", gone, true)
			same(t, "role in the end", e.Storage.All()[rolePrefix+name], "")
		})
	}
}

// TestRoleDeleteAsksNobody: a role of API keys has no rule, and so its delete has nothing to ask OpenAI for.
func TestRoleDeleteAsksNobody(t *testing.T) {
	e := newConfiguredEnv(t)
	e.sign()
	e.Wire.Sent()
	e.Warned("delete", e.Must("delete roles/web", nil), 0)
	same(t, "calls", len(e.Wire.Sent()), 0)
}

// TestRoleWritesAtOnce: of writes that come at once, each of its own field, none is lost.
func TestRoleWritesAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.Storage.SetAfter(func(string, string) error { runtime.Gosched(); return nil })
		want := e.Get("roles/web").Data
		var writes sync.WaitGroup
		for _, data := range []fields{{"ttl": 7200}, {"max_ttl": 18000}, {"service_account_name_template": "new"},
			{"scopes": []string{"api.a.read"}}, {"service_account_description": "new"}, {"enforce_key_expiry": false}} {
			maps.Copy(want, data)
			writes.Go(func() { e.OK("roles/web", data) })
		}
		writes.Wait()
		same(t, "role", e.Get("roles/web").Data, want)
	})
}

// TestNameTemplates: whatever the template makes is made valid, cut, and ends in "-" and the suffix.
func TestNameTemplates(t *testing.T) {
	const suffix = "abc234gzzzz234567ab"
	data := nameData{RoleName: "web.1", RandomSuffix: suffix, ProjectID: "proj_sim", ProjectName: "Sim project",
		DisplayName: "oidc-Jané Doe@example.com"}
	x44 := strings.Repeat("x", 44)
	for template, want := range map[string]string{ // a pattern of what is before the suffix
		"vault-{{.RoleName}}-{{.RandomSuffix}}": "vault-web-1", "{{.RoleName}}{{.RandomSuffix}}": "web-1",
		"{{.ProjectID}}_{{.RandomSuffix}}": "proj_sim_", "{{.ProjectName}}-{{.RandomSuffix}}": "Sim-project",
		"{{.DisplayName}}-{{.RandomSuffix}}":                 "oidc-Jan-Doe-example-com",
		"{{.DisplayName | truncate 7 | lowercase}}-{{uuid}}": "oidc-ja-[0-9a-f-]{36}",
		"{{random 20 | uppercase}}":                          "[A-Z0-9]{20}", "fixed": "fixed",
		"{{.RandomSuffix}}-{{.RoleName}}": suffix + "-web-1", "{{.RandomSuffix}}{{.RandomSuffix}}": suffix,
		"{{truncate 1 .RandomSuffix}}": "a", "{{uppercase .RandomSuffix}}": strings.ToUpper(suffix),
		x44 + "-{{.RandomSuffix}}": x44, x44 + "y-{{.RandomSuffix}}": x44, x44 + x44: x44, x44[:43] + "-y": x44[:43],
		"{{.RandomSuffix}}": "vault", "-ä {{.RandomSuffix}} ö-": "vault", "{{/* */}}": "vault", "äöü": "vault", // empty
	} {
		name, err := renderName(template, data)
		if err != nil || !regexp.MustCompile("^"+want+"-"+suffix+"$").MatchString(name) || len(name) > maxNameLength {
			t.Errorf("template %q: got %q, %v, want %s-%s", template, name, err, want, suffix)
		}
	}
}

// TestNamesUnique: a name at OpenAI carries the mount_id that config and tidy show and the end of its request, and no
// two are the same, whatever the template of an older role and the asking token make of it.
func TestNamesUnique(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		mount := fmt.Sprint(e.Get("config").Data["mount_id"])
		same(t, "mount_id of tidy", e.Get("tidy").Data["mount_id"], mount)
		same(t, "mount_id of a pass", e.OK("tidy", nil).Data["mount_id"], mount)
		other, seen := "x-"+newSuffix("bbbbbb", time.Now().Add(-time.Hour)), map[string]bool{}
		x99 := strings.Repeat("x", 99)
		for _, template := range []string{"fixed", "{{truncate 1 .RandomSuffix}}", "{{unix_time}}", "{{.DisplayName}}",
			"{{.RandomSuffix}}-{{.DisplayName}}", "{{.DisplayName}}-{{.RandomSuffix}}"} {
			text, _ := json.Marshal(role{ProjectID: ours, ServiceAccountNameTemplate: template, MaxTTL: 2 * time.Hour})
			e.Storage.Set("roles/old", string(text))
			for _, e.DisplayName = range []string{"token", "", "…", "---", x99, other, "{{.}}\r\x00"} {
				for range 10 {
					data := e.lease("old").Data
					name := data["service_account"].(string)
					accounts := e.sim.ServiceAccounts(ours)
					same(t, "account at OpenAI", accounts[len(accounts)-1].Name, name)
					tag, end, ok := parseName(name)
					want := endOf(time.Now(), 2*time.Hour)
					failIf(t, !ok || tag != mount || !end.Equal(want) || seen[name],
						"%q for %q: got %s, want a new name of %s and %s", template, e.DisplayName, name, mount, want)
					seen[name] = true
					time.Sleep(13 * time.Second)
				}
			}
		}
	})
}

// TestNameProject: a project's name costs a call where a template uses it, once.
func TestNameProject(t *testing.T) {
	e := newConfiguredEnv(t)
	e.OK("roles/named", fields{"project_id": "proj_sim", "service_account_name_template": "{{.ProjectName}}"})
	e.Restart()
	e.Wire.Sent()
	for i, want := range []int{2, 1, 1} {
		name := e.lease("named").Data["service_account"].(string)
		same(t, "prefix of the name", name[:len(name)-suffixLength], "Simulated-project-")
		same(t, fmt.Sprint("calls for credential ", i), len(e.Wire.Sent()), want)
	}
	e.sim.AddProject("proj_unnamed", "")
	e.OK("roles/named", fields{"project_id": "proj_unnamed"})
	name := e.lease("named").Data["service_account"].(string)
	same(t, "prefix of the name in a project without one", name[:len(name)-suffixLength], "vault-")
}

// FuzzNameTemplate: a template is refused, or gives valid names that end in the suffix.
func FuzzNameTemplate(f *testing.F) {
	for _, template := range []string{defaultNameTemplate, "", "{{", "{{.DisplayName | truncate 5}}{{random 12}}",
		"{{.DisplayName}}", "{{with $x := .RandomSuffix}}{{$x}}{{else}}{{end}}", "{{timestamp \"2006\"}}", "{{uuid}}",
		"{{slice .RandomSuffix 2 5}}", "{{index .RandomSuffix 1}}", "{{len .}}", "{{- /* x */ -}} {{.RandomSuffix}}"} {
		f.Add("web", template, "token")
		f.Add("w.e-b_1", template, "oidc-Jané\x00{{.X}}-abc234gzzzz234567ab"+strings.Repeat("long", 40))
	}
	f.Fuzz(func(t *testing.T, role, template, who string) {
		suffix := newSuffix("abc234", time.Now())
		data := nameData{RoleName: role, RandomSuffix: suffix, ProjectID: "proj", DisplayName: who}
		name, err := renderName(template, data)
		failIf(t, err == nil && !regexp.MustCompile(`^[A-Za-z0-9_-]{1,44}-`+suffix+`$`).MatchString(name),
			"template %q: got name %q", template, name)
	})
}

// credKind is a kind of role.
type credKind struct {
	name       string
	scopes     string
	account    string // the existing account's role; empty: each key gets an account of its own
	calls      int    // to OpenAI for a credential
	unexpiring bool
}

// credKinds are the kinds of roles, each with and without key expiry, by name.
var credKinds = func() map[string]credKind {
	all := map[string]credKind{}
	for _, k := range []credKind{
		{name: "plain", calls: 1},
		{name: "scoped", scopes: "api.responses.write", calls: 3},
		{name: "existing account", account: "member", calls: 1},
		{name: "existing account with scopes", scopes: "api.responses.write", account: "owner", calls: 1},
		{name: "existing account without a role", account: "none", calls: 1},
	} {
		all[k.name] = k
		k.unexpiring = true
		all[k.name+" without expiry"] = k
	}
	return all
}()

// write writes the role "r" of this kind.
func (k credKind) write(e *env) {
	e.t.Helper()
	role := fields{"project_id": ours, "max_ttl": "2h", "scopes": k.scopes, "enforce_key_expiry": !k.unexpiring}
	if k.account != "" {
		role["service_account_id"] = e.sim.AddServiceAccount(ours, "there", k.account)
	}
	e.OK("roles/r", role)
}

// have checks that OpenAI has n credentials of this kind, and nothing else but the existing account.
func (k credKind) have(e *env, n int, when string) {
	e.t.Helper()
	accounts := n
	if k.account != "" {
		accounts = 1
	}
	e.have(accounts, n, when)
}

// keyExpires returns when OpenAI expires the first key, and the end that its name or its account's has.
func (k credKind) keyExpires(e *env) (expires, end time.Time) {
	key := e.sim.ProjectKeys(ours)[0]
	name := key.Name
	if k.account == "" {
		name = e.sim.ServiceAccounts(ours)[0].Name
	}
	_, end, _ = parseName(name)
	return key.Expires, end
}

// eachCredKind is inBubbles for the kinds of roles, with a role "r" of the kind.
func eachCredKind(t *testing.T, test func(t *testing.T, e *env, k credKind)) {
	inBubbles(t, credKinds, func(t *testing.T, e *env, k credKind) {
		k.write(e)
		test(t, e, k)
	})
}

// remembers checks how many lost creates and clean-up entries there are, and that storage has nothing new else.
func (e *env) remembers(lost, cleanups int, when string) {
	e.t.Helper()
	gotLost, got := len(e.b().lostSince(lostTime)), len(e.Storage.Keys(cleanupPrefix))
	failIf(e.t, gotLost != lost || got != cleanups || len(e.Storage.Keys("")) > 2+min(cleanups, 1),
		"%s: got %d lost creates, %d clean-up entries, and storage %q, want %d and %d",
		when, gotLost, got, e.Storage.Keys(""), lost, cleanups)
}

// leaseRequest makes a request about a lease with this internal data, past Vault's own checks.
func (e *env) leaseRequest(op logical.Operation, issued time.Time, internal map[string]any) error {
	req := &logical.Request{Operation: op, Storage: e.Storage, Secret: &logical.Secret{InternalData: internal}}
	req.Secret.IssueTime = issued
	return vaultsim.Failure(e.b().HandleRequest(context.Background(), req))
}

// TestCreds issues and revokes a credential of each kind of role, with exactly these requests; LIFE is a key's expiry.
func TestCreds(t *testing.T) {
	const (
		keyless = `POST ACCOUNTS {"create_service_account_only":true,"name":"NAME"}` + "\n"
		member  = `POST ACCOUNTS/ACCOUNT {"role":"member"}` + "\n"
		owner   = `POST ACCOUNTS/ACCOUNT {"role":"owner"}` + "\n"
		key     = `POST ACCOUNTS/ACCOUNT/api_keys {LIFE"name":"NAME"`
		one     = `,"scopes":["api.a.read"]}`
		two     = `,"scopes":["api.b.c","api.a.read"]}`
		account = "DELETE ACCOUNTS/ACCOUNT"
		only    = "DELETE KEYS/KEY"
	)
	twice := []string{"api.b.c", "api.a.read", "api.b.c"}
	type row struct {
		issue, revoke string // the requests to OpenAI
		role          fields
	}
	inBubbles(t, map[string]row{
		"own account": {`POST ACCOUNTS {LIFE"name":"NAME"}`, account, fields{}},
		"scoped":      {keyless + member + key + two, account, fields{"scopes": twice}},
		"scoped, owner": {keyless + owner + key + one, account,
			fields{"scopes": "api.a.read", "service_account_role": "owner"}},
		"existing":         {key + "}", only, fields{"service_account_id": ""}},
		"existing, scopes": {key + one, only, fields{"service_account_id": "", "scopes": "api.a.read,api.a.read"}},
	}, func(t *testing.T, e *env, tt row) {
		there, role := e.sim.AddServiceAccount(ours, "app", "member"), tt.role
		if role["service_account_id"] != nil {
			role["service_account_id"] = there
		}
		for _, expiring := range []bool{true, false} {
			role["enforce_key_expiry"] = expiring
			e.OK("roles/web", role)
			e.Wire.Sent()
			l, issue := e.lease("web"), tt.issue
			words := e.checkCredential(l, role)
			if !expiring {
				issue = strings.Replace(issue, "LIFE", "", 1)
			}
			same(t, "requests", words.Replace(strings.Join(e.Wire.Sent(), "\n")), issue)
			e.MustRevoke(l)
			same(t, "requests of the revocation", words.Replace(strings.Join(e.Wire.Sent(), "\n")), tt.revoke)
			e.have(1, 0, "after revocation")
		}
	})
}

// checkCredential checks that OpenAI has what the role says, and that the lease says so. It returns a replacer that
// puts words in the place of ids and paths.
func (e *env) checkCredential(l *vaultsim.Lease, role map[string]any) *strings.Replacer {
	e.t.Helper()
	keys, accounts := e.sim.ProjectKeys(ours), e.sim.ServiceAccounts(ours)
	k, made := keys[0], accounts[len(accounts)-1]
	name := made.Name
	if role["service_account_id"] != nil {
		name = k.Name
	}
	expires, text := l.Expires.Add(time.Minute), l.Expires.Add(time.Minute).UTC().Format(time.RFC3339)
	if role["enforce_key_expiry"] == false {
		expires, text = time.Time{}, ""
	}
	wantRole, _ := role["service_account_role"].(string)
	tag, end, _ := parseName(name)
	data, header := maps.Clone(l.Data), e.Wire.Header()
	delete(data, "api_key")
	e.NoSecrets("the lease besides api_key", fmt.Sprint(data))
	for what, values := range map[string][2]any{
		"owner":      {[]any{len(keys), k.ServiceAccountID, made.Role}, []any{1, made.ID, cmp.Or(wantRole, "member")}},
		"name":       {[]any{tag, end}, []any{e.b().mountID, endOf(l.Issued, 24*time.Hour)}},
		"key expiry": {k.Expires, expires},
		"scopes":     {e.Get("roles/web").Data["scopes"], k.Scopes},
		"accepted":   {e.sim.Use(l.Data["api_key"].(string)), true},
		"lease":      {[]any{l.Expires.Sub(l.Issued), l.MaxTTL, l.Renewable, l.Warnings}, "[1h0m0s 24h0m0s true []]"},
		"headers": {[]string{header.Get("User-Agent"), header.Get("OpenAI-Organization"), header.Get("Content-Type")},
			"[vault-plugin-secrets-openai org-sim application/json]"},
		"key sent": {header.Get("Authorization") == "Bearer "+e.config().AdminAPIKey, true},
		"answer": {data, fields{"api_key_id": k.ID, "service_account": made.Name, "service_account_id": made.ID,
			"project_id": ours, "organization_id": "org-sim", "scopes": k.Scopes, "expires_at": text}},
	} {
		same(e.t, what, values[0], values[1])
	}
	const project = "/organization/projects/proj_sim/"
	return strings.NewReplacer(project+"service_accounts", "ACCOUNTS", project+"api_keys", "KEYS",
		made.ID, "ACCOUNT", k.ID, "KEY", name, "NAME", `"expires_in_seconds":3660,`, "LIFE")
}

// TestCredsStorage: a thousand credentials of each kind cost one Get of storage for each issue and renewal, and nothing
// else.
func TestCredsStorage(t *testing.T) {
	const n = 1000
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		leases := make([]*vaultsim.Lease, n)
		count := func(want map[string]int, do func(i int) error) {
			t.Helper()
			e.Storage.ResetCounts()
			for i := range leases {
				e.NoError(do(i))
			}
			same(t, "storage operations", e.Storage.Counts(), want)
		}
		gets := map[string]int{"get": n}
		count(gets, func(i int) (err error) { leases[i], err = e.Issue("creds/r", nil); return err })
		count(gets, func(i int) error { return e.Renew(leases[i], 0) })
		k.have(e, n, "after the renewals")
		count(map[string]int{}, func(i int) error { return e.Revoke(leases[i]) })
		k.have(e, 0, "after the revocations")
		e.remembers(0, 0, "in the end")
	})
}

// TestCredsTTL: a lease has the TTL that was asked for, within the bounds of role and mount, and its key lives a
// minute longer, but never longer than OpenAI's limit.
func TestCredsTTL(t *testing.T) {
	const hour, usual, year = time.Hour, 768 * time.Hour, 365 * 24 * time.Hour
	for _, tt := range []struct {
		ttl, maxTTL string
		mount       time.Duration // its maximum; 0: it can't be had
		asked       any
		want        time.Duration
	}{
		{"1h", "24h", usual, nil, hour}, {"1h", "24h", usual, 1, time.Second}, {"1h", "24h", usual, "24h", 24 * hour},
		{"1h", "24h", usual, "900", hour / 4}, {"1h", "24h", 0, "7h", 7 * hour}, {"365d", "365d", 2 * year, nil, year},
		{"12h", "24h", 6 * hour, nil, 6 * hour}, {"1h", "24h", 6 * hour, "7h", 6 * hour},
	} {
		inBubble(t, func(t *testing.T, e *env) {
			e.OK("roles/web", fields{"ttl": tt.ttl, "max_ttl": tt.maxTTL})
			e.System.MaxLeaseTTLVal = tt.mount
			l, err := e.Issue("creds/web", fields{"ttl": tt.asked})
			e.NoError(err)
			same(t, "ttl by a write", e.OK("creds/web", fields{"ttl": tt.asked}).Secret.TTL, tt.want)
			for _, key := range e.sim.ProjectKeys(ours) {
				ttl, over := l.Expires.Sub(l.Issued), key.Expires.Sub(l.Expires)
				warned := strings.Contains(fmt.Sprint(l.Warnings), "mount's maximum")
				failIf(t, ttl != tt.want || over != min(time.Minute, year-ttl) || warned != (tt.mount == 6*hour),
					"%+v: got %s, the key outlives it by %s, warnings %q", tt, ttl, over, l.Warnings)
			}
		})
	}
}

// TestCredsRefused: what can't be had is the caller's mistake, with an error that says why, and nothing is made.
func TestCredsRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		refused := func(path string, ttl any, want string) {
			t.Helper()
			e.Mistake("read "+path, fields{"ttl": ttl}, want)
			e.Mistake("update "+path, fields{"ttl": ttl}, want)
		}
		for _, ttl := range []any{86401, 0, "", "-1h", "soon", int64(math.MaxInt64), aMap} {
			refused("creds/web", ttl, "ttl")
		}
		refused("creds/none", 1, `role "none"`)
		e.Must("delete config", nil)
		refused("creds/web", 1, "not configured")
		e.have(0, 0, "after refusals")
	})
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		e.sim.SetMaxKeyLife(600) // OpenAI caps the life of keys
		resp, err := e.Do(logical.ReadOperation, "creds/r", nil)
		e.Refusal(resp, err, "expires_in_seconds", "600", "enforce_key_expiry", "ttl and max_ttl")
		e.OK("roles/r", fields{"enforce_key_expiry": true})
		_, err = e.Issue("creds/r", fields{"ttl": 540})
		e.NoError(err)
	})
}

// TestCredsFailed is about what a caller sees, and what is left at OpenAI and remembered, when OpenAI fails a
// credential's creation. What has an id is undone at once.
func TestCredsFailed(t *testing.T) {
	type row struct {
		fault
		want    string // in the error; empty: a credential
		mistake bool   // of the caller
		lost    bool   // it is remembered
	}
	lost := func(want string, f fault) row { return row{fault: f, want: want, lost: true} }
	body := func(text string) row { return lost("lacks", fault{Status: 200, Body: text, Process: true}) }
	refused := func(status int, mistake bool) row {
		return row{fault: fault{Status: status}, want: fmt.Sprint(status), mistake: mistake}
	}
	scoped := func(want string, mistake bool, f fault) row {
		f.Path = map[string]string{"role": "/service_accounts/[^/]+$", "API key": "/api_keys$"}[want]
		return row{fault: f, want: "creating " + want, mistake: mistake}
	}
	inBubbles(t, map[string]row{
		"refused connection": {fault: fault{Kind: "refuse"}, want: "connection refused"},
		"hanging":            lost("timed out", fault{Kind: "hang", Process: true}),
		"malformed":          lost("not the JSON", fault{Kind: "malformed", Process: true}),
		"no key":             body(`{"id":"svc_acct_1","api_key":null}`),
		"no value":           body(`{"id":"svc_acct_1","api_key":{"id":"key_1"}}`),
		"id unfit for a URL": body(`{"id":"a/../b","api_key":{"id":"key_1","value":"sk-x"}}`),
		"no expiry, no time": {fault: fault{Status: 200, Body: `{"id":"s","api_key":{"id":"k","value":"sk-x"}}`}},
		"bad request":        refused(400, true), "refused key": refused(401, false), "limited": refused(429, false),
		"role refused":   scoped("role", true, fault{Status: 400}),
		"role malformed": scoped("role", false, fault{Kind: "malformed", Process: true}),
		"key refused":    scoped("API key", true, fault{Status: 400}),
		"key hanging":    scoped("API key", false, fault{Kind: "hang", Process: true}),
	}, func(t *testing.T, e *env, tt row) {
		if tt.Path != "" {
			e.OK("roles/web", fields{"scopes": "api.a.read"})
		}
		tt.Method, tt.Times = http.MethodPost, cmp.Or(tt.Times, -1)
		e.sim.Inject(tt.fault)
		start := time.Now()
		resp, err := e.Do(logical.ReadOperation, "creds/web", nil)
		took := time.Since(start)
		failIf(t, took > requestTimeout+undoTimeout, "took %s, want %s at most", took, requestTimeout+undoTimeout)
		made := map[bool]int{true: 1, false: 0}
		want := made[tt.want == "" && tt.Status != 200] // 200 is a gateway's answer
		if failed := vaultsim.Failure(resp, err); tt.want == "" {
			e.NoError(failed)
			warned, works := len(resp.Warnings) == 1, e.sim.Use(resp.Data["api_key"].(string))
			failIf(t, warned != (want == 0) || works == warned,
				"got warnings %q, want one where the key does not expire; accepted: %v", resp.Warnings, works)
		} else {
			e.Fails("creds", failed, tt.want)
			id := strings.Contains(failed.Error(), "request id req_")
			failIf(t, tt.mistake != resp.IsError() || tt.Status >= 400 && !id,
				"got %v, want the caller's mistake: %v, and the request's id", failed, tt.mistake)
		}
		e.have(max(want, made[tt.lost && tt.Process]), max(want, made[tt.lost && tt.Process]), "at once")
		e.remembers(made[tt.lost], 0, "at once")
		e.sim.ClearFaults()
		e.Run(4 * time.Minute)
		e.have(want, want, "four minutes later")
		e.lease("web")
	})
}

// handsOut tells whether a credential must be handed out although the fault befell this step: 1 and 2 read role and
// config, then come the calls.
func (k credKind) handsOut(fault vaultsim.StepFault, step int) bool {
	again := k.calls == 3 && step == 4 // to set the account's role does no harm a second time
	return !fault.All && !fault.Cancel && step > 2 && (again || fault.Refused || fault.Status == 429)
}

// TestCredsFaults: whatever issuing a credential meets at whatever step, minutes later OpenAI has nothing that was not
// handed out, or after a crash by the end in its name and 75 minutes; what was handed out works until its end. A key
// that is not restricted as the role says never exists.
func TestCredsFaults(t *testing.T) {
	for name, k := range credKinds {
		t.Run(name, func(t *testing.T) {
			vaultsim.EveryStep(t, 2+k.calls, func(t *testing.T, fault vaultsim.StepFault, at int) bool {
				e := newConfiguredEnv(t)
				k.write(e)
				e.Restart() // so that config is read
				restricted := func() {
					for _, key := range e.sim.ProjectKeys(ours) {
						same(t, "scopes of a key", strings.Join(key.Scopes, ","), k.scopes)
					}
				}
				var l *vaultsim.Lease
				var err error
				start := time.Now()
				reached := e.AtStep(fault, at, restricted, func(ctx context.Context) {
					l, err = e.IssueContext(ctx, "creds/r", nil)
				})
				if want := !reached || k.handsOut(fault, at); (err == nil) != want {
					t.Fatalf("creds: got error %v, want a credential: %v", err, want)
				}
				if err == nil {
					e.livesOn(k, l)
					return reached
				}
				e.NoSecrets("an error", err.Error())
				if !fault.All && (fault.Arrives || k.calls == 3 && at >= 4) {
					k.have(e, 0, "at once, since the ids are known")
				}
				if fault.Crash {
					e.Run(time.Until(endOf(start, 2*time.Hour).Add(75 * time.Minute)))
				} else {
					e.Run(4 * time.Minute)
				}
				k.have(e, 0, "later")
				same(t, "storage", e.Storage.Keys(""), "[config roles/]")
				return reached
			})
		})
	}
}

// livesOn checks that a lease's key works until the lease ends, and is gone then.
func (e *env) livesOn(k credKind, l *vaultsim.Lease) {
	e.t.Helper()
	e.Run(time.Until(l.Expires) - time.Second)
	k.have(e, 1, "while the lease lives")
	failIf(e.t, !e.sim.Use(l.Data["api_key"].(string)) && k.account != "none",
		"a second before its lease's end the key is not accepted")
	e.Run(time.Minute)
	k.have(e, 0, "after the lease")
	e.remembers(0, 0, "after the lease")
}

// TestCredsUndone: when the request ends while its last answer arrives, the credential is deleted at once. Where that
// fails it is remembered, also over a crash, and where nothing can be stored it goes as a lost create or by its end.
func TestCredsUndone(t *testing.T) {
	fails := fault{Method: http.MethodDelete, Times: -1}
	for name, tt := range map[string]struct {
		fault                fault
		verb                 string // of storage that fails; empty: none
		left, lost, cleanups int    // at once
	}{
		"undone": {fault{Path: "^none$"}, "", 0, 0, 0}, "stored": {fails, "", 1, 0, 1},
		"stored, crash": {fails, "", 1, 0, 1}, "not stored": {fails, "put", 1, 1, 0},
		"not stored, crash": {fails, "put", 1, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			eachCredKind(t, func(t *testing.T, e *env, k credKind) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				e.Wire.AfterCall(k.calls, cancel)
				e.sim.Inject(tt.fault)
				e.Storage.Fail(tt.verb, "")
				_, err := e.IssueContext(ctx, "creds/r", nil)
				failIf(t, !errors.Is(err, context.Canceled), "creds: got %v, want that the request was cancelled", err)
				k.have(e, tt.left, "at once")
				e.remembers(tt.lost, tt.cleanups, "at once")
				e.sim.ClearFaults()
				e.Storage.SetFault(nil)
				within := 2 * time.Minute
				if strings.HasSuffix(name, "crash") {
					e.Crash()
					within += time.Duration(tt.lost) * time.Until(endOf(time.Now(), 2*time.Hour).Add(75*time.Minute))
				}
				e.Run(within)
				k.have(e, 0, "in the end")
				e.remembers(0, 0, "in the end")
			})
		})
	}
}

// TestCredsNotBegun: what a fault of storage kept from being sent to OpenAI is not looked for there.
func TestCredsNotBegun(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.OK("roles/named", fields{"project_id": ours, "service_account_name_template": "{{.ProjectName}}"})
		e.Wire.AfterCall(1, func() { // the name of the project
			e.b().InvalidateKey(t.Context(), configPath)
			e.Storage.Fail("get", configPath)
		})
		_, err := e.Issue("creds/named", nil)
		e.Fails("creds", err, "creating service account: reading config")
		e.Storage.SetFault(nil)
		e.remembers(0, 0, "at once")
	})
}

// TestCredsClock: with a clock that is behind OpenAI's by more than a few minutes there is no credential, since its
// name would have too early an end; the error says so, and nothing is left. A clock that is ahead does no harm.
func TestCredsClock(t *testing.T) {
	for behind, want := range map[time.Duration]bool{
		-24 * time.Hour: true, clockTolerance: true, clockTolerance + 3*time.Minute: false, 24 * time.Hour: false,
	} {
		eachCredKind(t, func(t *testing.T, e *env, k credKind) {
			e.sim.Advance(behind)
			key, id := e.sim.AddAdminKey("of this time")
			e.configure(fields{"admin_api_key": key, "admin_api_key_id": id})
			l, err := e.Issue("creds/r", nil)
			if want {
				e.NoError(err)
				e.livesOn(k, l)
				return
			}
			e.Fails("creds", err, "clock is behind OpenAI's")
			k.have(e, 0, "at once")
			e.remembers(0, 0, "at once")
		})
	}
}

// TestCredsTooOld: when the clock jumps while OpenAI is asked, so that the lease could go past the end in the name,
// nothing is handed out. In a suspended machine the request's own clock stands still, which no bubble can show.
func TestCredsTooOld(t *testing.T) {
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		e.Wire.AfterCall(k.calls, func() { time.Sleep(3*time.Minute + time.Second) })
		_, err := e.Issue("creds/r", fields{"ttl": "2h"})
		e.Fails("creds", err, "too old")
		k.have(e, 0, "at once")
	})
}

// TestCredsRenewal: each renewal moves the key's expiry at OpenAI with its lease's end, never past the longest life.
// However long it waits, the key outlives the lease, and ends before tidy takes its account for left behind.
func TestCredsRenewal(t *testing.T) {
	none, limited := fault{Path: "^none$"}, fault{Status: 429, Header: after("48")}
	for name, tt := range map[string]struct {
		latency time.Duration
		fault   fault
		calls   int
		over    time.Duration // how long at most a key outlives its lease
	}{
		"quick":         {6 * time.Second, none, 1, keyGrace + 6*time.Second},
		"slow answer":   {24 * time.Second, none, 1, keyGrace + 24*time.Second},
		"slow errors":   {20 * time.Second, fault{Times: 2}, 3, keyGrace + requestTimeout},
		"limited":       {0, limited, 2, keyGrace + requestTimeout},
		"limited, slow": {12 * time.Second, limited, 2, keyGrace + requestTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			eachCredKind(t, func(t *testing.T, e *env, k credKind) {
				e.OK("roles/r", fields{"max_ttl": "4h"})
				e.System.MaxLeaseTTLVal = 3 * time.Hour
				e.sim.SetLatency(6 * time.Second)
				l := e.lease("r")
				e.sim.SetLatency(tt.latency)
				for _, step := range []struct{ wait, increment, want time.Duration }{ // want: the TTL, if that is left
					{1500 * time.Millisecond, 0, time.Hour}, {45 * time.Minute, 0, time.Hour},
					{time.Minute, 10 * time.Minute, 10 * time.Minute}, {8 * time.Minute, 2 * time.Hour, 2 * time.Hour},
					{100 * time.Minute, 0, time.Hour}, {18 * time.Minute, 0, time.Hour},
				} {
					time.Sleep(step.wait)
					e.sim.Inject(tt.fault)
					e.Wire.Sent()
					e.NoError(e.Renew(l, step.increment))
					ttl, want := time.Until(l.Expires), min(step.want, time.Until(l.Issued.Add(3*time.Hour)))
					off := ttl - want
					failIf(t, off.Abs() > time.Second, "after %s: got ttl %s, want %s", time.Since(l.Issued), ttl, want)
					expires, end := k.keyExpires(e)
					over, sent := expires.Sub(l.Expires), e.Wire.Sent()
					fits := over >= 0 && over <= tt.over && expires.Before(end.Add(tidyMargin)) && len(sent) == tt.calls
					if k.unexpiring {
						fits = expires.IsZero() && len(sent) == 0
					}
					failIf(t, !fits, "after %s: got requests %q and a key that lives %s longer, until %s; end %s",
						time.Since(l.Issued), sent, over, expires, end)
					e.sim.ClearFaults()
				}
			})
		})
	}
}

// TestCredsMaxTTLChanged: raising a role's max_ttl does not lengthen leases that are out, beyond the end in their
// names, and lowering it shortens them.
func TestCredsMaxTTLChanged(t *testing.T) {
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		l := e.lease("r") // max_ttl 2h
		_, end := k.keyExpires(e)
		renew := func(wait, latest time.Duration) {
			t.Helper()
			e.Run(wait)
			e.NoError(e.Renew(l, 10*time.Hour))
			expires, _ := k.keyExpires(e)
			bound := l.Issued.Add(latest)
			if l.MaxTTL > latest || !l.Expires.Equal(bound) || expires.After(bound.Add(keyGrace)) {
				t.Fatalf("after %s: got max_ttl %s, a lease until %s and a key until %s, want %s at most",
					time.Since(l.Issued), l.MaxTTL, l.Expires, expires, latest)
			}
		}
		renew(time.Minute, 2*time.Hour)
		e.OK("roles/r", fields{"max_ttl": "90m"})
		renew(time.Minute, 90*time.Minute)
		e.OK("roles/r", fields{"max_ttl": "1m", "ttl": "1m"})
		e.Fails("renewal after the new max_ttl", e.Renew(l, 0), "can't be renewed")
		e.OK("roles/r", fields{"max_ttl": "48h", "ttl": "12h"})
		latest := end.Add(-keyGrace).Sub(l.Issued) // a minute or two more than 2h
		renew(time.Minute, latest)
		renew(70*time.Minute, latest)
		renew(time.Until(l.Expires)-2*time.Second, latest) // close to the end
		e.Run(time.Minute)
		k.have(e, 0, "after the lease")
	})
}

// TestCredsPastEnd: a lease that is past its end, or was issued after it as Vault's clock has it, can't be renewed, and
// OpenAI is not asked.
func TestCredsPastEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		issued, internal := time.Now(), e.Get("creds/web").Secret.InternalData
		_, end := credKind{}.keyExpires(e)
		hour, last := issued.Add(time.Hour), end.Add(-keyGrace)
		for _, tt := range []struct {
			at, issued time.Time
			calls      int // 0: it can't be renewed
		}{
			{hour, issued, 1}, {hour, last.Add(-time.Second), 1},
			{hour, last.Add(-time.Second / 2), 0}, // half a second is no TTL
			{hour, last.Add(48 * time.Hour), 0}, {last, issued, 0}, {end.Add(time.Hour), issued, 0},
		} {
			time.Sleep(time.Until(tt.at))
			e.Wire.Sent()
			if err := e.leaseRequest(logical.RenewOperation, tt.issued, internal); tt.calls == 0 {
				e.Fails("renew", err, "can't be renewed")
			} else {
				e.NoError(err)
			}
			same(t, fmt.Sprintf("requests: %+v", tt), len(e.Wire.Sent()), tt.calls)
		}
	})
}

// TestCredsRenewalRefused: what can't be renewed is an error, and lease and key keep their ends.
func TestCredsRenewalRefused(t *testing.T) {
	type row struct {
		want    string
		inner   bool // not the caller's mistake
		prepare func(*env)
	}
	fails := func(f fault) func(*env) { return func(e *env) { e.callsFail("", f) } }
	storage := func(e *env) { e.Storage.SetFault(func(string, string) error { return vaultsim.ErrInjected }) }
	inBubbles(t, map[string]row{
		"deleted role": {`role "web"`, false, func(e *env) { e.Must("delete roles/web", nil) }},
		"no config":    {"not configured", false, func(e *env) { e.Must("delete config", nil) }},
		"expired key":  {"Expired", false, func(e *env) { e.sim.Advance(2 * time.Hour) }},
		"policy":       {"ttl and max_ttl", false, func(e *env) { e.sim.SetMaxKeyLife(600) }},
		"unreachable":  {"no answer from", true, fails(fault{Kind: "refuse"})},
		"server error": {"500", true, fails(fault{Status: 500})},
		"deleted key":  {"404", false, fails(fault{Status: 404})},
		"storage":      {vaultsim.ErrInjected.Error(), true, storage},
	}, func(t *testing.T, e *env, tt row) {
		l := e.lease("web")
		before := fmt.Sprint(e.sim.ProjectKeys(ours), l.Expires)
		tt.prepare(e)
		err := e.Renew(l, 0)
		e.Fails("renew", err, tt.want)
		// Of an error response Vault has the text only.
		inner := errors.As(err, new(*apiError)) || errors.Is(err, vaultsim.ErrInjected)
		failIf(t, inner != tt.inner, "got %v as an inner error: %v, want %v", err, inner, tt.inner)
		same(t, "keys, and the lease's end", fmt.Sprint(e.sim.ProjectKeys(ours), l.Expires), before)
	})
}

// TestCredsRevokeGone: what is gone already is revoked, as is what OpenAI fails to delete three times in a row. What
// may still be there is not, and is remembered.
func TestCredsRevokeGone(t *testing.T) {
	gone := fault{Status: 404, Body: `{"error":{"message":"No such project","type":"invalid_request_error"}}`}
	type row struct {
		want    string // of the error; empty: revoked
		prepare func(*env)
	}
	all := func(f fault) func(*env) { return func(e *env) { e.callsFail("", f) } }
	deletions := func(f fault) func(*env) { return func(e *env) { e.callsFail("DELETE", f) } }
	thrice := func(f fault) row {
		f.Method, f.Times = "DELETE", 3
		return row{"", func(e *env) { e.sim.Inject(f) }}
	}
	for _, kind := range []string{"plain", "existing account"} {
		inBubbles(t, map[string]row{
			"errors": thrice(fault{Status: 500}), "limited": thrice(fault{Status: 429, Header: after("5")}),
			"closed": thrice(fault{Kind: "close"}), "deleted already": thrice(fault{Kind: "close", Process: true}),
			"project archived":  {"", func(e *env) { e.sim.ArchiveProject(ours) }},
			"project deleted":   {"", all(gone)},
			"project forgotten": {"", func(e *env) { deletions(fault{Status: 400})(e); e.callsFail("GET", gone) }},
			"project is active": {"400", deletions(fault{Status: 400})},
			"no access":         {"403", all(fault{Status: 403})},
			"another server":    {"404", all(fault{Status: 404, Body: "<html>no such page"})},
			"not confirmed":     {"lacks", deletions(fault{Status: 200, Body: `{"deleted":false}`})},
			"no config":         {"not configured", func(e *env) { e.Must("delete config", nil) }},
			"mistyped endpoint": {"404", func(e *env) {
				e.configure(fields{"api_endpoint": "https://api.openai.com/v2", "verify_connection": false})
			}},
		}, func(t *testing.T, e *env, tt row) {
			credKinds[kind].write(e)
			l := e.lease("r")
			tt.prepare(e)
			start := time.Now()
			if err := e.Revoke(l); tt.want != "" {
				e.Fails("revoke", err, tt.want)
			} else if took := time.Since(start); err != nil || took > 20*time.Second {
				t.Errorf("revoke: got %v after %s, want success within 20s", err, took)
			}
			same(t, "a clean-up entry", len(e.Storage.Keys(cleanupPrefix)) == 1, tt.want != "")
		})
	}
}

// TestCredsRevokeHandedOver: a revocation that keeps failing is remembered. After its fifth failure, or its first at a
// rate limit, it is the plugin's alone, which tries until OpenAI confirms. Failures of these tries do not count.
func TestCredsRevokeHandedOver(t *testing.T) {
	for _, kind := range []string{"plain", "existing account"} {
		inBubbles(t, map[string]fault{
			"500": {}, "429": {Status: 429}, "401": {Status: 401}, "hang": {Kind: "hang"}, "refuse": {Kind: "refuse"},
			"429 for 20s": {Status: 429, Header: after("20")},
		}, func(t *testing.T, e *env, fault fault) {
			credKinds[kind].write(e)
			secret := e.Get("creds/r").Secret
			l, err := leaseOf(secret)
			e.NoError(err)
			e.callsFail("", fault)
			for attempt := 1; attempt <= maxRevokeFailures+1; attempt++ {
				start := time.Now()
				err := e.leaseRequest(logical.RevokeOperation, start, secret.InternalData)
				from := map[bool]int{false: maxRevokeFailures, true: 1}[fault.Status == http.StatusTooManyRequests]
				if took := time.Since(start); (err == nil) != (attempt >= from) || took > 70*time.Second {
					t.Errorf("attempt %d: got %v after %s, want an error before %d, in 70s", attempt, err, took, from)
				}
				var entry lease
				_ = json.Unmarshal([]byte(e.Storage.All()[cleanupPrefix+l.id()]), &entry)
				taken := e.metric("revocations_handed_over_total")
				lines, over := e.Log.Count("error", l.id()), max(0, attempt-from+1)
				same(t, fmt.Sprint("failures, errors in the log, metric of attempt ", attempt),
					[]any{entry.Failures, lines, taken}, []any{attempt, over, over})
				e.Run(5 * time.Minute) // sweep tries, and fails
			}
			e.Restart()
			e.sim.ClearFaults()
			e.Run(time.Minute)
			e.quiet()
			credKinds[kind].have(e, 0, "after OpenAI has recovered")
			e.remembers(0, 0, "in the end")
		})
	}
}

// TestCredsOlderMaxTTL: a role of the older plugin with a max_ttl that can't be written any more hands out credentials
// that tidy knows.
func TestCredsOlderMaxTTL(t *testing.T) {
	e := newConfiguredEnv(t)
	for _, maxTTL := range []int64{int64(100 * maxKeyLife), math.MaxInt64} {
		e.Storage.Set("roles/old", fmt.Sprintf(`{"project_id":"proj_sim","ttl":%d,"max_ttl":%[1]d}`, maxTTL))
		l := e.MustIssue("creds/old")
		_, end, ok := parseName(fmt.Sprint(l.Data["service_account"]))
		failIf(t, !ok || end.After(time.Now().Add(maxKeyLife+time.Hour)), "max_ttl %d: got end %s, %v", maxTTL, end, ok)
	}
}

// TestCredsRevokeStorageFault: where the failure can't be remembered Vault is told of both, and keeps the lease. When
// it has given up, tidy deletes the account after the end in its name.
func TestCredsRevokeStorageFault(t *testing.T) {
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		e.OK("roles/r", fields{"ttl": "5m", "max_ttl": "1h"})
		l := e.lease("r")
		e.callsFail(http.MethodDelete, fault{Status: 403})
		e.Storage.Fail("put", "")
		if err := e.Revoke(l); !errors.Is(err, vaultsim.ErrInjected) || !isStatus(err, http.StatusForbidden) {
			t.Errorf("revoke: got %v, want both failures", err)
		}
		e.Run(30 * time.Minute)
		failIf(t, !l.Irrevocable, "got %d failed attempts, want that Vault has given up", l.Attempts)
		e.Storage.SetFault(nil)
		e.sim.ClearFaults()
		e.Run(30 * time.Minute)
		k.have(e, 1, "before the end in the name")
		e.Run(80 * time.Minute)
		k.have(e, 0, "after it")
		e.remembers(0, 0, "in the end")
	})
}

// TestCredsOtherOrganization: to another organization's key nothing of the former one exists, which must not pass for
// a revocation. When config has the former organization again, what is left goes.
func TestCredsOtherOrganization(t *testing.T) {
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		internal, l := e.Get("creds/r").Secret.InternalData, e.lease("r")
		e.sim.Inject(fault{Method: http.MethodPost, Process: true, Path: "(service_accounts|api_keys)$"})
		_, err := e.Issue("creds/r", nil)
		e.Fails("creds", err, "500")        // a lost create
		e.callsFail("", fault{Status: 404}) // as OpenAI would say of the other organization's things
		e.OK("config", fields{"organization_id": "org-other", "admin_api_key": "sk-admin-other",
			"admin_api_key_id": "key_other", "verify_connection": false})
		e.sim.ResetCalls()
		for attempt := 1; attempt < maxRevokeFailures; attempt++ {
			err := e.leaseRequest(logical.RevokeOperation, time.Now(), internal)
			e.Fails("revoke", err, openaisim.DefaultOrganization)
		}
		e.NoError(e.leaseRequest(logical.RevokeOperation, time.Now(), internal)) // the plugin takes it over
		if err := e.Renew(l, 0); !k.unexpiring {
			e.Fails("renew", err, openaisim.DefaultOrganization)
		}
		e.Fails("revoke", e.Revoke(l), openaisim.DefaultOrganization)
		e.Run(5 * time.Minute)
		calls := fmt.Sprint(e.sim.Calls())
		failIf(t, strings.Contains(calls, ours), "the other organization was asked about the project: %s", calls)
		e.sim.ClearFaults()
		e.configure(nil)
		e.Run(2 * time.Minute)
		k.have(e, 0, "after config has the former organization again")
		e.remembers(0, 0, "in the end")
	})
}

// TestCredsOrganizationChanges: when another node changes config's organization between two calls for a credential, the
// read fails, nothing more is asked, and what was made goes when the former organization is back.
func TestCredsOrganizationChanges(t *testing.T) {
	for made, role := range []fields{ // before the account is made, and after
		{"service_account_name_template": "{{.ProjectName}}"}, {"scopes": "api.a.read"},
	} {
		inBubble(t, func(t *testing.T, e *env) {
			e.OK("roles/web", role)
			e.Wire.AfterCall(1, func() {
				cfg := e.config()
				cfg.OrganizationID = "org-other"
				e.NoError(putJSON(t.Context(), e.Storage, configPath, cfg))
				e.b().InvalidateKey(t.Context(), configPath) // as when another node has changed config
			})
			e.Wire.Sent()
			_, err := e.Issue("creds/web", nil)
			e.Fails("creds", err, openaisim.DefaultOrganization)
			same(t, "requests up to the change", len(e.Wire.Sent()), 1)
			e.have(made, 0, "while config has the other organization")
			e.remembers(0, made, "while config has the other organization")
			e.configure(nil)
			e.Run(time.Minute)
			e.quiet()
			e.have(0, 0, "after config has the former organization again")
			e.remembers(0, 0, "in the end")
		})
	}
}

// TestCredsDuringRotation: a call that is under way when the admin key is rotated is repeated with the new key. Nothing
// fails, and nothing is made twice.
func TestCredsDuringRotation(t *testing.T) {
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		// during has the key rotated while a call of do is on its way to OpenAI.
		during := func(call int, do func() error) {
			t.Helper()
			e.sim.ResetCalls()
			e.Wire.BeforeEach(func(n int, _ *http.Request) {
				if n == call { // the rotation's calls come after
					e.OK("config/rotate", nil)
				}
			})
			err := do()
			refused := slices.DeleteFunc(e.sim.Calls(), func(c openaisim.Call) bool { return c.Status == 200 })
			failIf(t, err != nil || len(refused) != 1 || refused[0].Status != http.StatusUnauthorized,
				"call %d: got error %v and failed calls %v, want one that was refused", call, err, refused)
		}
		for call := 1; call <= k.calls; call++ {
			var l *vaultsim.Lease
			during(call, func() (err error) { l, err = e.Issue("creds/r", nil); return err })
			k.have(e, 1, "after the issue")
			if !k.unexpiring {
				during(1, func() error { return e.Renew(l, 0) })
			}
			during(1, func() error { return e.Revoke(l) })
			k.have(e, 0, "after the revocation")
		}
		e.remembers(0, 0, "in the end")
	})
}

// TestCredsOlderPlugin works with what the older plugin stored, an endpoint with a slash and perhaps no id of the admin
// key, and revokes what it leased.
func TestCredsOlderPlugin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		key, _ := e.sim.AdminKey()
		e.Storage.Set("config", `{"admin_api_key":"`+key+`","api_endpoint":"https://api.openai.com/v1/",`+
			`"organization_id":"org-sim","last_rotated_time":"1999-12-31T12:00:00Z","rotation_period":2592000000000}`)
		e.Storage.Set("roles/web", `{"project_id":"proj_sim","ttl":7200000000000,"max_ttl":14400000000000,`+
			`"service_account_name_template":"{{.RoleName}}-{{.RandomSuffix}}","service_account_description":"Made"}`)
		l := e.lease("web")
		same(t, "ttl and max_ttl", fmt.Sprint(l.Expires.Sub(l.Issued), l.MaxTTL), "2h0m0s 4h0m0s")
		ids := func(project, key, account any) map[string]any {
			return fields{"secret_type": "openai_api_key", // as it stands in Vault's storage
				"project_id": project, "api_key_id": key, "service_account_id": account}
		}
		old := ids("proj_sim", l.Data["api_key_id"], l.Data["service_account_id"])
		e.OK("config/rotate", nil)
		e.Fails("renew", e.leaseRequest(logical.RenewOperation, l.Issued, old), "role")
		e.NoError(e.leaseRequest(logical.RevokeOperation, l.Issued, old))
		e.have(0, 0, "after revocation")
		for _, bad := range []fields{
			ids("proj_sim", nil, nil), ids("proj/../x", nil, "svc_acct_x"), ids(1, nil, nil),
		} {
			e.Fails("revoke", e.leaseRequest(logical.RevokeOperation, l.Issued, bad), "lease")
		}
	})
}

// TestConfigPendingElsewhere: who may write config, but does not know the admin key, has an endpoint of his own say that
// another's key is his, rotates, and lets the deletion fail: that key is not deleted once config is as it was.
func TestConfigPendingElsewhere(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		_, other := e.sim.AddAdminKey("other")
		e.Wire.SetFault(func(req *http.Request, send vaultsim.Send) (*http.Response, error) {
			body := `{"id":"key_new","value":"sk-admin-new","redacted_value":"sk-a..new"}`
			switch {
			case req.URL.Host != "thief.example":
				return send()
			case req.Method == "DELETE":
				body = "{}"
			case strings.HasSuffix(req.URL.Path, other):
				body = `{"id":"` + other + `","redacted_value":"sk-a..thief"}`
			}
			return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(body)), Request: req}, nil
		})
		e.OK("config", fields{"admin_api_key": "sk-admin-thief", "admin_api_key_id": other,
			"api_endpoint": "https://thief.example/v1"})
		e.Warned("rotation", e.OK("config/rotate", nil), 1, other)
		e.Warned("config again", e.configure(fields{"api_endpoint": defaultEndpoint}), 2, "key_new", other)
		e.Tick()
		same(t, "the other key is there", e.sim.HasAdminKey("other"), true)
	})
}

// replacedKey leaves a replaced admin key for later. processed: it is gone at OpenAI.
func (e *env) replacedKey(processed bool) {
	e.sim.Inject(fault{Method: "DELETE", Path: "admin_api_keys", Process: processed, Kind: "close", Times: -1})
	e.Must("update config/rotate", nil)
	e.sim.ClearFaults()
}

// TestCredsGone: what is gone at OpenAI is revoked, in whatever words OpenAI refuses to delete it once more; likewise a
// replaced admin key.
func TestCredsGone(t *testing.T) {
	for i, status := range []int{400, 404, 410, 422, 400, 404, 410, 422} {
		inBubble(t, func(t *testing.T, e *env) {
			e.OK("roles/key", fields{"project_id": ours,
				"service_account_id": e.sim.AddServiceAccount(ours, "app", "member")})
			e.sim.SetGoneStatus(status, i < 4)
			for _, role := range []string{"web", "key"} {
				l := e.lease(role)
				e.DropNext()
				_ = e.Revoke(l) // Vault does not get the answer
				e.MustRevoke(l)
			}
			e.replacedKey(true)
			e.Run(2 * time.Minute)
			same(t, fmt.Sprintf("left with %d, typed %v", status, i < 4), e.leftovers(), "0 0")
		})
	}
}

// TestCredsNotGone: a refusal to delete what OpenAI still has leaves it pending, and tidy lists it; likewise the
// answers of a server that is not OpenAI's API and says the same to everything.
func TestCredsNotGone(t *testing.T) {
	for _, status := range []int{400, 404, 405, 410} {
		for _, text := range []string{"<html>", `{"detail":"Not Found"}`, `{"error":{"message":"Not found."}}`,
			`{"error":{"message":"Invalid URL (DELETE /v2)","type":"invalid_request_error","code":null}}`} {
			for _, method := range []string{"DELETE", ""} { // refused
				inBubble(t, func(t *testing.T, e *env) {
					l := e.lease("web")
					e.replacedKey(false)
					e.sim.Inject(fault{Method: method, Status: status, Body: text, Times: -1})
					err := e.Revoke(l)
					e.Run(3 * time.Minute)
					e.Fails("revoke", err)
					same(t, fmt.Sprint("left: ", method, status, text), e.leftovers(), "1 1")
					same(t, "pending", e.OK("tidy", nil).Data["pending"], []any{l.Data["service_account_id"]})
					e.sim.ClearFaults()
					e.Run(2 * time.Minute)
					e.have(0, 0, "when OpenAI deletes again")
				})
			}
		}
	}
}

// TestCredsDeadKey: a mount whose admin key is dead is disabled by a handful of runs, however many leases it has; and
// leases that end while it is dead are deleted when there is another key.
func TestCredsDeadKey(t *testing.T) {
	for _, n := range []int{1, 8, 50} {
		for _, disable := range []bool{true, false} {
			inBubble(t, func(t *testing.T, e *env) {
				e.IssueTogether(n, "creds/web")
				e.sim.Inject(fault{Status: 401, Times: -1})
				if runs := 1; disable {
					for ; e.Disable() != nil && runs < 100; runs++ {
					}
					failIf(t, runs > 6, "%d leases: got %d runs, want at most 6", n, runs)
					return
				}
				e.Run(3 * time.Hour)
				same(t, "left", e.leftovers(), fmt.Sprint(n, 0))
				same(t, "leases", len(e.Leases()), 0)
				e.sim.ClearFaults()
				e.Run(2 * time.Minute)
				e.quiet()
				e.have(0, 0, "when the key lives again")
			})
		}
	}
}

// TestClientMasks: whatever OpenAI says of a key, in whatever form that has, no error and no log shows it.
func TestClientMasks(t *testing.T) {
	const odd = "AdminKey/without+the:usual=form!" // not masked by its form
	for _, echo := range []string{
		"Incorrect API key provided: " + odd + ".", "key=" + odd + "&x", "sk-admin-simulated-abc",
		"'sk-proj-simulated'\r\nsk-x", strings.Repeat("a", 499) + odd,
	} {
		e := newConfiguredEnv(t)
		l := e.lease("web")
		e.Storage.Set("config", `{"admin_api_key":"`+odd+`","admin_api_key_id":"key_x","organization_id":"org-sim",`+
			`"api_endpoint":"https://api.openai.com/v1"}`)
		e.Restart()
		said := fields{"message": echo, "type": echo, "code": echo, "param": echo}
		body, _ := json.Marshal(fields{"error": said})
		e.sim.Inject(fault{Status: 400, Body: string(body), Header: http.Header{"X-Request-Id": {echo}}, Times: -1})
		errs := []error{e.Renew(l, 0), e.Revoke(l), vaultsim.Failure(e.Do(logical.ReadOperation, "creds/web", nil))}
		for _, path := range []string{"config", "config/rotate", "roles/web"} {
			errs = append(errs, vaultsim.Failure(e.Write(path, nil)))
		}
		for _, err := range append(errs, errors.New(e.Log.String())) {
			e.Fails("request", err)
			text := strings.TrimSuffix(fmt.Sprint(err), "\n")
			failIf(t, strings.Contains(text, odd[:20]) || strings.ContainsAny(text, "\r\x00"),
				"OpenAI's %q shows in %q", echo, text)
			e.NoSecrets("an error", text)
		}
	}
}

// TestClientErrors: an error tells whether OpenAI may have done the call. Only what is safe is repeated.
func TestClientErrors(t *testing.T) {
	retry := func(value string) http.Header { return http.Header{"X-Should-Retry": {value}} }
	type tt struct {
		fault
		status           int
		notDone          bool
		creates, deletes int // attempts
		text             string
	}
	inBubbles(t, map[string]tt{
		"refused":   {fault{Kind: "refuse"}, 0, true, 4, 4, "no answer from https://api.openai.com/v1: "},
		"reset":     {fault{Kind: "close"}, 0, false, 1, 4, "no answer from https://api.openai.com/v1: "},
		"hangs":     {fault{Kind: "hang"}, 0, false, 1, 3, "timed out"}, // three of 25 seconds
		"malformed": {fault{Kind: "malformed"}, 200, false, 1, 1, "not the JSON"},
		"oversized": {fault{Kind: "oversized"}, 200, false, 1, 1, "larger than 1 MiB"},
		"redirect":  {fault{Kind: "redirect"}, 307, false, 1, 1, "redirects are not followed"},
		"lacking":   {fault{Status: 200, Body: `{"id":"a/b"}`}, 200, false, 1, 1, "lacks what it must hold"},
		"400":       {fault{Status: 400}, 400, true, 1, 1, "OpenAI answered 400"},
		"401":       {fault{Status: 401}, 401, true, 1, 1, "OpenAI answered 401"},
		"408":       {fault{Status: 408}, 408, false, 1, 4, "OpenAI answered 408"},
		"409":       {fault{Status: 409}, 409, false, 1, 4, "OpenAI answered 409"},
		"429":       {fault{Status: 429, Header: after("30")}, 429, true, 3, 3, "429"},
		"500":       {fault{Status: 500}, 500, false, 1, 4, "OpenAI answered 500"},
		"told to":   {fault{Status: 400, Header: retry("true")}, 400, true, 1, 4, "OpenAI answered 400"},
		"not 429":   {fault{Status: 429, Header: retry("false")}, 429, true, 1, 1, "OpenAI answered 429"},
		"not 503":   {fault{Status: 503, Header: retry("false")}, 503, false, 1, 1, "OpenAI answered 503"},
	}, func(t *testing.T, e *env, tt tt) {
		account := e.lease("web").Data["service_account_id"].(string)
		tt.fault.Times = -1
		e.sim.Inject(tt.fault)
		e.sim.ResetCalls()
		_, err := e.Issue("creds/web", nil)
		e.Fails("creds", err, tt.text)
		same(t, "lost creates", e.metric("lost_creates"), map[bool]int{true: 0, false: 1}[tt.notDone])
		same(t, "attempts to create", e.sim.CountCalls("POST", "/service_accounts"), tt.creates)
		time.Sleep(time.Minute)
		e.sim.ResetCalls()
		ctx, cancel := context.WithTimeout(t.Context(), requestTimeout)
		defer cancel()
		l := &lease{ProjectID: ours, ServiceAccountID: account}
		err = e.b().newClient(e.config()).deleteCredential(ctx, l)
		var api *apiError
		failIf(t, !errors.As(err, &api) || api.Status != tt.status || notDone(err) != tt.notDone,
			"delete: got %v, want status %d and not done %v", err, tt.status, tt.notDone)
		same(t, "attempts to delete", e.sim.CountCalls("DELETE", ""), tt.deletes)
	})
}

// TestClientReal: connections to a real server are used again, and an answer that does not end is cut.
func TestClientReal(t *testing.T) {
	e := newEnv(t)
	var opened atomic.Int64
	var endless atomic.Bool
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for err := error(nil); err == nil && endless.Load() && r.Context().Err() == nil; {
			_, err = w.Write(make([]byte, 1<<16))
		}
		e.sim.ServeHTTP(w, r)
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			opened.Add(1)
		}
	}
	server.Start()
	defer server.Close()
	e.Wire.Connect(newTransport())
	e.configure(fields{"api_endpoint": server.URL + "/v1"})
	e.OK("roles/web", fields{"project_id": ours})
	for range 20 {
		e.MustRevoke(e.lease("web"))
	}
	same(t, "connections for 42 calls in a row", opened.Load(), 1)
	vaultsim.AtOnce(16, 10, func() { e.lease("web") })
	// A call that gets another's connection, while its own is opened, leaves that to later ones.
	got := opened.Load()
	failIf(t, got > 1+2*16, "connections for 160 calls, 16 at once: got %d, want about 16", got)
	endless.Store(true)
	_, err := e.Issue("creds/web", nil)
	e.Fails("creds", err, "larger than 1 MiB")
}

// TestClientSwitch: an answer by which the server goes over to another protocol does not hold a call, with its locks,
// for as long as the server keeps the connection.
func TestClientSwitch(t *testing.T) {
	release := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		conn, _, err := http.NewResponseController(w).Hijack()
		if err == nil {
			fmt.Fprint(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
			<-release
			_ = conn.Close()
		}
	}))
	defer server.Close()
	end := sync.OnceFunc(func() { close(release) })
	defer end()
	held := time.AfterFunc(attemptTimeout+5*time.Second, end)
	c := newBackend(newTransport(), "abc234").newClient(&config{APIEndpoint: server.URL})
	_, err := c.getProject(t.Context(), ours)
	failIf(t, !isStatus(err, http.StatusSwitchingProtocols), "got error %v, want the status", err)
	failIf(t, !held.Stop(), "the call took longer than %s", attemptTimeout)
}

// overNetwork makes a mount's calls go over the network, through a proxy unless that is nil. A role "web" is there.
func (e *env) overNetwork(proxy *url.URL) {
	transport := newTransport()
	transport.Proxy = http.ProxyURL(proxy)
	e.b().transport = transport
	e.Storage.Set("roles/web", `{"project_id":"proj_sim"}`)
}

// TestClientTLS: a credential lives over TLS with a private authority and a certificate of ours. A mistake names its
// field; the key is shown nowhere; the settings change only together with the admin key.
func TestClientTLS(t *testing.T) {
	certificate, key := vaultsim.NewCertificate(t)
	otherCertificate, otherKey := vaultsim.NewCertificate(t)
	e := newEnv(t)
	e.overNetwork(nil)
	address, ca := vaultsim.ServeTLS(t, e.sim, certificate)
	good, lines := e.credentials(), strings.SplitAfter(key, "\n")
	maps.Copy(good, fields{
		"api_endpoint": address, "ca_certificate": ca, "client_certificate": certificate, "client_key": key})
	shown := ""
	for field, values := range map[string][]any{
		"ca_certificate":     {"no PEM", key, ca + key, vaultsim.PEM("CERTIFICATE", []byte("x"))},
		"client_certificate": {"no PEM", "", certificate + key, key + certificate, otherCertificate},
		"client_key":         {"no PEM", "", otherKey, certificate, lines[0] + lines[2], []any{fields{"x": key}}},
	} {
		for _, value := range values {
			resp, err := e.Write("config", vaultsim.With(good, field, value))
			e.Refusal(resp, err, field)
			if shown += fmt.Sprint(vaultsim.Failure(resp, err)); len(e.Storage.Keys("config")) > 0 {
				t.Fatalf("%s %.10q: stored", field, value)
			}
		}
	}
	e.OK("config", good)
	same(t, "certificates", e.Get("config").Data["ca_certificate"], ca)
	same(t, "certificates", e.Get("config").Data["client_certificate"], certificate)
	for _, data := range []fields{{"ca_certificate": ""}, {"client_key": "", "client_certificate": ""},
		{"client_certificate": certificate + "\n"}, {"client_certificate": otherCertificate, "client_key": otherKey}} {
		e.Refused("config", data, "admin_api_key")
	}
	e.OK("config", fields{"ca_certificate": ca, "client_key": key}) // as they are
	l := e.lease("web")
	e.Must("update config/rotate", nil)
	e.MustRevoke(l)
	e.have(0, 0, "after revocation")
	shown += fmt.Sprint(e.Get("config").Data) + e.Log.String()
	failIf(t, strings.Contains(shown, lines[1][:20]) || strings.Contains(shown, "PRIVATE KEY"),
		"an error, config or the log shows the key")
	f := e.b().Route("config").Fields["client_key"]
	failIf(t, f.Required || !f.DisplayAttrs.Sensitive, "client_key is required, or not marked as a secret")
}

// TestClientEndlessList: a list without end, all of whose entries match, is given up before it fills memory.
func TestClientEndlessList(t *testing.T) {
	e := newConfiguredEnv(t)
	page := strings.Repeat(`{"id":"key_x","redacted_value":"s.c"},`, 20_000)
	pages := 0
	e.Wire.SetFault(func(req *http.Request, _ vaultsim.Send) (*http.Response, error) {
		pages++
		body := fmt.Sprintf(`{"data":[%s{}],"has_more":%v,"last_id":"key_%d"}`, page, pages < 100, pages)
		return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(body)), Request: req}, nil
	})
	c := e.b().newClient(&config{AdminAPIKey: "sk-abc"})
	_, err := c.ownKey(t.Context())
	failIf(t, !isStatus(err, 200) || !strings.Contains(err.Error(), "larger than 32 MiB"),
		"a list of 100 full pages: got error %v, want that it is too large", err)
	failIf(t, pages > 2*maxFound/len(page), "%d pages were read", pages)
}

// TestClientHugeKey: a key or certificate with which Go computes for long is refused before it does. The certificate
// would do so when a server shows one that it signed, after the request has ended.
func TestClientHugeKey(t *testing.T) {
	n := new(big.Int).Lsh(big.NewInt(1), 1<<20)
	n.Sub(n, big.NewInt(1))
	der, err := asn1.Marshal(struct {
		Version, N, E, D, P, Q, Dp, Dq, Qinv *big.Int
	}{new(big.Int), n, big.NewInt(65537), n, n, n, n, n, n})
	failIf(t, err != nil, "making a key: %v", err)
	certificate, key := vaultsim.NewCertificate(t)
	huge := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: der})
	pair, err := tls.X509KeyPair([]byte(certificate), []byte(key))
	failIf(t, err != nil, "reading a certificate: %v", err)
	authority := func(bits int) string {
		template := &x509.Certificate{SerialNumber: big.NewInt(1)}
		n := new(big.Int).Rsh(n, uint(1<<20-bits))
		der, err := x509.CreateCertificate(nil, template, template, &rsa.PublicKey{N: n, E: 65537}, pair.PrivateKey)
		failIf(t, err != nil, "making a certificate: %v", err)
		return vaultsim.PEM("CERTIFICATE", der)
	}
	_, err = (&config{CACertificate: authority(8192)}).tlsConfig()
	failIf(t, err != nil, "an authority of 8192 bits: %v", err)
	for name, cfg := range map[string]config{
		"client_key":     {ClientCertificate: certificate, ClientKey: string(huge)},
		"ca_certificate": {CACertificate: authority(1 << 20)},
		"authority":      {CACertificate: authority(8192) + authority(120_000)}, // 16 KiB, half a second each time
	} {
		_, err := cfg.tlsConfig()
		failIf(t, err == nil || !strings.Contains(err.Error(), "16384 bytes") &&
			!strings.Contains(err.Error(), "8192 bits"), "%s: got error %v", name, err)
	}
}

// TestClientNothingSent: a call that did not get through proxy or TLS handshake was not sent: it is made again, nothing
// is looked for, and the error says what to look at. One that was cut off is not made again, but looked for.
func TestClientNothingSent(t *testing.T) {
	stranger, _ := vaultsim.NewCertificate(t)
	for want, answer := range map[string]int{ // of a proxy; -1: it is dead; 0: there is none
		"proxyconnect": -1, "proxy answered 407": 407, "proxy answered 403": 403, "no answer": 0,
		"unknown authority": 0,
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			e := newEnv(t)
			refuse := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(answer) }
			via := httptest.NewServer(http.HandlerFunc(refuse))
			defer via.Close()
			proxy, _ := url.Parse(via.URL)
			if answer == 0 {
				proxy = nil
			} else if answer < 0 {
				via.Close()
			}
			e.overNetwork(proxy)
			cutOff := func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }
			address, ca := vaultsim.ServeTLS(t, http.HandlerFunc(cutOff), "")
			ca = map[bool]string{true: stranger, false: ca}[want == "unknown authority"]
			e.configure(fields{"api_endpoint": address, "ca_certificate": ca, "verify_connection": false})
			_, err := e.Issue("creds/web", nil)
			e.Fails("creds", err, want)
			count := fmt.Sprint(maxAttempts, " attempts, 0 lost")
			if want == "no answer" { // it was cut off
				count = "1 attempts, 1 lost"
			}
			errs := e.b().metrics.series["api_requests_total"][`operation="create_service_account",status="error"`]
			same(t, "calls", fmt.Sprint(errs, " attempts, ", len(e.b().lost), " lost"), count)
		})
	}
	// A TLS 1.3 server refuses our certificate when the call is on its way.
	c := &client{config: config{AdminAPIKey: "sk-admin-x"}}
	for text, sent := range map[string]bool{"connection reset": true, "remote error: tls: internal error": true,
		"x: remote error: tls: bad certificate": false, "http2: client conn could not be established": false} {
		err := c.noAnswer(errors.New(text), true)
		failIf(t, notDone(err) == sent || strings.Contains(err.Error(), "client_certificate") == sent,
			"%s: got error %v, taken as not done: %v", text, err, notDone(err))
	}
}

// TestClientWriteFails: a request that could not be written whole was not done, also when there was a connection: so a
// TLS 1.3 client mostly learns that its certificate is missing. One that was written may have been.
func TestClientWriteFails(t *testing.T) {
	for written, lost := range map[bool]int{false: 0, true: 1} {
		e := newConfiguredEnv(t)
		e.Wire.SetFault(func(req *http.Request, _ vaultsim.Send) (*http.Response, error) {
			err := &net.OpError{Op: "write", Net: "tcp", Err: syscall.EPIPE}
			trace := httptrace.ContextClientTrace(req.Context())
			trace.GetConn("")
			trace.GotConn(httptrace.GotConnInfo{})
			trace.WroteRequest(httptrace.WroteRequestInfo{Err: map[bool]error{false: err}[written]})
			return nil, err
		})
		_, err := e.Issue("creds/web", nil)
		e.Fails("creds", err, "broken pipe")
		same(t, fmt.Sprint("lost creates, written ", written), len(e.b().lost), lost)
	}
}

// TestClientPermission: what the admin key is not allowed to do is the operator's problem: no 400, and the error, or
// the warning where a role can't be proved, names the permission.
func TestClientPermission(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		refused := func(path string) {
			t.Helper()
			resp, err := e.Do(logical.UpdateOperation, path, fields{"project_id": ours})
			failIf(t, resp.IsError() || !strings.Contains(fmt.Sprint(resp, err), "Organization Administration: Write"),
				"%s: got response %v, error %v", path, resp, err)
		}
		e.sim.Inject(fault{Status: 403})
		refused("roles/new")
		_, id := e.sim.AdminKey()
		e.sim.SetAdminKeyAccess(id, "read")
		e.configure(nil) // passes
		refused("creds/web")
		refused("config/rotate")
		same(t, "to look for", len(e.config().Creating)+len(e.b().lost), 0)
	})
}

// TestClientRateLimit: where OpenAI says when to come again, revocations that come at once drain at its pace, in about
// their order, with few refused. Without the limit calls are soon as fast as before.
func TestClientRateLimit(t *testing.T) {
	for _, latency := range []time.Duration{0, 50 * time.Millisecond, 300 * time.Millisecond} {
		inBubble(t, func(t *testing.T, e *env) {
			const n = 200
			var ended, displaced atomic.Int64
			var group sync.WaitGroup
			for i := range n {
				l := e.lease("web")
				group.Go(func() {
					time.Sleep(time.Second + time.Duration(i)*time.Microsecond) // they come in this order
					failIf(t, e.Revoke(l) != nil, "a revocation failed")
					displaced.Add(int64(math.Abs(float64(ended.Add(1) - 1 - int64(i)))))
				})
			}
			e.sim.SetLatency(latency)
			e.sim.SetRateLimit(20, 20)
			start := time.Now()
			group.Wait()
			took, limited := time.Since(start), e.sim.CountCalls("DELETE", "", http.StatusTooManyRequests)
			failIf(t, took > 12500*time.Millisecond || limited > 80,
				"latency %s: took %s with %d calls refused, want at most 12.5s and 80", latency, took, limited)
			failIf(t, displaced.Load()/n > 40, // at random it is 67
				"mean distance from the order of arrival: got %d places, want at most 40", displaced.Load()/n)
			e.have(0, 0, "in the end")
			e.sim.SetRateLimit(0, 0)
			for _, calls := range []int{480, 320} { // the first are slow yet
				start = time.Now()
				vaultsim.AtOnce(32, calls/32, func() { e.lease("web") })
			}
			took = time.Since(start)
			failIf(t, took > 20*latency, "320 credentials by 32 workers: took %s, want about %s", took, 10*latency)
		})
	}
}

// TestClientWaits: a call whose time is up while it waits says what it waited for, and leaves nothing to look for.
func TestClientWaits(t *testing.T) {
	for _, seconds := range []string{"", "1", "30"} { // asked of the callers
		inBubble(t, func(t *testing.T, e *env) {
			fails := func(text string) {
				ctx, cancel := context.WithTimeout(t.Context(), 5300*time.Millisecond)
				defer cancel()
				req := &logical.Request{Operation: logical.ReadOperation, Path: "creds/web", Storage: e.Storage}
				resp, err := e.b().HandleRequest(ctx, req)
				e.Fails("creds", err, text)
				same(t, "answer and lost creates", fmt.Sprint(resp, e.metric("lost_creates")), "<nil> 0")
			}
			slots := e.b().throttle.slots
			for range maxCalls {
				slots <- struct{}{}
			}
			fails("waiting for other calls to OpenAI")
			for range maxCalls {
				<-slots
			}
			e.sim.Inject(fault{Method: "POST", Status: 429, Header: after(seconds), Times: -1})
			fails(map[string]string{"": "waiting for OpenAI's rate limit"}[seconds])
			got := e.sim.CountCalls("POST", "service_accounts")
			failIf(t, got > 10, "calls in 5.3s: got %d, want at most 10", got)
			if seconds == "30" {
				fails("waiting for OpenAI's rate limit")
			}
		})
	}
}

// tally returns how many calls of a method met service accounts, and how many of these a rate limit refused.
func (e *env) tally(method string) (calls, limited int) {
	return e.sim.CountCalls(method, "service_accounts"), e.sim.CountCalls(method, "service_accounts", 429)
}

// eachLimit runs test on a mount whose OpenAI takes 300 ms for an answer and, after limit, allows 8 calls a minute for
// an endpoint, without saying when to come again: with a bucket and with a window.
func eachLimit(t *testing.T, test func(t *testing.T, e *env, limit func())) {
	for _, window := range []bool{false, true} {
		inBubble(t, func(t *testing.T, e *env) {
			e.sim.SetLatency(300 * time.Millisecond)
			test(t, e, func() {
				t.Logf("window %v", window)
				e.sim.SetEndpointLimit(8, 8, window, false)
				e.sim.ResetCalls()
			})
		})
	}
}

// TestClientLane: on a slow endpoint reads that come at once are served in their order and within their time, other
// endpoints meanwhile. What can't be served says so, and nothing of it is left or looked for. All that was served of 14
// is revoked within three minutes.
func TestClientLane(t *testing.T) {
	for _, n := range []int{14, 60} {
		eachLimit(t, func(t *testing.T, e *env, limit func()) {
			limit()
			start := time.Now()
			var beside atomic.Int64 // nanoseconds
			time.AfterFunc(20*time.Second, func() {
				e.OK("roles/other", fields{"project_id": ours})
				beside.Store(int64(time.Since(start) - 20*time.Second))
			})
			leases, order, errs := e.IssueTogether(n, "creds/web")
			for _, err := range errs {
				e.Fails("creds", err, "ate limit")
			}
			calls, _ := e.tally("POST")
			failIf(t, len(leases) < 13 || n == 14 && calls > 28 || !slices.IsSorted(order) || len(e.b().lost) > 0,
				"%d reads: got %d leases with %d calls in the order %v, errors %v", n, len(leases), calls, order, errs)
			took := time.Duration(beside.Load())
			failIf(t, took == 0 || took > time.Second, "a call of another endpoint took %s, want at most 1s", took)
			e.have(len(leases), len(leases), "when all are answered")
			if n == 60 {
				return
			}
			for again := time.Now(); time.Since(again) < 3*time.Minute && len(e.Leases()) > 0; {
				e.RevokeTogether()
			}
			e.have(0, 0, "after three minutes")
		})
	}
}

// TestClientLaneEnd: 100 leases that end at once are deleted at the endpoint's pace, with at most one refused call for
// each served one, and no lease becomes irrevocable.
func TestClientLaneEnd(t *testing.T) {
	eachLimit(t, func(t *testing.T, e *env, limit func()) {
		for range 80 { // so many fast answers are no leave for many calls at once
			e.MustRevoke(e.lease("web"))
		}
		leases, _, _ := e.IssueTogether(100, "creds/web")
		limit()
		start := leases[len(leases)-1].Expires
		e.Run(time.Until(start))
		for len(e.sim.ServiceAccounts(ours)) > 0 && time.Since(start) < time.Hour {
			e.Run(time.Second)
		}
		calls, limited := e.tally("DELETE")
		took := time.Since(start)
		failIf(t, took > 15*time.Minute || limited > calls-limited,
			"took %s with %d calls, %d refused, want at most 15m and half of them", took, calls, limited)
		e.Run(30 * time.Minute)
		same(t, "left", e.leftovers(), "0 0")
		same(t, "leases", len(e.Leases()), 0) // an irrevocable one stays a day
	})
}

// TestClientConcurrency is for the race detector: all that a mount can be asked at once. Nothing fails by a rotation.
func TestClientConcurrency(t *testing.T) {
	e := newConfiguredEnv(t)
	var workers sync.WaitGroup
	repeat := func(name string, n int, act func() error) {
		for range n {
			workers.Go(func() {
				for range 20 {
					err := act()
					failIf(t, err != nil, "%s: %v", name, err)
				}
			})
		}
	}
	repeat("creds", 8, func() error {
		l := e.lease("web")
		return errors.Join(e.Renew(l, 0), e.Revoke(l))
	})
	for request, data := range map[string]fields{"update config": {"rotation_policy": "p"}, "read config": nil,
		"update roles/web": {"ttl": "30m"}, "read roles/web": nil, "read metrics": nil, "read tidy": nil} {
		repeat(request, 1, func() error { return vaultsim.Failure(e.Request(request, data)) })
	}
	repeat("rotate", 4, func() error { return vaultsim.Failure(e.Write("config/rotate", nil)) })
	repeat("tidy", 1, func() error { _, err := e.Write("tidy", nil); return err }) // a 400 says that one is under way
	repeat("invalidate", 1, func() error { e.b().InvalidateKey(t.Context(), configPath); return nil })
	repeat("tick", 1, func() error { e.Tick(); return nil })
	workers.Wait()
	e.quiet()
	same(t, "rotations", e.series()[metricPrefix+`rotations_total{trigger="manual",result="success"}`], 80)
	e.oneKey("in the end")
	e.have(0, 0, "in the end")
}

// FuzzAnswer gives OpenAI's answers: nothing panics, no error shows a key, and what is handed out has valid ids.
func FuzzAnswer(f *testing.F) {
	for _, body := range []string{
		``, `null`, `{}`, `[]`, `"`, `{"id":"proj_sim","status":"archived"}`, `{"deleted":1}`, `{"has_more":true}`,
		`{"id":"svc_acct_1","role":"member","api_key":{"id":"key_1","value":"sk-x-simulated","expires_at":1e300}}`,
		`{"id":"svc_acct_1","api_key":{"id":"../x","value":"sk-x"}}`, `{"error":{"message":"sk-\u0000sk-","type":""}}`,
		`{"data":[{"id":"key_1","redacted_value":"sk-admin...abc"}],"has_more":true,"last_id":"key_1"}`,
		`{"error":{"message":"Incorrect API key provided: sk-admin-simulated-abc","type":"x","code":1,"param":{}}}`,
	} {
		for _, status := range []int{200, 204, 307, 400, 401, 404, 429, 500} {
			f.Add(status, body, "5", "true")
		}
	}
	f.Fuzz(func(t *testing.T, status int, body, after, again string) {
		if status < 200 || status > 599 {
			return
		}
		inBubble(t, func(t *testing.T, e *env) {
			l := e.lease("web")
			header := http.Header{"Retry-After": {after}, "X-Should-Retry": {again}, "X-Request-Id": {again}}
			e.Wire.SetFault(func(req *http.Request, _ vaultsim.Send) (*http.Response, error) {
				answer := io.NopCloser(strings.NewReader(body))
				return &http.Response{StatusCode: status, Body: answer, Request: req, Header: header}, nil
			})
			start := time.Now()
			check := func(err error) {
				e.NoSecrets("an error", fmt.Sprint(err))
				took := time.Since(start)
				failIf(t, took > requestTimeout+undoTimeout, "a request took %s", took)
				start = time.Now()
			}
			for _, path := range []string{"config", "roles/web", "config/rotate", "tidy"} {
				check(vaultsim.Failure(e.Write(path, nil)))
			}
			made, err := e.Issue("creds/web", nil)
			check(err)
			for _, id := range []string{"api_key_id", "service_account_id"} {
				if err == nil && (!validID(fmt.Sprint(made.Data[id])) || made.Data["api_key"] == "") {
					t.Errorf("handed out %v", made.Data[id])
				}
			}
			check(e.Renew(l, 0))
			check(e.Revoke(l))
			e.Tick()
			check(nil)
		})
	})
}

// FuzzRetryAfter: whatever OpenAI says, the wait is between nothing and maxPause, and milliseconds go before seconds.
func FuzzRetryAfter(f *testing.F) {
	for _, value := range []string{"", "1500", "1.5", "-1", "1e400", "NaN", "0x1", "Fri, 31 Dec 9999 23:59:59 GMT"} {
		f.Add(value, "")
		f.Add("7", value)
	}
	f.Fuzz(func(t *testing.T, after, ms string) {
		got := retryAfter(http.Header{"Retry-After": {after}, "Retry-After-Ms": {ms}})
		n, err := strconv.Atoi(ms)
		want := min(max(time.Duration(n)*time.Millisecond, 0), maxPause)
		failIf(t, got < 0 || got > maxPause || err == nil && n < 1e6 && (got-want).Abs() > time.Microsecond,
			"Retry-After %q and %q ms: got %v", after, ms, got)
	})
}

// expectShown checks a field of config.
func (e *env) expectShown(field string, want any) {
	e.t.Helper()
	same(e.t, field+" in config", e.Get("config").Data[field], want)
}

// keyWorks fails the test unless OpenAI accepts the key in storage, and it has the id that is there.
func (e *env) keyWorks(when string) {
	e.t.Helper()
	c := e.b().newClient(e.config())
	c.http, c.throttle, c.metrics = &http.Client{Transport: e.sim.Transport()}, newThrottle(), newMetrics()
	_, err := c.ownKey(context.Background())
	failIf(e.t, err != nil, "%s: the key in config: got %v, want that it works", when, err)
}

// oneKey fails the test unless config's key works, is the only live admin key, and none is pending deletion.
func (e *env) oneKey(when string) {
	e.t.Helper()
	e.sim.ClearFaults()
	e.keyWorks(when)
	cfg, keys := e.config(), e.sim.AdminKeys()
	failIf(e.t, len(keys) != 1 || keys[0].ID != cfg.AdminAPIKeyID || len(cfg.PendingDeletion) != 0,
		"%s: got keys %v, pending deletion %v, want %q", when, keys, cfg.PendingDeletion, cfg.AdminAPIKeyID)
}

// rotateFails makes a rotation that must fail with text in its error, and returns the names that are in creating then.
func (e *env) rotateFails(text string) (creating []string) {
	e.t.Helper()
	e.Fails("rotation", vaultsim.Failure(e.Write("config/rotate", nil)), text)
	return e.config().creatingNames()
}

// failCreate makes the next creation of an admin key fail.
func (e *env) failCreate(f fault) {
	f.Method, f.Path = "POST", "/admin_api_keys$"
	e.sim.Inject(f)
}

// loseKey makes a rotation whose answer to the creation of a key is lost, and returns the name that OpenAI knows.
func (e *env) loseKey() string {
	e.t.Helper()
	e.failCreate(fault{Kind: "close", Process: true})
	names := e.rotateFails("")
	if len(names) == 0 || !e.sim.HasAdminKey(names[len(names)-1]) {
		e.t.Fatalf("a key whose creation was lost: got creating %v and keys %v", names, e.sim.AdminKeys())
	}
	return names[len(names)-1]
}

// TestRotateFaults: whatever a rotation meets at whatever step, config holds a working key at any moment. A few minutes
// later that is the only one; a day later nothing else is left, and never is there a write-ahead log.
func TestRotateFaults(t *testing.T) {
	const update, tick = logical.UpdateOperation, logical.RollbackOperation
	for name, test := range map[string]struct {
		op     logical.Operation
		path   string
		enough int // at least so many steps
		set    func(*env)
	}{
		// config, own key, config, new key, proof, config, old key, config
		"manual":     {update, "config/rotate", 8, func(*env) {}},
		"slow proof": {update, "config/rotate", 10, func(e *env) { e.sim.SetKeyDelay(250 * time.Millisecond) }},
		"no proof":   {update, "config/rotate", 17, func(e *env) { e.sim.SetKeyDelay(time.Hour) }},
		"left over": {update, "config/rotate", 9, func(e *env) { // with an old key still to be deleted
			e.sim.Inject(fault{Method: "DELETE", Status: http.StatusForbidden})
			e.OK("config/rotate", nil)
		}},
		"scheduled": {tick, "", 11, func(e *env) { // with a new key to be found: list, delete and config come first
			e.OK("config", fields{"rotation_period": "1h"})
			e.loseKey()
			time.Sleep(time.Hour)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			vaultsim.EveryStep(t, test.enough, func(t *testing.T, fault vaultsim.StepFault, at int) (reached bool) {
				e := newConfiguredEnv(t)
				test.set(e)
				before, b := e.config().AdminAPIKeyID, e.b()
				each := func() {
					e.keyWorks("at a step")
					same(t, "storage", e.Storage.Keys(""), "[config roles/]")
				}
				b.sweepMu.Lock() // nothing in the background takes a step
				b.passMu.Lock()
				reached = e.AtStep(fault, at, each, func(ctx context.Context) {
					resp, err := e.DoContext(ctx, test.op, test.path, nil)
					e.keyWorks("after the request")
					if rotated := e.config().AdminAPIKeyID; test.op == update && vaultsim.Failure(resp, err) == nil &&
						(rotated == before || rotated != resp.Data["admin_api_key_id"]) {
						t.Errorf("answered %v, and the key in config is %q, before %q", resp.Data, rotated, before)
					}
				})
				b.passMu.Unlock()
				b.sweepMu.Unlock()
				e.lease("web")
				e.sim.SetKeyDelay(0)
				e.Run(5 * time.Minute)
				e.oneKey("five minutes later")
				time.Sleep(lostTime)
				e.Run(2 * time.Minute)
				e.expectShown("creating", "[]")
				e.OK("config/rotate", nil)
				e.oneKey("after another rotation")
				each()
				return reached
			})
		})
	}
}

// TestRotateProof: a new key is waited for up to 20 s. One that is not accepted then is deleted within three minutes.
func TestRotateProof(t *testing.T) {
	for _, seconds := range []int{0, 3, 12, 13, 15, 17, 19, 22, 3600} {
		delay, ok := time.Duration(seconds)*time.Second, seconds < 20
		inBubble(t, func(t *testing.T, e *env) {
			first, start := e.config().AdminAPIKeyID, time.Now()
			e.sim.SetKeyDelay(delay)
			err := vaultsim.Failure(e.Write("config/rotate", nil))
			failIf(t, (err == nil) != ok, "key accepted after %v: got %v, want success %v", delay, err, ok)
			took, proofs := time.Since(start), e.sim.CountCalls("GET", "/admin_api_keys/")
			failIf(t, took > min(delay, proofTimeout)+maxProofWait+time.Second || proofs > 17,
				"key accepted after %v: took %v and %d proofs", delay, took, proofs)
			e.Run(3 * time.Minute)
			e.oneKey("three minutes later")
			e.expectShown("creating", "[]")
			same(t, "new key in config", e.config().AdminAPIKeyID != first, ok)
		})
	}
}

// TestRotateNotYetKnown: a new key that OpenAI does not know yet, neither in the proof nor in a DELETE then, is found.
func TestRotateNotYetKnown(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		unknown := `{"error":{"message":"No such key","type":"invalid_request_error"}}`
		e.sim.SetKeyDelay(time.Minute)
		e.sim.Inject(fault{Method: "DELETE", Status: 404, Body: unknown})
		e.rotateFails("proving")
		e.sim.ClearFaults()
		e.Run(4 * time.Minute)
		e.oneKey("four minutes later")
		e.expectShown("creating", "[]")
	})
}

// TestRotateLate: an admin key that OpenAI makes after an error is found and deleted within an hour and a quarter.
func TestRotateLate(t *testing.T) {
	faults := map[string]fault{}
	for _, minutes := range []time.Duration{1, 4, 11, 61, 20 * 60} {
		faults[fmt.Sprint("500 ", minutes)] = fault{Late: minutes * time.Minute}
		faults[fmt.Sprint("reset ", minutes)] = fault{Late: minutes * time.Minute, Kind: "close"}
	}
	inBubbles(t, faults, func(t *testing.T, e *env, fault fault) {
		e.sim.AddAdminKey("vault-admin-234567234567234567ab") // of a clone of this cluster
		e.failCreate(fault)
		names := e.rotateFails("creating")
		e.Run(fault.Late - time.Second)
		e.Restart() // nothing of this is in memory only
		e.expectShown("creating", names)
		same(t, "keys before", len(e.sim.AdminKeys()), 2)
		time.Sleep(time.Second)
		same(t, "late key made", e.sim.HasAdminKey(names[0]), true)
		e.Run(75 * time.Minute)
		same(t, "late key still there", e.sim.HasAdminKey(names[0]), false)
		same(t, "keys after", len(e.sim.AdminKeys()), 2)
		e.expectShown("creating", "[]")
	})
}

// TestRotateForgets: a name is dropped a day later, if OpenAI's list is then read and does not have it. Else it is kept
func TestRotateForgets(t *testing.T) {
	day := func(date string) fault {
		return fault{Status: 200, Body: `{"data":[{"id":"key_x"}]}`, Header: http.Header{"Date": {date}}}
	}
	inBubbles(t, map[string]fault{
		"refused": {Status: 403}, "failed": {Status: 500}, "no answer": {Kind: "close"}, "without date": day("soon"),
		"cut": {Status: 200, Body: `{"data":[],"has_more":true}`}, "clock behind": day("Sat, 01 Jan 2000 00:00:00 GMT"),
		"no list": {Status: 200, Body: `{"status":"ok"}`},
	}, func(t *testing.T, e *env, list fault) {
		e.failCreate(fault{Late: 50 * time.Hour})
		names := e.rotateFails("500")
		list.Method, list.Path, list.Times = "GET", "/admin_api_keys$", -1
		e.sim.Inject(list)
		e.Run(3 * time.Minute)
		time.Sleep(49 * time.Hour)
		e.Run(3 * time.Minute)
		e.expectShown("creating", names)
		time.Sleep(time.Hour)
		e.sim.ClearFaults()
		e.Run(2 * time.Minute)
		e.oneKey("when OpenAI is heard again")
		e.expectShown("creating", "[]")
	})
	inBubble(t, func(t *testing.T, e *env) {
		e.failCreate(fault{})
		names := e.rotateFails("500")
		e.sim.Advance(72 * time.Hour) // nor is OpenAI's clock believed that is ahead of this one
		time.Sleep(lostTime - time.Minute)
		e.Run(time.Minute)
		e.expectShown("creating", names)
		e.Run(time.Minute)
		e.expectShown("creating", "[]")
		e.sim.ResetCalls()
		e.Run(5 * time.Minute)
		same(t, "lists when there is nothing to look for", e.sim.CountCalls("GET", "/admin_api_keys"), 0)
	})
}

// TestRotateClock: a key whose creation was lost is found within minutes also if the clock was ahead then.
func TestRotateClock(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.loseKey()
		cfg := e.config()
		cfg.Creating[0].Since = time.Now().Add(90 * 24 * time.Hour)
		e.NoError(putJSON(t.Context(), e.Storage, configPath, cfg))
		e.Run(3 * time.Minute)
		e.oneKey("three minutes later")
		e.expectShown("creating", "[]")
	})
}

// TestRotateMany: at most 50 keys are looked for at a time. A creation that was refused leaves none.
func TestRotateMany(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.failCreate(fault{Status: 403})
		same(t, "creating after a refusal", e.rotateFails("403"), "[]")
		for range 50 {
			e.failCreate(fault{})
			e.rotateFails("500")
		}
		e.sim.ResetCalls()
		same(t, "names", len(e.rotateFails("50 admin keys")), 50)
		same(t, "creations", e.sim.CountCalls("POST", ""), 0)
		time.Sleep(lostTime)
		e.Run(2 * time.Minute)
		e.expectShown("creating", "[]")
		e.OK("config/rotate", nil)
		e.oneKey("in the end")
	})
}

// TestRotateOrganization: a key whose creation was lost is looked for in its own organization, also days later.
func TestRotateOrganization(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		name, old := e.loseKey(), e.config()
		e.OK("config", fields{"organization_id": "org-other", "admin_api_key": "sk-admin-other",
			"admin_api_key_id": "key_other", "verify_connection": false})
		e.sim.Inject(fault{Status: 200, Body: `{"data":[{"id":"key_other"}]}`, Times: -1})
		for range 3 {
			e.Run(3 * time.Minute)
			time.Sleep(lostTime)
		}
		same(t, "deletions in the other organization", e.sim.CountCalls("DELETE", ""), 0)
		e.expectShown("creating", []string{name})
		e.sim.ClearFaults()
		e.OK("config", fields{"organization_id": old.OrganizationID, "admin_api_key": old.AdminAPIKey,
			"admin_api_key_id": old.AdminAPIKeyID})
		e.Run(2 * time.Minute)
		e.oneKey("back in its organization")
		e.expectShown("creating", "[]")
	})
}

// TestRotateLimited: a scheduled rotation whose turn at OpenAI's rate limit does not come leaves no name to look for.
func TestRotateLimited(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.OK("config", fields{"rotation_period": "1h"})
		e.sim.Fail("POST", "/admin_api_keys", 429)
		e.Run(2 * time.Hour)
		same(t, "rotations were tried", e.sim.CountCalls("POST", "/admin_api_keys") > 10, true)
		e.expectShown("creating", []string{})
	})
}

// TestRotateUnderWay: during a rotation a tick leaves the admin keys alone, and neither logs nor counts that.
func TestRotateUnderWay(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.OK("config", fields{"rotation_period": "1h"})
		e.loseKey()
		e.sim.Inject(fault{Method: "DELETE", Status: http.StatusForbidden})
		e.OK("config/rotate", nil) // now there is a key to find, one to delete, and soon a rotation to make
		time.Sleep(time.Hour)
		e.sim.SetLatency(20 * time.Second)
		var group sync.WaitGroup
		group.Go(func() { e.OK("config/rotate", nil) })
		synctest.Wait()
		e.b().sweepMu.Lock() // tidy has its own words
		e.b().passMu.Lock()
		state := func() string { return fmt.Sprint(e.Log, e.series(), e.Storage.All(), len(e.sim.Calls())) }
		before := state()
		for range 3 {
			e.Tick()
		}
		failIf(t, state() != before, "ticks have done something, with log %s", e.Log)
		e.b().passMu.Unlock()
		e.b().sweepMu.Unlock()
		e.sim.SetLatency(0)
		group.Wait()
		e.Tick()
		e.oneKey("in the end")
	})
}

// TestRotatePending: an old key that can't be deleted is shown, told once, and deleted later, unless used again.
func TestRotatePending(t *testing.T) {
	cases := map[string]int{"refused": 403, "gone": 404, "limited": 429, "failed": 500, "used again": 400}
	inBubbles(t, cases, func(t *testing.T, e *env, status int) {
		want := []string{e.config().AdminAPIKeyID}
		if status == 404 {
			want = nil
		}
		e.sim.Fail("DELETE", "admin_api_keys", status)
		e.Warned("rotation", e.OK("config/rotate", nil), len(want), want...)
		same(t, "metric", e.metric("admin_keys_pending_deletion"), len(want))
		e.Run(3 * time.Minute)
		e.expectShown("pending_deletion", want)
		if status == 400 {
			e.configure(nil) // with the old key
		}
		e.sim.ClearFaults()
		e.Run(time.Minute)
		e.expectShown("pending_deletion", "[]")
		e.keyWorks("when deletions work")
		if status != 404 && status != 400 { // the simulator has not really deleted it, or the new key is nobody's
			e.oneKey("when deletions work")
			e.Warned("the next rotation", e.OK("config/rotate", nil), 0)
		}
	})
}

// TestRotateSchedule: without a rotation manager of Vault the plugin rotates from its ticks, by period or cron (UTC).
func TestRotateSchedule(t *testing.T) {
	defer func(zone *time.Location) { time.Local = zone }(time.Local)
	time.Local = time.FixedZone("elsewhere", 5*60*60+30*60) // schedules are in UTC all the same
	type tt struct {
		config, change fields // change is written after down
		down, up       int    // minutes that Vault is down, from midnight (UTC) on, and then up
		want           string
	}
	period, hourly := fields{"rotation_period": "90m"}, fields{"rotation_schedule": "30 * * * *"}
	later := fields{"rotation_schedule": "45 * * * *"}
	nightly := fields{"rotation_schedule": "0 3 * * *", "rotation_window": "2h"}
	inBubbles(t, map[string]tt{
		"period":          {period, nil, 0, 300, "01:30 03:00 04:30"},
		"period missed":   {period, nil, 240, 120, "04:01 05:31"},
		"schedule":        {hourly, nil, 0, 180, "00:30 01:30 02:30"},
		"schedule missed": {hourly, nil, 120, 60, "02:01 02:30"},
		"window":          {nightly, nil, 0, 28 * 60, "03:00 03:00"},
		"in the window":   {nightly, nil, 290, 24 * 60, "04:51 03:00"},
		"after it":        {nightly, nil, 300, 24 * 60, "03:00"},
		"disabled":        {period, fields{"disable_automated_rotation": true}, 120, 600, ""},
		"cleared":         {period, fields{"rotation_period": 0}, 120, 600, ""},
		"shortened":       {period, fields{"rotation_period": "20m"}, 10, 60, "00:20 00:40 01:00"},
		"lengthened":      {period, fields{"rotation_period": "3h"}, 120, 120, "03:00"},
		"new schedule":    {hourly, later, 20, 60, "00:45"},
		"other kind":      {period, vaultsim.With(later, "rotation_period", 0), 20, 120, "00:45 01:45"},
	}, func(t *testing.T, e *env, tt tt) {
		if tt.change == nil { // OpenBao's error
			e.System.RotationErr = errors.New("rpc error: code = Unimplemented desc = unknown method")
		}
		e.OK("config", tt.config)
		e.expectShown("rotation_manager", "plugin")
		time.Sleep(time.Duration(tt.down) * time.Minute)
		e.Restart()
		e.OK("config", tt.change)
		var got []string
		for range tt.up {
			before := e.config().AdminAPIKeyID
			next, _ := time.Parse(time.RFC3339, e.Get("config").Data["next_rotation"].(string))
			e.Run(time.Minute)
			now := time.Now().UTC()
			rotated := e.config().AdminAPIKeyID != before
			if rotated {
				got = append(got, now.Format("15:04"))
				e.expectShown("last_rotated", formatTime(now))
			}
			want := !next.IsZero() && !next.After(now)
			same(t, fmt.Sprint("rotated when next_rotation is ", next, " at ", now), rotated, want)
		}
		same(t, "rotations", strings.Join(got, " "), tt.want)
		e.oneKey("in the end")
	})
}

// TestRotateWrongID: a rotation with the id of another key, which it would delete, is refused.
func TestRotateWrongID(t *testing.T) {
	e := newConfiguredEnv(t)
	_, other := e.sim.AddAdminKey("somebody else's")
	e.OK("config", fields{"admin_api_key_id": other, "verify_connection": false})
	same(t, "creating", e.rotateFails(other), "[]")
	same(t, "live admin keys", len(e.sim.AdminKeys()), 2)
}

// TestRotateRetry: a scheduled rotation that fails is tried again after 1, 2, 4 … minutes, until a config write.
func TestRotateRetry(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		attempts := func(minutes int, want ...int) {
			t.Helper()
			var got []int
			e.sim.ResetCalls()
			for minute := range minutes {
				e.Run(time.Minute)
				if e.sim.CountCalls("POST", "/admin_api_keys") > len(got) {
					got = append(got, minute)
				}
			}
			same(t, "minutes of attempts", got, want)
		}
		e.OK("config", fields{"rotation_period": "1h"})
		time.Sleep(time.Hour - time.Minute)
		e.sim.Fail("POST", "/admin_api_keys$", 500)
		attempts(250, 0, 1, 3, 7, 15, 31, 63, 123, 183, 243)
		e.OK("config", fields{"rotation_period": "30m"})
		attempts(1, 0)
		e.sim.ClearFaults()
		attempts(31, 0, 30)
		e.sim.Fail("POST", "/admin_api_keys$", 403)
		attempts(31, 29, 30)
	})
}

// TestRotateReplication: only the active node of the primary, or of a local mount, rotates and deletes lost admin keys.
func TestRotateReplication(t *testing.T) {
	type tt struct {
		state          consts.ReplicationState
		local, rotates bool
	}
	inBubbles(t, map[string]tt{
		"primary":                {consts.ReplicationPerformancePrimary, false, true},
		"standby":                {consts.ReplicationPerformanceStandby, false, false},
		"secondary":              {consts.ReplicationPerformanceSecondary, false, false},
		"secondary, local mount": {consts.ReplicationPerformanceSecondary, true, true},
		"DR secondary":           {consts.ReplicationDRSecondary, false, false},
	}, func(t *testing.T, e *env, tt tt) {
		e.OK("config", fields{"rotation_period": "1h"})
		name, first := e.loseKey(), e.config().AdminAPIKeyID
		e.System.ReplicationStateVal, e.System.LocalMountVal = tt.state, tt.local
		e.Run(3 * time.Hour)
		same(t, "rotated", e.config().AdminAPIKeyID != first, tt.rotates)
		same(t, "lost key there", e.sim.HasAdminKey(name), !tt.rotates)
		byVault := vaultsim.Failure(e.Request("rotate config", nil))
		same(t, "rotation by Vault works", byVault == nil, tt.rotates)
	})
}

// TestLeaseOnStandby: a standby that serves reads (OpenBao 2.5) passes on what a lease does before OpenAI hears of it:
// its storage is read-only, so what it did at OpenAI would be done without the lease.
func TestLeaseOnStandby(t *testing.T) {
	inBubbles(t, map[string]func(e *env, l *vaultsim.Lease) error{
		"issue":  func(e *env, _ *vaultsim.Lease) error { return vaultsim.Failure(e.Request("read creds/web", nil)) },
		"renew":  func(e *env, l *vaultsim.Lease) error { return e.Renew(l, 0) },
		"revoke": func(e *env, l *vaultsim.Lease) error { return e.Revoke(l) },
	}, func(t *testing.T, e *env, act func(e *env, l *vaultsim.Lease) error) {
		l := e.lease("web")
		time.Sleep(time.Minute)
		e.sim.ResetCalls()
		e.System.ReplicationStateVal = consts.ReplicationDRDisabled | consts.ReplicationPerformanceStandby
		e.Fails("on the standby", act(e, l), logical.ErrReadOnly.Error())
		same(t, "calls of OpenAI", len(e.sim.Calls()), 0)
		e.System.ReplicationStateVal = consts.ReplicationUnknown
		failIf(t, act(e, l) != nil, "fails on the active node")
	})
}

// TestRotateTakenOver: the older plugin's config is taken over by the first tick, or by Vault's rotation manager.
func TestRotateTakenOver(t *testing.T) {
	inBubbles(t, map[string]bool{managerPlugin: false, managerVault: true}, func(t *testing.T, e *env, byVault bool) {
		if byVault {
			e.System.RotationErr = nil
		}
		key, id := e.sim.AdminKey()
		e.Storage.Set("config", fmt.Sprintf(`{"admin_api_key":%q,"admin_api_key_id":%q,"organization_id":"org-sim",
			"last_rotated_time":"2000-01-01T00:00:00Z","rotation_schedule":"","rotation_period":3600000000000,
			"api_endpoint":"https://api.openai.com/v1","disable_automated_rotation":false,"rotation_policy":"",
			"rotation_window":0}`, key, id))
		e.Restart()
		e.Run(time.Minute)
		e.expectShown("rotation_manager", map[bool]string{false: managerPlugin, true: managerVault}[byVault])
		e.Run(time.Hour)
		same(t, "the plugin has rotated", e.config().AdminAPIKeyID != id, !byVault)
		same(t, "registered", len(e.System.Registered()) == 1, byVault)
		id = e.config().AdminAPIKeyID
		e.Must("rotate config", nil)
		same(t, "Vault has rotated", e.config().AdminAPIKeyID != id, true)
		e.oneKey("in the end")
		e.sim.Fail("POST", "", 403)
		e.Fails("Vault's rotation", vaultsim.Failure(e.Request("rotate config", nil)), "403")
	})
}

// TestRotateTTL: admin_key_ttl must leave time for two rotations, and who has a key that ends is warned.
func TestRotateTTL(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		const day = 24 * time.Hour
		time.Sleep(2*day + 10*time.Hour) // to a Monday morning
		for _, tt := range []struct{ schedule, period, ttl, refused string }{
			{"", "0", "24h", "no"}, {"", "12h", "24h", ""}, {"", "12h", "23h59m", "no"}, {"", "12h", "365d", ""},
			{"", "12h", "8761h", "no"}, {"", "200d", "365d", "no"}, {"0 3 * * 1-5", "0", "143h", "no"},
			{"0 3 1 * *", "0", "62d", ""}, {"0 3 1 * *", "0", "61d", "no"}, {"* 9-17 * * 1-5", "0", "6d", ""},
			{"* 9-17 * * 1-5", "0", "2d", "no"}, // many short gaps come before the long one
			{"0 3 29 2 *", "0", "365d", "no"}, {"", "106751d", "24h", "no"},
		} {
			data := fields{"admin_key_ttl": tt.ttl, "rotation_schedule": tt.schedule, "rotation_period": tt.period}
			if tt.refused == "" {
				e.OK("config", data)
				data["disable_automated_rotation"] = true
			}
			e.Refused("config", data, "admin_key_ttl")
			e.OK("config", fields{"admin_key_ttl": 0})
		}
		made, err := e.b().newClient(e.config()).createAdminKey(t.Context(), "ends", day)
		same(t, "creating a key that ends", err, nil)
		data := fields{"admin_api_key": made.Value, "admin_api_key_id": made.ID, "rotation_schedule": ""}
		e.Warned("a key that ends", e.OK("config", data), 1, formatTime(time.Now().Add(day)))
		e.Warned("a schedule", e.OK("config", fields{"rotation_period": "23h"}), 0)
		e.Warned("too late", e.OK("config", fields{"rotation_period": "10d", "admin_key_ttl": "20d"}), 1, "no rotation")
		e.Refused("config", fields{"rotation_period": "11d"}, "admin_key_ttl")
		e.OK("config/rotate", nil)
		e.expectShown("admin_key_expires_at", formatTime(time.Now().Add(20*day)))
	})
}

// uploads is the verification of a provider that has these keys.
func uploads(jwks any) fields {
	return fields{"verification": fields{"type": "uploaded_jwks", "jwks": json.RawMessage(jwks.(string))}}
}

// providerAway deletes the provider with its only rule.
func (e *env) providerAway() {
	e.sim.Operate("DELETE", "/RULE", nil)
	e.sim.Operate("DELETE", "/PROVIDER", nil)
}

// signing returns the kid of the key that signs; nil: there is no identity.
func (e *env) signing() any {
	return cmp.Or(e.Get("config/identity"), &logical.Response{}).Data["key_id"]
}

// What federation tells where all is well, and where nothing is left.
const works, nothing = "1 providers, 1 enabled, 1 rules, creds true", "0 providers, 0 enabled, 0 rules, creds false"

// federation tells what OpenAI has of workload identity federation, and whether creds/app works.
func (e *env) federation() string {
	_, err := e.Issue("creds/app", nil)
	return fmt.Sprint(e.sim.Federation(), ", creds ", err == nil)
}

// TestIdentity is the way of a keyless mount: set up, a token, and all of it without config.
func TestIdentity(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		mount, shown, role := "vault-"+e.b().mountID, e.Get("config/identity").Data, e.Get("roles/app").Data
		p, rule := e.sim.Providers()[0], e.sim.Rules()[0]
		same(t, "provider", []any{p.Name, p.Issuer, p.Audience, p.ID},
			[]any{mount, "https://" + mount + ".invalid", defaultEndpoint, shown["identity_provider_id"]})
		var keys struct{ Keys []map[string]string }
		e.NoError(json.Unmarshal([]byte(shown["jwks"].(string)), &keys))
		same(t, "keys, and members of one", fmt.Sprint(len(keys.Keys), len(keys.Keys[0])), "1 6")
		same(t, "key that signs", shown["key_id"], keys.Keys[0]["kid"])
		same(t, "keys after the write", e.sim.KeyIDs(), []any{shown["key_id"]})
		subject := "vault:" + e.b().mountID + ":app"
		same(t, "rule", fmt.Sprint(rule.Name, rule.Matchers, rule.Scopes), mount+"-appmap[sub:"+subject+"] []")
		same(t, "role", []any{role["subject"], role["ttl"], role["max_ttl"]}, []any{subject, 3600, 3600})
		e.Must("delete config", nil)
		e.Restart()
		for range maxCalls { // the Admin API's calls keep no token waiting
			e.b().throttle.slots <- struct{}{}
		}
		e.lease("app") // reads the identity
		e.sim.ResetCalls()
		e.Storage.ResetCounts()
		l, err := e.Issue("creds/app", fields{"ttl": "5m"})
		e.NoError(err)
		same(t, "storage", e.Storage.Counts(), map[string]int{"get": 1})
		same(t, "authorization", e.Wire.Header()["Authorization"], "[]")
		key := l.Data["api_key"].(string)
		same(t, "answer", vaultsim.With(l.Data, "api_key"), fields{"api_key_id": "", "service_account": "for app",
			"service_account_id": rule.ServiceAccountID, "project_id": ours, "organization_id": "org-sim",
			"scopes": []any{}, "expires_at": formatTime(time.Now().Add(5 * time.Minute))})
		same(t, "ttl and renewable", fmt.Sprint(l.Expires.Sub(l.Issued), l.Renewable), "5m0s false")
		e.MustRevoke(l)
		same(t, "calls, and their host", fmt.Sprint(len(e.sim.Calls()), e.sim.Calls()[0].Host), "1auth.openai.com")
		time.Sleep(5*time.Minute - 1)
		same(t, "token works until its end", e.sim.Use(key), true)
		time.Sleep(time.Nanosecond)
		same(t, "token works after it", e.sim.Use(key), false)
		e.lease("app")
		e.Mistake("read creds/app", fields{"ttl": "61m"}, "max_ttl of 1h0m0s", "OpenAI's access tokens live at most 1h")
		e.sim.ResetCalls()
		e.look()
		same(t, "calls of a tick", e.sim.Calls(), "[]")
		e.NoError(e.Storage.Delete(t.Context(), "config/identity")) // by another node
		e.lease("app")
		e.b().InvalidateKey(t.Context(), "config/identity")
		e.Mistake("read creds/app", nil, "write config/identity after config")
	})
}

// TestIdentityBadInput: what is refused, and that nothing is stored or made then.
func TestIdentityBadInput(t *testing.T) {
	bads, long := vaultsim.Bads, strings.Repeat("x", 257)
	inBubble(t, func(t *testing.T, e *env) {
		account := e.sim.AddServiceAccount(ours, "a", "member")
		role := fields{"project_id": ours, "service_account_id": account, "credential_type": accessToken}
		e.Refused("roles/app", role, "write config/identity after config")
		e.Refused("config/identity/rotate", nil, "write config/identity after config")
		e.RefusesAll("config/identity", fields{}, slices.Concat(bads("issuer", "256", "a b", long),
			bads("audience", "256", "a\nb", long), bads("ca_certificate", "PEM", "x"),
			bads("token_endpoint", "token_endpoint", "http://h/", "x", "https://u:p@h/", "https://h/?q"),
			bads("identity_provider_id", "128", "a/b")))
		certificate, _ := vaultsim.NewCertificate(t)
		for field, value := range (fields{"issuer": "x", "audience": "y", "token_endpoint": "https://thief.example/",
			"ca_certificate": certificate, "identity_provider_id": "wip_other"}) {
			e.Refused("config/identity", fields{field: value}, field, "delete config/identity")
		}
		e.Refused("config/identity/rotate", fields{"confirm": true}, "without confirm first")
		e.OK("config/identity/rotate", fields{"confirm": nil})
		unknown := vaultsim.With(role, "service_account_id", "svc_acct_x")
		e.Refused("roles/app", unknown, "service_account_id", "was refused")
		e.RefusesAll("roles/app", role, slices.Concat(
			bads("credential_type", "api_key or access_token", "x", "Token"), bads("max_ttl", "at most 1h", "61m"),
			bads("enforce_key_expiry", "always expire", false), bads("service_account_id", "required", nil)))
		for field, value := range (fields{"credential_type": apiKeyType, "project_id": "proj_x",
			"service_account_id": e.sim.AddServiceAccount(ours, "b", "member")}) {
			e.Refused("roles/app", fields{field: value}, field, "fixed")
		}
		e.Refused("roles/web", role, "fixed") // a role of keys
		e.Refused("roles/other", role, `account of role "app"`)
		same(t, "rules", len(e.sim.Rules()), 1)
	})
}

// TestIdentityElsewhere: where the plugin makes the provider, JWTs go to OpenAI or where config says: else who may
// write config/identity, but not config, could get tokens sent to himself. An operator may send them anywhere.
func TestIdentityElsewhere(t *testing.T) {
	ca, _ := vaultsim.NewCertificate(t)
	other, _ := vaultsim.NewCertificate(t)
	const elsewhere = "https://thief.example/oauth/token"
	gateway := fields{"api_endpoint": "https://gw.example:8443/v1", "ca_certificate": ca}
	for _, tt := range []struct {
		config           fields // nil: there is none
		endpoint, ca, id string
		warnings         int // -1: refused
	}{
		{fields{}, defaultTokenEndpoint, "", "", 0}, {fields{}, "https://api.openai.com/token", "", "", 0},
		{gateway, "https://gw.example:8443/token", ca, "", 0}, {gateway, defaultTokenEndpoint, "", "", 0},
		{gateway, "https://gw.example/token", "", "", -1}, {fields{}, "https://x.api.openai.com/", "", "", -1},
		{fields{}, elsewhere, "", "", -1}, {fields{}, defaultTokenEndpoint, ca, "", -1},
		{gateway, "https://gw.example:8443/token", other, "", -1}, {fields{}, elsewhere, ca, "wip_x", 1},
		{nil, elsewhere, ca, "", 1},
	} {
		inBubble(t, func(t *testing.T, e *env) {
			if e.Must("delete config", nil); tt.config != nil {
				e.configure(tt.config)
			}
			data := fields{"token_endpoint": tt.endpoint, "ca_certificate": tt.ca, "identity_provider_id": tt.id}
			if tt.warnings < 0 {
				e.Unchanged(tt, func() { e.Refused("config/identity", data, "token_endpoint", "ca_certificate") })
			} else {
				e.Warned(tt, e.OK("config/identity", data), tt.warnings)
			}
			if tt.warnings > 0 { // nor does the plugin make the provider afterwards
				e.configure(nil)
				e.Refused("config/identity", fields{"identity_provider_id": ""}, "token_endpoint", "ca_certificate")
				e.Warned("rotation", e.OK("config/identity/rotate", nil), 1, "confirm=true")
				e.OK("config/identity/rotate", fields{"confirm": true})
				time.Sleep(2 * time.Hour)
				e.Tick()
				same(t, "former key until", e.Get("config/identity").Data["former_key_until"], "")
			}
			same(t, fmt.Sprint("a provider is there with ", tt), len(e.sim.Providers()) == 1, tt.warnings == 0)
		})
	}
}

// TestIdentityElsewhereMeanwhile: that holds also for a config that comes while the identity is made.
func TestIdentityElsewhereMeanwhile(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		config := e.Storage.All()["config"]
		e.Must("delete config", nil)
		e.Storage.SetAfter(func(verb, key string) error {
			if verb+" "+key == "put config/identity" {
				e.Storage.Set("config", config)
			}
			return nil
		})
		e.Refused("config/identity", fields{"token_endpoint": "https://thief.example/"}, "token_endpoint")
		same(t, "identity and provider", []any{e.signing(), len(e.sim.Providers())}, []any{nil, 0})
	})
}

// TestIdentityElsewhereLater: a provider is neither changed, nor made anew when it is gone, where config does not name
// the host of the token endpoint any more.
func TestIdentityElsewhereLater(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.configure(fields{"api_endpoint": "https://former.example/v1"})
		e.OK("config/identity", fields{"token_endpoint": "https://former.example/token"})
		e.configure(fields{"api_endpoint": defaultEndpoint})
		e.Refused("config/identity", nil, "token_endpoint")
		e.sim.Operate("DELETE", "/PROVIDER", nil)
		e.Refused("config/identity", nil, "token_endpoint")
		same(t, "providers", len(e.sim.Providers()), 0)
	})
}

// TestIdentityElsewhereNamed: who may write config and config/identity, but does not know the admin key, has an
// endpoint of his own say that the present provider is his: once config is as it was, OpenAI is given no key whose JWTs
// go to him.
func TestIdentityElsewhereNamed(t *testing.T) {
	for _, rotated := range []bool{false, true} {
		inKeylessBubble(t, func(t *testing.T, e *env) {
			real := e.sim.Providers()[0].ID
			e.Wire.SetFault(func(req *http.Request, send vaultsim.Send) (*http.Response, error) {
				if req.URL.Host != "thief.example" {
					return send()
				}
				id := req.URL.Path[strings.LastIndex(req.URL.Path, "/")+1:]
				if strings.HasSuffix(id, "providers") {
					id = real
				}
				body := fmt.Sprintf(`{"id":%q,"redacted_value":"sk-a..thief","deleted":true,"data":[],`+
					`"access_token":"t","token_type":"Bearer","expires_in":3600}`, id)
				return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader(body)), Request: req}, nil
			})
			before := e.sim.KeyIDs()
			e.OK("config", fields{"admin_api_key": "sk-admin-thief", "admin_api_key_id": "key_thief",
				"api_endpoint": "https://thief.example/v1"})
			e.Must("delete config/identity", nil)
			e.OK("config/identity", fields{"token_endpoint": "https://thief.example/token"})
			if rotated {
				e.OK("config/identity/rotate", nil)
			}
			e.configure(fields{"api_endpoint": defaultEndpoint})
			if rotated { // the former key is taken off by a tick
				e.Run(2 * time.Hour)
			} else {
				e.Fails("rotation", vaultsim.Failure(e.Write("config/identity/rotate", nil)), "token_endpoint")
			}
			same(t, "keys at OpenAI", e.sim.KeyIDs(), before)
			e.Refused("config/identity", nil, "token_endpoint")
			same(t, "keys at OpenAI", e.sim.KeyIDs(), before)
		})
	}
}

// TestIdentityFirstWrite: a first write that OpenAI refuses stores nothing. Where the answer is lost, the next write
// finds the provider by its name. A write also makes the rules of the roles that are there, and warns of what fails.
func TestIdentityFirstWrite(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		provider := fault{Method: "POST", Path: "identity_providers$", Status: 400}
		e.sim.Inject(provider)
		e.Unchanged("refusal", func() { e.Refused("config/identity", nil, "saving the identity provider", "400") })
		provider.Kind, provider.Process = "close", true
		e.sim.Inject(provider)
		e.Fails("write whose answer is lost", vaultsim.Failure(e.Write("config/identity", nil)), "no answer")
		key := e.signing()
		same(t, "keys after it", e.sim.KeyIDs(), []any{key})
		e.Warned("next write", e.OK("config/identity", nil), 0)
		same(t, "keys after the next", e.sim.KeyIDs(), []any{key})
		same(t, "provider", e.Get("config/identity").Data["identity_provider_id"], e.sim.Providers()[0].ID)
		e.tokenRole("app", nil)
		e.sim.Operate("DELETE", "/RULE", nil)
		e.sim.Inject(fault{Method: "POST", Path: "rules$", Status: 400})
		e.Warned("write with a rule that fails", e.OK("config/identity", nil), 1, `role "app"`, "write it again", "400")
		same(t, "rules", len(e.sim.Rules()), 0)
		e.Warned("write", e.OK("config/identity", nil), 0)
		e.lease("app")
	})
}

// TestIdentityOperator: an operator makes provider and rule. A rotation waits for him, and nothing of his is deleted.
func TestIdentityOperator(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.Warned("without a provider", e.OK("config/identity", nil), 1, "jwks", "identity_provider_id")
		account := e.sim.AddServiceAccount(ours, "a", "member")
		role := fields{"project_id": ours, "service_account_id": account, "credential_type": accessToken,
			"scopes": "api.model.read"}
		e.Refused("roles/app", role, "identity_provider_id")
		shown, subject := e.Get("config/identity").Data, e.b().subject("app")
		id := e.sim.Operate("POST", "", fields{"name": e.b().providerName(), "issuer": shown["issuer"],
			"audience": shown["audience"], "type": "oidc", "verification": uploads(shown["jwks"])["verification"]})
		e.sim.Operate("POST", "/PROVIDER/federation_rules", fields{"project_id": ours, "service_account_id": account,
			"attribute_matchers": fields{"sub": subject},
			"permissions":        fields{"type": "restricted", "scopes": []string{"api.model.read"}}})
		resp := e.OK("config/identity", fields{"identity_provider_id": id})
		e.Warned("with the provider", resp, 1, "did not make")
		e.Warned("role", e.OK("roles/app", role), 1, account, subject, "restricted")
		e.Warned("role that needs the same rule", e.OK("roles/app", fields{"ttl": "10m"}), 0)
		same(t, "requests", e.Wire.Sent(), "[]")
		same(t, "scopes", e.lease("app").Data["scopes"], "[api.model.read]")
		first := e.signing()
		resp = e.OK("config/identity/rotate", nil)
		e.Warned("rotation", resp, 1, "confirm=true")
		same(t, "again", e.OK("config/identity/rotate", nil).Data, resp.Data)
		same(t, "keys before he uploads", e.sim.KeyIDs(), []any{first})
		_, err := e.Write("config/identity/rotate", fields{"confirm": true})
		e.Fails("too early", err, "proving the new key", "kid")
		e.lease("app")
		e.sim.Operate("POST", "/PROVIDER", uploads(resp.Data["jwks"]))
		e.OK("config/identity/rotate", fields{"confirm": true})
		same(t, "keys after the rotation", e.sim.KeyIDs(), []any{first, e.signing()})
		e.lease("app")
		time.Sleep(time.Hour + requestTimeout)
		e.Tick()
		same(t, "kids in jwks", strings.Count(e.Get("config/identity").Data["jwks"].(string), "kid"), 1)
		e.Warned("deletion of the role", e.Must("delete roles/app", nil), 1, subject)
		e.configure(nil)
		e.Warned("deletion", e.Must("delete config/identity", nil), 1, id)
		e.Warned("another", e.Must("delete config/identity", nil), 0)
		e.Must("delete roles/app", nil)
		same(t, "left alone", e.sim.Federation(), "1 providers, 1 enabled, 1 rules")
	})
}

// TestIdentityTrouble is README's table of what can be wrong, with the error of creds, and what mends it.
func TestIdentityTrouble(t *testing.T) {
	const write, rewrite = "config/identity", "roles/app"
	unknown, err := newSigningKey()
	same(t, "another key", err, nil)
	jwks, _ := json.Marshal((&identity{Key: unknown}).jwks())
	by := func(method, path string, in fields) func(*env) {
		return func(e *env) { e.sim.Operate(method, path, in) }
	}
	disabled, otherSubject := fields{"enabled": false}, fields{"attribute_matchers": fields{"sub": "x"}}
	type row struct {
		trouble func(e *env)
		status  int // of OpenAI's answer
		text    string
		mend    string // the path to write; empty: that does not help
	}
	inBubbles(t, map[string]row{
		"provider deleted":  {(*env).providerAway, 401, "invalid_client", write},
		"provider disabled": {by("POST", "/PROVIDER", disabled), 403, "unauthorized_client", ""},
		"key unknown":       {by("POST", "/PROVIDER", uploads(string(jwks))), 401, "invalid_subject_token", write},
		"wrong audience":    {by("POST", "/PROVIDER", fields{"audience": "x"}), 401, "invalid_subject_token", write},
		"rule deleted":      {by("DELETE", "/RULE", nil), 403, "access_denied", rewrite},
		"rule disabled":     {by("POST", "/RULE", disabled), 403, "access_denied", ""},
		"another subject":   {by("POST", "/RULE", otherSubject), 403, "access_denied", write},
		"clock ahead": {func(e *env) { time.Sleep(11 * time.Minute); e.sim.Advance(-10 * time.Minute) }, 401,
			"invalid_subject_token: The subject token is refused: its iat is in the future", ""},
		"account deleted": {func(e *env) {
			l := &lease{ProjectID: ours, ServiceAccountID: e.sim.Rules()[0].ServiceAccountID}
			e.NoError(e.b().revokeAtOpenAI(context.Background(), e.Storage, l))
		}, 400, "invalid_target", ""},
	}, func(t *testing.T, e *env, tt row) {
		e.keyless()
		tt.trouble(e)
		resp, err := e.Do(logical.ReadOperation, "creds/app", nil)
		e.Fails("creds", vaultsim.Failure(resp, err), fmt.Sprintf("OpenAI answered %d %s", tt.status, tt.text),
			"check token_endpoint and this machine's clock", "request id req_")
		same(t, "is the caller's mistake", resp.IsError(), tt.status == 400)
		if tt.mend != "" {
			e.OK(tt.mend, nil)
			e.lease("app")
		}
	})
}

// TestIdentityProviderChanged: rotation, tick and delete find the plugin's provider by its id. Only a write of
// config/identity makes one that is gone again, with the rules, or turns one on again.
func TestIdentityProviderChanged(t *testing.T) {
	change := func(in fields) func(*env) { return func(e *env) { e.sim.Operate("POST", "/PROVIDER", in) } }
	const off = "1 providers, 0 enabled, 1 rules, creds false"
	for name, tt := range map[string]struct {
		change func(e *env)
		stays  string // what there is after a rotation or a tick
		mended string // and after a write
	}{
		"renamed": {change(fields{"name": "Vault"}), works, works}, "gone": {(*env).providerAway, nothing, works},
		"off": {change(fields{"enabled": false}), off, off},
	} {
		inBubbles(t, map[string][]string{
			name + ", rotate": {"update config/identity/rotate", tt.stays}, name + ", tick": {"rollback", tt.stays},
			name + ", write":  {"update config/identity", tt.mended},
			name + ", delete": {"delete config/identity", nothing},
		}, func(t *testing.T, e *env, request []string) {
			e.keyless()
			e.OK("config/identity/rotate", nil) // so that a tick has to take the former key off
			time.Sleep(2 * time.Hour)
			tt.change(e)
			_, _ = e.Request(request[0], nil)
			same(t, "in the end", e.federation(), request[1])
		})
	}
}

// TestIdentityDelete: its first call turns the provider off, so that no rule gives tokens any more, however long it
// takes to delete many. A write turns it on again. What another mount has is left alone.
func TestIdentityDelete(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		e.Must("delete roles/web", nil)
		for i := range 30 {
			e.tokenRole(fmt.Sprint("r", i), nil)
		}
		roles := e.Storage.Keys("roles/")
		e.sim.SetEndpointLimit(8, 0, false, true)
		e.Fails("delete", vaultsim.Failure(e.Request("delete config/identity", nil)), "deleting the identity provider")
		failIf(t, len(e.sim.Rules()) < 10, "%d rules are left, so that this shows nothing", len(e.sim.Rules()))
		e.sim.SetEndpointLimit(0, 0, false, false)
		for _, role := range roles {
			_, err := e.Issue("creds/"+role, nil)
			e.Fails(role, err, "unauthorized_client")
		}
		e.sim.Operate("POST", "/PROVIDER", fields{"enabled": true})
		e.Warned("write", e.OK("config/identity", nil), 0)
		for _, role := range roles {
			e.lease(role)
		}
		other := newEnvOn(t, e.sim)
		other.configure(nil)
		other.OK("config/identity", nil)
		e.Must("delete config/identity", nil)
		same(t, "left", e.sim.KeyIDs(), []any{other.signing()})
	})
}

// TestIdentityDeleteUnlisted: a delete turns the provider off whose id is known also where the list of providers fails,
// or lacks it.
func TestIdentityDeleteUnlisted(t *testing.T) {
	inBubbles(t, map[string]fault{
		"fails": {Status: 500}, "lacks it": {Status: 200, Body: `{"data":[],"has_more":false}`},
	}, func(t *testing.T, e *env, f fault) {
		e.keyless()
		f.Path = "identity_providers$"
		e.callsFail("GET", f)
		err := vaultsim.Failure(e.Request("delete config/identity", nil))
		same(t, "delete fails", err != nil, f.Status == 500)
		same(t, "rules that give tokens", len(e.sim.Rules()), 0)
		e.sim.ClearFaults()
		e.Must("delete config/identity", nil)
		same(t, "in the end", e.federation(), nothing)
	})
}

// TestIdentityFaults stops each request at each of its steps and makes it again: nothing is too much then, or missing.
func TestIdentityFaults(t *testing.T) {
	const ruleless = "1 providers, 1 enabled, 0 rules, creds false"
	for request, tt := range map[string]struct {
		enough, prepared int    // prepared: 1: the mount is a provider, 2: and has the role
		end              string // what there is after it was made again
	}{
		"update config/identity": {3, 0, ruleless}, "update config/identity/rotate": {5, 2, works},
		"create roles/app": {6, 1, works}, "update roles/app": {6, 2, works}, "delete roles/app": {3, 2, ruleless},
		"delete config/identity": {5, 2, nothing},
	} {
		t.Run(request, func(t *testing.T) {
			vaultsim.EveryStep(t, tt.enough, func(t *testing.T, fault vaultsim.StepFault, at int) bool {
				e := newConfiguredEnv(t)
				data := fields{"project_id": ours, "credential_type": accessToken, "scopes": "api.a.read",
					"service_account_id": e.sim.AddServiceAccount(ours, "a", "member")} // others ignore it
				if tt.prepared > 0 {
					e.sign()
				}
				if tt.prepared == 2 {
					e.OK("roles/app", data)
				}
				op, path, _ := strings.Cut(request, " ")
				reached := e.AtStep(fault, at, nil, func(ctx context.Context) {
					_, _ = e.DoContext(ctx, logical.Operation(op), path, data)
				})
				if path == "config/identity/rotate" {
					e.lease("app") // whatever the fault was
				}
				err := vaultsim.Failure(e.Request(request, data))
				failIf(t, err != nil && !strings.Contains(err.Error(), "rotate after that"), "again: %v", err)
				same(t, "in the end", e.federation(), tt.end)
				if rules := e.sim.Rules(); len(rules) > 0 {
					got := fmt.Sprint(e.Get("roles/app") != nil, rules[0].Scopes)
					same(t, "role, and scopes of the rule", got, "true [api.a.read]")
				}
				e.OnlySealWrapped("private_key")
				return reached
			})
		})
	}
}

// TestIdentityWithoutKey: an entry without a key, which nobody writes, is no identity, and ends no process: a write
// makes a new one.
func TestIdentityWithoutKey(t *testing.T) {
	e := newConfiguredEnv(t)
	e.keyless()
	for _, entry := range []string{`null`, `{}`, `{"key":null,"identity_provider_id":"idp_1"}`} {
		e.Storage.Set(identityPath, entry)
		e.b().invalidate(t.Context(), identityPath)
		e.Get("metrics")
		same(t, "identity", e.Get("config/identity"), (*logical.Response)(nil))
		e.Tick()
		_, err := e.Issue("creds/app", nil)
		e.Fails("creds", err, "write config/identity")
		e.Refused("config/identity/rotate", nil, "write config/identity")
		e.OK("config/identity", nil)
		e.lease("app")
	}
}

// TestIdentityRotation: tokens are handed out all the time while a new key takes ten seconds to count at OpenAI. The
// former key is taken off when none of its tokens can live, whatever a tick meets meanwhile.
func TestIdentityRotation(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		e.sim.SetJWKSDelay(10 * time.Second)
		before, start := e.signing(), time.Now()
		var readers sync.WaitGroup
		readers.Go(func() {
			vaultsim.AtOnce(8, 200, func() {
				_, err := e.Issue("creds/app", fields{"ttl": "1m"})
				failIf(t, err != nil, "creds during the rotation: %v", err)
				time.Sleep(100 * time.Millisecond)
			})
		})
		e.OK("config/identity/rotate", nil)
		took := time.Since(start)
		failIf(t, took < 10*time.Second || took > 13*time.Second, "took %s", took)
		readers.Wait()
		after, l := e.signing(), e.lease("app")
		e.Refused("config/identity/rotate", nil, "rotate after that")
		e.Run(time.Hour)
		same(t, "keys while a token may live", e.sim.KeyIDs(), []any{before, after})
		time.Sleep(requestTimeout)
		e.sim.Inject(fault{Method: "POST", Path: "providers", Status: 403, Body: "<html>"})
		e.Tick()
		same(t, "keys after a proxy's 403", e.sim.KeyIDs(), []any{before, after})
		e.Must("delete config", nil)
		lines := e.Log.Count("warn", "")
		e.Run(5 * time.Minute)
		same(t, "warnings without config", e.Log.Count("warn", "")-lines, 0)
		e.configure(nil)
		e.Tick()
		same(t, "keys with a config again", e.sim.KeyIDs(), []any{after})
		same(t, "the last token works", e.sim.Use(l.Data["api_key"].(string)), false)
		e.lease("app")
	})
}

// TestIdentityRotationProof: a new key signs only when OpenAI has accepted it for a role, or no role is of tokens.
func TestIdentityRotationProof(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		before := e.signing()
		fails := func(what string, f fault, limit time.Duration, want string) {
			t.Helper()
			f.Path, f.Times = cmp.Or(f.Path, "/oauth/token"), -1
			e.sim.Inject(f)
			start := time.Now()
			e.Fails(what, vaultsim.Failure(e.Write("config/identity/rotate", nil)), "proving the new key", want)
			failIf(t, time.Since(start) > limit, "%s: took %s", what, time.Since(start))
			e.sim.ClearFaults()
			same(t, what+": the key that signs", e.signing(), before)
			e.lease("app")
		}
		e.sim.SetJWKSDelay(10 * time.Minute)
		fails("key that does not count", fault{Path: "^none$"}, checkTimeout+time.Second, "invalid_subject_token")
		fails("refused connection", fault{Kind: "refuse"}, 10*time.Second, "connection refused")
		fails("500", fault{Status: 500}, 10*time.Second, "500")
		fails("a proxy's 403", fault{Status: 403, Body: "<html>"}, checkTimeout+time.Second, "403")
		next := e.Get("config/identity").Data["next_key_id"]
		same(t, "keys meanwhile", e.sim.KeyIDs(), []any{before, next})
		time.Sleep(10 * time.Minute)
		e.tokenRole("other", nil)
		e.sim.Operate("POST", "/RULE", fields{"enabled": false}) // no proof for one role, but for the other
		start := time.Now()
		same(t, "key that signs", e.OK("config/identity/rotate", nil).Data["key_id"], next)
		same(t, "time with one role that works", time.Since(start), 0*time.Second)
		time.Sleep(2 * time.Hour)
		e.Tick()
		e.Must("delete roles/app", nil)
		e.Must("delete roles/other", nil)
		e.OK("config/identity/rotate", nil)
		same(t, "keys without roles", e.sim.KeyIDs(), []any{next, e.signing()})
	})
}

// TestIdentityClock: a former key is taken off in time, and a key can be rotated again, also where the clock was 80
// days ahead at the last rotation.
func TestIdentityClock(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		e.OK("config/identity/rotate", nil)
		id, err := getIdentity(t.Context(), e.Storage)
		e.NoError(err)
		id.FormerUntil = id.FormerUntil.Add(80 * 24 * time.Hour)
		e.NoError(putJSON(t.Context(), e.Storage, identityPath, id))
		e.Tick()
		e.lease("app")
		e.Refused("config/identity/rotate", nil, "rotate after that")
		e.Run(time.Hour + requestTimeout + time.Minute)
		same(t, "keys", e.sim.KeyIDs(), []any{e.signing()})
		e.OK("config/identity/rotate", nil)
	})
}

// TestIdentityRotationLate: a rotation that storage carries out after it has failed, and after a token was read with the
// former key, counts at the latest when that is taken off.
func TestIdentityRotationLate(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		puts := 0
		e.Storage.SetFault(func(verb, key string) error {
			if verb+" "+key == "put config/identity" {
				if puts++; puts == 2 {
					return vaultsim.ErrHang
				}
			}
			return nil
		})
		e.Fails("rotation", vaultsim.Failure(e.Write("config/identity/rotate", nil)), "storing config/identity")
		e.lease("app")
		id, err := getIdentity(t.Context(), e.Storage)
		e.NoError(err)
		id.Former, id.FormerUntil = id.Key.jwk, time.Now().Add(maxTokenLife+requestTimeout)
		id.Key, id.Next = id.Next, nil
		e.NoError(putJSON(t.Context(), e.Storage, identityPath, id)) // now it is carried out
		e.Run(2 * time.Hour)
		same(t, "keys", e.sim.KeyIDs(), []any{id.Key.KeyID})
		e.lease("app")
	})
}

// TestIdentityClockBehind: a clock that is behind as much as credentials allow keeps no rotation from its proof.
func TestIdentityClockBehind(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		time.Sleep(time.Minute) // OpenAI must not have got the key later than now
		e.sim.Advance(clockTolerance - time.Second)
		e.lease("app")
		e.OK("config/identity/rotate", nil)
		e.lease("app")
	})
}

// TestIdentityDeadKey: an admin key that OpenAI has deleted keeps nobody from tokens, nor from ending them.
func TestIdentityDeadKey(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		_, id := e.sim.AdminKey()
		e.sim.AddAdminKey("another")
		e.NoError(e.b().newClient(e.config()).deleteAdminKey(t.Context(), id))
		e.lease("app")
		role := e.OK("roles/app", fields{"scopes": "api.model.read"})
		e.Warned("role", role, 1, "the plugin changed nothing", "401", "or creds fail")
		for request, want := range map[string]string{"update config/identity/rotate": "confirm=true",
			"delete roles/app": "may be there still", "delete config/identity": "is there still"} {
			before := e.Snapshot()
			e.Warned(request, e.Must(request, nil), 1, "the plugin changed nothing", "401", want)
			e.Restore(before)
		}
	})
}

// TestTokenJWT checks what is signed against the standards.
func TestTokenJWT(t *testing.T) {
	key, err := newSigningKey()
	same(t, "new key", err, nil)
	id, b := &identity{Issuer: "i", Audience: "a", Key: key}, newBackend(nil, "")
	s, err := b.newSigner(id, key)
	same(t, "signer", err, nil)
	text, err := s.jwt("s", time.Unix(1000, 1), time.Minute)
	same(t, "signing", err, nil)
	for i, want := range []fields{{"alg": "RS256", "kid": key.KeyID, "typ": "JWT"},
		{"aud": "a", "exp": 1060, "iat": 1000, "iss": "i", "sub": "s"}} {
		raw, err := base64.RawURLEncoding.DecodeString(strings.Split(text, ".")[i])
		part := fields{}
		failIf(t, err != nil || json.Unmarshal(raw, &part) != nil, "part %d: %q, %v", i, raw, err)
		same(t, "part of the JWT", part, want)
	}
	public, _ := json.Marshal(map[string]string{"e": key.E, "kty": "RSA", "n": key.N}) // sorted by name
	sum := sha256.Sum256(public)
	same(t, "kid, by RFC 7638", key.KeyID, base64.RawURLEncoding.EncodeToString(sum[:]))
	_, err = b.newSigner(id, &signingKey{PrivateKey: []byte("x")})
	same(t, "a broken key", err, "the signing key that is stored is not an RSA key in PKCS #1")
}

// TestTokenLease: no lease outlives its token, whatever OpenAI's clock says. One that is much too short has a warning.
func TestTokenLease(t *testing.T) {
	type row struct{ latency, ahead, lease, warnings time.Duration } // in seconds; lease: of 60 that were asked for
	inBubbles(t, map[string]row{
		"at once": {0, 0, 60, 0}, "slow": {20, 0, 30, 0}, "ahead": {0, 20, 40, 0}, "far ahead": {0, 40, 20, 1},
		"behind": {0, -50, 60, 0}, "slow and ahead": {20, 20, 10, 1},
	}, func(t *testing.T, e *env, tt row) {
		e.keyless()
		time.Sleep(time.Minute) // OpenAI must not have got the key later than now
		e.sim.Advance(tt.ahead * time.Second)
		e.sim.SetLatency(tt.latency * time.Second)
		l, err := e.Issue("creds/app", fields{"ttl": "1m"})
		e.NoError(err)
		same(t, "lease", l.Expires.Sub(l.Issued), tt.lease*time.Second)
		same(t, "expires_at", l.Data["expires_at"], formatTime(l.Expires))
		text := fmt.Sprintf("OpenAI's token lives %ds, not 1m0s: check this machine's clock", tt.lease)
		same(t, "warnings", l.Warnings, []string{text}[:tt.warnings])
		time.Sleep(time.Until(l.Expires) - 1)
		same(t, "token works at the lease's end", e.sim.Use(l.Data["api_key"].(string)), true)
	})
}

// TestTokenScopes: a token that can do more than its role says is thrown away. What OpenAI says is masked and cut.
func TestTokenScopes(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		e.tokenRole("scoped", fields{"scopes": "api.model.read,api.b.read"})
		for scope, want := range map[string]string{"": "[api.model.read api.b.read]", "api.b.read": "[api.b.read]",
			"none": "all that the account can", "api.b.read api.all.read": "api.all.read",
			"eyJhbGciOi.eyJzdWIi.c2ln " + strings.Repeat("x", 500_000): "sk-*** xxx"} {
			e.sim.SetTokenScope(scope)
			l, err := e.Issue("creds/scoped", nil)
			if !strings.HasPrefix(want, "[") {
				e.Fails("creds", err, "could do more", want, "write the role again")
				failIf(t, len(fmt.Sprint(err)) > 2000, "error of %d bytes", len(fmt.Sprint(err)))
				continue
			}
			e.NoError(err)
			same(t, "scopes", l.Data["scopes"], want)
			same(t, "reaches models", e.sim.Use(l.Data["api_key"].(string)), strings.Contains(want, "model"))
		}
		failIf(t, len(e.Log.String()) > 20_000, "log of %d bytes", len(e.Log.String()))
		e.sim.SetTokenScope("")
		for _, scopes := range [][]string{{"api.c.read"}, {}} {
			e.OK("roles/scoped", fields{"scopes": scopes})
			same(t, "scopes", e.lease("scoped").Data["scopes"], scopes)
		}
		same(t, "rules", len(e.sim.Rules()), 2)
	})
}

// TestTokenFaults: what the token endpoint can do wrong is tried again where that may help, and shows no secret.
func TestTokenFaults(t *testing.T) {
	body := func(old, new string) fault {
		text := strings.Replace(`{"access_token":"eyJ","token_type":"Bearer","expires_in":60}`, old, new, 1)
		return fault{Status: 200, Body: text}
	}
	echo := `{"error":"invalid_grant","error_description":"eyJhbGciOi.eyJzdWIi.c2ln and -----BEGIN PRIVATE KEY----- x"}`
	type row struct {
		fault
		calls int
		text  string // of the error; empty: none
	}
	inBubbles(t, map[string]row{
		"429": {fault{Status: 429}, 2, ""}, "408": {fault{Status: 408}, 2, ""}, "409": {fault{Status: 409}, 2, ""},
		"500, three times": {fault{Status: 500, Times: 3}, 4, ""}, "502": {fault{Status: 502, Process: true}, 2, ""},
		"closed": {fault{Kind: "close", Process: true}, 2, ""}, "refused": {fault{Kind: "refuse"}, 2, ""},
		"hangs once": {fault{Kind: "hang"}, 2, ""}, "malformed": {fault{Kind: "malformed"}, 1, "not the JSON"},
		"hangs":     {fault{Kind: "hang", Times: -1}, 3, "no answer from " + defaultTokenEndpoint + ": timed out"},
		"500":       {fault{Status: 500, Times: -1}, 4, "OpenAI answered 500 server_error"},
		"oversized": {fault{Kind: "oversized"}, 1, "larger than 1 MiB"},
		"redirect":  {fault{Kind: "redirect"}, 1, "redirects are not followed; check " + defaultTokenEndpoint},
		"400":       {fault{Status: 400, Body: echo}, 1, "OpenAI answered 400 invalid_grant: sk-*** and PEM-***"},
		"a proxy":   {fault{Status: 403, Body: "<html>"}, 1, "OpenAI answered 403: Forbidden"},
		"403": {fault{Status: 403, Body: `{"error":{"message":"no rule","type":"invalid_request_error"}}`}, 1,
			"OpenAI answered 403: no rule"},
		"no token": {body("eyJ", ""), 1, "lacks what it must hold"}, "two lines": {body("eyJ", `a\nb`), 1, "lacks"},
		"no life": {body("60", "0"), 1, "lacks"}, "endless life": {body("60", "9000000000000000"), 1, "lacks"},
		"another type": {body("Bearer", "N_A"), 1, "lacks"}, "a life of words": {body("60", `"x"`), 1, "not the JSON"},
	}, func(t *testing.T, e *env, tt row) {
		e.keyless()
		e.sim.ResetCalls()
		tt.Path = "/oauth/token"
		e.sim.Inject(tt.fault)
		e.Unchanged("exchange", func() {
			_, err := e.Issue("creds/app", nil)
			if tt.text == "" {
				e.NoError(err)
				return
			}
			e.Fails("creds", err, tt.text)
			failIf(t, strings.Contains(err.Error(), "admin API key"), "advice about a key that there is not: %v", err)
		})
		same(t, "calls", len(e.sim.Calls()), tt.calls)
	})
}

// TestTokenRoleDeleted: who deletes a role while a rotation hangs ends its creds at once, and its rule after that.
func TestTokenRoleDeleted(t *testing.T) {
	inKeylessBubble(t, func(t *testing.T, e *env) {
		var deletion sync.WaitGroup
		e.Wire.BeforeEach(func(n int, _ *http.Request) {
			if n > 1 {
				return
			}
			deletion.Go(func() { e.Must("delete roles/app", nil) })
			for i := 0; i < 100_000 && len(e.Storage.Keys("roles/")) > 1; i++ {
				runtime.Gosched()
			}
			_, err := e.Issue("creds/app", nil)
			e.Fails("creds", err, `role "app" does not exist`)
		})
		e.OK("config/identity/rotate", nil)
		deletion.Wait()
		same(t, "in the end", e.federation(), "1 providers, 1 enabled, 0 rules, creds false")
	})
}

// TestTokenRoleReplaced: while a role is written it is deleted and written anew, as one of the other kind. That leaves
// a rule for what is stored in the end, and none for a role of keys.
func TestTokenRoleReplaced(t *testing.T) {
	for kind, rules := range map[string]int{apiKeyType: 0, accessToken: 1} {
		inKeylessBubble(t, func(t *testing.T, e *env) {
			role := vaultsim.With(e.Get("roles/app").Data, "subject")
			if role["credential_type"] = kind; kind == accessToken {
				e.Must("delete roles/app", nil)
				e.OK("roles/app", vaultsim.With(role, "credential_type"))
			}
			var second sync.WaitGroup
			e.Wire.BeforeEach(func(n int, _ *http.Request) {
				if n == 1 {
					second.Go(func() {
						e.Must("delete roles/app", nil)
						e.OK("roles/app", role)
					})
				}
				runtime.Gosched()
			})
			_, _ = e.Write("roles/app", fields{"scopes": "api.b.read"})
			second.Wait()
			same(t, "kind", e.Get("roles/app").Data["credential_type"], kind)
			same(t, kind+": rules", len(e.sim.Rules()), rules)
			same(t, "scopes", e.lease("app").Data["scopes"], role["scopes"])
		})
	}
}

// stored is the entry of the static role "gw".
func (e *env) stored() *staticRole {
	e.t.Helper()
	r, err := getStatic(context.Background(), e.Storage, "gw")
	e.NoError(err)
	return r
}

// rotateMeets makes a rotation of "gw" whose creation of a key fails as f says.
func (e *env) rotateMeets(f fault) {
	e.t.Helper()
	f.Method = "POST"
	e.sim.Inject(f)
	_, err := e.Write("rotate-role/gw", nil)
	e.Fails("a rotation", err, "creating API key")
}

// reads reads the key of "gw", which must work, and returns it.
func (e *env) reads(when string) string {
	e.t.Helper()
	key, _ := e.Get("static-creds/gw").Data["api_key"].(string)
	failIf(e.t, !e.sim.Use(key), "%s: the key just read does not work", when)
	return key
}

// exactly checks that the account has the keys that the entry names, and no others, and that what it hands out works.
// It tells whether there is a role.
func (e *env) exactly(account, when string) (exists bool) {
	e.t.Helper()
	var got, want []string
	for _, k := range e.sim.ProjectKeys(ours) {
		if k.ServiceAccountID == account {
			got = append(got, k.ID)
		}
	}
	r := e.stored()
	for _, k := range append(r.Former, r.Key) {
		want = append(want, k.APIKeyID)
	}
	want = slices.DeleteFunc(want, func(id string) bool { return id == "" })
	same(e.t, when+": keys of the account", slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want)))
	same(e.t, when+": clean-up entries", e.Storage.Keys(cleanupPrefix), "[]")
	if r.exists() {
		e.reads(when)
	}
	return r.exists()
}

// TestStatic is a static role's life: made, read 10,000 times without a call, rotated when due, the former key until
// overlap has passed, deleted.
func TestStatic(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		account := e.static("24h", fields{"scopes": "api.model.request"})
		first := e.reads("at first")
		data := e.Get("static-creds/gw").Data
		want := fields{"ttl": 86400, "rotation_period": 86400, "overlap": 3600, "service_account_id": account,
			"project_id": "proj_sim", "organization_id": "org-sim", "scopes": "[api.model.request]",
			"last_rotated": formatTime(time.Now()), "last_vault_rotation": formatTime(time.Now()),
			"next_rotation": formatTime(time.Now().Add(24 * time.Hour)),
			"expires_at":    formatTime(time.Now().Add(48*time.Hour + time.Hour + 24*time.Hour))}
		for name := range want {
			same(e.t, name, data[name], want[name])
		}
		e.sim.ResetCalls()
		e.Storage.ResetCounts()
		for range 10_000 {
			e.Get("static-creds/gw")
		}
		same(e.t, "calls and storage", fmt.Sprint(e.sim.Calls(), e.Storage.Counts()), "[] map[get:10000]")
		e.Run(24*time.Hour - time.Second)
		same(e.t, "key before its rotation", e.reads("before"), first)
		e.Run(2 * time.Second)
		kept := strings.Contains(e.Storage.All()["static-roles/gw"], first)
		same(e.t, "rotated, and the former key kept", fmt.Sprint(e.reads("after") != first, kept), "true false")
		same(e.t, "former keys", len(e.Get("static-roles/gw").Data["former_api_key_ids"].([]string)), 1)
		e.Run(59 * time.Minute)
		same(e.t, "the former key works until overlap has passed", e.sim.Use(first), true)
		e.Run(2 * time.Minute)
		same(e.t, "and not any longer", e.sim.Use(first), false)
		for _, k := range e.sim.ProjectKeys(ours) {
			tag, end, _ := parseName(k.Name)
			same(e.t, "tag and end", fmt.Sprint(tag, end.After(k.Expires)), e.b().mountID+"true")
			same(e.t, "scopes", k.Scopes, "[api.model.request]")
		}
		e.OK("rotate-role/gw", nil)
		e.exactly(account, "rotated by hand")
		e.Must("delete static-roles/gw", nil)
		e.exactly(account, "deleted")
		e.have(1, 0, "deleted")
		e.Refused("rotate-role/gw", nil, `static role "gw" does not exist`)
		same(t, "reading what is not there", e.Get("static-roles/gw") == nil, true)
	})
}

// staticFaults are requests that meet faults in TestStaticFaults. set prepares one, and returns what it names.
var staticFaults = map[string]struct {
	op     logical.Operation
	path   string
	enough int // at least so many steps
	set    func(e *env, account string) fields
}{
	"make": {logical.UpdateOperation, "static-roles/gw", 7, func(e *env, account string) fields {
		e.Must("delete static-roles/gw", nil)
		return staticRoleOn(account, "1h")
	}},
	"rotate": {logical.UpdateOperation, "rotate-role/gw", 6, func(*env, string) fields { return nil }},
	"change": {logical.UpdateOperation, "static-roles/gw", 8, func(*env, string) fields {
		return fields{"scopes": "api.all.read"}
	}},
	"no overlap": {logical.UpdateOperation, "static-roles/gw", 12, func(e *env, _ string) fields {
		e.OK("rotate-role/gw", nil)
		return fields{"overlap": 0}
	}},
	"delete": {logical.DeleteOperation, "static-roles/gw", 8, func(*env, string) fields { return nil }},
	"scheduled": {logical.RollbackOperation, "", 14, func(e *env, _ string) fields {
		e.OK("rotate-role/gw", nil) // a key that is due, beside one to find
		e.rotateMeets(fault{Kind: "close", Process: true})
		time.Sleep(time.Hour)
		return nil
	}},
}

// TestStaticFaults: whatever befalls whatever step of making, rotating, changing and deleting, the key that is handed
// out works at any moment, and two ticks later the account has exactly the keys that the entry names.
func TestStaticFaults(t *testing.T) {
	for name, test := range staticFaults {
		t.Run(name, func(t *testing.T) {
			vaultsim.EveryStep(t, test.enough, func(t *testing.T, fault vaultsim.StepFault, at int) (reached bool) {
				e := newConfiguredEnv(t)
				account := e.static("1h", nil)
				data := test.set(e, account)
				before := e.stored().Key.APIKeyID
				stranger := e.sim.AddKey(ours, account, "vault-gw-"+newSuffix("zzzzzz", time.Now()))
				another := e.sim.AddKey(ours, account, "gateway")
				works := func() {
					r := e.stored()
					failIf(t, r.exists() && !e.sim.Use(r.Key.Value), "a key is handed out that does not work")
				}
				reached = e.AtStep(fault, at, works, func(ctx context.Context) {
					resp, err := e.DoContext(ctx, test.op, test.path, data)
					e.quiet()
					done := test.op == logical.UpdateOperation && vaultsim.Failure(resp, err) == nil
					failIf(t, done && e.stored().Key.APIKeyID == before, "no error, and the key is as before: %v", resp)
				})
				works()
				time.Sleep(time.Minute)
				e.Run(2 * time.Minute)
				e.quiet()
				for _, id := range []string{stranger, another} {
					same(e.t, "another's key is there", e.sim.Names(ours)[id] != "", true)
					l := lease{ProjectID: ours, APIKeyID: id, KeyOnly: true}
					e.NoError(e.b().revokeAtOpenAI(t.Context(), e.Storage, &l))
				}
				exists := e.exactly(account, "two ticks later")
				names := e.Must("list static-roles/", nil).Data["keys"]
				resp, err := e.Do(logical.ReadOperation, "static-creds/gw", nil)
				same(e.t, "listed", names != nil, exists)
				same(e.t, "read", vaultsim.Failure(resp, err) == nil, exists)
				e.OK("static-roles/gw", staticRoleOn(account, "3h"))
				time.Sleep(lostTime)
				e.Run(61 * time.Minute)
				e.quiet()
				e.exactly(account, "a day later")
				same(e.t, "names that are looked for", len(e.stored().Creating), 0)
				return reached
			})
		})
	}
}

// TestStaticLate: OpenAI carries a lost creation out when it likes: within 75 minutes the key is gone, and never an
// account that has its name; also where a pass takes more than a minute, so that every other tick finds it under way.
func TestStaticLate(t *testing.T) {
	type row struct {
		late int // minutes
		long bool
	}
	inBubbles(t, map[string]row{"1m": {1, false}, "11m": {11, false}, "20h": {1200, false}, "long": {30, true}},
		func(t *testing.T, e *env, tt row) {
			account := e.static("30d", nil)
			time.Sleep(30 * time.Second)
			e.rotateMeets(fault{Late: time.Duration(tt.late) * time.Minute})
			other := e.sim.AddServiceAccount(ours, e.stored().Creating[0].Name, "member")
			for minute := range tt.late + 75 {
				if minute == tt.late {
					e.Restart()
				}
				if tt.long && minute%2 == 0 {
					e.b().staticMu.Lock()
					e.Run(time.Minute)
					e.b().staticMu.Unlock()
				} else {
					e.Run(time.Minute)
					e.quiet()
				}
			}
			e.exactly(account, "later")
			same(e.t, "names", len(e.stored().Creating), 0)
			same(e.t, "another's account is there", e.sim.Names(ours)[other] != "", true)
		})
}

// TestStaticLost: a name that is looked for is counted in lost_creates, also when its role is deleted, until its key is
// found or, where OpenAI's answers have no Date, two days have passed.
func TestStaticLost(t *testing.T) {
	inBubbles(t, map[string]bool{"made": true, "not made": false}, func(t *testing.T, e *env, made bool) {
		account := e.static("30d", nil)
		e.sim.SetDate("none")
		e.rotateMeets(fault{Kind: "close", Process: made})
		e.sim.Inject(fault{Method: "GET", Path: "/api_keys", Status: 503, Times: -1})
		e.Must("delete static-roles/gw", nil)
		e.Run(47 * time.Hour)
		same(e.t, "static roles", e.Must("list static-roles/", nil).Data["keys"], nil)
		same(e.t, "lost creates", e.metric("lost_creates"), 1)
		e.sim.ClearFaults()
		e.Run(59 * time.Minute)
		same(e.t, "lost creates, where OpenAI lists its keys", e.metric("lost_creates") == 1.0, !made)
		e.Run(65 * time.Minute)
		same(e.t, "lost creates in the end", e.metric("lost_creates"), 0)
		same(e.t, "there is a role", e.exactly(account, "in the end"), false)
		same(e.t, "entries", e.Storage.Keys(staticPrefix), "[]")
	})
}

// TestStaticChanges: at no time does a reader get a key that has expired, whatever is written, and when nobody looks
// for a day. A write that changes nothing makes no key; one that changes something does at once.
func TestStaticChanges(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		account := e.static("12h", nil)
		run := func(hours int, when string) {
			t.Helper()
			for range hours * 6 {
				e.Run(10 * time.Minute)
				e.reads(when)
			}
			e.quiet()
			e.exactly(account, when)
		}
		for _, data := range []fields{
			{"rotation_period": "3d"}, {"rotation_period": "30m", "overlap": "10m"}, {"overlap": "29m"},
			{"rotation_period": 0, "rotation_schedule": "0 3 * * *"}, {"overlap": "20h"},
			{"rotation_schedule": "0 1,2,23 * * 1-5", "overlap": 0}, {"scopes": "api.all.read"},
			{"rotation_period": "100d", "rotation_schedule": ""}, {"rotation_period": "1m", "overlap": "50s"},
		} {
			before := e.reads("before")
			e.OK("static-roles/gw", data)
			same(e.t, fmt.Sprint("a new key at once for ", data), e.reads("at once") != before, true)
			e.sim.ResetCalls()
			e.OK("static-roles/gw", data)
			same(e.t, "calls of a write that changes nothing", len(e.sim.Calls()), 0)
			run(50, fmt.Sprint(data))
			time.Sleep(24 * time.Hour) // nobody looks
			e.reads(fmt.Sprint("after a day without ticks: ", data))
			run(2, "made up for")
			same(e.t, "overdue", e.metric("static_rotations_overdue"), 0)
		}
	})
}

// TestStaticOutage: OpenAI is away for an hour when a rotation is due. Readers have a key that works; then there is one
// rotation. Where it never comes back, the key is not handed out once it has expired, until it has been replaced.
func TestStaticOutage(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		account := e.static("2h", nil)
		first := e.reads("at first")
		e.Run(119 * time.Minute)
		e.sim.Fail("", "", 503)
		for range 60 {
			e.Run(time.Minute)
			same(e.t, "key", e.reads("while OpenAI is away"), first)
		}
		e.sim.ClearFaults()
		e.sim.ResetCalls()
		e.Run(10 * time.Minute)
		e.quiet()
		same(e.t, "keys made", e.sim.CountCalls("POST", "api_keys"), 1)
		e.exactly(account, "afterwards")
		e.sim.Fail("POST", "", 403)
		e.Run(28*time.Hour + 50*time.Minute)
		e.reads("a moment before it expires")
		e.Run(10 * time.Minute)
		_, err := e.Do(logical.ReadOperation, "static-creds/gw", nil)
		e.Fails("an expired key", err, "expired")
		e.sim.ClearFaults()
		e.Run(time.Hour)
		e.exactly(account, "in the end")
	})
}

// TestStaticLimit: a third replaced key is refused, until overlap has passed, and so is a key beside 50 lost ones. A
// write of overlap=0 is not, and ends them all; then 1,000 lost ones are the limit. What is refused is not counted.
func TestStaticLimit(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		account := e.static("24h", nil)
		e.OK("rotate-role/gw", nil)
		time.Sleep(30 * time.Minute)
		e.OK("rotate-role/gw", nil)
		e.Unchanged("refused", func() { e.Refused("rotate-role/gw", nil, "overlap") })
		same(e.t, "rotations", e.metric("static_rotations_total"), `map[role="gw",result="success":3]`)
		e.Run(31 * time.Minute)
		e.OK("rotate-role/gw", nil)
		same(e.t, "former keys", len(e.stored().Former), 2)
		e.OK("static-roles/gw", fields{"overlap": 0})
		e.exactly(account, "ended")
		same(e.t, "former keys", len(e.stored().Former), 0)
		e.OK("static-roles/gw", fields{"overlap": "1h"})
		e.NoError(changeStatic(t.Context(), e.Storage, "gw", func(r *staticRole) error {
			lost := creatingKey{"x", "org-former", ours, time.Now()}
			r.Creating = slices.Repeat([]creatingKey{lost}, maxCreating)
			return nil
		}))
		e.Refused("rotate-role/gw", nil, "50 lost")
		before := e.reads("before")
		e.OK("static-roles/gw", fields{"overlap": 0})
		same(e.t, "a new key beside 50 lost ones", e.reads("then") != before, true)
		e.NoError(changeStatic(t.Context(), e.Storage, "gw", func(r *staticRole) error {
			r.Creating = slices.Repeat(r.Creating[:1], maxLost-1)
			return nil
		}))
		e.sim.Fail("POST", "/api_keys", 500)
		for range 5 {
			_, _ = e.Write("rotate-role/gw", nil)
		}
		same(e.t, "names, where overlap is 0", len(e.stored().Creating), maxLost)
	})
}

// TestStaticStop: after a leak, overlap=0 and a delete end the keys at once, though a lost creation is to be looked for
// and OpenAI lists no keys. Where it deletes none either, the answer comes in half a minute and names each: a warning
// of the write, and an error of the delete, after which nobody should disable the mount.
func TestStaticStop(t *testing.T) {
	for _, request := range []string{"update static-roles/gw", "delete static-roles/gw"} {
		inBubbles(t, map[string]fault{
			"list hangs":     {Method: "GET", Kind: "hang"},
			"list limited":   {Method: "GET", Status: 429},
			"deletion hangs": {Method: "DELETE", Kind: "hang"},
			"deletion fails": {Method: "DELETE", Status: 503},
		}, func(t *testing.T, e *env, f fault) {
			account := e.static("24h", fields{"overlap": "12h"})
			first := e.reads("at first")
			e.OK("rotate-role/gw", nil)
			second := e.reads("then")
			e.rotateMeets(fault{Kind: "close", Process: true})
			var left []string
			if f.Method == "DELETE" {
				left = []string{e.stored().Former[0].APIKeyID, e.stored().Key.APIKeyID}
			}
			f.Path, f.Times = "/api_keys", -1
			e.sim.Inject(f)
			start := time.Now()
			resp, err := e.Request(request, fields{"overlap": 0})
			if left != nil && strings.HasPrefix(request, "delete") {
				e.Refusal(resp, err, append(left, "the static role is deleted")...)
			} else {
				e.NoError(vaultsim.Failure(resp, err))
				e.Warned(request, resp, len(left), left...)
			}
			failIf(t, time.Since(start) > 30*time.Second, "answered after %s, want 30 s", time.Since(start))
			same(e.t, "works", fmt.Sprint(e.sim.Use(first), e.sim.Use(second)), fmt.Sprint(left != nil, left != nil))
			e.sim.ClearFaults()
			e.Run(3 * time.Minute)
			e.quiet()
			same(e.t, "works then", fmt.Sprint(e.sim.Use(first), e.sim.Use(second)), "false false")
			same(e.t, "there is a role", e.exactly(account, "then"), request == "update static-roles/gw")
		})
	}
}

// TestStaticOverlap: a replaced key works until overlap has passed or until its own expiry, whichever is earlier.
func TestStaticOverlap(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		account := e.static("2m", nil) // with keys that expire after a day and five minutes
		first := e.reads("at first")
		e.OK("static-roles/gw", fields{"rotation_period": "60d", "overlap": "30d"})
		e.Run(24 * time.Hour)
		same(e.t, "the first key works for a day", e.sim.Use(first), true)
		e.Run(10 * time.Minute)
		same(e.t, "and is not named when it has expired", len(e.stored().Former), 0)
		e.exactly(account, "afterwards")
	})
}

// TestStaticClock: keys are rotated, and readers have one that works, also where the clock was 80 days ahead at the
// last rotations, or is set back by two days.
func TestStaticClock(t *testing.T) {
	const days = 24 * time.Hour
	type row struct {
		former             int
		ahead, back, until time.Duration
	}
	inBubbles(t, map[string]row{
		"ahead, one former":  {1, 80 * days, 0, 30 * time.Hour},
		"ahead, two formers": {2, 80 * days, 0, 30 * time.Hour},
		"set back":           {1, 2 * days, 2 * days, 5 * time.Minute},
	}, func(t *testing.T, e *env, tt row) {
		account := e.static("1h", nil)
		for range tt.former {
			e.OK("rotate-role/gw", nil)
		}
		e.NoError(changeStatic(t.Context(), e.Storage, "gw", func(r *staticRole) error {
			r.LastRotatedTime, r.Key.Expires = r.LastRotatedTime.Add(tt.ahead), r.Key.Expires.Add(tt.back)
			for i := range r.Former {
				r.Former[i].Until = r.Former[i].Until.Add(tt.ahead)
			}
			return nil
		}))
		e.sim.Advance(tt.back)
		e.Run(tt.until)
		e.quiet()
		e.exactly(account, "then")
		same(e.t, "rotated in time", !e.stored().LastRotatedTime.After(time.Now()), true)
		same(e.t, "overdue", e.metric("static_rotations_overdue"), 0)
		e.OK("static-roles/gw", fields{"overlap": 0})
		e.exactly(account, "ended")
	})
}

// TestStaticByHand: a rotation by hand works also when schedule and overlap would be refused at this time of the year.
// What names a field that a path does not have, like ttl, is not refused.
func TestStaticByHand(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		time.Sleep(150 * 24 * time.Hour)
		data := staticRoleOn(e.sim.AddServiceAccount(ours, "gateway", "member"), "0")
		data["rotation_schedule"], data["overlap"], data["ttl"] = "0 0 1 1,2 *", "30d", 0
		e.OK("static-roles/gw", data)
		time.Sleep(3 * 365 * 24 * time.Hour)
		e.Refused("static-roles/gw", fields{"scopes": "api.all.read"}, "365 days")
		e.OK("rotate-role/gw", fields{"ttl": "0s"})
		e.reads("rotated by hand")
	})
}

// TestStaticNodes: while a node makes a key, another one looks for lost keys, rotates, deletes or writes as well. What
// it was told holds.
func TestStaticNodes(t *testing.T) {
	inBubbles(t, map[string]logical.Request{
		"looks":   {Operation: logical.RollbackOperation},
		"rotates": {Operation: logical.UpdateOperation, Path: "rotate-role/gw"},
		"deletes": {Operation: logical.DeleteOperation, Path: "static-roles/gw"},
		"writes":  {Operation: logical.UpdateOperation, Path: "static-roles/gw"},
	}, func(t *testing.T, e *env, req logical.Request) {
		account, other := e.static("24h", nil), newBackend(e.sim.Transport(), e.b().mountID)
		e.NoError(other.Setup(t.Context(), &logical.BackendConfig{System: e.System}))
		defer other.Cleanup(t.Context())
		req.Storage = e.Storage
		for second := range 22 {
			e.sim.SetLatency(20 * time.Second) // of which OpenAI has the key after half
			var group sync.WaitGroup
			group.Go(func() { _, _ = e.Write("rotate-role/gw", nil) })
			time.Sleep(time.Duration(second)*time.Second + time.Millisecond)
			e.sim.SetLatency(0)
			overlap := time.Duration(1000+second) * time.Second
			req.Data = fields{"overlap": overlap.String()} // which only a write takes
			resp, err := other.HandleRequest(t.Context(), &req)
			group.Wait()
			e.Run(3 * time.Minute)
			e.quiet()
			e.exactly(account, fmt.Sprint("after second ", second))
			same(e.t, "deleted", !e.stored().exists(), req.Operation == logical.DeleteOperation)
			if req.Path == "static-roles/gw" && req.Operation == logical.UpdateOperation {
				e.NoError(vaultsim.Failure(resp, err))
				same(e.t, "overlap", e.stored().Overlap, overlap)
			}
			e.Run(2 * time.Hour)
			e.OK("static-roles/gw", staticRoleOn(account, "24h"))
		}
	})
}

// TestStaticHang: a role whose project hangs does not keep the others from being rotated in time.
func TestStaticHang(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.static("1h", nil)
		e.sim.AddProject("proj_hang", "hangs")
		for i := range 5 {
			data := staticRoleOn(e.sim.AddServiceAccount("proj_hang", "x", "member"), "1h")
			data["project_id"] = "proj_hang"
			e.OK(fmt.Sprint("static-roles/hang", i), data)
		}
		e.sim.Inject(fault{Path: "proj_hang", Kind: "hang", Times: -1})
		first := e.reads("at first")
		e.Run(64 * time.Minute)
		same(e.t, "rotated", e.reads("then") != first, true)
		e.Restart() // ends what hangs
	})
}

// TestStaticTurns: rotations whose turn at the rate limit does not come leave no name to look for. A
// client that deletes a role meanwhile and leaves before the role's lock is free has it deleted all the same.
func TestStaticTurns(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		account := e.static("1h", nil)
		for i := range 5 {
			other := e.sim.AddServiceAccount(ours, "other", "member")
			e.OK(fmt.Sprint("static-roles/other", i), staticRoleOn(other, "1h"))
		}
		e.Run(time.Hour - time.Second)
		e.sim.Fail("POST", "/api_keys", 429)
		e.Run(10 * time.Minute)
		e.quiet()
		same(e.t, "lost creates", e.metric("lost_creates"), 0)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := e.DoContext(ctx, logical.DeleteOperation, "static-roles/gw", nil)
		e.Fails("a delete whose client has left", err, "cancel")
		e.Run(2 * time.Minute)
		e.quiet()
		same(e.t, "there is a role", e.exactly(account, "then"), false)
	})
}

// TestStaticRetry: a write of config ends the backoff also of a rotation that hangs meanwhile.
func TestStaticRetry(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.static("1h", nil)
		first := e.reads("at first")
		e.sim.Fail("POST", "/api_keys", 503)
		e.Run(3 * time.Hour) // now there is an hour between tries
		e.quiet()
		e.sim.ClearFaults()
		e.sim.ResetCalls()
		e.sim.Inject(fault{Method: "POST", Path: "/api_keys", Kind: "hang"})
		for e.sim.CountCalls("POST", "/api_keys") == 0 {
			e.Tick()
			time.Sleep(time.Second)
		}
		e.configure(nil)
		e.Run(3 * time.Minute)
		same(e.t, "rotated", e.reads("then") != first, true)
	})
}

// TestStaticStorage: a storage that fails is an error, and nothing is left at OpenAI that the entry does not name.
func TestStaticStorage(t *testing.T) {
	for _, verb := range []string{"get", "put", "list", "delete"} {
		inBubble(t, func(t *testing.T, e *env) {
			account := e.static("1h", nil)
			e.Storage.Fail(verb, staticPrefix)
			for text, verbs := range map[string]string{"read static-creds/gw": "get", "read static-roles/gw": "get",
				"list static-roles/": "get list", "read metrics": "get list", "update rotate-role/gw": "get put"} {
				resp, err := e.Request(text, nil)
				same(e.t, text+" fails", vaultsim.Failure(resp, err) != nil, strings.Contains(verbs, verb))
			}
			e.Run(2 * time.Hour)
			e.Storage.SetFault(nil)
			e.Run(65 * time.Minute)
			e.quiet()
			e.exactly(account, "afterwards")
		})
	}
}

// TestStaticSecrets: the key is in the answers of static-creds only, and in storage only where it is seal-wrapped.
// Answers fit their schemas, and README names the changes that are reported.
func TestStaticSecrets(t *testing.T) {
	e := newConfiguredEnv(t)
	account := e.static("1h", fields{"scopes": "api.all.read"})
	for _, tt := range (requests{
		{"update static-roles/gw", fields{"overlap": "5m"}}, {"update rotate-role/gw", nil},
		{"read static-roles/gw", nil}, {"list static-roles/", nil}, {"read static-creds/gw", nil},
		{"update static-roles/gw", fields{"rotation_period": 0, "rotation_schedule": "0 3 * * *", "overlap": 0}},
		{"read metrics", nil}, {"read static-creds/gw", nil},
	}) {
		resp, err := e.Request(tt.request, tt.data)
		same(t, tt.request, vaultsim.Failure(resp, err), nil)
		op, path, _ := strings.Cut(tt.request, " ")
		schema.ValidateResponse(t, schema.GetResponseSchema(t, e.b().Route(path), logical.Operation(op)), resp, true)
		shown := resp != nil && strings.Contains(fmt.Sprint(resp.Data), "sk-")
		same(t, tt.request+" has a key", shown, path == "static-creds/gw")
	}
	for key, text := range e.Storage.All() {
		wrapped := slices.ContainsFunc(e.b().PathsSpecial.SealWrapStorage, func(s string) bool {
			return key == s || strings.HasSuffix(s, "/") && strings.HasPrefix(key, s)
		})
		same(t, key+" holds a key and is not seal-wrapped", strings.Contains(text, "sk-") && !wrapped, false)
	}
	e.Must("delete static-roles/gw", nil)
	e.exactly(account, "deleted")
	readme, err := os.ReadFile("README.md")
	for _, change := range []string{"static-rotate", "static-role-delete"} {
		same(t, change+" in the log", strings.Contains(e.Log.String(), change), true)
		same(t, change+" in README", strings.Contains(string(readme), "`openai/"+change+"`"), err == nil)
	}
}

// TestStaticTidy: tidy deletes neither a key that an entry names, however old, nor the account, also if the role is
// written while it looks.
func TestStaticTidy(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		ids := e.ended(ours, 1, time.Hour) // an account with the mount's tag that is past its end
		e.OK("static-roles/gw", staticRoleOn(ids[0], "1h"))
		time.Sleep(10 * 24 * time.Hour) // without a tick, so that the key is past its end too
		e.tidy(nil, fields{"deleted": 0, "failed": 0})
		same(e.t, "keys after tidy", len(e.sim.ProjectKeys(ours)), 1)
		e.Storage.Fail("get", staticPrefix)
		e.tidy(nil, fields{"deleted": 0, "failed": 2}) // the key and the account
		e.Storage.SetFault(nil)
	})
	inBubble(t, func(t *testing.T, e *env) {
		ids := e.ended(ours, 30, time.Hour)
		e.sim.SetLatency(2 * time.Second)
		var group sync.WaitGroup
		group.Go(func() { _, _ = e.Write("tidy", nil) })
		time.Sleep(10 * time.Second)
		left := slices.DeleteFunc(ids, func(id string) bool { return e.sim.Names(ours)[id] == "" })
		same(e.t, "tidy is at work", len(left) > 0 && len(left) < 30, true)
		e.OK("static-roles/gw", staticRoleOn(left[len(left)-1], "1h"))
		group.Wait()
		e.quiet()
		e.sim.SetLatency(0)
		e.reads("after tidy")
		e.have(1, 1, "after tidy")
	})
}

// TestStaticBadInput: a wrong value is a 400 that names the field; what OpenAI refuses is, too; nothing is stored. What
// is refused without OpenAI is not counted, nor are rotations of a role that has never been there.
func TestStaticBadInput(t *testing.T) {
	e := newConfiguredEnv(t)
	account := e.sim.AddServiceAccount(ours, "gateway", "none")
	valid := staticRoleOn(account, "1h")
	bads := vaultsim.Bads
	e.RefusesAll("static-roles/gw", valid, slices.Concat(bads("project_id", "required", nil),
		bads("rotation_schedule", "time zone", "TZ="),
		bads("service_account_id", "required", nil), bads("rotation_period", "1m", nil, "59s"),
		bads("rotation_period", "365 days", "364d", "106751d"), bads("overlap", "less than", "1h"),
		bads("rotation_schedule", "exclu", "0 3 * * *"), bads("service_account_id", "letters", "../x"),
		bads("project_id", "letters", "a/b"),
		bads("scopes", "names", "Bad Scope", "a,b c", strings.Repeat("x", 200)),
		bads("overlap", "take this", badDurations...), bads("rotation_period", "take this", badDurations...)))
	e.Warned("an account without a role", e.OK("static-roles/other", valid), 1, "no role")
	leapDay, elsewhere := staticRoleOn(account, "0"), staticRoleOn(account, "1h")
	leapDay["rotation_schedule"], elsewhere["project_id"] = "0 0 29 2 *", "proj_no"
	e.Refused("static-roles/third", leapDay, "365 days")
	e.Unchanged("refused by OpenAI", func() {
		e.Refused("static-roles/third", elsewhere, "project_id")
		e.Refused("static-roles/gw", fields{"service_account_id": "svc_acct_no"}, "service_account_id")
		e.sim.Inject(fault{Method: "POST", Status: http.StatusBadRequest, Times: 2})
		for path, data := range map[string]fields{"static-roles/third": valid, "rotate-role/gw": nil} {
			resp, err := e.Write(path, data)
			e.Refusal(resp, err, "creating API key")
		}
		e.sim.SetMaxKeyLife(86400)
		resp, err := e.Write("static-roles/third", valid)
		e.Refusal(resp, err, "ttl and max_ttl", "static role less time between rotations and a lower overlap")
	})
	e.Must("delete config", nil)
	e.Refused("rotate-role/gw", nil, "config")
	same(t, "rotations", e.metric("static_rotations_total"), `map[role="gw",result="failure":1 `+
		`role="gw",result="success":1 role="other",result="success":1]`)
}

// past returns a name of the mount whose end has passed for so long.
func (e *env) past(since time.Duration) string {
	return "web-" + newSuffix(e.b().mountID, time.Now().Add(-since))
}

// ended makes n accounts with such names at OpenAI, and returns their ids.
func (e *env) ended(project string, n int, since time.Duration) (ids []string) {
	for range n {
		ids = append(ids, e.sim.AddServiceAccount(project, e.past(since), "member"))
	}
	return ids
}

// look makes one tick, which must not take time, and waits for what it has begun.
func (e *env) look() {
	e.t.Helper()
	start := time.Now()
	e.Tick()
	same(e.t, "time of a tick", time.Since(start), 0*time.Second)
	e.quiet()
}

// tidied checks fields of an answer of tidy.
func (e *env) tidied(resp *logical.Response, want fields) {
	e.t.Helper()
	for field, value := range want {
		same(e.t, field, resp.Data[field], value)
	}
}

// tidy runs a pass by hand and checks fields of its answer.
func (e *env) tidy(data, want fields) *logical.Response {
	e.t.Helper()
	resp := e.OK("tidy", data)
	e.tidied(resp, want)
	return resp
}

// loses reads a credential which OpenAI makes, but whose answer is lost.
func (e *env) loses() {
	e.t.Helper()
	e.sim.Inject(fault{Method: "POST", Process: true})
	_, err := e.Issue("creds/web", nil)
	e.Fails("a lost create", err, "500")
}

// tidyFault is something that can leave an account or key at OpenAI.
type tidyFault struct {
	name string
	lost bool          // the plugin sees a create fail, and looks for it
	late time.Duration // after this OpenAI carries the create out
	meet func(e *env, before *vaultsim.Snapshot)
}

// lostPOST is a create whose answer is lost; late: OpenAI carries it out later, 0: at once.
func lostPOST(name, path string, late time.Duration) tidyFault {
	return tidyFault{name, late <= 2*time.Minute, late, func(e *env, _ *vaultsim.Snapshot) {
		e.sim.Inject(fault{Method: "POST", Path: path, Kind: "close", Process: true, Late: late})
		_, _ = e.Issue("creds/web", nil)
	}}
}

// killed is a create after whose first POST a process ends, without that anything else is done.
func killed(name string, kill func(e *env)) tidyFault {
	return tidyFault{name: name, meet: func(e *env, _ *vaultsim.Snapshot) {
		issue := func(ctx context.Context) { _, _ = e.IssueContext(ctx, "creds/web", nil) }
		e.AtStep(vaultsim.StepFault{Effect: true, All: true}, 2, nil, issue)
		kill(e)
	}}
}

var tidyFaults = []tidyFault{
	{name: "dropped answer", meet: func(e *env, _ *vaultsim.Snapshot) {
		e.DropNext()
		_, _ = e.Issue("creds/web", nil)
	}},
	lostPOST("lost answer", "(service_accounts|api_keys)$", 0),
	lostPOST("lost answer of a key", "api_keys$", 0),
	lostPOST("POST late by 2m", "(service_accounts|api_keys)$", 2*time.Minute),
	lostPOST("POST of a key late by 2m", "api_keys$", 2*time.Minute),
	lostPOST("POST late by 1h", "(service_accounts|api_keys)$", time.Hour),
	lostPOST("POST late by a day", "(service_accounts|api_keys)$", 24*time.Hour),
	killed("plugin killed", func(e *env) { e.Crash() }),
	killed("Vault killed", func(e *env) { e.CrashVault() }),
	{name: "snapshot of before the issue", meet: func(e *env, _ *vaultsim.Snapshot) {
		before := e.Snapshot()
		e.lease("web")
		e.Restore(before)
	}},
	{name: "snapshot of before the role", meet: func(e *env, before *vaultsim.Snapshot) {
		e.lease("web")
		e.Restore(before)
	}},
	{name: "revocation handed over", meet: func(e *env, _ *vaultsim.Snapshot) {
		e.lease("web")
		e.sim.Fail("DELETE", "projects", 403)
		e.Run(2 * time.Hour) // it ends in the middle
		e.sim.ClearFaults()
		same(e.t, "handed over", e.metric("revocations_handed_over_total"), 1)
		same(e.t, "leases", len(e.Leases()), 0)
	}},
	{name: "mount disabled in trouble", meet: func(e *env, _ *vaultsim.Snapshot) {
		e.lease("web")
		e.sim.Fail("DELETE", "projects", 403)
		tag := e.b().mountID
		e.ForceDisable()
		e.sim.ClearFaults()
		other := newEnvOn(e.t, e.sim)
		other.configure(nil)
		other.tidy(fields{"mount_id": tag}, fields{"deleted": 0})
		other.Run(75 * time.Minute)
		other.quiet()
		same(e.t, "something was deleted", other.tidy(fields{"mount_id": tag}, nil).Data["deleted"].(int) > 0, true)
	}},
}

// TestTidyFaults: whatever fault befalls a credential of whatever kind of role, no account or key is there 75 minutes
// after its end or, if OpenAI made it later, after that. The process that saw a create fail finds it within four ticks.
func TestTidyFaults(t *testing.T) {
	for kind, data := range map[string]fields{
		"own account": {}, "scoped": {"scopes": "api.responses.write"}, "key": {},
	} {
		for i, fault := range append(tidyFaults, tidyFaults...) {
			expiry := i < len(tidyFaults)
			t.Run(fmt.Sprintf("%s/%s/expiry %v", fault.name, kind, expiry), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					e := newEnv(t)
					e.configure(nil)
					before := e.Snapshot()
					role := fields{"project_id": ours, "ttl": "1h", "max_ttl": "1h", "enforce_key_expiry": expiry}
					maps.Copy(role, data)
					if shared := e.crowd(500); kind == "key" {
						role["service_account_id"] = shared
						for range 500 {
							e.sim.AddKey(ours, shared, "other")
						}
					}
					e.OK("roles/web", role)
					others := len(e.sim.Names(ours))
					left := func() int { return len(e.sim.Names(ours)) - others }
					end := time.Now().Add(time.Hour + 3*time.Minute) // a request, a minute of grace, whole minutes

					fault.meet(e, before)
					if fault.lost && len(e.Leases()) == 0 {
						e.Run(4 * time.Minute)
						same(t, "accounts and keys after four ticks", left(), 0)
					} else if fault.late == 0 && time.Now().Before(end) && left() == 0 {
						t.Error("the fault left nothing, so that this shows nothing")
					}
					e.Run(max(fault.late, time.Until(end)) + 75*time.Minute)
					same(t, "accounts and keys, leases, clean-up entries",
						fmt.Sprint(left(), len(e.Leases()), len(e.Storage.Keys(cleanupPrefix))), "0 0 0")
				})
			})
		}
	}
}

// crowd makes n accounts of other people, and returns the id of the last one.
func (e *env) crowd(n int) (id string) {
	for i := range n {
		id = e.sim.AddServiceAccount(ours, fmt.Sprint("other-", i), "member")
	}
	return id
}

// world is a mount to which random things happen, and which fails the test when it deletes what it must not.
type world struct {
	*env
	r       *rand.Rand
	tag     string
	max     map[string]time.Duration // max_ttl by role
	others  int                      // accounts and keys that other people made
	offset  time.Duration            // of OpenAI's clock
	running atomic.Bool              // Vault revokes leases at their end

	mu      sync.Mutex
	held    map[string]*held // by the id of what its revocation deletes
	deleted int              // things that were there
}

// held is a lease that was issued.
type held struct {
	*vaultsim.Lease
	role    string
	until   time.Time // it can live until then
	revoked bool      // its revocation has begun
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{env: newConfiguredEnv(t), r: rand.New(rand.NewPCG(seed, 0))}
	w.max, w.held = map[string]time.Duration{}, map[string]*held{}
	w.tag, w.others = w.b().mountID, 1
	w.sim.AddProject("proj_b", "B")
	w.edit("web", fields{"service_account_name_template": "{{.RandomSuffix}}x{{.DisplayName}}"})
	w.edit("scoped", fields{"scopes": "api.responses.write", "service_account_name_template": "{{.DisplayName}}"})
	shared := w.sim.AddServiceAccount("proj_b", "shared", "member")
	w.edit("key", fields{"project_id": "proj_b", "service_account_id": shared})
	w.Wire.BeforeEach(func(_ int, req *http.Request) {
		if req.Method == "DELETE" {
			w.judge(path.Base(req.URL.Path))
		}
	})
	return w
}

// made tells whether the mount has asked OpenAI for a thing of this name.
func (w *world) made(name string) bool { return w.Wire.HasSent(`"name":"` + name + `"`) }

// judge fails the test if the mount must not delete what has this id.
func (w *world) judge(id string) {
	name, there := w.sim.Names(ours, "proj_b")[id]
	if !there {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deleted++
	h, now := w.held[id], time.Now()
	switch {
	case !w.made(name):
		w.t.Errorf("DELETE of %q, which this mount (%s) has not made", name, w.tag)
	case h != nil && (h.revoked || w.running.Load() && !h.Expires.After(now)):
		h.revoked = true // by Vault, at its end
	case h != nil && (now.Before(h.until) || now.Add(w.offset).Before(h.until)):
		w.t.Errorf("DELETE of %q at %v (OpenAI: %v), under a lease until %v", name, now, now.Add(w.offset), h.until)
	default:
		for key, value := range w.Storage.All() {
			failIf(w.t, strings.HasPrefix(key, rolePrefix) && strings.Contains(value, `"`+id+`"`),
				"DELETE of %q, which %s names", name, key)
		}
	}
}

// edit writes a role with a random max_ttl.
func (w *world) edit(role string, data fields) {
	hours := pick(w.r, []int{1, 3, 12, 24, 48})
	if w.max[role] == 0 && data["project_id"] == nil {
		data["project_id"] = ours
	}
	data["ttl"], data["max_ttl"] = "30m", fmt.Sprintf("%dh", hours)
	if resp, err := w.Write("roles/"+role, data); vaultsim.Failure(resp, err) == nil { // else its account is gone
		w.max[role] = time.Duration(hours) * time.Hour
	}
}

func (w *world) issue() {
	role := pick(w.r, slices.Sorted(maps.Keys(w.max)))
	l, err := w.Issue("creds/"+role, fields{"ttl": pick(w.r, []string{"5m", "30m", "1h"})})
	if err != nil {
		return // the clock is behind, or the answer was to be lost
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.held[idOf(l)] = &held{Lease: l, role: role, until: time.Now().Add(w.max[role] + max(0, w.offset))}
}

// idOf returns the id of what a lease's revocation deletes.
func idOf(l *vaultsim.Lease) string {
	field := map[bool]string{false: "service_account_id", true: "api_key_id"}[strings.HasPrefix(l.Path, "creds/key")]
	return l.Data[field].(string)
}

// change renews or revokes a lease.
func (w *world) change(revoke bool) {
	leases := w.Leases()
	if len(leases) == 0 {
		return
	}
	l := pick(w.r, leases)
	w.mu.Lock()
	h := w.held[idOf(l)]
	h.revoked = h.revoked || revoke
	w.mu.Unlock()
	if revoke {
		if w.r.IntN(3) == 0 {
			w.sim.Fail("DELETE", "", 403)
		}
		_ = w.Revoke(l)
		w.sim.ClearFaults()
		return
	}
	w.edit(h.role, fields{})
	for range pick(w.r, []int{1, 1, 1, 8}) {
		_ = w.Renew(l, 0) // OpenAI's clock may be past the key's end
		w.mu.Lock()
		h.until = h.until.Add(max(0, l.Expires.Sub(h.until)))
		w.mu.Unlock()
		w.run(w.r.IntN(28))
	}
}

// suffix is one of a tag, with an end that has passed or not. Its own end never makes "sk-", like a key.
func (w *world) suffix(tag string) string {
	return newSuffix(tag, time.Now().Add(time.Duration(w.r.IntN(100)-90)*time.Hour))[:suffixLength-1] + "a"
}

// stranger makes an account with a key of other people, with a name that is like those of this mount.
func (w *world) stranger() {
	other := w.suffix(pick(w.r, []string{"abcdef", mountID("other"), w.tag[1:] + "a"}))
	past := newSuffix(w.tag, time.Now().Add(-90*time.Hour))
	name := pick(w.r, []string{
		"web-" + other, "web-" + past + "-" + other, "web-" + past + "-2", "web-" + past + "x", "web" + past,
		"web-" + strings.ToUpper(past), past, "-" + past + "-", "web-" + past[:len(past)-1],
	})
	project := pick(w.r, []string{ours, "proj_b"})
	w.sim.AddKey(project, w.sim.AddServiceAccount(project, name, "member"), name)
	w.others += 2
}

// name makes a role name an account that this mount has made.
func (w *world) name() {
	others := func(a openaisim.ServiceAccount) bool { return !w.made(a.Name) }
	if accounts := slices.DeleteFunc(w.sim.ServiceAccounts(ours), others); len(accounts) > 0 {
		w.edit("key-on-ours", fields{"service_account_id": pick(w.r, accounts).ID})
	}
}

// jump sets this machine's clock ahead or, which the bubble shows as OpenAI's being ahead, back.
func (w *world) jump(d time.Duration) {
	time.Sleep(d) // not if it is negative
	w.sim.Advance(-d)
	w.offset -= d
	w.look()
	w.OK("tidy", nil)
}

// run lets Vault work, and then looks twice what is to be deleted: at a tick and by hand.
func (w *world) run(minutes int) {
	w.running.Store(true)
	w.Run(time.Duration(minutes) * time.Minute)
	w.quiet()
	w.running.Store(false)
	w.look()
	w.OK("tidy", nil)
}

func (w *world) step() {
	hours := time.Duration(1+w.r.IntN(100)) * time.Hour
	run, renew := func() { w.run(w.r.IntN(300)) }, func() { w.change(false) }
	clock := func() { w.jump(pick(w.r, []time.Duration{hours, -hours, w.offset, w.offset})) }
	pick(w.r, []func(){
		w.issue, w.issue, w.issue, w.issue, w.issue, w.issue, run, run, run, clock, clock, renew, renew, w.stranger,
		w.stranger, w.name,
		func() { w.change(true) },
		func() { w.edit(pick(w.r, slices.Sorted(maps.Keys(w.max))), fields{}) },
		// config's is dropped if no credential is made
		func() { w.DropNext(); w.issue(); _, _ = w.Do("read", "config", nil) },
		func() { w.sim.Inject(fault{Method: "POST", Path: "s$", Process: true}); w.issue() },
		func() { w.Must("delete roles/key-on-ours", nil); delete(w.max, "key-on-ours") },
		func() { w.DisplayName = pick(w.r, []string{"token", "x-" + w.suffix(w.tag), w.suffix(w.tag)}) },
		func() { w.sim.SetDate(pick(w.r, []string{"", "none"})) },
	})()
}

func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

// TestTidyProperty: whatever happens, the mount deletes nothing at OpenAI that it has not made, that is under a lease
// which can be alive by any clock, or that a role names; and in the end nothing of what it made is left.
func TestTidyProperty(t *testing.T) {
	leases, deletions := 0, 0
	for i := 0; i < 10 && !t.Failed(); i++ {
		synctest.Test(t, func(t *testing.T) {
			seed := uint64(i)
			if i == 0 {
				seed = rand.Uint64()
			}
			w := newWorld(t, seed)
			for n := 0; n < 250 && !t.Failed(); n++ {
				w.step()
			}
			w.sim.ClearFaults()
			w.sim.SetDate("")
			w.jump(w.offset)
			w.Must("delete roles/key-on-ours", nil)
			time.Sleep(49 * time.Hour)
			w.run(75)
			same(t, "left in the end", len(w.sim.Names(ours, "proj_b"))-w.others, 0)
			leases, deletions = leases+len(w.held), deletions+w.deleted
			if t.Failed() {
				t.Logf("the seed was %d", seed)
			}
		})
	}
	failIf(t, !t.Failed() && (leases < 300 || deletions < 300),
		"got %d leases and %d deletions in all, which show too little", leases, deletions)
}

// TestTidyByHand: a pass looks through all pages of all active projects, tells what it found and deletes what is past
// its end by ten minutes. A dry run deletes nothing and lists it.
func TestTidyByHand(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		none := fields{"mount_id": e.b().mountID, "dry_run": false, "started": "", "finished": "",
			"projects": 0, "found": 0, "deleted": 0, "failed": 0, "leftover": "[]", "pending": "[]", "errors": "[]"}
		e.tidied(e.Get("tidy"), none)
		e.sim.AddProject("proj_b", "B")
		e.sim.AddProject("proj_old", "Archived")
		e.sim.ArchiveProject("proj_old")
		e.crowd(150)
		due := append(e.ended(ours, 129, 11*time.Minute), e.ended("proj_b", 1, 24*time.Hour)...)
		e.ended("proj_b", 2, 9*time.Minute)
		shared := e.sim.AddServiceAccount("proj_b", "shared", "none") // OpenAI lists its keys on demand only
		due = append(due, e.sim.AddKey("proj_b", shared, e.past(time.Hour)))
		live := e.lease("web")
		e.Storage.Set(cleanupPrefix+"svc_acct_x", `{}`)

		now := formatTime(time.Now())
		want := fields{"mount_id": e.b().mountID, "dry_run": true, "started": now, "finished": now,
			"projects": 2, "found": 134, "deleted": 0, "failed": 0, "pending": "[svc_acct_x]", "errors": "[]"}
		listed := e.tidy(fields{"dry_run": true}, want).Data["leftover"].([]string)
		strange := slices.ContainsFunc(listed, func(id string) bool { return !slices.Contains(due, id) })
		same(t, "leftover, and whether it has others", fmt.Sprint(len(listed), strange), "100 false")
		want["dry_run"], want["deleted"], want["leftover"] = false, 131, "[]"
		e.tidy(nil, want)
		e.tidied(e.Get("tidy"), want)
		left := e.sim.Names(ours, "proj_b")
		same(t, "accounts and keys that are left", len(left), 150+2+1+2)
		wrong := slices.ContainsFunc(due, func(id string) bool { return left[id] != "" })
		same(t, "one that was due is left", wrong, false)
		same(t, "the live key is accepted", e.sim.Use(live.Data["api_key"].(string)), true)
		e.Refused("tidy", fields{"project_ids": "proj_nil"}, "project_ids", "proj_nil")
		// By their ids: an archived project has nothing that could be left.
		e.ended("proj_b", 1, time.Hour)
		e.tidy(fields{"project_ids": []string{"proj_old", ours, ours}},
			fields{"projects": 2, "found": 1, "deleted": 0, "failed": 0, "errors": "[]"})
		e.Restart()
		none["pending"] = "[svc_acct_x]"
		e.tidied(e.Get("tidy"), none)
	})
}

// TestTidyBadInput: tidy refuses what it can't mean, and does nothing.
func TestTidyBadInput(t *testing.T) {
	bads := vaultsim.Bads
	newConfiguredEnv(t).RefusesAll("tidy", fields{}, slices.Concat(
		bads("mount_id", "", "ABCDEF", "abcde", "abcdefg", "abcde1", "abcd\n", "a/c", aMap),
		bads("project_ids", "", "a/b", "proj_sim,..", strings.Repeat("x", 129), aMap),
		bads("dry_run", "true or false", "perhaps", aMap)))
}

// TestTidyOtherMount: with the mount_id of a mount, only what that one made and what is past its end is deleted.
func TestTidyOtherMount(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		other := newEnvOn(t, e.sim)
		other.configure(nil)
		other.OK("roles/web", fields{"project_id": ours})
		other.lease("web")
		other.ended(ours, 2, time.Hour)
		e.ended(ours, 3, time.Hour)
		e.loses()
		time.Sleep(searchTime + time.Minute) // the lost one is left to full passes
		tag := other.b().mountID
		e.tidy(fields{"mount_id": tag}, fields{"mount_id": tag, "found": 3, "deleted": 2})
		e.have(1+3+1, 2, "after the other mount's")
		e.tidy(nil, fields{"deleted": 4})
		e.have(1, 1, "after its own")
	})
}

// TestTidyTrouble: a pass goes on after what it can't do, and says what that was.
func TestTidyTrouble(t *testing.T) {
	refusal := func(method, path string) func(e *env) { return func(e *env) { e.sim.Fail(method, path, 403) } }
	unread := func(key string) func(e *env) { return func(e *env) { e.Storage.Fail("list", key) } }
	type trouble struct {
		inject                    func(e *env)
		projects, deleted, failed int
		text                      string // in the errors
	}
	inBubbles(t, map[string]trouble{
		"accounts of a project": {refusal("GET", "proj_b/service_accounts$"), 1, 15, 1, "proj_b: OpenAI answered 403"},
		"keys of a project":     {refusal("GET", "proj_b/api_keys$"), 1, 15, 1, "proj_b: OpenAI answered 403"},
		"deletions":             {refusal("DELETE", "proj_b"), 2, 15, 15, "OpenAI answered 403"},
		"projects":              {refusal("GET", "projects$"), 0, 0, 1, "OpenAI answered 403"},
		"roles":                 {unread(rolePrefix), 2, 0, 30, "injected failure"},
	}, func(t *testing.T, e *env, tt trouble) {
		e.sim.AddProject("proj_b", "B")
		e.ended(ours, 15, time.Hour)
		due := e.ended("proj_b", 15, time.Hour)
		tt.inject(e)
		resp := e.tidy(nil, fields{"projects": tt.projects, "deleted": tt.deleted, "failed": tt.failed})
		errs, leftover := resp.Data["errors"].([]string), resp.Data["leftover"].([]string)
		failIf(t, len(errs) != min(10, tt.failed) || !strings.Contains(strings.Join(errs, "\n"), tt.text),
			"errors: got %q, want %d with %q", errs, min(10, tt.failed), tt.text)
		if tt.failed == 15 {
			same(t, "leftover", slices.Sorted(slices.Values(leftover)), slices.Sorted(slices.Values(due)))
		}
		same(t, "lines of the log", e.Log.Count("warn", "tidy could not do all"), 1)
		e.Storage.SetFault(nil)
		e.sim.ClearFaults()
		e.OK("tidy", nil)
		e.have(0, 0, "afterwards")
	})
}

// TestTidyUnderWay: a pass by hand that takes longer than 30 seconds goes on after its answer. Meanwhile another is
// refused, and nothing else waits for it.
func TestTidyUnderWay(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.OK("tidy", nil)
		e.ended(ours, 1, time.Hour)
		e.sim.SetLatency(20 * time.Second)
		start := time.Now()
		resp := e.tidy(nil, fields{"deleted": 0, "finished": formatTime(start)})
		same(t, "time until the answer, and its warnings", fmt.Sprint(time.Since(start), len(resp.Warnings)), "30s 1")
		e.Refused("tidy", nil, "under way")
		e.Tick()
		e.lease("web")
		same(t, "time until a tick and a credential are done", time.Since(start), 50*time.Second)
		e.quiet()
		same(t, "time of three lists and a deletion", time.Since(start).Round(time.Second), 80*time.Second)
		e.tidied(e.Get("tidy"), fields{"deleted": 1, "started": formatTime(start)})
		e.have(1, 1, "afterwards")
	})
}

// TestTidySpares: an account that a role names stays, also if the role is written after the account was listed; so does
// a key that is not of a service account, an account with a key under a live lease, and anything in a dry run.
func TestTidySpares(t *testing.T) {
	inBubbles(t, map[string]func(e *env, ids []string, name func(id string)){
		"named before": func(e *env, ids []string, name func(id string)) {
			name(ids[0])
			e.tidy(nil, fields{"found": 2, "deleted": 1, "failed": 0, "leftover": "[]"})
			e.Must("delete roles/named", nil)
			e.tidy(nil, fields{"found": 1, "deleted": 1})
		},
		"named after the listing": func(e *env, ids []string, name func(id string)) {
			e.Wire.BeforeEach(func(_ int, req *http.Request) {
				if req.Method == http.MethodDelete {
					name(ids[1]) // while the one before it is deleted
				}
			})
			e.tidy(nil, fields{"found": 2, "deleted": 1, "failed": 0})
			same(t, "the named account is there", e.sim.Names(ours)[ids[1]] != "", true)
		},
		"key of a user": func(e *env, ids []string, name func(id string)) {
			id := e.sim.AddUserKey(ours, e.past(time.Hour))
			e.tidy(nil, fields{"deleted": 2, "failed": 0, "leftover": "[]"})
			same(t, "the user's key is there", e.sim.Names(ours)[id] != "", true)
		},
		"dry run": func(e *env, ids []string, _ func(string)) { // nothing lost goes, nor what waits for clean-up
			e.loses()
			e.Storage.Set(cleanupPrefix+ids[0], fmt.Sprintf(`{"project_id":%q,"service_account_id":%q}`, ours, ids[0]))
			want := fields{"found": 3, "deleted": 0, "pending": ids[:1]}
			same(t, "leftover", len(e.tidy(fields{"dry_run": true}, want).Data["leftover"].([]string)), 3)
			e.have(3, 1, "after a dry run")
			e.look()
			e.have(1, 0, "after a tick")
		},
		"account with a leased key": func(e *env, ids []string, name func(id string)) {
			name(ids[0])
			key := e.lease("named").Data["api_key"].(string)
			e.Must("delete roles/named", nil)
			e.OK("tidy", nil)
			same(t, "a key under a live lease is accepted", e.sim.Use(key), true)
		},
	}, func(t *testing.T, e *env, test func(*env, []string, func(string))) {
		test(e, e.ended(ours, 2, time.Hour), func(id string) {
			e.Storage.Set("roles/named", fmt.Sprintf(`{"project_id":%q,"service_account_id":%q}`, ours, id))
		})
	})
}

// TestTidyWithoutDate: when OpenAI's answers have no Date, nothing is deleted by the end in its name, and the pass says
// so; what was lost is deleted all the same. A clock that is ahead deletes nothing that OpenAI's says is not due.
func TestTidyWithoutDate(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.ended(ours, 1, 0)
		e.sim.SetDate("none")
		time.Sleep(25 * time.Hour) // this machine's clock jumps ahead
		e.sim.Advance(-25 * time.Hour)
		e.look()
		e.loses()
		for _, deleted := range []int{1, 0} {
			resp := e.tidy(nil, fields{"deleted": deleted, "failed": 1})
			same(t, "errors say so", strings.Contains(fmt.Sprint(resp.Data["errors"]), "no Date"), true)
		}
		e.sim.SetDate("")
		e.tidy(nil, fields{"found": 1, "deleted": 0, "failed": 0})
		e.sim.Advance(25 * time.Hour)
		e.tidy(nil, fields{"found": 1, "deleted": 1, "failed": 0})
	})
}

// TestTidySchedule: a full pass begins two to three minutes after the process has started, then each hour, and ten
// minutes after one that failed; on a standby and on a DR secondary there is none, nor any other clean-up.
func TestTidySchedule(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		at := func(d time.Duration, want int, when string) {
			t.Helper()
			e.Run(d)
			e.quiet()
			same(t, "passes "+when, e.Log.Count("info", "tidy has ended"), want)
		}
		at(119*time.Second, 0, "before two minutes")
		at(61*time.Second, 1, "after three minutes")
		at(58*time.Minute, 1, "within the hour")
		at(2*time.Minute, 2, "after the hour")
		e.sim.Fail("GET", "service_accounts$", 403)
		at(time.Hour, 3, "after an hour more")
		at(8*time.Minute, 3, "soon after one that failed")
		at(3*time.Minute, 4, "ten minutes after one that failed")
		e.sim.ClearFaults()
		at(10*time.Minute, 5, "ten minutes later")
		at(57*time.Minute, 5, "within the hour after one that succeeded")
		e.Restart()
		at(119*time.Second, 5, "before two minutes of the next process")
		at(61*time.Second, 6, "after three minutes of the next process")
		e.Storage.Set(cleanupPrefix+"x", fmt.Sprintf(`{"project_id":%q,"service_account_id":"x"}`, ours))
		for _, passive := range []consts.ReplicationState{consts.ReplicationDRSecondary,
			consts.ReplicationPerformanceStandby} {
			e.System.ReplicationStateVal = passive | consts.ReplicationPerformanceSecondary
			at(2*time.Hour, 6, "on a passive node")
			same(t, "clean-up entries on a passive node", len(e.Storage.Keys(cleanupPrefix)), 1)
		}
		e.System.ReplicationStateVal = consts.ReplicationPerformanceSecondary
		at(time.Minute, 7, "on the active node of a secondary")
	})
}

// TestTidyEnds: when the process is to end, a pass that waits for OpenAI ends at once, and none begins any more.
func TestTidyEnds(t *testing.T) {
	inBubbles(t, map[string]fault{
		"hang": {Kind: "hang", Times: -1}, "rate limit": {Status: 429, Header: after("60"), Times: -1},
	}, func(t *testing.T, e *env, fault fault) {
		e.sim.Inject(fault)
		time.Sleep(firstPass)
		e.Tick()
		time.Sleep(10 * time.Second)
		old, start := e.b(), time.Now()
		e.Restart()
		same(t, "time until the process has ended", time.Since(start), 0*time.Second)
		synctest.Wait()
		same(t, "a pass begins after Clean", old.inBackground(&old.passMu, func(context.Context) {}) != nil, false)
	})
}

// TestTidyLost: lost creates are looked for at each tick for ten minutes, then by each full pass for a day. One that is
// found is deleted once and forgotten, and at most 1,000 are remembered.
func TestTidyLost(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.loses()
		name := e.sim.ServiceAccounts(ours)[0].Name
		for _, alike := range []string{name + "-2", name[:len(name)-1], "x" + name, strings.ToUpper(name), name + " "} {
			e.sim.AddServiceAccount(ours, alike, "member")
		}
		same(t, "lost creates", e.metric("lost_creates"), 1)
		e.look()
		same(t, "lost creates after a tick", e.metric("lost_creates"), 0)
		e.have(5, 0, "after a tick")
		e.look()
		same(t, "deletions", e.sim.CountCalls("DELETE", ""), 1)
		same(t, "lists", e.sim.CountCalls("GET", "/service_accounts"), 1)
	})
	inBubble(t, func(t *testing.T, e *env) {
		e.sim.Inject(fault{Method: "POST", Kind: "close", Times: -1})
		for range 1001 {
			_, _ = e.Issue("creds/web", nil)
		}
		after := func(d time.Duration, lists, lost int) {
			t.Helper()
			e.sim.ResetCalls()
			e.Run(d)
			e.quiet()
			same(t, "lists of accounts", e.sim.CountCalls("GET", "/service_accounts"), lists)
			same(t, "lost creates", e.metric("lost_creates"), lost)
		}
		same(t, "lines of the log", e.Log.Count("error", "too many lost creates"), 1)
		after(searchTime+time.Second, 10+1, 1000) // at each tick, and a pass
		after(time.Hour, 1, 1000)
		after(22*time.Hour, 22, 1000)
		after(time.Hour, 1, 0)
		_, _ = e.Issue("creds/web", nil)
		same(t, "lost creates of the next day", e.metric("lost_creates"), 1)
	})
}

// TestTidySweep: a tick works all clean-up entries off, also those of an older version. One that fails by itself does
// not keep others waiting; an outage stops it at the first failure.
func TestTidySweep(t *testing.T) {
	const form = `{"api_key_id":"key_x","service_account_id":%q,"project_id":%q%s,"failures":5}`
	type sweep struct {
		inject        fault  // of deletions; Path: "-": of one
		others        string // as many more entries with this in them
		left, deletes int    // accounts; calls
	}
	inBubbles(t, map[string]sweep{
		"no fault":           {fault{Path: "none"}, "", 0, 30},
		"one is refused":     {fault{Path: "-", Status: 400}, "", 1, 30},
		"key is refused":     {fault{Status: 401}, "", 30, 1},
		"outage":             {fault{Status: 503}, "", 30, maxAttempts},
		"no connection":      {fault{Kind: "close"}, "", 30, maxAttempts},
		"other organization": {fault{Path: "none"}, `,"organization_id":"org-other"`, 0, 30},
		"not JSON":           {fault{Path: "none"}, `,`, 0, 30},
	}, func(t *testing.T, e *env, tt sweep) {
		for i := range 30 {
			id, other := e.sim.AddServiceAccount(ours, "x", "member"), fmt.Sprint("svc_acct_", i)
			e.Storage.Set(cleanupPrefix+id, fmt.Sprintf(form, id, ours, ""))
			if tt.others != "" {
				e.Storage.Set(cleanupPrefix+other, fmt.Sprintf(form, other, ours, tt.others))
			}
			if tt.inject.Path == "-" {
				tt.inject.Path = id
			}
		}
		tt.inject.Method, tt.inject.Times = "DELETE", -1
		e.sim.Inject(tt.inject)
		e.sim.ResetCalls()
		e.look()
		e.have(tt.left, 0, "after a tick")
		same(t, "deletions", e.sim.CountCalls("DELETE", ""), tt.deletes)
		same(t, "lines of the log", e.Log.Count("warn", "clean-up failed"), min(1, tt.left+len(tt.others)))
		e.sim.ClearFaults()
		e.look()
		e.have(0, 0, "after the fault")
		same(t, "entries are left", len(e.Storage.Keys(cleanupPrefix)) > 0, tt.others != "")
	})
}

// TestTidyApart: a search for a lost create that a rate limit holds up keeps no clean-up entry waiting.
func TestTidyApart(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.loses()
		l := e.lease("web")
		e.sim.Fail("GET", "/service_accounts$", 429)
		e.Tick()
		time.Sleep(time.Second)
		e.sim.Inject(fault{Method: "DELETE", Status: 403})
		e.Fails("revocation", e.Revoke(l), "403")
		e.Tick()
		time.Sleep(time.Second)
		e.have(1, 1, "after the second tick")
		e.sim.ClearFaults()
	})
}

// TestTidyLongList: a list of accounts that takes longer than a tick keeps neither ticks nor credentials nor clean-up
// waiting, and a lost create behind it is found.
func TestTidyLongList(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.crowd(6200)
		e.loses()
		e.sim.Fail("DELETE", "projects", 403)
		e.Fails("revocation", e.Revoke(e.lease("web")), "403")
		e.sim.ClearFaults()
		e.have(6202, 2, "at first")
		e.sim.SetLatency(500 * time.Millisecond)
		start := time.Now()
		e.Tick()
		same(t, "time of a tick", time.Since(start), 0*time.Second)
		time.Sleep(time.Second)
		e.have(6201, 1, "when the clean-up entry is done")
		e.MustRevoke(e.lease("web"))
		same(t, "time until a credential is issued and revoked", time.Since(start), 2*time.Second)
		e.quiet()
		same(t, "the search takes longer than a tick", time.Since(start) > tickTimeout, true)
		e.have(6200, 0, "after the search")
	})
}

// TestTidyAndRotation: admin keys whose deletion hangs bound a tick to 30 seconds, and credentials are cleaned up in
// the same tick.
func TestTidyAndRotation(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.configure(fields{"rotation_period": "1h"})
		l := e.lease("web")
		e.sim.Fail("DELETE", "", 403)
		e.OK("config/rotate", nil)
		e.Fails("revocation", e.Revoke(l), "403")
		e.sim.ClearFaults()
		e.sim.Inject(fault{Path: "/admin_api_keys", Kind: "hang", Times: -1})
		time.Sleep(2 * time.Hour) // a rotation is due
		start := time.Now()
		e.Tick()
		same(t, "a tick takes more than 30 seconds", time.Since(start) > 30*time.Second, false)
		e.quiet()
		e.have(0, 0, "after the tick")
		same(t, "admin keys pending deletion", len(e.config().PendingDeletion), 1)
	})
}

// TestReport: each change is a line of the log and, on Enterprise, an observation and an event, of which README tells.
func TestReport(t *testing.T) {
	readme, _ := os.ReadFile("README.md")
	all := strings.Fields("config-write role-write creds-issue creds-issue creds-renew creds-revoke rotate-root " +
		"creds-issue-fail creds-renew-fail creds-revoke-fail rotate-root-fail role-delete config-delete")
	const log = "INFO config-write, INFO role-write, DEBUG creds-issue, DEBUG creds-issue, DEBUG creds-renew, " +
		"DEBUG creds-revoke, INFO rotate-root, DEBUG request refused, WARN creds-issue-fail, WARN creds-renew-fail, " +
		"WARN creds-revoke-fail, WARN rotate-root-fail, INFO role-delete, INFO config-delete"
	for metadata, want := range map[string][]string{"": nil, "ent": all, "ent.hsm.fips1403": all, "error": all} {
		e := newEnv(t)
		e.System.PluginEnvironment = &logical.PluginEnvironment{VaultVersionMetadata: metadata}
		if metadata == "error" {
			e.System.PluginEnvErr = vaultsim.ErrInjected
		}
		e.configure(nil)
		e.OK("roles/web", fields{"project_id": ours})
		l, other := e.lease("web"), e.lease("web")
		same(t, "errors", errors.Join(e.Renew(l, 0), e.Revoke(l)), nil)
		e.OK("config/rotate", nil)
		resp, err := e.Do(logical.ReadOperation, "creds/web", fields{"ttl": 0})
		e.Refusal(resp, err, "ttl")
		e.sim.Fail("", "", 401)
		_, err = e.Issue("creds/web", nil)
		e.Fails("all", errors.Join(err, e.Renew(other, 0), e.Revoke(other)), "401")
		e.rotateFails("401") // and reads config, which tells nothing
		e.Must("delete roles/web", nil)
		e.Must("delete config", nil)
		var got []string
		pairs := `^name=web project_id=p\S+ service_account_id=s\S+ api_key_id=k\S+ mount=openai/ request_id=r\S+$`
		for text := range strings.Lines(e.Log.String()) {
			m := regexp.MustCompile(`^\S+ \[([A-Z]+)\] +(.*?): (.*)\n$`).FindStringSubmatch(text)
			failIf(t, m[2] == "creds-renew" && !regexp.MustCompile(pairs).MatchString(m[3]), "log: got %q", text)
			got = append(got, m[1]+" "+m[2])
		}
		same(t, "log", strings.Join(got, ", "), log)
		for events, reports := range [][]vaultsim.Report{e.System.Observations(), e.System.Events()} {
			var got []string
			for _, r := range reports {
				name, fail := strings.CutSuffix(r.Type, "-fail")
				got = append(got, strings.TrimPrefix(r.Type, "openai/"))
				if account := r.Data["service_account_id"]; !strings.Contains(string(readme), "`"+name+"`") ||
					r.Type == "openai/creds-renew" && account != l.Data["service_account_id"] {
					t.Errorf("README lacks %s, or it tells of another account, %v", name, account)
				}
				if events == 1 {
					got := fmt.Sprint("openai/", r.Data["operation"], r.Data["modified"])
					same(t, "event", got, fmt.Sprint(r.Type, !fail))
				}
				same(t, r.Type+" with an error", r.Data["error"] != nil, fail)
			}
			same(t, "reports with metadata "+metadata, got, want)
			e.NoSecrets("a report", fmt.Sprint(reports))
		}
	}
}

// series reads the metrics in both formats, strictly, checks that both say the same, and returns the values.
func (e *env) series() map[string]float64 {
	e.t.Helper()
	all, data := e.Scrape("metrics", metricPrefix), map[string]float64{}
	for name, value := range e.Get("metrics").Data {
		if value, ok := value.(float64); ok {
			data[name] = value
			continue
		}
		for labels, v := range value.(map[string]float64) {
			data[name+"{"+labels+"}"] = v
		}
	}
	same(e.t, "metrics as data", data, all)
	return all
}

// TestMetricsFamilies sees each series of each family move, on success and on failure, and no other result with it.
func TestMetricsFamilies(t *testing.T) {
	hourly := fields{"rotation_period": "1h", "admin_key_ttl": "2h"}
	lost := fault{Method: "POST", Kind: "close", Process: true}
	acts := map[string]func(*env, *vaultsim.Lease){
		"issue":  func(e *env, _ *vaultsim.Lease) { _, _ = e.Issue("creds/web", nil) },
		"renew":  func(e *env, l *vaultsim.Lease) { _ = e.Renew(l, 0) },
		"revoke": func(e *env, l *vaultsim.Lease) { _ = e.Revoke(l) },
		"rotate": func(e *env, _ *vaultsim.Lease) { _, _ = e.Write("config/rotate", nil) },
		"tidy":   func(e *env, _ *vaultsim.Lease) { _, _ = e.Write("tidy", nil) },
		"tick":   func(e *env, _ *vaultsim.Lease) { e.Tick(); e.quiet() },
		"hour":   func(*env, *vaultsim.Lease) { time.Sleep(time.Hour) },
		"slow":   func(e *env, _ *vaultsim.Lease) { e.sim.SetLatency(2 * time.Second) },
		"hourly": func(e *env, _ *vaultsim.Lease) { e.OK("config", hourly) },
		"static": func(e *env, _ *vaultsim.Lease) { e.static("1h", nil) },
		"again":  func(e *env, _ *vaultsim.Lease) { _, _ = e.Write("rotate-role/gw", nil) },
		"lose":   func(e *env, _ *vaultsim.Lease) { e.sim.Inject(lost) },
		"refuse": func(e *env, _ *vaultsim.Lease) { e.sim.Inject(fault{Method: "DELETE", Status: 403}) },
		"sign":   func(e *env, _ *vaultsim.Lease) { e.OK("config/identity", nil) },
		"token": func(e *env, _ *vaultsim.Lease) {
			e.tokenRole("app", nil)
			_, _ = e.Issue("creds/app", nil)
		},
	}
	const left = "lose issue refuse revoke" // an account whose creation was lost, and a revocation that failed
	fails, refused, limited := fault{Times: -1}, fault{Status: 403, Times: -1}, fault{Status: 429, Header: after("7")}
	undeletable, none := fault{Method: "DELETE", Status: 403, Times: -1}, fault{Path: "^none$"}
	const start = 946684800
	tests := []struct {
		series, prepare string // without prefix
		fault           fault  // that do meets
		do              string
		want            float64 // how far it moves
	}{
		{`credential_operations_total{role="web",operation="issue",result="success"}`, "", none, "issue issue", 2},
		{`credential_operations_total{role="web",operation="issue",result="failure"}`, "", fails, "issue", 1},
		{`credential_operations_total{role="web",operation="renew",result="success"}`, "", none, "renew", 1},
		{`credential_operations_total{role="web",operation="renew",result="failure"}`, "", fails, "renew", 1},
		{`credential_operations_total{role="web",operation="revoke",result="success"}`, "", none, "revoke", 1},
		{`credential_operations_total{role="web",operation="revoke",result="failure"}`, "", fails, "revoke", 1},
		{`revocations_handed_over_total`, "", fails, "revoke revoke revoke revoke revoke", 1},
		{`api_requests_total{operation="create_service_account",status="200"}`, "", none, "issue", 1},
		{`api_requests_total{operation="create_service_account",status="500"}`, "", fails, "issue", 1},
		{`api_requests_total{operation="create_service_account",status="error"}`, "lose", none, "issue", 1},
		{`api_request_duration_seconds_count{operation="delete_service_account"}`, "", none, "revoke", 1},
		{`api_request_duration_seconds_sum{operation="delete_service_account"}`, "slow", none, "revoke", 2},
		{`api_request_duration_seconds_bucket{operation="delete_service_account",le="+Inf"}`, "", none, "revoke", 1},
		{`api_retries_total{reason="500"}`, "", fault{Times: 2}, "revoke", 2},
		{`api_retries_total{reason="connection"}`, "", fault{Kind: "refuse"}, "issue", 1},
		{`api_rate_limit_wait_seconds_total`, "", limited, "issue", 7},
		{`rotations_total{trigger="manual",result="success"}`, "", none, "rotate", 1},
		{`rotations_total{trigger="manual",result="failure"}`, "", fails, "rotate", 1},
		{`rotations_total{trigger="plugin",result="success"}`, "hourly hour", none, "tick", 1},
		{`rotations_total{trigger="plugin",result="failure"}`, "hourly hour", refused, "tick", 1},
		{`token_exchanges_total{result="success"}`, "sign", none, "token", 1},
		{`token_exchanges_total{result="failure"}`, "sign", fault{Path: "oauth", Times: -1}, "token", 1},
		{`signing_key_created_timestamp_seconds`, "", none, "sign", start},
		{`cleanups_total{result="success"}`, left, none, "tick", 1},
		{`cleanups_total{result="failure"}`, left, refused, "tick", 1},
		{`cleanups_pending`, "", fails, "revoke", 1},
		{`cleanups_pending`, left, none, "tick", -1},
		{`tidy_passes_total{result="success"}`, "", none, "tidy", 1},
		{`tidy_passes_total{result="failure"}`, "", refused, "tidy", 1},
		{`tidy_passes_total{result="success"}`, "hour", none, "tick", 1},
		{`tidy_deletions_total{result="success"}`, left, none, "tick", 1},
		{`tidy_deletions_total{result="failure"}`, left, undeletable, "tick", 1},
		{`tidy_last_pass_timestamp_seconds`, "hour", none, "tidy", start + 3600},
		{`lost_creates`, "", fails, "issue", 1},
		{`lost_creates`, left, none, "tick", -1},
		{`admin_key_last_rotation_timestamp_seconds`, "hour", none, "rotate", 3600},
		{`admin_key_next_rotation_timestamp_seconds`, "", none, "hourly", start + 3600},
		{`admin_key_expiry_timestamp_seconds`, "hourly", none, "rotate", start + 7200},
		{`admin_keys_pending_deletion`, "", undeletable, "rotate", 1},
		{`static_rotations_total{role="gw",result="success"}`, "static", none, "again", 1},
		{`static_rotations_total{role="gw",result="failure"}`, "static", refused, "again", 1},
		{`static_key_last_rotation_timestamp_seconds{role="gw"}`, "static hour", none, "again", 3600},
		{`static_rotations_overdue`, "static", none, "hour hour", 1},
		{`build_info{version="",goversion="` + runtime.Version() + `"}`, "", none, "", 0},
	}
	moved := map[string]bool{}
	for _, tt := range tests {
		moved[regexp.MustCompile(`(_bucket|_sum|_count)?(\{.*)?$`).ReplaceAllString(tt.series, "")] = true
		t.Run(tt.series, func(t *testing.T) {
			inBubble(t, func(t *testing.T, e *env) {
				l := e.lease("web")
				for _, name := range strings.Fields(tt.prepare) {
					acts[name](e, l)
				}
				before := e.series()
				e.sim.Inject(tt.fault)
				for _, name := range strings.Fields(tt.do) {
					acts[name](e, l)
				}
				after, turn := e.series(), strings.NewReplacer("success", "failure", "failure", "success")
				opposite := turn.Replace(tt.series)
				_, ok := after[metricPrefix+tt.series]
				moved := after[metricPrefix+tt.series] - before[metricPrefix+tt.series]
				failIf(t, !ok || math.Abs(moved-tt.want) > 1e-6, "moved by %v, want %v", moved, tt.want)
				too := opposite != tt.series && after[metricPrefix+opposite] != before[metricPrefix+opposite]
				failIf(t, too, "%s moved too", opposite)
			})
		})
	}
	for _, f := range families {
		failIf(t, !moved[f.name], "no test sees %s move", f.name)
	}
}

// TestMetricsStart: bounded series are there from the start, for Prometheus to see the first event. All metrics are in
// README and in the dashboard.
func TestMetricsStart(t *testing.T) {
	e := newEnv(t)
	same(t, "series", len(e.series()), 2+4*2+3*2+4)
	e.Mistake("read metrics", fields{"format": "xml"}, "format")
	for _, file := range []string{"README.md", "examples/grafana/dashboard.json"} {
		text, err := os.ReadFile(file)
		e.NoError(err)
		for _, f := range families {
			failIf(t, !strings.Contains(string(text), metricPrefix+f.name), "%s lacks %s", file, metricPrefix+f.name)
		}
	}
}

// BenchmarkCreds issues and revokes a credential, without a log and with an OpenAI that answers at once.
func BenchmarkCreds(b *testing.B) {
	e := newConfiguredEnv(b)
	engine := newBackend(e.sim.Transport(), e.b().mountID)
	err := engine.Setup(b.Context(), &logical.BackendConfig{System: e.System, StorageView: e.Storage})
	b.ReportAllocs()
	for b.Loop() {
		req := &logical.Request{Operation: logical.ReadOperation, Path: "creds/web", Storage: e.Storage}
		for range 2 {
			resp, doErr := engine.HandleRequest(b.Context(), req)
			if err = errors.Join(err, vaultsim.Failure(resp, doErr)); err != nil {
				b.Fatal(err)
			}
			if req.Operation = logical.RevokeOperation; resp != nil {
				req.Secret = resp.Secret
			}
		}
		e.sim.ResetCalls()
	}
}

// BenchmarkMetricsAdd counts on all processors at once, as requests do.
func BenchmarkMetricsAdd(b *testing.B) {
	m := newMetrics()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			m.add("credential_operations_total", 1, "role", "web", "operation", "issue", "result", "success")
		}
	})
}
