"""REST: an operation is a method and a path template.

Laws: the most specific template that fits decides, and only that one. Text becomes a number, a boolean or a list only where the
catalog's schema says so. A body that a schema judges is JSON or a form; a body that no schema judges passes, but if it says that
it is JSON or a form, it must be a proper one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from broker.policy.match import PathError, split_path
from broker.policy.schema import ParameterSchema, typed
from broker.policy.snapshot import Operation, Tool
from broker.policy.types import Code, Json, Refusal, Request, ToolCall
from broker.protocols import strict
from broker.protocols.base import Reply, ResponseFilter
from broker.protocols.strict import Unreadable, must

_JSON = "application/json"
_FORM = "application/x-www-form-urlencoded"


class Rest:
    """The adapter for `protocol: rest`. Holds no state."""

    name: str = "rest"
    locations: frozenset[str] = frozenset({"path", "query", "body"})

    def body_limit(self, tool: Tool, request: Request) -> int | Refusal | None:
        """The matched operation's `max_body`; None where nothing matches."""
        try:
            operation, _ = _matched(tool, request)
        except Unreadable as error:
            return error.refusal
        return operation.max_body if operation else None

    def recognise(self, tool: Tool, request: Request, body: bytes) -> ToolCall | Refusal:
        """The operation with its path, query and body; operation None where nothing matches."""
        label, operation = f"{request.method} {request.path}", None
        try:
            operation, variables = _matched(tool, request)
            if operation is None:
                return ToolCall(tool.name, None, label=label)
            schemas = operation.schemas
            path = _typed({name: [value] for name, value in variables.items()}, schemas.get("path"))
            query = _typed(strict.query(request.query), schemas.get("query"))
            params = {"path": path, "query": query, **_body(operation, request, body)}
        except Unreadable as error:
            return replace(error.refusal, operation=operation.name if operation else None)
        return ToolCall(tool.name, operation.name, params, label=label)

    def denial(self, *_: Any) -> Reply | None:
        """The plain problem body is what a REST client expects."""
        return None

    def response_filter(self, *_: Any) -> ResponseFilter | None:
        """REST answers pass untouched."""
        return None


def _matched(tool: Tool, request: Request) -> tuple[Operation | None, dict[str, str]]:
    strict.head(request)
    try:
        segments = split_path(request.path)
    except PathError as error:
        raise Unreadable(Code.PROTOCOL_VIOLATION, str(error)) from None
    fits = [
        (template.rank, operation, variables)
        for operation in tool.operations.values()
        if operation.method == request.method
        and (template := operation.template)
        and (variables := template.match(segments)) is not None
    ]
    return min(fits, key=lambda fit: fit[0])[1:] if fits else (None, {})


def _typed(pairs: Mapping[str, list[str]], schema: ParameterSchema | None) -> dict[str, Json]:
    kinds = schema.types if schema else {}
    found: dict[str, Json] = {}
    for key, values in pairs.items():
        kind = kinds.get(key, "")
        items = schema.source["properties"][key].get("items") if schema and kind == "array" else None
        one = kind if kind != "array" else items.get("type", "") if isinstance(items, dict) else ""
        read = [typed(value, one) for value in values]
        found[key] = read if kind == "array" or len(read) > 1 else read[0]
    return found


def _body(operation: Operation, request: Request, body: bytes) -> dict[str, Json]:
    if len(body) > operation.max_body:
        raise Unreadable(Code.BODY_TOO_LARGE, f"the body is over the {operation.max_body} bytes that {operation.name} takes")
    schema, stated = operation.schemas.get("body"), request.header("content-type") or ""
    # text/csv in latin-1 is nobody's business here; JSON in latin-1 would be read differently behind us.
    if not body or (schema is None and "json" not in stated.lower() and _FORM not in stated.lower()):
        return {}
    media = strict.media_type(stated)
    if media == _JSON or media.endswith("+json"):
        return {"body": strict.json_value(body)}
    if media == _FORM:
        return {"body": _typed(strict.form(body), schema)}
    detail = f"{operation.name} has a body schema, so its body must be {_JSON}, …+json or {_FORM}, not {media or 'untyped'!r}"
    must(schema is None, detail, Code.ENCODING_NOT_ALLOWED)
    return {}
