"""Strict YAML: bytes in, plain JSON-like data with positions out.

Laws: a file means one thing in YAML 1.1, in YAML 1.2 and to the person who reviews it, or it is refused. Data is built from the
parser's events: tags are never constructed, aliases never expanded, and nesting is bounded before anything recurses.
Problems are collected; only broken syntax ends a file early. Bad input is a finding, never an exception.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from broker.manifest.findings import Finding
from broker.policy.types import Json
from broker.redaction import REMEDY, redacted

MAX_BYTES = 1_048_576
"""The largest file, in bytes: a thousand times a typical manifest, and little enough to parse in a second."""
MAX_DEPTH = 64
"""The deepest nesting: four times what a deep parameter schema needs, and far below any recursion limit."""
_TOO_DEEP = f"nesting is deeper than {MAX_DEPTH} levels"
_MAX_DIGITS = 18  # beyond that, JSON readers disagree on an integer's value (RFC 8259 section 6)

Pointer = tuple[str | int, ...]
"""A place in a document: keys and indices from its root."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_PLAIN: Mapping[str, Json] = {"": None, "~": None, "null": None, "true": True, "false": False}
RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""What some YAML reader takes for a boolean or nothing, in any case."""
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?\Z")
# What YAML 1.1 or 1.2 would read as a number, besides the plain decimals above: signs, octal, hexadecimal, binary, underscores,
# exponents, bare dots, base 60 (1:30), infinities and not-a-number.
_NUMBER_LIKE = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?(?:e[-+]?[0-9]+)?|\.[0-9][0-9_]*(?:e[-+]?[0-9]+)?|0x[0-9a-f_]+|0o[0-7_]+|0b[01_]+"
    r"|[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?|\.inf|\.nan)\Z",
    re.IGNORECASE,
)
# YAML's own set (1.2 section 5.1) without what reviewers can't see: NEL and the Unicode line breaks, which YAML 1.1 and 1.2 read
# differently, byte-order marks, and the bidirectional controls.
_FORBIDDEN = re.compile("[^\n\r\x20-\x7e\xa0-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]+")


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document: its data, and where each value and each key stands (line and column from 1)."""

    data: dict[str, Json]
    start: tuple[int, int]
    values: Mapping[Pointer, tuple[int, int]]
    keys: Mapping[Pointer, tuple[int, int]]

    def at(self, pointer: Pointer, *, key: bool = False) -> tuple[int, int]:
        """Where a value stands, or the key that names it; for a place that is not there, the nearest one around it."""
        first, second = (self.keys, self.values) if key else (self.values, self.keys)
        for end in range(len(pointer), 0, -1):
            place = first.get(pointer[:end]) or second.get(pointer[:end])
            if place:
                return place
            first = second = self.keys  # what is missing is missing in the mapping that this key names
        return self.start


def read(file: str, content: bytes) -> tuple[tuple[Document, ...], tuple[Finding, ...]]:
    """The documents of one file (those that are mappings), and everything that is wrong with its YAML."""
    reader = _Reader(file)
    if (text := reader.decoded(content)) is None:
        return (), tuple(reader.findings)
    documents = tuple(reader.documents(text))
    if not reader.findings and not documents:
        reader.note((1, 1), "yaml_empty", "the file holds no document", "begin it with apiVersion: broker/v1, or delete it")
    return documents, tuple(reader.findings)


class _Reader:
    """Turns one file's events into documents and notes what is wrong on the way."""

    def __init__(self, file: str) -> None:
        self.findings: list[Finding] = []
        self._file = file

    def note(self, place: tuple[int, int], code: str, message: str, advice: str) -> None:
        self.findings.append(Finding(self._file, *place, code, message, advice))

    def decoded(self, content: bytes) -> str | None:
        if len(content) > MAX_BYTES:
            self.note((1, 1), "yaml_size", f"the file is larger than {MAX_BYTES} bytes", "split it into several files")
            return None
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            lines = content[: error.start].decode().split("\n")
            self.note((len(lines), len(lines[-1]) + 1), "yaml_encoding", "this is not UTF-8", "save the file as UTF-8")
            return None
        if text.startswith("\ufeff"):
            self.note((1, 1), "yaml_encoding", "the file begins with a byte-order mark", "save the file as UTF-8 without BOM")
            return None
        for number, line in enumerate(text.split("\n"), 1):
            for found in _FORBIDDEN.finditer(line):
                code = "yaml_tab" if found[0][0] == "\t" else "yaml_character"
                message = f"the character U+{ord(found[0][0]):04X} is invisible or not allowed in YAML"
                advice = "delete it, or write it as an escape in double quotes; indent with spaces"
                self.note((number, found.start() + 1), code, message, advice)
        return None if self.findings else text

    def documents(self, text: str) -> Iterator[Document]:
        self._loader = _Loader(text)
        try:
            while not self._loader.check_event(yaml.StreamEndEvent):
                if isinstance(self._loader.get_event(), yaml.DocumentStartEvent):
                    yield from self._document()
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            problem = getattr(error, "problem", None) or "this can't be read"
            code = "yaml_depth" if problem == _TOO_DEEP else "yaml_syntax"
            self.note(place, code, f"this can't be read on: {problem}", "correct the indentation, brackets or quotes here")
        finally:
            self._loader.dispose()

    def _document(self) -> Iterator[Document]:
        self._values: dict[Pointer, tuple[int, int]] = {}
        self._keys: dict[Pointer, tuple[int, int]] = {}
        event = self._loader.get_event()
        start = _start(event)
        data = self._node(event, ())
        if isinstance(data, dict):
            yield Document(data, start, self._values, self._keys)
        elif data is None:
            self.note(start, "yaml_empty", "the document is empty", "begin it with apiVersion: broker/v1, or delete its ---")
        else:
            self.note(start, "yaml_not_mapping", "the document is not a mapping", "begin it with apiVersion: broker/v1")

    def _node(self, event: Any, pointer: Pointer) -> Json:
        place = self._values[pointer] = _start(event)
        if len(pointer) > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            self.note(place, "yaml_alias", f"*{event.anchor} is an alias", "write the value out: a review must see what applies")
            return None
        if event.anchor is not None:
            self.note(place, "yaml_anchor", f"&{event.anchor} is an anchor", "take it out, and write the value where it is used")
        if event.tag is not None:
            self.note(place, "yaml_tag", "tags such as !!str have no meaning here", "take the tag out; quote a string instead")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, place)
        return self._sequence(pointer) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(pointer)

    def _sequence(self, pointer: Pointer) -> Json:
        items: list[Json] = []
        while not isinstance(event := self._loader.get_event(), yaml.SequenceEndEvent):
            items.append(self._node(event, (*pointer, len(items))))
        return items

    def _mapping(self, pointer: Pointer) -> Json:
        data: dict[str, Json] = {}
        while not isinstance(event := self._loader.get_event(), yaml.MappingEndEvent):
            place = _start(event)
            key = self._key(event, place, pointer)
            if key in data:
                self.note(place, "yaml_duplicate_key", f"the key {key!r} stands here twice", "keep one of the two")
            here = (*pointer, key)
            self._keys[here] = place
            value = self._node(self._loader.get_event(), here)
            data.setdefault(key, value)
        return data

    def _key(self, event: Any, place: tuple[int, int], pointer: Pointer) -> str:
        before = len(self.findings)
        key = self._node(event, (*pointer, ""))
        if event.__class__ is yaml.ScalarEvent and event.implicit[0] and event.value == "<<":
            self.note(place, "yaml_merge", "<< is a merge key", "write the fields out: a review must see what applies")
        if isinstance(key, str):
            return key
        if len(self.findings) == before:
            self.note(place, "yaml_key", "this key is not a string", "put it in quotes")
        return f"?{place}"

    def _scalar(self, event: Any, place: tuple[int, int]) -> Json:
        text: str = event.value
        if redacted(text) != text:
            self.note(place, "secret_literal", "this holds a credential of a well-known form", REMEDY)
        if not event.implicit[0]:  # quoted, a block, or tagged
            return text
        if text in _PLAIN:
            return _PLAIN[text]
        if text.lower() in RESERVED:
            advice = 'write true, false or null; if it is a string, put it in quotes: "…"'
            self.note(place, "yaml_boolean", f"YAML readers disagree on whether {text} is a string", advice)
        elif text[0] in "-+.0123456789":
            return self._number(text, place)
        return text

    def _number(self, text: str, place: tuple[int, int]) -> Json:
        if (found := _NUMBER.match(text)) and len(text.lstrip("-")) <= _MAX_DIGITS:
            return float(text) if found[1] else int(text)
        if _NUMBER_LIKE.match(text):
            advice = "write a plain decimal number; if it is a string, put it in quotes"
            self.note(place, "yaml_number", f"YAML readers disagree on the value of {text[:40]}", advice)
        return text


def _start(event: Any) -> tuple[int, int]:
    mark = event.start_mark
    return mark.line + 1, mark.column + 1
