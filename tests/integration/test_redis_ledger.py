"""The shared ledger on a real Redis that stops, hangs, forgets, and comes back; several brokers at once, under load.

What holds through all of it: nothing over the limit, and afterwards Redis knows just what the callers were granted.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Self
from urllib.parse import urlsplit

import pytest
import stack
from ledgers import answered, limit, shared, spend
from redis_server import RedisServer

from broker.errors import UsageError
from broker.ledger import answers
from broker.ledger import redis as module
from broker.ledger.base import Granted, LedgerUnavailable, Refused
from broker.ledger.memory import MemoryLedger
from broker.ledger.redis import RedisLedger
from broker.policy.limits import Measure

DAY = 86400
BUDGET = limit("tokens", 4000, DAY, scope="team/t")
SHARED = (BUDGET, limit("concurrency", 1000), limit("tokens_per_run", 4000), limit("rate", 10**6, 1, 10**6))


@pytest.fixture
def server() -> Iterator[RedisServer]:
    found = RedisServer()
    yield found
    found.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BEAT_S", 0.1)
    monkeypatch.setattr(module, "_RETRY_S", 0.05)


@asynccontextmanager
async def fleet(url: str, size: int = 3, grace: float = 0.5) -> AsyncIterator[list[RedisLedger]]:
    async with AsyncExitStack() as exits:
        yield [await exits.enter_async_context(shared(url, f"broker{number}", grace=grace)) for number in range(size)]


async def healthy(*ledgers: RedisLedger) -> None:
    async with asyncio.timeout(20):
        while any(ledger.away for ledger in ledgers):  # noqa: ASYNC110 - what an event would say is what is tested
            await asyncio.sleep(0.01)


def spent_by(*ledgers: RedisLedger) -> int:
    return sum(ledger.own.windows.get(BUDGET.key, (0, 0))[1] for ledger in ledgers)


def test_two_hundred_at_once_on_a_budget_of_a_hundred_are_a_hundred(server):
    bound = limit("calls", 100, DAY, scope="team/t")

    async def run() -> None:
        async with fleet(server.url) as ledgers:
            asked = [answered(ledgers[number % 3], spend(bound), 0) for number in range(200)]
            answers = await asyncio.gather(*asked)
        assert sum(isinstance(answer, Granted) for answer in answers) == 100
        assert sum(isinstance(answer, Refused) for answer in answers) == 100

    asyncio.run(run())
    assert server.total(bound.key) == 100


class Load:
    """Callers that spend until there is nothing left: some settle less, some give back, some stop waiting."""

    def __init__(self, ledgers: list[RedisLedger]) -> None:
        self.ledgers, self.spent, self.denied, self._dice = ledgers, {}, 0, random.Random(7)

    async def caller(self, ledger: RedisLedger, run: str) -> None:
        refusals = 0
        while refusals < 10:
            wanted = spend(*SHARED, amounts={Measure.CALLS: 1, Measure.TOKENS: 10}, run=run)
            try:
                patience = 0.002 if self._dice.random() < 0.1 else 30
                answer = await asyncio.wait_for(answered(ledger, wanted, 0), patience)
            except LedgerUnavailable:
                self.denied += 1
                await asyncio.sleep(0.01)
                continue
            except TimeoutError:
                continue
            refusals = refusals + 1 if isinstance(answer, Refused) else 0
            if refusals:
                await asyncio.sleep(0.01)
                continue
            self.spent[wanted.decision_id] = 10
            await asyncio.sleep(self._dice.random() * 0.05)
            end = self._dice.random()
            if end < 0.2:
                ledger.refund(wanted.decision_id, 0)
                self.spent[wanted.decision_id] = 0
            elif end < 0.8:
                self.spent[wanted.decision_id] = tokens = self._dice.randrange(11)
                ledger.settle(wanted.decision_id, {Measure.TOKENS: tokens}, 0)

    def start(self) -> "asyncio.Future[list[None]]":
        return asyncio.gather(*(self.caller(ledger, f"r{number % 2}") for ledger in self.ledgers for number in range(5)))


async def _restart_empty(server: RedisServer) -> None:
    server.restart()


async def _stop(server: RedisServer) -> None:
    server.stop()
    await asyncio.sleep(0.3)
    server.start()


async def _freeze(server: RedisServer) -> None:
    server.freeze()
    await asyncio.sleep(0.3)
    server.thaw()


async def _old_dump(server: RedisServer) -> None:
    await asyncio.to_thread(server.command, "SAVE")
    await asyncio.sleep(0.2)
    server.restart()


def _command(*words: str) -> Callable[[RedisServer], Awaitable[object]]:
    return lambda server: asyncio.to_thread(server.command, *words)


FAULTS = {
    "it stops and starts again, empty": _stop,
    "it restarts empty": _restart_empty,
    "it restarts from an old dump": _old_dump,
    "it hangs": _freeze,
    "it sleeps": _command("DEBUG", "SLEEP", "0.3"),
    "its data is flushed": _command("FLUSHALL"),
    "its scripts are flushed": _command("SCRIPT", "FLUSH"),
    "connections drop": _command("CLIENT", "KILL", "TYPE", "normal"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_nothing_over_the_limit_and_nothing_forgotten_when(server, fault):
    async def run() -> None:
        async with fleet(server.url) as ledgers:
            load = Load(ledgers)
            callers = load.start()
            for _ in range(2):
                await asyncio.sleep(0.15)
                assert not callers.done()
                await fault(server)
            async with asyncio.timeout(20):
                await callers
            await healthy(*ledgers)
            for ledger in ledgers:
                await ledger.drained()
            truth = sum(load.spent.values())
            assert load.denied
            assert BUDGET.amount - 50 < truth <= BUDGET.amount
            assert spent_by(*ledgers) == truth
            told = await ledgers[0].balances(SHARED, 0)
            assert told[0].spent == truth
            assert told[1].spent == sum(len(ledger.own.grants) for ledger in ledgers)
            runs = [int(server.command("HGET", f"{{broker}}:run/a:r{n}", SHARED[2].key) or 0) for n in range(2)]
            assert sum(runs) == truth

    asyncio.run(run())


def test_a_caller_that_stops_waiting_leaves_nothing_behind(server):
    async def run() -> None:
        async with fleet(server.url, 1) as (ledger,):
            for steps in range(12):
                wanted = spend(*SHARED, amounts={Measure.CALLS: 1, Measure.TOKENS: 9}, run="r")
                waiting = asyncio.ensure_future(answered(ledger, wanted, 0))
                for _ in range(steps):
                    await asyncio.sleep(0)
                if not waiting.cancel():
                    ledger.refund(wanted.decision_id, 0)
            await ledger.drained()
            await ledger.drained()
            assert [told.spent for told in await ledger.balances(SHARED[:2], 0)] == [0, 0]
            assert not ledger.own.grants

    asyncio.run(run())


def test_a_caller_that_stops_waiting_just_when_the_answer_comes_leaves_nothing_behind(server):
    async def run() -> None:
        async with fleet(server.url, 1) as (ledger,):
            read = ledger._reserved
            ledger._reserved = lambda *known: (asyncio.get_running_loop().call_soon(waiting.cancel), read(*known))[1]
            waiting = asyncio.ensure_future(answered(ledger, spend(BUDGET, amounts={Measure.TOKENS: 9}), 0))
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert not ledger.own.grants
            await ledger.drained()
            assert server.total(BUDGET.key) == 0

    asyncio.run(run())


def test_nobody_is_served_from_an_emptied_redis_before_the_others_have_said_what_they_spent(server):
    async def run() -> None:
        async with fleet(server.url, 2) as (quick, slow):
            assert isinstance(await answered(slow, spend(BUDGET, amounts={Measure.TOKENS: 4000}), 0), Granted)
            say = slow._say_again

            async def late(connection: object) -> float:
                await asyncio.sleep(0.3)
                return await say(connection)

            slow._say_again = late
            server.command("FLUSHALL")
            with pytest.raises(LedgerUnavailable, match="Redis lost its data"):
                await answered(quick, spend(BUDGET, amounts={Measure.TOKENS: 1}), 0)
            await healthy(quick)
            assert isinstance(await answered(quick, spend(BUDGET, amounts={Measure.TOKENS: 1}), 0), Refused)

    asyncio.run(run())


def test_a_broker_that_stands_still_itself_does_not_take_redis_for_slow(server):
    async def run() -> None:
        async with fleet(server.url, 1) as (ledger,):
            waiting = asyncio.ensure_future(answered(ledger, spend(BUDGET, amounts={Measure.TOKENS: 9}), 0))
            for _ in range(3):
                await asyncio.sleep(0)
            assert ledger._flying
            time.sleep(2 * answers.SLOW_S)  # noqa: ASYNC251 - that is the attack
            assert isinstance(await waiting, Granted)

    asyncio.run(run())


@pytest.mark.parametrize("reads_pass", [False, True])
def test_who_is_cut_off_ends_what_is_open_before_others_may_have_its_places(server, monkeypatch, reads_pass):
    async def run() -> None:
        async with fleet(server.url, 1) as (ledger,):
            lapsed = asyncio.get_running_loop().create_future()
            ledger.on_lapse, ledger.unsafe_reads = lapsed.set_result, reads_pass
            crowd = limit("concurrency", 5)
            for name, read in (("writing", False), ("reading", True), ("over", False)):
                await answered(ledger, spend(crowd, id=name, read=read), 0)
            ledger.refund("over", 0)
            await ledger.drained()
            ledger.renew(0)
            await ledger.drained()
            began = asyncio.get_running_loop().time()
            server.stop()
            held = await asyncio.wait_for(lapsed, 20)
            assert held == ({"writing"} if reads_pass else None)
            assert asyncio.get_running_loop().time() - began < module.LEASE_S

    monkeypatch.setattr(module, "LEASE_S", 12.0)
    asyncio.run(run())


def test_whoever_is_back_in_time_cuts_nothing(server):
    async def run() -> None:
        async with fleet(server.url, 1) as (ledger,):
            lapsed = []
            ledger.on_lapse = lapsed.append
            await answered(ledger, spend(limit("concurrency", 5)), 0)
            server.stop()
            while not ledger._lapsing:  # noqa: ASYNC110 - what an event would say is what is tested
                await asyncio.sleep(0.01)
            server.start()
            await healthy(ledger)
            assert (lapsed, ledger._lapsing) == ([], None)

    asyncio.run(run())


class Delay:
    """A network between ledger and Redis that can keep what was sent, and deliver it long after its sender has gone."""

    def __init__(self, port: int) -> None:
        self._port, self.port, self._tasks = port, 0, set()
        self.flows = asyncio.Event()
        self.flows.set()
        self.kept = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", self._port)
        self._tasks.add(asyncio.create_task(self._copy(inner, writer, None)))
        self._tasks.add(asyncio.create_task(self._copy(reader, outer, self.flows)))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flows: asyncio.Event | None) -> None:
        try:
            while data := await reader.read(65536):
                if flows and not flows.is_set():
                    self.kept += 1
                    await flows.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    def keep(self) -> asyncio.Event:
        """What is on connections of now stays under way until the event; new ones flow."""
        old, self.flows = self.flows, asyncio.Event()
        self.flows.set()
        old.clear()
        return old


def test_a_reservation_that_arrives_after_its_broker_joined_again_changes_nothing(server):
    async def run() -> None:
        async with Delay(server.port) as network, fleet(f"redis://127.0.0.1:{network.port}", 1, 0) as (ledger,):
            bound = limit("calls", 10, DAY)
            released = network.keep()
            with pytest.raises(LedgerUnavailable, match="no answer within 50 ms"):
                await answered(ledger, spend(bound), 0)
            await healthy(ledger)
            assert server.total(bound.key) == 0
            calls = server.command("INFO", "commandstats").count("evalsha:calls=")
            released.set()
            await asyncio.sleep(0.1)
            assert network.kept
            assert calls
            assert server.total(bound.key) == 0
            assert isinstance(await answered(ledger, spend(bound), 0), Granted)
            assert server.total(bound.key) == 1

    asyncio.run(run())


def test_brokers_whose_clocks_are_hours_apart_count_in_the_same_windows(server):
    bounds = (limit("calls", 10, 3600), limit("rate", 10, 3600, 10), limit("concurrency", 10))

    async def run() -> None:
        async with fleet(server.url) as ledgers:
            for number in range(10):
                now = 1_800_000_000 + (number % 3 - 1) * 3600 - number * 7200
                assert isinstance(await answered(ledgers[number % 3], spend(*bounds), now), Granted)
            for bound in bounds:
                for ledger in ledgers:
                    assert isinstance(await answered(ledger, spend(bound), 1_800_000_000 + 9 * 3600), Refused)

    asyncio.run(run())


def test_reads_pass_on_this_brokers_own_limits_while_redis_is_away_if_that_is_chosen(server):
    bound, heard = limit("calls", 3, DAY), []

    async def run() -> None:
        own = MemoryLedger()
        async with shared(server.url, "one", own, on_change=lambda *told: heard.append(told)) as ledger:
            assert await answered(ledger, spend(bound), 0) == Granted()
            server.stop()
            with pytest.raises(LedgerUnavailable):
                await answered(ledger, spend(bound, read=True), 0)
            ledger.unsafe_reads = True
            with pytest.raises(LedgerUnavailable, match="see to the Redis"):
                ledger.reserve(spend(bound), 0)
            for _ in range(2):
                assert ledger.reserve(spend(bound, read=True, id=f"r{_}"), 0) == Granted(degraded=True)
            assert isinstance(ledger.reserve(spend(bound, read=True), 0), Refused)
            ledger.refund("r1", 0)
            server.start()
            await healthy(ledger)
            assert server.total(bound.key) == 2

    asyncio.run(run())
    assert [healthy for healthy, _ in heard] == [True, False, True, False]
    assert heard[1][1]


def test_a_broker_that_was_killed_has_spent_what_it_had(server):
    async def run() -> None:
        first = shared(server.url, "one", grace=0)
        async with first:
            await answered(first, spend(BUDGET, amounts={Measure.CALLS: 1, Measure.TOKENS: 30}), 0)
        rebuilt = first.own
        rebuilt.open.clear()
        rebuilt.grants.clear()
        async with shared(server.url, "one", rebuilt, grace=0) as again, shared(server.url, "two") as two:
            assert server.total(BUDGET.key) == 30
            assert isinstance(await answered(two, spend(BUDGET, amounts={Measure.TOKENS: 3971}), 0), Refused)
            server.command("FLUSHALL")
            await asyncio.sleep(0.3)
            await healthy(again, two)
            assert server.total(BUDGET.key) == 30

    asyncio.run(run())


def test_an_acl_user_with_these_commands_and_keys_is_enough_and_its_password_is_never_told(server):
    user = [
        "on",
        ">s3cret/%",
        "~{broker}:*",
        "+info",
        "+evalsha",
        "+script|load",
        "+time",
        "+hget",
        "+hmget",
        "+hset",
        "+hkeys",
        "+hdel",
        "+hincrby",
    ]
    user += ["+del", "+get", "+set", "+expire", "+zadd", "+zrem", "+zcard", "+zcount", "+zscore", "+zrange", "+zremrangebyscore"]
    server.command("ACL", "SETUSER", "broker", *user)
    server.command("CONFIG", "SET", "requirepass", "other")
    place = urlsplit(server.url).netloc

    async def run() -> None:
        async with shared(f"redis://broker:s3cret%2F%25@{place}", "one", grace=0) as ledger:
            everything = (*SHARED, limit("runs", 5, DAY), limit("identical_per_run", 5), limit("time_per_run", 50))
            amounts = {Measure.CALLS: 1, Measure.TOKENS: 10}
            for end in (ledger.refund, lambda decision_id, now: ledger.settle(decision_id, {Measure.TOKENS: 1}, now)):
                wanted = spend(*everything, amounts=amounts, run="r")
                assert isinstance(await answered(ledger, wanted, 0), Granted)
                ledger.renew(0)
                end(wanted.decision_id, 0)
            assert (await ledger.balances(everything, 0))[0].spent == 1
        async with shared(f"redis://broker:s3cret@{place}", "one", grace=0) as ledger:
            with pytest.raises(LedgerUnavailable, match="AuthenticationError") as error:
                ledger.reserve(spend(), 0)
            assert "s3cret" not in f"{error.value} {error.value!r} {ledger!r}"

    asyncio.run(run())


@pytest.mark.parametrize(
    "url", ["http://x:s3cret@h", "redis://:s3/cret@h:1", "redis://:s3cret@h/?nonsense=1", "redis://h:s3cret", ""]
)
def test_a_url_that_cant_be_read_is_told_without_what_is_in_it(url):
    with pytest.raises(UsageError, match="can't be read; write redis") as error:
        RedisLedger(url, "one", MemoryLedger())
    assert "s3" not in str(error.value)
    assert error.value.__cause__ is None


def test_tls_is_verified(tmp_path):
    ca, foreign = stack.TestCA(), tmp_path / "foreign.pem"
    (tmp_path / "ca.pem").write_text(ca.pem)
    foreign.write_text(stack.TestCA().pem)
    server = RedisServer(tls=ca.issue(tmp_path / "certs", "localhost"))

    async def run(file: object, host: str) -> bool:
        url = f"rediss://{host}:{server.url_port}?ssl_ca_certs={file}"
        async with shared(url, "one", grace=0) as ledger:
            return not ledger.away

    try:
        assert asyncio.run(run(tmp_path / "ca.pem", "localhost"))
        assert not asyncio.run(run(foreign, "localhost"))
        assert not asyncio.run(run(tmp_path / "ca.pem", "127.0.0.1"))
    finally:
        server.close()


def test_a_redis_that_may_forget_is_not_used(server):
    server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")

    async def run() -> None:
        async with fleet(server.url, 1) as (ledger,):
            with pytest.raises(LedgerUnavailable, match="maxmemory-policy is allkeys-lru"):
                ledger.reserve(spend(), 0)

    asyncio.run(run())


def test_no_round_trip_carries_more_than_one_notice_or_a_slow_network_would_never_be_joined_again(server, monkeypatch):
    """An agent has people asked about 32 calls of 64 KiB: told at once, they took longer than an answer may."""
    carried, round_trip = [], module.round_trip

    async def spied(connection, commands):
        answers = await round_trip(connection, commands)
        words = (word for each in (*commands, *answers) if isinstance(each, tuple | list) for word in each)
        carried.append(sum(len(word) > 1000 for word in words if isinstance(word, bytes)))
        return answers

    async def run() -> None:
        told = {f"a-{number}": b"x" * 150_000 for number in range(32)}
        heard: dict[str, bytes] = {}
        async with fleet(server.url, 2) as [one, two]:
            await healthy(one, two)
            one.notices, two.notices, two.on_notices = lambda: told, lambda: heard, heard.update
            for notice_id, document in told.items():
                one.share(notice_id, document)
            async with asyncio.timeout(10):
                while heard != told:  # noqa: ASYNC110 - what an event would say is what is tested
                    await asyncio.sleep(0.05)

    monkeypatch.setattr(module, "round_trip", spied)
    asyncio.run(run())
    assert max(carried) == 1
