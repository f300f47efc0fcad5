"""What a denied agent, and the developer behind it, get to read: one problem object (RFC 9457) per code, in words that help.

Law: a problem names the rule, the place and the next step; it never quotes a value, a credential or a fault's inside.
"""

import json
from collections.abc import Mapping
from types import MappingProxyType

from broker.policy.types import Code, Decision, Door, Json, Refusal
from broker.protocols.base import Reply

TYPE_PREFIX = "urn:broker:code:"
"""The problem's `type` is this and the code: an identifier to compare, not an address to fetch."""

DEFAULT_STATUS = 403

STATUS: Mapping[Code, int] = MappingProxyType(
    dict.fromkeys(Code, DEFAULT_STATUS)
    | {
        Code.AGENT_UNKNOWN: 401,
        Code.BODY_MALFORMED: 400,
        Code.PROTOCOL_VIOLATION: 400,
        Code.BODY_TOO_LARGE: 413,
        Code.ENCODING_NOT_ALLOWED: 415,
        Code.RATE_LIMITED: 429,
        Code.CONCURRENCY_LIMITED: 429,
        Code.STEPS_EXHAUSTED: 429,
        Code.BUDGET_EXHAUSTED: 429,
        Code.CREDENTIAL_UNAVAILABLE: 503,
        Code.AUDIT_UNAVAILABLE: 503,
        Code.LEDGER_UNAVAILABLE: 503,
        Code.INTERNAL_FAULT: 503,
    }
)
"""The HTTP status of each code. At the proxy door an unknown agent gets 407 instead: see `status_at`."""

_WIDEN = "Ask for it in a pull request that adds {tool}/{operation} to agents/{agent}.yaml."
_LATER = "Try again later with growing pauses; nothing was sent to the tool."
_OPERATE = "If it lasts, tell the platform team the decision_id."
_NARROW = "Limits stand in agents/{agent}.yaml; raise them there by a pull request if the work needs it."

WORDS: Mapping[Code, tuple[str, tuple[str, ...]]] = MappingProxyType(
    {
        Code.AGENT_UNKNOWN: (
            "Unknown agent",
            (
                "Send a valid agent token (`broker token NAME`): in the proxy's address, or as x-broker-token.",
                "Renew the token if it is over an hour old.",
            ),
        ),
        Code.AGENT_REVOKED: ("Agent revoked", ("Stop working.", "Ask a human to review and release the agent.")),
        Code.HOST_NOT_DECLARED: (
            "Host not declared",
            ("Use a declared tool instead.", "Ask for a catalog entry by a pull request that adds a file to tools/."),
        ),
        Code.AUTHORITY_MISMATCH: (
            "Destinations disagree",
            ("Name one host, spelled as in the catalog, in CONNECT, TLS and the request.",),
        ),
        Code.TOOL_NOT_DECLARED: ("Tool not in the manifest", ("Do without {tool}.", _WIDEN)),
        Code.OPERATION_NOT_DECLARED: ("Operation not allowed", ("Use an operation that the manifest lists.", _WIDEN)),
        Code.PARAMS_INVALID: (
            "Parameters not allowed",
            (
                "Change what each violation's pointer names, then call again.",
                "If the call is right, widen the violated rule by a pull request to agents/{agent}.yaml or tools/.",
            ),
        ),
        Code.BODY_MALFORMED: ("Malformed body", ("Send one well-formed UTF-8 body, without duplicate keys or NaN.",)),
        Code.BODY_TOO_LARGE: (
            "Body too large",
            (
                "Send less in one call.",
                "Raise the operation's max_body in the catalog by a pull request if it must be that large.",
            ),
        ),
        Code.ENCODING_NOT_ALLOWED: (
            "Encoding not allowed",
            ("Send the body uncompressed, in UTF-8, with a content-type that the operation takes.",),
        ),
        Code.PROTOCOL_VIOLATION: (
            "Not readable in one way",
            ("Correct the request as the detail says; don't repeat it unchanged.",),
        ),
        Code.FLOW_FORBIDDEN: (
            "Forbidden after what this run has read",
            ("Do this in a new run that has not read such data.", "Ask a human to approve it."),
        ),
        Code.APPROVAL_REQUIRED: (
            "A human must approve",
            ("Tell your user that a person must approve this call.", "Go on with other work meanwhile."),
        ),
        Code.APPROVAL_REJECTED: ("A human said no", ("Don't repeat this call.", "Tell your user that it was rejected.")),
        Code.RATE_LIMITED: ("Too many calls", ("Wait for Retry-After, then go on more slowly.", _NARROW)),
        Code.CONCURRENCY_LIMITED: ("Too many calls at once", ("Wait for open calls to end before the next one.", _NARROW)),
        Code.STEPS_EXHAUSTED: ("The run has no steps left", ("End this run and report what was done.", _NARROW)),
        Code.BUDGET_EXHAUSTED: ("Budget spent", ("Stop until the budget's window has passed.", _NARROW)),
        Code.CREDENTIAL_UNAVAILABLE: ("No credential to be had", (_LATER, _OPERATE)),
        Code.RESPONSE_BLOCKED: (
            "Answer withheld",
            ("Don't repeat the call: the tool has already acted on it.", "Tell the tool's owner the decision_id."),
        ),
        Code.AUDIT_UNAVAILABLE: ("The call could not be recorded", (_LATER, _OPERATE)),
        Code.LEDGER_UNAVAILABLE: ("Limits could not be checked", (_LATER, _OPERATE)),
        Code.UPSTREAM_UNTRUSTED: (
            "The tool is not who it should be",
            ("Don't retry.", "Tell the platform team to check the tool's certificate and addresses."),
        ),
        Code.INTERNAL_FAULT: ("The broker is at fault", (_LATER, _OPERATE)),
    }
)
"""Each code's title and next steps; `{agent}`, `{tool}` and `{operation}` are filled in."""


def status_at(code: Code, door: Door) -> int:
    """The HTTP status of a code at a door: a proxy asks for identity by 407 (RFC 9110 section 15.5.8)."""
    return 407 if code is Code.AGENT_UNKNOWN and door is Door.PROXY else STATUS[code]


def problem(decision_id: str, agent: str, tool: str, operation: str, decision: Decision | Refusal) -> dict[str, Json]:
    """The problem object of a denial. `agent`, `tool` and `operation` are empty where the call did not get that far."""
    code = decision.code or Code.INTERNAL_FAULT
    title, steps = WORDS[code]
    names = {"agent": agent or "<agent>", "tool": tool or "<tool>", "operation": operation or "<operation>"}
    return {
        "type": TYPE_PREFIX + code,
        "title": title,
        "status": STATUS[code],
        "detail": decision.detail,
        "code": str(code),
        "decision_id": decision_id,
        "agent": agent,
        "tool": tool,
        "operation": operation,
        "violations": [{"pointer": v.pointer, "rule": v.rule, "message": v.message} for v in decision.violations],
        "next_steps": [step.format_map(names) for step in steps],
    }


_CHALLENGE = {
    401: ("www-authenticate", 'Broker-Token realm="broker"'),
    407: ("proxy-authenticate", 'Basic realm="broker"'),
}


def reply(body: Mapping[str, Json], status: int, extra: tuple[tuple[str, str], ...] = ()) -> Reply:
    """The problem as an HTTP answer of its own; its `status` member becomes `status`. 401 and 407 carry their challenge."""
    challenge = (_CHALLENGE[status],) if status in _CHALLENGE else ()
    return answer({**body, "status": status}, status, body, "application/problem+json", (*challenge, *extra))


def answer(
    document: Json,
    status: int,
    about: Mapping[str, Json],
    content_type: str = "application/json",
    extra: tuple[tuple[str, str], ...] = (),
) -> Reply:
    """Any JSON document as an answer that carries the decision ID of the problem it is `about`."""
    headers = (("content-type", content_type), ("x-broker-decision-id", str(about["decision_id"])), *extra)
    # ASCII: total for every string, also one that a header smuggled in as broken UTF-8.
    return Reply(status, headers, json.dumps(document).encode("ascii"))
