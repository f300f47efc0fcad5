"""The life of one call, in order. Read `Exchange._decide` top to bottom.

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
from dataclasses import dataclass, replace
from urllib.parse import unquote

from broker.audit.record import Ending
from broker.case import UNRECORDED, Case
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
from broker.policy.agreement import destination
from broker.policy.evaluate import evaluate
from broker.policy.snapshot import Agent, Tool
from broker.policy.strip import strip
from broker.policy.types import Code, Decision, Door, Refusal, Request, ToolCall, deny
from broker.protocols.base import Adapter, Reply, ResponseBlocked, ResponseFilter
from broker.protocols.problem import reply, status_at

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
        self._case = Case(services)
        self._started = services.mono_ns()
        self._sent = False
        self._ending = Ending(detail="the call ended before an answer came")
        self._asks_at = Door.BASE_URL
        self._steps: Steps | None = None

    def handle(self, event: Event) -> Command:
        """The next command. Never raises: a fault before the request left is a denial, after that a cut."""
        try:
            if self._steps is not None:
                return self._steps.send(event)
            if not isinstance(event, RequestHead):
                return self._mark(event)
            self._steps = self._run(event)
            return next(self._steps)
        except StopIteration:
            return Cut()
        except Exception:
            log.exception("decision %s: the broker is at fault", self._case.attempt.decision_id)
            return self._fault()

    def close(self) -> None:
        """The call is over: its outcome is recorded, once."""
        if self._sent:
            self._sent = False
            duration = (self._case.services.mono_ns() - self._started) / 1e6
            self._case.record_outcome(replace(self._ending, duration_ms=round(duration, 3)))

    def _run(self, head: RequestHead) -> Steps:
        verdict = yield from self._decide(head)
        if isinstance(verdict, _Denied):
            if verdict.record:
                self._case.record(verdict.decision)
            yield self._reply(verdict)
            return
        self._sent = True
        answer = yield verdict.send
        yield from self._observe(verdict, answer)

    def _decide(self, head: RequestHead) -> Generator[Command, Event, "_Allowed | _Denied"]:
        """The order of a call, up to its record."""
        case, services, snapshot = self._case, self._case.services, self._case.snapshot
        self._note_head(head)

        # identify
        who = case.identify(head.evidence)
        if isinstance(who, Decision):
            return _Denied(who)
        _, agent = who

        # recognise
        if head.protocol == _HTTP_10:
            return _Denied(deny(Code.PROTOCOL_VIOLATION, "HTTP/1.0 is taken for CONNECT only"))
        found = destination(snapshot, head.wire)
        if isinstance(found, Decision):
            return _Denied(found)
        tool, path = found
        adapter = services.adapters[tool.protocol]
        case.note(tool=tool.name, host=tool.endpoint.authority, path=tool.endpoint.base_path + path)
        clean = strip(tool, head.request, path)
        call = yield from self._recognise(adapter, tool, clean.request, has_body=head.has_body)
        self._note_call(tool, call)
        if isinstance(call, Refusal):
            return _Denied(deny(call.code, call.detail, violations=call.violations), adapter, call)

        # evaluate
        decision = evaluate(snapshot, agent, call)
        if not decision.allowed:
            return _Denied(decision, adapter, call)

        # issue
        lease = yield from self._lease(agent, tool, call)
        if isinstance(lease, Decision):
            return _Denied(lease, adapter, call)

        # record
        if not case.record(decision, lease):
            return _Denied(UNRECORDED, adapter, call, record=False)
        injected = ((lease.header, lease.value.reveal()),) if lease else ()
        send = Send(
            set_headers=(("accept-encoding", "identity"), *injected),
            remove_headers=clean.removed,
            path=_whole_path(head, clean.request) if clean.query_changed else None,
        )
        return _Allowed(send, adapter, tool, agent, call)

    def _recognise(
        self, adapter: Adapter, tool: Tool, request: Request, *, has_body: bool
    ) -> Generator[Command, Event, ToolCall | Refusal]:
        limit = adapter.body_limit(tool, request) if has_body else None
        if isinstance(limit, Refusal):
            return limit
        if limit is None:
            return adapter.recognise(tool, request, b"")
        declared = request.header("content-length") or ""
        if declared.isdigit() and int(declared) > limit:
            return _too_large(adapter, tool, request, limit)
        event = yield WantBody()
        if isinstance(event, ResponseHead) and event.details == _OVER_BUFFER:
            return _too_large(adapter, tool, request, limit)
        if not isinstance(event, RequestBody):
            return Refusal(Code.PROTOCOL_VIOLATION, "the body did not arrive")
        if event.trailers:
            return Refusal(Code.PROTOCOL_VIOLATION, "trailers are not passed on")
        if len(event.body) > limit:
            return _too_large(adapter, tool, request, limit)
        return adapter.recognise(tool, request, event.body)

    def _lease(self, agent: Agent, tool: Tool, call: ToolCall) -> Generator[Command, Event, Lease | Decision | None]:
        if tool.credential is None:
            return None
        services, operation = self._case.services, tool.operations.get(call.operation or "")
        issuer, now = services.issuers[tool.credential.issuer], services.now()
        occasion = Occasion(agent, tool, operation, tool.credential, self._case.attempt.run_id, self._case.snapshot.max_ttl)
        try:
            lease: Lease | CredentialUnavailable | None = issuer.cached(occasion, now)
        except CredentialUnavailable as error:
            lease = error
        if lease is None:
            event = yield Issue(issuer, occasion, now)
            lease = event.lease if isinstance(event, Issued) else CredentialUnavailable("the issuer gave no answer")
        if isinstance(lease, Lease):
            return lease
        # The advice is for whoever runs the broker: it names variables and files, so it goes to the log, not to the agent.
        log.warning("no credential: %s", lease)
        return deny(Code.CREDENTIAL_UNAVAILABLE, "no credential for this tool can be had now")

    # The answer.

    def _observe(self, allowed: "_Allowed", answer: Event) -> Steps:
        if not isinstance(answer, ResponseHead):
            raise TypeError(f"an answer was expected, not {type(answer).__name__}")
        if answer.details != "via_upstream":
            yield from self._own_answer(allowed, answer.details)
            return
        headers = dict(answer.headers)
        length = headers.get("content-length", "")
        self._ending = Ending(status=answer.status, size=int(length) if length.isdigit() else 0)
        rewriter = allowed.filter(headers.get("content-type", "")) if answer.has_body else None
        if rewriter is None:
            yield from _pass_on()
        elif headers.get("content-encoding", "identity") != "identity":
            yield self._withheld(allowed, Code.RESPONSE_BLOCKED, "the answer is compressed, although it was asked for plain")
        else:
            event = yield Observe()
            yield from self._rewrite(rewriter, event)

    def _rewrite(self, rewriter: ResponseFilter, event: Event) -> Steps:
        size = 0
        while isinstance(event, ResponseChunk):
            size += len(event.data)
            self._ending = replace(self._ending, size=size)
            try:
                data = rewriter.feed(event.data, last=event.last)
            except ResponseBlocked as error:
                self._ending = replace(self._ending, code=Code.RESPONSE_BLOCKED, detail=str(error))
                yield Cut()
                return
            event = yield Replace(data)

    def _own_answer(self, allowed: "_Allowed", details: str) -> Steps:
        """Envoy answered in the upstream's place: the connection failed, was not trusted, or led to a forbidden address."""
        untrusted = next((reason for mark, reason in _UNTRUSTED.items() if mark in details), None)
        if untrusted:
            yield self._withheld(allowed, Code.UPSTREAM_UNTRUSTED, untrusted)
            return
        self._ending = replace(self._ending, detail=details)
        yield Mark(self._case.attempt.decision_id)
        yield from _pass_on()

    def _withheld(self, allowed: "_Allowed", code: Code, why: str) -> Reply:
        self._ending = replace(self._ending, code=code, detail=why)
        return self._reply(_Denied(deny(code, why), allowed.adapter, allowed.call))

    def _mark(self, event: Event) -> Command:
        """An answer that Envoy gave by itself, before this filter saw the request."""
        named = isinstance(event, ResponseHead) and any(name == _DECISION_HEADER for name, _ in event.headers)
        return Pass() if named else Mark(self._case.attempt.decision_id)

    def _reply(self, denied: "_Denied") -> Reply:
        decision, body = denied.decision, self._case.problem(denied.decision)
        if denied.adapter is not None and denied.call is not None:
            said = denied.call if isinstance(denied.call, Refusal) else decision
            shaped = denied.adapter.denial(body, said, denied.call.correlation)
            if shaped is not None:
                return shaped
        return reply(body, status_at(decision.code or Code.INTERNAL_FAULT, self._asks_at))

    def _fault(self) -> Command:
        if self._sent:
            self._ending = replace(self._ending, code=Code.INTERNAL_FAULT)
            return Cut()
        decision = deny(Code.INTERNAL_FAULT, "the broker failed on this request; it was not sent")
        try:
            self._case.record(decision)
        except Exception:
            log.exception("decision %s: the fault could not be recorded", self._case.attempt.decision_id)
        return self._reply(_Denied(decision))

    def _note_head(self, head: RequestHead) -> None:
        wire, request = head.wire, head.request
        # Inside a tunnel the proxy has answered already: what comes now is an origin's answer, and 407 is a proxy's.
        self._asks_at = Door.BASE_URL if wire.connect_host else wire.door
        run, trace = run_id(request), _trace_id(request)
        self._case.note(door=wire.door, method=request.method, host=wire.authority, path=request.path, run_id=run, trace_id=trace)

    def _note_call(self, tool: Tool, call: ToolCall | Refusal) -> None:
        operation = tool.operations.get(call.operation or "")
        if operation:
            self._case.note(operation=operation.name, effect=operation.effect, data=operation.data)
        if isinstance(call, ToolCall):
            self._case.note(operation=operation.name if operation else call.label, params=call.params)


@dataclass(frozen=True, slots=True)
class _Allowed:
    """What leaves, and what its answer is judged by."""

    send: Send
    adapter: Adapter
    tool: Tool
    agent: Agent
    call: ToolCall

    def filter(self, content_type: str) -> ResponseFilter | None:
        return self.adapter.response_filter(self.tool, self.agent.tools[self.tool.name], self.call, content_type)


@dataclass(frozen=True, slots=True)
class _Denied:
    """A denial, and how far the request was understood. `record` is False where the record itself failed."""

    decision: Decision
    adapter: Adapter | None = None
    call: ToolCall | Refusal | None = None
    record: bool = True


def _pass_on() -> Steps:
    # Only what was let go on purpose goes on: any other script that has run out is cut.
    while True:
        yield Pass()


def _too_large(adapter: Adapter, tool: Tool, request: Request, limit: int) -> Refusal:
    named = adapter.recognise(tool, request, b"").operation
    return Refusal(Code.BODY_TOO_LARGE, f"the body is larger than the {limit} bytes that it may have", operation=named)


def run_id(request: Request) -> str:
    """The run that a request names (`x-run-id`, or W3C baggage `run.id`), which only groups; empty when it names none."""
    if request.header("x-run-id") is not None:
        named = request.only("x-run-id") or ""
    else:
        # W3C Baggage section 3.2: `key = value ; properties`, the value percent-encoded.
        members = (member.partition(";")[0].partition("=") for member in ",".join(request.all("baggage")).split(","))
        named = next((unquote(value) for key, _, value in members if key.strip() == "run.id"), "")
    return named.strip() if _RUN_ID.fullmatch(named.strip()) else ""


def _trace_id(request: Request) -> str:
    # W3C Trace Context section 3.2: version-traceid-parentid-flags.
    parts = (request.header("traceparent") or "").split("-")
    return parts[1] if len(parts) >= _TRACEPARENT_PARTS and _TRACE_ID.fullmatch(parts[1]) else ""


def _whole_path(head: RequestHead, request: Request) -> str:
    return f"{head.request.path}?{request.query}" if request.query else head.request.path
