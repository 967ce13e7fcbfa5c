// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"encoding/base64"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The token endpoint. It serves any host, and Calls shows its path as tokenPath. An error,
// also one that a Fault makes without a Body, is OAuth's {error, error_description}:
//
//	400 invalid_request         not JSON, a parameter that is missing, unknown or of another
//	                            type than OpenAI's, or an Authorization header
//	400 unsupported_grant_type
//	401 invalid_client          the provider does not exist
//	403 unauthorized_client     the provider is disabled
//	400 invalid_subject_token   not a JWT
//	401 invalid_subject_token   signature, kid, iss, aud, exp, iat, nbf or sub
//	400 invalid_target          the account does not exist, or not any more
//	403 access_denied           not exactly one enabled rule for the account matches
//	429 temporarily_unavailable SetRateLimit and SetEndpointLimit, which count all calls here
//
// They are checked in this order, after the limits. That OpenAI uses these codes is
// documented; which one goes with which error, and that an exchange looks at the rules last,
// is the simulator's choice. Others are:
//   - scope and client_id are taken and have no effect;
//   - expires_in is cut to whole seconds, and the token dies with them. A JWT with less
//     than a second to live has expired;
//   - a token dies early only with its account or its project. What becomes of its rule and
//     its provider does not matter, and scopes stay as they were;
//   - a token of an account without a role is 403 at /v1/models, as a key is.
const (
	tokenPath    = "/oauth/token"
	tokenMaxLife = time.Hour

	grantType    = "urn:ietf:params:oauth:grant-type:token-exchange"
	accessToken  = "urn:ietf:params:oauth:token-type:access_token"
	exchangeBody = "grant_type:string! subject_token_type:string! subject_token:string! " +
		"identity_provider_id:string! service_account_id:string! client_id:text scope:text"
)

var (
	subjectTypes = []string{"urn:ietf:params:oauth:token-type:jwt", "urn:ietf:params:oauth:token-type:id_token"}
	modelScopes  = []string{"api.model.read", "api.model.request", "api.all.read"}
)

// Token is an access token as a test sees it. Its ID is the KeyID of calls with it.
type Token struct {
	ID               string    `json:"id"`
	ServiceAccountID string    `json:"service_account_id"`
	RuleID           string    `json:"rule_id"`
	Scopes           []string  `json:"scopes"` // empty: no restriction
	Created          time.Time `json:"created"`
	Expires          time.Time `json:"expires"`
}

// Tokens returns the access tokens that live: not expired, nor gone with their account.
func (s *Server) Tokens() []Token {
	s.lock()
	defer s.mu.Unlock()
	return s.tokenList()
}

func (s *Server) tokenList() []Token {
	list := []Token{}
	for _, k := range s.tokens {
		if !k.dead(s.now()) {
			list = append(list, Token{k.ID, k.ServiceAccountID, k.Name, k.Scopes, k.Created, k.Expires})
		}
	}
	return list
}

// SetTokenScope makes the exchange answer with this scope, words with spaces between them,
// and give the token these scopes, whatever the rule says. "none" is an answer without
// scope and a token without restriction. "": the rule decides.
func (s *Server) SetTokenScope(scope string) { s.locked(func() { s.tokenScope = scope }) }

// oauthError is an error in OAuth's form.
func oauthError(status int, code, format string, args ...any) error {
	return &apiError{status: status, oauth: code, message: fmt.Sprintf(format, args...)}
}

// inOAuthForm is e as the token endpoint answers it.
func (e *apiError) inOAuthForm() *apiError {
	o := *e
	switch {
	case e.oauth != "":
	case e.status == 429:
		o.oauth = "temporarily_unavailable"
	case e.status >= 500:
		o.oauth = "server_error"
	default:
		o.oauth = "invalid_request"
	}
	return &o
}

// admitExchange is the part of admit for the token endpoint, which takes no key.
func (s *Server) admitExchange(in *incoming, rt *route) error {
	if _, there := in.header["Authorization"]; there {
		return oauthError(400, "invalid_request", "The token endpoint takes no Authorization header.")
	}
	return s.takeTokens(rt)
}

func (s *Server) exchangeToken(r *request) (any, error) {
	switch {
	case r.body["grant_type"] != grantType:
		return nil, oauthError(400, "unsupported_grant_type", "The grant_type must be %s.", grantType)
	case !slices.Contains(subjectTypes, r.body["subject_token_type"].(string)):
		return nil, oauthError(400, "invalid_request", "The subject_token_type must be one of %v.", subjectTypes)
	}
	p, err := find(s.providers, "workload identity provider", r.body["identity_provider_id"].(string))
	switch {
	case err != nil:
		return nil, oauthError(401, "invalid_client", "%s", err)
	case !p.Enabled:
		return nil, oauthError(403, "unauthorized_client", "The workload identity provider '%s' is disabled.", p.ID)
	}
	claims, life, err := p.verifyJWT(r.body["subject_token"].(string), r.now)
	if err != nil {
		return nil, err
	}
	life = min(life, tokenMaxLife).Truncate(time.Second)
	if life == 0 {
		return nil, badJWT("it has expired")
	}
	a := s.accounts[r.body["service_account_id"].(string)]
	if a == nil || a.deleted {
		return nil, oauthError(400, "invalid_target", "No such service account: '%s'.", r.body["service_account_id"])
	}
	var matching []*rule
	for _, rule := range p.rules {
		if rule.Enabled && rule.ServiceAccountID == a.ID && p.matches(rule, claims) {
			matching = append(matching, rule)
		}
	}
	if len(matching) != 1 {
		return nil, oauthError(403, "access_denied",
			"%d enabled federation rules for the service account match the subject token, not one.", len(matching))
	}
	return s.issue(a, matching[0], life, r.now), nil
}

// issue makes a token and the answer that has it.
func (s *Server) issue(a *account, r *rule, life time.Duration, now time.Time) map[string]any {
	scope := strings.Join(r.Scopes, " ")
	switch s.tokenScope {
	case "":
	case "none":
		scope = ""
	default:
		scope = s.tokenScope
	}
	id := must(s.newID("tok_", ""))
	segment := base64.RawURLEncoding.EncodeToString
	k := &key{
		ProjectKey: ProjectKey{
			ID: id, Name: r.ID, ServiceAccountID: a.ID, Scopes: strings.Fields(scope),
			Created: now, Expires: now.Add(life),
		},
		account: a, token: true,
		value: segment([]byte(`{"alg":"RS256","kid":"openaisim","typ":"JWT"}`)) + "." +
			segment(fmt.Appendf(nil, `{"jti":%q}`, id)) + "." + random(342), // as long as RS256's signature
	}
	s.values[k.value] = k
	s.tokens = append(s.tokens, k)
	v := map[string]any{
		"access_token": k.value, "issued_token_type": accessToken, "token_type": "Bearer",
		"expires_in": int(life / time.Second),
	}
	if scope != "" {
		v["scope"] = scope
	}
	return v
}

// permitModels returns the error of an access token whose scopes leave out models.
func (k *key) permitModels() error {
	named := func(scope string) bool { return slices.Contains(modelScopes, scope) }
	if len(k.Scopes) == 0 || slices.ContainsFunc(k.Scopes, named) {
		return nil
	}
	return &apiError{status: 403, code: "insufficient_permissions",
		message: "You have insufficient permissions for this operation. Missing scopes: api.model.read."}
}
