"""Vault's part in dynamic secrets, from its documentation: tokens with policies and ends, three logins, leases.

https://developer.hashicorp.com/vault/api-docs · /auth/approle · /auth/jwt · /auth/token · /system/leases
"""

import json
from dataclasses import dataclass, field

from fakes.serving import Refused, Server


@dataclass
class Token:
    ends: float | None
    policy: dict = field(default_factory=dict)
    children: set = field(default_factory=set)


WORKS = {
    "database/creds/readonly": {"read"},
    "aws/creds/deploy": {"update"},
    "sys/leases/revoke": {"update"},
    "sys/leases/renew": {"update"},
}


class Vault(Server):
    """`leases` maps a live lease ID to its end and the secret's data. A token that ends takes its leases along."""

    def __init__(self):
        super().__init__()
        self.namespace = None
        self.sealed = False
        self.tokens = {"hvs.root-like": Token(None, WORKS)}
        self.roles = {
            "auth/approle/login": {"role_id": "role-1", "secret_id": "secret-id-0123456789"},
            "auth/kubernetes/login": {"role": "broker", "jwt": "eyJ.service-account"},
            "auth/corp-jwt/login": {"role": "broker", "jwt": "eyJ.svid"},
        }
        self.token_ttl = 7200
        self.lease_ttl = 600
        self.max_lease_ttl = 3600
        self.leases = {}
        self.made = {}
        self.written = []
        self.changed = {}

    def answer(self, method, path, headers, body):
        if self.sealed:
            raise Refused(503, {"errors": ["Vault is sealed"]})
        if headers.get("x-vault-namespace") != self.namespace or headers.get("x-vault-request") != "true":
            raise Refused(404, {"errors": ["no handler for route"]})
        path = path.removeprefix("/v1/")
        asked = json.loads(body) if body else {}
        if path in self.roles and method in ("PUT", "POST"):
            return 200, self._login(path, asked)
        token = self.tokens.get(headers.get("x-vault-token", ""))
        if token is None or (token.ends is not None and token.ends <= self.now):
            raise Refused(403, {"errors": ["permission denied", "invalid token"]})
        if (method, path) == ("GET", "auth/token/lookup-self"):
            return 200, {"data": {"ttl": 0 if token.ends is None else int(token.ends - self.now), "renewable": True}}
        capability = {"GET": "read", "PUT": "update", "POST": "update"}.get(method)
        if capability not in token.policy.get(path, ()):
            raise Refused(403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]})
        if path == "sys/leases/renew":
            return 200, self._renewed(asked.get("lease_id"))
        if path == "sys/leases/revoke":
            if not asked.get("lease_id"):
                raise Refused(400, {"errors": ["lease_id must be specified"]})
            self.leases.pop(asked["lease_id"], None)
            return 204, None
        self.written.append((method, path, asked))
        return 200, self._secret(path, token)

    def _login(self, path, asked):
        if asked != self.roles[path]:
            raise Refused(400, {"errors": ["invalid role or secret ID"]})
        name = f"hvs.login-{len(self.seen)}"
        ends = self.now + self.token_ttl if self.token_ttl else None
        self.tokens[name] = Token(ends, WORKS)
        return {"auth": {"client_token": name, "lease_duration": self.token_ttl, "renewable": True, "token_type": "service"}}

    def _renewed(self, lease_id):
        ends, data = self.leases.get(lease_id, (0, None))
        if ends <= self.now:
            raise Refused(400, {"errors": ["lease not found"]})
        most = self.made[lease_id] + self.max_lease_ttl - self.now
        self.leases[lease_id] = (self.now + min(self.lease_ttl, most), data)
        return {"lease_id": lease_id, "lease_duration": int(min(self.lease_ttl, most)), "renewable": True}

    def _secret(self, path, token):
        lease_id = f"{path}/{len(self.seen):024d}"
        data = {"username": f"v-broker-{len(self.seen)}", "password": f"made-by-vault-{len(self.seen)}"}
        ends = self.now + self.lease_ttl
        self.made[lease_id] = self.now
        self.leases[lease_id] = (ends if token.ends is None else min(ends, token.ends), data)
        return {"lease_id": lease_id, "lease_duration": self.lease_ttl, "renewable": True, "data": data} | self.changed
