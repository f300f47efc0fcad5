"""What holds for every model provider: bodies, hashes, the maximum that is set, and meters that change no byte of an answer."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.policy.match import PathTemplate
from broker.policy.snapshot import Endpoint, Operation, Tool
from broker.policy.types import Code, Decision, Effect, ModelCall, Refusal, Request, ToolCall, Usage, Verdict
from broker.protocols import models, sse, strict
from broker.protocols.base import Meter
from broker.protocols.models import with_max_output
from broker.protocols.problem import problem
from broker.protocols.registry import ADAPTERS

OPENAI, ANTHROPIC = ADAPTERS["openai"], ADAPTERS["anthropic"]
JSON = (("content-type", "application/json"),)
TOOL = Tool(
    "gpt",
    "o",
    "openai",
    Endpoint("https", "t", 443),
    "r#",
    {
        "any": Operation("any", Effect.READ, "r#", method="POST", template=PathTemplate.parse("/v1/{+rest}")),
        "models.list": Operation("models.list", Effect.READ, "r#", method="GET", template=PathTemplate.parse("/v1/models")),
    },
)


def recognised(path="/v1/responses", method="POST", headers=JSON, body=b'{"model": "m", "input": "Hi"}'):
    return OPENAI.recognise(TOOL, Request(method, path, "", headers), body)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("/v1/responses", id="as documented"),
        pytest.param("/v1/openai/responses/", id="with a slash at the end"),
        pytest.param("/v1/Respon%73es", id="escaped and in capitals"),
    ],
)
def test_a_request_to_an_api_calls_a_model_however_its_operation_is_written(path):
    assert recognised(path).model.name == "m"


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(("/v1/models", "GET", (), b""), id="another operation"),
        pytest.param(("/v1/files", "POST", (), b"text"), id="another path of the same operation"),
        pytest.param(("/v2/responses", "POST"), id="no operation"),
    ],
)
def test_everything_else_is_plain_rest(request_):
    call = recognised(*request_)
    assert isinstance(call, ToolCall)
    assert call.model is None
    assert OPENAI.response_filter(TOOL, {}, call, "application/json") is None


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        pytest.param(JSON, b"", id="no body"),
        pytest.param(JSON, b'["model"]', id="no object"),
        pytest.param((), b'{"model": "m"}', id="no content type"),
        pytest.param((("content-type", "text/plain"),), b'{"model": "m"}', id="JSON that says it is text"),
        pytest.param((("content-type", "application/x-www-form-urlencoded"),), b"model=m&input=Hi", id="a form"),
        pytest.param(JSON, b'{"input": "Hi"}', id="no model"),
        pytest.param(JSON, b'{"model": ["m"]}', id="a model that is no name"),
        pytest.param(JSON, b'{"model": "m", "stream": 1}', id="a stream that is a number"),
        pytest.param(JSON, b'{"model": "m", "max_output_tokens": true}', id="a maximum that is no number"),
        pytest.param(JSON, b'{"model": "m", "max_output_tokens": 1.5}', id="a maximum that is a fraction"),
        pytest.param(JSON, b'{"model": "m", "max_output_tokens": -1}', id="a maximum below zero"),
        pytest.param(JSON, b'{"model": "m", "max_output_tokens": 9223372036854775807}', id="a maximum that nobody can reach"),
        pytest.param(JSON, b'{"model": "m", "n": 9223372036854775807}', id="more answers than can be counted"),
        pytest.param(
            JSON, json.dumps({"model": "m", "input": [[{"a": 0}]] * 30_000}).encode(), id="more objects than can be looked at"
        ),
        pytest.param(JSON, json.dumps({"model": "m"} | {f"x{n}": 1 for n in range(40)}).encode(), id="too many unknown members"),
    ],
)
def test_a_model_call_that_cannot_be_read_is_refused(headers, body):
    refusal = recognised(headers=headers, body=body)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.operation) == (Code.PROTOCOL_VIOLATION, "any")


def test_a_broken_body_is_refused_as_rest_refuses_it():
    assert recognised(body=b'{"model": "m", "model": "n"}').code is Code.BODY_MALFORMED
    assert OPENAI.body_limit(TOOL, Request("POST", "/v1/responses", "", JSON)) == 1_048_576


def test_the_prompts_hash_depends_on_the_prompt_alone():
    one = recognised(body=b'{"model": "m", "input": [{"role": "user", "content": "Hi"}]}').model.prompt_hash
    same = recognised(body=b'{"input":[{"content":"H\\u0069","role":"user"}],"model":"n","temperature":0}').model.prompt_hash
    other = recognised(body=b'{"model": "m", "input": [{"role": "user", "content": "Ho"}]}').model.prompt_hash
    assert one == same != other
    assert one.startswith("sha256:")
    assert len(one) == len("sha256:") + 64


def test_deep_and_wide_bodies_take_linear_time_and_no_recursion():
    deep: object = {"type": "mcp"}
    for _ in range(120):
        deep = [{"content": deep}]
    call = recognised(body=json.dumps({"model": "m", "input": [deep] + [{"x" * 1000: [[0]]}] * 200}).encode())
    assert [word for _, word in call.model.server_tools] == ["mcp"]
    odd = recognised(body=json.dumps({"model": "m", "input": [{"a/~" * 99: {"type": "mcp"}}]}).encode())
    assert odd.model.server_tools[0][0].startswith("/body/input/0/a~1~0a~1~0")
    assert len(odd.model.server_tools[0][0]) < 200


# The maximum that the broker sets.

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | TEXTS, lambda each: st.lists(each) | st.dictionaries(TEXTS, each)
)


@given(st.dictionaries(TEXTS | st.just("max_tokens"), VALUES), st.booleans(), st.sampled_from([None, 1]))
def test_setting_a_maximum_adds_one_member_and_changes_no_other(body, ascii_only, indent):
    body = {key: value for key, value in body.items() if (key, value) != ("max_tokens", value) or value is None}
    written = json.dumps(body, ensure_ascii=ascii_only, indent=indent).encode()
    assert strict.json_value(with_max_output(written, "max_tokens", 7)) == {**body, "max_tokens": 7}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(b'{"model":"m"}', b'{"max_tokens":7,"model":"m"}', id="nothing else moves"),
        pytest.param(b' {\n "model": "m"}', b' {"max_tokens":7,\n "model": "m"}', id="white space stays"),
        pytest.param(b"{ }", b'{"max_tokens":7 }', id="an empty object"),
        pytest.param(b'{"max_tokens": null, "a": 1.0}', b'{"max_tokens":7,"a":1.0}', id="null is replaced"),
        pytest.param(rb'{"max\u005ftokens": null}', b'{"max_tokens":7}', id="also under an escaped name"),
        pytest.param(b'{"a": "max_tokens"}', b'{"max_tokens":7,"a": "max_tokens"}', id="a text that says the same"),
    ],
)
def test_the_maximum_goes_behind_the_first_brace(before, after):
    assert with_max_output(before, "max_tokens", 7) == after


# Meters.


def meter(adapter, content_type="application/json", **model):
    call = ToolCall("t", "any", model=ModelCall(**{"name": "m", "input_tokens": 100, "prompt_hash": "", **model}))
    found = adapter.response_filter(TOOL, {}, call, content_type)
    assert isinstance(found, Meter)
    return found


CHAT = b'{"choices":[{"index":0,"message":{"content":"A duplicate charge."}}],"usage":{"prompt_tokens":9,"completion_tokens":6}}'
CHAT_STREAM = (
    b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'
    b": keep-alive\n\n"
    b'data: {"choices":[{"index":0,"delta":{"content":"A dupli"}}]}\r\n\r\n'
    b'data: {"choices":[{"index":0,"delta":{"content":"cate charge."}}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":6}}\n\n'
    b"data: [DONE]\n\n"
)
MESSAGE = b'{"content":[{"type":"text","text":"A duplicate charge."}],"usage":{"input_tokens":9,"output_tokens":6}}'
MESSAGE_STREAM = (
    b"event: message_start\n"
    b'data: {"type":"message_start","message":{"content":[],"usage":{"input_tokens":9,"output_tokens":1}}}\n\n'
    b'data: {"type":"ping"}\n\n'
    b'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"A dupli"}}\n\n'
    b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"cate charge."}}\n\n'
    b'data: {"type":"content_block_stop","index":0}\n\n'
    b'data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":6}}\n\n'
    b'data: {"type":"message_stop"}\n\n'
)
ANSWERS = {
    "a completion": (OPENAI, "application/json", CHAT),
    "a completion's stream": (OPENAI, "text/event-stream; charset=utf-8", CHAT_STREAM),
    "a message": (ANTHROPIC, "application/json", MESSAGE),
    "a message's stream": (ANTHROPIC, "Text/Event-Stream", MESSAGE_STREAM),
}
EACH = pytest.mark.parametrize(("adapter", "media", "answer"), ANSWERS.values(), ids=ANSWERS)


@EACH
@given(data=st.data())
def test_no_cut_changes_a_byte_the_usage_or_the_hash(adapter, media, answer, data):
    cuts = data.draw(st.lists(st.integers(0, len(answer)), max_size=8))
    edges = [0, *sorted(cuts), len(answer)]
    reader = meter(adapter, media)
    for start, end in pairwise(edges):
        assert reader.feed(answer[start:end], last=end == len(answer)) == answer[start:end], "held back"
    assert reader.usage == Usage(9, 6)
    assert reader.completion_hash == models._hash(b"A duplicate charge.")


@EACH
def test_fed_byte_by_byte_it_is_the_same(adapter, media, answer):
    reader = meter(adapter, media)
    assert b"".join(reader.feed(bytes([byte]), last=False) for byte in answer) == answer
    assert reader.usage == Usage(9, 6)
    assert reader.feed(b"", last=True) == b""
    assert reader.usage == Usage(9, 6)


@EACH
@given(data=st.data())
def test_an_answer_that_is_cut_anywhere_is_estimated_and_says_so(adapter, media, answer, data):
    whole = len(answer) - len(b"\n\n")
    reader = meter(adapter, media, max_output=50)
    cut = data.draw(st.integers(0, whole))
    reader.feed(answer[:cut], last=data.draw(st.booleans()))
    usage = reader.usage
    assert usage.estimated
    assert usage.input in (9, 34) or "json" in media
    assert usage.output <= 50


@pytest.mark.parametrize("seen", [0, 1, 60], ids=["nothing", "a byte", "half"])
def test_of_a_whole_answer_that_the_client_did_not_wait_for_all_was_generated_and_nothing_is_given_back(seen):
    reader = meter(OPENAI, max_output=50, choices=2)
    reader.feed(CHAT[:seen], last=False)
    assert reader.usage == Usage(100, 100, estimated=True)


def test_a_cut_stream_has_used_all_that_it_may_generate_for_nobody_sees_what_the_model_thought():
    cut = meter(OPENAI, "text/event-stream", max_output=50, choices=2)
    cut.feed(b'data: {"choices":[{"index":0,"delta":{"content":"ok"}}]}\n\n', last=True)
    assert cut.usage == Usage(34, 100, estimated=True)


def test_a_cut_message_keeps_the_input_that_was_told():
    reader = meter(ANTHROPIC, "text/event-stream", max_output=50)
    reader.feed(MESSAGE_STREAM.partition(b'data: {"type":"content_block_stop"')[0], last=True)
    assert reader.usage == Usage(9, 50, estimated=True)


@pytest.mark.parametrize(
    "usage",
    [
        pytest.param("null", id="none"),
        pytest.param("[]", id="a list"),
        pytest.param('{"prompt_tokens":9}', id="half of it"),
        pytest.param('{"prompt_tokens":true,"completion_tokens":1}', id="a truth value"),
        pytest.param('{"prompt_tokens":-9,"completion_tokens":1}', id="below zero"),
        pytest.param('{"prompt_tokens":9.0,"completion_tokens":1}', id="a fraction"),
        pytest.param('{"prompt_tokens":9,"completion_tokens":9999999999999}', id="absurd"),
        pytest.param('{"prompt_tokens":9,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":10}}', id="cached > all"),
        pytest.param('{"prompt_tokens":9,"completion_tokens":1,"prompt_tokens_details":7}', id="odd details"),
    ],
)
@pytest.mark.parametrize("stream", [pytest.param(False, id="whole"), pytest.param(True, id="as a stream")])
def test_usage_that_cannot_be_is_not_believed(usage, stream):
    text = '{"choices":[{"delta":{"content":"abcdef"}}],"usage":' + usage + "}"
    reader = meter(OPENAI, "text/event-stream" if stream else "application/json")
    reader.feed((f"data: {text}\n\ndata: [DONE]\n\n" if stream else text).encode(), last=True)
    assert reader.usage.estimated
    assert reader.usage.input == 34


@pytest.mark.parametrize("adapter", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
@pytest.mark.parametrize("media", ["application/json", "text/event-stream"])
@given(value=VALUES)
def test_an_answer_of_any_shape_is_passed_on_and_never_a_fault(adapter, media, value):
    text = json.dumps(value).encode()
    answer = text if media.endswith("json") else b"data: " + text + b"\n\ndata: not json\n\n"
    reader = meter(adapter, media)
    assert reader.feed(answer, last=True) == answer
    assert reader.usage.estimated
    assert reader.completion_hash.startswith("sha256:")


def test_an_answer_too_long_to_be_read_is_passed_on_and_estimated(monkeypatch):
    monkeypatch.setattr(models, "MAX_READ", 30)
    reader = meter(OPENAI, max_output=50)
    assert b"".join(reader.feed(CHAT[start : start + 20], last=False) for start in range(0, len(CHAT), 20)) == CHAT
    assert reader.usage == Usage(100, 50, estimated=True)


def test_an_event_too_long_to_be_read_is_passed_on_and_estimated(monkeypatch):
    monkeypatch.setattr(sse, "MAX_EVENT", 90)
    reader = meter(OPENAI, "text/event-stream", max_output=50)
    endless = b"data: " + b"x" * 100
    assert reader.feed(CHAT_STREAM[:60], last=False) + reader.feed(endless, last=False) == CHAT_STREAM[:60] + endless
    assert reader.feed(CHAT_STREAM, last=True) == CHAT_STREAM
    assert reader.usage == Usage(34, 50, estimated=True)


def test_a_stream_of_more_text_than_is_kept_still_tells_its_usage(monkeypatch):
    monkeypatch.setattr(models, "MAX_READ", 80)
    reader = meter(OPENAI, "text/event-stream")
    reader.feed(CHAT_STREAM, last=True)
    assert reader.usage == Usage(9, 6)
    assert reader.completion_hash == models._hash(b"A dupli")


# Denials.


@pytest.mark.parametrize("adapter", [OPENAI, ANTHROPIC], ids=["openai", "anthropic"])
@pytest.mark.parametrize(
    ("code", "retry"),
    [
        (Code.PARAMS_INVALID, False),
        (Code.STEPS_EXHAUSTED, False),
        (Code.BUDGET_EXHAUSTED, False),
        (Code.RATE_LIMITED, True),
        (Code.CONCURRENCY_LIMITED, True),
        (Code.LEDGER_UNAVAILABLE, True),
    ],
)
def test_a_denial_holds_the_whole_problem_and_says_whether_to_try_again(adapter, code, retry):
    about = problem("d1", "bot", "gpt", "any", Refusal(code, "not now"))
    reply = adapter.denial(about, Decision(Verdict.DENY, code, "not now"), None)
    assert reply.status == about["status"]
    error = json.loads(reply.body)["error"]
    assert {**about, "type": error["type"]}.items() <= error.items()
    assert error["message"] == f"not now ({code}, decision d1)"
    headers = dict(reply.headers)
    assert (headers["content-type"], headers["x-broker-decision-id"]) == ("application/json", "d1")
    assert headers.get("x-should-retry") == (None if retry else "false")
