"""Leases: one question at a time, nobody else's answer, never after the end, and taken back."""

import asyncio
import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from cryptography.fernet import Fernet

from broker.credentials import leases as module
from broker.credentials.base import CredentialUnavailable, Occasion, Secret, leased
from broker.credentials.leases import Leases
from broker.credentials.outbox import Outbox
from broker.keys import fernet
from broker.policy.snapshot import Agent, CredentialSpec, Endpoint, Operation, Tool
from broker.policy.types import Effect

NOW = 1_800_000_000.0
TOOL = Tool("crm", "team", "rest", Endpoint("https", "crm.example", 443), "t#", {})
BOT, OTHER = (Agent(name, "team", "primary", "a#", {}) for name in ("bot", "other"))
SPEC = CredentialSpec("kept", {"scopes": ["read"]})


def occasion(agent=BOT, *, tool=TOOL, spec=SPEC, operation="tickets.get", max_ttl=3600, pins=None):  # noqa: PLR0913 - an occasion has as many parts
    return Occasion(agent, tool, Operation(operation, Effect.READ, "t#"), spec, "run-7", max_ttl, pins or {})


@dataclass
class Clock:
    """A steady clock that a test sets, and a wall clock that may be as wrong as it likes."""

    steady: float = NOW
    off: float = 0.0

    def __call__(self) -> float:
        return self.steady

    @property
    def wall(self) -> float:
        return self.steady + self.off


@dataclass
class Kept:
    """A source that keeps what it made and what it took back. `life` in seconds; `gate` holds answers up, `fault` is one."""

    clock: Clock
    life: float | None = 3600.0
    handles: bool = True
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    fault: Exception | None = None
    asked: list[str] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)
    took_back: asyncio.Event = field(default_factory=asyncio.Event)
    slow: float = 0.0
    name = "kept"

    def narrowed(self, occasion):
        return (occasion.operation.name, *occasion.pins.get("repo", ()))

    async def fetch(self, occasion, now):
        token = f"{occasion.agent.name}-SECRET-{len(self.asked)}"
        self.asked.append(token)
        await self.gate.wait()
        self.clock.steady += self.slow
        if self.fault:
            raise self.fault
        expires = None if self.life is None else now + self.life
        return leased(
            occasion.spec, token, lease_id=f"id-{token}", expires=expires, handle=Secret(token) if self.handles else None
        )

    async def revoke(self, handle):
        if self.fault:
            raise self.fault
        self.revoked.append(handle.reveal())
        self.took_back.set()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def source(clock):
    kept = Kept(clock)
    kept.gate.set()
    return kept


@pytest.fixture
def box(tmp_path, clock):
    return Outbox(tmp_path / "outbox", fernet(tmp_path / "outbox.key"), clock, lambda: 0.5)


@pytest.fixture
def leases(source, clock, box):
    return Leases(source, box.put, clock)


def token(lease):
    return lease.value.reveal().removeprefix("Bearer ")


def run(scenario: Callable):
    """The scenario, and then whatever it left running, which must end by itself."""

    async def all_of_it():
        await scenario()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others), 5)

    asyncio.run(all_of_it())
    gc.collect()  # so that an exception that nobody took would be told here


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_hundred_callers_are_one_request(leases, source, clock):
    async def scenario():
        source.gate.clear()
        callers = [asyncio.create_task(leases.issue(occasion(), clock.wall)) for _ in range(100)]
        await settle()
        source.gate.set()
        assert len({lease.lease_id for lease in await asyncio.gather(*callers)}) == 1
        assert len(source.asked) == 1

    run(scenario)


def test_a_caller_who_leaves_takes_nobodys_answer_away(leases, source, clock):
    async def scenario():
        source.gate.clear()
        first, second = (asyncio.create_task(leases.issue(occasion(), clock.wall)) for _ in range(2))
        await settle()
        first.cancel()
        await settle()
        source.gate.set()
        assert token(await second) == "bot-SECRET-0"

    run(scenario)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(occasion(OTHER), id="another agent"),
        pytest.param(occasion(Agent("bot", "team", "primary", "a#", {}, spiffe="spiffe://a.example/bot")), id="another identity"),
        pytest.param(occasion(tool=Tool("wiki", "t", "rest", TOOL.endpoint, "t#", {})), id="another tool"),
        pytest.param(occasion(operation="tickets.list"), id="another operation, where the source narrows by it"),
        pytest.param(occasion(pins={"repo": ("web",)}), id="another pinned resource"),
        pytest.param(occasion(spec=CredentialSpec("kept", {"scopes": ["write"]})), id="other settings"),
        pytest.param(occasion(spec=CredentialSpec("kept", {"scopes": ["read"]}, basic="bot")), id="another place"),
    ],
)
def test_a_lease_is_not_shared_with(leases, clock, other):
    async def scenario():
        mine = await leases.issue(occasion(), clock.wall)
        assert leases.cached(other, clock.wall) is None
        assert token(await leases.issue(other, clock.wall)) != token(mine)

    run(scenario)


def test_a_catalog_that_says_the_same_again_keeps_the_lease(leases, clock):
    async def scenario():
        lease = await leases.issue(occasion(), clock.wall)
        again = occasion(spec=CredentialSpec("kept", {"scopes": ["read"]}))
        assert leases.cached(again, clock.wall) is lease

    run(scenario)


@pytest.mark.parametrize(
    ("life", "ttl", "max_ttl", "used"),
    [
        pytest.param(3600, None, 3600, 3570, id="the issuer's word, but for 30 s"),
        pytest.param(7200, None, 3600, 3570, id="the platform's bound, where the issuer gives longer"),
        pytest.param(7200, 600, 3600, 570, id="the entry's ttl, where it is the least"),
        pytest.param(None, 600, 3600, 570, id="the entry's ttl, where the issuer tells no end"),
        pytest.param(40, None, 3600, 20, id="half of a short life"),
        pytest.param(2, None, 3600, 1, id="half of a very short one"),
    ],
)
@pytest.mark.parametrize("off", [0, 3600, -3600], ids=["right clock", "clock an hour ahead", "clock an hour behind"])
def test_a_lease_is_used_until_shortly_before_its_end_and_not_longer(source, clock, leases, life, ttl, max_ttl, used, off):  # noqa: PLR0913, PLR0917
    async def scenario():
        clock.off, source.life = off, life
        asked = occasion(spec=CredentialSpec("kept", {"ttl": ttl}), max_ttl=max_ttl)
        lease = await leases.issue(asked, clock.wall)
        assert lease.expires == clock.wall + min(life or ttl, ttl or max_ttl, max_ttl)
        clock.steady = NOW + used - 0.01
        clock.off = -off  # somebody sets the wall clock meanwhile
        assert leases.cached(asked, clock.wall) is lease
        clock.steady = NOW + used
        source.gate.clear()
        assert leases.cached(asked, clock.wall) is None
        source.gate.set()

    run(scenario)


def test_time_that_the_answer_took_is_not_added_to_a_life(leases, source, clock):
    async def scenario():
        source.slow, source.life = 8, 10.0
        lease = await leases.issue(occasion(), clock.wall)
        source.gate.clear()
        assert leases.cached(occasion(), clock.wall) is lease
        clock.steady = NOW + 10
        assert leases.cached(occasion(), clock.wall) is None
        source.gate.set()

    run(scenario)


@pytest.mark.parametrize(("life", "slow"), [(0.0, 0), (-1.0, 0), (3.0, 4)], ids=["none left", "over", "over on its way"])
def test_a_credential_that_has_ended_is_not_used(leases, source, clock, life, slow):
    async def scenario():
        source.life, source.slow = life, slow
        with pytest.raises(CredentialUnavailable, match="has ended already"):
            await leases.issue(occasion(), clock.wall)

    run(scenario)


def test_another_is_fetched_ahead_while_the_old_one_serves(leases, source, clock):
    async def scenario():
        first = await leases.issue(occasion(), clock.wall)
        clock.steady = NOW + 3539.9
        leases.cached(occasion(), clock.wall)
        await settle()
        assert len(source.asked) == 1
        clock.steady = NOW + 3540
        source.gate.clear()
        assert all(leases.cached(occasion(), clock.wall) is first for _ in range(50))
        await settle()
        assert len(source.asked) == 2
        source.gate.set()
        await settle()
        assert token(leases.cached(occasion(), clock.wall)) == "bot-SECRET-1"

    run(scenario)


def test_a_short_lease_is_not_fetched_again_at_each_call(leases, source, clock):
    async def scenario():
        source.life = 20.0
        await leases.issue(occasion(), clock.wall)
        for _ in range(40):
            clock.steady += 0.1
            leases.cached(occasion(), clock.wall)
            await settle()
        assert len(source.asked) == 1

    run(scenario)


def test_a_refresh_that_fails_leaves_the_old_one_in_use_and_is_tried_once_a_second(leases, source, clock, caplog):
    async def scenario():
        first = await leases.issue(occasion(), clock.wall)
        source.fault = CredentialUnavailable("down", "wait")
        clock.steady = NOW + 3545
        for _ in range(20):
            assert leases.cached(occasion(), clock.wall) is first
            await settle()
            clock.steady += 0.1
        assert len(source.asked) == 3

    run(scenario)
    assert "could not be replaced in time: down; wait" in caplog.text


def test_after_a_failure_the_same_is_not_asked_for_a_second_and_others_are(leases, source, clock):
    async def scenario():
        source.fault = CredentialUnavailable("the issuer is down", "start it")
        with pytest.raises(CredentialUnavailable, match="the issuer is down; start it"):
            await leases.issue(occasion(), clock.wall)
        source.fault = None
        with pytest.raises(CredentialUnavailable, match="the issuer is down; start it"):
            leases.cached(occasion(), clock.wall)
        assert token(await leases.issue(occasion(OTHER), clock.wall)) == "other-SECRET-1"
        clock.steady += 1
        assert leases.cached(occasion(), clock.wall) is None
        assert token(await leases.issue(occasion(), clock.wall)) == "bot-SECRET-2"

    run(scenario)


def test_a_caller_waits_only_so_long_and_the_next_one_finds_the_answer(leases, source, clock, monkeypatch):
    monkeypatch.setattr(module, "WAIT_S", 0.05)

    async def scenario():
        source.gate.clear()
        with pytest.raises(CredentialUnavailable, match="has not answered within"):
            await asyncio.wait_for(leases.issue(occasion(), clock.wall), 1)
        source.gate.set()
        await settle()
        assert token(leases.cached(occasion(), clock.wall)) == "bot-SECRET-0"

    run(scenario)


def test_a_flight_has_an_end_too(leases, source, clock, monkeypatch):
    monkeypatch.setattr(module, "FLIGHT_S", 0.05)

    async def scenario():
        source.gate.clear()
        with pytest.raises(CredentialUnavailable, match="has not answered within"):
            await leases.issue(occasion(), clock.wall)
        source.gate.set()
        clock.steady += 1
        assert token(await leases.issue(occasion(), clock.wall)) == "bot-SECRET-1"

    run(scenario)


def test_a_slow_issuer_holds_up_no_other_agent(leases, source, clock):
    async def scenario():
        source.gate.clear()
        slow = asyncio.create_task(leases.issue(occasion(), clock.wall))
        await settle()
        source.gate = asyncio.Event()
        source.gate.set()
        assert token(await asyncio.wait_for(leases.issue(occasion(OTHER), clock.wall), 0.5)).startswith("other")
        slow.cancel()
        for task in asyncio.all_tasks() - {asyncio.current_task(), slow}:
            task.cancel()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

    run(scenario)


def test_a_fault_of_the_source_is_told_without_what_it_holds(leases, source, clock, caplog):
    async def scenario():
        source.fault = ValueError("at-SECRET")
        with pytest.raises(CredentialUnavailable, match=r"the issuer kept failed \(ValueError\)") as caught:
            await leases.issue(occasion(), clock.wall)
        assert "SECRET" not in "".join(traceback.format_exception(caught.value))

    run(scenario)
    assert "ValueError in" in caplog.text
    assert "SECRET" not in caplog.text


def test_the_bound_drops_the_least_recently_used_and_takes_it_back(source, clock, box):
    async def scenario():
        small = Leases(source, box.put, clock, bound=3)
        agents = [Agent(f"bot-{number}", "team", "primary", "a#", {}) for number in range(4)]
        for agent in agents[:3]:
            await small.issue(occasion(agent), clock.wall)
        assert small.cached(occasion(agents[0]), clock.wall)
        await small.issue(occasion(agents[3]), clock.wall)
        assert [bool(small.cached(occasion(agent), clock.wall)) for agent in agents] == [True, False, True, True]
        await box.attempt({"kept": source})
        assert source.revoked == ["bot-1-SECRET-1"]

    run(scenario)


def test_an_agent_that_asks_for_ever_more_leases_loses_its_own_and_nobody_elses(source, clock, box):
    async def scenario():
        small = Leases(source, box.put, clock, bound=3)
        await small.issue(occasion(OTHER), clock.wall)
        for number in range(9):
            await small.issue(occasion(operation=f"op-{number}"), clock.wall)
        assert small.cached(occasion(OTHER), clock.wall)
        await box.attempt({"kept": source})
        assert not any("other" in each for each in source.revoked)

    run(scenario)


def test_dropping_an_agent_takes_all_its_leases_back_and_nobody_elses(leases, source, clock, box):
    async def scenario():
        await leases.issue(occasion(), clock.wall)
        await leases.issue(occasion(operation="tickets.list"), clock.wall)
        others = await leases.issue(occasion(OTHER), clock.wall)
        leases.drop("bot")
        assert leases.cached(occasion(), clock.wall) is None
        assert leases.cached(occasion(OTHER), clock.wall) is others
        await box.attempt({"kept": source})
        assert sorted(source.revoked) == ["bot-SECRET-0", "bot-SECRET-1"]
        assert len(box) == 0

    run(scenario)


def test_what_is_on_its_way_when_its_agent_is_dropped_is_used_by_nobody_and_taken_back(leases, source, clock, box):
    async def scenario():
        source.gate.clear()
        caller = asyncio.create_task(leases.issue(occasion(), clock.wall))
        await settle()
        leases.drop("bot")
        source.gate.set()
        with pytest.raises(CredentialUnavailable, match="were dropped"):
            await caller
        assert leases.cached(occasion(), clock.wall) is None
        await box.attempt({"kept": source})
        assert source.revoked == ["bot-SECRET-0"]

    run(scenario)


@pytest.mark.parametrize("life", [7200.0, None], ids=["longer", "without an end"])
def test_what_the_issuer_lets_live_longer_than_the_platform_is_taken_back_at_the_platforms_end(leases, source, clock, box, life):
    async def scenario():
        source.life = life
        await leases.issue(occasion(), clock.wall)
        clock.steady = NOW + 3599
        await box.attempt({"kept": source})
        assert source.revoked == []
        clock.steady = NOW + 3600
        await box.attempt({"kept": source})
        assert source.revoked == ["bot-SECRET-0"]

    run(scenario)


def test_what_was_to_be_taken_back_later_is_taken_back_now_when_its_agent_is_dropped(leases, source, clock, box):
    async def scenario():
        source.life = 7200.0
        await leases.issue(occasion(), clock.wall)
        leases.drop("bot")
        await box.attempt({"kept": source})
        assert (source.revoked, len(box)) == (["bot-SECRET-0"], 0)

    run(scenario)


def test_a_lease_without_a_handle_is_only_forgotten(leases, source, clock, box):
    async def scenario():
        source.handles = False
        await leases.issue(occasion(), clock.wall)
        leases.drop("bot")
        assert (len(box), leases.cached(occasion(), clock.wall)) == (0, None)

    run(scenario)


def test_the_outbox_is_sealed_on_disk_and_a_restart_finds_it(tmp_path, leases, source, clock, box):
    async def scenario():
        await leases.issue(occasion(), clock.wall)
        leases.drop("bot")
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert len(files) == 2
        for path in files:
            assert b"SECRET" not in path.read_bytes()
            assert path.stat().st_mode & 0o077 == 0
        clock.off = 3600
        again = Outbox(tmp_path / "outbox", fernet(tmp_path / "outbox.key"), clock)
        await again.attempt({"kept": source})
        assert source.revoked == ["bot-SECRET-0"]
        assert list((tmp_path / "outbox").iterdir()) == []

    run(scenario)


def test_taking_back_is_tried_again_after_pauses_that_double_until_it_works(leases, source, clock, box, caplog):
    async def scenario():
        await leases.issue(occasion(), clock.wall)
        leases.drop("bot")
        source.fault = CredentialUnavailable("down", "wait")
        tried = []
        for _ in range(40):
            before = caplog.text.count("is not taken back yet")
            await box.attempt({"kept": source})
            tried += [clock.steady - NOW] if caplog.text.count("is not taken back yet") > before else []
            clock.steady += 0.5
        assert tried == [0, 1, 3, 7, 15]
        source.fault = None
        clock.steady += 30
        await box.attempt({"kept": source})
        assert source.revoked == ["bot-SECRET-0"]

    run(scenario)
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize("ends", [(3600.0, 7200), (None, 8 * 86_400)], ids=["with an end", "without"])
def test_a_credential_that_ended_by_itself_is_no_longer_tried(leases, source, clock, box, ends):
    async def scenario():
        source.life, after = ends
        await leases.issue(occasion(), clock.wall)
        leases.drop("bot")
        clock.steady = NOW + after
        await box.attempt({"kept": source})
        assert (source.revoked, len(box)) == ([], 0)

    run(scenario)


def test_the_background_takes_back_as_soon_as_something_is_put(leases, source, clock, box):
    async def scenario():
        background = asyncio.create_task(box.run({"kept": source}))
        await settle()
        await leases.issue(occasion(), clock.wall)
        leases.drop("bot")
        async with asyncio.timeout(2):
            await source.took_back.wait()
        assert source.revoked == ["bot-SECRET-0"]
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)

    run(scenario)


def test_a_fault_while_taking_back_is_told_without_the_credential_and_tried_again(leases, source, clock, box, caplog):
    async def scenario():
        await leases.issue(occasion(), clock.wall)
        leases.drop("bot")
        source.fault = ValueError("bot-SECRET-0")
        await box.attempt({"kept": source})
        assert len(box) == 1

    run(scenario)
    assert "at fault while it takes back: ValueError" in caplog.text
    assert "SECRET" not in caplog.text


def test_an_outbox_has_a_bound_and_gives_up_what_ends_first(tmp_path, source, clock, caplog, monkeypatch):
    monkeypatch.setattr("broker.credentials.outbox._MAX", 3)
    box = Outbox(tmp_path / "outbox", Fernet(Fernet.generate_key()), clock)

    async def scenario():
        leases = Leases(source, box.put, clock)
        for life in (100.0, 50.0, 300.0, 200.0):
            source.life = life
            await leases.issue(occasion(operation=f"o{life}"), clock.wall)
        leases.drop("bot")
        await box.attempt({"kept": source})

    run(scenario)
    assert sorted(source.revoked) == ["bot-SECRET-0", "bot-SECRET-2", "bot-SECRET-3"]
    assert "1 credential will not be taken back" in caplog.text


def test_an_outbox_of_another_key_is_told_and_not_believed(tmp_path, clock, caplog):
    (tmp_path / "outbox").mkdir()
    (tmp_path / "outbox" / "00").write_bytes(Fernet(Fernet.generate_key()).encrypt(b"[]"))
    assert len(Outbox(tmp_path / "outbox", fernet(tmp_path / "key"), clock)) == 0
    assert "what was to be taken back is not" in caplog.text


def test_what_belongs_to_an_issuer_that_is_gone_waits(tmp_path, leases, source, clock, box):
    async def scenario():
        await leases.issue(occasion(), clock.wall)
        leases.drop("bot")
        await box.attempt({})
        assert len(box) == 1

    run(scenario)
