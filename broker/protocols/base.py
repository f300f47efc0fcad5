"""What every protocol adapter offers, and the types that it speaks in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from broker.policy.snapshot import Grant, Tool
from broker.policy.types import Decision, Json, Refusal, Request, ToolCall, Usage


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP answer that the broker gives itself. Header names are lower-case; `content-length` is Envoy's to add."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class ResponseFilter(Protocol):
    """Rewrites an answer as it streams by. Fed chunk by chunk in order; holds no more than one message."""

    def feed(self, chunk: bytes, *, last: bool) -> bytes:
        """What the agent gets in place of `chunk`; may be empty while a message is incomplete. Raises `ResponseBlocked`."""


@runtime_checkable
class Meter(ResponseFilter, Protocol):
    """Passes an answer on as it comes, and reads on the side what it used. Both may be asked for at any time."""

    @property
    def usage(self) -> Usage:
        """What the answer used, as far as it got; `estimated` where the provider did not tell all of it."""

    @property
    def completion_hash(self) -> str:
        """`sha256:…` of the text that was generated; the same for a whole answer and for its stream."""


class ResponseBlocked(ValueError):
    """The answer can't be passed on safely; the stream is cut. The message says why."""


class Adapter(Protocol):
    """One protocol. All methods are pure and total: bad input is a `Refusal`, never an exception."""

    name: str
    locations: frozenset[str]
    """The parameter locations that a catalog entry of this protocol may give schemas for."""

    def body_limit(self, tool: Tool, request: Request) -> int | Refusal | None:
        """The largest body to wait for, in bytes; None where no body changes what the request is; or why it is refused."""

    def recognise(self, tool: Tool, request: Request, body: bytes) -> ToolCall | Refusal:
        """Read the whole request. `body` is empty when there is none."""

    def denial(self, problem: Mapping[str, Json], decision: Decision | Refusal, correlation: Json) -> Reply | None:
        """The denial in this protocol's own shape; or None where the plain problem body (RFC 9457) is right."""

    def response_filter(
        self, tool: Tool, grants: Mapping[str, Grant], call: ToolCall, content_type: str
    ) -> ResponseFilter | None:
        """What the answer to an allowed call must pass through; or None to leave it untouched (and unread)."""
