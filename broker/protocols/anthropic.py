"""Anthropic's API: messages.

Of a stream the usage is in `message_start` and, cumulative, in `message_delta`. Its `input_tokens` leave out what was read
from the cache or written to it; ours hold both.
"""

from collections.abc import Mapping
from typing import Any

import orjson

from broker.policy.types import Json
from broker.protocols.models import Answer, Body, Dialect, words

_MESSAGES = words(
    "cache_control max_tokens messages metadata model output_config service_tier stop_sequences stream system temperature "
    "thinking tool_choice tools top_k top_p"
)
_INPUT = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


class Anthropic(Dialect):
    """The adapter for `protocol: anthropic`. Holds no state."""

    name = "anthropic"
    bodies: Mapping[str, Body] = {
        "messages": Body(_MESSAGES, ("system", "messages", "tools", "output_config"), ("system", "messages", "tools"))
    }
    inert = words("custom text image document search_result thinking redacted_thinking tool_use tool_result base64 content")
    opaque = words("input input_schema input_examples cache_control citations")
    renamed: Mapping[str, str] = {"mcp_servers": "mcp", "file": "stored", "thread": "stored"}
    untyped_tools = True
    errors: Mapping[int, str] = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "api_error",
    }

    def error(self, error: dict[str, Json]) -> Json:
        """The decision's ID is the request's too."""
        return {"type": "error", "error": error, "request_id": error["decision_id"]}

    def whole(self, document: Any, seen: Answer) -> None:
        """A message."""
        _told(document["usage"], seen)
        for index, block in enumerate(document["content"]):
            seen.add(block.get("text") or block.get("thinking"), index, 0)
            if "input" in block:
                seen.add(orjson.dumps(block["input"], option=orjson.OPT_SORT_KEYS).decode(), index, 1)

    def event(self, data: bytes, seen: Answer) -> None:
        """An event of a message."""
        event = orjson.loads(data)
        kind, index = event["type"], event.get("index", 0)
        if kind == "message_start":
            _told(event["message"]["usage"], seen)
        elif kind == "message_delta":
            _told(event["usage"], seen)
        elif kind == "content_block_start" and "input" in event["content_block"]:
            seen.texts[index, 1] = bytearray()
        elif kind == "content_block_delta":
            delta = event["delta"]
            seen.add(delta.get("text") or delta.get("thinking"), index, 0)
            seen.add(delta.get("partial_json"), index, 1)
        elif kind == "content_block_stop" and (index, 1) in seen.texts:
            # As a whole answer has it: the pieces are the model's own spelling of the same input.
            made = orjson.loads(seen.texts[index, 1] or b"{}")
            seen.texts[index, 1] = bytearray(orjson.dumps(made, option=orjson.OPT_SORT_KEYS))
        seen.final |= kind == "message_stop"


def _told(usage: dict[str, Any], seen: Answer) -> None:
    seen.raw |= {field: number for field, number in usage.items() if number is not None}
    plain, cached, written = (seen.raw.get(field, 0) for field in _INPUT)
    seen.tell(plain + cached + written, seen.raw["output_tokens"], cached, written)
