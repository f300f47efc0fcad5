"""Anthropic's API: what a call asks for, what the provider would do by itself, what an answer used."""

import json

import pytest

from broker.policy.match import PathTemplate
from broker.policy.snapshot import Endpoint, Operation, Tool
from broker.policy.types import Code, Effect, ModelCall, Refusal, Request, ToolCall, Usage
from broker.protocols.anthropic import Anthropic
from broker.protocols.models import IMAGE, OWN
from broker.protocols.problem import problem

OPERATION = Operation("messages", Effect.READ, "r#", method="POST", template=PathTemplate.parse("/v1/messages"))
TOOL = Tool("claude", "o", "anthropic", Endpoint("https", "t", 443), "r#", {"messages": OPERATION})
DATA = "A" * 90_000
URL = "https://x.example/a.png"


def recognised(**members):
    body = json.dumps({"model": "m", **members}).encode()
    return Anthropic().recognise(TOOL, Request("POST", "/v1/messages", "", (("content-type", "application/json"),)), body)


def said(**block):
    return [{"role": "user", "content": [block]}]


def test_the_maximum_of_a_call():
    assert (recognised(max_tokens=5).model.max_output, recognised(max_tokens=5).model.output_field) == (5, "")
    assert (recognised().model.max_output, recognised().model.output_field) == (None, "max_tokens")


IMAGE_BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
PDF_BLOCK = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": DATA}}


@pytest.mark.parametrize(
    ("messages", "images"),
    [
        pytest.param(said(**IMAGE_BLOCK), 1, id="an image"),
        pytest.param(said(type="tool_result", tool_use_id="t", content=[IMAGE_BLOCK] * 2), 2, id="images in a tool's result"),
        pytest.param(said(**PDF_BLOCK), 0, id="a document"),
        pytest.param(said(type="image", source={"type": "base64", "data": 7}), 0, id="no data"),
        pytest.param(said(type="tool_use", id="t", name="f", input=IMAGE_BLOCK), 0, id="what only looks like one"),
    ],
)
def test_the_bound_of_the_input_is_its_bytes_but_for_images(messages, images):
    size = len(json.dumps({"model": "m", "messages": messages}))
    assert recognised(messages=messages).model.input_tokens == size + OWN + images * (IMAGE - len(DATA))


LOOKUP = {"name": "look", "input_schema": {"type": "object", "properties": {"source": {"type": "url"}}}}
SOURCE = {"type": "url", "url": URL}


@pytest.mark.parametrize(
    ("members", "asked"),
    [
        pytest.param({"tools": [LOOKUP, {**LOOKUP, "type": "custom"}, {**LOOKUP, "type": None}]}, {}, id="the agent's own tools"),
        pytest.param(
            {"messages": said(type="tool_use", id="t", name="look", input={"source": SOURCE})},
            {},
            id="a call of one, with an address",
        ),
        pytest.param(
            {"messages": said(type="search_result", source=URL, title="t", content=[{"type": "text", "text": "x"}])},
            {},
            id="a result",
        ),
        pytest.param(
            {"messages": said(type="text", text="x", citations=[{"type": "web_search_result_location", "url": URL}])},
            {},
            id="a citation",
        ),
        pytest.param({"system": [{"type": "text", "text": URL, "cache_control": {"type": "ephemeral"}}]}, {}, id="a cached text"),
        pytest.param(
            {"tools": [LOOKUP, {"type": "web_search_20250305", "name": "web_search"}]},
            {"web_search_20250305": "/body/tools/1/type"},
            id="web search",
        ),
        pytest.param({"mcp_servers": [{"type": "url", "url": URL}]}, {"mcp": "/body/mcp_servers"}, id="MCP servers"),
        pytest.param({"container": "c"}, {"container": "/body/container"}, id="a container"),
        pytest.param({"thread": {"type": "create"}}, {"stored": "/body/thread"}, id="a stored conversation"),
        pytest.param({"fallbacks": [{"model": "other"}]}, {"fallbacks": "/body/fallbacks"}, id="other models to fall back to"),
        pytest.param({"compaction": {"type": "x"}}, {"compaction": "/body/compaction"}, id="a summary that usage leaves out"),
        pytest.param({"mcp_servers": None}, {}, id="what is not there"),
        pytest.param(
            {"messages": said(type="image", source=SOURCE)}, {"url": "/body/messages/0/content/0/source/type"}, id="an image"
        ),
        pytest.param(
            {"system": [{"type": "document", "source": SOURCE}]}, {"url": "/body/system/0/source/type"}, id="a document"
        ),
        pytest.param(
            {
                "messages": said(
                    type="tool_result",
                    content=[
                        {"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": SOURCE}]}}
                    ],
                )
            },
            {"url": "/body/messages/0/content/0/content/0/source/content/0/source/type"},
            id="an image in a document in a tool's result",
        ),
        pytest.param(
            {"messages": said(type="document", source={"type": "file", "file_id": "f"})},
            {"stored": "/body/messages/0/content/0/source/type"},
            id="a stored file",
        ),
        pytest.param(
            {"messages": said(type="container_upload", file_id="f")},
            {"container_upload": "/body/messages/0/content/0/type", "stored": "/body/messages/0/content/0/file_id"},
            id="a file for a container",
        ),
    ],
)
def test_what_the_provider_would_run_or_fetch_by_itself_is_named(members, asked):
    assert {word: pointer for pointer, word in recognised(**members).model.server_tools} == asked


def used(content_type, answer):
    reader = Anthropic().response_filter(None, {}, ToolCall("t", "o", model=ModelCall("m", 30, "")), content_type)
    assert reader.feed(answer, last=True) == answer
    return reader


def whole(content, usage):
    return used("application/json", json.dumps({"type": "message", "content": content, "usage": usage}).encode())


def streamed(*events):
    return used("text/event-stream", b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events))


def start(**usage):
    return {"type": "message_start", "message": {"content": [], "usage": usage}}


def delta(**usage):
    return {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}


STOP = {"type": "message_stop"}
CACHE = {"cache_read_input_tokens": 8, "cache_creation_input_tokens": 2}


def test_usage_holds_what_was_cached():
    assert whole([], {"input_tokens": 10, "output_tokens": 5, **CACHE}).usage == Usage(20, 5, 8, 2)
    assert whole([], {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": None}).usage == Usage(10, 5)


@pytest.mark.parametrize(
    ("events", "usage"),
    [
        pytest.param(
            [start(input_tokens=10, output_tokens=1, **CACHE), delta(output_tokens=6), STOP], Usage(20, 6, 8, 2), id="whole"
        ),
        pytest.param(
            [start(input_tokens=10, output_tokens=1), delta(output_tokens=6, input_tokens=30), STOP],
            Usage(30, 6),
            id="cumulative",
        ),
        pytest.param(
            [start(input_tokens=10, output_tokens=1), delta(output_tokens=6, input_tokens=None), STOP], Usage(10, 6), id="null"
        ),
        pytest.param([start(input_tokens=10, output_tokens=1)], Usage(10, 1, estimated=True), id="cut"),
        pytest.param(
            [start(input_tokens=10, output_tokens=1), delta(output_tokens=6)], Usage(10, 6, estimated=True), id="cut late"
        ),
        pytest.param([STOP], Usage(10, 0, estimated=True), id="told nothing"),
        pytest.param([start(input_tokens="x", output_tokens=1), STOP], Usage(10, 0, estimated=True), id="no numbers"),
    ],
)
def test_a_stream_tells_its_usage_in_pieces(events, usage):
    assert streamed(*events).usage == usage


def test_a_message_and_its_stream_have_one_hash():
    content = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "text", "text": "One"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"b": [1], "a": "x"}},
        {"type": "tool_use", "id": "u", "name": "g", "input": {}},
    ]

    def pieces(index, block, *deltas):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        yield from ({"type": "content_block_delta", "index": index, "delta": each} for each in deltas)
        yield {"type": "content_block_stop", "index": index}

    stream = streamed(
        start(input_tokens=10, output_tokens=1),
        *pieces(0, {"type": "thinking", "thinking": ""}, {"thinking": "Hm."}, {"type": "signature_delta", "signature": "s"}),
        *pieces(1, {"type": "text", "text": ""}, {"text": "O"}, {"text": "ne"}),
        *pieces(
            2, {**content[2], "input": {}}, {"partial_json": ""}, {"partial_json": '{"b":[1],'}, {"partial_json": '"a": "x"}'}
        ),
        *pieces(3, content[3]),
        delta(output_tokens=6),
        STOP,
    )
    assert whole(content, {"input_tokens": 10, "output_tokens": 6}).completion_hash == stream.completion_hash
    assert stream.usage == Usage(10, 6)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.BODY_MALFORMED, "invalid_request_error"),
        (Code.ENCODING_NOT_ALLOWED, "invalid_request_error"),
        (Code.PARAMS_INVALID, "permission_error"),
        (Code.BODY_TOO_LARGE, "request_too_large"),
        (Code.BUDGET_EXHAUSTED, "rate_limit_error"),
        (Code.INTERNAL_FAULT, "api_error"),
    ],
)
def test_a_denial_is_an_error_of_anthropic(code, kind):
    refusal = Refusal(code, "not so")
    document = json.loads(Anthropic().denial(problem("d1", "bot", "claude", "o", refusal), refusal, None).body)
    assert (document["type"], document["request_id"]) == ("error", "d1")
    assert (document["error"]["type"], document["error"]["code"]) == (kind, code)
