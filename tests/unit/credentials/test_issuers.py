"""Credentials: made by reference, scoped, cached to their end, and never shown."""

import copy
import json
import logging
import pickle
import traceback
from dataclasses import replace

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Outgoing, Secret, leased, unset
from broker.credentials.http import Answer
from broker.credentials.jwt import JwtIssuer, jwks
from broker.credentials.outbox import Revocation
from broker.credentials.settings import problems
from broker.credentials.static import StaticIssuer
from broker.policy.snapshot import Agent, CredentialSpec, Endpoint, Operation, Tool
from broker.policy.types import Effect

NOW = 1_800_000_000.0
TOOL = Tool("wiki", "team", "mcp", Endpoint("https", "wiki.example", 443), "t#", {})
BOT = Agent("bot", "team", "primary", "a#", {}, spiffe="spiffe://acme.example/bot")


def occasion(issuer="static", *, agent=BOT, run="", max_ttl=3600, template="Bearer {}", **settings):
    spec = CredentialSpec(issuer, settings, template=template)
    return Occasion(agent, TOOL, Operation("read", Effect.READ, "t#"), spec, run, max_ttl)


def shows(value):
    """Every way in which a value gets into a log by accident."""
    try:
        raise ValueError(value)  # noqa: TRY301 - for its traceback
    except ValueError as error:
        told = "".join(traceback.format_exception(error))
    record = logging.LogRecord("x", logging.INFO, "f", 1, "%s %r", (value, value), None)
    return f"{value} {value!r} {value!s:>10} {[value]} {record.getMessage()} {told}"


@pytest.mark.parametrize(
    "holder",
    [
        Secret("hunter2"),
        Lease("id", "static", "authorization", Secret("hunter2")),
        leased(CredentialSpec("static", {}, basic="bot"), "hunter2", handle=Secret("hunter2")),
        Revocation("oauth", Secret("hunter2"), None, 0.0),
        Answer(200, {"access_token": "hunter2"}),
        Outgoing("GET", "https://crm.example/", (("authorization", "Bearer hunter2"),), b""),
    ],
    ids=["secret", "lease", "lease with all its parts", "revocation", "answer", "outgoing"],
)
def test_what_holds_a_secret_never_shows_it(holder):
    assert "hunter2" not in shows(holder)


@pytest.mark.parametrize("carry", [pickle.dumps, copy.deepcopy, json.dumps])
def test_a_secret_is_not_carried_off(carry):
    with pytest.raises(TypeError):
        carry(Secret("hunter2"))


def test_static_reads_the_environment_at_each_call(monkeypatch):
    monkeypatch.setenv("KEY", "one")
    issuer = StaticIssuer()
    assert issuer.cached(occasion(secret={"env": "KEY"}), NOW).value.reveal() == "Bearer one"
    monkeypatch.setenv("KEY", "two")
    assert issuer.cached(occasion(secret={"env": "KEY"}, template="Basic {}"), NOW).value.reveal() == "Basic two"


def test_basic_authentication_makes_the_secret_the_password_and_hides_the_pair_too(monkeypatch):
    monkeypatch.setenv("KEY", "one")
    spec = CredentialSpec("static", {"secret": {"env": "KEY"}}, basic="")
    lease = StaticIssuer().cached(Occasion(BOT, TOOL, None, spec, "", 3600), NOW)
    assert (lease.header, lease.value.reveal()) == ("authorization", "Basic Om9uZQ==")
    assert [secret.reveal() for secret in lease.secrets] == ["one", "Om9uZQ=="]


def test_static_reads_a_rotated_file_at_once_and_without_its_last_line_break(tmp_path):
    path = tmp_path / "key"
    path.write_text("one\n")
    assert StaticIssuer().cached(occasion(secret={"file": str(path)}), NOW).value.reveal() == "Bearer one"
    path.write_text("two\n")
    assert StaticIssuer().cached(occasion(secret={"file": str(path)}), NOW).value.reveal() == "Bearer two"


@pytest.mark.parametrize(
    ("secret", "content"),
    [
        pytest.param({"env": "UNSET"}, "", id="a variable that is not set"),
        pytest.param({"file": "missing"}, None, id="a file that is not there"),
        pytest.param({"file": "key"}, b"", id="an empty file"),
        pytest.param({"file": "key"}, b"a\r\nx-injected: 1", id="a value with a line break"),
        pytest.param({"file": "key"}, b"\xff\xfe", id="a file that is no text"),
        pytest.param("hunter2", "", id="no reference at all"),
    ],
)
def test_without_a_usable_secret_there_is_no_credential(tmp_path, monkeypatch, secret, content):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(CredentialUnavailable) as caught:
        StaticIssuer().cached(occasion(secret=secret), NOW)
    assert "x-injected" not in str(caught.value)


def test_a_static_leases_id_differs_by_agent_and_tells_nothing_of_the_value(monkeypatch):
    monkeypatch.setenv("KEY", "one")
    other = Agent("other", "team", "primary", "o#", {})
    ids = {StaticIssuer().cached(occasion(agent=agent, secret={"env": "KEY"}), NOW).lease_id for agent in (BOT, other)}
    monkeypatch.setenv("KEY", "two")
    ids.add(StaticIssuer().cached(occasion(secret={"env": "KEY"}), NOW).lease_id)
    assert len(ids) == 2


@pytest.mark.parametrize("settings", [{}, {"secret": "x"}, {"secret": {"env": "A", "file": "b"}}, {"secret": {"vault": "x"}}])
def test_static_settings_without_one_reference_are_refused(settings):
    [problem, *_] = problems(StaticIssuer.Settings, "static", settings)
    assert "secret" in problem
    assert "; " in problem


def test_static_settings_with_one_reference_are_right():
    assert problems(StaticIssuer.Settings, "static", {"secret": {"env": "A"}}) == []
    assert problems(StaticIssuer.Settings, "static", {"secret": {"file": "b"}}) == []


def test_a_field_that_an_issuer_does_not_have_is_refused():
    [problem] = problems(StaticIssuer.Settings, "static", {"secret": {"env": "A"}, "ttl": 300})
    assert problem == "the static issuer has no field ttl; correct its name, or take it out"


def claims(issuer, lease):
    token = lease.value.reveal().removeprefix("Bearer ")
    [key] = jwks(KEY)["keys"]
    assert jwt.get_unverified_header(token)["kid"] == key["kid"] == issuer.key_id
    return jwt.decode(
        token, jwt.PyJWK(key), algorithms=["EdDSA"], audience="wiki", options={"verify_exp": False, "verify_iat": False}
    )


KEY = Ed25519PrivateKey.generate()


def test_a_minted_token_says_who_for_what_and_how_long_and_the_published_key_verifies_it():
    issuer = JwtIssuer(KEY)
    lease = issuer.cached(occasion("jwt", scopes=["pages.read"], run="run-7"), NOW)
    said = claims(issuer, lease)
    assert said["sub"] == "spiffe://acme.example/bot"
    assert (said["scope"], said["run_id"], said["jti"]) == ("pages.read", "run-7", lease.lease_id)
    assert (said["iat"], said["exp"]) == (NOW, NOW + 300)
    assert (lease.scopes, lease.expires) == (("pages.read",), NOW + 300)


def test_a_token_is_cached_until_shortly_before_its_end():
    issuer = JwtIssuer(KEY)
    first = issuer.cached(occasion("jwt"), NOW)
    assert issuer.cached(occasion("jwt"), NOW + 269) is first
    assert issuer.cached(occasion("jwt"), NOW + 270) is not first


def test_a_token_is_never_shared_between_agents_runs_or_scopes():
    issuer = JwtIssuer(KEY)
    other = Agent("other", "team", "primary", "o#", {})
    occasions = [occasion("jwt"), occasion("jwt", agent=other), occasion("jwt", run="r"), occasion("jwt", scopes=["s"])]
    assert len({issuer.cached(each, NOW).lease_id for each in occasions}) == 4


def test_a_catalog_that_names_another_audience_gets_another_token():
    issuer = JwtIssuer(KEY)
    assert issuer.cached(occasion("jwt", audience="a"), NOW) is not issuer.cached(occasion("jwt", audience="b"), NOW)


def test_a_full_cache_forgets_its_oldest_and_nobody_else(monkeypatch):
    monkeypatch.setattr("broker.credentials.jwt._CACHED", 2)
    issuer = JwtIssuer(KEY)
    first, second, third = (issuer.cached(occasion("jwt", run=run), NOW) for run in "abc")
    assert issuer.cached(occasion("jwt", run="c"), NOW) is third
    assert issuer.cached(occasion("jwt", run="b"), NOW) is second
    assert issuer.cached(occasion("jwt", run="a"), NOW) is not first


def test_the_platforms_bound_is_the_longest_a_token_lasts():
    assert JwtIssuer(KEY).cached(occasion("jwt", ttl=900, max_ttl=60), NOW).expires == NOW + 60


@pytest.mark.parametrize(
    "settings", [{"scopes": "pages.read"}, {"scopes": [1]}, {"ttl": 0}, {"ttl": "5m"}, {"audience": 1}, {"secret": {"env": "A"}}]
)
def test_jwt_settings_of_the_wrong_kind_are_refused(settings):
    [problem, *_] = problems(JwtIssuer.Settings, "jwt", settings)
    assert next(iter(settings)) in problem


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        pytest.param({"secret": {"env": "WIKI_KEY"}}, ["WIKI_KEY of wiki"], id="not set"),
        pytest.param({"secret": {"env": "EMPTY"}}, ["EMPTY of wiki"], id="empty"),
        pytest.param({"secret": {"env": "THERE"}}, [], id="set"),
        pytest.param({"secret": {"file": "/run/key"}}, [], id="in a file"),
        pytest.param({"scopes": {"env": ["read"]}, "secret": {"env": "THERE"}}, [], id="an operation of that name"),
        pytest.param({"access_key": {"env": "ONE"}, "secret": {"env": "TWO"}}, ["ONE of wiki", "TWO of wiki"], id="two"),
    ],
)
def test_variables_that_a_credential_is_taken_from_and_are_not_set_are_named(monkeypatch, settings, named):
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("THERE", "x")
    assert list(unset([TOOL, replace(TOOL, credential=CredentialSpec("static", settings))])) == named
