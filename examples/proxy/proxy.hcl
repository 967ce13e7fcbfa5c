# Vault Proxy on the application's machine: the application needs no token, asks
# http://127.0.0.1:8100/v1/openai/creds/my-role and takes data.api_key. The proxy hands
# out the same key while its lease lives, and renews it.
# vault proxy -config=proxy.hcl

vault {
  address = "https://vault.example.com:8200"
}

auto_auth {
  method "approle" {
    config = {
      role_id_file_path                   = "/etc/vault-proxy/role-id"
      secret_id_file_path                 = "/etc/vault-proxy/secret-id"
      remove_secret_id_file_after_reading = false
    }
  }
}

# Whatever token a request brings, the proxy's own is used.
api_proxy {
  use_auto_auth_token = "force"
}

cache {}

# Everybody on this machine can ask: on a shared one, listen on a unix socket instead.
# Requests need the header "X-Vault-Request: true", which a web page in a browser on this
# machine can't send; Vault's command line and libraries send it.
listener "tcp" {
  address                = "127.0.0.1:8100"
  tls_disable            = true
  require_request_header = true
}
