// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package harness

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Options say how a server is run.
type Options struct {
	Binary    string // vault executable; the CLI is the same one
	PluginDir string // folder of the plugin's executable
	Dev       bool   // a dev server: all in memory, no seal; else one node with raft storage
	LogLevel  string // default info
}

// Server is one node: a vault process that can be ended and started again on the same
// data, address and log.
type Server struct {
	Addr  string // URL
	Token string // root token
	Key   string // unseal key; empty of a dev server
	Dir   string // config, storage and log; Close removes it

	opts    Options
	process *process // nil when it does not run
}

// Start runs a new server, initialized and unsealed. The caller closes it.
func Start(ctx context.Context, opts Options) (*Server, error) {
	return start(ctx, opts, nil)
}

// StartCluster runs n servers that share raft storage, all of them voters; the first one
// is active. The caller closes each of them.
func StartCluster(ctx context.Context, opts Options, n int) (servers []*Server, err error) {
	defer func() {
		if err != nil {
			for _, s := range servers {
				s.Close()
			}
		}
	}()
	for range n {
		var first *Server
		if len(servers) > 0 {
			first = servers[0]
		}
		s, err := start(ctx, opts, first)
		if err != nil {
			return servers, err
		}
		servers = append(servers, s)
	}
	// Raft lets a new node vote when it has been stable for a while, by default 10 s.
	first := servers[0]
	if _, _, err := first.API(ctx, "POST", "sys/storage/raft/autopilot/configuration", map[string]any{
		"server_stabilization_time": "1s"}); err != nil {
		return servers, err
	}
	return servers, Until(ctx, time.Minute, func() error {
		result := first.CLI(ctx, "operator", "raft", "list-peers")
		if got := strings.Count(result.Stdout, "true"); got != n {
			return fmt.Errorf("%d of %d nodes vote", got, n)
		}
		return nil
	})
}

func start(ctx context.Context, opts Options, join *Server) (*Server, error) {
	dir, err := os.MkdirTemp("", "vpso-") // short: unix sockets lie below it
	if err != nil {
		return nil, err
	}
	s := &Server{Dir: dir, opts: opts}
	if err = s.setUp(ctx, join); err != nil {
		err = fmt.Errorf("%w\n%s", err, Mask(tail(s.Log(), 20)))
		s.Close()
		return nil, err
	}
	return s, nil
}

func (s *Server) setUp(ctx context.Context, join *Server) error {
	for _, name := range []string{"data", "tmp", "home"} {
		if err := os.Mkdir(filepath.Join(s.Dir, name), 0o700); err != nil {
			return err
		}
	}
	// Between the choice of a port and its use somebody else may take it.
	for attempt := 0; ; attempt++ {
		if err := s.configure(join); err != nil {
			return err
		}
		err := s.Run(ctx)
		if err == nil {
			break
		}
		if attempt == 4 || !strings.Contains(s.Log(), "address already in use") {
			return err
		}
	}
	switch {
	case s.opts.Dev:
		s.Token = "root"
		return s.Await(ctx)
	case join != nil:
		s.Token, s.Key = join.Token, join.Key
	default:
		status, answer, err := s.API(ctx, "PUT", "sys/init", map[string]any{"secret_shares": 1, "secret_threshold": 1})
		if err != nil || status != http.StatusOK {
			return fmt.Errorf("sys/init: %d %v", status, err)
		}
		s.Token = answer["root_token"].(string)
		s.Key = answer["keys_base64"].([]any)[0].(string)
	}
	return s.Unseal(ctx)
}

// configure chooses ports and writes the config file.
func (s *Server) configure(join *Server) error {
	api, err := freePort()
	if err != nil {
		return err
	}
	cluster, err := freePort()
	if err != nil {
		return err
	}
	s.Addr = fmt.Sprintf("http://127.0.0.1:%d", api)
	config := fmt.Sprintf(`
plugin_directory = %q
api_addr         = %q
disable_mlock    = true
telemetry {
  prometheus_retention_time = "1h"
  disable_hostname          = true
}
`, s.opts.PluginDir, s.Addr)
	if !s.opts.Dev {
		retryJoin := ""
		if join != nil {
			retryJoin = fmt.Sprintf("retry_join {\n    leader_api_addr = %q\n  }", join.Addr)
		}
		config += fmt.Sprintf(`
cluster_addr = "https://127.0.0.1:%[2]d"
listener "tcp" {
  address         = "127.0.0.1:%[1]d"
  cluster_address = "127.0.0.1:%[2]d"
  tls_disable     = true
}
storage "raft" {
  path                   = %[3]q
  node_id                = "node-%[1]d"
  performance_multiplier = 1
  %[4]s
}
`, api, cluster, filepath.Join(s.Dir, "data"), retryJoin)
	}
	return os.WriteFile(s.file("config.hcl"), []byte(config), 0o600)
}

func (s *Server) file(name string) string { return filepath.Join(s.Dir, name) }

// freePort finds a port that nobody listens on, outside the ranges that systems give to
// outgoing connections, so that it is still free when the server starts again.
func freePort() (int, error) {
	var err error
	for range 50 {
		var l net.Listener
		port := 20000 + rand.IntN(12000)
		if l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return port, l.Close()
		}
	}
	return 0, err
}

// Run starts the process and waits until it answers. It is sealed then, unless a dev
// server.
func (s *Server) Run(ctx context.Context) error {
	log, err := os.OpenFile(s.file("vault.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(s.opts.Binary, "server", "-config="+s.file("config.hcl"), "-log-level="+cmp.Or(s.opts.LogLevel, "info"))
	if s.opts.Dev {
		cmd.Args = append(cmd.Args, "-dev", "-dev-root-token-id=root", "-dev-no-store-token",
			"-dev-listen-address="+strings.TrimPrefix(s.Addr, "http://"))
	}
	cmd.Env = s.env()
	cmd.Stdout, cmd.Stderr = log, log
	if s.process, err = startProcess(cmd, s.Dir); err != nil {
		return err
	}
	return Until(ctx, time.Minute, func() error {
		select {
		case <-s.process.done:
			return stop{errors.New("vault server ended")}
		default:
		}
		_, _, err := s.API(ctx, "GET", "sys/seal-status", nil)
		return err
	})
}

// Unseal unseals the server, one that is still joining a cluster too, and waits until it
// serves requests. A node refuses its key until it has heard of the leader, and unseals some
// time after it has taken it. It must not be given it again meanwhile: it would unseal twice,
// and of the two standby routines it then has one would not hear of a step-down.
func (s *Server) Unseal(ctx context.Context) error {
	err := Until(ctx, time.Minute, func() error {
		status, answer, err := s.API(ctx, "PUT", "sys/unseal", map[string]any{"key": s.Key})
		if err != nil {
			return stop{fmt.Errorf("unsealing: %w", err)} // the key may have been taken
		}
		if status != http.StatusOK {
			return fmt.Errorf("unsealing: %d %v", status, answer["errors"])
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = Until(ctx, time.Minute, func() error {
		status, answer, err := s.API(ctx, "GET", "sys/seal-status", nil)
		if err == nil && answer["sealed"] != false {
			err = fmt.Errorf("the server is sealed: %d %v", status, answer["errors"])
		}
		return err
	})
	if err != nil {
		return err
	}
	return s.Await(ctx)
}

// Await waits until the server serves requests, or forwards them to the active node.
func (s *Server) Await(ctx context.Context) error {
	return Until(ctx, time.Minute, func() error {
		status, answer, err := s.API(ctx, "GET", "auth/token/lookup-self", nil)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("the server does not serve requests: %d %v", status, answer["errors"])
		}
		return err
	})
}

// Active tells whether the server is the active node of its cluster.
func (s *Server) Active(ctx context.Context) bool {
	_, answer, err := s.API(ctx, "GET", "sys/leader", nil)
	return err == nil && answer["is_self"] == true
}

// Stop ends the server as an operator does.
func (s *Server) Stop() {
	if s.process != nil {
		s.process.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-s.process.done:
		case <-time.After(20 * time.Second):
		}
		s.Kill()
	}
}

// Kill ends the server and its plugin processes at once, as a power cut does.
func (s *Server) Kill() {
	if s.process != nil {
		s.process.kill()
		s.process = nil
	}
}

// Close kills the server and removes its folder.
func (s *Server) Close() {
	s.Kill()
	os.RemoveAll(s.Dir)
}

// Pid is the process id of the running server.
func (s *Server) Pid() int { return s.process.cmd.Process.Pid }

// PluginPids are the process ids of the server's plugins.
func (s *Server) PluginPids() ([]int, error) {
	out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=").Output()
	if err != nil {
		return nil, fmt.Errorf("ps: %w", err)
	}
	var pids []int
	for line := range strings.Lines(string(out)) {
		var pid, parent int
		if _, err := fmt.Sscan(line, &pid, &parent); err == nil && parent == s.Pid() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Log is all that the server and its plugins have logged, not masked.
func (s *Server) Log() string {
	text, _ := os.ReadFile(s.file("vault.log"))
	return string(text)
}

// env is the environment of the server and of its CLI: nothing of the user's own Vault.
func (s *Server) env() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + s.file("home"), "TMPDIR=" + s.file("tmp"),
		"VAULT_ADDR=" + s.Addr, "VAULT_TOKEN=" + s.Token,
	}
}

// Result is what a command did.
type Result struct {
	Stdout, Stderr string
	Code           int // exit status; -1 when it did not end by itself
}

// CLI runs the vault command line against the server, with the root token.
func (s *Server) CLI(ctx context.Context, args ...string) Result {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, s.opts.Binary, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = s.env(), &stdout, &stderr
	err := cmd.Run()
	if err != nil && cmd.ProcessState.ExitCode() < 0 {
		fmt.Fprintln(&stderr, err)
	}
	return Result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// API makes one request to the server's HTTP API, below /v1/, with the root token. The
// answer is nil when there is none.
func (s *Server) API(ctx context.Context, method, path string, in any) (status int, answer map[string]any, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var body bytes.Buffer
	if in != nil {
		if err := json.NewEncoder(&body).Encode(in); err != nil {
			return 0, nil, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, s.Addr+"/v1/"+path, &body)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("X-Vault-Token", s.Token)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNoContent {
		return resp.StatusCode, nil, nil
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return resp.StatusCode, nil, fmt.Errorf("%s %s: %d, not JSON: %w", method, path, resp.StatusCode, err)
	}
	return resp.StatusCode, answer, nil
}

// stop is an error that Until does not wait out.
type stop struct{ error }

// Until calls fn every 100 ms until it returns nil, for d at the most, and then gives
// fn's last error.
func Until(ctx context.Context, d time.Duration, fn func() error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	for {
		err := fn()
		if err == nil || errors.As(err, new(stop)) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("after %s: %w", d, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// process is a child with a process group of its own, which holds all that it starts.
type process struct {
	cmd      *exec.Cmd
	watchdog *exec.Cmd
	done     chan struct{} // closed when the child has ended
}

// startProcess starts cmd, and a shell that kills cmd's group and removes dir when this
// process is gone: then its end of the shell's standard input is closed. A parent's death
// signal, where there is one, would reach vault but not vault's plugins.
func startProcess(cmd *exec.Cmd, dir string) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		cmd.Wait()
		close(p.done)
	}()
	p.watchdog = exec.Command("sh", "-c", `read line; kill -9 -"$1"; rm -rf "$2"`, "sh", strconv.Itoa(cmd.Process.Pid), dir)
	p.watchdog.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	_, err := p.watchdog.StdinPipe()
	if err == nil {
		err = p.watchdog.Start()
	}
	if err != nil {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
		return nil, err
	}
	return p, nil
}

func (p *process) kill() {
	syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.done
	p.watchdog.Process.Kill()
	p.watchdog.Wait()
}
