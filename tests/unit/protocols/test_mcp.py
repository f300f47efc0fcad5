"""MCP messages become operations, housekeeping or refusals, and denials that the official client can live with."""

import json
from typing import Any

import mcp_types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp_types.jsonrpc import JSONRPCError, JSONRPCResponse, jsonrpc_message_adapter

from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import Endpoint, Operation, Tool
from broker.policy.types import Code, Effect, Refusal, Request, ToolCall, deny
from broker.protocols.mcp import DENIED, HOUSEKEEPING, Mcp
from broker.protocols.problem import problem

MODERN = "2026-07-28"
META = {"io.modelcontextprotocol/protocolVersion": MODERN}
SCHEMA = ParameterSchema(
    {
        "properties": {
            "region": {"type": "string", "x-mcp-header": "Region"},
            "page": {"properties": {"size": {"type": "integer", "x-mcp-header": "Size"}}},
            "dry": {"type": "boolean", "x-mcp-header": "Dry"},
            "free": {"type": "string"},
        }
    },
    "tools/wiki.yaml#/x",
)
OPERATIONS = {
    "search": Operation("search", Effect.READ, "r", alias="search_pages", schemas={"arguments": SCHEMA}, max_body=2000),
    "tiny": Operation("tiny", Effect.READ, "r", alias="tiny", max_body=100),
}
TOOL = Tool("wiki", "o", "mcp", Endpoint("https", "w", 443, "/mcp"), "rule", OPERATIONS)
JSON = ("content-type", "application/json")


def _post(body: bytes, *headers: tuple[str, str], path: str = "/", query: str = "") -> ToolCall | Refusal:
    return Mcp().recognise(TOOL, Request("POST", path, query, (JSON, *headers)), body)


def _send(message: object, *headers: tuple[str, str]) -> ToolCall | Refusal:
    return _post(json.dumps(message).encode(), *headers)


def _rpc(method: str, params: object = None, **more: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": 7, "method": method, **({} if params is None else {"params": params}), **more}


def _modern(name: str = "search_pages", arguments: object = None, *headers: tuple[str, str]) -> ToolCall | Refusal:
    routing = (("mcp-protocol-version", MODERN), ("mcp-method", "tools/call"), ("mcp-name", name))
    return _send(_rpc("tools/call", {"name": name, "arguments": arguments or {}, "_meta": META}), *routing, *headers)


@pytest.mark.parametrize(
    ("params", "operation", "arguments"),
    [
        pytest.param(
            {"name": "search_pages", "arguments": {"free": "x"}}, "search", {"free": "x"}, id="a declared tool, by alias"
        ),
        pytest.param({"name": "search_pages"}, "search", {}, id="no arguments"),
        pytest.param({"name": "search_pages", "arguments": None}, "search", {}, id="null arguments"),
        pytest.param({"name": "search_pages", "_meta": {"progressToken": 1}}, "search", {}, id="with _meta"),
        pytest.param({"name": "search_pages", "requestState": "s", "inputResponses": {}}, "search", {}, id="a second round"),
        pytest.param({"name": "search"}, None, {}, id="the operation's name is not the tool's"),
        pytest.param({"name": "Search_Pages"}, None, {}, id="another case is another tool"),
    ],
)
def test_recognises_calls(params: dict[str, Any], operation: str | None, arguments: dict[str, Any]) -> None:
    found = _send(_rpc("tools/call", params))
    label, correlation = f"tools/call {params['name']}", {"id": 7, "call": True}
    assert found == ToolCall(
        "wiki", operation, {"arguments": arguments}, label=label, correlation=correlation, exact={**params, "_meta": None}
    )


def test_what_a_person_approves_is_all_of_a_call_but_what_differs_with_each_try() -> None:
    def exact(number: int, **meta: object) -> object:
        call = _send({**_rpc("tools/call", {"name": "search_pages", "arguments": {"free": "x"}, "_meta": meta}), "id": number})
        assert isinstance(call, ToolCall)
        return call.exact

    assert exact(1, progressToken=1) == exact(2, progressToken=2) == exact(3)
    assert exact(1, progressToken=1) != exact(1, progressToken=1, tenant="other")


@pytest.mark.parametrize("method", sorted(HOUSEKEEPING))
def test_housekeeping_passes(method: str) -> None:
    call = _send(_rpc(method, {}))
    assert isinstance(call, ToolCall)
    assert (call.housekeeping, call.operation, call.label) == (True, None, method)


@pytest.mark.parametrize(
    "method",
    [
        "resources/list",
        "resources/read",
        "prompts/list",
        "prompts/get",
        "completion/complete",
        "tasks/get",
        "tasks/result",
        "tasks/list",
        "tasks/cancel",
        "sampling/createMessage",
        "notifications/tools/list_changed",
        "TOOLS/LIST",
        "Ping",
        "tools/call/",
        "(answer)",
        "",
        "x",
    ],
)
def test_all_else_is_no_operation(method: str) -> None:
    assert _send(_rpc(method, {})) == ToolCall("wiki", None, label=method, correlation={"id": 7, "call": False})


@pytest.mark.parametrize(
    ("message", "label"),
    [
        pytest.param({"jsonrpc": "2.0", "id": "a", "result": {}}, "(answer)", id="a client's result"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "x"}}, "(answer)", id="a client's error"),
        pytest.param({"jsonrpc": "2.0", "method": "notifications/initialized"}, "notifications/initialized", id="a notification"),
    ],
)
def test_messages_without_an_answer_have_no_correlation(message: object, label: str) -> None:
    assert _send(message) == ToolCall("wiki", None, housekeeping=True, label=label, answers=label == "(answer)")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        pytest.param([_rpc("ping")], "batches", id="a batch"),
        pytest.param([], "batches", id="an empty batch"),
        pytest.param("ping", "single JSON-RPC message", id="a string"),
        pytest.param({"id": 1, "method": "ping"}, "jsonrpc", id="no version"),
        pytest.param(_rpc("ping") | {"jsonrpc": 2.0}, "jsonrpc", id="the version as a number"),
        pytest.param(_rpc("ping", Method="tools/call"), "case-sensitive", id="a method in another case besides"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "METHOD": "ping"}, "case-sensitive", id="a method in another case instead"),
        pytest.param(_rpc("ping", Params={}), "case-sensitive", id="params in another case"),
        pytest.param(_rpc("ping", extra=1), "key", id="an unknown envelope key"),
        pytest.param(_rpc("ping", result={}), "key", id="a request that is an answer too"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "result": {}, "error": {}}, "neither", id="an answer that is both"),
        pytest.param({"jsonrpc": "2.0", "result": {}}, "neither", id="an answer without an id"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "result": []}, "object", id="a result that is no object"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "error": None}, "object", id="an error that is no object"),
        pytest.param({"jsonrpc": "2.0", "id": 1}, "method must", id="neither a method nor an answer"),
        pytest.param(_rpc("ping", id=None), "id must", id="a null id"),
        pytest.param(_rpc("ping", id=True), "id must", id="a boolean id"),
        pytest.param(_rpc("ping", id=1.5), "id must", id="a fractional id"),
        pytest.param(_rpc("ping", id=[1]), "id must", id="a list as id"),
        pytest.param(_rpc("ping", []), "params an object", id="params by position"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "method": ["ping"]}, "method must", id="a method that is no string"),
        pytest.param(
            {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "tiny"}}, "without an id", id="an unanswerable call"
        ),
        pytest.param(_rpc("tools/call", {"name": "tiny", "Arguments": {}}), "no others", id="arguments in another case"),
        pytest.param(
            _rpc("tools/call", {"name": "tiny", "NAME": "search_pages"}), "no others", id="a second name in another case"
        ),
        pytest.param(
            _rpc("tools/call", {"name": "tiny", "task": {"ttl": 1}}), "no others", id="a task, whose result none may fetch"
        ),
        pytest.param(_rpc("tools/call", {"name": ["tiny"]}), "name must", id="a name that is no string"),
        pytest.param(_rpc("tools/call", {}), "name must", id="no name"),
        pytest.param(_rpc("tools/call", {"name": "tiny", "arguments": [1]}), "arguments an object", id="arguments by position"),
    ],
)
def test_refuses_messages(message: object, reason: str) -> None:
    refusal = _send(message)
    assert isinstance(refusal, Refusal)
    assert refusal.code is Code.PROTOCOL_VIOLATION
    assert refusal.protocol_code is None
    assert reason in refusal.detail


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call"}', "twice", id="two methods"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":NaN}}', "NaN", id="NaN"),
        pytest.param(json.dumps(_rpc("ping")).encode("utf-16"), "codec", id="UTF-16"),
        pytest.param(b"\xef\xbb\xbf" + json.dumps(_rpc("ping")).encode(), "Expecting", id="a byte order mark"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","params":' + b'{"a":' * 100_000, "recursion", id="100,000 levels"),
        pytest.param(b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":"\\ud800"}}', "surrogate", id="half a character"),
        pytest.param(b"", "Expecting", id="no body"),
    ],
)
def test_refuses_bytes(body: bytes, reason: str) -> None:
    refusal = _post(body)
    assert isinstance(refusal, Refusal)
    assert refusal.code is Code.BODY_MALFORMED
    assert reason in refusal.detail


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)))
def test_no_message_raises(value: Any) -> None:
    for message in (value, _rpc("tools/call", value), {"jsonrpc": "2.0", "id": value, "method": "ping", "params": value}):
        assert isinstance(_send(message), ToolCall | Refusal)
    assert isinstance(_send(_rpc("tools/call", {"name": "search_pages", "arguments": value, "_meta": value})), ToolCall | Refusal)


def test_a_call_over_its_operations_cap_is_refused() -> None:
    refusal = _send(_rpc("tools/call", {"name": "tiny", "arguments": {"x": "y" * 100}}))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.correlation) == (Code.BODY_TOO_LARGE, {"id": 7, "call": True})


def test_streams_and_ends_of_sessions_are_housekeeping() -> None:
    for method, label in (("GET", "GET (listen)"), ("DELETE", "DELETE (end the session)")):
        request = Request(method, "/", "", ())
        assert Mcp().body_limit(TOOL, request) == 0
        assert Mcp().recognise(TOOL, request, b"") == ToolCall("wiki", None, housekeeping=True, label=label)
        assert isinstance(Mcp().recognise(TOOL, request, b"x"), Refusal)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        pytest.param(Request("POST", "/admin", "", (JSON,)), Code.OPERATION_NOT_DECLARED, id="a path below the endpoint"),
        pytest.param(Request("PUT", "/", "", (JSON,)), Code.OPERATION_NOT_DECLARED, id="another method"),
        pytest.param(Request("POST", "/", "a=b", (JSON,)), Code.PROTOCOL_VIOLATION, id="a query"),
        pytest.param(Request("POST", "/", "", (JSON, JSON)), Code.PROTOCOL_VIOLATION, id="two content types"),
        pytest.param(Request("GET", "/", "", (("upgrade", "websocket"),)), Code.PROTOCOL_VIOLATION, id="WebSocket"),
        pytest.param(Request("POST", "/", "", (JSON, ("content-encoding", "zstd"))), Code.ENCODING_NOT_ALLOWED, id="compressed"),
    ],
)
def test_heads_are_refused_before_the_body(request_: Request, code: Code) -> None:
    refusal = Mcp().body_limit(TOOL, request_)
    assert isinstance(refusal, Refusal)
    assert refusal.code is code
    late = Mcp().recognise(TOOL, request_, b"{}")
    assert late == refusal or (isinstance(late, ToolCall) and late.operation is None and not late.housekeeping)


def test_the_body_limit_leaves_room_for_the_handshake() -> None:
    assert Mcp().body_limit(TOOL, Request("POST", "/", "", (JSON,))) == 65_536


def test_a_post_is_json() -> None:
    refusal = Mcp().recognise(TOOL, Request("POST", "/", "", (("content-type", "text/plain"),)), b"{}")
    assert isinstance(refusal, Refusal)
    assert refusal.code is Code.ENCODING_NOT_ALLOWED


@pytest.mark.parametrize(
    ("arguments", "headers"),
    [
        pytest.param({}, (), id="nothing to mirror"),
        pytest.param({"region": "eu"}, (("mcp-param-region", "eu"),), id="a string"),
        pytest.param({"region": " é"}, (("mcp-param-region", "=?base64?IMOp?="),), id="a string that must be wrapped"),
        pytest.param({"page": {"size": 42}}, (("mcp-param-size", "42"),), id="a nested number"),
        pytest.param({"page": {"size": 42.0}}, (("mcp-param-size", "42"),), id="the same number written otherwise"),
        pytest.param({"page": {"size": 42}}, (("mcp-param-size", "42.0"),), id="the same number with a fraction of nothing"),
        pytest.param({"region": ""}, (("mcp-param-region", "=?base64??="),), id="nothing, wrapped"),
        pytest.param({"dry": True}, (("mcp-param-dry", "true"),), id="a boolean"),
        pytest.param({"region": None}, (), id="null counts as absent"),
        pytest.param({"free": "x"}, (("mcp-param-free", "x"),), id="an argument that the catalog does not annotate"),
    ],
)
def test_headers_that_mirror_pass(arguments: dict[str, Any], headers: tuple[tuple[str, str], ...]) -> None:
    call = _modern("search_pages", arguments, *headers)
    assert isinstance(call, ToolCall)
    assert (call.operation, call.params) == ("search", {"arguments": arguments})


@pytest.mark.parametrize(
    ("arguments", "headers"),
    [
        pytest.param({"region": "eu"}, (), id="a required mirror is missing"),
        pytest.param({"page": {"size": 1}}, (), id="a required nested mirror is missing"),
        pytest.param({"region": "eu"}, (("mcp-param-region", "us"),), id="another value"),
        pytest.param({"region": "eu"}, (("mcp-param-region", "eu"), ("mcp-param-region", "eu")), id="the mirror twice"),
        pytest.param({}, (("mcp-param-region", "eu"),), id="a mirror of nothing"),
        pytest.param({}, (("mcp-param-unknown", "x"),), id="a mirror of an unknown argument"),
        pytest.param({"region": "é"}, (("mcp-param-region", "=?base64?w6k?="),), id="base64 without padding"),
        pytest.param({"region": "é"}, (("mcp-param-region", "=?base64?/w==?="),), id="base64 of no UTF-8"),
        pytest.param({"region": "a"}, (("mcp-param-region", "=?base64?YR==?="),), id="base64 that is not canonical"),
        pytest.param({"dry": True}, (("mcp-param-dry", "True"),), id="a boolean spelled otherwise"),
        pytest.param({"dry": True}, (("mcp-param-dry", "1"),), id="a boolean as a number"),
        pytest.param({"page": {"size": 42}}, (("mcp-param-size", "42.5"),), id="another number"),
        pytest.param({"page": {"size": 42}}, (("mcp-param-size", "042"),), id="a number with a leading zero"),
        pytest.param({"region": ["eu"]}, (("mcp-param-region", "eu"),), id="a mirror of a list"),
        pytest.param({"free": "x", "FREE": "y"}, (("mcp-param-free", "x"),), id="a mirror of either of two"),
    ],
)
def test_headers_that_disagree_are_refused(arguments: dict[str, Any], headers: tuple[tuple[str, str], ...]) -> None:
    _is_mismatch(_modern("search_pages", arguments, *headers))


CALL = _rpc("tools/call", {"name": "tiny", "_meta": META})
VERSION, METHOD, NAME = ("mcp-protocol-version", MODERN), ("mcp-method", "tools/call"), ("mcp-name", "tiny")


@pytest.mark.parametrize(
    ("message", "headers"),
    [
        pytest.param(CALL, (VERSION, NAME), id="no method"),
        pytest.param(CALL, (VERSION, METHOD), id="no name"),
        pytest.param(CALL, (METHOD, NAME), id="the modern revision in the body alone"),
        pytest.param(CALL, (VERSION, VERSION, METHOD, NAME), id="two revisions"),
        pytest.param(CALL, (VERSION, METHOD, METHOD, NAME), id="two methods"),
        pytest.param(CALL, (VERSION, METHOD, NAME, NAME), id="two names"),
        pytest.param(CALL, (("mcp-protocol-version", "2025-11-25"), METHOD, NAME), id="another revision than the body's"),
        pytest.param(CALL, (VERSION, ("mcp-method", "tools/list"), NAME), id="another method"),
        pytest.param(CALL, (VERSION, ("mcp-method", "Tools/Call"), NAME), id="the method in another case"),
        pytest.param(CALL, (VERSION, METHOD, ("mcp-name", "search_pages")), id="another name"),
        pytest.param(CALL, (VERSION, METHOD, ("mcp-name", "tiny,tiny")), id="names joined by a proxy"),
        pytest.param(_rpc("tools/call", {"name": "tiny"}), (("mcp-name", "other"),), id="another name in an old revision"),
        pytest.param(_rpc("tools/call", {"name": "tiny"}), (("mcp-method", "ping"),), id="another method in an old revision"),
        pytest.param(_rpc("ping"), (NAME,), id="a name where nothing is named"),
        pytest.param(_rpc("ping"), (("mcp-param-x", "1"),), id="a parameter where there are none"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "result": {}}, (("mcp-method", "ping"),), id="a method on an answer"),
    ],
)
def test_routing_headers_that_disagree_are_refused(message: object, headers: tuple[tuple[str, str], ...]) -> None:
    _is_mismatch(_send(message, *headers))


def _is_mismatch(refusal: ToolCall | Refusal) -> None:
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.protocol_code) == (Code.PROTOCOL_VIOLATION, -32020)
    reply = Mcp().denial(problem("d1", "bot", "wiki", "", refusal), refusal, refusal.correlation)
    assert reply is not None
    assert reply.status == 400
    error = jsonrpc_message_adapter.validate_json(reply.body)
    assert isinstance(error, JSONRPCError)
    assert error.error.code == -32020
    assert error.error.data["decision_id"] == "d1"


def test_modern_notifications_need_no_routing_headers() -> None:
    call = _send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}}, VERSION)
    assert isinstance(call, ToolCall)
    assert call.housekeeping


def test_an_unknown_revision_is_refused() -> None:
    refusal = _send(_rpc("ping"), ("mcp-protocol-version", "2099-01-01"))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.protocol_code) == (Code.PROTOCOL_VIOLATION, -32022)


@pytest.mark.parametrize("code", [Code.PARAMS_INVALID, Code.AUDIT_UNAVAILABLE, Code.CREDENTIAL_UNAVAILABLE, Code.INTERNAL_FAULT])
def test_a_denied_call_is_a_result_for_the_model(code: Code) -> None:
    decision = deny(code, "why")
    found = problem("d1", "bot", "wiki", "search", decision)
    reply = Mcp().denial(found, decision, {"id": 7, "call": True})
    assert reply is not None
    assert (reply.status, dict(reply.headers)) == (200, {"content-type": "application/json", "x-broker-decision-id": "d1"})
    message = jsonrpc_message_adapter.validate_json(reply.body)
    assert isinstance(message, JSONRPCResponse)
    assert message.id == 7
    result = mcp_types.CallToolResult.model_validate(message.result)
    assert result.is_error
    assert message.result["resultType"] == "complete"
    (content,) = result.content
    assert isinstance(content, mcp_types.TextContent)
    assert json.loads(content.text) == found


@pytest.mark.parametrize(
    ("decision", "correlation", "status", "code", "request_id"),
    [
        pytest.param(deny(Code.OPERATION_NOT_DECLARED, "x"), {"id": "a", "call": False}, 200, DENIED, "a", id="another method"),
        pytest.param(Refusal(Code.BODY_MALFORMED, "x"), None, 400, -32700, None, id="no JSON"),
        pytest.param(Refusal(Code.PROTOCOL_VIOLATION, "x"), None, 400, -32600, None, id="no message"),
        pytest.param(Refusal(Code.ENCODING_NOT_ALLOWED, "x"), None, 415, -32600, None, id="no JSON by its type"),
        pytest.param(Refusal(Code.BODY_TOO_LARGE, "x"), None, 413, -32600, None, id="too large to be read"),
    ],
)
def test_denials_are_errors(decision: Any, correlation: Any, status: int, code: int, request_id: str | None) -> None:
    found = problem("d1", "bot", "wiki", "", decision)
    reply = Mcp().denial(found, decision, correlation)
    assert reply is not None
    assert reply.status == status
    assert json.loads(reply.body) == {"jsonrpc": "2.0", "id": request_id, "error": {"code": code, "message": "x", "data": found}}


@pytest.mark.parametrize(
    ("decision", "correlation"),
    [
        pytest.param(deny(Code.TOOL_NOT_DECLARED, "x"), None, id="a notification, GET or DELETE"),
        pytest.param(Refusal(Code.OPERATION_NOT_DECLARED, "x"), None, id="no MCP endpoint"),
        pytest.param(deny(Code.AGENT_UNKNOWN, "x"), {"id": 1, "call": True}, id="an unknown agent"),
        pytest.param(deny(Code.AUTHORITY_MISMATCH, "x"), {"id": 1, "call": True}, id="another destination"),
    ],
)
def test_some_denials_are_plain_problems(decision: Any, correlation: Any) -> None:
    assert Mcp().denial(problem("d1", "bot", "wiki", "", decision), decision, correlation) is None
