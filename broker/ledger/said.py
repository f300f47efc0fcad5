"""What a broker says to a shared Redis of its own spending, in the words of `scripts/apply.lua`: (key, what to do, words …).

Law: said while joined, it is a change. Said when joining, it is the whole of what this broker has of a key, and true whatever
Redis made of what was said before.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from broker.ledger.base import Spend
from broker.ledger.memory import PER_RUN, Grant, MemoryLedger, counted, idle
from broker.policy.limits import Kind, Limit

Words = tuple[Any, ...]

MEMBERS = "{broker}:members"
NOTICES = "{broker}:notices"
_CHUNK = 1000  # words that are said in one step: about 1 ms of Redis's time, and within what Lua's `unpack` takes


def key_of(key: str) -> str:
    """Where Redis counts under this limit's key."""
    return f"{{broker}}:{key}"


def run_key(agent: str, run: str) -> str:
    """Where Redis keeps this run."""
    return f"{{broker}}:run/{agent}:{run}"


def pieces(words: list[Any]) -> list[list[Any]]:
    """The words in pieces of at most `_CHUNK`, at least one."""
    return [words[start : start + _CHUNK] for start in range(0, len(words), _CHUNK)] or [[]]


def chunks(items: Iterable[Words]) -> Iterator[list[Words]]:
    """The items in lists that are each said in one step, at least one."""
    chunk, size = list[Words](), 0
    for item in items:
        chunk.append(item)
        size += len(item)
        if size > _CHUNK:
            yield chunk
            chunk, size = [], 0
    yield chunk


def ended(grant: Grant, limit: Limit, origin: float, change: int) -> Words | None:
    """What is to be said of one limit that a call took from, now that it has ended."""
    key = key_of(limit.key)
    match limit.kind:
        case Kind.CONCURRENCY:
            return key, "concurrency", grant.spend.decision_id
        case Kind.WINDOW if change:
            return key, "window", origin, change
        case Kind.RATE if change:
            return key, "rate", f"{origin:.17g}", f"{origin + change * limit.per / limit.amount:.17g}"
        case Kind.RUN | Kind.IDENTICAL if change:
            return run_key(grant.spend.agent, grant.spend.run or ""), "run", counted(limit, grant.spend), change, grant.at
    return None


def mine(own: MemoryLedger, doubts: Collection[Spend], *, everything: bool) -> Iterator[Words]:
    """All that `own` has of what these calls may have touched, or of everything, by Redis's time."""
    keys: dict[Kind, set[str]] = {kind: set() for kind in Kind}
    runs: dict[tuple[str, str], dict[str, int]] = {}
    for spend in doubts:
        if spend.run is not None:
            zeros = {counted(limit, spend): 0 for limit in spend.limits if limit.kind in PER_RUN - {Kind.FLOW}}
            runs.setdefault((spend.agent, spend.run), {}).update(zeros)
        for limit in spend.limits:
            keys[limit.kind].add(limit.key)
    doubted = frozenset(keys[Kind.WINDOW])
    if everything:
        for kind, known in ((Kind.WINDOW, own.windows), (Kind.RATE, own.full_at), (Kind.CONCURRENCY, own.open)):
            keys[kind].update(known)
        for (agent, run), about in own.runs.items():
            if own.now - about.last < idle(run):
                runs.setdefault((agent, run), {})
    yield from _windows(own, keys[Kind.WINDOW], doubted)
    for key in keys[Kind.RATE]:
        yield key_of(key), "own_rate", own.full_at.get(key, 0)
    yield from _open(own, keys[Kind.CONCURRENCY])
    yield from _runs(own, runs)


def _windows(own: MemoryLedger, keys: Iterable[str], doubted: Collection[str]) -> Iterator[Words]:
    for key in keys:
        per = int(key.rpartition(":")[2])
        current = int(own.now // per)
        window, spent = own.windows.get(key, (-1, 0))
        if window > current:
            # Counted by another clock than Redis's: then it is counted now.
            own.windows[key] = window, spent = (current, spent)  # noqa: PLW0127 - the pair is the point
        if window == current or key in doubted:
            yield key_of(key), "own_window", current, spent if window == current else 0, per


def _open(own: MemoryLedger, keys: Iterable[str]) -> Iterator[Words]:
    for key in keys:
        calls = [word for call, until in own.open.get(key, {}).items() if until > own.now for word in (call, until)]
        for index, piece in enumerate(pieces(calls)):
            yield key_of(key), "own_concurrency", int(not index), *piece


def _runs(own: MemoryLedger, runs: Mapping[tuple[str, str], Mapping[str, int]]) -> Iterator[Words]:
    for (agent, run), zeros in runs.items():
        known = own.runs.get((agent, run))
        about = (known.started, known.last, known.steps) if known else (0, 0, 0)
        counts = {**zeros, **known.counts} if known else zeros
        for piece in pieces([word for each in counts.items() for word in each]):
            yield run_key(agent, run), "own_run", *about, idle(run), *piece
