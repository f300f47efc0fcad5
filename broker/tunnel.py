"""CONNECT: who opens a tunnel, and to where. The calls inside are judged one by one, each in its own exchange.

Law: only a proven agent opens a tunnel, and only to a host and port at which its manifest lists a tool; a refusal is recorded.
"""

import logging
from dataclasses import dataclass

from broker.audit import AuditUnavailable
from broker.audit.record import Attempt, decision_record
from broker.events import Services
from broker.identity import Evidence, Principal, identify
from broker.policy.agreement import connect_target
from broker.policy.evaluate import View, admit
from broker.policy.snapshot import Agent, PolicySnapshot
from broker.policy.types import Code, Decision, Door, deny
from broker.protocols.base import Reply
from broker.protocols.problem import problem, reply, status_at

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Open:
    """Let the tunnel be opened for this identity."""

    principal: Principal


def authorize(services: Services, evidence: Evidence, target: str) -> Open | Reply:
    """Decide on a CONNECT to `target` (`host:port`).

    First that applies:

    1. no proven identity, or a token taken back → `agent_unknown`
    2. no manifest of that name → `agent_unknown`
    3. the catalog has nothing at exactly this host and port → `host_not_declared`
    4. the agent's manifest lists no tool there → `tool_not_declared`
    """
    snapshot = services.snapshot()
    attempt = Attempt(services.random_id(), snapshot.revision, {}, door=Door.PROXY, method="CONNECT", host=target)
    principal = identify(evidence, snapshot, services.tokens, services.now())
    if isinstance(principal, Principal) and services.revocations.taken_back(principal):
        principal = deny(Code.AGENT_UNKNOWN, "the token was taken back")
    if isinstance(principal, Decision):
        return _refuse(services, attempt, principal)
    agent = admit(snapshot, principal.agent, View())
    if isinstance(agent, Decision):
        return _refuse(services, attempt, agent)
    about = Attempt(attempt.decision_id, snapshot.revision, agent.described, door=Door.PROXY, method="CONNECT", host=target)
    refused = _undeclared(snapshot, agent, target)
    return _refuse(services, about, refused) if refused else Open(principal)


def _undeclared(snapshot: PolicySnapshot, agent: Agent, target: str) -> Decision | None:
    tools = connect_target(snapshot, target)
    if not tools:
        return deny(Code.HOST_NOT_DECLARED, f"no tool in the catalog is at {target}")
    if not any(tool.name in agent.tools for tool in tools):
        return deny(Code.TOOL_NOT_DECLARED, f"agent {agent.name!r} lists no tool at {target}", rule=f"{agent.rule}/spec/tools")
    return None


def _refuse(services: Services, attempt: Attempt, decision: Decision) -> Reply:
    code = decision.code or Code.INTERNAL_FAULT
    try:
        services.audit.append(decision_record(services.now(), services.mono_ns(), attempt, decision))
    except AuditUnavailable as error:
        log.error("decision %s (%s) could not be recorded: %s", attempt.decision_id, code, error)  # noqa: TRY400 - no trace needed
    services.decided(decision.verdict, code)
    body = problem(attempt.decision_id, attempt.agent.get("name", ""), "", "", decision)
    return reply(body, status_at(code, Door.PROXY))
