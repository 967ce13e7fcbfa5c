// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Gotest runs "go test" with its arguments and shows what matters of it: the line of
// each package, the output of tests that failed or were skipped, and one line for each
// test that took a second or more, so that a long run is seen to move. It ends with what
// failed and a count, and fails when no test ran.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
)

// event is a line of "go test -json"; see "go doc test2json".
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64 // seconds
}

// complaint matches the first line of what a test says.
var complaint = regexp.MustCompile(`(?m)^ +\w+_test\.go:\d+: .{0,300}`)

// report turns events into output.
type report struct {
	out                     *bufio.Writer
	output                  map[string]*strings.Builder // of the tests that are running
	passed, failed, skipped int                         // top-level tests, as in Go's own list
	complaints              strings.Builder             // of tests that failed: their logs may be long
}

func main() {
	os.Exit(run(os.Args[1:]))
}

// run returns the exit code.
func run(args []string) int {
	cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gotest:", err)
		return 1
	}
	r := &report{out: bufio.NewWriter(os.Stdout), output: map[string]*strings.Builder{}}
	lines := bufio.NewReader(stdout) // a Scanner would limit the length of a line
	for {
		line, readErr := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) == nil {
				r.add(e)
			} else {
				r.out.Write(line)
			}
			r.out.Flush()
		}
		if readErr != nil {
			break
		}
	}
	err = cmd.Wait()
	fmt.Print(r.complaints.String())
	fmt.Printf("%d passed, %d failed, %d skipped\n", r.passed, r.failed, r.skipped)
	switch {
	case err != nil:
		return 1
	case r.passed == 0:
		fmt.Fprintln(os.Stderr, "gotest: no test ran:", strings.Join(args, " "))
		return 1
	}
	return 0
}

// add takes in one event.
func (r *report) add(e event) {
	if e.Test == "" {
		// A package without tests says so in its output; that is of no interest.
		if e.Action == "output" && !strings.Contains(e.Output, "[no test files]") && e.Output != "PASS\n" ||
			e.Action == "build-output" {
			r.out.WriteString(e.Output)
		}
		return
	}
	top, _, sub := strings.Cut(e.Test, "/")
	key := e.Package + " " + top // a failed subtest fails its test: shown together
	if r.output[key] == nil {
		r.output[key] = &strings.Builder{}
	}
	if e.Action == "output" {
		r.output[key].WriteString(e.Output)
		return
	}
	if sub {
		return
	}
	switch e.Action {
	case "pass":
		r.passed++
		switch output := r.output[key].String(); {
		case strings.Contains(output, "--- SKIP"):
			r.out.WriteString(output)
		case e.Elapsed >= 1:
			fmt.Fprintf(r.out, "--- PASS: %s (%.1fs)\n", e.Test, e.Elapsed)
		}
	case "skip":
		r.skipped++
		r.out.WriteString(r.output[key].String())
	case "fail":
		r.failed++
		output := r.output[key].String()
		r.out.WriteString(output)
		r.complaints.WriteString("FAILED: " + e.Test + "\n")
		for _, line := range complaint.FindAllString(output, 20) {
			r.complaints.WriteString(line + "\n")
		}
	default:
		return // run, pause, cont
	}
	delete(r.output, key)
}
