"""The rules of `diff`: for each field of the snapshot's parts, what a difference in it means.

Law: a table names every field of its part. A field that a table lacks is told as `changed`, and a test names it.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, fields, is_dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, partial
from typing import Any, NamedTuple

from broker.policy.approval import Approval
from broker.policy.compare import Comparison, compare
from broker.policy.containment import Action, Detector, Rule
from broker.policy.limits import Kind, Limit, Price
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import CredentialSpec, Endpoint


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
_OPPOSITE = {WIDER: NARROWER, NARROWER: WIDER, CHANGED: CHANGED, EQUAL: EQUAL}


def compared(table: Table, before: object, after: object) -> Iterator[Step]:
    """The differences between two parts of the same type."""
    for name in _names(type(after)):  # type: ignore[arg-type] # mypy takes a class's hash for that of its instances
        old, new = getattr(before, name), getattr(after, name)
        if old is not new and old != new:
            yield from table.get(name, differs(name))(old, new)


@cache
def _names(part: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(part))


def said(value: Any) -> str:
    """A value, for people; nothing for nothing."""
    if value is None or value == "":
        return ""
    if isinstance(value, str | int):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return json.dumps(value, sort_keys=True, default=_plain)


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
    return lambda before, after: iter((Step(kind, means if after > before else _OPPOSITE[means], said(before), said(after)),))


def later(kind: str) -> Difference:
    """A moment until which something is given, in seconds since the epoch; 0 for not at all, infinite for ever."""
    return lambda before, after: iter((Step(kind, WIDER if after > before else NARROWER, _day(before), _day(after)),))


def _day(moment: float) -> str:
    return f"until {datetime.fromtimestamp(moment, UTC).isoformat()}" if 0 < moment < math.inf else "always" if moment else "no"


def present(kind: str, means: Direction) -> Difference:
    """Text that may be empty; to have one `means` this, to have another is a change."""

    def difference(before: Any, after: Any) -> Iterator[Step]:
        direction = CHANGED if before and after else means if after else _OPPOSITE[means]
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
        yield from (Step(kind, _OPPOSITE[means], each, "") for each in sorted(old - new))

    return difference


def entries(kind: str, means: Direction, both: Difference | None = None) -> Difference:
    """A mapping; one more entry `means` this."""

    def difference(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Iterator[Step]:
        for key in sorted({*before, *after}, key=str):
            name = key if isinstance(key, str) else "/".join(key)
            if key not in after:
                yield Step(kind, _OPPOSITE[means], said(before[key]), "", about=name)
            elif key not in before:
                yield Step(kind, means, "", said(after[key]), about=name)
            elif before[key] != after[key]:
                yield from (step._replace(about=name) for step in (both or differs(kind))(before[key], after[key]))

    return difference


# ---------------------------------------------------------------------------------------------------------------- parameters

Schemas = tuple[ParameterSchema | None, ParameterSchema | None]
"""The catalog's and the manifest's, for one location."""
_TREATED = {Comparison.WIDER: WIDER, Comparison.NARROWER: NARROWER, Comparison.CHANGED: CHANGED, Comparison.EQUAL: EQUAL}


def parameters(before: Schemas, after: Schemas) -> Direction:
    """What it means that calls must pass these schemas and no longer those."""
    sources = [[schema.source for schema in pair if schema] for pair in (before, after)]
    direction = _TREATED[compare(*sources)]
    reread = _rereads(before[0], after[0]) or (direction is EQUAL and _rereads(after[0], before[0]))
    return CHANGED if reread and direction is not WIDER else direction


def _rereads(before: ParameterSchema | None, after: ParameterSchema | None) -> bool:
    """Whether a text (of a path, a query or a form) that was a string may now be read as something else, and pass by that.

    What is read as a string now but was not passes only where the schemas before let strings pass, which they didn't.
    """
    old, new = (_readings(schema) if schema else {} for schema in (before, after))
    return any(kind not in (old.get(name), *_AS_BEFORE.get(old.get(name, ""), ())) for name, kind in new.items())


_AS_BEFORE: Mapping[str, tuple[str, ...]] = {"number": ("integer",), "array of number": ("array of integer",)}


_TYPED = ("integer", "number", "boolean")


def _readings(schema: ParameterSchema) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, kind in schema.types.items():
        items = schema.source["properties"][name].get("items") if kind == "array" else None
        one = items.get("type", "") if isinstance(items, dict) else ""
        typed = one if one in _TYPED else "text"
        found |= {name: f"array of {typed}"} if kind == "array" else {name: kind} if kind in _TYPED else {}
    return found


# ------------------------------------------------------------------------------------------------------------------ approval


def approval(before: Approval | None, after: Approval | None) -> Iterator[Step]:
    """Who must say yes."""
    rules = tuple(each.rule for each in (before, after) if each)
    if before is None or after is None:
        yield Step("approval", NARROWER if after else WIDER, _asked(before), _asked(after), rules)
        return
    for step in compared(APPROVAL, before, after):
        yield step._replace(rules=rules)


def _asked(asked: Approval | None) -> str:
    return said(asked) if asked else ""


def _groups(before: frozenset[str], after: frozenset[str]) -> Iterator[Step]:
    """In none of them, anybody counts."""
    grown = not after or (bool(before) and after > before)
    shrunk = not before or (bool(after) and after < before)
    yield Step("approval", WIDER if grown else NARROWER if shrunk else CHANGED, f"groups {said(before)}", f"groups {said(after)}")


def _when(before: Mapping[str, ParameterSchema], after: Mapping[str, ParameterSchema]) -> Iterator[Step]:
    """Only calls that fit need it: the fewer fit, the more pass without."""
    for location in sorted({*before, *after}):
        old, new = ([each[location].source] if location in each else [True] for each in (before, after))
        direction = _OPPOSITE[_TREATED[compare(old, new)]]
        texts = [each[location].text if location in each else "" for each in (before, after)]
        if texts[0] != texts[1]:
            yield Step("approval", direction, f"when {texts[0]}", f"when {texts[1]}")


APPROVAL: Table = {
    "rule": ignored,
    "approvers": more("approval", NARROWER),
    "groups": _groups,
    "expires": more("approval", WIDER),
    "when": _when,
}


# -------------------------------------------------------------------------------------------------------------------- limits


def limit(before: Limit | None, after: Limit | None) -> Iterator[Step]:
    """One bound of one scope."""
    kind = "flow" if (after or before or _NEVER).kind is Kind.FLOW else "limit"
    old, new, rules = _bound(before), _bound(after), tuple(each.rule for each in (before, after) if each)
    if before is None or after is None:
        yield Step(kind, NARROWER if after else WIDER, old, new, rules)
    elif kind == "flow":
        for step in approval(before.unless, after.unless) if before.unless != after.unless else ():
            direction = step.direction if before.unless and after.unless else _OPPOSITE[step.direction]
            yield step._replace(kind=kind, direction=direction, rules=rules)
    elif (before.amount, before.per, before.burst) != (after.amount, after.per, after.burst):
        direction = NARROWER if _within(after, before) else WIDER if _within(before, after) else CHANGED
        yield Step(kind, direction, old, new, rules)


_NEVER = Limit("label", "", 0, "")


def _bound(each: Limit | None) -> str:
    if each is None:
        return ""
    if each.kind is Kind.FLOW:
        return f"denied after {', '.join(each.after)}" + (", unless approved" if each.unless else "")
    return each.written + (f" (burst {each.burst:,})" if each.burst else "")


def _within(inner: Limit, outer: Limit) -> bool:
    """Whether what one bound admits the other admits: windows begin together where one is a multiple of the other."""
    longer = inner.per == outer.per or (outer.per > 0 and inner.per > outer.per and inner.per % outer.per == 0)
    return inner.amount <= outer.amount and inner.burst <= outer.burst and longer


# ------------------------------------------------------------------------------------------------------------------- catalog


def host(endpoint: Endpoint) -> str:
    """Where calls go, without the path."""
    return f"{endpoint.scheme}://{endpoint.host_port}"


def _endpoint(before: Endpoint, after: Endpoint) -> Iterator[Step]:
    yield Step("endpoint", CHANGED, host(before) + before.base_path, host(after) + after.base_path)


def credential(before: CredentialSpec | None, after: CredentialSpec | None) -> Iterator[Step]:
    """What calls get with them."""
    if before is None or after is None:
        yield Step("credential", WIDER if after else NARROWER, _issued(before), _issued(after))
    else:
        yield from compared(CREDENTIAL, before, after)


def _issued(spec: CredentialSpec | None) -> str:
    return f"{spec.issuer} in {spec.placed}, {said(spec.settings)}" if spec else ""


def _settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Step]:
    for step in entries("credential", CHANGED)(before, after):
        lists = [each.get(step.about) for each in (before, after)]
        if step.about == "scopes" and all(isinstance(each, list) for each in lists):
            yield from (each._replace(about="scopes") for each in members("credential", WIDER)(*lists))
        else:
            yield step


CREDENTIAL: Table = {
    "issuer": differs("credential"),
    "settings": _settings,
    "header": differs("credential"),
    "template": differs("credential"),
    "basic": differs("credential"),
    "sigv4": differs("credential"),
}
UPSTREAM: Table = {"ca_pem": differs("upstream"), "addresses": members("upstream", WIDER)}
TOOL: Table = {
    "name": ignored,
    "owner": differs("owner", EQUAL),
    "protocol": differs("protocol"),
    "endpoint": _endpoint,
    "rule": ignored,
    "operations": ignored,  # each by itself
    "upstream": partial(compared, UPSTREAM),
    "credential": credential,
    "external": more("egress", NARROWER),
}
OPERATION: Table = {
    "name": ignored,
    "effect": differs("effect"),
    "rule": ignored,
    "data": members("data", NARROWER),
    "method": differs("match"),
    "template": differs("match"),
    "alias": differs("match"),
    "schemas": ignored,  # with the manifest's
    "max_body": more("max_body", WIDER),
    "scrub": ranked("scrub", "unsafe_never", "auto", "always"),
    "idempotency": present("idempotency", NARROWER),
}


# -------------------------------------------------------------------------------------------------------------------- agents


def _pins(before: Mapping[str, tuple[str, ...]], after: Mapping[str, tuple[str, ...]]) -> Iterator[Step]:
    """A credential is narrowed to them."""
    return entries("credential", NARROWER, members("credential", WIDER))(before, after)


def _exposed(before: Mapping[str, Iterable[str]], after: Mapping[str, Iterable[str]]) -> Iterator[Step]:
    """What shadow mode lets pass of the catalog; an empty name stands for what the catalog does not know."""
    old, new = ([f"{tool}/{name or '*'}" for tool, names in each.items() for name in names] for each in (before, after))
    return members("shadow", WIDER)(old, new)


GRANT: Table = {
    "rule": ignored,
    "schemas": ignored,  # with the catalog's
    "approval": approval,
    "limits": ignored,  # of all grants together, or an agent's limit would be told for each
    "models": members("model", WIDER),
    "server_tools": members("server_tools", WIDER),
    "max_output": more("max_output", WIDER),
    "pins": _pins,
    "expires": later("expires"),
    "shadow_until": later("shadow"),
}
AGENT: Table = {
    "name": ignored,
    "owner": differs("owner"),
    "oncall": differs("oncall", EQUAL),
    "rule": ignored,
    "tools": ignored,  # each grant by itself
    "spiffe": present("identity", WIDER),
    "token": more("identity", WIDER),
    "namespace": present("identity", WIDER),
    "housekeeping": ignored,  # with the limits of grants
    "answers": ignored,  # the same
    "limits": ignored,  # those that bear on grants
    "shadow": _exposed,
    "shadow_until": later("shadow"),
}


# ------------------------------------------------------------------------------------------------------------------ platform

_WEAKER: Mapping[Action, frozenset[Action]] = {
    Action.ALERT: frozenset({Action.ALERT}),
    Action.HOLD: frozenset({Action.ALERT, Action.HOLD}),
    Action.READ_ONLY: frozenset({Action.ALERT, Action.HOLD, Action.READ_ONLY}),
    Action.REVOKE_RUN: frozenset({Action.ALERT, Action.REVOKE_RUN}),
    Action.REVOKE_AGENT: frozenset(Action),
}
"""What each action does at least. A revoked run stops reads too, but the next run may write: it is not beside `read_only`."""


def _rules(before: Sequence[Rule], after: Sequence[Rule]) -> Iterator[Step]:
    for detector in Detector:
        old, new = ([each for each in rules if each.detector is detector] for rules in (before, after))
        if _written(old) != _written(new):
            stronger = all(any(_covers(each, other) for each in new) for other in old)
            weaker = all(any(_covers(each, other) for each in old) for other in new)
            direction = EQUAL if stronger and weaker else NARROWER if stronger else WIDER if weaker else CHANGED
            places = tuple(each.rule for each in (*old, *new) if each.rule)
            yield Step("containment", direction, _written(old), _written(new), places, detector)


def _written(rules: Sequence[Rule]) -> str:
    return ", then ".join(
        f"{each.action} at {each.count} in {each.window} s, quiet for {each.cooldown} s{', shadow' if each.shadow else ''}"
        for each in rules
    )


def _covers(rule: Rule, other: Rule) -> bool:
    """Whether it fires whenever the other does, and does no less."""
    stricter = rule.count <= other.count and rule.cooldown <= other.cooldown and rule.shadow <= other.shadow
    longer = rule.window >= other.window if rule.window and other.window else rule.window == other.window
    return stricter and longer and other.action in _WEAKER[rule.action]


def _prices(before: Mapping[tuple[str, str], Price], after: Mapping[tuple[str, str], Price]) -> Iterator[Step]:
    """Without a price a call is denied, unless the model has another one: a tool's own comes before its protocol's."""
    others = {model for _, model in after}
    for step in entries("price", WIDER, _price)(before, after):
        replaced = not step.after and step.about.partition("/")[2] in others
        yield step._replace(direction=CHANGED) if replaced else step


def _price(before: Price, after: Price) -> Iterator[Step]:
    """The dearer a model, the sooner a budget ends."""
    old, new = (asdict(each) for each in (before, after))
    dearer, cheaper = all(new[part] >= old[part] for part in old), all(new[part] <= old[part] for part in old)
    yield Step("price", NARROWER if dearer else WIDER if cheaper else CHANGED, said(old), said(new))


DECOYS: Table = {
    "hosts": members("decoy", NARROWER),
    "tools": members("decoy", NARROWER),
    "credentials": members("decoy", NARROWER),
}
ALERTING: Table = {
    "routes": differs("alerts"),
    "sinks": entries("alerts", NARROWER),
    "fallback": present("alerts", NARROWER),
    "per_minute": more("alerts", NARROWER),
}
PLATFORM: Table = {
    "revision": ignored,
    "agents": ignored,  # each by itself
    "tools": ignored,  # for each agent that has them
    "hosts": ignored,  # made of the tools
    "by_spiffe": ignored,  # made of the agents
    "trust_bundles": entries("identity", WIDER),
    "spire": differs("identity"),
    "max_ttl": more("credential", WIDER),
    "environment": differs("environment"),
    "prices": _prices,
    "unsafe_reads": more("ledger", WIDER),
    "refuse_own": more("credential", NARROWER),
    "rules": _rules,
    "decoys": partial(compared, DECOYS),
    "alerting": partial(compared, ALERTING),
}
