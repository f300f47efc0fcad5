"""MCP's mirror headers: whoever routes by them and whoever reads the body must see one call (streamable HTTP, 2026-07-28).

Laws: a mirror header that is present equals what it mirrors, in every revision; none is sent twice; none mirrors nothing. From
2026-07-28 on, those that the revision requires of a request are there. Every breach is -32020.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from typing import Any

from broker.policy.schema import ParameterSchema
from broker.policy.types import Code, Json, Refusal, Request

HEADER_MISMATCH = -32020
UNSUPPORTED_REVISION = -32022

MODERN = "2026-07-28"
REVISIONS = frozenset({"2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", MODERN})
"""What `mcp-protocol-version` may say; an unknown revision might give the same bytes another meaning."""

_VERSION, _METHOD, _NAME = "mcp-protocol-version", "mcp-method", "mcp-name"
_PARAM = "mcp-param-"
_ONCE = frozenset({_VERSION, _METHOD, _NAME, "mcp-session-id", "last-event-id"})
_VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
_NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
_SENTINEL = re.compile(r"=\?base64\?(.*)\?=")
_DECIMAL = re.compile(r"(-?[0-9]{1,20})(?:\.0+)?")


def disagreement(
    request: Request, method: str, params: Mapping[str, Json], schema: ParameterSchema | None, correlation: Json
) -> Refusal | None:
    """Why the headers don't fit the message, or None.

    `method` is empty for a client's answer. `correlation` is None for notifications and answers, of which no header is required.
    `schema` is the catalog's for `arguments`; its `x-mcp-header` annotations say which argument a parameter header mirrors.
    """
    mirrors = [(name, value) for name, value in request.headers if name in _ONCE or name.startswith(_PARAM)]
    sent = dict(mirrors)
    if len(sent) != len(mirrors):
        return _mismatch("an MCP header is sent twice", correlation)
    version = sent.get(_VERSION)
    if version is not None and version not in REVISIONS:
        detail = f"MCP revision {version[:32]!r} is not one of {', '.join(sorted(REVISIONS))}"
        return Refusal(Code.PROTOCOL_VIOLATION, detail, correlation=correlation, protocol_code=UNSUPPORTED_REVISION)
    meta = params.get("_meta")
    stated = meta.get(_VERSION_KEY) if isinstance(meta, dict) else None
    if stated != version and stated is not None and (version is not None or stated == MODERN):
        return _mismatch(f"{_VERSION} and _meta name different revisions", correlation)
    required = version == MODERN and correlation is not None
    detail = _routing(sent, method, params, required=required)
    if not detail and (method == "tools/call" or any(name.startswith(_PARAM) for name in sent)):
        detail = _parameters(sent, params if method == "tools/call" else {}, schema, required=required)
    return _mismatch(detail, correlation) if detail else None


def _mismatch(detail: str, correlation: Json) -> Refusal:
    return Refusal(Code.PROTOCOL_VIOLATION, detail, correlation=correlation, protocol_code=HEADER_MISMATCH)


def _routing(sent: Mapping[str, str], method: str, params: Mapping[str, Json], *, required: bool) -> str:
    if sent.get(_METHOD, None if required else method) != method:
        return f"{_METHOD} is not the body's method"
    mirrored = params.get(_NAMED[method]) if method in _NAMED else None
    if _NAME in sent or (required and mirrored is not None):
        name = _decoded(sent.get(_NAME, ""))
        if name is None or name != mirrored:
            return f"{_NAME} does not name what the body names"
    return ""


def _parameters(sent: Mapping[str, str], params: Mapping[str, Json], schema: ParameterSchema | None, *, required: bool) -> str:
    headers = {name[len(_PARAM) :]: value for name, value in sent.items() if name.startswith(_PARAM)}
    if not headers and not required:
        return ""
    given = params.get("arguments")
    arguments = given if isinstance(given, dict) else {}
    annotated = {token.lower(): path for token, path in _annotations(schema.source if schema else {})}
    for token, header in headers.items():
        text, value = _decoded(header), _argument(arguments, token, annotated)
        if text is None or value is None or not _mirrors(text, value):
            return f"{_PARAM}{token} is not the argument that it mirrors"
    for token, path in annotated.items():
        if required and token not in headers and isinstance(_at(arguments, path), str | int | float):
            return f"{_PARAM}{token} is missing, but the argument that it mirrors is there"
    return ""


def _annotations(schema: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every `x-mcp-header` below `properties`, the only place where the revision allows one."""
    properties = schema.get("properties")
    for name, sub in properties.items() if isinstance(properties, dict) else ():
        if isinstance(sub, dict):
            if isinstance(token := sub.get("x-mcp-header"), str):
                yield token, (*path, name)
            yield from _annotations(sub, (*path, name))


def _argument(arguments: dict[str, Json], token: str, annotated: Mapping[str, tuple[str, ...]]) -> Json:
    if token in annotated:
        return _at(arguments, annotated[token])
    # The catalog may have left the annotation out. Two arguments that the header could mean are one too many.
    like = [value for name, value in arguments.items() if name.lower() == token]
    return like[0] if len(like) == 1 else None


def _at(arguments: dict[str, Json], path: tuple[str, ...]) -> Json:
    node: Json = arguments
    for name in path:
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _mirrors(text: str, value: Json) -> bool:
    if isinstance(value, bool):
        return text == ("true" if value else "false")
    if isinstance(value, int | float):
        # The revision asks to compare numbers as numbers: 42 mirrors 42.0.
        whole = _DECIMAL.fullmatch(text)
        return text == str(value) or (whole is not None and int(whole[1]) == value)
    return isinstance(value, str) and text == value


def _decoded(header: str) -> str | None:
    """The header's text; `=?base64?…?=` wraps what a header can't hold. None when the wrapping is broken or not canonical."""
    match = _SENTINEL.fullmatch(header)
    if match is None:
        return header
    try:
        raw = base64.b64decode(match[1], validate=True)
        return raw.decode("utf-8") if base64.b64encode(raw).decode() == match[1] else None
    except (binascii.Error, ValueError):
        return None
