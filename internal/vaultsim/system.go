// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package vaultsim

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/vault/sdk/helper/automatedrotationutil"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/hashicorp/vault/sdk/rotation"
)

// System is what the plugin sees of Vault. It is a primary's active node of the community
// edition until a test changes the embedded fields (DefaultLeaseTTLVal, MaxLeaseTTLVal,
// ReplicationStateVal, LocalMountVal, PluginEnvironment) or those below. A test does so while
// the plugin is idle.
type System struct {
	// MaxLeaseTTLVal 0 is a question of the plugin that fails: MaxLeaseTTL is a remote call
	// that then returns 0. Vault itself has a limit of 768 hours then. The same goes for
	// DefaultLeaseTTLVal.
	logical.StaticSystemView

	// PluginEnvErr, if not nil, is PluginEnv's error. Otherwise PluginEnvironment is its
	// answer; its VaultVersionMetadata is empty on CE and begins with "ent" on Enterprise.
	PluginEnvErr error

	// RotationErr is the error of RegisterRotationJob. It is CE's text, which has lost its
	// identity over gRPC; nil is the answer of Enterprise.
	RotationErr error

	tainted      atomic.Bool
	mu           sync.Mutex // guards what follows
	jobs         []rotation.RotationJobConfigureRequest
	registered   []rotation.RotationJobConfigureRequest
	deregistered []rotation.RotationJobDeregisterRequest
	events       []Report
	observations []Report
}

// Report is an event or an observation that the plugin has sent.
type Report struct {
	Type string
	Data map[string]any // an event's metadata
}

var (
	_ logical.SystemView          = (*System)(nil)
	_ logical.EventSender         = (*System)(nil)
	_ logical.ObservationRecorder = (*System)(nil)
)

func newSystem() *System {
	return &System{
		StaticSystemView: logical.StaticSystemView{
			DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: vaultTTL,
			PluginEnvironment: &logical.PluginEnvironment{VaultVersion: "1.21.1"},
		},
		RotationErr: errors.New("rpc error: code = Internal desc = error registering rotation job: " +
			automatedrotationutil.ErrRotationManagerUnsupported.Error()),
	}
}

// limits are the TTLs by which Vault itself clamps a lease.
func (s *System) limits() logical.SystemView {
	return logical.StaticSystemView{
		DefaultLeaseTTLVal: cmp.Or(s.DefaultLeaseTTLVal, vaultTTL), MaxLeaseTTLVal: cmp.Or(s.MaxLeaseTTLVal, vaultTTL),
	}
}

// Tainted tells whether the mount is being disabled.
func (s *System) Tainted() bool { return s.TaintedVal || s.tainted.Load() }

// PluginEnv answers with PluginEnvironment or PluginEnvErr.
func (s *System) PluginEnv(context.Context) (*logical.PluginEnvironment, error) {
	return s.PluginEnvironment, s.PluginEnvErr
}

// RegisterRotationJob records the job, in place of the path's former one, unless RotationErr
// is set. Enterprise then rotates with a request of logical.RotationOperation, without an id.
func (s *System) RegisterRotationJob(_ context.Context, r *rotation.RotationJobConfigureRequest) (string, error) {
	if s.RotationErr != nil {
		return "", s.RotationErr
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(r.MountPoint, r.ReqPath)
	s.jobs, s.registered = append(s.jobs, *r), append(s.registered, *r)
	return "rotation/" + r.MountPoint + r.ReqPath, nil
}

// DeregisterRotationJob removes the path's job. It succeeds without one too, as on CE.
func (s *System) DeregisterRotationJob(_ context.Context, r *rotation.RotationJobDeregisterRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(r.MountPoint, r.ReqPath)
	s.deregistered = append(s.deregistered, *r)
	return nil
}

func (s *System) remove(mount, path string) {
	s.jobs = slices.DeleteFunc(s.jobs, func(job rotation.RotationJobConfigureRequest) bool {
		return job.MountPoint == mount && job.ReqPath == path
	})
}

// Jobs returns the rotation jobs that are registered now.
func (s *System) Jobs() []rotation.RotationJobConfigureRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.jobs)
}

// Registered returns all requests that have registered a rotation job.
func (s *System) Registered() []rotation.RotationJobConfigureRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.registered)
}

// Deregistered returns all requests to deregister a rotation job.
func (s *System) Deregistered() []rotation.RotationJobDeregisterRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.deregistered)
}

// SendEvent records an event. CE does nothing with it and returns nil too.
func (s *System) SendEvent(_ context.Context, name logical.EventType, event *logical.EventData) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = append(s.events, Report{string(name), event.Metadata.AsMap()})
	return nil
}

// RecordObservationFromPlugin records an observation. Its data must be plain, since it is sent
// as protobuf; CE does nothing with it and returns nil too.
func (s *System) RecordObservationFromPlugin(_ context.Context, name string, data map[string]any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for field, value := range data {
		switch value.(type) {
		case nil, string, bool, int, int32, int64, uint32, uint64, float32, float64:
		default:
			return fmt.Errorf("invalid type of observation data %s: %T", field, value)
		}
	}
	s.observations = append(s.observations, Report{name, data})
	return nil
}

// Events returns the events that the plugin has sent.
func (s *System) Events() []Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events)
}

// Observations returns the observations that the plugin has recorded.
func (s *System) Observations() []Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.observations)
}

// Log is a log that several goroutines write, one line an entry in hclog's standard format.
type Log struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write appends to the log.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// String returns the whole log.
func (l *Log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// Count returns how many lines of a level ("info"; "": any) contain text.
func (l *Log) Count(level, text string) (n int) {
	for line := range strings.Lines(l.String()) {
		if (level == "" || strings.Contains(line, "["+strings.ToUpper(level)+"]")) && strings.Contains(line, text) {
			n++
		}
	}
	return n
}

func newUUID() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
