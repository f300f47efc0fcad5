"""`vault`: a dynamic secret of OpenBao or Vault, revoked there when it is no longer to be used.

Laws: a secret without a lease has no end, and is not taken. It ends with its lease or with the token that it was read with,
whichever is first. It is renewed within the life that the platform gives a credential, where its token outlives it: one that was
read with a login's token ends with that, and another is read.
https://developer.hashicorp.com/vault/docs/concepts/lease
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import orjson
from pydantic import Field, JsonValue

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Secret, leased, referenced
from broker.credentials.http import Answer, Roots, ask
from broker.credentials.settings import Issued, bare, chosen, lifetime, parsed
from broker.manifest.words import Model, Reference, Url, Word

_Path = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@-]*(/[A-Za-z0-9_][A-Za-z0-9_.@-]*)*$", max_length=512)]


class Login(Model):
    """How the broker logs in, where it has no token."""

    method: Literal["approle", "jwt", "kubernetes"] = Field(description="By which of Vault's methods.")
    role: Word = Field(description="The role, or the role ID of approle. The entry's secret is the JWT, or the secret ID.")
    mount: _Path | None = Field(None, description="Where the method is mounted; at its own name if absent.")


class DynamicSecret(Model):
    """Which secret is made."""

    path: _Path = Field(description="The path that makes it, such as database/creds/readonly.")
    data: dict[Word, JsonValue] | None = Field(None, description="What is written to the path; if absent, the path is read.")


class VaultSettings(Issued):
    """A server, how the broker proves itself there, and which secret it asks for."""

    address: Url = Field(description="The server's URL, such as https://vault.example:8200.")
    ca: Roots | None = None
    namespace: _Path | None = Field(None, description="The namespace.")
    secret: Reference = Field(description="A token; with login, what proves the broker to it.")
    login: Login | None = Field(None, description="How the broker logs in; if absent, the secret is a token.")
    field: Word = Field(description="The field of the answer's data that is the credential.")
    user_field: Word | None = Field(None, description="The field that is the user of Basic authentication; see as.basic.")
    scopes: DynamicSecret | Annotated[dict[Word, DynamicSecret], Field(min_length=1)] = Field(  # type: ignore[assignment]  # its own
        description="The secret; or, by an operation's name or an effect, one for each."
    )


class VaultSource:
    """Reads secrets, and revokes their leases."""

    name: ClassVar[str] = "vault"
    Settings: ClassVar[type[Model]] = VaultSettings

    def narrowed(self, occasion: Occasion) -> tuple[str, ...]:
        """The path, and what is written to it."""
        secret = chosen(occasion.spec.settings["scopes"], occasion, "path")
        return (secret["path"], *(f"{name}={value}" for name, value in sorted((secret.get("data") or {}).items())))

    async def fetch(self, occasion: Occasion, now: float) -> Lease:
        """The secret, read with a token of its own where the broker logs in."""
        settings, tool = parsed(VaultSettings, occasion.spec.settings), occasion.tool.name
        wanted = chosen(occasion.spec.settings["scopes"], occasion, "path")
        token, end = await _token(settings, tool)
        data = wanted.get("data")
        answer = await _ask(settings, "GET" if data is None else "PUT", wanted["path"], token, data)
        if not answer.ok:
            raise _refused(answer, f"to make a secret for {tool!r} at {wanted['path']}", "allow the broker's policy this path")
        made, lease_id = answer.document.get("data"), answer.document.get("lease_id")
        if not isinstance(made, Mapping) or not isinstance(lease_id, str) or not lease_id:
            what = f"Vault gave no lease for {wanted['path']}, so nobody knows when what is there ends"
            raise CredentialUnavailable(what, "name a path of dynamic secrets")
        life = min(lifetime(answer.document.get("lease_duration"), None, self.name), end)
        spec = occasion.spec
        if settings.user_field:
            spec = replace(spec, basic=bare(made.get(settings.user_field), self.name))
        handle = Secret(orjson.dumps([dict(occasion.spec.settings), tool, lease_id]).decode())
        value = bare(made.get(settings.field), self.name)
        return leased(spec, value, lease_id=lease_id, scopes=self.narrowed(occasion), expires=now + life, handle=handle)

    async def renew(self, lease: Lease, occasion: Occasion, now: float) -> Lease | None:
        """The same secret for as long as Vault makes it, if the broker's own token read it."""
        settings, tool = parsed(VaultSettings, occasion.spec.settings), occasion.tool.name
        if settings.login or lease.handle is None:
            return None
        token, end = await _token(settings, tool)
        answer = await _ask(settings, "PUT", "sys/leases/renew", token, {"lease_id": orjson.loads(lease.handle.reveal())[-1]})
        if not answer.ok:
            return None
        return replace(lease, expires=now + min(lifetime(answer.document.get("lease_duration"), None, self.name), end))

    async def revoke(self, handle: Secret) -> None:
        """Revoke the lease, and wait until Vault has done it. One that is gone already counts as revoked there."""
        written, tool, lease_id = orjson.loads(handle.reveal())
        settings = parsed(VaultSettings, written)
        token, _ = await _token(settings, tool)
        answer = await _ask(settings, "PUT", "sys/leases/revoke", token, {"lease_id": lease_id, "sync": True})
        if not answer.ok:
            raise _refused(answer, f"to revoke a lease of {tool!r}", "allow the broker's policy `update` on sys/leases/revoke")


async def _token(settings: VaultSettings, tool: str) -> tuple[str, float]:
    """A token, and the seconds that it lives: what it reads ends with it."""
    proof, login = referenced(settings.secret, tool), settings.login
    if login is None:
        answer = await _ask(settings, "GET", "auth/token/lookup-self", proof)
        token, told, word, remedy = proof, answer.document.get("data"), "ttl", "put a token there that is valid"
    else:
        fields = {"role_id": login.role, "secret_id": proof} if login.method == "approle" else {"role": login.role, "jwt": proof}
        answer = await _ask(settings, "PUT", f"auth/{login.mount or login.method}/login", None, fields)
        told, word, remedy = answer.document.get("auth"), "lease_duration", "see `login` and `secret`, and the role there"
    if not answer.ok or not isinstance(told, Mapping):
        raise _refused(answer, f"the broker's proof for {tool!r}", remedy)
    if login:
        token = bare(told.get("client_token"), VaultSource.name)
    # Zero is a token that never ends.
    return token, lifetime(told.get(word), None, VaultSource.name) if told.get(word) != 0 else float("inf")


async def _ask(settings: VaultSettings, method: str, path: str, token: str | None, body: object = None) -> Answer:
    headers = {"x-vault-request": "true"}
    if token:
        headers["x-vault-token"] = bare(token, VaultSource.name)
    if settings.namespace:
        headers["x-vault-namespace"] = settings.namespace
    url = f"{settings.address.rstrip('/')}/v1/{path}"
    return await ask(method, url, headers=headers, body=body, ca=settings.ca)


def _refused(answer: Answer, what: str, remedy: str) -> CredentialUnavailable:
    # https://developer.hashicorp.com/vault/api-docs#http-status-codes
    states = {
        404: "correct the path, or mount its engine",
        429: "ask an active node",
        473: "ask an active node",
        503: "unseal it",
    }
    return CredentialUnavailable(f"Vault refuses {what} (status {answer.status})", states.get(answer.status, remedy))
