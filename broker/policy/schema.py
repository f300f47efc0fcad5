"""JSON Schema 2020-12 over one location of a call's parameters.

Law: a schema never reaches out (no remote `$ref`), never takes more than linear time in the value (patterns run on a finite
automaton, others are refused), and its messages never quote the value it judged.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import jsonschema
import jsonschema_rs
import orjson

from broker.policy.types import Json, Violation

_META = jsonschema.Draft202012Validator(jsonschema.Draft202012Validator.META_SCHEMA)
_LINEAR = jsonschema_rs.RegexOptions()
_MASK = "the value"
_ALL_OF = 4096  # bytes of JSON; each violation takes the engine 10 us, and two bytes are enough for one
_MESSAGE = 160  # an unexpected property's name is as long as the agent makes it


class SchemaError(ValueError):
    """The schema itself is wrong. `pointer` (RFC 6901) says where in it."""

    def __init__(self, pointer: str, message: str) -> None:
        super().__init__(message)
        self.pointer = pointer
        self.message = message


class ParameterSchema:
    """A compiled schema and where it stands (`rule`: `file#pointer`). `text` is it as JSON.

    `types` are the types that it names of properties; `pinned` are properties that may have only certain texts, and those.

    Building one costs a compilation, unless one of the same text was built lately; judging a typical value costs less than a
    microsecond. Raises `SchemaError`.
    """

    __slots__ = ("_shared", "pinned", "rule", "source", "text", "types")

    def __init__(self, source: Mapping[str, Any], rule: str) -> None:
        self._place(_shared(json.dumps(source)), rule)

    def at(self, rule: str) -> "ParameterSchema":
        """The same schema, at another place."""
        twin = object.__new__(ParameterSchema)
        twin._place(self._shared, rule)
        return twin

    def _place(self, shared: "_Shared", rule: str) -> None:
        self._shared, self.rule = shared, rule
        self.text, self.source, self.types, self.pinned = shared.text, shared.source, shared.types, shared.pinned

    def violations(self, value: Json, location: str) -> tuple[Violation, ...]:
        """Every rule that `value` breaks, or of a long one the first; empty when it is valid. `location` begins each pointer."""
        try:
            self._shared.validator.validate(value)
        except jsonschema_rs.ValidationError as first:
            # The engine lists all mistakes before it gives one, and of a long value there may be millions.
            few = len(orjson.dumps(value)) <= _ALL_OF
            return tuple(
                self._violation(each, location) for each in (self._shared.validator.iter_errors(value) if few else (first,))
            )
        return ()

    def _violation(self, error: jsonschema_rs.ValidationError, location: str) -> Violation:
        return Violation(
            pointer=json_pointer(location, *error.instance_path),
            rule=self.rule + json_pointer(*error.schema_path),
            message=error.message if len(error.message) <= _MESSAGE else f"{error.message[:_MESSAGE]}…",
        )


def json_pointer(*parts: str | int) -> str:
    """The JSON pointer (RFC 6901) of these keys and indices."""
    plain = "/".join(map(str, parts))
    if parts and "~" not in plain and plain.count("/") == len(parts) - 1:
        return f"/{plain}"
    return "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in parts)


def valid(text: str, value: Json) -> bool:
    """Whether the value is valid under the schema that `text` is in JSON; nothing of it leaves its document."""
    judged: bool = _shared(text).validator.is_valid(value)
    return judged


class _Shared(NamedTuple):
    """What schemas of the same text have in common."""

    text: str
    source: dict[str, Any]
    validator: jsonschema_rs.Draft202012Validator
    types: Mapping[str, str]
    pinned: Mapping[str, tuple[str, ...]]


# Most grants of an organisation are narrowed in one of a few ways.
@lru_cache(maxsize=4096)
def _shared(text: str) -> _Shared:
    source = json.loads(text)
    _refuse_references(source, ())
    validator = _compile(source)
    properties = source.get("properties", {}) if isinstance(source, dict) else {}
    parts = {name: sub for name, sub in properties.items() if isinstance(sub, dict)}
    types = {name: sub["type"] for name, sub in parts.items() if isinstance(sub.get("type"), str)}
    listed = {name: tuple(sub.get("enum", [sub.get("const")])) for name, sub in parts.items()}
    pinned = {name: texts for name, texts in listed.items() if all(isinstance(each, str) for each in texts)}
    return _Shared(text, source, validator, types, pinned)


_NAMING = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs"})
"""Keywords whose value maps names to schemas: whatever a name is, it means nothing."""


def _refuse_references(node: object, path: tuple[str | int, ...], *, names: bool = False) -> None:
    """`names`: the keys are names of properties or definitions, and no keywords."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = (*path, key)
            if not names and (why := _leaves(key, value)):
                raise SchemaError(json_pointer(*here), why)
            if names or key not in ("const", "enum", "default", "examples"):
                _refuse_references(value, here, names=not names and key in _NAMING)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            _refuse_references(value, (*path, index))


def _leaves(key: str, value: object) -> str:
    """Why a keyword makes a schema mean what stands elsewhere."""
    if key in ("$ref", "$dynamicRef") and isinstance(value, str) and not value.startswith("#"):
        return f"{key} {value!r} leaves this file; write the schema out, or use #/$defs/…"
    return f"{key} is not used here: every schema is JSON Schema 2020-12; take it out" if key in ("$id", "$schema") else ""


def _compile(source: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    try:  # this checks the schema against its meta-schema too, a hundred times as fast as jsonschema, which has the better words
        return jsonschema_rs.Draft202012Validator(source, mask=_MASK, pattern_options=_LINEAR, offline=True)
    except (jsonschema_rs.ValidationError, ValueError) as error:
        path = getattr(error, "instance_path", [])
        message = getattr(error, "message", str(error))
        if '"regex"' in message:
            message = "the pattern is not a regular expression that runs in linear time; avoid look-around and back-references"
        elif better := jsonschema.exceptions.best_match(_META.iter_errors(source)):
            path, message = list(better.absolute_path), better.message
        raise SchemaError(json_pointer(*path), message) from None


def typed(value: str, kind: str) -> Json:
    """A query's or path's text as the JSON type that its schema names, where it is written canonically; else the text itself.

    Text that stays text then fails the schema, so nothing is guessed: `007`, `1e3` and `TRUE` are not numbers or booleans.
    """
    if kind in ("integer", "number") and _INTEGER.fullmatch(value):
        return int(value)
    if kind == "number" and _FRACTION.fullmatch(value):
        return float(value)
    if kind == "boolean" and value in ("true", "false"):
        return value == "true"
    return value


# Beyond 15 digits, JSON readers disagree on the value (RFC 8259 section 6). Minus zero is spelled in two ways.
_INTEGER = re.compile(r"(?!-0)-?(?:0|[1-9][0-9]{0,14})")
_FRACTION = re.compile(_INTEGER.pattern + r"\.[0-9]{1,15}")
