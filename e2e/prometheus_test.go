// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/internal/openaisim"
)

// TestPrometheus lets the real Prometheus scrape a real Vault, with the example
// configuration, and asks it for numbers that this test has caused.
func TestPrometheus(t *testing.T) {
	if _, err := exec.LookPath("prometheus"); err != nil {
		t.Skip("SKIPPED: there is no prometheus here: apt-get install prometheus")
	}
	promtool(t, nil, "check", "rules", "../examples/prometheus/alerts.yml")
	promtool(t, nil, "test", "rules", "../examples/prometheus/alerts_test.yml")

	e := newEngine(ownServer(t, "1.21.1"))
	// Three issued, two revoked, one refused by OpenAI.
	leases := []string{e.creds().lease, e.creds().lease, e.creds().lease}
	for _, lease := range leases[:2] {
		e.cli("lease", "revoke", "-sync", lease)
	}
	e.sim.Inject(openaisim.Fault{Method: "POST", Path: "service_accounts$", Status: http.StatusBadRequest})
	e.api("GET", e.mount+"/creds/app", nil, http.StatusBadRequest)

	// A token that may only read the metrics, as data and as text, also as a bearer token.
	e.api("PUT", "sys/policies/acl/prometheus", map[string]any{"policy": fmt.Sprintf(
		`path %q { capabilities = ["read"] } path "sys/metrics" { capabilities = ["read"] }`, e.mount+"/metrics")}, http.StatusNoContent)
	answer := e.api("POST", "auth/token/create", map[string]any{"policies": []string{"prometheus"}}, http.StatusOK)
	token := dig(answer, "auth", "client_token").(string)
	reader := *e.Server
	reader.Token = token
	status, data, err := reader.API(t.Context(), "GET", e.mount+"/metrics", nil)
	if err != nil || status != http.StatusOK {
		t.Fatalf("metrics as data: got %d, %v", status, err)
	}
	operations := dig(data, "data", "vault_openai_credential_operations_total").(map[string]any)
	wanted := map[string]float64{
		`role="app",operation="issue",result="success"`:  3,
		`role="app",operation="issue",result="failure"`:  1,
		`role="app",operation="revoke",result="success"`: 2,
	}
	for labels, want := range wanted {
		if got := operations[labels]; got != want {
			t.Errorf("data, %s: got %v, want %v", labels, got, want)
		}
	}
	if len(operations) != len(wanted) {
		t.Errorf("data: got %v, want nothing else", operations)
	}
	text := scrape(t, e.Addr+"/v1/"+e.mount+"/metrics?format=prometheus", token)
	promtool(t, text, "check", "metrics")
	if got, _, _ := e.API(t.Context(), "GET", e.mount+"/metrics?format=xml", nil); got != http.StatusBadRequest {
		t.Errorf("another format: got status %d, want 400", got)
	}

	// What Prometheus makes of it.
	prometheus := startPrometheus(t, e, token)
	for labels, want := range wanted {
		awaitQuery(t, prometheus, "sum(vault_openai_credential_operations_total{"+labels+"})", want)
	}
	awaitQuery(t, prometheus, `sum(vault_openai_api_requests_total{operation="create_service_account",status="400"})`, 1)
	awaitQuery(t, prometheus, `sum(vault_openai_api_request_duration_seconds_count{operation="create_service_account"})`, 4)
	awaitQuery(t, prometheus, `sum(vault_secret_lease_creation{mount_point="`+e.mount+`/"}) > bool 0`, 1)

	// Each query of the dashboard is one that Prometheus takes, and together they draw all
	// the plugin's metrics, which README explains.
	dashboard, err := os.ReadFile("../examples/grafana/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(dashboard, &board); err != nil {
		t.Fatal(err)
	}
	queries := ""
	for _, panel := range board.Panels {
		for _, target := range panel.Targets {
			query := strings.NewReplacer("$__rate_interval", "5m", "$mount", e.mount).Replace(target.Expr)
			queries += query + "\n"
			if _, err := ask(prometheus, query); err != nil {
				t.Errorf("dashboard, %s: %v", panel.Title, err)
			}
		}
	}
	families := regexp.MustCompile(`(?m)^# TYPE (vault_openai_\w+)`).FindAllSubmatch(text, -1)
	if len(families) < 8 {
		t.Errorf("got %d metrics, want more", len(families))
	}
	for _, family := range families {
		if !strings.Contains(queries, string(family[1])) {
			t.Errorf("the dashboard does not draw %s", family[1])
		}
		if !bytes.Contains(readme, family[1]) {
			t.Errorf("README does not explain %s", family[1])
		}
	}
}

// promtool runs Prometheus' tool, which must have nothing to complain of.
func promtool(t *testing.T, input []byte, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "promtool", args...)
	cmd.Stdin = bytes.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// scrape reads the text format with a bearer token, as Prometheus does.
func scrape(t *testing.T, url, token string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "GET", url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	if _, err := body.ReadFrom(resp.Body); err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("scrape: got %d, %v", resp.StatusCode, err)
	}
	if got, want := resp.Header.Get("Content-Type"), "text/plain; version=0.0.4; charset=utf-8"; got != want {
		t.Errorf("content type: got %q, want %q", got, want)
	}
	return body.Bytes()
}

// startPrometheus runs Prometheus with the example configuration, scraping each second,
// and returns its address.
func startPrometheus(t *testing.T, e *engine, token string) string {
	t.Helper()
	dir := t.TempDir()
	config, err := os.ReadFile("../examples/prometheus/prometheus.yml")
	if err != nil {
		t.Fatal(err)
	}
	rules, err := filepath.Abs("../examples/prometheus/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	tokenFile := filepath.Join(dir, "token")
	text := strings.NewReplacer(
		"/etc/prometheus/vault-token", tokenFile, "scrape_interval: 15s", "scrape_interval: 1s", "alerts.yml", rules,
		"scheme: https", "scheme: http", "vault.example.com:8200", strings.TrimPrefix(e.Addr, "http://"),
		"/v1/openai/", "/v1/"+e.mount+"/",
	).Replace(string(config))
	for name, content := range map[string]string{tokenFile: token, filepath.Join(dir, "prometheus.yml"): text} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := listener.Addr().String()
	listener.Close()
	var log bytes.Buffer
	cmd := exec.Command("prometheus", "--config.file="+filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+addr)
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("Prometheus' log:\n%s", &log)
		}
	})
	return "http://" + addr
}

// ask returns the first value that a query has now; NaN when it has none.
func ask(prometheus, query string) (float64, error) {
	resp, err := http.Get(prometheus + "/api/v1/query?query=" + url.QueryEscape(query))
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct{ Result []struct{ Value [2]any } }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return 0, err
	}
	if answer.Status != "success" {
		return 0, fmt.Errorf("%s: %s", query, answer.Error)
	}
	value := math.NaN()
	if len(answer.Data.Result) > 0 {
		_, err = fmt.Sscan(fmt.Sprint(answer.Data.Result[0].Value[1]), &value)
	}
	return value, err
}

// awaitQuery waits until a query has the wanted value.
func awaitQuery(t *testing.T, prometheus, query string, want float64) {
	t.Helper()
	var got float64
	var err error
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(500 * time.Millisecond) {
		if got, err = ask(prometheus, query); err == nil && got == want {
			return
		}
	}
	t.Errorf("%s: got %v (%v), want %v", query, got, err, want)
}
