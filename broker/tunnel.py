"""CONNECT: who opens a tunnel, and to where. The calls inside are judged one by one, each in its own exchange.

Law: only a proven agent opens a tunnel, and only to a host and port at which its manifest lists a tool; a refusal is recorded.
An exception is a fault, and a fault is a denial.
"""

import logging
from dataclasses import replace

from broker.case import UNRECORDED, Case
from broker.events import Services
from broker.identity import Evidence, Principal
from broker.policy.agreement import connect_target
from broker.policy.types import Code, Decision, Verdict, deny
from broker.protocols.base import Reply
from broker.protocols.problem import reply, status_at

log = logging.getLogger(__name__)


def authorize(services: Services, evidence: Evidence, target: str) -> Principal | Reply:
    """Decide on a CONNECT to `target` (`host:port`): for whom it is opened, or the refusal.

    First that applies:

    1. no proven identity, or a token taken back → `agent_unknown`
    2. no manifest of that name → `agent_unknown`
    3. the catalog has nothing at exactly this host and port → `host_not_declared`
    4. the agent's manifest lists no tool there → `tool_not_declared`; in shadow mode that is recorded, and it is opened
    """
    case = Case(services, door=evidence.door, method="CONNECT", host=target)
    try:
        outcome = _decide(case, evidence, target)
    except Exception:
        log.exception("decision %s: the broker is at fault", case.attempt.decision_id)
        outcome = deny(Code.INTERNAL_FAULT, "the broker failed on this request; no tunnel was opened")
    if isinstance(outcome, Principal):
        return outcome
    if outcome is not UNRECORDED:
        case.record(outcome)
    return reply(case.problem(outcome), status_at(outcome.code or Code.INTERNAL_FAULT, evidence.door))


def _decide(case: Case, evidence: Evidence, target: str) -> Principal | Decision:
    who = case.identify(evidence)
    if isinstance(who, Decision):
        return who
    principal, agent = who
    tools = connect_target(case.snapshot, target)
    if not tools:
        return deny(Code.HOST_NOT_DECLARED, f"no tool in the catalog is at {target}")
    if any(tool.name in agent.tools for tool in tools):
        return principal
    case.note(tool=next((tool.name for tool in tools if tool.name in case.snapshot.decoys.tools), ""))
    denied = deny(Code.TOOL_NOT_DECLARED, f"agent {agent.name!r} lists no tool at {target}", rule=f"{agent.rule}/spec/tools")
    if not any(tool.name in agent.shadow for tool in tools):
        return denied
    return principal if case.record(replace(denied, verdict=Verdict.WOULD_DENY)) else UNRECORDED
