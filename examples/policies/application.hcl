# An application: gets keys of its own role and gives them back. That it may renew its
# leases and its token is in Vault's policy "default".
# vault policy write openai-my-role application.hcl

# "update" is for tools that send parameters, like ttl: they use PUT or POST.
path "openai/creds/my-role" {
  capabilities = ["read", "update"]
}

# An application that reads a static role's key needs only this.
path "openai/static-creds/my-role" {
  capabilities = ["read"]
}

# Works for who knows the lease's ID, which only the reader of the key was told.
path "sys/leases/revoke" {
  capabilities = ["update"]
}

# The same for the CLI, which puts the ID into the path.
path "sys/leases/revoke/openai/creds/my-role/*" {
  capabilities = ["update"]
}
