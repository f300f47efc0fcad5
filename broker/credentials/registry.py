"""The issuers, by the words that a catalog entry may write in `credential.issuer`.

Each is one file: an `Issuer`, or a `Source` that `Leases` makes one of. To import this is to import the clients of all of them.
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
