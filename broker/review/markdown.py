"""A diff as a comment on a pull request.

Laws: what comes from files is shown as code, so that nothing in it is markup, a link or a mention. It begins with what was
widened, and it fits into a comment; what is left out is counted.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import takewhile

from broker.errors import counted
from broker.manifest.diff import Change, Diff
from broker.manifest.findings import printable
from broker.manifest.steps import Direction

MOST = 65_000
"""UTF-8 bytes: GitHub takes comments of 65,536 characters."""
_LONGEST = 240  # characters of one value
_CONTEXT = 60  # characters before a difference
_NAMED = 3  # agents
_ORDER = (Direction.WIDER, Direction.CHANGED, Direction.NARROWER, Direction.EQUAL_EFFECT)
_SAID = {
    Direction.WIDER: "wider",
    Direction.CHANGED: "changed (treat as wider)",
    Direction.NARROWER: "narrower",
    Direction.EQUAL_EFFECT: "without effect",
}
_Group = tuple[tuple[str, ...], Sequence[Change]]
"""Agents, and the changes that they have in common."""


def as_markdown(diff: Diff) -> str:
    """GitHub's Markdown: one sentence, then the changes, the widest first, together where agents have them in common."""
    groups = _groups(diff.changes)
    lines = [f"{_summary(groups)}\n"]
    left = MOST - len(lines[0].encode())
    rows = [row for group in groups for row in _rows(*group)]
    if sum(len(row.encode()) for row, _ in rows) > left:  # not all will stand there, so agents' changes are torn apart
        parts = ([change for change in diff.changes if change.direction is direction] for direction in _ORDER)
        rows = [row for part in parts for group in _groups(part) for row in _rows(*group)]
    for index, (row, _) in enumerate(rows):
        left -= len(row.encode())
        if left < _LONGEST:
            rest = counted(sum(each for _, each in rows[index:]), "more change")
            return "".join((*lines, f"\n{rest} left out here; `broker diff --json` lists every one.\n"))
        lines.append(row)
    return "".join(lines)


def _groups(changes: Sequence[Change]) -> list[_Group]:
    alike: dict[tuple[object, ...], list[Change]] = {}
    for change in changes:
        what = (change.kind, change.about, change.direction, change.before, change.after)
        alike.setdefault(what, []).append(change)
    shared: dict[tuple[str, ...], list[Change]] = {}
    for same in alike.values():
        shared.setdefault(tuple(change.agent for change in same), []).append(same[0])
    groups = [(agents, sorted(common, key=_rank)) for agents, common in shared.items()]
    return sorted(groups, key=lambda group: (_rank(group[1][0])[0], group[0]))


def _rank(change: Change) -> tuple[int, str, str]:
    return _ORDER.index(change.direction), change.kind, change.about


def _summary(groups: Sequence[_Group]) -> str:
    found = Counter(change.direction for _, changes in groups for change in changes)
    told = [f"{found[direction]:,} {_SAID[direction]}" for direction in _ORDER if found[direction]]
    agents = {agent for names, _ in groups for agent in names}
    whom = [f"{len(agents - {''}):,} agent{'' if len(agents - {''}) == 1 else 's'}"] if agents - {""} else []
    whom += ["everybody"] if "" in agents else []
    return f"**{', '.join(told)}** for {' and '.join(whom)}" if told else "**Nothing changes** in what agents may do."


def _rows(agents: tuple[str, ...], changes: Sequence[Change]) -> Iterator[tuple[str, int]]:
    """Lines, and how many changes each is about."""
    named = ", ".join(code(name) for name in agents[:_NAMED]) if agents != ("",) else "Everybody"
    others = f" and {len(agents) - _NAMED:,} more" if len(agents) > _NAMED else ""
    yield f"\n### {named}{others}\n\n", 0
    for change in changes:
        values = " → ".join(code(value) if value else "nothing" for value in _around(change.before, change.after))
        where = ", ".join(code(rule) for rule in change.rules[:2])
        yield (
            f"- **{_SAID[change.direction]}** {change.kind} {code(change.about)}: {values}{f' ({where})' if where else ''}\n",
            1,
        )


def _around(before: str, after: str) -> tuple[str, str]:
    """Of long values, what follows from a little before the first difference."""
    if max(len(before), len(after)) <= _LONGEST:
        return before, after
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before, after, strict=False)))
    begin = same - _CONTEXT
    return (before, after) if begin <= 0 else (f"…{before[begin:]}", f"…{after[begin:]}")


def code(text: str) -> str:
    """As a code span (CommonMark 6.1), which holds no markup: fenced by more backticks than stand in it."""
    shown = printable(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    pad = " " if shown[:1] in ("`", " ", "") or shown[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"
