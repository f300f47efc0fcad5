"""What one allowed call costs inside the processor, without Envoy and gRPC, in microseconds of one core.

`python -m benchmarks.costs --profile` prints where that time goes, by function.
"""

import argparse
import asyncio
import cProfile
import os
import pstats
import shutil
import timeit
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from envoy.service.ext_proc.v3.external_processor_pb2 import ProcessingRequest

from benchmarks import world
from broker import clock
from broker.audit.log import AuditLog
from broker.audit.record import Attempt, Ending, decision_record
from broker.containment.detectors import Detectors
from broker.containment.response import Containment, Surroundings
from broker.credentials.base import Lease, Occasion, Secret
from broker.credentials.leases import Leases
from broker.credentials.scrub import Scrubber
from broker.credentials.static import StaticIssuer
from broker.dataplane import site
from broker.events import Command, Observe, Pass, Send, Services, WantBody
from broker.exchange import Exchange
from broker.identity import TokenAuthority
from broker.ledger.base import Granted, Spend
from broker.ledger.memory import MemoryLedger
from broker.manifest.load import load_texts
from broker.metrics import Metrics
from broker.policy.containment import DEFAULTS, NO_DECOYS
from broker.policy.evaluate import evaluate
from broker.policy.limits import WORDS, Kind, Limit, called
from broker.policy.snapshot import CredentialSpec, PolicySnapshot
from broker.policy.types import ALLOW, Code, Request, ToolCall, deny
from broker.processor.convert import event_of, response_of
from broker.protocols.registry import ADAPTERS
from tests import stack

TARGET_US = 60
SCRUB_TARGET_US = 15
RESERVE_US = 15
LEASE_US = 10
DETECTORS_US = 10  # an event
MANY = 10_000  # agents
_ATTRIBUTES = "envoy.filters.http.ext_proc"


@dataclass(frozen=True, slots=True)
class Call:
    """A call, as its adapter and as the processor see it."""

    tool: str
    host: str
    path: str
    below: str
    body: bytes


CALLS = {
    "REST": Call("plain", "127.0.0.1:1", world.CREATE, world.CREATE, world.ISSUE),
    "MCP": Call("wiki", "127.0.0.1:9", "/mcp", "/", world.SEARCH),
}


def measure(*, quick: bool) -> list[dict[str, Any]]:
    """`[{name, us, target_us}]`."""
    loops, repeats = (50, 2) if quick else (2000, 9)
    rows: list[dict[str, Any]] = []

    def row(name: str, once: Callable[[], object], target: int | None = None) -> None:
        best = min(timeit.repeat(once, number=loops, repeat=repeats)) / loops * 1e6
        rows.append({"name": name, "us": round(best, 2), "target_us": target})

    for agents in (10, MANY // 10 if quick else MANY):
        row(f"reserve and settle, 20 limits, {agents:,} agents in turn", _reservation(_limits(agents, 20)))
    row("reserve and settle, 8 limits", _reservation(_limits(1, 8)), RESERVE_US)
    agents = MANY // 10 if quick else MANY
    for name, event in _watched(agents).items():
        row(f"detectors, {name}, {agents:,} agents in turn", event, DETECTORS_US)
    with _services(limits=True) as services:
        for name, call in CALLS.items():
            row(f"whole {name} exchange with limits, without protobuf", _exchange(services, call))
    with _services() as services:
        for name, call in CALLS.items():
            row(f"decision of a 1 KB {name} call (recognise, evaluate)", _decision(services.snapshot(), call), TARGET_US)
        row("a lease at hand", _cached_lease(services), LEASE_US)
        attempt = _attempt(services.snapshot(), CALLS["REST"])
        row("record of that REST decision", lambda: decision_record(1.7e9, 1, attempt, ALLOW))
        record = decision_record(1.7e9, 1, attempt, ALLOW)
        row("append to the audit log", lambda: services.audit.append(record))
        for name, call in CALLS.items():
            row(f"whole {name} exchange, without protobuf", _exchange(services, call))
            row(f"whole {name} exchange", _messages(services, call))
    for name, (chunk, target) in _chunks().items():
        row(f"scrub of a 16 KB chunk{name}", _scrub(chunk), target)
    row("scrubber of a new lease", lambda: Scrubber([world.SECRET]))
    return rows


def _cached_lease(services: Services) -> Callable[[], object]:
    """A lease that some issuer gave before, at hand for its next call."""

    class Given:
        name, settings = "given", None

        def narrowed(self, occasion: Occasion) -> tuple[str, ...]:
            return (occasion.operation.name if occasion.operation else "",)

        async def fetch(self, occasion: Occasion, now: float) -> Lease:
            made = Secret("Bearer 0123456789abcdef")
            return Lease("given-1", self.name, occasion.spec.header, made, ("read",), now + 3600, (made,))

        async def revoke(self, _handle: Secret) -> None:
            raise NotImplementedError

    snapshot = services.snapshot()
    tool, agent = snapshot.tools["plain"], snapshot.agents[world.AGENT]
    operation = next(iter(tool.operations.values()))
    occasion = Occasion(agent, tool, operation, CredentialSpec("given", {}), "nightly", 3600, {"repo": ("web",)})
    leases = Leases(Given(), lambda _revocations: None)
    asyncio.run(leases.issue(occasion, clock.now()))
    if leases.cached(occasion, clock.now()) is None:
        raise SystemExit("the benchmark's lease is not at hand")
    return lambda: leases.cached(occasion, clock.now())


def _chunks() -> dict[str, tuple[bytes, int | None]]:
    text = (world.SEARCH.decode() * 16)[:16_384]
    half = text[:8_000]
    return {
        "": (text.encode(), SCRUB_TARGET_US),
        " of Cyrillic text": (("Клиент заплатил дважды. " * 1_000).encode()[:16_384], SCRUB_TARGET_US),
        ", with the credential in it": ((half + world.SECRET + half).encode(), None),
    }


def _scrub(chunk: bytes) -> Callable[[], object]:
    stream = Scrubber([world.SECRET]).stream()
    return lambda: stream.feed(chunk, last=False)


def kept(*, quick: bool) -> list[dict[str, Any]]:
    """What one agent takes of the processor's memory, on average: `[{name, bytes}]`."""
    agents = MANY // 10 if quick else MANY
    tracemalloc.start()
    try:
        limits = _limits(agents, 20)
        written = tracemalloc.get_traced_memory()[0]
        ledger = MemoryLedger()
        before = tracemalloc.get_traced_memory()[0]
        for number, each in enumerate(limits):
            ledger.settle(_call(ledger, each, number, number), {}, _T)
        spent = tracemalloc.get_traced_memory()[0] - before
        names = [f"a{number}" for number in range(agents)]  # as the snapshot has them
        before = tracemalloc.get_traced_memory()[0]
        detectors = Detectors(DEFAULTS, NO_DECOYS)
        for name in names:
            _misbehave(detectors, name)
        watched = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    of = f"of one of {agents:,} agents"
    return [
        {"name": f"20 limits {of}", "bytes": written // agents},
        {"name": f"what they have counted {of}, each in one run", "bytes": spent // agents},
        {"name": f"what detectors keep {of}, all of them active", "bytes": watched // agents},
    ]


# The detectors by themselves.


def _watched(agents: int) -> dict[str, Callable[[], object]]:
    """The next agent's event, of each kind; the agents are known already, and so are the hosts."""
    detectors, numbers = Detectors(DEFAULTS, NO_DECOYS), count()
    names = [{"name": f"a{number}"} for number in range(agents)]
    for each in names:
        _misbehave(detectors, each["name"])
    denied, done = deny(Code.HOST_NOT_DECLARED, "no tool is there"), Ending(status=200)

    def timed(once: Callable[[Attempt, float], object], args_hash: str = "sha256:0") -> Callable[[], object]:
        made = [_event(names[number % agents], number, args_hash) for number in range(2 * agents)]

        def event() -> object:
            number = next(numbers)
            return once(made[number % len(made)], _T + number * 1e-3)

        return event

    return {
        "a write that is let go": timed(lambda about, now: detectors.decided(about, ALLOW, now)),
        "a host that is not declared": timed(lambda about, now: detectors.decided(about, denied, now), ""),
        "a success": timed(lambda about, now: detectors.ended(about, done, "", now)),
        "a failure": timed(lambda about, now: detectors.ended(about, done, "5xx", now)),
    }


def _event(agent: Mapping[str, str], number: int, args_hash: str = "sha256:0") -> Attempt:
    return Attempt(
        f"{number:020x}", "sha256:0", agent, host="paste.example", tool="plain", operation="issues.create", effect="write",
        args_hash=args_hash and f"{args_hash}{number}", run_id="nightly-2026-11-20",
    )  # fmt: skip


def _misbehave(detectors: Detectors, agent: str) -> None:
    """Something of everything that is counted."""
    for number in (1, 1, 2, 2, 3):
        about = _event({"name": agent}, number)
        detectors.decided(about, ALLOW, _T - 3600)
        detectors.decided(about, deny(Code.HOST_NOT_DECLARED, "no tool is there"), _T - 3600)
        detectors.ended(about, Ending(status=500), "5xx", _T - 3600)


# The ledger by itself.

_AMOUNTS = called(1000)
_WORDS = ("rate", "calls", "writes", "bytes_out", "concurrency", "steps_per_run", "identical_per_run", "destructive")


def _limits(agents: int, count: int) -> list[tuple[Limit, ...]]:
    """For each agent as many limits: its tools' and its own, each of another word, none of them ever reached."""
    scopes = [f"agent/a{number}" for number in range(agents)]
    return [tuple(_limit(scope, at) for at in range(count)) for scope in scopes]


def _limit(scope: str, at: int) -> Limit:
    word, level = _WORDS[at % len(_WORDS)], at // len(_WORDS)
    windowed = WORDS[word][0] in (Kind.RATE, Kind.WINDOW)
    amount = 10**9
    rule = f"agents/{scope}.yaml#/spec/limits/{word}"
    return Limit(word, f"{scope}/{level}" if level else scope, amount, rule, 86_400 if windowed else 0, amount)


def _reservation(limits: list[tuple[Limit, ...]]) -> Callable[[], object]:
    """The next agent's call: reserved, and settled as it was."""
    ledger, numbers = MemoryLedger(), count()

    def once() -> None:
        number = next(numbers)
        decision_id = _call(ledger, limits[number % len(limits)], number % len(limits), number)
        ledger.settle(decision_id, {}, _T + number * 1e-4)

    for _ in limits:  # so that all have counters
        once()
    return once


_T = 1.8e9


def _call(ledger: MemoryLedger, limits: tuple[Limit, ...], agent: int, number: int) -> str:
    decision_id = f"{number:020x}"
    wanted = Spend(
        decision_id, f"a{agent}", limits, _AMOUNTS, "nightly-2026-11-20", "plain/issues.create/sha256:0123456789abcdef"
    )
    if not isinstance(ledger.reserve(wanted, _T + number * 1e-4), Granted):
        raise SystemExit("the benchmark's call is refused")
    return decision_id


def _request(call: Call) -> Request:
    return Request("POST", call.below, "", tuple(world.headers(call.host, call.body)[1:]))


def _recognised(snapshot: PolicySnapshot, call: Call) -> ToolCall:
    tool = snapshot.tools[call.tool]
    found = ADAPTERS[tool.protocol].recognise(tool, _request(call), call.body)
    if not isinstance(found, ToolCall):
        raise SystemExit(f"the benchmark's call is refused: {found.detail}")
    return found


def _decision(snapshot: PolicySnapshot, call: Call) -> Callable[[], object]:
    tool, agent, request = snapshot.tools[call.tool], snapshot.agents[world.AGENT], _request(call)
    adapter = ADAPTERS[tool.protocol]
    decision = evaluate(snapshot, agent, _recognised(snapshot, call), 0.0)
    if decision is not ALLOW:
        raise SystemExit(f"the benchmark's call is denied: {decision.detail}")

    def once() -> object:
        found = adapter.recognise(tool, request, call.body)
        return isinstance(found, ToolCall) and evaluate(snapshot, agent, found, 0.0)

    return once


def _attempt(snapshot: PolicySnapshot, call: Call) -> Attempt:
    found = _recognised(snapshot, call)
    operation = snapshot.tools[call.tool].operations[found.operation or ""]
    return Attempt(
        "0123456789abcdef0123", snapshot.revision, snapshot.agents[world.AGENT].described, door="proxy", method="POST",
        host=call.host, path=call.path, tool=call.tool, operation=operation.name, effect=operation.effect,
        data=operation.data, params=found.params, run_id="nightly-2026-11-20",
    )  # fmt: skip


# The whole of the processor but its transport.


@contextmanager
def _services(*, limits: bool = False) -> Iterator[Services]:
    folder = stack.short_folder()
    os.environ["BENCH_SECRET"] = world.SECRET
    texts = {f"{number}.yaml": orjson.dumps(each) for number, each in enumerate(world.documents(1, 2, "", limits=limits))}
    loaded = load_texts(texts, Path())
    if loaded.snapshot is None:
        raise SystemExit(f"the benchmark's manifests have errors: {loaded.findings}")
    snapshot, key, numbers = loaded.snapshot, Ed25519PrivateKey.generate(), count()
    with AuditLog(folder / "audit", key, clock.now(), clock.mono_ns()) as log:
        yield Services(
            snapshot=lambda: snapshot,
            adapters=ADAPTERS,
            issuers={"static": StaticIssuer()},
            audit=log,
            ledger=MemoryLedger(),
            tokens=TokenAuthority(key),
            containment=Containment(Surroundings(log, clock.now, clock.steady, clock.mono_ns, lambda: f"{next(numbers):020x}")),
            now=clock.now,
            steady=clock.steady,
            mono_ns=clock.mono_ns,
            random_id=lambda: f"{next(numbers):020x}",
            metrics=Metrics(),
        )
    shutil.rmtree(folder)


def _wire(services: Services, call: Call) -> list[bytes]:
    """What Envoy sends for it: request head, request body, response head."""
    token = services.tokens.mint(world.AGENT, services.now())
    pseudo = [(":method", "POST"), (":path", call.path), (":authority", call.host), (":scheme", "http")]
    proof = [("proxy-authorization", stack.basic(world.AGENT, token))]
    sent = [*pseudo, *world.headers("", call.body)[1:], *proof]
    answered = [(":status", "200"), ("content-type", "application/json"), ("content-length", str(len(world.ANSWER)))]
    head = ProcessingRequest(request_headers={"headers": _map(sent)})
    head.attributes[_ATTRIBUTES].update({"xds.route_name": f"{site.PROXY}/{call.tool}", "request.protocol": "HTTP/1.1"})
    answer = ProcessingRequest(response_headers={"headers": _map(answered)})
    answer.attributes[_ATTRIBUTES].update({"response.code_details": "via_upstream"})
    body = ProcessingRequest(request_body={"body": call.body, "end_of_stream": True})
    chunk = ProcessingRequest(response_body={"body": world.ANSWER.encode(), "end_of_stream": True})
    return [message.SerializeToString() for message in (head, body, answer, chunk)]


def _map(pairs: list[tuple[str, str]]) -> dict[str, Any]:
    return {"headers": [{"key": name, "raw_value": value.encode()} for name, value in pairs]}


def _messages(services: Services, call: Call) -> Callable[[], object]:
    wire = _wire(services, call)

    def once() -> None:
        exchange = Exchange(services)
        for data in wire:
            message = ProcessingRequest.FromString(data)
            event = event_of(message)
            if event is not None:
                response_of(exchange.handle(event), message).SerializeToString()
        exchange.close()

    return once


def _exchange(services: Services, call: Call) -> Callable[[], object]:
    events = [event for data in _wire(services, call) if (event := event_of(ProcessingRequest.FromString(data)))]

    def once() -> list[Command]:
        exchange = Exchange(services)
        commands = [exchange.handle(event) for event in events]
        exchange.close()
        return commands

    if [type(command) for command in once()] not in ([WantBody, Send, Observe, Pass], [WantBody, Send, Pass, Pass]):
        raise SystemExit(f"the benchmark's exchange is not let through: {once()}")
    return once


def profile(calls: int) -> None:
    """Print self times by function, a call being `ncalls / calls`."""
    with _services() as services:
        for name, call in CALLS.items():
            once, profiler = _messages(services, call), cProfile.Profile()
            once()
            profiler.enable()
            for _ in range(calls):
                once()
            profiler.disable()
            print(f"{calls} {name} exchanges")
            pstats.Stats(profiler).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costs", description=__doc__)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, instead of how much it is")
    if parser.parse_args().profile:
        profile(20_000)
    else:
        for cost in measure(quick=False):
            print(f"{cost['us']:8.2f} us  {cost['name']}")
        for cost in kept(quick=False):
            print(f"{cost['bytes']:8,} bytes  {cost['name']}")
