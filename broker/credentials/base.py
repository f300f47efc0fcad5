"""The interface of all issuers, what they return, and how they fail.

Laws: a secret is held by reference until it is needed, and whatever holds one prints as `[redacted]`. An issuer makes what it was
asked for or fails: a wider credential is none, and no call goes without. A lease belongs to one agent.
"""

import base64
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol, runtime_checkable

from broker.errors import BrokerError
from broker.manifest.words import Model
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
    """Who calls what: what may narrow a credential. `operation` is None for a protocol's housekeeping; `max_ttl` in seconds.

    `pins` maps a parameter to the only values that the manifest lets it have (`const` or `enum`): `{"repo": ("web",)}`.
    """

    agent: Agent
    tool: Tool
    operation: Operation | None
    spec: CredentialSpec
    run_id: str
    max_ttl: int
    pins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """The request as it will leave, for credentials that are made of it (SigV4). `url` is whole; header names are lower-case."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...] = field(repr=False)
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Lease:
    """One issued credential, and what the record says of it. `expires` is seconds since the epoch or None.

    `value` is what `header` gets; or `sign` makes all the headers out of the request (a pure function). `secrets` are the bare
    values in it, which no answer may show. `handle` is what the issuer needs to take the credential back; None where it can't.
    """

    lease_id: str
    issuer: str
    header: str
    value: Secret = field(repr=False)
    scopes: tuple[str, ...] = ()
    expires: float | None = None
    secrets: tuple[Secret, ...] = field(default=(), repr=False)
    sign: Callable[[Outgoing, float], tuple[tuple[str, Secret], ...]] | None = field(default=None, repr=False)
    handle: Secret | None = field(default=None, repr=False)

    @property
    def described(self) -> dict[str, Json]:
        """What the record says of it."""
        return {"issuer": self.issuer, "scopes": list(self.scopes), "lease_id": self.lease_id, "expires": self.expires}

    def headers(self, outgoing: Outgoing, now: float) -> tuple[tuple[str, Secret], ...]:
        """The headers that carry it on this request."""
        return self.sign(outgoing, now) if self.sign else ((self.header, self.value),)


class Issuer(Protocol):
    """What the exchange asks. `cached` is the hot path and never waits; `issue` may wait, after `cached` gave None."""

    @property
    def name(self) -> str:
        """The word for it in the catalog."""

    def cached(self, occasion: Occasion, now: float) -> Lease | None:
        """A lease at hand for this occasion, or None. Raises `CredentialUnavailable`."""

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """A new lease. Raises `CredentialUnavailable`."""


class Declared(Protocol):
    """What the catalog's word for an issuer stands for. `Settings` are the fields of its own that an entry may have."""

    name: ClassVar[str]
    Settings: ClassVar[type[Model]]


class Source(Declared, Protocol):
    """Makes credentials by asking someone else. `Leases` makes an issuer of one: it caches, renews, drops and takes back."""

    def narrowed(self, occasion: Occasion) -> tuple[str, ...]:
        """What the lease is narrowed to beside the agent and the tool: calls that share all of it may share a lease."""

    async def fetch(self, occasion: Occasion, now: float) -> Lease:
        """A new lease, not wider than asked; its `expires` is `now` and the life that it has left, so nobody else's clock counts.

        Raises `CredentialUnavailable`; may be cancelled.
        """

    async def revoke(self, handle: Secret) -> None:
        """Take a lease back at the issuer. Raises `CredentialUnavailable`: then it is tried again later."""


@runtime_checkable
class Renewing(Protocol):
    """A source whose leases can be made to last longer."""

    async def renew(self, lease: Lease, occasion: Occasion, now: float) -> Lease | None:
        """The same credential with its new end; None where the issuer does not do it. May be cancelled."""


def rendered(spec: CredentialSpec, secret: str) -> Secret:
    """The header's value: the secret in the entry's template. A line break can't start a header of its own."""
    if not secret or any(character in secret for character in "\r\n\0"):
        raise CredentialUnavailable("the secret is empty or has a line break in it", "set it to the bare value")
    if spec.basic is not None:  # RFC 7617 section 2
        return Secret("Basic " + base64.b64encode(f"{spec.basic}:{secret}".encode()).decode())
    return Secret(spec.template.replace("{}", secret))


def leased(  # noqa: PLR0913 - a lease has as many parts
    spec: CredentialSpec,
    secret: str,
    *,
    lease_id: str = "",
    scopes: tuple[str, ...] = (),
    expires: float | None = None,
    handle: Secret | None = None,
) -> Lease:
    """The lease of a secret that goes where the entry says; its ID is made up unless given. Raises `CredentialUnavailable`."""
    value, lease_id = rendered(spec, secret), lease_id or f"{spec.issuer}-{secrets.token_hex(8)}"
    # Of Basic, the encoded pair too: what surrounds the secret in it can't be told from the secret alone.
    shown = (Secret(secret), Secret(value.reveal().removeprefix("Basic "))) if spec.basic is not None else (Secret(secret),)
    return Lease(lease_id, spec.issuer, spec.header, value, scopes, expires, shown, handle=handle)


def referenced(reference: object, tool: str) -> str:
    """The secret that `{env: NAME}` or `{file: PATH}` names, as it is now. Raises `CredentialUnavailable`."""
    if not isinstance(reference, Mapping) or len(reference) != 1:
        what = f"the credential of {tool!r} has no reference to a secret"
        raise CredentialUnavailable(what, "write {env: NAME} or {file: PATH}")
    source, where = next(iter(reference.items()))
    return _from_environment(where, tool) if source == "env" else _from_file(where, tool)


def unset(tools: Iterable[Tool]) -> Iterator[str]:
    """Of each environment variable that a tool's credential is taken from and that is not set, its name and the tool's."""
    return (f"{name} of {tool}" for kind, name, tool in references(tools) if kind == "env" and not os.environ.get(name))


def references(tools: Iterable[Tool]) -> Iterator[tuple[str, str, str]]:
    """Where the tools' credentials are taken from: `env` or `file`, its name or path, and the tool's name."""
    for tool in tools:
        for value in tool.credential.settings.values() if tool.credential else ():
            if isinstance(value, Mapping) and len(value) == 1:
                [(kind, where)] = value.items()
                if kind in {"env", "file"} and isinstance(where, str):  # scopes can be by operations of these names
                    yield kind, where, tool.name


def _from_environment(name: str, tool: str) -> str:
    if value := os.environ.get(name, ""):
        return value
    what = f"the environment variable {name} is not set, and {tool!r} takes its credential from it"
    raise CredentialUnavailable(what, f"start the broker with {name} set")


def _from_file(path: str, tool: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        what = f"the secret file of {tool!r} can't be read ({type(error).__name__})"
        raise CredentialUnavailable(what, f"put the secret into {path}, readable by the broker") from error
