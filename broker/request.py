"""What the exchange reads off a request's head beside the call itself, and what it makes of it for the way on."""

import re
from urllib.parse import unquote

from broker.credentials.base import Outgoing
from broker.policy.snapshot import Tool
from broker.policy.types import Request, ToolCall
from broker.redaction import redacted

_RUN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_TRACEPARENT_PARTS = 4
_PARTIAL = ("range", "if-range", "request-range")


def run_id(request: Request) -> str:
    """The run that a request names (`x-run-id`, or W3C baggage `run.id`), which only groups; empty when it names none."""
    if request.header("x-run-id") is not None:
        named = request.only("x-run-id") or ""
    else:
        # W3C Baggage section 3.2: `key = value ; properties`, the value percent-encoded.
        members = (member.partition(";")[0].partition("=") for member in ",".join(request.all("baggage")).split(","))
        named = next((unquote(value) for key, _, value in members if key.strip() == "run.id"), "")
    named = named.strip()
    # What is recorded must tell runs apart, and a credential is not recorded.
    return named if _RUN_ID.fullmatch(named) and redacted(named) == named else ""


def trace_id(request: Request) -> str:
    """The trace that a request belongs to, empty where it names none."""
    # W3C Trace Context section 3.2: version-traceid-parentid-flags.
    parts = (request.header("traceparent") or "").split("-")
    return parts[1] if len(parts) >= _TRACEPARENT_PARTS and _TRACE_ID.fullmatch(parts[1]) else ""


def outgoing(tool: Tool, request: Request, body: bytes) -> Outgoing:
    """The request as it will leave."""
    endpoint, query = tool.endpoint, f"?{request.query}" if request.query else ""
    url = f"{endpoint.scheme}://{endpoint.authority}{endpoint.base_path}{request.path}{query}"
    return Outgoing(request.method, url, request.headers, body)


def partial_headers(tool: Tool, call: ToolCall, request: Request) -> tuple[str, ...]:
    """The headers that ask for a part of an answer (RFC 9110 section 14) which is read for the credential.

    Asked for in parts of a few bytes each, no part would show it, and all together would.
    """
    operation = tool.operations.get(call.operation or "")
    if tool.credential is None or (operation and operation.scrub == "unsafe_never"):
        return ()
    return tuple(sorted({name for name, _ in request.headers if name.replace("_", "-") in _PARTIAL}))


def whole_path(sent: str, request: Request) -> str:
    """The path as it was sent, with the query as it may leave."""
    return f"{sent}?{request.query}" if request.query else sent
