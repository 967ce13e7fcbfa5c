# Vault Agent keeps a living OpenAI key in a file and restarts nothing: it renews the
# lease, and gets a new key when the lease has reached the role's max_ttl.
# vault agent -config=agent.hcl

vault {
  address = "https://vault.example.com:8200"
}

auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "/etc/openai-app/role-id"
      secret_id_file_path                 = "/etc/openai-app/secret-id"
      remove_secret_id_file_after_reading = false
    }
  }
}

template_config {
  # A static secret would be read again this often; leased ones are renewed.
  static_secret_render_interval = "5m"
  exit_on_retry_failure         = true
}

template {
  source      = "openai.env.ctmpl"
  destination = "/run/openai-app/openai.env"
  perms       = "0600"
}
