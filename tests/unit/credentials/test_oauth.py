"""`oauth` against Authlib's authorization server: each way of asking, each way in which a server fails, and taking back."""

import asyncio
import base64
import json
import socket
import traceback

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fakes import oauth as fake
from stack import TestCA

from broker import clock
from broker.credentials.base import CredentialUnavailable, Occasion, Secret
from broker.credentials.jwt import JwtIssuer
from broker.credentials.leases import Leases
from broker.credentials.oauth import OAuthSource
from broker.credentials.outbox import Outbox
from broker.credentials.settings import problems
from broker.keys import fernet
from broker.policy.snapshot import Agent, CredentialSpec, Endpoint, Operation, Tool
from broker.policy.types import Effect

SECRET = "p:w/ %41+é-0123456789"
KEYS = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
OWN = ed25519.Ed25519PrivateKey.generate()
BOT = Agent("bot", "team", "primary", "a#", {}, spiffe="spiffe://acme.example/bot")
TOOL = Tool("crm", "team", "rest", Endpoint("https", "crm.example", 443), "t#", {})


def jwk_of(algorithm):
    made = jwt.get_algorithm_by_name(algorithm).to_jwk(KEYS[algorithm].public_key(), as_dict=True)
    return {**made, "alg": algorithm}


def pem(key):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("CLIENT_SECRET", SECRET)
    with fake.serving() as server:
        server.clients["us & co"] = fake.Client("us & co", "read write admin", secret=SECRET)
        server.trusted = OWN.public_key()
        yield server


@pytest.fixture
def settings(server):
    return {
        "token_url": f"{server.url}/token",
        "client_id": "us & co",
        "secret": {"env": "CLIENT_SECRET"},
        "revocation_url": f"{server.url}/revoke",
    }


def occasion(settings, operation="tickets.get", effect=Effect.READ, **placed):
    spec = CredentialSpec("oauth", settings, **placed)
    return Occasion(BOT, TOOL, Operation(operation, effect, "t#"), spec, "run-7", 3600)


def source():
    return OAuthSource(JwtIssuer(OWN).sign)


def fetched(settings, **call):
    return asyncio.run(source().fetch(occasion(settings, **call), clock.now()))


def refused(settings, **call):
    with pytest.raises(CredentialUnavailable) as caught:
        fetched(settings, **call)
    assert caught.value.advice
    return str(caught.value), "".join(traceback.format_exception(caught.value))


def unproven(settings):
    return {name: settings[name] for name in ("token_url", "client_id")}


@pytest.mark.parametrize("client_auth", ["basic", "post"])
def test_client_credentials_by_a_secret_of_any_characters(server, settings, client_auth):
    before = clock.now()
    lease = fetched(settings | {"client_auth": client_auth, "scopes": ["read"]})
    [issued] = server.issued
    assert lease.value.reveal() == f"Bearer {issued.token}"
    assert [secret.reveal() for secret in lease.secrets] == [issued.token]
    assert (lease.issuer, lease.scopes, issued.scope) == ("oauth", ("read",), "read")
    assert before + 3600 <= lease.expires <= clock.now() + 3600
    assert ("client_secret" in server.heard[0][1]) == (client_auth == "post")


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
def test_client_credentials_by_an_assertion_that_a_key_signs(server, settings, tmp_path, algorithm):
    (tmp_path / "key").write_text(pem(KEYS[algorithm]))
    server.clients["us & co"] = fake.Client("us & co", "read", key=jwk_of(algorithm))
    fetched(unproven(settings) | {"key": {"file": str(tmp_path / "key")}})
    [(_, form)] = server.heard
    assert "client_secret" not in form
    assert jwt.get_unverified_header(form["client_assertion"])["alg"] == algorithm


def test_an_ed25519_key_signs_as_eddsa_which_authlib_does_not_take(server, settings, tmp_path):
    (tmp_path / "key").write_text(pem(KEYS["EdDSA"]))
    refused(unproven(settings) | {"key": {"file": str(tmp_path / "key")}})
    assertion = server.heard[0][1]["client_assertion"]
    said = jwt.decode(assertion, KEYS["EdDSA"].public_key(), ["EdDSA"], audience=f"{server.url}/token")
    assert (said["iss"], said["sub"]) == ("us & co", "us & co")


def test_a_key_with_its_certificate_names_the_certificate(server, settings, tmp_path):
    ca = TestCA()
    certificate, _ = ca.issue(tmp_path, "us")
    (tmp_path / "both").write_text(pem(KEYS["RS256"]) + certificate.read_text())
    refused(unproven(settings) | {"key": {"file": str(tmp_path / "both")}, "key_id": "7"})
    header = jwt.get_unverified_header(server.heard[0][1]["client_assertion"])
    assert (header["alg"], header["kid"], len(base64.urlsafe_b64decode(header["x5t#S256"] + "="))) == ("PS256", "7", 32)


def svid(algorithm="ES256", *, issuer=None, **claims):
    return jwt.encode(
        {"iss": issuer or "us & co", "sub": "us & co", "exp": clock.now() + 300, **claims}, KEYS[algorithm], algorithm
    )


def test_client_credentials_by_a_token_that_someone_keeps_fresh_in_a_file(server, settings, tmp_path):
    server.clients["us & co"] = fake.Client("us & co", "read", key=jwk_of("ES256"))
    asked = unproven(settings) | {"subject": {"file": str(tmp_path / "svid")}}
    for number in "12":
        (tmp_path / "svid").write_text(svid(aud=f"{server.url}/token", jti=number))
        fetched(asked)
    assert [jwt.decode(form["client_assertion"], options={"verify_signature": False})["jti"] for _, form in server.heard] == [
        "1",
        "2",
    ]


@pytest.mark.parametrize("by", ["a token from a file", "an assertion of its own key"])
def test_an_assertion_is_a_grant(server, settings, tmp_path, by):
    server.clients["us & co"] = fake.Client("us & co", "read", key=jwk_of("ES256"))
    (tmp_path / "x").write_text(pem(KEYS["ES256"]) if "key" in by else svid(aud=f"{server.url}/token"))
    how = {"key": {"file": str(tmp_path / "x")}} if "key" in by else {"subject": {"file": str(tmp_path / "x")}}
    asked = {"token_url": settings["token_url"], "client_id": "us & co", "grant": "jwt-bearer", "scopes": ["read"], **how}
    assert fetched(asked).scopes == ("read",)
    assert "client_assertion" not in server.heard[0][1]


@pytest.fixture
def exchange(server, settings):
    return {
        "token_url": settings["token_url"],
        "grant": "token-exchange",
        "subject": {"minted": server.audience},
        "audience": server.audience,
        "resource": server.resource,
        "scopes": {"read": ["read"], "tickets.close": ["write"]},
    }


def test_a_minted_token_of_the_agent_is_exchanged_for_one_of_the_operations_scopes(server, exchange):
    leases = [fetched(exchange), fetched(exchange, operation="tickets.close", effect=Effect.WRITE)]
    assert [lease.scopes for lease in leases] == [("read",), ("write",)]
    subject = jwt.decode(server.heard[0][1]["subject_token"], OWN.public_key(), ["EdDSA"], audience=server.audience)
    assert subject["sub"] == "spiffe://acme.example/bot"


def test_a_jwt_svid_from_a_file_is_exchanged(server, exchange, tmp_path):
    server.trusted = KEYS["ES256"].public_key()
    (tmp_path / "svid").write_text(svid(aud=server.audience, sub="spiffe://acme.example/bot"))
    assert fetched(exchange | {"subject": {"file": str(tmp_path / "svid")}}).scopes == ("read",)


def test_the_operations_own_scopes_come_before_those_of_its_effect(exchange):
    assert fetched(exchange | {"scopes": {"read": ["read", "write"], "tickets.get": ["read"]}}).scopes == ("read",)


def test_an_operation_that_the_scopes_do_not_name_gets_no_credential(exchange):
    assert "tickets.delete" in refused(exchange, operation="tickets.delete", effect=Effect.DESTRUCTIVE)[0]


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        ({"audience": "//elsewhere"}, "correct audience or resource"),
        ({"resource": "https://elsewhere.example/"}, "correct audience or resource"),
        ({"subject": {"minted": "//elsewhere"}}, "see whether the subject's token is fresh"),
    ],
    ids=["an audience", "a resource", "a subject"],
)
def test_the_server_refuses_what_it_does_not_know_and_the_message_says_what_to_do(exchange, wrong, advice):
    assert advice in refused(exchange | wrong)[0]


def test_a_wrong_secret_is_told_by_its_field_and_not_by_its_value(settings, monkeypatch):
    monkeypatch.setenv("CLIENT_SECRET", "hunter2hunter2")
    told, whole = refused(settings)
    assert "invalid_client; check client_id, its secret or key" in told
    assert "hunter2" not in whole


def test_basic_authentication_carries_the_token_as_password_and_hides_the_pair_too(server, settings):
    lease = fetched(settings, basic="bot")
    pair = base64.b64encode(f"bot:{server.issued[0].token}".encode()).decode()
    assert lease.value.reveal() == f"Basic {pair}"
    assert [secret.reveal() for secret in lease.secrets] == [server.issued[0].token, pair]


GOOD = {"access_token": "at-SECRET", "token_type": "Bearer", "expires_in": 600, "scope": "read"}
NO_TOKEN = "without a credential that can be sent"


@pytest.mark.parametrize(
    ("instead", "told"),
    [
        pytest.param((500, {}, b"at-SECRET"), "answered 500", id="a fault"),
        pytest.param((503, {}, b'{"error": "at-SECRET"}'), "answered 503", id="an error of its own words"),
        pytest.param((200, {"content-type": "text/html"}, b"<html>at-SECRET</html>"), NO_TOKEN, id="a page"),
        pytest.param((200, {}, b"\x00\xffat-SECRET"), NO_TOKEN, id="garbage"),
        pytest.param((200, {}, b""), NO_TOKEN, id="nothing"),
        pytest.param((200, {}, b'["at-SECRET"]'), NO_TOKEN, id="a list"),
        pytest.param((307, {"location": "/elsewhere"}, b""), "redirects", id="a redirect"),
        pytest.param((200, {}, b'{"access_token": "at-SECRET"' + b" " * 70_000 + b"}"), "answers too much", id="a huge body"),
        pytest.param(
            (200, {"content-length": "99", "connection": "close"}, b"{}"), "can't be reached", id="less than it promised"
        ),
        pytest.param(GOOD | {"expires_in": 0}, "has ended already", id="a token that has ended"),
        pytest.param(GOOD | {"expires_in": -5}, "has ended already", id="one that ended before"),
        pytest.param(GOOD | {"expires_in": "soon"}, "no number of seconds", id="a life in words"),
        pytest.param(GOOD | {"expires_in": True}, "no number of seconds", id="a life that is true"),
        pytest.param(GOOD | {"expires_in": 1e300}, "no number of seconds", id="a life for ever"),
        pytest.param(GOOD | {"expires_in": None}, "does not say how long", id="no life at all"),
        pytest.param(GOOD | {"scope": "read admin"}, "wider", id="a wider scope"),
        pytest.param(GOOD | {"scope": 7}, "can't be read", id="a scope that is none"),
        pytest.param(GOOD | {"token_type": "DPoP"}, "not of the type Bearer", id="a token of another type"),
        pytest.param(GOOD | {"token_type": None}, "not of the type Bearer", id="a token of no type"),
        pytest.param(
            GOOD | {"issued_token_type": "urn:ietf:params:oauth:token-type:refresh_token"}, "no access token", id="another kind"
        ),
        pytest.param(GOOD | {"access_token": "at-SECRET\r\nx-injected: 1"}, NO_TOKEN, id="a token with a line break"),
        pytest.param(GOOD | {"access_token": ""}, NO_TOKEN, id="an empty token"),
        pytest.param(GOOD | {"access_token": ["at-SECRET"]}, NO_TOKEN, id="a token that is a list"),
        pytest.param(GOOD | {"access_token": "x" * 20_000}, NO_TOKEN, id="a token of 20 KB"),
    ],
)
def test_from_what_a_server_answers_wrongly_no_credential_is_made(server, settings, caplog, instead, told):
    server.instead = instead if isinstance(instead, tuple) else (200, {}, json.dumps(instead).encode())
    message, whole = refused(settings | {"scopes": ["read"]})
    assert told in message
    for text in (whole, caplog.text):
        assert "at-SECRET" not in text
        assert SECRET not in text


def test_the_same_answer_without_its_fault_is_taken(server, settings):
    server.instead = (200, {}, json.dumps(GOOD | {"expires_in": "600"}).encode())
    lease = fetched(settings | {"scopes": ["read"]})
    assert lease.value.reveal() == "Bearer at-SECRET"
    assert lease.expires == pytest.approx(clock.now() + 600, abs=5)


def test_a_life_that_the_server_does_not_tell_is_the_entrys_ttl(server, settings):
    server.instead = (200, {}, json.dumps(GOOD | {"expires_in": None}).encode())
    assert fetched(settings | {"ttl": 60}).expires == pytest.approx(clock.now() + 60, abs=5)


def test_another_type_is_taken_where_the_entry_asks_for_it(server, settings):
    server.instead = (200, {}, json.dumps(GOOD | {"token_type": "N_A"}).encode())
    assert fetched(settings | {"token_type": "N_A"}).value.reveal() == "Bearer at-SECRET"


def test_scopes_that_nobody_asked_for_are_the_servers_choice_and_are_recorded(server, settings):
    server.instead = (200, {}, json.dumps(GOOD | {"scope": "b a"}).encode())
    assert fetched(settings).scopes == ("b", "a")


def test_a_wider_token_is_taken_back_at_once(server, settings):
    server.instead = (200, {}, json.dumps(GOOD | {"scope": "read admin"}).encode())
    refused(settings | {"scopes": ["read"]})
    assert [(path, form.get("token")) for path, form in server.heard[1:]] == [("/revoke", "at-SECRET")]


def test_a_server_that_is_down_is_named_with_what_to_do():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://localhost:{probe.getsockname()[1]}/token"
    message, _ = refused({"token_url": url, "client_id": "us", "subject": {"minted": "x"}})
    assert "can't be reached (ConnectError" in message


def test_tls_is_verified_by_the_named_roots_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIENT_SECRET", SECRET)
    ca = TestCA()
    (tmp_path / "ca.pem").write_text(ca.pem)
    (tmp_path / "other.pem").write_text(TestCA().pem)
    with fake.serving(ca.issue(tmp_path, "localhost")) as server:
        server.clients["us"] = fake.Client("us", "", secret=SECRET)
        asked = {"token_url": f"{server.url}/token", "client_id": "us", "secret": {"env": "CLIENT_SECRET"}}
        assert fetched(asked | {"ca": {"file": str(tmp_path / "ca.pem")}}).secrets
        assert "CERTIFICATE_VERIFY_FAILED" in refused(asked)[0]
        assert "CERTIFICATE_VERIFY_FAILED" in refused(asked | {"ca": {"file": str(tmp_path / "other.pem")}})[0]
        assert "trust roots" in refused(asked | {"ca": {"file": str(tmp_path / "missing.pem")}})[0]


def test_no_proxy_of_the_environment_is_asked(settings, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert fetched(settings).secrets


def test_a_token_is_taken_back_by_its_handle_alone(server, settings):
    lease = fetched(settings)
    handle = Secret(lease.handle.reveal())
    assert repr(handle) == "[redacted]"
    asyncio.run(source().revoke(handle))
    assert [issued.revoked for issued in server.issued] == [True]


def test_a_server_that_does_not_take_back_is_told(server, settings):
    lease = fetched(settings)
    server.instead = (503, {}, b"")
    with pytest.raises(CredentialUnavailable, match="revocation endpoint of 'crm' answered 503"):
        asyncio.run(source().revoke(lease.handle))


def test_without_a_revocation_url_there_is_nothing_to_take_back(settings):
    del settings["revocation_url"]
    assert fetched(settings).handle is None


def boxed(tmp_path):
    return Outbox(tmp_path / "outbox", fernet(tmp_path / "outbox.key"))


def test_a_hundred_calls_are_one_request_and_a_revoked_agents_token_ends_at_the_server_also_after_a_restart(
    server, settings, tmp_path, caplog
):
    async def first_life():
        leases = Leases(source(), boxed(tmp_path).put)
        lent = await asyncio.gather(*(leases.issue(occasion(settings), clock.now()) for _ in range(100)))
        assert {lease.value.reveal() for lease in lent} == {f"Bearer {server.issued[0].token}"}
        assert len(server.heard) == 1
        leases.drop("bot")

    asyncio.run(first_life())
    token = server.issued[0].token
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 2
    assert not any(token.encode() in path.read_bytes() for path in files)
    server.instead = (503, {}, b"")
    asyncio.run(boxed(tmp_path).attempt({"oauth": source()}))
    assert [issued.revoked for issued in server.issued] == [False]
    server.instead = None
    asyncio.run(boxed(tmp_path).attempt({"oauth": source()}))
    assert [issued.revoked for issued in server.issued] == [True]
    assert len(boxed(tmp_path)) == 0
    assert token not in caplog.text
    assert SECRET not in caplog.text


def test_a_slow_server_denies_its_own_call_alone_and_its_late_answer_serves_the_next(server, settings, monkeypatch):
    monkeypatch.setattr("broker.credentials.leases.WAIT_S", 0.2)

    async def scenario():
        leases = Leases(source(), list)
        server.gate.clear()
        with pytest.raises(CredentialUnavailable, match="has not answered within"):
            await leases.issue(occasion(settings), clock.now())
        server.gate.set()
        [flight] = asyncio.all_tasks() - {asyncio.current_task()}
        await flight
        assert leases.cached(occasion(settings), clock.now()).secrets[0].reveal() == server.issued[0].token
        assert len(server.heard) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("content", ["not a key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----"])
def test_a_key_that_is_none_is_told_without_it(settings, tmp_path, content):
    (tmp_path / "key").write_text(content)
    message, whole = refused(unproven(settings) | {"key": {"file": str(tmp_path / "key")}})
    assert "no private key that can sign" in message
    assert "AAAA" not in whole


RIGHT = {"token_url": "https://login.example/token", "client_id": "us", "secret": {"env": "A"}}


@pytest.mark.parametrize(
    ("written", "told"),
    [
        pytest.param({"token_url": "http://login.example/token"}, "token_url", id="plain text"),
        pytest.param({"token_url": "ftp://login.example"}, "token_url", id="another protocol"),
        pytest.param({"token_url": "https://user:pw@login.example/"}, "token_url", id="user information"),
        pytest.param({"revocation_url": "http://169.254.169.254/"}, "revocation_url", id="a plain address"),
        pytest.param({"grant": "password"}, "grant", id="a grant that hands out passwords"),
        pytest.param({"key": {"env": "B"}}, "take out secret or key", id="two proofs"),
        pytest.param({"secret": None}, "write secret, key or subject", id="no proof"),
        pytest.param({"grant": "token-exchange"}, "write subject", id="nothing to exchange"),
        pytest.param({"grant": "jwt-bearer"}, "write subject, or a key", id="no assertion"),
        pytest.param({"client_id": None}, "write client_id", id="no name"),
        pytest.param({"subject": {"minted": "x", "file": "y"}, "secret": None}, "subject", id="two subjects"),
        pytest.param({"scopes": ["a b"]}, "scopes", id="a scope with a space"),
        pytest.param({"scope": ["a"]}, "no field scope", id="a misspelt field"),
        pytest.param({"ttl": "5m"}, "ttl", id="a life that was not read"),
    ],
)
def test_settings_that_are_wrong_are_told_by_field_with_a_remedy(written, told):
    merged = {name: value for name, value in (RIGHT | written).items() if value is not None}
    [problem, *_] = problems(OAuthSource.Settings, "oauth", merged)
    assert told in problem
    assert "; " in problem
    assert "pw@" not in problem


@pytest.mark.parametrize(
    "written",
    [
        RIGHT,
        RIGHT | {"token_url": "http://127.0.0.1:8080/token", "ttl": 300, "scopes": {"read": ["a"], "tickets.close": []}},
        RIGHT | {"token_url": "http://[::1]:8080/token/"},
        {"token_url": "https://sts.googleapis.com/v1/token", "grant": "token-exchange", "subject": {"file": "svid"}},
    ],
)
def test_settings_that_are_right_have_no_problem(written):
    assert problems(OAuthSource.Settings, "oauth", written) == []
