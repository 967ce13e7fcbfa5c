// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e && linux

package release

import (
	"bytes"
	"debug/buildinfo"
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"vault-plugin-secrets-openai/e2e/harness"
)

const releaseVersion = "v0.2.0"

// allEnv, when set, tests the release for all platforms, which takes ten minutes more.
const allEnv = "RELEASE_TEST_ALL"

// binaryName is that of a released binary.
func binaryName(platform string) string {
	name := harness.PluginName + "_" + releaseVersion + "_" + strings.ReplaceAll(platform, "/", "_")
	if strings.HasPrefix(platform, "windows/") {
		name += ".exe"
	}
	return name
}

// TestReleaseIsReproducible makes the release twice, in other folders with other homes,
// caches and settings, and then builds from the source archive as another user without a
// network.
func TestReleaseIsReproducible(t *testing.T) {
	native := "linux/" + runtime.GOARCH
	platforms := []string{native}
	if os.Getenv(allEnv) != "" {
		platforms = []string{"linux/amd64", "linux/arm64", "darwin/amd64", "darwin/arm64", "windows/amd64", "windows/arm64"}
	}
	first, second := copySource(t, filepath.Join(t.TempDir(), "a")), copySource(t, filepath.Join(t.TempDir(), "another", "folder"))
	only := "PLATFORMS=" + strings.Join(platforms, " ")
	run(t, script(t, first, []string{only}, "scripts/release", releaseVersion))

	// The tools are the same, which spares building them twice.
	if err := os.CopyFS(filepath.Join(second, "bin", "tools"), os.DirFS(filepath.Join(first, "bin", "tools"))); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	cache := filepath.Join(home, "cache")
	run(t, script(t, second, []string{
		only, "HOME=" + home, "GOCACHE=" + cache, "GOMODCACHE=" + goEnv(t, "GOMODCACHE"),
		"USER=somebody", "TZ=Pacific/Auckland", "LC_ALL=C", "CGO_ENABLED=1", "GOFLAGS=-tags=mine -ldflags=-w", "GOAMD64=v2",
	}, "scripts/release", releaseVersion))

	dist := sums(t, filepath.Join(first, "dist"))
	compare(t, "the second release", sums(t, filepath.Join(second, "dist")), dist)
	prefix := harness.PluginName + "_" + releaseVersion
	want := []string{prefix + "_licenses.csv", prefix + "_source.tar.gz"}
	for _, platform := range platforms {
		binary := binaryName(platform)
		name, windows := strings.CutSuffix(binary, ".exe")
		archive := name + ".tar.gz"
		if windows {
			archive = name + ".zip"
		}
		want = append(want, binary, archive, name+".cdx.json")
		checkBuildInfo(t, filepath.Join(first, "dist", binary), platform, first, second, home)
		checkBill(t, filepath.Join(first, "dist", name+".cdx.json"), dist[binary])
	}
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(dist)); !slices.Equal(got, want) {
		t.Errorf("SHA256SUMS lists %v, want %v", got, want)
	}

	t.Run("Offline", func(t *testing.T) {
		if os.Getuid() != 0 {
			t.Skip("SKIPPED: only root can make a network namespace here: building offline is NOT tested")
		}
		testOffline(t, first, cache, dist[binaryName(native)])
	})
}

// testOffline builds from the source archive in dir/dist, and runs its unit tests, as
// nobody and without a network. What cache has compiled in another folder is used.
func testOffline(t *testing.T, dir, cache, want string) {
	source := t.TempDir()
	run(t, exec.Command("tar", "-xzf", filepath.Join(dir, "dist", harness.PluginName+"_"+releaseVersion+"_source.tar.gz"), "-C", source))
	source = filepath.Join(source, harness.PluginName+"_"+releaseVersion+"_source")
	home, goroot := t.TempDir(), goEnv(t, "GOROOT")
	if strings.HasPrefix(goroot, goEnv(t, "GOMODCACHE")) { // where nobody else may read
		run(t, exec.Command("cp", "-R", goroot, filepath.Join(home, "go")))
		goroot = filepath.Join(home, "go")
	}
	for _, own := range []string{filepath.Dir(source), home, filepath.Dir(cache)} {
		run(t, exec.Command("chown", "-R", "65534:65534", own))
		// t.TempDir is a folder in a folder of root's.
		if err := os.Chmod(filepath.Dir(own), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := isolated(t.Context(), 0, "sh", "-ec", `
		if grep -v -e lo: -e '|' /proc/net/dev; then echo "there is a network"; exit 1; fi
		make build VERSION=`+releaseVersion+`
		go test ./...`)
	cmd.Dir = source
	cmd.Env = append(cmd.Env, execEnv+"=65534", "HOME="+home, "GOCACHE="+cache, "GOMODCACHE="+filepath.Join(home, "none"),
		"GOFLAGS=-mod=vendor", "GOPROXY=off", "GOTOOLCHAIN=local", "TMPDIR="+home,
		"GOROOT="+goroot, "PATH="+filepath.Join(goroot, "bin")+":"+os.Getenv("PATH"))
	output := run(t, cmd)
	if !strings.Contains(output, "ok  \t"+harness.PluginName+"\t") {
		t.Errorf("the unit tests did not run:\n%s", output)
	}
	if got := fileSum(t, filepath.Join(source, "bin", harness.PluginName)); got != want {
		t.Errorf("built offline: got %s, want %s", got, want)
	}
}

// TestVersionIsChecked builds with versions that Vault would refuse, and starts a plugin
// that got one all the same.
func TestVersionIsChecked(t *testing.T) {
	for _, version := range []string{"1.2.3", "v1.2", "v01.2.3", "v1.2.3-", "v1.2.3 ", "latest"} {
		cmd := script(t, root, []string{"VERSION=" + version}, "scripts/build", filepath.Join(t.TempDir(), "plugin"))
		if out, err := cmd.CombinedOutput(); err == nil || !bytes.Contains(out, []byte("must be semantic")) {
			t.Errorf("building version %q: got %v %s, want a refusal", version, err, out)
		}
	}
	plugin := filepath.Join(t.TempDir(), "plugin")
	build := exec.CommandContext(t.Context(), "go", "build", "-ldflags", "-X main.version=1.2.3", "-o", plugin, ".")
	build.Dir = root
	run(t, build)
	out, err := exec.CommandContext(t.Context(), plugin).CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("not semantic")) {
		t.Errorf("starting version 1.2.3: got %v %s, want a refusal", err, out)
	}
}

// copySource copies the files that git tracks, and those that it would, into dir, where
// git tracks them too. It returns dir.
func copySource(t *testing.T, dir string) string {
	t.Helper()
	list := exec.CommandContext(t.Context(), "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate")
	list.Dir = root
	for name := range strings.SplitSeq(strings.Trim(run(t, list), "\x00"), "\x00") {
		info, err := os.Stat(filepath.Join(root, name))
		if os.IsNotExist(err) {
			continue // deleted, but not yet for git
		}
		var text []byte
		if err == nil {
			text, err = os.ReadFile(filepath.Join(root, name))
		}
		if err == nil {
			err = os.MkdirAll(filepath.Join(dir, filepath.Dir(name)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, info.Mode().Perm())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, args := range [][]string{{"init", "-q"}, {"add", "-A"}} {
		cmd := exec.CommandContext(t.Context(), "git", args...)
		cmd.Dir = dir
		run(t, cmd)
	}
	return dir
}

// sums reads dist/SHA256SUMS, checks that it is right, and returns the sums by file name.
func sums(t *testing.T, dist string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dist, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for line := range strings.Lines(string(text)) {
		sum, name, _ := strings.Cut(strings.TrimSpace(line), "  ")
		found[name] = sum
		if got := fileSum(t, filepath.Join(dist, name)); got != sum {
			t.Errorf("%s: got %s, want %s as SHA256SUMS says", name, got, sum)
		}
	}
	files, err := os.ReadDir(dist)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(found), len(files)-1; got != want {
		t.Errorf("SHA256SUMS lists %d files, want all %d", got, want)
	}
	return found
}

func compare(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	for name, sum := range want {
		if got[name] != sum {
			t.Errorf("%s: %s: got %s, want %s", what, name, got[name], sum)
		}
	}
}

// checkBuildInfo checks that what "go version -m" shows has the version, and nothing but
// what the source and Go's release decide.
func checkBuildInfo(t *testing.T, binary, platform string, never ...string) {
	t.Helper()
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	goos, goarch, _ := strings.Cut(platform, "/")
	known := map[string]string{"-buildmode": "exe", "-compiler": "gc", "-tags": releaseVersion, "-trimpath": "true",
		"CGO_ENABLED": "0", "GOOS": goos, "GOARCH": goarch}
	switch goarch {
	case "amd64":
		known["GOAMD64"] = "v1"
	case "arm64":
		known["GOARM64"] = "v8.0"
	}
	for _, setting := range info.Settings {
		if want, ok := known[setting.Key]; ok {
			if setting.Value != want {
				t.Errorf("%s: build information: %s: got %q, want %q", platform, setting.Key, setting.Value, want)
			}
			delete(known, setting.Key)
		} else if setting.Key != "DefaultGODEBUG" { // what go.mod's Go release decides
			t.Errorf("%s: build information has %s=%s", platform, setting.Key, setting.Value)
		}
	}
	if main := info.Main; main.Path != harness.PluginName || main.Version != "(devel)" || main.Sum != "" {
		t.Errorf("%s: build information: got the main module %+v", platform, main)
	}
	for _, module := range info.Deps {
		if module.Sum != "" || module.Replace != nil {
			t.Errorf("%s: build information: got %+v, want no sum, which vendored modules lack", platform, module)
		}
	}
	if len(known) > 0 {
		t.Errorf("%s: build information lacks %v", platform, known)
	}
	if info.GoVersion != runtime.Version() {
		t.Errorf("%s: build information: got %s, want %s", platform, info.GoVersion, runtime.Version())
	}
	text, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(never, root, goEnv(t, "GOMODCACHE"), goEnv(t, "GOCACHE")) {
		if bytes.Contains(text, []byte(path)) {
			t.Errorf("%s: the binary has the builder's path %s in it", platform, path)
		}
	}
}

// checkBill checks that the bill of materials is of this version and of this binary, and
// names the Vault SDK and Go.
func checkBill(t *testing.T, path, sum string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var bill struct {
		Format   string `json:"bomFormat"`
		Metadata struct {
			Component  struct{ Name, Version string }
			Properties []struct{ Name, Value string }
		}
		Components []struct{ Name, Version string }
	}
	if err := json.Unmarshal(text, &bill); err != nil {
		t.Fatal(err)
	}
	if c := bill.Metadata.Component; bill.Format != "CycloneDX" || c.Name != harness.PluginName || c.Version != releaseVersion {
		t.Errorf("bill of materials: got %s of %v", bill.Format, c)
	}
	if !strings.Contains(string(text), `"`+sum+`"`) {
		t.Errorf("bill of materials does not have the binary's sum %s", sum)
	}
	for _, want := range []string{"github.com/hashicorp/vault/sdk", "std"} {
		if !slices.ContainsFunc(bill.Components, func(c struct{ Name, Version string }) bool { return c.Name == want }) {
			t.Errorf("bill of materials does not name %s", want)
		}
	}
}

func goEnv(t *testing.T, name string) string {
	t.Helper()
	return strings.TrimSpace(run(t, exec.CommandContext(t.Context(), "go", "env", name)))
}
