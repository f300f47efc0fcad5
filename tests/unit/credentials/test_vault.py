"""`vault`, against a Vault that checks tokens, policies, logins and leases."""

import asyncio
import base64
import logging

import pytest
from fakes.serving import served
from fakes.vault import WORKS, Token, Vault
from issuing import FAULTS, NOW, done, fetched, occasion, problems_of, refused

from broker.credentials.base import CredentialUnavailable
from broker.credentials.leases import Leases
from broker.credentials.vault import VaultSource
from broker.policy.types import Effect

PATH = "database/creds/readonly"
PROOFS = {
    "a token": ("hvs.root-like", {}),
    "approle": ("secret-id-0123456789", {"method": "approle", "role": "role-1"}),
    "kubernetes": ("eyJ.service-account", {"method": "kubernetes", "role": "broker"}),
    "a JWT at a mount of its own": ("eyJ.svid", {"method": "jwt", "role": "broker", "mount": "corp-jwt"}),
}


@pytest.fixture
def vault():
    with served(Vault()) as server:
        yield server


@pytest.fixture(params=["a token"])
def settings(vault, tmp_path, request):
    proof, login = PROOFS[request.param]
    (tmp_path / "proof").write_text(proof)
    entry = {"address": vault.url, "secret": {"file": str(tmp_path / "proof")}, "field": "password", "scopes": {"path": PATH}}
    return entry | ({"login": login} if login else {})


def secret(vault, asked, now=NOW):
    lease = fetched(VaultSource, asked, now)
    ends, data = vault.leases[lease.lease_id]
    assert lease.secrets[0].reveal() == data["password"]
    return lease, ends


@pytest.mark.parametrize("settings", list(PROOFS), indirect=True)
def test_a_secret_is_read_by_every_kind_of_proof(vault, settings):
    assert problems_of(VaultSource, settings) == []
    lease, ends = secret(vault, occasion(settings))
    assert lease.value.reveal().startswith("Bearer made-by-vault-")
    assert (lease.expires, lease.scopes) == (ends, (PATH,)) == (NOW + 600, (PATH,))


@pytest.mark.parametrize("settings", list(PROOFS), indirect=True)
def test_a_lease_is_revoked_with_a_proof_of_that_time(vault, settings):
    lease, _ = secret(vault, occasion(settings))
    done(VaultSource, lambda source: source.revoke(lease.handle))
    assert not vault.leases
    done(VaultSource, lambda source: source.revoke(lease.handle))


def test_a_lease_is_renewed_within_the_life_that_a_credential_may_have_and_then_another_is_made(vault, settings):
    put, asked = [], occasion(settings | {"ttl": 1500})
    leases = Leases(VaultSource(), put.extend, lambda: vault.now)

    async def used_at(second):
        vault.now = NOW + second
        await leases.issue(asked, vault.now)
        await asyncio.sleep(0)
        if flights := [each.flight for each in leases._entries.values() if each.flight]:
            await asyncio.wait(flights)
        return leases.cached(asked, vault.now)

    async def script():
        first = await used_at(0)
        for second in (550, 1120):
            later = await used_at(second)
            assert (later.lease_id, later.value) == (first.lease_id, first.value)
            assert later.expires == vault.leases[first.lease_id][0] - (220 if second == 1120 else 0)
        assert [(each.due, each.handle) for each in put] == [(NOW + 1500, first.handle)]
        assert (await used_at(1460)).lease_id != first.lease_id

    asyncio.run(script())
    assert len(vault.leases) == 2


@pytest.mark.parametrize("settings", ["approle"], indirect=True)
def test_what_a_logins_token_has_read_ends_with_it_and_is_not_renewed(vault, settings):
    lease, _ = secret(vault, occasion(settings))
    assert done(VaultSource, lambda source: source.renew(lease, occasion(settings), NOW)) is None
    assert secret(vault, occasion(settings))[0].lease_id != lease.lease_id


def test_a_lease_that_vault_has_ended_is_not_renewed(vault, settings):
    lease, _ = secret(vault, occasion(settings))
    vault.leases.clear()
    assert done(VaultSource, lambda source: source.renew(lease, occasion(settings), NOW)) is None


def test_the_user_of_basic_authentication_may_be_made_too(vault, settings):
    lease, _ = secret(vault, occasion(settings | {"user_field": "username"}))
    pair = base64.b64decode(lease.value.reveal().removeprefix("Basic ")).decode()
    assert pair == ":".join(vault.leases[lease.lease_id][1].values())


def test_data_is_written_to_the_path(vault, settings):
    scopes = {"path": "aws/creds/deploy", "data": {"ttl": "15m", "count": 2}}
    lease, _ = secret(vault, occasion(settings | {"scopes": scopes}))
    assert vault.written == [("PUT", "aws/creds/deploy", {"ttl": "15m", "count": 2})]
    assert lease.scopes == ("aws/creds/deploy", "count=2", "ttl=15m")


@pytest.mark.parametrize(
    ("operation", "effect", "path"),
    [("rows.list", Effect.READ, PATH), ("deploy", Effect.WRITE, "aws/creds/deploy"), (None, None, PATH)],
    ids=["by its effect", "by its name", "housekeeping reads"],
)
def test_an_operation_may_have_a_secret_of_its_own(vault, settings, operation, effect, path):
    scopes = {"read": {"path": PATH}, "deploy": {"path": "aws/creds/deploy", "data": {}}}
    secret(vault, occasion(settings | {"scopes": scopes}, operation, effect))
    assert [written[1] for written in vault.written] == [path]


@pytest.mark.parametrize(("namespace", "right"), [("teams/payments", True), ("other", False), (None, False)])
def test_the_namespace_is_the_entrys(vault, settings, namespace, right):
    vault.namespace = "teams/payments"
    asked = occasion(settings | ({"namespace": namespace} if namespace else {}))
    if right:
        secret(vault, asked)
    else:
        assert "Vault refuses" in refused(VaultSource, asked)[0]


@pytest.mark.parametrize("settings", ["approle"], indirect=True)
@pytest.mark.parametrize(("token_ttl", "life"), [(60, 60), (7200, 600), (0, 600)], ids=["sooner", "later", "never"])
def test_a_secret_ends_with_the_token_that_it_was_read_with(vault, settings, token_ttl, life):
    vault.token_ttl = token_ttl
    lease, ends = secret(vault, occasion(settings))
    assert lease.expires == ends == NOW + life


@pytest.mark.parametrize("wrong", [3600, -3600], ids=["an hour ahead", "an hour behind"])
def test_whatever_our_clock_says_a_secret_lives_as_long_as_vault_says(vault, settings, wrong):
    assert fetched(VaultSource, occasion(settings), NOW + wrong).expires == NOW + wrong + 600


@pytest.mark.parametrize("settings", ["a token", "approle"], indirect=True)
@pytest.mark.parametrize("fail", FAULTS)
def test_when_vault_fails_there_is_no_secret_and_the_reason_tells_none(vault, settings, fail):
    fail(vault)
    _, shown = refused(VaultSource, occasion(settings))
    assert not any(word in shown for word in ("SECRET-ECHO", "hvs.", "secret-id-0123456789"))


def test_when_vault_is_down_there_is_no_secret(settings):
    assert "ConnectError" in refused(VaultSource, occasion(settings | {"address": "http://127.0.0.1:9"}))[0]


@pytest.mark.parametrize(
    ("breaks", "remedy"),
    [
        pytest.param(lambda vault: setattr(vault, "sealed", True), "unseal", id="sealed"),
        pytest.param(lambda vault: vault.tokens.clear(), "a token there that is valid", id="a token that it doesn't know"),
        pytest.param(
            lambda vault: setattr(vault, "tokens", {"hvs.root-like": Token(NOW, WORKS)}), "valid", id="a token that ended"
        ),
        pytest.param(
            lambda vault: setattr(vault, "tokens", {"hvs.root-like": Token(None)}),
            "policy this path",
            id="a policy without the path",
        ),
    ],
)
def test_what_vault_refuses_is_told_with_what_to_do_there(vault, settings, breaks, remedy):
    breaks(vault)
    assert remedy in refused(VaultSource, occasion(settings))[0]


@pytest.mark.parametrize("settings", ["approle"], indirect=True)
def test_a_login_that_vault_refuses_is_told_with_what_to_do_there(vault, settings):
    vault.roles["auth/approle/login"] = {}
    assert "see `login` and `secret`" in refused(VaultSource, occasion(settings))[0]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        pytest.param({"lease_id": ""}, "no lease", id="a static secret"),
        pytest.param({"lease_duration": 0}, "ended already", id="no life"),
        pytest.param({"lease_duration": None}, "how long", id="nobody knows how long"),
        pytest.param({"lease_duration": "soon"}, "no number", id="a life in words"),
        pytest.param({"data": None}, "no lease", id="no data"),
        pytest.param({"data": {"user": "x"}}, "can be sent", id="no such field"),
        pytest.param({"data": {"password": "a\r\nx-evil: made-by-vault"}}, "can be sent", id="a header in it"),
        pytest.param({"data": {"password": {"made": "made-by-vault"}}}, "can be sent", id="no text"),
    ],
)
def test_a_secret_that_is_not_what_was_asked_for_is_not_used(vault, settings, changed, why):
    vault.changed = changed
    message, shown = refused(VaultSource, occasion(settings))
    assert why in message
    assert "made-by-vault" not in shown


def test_a_lease_that_vault_does_not_revoke_is_tried_again(vault, settings):
    lease, _ = secret(vault, occasion(settings))
    vault.tokens["hvs.root-like"] = Token(None, {PATH: {"read"}})
    with pytest.raises(CredentialUnavailable, match="sys/leases/revoke"):
        done(VaultSource, lambda source: source.revoke(lease.handle))
    assert vault.leases


@pytest.mark.parametrize("settings", ["a token", "approle"], indirect=True)
def test_neither_logs_nor_what_holds_it_show_a_secret(vault, settings, caplog):
    caplog.set_level(logging.DEBUG)
    lease, _ = secret(vault, occasion(settings | {"user_field": "username"}))
    done(VaultSource, lambda source: source.revoke(lease.handle))
    shown = f"{lease!r} {lease.handle!r} {caplog.text}"
    assert not any(word in shown for word in ("made-by-vault", "hvs.", "secret-id-0123456789"))
    assert "made-by-vault" not in lease.handle.reveal()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"scopes": {}}, "scopes", id="no path"),
        pytest.param({"scopes": {"path": "../sys/policies"}}, "path", id="a path that leaves"),
        pytest.param({"scopes": {"path": "a/b?list=true"}}, "path", id="a path with a query"),
        pytest.param({"address": "http://vault.example:8200"}, "address", id="plain text to elsewhere"),
        pytest.param({"namespace": "a\nb"}, "namespace", id="a namespace with a line break"),
        pytest.param({"login": {"method": "userpass", "role": "x"}}, "login", id="a login that is none"),
        pytest.param({"secret": "hvs.literal"}, "secret", id="a literal token"),
    ],
)
def test_settings_that_are_not_right_are_told_by_name(settings, change, named):
    problems = problems_of(VaultSource, settings | change)
    assert any(named in problem for problem in problems)
    assert "hvs." not in str(problems)
