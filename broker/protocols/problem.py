"""What a denied agent, and the developer behind it, get to read: one problem object (RFC 9457) per code, in words that help.

Law: a problem names the rule, the place and the next step; it never quotes a value, a credential or a fault's inside.
"""

import json
from collections.abc import Mapping

from broker.policy.types import Code, Decision, Door, Json, Refusal
from broker.protocols.base import Reply

TYPE_PREFIX = "urn:broker:code:"
"""The problem's `type` is this and the code: an identifier to compare, not an address to fetch."""

_WIDEN = "Ask for it by a pull request to the manifest of {agent}, and to the catalog if it is not there."
_ENTRY = "Ask for a catalog entry by a pull request to the catalog."
_APPROVER = "Tell your user the approval's ID, so that a person can approve it (`broker approvals`)."
_AGAIN = "Once it is approved, make exactly this call again, in the same run; until then go on with other work."
_APPROVABLE = "If this names an approval, a person can approve it; then make exactly this call again, in the same run."
_RULE = "If the call is right, widen the violated rule by a pull request to the file that it names."
_LIMIT = "If the work needs more, raise the limit in the manifest of {agent} by a pull request."
_LATER = "Try again later with growing pauses; nothing was sent to the tool."
_TELL = "If it lasts, tell the platform team the decision_id."
_TOKEN = "Send a valid agent token (`broker token NAME`): in the proxy's address, or as x-broker-token."  # noqa: S105 - words

_TABLE: dict[Code, tuple[int, str, *tuple[str, ...]]] = {
    Code.AGENT_UNKNOWN: (401, "Unknown agent", _TOKEN, "Renew the token if it is over an hour old."),
    Code.AGENT_REVOKED: (403, "Agent revoked", "Stop working.", "Ask a human to review and release the agent."),
    Code.AGENT_READ_ONLY: (
        403,
        "Agent may only read",
        "Don't repeat this call; reads still pass.",
        "Ask a human to release the agent.",
    ),
    Code.HOST_NOT_DECLARED: (403, "Host not declared", "Use a declared tool.", _ENTRY),
    Code.AUTHORITY_MISMATCH: (403, "Destinations disagree", "Name one host, as in the catalog, in CONNECT, TLS and the request."),
    Code.TOOL_NOT_DECLARED: (403, "Tool not in the manifest", "Use a tool that the manifest lists.", _WIDEN),
    Code.OPERATION_NOT_DECLARED: (403, "Operation not allowed", "Use an operation that the manifest lists.", _WIDEN),
    Code.PARAMS_INVALID: (403, "Parameters not allowed", "Change what each violation's pointer names, then call again.", _RULE),
    Code.BODY_MALFORMED: (400, "Malformed body", "Send one well-formed UTF-8 body, without duplicate keys or NaN."),
    Code.BODY_TOO_LARGE: (413, "Body too large", "Send less in one call.", "Ask for a larger max_body by a pull request."),
    Code.ENCODING_NOT_ALLOWED: (415, "Encoding not allowed", "Send it uncompressed, in UTF-8, by a content-type the tool takes."),
    Code.PROTOCOL_VIOLATION: (400, "Not readable in one way", "Correct what the detail names; don't repeat it unchanged."),
    Code.FLOW_FORBIDDEN: (403, "Forbidden after what this run has read", "Do this in a new run.", _APPROVABLE),
    Code.APPROVAL_REQUIRED: (403, "A human must approve", _APPROVER, _AGAIN),
    Code.APPROVAL_REJECTED: (403, "A human said no", "Don't repeat this call.", "Tell your user that it was rejected."),
    Code.RATE_LIMITED: (429, "Too many calls", "Wait for Retry-After, then go on more slowly.", _LIMIT),
    Code.CONCURRENCY_LIMITED: (429, "Too many calls at once", "Wait for open calls to end before the next one.", _LIMIT),
    Code.STEPS_EXHAUSTED: (429, "The run has no steps left", "End this run and report what was done.", _LIMIT),
    Code.BUDGET_EXHAUSTED: (429, "Budget spent", "Stop until the budget's window has passed.", _LIMIT),
    Code.CREDENTIAL_UNAVAILABLE: (503, "No credential to be had", _LATER, _TELL),
    Code.RESPONSE_BLOCKED: (403, "Answer withheld", "Don't repeat it: the tool has acted.", "Tell its owner the decision_id."),
    Code.AUDIT_UNAVAILABLE: (503, "The call could not be recorded", _LATER, _TELL),
    Code.LEDGER_UNAVAILABLE: (503, "Limits could not be checked", _LATER, _TELL),
    Code.UPSTREAM_UNTRUSTED: (403, "The tool is not who it should be", "Don't retry.", "Tell the platform team the decision_id."),
    Code.UPSTREAM_UNAVAILABLE: (503, "The tool is not available", _LATER, "Go on with work that doesn't need it."),
    Code.INTERNAL_FAULT: (503, "The broker is at fault", _LATER, _TELL),
}

STATUS: Mapping[Code, int] = {code: row[0] for code, row in _TABLE.items()}
"""The HTTP status of each code. At the proxy door an unknown agent gets 407 instead: see `status_at`."""

WORDS: Mapping[Code, tuple[str, tuple[str, ...]]] = {code: (row[1], row[2:]) for code, row in _TABLE.items()}
"""Each code's title and next steps; `{agent}` is filled in."""

_CHALLENGE = {401: (("www-authenticate", 'Broker-Token realm="broker"'),), 407: (("proxy-authenticate", 'Basic realm="broker"'),)}


def status_at(code: Code, door: Door) -> int:
    """The HTTP status of a code at a door: a proxy asks for identity by 407 (RFC 9110 section 15.5.8)."""
    return 407 if code is Code.AGENT_UNKNOWN and door is Door.PROXY else STATUS[code]


def problem(decision_id: str, agent: str, tool: str, operation: str, decision: Decision | Refusal) -> dict[str, Json]:
    """The problem object of a denial. `agent`, `tool` and `operation` are empty where the call did not get that far."""
    code = decision.code or Code.INTERNAL_FAULT
    title, steps = WORDS[code]
    names = {"agent": agent or "the agent"}
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
        **({"retry_after": decision.retry_after} if isinstance(decision, Decision) and decision.retry_after else {}),
        **({"approval": dict(decision.approval)} if isinstance(decision, Decision) and decision.approval else {}),
    }


def reply(body: Mapping[str, Json], status: int) -> Reply:
    """The problem as an HTTP answer of its own; its `status` member becomes `status`."""
    return answer({**body, "status": status}, status, body, "application/problem+json")


def answer(document: Json, status: int, about: Mapping[str, Json], content_type: str = "application/json") -> Reply:
    """Any JSON document as an answer that carries the decision ID of the problem it is `about`, and the status's challenge."""
    headers = [("content-type", content_type), ("x-broker-decision-id", str(about["decision_id"])), *_CHALLENGE.get(status, ())]
    if "retry_after" in about:  # RFC 9110 section 10.2.3
        headers.append(("retry-after", str(about["retry_after"])))
    # ASCII: total for every string, also one that a header smuggled in as broken UTF-8.
    return Reply(status, tuple(headers), json.dumps(document).encode("ascii"))
