// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
)

// ErrInjected is the error of storage that was made to fail.
var ErrInjected = errors.New("injected failure")

// StepFault is what befalls one step of a request, a storage operation or an exchange over the
// wire, or that step and all later ones. The zero value is a step that fails without effect.
type StepFault struct {
	Name    string
	Effect  bool // the step takes effect, but its answer is lost
	All     bool // no later step takes effect either, until the request has ended
	Crash   bool // and then the plugin's process ends
	Cancel  bool // the request's context ends at the step
	Arrives bool // then: the step's answer arrives all the same
	Refused bool // of an exchange: the connection is refused
	Status  int  // of an exchange: this is answered, with an error in OpenAI's form
}

// StepFaults returns the faults that EveryStep tries.
func StepFaults() []StepFault {
	return []StepFault{
		{Name: "crash before", All: true, Crash: true},
		{Name: "crash after", All: true, Crash: true, Effect: true},
		{Name: "outage before", All: true},
		{Name: "outage after", All: true, Effect: true},
		{Name: "failure"},
		{Name: "refused", Refused: true},
		{Name: "answer lost", Effect: true},
		{Name: "429", Status: http.StatusTooManyRequests},
		{Name: "500 after processing", Effect: true, Status: http.StatusInternalServerError},
		{Name: "cancelled before", Cancel: true},
		{Name: "cancelled after", Cancel: true, Effect: true},
		{Name: "cancelled with the answer", Cancel: true, Effect: true, Arrives: true},
	}
}

// EveryStep runs test in a bubble of its own for each fault at each step, counted from 1, until
// test tells that its request has not reached the step. It fails the test if there are fewer
// than enough steps.
func EveryStep(t *testing.T, enough int, test func(t *testing.T, fault StepFault, at int) (reached bool)) {
	for _, fault := range StepFaults() {
		t.Run(fault.Name, func(t *testing.T) {
			for at, reached := 1, true; reached && !t.Failed(); at++ {
				synctest.Test(t, func(t *testing.T) {
					reached = test(t, fault, at)
					if t.Failed() {
						t.Logf("the fault was at step %d", at)
					}
				})
				if !reached && at <= enough {
					t.Errorf("steps: got %d, want at least %d", at-1, enough)
				}
			}
		})
	}
}

// AtStep makes request, whose context it gives, meet fault at its step number at, counted from
// 1. each is called before each step; nil: nothing is. It tells whether the request came as
// far. Faults that storage and wire had are gone afterwards.
func (v *Vault) AtStep(fault StepFault, at int, each func(), request func(ctx context.Context)) (reached bool) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	s := &steps{fault: fault, at: at, each: each, cancel: cancel}
	v.Storage.SetFault(func(verb, key string) error {
		before, after := s.next()
		s.after.Store(verb+key, after)
		return before
	})
	v.Storage.SetAfter(func(verb, key string) error {
		value, _ := s.after.LoadAndDelete(verb + key)
		after, _ := value.(error)
		return s.answer(after)
	})
	v.Wire.SetFault(s.exchange)
	request(ctx)
	v.Storage.SetFault(nil)
	v.Storage.SetAfter(nil)
	v.Wire.SetFault(nil)
	if fault.Crash {
		v.Crash()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.n >= at
}

// steps counts the steps of a request, and has the fault befall them.
type steps struct {
	fault  StepFault
	at     int
	each   func()
	cancel context.CancelFunc // of the request
	after  sync.Map           // by verb and key of a storage operation: the error in its answer's place

	mu sync.Mutex
	n  int // steps so far; guarded by mu
}

// next returns what befalls the next step: an error in its effect's place, and one in its
// answer's.
func (s *steps) next() (before, after error) {
	if s.each != nil {
		s.each()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.n++
	switch {
	case s.n < s.at || s.n > s.at && !s.fault.All:
		return nil, nil
	case s.n > s.at:
		return ErrInjected, ErrInjected
	case s.fault.Cancel && s.fault.Effect:
		return nil, context.Canceled
	case s.fault.Cancel:
		s.cancel()
		return context.Canceled, nil
	case s.fault.Effect:
		return nil, ErrInjected
	}
	return ErrInjected, nil
}

// answer returns the error in a step's answer's place, now that it has had its effect.
func (s *steps) answer(after error) error {
	if errors.Is(after, context.Canceled) {
		s.cancel()
		if s.fault.Arrives {
			return nil
		}
	}
	return after
}

// exchange is a step over the wire.
func (s *steps) exchange(req *http.Request, send Send) (resp *http.Response, err error) {
	err, after := s.next()
	trace := httptrace.ContextClientTrace(req.Context())
	if trace != nil && trace.GotConn != nil && !s.fault.Refused {
		trace.GotConn(httptrace.GotConnInfo{})
	}
	if err == nil {
		resp, err = send()
		err = cmp.Or(err, s.answer(after))
	}
	switch {
	case err == nil:
		return resp, nil
	case !errors.Is(err, ErrInjected):
		return nil, err
	case s.fault.Refused:
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	case s.fault.Status != 0:
		body := io.NopCloser(strings.NewReader(`{"error":{"message":"Injected.","type":"server_error"}}`))
		return &http.Response{StatusCode: s.fault.Status, Header: http.Header{}, Body: body, Request: req}, nil
	}
	return nil, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
}
