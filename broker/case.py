"""One decision in the making: what is known of the attempt so far, its record, and its words for the agent."""

import logging
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from uuid import UUID

from broker.audit import AuditUnavailable
from broker.audit.record import Attempt, Ending, args_hash, canonical, decision_record, outcome_record
from broker.containment.alerts import Alert
from broker.credentials.base import Lease
from broker.events import Services
from broker.identity import Evidence, Principal, identify
from broker.ledger.base import Spend
from broker.policy.containment import Severity
from broker.policy.evaluate import View, admit
from broker.policy.limits import Limit, Measure
from broker.policy.snapshot import Agent, Operation
from broker.policy.types import Code, Decision, Door, Effect, Json, Refusal, Request, ToolCall, deny
from broker.protocols.base import Adapter, Reply
from broker.protocols.problem import problem, reply, status_at

log = logging.getLogger(__name__)

UNRECORDED = deny(Code.AUDIT_UNAVAILABLE, "the decision could not be recorded")


class Case:
    """Holds the one snapshot that decides. `decision_id` is new unless an answer carries one already.

    `asks_at` is the door that asks for an identity where one is missing; `began` is when a request came that waits for the
    decision, in nanoseconds of the monotonic clock. `run_began` is as in `Granted`.
    """

    def __init__(self, services: Services, decision_id: str = "", **known: Any) -> None:
        self.services = services
        self.snapshot = services.snapshot()
        self.attempt = Attempt(decision_id or services.random_id(), self.snapshot.revision, {}, **known)
        self.asks_at = Door.BASE_URL
        self.began: int | None = None
        self.run_began = 0.0

    def note(self, **known: Any) -> None:
        """Add what has become known of the attempt (fields of `Attempt`)."""
        for name, value in known.items():
            setattr(self.attempt, name, value)

    def withhold(self) -> None:
        """What the request holds must not stand in the record, which nobody can take it out of; its hash does."""
        about = self.attempt
        known = self.snapshot.tools[about.tool].operations if about.tool else {}
        operation = about.operation if about.operation in known else ""
        host = "[redacted]" if self._must_not_show(about.host) else about.host
        self.note(withheld=True, args_hash=about.args_hash or args_hash(about.params), params={}, operation=operation, host=host)

    def _must_not_show(self, text: str) -> bool:
        try:
            return self.services.containment.must_not_show(self.attempt, text.encode("latin-1", "replace"))
        except Exception:
            log.exception("decision %s: where it went can't be looked through, and is not shown", self.attempt.decision_id)
            return True

    def identify(self, evidence: Evidence) -> tuple[Principal, Agent] | Decision:
        """Who calls and by which manifest, or why nobody may."""
        services = self.services
        if services.has_ended(evidence.namespace.partition("/")[0]):
            return deny(Code.AGENT_UNKNOWN, "the namespace that this connection is from has ended")
        principal = identify(evidence, self.snapshot, services.tokens, services.now())
        if isinstance(principal, Decision):
            return principal
        view = self.view(principal.agent)
        if not view.revoked and services.containment.standing.taken_back(principal):
            return deny(Code.AGENT_UNKNOWN, "the token was taken back")
        agent = admit(self.snapshot, principal.agent, view, services.now())
        if isinstance(agent, Decision):
            known = self.snapshot.agents.get(principal.agent)
            self.note(agent=known.described if known else {"name": principal.agent} if view.revoked else {})
            return agent
        self.note(agent=agent.described)
        return principal, agent

    def view(self, agent: str) -> View:
        """How the agent stands now, in the run that the request names; a tunnel belongs to none."""
        run = None if self.attempt.method == "CONNECT" else self.attempt.run_id
        return self.services.containment.standing.view(agent, run)

    def waited(self, since: int) -> None:
        """What passed since then was the wait for somebody else, and is no part of the decision's time."""
        if self.began is not None:
            self.began += self.services.mono_ns() - since

    def record(self, decision: Decision, lease: Lease | None = None) -> bool:
        """Write the decision down; False where that failed."""
        written = self._append(self._described, decision, lease.described if lease else None)
        # An allow that is not in the record is none.
        told = decision if written or not decision.allowed else UNRECORDED
        took = None if self.began is None else self.services.mono_ns() - self.began
        self.services.metrics.decided(told.verdict, told.code or "", took)
        self.services.containment.decided(self.attempt, told)
        return written

    def _described(self, now: float, mono_ns: int, about: Attempt, decision: Decision, credential: Any) -> dict[str, Any]:
        # What is denied before it is looked through, a tunnel too, leaves a record of where it went.
        if decision.code and not about.withheld and self._must_not_show(f"{about.host}\n{about.path}"):
            self.withhold()
        return decision_record(now, mono_ns, about, decision, credential)

    def record_outcome(self, ending: Ending, error: str) -> None:
        """Write down how an allowed call ended; `error` is a word for what failed upstream, empty for nothing."""
        self._append(outcome_record, ending)
        self.services.containment.ended(self.attempt, ending, error)

    def alert(self, kind: str, what: str) -> None:
        """Tell people of something that they should look at now."""
        about = self.attempt
        key = f"{about.agent.get('name', '')}/{kind}/{about.tool}"
        self.services.containment.alert(Alert(kind, Severity.HIGH, what, key, about.agent, (about.decision_id,)))

    def _append(self, build: Any, *what: object) -> bool:
        services = self.services
        try:
            services.audit.append(build(services.now(), services.mono_ns(), self.attempt, *what))
        except AuditUnavailable as error:
            log.error("%s of %s is not in the record: %s", build.__name__, self.attempt.decision_id, error)  # noqa: TRY400
            return False
        return True

    def spend(self, limits: tuple[Limit, ...], amounts: Mapping[Measure, int], *, step: bool) -> Spend:
        """What the ledger is asked for."""
        about = self.attempt
        about.args_hash = about.args_hash or args_hash(about.params)
        fingerprint = f"{about.tool}/{about.operation}/{about.args_hash}"
        read = about.effect == Effect.READ
        whole = about.decision_id, about.agent["name"], limits, amounts, about.run_id, fingerprint, read
        return Spend(*whole, step=step)

    def retry_key(self, operation: Operation | None, request: Request, body: bytes) -> tuple[tuple[str, str], ...]:
        """The header by which the tool knows this write again; none where it has no such header, or the agent sent its own.

        Its value is a UUID (RFC 9562 version 8) of who asks for what in which run. `request` is what is sent, with `body`.
        """
        header, about = operation.idempotency if operation else "", self.attempt
        # Servers fold both spellings into one, and then ours would stand beside the agent's.
        if not header or any(name.replace("_", "-") == header.replace("_", "-") for name, _ in request.headers):
            return ()
        # A named run is the same on every broker and after a restart, which may not know when it began.
        run = about.run_id or self.run_began
        # Parsed, the same parameters are the same, whatever the order of their keys.
        unread = "" if "body" in about.params else sha256(body).hexdigest()
        asked = (about.tool, about.operation, request.method, request.path, request.query, about.args_hash, unread)
        digest = int.from_bytes(sha256(canonical([about.agent["name"], run, *asked])).digest()[:16])
        version, variant = 0xF << 76, 0x3 << 62
        return ((header, str(UUID(int=digest & ~(version | variant) | 0x8 << 76 | 0x2 << 62))),)

    def end_reservation(self, spent: Mapping[Measure, int] | None) -> None:
        """Settle what was reserved, or (None) give it back."""
        ledger, now = self.services.ledger, self.services.steady()
        if spent is None:
            self.note(limits={})
            ledger.refund(self.attempt.decision_id, now)
        else:
            ledger.settle(self.attempt.decision_id, spent, now)

    def problem(self, decision: Decision) -> dict[str, Json]:
        """The denial for people and programs (RFC 9457)."""
        about = self.attempt
        return problem(about.decision_id, about.agent.get("name", ""), about.tool, about.operation, decision)

    def reply(self, decision: Decision, adapter: Adapter | None = None, call: ToolCall | Refusal | None = None) -> Reply:
        """The denial as the agent gets it: in the shape of its protocol, where the request got far enough to have one."""
        body = self.problem(decision)
        if adapter is not None and call is not None:
            shaped = adapter.denial(body, call if isinstance(call, Refusal) else decision, call.correlation)
            if shaped is not None:
                return shaped
        return reply(body, status_at(decision.code or Code.INTERNAL_FAULT, self.asks_at))
