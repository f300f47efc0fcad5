"""Events in, commands out: the words between one exchange and whatever carries it.

Law: plain frozen values; nothing here knows gRPC, Envoy's protos or the clock.
"""

from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass

from broker.audit import AuditSink
from broker.containment.response import Containment
from broker.credentials.base import CredentialUnavailable, Issuer, Lease, Occasion
from broker.identity import Evidence, TokenAuthority
from broker.ledger.base import Granted, Ledger, LedgerUnavailable, Refused
from broker.metrics import Metrics
from broker.policy.agreement import Wire
from broker.policy.snapshot import PolicySnapshot
from broker.policy.types import Request
from broker.protocols.base import Adapter, Reply


@dataclass(frozen=True, slots=True)
class Services:
    """The outside, as interfaces. `snapshot` gives the one in force now; `random_id` gives a new decision ID.

    `steady` is the time that the ledger counts by: as `now`, but nobody sets it. `has_ended` knows namespaces by their keys.
    """

    snapshot: Callable[[], PolicySnapshot]
    adapters: Mapping[str, Adapter]
    issuers: Mapping[str, Issuer]
    audit: AuditSink
    ledger: Ledger
    tokens: TokenAuthority
    containment: Containment
    now: Callable[[], float]
    steady: Callable[[], float]
    mono_ns: Callable[[], int]
    random_id: Callable[[], str]
    metrics: Metrics
    has_ended: Callable[[str], bool] = lambda _namespace: False


# Events.


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's head. `request.path` is the whole raw path as the agent sent it; `has_body` is False when the head is all."""

    wire: Wire
    request: Request
    evidence: Evidence
    has_body: bool
    protocol: str = "HTTP/1.1"


@dataclass(frozen=True, slots=True)
class RequestBody:
    """The whole body, as it will be sent. `trailers` says that header fields follow it, which nobody has judged."""

    body: bytes
    trailers: bool = False


@dataclass(frozen=True, slots=True)
class Issued:
    """The answer to `Issue`: a lease, or why there is none."""

    lease: Lease | CredentialUnavailable


@dataclass(frozen=True, slots=True)
class Reserved:
    """The answer to `Reserve`."""

    answer: Granted | Refused | LedgerUnavailable


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """An answer's head. `details` is Envoy's word for where it came from; `via_upstream` for a real answer.

    `agent` is who opened the tunnel, of the 200 that opens one and of what comes through it; the former comes without a request.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    details: str
    has_body: bool
    agent: str = ""


@dataclass(frozen=True, slots=True)
class ResponseChunk:
    """A part of the answer's body."""

    data: bytes
    last: bool


@dataclass(frozen=True, slots=True)
class ResponseTrailers:
    """Header fields behind the answer's body."""

    headers: tuple[tuple[str, str], ...]


Event = RequestHead | RequestBody | Reserved | Issued | ResponseHead | ResponseChunk | ResponseTrailers


# Commands.


@dataclass(frozen=True, slots=True)
class WantBody:
    """Hold the request until its whole body is here."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Wait for the ledger; come back with `Reserved`."""

    answer: Awaitable[Granted | Refused]


@dataclass(frozen=True, slots=True)
class Issue:
    """Ask the issuer, which may take time; come back with `Issued`."""

    issuer: Issuer
    occasion: Occasion
    now: float


@dataclass(frozen=True, slots=True)
class Send:
    """Let the request go, with proof for the gate. `path` (with its query) and `body` replace the request's where not None."""

    set_headers: tuple[tuple[str, str], ...]
    remove_headers: tuple[str, ...]
    path: str | None
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Pass:
    """Let this part of the answer go on as it is, but for headers that get another value; of its head, the body goes unread."""

    set_headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """Put this decision ID on an answer that Envoy gave by itself; it is recorded under it from the access log."""

    decision_id: str


@dataclass(frozen=True, slots=True)
class Observe:
    """Stream the answer's body by, chunk for chunk; some headers get another value."""

    set_headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Replace:
    """Pass this on in place of the chunk."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Cut:
    """Break the stream now."""


Command = WantBody | Reserve | Issue | Send | Reply | Pass | Mark | Observe | Replace | Cut
Steps = Generator[Command, Event, None]
