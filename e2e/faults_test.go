// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

const accountsPath = "/service_accounts"

// accounts are the ids of the service accounts that OpenAI has.
func (e *engine) accounts() map[string]bool {
	ids := map[string]bool{}
	for _, a := range e.sim.ServiceAccounts(project) {
		ids[a.ID] = true
	}
	return ids
}

// leases counts the live leases of the role app.
func (e *engine) leases() (int, error) {
	status, answer, err := e.API(e.t.Context(), "LIST", "sys/leases/lookup/"+e.mount+"/creds/app", nil)
	if err != nil || status != http.StatusOK && status != http.StatusNotFound {
		return 0, fmt.Errorf("listing leases: %d %v", status, err)
	}
	keys, _ := dig(answer, "data", "keys").([]any)
	return len(keys), nil
}

// stored lists what the mount has in storage. The server must have raw_storage_endpoint.
func (e *engine) stored() (entries []string) {
	e.t.Helper()
	uuid := dig(e.api("GET", "sys/mounts/"+e.mount, nil, http.StatusOK), "data", "uuid")
	var list func(folder string)
	list = func(folder string) {
		_, answer, err := e.API(e.t.Context(), "LIST", fmt.Sprintf("sys/raw/logical/%s/%s", uuid, folder), nil)
		if err != nil {
			e.t.Fatal(err)
		}
		keys, _ := dig(answer, "data", "keys").([]any)
		for _, key := range keys {
			entry := folder + key.(string)
			if strings.HasSuffix(entry, "/") {
				list(entry)
			} else {
				entries = append(entries, entry)
			}
		}
	}
	list("")
	return entries
}

// insist revokes a lease by hand whose account OpenAI does not delete. The plugin takes
// that over at the fifth failure, and answers that it is done.
func (e *engine) insist(lease string) {
	e.t.Helper()
	const most = 5
	for n := 1; n <= most; n++ {
		result := e.CLI(e.t.Context(), "lease", "revoke", "-sync", lease)
		if got, want := result.Code == 0, n == most; got != want {
			e.t.Fatalf("failing revocation %d: answered as done: got %v, want %v: %s", n, got, want, harness.Mask(result.Stderr))
		}
	}
}

// handedOver is the metric of revocations that the plugin has taken over.
func (e *engine) handedOver() float64 {
	e.t.Helper()
	n, _ := dig(e.api("GET", e.mount+"/metrics", nil, http.StatusOK), "data", "vault_openai_revocations_handed_over_total").(float64)
	return n
}

// irrevocable counts the server's irrevocable leases.
func (v vault) irrevocable() any {
	v.t.Helper()
	return dig(v.api("GET", "sys/leases/count?type=irrevocable", nil, http.StatusOK), "data", "lease_count")
}

// impatientServer has a second address, where Vault gives a request two seconds, and lets
// its storage be looked at.
func impatientServer(t *testing.T) (v vault, impatient harness.Server) {
	t.Helper()
	v = ownServer(t, harness.Versions[0])
	v.Stop()
	for attempt := range 5 { // ports may be taken
		impatient.Addr = fmt.Sprintf("http://127.0.0.1:%d", 15000+(os.Getpid()*7+attempt*13)%5000)
		file := filepath.Join(v.Dir, "config.hcl")
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		before, _, _ := strings.Cut(string(text), "# impatient")
		err = os.WriteFile(file, fmt.Appendf([]byte(before), `# impatient
raw_storage_endpoint = true
listener "tcp" {
  address              = %q
  tls_disable          = true
  max_request_duration = "2s"
}
`, strings.TrimPrefix(impatient.Addr, "http://")), 0o600)
		if err == nil {
			err = v.Run(t.Context())
		}
		if err == nil {
			break
		}
		if attempt == 4 {
			t.Fatal(err)
		}
	}
	if err := v.Unseal(t.Context()); err != nil {
		t.Fatal(err)
	}
	impatient.Token = v.Token
	return v, impatient
}

// Whatever cuts a request or a revocation off, in the end each account is under a lease
// and each lease has its account, with no operator. What the plugin knows to be lost is
// gone within four ticks; what a killed process or server has forgotten, when the end in
// its name is past and tidy runs.
func TestFaults(t *testing.T) {
	t.Parallel()
	v, impatient := impatientServer(t)
	e := engineAt(v, "openai")
	// What is cut off is of a role of its own, so that its end comes soon.
	e.cli("write", e.mount+"/roles/brief", "project_id="+project, "ttl=30s", "max_ttl=30s")
	var live []creds
	read := func() { // the next call works at once
		t.Helper()
		c := e.creds()
		e.mustWork(c, true)
		live = append(live, c)
	}
	fetch := func(ctx context.Context, server *harness.Server) (int, error) {
		status, _, err := server.API(ctx, "GET", e.mount+"/creds/brief", nil)
		return status, err
	}
	hang := func(process bool) {
		e.sim.ResetCalls()
		e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Path: accountsPath, Kind: "hang", Process: process})
	}
	read()

	// The plugin is killed: Vault starts it again and may make the request once more. Then
	// Vault is killed.
	for _, process := range []bool{true, false} {
		hang(process)
		answered := make(chan struct{})
		go func() {
			fetch(context.Background(), e.Server)
			close(answered)
		}()
		e.called(1, http.MethodPost, accountsPath)
		e.killPlugin()
		<-answered
		e.sim.ClearFaults()
		read()
	}
	hang(true)
	go fetch(context.Background(), e.Server)
	e.called(1, http.MethodPost, accountsPath)
	v.Kill()
	e.sim.ClearFaults()
	v.restart()
	read()
	forgotten := e.accounts()
	for _, c := range live {
		delete(forgotten, c.accountID)
	}
	if len(forgotten) < 2 {
		t.Errorf("the killed processes left %d accounts, want 2 at least: they did not do what they should", len(forgotten))
	}
	end := e.lastEnd(forgotten)

	// The process lives on.
	refused := func(what string, status int, err error) {
		t.Helper()
		if err == nil && status < 400 {
			t.Errorf("%s: the request was answered %d", what, status)
		}
		read()
	}
	before := len(e.accounts())
	for _, process := range []bool{true, false} {
		e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Path: accountsPath, Kind: "close", Process: process})
		status, err := fetch(t.Context(), e.Server)
		refused("answer lost", status, err)

		hang(process)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		status, err = fetch(ctx, e.Server)
		cancel()
		refused("client gone", status, err)

		hang(process)
		start := time.Now()
		status, err = fetch(t.Context(), &impatient)
		if d := time.Since(start); d > 10*time.Second {
			t.Errorf("Vault's time-out of 2 s: the answer came after %s", d)
		}
		refused("Vault's time-out", status, err)
	}
	if lost := len(e.accounts()) - before - 6; lost < 3 { // each is followed by a read
		t.Errorf("the faults left %d accounts, want 3: they did not do what they should", lost)
	}
	const late = 20 * time.Second
	e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Path: accountsPath, Kind: "close", Late: late})
	status, err := fetch(t.Context(), e.Server)
	refused("request carried out late", status, err)
	injected := time.Now()

	vaults, own := e.failRevocations()
	time.Sleep(time.Until(injected.Add(late + time.Second)))
	e.until(4*tick, func() error {
		want := map[string]bool{vaults.accountID: true, own.accountID: true}
		for _, c := range live {
			want[c.accountID] = true
		}
		got := e.accounts()
		maps.DeleteFunc(got, func(id string, _ bool) bool { return forgotten[id] })
		if !maps.Equal(got, want) {
			return fmt.Errorf("OpenAI has %d accounts, want %d that are under leases", len(got), len(want))
		}
		return nil
	})
	t.Logf("accounts of lost creates were gone %s after the last fault", time.Since(injected).Round(time.Second))

	e.sim.ClearFaults()
	recovered := time.Now()
	for _, c := range live {
		e.cli("lease", "renew", c.lease)
	}
	e.until(3*tick, func() error {
		left, accounts := e.stored(), e.accounts()
		if !slices.Equal(left, []string{"config", "roles/app", "roles/brief"}) || accounts[vaults.accountID] || accounts[own.accountID] {
			return fmt.Errorf("%d accounts; entries %v", len(accounts), left)
		}
		return nil
	})
	t.Logf("failed revocations were made good %s after OpenAI's recovery", time.Since(recovered).Round(time.Second))
	e.until(3*tick, func() error { // a retry of Vault's finds the account gone
		got, err := e.leases()
		if err == nil && got != len(live) {
			err = fmt.Errorf("got %d leases, want %d", got, len(live))
		}
		return err
	})
	if got := v.irrevocable(); got != 0.0 {
		t.Errorf("irrevocable leases: got %v, want 0", got)
	}

	// The plugin would look by itself within an hour and five minutes.
	e.awaitDue(end)
	answer := e.tidy()
	t.Logf("tidy %s after the last end in a name: %v", time.Since(end).Round(time.Second), answer)
	if got := slices.Sorted(maps.Keys(e.accounts())); len(got) != len(live) || answer["failed"] != 0.0 || len(answer["leftover"].([]any)) > 0 {
		t.Errorf("accounts after tidy: got %v, want %d; tidy answered %v", got, len(live), answer)
	}
	for _, c := range live {
		e.mustWork(c, true)
		e.cli("lease", "revoke", "-sync", c.lease)
	}
	if got := slices.Collect(maps.Keys(e.accounts())); len(got) > 0 {
		t.Errorf("accounts after all leases are revoked: got %v, want none", got)
	}
	if got, want := e.stored(), []string{"config", "roles/app", "roles/brief"}; !slices.Equal(got, want) {
		t.Errorf("stored at the end: got %v, want %v", got, want)
	}
}

// killPlugin kills the plugin's process.
func (e *engine) killPlugin() {
	e.t.Helper()
	pids, err := e.PluginPids()
	if err != nil || len(pids) == 0 {
		e.t.Fatalf("plugin processes: got %v (%v), want some", pids, err)
	}
	for _, pid := range pids {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

// failRevocations makes revocations fail: one three times, and two for ever, as it seems.
// Of these, Vault goes on with one; the other one an operator insists on, and the plugin
// takes it over.
func (e *engine) failRevocations() (vaults, own creds) {
	t := e.t
	t.Helper()
	failDeletes := func(c creds, times int) {
		e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Path: c.accountID, Times: times})
	}
	thrice := e.creds()
	failDeletes(thrice, 3)
	e.cli("lease", "revoke", thrice.lease)
	start := time.Now()
	e.until(tick, func() error {
		if e.accounts()[thrice.accountID] {
			return errors.New("OpenAI still has the account")
		}
		return nil
	})
	t.Logf("account gone after %s", time.Since(start).Round(10*time.Millisecond))

	vaults, own = e.creds(), e.creds()
	failDeletes(vaults, -1)
	failDeletes(own, -1)
	e.cli("lease", "revoke", vaults.lease)
	if got := e.handedOver(); got != 0 {
		t.Errorf("revocations handed over before that: got %v, want 0", got)
	}
	e.insist(own.lease)
	if got := e.handedOver(); got != 1 {
		t.Errorf("revocations handed over: got %v, want 1", got)
	}
	if result := e.CLI(t.Context(), "lease", "lookup", own.lease); result.Code == 0 {
		t.Error("Vault still has the lease that the plugin has taken over")
	}
	if !e.accounts()[own.accountID] || !e.accounts()[vaults.accountID] {
		t.Error("accounts are gone that could not be deleted")
	}
	return vaults, own
}

// All leases end at once where OpenAI takes 20 requests a second.
func TestRevocationAtOpenAIsPace(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		const n, rate = 200, 20
		e := newEngine(v)
		for range n {
			e.api("GET", e.mount+"/creds/app", nil, http.StatusOK)
		}
		e.sim.SetRateLimit(rate, rate)
		e.sim.ResetCalls()
		start := time.Now()
		e.cli("lease", "revoke", "-prefix", e.mount+"/creds/app")
		e.awaitAccounts(0, tick)
		took, refused := time.Since(start), 0
		calls := e.sim.Calls()
		for _, c := range calls {
			if c.Status == http.StatusTooManyRequests {
				refused++
			}
		}
		share := float64(refused) / float64(len(calls))
		t.Logf("%d leases at %d requests/s: %.1f s (ideal %d s), %d of %d calls refused (%.0f %%)",
			n, rate, took.Seconds(), n/rate, refused, len(calls), 100*share)
		if took > n/rate*time.Second*3/2 || share > 0.1 {
			t.Error("want at most 1.5 times the ideal time and 10 % refused")
		}
	})
}
