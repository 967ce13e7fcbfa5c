// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

// Bench measures the engine on a real Vault server with raft storage and a simulated OpenAI
// that takes 50 ms for each call, and prints a table of ratios in Markdown:
//
//	go run -tags e2e ./e2e/bench
//
// The simulated OpenAI is a process of its own, so that what it costs shows as little as
// the machine allows. All figures of a ratio are from the same run.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

const (
	latency = 50 * time.Millisecond
	rounds  = 3               // of measurements of throughput, taken in turns; an odd number
	window  = 3 * time.Second // of one of them
	// settleTime is how long Go's runtime has to give memory back before it is measured.
	settleTime = 12 * time.Second
	direct     = "proj_direct" // the project of the direct calls
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	err := errors.New("usage: bench")
	switch {
	case len(os.Args) == 1:
		err = run(ctx)
	case os.Args[1] == "simulator":
		err = simulate(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", harness.Mask(err.Error()))
		os.Exit(1)
	}
}

// countingListener counts the connections that it accepts.
type countingListener struct {
	net.Listener
	accepted atomic.Int64
}

func (l *countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.accepted.Add(1)
	}
	return conn, err
}

// simulate is the simulated OpenAI. It ends with its standard input.
func simulate(ctx context.Context) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	counting := &countingListener{Listener: listener}
	sim := openaisim.New()
	sim.AddProject(direct, direct)
	mux := http.NewServeMux()
	mux.Handle("/", sim)
	mux.HandleFunc("/_bench/accepted", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(counting.accepted.Load())
	})
	mux.HandleFunc("/_bench/accounts", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(len(sim.ServiceAccounts(openaisim.DefaultProject)))
	})
	key, _ := sim.AdminKey()
	json.NewEncoder(os.Stdout).Encode([]string{"http://" + listener.Addr().String(), key,
		sim.AddServiceAccount(direct, "for tokens", "member")})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	return http.Serve(counting, mux)
}

// bench is a server with the engine at "openai" and one that calls nobody at "null", which
// can wait as long as a call takes.
type bench struct {
	ctx    context.Context
	server *harness.Server
	client *http.Client
	openai string // URL of the simulated OpenAI
	key    string // its admin key
	err    error  // of the first step that failed; later ones do nothing
}

func run(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "vpso-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	b := &bench{ctx: ctx, client: &http.Client{
		Timeout:   2 * time.Minute,
		Transport: &http.Transport{MaxIdleConns: 100, MaxIdleConnsPerHost: 100},
	}}
	size, minimum, err := b.setUp(dir)
	defer func() {
		if b.server != nil {
			b.server.Close()
		}
	}()
	if err != nil {
		return err
	}
	return b.measure(size, minimum)
}

// setUp builds and starts everything. It returns the sizes in bytes of the plugin and of
// the smallest plugin that the SDK allows.
func (b *bench) setUp(dir string) (size, minimum int64, err error) {
	sum, err := harness.BuildPlugin(b.ctx, dir, "")
	if err != nil {
		return 0, 0, err
	}
	source := filepath.Join(dir, "minimum.go")
	if err = os.WriteFile(source, []byte(minimalPlugin), 0o600); err != nil {
		return 0, 0, err
	}
	for output, from := range map[string]string{"minimum": source, "null": "./e2e/oldplugin"} {
		cmd := exec.CommandContext(b.ctx, "go", "build", "-tags", "e2e", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w",
			"-o", filepath.Join(dir, output), from)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return 0, 0, fmt.Errorf("building %s: %w\n%s", output, err, out)
		}
	}
	sizeOf := func(name string) int64 {
		info, statErr := os.Stat(filepath.Join(dir, name))
		if err = errors.Join(err, statErr); statErr != nil {
			return 0
		}
		return info.Size()
	}
	size, minimum = sizeOf(harness.PluginName), sizeOf("minimum")

	simulator := exec.CommandContext(b.ctx, os.Args[0], "simulator")
	simulator.Stderr = os.Stderr
	if _, err := simulator.StdinPipe(); err != nil { // it ends with us
		return 0, 0, err
	}
	out, err := simulator.StdoutPipe()
	if err == nil {
		err = simulator.Start()
	}
	var told []string
	if err == nil {
		err = json.NewDecoder(out).Decode(&told)
	}
	if err != nil {
		return 0, 0, err
	}
	b.openai, b.key = told[0], told[1]

	vault, err := harness.Vault(b.ctx, harness.Versions[0], os.Stderr)
	if err == nil {
		b.server, err = harness.Start(b.ctx, harness.Options{Binary: vault, PluginDir: dir, LogLevel: "warn"})
	}
	if err != nil {
		return 0, 0, err
	}
	null, err := os.ReadFile(filepath.Join(dir, "null"))
	if err != nil {
		return 0, 0, err
	}
	for _, args := range [][]string{
		{"plugin", "register", "-sha256=" + sum, "secret", harness.PluginName},
		{"plugin", "register", fmt.Sprintf("-sha256=%x", sha256.Sum256(null)), "secret", "null"},
		{"secrets", "enable", "-path=openai", harness.PluginName},
		{"secrets", "enable", "null"},
		{"write", "openai/config", "admin_api_key=" + b.key, "organization_id=" + openaisim.DefaultOrganization, "api_endpoint=" + b.openai + "/v1"},
		{"write", "openai/roles/app", "project_id=" + openaisim.DefaultProject},
		{"write", "openai/config/identity", "token_endpoint=" + b.openai + "/oauth/token"},
		{"write", "openai/roles/token", "project_id=" + direct, "credential_type=access_token",
			"service_account_id=" + told[2]},
	} {
		if result := b.server.CLI(b.ctx, args...); result.Code != 0 {
			return 0, 0, fmt.Errorf("vault %s: %s", args[0], result.Stderr)
		}
	}
	return size, minimum, nil
}

const minimalPlugin = `package main

import (
	"context"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/plugin"
)

func main() {
	plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: func(ctx context.Context, conf *logical.BackendConfig) (logical.Backend, error) {
			b := &framework.Backend{BackendType: logical.TypeLogical}
			return b, b.Setup(ctx, conf)
		},
	})
}
`

// request makes an HTTP request whose answer must be a success, and decodes it into out
// unless that is nil.
func (b *bench) request(method, url, header, value string, in, out any) error {
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return err
		}
	}
	req, err := http.NewRequestWithContext(b.ctx, method, url, &body)
	if err != nil {
		return err
	}
	req.Header.Set(header, value)
	req.Header.Set("Content-Type", "application/json")
	resp, err := b.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %d %s", method, url, resp.StatusCode, text)
	}
	if err == nil && out != nil {
		err = json.Unmarshal(text, out)
	}
	return err
}

func (b *bench) vault(method, path string, in any) error {
	return b.request(method, b.server.Addr+"/v1/"+path, "X-Vault-Token", b.server.Token, in, nil)
}

func (b *bench) issue() error   { return b.vault("GET", "openai/creds/app", nil) }
func (b *bench) token() error   { return b.vault("GET", "openai/creds/token", nil) }
func (b *bench) nothing() error { return b.vault("GET", "null/nothing?wait=0", nil) }
func (b *bench) waiting() error { return b.vault("GET", "null/nothing?wait="+latency.String(), nil) }

// post is the one POST that a credential costs at OpenAI.
func (b *bench) post() error {
	return b.request("POST", b.openai+"/v1/organization/projects/"+direct+"/service_accounts", "Authorization", "Bearer "+b.key,
		map[string]any{"name": "direct", "expires_in_seconds": 3600}, nil)
}

// step runs fn unless a step before has failed.
func (b *bench) step(fn func() error) {
	if b.err == nil {
		b.err = fn()
	}
}

func (b *bench) setLatency(d time.Duration) {
	b.step(func() error {
		return b.request("POST", b.openai+"/_sim/latency", "X", "", map[string]any{"duration": d.String()}, nil)
	})
}

// ask reads a number from the simulated OpenAI.
func (b *bench) ask(what string) (n int64) {
	b.step(func() error { return b.request("GET", b.openai+"/_bench/"+what, "X", "", nil, &n) })
	return n
}

// medians times n calls of each fn, in turns, one at a time.
func (b *bench) medians(n int, fns ...func() error) []time.Duration {
	times := make([][]time.Duration, len(fns))
	for range n {
		for i, fn := range fns {
			start := time.Now()
			b.step(fn)
			times[i] = append(times[i], time.Since(start))
		}
	}
	medians := []time.Duration{}
	for _, t := range times {
		slices.Sort(t)
		medians = append(medians, t[n/2])
	}
	return medians
}

// times runs fn n times by workers and returns how long that took.
func (b *bench) times(n int64, workers int, fn func() error) time.Duration {
	start, left := time.Now(), atomic.Int64{}
	left.Store(n)
	var mu sync.Mutex
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for left.Add(-1) >= 0 {
				if err := fn(); err != nil {
					mu.Lock()
					b.err = errors.Join(b.err, err)
					mu.Unlock()
					return
				}
			}
		})
	}
	group.Wait()
	return time.Since(start)
}

// rate is how many calls a second workers make within the window.
func (b *bench) rate(workers int, fn func() error) float64 {
	if b.err != nil {
		return 0
	}
	ctx, cancel := context.WithTimeout(b.ctx, window)
	defer cancel()
	var n atomic.Int64
	took := b.times(1<<40, workers, func() error {
		if ctx.Err() != nil {
			return errWindow
		}
		n.Add(1)
		return fn()
	})
	if errors.Is(b.err, errWindow) {
		b.err = nil
	}
	return float64(n.Load()) / took.Seconds()
}

var errWindow = errors.New("the time is over")

// kind is something whose throughput is measured, where OpenAI takes a time for a call.
type kind struct {
	fn      func() error
	latency time.Duration
}

// rates is the rate of each kind, the median of rounds in which all have their turn.
func (b *bench) rates(workers int, kinds ...kind) []float64 {
	all := make([][]float64, len(kinds))
	for range rounds {
		for i, k := range kinds {
			b.setLatency(k.latency)
			all[i] = append(all[i], b.rate(workers, k.fn))
		}
	}
	medians := []float64{}
	for _, r := range all {
		slices.Sort(r)
		medians = append(medians, r[rounds/2])
	}
	return medians
}

// plugin is the process id of an engine's process.
func (b *bench) plugin(binary string) (found int) {
	b.step(func() error {
		pids, err := b.server.PluginPids()
		for _, pid := range pids {
			if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); filepath.Base(exe) == binary {
				found = pid
			}
		}
		return err
	})
	return found
}

// memory is the resident set of a process in MiB.
func memory(pid int) (mib float64) {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if _, rest, ok := strings.Cut(string(status), "VmRSS:"); ok {
		fmt.Sscan(rest, &mib)
	}
	return mib / 1024
}

// processorTime is what a process has used, in ms.
func processorTime(pid int) float64 {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0
	}
	var user, system float64
	fmt.Sscan(fields[11], &user)
	fmt.Sscan(fields[12], &system)
	return (user + system) * 10 // ticks of 1/100 s
}

// cost is the processor time in ms that one call of fn costs Vault and the plugin.
func (b *bench) cost(binary string, fn func() error) (vault, plugin float64) {
	const n = 1000
	pid := b.plugin(binary)
	vault, plugin = processorTime(b.server.Pid()), processorTime(pid)
	b.times(n, 32, fn)
	return (processorTime(b.server.Pid()) - vault) / n, (processorTime(pid) - plugin) / n
}

// revoke ends all leases of a mount at once and returns how many seconds it took until
// left had counted down to 0.
func (b *bench) revoke(mount string, left func() int64) float64 {
	start := time.Now()
	b.step(func() error {
		return b.vault("PUT", "sys/leases/revoke-prefix/"+mount, map[string]any{"sync": false})
	})
	b.step(func() error {
		return harness.Until(b.ctx, 5*time.Minute, func() error {
			if n := left(); n > 0 && b.err == nil {
				return fmt.Errorf("%d are left", n)
			}
			return nil
		})
	})
	return time.Since(start).Seconds()
}

func (b *bench) accounts() int64 { return b.ask("accounts") }

// leases counts the leases of the engine that calls nobody.
func (b *bench) leases() int64 {
	status, answer, err := b.server.API(b.ctx, "LIST", "sys/leases/lookup/null/nothing", nil)
	if err != nil || status != http.StatusOK {
		return 0
	}
	return int64(len(answer["data"].(map[string]any)["keys"].([]any)))
}

func (b *bench) measure(size, minimum int64) error {
	fmt.Printf("Machine: %d processors, %s/%s. OpenAI is simulated on it and takes %s for a call.\n\n",
		runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, latency)
	fmt.Print("| | measured | compared with | ratio |\n| --- | --- | --- | --- |\n")
	row := func(what, measured, with, ratio string) {
		if b.err == nil {
			fmt.Printf("| %s | %s | %s | %s |\n", what, measured, with, ratio)
		}
	}
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

	b.setLatency(latency)
	b.medians(5, b.issue, b.post) // connections are open then
	m := b.medians(300, b.issue, b.post, b.waiting, b.nothing)
	row("Read of one credential, median", ms(m[0]), ms(m[1])+" for one POST to OpenAI", fmt.Sprintf("%.2f", m[0].Seconds()/m[1].Seconds()))
	own, wait := m[0]-m[1], m[2]-latency
	row("of which beside the POST", ms(own), fmt.Sprintf("%s, beside its wait, of an engine that waits %s and writes nothing; %s of one that calls nobody",
		ms(wait), latency, ms(m[3])), fmt.Sprintf("%.2f", own.Seconds()/wait.Seconds()))

	for _, workers := range []int{1, 8, 32} {
		ideal := float64(workers) / latency.Seconds()
		r := b.rates(workers, kind{b.issue, latency}, kind{b.waiting, latency}, kind{b.post, latency}, kind{b.nothing, 0}, kind{b.issue, 0})
		issued, waiting, posts, nothing, instant := r[0], r[1], r[2], r[3], r[4]
		row(fmt.Sprintf("Credentials a second, %d at a time", workers), fmt.Sprintf("%.0f", issued),
			fmt.Sprintf("%.0f of an engine that waits %s and writes nothing; %.0f POSTs; %.0f ideal", waiting, latency, posts, ideal),
			fmt.Sprintf("%.2f, %.2f, %.2f", issued/waiting, issued/posts, issued/ideal))
		row("with an OpenAI that takes no time", fmt.Sprintf("%.0f", instant),
			fmt.Sprintf("%.0f of an engine that calls nobody", nothing), fmt.Sprintf("%.2f", instant/nothing))
		r = b.rates(workers, kind{b.token, latency}, kind{b.waiting, latency})
		row(fmt.Sprintf("Access tokens a second, %d at a time", workers), fmt.Sprintf("%.0f", r[0]),
			fmt.Sprintf("%.0f of an engine that waits %s and writes nothing", r[1], latency), fmt.Sprintf("%.2f", r[0]/r[1]))
	}

	return b.measureMany(row, size, minimum)
}

// measureMany measures what takes many credentials.
func (b *bench) measureMany(row func(what, measured, with, ratio string), size, minimum int64) error {
	b.setLatency(0)
	b.revoke("openai", b.accounts)
	b.revoke("null", b.leases)
	b.step(func() error {
		return b.vault("PUT", "sys/plugins/reload/backend", map[string]any{"plugin": harness.PluginName})
	})
	many := func(n int64, fn func() error) { b.step(func() error { b.times(n, 32, fn); return b.err }) }

	b.setLatency(latency)
	accepted := b.ask("accepted")
	many(1000, b.issue)
	row("Connections opened for 1,000 credentials, 32 workers", fmt.Sprint(b.ask("accepted")-accepted), "40", "")
	many(1000, b.nothing)
	null := 1000 / b.revoke("null", b.leases)
	revoked := 1000 / b.revoke("openai", b.accounts)
	row("Revocations a second, 1,000 leases at once", fmt.Sprintf("%.0f", revoked),
		fmt.Sprintf("%.0f of an engine that calls nobody", null), fmt.Sprintf("%.2f", revoked/null))

	b.setLatency(0)
	vault, plugin := b.cost(harness.PluginName, b.issue)
	vaultNull, pluginNull := b.cost("null", b.nothing)
	row("Processor time of one credential", fmt.Sprintf("%.1f ms Vault, %.1f ms plugin", vault, plugin),
		fmt.Sprintf("%.1f ms and %.1f ms of an engine that calls nobody", vaultNull, pluginNull), "")
	settled := func() float64 {
		time.Sleep(settleTime)
		return memory(b.plugin(harness.PluginName))
	}
	many(8000, b.issue)
	early := settled()
	many(10_000, b.issue)
	late := settled()
	row("Memory of the plugin after 20,000 credentials", fmt.Sprintf("%.1f MiB", late),
		fmt.Sprintf("%.1f MiB after 10,000", early), fmt.Sprintf("%.2f", late/early))
	row("Size of the plugin", fmt.Sprintf("%.1f MB", float64(size)/1e6), fmt.Sprintf("%.1f MB of the SDK's minimum", float64(minimum)/1e6),
		fmt.Sprintf("%.3f", float64(size)/float64(minimum)))
	return b.err
}
