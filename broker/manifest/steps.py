"""How two values of a field are compared: the steps that `diff` is made of, and differences that many fields have in common."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple


class Direction(StrEnum):
    """What a change does to what agents may do."""

    WIDER = "wider"
    NARROWER = "narrower"
    CHANGED = "changed"
    """Neither for sure: to be treated as wider."""
    EQUAL_EFFECT = "equal-effect"
    """Written otherwise, or of nobody's concern."""


class Step(NamedTuple):
    """One difference: of which kind, what it means, what stood there before and after, for people, and where; `about` what."""

    kind: str
    direction: Direction
    before: str
    after: str
    rules: tuple[str, ...] = ()
    about: str = ""


Difference = Callable[[Any, Any], Iterator[Step]]
"""What two different values of one field mean."""
Table = Mapping[str, Difference]
WIDER, NARROWER, CHANGED, EQUAL = Direction
OPPOSITE = {WIDER: NARROWER, NARROWER: WIDER, CHANGED: CHANGED, EQUAL: EQUAL}


def compared(table: Table, before: object, after: object) -> Iterator[Step]:
    """The differences between two parts of the same type."""
    for name in _names(type(after)):  # type: ignore[arg-type] # mypy takes a class's hash for that of its instances
        old, new = getattr(before, name), getattr(after, name)
        if old is not new and (meaning := table.get(name, differs(name))) is not ignored and _differ(old, new):
            yield from meaning(old, new)


@cache
def _names(part: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(part))


def _differ(before: object, after: object) -> bool:
    """Whether they say something else: to Python, 1 and true are equal."""
    return before != after or ((isinstance(after, Mapping | list) or is_dataclass(after)) and said(before) != said(after))


def said(value: Any) -> str:
    """A value, for people; nothing for nothing."""
    if value is None or value == "":
        return ""
    if isinstance(value, str | int):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return json.dumps(_plain(value) if isinstance(value, Mapping) else value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.name not in ("rule", "pattern")}
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    return sorted(value) if isinstance(value, AbstractSet) else getattr(value, "text", str(value))


def ignored(_before: Any, _after: Any) -> Iterator[Step]:
    """Where it stands, its own name, or what is made of other fields that are compared."""
    return iter(())


def differs(kind: str, direction: Direction = CHANGED) -> Difference:
    """Nothing is known of its order."""
    return lambda before, after: iter((Step(kind, direction, said(before), said(after)),))


def more(kind: str, means: Direction) -> Difference:
    """A number or a flag; a larger one `means` this."""
    return lambda before, after: iter((Step(kind, means if after > before else OPPOSITE[means], said(before), said(after)),))


def later(kind: str) -> Difference:
    """A moment until which something is given, in seconds since the epoch; 0 for not at all, infinite for ever."""
    return lambda before, after: iter((Step(kind, WIDER if after > before else NARROWER, _day(before), _day(after)),))


def _day(moment: float) -> str:
    return f"until {datetime.fromtimestamp(moment, UTC).isoformat()}" if 0 < moment < math.inf else "always" if moment else "no"


def present(kind: str, means: Direction) -> Difference:
    """Text that may be empty; to have one `means` this, to have another is a change."""

    def difference(before: Any, after: Any) -> Iterator[Step]:
        direction = CHANGED if before and after else means if after else OPPOSITE[means]
        yield Step(kind, direction, said(before), said(after))

    return difference


def ranked(kind: str, *strictest_last: str) -> Difference:
    """Words in an order."""
    place = strictest_last.index
    return lambda before, after: iter(
        (Step(kind, NARROWER if place(after) > place(before) else WIDER, said(before), said(after)),)
    )


def members(kind: str, means: Direction) -> Difference:
    """A set; one more `means` this."""

    def difference(before: Iterable[Any], after: Iterable[Any]) -> Iterator[Step]:
        old, new = set(map(said, before)), set(map(said, after))
        yield from (Step(kind, means, "", each) for each in sorted(new - old))
        yield from (Step(kind, OPPOSITE[means], each, "") for each in sorted(old - new))

    return difference


def entries(kind: str, means: Direction, both: Difference | None = None) -> Difference:
    """A mapping; one more entry `means` this."""

    def difference(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[Step]:
        for key in sorted({*before, *after}, key=str):
            name = key if isinstance(key, str) else "/".join(key)
            if key not in after:
                yield Step(kind, OPPOSITE[means], said(before[key]), "", about=name)
            elif key not in before:
                yield Step(kind, means, "", said(after[key]), about=name)
            elif _differ(before[key], after[key]):
                yield from (step._replace(about=name) for step in (both or differs(kind))(before[key], after[key]))

    return difference
