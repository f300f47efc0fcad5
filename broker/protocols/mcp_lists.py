"""MCP tool lists, cut down to what an agent holds, as they stream by.

Laws: a message is passed byte for byte or rewritten whole; what might hold a list and can't be read is blocked. A list that was
cut for one agent is private to it, whatever the server says of caching. Hiding a tool is a courtesy to the model: what denies its
call is the decision.
"""

from typing import Any

import orjson

from broker.protocols import strict
from broker.protocols.base import ResponseBlocked, ResponseFilter
from broker.protocols.sse import MAX_EVENT, Events, data_of, with_data


def list_filter(visible: tuple[str, ...], content_type: str) -> ResponseFilter | None:
    """The filter for an answer of this type; `visible` holds MCP tool names. None for what can hold no list."""
    media = content_type.partition(";")[0].strip().lower()
    if media in ("text/plain", "text/html"):  # error pages: no MCP client reads a list from them
        return None
    return _Filter(visible, stream=media == "text/event-stream")


class _Filter:
    def __init__(self, visible: tuple[str, ...], *, stream: bool) -> None:
        self._visible = visible
        self._events = Events() if stream else None
        self._held = bytearray()

    def feed(self, chunk: bytes, *, last: bool) -> bytes:
        if self._events:  # an event that the end cuts short is none
            return b"".join(map(self._event, self._events.feed(chunk)))
        self._held += chunk
        if len(self._held) > MAX_EVENT:
            raise ResponseBlocked(f"the answer is longer than {MAX_EVENT} bytes, so it can't be read before it is passed on")
        return _shown(bytes(self._held), self._visible) if last and self._held else b""

    def _event(self, event: bytes) -> bytes:
        data = data_of(event)
        # Most events are notifications: only one with this word (or an escape that may spell it) can carry a list.
        if b"tools" not in data and rb"\u" not in data:
            return event
        shown = _shown(data, self._visible)
        return event if shown == data else with_data(event, shown)


def _shown(data: bytes, visible: tuple[str, ...]) -> bytes:
    try:
        message: Any = strict.json_value(data)
    except strict.Unreadable:
        message = None
    if not isinstance(message, dict):
        raise ResponseBlocked("an answer that may hold the tool list is not one JSON-RPC message")
    result = message.get("result")
    if not isinstance(result, dict) or not isinstance(result.get("tools"), list):
        return data
    held = [tool for tool in result["tools"] if isinstance(tool, dict) and tool.get("name") in visible]
    cut = {**result, "tools": held} | ({"cacheScope": "private"} if "cacheScope" in result else {})
    return data if cut == result else orjson.dumps({**message, "result": cut})
