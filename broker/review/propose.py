"""What a manifest would have to say so that certain denied calls pass, and when nobody should even be asked.

Laws: pure. A proposal is for a review by people and changes nothing by itself. It is refused where the answer is not a wider
manifest: what could not be read, who was not known, what failed, what people or flow rules forbid, limits, decoys, and every
agent that is under containment.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from broker.audit.record import args_hash
from broker.policy.denials import KIND_OF, DenialKind
from broker.policy.evaluate import evaluate
from broker.policy.providers import PROVIDERS
from broker.policy.snapshot import Agent, PolicySnapshot, Tool
from broker.policy.types import Code, ToolCall
from broker.review.narrowest import MOST, admitting, is_list, is_whole, listed, opened, thinned, unpinned, widened

Record = Mapping[str, Any]
Place = tuple[str, ...]
_WITH_BODY = ("POST", "PUT", "PATCH")

_NO = {
    DenialKind.MALFORMED: "it could not be read in exactly one way; the agent's request must change, not its manifest",
    DenialKind.IDENTITY: "nobody proved to be an agent; no manifest can help",
    DenialKind.FAULT: "the broker or the tool failed; find the cause, the call itself may be in order",
    DenialKind.PEOPLE: "a flow rule or a person stands against it; `broker approvals` has what waits for people",
    DenialKind.CONTAINMENT: "the agent was cut off; find out why first",
    DenialKind.LIMIT: "a limit was reached; how much an agent may spend is for people to say, in the manifest's limits",
}


@dataclass(frozen=True, slots=True)
class Edit:
    """One change of an agent's manifest: what is to stand at `place` (keys from the document's root), and the calls that ask."""

    agent: str
    file: str
    place: Place
    value: Any
    calls: tuple[Record, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """A denial for which nothing is proposed, and why."""

    record: Record
    why: str


_TEXTS = ("decision_id", "event", "time", "host", "method", "path", "verdict", "args_hash")
_MAYBE = ("code", "rule", "tool", "operation", "effect", "detail")
_VIOLATION = ("pointer", "rule", "message")


def is_sound(record: Record) -> bool:
    """Whether a decision's record has what is asked of it here; in a log that somebody changed it may not, or in a newer one."""
    agent, args, violations = record.get("agent"), record.get("args"), record.get("violations")
    return (
        isinstance(agent, Mapping)
        and all(isinstance(record.get(name), str) for name in _TEXTS)
        and all(name in record and isinstance(record[name], str | None) for name in _MAYBE)
        and all(isinstance(each, str | None) for each in (agent.get("name"), record.get("model")))
        and record["code"] in {None, *KIND_OF}
        and isinstance(args, Mapping)
        and isinstance(violations, list)
        and all(isinstance(each, Mapping) and all(isinstance(each.get(name), str) for name in _VIOLATION) for each in violations)
    )


def proposed(
    snapshot: PolicySnapshot, records: Iterable[Record], contained: Collection[str], attacks: Collection[str] = ()
) -> tuple[list[Edit], list[Refused]]:
    """The edits that would let these decisions' calls pass, and what is refused.

    `contained` names the agents under containment, `attacks` the decisions that a reviewer called an attack.
    """
    refused: list[Refused] = []
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if why := _refusal(snapshot, record, contained, attacks):
            refused.append(Refused(record, why))
        else:
            about = record["agent"]["name"], record["tool"] or _tool_at(snapshot, record["host"]), record["operation"] or ""
            groups.setdefault(about, []).append(record)
    edits = [edit for about, calls in groups.items() for edit in _edits(snapshot, *about, calls)]
    # A tool that gets operations anyway need not be listed without any.
    filled = {edit.place[:3] for edit in edits if len(edit.place) > 3}  # noqa: PLR2004 - spec, tools, the tool
    return [edit for edit in edits if edit.place not in filled], refused


def _refusal(snapshot: PolicySnapshot, record: Record, contained: Collection[str], attacks: Collection[str]) -> str:
    name, code = (record.get("agent") or {}).get("name", ""), record.get("code")
    if record.get("event") != "decision" or not code or record.get("verdict") == "allow":
        return "this is no denied call"
    if (kind := KIND_OF[Code(code)]) is not DenialKind.PERMISSION:
        return _NO[kind]
    if name in contained:
        return f"agent {name!r} is under containment; `broker agents show {name}` says why, and people must release it first"
    if record["decision_id"] in attacks:
        return "a reviewer labelled it an attack; `broker denials label` takes that back"
    if name not in snapshot.agents:
        return f"there is no manifest of {name!r}"
    if record["method"] != "CONNECT" and not record["args"] and record["args_hash"] != args_hash({}):
        return "what it asked for is not in the record, since it held what nobody may keep: see the alerts of its run"
    return _undeclared(snapshot, record) or _beyond(snapshot, record)


def _undeclared(snapshot: PolicySnapshot, record: Record) -> str:
    """Why the catalog has nothing that could be granted."""
    tool = snapshot.tools.get(record["tool"] or _tool_at(snapshot, record["host"]))
    if tool is None:
        return f"no tool of the catalog is at {record['host']}; ask its owner or the platform team for a catalog entry"
    if tool.name in snapshot.decoys.tools:
        return "this tool is a decoy, which no honest call touches"
    # What was tried may be called as an operation is: an MCP method, of which an agent says what it likes. Only a call of an
    # operation has an effect in the record.
    if record["method"] != "CONNECT" and (record["operation"] not in tool.operations or not record["effect"]):
        return f"{record['operation'] or 'this call'} is no operation of {tool.name!r}; ask {tool.owner} to add it to the catalog"
    return ""


def _beyond(snapshot: PolicySnapshot, record: Record) -> str:
    """Why a wider grant is not the answer."""
    if (record["rule"] or "").endswith("/expires"):
        return f"the grant has lapsed; if it is still needed, write a later date at {record['rule']}"
    own = snapshot.agents[record["agent"]["name"]].rule
    for violation in record["violations"]:
        if not violation["pointer"].startswith("/"):
            return f"the record does not hold which parameter broke {violation['rule']}; change that by hand"
        where = violation["pointer"].split("/")[1]
        if where not in record["args"]:
            return f"the request has no {where}, and {violation['rule']} asks for one; the agent's request must change"
        if not violation["rule"].startswith(own):
            return f"the catalog refuses {violation['pointer']} ({violation['rule']}); ask the tool's owner"
        if record.get("model") and violation["pointer"] != "/body/model":
            return f"{violation['message']}; the record keeps no prompts, so change {violation['rule']} by hand"
    return _refused_by_catalog(snapshot, record)


def _refused_by_catalog(snapshot: PolicySnapshot, record: Record) -> str:
    """The same for an operation that the agent's manifest does not list, whose parameters nobody has judged."""
    if record["method"] == "CONNECT" or record.get("model"):
        return ""
    seen = _seen(record)
    for where, schema in snapshot.tools[record["tool"]].operations[record["operation"]].schemas.items():
        for found in schema.violations(seen[where], where) if where in seen and is_whole(seen[where]) else ():
            return f"the catalog refuses {found.pointer} ({found.rule}); ask the tool's owner"
    return ""


def _tool_at(snapshot: PolicySnapshot, target: str) -> str:
    """The one tool at a CONNECT's `host:port`; empty where it is none or several."""
    found = [tool.name for tool in snapshot.tools.values() if tool.endpoint.host_port == target]
    return found[0] if len(found) == 1 else ""


def _edits(snapshot: PolicySnapshot, name: str, tool_name: str, operation: str, calls: list[Record]) -> Iterator[Edit]:
    agent, tool = snapshot.agents[name], snapshot.tools[tool_name]
    grants = agent.tools.get(tool_name)
    file, place = agent.rule.partition("#")[0], ("spec", "tools", tool_name)
    if not operation:
        if grants is None:
            yield Edit(name, file, place, {"operations": {}}, tuple(calls), (_TUNNEL,))
        return
    seen = [_seen(record) for record in calls]
    locations = sorted({where for each in seen for where in each})
    values = {where: thinned([each[where] for each in seen if where in each]) for where in locations}
    granted = grants is not None and operation in grants
    notes, at = tuple(_notes(tool, operation, seen, values, granted=granted)), (*place, "operations", operation)
    model = any(record.get("model") for record in calls)
    if grants is None or operation not in grants:
        params = {"body": _with_model({}, values["body"])} if model else {}
        params |= {where: admitting(where, values[where]) for where in locations if where not in params}
        yield Edit(name, file, at, {"params": params} if params else {}, tuple(calls), notes)
        return
    own = grants[operation].schemas
    for where in sorted({violation["pointer"].split("/")[1] for record in calls for violation in record["violations"]}):
        old = own[where].source if where in own else {}
        schema = _with_model(old, values[where]) if model else widened(where, old, values[where])
        yield Edit(name, file, (*at, "params", where), schema, tuple(calls), notes)


_TUNNEL = "only a tunnel was refused, so which operation is meant is not known: with this the call comes, and is denied by name"


def _with_model(old: Mapping[str, Any], values: Sequence[Any]) -> dict[str, Any]:
    """Of a call of a model the record keeps no prompt: its model is what can be said. Models are granted by their list alone."""
    rules = old.get("properties", {})
    known = rules.get("model", {})
    new, before = sorted({value["model"] for value in values}), [name for name in listed(known) if isinstance(name, str)]
    beside = {"anyOf": [known, {"enum": new}]} if before and not is_list(known) else {}
    return {**old, "properties": {**rules, "model": {"enum": sorted({*before, *new}), **beside}}}


def _seen(record: Record) -> dict[str, Any]:
    """The parameters as far as the record holds them."""
    args: dict[str, Any] = record["args"]
    if record.get("model"):
        return {**args, "body": {"model": record["model"]}}
    # A text that only looks like a mark is a text: then nothing was left out.
    whole = args_hash(args) == record["args_hash"]
    return args if whole else {where: opened(value) for where, value in args.items()}


def _notes(
    tool: Tool, operation: str, seen: Sequence[Mapping[str, Any]], values: Mapping[str, Sequence[Any]], *, granted: bool
) -> Iterator[str]:
    """What people must know of a proposal that lets more pass than these calls; `granted`: others of the operation did before."""
    known = {pointer for each in seen for where, value in each.items() for pointer in unpinned(value, where)}
    loose = {pointer for where, found in values.items() for value in found for pointer in unpinned(value, where)}
    if known:
        yield f"narrow by hand, for only the catalog's schema bounds it: the record does not hold {', '.join(sorted(known))}"
    if loose - known:
        many = ", ".join(sorted(loose - known))
        yield f"narrow by hand, for only the catalog's schema bounds it: over {MOST} different values were seen of {many}"
    # A request always has a path and a query, of which nothing need be named, nor does the catalog name any.
    said = {where for where, found in values.items() if where not in ("path", "query") or any(found)}
    if granted and len(said | tool.operations[operation].schemas.keys()) > 1:
        yield "a manifest can't tie one location's values to another's, so these may be mixed, also with what is granted already"
    elif sum(len({repr(value) for value in found}) > 1 for found in values.values()) > 1:
        yield "a manifest can't tie one location's values to another's, so these calls' values may also be mixed"
    declared = tool.operations[operation]
    # No schema says that there be no body, whatever the method.
    unjudged = "body" not in {*values, *declared.schemas} and declared.method
    if unjudged and (not granted or declared.method in _WITH_BODY):
        yield "the catalog has no schema for the body, so any body passes; ask the tool's owner for one"
    if tool.protocol in PROVIDERS:
        yield "the record keeps no prompts, so of these calls only the model is pinned"


def replayed(snapshot: PolicySnapshot, record: Record, now: float) -> bool | None:
    """Whether the call would now be permitted; None where the record does not hold all of it."""
    agent: Agent = snapshot.agents[record["agent"]["name"]]
    if record["method"] == "CONNECT":
        return _tool_at(snapshot, record["host"]) in agent.tools
    seen = _seen(record)
    if record.get("model") or not is_whole(seen):
        return None
    decision = evaluate(snapshot, agent, ToolCall(record["tool"], record["operation"], seen), now)
    return decision.code is None
