"""`jwt`: a token of ours for tools that trust our keys (JWT, RFC 7519; EdDSA, RFC 8037; keys at the admin API's `/jwks.json`)."""

import base64
import hashlib
import secrets
from collections.abc import Mapping
from typing import ClassVar

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import Field

from broker.credentials.base import Lease, Occasion, leased
from broker.credentials.settings import Lifetime, Scope
from broker.manifest.words import Model, Word

DEFAULT_TTL_S = 300
# A token is replaced this long before it ends, so that none ends on its way.
MARGIN_S = 30
ISSUER = "envoy-tool-broker"
_CACHED = 65_536


class JwtSettings(Model):
    """A token of the broker's own, signed with EdDSA; `/jwks.json` of the admin API has the key."""

    audience: Word | None = Field(None, description="Whom the token is for; the tool's name unless given.")
    scopes: tuple[Scope, ...] = Field((), description="What the token says that it may do.")
    ttl: Lifetime | None = Field(None, description="How long a token lives, 5m unless given.")


class JwtIssuer:
    """Mints `aud` = tool, `sub` = the agent's SPIFFE ID, `scope`, `run_id`, cached until it nears its end."""

    name: ClassVar[str] = "jwt"
    Settings: ClassVar[type[Model]] = JwtSettings

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.key_id = key_id(key)
        self._leases: dict[tuple[object, ...], Lease] = {}

    def cached(self, occasion: Occasion, now: float) -> Lease:
        """The lease for this occasion, minted here when there is none: signing takes about 50 us and waits for nobody."""
        scopes = tuple(occasion.spec.settings.get("scopes", ()))
        key = (occasion.agent.name, occasion.agent.spiffe, occasion.tool.name, occasion.run_id, occasion.spec)
        lease = self._leases.get(key)
        if lease is not None and lease.expires is not None and now < lease.expires - min(MARGIN_S, self._ttl(occasion) / 2):
            return lease
        if len(self._leases) >= _CACHED:
            del self._leases[next(iter(self._leases))]
        self._leases[key] = lease = self._mint(occasion, scopes, now)
        return lease

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """The same as `cached`, which never fails."""
        return self.cached(occasion, now)

    def _ttl(self, occasion: Occasion) -> int:
        return min(int(occasion.spec.settings.get("ttl", DEFAULT_TTL_S)), occasion.max_ttl)

    def _mint(self, occasion: Occasion, scopes: tuple[str, ...], now: float) -> Lease:
        lease_id = f"jwt-{secrets.token_hex(8)}"
        expires = int(now) + self._ttl(occasion)
        claims: dict[str, object] = {
            "aud": occasion.spec.settings.get("audience") or occasion.tool.name,
            "sub": occasion.agent.spiffe or occasion.agent.name,
            "iat": int(now),
            "exp": expires,
            "jti": lease_id,
            "scope": " ".join(scopes),
            **({"run_id": occasion.run_id} if occasion.run_id else {}),
        }
        return leased(occasion.spec, self.sign(claims), lease_id=lease_id, scopes=scopes, expires=float(expires))

    def sign(self, claims: Mapping[str, object]) -> str:
        """The claims as a token of the broker's, beside `iss`."""
        return jwt.encode({"iss": ISSUER, **claims}, self._key, algorithm="EdDSA", headers={"kid": self.key_id})


def key_id(key: Ed25519PrivateKey) -> str:
    """The key's name: the first 16 hex digits of the SHA-256 of its public half."""
    return hashlib.sha256(_raw(key)).hexdigest()[:16]


def jwks(key: Ed25519PrivateKey) -> dict[str, list[dict[str, str]]]:
    """The public key as a JWK Set (RFC 7517, RFC 8037 section 2)."""
    x = base64.urlsafe_b64encode(_raw(key)).rstrip(b"=").decode()
    return {"keys": [{"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": key_id(key), "x": x}]}


def _raw(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
