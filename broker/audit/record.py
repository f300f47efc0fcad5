"""The audit record: its canonical form, its fields, and what must not stand in it.

Laws: the same record is always the same bytes (UTF-8, keys sorted, no whitespace). No clock is read here. What an agent sent is
recorded only after redaction, and `args_hash` ties the record to all of it. When in doubt a value is left out: a reviewer can do
without a value, a leaked secret can't be taken back. Redaction knows names and shapes, so it is a net, not a proof: an operation
whose parameters are sensitive declares the data class `pii` or `secret`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import orjson

from broker.audit import AuditUnavailable
from broker.policy.types import Code, Decision, Json, Usage
from broker.redaction import SHAPE

SCHEMA = "broker.audit/v1"

# Bounds of one record. A name or an issue title is kept whole; a prompt or a file is not evidence but content.
_MAX_TEXT = 256  # characters of one argument
_MAX_NAME = 2048  # characters of a path or host: beyond that only an attack is that long
_MAX_DEPTH = 16
_MAX_ARGS = 8_192  # bytes of one location
_MAX_VIOLATIONS = 32
# How far into a text a secret is looked for, or as far as it may be recorded: the search stays cheap on hostile ones.
_SEARCHED = 512

_REDACTED = "[redacted]"
_CREDENTIAL_KEY = re.compile(
    r"passw(?:or)?d|passphrase|pwd|secret|token|apikey|accesskey|privatekey|signingkey|sessionid|authorization|cookie"
    r"|credential|bearer|jwt|signature|^(?:auth|pass|otp|pin|cvc|cvv|sig)$"
)
_SECRET = re.compile(SHAPE + r"|\b[Bb](?:earer|asic) +[\w+/=.~-]{8}")
# Each shape holds one of these, under a sign that the marks share; looking for them first is far faster on text that holds none.
_MARKS = {
    "_": ("k_live_", "k_test_", "whsec_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "_pat_", "npm_"),
    "-": ("sk-", "glpat-", "xox", "xapp-", "--BEGIN"),
    "A": ("AKIA", "ASIA", "AIza"),
    "": ("eyJ", "earer ", "asic "),
}


def canonical(value: Any) -> bytes:
    """The one encoding of a JSON value. Raises `TypeError` for what it can't say (lone surrogates, integers beyond 64 bits)."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def args_hash(params: Mapping[str, Json]) -> str:
    """`sha256:` over the canonical form of all parameters, unredacted. Raises `AuditUnavailable` where they have none."""
    try:
        return f"sha256:{hashlib.sha256(canonical(dict(params))).hexdigest()}"
    except TypeError as error:
        raise AuditUnavailable(f"the call's parameters have no canonical JSON: {error}") from error


@dataclass(slots=True)
class Attempt:
    """Who tried what, as far as it is known by now; empty means not known.

    `agent` holds `name`, `spiffe`, `owner`, `oncall`. `path` is raw and without query. `data` are the operation's data classes.
    `limits` is what was reserved, or which limit refused. `model` and what follows are those of a model call. `approval` is the
    one that the call waits for, or that it used. `withheld` is of what the request holds that must not stand in the record.
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
    args_hash: str = ""
    run_id: str = ""
    step: int = 0
    trace_id: str = ""
    limits: Mapping[str, Json] = field(default_factory=dict)
    model: str = ""
    provider: str = ""
    prompt_hash: str = ""
    approval: str = ""
    withheld: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """How a call ended. `status` is 0 when no upstream answered; `code` is set when the broker ended it (`response_blocked`, …).

    `size` is in bytes, `duration_ms` in milliseconds; `response_hash` is `sha256:…`, where the body was read. Of a model call,
    `usage` is what it used, `usd` what that cost (where there is a price), and `completion_hash` is over the text it generated.
    """

    status: int = 0
    size: int = 0
    duration_ms: float = 0.0
    code: str = ""
    detail: str = ""
    response_hash: str = ""
    usage: Usage | None = None
    usd: float | None = None
    completion_hash: str = ""
    masked: tuple[str, ...] = ()


def decision_record(
    now: float, mono_ns: int, attempt: Attempt, decision: Decision, credential: Mapping[str, Json] | None = None
) -> dict[str, Any]:
    """The record of a decision, to be written before the call leaves. `now` in seconds since the epoch.

    `credential` holds `issuer`, `scopes`, `lease_id`, `expires`, never the credential. Raises `AuditUnavailable` as `args_hash`.
    """
    violations = decision.violations[:_MAX_VIOLATIONS]
    return {
        **_event("decision", now, mono_ns),
        **_call(attempt),
        "door": attempt.door or None,
        "effect": attempt.effect or None,
        "data": list(attempt.data),
        "method": _text(attempt.method),
        "host": _text(attempt.host, _MAX_NAME),
        "path": _REDACTED if attempt.withheld else _path(attempt),
        "args": redact(_without_prompt(attempt) if attempt.model else attempt.params, attempt.data),
        "args_hash": attempt.args_hash or args_hash(attempt.params),
        "limits": dict(attempt.limits) or None,
        "verdict": str(decision.verdict),
        "code": str(decision.code) if decision.code else None,
        "rule": decision.rule or None,
        "detail": _detail(attempt, decision) or None,
        # A pointer holds names that the agent chose.
        "violations": [
            {
                "pointer": _REDACTED if attempt.withheld else _text(v.pointer),
                "rule": v.rule,
                "message": _text(v.message, _MAX_NAME),
            }
            for v in violations
        ],
        "credential": dict(credential) if credential else None,
        "approval": attempt.approval or None,
    }


def outcome_record(now: float, mono_ns: int, attempt: Attempt, ending: Ending) -> dict[str, Any]:
    """The record of how an allowed call ended, tied to its decision by `decision_id`."""
    return {
        **_event("outcome", now, mono_ns),
        **_call(attempt),
        "code": ending.code or None,
        "detail": _text(ending.detail, _MAX_NAME) or None,
        "upstream": {"status": ending.status, "bytes": ending.size, "duration_ms": ending.duration_ms},
        "response_hash": ending.response_hash or None,
        "masked": list(ending.masked),
        **(_used(ending.usage, ending) if ending.usage else {}),
    }


def _used(usage: Usage, ending: Ending) -> dict[str, Any]:
    tokens = {"input": usage.input, "output": usage.output, "cached": usage.cached}
    more = {"cache_write": usage.cache_write} if usage.cache_write else {}
    return {
        "tokens": {**tokens, **more, "estimated": usage.estimated},
        "usd": ending.usd,
        "completion_hash": ending.completion_hash or None,
    }


def _without_prompt(attempt: Attempt) -> dict[str, Json]:
    """The parameters of a model call without what was said in it: of the body, its model and its numbers and switches."""
    body = attempt.params.get("body")
    said = body.items() if isinstance(body, dict) else ()
    return {**attempt.params, "body": {name: value for name, value in said if name == "model" or isinstance(value, (int, float))}}


def config_record(now: float, mono_ns: int, detail: str, revision: str = "") -> dict[str, Any]:
    """The record of a change to what is in force (or of a refused one, as `detail` says); `revision` is what is in force now."""
    return {**_event("config", now, mono_ns), "detail": _text(detail, _MAX_NAME), "revision": revision or None}


def notice_record(  # noqa: PLR0913, PLR0917 - what a record of a notice holds
    event: str, now: float, mono_ns: int, agent: Mapping[str, str], detail: str, notice: Mapping[str, Any]
) -> dict[str, Any]:
    """The record of what was done about an agent, or said of a call that waits (`revocation`, `release` or `approval`).

    `notice` is the whole of it, for replay; `detail` says by whom and why.
    """
    return {**_event(event, now, mono_ns), "agent": dict(agent), "detail": _text(detail, _MAX_NAME), "notice": dict(notice)}


def alert_record(
    now: float, mono_ns: int, detail: str, about: Mapping[str, Any] | None = None, decision_ids: Sequence[str] = ()
) -> dict[str, Any]:
    """The record of something that people should look at; `about` says what kind of thing it is, and of which agent."""
    known = {**_event("alert", now, mono_ns), **(about or {}), "detail": _text(detail, _MAX_NAME)}
    return {**known, "decision_id": decision_ids[-1] if decision_ids else None, "decision_ids": list(decision_ids)}


def timestamp(now: float) -> str:
    """Seconds since the epoch as RFC 3339, UTC, in microseconds."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _event(event: str, now: float, mono_ns: int) -> dict[str, Any]:
    return {"schema": SCHEMA, "time": timestamp(now), "mono_ns": mono_ns, "event": event}


def _call(attempt: Attempt) -> dict[str, Any]:
    return {
        "decision_id": attempt.decision_id,
        "agent": {key: _text(value) for key, value in attempt.agent.items()},
        "run_id": _text(attempt.run_id) or None,
        "step": attempt.step,
        "trace_id": _text(attempt.trace_id) or None,
        "tool": attempt.tool or None,
        # Where no operation matched this is what was tried, in the agent's words.
        "operation": _text(attempt.operation, _MAX_NAME) or None,
        "revision": attempt.revision,
        **(
            {"model": _text(attempt.model), "provider": attempt.provider, "prompt_hash": attempt.prompt_hash}
            if attempt.model
            else {}
        ),
    }


def _detail(attempt: Attempt, decision: Decision) -> str:
    """Of a revocation it says what the agent did, of all else in words that may be the agent's."""
    spoken = attempt.withheld and decision.detail and decision.code is not Code.AGENT_REVOKED
    return _REDACTED if spoken else _text(decision.detail, _MAX_NAME)


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
    """The parameters as they may be recorded: each location at most 8 KiB of canonical JSON, 16 levels deep.

    First that applies to a value:

    1. its key names a credential → `[redacted]` (a number of `…tokens` is a count, and stays)
    2. the operation's data classes hold `secret` or `pii`, and it is text or a number of nine digits → `[pii 12 chars]`
    3. it looks like a secret → `[redacted]`
    4. it is text over 256 characters → its length and hash
    5. it is deeper or longer than the bounds → how much was left out
    """
    clean = _clean(dict(params), _sensitive(data_classes), 0)
    sizes = {name: len(canonical(value)) for name, value in clean.items()}
    return {name: value if sizes[name] <= _MAX_ARGS else f"[{sizes[name]} bytes left out]" for name, value in clean.items()}


def _sensitive(data_classes: tuple[str, ...]) -> str:
    return next((kind for kind in ("secret", "pii") if kind in data_classes), "")


def _clean(value: Any, kind: str, depth: int) -> Any:
    if isinstance(value, (dict, list)) and depth >= _MAX_DEPTH:
        return f"[{len(value)} more, too deep]"
    if isinstance(value, dict):
        return {
            _text(key): _REDACTED if _is_credential(key, item) else _clean(item, kind, depth + 1) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_clean(item, kind, depth + 1) for item in value]
    if isinstance(value, str):
        return f"[{kind} {len(value)} chars]" if kind else _text(value)
    if isinstance(value, float):
        # Libraries write exponents in different ways; without them anyone's canonical JSON is ours.
        return str(value) if "e" in str(value) else value
    if isinstance(value, int) and not isinstance(value, bool):
        # Nine digits and more: social security, phone and card numbers. Smaller ones are amounts and counts.
        if kind and abs(value) >= 100_000_000:  # noqa: PLR2004
            return f"[{kind} number]"
        return value if -(2**63) <= value < 2**63 else f"[number of {value.bit_length()} bits]"
    return value


def _is_credential(key: str, value: Json) -> bool:
    counts = key.endswith("tokens") and isinstance(value, (int, float))
    return not counts and _names_credential(key[:_SEARCHED])


@lru_cache(maxsize=4096)  # a catalog has few parameter names, and they come with every call
def _names_credential(key: str) -> bool:
    return _CREDENTIAL_KEY.search(re.sub(r"[^a-z0-9]", "", key.lower())) is not None


def _text(text: str, limit: int = _MAX_TEXT) -> str:
    """Text as it may be recorded; always encodable, however it was decoded from the wire."""
    head = text[: max(limit, _SEARCHED)]
    if _is_secret(head) or ("%" in head and _is_secret(unquote(head))):
        return _REDACTED
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if len(text) > limit:
        return f"[{len(text)} chars sha256:{hashlib.sha256(text.encode()).hexdigest()}]"
    return text


def _is_secret(text: str) -> bool:
    return _is_marked(text) and _SECRET.search(text) is not None


def _is_marked(text: str) -> bool:
    for sign, marks in _MARKS.items():
        if sign in text:
            for mark in marks:
                if mark in text:
                    return True
    return False
