// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"cmp"
	"math"
	"net/http"
	"strconv"
	"time"
)

// limiter limits how often something is done.
type limiter struct {
	rate     float64 // tokens per second that the bucket gains; 0: a fixed window of a minute
	capacity float64 // of the bucket or the window; 0: no limit
	headers  bool    // a refusal tells when to come again
	quota    int     // and that there are so many calls a minute; 0: not

	tokens float64   // left
	since  time.Time // when tokens was right, or when the window began
}

// SetRateLimit sets a token bucket for the calls with a valid key and those of the token
// endpoint. A call over it is answered 429 with the time until the next token, in
// Retry-After and Retry-After-Ms. perSecond 0: no limit.
func (s *Server) SetRateLimit(perSecond float64, burst int) {
	s.lock()
	defer s.mu.Unlock()
	s.limit = nil
	if perSecond > 0 {
		full := float64(burst)
		s.limit = &limiter{rate: perSecond, capacity: full, headers: true, tokens: full, since: s.now()}
	}
}

// SetEndpointLimit limits the calls with a valid key to each endpoint, which is a method
// and a path whose ids do not count, and the calls of the token endpoint. Each has a limiter of its own: a token bucket that
// holds burst (0: perMinute) and gains perMinute in a minute, or, with window, a window of
// perMinute calls that lasts for a minute from its first call. A call over it is answered
// 429 rate_limit_exceeded and does not count. With headers, that answer has Retry-After,
// Retry-After-Ms and x-ratelimit-{limit,remaining,reset}-requests. Each use of
// SetEndpointLimit starts all limiters anew. perMinute 0: no limit.
func (s *Server) SetEndpointLimit(perMinute, burst int, window, headers bool) {
	s.lock()
	defer s.mu.Unlock()
	s.endpointLimits = map[*route]*limiter{}
	s.endpointLimit = limiter{capacity: float64(perMinute), headers: headers}
	if headers {
		s.endpointLimit.quota = perMinute
	}
	if !window && perMinute > 0 {
		s.endpointLimit.rate = float64(perMinute) / 60
		s.endpointLimit.capacity = float64(cmp.Or(burst, perMinute))
	}
}

// takeTokens counts a call, unless a limit has it refused.
func (s *Server) takeTokens(rt *route) error {
	now := s.now()
	var limits []*limiter
	if s.limit != nil {
		limits = append(limits, s.limit)
	}
	if s.endpointLimit.capacity > 0 {
		if s.endpointLimits[rt] == nil {
			l := s.endpointLimit
			l.tokens, l.since = l.capacity, now
			s.endpointLimits[rt] = &l
		}
		limits = append(limits, s.endpointLimits[rt])
	}
	for _, l := range limits {
		if wait := l.fill(now); wait > 0 {
			return l.refusal(wait)
		}
	}
	for _, l := range limits {
		l.tokens--
	}
	return nil
}

// fill brings the limiter up to date, and returns the time until the next token; 0: there is one.
func (l *limiter) fill(now time.Time) time.Duration {
	elapsed := now.Sub(l.since)
	switch {
	case l.rate > 0:
		l.tokens, l.since = min(l.capacity, l.tokens+elapsed.Seconds()*l.rate), now
	case elapsed >= time.Minute || l.tokens == l.capacity: // a window begins with its first call
		l.tokens, l.since = l.capacity, now
	}
	switch {
	case l.tokens >= 1-1e-6: // who waited as long as told is not turned away by rounding
		return 0
	case l.rate > 0:
		return time.Duration((1 - l.tokens) / l.rate * float64(time.Second))
	}
	return time.Minute - elapsed
}

// refusal is the answer to a call that has to wait.
func (l *limiter) refusal(wait time.Duration) error {
	e := &apiError{status: 429, typ: "requests", code: "rate_limit_exceeded",
		message: "Rate limit reached. Please try again later.", header: http.Header{}}
	if l.headers {
		e.header.Set("Retry-After", strconv.Itoa(int(math.Ceil(wait.Seconds()))))
		e.header.Set("Retry-After-Ms", strconv.Itoa(int(math.Ceil(wait.Seconds()*1000))))
	}
	if l.quota > 0 {
		e.header.Set("X-Ratelimit-Limit-Requests", strconv.Itoa(l.quota))
		e.header.Set("X-Ratelimit-Remaining-Requests", "0")
		e.header.Set("X-Ratelimit-Reset-Requests", wait.Round(time.Millisecond).String())
	}
	return e
}
