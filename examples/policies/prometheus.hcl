# Prometheus: what the engine counts, and what Vault itself counts.
# vault policy write openai-prometheus prometheus.hcl

path "openai/metrics" {
  capabilities = ["read"]
}

path "sys/metrics" {
  capabilities = ["read"]
}
