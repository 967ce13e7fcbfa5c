# The mount, its configuration and a role. The admin API key is given by hand, so that no state or plan has it:
#
#   terraform apply -target=vault_mount.openai
#   vault write openai/config admin_api_key=- organization_id=org-example   # and api_endpoint, certificates
#   terraform apply
#
# A configuration write keeps what it does not name, so no apply needs the key. A later key is written by hand too:
# after an apply that failed to write one, the provider takes it for written.
#
# In data_json write values as reading shows them, or each plan shows a change: durations as numbers of seconds, lists
# as lists, ids without a line break (trimspace(file(…))), no null. A field that is taken out of data_json keeps its
# value: write another one. What is "fixed" changes with terraform apply -replace=…. Terraform does not show Vault's
# warnings.

terraform {
  required_providers {
    vault = {
      source  = "hashicorp/vault"
      version = ">= 5.9"
    }
  }
}

# VAULT_ADDR and VAULT_TOKEN. The token needs the operator's policy; create, read, update and delete on
# sys/mounts/openai, sys/mounts/openai/tune and sys/policies/acl/openai-my-role; and update on auth/token/create,
# since the provider makes a token for each run.
provider "vault" {}

resource "vault_mount" "openai" {
  path        = "openai"
  type        = "vault-plugin-secrets-openai"
  description = "OpenAI API keys under leases"
}

resource "vault_generic_endpoint" "config" {
  path                 = "${vault_mount.openai.path}/config"
  ignore_absent_fields = true # reading it back shows more than was written
  disable_delete       = true # leases can't be revoked, nor static roles' keys deleted, without a configuration
  data_json = jsonencode({
    organization_id = "org-example"
    rotation_period = 2592000 # 30 days
  })
}

resource "vault_generic_endpoint" "my_role" {
  depends_on           = [vault_generic_endpoint.config]
  path                 = "${vault_mount.openai.path}/roles/my-role"
  ignore_absent_fields = true
  data_json = jsonencode({
    project_id = "proj_example"
    ttl        = 3600
    max_ttl    = 86400
    scopes     = ["api.responses.write"]
  })
}

resource "vault_policy" "application" {
  name   = "openai-my-role"
  policy = file("${path.module}/../policies/application.hcl")
}
