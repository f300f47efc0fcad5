"""MCP's mirror headers: whoever routes by them and whoever reads the body must see one call (streamable HTTP, 2026-07-28).

Laws: a mirror header that is present equals what it mirrors, in every revision; none is sent twice; none mirrors nothing. From
2026-07-28 on, those that the revision requires of a request are there. Every breach is -32020.
"""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from broker.policy.schema import ParameterSchema
from broker.policy.types import Json, Request
from broker.protocols.strict import must

MODERN = "2026-07-28"
REVISIONS = ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25", MODERN)
"""What `mcp-protocol-version` may say; an unknown revision might give the same bytes another meaning."""

_known = partial(must, number=-32022)  # the revision's UnsupportedProtocolVersion
_same = partial(must, number=-32020)  # and its HeaderMismatch

_VERSION, _METHOD, _NAME = "mcp-protocol-version", "mcp-method", "mcp-name"
_PARAM = "mcp-param-"
_ONCE = frozenset({_VERSION, _METHOD, _NAME, "mcp-session-id", "last-event-id"})
_VERSION_KEY = "io.modelcontextprotocol/protocolVersion"
_NAMED = {"tools/call": "name", "prompts/get": "name", "resources/read": "uri"}
_SENTINEL = re.compile(r"=\?base64\?(.*)\?=")


def agree(request: Request, method: str, params: Mapping[str, Json], schema: ParameterSchema | None, *, asked: bool) -> None:
    """Nothing, where the headers fit the message; else raises `Unreadable`.

    `method` is empty for a client's answer. `asked` says that it is a request: of others, no header is required. `schema` is the
    catalog's for `arguments`; its `x-mcp-header` annotations say which argument a parameter header mirrors.
    """
    mirrors = [pair for pair in request.headers if pair[0] in _ONCE or pair[0].startswith(_PARAM)]
    sent = dict(mirrors)
    _same(len(sent) == len(mirrors), "an MCP header is sent twice")
    version = sent.get(_VERSION)
    _known(version is None or version in REVISIONS, f"the MCP revision is not one of {', '.join(REVISIONS)}")
    meta = params.get("_meta")
    stated = meta.get(_VERSION_KEY) if isinstance(meta, dict) else None
    if version is not None or stated == MODERN:
        _same(stated in (version, None), f"{_VERSION} and _meta name different revisions")
    required = asked and version == MODERN
    _routing(sent, method, params, required=required)
    arguments = params.get("arguments") if method == "tools/call" else None
    _parameters(sent, arguments if isinstance(arguments, dict) else {}, schema, required=required)


def _routing(sent: Mapping[str, str], method: str, params: Mapping[str, Json], *, required: bool) -> None:
    _same(sent.get(_METHOD, None if required else method) == method, f"{_METHOD} is not the body's method")
    mirrored = params.get(_NAMED[method]) if method in _NAMED else None
    if _NAME in sent or (required and mirrored is not None):
        _same(_decoded(sent.get(_NAME, "")) == mirrored, f"{_NAME} does not name what the body names")


def _parameters(sent: Mapping[str, str], arguments: dict[str, Json], schema: ParameterSchema | None, *, required: bool) -> None:
    headers = {name.removeprefix(_PARAM): value for name, value in sent.items() if name.startswith(_PARAM)}
    annotated = dict(_annotated(schema.source, arguments)) if schema and (headers or required) else {}
    for token, header in headers.items():
        # The catalog may have left the annotation out. Two arguments that the header could mean are one too many.
        like = [value for name, value in arguments.items() if name.lower() == token]
        mirrored = annotated.get(token) if token in annotated or len(like) != 1 else like[0]
        _same(_mirrors(_decoded(header), mirrored), f"{_PARAM}{token} is not the argument that it mirrors")
    for token, value in annotated.items():
        missing = required and token not in headers and isinstance(value, str | int | float)
        _same(not missing, f"{_PARAM}{token} is missing, but the argument that it mirrors is there")


def _annotated(schema: Mapping[str, Any], arguments: Json) -> Iterator[tuple[str, Json]]:
    """Each `x-mcp-header` (lower case) below `properties`, the revision's only place for one, and its argument (None: absent)."""
    for name, sub in schema.get("properties", {}).items():
        value = arguments.get(name) if isinstance(arguments, dict) else None
        if isinstance(sub, dict):
            if isinstance(token := sub.get("x-mcp-header"), str):
                yield token.lower(), value
            yield from _annotated(sub, value)


def _mirrors(text: str, value: Json) -> bool:
    if isinstance(value, bool | int | float):
        # The revision asks to compare numbers as numbers: 42 mirrors 42.0.
        return text.removesuffix(".0") == json.dumps(value).removesuffix(".0")
    return text == value


def _decoded(header: str) -> str:
    """The header's text; `=?base64?…?=` wraps what a header can't hold, in the canonical way only."""
    match = _SENTINEL.fullmatch(header)
    if match is None:
        return header
    try:
        text = base64.b64decode(match[1], validate=True).decode("utf-8")
    except ValueError:
        text = ""
    _same(base64.b64encode(text.encode()).decode() == match[1], "an MCP header's base64 is not canonical, or not of UTF-8")
    return text
