"""The precedence, sentence by sentence: verdict and reason."""

import pytest

from broker.policy.approval import Approval
from broker.policy.evaluate import View, admit, approval_for, evaluate
from broker.policy.limits import Limit
from broker.policy.providers import api_at
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import Agent, Endpoint, Grant, Operation, PolicySnapshot, Tool
from broker.policy.types import Code, Decision, Effect, ModelCall, ToolCall, Verdict

NOW = 1_800_000_000.0
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
ASKED = Approval("agents/bot.yaml#/merge/approval", 2)
GRANTS = {"refund": Grant("agents/bot.yaml#/refund", {"body": NARROW}), "merge": Grant("agents/bot.yaml#/merge", approval=ASKED)}
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
    decision = admit(SNAPSHOT, agent, view, NOW)
    assert isinstance(decision, Decision)
    assert (decision.verdict, decision.code) == (Verdict.DENY, code)


def test_who_is_admitted():
    assert admit(SNAPSHOT, "bot", View(), NOW) is BOT


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
    ],
)
def test_what_is_denied_and_by_which_rule(attempt, code, rule):
    decision = evaluate(SNAPSHOT, BOT, attempt, NOW)
    assert (decision.verdict, decision.code, decision.rule) == (Verdict.DENY, code, rule)
    assert not decision.allowed


def test_an_agent_that_may_only_read_is_denied_what_changes_something():
    view = View(read_only="r-1")
    decision = evaluate(SNAPSHOT, BOT, call("refund", body={"amount": 5}), NOW, view)
    assert (decision.code, "(r-1)" in decision.detail) == (Code.AGENT_READ_ONLY, True)
    assert evaluate(SNAPSHOT, BOT, call("refund", body={"amount": 51}), NOW, view).code is Code.PARAMS_INVALID


@pytest.mark.parametrize(
    ("operation", "effect", "view", "rule"),
    [
        pytest.param("merge", Effect.DESTRUCTIVE, View(), ASKED.rule, id="the manifest asks"),
        pytest.param("refund", Effect.WRITE, View(), None, id="nobody asks"),
        pytest.param("refund", Effect.WRITE, View(hold="odd"), "held: odd", id="the agent is held, and this writes"),
        pytest.param("refund", Effect.READ, View(hold="odd"), None, id="the agent is held, and this only reads"),
        pytest.param("merge", Effect.DESTRUCTIVE, View(hold="odd"), ASKED.rule, id="both: the manifest may ask for more people"),
        pytest.param("refund", None, View(hold="odd"), None, id="a protocol's own traffic"),
    ],
)
def test_who_must_say_yes(operation, effect, view, rule):
    need = approval_for(BOT, call(operation), effect, view)
    assert (need and need.rule) == rule


LARGE = {"body": ParameterSchema({"properties": {"amount": {"minimum": 100}}, "required": ["amount"]}, "r#")}


@pytest.mark.parametrize(
    ("params", "asked"),
    [
        pytest.param({"body": {"amount": 100}}, True, id="it fits"),
        pytest.param({"body": {"amount": 99}}, False, id="it does not fit"),
        pytest.param({"path": {}, "body": {"amount": 100}}, True, id="other locations don't matter"),
        pytest.param({"path": {}}, True, id="a body that was not read could say anything"),
        pytest.param({"body": {"amount": "100"}}, True, id="text is no number below the minimum"),
    ],
)
def test_when_narrows_what_is_asked_about(params, asked):
    assert Approval("r#", when=LARGE).bears_on(ToolCall("pay", "refund", params)) is asked


def test_several_violations_are_counted_in_the_detail():
    schema = ParameterSchema({"required": ["a"], "maxProperties": 0}, "r#")
    tool = Tool(
        "pay", "t", "rest", PAY.endpoint, "r#", {"refund": Operation("refund", Effect.WRITE, "r#", schemas={"body": schema})}
    )
    snapshot = PolicySnapshot("1", {}, {"pay": tool}, {}, {})
    decision = evaluate(snapshot, BOT, call("refund", body={"b": 1}), NOW)
    assert decision.detail.endswith("(and 1 more)")
    assert len(decision.violations) == 2


def test_an_agent_with_an_empty_tools_map_may_do_nothing():
    nobody = Agent("nobody", "team", "primary", "agents/nobody.yaml#", {})
    assert evaluate(SNAPSHOT, nobody, call("refund", body={}), NOW).code is Code.TOOL_NOT_DECLARED


def test_within_both_schemas_it_is_allowed():
    decision = evaluate(SNAPSHOT, BOT, call("refund", body={"amount": 50}), NOW)
    assert (decision.verdict, decision.code, decision.allowed) == (Verdict.ALLOW, None, True)


def test_a_protocols_housekeeping_passes_for_an_agent_that_holds_the_tool_and_for_no_other():
    holder = Agent("holder", "team", "primary", "a#", {"wiki": {}})
    ping = ToolCall("wiki", None, housekeeping=True, label="ping")
    assert evaluate(SNAPSHOT, holder, ping, NOW).verdict is Verdict.ALLOW
    assert evaluate(SNAPSHOT, BOT, ping, NOW).code is Code.TOOL_NOT_DECLARED


# Calls of models.

GPT = Tool("gpt", "t", "openai", PAY.endpoint, "tools/gpt.yaml#", {"ask": Operation("ask", Effect.READ, "tools/gpt.yaml#/ask")})
MODELS = PolicySnapshot("1", {}, {"gpt": GPT}, {}, {})


def ask(models=("m", "n"), granted=(), name="m", tools=()):
    grant = Grant("agents/bot.yaml#/ask", models=frozenset(models), server_tools=frozenset(granted))
    model = ModelCall(name, 10, "sha256:0", server_tools=tools)
    return evaluate(
        MODELS, Agent("bot", "t", "p", "a#", {"gpt": {"ask": grant}}), ToolCall("gpt", "ask", label="POST", model=model), NOW
    )


SEARCH, IMAGE = ("/body/tools/0/type", "web_search"), ("/body/input/0/image_url", "url")


@pytest.mark.parametrize(
    ("decision", "violations"),
    [
        pytest.param(ask(), [], id="a model that the manifest names"),
        pytest.param(ask(granted=["url", "web_search"], tools=(SEARCH, IMAGE)), [], id="what the manifest lets the provider do"),
        pytest.param(
            ask(name="o"),
            [("/body/model", "agents/bot.yaml#/ask/params/body/properties/model", "the manifest names these models: m, n")],
            id="another model",
        ),
        pytest.param(
            ask(models=()),
            [
                (
                    "/body/model",
                    "agents/bot.yaml#/ask/params/body/properties/model",
                    "the manifest names no model; write them there, as an enum",
                )
            ],
            id="a manifest that names no model",
        ),
        pytest.param(
            ask(granted=["url"], tools=(SEARCH, IMAGE)),
            [
                (
                    "/body/tools/0/type",
                    "agents/bot.yaml#/ask/server_tools",
                    "the provider would run or fetch this by itself, and the manifest's server_tools don't name it: web_search",
                )
            ],
            id="what the provider would do by itself",
        ),
    ],
)
def test_a_model_call_needs_its_model_and_what_the_provider_would_do_in_the_manifest(decision, violations):
    assert [(each.pointer, each.rule, each.message) for each in decision.violations] == violations
    assert decision.code is (Code.PARAMS_INVALID if violations else None)
    assert decision.rule == (violations[0][1] if violations else "")


@pytest.mark.parametrize(
    ("protocol", "method", "path", "api"),
    [
        pytest.param("openai", "POST", "/v1/chat/completions", "chat.completions", id="an API"),
        pytest.param("openai", "POST", "/v1/Chat/Completions/", "chat.completions", id="as sloppy servers read it"),
        pytest.param("openai", "POST", "/responses", "responses", id="right below a base path"),
        pytest.param("anthropic", "POST", "/v1/messages", "messages", id="another provider's"),
        pytest.param("openai", "POST", "/v1/messages", None, id="not this provider's"),
        pytest.param("openai", "GET", "/v1/responses", None, id="another method"),
        pytest.param("anthropic", "POST", "/v1/messages/count_tokens", None, id="something below"),
        pytest.param("rest", "POST", "/v1/responses", None, id="no provider"),
    ],
)
def test_which_api_a_request_calls(protocol, method, path, api):
    assert api_at(protocol, method, path) == api


# What ends by itself, and shadow mode.

PAYS = {"refund": GRANTS["refund"]}


def shadowed(until=NOW + 1, tools=None):
    """The bot in shadow mode, which may then use the catalog's refunds and lists, and what it does not know of `wiki`."""
    exposed = {"pay": {"refund": Grant("s#"), "list": Grant("s#")}, "wiki": {"": Grant("s#")}}
    agent = Agent("bot", "t", "p", "a#", {"pay": PAYS} if tools is None else tools, shadow=exposed, shadow_until=until)
    return agent.at(NOW)


@pytest.mark.parametrize(
    ("agent", "attempt", "verdict", "code"),
    [
        pytest.param(shadowed(), call("refund", body={"amount": 5}), Verdict.ALLOW, None, id="what is permitted is allowed"),
        pytest.param(shadowed(), call("list"), Verdict.WOULD_DENY, Code.OPERATION_NOT_DECLARED, id="not listed"),
        pytest.param(
            shadowed(),
            call("refund", body={"amount": 51}),
            Verdict.WOULD_DENY,
            Code.PARAMS_INVALID,
            id="parameters that break a rule",
        ),
        pytest.param(
            shadowed(tools={}), call("list"), Verdict.WOULD_DENY, Code.TOOL_NOT_DECLARED, id="a tool that is not listed"
        ),
        pytest.param(
            shadowed(tools={"wiki": {}}), call(None, "wiki"), Verdict.WOULD_DENY, Code.OPERATION_NOT_DECLARED, id="nothing known"
        ),
        pytest.param(shadowed(), call("merge"), Verdict.DENY, Code.OPERATION_NOT_DECLARED, id="what shadow mode does not expose"),
        pytest.param(shadowed(NOW), call("list"), Verdict.DENY, Code.OPERATION_NOT_DECLARED, id="shadow mode has ended"),
        pytest.param(
            shadowed(NOW), call("refund", body={"amount": 51}), Verdict.DENY, Code.PARAMS_INVALID, id="and with it for parameters"
        ),
        pytest.param(
            shadowed(tools={}),
            ToolCall("wiki", None, housekeeping=True),
            Verdict.WOULD_DENY,
            Code.TOOL_NOT_DECLARED,
            id="a protocol's own traffic",
        ),
    ],
)
def test_in_shadow_mode(agent, attempt, verdict, code):
    decision = evaluate(SNAPSHOT, agent, attempt, NOW)
    assert (decision.verdict, decision.code) == (verdict, code)


def granted(**grant):
    return Agent("bot", "t", "p", "a#", {"pay": {"refund": Grant("g#", {"body": NARROW}, **grant)}})


@pytest.mark.parametrize(
    ("grant", "amount", "verdict", "code"),
    [
        pytest.param({"shadow_until": NOW + 1}, 51, Verdict.WOULD_DENY, Code.PARAMS_INVALID, id="an operation in shadow"),
        pytest.param({"shadow_until": NOW}, 51, Verdict.DENY, Code.PARAMS_INVALID, id="no longer"),
        pytest.param({"expires": NOW + 1}, 5, Verdict.ALLOW, None, id="a grant that has not lapsed"),
        pytest.param({"expires": NOW}, 5, Verdict.DENY, Code.OPERATION_NOT_DECLARED, id="one that has"),
        pytest.param(
            {"expires": NOW, "shadow_until": NOW + 1}, 5, Verdict.DENY, Code.OPERATION_NOT_DECLARED, id="and its shadow with it"
        ),
    ],
)
def test_a_grant_ends_by_itself(grant, amount, verdict, code):
    decision = evaluate(SNAPSHOT, granted(**grant), call("refund", body={"amount": amount}), NOW)
    assert (decision.verdict, decision.code) == (verdict, code)


@pytest.mark.parametrize(
    ("tools", "granted", "verdict"),
    [
        pytest.param((SEARCH,), (), Verdict.DENY, id="not named"),
        pytest.param((SEARCH, IMAGE), ("url",), Verdict.DENY, id="one of them is"),
        pytest.param((SEARCH,), ("web_search",), Verdict.WOULD_DENY, id="named, of a model that is not"),
        pytest.param((), (), Verdict.WOULD_DENY, id="nothing"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["of the agent", "of an operation"])
def test_in_shadow_mode_a_provider_fetches_and_runs_by_itself_what_is_named_only(tools, granted, verdict, whole):
    """It would reach hosts that the catalog does not have, with our credential, and nobody could count what that costs."""
    grant = Grant("g#", models=frozenset({"m"}), server_tools=frozenset(granted), shadow_until=0 if whole else NOW + 1)
    exposed = {"gpt": {"ask": Grant("s#")}} if whole else {}
    agent = Agent("bot", "t", "p", "a#", {"gpt": {"ask": grant}}, shadow=exposed, shadow_until=NOW + 1 if whole else 0.0)
    attempt = ToolCall("gpt", "ask", model=ModelCall("other", 10, "sha256:0", server_tools=tools))
    decision = evaluate(MODELS, agent, attempt, NOW)
    assert (decision.verdict, decision.code) == (verdict, Code.PARAMS_INVALID)


PING = ToolCall("wiki", None, housekeeping=True)


@pytest.mark.parametrize(
    ("grants", "code"),
    [
        pytest.param({"a": Grant("g#", expires=NOW), "b": Grant("g#", expires=NOW + 1)}, None, id="one has not lapsed"),
        pytest.param({"a": Grant("g#", expires=NOW)}, Code.TOOL_NOT_DECLARED, id="all have"),
        pytest.param({}, None, id="nothing is granted but the tool"),
    ],
)
def test_a_protocol_s_own_traffic_ends_with_the_last_grant(grants, code):
    assert evaluate(SNAPSHOT, Agent("bot", "t", "p", "a#", {"wiki": grants}), PING, NOW).code is code


def test_shadow_mode_that_has_ended_since_the_agent_was_admitted_has_ended():
    assert evaluate(SNAPSHOT, shadowed(), call("list"), NOW + 1).verdict is Verdict.DENY


def test_parameters_that_are_not_valid_count_as_those_that_need_approval():
    asked = Approval("a#", when={"body": NARROW})
    agent = Agent("bot", "t", "p", "a#", {"pay": {"refund": Grant("g#", approval=asked)}})
    attempt = call("refund", body={"amount": 51})
    assert approval_for(agent, attempt, Effect.WRITE) is None
    assert approval_for(agent, attempt, Effect.WRITE, valid=False) is asked


def test_containment_is_enforced_in_shadow_mode():
    view = View(read_only="r-1", hold="h-1")
    assert evaluate(SNAPSHOT, shadowed(), call("list"), NOW, view).verdict is Verdict.WOULD_DENY, "a read"
    assert evaluate(SNAPSHOT, shadowed(), call("refund", body={"amount": 51}), NOW, view).code is Code.AGENT_READ_ONLY
    unknown = evaluate(SNAPSHOT, shadowed(tools={"wiki": {}}), call(None, "wiki"), NOW, view)
    assert (unknown.verdict, unknown.code) == (Verdict.DENY, Code.AGENT_READ_ONLY), "what nobody knows may be the worst"
    ping = ToolCall("wiki", None, housekeeping=True)
    assert evaluate(SNAPSHOT, shadowed(tools={}), ping, NOW, view).verdict is Verdict.WOULD_DENY, "a protocol's own traffic"
    assert approval_for(shadowed(), call("refund"), Effect.WRITE, view).rule == "held: h-1"


def test_what_limits_a_call_in_shadow_mode_is_what_limits_the_agent():
    bounds = (Limit("calls", "agent/bot", 1, "a#"),)
    agent = Agent("bot", "t", "p", "a#", {}, shadow={"pay": {"list": Grant("s#", limits=bounds)}}, shadow_until=NOW + 1)
    assert agent.bounds(call("list")) == bounds
    assert BOT.at(NOW) is BOT
