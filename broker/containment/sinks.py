"""An alert, and how a sink is told of it: PagerDuty's Events API v2, or a webhook signed by Standard Webhooks 1.0.

Laws: a secret is read for each try, goes into that one request and is kept nowhere. What a sink answers is not repeated but for
its status, for it could hold what it was sent. One alert has one ID, however often it is tried.

https://developer.pagerduty.com/docs/send-alert-event · https://github.com/standard-webhooks/standard-webhooks
"""

import base64
import contextlib
import hashlib
import hmac
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any

from broker.credentials.base import CredentialUnavailable, referenced
from broker.credentials.http import Answer, ask
from broker.errors import BrokerError, counted
from broker.policy.containment import Alerting, PagerDutySink, Severity, WebhookSink
from broker.policy.types import Json
from broker.redaction import redacted

STORM = "storm"
"""The kind of the one alert that stands for all that were too many in a minute."""

_PAGERDUTY_SEVERITY = {Severity.HIGH: "critical", Severity.MEDIUM: "warning", Severity.LOW: "info"}
# PagerDuty's bounds, in characters; a payload may have 512 KB there, and should have 20 KB at a webhook.
_MAX_SUMMARY, _MAX_KEY, _MAX_BYTES, _MAX_DECISIONS = 1024, 255, 16_384, 100
# Standard Webhooks, "Signature scheme": 192 to 512 bits.
_SECRET_BYTES = range(24, 65)
# RFC 9110 section 15.5.9, RFC 8470 section 5.2, RFC 6585 section 4: of all 4xx, these may pass by themselves.
_PASSING = frozenset({408, 425, 429})


class Refused(BrokerError):
    """The sink does not take this alert, and would not if it were tried again as it is."""


@dataclass(frozen=True, slots=True)
class Alert:
    """What people should know. Alerts with the same `dedup_key` are one incident, which one that `resolves` ends.

    `kind` is a detector's name, or revocation, release, approval, ledger, self_test and so on; `summary` is one sentence. `agent`
    is its `described` (name, spiffe, owner, oncall), or empty. `details` go to the sink as they are: no secret belongs there.
    """

    kind: str
    severity: Severity
    summary: str
    dedup_key: str
    agent: Mapping[str, str] = field(default_factory=dict, hash=False)
    decision_ids: tuple[str, ...] = ()
    details: Mapping[str, Json] = field(default_factory=dict, hash=False)
    resolves: bool = False


@dataclass(slots=True)
class Notice:
    """An alert on its way to one sink. `at` is when it was sent by the wall clock; `born` and `due` are of the steady one.

    All are seconds since the epoch. `repeated` is how often the alert came again while it waited; `fell` says that the fallback
    has it. `failures` counts tries of this notice.
    """

    name: str
    sink: str
    alert: Alert
    at: float
    born: float
    due: float
    repeated: int = 0
    fell: bool = False
    failures: int = 0

    @property
    def summary(self) -> str:
        """The sentence for people, of a storm with its number."""
        if self.alert.kind != STORM:
            return self.alert.summary or self.alert.kind
        return f"{counted(self.repeated + 1, 'more alert')} in the last minute, too many to tell each: see the audit record"

    def packed(self) -> bytes:
        """It as JSON, whatever the alert holds."""
        return _json({each.name: getattr(self, each.name) for each in fields(self)})


def unpacked(row: bytes) -> Notice:
    """What `packed` gave. Raises `ValueError`, `TypeError` or `KeyError`."""
    read = json.loads(row, parse_constant=lambda _: None)
    alert = read.pop("alert")
    severity, decisions = Severity(alert.pop("severity")), tuple(alert.pop("decision_ids"))
    return Notice(**read, alert=Alert(**alert, severity=severity, decision_ids=decisions))


def bounded(alert: Alert) -> Alert:
    """The alert at a size that every sink takes, its summary without credentials of well-known forms."""
    short = replace(alert, summary=redacted(alert.summary)[:_MAX_SUMMARY])
    if len(_json(short)) <= _MAX_BYTES:
        return short
    left_out: dict[str, Json] = {"left_out": "the details are too long; see the audit record"}
    return replace(short, details=left_out, decision_ids=short.decision_ids[:_MAX_DECISIONS])


async def deliver(notice: Notice, sink: PagerDutySink | WebhookSink | None, source: str, now: float) -> None:
    """Tell the sink. `source` is this host; `now` is the wall clock's. Raises `CredentialUnavailable`, or `Refused` for good."""
    if sink is None:
        raise CredentialUnavailable(f"the platform policy has no sink {notice.sink!r}", "add it to alerts again")
    if isinstance(sink, PagerDutySink):
        reference = sink.oncall.get(notice.alert.agent.get("oncall", ""), sink.routing_key)
        answer = await ask("POST", sink.url, body=_event(notice, referenced(reference, notice.sink), source))
        done = answer.status == 202  # noqa: PLR2004 - the one answer that PagerDuty documents as accepted
    else:
        answer = await _posted(notice, sink, source, now)
        done = answer.ok
    if not done:
        what, advice = f"{notice.sink} answers {answer.status}", "see whether its URL and its secret are right"
        final = 400 <= answer.status < 500 and answer.status not in _PASSING  # noqa: PLR2004 - RFC 9110 section 15.5
        raise Refused(what, advice) if final else CredentialUnavailable(what, "see whether it is up")


def sink_references(alerting: Alerting) -> Iterator[Mapping[str, str]]:
    """References to what the sinks are told with."""
    for sink in alerting.sinks.values():
        yield from (sink.routing_key, *sink.oncall.values()) if isinstance(sink, PagerDutySink) else (sink.secret,)


def _event(notice: Notice, routing_key: str, source: str) -> dict[str, Any]:
    alert, key = notice.alert, notice.alert.dedup_key
    head = {
        "routing_key": routing_key,
        "event_action": "resolve" if alert.resolves else "trigger",
        "dedup_key": key if len(key) <= _MAX_KEY else hashlib.sha256(key.encode()).hexdigest(),
    }
    if alert.resolves:
        return head
    payload = {
        "summary": notice.summary,
        "source": source,
        "severity": _PAGERDUTY_SEVERITY[alert.severity],
        "timestamp": _rfc3339(notice.at),
        "component": alert.agent.get("name") or "broker",
        "group": alert.agent.get("owner", ""),
        "class": alert.kind,
        "custom_details": {**alert.details, **_known(notice)},
    }
    return {**head, "client": "Envoy tool broker", "payload": payload}


async def _posted(notice: Notice, sink: WebhookSink, source: str, now: float) -> Answer:
    alert = notice.alert
    data = {name: getattr(alert, name) for name in ("kind", "severity", "dedup_key", "details")}
    data |= {"summary": notice.summary, "source": source, **_known(notice)}
    word = "broker.alert.resolved" if alert.resolves else "broker.alert.triggered"
    body, time = _json({"type": word, "timestamp": _rfc3339(notice.at), "data": data}), str(int(now))
    signed = b".".join((notice.name.encode(), time.encode(), body))
    signature = hmac.digest(_key(referenced(sink.secret, notice.sink), notice.sink), signed, "sha256")
    headers = {
        "content-type": "application/json",
        "webhook-id": notice.name,
        "webhook-timestamp": time,
        "webhook-signature": f"v1,{base64.b64encode(signature).decode()}",
    }
    return await ask("POST", sink.url, headers=headers, content=body, ca={"file": sink.ca} if sink.ca else None)


def _key(secret: str, sink: str) -> bytes:
    form, text = secret[:6], secret[6:]
    with contextlib.suppress(ValueError):
        key = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
        if form == "whsec_" and len(key) in _SECRET_BYTES:
            return key
    what = f"the secret of the webhook {sink!r} is not of Standard Webhooks' form"
    raise CredentialUnavailable(what, "set it to whsec_ and the base64 of 24 to 64 random bytes")


def _known(notice: Notice) -> dict[str, Any]:
    known = {"agent": dict(notice.alert.agent), "decision_ids": list(notice.alert.decision_ids)}
    return known | ({"repeated": notice.repeated} if notice.repeated else {})


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def _json(value: object) -> bytes:
    # Agents choose some of the words in alerts: what is no Unicode (a lone surrogate) must not keep people from being told.
    return json.dumps(value, default=_plain, skipkeys=True, ensure_ascii=False).encode(errors="replace")


def _plain(value: object) -> object:
    if isinstance(value, Alert):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return dict(value) if isinstance(value, Mapping) else str(value)
