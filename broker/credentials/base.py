"""The interface of all issuers, what they return, and how they fail."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from broker.errors import BrokerError
from broker.policy.snapshot import Agent, CredentialSpec, Operation, Tool
from broker.policy.types import Json


class CredentialUnavailable(BrokerError):
    """No credential can be had now; the call is denied. The message never holds a secret."""


class Secret:
    """A value that must not be shown: `str`, `repr`, formatting and logging give `[redacted]`. `reveal` gives the value."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value, for the one place that sends it upstream."""
        return self._value

    def __repr__(self) -> str:
        return "[redacted]"

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled or copied")


@dataclass(frozen=True, slots=True)
class Occasion:
    """Who calls what: what may narrow a credential. `operation` is None for a protocol's housekeeping; `max_ttl` in seconds."""

    agent: Agent
    tool: Tool
    operation: Operation | None
    spec: CredentialSpec
    run_id: str
    max_ttl: int


@dataclass(frozen=True, slots=True)
class Lease:
    """One issued credential: the header to send, and what the record says of it. `expires` is seconds since the epoch or None."""

    lease_id: str
    issuer: str
    header: str
    value: Secret = field(repr=False)
    scopes: tuple[str, ...] = ()
    expires: float | None = None

    @property
    def described(self) -> dict[str, Json]:
        """What the record says of it."""
        return {"issuer": self.issuer, "scopes": list(self.scopes), "lease_id": self.lease_id, "expires": self.expires}


class Issuer(Protocol):
    """Makes leases. `cached` is the hot path and never waits; `issue` may wait and is asked only after `cached` gave None."""

    name: ClassVar[str]

    @staticmethod
    def check(settings: Mapping[str, object]) -> list[str]:
        """What is wrong with a catalog entry's settings, each as a sentence with its remedy; empty when nothing is."""

    def cached(self, occasion: Occasion, now: float) -> Lease | None:
        """A lease at hand for this occasion, or None. Raises `CredentialUnavailable`."""

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """A new lease. Raises `CredentialUnavailable`."""


def rendered(spec: CredentialSpec, secret: str) -> Secret:
    """The header's value: the secret in the entry's template. A line break can't start a header of its own."""
    if not secret or any(character in secret for character in "\r\n\0"):
        raise CredentialUnavailable("the secret is empty or has a line break in it", "set it to the bare value")
    return Secret(spec.template.replace("{}", secret))
