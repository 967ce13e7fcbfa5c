// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

// tick is how often Vault calls a mount's periodic work; nothing sets it.
const tick = time.Minute

// engineAt is a further mount of a server that ends with the test, with an OpenAI of its own.
func engineAt(v vault, mount string) *engine {
	v.t.Helper()
	sim := openaisim.New()
	server := httptest.NewServer(sim)
	v.t.Cleanup(server.Close)
	return (&engine{v, "", sim, server.URL}).another(mount)
}

// another is a further mount with the same OpenAI.
func (e *engine) another(mount string) *engine {
	e.t.Helper()
	other := &engine{e.vault, mount, e.sim, e.url}
	key, _ := e.sim.AdminKey()
	e.cli("secrets", "enable", "-path="+mount, harness.PluginName)
	e.cli("write", mount+"/config", "admin_api_key="+key, "organization_id="+organization, "api_endpoint="+e.url+"/v1")
	e.cli("write", mount+"/roles/app", "project_id="+project)
	return other
}

// config is what reading it shows.
func (e *engine) config() map[string]any {
	e.t.Helper()
	return e.api("GET", e.mount+"/config", nil, http.StatusOK)["data"].(map[string]any)
}

// onlyAdminKey is nil when OpenAI has one admin key, and config names it.
func (e *engine) onlyAdminKey() error {
	_, config, err := e.API(e.t.Context(), "GET", e.mount+"/config", nil)
	if err != nil {
		return err
	}
	keys, id := e.sim.AdminKeys(), dig(config, "data", "admin_api_key_id")
	if len(keys) != 1 || keys[0].ID != id {
		return fmt.Errorf("%s: OpenAI has %d admin keys, want one, config's %v", e.mount, len(keys), id)
	}
	return nil
}

// called waits until n such calls have reached OpenAI.
func (e *engine) called(n int, method, path string) {
	e.t.Helper()
	e.until(20*time.Second, func() error {
		got := 0
		for _, c := range e.sim.Calls() {
			if c.Method == method && strings.Contains(c.Path, path) {
				got++
			}
		}
		if got < n {
			return fmt.Errorf("%s: %d calls %s %s, want %d", e.mount, got, method, path, n)
		}
		return nil
	})
}

// restart starts a killed server again.
func (v vault) restart() {
	v.t.Helper()
	if err := errors.Join(v.Run(v.t.Context()), v.Unseal(v.t.Context())); err != nil {
		v.t.Fatal(err)
	}
}

// On a Vault without rotation manager the plugin rotates within two ticks of the time
// that is due, and stops when it is told to.
func TestScheduledRotation(t *testing.T) {
	t.Parallel()
	for _, version := range harness.Versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			v := ownServer(t, version)
			engines := map[string]*engine{
				"rotation_period=20s":          engineAt(v, "period"),
				"rotation_schedule=* * * * *":  engineAt(v, "schedule"),
				"rotation_period=876000h":      engineAt(v, "later"),
				"rotation_schedule=0 0 29 2 *": engineAt(v, "leapday"),
			}
			for setting, e := range engines {
				e.cli("write", e.mount+"/config", setting)
				config := e.config()
				next, err := time.Parse(time.RFC3339, config["next_rotation"].(string))
				if err != nil || config["rotation_manager"] != "plugin" {
					t.Fatalf("%s: got manager %v, next rotation %v, want plugin and a time", setting, config["rotation_manager"], config["next_rotation"])
				}
				soon := e.mount == "period" || e.mount == "schedule"
				if got := time.Until(next) < tick+time.Second; got != soon {
					t.Errorf("%s: next rotation is %s", setting, next)
				}
			}
			for setting, e := range engines {
				_, first := e.sim.AdminKey()
				if e.mount != "period" && e.mount != "schedule" {
					continue
				}
				e.until(2*tick+10*time.Second, func() error {
					if config := e.config(); config["admin_api_key_id"] == first {
						return fmt.Errorf("%s: not rotated", setting)
					}
					return e.onlyAdminKey()
				})
				e.cli("write", e.mount+"/config", "disable_automated_rotation=true")
				if got := e.config(); got["next_rotation"] != "" || got["rotation_manager"] != "none" {
					t.Errorf("%s, disabled: got manager %v, next rotation %v", setting, got["rotation_manager"], got["next_rotation"])
				}
				e.mustWork(e.creds(), true)
				e.sim.ResetCalls()
			}
			time.Sleep(tick + 5*time.Second)
			for setting, e := range engines {
				for _, c := range e.sim.Calls() {
					if c.Method == http.MethodPost && strings.HasSuffix(c.Path, "/admin_api_keys") {
						t.Errorf("%s: rotated when it was not due or disabled", setting)
					}
				}
			}
		})
	}
}

// Vault is killed while a rotation waits for OpenAI, at each call of it. After the restart
// config holds a key that works, and soon there is no other.
func TestKilledWhileRotating(t *testing.T) {
	t.Parallel()
	v := ownServer(t, harness.Versions[0])
	var engines []*engine
	for _, step := range []struct {
		name, method, path string
		process            bool
		skip               int
	}{
		{"created", http.MethodPost, "/admin_api_keys", true, 0},
		{"uncreated", http.MethodPost, "/admin_api_keys", false, 0},
		{"proof", http.MethodGet, "/admin_api_keys/", true, 1},
		{"deleted", http.MethodDelete, "/admin_api_keys/", true, 0},
		{"undeleted", http.MethodDelete, "/admin_api_keys/", false, 0},
	} {
		e := engineAt(v, step.name)
		e.sim.ResetCalls()
		e.sim.Inject(openaisim.Fault{Method: step.method, Path: step.path, Kind: "hang", Process: step.process, Skip: step.skip})
		go e.API(context.Background(), "PUT", e.mount+"/config/rotate", nil)
		e.called(step.skip+1, step.method, step.path)
		engines = append(engines, e)
	}
	v.Kill()
	start := time.Now()
	v.restart()
	creating := func(e *engine) error { // OpenAI may yet carry out what was not created
		if got := e.config()["creating"].([]any); len(got) > 0 != (e.mount == "uncreated") {
			return fmt.Errorf("%s: config shows the keys being made %v", e.mount, got)
		}
		return nil
	}
	for _, e := range engines {
		c := e.creds()
		e.mustWork(c, true)
		e.cli("lease", "revoke", "-sync", c.lease)
		if got := len(e.config()["creating"].([]any)); got == 1 != (e.mount == "created" || e.mount == "uncreated" || e.mount == "proof") {
			t.Errorf("%s: config shows %d keys being made", e.mount, got)
		}
	}
	for _, e := range engines {
		e.until(5*tick, func() error { return errors.Join(e.onlyAdminKey(), creating(e)) })
		t.Logf("%s: one admin key %s after the restart", e.mount, time.Since(start).Round(time.Second))
		e.cli("write", "-force", e.mount+"/config/rotate")
		if err := e.onlyAdminKey(); err != nil {
			t.Error(err)
		}
	}
}

// Nobody notices a rotation.
func TestRotationUnderLoad(t *testing.T) {
	e := newEngine(ownServer(t, harness.Versions[0]))
	e.sim.SetLatency(20 * time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var done, failed atomic.Int64
	var workers sync.WaitGroup
	for range 16 {
		workers.Go(func() {
			for ctx.Err() == nil {
				// Not ctx: the last request must not be cut off.
				status, answer, err := e.API(t.Context(), "GET", e.mount+"/creds/app", nil)
				if err == nil && status == http.StatusOK {
					status, answer, err = e.API(t.Context(), "PUT", "sys/leases/revoke", map[string]any{"lease_id": answer["lease_id"], "sync": true})
				}
				if err != nil || status >= 300 {
					failed.Add(1)
					t.Errorf("got %d %v (%v)", status, answer["errors"], err)
				}
				done.Add(1)
			}
		})
	}
	rotations := 0
	for ctx.Err() == nil {
		e.cli("write", "-force", e.mount+"/config/rotate")
		rotations++
		if err := e.onlyAdminKey(); err != nil {
			t.Error(err)
		}
		select {
		case <-time.After(5 * time.Second):
		case <-ctx.Done():
		}
	}
	workers.Wait()
	t.Logf("%d keys issued and revoked, %d failures, %d rotations", done.Load(), failed.Load(), rotations)
	e.awaitAccounts(0, 10*time.Second)
}
