# Prometheus: the plugin's metrics and Vault's own.

path "openai/metrics" {
  capabilities = ["read"]
}

path "sys/metrics" {
  capabilities = ["read"]
}
