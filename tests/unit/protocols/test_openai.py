"""OpenAI's API: what a call asks for, what the provider would do by itself, what an answer used."""

import json

import pytest

from broker.policy.match import PathTemplate
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import Endpoint, Operation, Tool
from broker.policy.types import Code, Effect, ModelCall, Refusal, Request, ToolCall, Usage, Violation
from broker.protocols.models import IMAGE, OWN
from broker.protocols.openai import OpenAI
from broker.protocols.problem import problem

PATHS = {"chat": "/v1/chat/completions", "responses": "/v1/responses", "embeddings": "/v1/embeddings"}
CHAT, RESPONSES, EMBEDDINGS = PATHS
PNG = "data:image/png;base64," + "A" * 90_000


def recognised(api, schema=None, **members):
    schemas = {"body": ParameterSchema(schema, "r#")} if schema else {}
    template = PathTemplate.parse(PATHS[api])
    operation = Operation(api, Effect.READ, "r#", method="POST", template=template, schemas=schemas)
    tool = Tool("gpt", "o", "openai", Endpoint("https", "t", 443), "r#", {api: operation})
    body = json.dumps({"model": "m", **members}).encode()
    return OpenAI().recognise(tool, Request("POST", PATHS[api], "", (("content-type", "application/json"),)), body)


def said(**part):
    return [{"role": "user", "content": [part]}]


@pytest.mark.parametrize(
    ("api", "members", "most", "field"),
    [
        pytest.param(CHAT, {"max_completion_tokens": 5}, 5, "", id="a chat's maximum"),
        pytest.param(CHAT, {"max_tokens": 5}, 5, "", id="by its old name"),
        pytest.param(CHAT, {"max_tokens": 5, "max_completion_tokens": 7}, 7, "", id="by both: the larger"),
        pytest.param(CHAT, {"max_tokens": None}, None, "max_completion_tokens", id="null says nothing"),
        pytest.param(CHAT, {}, None, "max_completion_tokens", id="nothing said"),
        pytest.param(RESPONSES, {"max_output_tokens": 0}, 0, "", id="a response's maximum"),
        pytest.param(RESPONSES, {}, None, "max_output_tokens", id="none of a response"),
        pytest.param(EMBEDDINGS, {"input": "Hi"}, 0, "", id="embeddings generate nothing"),
    ],
)
def test_the_maximum_of_a_call(api, members, most, field):
    model = recognised(api, **members).model
    assert (model.max_output, model.output_field) == (most, field)


def test_a_host_that_takes_the_old_name_alone_gets_the_old_name():
    old, new = ({"properties": {field: {"type": "integer"}}} for field in ("max_tokens", "max_completion_tokens"))
    both = {"properties": {**old["properties"], **new["properties"]}}
    assert [recognised(CHAT, schema).model.output_field for schema in (old, new, both)] == [
        "max_tokens",
        "max_completion_tokens",
        "max_completion_tokens",
    ]


@pytest.mark.parametrize(("n", "choices"), [(None, 1), (1, 1), (8, 8)])
def test_a_chat_has_as_many_answers_as_it_asks_for(n, choices):
    assert recognised(CHAT, n=n).model.choices == choices


@pytest.mark.parametrize("n", ["x", True, 0, -1, 1.0, [1]])
def test_a_number_of_answers_that_is_none_is_refused(n):
    refusal = recognised(CHAT, n=n)
    assert isinstance(refusal, Refusal)
    assert refusal.code is Code.PROTOCOL_VIOLATION


def test_a_stream_says_so():
    assert [recognised(CHAT, stream=stream).model.stream for stream in (True, False, None)] == [True, False, False]


def size(**members):
    return len(json.dumps({"model": "m", **members}))


@pytest.mark.parametrize(
    ("members", "images"),
    [
        pytest.param({"messages": said(type="text", text="Hi")}, 0, id="text"),
        pytest.param({"messages": said(type="image_url", image_url={"url": PNG})}, 1, id="an image"),
        pytest.param({"messages": said(type="image_url", image_url={"url": PNG}) * 3}, 3, id="three images"),
        pytest.param({"messages": said(type="text", text=PNG)}, 0, id="text that looks like an image"),
        pytest.param(
            {"messages": said(type="image_url", image_url={"url": PNG.replace("image", "text")})}, 0, id="data, no image"
        ),
    ],
)
def test_the_bound_of_the_input_is_its_bytes_but_for_images(members, images):
    assert recognised(CHAT, **members).model.input_tokens == size(**members) + OWN + images * (IMAGE - len(PNG))


def test_the_bound_of_embeddings_is_their_bytes():
    assert recognised(EMBEDDINGS, input=["Hi"]).model.input_tokens == size(input=["Hi"])


FUNCTION = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"url": {"type": "url"}}}},
}
CUSTOM = {"type": "custom", "custom": {"name": "sql", "format": {"type": "grammar", "grammar": {"syntax": "lark"}}}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"url": "https://x.example"}'}}
URL = "https://x.example/a.png"


@pytest.mark.parametrize(
    ("api", "members", "asked"),
    [
        pytest.param(CHAT, {"tools": [FUNCTION, CUSTOM]}, {}, id="the agent's own tools"),
        pytest.param(
            CHAT, {"messages": [{"role": "assistant", "tool_calls": [CALLED]}]}, {}, id="a call of one, with an address"
        ),
        pytest.param(
            RESPONSES,
            {
                "input": [
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {"type": "reasoning", "id": "r"},
                ]
            },
            {},
            id="what was answered before",
        ),
        pytest.param(
            RESPONSES,
            {"input": said(type="output_text", text="See", annotations=[{"type": "url_citation", "url": URL}])},
            {},
            id="a citation",
        ),
        pytest.param(CHAT, {"messages": [{"role": "user", "content": f"Look at {URL}"}]}, {}, id="an address in text"),
        pytest.param(RESPONSES, {"background": False, "prompt": None, "store": True}, {}, id="what is turned off"),
        pytest.param(RESPONSES, {"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, {}, id="a schema"),
        pytest.param(RESPONSES, {"tools": [{"type": "web_search"}]}, {"web_search": "/body/tools/0/type"}, id="web search"),
        pytest.param(
            RESPONSES,
            {"tools": [{"type": "function", "name": "f"}, {"type": "mcp", "server_url": URL}]},
            {"mcp": "/body/tools/1/type", "url": "/body/tools/1/server_url"},
            id="an MCP server, behind a function",
        ),
        pytest.param(
            RESPONSES,
            {"tools": [{"type": "namespace", "tools": [{"type": "code_interpreter"}]}]},
            {"namespace": "/body/tools/0/type", "code_interpreter": "/body/tools/0/tools/0/type"},
            id="a tool in a group",
        ),
        pytest.param(
            RESPONSES,
            {"input": [{"type": "additional_tools", "role": "developer", "tools": [{"type": "mcp"}]}]},
            {"additional_tools": "/body/input/0/type", "mcp": "/body/input/0/tools/0/type"},
            id="a tool that comes with a message",
        ),
        pytest.param(CHAT, {"tools": [{"google_search": {}}]}, {"(unnamed)": "/body/tools/0"}, id="a tool without a type"),
        pytest.param(CHAT, {"tools": [{"type": ["mcp"]}]}, {"(unnamed)": "/body/tools/0/type"}, id="a type that is no word"),
        pytest.param(CHAT, {"tools": [{"type": "a b"}]}, {"(unnamed)": "/body/tools/0/type"}, id="a type that is a sentence"),
        pytest.param(CHAT, {"web_search_options": {}}, {"web_search": "/body/web_search_options"}, id="a chat's web search"),
        pytest.param(RESPONSES, {"background": True}, {"background": "/body/background"}, id="an answer that comes later"),
        pytest.param(RESPONSES, {"prompt": {"id": "p"}}, {"prompt": "/body/prompt"}, id="a stored prompt"),
        pytest.param(RESPONSES, {"previous_response_id": "r"}, {"stored": "/body/previous_response_id"}, id="an earlier answer"),
        pytest.param(RESPONSES, {"conversation": "c"}, {"stored": "/body/conversation"}, id="a stored conversation"),
        pytest.param(
            RESPONSES, {"input": [{"type": "item_reference", "id": "i"}]}, {"stored": "/body/input/0/type"}, id="a stored item"
        ),
        pytest.param(RESPONSES, {"input": [{"id": "i"}]}, {"stored": "/body/input/0"}, id="a stored item without a type"),
        pytest.param(RESPONSES, {"input": [{"id": "i", "x": 1}]}, {"stored": "/body/input/0"}, id="one with something else"),
        pytest.param(
            CHAT, {"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, {"stored": "/body/messages/0/audio"}, id="audio"
        ),
        pytest.param(
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{}"}}]}]},
            {},
            id="a call of the agent's own tool without a type",
        ),
        pytest.param(
            CHAT,
            {"messages": said(type="file", file={"file_id": "f"})},
            {"stored": "/body/messages/0/content/0/file/file_id"},
            id="a file",
        ),
        pytest.param(CHAT, {"plugins": [{"id": "web"}]}, {"plugins": "/body/plugins"}, id="another host's member"),
        pytest.param(CHAT, {"models": ["a", "b"]}, {"models": "/body/models"}, id="other models to fall back to"),
        pytest.param(
            CHAT,
            {"messages": said(type="image_url", image_url={"url": URL})},
            {"url": "/body/messages/0/content/0/image_url/url"},
            id="an image at an address",
        ),
        pytest.param(
            RESPONSES,
            {"input": said(type="input_image", image_url=URL)},
            {"url": "/body/input/0/content/0/image_url"},
            id="an image at an address, in a response",
        ),
        pytest.param(
            RESPONSES,
            {"input": said(type="input_file", file_url=URL)},
            {"url": "/body/input/0/content/0/file_url"},
            id="a file at an address",
        ),
        pytest.param(
            RESPONSES,
            {"input": [{"type": "function_call_output", "call_id": "1", "output": [{"type": "input_image", "image_url": URL}]}]},
            {"url": "/body/input/0/output/0/image_url"},
            id="an image at an address, in a tool's result",
        ),
        pytest.param(
            CHAT,
            {"messages": said(type="video_url", video_url={"url": URL})},
            {"url": "/body/messages/0/content/0/video_url/url"},
            id="a video at an address",
        ),
        pytest.param(
            CHAT, {"messages": said(type="link", link=URL)}, {"link": "/body/messages/0/content/0/type"}, id="an unknown part"
        ),
        pytest.param(EMBEDDINGS, {"input": [{"image": URL}]}, {"url": "/body/input/0/image"}, id="embeddings of an image"),
        pytest.param(
            CHAT, {"service_tier": "priority"}, {"service_tier": "/body/service_tier"}, id="a tier that costs twice the price"
        ),
        pytest.param(CHAT, {"service_tier": "flex"}, {}, id="a tier that costs less"),
        pytest.param(
            CHAT, {"messages": said(video=[PNG, URL])}, {"url": "/body/messages/0/content/0/video"}, id="a list of addresses"
        ),
        pytest.param(
            CHAT,
            {"messages": said(type="image_url", Image_URL={"URL": URL})},
            {"url": "/body/messages/0/content/0/Image_URL/URL"},
            id="an address under a key in another case",
        ),
    ],
)
def test_what_the_provider_would_run_or_fetch_by_itself_is_named(api, members, asked):
    found = recognised(api, **members).model.server_tools
    assert {word: pointer for pointer, word in found} == asked


def used(content_type, answer):
    reader = OpenAI().response_filter(None, {}, ToolCall("t", "o", model=ModelCall("m", 30, "")), content_type)
    assert reader.feed(answer, last=True) == answer
    return reader


def whole(document):
    return used("application/json", json.dumps(document).encode())


def streamed(*events, done=b""):
    return used("text/event-stream", b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events) + done)


CACHED = {"prompt_tokens": 20, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 2}}
TOLD = {"input_tokens": 20, "output_tokens": 5, "input_tokens_details": {"cached_tokens": 8}}


def test_usage_holds_what_was_cached():
    assert whole({"choices": [], "usage": CACHED}).usage == Usage(20, 5, 8, 2)
    assert whole({"output": [], "usage": TOLD}).usage == Usage(20, 5, 8)
    assert whole({"object": "list", "data": [], "usage": {"prompt_tokens": 4, "total_tokens": 4}}).usage == Usage(4)


@pytest.mark.parametrize("end", ["completed", "incomplete", "failed"])
def test_the_end_of_a_response_tells_its_usage(end):
    assert streamed({"type": f"response.{end}", "response": {"usage": TOLD}}).usage == Usage(20, 5, 8)


def test_a_failed_response_that_tells_nothing_is_estimated():
    delta = {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "abcd"}
    failed = streamed(delta, {"type": "response.failed", "response": {"usage": None}})
    assert failed.usage.estimated


def test_the_last_usage_of_a_chat_counts():
    chunk = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
    last = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6}}
    assert streamed(chunk, last, done=b"data: [DONE]\n\n").usage == Usage(9, 6)
    assert streamed(chunk, last).usage == Usage(9, 6, estimated=True), "nobody said that it was all"


def delta(index=0, **said):
    return {"choices": [{"index": index, "delta": said}]}


def test_a_chat_and_its_stream_have_one_hash():
    calls = [{"function": {"name": "f", "arguments": '{"a": 1}'}}, {"custom": {"name": "g", "input": "x"}}]
    answers = [{"index": 1, "message": {"content": "Two"}}, {"index": 0, "message": {"content": "One", "tool_calls": calls}}]
    stream = streamed(
        delta(role="assistant", content="O"),
        delta(1, content="Tw"),
        delta(content="ne"),
        delta(1, content="o"),
        delta(tool_calls=[{"index": 0, "function": {"name": "f", "arguments": '{"a"'}}]),
        delta(tool_calls=[{"index": 1, "custom": {"name": "g", "input": "x"}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]),
    )
    assert whole({"choices": answers}).completion_hash == stream.completion_hash
    assert stream.completion_hash != streamed(delta(content="One")).completion_hash


def test_a_response_and_its_stream_have_one_hash():
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "message", "content": [{"type": "output_text", "text": "One"}, {"type": "refusal", "refusal": "No"}]},
        {"type": "function_call", "arguments": "{}"},
        {"type": "custom_tool_call", "input": "x"},
    ]

    def event(kind, text, index, **place):
        return {"type": f"response.{kind}.delta", "delta": text, "output_index": index, **place}

    stream = streamed(
        event("reasoning_summary_text", "Hm.", 0, summary_index=0),
        event("output_text", "O", 1, content_index=0),
        event("output_text", "ne", 1, content_index=0),
        event("refusal", "No", 1, content_index=1),
        event("function_call_arguments", "{}", 2),
        event("custom_tool_call_input", "x", 3),
        {"type": "response.output_text.done", "text": "One"},
    )
    assert whole({"output": output, "usage": TOLD}).completion_hash == stream.completion_hash


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Code.PARAMS_INVALID, "invalid_request_error"),
        (Code.BODY_TOO_LARGE, "invalid_request_error"),
        (Code.BUDGET_EXHAUSTED, "rate_limit_error"),
        (Code.INTERNAL_FAULT, "service_unavailable_error"),
    ],
)
def test_a_denial_is_an_error_of_openai(code, kind):
    refusal = Refusal(code, "not so", (Violation("/body/model", "r#", "no"),))
    error = json.loads(OpenAI().denial(problem("d1", "bot", "gpt", "o", refusal), refusal, None).body)["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, code, "/body/model")
    plain = json.loads(OpenAI().denial(problem("d1", "bot", "gpt", "o", Refusal(code, "")), refusal, None).body)
    assert plain["error"]["param"] is None
