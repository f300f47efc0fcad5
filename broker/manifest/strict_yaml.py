"""Strict YAML: bytes in, plain JSON-like data with positions out.

Laws: a file means one thing in YAML 1.1, in YAML 1.2 and to the person who reviews it, or it is refused. Data is built from the
parser's events: tags are never constructed, aliases never expanded, and nesting is bounded before anything recurses.
Problems are collected; only broken syntax ends a file early. Bad input is a finding, never an exception.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import yaml

from broker.manifest.findings import Finding
from broker.policy.types import Json
from broker.redaction import REMEDY, may_hold, redacted

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


_Places = Mapping[Pointer, tuple[int, int]]


class Document:
    """One YAML document: its data, and where each value and each key stands (line and column from 1).

    Only findings ask where, so the file is read for that, once, when the first one does.
    """

    def __init__(self, data: dict[str, Json], start: tuple[int, int], file: "_File", number: int) -> None:
        self.data, self.start = data, start
        self._file, self._number = file, number

    @property
    def values(self) -> _Places:
        """Where each value stands."""
        return self._file.places[self._number][0]

    @property
    def keys(self) -> _Places:
        """Where each key stands."""
        return self._file.places[self._number][1]

    def at(self, pointer: Pointer, *, key: bool = False) -> tuple[int, int]:
        """Where a value stands, or the key that names it; for a place that is not there, the nearest one around it."""
        first, second = (self.keys, self.values) if key else (self.values, self.keys)
        for end in range(len(pointer), 0, -1):
            place = first.get(pointer[:end]) or second.get(pointer[:end])
            if place:
                return place
            first = second = self.keys  # what is missing is missing in the mapping that this key names
        return self.start


class _File:
    """What the documents of one file have in common: its text, and where in it the values and keys of each stand."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def places(self) -> list[tuple[_Places, _Places]]:
        return list(_Reader("").places(self._text))


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
        self._values: dict[Pointer, tuple[int, int]] = {}
        self._keys: dict[Pointer, tuple[int, int]] = {}

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
        for number, line in enumerate(text.split("\n") if _FORBIDDEN.search(text) else (), 1):
            for found in _FORBIDDEN.finditer(line):
                code = "yaml_tab" if found[0][0] == "\t" else "yaml_character"
                message = f"the character U+{ord(found[0][0]):04X} is invisible or not allowed in YAML"
                advice = "delete it, or write it as an escape in double quotes; indent with spaces"
                self.note((number, found.start() + 1), code, message, advice)
        return None if self.findings else text

    def documents(self, text: str) -> Iterator[Document]:
        self._loader, self._suspect = _Loader(text), may_hold(text)
        file, number = _File(text), 0
        try:
            while not self._loader.check_event(yaml.StreamEndEvent):
                if isinstance(self._loader.get_event(), yaml.DocumentStartEvent):
                    yield from self._document(file, number)
                    number += 1
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            problem = getattr(error, "problem", None) or "this can't be read"
            code = "yaml_depth" if problem == _TOO_DEEP else "yaml_syntax"
            self.note(place, code, f"this can't be read on: {problem}", "correct the indentation, brackets or quotes here")
        finally:
            self._loader.dispose()

    def places(self, text: str) -> Iterator[tuple[_Places, _Places]]:
        """Where the values and the keys stand of each document that could be read."""
        self._loader, self._suspect = _Loader(text), False
        with suppress(yaml.YAMLError):  # which was told, and ends the file
            while not self._loader.check_event(yaml.StreamEndEvent):
                if isinstance(self._loader.get_event(), yaml.DocumentStartEvent):
                    self._values, self._keys = {}, {}
                    self._node(self._loader.get_event(), 0, ())
                    yield self._values, self._keys
        self._loader.dispose()

    def _document(self, file: _File, number: int) -> Iterator[Document]:
        event = self._loader.get_event()
        start = _start(event)
        data = self._node(event, 0)
        if isinstance(data, dict):
            yield Document(data, start, file, number)
        elif data is None:
            self.note(start, "yaml_empty", "the document is empty", "begin it with apiVersion: broker/v1, or delete its ---")
        else:
            self.note(start, "yaml_not_mapping", "the document is not a mapping", "begin it with apiVersion: broker/v1")

    def _node(self, event: Any, depth: int, pointer: Pointer | None = None) -> Json:
        """The value that begins here; with a `pointer`, where it and all in it stand is noted."""
        if pointer is not None:
            self._values[pointer] = _start(event)
        if depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=_TOO_DEEP, problem_mark=event.start_mark)
        kind = event.__class__
        if kind is yaml.AliasEvent:
            advice = "write the value out: a review must see what applies"
            self.note(_start(event), "yaml_alias", f"*{event.anchor} is an alias", advice)
            return None
        if event.anchor is not None:
            advice = "take it out, and write the value where it is used"
            self.note(_start(event), "yaml_anchor", f"&{event.anchor} is an anchor", advice)
        if event.tag is not None:
            advice = "take the tag out; quote a string instead"
            self.note(_start(event), "yaml_tag", "tags such as !!str have no meaning here", advice)
        if kind is yaml.ScalarEvent:
            return self._scalar(event)
        return (self._sequence if kind is yaml.SequenceStartEvent else self._mapping)(depth + 1, pointer)

    def _sequence(self, depth: int, pointer: Pointer | None) -> Json:
        items: list[Json] = []
        while (event := self._loader.get_event()).__class__ is not yaml.SequenceEndEvent:
            items.append(self._node(event, depth, None if pointer is None else (*pointer, len(items))))
        return items

    def _mapping(self, depth: int, pointer: Pointer | None) -> Json:
        data: dict[str, Json] = {}
        following = self._loader.get_event
        while (event := following()).__class__ is not yaml.MappingEndEvent:
            key, here = self._key(event, depth, pointer), None
            if key in data:
                self.note(_start(event), "yaml_duplicate_key", f"the key {key!r} stands here twice", "keep one of the two")
            if pointer is not None:
                here = (*pointer, key)
                self._keys[here] = _start(event)
            value = self._node(following(), depth, here)
            data.setdefault(key, value)
        return data

    def _key(self, event: Any, depth: int, pointer: Pointer | None) -> str:
        before = len(self.findings)
        key = self._node(event, depth, None if pointer is None else (*pointer, ""))
        if isinstance(key, str):
            if key == "<<" and event.implicit[0]:
                advice = "write the fields out: a review must see what applies"
                self.note(_start(event), "yaml_merge", "<< is a merge key", advice)
            return key
        if len(self.findings) == before:
            self.note(_start(event), "yaml_key", "this key is not a string", "put it in quotes")
        return f"?{_start(event)}"

    def _scalar(self, event: Any) -> Json:
        text: str = event.value
        if self._suspect and redacted(text) != text:
            self.note(_start(event), "secret_literal", "this holds a credential of a well-known form", REMEDY)
        if not event.implicit[0]:  # quoted, a block, or tagged
            return text
        if text in _PLAIN:
            return _PLAIN[text]
        if text.lower() in RESERVED:
            advice = 'write true, false or null; if it is a string, put it in quotes: "…"'
            self.note(_start(event), "yaml_boolean", f"YAML readers disagree on whether {text} is a string", advice)
        elif text[0] in "-+.0123456789":
            return self._number(text, event)
        return text

    def _number(self, text: str, event: Any) -> Json:
        if (found := _NUMBER.match(text)) and len(text.lstrip("-")) <= _MAX_DIGITS:
            return float(text) if found[1] else int(text)
        if _NUMBER_LIKE.match(text):
            advice = "write a plain decimal number; if it is a string, put it in quotes"
            self.note(_start(event), "yaml_number", f"YAML readers disagree on the value of {text[:40]}", advice)
        return text


def _start(event: Any) -> tuple[int, int]:
    mark = event.start_mark
    return mark.line + 1, mark.column + 1
