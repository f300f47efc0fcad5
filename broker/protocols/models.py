"""Model providers: REST, and on top of it what is particular to a call of a model.

Laws:
1. A POST whose path ends in one of the provider's APIs calls a model, however the catalog spells the operation. Its body is a
   JSON object.
2. Whatever the provider would run or fetch by itself has a word, and an agent needs the manifest's leave for it. What this module
   does not know counts as such: a member of the body, a type of tool, of message or of content. What the provider would take from
   its own store (files, earlier answers) has the word `stored`: nobody here sees what it is, nor how long.
3. Of what a call may use, the upper bound counts: a token per byte of the body, `IMAGE` for an image in it, and `OWN`.
4. An answer passes at once and untouched. It is read on the side, and where that fails its usage is estimated: never a fault.

Of prompt and answer nothing is kept but hashes.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from broker.policy.match import split_path
from broker.policy.providers import PROVIDERS, api_at
from broker.policy.schema import json_pointer
from broker.policy.snapshot import Grant, Operation, Tool
from broker.policy.types import Code, Decision, Json, ModelCall, Refusal, Request, ToolCall, Usage
from broker.protocols import strict
from broker.protocols.base import Meter, Reply
from broker.protocols.problem import STATUS, answer
from broker.protocols.rest import Rest
from broker.protocols.sse import Events, data_of
from broker.protocols.strict import Unreadable, must

IMAGE = 5000
"""Tokens of an image, at most; the length of its base64 says little."""
OWN = 1000
"""Tokens that a provider adds by itself, at most: what it tells the model of its tools."""
MAX_READ = 16 * 1024 * 1024
"""Bytes of an answer that are kept to be read."""
BYTES_A_TOKEN = 3
"""Of a text whose tokens nobody counted. English has over four; other languages and code have fewer."""
UNNAMED = "(unnamed)"
"""The word of what has no proper name; no manifest can write it."""

_MOST_WORDS = 32
_MOST_NODES = 50_000  # a fifth of a second
_ABSURD = 2**40  # tokens; no answer used that many, and what they cost is still a number of 64 bits
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
# In any case: hosts written in Go read a key in whatever case it comes.
_FETCHED = re.compile(r"(?:.*_)?ur[il]|image|video|audio", re.DOTALL | re.IGNORECASE)
_MISREAD = (ValueError, TypeError, LookupError, AttributeError)
_STORED = ("file_id", "file_ids")
_RETRIABLE = frozenset({Code.RATE_LIMITED, Code.CONCURRENCY_LIMITED, *(code for code in STATUS if STATUS[code] == 503)})  # noqa: PLR2004


def words(text: str) -> frozenset[str]:
    """The words in a text."""
    return frozenset(text.split())


class Node(NamedTuple):
    """A value in the body, and the way to it."""

    parent: "Node | None"
    part: str | int
    value: Any

    @property
    def pointer(self) -> str:
        """RFC 6901, from the body; a part is shown up to 64 characters, for it may be as long as the agent likes."""
        return (self.parent.pointer if self.parent else "/body") + json_pointer(str(self.part)[:64])


@dataclass(frozen=True, slots=True)
class Body:
    """What is known of one API's body: the members that run and fetch nothing, and those of them that hold the prompt."""

    members: frozenset[str]
    prompt: tuple[str, ...]
    read: tuple[str, ...]
    """The members that are looked through for what the provider would run or fetch."""


class Answer:
    """What was read of an answer so far, its texts by place. `final` says that no more usage will come after what was `told`."""

    def __init__(self) -> None:
        self.told: Usage | None = None
        self.raw: dict[str, Any] = {}  # as the provider spells it, where it comes in pieces
        self.final = False
        self.texts: dict[tuple[int, ...], bytearray] = {}
        self._size = 0

    def add(self, text: Json, *place: int) -> None:
        """More text that was generated at this place. Raises `ValueError` when it is too much to keep."""
        if not text:
            return
        data = text.encode() if isinstance(text, str) else orjson.dumps(text, option=orjson.OPT_SORT_KEYS)
        self._size += len(data) + 64 * (place not in self.texts)
        if self._size > MAX_READ:
            raise ValueError("the text is too long to keep")
        self.texts.setdefault(place, bytearray()).extend(data)

    def tell(self, total: Json, output: Json, cached: Json, written: Json) -> None:
        """What the provider says that it used; `total` input holds the rest of it. What can't be is not believed."""
        numbers = [total, output, cached or 0, written or 0]
        known = [number for number in numbers if type(number) is int and 0 <= number <= _ABSURD]
        if len(known) == len(numbers) and known[2] + known[3] <= known[0]:
            self.told = Usage(known[0], known[1], known[2], known[3])

    @property
    def text(self) -> bytes:
        """All that was generated, in the order of places, however the pieces came."""
        return b"".join(self.texts[place] for place in sorted(self.texts))


class Dialect(Rest, ABC):
    """An adapter for one provider's APIs. Holds no state."""

    bodies: Mapping[str, Body]
    inert: frozenset[str]
    """The types of tools, messages and content that run and fetch nothing."""
    opaque: frozenset[str]
    """The keys under which stands what is data to the provider: schemas, a tool's arguments, citations."""
    renamed: Mapping[str, str]
    """The words of members and types that have another than their own name."""
    untyped_tools: bool
    """Whether a tool without a type is the agent's own."""
    errors: Mapping[int, str]

    def recognise(self, tool: Tool, request: Request, body: bytes) -> ToolCall | Refusal:
        """The operation as REST recognises it; of a call of a model, what it asks for."""
        call = super().recognise(tool, request, body)
        if isinstance(call, Refusal) or call.operation is None:
            return call
        api = api_at(self.name, request.method, "/" + "/".join(split_path(request.path)))
        if api is None:
            return call
        try:
            asked = _object(request, call)
            return replace(call, model=self._model(api, tool.operations[call.operation], asked, len(body)))
        except Unreadable as error:
            return replace(error.refusal, operation=call.operation)

    def denial(self, problem: Mapping[str, Json], decision: Decision | Refusal, *_: object) -> Reply:
        """The provider's own error, with the problem's members in it: its clients raise what they raise for any refusal."""
        code = decision.code or Code.INTERNAL_FAULT
        status = STATUS[code]
        # OpenAI's client shows the message alone.
        message = f"{problem['detail']} ({problem['code']}, decision {problem['decision_id']})"
        error = {**problem, "type": self.errors.get(status, self.errors[400]), "message": message}
        shaped = answer(self.error(error), status, problem)
        final = () if code in _RETRIABLE else (("x-should-retry", "false"),)  # both official clients honour it
        return replace(shaped, headers=(*shaped.headers, *final))

    def response_filter(
        self,
        tool: Tool,  # noqa: ARG002 - the interface's
        grants: Mapping[str, Grant],  # noqa: ARG002
        call: ToolCall,
        content_type: str,
    ) -> Meter | None:
        """The meter of a call of a model. It reads successful answers; of an error there is nothing to read."""
        stream = content_type.partition(";")[0].strip().lower() == "text/event-stream"
        return _Metered(self, call.model, stream=stream) if call.model else None

    @abstractmethod
    def error(self, error: dict[str, Json]) -> Json:
        """The provider's error document around this error."""

    @abstractmethod
    def whole(self, document: Any, seen: Answer) -> None:
        """Read a whole answer. May raise what a document of another shape makes it raise."""

    @abstractmethod
    def event(self, data: bytes, seen: Answer) -> None:
        """Read the data of one event. May raise the same."""

    def _model(self, api: str, operation: Operation, body: dict[str, Any], size: int) -> ModelCall:
        name, stream, known = body.get("model"), body.get("stream"), self.bodies[api]
        if not isinstance(name, str):
            raise Unreadable(Code.PROTOCOL_VIOLATION, "model must be a string")
        must(stream is None or isinstance(stream, bool), "stream must be true or false")
        nodes = [*_nodes(body, known.read, self.opaque)]
        asks: dict[str, Node] = {}
        for node, word in (*self._members(body, known), *self._parts(nodes)):
            asks.setdefault(word, node)
        must(len(asks) <= _MOST_WORDS, "the body asks for too many things that the provider would run or fetch")
        prompt = {member: body[member] for member in known.prompt if member in body}
        outputs = PROVIDERS[self.name][api].outputs
        stated = [number for field in outputs if (number := _count(body, field, 0)) is not None]
        schema = operation.schemas.get("body")
        taken = [field for field in outputs if schema and field in schema.source.get("properties", {})]
        most, choices = max(stated, default=None) if outputs else 0, _count(body, "n", 1) or 1
        must((most or 1) * choices <= _ABSURD, "the body asks for more output than any record can hold")
        return ModelCall(
            name,
            input_tokens=size + (OWN if outputs else 0) + sum(IMAGE - len(image) for node in nodes for image in _images(node)),
            prompt_hash=_hash(orjson.dumps(prompt, option=orjson.OPT_SORT_KEYS)),
            max_output=most,
            output_field=(*taken, *outputs)[0] if most is None else "",
            choices=choices,
            stream=bool(stream),
            server_tools=tuple((node.pointer, word) for word, node in asks.items()),
        )

    def _members(self, body: dict[str, Any], known: Body) -> Iterator[tuple[Node, str]]:
        for member, value in body.items():
            # Another tier has another price than the platform's.
            unknown = member not in known.members or (member, value) == ("service_tier", "priority")
            if unknown and value is not None and (member, value) != ("background", False):
                yield Node(None, member, value), self._word(member)

    def _parts(self, nodes: list[Node]) -> Iterator[tuple[Node, str]]:
        for node in nodes:
            kind = node.value.get("type")
            if kind is None:
                if not self.untyped_tools and node.parent and node.parent.part == "tools":
                    yield node, UNNAMED
                if "id" in node.value and not node.value.keys() & {"role", "function", "custom"}:
                    yield node, "stored"  # an item of that ID: its type may be left out
            elif not isinstance(kind, str) or kind not in self.inert:
                yield Node(node, "type", kind), self._word(kind)
            for key, value in node.value.items():
                if _FETCHED.fullmatch(key) and any(
                    isinstance(each, str) and not each.startswith("data:")
                    for each in (value if isinstance(value, list) else [value])
                ):
                    yield Node(node, key, value), "url"
                if key.lower() in _STORED and value is not None:
                    yield Node(node, key, value), "stored"

    def _word(self, name: object) -> str:
        return self.renamed.get(name, name) if isinstance(name, str) and _WORD.fullmatch(name) else UNNAMED


def _object(request: Request, call: ToolCall) -> dict[str, Any]:
    media, body = strict.media_type(request.header("content-type") or ""), call.params.get("body")
    if not isinstance(body, dict) or not media.endswith(("/json", "+json")):
        raise Unreadable(Code.PROTOCOL_VIOLATION, "a call of a model has a JSON object as its body (application/json)")
    return body


def _nodes(body: dict[str, Any], members: tuple[str, ...], opaque: frozenset[str]) -> Iterator[Node]:
    """Every object below these members, the outer ones first, but what stands under an opaque key."""
    waiting = [Node(None, member, body[member]) for member in members if member in body]
    for node in waiting:  # which grows meanwhile: no recursion, so no depth that fails
        must(
            len(waiting) <= _MOST_NODES,
            f"the body has more than {_MOST_NODES} objects and lists; looking through them takes too long",
        )
        value = node.value
        if isinstance(value, dict):
            yield node
            waiting += [Node(node, key, each) for key, each in value.items() if key not in opaque and _holds(each)]
        elif isinstance(value, list):
            waiting += [Node(node, index, each) for index, each in enumerate(value) if _holds(each)]


def _holds(value: object) -> bool:
    return bool(value) and isinstance(value, dict | list)


def _images(node: Node) -> Iterator[str]:
    """The images that stand in an object as base64."""
    value = node.value
    for key, text in value.items():
        if isinstance(text, str) and text.startswith("data:image/") and _FETCHED.fullmatch(key):
            yield text
    within = node.parent.value if node.parent else None
    if isinstance(within, dict) and within.get("type") == "image" and value.get("type") == "base64":
        yield from filter(lambda data: isinstance(data, str), [value.get("data")])


def _count(body: Mapping[str, Any], field: str, least: int) -> int | None:
    value = body.get(field)
    must(value is None or (type(value) is int and value >= least), f"{field} must be a whole number of at least {least}")
    return value


def _hash(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def with_max_output(body: bytes, field: str, value: int) -> bytes:
    """The body of a model call that says no maximum, saying it in this field (`ModelCall.output_field`).

    All its bytes stay, unless it says null there, or has escapes that may spell the field: then it is written anew.
    """
    if field.encode() in body or rb"\u" in body:
        said = orjson.loads(body)
        if field in said:
            return orjson.dumps({**said, field: value})
    before, brace, after = body.partition(b"{")
    comma = b"" if after.lstrip().startswith(b"}") else b","
    return before + brace + orjson.dumps(field) + b":" + str(value).encode() + comma + after


class _Metered:
    def __init__(self, dialect: Dialect, call: ModelCall, *, stream: bool) -> None:
        self._dialect, self._call, self._seen = dialect, call, Answer()
        self._events = Events() if stream else None
        self._held = None if stream else bytearray()
        self._whole = self._unread = not stream
        self._size = 0

    def feed(self, chunk: bytes, *, last: bool) -> bytes:  # noqa: ARG002 - what has ended says so itself
        self._size += len(chunk)
        if self._events:
            self._read_events(self._events, chunk)
        elif self._held is not None:
            self._held += chunk
            if self._size > MAX_READ:
                self._held = None
        return chunk

    def _read_events(self, events: Events, chunk: bytes) -> None:
        try:
            whole = events.feed(chunk)
        except ValueError:  # one is too long to be read, and nobody looks for its end
            self._events, self._unread = None, True
            return
        for event in filter(None, map(data_of, whole)):
            with suppress(*_MISREAD):  # an event of another shape tells nothing; the next ones may
                self._dialect.event(event, self._seen)

    def _read(self) -> Answer:
        if self._held:
            with suppress(*_MISREAD):  # it isn't whole yet
                document = orjson.loads(self._held)
                self._held, self._unread, self._seen.final = None, False, True
                self._dialect.whole(document, self._seen)
        return self._seen

    @property
    def usage(self) -> Usage:
        seen, call = self._read(), self._call
        if seen.told and seen.final:
            return seen.told
        if self._unread and self._whole and call.max_output is not None:
            # A whole answer is sent when all of it was generated: what is missing of it was used as well.
            return Usage(call.input_tokens, call.max_output * call.choices, estimated=True)
        # An agent may leave just before the count, and it doesn't see all that was generated (reasoning): so the most it may be.
        told = seen.told or Usage(-(-call.input_tokens // BYTES_A_TOKEN))
        return replace(told, output=max(told.output, (call.max_output or 0) * call.choices), estimated=True)

    @property
    def completion_hash(self) -> str:
        return _hash(self._read().text)
