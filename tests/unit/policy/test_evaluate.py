"""The precedence, sentence by sentence: verdict and reason."""

import pytest

from broker.policy.evaluate import View, admit, evaluate
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import Agent, Endpoint, Grant, Operation, PolicySnapshot, Tool
from broker.policy.types import Code, Decision, Effect, ToolCall, Verdict

BODY = ParameterSchema({"type": "object", "properties": {"amount": {"type": "integer"}}}, "tools/pay.yaml#/body")
NARROW = ParameterSchema({"properties": {"amount": {"maximum": 50}}}, "agents/bot.yaml#/body")
PAY = Tool(
    "pay",
    "team",
    "rest",
    Endpoint("https", "pay.example", 443),
    "tools/pay.yaml#",
    {
        "refund": Operation("refund", Effect.WRITE, "tools/pay.yaml#/refund", schemas={"body": BODY}),
        "list": Operation("list", Effect.READ, "tools/pay.yaml#/list"),
        "merge": Operation("merge", Effect.DESTRUCTIVE, "tools/pay.yaml#/merge"),
    },
)
WIKI = Tool("wiki", "team", "mcp", Endpoint("https", "wiki.example", 443), "tools/wiki.yaml#", {})
GRANTS = {"refund": Grant("agents/bot.yaml#/refund", {"body": NARROW}), "merge": Grant("agents/bot.yaml#/merge", approval=True)}
BOT = Agent("bot", "team", "primary", "agents/bot.yaml#", {"pay": GRANTS})
SNAPSHOT = PolicySnapshot("sha256:1", {"bot": BOT}, {"pay": PAY, "wiki": WIKI}, {}, {})


def call(operation=None, tool="pay", **params):
    return ToolCall(tool, operation, params, label="POST /refunds")


@pytest.mark.parametrize(
    ("agent", "view", "code"),
    [
        pytest.param("bot", View(revoked=True), Code.AGENT_REVOKED, id="revoked comes before anything"),
        pytest.param("stranger", View(revoked=True), Code.AGENT_REVOKED, id="also for a name without a manifest"),
        pytest.param("stranger", View(), Code.AGENT_UNKNOWN, id="no manifest of that name"),
        pytest.param("", View(), Code.AGENT_UNKNOWN, id="no name"),
    ],
)
def test_who_is_not_admitted(agent, view, code):
    decision = admit(SNAPSHOT, agent, view)
    assert isinstance(decision, Decision)
    assert (decision.verdict, decision.code) == (Verdict.DENY, code)


def test_who_is_admitted():
    assert admit(SNAPSHOT, "bot", View()) is BOT


@pytest.mark.parametrize(
    ("attempt", "code", "rule"),
    [
        pytest.param(
            call("search", "wiki"),
            Code.TOOL_NOT_DECLARED,
            "agents/bot.yaml#/spec/tools",
            id="a tool that the manifest does not list",
        ),
        pytest.param(
            call(None), Code.OPERATION_NOT_DECLARED, "tools/pay.yaml#/spec/operations", id="a request that is no operation"
        ),
        pytest.param(
            call("gone"), Code.OPERATION_NOT_DECLARED, "tools/pay.yaml#/spec/operations", id="an operation that the catalog lost"
        ),
        pytest.param(
            call("list"),
            Code.OPERATION_NOT_DECLARED,
            "agents/bot.yaml#/spec/tools/pay/operations",
            id="an operation that the manifest does not list",
        ),
        pytest.param(
            call("refund", body={"amount": "x"}),
            Code.PARAMS_INVALID,
            "tools/pay.yaml#/body/properties/amount/type",
            id="the catalog's schema speaks first",
        ),
        pytest.param(
            call("refund", body={"amount": 51}),
            Code.PARAMS_INVALID,
            "agents/bot.yaml#/body/properties/amount/maximum",
            id="then the manifest's",
        ),
        pytest.param(call("refund"), Code.PARAMS_INVALID, "tools/pay.yaml#/body", id="a body that is not there"),
        pytest.param(call("merge"), Code.APPROVAL_REQUIRED, "agents/bot.yaml#/merge", id="an operation that waits for a human"),
    ],
)
def test_what_is_denied_and_by_which_rule(attempt, code, rule):
    decision = evaluate(SNAPSHOT, BOT, attempt)
    assert (decision.verdict, decision.code, decision.rule) == (Verdict.DENY, code, rule)
    assert not decision.allowed


def test_several_violations_are_counted_in_the_detail():
    schema = ParameterSchema({"required": ["a"], "maxProperties": 0}, "r#")
    tool = Tool(
        "pay", "t", "rest", PAY.endpoint, "r#", {"refund": Operation("refund", Effect.WRITE, "r#", schemas={"body": schema})}
    )
    snapshot = PolicySnapshot("1", {}, {"pay": tool}, {}, {})
    decision = evaluate(snapshot, BOT, call("refund", body={"b": 1}))
    assert decision.detail.endswith("(and 1 more)")
    assert len(decision.violations) == 2


def test_an_agent_with_an_empty_tools_map_may_do_nothing():
    nobody = Agent("nobody", "team", "primary", "agents/nobody.yaml#", {})
    assert evaluate(SNAPSHOT, nobody, call("refund", body={})).code is Code.TOOL_NOT_DECLARED


def test_within_both_schemas_it_is_allowed():
    decision = evaluate(SNAPSHOT, BOT, call("refund", body={"amount": 50}))
    assert (decision.verdict, decision.code, decision.allowed) == (Verdict.ALLOW, None, True)


def test_a_protocols_housekeeping_passes_for_an_agent_that_holds_the_tool_and_for_no_other():
    holder = Agent("holder", "team", "primary", "a#", {"wiki": {}})
    ping = ToolCall("wiki", None, housekeeping=True, label="ping")
    assert evaluate(SNAPSHOT, holder, ping).verdict is Verdict.ALLOW
    assert evaluate(SNAPSHOT, BOT, ping).code is Code.TOOL_NOT_DECLARED
