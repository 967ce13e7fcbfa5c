// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Package openaisim simulates the part of the OpenAI Admin API that deals with admin
// keys, projects, service accounts and their keys, for tests and demonstrations. It
// keeps state as OpenAI does, accepts only live keys, and refuses what OpenAI's
// documents do not allow. It can also fail on demand: see Fault.
//
// A Server is used in process, through Transport, or over HTTP, as an http.Handler: the
// API is below /v1, and below /_sim is a control API without authentication, for tests
// in another process. It must listen on a loopback address only.
//
// Where OpenAI's documents leave a question open, the simulator takes the stricter side:
//   - a parameter that an endpoint does not list, in the query or in the body, is a 400;
//   - names and ids are not empty; a scope is words joined by dots, as in api.all.read;
//   - a cursor is the id of an object of that kind of list, which may be deleted by now;
//   - limit is 1 to 100, also for admin keys;
//   - project keys are listed, unless asked otherwise, only when their owner has a role;
//   - a refused key, also one of the wrong kind, is 401 invalid_api_key.
//
// Scopes are stored but do not narrow what a key can do at /v1/models.
package openaisim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
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
	mu       sync.Mutex // guards everything below
	offset   time.Duration
	admins   []*key
	projects []*project
	values   map[string]*key // every key there ever was, by value
	order    map[string]int  // every id there ever was, and the order of creation

	faults     []*Fault
	calls      []*Call
	latency    time.Duration
	keyDelay   time.Duration
	maxKeyLife int  // seconds; 0: no policy
	lax        bool // see SetLax

	rate   float64 // tokens per second; 0: no limit
	burst  float64
	tokens float64
	filled time.Time // when tokens was right
}

// key is an admin key, or a project key when it has an account.
type key struct {
	id, name, value string
	created         time.Time
	expires         time.Time // zero: never
	used            time.Time // zero: never
	ready           time.Time // refused before
	deleted         bool
	account         *account
	scopes          []string
}

type account struct {
	id, name, role string
	created        time.Time
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
	s := &Server{values: map[string]*key{}, order: map[string]int{}}
	s.AddProject(DefaultProject, "Simulated project")
	s.AddAdminKey("Simulated admin key")
	return s
}

// AdminKey is an admin key as the test sees it.
type AdminKey struct {
	ID      string    `json:"id"`
	Name    string    `json:"name"`
	Created time.Time `json:"created"`
	Expires time.Time `json:"expires,omitzero"` // zero: never
}

// ServiceAccount is a project's service account as the test sees it.
type ServiceAccount struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	Role string `json:"role"` // owner, member or none
}

// ProjectKey is a project key as the test sees it.
type ProjectKey struct {
	ID               string    `json:"id"`
	Name             string    `json:"name"`
	ServiceAccountID string    `json:"service_account_id"`
	Scopes           []string  `json:"scopes"` // empty: no restriction
	Created          time.Time `json:"created"`
	Expires          time.Time `json:"expires,omitzero"` // zero: never
}

// now is the simulator's time.
func (s *Server) now() time.Time { return time.Now().Add(s.offset) }

// Advance moves the simulator's clock, which runs with time.Now, ahead by d.
func (s *Server) Advance(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offset += d
}

// AdminKey returns the first admin key that was made.
func (s *Server) AdminKey() (value, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.values {
		if k.account == nil && (id == "" || s.order[k.id] < s.order[id]) {
			value, id = k.value, k.id
		}
	}
	return value, id
}

// AddAdminKey makes an admin key that does not expire.
func (s *Server) AddAdminKey(name string) (value, id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := must(s.addKey("", nil, nil, "", name))
	return k.value, k.id
}

// AddProject makes an active project. It panics when the id is taken.
func (s *Server) AddProject(id, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	must(s.addProject(id, name))
}

// ArchiveProject archives a project, whose service accounts and keys are gone with it.
// It panics when there is no such project.
func (s *Server) ArchiveProject(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.archive(must(s.findProject(id)))
}

// AddServiceAccount makes a service account without a key in an active project. The
// role is owner, member or none. It panics when that is not possible.
func (s *Server) AddServiceAccount(project, name, role string) (id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return must(s.addAccount(must(s.findProject(project)), "", name, role)).id
}

// AdminKeys returns the live admin keys: not deleted, not expired.
func (s *Server) AdminKeys() []AdminKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.adminKeys()
}

func (s *Server) adminKeys() (keys []AdminKey) {
	for _, k := range s.admins {
		if !k.expired(s.now()) {
			keys = append(keys, AdminKey{k.id, k.name, k.created, k.expires})
		}
	}
	return keys
}

// ServiceAccounts returns the service accounts of a project. It panics when there is no
// such project.
func (s *Server) ServiceAccounts(project string) []ServiceAccount {
	s.mu.Lock()
	defer s.mu.Unlock()
	return must(s.findProject(project)).serviceAccounts()
}

func (p *project) serviceAccounts() (accounts []ServiceAccount) {
	for _, a := range p.accounts {
		accounts = append(accounts, ServiceAccount{a.id, a.name, a.role})
	}
	return accounts
}

// ProjectKeys returns the keys of a project, expired ones too. It panics when there is
// no such project.
func (s *Server) ProjectKeys(project string) []ProjectKey {
	s.mu.Lock()
	defer s.mu.Unlock()
	return must(s.findProject(project)).projectKeys()
}

func (p *project) projectKeys() (keys []ProjectKey) {
	for _, k := range p.keys {
		keys = append(keys, ProjectKey{k.id, k.name, k.account.id, slices.Clone(k.scopes), k.created, k.expires})
	}
	return keys
}

// Use tells whether /v1/models would accept this project key now.
func (s *Server) Use(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, err := s.authenticate(http.Header{"Authorization": {"Bearer " + key}}, false)
	return err == nil
}

// SetKeyDelay makes admin keys that are created from now on be refused with 401 for
// their first d, as when OpenAI's caches do not know them yet.
func (s *Server) SetKeyDelay(d time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keyDelay = d
}

// SetMaxKeyLife sets the organization's policy: keys of both kinds must expire within
// this many seconds of their creation, or of the update of their expiry. 0: no policy.
func (s *Server) SetMaxKeyLife(seconds int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.maxKeyLife = seconds
}

// SetLax makes the server accept values that OpenAI's documents rule out but that the
// generated tests of OpenAI's own libraries send: limit=0, a cursor and a scope that are
// made up, and parameters that exclude each other.
func (s *Server) SetLax(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lax = on
}

// must is for test code's own mistakes.
func must[T any](v T, err error) T {
	if err != nil {
		panic("openaisim: " + err.Error())
	}
	return v
}

// newID registers id, or a new one with this prefix when it is empty.
func (s *Server) newID(prefix, id string) (string, error) {
	if id == "" {
		id = prefix + random(24)
	}
	if _, taken := s.order[id]; taken {
		return "", fmt.Errorf("id %q is taken", id)
	}
	s.order[id] = len(s.order)
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
	if !p.archived.IsZero() {
		return nil, fmt.Errorf("project %q is archived", p.id)
	}
	if role != "owner" && role != "member" && role != "none" {
		return nil, fmt.Errorf("role %q is not owner, member or none", role)
	}
	id, err := s.newID("svc_acct_", id)
	if err != nil {
		return nil, err
	}
	a := &account{id: id, name: name, role: role, created: s.now()}
	p.accounts = append(p.accounts, a)
	return a, nil
}

// addKey makes a key of account a in project p, or an admin key when they are nil. An
// empty id or value is made up. The value of a made up admin key differs from those of
// the others in its last three characters, which is what its redacted form shows.
func (s *Server) addKey(id string, p *project, a *account, value, name string) (*key, error) {
	id, err := s.newID("key_", id)
	if err != nil {
		return nil, err
	}
	k := &key{id: id, name: name, value: value, created: s.now(), account: a}
	prefix := "sk-svcacct-simulated-"
	if a == nil {
		prefix = "sk-admin-simulated-"
		k.ready = k.created.Add(s.keyDelay)
	}
	for k.value == "" || s.values[k.value] != nil {
		if value != "" {
			return nil, fmt.Errorf("the value of key %q is taken", id)
		}
		// As long as OpenAI's keys.
		k.value = prefix + random(164-len(prefix))
		if a == nil && slices.ContainsFunc(s.admins, func(other *key) bool { return other.redacted() == k.redacted() }) {
			k.value = ""
		}
	}
	s.values[k.value] = k
	if a == nil {
		s.admins = append(s.admins, k)
	} else {
		p.keys = append(p.keys, k)
	}
	return k, nil
}

func (s *Server) findProject(id string) (*project, error) {
	for _, p := range s.projects {
		if p.id == id {
			return p, nil
		}
	}
	return nil, notFound("project", id)
}

func (s *Server) archive(p *project) {
	p.archived = s.now()
	p.deleteKeys(func(*key) bool { return true })
	p.accounts = nil
}

// deleteKeys deletes the keys of p that match.
func (p *project) deleteKeys(match func(*key) bool) {
	p.keys = slices.DeleteFunc(p.keys, func(k *key) bool {
		if match(k) {
			k.deleted = true
		}
		return k.deleted
	})
}

func (k *key) expired(now time.Time) bool { return !k.expires.IsZero() && !now.Before(k.expires) }

// redacted is the key in the form that OpenAI's documents show: sk-admin...def.
func (k *key) redacted() string {
	head := "sk-admin"
	if k.account != nil {
		head = "sk-svcacct"
	}
	return head + "..." + k.value[max(0, len(k.value)-3):]
}

// apiError is an error in OpenAI's form.
type apiError struct {
	status     int
	message    string
	typ        string
	param      string // empty: null
	code       string // empty: null
	retryAfter time.Duration
}

func (e *apiError) Error() string { return e.message }

// orNull is v, or nil when v is the zero value.
func orNull[T comparable](v T) any {
	var zero T
	if v == zero {
		return nil
	}
	return v
}

func (e *apiError) body() any {
	return map[string]any{"error": map[string]any{
		"message": e.message, "type": e.typ, "param": orNull(e.param), "code": orNull(e.code),
	}}
}

func badRequest(param, code, format string, args ...any) *apiError {
	return &apiError{status: 400, typ: "invalid_request_error", param: param, code: code, message: fmt.Sprintf(format, args...)}
}

func notFound(kind, id string) *apiError {
	return &apiError{status: 404, typ: "invalid_request_error", code: "not_found", message: fmt.Sprintf("No such %s: '%s'.", kind, id)}
}

func archivedError(p *project) *apiError {
	return badRequest("", "project_archived", "Project '%s' is archived.", p.id)
}

// authenticate returns the key of a call: an admin key, or a project key that has access.
func (s *Server) authenticate(h http.Header, admin bool) (*key, error) {
	unauthorized := func(code, message string) error {
		return &apiError{status: 401, typ: "invalid_request_error", code: code, message: message}
	}
	scheme, value, _ := strings.Cut(h.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") || value == "" {
		return nil, unauthorized("", "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).")
	}
	k, now := s.values[value], s.now()
	if k == nil || k.deleted || k.expired(now) || now.Before(k.ready) || (k.account == nil) != admin {
		shown := "sk-***"
		if len(value) > 20 {
			shown += value[len(value)-3:]
		}
		return nil, unauthorized("invalid_api_key", "Incorrect API key provided: "+shown+". You can find your API key at https://platform.openai.com/account/api-keys.")
	}
	if org := h.Get("OpenAI-Organization"); org != "" && org != DefaultOrganization {
		return nil, unauthorized("mismatched_organization", "OpenAI-Organization header should match organization for API key.")
	}
	if k.account != nil && k.account.role == "none" {
		return nil, &apiError{status: 403, typ: "invalid_request_error", code: "insufficient_permissions",
			message: "You have insufficient permissions for this operation."}
	}
	return k, nil
}

// takeToken takes a token for a call, or returns the error that tells when there is one.
func (s *Server) takeToken() error {
	if s.rate <= 0 {
		return nil
	}
	now := s.now()
	s.tokens = min(s.burst, s.tokens+now.Sub(s.filled).Seconds()*s.rate)
	s.filled = now
	if s.tokens < 1 {
		return &apiError{status: 429, typ: "requests", code: "rate_limit_exceeded", message: "Rate limit reached. Please try again later.",
			retryAfter: time.Duration((1 - s.tokens) / s.rate * float64(time.Second))}
	}
	s.tokens--
	return nil
}

// request is an API call that was found valid.
type request struct {
	now     time.Time
	query   map[string]any
	body    map[string]any
	key     *key
	project *project // of {project} in the path; likewise the next ones
	account *account
	target  *key // {key}: an admin key, or a key of the project
}

// route is an endpoint. In its path are {project}, {account} and {key}. Query and body
// list what it takes as name:kind, where kind is string, scope list, bool, a range as
// 1..100 or choices as asc|desc, followed by ! when it is required and ? when it may
// be null. POST answers 200 like everything else.
type route struct {
	method, path string
	query, body  string
	handle       func(*Server, *request) (any, error)
}

const (
	pageParams = "after:string limit:1..100"
	lifetime   = "expires_in_seconds:1..31536000"
	residency  = "residency:GLOBAL|US_STORAGE_PROCESSING|EU_STORAGE_PROCESSING|JP_STORAGE|JP_STORAGE_PROCESSING|" +
		"KR_STORAGE|CA_STORAGE|SG_STORAGE|IN_STORAGE|IN_STORAGE_PROCESSING|AU_STORAGE|AU_STORAGE_PROCESSING|" +
		"GB_STORAGE|AE_STORAGE|AE_STORAGE_PROCESSING?"
)

// routes is the API: https://platform.openai.com/docs/api-reference/administration, and
// the list of models to try a project key with.
var routes = []route{
	{"GET", "models", "", "", (*Server).listModels},

	{"GET", "organization/admin_api_keys", pageParams + " order:asc|desc", "", (*Server).listAdminKeys},
	{"POST", "organization/admin_api_keys", "", "name:string! " + lifetime, (*Server).createAdminKey},
	{"GET", "organization/admin_api_keys/{key}", "", "", (*Server).getKey},
	{"DELETE", "organization/admin_api_keys/{key}", "", "", (*Server).deleteAdminKey},

	{"GET", "organization/projects", pageParams + " include_archived:bool", "", (*Server).listProjects},
	{"POST", "organization/projects", "", "name:string! external_key_id:string? geography:string? " + residency, (*Server).createProject},
	{"GET", "organization/projects/{project}", "", "", (*Server).getProject},
	{"POST", "organization/projects/{project}", "", "name:string? external_key_id:string? geography:string?", (*Server).updateProject},
	{"POST", "organization/projects/{project}/archive", "", "", (*Server).archiveProject},

	{"GET", "organization/projects/{project}/service_accounts", pageParams, "", (*Server).listAccounts},
	{"POST", "organization/projects/{project}/service_accounts", "", "name:string! create_service_account_only:bool? " + lifetime + "?", (*Server).createAccount},
	{"GET", "organization/projects/{project}/service_accounts/{account}", "", "", (*Server).getAccount},
	{"POST", "organization/projects/{project}/service_accounts/{account}", "", "name:string role:member|owner", (*Server).updateAccount},
	{"DELETE", "organization/projects/{project}/service_accounts/{account}", "", "", (*Server).deleteAccount},
	{"POST", "organization/projects/{project}/service_accounts/{account}/api_keys", "", "name:string scopes:scopes " + lifetime, (*Server).createKey},

	{"GET", "organization/projects/{project}/api_keys", pageParams + " owner_project_access:active|inactive|any", "", (*Server).listKeys},
	{"GET", "organization/projects/{project}/api_keys/{key}", "", "", (*Server).getKey},
	{"POST", "organization/projects/{project}/api_keys/{key}", "", "scopes:scopes " + lifetime, (*Server).updateKey},
	{"DELETE", "organization/projects/{project}/api_keys/{key}", "", "", (*Server).deleteKey},
}

// match returns what stands for {project} and the others in path, which is escaped.
func (rt *route) match(method, path string) (map[string]string, bool) {
	want, got := strings.Split(rt.path, "/"), strings.Split(path, "/")
	if method != rt.method || len(want) != len(got) {
		return nil, false
	}
	ids := map[string]string{}
	for i, segment := range got {
		segment, err := url.PathUnescape(segment)
		if strings.HasPrefix(want[i], "{") {
			ids[want[i]] = segment
		} else if segment != want[i] {
			return nil, false
		}
		if err != nil || segment == "" {
			return nil, false
		}
	}
	return ids, true
}

// process carries out an API call and returns the object to answer with.
func (s *Server) process(in *incoming) (any, error) {
	path, ok := strings.CutPrefix(in.path, "/v1/")
	var rt *route
	var ids map[string]string
	for i := 0; ok && i < len(routes) && rt == nil; i++ {
		if found, ok := routes[i].match(in.method, path); ok {
			rt, ids = &routes[i], found
		}
	}
	if rt == nil {
		return nil, &apiError{status: 404, typ: "invalid_request_error", message: fmt.Sprintf("Invalid URL (%s %s)", in.method, in.path)}
	}
	k, err := s.authenticate(in.header, path != "models")
	if err != nil {
		return nil, err
	}
	if err := s.takeToken(); err != nil {
		return nil, err
	}
	r := &request{now: s.now(), key: k}
	k.used = r.now
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

// resolve finds what the path names.
func (s *Server) resolve(r *request, rt *route, ids map[string]string) (err error) {
	keys := s.admins
	if id, ok := ids["{project}"]; ok {
		if r.project, err = s.findProject(id); err != nil {
			return err
		}
		keys = r.project.keys
		accounts := strings.Contains(rt.path, "/service_accounts")
		if !r.project.archived.IsZero() && (accounts || rt.method != "GET") {
			return archivedError(r.project)
		}
	}
	if id, ok := ids["{account}"]; ok {
		i := slices.IndexFunc(r.project.accounts, func(a *account) bool { return a.id == id })
		if i < 0 {
			return notFound("service account", id)
		}
		r.account = r.project.accounts[i]
	}
	if id, ok := ids["{key}"]; ok {
		i := slices.IndexFunc(keys, func(k *key) bool { return k.id == id })
		if i < 0 {
			return notFound("API key", id)
		}
		r.target = keys[i]
	}
	return nil
}

func (s *Server) parseQuery(raw, spec string) (map[string]any, error) {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return nil, badRequest("", "invalid_query", "The query is malformed.")
	}
	given := map[string]json.RawMessage{}
	for name, v := range values {
		if len(v) != 1 {
			return nil, badRequest(name, "invalid_value", "Duplicate parameter: '%s'.", name)
		}
		given[name], _ = json.Marshal(v[0])
		if kind := kindOf(spec, name); kind == "bool" || strings.Contains(kind, "..") {
			given[name] = json.RawMessage(v[0])
		}
	}
	return s.parse(given, spec)
}

func (s *Server) parseBody(in *incoming, spec string) (map[string]any, error) {
	given := map[string]json.RawMessage{}
	if len(in.body) > 0 {
		mediaType, _, _ := strings.Cut(in.header.Get("Content-Type"), ";")
		if !strings.EqualFold(strings.TrimSpace(mediaType), "application/json") {
			return nil, badRequest("", "unsupported_content_type", "Unsupported Content-Type: '%s'. Use 'application/json'.", mediaType)
		}
		if err := json.Unmarshal(in.body, &given); err != nil || given == nil {
			return nil, badRequest("", "invalid_json", "We could not parse the JSON body of your request. The body must be a JSON object.")
		}
	}
	return s.parse(given, spec)
}

// kindOf returns the kind of a parameter, with its mark; empty when there is none.
func kindOf(spec, name string) string {
	for _, field := range strings.Fields(spec) {
		if kind, ok := strings.CutPrefix(field, name+":"); ok {
			return kind
		}
	}
	return ""
}

// parse checks parameters against spec, whose form route describes. The values are of
// the types string, []string, bool and int; null is the same as nothing.
func (s *Server) parse(given map[string]json.RawMessage, spec string) (map[string]any, error) {
	for _, field := range strings.Fields(spec) {
		name, kind, _ := strings.Cut(field, ":")
		if _, ok := given[name]; !ok && strings.HasSuffix(kind, "!") {
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
		v, err := s.parseValue(name, strings.TrimRight(kind, "!?"), raw)
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
		if low, _ := strconv.Atoi(lowest); n < low && !s.lax {
			return nil, badRequest(name, "integer_below_min_value", "Invalid '%s': integer below minimum value. Expected a value >= %d, but got %d instead.", name, low, n)
		}
		if high, _ := strconv.Atoi(highest); n > high {
			return nil, badRequest(name, "integer_above_max_value", "Invalid '%s': integer above maximum value. Expected a value <= %d, but got %d instead.", name, high, n)
		}
		return n, nil
	}
	switch kind {
	case "bool":
		var v bool
		if string(raw) == "null" || json.Unmarshal(raw, &v) != nil {
			return nil, wrongType("a boolean")
		}
		return v, nil
	case "scopes":
		var v []*string
		if string(raw) == "null" || json.Unmarshal(raw, &v) != nil || slices.Contains(v, nil) {
			return nil, wrongType("an array of strings")
		}
		scopes := []string{}
		for _, scope := range v {
			if !scopePattern.MatchString(*scope) && !s.lax {
				return nil, badRequest(name, "invalid_value", "Invalid scope: '%s'.", *scope)
			}
			scopes = append(scopes, *scope)
		}
		return scopes, nil
	}
	var v string
	if !bytes.HasPrefix(raw, []byte(`"`)) || json.Unmarshal(raw, &v) != nil {
		return nil, wrongType("a string")
	}
	if kind == "string" && v == "" {
		return nil, badRequest(name, "empty_string", "Invalid '%s': empty string. Expected a string with minimum length 1.", name)
	}
	if choices := strings.Split(kind, "|"); len(choices) > 1 && !slices.Contains(choices, v) {
		return nil, badRequest(name, "invalid_value", "Invalid value: '%s'. Supported values are: '%s'.", v, strings.Join(choices, "', '"))
	}
	return v, nil
}

// object is what a list holds: admin keys, projects, accounts, project keys.
type object interface {
	ident() string
	view() map[string]any
}

func (k *key) ident() string     { return k.id }
func (a *account) ident() string { return a.id }
func (p *project) ident() string { return p.id }

func unixOrNull(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.Unix()
}

func (k *key) view() map[string]any {
	v := map[string]any{
		"object": "organization.admin_api_key", "id": k.id, "name": k.name, "redacted_value": k.redacted(),
		"created_at": k.created.Unix(), "expires_at": unixOrNull(k.expires), "last_used_at": unixOrNull(k.used),
	}
	if k.account == nil {
		v["owner"] = map[string]any{
			"type": "user", "object": "organization.user", "id": "user-sim", "name": "Simulated owner",
			"created_at": k.created.Unix(), "role": "owner",
		}
		return v
	}
	v["object"] = "organization.project.api_key"
	v["owner_project_access"] = k.account.access()
	owner := k.account.view()
	delete(owner, "object")
	v["owner"] = map[string]any{"type": "service_account", "service_account": owner}
	return v
}

// secret is the one answer that shows the value of a service account's key.
func (k *key) secret() map[string]any {
	return map[string]any{
		"object": "organization.project.service_account.api_key", "id": k.id, "name": k.name, "value": k.value,
		"created_at": k.created.Unix(), "expires_at": unixOrNull(k.expires),
	}
}

// access tells whether keys of the account can do anything, as OpenAI calls it.
func (a *account) access() string {
	if a.role == "none" {
		return "inactive"
	}
	return "active"
}

func (a *account) view() map[string]any {
	return map[string]any{
		"object": "organization.project.service_account", "id": a.id, "name": a.name, "role": a.role,
		"created_at": a.created.Unix(),
	}
}

func (p *project) view() map[string]any {
	v := map[string]any{
		"object": "organization.project", "id": p.id, "name": p.name, "status": "active",
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

// page answers with the part of a list, which is in order of creation, that r asks for.
func page[T object](s *Server, r *request, all []T) (any, error) {
	cursor, from := -1, 0
	if after, ok := r.query["after"].(string); ok {
		if cursor, ok = s.order[after]; !ok && !s.lax {
			return nil, badRequest("after", "invalid_value", "Invalid 'after': no object with id '%s'.", after)
		} else if !ok {
			cursor = -1
		}
	}
	if r.query["order"] == "desc" {
		all = slices.Clone(all)
		slices.Reverse(all)
		for cursor >= 0 && from < len(all) && s.order[all[from].ident()] >= cursor {
			from++
		}
	} else {
		for from < len(all) && s.order[all[from].ident()] <= cursor {
			from++
		}
	}
	limit, ok := r.query["limit"].(int)
	if !ok || limit < 1 {
		limit = 20
	}
	to := min(from+limit, len(all))
	list := map[string]any{"object": "list", "first_id": nil, "last_id": nil, "has_more": to < len(all)}
	data := []any{}
	for _, item := range all[from:to] {
		data = append(data, item.view())
	}
	if list["data"] = data; len(data) > 0 {
		list["first_id"], list["last_id"] = all[from].ident(), all[to-1].ident()
	}
	return list, nil
}

// expiry returns when a key that r makes or updates expires; zero: never. Its error is
// the organization's policy.
func (s *Server) expiry(r *request) (time.Time, error) {
	seconds, ok := r.body["expires_in_seconds"].(int)
	if s.maxKeyLife > 0 && (!ok || seconds > s.maxKeyLife) {
		return time.Time{}, badRequest("expires_in_seconds", "api_key_expiration_policy",
			"Your organization requires API keys to expire. 'expires_in_seconds' must be between 1 and %d.", s.maxKeyLife)
	}
	if !ok {
		return time.Time{}, nil
	}
	return r.now.Add(time.Duration(seconds) * time.Second), nil
}

// deleted is the answer to a deletion.
func deleted(object, id string) (any, error) {
	return map[string]any{"object": object + ".deleted", "id": id, "deleted": true}, nil
}

func (s *Server) listModels(r *request) (any, error) {
	return map[string]any{"object": "list", "data": []any{
		map[string]any{"id": "gpt-sim", "object": "model", "created": 1700000000, "owned_by": "openaisim"},
	}}, nil
}

func (s *Server) listAdminKeys(r *request) (any, error) { return page(s, r, s.admins) }

func (s *Server) createAdminKey(r *request) (any, error) {
	expires, err := s.expiry(r)
	if err != nil {
		return nil, err
	}
	k := must(s.addKey("", nil, nil, "", r.body["name"].(string)))
	k.expires = expires
	v := k.view()
	v["value"] = k.value
	return v, nil
}

func (s *Server) getKey(r *request) (any, error) { return r.target.view(), nil }

func (s *Server) deleteAdminKey(r *request) (any, error) {
	r.target.deleted = true
	s.admins = slices.DeleteFunc(s.admins, func(k *key) bool { return k.deleted })
	return deleted("organization.admin_api_key", r.target.id)
}

func (s *Server) listProjects(r *request) (any, error) {
	var list []*project
	for _, p := range s.projects {
		if p.archived.IsZero() || r.query["include_archived"] == true {
			list = append(list, p)
		}
	}
	return page(s, r, list)
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

func (s *Server) getProject(r *request) (any, error) { return r.project.view(), nil }

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

func (s *Server) listAccounts(r *request) (any, error) { return page(s, r, r.project.accounts) }

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
	expires, err := s.expiry(r)
	if err != nil {
		return nil, err
	}
	a := must(s.addAccount(r.project, "", name, "member"))
	k := must(s.addKey("", r.project, a, "", "Secret Key"))
	k.expires = expires
	v := a.view()
	v["api_key"] = k.secret()
	return v, nil
}

func (s *Server) getAccount(r *request) (any, error) { return r.account.view(), nil }

func (s *Server) updateAccount(r *request) (any, error) {
	if name, ok := r.body["name"].(string); ok {
		r.account.name = name
	}
	if role, ok := r.body["role"].(string); ok {
		r.account.role = role
	}
	return r.account.view(), nil
}

func (s *Server) deleteAccount(r *request) (any, error) {
	r.project.deleteKeys(func(k *key) bool { return k.account == r.account })
	r.project.accounts = slices.DeleteFunc(r.project.accounts, func(a *account) bool { return a == r.account })
	return deleted("organization.project.service_account", r.account.id)
}

func (s *Server) createKey(r *request) (any, error) {
	expires, err := s.expiry(r)
	if err != nil {
		return nil, err
	}
	name, ok := r.body["name"].(string)
	if !ok {
		name = "Secret Key"
	}
	k := must(s.addKey("", r.project, r.account, "", name))
	k.expires = expires
	k.scopes, _ = r.body["scopes"].([]string)
	return k.secret(), nil
}

func (s *Server) listKeys(r *request) (any, error) {
	// Without the parameter OpenAI "may exclude some enabled keys".
	access, ok := r.query["owner_project_access"].(string)
	if !ok {
		access = "active"
	}
	var list []*key
	for _, k := range r.project.keys {
		if access == "any" || access == k.account.access() {
			list = append(list, k)
		}
	}
	return page(s, r, list)
}

func (s *Server) updateKey(r *request) (any, error) {
	scopes, newScopes := r.body["scopes"].([]string)
	_, newExpiry := r.body["expires_in_seconds"]
	if !newScopes && !newExpiry {
		return nil, badRequest("", "missing_required_parameter", "Provide at least one of 'scopes' and 'expires_in_seconds'.")
	}
	if r.target.expired(r.now) {
		return nil, badRequest("", "api_key_expired", "Expired API keys cannot be updated.")
	}
	if newExpiry {
		expires, err := s.expiry(r)
		if err != nil {
			return nil, err
		}
		r.target.expires = expires
	}
	if newScopes {
		r.target.scopes = scopes
	}
	return r.target.view(), nil
}

func (s *Server) deleteKey(r *request) (any, error) {
	r.project.deleteKeys(func(k *key) bool { return k == r.target })
	return deleted("organization.project.api_key", r.target.id)
}
