// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Package openaisim simulates the part of the OpenAI Admin API that deals with admin
// keys, projects, service accounts, their keys and workload identity federation, for
// tests and demonstrations. It keeps state as OpenAI does, accepts only live keys, and
// refuses what OpenAI's documents do not allow. It can also fail on demand: see Fault.
//
// A Server is used in process, through Transport, or over HTTP, as an http.Handler: the
// API is below /v1, the token endpoint of workload identity federation is /oauth/token,
// and below /_sim is a control API without authentication, for tests in another process.
// It must listen on a loopback address only.
//
// Where OpenAI's documents leave a question open, the simulator takes the stricter side:
//   - a parameter that an endpoint does not list, in the query or in the body, is a 400;
//   - names and ids are not empty; a scope is words joined by dots, as in api.all.read;
//   - a cursor is the id of an object of the kind listed that exists or has existed;
//   - limit is 1 to 100, also for admin keys;
//   - project keys are listed, unless asked otherwise, only when their owner has a role;
//   - a refused key or token, also one of the wrong kind, is 401 invalid_api_key.
//
// /v1/models wants of an access token with scopes that one of them is api.model.read,
// api.model.request or api.all.read, and is 403 insufficient_permissions without. Scopes
// of keys are stored but do not narrow what a key can do there. An admin key that a
// restricted one makes is not restricted; see SetAdminKeyAccess. The files federation.go,
// jwt.go and token.go say what the simulator does about workload identity federation.
//
// Every answer of the API carries a Date from the simulator's clock; see SetDate.
package openaisim

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"mime"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// What New sets up.
const (
	DefaultOrganization = "org-sim"
	DefaultProject      = "proj_sim"
)

// Server is a simulated OpenAI with one organization. Its methods may be used
// concurrently; each API call takes effect at one moment.
type Server struct {
	mu       sync.Mutex    // guards everything below; taken with lock
	offset   time.Duration // see Advance
	moment   time.Time     // the clock stands here while a late call is carried out; zero: it runs
	first    *key          // see AdminKey
	admins   []*key
	projects []*project
	accounts map[string]*account // every service account there ever was, by id
	values   map[string]*key     // every key and token there ever was, by value
	order    map[string]place    // every id there ever was

	providers  []*provider
	tokens     []*key        // access tokens, dead ones too
	jwksDelay  time.Duration // see SetJWKSDelay
	tokenScope string        // see SetTokenScope

	faults     []*Fault
	calls      []*Call
	latency    time.Duration
	keyDelay   time.Duration
	maxKeyLife int // seconds; 0: no policy
	lax        bool

	late       []lateCall // in the order in which they fall due
	dateless   bool       // answers carry no Date
	goneStatus int        // see SetGoneStatus; 0: the usual 404
	goneTyped  bool

	limit          *limiter // see SetRateLimit; nil: no limit
	endpointLimit  limiter  // a new one for each endpoint; capacity 0: no limit
	endpointLimits map[*route]*limiter
}

// AdminKey is an admin key as a test sees it.
type AdminKey struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires,omitzero"` // zero: never
}

// ServiceAccount is a project's service account as a test sees it.
type ServiceAccount struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	Role string `json:"role"` // owner, member or none
}

// ProjectKey is a project key as a test sees it.
type ProjectKey struct {
	ID               string    `json:"id"`
	Name             string    `json:"name"`
	ServiceAccountID string    `json:"service_account_id"` // empty: a user owns the key
	Scopes           []string  `json:"scopes"`             // empty: no restriction
	Created          time.Time `json:"created"`
	Expires          time.Time `json:"expires,omitzero"` // zero: never
}

// key is a project key, an access token, or an admin key when it has no account.
type key struct {
	ProjectKey
	value   string
	account *account
	token   bool
	access  string    // of an admin key, see SetAdminKeyAccess; empty: all
	used    time.Time // zero: never
	ready   time.Time // refused before
	deleted bool
}

type account struct {
	ServiceAccount
	created time.Time
	deleted bool // also with its project's archiving
	user    bool // not a service account but a user, who is in no list; see AddUserKey
}

type project struct {
	id, name  string
	created   time.Time
	archived  time.Time // zero: active
	external  any       // external_key_id: a string or nil
	residency string    // empty: not given
	accounts  []*account
	keys      []*key
}

// New returns a server with the organization DefaultOrganization, the active project
// DefaultProject and one admin key that does not expire.
func New() *Server {
	s := &Server{accounts: map[string]*account{}, values: map[string]*key{}, order: map[string]place{}}
	s.AddProject(DefaultProject, "Simulated project")
	s.AddAdminKey("Simulated admin key")
	s.first = s.admins[0]
	return s
}

// lock locks s.mu, and carries out the late calls that have fallen due.
func (s *Server) lock() {
	s.mu.Lock()
	s.carryOutLate()
}

// locked runs f with s.mu held.
func (s *Server) locked(f func()) {
	s.lock()
	defer s.mu.Unlock()
	f()
}

// now is the simulator's time.
func (s *Server) now() time.Time {
	if !s.moment.IsZero() {
		return s.moment
	}
	return time.Now().Add(s.offset)
}

// Advance moves the simulator's clock, which runs with time.Now, ahead by d.
func (s *Server) Advance(d time.Duration) { s.locked(func() { s.offset += d }) }

// AdminKey returns the admin key that New made, dead or alive.
func (s *Server) AdminKey() (value, id string) { return s.first.value, s.first.ID }

// AddAdminKey makes an admin key that does not expire. An empty name is null in the answers.
func (s *Server) AddAdminKey(name string) (value, id string) {
	s.lock()
	defer s.mu.Unlock()
	k := must(s.addKey(nil, nil, "", name, "", 0))
	return k.value, k.ID
}

// AddProject makes an active project. An empty name is null in the answers. It panics when the id is taken.
func (s *Server) AddProject(id, name string) {
	s.lock()
	defer s.mu.Unlock()
	must(s.addProject(id, name))
}

// ArchiveProject archives a project, whose service accounts and keys are gone with it.
// It panics when there is no such project.
func (s *Server) ArchiveProject(id string) {
	s.lock()
	defer s.mu.Unlock()
	s.archive(must(find(s.projects, "project", id)))
}

// AddServiceAccount makes a service account without a key in an active project. The
// role is owner, member or none. It panics when that is not possible.
func (s *Server) AddServiceAccount(project, name, role string) (id string) {
	s.lock()
	defer s.mu.Unlock()
	return must(s.addAccount(must(find(s.projects, "project", project)), "", name, role)).ID
}

// AddKey makes a key without expiry on a service account, as somebody else does. It panics
// when that is not possible.
func (s *Server) AddKey(project, account, name string) (id string) {
	s.lock()
	defer s.mu.Unlock()
	p := must(find(s.projects, "project", project))
	return must(s.addKey(p, must(find(p.accounts, "service account", account)), "", name, "", 0)).ID
}

// AddUserKey makes a key without expiry that a user owns, not a service account. It panics when
// there is no such project or it is archived.
func (s *Server) AddUserKey(project, name string) (id string) {
	s.lock()
	defer s.mu.Unlock()
	p := must(find(s.projects, "project", project))
	if !p.archived.IsZero() {
		panic("openaisim: project " + project + " is archived")
	}
	user := &account{ServiceAccount: ServiceAccount{"user-sim", "Simulated owner", "owner"}, created: p.created, user: true}
	return must(s.addKey(p, user, "", name, "", 0)).ID
}

// AdminKeys returns the live admin keys: not deleted, not expired.
func (s *Server) AdminKeys() []AdminKey {
	s.lock()
	defer s.mu.Unlock()
	return s.adminKeys()
}

func (s *Server) adminKeys() []AdminKey {
	list := []AdminKey{}
	for _, k := range s.admins {
		if !k.expired(s.now()) {
			list = append(list, AdminKey{k.ID, k.Name, k.Created, k.Expires})
		}
	}
	return list
}

// HasAdminKey tells whether there is a live admin key of this name.
func (s *Server) HasAdminKey(name string) bool {
	return slices.ContainsFunc(s.AdminKeys(), func(k AdminKey) bool { return k.Name == name })
}

// ServiceAccounts returns the service accounts of a project. It panics when there is no
// such project.
func (s *Server) ServiceAccounts(project string) []ServiceAccount {
	s.lock()
	defer s.mu.Unlock()
	return must(find(s.projects, "project", project)).serviceAccounts()
}

func (p *project) serviceAccounts() []ServiceAccount {
	list := []ServiceAccount{}
	for _, a := range p.accounts {
		list = append(list, a.ServiceAccount)
	}
	return list
}

// ProjectKeys returns the keys of a project, expired ones too. It panics when there is
// no such project.
func (s *Server) ProjectKeys(project string) []ProjectKey {
	s.lock()
	defer s.mu.Unlock()
	return must(find(s.projects, "project", project)).projectKeys()
}

func (p *project) projectKeys() []ProjectKey {
	list := []ProjectKey{}
	for _, k := range p.keys {
		list = append(list, k.ProjectKey)
	}
	return list
}

// Names returns the names of the service accounts and keys in the projects, by their ids. It
// panics when there is no such project.
func (s *Server) Names(projects ...string) map[string]string {
	names := map[string]string{}
	for _, p := range projects {
		for _, a := range s.ServiceAccounts(p) {
			names[a.ID] = a.Name
		}
		for _, k := range s.ProjectKeys(p) {
			names[k.ID] = k.Name
		}
	}
	return names
}

// keyStart is how a key begins, perhaps after an escaped line break. The kid of a signing key may have sk- inside.
var keyStart = regexp.MustCompile(`(^|[^\w-]|\\[nrt])sk-`)

// ShowsKey tells whether a text has anything like a key in it, apart from a masked one (sk-***), or a JWT as those of
// an identity provider and the simulator's tokens begin, or a private key in PEM.
func ShowsKey(text string) bool {
	return keyStart.MatchString(strings.ReplaceAll(text, "sk-***", "")) || strings.Contains(text, "eyJhbGci") ||
		strings.Contains(text, "PRIVATE KEY-----")
}

// Use tells whether /v1/models would accept this project key or access token now.
func (s *Server) Use(key string) bool {
	s.lock()
	defer s.mu.Unlock()
	_, err := s.authenticate(http.Header{"Authorization": {"Bearer " + key}}, false)
	return err == nil
}

// SetKeyDelay makes admin keys that are created from now on be refused with 401 for
// their first d, as when OpenAI's caches do not know them yet.
func (s *Server) SetKeyDelay(d time.Duration) { s.locked(func() { s.keyDelay = d }) }

// SetMaxKeyLife sets the organization's policy: keys of both kinds must expire within
// this many seconds of their creation, or of the update of their expiry. 0: no policy.
func (s *Server) SetMaxKeyLife(seconds int) { s.locked(func() { s.maxKeyLife = seconds }) }

// SetAdminKeyAccess restricts what an admin key may do: all and write restrict nothing
// that the API here offers, and read allows GET only, so that anything else is 403
// insufficient_permissions. It panics when there is no such key or access.
func (s *Server) SetAdminKeyAccess(id, access string) {
	s.lock()
	defer s.mu.Unlock()
	if err := s.setAdminKeyAccess(id, access); err != nil {
		panic("openaisim: " + err.Error())
	}
}

func (s *Server) setAdminKeyAccess(id, access string) error {
	k, err := find(s.admins, "admin key", id)
	if err != nil {
		return err
	}
	if !slices.Contains([]string{"all", "write", "read"}, access) {
		return fmt.Errorf("unknown access %q", access)
	}
	k.access = access
	return nil
}

// SetGoneStatus sets the status of the answer to a DELETE of a service account, a key, a
// provider or a rule that does not exist, or not any more. With typed, the answer is an
// error in OpenAI's form, but its code is null; otherwise it is JSON without an error
// object. A GET of the same is answered with the usual 404 all the same, and so is a
// DELETE in a project or of a provider that does not exist. 0: the usual 404 for all. It
// panics when status is not 0 or an error.
func (s *Server) SetGoneStatus(status int, typed bool) {
	s.lock()
	defer s.mu.Unlock()
	if err := s.setGoneStatus(status, typed); err != nil {
		panic("openaisim: " + err.Error())
	}
}

func (s *Server) setGoneStatus(status int, typed bool) error {
	if status != 0 && (status < 400 || status > 599) {
		return fmt.Errorf("%d is not the status of an error", status)
	}
	s.goneStatus, s.goneTyped = status, typed
	return nil
}

// SetLax makes the server accept values that OpenAI's documents rule out but that the
// generated tests of OpenAI's own libraries send: limit=0, a cursor and a scope that are
// made up, parameters that exclude each other, and attributes and discovery URLs that are
// none.
func (s *Server) SetLax(on bool) { s.locked(func() { s.lax = on }) }

// must is for mistakes of the test code itself.
func must[T any](v T, err error) T {
	if err != nil {
		panic("openaisim: " + err.Error())
	}
	return v
}

// object is what a list holds: admin keys, projects, accounts, project keys, providers, rules.
type object interface {
	ident() string
	view() map[string]any // as OpenAI shows it
}

func (k *key) ident() string     { return k.ID }
func (a *account) ident() string { return a.ID }
func (p *project) ident() string { return p.id }

// find returns the object with this id, or a 404.
func find[T object](list []T, kind, id string) (found T, err error) {
	for _, o := range list {
		if o.ident() == id {
			return o, nil
		}
	}
	return found, &apiError{status: 404, code: "not_found", message: fmt.Sprintf("No such %s: '%s'.", kind, id)}
}

// place is where an object stands among all that there ever were, in the order of their creation.
type place struct {
	kind string // how ids of its kind begin, when they are made up
	n    int
}

// newID registers id, or a new one with this prefix when it is empty.
func (s *Server) newID(prefix, id string) (string, error) {
	if id == "" {
		id = prefix + random(24)
	}
	if _, taken := s.order[id]; taken {
		return "", fmt.Errorf("id %q is taken", id)
	}
	s.order[id] = place{prefix, len(s.order)}
	return id, nil
}

func random(n int) string {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	b := make([]byte, n)
	for i := range b {
		b[i] = letters[rand.IntN(len(letters))]
	}
	return string(b)
}

func (s *Server) addProject(id, name string) (*project, error) {
	id, err := s.newID("proj_", id)
	if err != nil {
		return nil, err
	}
	p := &project{id: id, name: name, created: s.now()}
	s.projects = append(s.projects, p)
	return p, nil
}

func (s *Server) addAccount(p *project, id, name, role string) (*account, error) {
	if !p.archived.IsZero() || !slices.Contains([]string{"owner", "member", "none"}, role) {
		return nil, fmt.Errorf("project %q is archived, or %q is no role", p.id, role)
	}
	id, err := s.newID("svc_acct_", id)
	if err != nil {
		return nil, err
	}
	a := &account{ServiceAccount: ServiceAccount{id, name, role}, created: s.now()}
	p.accounts = append(p.accounts, a)
	s.accounts[id] = a
	return a, nil
}

// addKey makes a key of account a in project p, or an admin key when they are nil, which
// expires after life; 0: never. An empty id or value is made up. A made up admin key
// differs from the others in what its redacted form shows.
func (s *Server) addKey(p *project, a *account, id, name, value string, life time.Duration) (*key, error) {
	if s.values[value] != nil {
		return nil, errors.New("the key's value is taken")
	}
	id, err := s.newID("key_", id)
	if err != nil {
		return nil, err
	}
	k := &key{ProjectKey: ProjectKey{ID: id, Name: name, Created: s.now()}, value: value, account: a}
	if life > 0 {
		k.Expires = k.Created.Add(life)
	}
	keys, prefix := &s.admins, k.head()+"-simulated-"
	if a != nil {
		keys = &p.keys
	} else {
		k.ready = k.Created.Add(s.keyDelay)
	}
	if a != nil && !a.user {
		k.ServiceAccountID = a.ID
	}
	alike := func(other *key) bool { return other.redacted() == k.redacted() }
	for k.value == "" || value == "" && a == nil && slices.ContainsFunc(s.admins, alike) {
		k.value = prefix + random(164-len(prefix)) // as long as OpenAI's
	}
	s.values[k.value] = k
	*keys = append(*keys, k)
	return k, nil
}

func (s *Server) archive(p *project) {
	p.archived = s.now()
	p.deleteKeys(func(*key) bool { return true })
	for _, a := range p.accounts {
		a.deleted = true
	}
	p.accounts = nil
}

// deleteKeys deletes the keys of p that match.
func (p *project) deleteKeys(match func(*key) bool) {
	p.keys = slices.DeleteFunc(p.keys, func(k *key) bool {
		k.deleted = match(k)
		return k.deleted
	})
}

func (k *key) expired(now time.Time) bool { return !k.Expires.IsZero() && !now.Before(k.Expires) }

// dead tells whether a key or a token is deleted, with or without its account, or expired.
func (k *key) dead(now time.Time) bool {
	return k.deleted || k.account != nil && k.account.deleted || k.expired(now)
}

// head is how the values of keys like this one begin.
func (k *key) head() string {
	switch {
	case k.account == nil:
		return "sk-admin"
	case k.account.user:
		return "sk-proj"
	}
	return "sk-svcacct"
}

// redacted is the key in the form that OpenAI's documents show: sk-admin...def.
func (k *key) redacted() string { return k.head() + "..." + k.value[max(0, len(k.value)-3):] }

// apiError is an error in OpenAI's form.
type apiError struct {
	status  int
	typ     string // empty: invalid_request_error
	param   string // empty: null
	code    string // empty: null
	message string
	bare    bool        // answered without an error object
	oauth   string      // the error in OAuth's form; empty: in OpenAI's
	header  http.Header // sent with the answer
}

func (e *apiError) Error() string { return e.message }

func (e *apiError) view() map[string]any {
	switch {
	case e.bare:
		return map[string]any{"detail": e.message}
	case e.oauth != "":
		return map[string]any{"error": e.oauth, "error_description": e.message}
	}
	return map[string]any{"error": map[string]any{
		"message": e.message, "type": cmp.Or(e.typ, "invalid_request_error"), "param": orNull(e.param), "code": orNull(e.code),
	}}
}

// orNull is v, or nil when v is the zero value.
func orNull[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}

func badRequest(param, code, format string, args ...any) error {
	return &apiError{status: 400, param: param, code: code, message: fmt.Sprintf(format, args...)}
}

// authenticate returns the key of a call: an admin key, or a project key or access token
// that may list models.
func (s *Server) authenticate(h http.Header, admin bool) (*key, error) {
	scheme, value, _ := strings.Cut(h.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") || value == "" {
		return nil, &apiError{status: 401, message: "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."}
	}
	k, now := s.values[value], s.now()
	if k == nil || k.dead(now) || now.Before(k.ready) || (k.account == nil) != admin {
		return nil, &apiError{status: 401, code: "invalid_api_key",
			message: "Incorrect API key provided: sk-***. You can find your API key at https://platform.openai.com/account/api-keys."}
	}
	if org := h.Get("OpenAI-Organization"); org != "" && org != DefaultOrganization {
		return nil, &apiError{status: 401, code: "mismatched_organization", message: "OpenAI-Organization header should match organization for API key."}
	}
	if !admin && k.account.access() != "active" {
		return nil, &apiError{status: 403, code: "insufficient_permissions", message: "You have insufficient permissions for this operation."}
	}
	if k.token {
		return k, k.permitModels()
	}
	return k, nil
}

// permit returns the error for what the access of an admin key does not allow.
func (k *key) permit(method string) error {
	if k.access != "read" || method == http.MethodGet {
		return nil
	}
	return &apiError{status: 403, code: "insufficient_permissions",
		message: "You have insufficient permissions for this operation. Missing scopes: api.management.write."}
}

// request is an API call that was found valid.
type request struct {
	now         time.Time
	query, body map[string]any
	project     *project // {project} of the path; likewise the next two
	account     *account
	key         *key      // an admin key, or a key of the project
	provider    *provider // {provider}
	rule        *rule     // {rule} of that provider
	object      object    // the last of these
}

// route is an endpoint. In its path are {project}, {account}, {key}, {provider} and
// {rule}. Query and body list what it takes as name:kind, where kind is string, scopes (a
// list), bool, a range as 1..100, choices as asc|desc or one of those that parseKind knows.
// Behind it stands ! when the parameter is required, ? when it may be null, which is the
// same as nothing, and ~ when it may be null, which is a value.
type route struct {
	method, path string
	query, body  string
	handle       func(*Server, *request) (any, error)
}

// root is the path, as match compares it.
func (rt *route) root() string {
	if rt.path == tokenPath {
		return rt.path
	}
	return "/v1/" + rt.path
}

const (
	paging    = "after:string limit:1..100"
	lifetime  = "expires_in_seconds:1..31536000"
	external  = " external_key_id:string? geography:string? "
	residency = "residency:GLOBAL|US_STORAGE_PROCESSING|EU_STORAGE_PROCESSING|JP_STORAGE|JP_STORAGE_PROCESSING|" +
		"KR_STORAGE|CA_STORAGE|SG_STORAGE|IN_STORAGE|IN_STORAGE_PROCESSING|AU_STORAGE|AU_STORAGE_PROCESSING|" +
		"GB_STORAGE|AE_STORAGE|AE_STORAGE_PROCESSING?"
	adminKeys = "organization/admin_api_keys"
	projects  = "organization/projects"
	accounts  = projects + "/{project}/service_accounts"
	keys      = projects + "/{project}/api_keys"
)

// routes is the API: https://platform.openai.com/docs/api-reference/administration, and
// the list of models to try a project key with.
var routes = append([]route{
	{"GET", "models", "", "", (*Server).listModels},

	{"GET", adminKeys, paging + " order:asc|desc", "", (*Server).listAdminKeys},
	{"POST", adminKeys, "", "name:string! " + lifetime, (*Server).createAdminKey},
	{"GET", adminKeys + "/{key}", "", "", (*Server).show},
	{"DELETE", adminKeys + "/{key}", "", "", (*Server).deleteAdminKey},

	{"GET", projects, paging + " include_archived:bool", "", (*Server).listProjects},
	{"POST", projects, "", "name:string!" + external + residency, (*Server).createProject},
	{"GET", projects + "/{project}", "", "", (*Server).show},
	{"POST", projects + "/{project}", "", "name:string?" + external, (*Server).updateProject},
	{"POST", projects + "/{project}/archive", "", "", (*Server).archiveProject},

	{"GET", accounts, paging, "", (*Server).listAccounts},
	{"POST", accounts, "", "name:string! create_service_account_only:bool? " + lifetime + "?", (*Server).createAccount},
	{"GET", accounts + "/{account}", "", "", (*Server).show},
	{"POST", accounts + "/{account}", "", "name:string role:member|owner", (*Server).updateAccount},
	{"DELETE", accounts + "/{account}", "", "", (*Server).deleteAccount},
	{"POST", accounts + "/{account}/api_keys", "", "name:string scopes:scopes " + lifetime, (*Server).createKey},

	{"GET", keys, paging + " owner_project_access:active|inactive|any", "", (*Server).listKeys},
	{"GET", keys + "/{key}", "", "", (*Server).show},
	{"POST", keys + "/{key}", "", "scopes:scopes " + lifetime, (*Server).updateKey},
	{"DELETE", keys + "/{key}", "", "", (*Server).deleteKey},
}, federationRoutes...)

// match returns what stands for {project} and the others in path, which is escaped.
func (rt *route) match(method, path string) (map[string]string, bool) {
	want, got := strings.Split(rt.root(), "/"), strings.Split(path, "/")
	if method != rt.method || len(want) != len(got) {
		return nil, false
	}
	ids := map[string]string{}
	for i, segment := range got {
		if !strings.HasPrefix(want[i], "{") {
			if segment != want[i] {
				return nil, false
			}
			continue
		}
		id, err := url.PathUnescape(segment)
		if err != nil || id == "" {
			return nil, false
		}
		ids[want[i]] = id
	}
	return ids, true
}

// admit finds the endpoint of a call and what stands for {project} and the others in its
// path. Its error is that of a call that is turned away, whatever it asks for.
func (s *Server) admit(in *incoming) (*route, map[string]string, error) {
	for i := range routes {
		rt := &routes[i]
		ids, ok := rt.match(in.method, in.path)
		if !ok {
			continue
		}
		if rt.path == tokenPath {
			return rt, ids, s.admitExchange(in, rt)
		}
		caller, err := s.authenticate(in.header, rt.path != "models")
		if err != nil {
			return nil, nil, err
		}
		if err := s.takeTokens(rt); err != nil {
			return nil, nil, err
		}
		caller.used = s.now()
		return rt, ids, caller.permit(in.method)
	}
	return nil, nil, &apiError{status: 404, message: fmt.Sprintf("Invalid URL (%s %s)", in.method, in.path)}
}

// process carries out a call that was admitted and returns the object to answer with.
func (s *Server) process(in *incoming, rt *route, ids map[string]string) (_ any, err error) {
	r := &request{now: s.now()}
	if r.query, err = s.parseQuery(in.query, rt.query); err != nil {
		return nil, err
	}
	if r.body, err = s.parseBody(in, rt.body); err != nil {
		return nil, err
	}
	if err := s.resolve(r, rt, ids); err != nil {
		return nil, err
	}
	return rt.handle(s, r)
}

// resolve finds what the path names. An archived project can be read, but it has no
// service accounts and can't be changed.
func (s *Server) resolve(r *request, rt *route, ids map[string]string) (err error) {
	among := s.admins
	if id, ok := ids["{project}"]; ok {
		if r.project, err = find(s.projects, "project", id); err != nil {
			return err
		}
		if !r.project.archived.IsZero() && (rt.method != "GET" || strings.HasPrefix(rt.path, accounts)) {
			return badRequest("", "project_archived", "Project '%s' is archived.", id)
		}
		r.object, among = r.project, r.project.keys
	}
	if id, ok := ids["{account}"]; ok {
		if r.account, err = find(r.project.accounts, "service account", id); err != nil {
			return s.gone(rt, err)
		}
		r.object = r.account
	}
	if id, ok := ids["{key}"]; ok {
		if r.key, err = find(among, "API key", id); err != nil {
			return s.gone(rt, err)
		}
		r.object = r.key
	}
	return s.resolveFederation(r, rt, ids)
}

// gone is the error for an object that err does not find; see SetGoneStatus.
func (s *Server) gone(rt *route, err error) error {
	if s.goneStatus == 0 || rt.method != http.MethodDelete {
		return err
	}
	return &apiError{status: s.goneStatus, message: err.Error(), bare: !s.goneTyped}
}

func (s *Server) parseQuery(raw, spec string) (map[string]any, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, badRequest("", "invalid_query", "The query is malformed.")
	}
	given := map[string]json.RawMessage{}
	for name, v := range values {
		given[name] = json.RawMessage(v[0])
		if kind := kindOf(spec, name); len(v) > 1 {
			return nil, badRequest(name, "invalid_value", "Duplicate parameter: '%s'.", name)
		} else if kind != "bool" && !strings.Contains(kind, "..") {
			given[name], _ = json.Marshal(v[0])
		}
	}
	return s.parse(given, spec)
}

func (s *Server) parseBody(in *incoming, spec string) (map[string]any, error) {
	given := map[string]json.RawMessage{}
	if len(in.body) > 0 {
		if mediaType, _, err := mime.ParseMediaType(in.header.Get("Content-Type")); err != nil || mediaType != "application/json" {
			return nil, badRequest("", "unsupported_content_type", "Unsupported Content-Type. Use 'application/json'.")
		}
		if err := json.Unmarshal(in.body, &given); err != nil || given == nil {
			return nil, badRequest("", "invalid_json", "We could not parse the body of your request, which must be a JSON object.")
		}
	}
	return s.parse(given, spec)
}

// kindOf returns the kind of a parameter, with its mark; empty when there is none.
func kindOf(spec, name string) string {
	for field := range strings.FieldsSeq(spec) {
		if kind, ok := strings.CutPrefix(field, name+":"); ok {
			return kind
		}
	}
	return ""
}

// parse checks parameters against spec, whose form route describes. The values are of
// the types string, []string, bool, int and those of parseKind; null is the same as
// nothing, or it is nil.
func (s *Server) parse(given map[string]json.RawMessage, spec string) (map[string]any, error) {
	for field := range strings.FieldsSeq(spec) {
		name, _, _ := strings.Cut(field, ":")
		if _, ok := given[name]; !ok && strings.HasSuffix(field, "!") {
			return nil, badRequest(name, "missing_required_parameter", "Missing required parameter: '%s'.", name)
		}
	}
	values := map[string]any{}
	for name, raw := range given {
		kind := kindOf(spec, name)
		if kind == "" {
			return nil, badRequest(name, "unknown_parameter", "Unknown parameter: '%s'.", name)
		}
		if string(raw) == "null" && strings.HasSuffix(kind, "?") {
			continue
		}
		if string(raw) == "null" && strings.HasSuffix(strings.TrimSuffix(kind, "!"), "~") {
			values[name] = nil
			continue
		}
		v, err := s.parseKind(name, strings.TrimRight(kind, "!?~"), raw)
		if err != nil {
			return nil, err
		}
		values[name] = v
	}
	return values, nil
}

var scopePattern = regexp.MustCompile(`^[a-z0-9_]+(\.[a-z0-9_]+)+$`)

func (s *Server) parseValue(name, kind string, raw json.RawMessage) (any, error) {
	wrongType := func(want string) error {
		return badRequest(name, "invalid_type", "Invalid type for '%s': expected %s.", name, want)
	}
	if lowest, highest, ok := strings.Cut(kind, ".."); ok {
		n, err := strconv.Atoi(string(raw))
		if err != nil {
			return nil, wrongType("an integer")
		}
		if low, _ := strconv.Atoi(lowest); n < low && !(s.lax && name == "limit") {
			return nil, badRequest(name, "integer_below_min_value", "Invalid '%s': integer below minimum value. Expected a value >= %d, but got %d instead.", name, low, n)
		}
		if high, _ := strconv.Atoi(highest); n > high {
			return nil, badRequest(name, "integer_above_max_value", "Invalid '%s': integer above maximum value. Expected a value <= %d, but got %d instead.", name, high, n)
		}
		return n, nil
	}
	var truth *bool
	var list []*string
	var text *string
	switch kind {
	case "bool":
		if json.Unmarshal(raw, &truth) != nil || truth == nil {
			return nil, wrongType("a boolean")
		}
		return *truth, nil
	case "scopes":
		if json.Unmarshal(raw, &list) != nil || list == nil || slices.Contains(list, nil) {
			return nil, wrongType("an array of strings")
		}
		scopes := []string{}
		for _, scope := range list {
			if !scopePattern.MatchString(*scope) && !s.lax {
				return nil, badRequest(name, "invalid_value", "Invalid scope: '%s'.", *scope)
			}
			scopes = append(scopes, *scope)
		}
		return scopes, nil
	}
	if json.Unmarshal(raw, &text) != nil || text == nil {
		return nil, wrongType("a string")
	}
	if *text == "" {
		return nil, badRequest(name, "empty_string", "Invalid '%s': empty string. Expected a string with minimum length 1.", name)
	}
	if choices := strings.Split(kind, "|"); kind != "string" && !slices.Contains(choices, *text) {
		return nil, badRequest(name, "invalid_value", "Invalid value: '%s'. Supported values are: '%s'.", *text, strings.Join(choices, "', '"))
	}
	return *text, nil
}

func unixOrNull(t time.Time) any { return orNull(max(0, t.Unix())) }

func (k *key) view() map[string]any {
	v := map[string]any{
		"object": "organization.admin_api_key", "id": k.ID, "name": orNull(k.Name), "redacted_value": k.redacted(),
		"created_at": k.Created.Unix(), "expires_at": unixOrNull(k.Expires), "last_used_at": unixOrNull(k.used),
		"owner": map[string]any{
			"type": "user", "object": "organization.user", "id": "user-sim", "name": "Simulated owner",
			"created_at": k.Created.Unix(), "role": "owner",
		},
	}
	if k.account != nil {
		owner, kind := k.account.view(), "service_account"
		delete(owner, "object")
		if k.account.user {
			owner["email"], kind = "owner@openaisim.invalid", "user"
		}
		v["object"] = "organization.project.api_key"
		v["owner"] = map[string]any{"type": kind, kind: owner}
		v["owner_project_access"] = k.account.access()
	}
	return v
}

// secret is the only answer that shows the value of a service account's key.
func (k *key) secret() map[string]any {
	return map[string]any{
		"object": "organization.project.service_account.api_key", "id": k.ID, "name": k.Name, "value": k.value,
		"created_at": k.Created.Unix(), "expires_at": unixOrNull(k.Expires),
	}
}

func (a *account) view() map[string]any {
	return map[string]any{
		"object": "organization.project.service_account", "id": a.ID, "name": a.Name, "role": a.Role,
		"created_at": a.created.Unix(),
	}
}

// access is owner_project_access: whether keys of the account can do anything.
func (a *account) access() string {
	if a.Role == "none" {
		return "inactive"
	}
	return "active"
}

func (p *project) view() map[string]any {
	v := map[string]any{
		"object": "organization.project", "id": p.id, "name": orNull(p.name), "status": "active",
		"created_at": p.created.Unix(), "archived_at": unixOrNull(p.archived), "external_key_id": p.external,
	}
	if !p.archived.IsZero() {
		v["status"] = "archived"
	}
	if p.residency != "" {
		v["residency"] = p.residency
	}
	return v
}

// page answers with the part of a list, which is in order of creation, that r asks for. The
// kind is that of the objects listed; see place.
func page[T object](s *Server, r *request, kind string, list []T) (any, error) {
	if r.query["order"] == "desc" {
		list = slices.Clone(list)
		slices.Reverse(list)
	}
	if after, ok := r.query["after"].(string); ok {
		cursor, ok := s.order[after]
		if ok = ok && cursor.kind == kind; !ok && !s.lax {
			return nil, badRequest("after", "invalid_value", "Invalid 'after': no object with id '%s'.", after)
		}
		for ok && len(list) > 0 && s.order[list[0].ident()] != cursor &&
			(s.order[list[0].ident()].n < cursor.n) == (r.query["order"] != "desc") {
			list = list[1:]
		}
		if len(list) > 0 && list[0].ident() == after {
			list = list[1:]
		}
	}
	limit, _ := r.query["limit"].(int)
	n := min(cmp.Or(max(limit, 0), 20), len(list))
	data := []any{}
	for _, o := range list[:n] {
		data = append(data, o.view())
	}
	answer := map[string]any{"object": "list", "data": data, "first_id": nil, "last_id": nil, "has_more": n < len(list)}
	if n > 0 {
		answer["first_id"], answer["last_id"] = list[0].ident(), list[n-1].ident()
	}
	return answer, nil
}

// life returns how long a key that r makes or updates lives; 0: for ever. Its error is
// the organization's policy.
func (s *Server) life(r *request) (time.Duration, error) {
	seconds, _ := r.body["expires_in_seconds"].(int)
	if s.maxKeyLife > 0 && (seconds == 0 || seconds > s.maxKeyLife) {
		return 0, badRequest("expires_in_seconds", "api_key_expiration_policy",
			"Your organization requires API keys to expire. 'expires_in_seconds' must be between 1 and %d.", s.maxKeyLife)
	}
	return time.Duration(seconds) * time.Second, nil
}

// show answers with what the path names.
func (s *Server) show(r *request) (any, error) { return r.object.view(), nil }

// deleted is the answer to a deletion.
func deleted(o object) (any, error) {
	return map[string]any{"object": o.view()["object"].(string) + ".deleted", "id": o.ident(), "deleted": true}, nil
}

func (s *Server) listModels(*request) (any, error) {
	model := map[string]any{"id": "gpt-sim", "object": "model", "created": 1700000000, "owned_by": "openaisim"}
	return map[string]any{"object": "list", "data": []any{model}}, nil
}

func (s *Server) listAdminKeys(r *request) (any, error) { return page(s, r, "key_", s.admins) }

func (s *Server) createAdminKey(r *request) (any, error) {
	life, err := s.life(r)
	if err != nil {
		return nil, err
	}
	k := must(s.addKey(nil, nil, "", r.body["name"].(string), "", life))
	v := k.view()
	v["value"] = k.value
	return v, nil
}

func (s *Server) deleteAdminKey(r *request) (any, error) {
	r.key.deleted = true
	s.admins = slices.DeleteFunc(s.admins, func(k *key) bool { return k.deleted })
	return deleted(r.key)
}

func (s *Server) listProjects(r *request) (any, error) {
	var list []*project
	for _, p := range s.projects {
		if p.archived.IsZero() || r.query["include_archived"] == true {
			list = append(list, p)
		}
	}
	return page(s, r, "proj_", list)
}

func (s *Server) createProject(r *request) (any, error) {
	if r.body["geography"] != nil && r.body["residency"] != nil && !s.lax {
		return nil, badRequest("geography", "invalid_value", "Do not provide both 'geography' and 'residency'.")
	}
	p := must(s.addProject("", r.body["name"].(string)))
	p.external = r.body["external_key_id"]
	p.residency, _ = r.body["residency"].(string)
	return p.view(), nil
}

func (s *Server) updateProject(r *request) (any, error) {
	if name, ok := r.body["name"].(string); ok {
		r.project.name = name
	}
	if id, ok := r.body["external_key_id"]; ok {
		r.project.external = id
	}
	return r.project.view(), nil
}

func (s *Server) archiveProject(r *request) (any, error) {
	s.archive(r.project)
	return r.project.view(), nil
}

func (s *Server) listAccounts(r *request) (any, error) {
	return page(s, r, "svc_acct_", r.project.accounts)
}

func (s *Server) createAccount(r *request) (any, error) {
	name := r.body["name"].(string)
	if r.body["create_service_account_only"] == true {
		if r.body["expires_in_seconds"] != nil && !s.lax {
			return nil, badRequest("expires_in_seconds", "invalid_value", "'expires_in_seconds' cannot be used when 'create_service_account_only' is true.")
		}
		v := must(s.addAccount(r.project, "", name, "none")).view()
		v["api_key"] = nil
		return v, nil
	}
	life, err := s.life(r)
	if err != nil {
		return nil, err
	}
	a := must(s.addAccount(r.project, "", name, "member"))
	v := a.view()
	v["api_key"] = must(s.addKey(r.project, a, "", "Secret Key", "", life)).secret()
	return v, nil
}

func (s *Server) updateAccount(r *request) (any, error) {
	if name, ok := r.body["name"].(string); ok {
		r.account.Name = name
	}
	if role, ok := r.body["role"].(string); ok {
		r.account.Role = role
	}
	return r.account.view(), nil
}

func (s *Server) deleteAccount(r *request) (any, error) {
	r.project.deleteKeys(func(k *key) bool { return k.account == r.account })
	r.account.deleted = true
	r.project.accounts = slices.DeleteFunc(r.project.accounts, func(a *account) bool { return a == r.account })
	return deleted(r.account)
}

func (s *Server) createKey(r *request) (any, error) {
	life, err := s.life(r)
	if err != nil {
		return nil, err
	}
	name, _ := r.body["name"].(string)
	k := must(s.addKey(r.project, r.account, "", cmp.Or(name, "Secret Key"), "", life))
	k.Scopes, _ = r.body["scopes"].([]string)
	return k.secret(), nil
}

func (s *Server) listKeys(r *request) (any, error) {
	// Without the parameter OpenAI "may exclude some enabled keys".
	access, _ := r.query["owner_project_access"].(string)
	access = cmp.Or(access, "active")
	var list []*key
	for _, k := range r.project.keys {
		if access == "any" || access == k.account.access() {
			list = append(list, k)
		}
	}
	return page(s, r, "key_", list)
}

func (s *Server) updateKey(r *request) (any, error) {
	scopes, newScopes := r.body["scopes"].([]string)
	_, newExpiry := r.body["expires_in_seconds"]
	switch {
	case !newScopes && !newExpiry:
		return nil, badRequest("", "missing_required_parameter", "Provide at least one of 'scopes' and 'expires_in_seconds'.")
	case r.key.expired(r.now):
		return nil, badRequest("", "api_key_expired", "Expired API keys cannot be updated.")
	}
	if newExpiry {
		life, err := s.life(r)
		if err != nil {
			return nil, err
		}
		r.key.Expires = r.now.Add(life)
	}
	if newScopes {
		r.key.Scopes = scopes
	}
	return r.key.view(), nil
}

func (s *Server) deleteKey(r *request) (any, error) {
	r.project.deleteKeys(func(k *key) bool { return k == r.key })
	return deleted(r.key)
}
