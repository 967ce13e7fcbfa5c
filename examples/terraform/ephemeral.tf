# A key for this run only, never in plan or state. Terraform also gets one when it plans;
# each ends with its lease, so keep the ttl of roles for Terraform short.

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
