"""The words of the core: what an agent asked for, and what was decided.

Law: everything here is frozen, and nothing here reads anything. A decision is a value; its `code` is stable and doubles as a
metric label.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
"""A parsed JSON value (RFC 8259)."""


class Effect(StrEnum):
    """What an operation does to the world, as the catalog declares it."""

    READ = "read"
    WRITE = "write"
    DESTRUCTIVE = "destructive"


class Door(StrEnum):
    """The way by which a request reached Envoy."""

    PROXY = "proxy"
    BASE_URL = "base-url"
    NAMESPACE = "namespace"


class Verdict(StrEnum):
    """What the broker does with a call."""

    ALLOW = "allow"
    DENY = "deny"
    HOLD = "hold"
    WOULD_DENY = "would_deny"


class Code(StrEnum):
    """Why a call was denied. Stable: programs, dashboards and manifests' tests match on these words."""

    AGENT_UNKNOWN = "agent_unknown"
    AGENT_REVOKED = "agent_revoked"
    AGENT_READ_ONLY = "agent_read_only"
    HOST_NOT_DECLARED = "host_not_declared"
    AUTHORITY_MISMATCH = "authority_mismatch"
    TOOL_NOT_DECLARED = "tool_not_declared"
    OPERATION_NOT_DECLARED = "operation_not_declared"
    PARAMS_INVALID = "params_invalid"
    BODY_MALFORMED = "body_malformed"
    BODY_TOO_LARGE = "body_too_large"
    ENCODING_NOT_ALLOWED = "encoding_not_allowed"
    PROTOCOL_VIOLATION = "protocol_violation"
    FLOW_FORBIDDEN = "flow_forbidden"
    APPROVAL_REQUIRED = "approval_required"
    APPROVAL_REJECTED = "approval_rejected"
    RATE_LIMITED = "rate_limited"
    CONCURRENCY_LIMITED = "concurrency_limited"
    STEPS_EXHAUSTED = "steps_exhausted"
    BUDGET_EXHAUSTED = "budget_exhausted"
    CREDENTIAL_UNAVAILABLE = "credential_unavailable"
    RESPONSE_BLOCKED = "response_blocked"
    AUDIT_UNAVAILABLE = "audit_unavailable"
    LEDGER_UNAVAILABLE = "ledger_unavailable"
    UPSTREAM_UNTRUSTED = "upstream_untrusted"
    UPSTREAM_UNAVAILABLE = "upstream_unavailable"
    INTERNAL_FAULT = "internal_fault"


@dataclass(frozen=True, slots=True)
class Violation:
    """One rule that a call's parameters break.

    `pointer` is an RFC 6901 pointer into the call's parameters, by location (`/body/title`, `/path/owner`, `/query/page`,
    `/arguments/query`). `rule` is where the broken rule stands, `file#pointer`. `message` never quotes the value.
    """

    pointer: str
    rule: str
    message: str


@dataclass(frozen=True, slots=True)
class Request:
    """An HTTP request as Envoy will send it, without its body.

    `path` begins with `/`, is raw (still percent-encoded), carries no query and is relative to the tool's base path. `query` is
    raw, without `?`. Header names are lower-case; repeated headers appear repeatedly.
    """

    method: str
    path: str
    query: str
    headers: tuple[tuple[str, str], ...]

    def header(self, name: str) -> str | None:
        """The first value of a header (`name` in lower case), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def only(self, name: str) -> str | None:
        """The value of a header that stands there exactly once, or None: of two, nobody can say which one counts."""
        values = self.all(name)
        return values[0] if len(values) == 1 else None

    def all(self, name: str) -> list[str]:
        """Every value of a header, in order."""
        return [value for key, value in self.headers if key == name]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a model call used, in tokens: `input` holds the `cached` ones (read from a cache) and those of `cache_write`.

    `estimated` says that the provider did not tell all of it.
    """

    input: int = 0
    output: int = 0
    cached: int = 0
    cache_write: int = 0
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class ModelCall:
    """What a call asks of a model provider.

    `max_output` is the most tokens of each of its `choices` answers; None where the call does not say, and then `output_field` is
    the body's field to say it in (empty where nothing is generated). `input_tokens` is an upper bound. `server_tools` are what
    the provider would run or fetch by itself: a pointer into the parameters and the word for it. `prompt_hash` is `sha256:…`.
    """

    name: str
    input_tokens: int
    prompt_hash: str
    max_output: int | None = None
    output_field: str = ""
    choices: int = 1
    stream: bool = False
    server_tools: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What an agent tries to do, as a protocol adapter recognised it.

    `operation` is a name from the catalog; None when the request matches no operation of the tool. `housekeeping` marks the
    methods by which a protocol keeps itself alive (MCP `initialize`, `ping`, …): they pass for every agent that holds the tool.
    `answers` marks that of it which answers what the tool asked (MCP elicitation, sampling): it carries content out, as a write.
    `params` maps a location (`path`, `query`, `body`, `arguments`) to its value. `label` names what was tried for people
    ("POST /repos/acme/web/issues", "tools/call search_pages"). `correlation` is the protocol's own request ID, for its denial.
    `model` is there for calls of model providers. `exact` is all that the body says but for what differs each time (a message's
    ID); None where that is the body itself.
    """

    tool: str
    operation: str | None
    params: Mapping[str, Json] = field(default_factory=dict)
    housekeeping: bool = False
    label: str = ""
    correlation: Json = None
    model: ModelCall | None = None
    exact: Json = None
    answers: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """A request that could not be read as a call in exactly one way. `code` says which law it broke.

    `correlation` as in `ToolCall`, where the request got far enough to show one. `protocol_code` is the protocol's own error
    number for it, if the protocol reserves one (MCP header mismatch: -32020). `operation` is what the readable part names.
    """

    code: Code
    detail: str
    violations: tuple[Violation, ...] = ()
    correlation: Json = None
    protocol_code: int | None = None
    operation: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """The broker's word on one call, with its reason.

    `rule` is where the decisive rule stands (`file#pointer`), empty for an allow that no single rule decided. `detail` is one
    sentence for people. `code` is None exactly when the verdict is `allow`. `retry_after` is in seconds, 0 if none. `approval`
    is there where people may still say yes: `id`, `status`, `approvers`, `approved_by`, `expires`.
    """

    verdict: Verdict
    code: Code | None = None
    detail: str = ""
    rule: str = ""
    violations: tuple[Violation, ...] = ()
    retry_after: int = 0
    approval: Mapping[str, Json] | None = None

    @property
    def allowed(self) -> bool:
        """Whether the request goes on to the upstream."""
        return self.verdict in (Verdict.ALLOW, Verdict.WOULD_DENY)


ALLOW = Decision(Verdict.ALLOW)


def deny(  # noqa: PLR0913 - as many as a denial may say
    code: Code,
    detail: str,
    *,
    rule: str = "",
    violations: tuple[Violation, ...] = (),
    retry_after: int = 0,
    approval: Mapping[str, Json] | None = None,
) -> Decision:
    """A denial with its stable code and one sentence of reason."""
    return Decision(Verdict.DENY, code, detail, rule, violations, retry_after, approval)
