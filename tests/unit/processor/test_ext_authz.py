"""CONNECT: Envoy's question, its answer, and what is recorded. Whatever breaks, the answer is a denial with its record."""

import asyncio
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest

from broker.audit import AuditUnavailable
from broker.containment.response import Containment, Surroundings
from broker.events import Services
from broker.identity import TokenAuthority
from broker.ledger.memory import MemoryLedger
from broker.metrics import Metrics
from broker.policy.snapshot import Agent, Endpoint, PolicySnapshot, Tool
from broker.processor.ext_authz import ExtAuthz

NOW = 1_700_000_000.0
SPIFFE = "spiffe://acme.example/bot"
BOT = Agent("bot", "team", "primary", "bot.yaml#", {"api": {}}, spiffe=SPIFFE)
TOOLS = {
    name: Tool(name, "team", "rest", Endpoint("https", f"{name}.example", 443), f"{name}.yaml#", {}) for name in ("api", "other")
}
HOSTS = {("https", tool.endpoint.host, 443): (tool,) for tool in TOOLS.values()}
SNAPSHOT = PolicySnapshot("r1", {"bot": BOT}, TOOLS, HOSTS, {SPIFFE: BOT})


class Breaks(dict):
    """A snapshot's part that fails when it is asked."""

    def get(self, *_):
        raise RuntimeError("hunter2")


class Full(list):
    def append(self, _):
        raise AuditUnavailable("the disk is full")


def asked(target="api.example:443", peer=SPIFFE, namespace=None, headers=(), **changed):
    services = Services(
        snapshot=lambda: SNAPSHOT,
        adapters={},
        issuers={},
        audit=[],
        ledger=MemoryLedger(),
        tokens=TokenAuthority(Ed25519PrivateKey.generate()),
        containment=Containment(Surroundings([], lambda: NOW, lambda: NOW, lambda: 1, lambda: "x")),
        now=lambda: NOW,
        steady=lambda: NOW,
        mono_ns=lambda: 1,
        random_id=lambda: "d1",
        metrics=Metrics(),
    )
    services = replace(services, **changed)
    question = CheckRequest(
        attributes={"source": {"principal": peer}, "request": {"http": {"host": target, "headers": dict(headers)}}}
    )
    if namespace is not None:
        question.attributes.metadata_context.filter_metadata["broker.namespace"].update({"agent": namespace, "namespace": "k1/"})
    return asyncio.run(ExtAuthz(services).Check(question, None)), services.audit


def test_an_agent_opens_a_tunnel_to_its_tools_host_with_proof_and_identity_for_the_calls_inside():
    answer, records = asked()
    assert (answer.HasField("ok_response"), answer.status.code) == (True, 0)
    assert dict(answer.dynamic_metadata) == {"decision": "allow", "agent": "bot", "token": ""}
    assert records == []


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        pytest.param({"peer": ""}, 407, "agent_unknown", id="nobody"),
        pytest.param({"target": "elsewhere.example:443"}, 403, "host_not_declared", id="a host that no tool is at"),
        pytest.param({"target": "other.example:443"}, 403, "tool_not_declared", id="a tool that the manifest does not list"),
        pytest.param(
            {"snapshot": lambda: replace(SNAPSHOT, hosts=Breaks())}, 503, "internal_fault", id="a fault once the agent is known"
        ),
        pytest.param(
            {"snapshot": lambda: replace(SNAPSHOT, by_spiffe=Breaks())}, 503, "internal_fault", id="a fault before it is"
        ),
    ],
)
def test_a_tunnel_is_refused_in_words_and_recorded_under_the_same_decision_for(changed, status, code):
    answer, (record,) = asked(**changed)
    denied = answer.denied_response
    problem = json.loads(denied.body)
    headers = {option.header.key: option.header.value for option in denied.headers}
    assert (denied.status.code, problem["code"], record["code"]) == (status, code, code)
    assert "d1" == headers["x-broker-decision-id"] == problem["decision_id"] == record["decision_id"]
    assert (record["verdict"], record["method"]) == ("deny", "CONNECT")
    assert "hunter2" not in denied.body
    assert not answer.dynamic_metadata


def test_in_a_namespace_its_agent_calls_whatever_certificate_or_token_comes_along():
    answer, _ = asked(peer="", namespace="bot")
    assert answer.dynamic_metadata["agent"] == "bot"
    answer, (record,) = asked(peer=SPIFFE, namespace="gone", headers={"proxy-authorization": "Basic Ym90Ong="})
    # Who asks for no proof does not ask by 407.
    assert (answer.denied_response.status.code, record["code"], record["door"]) == (401, "agent_unknown", "namespace")


def test_a_namespace_that_has_ended_is_nobodys():
    _, (record,) = asked(peer="", namespace="bot", has_ended={"k1"}.__contains__)
    assert (record["code"], record["detail"]) == ("agent_unknown", "the namespace that this connection is from has ended")


def test_a_refusal_that_cannot_be_recorded_is_still_one():
    answer, _ = asked(peer="", audit=Full())
    assert answer.denied_response.status.code == 407


def in_shadow(**agent):
    shadowed = replace(SNAPSHOT.agents["bot"], shadow_until=NOW + 1, **agent)
    return lambda: replace(SNAPSHOT, agents={"bot": shadowed}, by_spiffe={SPIFFE: shadowed})


def test_in_shadow_mode_a_tunnel_to_a_tool_that_is_not_listed_is_opened_once_that_is_recorded():
    exposed = {"shadow": {"other": {}}}
    answer, (record,) = asked(target="other.example:443", snapshot=in_shadow(**exposed))
    assert answer.HasField("ok_response")
    assert (record["verdict"], record["code"], record["method"]) == ("would_deny", "tool_not_declared", "CONNECT")
    unwritten, _ = asked(target="other.example:443", snapshot=in_shadow(**exposed), audit=Full())
    assert json.loads(unwritten.denied_response.body)["code"] == "audit_unavailable"


def test_in_shadow_mode_a_tunnel_to_a_decoy_and_to_a_host_of_no_tool_stays_closed():
    answer, _ = asked(target="other.example:443", snapshot=in_shadow(shadow={}))
    assert json.loads(answer.denied_response.body)["code"] == "tool_not_declared"
    answer, _ = asked(target="elsewhere.example:443", snapshot=in_shadow(shadow={"other": {}}))
    assert json.loads(answer.denied_response.body)["code"] == "host_not_declared"
