"""`aws-sts`, against moto's STS behind a gate that checks each signature anew."""

import json
import logging
from urllib.parse import parse_qs

import httpx
import pytest
from fakes.sts import aws
from issuing import FAULTS, fetched, occasion, problems_of, refused

from broker import clock
from broker.credentials.aws_sts import AwsStsSource
from broker.credentials.base import Outgoing
from broker.policy.types import Effect

S3 = ("s3", "eu-central-1")
POLICY = {
    "Version": "2012-10-17",
    "Statement": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::reports/${aws:PrincipalTag/agent}/*"}],
}
ROLE = "arn:aws:iam::123456789012:role/agents/reports"


@pytest.fixture
def gate():
    with aws() as server:
        yield server


@pytest.fixture
def settings(gate, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / "id").write_text("AKIAEXAMPLE")
    (tmp_path / "key").write_text("wJalr/long-lived")
    own = {"access_key": {"file": str(tmp_path / "id")}, "secret": {"file": str(tmp_path / "key")}}
    return own | {"role": ROLE, "sts": gate.url, "scopes": {"policy": POLICY}}


def session(asked, now=None):
    lease = fetched(AwsStsSource, asked, now or clock.now())
    return lease, lease.sign.access_key, [secret.reveal() for secret in lease.secrets]


def asked_of(gate):
    return {name: value for name, [value] in parse_qs(gate.seen[-1]).items()}


def test_a_session_is_narrowed_to_the_policy_and_carries_who_asked(gate, settings):
    assert problems_of(AwsStsSource, settings) == []
    lease, _, _ = session(occasion(settings | {"external_id": "x-7"}, sigv4=S3, max_ttl=1800))
    told = asked_of(gate)
    assert json.loads(told.pop("Policy")) == POLICY
    assert told == {
        "Action": "AssumeRole",
        "Version": "2011-06-15",
        "RoleArn": ROLE,
        "RoleSessionName": "bot@api",
        "SourceIdentity": "bot",
        "DurationSeconds": "1800",
        "ExternalId": "x-7",
        "Tags.member.1.Key": "agent",
        "Tags.member.1.Value": "bot",
        "Tags.member.2.Key": "tool",
        "Tags.member.2.Value": "api",
        "Tags.member.3.Key": "team",
        "Tags.member.3.Value": "team payments _ co",
        "Tags.member.4.Key": "run",
        "Tags.member.4.Value": "run-7",
    }
    assert lease.expires == pytest.approx(clock.now() + 1800, abs=5)
    assert lease.scopes[1:] == ("run:run-7",)
    assert lease.handle is None


def test_what_its_keys_sign_aws_takes_and_nothing_else(gate, settings):
    lease, key, (secret, token) = session(occasion(settings, sigv4=S3))
    gate.keys = {key: (secret, token)}
    body = b"<CreateBucketConfiguration><LocationConstraint>eu-central-1</LocationConstraint></CreateBucketConfiguration>"
    outgoing = Outgoing("PUT", f"{gate.url}/reports?x-id=CreateBucket", (("content-type", "application/xml"),), body)
    headers = {name: value.reveal() for name, value in lease.headers(outgoing, clock.now())} | dict(outgoing.headers)
    assert httpx.put(outgoing.url, headers=headers, content=body).status_code == 200
    assert httpx.put(f"{gate.url}/others", headers=headers, content=body).status_code == 403
    assert httpx.put(outgoing.url, headers=headers, content=body + b" ").status_code == 403
    assert httpx.get(outgoing.url, headers=headers).status_code == 403


@pytest.mark.parametrize("wrong", [3600, -3600], ids=["an hour ahead", "an hour behind"])
def test_whatever_our_clock_says_a_session_is_made_and_signs_by_the_time_of_aws(gate, settings, wrong):
    now = clock.now() + wrong
    lease, key, (secret, token) = session(occasion(settings, sigv4=S3, max_ttl=900), now)
    gate.keys = {key: (secret, token)}
    headers = {name: value.reveal() for name, value in lease.headers(Outgoing("GET", f"{gate.url}/", (), b""), now)}
    assert httpx.get(f"{gate.url}/", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("operation", "effect", "action"),
    [("reports.get", Effect.READ, "s3:GetObject"), ("reports.put", Effect.WRITE, "s3:PutObject"), (None, None, "s3:GetObject")],
    ids=["by its effect", "by its name", "housekeeping reads"],
)
def test_an_operation_may_have_a_policy_of_its_own(gate, settings, operation, effect, action):
    scopes = {"read": {"policy": {"Action": "s3:GetObject"}}, "reports.put": {"policy": {"Action": "s3:PutObject"}}}
    session(occasion(settings | {"scopes": scopes}, operation, effect, sigv4=S3))
    assert json.loads(asked_of(gate)["Policy"]) == {"Action": action}


def test_runs_and_policies_of_their_own_are_leases_of_their_own(settings):
    source, other = AwsStsSource(), settings | {"scopes": {"policy": {"Action": "s3:*"}}}
    occasions = [occasion(settings), occasion(settings, run="run-8"), occasion(settings, run=""), occasion(other)]
    assert len({source.narrowed(each) for each in occasions}) == 4


def test_without_keys_of_its_own_the_entry_uses_those_of_awss_chain(gate, settings, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ASIACHAIN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "chain-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "chain-token")
    gate.keys = {"ASIACHAIN": ("chain-secret", "chain-token")}
    session(occasion({name: value for name, value in settings.items() if name not in ("access_key", "secret")}, sigv4=S3))


def test_without_any_keys_nobody_is_asked(gate, settings, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    asked = {name: value for name, value in settings.items() if name not in ("access_key", "secret")}
    assert "no credentials for the broker" in refused(AwsStsSource, occasion(asked, sigv4=S3))[0]
    assert not gate.seen


@pytest.mark.parametrize("fail", FAULTS)
def test_when_aws_fails_there_is_no_session_and_the_reason_tells_no_secret(gate, settings, fail):
    fail(gate)
    _, shown = refused(AwsStsSource, occasion(settings, sigv4=S3), clock.now())
    assert not any(word in shown for word in ("SECRET-ECHO", "wJalr", "Signature="))


def test_when_aws_is_down_there_is_no_session(settings):
    assert "ConnectError" in refused(AwsStsSource, occasion(settings | {"sts": "http://127.0.0.1:9"}, sigv4=S3))[0]


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("AccessDenied", "the role's trust policy"),
        ("InvalidClientTokenId", "AWS keys are valid"),
        ("PackedPolicyTooLarge", "shorten scopes.policy"),
        ("Never<b>Heard</b>", "AWS's documentation"),
    ],
)
def test_what_aws_refuses_is_told_with_what_to_do_there(gate, settings, code, remedy):
    gate.instead = (
        403,
        {},
        f"<ErrorResponse><Error><Code>{code}</Code><Message>ASIAECHO</Message></Error></ErrorResponse>".encode(),
    )
    message, shown = refused(AwsStsSource, occasion(settings, sigv4=S3), clock.now())
    assert remedy in message
    assert "ASIAECHO" not in shown
    assert "Heard" not in shown


def test_keys_that_aws_does_not_know_are_told(gate, settings, tmp_path):
    (tmp_path / "key").write_text("another")
    assert "AWS keys are valid" in refused(AwsStsSource, occasion(settings, sigv4=S3), clock.now())[0]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        pytest.param([(b"assumed-role/reports", b"assumed-role/admin")], "another role", id="another role"),
        pytest.param([(b"sts::123456789012", b"sts::210987654321")], "another role", id="another account"),
        pytest.param([(b"/bot@api", b"/eve@api")], "another role or name", id="another name"),
        pytest.param([(b"<Arn>", b"<SourceIdentity>eve</SourceIdentity><Arn>")], "another source", id="another source identity"),
        pytest.param([(b"<Expiration>20", b"<Expiration>19")], "ended already", id="ended"),
        pytest.param([(b"<Expiration>20", b"<Expiration>29")], "longer than was asked", id="longer than asked"),
        pytest.param([(b"Expiration>", b"Expires>")], "when the credential ends", id="without an end"),
        pytest.param([(b"SessionToken>", b"Token>")], "can be sent", id="without a token"),
        pytest.param([(b"<SessionToken>", b"<SessionToken>x&#13;&#10;x-evil: ")], "can be sent", id="with a header in it"),
    ],
)
def test_a_session_that_is_not_what_was_asked_for_is_not_used(gate, settings, changed, why):
    gate.changed = changed
    message, shown = refused(AwsStsSource, occasion(settings, sigv4=S3), clock.now())
    assert why in message
    assert "x-evil" not in shown


def test_an_answer_without_a_time_is_not_used(gate, settings):
    gate.dated = False
    assert "what time" in refused(AwsStsSource, occasion(settings, sigv4=S3), clock.now())[0]


def test_a_platform_that_lets_nothing_live_for_15_minutes_has_no_sessions(gate, settings):
    assert "max_ttl" in refused(AwsStsSource, occasion(settings, sigv4=S3, max_ttl=899))[0]
    assert not gate.seen


def test_an_entry_that_signs_nothing_has_no_session(gate, settings):
    assert "as: {sigv4" in refused(AwsStsSource, occasion(settings))[0]
    assert not gate.seen


def test_neither_logs_nor_what_holds_it_show_a_key(gate, settings, caplog):
    caplog.set_level(logging.DEBUG)
    lease, _, hidden = session(occasion(settings, sigv4=S3))
    made = lease.headers(Outgoing("GET", f"{gate.url}/", (), b""), clock.now())
    shown = f"{lease!r} {lease.sign!r} {made!r} {caplog.text}"
    assert not any(secret in shown for secret in (*hidden, "wJalr", "Signature="))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"scopes": {"policy": {}}}, "policy", id="no policy"),
        pytest.param({"role": "reports"}, "role", id="a role that is no ARN"),
        pytest.param({"ttl": 600}, "ttl", id="shorter than AWS makes them"),
        pytest.param({"sts": "http://sts.example"}, "sts", id="plain text to elsewhere"),
        pytest.param({"secret": None}, "access_key and secret", id="half a key"),
        pytest.param({"secret": "wJalr/literal"}, "secret", id="a literal key"),
    ],
)
def test_settings_that_are_not_right_are_told_by_name(settings, change, named):
    problems = problems_of(AwsStsSource, settings | change)
    assert any(named in problem for problem in problems)
    assert "wJalr" not in str(problems)
