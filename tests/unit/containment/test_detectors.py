"""What each detector fires at and what not, whom it counts for, and how much of each agent is kept."""

import tracemalloc
from collections import defaultdict
from itertools import count
from pathlib import Path

import corpora
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.audit.record import Attempt, Ending
from broker.containment.counters import EXACT
from broker.containment.detectors import DENIED, SPENT, UNDECLARED, Detectors
from broker.manifest.load import load_texts
from broker.policy.containment import DEFAULTS, MOST_TARGETS, NO_DECOYS, Action, Decoys, Detector, Rule
from broker.policy.types import ALLOW, Code, Decision, Verdict, deny

T = 1_800_000_000.0
DENIAL = deny(Code.PARAMS_INVALID, "as the manifest says")
HOST = deny(Code.HOST_NOT_DECLARED, "no tool is there")
DECOYS = Decoys(frozenset({"vault.corp.example"}), frozenset({"payroll"}))
_ids = count(1)


def about(agent: str = "a", **known: object) -> Attempt:
    usual = {"tool": "crm", "operation": "contacts.get", "effect": "read", "host": "crm.example", "run_id": "r"}
    return Attempt(f"{next(_ids):020x}", "sha256:0", {"name": agent} if agent else {}, **{**usual, **known})


def rule(detector: Detector, count: int = 1, window: int = 60, action: Action = Action.ALERT, **known: object) -> Rule:
    return Rule(detector, action, count, window, **{"cooldown": 0, **known})


def watching(*rules: Rule, decoys: Decoys = NO_DECOYS) -> Detectors:
    return Detectors(rules, decoys)


def call(on: Detectors, at: float, agent: str = "a", decision: Decision = ALLOW, **known: object) -> list[str]:
    """The detectors that fire at a decision."""
    return [str(each.rule.detector) for each in on.decided(about(agent, **known), decision, T + at)]


def end(on: Detectors, at: float, error: str = "5xx", status: int = 500, **known: object) -> list[str]:
    return [str(each.rule.detector) for each in on.ended(about(**known), Ending(status=status), error, T + at)]


# What is an event.

NOT_THE_AGENTS_DOING = {
    Code.AGENT_UNKNOWN, Code.AGENT_REVOKED, Code.APPROVAL_REQUIRED, Code.RATE_LIMITED, Code.CONCURRENCY_LIMITED,
    Code.CREDENTIAL_UNAVAILABLE, Code.RESPONSE_BLOCKED, Code.AUDIT_UNAVAILABLE, Code.LEDGER_UNAVAILABLE, Code.UPSTREAM_UNTRUSTED,
    Code.INTERNAL_FAULT, Code.AGENT_READ_ONLY, Code.UPSTREAM_UNAVAILABLE,
}  # fmt: skip


def test_every_code_is_judged_once():
    assert set(Code) == DENIED | SPENT | NOT_THE_AGENTS_DOING
    assert len(Code) == len(DENIED) + len(SPENT) + len(NOT_THE_AGENTS_DOING)
    assert UNDECLARED <= DENIED


@pytest.mark.parametrize("code", list(Code))
def test_a_denial_is_counted_where_it_is_the_agents_doing(code):
    on = watching(rule(Detector.DENIED_BURST), rule(Detector.BUDGET_EXHAUSTED), rule(Detector.PROBING))
    expected = {
        "probing": code in UNDECLARED,
        "denied_burst": code not in NOT_THE_AGENTS_DOING | SPENT,
        "budget_exhausted": code in SPENT,
    }
    assert call(on, 0, decision=deny(code, "")) == [name for name, fires in expected.items() if fires]


def test_what_the_broker_itself_tries_in_an_agents_place_is_not_the_agents_doing():
    on = watching(*(rule(each) for each in (Detector.DENIED_BURST, Detector.PROBING, Detector.UNDECLARED_HOST)))
    assert call(on, 0, decision=HOST, tool="", operation="", host="must-deny.invalid:443") == []
    assert call(on, 0, decision=DENIAL, host="must-deny.invalid") == ["denied_burst"]


@pytest.mark.parametrize(
    ("known", "decision", "fires"),
    [
        pytest.param({"effect": "write"}, ALLOW, ["write_spike"], id="a write that is let go is one"),
        pytest.param({"effect": "destructive"}, ALLOW, ["write_spike", "destructive_spike"], id="what destroys also writes"),
        pytest.param({"effect": "read"}, ALLOW, [], id="a read is neither"),
        pytest.param({"effect": "write"}, DENIAL, [], id="a denied write did not happen"),
        pytest.param(
            {"effect": "write"}, Decision(Verdict.WOULD_DENY, Code.PARAMS_INVALID), ["write_spike"], id="in shadow it did"
        ),
        pytest.param(
            {"effect": "write"}, Decision(Verdict.HOLD, Code.APPROVAL_REQUIRED), [], id="a held write has not happened yet"
        ),
    ],
)
def test_spikes_count_what_happens(known, decision, fires):
    assert call(watching(rule(Detector.WRITE_SPIKE), rule(Detector.DESTRUCTIVE_SPIKE)), 0, decision=decision, **known) == fires


def test_what_shadow_mode_lets_pass_is_no_denial():
    on = watching(rule(Detector.DENIED_BURST))
    assert call(on, 0, decision=Decision(Verdict.WOULD_DENY, Code.PARAMS_INVALID)) == []


@pytest.mark.parametrize(
    ("host", "touched"),
    [
        ("vault.corp.example", True),
        ("vault.corp.example:443", True),
        ("VAULT.Corp.Example:8443", True),
        ("vault.corp.example.:443", True),
        ("http://vault.corp.example/secrets", True),
        ("https://bot@vault.corp.example:443/", True),
        ("vault.corp.example.evil.example", False),
        ("my-vault.corp.example", False),
        ("", False),
        ("[::1]:443", False),
    ],
)
def test_a_decoy_host_is_known_in_every_form(host, touched):
    on = watching(rule(Detector.HONEYTOKEN, action=Action.REVOKE_AGENT), decoys=DECOYS)
    assert call(on, 0, decision=HOST, host=host, tool="") == ["honeytoken"] * touched


@pytest.mark.parametrize("decision", [ALLOW, DENIAL, HOST, deny(Code.AGENT_REVOKED, ""), deny(Code.INTERNAL_FAULT, "")])
def test_a_decoy_tool_counts_whatever_the_verdict(decision):
    assert call(watching(rule(Detector.HONEYTOKEN), decoys=DECOYS), 0, decision=decision, tool="payroll") == ["honeytoken"]


def test_a_decoy_at_an_address_is_known_without_its_brackets():
    on = watching(rule(Detector.HONEYTOKEN), decoys=Decoys(frozenset({"fd00::7"})))
    assert call(on, 0, decision=HOST, host="[FD00::7]:443") == ["honeytoken"]


def test_without_a_proven_agent_nothing_counts():
    on = watching(*DEFAULTS, rule(Detector.DENIED_BURST), decoys=DECOYS)
    nobody = about("", tool="payroll", host="vault.corp.example")
    assert on.decided(nobody, HOST, T) == on.ended(nobody, Ending(), "5xx", T) == ()
    assert on.content(nobody, Detector.HONEYTOKEN, "the body", T) == ()


# Numbers.


def _true_counts(times: list[int], window: int) -> list[int]:
    return [sum(1 for other in times[: at + 1] if time - other < window * 1000) for at, time in enumerate(times)]


_GAPS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 900), st.integers(900, 11_000)), max_size=120)


@given(gaps=_GAPS, most=st.integers(1, EXACT), window=st.integers(1, 10))
def test_up_to_twenty_it_fires_at_exactly_that_many(gaps, most, window):
    on, times = watching(rule(Detector.DENIED_BURST, most, window)), [sum(gaps[: at + 1]) for at in range(len(gaps))]
    fired = [bool(call(on, time / 1000, decision=DENIAL)) for time in times]
    assert fired == [number >= most for number in _true_counts(times, window)]


@given(gaps=_GAPS, most=st.integers(EXACT + 1, 100), window=st.integers(1, 30))
def test_beyond_it_fires_at_no_fewer_than_nine_tenths_and_always_at_all(gaps, most, window):
    on, times = watching(rule(Detector.WRITE_SPIKE, most, window)), [sum(gaps[: at + 1]) for at in range(len(gaps))]
    for time, number in zip(times, _true_counts(times, window), strict=True):
        fired = bool(call(on, time / 1000, effect="write"))
        assert fired <= (number >= 0.9 * most), "not before"
        assert fired >= (number >= most), "not after"


@given(
    seen=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 12)), max_size=80),
    most=st.integers(1, 10),
    window=st.integers(1, 20),
)
def test_probing_counts_different_targets_exactly(seen, most, window):
    on, last, time = watching(rule(Detector.PROBING, most, window)), dict[int, int](), 0
    for gap, target in seen:
        time += gap
        last[target] = time
        different = sum(time - each < window * 1000 for each in last.values())
        assert bool(call(on, time / 1000, decision=HOST, host=f"h{target}.example")) == (different >= most)


@given(
    seen=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 5)), max_size=120),
    most=st.integers(2, 20),
    window=st.integers(1, 60),
)
def test_up_to_six_calls_are_each_counted_exactly_however_they_alternate(seen, most, window):
    on, times, time = watching(rule(Detector.IDENTICAL_CALLS, most, window)), defaultdict[int, list[int]](list), 0
    for gap, which in seen:
        time += gap
        times[which].append(time)
        expected = _true_counts(times[which], window)[-1] >= most
        assert bool(call(on, time / 1000, args_hash=f"sha256:{which}")) == expected


def test_a_loop_is_seen_among_calls_that_come_once_or_twice():
    on, fired = watching(rule(Detector.IDENTICAL_CALLS, 20, 300)), []
    for turn in range(20):
        fired += call(on, turn * 5, args_hash="sha256:loop")
        for other in range(8):
            call(on, turn * 5 + 1, args_hash=f"sha256:{turn}-{other // 2}")
    assert fired == ["identical_calls"]


@pytest.mark.parametrize(
    "known",
    [
        pytest.param({"args_hash": ""}, id="calls that were refused before their limits"),
        pytest.param({"effect": ""}, id="what keeps a protocol alive"),
        pytest.param({"decision": deny(Code.LEDGER_UNAVAILABLE, "")}, id="calls that were not served"),
    ],
)
def test_repetitions_that_are_none(known):
    on = watching(rule(Detector.IDENTICAL_CALLS, 2))
    assert [call(on, at, **{"args_hash": "sha256:1", **known}) for at in range(5)] == [[]] * 5


def test_the_same_call_in_another_run_is_another():
    on = watching(rule(Detector.IDENTICAL_CALLS, 2))
    assert [call(on, at, args_hash="sha256:1", run_id=f"r{at}") for at in range(5)] == [[]] * 5
    assert call(on, 6, args_hash="sha256:1", run_id="r4") == ["identical_calls"]


@pytest.mark.parametrize(
    ("between", "fires"),
    [
        pytest.param(lambda on: end(on, 3, "", 200), False, id="a success ends it"),
        pytest.param(lambda on: end(on, 3, "", 404), False, id="any answer of the tool's own ends it"),
        pytest.param(lambda on: end(on, 3, "", 0), True, id="an agent that went away does not"),
        pytest.param(lambda on: end(on, 3, "", 200, tool="wiki"), True, id="another tool's success does not"),
        pytest.param(lambda on: end(on, 3, "5xx", 500, tool="wiki"), True, id="another tool's failure neither"),
        pytest.param(lambda on: end(on, 3, "", 200, agent="b"), True, id="nor another agent's success"),
    ],
)
def test_a_streak_of_failures(between, fires):
    on = watching(rule(Detector.UPSTREAM_FAILURES, 3, 0))
    assert end(on, 1) == end(on, 2) == []
    between(on)
    assert end(on, 9_000_000) == ["upstream_failures"] * fires


def test_of_more_tools_that_fail_than_are_kept_those_that_fail_most_stay():
    on = watching(rule(Detector.UPSTREAM_FAILURES, 5, 0))
    fired = [end(on, turn, tool=f"t{tool}") for turn in range(5) for tool in range(9)]
    assert sum(map(len, fired)) >= 5


def test_a_fast_and_a_slow_rule_stand_side_by_side():
    on = watching(rule(Detector.DENIED_BURST, 3, 10, rule="fast"), rule(Detector.DENIED_BURST, 5, 3600, rule="slow"))
    fired = [[each.rule.rule for each in on.decided(about(), DENIAL, T + at)] for at in (0, 1, 2, 300, 600)]
    assert fired == [[], [], ["fast"], [], ["slow"]]


def test_a_window_of_years_is_counted_too():
    on = watching(rule(Detector.DENIED_BURST, 3, 10 * 365 * 86_400))
    assert [call(on, year * 365 * 86_400, decision=DENIAL) for year in (0, 6, 9, 17)] == [[], [], ["denied_burst"], []]


def test_counts_go_on_when_their_times_outgrow_their_numbers():
    on, weeks = watching(rule(Detector.DENIED_BURST, 2, 60), rule(Detector.DENIED_BURST, 3, 86_400)), 7 * 86_400
    for week in range(0, 60, 3):
        assert len(call(on, week * weeks, decision=DENIAL)) == 0
        assert len(call(on, week * weeks + 30, decision=DENIAL)) == 1
        assert len(call(on, week * weeks + 3600, decision=DENIAL)) == 1


def test_what_cannot_be_told_apart_is_no_rule():
    with pytest.raises(ValueError, match="at most 64"):
        watching(rule(Detector.PROBING, MOST_TARGETS + 1))
    text = b"{apiVersion: broker/v1, kind: Platform, metadata: {name: p, owner: o}, spec: {containment: {probing: {count: 65}}}}"
    assert {each.code for each in load_texts({"p.yaml": text}, Path()).findings} == {"field_invalid"}


# What fires.


def test_a_finding_says_what_why_and_by_which_decisions():
    on, ids = watching(rule(Detector.DENIED_BURST, 5, 60, rule="acme.yaml#/spec", shadow=True)), []
    for at in range(5):
        attempt = about()
        found = on.decided(attempt, DENIAL, T + at)
        ids.append(attempt.decision_id)
    (finding,) = found
    assert finding.what == "5 calls were denied within 1 min; the last: params_invalid"
    assert (finding.agent, finding.run_id, finding.decision_ids) == ("a", "r", tuple(ids[-3:]))
    assert (finding.rule.rule, finding.rule.shadow) == ("acme.yaml#/spec", True)


@pytest.mark.parametrize(
    ("rules", "events", "what"),
    [
        (
            rule(Detector.PROBING, 2, 600),
            [lambda on, at=at: on.decided(about(host=f"H{at}.example:443"), HOST, T) for at in range(2)],
            "2 different hosts, tools or operations that are not declared within 10 min; the last: host h1.example:443",
        ),
        (
            rule(Detector.UPSTREAM_FAILURES, 2, 0),
            [lambda on: on.ended(about(), Ending(), "timeout", T)] * 2,
            "2 calls failed one after the other at crm (timeout)",
        ),
        (
            rule(Detector.IDENTICAL_CALLS, 2, 90),
            [lambda on: on.decided(about(args_hash="x"), ALLOW, T)] * 2,
            "2 identical calls within 90 s: crm/contacts.get",
        ),
        (
            rule(Detector.WRITE_SPIKE, 30, 3600),
            [lambda on: on.decided(about(effect="write"), ALLOW, T)] * 28,
            "at least 28 calls that write or destroy within 1 h; the last: crm/contacts.get",
        ),
        (
            rule(Detector.BUDGET_EXHAUSTED),
            [lambda on: on.decided(about(), deny(Code.BUDGET_EXHAUSTED, "no room under usd: 50/day"), T)],
            "a budget has no room left: no room under usd: 50/day",
        ),
        (
            rule(Detector.UNDECLARED_HOST),
            [lambda on: on.decided(about(host="paste.example:443"), HOST, T)],
            "a host that is not declared was tried for the first time: paste.example",
        ),
        (
            rule(Detector.HONEYTOKEN),
            [lambda on: on.content(about(), Detector.HONEYTOKEN, "a credential, in the body", T)],
            "a decoy was touched, which no honest call does: a credential, in the body",
        ),
    ],
)
def test_what_a_finding_says(rules, events, what):
    on = watching(rules)
    found = [each(on) for each in events]
    assert [one.what for one in found[-1]] == [what]
    assert not any(found[:-1])


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("x" * 5000, "x" * 80 + "…"),
        ("ghp_0123456789abcdef0123456789abcdef0123.example", "[redacted]"),
        ("a\nb\u202e", r"'a\nb\u202e'"),
    ],
)
def test_what_an_agent_chose_is_shown_short_printable_and_without_secrets(host, shown):
    (finding,) = watching(rule(Detector.UNDECLARED_HOST)).decided(about(host=host), HOST, T)
    assert finding.what.removeprefix("a host that is not declared was tried for the first time: ") == shown


def test_an_id_that_is_longer_than_ours_is_told_but_not_kept():
    on = watching(rule(Detector.DENIED_BURST, 2))
    on.decided(Attempt("x" * 21, "", {"name": "a"}), DENIAL, T)
    (finding,) = on.decided(Attempt("y" * 21, "", {"name": "a"}), DENIAL, T)
    assert finding.decision_ids == ("y" * 21,)


def test_after_it_fired_a_rule_is_quiet_for_its_cool_down():
    on = watching(rule(Detector.DENIED_BURST, 2, 60, cooldown=100), rule(Detector.WRITE_SPIKE, 1, 60, cooldown=100))
    assert [len(call(on, at, decision=DENIAL)) for at in (0, 1, 2, 50, 100, 101, 102)] == [0, 1, 0, 0, 0, 1, 0]
    assert call(on, 103, effect="write") == ["write_spike"], "another rule has its own"
    assert call(on, 103, "b", effect="write") == ["write_spike"], "and another agent"


def test_a_rule_that_revokes_a_run_goes_on_with_the_next_run_and_counts_it_alone():
    on = watching(rule(Detector.DENIED_BURST, 3, 60, Action.REVOKE_RUN, cooldown=600))
    fired = [
        [each.run_id for each in on.decided(about(run_id=run), DENIAL, T + at)]
        for at, run in enumerate(["r1", "r1", "r1", "r1", "r2", "r2", "r2", "r2"])
    ]
    # The fourth of r1 came after it fired, and counts for the agent whose runs they are.
    assert fired == [[], [], ["r1"], [], [], ["r2"], [], []]


def test_a_streak_that_revoked_a_run_begins_anew():
    on = watching(rule(Detector.UPSTREAM_FAILURES, 2, 0, Action.REVOKE_RUN, cooldown=600))
    assert [len(end(on, at, run_id=run)) for at, run in enumerate(["r1", "r1", "r2", "r2"])] == [0, 1, 0, 1]


def test_an_undeclared_host_is_told_of_once_per_agent():
    on = watching(rule(Detector.UNDECLARED_HOST))
    hosts = ["x.example", "X.example:443", "x.example", "y.example"]
    assert [len(call(on, at, decision=HOST, host=host)) for at, host in enumerate(hosts)] == [1, 0, 0, 1]
    assert call(on, 9, "b", decision=HOST, host="x.example") == ["undeclared_host"]


def test_at_the_base_url_an_undeclared_tool_is_known_by_the_paths_beginning():
    on, no_tool = watching(rule(Detector.PROBING, 2)), deny(Code.TOOL_NOT_DECLARED, "")
    paths = ["/shop/a", "/shop/b", "/bank/a"]
    assert [len(call(on, 0, decision=no_tool, tool="", path=path)) for path in paths] == [0, 0, 1]


@pytest.mark.parametrize("detector", [Detector.SECRET_IN_REQUEST, Detector.CREDENTIAL_IN_REQUEST, Detector.HONEYTOKEN])
def test_what_is_seen_in_a_request_fires_at_once_and_then_is_quiet(detector):
    on = watching(rule(detector, cooldown=60))
    assert [len(on.content(about(), detector, "the body", T + at)) for at in (0, 1, 59, 60)] == [1, 0, 0, 1]


def test_a_detector_without_rules_sees_nothing():
    on = watching(decoys=DECOYS)
    for at in range(50):
        assert call(on, at, decision=HOST, tool="payroll", effect="write") == end(on, at) == []
        assert call(on, at, effect="destructive", args_hash="x") == []
    assert on.content(about(), Detector.HONEYTOKEN, "the body", T) == ()


# Whom it counts for, and for how long.


def test_after_a_release_old_counts_do_not_revoke_once_more():
    on = watching(rule(Detector.DENIED_BURST, 3, 60, Action.REVOKE_AGENT), rule(Detector.UPSTREAM_FAILURES, 3, 0))
    for at in range(3):
        call(on, at, decision=DENIAL)
        end(on, at)
    on.forget("a")
    on.forget("nobody")
    assert [len(call(on, at, decision=DENIAL)) for at in (3, 4, 5)] == [0, 0, 1]
    assert [len(end(on, at)) for at in (3, 4, 5)] == [0, 0, 1]


@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(sorted(corpora.ATTACKS)), seed=st.integers(0, 9))
def test_what_one_agent_does_is_never_held_against_another(name, seed):
    on, attacker = Detectors(DEFAULTS, corpora.DECOYS), {"name": "b"}
    mine = iter(corpora.played(corpora.BENIGN["an agent's first day, with a few denials"], str(seed)))
    alone = Detectors(DEFAULTS, corpora.DECOYS)
    for event in corpora.trace(name):
        # The same calls, tools, run and times, but by B.
        event.about.agent = attacker
        for finding in corpora.told(on, event):
            assert finding.agent == "b"
        if my := next(mine, None):
            assert corpora.told(on, my, event.at) == corpora.told(alone, my, event.at)


@pytest.mark.parametrize("back", [1.5, 60, 86_400, 1e9])
def test_a_clock_that_is_set_back_fires_nothing(back):
    on = watching(rule(Detector.DENIED_BURST, 3, 60), rule(Detector.PROBING, 3, 60), rule(Detector.IDENTICAL_CALLS, 3, 60))
    for at in (5000, 5001, 5001 - back):
        assert call(on, at, decision=HOST, host=f"h{at}", args_hash="x") == []
    again = [len(call(on, 5002 - back + at, decision=DENIAL)) for at in range(3)]
    assert again == [0, 1, 1], "and then it counts again"


def test_events_out_of_order_by_less_than_a_second_count_as_simultaneous():
    on = watching(rule(Detector.DENIED_BURST, 3, 60))
    assert [len(call(on, at, decision=DENIAL)) for at in (10, 9.5, 9.9)] == [0, 0, 1]


# How much is kept.


def _everything(on: Detectors, agent: str, turns: int) -> None:
    for turn in range(turns):
        for each in range(7):
            call(on, turn, agent, effect="destructive", args_hash=f"sha256:{each}", tool=f"t{each}", decision=ALLOW)
            end(on, turn, agent=agent, tool=f"t{each}")
        call(on, turn, agent, decision=HOST, host=f"h{turn}.example")
        call(on, turn, agent, decision=deny(Code.BUDGET_EXHAUSTED, ""))


def _taken(on: Detectors, agents: list[str], turns: int) -> float:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for agent in agents:
            _everything(on, agent, turns)
        return (tracemalloc.get_traced_memory()[0] - before) / len(agents)
    finally:
        tracemalloc.stop()


def test_an_agent_takes_less_than_2_kb_whatever_it_does():
    on = Detectors(DEFAULTS, DECOYS)
    agents = [f"agent-{number}" for number in range(500)]
    _everything(on, "first", 3)
    assert _taken(on, agents, 1) <= 2048
    assert _taken(on, agents[:3], 200) <= 512, "all of it is taken at the first event, and 5,000 more add nothing"


def test_hosts_that_are_made_up_take_no_more_and_more_memory():
    on = watching(rule(Detector.UNDECLARED_HOST))
    size, fired = len(on._hosts), 0
    for number in range(200_000):
        fired += len(on.decided(about(host=f"h{number}.example"), HOST, T))
    assert fired == 200_000
    assert len(on._hosts) == size
    assert call(on, 1, decision=HOST, host="h199999.example") == []
    assert call(on, 1, decision=HOST, host="h0.example") == ["undeclared_host"], "the oldest are forgotten"


def test_a_few_hosts_of_each_of_ten_thousand_agents_are_remembered():
    on = watching(rule(Detector.UNDECLARED_HOST))
    told = [len(call(on, turn, f"a{agent}", decision=HOST, host="x.example")) for turn in range(2) for agent in range(10_000)]
    assert told == [1] * 10_000 + [0] * 10_000


# The corpora.


@pytest.mark.parametrize("name", corpora.BENIGN)
def test_honest_work_is_not_cut_off(name):
    assert corpora.judged(name).revokes == 0


QUIET = {
    "an assistant, half a day", "a coding agent, bursts of calls", "a service at its peak, 3 calls/s", "an indexer, 4,000 pages",
    "polling one status every 30 s", "polling one status every 10 s", "a flapping tool, every third call fails",
    "a tool away for 5 minutes", "pauses after each 429", "the broker's ledger away, 20 workers", "texts about keys and tokens",
}  # fmt: skip


def test_most_honest_work_is_not_even_told_of():
    assert {name for name in corpora.BENIGN if not corpora.judged(name).found} == QUIET


@pytest.mark.parametrize("name", corpora.ATTACKS)
def test_an_attack_is_caught(name):
    judged, most = corpora.judged(name), max(each.count for each in DEFAULTS if each.detector is corpora.ATTACKS[name].detector)
    assert 1 <= judged.after <= 3 * most, "the loop of three calls takes three times as many"


def test_every_detector_is_attacked_fast_and_slow_or_at_once():
    attacked = [each.detector for each in corpora.ATTACKS.values()]
    assert set(attacked) == set(Detector)
    counted = {
        Detector.DENIED_BURST,
        Detector.PROBING,
        Detector.UPSTREAM_FAILURES,
        Detector.IDENTICAL_CALLS,
        Detector.WRITE_SPIKE,
    }
    assert all(attacked.count(each) >= 2 for each in counted)
