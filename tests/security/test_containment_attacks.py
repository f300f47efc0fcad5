"""Ways around containment that were tried, by agents and by other brokers, against the real parts without a network."""

import asyncio
import json
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.applications import Starlette

from broker.admin.api import acting
from broker.admin.operators import Operators
from broker.audit.record import Attempt
from broker.containment.response import Containment, Surroundings
from broker.containment.standing import Opened
from broker.credentials.scrub import Scrubber
from broker.errors import UsageError
from broker.events import Cut, RequestBody, RequestHead, ResponseHead, Send, Services
from broker.exchange import Exchange
from broker.identity import Evidence, Person, TokenAuthority
from broker.ledger.memory import MemoryLedger
from broker.manifest.load import load_texts
from broker.metrics import Metrics
from broker.policy.agreement import Wire
from broker.policy.containment import Detector
from broker.policy.types import Door, Request
from broker.protocols.base import Reply
from broker.protocols.registry import ADAPTERS
from broker.tunnel import authorize

NOW = 1_800_000_000.0
TOKENS = TokenAuthority(Ed25519PrivateKey.from_private_bytes(b"t" * 32))
BANK, LOCAL = "http://127.0.0.1:1", {"addresses": ["127.0.0.0/8"]}
OPERATIONS = {
    "pages.get": {"match": {"method": "GET", "path": "/pages"}, "effect": "read", "data": ["untrusted"]},
    "refunds.create": {"match": {"method": "POST", "path": "/refunds"}, "effect": "write"},
}
GRANTED = {"pages.get": {}, "refunds.create": {"approval": {"approvers": 1}}}
FLOW = {"after": ["untrusted"], "deny": {"effect": "write"}, "unless": {"approvers": 2, "groups": ["secops"]}}


def document(kind, name, **spec):
    metadata = {"name": name, "owner": "team", **({"oncall": "night"} if kind == "Agent" else {})}
    return json.dumps({"apiVersion": "broker/v1", "kind": kind, "metadata": metadata, "spec": spec}).encode()


def broker(flow=(), granted=GRANTED, containment=None):
    loaded = load_texts(
        {
            "p.yaml": document("Platform", "acme", flow=list(flow), containment=containment or {}),
            "t.yaml": document("Tool", "bank", protocol="rest", endpoint=BANK, operations=OPERATIONS, upstream=LOCAL),
            "a.yaml": document("Agent", "bot", identity={"token": True}, tools={"bank": {"operations": granted}}),
        },
        Path(),
    )
    assert loaded.snapshot, loaded.findings
    ids, records = count(1), []
    audit = SimpleNamespace(append=records.append, records=records)
    around = Surroundings(audit, lambda: NOW, lambda: NOW, lambda: 1, lambda: f"n{next(ids)}")
    held = Containment(around)
    held.apply_policy(loaded.snapshot, ("decoy-0123456789abcdef",))
    return Services(
        snapshot=lambda: loaded.snapshot, adapters=ADAPTERS, issuers={}, audit=audit, ledger=MemoryLedger(), tokens=TOKENS,
        containment=held, now=lambda: NOW, steady=lambda: NOW, mono_ns=lambda: 1, random_id=lambda: f"d{next(ids)}",
        metrics=Metrics(),
    )  # fmt: skip


def call(services, method="POST", path="/bank/refunds", *headers, body=b"{}", run="r1"):
    """The answer to one call: its problem, or `Send`."""
    token = TOKENS.mint("bot", NOW)
    named = () if run is None else (("x-run-id", run),)
    said = (("content-type", "application/json"), *named, ("x-broker-token", token), *headers)
    wire = Wire(Door.BASE_URL, "http", "127.0.0.1", path, "", "", "bank")
    has_body = method != "GET"
    exchange = Exchange(services)
    evidence = Evidence(Door.BASE_URL, token=token)
    command = exchange.handle(RequestHead(wire, Request(method, path, "", said), evidence, has_body=has_body))
    if has_body and not isinstance(command, Reply):
        command = exchange.handle(RequestBody(body))
    if isinstance(command, Send):
        exchange.handle(ResponseHead(200, (), "via_upstream", has_body=False))
    exchange.close()
    return json.loads(command.body) if isinstance(command, Reply) else command


def approve(services, problem, *people):
    for who in people:
        services.containment.vote(problem["approval"]["id"], who, "", approves=True)


ANN, BOB = Person("ann", ("secops",)), Person("bob", ("secops",))


# Approvals.


@pytest.mark.parametrize("header", [("stripe-account", "acct_other"), ("if-match", "*")])
def test_a_header_that_people_did_not_see_does_not_go_along_with_their_approval(header):
    services = broker()
    asked = call(services, "POST", "/bank/refunds", ("stripe-account", "acct_mine"))
    [shown] = services.containment.listed()
    assert shown["headers"] == {"stripe-account": "acct_mine"}
    approve(services, asked, ANN)
    refused = call(services, "POST", "/bank/refunds", ("stripe-account", "acct_mine"), header)
    assert (refused["code"], refused["approval"]["id"] != asked["approval"]["id"]) == ("approval_required", True)
    assert call(services)["code"] == "approval_required"
    assert isinstance(call(services, "POST", "/bank/refunds", ("stripe-account", "acct_mine")), Send)


def test_what_differs_with_each_try_and_means_nothing_needs_no_new_approval():
    services = broker()
    tries = [(("traceparent", f"00-{n:032}-{n:016}-01"), ("x-request-id", str(n)), ("user-agent", f"bot/{n}")) for n in (1, 2)]
    approve(services, call(services, "POST", "/bank/refunds", *tries[0]), ANN)
    assert isinstance(call(services, "POST", "/bank/refunds", *tries[1]), Send)


def test_one_persons_approval_of_the_operation_does_not_lift_a_flow_rule_that_wants_two_of_a_group():
    services = broker([FLOW])
    asked = call(services)
    assert (asked["code"], asked["approval"]["approvers"]) == ("approval_required", 1)
    approve(services, asked, Person("eve"))
    assert isinstance(call(services, "GET", "/bank/pages"), Send)
    refused = call(services)
    assert (refused["code"], refused["approval"]["approvers"], refused["approval"]["groups"]) == ("flow_forbidden", 2, ["secops"])
    approve(services, refused, ANN, BOB)
    assert isinstance(call(services), Send)
    # Both were used up by it.
    assert call(services)["code"] == "flow_forbidden"


def test_people_are_not_asked_for_what_a_flow_rule_forbids_anyway():
    services = broker([{**FLOW, "unless": None}])
    assert isinstance(call(services, "GET", "/bank/pages"), Send)
    refused = call(services)
    assert (refused["code"], "approval" in refused, services.containment.listed()) == ("flow_forbidden", False, [])
    # Another run has read nothing, so there people are asked, as often as it takes.
    first = call(services, run="r2")
    assert (first["code"], call(services, run="r2")["approval"]["id"]) == ("approval_required", first["approval"]["id"])


def test_the_word_of_a_wider_circle_does_not_lift_a_rule_that_asks_a_narrower_one():
    services = broker([FLOW], {**GRANTED, "refunds.create": {"approval": {"approvers": 2, "groups": ["secops", "ops"]}}})
    asked = call(services)
    approve(services, asked, ANN, BOB)
    call(services, "GET", "/bank/pages")
    assert call(services)["code"] == "flow_forbidden"


# Requests that show what they must not.


@pytest.mark.parametrize(
    "header", [("x-decoy-0123456789abcdef", "1"), ("accept", "decoy-0123456789abcdef")], ids=["in its name", "in its value"]
)
def test_a_decoy_is_found_in_all_of_a_header(header):
    services = broker()
    assert call(services, "GET", "/bank/pages", header)["code"] == "agent_revoked"


def test_looking_for_a_credential_takes_no_longer_where_a_request_is_made_of_its_beginning():
    value = "eyJhbGciOiJSUzI1NiJ9." + "x" * 800
    credential = Scrubber((value, f"Bearer {value}"))
    body = b"eyJhbGci" * 524_288
    began = time.process_time()
    assert not credential.shown(body)
    assert time.process_time() - began < 0.1
    assert credential.shown(body + value.encode())


SHOWN = {"a decoy": "decoy-0123456789abcdef", "what was injected": "injected-0123456789abcdef"}
ALERTS = {name: {"action": "alert"} for name in ("honeytoken", "credential_in_request")}


@pytest.mark.parametrize(
    "rules", [{}, ALERTS, {"credential_in_request": []}], ids=["that revoke", "that tell", "of which one is off"]
)
@pytest.mark.parametrize("value", SHOWN.values(), ids=SHOWN)
def test_what_no_record_may_show_is_in_none_however_often_it_is_sent_and_whatever_is_done_about_it(value, rules):
    services = broker(containment=rules)
    services.containment.injected("bot", Scrubber((SHOWN["what was injected"],)))
    for _ in range(2):
        call(services, "POST", "/bank/refunds", body=json.dumps({"note": value, value: 1}).encode())
        call(services, "GET", f"/bank/{value}")
        call(services, "GET", f"/nothing/{value}")
        authorize(services, Evidence(Door.PROXY, carried=("bot", "")), f"{value}.evil.example:443")
    assert len([each for each in services.audit.records if each["event"] == "decision"]) == 8
    assert value not in json.dumps(services.audit.records)


def test_a_credential_that_is_made_anew_pushes_no_other_out():
    held = broker().containment
    assert held.injected("bot", Scrubber(["of-one-tool-0123456789"]))
    assert held.injected("bot", Scrubber(["of-another-0123456789"]))
    for _ in range(20):
        assert not held.injected("bot", Scrubber(["of-another-0123456789"]))
    about = Attempt("d", "rev", {"name": "bot"})
    _, (finding,) = held.inspect(about, b"", b"of-one-tool-0123456789")
    assert finding.rule.detector is Detector.CREDENTIAL_IN_REQUEST


# Tunnels.


def test_a_tunnel_that_is_nobodys_is_not_opened():
    """Nor would a call go on that got an answer without having been asked about."""
    services = broker()
    assert Exchange(services).handle(ResponseHead(200, (), "via_upstream", has_body=False)) == Cut()


# The admin API.


@pytest.mark.parametrize("body", [b"[" * 60_000, b"x" * 2_000_000], ids=["deep", "long"])
def test_nobody_can_fill_the_memory_or_break_the_parser_over_tcp(body):
    routes = acting({"POST /agents/{name}/revoke": lambda *_: {}}, lambda *_: None)
    status, sizes = [], iter([body[at : at + 65_536] for at in range(0, len(body), 65_536)])
    scope = {"type": "http", "method": "POST", "path": "/agents/x/revoke", "query_string": b"", "headers": []}

    async def receive():
        chunk = next(sizes, b"")
        return {"type": "http.request", "body": chunk, "more_body": bool(chunk)}

    async def send(message):
        status.append(message.get("status"))

    asyncio.run(Starlette(routes=routes)(scope, receive, send))
    assert status[0] in (400, 413)
    assert (next(sizes, None) is None) is (len(body) < 100_000), "the rest is not read"


def test_what_an_agent_has_open_can_be_cut_although_its_manifest_is_gone():
    services, cut = broker(), []
    acts = Operators(services.snapshot, services.ledger, services.containment, lambda: NOW).acts
    with pytest.raises(UsageError):
        acts["POST /agents/{name:path}/revoke"]({"name": "gone"}, {"reason": "x"}, ANN)
    services.containment.open.enter(Opened("gone", None, cut.append))
    acts["POST /agents/{name:path}/revoke"]({"name": "gone"}, {"reason": "x"}, ANN)
    assert cut == ["x (by ann)"]


# Runs, by what an agent says.


@pytest.mark.parametrize(
    "named",
    [("x-run-id", " r1 "), ("baggage", "run.id=r1"), ("baggage", "a=b,run.id = r%31;p=1")],
    ids=["blanks", "baggage", "baggage with escapes"],
)
def test_a_revoked_run_is_the_same_run_however_it_is_named(named):
    services = broker()
    services.containment.revoke("bot", "r1", "it loops", "jo")
    assert call(services, "GET", "/bank/pages", named, run=None)["code"] == "agent_revoked"


@pytest.mark.parametrize("named", ["", "a b", "x" * 129, "ghp_0123456789abcdef"], ids=["empty", "no name", "long", "credential"])
def test_what_is_no_run_id_is_the_implicit_run_which_can_be_revoked_too(named):
    services = broker()
    services.containment.revoke("bot", "", "it loops", "jo")
    assert call(services, "GET", "/bank/pages", run=named)["code"] == "agent_revoked"
    assert isinstance(call(services, "GET", "/bank/pages", run="r1"), Send)
