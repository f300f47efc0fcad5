"""The narrowest schemas that admit certain values, and what a manifest would have to say.

Laws: pure. What is made admits the values that were seen, of those that the record holds, and no others in the same location;
what the record does not hold (redacted, too long, a prompt) can't be pinned, is left to the catalog's schema, and is told.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from broker.policy.schema import json_pointer, valid

Schema = dict[str, Any]


class _Open:
    """A value that the record does not hold."""

    def __repr__(self) -> str:
        return "(not in the record)"


OPEN: Final = _Open()
MOST = 20
"""Different values of one parameter that a manifest lists."""

# What `broker/audit/record.py` writes in place of a value.
_MARK = re.compile(
    r"\[(?:redacted|(?:pii|secret) (?:\d+ chars|number)|\d+ chars sha256:[0-9a-f]{64}|\d+ bytes left out|\d+ more, too deep"
    r"|number of \d+ bits)\]|-?\d+(?:\.\d+)?e[+-]\d+"  # a number with an exponent
)


def opened(value: Any) -> Any:
    """The value with `OPEN` for each mark of the record, and for an object of whose names one is a mark."""
    if isinstance(value, dict):
        if any(map(_MARK.fullmatch, value)):
            return OPEN
        return {name: opened(part) for name, part in value.items()}
    if isinstance(value, list):
        return [opened(part) for part in value]
    return OPEN if isinstance(value, str) and _MARK.fullmatch(value) else value


def unpinned(value: Any, *here: str | int) -> Iterator[str]:
    """Where in it (RFC 6901) something is `OPEN`."""
    if value is OPEN:
        yield json_pointer(*here)
    elif isinstance(value, dict | list):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from unpinned(part, *here, name)


def is_whole(value: Any) -> bool:
    """Whether the record holds all of it."""
    return not any(True for _ in unpinned(value))


def thinned(values: Sequence[Any]) -> list[Any]:
    """The values, with `OPEN` for each name of which more different ones were seen than a person would list."""
    objects = [value for value in values if isinstance(value, dict)]
    names = {name for value in objects for name in value}
    many = {name for name in names if len(_different([value[name] for value in objects if name in value])) > MOST}
    loose = [{name: OPEN if name in many else part for name, part in value.items()} for value in objects]
    return loose if len(loose) == len(values) else list(values)


def exact(value: Any) -> Schema:
    """What admits this value alone; anything in a place that is `OPEN`."""
    if value is OPEN:
        return {}
    if isinstance(value, dict):
        if not value:
            return {"type": "object", "maxProperties": 0}
        parts = {name: exact(part) for name, part in value.items()}
        return {"type": "object", "required": sorted(value), "properties": parts, "additionalProperties": False}
    if isinstance(value, list) and not is_whole(value):
        return {"type": "array", "prefixItems": [exact(part) for part in value], "minItems": len(value), "maxItems": len(value)}
    return {"const": value}


def admitting(location: str, values: Sequence[Any]) -> Schema:
    """What admits these values of one location alone, as briefly as that can be said."""
    values = _different(values)
    if location == "path" and all(isinstance(value, dict) for value in values):
        return _path(values)
    return exact(values[0]) if len(values) == 1 else {"anyOf": [exact(value) for value in values]}


def _path(values: Sequence[Mapping[str, Any]]) -> Schema:
    # A path has all the names of its template, always; and issuers narrow credentials by what is said of each.
    found = {name: _different([value[name] for value in values]) for name in values[0]}
    rules = {name: _one_of(parts) for name, parts in found.items() if is_whole(parts)}
    if sum(len(parts) > 1 for parts in found.values()) <= 1:
        return {"properties": rules}
    return {"properties": rules, "anyOf": [_alone("path", value) for value in values]}


def _alone(location: str, value: Any) -> Schema:
    """What admits this value alone; of a path, it is enough to say what each name is."""
    schema = exact(value)
    return {"properties": schema["properties"]} if location == "path" and "properties" in schema else schema


def widened(location: str, old: Schema, values: Sequence[Any]) -> Schema:
    """What admits what `old` does, and these values: one name's list grows where that says it all, else each stands by itself."""
    values = _different(values)
    if longer := _longer(location, old, values):
        return longer
    # Implied by what follows; it is what credentials are narrowed by.
    pinned = {
        name: _one_of([*listed(rule), *(value[name] for value in values)])
        for name, rule in old.get("properties", {}).items()
        if listed(rule) and all(isinstance(value, dict) and name in value and is_whole(value[name]) for value in values)
    }
    return {**({"properties": pinned} if pinned else {}), "anyOf": [old, *(_alone(location, value) for value in values)]}


def _longer(location: str, old: Schema, values: Sequence[Any]) -> Schema | None:
    """`old` with one longer list; None where that would admit more than these values."""
    rules = old.get("properties", {})
    whole = location == "path" or (old.get("additionalProperties") is False and set(old.get("required", ())) >= rules.keys())
    if not whole or not old.keys() <= {"properties", "required", "additionalProperties", "type"}:
        return None
    if not all(isinstance(value, dict) and value.keys() == rules.keys() for value in values):
        return None
    lists = {name: _different([*listed(rule), *(value[name] for value in values)]) for name, rule in rules.items()}
    grown = [name for name, rule in rules.items() if len(lists[name]) > 1 or not is_list(rule)]
    if len(grown) != 1 or not is_list(rules[grown[0]]) or not is_whole(lists[grown[0]]):
        return None
    return {**old, "properties": {**rules, grown[0]: _one_of(lists[grown[0]])}}


def is_list(rule: Any) -> bool:
    """Whether it lists the values that pass, and nothing that stands beside the list would be lost with it."""
    values = listed(rule)
    return bool(values) and len(rule.keys() - {"type"}) == 1 and all(valid(json.dumps(rule), value) for value in values)


def _one_of(values: Sequence[Any]) -> Schema:
    different = _different(values)
    return {"const": different[0]} if len(different) == 1 else {"enum": different}


def listed(rule: Any) -> list[Any]:
    """The values that a rule lists."""
    if not isinstance(rule, dict):
        return []
    return [rule["const"]] if "const" in rule else list(rule.get("enum", ()))


def _different(values: Sequence[Any]) -> list[Any]:
    """Each once, in order; `1`, `1.0` and `true` are three."""
    return list({json.dumps(value, sort_keys=True, default=repr): value for value in values}.values())
