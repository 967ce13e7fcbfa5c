"""An application that takes access tokens from Vault, and asks again before one ends.

It needs VAULT_ADDR, VAULT_TOKEN (with the policy policies/application.hcl) and nothing but
Python's standard library. A lease of a token is not renewable, so it takes a new one when
less than a fifth of its time, and at most five minutes, are left. Other keys of the engine
work in the same way. It lists OpenAI's models: a role with scopes needs api.model.read.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request

ROLE = os.environ.get("OPENAI_ROLE", "my-role")
OPENAI = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the token to another host."""

    def redirect_request(self, *_):
        return None


def ask(url, headers, timeout):
    """Returns the JSON that url answers. A refusal is an OSError with the server's text."""
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read(1000).decode(errors="replace")
        raise OSError(f"{url} answered {error.code}: {text}") from None


class Token:
    """The token of a role: get() returns one that still lives for a while."""

    def __init__(self, role):
        self.role = role
        self.lock = threading.Lock()
        self.value = ""
        self.renew_at = 0.0  # by time.monotonic, which nobody sets
        self.ends_at = 0.0

    def get(self):
        with self.lock:
            if time.monotonic() >= self.renew_at:
                try:
                    self._ask()
                except OSError:
                    if time.monotonic() >= self.ends_at:
                        raise  # the last one has ended
                    self.renew_at = min(time.monotonic() + 10, self.ends_at)
            return self.value

    def _ask(self):
        start = time.monotonic()
        secret = ask(
            os.environ["VAULT_ADDR"] + "/v1/openai/creds/" + self.role,
            {"X-Vault-Token": os.environ["VAULT_TOKEN"], "X-Vault-Request": "true"},
            90,
        )
        life = secret["lease_duration"]
        self.value = secret["data"]["api_key"]
        self.ends_at = start + life
        self.renew_at = self.ends_at - min(300, life / 5)


def models(token):
    """Calls OpenAI with a token that lives."""
    answer = ask(OPENAI + "/models", {"Authorization": "Bearer " + token.get()}, 60)
    return [model["id"] for model in answer["data"]]


if __name__ == "__main__":
    TOKEN = Token(ROLE)
    for _ in range(int(os.environ.get("CALLS", "1"))):
        print(len(models(TOKEN)), "models", flush=True)
        time.sleep(float(os.environ.get("PAUSE", "1")))
