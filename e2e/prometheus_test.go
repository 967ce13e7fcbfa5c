// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

// Both formats give exactly the numbers of what was done, to a token that may read
// nothing else.
func TestMetrics(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		e := newEngine(v)
		leases := []string{e.creds().lease, e.creds().lease, e.creds().lease}
		for _, lease := range leases[:2] {
			e.cli("lease", "revoke", "-sync", lease)
		}
		e.sim.Inject(openaisim.Fault{Method: "POST", Path: "service_accounts$", Status: http.StatusBadRequest})
		e.api("GET", e.mount+"/creds/app", nil, http.StatusBadRequest)
		want := map[string]float64{
			`vault_openai_credential_operations_total{role="app",operation="issue",result="success"}`:  3,
			`vault_openai_credential_operations_total{role="app",operation="issue",result="failure"}`:  1,
			`vault_openai_credential_operations_total{role="app",operation="revoke",result="success"}`: 2,
			`vault_openai_api_requests_total{operation="create_service_account",status="200"}`:         3,
			`vault_openai_api_requests_total{operation="create_service_account",status="400"}`:         1,
			`vault_openai_api_requests_total{operation="delete_service_account",status="200"}`:         2,
			`vault_openai_api_requests_total{operation="list_admin_api_keys",status="200"}`:            1, // from the set-up
			`vault_openai_api_requests_total{operation="get_project",status="200"}`:                    1,
		}

		reader := e.holding("prometheus", "")
		_, answer, err := reader.API(t.Context(), "GET", e.mount+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, name := range []string{"vault_openai_credential_operations_total", "vault_openai_api_requests_total"} {
			values, _ := dig(answer, "data", name).(map[string]any)
			for labels, value := range values {
				got[name+"{"+labels+"}"] = value.(float64)
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("data: got %v, want %v", got, want)
		}

		for header, value := range map[string]string{"X-Vault-Token": reader.Token, "Authorization": "Bearer " + reader.Token} {
			text := e.scrape(header, value)
			got := map[string]float64{}
			for _, m := range regexp.MustCompile(`(?m)^(vault_openai_(?:credential|api_requests)\S+) (\S+)$`).FindAllStringSubmatch(text, -1) {
				var value float64
				fmt.Sscan(m[2], &value)
				got[m[1]] = value
			}
			if !maps.Equal(got, want) {
				t.Errorf("text with %s: got %v, want %v", header, got, want)
			}
		}
		if status, _, _ := reader.API(t.Context(), "GET", e.mount+"/metrics?format=xml", nil); status != http.StatusBadRequest {
			t.Errorf("another format: got %d, want 400", status)
		}
	})
}

// scrape reads the text format.
func (e *engine) scrape(header, value string) string {
	e.t.Helper()
	req, err := http.NewRequestWithContext(e.t.Context(), "GET", e.Addr+"/v1/"+e.mount+"/metrics?format=prometheus", nil)
	if err != nil {
		e.t.Fatal(err)
	}
	req.Header.Set(header, value)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		e.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		e.t.Fatalf("scrape: got %d (%v)", resp.StatusCode, err)
	}
	if got, want := resp.Header.Get("Content-Type"), "text/plain; version=0.0.4; charset=utf-8"; got != want {
		e.t.Errorf("content type: got %q, want %q", got, want)
	}
	return string(text)
}

// The real Prometheus scrapes a real Vault while keys are issued, with the example
// configuration, and gives the numbers that this test has caused. In the end each metric
// of README has moved, and each query of the dashboard draws something.
func TestPrometheus(t *testing.T) {
	for _, tool := range []string{"prometheus", "promtool"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("WARNING: nothing is tested: %v: apt-get install prometheus", err)
		}
	}
	t.Parallel()
	promtool(t, "", "check", "rules", "--lint=all", examples+"prometheus/alerts.yml")
	promtool(t, "", "test", "rules", examples+"prometheus/alerts_test.yml")
	e := newEngine(ownServer(t, harness.Versions[0]))
	e.sim.SetLatency(10 * time.Millisecond)
	prometheus := startPrometheus(e)

	create := openaisim.Fault{Method: "POST", Path: "service_accounts$"}
	limited, refused, lost := create, create, create
	limited.Status, limited.Header = http.StatusTooManyRequests, http.Header{"Retry-After-Ms": {"300"}}
	refused.Status = http.StatusBadRequest
	lost.Kind, lost.Process = "close", true
	undeletable := openaisim.Fault{Method: "DELETE", Status: http.StatusForbidden, Times: -1}

	const load = 400
	if err := e.issueMany("app", load, 16); err != nil {
		t.Fatal(err)
	}
	e.cli("lease", "revoke", "-sync", "-prefix", e.mount+"/creds/app")
	e.cli("write", e.mount+"/static-roles/gw", "project_id="+project, "rotation_period=24h",
		"service_account_id="+e.sim.AddServiceAccount(project, "gateway", "member"))
	e.sim.Inject(limited)
	stays := e.creds()
	goes := e.creds()
	e.cli("lease", "renew", goes.lease)
	e.sim.Inject(openaisim.Fault{Method: "DELETE", Status: http.StatusInternalServerError})
	e.cli("lease", "revoke", "-sync", goes.lease)
	e.sim.Inject(refused)
	e.api("GET", e.mount+"/creds/app", nil, http.StatusBadRequest)
	e.sim.Inject(undeletable) // so that no tick finds the lost account before Prometheus has seen it
	e.sim.Inject(lost)
	e.api("GET", e.mount+"/creds/app", nil, http.StatusInternalServerError)
	e.cli("write", e.mount+"/config", "rotation_period=720h", "admin_key_ttl=2160h")
	e.sim.Inject(openaisim.Fault{Method: "GET", Path: "admin_api_keys", Status: http.StatusForbidden})
	e.api("PUT", e.mount+"/config/rotate", nil, http.StatusInternalServerError)
	e.api("PUT", e.mount+"/config/rotate", nil, http.StatusOK)
	e.insist(stays.lease)

	ops := func(operation, result string) string {
		return fmt.Sprintf("vault_openai_credential_operations_total{mount=\"openai\", role=\"app\", operation=%q, result=%q}", operation, result)
	}
	requests := func(status string) string {
		return fmt.Sprintf("vault_openai_api_requests_total{operation=\"create_service_account\", status=%q}", status)
	}
	for query, want := range map[string]float64{
		ops("issue", "success"):  load + 2,
		ops("issue", "failure"):  2,
		ops("renew", "success"):  1,
		ops("revoke", "success"): load + 1,
		ops("revoke", "failure"): 5,
		requests("200"):          load + 2,
		requests("400"):          1,
		requests("429"):          1,
		requests("error"):        1,
		`vault_openai_api_request_duration_seconds_count{operation="create_service_account"}`:                                             load + 5,
		`vault_openai_api_request_duration_seconds_bucket{operation="create_service_account", le="+Inf"}`:                                 load + 5,
		`vault_openai_api_retries_total{reason="429"}`:                                                                                    1,
		`vault_openai_api_retries_total{reason="500"}`:                                                                                    1,
		`vault_openai_api_rate_limit_wait_seconds_total > 0.1`:                                                                            math.NaN(),
		`vault_openai_rotations_total{trigger="manual", result="success"}`:                                                                1,
		`vault_openai_rotations_total{trigger="manual", result="failure"}`:                                                                1,
		`vault_openai_admin_keys_pending_deletion`:                                                                                        1,
		`round((vault_openai_admin_key_next_rotation_timestamp_seconds - vault_openai_admin_key_last_rotation_timestamp_seconds) / 3600)`: 720,
		`round((vault_openai_admin_key_expiry_timestamp_seconds - time()) / 3600)`:                                                        2160,
		`vault_openai_revocations_handed_over_total`:                                                                                      1,
		`sum(vault_openai_build_info)`:                                                                                                    1,
		`sum(vault_secret_lease_creation{mount_point="openai/"})`:                                                                         load + 2,
		`vault_expire_num_irrevocable_leases`:                                                                                             0,
		`vault_openai_cleanups_pending`:                                                                                                   1, // from the next tick on
		`vault_openai_lost_creates`:                                                                                                       1,
	} {
		prometheus.await(query, want, 100*time.Second)
	}
	promtool(t, e.scrape("X-Vault-Token", e.Token), "check", "metrics")

	e.sim.ClearFaults()
	prometheus.await(`vault_openai_cleanups_total{result="success"}`, 1, 2*time.Minute)
	prometheus.await(`vault_openai_cleanups_pending`, 0, time.Minute)
	prometheus.await(`vault_openai_admin_keys_pending_deletion`, 0, time.Minute)
	// A tick and a full pass may delete the same account; to the later one it is gone already.
	prometheus.await(`vault_openai_tidy_deletions_total{result="success"} >= 1`, math.NaN(), 4*time.Minute)
	prometheus.await(`vault_openai_lost_creates`, 0, time.Minute)
	prometheus.await(`vault_openai_tidy_passes_total{result="success"}`, 1, 4*time.Minute)
	prometheus.await(`vault_openai_tidy_last_pass_timestamp_seconds > time() - 600`, math.NaN(), time.Minute)

	e.newIdentity("")
	e.token("token")
	text := e.scrape("X-Vault-Token", e.Token)
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := regexp.MustCompile("(?m)^\\| `(vault_openai_\\w+)`").FindAllStringSubmatch(string(readme), -1)
	for _, name := range documented {
		// What is pending or lost is 0 again.
		settled := strings.Contains(name[1], "pending") || strings.Contains(name[1], "overdue") || name[1] == "vault_openai_lost_creates"
		moved := regexp.MustCompile(`(?m)^` + name[1] + `(_count)?(\{.*\})? [0.]*[1-9]`)
		if !settled && !moved.MatchString(text) || !strings.Contains(text, "# TYPE "+name[1]+" ") {
			t.Errorf("%s has not moved", name[1])
		}
	}
	if got := strings.Count(text, "# TYPE "); got != len(documented) {
		t.Errorf("got %d metrics, README has %d", got, len(documented))
	}
	// Rates need two samples that differ; and Vault queues leases that expire only.
	e.until(time.Minute, func() error {
		e.cli("lease", "renew", e.creds().lease)
		e.creds("ttl=1s")
		return prometheus.draw(examples + "grafana/dashboard.json")
	})
}

// promtool runs Prometheus' tool, which must have nothing to complain of.
func promtool(t *testing.T, input string, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "promtool", args...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// prometheus is a running Prometheus, which scrapes e.
type prometheus struct {
	*engine
	addr string
}

// startPrometheus runs Prometheus with the example configuration, but each second.
func startPrometheus(e *engine) *prometheus {
	e.t.Helper()
	dir, address := e.t.TempDir(), localAddress(e.t)
	write(e.t, dir+"/token", e.holding("prometheus", "").Token)
	write(e.t, dir+"/alerts.yml", e.example("prometheus/alerts.yml"))
	write(e.t, dir+"/prometheus.yml", e.example("prometheus/prometheus.yml", "/etc/prometheus/vault-token", dir+"/token",
		"_interval: 30s", "_interval: 1s", "scheme: https", "scheme: http", "vault.example.com:8200", strings.TrimPrefix(e.Addr, "http://")))
	promtool(e.t, "", "check", "config", dir+"/prometheus.yml")
	start(e.t, "prometheus", "--config.file="+dir+"/prometheus.yml", "--storage.tsdb.path="+dir+"/data", "--web.listen-address="+address)
	return &prometheus{e, "http://" + address}
}

// ask returns the values that a query has now.
func (p *prometheus) ask(query string) (values []float64, err error) {
	resp, err := http.Get(p.addr + "/api/v1/query?query=" + url.QueryEscape(query))
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct{ Result []struct{ Value [2]any } }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	if answer.Status != "success" {
		return nil, fmt.Errorf("%s: %s", query, answer.Error)
	}
	for _, result := range answer.Data.Result {
		var value float64
		if _, err := fmt.Sscan(fmt.Sprint(result.Value[1]), &value); err != nil {
			return nil, err
		}
		values = append(values, value)
	}
	return values, nil
}

// await waits until a query has one value, the wanted one. NaN: whatever it is.
func (p *prometheus) await(query string, want float64, d time.Duration) {
	p.t.Helper()
	if err := harness.Until(p.t.Context(), d, func() error {
		got, err := p.ask(query)
		if err == nil && (len(got) != 1 || got[0] != want && !math.IsNaN(want)) {
			err = fmt.Errorf("%s: got %v, want %v", query, got, want)
		}
		return err
	}); err != nil {
		p.t.Error(err)
	}
}

// draw runs each query of a dashboard. Its errors are a query that has no values, and a
// panel that lies on another.
func (p *prometheus) draw(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var board struct {
		Panels []struct {
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil {
		return err
	}
	replace := strings.NewReplacer("$__rate_interval", "5m", "${mount}", p.mount, "$mount", p.mount)
	queries, taken := 0, map[[2]int]bool{}
	for _, panel := range board.Panels {
		for i := range panel.GridPos.W * panel.GridPos.H {
			at := [2]int{panel.GridPos.X + i%panel.GridPos.W, panel.GridPos.Y + i/panel.GridPos.W}
			if taken[at] || at[0] >= 24 {
				return fmt.Errorf("panel %q lies on another, or outside", panel.Title)
			}
			taken[at] = true
		}
		for _, target := range panel.Targets {
			queries++
			values, askErr := p.ask(replace.Replace(target.Expr))
			if askErr == nil && !slices.ContainsFunc(values, func(v float64) bool { return !math.IsNaN(v) }) {
				askErr = fmt.Errorf("%s: got %v, want values", target.Expr, values)
			}
			if askErr != nil {
				err = errors.Join(err, fmt.Errorf("panel %q: %w", panel.Title, askErr))
			}
		}
	}
	if err == nil {
		p.t.Logf("%d queries of %d panels draw something", queries, len(board.Panels))
	}
	return err
}
