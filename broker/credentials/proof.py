"""Whether issuers can issue: each credential that an agent's calls would get is asked for, looked at, and taken back."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.credentials.base import CredentialUnavailable, Issuer, Lease, Occasion, Secret
from broker.credentials.leases import Leases
from broker.credentials.registry import issuers
from broker.policy.snapshot import PolicySnapshot


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of one occasion. `seconds` is the life of a lease, None where it has no end."""

    occasion: Occasion
    outcome: Lease | CredentialUnavailable
    seconds: float | None = None


def occasions(snapshot: PolicySnapshot) -> Iterator[Occasion]:
    """Every operation that is granted and brings a credential, and MCP's own traffic, which brings it too."""
    for agent in snapshot.agents.values():
        for name, grants in agent.tools.items():
            tool = snapshot.tools[name]
            if tool.credential is None:
                continue
            if tool.protocol == "mcp":
                yield Occasion(agent, tool, None, tool.credential, "", snapshot.max_ttl)
            for operation, grant in grants.items():
                declared = tool.operations[operation]
                yield Occasion(agent, tool, declared, tool.credential, "", snapshot.max_ttl, grant.pins)


async def prove(snapshot: PolicySnapshot, key: Ed25519PrivateKey, now: float) -> list[Proof]:
    """One proof for each lease that there was, and for each way in which a tool has none. `key` signs the broker's own tokens."""
    back: dict[str, tuple[str, Secret]] = {}
    made = issuers(key, lambda each: back.update((one.handle.reveal(), (one.source, one.handle)) for one in each))
    proofs: dict[object, Proof] = {}
    for occasion in occasions(snapshot):
        outcome = await _outcome(made[occasion.spec.issuer], occasion, now)
        lasts = outcome.expires - now if isinstance(outcome, Lease) and outcome.expires is not None else None
        told = outcome.lease_id if isinstance(outcome, Lease) else (occasion.tool.name, str(outcome))
        proofs.setdefault(told, Proof(occasion, outcome, lasts))
    leases = {issuer.name: issuer for issuer in made.values() if isinstance(issuer, Leases)}
    for issuer in leases.values():
        for agent in snapshot.agents:
            issuer.drop(agent)
    for source, handle in back.values():
        with contextlib.suppress(CredentialUnavailable):  # it ends by itself
            await leases[source].source.revoke(handle)
    return list(proofs.values())


async def _outcome(issuer: Issuer, occasion: Occasion, now: float) -> Lease | CredentialUnavailable:
    try:
        return issuer.cached(occasion, now) or await issuer.issue(occasion, now)
    except CredentialUnavailable as error:
        return error
