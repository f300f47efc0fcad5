"""Who is calling: proven by a token, a certificate or a tunnel, and by nothing else."""

import base64

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.containment.standing import Standing
from broker.identity import MAX_TOKEN_S, Evidence, Principal, TokenAuthority, identify, proxy_credentials
from broker.policy.snapshot import Agent, PolicySnapshot
from broker.policy.types import Code, Decision, Door

NOW = 1_800_000_000.0
KEY = Ed25519PrivateKey.generate()
AUTHORITY = TokenAuthority(KEY)
BOT = Agent("bot", "team", "primary", "a#", {}, spiffe="spiffe://acme.example/bot", token=True)
MUTUAL = Agent("mutual", "team", "primary", "m#", {}, spiffe="spiffe://acme.example/mutual")
TENANT = Agent("tenant", "team", "primary", "t#", {}, namespace="build-7")
SNAPSHOT = PolicySnapshot(
    "1", {"bot": BOT, "mutual": MUTUAL, "tenant": TENANT}, {}, {}, {agent.spiffe: agent for agent in (BOT, MUTUAL)}
)


def basic(name, token):
    return "Basic " + base64.b64encode(f"{name}:{token}".encode()).decode()


def at(evidence, now=NOW):
    return identify(evidence, SNAPSHOT, AUTHORITY, now)


def test_a_token_names_its_agent_and_its_times():
    principal = AUTHORITY.check(AUTHORITY.mint("bot", NOW), NOW)
    assert principal == Principal("bot", NOW, NOW + MAX_TOKEN_S)


def test_a_token_never_lasts_longer_than_an_hour():
    assert AUTHORITY.check(AUTHORITY.mint("bot", NOW, 10**6), NOW + MAX_TOKEN_S) is None


def test_a_checked_token_still_ends():
    token = AUTHORITY.mint("bot", NOW, 60)
    assert AUTHORITY.check(token, NOW + 59)
    assert AUTHORITY.check(token, NOW + 60) is None


def _claims(**changes):
    return {"iss": "envoy-tool-broker", "aud": "envoy-tool-broker", "sub": "bot", "iat": NOW, "exp": NOW + 60, **changes}


HEADER = {"typ": "broker-agent+jwt"}


@pytest.mark.parametrize(
    "token",
    [
        pytest.param("", id="nothing"),
        pytest.param("a.b.c", id="garbage"),
        pytest.param("é" * 10, id="not ASCII"),
        pytest.param(jwt.encode(_claims(), Ed25519PrivateKey.generate(), "EdDSA", HEADER), id="another key"),
        pytest.param(jwt.encode(_claims(), "k" * 32, "HS256", HEADER), id="another algorithm"),
        pytest.param(jwt.encode(_claims(), None, "none", HEADER), id="no signature"),
        pytest.param(jwt.encode(_claims(), KEY, "EdDSA"), id="another kind of token of ours"),
        pytest.param(jwt.encode(_claims(aud="x"), KEY, "EdDSA", HEADER), id="another audience"),
        pytest.param(jwt.encode(_claims(exp=NOW + 10**6), KEY, "EdDSA", HEADER), id="longer than an hour"),
        pytest.param(jwt.encode(_claims(sub=None), KEY, "EdDSA", HEADER), id="no subject"),
        pytest.param(jwt.encode(_claims(iat=NOW + 60, exp=NOW + 120), KEY, "EdDSA", HEADER), id="from the future"),
    ],
)
def test_what_is_no_token(token):
    assert AUTHORITY.check(token, NOW) is None


@pytest.mark.parametrize(
    ("evidence", "agent"),
    [
        pytest.param(
            Evidence(Door.PROXY, proxy_authorization=basic("bot", AUTHORITY.mint("bot", NOW))), "bot", id="at the proxy"
        ),
        pytest.param(Evidence(Door.BASE_URL, token=AUTHORITY.mint("bot", NOW)), "bot", id="at the base URL"),
        pytest.param(Evidence(Door.PROXY, peer_uri="spiffe://acme.example/mutual"), "mutual", id="by certificate"),
        pytest.param(
            Evidence(Door.PROXY, peer_uri="spiffe://acme.example/mutual", peer_times=f"/{NOW + 1:.0f}"),
            "mutual",
            id="by certificate, to its last second",
        ),
        pytest.param(Evidence(Door.PROXY, carried=("bot", f"{NOW:.0f}/{NOW + 60:.0f}")), "bot", id="inside a tunnel"),
        pytest.param(Evidence(Door.PROXY, carried=("mutual", "")), "mutual", id="inside a tunnel opened by certificate"),
        pytest.param(Evidence(Door.NAMESPACE, carried=("bot", "")), "bot", id="in a namespace that a process brought"),
        pytest.param(Evidence(Door.NAMESPACE, carried=("tenant", ""), namespace="k1/build-7"), "tenant", id="in one by its name"),
    ],
)
def test_who_is_proven(evidence, agent):
    principal = at(evidence)
    assert isinstance(principal, Principal)
    assert principal.agent == agent


@pytest.mark.parametrize(
    ("evidence", "detail"),
    [
        pytest.param(Evidence(Door.PROXY), "carries no identity", id="nothing at the proxy"),
        pytest.param(Evidence(Door.PROXY, token=AUTHORITY.mint("bot", NOW)), "carries no identity", id="the other door's header"),
        pytest.param(Evidence(Door.BASE_URL, proxy_authorization=basic("bot", "x")), "carries no identity", id="and the reverse"),
        pytest.param(
            Evidence(Door.PROXY, proxy_authorization=basic("mutual", AUTHORITY.mint("bot", NOW))),
            "another agent's",
            id="another name",
        ),
        pytest.param(
            Evidence(Door.BASE_URL, token=AUTHORITY.mint("mutual", NOW)), "takes no tokens", id="a manifest without tokens"
        ),
        pytest.param(Evidence(Door.PROXY, peer_uri="spiffe://acme.example/other"), "SPIFFE ID", id="a stranger's certificate"),
        pytest.param(
            Evidence(Door.PROXY, peer_uri="spiffe://acme.example/mutual", peer_times=f"/{NOW:.0f}"),
            "has ended",
            id="a connection that outlives its certificate",
        ),
        pytest.param(Evidence(Door.PROXY, carried=("mutual", f"/{NOW:.0f}")), "has ended", id="a tunnel that does"),
        pytest.param(
            Evidence(Door.NAMESPACE, carried=("tenant", ""), namespace="k1/build-8"), "no longer", id="a namespace that it had"
        ),
        pytest.param(
            Evidence(Door.PROXY, carried=("bot", f"{NOW - 60:.0f}/{NOW:.0f}")), "has ended", id="a tunnel that outlives its token"
        ),
    ],
)
def test_who_is_nobody_and_why(evidence, detail):
    decision = at(evidence)
    assert isinstance(decision, Decision)
    assert decision.code is Code.AGENT_UNKNOWN
    assert detail in decision.detail


@pytest.mark.parametrize(
    "header", [None, "", "Bearer x", "Basic !!!", "Basic " + base64.b64encode(b"no-colon").decode(), "Basic /w=="]
)
def test_what_is_no_basic_authorization(header):
    assert proxy_credentials(header) is None


def test_times_survive_the_way_through_a_tunnel():
    principal = Principal("bot", NOW, NOW + 60)
    assert Principal.decode("bot", principal.encode()) == principal


def test_revoked_tokens_are_those_issued_up_to_that_moment():
    standing = Standing()
    standing.revoke_tokens("bot", NOW)
    standing.revoke_tokens("bot", NOW - 50)
    assert standing.taken_back(Principal("bot", NOW, NOW + 60))
    assert not standing.taken_back(Principal("bot", NOW + 1, NOW + 60))
    assert not standing.taken_back(Principal("other", NOW, NOW + 60))
    assert not standing.taken_back(Principal("bot"))


def test_a_token_made_right_after_a_revocation_counts():
    standing, moment = Standing(), NOW + 0.25
    standing.revoke_tokens("bot", moment)
    assert standing.taken_back(AUTHORITY.check(AUTHORITY.mint("bot", moment - 0.01), moment))
    assert not standing.taken_back(AUTHORITY.check(AUTHORITY.mint("bot", moment + 0.01), moment + 1))
