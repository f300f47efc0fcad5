"""The ledger that several brokers share, in Redis or Valkey.

Laws: each broker keeps what itself spent (`own`, rebuilt from its audit log); a counter in Redis holds one such amount for each
broker, and their sum. So whatever Redis loses is put right by every broker saying its own amounts again, which it does whenever
it joins. Nothing is reserved before it has joined; what it sent before joining again is fenced off by a token. A connection is
joined once and never reconnects: any fault, and any answer later than `SLOW_S`, ends it, denies what waits, and begins anew.
One task talks to Redis, in order, with all that has come up meanwhile in one round trip. All keys share one cluster slot, on
purpose: a call is counted for its agent, its team and its environment in one atomic step. The time is Redis's.
"""

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha1
from importlib.resources import files
from typing import Any, Self

from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.exceptions import RedisError

from broker.errors import UsageError
from broker.ledger.base import LEASE_S, Balance, Granted, LedgerUnavailable, Refused, Spend
from broker.ledger.memory import PER_RUN, Grant, MemoryLedger, counted, idle
from broker.policy.limits import Kind, Limit, Measure

SLOW_S = 0.05
"""An answer that takes longer is not waited for."""

GRACE_S = 3.0
"""For how long nobody is served after Redis lost its data, so that every broker can notice and say what it spent."""

_BEAT_S = 1.0  # a third of the grace
_CONNECT_S = 1.0
_RETRY_S = 0.2
_BATCH = 128  # reservations in one round trip: about 5 ms of Redis's time
_CHUNK = 1000  # words that are said again in one step: about 1 ms of it
_DOUBTS = 10_000  # beyond that, all is said again

_MEMBERS = "{broker}:members"
_BEGIN, *_TEXTS = (
    files("broker.ledger").joinpath("scripts", f"{name}.lua").read_text() for name in ("begin", "reserve", "apply", "join")
)
_SCRIPTS = [_BEGIN + _TEXTS[0], _BEGIN + _TEXTS[1], _TEXTS[2]]
_RESERVE, _APPLY, _JOIN = (sha1(text.encode(), usedforsecurity=False).hexdigest() for text in _SCRIPTS)

_Words = tuple[Any, ...]


@dataclass(slots=True)
class _Sent:
    """A command under way: how its answer is read, who waits for that, and whose spending is in doubt until it is there."""

    command: _Words
    read: Callable[[Any], Any]
    spend: Spend | None = None
    waiting: "asyncio.Future[Any] | None" = None


class RedisLedger:
    """See `Ledger`. `async with` it, once `own` is rebuilt: it has then joined, or will as soon as it can.

    `url` is redis-py's: `redis://`, `rediss://` (verified TLS; `?ssl_ca_certs=FILE`), with USER:PASSWORD of an ACL user for keys
    `~{broker}:*` and the commands in `docs`. `replica` names this broker's state folder for good. `on_change` hears whether
    limits can be checked, and if not, why. `callers_clock` counts by the caller's `now`. While `unsafe_reads` is set and Redis is
    away, reads are let through on what this broker alone has spent.
    """

    def __init__(
        self,
        url: str,
        replica: str,
        own: MemoryLedger,
        *,
        on_change: Callable[[bool, str], None] = lambda _healthy, _why: None,
        grace: float = GRACE_S,
        callers_clock: bool = False,
    ) -> None:
        try:
            known: dict[str, Any] = {**parse_url(url)}
            kind: type[AbstractConnection] = known.pop("connection_class", Connection)
            self._connect = partial(kind, **known, protocol=2, driver_info=None, socket_timeout=None)
            self._connect()
        except (TypeError, ValueError, RedisError):
            raise UsageError(
                "the Redis URL can't be read", "write redis[s]://USER:PASSWORD@HOST:PORT, special characters as %XX"
            ) from None
        self.own = own
        self.unsafe_reads = False
        self._replica, self._token, self._grace = f"@{replica}", "", grace
        self._on_change, self._callers_clock = on_change, callers_clock
        self._healthy: bool | None = None
        self._why = "not yet connected"
        self._ahead: float | None = None  # Redis's clock, against the event loop's
        self._everything = True  # nothing was said yet
        self._doubts: dict[str, Spend] = {}
        self._queue: deque[_Sent] = deque()
        self._flying: deque[_Sent] = deque()
        self._wake, self._tried = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        await self._tried.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drained()
        if self._task:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    @property
    def away(self) -> str:
        """Why limits can't be checked; empty when they can."""
        return "" if self._healthy else self._why

    # What callers ask.

    def reserve(self, spend: Spend, now: float) -> Granted | Refused | Awaitable[Granted | Refused]:
        """See `Ledger.reserve`. A caller that stops waiting gives back what it will have been granted."""
        if known := self.own.grants.get(spend.decision_id):
            return known.granted
        if not self._healthy:
            return self._alone(spend, now)
        run = _MEMBERS if spend.run is None else _run_key(spend.agent, spend.run)
        keys, words, asked = [run], ["" if spend.run is None else idle(spend.run)], []
        for limit in spend.limits:
            begins = limit.measure is Measure.RUNS
            if spend.run is None and (begins or limit.kind in PER_RUN):
                continue
            if need := 1 if begins else spend.amounts.get(limit.measure):
                asked.append(limit)
                keys.append(_key(limit.key))
                words += ("runs" if begins else limit.kind, need, limit.amount, limit.per, limit.burst, counted(limit, spend))
        command = self._command(_RESERVE, keys, (spend.decision_id, LEASE_S, *words), now)
        return self._wait(self._ask(_Sent(command, partial(self._reserved, spend, asked), spend)), spend, now)

    def settle(self, decision_id: str, spent: Mapping[Measure, int], now: float) -> None:
        """See `Ledger.settle`."""
        self._close(decision_id, spent, now)

    def refund(self, decision_id: str, now: float) -> None:
        """See `Ledger.refund`."""
        self._close(decision_id, None, now)

    def renew(self, now: float) -> None:
        """See `Ledger.renew`."""
        self.own.renew(self._time(now))
        for key, calls in self.own.open.items():
            for ids in _pieces(list(calls), _CHUNK) if self._healthy else ():
                self._apply([(_key(key), "renew", LEASE_S, *ids)], None, now)

    async def balances(self, limits: tuple[Limit, ...], now: float) -> list[Balance]:
        """See `Ledger.balances`."""
        if not self._healthy:
            raise self._unavailable()
        now, told, waiting = self._time(now), MemoryLedger(), []
        for limit in limits:
            match limit.kind:
                case Kind.WINDOW:
                    waiting.append(self._ask(_Sent(("HMGET", _key(limit.key), "i", "t"), partial(_window, told, limit.key))))
                case Kind.RATE:
                    waiting.append(self._ask(_Sent(("GET", _key(limit.key)), partial(_bucket, told, limit.key))))
                case Kind.CONCURRENCY:
                    command = ("ZCOUNT", _key(limit.key), f"({now!r}", "+inf")
                    waiting.append(self._ask(_Sent(command, partial(_crowd, told, limit.key))))
        await asyncio.gather(*waiting)
        return await told.balances(limits, now)

    async def drained(self) -> None:
        """Wait until Redis knows all that was settled so far, or is away."""
        if self._healthy:
            with suppress(LedgerUnavailable):
                await self._ask(_Sent(self._command(_APPLY, [], (), 0), self._beaten))

    # Before Redis, and after.

    async def _wait(self, answer: "asyncio.Future[Granted | Refused]", spend: Spend, now: float) -> Granted | Refused:
        try:
            return await answer
        except LedgerUnavailable:
            return self._alone(spend, now)
        except asyncio.CancelledError:
            # Nobody heard the answer that had just come. One that is still to come is given back then.
            self.refund(spend.decision_id, now)
            raise

    def _alone(self, spend: Spend, now: float) -> Granted | Refused:
        if not (spend.read and self.unsafe_reads):
            raise self._unavailable()
        answer = self.own.reserve(spend, self._time(now))
        if isinstance(answer, Granted):
            answer = self.own.grants[spend.decision_id].granted = replace(answer, degraded=True)
            self._doubt(spend)
        return answer

    def _reserved(self, spend: Spend, asked: list[Limit], answer: list[Any]) -> Granted | Refused:
        said, *rest = answer
        if said == b"refused":
            index, spent, needed, wait = rest
            return Refused(asked[index], int(float(spent)), int(float(needed)), float(wait))
        now, began, step, *full = rest
        self._heard(float(now))
        granted, times = self.own.take(spend, float(now), step if spend.run is not None else 0, float(began)), iter(full)
        taken = self.own.grants[spend.decision_id].taken
        for index, (limit, need, _) in enumerate(taken):
            if limit.kind is Kind.RATE:
                self.own.full_at[limit.key] = full_at = float(next(times))
                taken[index] = limit, need, full_at
        return granted

    def _close(self, decision_id: str, spent: Mapping[Measure, int] | None, now: float) -> None:
        closed = self.own.close(decision_id, spent, self._time(now))
        if closed is None:
            return
        grant, changes = closed
        if not self._healthy:
            self._doubt(grant.spend)
        elif items := [item for part, change in zip(grant.taken, changes, strict=True) if (item := _ended(grant, *part, change))]:
            self._apply(items, grant.spend, now)

    def _unavailable(self) -> LedgerUnavailable:
        return LedgerUnavailable(
            f"the shared ledger is away ({self._why})", "see to the Redis of this broker; it is tried all the time"
        )

    def _doubt(self, spend: Spend) -> None:
        self._doubts[spend.decision_id] = spend
        if len(self._doubts) > _DOUBTS:
            self._doubts, self._everything = {}, True

    def _time(self, now: float) -> float:
        if not self._callers_clock and self._ahead is not None:
            now = self._ahead + asyncio.get_running_loop().time()
        self.own.now = now = max(now, self.own.now)
        return now

    def _heard(self, now: float) -> None:
        self._ahead = now - asyncio.get_running_loop().time()

    def _command(self, script: str, keys: Iterable[str], words: Iterable[Any], now: float) -> _Words:
        keys = (_MEMBERS, *keys)
        clock = self._time(now) if self._callers_clock else ""
        return ("EVALSHA", script, len(keys), *keys, self._replica, self._token, clock, *words)

    def _said(self, items: Iterable[_Words], now: float = 0.0) -> _Words:
        """The command that says these (key, what to do, words …)."""
        items = list(items)
        words = [word for _, verb, *rest in items for word in (verb, len(rest), *rest)]
        return self._command(_APPLY, [key for key, *_ in items], words, now)

    def _apply(self, items: list[_Words], spend: Spend | None, now: float) -> None:
        self._queue.append(_Sent(self._said(items, now), self._beaten, spend))
        self._wake.set()

    def _beaten(self, answer: list[Any]) -> float:
        """In how many seconds reservations are served."""
        _, now, wait = answer
        self._heard(float(now))
        return float(wait)

    def _ask(self, sent: _Sent) -> "asyncio.Future[Any]":
        sent.waiting = asyncio.get_running_loop().create_future()
        self._queue.append(sent)
        self._wake.set()
        return sent.waiting

    # The one task.

    async def _run(self) -> None:
        try:
            while True:
                connection = self._connect()
                pause = 0.0 if self._healthy else _RETRY_S
                try:
                    await self._join(connection)
                    pause = 0.0
                    await self._serve(connection)
                except Exception as error:  # noqa: BLE001 - whatever it was: calls are denied, and it begins anew
                    self._part(_reason(error))
                finally:
                    await connection.disconnect(nowait=True)
                await asyncio.sleep(pause)
        finally:
            self._part("it is closed")

    async def _join(self, connection: AbstractConnection) -> None:
        async with asyncio.timeout(_CONNECT_S):
            await connection.connect()  # type: ignore[no-untyped-call]
            info = dict(
                line.split(":", 1) for line in (await _round(connection, [("INFO",)]))[0].decode().splitlines() if ":" in line
            )
            await _round(connection, [("SCRIPT", "LOAD", text) for text in _SCRIPTS])
        if info.get("maxmemory_policy", "noeviction") != "noeviction":
            raise LedgerUnavailable(f"Redis may forget what was spent: its maxmemory-policy is {info['maxmemory_policy']}")
        last, self._token = self._token, os.urandom(8).hex()
        words = (last, info["run_id"], self._grace, self.own.now)
        kept, now, left = (await _round(connection, [self._command(_JOIN, [], words, 0)]))[0]
        self._everything |= kept != b"kept"
        self.own.now = float(now)
        self._heard(float(now))
        wait = float(left)
        while self._everything or self._doubts or wait > 0:
            wait = await self._say_again(connection)
            await asyncio.sleep(max(0.0, min(wait, _BEAT_S)))
        self._tell(healthy=True, why="")

    async def _say_again(self, connection: AbstractConnection) -> float:
        doubts, everything, wait = self._doubts, self._everything, 0.0
        self._doubts, self._everything = {}, False
        try:
            for items in _chunks(self._mine(doubts.values(), everything)):
                hold = [(_MEMBERS, "hold")] if items else []
                wait = self._beaten((await _round(connection, [self._said(hold + items)]))[0])
        except BaseException:
            self._doubts, self._everything = {**doubts, **self._doubts}, everything or self._everything
            raise
        return wait

    async def _serve(self, connection: AbstractConnection) -> None:
        while True:
            if not self._queue:
                self._wake.clear()
                try:
                    async with asyncio.timeout(_BEAT_S):
                        await self._wake.wait()
                except TimeoutError:
                    self._apply([], None, 0)
            while self._queue and len(self._flying) < _BATCH:
                self._flying.append(self._queue.popleft())
            for answer in await _round(connection, [sent.command for sent in self._flying]):
                sent = self._flying[0]
                found = sent.read(answer)
                self._flying.popleft()
                if sent.waiting and not sent.waiting.done():
                    sent.waiting.set_result(found)
                elif sent.waiting and isinstance(found, Granted) and sent.spend:
                    self.refund(sent.spend.decision_id, 0)

    def _part(self, why: str) -> None:
        """Deny all that waits; what was sent or would have been is in doubt."""
        self._tell(healthy=False, why=why)
        for sent in (*self._flying, *self._queue):
            if sent.spend:
                self._doubt(sent.spend)
            if sent.waiting and not sent.waiting.done():
                sent.waiting.set_exception(self._unavailable())
        self._flying.clear()
        self._queue.clear()

    def _tell(self, *, healthy: bool, why: str) -> None:
        changed, self._healthy, self._why = healthy is not self._healthy, healthy, why
        self._tried.set()
        if changed:
            self._on_change(healthy, why)

    def _mine(self, doubts: Iterable[Spend], everything: bool) -> Iterator[_Words]:  # noqa: FBT001
        """All that is to be said of what is in doubt, or of everything."""
        own, now = self.own, self.own.now
        keys: dict[Kind, dict[str, bool]] = {kind: {} for kind in Kind}
        runs: dict[tuple[str, str], dict[str, int]] = {}
        if everything:
            keys[Kind.WINDOW], keys[Kind.RATE], keys[Kind.CONCURRENCY] = (
                dict.fromkeys(known, False) for known in (own.windows, own.full_at, own.open)
            )
            runs = {run: {} for run, known in own.runs.items() if now - known.last < idle(run[1])}
        for spend in doubts:
            for limit in spend.limits:
                keys[limit.kind][limit.key] = True
                if limit.kind in PER_RUN:
                    runs.setdefault((spend.agent, spend.run or ""), {})[counted(limit, spend)] = 0
            if spend.run is not None:
                runs.setdefault((spend.agent, spend.run), {})
        for key, doubted in keys[Kind.WINDOW].items():
            per = int(key.rpartition(":")[2])
            window, spent = own.windows.get(key, (-1, 0))
            if window > now // per:
                # Counted by another clock than Redis's: it is counted now.
                own.windows[key] = window, spent = int(now // per), spent
            if window == now // per:
                yield _key(key), "own_window", window, spent, per
            elif doubted:
                yield _key(key), "own_window", int(now // per), 0, per
        for key in keys[Kind.RATE]:
            yield _key(key), "own_rate", own.full_at.get(key, 0)
        for key in keys[Kind.CONCURRENCY]:
            calls = [word for call, until in own.open.get(key, {}).items() if until > now for word in (call, until)]
            for index, piece in enumerate(_pieces(calls, _CHUNK) or [[]]):
                yield _key(key), "own_concurrency", int(not index), *piece
        for run, zeros in runs.items():
            known = own.runs.get(run)
            about = (known.started, known.last, known.steps) if known else (0, 0, 0)
            counts = [word for each in {**zeros, **(known.counts if known else {})}.items() for word in each]
            for piece in _pieces(counts, _CHUNK) or [[]]:
                yield _run_key(*run), "own_run", *about, idle(run[1]), *piece


def _key(key: str) -> str:
    return f"{{broker}}:{key}"


def _run_key(agent: str, run: str) -> str:
    return f"{{broker}}:run/{agent}:{run}"


def _pieces(words: list[Any], size: int) -> list[list[Any]]:
    return [words[start : start + size] for start in range(0, len(words), size)]


def _chunks(items: Iterable[_Words]) -> Iterator[list[_Words]]:
    chunk: list[_Words] = []
    for item in items:
        chunk.append(item)
        if sum(map(len, chunk)) > _CHUNK:
            yield chunk
            chunk = []
    yield chunk


def _ended(grant: Grant, limit: Limit, need: int, origin: float, change: int) -> _Words | None:
    """What to say of one part of a call that ended."""
    key = _key(limit.key)
    match limit.kind:
        case Kind.CONCURRENCY:
            return key, "concurrency", grant.spend.decision_id
        case Kind.WINDOW if change:
            return key, "window", origin, change
        case Kind.RATE if change:
            return key, "rate", f"{origin:.17g}", f"{origin + change * limit.per / limit.amount:.17g}"
        case Kind.RUN | Kind.IDENTICAL if change:
            return _run_key(grant.spend.agent, grant.spend.run or ""), "run", counted(limit, grant.spend), change, grant.at
    return None


def _window(told: MemoryLedger, key: str, answer: list[bytes | None]) -> None:
    window, spent = answer
    if window and spent:
        told.windows[key] = int(window), int(spent)


def _bucket(told: MemoryLedger, key: str, answer: bytes | None) -> None:
    if answer:
        told.full_at[key] = float(answer)


def _crowd(told: MemoryLedger, key: str, answer: int) -> None:
    told.open[key] = dict.fromkeys(map(str, range(answer)), float("inf"))


async def _round(connection: AbstractConnection, commands: list[_Words]) -> list[Any]:
    async with asyncio.timeout(SLOW_S):
        await connection.send_packed_command(connection.pack_commands(commands), check_health=False)
        answers = [await connection.read_response() for _ in commands]
    if [b"away"] in answers:
        raise LedgerUnavailable("Redis lost its data, or this broker's place in it")
    return answers


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {SLOW_S * 1000:.0f} ms"
    return f"{type(error).__name__}: {error}" if isinstance(error, RedisError | OSError) else str(error)
