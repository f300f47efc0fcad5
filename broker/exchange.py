"""The life of one call, in order. Read `Exchange._run` top to bottom.

Laws: no I/O here: events come in, commands go out, and the driver (`broker/processor/ext_proc.py`) turns both into gRPC. Nothing
is sent before its decision is in the audit log. One exchange sees one snapshot. An exception is a fault, and a fault is a denial.

    event                 command it may be answered with
    ─────────────────     ──────────────────────────────────────────────
    RequestHead           WantBody · Issue · Send · Reply
    RequestBody           Issue · Send · Reply
    Issued                Send · Reply
    ResponseHead          Pass · Mark · Observe · Reply
    ResponseChunk         Replace · Cut
    close()               (the call is over, however it ended)
"""

import logging
import re
from collections.abc import Generator
from dataclasses import replace

from broker.audit import AuditUnavailable
from broker.audit.record import Attempt, Ending, decision_record, outcome_record
from broker.credentials.base import CredentialUnavailable, Lease, Occasion
from broker.events import (
    Command,
    Cut,
    Event,
    Issue,
    Issued,
    Mark,
    Observe,
    Pass,
    Replace,
    RequestBody,
    RequestHead,
    ResponseChunk,
    ResponseHead,
    Send,
    Services,
    Steps,
    WantBody,
)
from broker.identity import Principal, identify
from broker.policy.agreement import destination
from broker.policy.evaluate import View, admit, evaluate
from broker.policy.snapshot import Agent, Tool
from broker.policy.strip import strip
from broker.policy.types import Code, Decision, Door, Json, Refusal, Request, ToolCall, deny
from broker.protocols.base import Adapter, Reply, ResponseBlocked, ResponseFilter
from broker.protocols.problem import problem, reply, status_at

log = logging.getLogger(__name__)

_HTTP_10 = "HTTP/1.0"
_DECISION_HEADER = "x-broker-decision-id"
_OVER_BUFFER = "request_payload_too_large"  # Envoy gave up on a body before it was whole
_RUN_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_TRACEPARENT_PARTS = 4

# What Envoy says (response code details) when the upstream itself was refused.
_UNTRUSTED = {
    "rbac_access_denied": "the tool's host resolved to an address that its catalog entry does not allow",
    "CERTIFICATE_VERIFY_FAILED": "the tool's certificate could not be verified",
    "TLS_error": "no verified TLS connection to the tool could be made",
}


class Exchange:
    """One call. `handle` takes an event and gives a command; `close` says that the call is over."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._snapshot = services.snapshot()
        self._decision_id = services.random_id()
        self._started = services.mono_ns()
        self._attempt = Attempt(self._decision_id, self._snapshot.revision, {})
        self._sent = False
        self._ending = Ending()
        self._asks_at = Door.BASE_URL
        self._steps: Steps | None = None

    def handle(self, event: Event) -> Command:
        """The next command. Never raises: a fault before the request left is a denial, after that a cut."""
        try:
            if self._steps is None:
                if not isinstance(event, RequestHead):
                    # An answer that Envoy gave by itself, before this filter saw the request.
                    return self._mark(event)
                self._steps = self._run(event)
                return next(self._steps)
            return self._steps.send(event)
        except StopIteration:
            return Cut()
        except Exception:
            log.exception("decision %s: the broker is at fault", self._decision_id)
            return self._fault()

    def close(self) -> None:
        """The call is over: its outcome is recorded, once."""
        if self._sent:
            self._sent = False
            duration = (self._services.mono_ns() - self._started) / 1e6
            self._record_outcome(replace(self._ending, duration_ms=round(duration, 3)))

    def _mark(self, event: Event) -> Command:
        named = isinstance(event, ResponseHead) and any(name == _DECISION_HEADER for name, _ in event.headers)
        return Pass() if named else Mark(self._decision_id)

    # The order of a call.

    def _run(self, head: RequestHead) -> Steps:
        services, snapshot = self._services, self._snapshot
        self._note_head(head)

        agent = self._identify(head)
        if isinstance(agent, Decision):
            yield from self._deny(agent)
            return

        if head.protocol == _HTTP_10:
            yield from self._deny(deny(Code.PROTOCOL_VIOLATION, "HTTP/1.0 is taken for CONNECT only"))
            return
        found = destination(snapshot, head.wire)
        if isinstance(found, Decision):
            yield from self._deny(found)
            return
        tool, path = found
        adapter = services.adapters[tool.protocol]
        self._attempt = replace(self._attempt, tool=tool.name, host=tool.endpoint.authority)

        clean = strip(tool, head.request, path)
        call = yield from self._recognise(adapter, tool, clean.request, has_body=head.has_body)
        self._note_call(tool, call)
        decision = _refused(call) if isinstance(call, Refusal) else evaluate(snapshot, agent, call)
        if isinstance(call, Refusal) or not decision.allowed:
            yield from self._deny(decision, adapter, call)
            return

        lease = yield from self._lease(agent, tool, call)
        if isinstance(lease, Decision):
            yield from self._deny(lease, adapter, call)
            return

        if not self._record(decision, lease):
            yield from self._deny(deny(Code.AUDIT_UNAVAILABLE, "the decision could not be recorded"), adapter, call, record=False)
            return
        self._sent = True
        injected = ((lease.header, lease.value.reveal()),) if lease else ()
        answer = yield Send(
            set_headers=(("accept-encoding", "identity"), *injected),
            remove_headers=clean.removed,
            path=_whole_path(head, clean.request) if clean.query_changed else None,
            decision_id=self._decision_id,
        )
        yield from self._observe(adapter, tool, agent, call, answer)

    def _identify(self, head: RequestHead) -> Agent | Decision:
        services = self._services
        proven = identify(head.evidence, self._snapshot, services.tokens, services.now())
        if isinstance(proven, Decision):
            return proven
        return self._admit(proven)

    def _admit(self, principal: Principal) -> Agent | Decision:
        if self._services.revocations.taken_back(principal):
            return deny(Code.AGENT_UNKNOWN, "the token was taken back")
        agent = admit(self._snapshot, principal.agent, View())
        if isinstance(agent, Agent):
            self._note_agent(agent)
        return agent

    def _recognise(
        self, adapter: Adapter, tool: Tool, request: Request, *, has_body: bool
    ) -> Generator[Command, Event, ToolCall | Refusal]:
        if not has_body:
            return adapter.recognise(tool, request, b"")
        limit = adapter.body_limit(tool, request)
        if isinstance(limit, Refusal):
            return limit
        declared = request.header("content-length") or ""
        if declared.isdigit() and int(declared) > limit:
            return _too_large(limit)
        event = yield WantBody()
        if isinstance(event, ResponseHead) and event.details == _OVER_BUFFER:
            return _too_large(limit)
        if not isinstance(event, RequestBody):
            return Refusal(Code.PROTOCOL_VIOLATION, "the body did not arrive")
        if event.trailers:
            return Refusal(Code.PROTOCOL_VIOLATION, "trailers are not passed on")
        if len(event.body) > limit:
            return _too_large(limit)
        return adapter.recognise(tool, request, event.body)

    def _lease(self, agent: Agent, tool: Tool, call: ToolCall) -> Generator[Command, Event, Lease | Decision | None]:
        operation = tool.operations.get(call.operation or "") or next(iter(tool.operations.values()), None)
        if operation is None or operation.credential is None:
            return None
        spec = operation.credential
        issuer, now = self._services.issuers[spec.issuer], self._services.now()
        occasion = Occasion(agent, tool, operation, spec, self._attempt.run_id, self._snapshot.max_ttl)
        try:
            lease = issuer.cached(occasion, now)
        except CredentialUnavailable as error:
            return _no_credential(error)
        if lease is not None:
            return lease
        event = yield Issue(issuer, occasion, now)
        if isinstance(event, Issued) and isinstance(event.lease, Lease):
            return event.lease
        return _no_credential(
            event.lease if isinstance(event, Issued) and isinstance(event.lease, CredentialUnavailable) else None
        )

    def _observe(self, adapter: Adapter, tool: Tool, agent: Agent, call: ToolCall, answer: Event) -> Steps:
        if not isinstance(answer, ResponseHead):
            raise TypeError(f"an answer was expected, not {type(answer).__name__}")
        self._ending = Ending(status=answer.status)
        headers = dict(answer.headers)
        if answer.details != "via_upstream":
            yield from self._own_answer(adapter, call, answer)
            return
        content_type = headers.get("content-type", "")
        rewriter = adapter.response_filter(tool, agent.tools[tool.name], call, content_type) if answer.has_body else None
        if rewriter is None:
            length = headers.get("content-length", "")
            self._ending = replace(self._ending, size=int(length) if length.isdigit() else 0)
            yield from _pass_on()
            return
        if headers.get("content-encoding", "identity") != "identity":
            yield self._blocked("the answer is compressed, although it was asked for plain", adapter, call)
            return
        event = yield Observe()
        yield from self._rewrite(rewriter, event)

    def _rewrite(self, rewriter: ResponseFilter, event: Event) -> Steps:
        while isinstance(event, ResponseChunk):
            self._ending = replace(self._ending, size=self._ending.size + len(event.data))
            try:
                data = rewriter.feed(event.data, last=event.last)
            except ResponseBlocked as error:
                self._ending = replace(self._ending, code=Code.RESPONSE_BLOCKED, detail=str(error))
                yield Cut()
                return
            event = yield Replace(data)

    def _own_answer(self, adapter: Adapter, call: ToolCall, answer: ResponseHead) -> Steps:
        """Envoy answered in the upstream's place: the connection failed, was not trusted, or led to a forbidden address."""
        untrusted = next((reason for mark, reason in _UNTRUSTED.items() if mark in answer.details), None)
        if untrusted is None:
            self._ending = replace(self._ending, detail=answer.details)
            yield from _pass_on()
            return
        decision = deny(Code.UPSTREAM_UNTRUSTED, untrusted)
        self._ending = replace(self._ending, code=Code.UPSTREAM_UNTRUSTED, detail=untrusted)
        yield self._reply(decision, adapter, call)

    def _blocked(self, why: str, adapter: Adapter, call: ToolCall) -> Reply:
        self._ending = replace(self._ending, code=Code.RESPONSE_BLOCKED, detail=why)
        return self._reply(deny(Code.RESPONSE_BLOCKED, why), adapter, call)

    # Denials.

    def _deny(
        self, decision: Decision, adapter: Adapter | None = None, call: ToolCall | Refusal | None = None, *, record: bool = True
    ) -> Steps:
        if record:
            self._record(decision, None)
        yield self._reply(decision, adapter, call)

    def _reply(self, decision: Decision, adapter: Adapter | None, call: ToolCall | Refusal | None) -> Reply:
        attempt = self._attempt
        body = problem(self._decision_id, attempt.agent.get("name", ""), attempt.tool, attempt.operation, decision)
        if adapter is not None and call is not None:
            shaped = adapter.denial(body, call if isinstance(call, Refusal) else decision, call.correlation)
            if shaped is not None:
                return shaped
        return reply(body, status_at(decision.code or Code.INTERNAL_FAULT, self._asks_at))

    def _fault(self) -> Command:
        if self._sent:
            self._ending = replace(self._ending, code=Code.INTERNAL_FAULT)
            return Cut()
        decision = deny(Code.INTERNAL_FAULT, "the broker failed on this request; it was not sent")
        try:
            self._record(decision, None)
        except Exception:
            log.exception("decision %s: the fault could not be recorded", self._decision_id)
        return self._reply(decision, None, None)

    # The record.

    def _record(self, decision: Decision, lease: Lease | None) -> bool:
        credential: dict[str, Json] | None = None
        if lease is not None:
            credential = {
                "issuer": lease.issuer, "scopes": list(lease.scopes), "lease_id": lease.lease_id, "expires": lease.expires,
            }  # fmt: skip
        services = self._services
        try:
            services.audit.append(decision_record(services.now(), services.mono_ns(), self._attempt, decision, credential))
        except AuditUnavailable as error:
            log.error("decision %s (%s) could not be recorded: %s", self._decision_id, decision.code or "allow", error)  # noqa: TRY400
            return False
        services.decided(decision.verdict, decision.code or "")
        return True

    def _record_outcome(self, ending: Ending) -> None:
        services = self._services
        try:
            services.audit.append(outcome_record(services.now(), services.mono_ns(), self._attempt, ending))
        except AuditUnavailable as error:
            log.error("outcome of %s could not be recorded: %s", self._decision_id, error)  # noqa: TRY400

    def _note_head(self, head: RequestHead) -> None:
        wire, request = head.wire, head.request
        # Inside a tunnel the proxy has answered already: what comes now is an origin's answer, and 407 is a proxy's.
        self._asks_at = Door.BASE_URL if wire.connect_host else wire.door
        self._attempt = replace(
            self._attempt,
            door=wire.door,
            method=request.method,
            host=wire.authority,
            path=request.path,
            run_id=run_id(request),
            trace_id=_trace_id(request),
        )

    def _note_agent(self, agent: Agent) -> None:
        self._attempt = replace(self._attempt, agent=agent.described)

    def _note_call(self, tool: Tool, call: ToolCall | Refusal) -> None:
        if isinstance(call, Refusal):
            return
        operation = tool.operations.get(call.operation or "")
        self._attempt = replace(
            self._attempt,
            operation=operation.name if operation else call.label,
            effect=operation.effect if operation else "",
            data=operation.data if operation else (),
            params=call.params,
        )


def _pass_on() -> Steps:
    # Only what was let go on purpose goes on: any other script that has run out is cut.
    while True:
        yield Pass()


def run_id(request: Request) -> str:
    """The run that a request names (`x-run-id`, or W3C baggage `run.id`), which only groups; empty when it names none."""
    named = request.header("x-run-id")
    if named is None:
        members = (request.header("baggage") or "").split(",")
        named = next((value for key, _, value in (member.partition("=") for member in members) if key.strip() == "run.id"), "")
    return named.strip() if _RUN_ID.fullmatch(named.strip()) else ""


def _trace_id(request: Request) -> str:
    # W3C Trace Context section 3.2: version-traceid-parentid-flags.
    parts = (request.header("traceparent") or "").split("-")
    return parts[1] if len(parts) >= _TRACEPARENT_PARTS and _TRACE_ID.fullmatch(parts[1]) else ""


def _refused(refusal: Refusal) -> Decision:
    return deny(refusal.code, refusal.detail, violations=refusal.violations)


def _too_large(limit: int) -> Refusal:
    return Refusal(Code.BODY_TOO_LARGE, f"the body is larger than the {limit} bytes that this operation takes")


def _no_credential(error: CredentialUnavailable | None) -> Decision:
    # The advice is for whoever runs the broker: it names variables and files, so it goes to the log, not to the agent.
    log.warning("no credential: %s", error or "the issuer gave no answer")
    return deny(Code.CREDENTIAL_UNAVAILABLE, "no credential for this tool can be had now")


def _whole_path(head: RequestHead, request: Request) -> str:
    return f"{head.request.path}?{request.query}" if request.query else head.request.path
