"""What is recorded, and what never is."""

import hashlib

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.audit import AuditUnavailable
from broker.audit.record import (
    Attempt,
    Ending,
    args_hash,
    canonical,
    config_record,
    decision_record,
    notice_record,
    outcome_record,
    redact,
)
from broker.policy.types import ALLOW, Code, Violation, deny

NOW = 1_700_000_000.25
AGENT = {
    "name": "refund-bot",
    "spiffe": "spiffe://acme.example/agents/refund-bot",
    "owner": "team-payments",
    "oncall": "payments",
}
LONG = "x" * 257

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.text(st.characters(categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=60,
)


@pytest.mark.parametrize(
    ("value", "recorded"),
    [
        pytest.param({"title": "Duplicate charge"}, {"title": "Duplicate charge"}, id="ordinary text is kept"),
        pytest.param(
            {"n": 1, "x": 1.5, "t": True, "z": None}, {"n": 1, "x": 1.5, "t": True, "z": None}, id="other scalars are kept"
        ),
        pytest.param({"title": "Grüße 東京"}, {"title": "Grüße 東京"}, id="other scripts are kept"),
        pytest.param({"password": "x"}, {"password": "[redacted]"}, id="a password is known by its key"),
        pytest.param({"userPassword": 1234}, {"userPassword": "[redacted]"}, id="a password may be a number"),
        pytest.param({"API-Key": "x"}, {"API-Key": "[redacted]"}, id="a key's spelling does not matter"),
        pytest.param({"client_secret": ["a", "b"]}, {"client_secret": "[redacted]"}, id="all below a credential's key goes"),
        pytest.param({"Authorization": "x"}, {"Authorization": "[redacted]"}, id="authorization"),
        pytest.param({"set-cookie": "x"}, {"set-cookie": "[redacted]"}, id="cookies"),
        pytest.param({"refreshToken": "x"}, {"refreshToken": "[redacted]"}, id="tokens"),
        pytest.param({"pin": "1"}, {"pin": "[redacted]"}, id="a pin"),
        pytest.param({"spinner": "1"}, {"spinner": "1"}, id="a spinner is no pin"),
        pytest.param({"max_tokens": 100}, {"max_tokens": 100}, id="a number of tokens is a count"),
        pytest.param({"tokens": "abc"}, {"tokens": "[redacted]"}, id="tokens that are text are not a count"),
        pytest.param({"a": "sk_live_51H"}, {"a": "[redacted]"}, id="a Stripe key"),
        pytest.param({"a": "see sk-proj-abcdefghijkl"}, {"a": "[redacted]"}, id="an OpenAI key inside a sentence"),
        pytest.param({"a": "risk-management"}, {"a": "risk-management"}, id="a risk is no key"),
        pytest.param({"a": "ghp_0123456789abcdef"}, {"a": "[redacted]"}, id="a GitHub token"),
        pytest.param({"a": "github_pat_11A"}, {"a": "[redacted]"}, id="a fine-grained GitHub token"),
        pytest.param({"a": "xoxb-1"}, {"a": "[redacted]"}, id="a Slack token"),
        pytest.param({"a": "AKIAIOSFODNN7EXAMPLE"}, {"a": "[redacted]"}, id="an AWS key ID"),
        pytest.param({"a": "eyJhbGciOiJ.eyJzdWIi.c2ln"}, {"a": "[redacted]"}, id="a JWT"),
        pytest.param({"a": "-----BEGIN PRIVATE KEY-----\n" + "A" * 2000}, {"a": "[redacted]"}, id="a PEM block"),
        pytest.param({"a": "Bearer abcdefgh12345"}, {"a": "[redacted]"}, id="an authorization value"),
        pytest.param({"a": "/x/gh%70%5F0123456789abcdef"}, {"a": "[redacted]"}, id="a token that is percent-encoded"),
        pytest.param(
            {"a": "-----BEGIN%20RSA%20PRIVATE%20KEY"}, {"a": "[redacted]"}, id="the beginning of a key, percent-encoded"
        ),
        pytest.param({"a": "100%25 sk"}, {"a": "100%25 sk"}, id="other percent signs"),
        pytest.param({"ghp_0123456789abcdef": 1}, {"[redacted]": 1}, id="a secret that is itself a key"),
        pytest.param({"a": [{"b": {"secret": "x"}}]}, {"a": [{"b": {"secret": "[redacted]"}}]}, id="at any depth"),
        pytest.param(
            {"a": LONG}, {"a": f"[257 chars sha256:{hashlib.sha256(LONG.encode()).hexdigest()}]"}, id="long text is its hash"
        ),
        pytest.param({"a": 2**70}, {"a": "[number of 71 bits]"}, id="a number beyond 64 bits"),
        pytest.param({"a": "\ud800"}, {"a": "\\ud800"}, id="a lone surrogate is spelled out"),
    ],
)
def test_redaction(value, recorded):
    assert redact(value, ("internal",)) == recorded


@pytest.mark.parametrize("kind", ["pii", "secret"])
def test_a_sensitive_operation_keeps_no_text_and_no_long_number(kind):
    recorded = redact({"body": {"name": "Jane Doe", "card": 4242424242424242, "cents": 1999, "list": ["a"]}}, ("internal", kind))
    assert recorded == {
        "body": {"name": f"[{kind} 8 chars]", "card": f"[{kind} number]", "cents": 1999, "list": [f"[{kind} 1 chars]"]}
    }


def test_what_is_too_deep_is_counted():
    value = {"a": 1}
    for _ in range(2000):
        value = {"a": value}
    text = orjson.dumps(redact(value, ()))
    assert b"[1 more, too deep]" in text
    assert text.count(b'"a"') == 16


def test_what_is_too_much_is_left_out_by_location():
    value = {"path": {"id": "7"}, "body": {"a": ["y" * 200] * 1000}}
    assert redact(value, ()) == {"path": {"id": "7"}, "body": "[203007 bytes left out]"}


@given(st.dictionaries(st.sampled_from(["path", "query", "body"]), json_values))
def test_any_parameters_can_be_recorded_within_the_bound(params):
    text = canonical(redact(params, ()))
    assert len(text) <= 3 * 8_300
    assert canonical(orjson.loads(text)) == text


def test_the_hash_is_over_all_of_the_parameters_whatever_their_order():
    assert args_hash({"b": 1, "a": LONG}) == "sha256:" + hashlib.sha256(b'{"a":"' + LONG.encode() + b'","b":1}').hexdigest()
    assert args_hash({"a": LONG + "y", "b": 1}) != args_hash({"b": 1, "a": LONG})


def test_parameters_without_a_canonical_form_are_a_fault():
    with pytest.raises(AuditUnavailable, match="no canonical JSON"):
        args_hash({"a": "\ud800"})


def attempt(**changes):
    values = {
        "decision_id": "d-1",
        "revision": "sha256:r",
        "agent": AGENT,
        "door": "proxy",
        "method": "POST",
        "host": "api.github.com",
        "path": "/repos/acme/web/issues",
        "tool": "github",
        "operation": "issues.create",
        "effect": "write",
        "data": ("source-code",),
        "params": {"path": {"owner": "acme", "repo": "web"}, "body": {"title": "x"}},
        "run_id": "r-1",
        "step": 3,
        "trace_id": "t",
    }
    return Attempt(**{**values, **changes})


def test_an_allow_has_all_fields_of_the_contract():
    record = decision_record(NOW, 5, attempt(), ALLOW, {"issuer": "static", "scopes": {}, "lease_id": "l", "expires": None})
    assert record == {
        "schema": "broker.audit/v1",
        "time": "2023-11-14T22:13:20.250000Z",
        "mono_ns": 5,
        "event": "decision",
        "decision_id": "d-1",
        "agent": AGENT,
        "run_id": "r-1",
        "step": 3,
        "trace_id": "t",
        "door": "proxy",
        "tool": "github",
        "operation": "issues.create",
        "effect": "write",
        "data": ["source-code"],
        "method": "POST",
        "host": "api.github.com",
        "path": "/repos/acme/web/issues",
        "args": {"path": {"owner": "acme", "repo": "web"}, "body": {"title": "x"}},
        "args_hash": args_hash(attempt().params),
        "verdict": "allow",
        "code": None,
        "rule": None,
        "detail": None,
        "violations": [],
        "revision": "sha256:r",
        "credential": {"issuer": "static", "scopes": {}, "lease_id": "l", "expires": None},
        "limits": None,
        "approval": None,
    }


def test_a_denial_has_its_code_rule_and_violations():
    violation = Violation("/path/owner", "agents/a.yaml#/x", "is not allowed")
    record = decision_record(
        NOW, 5, attempt(), deny(Code.PARAMS_INVALID, "no", rule="agents/a.yaml#/x", violations=(violation,) * 99)
    )
    assert (record["verdict"], record["code"], record["rule"]) == ("deny", "params_invalid", "agents/a.yaml#/x")
    assert record["violations"] == [{"pointer": "/path/owner", "rule": "agents/a.yaml#/x", "message": "is not allowed"}] * 32


def test_a_sensitive_path_parameter_is_not_in_the_path_either():
    record = decision_record(
        NOW,
        5,
        attempt(path="/users/jane%40acme.example/notes", params={"path": {"user": "jane@acme.example"}}, data=("pii",)),
        ALLOW,
    )
    assert record["path"] == "/users/[pii]/notes"
    assert b"jane" not in canonical(record)


def test_a_secret_late_in_a_long_path_is_found():
    late = attempt(path="/" + "a" * 1000 + "/ghp_0123456789abcdef")
    assert decision_record(NOW, 5, late, ALLOW)["path"] == "[redacted]"


def test_whatever_an_unknown_agent_sends_can_be_written():
    odd = attempt(agent={"name": "\ud800" * 9}, method="\x1b[2J", host="h" * 9999, path="/ghp_0123456789abcdef", run_id="\udcff")
    record = decision_record(NOW, 5, odd, deny(Code.AGENT_UNKNOWN, "\ud800"))
    assert len(canonical(record)) < 2000
    assert record["path"] == "[redacted]"


def test_an_outcome_is_tied_to_its_decision():
    record = outcome_record(NOW, 6, attempt(), Ending(status=201, size=12, duration_ms=3.5, response_hash="sha256:x"))
    assert (record["event"], record["decision_id"], record["code"]) == ("outcome", "d-1", None)
    assert record["upstream"] == {"status": 201, "bytes": 12, "duration_ms": 3.5}
    assert "args" not in record


def test_config_and_revocation_say_what_happened():
    assert config_record(NOW, 1, "reloaded", "sha256:r")["event"] == "config"
    notice = {"id": "r-1", "kind": "restriction"}
    record = notice_record("revocation", NOW, 1, AGENT, "by jo", notice)
    assert (record["event"], record["agent"], record["detail"], record["notice"]) == ("revocation", AGENT, "by jo", notice)


@pytest.mark.parametrize(
    "build", [lambda call: decision_record(NOW, 1, call, ALLOW), lambda call: outcome_record(NOW, 1, call, Ending())]
)
def test_what_was_tried_where_no_operation_matched_is_recorded_without_a_secret(build):
    tried = Attempt("d", "r", AGENT, tool="stripe", operation="GET /v1/keys/sk_live_abc123")
    assert build(tried)["operation"] == "[redacted]"
