# A key for this run only, never in plan or state. A configuration of its own, since Terraform reads the key also when it
# plans: mount and role must be there before. Each key ends with its lease, and at the latest with the token that the
# provider makes for the run (20 minutes, max_lease_ttl_seconds), so keep the ttl of roles for Terraform short. For runs
# that take longer, read a static role's key: openai/static-creds/…

terraform {
  required_version = ">= 1.10" # OpenTofu: 1.11
  required_providers {
    vault = {
      source  = "hashicorp/vault"
      version = ">= 5.9"
    }
  }
}

ephemeral "vault_generic_secret" "openai" {
  path = "openai/creds/terraform"
}

resource "terraform_data" "smoke_test" {
  provisioner "local-exec" {
    command = "curl --fail --silent --output /dev/null -H \"Authorization: Bearer $OPENAI_API_KEY\" https://api.openai.com/v1/models"
    environment = {
      OPENAI_API_KEY = ephemeral.vault_generic_secret.openai.data["api_key"]
    }
  }
}
