// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e && linux

// Package release tests what an operator gets and does: a release that is reproducible,
// with a network and without, upgrades in place, and the plugin in a container.
package release

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

// Environment of a test executable that runs itself again, in namespaces of its own.
const (
	execEnv  = "RELEASE_TEST_EXEC"  // user and group id to become before running the arguments
	innerEnv = "RELEASE_TEST_INNER" // folder of a test that goes on in there
)

// root is the folder of the source.
var root = func() string {
	dir, err := filepath.Abs("../..")
	if err != nil {
		panic(err)
	}
	return dir
}()

func TestMain(m *testing.M) {
	ids, inner := os.Getenv(execEnv), os.Getenv(innerEnv)
	if ids != "" || inner != "" {
		if err := enterNamespaces(ids, inner != ""); err != nil {
			fmt.Fprintln(os.Stderr, "entering namespaces:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// isolated returns a command that runs the test executable with args in a new network
// namespace, which has no interface but loopback, and with further namespaces.
func isolated(ctx context.Context, flags uintptr, args ...string) *exec.Cmd {
	self, err := os.Executable()
	if err != nil {
		panic(err)
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = os.Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | flags, Pdeathsig: syscall.SIGKILL}
	return cmd
}

// enterNamespaces is what the command of isolated does first. With ids, it becomes that
// user and group and runs its arguments; it returns only if that fails.
func enterNamespaces(ids string, pidNamespace bool) error {
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if pidNamespace {
		// Nothing that is mounted here is to be seen outside, and /proc is to show this
		// namespace's processes.
		if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("private mounts: %w", err)
		}
		if err := syscall.Mount("proc", "/proc", "proc", 0, ""); err != nil {
			return fmt.Errorf("/proc: %w", err)
		}
	}
	if ids == "" {
		return nil
	}
	id, err := strconv.Atoi(ids)
	if err == nil {
		err = errors.Join(syscall.Setgroups(nil), syscall.Setgid(id), syscall.Setuid(id))
	}
	if err != nil {
		return err
	}
	path, err := exec.LookPath(os.Args[1])
	if err != nil {
		return err
	}
	os.Unsetenv(execEnv)
	return syscall.Exec(path, os.Args[1:], os.Environ())
}

// loopbackUp brings up the loopback interface, which is down in a new namespace.
func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	request := struct { // struct ifreq of netdevice(7)
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: syscall.IFF_UP | syscall.IFF_RUNNING}
	copy(request.name[:], "lo")
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request))); errno != 0 {
		return errno
	}
	return nil
}

// run runs a command that must succeed, and returns its output.
func run(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	// What a killed command leaves running must not hold the test up.
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, harness.Mask(out.String()))
	}
	return out.String()
}

// script returns a command of the source in dir, with more environment.
func script(t *testing.T, dir string, env []string, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(dir, name), args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	return cmd
}

// fileSum returns the SHA-256 of a file.
func fileSum(t *testing.T, path string) string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", hash.Sum(nil))
}

// vaultBinary is the vault executable that these tests run.
func vaultBinary(t *testing.T) string {
	t.Helper()
	binary, err := harness.Vault(t.Context(), harness.Versions[0], os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

// startVault runs a server until the test ends.
func startVault(t *testing.T, options harness.Options) vault {
	t.Helper()
	server, err := harness.Start(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if log := harness.Mask(server.Log()); t.Failed() {
			t.Logf("log of the server:\n%s", log[max(0, len(log)-20000):])
		}
		server.Close()
	})
	return vault{server, t}
}

// vault is a server as one test uses it.
type vault struct {
	*harness.Server
	t *testing.T
}

// cli runs a command that must succeed and returns what it printed.
func (v vault) cli(args ...string) string {
	v.t.Helper()
	result := v.CLI(v.t.Context(), args...)
	if result.Code != 0 {
		v.t.Fatalf("vault %s: exit status %d\n%s", harness.Mask(strings.Join(args, " ")), result.Code,
			harness.Mask(result.Stdout+result.Stderr))
	}
	return result.Stdout
}

// credential is what an application gets.
type credential struct {
	Lease string `json:"lease_id"`
	Data  struct {
		Key     string `json:"api_key"`
		Account string `json:"service_account_id"`
	}
}

// issue reads a credential of the role app.
func (v vault) issue() (c credential) {
	v.t.Helper()
	if err := json.Unmarshal([]byte(v.cli("read", "-format=json", "openai/creds/app")), &c); err != nil {
		v.t.Fatal(err)
	}
	return c
}

// openAI is a simulated OpenAI that remembers who called.
type openAI struct {
	*openaisim.Server
	url string // with /v1

	mu    sync.Mutex
	agent string // User-Agent of the last call; guarded by mu
}

// startOpenAI runs one until the test ends; prepare may change how.
func startOpenAI(t *testing.T, prepare func(*httptest.Server)) *openAI {
	t.Helper()
	o := &openAI{Server: openaisim.New()}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		o.mu.Lock()
		o.agent = r.UserAgent()
		o.mu.Unlock()
		o.ServeHTTP(w, r)
	}))
	if prepare != nil {
		prepare(server)
	}
	if server.TLS != nil {
		server.StartTLS()
	} else {
		server.Start()
	}
	t.Cleanup(server.Close)
	o.url = server.URL + "/v1"
	return o
}

// userAgent is that of the last call.
func (o *openAI) userAgent() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.agent
}

// configure writes the mount's config, with more fields, and the role app.
func (o *openAI) configure(v vault, more ...string) {
	v.t.Helper()
	v.cli(append([]string{"write"}, o.config(more...)...)...)
	v.cli("write", "openai/roles/app", "project_id="+openaisim.DefaultProject)
}

// config are the arguments of vault write for the mount's config.
func (o *openAI) config(more ...string) []string {
	key, _ := o.AdminKey()
	return append([]string{"openai/config", "admin_api_key=" + key, "organization_id=" + openaisim.DefaultOrganization,
		"api_endpoint=" + o.url}, more...)
}

// wantAccounts checks which service accounts the project has.
func (o *openAI) wantAccounts(t *testing.T, credentials ...credential) {
	t.Helper()
	got := map[string]bool{}
	for _, account := range o.ServiceAccounts(openaisim.DefaultProject) {
		got[account.ID] = true
	}
	for _, c := range credentials {
		if !got[c.Data.Account] {
			t.Errorf("OpenAI does not have the service account %s", c.Data.Account)
		}
		if !o.Use(c.Data.Key) {
			t.Errorf("OpenAI refuses the key of %s", c.Data.Account)
		}
	}
	if len(got) != len(credentials) {
		t.Errorf("OpenAI has %d service accounts, want %d", len(got), len(credentials))
	}
}
