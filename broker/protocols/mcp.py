"""MCP over streamable HTTP, revisions 2025-06-18, 2025-11-25 and 2026-07-28 (earlier handshakes are read by the same rules).

Laws:
1. One message a POST, its envelope's keys exactly JSON-RPC 2.0's. Batches, unknown keys and other spellings are refused.
2. `tools/call` is the only method that does anything: it is the operation whose alias is the tool's name. Its params hold `name`,
   `arguments`, `_meta`, `requestState` and `inputResponses`, nothing else.
3. Housekeeping passes by the list below. All else (`resources/*`, `prompts/*`, `tasks/*`, …) is no operation, so it is denied;
   with `tasks/*`, a `task` in `tools/call`: its effect would come now, its result never.
4. A header that mirrors the body must equal it: see `mcp_headers`.
5. A denial leaves the session usable. A denied `tools/call` is a result with `isError`, for the model to read; another request,
   a JSON-RPC error. Notifications, GET and DELETE get the plain problem: there the official client carries on after any 4xx.
6. Of a server's tools an agent sees those whose operations it holds.
"""

import json
from collections.abc import Mapping
from dataclasses import replace

from broker.policy.snapshot import Grant, Tool
from broker.policy.types import Code, Decision, Json, Refusal, Request, ToolCall
from broker.protocols import strict
from broker.protocols.base import Reply, ResponseFilter
from broker.protocols.mcp_headers import agree
from broker.protocols.mcp_lists import list_filter
from broker.protocols.problem import STATUS, answer
from broker.protocols.strict import Unreadable, must

_UNTIL_2025 = frozenset({"initialize", "ping", "logging/setLevel"})
_NOTICES_UNTIL_2025 = frozenset({"notifications/initialized", "notifications/progress", "notifications/roots/list_changed"})
_SINCE_2026 = frozenset({"server/discover", "subscriptions/listen"})
HOUSEKEEPING = _UNTIL_2025 | _NOTICES_UNTIL_2025 | _SINCE_2026 | {"tools/list", "notifications/cancelled"}
"""The methods that keep a session alive and touch nothing: they pass for every agent that holds any operation of the tool."""

DENIED = -32010
"""Our JSON-RPC error code of a denial, of the range -32000…-32019 that is free for implementations (the SDK has two of it)."""

_LABELS = {"GET": "GET (listen)", "DELETE": "DELETE (end the session)"}
_MAY_LIST = frozenset({"tools/list", "subscriptions/listen", _LABELS["GET"]})
_SMALLEST_LIMIT = 65_536  # bytes; the handshake must fit, whatever the operations take
_REQUEST_KEYS = frozenset({"jsonrpc", "id", "method", "params"})
_ANSWER_KEYS = (frozenset({"jsonrpc", "id", "result"}), frozenset({"jsonrpc", "id", "error"}))
_CALL_KEYS = frozenset({"name", "arguments", "_meta", "requestState", "inputResponses"})
_SHOWN = 128  # characters of an agent's own words in a label
_IDENTITY = frozenset({Code.AGENT_UNKNOWN, Code.HOST_NOT_DECLARED, Code.AUTHORITY_MISMATCH})


class Mcp:
    """The adapter for `protocol: mcp`. Holds no state.

    A `correlation` of its calls and refusals is `{"id": …, "call": bool}`, `call` for a `tools/call`; None without a message
    that asks for an answer.
    """

    name: str = "mcp"
    locations: frozenset[str] = frozenset({"arguments"})

    def body_limit(self, tool: Tool, request: Request) -> int | Refusal:
        """The largest `max_body` of the tool's operations: which one is called stands in the body."""
        try:
            detail = f"{request.method} {request.path} is no operation of {tool.name!r}"
            must(_at_endpoint(request), detail, Code.OPERATION_NOT_DECLARED)
        except Unreadable as error:
            return error.refusal
        return max(tool.max_body, _SMALLEST_LIMIT) if request.method == "POST" else 0

    def recognise(self, tool: Tool, request: Request, body: bytes) -> ToolCall | Refusal:
        """The one message of a POST, or the stream that a GET or DELETE is about."""
        correlation: Json = None
        try:
            if not _at_endpoint(request):
                return ToolCall(tool.name, None, label=f"{request.method} {request.path}")
            if request.method != "POST":
                must(not body, f"{request.method} has no body in MCP")
                return ToolCall(tool.name, None, housekeeping=True, label=_LABELS[request.method])
            method, params, correlation = _message(request, body)
            if method == "tools/call":
                return _call(tool, request, params, correlation, len(body))
            agree(request, method or "", params, None, asked=correlation is not None)
        except Unreadable as error:
            return replace(error.refusal, correlation=correlation)
        housekeeping = method is None or method in HOUSEKEEPING
        label = "(answer)" if method is None else method[:_SHOWN]
        return ToolCall(tool.name, None, housekeeping=housekeeping, label=label, correlation=correlation, answers=method is None)

    def denial(self, problem: Mapping[str, Json], decision: Decision | Refusal, correlation: Json) -> Reply | None:
        """Law 5; a refusal without a correlation never got to be a message, and is an error without an ID."""
        code = decision.code or Code.INTERNAL_FAULT
        number = decision.protocol_code if isinstance(decision, Refusal) else None
        if correlation is None and number is None and isinstance(decision, Refusal) and code is not Code.OPERATION_NOT_DECLARED:
            number = -32700 if code is Code.BODY_MALFORMED else -32600  # parse error, invalid request: JSON-RPC 2.0 section 5.1
        if code in _IDENTITY or (correlation is None and number is None):
            return None
        asked = correlation if isinstance(correlation, dict) else {"id": None, "call": False}
        envelope: dict[str, Json] = {"jsonrpc": "2.0", "id": asked["id"]}
        if asked["call"] and number is None:
            return answer({**envelope, "result": _result(problem)}, 200, problem)
        error: Json = {"code": number or DENIED, "message": str(problem["detail"]), "data": dict(problem)}
        return answer({**envelope, "error": error}, STATUS[code] if number else 200, problem)

    def response_filter(
        self, tool: Tool, grants: Mapping[str, Grant], call: ToolCall, content_type: str
    ) -> ResponseFilter | None:
        """Law 6, for all that may carry a list: `tools/list` itself, and the streams on which one may be replayed."""
        if not call.housekeeping or call.label not in _MAY_LIST:
            return None
        return list_filter(tuple(tool.operations[name].alias for name in grants if name in tool.operations), content_type)


def _at_endpoint(request: Request) -> bool:
    strict.head(request)
    must(not request.query, "an MCP endpoint is called without a query")
    return request.path == "/" and (request.method == "POST" or request.method in _LABELS)


def _message(request: Request, body: bytes) -> tuple[str | None, dict[str, Json], Json]:
    """The method (None for a client's answer), the params and the correlation of the one message."""
    media = strict.media_type(request.header("content-type") or "")
    must(media == "application/json", f"MCP takes application/json, not {media or 'untyped'!r}", Code.ENCODING_NOT_ALLOWED)
    message = strict.json_value(body)
    if not isinstance(message, dict):
        raise Unreadable(Code.PROTOCOL_VIOLATION, "the body is not a single JSON-RPC message; batches are not accepted")
    request_id = message.get("id", 0)
    must(message.get("jsonrpc") == "2.0", 'the message has no "jsonrpc": "2.0"')
    must(isinstance(request_id, str | int) and not isinstance(request_id, bool), "id must be a string or an integer")
    if message.keys() in _ANSWER_KEYS:  # to a request of the server (sampling, elicitation, roots, ping), until 2025-11-25
        must(isinstance(message.get("result", message.get("error")), dict), "a result or error must be an object")
        return None, {}, None
    must(message.keys() <= _REQUEST_KEYS, "neither a request nor an answer has these keys; keys are case-sensitive")
    method, params = message.get("method"), message.get("params", {})
    if not isinstance(method, str) or not isinstance(params, dict):
        raise Unreadable(Code.PROTOCOL_VIOLATION, "method must be a string and params an object")
    return method, params, {"id": request_id, "call": method == "tools/call"} if "id" in message else None


def _call(tool: Tool, request: Request, params: dict[str, Json], correlation: Json, size: int) -> ToolCall:
    name, arguments = params.get("name"), params.get("arguments")
    arguments = {} if arguments is None else arguments
    must(correlation is not None, "tools/call without an id: a call that nobody could answer")
    must(params.keys() <= _CALL_KEYS, "tools/call takes name, arguments, _meta, requestState and inputResponses, no others")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Unreadable(Code.PROTOCOL_VIOLATION, "name must be a string and arguments an object")
    operation = next((operation for operation in tool.operations.values() if operation.alias == name), None)
    agree(request, "tools/call", params, operation.schemas.get("arguments") if operation else None, asked=True)
    if operation and size > operation.max_body:
        raise Unreadable(Code.BODY_TOO_LARGE, f"the body is over the {operation.max_body} bytes that {operation.name} takes")
    found = operation.name if operation else None
    label = f"tools/call {name[:_SHOWN]}"
    return ToolCall(tool.name, found, {"arguments": arguments}, label=label, correlation=correlation, exact=_exact(params))


def _exact(params: Mapping[str, Json]) -> Json:
    """What a call says but for its progress token, by which its answers are told apart."""
    meta = params.get("_meta")
    rest: Json = {name: value for name, value in meta.items() if name != "progressToken"} if isinstance(meta, dict) else meta
    return {**params, "_meta": rest or None}


def _result(problem: Mapping[str, Json]) -> Json:
    text = json.dumps(dict(problem), indent=2, ensure_ascii=False)
    # `resultType` is required since 2026-07-28; before, a result may have further members, and clients ignore them.
    return {"content": [{"type": "text", "text": text}], "isError": True, "resultType": "complete"}
