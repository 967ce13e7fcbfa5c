// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"fmt"
	"maps"
	"math"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// The methods below fail the test that has called New. NoError, Must, OK, Get, MustIssue and
// MustRevoke end it.

// Same fails the test unless got and want are the same as fmt prints them.
func Same(tb testing.TB, what string, got, want any) {
	tb.Helper()
	if got, want := fmt.Sprint(got), fmt.Sprint(want); got != want {
		tb.Errorf("%s:\n got %s\nwant %s", what, got, want)
	}
}

// NoError ends the test at an error.
func (v *Vault) NoError(err error) {
	v.tb.Helper()
	if err != nil {
		v.tb.Fatal(err)
	}
}

// NoSecrets fails the test if Leaks finds a secret in text. where says what text is.
func (v *Vault) NoSecrets(where, text string) {
	v.tb.Helper()
	if v.Leaks != nil && v.Leaks(text) {
		v.tb.Errorf("%s shows a secret", where)
	}
}

// Request makes a request that is written as its operation and path, like "read config".
func (v *Vault) Request(text string, data map[string]any) (*logical.Response, error) {
	op, path, _ := strings.Cut(text, " ")
	return v.Do(logical.Operation(op), path, data)
}

// Must makes a request like Request, which must succeed.
func (v *Vault) Must(text string, data map[string]any) *logical.Response {
	v.tb.Helper()
	resp, err := v.Request(text, data)
	if err := Failure(resp, err); err != nil {
		v.tb.Fatalf("%s: %v", text, err)
	}
	return resp
}

// OK makes a write that must succeed.
func (v *Vault) OK(path string, data map[string]any) *logical.Response {
	v.tb.Helper()
	return v.Must("update "+path, data)
}

// Get makes a read that must succeed.
func (v *Vault) Get(path string) *logical.Response {
	v.tb.Helper()
	return v.Must("read "+path, nil)
}

// Refused is Mistake for a write.
func (v *Vault) Refused(path string, data map[string]any, want ...string) {
	v.tb.Helper()
	v.Mistake("update "+path, data, want...)
}

// Mistake makes a request like Request, which must be the caller's mistake (a 400 over HTTP),
// with every text of want in its message, and one line of the log at debug level: nobody may
// fill Vault's log with mistakes.
func (v *Vault) Mistake(text string, data map[string]any, want ...string) {
	v.tb.Helper()
	before := len(v.Log.String())
	resp, err := v.Request(text, data)
	v.Refusal(resp, err, want...)
	if got := v.Log.String()[before:]; strings.Count(got, "\n") != 1 || !strings.Contains(got, "[DEBUG]") {
		v.tb.Errorf("%s %v: got log %q, want one line at debug level", text, data, got)
	}
}

// Refusal fails the test unless an answer is a caller's mistake whose message has every text of
// want.
func (v *Vault) Refusal(resp *logical.Response, err error, want ...string) {
	v.tb.Helper()
	if err != nil || !resp.IsError() {
		v.tb.Errorf("got response %v and error %v, want an error response", resp, err)
		return
	}
	v.Fails("the error response", resp.Error(), want...)
}

// Fails fails the test unless err is an error with every text of want.
func (v *Vault) Fails(what string, err error, want ...string) {
	v.tb.Helper()
	for _, text := range append(want, "") {
		if err == nil || !strings.Contains(err.Error(), text) {
			v.tb.Errorf("%s: got %v, want an error with %q", what, err, text)
		}
	}
	v.NoSecrets("an error", fmt.Sprint(err))
}

// Warned fails the test unless an answer has n warnings, and every text of want is in one.
func (v *Vault) Warned(what any, resp *logical.Response, n int, want ...string) {
	v.tb.Helper()
	var got []string
	if resp != nil {
		got = resp.Warnings
	}
	text := strings.Join(got, "\n")
	if len(got) != n || slices.ContainsFunc(want, func(s string) bool { return !strings.Contains(text, s) }) {
		v.tb.Errorf("%v: got warnings %q, want %d with %q in them", what, got, n, want)
	}
	v.NoSecrets("a warning", text)
}

// Unchanged runs request, after which storage must be as it was.
func (v *Vault) Unchanged(what any, request func()) {
	v.tb.Helper()
	before := v.Storage.All()
	request()
	Same(v.tb, fmt.Sprint("storage is as it was: ", what), maps.Equal(v.Storage.All(), before), true)
}

// OnlySealWrapped fails the test if an entry of storage that Vault does not wrap with its seal has
// one of the texts in it.
func (v *Vault) OnlySealWrapped(texts ...string) {
	v.tb.Helper()
	wrapped := v.Backend().SpecialPaths().SealWrapStorage
	for key, value := range v.Storage.All() {
		if !slices.Contains(wrapped, key) &&
			slices.ContainsFunc(texts, func(text string) bool { return strings.Contains(value, text) }) {
			v.tb.Errorf("%s holds what must be wrapped with Vault's seal", key)
		}
	}
}

// Bad is a value of a field that must be refused, by a message with the field's name and Want.
type Bad struct {
	Field, Want string
	Value       any // nil: the field is missing, where there is nothing yet
}

// Bads are several values of a field that are refused with the same text.
func Bads(field, want string, values ...any) (tests []Bad) {
	for _, value := range values {
		tests = append(tests, Bad{field, want, value})
	}
	return tests
}

// RefusesAll writes each bad value to path, in the place of the valid one where nothing is stored
// yet, and alone over the valid ones. It fails the test unless each write is refused and changes
// nothing, or if one of the former sends anything over the wire.
func (v *Vault) RefusesAll(path string, valid map[string]any, tests []Bad) {
	v.tb.Helper()
	v.Wire.Sent()
	for _, tt := range tests {
		data := maps.Clone(valid)
		data[tt.Field] = tt.Value
		maps.DeleteFunc(data, func(_ string, value any) bool { return value == nil })
		v.Unchanged(tt, func() { v.Refused(path, data, tt.Field, tt.Want) })
	}
	Same(v.tb, "requests about bad input", v.Wire.Sent(), []string{})
	v.OK(path, valid)
	for _, tt := range tests {
		if tt.Value != nil {
			v.Unchanged(tt, func() { v.Refused(path, map[string]any{tt.Field: tt.Value}, tt.Field, tt.Want) })
		}
	}
}

// Outcome makes a request like Request on the state of a snapshot, and tells all that comes of
// it: error, number of requests over the wire, the secret's TTL if there is one, otherwise the
// answer's data, and what is stored.
func (v *Vault) Outcome(s *Snapshot, text string, data map[string]any) string {
	v.Restore(s)
	v.Wire.Sent()
	resp, err := v.Request(text, data)
	outcome := fmt.Sprintf("error %v, %d requests", Failure(resp, err), len(v.Wire.Sent()))
	switch {
	case resp != nil && resp.Secret != nil:
		outcome += fmt.Sprint(", ttl ", resp.Secret.TTL)
	case resp != nil:
		outcome += fmt.Sprint(", data ", resp.Data)
	}
	return outcome + fmt.Sprint(", storage ", v.Storage.All())
}

// CheckFields makes a request like Request, which must succeed, on the present state. It fails the
// test unless for each field of data null is the same as a request without the field, before
// the request and after it, and unless, where trimmed matches the field's name, white space at
// the ends of its value is dropped, and within it is refused. Then the state is as before.
func (v *Vault) CheckFields(text string, data map[string]any, trimmed *regexp.Regexp) {
	v.tb.Helper()
	fresh := v.Snapshot()
	v.Must(text, data)
	stored := v.Snapshot()
	for field, value := range data {
		same := func(what string, s *Snapshot, data, as map[string]any) {
			v.tb.Helper()
			Same(v.tb, fmt.Sprint(text, " with ", field, " ", what), v.Outcome(s, text, data), v.Outcome(s, text, as))
		}
		same("null, new", fresh, With(data, field, nil), With(data, field))
		same("null, stored", stored, map[string]any{field: nil}, map[string]any{})
		if !trimmed.MatchString(field) {
			continue
		}
		s := value.(string)
		for _, spaced := range []string{s + "\n", s + "\r\n", " \t" + s + " "} {
			same("in white space", fresh, With(data, field, spaced), data)
		}
		v.Mistake(text, With(data, field, s[:4]+" "+s[4:]), field)
		v.Mistake(text, With(data, field, s[:4]+"\n"+s[4:]), field)
	}
	v.Restore(fresh)
}

// With returns a copy of data with another value of a field; without one, the copy lacks it.
func With(data map[string]any, field string, value ...any) map[string]any {
	c := maps.Clone(data)
	delete(c, field)
	for _, v := range value {
		c[field] = v
	}
	return c
}

// CheckPaths fails the test unless each path of a backend has what Vault's help and OpenAPI
// document need: help, the operation prefix, and for each operation a callback, a summary, a
// verb and a response, described, and with fields only if its status is 200. A path has an
// existence check if and only if it has a create operation. Each field is described, also the
// leases', and those in secrets and no others are marked as sensitive. It returns the operations
// in order, as "config read" or "roles/NAME list".
func CheckPaths(tb testing.TB, b *framework.Backend, prefix string, secrets ...string) (operations []string) {
	tb.Helper()
	fields := func(where string, fields map[string]*framework.FieldSchema) {
		for name, field := range fields {
			marked := field.DisplayAttrs != nil && field.DisplayAttrs.Sensitive
			if field.Description == "" || marked != slices.Contains(secrets, name) {
				tb.Errorf("%s, field %s: described as %q, marked as a secret: %v",
					where, name, field.Description, marked)
			}
		}
	}
	for _, path := range b.Paths {
		if path.HelpSynopsis == "" || path.HelpDescription == "" || path.DisplayAttrs.OperationPrefix != prefix {
			tb.Errorf("%s: lacks a help or an operation prefix", path.Pattern)
		}
		_, creates := path.Operations[logical.CreateOperation]
		Same(tb, path.Pattern+": existence check", path.ExistenceCheck != nil, creates)
		fields(path.Pattern, path.Fields)
		for op, handler := range path.Operations {
			where, p := path.Pattern+" "+string(op), handler.Properties()
			operations = append(operations, strings.Replace(where, framework.GenericNameRegex("name"), "NAME", 1))
			if handler.Handler() == nil || p.Summary == "" || p.DisplayAttrs.OperationVerb == "" ||
				len(p.Responses) != 1 {
				tb.Errorf("%s: lacks a callback, a summary, a verb or a response", where)
			}
			for status, responses := range p.Responses {
				fields(where, responses[0].Fields)
				if responses[0].Description == "" || (status == http.StatusOK) != (len(responses[0].Fields) > 0) {
					tb.Errorf("%s: response %d is %+v", where, status, responses[0])
				}
			}
		}
	}
	for _, secret := range b.Secrets {
		fields(secret.Type, secret.Fields)
	}
	slices.Sort(operations)
	return operations
}

// MustIssue reads a credential, which must succeed.
func (v *Vault) MustIssue(path string) *Lease {
	v.tb.Helper()
	lease, err := v.Issue(path, nil)
	if err != nil {
		v.tb.Fatalf("%s: %v", path, err)
	}
	return lease
}

// MustRevoke revokes a lease, which must succeed.
func (v *Vault) MustRevoke(lease *Lease) {
	v.tb.Helper()
	if err := v.Revoke(lease); err != nil {
		v.tb.Fatalf("revoke: %v", err)
	}
}

// IssueTogether reads n credentials, which are asked for 1 ms apart. It returns the leases in the
// order in which they were served, the numbers of their reads, from 0, in that order, and the
// errors of the others.
func (v *Vault) IssueTogether(n int, path string) (leases []*Lease, order []int, errs []error) {
	var work sync.WaitGroup
	var mu sync.Mutex
	for i := range n {
		work.Go(func() {
			time.Sleep(time.Duration(i) * time.Millisecond)
			lease, err := v.Issue(path, nil)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
			} else {
				leases, order = append(leases, lease), append(order, i)
			}
		})
	}
	work.Wait()
	return leases, order, errs
}

// RevokeTogether revokes all leases at once, as when they end together. Those that fail stay.
func (v *Vault) RevokeTogether() {
	var work sync.WaitGroup
	for _, lease := range v.Leases() {
		work.Go(func() { _ = v.Revoke(lease) })
	}
	work.Wait()
}

// AtOnce calls do so many times, one after the other, in each of so many goroutines, and waits
// for all.
func AtOnce(goroutines, times int, do func()) {
	var work sync.WaitGroup
	for range goroutines {
		work.Go(func() {
			for range times {
				do()
			}
		})
	}
	work.Wait()
}

// metricLine is a line of Prometheus' text format: HELP or TYPE with name and text, or a
// series' name, labels and value.
var metricLine = regexp.MustCompile(`^(?:# (HELP|TYPE) ([a-z_]+) (.+)|` +
	`([a-z_]+)((?:\{(?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)+\})?) ([0-9.]+))\n$`)

// Scrape reads a path as Prometheus does and returns the values of its series by name and
// labels, like `requests_total{status="200"}`. It fails the test unless the answer is in the
// text format 0.0.4: names begin with prefix, each family has HELP and then TYPE before its
// series, counters and nothing else end in _total, no series comes twice, and a histogram's
// buckets rise.
func (v *Vault) Scrape(path, prefix string) map[string]float64 {
	v.tb.Helper()
	answer := v.Must("read "+path, map[string]any{"format": "prometheus"}).Data
	Same(v.tb, "content type", answer[logical.HTTPContentType], "text/plain; version=0.0.4; charset=utf-8")
	all, family, kind, bound, count := map[string]float64{}, "", "", 0.0, 0.0
	text, _ := answer[logical.HTTPRawBody].([]byte)
	for line := range strings.Lines(string(text)) {
		m := metricLine.FindStringSubmatch(line)
		switch {
		case m == nil || m[1] == "HELP" && m[2] == family || m[1] == "TYPE" && m[2] != family:
			v.tb.Fatalf("line %q of family %s", line, family)
		case m[1] == "HELP":
			family = m[2]
			continue
		case m[1] == "TYPE":
			kind = m[3]
			Same(v.tb, family+" is a counter", kind == "counter", strings.HasSuffix(family, "_total"))
			continue
		}
		suffix, mine := strings.CutPrefix(m[4], family)
		if _, twice := all[m[4]+m[5]]; twice || !mine || (suffix != "") != (kind == "histogram") {
			v.tb.Errorf("%q: twice, or among %s", line, family)
		}
		if !strings.HasPrefix(m[4], prefix) {
			v.tb.Errorf("%q does not begin with %s", line, prefix)
		}
		value, _ := strconv.ParseFloat(m[6], 64)
		all[m[4]+m[5]] = value
		if _, le, ok := strings.Cut(m[5], `,le="`); ok { // buckets rise to all that there is
			limit, _ := strconv.ParseFloat(strings.TrimSuffix(le, `"}`), 64)
			if limit <= bound || value < count {
				v.tb.Errorf("%q comes after %v with %v", line, bound, count)
			}
			if bound, count = limit, value; math.IsInf(limit, 1) {
				bound, count = 0, 0
			}
		}
	}
	return all
}
