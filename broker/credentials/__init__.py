"""Credentials: what a tool wants, made at the moment of an allowed call and never shown to the agent.

Law: a secret is held by reference until it is needed; whatever holds one prints as `[redacted]`. `ISSUERS` is the list of words
that a catalog entry may write in `credential.issuer`; each is one file, an `Issuer` or a `Source` that `Leases` makes one of.
"""

from collections.abc import Mapping

from broker.credentials.base import Declared
from broker.credentials.jwt import JwtIssuer
from broker.credentials.static import StaticIssuer

ISSUERS: Mapping[str, type[Declared]] = {issuer.name: issuer for issuer in (JwtIssuer, StaticIssuer)}
