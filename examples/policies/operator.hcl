# Who runs the engine: everything but the keys it hands out.
# vault policy write openai-operator operator.hcl

path "openai/config" {
  capabilities = ["create", "read", "update", "delete"]
}

path "openai/config/rotate" {
  capabilities = ["update"]
}

# The mount as an identity provider, for access tokens, and its signing key.
path "openai/config/identity" {
  capabilities = ["read", "update", "delete"]
}

path "openai/config/identity/rotate" {
  capabilities = ["update"]
}

path "openai/roles" {
  capabilities = ["list"]
}

path "openai/roles/*" {
  capabilities = ["create", "read", "update", "delete"]
}

path "openai/static-roles" {
  capabilities = ["list"]
}

path "openai/static-roles/*" {
  capabilities = ["create", "read", "update", "delete"]
}

path "openai/rotate-role/*" {
  capabilities = ["update"]
}

path "openai/metrics" {
  capabilities = ["read"]
}

# Deleting what was left behind at OpenAI, and what the last pass did.
path "openai/tidy" {
  capabilities = ["read", "update"]
}

# Which leases there are, and ending all of a role's at once, after a leak for example:
# vault lease revoke -prefix openai/creds/my-role
path "sys/leases/lookup/openai/creds/*" {
  capabilities = ["list", "sudo"]
}

path "sys/leases/revoke-prefix/openai/creds/*" {
  capabilities = ["update", "sudo"]
}
