"""What both ledgers promise (`broker/ledger/base.py`), each sentence against each of them."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from ledgers import CALL, Embedded, Shared, limit, spend

from broker.ledger.base import IDLE_S, LEASE_S, NAMED_IDLE_S, Granted, Refused
from broker.policy.limits import Code, Limit, Measure, label, once

T = 1_800_000_000.0  # 2027-01-15 08:00 UTC: a whole hour
HOUR, DAY = 3600, 86400
RUN = {"run": "r1"}


@pytest.fixture(params=["embedded", "redis"])
def desk(request: pytest.FixtureRequest) -> Iterator[Embedded]:
    if request.param == "redis":
        server = request.getfixturevalue("redis_server")
        server.command("FLUSHALL")
    found = Shared(server.url) if request.param == "redis" else Embedded()
    yield found
    found.close()


# (the limit, what one call spends, how many fit, the refusal's code, how long to wait after the last admitted call)
ADMITS = {
    "a bucket admits its burst, then one as soon as there is one": (limit("rate", 2, 60, 5), {}, 5, Code.RATE_LIMITED, 30),
    "calls in a window": (limit("calls", 3, HOUR), {}, 3, Code.RATE_LIMITED, HOUR - 100),
    "writes in a window": (limit("writes", 2, 60), {"amounts": {Measure.WRITES: 1}}, 2, Code.RATE_LIMITED, 20),
    "destructive calls": (limit("destructive", 1, DAY), {"amounts": {Measure.DESTRUCTIVE: 1}}, 1, Code.RATE_LIMITED, 57500),
    "bytes out, the last call not whole": (
        limit("bytes_out", 999, 60),
        {"amounts": {Measure.BYTES_OUT: 250}},
        3,
        Code.BUDGET_EXHAUSTED,
        20,
    ),
    "tokens": (limit("tokens", 100, HOUR), {"amounts": {Measure.TOKENS: 50}}, 2, Code.BUDGET_EXHAUSTED, HOUR - 100),
    "dollars far beyond 32 bits": (
        limit("usd", 9 * 10**15, DAY),
        {"amounts": {Measure.USD: 3 * 10**15}},
        3,
        Code.BUDGET_EXHAUSTED,
        57500,
    ),
    "steps of a named run": (limit("steps_per_run", 4), RUN, 4, Code.STEPS_EXHAUSTED, NAMED_IDLE_S),
    "steps of the implicit run": (limit("steps_per_run", 4), {"run": ""}, 4, Code.STEPS_EXHAUSTED, IDLE_S),
    "tokens of a run": (
        limit("tokens_per_run", 100),
        {**RUN, "amounts": {Measure.TOKENS: 30}},
        3,
        Code.BUDGET_EXHAUSTED,
        NAMED_IDLE_S,
    ),
    "identical calls": (limit("identical_per_run", 3), {"run": "", "fingerprint": "f"}, 3, Code.STEPS_EXHAUSTED, IDLE_S),
    "open calls; when one ends, nobody knows": (limit("concurrency", 2), {}, 2, Code.CONCURRENCY_LIMITED, None),
    "none of an hour": (limit("calls", 0, HOUR), {}, 0, Code.RATE_LIMITED, 0),
    "none of a rate": (limit("rate", 0, 60, 1), {}, 0, Code.RATE_LIMITED, 0),
    "no open call": (limit("concurrency", 0), {}, 0, Code.CONCURRENCY_LIMITED, 0),
    "no step": (limit("steps_per_run", 0), RUN, 0, Code.STEPS_EXHAUSTED, 0),
    "more in one call than there ever is": (
        limit("tokens", 10, 60),
        {"amounts": {Measure.TOKENS: 11}},
        0,
        Code.BUDGET_EXHAUSTED,
        0,
    ),
}


@pytest.mark.parametrize("row", ADMITS.values(), ids=ADMITS.keys())
def test_admits_as_many_as_the_limit_says_and_tells_when_there_is_more(desk, row):
    bound, known, fit, code, wait = row
    now = T + 100
    for _ in range(fit):
        assert isinstance(desk.reserve(spend(bound, **known), now), Granted)
    refused = desk.reserve(spend(bound, **known), now)
    assert isinstance(refused, Refused)
    assert (refused.limit, refused.limit.code) == (bound, code)
    if wait is not None:
        assert refused.retry_after == wait
    if wait:
        assert isinstance(desk.reserve(spend(bound, **known), now + wait - 0.001), Refused)
        assert isinstance(desk.reserve(spend(bound, **known), now + wait), Granted)


def test_a_refusal_says_what_is_spent_and_what_was_needed(desk):
    bound = limit("tokens", 100, 60)
    desk.reserve(spend(bound, amounts={Measure.TOKENS: 70}), T)
    assert desk.reserve(spend(bound, amounts={Measure.TOKENS: 31}), T) == Refused(bound, 70, 31, 60)


def test_what_is_refused_by_one_limit_is_taken_from_none_and_the_first_is_told(desk):
    window, rate, crowd = limit("calls", 2, HOUR), limit("rate", 10, 60, 10), limit("concurrency", 10)
    steps, tight, later = limit("steps_per_run", 10), limit("writes", 0, HOUR), limit("destructive", 0, HOUR)
    wanted = {"amounts": {**CALL, Measure.WRITES: 1, Measure.DESTRUCTIVE: 1}, "run": "r"}
    for _ in range(20):
        refused = desk.reserve(spend(window, rate, crowd, steps, tight, later, **wanted), T)
        assert refused.limit == tight
    assert [balance.spent for balance in desk.balances((window, rate, crowd), T)] == [0, 0, 0]
    assert desk.reserve(spend(window, rate, crowd, steps, run="r"), T) == Granted(1, began=T)


def test_a_limit_on_what_a_call_does_not_spend_does_not_bear_on_it(desk):
    assert desk.reserve(spend(limit("writes", 0, HOUR), limit("usd", 0, DAY), amounts={**CALL, Measure.USD: 0}), T) == Granted()


def test_a_decision_is_reserved_once_and_ended_once(desk):
    bound = limit("tokens", 100, HOUR)
    wanted = spend(bound, id="once", amounts={Measure.TOKENS: 60})
    assert [desk.reserve(wanted, T) for _ in range(3)] == [Granted()] * 3
    assert desk.balances((bound,), T)[0].spent == 60
    for _ in range(3):
        desk.settle("once", {Measure.TOKENS: 10}, T)
    desk.refund("once", T)
    assert desk.balances((bound,), T)[0].spent == 10
    desk.settle("never reserved", {Measure.TOKENS: 10}, T)
    desk.refund("never reserved", T)
    assert desk.balances((bound,), T)[0].spent == 10


@pytest.mark.parametrize(("spent", "left"), [(10, 90), (60, 40), (130, 0)], ids=["less", "just that", "more than was left"])
def test_what_is_settled_is_what_is_spent(desk, spent, left):
    window, run = limit("tokens", 100, HOUR), limit("tokens_per_run", 100)
    known = {"run": "r", "amounts": {**CALL, Measure.TOKENS: 60}}
    desk.reserve(spend(window, run, id="one", **known), T)
    desk.settle("one", {Measure.TOKENS: spent}, T + 5)
    for bound in (window, run):
        fits = {**known, "amounts": {Measure.TOKENS: left}}
        assert not left or isinstance(desk.reserve(spend(bound, id="fits", **fits), T + 5), Granted)
        desk.refund("fits", T + 5)
        assert isinstance(desk.reserve(spend(bound, **{**known, "amounts": {Measure.TOKENS: left + 1}}), T + 5), Refused)


def test_measures_that_settling_does_not_name_stay_as_reserved(desk):
    calls, tokens = limit("calls", 5, HOUR), limit("tokens", 100, HOUR)
    desk.reserve(spend(calls, tokens, id="one", amounts={**CALL, Measure.TOKENS: 60}), T)
    desk.settle("one", {}, T)
    assert [balance.spent for balance in desk.balances((calls, tokens), T)] == [1, 60]


def test_a_refund_gives_everything_back(desk):
    limits = (limit("calls", 1, HOUR), limit("rate", 1, HOUR, 1), limit("concurrency", 1), limit("tokens", 5, DAY))
    per_run = (limit("steps_per_run", 1), limit("identical_per_run", 1), limit("tokens_per_run", 5))
    known = {"run": "r", "fingerprint": "f", "amounts": {**CALL, Measure.TOKENS: 5}}
    for number in range(3):
        assert isinstance(desk.reserve(spend(*limits, *per_run, id=f"n{number}", **known), T), Granted)
        desk.refund(f"n{number}", T)
    assert [balance.spent for balance in desk.balances(limits, T)] == [0, 0, 0, 0]


def test_a_run_that_a_refunded_call_began_has_begun(desk):
    runs = limit("runs", 1, HOUR)
    assert desk.reserve(spend(runs, id="first", run="r"), T) == Granted(1, began=T)
    desk.refund("first", T)
    assert desk.reserve(spend(runs, run="r"), T) == Granted(2, began=T)
    assert desk.reserve(spend(runs, run="another"), T) == Refused(runs, 1, 1, HOUR)
    assert desk.balances((runs,), T)[0].spent == 1


def test_a_bucket_is_not_given_back_what_has_refilled_since(desk):
    rate = limit("rate", 1, 10, 1)
    desk.reserve(spend(rate, id="old"), T)
    assert isinstance(desk.reserve(spend(rate), T + 10), Granted)
    desk.refund("old", T + 10)
    assert isinstance(desk.reserve(spend(rate), T + 10), Refused)


def test_what_is_settled_after_its_window_has_gone_changes_no_other(desk):
    bound = limit("tokens", 100, 60)
    desk.reserve(spend(bound, id="early", amounts={Measure.TOKENS: 80}), T + 59)
    desk.reserve(spend(bound, id="late", amounts={Measure.TOKENS: 30}), T + 61)
    desk.settle("early", {Measure.TOKENS: 0}, T + 62)
    assert desk.balances((bound,), T + 62)[0].spent == 30


def test_what_is_settled_after_its_run_has_ended_changes_no_other(desk):
    bound = limit("tokens_per_run", 100)
    known = {"run": "", "amounts": {Measure.TOKENS: 80}}
    assert desk.reserve(spend(bound, id="early", **known), T) == Granted(1, began=T)
    assert desk.reserve(spend(bound, **known), T + IDLE_S) == Granted(1, began=T + IDLE_S)
    desk.settle("early", {Measure.TOKENS: 0}, T + IDLE_S)
    assert isinstance(desk.reserve(spend(bound, **known), T + IDLE_S), Refused)


def test_an_open_call_keeps_its_place_only_while_it_is_renewed(desk):
    bound = limit("concurrency", 1)
    desk.reserve(spend(bound, id="open"), T)
    assert isinstance(desk.reserve(spend(bound), T + LEASE_S - 0.001), Refused)
    desk.renew(T + LEASE_S - 0.001)
    assert isinstance(desk.reserve(spend(bound), T + 2 * LEASE_S - 0.002), Refused)
    assert desk.balances((bound,), T + 2 * LEASE_S)[0].spent == 0
    assert isinstance(desk.reserve(spend(bound, id="next"), T + 2 * LEASE_S), Granted)


def test_a_place_that_has_lapsed_is_not_taken_back(desk):
    bound = limit("concurrency", 1)
    desk.reserve(spend(bound, id="slow"), T)
    assert isinstance(desk.reserve(spend(bound, id="next"), T + LEASE_S), Granted)
    desk.renew(T + LEASE_S)
    desk.settle("slow", {}, T + LEASE_S)
    assert isinstance(desk.reserve(spend(bound), T + LEASE_S), Refused)
    desk.settle("next", {}, T + LEASE_S)
    assert isinstance(desk.reserve(spend(bound), T + LEASE_S), Granted)


def test_time_does_not_run_backwards(desk):
    window, rate, crowd = limit("calls", 1, 60), limit("rate", 1, 60, 1), limit("concurrency", 1)
    assert isinstance(desk.reserve(spend(window, rate, crowd, id="one"), T + HOUR), Granted)
    for earlier in (T, T + HOUR - 61, T - DAY):
        for bound in (window, rate, crowd):
            assert isinstance(desk.reserve(spend(bound), earlier), Refused)
    assert isinstance(desk.reserve(spend(limit("calls", 1, 60, scope="team/t")), T), Granted)
    assert isinstance(desk.reserve(spend(limit("calls", 1, 60, scope="team/t")), T + HOUR), Refused)


def test_a_run_lasts_its_time_and_not_a_moment_longer(desk):
    bound = limit("time_per_run", 30)
    assert desk.reserve(spend(bound, **RUN), T) == Granted(1, began=T)
    assert desk.reserve(spend(bound, **RUN), T + 30) == Granted(2, began=T)
    assert desk.reserve(spend(bound, **RUN), T + 30.5) == Refused(bound, 31, 0, NAMED_IDLE_S - 0.5)
    assert desk.reserve(spend(bound, run="r2"), T + 30.5) == Granted(1, began=T + 30)


def test_a_refused_call_does_not_keep_a_run_going(desk):
    steps = limit("steps_per_run", 1)
    assert desk.reserve(spend(steps, run=""), T) == Granted(1, began=T)
    assert isinstance(desk.reserve(spend(steps, run=""), T + IDLE_S - 1), Refused)
    assert desk.reserve(spend(steps, run=""), T + IDLE_S) == Granted(1, began=T + IDLE_S)


def test_runs_are_counted_once_each_and_told_apart_by_agent(desk):
    runs, steps = limit("runs", 2, HOUR), limit("steps_per_run", 2)
    assert desk.reserve(spend(runs, steps, run="r"), T) == Granted(1, began=T)
    assert desk.reserve(spend(runs, steps, run="r"), T) == Granted(2, began=T)
    assert desk.reserve(spend(runs, steps, run="r"), T).limit == steps
    assert desk.reserve(spend(runs, limit("steps_per_run", 2, scope="agent/b"), run="r", agent="b"), T) == Granted(1, began=T)
    assert desk.reserve(spend(runs, steps, run="third"), T).limit == runs
    assert desk.reserve(spend(runs), T) == Granted(0)


def test_only_calls_with_the_same_fingerprint_are_identical(desk):
    bound = limit("identical_per_run", 1)
    assert isinstance(desk.reserve(spend(bound, run="r", fingerprint="one"), T), Granted)
    assert isinstance(desk.reserve(spend(bound, run="r", fingerprint="two"), T), Granted)
    assert isinstance(desk.reserve(spend(bound, run="s", fingerprint="one"), T), Granted)
    assert isinstance(desk.reserve(spend(bound, run="r", fingerprint="one"), T), Refused)


@pytest.mark.parametrize("word", ["calls", "concurrency", "steps_per_run"])
def test_a_changed_amount_takes_nothing_back_of_what_is_spent(desk, word):
    per = 0 if word in ("concurrency", "steps_per_run") else HOUR
    for _ in range(3):
        assert isinstance(desk.reserve(spend(limit(word, 3, per, 3), run="r"), T), Granted)
    assert isinstance(desk.reserve(spend(limit(word, 2, per, 2), run="r"), T), Refused)
    assert isinstance(desk.reserve(spend(limit(word, 4, per, 4), run="r"), T), Granted)
    assert isinstance(desk.reserve(spend(limit(word, 4, per, 4), run="r"), T), Refused)


def test_a_bucket_that_was_emptied_refills_at_the_changed_rate(desk):
    for _ in range(2):
        assert isinstance(desk.reserve(spend(limit("rate", 1, HOUR, 2)), T), Granted)
    faster = limit("rate", 3600, HOUR, 5)
    assert desk.reserve(spend(faster), T) == Refused(faster, 5, 1, 1)
    assert isinstance(desk.reserve(spend(faster), T + 1), Granted)
    assert isinstance(desk.reserve(spend(faster), T + 1), Refused)


def test_scopes_are_counted_apart_and_a_shared_one_together(desk):
    team = limit("calls", 3, HOUR, scope="team/t")
    for name in ("a", "b"):
        assert isinstance(desk.reserve(spend(limit("calls", 2, HOUR, scope=f"agent/{name}"), team), T), Granted)
    assert isinstance(desk.reserve(spend(limit("calls", 2, HOUR), team), T), Granted)
    assert desk.reserve(spend(limit("calls", 2, HOUR, scope="agent/b"), team), T).limit == team
    assert desk.balances((limit("calls", 2, HOUR, scope="agent/b"),), T)[0].spent == 1


def test_balances_say_what_is_spent_and_when_it_renews(desk):
    window, rate, crowd = limit("tokens", 100, HOUR), limit("rate", 6, 60, 3), limit("concurrency", 5)
    assert [(each.spent, each.renews) for each in desk.balances((window, rate, crowd), T)] == [(0, T + HOUR), (0, T), (0, 0)]
    for _ in range(2):
        desk.reserve(spend(window, rate, crowd, amounts={**CALL, Measure.TOKENS: 7}), T)
    told = desk.balances((window, rate, crowd, limit("steps_per_run", 5)), T)
    assert [(each.spent, each.renews) for each in told] == [(14, T + HOUR), (2, T + 20), (2, 0)]
    assert [each.spent for each in desk.balances((window, rate, crowd), T + HOUR)] == [0, 0, 0]


# Flow rules and approvals, which are limits too.

FORBIDDEN = Limit("flow", "flow/0", 0, "platform.yaml#/spec/flow/0", after=("pii", "untrusted"))
READS = {name: spend(label(name), **RUN, fingerprint=f"crm/{name}.get/sha256:1", id=name) for name in FORBIDDEN.after}


def test_a_run_that_has_all_labels_of_a_flow_rule_is_refused_and_told_by_which_calls(desk):
    write = {"run": "r1"}
    assert isinstance(desk.reserve(spend(FORBIDDEN, **write), T), Granted)
    desk.reserve(READS["pii"], T)
    assert isinstance(desk.reserve(spend(FORBIDDEN, **write), T), Granted)
    desk.reserve(READS["untrusted"], T)
    refused = desk.reserve(spend(FORBIDDEN, **write), T)
    assert isinstance(refused, Refused)
    assert (refused.limit, refused.retry_after) == (FORBIDDEN, 0)
    assert refused.trail == "pii by crm/pii.get (decision pii), untrusted by crm/untrusted.get (decision untrusted)"
    assert isinstance(desk.reserve(spend(FORBIDDEN, run="r2"), T), Granted)
    assert isinstance(desk.reserve(spend(FORBIDDEN, run=None), T), Granted)
    own = desk.reserve(spend(FORBIDDEN, **write, step=False), T)
    assert isinstance(own, Refused), "a protocol's own traffic would carry out what a call may not"
    assert isinstance(desk.reserve(spend(FORBIDDEN, agent="b", **write), T), Granted)


def test_what_is_no_step_of_a_run_leaves_it_as_it_is(desk):
    steps, idle = limit("steps_per_run", 2), limit("time_per_run", HOUR)
    for _ in range(3):
        assert desk.reserve(spend(FORBIDDEN, **RUN, step=False), T) == Granted()
    first = desk.reserve(spend(steps, idle, limit("runs", 1, DAY), **RUN), T + 10)
    assert (first.step, first.began) == (1, T + 10)
    assert desk.reserve(spend(FORBIDDEN, **RUN, step=False), T + 20) == Granted()
    assert desk.reserve(spend(steps, **RUN), T + 30).step == 2


def test_a_call_that_is_given_back_takes_its_label_along_and_one_that_ended_leaves_it(desk):
    for read in READS.values():
        desk.reserve(read, T)
    desk.settle("pii", {}, T)
    desk.refund("untrusted", T)
    assert isinstance(desk.reserve(spend(FORBIDDEN, **RUN), T), Granted)
    desk.reserve(replace(READS["untrusted"], decision_id="again"), T)
    refused = desk.reserve(spend(FORBIDDEN, **RUN), T)
    assert isinstance(refused, Refused)
    assert "untrusted by crm/untrusted.get (decision again)" in refused.trail


def test_a_call_is_not_held_to_the_labels_that_it_brings_itself(desk):
    both = spend(FORBIDDEN, *(label(name) for name in FORBIDDEN.after), **RUN)
    assert isinstance(desk.reserve(both, T), Granted)
    assert isinstance(desk.reserve(replace(both, decision_id="next"), T), Refused)


def test_a_label_lasts_as_long_as_its_run(desk):
    for read in READS.values():
        desk.reserve(replace(read, run=""), T)
    assert isinstance(desk.reserve(spend(FORBIDDEN, run=""), T + IDLE_S - 1), Refused)
    assert isinstance(desk.reserve(spend(FORBIDDEN, run=""), T + IDLE_S), Granted)


def test_an_approval_is_consumed_once_for_good_unless_the_call_never_left(desk):
    approval = once("a-1", "r#")
    desk.reserve(spend(approval, id="first"), T)
    assert isinstance(desk.reserve(spend(approval), T), Refused)
    desk.refund("first", T)
    assert isinstance(desk.reserve(spend(approval), T), Granted)
    for later in (1, HOUR, DAY, 40 * DAY):
        assert isinstance(desk.reserve(spend(approval), T + later), Refused)
    assert isinstance(desk.reserve(spend(once("a-2", "r#")), T), Granted)
