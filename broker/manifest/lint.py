"""Schemas that say something else than their author meant: open where they should be closed, unsatisfiable, unreachable.

Law: what is reported is so. Where it takes more than a look at a rule and its neighbours to tell, nothing is said.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from broker.manifest.models import Agent, ToolSpec
from broker.manifest.rules import Problem
from broker.manifest.strict_yaml import Document, Pointer
from broker.manifest.words import Params
from broker.policy.schema import ParameterSchema, SchemaError, valid
from broker.policy.types import Effect

_WITH_BODY = ("POST", "PUT", "PATCH")
_NUMBERS = frozenset({"integer", "fraction"})
_KINDS = _NUMBERS | {"null", "boolean", "string", "array", "object"}
_BOUNDS = (
    (_NUMBERS, ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")),
    (frozenset({"string"}), ("minLength",), ("maxLength",)),
    (frozenset({"array"}), ("minItems",), ("maxItems",)),
    (frozenset({"object"}), ("minProperties",), ("maxProperties",)),
)
"""Kinds of values, and which words bound those and no others."""


def lint_tool(spec: ToolSpec) -> Iterator[Problem]:
    """What is odd about the schemas of a catalog entry."""
    for name, operation in spec.operations.items():
        here: Pointer = ("spec", "operations", name)
        content = "arguments" if spec.protocol == "mcp" else "body" if spec.match(name).method in _WITH_BODY else ""
        if operation.effect is not Effect.READ and content and not _is_closed(operation.params, content):
            yield _place(here, operation.params, content), "schema_open", _OPEN.format(content)
        for location, schema in operation.params.items():
            yield from _placed((*here, "params", location), _oddities(schema.text, "", location))


_OPEN = (
    "this operation changes something, and its {} may hold fields that nobody has looked at; list them under properties, "
    "and write additionalProperties: false"
)


def _place(here: Pointer, params: Params, content: str) -> Pointer:
    return (*here, "params", content) if content in params else here


def _is_closed(params: Params, content: str) -> bool:
    schema = params[content].source if content in params else {}
    return _closes(schema, schema.get("$defs", {}), _KINDS if content == "body" else frozenset({"object"}))


def _closes(schema: Any, named: Mapping[str, Any], kinds: frozenset[str]) -> bool:
    """Whether only fields that it names pass, of values of these kinds; `named` has the parts that it may refer to."""
    if not isinstance(schema, dict):
        return schema is False
    every = schema.get("allOf", ())
    holding = kinds & _kinds(schema, *(part for part in every if isinstance(part, dict))) & {"object", "array", "string"}
    if not holding or "enum" in schema or "const" in schema:
        return True
    names = schema.get("additionalProperties") is False and not any(map(_fits_all, schema.get("patternProperties", ())))
    if holding == {"object"} and (names or schema.get("unevaluatedProperties") is False or schema.get("maxProperties") == 0):
        return True
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    choices = [schema[word] for word in ("anyOf", "oneOf") if word in schema]
    return (
        _closes(named.get(name), {}, holding)  # of a part's own references, nothing is said
        or any(_closes(part, named, holding) for part in every)
        or any(all(_closes(part, named, holding) for part in choice) for choice in choices)
    )


def _fits_all(pattern: str) -> bool:
    return all(valid(json.dumps({"pattern": pattern}), word) for word in ("qzx", "WVK", "0042"))


def lint_grants(model: Agent, catalog: Mapping[str, tuple[ToolSpec, Document]]) -> Iterator[Problem]:
    """What is odd about a manifest's schemas, by themselves and after the catalog's."""
    for name, part in model.spec.tools.items():
        operations = catalog[name][0].operations if name in catalog else {}
        for operation, grant in part.operations.items():
            declared = operations[operation].params if operation in operations else {}
            here: Pointer = ("spec", "tools", name, "operations", operation)
            asked = (grant.approval.when or {}) if grant.approval else {}
            for place, params in (((*here, "params"), grant.params), ((*here, "approval", "when"), asked)):
                for location, schema in params.items():
                    above = declared[location].text if location in declared else ""
                    yield from _placed((*place, location), _oddities(schema.text, above, location))


def _placed(here: Pointer, problems: Iterable[Problem]) -> Iterator[Problem]:
    return (((*here, *pointer), code, why) for pointer, code, why in problems)


@lru_cache(maxsize=4096)  # few schemas are written, and many agents have them
def _oddities(text: str, above: str, location: str) -> tuple[Problem, ...]:
    # All but a body are objects, always.
    known = {} if location == "body" else {"type": "object"}
    return tuple(_odd(json.loads(text), {**known, **json.loads(above or "{}")}, ()))


def _odd(schema: Any, above: Any, here: Pointer, *, needed: bool = True) -> Iterator[Problem]:
    """Of one schema and what is below it; `above` is the catalog's for the same values, which every call has where `needed`."""
    if not isinstance(schema, dict):
        return
    above = above if isinstance(above, dict) else {}
    yield from [*_listed(schema, above, here)] or _mistyped(schema, above, here)
    if needed and _forbids(schema):
        yield (*here, "not"), "schema_unsatisfiable", "nothing passes this, and no call is without it; correct it, or take it out"
    yield from _crossed(schema, above, here, needed=needed)
    yield from _refused(schema, above, here)
    # What a name or a place must be that a pattern or a prefix may have a schema for, takes more to tell.
    others = {} if "patternProperties" in above else above.get("additionalProperties", {})
    required = {*schema.get("required", ()), *above.get("required", ())}
    for name, part in schema.get("properties", {}).items():
        declared = above.get("properties", {}).get(name, others)
        yield from _odd(part, declared, (*here, "properties", name), needed=needed and name in required)
    alike = "prefixItems" not in schema and "prefixItems" not in above
    yield from _odd(schema.get("items"), above.get("items") if alike else {}, (*here, "items"), needed=False)


def _listed(schema: Mapping[str, Any], above: Mapping[str, Any], here: Pointer) -> Iterator[Problem]:
    word = "const" if "const" in schema else "enum"
    values = [schema["const"]] if "const" in schema else schema.get("enum", ())
    if values == []:
        why = "no value is listed here, so none passes; list some, or write false for a name that nobody may send"
        yield (*here, word), "schema_unsatisfiable", why
    others = {name: rule for name, rule in schema.items() if name != word}
    for rules, whose in ((others, "the other rules here"), (above, "the catalog's schema")):
        if values and rules and all(_breaks(rules, value) for value in values):
            yield (*here, word), "schema_unsatisfiable", f"{whose} refuse every value listed here; correct one of the two"
            return


def _mistyped(schema: Mapping[str, Any], above: Mapping[str, Any], here: Pointer) -> Iterator[Problem]:
    if "type" in schema and not _kinds(schema, above):
        why = "the catalog has another type here, so no value passes; correct one of the two"
        yield (*here, "type"), "schema_unsatisfiable", why


def _kinds(*schemas: Mapping[str, Any]) -> frozenset[str]:
    """What their types let pass."""
    found = _KINDS
    for each in schemas:
        written = each.get("type", [*_KINDS])
        names = {written} if isinstance(written, str) else {*written}
        found &= names | (_NUMBERS if "number" in names else frozenset())
    return found


def _forbids(schema: Any) -> bool:
    """Whether it is a way to say that a name must not be sent."""
    return schema is False or (isinstance(schema, dict) and schema.get("not") in ({}, True))


def _breaks(rules: Mapping[str, Any], value: Any) -> bool:
    try:
        return bool(ParameterSchema(rules, "").violations(value, ""))
    except SchemaError:  # a part that refers to its whole can't be judged alone
        return False


def _crossed(schema: Mapping[str, Any], above: Mapping[str, Any], here: Pointer, *, needed: bool) -> Iterator[Problem]:
    for kinds, lows, highs in _BOUNDS:
        low, least = max((each for word in lows for each in _bounds(word, 1, schema, above)), default=(-math.inf, False))
        high, most = max((each for word in highs for each in _bounds(word, -1, schema, above)), default=(-math.inf, False))
        word = next((word for word in (*highs, *lows) if word in schema), None)
        crossed = low > -high or (low == -high and (least or most))
        # None of something is how a name is said that nobody may send.
        none = high == 0 and kinds is not _NUMBERS and not needed
        if word and crossed and not none and _kinds(schema, above) <= kinds:
            text = f"{'more than' if least else 'at least'} {low} and {'less than' if most else 'at most'} {-high}"
            yield (*here, word), "schema_unsatisfiable", f"nothing is {text}; correct one of the two"


def _bounds(word: str, sign: int, *schemas: Mapping[str, Any]) -> Iterator[tuple[float, bool]]:
    """The bounds that a word sets, and whether it excludes them; with `sign` -1 mirrored, so that the tightest is the largest."""
    return ((sign * each[word], word.startswith("exclusive")) for each in schemas if word in each)


def _refused(schema: Mapping[str, Any], above: Mapping[str, Any], here: Pointer) -> Iterator[Problem]:
    """Names that a closed schema has no place for."""
    objects = _kinds(schema, above) <= {"object"}
    for index, name in enumerate(schema.get("required", ()) if objects else ()):
        for closed, whose in ((schema, "additionalProperties: false here"), (above, "the catalog")):
            if not _has_place(closed, name):
                why = f"{name!r} is required, and {whose} refuses it, so nothing passes; correct the name, or allow it"
                yield (*here, "required", index), "schema_unsatisfiable", why
                break
    for name, part in schema.get("properties", {}).items():
        if not _has_place(above, name) and not _forbids(part):
            why = f"the catalog refuses {name!r}, so this rule never holds for any call; correct the name, or take it out"
            yield (*here, "properties", name), "schema_unreachable", why


def _has_place(schema: Mapping[str, Any], name: str) -> bool:
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    known = schema.get("properties", {})
    return not (name not in known if closed else known.get(name) is False)
