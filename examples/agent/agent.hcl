# Vault Agent beside an application that reads OPENAI_API_KEY from its environment. The
# agent renews the lease until the role's max_ttl, then gets a new key, writes the file
# again and restarts the application.
# vault agent -config=agent.hcl

vault {
  address = "https://vault.example.com:8200"
}

auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "/etc/vault-agent/role-id"
      secret_id_file_path                 = "/etc/vault-agent/secret-id"
      remove_secret_id_file_after_reading = false
    }
  }
}

template_config {
  # End with an error when Vault does not answer for good, for the service manager to see.
  exit_on_retry_failure = true
}

template {
  source               = "/etc/vault-agent/openai.env.ctmpl"
  destination          = "/run/my-app/openai.env"
  perms                = "0600"
  error_on_missing_key = true

  exec {
    command = ["systemctl", "try-restart", "my-app.service"]
  }
}
