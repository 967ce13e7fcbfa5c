// Copyright the vault-plugin-secrets-openai authors
// SPDX-License-Identifier: MPL-2.0

// Command openaisim serves a simulated OpenAI Admin API for tests and demonstrations,
// until it gets SIGINT or SIGTERM. It prints one line of JSON with its URLs, a simulated
// admin key and the ids of what it holds. Package openaisim describes it.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"vault-plugin-secrets-openai/internal/openaisim"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "loopback address to listen on")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	if addr, ok := listener.Addr().(*net.TCPAddr); !ok || !addr.IP.IsLoopback() {
		log.Fatalf("%s is not a loopback address, and the control API has no authentication", *listen)
	}
	sim := openaisim.New()
	key, keyID := sim.AdminKey()
	base := "http://" + listener.Addr().String()
	json.NewEncoder(os.Stdout).Encode(map[string]string{
		"url": base + "/v1", "control_url": base + "/_sim", "token_url": base + "/oauth/token",
		"admin_api_key": key, "admin_api_key_id": keyID,
		"organization_id": openaisim.DefaultOrganization, "project_id": openaisim.DefaultProject,
	})
	server := &http.Server{Handler: sim, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		<-ctx.Done()
		server.Close()
	}()
	if err := server.Serve(listener); err != http.ErrServerClosed {
		log.Fatal(err)
	}
}
