"""What is the embedded ledger's own, beside what `tests/contract` asks of both: how much it keeps."""

from broker.ledger.base import Refused, Spend
from broker.ledger.memory import COUNTS_KEPT, RUNS_KEPT, MemoryLedger
from broker.policy.limits import Limit, called

NOW = 1_800_000_000.0
LIMITS = (Limit("steps_per_run", "agent/a", 2, "a.yaml#"),)


def _call(ledger: MemoryLedger, number: int, run: str, agent: str = "a") -> int:
    answer = ledger.reserve(Spend(f"{agent}{number}", agent, LIMITS, called(1), run, "f"), NOW + number / 100)
    ledger.settle(f"{agent}{number}", {}, NOW + number / 100)
    return getattr(answer, "step", 0)


def test_an_agent_that_names_a_new_run_with_each_call_fills_no_memory_and_takes_no_run_of_others():
    ledger = MemoryLedger()
    for number in range(3):
        _call(ledger, number, f"theirs-{number}", "b")
    for number in range(RUNS_KEPT + 500):
        _call(ledger, number, f"r{number}")
    ledger.renew(NOW + 200)
    assert len(ledger.runs) == RUNS_KEPT + 3
    assert ("a", "r499") not in ledger.runs
    assert _call(ledger, 20_000, f"r{RUNS_KEPT + 499}") == 2
    assert [_call(ledger, 30_000 + number, f"theirs-{number}", "b") for number in range(3)] == [2, 2, 2]


def test_a_run_of_ever_new_calls_fills_no_memory_and_forgets_nothing_that_it_spent():
    ledger = MemoryLedger()
    limits = (Limit("steps_per_run", "agent/a", 20_000, "a.yaml#"), Limit("identical_per_run", "agent/a", 1, "a.yaml#"))
    ledger.reserve(Spend("first", "a", limits, called(1), "r", "first"), NOW)
    for number in range(COUNTS_KEPT + 5_000):
        ledger.reserve(Spend(f"{number}", "a", limits, called(1), "r", f"f{number}"), NOW)
        ledger.settle(f"{number}", {}, NOW)
    ledger.refund("first", NOW)
    counts = ledger.runs["a", "r"].counts
    assert len(counts) <= COUNTS_KEPT
    assert counts[limits[0].key] == COUNTS_KEPT + 5_000
    assert isinstance(ledger.reserve(Spend("again", "a", limits, called(1), "r", f"f{COUNTS_KEPT + 4_999}"), NOW), Refused)


def test_what_ended_long_ago_is_forgotten():
    ledger = MemoryLedger()
    ledger.reserve(Spend("open", "a", LIMITS, called(1), "r", "f"), NOW)
    ledger.renew(NOW + 7000)
    assert list(ledger.grants) == ["open"]
    ledger.renew(NOW + 86_400)
    assert (ledger.grants, ledger.runs) == ({}, {})
