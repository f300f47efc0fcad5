"""The audit record: its canonical form, its fields, and what must not stand in it.

Laws: the same record is always the same bytes (UTF-8, keys sorted, no whitespace). No clock is read here. What an agent sent is
recorded only after redaction, and `args_hash` ties the record to all of it. When in doubt a value is left out: a reviewer can do
without a value, a leaked secret can't be taken back. Redaction knows names and shapes, so it is a net, not a proof: an operation
whose parameters are sensitive declares the data class `pii` or `secret`.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import orjson

from broker.audit import AuditUnavailable
from broker.policy.types import Decision, Json, Violation

SCHEMA = "broker.audit/v1"

# Bounds of one record. A name or an issue title is kept whole; a prompt or a file is not evidence but content.
_MAX_TEXT = 256  # characters of one argument
_MAX_NAME = 2048  # characters of a path or host: beyond that only an attack is that long
_MAX_DEPTH = 16
_MAX_ARGS = 16_384 - 1_024  # bytes; the rest is for the marks of what was left out, at most two a level
_MAX_VIOLATIONS = 32

_REDACTED = "[redacted]"
_SENSITIVE = ("secret", "pii")
_CREDENTIAL_KEY = re.compile(
    r"passw(?:or)?d|passphrase|pwd|secret|token|apikey|accesskey|privatekey|signingkey|sessionid|authorization|cookie"
    r"|credential|bearer|jwt|signature|^(?:auth|pass|otp|pin|cvc|cvv|sig)$"
)
_SECRET_SHAPE = re.compile(
    r"[srp]k_(?:live|test)_\w|whsec_\w|\bsk-[\w-]{8}|gh[pousr]_\w{8}|github_pat_\w|glpat-\w|xox[a-z]-\w|xapp-\w|\bA(?:KIA|SIA)[A-Z0-9]{12}"
    r"|\bAIza[\w-]{20}|\beyJ[\w-]+\.[\w-]+\.|-----BEGIN [A-Z]|\b[Bb](?:earer|asic) +[\w+/=.~-]{8}"
)
# Each shape holds one of these; looking for them first is eight times as fast on text that holds none.
# fmt: off
_MARKS = (
    "k_live_", "k_test_", "whsec_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "_pat_", "glpat-", "xox", "xapp-", "AKIA",
    "ASIA", "AIza", "eyJ", "--BEGIN", "earer ", "asic ",
)
# fmt: on
# How far into a text a secret is looked for: longer texts are not recorded anyway, and the search stays cheap on hostile ones.
_SEARCHED = 512


def canonical(value: Any) -> bytes:
    """The one encoding of a JSON value. Raises `TypeError` for what it can't say (lone surrogates, integers beyond 64 bits)."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def args_hash(params: Mapping[str, Json]) -> str:
    """`sha256:` over the canonical form of all parameters, unredacted. Raises `AuditUnavailable` where they have none."""
    try:
        return f"sha256:{hashlib.sha256(canonical(dict(params))).hexdigest()}"
    except TypeError as error:
        raise AuditUnavailable(f"the call's parameters have no canonical JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class Attempt:
    """Who tried what, as far as it was known when the decision fell; empty means not known.

    `agent` holds `name`, `spiffe`, `owner`, `oncall`. `path` is raw and without query. `data` are the operation's data classes.
    """

    decision_id: str
    revision: str
    agent: Mapping[str, str]
    door: str = ""
    method: str = ""
    host: str = ""
    path: str = ""
    tool: str = ""
    operation: str = ""
    effect: str = ""
    data: tuple[str, ...] = ()
    params: Mapping[str, Json] = field(default_factory=dict)
    run_id: str = ""
    step: int = 0
    trace_id: str = ""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a call ended. `status` is 0 when no upstream answered; `code` is set when the broker ended it (`response_blocked`, …).

    `size` is in bytes, `duration_ms` in milliseconds; `response_hash` is `sha256:…`, where the body was read.
    """

    status: int = 0
    size: int = 0
    duration_ms: float = 0.0
    code: str = ""
    detail: str = ""
    response_hash: str = ""


def decision_record(
    now: float, mono_ns: int, attempt: Attempt, decision: Decision, credential: Mapping[str, Json] | None = None
) -> dict[str, Any]:
    """The record of a decision, to be written before the call leaves. `now` in seconds since the epoch.

    `credential` holds `issuer`, `scopes`, `lease_id`, `expires`, never the credential. Raises `AuditUnavailable` as `args_hash`.
    """
    return {
        **_call(_event("decision", now, mono_ns), attempt),
        "door": attempt.door or None,
        "effect": attempt.effect or None,
        "data": list(attempt.data),
        "method": _text(attempt.method, _MAX_TEXT),
        "host": _text(attempt.host, _MAX_NAME),
        "path": _path(attempt),
        "args": redact(attempt.params, attempt.data),
        "args_hash": args_hash(attempt.params),
        "verdict": str(decision.verdict),
        "code": str(decision.code) if decision.code else None,
        "rule": decision.rule or None,
        "detail": _text(decision.detail, _MAX_NAME) or None,
        "violations": [_violation(violation) for violation in decision.violations[:_MAX_VIOLATIONS]],
        "credential": dict(credential) if credential else None,
    }


def outcome_record(now: float, mono_ns: int, attempt: Attempt, ending: Ending) -> dict[str, Any]:
    """The record of how an allowed call ended, tied to its decision by `decision_id`."""
    return {
        **_call(_event("outcome", now, mono_ns), attempt),
        "code": ending.code or None,
        "detail": _text(ending.detail, _MAX_NAME) or None,
        "upstream": {"status": ending.status, "bytes": ending.size, "duration_ms": ending.duration_ms},
        "response_hash": ending.response_hash or None,
    }


def config_record(now: float, mono_ns: int, detail: str, revision: str = "") -> dict[str, Any]:
    """The record of a change to what is in force (or of a refused one, as `detail` says); `revision` is what is in force now."""
    return {
        **_event("config", now, mono_ns),
        "detail": _text(detail, _MAX_NAME),
        "revision": revision or None,
    }


def revocation_record(
    now: float, mono_ns: int, agent: Mapping[str, str], detail: str, *, released: bool = False
) -> dict[str, Any]:
    """The record of an agent's revocation, or of its release. `detail` says by whom and why."""
    event = _event("release" if released else "revocation", now, mono_ns)
    return {**event, "agent": dict(agent), "detail": _text(detail, _MAX_NAME)}


def timestamp(now: float) -> str:
    """Seconds since the epoch as RFC 3339, UTC, in microseconds."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _event(event: str, now: float, mono_ns: int) -> dict[str, Any]:
    return {"schema": SCHEMA, "time": timestamp(now), "mono_ns": mono_ns, "event": event}


def _call(record: dict[str, Any], attempt: Attempt) -> dict[str, Any]:
    record.update(
        decision_id=attempt.decision_id,
        agent={key: _text(value, _MAX_TEXT) for key, value in attempt.agent.items()},
        run_id=_text(attempt.run_id, _MAX_TEXT) or None,
        step=attempt.step,
        trace_id=_text(attempt.trace_id, _MAX_TEXT) or None,
        tool=attempt.tool or None,
        operation=attempt.operation or None,
        revision=attempt.revision,
    )
    return record


def _violation(violation: Violation) -> dict[str, str]:
    # A pointer holds names that the agent chose.
    return {
        "pointer": _text(violation.pointer, _MAX_TEXT),
        "rule": violation.rule,
        "message": _text(violation.message, _MAX_NAME),
    }


def _path(attempt: Attempt) -> str:
    """The path, without those segments that are parameters of a sensitive operation."""
    kind = _sensitive(attempt.data)
    variables = attempt.params.get("path")
    if not kind or not isinstance(variables, dict):
        return _text(attempt.path, _MAX_NAME)
    hidden = {segment for value in variables.values() for segment in str(value).split("/")}
    segments = (f"[{kind}]" if unquote(part) in hidden and part else part for part in attempt.path.split("/"))
    return _text("/".join(segments), _MAX_NAME)


def redact(params: Mapping[str, Json], data_classes: tuple[str, ...]) -> dict[str, Any]:
    """The parameters as they may be recorded: at most 16 KiB of canonical JSON, 16 levels deep.

    First that applies to a value:

    1. its key names a credential → `[redacted]` (a number of `…tokens` is a count, and stays)
    2. the operation's data classes hold `secret` or `pii`, and it is text or a number of nine digits → `[pii 12 chars]`
    3. it looks like a secret → `[redacted]`
    4. it is text over 256 characters → its length and hash
    5. it is deeper or later than the bounds → how much was left out
    """
    clean = _Redaction(_sensitive(data_classes)).value(dict(params), 0)
    return clean if isinstance(clean, dict) else {}


def _sensitive(data_classes: tuple[str, ...]) -> str:
    return next((kind for kind in _SENSITIVE if kind in data_classes), "")


class _Redaction:
    """One walk over one call's parameters, with the bytes that are left for it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.left = _MAX_ARGS

    def value(self, value: Json, depth: int) -> Json:
        if isinstance(value, (dict, list)) and depth >= _MAX_DEPTH:
            value = f"[{len(value)} more, too deep]"
        elif isinstance(value, dict):
            return self._object(value, depth)
        elif isinstance(value, list):
            return self._array(value, depth)
        elif isinstance(value, str):
            value = f"[{self.kind} {len(value)} chars]" if self.kind else _text(value, _MAX_TEXT)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = self._integer(value)
        self.left -= len(canonical(value)) + 1
        return value

    def _object(self, value: dict[str, Json], depth: int) -> Json:
        out: dict[str, Json] = {}
        self.left -= 3
        for count, (key, item) in enumerate(value.items()):
            name = _text(key, _MAX_TEXT)
            self.left -= len(canonical(name)) + 1
            if self.left <= 0:
                return {**out, "[left out]": f"[{len(value) - count} more]"}
            out[name] = self.value(_REDACTED if _is_credential(key, item) else item, depth + 1)
        return out

    def _array(self, value: list[Json], depth: int) -> Json:
        out: list[Json] = []
        self.left -= 3
        for count, item in enumerate(value):
            if self.left <= 0:
                return [*out, f"[{len(value) - count} more]"]
            out.append(self.value(item, depth + 1))
        return out

    def _integer(self, value: int) -> Json:
        # Nine digits and more: social security, phone and card numbers. Smaller ones are amounts and counts.
        if self.kind and abs(value) >= 100_000_000:  # noqa: PLR2004
            return f"[{self.kind} number]"
        return value if -(2**63) <= value < 2**63 else f"[number of {value.bit_length()} bits]"


def _is_credential(key: str, value: Json) -> bool:
    counts = key.endswith("tokens") and isinstance(value, (int, float))
    return not counts and _names_credential(key[:_SEARCHED])


@lru_cache(maxsize=4096)  # a catalog has few parameter names, and they come with every call
def _names_credential(key: str) -> bool:
    return _CREDENTIAL_KEY.search(re.sub(r"[^a-z0-9]", "", key.lower())) is not None


def _text(text: str, limit: int) -> str:
    """Text as it may be recorded; always encodable, however it was decoded from the wire."""
    for mark in _MARKS:
        if mark in text:
            if _SECRET_SHAPE.search(text, 0, _SEARCHED):
                return _REDACTED
            break
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) > limit:
        return f"[{len(text)} chars sha256:{hashlib.sha256(text.encode()).hexdigest()}]"
    return text
