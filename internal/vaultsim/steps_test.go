// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
)

// newStepper returns a mount whose path "go" makes three steps: a put, a request over the wire
// and a put, of which each is made whatever befell the former. It tells the answers to all.
func newStepper(t *testing.T, answered *string) *Vault {
	return New(t, func(ctx context.Context, config *logical.BackendConfig) (logical.Backend, error) {
		network := Network(config)
		run := func(ctx context.Context, req *logical.Request, _ *framework.FieldData) (*logical.Response, error) {
			put := func(key string) string {
				return fmt.Sprint(req.Storage.Put(ctx, &logical.StorageEntry{Key: key}))
			}
			first := put("first")
			exchange, err := http.NewRequestWithContext(ctx, "POST", "https://api.openai.com/v1/x", nil)
			if err != nil {
				return nil, err
			}
			resp, err := network.RoundTrip(exchange)
			second := fmt.Sprint(err)
			if err == nil {
				second = fmt.Sprint(resp.StatusCode)
			}
			*answered = first + "|" + second + "|" + put("third")
			return nil, nil
		}
		b := &framework.Backend{Paths: []*framework.Path{{
			Pattern: "go", Callbacks: map[logical.Operation]framework.OperationFunc{"update": run},
		}}}
		return b, b.Setup(ctx, config)
	})
}

// TestAtStep: what each fault does to the request at its steps, and what effect each step has.
func TestAtStep(t *testing.T) {
	const injected, canceled, ok = "injected failure", "context canceled", "<nil>"
	for _, tt := range []struct {
		name string
		at   int
		want string // answers to the steps
		done string // steps with an effect
	}{
		{"failure", 1, injected + "|204|<nil>", "x third"},
		{"failure", 2, ok + "|read tcp: connection reset by peer|<nil>", "first third"},
		{"failure", 4, ok + "|204|<nil>", "first x third"},
		{"refused", 2, ok + "|dial tcp: connection refused|<nil>", "first third"},
		{"answer lost", 3, ok + "|204|" + injected, "first x third"},
		{"answer lost", 2, ok + "|read tcp: connection reset by peer|<nil>", "first x third"},
		{"429", 2, ok + "|429|<nil>", "first third"},
		{"500 after processing", 2, ok + "|500|<nil>", "first x third"},
		{"outage before", 2, ok + "|read tcp: connection reset by peer|" + injected, "first"},
		{"outage after", 1, injected + "|read tcp: connection reset by peer|" + injected, "first"},
		{"cancelled before", 2, ok + "|" + canceled + "|" + canceled, "first"},
		{"cancelled after", 2, ok + "|" + canceled + "|" + canceled, "first x"},
		{"cancelled with the answer", 2, ok + "|204|" + canceled, "first x"},
		{"crash after", 3, ok + "|204|" + injected, "first x third"},
	} {
		t.Run(fmt.Sprint(tt.name, " ", tt.at), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				answered, sent, each := "", "", 0
				v := newStepper(t, &answered)
				v.Wire.Connect(roundTrip(func(req *http.Request) (*http.Response, error) {
					sent = "x"
					return answers(204).RoundTrip(req)
				}))
				before := v.Backend()
				for _, fault := range StepFaults() {
					if fault.Name != tt.name {
						continue
					}
					reached := v.AtStep(fault, tt.at, func() { each++ }, func(ctx context.Context) {
						_, err := v.DoContext(ctx, logical.UpdateOperation, "go", nil)
						check(t, "the client has gone", err != nil, fault.Cancel)
					})
					check(t, "answers", answered, tt.want)
					check(t, "reached", reached, tt.at <= 3)
					check(t, "another process", v.Backend() != before, fault.Crash)
				}
				done := strings.Fields(strings.Join([]string{has(v, "first"), sent, has(v, "third")}, " "))
				check(t, "effects", strings.Join(done, " "), tt.done)
				check(t, "calls before a step", each > 0 && each <= 3, true)
				v.OK("go", nil)
				check(t, "answers without a fault", answered, "<nil>|204|<nil>")
			})
		})
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// has returns key if it is in storage.
func has(v *Vault, key string) string {
	if _, ok := v.Storage.All()[key]; !ok {
		return ""
	}
	return key
}

// TestEveryStep: each fault is tried at each step until one is not reached.
func TestEveryStep(t *testing.T) {
	got := map[string]int{}
	EveryStep(t, 2, func(_ *testing.T, fault StepFault, at int) bool {
		got[fault.Name] += at
		return at <= 2
	})
	for _, fault := range StepFaults() {
		check(t, fault.Name, got[fault.Name], 1+2+3)
	}
	check(t, "faults", len(got), len(StepFaults()))
}
