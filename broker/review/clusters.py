"""Denied calls in clusters: those of one agent, of one thing it tried, by one rule. So a million denials are read as ten.

Laws: a cluster's ID says what it is, so it is the same on every machine and from day to day. What would have been denied (shadow
mode) never mixes with what was. Everything here that a person will read has no credential in it; nothing is made printable yet.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from broker.audit.index import Index, Label, Shape, Wanted, shape_of
from broker.audit.record import canonical
from broker.policy.denials import KIND_OF, DenialKind, by_canary
from broker.policy.types import Code, Verdict
from broker.redaction import redacted

_SHOWN = 20  # decision IDs of a cluster
_LOOKED_AT = 10_000  # records of a cluster, for different ones: a loop repeats one call for ever
_EXAMPLE = ("time", "decision_id", "run_id", "method", "host", "path", "args", "violations", "detail")
_ORDER = {kind: number for number, kind in enumerate(DenialKind)}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Denied calls that belong together. `first` and `last` are seconds since the epoch.

    `what` is `tool/operation`; where no operation matched, the tool and what was tried, with each path segment that holds a digit
    as `*`; without a tool the host. `shadow` says that the calls passed and would have been denied. `ever_allowed` says whether
    this agent was ever allowed the same. `shapes` and `since` are for `latest`.
    """

    id: str
    kind: DenialKind
    agent: str
    what: str
    tool: str
    operation: str
    host: str
    code: str
    rule: str
    shadow: bool
    count: int
    first: float
    last: float
    ever_allowed: bool
    label: Label | None
    since: float | None
    shapes: tuple[int, ...]


def clusters(index: Index, now: float, since: float | None = None, agent: str = "") -> list[Cluster]:
    """The clusters of the denials since then: by kind, permissions first, and of a kind the most frequent first."""
    labels, allowed = index.labels(now), _ever_allowed(index)
    found = []
    for cluster_id, shapes in _grouped(index, Wanted(agent=agent, since=since)).items():
        ever, label = _tried(shapes[0]) in allowed, labels.get(cluster_id)
        found.append(_cluster(cluster_id, shapes, since, ever_allowed=ever, label=label))
    return sorted(found, key=lambda each: (_ORDER[each.kind], -each.count, -each.last, each.id))


def latest(index: Index, cluster: Cluster) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Of a cluster's latest record some fields, as an example, and the IDs of its latest 20 decisions, latest first.

    Of a call that ended badly, the example has what its decision says of the call. This is apart from `clusters`, since an agent
    that tries a hundred thousand hosts makes as many of them, and nobody looks at more than some.
    """
    rows = list(islice(index.latest(cluster.shapes, cluster.since), _SHOWN))
    told = [*decisions(index, [rows[0].decision_id or ""]), *index.records(rows[:1])]
    whole = {name: value for record in told for name, value in record.items() if value is not None}
    example = {name: hidden(whole.get(name)) for name in _EXAMPLE}
    return example, tuple(row.decision_id for row in rows if row.decision_id)


def exists(index: Index, cluster_id: str) -> bool:
    """Whether the log holds denials of this cluster."""
    return cluster_id in _grouped(index, Wanted())


def decisions(index: Index, decision_ids: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The records of these decisions as they are in the log, in the order asked for; unknown ones are left out."""
    for decision_id in decision_ids:
        yield from (each for each in index.records(index.decided(decision_id)) if each.get("event") == "decision")


def records(index: Index, cluster_id: str, most: int) -> list[dict[str, Any]]:
    """The latest decisions of a cluster as they are in the log, latest first, at most so many, and no two of the same parameters.

    Looks at the latest 10,000 only. Where the broker ended allowed calls, these are the decisions that allowed them.
    """
    rows = islice(index.latest(shape.id for shape in _grouped(index, Wanted()).get(cluster_id, ())), _LOOKED_AT)
    different: dict[Any, dict[str, Any]] = {}
    for row in rows:
        for record in decisions(index, [row.decision_id]) if row.decision_id else index.records([row]):
            different.setdefault(str(record.get("args_hash")), record)
        if len(different) >= most:
            break
    return list(different.values())[:most]


def shadowed(index: Index, agent: str) -> Iterator[dict[str, Any]]:
    """Every record of an agent's call that would have been denied, as it is in the log, in its order."""
    yield from index.records(index.find(Wanted(agent=agent, verdict=Verdict.WOULD_DENY)))


def attacks(index: Index, now: float, found: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Of these decisions those by which an agent tried what a reviewer called an attack of it, whatever rule it broke then."""
    hostile = {cluster for cluster, label in index.labels(now).items() if label.label == "attack"}
    tried_ = {_tried(shapes[0]) for cluster, shapes in _grouped(index, Wanted()).items() if cluster in hostile} if hostile else ()
    return frozenset(record["decision_id"] for record in found if _tried(shape_of(record)) in tried_)


def hidden(value: Any) -> Any:
    """A JSON value without credentials of well-known forms, in its keys neither."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, Mapping):
        return {redacted(str(key)): hidden(item) for key, item in value.items()}
    return [hidden(item) for item in value] if isinstance(value, list | tuple) else value


def _grouped(index: Index, wanted: Wanted) -> dict[str, list[Shape]]:
    groups: dict[str, list[Shape]] = {}
    for shape in index.denied(wanted):
        if not by_canary(shape.host, shape.code):
            groups.setdefault(_id(shape), []).append(shape)
    return groups


def _id(shape: Shape) -> str:
    words = [
        shape.agent,
        named(shape.tool, shape.operation, shape.host),
        shape.code,
        shape.rule,
        shape.verdict == Verdict.WOULD_DENY,
    ]
    return hashlib.sha256(canonical(words)).hexdigest()[:12]


def named(tool: str, operation: str, host: str) -> str:
    """What was called, or tried: `tool/operation`, `tool GET /path`, a tool or a host."""
    between = " " if " " in operation else "/"
    return f"{tool}{between}{operation}" if tool and operation else tool or host


def _ever_allowed(index: Index) -> set[tuple[str, str, str]]:
    """What `_tried` says of what was ever allowed. That of a tool or a host is allowed of which anything was."""
    allowed = index.allowed()
    return {
        found
        for agent, tool, operation, host in allowed
        for found in ((agent, tool, operation), (agent, tool, ""), (agent, "", host))
    }


def _tried(shape: Shape) -> tuple[str, str, str]:
    return (shape.agent, shape.tool, shape.operation if shape.tool else shape.host)


def _cluster(cluster_id: str, shapes: list[Shape], since: float | None, *, ever_allowed: bool, label: Label | None) -> Cluster:
    same = shapes[0]
    words = {name: redacted(getattr(same, name)) for name in ("agent", "tool", "operation", "host", "code", "rule")}
    return Cluster(
        id=cluster_id,
        kind=_kind(same.code),
        what=redacted(named(same.tool, same.operation, same.host)),
        **words,
        shadow=same.verdict == Verdict.WOULD_DENY,
        count=sum(shape.count for shape in shapes),
        first=min(shape.first for shape in shapes),
        last=max(shape.last for shape in shapes),
        ever_allowed=ever_allowed,
        label=label,
        since=since,
        shapes=tuple(shape.id for shape in shapes),
    )


def _kind(code: str) -> DenialKind:
    # A log may be of a newer broker than this one.
    return KIND_OF[Code(code)] if code in KIND_OF else DenialKind.FAULT
