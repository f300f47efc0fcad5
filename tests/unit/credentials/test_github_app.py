"""`github-app`, against a GitHub that checks what GitHub checks."""

import logging

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from fakes.github import GitHub, pem
from fakes.serving import served
from issuing import FAULTS, NOW, done, fetched, occasion, problems_of, refused

from broker.credentials.base import CredentialUnavailable, Secret
from broker.credentials.github_app import GithubAppSource
from broker.policy.types import Effect

HOUR = 3600
WRITES = {"permissions": {"issues": "write", "contents": "read"}}


@pytest.fixture
def github():
    with served(GitHub()) as server:
        yield server


@pytest.fixture
def settings(github, tmp_path):
    (tmp_path / "key.pem").write_text(pem())
    secret = {"file": str(tmp_path / "key.pem")}
    return {"secret": secret, "app": github.app, "installation": 77, "api": github.url, "scopes": WRITES}


def token(github, asked, now=NOW):
    lease = fetched(GithubAppSource, asked, now)
    [secret] = [one.reveal() for one in lease.secrets]
    assert lease.value.reveal() == f"Bearer {secret}"
    return lease, github.tokens[secret]


@pytest.mark.parametrize(
    ("operation", "effect", "permissions"),
    [
        pytest.param("issues.create", Effect.WRITE, {"issues": "write", "contents": "read"}, id="a write has what the tool has"),
        pytest.param("issues.list", Effect.READ, {"issues": "read", "contents": "read"}, id="a read only reads"),
        pytest.param(None, None, {"issues": "read", "contents": "read"}, id="housekeeping only reads"),
    ],
)
def test_a_token_may_do_what_the_operation_does(github, settings, operation, effect, permissions):
    lease, told = token(github, occasion(settings, operation, effect))
    assert told["permissions"] == {"metadata": "read"} | permissions
    assert lease.scopes == tuple(sorted(f"{name}:{level}" for name, level in permissions.items()))


@pytest.mark.parametrize(
    ("operation", "effect", "permissions"),
    [
        pytest.param("issues.create", Effect.WRITE, {"issues": "write"}, id="by its name"),
        pytest.param("files.get", Effect.READ, {"contents": "read"}, id="by its effect"),
        pytest.param("permissions", Effect.WRITE, {"issues": "read"}, id="by a name that is the field's too"),
    ],
)
def test_an_operation_may_have_permissions_of_its_own(github, settings, operation, effect, permissions):
    written = {"issues.create": {"issues": "write"}, "read": {"contents": "read"}, "permissions": {"issues": "read"}}
    scopes = {word: {"permissions": those} for word, those in written.items()}
    asked = settings | {"scopes": scopes}
    assert problems_of(GithubAppSource, asked) == []
    _, told = token(github, occasion(asked, operation, effect))
    assert told["permissions"] == {"metadata": "read"} | permissions


def test_an_operation_that_a_map_leaves_out_has_no_token(github, settings):
    scopes = {"issues.create": {"permissions": {"issues": "write"}}}
    assert "files.put" in refused(GithubAppSource, occasion(settings | {"scopes": scopes}, "files.put", Effect.WRITE))[0]
    assert not github.seen


def test_a_token_is_for_the_pinned_repositories_only(github, settings):
    lease, told = token(github, occasion(settings, pins={"owner": ("acme",), "repo": ("web", "docs")}))
    assert [one["full_name"] for one in told["repositories"]] == ["acme/web", "acme/Docs"]
    assert lease.scopes[-3:] == ("owner=acme", "repo=web", "repo=docs")


def test_different_pins_are_different_leases(settings):
    source = GithubAppSource()
    pins = ({}, {"repo": ("web",)}, {"repo": ("web", "payments")}, {"owner": ("web",)})
    assert len({source.narrowed(occasion(settings, pins=each)) for each in pins}) == 4


@pytest.mark.parametrize(
    ("more", "pins"),
    [({"owner": "acme"}, {}), ({}, {"owner": ("acme",)}), ({"owner": "acme"}, {"owner": ("other",)})],
    ids=["by the entry's owner", "by the pinned owner", "by the entry's before the pinned one"],
)
def test_an_installation_is_found_by_its_owner(github, settings, more, pins):
    del settings["installation"]
    token(github, occasion(settings | more, pins=pins))
    assert github.seen == [("GET", "/users/acme/installation"), ("POST", "/app/installations/77/access_tokens")]


@pytest.mark.parametrize("pins", [{}, {"owner": ("acme", "other")}], ids=["no owner", "two owners"])
def test_without_one_owner_nobody_is_asked(github, settings, pins):
    del settings["installation"]
    assert "owner" in refused(GithubAppSource, occasion(settings, pins=pins))[0]
    assert not github.seen


@pytest.mark.parametrize("wrong", [0, HOUR, -HOUR, 30], ids=["right", "an hour ahead", "an hour behind", "a little ahead"])
def test_whatever_our_clock_says_a_token_has_the_hour_that_github_gives_it(github, settings, wrong):
    lease, _ = token(github, occasion(settings), NOW + wrong)
    assert lease.expires == pytest.approx(NOW + wrong + HOUR, abs=2)


def test_a_token_is_deleted_and_one_that_is_gone_counts_as_deleted(github, settings):
    lease, _ = token(github, occasion(settings))
    done(GithubAppSource, lambda source: source.revoke(lease.handle))
    assert not github.tokens
    done(GithubAppSource, lambda source: source.revoke(lease.handle))


def test_a_token_that_github_does_not_delete_is_tried_again(github, settings):
    lease, _ = token(github, occasion(settings))
    github.instead = (403, {}, b"")
    with pytest.raises(CredentialUnavailable):
        done(GithubAppSource, lambda source: source.revoke(lease.handle))


@pytest.mark.parametrize("fail", FAULTS)
def test_when_github_fails_there_is_no_token_and_the_reason_tells_no_secret(github, settings, fail):
    fail(github)
    for installed in ({}, {"installation": None, "owner": "acme"}):
        _, shown = refused(GithubAppSource, occasion(settings | installed))
        assert "SECRET-ECHO" not in shown
        assert "eyJ" not in shown


def test_when_github_is_down_there_is_no_token(settings):
    assert "ConnectError" in refused(GithubAppSource, occasion(settings | {"api": "http://127.0.0.1:9"}))[0]


@pytest.mark.parametrize(
    ("breaks", "remedy"),
    [
        pytest.param(lambda _, own: own.update(app="999"), "see that `app`", id="another App's ID"),
        pytest.param(lambda _, own: own.update(installation=78), "correct `installation`", id="no such installation"),
        pytest.param(lambda _, own: own.update(installation=None, owner="other"), "correct `installation`", id="no such owner"),
        pytest.param(lambda github, _: github.installations.clear(), "the App is installed", id="not installed any more"),
        pytest.param(lambda github, _: setattr(github, "suspended", True), "suspended", id="suspended"),
        pytest.param(lambda github, _: github.granted.pop("issues"), "give the App these permissions", id="not granted"),
        pytest.param(lambda github, _: github.repositories.remove("web"), "pinned repositories", id="a repository it can't see"),
    ],
)
def test_what_github_refuses_is_told_with_what_to_do_there(github, settings, breaks, remedy):
    breaks(github, settings)
    assert remedy in refused(GithubAppSource, occasion(settings, pins={"repo": ("web",)}))[0]


ALL = [{"name": name, "full_name": f"acme/{name}"} for name in ("web", "payments")]


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        pytest.param({"permissions": {"issues": "write"}}, "more permissions", id="writes where it should read"),
        pytest.param({"permissions": {"issues": "read", "secrets": "read"}}, "more permissions", id="one permission more"),
        pytest.param({"permissions": {"metadata": "write"}}, "more permissions", id="writes metadata"),
        pytest.param({"permissions": {"issues": "owner"}}, "no installation token", id="a level nobody knows"),
        pytest.param({"repositories": ALL}, "more repositories", id="one repository more"),
        pytest.param({"repositories": []}, "more repositories", id="nobody knows which repositories"),
        pytest.param({"repository_selection": "all"}, "more repositories", id="all repositories"),
        pytest.param({"expires_at": "2020-01-01T00:00:00Z"}, "ended already", id="ended"),
        pytest.param({"expires_at": "2030-01-01T00:00:00"}, "when the credential ends", id="an end in nobody's time"),
        pytest.param({"expires_at": None}, "when the credential ends", id="no end"),
        pytest.param({"token": ""}, "can be sent", id="an empty token"),
        pytest.param({"token": "a\r\nx-evil: 1"}, "can be sent", id="a token with a header in it"),
    ],
)
def test_a_token_that_is_not_what_was_asked_for_is_not_used(github, settings, changed, why):
    github.changed = changed
    message, shown = refused(GithubAppSource, occasion(settings, pins={"repo": ("web",)}))
    assert why in message
    assert "ghs_" not in shown


def test_an_answer_without_a_time_is_not_used(github, settings):
    github.dated = False
    assert "what time" in refused(GithubAppSource, occasion(settings))[0]


@pytest.mark.parametrize("key", ["", "no key", pem(rsa.generate_private_key(65537, 2048))], ids=["empty", "no PEM", "another's"])
def test_a_wrong_key_is_told_without_showing_it(github, settings, tmp_path, key):
    (tmp_path / "key.pem").write_text(key)
    message, shown = refused(GithubAppSource, occasion(settings))
    assert "private key" in message
    assert not key or key[40:80] not in shown.replace("\n", "") or len(key) < 40


def test_neither_logs_nor_what_holds_it_show_a_token(github, settings, caplog):
    caplog.set_level(logging.DEBUG)
    lease, _ = token(github, occasion(settings))
    shown = f"{lease!r} {lease.handle!r} {caplog.text}"
    assert "ghs_" not in shown
    assert "eyJ" not in shown
    assert isinstance(lease.handle, Secret)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        pytest.param({"scopes": {}}, "scopes", id="no permissions"),
        pytest.param({"scopes": {"permissions": {}}}, "permissions", id="empty permissions"),
        pytest.param({"scopes": {"permissions": {"issues": "all"}}}, "permissions", id="a level that is none"),
        pytest.param({"api": "http://github.example"}, "api", id="plain text to elsewhere"),
        pytest.param({"api": "https://user:pw@github.example"}, "api", id="a password in the URL"),
        pytest.param({"installation": "77"}, "installation", id="an installation in quotes"),
        pytest.param({"secret": "hunter2hunter2"}, "secret", id="a literal key"),
        pytest.param({"app_id": "1"}, "app_id", id="a field that is none"),
    ],
)
def test_settings_that_are_not_right_are_told_by_name(settings, change, named):
    problems = problems_of(GithubAppSource, settings | change)
    assert problems
    assert any(named in problem for problem in problems)
    assert "hunter2" not in str(problems)


def test_right_settings_have_no_problem(settings):
    assert problems_of(GithubAppSource, settings) == []
