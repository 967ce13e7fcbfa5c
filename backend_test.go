// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
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

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"

	"vault-plugin-secrets-openai/internal/openaisim"
	"vault-plugin-secrets-openai/internal/vaultsim"
)

// failure returns what a handler's answer says went wrong; nil: nothing.
func failure(resp *logical.Response, err error) error {
	if err == nil && resp.IsError() {
		err = resp.Error()
	}
	return err
}

// env is a mount in a small Vault, with a simulated OpenAI. Nothing in it uses the network, so that it works inside a
// testing/synctest bubble.
type env struct {
	*vaultsim.Vault
	t    testing.TB
	sim  *openaisim.Server
	wire *wire // to the simulator
}

// newEnv returns a mount without config.
func newEnv(t testing.TB) *env {
	t.Helper()
	return newEnvOn(t, openaisim.New())
}

// newEnvOn returns a further mount on an organization.
func newEnvOn(t testing.TB, sim *openaisim.Server) *env {
	t.Helper()
	e := &env{t: t, sim: sim, wire: &wire{to: sim.Transport()}}
	e.Vault = vaultsim.New(t, func(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
		b := newBackend(&processWire{e.wire, vaultsim.Process(conf)}, mountID(conf.BackendUUID))
		return b, b.Setup(ctx, conf)
	})
	t.Cleanup(func() { e.noSecrets("the log", e.Log.String()) })
	return e
}

// newConfiguredEnv returns a mount with config and a role "web".
func newConfiguredEnv(t testing.TB) *env {
	t.Helper()
	e := newEnv(t)
	e.configure(nil)
	e.ok("roles/web", map[string]any{"project_id": openaisim.DefaultProject})
	return e
}

// inBubble runs test on a configured mount with a virtual clock.
func inBubble(t *testing.T, test func(t *testing.T, e *env)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { test(t, newConfiguredEnv(t)) })
}

// b is the backend of the present process.
func (e *env) b() *backend { return e.Backend().(*backend) }

// configure writes config with the simulator's first admin key, and extra over it.
func (e *env) configure(extra map[string]any) *logical.Response {
	e.t.Helper()
	key, id := e.sim.AdminKey()
	data := map[string]any{"admin_api_key": key, "admin_api_key_id": id, "organization_id": openaisim.DefaultOrganization}
	for name, value := range extra {
		data[name] = value
	}
	return e.ok("config", data)
}

// ok makes a write that must succeed.
func (e *env) ok(path string, data map[string]any) *logical.Response {
	e.t.Helper()
	resp, err := e.Write(path, data)
	if err := failure(resp, err); err != nil {
		e.t.Fatalf("write %s: %v", path, err)
	}
	return resp
}

// get makes a read (or another operation) without data that must succeed.
func (e *env) get(path string) *logical.Response { return e.op(logical.ReadOperation, path, nil) }

func (e *env) op(op logical.Operation, path string, data map[string]any) *logical.Response {
	e.t.Helper()
	resp, err := e.Do(op, path, data)
	if err := failure(resp, err); err != nil {
		e.t.Fatalf("%s %s: %v", op, path, err)
	}
	return resp
}

// refused makes a write that must be the caller's mistake (a 400), with every text of want in its message.
func (e *env) refused(path string, data map[string]any, want ...string) {
	e.t.Helper()
	resp, err := e.Write(path, data)
	e.refusal(resp, err, want...)
}

// refusal checks that an answer is a 400 whose message has every text of want.
func (e *env) refusal(resp *logical.Response, err error, want ...string) {
	e.t.Helper()
	if err != nil || !resp.IsError() {
		e.t.Errorf("got response %v and error %v, want an error response", resp, err)
		return
	}
	for _, text := range want {
		if !strings.Contains(resp.Error().Error(), text) {
			e.t.Errorf("got %q, want it to contain %q", resp.Error(), text)
		}
	}
	e.noSecrets("an error", resp.Error().Error())
}

// lease reads a credential of the role, which must succeed.
func (e *env) lease(role string) *vaultsim.Lease {
	e.t.Helper()
	l, err := e.Issue("creds/"+role, nil)
	if err != nil {
		e.t.Fatalf("creds/%s: %v", role, err)
	}
	return l
}

// revoke revokes a lease, which must succeed.
func (e *env) revoke(l *vaultsim.Lease) {
	e.t.Helper()
	if err := e.Revoke(l); err != nil {
		e.t.Fatalf("revoke: %v", err)
	}
}

// config returns the stored config.
func (e *env) config() *config {
	e.t.Helper()
	cfg, err := getConfig(context.Background(), e.Storage)
	if err != nil || cfg == nil {
		e.t.Fatalf("config: got %v, %v", cfg, err)
	}
	return cfg
}

// put stores an entry as it is.
func (e *env) put(key, json string) {
	e.t.Helper()
	if err := e.Storage.Put(context.Background(), &logical.StorageEntry{Key: key, Value: []byte(json)}); err != nil {
		e.t.Fatal(err)
	}
}

// have checks how many accounts and project keys OpenAI has in the default project.
func (e *env) have(accounts, keys int, when string) {
	e.t.Helper()
	a, k := len(e.sim.ServiceAccounts(openaisim.DefaultProject)), len(e.sim.ProjectKeys(openaisim.DefaultProject))
	if a != accounts || k != keys {
		e.t.Errorf("%s: got %d accounts and %d keys, want %d and %d", when, a, k, accounts, keys)
	}
}

// idle waits until nothing works in the background any more.
func (e *env) idle() {
	for _, mu := range []*sync.Mutex{&e.b().knownMu, &e.b().passMu} {
		mu.Lock()
		defer mu.Unlock()
	}
}

// noSecrets fails the test if text holds anything like a key.
func (e *env) noSecrets(where, text string) {
	e.t.Helper()
	if strings.Contains(strings.ReplaceAll(text, "sk-***", ""), "sk-") {
		e.t.Errorf("%s shows a key", where)
	}
}

// wire records the requests to OpenAI, and can fail them.
type wire struct {
	mu       sync.Mutex
	to       http.RoundTripper
	fault    func(req *http.Request, send func() (*http.Response, error)) (*http.Response, error) // nil: none
	requests []string                                                                             // method, path below /v1 with query, body
	header   http.Header                                                                          // of the last one
}

// setFault makes f stand between the mount and OpenAI; nil: nothing does.
func (w *wire) setFault(f func(*http.Request, func() (*http.Response, error)) (*http.Response, error)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fault = f
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
	fault, to := w.fault, w.to
	w.mu.Unlock()
	if fault == nil {
		return to.RoundTrip(req)
	}
	return fault(req, func() (*http.Response, error) { return to.RoundTrip(req) })
}

// sent returns the requests since the last time that it was asked.
func (w *wire) sent() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	requests := w.requests
	w.requests = nil
	return requests
}

// processWire is a wire of one plugin process: when the process has ended, it sends nothing.
type processWire struct {
	*wire
	process context.Context
}

func (w *processWire) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := w.process.Err(); err != nil {
		return nil, err
	}
	return w.wire.RoundTrip(req)
}

// stepFault is what befalls one step of a request, a storage operation or an exchange with OpenAI, or that step and all
// later ones.
type stepFault struct {
	name    string
	effect  bool // the step takes effect, but its answer is lost
	all     bool // no later step takes effect either, until the request has ended
	crash   bool // and then the plugin's process ends
	cancel  bool // the request's context ends at the step
	arrives bool // then: the step's answer arrives all the same
	refused bool // of a call to OpenAI: the connection is refused
	status  int  // of a call to OpenAI: this is answered
}

var stepFaults = []stepFault{
	{name: "crash before", all: true, crash: true},
	{name: "crash after", all: true, crash: true, effect: true},
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

var errStep = errors.New("injected failure")

// atStep makes request, whose context it gives, meet fault at its step number at, from 1. each is called before each
// step; nil: nothing is. It tells whether the request came as far.
func (e *env) atStep(fault stepFault, at int, each func(), request func(ctx context.Context)) (reached bool) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	n := 0
	var mu sync.Mutex
	// step tells what befalls the next step: before it has an effect, and after.
	step := func() (before, after error) {
		if each != nil {
			each()
		}
		mu.Lock()
		defer mu.Unlock()
		n++
		hit := n == at
		switch {
		case !hit && (n < at || !fault.all):
			return nil, nil
		case !hit:
			return errStep, errStep
		case fault.cancel && !fault.effect:
			cancel()
			return context.Canceled, nil
		case fault.cancel && fault.arrives:
			return nil, context.Canceled
		case fault.cancel:
			return nil, context.Canceled
		case fault.effect:
			return nil, errStep
		}
		return errStep, nil
	}
	var after sync.Map // by verb and key: what is to be said after the effect
	e.Storage.SetFault(func(verb, key string) error {
		before, then := step()
		after.Store(verb+key, then)
		return before
	})
	e.Storage.SetAfter(func(verb, key string) error {
		then, _ := after.LoadAndDelete(verb + key)
		err, _ := then.(error)
		if errors.Is(err, context.Canceled) {
			cancel()
			if fault.arrives {
				return nil
			}
		}
		return err
	})
	e.wire.setFault(func(req *http.Request, send func() (*http.Response, error)) (*http.Response, error) {
		before, then := step()
		resp, err := (*http.Response)(nil), before
		if trace := httptrace.ContextClientTrace(req.Context()); trace != nil && !fault.refused {
			trace.GotConn(httptrace.GotConnInfo{})
		}
		if before == nil {
			if resp, err = send(); err == nil {
				err = then
			}
		}
		if errors.Is(then, context.Canceled) {
			cancel()
			if fault.arrives {
				return resp, nil
			}
		}
		switch {
		case err == nil:
			return resp, nil
		case !errors.Is(err, errStep):
			return nil, err
		case fault.refused:
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
		case fault.status != 0:
			body := io.NopCloser(strings.NewReader(`{"error":{"message":"Injected.","type":"server_error"}}`))
			return &http.Response{StatusCode: fault.status, Header: http.Header{}, Body: body, Request: req}, nil
		}
		return nil, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
	})
	request(ctx)
	e.Storage.SetFault(nil)
	e.Storage.SetAfter(nil)
	e.wire.setFault(nil)
	if fault.crash {
		e.Crash()
	}
	mu.Lock()
	defer mu.Unlock()
	return n >= at
}

// everyStep runs test in a bubble of its own for each fault at each step, and fails if there are fewer than enough
// steps. test tells whether its request reached step at.
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

// TestLife is a credential's life: issued, used, renewed, revoked.
func TestLife(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.sim.ResetCalls()
		l := e.lease("web")
		if got := len(e.sim.Calls()); got != 1 {
			t.Errorf("calls to OpenAI for a credential: got %d, want 1", got)
		}
		key := l.Data["api_key"].(string)
		if !e.sim.Use(key) {
			t.Error("the key is not accepted")
		}
		e.Run(30 * time.Minute)
		if err := e.Renew(l, 0); err != nil {
			t.Errorf("renew: %v", err)
		}
		e.revoke(l)
		if e.sim.Use(key) {
			t.Error("the key is accepted after its lease was revoked")
		}
		e.have(0, 0, "after revocation")
		if got := fmt.Sprint(e.Storage.Keys("")); got != "[config roles/]" {
			t.Errorf("storage: got %s", got)
		}
	})
}

// fields are what a request names, or what an answer holds.
type fields = map[string]any

// same compares two values as text.
func same(t testing.TB, what string, got, want any) {
	t.Helper()
	if got, want := fmt.Sprint(got), fmt.Sprint(want); got != want {
		t.Errorf("%s:\n got %s\nwant %s", what, got, want)
	}
}

// unchanged runs request, after which storage must be as it was.
func (e *env) unchanged(what any, request func()) {
	e.t.Helper()
	before := e.Storage.All()
	request()
	same(e.t, fmt.Sprint("storage is as it was: ", what), maps.Equal(e.Storage.All(), before), true)
}

// failStorage makes each storage access of this verb and key fail.
func (e *env) failStorage(failVerb, failKey string) {
	e.Storage.SetFault(func(verb, key string) error {
		if verb == failVerb && strings.HasPrefix(key, failKey) {
			return errors.New("storage fault")
		}
		return nil
	})
}

// warned checks that an answer has n warnings, and each text in one of them.
func (e *env) warned(what any, resp *logical.Response, n int, want ...string) {
	e.t.Helper()
	var got []string
	if resp != nil {
		got = resp.Warnings
	}
	text := strings.Join(got, "\n")
	if len(got) != n || slices.ContainsFunc(want, func(s string) bool { return !strings.Contains(text, s) }) {
		e.t.Errorf("%v: got warnings %q, want %d with %q in them", what, got, n, want)
	}
	e.noSecrets("a warning", text)
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
		{45 * time.Second, time.Hour, 63 * time.Minute},
		{45*time.Second + 1, time.Hour, 64 * time.Minute},
		{0, maxKeyLife, maxKeyLife + 3*time.Minute},
	} {
		same(t, fmt.Sprint("end after ", tt.start, tt.maxTTL), endOf(day.Add(tt.start), tt.maxTTL).UTC(), day.Add(tt.want))
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
		"web-" + valid[5:], "web-a" + valid[4:], valid + "a", valid + "-", valid + "\n", valid + " ", valid[:22], // length
		strings.ToUpper(valid), "web-ABC234gzzzz234567ab", "web-abc234GZZZZ234567ab", "web-abc234gzzzz234567aB",
		"web-abc214gzzzz234567ab", "web-abc284gzzzz234567ab", "web-abc234gzzzz234567a0", "web-abc234gzzzz234567a9", // base 32
		"web-abc-34gzzzz234567ab", "web-abc234gzz_z234567ab", "web-abc234gzzzz234567\u00e4", "web-abc234gzzzz234567\x00b",
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
		if len(last) == 20 && (otherTag != tag || !otherEnd.Equal(end) || otherOK != ok) {
			t.Errorf("%q and its last 20 bytes differ", name)
		}
		if suffix := newSuffix(tag, end); ok && last[:12] != "-"+suffix[:11] || !ok && (tag != "" || !end.IsZero()) {
			t.Errorf("%q: got %q, %s, %v, of which newSuffix makes %q", name, tag, end, ok, suffix)
		}
	})
}

// checkFields checks that each field is described, and that secrets and only they are marked.
func checkFields(t *testing.T, where string, fields fieldMap) {
	t.Helper()
	for name, field := range fields {
		marked := field.DisplayAttrs != nil && field.DisplayAttrs.Sensitive
		if field.Description == "" || marked != slices.Contains([]string{"admin_api_key", "client_key", "api_key"}, name) {
			t.Errorf("%s, field %s: described as %q, marked as a secret: %v", where, name, field.Description, marked)
		}
	}
}

// TestPathTable walks over the paths: what Vault's help and OpenAPI document need is there. What writes is forwarded to
// where storage can be written, and what is about a cluster's own leases to its active node.
func TestPathTable(t *testing.T) {
	b := newBackend(nil, "")
	same(t, "help of the engine is missing", b.Help == "", false)
	var got []string
	for _, path := range b.Paths {
		if path.HelpSynopsis == "" || path.HelpDescription == "" || path.DisplayAttrs.OperationPrefix != "openai" {
			t.Errorf("%s: lacks a help or an operation prefix", path.Pattern)
		}
		_, creates := path.Operations[logical.CreateOperation]
		same(t, path.Pattern+": existence check", path.ExistenceCheck != nil, creates)
		checkFields(t, path.Pattern, path.Fields)
		for op, handler := range path.Operations {
			where, p := path.Pattern+" "+string(op), handler.Properties()
			got = append(got, strings.Replace(where, framework.GenericNameRegex("name"), "NAME", 1))
			if handler.Handler() == nil || p.Summary == "" || p.DisplayAttrs.OperationVerb == "" || len(p.Responses) != 1 {
				t.Errorf("%s: lacks a callback, a summary, a verb or a response", where)
			}
			for status, responses := range p.Responses {
				checkFields(t, where, responses[0].Fields)
				if responses[0].Description == "" || (status == http.StatusOK) != (len(responses[0].Fields) > 0) {
					t.Errorf("%s: response %d is %+v", where, status, responses[0])
				}
			}
			own := strings.HasPrefix(where, "creds/") || path.Pattern == "tidy"
			writes := !own && op != logical.ReadOperation && op != logical.ListOperation
			same(t, where+": forwarded by standby and secondary",
				fmt.Sprint(p.ForwardPerformanceStandby, p.ForwardPerformanceSecondary), fmt.Sprint(writes || own, writes))
		}
	}
	checkFields(t, secretType, b.Secrets[0].Fields)
	slices.Sort(got)
	same(t, "operations", strings.Join(got, ", "), "config create, config delete, config read, config update, "+
		"config/rotate update, creds/NAME read, creds/NAME update, metrics read, roles/?$ list, roles/NAME create, "+
		"roles/NAME delete, "+
		"roles/NAME read, roles/NAME update, tidy read, tidy update")
}

// requests are operation and path, like "read config", and what the request names.
type requests []struct {
	request string
	data    fields
}

// request makes a request that is written so.
func (e *env) request(text string, data fields) (*logical.Response, error) {
	op, path, _ := strings.Cut(text, " ")
	return e.Do(logical.Operation(op), path, data)
}

// TestAnswers checks real answers against the schema that Vault's OpenAPI document shows.
func TestAnswers(t *testing.T) {
	e := newConfiguredEnv(t)
	e.sim.Inject(openaisim.Fault{Method: "DELETE", Path: "admin_api_keys", Status: 403, Times: -1})
	for _, tt := range (requests{
		{"list roles", nil}, {"read config", nil}, {"update config", fields{"rotation_period": "30d"}},
		{"update config/rotate", nil}, {"read config", nil},
		{"create roles/scoped", fields{"project_id": "proj_sim", "scopes": "api.all.read", "max_ttl": "300d"}},
		{"list roles", nil}, {"read roles/web", nil}, {"read roles/scoped", nil}, {"read creds/web", nil},
		{"read creds/scoped", nil}, {"read tidy", nil}, {"update tidy", fields{"project_ids": "proj_sim"}},
		{"read tidy", nil}, {"read metrics", nil}, {"read metrics", fields{"format": "prometheus"}},
		{"delete roles/scoped", nil}, {"delete config", nil}, {"read metrics", nil},
	}) {
		t.Run(tt.request, func(t *testing.T) {
			resp, err := e.request(tt.request, tt.data)
			same(t, "error", failure(resp, err), nil)
			op, path, _ := strings.Cut(tt.request, " ")
			schema.ValidateResponse(t, schema.GetResponseSchema(t, e.b().Route(path), logical.Operation(op)), resp, true)
		})
	}
}

// TestMistakes: a caller's mistake is one line of the log, at debug level, so that nobody can fill Vault's log.
func TestMistakes(t *testing.T) {
	e := newConfiguredEnv(t)
	for _, tt := range (requests{
		{"read creds/web", fields{"ttl": 0}}, {"read creds/web", fields{"ttl": "25h"}}, {"read creds/nowhere", nil},
		{"read creds/web", fields{"ttl": aMap}}, {"update config", fields{"admin_api_key": aMap}},
		{"update config", fields{"api_endpoint": "http://example.com"}}, {"update roles/web", fields{"ttl": -1}},
		{"update roles/web", fields{"project_id": "proj_nowhere"}}, {"update tidy", fields{"mount_id": "ABC"}},
		{"update tidy", fields{"project_ids": "../x"}}, {"read metrics", fields{"format": "xml"}},
	}) {
		before := len(e.Log.String())
		resp, err := e.request(tt.request, tt.data)
		e.refusal(resp, err)
		if got := e.Log.String()[before:]; strings.Count(got, "\n") != 1 || !strings.Contains(got, "[DEBUG]") {
			t.Errorf("%s %v: got log %q, want one line at debug level", tt.request, tt.data, got)
		}
	}
}

// bad is a value of a field that must be refused.
type bad struct {
	field, want string // want: in the message, besides the field's name
	value       any    // nil: the field is missing, where there is nothing yet
}

// bads are several values that are refused with the same text.
func bads(field, want string, values ...any) (tests []bad) {
	for _, value := range values {
		tests = append(tests, bad{field, want, value})
	}
	return tests
}

// refusesAll writes each bad value, where there is nothing yet and over valid. Nothing is stored, nor OpenAI asked.
func (e *env) refusesAll(path string, valid fields, tests []bad) {
	e.t.Helper()
	e.wire.sent()
	for _, tt := range tests {
		data := maps.Clone(valid)
		data[tt.field] = tt.value
		maps.DeleteFunc(data, func(_ string, value any) bool { return value == nil })
		e.unchanged(tt, func() { e.refused(path, data, tt.field, tt.want) })
	}
	same(e.t, "requests about bad input", e.wire.sent(), []string{})
	e.ok(path, valid)
	for _, tt := range tests {
		if tt.value != nil {
			e.unchanged(tt, func() { e.refused(path, fields{tt.field: tt.value}, tt.field, tt.want) })
		}
	}
}

// aMap is a value of the wrong type for every field. What it holds must not be quoted.
var aMap = fields{"value": "sk-admin-simulated-secret"}

// badDurations are what no duration field takes.
var badDurations = []any{"soon", -1, "-1h", "999999999999h", int64(math.MaxInt64), aMap, []any{"1h", "2h"}}

// badEndpoints are what api_endpoint does not take.
var badEndpoints = []any{
	"api.openai.com", "api.openai.com/v1", "/v1", "https://", "https:///v1", "https:api.openai.com", "://x", "%",
	"https://exa mple/v1", "https://api.openai.com:-1",
	"https://api.openai.com:x", "https://api.openai.com:/v1", "https://api.openai.com:443:443/v1", "https://::1/v1",
	"https://[::1/v1", "https://user:sk-password@api.openai.com/v1", "https://u@h/v1",
	"https://@api.openai.com/v1", "https://api.openai.com/v1?key=sk-secret", "https://h/v1?", "https://h/v1#part",
	"https://h/v1#", "http://api.openai.com/v1", "http://10.0.0.1/v1", "http://localhost.example.com/v1", "http://0.0.0.0",
	"http://127.0.0.1.example.com/v1", "ftp://api.openai.com", "file:///etc/passwd", "unix:///run/x.sock", aMap,
	"javascript:alert(1)", "ws://127.0.0.1", "https://h/v1/../v2", "https://h/..", "https://h/%2e%2e", "https://h/v1/.%2E",
}

// validConfig is what a first write of config needs.
func validConfig(e *env) fields {
	key, id := e.sim.AdminKey()
	return fields{"admin_api_key": key, "admin_api_key_id": id, "organization_id": openaisim.DefaultOrganization}
}

// TestConfigBadInput: a bad value is refused with its field's name, and nobody has the key sent elsewhere without it.
func TestConfigBadInput(t *testing.T) {
	e := newEnv(t)
	e.refusesAll("config", validConfig(e), slices.Concat(
		bads("admin_api_key", "required", nil, ""), bads("admin_api_key", "8 to 512", "short", strings.Repeat("k", 513)),
		bads("admin_api_key", "printable ASCII characters without spaces", "sk-admin-simulated secret",
			"sk-admin-simulated\r\nX-Header: secret"),
		bads("admin_api_key", "", aMap, []any{"sk-admin-simulated-secret"}),
		bads("admin_api_key_id", "", "key_x/../y", strings.Repeat("k", 129), aMap),
		bads("organization_id", "required", nil, ""),
		bads("organization_id", "", "org-sim\nX-Header: x", strings.Repeat("o", 129), aMap),
		bads("verify_connection", "true or false", "perhaps", aMap),
		bads("disable_automated_rotation", "true or false", "perhaps"), bads("rotation_policy", "", aMap),
		bads("rotation_schedule", "", "now and then", "61 * * * *", "* * * * * *", aMap),
		bads("rotation_schedule", "time zone", "TZ=Europe/Berlin 0 3 * * 0", "CRON_TZ=UTC 0 3 * * 0"),
		bads("rotation_schedule", "no time to come", "0 3 30 2 *"),
		bads("rotation_window", "rotation_schedule", "1h"), bads("admin_key_ttl", "rotation_period", 3600),
		bads("rotation_period", "", badDurations...), bads("rotation_window", "", badDurations...),
		bads("admin_key_ttl", "", badDurations...), bads("api_endpoint", "", badEndpoints...),
	))
	for _, verify := range []bool{true, false} {
		data := fields{"api_endpoint": "https://example.com/v1", "verify_connection": verify}
		e.unchanged(data, func() { e.refused("config", data, "api_endpoint", "together with admin_api_key") })
	}
	e.refused("config", fields{"admin_api_key": "unknown-key", "verify_connection": false},
		"admin_api_key_id is required", "verify_connection")
}

// TestConfig: a write changes what it names, a read shows all but the key, a delete leaves the roles.
func TestConfig(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEnv(t)
		var none *logical.Response
		e.put("roles/web", `{"project_id":"proj_sim"}`)
		notConfigured := func() {
			t.Helper()
			same(t, "read", e.get("config"), none)
			same(t, "delete", e.op(logical.DeleteOperation, "config", nil), none)
			for _, request := range []string{"read creds/web", "update roles/web", "update config/rotate", "update tidy"} {
				resp, err := e.request(request, nil)
				e.refusal(resp, err, "not configured", "write config")
			}
		}
		notConfigured()
		same(t, "write", e.configure(nil), none)
		key, id := e.sim.AdminKey()
		want := fields{
			"admin_api_key_id": id, "organization_id": "org-sim", "api_endpoint": "https://api.openai.com/v1",
			"admin_key_ttl": 0, "admin_key_expires_at": "", "last_rotated": "2000-01-01T00:00:00Z", "next_rotation": "",
			"rotation_manager": "none", "pending_deletion": []string{}, "creating": []string{}, "mount_id": e.b().mountID,
			"rotation_schedule": "", "rotation_window": 0, "rotation_period": 0, "disable_automated_rotation": false,
			"rotation_policy": "", "ca_certificate": "", "client_certificate": "",
		}
		same(t, "config", e.get("config").Data, want)
		time.Sleep(time.Hour)
		for _, step := range []struct{ write, shown fields }{ // shown: where it is not what was written
			{fields{"api_endpoint": "http://[::1]/v1/", "admin_api_key": key + "\n"}, fields{"api_endpoint": "http://[::1]/v1"}},
			{nil, nil}, {fields{"rotation_period": 129600},
				fields{"next_rotation": "2000-01-02T12:00:00Z", "rotation_manager": "plugin"}},
			{fields{"admin_key_ttl": "72h"}, fields{"admin_key_ttl": 259200}}, {fields{"admin_key_ttl": 0}, nil},
			{fields{"disable_automated_rotation": true}, fields{"next_rotation": "", "rotation_manager": "none"}},
			{fields{"rotation_period": 0, "rotation_schedule": "0 6 * * SAT", "disable_automated_rotation": "false"},
				fields{"next_rotation": "2000-01-01T06:00:00Z", "rotation_manager": "plugin"}},
			{fields{"api_endpoint": "", "admin_api_key": key}, fields{"api_endpoint": "https://api.openai.com/v1"}},
		} {
			e.ok("config", step.write)
			maps.Copy(want, step.write)
			maps.Copy(want, step.shown)
			delete(want, "admin_api_key")
			same(t, "config", e.get("config").Data, want)
		}
		other, otherID := e.sim.AddAdminKey("other")
		e.ok("config", fields{"admin_api_key": other})
		maps.Copy(want, fields{"admin_api_key_id": otherID, "last_rotated": "2000-01-01T01:00:00Z"})
		same(t, "config", e.get("config").Data, want)
		e.warned("delete", e.op(logical.DeleteOperation, "config", nil), 1, "not revoked", "admin key")
		same(t, "storage after delete", e.Storage.Keys(""), "[roles/]")
		notConfigured()
	})
}

// TestConfigWithoutUUID: without a UUID of Vault's, creds and tidy say so and ask OpenAI nothing; revocation works.
func TestConfigWithoutUUID(t *testing.T) {
	e := newConfiguredEnv(t)
	l := e.lease("web")
	e.b().mountID = mountID("")
	e.wire.sent()
	for _, request := range []string{"read creds/web", "update tidy"} {
		resp, err := e.request(request, nil)
		same(t, request, fmt.Sprint(resp, " ", err), "<nil> "+errNoUUID.Error())
	}
	same(t, "requests", e.wire.sent(), []string{})
	e.revoke(l)
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
	for _, endpoint := range append(slices.Clone(badEndpoints), defaultEndpoint, "https://api.openai.com/v1/",
		"http://[::1]/v1", "http://localhost:80/v1", "HTTPS://H/a/", "https://[fe80::1%25eth0]:1/", "https://h\\@x/", "") {
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
		if u.Scheme != "https" && !loopback || u.User != nil || u.RawQuery+u.Fragment != "" || err != nil {
			t.Errorf("%q is called as %s (%v)", endpoint, u, err)
		}
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
			e.put("config", `{"admin_api_key":"sk-admin-old","admin_api_key_id":"key_old","organization_id":"org-old"}`)
			data := fields{"admin_api_key": key, "admin_api_key_id": "", "organization_id": openaisim.DefaultOrganization}
			ids := map[string]string{"$first": id, "$last": lastID, "$value": last}
			data[tt.field] = cmp.Or(ids[tt.value], tt.value)
			if tt.list != "" {
				list := strings.NewReplacer("$", key[len(key)-3:], " ", `","redacted_value":"`, "|", `"},{"id":"`).Replace(tt.list)
				list = `{"data":[{"id":"` + list + `"}]}`
				e.sim.Inject(openaisim.Fault{Method: "GET", Path: "admin_api_keys$", Status: 200, Body: list})
			}
			if tt.id == "" {
				e.unchanged("refusal", func() { e.refused("config", data, strings.Split(tt.want, "|")...) })
				return
			}
			e.ok("config", data)
			same(t, "admin_api_key_id", e.config().AdminAPIKeyID, cmp.Or(ids[tt.id], tt.id))
		})
	}
}

// TestProofFaults: whatever befalls the question to OpenAI, a write ends in time. Config is not stored without a proof;
// a role is stored with a warning, unless OpenAI judged it.
func TestProofFaults(t *testing.T) {
	const accepted, warned, refused, broken = "accepted", "warned", "refused", "broken"
	limit := http.Header{"Retry-After": {"50"}}
	for name, tt := range map[string]struct {
		fault        openaisim.Fault
		config, role string // config: text in the refusal; empty: accepted
	}{
		"refuse":          {openaisim.Fault{Kind: "refuse"}, "connection refused", warned},
		"hang":            {openaisim.Fault{Kind: "hang"}, "timed out", warned},
		"redirect":        {openaisim.Fault{Kind: "redirect"}, "redirects are not followed", warned},
		"another":         {openaisim.Fault{Status: 200, Body: `{"id":"another"}`}, "lacks", warned},
		"no OpenAI":       {openaisim.Fault{Status: 404, Body: "<html>"}, "could not be verified", refused},
		"401":             {openaisim.Fault{Status: 401}, "was refused", broken},
		"429":             {openaisim.Fault{Status: 429, Header: limit}, "429", warned},
		"500":             {openaisim.Fault{Status: 500}, "500", warned},
		"503 for a while": {openaisim.Fault{Status: 503, Times: 3}, "", accepted},
	} {
		for path, data := range map[string]fields{"config": {"rotation_period": "720h"}, "roles/web": {"ttl": "2h"}} {
			t.Run(name+" "+path, func(t *testing.T) {
				inBubble(t, func(t *testing.T, e *env) {
					tt.fault.Times = cmp.Or(tt.fault.Times, -1)
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
						e.warned("answer", resp, 1, "unchecked: ")
					case broken:
						e.equal("an error, not the caller's mistake", err != nil, true)
					default:
						e.refusal(resp, err, text)
					}
					same(t, "storage is as it was", maps.Equal(e.Storage.All(), before), want == refused || want == broken)
					same(t, "in time", time.Since(start) <= requestTimeout, true)
				})
			})
		}
	}
}

// TestStorageFaults fails a storage access of each path: an inner error, nothing at OpenAI, and storage is as it was.
func TestStorageFaults(t *testing.T) {
	data := map[string]fields{"config": {"rotation_period": 3600}, "roles/web": {"project_id": "proj_sim", "ttl": "2h"}}
	for _, test := range []string{ // operation, path, verb and key of the access that fails
		"read config get config", "update config get config", "update config put config", "delete config get config",
		"delete config delete config", "update config/rotate get config", "update config/rotate put config",
		"list roles list roles/", "read roles/web get roles/web", "update roles/web get roles/web",
		"update roles/web put roles/web", "delete roles/web delete roles/web", "read creds/web get roles/web",
		"read creds/web get config", "update tidy get config", "read metrics get config", "read metrics list cleanup/",
	} {
		t.Run(test, func(t *testing.T) {
			part := strings.Fields(test)
			e := newConfiguredEnv(t)
			e.Restart() // so that config has to be read
			e.unchanged("fault", func() {
				e.failStorage(part[2], part[3])
				resp, err := e.request(part[0]+" "+part[1], data[part[1]])
				if err == nil || resp != nil || !strings.Contains(err.Error(), "storage fault") {
					t.Errorf("got %v and error %v, want the storage's error", resp, err)
				}
			})
			same(t, "admin keys", len(e.sim.AdminKeys()), 1)
			e.have(0, 0, "after the fault")
			e.Storage.SetFault(nil)
			e.lease("web")
		})
	}
	e := newConfiguredEnv(t)
	e.Restart()
	e.failStorage("get", "config")
	e.warned("role that can't be checked", e.ok("roles/web", data["roles/web"]), 1, "unchecked", "storage fault")
}

// TestConfigJob: a write or delete of config that could not be stored leaves the rotation job as it was registered.
func TestConfigJob(t *testing.T) {
	hourly, none := fields{"rotation_period": "1h"}, fields{"rotation_policy": "p"}
	suspended := fields{"rotation_period": "1h", "disable_automated_rotation": true}
	for name, tt := range map[string]struct{ before, write fields }{ // before nil: no config; write nil: config is deleted
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
			request, verb, data := "update config", "put", validConfig(e)
			if maps.Copy(data, tt.write); tt.write == nil {
				request, verb = "delete config", "delete"
			}
			before := e.System.Jobs()
			e.failStorage(verb, "config")
			if _, err := e.request(request, data); err == nil {
				t.Errorf("%s with a storage fault: got no error", request)
			}
			same(t, "jobs", e.System.Jobs(), before)
		})
	}
}

// TestConfigForgets: a change of organization and a delete name, in warnings and in the log, the admin keys that OpenAI
// may still have. What a rotation began to make stays in config with its organization.
func TestConfigForgets(t *testing.T) {
	e := newConfiguredEnv(t)
	elsewhere := fields{"organization_id": "org-other", "verify_connection": false}
	e.warned("nothing to forget", e.ok("config", elsewhere), 1, "organization_id has changed")
	same(t, "warnings in the log with nothing to forget", e.Log.Count("warn", ""), 0)
	e.configure(nil)
	cfg := e.config()
	cfg.PendingDeletion = []string{"key_one", "key_two"}
	cfg.Creating = []creatingKey{{"vault-admin-a", cfg.OrganizationID, time.Now()}, {"vault-admin-b", "org-b", time.Now()}}
	stored, _ := json.Marshal(cfg)
	names := []string{"key_one, key_two", "vault-admin-a, vault-admin-b"}
	e.put("config", string(stored))
	e.warned("delete", e.op(logical.DeleteOperation, "config", nil), 3, names...)
	e.put("config", string(stored))
	e.warned("another field", e.ok("config", fields{"admin_key_ttl": 0}), 0)
	e.warned("another organization", e.ok("config", elsewhere), 3, names...)
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
			e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Status: 400})
			same(t, "revocation failed", e.Revoke(l) != nil, true)
		}
		e.op(logical.DeleteOperation, "config", nil)
		before := e.Log.Count("", "")
		e.wire.sent()
		e.Run(5 * time.Minute)
		if lines, calls := e.Log.Count("", "")-before, len(e.wire.sent()); lines > 5 || calls > 0 {
			t.Errorf("5 ticks without config: got %d lines of the log and %d calls, want 5 and none", lines, calls)
		}
		e.configure(nil)
		e.Run(time.Minute)
		e.idle()
		e.have(0, 0, "after a tick with config")
	})
}

// TestRoleBadInput: a bad value of a role is refused with its field's name and stores nothing.
func TestRoleBadInput(t *testing.T) {
	e := newEnv(t)
	e.configure(nil)
	var scopes []string
	for i := range 101 {
		scopes = append(scopes, fmt.Sprintf("api.s%d.read", i))
	}
	e.refusesAll("roles/web", fields{"project_id": openaisim.DefaultProject, "ttl": "1h"}, slices.Concat(
		bads("project_id", "required", nil, ""),
		bads("project_id", "", "proj_x/../../admin_api_keys", "proj_x?limit=1", strings.Repeat("p", 129), aMap),
		bads("service_account_name_template", "", aMap, strings.Repeat("x", 257)),
		bads("service_account_name_template", "not valid", "", "{{.RandomSuffix", "{{.RandomSuffix}}{{end}}", "{{.Random}}",
			"{{.RoleName.RandomSuffix}}", "{{nope}}{{.RandomSuffix}}", "{{truncate -1 .RandomSuffix}}"),
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
	account := e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")
	e.ok("roles/web", fields{"scopes": "api.all.read", "service_account_role": "owner"})
	e.refused("roles/web", fields{"service_account_id": account}, "service_account_role", "service_account_id", "exclude")
	e.refused("roles/web", fields{"scopes": ""}, "service_account_role needs scopes")
	e.ok("roles/web", fields{"service_account_id": account, "service_account_role": ""})
	e.ok("roles/web", fields{"scopes": scopes[1:]})
}

// TestRole: a write changes what it names, and a role that was deleted gives no credential.
func TestRole(t *testing.T) {
	e := newEnv(t)
	e.configure(nil)
	account := e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")
	exists := func() string {
		req := &logical.Request{Path: "roles/web.1", Operation: logical.CreateOperation, Storage: e.Storage}
		_, exists, err := e.b().HandleExistenceCheck(t.Context(), req)
		return fmt.Sprint(e.op(logical.ListOperation, "roles", nil).Data, e.get("roles/web.1") != nil, exists, err)
	}
	same(t, "before it is written", exists(), "map[] false false <nil>")
	want := fields{
		"project_id": "proj_sim", "service_account_name_template": "vault-{{.RoleName}}-{{.RandomSuffix}}",
		"service_account_description": "Service account created by Vault", "ttl": 3600, "max_ttl": 86400,
		"enforce_key_expiry": true, "scopes": []string{}, "service_account_role": "", "service_account_id": "",
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
		e.warned(step.write, e.ok("roles/web.1", step.write), strings.Count(fmt.Sprint(step.write), "365d"))
		maps.Copy(want, step.write)
		maps.Copy(want, step.shown)
		same(t, "role", e.get("roles/web.1").Data, want)
	}
	e.ok("roles/short", fields{"project_id": "proj_sim", "max_ttl": "10m"})
	same(t, "ttl with a max_ttl below its default", e.get("roles/short").Data["ttl"], 600)
	same(t, "when it is there", exists(), "map[keys:[short web.1]] true true <nil>")
	same(t, "delete", e.op(logical.DeleteOperation, "roles/web.1", nil), (*logical.Response)(nil))
	same(t, "when it is deleted", exists(), "map[keys:[short]] false false <nil>")
	resp, err := e.request("read creds/web.1", nil)
	e.refusal(resp, err, `role "web.1" does not exist`)
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
		{"service_account_id", "app member", 2, "", ""}, {"service_account_id", "svc_x", 2, "service_account_id|svc_x", ""},
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
			data[tt.field] = e.sim.AddServiceAccount(openaisim.DefaultProject, name, role)
		}
		e.wire.sent()
		if tt.refusal != "" {
			e.unchanged(data, func() { e.refused("roles/web", data, strings.Split(tt.refusal, "|")...) })
		} else {
			e.warned(data, e.ok("roles/web", data), min(len(tt.warning), 1), strings.Split(tt.warning, "|")...)
		}
		same(t, tt.value+": calls", len(e.wire.sent()), tt.calls)
	}
}

// TestRoleAccountName: creds never names an account that it is not about.
func TestRoleAccountName(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		for i, name := range []string{"first", "second"} {
			id := e.sim.AddServiceAccount(openaisim.DefaultProject, name, "member")
			e.sim.Inject(openaisim.Fault{Method: "GET", Skip: 2 - 2*i, Times: 4}) // so that the second's name is not known
			e.ok("roles/web", fields{"service_account_id": id})
			got := e.lease("web").Data
			same(t, "account", fmt.Sprint(got["service_account_id"], got["service_account"]), id+[]string{"first", ""}[i])
		}
	})
}

// TestRoleWrittenMeanwhile: a write that waits for OpenAI is made on what is stored when it has its answer. It lifts no
// restriction that came meanwhile, and brings nothing back of a role that was deleted meanwhile.
func TestRoleWrittenMeanwhile(t *testing.T) {
	const described = " Service account created by Vault"
	restricted, longer := fields{"scopes": "api.a.read"}, fields{"ttl": "3h"}
	whole := fields{"project_id": openaisim.DefaultProject, "ttl": "2h"}
	old := fields{"project_id": openaisim.DefaultProject, "scopes": "api.a.read", "service_account_description": "old"}
	for name, tt := range map[string]struct {
		before, meanwhile, write fields // of roles/new; meanwhile nil: it is deleted
		want                     string // scopes, ttl, description; empty: refused
	}{
		"restricted": {whole, restricted, longer, "[api.a.read] 10800" + described}, "deleted": {old, nil, longer, ""},
		"same field": {whole, fields{"ttl": "1h"}, longer, "[] 10800" + described},
		"created":    {nil, old, whole, "[api.a.read] 7200 old"}, "all named": {old, nil, whole, "[] 7200" + described},
	} {
		t.Run(name, func(t *testing.T) {
			e := newConfiguredEnv(t)
			if tt.before != nil {
				e.ok("roles/new", tt.before)
			}
			e.wire.setFault(func(_ *http.Request, send func() (*http.Response, error)) (*http.Response, error) {
				e.wire.setFault(nil)
				if tt.meanwhile == nil {
					e.op(logical.DeleteOperation, "roles/new", nil)
				} else {
					e.ok("roles/new", tt.meanwhile)
				}
				return send()
			})
			if tt.want == "" {
				e.refused("roles/new", tt.write, "project_id is required")
				same(t, "role", e.get("roles/new"), (*logical.Response)(nil))
				return
			}
			e.ok("roles/new", tt.write)
			got := e.get("roles/new").Data
			same(t, "role", fmt.Sprint(got["scopes"], " ", got["ttl"], " ", got["service_account_description"]), tt.want)
		})
	}
}

// TestRoleWritesAtOnce: of writes that come at once, each of its own field, none is lost.
func TestRoleWritesAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.sim.SetLatency(time.Second)
		e.Storage.SetAfter(func(string, string) error { runtime.Gosched(); return nil })
		want := e.get("roles/web").Data
		var writes sync.WaitGroup
		for _, data := range []fields{{"ttl": 7200}, {"max_ttl": 18000}, {"scopes": []string{"api.a.read"}},
			{"enforce_key_expiry": false}, {"service_account_description": "new"}, {"service_account_name_template": "new"}} {
			maps.Copy(want, data)
			writes.Go(func() { e.ok("roles/web", data) })
		}
		writes.Wait()
		same(t, "role", e.get("roles/web").Data, want)
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
		mount := fmt.Sprint(e.get("config").Data["mount_id"])
		same(t, "mount_id of tidy", e.get("tidy").Data["mount_id"], mount)
		same(t, "mount_id of a pass", e.ok("tidy", nil).Data["mount_id"], mount)
		other, seen := "x-"+newSuffix("bbbbbb", time.Now().Add(-time.Hour)), map[string]bool{}
		for _, template := range []string{"fixed", "{{truncate 1 .RandomSuffix}}", "{{unix_time}}", "{{.DisplayName}}",
			"{{.RandomSuffix}}-{{.DisplayName}}", "{{.DisplayName}}-{{.RandomSuffix}}"} {
			text, _ := json.Marshal(role{ProjectID: "proj_sim", ServiceAccountNameTemplate: template, MaxTTL: 2 * time.Hour})
			e.put("roles/old", string(text))
			for _, e.DisplayName = range []string{"token", "", "…", "---", strings.Repeat("x", 99), other, "{{.}}\r\x00"} {
				for range 10 {
					data := e.lease("old").Data
					name := data["service_account"].(string)
					accounts := e.sim.ServiceAccounts(openaisim.DefaultProject)
					same(t, "account at OpenAI", accounts[len(accounts)-1].Name, name)
					tag, end, ok := parseName(name)
					if want := endOf(time.Now(), 2*time.Hour); !ok || tag != mount || !end.Equal(want) || seen[name] {
						t.Errorf("%q for %q: got %s, want a new name of %s and %s", template, e.DisplayName, name, mount, want)
					}
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
	e.ok("roles/named", fields{"project_id": "proj_sim", "service_account_name_template": "{{.ProjectName}}"})
	e.Restart()
	e.wire.sent()
	for i, want := range []int{2, 1, 1} {
		name := e.lease("named").Data["service_account"].(string)
		same(t, "prefix of the name", name[:len(name)-suffixLength], "Simulated-project-")
		same(t, fmt.Sprint("calls for credential ", i), len(e.wire.sent()), want)
	}
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
		name, err := renderName(template, nameData{RoleName: role, RandomSuffix: suffix, ProjectID: "proj", DisplayName: who})
		if err == nil && !regexp.MustCompile(`^[A-Za-z0-9_-]{1,44}-`+suffix+`$`).MatchString(name) {
			t.Errorf("template %q: got name %q", template, name)
		}
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
	role := map[string]any{
		"project_id": "proj_sim", "max_ttl": "2h", "scopes": k.scopes, "enforce_key_expiry": !k.unexpiring,
	}
	if k.account != "" {
		role["service_account_id"] = e.sim.AddServiceAccount(openaisim.DefaultProject, "there", k.account)
	}
	e.ok("roles/r", role)
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
	key := e.sim.ProjectKeys(openaisim.DefaultProject)[0]
	name := key.Name
	if k.account == "" {
		name = e.sim.ServiceAccounts(openaisim.DefaultProject)[0].Name
	}
	_, end, _ = parseName(name)
	return key.Expires, end
}

// eachInBubble runs test on a configured mount in a bubble for each row of a table.
func eachInBubble[T any](t *testing.T, table map[string]T, test func(t *testing.T, e *env, tt T)) {
	for name, tt := range table {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, e *env) { test(t, e, tt) })
		})
	}
}

// eachCredKind is eachInBubble for the kinds of roles.
func eachCredKind(t *testing.T, test func(t *testing.T, e *env, k credKind)) {
	eachInBubble(t, credKinds, func(t *testing.T, e *env, k credKind) {
		k.write(e)
		test(t, e, k)
	})
}

// callsFail makes the calls to OpenAI of a method ("": any) meet f from now on.
func (e *env) callsFail(method string, f openaisim.Fault) {
	f.Method, f.Times = method, -1
	e.sim.Inject(f)
}

// failPuts is a fault of storage: the plugin's writes fail.
func failPuts(verb, _ string) error { return map[string]error{"put": errStep}[verb] }

// afterCalls has do called once, before the answer to the nth call to OpenAI arrives.
func (e *env) afterCalls(n int, do func()) {
	e.wire.setFault(func(_ *http.Request, send func() (*http.Response, error)) (*http.Response, error) {
		resp, err := send()
		if n--; n == 0 {
			do()
		}
		return resp, err
	})
}

// remembers checks how many lost creates and clean-up entries there are, and that storage has nothing new else.
func (e *env) remembers(lost, cleanups int, when string) {
	e.t.Helper()
	gotLost, got := len(e.b().lostSince(lostTime)), len(e.Storage.Keys(cleanupPrefix))
	if gotLost != lost || got != cleanups || len(e.Storage.Keys("")) > 2+min(cleanups, 1) {
		e.t.Errorf("%s: got %d lost creates, %d clean-up entries, and storage %q, want %d and %d",
			when, gotLost, got, e.Storage.Keys(""), lost, cleanups)
	}
}

// leaseRequest makes a request about a lease with this internal data, past Vault's own checks.
func (e *env) leaseRequest(op logical.Operation, issued time.Time, internal map[string]any) error {
	req := &logical.Request{Operation: op, Storage: e.Storage, Secret: &logical.Secret{InternalData: internal}}
	req.Secret.IssueTime = issued
	return failure(e.b().HandleRequest(context.Background(), req))
}

// must ends the test at an error.
func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// failsWith checks that err has text.
func (e *env) failsWith(what string, err error, text string) {
	e.t.Helper()
	if err == nil || !strings.Contains(err.Error(), text) {
		e.t.Errorf("%s: got error %v, want %q", what, err, text)
		return
	}
	e.noSecrets("an error", err.Error())
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
	type role = map[string]any
	type row struct {
		issue, revoke string // the requests to OpenAI
		role          role
	}
	eachInBubble(t, map[string]row{
		"own account": {`POST ACCOUNTS {LIFE"name":"NAME"}`, account, role{}},
		"scoped":      {keyless + member + key + two, account, role{"scopes": "api.b.c,api.a.read"}},
		"scoped, owner": {
			keyless + owner + key + one, account, role{"scopes": "api.a.read", "service_account_role": "owner"}},
		"existing":         {key + "}", only, role{"service_account_id": ""}},
		"existing, scopes": {key + one, only, role{"service_account_id": "", "scopes": "api.a.read"}},
	}, func(t *testing.T, e *env, tt row) {
		there, role := e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member"), tt.role
		if role["service_account_id"] != nil {
			role["service_account_id"] = there
		}
		for _, expiring := range []bool{true, false} {
			role["enforce_key_expiry"] = expiring
			e.ok("roles/web", role)
			e.wire.sent()
			l, issue := e.lease("web"), tt.issue
			words := e.checkCredential(l, role)
			if !expiring {
				issue = strings.Replace(issue, "LIFE", "", 1)
			}
			if got := words.Replace(strings.Join(e.wire.sent(), "\n")); got != issue {
				t.Errorf("requests:\n got %s\nwant %s", got, issue)
			}
			e.revoke(l)
			if got := words.Replace(strings.Join(e.wire.sent(), "\n")); got != tt.revoke {
				t.Errorf("requests of the revocation: got %s, want %s", got, tt.revoke)
			}
			e.have(1, 0, "after revocation")
		}
	})
}

// checkCredential checks that OpenAI has what the role says, and that the lease says so. It returns a replacer that
// puts words in the place of ids and paths.
func (e *env) checkCredential(l *vaultsim.Lease, role map[string]any) *strings.Replacer {
	e.t.Helper()
	keys, accounts := e.sim.ProjectKeys(openaisim.DefaultProject), e.sim.ServiceAccounts(openaisim.DefaultProject)
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
	data, header := maps.Clone(l.Data), e.wire.header
	delete(data, "api_key")
	e.noSecrets("the lease besides api_key", fmt.Sprint(data))
	for what, values := range map[string][2]any{
		"owner":      {[]any{len(keys), k.ServiceAccountID, made.Role}, []any{1, made.ID, cmp.Or(wantRole, "member")}},
		"name":       {[]any{tag, end}, []any{e.b().mountID, endOf(l.Issued, 24*time.Hour)}},
		"key expiry": {k.Expires, expires},
		"accepted":   {e.sim.Use(l.Data["api_key"].(string)), true},
		"lease":      {[]any{l.Expires.Sub(l.Issued), l.MaxTTL, l.Renewable, l.Warnings}, "[1h0m0s 24h0m0s true []]"},
		"headers": {
			[]string{header.Get("User-Agent"), header.Get("OpenAI-Organization"), header.Get("Content-Type")},
			[]string{"vault-plugin-secrets-openai", "org-sim", "application/json"},
		},
		"key sent": {header.Get("Authorization") == "Bearer "+e.config().AdminAPIKey, true},
		"answer": {data, map[string]any{
			"api_key_id": k.ID, "service_account": made.Name, "service_account_id": made.ID, "project_id": "proj_sim",
			"organization_id": "org-sim", "scopes": k.Scopes, "expires_at": text,
		}},
	} {
		if got, want := fmt.Sprint(values[0]), fmt.Sprint(values[1]); got != want {
			e.t.Errorf("%s: got %s, want %s", what, got, want)
		}
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
				e.must(do(i))
			}
			if got := e.Storage.Counts(); !maps.Equal(got, want) {
				t.Errorf("storage operations for %d: got %v, want %v", n, got, want)
			}
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
		asked       map[string]any
		want        time.Duration
	}{
		{"1h", "24h", usual, nil, hour},
		{"1h", "24h", usual, map[string]any{"ttl": 1}, time.Second},
		{"1h", "24h", usual, map[string]any{"ttl": "24h"}, 24 * hour},
		{"12h", "24h", 6 * hour, nil, 6 * hour},
		{"1h", "24h", 6 * hour, map[string]any{"ttl": "7h"}, 6 * hour},
		{"1h", "24h", 0, map[string]any{"ttl": "7h"}, 7 * hour},
		{"365d", "365d", 10000 * hour, nil, year},
	} {
		inBubble(t, func(t *testing.T, e *env) {
			e.ok("roles/web", map[string]any{"ttl": tt.ttl, "max_ttl": tt.maxTTL})
			e.System.MaxLeaseTTLVal = tt.mount
			l, err := e.Issue("creds/web", tt.asked)
			e.must(err)
			expires, _ := credKind{}.keyExpires(e)
			ttl, over := l.Expires.Sub(l.Issued), expires.Sub(l.Expires)
			warned := strings.Contains(fmt.Sprint(l.Warnings), "mount's maximum")
			if ttl != tt.want || over != min(time.Minute, year-ttl) || warned != (tt.mount == 6*hour) {
				t.Errorf("%+v: got %s, the key outlives it by %s, warnings %q", tt, ttl, over, l.Warnings)
			}
		})
	}
}

// TestCredsRefused: what can't be had is the caller's mistake, with an error that says why, and nothing is made.
func TestCredsRefused(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		refused := func(path string, ttl any, want string) {
			t.Helper()
			resp, err := e.Do(logical.ReadOperation, path, map[string]any{"ttl": ttl})
			e.refusal(resp, err, want)
		}
		for _, ttl := range []any{86401, 0, "", "-1h", "soon", int64(math.MaxInt64), map[string]any{"k": "sk-x"}} {
			refused("creds/web", ttl, "ttl")
		}
		refused("creds/none", 1, `role "none"`)
		e.op(logical.DeleteOperation, "config", nil)
		refused("creds/web", 1, "not configured")
		e.have(0, 0, "after refusals")
	})
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		e.sim.SetMaxKeyLife(600) // OpenAI caps the life of keys
		resp, err := e.Do(logical.ReadOperation, "creds/r", nil)
		e.refusal(resp, err, "expires_in_seconds", "600", "enforce_key_expiry", "ttl and max_ttl")
		e.ok("roles/r", map[string]any{"enforce_key_expiry": true})
		_, err = e.Issue("creds/r", map[string]any{"ttl": 540})
		e.must(err)
	})
}

// TestCredsFailed is about what a caller sees, and what is left at OpenAI and remembered, when OpenAI fails a
// credential's creation. What has an id is undone at once.
func TestCredsFailed(t *testing.T) {
	type fault = openaisim.Fault
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
	eachInBubble(t, map[string]row{
		"refused connection":      {fault: fault{Kind: "refuse"}, want: "connection refused"},
		"limited without end":     refused(429, false),
		"hanging":                 lost("timed out", fault{Kind: "hang", Process: true}),
		"malformed":               lost("not the JSON", fault{Kind: "malformed", Process: true}),
		"no key":                  body(`{"id":"svc_acct_1","api_key":null}`),
		"no value":                body(`{"id":"svc_acct_1","api_key":{"id":"key_1"}}`),
		"id not fit for a URL":    body(`{"id":"a/../b","api_key":{"id":"key_1","value":"sk-x"}}`),
		"neither expiry nor time": {fault: fault{Status: 200, Body: `{"id":"s","api_key":{"id":"k","value":"sk-x"}}`}},
		"bad request":             refused(400, true),
		"refused key":             refused(401, false),
		"role refused":            scoped("role", true, fault{Status: 400}),
		"role malformed":          scoped("role", false, fault{Kind: "malformed", Process: true}),
		"key refused":             scoped("API key", true, fault{Status: 400}),
		"key hanging":             scoped("API key", false, fault{Kind: "hang", Process: true}),
	}, func(t *testing.T, e *env, tt row) {
		if tt.Path != "" {
			e.ok("roles/web", map[string]any{"scopes": "api.a.read"})
		}
		tt.Method, tt.Times = http.MethodPost, cmp.Or(tt.Times, -1)
		e.sim.Inject(tt.fault)
		start := time.Now()
		resp, err := e.Do(logical.ReadOperation, "creds/web", nil)
		if took := time.Since(start); took > requestTimeout+undoTimeout {
			t.Errorf("took %s, want %s at most", took, requestTimeout+undoTimeout)
		}
		made := map[bool]int{true: 1, false: 0}
		want := made[tt.want == "" && tt.Status != 200] // 200 is a gateway's answer
		if failed := failure(resp, err); tt.want == "" {
			e.must(failed)
			warned, works := len(resp.Warnings) == 1, e.sim.Use(resp.Data["api_key"].(string))
			if warned != (want == 0) || works == warned {
				t.Errorf("got warnings %q, want one where the key does not expire; accepted: %v", resp.Warnings, works)
			}
		} else {
			e.failsWith("creds", failed, tt.want)
			id := strings.Contains(failed.Error(), "request id req_")
			if tt.mistake != resp.IsError() || tt.Status >= 400 && !id {
				t.Errorf("got %v, want the caller's mistake: %v, and the request's id", failed, tt.mistake)
			}
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
func (k credKind) handsOut(fault stepFault, step int) bool {
	again := k.calls == 3 && step == 4 // to set the account's role does no harm a second time
	return !fault.all && !fault.cancel && step > 2 && (again || fault.refused || fault.status == 429)
}

// TestCredsFaults: whatever issuing a credential meets at whatever step, minutes later OpenAI has nothing that was not
// handed out, or after a crash by the end in its name and 75 minutes; what was handed out works until its end. A key
// that is not restricted as the role says never exists.
func TestCredsFaults(t *testing.T) {
	for name, k := range credKinds {
		t.Run(name, func(t *testing.T) {
			everyStep(t, 2+k.calls, func(t *testing.T, fault stepFault, at int) bool {
				e := newConfiguredEnv(t)
				k.write(e)
				e.Restart() // so that config is read
				restricted := func() {
					for _, key := range e.sim.ProjectKeys(openaisim.DefaultProject) {
						if got := strings.Join(key.Scopes, ","); got != k.scopes {
							t.Errorf("a key has the scopes %q, want %q", got, k.scopes)
						}
					}
				}
				var l *vaultsim.Lease
				var err error
				start := time.Now()
				reached := e.atStep(fault, at, restricted, func(ctx context.Context) {
					l, err = e.IssueContext(ctx, "creds/r", nil)
				})
				if want := !reached || k.handsOut(fault, at); (err == nil) != want {
					t.Fatalf("creds: got error %v, want a credential: %v", err, want)
				}
				if err == nil {
					e.livesOn(k, l)
					return reached
				}
				e.noSecrets("an error", err.Error())
				if !fault.all && (fault.arrives || k.calls == 3 && at >= 4) {
					k.have(e, 0, "at once, since the ids are known")
				}
				if fault.crash {
					e.Run(time.Until(endOf(start, 2*time.Hour).Add(75 * time.Minute)))
				} else {
					e.Run(4 * time.Minute)
				}
				k.have(e, 0, "later")
				if got := fmt.Sprint(e.Storage.Keys("")); got != "[config roles/]" {
					t.Errorf("storage: got %s, want config and roles only", got)
				}
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
	if !e.sim.Use(l.Data["api_key"].(string)) && k.account != "none" {
		e.t.Error("a second before its lease's end the key is not accepted")
	}
	e.Run(time.Minute)
	k.have(e, 0, "after the lease")
	e.remembers(0, 0, "after the lease")
}

// TestCredsUndone: when the request ends while its last answer arrives, the credential is deleted at once. Where that
// fails it is remembered, also over a crash, and where nothing can be stored it goes as a lost create or by its end.
func TestCredsUndone(t *testing.T) {
	fails := openaisim.Fault{Method: http.MethodDelete, Times: -1}
	for name, tt := range map[string]struct {
		fault                openaisim.Fault
		storage              func(verb, key string) error
		left, lost, cleanups int // at once
	}{
		"undone":            {openaisim.Fault{Path: "^none$"}, nil, 0, 0, 0},
		"stored":            {fails, nil, 1, 0, 1},
		"stored, crash":     {fails, nil, 1, 0, 1},
		"not stored":        {fails, failPuts, 1, 1, 0},
		"not stored, crash": {fails, failPuts, 1, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			eachCredKind(t, func(t *testing.T, e *env, k credKind) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				e.afterCalls(k.calls, cancel)
				e.sim.Inject(tt.fault)
				e.Storage.SetFault(tt.storage)
				if _, err := e.IssueContext(ctx, "creds/r", nil); !errors.Is(err, context.Canceled) {
					t.Errorf("creds: got %v, want that the request was cancelled", err)
				}
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

// TestCredsClock: with a clock that is behind OpenAI's by more than a few minutes there is no credential, since its
// name would have too early an end; the error says so, and nothing is left. A clock that is ahead does no harm.
func TestCredsClock(t *testing.T) {
	for behind, want := range map[time.Duration]bool{
		-24 * time.Hour: true, clockTolerance: true, clockTolerance + 3*time.Minute: false, 24 * time.Hour: false,
	} {
		eachCredKind(t, func(t *testing.T, e *env, k credKind) {
			e.sim.Advance(behind)
			key, id := e.sim.AddAdminKey("of this time")
			e.configure(map[string]any{"admin_api_key": key, "admin_api_key_id": id})
			l, err := e.Issue("creds/r", nil)
			if want {
				e.must(err)
				e.livesOn(k, l)
				return
			}
			e.failsWith("creds", err, "clock is behind OpenAI's")
			k.have(e, 0, "at once")
			e.remembers(0, 0, "at once")
		})
	}
}

// TestCredsTooOld: when the clock jumps while OpenAI is asked, so that the lease could go past the end in the name,
// nothing is handed out. In a suspended machine the request's own clock stands still, which no bubble can show.
func TestCredsTooOld(t *testing.T) {
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		e.afterCalls(k.calls, func() { time.Sleep(3*time.Minute + time.Second) })
		_, err := e.Issue("creds/r", map[string]any{"ttl": "2h"})
		e.failsWith("creds", err, "too old")
		k.have(e, 0, "at once")
	})
}

// TestCredsRenewal: each renewal moves the key's expiry at OpenAI with its lease's end, but never past the longest
// life. However long it waits, the key outlives the lease that Vault makes of the answer, and ends before tidy takes
// its account for left behind.
func TestCredsRenewal(t *testing.T) {
	none, after := openaisim.Fault{Path: "^none$"}, http.Header{"Retry-After": {"48"}}
	limited := openaisim.Fault{Status: 429, Header: after}
	for name, tt := range map[string]struct {
		latency time.Duration
		fault   openaisim.Fault
		calls   int
		over    time.Duration // how long at most a key outlives its lease
	}{
		"quick":         {6 * time.Second, none, 1, keyGrace + 6*time.Second},
		"slow answer":   {24 * time.Second, none, 1, keyGrace + 24*time.Second},
		"slow errors":   {20 * time.Second, openaisim.Fault{Times: 2}, 3, keyGrace + requestTimeout},
		"limited":       {0, limited, 2, keyGrace + requestTimeout},
		"limited, slow": {12 * time.Second, limited, 2, keyGrace + requestTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			eachCredKind(t, func(t *testing.T, e *env, k credKind) {
				e.ok("roles/r", map[string]any{"max_ttl": "4h"})
				e.System.MaxLeaseTTLVal = 3 * time.Hour
				e.sim.SetLatency(6 * time.Second)
				l := e.lease("r")
				e.sim.SetLatency(tt.latency)
				for _, step := range []struct{ wait, increment, want time.Duration }{ // want: the TTL, if that is left
					{1500 * time.Millisecond, 0, time.Hour},
					{45 * time.Minute, 0, time.Hour},
					{time.Minute, 10 * time.Minute, 10 * time.Minute},
					{8 * time.Minute, 2 * time.Hour, 2 * time.Hour},
					{100 * time.Minute, 0, time.Hour},
					{18 * time.Minute, 0, time.Hour},
				} {
					time.Sleep(step.wait)
					e.sim.Inject(tt.fault)
					e.wire.sent()
					e.must(e.Renew(l, step.increment))
					ttl, want := time.Until(l.Expires), min(step.want, time.Until(l.Issued.Add(3*time.Hour)))
					if off := ttl - want; off.Abs() > time.Second {
						t.Errorf("after %s: got ttl %s, want %s", time.Since(l.Issued), ttl, want)
					}
					expires, end := k.keyExpires(e)
					over, sent := expires.Sub(l.Expires), e.wire.sent()
					fits := over >= 0 && over <= tt.over && expires.Before(end.Add(tidyMargin)) && len(sent) == tt.calls
					if k.unexpiring {
						fits = expires.IsZero() && len(sent) == 0
					}
					if !fits {
						t.Errorf("after %s: got requests %q and a key that outlives its lease by %s, until %s; end %s",
							time.Since(l.Issued), sent, over, expires, end)
					}
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
			e.must(e.Renew(l, 10*time.Hour))
			expires, _ := k.keyExpires(e)
			bound := l.Issued.Add(latest)
			if l.MaxTTL > latest || !l.Expires.Equal(bound) || expires.After(bound.Add(keyGrace)) {
				t.Fatalf("after %s: got max_ttl %s, a lease until %s and a key until %s, want %s at most",
					time.Since(l.Issued), l.MaxTTL, l.Expires, expires, latest)
			}
		}
		renew(time.Minute, 2*time.Hour)
		e.ok("roles/r", map[string]any{"max_ttl": "90m"})
		renew(time.Minute, 90*time.Minute)
		e.ok("roles/r", map[string]any{"max_ttl": "1m", "ttl": "1m"})
		e.failsWith("renewal after the new max_ttl", e.Renew(l, 0), "can't be renewed")
		e.ok("roles/r", map[string]any{"max_ttl": "48h", "ttl": "12h"})
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
		issued, internal := time.Now(), e.get("creds/web").Secret.InternalData
		_, end := credKind{}.keyExpires(e)
		hour, last := issued.Add(time.Hour), end.Add(-keyGrace)
		for _, tt := range []struct {
			at, issued time.Time
			calls      int // 0: it can't be renewed
		}{
			{hour, issued, 1},
			{hour, last.Add(-time.Second), 1},
			{hour, last.Add(-time.Second / 2), 0}, // half a second is no TTL
			{hour, last.Add(48 * time.Hour), 0},
			{last, issued, 0},
			{end.Add(time.Hour), issued, 0},
		} {
			time.Sleep(time.Until(tt.at))
			e.wire.sent()
			if err := e.leaseRequest(logical.RenewOperation, tt.issued, internal); tt.calls == 0 {
				e.failsWith("renew", err, "can't be renewed")
			} else {
				e.must(err)
			}
			if sent := e.wire.sent(); len(sent) != tt.calls {
				t.Errorf("%+v: got requests %q", tt, sent)
			}
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
	fails := func(f openaisim.Fault) func(*env) { return func(e *env) { e.callsFail("", f) } }
	storage := func(e *env) { e.Storage.SetFault(func(string, string) error { return errStep }) }
	eachInBubble(t, map[string]row{
		"deleted role": {`role "web"`, false, func(e *env) { e.op(logical.DeleteOperation, "roles/web", nil) }},
		"no config":    {"not configured", false, func(e *env) { e.op(logical.DeleteOperation, "config", nil) }},
		"expired key":  {"Expired", false, func(e *env) { e.sim.Advance(2 * time.Hour) }},
		"policy":       {"ttl and max_ttl", false, func(e *env) { e.sim.SetMaxKeyLife(600) }},
		"unreachable":  {"no answer from", true, fails(openaisim.Fault{Kind: "refuse"})},
		"server error": {"500", true, fails(openaisim.Fault{Status: 500})},
		"deleted key":  {"404", false, fails(openaisim.Fault{Status: 404})},
		"storage":      {errStep.Error(), true, storage},
	}, func(t *testing.T, e *env, tt row) {
		l := e.lease("web")
		before, ends := fmt.Sprint(e.sim.ProjectKeys(openaisim.DefaultProject)), l.Expires
		tt.prepare(e)
		err := e.Renew(l, 0)
		e.failsWith("renew", err, tt.want)
		// Of an error response Vault has the text only.
		if inner := errors.As(err, new(*apiError)) || errors.Is(err, errStep); inner != tt.inner {
			t.Errorf("got %v as an inner error: %v, want %v", err, inner, tt.inner)
		}
		if got := fmt.Sprint(e.sim.ProjectKeys(openaisim.DefaultProject)); got != before || !l.Expires.Equal(ends) {
			t.Errorf("got keys %s and a lease until %s, want %s and %s", got, l.Expires, before, ends)
		}
	})
}

// TestCredsRevokeGone: what is gone already is revoked, as is what OpenAI fails to delete three times in a row. What
// may still be there is not, and is remembered.
func TestCredsRevokeGone(t *testing.T) {
	type fault = openaisim.Fault
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
		eachInBubble(t, map[string]row{
			"errors":            thrice(fault{Status: 500}),
			"limited":           thrice(fault{Status: 429, Header: http.Header{"Retry-After": {"5"}}}),
			"closed":            thrice(fault{Kind: "close"}),
			"deleted already":   thrice(fault{Kind: "close", Process: true}),
			"project archived":  {"", func(e *env) { e.sim.ArchiveProject(openaisim.DefaultProject) }},
			"project deleted":   {"", all(gone)},
			"project forgotten": {"", func(e *env) { deletions(fault{Status: 400})(e); e.callsFail("GET", gone) }},
			"project is active": {"400", deletions(fault{Status: 400})},
			"no access":         {"403", all(fault{Status: 403})},
			"another server":    {"404", all(fault{Status: 404, Body: "<html>no such page"})},
			"not confirmed":     {"lacks", deletions(fault{Status: 200, Body: `{"deleted":false}`})},
			"no config":         {"not configured", func(e *env) { e.op(logical.DeleteOperation, "config", nil) }},
			"mistyped endpoint": {"404", func(e *env) {
				e.configure(map[string]any{"api_endpoint": "https://api.openai.com/v2", "verify_connection": false})
			}},
		}, func(t *testing.T, e *env, tt row) {
			credKinds[kind].write(e)
			l := e.lease("r")
			tt.prepare(e)
			start := time.Now()
			if err := e.Revoke(l); tt.want != "" {
				e.failsWith("revoke", err, tt.want)
			} else if took := time.Since(start); err != nil || took > 20*time.Second {
				t.Errorf("revoke: got %v after %s, want success within 20s", err, took)
			}
			if got := len(e.Storage.Keys(cleanupPrefix)); (got == 1) != (tt.want != "") {
				t.Errorf("clean-up entries: got %d, want one only for what may be there", got)
			}
		})
	}
}

// TestCredsRevokeHandedOver: a revocation that keeps failing, in whatever way, is remembered, and after its fifth
// failure it is the plugin's alone, which tries until OpenAI confirms; at a rate limit after its first. Failures of the
// plugin's own tries do not count.
func TestCredsRevokeHandedOver(t *testing.T) {
	for _, kind := range []string{"plain", "existing account"} {
		eachInBubble(t, map[string]openaisim.Fault{
			"500": {}, "429": {Status: 429}, "401": {Status: 401}, "hang": {Kind: "hang"}, "refuse": {Kind: "refuse"},
			"429 for 20s": {Status: 429, Header: http.Header{"Retry-After": {"20"}}},
		}, func(t *testing.T, e *env, fault openaisim.Fault) {
			credKinds[kind].write(e)
			secret := e.get("creds/r").Secret
			l, err := leaseOf(secret)
			e.must(err)
			e.callsFail("", fault)
			for attempt := 1; attempt <= maxRevokeFailures+1; attempt++ {
				start := time.Now()
				err := e.leaseRequest(logical.RevokeOperation, start, secret.InternalData)
				from := maxRevokeFailures
				if fault.Status == http.StatusTooManyRequests {
					from = 1
				}
				if took := time.Since(start); (err == nil) != (attempt >= from) || took > 70*time.Second {
					t.Errorf("attempt %d: got %v after %s, want an error before %d, in 70s", attempt, err, took, from)
				}
				var entry lease
				_ = json.Unmarshal([]byte(e.Storage.All()[cleanupPrefix+l.id()]), &entry)
				taken := e.get("metrics").Data[metricPrefix+"revocations_handed_over_total"]
				lines, over := e.Log.Count("error", l.id()), max(0, attempt-from+1)
				if entry.Failures != attempt || lines != over || taken != float64(over) {
					t.Errorf("attempt %d: the entry has %d failures, the log %d errors, the metric %v, want %d there",
						attempt, entry.Failures, lines, taken, over)
				}
				e.Run(5 * time.Minute) // sweep tries, and fails
			}
			e.Restart()
			e.sim.ClearFaults()
			e.Run(time.Minute)
			e.idle()
			credKinds[kind].have(e, 0, "after OpenAI has recovered")
			e.remembers(0, 0, "in the end")
		})
	}
}

// TestCredsRevokeStorageFault: where the failure can't be remembered Vault is told of both, and keeps the lease. When
// it has given up, tidy deletes the account after the end in its name.
func TestCredsRevokeStorageFault(t *testing.T) {
	eachCredKind(t, func(t *testing.T, e *env, k credKind) {
		e.ok("roles/r", map[string]any{"ttl": "5m", "max_ttl": "1h"})
		l := e.lease("r")
		e.callsFail(http.MethodDelete, openaisim.Fault{Status: 403})
		e.Storage.SetFault(failPuts)
		if err := e.Revoke(l); !errors.Is(err, errStep) || !isStatus(err, http.StatusForbidden) {
			t.Errorf("revoke: got %v, want both failures", err)
		}
		e.Run(30 * time.Minute)
		if !l.Irrevocable {
			t.Errorf("got %d failed attempts, want that Vault has given up", l.Attempts)
		}
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
		internal, l := e.get("creds/r").Secret.InternalData, e.lease("r")
		e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Process: true, Path: "(service_accounts|api_keys)$"})
		_, err := e.Issue("creds/r", nil)
		e.failsWith("creds", err, "500")              // a lost create
		e.callsFail("", openaisim.Fault{Status: 404}) // as OpenAI would say of the other organization's things
		e.ok("config", map[string]any{
			"organization_id": "org-other", "admin_api_key": "sk-admin-other", "admin_api_key_id": "key_other",
			"verify_connection": false,
		})
		e.sim.ResetCalls()
		for attempt := 1; attempt < maxRevokeFailures; attempt++ {
			err := e.leaseRequest(logical.RevokeOperation, time.Now(), internal)
			e.failsWith("revoke", err, openaisim.DefaultOrganization)
		}
		e.must(e.leaseRequest(logical.RevokeOperation, time.Now(), internal)) // the plugin takes it over
		if err := e.Renew(l, 0); !k.unexpiring {
			e.failsWith("renew", err, openaisim.DefaultOrganization)
		}
		e.failsWith("revoke", e.Revoke(l), openaisim.DefaultOrganization)
		e.Run(5 * time.Minute)
		if calls := fmt.Sprint(e.sim.Calls()); strings.Contains(calls, openaisim.DefaultProject) {
			t.Errorf("the other organization was asked about the project: %s", calls)
		}
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
	for made, role := range []map[string]any{ // before the account is made, and after
		{"service_account_name_template": "{{.ProjectName}}"}, {"scopes": "api.a.read"},
	} {
		inBubble(t, func(t *testing.T, e *env) {
			e.ok("roles/web", role)
			e.afterCalls(1, func() {
				cfg := e.config()
				cfg.OrganizationID = "org-other"
				e.must(putJSON(t.Context(), e.Storage, configPath, cfg))
				e.b().InvalidateKey(t.Context(), configPath) // as when another node has changed config
			})
			e.wire.sent()
			_, err := e.Issue("creds/web", nil)
			e.failsWith("creds", err, openaisim.DefaultOrganization)
			if sent := e.wire.sent(); len(sent) != 1 {
				t.Errorf("requests: got %q, want none after the change", sent)
			}
			e.have(made, 0, "while config has the other organization")
			e.remembers(0, made, "while config has the other organization")
			e.configure(nil)
			e.Run(time.Minute)
			e.idle()
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
			n := 0
			e.wire.setFault(func(_ *http.Request, send func() (*http.Response, error)) (*http.Response, error) {
				if n++; n == call { // the rotation's calls come after
					e.ok("config/rotate", nil)
				}
				return send()
			})
			err := do()
			refused := slices.DeleteFunc(e.sim.Calls(), func(c openaisim.Call) bool { return c.Status == 200 })
			if err != nil || len(refused) != 1 || refused[0].Status != http.StatusUnauthorized {
				t.Errorf("call %d: got error %v and failed calls %v, want one that was refused", call, err, refused)
			}
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
		e.put("config", `{"admin_api_key":"`+key+`","api_endpoint":"https://api.openai.com/v1/",`+
			`"organization_id":"org-sim","last_rotated_time":"1999-12-31T12:00:00Z","rotation_period":2592000000000}`)
		e.put("roles/web", `{"project_id":"proj_sim","ttl":7200000000000,"max_ttl":14400000000000,`+
			`"service_account_name_template":"{{.RoleName}}-{{.RandomSuffix}}","service_account_description":"Made"}`)
		l := e.lease("web")
		if got := fmt.Sprint(l.Expires.Sub(l.Issued), l.MaxTTL); got != "2h0m0s 4h0m0s" {
			t.Errorf("lease: got ttl and max_ttl %s", got)
		}
		ids := func(project, key, account any) map[string]any {
			return map[string]any{"secret_type": "openai_api_key", // as it stands in Vault's storage
				"project_id": project, "api_key_id": key, "service_account_id": account}
		}
		old := ids("proj_sim", l.Data["api_key_id"], l.Data["service_account_id"])
		e.ok("config/rotate", nil)
		e.failsWith("renew", e.leaseRequest(logical.RenewOperation, l.Issued, old), "role")
		e.must(e.leaseRequest(logical.RevokeOperation, l.Issued, old))
		e.have(0, 0, "after revocation")
		for _, bad := range []map[string]any{
			ids("proj_sim", nil, nil), ids("proj/../x", nil, "svc_acct_x"), ids(1, nil, nil),
		} {
			e.failsWith("revoke", e.leaseRequest(logical.RevokeOperation, l.Issued, bad), "lease")
		}
	})
}

const ours = openaisim.DefaultProject

// addKey makes a key on an account of a project at OpenAI, as somebody else does.
func (e *env) addKey(project, account, name string) string {
	e.t.Helper()
	body, _ := json.Marshal(map[string]string{"project": project, "account": account, "name": name})
	resp, err := (&http.Client{Transport: e.sim.Transport()}).Post("http://sim/_sim/keys", "", bytes.NewReader(body))
	var key struct{ ID string }
	if err != nil || json.NewDecoder(resp.Body).Decode(&key) != nil || key.ID == "" {
		e.t.Fatalf("making a key at OpenAI: %v", err)
	}
	return key.ID
}

// ended makes n accounts of the mount at OpenAI whose end has passed for so long, and returns their ids.
func (e *env) ended(project string, n int, since time.Duration) (ids []string) {
	for range n {
		ids = append(ids, e.sim.AddServiceAccount(project, "web-"+newSuffix(e.b().mountID, time.Now().Add(-since)), "member"))
	}
	return ids
}

// names returns the names of the accounts and keys in the projects by their ids.
func (e *env) names(projects ...string) map[string]string {
	names := map[string]string{}
	for _, p := range projects {
		for _, a := range e.sim.ServiceAccounts(p) {
			names[a.ID] = a.Name
		}
		for _, k := range e.sim.ProjectKeys(p) {
			names[k.ID] = k.Name
		}
	}
	return names
}

// quiet lets time pass until nothing works in the background any more.
func (e *env) quiet() {
	for _, mu := range []*sync.Mutex{&e.b().knownMu, &e.b().passMu} {
		for !mu.TryLock() {
			time.Sleep(100 * time.Millisecond)
		}
		mu.Unlock()
	}
}

// look makes one tick, which must not take time, and waits for what it has begun.
func (e *env) look() {
	e.t.Helper()
	start := time.Now()
	e.Tick()
	e.equal("time of a tick", time.Since(start), 0*time.Second)
	e.quiet()
}

// tidied checks fields of an answer of tidy.
func (e *env) tidied(resp *logical.Response, want fields) {
	e.t.Helper()
	for field, value := range want {
		e.equal(field, resp.Data[field], value)
	}
}

// tidy runs a pass by hand and checks fields of its answer.
func (e *env) tidy(data, want fields) *logical.Response {
	e.t.Helper()
	resp := e.ok("tidy", data)
	e.tidied(resp, want)
	return resp
}

// loses reads a credential which OpenAI makes, but whose answer is lost.
func (e *env) loses() {
	e.t.Helper()
	e.sim.Inject(openaisim.Fault{Method: "POST", Process: true})
	_, err := e.Issue("creds/web", nil)
	e.fails("a lost create", err, "500")
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
		e.sim.Inject(openaisim.Fault{Method: "POST", Path: path, Kind: "close", Process: true, Late: late})
		_, _ = e.Issue("creds/web", nil)
	}}
}

// killed is a create after whose first POST a process ends, without that anything else is done.
func killed(name string, kill func(e *env)) tidyFault {
	return tidyFault{name: name, meet: func(e *env, _ *vaultsim.Snapshot) {
		issue := func(ctx context.Context) { _, _ = e.IssueContext(ctx, "creds/web", nil) }
		e.atStep(stepFault{effect: true, all: true}, 2, nil, issue)
		kill(e)
	}}
}

var tidyFaults = []tidyFault{
	{name: "dropped answer", meet: func(e *env, _ *vaultsim.Snapshot) { e.DropNext(); _, _ = e.Issue("creds/web", nil) }},
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
		e.failing("DELETE", "projects", 403)
		e.Run(2 * time.Hour) // it ends in the middle
		e.sim.ClearFaults()
		e.equal("handed over, and leases", fmt.Sprint(e.metric("revocations_handed_over_total"), len(e.Leases())), "1 0")
	}},
	{name: "mount disabled in trouble", meet: func(e *env, _ *vaultsim.Snapshot) {
		e.lease("web")
		e.failing("DELETE", "projects", 403)
		tag := e.b().mountID
		e.ForceDisable()
		e.sim.ClearFaults()
		other := newEnvOn(e.t, e.sim)
		other.configure(nil)
		other.tidy(fields{"mount_id": tag}, fields{"deleted": 0})
		other.Run(75 * time.Minute)
		other.quiet()
		e.equal("something was deleted", other.tidy(fields{"mount_id": tag}, nil).Data["deleted"].(int) > 0, true)
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
							e.addKey(ours, shared, "other")
						}
					}
					e.ok("roles/web", role)
					others := len(e.names(ours))
					left := func() int { return len(e.names(ours)) - others }
					end := time.Now().Add(time.Hour + 3*time.Minute) // a request, a minute of grace, whole minutes

					fault.meet(e, before)
					if fault.lost && len(e.Leases()) == 0 {
						e.Run(4 * time.Minute)
						e.equal("accounts and keys after four ticks", left(), 0)
					} else if fault.late == 0 && time.Now().Before(end) && left() == 0 {
						t.Error("the fault left nothing, so that this shows nothing")
					}
					e.Run(max(fault.late, time.Until(end)) + 75*time.Minute)
					e.equal("accounts and keys, leases, clean-up entries",
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
	w := &world{env: newConfiguredEnv(t), r: rand.New(rand.NewPCG(seed, 0)), max: map[string]time.Duration{},
		held: map[string]*held{}}
	w.tag, w.others = w.b().mountID, 1
	w.sim.AddProject("proj_b", "B")
	w.edit("web", fields{"service_account_name_template": "{{.RandomSuffix}}x{{.DisplayName}}"})
	w.edit("scoped", fields{"scopes": "api.responses.write", "service_account_name_template": "{{.DisplayName}}"})
	w.edit("key", fields{"project_id": "proj_b",
		"service_account_id": w.sim.AddServiceAccount("proj_b", "shared", "member")})
	w.wire.setFault(func(req *http.Request, send func() (*http.Response, error)) (*http.Response, error) {
		if req.Method == "DELETE" {
			w.judge(path.Base(req.URL.Path))
		}
		return send()
	})
	return w
}

// made tells whether the mount has asked OpenAI for a thing of this name.
func (w *world) made(name string) bool {
	w.wire.mu.Lock()
	defer w.wire.mu.Unlock()
	return slices.ContainsFunc(w.wire.requests, func(r string) bool { return strings.Contains(r, `"name":"`+name+`"`) })
}

// judge fails the test if the mount must not delete what has this id.
func (w *world) judge(id string) {
	name, there := w.names(ours, "proj_b")[id]
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
			if strings.HasPrefix(key, rolePrefix) && strings.Contains(value, `"`+id+`"`) {
				w.t.Errorf("DELETE of %q, which %s names", name, key)
			}
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
	if resp, err := w.Write("roles/"+role, data); failure(resp, err) == nil { // else its account is gone
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
			w.failing("DELETE", "", 403)
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
	w.addKey(project, w.sim.AddServiceAccount(project, name, "member"), name)
	w.others += 2
}

// name makes a role name an account that this mount has made.
func (w *world) name() {
	accounts := slices.DeleteFunc(w.sim.ServiceAccounts(ours),
		func(a openaisim.ServiceAccount) bool { return !w.made(a.Name) })
	if len(accounts) > 0 {
		w.edit("key-on-ours", fields{"service_account_id": pick(w.r, accounts).ID})
	}
}

// jump sets this machine's clock ahead or, which the bubble shows as OpenAI's being ahead, back.
func (w *world) jump(d time.Duration) {
	time.Sleep(d) // not if it is negative
	w.sim.Advance(-d)
	w.offset -= d
	w.look()
	w.ok("tidy", nil)
}

// run lets Vault work, and then looks twice what is to be deleted: at a tick and by hand.
func (w *world) run(minutes int) {
	w.running.Store(true)
	w.Run(time.Duration(minutes) * time.Minute)
	w.quiet()
	w.running.Store(false)
	w.look()
	w.ok("tidy", nil)
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
		func() { w.sim.Inject(openaisim.Fault{Method: "POST", Path: "s$", Process: true}); w.issue() },
		func() { w.op("delete", "roles/key-on-ours", nil); delete(w.max, "key-on-ours") },
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
			w.op("delete", "roles/key-on-ours", nil)
			time.Sleep(49 * time.Hour)
			w.run(75)
			w.equal("left in the end", len(w.names(ours, "proj_b"))-w.others, 0)
			leases, deletions = leases+len(w.held), deletions+w.deleted
			if t.Failed() {
				t.Logf("the seed was %d", seed)
			}
		})
	}
	if !t.Failed() && (leases < 300 || deletions < 300) {
		t.Errorf("got %d leases and %d deletions in all, which show too little", leases, deletions)
	}
}

// TestTidyByHand: a pass looks through all pages of all active projects, tells what it found and deletes what is past
// its end by ten minutes. A dry run deletes nothing and lists it.
func TestTidyByHand(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		none := fields{"mount_id": e.b().mountID, "dry_run": false, "started": "", "finished": "",
			"projects": 0,
			"found":    0, "deleted": 0, "failed": 0, "leftover": "[]", "pending": "[]", "errors": "[]"}
		e.tidied(e.get("tidy"), none)
		e.sim.AddProject("proj_b", "B")
		e.sim.AddProject("proj_old", "Archived")
		e.sim.ArchiveProject("proj_old")
		e.crowd(150)
		due := append(e.ended(ours, 129, 11*time.Minute), e.ended("proj_b", 1, 24*time.Hour)...)
		e.ended("proj_b", 2, 9*time.Minute)
		shared := e.sim.AddServiceAccount("proj_b", "shared", "none") // OpenAI lists its keys on demand only
		due = append(due, e.addKey("proj_b", shared, "x-"+newSuffix(e.b().mountID, time.Now().Add(-time.Hour))))
		live := e.lease("web")
		e.put(cleanupPrefix+"svc_acct_x", `{}`)

		now := formatTime(time.Now())
		want := fields{"mount_id": e.b().mountID, "dry_run": true, "started": now, "finished": now,
			"projects": 2,
			"found":    134, "deleted": 0, "failed": 0, "pending": "[svc_acct_x]", "errors": "[]"}
		listed := e.tidy(fields{"dry_run": true}, want).Data["leftover"].([]string)
		strange := slices.ContainsFunc(listed, func(id string) bool { return !slices.Contains(due, id) })
		e.equal("leftover, and whether it has others", fmt.Sprint(len(listed), strange), "100 false")
		want["dry_run"], want["deleted"], want["leftover"] = false, 131, "[]"
		e.tidy(nil, want)
		e.tidied(e.get("tidy"), want)
		left := e.names(ours, "proj_b")
		e.equal("accounts and keys that are left", len(left), 150+2+1+2)
		e.equal("one that was due is left", slices.ContainsFunc(due, func(id string) bool { return left[id] != "" }), false)
		e.equal("the live key is accepted", e.sim.Use(live.Data["api_key"].(string)), true)
		e.refused("tidy", fields{"project_ids": "proj_nil"}, "project_ids", "proj_nil")
		// By their ids: an archived project has nothing that could be left.
		e.ended("proj_b", 1, time.Hour)
		e.tidy(fields{"project_ids": []string{"proj_old", ours, ours}},
			fields{"projects": 2, "found": 1, "deleted": 0, "failed": 0, "errors": "[]"})
		e.Restart()
		none["pending"] = "[svc_acct_x]"
		e.tidied(e.get("tidy"), none)
	})
}

// TestTidyDryRun: a dry run deletes neither what was lost nor what waits for clean-up.
func TestTidyDryRun(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.loses()
		lost, id := e.sim.ServiceAccounts(ours)[0].ID, e.sim.AddServiceAccount(ours, "x", "member")
		e.put(cleanupPrefix+id, fmt.Sprintf(`{"project_id":%q,"service_account_id":%q}`, ours, id))
		e.tidy(fields{"dry_run": true}, fields{"deleted": 0, "leftover": "[" + lost + "]", "pending": "[" + id + "]"})
		e.have(2, 1, "after a dry run")
		e.look()
		e.have(0, 0, "after a tick")
	})
}

// TestTidyBadInput: tidy refuses what it can't mean, and does nothing.
func TestTidyBadInput(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.sim.ResetCalls()
		for _, tt := range slices.Concat(bads("mount_id", "mount_id", "ABCDEF", "abcde", "abcdefg", "abcde1", "abcd\n",
			"a/c"),
			bads("project_ids", "project_ids", "a/b", "proj_sim,..", strings.Repeat("x", 129)), bads("dry_run", "dry_run",
				"perhaps")) {
			e.refused("tidy", fields{tt.field: tt.value}, tt.want)
		}
		e.op(logical.DeleteOperation, "config", nil)
		e.refused("tidy", nil, "not configured")
		e.b().mountID = ""
		_, err := e.Write("tidy", fields{"mount_id": "abcdef"})
		e.fails("without a UUID", err, "UUID")
		e.equal("calls to OpenAI", len(e.sim.Calls()), 0)
		e.tidied(e.get("tidy"), fields{"started": ""})
	})
}

// TestTidyOtherMount: with the mount_id of a mount, only what that one made and what is past its end is deleted.
func TestTidyOtherMount(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		other := newEnvOn(t, e.sim)
		other.configure(nil)
		other.ok("roles/web", fields{"project_id": ours})
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
	refusal := func(method, path string) func(e *env) { return func(e *env) { e.failing(method, path, 403) } }
	unread := func(key string) func(e *env) { return func(e *env) { e.failStorage("list", key) } }
	type trouble struct {
		inject                    func(e *env)
		projects, deleted, failed int
		text                      string // in the errors
	}
	inBubbles(t, map[string]trouble{
		"accounts of a project": {refusal("GET", "proj_b/service_accounts$"), 1, 15, 1,
			"project proj_b: OpenAI answered 403"},
		"keys of a project": {refusal("GET", "proj_b/api_keys$"), 1, 15, 1, "project proj_b: OpenAI answered 403"},
		"deletions":         {refusal("DELETE", "proj_b"), 2, 15, 15, "OpenAI answered 403"},
		"projects":          {refusal("GET", "projects$"), 0, 0, 1, "OpenAI answered 403"},
		"roles":             {unread(rolePrefix), 2, 0, 30, "storage fault"},
	}, func(t *testing.T, e *env, tt trouble) {
		e.sim.AddProject("proj_b", "B")
		e.ended(ours, 15, time.Hour)
		due := e.ended("proj_b", 15, time.Hour)
		tt.inject(e)
		resp := e.tidy(nil, fields{"projects": tt.projects, "deleted": tt.deleted, "failed": tt.failed})
		errs, leftover := resp.Data["errors"].([]string), resp.Data["leftover"].([]string)
		if len(errs) != min(10, tt.failed) || !strings.Contains(strings.Join(errs, "\n"), tt.text) {
			t.Errorf("errors: got %q, want %d with %q", errs, min(10, tt.failed), tt.text)
		}
		if tt.failed == 15 {
			e.equal("leftover", slices.Sorted(slices.Values(leftover)), slices.Sorted(slices.Values(due)))
		}
		e.equal("lines of the log", e.Log.Count("warn", "tidy could not do all"), 1)
		e.Storage.SetFault(nil)
		e.sim.ClearFaults()
		e.ok("tidy", nil)
		e.have(0, 0, "afterwards")
	})
}

// TestTidyUnderWay: a pass by hand that takes longer than 30 seconds goes on after its answer. Meanwhile another is
// refused, and nothing else waits for it.
func TestTidyUnderWay(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.ok("tidy", nil)
		e.ended(ours, 1, time.Hour)
		e.sim.SetLatency(20 * time.Second)
		start := time.Now()
		resp := e.tidy(nil, fields{"deleted": 0, "finished": formatTime(start)})
		e.equal("time until the answer, and its warnings", fmt.Sprint(time.Since(start), len(resp.Warnings)), "30s 1")
		e.refused("tidy", nil, "under way")
		e.Tick()
		e.lease("web")
		e.equal("time until a tick and a credential are done", time.Since(start), 50*time.Second)
		e.quiet()
		e.equal("time of three lists and a deletion", time.Since(start).Round(time.Second), 80*time.Second)
		e.tidied(e.get("tidy"), fields{"deleted": 1, "started": formatTime(start)})
		e.have(1, 1, "afterwards")
	})
}

// TestTidySpares: an account that a role names stays, also if the role is written after the account was listed; so does
// a key that is not of a service account, and an account with a key under a live lease.
func TestTidySpares(t *testing.T) {
	inBubbles(t, map[string]func(e *env, ids []string, name func(id string)){
		"named before": func(e *env, ids []string, name func(id string)) {
			name(ids[0])
			e.tidy(nil, fields{"found": 2, "deleted": 1, "failed": 0, "leftover": "[]"})
			e.op(logical.DeleteOperation, "roles/named", nil)
			e.tidy(nil, fields{"found": 1, "deleted": 1})
		},
		"named after the listing": func(e *env, ids []string, name func(id string)) {
			e.wire.setFault(func(req *http.Request, send func() (*http.Response, error)) (*http.Response, error) {
				if req.Method == http.MethodDelete {
					name(ids[1]) // while the one before it is deleted
				}
				return send()
			})
			e.tidy(nil, fields{"found": 2, "deleted": 1, "failed": 0})
			e.equal("the named account is there", e.names(ours)[ids[1]] != "", true)
		},
		"key of a user": func(e *env, ids []string, name func(id string)) {
			body := fmt.Sprintf(`{"data":[{"id":"key_user","name":"x-%s","owner":{"type":"user","user":{"id":"user-1"}}}]}`,
				newSuffix(e.b().mountID, time.Now().Add(-time.Hour)))
			date := http.Header{"Date": {time.Now().UTC().Format(http.TimeFormat)}}
			e.sim.Inject(openaisim.Fault{Method: "GET", Path: "api_keys$", Status: 200, Body: body, Header: date})
			e.tidy(nil, fields{"deleted": 2, "failed": 0, "leftover": "[]"})
			e.equal("deletions of keys", e.countCalls("DELETE", "api_keys"), 0)
		},
		"account with a leased key": func(e *env, ids []string, name func(id string)) {
			name(ids[0])
			key := e.lease("named").Data["api_key"].(string)
			e.op(logical.DeleteOperation, "roles/named", nil)
			e.ok("tidy", nil)
			e.equal("a key under a live lease is accepted", e.sim.Use(key), true)
		},
	}, func(t *testing.T, e *env, test func(*env, []string, func(string))) {
		test(e, e.ended(ours, 2, time.Hour), func(id string) {
			e.put("roles/named", fmt.Sprintf(`{"project_id":%q,"service_account_id":%q}`, ours, id))
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
			e.equal("errors say so", strings.Contains(fmt.Sprint(resp.Data["errors"]), "no Date"), true)
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
			e.equal("passes "+when, e.Log.Count("info", "tidy has ended"), want)
		}
		at(119*time.Second, 0, "before two minutes")
		at(61*time.Second, 1, "after three minutes")
		at(58*time.Minute, 1, "within the hour")
		at(2*time.Minute, 2, "after the hour")
		e.failing("GET", "service_accounts$", 403)
		at(time.Hour, 3, "after an hour more")
		at(8*time.Minute, 3, "soon after one that failed")
		at(3*time.Minute, 4, "ten minutes after one that failed")
		e.sim.ClearFaults()
		at(10*time.Minute, 5, "ten minutes later")
		at(57*time.Minute, 5, "within the hour after one that succeeded")
		e.Restart()
		at(119*time.Second, 5, "before two minutes of the next process")
		at(61*time.Second, 6, "after three minutes of the next process")
		e.put(cleanupPrefix+"x", fmt.Sprintf(`{"project_id":%q,"service_account_id":"x"}`, ours))
		for _, passive := range []consts.ReplicationState{consts.ReplicationDRSecondary,
			consts.ReplicationPerformanceStandby} {
			e.System.ReplicationStateVal = passive | consts.ReplicationPerformanceSecondary
			at(2*time.Hour, 6, "on a passive node")
			e.equal("clean-up entries on a passive node", len(e.Storage.Keys(cleanupPrefix)), 1)
		}
		e.System.ReplicationStateVal = consts.ReplicationPerformanceSecondary
		at(time.Minute, 7, "on the active node of a secondary")
	})
}

// TestTidyEnds: when the process is to end, a pass that waits for OpenAI ends at once, and none begins any more.
func TestTidyEnds(t *testing.T) {
	inBubbles(t, map[string]openaisim.Fault{
		"hang": {Kind: "hang", Times: -1}, "rate limit": {Status: 429, Header: http.Header{"Retry-After": {"60"}}, Times: -1},
	}, func(t *testing.T, e *env, fault openaisim.Fault) {
		e.sim.Inject(fault)
		time.Sleep(firstPass)
		e.Tick()
		time.Sleep(10 * time.Second)
		old, start := e.b(), time.Now()
		e.Restart()
		e.equal("time until the process has ended", time.Since(start), 0*time.Second)
		synctest.Wait()
		e.equal("a pass begins after Clean", old.inBackground(&old.passMu, func(context.Context) {}) != nil, false)
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
		e.equal("lost creates", e.metric("lost_creates"), 1)
		e.look()
		e.equal("lost creates after a tick", e.metric("lost_creates"), 0)
		e.have(5, 0, "after a tick")
		e.look()
		e.equal("deletions", e.countCalls("DELETE", ""), 1)
		e.equal("lists", e.countCalls("GET", "/service_accounts"), 1)
	})
	inBubble(t, func(t *testing.T, e *env) {
		e.sim.Inject(openaisim.Fault{Method: "POST", Kind: "close", Times: -1})
		for range 1001 {
			_, _ = e.Issue("creds/web", nil)
		}
		after := func(d time.Duration, lists, lost int) {
			t.Helper()
			e.sim.ResetCalls()
			e.Run(d)
			e.quiet()
			e.equal("lists of accounts", e.countCalls("GET", "/service_accounts"), lists)
			e.equal("lost creates", e.metric("lost_creates"), lost)
		}
		e.equal("lines of the log", e.Log.Count("error", "too many lost creates"), 1)
		after(searchTime+time.Second, 10+1, 1000) // at each tick, and a pass
		after(time.Hour, 1, 1000)
		after(22*time.Hour, 22, 1000)
		after(time.Hour, 1, 0)
		_, _ = e.Issue("creds/web", nil)
		e.equal("lost creates of the next day", e.metric("lost_creates"), 1)
	})
}

// TestTidySweep: a tick works all clean-up entries off, also those of an older version. One that fails by itself does
// not keep others waiting; an outage stops it at the first failure.
func TestTidySweep(t *testing.T) {
	const form = `{"api_key_id":"key_x","service_account_id":%q,"project_id":%q%s,"failures":5}`
	type sweep struct {
		inject        openaisim.Fault // of deletions; Path: "-": of one
		others        string          // as many more entries with this in them
		left, deletes int             // accounts; calls
	}
	inBubbles(t, map[string]sweep{
		"no fault":           {openaisim.Fault{Path: "none"}, "", 0, 30},
		"one is refused":     {openaisim.Fault{Path: "-", Status: 400}, "", 1, 30},
		"key is refused":     {openaisim.Fault{Status: 401}, "", 30, 1},
		"outage":             {openaisim.Fault{Status: 503}, "", 30, maxAttempts},
		"no connection":      {openaisim.Fault{Kind: "close"}, "", 30, maxAttempts},
		"other organization": {openaisim.Fault{Path: "none"}, `,"organization_id":"org-other"`, 0, 30},
		"not JSON":           {openaisim.Fault{Path: "none"}, `,`, 0, 30},
	}, func(t *testing.T, e *env, tt sweep) {
		for i := range 30 {
			id, other := e.sim.AddServiceAccount(ours, "x", "member"), fmt.Sprint("svc_acct_", i)
			e.put(cleanupPrefix+id, fmt.Sprintf(form, id, ours, ""))
			if tt.others != "" {
				e.put(cleanupPrefix+other, fmt.Sprintf(form, other, ours, tt.others))
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
		e.equal("deletions", e.countCalls("DELETE", ""), tt.deletes)
		e.equal("lines of the log", e.Log.Count("warn", "clean-up failed"), min(1, tt.left+len(tt.others)))
		e.sim.ClearFaults()
		e.look()
		e.have(0, 0, "after the fault")
		e.equal("entries are left", len(e.Storage.Keys(cleanupPrefix)) > 0, tt.others != "")
	})
}

// TestTidyLongList: a list of accounts that takes longer than a tick keeps neither ticks nor credentials nor clean-up
// waiting, and a lost create behind it is found.
func TestTidyLongList(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.crowd(6200)
		e.loses()
		e.failing("DELETE", "projects", 403)
		e.fails("revocation", e.Revoke(e.lease("web")), "403")
		e.sim.ClearFaults()
		e.have(6202, 2, "at first")
		e.sim.SetLatency(500 * time.Millisecond)
		start := time.Now()
		e.Tick()
		e.equal("time of a tick", time.Since(start), 0*time.Second)
		time.Sleep(time.Second)
		e.have(6201, 1, "when the clean-up entry is done")
		e.revoke(e.lease("web"))
		e.equal("time until a credential is issued and revoked", time.Since(start), 2*time.Second)
		e.quiet()
		e.equal("the search takes longer than a tick", time.Since(start) > tickTimeout, true)
		e.have(6200, 0, "after the search")
	})
}

// TestTidyAndRotation: admin keys whose deletion hangs bound a tick to 30 seconds, and credentials are cleaned up in
// the same tick.
func TestTidyAndRotation(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.configure(fields{"rotation_period": "1h"})
		l := e.lease("web")
		e.failing("DELETE", "", 403)
		e.ok("config/rotate", nil)
		e.fails("revocation", e.Revoke(l), "403")
		e.sim.ClearFaults()
		e.sim.Inject(openaisim.Fault{Path: "/admin_api_keys", Kind: "hang", Times: -1})
		time.Sleep(2 * time.Hour) // a rotation is due
		start := time.Now()
		e.Tick()
		e.equal("a tick takes more than 30 seconds", time.Since(start) > 30*time.Second, false)
		e.quiet()
		e.have(0, 0, "after the tick")
		e.equal("admin keys pending deletion", len(e.config().PendingDeletion), 1)
	})
}

// inBubbles runs test for each case on a configured mount of its own with a virtual clock.
func inBubbles[T any](t *testing.T, cases map[string]T, test func(t *testing.T, e *env, tt T)) {
	for name, tt := range cases {
		t.Run(name, func(t *testing.T) { inBubble(t, func(t *testing.T, e *env) { test(t, e, tt) }) })
	}
}

// equal checks that got and want are the same as fmt prints them.
func (e *env) equal(what string, got, want any) {
	e.t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		e.t.Errorf("%s: got %s, want %s", what, g, w)
	}
}

// fails checks that err is one whose text has each of the texts.
func (e *env) fails(what string, err error, texts ...string) {
	e.t.Helper()
	for _, text := range append(texts, "") {
		if err == nil || !strings.Contains(err.Error(), text) {
			e.t.Errorf("%s: got %v, want an error with %q", what, err, text)
		}
	}
}

// failing makes calls be answered with status from now on.
func (e *env) failing(method, path string, status int) {
	e.sim.Inject(openaisim.Fault{Method: method, Path: path, Status: status, Times: -1})
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

// metric reads a metric that has no labels.
func (e *env) metric(name string) any { return e.get("metrics").Data[metricPrefix+name] }

// TestClientMasks: whatever OpenAI says of a key, in whatever form that has, no error and no log shows it.
func TestClientMasks(t *testing.T) {
	const odd = "AdminKey/without+the:usual=form!" // not masked by its form
	for _, echo := range []string{
		"Incorrect API key provided: " + odd + ".", "key=" + odd + "&x", "sk-admin-simulated-abc",
		"'sk-proj-simulated'\r\nsk-x", strings.Repeat("a", 499) + odd,
	} {
		e := newConfiguredEnv(t)
		l := e.lease("web")
		e.put("config", `{"admin_api_key":"`+odd+`","admin_api_key_id":"key_x","organization_id":"org-sim",`+
			`"api_endpoint":"https://api.openai.com/v1"}`)
		e.Restart()
		said := map[string]any{"message": echo, "type": echo, "code": echo, "param": echo}
		body, _ := json.Marshal(map[string]any{"error": said})
		e.sim.Inject(openaisim.Fault{Status: 400, Body: string(body), Header: http.Header{"X-Request-Id": {echo}}, Times: -1})
		errs := []error{e.Renew(l, 0), e.Revoke(l), failure(e.Do(logical.ReadOperation, "creds/web", nil))}
		for _, path := range []string{"config", "config/rotate", "roles/web"} {
			errs = append(errs, failure(e.Write(path, nil)))
		}
		for _, err := range append(errs, errors.New(e.Log.String())) {
			e.fails("request", err)
			text := strings.TrimSuffix(fmt.Sprint(err), "\n")
			if strings.Contains(text, odd[:20]) || strings.ContainsAny(text, "\r\x00") {
				t.Errorf("OpenAI's %q shows in %q", echo, text)
			}
			e.noSecrets("an error", text)
		}
	}
}

// TestClientErrors: an error tells whether OpenAI may have done the call. Only what is safe is repeated.
func TestClientErrors(t *testing.T) {
	type fault = openaisim.Fault
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
		"429":       {fault{Status: 429, Header: http.Header{"Retry-After": {"30"}}}, 429, true, 3, 3, "429"},
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
		e.fails("creds", err, tt.text)
		e.equal("lost creates", e.metric("lost_creates"), map[bool]int{true: 0, false: 1}[tt.notDone])
		e.equal("attempts to create", e.countCalls("POST", "/service_accounts"), tt.creates)
		time.Sleep(time.Minute)
		e.sim.ResetCalls()
		ctx, cancel := context.WithTimeout(t.Context(), requestTimeout)
		defer cancel()
		l := &lease{ProjectID: openaisim.DefaultProject, ServiceAccountID: account}
		err = e.b().newClient(e.config()).deleteCredential(ctx, l)
		var api *apiError
		if !errors.As(err, &api) || api.Status != tt.status || notDone(err) != tt.notDone {
			t.Errorf("delete: got %v, want status %d and not done %v", err, tt.status, tt.notDone)
		}
		e.equal("attempts to delete", e.countCalls("DELETE", ""), tt.deletes)
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
	e.wire.to = newTransport()
	e.configure(map[string]any{"api_endpoint": server.URL + "/v1"})
	e.ok("roles/web", map[string]any{"project_id": openaisim.DefaultProject})
	for range 20 {
		e.revoke(e.lease("web"))
	}
	e.equal("connections for 42 calls in a row", opened.Load(), 1)
	var workers sync.WaitGroup
	for range 16 {
		workers.Go(func() {
			for range 10 {
				e.lease("web")
			}
		})
	}
	workers.Wait()
	// A call that gets another's connection, while its own is opened, leaves that to later ones.
	if got := opened.Load(); got > 1+2*16 {
		t.Errorf("connections for 160 calls, 16 at once: got %d, want about 16", got)
	}
	endless.Store(true)
	_, err := e.Issue("creds/web", nil)
	e.fails("creds", err, "larger than 1 MiB")
}

// TestClientRateLimit: revocations that come at once drain at OpenAI's pace, in about their order, with few refused.
func TestClientRateLimit(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		const n = 200
		var ended, displaced atomic.Int64
		var group sync.WaitGroup
		for i := range n {
			l := e.lease("web")
			group.Go(func() {
				time.Sleep(time.Second + time.Duration(i)*time.Microsecond) // they come in this order
				if err := e.Revoke(l); err != nil {
					t.Errorf("revoke: %v", err)
				}
				displaced.Add(int64(math.Abs(float64(ended.Add(1) - 1 - int64(i)))))
			})
		}
		e.sim.ResetCalls()
		e.sim.SetLatency(50 * time.Millisecond)
		e.sim.SetRateLimit(20, 20)
		start := time.Now()
		group.Wait()
		took, calls := time.Since(start), len(e.sim.Calls())
		if refused := 100 * (calls - n) / calls; took > 12500*time.Millisecond || refused >= 35 {
			t.Errorf("took %v with %d %% of the calls refused, want at most 12.5s and less than 35 %%", took, refused)
		}
		if got := displaced.Load() / n; got > 40 { // at random it is 67
			t.Errorf("mean distance from the order of arrival: got %d places, want at most 40", got)
		}
		e.have(0, 0, "in the end")
		e.sim.SetRateLimit(0, 0)
		for _, calls := range []int{480, 320} { // the first are slow yet
			start := time.Now()
			for range 32 {
				group.Go(func() {
					for range calls / 32 {
						e.lease("web")
					}
				})
			}
			group.Wait()
			if took := time.Since(start); calls == 320 && took > time.Second {
				t.Errorf("320 credentials by 32 workers: took %v, want 0.5s as without a limit", took)
			}
		}
	})
}

// TestClientWaits: a call whose time is up while it waits says what it waited for, and leaves nothing to look for.
func TestClientWaits(t *testing.T) {
	for _, after := range []string{"", "1", "30"} { // asked of the callers
		inBubble(t, func(t *testing.T, e *env) {
			fails := func(text string) {
				ctx, cancel := context.WithTimeout(t.Context(), 5300*time.Millisecond)
				defer cancel()
				req := &logical.Request{Operation: logical.ReadOperation, Path: "creds/web", Storage: e.Storage}
				resp, err := e.b().HandleRequest(ctx, req)
				e.fails("creds", err, text)
				e.equal("answer and lost creates", fmt.Sprint(resp, e.metric("lost_creates")), "<nil> 0")
			}
			slots := e.b().throttle.slots
			for range maxCalls {
				slots <- struct{}{}
			}
			fails("waiting for other calls to OpenAI")
			for range maxCalls {
				<-slots
			}
			e.sim.Inject(openaisim.Fault{Method: "POST", Status: 429, Header: http.Header{"Retry-After": {after}}, Times: -1})
			fails(map[string]string{"": "waiting for OpenAI's rate limit"}[after])
			if got := e.countCalls("POST", "service_accounts"); got > 10 {
				t.Errorf("calls in 5.3s: got %d, want at most 10", got)
			}
			if after == "30" {
				fails("waiting for OpenAI's rate limit")
			}
		})
	}
}

// TestClientConcurrency is for the race detector: all that a mount can be asked at once. Nothing fails by a rotation.
func TestClientConcurrency(t *testing.T) {
	e := newConfiguredEnv(t)
	var workers sync.WaitGroup
	repeat := func(name string, n int, act func() error) {
		for range n {
			workers.Go(func() {
				for range 20 {
					if err := act(); err != nil {
						t.Errorf("%s: %v", name, err)
					}
				}
			})
		}
	}
	repeat("creds", 8, func() error {
		l := e.lease("web")
		return errors.Join(e.Renew(l, 0), e.Revoke(l))
	})
	repeat("rotate", 4, func() error { return failure(e.Write("config/rotate", nil)) })
	repeat("write config", 1, func() error { return failure(e.Write("config", map[string]any{"rotation_policy": "p"})) })
	repeat("write role", 1, func() error { return failure(e.Write("roles/web", map[string]any{"ttl": "30m"})) })
	for _, path := range []string{"config", "roles/web", "metrics", "tidy"} {
		repeat("read "+path, 1, func() error { return failure(e.Do(logical.ReadOperation, path, nil)) })
	}
	repeat("tidy", 1, func() error { _, err := e.Write("tidy", nil); return err }) // a 400 says that one is under way
	repeat("invalidate", 1, func() error { e.b().InvalidateKey(t.Context(), configPath); return nil })
	repeat("tick", 1, func() error { e.Tick(); return nil })
	workers.Wait()
	e.idle()
	e.equal("rotations", e.series()[metricPrefix+`rotations_total{trigger="manual",result="success"}`], 80)
	e.oneKey("in the end")
	e.have(0, 0, "in the end")
}

// FuzzAnswer gives OpenAI's answers: nothing panics, no error shows a key, and what is handed out has valid ids.
func FuzzAnswer(f *testing.F) {
	for _, body := range []string{
		``, `null`, `{}`, `[]`, `"`, `{"id":"proj_sim","status":"archived"}`, `{"deleted":1}`, `{"has_more":true}`,
		`{"id":"svc_acct_1","name":"n","role":"member","api_key":{"id":"key_1","value":"sk-x-simulated","expires_at":1e300}}`,
		`{"id":"svc_acct_1","api_key":{"id":"../x","value":"sk-x"}}`, `{"error":{"message":"sk-\u0000sk-","type":"\n"}}`,
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
			l, header := e.lease("web"), http.Header{"Retry-After": {after}, "X-Should-Retry": {again}, "X-Request-Id": {again}}
			e.wire.setFault(func(req *http.Request, _ func() (*http.Response, error)) (*http.Response, error) {
				answer := io.NopCloser(strings.NewReader(body))
				return &http.Response{StatusCode: status, Body: answer, Request: req, Header: header}, nil
			})
			start := time.Now()
			check := func(err error) {
				e.noSecrets("an error", fmt.Sprint(err))
				if took := time.Since(start); took > requestTimeout+undoTimeout {
					t.Errorf("a request took %s", took)
				}
				start = time.Now()
			}
			for _, path := range []string{"config", "roles/web", "config/rotate", "tidy"} {
				check(failure(e.Write(path, nil)))
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
		if got < 0 || got > maxPause || err == nil && n < 1e6 && (got-want).Abs() > time.Microsecond {
			t.Errorf("Retry-After %q and %q ms: got %v", after, ms, got)
		}
	})
}

// expectShown checks a field of config.
func (e *env) expectShown(field string, want any) {
	e.t.Helper()
	e.equal(field+" in config", e.get("config").Data[field], want)
}

// keyWorks fails the test unless OpenAI accepts the key in storage, and it has the id that is there.
func (e *env) keyWorks(when string) {
	e.t.Helper()
	c := e.b().newClient(e.config())
	c.http, c.throttle, c.metrics = &http.Client{Transport: e.sim.Transport()}, newThrottle(), newMetrics()
	if _, err := c.ownKey(context.Background()); err != nil {
		e.t.Errorf("%s: the key in config: got %v, want that it works", when, err)
	}
}

// oneKey fails the test unless config's key works, is the only live admin key, and none is pending deletion.
func (e *env) oneKey(when string) {
	e.t.Helper()
	e.sim.ClearFaults()
	e.keyWorks(when)
	cfg, keys := e.config(), e.sim.AdminKeys()
	if len(keys) != 1 || keys[0].ID != cfg.AdminAPIKeyID || len(cfg.PendingDeletion) != 0 {
		e.t.Errorf("%s: got keys %v, pending deletion %v, want %q", when, keys, cfg.PendingDeletion, cfg.AdminAPIKeyID)
	}
}

// rotateFails makes a rotation that must fail with text in its error, and returns the names that are in creating then.
func (e *env) rotateFails(text string) (creating []string) {
	e.t.Helper()
	e.fails("rotation", failure(e.Write("config/rotate", nil)), text)
	return e.config().creatingNames()
}

// failCreate makes the next creation of an admin key fail.
func (e *env) failCreate(f openaisim.Fault) {
	f.Method, f.Path = "POST", "/admin_api_keys$"
	e.sim.Inject(f)
}

// loseKey makes a rotation whose answer to the creation of a key is lost, and returns the name that OpenAI knows.
func (e *env) loseKey() string {
	e.t.Helper()
	e.failCreate(openaisim.Fault{Kind: "close", Process: true})
	names := e.rotateFails("")
	if len(names) == 0 || !e.hasKey(names[len(names)-1]) {
		e.t.Fatalf("a key whose creation was lost: got creating %v and keys %v", names, e.sim.AdminKeys())
	}
	return names[len(names)-1]
}

// hasKey tells whether OpenAI has a live admin key of this name.
func (e *env) hasKey(name string) bool {
	return slices.ContainsFunc(e.sim.AdminKeys(), func(k openaisim.AdminKey) bool { return k.Name == name })
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
			e.sim.Inject(openaisim.Fault{Method: "DELETE", Status: http.StatusForbidden})
			e.ok("config/rotate", nil)
		}},
		"scheduled": {tick, "", 11, func(e *env) { // with a new key still to be found: list, delete and config come first
			e.ok("config", map[string]any{"rotation_period": "1h"})
			e.loseKey()
			time.Sleep(time.Hour)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			everyStep(t, test.enough, func(t *testing.T, fault stepFault, at int) (reached bool) {
				e := newConfiguredEnv(t)
				test.set(e)
				before, b := e.config().AdminAPIKeyID, e.b()
				each := func() {
					e.keyWorks("at a step")
					e.equal("storage", e.Storage.Keys(""), "[config roles/]")
				}
				b.knownMu.Lock() // nothing in the background takes a step
				b.passMu.Lock()
				reached = e.atStep(fault, at, each, func(ctx context.Context) {
					resp, err := e.DoContext(ctx, test.op, test.path, nil)
					e.keyWorks("after the request")
					if rotated := e.config().AdminAPIKeyID; test.op == update && failure(resp, err) == nil &&
						(rotated == before || rotated != resp.Data["admin_api_key_id"]) {
						t.Errorf("answered %v, and the key in config is %q, before %q", resp.Data, rotated, before)
					}
				})
				b.passMu.Unlock()
				b.knownMu.Unlock()
				e.lease("web")
				e.sim.SetKeyDelay(0)
				e.Run(5 * time.Minute)
				e.oneKey("five minutes later")
				time.Sleep(lostTime)
				e.Run(2 * time.Minute)
				e.expectShown("creating", "[]")
				e.ok("config/rotate", nil)
				e.oneKey("after another rotation")
				each()
				return reached
			})
		})
	}
}

// TestRotateProof: a new key is waited for up to 20 seconds. One that is not accepted then is deleted at once.
func TestRotateProof(t *testing.T) {
	for _, seconds := range []int{0, 3, 12, 13, 15, 17, 19, 22, 3600} {
		delay, ok := time.Duration(seconds)*time.Second, seconds < 20
		inBubble(t, func(t *testing.T, e *env) {
			first, start := e.config().AdminAPIKeyID, time.Now()
			e.sim.SetKeyDelay(delay)
			if err := failure(e.Write("config/rotate", nil)); (err == nil) != ok {
				t.Errorf("rotation with a key accepted after %v: got %v, want success %v", delay, err, ok)
			}
			took, proofs := time.Since(start), e.countCalls("GET", "/admin_api_keys/")
			if took > min(delay, proofTimeout)+maxProofWait+time.Second || proofs > 17 {
				t.Errorf("rotation with a key accepted after %v: took %v and %d proofs", delay, took, proofs)
			}
			e.oneKey("at once")
			e.expectShown("creating", "[]")
			e.equal("new key in config", e.config().AdminAPIKeyID != first, ok)
		})
	}
}

// TestRotateLate: an admin key that OpenAI makes after an error is found and deleted within an hour and a quarter.
func TestRotateLate(t *testing.T) {
	faults := map[string]openaisim.Fault{}
	for _, minutes := range []time.Duration{1, 4, 11, 61, 20 * 60} {
		faults[fmt.Sprint("500 ", minutes)] = openaisim.Fault{Late: minutes * time.Minute}
		faults[fmt.Sprint("reset ", minutes)] = openaisim.Fault{Late: minutes * time.Minute, Kind: "close"}
	}
	inBubbles(t, faults, func(t *testing.T, e *env, fault openaisim.Fault) {
		e.sim.AddAdminKey("vault-admin-234567234567234567ab") // of a clone of this cluster
		e.failCreate(fault)
		names := e.rotateFails("creating")
		e.Run(fault.Late - time.Second)
		e.Restart() // nothing of this is in memory only
		e.expectShown("creating", names)
		e.equal("keys before", len(e.sim.AdminKeys()), 2)
		time.Sleep(time.Second)
		e.equal("late key made", e.hasKey(names[0]), true)
		e.Run(75 * time.Minute)
		e.equal("late key still there", e.hasKey(names[0]), false)
		e.equal("keys after", len(e.sim.AdminKeys()), 2)
		e.expectShown("creating", "[]")
	})
}

// TestRotateForgets: a name is dropped a day later, if OpenAI's list is then read and does not have it. Else it is kept
func TestRotateForgets(t *testing.T) {
	day := func(date string) openaisim.Fault {
		return openaisim.Fault{Status: 200, Body: `{"data":[{"id":"key_x"}]}`, Header: http.Header{"Date": {date}}}
	}
	inBubbles(t, map[string]openaisim.Fault{
		"refused": {Status: 403}, "failed": {Status: 500}, "no answer": {Kind: "close"}, "without date": day("soon"),
		"cut": {Status: 200, Body: `{"data":[],"has_more":true}`}, "clock behind": day("Sat, 01 Jan 2000 00:00:00 GMT"),
	}, func(t *testing.T, e *env, list openaisim.Fault) {
		e.failCreate(openaisim.Fault{Late: 50 * time.Hour})
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
		e.failCreate(openaisim.Fault{})
		names := e.rotateFails("500")
		e.sim.Advance(72 * time.Hour) // nor is OpenAI's clock believed that is ahead of this one
		time.Sleep(lostTime - time.Minute)
		e.Run(time.Minute)
		e.expectShown("creating", names)
		e.Run(time.Minute)
		e.expectShown("creating", "[]")
		e.sim.ResetCalls()
		e.Run(5 * time.Minute)
		e.equal("lists when there is nothing to look for", e.countCalls("GET", "/admin_api_keys"), 0)
	})
}

// TestRotateMany: at most 50 keys are looked for at a time. A creation that was refused leaves none.
func TestRotateMany(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.failCreate(openaisim.Fault{Status: 403})
		e.equal("creating after a refusal", e.rotateFails("403"), "[]")
		for range 50 {
			e.failCreate(openaisim.Fault{})
			e.rotateFails("500")
		}
		e.sim.ResetCalls()
		e.equal("names", len(e.rotateFails("50 admin keys")), 50)
		e.equal("creations", e.countCalls("POST", ""), 0)
		time.Sleep(lostTime)
		e.Run(2 * time.Minute)
		e.expectShown("creating", "[]")
		e.ok("config/rotate", nil)
		e.oneKey("in the end")
	})
}

// TestRotateOrganization: a key whose creation was lost is looked for in its own organization, also days later.
func TestRotateOrganization(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		name, old := e.loseKey(), e.config()
		e.ok("config", map[string]any{"organization_id": "org-other", "admin_api_key": "sk-admin-other",
			"admin_api_key_id": "key_other", "verify_connection": false})
		e.sim.Inject(openaisim.Fault{Status: 200, Body: `{"data":[{"id":"key_other"}]}`, Times: -1})
		for range 3 {
			e.Run(3 * time.Minute)
			time.Sleep(lostTime)
		}
		e.equal("deletions in the other organization", e.countCalls("DELETE", ""), 0)
		e.expectShown("creating", []string{name})
		e.sim.ClearFaults()
		e.ok("config", map[string]any{"organization_id": old.OrganizationID, "admin_api_key": old.AdminAPIKey,
			"admin_api_key_id": old.AdminAPIKeyID})
		e.Run(2 * time.Minute)
		e.oneKey("back in its organization")
		e.expectShown("creating", "[]")
	})
}

// TestRotateUnderWay: during a rotation a tick leaves the admin keys alone, and neither logs nor counts that.
func TestRotateUnderWay(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		e.ok("config", map[string]any{"rotation_period": "1h"})
		e.loseKey()
		e.sim.Inject(openaisim.Fault{Method: "DELETE", Status: http.StatusForbidden})
		e.ok("config/rotate", nil) // now there is a key to find, one to delete, and soon a rotation to make
		time.Sleep(time.Hour)
		e.sim.SetLatency(20 * time.Second)
		var group sync.WaitGroup
		group.Go(func() { e.ok("config/rotate", nil) })
		synctest.Wait()
		e.b().knownMu.Lock() // tidy has its own words
		e.b().passMu.Lock()
		state := func() string { return fmt.Sprint(e.Log, e.series(), e.Storage.All(), len(e.sim.Calls())) }
		before := state()
		for range 3 {
			e.Tick()
		}
		if state() != before {
			t.Errorf("ticks have done something, with log %s", e.Log)
		}
		e.b().passMu.Unlock()
		e.b().knownMu.Unlock()
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
		e.failing("DELETE", "admin_api_keys", status)
		resp := e.ok("config/rotate", nil)
		if status == 404 {
			want = []string{}
		} else if len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], want[0]) {
			t.Errorf("warnings: got %v, want one that names the old key", resp.Warnings)
		}
		e.equal("metric", e.metric("admin_keys_pending_deletion"), len(want))
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
			e.equal("warnings of the next rotation", e.ok("config/rotate", nil).Warnings, "[]")
		}
	})
}

// TestRotateSchedule: without a rotation manager of Vault the plugin rotates from its ticks, by period or cron (UTC).
func TestRotateSchedule(t *testing.T) {
	defer func(zone *time.Location) { time.Local = zone }(time.Local)
	time.Local = time.FixedZone("elsewhere", 5*60*60+30*60) // schedules are in UTC all the same
	type set = map[string]any
	type tt struct {
		config, change set // change is written after down
		down, up       int // minutes that Vault is down, from midnight (UTC) on, and then up
		want           string
	}
	period, hourly := set{"rotation_period": "90m"}, set{"rotation_schedule": "30 * * * *"}
	nightly := set{"rotation_schedule": "0 3 * * *", "rotation_window": "2h"}
	inBubbles(t, map[string]tt{
		"period":          {period, nil, 0, 300, "01:30 03:00 04:30"},
		"period missed":   {period, nil, 240, 120, "04:01 05:31"},
		"schedule":        {hourly, nil, 0, 180, "00:30 01:30 02:30"},
		"schedule missed": {hourly, nil, 120, 60, "02:01 02:30"},
		"window":          {nightly, nil, 0, 28 * 60, "03:00 03:00"},
		"in the window":   {nightly, nil, 290, 24 * 60, "04:51 03:00"},
		"after it":        {nightly, nil, 300, 24 * 60, "03:00"},
		"disabled":        {period, set{"disable_automated_rotation": true}, 120, 600, ""},
		"cleared":         {period, set{"rotation_period": 0}, 120, 600, ""},
		"shortened":       {period, set{"rotation_period": "20m"}, 10, 60, "00:20 00:40 01:00"},
		"lengthened":      {period, set{"rotation_period": "3h"}, 120, 120, "03:00"},
		"new schedule":    {hourly, set{"rotation_schedule": "45 * * * *"}, 20, 60, "00:45"},
		"other kind":      {period, set{"rotation_schedule": "45 * * * *", "rotation_period": 0}, 20, 120, "00:45 01:45"},
	}, func(t *testing.T, e *env, tt tt) {
		if tt.change == nil { // OpenBao's error
			e.System.RotationErr = errors.New("rpc error: code = Unimplemented desc = unknown method")
		}
		e.ok("config", tt.config)
		e.expectShown("rotation_manager", "plugin")
		time.Sleep(time.Duration(tt.down) * time.Minute)
		e.Restart()
		e.ok("config", tt.change)
		var got []string
		for range tt.up {
			before := e.config().AdminAPIKeyID
			next, _ := time.Parse(time.RFC3339, e.get("config").Data["next_rotation"].(string))
			e.Run(time.Minute)
			now := time.Now().UTC()
			rotated := e.config().AdminAPIKeyID != before
			if rotated {
				got = append(got, now.Format("15:04"))
				e.expectShown("last_rotated", formatTime(now))
			}
			e.equal(fmt.Sprint("rotated when next_rotation is ", next, " at ", now), rotated, !next.IsZero() && !next.After(now))
		}
		e.equal("rotations", strings.Join(got, " "), tt.want)
		e.oneKey("in the end")
	})
}

// TestRotateWrongID: a rotation with the id of another key, which it would delete, is refused.
func TestRotateWrongID(t *testing.T) {
	e := newConfiguredEnv(t)
	_, other := e.sim.AddAdminKey("somebody else's")
	e.ok("config", map[string]any{"admin_api_key_id": other, "verify_connection": false})
	e.equal("creating", e.rotateFails(other), "[]")
	e.equal("live admin keys", len(e.sim.AdminKeys()), 2)
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
				if e.countCalls("POST", "/admin_api_keys") > len(got) {
					got = append(got, minute)
				}
			}
			e.equal("minutes of attempts", got, want)
		}
		e.ok("config", map[string]any{"rotation_period": "1h"})
		time.Sleep(time.Hour - time.Minute)
		e.failing("POST", "/admin_api_keys$", 500)
		attempts(250, 0, 1, 3, 7, 15, 31, 63, 123, 183, 243)
		e.ok("config", map[string]any{"rotation_period": "30m"})
		attempts(1, 0)
		e.sim.ClearFaults()
		attempts(31, 0, 30)
		e.failing("POST", "/admin_api_keys$", 403)
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
		e.ok("config", map[string]any{"rotation_period": "1h"})
		name, first := e.loseKey(), e.config().AdminAPIKeyID
		e.System.ReplicationStateVal, e.System.LocalMountVal = tt.state, tt.local
		e.Run(3 * time.Hour)
		e.equal("rotated", e.config().AdminAPIKeyID != first, tt.rotates)
		e.equal("lost key there", e.hasKey(name), !tt.rotates)
		e.equal("rotation by Vault works", failure(e.Do(logical.RotationOperation, "config", nil)) == nil, tt.rotates)
	})
}

// TestRotateTakenOver: the older plugin's config is taken over by the first tick, or by Vault's rotation manager.
func TestRotateTakenOver(t *testing.T) {
	inBubbles(t, map[string]bool{managerPlugin: false, managerVault: true}, func(t *testing.T, e *env, byVault bool) {
		if byVault {
			e.System.RotationErr = nil
		}
		key, id := e.sim.AdminKey()
		e.put("config", fmt.Sprintf(`{"admin_api_key":%q,"admin_api_key_id":%q,"api_endpoint":"https://api.openai.com/v1",
			"organization_id":"org-sim","last_rotated_time":"2000-01-01T00:00:00Z","rotation_schedule":"","rotation_window":0,
			"rotation_period":3600000000000,"disable_automated_rotation":false,"rotation_policy":""}`, key, id))
		e.Restart()
		e.Run(time.Minute)
		e.expectShown("rotation_manager", map[bool]string{false: managerPlugin, true: managerVault}[byVault])
		e.Run(time.Hour)
		e.equal("the plugin has rotated", e.config().AdminAPIKeyID != id, !byVault)
		e.equal("registered", len(e.System.Registered()) == 1, byVault)
		id = e.config().AdminAPIKeyID
		e.op(logical.RotationOperation, "config", nil)
		e.equal("Vault has rotated", e.config().AdminAPIKeyID != id, true)
		e.oneKey("in the end")
		e.failing("POST", "", 403)
		e.fails("Vault's rotation", failure(e.Do(logical.RotationOperation, "config", nil)), "403")
	})
}

// TestRotateTTL: admin_key_ttl must leave time for two rotations, and who has a key that ends is warned.
func TestRotateTTL(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		type set = map[string]any
		const day = 24 * time.Hour
		time.Sleep(2*day + 10*time.Hour) // to a Monday morning
		for _, tt := range []struct{ schedule, period, ttl, refused string }{
			{"", "0", "24h", "no"}, {"", "12h", "24h", ""}, {"", "12h", "23h59m", "no"}, {"", "12h", "365d", ""},
			{"", "12h", "8761h", "no"}, {"", "200d", "365d", "no"}, {"0 3 * * 1-5", "0", "143h", "no"},
			{"0 3 1 * *", "0", "62d", ""}, {"0 3 1 * *", "0", "61d", "no"}, {"* 9-17 * * 1-5", "0", "6d", ""},
			{"* 9-17 * * 1-5", "0", "2d", "no"}, {"0 3 29 2 *", "0", "365d", "no"}, // many short gaps come before the long one
		} {
			data := set{"admin_key_ttl": tt.ttl, "rotation_schedule": tt.schedule, "rotation_period": tt.period}
			if tt.refused == "" {
				e.ok("config", data)
				data["disable_automated_rotation"] = true
			}
			e.refused("config", data, "admin_key_ttl")
			e.ok("config", set{"admin_key_ttl": 0})
		}
		made, err := e.b().newClient(e.config()).createAdminKey(t.Context(), "ends", day)
		e.equal("creating a key that ends", err, nil)
		resp := e.ok("config", set{"admin_api_key": made.Value, "admin_api_key_id": made.ID, "rotation_schedule": ""})
		end := formatTime(time.Now().Add(day))
		if len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], end) {
			t.Errorf("config with a key that ends: got %q, want one warning with %s", resp.Warnings, end)
		}
		resp = e.ok("config", set{"rotation_period": "10d", "admin_key_ttl": "20d"})
		e.equal("no warning with a schedule", resp == nil, true)
		e.refused("config", set{"rotation_period": "11d"}, "admin_key_ttl")
		e.ok("config/rotate", nil)
		e.expectShown("admin_key_expires_at", formatTime(time.Now().Add(20*day)))
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
			e.System.PluginEnvErr = errStep
		}
		e.configure(nil)
		e.ok("roles/web", map[string]any{"project_id": openaisim.DefaultProject})
		l, other := e.lease("web"), e.lease("web")
		e.equal("errors", errors.Join(e.Renew(l, 0), e.Revoke(l)), nil)
		e.ok("config/rotate", nil)
		resp, err := e.Do(logical.ReadOperation, "creds/web", map[string]any{"ttl": 0})
		e.refusal(resp, err, "ttl")
		e.failing("", "", 401)
		_, err = e.Issue("creds/web", nil)
		e.fails("all", errors.Join(err, e.Renew(other, 0), e.Revoke(other)), "401")
		e.rotateFails("401") // and reads config, which tells nothing
		e.op(logical.DeleteOperation, "roles/web", nil)
		e.op(logical.DeleteOperation, "config", nil)
		var got []string
		for text := range strings.Lines(e.Log.String()) {
			m := regexp.MustCompile(`^\S+ \[([A-Z]+)\] +(.*?): (.*)\n$`).FindStringSubmatch(text)
			want := `^name=web project_id=pro\S+ service_account_id=svc\S+ api_key_id=key\S+ mount=openai/ request_id=req\S+$`
			if m[2] == "creds-renew" && !regexp.MustCompile(want).MatchString(m[3]) {
				t.Errorf("log: got %q, want %s", text, want)
			}
			got = append(got, m[1]+" "+m[2])
		}
		e.equal("log", strings.Join(got, ", "), log)
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
					e.equal(r.Type, fmt.Sprint("openai/", r.Data["operation"], r.Data["modified"]), fmt.Sprint(r.Type, !fail))
				}
				e.equal(r.Type+" with an error", r.Data["error"] != nil, fail)
			}
			e.equal("reports with metadata "+metadata, got, want)
			e.noSecrets("a report", fmt.Sprint(reports))
		}
	}
}

var metricLine = regexp.MustCompile(`^(?:# (HELP|TYPE) (vault_openai_[a-z_]+) (.+)|` +
	`(vault_openai_[a-z_]+)((?:\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+\})?) ([0-9.]+))\n$`)

// series reads the metrics in both formats, strictly, checks that both say the same, and returns the values.
func (e *env) series() map[string]float64 {
	e.t.Helper()
	answer := e.op(logical.ReadOperation, "metrics", map[string]any{"format": "prometheus"}).Data
	e.equal("content type", answer[logical.HTTPContentType], "text/plain; version=0.0.4; charset=utf-8")
	all, data, family, kind, bound, count := map[string]float64{}, map[string]float64{}, "", "", 0.0, 0.0
	for line := range strings.Lines(string(answer[logical.HTTPRawBody].([]byte))) {
		m := metricLine.FindStringSubmatch(line)
		switch {
		case m == nil || m[1] == "HELP" && m[2] == family || m[1] == "TYPE" && m[2] != family:
			e.t.Fatalf("line %q of family %s", line, family)
		case m[1] == "HELP":
			family = m[2]
			continue
		case m[1] == "TYPE":
			kind = m[3]
			e.equal(family+" is a counter", kind == "counter", strings.HasSuffix(family, "_total"))
			continue
		}
		suffix := strings.TrimPrefix(m[4], family)
		if _, twice := all[m[4]+m[5]]; twice || (suffix != "") != (kind == "histogram") {
			e.t.Errorf("%q: twice, or among %s", line, family)
		}
		value, _ := strconv.ParseFloat(m[6], 64)
		all[m[4]+m[5]] = value
		if _, le, ok := strings.Cut(m[5], `,le="`); ok { // buckets rise to all that there is
			limit, _ := strconv.ParseFloat(strings.TrimSuffix(le, `"}`), 64)
			if limit <= bound || value < count {
				e.t.Errorf("%q comes after %v with %v", line, bound, count)
			}
			if bound, count = limit, value; math.IsInf(limit, 1) {
				bound, count = 0, 0
			}
		}
	}
	for name, value := range e.get("metrics").Data {
		if value, ok := value.(float64); ok {
			data[name] = value
			continue
		}
		for labels, v := range value.(map[string]float64) {
			data[name+"{"+labels+"}"] = v
		}
	}
	e.equal("metrics as data", data, all)
	return all
}

// TestMetricsFamilies sees each series of each family move, on success and on failure, and no other result with it.
func TestMetricsFamilies(t *testing.T) {
	acts := map[string]func(*env, *vaultsim.Lease){
		"":       func(*env, *vaultsim.Lease) {},
		"issue":  func(e *env, _ *vaultsim.Lease) { _, _ = e.Issue("creds/web", nil) },
		"renew":  func(e *env, l *vaultsim.Lease) { _ = e.Renew(l, 0) },
		"revoke": func(e *env, l *vaultsim.Lease) { _ = e.Revoke(l) },
		"rotate": func(e *env, _ *vaultsim.Lease) { _, _ = e.Write("config/rotate", nil) },
		"tidy":   func(e *env, _ *vaultsim.Lease) { _, _ = e.Write("tidy", nil) },
		"tick":   func(e *env, _ *vaultsim.Lease) { e.Tick(); e.idle() },
		"hour":   func(*env, *vaultsim.Lease) { time.Sleep(time.Hour) },
		"slow":   func(e *env, _ *vaultsim.Lease) { e.sim.SetLatency(2 * time.Second) },
		"hourly": func(e *env, _ *vaultsim.Lease) {
			e.ok("config", map[string]any{"rotation_period": "1h", "admin_key_ttl": "2h"})
		},
		"lose": func(e *env, _ *vaultsim.Lease) {
			e.sim.Inject(openaisim.Fault{Method: "POST", Kind: "close", Process: true})
		},
		"refuse": func(e *env, _ *vaultsim.Lease) { e.sim.Inject(openaisim.Fault{Method: "DELETE", Status: 403}) },
	}
	const left = "lose issue refuse revoke" // an account whose creation was lost, and a revocation that failed
	type fault = openaisim.Fault
	fails, refused := fault{Times: -1}, fault{Status: 403, Times: -1}
	undeletable := fault{Method: "DELETE", Status: 403, Times: -1}
	const start = 946684800
	tests := []struct {
		series, prepare string // without prefix
		fault           fault  // that do meets, if not zero
		do              string
		want            float64 // how far it moves
	}{
		{`credential_operations_total{role="web",operation="issue",result="success"}`, "", fault{}, "issue issue", 2},
		{`credential_operations_total{role="web",operation="issue",result="failure"}`, "", fails, "issue", 1},
		{`credential_operations_total{role="web",operation="renew",result="success"}`, "", fault{}, "renew", 1},
		{`credential_operations_total{role="web",operation="renew",result="failure"}`, "", fails, "renew", 1},
		{`credential_operations_total{role="web",operation="revoke",result="success"}`, "", fault{}, "revoke", 1},
		{`credential_operations_total{role="web",operation="revoke",result="failure"}`, "", fails, "revoke", 1},
		{`revocations_handed_over_total`, "", fails, "revoke revoke revoke revoke revoke", 1},
		{`api_requests_total{operation="create_service_account",status="200"}`, "", fault{}, "issue", 1},
		{`api_requests_total{operation="create_service_account",status="500"}`, "", fails, "issue", 1},
		{`api_requests_total{operation="create_service_account",status="error"}`, "lose", fault{}, "issue", 1},
		{`api_request_duration_seconds_count{operation="delete_service_account"}`, "", fault{}, "revoke", 1},
		{`api_request_duration_seconds_sum{operation="delete_service_account"}`, "slow", fault{}, "revoke", 2},
		{`api_request_duration_seconds_bucket{operation="create_service_account",le="+Inf"}`, "lose", fault{}, "issue", 1},
		{`api_retries_total{reason="500"}`, "", fault{Times: 2}, "revoke", 2},
		{`api_retries_total{reason="connection"}`, "", fault{Kind: "refuse"}, "issue", 1},
		{`api_rate_limit_wait_seconds_total`, "", fault{Status: 429, Header: http.Header{"Retry-After": {"7"}}}, "issue", 7},
		{`rotations_total{trigger="manual",result="success"}`, "", fault{}, "rotate", 1},
		{`rotations_total{trigger="manual",result="failure"}`, "", fails, "rotate", 1},
		{`rotations_total{trigger="plugin",result="success"}`, "hourly hour", fault{}, "tick", 1},
		{`rotations_total{trigger="plugin",result="failure"}`, "hourly hour", refused, "tick", 1},
		{`cleanups_total{result="success"}`, left, fault{}, "tick", 1},
		{`cleanups_total{result="failure"}`, left, refused, "tick", 1},
		{`cleanups_pending`, "", fails, "revoke", 1},
		{`cleanups_pending`, left, fault{}, "tick", -1},
		{`tidy_passes_total{result="success"}`, "", fault{}, "tidy", 1},
		{`tidy_passes_total{result="failure"}`, "", refused, "tidy", 1},
		{`tidy_passes_total{result="success"}`, "hour", fault{}, "tick", 1},
		{`tidy_deletions_total{result="success"}`, left, fault{}, "tick", 1},
		{`tidy_deletions_total{result="failure"}`, left, undeletable, "tick", 1},
		{`tidy_last_pass_timestamp_seconds`, "hour", fault{}, "tidy", start + 3600},
		{`lost_creates`, "", fails, "issue", 1},
		{`lost_creates`, left, fault{}, "tick", -1},
		{`admin_key_last_rotation_timestamp_seconds`, "hour", fault{}, "rotate", 3600},
		{`admin_key_next_rotation_timestamp_seconds`, "", fault{}, "hourly", start + 3600},
		{`admin_key_expiry_timestamp_seconds`, "hourly", fault{}, "rotate", start + 7200},
		{`admin_keys_pending_deletion`, "", undeletable, "rotate", 1},
		{`build_info{version="",goversion="` + runtime.Version() + `"}`, "", fault{}, "", 0},
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
				if tt.fault.Status != 0 || tt.fault.Kind != "" || tt.fault.Times != 0 {
					e.sim.Inject(tt.fault)
				}
				for _, name := range strings.Fields(tt.do) {
					acts[name](e, l)
				}
				after, opposite := e.series(), strings.NewReplacer("success", "failure", "failure", "success").Replace(tt.series)
				name := metricPrefix + tt.series
				if _, ok := after[name]; !ok || math.Abs(after[name]-before[name]-tt.want) > 1e-6 {
					t.Errorf("moved by %v, want %v", after[name]-before[name], tt.want)
				}
				if name := metricPrefix + opposite; opposite != tt.series && after[name] != before[name] {
					t.Errorf("%s moved too", opposite)
				}
			})
		})
	}
	for _, f := range families {
		if !moved[f.name] {
			t.Errorf("no test sees %s move", f.name)
		}
	}
}

// TestMetricsStart: bounded series are there from the start, for Prometheus to see the first event.
func TestMetricsStart(t *testing.T) {
	e := newEnv(t)
	e.equal("series", len(e.series()), 2+3*2+3*2+3)
}

// TestMetricsDocumented: whoever adds a metric adds it to README and to the dashboard.
func TestMetricsDocumented(t *testing.T) {
	for _, file := range []string{"README.md", "examples/grafana/dashboard.json"} {
		text, err := os.ReadFile(file)
		for _, f := range families {
			if err != nil || !strings.Contains(string(text), metricPrefix+f.name) {
				t.Errorf("%s lacks %s, %v", file, metricPrefix+f.name, err)
			}
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
			if err = errors.Join(err, failure(resp, doErr)); err != nil {
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

// body is the data of a request.
type body = map[string]any

// with returns a copy of data with another value of a field; without one, the copy lacks it.
func with(data body, field string, value ...any) body {
	c := maps.Clone(data)
	delete(c, field)
	for _, v := range value {
		c[field] = v
	}
	return c
}

// credentials returns the fields by which config knows the simulator's first admin key.
func (e *env) credentials() body {
	key, id := e.sim.AdminKey()
	return body{"admin_api_key": key, "admin_api_key_id": id, "organization_id": openaisim.DefaultOrganization}
}

// outcome makes a request on the state of a snapshot and tells all that comes of it: answer, calls to OpenAI, storage.
func (e *env) outcome(s *vaultsim.Snapshot, op logical.Operation, path string, data body) string {
	e.Restore(s)
	e.wire.sent()
	resp, err := e.Do(op, path, data)
	text := fmt.Sprintf("error %v, %d calls", failure(resp, err), len(e.wire.sent()))
	if resp != nil && resp.Secret != nil {
		return text + " ttl " + resp.Secret.TTL.String()
	} else if resp != nil {
		text += fmt.Sprint(resp.Data)
	}
	for _, key := range []string{"config", "roles/new"} {
		if entry, err := e.Storage.Get(context.Background(), key); err == nil && entry != nil {
			text += "\n" + string(entry.Value)
		}
	}
	return text
}

// TestRealFields: on each path, for each field of the path table, null is the same as a request without the field, on a
// new entry and on one whose values are not the defaults. White space at the ends of keys, ids and the like is dropped,
// and refused within.
func TestRealFields(t *testing.T) {
	certificate, key := newCertificate(t)
	inBubble(t, func(t *testing.T, e *env) {
		account := e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")
		whole, other := e.credentials(), e.credentials()
		maps.Copy(whole, body{"api_endpoint": "https://eu.api.openai.com/v1", "rotation_schedule": "0 0 * * *",
			"rotation_window": "2h", "admin_key_ttl": "72h",
			"ca_certificate": certificate, "client_certificate": certificate, "client_key": key})
		maps.Copy(other, body{"rotation_policy": "p", "rotation_period": "24h", "disable_automated_rotation": true,
			"verify_connection": false})
		trimmed := regexp.MustCompile(`^(admin_api_key|.*_ids?|api_endpoint|service_account_role)$`)
		seen := map[string]bool{"rolesname": true, "credsname": true} // they are in the path
		for _, tt := range []struct {
			op   logical.Operation
			path string
			data body
		}{
			{"update", "config", whole}, {"update", "config", other},
			{"update", "roles/new", body{"project_id": openaisim.DefaultProject, "ttl": "2h", "max_ttl": "3h",
				"service_account_name_template": "x", "service_account_description": "y", "enforce_key_expiry": false,
				"scopes": "api.a.read", "service_account_role": "owner"}},
			{"update", "roles/new", body{"project_id": openaisim.DefaultProject, "service_account_id": account}},
			{"read", "creds/web", body{"ttl": "15m"}}, {"update", "creds/web", body{"ttl": "15m"}},
			{"update", "tidy", body{"dry_run": true, "mount_id": "aaaaaa", "project_ids": openaisim.DefaultProject}},
			{"read", "metrics", body{"format": "prometheus"}},
		} {
			_ = e.Storage.Delete(context.Background(), tt.path) // config or the role; nothing else is stored by its path
			fresh := e.Snapshot()
			e.op(tt.op, tt.path, tt.data)
			stored := e.Snapshot()
			head, _, _ := strings.Cut(tt.path, "/")
			for field, value := range tt.data {
				seen[head+field] = true
				same := func(what string, s *vaultsim.Snapshot, data, as body) {
					t.Helper()
					if got, want := e.outcome(s, tt.op, tt.path, data), e.outcome(s, tt.op, tt.path, as); got != want {
						t.Errorf("%s with %s %s: got %s, want %s", tt.path, field, what, got, want)
					}
				}
				same("null, new", fresh, with(tt.data, field, nil), with(tt.data, field))
				same("null, stored", stored, body{field: nil}, body{})
				if !trimmed.MatchString(field) {
					continue
				}
				v := value.(string)
				for _, spaced := range []string{v + "\n", v + "\r\n", " \t" + v + " "} {
					same("in white space", fresh, with(tt.data, field, spaced), tt.data)
				}
				e.refused(tt.path, with(tt.data, field, v[:4]+" "+v[4:]), field)
				e.refused(tt.path, with(tt.data, field, v[:4]+"\n"+v[4:]), field)
			}
			e.Restore(fresh)
			e.configure(nil)
		}
		for _, p := range e.b().Paths {
			for field := range p.Fields {
				if head, _, _ := strings.Cut(strings.Trim(p.Pattern, "^$"), "/"); !seen[head+field] {
					t.Errorf("field %s of %s is not tried", field, p.Pattern)
				}
			}
		}
	})
}

// TestRealEmptyBoolean: an empty text is no boolean: it does not turn off an expiry, a proof or a dry run.
func TestRealEmptyBoolean(t *testing.T) {
	e := newConfiguredEnv(t)
	e.refused("roles/web", map[string]any{"enforce_key_expiry": ""}, "enforce_key_expiry does not take this value")
	e.refused("config", map[string]any{"verify_connection": ""}, "verify_connection does not take this value")
	e.refused("config", map[string]any{"disable_automated_rotation": ""}, "disable_automated_rotation does not take")
	e.refused("tidy", map[string]any{"dry_run": ""}, "dry_run does not take this value")
}

// TestRealWrite: creds takes its parameters by PUT and POST as by a read.
func TestRealWrite(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		for ttl, want := range map[any]time.Duration{"15m": 900e9, 900: 900e9, "900": 900e9, nil: time.Hour} {
			resp := e.op(logical.UpdateOperation, "creds/web", body{"ttl": ttl})
			keys := e.sim.ProjectKeys(openaisim.DefaultProject)
			life := time.Until(keys[len(keys)-1].Expires) - keyGrace
			if resp.Secret == nil || resp.Secret.TTL != want || life != want {
				t.Errorf("ttl %v: got %+v and a key for %s, want %s", ttl, resp.Secret, life, want)
			}
		}
		e.refused("creds/web", body{"ttl": "25h"}, "max_ttl")
	})
}

// TestRealScopes: scopes are kept in the order in which they are written, each once, up to OpenAI.
func TestRealScopes(t *testing.T) {
	e := newConfiguredEnv(t)
	written := []string{"api.responses.write", "api.model.request", "api.responses.write", "api.a.read"}
	want := strings.Repeat(" [api.responses.write api.model.request api.a.read]", 3)[1:]
	for _, scopes := range []any{written, strings.Join(written, ",")} {
		e.ok("roles/web", body{"scopes": scopes})
		l := e.lease("web")
		key := e.sim.ProjectKeys(openaisim.DefaultProject)[0]
		e.revoke(l)
		if got := fmt.Sprint(e.get("roles/web").Data["scopes"], l.Data["scopes"], key.Scopes); got != want {
			t.Errorf("role, creds and OpenAI: got %s, want %s", got, want)
		}
	}
}

// leftovers tells how many revocations and how many replaced admin keys are pending.
func (e *env) leftovers() string {
	e.idle()
	return fmt.Sprint(len(e.Storage.Keys("cleanup/")), len(e.config().PendingDeletion))
}

// replacedKey leaves a replaced admin key for later. processed: it is gone at OpenAI.
func (e *env) replacedKey(processed bool) {
	e.sim.Inject(openaisim.Fault{Method: "DELETE", Path: "admin_api_keys", Process: processed, Kind: "close", Times: -1})
	e.op(logical.UpdateOperation, "config/rotate", nil)
	e.sim.ClearFaults()
}

// TestRealGone: what is gone at OpenAI is revoked, in whatever words OpenAI refuses to delete it once more; likewise a
// replaced admin key.
func TestRealGone(t *testing.T) {
	for i, status := range []int{400, 404, 410, 422, 400, 404, 410, 422} {
		inBubble(t, func(t *testing.T, e *env) {
			e.ok("roles/key", body{"project_id": openaisim.DefaultProject,
				"service_account_id": e.sim.AddServiceAccount(openaisim.DefaultProject, "app", "member")})
			e.sim.SetGoneStatus(status, i < 4)
			for _, role := range []string{"web", "key"} {
				l := e.lease(role)
				e.DropNext()
				_ = e.Revoke(l) // Vault does not get the answer
				e.revoke(l)
			}
			e.replacedKey(true)
			e.Run(2 * time.Minute)
			if got := e.leftovers(); got != "0 0" {
				t.Errorf("%d, typed %v: got %s left, want 0 0", status, i < 4, got)
			}
		})
	}
}

// TestRealNotGone: a refusal to delete what OpenAI still has leaves it pending, and tidy lists it; likewise the answers
// of a server that is not OpenAI's API and says the same to everything.
func TestRealNotGone(t *testing.T) {
	for _, status := range []int{400, 404, 405, 410} {
		for _, text := range []string{"<html>", `{"detail":"Not Found"}`, `{"error":{"message":"Not found."}}`,
			`{"error":{"message":"Invalid URL (DELETE /v2)","type":"invalid_request_error","code":null}}`} {
			for _, method := range []string{"DELETE", ""} { // refused
				inBubble(t, func(t *testing.T, e *env) {
					l := e.lease("web")
					e.replacedKey(false)
					e.sim.Inject(openaisim.Fault{Method: method, Status: status, Body: text, Times: -1})
					err := e.Revoke(l)
					e.Run(3 * time.Minute)
					got := fmt.Sprint(e.leftovers(), e.op(logical.UpdateOperation, "tidy", nil).Data["pending"])
					if want := fmt.Sprintf("1 1[%s]", l.Data["service_account_id"]); err == nil || got != want {
						t.Errorf("%s %d %s: got error %v and %s left, want %s", method, status, text, err, got, want)
					}
					e.sim.ClearFaults()
					e.Run(2 * time.Minute)
					e.have(0, 0, "when OpenAI deletes again")
				})
			}
		}
	}
}

// newCertificate returns a certificate that signs itself, and its key, in PEM.
func newCertificate(t *testing.T) (certificate, key string) {
	t.Helper()
	private, _ := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().AddDate(100, 0, 0), IsCA: true,
		BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(crand.Reader, template, template, &private.PublicKey, private)
	raw, keyErr := x509.MarshalPKCS8PrivateKey(private)
	if err != nil || keyErr != nil {
		t.Fatal(err, keyErr)
	}
	return toPEM("CERTIFICATE", der), toPEM("PRIVATE KEY", raw)
}

func toPEM(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// serveTLS serves the API over TLS and returns its address and private authority. It demands the certificate client.
func serveTLS(t *testing.T, handler http.Handler, client string) (address, ca string) {
	t.Helper()
	server := httptest.NewUnstartedServer(handler)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.EnableHTTP2 = true
	if client != "" {
		server.TLS = &tls.Config{ClientCAs: x509.NewCertPool(), ClientAuth: tls.RequireAndVerifyClientCert}
		server.TLS.ClientCAs.AppendCertsFromPEM([]byte(client))
	}
	server.StartTLS()
	t.Cleanup(server.Close)
	return server.URL + "/v1", toPEM("CERTIFICATE", server.Certificate().Raw)
}

// overNetwork makes a mount's calls go over the network, through a proxy unless that is nil. A role "web" is there.
func (e *env) overNetwork(proxy *url.URL) {
	transport := newTransport()
	transport.Proxy = http.ProxyURL(proxy)
	e.b().transport = transport
	e.put("roles/web", `{"project_id":"proj_sim"}`)
}

// TestRealNothingSent: a call that did not get through the proxy or the TLS handshake was not sent: it is made again
// like one whose connection is refused, nothing is looked for, and the error says what to look at. One that was cut off
// is not made again, but looked for.
func TestRealNothingSent(t *testing.T) {
	stranger, _ := newCertificate(t)
	for want, answer := range map[string]int{ // of a proxy; -1: it is dead; 0: there is none
		"proxyconnect": -1, "proxy answered 407": 407, "proxy answered 403": 403, "unknown authority": 0, "no answer": 0,
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			e := newEnv(t)
			via := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(answer) }))
			defer via.Close()
			proxy, _ := url.Parse(via.URL)
			if answer == 0 {
				proxy = nil
			} else if answer < 0 {
				via.Close()
			}
			e.overNetwork(proxy)
			address, ca := serveTLS(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
				panic(http.ErrAbortHandler)
			}), "")
			ca = map[bool]string{true: stranger, false: ca}[want == "unknown authority"]
			e.configure(body{"api_endpoint": address, "ca_certificate": ca, "verify_connection": false})
			_, err := e.Issue("creds/web", nil)
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got error %v, want %q in it", err, want)
			}
			count := fmt.Sprint(maxAttempts, " attempts, 0 lost")
			if want == "no answer" { // it was cut off
				count = "1 attempts, 1 lost"
			}
			errs := e.b().metrics.series["api_requests_total"][`operation="create_service_account",status="error"`]
			if got := fmt.Sprint(errs, " attempts, ", len(e.b().lost), " lost"); got != count {
				t.Errorf("got %s, want %s", got, count)
			}
		})
	}
	// A TLS 1.3 server refuses our certificate when the call is on its way.
	c := &client{config: config{AdminAPIKey: "sk-admin-x"}}
	for text, sent := range map[string]bool{"connection reset": true, "remote error: tls: internal error": true,
		"x: remote error: tls: bad certificate": false, "http2: client conn could not be established": false} {
		err := c.noAnswer(errors.New(text), true)
		if notDone(err) == sent || strings.Contains(err.Error(), "client_certificate") == sent {
			t.Errorf("%s: got error %v, taken as not done: %v", text, err, notDone(err))
		}
	}
}

// TestRealWriteFails: a request that could not be written whole was not done, also when there was a connection: so a
// TLS 1.3 client mostly learns that its certificate is missing. One that was written may have been.
func TestRealWriteFails(t *testing.T) {
	for written, lost := range map[bool]int{false: 0, true: 1} {
		e := newConfiguredEnv(t)
		e.wire.setFault(func(req *http.Request, _ func() (*http.Response, error)) (*http.Response, error) {
			err := &net.OpError{Op: "write", Net: "tcp", Err: syscall.EPIPE}
			trace := httptrace.ContextClientTrace(req.Context())
			trace.GetConn("")
			trace.GotConn(httptrace.GotConnInfo{})
			trace.WroteRequest(httptrace.WroteRequestInfo{Err: map[bool]error{false: err}[written]})
			return nil, err
		})
		if _, err := e.Issue("creds/web", nil); err == nil || len(e.b().lost) != lost {
			t.Errorf("written %v: got error %v and %d lost creates, want one and %d", written, err, len(e.b().lost), lost)
		}
	}
}

// tally returns how many calls of a method met service accounts, and how many of these a rate limit refused.
func (e *env) tally(method string) (calls, limited int) {
	for _, c := range e.sim.Calls() {
		if c.Method == method && strings.Contains(c.Path, "service_accounts") {
			if calls++; c.Status == http.StatusTooManyRequests {
				limited++
			}
		}
	}
	return calls, limited
}

// together reads n credentials, 1 ms apart, and returns the leases in the order in which they were served, the numbers
// of their reads in that order, and the errors.
func (e *env) together(n int) (leases []*vaultsim.Lease, order []int, errs []error) {
	var work sync.WaitGroup
	var mu sync.Mutex
	for i := range n {
		work.Go(func() {
			time.Sleep(time.Duration(i) * time.Millisecond)
			l, err := e.Issue("creds/web", nil)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else {
				leases, order = append(leases, l), append(order, i)
			}
		})
	}
	work.Wait()
	return leases, order, errs
}

// revokeAll revokes all leases at once.
func (e *env) revokeAll() {
	var work sync.WaitGroup
	for _, l := range e.Leases() {
		work.Go(func() { _ = e.Revoke(l) })
	}
	work.Wait()
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

// TestLaneReads: on a slow endpoint 14 reads at once are served in their order and within their time, other endpoints
// meanwhile; all are revoked within three minutes.
func TestLaneReads(t *testing.T) {
	eachLimit(t, func(t *testing.T, e *env, limit func()) {
		limit()
		start := time.Now()
		var other atomic.Int64 // nanoseconds
		time.AfterFunc(20*time.Second, func() {
			e.ok("roles/other", body{"project_id": openaisim.DefaultProject})
			other.Store(int64(time.Since(start) - 20*time.Second))
		})
		leases, order, errs := e.together(14)
		calls, limited := e.tally("POST")
		t.Logf("14 reads: %d served in %s with %d calls, %d refused", len(leases), time.Since(start), calls, limited)
		if len(leases) < 13 || calls > 28 || !slices.IsSorted(order) {
			t.Errorf("got %d leases with %d calls in the order %v, errors %v", len(leases), calls, order, errs)
		}
		again := time.Now()
		for time.Since(again) < 3*time.Minute && len(e.Leases()) > 0 {
			e.revokeAll()
		}
		calls, limited = e.tally("DELETE")
		t.Logf("revoked in %s with %d calls, %d refused", time.Since(again), calls, limited)
		if beside := time.Duration(other.Load()); beside == 0 || beside > time.Second {
			t.Errorf("a call of another endpoint meanwhile took %s, want at most 1s", beside)
		}
		e.have(0, 0, "after three minutes")
	})
}

// TestLaneFull: what can't be served within its time says so, and nothing of it is left or looked for.
func TestLaneFull(t *testing.T) {
	eachLimit(t, func(t *testing.T, e *env, limit func()) {
		limit()
		leases, _, errs := e.together(60)
		for _, err := range errs {
			if !strings.Contains(strings.ToLower(err.Error()), "rate limit") {
				t.Errorf("got error %v, want it to name the rate limit", err)
			}
		}
		if got := len(leases); got < 13 || got+len(errs) != 60 || len(e.b().lost) > 0 {
			t.Errorf("got %d leases, %d errors and %d lost creates, want at least 13 and 0", got, len(errs), len(e.b().lost))
		}
		e.have(len(leases), len(leases), "when all are answered")
	})
}

// TestLaneEnd: 100 leases that end at once are deleted at the endpoint's pace, with at most one refused call for each
// served one, and no lease becomes irrevocable.
func TestLaneEnd(t *testing.T) {
	eachLimit(t, func(t *testing.T, e *env, limit func()) {
		for range 80 { // so many fast answers are no leave for many calls at once
			e.revoke(e.lease("web"))
		}
		leases, _, _ := e.together(100)
		limit()
		start := leases[len(leases)-1].Expires
		e.Run(time.Until(start))
		for len(e.sim.ServiceAccounts(openaisim.DefaultProject)) > 0 && time.Since(start) < time.Hour {
			e.Run(time.Second)
		}
		calls, limited := e.tally("DELETE")
		t.Logf("100 leases: deleted in %s with %d calls, %d refused", time.Since(start), calls, limited)
		if took := time.Since(start); took > 15*time.Minute || limited > calls-limited {
			t.Errorf("took %s with %d calls, %d refused, want at most 15m and half of them", took, calls, limited)
		}
		e.Run(30 * time.Minute)
		if got := e.leftovers(); got != "0 0" || len(e.Leases()) > 0 { // an irrevocable one stays a day
			t.Errorf("got %d leases and %s left", len(e.Leases()), got)
		}
	})
}

// TestLaneTold: where OpenAI says when to come again, 200 revocations at once go at its pace with few refusals.
func TestLaneTold(t *testing.T) {
	for _, latency := range []time.Duration{0, 300 * time.Millisecond} {
		inBubble(t, func(t *testing.T, e *env) {
			e.together(200)
			e.sim.SetLatency(latency)
			e.sim.SetRateLimit(20, 20)
			e.sim.ResetCalls()
			start := time.Now()
			e.revokeAll()
			calls, limited := e.tally("DELETE")
			t.Logf("latency %s: 200 revoked in %s with %d calls, %d refused", latency, time.Since(start), calls, limited)
			if took := time.Since(start); took > 12*time.Second || limited > 80 || len(e.Leases()) > 0 {
				t.Errorf("took %s with %d refused, %d leases left", took, limited, len(e.Leases()))
			}
		})
	}
}

// TestRealTLS: a credential lives over TLS with a private authority and a certificate of ours. A mistake names its
// field; the key is shown nowhere; the settings change only together with the admin key.
func TestRealTLS(t *testing.T) {
	certificate, key := newCertificate(t)
	otherCertificate, otherKey := newCertificate(t)
	e := newEnv(t)
	e.overNetwork(nil)
	address, ca := serveTLS(t, e.sim, certificate)
	good, lines := e.credentials(), strings.SplitAfter(key, "\n")
	maps.Copy(good, body{
		"api_endpoint": address, "ca_certificate": ca, "client_certificate": certificate, "client_key": key})
	shown := ""
	for field, values := range map[string][]any{
		"ca_certificate":     {"no PEM", key, ca + key, toPEM("CERTIFICATE", []byte("x"))},
		"client_certificate": {"no PEM", "", certificate + key, key + certificate, otherCertificate},
		"client_key":         {"no PEM", "", otherKey, certificate, lines[0] + lines[2], []any{body{"x": key}}},
	} {
		for _, value := range values {
			resp, err := e.Write("config", with(good, field, value))
			e.refusal(resp, err, field)
			if shown += fmt.Sprint(failure(resp, err)); len(e.Storage.Keys("config")) > 0 {
				t.Fatalf("%s %.10q: stored", field, value)
			}
		}
	}
	e.ok("config", good)
	if got := e.get("config").Data; got["ca_certificate"] != ca || got["client_certificate"] != certificate {
		t.Error("config does not show the certificates")
	}
	for _, data := range []body{{"ca_certificate": ""}, {"client_key": "", "client_certificate": ""},
		{"client_certificate": certificate + "\n"}, {"client_certificate": otherCertificate, "client_key": otherKey}} {
		e.refused("config", data, "admin_api_key")
	}
	e.ok("config", body{"ca_certificate": ca, "client_key": key}) // as they are
	l := e.lease("web")
	e.op(logical.UpdateOperation, "config/rotate", nil)
	e.revoke(l)
	e.have(0, 0, "after revocation")
	shown += fmt.Sprint(e.get("config").Data) + e.Log.String()
	if strings.Contains(shown, lines[1][:20]) || strings.Contains(shown, "PRIVATE KEY") {
		t.Error("an error, config or the log shows the key")
	}
	if f := e.b().Route("config").Fields["client_key"]; f.Required || !f.DisplayAttrs.Sensitive {
		t.Error("client_key is required, or not marked as a secret")
	}
}

// TestRealPermission: what the admin key is not allowed to do is the operator's problem: no 400, and the error, or the
// warning where a role can't be proved, names the permission.
func TestRealPermission(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		refused := func(path string) {
			t.Helper()
			resp, err := e.Do(logical.UpdateOperation, path, body{"project_id": openaisim.DefaultProject})
			if resp.IsError() || !strings.Contains(fmt.Sprint(resp, err), "Organization Administration: Write") {
				t.Errorf("%s: got response %v, error %v", path, resp, err)
			}
		}
		e.sim.Inject(openaisim.Fault{Status: 403})
		refused("roles/new")
		_, id := e.sim.AdminKey()
		e.sim.SetAdminKeyAccess(id, "read")
		e.configure(nil) // passes
		refused("creds/web")
		refused("config/rotate")
		if got := len(e.config().Creating) + len(e.b().lost); got != 0 {
			t.Errorf("got %d to look for, want none", got)
		}
	})
}

// TestRealDeadKey: a mount whose admin key is dead is disabled by a handful of runs, however many leases it has; and
// leases that end while it is dead are deleted when there is another key.
func TestRealDeadKey(t *testing.T) {
	for _, n := range []int{1, 8, 50} {
		for _, disable := range []bool{true, false} {
			inBubble(t, func(t *testing.T, e *env) {
				e.together(n)
				e.sim.Inject(openaisim.Fault{Status: 401, Times: -1})
				if runs := 1; disable {
					for ; e.Disable() != nil && runs < 100; runs++ {
					}
					if t.Logf("%d leases: %d runs", n, runs); runs > 6 {
						t.Errorf("%d leases: got %d runs, want at most 6", n, runs)
					}
					return
				}
				e.Run(3 * time.Hour)
				if got, want := e.leftovers(), fmt.Sprint(n, 0); got != want || len(e.Leases()) > 0 {
					t.Errorf("got %s left and %d leases, want %s and none", got, len(e.Leases()), want)
				}
				e.sim.ClearFaults()
				e.Run(2 * time.Minute)
				e.idle()
				e.have(0, 0, "when the key lives again")
			})
		}
	}
}

// TestRealFirstKeyAgain: a write that replaces a key which a rotation made warns, names its id and leaves it alive.
func TestRealFirstKeyAgain(t *testing.T) {
	inBubble(t, func(t *testing.T, e *env) {
		first := e.credentials()
		rotated := e.op(logical.UpdateOperation, "config/rotate", nil).Data["admin_api_key_id"].(string)
		e.refused("config", first, "refused") // by the proof
		other, otherID := e.sim.AddAdminKey("other")
		for _, tt := range []struct {
			data body
			want bool
		}{
			{body{"admin_key_ttl": 0}, false}, {with(first, "verify_connection", false), true},
			{with(first, "verify_connection", false), false}, {body{"admin_api_key": other, "admin_api_key_id": otherID}, false},
		} {
			resp := e.ok("config", tt.data)
			if got := resp != nil && strings.Contains(fmt.Sprint(resp.Warnings), rotated); got != tt.want {
				t.Errorf("warned of the rotated key: %v, want %v", got, tt.want)
			}
		}
		e.Run(3 * time.Hour)
		if !strings.Contains(fmt.Sprint(e.sim.AdminKeys()), rotated) || e.leftovers() != "0 0" {
			t.Errorf("got keys %v, and %s to delete", e.sim.AdminKeys(), e.leftovers())
		}
	})
}
