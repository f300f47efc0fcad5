"""The life of a call as a script: events in, commands out, and what was recorded. No gRPC, no clock, no Envoy.

The outside is made of small true implementations of the interfaces: a list is an audit sink, a function an issuer.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from uuid import RFC_4122, UUID

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.audit import AuditUnavailable
from broker.audit.record import canonical
from broker.containment.response import Containment, Surroundings
from broker.credentials.base import CredentialUnavailable, Lease, Secret
from broker.events import (
    Cut,
    Event,
    Issue,
    Issued,
    Mark,
    Observe,
    Pass,
    Replace,
    RequestBody,
    RequestHead,
    Reserve,
    Reserved,
    ResponseChunk,
    ResponseHead,
    ResponseTrailers,
    Send,
    Services,
    WantBody,
)
from broker.exchange import Exchange
from broker.identity import Evidence, TokenAuthority
from broker.ledger.base import Granted, LedgerUnavailable
from broker.ledger.memory import MemoryLedger
from broker.manifest.load import load_texts
from broker.metrics import Metrics
from broker.policy.agreement import Wire
from broker.policy.evaluate import evaluate
from broker.policy.types import Door, Request
from broker.processor.ext_proc import ExtProc
from broker.protocols import strict
from broker.protocols.base import Reply, ResponseBlocked
from broker.protocols.mcp import Mcp
from broker.protocols.rest import Rest
from broker.request import run_id

NOW = 1_700_000_000.0
SECRET = "never-to-be-seen"
TOKENS = TokenAuthority(Ed25519PrivateKey.from_private_bytes(b"t" * 32))
TOKEN = TOKENS.mint("caller", NOW)


def _document(kind: str, name: str, **spec: Any) -> bytes:
    metadata = {"name": name, "owner": "team", **({"oncall": "team"} if kind == "Agent" else {})}
    return json.dumps({"apiVersion": "broker/v1", "kind": kind, "metadata": metadata, "spec": spec}).encode()


def _snapshot(*, create: bool = True, credential: bool = True, idempotency: str = "", flow: Any = (), **agent: Any) -> Any:
    title = {"type": "object", "properties": {"title": {"type": "string", "maxLength": 5}}, "additionalProperties": False}
    search = {"effect": "read", **({"data": ["pii"]} if flow else {})}
    rest: dict[str, dict[str, Any]] = {
        "items.list": {"match": {"method": "GET", "path": "/items"}, "effect": "read"},
        "items.create": {"match": {"method": "POST", "path": "/items"}, "effect": "write", "params": {"body": title}},
        "items.upload": {"match": {"method": "PUT", "path": "/items"}, "effect": "write", "max_body": 10},
    }
    for name in ("items.create", "items.upload") if idempotency else ():
        rest[name]["idempotency"] = idempotency
    issued = {"credential": {"issuer": "static", "secret": {"env": "X"}}} if credential else {}
    local = {"upstream": {"addresses": ["127.0.0.0/8"]}}
    granted = {name: {} for name in rest if create or name != "items.create"}
    loaded = load_texts(
        {
            "t1.yaml": _document(
                "Tool", "plain", protocol="rest", endpoint="http://127.0.0.1:1", operations=rest, **issued, **local,
            ),
            "t2.yaml": _document(
                "Tool", "wiki", protocol="mcp", endpoint="http://127.0.0.1:2/mcp", **local,
                operations={"search": search, "drop": {"effect": "destructive"}},
            ),
            "a1.yaml": _document(
                "Agent", "caller", identity={"token": True},
                **{"tools": {"plain": {"operations": granted}, "wiki": {"operations": {"search": {}}}}, **agent},
            ),
            **({"p.yaml": _document("Platform", "acme", flow=flow)} if flow else {}),
            "a2.yaml": _document("Agent", "nobody", identity={"token": True}, mode="enforce", tools={}),
        },
        Path(),
    )  # fmt: skip
    assert loaded.snapshot is not None, loaded.findings
    return loaded.snapshot


SNAPSHOT = _snapshot()


class Records(list[dict[str, Any]]):
    """An audit sink. `full` names the events that can't be written now."""

    full: frozenset[str] = frozenset()

    def append(self, record: Any) -> Any:
        if record["event"] in self.full or record.get("verdict") in self.full:
            raise AuditUnavailable("the disk is full")
        canonical(record)
        super().append(record)
        return record


class Issues:
    """An issuer: `at_hand` is what `cached` gives, `later` what `issue` gives; an exception is raised."""

    name = "static"

    def __init__(self, at_hand: Lease | Exception | None, later: Lease | Exception | None = None) -> None:
        self.at_hand, self.later = at_hand, later

    @staticmethod
    def check(*_: object) -> list[str]:
        return []

    def cached(self, *_: object) -> Lease | None:
        if isinstance(self.at_hand, Exception):
            raise self.at_hand
        return self.at_hand

    async def issue(self, *_: object) -> Lease:
        if not isinstance(self.later, Lease):
            raise self.later or CredentialUnavailable("none")
        return self.later


LEASE = Lease("lease-1", "static", "authorization", Secret(f"Bearer {SECRET}"), ("a",), None, (Secret(SECRET),))


class Counted(Rest):
    """REST that counts how often it reads."""

    reads = 0

    def recognise(self, *args: Any) -> Any:
        self.reads += 1
        return super().recognise(*args)


def services(**changed: Any) -> Services:
    ids = iter(range(10**9))
    clock = iter(range(0, 10**12, 1_000_000))
    base = Services(
        snapshot=lambda: SNAPSHOT,
        adapters={"rest": Counted(), "mcp": Mcp()},
        issuers={"static": Issues(LEASE)},
        audit=Records(),
        ledger=MemoryLedger(),
        tokens=TOKENS,
        now=lambda: NOW,
        steady=lambda: NOW,
        mono_ns=lambda: next(clock),
        random_id=lambda: f"d{next(ids)}",
        metrics=Metrics(),
        containment=None,
    )
    outside = replace(base, **changed)
    return outside if outside.containment else replace(outside, containment=contained(outside))


def contained(outside: Services, **around: Any) -> Containment:
    """A real one on the same record; what it sets off happens at once."""
    ids = count(1)
    found = Containment(Surroundings(outside.audit, outside.now, outside.steady, lambda: 1, lambda: f"n{next(ids)}", **around))
    found.apply_policy(outside.snapshot(), ())
    return found


def head(
    method: str = "GET", path: str = "/plain/items", *headers: tuple[str, str], token: str = TOKEN, body: bool = False
) -> Any:
    path, _, query = path.partition("?")
    tool = path.split("/")[1]
    request = Request(method, path, query, (("x-broker-token", token), *headers))
    wire = Wire(Door.BASE_URL, "http", "127.0.0.1", path, "", "", tool if tool in SNAPSHOT.tools else "")
    return RequestHead(wire, request, Evidence(Door.BASE_URL, token=token), has_body=body)


JSON_TYPE = ("content-type", "application/json")
POST = head("POST", "/plain/items", JSON_TYPE, body=True)
BODY = RequestBody(b'{"title":"x"}')
OK = ResponseHead(200, ((":status", "200"), ("content-length", "7")), "via_upstream", has_body=True)
CALL = head("POST", "/wiki", JSON_TYPE, ("accept", "application/json, text/event-stream"), body=True)
ANSWER = ResponseHead(200, (("content-type", "application/json"),), "via_upstream", has_body=True)


def rpc(method: str, **params: Any) -> RequestBody:
    return RequestBody(json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": params}).encode())


def play(outside: Services, *events: Event) -> list[Any]:
    exchange = Exchange(outside)
    commands = [exchange.handle(event) for event in events]
    exchange.close()
    exchange.close()
    return commands


def events_of(outside: Services) -> list[tuple[str, str | None]]:
    return [(record["event"], record.get("verdict") or record.get("code")) for record in outside.audit]


def problem_of(command: Any) -> dict[str, Any]:
    assert isinstance(command, Reply), command
    return json.loads(command.body)


# Allowed.


def test_a_call_without_a_body_is_sent_with_its_credential_and_leaves_a_decision_and_an_outcome():
    outside = services()
    sent, passed = play(outside, head("GET", "/plain/items?token=mine&page=2", ("authorization", "mine")), OK)
    assert isinstance(sent, Send)
    assert sent.set_headers == (("accept-encoding", "identity"), ("authorization", f"Bearer {SECRET}"))
    assert sent.remove_headers == ("authorization", "x-broker-token")
    assert sent.path == "/plain/items?page=2"
    assert passed == Observe()
    decision, outcome = outside.audit
    assert (decision["verdict"], decision["operation"], decision["agent"]["name"]) == ("allow", "items.list", "caller")
    assert decision["credential"] == {"issuer": "static", "scopes": ["a"], "lease_id": "lease-1", "expires": None}
    assert decision["decision_id"] == outcome["decision_id"]
    assert outcome["upstream"] == {"status": 200, "bytes": 7, "duration_ms": outcome["upstream"]["duration_ms"]}
    assert outcome["upstream"]["duration_ms"] > 0
    assert SECRET not in str(outside.audit)


def test_a_body_is_asked_for_judged_once_and_only_then_sent():
    outside = services()
    wanted, sent, passed = play(outside, POST, BODY, OK)
    assert (wanted, type(sent), passed) == (WantBody(), Send, Observe())
    assert sent.path is None
    assert events_of(outside) == [("decision", "allow"), ("outcome", None)]
    assert outside.audit[0]["args"]["body"] == {"title": "x"}


def test_a_tool_without_a_credential_gets_none():
    sent, _ = play(services(snapshot=lambda: _snapshot(credential=False)), head(), OK)
    assert sent.set_headers == (("accept-encoding", "identity"),)


def test_a_lease_that_must_be_fetched_is_waited_for():
    outside = services(issuers={"static": Issues(None)})
    asked, sent = play(outside, head(), Issued(LEASE))
    assert (type(asked), type(sent)) == (Issue, Send)
    assert ("authorization", f"Bearer {SECRET}") in sent.set_headers


def test_an_exchange_sees_one_snapshot_whatever_comes_into_force_meanwhile():
    narrower = _snapshot(create=False)
    assert narrower.revision != SNAPSHOT.revision
    current = [SNAPSHOT]
    outside = services(snapshot=lambda: current[0])
    exchange = Exchange(outside)
    assert exchange.handle(POST) == WantBody()
    current[0] = narrower
    assert isinstance(exchange.handle(BODY), Send)
    exchange.close()
    assert {record["revision"] for record in outside.audit} == {SNAPSHOT.revision}
    wanted, refused = play(outside, POST, BODY)
    assert (wanted, problem_of(refused)["code"]) == (WantBody(), "operation_not_declared")
    assert outside.audit[-1]["revision"] == narrower.revision


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        pytest.param((("x-run-id", "r-1"),), "r-1", id="its own header"),
        pytest.param((("baggage", "a=b, run.id=r-2"),), "r-2", id="baggage"),
        pytest.param((("x-run-id", "r-1"), ("baggage", "run.id=r-2")), "r-1", id="the header goes before baggage"),
        pytest.param((("x-run-id", "a b"),), "", id="not a name"),
        pytest.param((("x-run-id", "x" * 129),), "", id="too long"),
        pytest.param((("x-run-id", "ghp_0123456789abcdef"),), "", id="a credential, which the record would not tell from others"),
        pytest.param((), "", id="none"),
    ],
)
def test_a_run_is_named_by(headers, expected):
    assert run_id(Request("GET", "/", "", headers)) == expected


# Writes that a tool knows again.

KEYED = _snapshot(idempotency="idempotency-key")
RUN = ("x-run-id", "r-1")


def _keys(outside: Services, call: RequestHead, body: bytes = BODY.body) -> list[str]:
    _, sent, *_ = play(outside, call, RequestBody(body), OK)
    assert isinstance(sent, Send)
    assert "idempotency-key" not in sent.remove_headers
    return [value for name, value in sent.set_headers if name == "idempotency-key"]


def _keyed(**changed: Any) -> Services:
    return services(snapshot=lambda: KEYED, **changed)


def _post(*headers: tuple[str, str], path: str = "/plain/items", **known: Any) -> RequestHead:
    return head("POST", path, JSON_TYPE, *headers, body=True, **known)


def _key(body: bytes, *headers: tuple[str, str]) -> str:
    (key,) = _keys(_keyed(), _post(RUN, *headers), body)
    return key


def test_a_retried_write_of_a_named_run_gets_the_same_key_on_every_broker_and_at_any_time():
    key = _key(b'{"title":"x"}')
    assert _keys(_keyed(steady=lambda: NOW + 3600), _post(RUN)) == [key]
    assert UUID(key).version == 8
    assert UUID(key).variant == RFC_4122
    # It is what goes to the tool, so it stays what it is.
    assert key == "dd0fb822-302a-81dd-85bd-5e6a5ffd98bc"


@pytest.mark.parametrize(
    "same",
    [
        pytest.param(head("POST", "/plain/items", JSON_TYPE, RUN, ("traceparent", "00-1-2-00"), body=True), id="another trace"),
        pytest.param(head("POST", "/plain/items?token=mine", JSON_TYPE, RUN, body=True), id="a credential that was taken off"),
    ],
)
def test_what_a_retry_may_change_leaves_the_key(same):
    assert _keys(_keyed(), same, b'{ "title": "x" }') == [_key(b'{"title":"x"}')]


def test_any_other_write_gets_another_key():
    outside = _keyed()
    named = {"a parameter": _post(RUN, path="/plain/items?page=2"), "the run": _post(("x-run-id", "r-2")), "no run": _post()}
    keys = [_key(b'{"title":"x"}'), _key(b'{"title":"y"}')]
    keys += [key for call in named.values() for key in _keys(outside, call)]
    put = head("PUT", "/plain/items", RUN, body=True)
    keys += _keys(outside, put, b"one") + _keys(outside, put, b"two")
    assert len(set(keys)) == len(keys) == 7


def test_the_implicit_run_has_a_key_until_it_ends():
    now = [NOW]
    outside = _keyed(steady=lambda: now[0])
    (first,) = _keys(outside, _post())
    now[0] += 599.5
    (again,) = _keys(outside, _post())
    now[0] += 600
    (later,) = _keys(outside, _post())
    assert first == again != later


@pytest.mark.parametrize("name", ["idempotency-key", "idempotency_key"])
def test_the_agents_own_key_stays(name):
    assert _keys(_keyed(), _post((name, "mine"))) == []


def test_where_the_catalog_names_no_header_there_is_no_key():
    assert _keys(services(), _post()) == []
    sent, _ = play(_keyed(), head(), OK)
    assert sent.set_headers == (("accept-encoding", "identity"), ("authorization", f"Bearer {SECRET}"))


# Answers that are watched.

TOOLS = json.dumps(
    {"jsonrpc": "2.0", "id": 7, "result": {"tools": [{"name": "search"}, {"name": "drop"}]}}, separators=(",", ":")
).encode()
SHOWN = b'{"jsonrpc":"2.0","id":7,"result":{"tools":[{"name":"search"}]}}'


@pytest.mark.parametrize("size", [1, 7, len(TOOLS)], ids=["byte by byte", "in pieces", "whole"])
def test_a_list_of_tools_shows_only_the_agents_own_however_it_comes(size):
    outside = services()
    parts = [TOOLS[at : at + size] for at in range(0, len(TOOLS), size)]
    chunks = [ResponseChunk(part, last=number == len(parts) - 1) for number, part in enumerate(parts)]
    commands = play(outside, CALL, rpc("tools/list"), ANSWER, *chunks)
    assert [type(command) for command in commands[:3]] == [WantBody, Send, Observe]
    assert b"".join(command.data for command in commands[3:]) == SHOWN
    assert outside.audit[-1]["upstream"]["bytes"] == len(TOOLS)


def test_an_answer_that_must_be_read_and_can_not_be_is_cut_and_stays_cut():
    outside = services()
    bad = ResponseChunk(b"<html>", last=True)
    commands = play(outside, CALL, rpc("tools/list"), ANSWER, bad, ResponseChunk(TOOLS, last=True), ANSWER)
    assert commands[2:] == [Observe(), Cut(), Cut(), Cut()]
    assert events_of(outside)[-1] == ("outcome", "response_blocked")


def test_a_watched_answer_is_never_passed_unread_after_something_out_of_order():
    commands = play(services(), CALL, rpc("tools/list"), ANSWER, OK, ResponseChunk(TOOLS, last=True))
    assert commands[2:] == [Observe(), Cut(), Cut()]


def test_a_compressed_answer_that_must_be_read_is_blocked():
    outside = services()
    answer = replace(ANSWER, headers=(*ANSWER.headers, ("content-encoding", "gzip")))
    blocked = play(outside, CALL, rpc("tools/list"), answer)[-1]
    assert b"response_blocked" in blocked.body
    assert events_of(outside)[-1] == ("outcome", "response_blocked")


@pytest.mark.parametrize(
    "details",
    ["upstream_reset_before_response_started{TLS_error:|CERTIFICATE_VERIFY_FAILED}", "rbac_access_denied_matched_policy[x]"],
)
def test_an_upstream_that_can_not_be_trusted_is_told_apart_from_one_that_is_down(details):
    outside = services()
    _, told = play(outside, head(), ResponseHead(503, (), details, has_body=True))
    assert (told.status, problem_of(told)["code"]) == (403, "upstream_untrusted")
    assert events_of(outside)[-1] == ("outcome", "upstream_untrusted")


def test_an_upstream_that_is_down_is_envoys_answer_with_our_id_and_noted():
    outside = services()
    down = "upstream_reset_before_response_started{connection_failure}"
    assert play(outside, head(), ResponseHead(503, (), down, has_body=True))[1] == Mark("d0")
    assert outside.audit[-1]["detail"] == down


@pytest.mark.parametrize(
    ("details", "wait"), [("no_healthy_upstream", "5"), ("upstream_reset_before_response_started{overflow}", "1")]
)
def test_a_call_that_envoy_did_not_even_try_is_refused_in_our_words_with_a_time_to_wait(details, wait):
    outside = services()
    _, told = play(outside, head(), ResponseHead(503, (), details, has_body=True))
    assert (told.status, problem_of(told)["code"], dict(told.headers)["retry-after"]) == (503, "upstream_unavailable", wait)
    assert events_of(outside)[-1] == ("outcome", "upstream_unavailable")
    assert details in outside.audit[-1]["detail"]


# The credential stays out of answers.

ECHO = ResponseHead(
    200, ((":status", "200"), ("x-echo", f"you sent Bearer {SECRET}"), ("x-other", "1")), "via_upstream", has_body=True
)


def test_a_header_that_shows_the_credential_is_passed_without_it_and_that_is_recorded_and_alerted():
    outside = services()
    _, observed = play(outside, head(), ECHO)
    assert observed == Observe((("x-echo", "you sent Bearer [credential removed]"),))
    decision, alert, outcome = outside.audit
    assert (alert["event"], alert["decision_id"]) == ("alert", decision["decision_id"])
    assert outcome["masked"] == ["x-echo"]
    assert SECRET not in str(outside.audit)


def test_of_a_signed_request_nothing_is_a_secret_but_what_signed_it():
    public = (("x-amz-date", Secret("20270115T080000Z")), ("authorization", Secret("AWS4 Signature=abcdef0123")))
    signed = replace(LEASE, sign=lambda *_: public)
    answer = f"made 20270115T080000Z, AWS4 Signature=abcdef0123, {SECRET}".encode()
    commands = play(services(issuers={"static": Issues(signed)}), head(), OK, ResponseChunk(answer, last=True))
    assert commands[-1] == Replace(b"made 20270115T080000Z, AWS4 Signature=abcdef0123, [credential removed]")


@pytest.mark.parametrize("at", [1, len(SECRET) // 2, len(SECRET) - 1])
def test_a_body_that_shows_the_credential_is_passed_without_it_wherever_it_is_cut(at):
    outside = services()
    first, second = f"a {SECRET[:at]}".encode(), f"{SECRET[at:]} b".encode()
    commands = play(outside, head(), OK, ResponseChunk(first, last=False), ResponseChunk(second, last=True))
    assert b"".join(command.data for command in commands[2:]) == b"a [credential removed] b"
    assert outside.audit[-1]["masked"] == ["body"]


def test_what_is_read_for_the_credential_is_not_asked_for_in_parts_that_are_too_short_to_show_it():
    asked = head("GET", "/plain/items", ("range", "bytes=0-5"), ("if-range", "x"), ("accept", "*/*"))
    [sent] = play(services(), asked)
    assert {"range", "if-range"} <= set(sent.remove_headers)
    assert "accept" not in sent.remove_headers
    [sent] = play(services(snapshot=lambda: _snapshot(credential=False)), asked)
    assert "range" not in sent.remove_headers


def test_trailers_are_read_too_behind_a_body_that_is_read_and_behind_one_that_is_not():
    trailers = ResponseTrailers((("x-echo", SECRET), ("x-other", "1")))
    clean = Pass((("x-echo", "[credential removed]"),))
    assert play(services(), head(), OK, ResponseChunk(b"x", last=False), trailers)[-1] == clean
    image = replace(OK, headers=((":status", "200"), ("content-type", "image/png")))
    assert play(services(), head(), image, trailers)[-2:] == [Pass(), clean]


@pytest.mark.parametrize(
    ("status", "headers", "read"),
    [
        pytest.param(200, (("content-type", "application/json"),), True, id="text"),
        pytest.param(200, (), True, id="of no type"),
        pytest.param(200, (("content-type", "image/png"),), False, id="media"),
        pytest.param(404, (("content-type", "image/png"),), True, id="an error that calls itself media"),
        pytest.param(200, (("content-type", "text/csv"), ("content-length", "9000000")), False, id="long"),
        pytest.param(200, (("content-type", "text/event-stream"), ("content-length", "9000000")), True, id="events"),
        pytest.param(302, (("content-type", "text/csv"), ("content-length", "9000000")), True, id="a redirect"),
    ],
)
def test_of_a_credentialed_answer_is_read_what_is(status, headers, read):
    answer = ResponseHead(status, ((":status", str(status)), *headers), "via_upstream", has_body=True)
    assert play(services(), head(), answer)[-1] == (Observe() if read else Pass())


def test_a_platform_may_refuse_credentials_of_the_agents_own_instead_of_taking_them_off():
    refusing = replace(SNAPSHOT, refuse_own=True)
    [refused] = play(services(snapshot=lambda: refusing), head("GET", "/plain/items", ("authorization", "mine")))
    assert problem_of(refused)["code"] == "protocol_violation"
    assert "authorization" in problem_of(refused)["detail"]
    assert isinstance(play(services(snapshot=lambda: refusing), head())[0], Send)


# Refused.


def _taken_back(agent: str, at: float) -> Containment:
    found = contained(services())
    found.standing.revoke_tokens(agent, at)
    return found


@pytest.mark.parametrize(
    ("events", "changed", "status", "code"),
    [
        pytest.param([head(token="")], {}, 401, "agent_unknown", id="nobody"),
        pytest.param([head(token=TOKENS.mint("ghost", NOW))], {}, 401, "agent_unknown", id="an agent without a manifest"),
        pytest.param([head(token=TOKENS.mint("caller", NOW - 7200))], {}, 401, "agent_unknown", id="a token that has ended"),
        pytest.param([head()], {"containment": _taken_back("caller", NOW)}, 401, "agent_unknown", id="a token taken back"),
        pytest.param([head(path="/other/items")], {}, 403, "tool_not_declared", id="no such tool"),
        pytest.param([head(token=TOKENS.mint("nobody", NOW))], {}, 403, "tool_not_declared", id="a tool of others"),
        pytest.param([head("DELETE")], {}, 403, "operation_not_declared", id="no such operation"),
        pytest.param([head("DELETE", body=True)], {}, 403, "operation_not_declared", id="no such operation, without its body"),
        pytest.param([POST, RequestBody(b'{"title":"xxxxxx"}')], {}, 403, "params_invalid", id="a bad parameter"),
        pytest.param([POST, RequestBody(b"{")], {}, 400, "body_malformed", id="half a body"),
        pytest.param([POST, OK], {}, 400, "protocol_violation", id="no body where one was wanted"),
        pytest.param(
            [head("PUT", "/plain/items", ("content-length", "11"), body=True)], {}, 413, "body_too_large",
            id="a body said to be large",
        ),
        pytest.param(
            [head("PUT", body=True), RequestBody(b"x" * 11)], {}, 413, "body_too_large",
            id="a body that is large and did not say so",
        ),
        pytest.param(
            [head()], {"issuers": {"static": Issues(CredentialUnavailable("no"))}}, 503, "credential_unavailable",
            id="no secret at hand",
        ),
        pytest.param(
            [head(), Issued(CredentialUnavailable("no"))], {"issuers": {"static": Issues(None)}}, 503, "credential_unavailable",
            id="no lease to be had",
        ),
        pytest.param(
            [head(), BODY], {"issuers": {"static": Issues(None)}}, 503, "credential_unavailable",
            id="something else where a lease was wanted",
        ),
    ],
)  # fmt: skip
def test_refused_with_the_reason_recorded_once_and_nothing_sent(events, changed, status, code):
    outside = services(**changed)
    commands = play(outside, *events)
    problem = problem_of(commands[-1])
    assert (commands[-1].status, problem["code"]) == (status, code)
    assert not any(isinstance(command, Send) for command in commands)
    [record] = outside.audit
    assert (record["event"], record["verdict"], record["code"], record["decision_id"]) == (
        "decision",
        "deny",
        code,
        problem["decision_id"],
    )
    assert SECRET not in commands[-1].body.decode()


def test_a_denied_mcp_call_is_a_result_that_the_model_can_read():
    outside = services()
    [_, denied] = play(outside, CALL, rpc("tools/call", name="drop", arguments={}))
    message = json.loads(denied.body)
    assert (denied.status, message["id"], message["result"]["isError"]) == (200, 7, True)
    assert events_of(outside) == [("decision", "deny")]


def test_after_a_denial_nothing_more_is_done_for_this_request():
    outside = services()
    commands = play(outside, head("DELETE"), head(), BODY, OK, ResponseChunk(b"x", last=True))
    assert commands[1:] == [Cut()] * 4
    assert events_of(outside) == [("decision", "deny")]


# The record fails.


def test_an_allow_that_can_not_be_recorded_is_a_503_and_nothing_is_sent():
    outside = services(audit=Records())
    outside.audit.full = frozenset({"decision"})
    [refused] = play(outside, head())
    assert (refused.status, problem_of(refused)["code"]) == (503, "audit_unavailable")
    assert outside.audit == []


def test_the_metrics_count_an_allow_that_is_not_in_the_record_as_what_became_of_it():
    outside = services(audit=Records())
    play(outside, head(), OK)
    outside.audit.full = frozenset({"decision"})
    play(outside, head())
    told = [{"verdict": "allow", "code": ""}, {"verdict": "deny", "code": "audit_unavailable"}]
    assert [outside.metrics.registry.get_sample_value("broker_decisions_total", labels) for labels in told] == [1, 1]


@pytest.mark.parametrize("ended", [pytest.param(False, id="taken back"), pytest.param(True, id="at its end")])
def test_an_identity_that_goes_while_the_body_is_on_its_way_sends_nothing_and_gets_no_credential(ended):
    now, desk = [NOW], Desk()
    outside = limited(desk, now=lambda: now[0])
    exchange = Exchange(outside)
    assert isinstance(exchange.handle(POST), WantBody)
    if ended:
        now[0] += 3600
    else:
        outside.containment.standing.revoke_tokens("caller", NOW)
    assert problem_of(exchange.handle(BODY))["code"] == "agent_unknown"
    exchange.close()
    assert desk.order == ["reserve", "refund", "decision"]
    assert desk.standing() == (0, 0)


def test_a_denial_that_can_not_be_recorded_is_a_denial_all_the_same():
    outside = services(audit=Records())
    outside.audit.full = frozenset({"decision"})
    [refused] = play(outside, head("DELETE"))
    assert (refused.status, problem_of(refused)["code"]) == (403, "operation_not_declared")


def test_an_outcome_that_can_not_be_recorded_takes_nothing_back():
    outside = services(audit=Records())
    outside.audit.full = frozenset({"outcome"})
    sent, passed = play(outside, head(), OK)
    assert (type(sent), passed) == (Send, Observe())


# Faults.


def _raises(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("a fault, with its inside")


class Broken(Rest):
    """REST whose method `where` has a fault."""

    def __init__(self, where: str) -> None:
        setattr(self, where, _raises)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"adapters": {"rest": Broken("recognise")}}, id="recognising"),
        pytest.param({"adapters": {"rest": Broken("body_limit")}}, id="asking for the limit"),
        pytest.param({"issuers": {"static": Issues(ZeroDivisionError("inside"))}}, id="the issuer"),
        pytest.param({"issuers": {}}, id="no such issuer"),
        pytest.param({"adapters": {}}, id="no such adapter"),
        pytest.param({"tokens": SimpleNamespace(check=_raises)}, id="checking the token"),
        pytest.param({"containment": SimpleNamespace(standing=SimpleNamespace(view=_raises))}, id="looking for revocations"),
    ],
)
def test_a_fault_before_the_request_left_is_a_recorded_denial(changed):
    outside = services(**changed)
    commands = play(outside, POST, BODY)
    refused = next(command for command in commands if isinstance(command, Reply))
    assert (refused.status, problem_of(refused)["code"]) == (503, "internal_fault")
    assert "inside" not in refused.body.decode()
    assert not any(isinstance(command, Send) for command in commands)
    assert [(r["event"], r["code"]) for r in outside.audit] == [("decision", "internal_fault")]


def test_a_fault_while_denying_is_a_denial():
    outside = services(adapters={"rest": Broken("denial")})
    [refused] = play(outside, head("DELETE"))
    assert problem_of(refused)["code"] == "internal_fault"


class FaultySink(Records):
    """A sink that breaks its interface: it raises what it should not."""

    def append(self, *_: Any) -> Any:
        raise ZeroDivisionError("inside")


def test_a_record_that_fails_in_a_way_nobody_thought_of_denies_as_well():
    outside = services(audit=FaultySink())
    [refused] = play(outside, head())
    assert problem_of(refused)["code"] == "internal_fault"


def test_metrics_that_fail_deny_and_send_nothing():
    [refused] = play(services(metrics=SimpleNamespace(decided=_raises)), head())
    assert problem_of(refused)["code"] == "internal_fault"


class Watched(Rest):
    """REST whose answers pass a filter that fails with `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def response_filter(self, *_: Any) -> Any:
        def feed(chunk: bytes, *, last: bool) -> bytes:
            raise self.error

        return SimpleNamespace(feed=feed)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        pytest.param(ZeroDivisionError("inside"), "internal_fault", id="a fault"),
        pytest.param(ResponseBlocked("not to be passed"), "response_blocked", id="a verdict"),
    ],
)
def test_what_fails_while_the_answer_streams_cuts_it_for_good(error, code):
    outside = services(adapters={"rest": Watched(error)})
    chunk = ResponseChunk(b"x", last=False)
    commands = play(outside, head(), OK, chunk, chunk, OK)
    assert commands[1:] == [Observe(), Cut(), Cut(), Cut()]
    assert events_of(outside)[-1] == ("outcome", code)


def test_an_answer_of_envoys_own_before_any_request_gets_an_id_and_is_not_ours_to_record():
    outside = services()
    assert [type(command) for command in play(outside, ResponseHead(400, (), "upgrade_failed", has_body=False))] == [Mark]
    assert outside.audit == []


def test_a_denial_that_already_has_its_id_keeps_it():
    refused = ResponseHead(403, (("x-broker-decision-id", "d0"),), "ext_authz_denied", has_body=True)
    assert play(services(), refused) == [Pass()]


def test_trailers_are_refused_since_they_would_leave_unjudged():
    _, denied = play(services(), POST, RequestBody(b'{"title": "x"}', trailers=True))
    assert (denied.status, json.loads(denied.body)["code"]) == (400, "protocol_violation")


def test_a_body_that_envoy_gave_up_on_is_too_large():
    _, denied = play(services(), POST, ResponseHead(413, (), "request_payload_too_large", has_body=True))
    assert (denied.status, json.loads(denied.body)["code"]) == (413, "body_too_large")


# What is spent.

LIMITED = _snapshot(limits={"calls": "2/day", "concurrency": 1, "bytes_out": "1KiB/day", "steps_per_run": 9})
REFUSING = _snapshot(limits={"calls": "0/day"})


class Desk(MemoryLedger):
    """The embedded ledger, and all that it was asked, in order with what the issuer and the sink were.

    `waits` makes its answers such as must be fetched; `gone` makes it fail, at once or when it is waited for.
    """

    def __init__(self, *, waits: bool = False, gone: Exception | None = None) -> None:
        super().__init__()
        self.order: list[str] = []
        self.ended: list[Any] = []
        self.waits, self.gone = waits, gone

    def reserve(self, *asked: Any) -> Any:
        self.order.append("reserve")
        if self.gone and not self.waits:
            raise self.gone
        return At("reserve", self.gone or super().reserve(*asked)) if self.waits else super().reserve(*asked)

    def settle(self, decision_id: str, spent: Any, now: float) -> None:
        self.order.append("settle")
        super().settle(decision_id, spent, now)

    def refund(self, decision_id: str, now: float) -> None:
        self.order.append("refund")
        super().refund(decision_id, now)

    def close(self, *asked: Any) -> Any:
        if closed := super().close(*asked):
            self.ended.append(asked)
        return closed

    def standing(self) -> tuple[int, int]:
        """Calls spent, and calls open."""
        spent = [spent for key, (_, spent) in self.windows.items() if ":calls:" in key]
        return sum(spent), sum(len(calls) for calls in self.open.values())


def limited(desk: Desk, **changed: Any) -> Services:
    """Services whose every part notes in the desk's order that it was asked."""
    outside = services(**{"snapshot": lambda: LIMITED, "ledger": desk, **changed})

    class Sink(Records):
        def append(self, record: Any) -> Any:
            desk.order.append(record["event"])
            return super().append(record)

    class Asked(Issues):
        def cached(self, *asked: object) -> Lease | None:
            desk.order.append("issue")
            return super().cached(*asked)

    found = outside.issuers.get("static")
    issuers = {"static": Asked(found.at_hand, found.later)} if isinstance(found, Issues) else outside.issuers
    sink = Sink() if type(outside.audit) is Records else outside.audit
    sink.full = getattr(outside.audit, "full", frozenset())
    return replace(outside, issuers=issuers, audit=sink)


def test_a_call_is_reserved_then_gets_its_credential_then_is_recorded_then_sent_and_then_settled():
    desk = Desk()
    outside = limited(desk)
    exchange = Exchange(outside)
    exchange.handle(POST)
    assert desk.order == []
    assert isinstance(exchange.handle(BODY), Send)
    assert desk.order == ["reserve", "issue", "decision"]
    exchange.handle(OK)
    exchange.close()
    assert desk.order == ["reserve", "issue", "decision", "outcome", "settle"]
    assert desk.standing() == (1, 0)
    assert (outside.audit[0]["step"], outside.audit[0]["limits"]) == (
        1,
        {"reserved": {"bytes_out": len("/items") + len(BODY.body)}},
    )


def test_a_call_for_which_there_is_no_room_gets_no_credential_and_is_not_sent():
    desk = Desk()
    outside = limited(desk, snapshot=lambda: REFUSING)
    [refused] = play(outside, head())
    assert (refused.status, problem_of(refused)["code"]) == (429, "rate_limited")
    assert "retry-after" not in dict(refused.headers)  # of none there will never be one
    assert desk.order == ["reserve", "decision"]
    [record] = outside.audit
    assert (record["verdict"], record["rule"]) == ("deny", "a1.yaml#/spec/limits/calls")
    assert record["limits"]["refused"]["limit"] == "calls"


def test_a_refused_mcp_call_is_a_result_that_the_model_can_read_and_housekeeping_is_no_step():
    outside = limited(Desk(), snapshot=lambda: _snapshot(limits={"steps_per_run": 1}))
    for _ in range(3):
        assert isinstance(play(outside, CALL, rpc("ping"), ANSWER)[1], Send)
    search = rpc("tools/call", name="search", arguments={})
    assert isinstance(play(outside, CALL, search, ANSWER)[1], Send)
    refused = play(outside, CALL, search)[1]
    result = json.loads(refused.body)["result"]
    assert (refused.status, result["isError"]) == (200, True)
    assert "steps_exhausted" in result["content"][0]["text"]


def test_a_run_that_may_write_nowhere_any_more_also_answers_no_question_of_a_tool():
    flow = [{"after": ["pii"], "deny": {"effect": "write"}, "unless": "approval"}]
    outside = limited(Desk(), snapshot=lambda: _snapshot(flow=flow))
    said = RequestBody(
        json.dumps({"jsonrpc": "2.0", "id": 7, "result": {"content": {"type": "text", "text": "secret"}}}).encode()
    )
    assert isinstance(play(outside, CALL, said, ANSWER)[1], Send)
    assert isinstance(play(outside, CALL, rpc("tools/call", name="search", arguments={}), ANSWER)[1], Send)
    assert problem_of(play(outside, CALL, said)[1])["code"] == "flow_forbidden"
    assert isinstance(play(outside, CALL, rpc("ping"), ANSWER)[1], Send)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        pytest.param({"issuers": {"static": Issues(CredentialUnavailable("no"))}}, "credential_unavailable", id="no credential"),
        pytest.param({"issuers": {"static": Issues(None)}}, "credential_unavailable", id="a credential that does not come"),
        pytest.param({"issuers": {"static": Issues(ZeroDivisionError())}}, "internal_fault", id="a fault of the issuer"),
        pytest.param({"issuers": {}}, "internal_fault", id="no such issuer"),
        pytest.param({"audit": FaultySink()}, "internal_fault", id="a fault of the record"),
        pytest.param({"mono_ns": _raises}, "internal_fault", id="a fault of the clock"),
    ],
)
def test_what_is_denied_after_it_was_reserved_is_given_back_once(changed, code):
    desk = Desk()
    commands = play(limited(desk, **changed), head(), Issued(CredentialUnavailable("no")))
    refused = next(command for command in commands if isinstance(command, Reply))
    assert problem_of(refused)["code"] == code
    assert not any(isinstance(command, Send) for command in commands)
    assert len(desk.ended) == ("reserve" in desk.order)
    assert [spent for _, spent, _ in desk.ended] == [None] * len(desk.ended)
    assert desk.standing() == (0, 0)


def test_what_can_not_be_recorded_is_given_back_once():
    desk, full = Desk(), Records()
    full.full = frozenset({"decision"})
    [refused] = play(limited(desk, audit=full), head())
    assert problem_of(refused)["code"] == "audit_unavailable"
    assert desk.order == ["reserve", "issue", "decision", "refund"]
    assert desk.standing() == (0, 0)


_CHUNK = ResponseChunk(b"x", last=False)
_LIFE = [POST, BODY, Reserved(Granted(1)), Issued(LEASE), OK, _CHUNK]


@pytest.mark.parametrize(
    ("events", "ended", "standing"),
    [
        pytest.param(0, [], (0, 0), id="before it began"),
        pytest.param(1, [], (0, 0), id="while the body is on its way"),
        pytest.param(2, [None], (0, 0), id="while the ledger is asked"),
        pytest.param(3, [None], (0, 0), id="while the credential is on its way"),
        pytest.param(4, [{}], (1, 0), id="after it was sent"),
        pytest.param(5, [{}], (1, 0), id="in the middle of the answer"),
        pytest.param(6, [{}], (1, 0), id="after a part of it"),
    ],
)
def test_a_call_that_is_aborted_ends_its_reservation_once(events, ended, standing):
    desk = Desk(waits=True)
    outside = limited(desk, issuers={"static": Issues(None)}, adapters={"rest": Watched(ResponseBlocked("no"))})
    exchange = Exchange(outside)
    commands = [exchange.handle(event) for event in _LIFE[:events]]
    assert [type(command) for command in commands] == [WantBody, Reserve, Issue, Send, Observe, Cut][:events]
    assert desk.standing() == ((0, 0) if events < 2 else (1, 1))
    exchange.close()
    exchange.close()
    assert [spent for _, spent, _ in desk.ended] == ended
    assert desk.standing() == standing
    assert events_of(outside) == (
        [] if events < 4 else [("decision", "allow"), ("outcome", None if events < 6 else "response_blocked")]
    )


def test_the_next_call_has_the_place_of_the_one_that_ended():
    outside = limited(Desk())
    first, second = Exchange(outside), Exchange(outside)
    assert isinstance(first.handle(head()), Send)
    assert problem_of(second.handle(head()))["code"] == "concurrency_limited"
    second.close()
    first.close()
    assert isinstance(Exchange(outside).handle(head()), Send)


def test_what_the_ledger_refuses_when_it_answers_is_refused():
    desk = Desk(waits=True)
    outside = limited(desk, snapshot=lambda: REFUSING)
    exchange = Exchange(outside)
    asked = exchange.handle(head())
    assert problem_of(exchange.handle(Reserved(asked.answer.result)))["code"] == "rate_limited"
    exchange.close()
    assert "refund" not in desk.order


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="it fails at once"),
        pytest.param(Reserved(LedgerUnavailable("gone")), id="it fails when it is waited for"),
        pytest.param(Issued(LEASE), id="something else comes where its answer was wanted"),
    ],
)
def test_without_the_ledger_nothing_is_sent(answer):
    desk = Desk(gone=LedgerUnavailable("gone"), waits=answer is not None)
    outside = limited(desk)
    commands = play(outside, head(), *([answer] if answer else []))
    assert (commands[-1].status, problem_of(commands[-1])["code"]) == (503, "ledger_unavailable")
    assert not any(isinstance(command, Send | Issue) for command in commands)
    assert events_of(outside) == [("decision", "deny")]


def test_an_end_that_can_not_be_worked_out_leaves_spent_what_was_reserved_and_gives_back_the_place():
    desk = Desk()
    outside = limited(desk)
    exchange = Exchange(outside)
    assert isinstance(exchange.handle(head()), Send)
    exchange._answer.end = _raises
    exchange.close()
    exchange.close()
    assert [spent for _, spent, _ in desk.ended] == [{}]
    assert desk.standing() == (1, 0)


# Any order.

_EVENTS = st.sampled_from(
    [
        head(), POST, BODY, CALL, OK, ANSWER, rpc("tools/list"), rpc("tools/call", name="search", arguments={}),
        head("DELETE"), head(token="forged"), head("PUT", body=True), RequestBody(b""), RequestBody(b"\xff"), Issued(LEASE),
        Issued(CredentialUnavailable("no")), ResponseChunk(b"", last=True), ResponseChunk(TOOLS, last=True),
        ResponseChunk(b"x", last=False), ResponseHead(0, (), "", has_body=False),
        ResponseHead(503, (), "CERTIFICATE_VERIFY_FAILED", has_body=True),
    ]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(_EVENTS, max_size=8), st.booleans(), st.sampled_from([frozenset(), frozenset({"allow"}), frozenset({"outcome"})]))
def test_whatever_comes_in_whatever_order_nothing_is_sent_without_its_allow_and_nothing_raises(events, cached, full):
    outside = services(issuers={"static": Issues(LEASE if cached else None)}, audit=Records(), snapshot=lambda: LIMITED)
    outside.audit.full = full
    exchange = Exchange(outside)
    over, sends = False, 0
    for position, event in enumerate(events):
        before = len(outside.audit)
        command = exchange.handle(event)
        if isinstance(command, Send):
            sends += 1
            assert [r["verdict"] for r in outside.audit[before:]] == ["allow"]
            assert not over
            wanted_body = next(e for e in events if isinstance(e, RequestHead)).has_body
            assert not wanted_body or any(isinstance(e, RequestBody) for e in events[: position + 1])
        over = over or isinstance(command, Cut) or (isinstance(command, Reply) and not sends)
    exchange.close()
    assert (outside.ledger.grants, outside.ledger.open.get("agent/caller:calls:concurrency:0", {})) == ({}, {})
    allows = [r for r in outside.audit if r.get("verdict") == "allow"]
    assert sends == len(allows) <= 1
    assert len([r for r in outside.audit if r["event"] == "outcome"]) == (sends if not full else 0)


# What a call costs, counted.


@contextmanager
def counting(*functions: Any) -> Iterator[dict[str, int]]:
    """How often each function is entered, as the interpreter sees it: nothing is replaced."""
    codes = {function.__code__: function.__name__ for function in functions if isinstance(function, FunctionType)}
    found = dict.fromkeys(codes.values(), 0)

    def profile(frame: Any, event: str, _: object) -> None:
        if event == "call" and frame.f_code in codes:
            found[codes[frame.f_code]] += 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)


def test_an_allowed_call_costs_one_parse_one_evaluation_and_one_append_before_and_one_after():
    outside = services()
    exchange = Exchange(outside)
    with counting(strict.json_value, evaluate, Rest.recognise) as counts:
        exchange.handle(POST)
        assert outside.audit == []
        assert isinstance(exchange.handle(BODY), Send)
        assert len(outside.audit) == 1
        exchange.handle(OK)
        assert len(outside.audit) == 1
        exchange.close()
    assert counts == {"json_value": 1, "evaluate": 1, "recognise": 1}
    assert len(outside.audit) == 2


def test_an_allowed_mcp_call_costs_one_parse():
    with counting(strict.json_value, evaluate) as counts:
        play(services(), CALL, rpc("tools/call", name="search", arguments={}), OK)
    assert counts == {"json_value": 1, "evaluate": 1}


class At(Awaitable[Any]):
    """Suspends once, and says where. Of a `result` that is an exception, it is raised."""

    def __init__(self, where: str, result: Any = None) -> None:
        self.where, self.result = where, result

    def __await__(self) -> Any:
        yield self.where
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class Stream:
    """A gRPC stream at hand: messages to be read, answers that were written."""

    def __init__(self, *messages: Any) -> None:
        self.messages, self.written = list(messages), []

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        await At("read")
        if not self.messages:
            raise StopAsyncIteration
        return self.messages.pop(0)

    async def write(self, answer: Any) -> None:
        self.written.append(answer)
        await At("write")

    async def abort(self, _: object, text: str) -> None:
        await At("abort")
        raise ConnectionAbortedError(text)


def _message(kind: str, headers: dict[str, str], *, end: bool) -> Any:
    message = ext_proc.ProcessingRequest()
    part = getattr(message, kind)
    for name, value in headers.items():
        part.headers.headers.add(key=name, raw_value=value.encode())
    part.end_of_stream = end
    attributes = message.attributes["envoy.filters.http.ext_proc"]
    attributes["xds.route_name"] = "base-url/plain"
    attributes["response.code_details"] = "via_upstream"
    return message


REQUEST_HEADERS = {
    ":method": "POST", ":path": "/plain/items", ":authority": "x", ":scheme": "http", "x-broker-token": TOKEN,
    "content-type": "application/json",
}  # fmt: skip


def _conversation(body: bytes = BODY.body) -> Stream:
    return Stream(
        _message("request_headers", REQUEST_HEADERS, end=False),
        ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=body, end_of_stream=True)),
        _message("response_headers", {":status": "200"}, end=True),
    )


def suspensions(outside: Services, stream: Stream) -> list[Any]:
    """Where the driver suspends. No event loop runs here, so a new task, a timer or a thread would be an error."""
    coroutine, found = ExtProc(outside, lambda: None).Process(stream, stream), []
    try:
        while True:
            found.append(coroutine.send(None))
    except StopIteration:
        return found


def test_the_driver_waits_for_the_stream_alone_when_the_credential_is_at_hand():
    outside, stream = services(), _conversation()
    assert suspensions(outside, stream) == ["read", "write"] * 3 + ["read"]
    kinds = [answer.WhichOneof("response") for answer in stream.written]
    assert kinds == ["request_headers", "request_body", "response_headers"]
    assert [bool(answer.dynamic_metadata) for answer in stream.written] == [False, True, False]
    assert events_of(outside) == [("decision", "allow"), ("outcome", None)]


def test_the_driver_waits_once_more_only_for_a_lease_that_is_not():
    class Slow(Issues):
        async def issue(self, *_: object) -> Lease:
            await At("issue")
            return LEASE

    outside, stream = services(issuers={"static": Slow(None)}), _conversation()
    assert suspensions(outside, stream) == ["read", "write", "read", "issue", "write", "read", "write", "read"]
    assert stream.written[1].dynamic_metadata


@pytest.mark.parametrize(
    "error", [pytest.param(CredentialUnavailable("no"), id="no lease"), pytest.param(ZeroDivisionError("inside"), id="a fault")]
)
def test_an_issuer_that_fails_gets_the_call_a_recorded_503(error):
    outside, stream = services(issuers={"static": Issues(None, error)}), _conversation()
    stream.messages.pop()
    suspensions(outside, stream)
    answer = stream.written[1].immediate_response
    assert (answer.status.code, json.loads(answer.body)["code"]) == (503, "credential_unavailable")
    assert events_of(outside) == [("decision", "deny")]


def test_the_driver_waits_once_more_for_a_ledger_whose_answer_must_be_fetched():
    outside, stream = limited(Desk(waits=True)), _conversation()
    assert suspensions(outside, stream) == ["read", "write", "read", "reserve", "write", "read", "write", "read"]
    assert stream.written[1].dynamic_metadata


@pytest.mark.parametrize(
    "error", [pytest.param(LedgerUnavailable("no"), id="it is away"), pytest.param(ZeroDivisionError("inside"), id="a fault")]
)
def test_a_ledger_that_fails_gets_the_call_a_recorded_503(error):
    outside, stream = limited(Desk(waits=True, gone=error)), _conversation()
    stream.messages.pop()
    suspensions(outside, stream)
    answer = stream.written[1].immediate_response
    assert (answer.status.code, json.loads(answer.body)["code"]) == (503, "ledger_unavailable")
    assert events_of(outside) == [("decision", "deny")]


def test_a_stream_that_is_gone_while_the_ledger_is_asked_gives_back_what_it_took():
    desk, stream = Desk(waits=True), _conversation()
    coroutine = ExtProc(limited(desk), lambda: None).Process(stream, stream)
    while coroutine.send(None) != "reserve":
        pass
    assert desk.standing() == (1, 1)
    coroutine.close()
    assert desk.order == ["reserve", "refund"]
    assert desk.standing() == (0, 0)


def test_a_stream_that_ends_early_still_has_its_outcome():
    outside, stream = services(), _conversation()
    stream.messages.pop()
    suspensions(outside, stream)
    assert events_of(outside) == [("decision", "allow"), ("outcome", None)]
    assert outside.audit[-1]["upstream"]["status"] == 0


def test_a_cut_aborts_the_stream_and_is_never_a_clean_end():
    outside, stream = services(adapters={"rest": Watched(ResponseBlocked("no"))}), _conversation()
    stream.messages[-1].response_headers.end_of_stream = False
    stream.messages.append(ext_proc.ProcessingRequest(response_body=ext_proc.HttpBody(body=b"x")))
    with pytest.raises(ConnectionAbortedError):
        suspensions(outside, stream)
    assert events_of(outside)[-1] == ("outcome", "response_blocked")


def test_every_message_that_reaches_the_driver_is_answered_or_aborted():
    # A stream that ends without an answer lets the request through where no gate stands behind it.
    trailers = ext_proc.ProcessingRequest()
    trailers.response_trailers.SetInParent()
    stream = Stream(*_conversation().messages, trailers)
    suspensions(services(), stream)
    assert [answer.WhichOneof("response") for answer in stream.written][-1] == "response_trailers"
    assert len(stream.written) == 4


# Revoked meanwhile.


class Woken(list[int]):
    """Whoever carries an exchange, and how often it was woken to cut it."""

    def __call__(self) -> None:
        self.append(1)


def carried(outside: Services, *events: Event) -> tuple[Exchange, Woken, list[Any]]:
    woken = Woken()
    exchange = Exchange(outside, woken)
    return exchange, woken, [exchange.handle(event) for event in events]


@pytest.mark.parametrize(
    ("events", "recorded"),
    [
        pytest.param([POST], [("decision", "deny")], id="while its body is on its way"),
        pytest.param([POST, BODY], [("decision", "allow"), ("outcome", "agent_revoked")], id="before an answer came"),
        pytest.param([POST, BODY, OK], [("decision", "allow"), ("outcome", "agent_revoked")], id="while the answer streams"),
    ],
)
def test_an_exchange_whose_agent_is_revoked_asks_to_be_cut_and_says_so_in_the_record(events, recorded):
    outside = services()
    exchange, woken, _ = carried(outside, *events)
    outside.containment.revoke("caller", None, "it lies", "jo")
    assert (woken, exchange.cut) == ([1], "it lies (by jo)")
    exchange.close()
    found = [each for each in events_of(outside) if each[0] in ("decision", "outcome")]
    assert found == recorded
    assert len(outside.containment.open) == 0
    assert [r["code"] for r in outside.audit if r["event"] in ("decision", "outcome")][-1] == "agent_revoked"


def test_a_call_that_goes_on_cut_off_from_the_other_brokers_is_cut():
    outside = services()
    kept, others, _ = carried(outside, POST, BODY, OK)
    unkept, woken, _ = carried(outside, POST, BODY, OK)
    [*_, last] = [r["decision_id"] for r in outside.audit if r["event"] == "decision"]
    assert outside.containment.open.cut_off({last, "ended long ago"}) == 1
    assert (woken, others, bool(unkept.cut), kept.cut) == ([1], [], True, "")
    unkept.close()
    assert events_of(outside)[-1] == ("outcome", "ledger_unavailable")
    assert (outside.containment.open.cut_off(None), bool(kept.cut)) == (1, True)
    kept.close()


def test_an_exchange_that_has_ended_or_been_denied_is_not_cut():
    outside = services()
    ended, woken, _ = carried(outside, head(), OK)
    ended.close()
    _, denied, [refused] = carried(outside, head("DELETE"))
    outside.containment.revoke("caller", None, "it lies", "jo")
    assert (woken, denied, problem_of(refused)["code"]) == ([], [], "operation_not_declared")


def test_a_revoked_run_leaves_the_agents_other_runs_alone():
    outside = services()
    mine, others = (carried(outside, head("GET", "/plain/items", ("x-run-id", run))) for run in ("r1", "r2"))
    outside.containment.revoke("caller", "r1", "it loops", "jo")
    assert (mine[1], others[1]) == ([1], [])
    _, _, [refused] = carried(outside, head("GET", "/plain/items", ("x-run-id", "r1")))
    assert problem_of(refused)["code"] == "agent_revoked"


def test_a_tunnel_is_cut_like_a_call_and_not_opened_for_a_revoked_agent():
    opened = ResponseHead(200, ((":status", "200"),), "via_upstream", has_body=False, agent="caller")
    outside = services()
    exchange, woken, [passed] = carried(outside, opened)
    assert passed == Pass()
    outside.containment.revoke("caller", "r1", "it loops", "jo")
    assert woken == [], "its runs share it"
    outside.containment.revoke("caller", None, "it lies", "jo")
    assert woken == [1]
    exchange.close()
    _, _, [cut] = carried(outside, opened)
    assert cut == Cut()
    assert [event for event, _ in events_of(outside)].count("decision") == 0


def test_an_answer_that_envoy_gave_inside_a_tunnel_before_it_asked_opens_nothing():
    outside = services()
    refused = ResponseHead(400, ((":status", "400"),), "path_normalization_failed", has_body=False, agent="caller")
    _, _, [marked] = carried(outside, refused)
    assert isinstance(marked, Mark)
    assert len(outside.containment.open) == 0


def test_a_call_that_shows_a_decoy_revokes_its_agent_and_is_denied_for_that_before_anything_else_is_looked_at():
    outside = services()
    outside.containment.apply_policy(SNAPSHOT, ("decoy-0123456789abcdef",))
    other, woken, _ = carried(outside, POST)
    _, own, [refused] = carried(outside, head("GET", "/plain/items?q=decoy-0123456789abcdef"))
    assert (problem_of(refused)["code"], own, woken) == ("agent_revoked", [], [1])
    other.close()
    assert "decoy-0123456789abcdef" not in str(outside.audit)


def test_a_call_that_shows_its_own_tools_credential_is_not_sent_not_even_the_first():
    outside = services()
    _, _, commands = carried(outside, head("GET", f"/plain/items?q={SECRET}"))
    assert problem_of(commands[0])["code"] == "agent_revoked"
    assert SECRET not in str(outside.audit)
    assert events_of(outside)[-1] == ("decision", "deny")
    assert outside.ledger.grants == {}


def test_the_driver_aborts_the_stream_of_an_agent_that_is_revoked_while_nothing_comes():
    async def run() -> None:
        outside, waits = services(), asyncio.Event()

        class Idle(Stream):
            async def __anext__(self) -> Any:
                if not self.messages:
                    waits.set()
                    await asyncio.Event().wait()
                return self.messages.pop(0)

            async def write(self, answer: Any) -> None:
                self.written.append(answer)

            async def abort(self, *_: Any) -> None:
                raise ConnectionAbortedError

        stream = Idle(*_conversation().messages)
        process = asyncio.create_task(ExtProc(outside).Process(stream, stream))
        await waits.wait()
        outside.containment.revoke("caller", None, "it lies", "jo")
        with pytest.raises(ConnectionAbortedError):
            await process
        assert events_of(outside)[-1] == ("outcome", "agent_revoked")
        hung_up = asyncio.create_task(ExtProc(services()).Process(Idle(), stream))
        await asyncio.sleep(0)
        hung_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hung_up

    asyncio.run(run())


# Shadow mode.


def shadow(**more: Any) -> Services:
    spec = {"mode": "shadow", "shadow_until": "2099-01-31", **more}
    snapshot = _snapshot(create=False, **spec)
    return services(snapshot=lambda: snapshot)


def test_in_shadow_mode_an_operation_that_nobody_granted_goes_on_without_a_credential_and_is_recorded_first():
    outside = shadow()
    _, sent, passed = play(outside, POST, BODY, OK)
    assert isinstance(sent, Send)
    assert SECRET not in str(sent), "shadow mode grants nothing"
    assert passed == Pass()
    (decision, outcome) = outside.audit
    assert (decision["verdict"], decision["code"], decision["credential"]) == ("would_deny", "operation_not_declared", None)
    assert (outcome["event"], outcome["upstream"]["status"]) == ("outcome", 200)


def test_in_shadow_mode_a_granted_call_whose_parameters_break_a_rule_goes_on_with_what_was_granted():
    snapshot = _snapshot(mode="shadow", shadow_until="2099-01-31")
    outside = services(snapshot=lambda: snapshot)
    _, sent, _ = play(outside, POST, RequestBody(b'{"title":"longer than five"}'), OK)
    assert ("authorization", f"Bearer {SECRET}") in sent.set_headers
    assert (outside.audit[0]["verdict"], outside.audit[0]["code"]) == ("would_deny", "params_invalid")


def test_in_shadow_mode_what_the_catalog_does_not_know_is_held_until_it_is_whole_and_counted_as_the_worst():
    outside = shadow(limits={"destructive": "1/day"})
    unknown = head("POST", "/plain/other", body=True)
    wanted, sent, _ = play(outside, unknown, RequestBody(b"raw"), OK)
    assert (wanted, type(sent)) == (WantBody(), Send)
    assert outside.audit[0]["effect"] == "destructive", "so that detectors count it"
    denied = play(outside, unknown, RequestBody(b"raw"))[-1]
    assert problem_of(denied)["code"] == "rate_limited", "limits hold in shadow mode"


def test_in_shadow_mode_a_host_that_the_catalog_does_not_have_is_denied():
    away = head("GET", "/elsewhere/x")
    assert problem_of(play(shadow(), away)[0])["code"] == "tool_not_declared"


def test_in_shadow_mode_what_can_not_be_read_is_denied():
    broken = play(shadow(), POST, RequestBody(b'{"title":1,"title":2}'))[-1]
    assert problem_of(broken)["code"] == "body_malformed"


def test_in_shadow_mode_an_mcp_client_may_call_what_nobody_granted():
    outside = shadow()
    _, sent, _ = play(outside, CALL, rpc("tools/call", name="drop", arguments={}), ANSWER)
    assert isinstance(sent, Send)
    assert (outside.audit[0]["verdict"], outside.audit[0]["operation"]) == ("would_deny", "drop")


def test_shadow_mode_ends_by_itself():
    outside = replace(shadow(), now=lambda: 4_102_444_800.0, tokens=None)
    agent = outside.snapshot().agents["caller"]
    assert agent.shadow
    assert not agent.at(outside.now()).shadow


def test_shadow_mode_that_ends_while_the_body_comes_has_ended_for_the_call():
    snapshot, clock = _snapshot(create=False, mode="shadow", shadow_until=datetime.fromtimestamp(NOW + 1, UTC).isoformat()), [NOW]
    outside = services(snapshot=lambda: snapshot, now=lambda: clock[0])
    exchange = Exchange(outside)
    assert exchange.handle(POST) == WantBody()
    clock[0] = NOW + 1
    assert problem_of(exchange.handle(BODY))["code"] == "operation_not_declared"
    assert outside.audit[0]["verdict"] == "deny"


@pytest.mark.parametrize("whole", [True, False], ids=["of the agent", "of an operation"])
def test_in_shadow_mode_a_call_that_breaks_a_rule_can_not_choose_not_to_be_asked_about(whole):
    until = {"shadow_until": "2099-01-31"}
    asked = {"approval": {"when": {"body": {"properties": {"title": {"type": "string", "pattern": "^x"}}}}}}
    tools = {"plain": {"operations": {"items.create": {**asked, **({} if whole else until)}}}}
    snapshot = _snapshot(tools=tools, **({"mode": "shadow", **until} if whole else {}))
    outside = services(snapshot=lambda: snapshot)
    assert isinstance(play(outside, POST, RequestBody(b'{"title":"a"}'))[-1], Send), "it fits the schemas, and not `when`"
    denied = play(outside, POST, RequestBody(b'{"title":["x"]}'))[-1]
    assert problem_of(denied)["code"] == "approval_required", "it was written for texts, and this is none"


def test_in_shadow_mode_what_limits_a_tool_limits_what_nobody_granted_of_it():
    tools = {"plain": {"limits": {"calls": "1/day"}, "operations": {"items.list": {}}}}
    outside = shadow(tools=tools)
    assert isinstance(play(outside, POST, BODY, OK)[1], Send)
    assert problem_of(play(outside, POST, BODY)[-1])["code"] == "rate_limited"


def test_in_shadow_mode_a_decoy_is_not_let_through():
    decoy = {"containment": {"honeytoken": {"tools": ["wiki"]}}}
    text = {"p.yaml": _document("Platform", "acme", **decoy)}
    made = load_texts(
        {
            **text,
            "t.yaml": _document(
                "Tool", "wiki", protocol="mcp", endpoint="http://127.0.0.1:2/mcp", upstream={"addresses": ["127.0.0.0/8"]},
                operations={"search": {"effect": "read"}},
            ),
            "a.yaml": _document("Agent", "caller", identity={"token": True}, mode="shadow", shadow_until="2099-01-31", tools={}),
        },
        Path(),
    )  # fmt: skip
    assert made.snapshot.agents["caller"].shadow == {}


@pytest.mark.parametrize(("approved", "exposed"), [(["wiki"], {"wiki"}), ([], set()), (None, {"wiki"})])
def test_in_shadow_mode_only_approved_tools_are_let_through(approved, exposed):
    rules = {"admission": {} if approved is None else {"tools": approved}, "teams": {"team": {}}}
    texts = {
        "p.yaml": _document("Platform", "acme", **rules),
        "t.yaml": _document(
            "Tool", "wiki", protocol="mcp", endpoint="http://127.0.0.1:2/mcp", upstream={"addresses": ["127.0.0.0/8"]},
            operations={"search": {"effect": "read"}},
        ),
        "a.yaml": _document("Agent", "caller", identity={"token": True}, mode="shadow", shadow_until="2099-01-31", tools={}),
    }  # fmt: skip
    assert set(load_texts(texts, Path()).snapshot.agents["caller"].shadow) == exposed
