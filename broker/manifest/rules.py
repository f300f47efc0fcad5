"""What the platform asks of manifests before they are admitted, and what lapses by itself.

Laws: each problem names its fix. A ceiling is kept by every manifest; the other rules are warnings until the platform policy has
an `admission`, which makes them errors.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from broker.manifest.models import Agent, GrantSpec, OperationSpec, ToolSpec
from broker.manifest.platform import Platform, PlatformSpec
from broker.manifest.strict_yaml import Document, Pointer
from broker.manifest.words import Ceilings, Rate
from broker.policy.types import Effect

Problem = tuple[Pointer, str, str]
"""Where, which code, and what is wrong; what to do."""

ADMISSION = frozenset({"tool_not_approved", "owner_unknown", "oncall_missing", "destructive_unbounded"})
"""The codes that are warnings where the platform policy has no `admission`."""
SOON_S = 14 * 86_400
"""How long before its end a grant is warned about: time for a pull request, and for whoever reviews it to be on holiday."""


def rules(
    model: Agent, policy: Platform | None, catalog: Mapping[str, tuple[ToolSpec, Document]], now: float
) -> Iterator[Problem]:
    """What the platform policy says of this manifest. `now` in seconds since the epoch: shadow mode enforces no pins."""
    if policy is None:
        return
    spec, metadata = policy.spec, model.metadata
    team = spec.teams.get(metadata.owner)
    if team is None and (spec.teams or spec.admission):
        why = f"{metadata.owner!r} is none of the platform's teams; write one of {', '.join(spec.teams) or 'them into teams'}"
        yield ("metadata", "owner"), "owner_unknown", why
    if not (metadata.oncall or (team and team.oncall)):
        why = "nobody is on call for this agent; write oncall beside the owner, or give the team one in the platform policy"
        yield ("metadata",), "oncall_missing", why
    approved = spec.admission.tools if spec.admission else None
    for name, part in model.spec.tools.items():
        here: Pointer = ("spec", "tools", name)
        if approved is not None and name not in approved:
            yield (
                here,
                "tool_not_approved",
                f"the platform has not approved {name!r}; ask for it in admission.tools, or take it out",
            )
        for operation, grant in part.operations.items():
            declared = catalog[name][0].operations.get(operation) if name in catalog else None
            pinned = now >= max(model.spec.shadow_until or 0.0, grant.shadow_until or 0.0)
            if declared and declared.effect is Effect.DESTRUCTIVE and not _is_bounded(grant, declared, pinned=pinned):
                yield (*here, "operations", operation), "destructive_unbounded", _UNBOUNDED
    yield from _over(model, spec)


_UNBOUNDED = (
    "what can't be undone is granted without bounds; pin what it may touch (const, enum, or a pattern like ^draft-, "
    "for the parameter that names it) and let no shadow mode pass it, or ask a human each time (approval, without when)"
)


def _is_bounded(grant: GrantSpec, declared: OperationSpec, *, pinned: bool) -> bool:
    if grant.approval and not grant.approval.when:
        return True
    if not pinned:
        return False
    # Where the path names what is touched, a field of the body pins nothing.
    variables = [name for name, _ in declared.match.path.parts if name] if declared.match.path else []
    for location, schema in grant.params.items():
        above = [declared.params[location].source] if location in declared.params else []
        above += [{"type": "object"}] if location != "body" else []
        if location == "path" and _pins(schema.source, [*above, {"required": variables}], texts=True):
            return True
        if not variables and _pins(schema.source, above, texts=False):
            return True
    return False


def _pins(schema: Any, above: Sequence[Any], *, texts: bool) -> bool:
    """Whether it pins a parameter that every call has; `above` is what else is asked of the same values.

    `texts` says that a value without a type is a text.
    """
    if not isinstance(schema, dict):
        return False
    others, parts = [each for each in above if isinstance(each, dict)], schema.get("properties", {})
    if not any(each.get("type") == "object" for each in (schema, *others)):
        return False  # a list or a text would pass, whatever is asked of objects
    always = {name for each in (schema, *others) for name in each.get("required", ())}
    for name in always & parts.keys():
        beside = [each["properties"][name] for each in others if name in each.get("properties", {})]
        if _names(parts[name], beside, texts=texts) or _pins(parts[name], beside, texts=False):
            return True
    return False


def _names(schema: Any, above: Sequence[Any], *, texts: bool) -> bool:
    """Whether it lists what may be touched, or says what its name looks like: more than that it is a word or a number."""
    asked = [each for each in (schema, *above) if isinstance(each, dict)]
    if not isinstance(schema, dict):
        return False
    listed = [schema["const"]] if "const" in schema else schema.get("enum", ())
    kinds = {each["type"] for each in asked if isinstance(each.get("type"), str)}
    # A pattern binds texts alone.
    if "pattern" in schema and (kinds == {"string"} or (texts and not kinds)):
        return _begins(schema["pattern"])
    return any(value is not None and not isinstance(value, bool) for value in listed)


_PREFIXED = re.compile(r"\^(?:[\w/:@ -]|\\[^\w])+(?![?*{]).*", re.ASCII | re.DOTALL)
_INSIDE = re.compile(r"\\.|\[[^\]]*\]|\([^()|]*(?:\|[^()|]*)*\)", re.DOTALL)


def _begins(pattern: str) -> bool:
    """Whether the text must begin with certain characters (`^…`), in each of the pattern's alternatives."""
    if not _PREFIXED.fullmatch(pattern):
        return False
    rest = ""
    while rest != pattern:
        rest, pattern = pattern, _INSIDE.sub("", pattern)
    return "|" not in pattern


def _over(model: Agent, spec: PlatformSpec) -> Iterator[Problem]:
    """Limits that a manifest writes higher than its team or the environment may go together."""
    team = spec.teams.get(model.metadata.owner)
    ceilings = (
        (f"team {model.metadata.owner}", team.ceilings if team else None),
        (f"environment {spec.environment}".strip(), spec.ceilings),
    )
    for pointer, written in _limits(model):
        for word in Ceilings.model_fields:
            for whose, ceiling in ceilings:
                bound, asked = getattr(ceiling, word, None), getattr(written, word, None)
                if bound is not None and asked is not None and word != "burst" and _exceeds(asked, bound):
                    why = f"this is more than the whole {whose} may have; write at most its ceiling, or have that raised"
                    yield (*pointer, word), "ceiling_exceeded", why


def _limits(model: Agent) -> Iterator[tuple[Pointer, Ceilings]]:
    spec = model.spec
    if spec.limits:
        yield ("spec", "limits"), spec.limits
    for name, part in spec.tools.items():
        if part.limits:
            yield ("spec", "tools", name, "limits"), part.limits
        for operation, grant in part.operations.items():
            if grant.limits:
                yield ("spec", "tools", name, "operations", operation, "limits"), grant.limits


def _exceeds(asked: Rate | int, bound: Rate | int) -> bool:
    if isinstance(asked, Rate) and isinstance(bound, Rate):
        # In a shorter time than the ceiling's as much as it gives is no more than it gives.
        return asked.amount > bound.amount if asked.per <= bound.per else asked.amount * bound.per > bound.amount * asked.per
    return isinstance(asked, int) and isinstance(bound, int) and asked > bound


def lapses(model: Agent, now: float) -> Iterator[Problem]:
    """What has ended by itself, what will soon, and what is not enforced until then."""
    ends: list[tuple[Pointer, float | None]] = [(("spec", "shadow_until"), model.spec.shadow_until)]
    for name, part in model.spec.tools.items():
        for operation, grant in part.operations.items():
            here: Pointer = ("spec", "tools", name, "operations", operation)
            ends += [((*here, "expires"), grant.expires), ((*here, "shadow_until"), grant.shadow_until)]
    for pointer, end in ends:
        if end is None:
            continue
        what = "shadow mode" if pointer[-1] == "shadow_until" else "this grant"
        if end <= now:
            yield pointer, "lapsed", f"{what} has ended; take it out, or write a later {pointer[-1]}"
        elif pointer[-1] == "shadow_until":
            yield pointer, "shadow", "until then, calls that the manifest does not permit go through; take it out to enforce it"
        elif end <= now + SOON_S:
            yield pointer, "lapses_soon", f"{what} ends within {SOON_S // 86_400} days; renew it, if it is still needed"
