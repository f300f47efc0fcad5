"""MCP over streamable HTTP, revisions 2025-06-18, 2025-11-25 and 2026-07-28 (earlier handshakes are read by the same rules).

Laws:
1. One message a POST, its envelope's keys exactly JSON-RPC 2.0's. Batches, unknown keys and other spellings are refused.
2. `tools/call` is the only method that does anything: it is the operation whose alias is the tool's name. Its params hold `name`,
   `arguments`, `_meta`, `requestState` and `inputResponses`, nothing else.
3. Housekeeping passes by the list below. All else (`resources/*`, `prompts/*`, `completion/*`, …) is no operation, so it is
   denied. So are `tasks/*`, and with them a `task` in `tools/call`: its effect would come now, its result never.
4. A header that mirrors the body must equal it, or the request is refused with -32020, as the 2026-07-28 revision prescribes: who
   routes by header and who reads the body must see one call.
5. A denial leaves the session usable. A denied `tools/call` is a result with `isError`, for the model to read. Any other denied
   request is a JSON-RPC error. Denied notifications, GET and DELETE get the plain problem: the official client carries on after
   any 4xx there.
6. Of a server's tools an agent sees those whose operations it holds.
"""

import json
from collections.abc import Mapping

from broker.policy.snapshot import Grant, Tool
from broker.policy.types import Code, Decision, Json, Refusal, Request, ToolCall
from broker.protocols import strict
from broker.protocols.base import Reply, ResponseFilter, by_alias
from broker.protocols.mcp_headers import disagreement
from broker.protocols.mcp_lists import list_filter
from broker.protocols.problem import STATUS, answer

HOUSEKEEPING = frozenset(
    {
        "initialize",  # until 2025-11-25
        "notifications/initialized",  # until 2025-11-25
        "ping",  # until 2025-11-25
        "logging/setLevel",  # until 2025-11-25
        "notifications/progress",  # until 2025-11-25
        "notifications/roots/list_changed",  # until 2025-11-25
        "notifications/cancelled",
        "tools/list",
        "server/discover",  # since 2026-07-28
        "subscriptions/listen",  # since 2026-07-28
    }
)
"""The methods that keep a session alive and touch nothing: they pass for every agent that holds any operation of the tool."""

DENIED = -32010
"""Our JSON-RPC error code of a denial, of the range -32000…-32019 that is free for implementations (the SDK has two of it)."""

_PARSE_ERROR = -32700  # JSON-RPC 2.0 section 5.1
_INVALID_REQUEST = -32600

_ENDPOINT = "/"
_LABELS = {"GET": "GET (listen)", "DELETE": "DELETE (end the session)"}
_SMALLEST_LIMIT = 65_536  # bytes; the handshake must fit, whatever the operations take
_REQUEST_KEYS = frozenset({"jsonrpc", "id", "method", "params"})
_ANSWER_KEYS = (frozenset({"jsonrpc", "id", "result"}), frozenset({"jsonrpc", "id", "error"}))
_CALL_KEYS = frozenset({"name", "arguments", "_meta", "requestState", "inputResponses"})
_SHOWN = 128  # characters of an agent's own words in a label
_IDENTITY = frozenset({Code.AGENT_UNKNOWN, Code.HOST_NOT_DECLARED, Code.AUTHORITY_MISMATCH})


class Mcp:
    """The adapter for `protocol: mcp`. Holds no state.

    A `correlation` of its calls and refusals is `{"id": …, "call": bool}`, where `call` says that it was a `tools/call`.
    """

    name: str = "mcp"
    locations: frozenset[str] = frozenset({"arguments"})

    def body_limit(self, tool: Tool, request: Request) -> int | Refusal:
        """The largest `max_body` of the tool's operations: which one is called stands in the body."""
        if refusal := _head(request):
            return refusal
        if not _at_endpoint(request):
            return Refusal(Code.OPERATION_NOT_DECLARED, f"{request.method} {request.path} is no operation of {tool.name!r}")
        return max(tool.max_body, _SMALLEST_LIMIT) if request.method == "POST" else 0

    def recognise(self, tool: Tool, request: Request, body: bytes) -> ToolCall | Refusal:
        """The one message of a POST, or the stream that a GET or DELETE is about."""
        if refusal := _head(request):
            return refusal
        if not _at_endpoint(request):
            return ToolCall(tool.name, None, label=f"{request.method} {request.path}")
        if request.method != "POST":
            if body:
                return _violation(f"{request.method} has no body in MCP")
            return ToolCall(tool.name, None, housekeeping=True, label=_LABELS[request.method])
        media = strict.media_type(request, ("application/json",))
        if isinstance(media, Refusal):
            return media
        message = strict.json_value(body)
        if isinstance(message, Refusal):
            return message
        return _message(tool, request, message, len(body))

    def denial(self, problem: Mapping[str, Json], decision: Decision | Refusal, correlation: Json) -> Reply | None:
        """Law 5; a refusal without a correlation never got to be a message, and is an error without an ID."""
        code = decision.code or Code.INTERNAL_FAULT
        if code in _IDENTITY:
            return None
        if isinstance(decision, Refusal) and decision.protocol_code is not None:
            request_id = correlation["id"] if isinstance(correlation, dict) else None
            return _error(problem, decision.protocol_code, request_id, STATUS[code])
        if isinstance(correlation, dict):
            if correlation["call"]:
                return _result(problem, correlation["id"])
            return _error(problem, DENIED, correlation["id"], 200)
        if isinstance(decision, Decision) or code is Code.OPERATION_NOT_DECLARED:
            return None
        return _error(problem, _PARSE_ERROR if code is Code.BODY_MALFORMED else _INVALID_REQUEST, None, STATUS[code])

    def response_filter(
        self, tool: Tool, grants: Mapping[str, Grant], call: ToolCall, content_type: str
    ) -> ResponseFilter | None:
        """Law 6, for all that may carry a list: `tools/list` itself, and the streams on which one may be replayed."""
        if not call.housekeeping or call.label not in ("tools/list", "subscriptions/listen", _LABELS["GET"]):
            return None
        visible = frozenset(operation.alias for name, operation in tool.operations.items() if name in grants)
        return list_filter(visible, content_type)


def _head(request: Request) -> Refusal | None:
    refusal = strict.head(request)
    if refusal is None and request.query:
        return _violation("an MCP endpoint is called without a query")
    return refusal


def _at_endpoint(request: Request) -> bool:
    return request.path == _ENDPOINT and (request.method == "POST" or request.method in _LABELS)


def _violation(detail: str, correlation: Json = None) -> Refusal:
    return Refusal(Code.PROTOCOL_VIOLATION, detail, correlation=correlation)


def _message(tool: Tool, request: Request, message: Json, size: int) -> ToolCall | Refusal:
    if not isinstance(message, dict):
        return _violation("the body is not a single JSON-RPC message; batches are not accepted")
    if message.get("jsonrpc") != "2.0":
        return _violation('the message has no "jsonrpc": "2.0"')
    if "method" not in message:
        return _answer(tool, request, message)
    method, params, request_id = message["method"], message.get("params", {}), message.get("id")
    if not message.keys() <= _REQUEST_KEYS:
        return _violation("the message has a key that JSON-RPC requests don't have; keys are case-sensitive")
    if not isinstance(method, str) or not isinstance(params, dict):
        return _violation("method must be a string and params an object")
    if "id" in message and not _is_id(request_id):
        return _violation("id must be a string or an integer")
    correlation: Json = {"id": request_id, "call": method == "tools/call"} if "id" in message else None
    if method == "tools/call":
        return _call(tool, request, params, correlation, size)
    if refusal := disagreement(request, method, params, None, correlation):
        return refusal
    return ToolCall(tool.name, None, housekeeping=method in HOUSEKEEPING, label=method[:_SHOWN], correlation=correlation)


def _is_id(value: Json) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _answer(tool: Tool, request: Request, message: dict[str, Json]) -> ToolCall | Refusal:
    """A client's answer to a request of the server (sampling, elicitation, roots, ping), until 2025-11-25."""
    if message.keys() not in _ANSWER_KEYS or not _is_id(message["id"]):
        return _violation("the message is neither a request, nor a notification, nor an answer; keys are case-sensitive")
    kind = "result" if "result" in message else "error"
    if not isinstance(message[kind], dict):
        return _violation(f"{kind} must be an object")
    return disagreement(request, "", {}, None, None) or ToolCall(tool.name, None, housekeeping=True, label=f"({kind})")


def _call(tool: Tool, request: Request, params: dict[str, Json], correlation: Json, size: int) -> ToolCall | Refusal:
    name, arguments = params.get("name"), params.get("arguments")
    arguments = {} if arguments is None else arguments
    if correlation is None:
        return _violation("tools/call without an id: a call that nobody could answer")
    if not params.keys() <= _CALL_KEYS:
        return _violation(f"the params of tools/call are {', '.join(sorted(_CALL_KEYS))}, and no others", correlation)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return _violation("name must be a string and arguments an object", correlation)
    operation = by_alias(tool, name)
    schema = operation.schemas.get("arguments") if operation else None
    if refusal := disagreement(request, "tools/call", params, schema, correlation):
        return refusal
    if operation and size > operation.max_body:
        detail = f"the body is over the {operation.max_body} bytes that {operation.name} takes"
        return Refusal(Code.BODY_TOO_LARGE, detail, correlation=correlation)
    return ToolCall(
        tool.name,
        operation.name if operation else None,
        {"arguments": arguments},
        label=f"tools/call {name[:_SHOWN]}",
        correlation=correlation,
    )


def _result(problem: Mapping[str, Json], request_id: Json) -> Reply:
    # `resultType` is required since 2026-07-28; before, a result may have further members, and clients ignore them.
    text = json.dumps(dict(problem), indent=2, ensure_ascii=False)
    result: Json = {"content": [{"type": "text", "text": text}], "isError": True, "resultType": "complete"}
    return answer({"jsonrpc": "2.0", "id": request_id, "result": result}, 200, problem)


def _error(problem: Mapping[str, Json], code: int, request_id: Json, status: int) -> Reply:
    error: Json = {"code": code, "message": str(problem["detail"]), "data": dict(problem)}
    return answer({"jsonrpc": "2.0", "id": request_id, "error": error}, status, problem)
