# An application: read keys of its own role, keep them alive, and give them back.
# vault policy write openai-my-role application.hcl

path "openai/creds/my-role" {
  capabilities = ["read"]
}

# A token may always renew itself and look itself up (the policy "default"). These two
# are for leases that it was given; who does not know a lease's ID can't use them.
path "sys/leases/renew" {
  capabilities = ["update"]
}

path "sys/leases/revoke" {
  capabilities = ["update"]
}
