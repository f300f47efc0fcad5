"""MCP tool lists, cut down to what an agent holds, as they stream by.

Laws: a message is passed byte for byte or rewritten whole; what might hold a list and can't be read is blocked. A list that was
cut for one agent is private to it, whatever the server says of caching. Hiding a tool is a courtesy to the model: what denies its
call is the decision.
"""

import orjson

from broker.policy.types import Json, Refusal
from broker.protocols import strict
from broker.protocols.base import ResponseBlocked, ResponseFilter
from broker.protocols.sse import MAX_EVENT, Events, data_of, with_data

_CAN_HOLD_NO_LIST = frozenset({"text/plain", "text/html"})
"""Error pages: no MCP client reads a list from them."""


def list_filter(visible: frozenset[str], content_type: str) -> ResponseFilter | None:
    """The filter for an answer of this type; `visible` holds MCP tool names. None for what can hold no list."""
    media = content_type.partition(";")[0].strip().lower()
    if media == "text/event-stream":
        return _Stream(visible)
    if media == "application/json":
        return _Document(visible)
    return None if media in _CAN_HOLD_NO_LIST else _Nothing()


class _Document:
    def __init__(self, visible: frozenset[str]) -> None:
        self._visible = visible
        self._held = bytearray()

    def feed(self, chunk: bytes, *, last: bool) -> bytes:
        self._held += chunk
        if len(self._held) > MAX_EVENT:
            raise ResponseBlocked(
                f"the answer is longer than {MAX_EVENT} bytes, so its tools can't be read before it is passed on"
            )
        return _shown(bytes(self._held), self._visible) if last and self._held else b""


class _Stream:
    def __init__(self, visible: frozenset[str]) -> None:
        self._visible = visible
        self._events = Events()

    def feed(self, chunk: bytes, *, last: bool) -> bytes:  # noqa: ARG002 - an event that the end cuts short is none
        return b"".join(self._pass(event) for event in self._events.feed(chunk))

    def _pass(self, event: bytes) -> bytes:
        try:
            event.decode("utf-8")
        except UnicodeDecodeError:
            raise ResponseBlocked("an event stream that is not UTF-8 (compressed, perhaps) can't be read") from None
        data = data_of(event)
        # Most events are notifications: only one with this word (or an escape that may spell it) can carry a list.
        if b"tools" not in data and rb"\u" not in data:
            return event
        shown = _shown(data, self._visible)
        return event if shown == data else with_data(event, shown)


class _Nothing:
    def feed(self, chunk: bytes, *, last: bool) -> bytes:  # noqa: ARG002
        if chunk:
            raise ResponseBlocked("the answer to tools/list is neither JSON nor an event stream, so its tools can't be read")
        return b""


def _shown(data: bytes, visible: frozenset[str]) -> bytes:
    message = strict.json_value(data)
    if isinstance(message, Refusal) or not isinstance(message, dict):
        raise ResponseBlocked("an answer that may hold the tool list is not one JSON-RPC message")
    result = message.get("result")
    tools = result.get("tools") if isinstance(result, dict) else None
    if not isinstance(result, dict) or not isinstance(tools, list):
        return data
    cut: dict[str, Json] = {**result, "tools": [tool for tool in tools if _name(tool) in visible]}
    if "cacheScope" in cut:
        cut["cacheScope"] = "private"
    return data if cut == result else orjson.dumps({**message, "result": cut})


def _name(tool: Json) -> str:
    name = tool.get("name") if isinstance(tool, dict) else None
    return name if isinstance(name, str) else ""
