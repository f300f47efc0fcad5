"""Credentials: what a tool wants, made at the moment of an allowed call and never shown to the agent.

Law: a secret is held by reference until it is needed; whatever holds one prints as `[redacted]`. `ISSUERS` is the list of words
that a catalog entry may write in `credential.issuer`; each is one file, an `Issuer` or a `Source` that `Leases` makes one of.
"""

from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.credentials.aws_sts import AwsStsSource
from broker.credentials.base import Declared, Issuer
from broker.credentials.exec import ExecSource
from broker.credentials.github_app import GithubAppSource
from broker.credentials.jwt import JwtIssuer
from broker.credentials.leases import Leases
from broker.credentials.oauth import OAuthSource
from broker.credentials.outbox import Put
from broker.credentials.static import StaticIssuer
from broker.credentials.vault import VaultSource

_ALL = (AwsStsSource, ExecSource, GithubAppSource, JwtIssuer, OAuthSource, StaticIssuer, VaultSource)
ISSUERS: Mapping[str, type[Declared]] = {issuer.name: issuer for issuer in _ALL}


def issuers(key: Ed25519PrivateKey, put: Put) -> Mapping[str, Issuer]:
    """All of them, by name. `key` signs the broker's own tokens; `put` takes what is to be taken back."""
    ours = JwtIssuer(key)
    sources = (AwsStsSource(), ExecSource(), GithubAppSource(), OAuthSource(ours.sign), VaultSource())
    leases = {source.name: Leases(source, put) for source in sources}
    return {"static": StaticIssuer(), "jwt": ours, **leases}
