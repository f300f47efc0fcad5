"""The decision: one pure function over the snapshot, the call and what the ledger knows."""

from dataclasses import dataclass, replace

from broker.policy.approval import Approval
from broker.policy.schema import ParameterSchema
from broker.policy.snapshot import Agent, Grant, Operation, PolicySnapshot
from broker.policy.types import ALLOW, Code, Decision, Effect, ToolCall, Verdict, Violation, deny


@dataclass(frozen=True, slots=True)
class View:
    """How the agent and its run stand: the ID of what was done to it, empty where it was not.

    Why is for people: an agent that is talked into something must not learn what gave it away.
    """

    revoked: str = ""
    read_only: str = ""
    hold: str = ""


_FREE = View()


def admit(snapshot: PolicySnapshot, agent_name: str, view: View, now: float) -> Agent | Decision:
    """Whether this principal may call anything at all, and who it is at this time: the first two steps, before a byte is parsed.

    1. revoked → `agent_revoked`
    2. no manifest of that name → `agent_unknown`
    """
    if view.revoked:
        return deny(Code.AGENT_REVOKED, f"agent {agent_name!r} is revoked ({view.revoked})")
    agent = snapshot.agents.get(agent_name)
    if agent is None:
        return deny(Code.AGENT_UNKNOWN, "no manifest names this agent" if agent_name else "the request carries no valid identity")
    return agent.at(now)


def evaluate(snapshot: PolicySnapshot, agent: Agent, call: ToolCall, now: float, view: View = _FREE) -> Decision:
    """Decide on a recognised call of an admitted agent, but for what people or the ledger have to say of it.

    First that applies, after the steps of `admit`:

    3. the tool is not in the agent's manifest → `tool_not_declared`
    4. a protocol's own housekeeping → allow, unless all that was granted of the tool has lapsed: `tool_not_declared`
    5. the operation is not in the catalog or not in the manifest, or its grant has lapsed → `operation_not_declared`
    6. the parameters break the catalog's schema, then the manifest's → `params_invalid`
    7. the manifest does not name the model, or what the provider would do by itself → `params_invalid`
    8. the agent was made read-only, and this is no read → `agent_read_only`
    9. allow; the ledger then asks the flow rules (`Kind.FLOW`), and `approval_for` says whether people must approve

    In shadow mode, 3 to 7 give `would_deny` with the same code, and the call goes on to 8 and 9, unless a provider would do by
    itself what the grant does not name. Whether it has ended is asked anew: since the agent was admitted, the body may have been
    on its way for long.
    """
    decision = _permitted(snapshot, agent, call, now)
    if not decision.allowed and _in_shadow(agent.at(now), call, now):
        decision = replace(decision, verdict=Verdict.WOULD_DENY)
    if decision.allowed and view.read_only and effect_of(snapshot, call) not in (None, Effect.READ):
        return deny(Code.AGENT_READ_ONLY, f"agent {agent.name!r} may only read ({view.read_only})")
    return decision


def effect_of(snapshot: PolicySnapshot, call: ToolCall) -> Effect | None:
    """What a call does: the worst, where nobody knows; None for a protocol's own housekeeping."""
    if call.housekeeping:
        return None
    operation = snapshot.tools[call.tool].operations.get(call.operation or "")
    return operation.effect if operation else Effect.DESTRUCTIVE


def _in_shadow(agent: Agent, call: ToolCall, now: float) -> bool:
    if call.housekeeping:
        return call.tool in agent.shadow
    used = agent.grants(call.tool).get(call.operation or "")
    # It would reach what the catalog does not have, with our credential, and at a price that nobody counts.
    if call.model and used and any(word not in used.server_tools for _, word in call.model.server_tools):
        return False
    listed = agent.tools.get(call.tool, {}).get(call.operation or "")
    # A grant that has lapsed takes its own shadow along.
    alone = listed is not None and now < min(listed.shadow_until, listed.expires)
    return alone or (call.operation or "") in agent.shadow.get(call.tool, {})


def _permitted(snapshot: PolicySnapshot, agent: Agent, call: ToolCall, now: float) -> Decision:
    tool, grants = snapshot.tools[call.tool], agent.tools.get(call.tool)
    listed = f"{agent.rule}/spec/tools"
    if grants is None:
        return deny(Code.TOOL_NOT_DECLARED, f"agent {agent.name!r} does not list the tool {call.tool!r}", rule=listed)
    if call.housekeeping:
        lapsed = grants and all(now >= grant.expires for grant in grants.values())
        what = f"all that agent {agent.name!r} was granted of {tool.name!r} has lapsed"
        return deny(Code.TOOL_NOT_DECLARED, what, rule=f"{listed}/{tool.name}/operations") if lapsed else ALLOW
    operation = tool.operations.get(call.operation or "")
    if operation is None:
        what = f"{call.label} is no operation of {tool.name!r}"
        return deny(Code.OPERATION_NOT_DECLARED, what, rule=f"{tool.rule}/spec/operations")
    name, grant = f"{tool.name}/{operation.name}", grants.get(operation.name)
    if grant is None:
        what = f"agent {agent.name!r} does not list {name}"
        return deny(Code.OPERATION_NOT_DECLARED, what, rule=f"{listed}/{tool.name}/operations")
    if now >= grant.expires:
        return deny(Code.OPERATION_NOT_DECLARED, f"the grant of {name} has lapsed", rule=f"{grant.rule}/expires")
    if violations := _violations(call, operation, grant) or _of_model(call, grant):
        return deny(Code.PARAMS_INVALID, _summary(violations), rule=violations[0].rule, violations=violations)
    return ALLOW


def approval_for(
    agent: Agent, call: ToolCall, effect: Effect | None, view: View = _FREE, *, valid: bool = True
) -> Approval | None:
    """Who must say yes to this allowed call, whatever its run has done.

    First that applies: the manifest asks for approval of such calls; the agent is held, and this is no read. `when` is written
    for parameters that are valid: of others, which pass in shadow mode, nobody knows what they mean to the tool, so they count
    as fitting.
    """
    if effect is None:
        return None
    grant = agent.used(call)
    if grant.approval and (not valid or grant.approval.bears_on(call)):
        return grant.approval
    return Approval(f"held: {view.hold}") if view.hold and effect is not Effect.READ else None


def _violations(call: ToolCall, operation: Operation, grant: Grant) -> tuple[Violation, ...]:
    for schemas in (operation.schemas, grant.schemas):
        if found := [each for location, schema in schemas.items() for each in _at(call, location, schema)]:
            return tuple(found)
    return ()


def _at(call: ToolCall, location: str, schema: ParameterSchema) -> tuple[Violation, ...]:
    if location in call.params:
        return schema.violations(call.params[location], location)
    missing = f"the request has no {location}, but the operation's schema asks for one"
    return (Violation(f"/{location}", schema.rule, missing),)


def _of_model(call: ToolCall, grant: Grant) -> tuple[Violation, ...]:
    model = call.model
    if model is None:
        return ()
    found = []
    if model.name not in grant.models:
        named = f"these models: {', '.join(sorted(grant.models))}" if grant.models else "no model; write them there, as an enum"
        found.append(Violation("/body/model", f"{grant.rule}/params/body/properties/model", f"the manifest names {named}"))
    for pointer, word in model.server_tools:
        if word not in grant.server_tools:
            what = f"the provider would run or fetch this by itself, and the manifest's server_tools don't name it: {word}"
            found.append(Violation(pointer, f"{grant.rule}/server_tools", what))
    return tuple(found)


def _summary(violations: tuple[Violation, ...]) -> str:
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return f"{first.pointer}: {first.message}{more}"
