"""The answer to one allowed call, as it comes back, and what the call came to in the end.

Laws: an answer that nothing has to be read from passes untouched. One that must be read and can't be is withheld or cut, never
passed unread; one whose usage is read on the side is never held back. What a model call used and nobody told is estimated, and
what may have been used is not given back.
"""

from collections.abc import Mapping
from dataclasses import replace

from broker.audit.record import Ending
from broker.case import Case
from broker.events import Cut, Event, Mark, Observe, Pass, Replace, ResponseChunk, ResponseHead, Steps
from broker.policy.limits import NANO, Measure, used
from broker.policy.snapshot import Agent, Tool
from broker.policy.types import Code, ToolCall, Usage, deny
from broker.protocols.base import Adapter, Meter, Reply, ResponseBlocked, ResponseFilter

_ERROR, _SERVER_ERROR = 400, 500

# What Envoy says (response code details) when the upstream itself was refused.
_UNTRUSTED = {
    "rbac_access_denied": "the tool's host resolved to an address that its catalog entry does not allow",
    "CERTIFICATE_VERIFY_FAILED": "the tool's certificate could not be verified",
    "TLS_error": "no verified TLS connection to the tool could be made",
}
# And when no connection to it came about, so that it can't have acted.
_UNREACHED = (*_UNTRUSTED, "connection_failure", "connection_timeout", "no_healthy_upstream", "dns_resolution_failure")
# And when there was one, and no answer came of it.
_BROKEN_OFF = ("reset", "timeout")
_BLAMED: Mapping[str, str] = {Code.UPSTREAM_UNTRUSTED: "untrusted", Code.RESPONSE_BLOCKED: "blocked"}


class Answer:
    """What became of a call that was let go. `observe` follows the answer; `end` is called once, when all is over."""

    def __init__(self, case: Case, adapter: Adapter, tool: Tool, agent: Agent, call: ToolCall) -> None:
        self._case, self._adapter, self._tool, self._agent, self._call = case, adapter, tool, agent, call
        self._started = case.services.mono_ns()
        self._ending = Ending(detail="the call ended before an answer came")
        self._unreached = False
        self._error = ""
        self._meter: Meter | None = None

    def observe(self, event: Event) -> Steps:
        """The commands for the answer's head and what follows it."""
        if not isinstance(event, ResponseHead):
            raise TypeError(f"an answer was expected, not {type(event).__name__}")
        if event.details != "via_upstream":
            yield from self._own_answer(event.details)
            return
        headers = dict(event.headers)
        length = headers.get("content-length", "")
        self._ending = Ending(status=event.status, size=int(length) if length.isdigit() else 0)
        rewriter = self._filter(headers.get("content-type", "")) if event.has_body else None
        if rewriter is None:
            yield from _pass_on()
        elif headers.get("content-encoding", "identity") != "identity":
            yield self._withheld(Code.RESPONSE_BLOCKED, "the answer is compressed, although it was asked for plain")
        else:
            chunk = yield Observe()
            yield from self._rewrite(rewriter, chunk)

    def _filter(self, content_type: str) -> ResponseFilter | None:
        if self._call.model and self._ending.status >= _ERROR:
            return None
        found = self._adapter.response_filter(self._tool, self._agent.tools[self._tool.name], self._call, content_type)
        self._meter = found if isinstance(found, Meter) else None
        return found

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
            event = yield Pass() if data is event.data else Replace(data)

    def _own_answer(self, details: str) -> Steps:
        """Envoy answered in the upstream's place: the connection failed, was not trusted, or led to a forbidden address."""
        self._unreached = any(mark in details for mark in _UNREACHED)
        self._error = "unreached" if self._unreached else next((word for word in _BROKEN_OFF if word in details), "other")
        untrusted = next((reason for mark, reason in _UNTRUSTED.items() if mark in details), None)
        if untrusted:
            yield self._withheld(Code.UPSTREAM_UNTRUSTED, untrusted)
            return
        self._ending = replace(self._ending, detail=details)
        yield Mark(self._case.attempt.decision_id)
        yield from _pass_on()

    def _withheld(self, code: Code, why: str) -> Reply:
        self._ending = replace(self._ending, code=code, detail=why)
        return self._case.reply(deny(code, why), self._adapter, self._call)

    def fault(self) -> None:
        """The broker failed on the answer, which is cut."""
        self._ending = replace(self._ending, code=Code.INTERNAL_FAULT)

    def end(self) -> dict[Measure, int]:
        """Record how it ended; what it spent, where that differs from what every call does."""
        duration = (self._case.services.mono_ns() - self._started) / 1e6
        ending, spent = replace(self._ending, duration_ms=round(duration, 3)), dict[Measure, int]()
        if self._call.model:
            usage = self._usage()
            _, price = self._case.snapshot.price(self._tool, self._call.model.name)
            spent = used(usage, price)
            usd = spent[Measure.USD] / NANO if price else None
            ending = replace(ending, usage=usage, usd=usd, completion_hash=self._meter.completion_hash if self._meter else "")
        self._case.record_outcome(ending)
        model = self._call.model.name if self._call.model else ""
        self._case.services.metrics.ended(self._agent.name, self._tool.name, model, ending, self._error_type())
        return spent

    def _error_type(self) -> str:
        """What went wrong upstream, as a word for the metrics."""
        return _BLAMED.get(self._ending.code) or self._error or ("5xx" if self._ending.status >= _SERVER_ERROR else "")

    def _usage(self) -> Usage:
        model = self._call.model
        if self._meter:
            return self._meter.usage
        if model is None or self._unreached or self._ending.status >= _ERROR:
            return Usage()
        return Usage(model.input_tokens, (model.max_output or 0) * model.choices, estimated=True)


def _pass_on() -> Steps:
    # Only what was let go on purpose goes on: any other script that has run out is cut.
    while True:
        yield Pass()
