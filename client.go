// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"

	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/logical"
)

// Limits of the client.
const (
	checkTimeout = 40 * time.Second // what a write asks OpenAI before it stores
	maxAttempts  = 4                // of one call, first one included; waits for a rate limit do not count
	minBackoff   = 500 * time.Millisecond
	maxBackoff   = 8 * time.Second
	maxPause     = 60 * time.Second       // longest wait that a Retry-After can ask for
	maxAnswer    = 1 << 20                // bytes of an answer that are read
	maxFound     = 32 << 20               // bytes of a list that are kept: some 50,000 entries
	maxCalls     = 64                     // of one throttle at once; Vault sends up to 200 revocations together
	firstCalls   = 16                     // calls of an endpoint at once until it has answered some
	minInterval  = 15 * time.Millisecond  // between attempts after a first refusal
	maxInterval  = 250 * time.Millisecond // slowest pace that is kept by itself
	minUntold    = 4 * time.Second        // first pause where OpenAI refuses without saying for how long
	maxUntold    = 12 * time.Second       // longest one: six pauses last a minute, after which there may be eight calls
	slowTime     = 10 * time.Minute       // so long after such a pause an endpoint gets one call at a time
)

// client calls the OpenAI Admin API (https://platform.openai.com/docs/api-reference/administration) with one admin
// key. A change of config makes a new client.
type client struct {
	config       config
	http         *http.Client
	throttle     *throttle
	metrics      *metrics
	projectNames sync.Map // names of projects by id, for name templates
}

// newTransport returns the transport that all clients of a mount share, sized for many calls at once to one host.
// Proxies come from Vault's environment.
func newTransport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConns = maxCalls
	t.MaxIdleConnsPerHost = maxCalls
	t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	t.OnProxyConnectResponse = func(_ context.Context, _ *url.URL, _ *http.Request, answer *http.Response) error {
		if answer.StatusCode != http.StatusOK {
			return fmt.Errorf("the proxy answered %d", answer.StatusCode)
		}
		return nil
	}
	// A connection whose far end has vanished is found out before the next call hangs on it.
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 10 * time.Second}
	return t
}

// throttle bounds the calls of one mount to the Admin API, or those of one signer to the token endpoint. OpenAI limits
// the rate of each endpoint by itself, and so each has a lane.
type throttle struct {
	slots chan struct{} // holds one for each exchange under way
	mu    sync.Mutex
	lanes map[string]*lane // by the call's name. Guarded by mu.
}

func newThrottle() *throttle {
	return &throttle{slots: make(chan struct{}, maxCalls), lanes: map[string]*lane{}}
}

// lane returns the lane of an endpoint.
func (t *throttle) lane(name string) *lane {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.lanes[name] == nil {
		l := &lane{slots: make(chan struct{}, maxCalls), gate: make(chan struct{}, 1), calls: firstCalls}
		for range maxCalls - firstCalls {
			l.slots <- struct{}{}
		}
		t.lanes[name] = l
	}
	return t.lanes[name]
}

// lane is the queue of an endpoint's calls. When OpenAI says that its rate limit is reached, they wait together, and
// then go on in the order in which they came.
type lane struct {
	slots chan struct{} // holds one for each call under way, and for each that may not be yet
	gate  chan struct{} // holds one while a call waits for its turn or, if untold, for its answer; the next ones queue

	mu       sync.Mutex    // guards what follows
	calls    int           // that may be under way: one more for each answer while others wait, up to maxCalls
	until    time.Time     // end of the pause
	slowed   time.Time     // when the pace was last slowed
	interval time.Duration // between the starts of two attempts; 0 while there is no limit
	untold   time.Duration // the last pause of which OpenAI did not say how long it must be; 0: none lately
}

// turn waits until an attempt may start. held tells that the caller kept the gate, and so its place at the head of the
// queue; keeps, that it has the gate until the attempt is answered. Its error is ctx's.
func (l *lane) turn(ctx context.Context, held bool) (keeps bool, err error) {
	if !held {
		if err := put(ctx, l.gate); err != nil {
			return false, err
		}
	}
	l.mu.Lock()
	if time.Since(l.until) > time.Minute {
		l.interval = 0
	}
	if time.Since(l.until) > slowTime {
		l.untold = 0
	}
	wait := max(time.Until(l.until), l.interval)
	l.mu.Unlock()
	for err = sleep(ctx, wait); err == nil; err = sleep(ctx, wait) { // the pause may have become longer
		l.mu.Lock()
		wait = time.Until(l.until)
		slow := l.untold > 0
		l.mu.Unlock()
		if wait <= 0 {
			if !slow {
				<-l.gate
			}
			return slow, nil
		}
	}
	<-l.gate
	return false, err
}

// noTurn returns the error of a call whose time was up, with err, before its turn came: what it waited for.
func (l *lane) noTurn(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	cause := errOtherCalls
	if time.Since(l.until) < time.Minute {
		cause = errRateLimit
	}
	return &apiError{Message: cause.Error() + ": " + err.Error(), err: cause}
}

// passed counts an attempt that met no rate limit: the pace quickens.
func (l *lane) passed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.calls < maxCalls && len(l.slots) == maxCalls && l.untold == 0 {
		l.calls++
		<-l.slots
	}
	if l.interval -= l.interval / 50; l.interval < time.Millisecond {
		l.interval = 0
	}
}

// limited pauses the lane after the refusal of an attempt that began at start, for as long as OpenAI told (0: it did
// not), and slows the pace, once for all attempts that had begun by then.
func (l *lane) limited(start time.Time, told time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if start.After(l.slowed) {
		l.slowed = time.Now()
		l.interval = min(max(2*l.interval, minInterval), maxInterval)
		if told == 0 {
			l.untold = min(max(2*l.untold, minUntold), maxUntold)
		}
	}
	if until := time.Now().Add(cmp.Or(told, l.untold)); until.After(l.until) {
		l.until = until
	}
}

// put puts an element into a channel. Its error is ctx's.
func put(ctx context.Context, to chan<- struct{}) error {
	select {
	case to <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// sleep waits for d, or returns ctx's error when ctx ends first.
func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// apiError is an error answer from OpenAI, or the lack of an answer. Its texts come from OpenAI's error object, cut
// and with keys masked; it never holds a body. https://platform.openai.com/docs/guides/error-codes
type apiError struct {
	Status    int    // HTTP status; 2xx: the answer could not be used; 0: there was no whole answer
	Type      string // e.g. invalid_request_error; empty when the answer was not in OpenAI's form
	Code      string // e.g. invalid_api_key; may be empty
	Param     string // the request's field that is at fault; may be empty
	Message   string
	RequestID string // x-request-id, which OpenAI's support asks for

	sent        bool          // with status 0: OpenAI may have got the request
	err         error         // with status 0: what ended the exchange
	retryAfter  time.Duration // what OpenAI asked to wait; 0: nothing
	shouldRetry string        // x-should-retry: "true", "false" or empty
}

func (e *apiError) Error() string {
	if e.Status == 0 {
		return e.Message
	}
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

func (e *apiError) Unwrap() error { return e.err }

// isStatus tells whether err is OpenAI's answer with one of the statuses.
func isStatus(err error, statuses ...int) bool {
	e, ok := errors.AsType[*apiError](err)
	return ok && slices.Contains(statuses, e.Status)
}

// isNotFound tells whether OpenAI itself says that the thing does not exist. At a mistyped endpoint neither the page
// of some other server nor OpenAI's "Invalid URL" counts.
func isNotFound(err error) bool {
	e, ok := errors.AsType[*apiError](err)
	return ok && e.Status == http.StatusNotFound && e.Type != "" &&
		!strings.HasPrefix(e.Message, "Invalid URL")
}

// isRefused tells whether OpenAI judged the request itself and did not carry it out.
func isRefused(err error) bool {
	e, ok := errors.AsType[*apiError](err)
	return ok && e.Status >= 400 && e.Status < 500 &&
		!isStatus(err, http.StatusRequestTimeout, http.StatusConflict)
}

// isJudged tells whether OpenAI refused what the request asks for: not who asks, nor how often.
func isJudged(err error) bool {
	return isRefused(err) &&
		!isStatus(err, http.StatusUnauthorized, http.StatusForbidden, http.StatusTooManyRequests)
}

// Errors of useClient, before OpenAI is asked.
var (
	errNotConfigured     = errutil.UserError{Err: "the OpenAI secrets engine is not configured: write config first"}
	errOtherOrganization = errors.New("config has another organization than")
)

// notDone tells whether a create that failed certainly had no effect at OpenAI. Errors of another type are useClient's.
func notDone(err error) bool {
	e, ok := errors.AsType[*apiError](err)
	return err != nil && (!ok || isRefused(err) || e.Status == 0 && !e.sent)
}

var (
	keyPattern = regexp.MustCompile(`sk-[^\s"',;]+|eyJ[\w.-]+`) // keys and JWTs
	pemPattern = regexp.MustCompile(`(?s)-----BEGIN.*`)
	// certificateRefused is how a TLS 1.3 handshake fails that a server ends after we have sent, before it reads that.
	certificateRefused = regexp.MustCompile(`remote error: tls: .*certificate|client conn could not be established`)
)

// clean makes text from outside fit for an error or a log: keys are masked, control characters dropped, and no more
// than 500 bytes kept.
func (c *client) clean(text string) string {
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return -1
		}
		return r
	}, text)
	if c.config.AdminAPIKey != "" {
		text = strings.ReplaceAll(text, c.config.AdminAPIKey, "sk-***")
	}
	text = keyPattern.ReplaceAllString(text, "sk-***")
	text = pemPattern.ReplaceAllString(text, "PEM-***")
	if len(text) > 500 {
		text = strings.ToValidUTF8(text[:500], "") + "…"
	}
	return text
}

// call is one operation of the Admin API.
type call struct {
	name   string // as metrics show it
	method string
	path   string         // escaped, below the endpoint
	in     map[string]any // request body; nil: none
	out    any            // where the answer goes
	date   *time.Time     // where the answer's Date goes, zero if it has none; nil: it is not wanted
	// repeatable: a second time does no harm, so that it is retried after any passing fault. Other calls are repeated
	// only when the first certainly was not done.
	repeatable bool
}

// get is a call that reads.
func get(name, path string) call {
	return call{name: name, method: http.MethodGet, path: path, repeatable: true}
}

// post is a call that makes or changes something. One that makes something is not repeatable: see notDone.
func post(name, path string, in map[string]any) call {
	return call{name: name, method: http.MethodPost, path: path, in: in}
}

// What a call waited for that had no turn in its request's time.
var (
	errRateLimit  = errors.New("waiting for OpenAI's rate limit")
	errOtherCalls = errors.New("waiting for other calls to OpenAI")
)

// do makes the call, waiting and retrying as long as ctx allows. Its errors are of type *apiError.
func (c *client) do(ctx context.Context, op call) error {
	l := c.throttle.lane(op.name)
	if err := put(ctx, l.slots); err != nil {
		return l.noTurn(err)
	}
	defer func() { <-l.slots }()
	backoff, held := minBackoff, false
	release := func() {
		if held {
			<-l.gate
		}
		held = false
	}
	defer release()
	for attempts := 0; ; {
		start := time.Now()
		var err error
		if held, err = l.turn(ctx, held); err != nil {
			return l.noTurn(err)
		}
		if waited := time.Since(start); waited > time.Millisecond {
			c.metrics.add("api_rate_limit_wait_seconds_total", waited.Seconds())
		}
		err = c.attempt(ctx, l, op)
		limited := isStatus(err, http.StatusTooManyRequests)
		if !limited {
			attempts++
			release()
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
		// Half of the wait is random, so that callers do not come back in step.
		wait, reason := backoff/2+rand.N(backoff/2), "connection" // #nosec G404 -- no secret depends on it
		if e, ok := errors.AsType[*apiError](err); ok && e.Status != 0 {
			reason = strconv.Itoa(e.Status)
			wait = cmp.Or(e.retryAfter, wait)
		}
		deadline, bounded := ctx.Deadline()
		switch {
		case !op.retryable(err), attempts >= maxAttempts, bounded && time.Until(deadline) < wait:
			return err
		case !limited && sleep(ctx, wait) != nil:
			return err
		}
		backoff = min(2*backoff, maxBackoff)
		c.metrics.add("api_retries_total", 1, "reason", reason)
	}
}

// retryable tells whether the call may be made again after err: the rules of OpenAI's own libraries, but what is not
// repeatable only if it was not done.
func (op call) retryable(err error) bool {
	e, ok := errors.AsType[*apiError](err)
	switch {
	case !ok || e.shouldRetry == "false":
		return false
	case e.Status == 0:
		return op.repeatable || !e.sent
	case e.Status == http.StatusTooManyRequests:
		return true
	}
	return op.repeatable && (e.shouldRetry == "true" || e.Status >= 500 ||
		e.Status == http.StatusRequestTimeout || e.Status == http.StatusConflict)
}

// request makes the HTTP request of a call.
func (c *client) request(ctx context.Context, op call) (*http.Request, error) {
	var body io.Reader
	if op.in != nil {
		raw, _ := json.Marshal(op.in) // strings, numbers and lists can always be encoded
		body = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, op.method, c.config.APIEndpoint+op.path, body)
	if err != nil {
		return nil, err
	}
	if c.config.AdminAPIKey != "" { // the token endpoint takes none
		req.Header.Set("Authorization", "Bearer "+c.config.AdminAPIKey)
		req.Header.Set("OpenAI-Organization", c.config.OrganizationID)
	}
	req.Header.Set("User-Agent", strings.TrimSuffix("vault-plugin-secrets-openai/"+version, "/"))
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	return req, nil
}

// attempt makes one HTTP exchange in its lane.
func (c *client) attempt(ctx context.Context, l *lane, op call) (err error) {
	if err := put(ctx, c.throttle.slots); err != nil {
		return l.noTurn(err)
	}
	defer func() { <-c.throttle.slots }()
	start, status := time.Now(), "error"
	defer func() {
		c.metrics.add("api_requests_total", 1, "operation", op.name, "status", status)
		c.metrics.observe(op.name, time.Since(start))
	}()
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()

	req, err := c.request(ctx, op)
	if err != nil {
		return &apiError{Message: "making the request failed", err: err}
	}
	sent := false // before there is a connection, through proxy and TLS, nothing is
	var wrote atomic.Bool
	trace := &httptrace.ClientTrace{
		GetConn:      func(string) { sent = false }, // again, when the one that it got was dead
		GotConn:      func(httptrace.GotConnInfo) { sent = true },
		WroteRequest: func(info httptrace.WroteRequestInfo) { wrote.Store(info.Err == nil) },
	}
	resp, err := c.http.Do(req.WithContext(httptrace.WithClientTrace(ctx, trace)))
	if err != nil {
		// A server may refuse a TLS 1.3 client after that has its connection.
		e, ok := errors.AsType[*net.OpError](err)
		return c.noAnswer(err, sent && (wrote.Load() || !ok || e.Op != "write"))
	}
	defer resp.Body.Close()
	status = strconv.Itoa(resp.StatusCode)
	if resp.StatusCode == http.StatusTooManyRequests {
		l.limited(start, retryAfter(resp.Header))
	} else {
		l.passed()
	}
	var raw []byte
	if resp.StatusCode != http.StatusSwitchingProtocols { // what follows that is not ended by ctx
		raw, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	}
	if err != nil {
		return c.noAnswer(err, true)
	}
	if op.date != nil {
		*op.date, _ = http.ParseTime(resp.Header.Get("Date"))
	}
	return c.answer(resp, raw, op.out)
}

// noAnswer describes err, the failure of an exchange, without the request's URL.
func (c *client) noAnswer(err error, sent bool) error {
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	text := "no answer from " + c.config.APIEndpoint + ": "
	if errors.Is(err, context.DeadlineExceeded) {
		text += "timed out"
	} else {
		text += c.clean(err.Error())
	}
	switch {
	case certificateRefused.MatchString(text):
		text, sent = text+"; check client_certificate", false
	case !sent:
		text += ", before anything was sent"
	}
	return &apiError{Message: text, err: err, sent: sent}
}

// answer decodes a whole answer into out, or returns it as an *apiError.
func (c *client) answer(resp *http.Response, raw []byte, out any) error {
	e := &apiError{
		Status: resp.StatusCode, RequestID: c.clean(resp.Header.Get("X-Request-Id")),
		retryAfter: retryAfter(resp.Header), shouldRetry: resp.Header.Get("X-Should-Retry"),
	}
	switch {
	case len(raw) > maxAnswer:
		e.Message = "the answer is larger than 1 MiB"
	case resp.StatusCode >= 300 && resp.StatusCode < 400:
		e.Message = "redirects are not followed; check " + c.config.APIEndpoint
	case resp.StatusCode < 200 || resp.StatusCode > 299:
		var body struct {
			Error struct {
				Message, Type string
				Code, Param   any
			}
		}
		var oauth struct { // RFC 6749, section 5.2
			Error       string
			Description string `json:"error_description"`
		}
		e.Message = http.StatusText(resp.StatusCode)
		if json.Unmarshal(raw, &body) == nil && body.Error.Message != "" {
			e.Message = c.clean(body.Error.Message)
			e.Type = c.clean(body.Error.Type)
			if e.Status == http.StatusForbidden && e.Type != "" && c.config.AdminAPIKey != "" {
				e.Message += "; the admin API key needs Organization Administration: Write"
			}
			code, _ := body.Error.Code.(string)
			param, _ := body.Error.Param.(string)
			e.Code, e.Param = c.clean(code), c.clean(param)
		} else if json.Unmarshal(raw, &oauth) == nil && oauth.Error != "" {
			e.Code, e.Message = c.clean(oauth.Error), c.clean(cmp.Or(oauth.Description, e.Message))
		}
	case json.Unmarshal(raw, out) != nil:
		// The decoder's error would quote the answer.
		e.Message = "the answer is not the JSON that was expected"
	default:
		return nil
	}
	return e
}

// retryAfter reads how long to wait from Retry-After-Ms (milliseconds) or Retry-After (seconds or an HTTP date); 0
// when there is nothing sensible.
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

// listAll returns the entries of a list that match, from all its pages, and when that was: the earlier of this
// machine's time and of the Date of OpenAI's last answer, or zero if that has none. query is made its own.
func listAll[T any](ctx context.Context, c *client, name, path string, query url.Values, match func(T) bool) (
	found []T, now time.Time, err error) {
	query.Set("limit", "100")
	for size := 0; ; {
		var page struct {
			Data    []json.RawMessage
			HasMore bool   `json:"has_more"`
			LastID  string `json:"last_id"`
		}
		op := get(name, path+"?"+query.Encode())
		op.out, op.date = &page, &now
		if err := c.do(ctx, op); err != nil {
			return nil, time.Time{}, err
		}
		if page.Data == nil || page.HasMore && (page.LastID == "" || page.LastID == query.Get("after")) {
			return nil, time.Time{}, invalid(name)
		}
		for _, raw := range page.Data {
			var entry T
			if json.Unmarshal(raw, &entry) != nil {
				return nil, time.Time{}, invalid(name)
			}
			if size > maxFound {
				text := "the answers to " + name + " are larger than 32 MiB"
				return nil, time.Time{}, &apiError{Status: http.StatusOK, Message: text}
			}
			if match(entry) {
				found, size = append(found, entry), size+len(raw)
			}
		}
		if !page.HasMore {
			break
		}
		query.Set("after", page.LastID)
	}
	if here := time.Now(); here.Before(now) {
		now = here
	}
	return found, now, nil
}

// remove deletes what is at path and checks that OpenAI says so. What is gone already is no error, in whatever words
// the DELETE is refused: a GET then answers 404, while one of what must be there, present, does not fail.
func (c *client) remove(ctx context.Context, kind, path string, present func() error) error {
	_, err := ask(ctx, c, call{name: "delete_" + kind, method: http.MethodDelete, path: path, repeatable: true},
		func(a *struct{ Deleted bool }) bool { return a.Deleted })
	if isNotFound(err) {
		return nil
	}
	if !isJudged(err) {
		return err
	}
	_, getErr := ask(ctx, c, get("get_"+kind, path), func(*struct{}) bool { return true })
	if isNotFound(getErr) && present() == nil {
		return nil
	}
	return err
}

// expiring adds a key's expiry to the body of its creation. OpenAI counts whole seconds, at least one; 0: the key
// never expires.
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
	return ask(ctx, c, get("get_project", projectPath(id)),
		func(p *project) bool { return p.ID == id })
}

// activeProjects returns the ids of the organization's projects that are not archived.
func (c *client) activeProjects(ctx context.Context) (ids []string, err error) {
	found, _, err := listAll(ctx, c, "list_projects", "/organization/projects", url.Values{},
		func(p project) bool { return p.Status != "archived" && validID(p.ID) })
	for _, p := range found {
		ids = append(ids, p.ID)
	}
	return ids, err
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

// projectGone tells whether err, of a call inside the project, means that the project was archived or does not exist.
// Service accounts do not outlive their project.
func (c *client) projectGone(ctx context.Context, id string, err error) bool {
	if !isJudged(err) {
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
	CreatedAt int64 `json:"created_at"` // Unix seconds
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

// createServiceAccount makes an account with its first key or, when keyless, one that has neither a key nor a role.
func (c *client) createServiceAccount(ctx context.Context, projectID, name string, keyless bool,
	expiresIn time.Duration) (*serviceAccount, error) {
	in := expiring(map[string]any{"name": name}, expiresIn)
	if keyless {
		in = map[string]any{"name": name, "create_service_account_only": true}
	}
	return ask(ctx, c, post("create_service_account", projectPath(projectID, "service_accounts"), in),
		func(a *serviceAccount) bool { return validID(a.ID) && (keyless || a.APIKey.created()) })
}

func (c *client) getServiceAccount(ctx context.Context, projectID, id string) (*serviceAccount, error) {
	return ask(ctx, c, get("get_service_account", projectPath(projectID, "service_accounts", id)),
		func(a *serviceAccount) bool { return a.ID == id })
}

// setServiceAccountRole gives an account a role: member or owner.
func (c *client) setServiceAccountRole(ctx context.Context, projectID, id, role string) error {
	op := post("update_service_account", projectPath(projectID, "service_accounts", id), map[string]any{"role": role})
	op.repeatable = true
	_, err := ask(ctx, c, op, func(a *serviceAccount) bool { return a.Role == role })
	return err
}

// createAPIKey makes a key of an account, restricted to scopes unless there are none.
func (c *client) createAPIKey(ctx context.Context, projectID, accountID, name string, scopes []string,
	expiresIn time.Duration) (*apiKey, error) {
	in := expiring(map[string]any{"name": name}, expiresIn)
	if len(scopes) > 0 {
		in["scopes"] = scopes
	}
	path := projectPath(projectID, "service_accounts", accountID, "api_keys")
	return ask(ctx, c, post("create_api_key", path, in), (*apiKey).created)
}

// credentialsNamed returns a project's accounts, and its keys on accounts, whose names are wanted, and when that was:
// see listAll. A project that is gone has none.
func (c *client) credentialsNamed(ctx context.Context, projectID string, wanted func(name string) bool) (
	found []lease, now time.Time, err error) {
	organization := c.config.OrganizationID
	accounts, _, err := listAll(ctx, c, "list_service_accounts", projectPath(projectID, "service_accounts"),
		url.Values{}, func(a serviceAccount) bool { return wanted(a.Name) && validID(a.ID) })
	for _, a := range accounts {
		found = append(found, lease{ProjectID: projectID, OrganizationID: organization, ServiceAccountID: a.ID,
			Name: a.Name})
	}
	var keys []apiKey
	if err == nil {
		query := url.Values{"owner_project_access": {"any"}} // else keys of accounts without a role may be left out
		keys, now, err = listAll(ctx, c, "list_api_keys", projectPath(projectID, "api_keys"), query,
			func(k apiKey) bool { return k.Owner.ServiceAccount.ID != "" && wanted(k.Name) && validID(k.ID) })
	}
	for _, k := range keys {
		found = append(found, lease{ProjectID: projectID, OrganizationID: organization,
			ServiceAccountID: k.Owner.ServiceAccount.ID, Name: k.Name, APIKeyID: k.ID, KeyOnly: true})
	}
	if c.projectGone(ctx, projectID, err) {
		return nil, time.Now(), nil
	}
	return found, now, err
}

// deleteCredential deletes an account with its keys, or a key alone. What is gone already, alone or with its project,
// is no error.
func (c *client) deleteCredential(ctx context.Context, l *lease) error {
	kind, kinds := "service_account", "service_accounts"
	if l.KeyOnly {
		kind, kinds = "api_key", "api_keys"
	}
	err := c.remove(ctx, kind, projectPath(l.ProjectID, kinds, l.id()), func() error {
		_, err := c.getProject(ctx, l.ProjectID)
		return err
	})
	if c.projectGone(ctx, l.ProjectID, err) {
		return nil
	}
	return err
}

// setKeyLife makes a project API key expire in so long, counted in whole seconds from when OpenAI gets the request. A
// key that has expired already can't be updated.
func (c *client) setKeyLife(ctx context.Context, projectID, keyID string, life time.Duration) error {
	op := post("update_api_key", projectPath(projectID, "api_keys", keyID), expiring(map[string]any{}, life))
	op.repeatable = true
	_, err := ask(ctx, c, op, func(k *apiKey) bool { return k.ID == keyID })
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

// fits tells whether key can be the one that the redacted value stands for: the value shows how the key begins and
// ends, with dots or asterisks between.
func (k adminKey) fits(key string) bool {
	i, j := strings.IndexAny(k.RedactedValue, ".*"), strings.LastIndexAny(k.RedactedValue, ".*")
	if i < 0 || j == len(k.RedactedValue)-1 {
		return false
	}
	head, tail := k.RedactedValue[:i], k.RedactedValue[j+1:]
	return len(key) >= len(head)+len(tail) && strings.HasPrefix(key, head) && strings.HasSuffix(key, tail)
}

func (c *client) getAdminKey(ctx context.Context, id string) (*adminKey, error) {
	return ask(ctx, c, get("get_admin_api_key", adminKeysPath+apiPath(id)),
		func(k *adminKey) bool { return k.ID == id })
}

// adminKeysWhere returns the organization's admin keys that match, and when that was: see listAll.
func (c *client) adminKeysWhere(ctx context.Context, match func(adminKey) bool) ([]adminKey, time.Time, error) {
	return listAll(ctx, c, "list_admin_api_keys", adminKeysPath, url.Values{},
		func(k adminKey) bool { return validID(k.ID) && match(k) })
}

// createAdminKey makes an admin key.
func (c *client) createAdminKey(ctx context.Context, name string, expiresIn time.Duration) (*adminKey, error) {
	return ask(ctx, c, post("create_admin_api_key", adminKeysPath, expiring(map[string]any{"name": name}, expiresIn)),
		func(k *adminKey) bool { return validID(k.ID) && k.Value != "" })
}

// deleteAdminKey deletes an admin key, which stops working at once. A key that is gone already is no error.
func (c *client) deleteAdminKey(ctx context.Context, id string) error {
	return c.remove(ctx, "admin_api_key", adminKeysPath+apiPath(id), func() error {
		_, err := c.getAdminKey(ctx, c.config.AdminAPIKeyID)
		return err
	})
}

// What the Admin API has of workload identity federation: identity providers, and the rules of each.
const (
	provider      = "identity_provider"
	rule          = "federation_rule"
	providersPath = "/organization/workload_identity_providers"
)

func rulesPath(providerID string) string {
	return providersPath + apiPath(providerID, "federation_rules")
}

// federated is a provider or a rule.
type federated struct {
	ID               string
	Name             string
	ServiceAccountID string `json:"service_account_id"` // of a rule
}

// listFederated returns the providers, or the rules of a provider, that match.
func (c *client) listFederated(ctx context.Context, kind, path string, match func(federated) bool) (
	[]federated, error) {
	found, _, err := listAll(ctx, c, "list_"+kind+"s", path, url.Values{},
		func(f federated) bool { return validID(f.ID) && match(f) })
	return found, err
}

// saveFederated changes the provider or rule of this id to in, and returns its id. Without an id it changes the one of
// in's name, a rule only if it is for the same account, or makes one, with the fields of fixed too.
func (c *client) saveFederated(ctx context.Context, kind, path, id string, in, fixed map[string]any) (string, error) {
	if id == "" {
		account, _ := fixed["service_account_id"].(string)
		found, err := c.listFederated(ctx, kind, path, func(f federated) bool {
			return f.Name == in["name"] && f.ServiceAccountID == account
		})
		if err != nil {
			return "", err
		}
		for _, f := range found {
			id = f.ID
		}
	}
	op := post("update_"+kind, path+apiPath(id), in)
	op.repeatable = true
	if id == "" {
		in = maps.Clone(in)
		maps.Copy(in, fixed)
		op = post("create_"+kind, path, in)
	}
	saved, err := ask(ctx, c, op, func(f *federated) bool { return validID(f.ID) && (id == "" || f.ID == id) })
	return saved.ID, err
}

// deleteFederated deletes the provider or rule of this id. Without an id it deletes the providers, or the rules of a
// provider, that match. What is gone already is no error.
func (c *client) deleteFederated(ctx context.Context, kind, path, id string, match func(federated) bool) (err error) {
	list := func() ([]federated, error) { return c.listFederated(ctx, kind, path, match) }
	found := []federated{{ID: id}}
	if id == "" {
		found, err = list()
	}
	if kind == rule && isNotFound(err) {
		return nil // they have gone with their provider
	}
	for _, f := range found {
		if err == nil && kind == provider {
			err = c.disableProvider(ctx, f.ID)
		}
		if err == nil {
			err = c.remove(ctx, kind, path+apiPath(f.ID), func() error { _, err := list(); return err })
		}
	}
	return err
}

// disableProvider turns a provider off, so that no key of it works from then on, and deletes its rules: with rules it
// can't be deleted.
func (c *client) disableProvider(ctx context.Context, id string) error {
	_, err := c.saveFederated(ctx, provider, providersPath, id, map[string]any{"enabled": false}, nil)
	if err == nil {
		err = c.deleteFederated(ctx, rule, rulesPath(id), "", func(federated) bool { return true })
	}
	if isNotFound(err) {
		return nil
	}
	return err
}

const (
	defaultTokenEndpoint = "https://auth.openai.com/oauth/token" // #nosec G101 -- a URL, not a credential
	maxTokenLife         = time.Hour                             // OpenAI's limit
)

// errNoIdentity is an error of a mount without an identity, or with one that has no provider yet.
var errNoIdentity = errutil.UserError{Err: "OpenAI has no identity provider of this mount: write config/identity " +
	"after config, or with the identity_provider_id of one that an operator made"}

// signer makes JWTs with a key of an identity and exchanges them for access tokens. A change of the identity makes a
// new signer.
type signer struct {
	identity
	keyID  string
	key    *rsa.PrivateKey
	client *client // of the token endpoint, without an admin key

	mu      sync.Mutex // guards what follows
	said    string     // by the last JWT
	lastJWT string
}

func (b *backend) newSigner(id *identity, k *signingKey) (*signer, error) {
	key, err := x509.ParsePKCS1PrivateKey(k.PrivateKey)
	if err != nil {
		return nil, errors.New("the signing key that is stored is not an RSA key in PKCS #1")
	}
	c := b.newClient(&config{APIEndpoint: id.TokenEndpoint, CACertificate: id.CACertificate})
	c.throttle = newThrottle() // of its own: tokens do not wait for the Admin API
	return &signer{identity: *id, keyID: k.KeyID, key: key, client: c}, nil
}

// getSigner returns the mount's signer, made from the stored identity, which must have a provider, where there is none
// yet.
func (b *backend) getSigner(ctx context.Context, s logical.Storage) (*signer, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.signer != nil {
		return b.signer, nil
	}
	ctx, cancel := context.WithTimeout(ctx, undoTimeout) // others wait
	defer cancel()
	id, err := getIdentity(ctx, s)
	if err == nil && (id == nil || id.ProviderID == "") {
		err = errNoIdentity
	}
	if err == nil {
		b.signer, err = b.newSigner(id, id.Key)
	}
	return b.signer, err
}

func base64url(raw []byte) string { return base64.RawURLEncoding.EncodeToString(raw) }

// jwt returns a signed JWT (RFC 7519) about subject, which lives for ttl from now on. Signing is most of what a token
// costs this machine: whoever wants what the last JWT says, within the same second, gets that one. It can be exchanged
// again and again.
func (s *signer) jwt(subject string, now time.Time, ttl time.Duration) (string, error) {
	expires := now.Add(ttl).Unix()
	says := fmt.Sprint(now.Unix(), expires, subject)
	s.mu.Lock()
	defer s.mu.Unlock()
	if says == s.said {
		return s.lastJWT, nil
	}
	header, _ := json.Marshal(map[string]any{"alg": "RS256", "typ": "JWT", "kid": s.keyID})
	claims, _ := json.Marshal(map[string]any{"iss": s.Issuer, "aud": s.Audience, "sub": subject,
		"iat": now.Unix(), "exp": expires})
	text := base64url(header) + "." + base64url(claims)
	digest := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(nil, s.key, crypto.SHA256, digest[:])
	if err != nil {
		return "", fmt.Errorf("signing a JWT: %w", err)
	}
	s.said, s.lastJWT = says, text+"."+base64url(signature)
	return s.lastJWT, nil
}

// token is an access token as the token endpoint answers it.
type token struct {
	Value     string `json:"access_token"`
	Type      string `json:"token_type"`
	ExpiresIn int64  `json:"expires_in"` // seconds
	Scope     string // what it is restricted to, with spaces between; empty: it is not
}

var tokenPattern = regexp.MustCompile(`^[!-~]+$`)

// exchange makes a token of a service account (RFC 8693). It costs one call, which is safe to repeat.
func (s *signer) exchange(ctx context.Context, subject, accountID string, ttl time.Duration) (*token, error) {
	assertion, err := s.jwt(subject, time.Now(), ttl)
	if err != nil {
		return nil, err
	}
	const urn = "urn:ietf:params:oauth:"
	op := post("exchange_token", "", map[string]any{
		"grant_type": urn + "grant-type:token-exchange", "subject_token_type": urn + "token-type:jwt",
		"subject_token": assertion, "identity_provider_id": s.ProviderID, "service_account_id": accountID,
	})
	op.repeatable = true
	t, err := ask(ctx, s.client, op, func(t *token) bool {
		return tokenPattern.MatchString(t.Value) && strings.EqualFold(t.Type, "Bearer") &&
			t.ExpiresIn > 0 && t.ExpiresIn <= int64(maxTokenLife/time.Second)
	})
	if isRefused(err) && !isStatus(err, http.StatusTooManyRequests) {
		err = fmt.Errorf("%w; check token_endpoint and this machine's clock, and at OpenAI that the identity provider "+
			"is there, enabled, and has the issuer, audience and jwks of config/identity, and that it has one enabled "+
			"rule, with the role's subject, for the role's service account", err)
	}
	return t, err
}

// maxKeySize bounds client_key, in bytes, and maxKeyBits the RSA key of an authority, as crypto/tls bounds those that a
// server shows: with larger ones Go computes for minutes, also after the request. One process serves all mounts.
const (
	maxKeySize = 16 << 10
	maxKeyBits = 8192
)

// tlsConfig returns the TLS settings of cfg; nil: those of the mount's own transport. Its error names the field.
func (cfg *config) tlsConfig() (*tls.Config, error) {
	if cfg.CACertificate == "" && cfg.ClientCertificate == "" && cfg.ClientKey == "" {
		return nil, nil
	}
	if strings.Contains(cfg.CACertificate+cfg.ClientCertificate, "PRIVATE KEY") { // reading config shows them
		return nil, errors.New("ca_certificate and client_certificate must not hold a key: it belongs in client_key")
	}
	if len(cfg.ClientKey) > maxKeySize {
		return nil, fmt.Errorf("client_key must be at most %d bytes", maxKeySize)
	}
	settings := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CACertificate != "" {
		settings.RootCAs, _ = x509.SystemCertPool() // nil where the system has none
		if settings.RootCAs == nil {
			settings.RootCAs = x509.NewCertPool()
		}
		count := 0
		for block, rest := pem.Decode([]byte(cfg.CACertificate)); block != nil; block, rest = pem.Decode(rest) {
			certificate, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				continue
			}
			if key, ok := certificate.PublicKey.(*rsa.PublicKey); !ok || key.N.BitLen() <= maxKeyBits {
				settings.RootCAs.AddCert(certificate)
				count++
			}
		}
		if count == 0 || count != strings.Count(cfg.CACertificate, "-----BEGIN") {
			return nil, fmt.Errorf("ca_certificate must be certificates in PEM, RSA keys up to %d bits", maxKeyBits)
		}
	}
	if cfg.ClientCertificate != "" || cfg.ClientKey != "" {
		pair, err := tls.X509KeyPair([]byte(cfg.ClientCertificate), []byte(cfg.ClientKey))
		if err != nil {
			return nil, errors.New("client_certificate and client_key must be a certificate in PEM and its key")
		}
		settings.Certificates = []tls.Certificate{pair}
	}
	return settings, nil
}

// transportOf returns a transport for cfg's TLS settings: the mount's, or one of their own.
func (b *backend) transportOf(cfg *config) http.RoundTripper {
	settings, err := cfg.tlsConfig()
	shared, ok := b.transport.(*http.Transport)
	if settings == nil || err != nil || !ok { // err was checked when config was written
		return b.transport
	}
	own := shared.Clone()
	own.TLSClientConfig = settings
	return own
}

// newClient returns a client for cfg, which it copies.
func (b *backend) newClient(cfg *config) *client {
	return &client{config: *cfg, throttle: b.throttle, metrics: b.metrics, http: &http.Client{
		Transport: b.transportOf(cfg),
		// A redirect would carry the admin key to a host that nobody configured.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// getClient returns the mount's client, made from the stored config where there is none yet.
func (b *backend) getClient(ctx context.Context, s logical.Storage) (*client, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.client == nil {
		ctx, cancel := context.WithTimeout(ctx, undoTimeout) // others wait
		defer cancel()
		cfg, err := getConfig(ctx, s)
		if err != nil {
			return nil, err
		}
		if cfg == nil {
			return nil, errNotConfigured
		}
		b.client = b.newClient(cfg)
	}
	return b.client, nil
}

// useClient runs fn with the mount's client. organization is the one that what fn works on belongs to, "" if that is
// not known: to another organization it would not exist, which looks as if it were deleted. When OpenAI refuses the
// key, it may have been rotated, here or by another node: fn runs again if config now holds another key. fn makes one
// call that is not repeatable at the most, so that a refused one was not done.
func (b *backend) useClient(ctx context.Context, s logical.Storage, organization string, fn func(*client) error) error {
	for {
		c, err := b.getClient(ctx, s)
		if err != nil {
			return err
		}
		if organization != "" && organization != c.config.OrganizationID {
			return fmt.Errorf("%w %q", errOtherOrganization, organization)
		}
		err = fn(c)
		if !isStatus(err, http.StatusUnauthorized) {
			return err
		}
		cfg, configErr := getConfig(ctx, s)
		if configErr != nil || cfg == nil || cfg.AdminAPIKey == c.config.AdminAPIKey {
			return err
		}
		b.invalidate(ctx, configPath) // the next one is made from what config holds by then
	}
}

// revokeAtOpenAI deletes what a lease stands for at OpenAI.
func (b *backend) revokeAtOpenAI(ctx context.Context, s logical.Storage, l *lease) error {
	return b.useClient(ctx, s, l.OrganizationID, func(c *client) error { return c.deleteCredential(ctx, l) })
}
