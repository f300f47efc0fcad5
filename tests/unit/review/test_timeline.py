"""A run as a timeline: each call with how it ended, and what was done about the run in between."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.audit.record import Attempt, Ending, alert_record, decision_record, notice_record, outcome_record
from broker.policy.types import ALLOW, Code, Usage, deny
from broker.review.timeline import runs, told

NOW = 1_700_000_000.0
CALL = {"tool": "wiki", "operation": "search", "run_id": "r1"}


def call(number, agent="bot", **known):
    return Attempt(f"d-{number}", "", {"name": agent}, **{**CALL, "step": number, **known})


def decided(after, attempt, decision=ALLOW):
    return decision_record(NOW + after, 1, attempt, decision)


def ended(after, attempt, **how):
    return outcome_record(NOW + after, 1, attempt, Ending(**how))


DENIED = deny(Code.OPERATION_NOT_DECLARED, "no")


def test_a_run_is_told_call_by_call_with_what_came_between():
    agent = {"name": "bot"}
    records = [
        decided(0, call(1)),
        decided(0.25, call(2)),
        ended(0.5, call(2), status=500, size=1, duration_ms=250.4, code="response_blocked", usage=Usage(1200, 30, 100), usd=0.25),
        ended(0.75, call(1), status=200, size=1234, duration_ms=750, usage=Usage(300, 10), usd=0.0123),
        alert_record(NOW + 1, 1, "bot: probing", {"agent": agent, "kind": "probing", "run_id": "r1"}, ["d-2"]),
        decided(2, call(0, operation="GET /x/1"), DENIED),
        decided(2.5, call(0, tool="", operation="", host="evil.example"), DENIED),
        notice_record("revocation", NOW + 3, 1, agent, "revoke_run 'r1' by jo: x", {"run_id": "r1"}),
        decided(4, call(3)),
        ended(5, call(9), status=204),
    ]
    (run,) = runs(records, "r1")
    assert list(told(run)) == [
        "agent   bot",
        "run     r1",
        "began   2023-11-14T22:13:20.000000Z, took 5.000 s",
        "calls   5, 2 denied",
        "used    1,500 input, 40 output, 100 cached tokens, 0.2623 USD",
        "    +0.000 s    1  allow       wiki/search  → 200, 750 ms, 1234 bytes  d-1",
        "    +0.250 s    2  allow       wiki/search  → 500 response_blocked, 250 ms, 1 byte  d-2",
        "    +1.000 s       alert  probing  bot: probing",
        "    +2.000 s    -  deny        operation_not_declared  wiki GET /x/1  d-0",
        "    +2.500 s    -  deny        operation_not_declared  evil.example  d-0",
        "    +3.000 s       revocation  revoke_run 'r1' by jo: x",
        "    +4.000 s    3  allow       wiki/search  → no end in the record  d-3",
        "    +5.000 s       outcome",
    ]


def test_a_call_that_nobody_answered_says_so():
    (run,) = runs([decided(0, call(1)), ended(1, call(1), detail="connection refused")], "r1")
    assert list(told(run))[-1] == "    +0.000 s    1  allow       wiki/search  → no answer, 0 ms, 0 bytes  d-1"


def test_two_agents_with_one_run_id_have_two_runs():
    found = runs([decided(0, call(1, "a")), decided(1, call(2, "b")), decided(2, call(3, "a"))], "r1")
    assert [(run.agent, run.document["calls"], run.document["took_s"]) for run in found] == [("a", 2, 2.0), ("b", 1, 0.0)]


def test_the_document_has_the_records_of_calls_with_their_outcomes():
    records = [decided(0, call(1)), ended(0.5, call(1), status=200, usage=Usage(3, 2, 1), usd=0.5), decided(1, call(2), DENIED)]
    (run,) = runs(records, "r1")
    assert run.document == {
        "agent": "bot",
        "run_id": "r1",
        "began": "2023-11-14T22:13:20.000000Z",
        "took_s": 1.0,
        "calls": 2,
        "denied": 1,
        "tokens": {"input": 3, "output": 2, "cached": 1},
        "usd": 0.5,
        "entries": [{**records[0], "outcome": records[1]}, {**records[2], "outcome": None}],
    }


def test_without_calls_of_models_nothing_is_said_of_tokens():
    (run,) = runs([decided(0, call(1))], "r1")
    assert (run.document["tokens"], run.document["usd"]) == ({}, None)
    assert not any(line.startswith("used") for line in told(run))


@pytest.mark.parametrize(
    "spoiled",
    [{"agent": "x"}, {"tokens": [1]}, {"tokens": {"input": "x"}}, {"upstream": {"status": []}}, {"usd": "x"}],
    ids=lambda spoiled: next(iter(spoiled)),
)
def test_a_record_that_somebody_spoiled_is_left_out(spoiled):
    assert runs([{**ended(0, call(1)), **spoiled}], "r1") == []


WHOLE = [
    decided(0, call(1)),
    {**ended(1, call(1), usage=Usage(1, 2), usd=0.5)},
    alert_record(NOW, 1, "x", {"kind": "probing"}, ["d-1"]),
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.sampled_from(["name", "input", "status", "bytes"]), inner, max_size=3)
    ),
)


@given(
    spoiled=st.dictionaries(st.sampled_from(sorted({name for record in WHOLE for name in record} - {"time"})), anything),
    which=st.integers(0, 2),
)
def test_whatever_stands_where_something_else_belongs_a_run_can_be_told(spoiled, which):
    records = [{**record, **spoiled} if number == which else record for number, record in enumerate(WHOLE)]
    for run in runs(records, "r1"):
        assert len(list(told(run))) >= 4
