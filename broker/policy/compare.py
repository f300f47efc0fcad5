"""Whether one JSON Schema 2020-12 lets more pass than another.

Laws: `narrower` and `equal` are proofs, and what can't be proved by a keyword beside a keyword is `changed`. What schemas list is
judged by the validator that judges calls. The work is bounded: two hostile schemas cost what the budget allows, then `changed`.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from broker.policy.schema import valid
from broker.policy.types import Json

Schema = bool | Mapping[str, Any]


class Comparison(StrEnum):
    """What the schemas after let pass, beside those before."""

    EQUAL = "equal"
    NARROWER = "narrower"
    WIDER = "wider"
    CHANGED = "changed"
    """Something else, or more than can be told simply: to be treated as wider."""


_BUDGET = 100_000  # steps of some microseconds; those of real APIs take hundreds
_EXACT = 2**53  # from here on, readers disagree on numbers (RFC 8259 section 6)
_KINDS = frozenset({"null", "boolean", "integer", "fraction", "string", "array", "object"})
_NUMBERS = frozenset({"integer", "fraction"})
_LISTED: Mapping[str, list[Json]] = {"null": [None], "boolean": [False, True]}
_NOTES = frozenset(  # what the validator does not judge by; it takes `format` for a note too, as 2020-12 does
    {
        "title", "description", "default", "examples", "$comment", "deprecated", "readOnly", "writeOnly", "format", "$defs",
    }
)  # fmt: skip
_REFERENCES = frozenset({"$ref", "$dynamicRef", "$recursiveRef"})
_BESIDE = frozenset({"unevaluatedProperties", "unevaluatedItems"})  # they mean what all that stands beside them leaves over


def compare(before: Sequence[Schema], after: Sequence[Schema]) -> Comparison:
    """A value must pass all of `before`, and then all of `after`. Where there is no schema, there need be no value either."""
    narrower = (bool(after) or not before) and implies(after, before)
    wider = (bool(before) or not after) and implies(before, after)
    if narrower:
        return Comparison.EQUAL if wider else Comparison.NARROWER
    return Comparison.WIDER if wider else Comparison.CHANGED


def implies(given: Sequence[Schema], wanted: Sequence[Schema]) -> bool:
    """Whether each value that passes all of `given` provably passes all of `wanted`."""
    try:
        return _Proof().holds(_parts(given, root=True), _parts(wanted, root=True))
    except (_Exhausted, RecursionError):  # a proof may be deeper than Python's stack, before the budget is spent
        return False


class _Exhausted(Exception):
    """The budget is spent."""


class _Part:
    """One schema of a conjunction, without its `allOf`. `whole`: it can only be compared as it stands."""

    def __init__(self, schema: Mapping[str, Any], *, whole: bool) -> None:
        self.schema, self.whole = schema, whole

    @cached_property
    def text(self) -> str:
        return _text(self.schema)


def _parts(schemas: Iterable[Schema], *, root: bool = False) -> list[_Part]:
    found: list[_Part] = []
    for schema in schemas:
        if isinstance(schema, bool):
            found += [] if schema else [_Part({"not": {}}, whole=False)]
        elif (root and _refers(schema)) or not _BESIDE.isdisjoint(schema):
            found.append(_Part(schema, whole=True))
        else:
            rest = {word: value for word, value in schema.items() if word != "allOf" and word not in _NOTES}
            found += [_Part(rest, whole=False)] if rest else []
            found += _parts(schema.get("allOf", ()))
    return found


def _refers(node: object) -> bool:
    """Whether a reference may stand in it: then what it means depends on the document around it."""
    if isinstance(node, Mapping):
        return not _REFERENCES.isdisjoint(node) or any(map(_refers, node.values()))
    return isinstance(node, list) and any(map(_refers, node))


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _bounds(words: Iterable[object]) -> list[float]:
    return [word for word in words if isinstance(word, int | float) and abs(word) < _EXACT]


class _Given:
    """What is known of a value: it passes all of `parts`."""

    def __init__(self, parts: Sequence[_Part]) -> None:
        self.schemas = [part.schema for part in parts if not part.whole]
        self.parts = parts
        self.texts = {part.text for part in parts}

    def all(self, word: str) -> list[Any]:
        return [schema[word] for schema in self.schemas if word in schema]

    @cached_property
    def kinds(self) -> frozenset[str]:
        found = _KINDS
        for written in self.all("type"):
            found &= _kinds(written)
        return found

    def listed(self) -> list[Json] | None:
        """All values that may pass, and perhaps some that don't; None where they are not listed."""
        for values in (*self.all("enum"), *([value] for value in self.all("const"))):
            if not _inexact(values):
                return list(values)
        return [value for kind in self.kinds for value in _LISTED[kind]] if self.kinds <= _LISTED.keys() else None

    def most(self, word: str) -> float:
        return min(_bounds(self.all(word)), default=math.inf)

    def least(self, word: str) -> float:
        return max(_bounds(self.all(word)), default=0)

    def required(self) -> set[str]:
        return {name for names in self.all("required") for name in names}


def _kinds(written: str | list[str]) -> frozenset[str]:
    names = {written} if isinstance(written, str) else set(written)
    return frozenset(names - {"number"} | (_NUMBERS if "number" in names else set()))


def _inexact(value: object) -> bool:
    """Whether a number stands in it that readers disagree on."""
    if isinstance(value, Mapping):
        return any(map(_inexact, value.values()))
    if isinstance(value, list):
        return any(map(_inexact, value))
    return isinstance(value, int | float) and not abs(value) < _EXACT


class _Proof:
    """One question, and what may be spent on it."""

    def __init__(self) -> None:
        self._left = _BUDGET

    def spend(self, steps: int) -> None:
        """Count work. Raises `_Exhausted`."""
        self._left -= steps
        if self._left < 0:
            raise _Exhausted

    def implied(self, given: Iterable[Schema], wanted: Iterable[Schema]) -> bool:
        """Whether what passes all of `given` passes all of `wanted`, both within a document."""
        return self.holds(_parts(given), _parts(wanted))

    def holds(self, given: Sequence[_Part], wanted: Sequence[_Part]) -> bool:
        """The same.

        1. what stands in both as it is → holds
        2. nothing passes `given` → holds
        3. all that passes `given` is listed → each is judged
        4. each group of keywords that mean something together → holds if all do
        """
        self.spend(1 + sum(len(part.text) for part in (*given, *wanted)) // 256)
        known = _Given(given)
        left = [part for part in wanted if part.text not in known.texts]
        if not left or not known.kinds or any(schema in ({}, True) for schema in known.all("not")):
            return True
        if (values := known.listed()) is not None:
            passing = [value for value in values if all(self.valid(part.text, value) for part in given)]
            return all(self.valid(part.text, value) for value in passing for part in left)
        return all(not part.whole and self._part(known, part.schema) for part in left)

    def valid(self, text: str, value: Json) -> bool:
        """Whether the value is valid under the schema that `text` is in JSON."""
        self.spend(5 + (len(text) + len(_text(value))) // 64)
        return valid(text, value)

    def _part(self, known: _Given, wanted: Mapping[str, Any]) -> bool:
        groups = dict.fromkeys(_BY_WORD.get(word) or _Group((word,)) for word in wanted)
        return all(self._group(known, wanted, group) for group in groups)

    def _group(self, known: _Given, wanted: Mapping[str, Any], group: "_Group") -> bool:
        asked = group.of(wanted)
        self.spend(1)
        if any(asked == group.of(schema) for schema in known.schemas) or known.kinds.isdisjoint(group.kinds):
            return True
        return group.proof is not None and group.proof(self, known, wanted)

    def at(self, schema: Mapping[str, Any], name: str) -> list[Schema]:
        """What a schema of an object asks of the property with this name."""
        found = [schema["properties"][name]] if name in schema.get("properties", {}) else []
        for pattern, each in schema.get("patternProperties", {}).items():
            found += [each] if self.valid(_text({"pattern": pattern}), name) else []
        return found or [schema.get("additionalProperties", True)]


@dataclass(frozen=True, slots=True)
class _Group:
    """Keywords that mean something together, the kinds of values that they judge, and what proves them beside the same keywords.

    Those that have no proof, and all that are not known here, hold only where they stand in both with the same values.
    """

    words: tuple[str, ...]
    kinds: frozenset[str] = _KINDS
    proof: Callable[[_Proof, _Given, Mapping[str, Any]], bool] | None = None

    def of(self, schema: Mapping[str, Any]) -> str:
        return _text({word: schema[word] for word in self.words if word in schema})


def _number(word: str, kind: str, proof: Callable[[_Given, float], bool]) -> _Group:
    """A keyword whose value is a number."""
    kinds = _NUMBERS if kind == "number" else frozenset({kind})
    return _Group((word,), kinds, lambda _, known, wanted: not _inexact(wanted[word]) and proof(known, wanted[word]))


def _low(known: _Given, sign: int, inclusive: str, exclusive: str) -> tuple[float, bool]:
    """The tightest bound below, and whether it excludes itself; with `sign` -1 the bound above, mirrored."""
    bounds = [(sign * bound, False) for bound in _bounds(known.all(inclusive))]
    return max([*bounds, *((sign * bound, True) for bound in _bounds(known.all(exclusive)))], default=(-math.inf, False))


def _multiple(known: _Given, wanted: float) -> bool:
    whole = [each for each in _bounds(known.all("multipleOf")) if isinstance(each, int)]
    return isinstance(wanted, int) and any(each % wanted == 0 for each in whole)


def _any_of(proof: _Proof, known: _Given, wanted: Mapping[str, Any]) -> bool:
    """One of its members holds; or of some `anyOf` that is given, each member implies one of them."""
    if any(proof.holds(known.parts, _parts([member])) for member in wanted["anyOf"]):
        return True
    for part in known.parts:
        if not part.whole and "anyOf" in part.schema:
            rest = [each for each in known.parts if each is not part]
            beside = {word: value for word, value in part.schema.items() if word != "anyOf"}
            cases = ([*rest, *_parts([beside, member])] for member in part.schema["anyOf"])
            if all(proof.holds(case, [_Part({"anyOf": wanted["anyOf"]}, whole=False)]) for case in cases):
                return True
    return False


def _names(proof: _Proof, known: _Given, wanted: Mapping[str, Any]) -> bool:
    return proof.implied([{"type": "string"}, *known.all("propertyNames")], [wanted["propertyNames"]])


def _properties(proof: _Proof, known: _Given, wanted: Mapping[str, Any]) -> bool:
    """Each name that anything names; then the names that a pattern of `wanted` fits; then all others."""
    if known.most("maxProperties") <= 0:
        return True
    refused = [_text(names) for names in known.all("propertyNames")]
    for name in sorted({name for schema in (*known.schemas, wanted) for name in schema.get("properties", {})}):
        given = (each for schema in known.schemas for each in proof.at(schema, name))
        if all(proof.valid(text, name) for text in refused) and not proof.implied(given, proof.at(wanted, name)):
            return False
    patterns = wanted.get("patternProperties", {})
    for pattern, each in patterns.items():
        if not proof.implied((part for schema in known.schemas for part in _fitting(schema, pattern)), [each]):
            return False
    # What fits no pattern of `wanted` fits none of a schema whose patterns are all among them.
    others = (
        each.get("additionalProperties", True)
        for each in known.schemas
        if each.get("patternProperties", {}).keys() <= patterns.keys()
    )
    return proof.implied(others, [wanted.get("additionalProperties", True)])


def _fitting(schema: Mapping[str, Any], pattern: str) -> Iterator[Schema]:
    """What a schema surely asks of a property that it does not name and that fits this pattern."""
    patterns = schema.get("patternProperties", {})
    if pattern in patterns:
        yield patterns[pattern]
    elif not patterns:
        yield schema.get("additionalProperties", True)


def _items(proof: _Proof, known: _Given, wanted: Mapping[str, Any]) -> bool:
    """Each place that has a schema of its own, and then all that follow."""
    last = max(len(schema.get("prefixItems", ())) for schema in (*known.schemas, wanted))
    places = range(int(min(last + 1, known.most("maxItems"))))
    return all(proof.implied((_item(each, place) for each in known.schemas), [_item(wanted, place)]) for place in places)


def _item(schema: Mapping[str, Any], place: int) -> Schema:
    prefix: Sequence[Schema] = schema.get("prefixItems", ())
    return prefix[place] if place < len(prefix) else schema.get("items", True)


_ARRAY, _OBJECT = frozenset({"array"}), frozenset({"object"})
_BY_WORD: Mapping[str, _Group] = {
    word: group
    for group in (
        _Group(("type",), proof=lambda _, known, wanted: known.kinds <= _kinds(wanted["type"])),
        _number("minimum", "number", lambda known, least: _low(known, 1, "minimum", "exclusiveMinimum") >= (least, False)),
        _number(
            "exclusiveMinimum", "number", lambda known, least: _low(known, 1, "minimum", "exclusiveMinimum") >= (least, True)
        ),
        _number("maximum", "number", lambda known, most: _low(known, -1, "maximum", "exclusiveMaximum") >= (-most, False)),
        _number(
            "exclusiveMaximum", "number", lambda known, most: _low(known, -1, "maximum", "exclusiveMaximum") >= (-most, True)
        ),
        _number("multipleOf", "number", _multiple),
        _number("minLength", "string", lambda known, least: known.least("minLength") >= least),
        _number("maxLength", "string", lambda known, most: known.most("maxLength") <= most),
        _Group(("pattern",), frozenset({"string"})),
        _Group(("required",), _OBJECT, lambda _, known, wanted: known.required() >= set(wanted["required"])),
        _number(
            "minProperties", "object", lambda known, least: max(known.least("minProperties"), len(known.required())) >= least
        ),
        _number("maxProperties", "object", lambda known, most: known.most("maxProperties") <= most),
        _Group(("propertyNames",), _OBJECT, _names),
        _Group(("properties", "patternProperties", "additionalProperties"), _OBJECT, _properties),
        _number("minItems", "array", lambda known, least: known.least("minItems") >= least),
        _number("maxItems", "array", lambda known, most: known.most("maxItems") <= most),
        _Group(("uniqueItems",), _ARRAY, lambda _, known, wanted: not wanted["uniqueItems"] or known.most("maxItems") <= 1),
        _Group(("contains", "minContains", "maxContains"), _ARRAY),
        _Group(("prefixItems", "items"), _ARRAY, _items),
        _Group(("anyOf",), proof=_any_of),
        _Group(("if", "then", "else")),
    )
    for word in group.words
}
