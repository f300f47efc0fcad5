"""OpenAI's API, and the many hosts that speak it: chat completions, responses, embeddings.

Of a stream the usage is in the last chunk (chat, if asked for by `stream_options`) or in the event that ends it (responses).
"""

from collections.abc import Mapping
from typing import Any

import orjson

from broker.policy.types import Json
from broker.protocols.models import Answer, Body, Dialect, words

_COMMON = words(
    "max_output_tokens metadata model parallel_tool_calls prompt_cache_key prompt_cache_options prompt_cache_retention "
    "safety_identifier service_tier store stream stream_options temperature tool_choice tools top_logprobs top_p user"
)
_CHAT = _COMMON - {"max_output_tokens"} | words(
    "frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens messages modalities n "
    "prediction presence_penalty reasoning_effort response_format seed stop verbosity"
)
_RESPONSES = _COMMON | words("include input instructions max_tool_calls reasoning text truncation")
_EMBEDDINGS = words("dimensions encoding_format input model user")
_ENDS = words("response.completed response.incomplete response.failed")


class OpenAI(Dialect):
    """The adapter for `protocol: openai`. Holds no state."""

    name = "openai"
    bodies: Mapping[str, Body] = {
        "chat.completions": Body(
            _CHAT, ("messages", "tools", "functions", "response_format", "prediction"), ("messages", "tools", "prediction")
        ),
        "responses": Body(_RESPONSES, ("input", "instructions", "tools", "text"), ("input", "tools")),
        "embeddings": Body(_EMBEDDINGS, ("input",), ("input",)),
    }
    inert = words(
        "function custom message function_call function_call_output custom_tool_call custom_tool_call_output reasoning text "
        "input_text output_text reasoning_text summary_text refusal content image_url input_image input_audio input_file file "
        "video_url audio_url"
    )
    opaque = words("parameters output_schema format arguments annotations logprobs caller cache_control function_call")
    renamed: Mapping[str, str] = {
        "web_search_options": "web_search",
        "previous_response_id": "stored",
        "conversation": "stored",
        "item_reference": "stored",
    }
    untyped_tools = False
    errors: Mapping[int, str] = {400: "invalid_request_error", 429: "rate_limit_error", 503: "service_unavailable_error"}

    def error(self, error: dict[str, Json]) -> Json:
        """`param` is the first violation's pointer."""
        violations: Any = error["violations"]
        return {"error": {**error, "param": violations[0]["pointer"] if violations else None}}

    def whole(self, document: Any, seen: Answer) -> None:
        """A completion, a response, or embeddings."""
        if "output" in document:
            _told(document["usage"], None, seen)
            for index, item in enumerate(document["output"]):
                _item(item, index, seen)
        else:
            _chunk(document, seen)

    def event(self, data: bytes, seen: Answer) -> None:
        """A chunk of a completion, or an event of a response."""
        if data.strip() == b"[DONE]":
            seen.final = True
            return
        event = orjson.loads(data)
        kind = event.get("type", "")
        if kind in _ENDS:
            seen.final = True
            _told(event["response"]["usage"], None, seen)
        elif kind.endswith(".delta") and isinstance(event["delta"], str):
            part = event.get("summary_index", event.get("content_index", 0))
            seen.add(event["delta"], event["output_index"], "summary_index" not in event, part)
        elif "choices" in event:
            _chunk(event, seen)


def _told(usage: Any, otherwise: Json, seen: Answer) -> None:
    # Responses have other words for it than completions.
    read, made = ("input", "output") if "input_tokens" in usage else ("prompt", "completion")
    details = usage.get(f"{read}_tokens_details") or {}
    cached, written = details.get("cached_tokens"), details.get("cache_write_tokens")
    seen.tell(usage[f"{read}_tokens"], usage.get(f"{made}_tokens", otherwise), cached, written)


def _chunk(document: Any, seen: Answer) -> None:
    """A completion or a chunk of one: they differ in the name of the message."""
    if document.get("usage"):
        _told(document["usage"], None if "choices" in document else 0, seen)  # embeddings have no output
    for choice in document.get("choices", ()):
        said, index = choice.get("delta") or choice.get("message") or {}, choice.get("index", 0)
        for place, field in enumerate(("reasoning_content", "content", "refusal")):
            seen.add(said.get(field), index, place)
        for number, call in enumerate(said.get("tool_calls") or ()):
            made = call.get("function") or call.get("custom") or {}
            seen.add(made.get("arguments") or made.get("input"), index, 3, call.get("index", number))


def _item(item: Any, index: int, seen: Answer) -> None:
    for number, part in enumerate(item.get("summary") or ()):
        seen.add(part.get("text"), index, 0, number)
    for number, part in enumerate(item.get("content") or ()):
        seen.add(part.get("text") or part.get("refusal"), index, 1, number)
    seen.add(item.get("arguments") or item.get("input"), index, 1, 0)
