"""Who is calling: agent tokens and SPIFFE IDs. What an agent says of itself in any other way is never believed.

Law: a token is signed, lives at most an hour, is never stored, and can be taken back: `Standing` knows, for each agent, the
moment before which its tokens no longer count. An operator's token is of another type, so that neither passes as the other.
"""

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.policy.snapshot import PolicySnapshot
from broker.policy.types import Code, Decision, Door, deny

MAX_TOKEN_S = 3600
_AUDIENCE = "envoy-tool-broker"
_TYPE = "broker-agent+jwt"  # RFC 8725 section 3.11: explicit typing, so that no other JWT of ours passes as a token
_OPERATOR = "broker-operator+jwt"
MAX_OPERATOR_S = 43_200  # a working day
_CACHED = 4096


@dataclass(frozen=True, slots=True)
class Principal:
    """A proven identity: the agent's name, and the birth and end of its proof (seconds since the epoch; 0 where it has none)."""

    agent: str
    issued: float = 0
    expires: float = 0

    def encode(self) -> str:
        """The token's times, as they travel in Envoy's filter state through a tunnel."""
        return f"{self.issued:.6f}/{self.expires:.0f}" if self.expires else ""

    @classmethod
    def decode(cls, agent: str, times: str) -> "Principal":
        """The reverse of `encode`. Only Envoy's filter state may be passed in here."""
        issued, _, expires = times.partition("/")
        return cls(agent, float(issued or 0), float(expires or 0))


@dataclass(frozen=True, slots=True)
class Person:
    """Who does something about agents: a name, and the groups that the proof says."""

    name: str
    groups: tuple[str, ...] = ()


class TokenAuthority:
    """Signs and checks agent tokens (JWT, RFC 7519, EdDSA). Checking costs about 0.1 ms, so results are cached."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._public = key.public_key()
        self._seen: dict[bytes, Principal] = {}

    def mint(self, agent: str, now: float, ttl: int = MAX_TOKEN_S) -> str:
        """A token for `agent`, valid for `ttl` seconds, at most an hour."""
        return self._sign(_TYPE, now, {"sub": agent, "exp": int(now) + min(ttl, MAX_TOKEN_S)})

    def mint_operator(self, person: Person, now: float, ttl: int = MAX_OPERATOR_S) -> str:
        """A token by which this person may act on agents over the admin API; valid for `ttl` seconds, at most twelve hours."""
        claims = {"sub": person.name, "groups": list(person.groups), "exp": int(now) + min(ttl, MAX_OPERATOR_S)}
        return self._sign(_OPERATOR, now, claims)

    def operator(self, token: str, now: float) -> Person | None:
        """Whose operator token this is, or None when it proves nothing."""
        claims = self._claims(token, _OPERATOR)
        return Person(str(claims["sub"]), tuple(map(str, claims.get("groups", ())))) if claims and now < claims["exp"] else None

    def _sign(self, kind: str, now: float, claims: dict[str, Any]) -> str:
        # `iat` with its fraction (RFC 7519 section 2, NumericDate): a token made right after a revocation counts.
        known = {"iss": _AUDIENCE, "aud": _AUDIENCE, "iat": now, "jti": secrets.token_hex(8), **claims}
        return jwt.encode(known, self._key, algorithm="EdDSA", headers={"typ": kind})

    def check(self, token: str, now: float) -> Principal | None:
        """Who the token speaks for, or None when it proves nothing."""
        digest = hashlib.sha256(token.encode()).digest()
        principal = self._seen.get(digest)
        if principal is None and (principal := self._verify(token)):
            if len(self._seen) >= _CACHED:
                self._seen.clear()
            self._seen[digest] = principal
        return principal if principal and principal.issued - 1 <= now < principal.expires else None

    def _verify(self, token: str) -> Principal | None:
        if not (claims := self._claims(token, _TYPE)):
            return None
        principal = Principal(str(claims["sub"]), claims["iat"], claims["exp"])
        return principal if principal.expires - principal.issued <= MAX_TOKEN_S else None

    def _claims(self, token: str, kind: str) -> dict[str, Any] | None:
        """The claims of a token of this kind that is ours; its times are numbers, for the caller to check."""
        try:
            if jwt.get_unverified_header(token).get("typ") != kind:
                return None
            # Times are checked against the caller's clock, and also for cached tokens.
            options: Any = {"require": ["sub", "iat", "exp", "aud", "iss"], "verify_exp": False, "verify_iat": False}
            claims = jwt.decode(token, self._public, algorithms=["EdDSA"], audience=_AUDIENCE, issuer=_AUDIENCE, options=options)
            return {**claims, "iat": float(claims["iat"]), "exp": float(claims["exp"])}
        except (jwt.PyJWTError, ValueError, TypeError):
            return None


def proxy_credentials(header: str | None) -> tuple[str, str] | None:
    """`(name, token)` of a Proxy-Authorization header (RFC 7617 Basic), or None."""
    scheme, _, encoded = (header or "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        name, colon, token = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return None
    return (name, token) if colon else None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a request brings to prove who sends it, by the door it came through. Only Envoy fills `peer_uri` and `carried`.

    `peer_uri` is the URI SAN of a verified client certificate, `peer_times` when that ends (if known), as in `Principal.decode`.
    `carried` is `(agent, times)` from the tunnel's or the namespace's filter state, `namespace` that one's key, a slash, and its
    name if it has one.
    """

    door: Door
    peer_uri: str = ""
    peer_times: str = ""
    carried: tuple[str, str] | None = None
    namespace: str = ""
    proxy_authorization: str | None = None
    token: str | None = None


def identify(evidence: Evidence, snapshot: PolicySnapshot, tokens: TokenAuthority, now: float) -> Principal | Decision:
    """Who sends a request.

    First that applies:

    1. inside a tunnel: the identity that opened it, while its token or certificate lasts; in a namespace: its agent, while that
       one's manifest names it
    2. a verified client certificate, while it lasts: the agent with that SPIFFE ID
    3. a token in the door's own header, for an agent whose manifest takes tokens
    4. nobody → `agent_unknown`
    """
    if evidence.carried is not None:
        agent = snapshot.agents.get(evidence.carried[0])
        name = evidence.namespace.partition("/")[2]
        if name and agent and agent.namespace != name:
            return _unknown(f"the namespace {name} is this agent's no longer")
        return _lasting(Principal.decode(*evidence.carried), now)
    if evidence.peer_uri:
        agent = snapshot.by_spiffe.get(evidence.peer_uri)
        found = agent and Principal.decode(agent.name, evidence.peer_times)
        return _lasting(found, now) if found else _unknown("no manifest names this SPIFFE ID")
    if evidence.door is Door.PROXY:
        name, token = proxy_credentials(evidence.proxy_authorization) or ("", "")
    else:
        name, token = "", evidence.token or ""
    if not token:
        return _unknown("the request carries no identity")
    return _by_token(name, tokens.check(token, now), snapshot)


def _lasting(principal: Principal, now: float) -> Principal | Decision:
    """The principal, unless what proved it when the connection was opened has ended since."""
    ended = 0 < principal.expires <= now
    return _unknown("the token or certificate behind this connection has ended") if ended else principal


def _by_token(name: str, principal: Principal | None, snapshot: PolicySnapshot) -> Principal | Decision:
    if principal is None or name not in ("", principal.agent):
        return _unknown("the token is not valid, has ended, or is another agent's")
    agent = snapshot.agents.get(principal.agent)
    if agent is not None and not agent.token:
        return _unknown("this agent's manifest takes no tokens")
    return principal


def _unknown(detail: str) -> Decision:
    return deny(Code.AGENT_UNKNOWN, detail)
