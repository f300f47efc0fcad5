"""REST: an operation is a method and a path template.

Laws: the most specific template that fits decides, and only that one. Text becomes a number, a boolean or a list only where the
catalog's schema says so. A body that a schema judges is JSON or a form; a body that no schema judges passes, but if it says that
it is JSON or a form, it must be a proper one.
"""

from collections.abc import Mapping

from broker.policy.match import PathError, split_path
from broker.policy.schema import ParameterSchema, typed
from broker.policy.snapshot import Grant, Operation, Tool
from broker.policy.types import Code, Decision, Json, Refusal, Request, ToolCall
from broker.protocols import strict
from broker.protocols.base import Reply, ResponseFilter

_JSON = "application/json"
_FORM = "application/x-www-form-urlencoded"


class Rest:
    """The adapter for `protocol: rest`. Holds no state."""

    name: str = "rest"
    locations: frozenset[str] = frozenset({"path", "query", "body"})

    def body_limit(self, tool: Tool, request: Request) -> int | Refusal:
        """The matched operation's `max_body`, or why no body can help this request."""
        found = strict.head(request) or _matched(tool, request)
        if isinstance(found, Refusal):
            return found
        if found is None:
            return Refusal(Code.OPERATION_NOT_DECLARED, f"{_label(request)} is no operation of {tool.name!r}")
        return found[0].max_body

    def recognise(self, tool: Tool, request: Request, body: bytes) -> ToolCall | Refusal:
        """The operation with its path, query and body; operation None where nothing matches."""
        found = strict.head(request) or _matched(tool, request)
        if isinstance(found, Refusal):
            return found
        if found is None:
            return ToolCall(tool.name, None, label=_label(request))
        operation, variables = found
        if len(body) > operation.max_body:
            return Refusal(Code.BODY_TOO_LARGE, f"the body is over the {operation.max_body} bytes that {operation.name} takes")
        kinds = _kinds(operation, "path")
        params: dict[str, Json] = {"path": {name: typed(text, kinds.get(name, "")) for name, text in variables.items()}}
        pairs = strict.query(request.query) if request.query else {}
        if isinstance(pairs, Refusal):
            return pairs
        params["query"] = _typed_pairs(pairs, operation.schemas.get("query"))
        refusal = _read_body(operation, request, body, params) if body else None
        return refusal or ToolCall(tool.name, operation.name, params, label=_label(request))

    def denial(self, problem: Mapping[str, Json], decision: Decision | Refusal, correlation: Json) -> Reply | None:  # noqa: ARG002
        """Always None: the plain problem body is what a REST client expects."""
        return None

    def response_filter(
        self,
        tool: Tool,  # noqa: ARG002
        grants: Mapping[str, Grant],  # noqa: ARG002
        call: ToolCall,  # noqa: ARG002
        content_type: str,  # noqa: ARG002
    ) -> ResponseFilter | None:
        """Always None: REST answers pass untouched."""
        return None


def _label(request: Request) -> str:
    return f"{request.method} {request.path}"


def _matched(tool: Tool, request: Request) -> tuple[Operation, dict[str, str]] | Refusal | None:
    try:
        segments = split_path(request.path)
    except PathError as error:
        return Refusal(Code.PROTOCOL_VIOLATION, str(error))
    best: tuple[Operation, dict[str, str]] | None = None
    best_rank: tuple[int, ...] = ()
    for operation in tool.operations.values():
        if operation.method != request.method or operation.template is None:
            continue
        variables = operation.template.match(segments)
        if variables is not None and (best is None or operation.template.rank < best_rank):
            best, best_rank = (operation, variables), operation.template.rank
    return best


def _kinds(operation: Operation, location: str) -> Mapping[str, str]:
    schema = operation.schemas.get(location)
    return schema.types if schema else {}


def _typed_pairs(pairs: Mapping[str, list[str]], schema: ParameterSchema | None) -> dict[str, Json]:
    kinds = schema.types if schema else {}
    found: dict[str, Json] = {}
    for key, values in pairs.items():
        kind = kinds.get(key, "")
        if kind == "array" and schema:
            item = _item_kind(schema, key)
            found[key] = [typed(value, item) for value in values]
        elif len(values) == 1:
            found[key] = typed(values[0], kind)
        else:
            found[key] = [typed(value, kind) for value in values]
    return found


def _item_kind(schema: ParameterSchema, key: str) -> str:
    items = schema.source["properties"][key].get("items")
    kind = items.get("type") if isinstance(items, dict) else None
    return kind if isinstance(kind, str) else ""


def _read_body(operation: Operation, request: Request, body: bytes, params: dict[str, Json]) -> Refusal | None:
    schema = operation.schemas.get("body")
    media = strict.media_type(request)
    if isinstance(media, Refusal):
        return media if schema or _claims_to_be_read(request) else None
    if media == _JSON or media.endswith("+json"):
        value = strict.json_value(body)
        if isinstance(value, Refusal):
            return value
        params["body"] = value
    elif media == _FORM:
        pairs = strict.form(body)
        if isinstance(pairs, Refusal):
            return pairs
        params["body"] = _typed_pairs(pairs, schema)
    elif schema:
        return Refusal(
            Code.ENCODING_NOT_ALLOWED,
            f"{operation.name} has a body schema, so its body must be {_JSON}, …+json or {_FORM}, not {media or 'untyped'!r}",
        )
    return None


def _claims_to_be_read(request: Request) -> bool:
    # text/csv in latin-1 is nobody's business here; JSON in latin-1 would be read differently behind us.
    stated = (request.header("content-type") or "").lower()
    return "json" in stated or _FORM in stated
