// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Fault is what befalls API calls that match. A call meets at most one fault: the first
// one in the queue that matches and does not let it pass.
type Fault struct {
	Method string `json:"method"` // empty: any
	Path   string `json:"path"`   // regular expression, matched against the path as in Call; empty: any
	Skip   int    `json:"skip"`   // so many matching calls pass first
	Times  int    `json:"times"`  // so many calls are hit; 0: one; below 0: all, for ever

	Status int         `json:"status"` // answered instead of processing the call; 0: 500
	Header http.Header `json:"header"`
	Body   string      `json:"body"` // empty: an error in OpenAI's form, or in OAuth's at /oauth/token

	Process bool `json:"process"` // the call is processed first, and its answer is lost

	// Late delays the processing. The call is answered at once, as Kind or Status says. The
	// server processes it this long after its arrival, and what it creates has that later
	// time. The key, its access and the limits are checked on arrival, everything else when
	// the call is processed: if its project or account is gone by then, nothing happens.
	// Process is ignored. 0: no delay. In JSON it is a string that time.ParseDuration reads.
	Late time.Duration `json:"late"`

	// Kind is empty for an answer as above, or
	//	close      the connection is closed without an answer
	//	hang       no answer ever; the call ends when the client leaves
	//	malformed  200 with a body that is cut in the middle
	//	oversized  200 with a body of more than 1 MiB, in valid JSON
	//	redirect   307 to RedirectHost
	//	refuse     the connection is refused, so that nothing can be processed; over HTTP, closed
	Kind string `json:"kind"`

	path *regexp.Regexp
}

// RedirectHost is where the fault redirect points. Transport can't reach it, but records
// the attempt in Calls.
const RedirectHost = "redirect.invalid"

// Call is an API call that reached the server, in the order of arrival.
type Call struct {
	Method    string    `json:"method"`
	Path      string    `json:"path"`   // escaped, below /v1, without the query; or /oauth/token
	Host      string    `json:"host"`   // as the client named it
	Status    int       `json:"status"` // 0: no answer, as after a connection fault, or not yet
	KeyID     string    `json:"key_id"` // of the key or token that the call carried, even if it is dead; empty: unknown
	RequestID string    `json:"request_id"`
	Time      time.Time `json:"time"`      // of arrival
	Processed bool      `json:"processed"` // the call was carried out with success, whatever was answered and when
}

// Inject adds a fault to the queue. It panics when Path, Kind or Late is invalid.
func (s *Server) Inject(f Fault) {
	s.lock()
	defer s.mu.Unlock()
	if err := s.inject(f); err != nil {
		panic("openaisim: " + err.Error())
	}
}

// Fail answers all calls of a method, empty: any, whose path matches a regular expression, with
// this status from now on.
func (s *Server) Fail(method, path string, status int) {
	s.Inject(Fault{Method: method, Path: path, Status: status, Times: -1})
}

func (s *Server) inject(f Fault) (err error) {
	if f.path, err = regexp.Compile(f.Path); err != nil {
		return err
	}
	if !slices.Contains([]string{"", "close", "hang", "malformed", "oversized", "redirect", "refuse"}, f.Kind) {
		return fmt.Errorf("unknown kind of fault %q", f.Kind)
	}
	if f.Late < 0 {
		return fmt.Errorf("a call can't be late by %s", f.Late)
	}
	if f.Times == 0 {
		f.Times = 1
	}
	s.faults = append(s.faults, &f)
	return nil
}

// ClearFaults empties the queue of faults. Calls that are late already stay so.
func (s *Server) ClearFaults() { s.locked(func() { s.faults = nil }) }

// SetLatency makes each API call take d: half of it before the call is processed, half
// of it after. A client that leaves in the first half has done nothing.
func (s *Server) SetLatency(d time.Duration) { s.locked(func() { s.latency = d }) }

// SetDate sets whether the answers of the API carry a Date: with the mode "", they carry
// the simulator's time when the answer was made, and with "none" they carry none. A
// fault's Header goes first. It panics when there is no such mode.
func (s *Server) SetDate(mode string) {
	s.lock()
	defer s.mu.Unlock()
	if err := s.setDate(mode); err != nil {
		panic("openaisim: " + err.Error())
	}
}

func (s *Server) setDate(mode string) error {
	if mode != "" && mode != "none" {
		return fmt.Errorf("unknown mode of the date %q", mode)
	}
	s.dateless = mode == "none"
	return nil
}

// Calls returns the calls of the API since the start or the last ResetCalls.
func (s *Server) Calls() []Call {
	s.lock()
	defer s.mu.Unlock()
	calls := []Call{}
	for _, c := range s.calls {
		calls = append(calls, *c)
	}
	return calls
}

// CountCalls counts the calls, of those that Calls returns, of a method, empty: any, whose path
// has part in it and whose answer had one of the statuses; none: any.
func (s *Server) CountCalls(method, part string, statuses ...int) (n int) {
	for _, c := range s.Calls() {
		if (method == "" || c.Method == method) && strings.Contains(c.Path, part) &&
			(len(statuses) == 0 || slices.Contains(statuses, c.Status)) {
			n++
		}
	}
	return n
}

// ResetCalls forgets the calls so far.
func (s *Server) ResetCalls() { s.locked(func() { s.calls = nil }) }

// incoming is an HTTP request.
type incoming struct {
	method, host string
	path, query  string // path is escaped
	header       http.Header
	body         []byte
}

// answer is an HTTP answer.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// errClosed and errRefused stand for connection faults.
var (
	errClosed  = errors.New("connection closed")
	errRefused = errors.New("connection refused")
)

// maxBody is how many bytes of a request body are accepted.
const maxBody = 1 << 20

func readRequest(r *http.Request) (*incoming, error) {
	in := &incoming{method: r.Method, host: r.Host, path: r.URL.EscapedPath(), query: r.URL.RawQuery, header: r.Header}
	if in.host == "" {
		in.host = r.URL.Host
	}
	if in.method == "" {
		in.method = http.MethodGet
	}
	if r.Body == nil {
		return in, nil
	}
	defer r.Body.Close()
	var err error
	in.body, err = io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	return in, err
}

// ServeHTTP serves the API below /v1, /oauth/token and the control API below /_sim.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	in, err := readRequest(r)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	a, err := s.exchange(r.Context(), in)
	if err != nil {
		panic(http.ErrAbortHandler) // closes the connection
	}
	w.Header()["Date"] = nil // net/http adds none of its own
	for name, values := range a.header {
		w.Header()[name] = values
	}
	w.WriteHeader(a.status)
	w.Write(a.body) // fails only when the client has left
}

// Transport returns the server as a transport that needs no network: for any host but
// RedirectHost, and also inside a testing/synctest bubble.
func (s *Server) Transport() http.RoundTripper { return transport{s} }

type transport struct{ s *Server }

func (t transport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	in, err := readRequest(req)
	if err != nil {
		return nil, err
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	a, err := t.s.exchange(ctx, in)
	if trace := httptrace.ContextClientTrace(ctx); trace != nil && trace.GotConn != nil && !errors.Is(err, errRefused) {
		trace.GotConn(httptrace.GotConnInfo{}) // as a client over the network has it before it sends
	}
	addr := &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 443}
	switch {
	case errors.Is(err, errRefused):
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: addr, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	case errors.Is(err, errClosed):
		return nil, &net.OpError{Op: "read", Net: "tcp", Addr: addr, Err: os.NewSyscallError("read", syscall.ECONNRESET)}
	case err != nil:
		return nil, err
	}
	return &http.Response{
		Status: fmt.Sprintf("%d %s", a.status, http.StatusText(a.status)), StatusCode: a.status,
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: a.header, Body: io.NopCloser(bytes.NewReader(a.body)), ContentLength: int64(len(a.body)),
		Request: req,
	}, nil
}

// exchange answers a request. Its errors are errClosed, errRefused and ctx's.
func (s *Server) exchange(ctx context.Context, in *incoming) (*answer, error) {
	if strings.HasPrefix(in.path, "/_sim/") {
		v, err := s.control(in)
		if err != nil {
			return jsonAnswer(400, map[string]any{"error": err.Error()}), nil
		}
		return jsonAnswer(200, v), nil
	}
	call, fault, latency := s.arrive(in)
	if in.host == RedirectHost || fault != nil && fault.Kind == "refuse" {
		return nil, errRefused
	}
	if err := wait(ctx, latency/2); err != nil {
		return nil, err
	}
	var a *answer
	switch {
	case fault != nil && fault.Late > 0:
		s.postpone(in, call, fault.Late)
	case fault == nil || fault.Process:
		a = s.carryOut(in, call)
	}
	if fault != nil {
		switch fault.Kind {
		case "close":
			return nil, errClosed
		case "hang":
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
		a = fault.answer(in)
	}
	s.stamp(a)
	if err := wait(ctx, latency-latency/2); err != nil {
		return nil, err
	}
	a.header.Set("X-Request-Id", call.RequestID)
	s.lock()
	defer s.mu.Unlock()
	call.Status = a.status
	return a, nil
}

// arrive records a call and finds the fault that it meets, or nil.
func (s *Server) arrive(in *incoming) (*Call, *Fault, time.Duration) {
	s.lock()
	defer s.mu.Unlock()
	call := &Call{
		Method: in.method, Path: strings.TrimPrefix(in.path, "/v1"), Host: in.host,
		Time: s.now(), RequestID: "req_" + random(32),
	}
	if _, value, ok := strings.Cut(in.header.Get("Authorization"), " "); ok && s.values[value] != nil {
		call.KeyID = s.values[value].ID
	}
	s.calls = append(s.calls, call)
	for i, f := range s.faults {
		if f.Method != "" && f.Method != in.method || !f.path.MatchString(call.Path) {
			continue
		}
		if f.Skip > 0 {
			f.Skip--
			continue
		}
		if f.Times--; f.Times == 0 {
			s.faults = slices.Delete(s.faults, i, i+1)
		}
		return call, f, s.latency
	}
	return call, nil, s.latency
}

// carryOut processes a call and makes its answer.
func (s *Server) carryOut(in *incoming, call *Call) *answer {
	s.lock()
	defer s.mu.Unlock()
	rt, ids, err := s.admit(in)
	var v any
	if err == nil {
		v, err = s.process(in, rt, ids)
	}
	if err == nil {
		call.Processed = true
		return jsonAnswer(200, v)
	}
	e := err.(*apiError) // admit and process have no others
	if in.path == tokenPath {
		e = e.inOAuthForm()
	}
	a := jsonAnswer(e.status, e.view())
	for name, values := range e.header {
		a.header[name] = values
	}
	return a
}

// stamp dates an answer, unless it has a date.
func (s *Server) stamp(a *answer) {
	s.lock()
	defer s.mu.Unlock()
	if _, dated := a.header["Date"]; !dated && !s.dateless {
		a.header.Set("Date", s.now().UTC().Format(http.TimeFormat))
	}
}

func (f *Fault) answer(in *incoming) *answer {
	var a *answer
	switch f.Kind {
	case "malformed":
		a = &answer{200, http.Header{"Content-Type": {"application/json"}}, []byte(`{"object":"list","data":[{"id":"key_`)}
	case "oversized":
		a = jsonAnswer(200, map[string]any{"object": strings.Repeat("x", maxBody)})
	case "redirect":
		a = jsonAnswer(307, struct{}{})
		a.header.Set("Location", "https://"+RedirectHost+in.path)
	default:
		e := &apiError{status: cmp.Or(f.Status, 500), message: "The simulator was told to fail."}
		if e.status >= 500 {
			e.typ = "server_error"
		}
		if in.path == tokenPath {
			e = e.inOAuthForm()
		}
		a = jsonAnswer(e.status, e.view())
		if f.Body != "" {
			a.body = []byte(f.Body)
		}
	}
	for name, values := range f.Header {
		a.header[http.CanonicalHeaderKey(name)] = values
	}
	return a
}

func jsonAnswer(status int, v any) *answer {
	body, err := json.Marshal(v)
	if err != nil {
		panic("openaisim: " + err.Error())
	}
	return &answer{status, http.Header{"Content-Type": {"application/json"}}, body}
}

// wait waits for d, or returns ctx's error when ctx ends first.
func wait(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// settings are the parameters of the control API; each call takes some of them.
type settings struct {
	Duration  string  // as time.ParseDuration reads it
	PerSecond float64 `json:"per_second"`
	PerMinute int     `json:"per_minute"`
	Burst     int
	Seconds   int
	Status    int
	On        bool

	Window, Headers, Typed bool
	Mode, Access           string

	Project, Account string
	ID, Value        string // empty: made up
	Name, Role       string
	Scope            string
}

// control carries out a call of the control API, which takes and gives JSON:
//
//	POST   /_sim/faults        a Fault, its fields in lower case
//	DELETE /_sim/faults
//	POST   /_sim/latency       {duration}; SetLatency
//	POST   /_sim/keydelay      {duration}; SetKeyDelay
//	POST   /_sim/advance       {duration}; Advance
//	POST   /_sim/ratelimit     {per_second, burst}; SetRateLimit
//	POST   /_sim/endpointlimit {per_minute, burst, window, headers}; SetEndpointLimit
//	POST   /_sim/maxkeylife    {seconds}; SetMaxKeyLife
//	POST   /_sim/lax           {on}; SetLax
//	POST   /_sim/date          {mode}; SetDate
//	POST   /_sim/gonestatus    {status, typed}; SetGoneStatus
//	POST   /_sim/adminaccess   {id, access}; SetAdminKeyAccess
//	POST   /_sim/jwksdelay     {duration}; SetJWKSDelay
//	POST   /_sim/tokenscope    {scope}; SetTokenScope
//	POST   /_sim/archive       {id}; ArchiveProject
//	POST   /_sim/projects      {id, name}; answers {id}
//	POST   /_sim/accounts      {project, id, name, role}; answers {id}
//	POST   /_sim/keys          {project, account, id, name, value}; answers {id, value}
//	POST   /_sim/adminkeys     {id, name, value}; answers {id, value}
//	GET    /_sim/state         what exists, without the values of keys and tokens
//	GET    /_sim/calls         Calls
//	DELETE /_sim/calls
//
// Errors are 400 {"error": text}.
func (s *Server) control(in *incoming) (any, error) {
	var c settings
	var f Fault
	var d time.Duration
	call := in.method + " " + strings.TrimPrefix(in.path, "/_sim/")
	if in.method == http.MethodPost {
		decoder := json.NewDecoder(bytes.NewReader(in.body))
		decoder.DisallowUnknownFields()
		var to any = &c
		if call == "POST faults" {
			to = &f
		}
		err := decoder.Decode(to)
		if err == nil && c.Duration != "" {
			d, err = time.ParseDuration(c.Duration)
		}
		if err != nil {
			return nil, err
		}
	}
	switch call {
	case "DELETE faults":
		s.ClearFaults()
	case "POST latency":
		s.SetLatency(d)
	case "POST keydelay":
		s.SetKeyDelay(d)
	case "POST advance":
		s.Advance(d)
	case "POST ratelimit":
		s.SetRateLimit(c.PerSecond, c.Burst)
	case "POST endpointlimit":
		s.SetEndpointLimit(c.PerMinute, c.Burst, c.Window, c.Headers)
	case "POST maxkeylife":
		s.SetMaxKeyLife(c.Seconds)
	case "POST lax":
		s.SetLax(c.On)
	case "POST jwksdelay":
		s.SetJWKSDelay(d)
	case "POST tokenscope":
		s.SetTokenScope(c.Scope)
	case "GET calls":
		return s.Calls(), nil
	case "DELETE calls":
		s.ResetCalls()
	default:
		return s.controlState(call, c, f)
	}
	return struct{}{}, nil
}

// controlState is the part of control that can fail on what the parameters name.
func (s *Server) controlState(call string, c settings, f Fault) (any, error) {
	s.lock()
	defer s.mu.Unlock()
	switch call {
	case "GET state":
		return s.state(), nil
	case "POST faults":
		return struct{}{}, s.inject(f)
	case "POST date":
		return struct{}{}, s.setDate(c.Mode)
	case "POST gonestatus":
		return struct{}{}, s.setGoneStatus(c.Status, c.Typed)
	case "POST adminaccess":
		return struct{}{}, s.setAdminKeyAccess(c.ID, c.Access)
	case "POST adminkeys":
		return created(s.addKey(nil, nil, c.ID, c.Name, c.Value, 0))
	case "POST projects":
		return created(s.addProject(c.ID, c.Name))
	case "POST archive", "POST accounts", "POST keys":
	default:
		return nil, fmt.Errorf("no such control: %s", call)
	}
	p, err := find(s.projects, "project", cmp.Or(c.Project, c.ID))
	if err != nil {
		return nil, err
	}
	switch call {
	case "POST accounts":
		return created(s.addAccount(p, c.ID, c.Name, c.Role))
	case "POST keys":
		a, err := find(p.accounts, "service account", c.Account)
		if err != nil {
			return nil, err
		}
		return created(s.addKey(p, a, c.ID, c.Name, c.Value, 0))
	}
	s.archive(p)
	return struct{}{}, nil
}

// created is the control API's answer for a new object.
func created[T object](o T, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	v := map[string]any{"id": o.ident()}
	if k, ok := any(o).(*key); ok {
		v["value"] = k.value
	}
	return v, nil
}

// state is what exists.
func (s *Server) state() any {
	projects := []any{}
	for _, p := range s.projects {
		projects = append(projects, map[string]any{
			"id": p.id, "name": p.name, "archived": !p.archived.IsZero(),
			"service_accounts": p.serviceAccounts(), "api_keys": p.projectKeys(),
		})
	}
	return map[string]any{
		"organization_id": DefaultOrganization, "now": s.now(), "admin_keys": s.adminKeys(), "projects": projects,
		"workload_identity_providers": s.providerList(), "federation_rules": s.ruleList(),
		"access_tokens": s.tokenList(),
	}
}
