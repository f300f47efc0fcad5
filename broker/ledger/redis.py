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
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha1
from importlib.resources import files
from typing import Any, Self

from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.exceptions import RedisError

from broker.errors import UsageError
from broker.ledger.answers import bucket, crowd, reason, round_trip, window
from broker.ledger.base import LEASE_S, Balance, Granted, LedgerUnavailable, Refused, Spend
from broker.ledger.memory import PER_RUN, MemoryLedger, counted, idle
from broker.ledger.said import MEMBERS, NOTICES, Words, chunks, ended, key_of, mine, pieces, run_key
from broker.policy.limits import Kind, Limit, Measure

GRACE_S = 3.0
"""For how long nobody is served after Redis lost its data, so that every broker can notice and say what it spent."""

LAPSE_S = 10.0
"""So long before others may have the place of a call that is open here all is cut, if Redis can't be told that it is."""

_BEAT_S = 0.4  # well within the grace; and a notice is known everywhere after at most so long
_CONNECT_S = 1.0
_RETRY_S = 0.2
_BATCH = 128  # reservations in one round trip: about 5 ms of Redis's time
_DOUBTS = 10_000  # beyond that, all is said again

_BEGIN, *_TEXTS = (
    files("broker.ledger").joinpath("scripts", f"{name}.lua").read_text() for name in ("begin", "reserve", "apply", "join")
)
_SCRIPTS = [_BEGIN + _TEXTS[0], _BEGIN + _TEXTS[1], _TEXTS[2]]
_RESERVE, _APPLY, _JOIN = (sha1(text.encode(), usedforsecurity=False).hexdigest() for text in _SCRIPTS)


@dataclass(slots=True)
class _Sent:
    """A command under way: how its answer is read, who waits for that, and whose spending is in doubt until it is there.

    A `large` one is the last of its round trip: a notice may have 200 KB, and many at once would take longer than `SLOW_S`.
    """

    command: Words
    read: Callable[[Any], Any]
    spend: Spend | None = None
    waiting: "asyncio.Future[Any] | None" = None
    large: bool = False


class RedisLedger:
    """See `Ledger`. `async with` it, once `own` is rebuilt: it has then joined, or will as soon as it can.

    `url` is redis-py's: `redis://`, `rediss://` (verified TLS; `?ssl_ca_certs=FILE`), with USER:PASSWORD of an ACL user: keys
    `~{broker}:*`, commands info, evalsha, script|load, time, hget, hmget, hset, hkeys, hdel, hincrby, del, get, set, expire,
    zadd, zrem, zcard, zcount, zscore, zrange, zremrangebyscore. `replica` names this broker's state folder for good. `on_change`
    hears whether limits can be checked, and if not, why. While `unsafe_reads` is set and Redis is away, reads are let through on
    what this broker alone has spent. Before it joins, `callers_clock` may be set, to count by the caller's `now`, and `grace`, in
    seconds.

    Beside what is spent, brokers share notices: documents by ID that all must know. `notices` gives this broker's, `on_notices`
    hears those of all when there are new ones; nobody is served before it has heard them. `on_lapse` hears when what is open
    here must be cut: None for all, or calls by decision ID.
    """

    def __init__(
        self, url: str, replica: str, own: MemoryLedger, on_change: Callable[[bool, str], None] = lambda _healthy, _why: None
    ) -> None:
        try:
            known: dict[str, Any] = {**parse_url(url)}
            if known.get("ssl_cert_reqs", "required") != "required" or not known.get("ssl_check_hostname", True):
                raise UsageError("the Redis URL turns the check of certificates off", "name the roots with ?ssl_ca_certs=FILE")
            kind: type[AbstractConnection] = known.pop("connection_class", Connection)
            self._connect = partial(kind, **known, protocol=2, driver_info=None, socket_timeout=None)
            self._connect()
        except (TypeError, ValueError, RedisError):
            raise UsageError(
                "the Redis URL can't be read", "write redis[s]://USER:PASSWORD@HOST:PORT, special characters as %XX"
            ) from None
        self.own, self._on_change = own, on_change
        self.unsafe_reads, self.callers_clock, self.grace = False, False, GRACE_S
        self.notices: Callable[[], Mapping[str, bytes]] = dict
        self.on_notices: Callable[[Mapping[str, bytes]], None] = lambda _notices: None
        self.on_lapse: Callable[[Collection[str] | None], object] = lambda _decision_ids: None
        self._kept = 0.0  # when all open calls surely had their places, by the event loop's clock
        self._lapsing: asyncio.TimerHandle | None = None
        self._heard_of = b""  # the number of the last notice
        self._replica, self._token = f"@{replica}", ""
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
        if self._lapsing:
            self._lapsing.cancel()

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
        run = MEMBERS if spend.run is None else run_key(spend.agent, spend.run)
        keys, words, asked = [run], ["" if spend.run is None else idle(spend.run), int(spend.step)], []
        for limit in spend.limits:
            begins = limit.measure is Measure.RUNS
            if spend.run is None and (begins or limit.kind in PER_RUN):
                continue
            if need := 1 if begins else spend.amounts.get(limit.measure):
                asked.append(limit)
                keys.append(key_of(limit.key))
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
        calls = ((key, ids) for key, known in self.own.open.items() if known for ids in pieces(list(known)))
        for items in chunks((key_of(key), "renew", LEASE_S, *ids) for key, ids in calls) if self._healthy else ():
            self._apply(items, None, now)
        if self._healthy:
            kept = partial(self._renewed, asyncio.get_running_loop().time())
            self._queue.append(_Sent(self._said([]), kept))

    async def balances(self, limits: tuple[Limit, ...], now: float) -> list[Balance]:
        """See `Ledger.balances`."""
        if not self._healthy:
            raise self._unavailable()
        now, told, waiting = self._time(now), MemoryLedger(), []
        for limit in limits:
            match limit.kind:
                case Kind.WINDOW:
                    waiting.append(self._ask(_Sent(("HMGET", key_of(limit.key), "i", "t"), partial(window, told, limit.key))))
                case Kind.RATE:
                    waiting.append(self._ask(_Sent(("GET", key_of(limit.key)), partial(bucket, told, limit.key))))
                case Kind.CONCURRENCY:
                    command = ("ZCOUNT", key_of(limit.key), f"({now!r}", "+inf")
                    waiting.append(self._ask(_Sent(command, partial(crowd, told, limit.key))))
        await asyncio.gather(*waiting)
        return await told.balances(limits, now)

    def share(self, notice_id: str, document: bytes) -> None:
        """Tell the other brokers. While Redis is away nothing is sent: when it is back, all that it lacks is."""
        if self._healthy:
            self._note(notice_id, document)

    def unshare(self, notice_ids: Iterable[str]) -> None:
        """These are over; they come back where a broker that still has them joins, until that lets go of them too."""
        for items in chunks((NOTICES, "unnote", *ids) for ids in pieces(list(notice_ids)) if ids) if self._healthy else ():
            self._apply(items, None, 0)

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
            trail = self.own.trail(asked[index], spend) if asked[index].kind is Kind.FLOW else ""
            return Refused(asked[index], int(float(spent)), int(float(needed)), float(wait), trail)
        now, began, step, *full = rest
        self._heard(float(now))
        granted, times = (
            self.own.take(spend, float(now), step if spend.run is not None and spend.step else 0, float(began)),
            iter(full),
        )
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
        parts = zip(grant.taken, changes, strict=True)
        if not self._healthy:
            self._doubt(grant.spend)
        elif items := [item for (limit, _, origin), change in parts if (item := ended(grant, limit, origin, change))]:
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
        if not self.callers_clock and self._ahead is not None:
            now = self._ahead + asyncio.get_running_loop().time()
        self.own.now = now = max(now, self.own.now)
        return now

    def _heard(self, now: float) -> None:
        self._ahead = now - asyncio.get_running_loop().time()

    def _command(self, script: str, keys: Iterable[str], words: Iterable[Any], now: float) -> Words:
        keys = (MEMBERS, *keys)
        clock = self._time(now) if self.callers_clock else ""
        return ("EVALSHA", script, len(keys), *keys, self._replica, self._token, clock, *words)

    def _said(self, items: Iterable[Words], now: float = 0.0) -> Words:
        """The command that says these (key, what to do, words …)."""
        items = list(items)
        words = [word for _, verb, *rest in items for word in (verb, len(rest), *rest)]
        return self._command(_APPLY, [key for key, *_ in items], words, now)

    def _apply(self, items: list[Words], spend: Spend | None, now: float) -> None:
        self._queue.append(_Sent(self._said(items, now), self._beaten, spend))
        self._wake.set()

    def _note(self, notice_id: str, document: bytes) -> None:
        self._queue.append(_Sent(self._said([(NOTICES, "note", notice_id, document)]), self._beaten, large=True))
        self._wake.set()

    def _beaten(self, answer: list[Any]) -> float:
        """In how many seconds reservations are served."""
        _, now, wait, last_notice = answer
        self._heard(float(now))
        if last_notice != self._heard_of:
            self._heard_of = last_notice
            self._queue.append(_Sent(("HKEYS", NOTICES), self._missed))
        return float(wait)

    def _named(self, names: list[bytes]) -> list[str]:
        """Of these notices those that this broker lacks; what Redis lacks is told to it."""
        there, mine = {name.decode() for name in names if name}, self.notices()
        for notice_id in mine.keys() - there:
            self._note(notice_id, mine[notice_id])
        return sorted(there - mine.keys())

    def _missed(self, names: list[bytes]) -> None:
        for notice_id in self._named(names):
            self._queue.append(_Sent(("HMGET", NOTICES, notice_id), partial(self._told, notice_id), large=True))

    def _told(self, notice_id: str, documents: list[bytes | None]) -> None:
        if document := documents[0]:
            self.on_notices({notice_id: document})

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
                    self._part(reason(error))
                finally:
                    await connection.disconnect(nowait=True)
                await asyncio.sleep(pause)
        finally:
            self._part("it is closed")

    async def _join(self, connection: AbstractConnection) -> None:
        async with asyncio.timeout(_CONNECT_S):
            await connection.connect()  # type: ignore[no-untyped-call]
            info = dict(
                line.split(":", 1) for line in (await round_trip(connection, [("INFO",)]))[0].decode().splitlines() if ":" in line
            )
            await round_trip(connection, [("SCRIPT", "LOAD", text) for text in _SCRIPTS])
        if info.get("maxmemory_policy", "noeviction") != "noeviction":
            raise LedgerUnavailable(f"Redis may forget what was spent: its maxmemory-policy is {info['maxmemory_policy']}")
        last, self._token = self._token, os.urandom(8).hex()
        words = (last, info["run_id"], self.grace, self.own.now)
        kept, now, left = (await round_trip(connection, [self._command(_JOIN, [], words, 0)]))[0]
        self._everything |= kept != b"kept"
        self.own.now = float(now)
        self._heard(float(now))
        wait = float(left)
        # Heard last, and looked at doubts after that: what ends while this waits is in doubt as well.
        await self._hear_all(connection)
        while self._everything or self._doubts or wait > 0:
            wait = await self._say_again(connection)
            await asyncio.sleep(max(0.0, min(wait, _BEAT_S)))
            await self._hear_all(connection)
        self._tell(healthy=True, why="")
        self.renew(self.own.now)

    async def _hear_all(self, connection: AbstractConnection) -> None:
        for notice_id in self._named((await round_trip(connection, [("HKEYS", NOTICES)]))[0]):
            self._told(notice_id, (await round_trip(connection, [("HMGET", NOTICES, notice_id)]))[0])

    async def _say_again(self, connection: AbstractConnection) -> float:
        doubts, everything, wait = self._doubts, self._everything, 0.0
        self._doubts, self._everything = {}, False
        try:
            # Only who has something to say holds the others up: else each would, in turn, for ever.
            hold = [(MEMBERS, "hold")] if doubts or everything else []
            for items in chunks(mine(self.own, doubts.values(), everything=everything)):
                wait = self._beaten((await round_trip(connection, [self._said(hold + items)]))[0])
        except BaseException:
            self._doubts, self._everything = {**doubts, **self._doubts}, everything or self._everything
            raise
        return wait

    async def _serve(self, connection: AbstractConnection) -> None:
        loop, beat = asyncio.get_running_loop(), 0.0
        while True:
            if loop.time() - beat >= _BEAT_S:
                # Also where calls come without a pause: what others say must be heard.
                beat = loop.time()
                self._apply([], None, 0)
            if not self._queue:
                self._wake.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_BEAT_S):
                        await self._wake.wait()
            while self._queue and len(self._flying) < _BATCH and not (self._flying and self._flying[-1].large):
                self._flying.append(self._queue.popleft())
            for answer in await round_trip(connection, [sent.command for sent in self._flying]):
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

    def _renewed(self, at: float, answer: list[Any]) -> float:
        self._kept = at
        return self._beaten(answer)

    def _lapse(self) -> None:
        """Others may soon take the places of what is open here, and revoke what is not heard of here."""
        held = {decision_id for known in self.own.open.values() for decision_id in known}
        reads = {decision_id for decision_id, grant in self.own.grants.items() if grant.spend.read}
        self.on_lapse(held - reads if self.unsafe_reads else None)

    def _tell(self, *, healthy: bool, why: str) -> None:
        changed, self._healthy, self._why = healthy is not self._healthy, healthy, why
        self._tried.set()
        if changed:
            if self._lapsing:
                self._lapsing.cancel()
            at = self._kept + LEASE_S - LAPSE_S
            self._lapsing = None if healthy else asyncio.get_running_loop().call_at(at, self._lapse)
            self._on_change(healthy, why)
