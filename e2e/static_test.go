// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
)

// A static role's key is rotated on a period and on a cron schedule. Of a reader each 100
// ms over three rotations, nobody gets a key that does not work, and each key works until
// overlap has passed since the rotation after its reading.
func TestStaticRotation(t *testing.T) {
	t.Parallel()
	const overlap = 20 * time.Second
	for _, version := range harness.Versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			v := ownServer(t, version)
			for _, setting := range []string{"rotation_period=1m", "rotation_schedule=* * * * *"} {
				t.Run(setting, func(t *testing.T) {
					t.Parallel()
					mount, _, _ := strings.Cut(strings.TrimPrefix(setting, "rotation_"), "=")
					e := engineAt(vault{v.Server, t}, mount)
					account := e.sim.AddServiceAccount(project, "gateway", "member")
					e.cli("write", e.mount+"/static-roles/gw", "project_id="+project, "service_account_id="+account,
						setting, fmt.Sprintf("overlap=%ds", overlap/time.Second))
					e.sim.ResetCalls()
					seen, reads, bad := map[string]time.Time{}, 0, 0 // keys, and until when each was what a read gave
					var last string
					start := time.Now()
					for ; len(seen) < 4 && time.Since(start) < 8*tick; time.Sleep(100 * time.Millisecond) {
						status, answer, err := e.API(t.Context(), "GET", e.mount+"/static-creds/gw", nil)
						last, _ = dig(answer, "data", "api_key").(string)
						if reads++; err != nil || status != http.StatusOK || !e.sim.Use(last) {
							bad++
						}
						seen[last] = time.Now()
						for key, until := range seen {
							if time.Since(until) < overlap-time.Second && !e.sim.Use(key) {
								t.Errorf("a replaced key does not work %s after its rotation", time.Since(until))
							}
						}
					}
					t.Logf("%d reads, %d bad, %d keys", reads, bad, len(seen))
					if bad > 0 || len(seen) != 4 {
						t.Errorf("got %d bad reads of %d, and %d keys, want 0 and 4", bad, reads, len(seen))
					}
					e.until(3*tick, func() error { // also over the rotations that go on
						live := 0
						for key := range seen {
							if key != last && e.sim.Use(key) {
								live++
							}
						}
						if live > 0 {
							return fmt.Errorf("%d replaced keys still work", live)
						}
						return nil
					})
					e.cli("delete", e.mount+"/static-roles/gw")
					if keys := e.sim.ProjectKeys(project); len(keys) > 0 {
						t.Errorf("keys after the role was deleted: got %v", keys)
					}
				})
			}
		})
	}
}
