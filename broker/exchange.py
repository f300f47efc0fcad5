"""The life of one call, in order. Read `Exchange._decide` top to bottom.

Laws: no I/O here: events come in, commands go out, and the driver (`broker/processor/ext_proc.py`) turns both into gRPC. Nothing
is sent before its decision is in the audit log, nor before what it may spend is reserved. One exchange sees one snapshot. An
exception is a fault, and a fault is a denial. However a call ends, its reservation ends with it.

    event                 command it may be answered with
    ─────────────────     ──────────────────────────────────────────────
    RequestHead           WantBody · Reserve · Issue · Send · Reply
    RequestBody           Reserve · Issue · Send · Reply
    Reserved              Issue · Send · Reply
    Issued                Send · Reply
    ResponseHead          Pass · Mark · Observe · Reply · Cut
    ResponseChunk         Pass · Replace · Cut
    close()               (the call is over, however it ended)

When its agent is revoked, an exchange that is still open says so to whoever carries it (`interrupt`), which then cuts it.
"""

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace

from broker.answer import Answer, hidden
from broker.asking import Asking
from broker.audit import AuditUnavailable
from broker.case import UNRECORDED, Case
from broker.containment.standing import Opened
from broker.credentials.base import CredentialUnavailable, Lease, Occasion
from broker.events import (
    Command,
    Cut,
    Event,
    Issue,
    Issued,
    Mark,
    Pass,
    RequestBody,
    RequestHead,
    Reserve,
    Reserved,
    ResponseHead,
    Send,
    Services,
    Steps,
    WantBody,
)
from broker.ledger.base import Granted, LedgerUnavailable, Refused, Spend
from broker.ledger.spending import refused, reserved
from broker.policy.agreement import destination
from broker.policy.evaluate import effect_of, evaluate
from broker.policy.limits import Measure, bound, called, unpriced
from broker.policy.snapshot import DEFAULT_MAX_BODY, Agent, PolicySnapshot, Tool
from broker.policy.strip import Stripped, strip
from broker.policy.types import Code, Decision, Door, Refusal, Request, ToolCall, deny
from broker.protocols.base import Adapter
from broker.protocols.models import with_max_output
from broker.request import outgoing, partial_headers, run_id, trace_id, whole_path

log = logging.getLogger(__name__)

_HTTP_10 = "HTTP/1.0"
_VIA_UPSTREAM = "via_upstream"
_DECISION_HEADER = "x-broker-decision-id"
_OVER_BUFFER = "request_payload_too_large"  # Envoy gave up on a body before it was whole
_NOT_GRANTED = (Code.TOOL_NOT_DECLARED, Code.OPERATION_NOT_DECLARED)
# By these an agent proves itself to the broker, so they hold a token that is no secret kept from it.
_PROOFS = ("proxy-authorization", "x-broker-token")


class Exchange:
    """One call. `handle` takes an event and gives a command; `close` says that the call is over."""

    def __init__(self, services: Services, interrupt: Callable[[], object] = lambda: None) -> None:
        self._case = Case(services)
        self._interrupt = interrupt
        self.cut = ""
        """Why it must be cut, once it must."""
        self._opened: Opened | None = None
        self._reserved = False
        self._asking: Asking | None = None
        self._answer: Answer | None = None
        self._steps: Steps | None = None

    def handle(self, event: Event) -> Command:
        """The next command. Never raises: a fault before the request left is a denial, after that a cut."""
        try:
            if self.cut:
                return Cut()
            if self._steps is not None:
                return self._steps.send(event)
            if not isinstance(event, RequestHead):
                return self._without_request(event)
            self._steps = self._run(event)
            return next(self._steps)
        except StopIteration:
            return Cut()
        except Exception:
            log.exception("decision %s: the broker is at fault", self._case.attempt.decision_id)
            return self._fault()

    def close(self) -> None:
        """The call is over: its outcome is recorded and its reservation settled, once."""
        self._leave()
        answer, self._answer = self._answer, None
        try:
            self._end_reservation(answer.end() if answer else None)
        except Exception:
            log.exception(
                "decision %s: its end could not be worked out; what it reserved stays spent", self._case.attempt.decision_id
            )
            self._end_reservation({})

    def _end_reservation(self, spent: Mapping[Measure, int] | None) -> None:
        if self._reserved:
            self._case.end_reservation(spent)
            self._reserved = False

    def _without_request(self, event: Event) -> Command:
        """What comes without a request of its own: a tunnel was opened, or Envoy gave an answer before it asked."""
        if not isinstance(event, ResponseHead):
            return Pass()
        if event.details == _VIA_UPSTREAM:
            self._enter(event.agent, None)
            self.cut = self._case.services.containment.standing.view(event.agent, None).revoked if event.agent else "nobody's"
            return Cut() if self.cut else Pass()
        named = any(name == _DECISION_HEADER for name, _ in event.headers)
        return Pass() if named else Mark(self._case.attempt.decision_id)

    def _enter(self, agent: str, run_id: str | None) -> None:
        opened = Opened(agent, run_id, self._cut, self._case.attempt.decision_id)
        self._opened = self._case.services.containment.open.enter(opened)

    def _leave(self) -> None:
        if self._opened:
            self._case.services.containment.open.leave(self._opened)

    def _cut(self, why: str, code: Code = Code.AGENT_REVOKED) -> None:
        self.cut = why
        self._interrupt()
        if self._answer:
            self._answer.cut(why, code)
        elif self._steps:
            self._case.record(deny(code, f"cut while the call was decided on: {why}"))

    def _run(self, head: RequestHead) -> Steps:
        verdict = yield from self._decide(head)
        if isinstance(verdict, _Denied):
            # It has its answer; what the record of it sets off is about other calls.
            self._leave()
            self._end_reservation(None)
            if verdict.record:
                self._case.record(verdict.decision)
            yield self._case.reply(verdict.decision, verdict.adapter, verdict.call)
            return
        send, self._answer = verdict
        event = yield send
        yield from self._answer.observe(event)

    def _decide(self, head: RequestHead) -> Generator[Command, Event, "tuple[Send, Answer] | _Denied"]:
        """The order of a call, up to its record."""
        case, services, snapshot = self._case, self._case.services, self._case.snapshot
        self._note_head(head)

        # identify
        who = case.identify(head.evidence)
        if isinstance(who, Decision):
            return _Denied(who)
        _, agent = who
        self._enter(agent.name, case.attempt.run_id)

        # recognise
        found = _destination(snapshot, head)
        if isinstance(found, Decision):
            return _Denied(self._inspect(head, b"") or found)
        tool, path = found
        adapter = services.adapters[tool.protocol]
        case.note(tool=tool.name, host=tool.endpoint.authority, path=tool.endpoint.base_path + path)
        clean = strip(tool, head.request, path)
        call, body = yield from self._recognise(adapter, tool, clean, agent, has_body=head.has_body)
        self._note_call(tool, call)
        if gone := self._inspect(head, body):
            return _Denied(gone, adapter, call)
        if isinstance(call, Refusal):
            return _Denied(deny(call.code, call.detail, violations=call.violations), adapter, call)

        # evaluate
        decision = evaluate(snapshot, agent, call, services.now(), case.view(agent.name))
        if not decision.allowed:
            return _Denied(decision, adapter, call)
        call, sent = _bounded(agent, call, body)
        tool = _as_granted(tool, decision)
        case.note(effect=effect_of(snapshot, call) or "")  # of what nobody knows, and shadow mode lets pass, the worst

        # reserve
        asking = Asking(case, agent, tool, call, clean.request, sent, valid=decision.code is None)
        no_room = yield from self._reserve(agent, tool, call, asking, len(clean.request.query) + len(sent))
        if no_room:
            return _Denied(no_room, adapter, call)

        # issue
        lease = yield from self._lease(head, body, agent, tool, call)
        if isinstance(lease, Decision):
            return _Denied(lease, adapter, call)
        injected = lease.headers(outgoing(tool, clean.request, sent), services.now()) if lease else ()

        # record
        if not self._consume() or not case.record(decision, lease):
            return _Denied(UNRECORDED, adapter, call, record=False)
        send = Send(
            set_headers=(
                ("accept-encoding", "identity"),
                *case.retry_key(tool.operations.get(call.operation or ""), clean.request, sent),
                *((name, value.reveal()) for name, value in injected),
            ),
            remove_headers=(*clean.removed, *partial_headers(tool, call, clean.request)),
            path=whole_path(head.request.path, clean.request) if clean.query_changed else None,
            body=sent if sent is not body else None,
        )
        return send, Answer(case, adapter, tool, agent, call, hidden(lease))

    def _recognise(
        self, adapter: Adapter, tool: Tool, clean: Stripped, agent: Agent, *, has_body: bool
    ) -> Generator[Command, Event, tuple[ToolCall | Refusal, bytes]]:
        request = clean.request
        if self._case.snapshot.refuse_own and clean.credential:
            why = f"the call brings a credential of the agent's own ({clean.credential}), and this platform refuses them"
            return Refusal(Code.PROTOCOL_VIOLATION, why), b""
        limit = _body_limit(adapter, tool, request, agent) if has_body else None
        if isinstance(limit, Refusal):
            return limit, b""
        if limit is None:
            return adapter.recognise(tool, request, b""), b""
        declared = request.header("content-length") or ""
        if declared.isdigit() and int(declared) > limit:
            return _too_large(adapter, tool, request, limit), b""
        asked = self._case.services.mono_ns()
        event = yield WantBody()
        self._case.waited(asked)
        if isinstance(event, ResponseHead) and event.details == _OVER_BUFFER:
            return _too_large(adapter, tool, request, limit), b""
        if not isinstance(event, RequestBody):
            return Refusal(Code.PROTOCOL_VIOLATION, "the body did not arrive"), b""
        if event.trailers:
            return Refusal(Code.PROTOCOL_VIOLATION, "trailers are not passed on"), b""
        if len(event.body) > limit:
            return _too_large(adapter, tool, request, limit), b""
        return adapter.recognise(tool, request, event.body), event.body

    def _inspect(self, head: RequestHead, body: bytes) -> Decision | None:
        """Look through all that the request holds, as it was sent; the denial, if it revokes its own agent."""
        request, case = head.request, self._case
        said = (f"{name}: {value}" for name, value in request.headers if name not in _PROOFS)
        whole = "\n".join((case.attempt.host, request.path, request.query, *said)).encode("latin-1", "replace")
        withheld, findings = case.services.containment.inspect(case.attempt, whole, body)
        if withheld:
            case.withhold()
        if not findings:
            return None
        # Its own fate is decided here: it must not be cut by what it sets off.
        self._leave()
        case.services.containment.act(findings)
        self._enter(case.attempt.agent["name"], case.attempt.run_id)
        who = case.identify(head.evidence)
        return who if isinstance(who, Decision) else None

    def _consume(self) -> bool:
        """Whether the approvals, if the call has any, are written down as used."""
        try:
            for asked in self._asking.approved if self._asking else ():
                self._case.services.containment.use(asked)
        except AuditUnavailable as error:
            log.error("decision %s: its approval can't be used: %s", self._case.attempt.decision_id, error)  # noqa: TRY400
            return False
        return True

    def _reserve(
        self, agent: Agent, tool: Tool, call: ToolCall, asking: Asking, size: int
    ) -> Generator[Command, Event, Decision | None]:
        """Take what the call may spend, or say why not; it sends `size` bytes beside its path."""
        case = self._case
        limits = asking.limits(agent.bounds(call))
        if asking.lacks and not limits:
            return asking.wait(asking.lacks)
        amounts = called(len(case.attempt.path) + size)
        if call.model:
            _, price = case.snapshot.price(tool, call.model.name)
            if price is None and (unknown := unpriced(limits, call.model.name)):
                return unknown
            amounts |= bound(call.model, price)
        answer = yield from self._granted(case.spend(limits, amounts, step=not (asking.lacks or call.housekeeping)))
        if isinstance(answer, LedgerUnavailable):
            return deny(Code.LEDGER_UNAVAILABLE, "whether the limits have room for this call can't be told now")
        if isinstance(answer, Refused):
            self._reserved = False
            case.note(limits=refused(answer))
            refusal = answer.limit.refusal(answer.spent, answer.needed, answer.retry_after, answer.trail)
            return asking.ask(answer.limit, refusal)
        if asking.lacks:
            return asking.wait(asking.lacks)
        self._asking = asking
        case.run_began = answer.began
        case.note(step=answer.step, limits=reserved(amounts, degraded=answer.degraded))
        return None

    def _granted(self, spend: Spend) -> Generator[Command, Event, Granted | Refused | LedgerUnavailable]:
        services = self._case.services
        # From here on, whoever gets no answer can't know that nothing was taken.
        self._reserved = True
        try:
            answer = services.ledger.reserve(spend, services.steady())
        except LedgerUnavailable as error:
            return error
        if isinstance(answer, Granted | Refused):
            return answer
        asked = services.mono_ns()
        event = yield Reserve(answer)
        services.metrics.waited_for_ledger(services.mono_ns() - asked)
        return event.answer if isinstance(event, Reserved) else LedgerUnavailable("the ledger gave no answer")

    def _lease(
        self, head: RequestHead, body: bytes, agent: Agent, tool: Tool, call: ToolCall
    ) -> Generator[Command, Event, Lease | Decision | None]:
        # The body may have been on its way for an hour: the identity may have been taken back or have ended meanwhile.
        if isinstance(gone := self._case.identify(head.evidence), Decision):
            return gone
        if tool.credential is None:
            return None
        services, operation = self._case.services, tool.operations.get(call.operation or "")
        issuer, now = services.issuers[tool.credential.issuer], services.now()
        grant, run, most = (
            agent.tools[tool.name].get(call.operation or ""),
            self._case.attempt.run_id,
            self._case.snapshot.max_ttl,
        )
        occasion = Occasion(agent, tool, operation, tool.credential, run, most, grant.pins if grant else {})
        try:
            lease: Lease | CredentialUnavailable | None = issuer.cached(occasion, now)
        except CredentialUnavailable as error:
            lease = error
        if lease is None:
            event = yield Issue(issuer, occasion, now)
            lease = event.lease if isinstance(event, Issued) else CredentialUnavailable("the issuer gave no answer")
        if isinstance(lease, Lease):
            # Of a credential that is new here nobody could know before whether the request holds it.
            new = (secret := hidden(lease)) is not None and services.containment.injected(agent.name, secret)
            return (self._inspect(head, body) if new else None) or lease
        # The advice is for whoever runs the broker: it names variables and files, so it goes to the log, not to the agent.
        log.warning("no credential: %s", lease)
        return deny(Code.CREDENTIAL_UNAVAILABLE, "no credential for this tool can be had now")

    def _fault(self) -> Command:
        if self._answer:
            self._answer.fault()
            return Cut()
        decision = deny(Code.INTERNAL_FAULT, "the broker failed on this request; it was not sent")
        try:
            self._case.record(decision)
        except Exception:
            log.exception("decision %s: the fault could not be recorded", self._case.attempt.decision_id)
        return self._case.reply(decision)

    def _note_head(self, head: RequestHead) -> None:
        wire, request = head.wire, head.request
        self._case.began = self._case.services.mono_ns()
        # Inside a tunnel the proxy has answered already: what comes now is an origin's answer, and 407 is a proxy's.
        self._case.asks_at = Door.BASE_URL if wire.connect_host else wire.door
        run, trace = run_id(request), trace_id(request)
        self._case.note(door=wire.door, method=request.method, host=wire.authority, path=request.path, run_id=run, trace_id=trace)

    def _note_call(self, tool: Tool, call: ToolCall | Refusal) -> None:
        operation = tool.operations.get(call.operation or "")
        if operation:
            self._case.note(operation=operation.name, effect=operation.effect, data=operation.data)
        if isinstance(call, ToolCall):
            self._case.note(operation=operation.name if operation else call.label, params=call.params)
            if model := call.model:  # also of a call that is denied: its prompt is nobody's to read in the record
                provider, _ = self._case.snapshot.price(tool, model.name)
                self._case.note(model=model.name, provider=provider, prompt_hash=model.prompt_hash)


@dataclass(frozen=True, slots=True)
class _Denied:
    """A denial, and how far the request was understood. `record` is False where the record itself failed."""

    decision: Decision
    adapter: Adapter | None = None
    call: ToolCall | Refusal | None = None
    record: bool = True


def _destination(snapshot: PolicySnapshot, head: RequestHead) -> tuple[Tool, str] | Decision:
    if head.protocol == _HTTP_10:
        return deny(Code.PROTOCOL_VIOLATION, "HTTP/1.0 is taken for CONNECT only")
    return destination(snapshot, head.wire)


def _body_limit(adapter: Adapter, tool: Tool, request: Request, agent: Agent) -> int | Refusal | None:
    limit = adapter.body_limit(tool, request)
    # In shadow mode a call may pass that nothing recognises, and what passes is looked through.
    return DEFAULT_MAX_BODY if limit is None and agent.shadow else limit


def _as_granted(tool: Tool, decision: Decision) -> Tool:
    """The tool, without its credential for a call that nobody granted: shadow mode lets it pass, and grants nothing."""
    return replace(tool, credential=None) if decision.code in _NOT_GRANTED else tool


def _bounded(agent: Agent, call: ToolCall, body: bytes) -> tuple[ToolCall, bytes]:
    """The call and its body, with a bound on what a model may generate where the agent gave none."""
    if call.model is None or call.model.max_output is not None:
        return call, body
    most = agent.used(call).max_output
    return replace(call, model=replace(call.model, max_output=most)), with_max_output(body, call.model.output_field, most)


def _too_large(adapter: Adapter, tool: Tool, request: Request, limit: int) -> Refusal:
    named = adapter.recognise(tool, request, b"").operation
    return Refusal(Code.BODY_TOO_LARGE, f"the body is larger than the {limit} bytes that it may have", operation=named)
