"""REST requests become operations with typed parameters, or refusals."""

from typing import Any

import pytest

from broker.policy.match import PathTemplate
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import Endpoint, Operation, Tool
from broker.policy.types import Code, Effect, Refusal, Request, ToolCall
from broker.protocols.rest import Rest

JSON = (("content-type", "application/json"),)
FORM = (("content-type", "application/x-www-form-urlencoded"),)


def _operation(name: str, method: str, text: str, /, max_body: int = 100, **schemas: Any) -> Operation:
    compiled = {location: ParameterSchema(schema, f"tools/t.yaml#/{name}") for location, schema in schemas.items()}
    template = PathTemplate.parse(text)
    return Operation(name, Effect.WRITE, "rule", method=method, template=template, schemas=compiled, max_body=max_body)


OPERATIONS = [
    _operation("rest", "GET", "/files/{+rest}"),
    _operation("item", "GET", "/items/{id}", path={"properties": {"id": {"type": "integer"}}}),
    _operation("special", "GET", "/items/special"),
    _operation(
        "search",
        "GET",
        "/search",
        query={
            "properties": {
                "page": {"type": "integer"},
                "all": {"type": "boolean"},
                "tag": {"type": "array", "items": {"type": "integer"}},
                "any": {"type": "array"},
            }
        },
    ),
    _operation("create", "POST", "/items", body={"type": "object", "properties": {"n": {"type": "integer"}}}),
    _operation("upload", "POST", "/upload", max_body=20),
    _operation("remove", "DELETE", "/items/{id}"),
]
TOOL = Tool("t", "o", "rest", Endpoint("https", "t", 443), "rule", {operation.name: operation for operation in OPERATIONS})


def _recognise(method: str, path: str, query: str = "", headers: tuple[tuple[str, str], ...] = (), body: bytes = b"") -> Any:
    return Rest().recognise(TOOL, Request(method, path, query, headers), body)


@pytest.mark.parametrize(
    ("arguments", "operation", "params"),
    [
        pytest.param(("GET", "/items/7"), "item", {"path": {"id": 7}, "query": {}}, id="an integer in the path"),
        pytest.param(("GET", "/items/007"), "item", {"path": {"id": "007"}, "query": {}}, id="no integer, so it stays text"),
        pytest.param(("GET", "/items/special"), "special", {"path": {}, "query": {}}, id="the literal before the variable"),
        pytest.param(("GET", "/files/a/b"), "rest", {"path": {"rest": "a/b"}, "query": {}}, id="the rest of a path"),
        pytest.param(("GET", "/items/7", "x=1"), "item", {"path": {"id": 7}, "query": {"x": "1"}}, id="an unknown query key"),
        pytest.param(
            ("GET", "/search", "page=2&all=true&tag=1&any=x&free=1&free=2"),
            "search",
            {"path": {}, "query": {"page": 2, "all": True, "tag": [1], "any": ["x"], "free": ["1", "2"]}},
            id="typed query values and lists",
        ),
        pytest.param(
            ("GET", "/search", "page=1&page=2"), "search", {"path": {}, "query": {"page": [1, 2]}}, id="a repeated key is a list"
        ),
        pytest.param(
            ("POST", "/items", "", JSON, b'{"n": "1"}'), "create", {"path": {}, "query": {}, "body": {"n": "1"}}, id="a JSON body"
        ),
        pytest.param(
            ("POST", "/items", "", (("content-type", "application/merge-patch+json"),), b"[]"),
            "create",
            {"path": {}, "query": {}, "body": []},
            id="a body in a JSON dialect",
        ),
        pytest.param(
            ("POST", "/items", "", FORM, b"n=1&m=2&m=3"),
            "create",
            {"path": {}, "query": {}, "body": {"n": 1, "m": ["2", "3"]}},
            id="a form, typed like a query",
        ),
        pytest.param(("POST", "/items"), "create", {"path": {}, "query": {}}, id="no body"),
        pytest.param(
            ("POST", "/upload", "", (("content-type", "image/png"),), b"\x89PNG"),
            "upload",
            {"path": {}, "query": {}},
            id="opaque",
        ),
        pytest.param(
            ("POST", "/upload", "", (("content-type", "text/jsonl"),), b"{}{}"),
            "upload",
            {"path": {}, "query": {}},
            id="JSON lines",
        ),
        pytest.param(("POST", "/upload", "", (), b"\x00"), "upload", {"path": {}, "query": {}}, id="opaque without a type"),
        pytest.param(
            ("POST", "/upload", "", (("content-type", "text/csv; charset=latin1"),), b"\xe9"),
            "upload",
            {"path": {}, "query": {}},
            id="opaque in another charset",
        ),
        pytest.param(
            ("DELETE", "/items/x", "", JSON, b"{}"),
            "remove",
            {"path": {"id": "x"}, "query": {}, "body": {}},
            id="DELETE with a body",
        ),
        pytest.param(("HEAD", "/items/7"), None, {}, id="HEAD is not GET"),
        pytest.param(("GET", "/items/7/"), None, {}, id="a trailing slash is another path"),
        pytest.param(("GET", "/nothing"), None, {}, id="an undeclared path"),
    ],
)
def test_recognises(arguments: Any, operation: str | None, params: dict[str, Any]) -> None:
    call = _recognise(*arguments)
    assert call == ToolCall("t", operation, params, label=f"{arguments[0]} {arguments[1]}")


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        pytest.param(("GET", "/items//7"), Code.PROTOCOL_VIOLATION, "empty segment", id="an ambiguous path"),
        pytest.param(("GET", "/items/%2e%2e"), Code.PROTOCOL_VIOLATION, "dot segment", id="an encoded dot segment"),
        pytest.param(("GET", "/search", "a=1;b=2"), Code.PROTOCOL_VIOLATION, "query", id="an ambiguous query"),
        pytest.param(("POST", "/items", "", JSON, b'{"n":1,"n":2}'), Code.BODY_MALFORMED, "twice", id="a key twice"),
        pytest.param(("POST", "/upload", "", JSON, b"NaN"), Code.BODY_MALFORMED, "NaN", id="bad JSON that no schema judges"),
        pytest.param(("POST", "/upload", "", FORM, b"%"), Code.BODY_MALFORMED, "form", id="a bad form that no schema judges"),
        pytest.param(("POST", "/items", "", (), b"{}"), Code.ENCODING_NOT_ALLOWED, "application/json", id="no content type"),
        pytest.param(
            ("POST", "/items", "", (("content-type", "text/plain"),), b"{}"),
            Code.ENCODING_NOT_ALLOWED,
            "'text/plain'",
            id="a type that the schema can't judge",
        ),
        pytest.param(
            ("POST", "/upload", "", (("content-type", "application/json; charset=utf-16"),), b"{}"),
            Code.ENCODING_NOT_ALLOWED,
            "charset",
            id="JSON in UTF-16 that no schema judges",
        ),
        pytest.param(
            ("POST", "/items", "", (*JSON, ("content-encoding", "gzip")), b"x"),
            Code.ENCODING_NOT_ALLOWED,
            "compressed",
            id="a compressed body",
        ),
        pytest.param(("POST", "/upload", "", (), b"x" * 21), Code.BODY_TOO_LARGE, "20 bytes", id="over the operation's cap"),
        pytest.param(("GET", "/items/7", "", (("upgrade", "websocket"),)), Code.PROTOCOL_VIOLATION, "upgrades", id="WebSocket"),
    ],
)
def test_refuses(arguments: Any, code: Code, reason: str) -> None:
    refusal = _recognise(*arguments)
    assert isinstance(refusal, Refusal)
    assert refusal.code is code
    assert reason in refusal.detail


def test_the_most_specific_operation_wins_in_any_order() -> None:
    backwards = Tool("t", "o", "rest", TOOL.endpoint, "rule", dict(reversed(TOOL.operations.items())))
    assert Rest().recognise(backwards, Request("GET", "/items/special", "", ()), b"").operation == "special"  # type: ignore[union-attr]


def test_the_body_limit_is_the_operations() -> None:
    assert Rest().body_limit(TOOL, Request("POST", "/upload", "", ())) == 20


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        pytest.param(Request("GET", "/a/../b", "", ()), Code.PROTOCOL_VIOLATION, id="an ambiguous path"),
        pytest.param(Request("POST", "/upload", "", (("content-encoding", "br"),)), Code.ENCODING_NOT_ALLOWED, id="compressed"),
    ],
)
def test_a_head_can_be_refused_before_its_body(request_: Request, code: Code) -> None:
    refusal = Rest().body_limit(TOOL, request_)
    assert isinstance(refusal, Refusal)
    assert refusal.code is code


def test_no_body_is_waited_for_where_nothing_matches() -> None:
    assert Rest().body_limit(TOOL, Request("POST", "/nothing", "", ())) is None


def test_rest_adds_nothing_to_answers() -> None:
    refusal = Refusal(Code.BODY_MALFORMED, "x")
    assert Rest().denial({}, refusal, None) is None
    assert Rest().response_filter(TOOL, {}, ToolCall("t", "item"), "application/json") is None
