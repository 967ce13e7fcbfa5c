// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e && linux

package release

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
)

// vaultID is the user and group of the Vault server: like a packaged one it is not root,
// and containers share its group, which Docker's socket belongs to as well.
const vaultID = 65533

// otherArch is what images are made for beside this machine's own.
var otherArch = map[string]string{"amd64": "arm64", "arm64": "amd64"}[runtime.GOARCH]

// containerUser is the user of an image, and the one that its processes have outside.
type containerUser struct {
	image string // as in the Dockerfile
	uid   int
}

// TestContainer runs the plugin in containers of a Docker engine of its own.
func TestContainer(t *testing.T) {
	inNamespaces(t, testContainer, "dockerd", "docker", "runc", "setpriv")
}

// TestRootlessContainer does so with an engine that runs as the user who runs Vault.
func TestRootlessContainer(t *testing.T) {
	inNamespaces(t, testRootlessContainer, "dockerd", "docker", "runc", "setpriv", "rootlesskit", "slirp4netns", "newuidmap",
		"iptables", rootlessScript)
}

// inNamespaces runs a test in network, mount and process namespaces that end with it, so
// that nothing of an engine is left, and nothing of the machine's network is seen or
// changed. The test gets a folder with the vault executable and the plugin's two versions.
func inNamespaces(t *testing.T, test func(t *testing.T, dir string), needs ...string) {
	if dir := os.Getenv(innerEnv); dir != "" {
		test(t, dir)
		return
	}
	for _, need := range needs {
		if _, err := exec.LookPath(need); err != nil {
			t.Skipf("SKIPPED: %v: the plugin in a container is NOT tested", err)
		}
	}
	if os.Getuid() != 0 {
		t.Skip("SKIPPED: only root can start a Docker engine here: the plugin in a container is NOT tested")
	}
	// What needs the network, or root's home, comes before.
	dir, err := os.MkdirTemp("", "vpso-c-") // short: unix sockets lie below it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, exec.CommandContext(t.Context(), "cp", vaultBinary(t), filepath.Join(dir, "vault")))
	for _, version := range []string{"v0.1.0", "v0.2.0"} {
		run(t, script(t, root, []string{"VERSION=" + version}, "scripts/build", filepath.Join(dir, version)))
	}
	run(t, script(t, root, []string{"VERSION=v0.1.0", "GOARCH=" + otherArch}, "scripts/build", filepath.Join(dir, otherArch)))

	cmd := isolated(t.Context(), syscall.CLONE_NEWNS|syscall.CLONE_NEWPID, "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=15m")
	cmd.Env = append(cmd.Env, innerEnv+"="+dir, "DOCKER_CONFIG="+filepath.Join(dir, "none"), "GOPROXY=off")
	output := run(t, cmd)
	if strings.Contains(output, "--- SKIP") {
		t.Log(output)
	}
}

// testContainer is TestContainer proper, inside the namespaces.
func testContainer(t *testing.T, dir string) {
	e := startDocker(t, dir)
	// OpenAI stands on the address that containers have of this machine.
	address := bridgeAddress(t)
	o, bundle := startTLSOpenAI(t, dir, address, address)
	m := startMutualOpenAI(t, address, address)
	user := containerUser{"65532:65532", 65532}
	buildImage(t, e, dir, bundle, user, "v0.1.0", otherArch) // the next one takes its tag
	images := buildImages(t, e, dir, bundle, user)

	t.Run("runc", func(t *testing.T) { testRuntime(t, e, dir, "runc", user, images, o, m) })
	t.Run("runsc", func(t *testing.T) {
		// Alone, the plugin says what it is. A runsc that is too old for this kernel can't
		// even do that, which is no fault of the plugin's.
		out, _ := exec.CommandContext(t.Context(), "docker", "-H", string(e), "run", "--rm", "--runtime=runsc", images["v0.1.0"]).CombinedOutput()
		if !strings.Contains(string(out), "This binary is a plugin") {
			t.Skipf("SKIPPED: gVisor's runsc does not work here: the plugin in gVisor is NOT tested: %s", out)
		}
		testRuntime(t, e, dir, "runsc", user, images, o, m)
	})
}

// testRootlessContainer is TestRootlessContainer proper, inside the namespaces.
func testRootlessContainer(t *testing.T, dir string) {
	e := startRootlessDocker(t, dir)
	// Its containers reach this machine's loopback at slirp4netns' address for it.
	o, bundle := startTLSOpenAI(t, dir, "127.0.0.1", "10.0.2.2")
	m := startMutualOpenAI(t, "127.0.0.1", "10.0.2.2")
	user := containerUser{"0:0", vaultID}
	testRuntime(t, e, dir, "runc", user, buildImages(t, e, dir, bundle, user), o, m)
}

// startTLSOpenAI runs a simulated OpenAI on an address that containers reach as another. It
// returns it, and the file of authorities to trust: images have that in the place of the
// public ones, as a site behind a proxy would have it.
func startTLSOpenAI(t *testing.T, dir, address, reached string) (o *openAI, bundle string) {
	t.Helper()
	certificate, authority := selfSigned(t, reached)
	bundle = filepath.Join(dir, "authority.pem")
	if err := os.WriteFile(bundle, authority, 0o600); err != nil {
		t.Fatal(err)
	}
	return startOpenAIAt(t, address, reached, &tls.Config{Certificates: []tls.Certificate{certificate}}), bundle
}

// startOpenAIAt runs a simulated OpenAI on an address that its clients reach as another.
func startOpenAIAt(t *testing.T, address, reached string, config *tls.Config) *openAI {
	t.Helper()
	o := startOpenAI(t, func(s *httptest.Server) {
		s.Listener.Close()
		var err error
		if s.Listener, err = net.Listen("tcp", net.JoinHostPort(address, "0")); err != nil {
			t.Fatal(err)
		}
		s.TLS, s.Config.ErrorLog = config, log.New(io.Discard, "", 0)
	})
	o.url = strings.Replace(o.url, address, reached, 1)
	return o
}

// mutualOpenAI is a simulated OpenAI that demands a client certificate. No image trusts the
// authority that signed its own.
type mutualOpenAI struct {
	*openAI
	*harness.MutualTLS
}

// startMutualOpenAI runs one on an address that containers reach as another.
func startMutualOpenAI(t *testing.T, address, reached string) mutualOpenAI {
	t.Helper()
	m, err := harness.NewMutualTLS(reached)
	if err != nil {
		t.Fatal(err)
	}
	return mutualOpenAI{startOpenAIAt(t, address, reached, m.Server), m}
}

// takeOver has the mount use it: only config's fields can bring the certificates into a container.
func (m mutualOpenAI) takeOver(v vault) {
	v.t.Helper()
	for want, more := range map[string][]string{"unknown authority": nil, "client_certificate": {"ca_certificate=" + m.CA}} {
		if result := v.CLI(v.t.Context(), append([]string{"write"}, m.config(more...)...)...); result.Code == 0 || !strings.Contains(result.Stderr, want) {
			v.t.Errorf("config without the certificates: got %d and %q, want an error that says %q", result.Code, harness.Mask(result.Stderr), want)
		}
	}
	m.configure(v, "ca_certificate="+m.CA, "client_certificate="+m.Certificate, "client_key="+m.ClientKey)
	c := v.issue()
	m.wantAccounts(v.t, c)
	v.cli("lease", "renew", c.Lease)
	v.cli("lease", "revoke", "-sync", c.Lease)
	m.wantAccounts(v.t)
}

// buildImages builds both versions for this machine; it returns their ids by version.
func buildImages(t *testing.T, e engine, dir, bundle string, user containerUser) map[string]string {
	t.Helper()
	images := map[string]string{}
	for _, version := range []string{"v0.1.0", "v0.2.0"} {
		images[version] = buildImage(t, e, dir, bundle, user, version, runtime.GOARCH)
	}
	return images
}

// buildImage builds and checks an image; it returns its id.
func buildImage(t *testing.T, e engine, dir, bundle string, user containerUser, version, arch string) string {
	t.Helper()
	run(t, script(t, root, []string{"DOCKER_HOST=" + string(e), "CA_BUNDLE=" + bundle, "CONTAINER_USER=" + user.image, "GOARCH=" + arch},
		"scripts/docker", version))
	image := harness.PluginName + ":" + strings.TrimPrefix(version, "v")
	binary := version
	if arch != runtime.GOARCH {
		binary = arch
	}
	checkImage(t, e, image, arch, user.image, version, fileSum(t, filepath.Join(dir, binary)))
	return strings.TrimPrefix(e.docker(t, "image", "inspect", "--format", "{{.Id}}", image), "sha256:")
}

// testRuntime takes a credential's whole way through containers of one OCI runtime.
func testRuntime(t *testing.T, e engine, dir, oci string, user containerUser, images map[string]string, o *openAI, m mutualOpenAI) {
	// The server's own files are root's until it is started.
	wrapper := filepath.Join(dir, "vault-"+oci)
	text := fmt.Sprintf("#!/bin/sh\nchown -R %[1]d:%[1]d \"${HOME%%/*}\"\nDOCKER_HOST=%[2]s exec setpriv --reuid %[1]d --regid %[1]d --clear-groups %[3]s \"$@\"\n",
		vaultID, string(e), filepath.Join(dir, "vault"))
	if err := os.WriteFile(wrapper, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	plugins := filepath.Join(dir, "plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	v := startVault(t, harness.Options{Binary: wrapper, PluginDir: plugins})

	v.cli("plugin", "runtime", "register", "-type=container", "-oci_runtime="+oci, "test")
	for version, id := range images {
		v.cli("plugin", "register", "-sha256="+id, "-oci_image="+harness.PluginName, "-version="+version, "-runtime=test",
			"secret", harness.PluginName)
	}
	wantText(t, "vault plugin info", v.cli("plugin", "info", "-version=v0.1.0", "secret", harness.PluginName),
		"v0.1.0", images["v0.1.0"], harness.PluginName)
	v.cli("secrets", "enable", "-path=openai", "-plugin-version=v0.1.0", harness.PluginName)
	o.configure(v)

	a := v.issue()
	o.wantAccounts(t, a)
	container := e.docker(t, "ps", "-q", "--no-trunc", "--filter", "label=com.hashicorp.vault.plugin.version=v0.1.0")
	checkContainer(t, e, container, oci, user, images["v0.1.0"])

	// The next call after the container's end starts another one.
	e.docker(t, "kill", container)
	err := harness.Until(t.Context(), 30*time.Second, func() error {
		if result := v.CLI(t.Context(), "lease", "renew", a.Lease); result.Code != 0 {
			return fmt.Errorf("renewing after the container was killed: %s", harness.Mask(result.Stderr))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if next := e.docker(t, "ps", "-q", "--no-trunc"); next == "" || next == container {
		t.Errorf("after the kill: got container %q, want one that is not %q", next, container)
	}
	v.cli("lease", "revoke", "-sync", a.Lease)
	o.wantAccounts(t)

	upAndDown(t, v, o)
	m.takeOver(v)
	v.cli("secrets", "disable", "openai/")
}

// engine is a Docker engine, by its address.
type engine string

// docker runs a command that must succeed and returns what it printed.
func (e engine) docker(t *testing.T, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "docker", append([]string{"-H", string(e)}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.TrimSpace(string(out))
}

// startDocker starts an engine that ends with the namespaces.
func startDocker(t *testing.T, dir string) engine {
	t.Helper()
	settings := filepath.Join(dir, "daemon.json") // not the machine's own
	text := "{}"
	if runsc, err := exec.LookPath("runsc"); err == nil {
		// gVisor lets the plugin make the socket that Vault calls it by only when told so.
		text = fmt.Sprintf(`{"runtimes": {"runsc": {"path": %q, "runtimeArgs": ["--host-uds=all"]}}}`, runsc)
	}
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	host := "unix://" + filepath.Join(dir, "docker.sock")
	return startEngine(t, dir, host, exec.Command("dockerd", "--host="+host, "--group="+fmt.Sprint(vaultID), "--config-file="+settings,
		"--data-root="+filepath.Join(dir, "data"), "--exec-root="+filepath.Join(dir, "exec"), "--pidfile="+filepath.Join(dir, "pid"),
		"--iptables=false", "--ip6tables=false", "--log-level=warn"))
}

// rootlessScript is Debian's way to start an engine without root.
const rootlessScript = "/usr/share/docker.io/contrib/dockerd-rootless.sh"

// startRootlessDocker starts an engine as the user vaultID. What such a user needs of the
// machine, an entry among its users and subordinate ids, it has in these namespaces only.
func startRootlessDocker(t *testing.T, dir string) engine {
	t.Helper()
	home, runtimeDir := filepath.Join(dir, "home"), filepath.Join(dir, "run")
	for file, line := range map[string]string{
		"/etc/passwd": fmt.Sprintf("vault-e2e:x:%[1]d:%[1]d::%[2]s:/bin/sh", vaultID, home),
		"/etc/group":  fmt.Sprintf("vault-e2e:x:%d:", vaultID),
		"/etc/subuid": "vault-e2e:1000000:65536",
		"/etc/subgid": "vault-e2e:1000000:65536",
	} {
		text, err := os.ReadFile(file)
		own := filepath.Join(dir, filepath.Base(file))
		if err == nil {
			err = os.WriteFile(own, append(text, line+"\n"...), 0o644)
		}
		if err == nil {
			err = syscall.Mount(own, file, "", syscall.MS_BIND, "")
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// Every user may open this device on a machine that udev has set up.
	tun := filepath.Join(dir, "tun")
	if err := errors.Join(syscall.Mknod(tun, syscall.S_IFCHR|0o666, 10<<8|200), os.Chmod(tun, 0o666),
		syscall.Mount(tun, "/dev/net/tun", "", syscall.MS_BIND, "")); err != nil {
		t.Skipf("SKIPPED: no /dev/net/tun here: the plugin with a rootless engine is NOT tested: %v", err)
	}
	for _, own := range []string{home, runtimeDir} {
		if err := errors.Join(os.Mkdir(own, 0o700), os.Chown(own, vaultID, vaultID)); err != nil {
			t.Fatal(err)
		}
	}
	host := "unix://" + filepath.Join(runtimeDir, "docker.sock")
	cmd := exec.Command("setpriv", "--reuid", fmt.Sprint(vaultID), "--regid", fmt.Sprint(vaultID), "--clear-groups",
		rootlessScript, "--log-level=warn")
	cmd.Dir = home
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "XDG_RUNTIME_DIR=" + runtimeDir,
		// The script keeps containers from this machine's loopback unless told otherwise after.
		"DOCKERD_ROOTLESS_ROOTLESSKIT_FLAGS=--disable-host-loopback=false"}
	return startEngine(t, dir, host, cmd)
}

// startEngine runs an engine until the test ends.
func startEngine(t *testing.T, dir, host string, cmd *exec.Cmd) engine {
	t.Helper()
	log, err := os.Create(filepath.Join(dir, "dockerd.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { cmd.Wait(); close(ended) }()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(20 * time.Second):
		}
		log.Close()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("log of the Docker engine:\n%s", text[max(0, len(text)-5000):])
		}
	})
	err = harness.Until(t.Context(), time.Minute, func() error {
		out, err := exec.Command("docker", "-H", host, "version").CombinedOutput()
		if err != nil {
			return fmt.Errorf("the Docker engine does not start: %w\n%s", err, out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return engine(host)
}

// bridgeAddress is the address of this machine on the engine's own network.
func bridgeAddress(t *testing.T) string {
	t.Helper()
	bridge, err := net.InterfaceByName("docker0")
	if err != nil {
		t.Fatal(err)
	}
	addresses, err := bridge.Addrs()
	if err != nil || len(addresses) == 0 {
		t.Fatalf("docker0 has no address: %v", err)
	}
	return addresses[0].(*net.IPNet).IP.String()
}

// checkImage checks all that is in an image: two files, one of them the plugin as it is
// released, with no shell beside it, and a user that is a number.
func checkImage(t *testing.T, e engine, image, arch, user, version, sum string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "image.tar")
	e.docker(t, "save", "-o", file, image)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	saved, _ := untar(t, text)
	var manifests []struct {
		Config string
		Layers []string
	}
	if err := json.Unmarshal(saved["manifest.json"], &manifests); err != nil || len(manifests) != 1 {
		t.Fatalf("image: manifest.json: got %v, %d images, want one", err, len(manifests))
	}

	var layers []string
	for _, layer := range manifests[0].Layers {
		files, list := untar(t, saved[layer])
		layers = append(layers, list...)
		if plugin, ok := files[harness.PluginName]; ok {
			if got := fmt.Sprintf("%x", sha256.Sum256(plugin)); got != sum {
				t.Errorf("the plugin in the image: got %s, want %s as it is released", got, sum)
			}
		}
	}
	slices.Sort(layers)
	want := []string{"-rw-r--r-- 0:0 etc/ssl/certs/ca-certificates.crt", "-rwxr-xr-x 0:0 " + harness.PluginName,
		"drwxr-xr-x 0:0 etc", "drwxr-xr-x 0:0 etc/ssl", "drwxr-xr-x 0:0 etc/ssl/certs"}
	if !slices.Equal(layers, want) {
		t.Errorf("image: got the files\n%s\nwant\n%s", strings.Join(layers, "\n"), strings.Join(want, "\n"))
	}

	var got struct {
		Architecture, OS string
		Config           struct {
			User            string
			Entrypoint, Cmd []string
			Labels          map[string]string
		}
	}
	if err := json.Unmarshal(saved[manifests[0].Config], &got); err != nil {
		t.Fatal(err)
	}
	if got.OS != "linux" || got.Architecture != arch {
		t.Errorf("image: got %s/%s, want linux/%s", got.OS, got.Architecture, arch)
	}
	config := got.Config
	if config.User != user || !slices.Equal(config.Entrypoint, []string{"/" + harness.PluginName}) || config.Cmd != nil {
		t.Errorf("image: got user %q, entry point %q and command %q", config.User, config.Entrypoint, config.Cmd)
	}
	labels := map[string]string{"title": harness.PluginName, "description": "HashiCorp Vault secrets engine for OpenAI",
		"licenses": "MPL-2.0", "version": version}
	for key, want := range labels {
		if got := config.Labels["org.opencontainers.image."+key]; got != want {
			t.Errorf("image: label %s: got %q, want %q", key, got, want)
		}
	}
	if got, want := len(config.Labels), len(labels); got != want {
		t.Errorf("image: got %d labels, want %d: %v", got, want, config.Labels)
	}
}

// untar returns the files of a tar archive by name, and a line with mode, owner and name
// for each of its entries.
func untar(t *testing.T, archive []byte) (files map[string][]byte, list []string) {
	t.Helper()
	files = map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := r.Next()
		if err == io.EOF {
			return files, list
		}
		name := ""
		if err == nil {
			name = strings.TrimSuffix(header.Name, "/")
			files[name], err = io.ReadAll(r)
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("%v %d:%d %s", header.FileInfo().Mode(), header.Uid, header.Gid, name))
	}
}

// checkContainer checks how Vault runs the plugin.
func checkContainer(t *testing.T, e engine, container, oci string, user containerUser, image string) {
	t.Helper()
	got := e.docker(t, "inspect", "--format", "{{.HostConfig.Runtime}} {{.Image}} {{.Config.User}} {{.HostConfig.CapDrop}} {{.HostConfig.GroupAdd}}", container)
	if want := fmt.Sprintf("%s sha256:%s %s [ALL] [%d]", oci, image, user.image, vaultID); got != want {
		t.Errorf("container: got %s, want %s", got, want)
	}
	if oci != "runc" {
		return // gVisor's processes are not seen from outside
	}
	// The process as this machine sees it, whatever the image says.
	proc := filepath.Join("/proc", e.docker(t, "inspect", "--format", "{{.State.Pid}}", container))
	info, err := os.Stat(proc)
	if err != nil {
		t.Fatal(err)
	}
	if got := info.Sys().(*syscall.Stat_t).Uid; got != uint32(user.uid) {
		t.Errorf("container: the plugin runs as user %d, want %d", got, user.uid)
	}
	if got, err := os.Readlink(filepath.Join(proc, "exe")); err != nil || got != "/"+harness.PluginName {
		t.Errorf("container: got the process %q, %v, want the plugin", got, err)
	}
}

// selfSigned makes a certificate for an address, and the file of authorities to trust it.
func selfSigned(t *testing.T, address string) (tls.Certificate, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "simulated OpenAI"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(address)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
