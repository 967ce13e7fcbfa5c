# The mount, its configuration and a role. The admin API key is given once:
#
#   TF_VAR_admin_api_key=sk-admin-… terraform apply
#   vault write -force openai/config/rotate    # the key in the state is dead from now on
#   terraform apply                            # takes it out of the state
#
# A configuration write keeps what it does not name, so later applies need no key.

terraform {
  required_version = ">= 1.10" # for ephemeral resources
  required_providers {
    vault = {
      source  = "hashicorp/vault"
      version = ">= 5.9"
    }
  }
}

provider "vault" {} # VAULT_ADDR and VAULT_TOKEN, with the operator's policy and sys/mounts

variable "admin_api_key" {
  type      = string
  default   = ""
  sensitive = true
}

resource "vault_mount" "openai" {
  path        = "openai"
  type        = "vault-plugin-secrets-openai"
  description = "OpenAI API keys under leases"
}

resource "vault_generic_endpoint" "config" {
  path                 = "${vault_mount.openai.path}/config"
  ignore_absent_fields = true # reading it back shows more than was written, and no key
  disable_delete       = true # leases can't be revoked without a configuration
  data_json = jsonencode(merge({
    organization_id = "org-example"
    rotation_period = 2592000 # 30 days
  }, var.admin_api_key == "" ? {} : { admin_api_key = var.admin_api_key }))
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
