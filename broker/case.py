"""One decision in the making: what is known of the attempt so far, its record, and its words for the agent."""

import logging
from dataclasses import replace
from typing import Any

from broker.audit import AuditUnavailable
from broker.audit.record import Attempt, Ending, decision_record, outcome_record
from broker.credentials.base import Lease
from broker.events import Services
from broker.identity import Evidence, Principal, identify
from broker.policy.evaluate import View, admit
from broker.policy.snapshot import Agent
from broker.policy.types import Code, Decision, Json, deny
from broker.protocols.problem import problem

log = logging.getLogger(__name__)

UNRECORDED = deny(Code.AUDIT_UNAVAILABLE, "the decision could not be recorded")


class Case:
    """Holds the one snapshot that decides. `decision_id` is new unless an answer carries one already."""

    def __init__(self, services: Services, decision_id: str = "", **known: Any) -> None:
        self.services = services
        self.snapshot = services.snapshot()
        self.attempt = Attempt(decision_id or services.random_id(), self.snapshot.revision, {}, **known)

    def note(self, **known: Any) -> None:
        """Add what has become known of the attempt (fields of `Attempt`)."""
        self.attempt = replace(self.attempt, **known)

    def identify(self, evidence: Evidence) -> tuple[Principal, Agent] | Decision:
        """Who calls and by which manifest, or why nobody may."""
        services = self.services
        principal = identify(evidence, self.snapshot, services.tokens, services.now())
        if isinstance(principal, Decision):
            return principal
        if services.revocations.taken_back(principal):
            return deny(Code.AGENT_UNKNOWN, "the token was taken back")
        agent = admit(self.snapshot, principal.agent, View())
        if isinstance(agent, Decision):
            return agent
        self.note(agent=agent.described)
        return principal, agent

    def record(self, decision: Decision, lease: Lease | None = None) -> bool:
        """Write the decision down; False where that failed."""
        written = self._append(decision_record, decision, lease.described if lease else None)
        # An allow that is not in the record is none.
        told = decision if written or not decision.allowed else UNRECORDED
        self.services.decided(told.verdict, told.code or "")
        return written

    def record_outcome(self, ending: Ending) -> None:
        """Write down how an allowed call ended."""
        self._append(outcome_record, ending)

    def _append(self, build: Any, *what: object) -> bool:
        services = self.services
        try:
            services.audit.append(build(services.now(), services.mono_ns(), self.attempt, *what))
        except AuditUnavailable as error:
            log.error("%s of %s is not in the record: %s", build.__name__, self.attempt.decision_id, error)  # noqa: TRY400
            return False
        return True

    def problem(self, decision: Decision) -> dict[str, Json]:
        """The denial for people and programs (RFC 9457)."""
        about = self.attempt
        return problem(about.decision_id, about.agent.get("name", ""), about.tool, about.operation, decision)
