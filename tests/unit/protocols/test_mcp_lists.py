"""Of a server's tools an agent sees those it holds, however the answer is cut."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.policy.snapshot import Endpoint, Grant, Operation, Tool
from broker.policy.types import Effect, ToolCall
from broker.protocols.base import ResponseBlocked, ResponseFilter
from broker.protocols.mcp import Mcp

OPERATIONS = {name: Operation(name, Effect.READ, "r", alias=f"{name}_tool") for name in ("search", "edit", "drop")}
TOOL = Tool("wiki", "o", "mcp", Endpoint("https", "w", 443), "rule", OPERATIONS)
GRANTS = {"search": Grant("r"), "edit": Grant("r")}


def _list(*names: object, **more: object) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": name, "title": "é"} for name in names], **more}}


def _filter(content_type: str, label: str = "tools/list") -> ResponseFilter:
    found = Mcp().response_filter(TOOL, GRANTS, ToolCall("wiki", None, housekeeping=True, label=label), content_type)
    assert found is not None
    return found


def _event(message: object) -> bytes:
    return b"event: message\nid: 3\ndata: " + json.dumps(message).encode() + b"\n\n"


ALL = _list("search_tool", "drop_tool", "edit_tool", nextCursor="c", _meta={"a": 1})
CUT = _list("search_tool", "edit_tool", nextCursor="c", _meta={"a": 1})


def test_a_json_list_is_cut_and_keeps_the_rest() -> None:
    assert json.loads(_filter("application/json; charset=utf-8").feed(json.dumps(ALL).encode(), last=True)) == CUT


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(CUT, id="a list that holds nothing else"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "no tools"}}, id="an error"),
        pytest.param({"jsonrpc": "2.0", "id": 1, "result": {"tools": {}}}, id="a result that only looks like one"),
        pytest.param({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"}, id="a notification"),
    ],
)
def test_what_needs_no_cut_passes_byte_for_byte(message: object) -> None:
    raw = json.dumps(message, indent=3).encode()
    assert _filter("application/json").feed(raw, last=True) == raw
    assert _filter("text/event-stream").feed(_event(message), last=False) == _event(message)


@pytest.mark.parametrize("content_type", ["", "application/octet-stream", "application/problem+json"])
def test_a_list_by_another_type_is_cut_too(content_type: str) -> None:
    assert json.loads(_filter(content_type).feed(json.dumps(ALL).encode(), last=True)) == CUT


@pytest.mark.parametrize(
    ("tools", "left"),
    [
        pytest.param([{"name": "drop_tool"}], [], id="nothing left"),
        pytest.param([{"name": ["search_tool"]}, "search_tool", None, {}], [], id="entries that are no tools"),
        pytest.param([{"name": "Search_Tool"}, {"name": "search_tool"}], [{"name": "search_tool"}], id="another case"),
    ],
)
def test_only_held_tools_are_left(tools: list[Any], left: list[Any]) -> None:
    message = {"jsonrpc": "2.0", "id": 1, "result": {"tools": tools}}
    shown = json.loads(_filter("application/json").feed(json.dumps(message).encode(), last=True))
    assert shown["result"]["tools"] == left


def test_a_list_for_one_agent_is_not_for_shared_caches() -> None:
    message = _list("search_tool", cacheScope="public", ttlMs=5)
    shown = json.loads(_filter("application/json").feed(json.dumps(message).encode(), last=True))
    assert shown["result"] == {**message["result"], "cacheScope": "private"}


STREAM = (
    b": hello\r\n\r\n"
    b'data: {"jsonrpc":"2.0","method":"notifications/message","params":{"data":"\xc3\xa9"}}\n\n'
    b"id: 0\ndata:\n\n" + _event(ALL) + b": ping\n\n"
)


def _whole(stream: bytes) -> bytes:
    return _filter("text/event-stream", "GET (listen)").feed(stream, last=True)


def test_a_stream_is_passed_but_for_its_list() -> None:
    before, after = STREAM.split(_event(ALL))
    shown = _whole(STREAM)
    assert shown.startswith(before + b"event: message\nid: 3\ndata: ")
    assert shown.endswith(b"\n\n" + after)
    assert json.loads(shown[len(before) : -len(after)].split(b"data: ")[1]) == CUT


@pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
def test_every_split_gives_what_the_whole_gives(content_type: str) -> None:
    raw = STREAM if content_type == "text/event-stream" else json.dumps(ALL, ensure_ascii=False).encode()
    whole = _filter(content_type).feed(raw, last=True)
    for cut in range(len(raw) + 1):
        parts = _filter(content_type)
        assert parts.feed(raw[:cut], last=False) + parts.feed(raw[cut:], last=True) == whole


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_fragments_give_what_the_whole_gives(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts)]
    parts = _filter("text/event-stream", "subscriptions/listen")
    shown = b"".join(parts.feed(STREAM[a:b], last=False) for a, b in pairwise(edges))
    assert shown + parts.feed(STREAM[edges[-1] :], last=True) == _whole(STREAM)


@pytest.mark.parametrize(
    ("content_type", "raw"),
    [
        pytest.param("application/json", b"{", id="half an answer"),
        pytest.param("application/json", json.dumps([ALL]).encode(), id="a batch"),
        pytest.param("application/json", b'{"result":{"tools":[]},"result":{"tools":[1]}}', id="two results"),
        pytest.param("application/json", json.dumps(ALL).encode("utf-16"), id="UTF-16"),
        pytest.param("text/event-stream", b'data: {"tools"\n\n', id="an event that is no JSON"),
        pytest.param("text/event-stream", b'data: {"\\u0074ools": [}\n\n', id="an event that spells it by escapes"),
        pytest.param("application/x-ndjson", b"{}\n{}", id="several documents"),
        pytest.param("application/octet-stream", b"data: " + json.dumps(ALL).encode() + b"\n\n", id="a stream by another name"),
        pytest.param("", b"\x1f\x8b\x08", id="something compressed, of no type"),
    ],
)
def test_what_can_not_be_read_is_blocked(content_type: str, raw: bytes) -> None:
    with pytest.raises(ResponseBlocked):
        _filter(content_type).feed(raw, last=True)


def test_an_endless_answer_is_blocked() -> None:
    answer = _filter("application/json")
    assert answer.feed(b" " * (4 << 20), last=False) == b""
    with pytest.raises(ResponseBlocked, match="4194304 bytes"):
        answer.feed(b" ", last=False)


@pytest.mark.parametrize("content_type", ["application/json", "", "text/event-stream"])
def test_an_empty_answer_passes(content_type: str) -> None:
    assert _filter(content_type).feed(b"", last=True) == b""


@pytest.mark.parametrize(
    ("call", "content_type"),
    [
        pytest.param(ToolCall("wiki", "search", label="tools/call search"), "application/json", id="a call"),
        pytest.param(ToolCall("wiki", None, housekeeping=True, label="ping"), "application/json", id="a ping"),
        pytest.param(ToolCall("wiki", None, housekeeping=True, label="tools/list"), "text/html", id="an error page"),
    ],
)
def test_what_holds_no_list_is_not_read(call: ToolCall, content_type: str) -> None:
    assert Mcp().response_filter(TOOL, GRANTS, call, content_type) is None
