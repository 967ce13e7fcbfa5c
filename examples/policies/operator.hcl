# An operator of the engine: its config, its roles and its leases, but no keys.

path "openai/config" {
  capabilities = ["create", "read", "update", "delete"]
}

path "openai/config/rotate" {
  capabilities = ["update"]
}

path "openai/roles" {
  capabilities = ["list"]
}

path "openai/roles/*" {
  capabilities = ["create", "read", "update", "delete"]
}

path "openai/metrics" {
  capabilities = ["read"]
}

# Revoke what a role has issued: vault lease revoke -prefix openai/creds/my-role
path "sys/leases/revoke-prefix/openai/*" {
  capabilities = ["update", "sudo"]
}

path "sys/leases/lookup/openai/*" {
  capabilities = ["list", "sudo"]
}
