"""Policy tests: through the real exchange, by every form of call, with what went before; each expectation can fail."""

import json
from pathlib import Path

import pytest

from broker.manifest.load import load_texts
from broker.review.policytests import coverage, results

NOW = 1_800_000_000.0
LOOPBACK = {"addresses": ["127.0.0.0/8"]}
AMOUNT = {"type": "object", "properties": {"amount": {"type": "integer", "maximum": 100}}, "additionalProperties": False}


def document(kind, name, **spec):
    metadata = {"name": name, "owner": "team", "oncall": "team"}
    return json.dumps({"apiVersion": "broker/v1", "kind": kind, "metadata": metadata, "spec": spec}).encode()


TEXTS = {
    "bank.yaml": document(
        "Tool", "bank", protocol="rest", endpoint="https://bank.example",
        credential={"issuer": "static", "secret": {"env": "NOT_SET"}},
        operations={
            "pay": {"match": {"method": "POST", "path": "/pay"}, "effect": "write", "params": {"body": AMOUNT}},
            "book": {"match": {"method": "POST", "path": "/book"}, "effect": "write", "params": {"body": AMOUNT}},
            "see": {"match": {"method": "GET", "path": "/see"}, "effect": "read", "data": ["untrusted"]},
        },
    ),
    "wiki.yaml": document(
        "Tool", "wiki", protocol="mcp", endpoint="http://127.0.0.1:2/mcp", upstream=LOOPBACK,
        operations={"search": {"effect": "read"}, "drop": {"effect": "destructive", "match": {"tool": "delete_all"}}},
    ),
    "gpt.yaml": document(
        "Tool", "gpt", protocol="openai", endpoint="https://models.example", operations={"chat.completions": {"effect": "read"}}
    ),
    "bot.yaml": document(
        "Agent", "bot", identity={"spiffe": "spiffe://acme.example/bot"}, limits={"calls": "10/day", "usd": "5/day"},
        tools={
            "bank": {"operations": {"pay": {"approval": {"approvers": 2, "groups": ["money"]}}, "see": {}, "book": {}}},
            "wiki": {"operations": {"search": {}}},
            "gpt": {"operations": {"chat.completions": {"params": {"body": {"properties": {"model": {"const": "small"}}}}}}},
        },
    ),
    "platform.yaml": document(
        "Platform", "acme", prices={"openai": {"small": {"input": 1, "output": 1}}},
        flow=[{"after": ["untrusted"], "deny": {"effect": "write"}}],
    ),
}  # fmt: skip


def run(*cases, **changed):
    text = document("PolicyTest", "bot", agent="bot", cases=[{"name": f"case {n}", **case} for n, case in enumerate(cases)])
    loaded = load_texts({**TEXTS, "test.yaml": text, **changed}, Path())
    assert loaded.snapshot, loaded.findings
    return loaded.snapshot, tuple(results(loaded.snapshot, loaded.sources, NOW))


def http(method, path, body=None):
    return {"method": method, "url": f"https://bank.example{path}", **({} if body is None else {"body": body})}


PAY = http("POST", "/pay", {"amount": 5})
BOOK = http("POST", "/book", {"amount": 5})
SEE = http("GET", "/see")
CHAT = {"tool": "gpt", "operation": "chat.completions", "body": {"model": "small", "messages": [], "max_tokens": 9}}
ALLOW = {"verdict": "allow"}


def denied(code, **more):
    return {"verdict": "deny", "code": code, **more}


@pytest.mark.parametrize(
    ("call", "state", "expect"),
    [
        pytest.param(SEE, {}, {**ALLOW, "operation": "bank/see", "credential": "static"}, id="an HTTP call"),
        pytest.param(
            http("POST", "/pay", {"amount": 101}),
            {},
            denied("params_invalid", pointer="/body/amount"),
            id="a parameter out of bounds",
        ),
        pytest.param(http("DELETE", "/pay"), {}, denied("operation_not_declared"), id="no operation"),
        pytest.param({"method": "GET", "url": "https://evil.example/"}, {}, denied("host_not_declared"), id="no host"),
        pytest.param({"tool": "wiki", "operation": "search", "arguments": {"q": 1}}, {}, ALLOW, id="an MCP call"),
        pytest.param(
            {"tool": "wiki", "operation": "drop"},
            {},
            denied("operation_not_declared", operation="wiki/drop"),
            id="another MCP call",
        ),
        pytest.param(CHAT, {}, {**ALLOW, "operation": "gpt/chat.completions"}, id="a model call"),
        pytest.param(
            {**CHAT, "body": {"model": "large", "messages": []}},
            {},
            denied("params_invalid", pointer="/body/model"),
            id="its model",
        ),
        pytest.param(PAY, {}, denied("approval_required"), id="nobody has approved it"),
        pytest.param(PAY, {"approvals": 1}, denied("approval_required"), id="one person is not two"),
        pytest.param(PAY, {"approvals": 2}, ALLOW, id="two people approve it"),
        pytest.param(SEE, {"spent": {"calls": 9}}, ALLOW, id="the last call of the day"),
        pytest.param(SEE, {"spent": {"calls": 10}}, denied("rate_limited"), id="one more"),
        pytest.param(CHAT, {"spent": {"usd": "4.99"}}, ALLOW, id="a cent is left"),
        pytest.param(CHAT, {"spent": {"usd": 5}}, denied("budget_exhausted"), id="nothing is left"),
        pytest.param(BOOK, {}, ALLOW, id="a write"),
        pytest.param(BOOK, {"labels": ["untrusted"]}, denied("flow_forbidden"), id="a write after a stranger's text"),
        pytest.param(BOOK, {"labels": ["internal"]}, ALLOW, id="a label that no rule names"),
    ],
)
def test_a_case_gets_what_the_broker_would_say(call, state, expect):
    _, (result,) = run({"call": call, "state": state, "expect": expect})
    assert result.wrong == ""


@pytest.mark.parametrize(
    ("expect", "wrong"),
    [
        ({"verdict": "deny"}, "expected verdict deny; got allow of bank/see"),
        ({**ALLOW, "operation": "bank/pay"}, "expected operation bank/pay; got allow of bank/see (operation bank/see)"),
        ({**ALLOW, "credential": "oauth"}, "expected credential oauth; got allow of bank/see (credential static)"),
        ({**ALLOW, "pointer": "/x"}, "expected pointer /x; got allow of bank/see (pointer None)"),
    ],
    ids=["verdict", "operation", "credential", "pointer"],
)
def test_a_case_that_expects_something_else_fails_and_says_what_it_got(expect, wrong):
    _, (result,) = run({"call": SEE, "expect": expect})
    assert result.wrong == wrong
    assert result.finding.code == "test_failed"
    assert (result.file, result.line) == ("test.yaml", 1)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        ({"method": "GET", "url": "nowhere"}, "'nowhere' is no http(s) URL"),
        ({"method": "GET", "url": "http://[::1"}, "'http://[::1' is no http(s) URL"),
        ({"tool": "gone", "operation": "x"}, "the catalog has no tool 'gone'"),
        ({"tool": "bank", "operation": "gone"}, "bank/gone is not known by its name alone"),
    ],
    ids=["no URL", "half an address", "no tool", "no name by itself"],
)
def test_a_call_that_can_not_be_made_fails_its_case(call, wrong):
    _, (result,) = run({"call": call, "expect": {"verdict": "deny"}})
    assert result.wrong.startswith(wrong)


@pytest.mark.parametrize(
    "call",
    [{}, {"method": "GET"}, {**SEE, "tool": "bank", "operation": "see"}, {"tool": "wiki"}, {**SEE, "arguments": {}}],
    ids=["nothing", "half", "both", "half a name", "arguments of no tool"],
)
def test_a_call_is_written_in_one_form(call):
    text = document("PolicyTest", "bot", agent="bot", cases=[{"name": "x", "call": call, "expect": ALLOW}])
    loaded = load_texts({**TEXTS, "test.yaml": text}, Path())
    assert [finding.code for finding in loaded.findings if finding.severity == "error"] == ["field_invalid"]


def test_cases_do_not_see_each_other():
    _, found = run(*[{"call": SEE, "state": {"spent": {"calls": 9}}, "expect": ALLOW}] * 3)
    assert [result.wrong for result in found] == ["", "", ""]


def test_coverage_counts_operations_that_a_passing_case_shows_to_be_allowed():
    snapshot, found = run({"call": SEE, "expect": ALLOW}, {"call": PAY, "expect": ALLOW}, {"call": CHAT, "expect": ALLOW})
    assert coverage(snapshot, found) == {"bot": (5, ("bank/book", "bank/pay", "wiki/search"))}


def test_shadow_mode_shows_as_would_deny():
    shadow = json.loads(TEXTS["bot.yaml"])
    shadow["spec"] |= {"mode": "shadow", "shadow_until": "2099-01-31"}
    expect = {"verdict": "would_deny", "code": "operation_not_declared"}
    _, (result,) = run({"call": http("DELETE", "/pay"), "expect": expect}, **{"bot.yaml": json.dumps(shadow).encode()})
    assert (result.wrong, result.allowed) == ("", "")


@pytest.mark.parametrize(
    ("expect", "wrong"),
    [({}, "there is no manifest of 'bto'"), ({"code": "agent_unknown"}, "")],
    ids=["any denial", "that it is unknown"],
)
def test_a_denial_proves_nothing_for_an_agent_that_there_is_not(expect, wrong):
    call = {"method": "GET", "url": "https://bank.example/see"}
    text = document(
        "PolicyTest", "bto", agent="bto", cases=[{"name": "x", "call": call, "expect": {"verdict": "deny", **expect}}]
    )
    loaded = load_texts({**TEXTS, "test.yaml": text}, Path())
    (found,) = results(loaded.snapshot, loaded.sources, NOW)
    assert found.wrong == wrong
