"""GitHub's part in installation tokens, from its documentation: it takes what GitHub takes, and refuses the rest.

https://docs.github.com/apps/creating-github-apps/authenticating-with-a-github-app/generating-a-json-web-token-jwt-for-a-github-app
https://docs.github.com/rest/apps/apps · https://docs.github.com/rest/apps/installations
"""

import json
from datetime import UTC, datetime

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fakes.serving import Refused, Server

_RANK = {"read": 0, "write": 1, "admin": 2}
KEY = rsa.generate_private_key(65537, 2048)


def pem(key=KEY):
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()).decode()


class GitHub(Server):
    """One App, installed at `acme` with some permissions on some repositories; `tokens` maps a live token to what it may do."""

    app = "Iv23liExample"

    def __init__(self):
        super().__init__()
        self.installations = {77: "acme"}
        self.suspended = False
        self.granted = {"issues": "write", "contents": "write", "metadata": "read"}
        self.repositories = ["web", "payments", "Docs"]
        self.tokens = {}
        self.changed = {}
        """What the answer says in place of the truth: a fault to be noticed."""

    def answer(self, method, path, headers, body):
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        if method == "DELETE" and path == "/installation/token":
            if self.tokens.pop(bearer, None) is None:
                raise Refused(401, {"message": "Bad credentials"})
            return 204, None
        self._app(bearer)
        match [method, *path.split("/")[1:]]:
            case ["GET", "users", owner, "installation"]:
                found = [number for number, name in self.installations.items() if name == owner]
                if not found:
                    raise Refused(404, {"message": "Not Found"})
                return 200, {"id": found[0], "account": {"login": owner}}
            case ["POST", "app", "installations", number, "access_tokens"]:
                return 201, self._token(number, json.loads(body))
        raise Refused(404, {"message": "Not Found"})

    def _app(self, bearer):
        try:
            claims = jwt.decode(
                bearer, KEY.public_key(), algorithms=["RS256"], options={"verify_exp": False, "verify_iat": False}
            )
        except jwt.PyJWTError:
            raise Refused(401, {"message": "A JSON web token could not be decoded"}) from None
        if claims["iss"] != self.app:
            raise Refused(401, {"message": "Integration not found"})
        # It allows for no drift of its own: that is why one begins a minute back.
        if not claims["iat"] <= self.now < claims["exp"] <= self.now + 600 or claims["exp"] - claims["iat"] > 660:
            raise Refused(401, {"message": "'Expiration time' claim ('exp') is too far in the future, or it is over"})

    def _token(self, number, asked):
        owner = self.installations.get(int(number))
        if owner is None:
            raise Refused(404, {"message": "Not Found"})
        if self.suspended:
            raise Refused(403, {"message": "This installation has been suspended"})
        permissions = asked.get("permissions", self.granted)
        if any(_RANK[level] > _RANK.get(self.granted.get(name), -1) for name, level in permissions.items()):
            raise Refused(422, {"message": "The permissions requested are not granted to this installation."})
        known = {name.lower(): name for name in self.repositories}
        names = asked.get("repositories")
        if names is not None and (not names or any(name.lower() not in known for name in names)):
            raise Refused(422, {"message": "There is at least one repository that does not exist or is not accessible"})
        token = f"ghs_{len(self.seen):036d}"
        told = {
            "token": token,
            "expires_at": datetime.fromtimestamp(self.now + 3600, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "permissions": {"metadata": "read", **permissions},
            "repository_selection": "selected" if names else "all",
        }
        if names:
            told["repositories"] = [
                {"id": 1, "name": known[name.lower()], "full_name": f"{owner}/{known[name.lower()]}"} for name in names
            ]
        self.tokens[token] = told
        return told | self.changed
