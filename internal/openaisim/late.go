// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

package openaisim

import (
	"bytes"
	"encoding/json"
	"slices"
	"time"
)

// lateCall is a call that was admitted and is not carried out yet; see Fault.Late.
type lateCall struct {
	due  time.Time
	call *Call
	in   *incoming
	rt   *route
	ids  map[string]string // see admit
}

// postpone keeps a call, if it is admitted, until its time.
func (s *Server) postpone(in *incoming, call *Call, late time.Duration) {
	s.lock()
	defer s.mu.Unlock()
	rt, ids, err := s.admit(in)
	if err != nil {
		return
	}
	kept := *in
	kept.header = in.header.Clone() // the caller's, who may use it again
	s.late = append(s.late, lateCall{s.now().Add(late), call, &kept, rt, ids})
	slices.SortStableFunc(s.late, func(a, b lateCall) int { return a.due.Compare(b.due) })
}

// carryOutLate carries out the late calls that are due, each with the clock at the time
// when it was due. Nothing waits for them: each look at the server begins with this, and
// so it can't be told from doing it in time.
func (s *Server) carryOutLate() {
	now := s.now()
	for len(s.late) > 0 && !now.Before(s.late[0].due) {
		l := s.late[0]
		s.late = s.late[1:]
		s.moment = l.due
		_, err := s.process(l.in, l.rt, l.ids)
		l.call.Processed = err == nil
	}
	s.moment = time.Time{}
}

// faultFields are the fields of a fault, but for the way in which JSON reads and writes them.
type faultFields Fault

// faultJSON is a fault in JSON.
type faultJSON struct {
	*faultFields
	Late string `json:"late"` // instead of the field of the same name
}

// MarshalJSON writes Late as a string.
func (f Fault) MarshalJSON() ([]byte, error) {
	return json.Marshal(faultJSON{(*faultFields)(&f), f.Late.String()})
}

// UnmarshalJSON reads Late as time.ParseDuration does, and refuses unknown fields.
func (f *Fault) UnmarshalJSON(text []byte) (err error) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	v := faultJSON{faultFields: (*faultFields)(f)}
	if err := decoder.Decode(&v); err != nil {
		return err
	}
	if v.Late != "" {
		f.Late, err = time.ParseDuration(v.Late)
	}
	return err
}
