"""What a change of manifests, catalog or platform policy lets agents do, and what it stops.

Laws: a change is `narrower` only where it surely is; what is neither is `changed` and counts as wider. Whatever differs is told,
also a field that no table knows; only where something is written may change without a word. A changed catalog entry is told for
each agent that it bears on. What each field means stands in `meanings`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from broker.manifest import meanings
from broker.manifest.steps import Direction, Step, compared, later
from broker.policy.limits import Limit
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import Agent, Grant, Operation, PolicySnapshot, Tool


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """One thing that is not as it was: for an agent, or for everybody (an empty name).

    `about` says what of it: `tool/operation`, a host, a limit's scope. `before` and `after` are for people, empty where there was
    or is nothing; `rules` (`file#pointer`) is where that is written.
    """

    agent: str
    about: str
    kind: str
    direction: Direction
    before: str
    after: str
    rules: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Diff:
    """All changes, sorted: by agent, then by what they are about."""

    changes: tuple[Change, ...]

    @property
    def widens(self) -> bool:
        """Whether a change is wider, or may be."""
        return any(change.direction in (Direction.WIDER, Direction.CHANGED) for change in self.changes)


def diff(base: PolicySnapshot, head: PolicySnapshot) -> Diff:
    """What is different under `head`."""
    return Diff(tuple(sorted({*_Comparing(base, head).changes()}, key=lambda change: (change.agent, change.about, change))))


_Place = tuple[str, str]
"""A tool and an operation."""
_Grants = Mapping[str, Grant]
_Bound = tuple[str, str, tuple[str, ...], int]
"""What makes a limit the same one: whose, its word, after which labels, and how many such stand before it."""


class _Comparing:
    """Two snapshots, and what was found out about their catalogs: it is the same for all agents."""

    def __init__(self, base: PolicySnapshot, head: PolicySnapshot) -> None:
        self.base, self.head = base, head
        self._catalog: dict[str | _Place, tuple[Step, ...]] = {}
        self._routes: dict[str, tuple[tuple[str, Step], ...]] = {}
        self._parameters: dict[object, Direction] = {}

    def changes(self) -> Iterator[Change]:
        yield from (_change("", "platform", step) for step in compared(meanings.PLATFORM, self.base, self.head))
        for name in {*self.base.agents, *self.head.agents}:
            yield from (
                _change(name, "agent", step) for step in self._agent(self.base.agents.get(name), self.head.agents.get(name))
            )
        yield from self._unused()

    def _agent(self, before: Agent | None, after: Agent | None) -> Iterator[Step]:
        if before is after and before and all(self.base.tools[name] is self.head.tools[name] for name in before.tools):
            return
        if before is None or after is None:
            direction = Direction.NARROWER if before else Direction.WIDER
            yield Step("agent", direction, _who(before), _who(after), _rules(before, after))
        else:
            yield from (step._replace(rules=(after.rule,)) for step in compared(meanings.AGENT, before, after))
            yield from _limits(before, after)
        old, new = _tools(before), _tools(after)
        yield from _come_or_gone("tool", _entries(before, self.base), _entries(after, self.head))
        yield from _come_or_gone("host", self._hosts(self.base, old), self._hosts(self.head, new))
        for name in {*old, *new}:
            yield from self._granted(name, old.get(name), new.get(name))

    def _hosts(self, snapshot: PolicySnapshot, tools: Iterable[str]) -> Mapping[str, tuple[str, str]]:
        found = (snapshot.tools[name] for name in tools)
        return {meanings.host(tool.endpoint): (tool.name, tool.rule) for tool in found}

    def _granted(self, name: str, before: _Grants | None, after: _Grants | None) -> Iterator[Step]:
        """One tool of an agent."""
        if before is None or after is None:
            snapshot = self.base if after is None else self.head
            tool = snapshot.tools[name]
            specs = (tool.credential, None) if after is None else (None, tool.credential)
            yield from (_at(step, name, tool.rule) for step in (meanings.credential(*specs) if tool.credential else ()))
        else:
            yield from self._tool(name)
            yield from (step for operation, step in self._rerouted(name) if operation in before and operation in after)
        old, new = before or {}, after or {}
        declared = [each.tools[name].operations if name in each.tools else {} for each in (self.base, self.head)]
        yield from _come_or_gone(
            "operation",
            {f"{name}/{each}": (_does(declared[0][each]), old[each].rule) for each in old.keys() - new.keys()},
            {f"{name}/{each}": (_does(declared[1][each]), new[each].rule) for each in new.keys() - old.keys()},
        )
        if old and after == {} and (end := max(grant.expires for grant in old.values())) < math.inf:
            # With its last grant the protocol's own traffic would have ended; without any it does not.
            yield from (_at(step, name, self.head.tools[name].rule) for step in later("expires")(end, math.inf))
        for operation in old.keys() & new.keys():
            yield from self._grant((name, operation), old[operation], new[operation])

    def _tool(self, name: str) -> tuple[Step, ...]:
        before, after = self.base.tools[name], self.head.tools[name]
        if name not in self._catalog:
            found = compared(meanings.TOOL, before, after) if before is not after else ()
            self._catalog[name] = tuple(_at(step, name, after.rule) for step in found)
        return self._catalog[name]

    def _rerouted(self, name: str) -> tuple[tuple[str, Step], ...]:
        if name not in self._routes:
            before, after = self.base.tools[name], self.head.tools[name]
            found = [*meanings.rerouted(before, after)] if before is not after else []
            for operation, step in meanings.rerouted(after, before) if before is not after else ():
                back = step._replace(direction=Direction.NARROWER, before=step.after, after=step.before)
                found.append((operation, back))
            self._routes[name] = tuple((operation, step._replace(about=f"{name}/{operation}")) for operation, step in found)
        return self._routes[name]

    def _operation(self, place: _Place) -> tuple[Step, ...]:
        if place not in self._catalog:
            before, after = (_declared(each, place) for each in (self.base, self.head))
            found = compared(meanings.OPERATION, before, after) if before is not after else ()
            self._catalog[place] = tuple(_at(step, "/".join(place), after.rule) for step in found)
        return self._catalog[place]

    def _grant(self, place: _Place, before: Grant, after: Grant) -> Iterator[Step]:
        yield from self._operation(place)
        old, new = (_declared(each, place) for each in (self.base, self.head))
        if before is after and old is new:
            return
        about = "/".join(place)
        for step in compared(meanings.GRANT, before, after):
            # A pin narrows credentials, so that it means nothing where there is none.
            if step.kind != "credential" or self.head.tools[place[0]].credential:
                yield _at(step, about, after.rule)
        for location in {*old.schemas, *new.schemas, *before.schemas, *after.schemas}:
            yield from self._location(about, location, (old, before), (new, after))

    def _location(
        self, about: str, location: str, before: tuple[Operation, Grant], after: tuple[Operation, Grant]
    ) -> Iterator[Step]:
        """What one location's parameters must be."""
        was = before[0].schemas.get(location), before[1].schemas.get(location)
        now = after[0].schemas.get(location), after[1].schemas.get(location)
        texts = tuple(tuple(schema and schema.text for schema in each) for each in (was, now))
        if texts[0] == texts[1]:
            return  # one that stands elsewhere now, at most
        if texts not in self._parameters:
            self._parameters[texts] = meanings.parameters(was, now)
        # Of the catalog's and the manifest's schema those that are not as they were.
        other = [pair for pair in zip(was, now, strict=True) if (pair[0] and pair[0].text) != (pair[1] and pair[1].text)]
        old, new = (" and ".join(schema.text for schema in each if schema) for each in zip(*other, strict=True))
        places = _rules(*(schema for pair in other for schema in (pair[1] or pair[0],)))
        yield Step("parameters", self._parameters[texts], old, new, places, f"{about} {location}")

    def _unused(self) -> Iterator[Change]:
        """What changed in the catalog and bears on no agent, or on those in shadow mode alone."""
        exposed = {name for agent in self.head.agents.values() for name in agent.shadow}
        for name in {*self.base.tools, *self.head.tools}:
            before, after = self.base.tools.get(name), self.head.tools.get(name)
            if before is None or after is None:
                step = Step("catalog", Direction.EQUAL_EFFECT, _lies(before), _lies(after), _rules(before, after))
                yield _change("", name, step)
            elif before is not after:
                for step in self._untold(before, after):
                    direction = step.direction if name in exposed else Direction.EQUAL_EFFECT
                    yield _change("", name, step._replace(direction=direction))

    def _untold(self, before: Tool, after: Tool) -> Iterator[Step]:
        if after.name not in self._catalog:
            yield from self._tool(after.name)
        for name in sorted({*before.operations, *after.operations}):
            place = (after.name, name)
            old, new = before.operations.get(name), after.operations.get(name)
            if old is None or new is None:
                yield _at(Step("operation", Direction.EQUAL_EFFECT, _does(old), _does(new)), "/".join(place), after.rule)
            elif place not in self._catalog:
                yield from self._grant(place, _NO_GRANT, _NO_GRANT)


_NO_GRANT = Grant("")


def _change(agent: str, about: str, step: Step) -> Change:
    return Change(agent, step.about or about, step.kind, step.direction, step.before, step.after, step.rules)


def _at(step: Step, about: str, rule: str) -> Step:
    """The step with where it is, as far as it doesn't say so itself."""
    return step._replace(about=f"{about} {step.about}".rstrip(), rules=step.rules or (rule,))


def _declared(snapshot: PolicySnapshot, place: _Place) -> Operation:
    return snapshot.tools[place[0]].operations[place[1]]


def _tools(agent: Agent | None) -> Mapping[str, Mapping[str, Grant]]:
    return agent.tools if agent else {}


def _entries(agent: Agent | None, snapshot: PolicySnapshot) -> Mapping[str, tuple[str, str]]:
    """The tools that it lists, be it without operations: their protocols' own traffic passes."""
    return {name: (snapshot.tools[name].protocol, f"{agent.rule}/spec/tools/{name}") for name in agent.tools} if agent else {}


def _who(agent: Agent | None) -> str:
    return f"{sum(map(len, agent.tools.values()))} operations of {agent.owner}" if agent else ""


def _does(operation: Operation | None) -> str:
    return ", ".join((operation.effect, *operation.data)) if operation else ""


def _lies(tool: Tool | None) -> str:
    return meanings.host(tool.endpoint) if tool else ""


def _rules(*parts: Agent | Tool | ParameterSchema | None) -> tuple[str, ...]:
    return tuple(part.rule for part in parts if part)


def _come_or_gone(kind: str, old: Mapping[str, tuple[str, str]], new: Mapping[str, tuple[str, str]]) -> Iterator[Step]:
    """What is reached on one side only; each has a word about it, and where it is written."""
    yield from (Step(kind, Direction.WIDER, "", new[about][0], (new[about][1],), about) for about in new.keys() - old.keys())
    yield from (Step(kind, Direction.NARROWER, old[about][0], "", (old[about][1],), about) for about in old.keys() - new.keys())


def _limits(before: Agent, after: Agent) -> Iterator[Step]:
    """Those that bear on what the agent may do both before and after. One that comes or goes for all of it is told once."""
    was, now = _bearing(before, after), _bearing(after, before)
    differing = {place: (was[place], now[place]) for place in was if was[place] != now[place]}
    kept = [{key for limits in each.values() for key in _by_identity(limits)} if differing else set() for each in (was, now)]
    for place, pair in differing.items():
        old, new = map(_by_identity, pair)
        for key in old.keys() | new.keys():
            here = key in kept[0] and key in kept[1] and not (key in old and key in new)
            about = place if here else key[0] or f"after {' and '.join(key[2])}"
            yield from (step._replace(about=about) for step in meanings.limit(old.get(key), new.get(key)))
    if before.limits != after.limits:
        yield from _idle_limits(
            before, after, {key for each in (was, now) for bounds in each.values() for key in _by_identity(bounds)}
        )


def _idle_limits(before: Agent, after: Agent, bearing: set[_Bound]) -> Iterator[Step]:
    """Those that bear on nothing that the agent does; one of an operation is told of with the operation."""
    old, new = _by_identity(before.limits), _by_identity(after.limits)
    for key in (old.keys() | new.keys()) - bearing:
        if not key[0].startswith(f"agent/{after.name}/"):
            for step in meanings.limit(old.get(key), new.get(key)):
                yield step._replace(direction=Direction.EQUAL_EFFECT, about=key[0])


def _bearing(agent: Agent, other: Agent) -> Mapping[str, tuple[Limit, ...]]:
    """By operation (and protocol's own traffic) that both have, be it in shadow mode only."""
    found: dict[str, tuple[Limit, ...]] = {}
    for tool in agent.housekeeping.keys() & other.housekeeping.keys():
        grants = agent.grants(tool)
        for operation in grants.keys() & other.grants(tool).keys():
            found[f"{tool}/{operation or '*'}"] = grants[operation].limits
        found[f"{tool} housekeeping"], found[f"{tool} answers"] = agent.housekeeping[tool], agent.answers[tool]
    return found


def _by_identity(limits: Iterable[Limit]) -> dict[_Bound, Limit]:
    """Labels bound nothing. A flow rule's scope is its number, which rules before it shift: it is known by its labels."""
    found: dict[_Bound, Limit] = {}
    for each in limits:
        if each.word != "label":
            place = ("", each.word, each.after) if each.after else (each.scope, each.word, ())
            found[*place, sum(key[:3] == place for key in found)] = each
    return found
