# The engine's mount, schedule and roles by Terraform. No key gets into the state.

terraform {
  required_version = ">= 1.11"
  required_providers {
    vault = {
      source  = "hashicorp/vault"
      version = ">= 5.0"
    }
  }
}

variable "project_id" {
  type = string
}

resource "vault_mount" "openai" {
  path = "openai"
  type = "vault-plugin-secrets-openai"
}

# The admin key itself is best written by hand and then rotated, so that only Vault knows
# it: vault write openai/config admin_api_key=- organization_id=org-…
# What follows manages the schedule.
resource "vault_generic_endpoint" "config" {
  path                 = "${vault_mount.openai.path}/config"
  disable_delete       = true
  ignore_absent_fields = true
  data_json            = jsonencode({ rotation_period = 2592000 })
}

resource "vault_generic_endpoint" "my_role" {
  path                 = "${vault_mount.openai.path}/roles/my-role"
  ignore_absent_fields = true
  data_json = jsonencode({
    project_id = var.project_id
    scopes     = ["api.responses.write"]
    ttl        = 3600
    max_ttl    = 86400
  })
}
