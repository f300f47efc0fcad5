"""One call through the real exchange, with nothing sent and nothing spent: what `explain`, `test` and `propose` ask.

Laws: the order of a call, the recognisers, the core and the embedded ledger are the broker's own. Replaced is only what reaches
out: a credential is named and not issued, and the record is a list that is thrown away.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from urllib.parse import urlsplit

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.containment.response import Containment, Surroundings
from broker.credentials.base import Lease, Occasion, leased
from broker.credentials.leases import Leases
from broker.credentials.registry import issuers
from broker.errors import UsageError
from broker.events import RequestBody, RequestHead, Send, Services, WantBody
from broker.exchange import Exchange
from broker.identity import Evidence, Person, TokenAuthority
from broker.ledger.base import Spend
from broker.ledger.memory import MemoryLedger
from broker.metrics import Metrics
from broker.policy.agreement import Wire
from broker.policy.limits import Kind, Measure, label
from broker.policy.snapshot import PolicySnapshot, Tool
from broker.policy.types import Door, Json, Request
from broker.protocols.registry import ADAPTERS
from broker.request import run_id


@dataclass(frozen=True, slots=True)
class Call:
    """A call as a client would send it through the proxy. `url` is whole; header names are lower-case."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def with_json(self, body: Json) -> "Call":
        """The same with a JSON body."""
        typed = any(name == "content-type" for name, _ in self.headers)
        more = () if typed else (("content-type", "application/json"),)
        return replace(self, headers=(*self.headers, *more), body=orjson.dumps(body))


@dataclass(frozen=True, slots=True)
class Before:
    """What went before: what the agent has `spent` in the current windows and the call's run, and the run's `labels`.

    `approvals` is how many people approve the call when they are asked.
    """

    spent: Mapping[Measure, int] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    approvals: int = 0


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """The decision's record, and what is taken off a request that goes on to the tool; None for one that does not."""

    record: Mapping[str, Any]
    stripped: tuple[str, ...] | None

    @property
    def passes(self) -> bool:
        """Whether it would go to the tool."""
        return self.stripped is not None


class Rehearsal:
    """Calls under one snapshot. `now` is in seconds since the epoch."""

    def __init__(self, snapshot: PolicySnapshot, now: float) -> None:
        self._snapshot, self._now = snapshot, now
        key = Ed25519PrivateKey.generate()
        real = issuers(key, lambda _: None)
        self._issuers = {name: _Named(name, _scopes(issuer), snapshot.max_ttl) for name, issuer in real.items()}
        self._tokens, self._metrics = TokenAuthority(key), Metrics()

    def call(self, agent: str, call: Call, before: Before = Before()) -> Rehearsed:
        """What becomes of the call. Raises `UsageError` for a URL that is none."""
        head = _head(agent, call)
        services = self._services()
        self._prepare(services.ledger, agent, before, run_id(head.request))
        found = _play(services, head, call.body)
        for number in range(before.approvals):
            for asked in (each for each in services.containment.listed() if each["status"] == "waiting"):
                services.containment.vote(asked["id"], Person(f"person {number}", tuple(asked["groups"])), "", approves=True)
            found = found if found.passes else _play(services, head, call.body)
        return found

    def _services(self) -> Services:
        ids, record = count(1), _Record()
        now, mono_ns, name = lambda: self._now, lambda: 0, lambda: f"rehearsed-{next(ids)}"
        contained = Containment(Surroundings(record, now, now, mono_ns, name, later=lambda _: None))
        contained.apply_policy(self._snapshot, ())
        return Services(
            lambda: self._snapshot, ADAPTERS, self._issuers, record, MemoryLedger(), self._tokens, contained, now, now, mono_ns,
            name, self._metrics,
        )  # fmt: skip

    def _prepare(self, ledger: Any, name: str, before: Before, run: str) -> None:
        if (agent := self._snapshot.agents.get(name)) is None:
            return
        for what, limits, amounts in (
            ("spent", tuple(limit for limit in agent.limits if limit.kind in (Kind.WINDOW, Kind.RUN)), before.spent),
            ("labels", tuple(map(label, before.labels)), {Measure.CALLS: 1}),
        ):
            if limits and amounts:
                ledger.take(Spend(what, name, limits, amounts, run, "earlier/"), self._now)
                ledger.settle(what, {}, self._now)


class _Record(list[Mapping[str, Any]]):
    """An audit sink that keeps what it gets for as long as somebody looks."""

    def append(self, record: Mapping[str, Any]) -> Mapping[str, Any]:  # type: ignore[override] # the sink's word for it
        super().append(record)
        return record


class _Named:
    """In place of an issuer: which credential it would be."""

    def __init__(self, name: str, scopes: Callable[[Occasion], tuple[str, ...]], max_ttl: int) -> None:
        self.name, self._scopes, self._max_ttl = name, scopes, max_ttl

    def cached(self, occasion: Occasion, now: float) -> Lease:
        """What the call would get. Raises `CredentialUnavailable` where nothing could be asked for."""
        ttl = min(occasion.spec.settings.get("ttl") or self._max_ttl, self._max_ttl)
        ends = None if self.name == "static" else now + ttl
        return leased(occasion.spec, "rehearsed", scopes=self._scopes(occasion), expires=ends)

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """The same; nobody waits for it."""
        return self.cached(occasion, now)


def _scopes(issuer: object) -> Callable[[Occasion], tuple[str, ...]]:
    if isinstance(issuer, Leases):
        return issuer.source.narrowed
    return lambda occasion: tuple(occasion.spec.settings.get("scopes") or ())


def _head(agent: str, call: Call) -> RequestHead:
    try:
        parts = urlsplit(call.url)
    except ValueError:  # brackets that hold no address
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"{call.url!r} is no http(s) URL", "write the whole URL that the agent calls")
    wire = Wire(Door.PROXY, parts.scheme, parts.netloc, parts.path or "/", "", "", route_tool=None)
    length = (("content-length", str(len(call.body))),) if call.body else ()
    request = Request(call.method, wire.path, parts.query, (*call.headers, *length))
    return RequestHead(wire, request, Evidence(Door.PROXY, carried=(agent, "")), has_body=bool(call.body))


def _play(services: Services, head: RequestHead, body: bytes) -> Rehearsed:
    exchange = Exchange(services)
    command = exchange.handle(head)
    if isinstance(command, WantBody):
        command = exchange.handle(RequestBody(body))
    recorded: Any = services.audit
    record = next(each for each in reversed(recorded) if each["event"] == "decision")
    exchange.close()
    return Rehearsed(record, command.remove_headers if isinstance(command, Send) else None)


def call_of(tool: Tool, operation: str, body: Json, headers: tuple[tuple[str, str], ...] = ()) -> Call | None:
    """The call that a client of the tool's protocol makes of an operation: MCP's `arguments`, or what a model's API is sent.

    None where the operation's name alone does not say where it goes.
    """
    known, root = tool.operations.get(operation), f"{tool.endpoint.scheme}://{tool.endpoint.authority}{tool.endpoint.base_path}"
    if tool.protocol == "mcp":
        asked: Json = {"name": known.alias if known else operation, "arguments": body or {}}
        message: Json = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": asked}
        accepts = ("accept", "application/json, text/event-stream")
        return Call("POST", root, (accepts, *headers)).with_json(message)
    if known is None or known.template is None or any(name for name, _ in known.template.parts):
        return None
    call = Call(known.method, root + known.template.text, headers)
    return call if body is None else call.with_json(body)
