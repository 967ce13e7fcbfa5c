// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// Workload identity federation, as far as the Admin API manages it. Where the documents
// leave a question open:
//   - the limits of 50, a rule too many for an account and a provider that has rules are 400;
//   - a project or an account that the body of a rule names wrongly is 400, not 404;
//   - type is required, as in the Go SDK, which always sends it;
//   - without verification, a provider is one with discovery. The simulator asks nobody for
//     keys, so an exchange with such a provider fails. Its issuer and its discovery URL
//     begin with https://;
//   - attribute_matchers are not empty, and neither is a string among them;
//   - of the expressions of attribute_transformations, only a path as assertion.a.b is
//     evaluated. An attribute with any other expression matches nothing;
//   - a rule outlives its account, counts against the limit, and can be deleted;
//   - changes of providers and rules, but for new keys (SetJWKSDelay), count at once.
const (
	maxProviders       = 50 // in the organization
	maxRules           = 50 // of a provider
	maxTransformations = 20 // of a provider

	providers = "organization/workload_identity_providers"
	rules     = providers + "/{provider}/federation_rules"
)

// federationRoutes are the endpoints of workload identity federation: the Go SDK's files
// adminorganizationworkloadidentityprovider*.go, and the token endpoint.
var federationRoutes = []route{
	{"GET", providers, paging + " order:asc|desc", "", (*Server).listProviders},
	{"POST", providers, "", "name:string! issuer:string! audience:string! type:oidc! description:text " +
		providerOptions, (*Server).createProvider},
	{"GET", providers + "/{provider}", "", "", (*Server).show},
	{"POST", providers + "/{provider}", "", "name:string issuer:string audience:string description:text~ " +
		providerOptions, (*Server).updateProvider},
	{"DELETE", providers + "/{provider}", "", "", (*Server).deleteProvider},

	{"GET", rules, paging + " order:asc|desc service_account_id:string", "", (*Server).listRules},
	{"POST", rules, "", "project_id:string! service_account_id:string! attribute_matchers:matchers! " +
		"name:text description:text " + ruleOptions, (*Server).createRule},
	{"GET", rules + "/{rule}", "", "", (*Server).show},
	{"POST", rules + "/{rule}", "", "attribute_matchers:matchers name:text~ description:text~ " +
		ruleOptions, (*Server).updateRule},
	{"DELETE", rules + "/{rule}", "", "", (*Server).deleteRule},

	{"POST", tokenPath, "", exchangeBody, (*Server).exchangeToken},
}

const (
	providerOptions = "enabled:bool attribute_transformations:transformations verification:verification"
	ruleOptions     = "enabled:bool permissions:permissions"
)

// Provider is a workload identity provider as a test sees it.
type Provider struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	Issuer      string    `json:"issuer"`
	Audience    string    `json:"audience"`
	Description string    `json:"description"`
	Enabled     bool      `json:"enabled"`
	KeyIDs      []string  `json:"key_ids"` // kid of each uploaded key, in order; nil: discovery
	Created     time.Time `json:"created"`
	Updated     time.Time `json:"updated"`
}

// Rule is a federation rule as a test sees it.
type Rule struct {
	ID               string         `json:"id"`
	ProviderID       string         `json:"provider_id"`
	ProjectID        string         `json:"project_id"`
	ServiceAccountID string         `json:"service_account_id"`
	Name             string         `json:"name"`
	Description      string         `json:"description"`
	Enabled          bool           `json:"enabled"`
	Matchers         map[string]any `json:"matchers"` // string, bool or json.Number; not to be changed
	Scopes           []string       `json:"scopes"`   // empty: no restriction
	Created          time.Time      `json:"created"`
	Updated          time.Time      `json:"updated"`
}

type provider struct {
	Provider
	transformations []transformation
	verification    verification
	rules           []*rule
}

type rule struct{ Rule }

// transformation makes an attribute, whose name begins with openai., of the claims.
type transformation struct {
	Attribute  string `json:"attribute"`
	Expression string `json:"expression"`
}

// verification is where the keys of a provider come from.
type verification struct {
	discoveryURL string          // of discovery; empty: made of the issuer
	jwks         json.RawMessage // as uploaded; nil: discovery
	keys         []jwk           // in jwks
}

func (p *provider) ident() string { return p.ID }
func (r *rule) ident() string     { return r.ID }

func (p *provider) view() map[string]any {
	v := map[string]any{"type": "discovery", "discovery_url": orNull(p.verification.discoveryURL)}
	if p.verification.jwks != nil {
		v = map[string]any{"type": "uploaded_jwks", "jwks": p.verification.jwks}
	}
	return map[string]any{
		"object": "organization.workload_identity_provider", "id": p.ID, "type": "oidc", "name": p.Name,
		"issuer": p.Issuer, "audience": p.Audience, "description": orNull(p.Description), "enabled": p.Enabled,
		"attribute_transformations": append([]transformation{}, p.transformations...), "verification": v,
		"created_at": p.Created.Unix(), "updated_at": p.Updated.Unix(),
	}
}

func (r *rule) view() map[string]any {
	permissions := map[string]any{"type": "service_account_default"}
	if len(r.Scopes) > 0 {
		permissions = map[string]any{"type": "restricted", "scopes": r.Scopes}
	}
	return map[string]any{
		"object": "organization.workload_identity_federation_rule", "id": r.ID,
		"workload_identity_provider_id": r.ProviderID, "project_id": r.ProjectID,
		"service_account_id": r.ServiceAccountID, "name": orNull(r.Name), "description": orNull(r.Description),
		"enabled": r.Enabled, "attribute_matchers": r.Matchers, "permissions": permissions,
		"created_at": r.Created.Unix(), "updated_at": r.Updated.Unix(),
	}
}

// Providers returns the workload identity providers, in order of creation.
func (s *Server) Providers() []Provider {
	s.lock()
	defer s.mu.Unlock()
	return s.providerList()
}

func (s *Server) providerList() []Provider {
	list := []Provider{}
	for _, p := range s.providers {
		v := p.Provider
		for _, k := range p.verification.keys {
			v.KeyIDs = append(v.KeyIDs, k.id)
		}
		list = append(list, v)
	}
	return list
}

// Federation tells how many providers there are, how many of them are enabled, and how many rules.
func (s *Server) Federation() string {
	all, enabled := s.Providers(), 0
	for _, p := range all {
		if p.Enabled {
			enabled++
		}
	}
	return fmt.Sprintf("%d providers, %d enabled, %d rules", len(all), enabled, len(s.Rules()))
}

// KeyIDs returns the kid of each key that was uploaded for a provider, in order for each.
func (s *Server) KeyIDs() (ids []string) {
	for _, p := range s.Providers() {
		ids = append(ids, p.KeyIDs...)
	}
	return ids
}

// Rules returns the federation rules of all providers, in order of creation for each.
func (s *Server) Rules() []Rule {
	s.lock()
	defer s.mu.Unlock()
	return s.ruleList()
}

func (s *Server) ruleList() []Rule {
	list := []Rule{}
	for _, p := range s.providers {
		for _, r := range p.rules {
			list = append(list, r.Rule)
		}
	}
	return list
}

// Operate makes a call of the Admin API about providers and rules with the first admin key, as
// an operator does, and returns the id in the answer. Its path is below that of the providers:
// PROVIDER in it is the id of the first provider, and RULE the path of that one's first rule.
// The call meets no fault and is not among Calls. Operate panics when it fails.
func (s *Server) Operate(method, path string, body map[string]any) (id string) {
	if list := s.Rules(); len(list) > 0 {
		path = strings.ReplaceAll(path, "RULE", list[0].ProviderID+"/federation_rules/"+list[0].ID)
	}
	if list := s.Providers(); len(list) > 0 {
		path = strings.ReplaceAll(path, "PROVIDER", list[0].ID)
	}
	key, _ := s.AdminKey()
	in := &incoming{method: method, path: "/v1/" + providers + path, header: http.Header{
		"Authorization": {"Bearer " + key}, "Content-Type": {"application/json"}}}
	if body != nil {
		in.body, _ = json.Marshal(body)
	}
	a := s.carryOut(in, &Call{})
	var made struct{ ID string }
	if err := json.Unmarshal(a.body, &made); err != nil || a.status != http.StatusOK {
		panic(fmt.Sprintf("openaisim: %s %s: %s", method, path, a.body))
	}
	return made.ID
}

// SetJWKSDelay makes keys that are uploaded from now on count only after d. A key that was
// there before, with the same kid, goes on counting, and one that is removed stops at once.
func (s *Server) SetJWKSDelay(d time.Duration) { s.locked(func() { s.jwksDelay = d }) }

// resolveFederation is the part of resolve that finds providers and rules.
func (s *Server) resolveFederation(r *request, rt *route, ids map[string]string) (err error) {
	id, ok := ids["{provider}"]
	if !ok {
		return nil
	}
	ruleID, ofRule := ids["{rule}"]
	if r.provider, err = find(s.providers, "workload identity provider", id); err != nil {
		if strings.HasSuffix(rt.path, "{provider}") {
			return s.gone(rt, err)
		}
		return err
	}
	r.object = r.provider
	if ofRule {
		if r.rule, err = find(r.provider.rules, "federation rule", ruleID); err != nil {
			return s.gone(rt, err)
		}
		r.object = r.rule
	}
	return nil
}

func (s *Server) listProviders(r *request) (any, error) { return page(s, r, "wip_", s.providers) }

func (s *Server) createProvider(r *request) (any, error) {
	if len(s.providers) >= maxProviders {
		return nil, badRequest("", "limit_exceeded",
			"Your organization has reached the limit of %d workload identity providers.", maxProviders)
	}
	p := &provider{Provider: Provider{Enabled: true, Created: r.now}}
	if err := s.setProvider(p, r); err != nil {
		return nil, err
	}
	p.ID = must(s.newID("wip_", ""))
	s.providers = append(s.providers, p)
	return p.view(), nil
}

func (s *Server) updateProvider(r *request) (any, error) {
	changed := *r.provider
	if err := s.setProvider(&changed, r); err != nil {
		return nil, err
	}
	*r.provider = changed
	return r.provider.view(), nil
}

// setProvider sets what r names, and keeps the rest.
func (s *Server) setProvider(p *provider, r *request) error {
	set(r, "name", &p.Name)
	set(r, "issuer", &p.Issuer)
	set(r, "audience", &p.Audience)
	set(r, "description", &p.Description)
	set(r, "enabled", &p.Enabled)
	set(r, "attribute_transformations", &p.transformations)
	if v, ok := r.body["verification"].(verification); ok {
		for i := range v.keys {
			v.keys[i].ready = p.verification.ready(v.keys[i], r.now.Add(s.jwksDelay))
		}
		p.verification = v
	}
	if p.verification.jwks == nil && !isHTTPS(p.Issuer) && !s.lax {
		return badRequest("issuer", "invalid_value", "Invalid 'issuer': discovery needs an https URL.")
	}
	p.Updated = r.now
	return nil
}

// set sets *to to what the body has under this name, if it has it; nil is the zero value.
func set[T any](r *request, name string, to *T) {
	if v, ok := r.body[name]; ok {
		*to, _ = v.(T)
	}
}

func isHTTPS(text string) bool {
	u, err := url.Parse(text)
	return err == nil && u.Scheme == "https" && u.Host != ""
}

func (s *Server) deleteProvider(r *request) (any, error) {
	if n := len(r.provider.rules); n > 0 {
		return nil, badRequest("", "workload_identity_provider_in_use",
			"The workload identity provider has %d federation rules. Delete them first.", n)
	}
	s.providers = without(s.providers, r.provider)
	return deleted(r.provider)
}

// without is list without o, in a new slice.
func without[T object](list []T, o object) []T {
	var left []T
	for _, other := range list {
		if other.ident() != o.ident() {
			left = append(left, other)
		}
	}
	return left
}

func (s *Server) listRules(r *request) (any, error) {
	account, filtered := r.query["service_account_id"].(string)
	var list []*rule
	for _, rule := range r.provider.rules {
		if !filtered || rule.ServiceAccountID == account {
			list = append(list, rule)
		}
	}
	return page(s, r, "wifr_", list)
}

func (s *Server) createRule(r *request) (any, error) {
	projectID, accountID := r.body["project_id"].(string), r.body["service_account_id"].(string)
	p, err := find(s.projects, "project", projectID)
	switch {
	case err != nil:
		return nil, badRequest("project_id", "invalid_value", "%s", err)
	case !p.archived.IsZero():
		return nil, badRequest("project_id", "project_archived", "Project '%s' is archived.", p.id)
	}
	if _, err := find(p.accounts, "service account", accountID); err != nil {
		return nil, badRequest("service_account_id", "invalid_value", "%s", err)
	}
	for _, other := range r.provider.rules {
		if other.ServiceAccountID == accountID {
			return nil, badRequest("service_account_id", "federation_rule_exists",
				"The provider has a federation rule for service account '%s': '%s'.", accountID, other.ID)
		}
	}
	if len(r.provider.rules) >= maxRules {
		return nil, badRequest("", "limit_exceeded",
			"The workload identity provider has reached the limit of %d federation rules.", maxRules)
	}
	made := &rule{Rule{
		ID: must(s.newID("wifr_", "")), ProviderID: r.provider.ID, ProjectID: projectID, ServiceAccountID: accountID,
		Enabled: true, Created: r.now,
	}}
	made.set(r)
	r.provider.rules = append(r.provider.rules, made)
	return made.view(), nil
}

func (s *Server) updateRule(r *request) (any, error) {
	r.rule.set(r)
	return r.rule.view(), nil
}

// set sets what r names, and keeps the rest.
func (r *rule) set(req *request) {
	set(req, "name", &r.Name)
	set(req, "description", &r.Description)
	set(req, "enabled", &r.Enabled)
	set(req, "attribute_matchers", &r.Matchers)
	set(req, "permissions", &r.Scopes)
	r.Updated = req.now
}

func (s *Server) deleteRule(r *request) (any, error) {
	r.provider.rules = without(r.provider.rules, r.rule)
	return deleted(r.rule)
}

// parseKind parses a parameter of one of the kinds below, or of those of parseValue.
//
//	text             a string, perhaps empty
//	transformations  []transformation
//	verification     verification
//	jwks             verification, of which this is a part
//	matchers         map[string]any, whose values are of the types string, bool and json.Number
//	permissions      []string, the scopes; nil: no restriction
func (s *Server) parseKind(name, kind string, raw json.RawMessage) (any, error) {
	switch kind {
	case "text":
		if string(raw) == `""` {
			return "", nil
		}
		return s.parseValue(name, "string", raw)
	case "transformations":
		return s.parseTransformations(name, raw)
	case "verification":
		return s.parseVerification(name, raw)
	case "jwks":
		return parseJWKS(name, raw)
	case "matchers":
		return parseMatchers(name, raw)
	case "permissions":
		return s.parsePermissions(name, raw)
	}
	return s.parseValue(name, kind, raw)
}

// parseObject parses an object against a spec of its own.
func (s *Server) parseObject(name string, raw json.RawMessage, spec string) (map[string]any, error) {
	var given map[string]json.RawMessage
	if json.Unmarshal(raw, &given) != nil || given == nil {
		return nil, badRequest(name, "invalid_type", "Invalid type for '%s': expected an object.", name)
	}
	values, err := s.parse(given, spec)
	if e, ok := err.(*apiError); ok {
		e.param = name + "." + e.param
	}
	return values, err
}

func (s *Server) parseTransformations(name string, raw json.RawMessage) (any, error) {
	var given []json.RawMessage
	if json.Unmarshal(raw, &given) != nil || given == nil {
		return nil, badRequest(name, "invalid_type", "Invalid type for '%s': expected an array.", name)
	}
	if len(given) > maxTransformations {
		return nil, badRequest(name, "array_above_max_length", "Invalid '%s': at most %d.", name, maxTransformations)
	}
	list, seen := []transformation{}, map[string]bool{}
	for _, raw := range given {
		v, err := s.parseObject(name, raw, "attribute:string! expression:string!")
		if err != nil {
			return nil, err
		}
		t := transformation{v["attribute"].(string), v["expression"].(string)}
		rest, ok := strings.CutPrefix(t.Attribute, "openai.")
		switch {
		case len(t.Attribute) > 256 || len(t.Expression) > 4096:
			return nil, badRequest(name, "string_above_max_length", "Invalid '%s': too long.", name)
		case (!ok || rest == "") && !s.lax:
			return nil, badRequest(name, "invalid_value", "Invalid attribute '%s': expected openai.….", t.Attribute)
		case seen[t.Attribute]:
			return nil, badRequest(name, "invalid_value", "Duplicate attribute '%s'.", t.Attribute)
		}
		seen[t.Attribute] = true
		list = append(list, t)
	}
	return list, nil
}

func (s *Server) parseVerification(name string, raw json.RawMessage) (any, error) {
	var kind struct{ Type any }
	json.Unmarshal(raw, &kind) // parseObject has the errors
	if kind.Type == "uploaded_jwks" {
		v, err := s.parseObject(name, raw, "type:uploaded_jwks! jwks:jwks!")
		if err != nil {
			return nil, err
		}
		return v["jwks"], nil
	}
	v, err := s.parseObject(name, raw, "type:discovery|uploaded_jwks! discovery_url:string~!")
	if err != nil {
		return nil, err
	}
	address, _ := v["discovery_url"].(string)
	if v["discovery_url"] != nil && !isHTTPS(address) && !s.lax {
		return nil, badRequest(name+".discovery_url", "invalid_value", "Invalid 'discovery_url': expected an https URL.")
	}
	return verification{discoveryURL: address}, nil
}

func parseMatchers(name string, raw json.RawMessage) (any, error) {
	matchers, err := decodeObject(raw)
	if err != nil {
		return nil, badRequest(name, "invalid_type", "Invalid type for '%s': expected an object.", name)
	}
	for claim, want := range matchers {
		param := name + "." + claim
		switch want := want.(type) {
		case bool, json.Number:
		case string:
			if want == "" || want == "*" || strings.Contains(want[:len(want)-1], "*") {
				return nil, badRequest(param, "invalid_value",
					"Invalid matcher '%s': expected text, which may end in one '*'.", want)
			}
		default:
			return nil, badRequest(param, "invalid_type",
				"Invalid type for '%s': expected a string, a number or a boolean.", param)
		}
		if claim == "" || claim == "openai." {
			return nil, badRequest(name, "invalid_value", "Invalid '%s': a matcher without a claim.", name)
		}
	}
	if len(matchers) == 0 {
		return nil, badRequest(name, "invalid_value", "Invalid '%s': expected at least one matcher.", name)
	}
	return matchers, nil
}

func (s *Server) parsePermissions(name string, raw json.RawMessage) (any, error) {
	var kind struct{ Type any }
	json.Unmarshal(raw, &kind) // parseObject has the errors
	spec := "type:service_account_default|restricted!"
	if kind.Type == "restricted" {
		spec += " scopes:scopes!"
	}
	v, err := s.parseObject(name, raw, spec)
	if err != nil {
		return nil, err
	}
	scopes, _ := v["scopes"].([]string)
	if kind.Type == "restricted" && len(scopes) == 0 {
		return nil, badRequest(name+".scopes", "invalid_value", "Invalid 'scopes': expected at least one.")
	}
	return scopes, nil
}

// matches tells whether claims satisfy all matchers of a rule of p.
func (p *provider) matches(r *rule, claims map[string]any) bool {
	for claim, want := range r.Matchers {
		got := claims[claim]
		if strings.HasPrefix(claim, "openai.") {
			got = p.attribute(claim, claims)
		}
		if !matches(want, got) {
			return false
		}
	}
	return true
}

// matches tells whether the value of a claim, nil when there is none, is the one wanted.
func matches(want, got any) bool {
	switch want := want.(type) {
	case string:
		got, ok := got.(string)
		if start, ok := strings.CutSuffix(want, "*"); ok {
			return strings.HasPrefix(got, start)
		}
		return ok && got == want
	case bool:
		return got == want
	case json.Number:
		got, ok := got.(json.Number)
		return ok && equalNumbers(got, want)
	}
	return false
}

func equalNumbers(a, b json.Number) bool {
	n, errA := a.Int64()
	m, errB := b.Int64()
	if errA == nil && errB == nil {
		return n == m
	}
	x, errA := a.Float64()
	y, errB := b.Float64()
	return errA == nil && errB == nil && x == y
}

var assertionPath = regexp.MustCompile(`^assertion(\.[A-Za-z_][A-Za-z0-9_]*)+$`)

// attribute evaluates the expression of an attribute; nil: there is none, or it fails.
func (p *provider) attribute(name string, claims map[string]any) any {
	for _, t := range p.transformations {
		if t.Attribute != name || !assertionPath.MatchString(t.Expression) {
			continue
		}
		var v any = claims
		for _, step := range strings.Split(t.Expression, ".")[1:] {
			m, _ := v.(map[string]any)
			v = m[step]
		}
		return v
	}
	return nil
}
