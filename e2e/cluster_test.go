// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

const (
	failovers = 10
	roleTTL   = 2 * time.Minute
	patience  = 45 * time.Second // of a client that repeats what a failover cut off
)

// killed are the failovers in which the leader is killed; in the others it steps down.
var killed = []int{1, 4, 7, 9}

// rotationSteps are calls of a rotation that some failovers fall into. Vault lets it end
// before it steps down, so that more of them would only take time.
var rotationSteps = map[int]struct{ method, path string }{
	1: {http.MethodPost, "/admin_api_keys"},
	3: {http.MethodPost, "/admin_api_keys"},
	4: {http.MethodGet, "/admin_api_keys/"},
	7: {http.MethodDelete, "/admin_api_keys/"},
}

// load is a cluster under load from clients that repeat their requests.
type load struct {
	e     *engine
	nodes []*harness.Server

	mu       sync.Mutex
	down     map[*harness.Server]bool // killed and not yet started again
	issued   int
	revoked  int
	repeated map[string]int // failed attempts by what they were answered
	problems []string       // what a client should never see
}

func (l *load) problem(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problems = append(l.problems, harness.Mask(fmt.Sprintf(format, args...)))
}

// request repeats a request, at one node after the other, until it succeeds. What OpenAI
// refused is no matter of a failover.
func (l *load) request(ctx context.Context, worker int, method, path string, in any) map[string]any {
	var last string
	for start, n := time.Now(), worker; time.Since(start) < patience; n++ {
		node := l.nodes[n%len(l.nodes)]
		l.mu.Lock()
		down := l.down[node]
		l.mu.Unlock()
		if down {
			continue
		}
		status, answer, err := node.API(ctx, method, path, in)
		if err == nil && status < 300 {
			return answer
		}
		last = fmt.Sprintf("%d %v (%v)", status, answer["errors"], err)
		if strings.Contains(last, "OpenAI answered") {
			l.problem("%s %s: %s", method, path, last)
		}
		l.mu.Lock()
		l.repeated[reason(status, last)]++
		l.mu.Unlock()
		time.Sleep(50 * time.Millisecond)
	}
	l.problem("%s %s: given up after %s: %s", method, path, patience, last)
	return nil
}

// reason shortens a failure for the count.
func reason(status int, text string) string {
	for _, known := range []string{"active cluster node not found", "node not active", "sealed", "connection refused",
		"connection reset", "EOF", "context canceled", "internal error", "mount"} {
		if strings.Contains(text, known) {
			return known
		}
	}
	return fmt.Sprintf("%d %.200s", status, harness.Mask(text))
}

// work issues keys and revokes each some requests later, so that most of them live through
// a change of the active node.
func (l *load) work(ctx, until context.Context, worker int) {
	var held []creds
	for until.Err() == nil {
		answer := l.request(ctx, worker, "GET", l.e.mount+"/creds/app", nil)
		lease, _ := answer["lease_id"].(string)
		key, _ := dig(answer, "data", "api_key").(string)
		if !l.e.sim.Use(key) {
			l.problem("OpenAI does not accept the key of lease %s", lease)
		}
		held = append(held, creds{key: key, lease: lease})
		l.mu.Lock()
		l.issued++
		l.mu.Unlock()
		if len(held) < 20 {
			continue
		}
		l.request(ctx, worker, "PUT", "sys/leases/revoke", map[string]any{"lease_id": held[0].lease, "sync": true})
		if l.e.sim.Use(held[0].key) {
			l.problem("OpenAI accepts the key of the revoked lease %s", held[0].lease)
		}
		held = held[1:]
		l.mu.Lock()
		l.revoked++
		l.mu.Unlock()
		time.Sleep(20 * time.Millisecond)
	}
}

// active waits for the active node.
func (l *load) active() *harness.Server {
	var found *harness.Server
	l.e.until(time.Minute, func() error {
		for _, node := range l.nodes {
			if node.Active(l.e.t.Context()) {
				found = node
				return nil
			}
		}
		return errors.New("no node has taken over")
	})
	return found
}

// Leaders step down and are killed under load and while the admin key is rotated: no
// client sees more of it than a request to repeat, and nothing is lost.
func TestClusterUnderLoad(t *testing.T) {
	opts := options(harness.Versions[0])
	opts.LogLevel = "info"
	nodes, err := harness.StartCluster(t.Context(), opts, 3)
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range nodes {
		t.Cleanup(node.Close)
	}
	first := newVault(t, nodes[0])
	register(t, first)
	e := engineAt(first, "openai")
	e.cli("write", e.mount+"/roles/app", "ttl="+roleTTL.String(), "max_ttl="+roleTTL.String())
	e.sim.SetLatency(20 * time.Millisecond)
	l := &load{e: e, nodes: nodes, down: map[*harness.Server]bool{}, repeated: map[string]int{}}

	until, stop := context.WithCancel(t.Context())
	defer stop()
	var clients sync.WaitGroup
	defer clients.Wait()
	defer stop()
	for worker := range 8 {
		clients.Go(func() { l.work(t.Context(), until, worker) })
	}
	rotations := 0
	clients.Go(func() {
		for until.Err() == nil {
			l.request(t.Context(), rotations, "PUT", e.mount+"/config/rotate", nil)
			rotations++
			select {
			case <-until.Done():
			case <-time.After(2 * time.Second):
			}
		}
	})

	for n := range failovers {
		time.Sleep(3 * time.Second)
		leader := l.active()
		if step, ok := rotationSteps[n]; ok {
			e.sim.ResetCalls()
			e.sim.Inject(openaisim.Fault{Method: step.method, Path: step.path, Kind: "hang", Process: true})
			e.called(1, step.method, step.path)
		}
		start, how := time.Now(), "stepped down"
		if slices.Contains(killed, n) {
			how = "killed"
			l.mu.Lock()
			l.down[leader] = true
			l.mu.Unlock()
			leader.Kill()
		} else if status, answer, err := leader.API(t.Context(), "PUT", "sys/step-down", nil); err != nil || status != http.StatusNoContent {
			t.Errorf("stepping down: %d %v (%v)", status, answer["errors"], err)
		}
		e.sim.ClearFaults()
		// Vault lets requests that are under way end before it gives up the lead.
		e.until(time.Minute, func() error {
			if leader.Active(t.Context()) {
				return errors.New("the leader is still active")
			}
			return nil
		})
		e.Server = l.active()
		t.Logf("failover %d: leader %s, active again after %s", n+1, how, time.Since(start).Round(10*time.Millisecond))
		if how == "killed" {
			if err := errors.Join(leader.Run(t.Context()), leader.Unseal(t.Context())); err != nil {
				t.Fatal(err)
			}
			l.mu.Lock()
			delete(l.down, leader)
			l.mu.Unlock()
		}
	}
	time.Sleep(3 * time.Second)
	stop()
	clients.Wait()
	t.Logf("%d keys issued, %d revoked, %d rotations, attempts repeated: %v", l.issued, l.revoked, rotations, l.repeated)
	for _, problem := range l.problems[:min(len(l.problems), 20)] {
		t.Error(problem)
	}

	// A request that a failover cut off may have got its lease; nobody knows of it but Vault.
	// What it left without a lease goes after the end in its name.
	ended := time.Now()
	e.Server = l.active()
	e.cli("lease", "revoke", "-prefix", e.mount+"/creds/app")
	t.Parallel() // from here on this test, too, only waits
	e.until(roleTTL+5*tick, func() error {
		m, err := e.leases()
		if err != nil {
			e.Server = l.active() // it may change by itself on a busy machine
			return err
		}
		if m > 0 {
			return fmt.Errorf("%d leases are left", m)
		}
		return e.onlyAdminKey()
	})
	t.Logf("all leases and old admin keys gone at the latest %s after the last request", time.Since(ended).Round(time.Second))
	left := e.accounts()
	t.Logf("%d accounts without a lease wait for their end", len(left))
	e.awaitDue(e.lastEnd(left))
	e.Server = l.active()
	answer := e.tidy()
	if got := len(e.accounts()); got > 0 || answer["failed"] != 0.0 {
		t.Errorf("%d accounts are left; tidy answered %v", got, answer)
	}
	if got := e.irrevocable(); got != 0.0 {
		t.Errorf("irrevocable leases: got %v, want 0", got)
	}
}
