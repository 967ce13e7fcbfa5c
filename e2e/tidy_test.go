// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"vault-plugin-secrets-openai/e2e/harness"
	"vault-plugin-secrets-openai/internal/openaisim"
)

// dueAfter is how long after the end in its name an account is deleted.
const dueAfter = 10 * time.Minute

// tidy runs a pass of tidy and returns what it answers. It waits while another one is under way.
func (e *engine) tidy(fields ...any) map[string]any {
	e.t.Helper()
	in := map[string]any{}
	for i := 0; i < len(fields); i += 2 {
		in[fields[i].(string)] = fields[i+1]
	}
	var data map[string]any
	e.until(tick, func() error {
		status, answer, err := e.API(e.t.Context(), "PUT", e.mount+"/tidy", in)
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("tidy: %d %v", status, answer["errors"])
		}
		data, _ = answer["data"].(map[string]any)
		return err
	})
	return data
}

// mountID is the tag in the names of what the mount makes.
func (e *engine) mountID() string {
	e.t.Helper()
	id, _ := e.config()["mount_id"].(string)
	if !regexp.MustCompile(`^[a-z2-7]{6}$`).MatchString(id) {
		e.t.Fatalf("mount_id: got %q, want 6 letters a to z or digits 2 to 7", id)
	}
	return id
}

// suffix is what names end in: of a mount, with an end so long ago.
func suffix(mountID string, ago time.Duration) string {
	return fmt.Sprintf("-%s%05s%s", mountID, strconv.FormatInt(time.Now().Add(-ago).Unix()/60, 36), "abcd2345")
}

var namePattern = regexp.MustCompile(`-[a-z2-7]{6}([0-9a-z]{5})[a-z2-7]{8}$`)

// endOf is the end in a name that a mount has made; zero: it has not made this one.
func endOf(name string) time.Time {
	m := namePattern.FindStringSubmatch(name)
	if m == nil {
		return time.Time{}
	}
	minutes, err := strconv.ParseInt(m[1], 36, 64)
	if err != nil {
		return time.Time{}
	}
	return time.Unix(60*minutes, 0)
}

// lastEnd is the latest end in the names of accounts and keys with these ids.
func (e *engine) lastEnd(ids map[string]bool) (last time.Time) {
	names := map[string]string{}
	for _, a := range e.sim.ServiceAccounts(project) {
		names[a.ID] = a.Name
	}
	for _, k := range e.sim.ProjectKeys(project) {
		names[k.ID] = k.Name
	}
	for id := range ids {
		if end := endOf(names[id]); end.After(last) {
			last = end
		}
	}
	return last
}

// awaitDue waits until what has this end in its name may be deleted.
func (e *engine) awaitDue(end time.Time) {
	wait := time.Until(end.Add(dueAfter + 2*time.Second)) // OpenAI's Date has whole seconds
	e.t.Logf("waiting %s for the end in names and ten minutes", wait.Round(time.Second))
	time.Sleep(wait)
}

// addKey makes a key on an account and returns its id.
func (e *engine) addKey(account, name string) string {
	e.t.Helper()
	body := strings.NewReader(fmt.Sprintf(`{"project":%q,"account":%q,"name":%q}`, project, account, name))
	resp, err := http.Post(e.url+"/_sim/keys", "application/json", body)
	if err != nil || resp.StatusCode != http.StatusOK {
		e.t.Fatalf("making a key: %v %v", resp, err)
	}
	defer resp.Body.Close()
	var answer struct{ ID string }
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		e.t.Fatal(err)
	}
	return answer.ID
}

// everything is the ids of all accounts and keys that OpenAI has in projects.
func (e *engine) everything(projects ...string) map[string]bool {
	ids := map[string]bool{}
	for _, p := range projects {
		for _, a := range e.sim.ServiceAccounts(p) {
			ids[a.ID] = true
		}
		for _, k := range e.sim.ProjectKeys(p) {
			ids[k.ID] = true
		}
	}
	return ids
}

// Tidy deletes what has the mount's tag and is past its end, in each project, and nothing
// else; dry_run tells what that would be, and mount_id has it done for another mount.
func TestTidy(t *testing.T) {
	eachVersion(t, func(t *testing.T, v vault) {
		const second, archived = "proj_second", "proj_archived"
		e := newEngine(v)
		e.sim.AddProject(second, "second")
		e.sim.AddProject(archived, "archived")
		id, gone := e.mountID(), "gone22"
		issued := time.Now()
		c := e.creds()
		checkTime(t, "end in the name "+c.account, endOf(c.account), issued.Add(24*time.Hour+2*time.Minute), time.Now().Add(24*time.Hour+4*time.Minute))
		if !strings.HasPrefix(c.account, "vault-app-"+id) {
			t.Errorf("name: got %s, want vault-app-%s…", c.account, id)
		}

		const past, hardly = dueAfter + 2*time.Minute, dueAfter - 2*time.Minute
		add := e.sim.AddServiceAccount
		team := add(project, "the-team", "member")
		named := add(project, "named-by-a-role"+suffix(id, past), "member")
		e.cli("write", e.mount+"/roles/team", "project_id="+project, "service_account_id="+team)
		e.cli("write", e.mount+"/roles/named", "project_id="+project, "service_account_id="+named)
		due := []string{
			add(project, "vault-app"+suffix(id, past), "member"), add(second, "x"+suffix(id, 24*365*time.Hour), "none"),
			e.addKey(team, "vault-team"+suffix(id, past)),
		}
		lost := []string{
			add(project, "vault-app"+suffix(gone, past), "owner"), add(second, "vault-app"+suffix(gone, past), "member"),
			e.addKey(team, "vault-team"+suffix(gone, past)),
		}
		add(project, "vault-app"+suffix(id, hardly), "member")
		add(project, "vault-app"+suffix(gone, hardly), "member")
		add(project, "vault-app"+suffix(id, past)+"x", "member")
		add(project, "vault-app-"+suffix("", past), "member")
		e.addKey(team, "vault-team"+suffix(id, hardly))
		add(archived, "vault-app"+suffix(id, past), "member")
		e.sim.ArchiveProject(archived)
		want := e.everything(project, second)

		check := func(what string, answer map[string]any, fields map[string]any) {
			t.Helper()
			fields["failed"], fields["errors"], fields["pending"] = 0, []any{}, []any{}
			for field, want := range fields {
				if got := fmt.Sprint(answer[field]); got != fmt.Sprint(want) {
					t.Errorf("%s: %s: got %s, want %v", what, field, got, want)
				}
			}
			if got := e.everything(project, second); !maps.Equal(got, want) {
				t.Errorf("%s: OpenAI has %v, want %v", what, got, want)
			}
		}
		leftover := func(answer map[string]any, want []string) {
			t.Helper()
			var got []string
			for _, id := range answer["leftover"].([]any) {
				got = append(got, id.(string))
			}
			if got, want := slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want)); !slices.Equal(got, want) {
				t.Errorf("leftover: got %v, want %v", got, want)
			}
		}
		found := len(due) + 4 // the credential, the one that a role names, what is hardly past: an account and a key
		answer := e.json("write", e.mount+"/tidy", "dry_run=true")["data"].(map[string]any)
		check("dry run", answer, map[string]any{"dry_run": true, "mount_id": id, "projects": 2, "found": found, "deleted": 0})
		leftover(answer, due)
		leftover(e.api("GET", e.mount+"/tidy", nil, http.StatusOK)["data"].(map[string]any), due)

		for _, id := range due {
			delete(want, id)
		}
		answer = e.json("write -force", e.mount+"/tidy")["data"].(map[string]any)
		check("pass", answer, map[string]any{"dry_run": false, "mount_id": id, "projects": 2, "found": found, "deleted": len(due)})
		leftover(answer, nil)
		check("read", e.json("read", e.mount+"/tidy")["data"].(map[string]any), answer)
		check("second pass", e.tidy(), map[string]any{"found": found - len(due), "deleted": 0})

		delete(want, lost[1])
		check("lost mount, one project", e.tidy("mount_id", gone, "project_ids", []string{second}),
			map[string]any{"mount_id": gone, "projects": 1, "found": 1, "deleted": 1})
		delete(want, lost[0])
		delete(want, lost[2])
		answer = e.tidy("mount_id", gone)
		check("lost mount", answer, map[string]any{"mount_id": gone, "projects": 2, "found": 3, "deleted": 2})
		leftover(answer, nil)

		for _, in := range []map[string]any{{"mount_id": "UPPER2"}, {"mount_id": "vault-app"}, {"project_ids": "../x"}, {"dry_run": "perhaps"}} {
			e.api("PUT", e.mount+"/tidy", in, http.StatusBadRequest)
		}
		text := e.scrape("X-Vault-Token", v.Token)
		for _, line := range []string{
			fmt.Sprintf("vault_openai_tidy_deletions_total{result=\"success\"} %d\n", len(due)+len(lost)),
			"vault_openai_tidy_passes_total{result=\"success\"} 2\n", "vault_openai_tidy_passes_total{result=\"failure\"} 0\n",
		} {
			if !strings.Contains(text, line) {
				t.Errorf("metrics lack %q", line)
			}
		}

		// What can't be done is told, and done by the next pass.
		stuck := add(project, "vault-app"+suffix(id, past), "member")
		e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Path: stuck, Status: http.StatusForbidden})
		answer = e.tidy()
		leftover(answer, []string{stuck})
		if answer["failed"] != 1.0 || len(answer["errors"].([]any)) != 1 {
			t.Errorf("a deletion that fails: got failed %v, errors %v, want one", answer["failed"], answer["errors"])
		}
		check("the pass after that", e.tidy(), map[string]any{"deleted": 1})
		e.sim.SetDate("none")
		add(project, "vault-app"+suffix(id, past), "member")
		if answer = e.tidy(); answer["deleted"] != 0.0 || answer["failed"] != 1.0 || !strings.Contains(fmt.Sprint(answer["errors"]), "Date") {
			t.Errorf("without a Date: got %v, want nothing deleted and an error that says so", answer)
		}
		e.sim.SetDate("")
		check("with a Date again", e.tidy(), map[string]any{"deleted": 1})

		// A dry run leaves a create whose answer was lost, too.
		e.sim.Inject(openaisim.Fault{Method: http.MethodPost, Path: "service_accounts$", Kind: "close", Process: true})
		e.api("GET", e.mount+"/creds/app", nil, http.StatusInternalServerError)
		answer = e.tidy("dry_run", true)
		if got := answer["leftover"].([]any); len(got) != 1 || !e.accounts()[got[0].(string)] {
			t.Errorf("dry run with a lost create: got leftover %v, want its account, which is still there", got)
		}
		check("the pass after the dry run", e.tidy(), map[string]any{"dry_run": false, "deleted": 1})
		e.mustWork(c, true)
		e.cli("lease", "renew", c.lease)
	})
}

// A mount that is disabled while OpenAI refuses to delete, or refuses its admin key, leaves
// accounts; another mount lists and deletes them when they are past their end.
func TestTidyAfterDisabledMount(t *testing.T) {
	t.Parallel()
	for _, version := range harness.Versions {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			e := engineAt(ownServer(t, version), "openai")
			e.cli("write", e.mount+"/roles/app", "ttl=30s", "max_ttl=30s")
			id := e.mountID()
			e.creds()
			e.creds()
			left := e.accounts()
			e.sim.Inject(openaisim.Fault{Method: http.MethodDelete, Path: accountsPath, Status: http.StatusForbidden, Times: -1})
			attempts := 0
			e.until(2*tick, func() error {
				attempts++
				if result := e.CLI(t.Context(), "secrets", "disable", e.mount); result.Code != 0 {
					return fmt.Errorf("vault secrets disable: %s", harness.Mask(result.Stderr))
				}
				return nil
			})
			if got := e.accounts(); !maps.Equal(got, left) {
				t.Fatalf("accounts after the disabling: got %v, want %v", got, left)
			}
			t.Logf("disabled at attempt %d, %d accounts are left", attempts, len(left))
			e.sim.ClearFaults()

			other := e.another("another")
			if got := other.mountID(); got == id {
				t.Errorf("mount_id of another mount: got the same, %s", got)
			}
			held := other.creds()
			check := func(answer map[string]any, deleted int) {
				t.Helper()
				if answer["mount_id"] != id || answer["deleted"] != float64(deleted) || answer["failed"] != 0.0 || len(answer["leftover"].([]any)) > 0 {
					t.Errorf("tidy mount_id=%s: got %v, want %d deleted", id, answer, deleted)
				}
			}
			check(other.tidy("mount_id", id), 0) // nothing is past its end
			if got := len(e.accounts()); got != len(left)+1 {
				t.Errorf("accounts before their end: got %d, want %d", got, len(left)+1)
			}
			dead, ended := other.doomed("dead", 8, "ttl=30s", "max_ttl=30s")
			deadID, abandoned := dead.mountID(), map[string]bool{}
			for _, c := range ended {
				abandoned[c.accountID] = true
			}
			dead.disable(6)

			due := e.accounts()
			delete(due, held.accountID)
			other.awaitDue(e.lastEnd(due))
			if answer := other.tidy(); answer["found"] != 1.0 || answer["deleted"] != 0.0 {
				t.Errorf("tidy of its own: got %v, want 1 found and none deleted", answer)
			}
			check(other.tidy("mount_id", id), len(left))
			answer, listed := other.tidy("mount_id", deadID, "dry_run", true), map[string]bool{}
			for _, id := range answer["leftover"].([]any) {
				listed[id.(string)] = true
			}
			if !maps.Equal(listed, abandoned) || answer["deleted"] != 0.0 {
				t.Errorf("dry run with a dead mount's id: got %v, want %d left over and none deleted", answer, len(abandoned))
			}
			for _, c := range ended {
				other.mustWork(c, false) // its expiry is over
			}
			id = deadID
			check(other.tidy("mount_id", id), len(abandoned))
			if got, want := e.accounts(), map[string]bool{held.accountID: true}; !maps.Equal(got, want) {
				t.Errorf("accounts at the end: got %v, want %v", got, want)
			}
			other.mustWork(held, true)
		})
	}
}
