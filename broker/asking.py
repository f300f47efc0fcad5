"""What people have to say of one call: who is asked, about what exactly, and what they said.

Law: their word binds what the request says: method, URL, headers and body, byte for byte. Left out is what differs with each try
and means nothing: of the headers those in `_INCIDENTAL`, of an MCP message its ID and progress token.
"""

import base64
import contextlib
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from broker.audit.record import canonical
from broker.case import Case
from broker.containment.approvals import MOST_SHOWN, Asked
from broker.policy.approval import Approval
from broker.policy.evaluate import approval_for, effect_of
from broker.policy.limits import Kind, Limit, once
from broker.policy.snapshot import Agent, Tool
from broker.policy.types import Code, Decision, Request, ToolCall, deny
from broker.request import outgoing

_INCIDENTAL = frozenset(
    {
        "host", "connection", "content-length", "transfer-encoding", "user-agent", "accept", "accept-encoding", "content-type",
        "traceparent", "tracestate", "baggage", "x-request-id", "mcp-session-id", "idempotency-key",
    }
)  # fmt: skip
"""Headers that name neither what is done nor to whom; the content type stands by itself."""
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Asking:
    """One call that may be let go. `approved` are the approvals by which it goes; `lacks` is the one that is missing.

    `valid` says whether its parameters keep all rules; in shadow mode they need not.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - all that people judge
        self, case: Case, agent: Agent, tool: Tool, call: ToolCall, request: Request, sent: bytes, *, valid: bool
    ) -> None:
        self._case, self._tool, self._call, self._request, self._sent = case, tool, call, request, sent
        self._need = approval_for(agent, call, effect_of(case.snapshot, call), case.view(agent.name), valid=valid)
        self._agent = agent
        self.approved: tuple[Asked, ...] = ()
        self.lacks: Approval | None = None

    def limits(self, limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
        """What the call is held to: to the approvals that it has, and not to the flow rules that these lift.

        One that lacks its own is held to flow rules alone: people are asked for it only where it may be done at all.
        """
        needs = [need for need in (self._need, *(limit.unless for limit in limits)) if need]
        if not needs:
            return limits
        approved, binding = self._case.services.containment.approved, self._binding
        given = {need.rule: asked for need in needs if (asked := approved(binding, need))}
        used = {asked: once(asked.id, rule) for rule, asked in given.items()}
        self.approved = tuple(used)
        self._case.note(approval=", ".join(asked.id for asked in self.approved))
        held_to = tuple(limit for limit in limits if limit.unless is None or limit.unless.rule not in given)
        if self._need and self._need.rule not in given:
            self.lacks = self._need
            return tuple(limit for limit in held_to if limit.kind is Kind.FLOW)
        return (*used.values(), *held_to)

    def wait(self, need: Approval) -> Decision:
        """The denial of a call that waits for what its manifest needs."""
        what = f"{self._tool.name}/{self._call.operation} waits for a human's approval"
        held = need.rule.startswith("held: ")
        why = f"{what}, since the agent is {need.rule}" if held else what
        return self._asked(need, deny(Code.APPROVAL_REQUIRED, why, rule="" if held else need.rule))

    def ask(self, limit: Limit, refusal: Decision) -> Decision:
        """The denial of a call that this limit refused: people are asked where they may lift it."""
        if limit.unless:
            return self._asked(limit.unless, refusal)
        if limit.word == "approval":
            return deny(Code.APPROVAL_REQUIRED, f"the {limit.scope.replace('/', ' ')} was used by another call", rule=limit.rule)
        return refusal

    def _asked(self, need: Approval, refusal: Decision) -> Decision:
        if len(self._sent) > MOST_SHOWN:
            what = f"{refusal.detail}; its body is over the {MOST_SHOWN} bytes that a person is asked to judge"
            return deny(refusal.code or Code.APPROVAL_REQUIRED, what, rule=refusal.rule)
        denial = self._case.services.containment.ask(refusal, need, self._binding, self._shown)
        self._case.note(approval=str((denial.approval or {}).get("id", "")))
        return denial

    @property
    def _binding(self) -> tuple[str, ...]:
        about, request = self._case.attempt, self._request
        exact = self._sent if self._call.exact is None else canonical(self._call.exact)
        said = (request.method, request.path, request.query, request.header("content-type") or "", self._headers)
        whole = hashlib.sha256(canonical(said) + exact).hexdigest()
        return self._agent.name, about.run_id, f"{self._tool.name}/{self._call.operation}", whole, about.revision

    @property
    def _headers(self) -> list[tuple[str, str]]:
        """Those that may say what is done, or to whom."""
        known = self._tool.operations.get(self._call.operation or "")
        retried = known.idempotency if known else ""
        return [pair for pair in self._request.headers if pair[0] not in _INCIDENTAL and pair[0] != retried]

    @property
    def _shown(self) -> Mapping[str, Any]:
        """Exactly what will be sent, and by whom."""
        about, request = self._case.attempt, self._request
        return {
            "agent": self._agent.name,
            "owner": self._agent.owner,
            "run_id": about.run_id,
            "operation": f"{self._tool.name}/{self._call.operation}",
            "effect": about.effect,
            "method": request.method,
            "url": outgoing(self._tool, request, self._sent).url,
            "content_type": request.header("content-type") or "",
            "headers": {name: ", ".join(self._request.all(name)) for name, _ in self._headers},
            "params": dict(self._call.params),
            "body": _text(self._sent),
            "decision_id": about.decision_id,
        }


def _text(body: bytes) -> str:
    """The body as people see it, at most twice as long: as base64 where JSON would need six characters for one."""
    with contextlib.suppress(UnicodeDecodeError):
        if not _CONTROL.search(text := body.decode()):
            return text
    return f"base64:{base64.b64encode(body).decode()}"
