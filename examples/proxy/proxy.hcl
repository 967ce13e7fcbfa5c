# Vault Proxy logs in for applications on this machine and caches their leases, so that
# several processes share one key, which the proxy renews.
# vault proxy -config=proxy.hcl
# curl http://127.0.0.1:8100/v1/openai/creds/my-role

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

api_proxy {
  use_auto_auth_token = "force"
}

cache {}

listener "tcp" {
  address     = "127.0.0.1:8100"
  tls_disable = true
}
