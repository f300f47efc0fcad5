"""Every code has words, a status and next steps."""

import json

import pytest

from broker.policy.types import Code, Decision, Door, Refusal, Verdict, Violation, deny
from broker.protocols import problem as problems
from broker.protocols.registry import ADAPTERS


@pytest.mark.parametrize("code", list(Code))
def test_every_code_is_worded(code: Code) -> None:
    found = problems.problem("d1", "bot", "wiki", "search", deny(code, "why"))
    assert found["type"] == f"urn:broker:code:{code}"
    assert found["status"] == problems.STATUS[code]
    assert found["title"]
    steps = found["next_steps"]
    assert isinstance(steps, list)
    assert 1 <= len(steps) <= 3
    assert all(isinstance(step, str) and step.endswith(".") and "{" not in step for step in steps)


@pytest.mark.parametrize(
    ("code", "door", "status"),
    [
        pytest.param(Code.AGENT_UNKNOWN, Door.PROXY, 407, id="unknown at the proxy"),
        pytest.param(Code.AGENT_UNKNOWN, Door.BASE_URL, 401, id="unknown at a base URL"),
        pytest.param(Code.AGENT_REVOKED, Door.PROXY, 403, id="revoked"),
        pytest.param(Code.PARAMS_INVALID, Door.PROXY, 403, id="denied by policy"),
        pytest.param(Code.BODY_MALFORMED, Door.PROXY, 400, id="malformed"),
        pytest.param(Code.PROTOCOL_VIOLATION, Door.PROXY, 400, id="ambiguous"),
        pytest.param(Code.BODY_TOO_LARGE, Door.PROXY, 413, id="too large"),
        pytest.param(Code.ENCODING_NOT_ALLOWED, Door.PROXY, 415, id="encoding"),
        pytest.param(Code.RATE_LIMITED, Door.PROXY, 429, id="limits"),
        pytest.param(Code.AUDIT_UNAVAILABLE, Door.PROXY, 503, id="the broker's fault"),
    ],
)
def test_statuses(code: Code, door: Door, status: int) -> None:
    assert problems.status_at(code, door) == status


def test_a_problem_has_the_members_of_the_contract() -> None:
    decision = deny(Code.PARAMS_INVALID, "why", violations=(Violation("/path/owner", "agents/bot.yaml#/x", "no"),))
    assert problems.problem("d1", "bot", "github", "issues.create", decision) == {
        "type": "urn:broker:code:params_invalid",
        "title": "Parameters not allowed",
        "status": 403,
        "detail": "why",
        "code": "params_invalid",
        "decision_id": "d1",
        "agent": "bot",
        "tool": "github",
        "operation": "issues.create",
        "violations": [{"pointer": "/path/owner", "rule": "agents/bot.yaml#/x", "message": "no"}],
        "next_steps": [
            "Change what each violation's pointer names, then call again.",
            "If the call is right, widen the violated rule by a pull request to the file that it names.",
        ],
    }


def test_a_denial_says_how_to_widen() -> None:
    found = problems.problem("d1", "bot", "wiki", "search", deny(Code.OPERATION_NOT_DECLARED, "why"))
    assert "Ask for it by a pull request to the manifest of bot, and to the catalog if it is not there." in found["next_steps"]  # type: ignore[operator]


def test_a_decision_without_a_code_is_our_fault() -> None:
    assert problems.problem("d1", "", "", "", Decision(Verdict.DENY))["code"] == "internal_fault"


def test_names_with_braces_are_only_text() -> None:
    found = problems.problem("d1", "{0}", "{tool}", "x", Refusal(Code.TOOL_NOT_DECLARED, "why"))
    assert "the manifest of {0}," in found["next_steps"][1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("status", "challenge"),
    [
        pytest.param(403, None, id="a denial"),
        pytest.param(401, ("www-authenticate", 'Broker-Token realm="broker"'), id="401"),
        pytest.param(407, ("proxy-authenticate", 'Basic realm="broker"'), id="407"),
    ],
)
def test_replies(status: int, challenge: tuple[str, str] | None) -> None:
    found = problems.problem("d1", "bot", "", "", deny(Code.AGENT_UNKNOWN, "half a character: \ud800"))
    reply = problems.reply(found, status)
    assert reply.status == status
    assert json.loads(reply.body) == {**found, "status": status}
    expected = [("content-type", "application/problem+json"), ("x-broker-decision-id", "d1"), challenge]
    assert list(reply.headers) == [header for header in expected if header]


def test_the_registry_knows_each_adapter_by_its_word() -> None:
    assert {word: adapter.name for word, adapter in ADAPTERS.items()} == {
        word: word for word in ("anthropic", "mcp", "openai", "rest")
    }
