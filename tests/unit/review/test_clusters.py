"""Denials that belong together are one cluster, the same one everywhere, and nothing in it is a secret."""

import hashlib

import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.audit.index import Index, Label
from broker.audit.log import AuditLog
from broker.audit.record import Attempt, Ending, alert_record, decision_record, outcome_record
from broker.policy.denials import DenialKind
from broker.policy.types import ALLOW, Code, Decision, Verdict, Violation, deny
from broker.review import clusters as review
from broker.review.clusters import clusters, decisions, exists, hidden, latest, records, shadowed

KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
NOW = 1_700_000_000.0
SEARCH = {"tool": "wiki", "operation": "search", "host": "wiki.example", "method": "POST", "path": "/mcp"}
UNDECLARED = deny(Code.OPERATION_NOT_DECLARED, "no", rule="tools/shop.yaml#/spec")
UNKNOWN_HOST = deny(Code.HOST_NOT_DECLARED, "no", rule="agents/bot.yaml#/spec/tools")
WOULD = Decision(Verdict.WOULD_DENY, Code.PARAMS_INVALID, "no", "r")


class Log:
    """A log that grows by a record a second, and the index over it."""

    def __init__(self, state):
        self.index = None
        self._log, self._state, self._number = AuditLog(state / "audit", KEY, NOW, 1), state, 0

    def append(self, build, *what):
        self._number += 1
        self._log.append(build(NOW + self._number, 1, *what))

    def decide(self, decision, agent="bot", **known):
        attempt = Attempt(f"d-{self._number + 1}", "sha256:r", {"name": agent} if agent else {}, **known)
        self.append(decision_record, attempt, decision)
        return attempt

    def end(self, attempt, **how):
        self.append(outcome_record, attempt, Ending(**how))

    def open(self):
        self.index = self.index or Index(self._state)
        self.index.update()
        return self.index

    def close(self):
        self._log.close()
        if self.index:
            self.index.close()


@pytest.fixture
def log(tmp_path):
    made = Log(tmp_path)
    yield made
    made.close()


def found(log, **asked):
    return clusters(log.open(), NOW, **asked)


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        pytest.param({"agent": "a"}, {"agent": "b"}, False, id="two agents"),
        pytest.param({}, {"effect": "write", "run_id": "r", "params": {"path": {"x": 1}}}, True, id="what else a call carries"),
        pytest.param({}, {"operation": "read"}, False, id="two operations"),
        pytest.param({}, {"tool": "shop"}, False, id="two tools"),
        pytest.param({}, {"decision": UNKNOWN_HOST}, False, id="two codes"),
        pytest.param({}, {"decision": deny(UNDECLARED.code, "no", rule="other.yaml#")}, False, id="two rules"),
        pytest.param({}, {"decision": deny(UNDECLARED.code, "other words", rule=UNDECLARED.rule)}, True, id="two sentences"),
        pytest.param(
            {}, {"decision": Decision(Verdict.WOULD_DENY, UNDECLARED.code, "no", UNDECLARED.rule)}, False, id="shadow is apart"
        ),
        pytest.param(
            {}, {"decision": Decision(Verdict.HOLD, UNDECLARED.code, "no", UNDECLARED.rule)}, True, id="a hold is a denial"
        ),
        pytest.param(
            {"operation": "GET /items/1/x"}, {"operation": "GET /items/22/x"}, True, id="an undeclared path with two numbers"
        ),
        pytest.param({"operation": "GET /items/a"}, {"operation": "GET /items/b"}, False, id="two undeclared paths"),
        pytest.param({"operation": "GET /items/1"}, {"operation": "PUT /items/1"}, False, id="two methods"),
        pytest.param({"operation": "tools/call a"}, {"operation": "tools/call b"}, False, id="two undeclared tools of MCP"),
        pytest.param({}, {"host": "other.example"}, True, id="a tool has one host"),
        pytest.param({"tool": "", "host": "a.example"}, {"tool": "", "host": "b.example"}, False, id="without a tool, two hosts"),
    ],
)
def test_what_belongs_together_is_one_cluster(log, first, second, together):
    for each in (first, second):
        log.decide(**{"decision": UNDECLARED, **SEARCH, **each})
    assert [each.count for each in found(log)] == ([2] if together else [1, 1])


def test_a_clusters_id_is_the_same_on_every_machine(log):
    log.decide(UNDECLARED, tool="shop", operation="GET /items/7")
    words = b'["bot","shop GET /items/*","operation_not_declared","tools/shop.yaml#/spec",false]'
    assert found(log)[0].id == hashlib.sha256(words).hexdigest()[:12]


def test_a_cluster_says_what_happened_when_and_shows_the_latest(log):
    violations = (Violation("/path/owner", "a.yaml#/enum", "is none of the allowed"),)
    invalid = deny(Code.PARAMS_INVALID, "no", rule="a.yaml#/enum", violations=violations)
    for number in range(25):
        log.decide(invalid, **SEARCH, params={"path": {"owner": f"o{number}"}}, run_id="r")
    (one,) = found(log)
    assert (one.kind, one.agent, one.what, one.code, one.rule) == (
        DenialKind.PERMISSION,
        "bot",
        "wiki/search",
        "params_invalid",
        "a.yaml#/enum",
    )
    assert (one.count, one.first, one.last, one.shadow, one.ever_allowed, one.label) == (
        25,
        NOW + 1,
        NOW + 25,
        False,
        False,
        None,
    )
    example, decision_ids = latest(log.index, one)
    assert decision_ids == tuple(f"d-{number}" for number in range(25, 5, -1))
    assert example == {
        "time": "2023-11-14T22:13:45.000000Z",
        "decision_id": "d-25",
        "run_id": "r",
        "method": "POST",
        "host": "wiki.example",
        "path": "/mcp",
        "args": {"path": {"owner": "o24"}},
        "violations": [{"pointer": "/path/owner", "rule": "a.yaml#/enum", "message": "is none of the allowed"}],
        "detail": "no",
    }


def test_a_call_that_the_broker_ended_is_shown_with_what_its_decision_says(log):
    call = log.decide(ALLOW, **SEARCH, params={"arguments": {"q": "x"}})
    log.append(alert_record, "look at this", {"agent": {"name": "bot"}}, ["d-1"])
    log.end(call, code="response_blocked", detail="a credential in it")
    (one,) = found(log)
    assert (one.kind, one.code, one.what, one.ever_allowed) == (DenialKind.FAULT, "response_blocked", "wiki/search", True)
    example, decision_ids = latest(log.index, one)
    assert (example["path"], example["args"]) == ("/mcp", {"arguments": {"q": "x"}})
    assert (example["detail"], decision_ids) == ("a credential in it", ("d-1",))
    assert [record["args"] for record in records(log.index, one.id, 5)] == [{"arguments": {"q": "x"}}]


def test_permissions_come_first_and_of_a_kind_the_most_frequent(log):
    log.decide(deny(Code.RATE_LIMITED, "no"), **SEARCH)
    log.decide(deny(Code.RATE_LIMITED, "no"), **SEARCH)
    log.decide(UNKNOWN_HOST, host="a.example")
    log.decide(UNDECLARED, **SEARCH)
    log.decide(UNDECLARED, **SEARCH)
    log.decide(deny(Code.APPROVAL_REQUIRED, "no"), **SEARCH)
    order = [(each.kind, each.count) for each in found(log)]
    assert order == [("permission", 2), ("permission", 1), ("people", 1), ("limit", 2)]


def test_only_denials_since_then_and_of_the_agent_are_counted(log):
    for agent in ("a", "b", "a"):
        log.decide(UNDECLARED, agent, **SEARCH)
    assert [(each.agent, each.count) for each in found(log)] == [("a", 2), ("b", 1)]
    assert [(each.agent, each.count) for each in found(log, agent="b")] == [("b", 1)]
    (late,) = found(log, since=NOW + 3)
    assert (late.count, late.first, latest(log.index, late)[1]) == (1, NOW + 3, ("d-3",))
    assert found(log, since=NOW + 4) == []


def test_without_denials_there_are_no_clusters(log):
    log.end(log.decide(ALLOW, **SEARCH), status=200)
    assert found(log) == []


@pytest.mark.parametrize(
    ("allowed", "denied", "ever"),
    [
        pytest.param(SEARCH, SEARCH, True, id="the same operation"),
        pytest.param({**SEARCH, "operation": "read"}, SEARCH, False, id="another operation of the tool"),
        pytest.param(SEARCH, {**SEARCH, "operation": ""}, True, id="a request to the tool that names no operation"),
        pytest.param({**SEARCH, "tool": "shop"}, {**SEARCH, "tool": "wiki"}, False, id="the operation of another tool"),
        pytest.param({**SEARCH, "agent": "other"}, SEARCH, False, id="another agent"),
        pytest.param(SEARCH, {"host": "wiki.example"}, True, id="without a tool, the same host"),
        pytest.param(SEARCH, {"host": "evil.example"}, False, id="without a tool, another host"),
    ],
)
def test_whether_the_same_was_ever_allowed(log, allowed, denied, ever):
    log.decide(ALLOW, **allowed)
    log.decide(UNDECLARED, **denied)
    assert [each.ever_allowed for each in found(log)] == [ever]


def test_what_passed_in_shadow_mode_was_not_allowed(log):
    log.end(log.decide(WOULD, **SEARCH), status=200)
    log.decide(deny(Code.PARAMS_INVALID, "no", rule="r"), **SEARCH)
    both = found(log)
    assert [(each.shadow, each.ever_allowed) for each in both] == [(False, False), (True, False)]
    assert both[0].id != both[1].id


def test_a_label_shows_until_it_expires(log):
    log.decide(UNDECLARED, **SEARCH)
    (one,) = found(log)
    label = Label("expected", "ticket 7", "jo", NOW, NOW + 60)
    log.index.label(one.id, label)
    assert clusters(log.open(), NOW + 59)[0].label == label
    assert clusters(log.open(), NOW + 60)[0].label is None


def test_a_code_of_a_newer_broker_is_shown(log):
    log.append(lambda now, mono: {**decision_record(now, mono, Attempt("d-1", "", {}), UNDECLARED), "code": "new_code"})
    assert [(each.code, each.kind, each.what) for each in found(log)] == [("new_code", "fault", "")]


SECRET = "sk_live_abcdef0123456789"
ODD = "\x1b[2J\x9b31m\u202egpj"


@pytest.mark.parametrize(
    "carried",
    [
        pytest.param({"host": f"{SECRET}.example"}, id="in the host"),
        pytest.param({"path": f"/x/{SECRET}/y"}, id="in the path"),
        pytest.param({"operation": f"GET /x/{SECRET}/y"}, id="in what was tried"),
        pytest.param({"run_id": SECRET}, id="in the run ID"),
        pytest.param({"method": SECRET}, id="in the method"),
        pytest.param({"params": {"body": {"title": f"see {SECRET} here"}}}, id="in an argument"),
        pytest.param({"params": {"body": {SECRET: [SECRET]}}}, id="in an argument's name"),
        pytest.param(
            {"decision": deny(Code.PARAMS_INVALID, SECRET, violations=(Violation(SECRET, "r", SECRET),))}, id="in words"
        ),
        pytest.param({"agent": SECRET}, id="in an agent's name"),
    ],
)
def test_no_cluster_shows_a_secret_whatever_the_call_carried(log, carried):
    log.decide(**{"decision": UNDECLARED, **SEARCH, **carried})
    (one,) = found(log)
    assert "abcdef0123456789" not in f"{one} {latest(log.index, one)}"


def test_not_even_one_that_an_older_broker_recorded(log):
    raw = {"operation": f"GET /x/{SECRET}", "path": f"/x/{SECRET}", "args": {SECRET: [SECRET]}, "rule": f"{SECRET}#"}
    log.append(lambda now, mono: {**decision_record(now, mono, Attempt("d-1", "", {}, **SEARCH), UNDECLARED), **raw})
    (one,) = found(log)
    assert "abcdef0123456789" not in f"{one} {latest(log.index, one)}"
    assert latest(log.index, one)[0]["args"] == {"[redacted]": ["[redacted]"]}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
@settings(deadline=None)
def test_hiding_changes_nothing_else(value):
    assert hidden(value) == value


# What a proposal is made of.


def test_decisions_come_as_they_are_in_the_log_in_the_order_asked_for(log):
    for _ in range(3):
        log.decide(UNDECLARED, **SEARCH)
    log.append(alert_record, "look", {"agent": {"name": "bot"}}, ["d-1"])
    got = list(decisions(log.open(), ["d-3", "nonsense", "d-1"]))
    assert [record["decision_id"] for record in got] == ["d-3", "d-1"]
    assert set(got[0]) >= {"seq", "hash", "args", "args_hash", "violations"}


def test_the_records_of_a_cluster_come_latest_first_and_each_call_once(log):
    for title in ("a", "b", "a", "c", "c"):
        log.decide(UNDECLARED, **SEARCH, params={"body": {"title": title}})
    log.decide(UNKNOWN_HOST, host="x.example")
    cluster = found(log)[0].id
    assert [record["decision_id"] for record in records(log.index, cluster, 10)] == ["d-5", "d-3", "d-2"]
    assert [record["decision_id"] for record in records(log.index, cluster, 2)] == ["d-5", "d-3"]
    assert records(log.index, "0" * 12, 2) == []
    assert (exists(log.index, cluster), exists(log.index, "0" * 12)) == (True, False)


def test_no_more_records_of_a_cluster_are_looked_at_than_its_bound(log, monkeypatch):
    monkeypatch.setattr(review, "_LOOKED_AT", 2)
    for title in ("a", "b", "b"):
        log.decide(UNDECLARED, **SEARCH, params={"body": {"title": title}})
    assert [record["decision_id"] for record in records(log.open(), found(log)[0].id, 10)] == ["d-3"]


def test_what_would_have_been_denied_comes_in_the_logs_order(log):
    for agent, decision in (("a", WOULD), ("b", WOULD), ("a", UNDECLARED), ("a", WOULD)):
        log.decide(decision, agent, **SEARCH)
    assert [record["decision_id"] for record in shadowed(log.open(), "a")] == ["d-1", "d-4"]
    assert orjson.dumps(list(shadowed(log.index, "nobody"))) == b"[]"


def test_what_the_canary_tries_is_in_nobodys_way(log):
    log.decide(UNKNOWN_HOST, host="must-deny.invalid:443")
    log.decide(UNDECLARED, host="must-deny.invalid", tool="shop")
    assert [each.code for each in clusters(log.open(), NOW)] == ["operation_not_declared"]
