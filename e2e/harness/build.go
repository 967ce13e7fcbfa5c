// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Package harness builds and runs real Vault servers with the plugin, for the tests in
// e2e and for the demo. Servers listen on loopback, live in a temporary folder, and end
// with the process that started them, however it ends.
package harness

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

// Versions are the Vault servers that the plugin is tested on. The module
// e2e/vault-<major>.<minor> pins each of them.
var Versions = []string{"1.21.1", "1.19.4"}

// PluginName is the plugin's executable and its usual name in Vault's catalog.
const PluginName = "vault-plugin-secrets-openai"

// Vault returns the path of the vault executable of a version, which it builds unless
// the user's cache folder has it. Progress is told to w; a build takes some minutes.
func Vault(ctx context.Context, version string, w io.Writer) (string, error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return "", err
	}
	module := filepath.Join(root, "e2e", "vault-"+version[:strings.LastIndex(version, ".")])
	platform, err := goCommand(ctx, module, nil, "env", "GOVERSION", "GOOS", "GOARCH")
	if err != nil {
		return "", err
	}
	hash := sha256.New()
	io.WriteString(hash, platform)
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(filepath.Join(module, name))
		if err != nil {
			return "", err
		}
		hash.Write(text)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, PluginName, fmt.Sprintf("vault-%s-%x", version, hash.Sum(nil)[:6]))
	binary := filepath.Join(dir, "vault")
	if _, err := os.Stat(binary); err == nil {
		return binary, nil
	}

	fmt.Fprintf(w, "Building Vault %s from source. This takes some minutes the first time; it is then kept in %s.\n", version, dir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	// Built beside its place and renamed, so that nobody runs half a file.
	part := fmt.Sprintf("%s.%d", binary, os.Getpid())
	defer os.Remove(part)
	p := newProgress(w)
	defer p.stop()
	if _, err := goCommand(ctx, module, p, "build", "-v", "-tags", "minimal", "-trimpath",
		"-ldflags", "-s -w", "-o", part, "github.com/hashicorp/vault"); err != nil {
		return "", fmt.Errorf("building Vault %s: %w", version, err)
	}
	return binary, os.Rename(part, binary)
}

// BuildPlugin builds the plugin into dir, quicker than a release is built, and returns the SHA-256
// that Vault's catalog asks for. An empty version is a development build.
func BuildPlugin(ctx context.Context, dir, version string) (sum string, err error) {
	root, err := moduleRoot(ctx)
	if err != nil {
		return "", err
	}
	binary := filepath.Join(dir, PluginName)
	if _, err := goCommand(ctx, root, nil, "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -X main.version="+version, "-o", binary, "."); err != nil {
		return "", fmt.Errorf("building the plugin: %w", err)
	}
	text, err := os.ReadFile(binary)
	return fmt.Sprintf("%x", sha256.Sum256(text)), err
}

// moduleRoot returns the folder of the module that the working directory belongs to.
func moduleRoot(ctx context.Context) (string, error) {
	file, err := goCommand(ctx, ".", nil, "env", "GOMOD")
	if err != nil {
		return "", err
	}
	if filepath.Base(file) != "go.mod" {
		return "", errors.New("the working directory must be inside the plugin's source")
	}
	return filepath.Dir(file), nil
}

// goCommand runs the go tool in dir, tells w what it says on stderr, and returns its
// output without the last line break.
func goCommand(ctx context.Context, dir string, w io.Writer, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Minute)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if w != nil {
		cmd.Stderr = io.MultiWriter(&stderr, w)
	}
	// Interrupted, the go tool ends the compilers that it runs; killed, it does not.
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return "", fmt.Errorf("go %s: %w\n%s", args[0], err, tail(stderr.String(), 20))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// progress counts what the go tool reports, a line for each download and each package,
// and says every ten seconds how far it is.
type progress struct {
	mu               sync.Mutex
	loaded, compiled int
	done             chan struct{}
}

func newProgress(w io.Writer) *progress {
	p := &progress{done: make(chan struct{})}
	start := time.Now()
	go func() {
		tick := time.NewTicker(10 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.mu.Lock()
				fmt.Fprintf(w, "  %4.0f s: %d modules downloaded, %d packages compiled\n",
					time.Since(start).Seconds(), p.loaded, p.compiled)
				p.mu.Unlock()
			case <-p.done:
				return
			}
		}
	}()
	return p
}

func (p *progress) Write(text []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	loaded := bytes.Count(text, []byte("go: downloading"))
	p.loaded += loaded
	p.compiled += bytes.Count(text, []byte("\n")) - loaded
	return len(text), nil
}

func (p *progress) stop() { close(p.done) }

// tail returns the last n lines of text.
func tail(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

var secretPattern = regexp.MustCompile(`\b(sk-|hvs\.|eyJ)[A-Za-z0-9._-]+`)

// Mask hides API keys and Vault tokens in text that is printed.
func Mask(text string) string { return secretPattern.ReplaceAllString(text, "$1***") }
