"""Schemas that say something else than their author meant: open where they should be closed, unsatisfiable, unreachable.

Law: what is reported is so. Where it takes more than a look at a rule and its neighbours to tell, nothing is said.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from broker.manifest.models import Agent, ToolSpec
from broker.manifest.rules import Problem
from broker.manifest.strict_yaml import Document, Pointer
from broker.manifest.words import Params
from broker.policy.schema import ParameterSchema, SchemaError
from broker.policy.types import Effect

_WITH_BODY = ("POST", "PUT", "PATCH")
_BOUNDS = (
    (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")),
    (("minLength",), ("maxLength",)),
    (("minItems",), ("maxItems",)),
    (("minProperties",), ("maxProperties",)),
)


def lint_tool(spec: ToolSpec) -> Iterator[Problem]:
    """What is odd about the schemas of a catalog entry."""
    for name, operation in spec.operations.items():
        here: Pointer = ("spec", "operations", name)
        content = "arguments" if spec.protocol == "mcp" else "body" if spec.match(name).method in _WITH_BODY else ""
        if operation.effect is not Effect.READ and content and not _is_closed(operation.params, content):
            yield _place(here, operation.params, content), "schema_open", _OPEN.format(content)
        for location, schema in operation.params.items():
            yield from _placed((*here, "params", location), _oddities(schema.text, ""))


_OPEN = (
    "this operation changes something, and its {} may hold fields that nobody has looked at; list them under properties, "
    "and write additionalProperties: false"
)


def _place(here: Pointer, params: Params, content: str) -> Pointer:
    return (*here, "params", content) if content in params else here


def _is_closed(params: Params, content: str) -> bool:
    schema = params[content].source if content in params else {}
    alternatives = [part for word in ("oneOf", "anyOf", "allOf") for part in schema.get(word, ()) if isinstance(part, dict)]
    # The one reference that people write at the top: to a part that has a name.
    named = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    referred = schema.get("$defs", {}).get(named, {})
    closes = [schema, *alternatives, *([referred] if isinstance(referred, dict) else [])]
    return any(
        each.get("additionalProperties") is False or each.get("unevaluatedProperties") is False or each.get("maxProperties") == 0
        or "enum" in each or "const" in each
        for each in closes
    )  # fmt: skip


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
                    yield from _placed((*place, location), _oddities(schema.text, above))


def _placed(here: Pointer, problems: Iterable[Problem]) -> Iterator[Problem]:
    return (((*here, *pointer), code, why) for pointer, code, why in problems)


@lru_cache(maxsize=4096)  # few schemas are written, and many agents have them
def _oddities(text: str, above: str) -> tuple[Problem, ...]:
    return tuple(_odd(json.loads(text), json.loads(above or "{}"), ()))


def _odd(schema: Any, above: Any, here: Pointer) -> Iterator[Problem]:
    """Of one schema and what is below it; `above` is the catalog's for the same values."""
    if not isinstance(schema, dict):
        return
    above = above if isinstance(above, dict) else {}
    yield from _listed(schema, above, here)
    yield from _crossed(schema, above, here)
    yield from _refused(schema, above, here)
    # What a name or a place must be that a pattern or a prefix may have a schema for, takes more to tell.
    others = {} if "patternProperties" in above else above.get("additionalProperties", {})
    for name, part in schema.get("properties", {}).items():
        yield from _odd(part, above.get("properties", {}).get(name, others), (*here, "properties", name))
    alike = "prefixItems" not in schema and "prefixItems" not in above
    yield from _odd(schema.get("items"), above.get("items") if alike else {}, (*here, "items"))


def _listed(schema: Mapping[str, Any], above: Mapping[str, Any], here: Pointer) -> Iterator[Problem]:
    word = "const" if "const" in schema else "enum"
    values = [schema["const"]] if "const" in schema else schema.get("enum", ())
    others = {name: rule for name, rule in schema.items() if name != word}
    for rules, whose in ((others, "the other rules here"), (above, "the catalog's schema")):
        if values and rules and all(_breaks(rules, value) for value in values):
            yield (*here, word), "schema_unsatisfiable", f"{whose} refuse every value listed here; correct one of the two"
            return


def _breaks(rules: Mapping[str, Any], value: Any) -> bool:
    try:
        return bool(ParameterSchema(rules, "").violations(value, ""))
    except SchemaError:  # a part that refers to its whole can't be judged alone
        return False


def _crossed(schema: Mapping[str, Any], above: Mapping[str, Any], here: Pointer) -> Iterator[Problem]:
    for lows, highs in _BOUNDS:
        low = max((each[word] for each in (schema, above) for word in lows if word in each), default=None)
        high = min((each[word] for each in (schema, above) for word in highs if word in each), default=None)
        word = next((word for word in (*highs, *lows) if word in schema), None)
        if word and low is not None and high is not None and low > high:
            yield (*here, word), "schema_unsatisfiable", f"nothing is at least {low} and at most {high}; correct one of the two"


def _refused(schema: Mapping[str, Any], above: Mapping[str, Any], here: Pointer) -> Iterator[Problem]:
    """Names that a closed schema has no place for."""
    for index, name in enumerate(schema.get("required", ())):
        for closed, whose in ((schema, "additionalProperties: false here"), (above, "the catalog")):
            if not _has_place(closed, name):
                why = f"{name!r} is required, and {whose} refuses it, so no call can pass; correct the name, or allow it"
                yield (*here, "required", index), "schema_unsatisfiable", why
                break
    for name in schema.get("properties", {}):
        if not _has_place(above, name):
            why = f"the catalog refuses {name!r}, so this rule never holds for any call; correct the name, or take it out"
            yield (*here, "properties", name), "schema_unreachable", why


def _has_place(schema: Mapping[str, Any], name: str) -> bool:
    closed = schema.get("additionalProperties") is False and not schema.get("patternProperties")
    known = schema.get("properties", {})
    return not (name not in known if closed else known.get(name) is False)
