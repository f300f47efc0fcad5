"""What the record says was spent is what was spent: a live ledger and one rebuilt from the live one's records agree."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.audit.record import Attempt, Ending, args_hash, canonical, decision_record, outcome_record
from broker.ledger.base import Granted, Refused, Spend
from broker.ledger.memory import MemoryLedger
from broker.ledger.spending import refused, replay, reserved
from broker.manifest.load import load_texts
from broker.policy.limits import NANO, Limit, Measure, called, used
from broker.policy.snapshot import PolicySnapshot
from broker.policy.types import ALLOW, Usage

NOW = 1_700_000_000.0
MODEL = {"model": "m", "provider": "p", "prompt_hash": "sha256:0"}
OPERATIONS = {"get": ("GET", "read"), "put": ("PUT", "write"), "drop": ("DELETE", "destructive")}
EVERY = {
    "rate": "30/min", "concurrency": 9, "calls": "40/h", "writes": "20/min", "destructive": "9/day", "bytes_out": "9k/min",
    "tokens": "5k/h", "input_tokens": "3k/h", "output_tokens": "3k/h", "cached_tokens": "3k/h", "usd": "4/min", "runs": "5/h",
    "steps_per_run": 12, "identical_per_run": 4, "time_per_run": "30m", "tokens_per_run": "2k", "usd_per_run": 3,
}  # fmt: skip
CEILINGS = {word: EVERY[word] for word in ("rate", "concurrency", "calls", "writes", "bytes_out", "tokens", "usd")}
SIZES = {**EVERY, "bytes_out": "9000/min"}


def _document(kind: str, name: str, owner: str = "team", **spec: Any) -> bytes:
    metadata = {"name": name, "owner": owner, **({"oncall": "team"} if kind == "Agent" else {})}
    return json.dumps({"apiVersion": "broker/v1", "kind": kind, "metadata": metadata, "spec": spec}).encode()


def snapshot(*, granted: Any = OPERATIONS, agents: Any = ("one", "two"), limits: Any = SIZES) -> PolicySnapshot:
    """A tool with three operations, and agents of one team that are limited everywhere by everything."""
    operations = {
        name: {"match": {"method": method, "path": "/"}, "effect": effect} for name, (method, effect) in OPERATIONS.items()
    }
    ceilings = {**CEILINGS, "bytes_out": "9000/min"}
    tools = {"t": {"operations": {name: {"limits": limits} for name in granted}, "limits": limits}}
    texts = {
        "t.yaml": _document("Tool", "t", protocol="rest", endpoint="https://t.example", operations=operations),
        "p.yaml": _document("Platform", "p", teams={"team": {"ceilings": ceilings}}, environment="e", ceilings=ceilings),
        **{f"{name}.yaml": _document("Agent", name, identity={"token": True}, tools=tools, limits=limits) for name in agents},
    }
    loaded = load_texts(texts, Path())
    assert loaded.snapshot is not None, loaded.findings
    return loaded.snapshot


SNAPSHOT = snapshot()


def with_models(of: PolicySnapshot) -> PolicySnapshot:
    """The same, as if the tool spoke a model provider's protocol: all limits bear on its calls."""
    agents = {}
    for name, agent in of.agents.items():
        grants = {}
        for operation, grant in agent.tools["t"].items():
            effect = of.tools["t"].operations[operation].effect
            ours = [f"agent/{name}/t/{operation}", f"agent/{name}/t", f"agent/{name}", "team/team", "environment/e"]
            on = [limit for scope in ours for limit in agent.limits if limit.scope == scope]
            grants[operation] = replace(grant, limits=tuple(limit for limit in on if limit.bears_on(effect, model=True)))
        agents[name] = replace(agent, tools={"t": grants})
    return replace(of, agents=agents)


class Live:
    """A ledger at work, and the records that it leaves, as the log gives them back."""

    def __init__(self, of: PolicySnapshot = SNAPSHOT) -> None:
        self.snapshot, self.ledger, self.records, self.now = of, MemoryLedger(), [], NOW
        self._open: list[tuple[Attempt, Usage | None]] = []

    def call(  # noqa: PLR0913, PLR0917 - a call has as many parts
        self, agent: str = "one", operation: str = "get", run: str = "", text: str = "", size: int = 5, most: int = 0
    ) -> Granted | Refused:
        """Reserve, and record it where it was granted. `most` makes it a model call that may use that many tokens each way."""
        params = {"query": {"q": text}}
        grant = self.snapshot.agents[agent].tools["t"][operation]
        effect = self.snapshot.tools["t"].operations[operation].effect
        amounts = called(size)
        if most:
            spent = used(Usage(most, most), None)
            amounts |= {**spent, Measure.CACHED_TOKENS: most, Measure.USD: most * 1_234_567}
        attempt = Attempt(
            f"d{len(self.records)}", "r", self.snapshot.agents[agent].described, tool="t", operation=operation, effect=effect,
            params=params, args_hash=args_hash(params), run_id=run, **(MODEL if most else {}),
        )  # fmt: skip
        wanted = Spend(attempt.decision_id, agent, grant.limits, amounts, run, f"t/{operation}/{attempt.args_hash}")
        answer = self.ledger.reserve(wanted, self.now)
        if isinstance(answer, Granted):
            attempt.step, attempt.limits = answer.step, reserved(amounts, degraded=False)
            self._write(decision_record(self.now, 0, attempt, ALLOW))
            self._open.append((attempt, Usage(most // 2, most // 3, most // 4) if most else None))
        return answer

    def end(self, which: int) -> None:
        """One of the open calls ends, having used less than it might."""
        if self._open:
            attempt, usage = self._open.pop(which % len(self._open))
            dollars = (usage.input + usage.output) * 987_654 if usage else 0
            self._write(outcome_record(self.now, 0, attempt, Ending(200, usage=usage, usd=dollars / NANO if usage else None)))
            spent = {**used(usage, None), Measure.USD: dollars} if usage else {}
            self.ledger.settle(attempt.decision_id, spent, self.now)

    def _write(self, record: Mapping[str, Any]) -> None:
        self.records.append(json.loads(canonical(dict(record))))


def rebuilt(live: Live, of: PolicySnapshot | None = None) -> MemoryLedger:
    ledger = MemoryLedger()
    replay(ledger, live.records, of or live.snapshot)
    return ledger


def counters(ledger: MemoryLedger) -> Any:
    """All that is counted; moments to the millisecond, as the record has them to the microsecond."""
    runs = {
        key: (round(run.started, 3), round(run.last, 3), run.steps, {name: n for name, n in run.counts.items() if n})
        for key, run in ledger.runs.items()
    }
    return ledger.windows, {key: round(at, 3) for key, at in ledger.full_at.items()}, runs


_CALL = st.tuples(
    st.sampled_from(["one", "two"]), st.sampled_from(list(OPERATIONS)), st.sampled_from(["", "r1", "r2", "r3"]),
    st.sampled_from(["x", "y"]), st.integers(0, 2000), st.sampled_from([0, 0, 1, 7, 300]),
)  # fmt: skip
_SCRIPT = st.lists(
    st.one_of(_CALL, st.integers(0, 9), st.sampled_from([0.25, 3.0, 59.5, 700.0, 3600.0])), min_size=1, max_size=40
)


@settings(max_examples=200, deadline=None)
@given(_SCRIPT)
def test_a_ledger_rebuilt_from_the_records_of_another_counts_the_same(script):
    live = Live(with_models(SNAPSHOT))
    for step in script:
        if isinstance(step, tuple):
            live.call(*step)
        elif isinstance(step, float):
            live.now += step
        else:
            live.end(step)
    found = rebuilt(live)
    assert counters(found) == counters(live.ledger)
    assert (found.open, found.grants) == ({}, {})


def test_a_call_with_a_decision_and_no_outcome_has_spent_all_that_it_reserved():
    live = Live(with_models(SNAPSHOT))
    live.call(most=300)
    live.call(most=100)
    live.end(1)
    windows = rebuilt(live).windows
    spent = {limit.measure: windows[limit.key][1] for limit in _windows("agent/one") if limit.key in windows}
    assert spent[Measure.TOKENS] == 600 + 50 + 33
    assert spent[Measure.USD] == 300 * 1_234_567 + 83 * 987_654
    assert spent[Measure.CALLS] == 2


def _windows(scope: str) -> list[Limit]:
    return [limit for limit in SNAPSHOT.agents["one"].limits if limit.scope == scope and limit.kind == "window"]


@pytest.mark.parametrize(
    "now",
    [
        pytest.param(snapshot(granted=["get"]), id="the operation is not the agent's any more"),
        pytest.param(replace(SNAPSHOT, tools={}), id="the tool is gone"),
    ],
)
def test_a_call_that_could_not_be_made_any_more_was_made_all_the_same(now):
    live = Live()
    for _ in range(3):
        live.call(operation="put")
    found = rebuilt(live, now)
    for scope in ("agent/one", "team/team", "environment/e"):
        assert [found.windows[f"{scope}:{measure}:window:{per}"][1] for measure, per in (("calls", 3600), ("writes", 60))] == [
            3,
            3,
        ]


def test_the_team_pays_for_an_agent_that_is_gone():
    live = Live()
    for _ in range(3):
        live.call("two")
    assert rebuilt(live, snapshot(agents=["one"])).windows["team/team:calls:window:3600"][1] == 3


def test_a_limit_counts_by_the_amount_that_is_in_force_now():
    live = Live()
    for _ in range(3):
        live.call()
    ledger = rebuilt(live, snapshot(limits={"calls": "3/h"}))
    grant = snapshot(limits={"calls": "3/h"}).agents["one"].tools["t"]["get"]
    answer = ledger.reserve(Spend("next", "one", grant.limits, called(5), "", "f"), NOW)
    assert isinstance(answer, Refused)
    assert (answer.limit.amount, answer.spent) == (3, 3)


def test_denials_and_other_records_spend_nothing():
    live = Live()
    live.call()
    [allow] = live.records
    others = [{**allow, "verdict": "deny"}, {**allow, "event": "config"}, {**allow, "event": "revocation"}]
    ledger = MemoryLedger()
    replay(ledger, others, SNAPSHOT)
    assert counters(ledger) == ({}, {}, {})


def test_a_protocols_own_traffic_is_counted_by_rates_and_bytes_alone_and_is_no_step():
    live = Live()
    live.call()
    [allow] = live.records
    ledger = MemoryLedger()
    replay(ledger, [{**allow, "effect": None, "operation": "initialize"}], SNAPSHOT)
    assert {key.split(":")[1] for key in ledger.windows} == {"bytes_out"}
    assert set(ledger.full_at) == {
        f"{scope}:calls:rate:60" for scope in ("agent/one/t", "agent/one", "team/team", "environment/e")
    }
    assert ledger.runs == {}


def test_records_from_before_there_were_limits_are_calls_too():
    live = Live()
    live.call()
    [allow] = live.records
    ledger = MemoryLedger()
    replay(ledger, [{**allow, "limits": None}], SNAPSHOT)
    assert ledger.windows["agent/one:calls:window:3600"][1] == 1
    assert "agent/one:bytes_out:window:60" not in ledger.windows


def test_what_is_recorded_says_what_only_the_call_can_tell():
    amounts = {**called(7), Measure.TOKENS: 20, Measure.USD: 1_500_000_000}
    assert reserved(amounts, degraded=False) == {"reserved": {"bytes_out": 7, "tokens": 20, "usd": 1.5}}
    assert reserved(called(0), degraded=True) == {"reserved": {"bytes_out": 0}, "degraded": True}


def test_a_refusal_is_recorded_with_the_limit_and_its_numbers_in_the_limits_unit():
    calls = Limit("calls", "agent/a", 3, "a.yaml#/spec/limits/calls", 3600)
    assert refused(Refused(calls, 3, 1, 12.34567)) == {
        "refused": {"limit": "calls", "scope": "agent/a", "amount": 3, "spent": 3, "needed": 1, "retry_after": 12.346}
    }
    dollars = refused(Refused(Limit("usd", "team/t", 2 * NANO, "p.yaml#", 86400), NANO, NANO // 4, 1))["refused"]
    assert (dollars["amount"], dollars["spent"], dollars["needed"]) == (2.0, 1.0, 0.25)
