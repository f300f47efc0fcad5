"""The answer to one allowed call, as it comes back, and what the call came to in the end.

Laws: an answer that nothing has to be read from passes untouched. One that must be read and can't be is withheld or cut, never
passed unread; one whose usage is read on the side is never held back. What a model call used and nobody told is estimated, and
what may have been used is not given back.
"""

from collections.abc import Mapping
from dataclasses import replace

from broker.audit.record import Ending
from broker.case import Case
from broker.credentials.base import Lease
from broker.credentials.scrub import ScrubbedStream, Scrubber, scrubber_of
from broker.events import Cut, Event, Mark, Observe, Pass, Replace, ResponseChunk, ResponseHead, ResponseTrailers, Steps
from broker.policy.limits import NANO, Measure, used
from broker.policy.snapshot import Agent, Tool
from broker.policy.types import Code, ToolCall, Usage, deny
from broker.protocols.base import Adapter, Meter, Reply, ResponseBlocked, ResponseFilter

_ERROR, _SERVER_ERROR = 400, 500
_TIMED_OUT = (408, 504, 524)  # what was asked for may have been generated all the same

# What Envoy says (response code details) when the upstream itself was refused.
_UNTRUSTED = {
    "rbac_access_denied": "the tool's host resolved to an address that its catalog entry does not allow",
    "CERTIFICATE_VERIFY_FAILED": "the tool's certificate could not be verified",
    "TLS_error": "no verified TLS connection to the tool could be made",
}
# When the call was not even tried (`dataplane/clusters.py`); and after how many seconds it is worth another try.
_UNAVAILABLE = {
    "no_healthy_upstream": (
        "the tool failed several times in a row and is left alone for a while, or its name has no address",
        5,
    ),
    "{overflow}": ("more calls of the tool are open than it may hold", 1),
}
# And when no connection to it came about, so that it can't have acted.
_UNREACHED = (*_UNTRUSTED, *_UNAVAILABLE, "connection_failure", "connection_timeout", "dns_resolution_failure")
# And when there was one, and no answer came of it.
_REDIRECT = 300
_SCRUBBED_BYTES = 1_048_576
_OPAQUE = ("image/", "audio/", "video/", "font/")
_BROKEN_OFF = ("reset", "timeout")
_BLAMED: Mapping[str, str] = {Code.UPSTREAM_UNTRUSTED: "untrusted", Code.RESPONSE_BLOCKED: "blocked"}


class Answer:
    """What became of a call that was let go. `observe` follows the answer; `end` is called once, when all is over."""

    def __init__(  # noqa: PLR0913, PLR0917 - what was decided of the call
        self, case: Case, adapter: Adapter, tool: Tool, agent: Agent, call: ToolCall, scrubber: Scrubber | None
    ) -> None:
        self._case, self._adapter, self._tool, self._agent, self._call = case, adapter, tool, agent, call
        self._scrubber = scrubber
        self._masked: dict[str, int] = {}
        self._stream: ScrubbedStream | None = None
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
        headers, clean = dict(event.headers), self._scrubbed(event.headers)
        length = headers.get("content-length", "")
        self._ending = Ending(status=event.status, size=int(length) if length.isdigit() else 0)
        filters = self._filters(headers.get("content-type", "")) if event.has_body else []
        if filters and headers.get("content-encoding", "identity") != "identity":
            yield self._withheld(Code.RESPONSE_BLOCKED, "the answer is compressed, although it was asked for plain")
        elif filters:
            chunk = yield Observe(clean)
            yield from self._rewrite(filters, chunk)
        else:
            following = yield Pass(clean)
            yield from self._pass_on(following)

    def _filters(self, content_type: str) -> list[ResponseFilter]:
        """What the body goes through, in order. Last comes what takes the credential out, of whatever the others made."""
        found: ResponseFilter | None = None
        if not (self._call.model and self._ending.status >= _ERROR):
            found = self._adapter.response_filter(self._tool, self._agent.grants(self._tool.name), self._call, content_type)
            self._meter = found if found is not None and isinstance(found, Meter) else None
        self._stream = self._scrubber.stream() if self._scrubber and self._is_scrubbed(content_type.strip().lower()) else None
        return [each for each in (found, self._stream) if each]

    def _is_scrubbed(self, media: str) -> bool:
        """Whether the body is read for the credential (ADR 13): errors, events, what is short and no media; or as declared."""
        operation = self._tool.operations.get(self._call.operation or "")
        if operation and operation.scrub != "auto":
            return operation.scrub == "always"
        if self._ending.status >= _REDIRECT or media.startswith("text/event-stream"):
            return True
        return self._ending.size <= _SCRUBBED_BYTES and not media.startswith(_OPAQUE)

    def _rewrite(self, filters: list[ResponseFilter], event: Event) -> Steps:
        size = 0
        while isinstance(event, ResponseChunk):
            size += len(event.data)
            self._ending = replace(self._ending, size=size)
            data = event.data
            try:
                for each in filters:
                    data = each.feed(data, last=event.last)
            except ResponseBlocked as error:
                self._ending = replace(self._ending, code=Code.RESPONSE_BLOCKED, detail=str(error))
                yield Cut()
                return
            event = yield Pass() if data is event.data else Replace(data)
        if isinstance(event, ResponseTrailers):
            yield from self._pass_on(event)

    def _scrubbed(self, headers: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        """The headers that showed the credential, without it, together with all others of their names."""
        if self._scrubber is None:
            return ()
        clean = [(name, *self._scrubber.header(value)) for name, value in headers]
        shown = {name: found for name, _, found in clean if found}
        for name, found in shown.items():
            self._masked[name] = self._masked.get(name, 0) + found
        return tuple((name, value) for name, value, _ in clean if name in shown)

    def _pass_on(self, event: Event) -> Steps:
        # Only what was let go on purpose goes on: any other script that has run out is cut.
        while True:
            event = yield Pass(self._scrubbed(event.headers) if isinstance(event, ResponseTrailers) else ())

    def _own_answer(self, details: str) -> Steps:
        """Envoy answered in the upstream's place: the connection failed, was not trusted, or led to a forbidden address."""
        self._unreached = any(mark in details for mark in _UNREACHED)
        self._error = "unreached" if self._unreached else next((word for word in _BROKEN_OFF if word in details), "other")
        untrusted = next((reason for mark, reason in _UNTRUSTED.items() if mark in details), None)
        if untrusted:
            yield self._withheld(Code.UPSTREAM_UNTRUSTED, untrusted)
            return
        if unavailable := next((told for mark, told in _UNAVAILABLE.items() if mark in details), None):
            why, wait = unavailable
            yield self._withheld(Code.UPSTREAM_UNAVAILABLE, f"{why} ({details})", wait)
            return
        self._ending = replace(self._ending, detail=details)
        following = yield Mark(self._case.attempt.decision_id)
        yield from self._pass_on(following)

    def _withheld(self, code: Code, why: str, wait: int = 0) -> Reply:
        self._ending = replace(self._ending, code=code, detail=why)
        return self._case.reply(deny(code, why, retry_after=wait), self._adapter, self._call)

    def cut(self, why: str, code: Code) -> None:
        """The answer ends here: its agent was revoked, or what let it pass no longer holds."""
        self._ending = replace(self._ending, code=code, detail=why)

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
        if self._stream and self._stream.found:
            self._masked["body"] = self._stream.found
        if self._masked:
            ending = replace(ending, masked=tuple(sorted(self._masked)))
            what = f"{self._tool.name} showed a credential in its answer ({', '.join(ending.masked)}); it was taken out"
            self._case.alert("credential_shown", what)
        self._case.record_outcome(ending, self._error_type())
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
        failed = self._ending.status >= _ERROR and self._ending.status not in _TIMED_OUT
        if model is None or self._unreached or failed:
            return Usage()
        return Usage(model.input_tokens, (model.max_output or 0) * model.choices, estimated=True)


def hidden(lease: Lease | None) -> Scrubber | None:
    """What takes a lease's credential out of an answer; without the session's token, a signature is worth nothing."""
    if lease is None:
        return None
    headers = () if lease.sign else (lease.value,)
    return scrubber_of(tuple(value.reveal() for value in (*lease.secrets, *headers)))
