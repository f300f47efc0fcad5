"""`broker agents` as a person reads it: the broker's documents in, aligned columns out."""

import asyncio
import time

import pytest
import stack

from broker.admin import agents as told
from broker.audit import chain
from broker.cli import agents
from broker.cli.main import _run
from broker.containment.standing import Restriction, Standing
from broker.keys import ed25519
from broker.ledger.base import LedgerUnavailable, Spend
from broker.ledger.memory import MemoryLedger
from broker.policy.containment import Action
from broker.policy.limits import Limit, Measure
from broker.policy.snapshot import Agent, Grant
from broker.state import State

DAY = 86_400
NOON = 1_700_000_000 // DAY * DAY + DAY / 2
LIMITS = (
    Limit("rate", "agent/bot", 10, "bot.yaml#/rate", per=1, burst=30),
    Limit("concurrency", "agent/bot", 8, "bot.yaml#/concurrency"),
    Limit("bytes_out", "agent/bot", 50 << 20, "bot.yaml#/bytes_out", per=DAY),
    Limit("tokens", "agent/bot", 2_000_000, "bot.yaml#/tokens", per=DAY),
    Limit("usd", "team/web", 50_000_000_000, "platform.yaml#/usd", per=DAY),
    Limit("time_per_run", "agent/bot", 1800, "bot.yaml#/time_per_run"),
)
BOT = Agent(
    "bot", "team-web", "web-primary", "bot.yaml#", {"api": {"get": Grant("r"), "list": Grant("r")}, "wiki": {}},
    token=True, spiffe="spiffe://acme.example/bot", limits=LIMITS,
)  # fmt: skip


def spent():
    ledger = MemoryLedger()
    amounts = {Measure.CALLS: 1, Measure.BYTES_OUT: 3 << 20, Measure.TOKENS: 1234, Measure.USD: 12_300_000}
    ledger.reserve(Spend("d1", "bot", LIMITS, amounts, run=""), NOON)
    return ledger


def document(ledger=None, agent=BOT, standing=None):
    return asyncio.run(told.shown(agent, ledger or spent(), standing or Standing(), NOON))


@pytest.fixture
def in_utc(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_an_agent_is_told_with_its_owner_its_tools_and_each_limit(in_utc):
    lines = "\n".join(agents.described(document())).splitlines()
    plain = [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in lines]
    assert plain == [
        "agent     bot",
        "owner     team-web, on call web-primary",
        "identity  spiffe spiffe://acme.example/bot, token",
        "tools     api: get, list",
        "          wiki: no operations",
        "",
        "LIMIT                  SCOPE      SPENT       LEFT       RENEWS",
        "rate: 10/s             agent/bot  1           29         2023-11-14 12:00, in 0:00:01",
        "concurrency: 8         agent/bot  1           7",
        "bytes_out: 50MiB/day   agent/bot  3.0 MiB     47.0 MiB   2023-11-15 00:00, in 12:00:00",
        "tokens: 2,000,000/day  agent/bot  1,234       1,998,766  2023-11-15 00:00, in 12:00:00",
        "usd: 50 USD/day        team/web   0.0123 USD  49.99 USD  2023-11-15 00:00, in 12:00:00",
        "time_per_run: 1800 s   agent/bot  per run",
    ]


def test_an_agent_without_tools_and_limits_says_so():
    found = document(agent=Agent("bot", "team-web", "primary", "bot.yaml#", {}, namespace="bots"))
    assert list(agents.described(found))[2:] == ["identity  namespace bots", "tools     none", "limits    none"]


def test_json_has_the_numbers_with_their_unit_dollars_in_dollars():
    limits = {limit["limit"]: limit for limit in document()["limits"]}
    assert limits["usd"] == {
        "limit": "usd", "written": "usd: 50 USD/day", "scope": "team/web", "rule": "platform.yaml#/usd", "unit": "usd",
        "amount": 50, "spent": 0.0123, "left": 49.9877, "renews": "2023-11-15T00:00:00.000000Z", "renews_in": 43_200,
        "per_run": False,
    }  # fmt: skip
    assert {name: limit["unit"] for name, limit in limits.items()} == {
        "rate": "calls", "concurrency": "calls", "bytes_out": "bytes", "tokens": "tokens", "usd": "usd",
        "time_per_run": "seconds",
    }  # fmt: skip


def test_a_ledger_that_is_away_leaves_who_the_agent_is_and_what_is_written():
    class Away(MemoryLedger):
        async def balances(self, *_):
            raise LedgerUnavailable("Redis does not answer", "start it")

    found = document(Away())
    assert (found["agent"]["owner"], found["unavailable"]) == ("team-web", "Redis does not answer; start it")
    rows = [agents._limit(limit) for limit in found["limits"]]
    assert rows[3] == ("tokens: 2,000,000/day", "agent/bot", "-", "-", "")


def test_amounts_that_went_over_leave_nothing_never_less():
    limit = Limit("tokens", "agent/bot", 1000, "", per=DAY)
    agent = Agent("bot", "t", "p", "bot.yaml#", {}, limits=(limit,))
    ledger = MemoryLedger()
    ledger.take(Spend("d1", "bot", (limit,), {Measure.TOKENS: 1500}), NOON)
    assert [(each["spent"], each["left"]) for each in document(ledger, agent)["limits"]] == [(1500, 0)]


@pytest.mark.parametrize(
    ("amount", "unit", "said"),
    [
        pytest.param(None, "tokens", "-", id="not known"),
        pytest.param(0, "bytes", "0 B", id="no bytes"),
        pytest.param(1023, "bytes", "1,023 B", id="a few bytes"),
        pytest.param(1536, "bytes", "1.5 KiB", id="kibibytes"),
        pytest.param(5 << 50, "bytes", "5,120.0 TiB", id="more than there are words for"),
        pytest.param(0, "usd", "0.00 USD", id="no dollars"),
        pytest.param(0.0123, "usd", "0.0123 USD", id="cents"),
        pytest.param(1234.5, "usd", "1,234.50 USD", id="dollars"),
    ],
)
def test_an_amount_is_told_for_people(amount, unit, said):
    assert agents.amount(amount, unit) == said


@pytest.mark.parametrize(
    ("amount", "written"),
    [
        pytest.param(50 << 20, "bytes_out: 50MiB/day", id="a round number, as it was written"),
        pytest.param(3 << 30, "bytes_out: 3GiB/day", id="in its largest unit"),
        pytest.param(1025, "bytes_out: 1,025/day", id="else every digit"),
        pytest.param(0, "bytes_out: 0/day", id="nothing"),
    ],
)
def test_a_limit_on_bytes_is_written_as_manifests_write_it(amount, written):
    assert Limit("bytes_out", "agent/bot", amount, "", per=DAY).written == written


def test_what_holds_for_an_agent_is_told_with_its_reason_in_visible_characters(in_utc):
    standing = Standing()
    standing.restrict(Restriction("r-1", Action.REVOKE_RUN, "bot", "run-7", "loops\x1b[2J", "jo", NOON))
    standing.restrict(Restriction("r-2", Action.READ_ONLY, "bot", None, "odd", "detector probing", NOON))
    lines = "\n".join(agents.described(document(standing=standing)))
    assert "standing  revoke_run run-7: loops\\x1b[2J (by jo)" in lines
    assert "standing  read_only: odd (by detector probing)" in lines


@pytest.fixture
def stopped(tmp_path):
    """The state of a broker that does not run."""
    state = State.at(tmp_path / "state")
    ed25519(state.keys / "tokens.key")
    return state


def revoked(state, manifests, *who):
    code = _run(["agents", "revoke", *who, "--reason", "drill", "--state", str(state.root), "--manifests", str(manifests)])
    return code, [notice["notice"]["agent"] for notice in chain.notices(state.audit)]


def test_without_a_broker_a_name_that_no_manifest_has_is_revoked_with_a_warning(stopped, tmp_path, capsys):
    manifests = stack.write_manifests(tmp_path / "manifests", stack.agent("bot", {}))
    later = "no broker runs on this state: it holds from the next start\n"
    assert revoked(stopped, manifests, "bto") == (0, ["bto"])
    assert capsys.readouterr().err == f"warning: no manifest in {manifests} names an agent 'bto'; is it spelled so?\n{later}"
    assert revoked(stopped, manifests, "bot") == (0, ["bto", "bot"])
    assert capsys.readouterr() == ("bot is revoked\n", later)
    assert revoked(stopped, manifests, "--all") == (0, ["bto", "bot", "*"])


@pytest.mark.parametrize("text", [None, "kind: ["], ids=["no folder", "errors"])
def test_without_a_broker_and_its_manifests_it_is_said_that_the_name_was_not_checked(stopped, tmp_path, capsys, text):
    if text:
        stack.write_manifests(tmp_path / "manifests")
        (tmp_path / "manifests" / "a.yaml").write_text(text)
    assert revoked(stopped, tmp_path / "manifests", "bot") == (0, ["bot"])
    assert "whether one names 'bot' was not checked\n" in capsys.readouterr().err
