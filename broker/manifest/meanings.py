"""What a difference in each field of the snapshot's parts means.

Law: a table names every field of its part. A field that a table lacks is told as `changed`, and a test names it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from itertools import zip_longest
from typing import Any

from broker.manifest.steps import (
    CHANGED,
    EQUAL,
    NARROWER,
    OPPOSITE,
    WIDER,
    Direction,
    Step,
    Table,
    compared,
    differs,
    entries,
    ignored,
    later,
    members,
    more,
    present,
    ranked,
    said,
)
from broker.policy.approval import Approval
from broker.policy.compare import Comparison, compare
from broker.policy.containment import Action, Detector, Rule
from broker.policy.limits import Kind, Limit, Price
from broker.policy.match import PathTemplate
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import CredentialSpec, Endpoint, Tool

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
        direction = OPPOSITE[_TREATED[compare(old, new)]]
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
            direction = step.direction if before.unless and after.unless else OPPOSITE[step.direction]
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


def _template(before: PathTemplate | None, after: PathTemplate | None) -> Iterator[Step]:
    yield Step("match", CHANGED, before.text if before else "", after.text if after else "")


def _hashed(pem: str) -> str:
    return f"certificates {sha256(pem.encode()).hexdigest()[:16]}" if pem else ""


def _authorities(before: str, after: str) -> Iterator[Step]:
    """None are the system's."""
    yield Step("upstream", CHANGED, _hashed(before), _hashed(after))


def _bundles(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[Step]:
    hashes = [{domain: _hashed(pem) for domain, pem in each.items()} for each in (before, after)]
    return entries("identity", WIDER)(*hashes)


def rerouted(before: Tool, after: Tool) -> Iterator[tuple[str, Step]]:
    """Operations whose calls may be others' now: one that is gone, or matches otherwise, no longer keeps its calls from them."""
    for gone in before.operations.values():
        same = after.operations.get(gone.name)
        if same is None or (same.method, same.template) != (gone.method, gone.template):
            for other in after.operations.values():
                if other.name != gone.name and other.method == gone.method and _overlap(gone.template, other.template):
                    yield other.name, Step("match", WIDER, f"not the calls of {gone.name}", "perhaps those too", (other.rule,))


def _overlap(one: PathTemplate | None, other: PathTemplate | None) -> bool:
    """Whether a path may fit both."""
    for left, right in zip_longest(one.parts if one else (), other.parts if other else ()):
        if left is None or right is None:
            return False
        if "+" in (left[0] and left[1], right[0] and right[1]):
            return True
        if left[0] is None and right[0] is None and left[1] != right[1]:
            return False
    return one is not None


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
        # Without any, an issuer asks for none, and the server gives what it likes.
        if step.about == "scopes" and all(isinstance(each, list) and each for each in lists):
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
UPSTREAM: Table = {"ca_pem": _authorities, "addresses": members("upstream", WIDER)}
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
    "template": _template,
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
    "trust_bundles": _bundles,
    "spire": differs("identity"),
    "max_ttl": more("credential", WIDER),
    "environment": differs("environment"),
    "prices": _prices,
    "unsafe_reads": more("ledger", WIDER),
    "refuse_own": more("credential", NARROWER),
    "rules": _rules,
    "decoys": partial(compared, DECOYS),
    "alerting": partial(compared, ALERTING),
    "admission": present("admission", NARROWER),
}
