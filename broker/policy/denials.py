"""What kind of thing each denial is, to the people who read them: whose move it is.

Law: complete over the codes. A new code has no kind until somebody decided whose move its denials are.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from broker.policy.types import Code


class DenialKind(StrEnum):
    """Whose move a denial is."""

    PERMISSION = "permission"
    """The manifest does not grant it: its team may ask for it, or the agent tries what it should not."""
    PEOPLE = "people"
    """A person has to say yes, or said no."""
    LIMIT = "limit"
    """It was too much, too fast or too many."""
    CONTAINMENT = "containment"
    """The agent was cut off."""
    IDENTITY = "identity"
    """Nobody proved who the agent is."""
    MALFORMED = "malformed"
    """The request could not be read in exactly one way."""
    FAULT = "fault"
    """The broker, an issuer or the upstream failed; the agent did nothing wrong."""


_CODES: Mapping[DenialKind, tuple[Code, ...]] = {
    DenialKind.PERMISSION: (Code.HOST_NOT_DECLARED, Code.TOOL_NOT_DECLARED, Code.OPERATION_NOT_DECLARED, Code.PARAMS_INVALID),
    DenialKind.PEOPLE: (Code.APPROVAL_REQUIRED, Code.APPROVAL_REJECTED, Code.FLOW_FORBIDDEN),
    DenialKind.LIMIT: (Code.RATE_LIMITED, Code.CONCURRENCY_LIMITED, Code.STEPS_EXHAUSTED, Code.BUDGET_EXHAUSTED),
    DenialKind.CONTAINMENT: (Code.AGENT_REVOKED, Code.AGENT_READ_ONLY),
    DenialKind.IDENTITY: (Code.AGENT_UNKNOWN,),
    DenialKind.MALFORMED: (
        Code.AUTHORITY_MISMATCH,
        Code.BODY_MALFORMED,
        Code.BODY_TOO_LARGE,
        Code.ENCODING_NOT_ALLOWED,
        Code.PROTOCOL_VIOLATION,
    ),
    DenialKind.FAULT: (
        Code.CREDENTIAL_UNAVAILABLE,
        Code.RESPONSE_BLOCKED,
        Code.AUDIT_UNAVAILABLE,
        Code.LEDGER_UNAVAILABLE,
        Code.UPSTREAM_UNTRUSTED,
        Code.UPSTREAM_UNAVAILABLE,
        Code.INTERNAL_FAULT,
    ),
}

KIND_OF: Mapping[Code, DenialKind] = MappingProxyType({code: kind for kind, codes in _CODES.items() for code in codes})
"""The kind of each code."""

MUST_DENY = "must-deny.invalid"
"""What the broker itself asks for, in agents' places too, to see it denied. RFC 6761 section 6.4: it resolves nowhere."""


def by_canary(host: str, code: str | None) -> bool:
    """Whether a denial is of that, and so says nothing of its agent. An agent that asks for it itself gets nothing either."""
    return code == Code.HOST_NOT_DECLARED and host.partition(":")[0] == MUST_DENY
