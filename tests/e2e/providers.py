"""Model providers on loopback that answer in the wire formats of OpenAI and Anthropic, whole or as a stream.

A stream stops after its first event until `released` is set, by who received that event.
"""

import json
import threading
from http import HTTPStatus
from typing import Any

import anyio.to_thread
from e2e.serving import Served

PATIENCE_S = 10
ANSWER = ["It is ", "a duplicate ", "charge."]
WHOLE = "".join(ANSWER)
VECTOR = [0.25, -0.5]


class Provider(Served):
    """Answers `POST path` by `documents[path]`; to `stream: true` by `streams[path]`, a list of (event name, data).

    Of the data, `counted` is only sent to who asks for it by `stream_options`.
    """

    def __init__(
        self,
        documents: dict[str, Any],
        streams: dict[str, list[tuple[str, Any]]],
        certificate: Any,
        counted: Any = None,
        **at: Any,
    ) -> None:
        self._counted = counted
        self.released = threading.Event()
        self.status = 200
        self._documents, self._streams = documents, streams
        super().__init__(self._answer, certificate, **at)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        asked = json.loads((await receive())["body"])
        media = b"text/event-stream" if asked.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", media)]})
        if self.status != HTTPStatus.OK:
            await send({"type": "http.response.body", "body": b'{"error": {"message": "overloaded"}}'})
        elif asked.get("stream"):
            counts = (asked.get("stream_options") or {}).get("include_usage")
            events = self._streams[scope["path"]]
            await self._stream([event for event in events if counts or event[1] is not self._counted], send)
        else:
            await send({"type": "http.response.body", "body": json.dumps(self._documents[scope["path"]]).encode()})

    async def _stream(self, events: list[tuple[str, Any]], send: Any) -> None:
        for number, event in enumerate(events):
            await send({"type": "http.response.body", "body": _event(*event), "more_body": True})
            if number == 0 and not await anyio.to_thread.run_sync(self.released.wait, PATIENCE_S, abandon_on_cancel=True):
                return  # nobody received the first event: the stream breaks off
        await send({"type": "http.response.body", "body": b""})


def _event(name: str, data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def openai(certificate: Any, **at: Any) -> Provider:
    """Chat completions, responses and embeddings."""
    common = {"id": "chatcmpl-1", "created": 1760000000, "model": "gpt-5-mini"}
    message = {"role": "assistant", "content": WHOLE}
    usage = {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    completion = {**common, "object": "chat.completion", "choices": [choice], "usage": usage}
    deltas = [{"role": "assistant", "content": ANSWER[0]}, *({"content": part} for part in ANSWER[1:])]
    chunk = {**common, "object": "chat.completion.chunk"}
    chunks = [{**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    last = {**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    spent = {**chunk, "choices": [], "usage": usage}

    part = {"type": "output_text", "text": WHOLE, "annotations": []}
    output = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]}
    fixed = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    response = {"id": "resp_1", "object": "response", "created_at": 1760000000, "model": "gpt-5-mini", **fixed}
    details = {"input_tokens_details": {"cached_tokens": 4}, "output_tokens_details": {"reasoning_tokens": 0}}
    counted = {"input_tokens": 9, "output_tokens": 6, "total_tokens": 15, **details}
    done = {**response, "status": "completed", "output": [output], "usage": counted}
    place = {"type": "response.output_text.delta", "item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": []}
    events = [
        {"type": "response.created", "response": {**response, "status": "in_progress", "output": []}},
        *({**place, "delta": each} for each in ANSWER),
        {"type": "response.completed", "response": done},
    ]
    vector = {"object": "embedding", "index": 0, "embedding": VECTOR}
    embeddings = {"object": "list", "data": [vector], "model": "text-embedding-3-small"}
    embedded = {**embeddings, "usage": {"prompt_tokens": 4, "total_tokens": 4}}
    return Provider(
        {"/v1/chat/completions": completion, "/v1/responses": done, "/v1/embeddings": embedded},
        {
            "/v1/chat/completions": [*(("", each) for each in [*chunks, last, spent]), ("", "[DONE]")],
            "/v1/responses": [(each["type"], {**each, "sequence_number": n}) for n, each in enumerate(events)],
        },
        certificate,
        spent,
        **at,
    )


def anthropic(certificate: Any, **at: Any) -> Provider:
    """Messages."""
    common = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-haiku-4-5", "stop_sequence": None}
    usage = {"input_tokens": 9, "output_tokens": 6}
    message = {**common, "content": [{"type": "text", "text": WHOLE}], "stop_reason": "end_turn", "usage": usage}
    events = [
        {"type": "message_start", "message": {**common, "content": [], "stop_reason": None, "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": each}} for each in ANSWER),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 6}},
        {"type": "message_stop"},
    ]
    return Provider(
        {"/v1/messages": message}, {"/v1/messages": [(str(each["type"]), each) for each in events]}, certificate, **at
    )
