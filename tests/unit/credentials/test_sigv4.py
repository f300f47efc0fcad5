"""SigV4 signatures, judged by an independent recomputation from the request as AWS would see it."""

import logging
from datetime import UTC, datetime

import botocore.auth
import pytest
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from fakes.aws import refusal

from broker.credentials.base import Outgoing, Secret
from broker.credentials.sigv4 import Signer

NOW = 1_800_000_000.0
KEYS = {"ASIAEXAMPLE": ("wJalr/secret+key", "session//token=="), "AKIAEXAMPLE": ("long", None)}
JSON = ("content-type", "application/json; charset=utf-8")


def signer(service="execute-api", *, key="ASIAEXAMPLE", ahead=0.0):
    secret, token = KEYS[key]
    return Signer(key, Secret(secret), Secret(token) if token else None, service, "eu-central-1", ahead)


ONE = signer()


def arrived(method="GET", target="/", body=b"", *, headers=(), host="api.example", by=ONE, now=NOW):  # noqa: PLR0913 - a request has as many parts
    """The request as it reaches AWS: what the agent sent that is passed on, the authority, and what the signer sets."""
    outgoing = Outgoing(method, f"https://{host}{target}", (("user-agent", "agent/1"), *headers), body)
    made = [(name, value.reveal()) for name, value in by(outgoing, now)]
    return method, target, [("host", host), ("user-agent", "changed/on-the-way"), *headers, *made], body


@pytest.mark.parametrize("service", ["execute-api", "s3", "bedrock"])
@pytest.mark.parametrize(
    ("method", "target", "body", "headers"),
    [
        pytest.param("GET", "/", b"", (), id="nothing but a path"),
        pytest.param("GET", "/reports/2026%20Q1/a%C3%A9~b.txt", b"", (), id="a path with escapes"),
        pytest.param("GET", "/items?b=2&a=1&a=0&prefix=x/y&flag", b"", (), id="a query that is unsorted, repeated and blank"),
        pytest.param("GET", "/items?q=a+b%20c%2Bd", b"", (), id="spaces in both spellings and a plus"),
        pytest.param("GET", "/items?name=%C3%A9&x=%2f%3d", b"", (), id="escapes in lower case"),
        pytest.param("POST", "/items", b'{"a": 1}', (JSON,), id="a JSON body"),
        pytest.param("PUT", "/items/1", bytes(range(256)) * 100, (), id="a binary body without a type"),
        pytest.param("POST", "/items", b"x", (("content-type", " text/plain ;  charset=utf-8 "),), id="a type with odd spaces"),
        pytest.param("DELETE", "/items/1", b"", (("x-request-id", "7"), ("accept", "*/*")), id="headers nobody signs"),
    ],
)
def test_what_is_signed_is_what_arrives(service, method, target, body, headers):
    assert refusal(arrived(method, target, body, by=signer(service), headers=headers), keys=KEYS, now=NOW) is None


def test_an_escaped_slash_stays_one():
    assert refusal(arrived(target="/a%2Fb"), keys=KEYS, now=NOW) is None


def test_the_port_is_signed_as_the_authority_has_it():
    assert refusal(arrived(host="api.example:8443"), keys=KEYS, now=NOW) is None


def test_a_long_lived_key_is_sent_without_a_session_token():
    request = arrived(by=signer(key="AKIAEXAMPLE"))
    assert refusal(request, keys=KEYS, now=NOW) is None
    assert "x-amz-security-token" not in dict(request[2])


@pytest.mark.parametrize(
    ("part", "change"),
    [
        pytest.param(0, lambda _: "DELETE", id="another method"),
        pytest.param(1, lambda _: "/items/2?a=1", id="another path"),
        pytest.param(1, lambda _: "/items/1?a=2", id="another query"),
        pytest.param(2, lambda headers: [("host", "evil.example"), *headers[1:]], id="another host"),
        pytest.param(2, lambda headers: [*headers, ("x-amz-acl", "public-read")], id="an x-amz header that was not signed"),
        pytest.param(2, lambda headers: [one for one in headers if one[0] != "x-amz-security-token"], id="no session token"),
        pytest.param(3, lambda body: body + b" ", id="another body"),
    ],
)
@pytest.mark.parametrize("service", ["execute-api", "s3"])
def test_a_request_that_was_changed_on_the_way_is_refused(service, part, change):
    request = list(arrived("PUT", "/items/1?a=1", b"{}", by=signer(service), headers=(JSON,)))
    request[part] = change(request[part])
    assert refusal(request, keys=KEYS, now=NOW)


@pytest.mark.parametrize(("wrong", "why"), [(3600, "RequestTimeTooSkewed"), (-3600, "RequestTimeTooSkewed")])
def test_a_clock_that_is_an_hour_off_is_made_up_for_by_what_aws_said_the_time_is(wrong, why):
    assert refusal(arrived(now=NOW + wrong), keys=KEYS, now=NOW) == why
    assert refusal(arrived(now=NOW + wrong, by=signer(ahead=-wrong)), keys=KEYS, now=NOW) is None


def test_signing_is_a_pure_function_of_the_request_and_the_time():
    shown = [[(name, value.reveal()) for name, value in signer()(Outgoing("GET", "https://a/", (), b""), NOW)] for _ in range(2)]
    assert shown[0] == shown[1]


@pytest.mark.parametrize(("service", "kind"), [("execute-api", botocore.auth.SigV4Auth), ("s3", botocore.auth.S3SigV4Auth)])
def test_the_signature_is_botocores_own_to_the_letter(monkeypatch, service, kind):
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: datetime.fromtimestamp(NOW, UTC))
    request = AWSRequest("POST", "https://api.example/a%20b?x=1", headers=dict([JSON]), data=b"{}")
    kind(Credentials("ASIAEXAMPLE", *KEYS["ASIAEXAMPLE"]), service, "eu-central-1").add_auth(request)
    made = dict(signer(service)(Outgoing("POST", "https://api.example/a%20b?x=1", (JSON,), b"{}"), NOW))
    assert made["authorization"].reveal() == request.headers["Authorization"]


def test_no_key_or_token_is_shown_by_a_signer_or_written_to_a_log(caplog):
    caplog.set_level(logging.DEBUG)
    one = signer()
    made = one(Outgoing("GET", "https://a/", (), b""), NOW)
    shown = f"{one!r} {made!r} {caplog.text}"
    assert not any(secret in shown for secret in KEYS["ASIAEXAMPLE"])


def test_botocore_never_writes_what_it_reads_or_signs_to_a_log(caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("botocore.parsers", "botocore.auth", "botocore.credentials"):
        assert not logging.getLogger(name).isEnabledFor(logging.DEBUG)
