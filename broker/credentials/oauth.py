"""`oauth`: access tokens from an authorization server (RFC 6749, 7523, 8693, 8707), taken back where it can (RFC 7009).

Laws: a token is used only if it is of the type that was asked for, not wider, and its life is known. Secrets, keys and subject
tokens are read anew each time and go to the token endpoint alone.
"""

import base64
import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import quote

import jwt
import orjson
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from pydantic import Field, model_validator

from broker import clock
from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Secret, leased, referenced
from broker.credentials.http import Answer, Roots, ask
from broker.credentials.settings import Issued, bare, granted, lifetime, parsed, scopes_of
from broker.manifest.words import Model, Reference, Url, Word, refusal

_TYPES = "urn:ietf:params:oauth:token-type:"
_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_GRANTS = {"client_credentials": "client_credentials", "jwt-bearer": _BEARER, "token-exchange": _EXCHANGE}
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
_ASSERTION_S = 300

Signer = Callable[[Mapping[str, object]], str]


class OAuthSettings(Issued):
    """A token endpoint, and how the broker proves itself there."""

    token_url: Url = Field(description="The token endpoint: https, or http on loopback.")
    grant: Literal["client_credentials", "jwt-bearer", "token-exchange"] = Field(
        "client_credentials", description="How a token is asked for: RFC 6749 section 4.4, RFC 7523 section 2.1, or RFC 8693."
    )
    client_id: Word | None = Field(None, description="The broker's name at the server.")
    secret: Reference | None = Field(None, description="The client's secret, {env: NAME} or {file: PATH}.")
    client_auth: Literal["basic", "post"] = Field(
        "basic", description="How the secret is sent: as Basic authentication, or in the form."
    )
    key: Reference | None = Field(
        None,
        description="A private key in PEM that signs an assertion in place of a secret (RSA, P-256 or Ed25519), "
        "with its certificate where the server wants its thumbprint.",
    )
    key_id: Word | None = Field(None, description="The key's name at the server (kid).")
    subject: Annotated[dict[Literal["minted", "file"], Word], Field(min_length=1, max_length=1)] | None = Field(
        None,
        description="For whom: {minted: AUDIENCE} is a token of the broker's own for the agent, {file: PATH} a token that "
        "someone keeps fresh there, such as a JWT-SVID. With client_credentials it is the client's assertion.",
    )
    subject_type: Literal["jwt", "id_token", "access_token"] = Field("jwt", description="What the subject's token is (RFC 8693).")
    audience: Word | None = Field(None, description="The audience that is asked for.")
    resource: Word | None = Field(None, description="The resource that is asked for, a URI (RFC 8707).")
    token_type: Word = Field("Bearer", description="The only token_type that is taken.")
    revocation_url: Url | None = Field(None, description="Where tokens are taken back (RFC 7009).")
    ca: Roots | None = None

    @model_validator(mode="after")
    def _proven(self) -> Self:
        if self.secret and self.key:
            raise refusal("a client proves itself in one way; take out secret or key")
        if self.grant == "client_credentials" and sum(map(bool, (self.secret, self.key, self.subject))) != 1:
            raise refusal("client_credentials needs one proof of the client; write secret, key or subject")
        if self.grant == "jwt-bearer" and not (self.subject or self.key):
            raise refusal("jwt-bearer needs an assertion; write subject, or a key that signs one")
        if self.grant == "token-exchange" and not self.subject:
            raise refusal("token-exchange needs a token to exchange; write subject")
        if not self.client_id and (self.secret or self.key or self.grant == "client_credentials"):
            raise refusal("the server knows the client by its name; write client_id")
        return self


class OAuthSource:
    """Asks the token endpoint. `sign` makes a token of the broker's own out of claims."""

    name: ClassVar[str] = "oauth"
    Settings: ClassVar[type[Model]] = OAuthSettings

    def __init__(self, sign: Signer, now: Callable[[], float] = clock.now) -> None:
        self._sign, self._now = sign, now

    def narrowed(self, occasion: Occasion) -> tuple[str, ...]:
        """The scopes of the operation."""
        return scopes_of(occasion.spec.settings.get("scopes"), occasion)

    async def fetch(self, occasion: Occasion, now: float) -> Lease:
        """A token for the operation's scopes."""
        settings, scopes, tool = parsed(OAuthSettings, occasion.spec.settings), self.narrowed(occasion), occasion.tool.name
        client = _Client(settings, occasion.agent.spiffe or occasion.agent.name, tool, self._sign, now)
        answer = await ask("POST", settings.token_url, **client.asking(scopes))
        _accepted(answer, f"the token endpoint of {tool!r}")
        token = bare(answer.document.get("access_token"), self.name)
        # All that taking it back needs, since the catalog may have changed by then.
        kept = orjson.dumps([token, dict(occasion.spec.settings), client.subject, tool]).decode()
        handle = Secret(kept) if settings.revocation_url else None
        try:
            got = granted(answer.document.get("scope"), scopes, self.name)
            _typed(answer.document, settings)
            expires = now + lifetime(answer.document.get("expires_in"), settings.ttl, self.name)
            return leased(occasion.spec, token, scopes=got, expires=expires, handle=handle)
        except CredentialUnavailable:
            if handle:
                with contextlib.suppress(CredentialUnavailable):
                    await self.revoke(handle)
            raise

    async def revoke(self, handle: Secret) -> None:
        """RFC 7009, by the settings that the token was asked for with."""
        token, written, subject, tool = orjson.loads(handle.reveal())
        settings = parsed(OAuthSettings, written)
        client = _Client(settings, subject, tool, self._sign, self._now())
        form = client.authenticated({"token": token, "token_type_hint": "access_token"})
        _accepted(await ask("POST", settings.revocation_url or "", **form), f"the revocation endpoint of {tool!r}")


@dataclass(frozen=True, slots=True)
class _Client:
    """The broker as a client of the server, for the agent that is the `subject`."""

    settings: OAuthSettings
    subject: str
    tool: str
    sign: Signer
    now: float

    def asking(self, scopes: tuple[str, ...]) -> dict[str, Any]:
        """The request for a token."""
        settings, scope = self.settings, " ".join(scopes)
        form: dict[str, str | None] = {"grant_type": _GRANTS[settings.grant], "scope": scope, "resource": settings.resource}
        form["audience"] = settings.audience
        if settings.grant == "jwt-bearer":
            form["assertion"] = self._token() if settings.subject else self._signed({"scope": scope} if scope else {})
        if settings.grant == "token-exchange":
            kind = {"subject_token_type": _TYPES + settings.subject_type, "requested_token_type": f"{_TYPES}access_token"}
            form |= {"subject_token": self._token(), **kind}
        return self.authenticated(form)

    def authenticated(self, form: Mapping[str, str | None]) -> dict[str, Any]:
        """The request with this form, and the proof of the client."""
        settings, proof, headers = self.settings, {"client_id": self.settings.client_id}, {}
        signs_assertion = settings.grant == "jwt-bearer" and not settings.subject and "assertion" in form
        if settings.secret and settings.client_auth == "basic":
            # RFC 6749 section 2.3.1: both are form-encoded first; a space as %20, which every server decodes.
            pair = ":".join(quote(part, safe="") for part in (settings.client_id or "", referenced(settings.secret, self.tool)))
            proof, headers = {}, {"authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
        elif settings.secret:
            proof["client_secret"] = referenced(settings.secret, self.tool)
        elif settings.key and not signs_assertion:
            proof |= {"client_assertion_type": _ASSERTION, "client_assertion": self._signed({})}
        elif settings.grant == "client_credentials":
            proof |= {"client_assertion_type": _ASSERTION, "client_assertion": self._token()}
        sent = {name: value for name, value in {**form, **proof}.items() if value}
        return {"form": sent, "headers": headers, "ca": settings.ca}

    def _token(self) -> str:
        """The subject's token."""
        how, what = next(iter((self.settings.subject or {}).items()))
        if how == "minted":
            return self.sign({"sub": self.subject, "aud": what, **self._times()})
        return referenced({how: what}, self.tool)

    def _signed(self, more: Mapping[str, object]) -> str:
        """An assertion of the client's own (RFC 7523 section 3)."""
        pem, client = referenced(self.settings.key, self.tool).encode(), self.settings.client_id
        headers = {"kid": self.settings.key_id} if self.settings.key_id else {}
        try:
            key = load_pem_private_key(pem, password=None)
            algorithm = next(name for kind, name in _ALGORITHMS.items() if isinstance(key, kind))
            if b"BEGIN CERTIFICATE" in pem:  # as Entra ID wants it
                thumbprint = x509.load_pem_x509_certificates(pem)[0].fingerprint(hashes.SHA256())
                headers["x5t#S256"] = base64.urlsafe_b64encode(thumbprint).rstrip(b"=").decode()
                algorithm = algorithm.replace("RS", "PS")
            claims = {"iss": client, "sub": client, "aud": self.settings.token_url, **self._times(), **more}
            return jwt.encode(claims, key, algorithm=algorithm, headers=headers)  # type: ignore[arg-type]  # one of the kinds above
        except (ValueError, TypeError, StopIteration, UnsupportedAlgorithm, jwt.PyJWTError):
            what = f"the key of {self.tool!r} is no private key that can sign"
            raise CredentialUnavailable(what, "put an unencrypted RSA, P-256 or Ed25519 key in PEM there") from None

    def _times(self) -> dict[str, object]:
        return {"iat": int(self.now), "exp": int(self.now) + _ASSERTION_S, "jti": secrets.token_hex(16)}


_ALGORITHMS = {RSAPrivateKey: "RS256", EllipticCurvePrivateKey: "ES256", Ed25519PrivateKey: "EdDSA"}


def _typed(document: Mapping[str, Any], settings: OAuthSettings) -> None:
    """RFC 6749 section 7.1: a token of an unknown type is not used. RFC 8693 section 2.2.1: nor what is no access token."""
    kind, issued = document.get("token_type"), document.get("issued_token_type", f"{_TYPES}access_token")
    if not isinstance(kind, str) or kind.lower() != settings.token_type.lower():
        what = f"the token that was answered is not of the type {settings.token_type}"
        raise CredentialUnavailable(what, "ask the server for such, or write token_type")
    if issued not in (f"{_TYPES}access_token", f"{_TYPES}jwt"):
        raise CredentialUnavailable("the token that was answered is no access token", "see which tokens the server exchanges")


def _accepted(answer: Answer, where: str) -> None:
    if answer.ok:
        return
    code = str(answer.document.get("error"))
    advice = _ADVICE.get(code, "see whether it is up, and its URL right")
    raise CredentialUnavailable(f"{where} answered {answer.status}{f' {code}' if code in _ADVICE else ''}", advice)


_ADVICE = {
    "invalid_client": "check client_id, its secret or key, and this machine's clock",
    "invalid_grant": "see whether the subject's token is fresh, and trusted by the server",
    "invalid_request": "see which fields the server wants beside those that are written",
    "invalid_scope": "correct scopes, or allow them to the client at the server",
    "invalid_target": "correct audience or resource",
    "unauthorized_client": "allow the client this grant at the server",
    "unsupported_grant_type": "write another grant",
    "unsupported_token_type": "take revocation_url out: the server takes no such tokens back",
}
