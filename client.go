// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
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
	attemptTimeout = 25 * time.Second // one HTTP exchange
	maxAttempts    = 4                // of one call, first one included; waits for a rate limit do not count
	minBackoff     = 500 * time.Millisecond
	maxBackoff     = 8 * time.Second
	maxPause       = 60 * time.Second // longest wait that a Retry-After can ask for
	maxAnswer      = 1 << 20          // bytes of an answer that are read
	maxCalls       = 64               // calls of one mount at once; Vault sends up to 200 revocations together
)

// client calls the OpenAI Admin API (https://platform.openai.com/docs/api-reference/administration)
// with one admin key. A change of config makes a new client.
type client struct {
	config    config
	http      *http.Client
	throttle  *throttle
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
func newClient(cfg *config, transport http.RoundTripper, t *throttle) *client {
	agent := "vault-plugin-secrets-openai"
	if version != "" {
		agent += "/" + version
	}
	return &client{
		config: *cfg,
		http: &http.Client{
			Transport: transport,
			// A redirect would carry the admin key to a host that nobody configured.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		throttle:  t,
		userAgent: agent,
	}
}

// throttle bounds the calls of one mount and makes them wait together when OpenAI
// says that its rate limit is reached.
type throttle struct {
	slots chan struct{} // one for each call under way

	mu    sync.Mutex
	until time.Time // no call starts before this time
}

func newThrottle() *throttle { return &throttle{slots: make(chan struct{}, maxCalls)} }

// acquire waits for a free place and for the end of a pause. Its error is ctx's.
func (t *throttle) acquire(ctx context.Context) error {
	select {
	case t.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	for {
		t.mu.Lock()
		wait := time.Until(t.until)
		t.mu.Unlock()
		if wait <= 0 {
			return nil
		}
		if err := sleep(ctx, wait); err != nil {
			t.release()
			return err
		}
	}
}

func (t *throttle) release() { <-t.slots }

// pause lets no call start for d.
func (t *throttle) pause(d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if until := time.Now().Add(d); until.After(t.until) {
		t.until = until
	}
}

// sleep waits for d, or returns ctx's error when ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
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
	if !errors.As(err, &e) {
		return false
	}
	for _, s := range statuses {
		if e.Status == s {
			return true
		}
	}
	return false
}

// isNotFound tells whether OpenAI itself says that the thing does not exist. The 404
// page of some other server, at a mistyped endpoint, does not count.
func isNotFound(err error) bool {
	var e *apiError
	return errors.As(err, &e) && e.Status == http.StatusNotFound && e.Type != ""
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
	return errors.Is(err, errNotConfigured) || isRefused(err) || errors.As(err, &t) && !t.sent
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
	method string
	path   string // escaped, below the endpoint
	in     any    // request body, marshalled for each attempt; nil: none
	out    any    // where the answer goes
	// repeatable: a second time does no harm, so that it is retried after any passing
	// fault. Other calls are repeated only when the first certainly was not done.
	repeatable bool
}

// do makes the call, waiting and retrying as long as ctx allows. Its errors are
// *apiError, *transportError and ctx's own.
func (c *client) do(ctx context.Context, op call) error {
	backoff := minBackoff
	for attempt := 1; ; attempt++ {
		err := c.attempt(ctx, op)
		if err == nil || ctx.Err() != nil {
			return err
		}
		// Half of the wait is random, so that callers do not come back in step.
		wait := backoff/2 + rand.N(backoff/2)
		var e *apiError
		if errors.As(err, &e) && e.retryAfter > 0 {
			wait = min(e.retryAfter, maxPause)
		}
		limited := isStatus(err, http.StatusTooManyRequests)
		if !op.retryable(err) || !limited && attempt >= maxAttempts {
			return err
		}
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
			return err
		}
		if limited {
			c.throttle.pause(wait)
			attempt--
		} else if err := sleep(ctx, wait); err != nil {
			return err
		}
		backoff = min(2*backoff, maxBackoff)
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
func (c *client) attempt(ctx context.Context, op call) error {
	if err := c.throttle.acquire(ctx); err != nil {
		return &transportError{text: "waiting to call OpenAI: " + err.Error(), err: err}
	}
	defer c.throttle.release()
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
				Code          any
			}
		}
		e.Message = http.StatusText(resp.StatusCode)
		if json.Unmarshal(raw, &body) == nil && body.Error.Message != "" {
			e.Message = c.clean(body.Error.Message)
			e.Type = c.clean(body.Error.Type)
			if code, ok := body.Error.Code.(string); ok {
				e.Code = c.clean(code)
			}
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
func invalid(what string) error {
	return &apiError{Status: http.StatusOK, Message: "the answer has no " + what}
}

// listAll calls visit for each entry of a list, over all its pages.
func listAll[T any](ctx context.Context, c *client, path string, visit func(T)) error {
	after := ""
	for {
		var page struct {
			Data    []T
			HasMore bool   `json:"has_more"`
			LastID  string `json:"last_id"`
		}
		query := "?limit=100"
		if after != "" {
			query += "&after=" + url.QueryEscape(after)
		}
		if err := c.do(ctx, call{method: http.MethodGet, path: path + query, out: &page, repeatable: true}); err != nil {
			return err
		}
		for _, entry := range page.Data {
			visit(entry)
		}
		if !page.HasMore {
			return nil
		}
		if page.LastID == "" || page.LastID == after {
			return invalid("last_id, though there are more pages")
		}
		after = page.LastID
	}
}

// remove deletes what is at path and checks that OpenAI says so.
func (c *client) remove(ctx context.Context, path string) error {
	var answer struct{ Deleted bool }
	if err := c.do(ctx, call{method: http.MethodDelete, path: path, out: &answer, repeatable: true}); err != nil {
		return err
	}
	if !answer.Deleted {
		return invalid("deleted: true")
	}
	return nil
}

// project is an OpenAI project.
type project struct {
	ID     string
	Name   string
	Status string // active or archived
}

func (c *client) getProject(ctx context.Context, id string) (*project, error) {
	p := &project{}
	err := c.do(ctx, call{method: http.MethodGet, path: apiPath("organization", "projects", id), out: p, repeatable: true})
	if err != nil {
		return nil, err
	}
	if p.ID != id {
		return nil, invalid("id of this project")
	}
	return p, nil
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
	Value     string
	ExpiresAt int64 `json:"expires_at"` // Unix seconds; 0: never
}

// serviceAccount is a service account of a project.
type serviceAccount struct {
	ID     string
	Name   string
	APIKey *apiKey `json:"api_key"`
}

// createServiceAccount makes an account with its first key, which OpenAI expires after
// expiresIn (whole seconds, at least one); 0: never. It is not repeatable: see notDone.
func (c *client) createServiceAccount(ctx context.Context, projectID, name string, expiresIn time.Duration) (*serviceAccount, error) {
	in := map[string]any{"name": name}
	if expiresIn > 0 {
		in["expires_in_seconds"] = int64(expiresIn / time.Second)
	}
	account := &serviceAccount{}
	err := c.do(ctx, call{
		method: http.MethodPost,
		path:   apiPath("organization", "projects", projectID, "service_accounts"),
		in:     in, out: account,
	})
	if err != nil {
		return nil, err
	}
	if !validID(account.ID) || account.APIKey == nil || !validID(account.APIKey.ID) || account.APIKey.Value == "" {
		return nil, invalid("service account with a key")
	}
	return account, nil
}

// serviceAccountsNamed returns the ids of the project's accounts with exactly this name.
func (c *client) serviceAccountsNamed(ctx context.Context, projectID, name string) ([]string, error) {
	var ids []string
	path := apiPath("organization", "projects", projectID, "service_accounts")
	err := listAll(ctx, c, path, func(a serviceAccount) {
		if a.Name == name && validID(a.ID) {
			ids = append(ids, a.ID)
		}
	})
	return ids, err
}

// deleteServiceAccount deletes an account and its keys. An account that is gone
// already, alone or with its project, is no error.
func (c *client) deleteServiceAccount(ctx context.Context, projectID, id string) error {
	err := c.remove(ctx, apiPath("organization", "projects", projectID, "service_accounts", id))
	if err == nil || isNotFound(err) || c.projectGone(ctx, projectID, err) {
		return nil
	}
	return err
}

// secondsUntil is a time that is sent as the whole seconds from now until then, so
// that a call which had to wait still names the same moment. At least 1.
type secondsUntil time.Time

func (t secondsUntil) MarshalJSON() ([]byte, error) {
	return strconv.AppendInt(nil, max(1, int64(time.Until(time.Time(t))/time.Second)), 10), nil
}

// setKeyExpiry moves the expiry of a project API key. A key that has expired already
// can't be updated.
func (c *client) setKeyExpiry(ctx context.Context, projectID, keyID string, at time.Time) error {
	key := &apiKey{}
	err := c.do(ctx, call{
		method: http.MethodPost,
		path:   apiPath("organization", "projects", projectID, "api_keys", keyID),
		in:     map[string]any{"expires_in_seconds": secondsUntil(at)}, out: key,
		repeatable: true,
	})
	if err == nil && key.ID != keyID {
		return invalid("id of this key")
	}
	return err
}

// adminKey is an admin API key. Value is there only in the answer to its creation.
type adminKey struct {
	ID            string
	Name          string
	Value         string
	RedactedValue string `json:"redacted_value"` // e.g. sk-admin...abc
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
	k := &adminKey{}
	err := c.do(ctx, call{method: http.MethodGet, path: apiPath("organization", "admin_api_keys", id), out: k, repeatable: true})
	if err != nil {
		return nil, err
	}
	if k.ID != id {
		return nil, invalid("id of this admin key")
	}
	return k, nil
}

// adminKeysWhere returns the ids of the organization's admin keys that match.
func (c *client) adminKeysWhere(ctx context.Context, match func(adminKey) bool) ([]string, error) {
	var ids []string
	err := listAll(ctx, c, apiPath("organization", "admin_api_keys"), func(k adminKey) {
		if match(k) && validID(k.ID) {
			ids = append(ids, k.ID)
		}
	})
	return ids, err
}

// createAdminKey makes an admin key. It is not repeatable: see notDone.
func (c *client) createAdminKey(ctx context.Context, name string) (*adminKey, error) {
	k := &adminKey{}
	err := c.do(ctx, call{
		method: http.MethodPost,
		path:   apiPath("organization", "admin_api_keys"),
		in:     map[string]any{"name": name}, out: k,
	})
	if err != nil {
		return nil, err
	}
	if !validID(k.ID) || k.Value == "" {
		return nil, invalid("admin key")
	}
	return k, nil
}

// deleteAdminKey deletes an admin key, which stops working at once. A key that is gone
// already is no error.
func (c *client) deleteAdminKey(ctx context.Context, id string) error {
	err := c.remove(ctx, apiPath("organization", "admin_api_keys", id))
	if isNotFound(err) {
		return nil
	}
	return err
}
