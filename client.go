// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode"
)

// Limits of the client. Vault cancels a request after 90 s (its default
// default_max_request_duration, and the deadline it gives a revocation), so
// requestTimeout, which backend.HandleRequest sets, leaves time to answer.
const (
	requestTimeout = 75 * time.Second // a Vault request, all its OpenAI calls and waits included
	undoTimeout    = 5 * time.Second  // of what is done after that to undo a create
	checkTimeout   = 40 * time.Second // what a write asks OpenAI before it stores
	attemptTimeout = 25 * time.Second // one HTTP exchange
	maxAttempts    = 4                // of one call, first one included; waits for a rate limit do not count
	minBackoff     = 500 * time.Millisecond
	maxBackoff     = 8 * time.Second
	maxPause       = 60 * time.Second       // longest wait that a Retry-After can ask for
	maxAnswer      = 1 << 20                // bytes of an answer that are read
	maxCalls       = 64                     // calls of one mount at once; Vault sends up to 200 revocations together
	minInterval    = 15 * time.Millisecond  // between attempts after a first refusal
	maxInterval    = 250 * time.Millisecond // slowest pace that is kept by itself
)

// client calls the OpenAI Admin API (https://platform.openai.com/docs/api-reference/administration)
// with one admin key. A change of config makes a new client.
type client struct {
	config    config
	http      *http.Client
	throttle  *throttle
	metrics   *metrics
	userAgent string

	// inflight counts the users of this client. backend.useClient adds to it while
	// the client is the current one; a rotation waits for it before it deletes the key.
	inflight sync.WaitGroup
	// projectNames caches the names of projects by id, for name templates.
	projectNames sync.Map
}

// newTransport returns the transport that all clients of a mount share, sized for
// many calls at once to one host. Proxies come from Vault's environment.
func newTransport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConns = maxCalls
	t.MaxIdleConnsPerHost = maxCalls
	t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	// A connection whose far end has vanished is found out before the next call hangs on it.
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second}
	return t
}

// newClient returns a client for cfg, which it copies.
func (b *backend) newClient(cfg *config) *client {
	agent := "vault-plugin-secrets-openai"
	if version != "" {
		agent += "/" + version
	}
	return &client{
		config: *cfg,
		http: &http.Client{
			Transport: b.transport,
			// A redirect would carry the admin key to a host that nobody configured.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		throttle:  b.throttle,
		metrics:   b.metrics,
		userAgent: agent,
	}
}

// throttle bounds the calls of one mount. When OpenAI says that its rate limit is
// reached, all of them wait together, and then go on in the order in which they came.
type throttle struct {
	slots chan struct{} // holds one for each call under way, its waits included
	gate  chan struct{} // holds one while a call waits for its turn; the next ones queue

	mu       sync.Mutex    // guards what follows
	until    time.Time     // end of the pause that OpenAI asked for
	interval time.Duration // between the starts of two attempts; 0 while there is no limit
}

func newThrottle() *throttle {
	return &throttle{slots: make(chan struct{}, maxCalls), gate: make(chan struct{}, 1)}
}

// acquire waits for a free slot. Its error is ctx's.
func (t *throttle) acquire(ctx context.Context) error {
	select {
	case t.slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t *throttle) release() { <-t.slots }

// turn waits until an attempt may start. Its error is ctx's.
func (t *throttle) turn(ctx context.Context) error {
	select {
	case t.gate <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-t.gate }()
	t.mu.Lock()
	wait := max(time.Until(t.until), t.interval)
	t.mu.Unlock()
	return sleep(ctx, wait)
}

// passed counts an attempt that met no rate limit: the pace quickens.
func (t *throttle) passed() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.interval -= t.interval / 50; t.interval < time.Millisecond {
		t.interval = 0
	}
}

// limited pauses all calls for d and slows the pace, once for a pause.
func (t *throttle) limited(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if now.After(t.until) {
		t.interval = min(max(2*t.interval, minInterval), maxInterval)
	}
	if until := now.Add(d); until.After(t.until) {
		t.until = until
	}
}

// sleep waits for d, or returns ctx's error when ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// apiError is an answer of OpenAI that is not the one asked for. Its texts come from
// OpenAI's error object, cut and with keys masked; it never holds a body.
// https://platform.openai.com/docs/guides/error-codes
type apiError struct {
	Status    int    // HTTP status; 2xx when the answer could not be used
	Type      string // e.g. invalid_request_error; empty when the answer was not in OpenAI's form
	Code      string // e.g. invalid_api_key; may be empty
	Param     string // the request's field that is at fault; may be empty
	Message   string
	RequestID string // x-request-id, which OpenAI's support asks for

	retryAfter  time.Duration // what OpenAI asked to wait; 0: nothing
	shouldRetry string        // x-should-retry: "true", "false" or empty
}

func (e *apiError) Error() string {
	text := fmt.Sprintf("OpenAI answered %d", e.Status)
	if e.Code != "" {
		text += " " + e.Code
	}
	text += ": " + e.Message
	if e.RequestID != "" {
		text += " (request id " + e.RequestID + ")"
	}
	return text
}

// transportError is an exchange that brought no whole answer.
type transportError struct {
	text string // with keys masked
	err  error
	sent bool // whether OpenAI may have got the request
}

func (e *transportError) Error() string { return e.text }
func (e *transportError) Unwrap() error { return e.err }

// isStatus tells whether err is OpenAI's answer with one of the statuses.
func isStatus(err error, statuses ...int) bool {
	var e *apiError
	return errors.As(err, &e) && slices.Contains(statuses, e.Status)
}

// isNotFound tells whether OpenAI itself says that the thing does not exist. At a mistyped
// endpoint neither the page of some other server nor OpenAI's "Invalid URL" counts.
func isNotFound(err error) bool {
	var e *apiError
	return errors.As(err, &e) && e.Status == http.StatusNotFound && e.Type != "" && !strings.HasPrefix(e.Message, "Invalid URL")
}

// isRefused tells whether OpenAI judged the request itself and did not carry it out.
func isRefused(err error) bool {
	var e *apiError
	return errors.As(err, &e) && e.Status >= 400 && e.Status < 500 &&
		!isStatus(err, http.StatusRequestTimeout, http.StatusConflict)
}

// notDone tells whether a failed create certainly had no effect at OpenAI.
func notDone(err error) bool {
	var t *transportError
	return errors.Is(err, errNotConfigured) || errors.Is(err, errOtherOrganization) || isRefused(err) || errors.As(err, &t) && !t.sent
}

var (
	keyPattern = regexp.MustCompile(`sk-[^\s"',;]+`)
	idPattern  = regexp.MustCompile(`^[A-Za-z0-9_-]{1,128}$`)
)

// validID tells whether id may go into a URL and into storage.
func validID(id string) bool { return idPattern.MatchString(id) }

// clean makes text from outside fit for an error or a log: keys are masked, control
// characters dropped, and no more than 500 bytes kept.
func (c *client) clean(text string) string {
	text = strings.ReplaceAll(text, c.config.AdminAPIKey, "sk-***")
	text = keyPattern.ReplaceAllString(text, "sk-***")
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, text)
	if len(text) > 500 {
		text = strings.ToValidUTF8(text[:500], "") + "…"
	}
	return text
}

// call is one operation of the Admin API.
type call struct {
	name   string // as metrics show it
	method string
	path   string // escaped, below the endpoint
	in     any    // request body, marshalled for each attempt; nil: none
	out    any    // where the answer goes
	// repeatable: a second time does no harm, so that it is retried after any passing
	// fault. Other calls are repeated only when the first certainly was not done.
	repeatable bool
}

// do makes the call, waiting and retrying as long as ctx allows. Its errors are
// *apiError and *transportError.
func (c *client) do(ctx context.Context, op call) error {
	waiting := func(what string, err error) error {
		return &transportError{text: "waiting for " + what + ": " + err.Error(), err: err}
	}
	if err := c.throttle.acquire(ctx); err != nil {
		return waiting("other calls to OpenAI", err)
	}
	defer c.throttle.release()
	var last error
	backoff := minBackoff
	for attempt := 1; ; attempt++ {
		start := time.Now()
		if err := c.throttle.turn(ctx); err != nil {
			return cmp.Or(last, waiting("OpenAI's rate limit", err))
		}
		if waited := time.Since(start); waited > time.Millisecond {
			c.metrics.add(metricRateLimitWait, waited.Seconds())
		}
		err := c.attempt(ctx, op)
		if err == nil || ctx.Err() != nil {
			return err
		}
		// Half of the wait is random, so that callers do not come back in step.
		wait, reason := backoff/2+rand.N(backoff/2), "connection" // #nosec G404 -- no secret depends on it
		var e *apiError
		if errors.As(err, &e) {
			reason = strconv.Itoa(e.Status)
			if e.retryAfter > 0 {
				wait = e.retryAfter
			}
		}
		limited := isStatus(err, http.StatusTooManyRequests)
		if limited {
			c.throttle.limited(wait)
		}
		deadline, bounded := ctx.Deadline()
		switch {
		case !op.retryable(err), !limited && attempt >= maxAttempts, bounded && time.Until(deadline) < wait:
			return err
		case limited:
			attempt--
		case sleep(ctx, wait) != nil:
			return err
		}
		last, backoff = err, min(2*backoff, maxBackoff)
		c.metrics.add(metricRetries, 1, "reason", reason)
	}
}

// retryable tells whether the call may be made again after err: the rules of
// OpenAI's own libraries, but what is not repeatable only if it was not done.
func (op call) retryable(err error) bool {
	var t *transportError
	if errors.As(err, &t) {
		return op.repeatable || !t.sent
	}
	var e *apiError
	if !errors.As(err, &e) || e.shouldRetry == "false" {
		return false
	}
	if e.Status == http.StatusTooManyRequests {
		return true
	}
	return op.repeatable && (e.shouldRetry == "true" || e.Status >= 500 ||
		e.Status == http.StatusRequestTimeout || e.Status == http.StatusConflict)
}

// attempt makes one HTTP exchange.
func (c *client) attempt(ctx context.Context, op call) (err error) {
	start, status := time.Now(), "error"
	defer func() {
		c.metrics.add(metricRequests, 1, "operation", op.name, "status", status)
		c.metrics.observe(op.name, time.Since(start))
	}()
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()

	var body io.Reader
	if op.in != nil {
		raw, err := json.Marshal(op.in)
		if err != nil {
			return fmt.Errorf("encoding request: %w", err)
		}
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, op.method, c.config.APIEndpoint+op.path, body)
	if err != nil {
		return fmt.Errorf("making request: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+c.config.AdminAPIKey)
	req.Header.Set("OpenAI-Organization", c.config.OrganizationID)
	req.Header.Set("User-Agent", c.userAgent)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}

	resp, err := c.http.Do(req)
	if err != nil {
		return c.transportError(err)
	}
	defer resp.Body.Close()
	status = strconv.Itoa(resp.StatusCode)
	if resp.StatusCode != http.StatusTooManyRequests {
		c.throttle.passed()
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return c.transportError(err)
	}
	return c.answer(resp, raw, op.out)
}

// transportError describes err, the failure of an exchange, without the request's URL.
func (c *client) transportError(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var n *net.OpError
	dialing := errors.As(err, &n) && n.Op == "dial"
	text := "no answer from " + c.config.APIEndpoint + ": "
	if errors.Is(err, context.DeadlineExceeded) {
		text += "timed out"
	} else {
		text += c.clean(err.Error())
	}
	return &transportError{text: text, err: err, sent: !dialing}
}

// answer decodes a whole answer into out, or returns it as an *apiError.
func (c *client) answer(resp *http.Response, raw []byte, out any) error {
	e := &apiError{
		Status:      resp.StatusCode,
		RequestID:   c.clean(resp.Header.Get("X-Request-Id")),
		retryAfter:  retryAfter(resp.Header),
		shouldRetry: resp.Header.Get("X-Should-Retry"),
	}
	switch {
	case len(raw) > maxAnswer:
		e.Message = "the answer is larger than 1 MiB"
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		e.Message = "redirects are not followed; check api_endpoint"
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		var body struct {
			Error struct {
				Message, Type string
				Code, Param   any
			}
		}
		e.Message = http.StatusText(resp.StatusCode)
		if json.Unmarshal(raw, &body) == nil && body.Error.Message != "" {
			e.Message = c.clean(body.Error.Message)
			e.Type = c.clean(body.Error.Type)
			code, _ := body.Error.Code.(string)
			param, _ := body.Error.Param.(string)
			e.Code, e.Param = c.clean(code), c.clean(param)
		}
	case json.Unmarshal(raw, out) != nil:
		// The decoder's error would quote the answer.
		e.Message = "the answer is not the JSON that was expected"
	default:
		return nil
	}
	return e
}

// retryAfter reads how long to wait from Retry-After-Ms (milliseconds) or Retry-After
// (seconds or an HTTP date); 0 when there is nothing sensible.
func retryAfter(h http.Header) time.Duration {
	var wait float64 // seconds
	if ms, err := strconv.ParseFloat(h.Get("Retry-After-Ms"), 64); err == nil {
		wait = ms / 1000
	} else if s, err := strconv.ParseFloat(h.Get("Retry-After"), 64); err == nil {
		wait = s
	} else if date, err := http.ParseTime(h.Get("Retry-After")); err == nil {
		wait = time.Until(date).Seconds()
	}
	if !(wait > 0) { // also when it is NaN
		return 0
	}
	return time.Duration(min(wait, maxPause.Seconds()) * float64(time.Second))
}

// apiPath joins the segments to an escaped path below the endpoint.
func apiPath(segments ...string) string {
	var path strings.Builder
	for _, s := range segments {
		path.WriteString("/" + url.PathEscape(s))
	}
	return path.String()
}

// invalid returns the error for a successful answer that lacks what it must hold.
func invalid(op string) error {
	return &apiError{Status: http.StatusOK, Message: "the answer to " + op + " lacks what it must hold"}
}

// ask makes the call and returns its answer, which must be valid.
func ask[T any](ctx context.Context, c *client, op call, valid func(*T) bool) (*T, error) {
	answer := new(T)
	op.out = answer
	err := c.do(ctx, op)
	if err == nil && !valid(answer) {
		err = invalid(op.name)
	}
	return answer, err
}

// listAll returns the entries of a list that are wanted, from all its pages. query is made its own.
func listAll[T any](ctx context.Context, c *client, name, path string, query url.Values, wanted func(T) bool) (entries []T, err error) {
	query.Set("limit", "100")
	for {
		var page struct {
			Data    []T
			HasMore bool   `json:"has_more"`
			LastID  string `json:"last_id"`
		}
		if err := c.do(ctx, call{name: name, method: http.MethodGet, path: path + "?" + query.Encode(), out: &page, repeatable: true}); err != nil {
			return nil, err
		}
		for _, entry := range page.Data {
			if wanted(entry) {
				entries = append(entries, entry)
			}
		}
		if !page.HasMore {
			return entries, nil
		}
		if page.LastID == "" || page.LastID == query.Get("after") {
			return nil, invalid(name)
		}
		query.Set("after", page.LastID)
	}
}

// remove deletes what is at path and checks that OpenAI says so. What is gone already
// is no error.
func (c *client) remove(ctx context.Context, name, path string) error {
	type answer struct{ Deleted bool }
	_, err := ask(ctx, c, call{name: name, method: http.MethodDelete, path: path, repeatable: true},
		func(a *answer) bool { return a.Deleted })
	if isNotFound(err) {
		return nil
	}
	return err
}

// expiring adds a key's expiry to the body of its creation. OpenAI counts whole seconds,
// at least one; 0: the key never expires.
func expiring(in map[string]any, expiresIn time.Duration) map[string]any {
	if expiresIn > 0 {
		in["expires_in_seconds"] = int64(expiresIn / time.Second)
	}
	return in
}

const adminKeysPath = "/organization/admin_api_keys"

func projectPath(id string, segments ...string) string {
	return apiPath(append([]string{"organization", "projects", id}, segments...)...)
}

// project is an OpenAI project.
type project struct {
	ID     string
	Name   string
	Status string // active or archived
}

func (c *client) getProject(ctx context.Context, id string) (*project, error) {
	return ask(ctx, c, call{name: "get_project", method: http.MethodGet, path: projectPath(id), repeatable: true},
		func(p *project) bool { return p.ID == id })
}

// projectName returns a project's name, from memory after the first call.
func (c *client) projectName(ctx context.Context, id string) (string, error) {
	if name, ok := c.projectNames.Load(id); ok {
		return name.(string), nil
	}
	p, err := c.getProject(ctx, id)
	if err != nil {
		return "", err
	}
	c.projectNames.Store(id, p.Name)
	return p.Name, nil
}

// projectGone tells whether err, of a call inside the project, means that the project
// was archived or does not exist. Service accounts do not outlive their project.
func (c *client) projectGone(ctx context.Context, id string, err error) bool {
	if !isRefused(err) || isStatus(err, http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests) {
		return false
	}
	p, err := c.getProject(ctx, id)
	return isNotFound(err) || err == nil && p.Status == "archived"
}

// apiKey is a project API key. Value is there only in the answer to its creation.
type apiKey struct {
	ID        string
	Name      string
	Value     string
	ExpiresAt int64 `json:"expires_at"` // Unix seconds; 0: never
	Owner     struct {
		ServiceAccount struct{ ID string } `json:"service_account"`
	}
}

// created tells whether the answer to a creation holds all that it must.
func (k *apiKey) created() bool { return k != nil && validID(k.ID) && k.Value != "" }

// serviceAccount is a service account of a project.
type serviceAccount struct {
	ID     string
	Name   string
	Role   string  // owner, member or none
	APIKey *apiKey `json:"api_key"` // only in the answer to a creation with a key
}

// createServiceAccount makes an account with its first key or, when keyless, one that has
// neither a key nor a role. It is not repeatable: see notDone.
func (c *client) createServiceAccount(ctx context.Context, projectID, name string, keyless bool, expiresIn time.Duration) (*serviceAccount, error) {
	in := expiring(map[string]any{"name": name}, expiresIn)
	if keyless {
		in = map[string]any{"name": name, "create_service_account_only": true}
	}
	return ask(ctx, c, call{name: "create_service_account", method: http.MethodPost, path: projectPath(projectID, "service_accounts"), in: in},
		func(a *serviceAccount) bool { return validID(a.ID) && (keyless || a.APIKey.created()) })
}

func (c *client) getServiceAccount(ctx context.Context, projectID, id string) (*serviceAccount, error) {
	return ask(ctx, c, call{name: "get_service_account", method: http.MethodGet, path: projectPath(projectID, "service_accounts", id), repeatable: true},
		func(a *serviceAccount) bool { return a.ID == id })
}

// setServiceAccountRole gives an account a role: member or owner.
func (c *client) setServiceAccountRole(ctx context.Context, projectID, id, role string) error {
	_, err := ask(ctx, c, call{
		name: "update_service_account", method: http.MethodPost, path: projectPath(projectID, "service_accounts", id),
		in: map[string]any{"role": role}, repeatable: true,
	}, func(a *serviceAccount) bool { return a.Role == role })
	return err
}

// createAPIKey makes a key of an account, restricted to scopes unless there are none. It
// is not repeatable: see notDone.
func (c *client) createAPIKey(ctx context.Context, projectID, accountID, name string, scopes []string, expiresIn time.Duration) (*apiKey, error) {
	in := expiring(map[string]any{"name": name}, expiresIn)
	if len(scopes) > 0 {
		in["scopes"] = scopes
	}
	return ask(ctx, c, call{name: "create_api_key", method: http.MethodPost, path: projectPath(projectID, "service_accounts", accountID, "api_keys"), in: in},
		(*apiKey).created)
}

// credentialsNamed returns what there is of exactly these names: the project's accounts or,
// where accountID is given, that account's keys.
func (c *client) credentialsNamed(ctx context.Context, projectID, accountID string, names []string) (found []lease, err error) {
	if accountID == "" {
		accounts, err := listAll(ctx, c, "list_service_accounts", projectPath(projectID, "service_accounts"), url.Values{},
			func(a serviceAccount) bool { return slices.Contains(names, a.Name) && validID(a.ID) })
		for _, a := range accounts {
			found = append(found, lease{ProjectID: projectID, ServiceAccountID: a.ID})
		}
		return found, err
	}
	// Unless asked for any, keys of accounts without a role may be left out.
	keys, err := listAll(ctx, c, "list_api_keys", projectPath(projectID, "api_keys"), url.Values{"owner_project_access": {"any"}},
		func(k apiKey) bool {
			return slices.Contains(names, k.Name) && k.Owner.ServiceAccount.ID == accountID && validID(k.ID)
		})
	for _, k := range keys {
		found = append(found, lease{ProjectID: projectID, ServiceAccountID: accountID, APIKeyID: k.ID, KeyOnly: true})
	}
	return found, err
}

// deleteCredential deletes an account with its keys, or a key alone. What is gone already,
// alone or with its project, is no error.
func (c *client) deleteCredential(ctx context.Context, l *lease) error {
	name, kind := "delete_service_account", "service_accounts"
	if l.KeyOnly {
		name, kind = "delete_api_key", "api_keys"
	}
	err := c.remove(ctx, name, projectPath(l.ProjectID, kind, l.key()))
	if c.projectGone(ctx, l.ProjectID, err) {
		return nil
	}
	return err
}

// keyLife is sent as the whole seconds that a key lives on, counted when it is sent, so that
// a call which had to wait asks for no less: ttl, but not past until. At least 1.
type keyLife struct {
	ttl   time.Duration
	until time.Time
}

func (l keyLife) MarshalJSON() ([]byte, error) {
	return strconv.AppendInt(nil, max(1, int64(min(l.ttl, time.Until(l.until))/time.Second)), 10), nil
}

// setKeyLife moves the expiry of a project API key. A key that has expired already can't be
// updated.
func (c *client) setKeyLife(ctx context.Context, projectID, keyID string, life keyLife) error {
	_, err := ask(ctx, c, call{
		name: "update_api_key", method: http.MethodPost, path: projectPath(projectID, "api_keys", keyID),
		in: map[string]any{"expires_in_seconds": life}, repeatable: true,
	}, func(k *apiKey) bool { return k.ID == keyID })
	return err
}

// adminKey is an admin API key. Value is there only in the answer to its creation.
type adminKey struct {
	ID            string
	Name          string
	Value         string
	RedactedValue string `json:"redacted_value"` // e.g. sk-admin...abc
	ExpiresAt     int64  `json:"expires_at"`     // Unix seconds; 0: never
}

// fits tells whether key can be the one that the redacted value stands for: the value
// shows how the key begins and ends, with dots or asterisks between.
func (k adminKey) fits(key string) bool {
	i, j := strings.IndexAny(k.RedactedValue, ".*"), strings.LastIndexAny(k.RedactedValue, ".*")
	if i < 0 || j == len(k.RedactedValue)-1 {
		return false
	}
	head, tail := k.RedactedValue[:i], k.RedactedValue[j+1:]
	return len(key) >= len(head)+len(tail) && strings.HasPrefix(key, head) && strings.HasSuffix(key, tail)
}

func (c *client) getAdminKey(ctx context.Context, id string) (*adminKey, error) {
	return ask(ctx, c, call{name: "get_admin_api_key", method: http.MethodGet, path: adminKeysPath + apiPath(id), repeatable: true},
		func(k *adminKey) bool { return k.ID == id })
}

// adminKeysWhere returns the organization's admin keys that match.
func (c *client) adminKeysWhere(ctx context.Context, match func(adminKey) bool) ([]adminKey, error) {
	return listAll(ctx, c, "list_admin_api_keys", adminKeysPath, url.Values{}, func(k adminKey) bool { return match(k) && validID(k.ID) })
}

// createAdminKey makes an admin key. It is not repeatable: see notDone.
func (c *client) createAdminKey(ctx context.Context, name string, expiresIn time.Duration) (*adminKey, error) {
	return ask(ctx, c, call{name: "create_admin_api_key", method: http.MethodPost, path: adminKeysPath, in: expiring(map[string]any{"name": name}, expiresIn)},
		func(k *adminKey) bool { return validID(k.ID) && k.Value != "" })
}

// deleteAdminKey deletes an admin key, which stops working at once. A key that is gone
// already is no error.
func (c *client) deleteAdminKey(ctx context.Context, id string) error {
	return c.remove(ctx, "delete_admin_api_key", adminKeysPath+apiPath(id))
}
