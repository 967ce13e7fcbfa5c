// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// recorder is a test that fails without failing the one that it is part of.
type recorder struct {
	testing.TB
	failures []string
}

func (r *recorder) Helper() {}

func (r *recorder) Errorf(format string, args ...any) {
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func (r *recorder) Fatalf(format string, args ...any) { r.Errorf(format, args...); panic(r) }

func (r *recorder) Fatal(args ...any) { r.Fatalf("%s", fmt.Sprint(args...)) }

// of returns the failures of do.
func (r *recorder) of(do func()) string {
	r.failures = nil
	func() {
		defer func() {
			if end := recover(); end != nil && end != any(r) {
				panic(end)
			}
		}()
		do()
	}()
	return strings.Join(r.failures, "\n")
}

// newChecked returns a mount whose path "strict" takes "n" only if it is "good", and stores it,
// and whose path "metrics" has the text *metrics.
func newChecked(t *testing.T, metrics *string) (*Vault, *recorder) {
	r := &recorder{TB: t}
	v := New(r, func(ctx context.Context, config *logical.BackendConfig) (logical.Backend, error) {
		write := func(ctx context.Context, req *logical.Request, d *framework.FieldData) (*logical.Response, error) {
			n := d.Get("n").(string)
			if odd, named := req.Data["odd"]; named && odd == nil {
				n = "odd"
			}
			if d.Get("trim").(bool) {
				n = strings.TrimSpace(n)
			}
			switch n {
			case "good", "goodness", "":
				err := req.Storage.Put(ctx, &logical.StorageEntry{Key: "strict", Value: []byte("good")})
				return &logical.Response{Warnings: []string{"a warning"}}, err
			case "broken":
				return nil, errors.New("an inner error")
			default:
				if n != "silent" {
					config.Logger.Debug("refused")
				}
				return logical.ErrorResponse("n can't be %v", n), nil
			}
		}
		show := func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
			return &logical.Response{Data: map[string]any{
				logical.HTTPContentType: "text/plain; version=0.0.4; charset=utf-8", logical.HTTPStatusCode: 200,
				logical.HTTPRawBody: []byte(*metrics),
			}}, nil
		}
		b := &framework.Backend{Paths: []*framework.Path{{
			Pattern: "strict", Fields: map[string]*framework.FieldSchema{
				"n": {Type: framework.TypeString}, "trim": {Type: framework.TypeBool}, "odd": {Type: framework.TypeInt},
			},
			Callbacks: map[logical.Operation]framework.OperationFunc{"update": write},
		}, {
			Pattern: "metrics", Fields: map[string]*framework.FieldSchema{"format": {Type: framework.TypeString}},
			Callbacks: map[logical.Operation]framework.OperationFunc{"read": show},
		}}}
		return b, b.Setup(ctx, config)
	})
	v.Leaks = func(text string) bool { return strings.Contains(text, "sk-") }
	return v, r
}

// TestChecks: each check passes what is right and fails the test otherwise, with a text that says why.
func TestChecks(t *testing.T) {
	v, r := newChecked(t, nil)
	good, bad := map[string]any{"n": "good"}, map[string]any{"n": "bad"}
	warned := &logical.Response{Warnings: []string{"one", "two sk-"}}
	for i, tt := range []struct {
		do   func()
		want string // in the failures; empty: none
	}{
		{func() { v.OK("strict", good) }, ""},
		{func() { v.OK("strict", bad) }, "update strict: n can't be bad"},
		{func() { v.Get("nowhere") }, "read nowhere: unsupported path"},
		{func() { v.Refused("strict", bad, "n can't", "bad") }, ""},
		{func() { v.Refused("strict", bad, "good") }, `n can't be bad, want an error with "good"`},
		{func() { v.Refused("strict", good) }, "want an error response"},
		{func() { v.Refused("strict", map[string]any{"n": "broken"}) }, "want an error response"},
		{func() { v.Refused("strict", map[string]any{"n": "sk-x"}) }, "an error shows a secret"},
		{func() { v.Refused("strict", map[string]any{"n": "silent"}) }, `got log "", want one line`},
		{func() { v.Mistake("update strict", bad, "bad") }, ""},
		{func() { v.Fails("it", errors.New("a b"), "a", "b") }, ""},
		{func() { v.Fails("it", nil) }, "it: got <nil>"},
		{func() { v.NoError(nil) }, ""},
		{func() { v.NoError(context.Canceled) }, "context canceled"},
		{func() { v.Warned("it", nil, 0) }, ""},
		{func() { v.Warned("it", warned, 1) }, "want 1"},
		{func() { v.Warned("it", warned, 2, "three") }, "three"},
		{func() { v.Warned("it", warned, 2, "one", "two") }, "a warning shows a secret"},
		{func() { Same(r, "it", []int{1}, "[1]") }, ""},
		{func() { Same(r, "it", 1, 2) }, "it:\n got 1\nwant 2"},
		{func() { v.Unchanged("it", func() {}) }, ""},
		{func() { v.Unchanged("it", func() { v.Storage.Set("x", "y") }) }, "as it was: it"},
		{func() { v.MustIssue("nowhere") }, "nowhere: unsupported path"},
		{func() { v.MustRevoke(&Lease{}) }, "revoke: lease not found"},
	} {
		got := r.of(tt.do)
		if !strings.Contains(got, tt.want) || tt.want == "" && got != "" {
			t.Errorf("check %d: got %q, want %q", i, got, tt.want)
		}
	}
	check(t, "storage", v.Storage.All()["strict"], "good")
	wrapped := New(r, func(ctx context.Context, config *logical.BackendConfig) (logical.Backend, error) {
		b := &framework.Backend{PathsSpecial: &logical.Paths{SealWrapStorage: []string{"wrapped"}}}
		return b, b.Setup(ctx, config)
	})
	wrapped.Storage.Set("wrapped", "a secret")
	wrapped.Storage.Set("open", "the other")
	check(t, "what is wrapped", r.of(func() { wrapped.OnlySealWrapped("one", "secret") }), "")
	check(t, "what is not", r.of(func() { wrapped.OnlySealWrapped("one", "other") }),
		"open holds what must be wrapped with Vault's seal")
}

// TestRefusesAll: a bad value that is accepted is found, alone or in the place of the valid one.
func TestRefusesAll(t *testing.T) {
	const accepted = "want an error response"
	for value, want := range map[any]string{"bad": "", "x": "", "good": accepted, nil: accepted} {
		v, r := newChecked(t, nil)
		got := r.of(func() { v.RefusesAll("strict", map[string]any{"n": "good"}, Bads("n", "can't be", value)) })
		if !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%v: got %q, want %q", value, got, want)
		}
	}
}

// TestScrape: the text format is read strictly.
func TestScrape(t *testing.T) {
	const counter = "# HELP my_x_total X.\n# TYPE my_x_total counter\n"
	const histogram = "# HELP my_h H.\n# TYPE my_h histogram\nmy_h_bucket{a=\"b\",le=\"1\"} 2\n"
	for text, want := range map[string]string{
		"": "", counter + "my_x_total 1\nmy_x_total{a=\"b c\"} 2.5\n": "",
		histogram + "my_h_bucket{a=\"b\",le=\"+Inf\"} 2\nmy_h_sum 1\nmy_h_count 2\n": "",
		histogram + "my_h_bucket{a=\"b\",le=\"+Inf\"} 1\n":                           "comes after",
		histogram + "my_h{a=\"b\"} 1\n":                                              "among my_h",
		counter + "my_x_total 1\nmy_x_total 1\n":                                     "twice",
		counter + "my_y_total 1\n":                                                   "among my_x_total",
		counter + counter:                                                            "of family my_x_total",
		counter + "my_x_total -1\n":                                                  "line \"my_x_total -1",
		counter + "my_x_total 1":                                                     "line \"my_x_total 1",
		"# TYPE my_x_total counter\n":                                                "of family",
		"# HELP my_x X.\n# TYPE my_x counter\n":                                      "my_x is a counter",
		"# HELP x_total X.\n# TYPE x_total counter\nx_total 1\n":                     "does not begin with my_",
	} {
		v, r := newChecked(t, &text)
		var values map[string]float64
		got := r.of(func() { values = v.Scrape("metrics", "my_") })
		if !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%q: got %q, want %q", text, got, want)
		}
		if want == "" && strings.Contains(text, "c\"} 2.5") {
			Same(t, "values", values, "map[my_x_total:1 my_x_total{a=\"b c\"}:2.5]")
		}
	}
}

// TestOutcome: two requests with the same outcome are told from one that differs in one thing.
func TestOutcome(t *testing.T) {
	v, _ := newChecked(t, nil)
	s, good := v.Snapshot(), map[string]any{"n": "good"}
	want := v.Outcome(s, "update strict", good)
	check(t, "outcome", want, "error <nil>, 0 requests, data map[], storage map[strict:good]")
	check(t, "outcome of another request", v.Outcome(s, "update strict", With(good, "n")), want)
	bad := v.Outcome(s, "update strict", With(good, "n", "bad"))
	check(t, "outcome of a refusal", bad,
		"error n can't be bad, 0 requests, data map[error:n can't be bad], storage map[]")
	Same(t, "the original", good, "map[n:good]")
}

// TestCheckFields: a field that is not trimmed, and one whose null is not the same as its absence, are found.
func TestCheckFields(t *testing.T) {
	trimmed := regexp.MustCompile("^n$")
	for want, data := range map[string]map[string]any{ // want: in the failures
		"":                       {"n": "goodness", "trim": true},
		"with n in white space":  {"n": "goodness"},
		"with odd null":          {"odd": 1},
		"n can't be bad":         {"n": "bad"},
		"want an error response": {"n": "good", "trim": true}, // white space within is at its end
	} {
		v, r := newChecked(t, nil)
		v.Storage.Set("before", "x")
		got := r.of(func() { v.CheckFields("update strict", data, trimmed) })
		if !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("%v: got %q, want %q", data, got, want)
		}
		if want != "n can't be bad" { // which ends the test
			Same(t, "storage", v.Storage.Keys(""), "[before]")
		}
	}
}

// TestCheckPaths: a path without any of what Vault's documents need is found.
func TestCheckPaths(t *testing.T) {
	newPath := func() *framework.Path {
		handler := func(context.Context, *logical.Request, *framework.FieldData) (*logical.Response, error) {
			return nil, nil
		}
		field := map[string]*framework.FieldSchema{"name": {Description: "N."}, "key": {
			Description: "K.", DisplayAttrs: &framework.DisplayAttributes{Sensitive: true},
		}}
		return &framework.Path{
			Pattern: "x/" + framework.GenericNameRegex("name"), HelpSynopsis: "S.", HelpDescription: "D.",
			Fields: field, DisplayAttrs: &framework.DisplayAttributes{OperationPrefix: "my"},
			Operations: map[logical.Operation]framework.OperationHandler{"read": &framework.PathOperation{
				Callback: handler, Summary: "S.", DisplayAttrs: &framework.DisplayAttributes{OperationVerb: "read"},
				Responses: map[int][]framework.Response{200: {{Description: "OK", Fields: field}}},
			}},
		}
	}
	operation := func(p *framework.Path) *framework.PathOperation {
		return p.Operations["read"].(*framework.PathOperation)
	}
	for want, spoil := range map[string]func(p *framework.Path){
		"":                 func(*framework.Path) {},
		"lacks a help":     func(p *framework.Path) { p.HelpDescription = "" },
		"operation prefix": func(p *framework.Path) { p.DisplayAttrs.OperationPrefix = "other" },
		"existence check": func(p *framework.Path) {
			p.ExistenceCheck = func(context.Context, *logical.Request, *framework.FieldData) (bool, error) {
				return true, nil
			}
		},
		"described as \"\"":  func(p *framework.Path) { p.Fields["name"].Description = "" },
		"as a secret: false": func(p *framework.Path) { p.Fields["key"].DisplayAttrs = nil },
		"a callback":         func(p *framework.Path) { operation(p).Callback = nil },
		"a summary":          func(p *framework.Path) { operation(p).Summary = "" },
		"a verb":             func(p *framework.Path) { operation(p).DisplayAttrs.OperationVerb = "" },
		"or a response":      func(p *framework.Path) { operation(p).Responses = nil },
		"response 200 is":    func(p *framework.Path) { operation(p).Responses[200][0].Fields = nil },
	} {
		path, r := newPath(), &recorder{TB: t}
		spoil(path)
		got := r.of(func() {
			operations := CheckPaths(r, &framework.Backend{Paths: []*framework.Path{path}}, "my", "key")
			Same(t, "operations", operations, "[x/NAME read]")
		})
		if !strings.Contains(got, want) || want == "" && got != "" {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// TestTogether: credentials are served and leases revoked at once.
func TestTogether(t *testing.T) {
	mount(t, func(t *testing.T, v *Vault, f *fake) {
		v.Storage.SetFault(func() func(string, string) error {
			puts := 0
			return func(string, string) error {
				if puts++; puts == 2 {
					return ErrInjected
				}
				return nil
			}
		}())
		leases, order, errs := v.IssueTogether(3, "creds")
		Same(t, "order and errors", fmt.Sprint(order, errs), "[0 2] [injected failure]")
		check(t, "leases", len(leases), len(v.Leases()))
		f.revokeErr = errors.New("no")
		v.RevokeTogether()
		check(t, "leases whose revocation failed", len(v.Leases()), 2)
		f.revokeErr = nil
		v.RevokeTogether()
		check(t, "leases", len(v.Leases()), 0)
		check(t, "revocations", len(f.revokes), 4)
		start := time.Now()
		var calls atomic.Int64
		AtOnce(5, 3, func() { time.Sleep(time.Second); calls.Add(1) })
		check(t, "calls", calls.Load(), 15)
		check(t, "time of the calls", time.Since(start), 3*time.Second)
	})
}
