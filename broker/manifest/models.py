"""The four kinds that users write: Tool, Agent, Platform, PolicyTest.

Law: this file is the one description of them. The loader validates with it, and the JSON Schemas and the reference pages are
generated from it, so every field says here what it means. What is not a field here is refused.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from pydantic import Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from broker.manifest.fields import (
    Cidr,
    CountRate,
    Duration,
    Header,
    Model,
    MoneyRate,
    Name,
    OperationName,
    Schema,
    SecretReference,
    Size,
    SizeRate,
    Template,
    Word,
)
from broker.policy.types import Code, Effect, Verdict


class Metadata(Model):
    """What this is called, and who answers for it."""

    name: Name = Field(description="Its name: lower-case letters, digits and hyphens; one of its kind in the whole folder.")
    owner: Word = Field(description="The team that answers for it.")
    oncall: Word = Field("", description="Who is paged about it.")
    description: str = Field("", description="What it is for, to people.")


class Kind(Model):
    """What every file begins with."""

    apiVersion: Literal["broker/v1"] = Field(description="The version of this format.")  # noqa: N815 - the word that users write
    metadata: Metadata = Field(description="What this is called, and who answers for it.")


# ---------------------------------------------------------------------------------------------------------------- kind: Tool


class Placement(Model):
    """Where the credential goes in the request."""

    header: Header = Field("authorization", description="The header, in lower case.")
    template: Template = Field("Bearer {}", description="Its value, with {} where the credential goes.")


class Credential(Model):
    """Which credential the broker adds to each call."""

    issuer: Word = Field(description="Who makes it: static, jwt, or another issuer that this broker has.")
    secret: SecretReference | None = Field(None, description="Where the issuer finds its secret. Never the secret itself.")
    scopes: JsonValue = Field(None, description="What the credential is narrowed to; its shape is the issuer's.")
    audience: Word | None = Field(None, description="Whom a minted credential is for; the tool's name unless given.")
    ttl: Duration | None = Field(None, description="How long a minted credential lives; the platform's max_ttl is the bound.")
    placement: Placement = Field(Placement.model_construct(), alias="as", description="Where it goes in the request.")


class UpstreamSpec(Model):
    """How the endpoint is reached."""

    ca: Word | None = Field(
        None, description="A PEM file of trust roots that replace the system's for this tool, relative to the manifests folder."
    )
    addresses: tuple[Cidr, ...] = Field((), description="The private or loopback ranges that the host may resolve to, as CIDRs.")


class Match(Model):
    """How a call is recognised as this operation."""

    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] | None = Field(
        None, description="The HTTP method (rest)."
    )
    path: str | None = Field(
        None,
        description="The path below the endpoint; {name} is one segment, {+name} the rest (rest).",
        examples=["/repos/{owner}"],
    )
    tool: Word | None = Field(None, description="The MCP tool's name, where it differs from the operation's (mcp).")


class OperationSpec(Model):
    """One thing that the tool can do."""

    match: Match = Field(Match.model_construct(), description="How a call is recognised as this operation.")
    effect: Effect = Field(description="What it does to the world.")
    data: tuple[Word, ...] = Field((), description="The classes of data that it touches, such as pii or source-code.")
    params: dict[str, Schema] = Field(
        {}, description="A JSON Schema 2020-12 for each location: path, query and body (rest), arguments (mcp)."
    )
    max_body: Size = Field(1 << 20, description="The largest request body, in bytes or such as 1MiB.")
    description: str = Field("", description="What it does, to people.")


class ToolSpec(Model):
    """One endpoint and its operations."""

    protocol: Word = Field(description="What the endpoint speaks: rest or mcp.")
    endpoint: str = Field(
        description="Scheme, host, port and base path: the only destination.", examples=["https://api.github.com"]
    )
    upstream: UpstreamSpec = Field(UpstreamSpec.model_construct(), description="How the endpoint is reached.")
    unsafe_plaintext: bool = Field(
        default=False,
        description="Lets an http:// endpoint beyond this machine carry calls and credentials that anyone on the way can read.",
    )
    credential: Credential | None = Field(None, description="Which credential the broker adds to each call.")
    operations: dict[OperationName, OperationSpec] = Field(description="What the tool can do; all else is denied.")


class Tool(Kind):
    """A catalog entry: one endpoint plus its operations."""

    kind: Literal["Tool"] = Field(description="Always Tool.")
    spec: ToolSpec = Field(description="One endpoint and its operations.")


# --------------------------------------------------------------------------------------------------------------- kind: Agent


class Limits(Model):
    """Bounds on what is spent; the narrowest applies."""

    calls: CountRate | None = Field(None, description="Calls per time, such as 20/hour.")
    rate: CountRate | None = Field(None, description="Calls per second, such as 10/s.")
    concurrency: int | None = Field(None, ge=0, description="Calls that may be open at once.")
    runs: CountRate | None = Field(None, description="New runs per time, such as 30/hour.")
    steps_per_run: int | None = Field(None, ge=0, description="Calls in one run.")
    writes: CountRate | None = Field(None, description="Calls with effect write or destructive per time.")
    bytes_out: SizeRate | None = Field(None, description="Bytes of request bodies per time, such as 50MiB/day.")
    tokens: CountRate | None = Field(None, description="Model tokens per time, such as 2M/day.")
    usd: MoneyRate | None = Field(None, description="US dollars per time, such as 50/day.")


class Identity(Model):
    """How the broker knows the agent: at least one way."""

    spiffe: str | None = Field(
        None, description="The SPIFFE ID in its client certificate.", examples=["spiffe://acme.example/agents/refund-bot"]
    )
    token: bool = Field(default=False, description="Whether broker token may issue tokens for it.")
    namespace: Name | None = Field(None, description="The network namespace that its calls come from.")

    @model_validator(mode="after")
    def _any(self) -> "Identity":
        if self.spiffe is None and self.namespace is None and not self.token:
            raise PydanticCustomError(
                "identity_missing", "no call could be known as its own; write token: true, a spiffe ID or a namespace"
            )
        return self


class Approval(Model):
    """Asks a human before each call."""

    approvers: int = Field(1, ge=1, le=9, description="How many people must approve.")
    when: dict[str, Schema] | None = Field(
        None, description="Only calls whose parameters fit these schemas, by location, need it."
    )


class GrantSpec(Model):
    """The right to one operation, perhaps narrowed."""

    params: dict[str, Schema] = Field({}, description="A JSON Schema for each location, in addition to the catalog's.")
    limits: Limits | None = Field(None, description="Bounds on this operation alone.")
    approval: Approval | None = Field(None, description="Asks a human before each call.")


class AgentTool(Model):
    """What an agent may do with one tool."""

    operations: dict[OperationName, GrantSpec] = Field(description="The operations it may call; write {} for no narrowing.")
    limits: Limits | None = Field(None, description="Bounds on this tool alone.")


class AgentSpec(Model):
    """Who the agent is and what it may do."""

    identity: Identity = Field(description="How the broker knows the agent.")
    mode: Literal["shadow", "enforce"] = Field("enforce", description="shadow records what would be denied, and lets it through.")
    tools: dict[Name, AgentTool] = Field(description="What it may use; an empty map denies everything.")
    limits: Limits | None = Field(None, description="Bounds on all that it does.")
    callers: tuple[Name, ...] | None = Field(None, description="The agents that may call this one (protocol a2a).")


class Agent(Kind):
    """An agent's manifest: a principal of its own."""

    kind: Literal["Agent"] = Field(description="Always Agent.")
    spec: AgentSpec = Field(description="Who the agent is and what it may do.")


# ------------------------------------------------------------------------------------------------------------ kind: Platform


class Team(Model):
    """A team that owns agents."""

    oncall: Word = Field("", description="Who is paged about its agents.")
    ceilings: Limits | None = Field(None, description="The most that its manifests may ask for.")


class CredentialRules(Model):
    """Bounds on every credential."""

    max_ttl: Duration = Field(3600, description="The longest life of an issued credential.")


class Price(Model):
    """US dollars per million tokens of one model."""

    input: float = Field(ge=0, description="For what is sent.")
    output: float = Field(ge=0, description="For what is answered.")
    cached: float | None = Field(None, ge=0, description="For what is sent and was cached by the provider.")


Action = Literal["alert", "revoke_run", "revoke_agent"]


class Burst(Model):
    """So many in a window of time."""

    count: int = Field(ge=1, description="How many.")
    window: Duration = Field(description="In what time.")
    action: Action = Field(description="What happens then.")


class Tripwire(Model):
    """One is enough."""

    action: Action = Field(description="What happens then.")


class Containment(Model):
    """When an agent is cut off without waiting for a human."""

    denied_burst: Burst | None = Field(None, description="Many denials in a short time.")
    honeytoken: Tripwire | None = Field(None, description="The use of a credential that nobody should ever use.")


class Flow(Model):
    """What a call leads to."""

    effect: Effect | None = Field(None, description="Calls with this effect.")
    egress: Literal["external", "internal"] | None = Field(None, description="Calls that leave the organisation, or that don't.")


class FlowRule(Model):
    """What a run may no longer do after it touched certain data."""

    after: tuple[Word, ...] = Field(min_length=1, description="The classes of data.")
    deny: Flow = Field(description="What is denied from then on.")
    unless: Literal["approval"] | None = Field(None, description="What lifts the denial.")


class Route(Model):
    """Where some alerts go."""

    match: dict[str, Word] = Field({}, description="The labels that an alert must have, such as severity.")
    to: Word = Field(description="The receiver.")


class PagerDuty(Model):
    """The receiver pagerduty."""

    routing_key: SecretReference = Field(description="Where its routing key is found.")


class Alerts(Model):
    """Who hears of what."""

    routes: tuple[Route, ...] = Field((), description="The first route that matches takes the alert.")
    pagerduty: PagerDuty | None = Field(None, description="The receiver pagerduty.")


class TrustBundle(Model):
    """The X.509 authorities of one SPIFFE trust domain."""

    file: Word = Field(description="A PEM file, relative to the manifests folder.")


class PlatformIdentity(Model):
    """What proves an agent's identity."""

    trust_bundles: dict[str, TrustBundle] = Field({}, description="X.509 authorities by SPIFFE trust domain.")


class PlatformSpec(Model):
    """What manifests may ask for at all; every part is optional."""

    teams: dict[Name, Team] | None = Field(None, description="The teams that own agents.")
    environment: Word = Field("", description="The name of this environment, such as production.")
    identity: PlatformIdentity = Field(PlatformIdentity.model_construct(), description="What proves an agent's identity.")
    credentials: CredentialRules = Field(CredentialRules.model_construct(), description="Bounds on every credential.")
    prices: dict[Word, dict[Word, Price]] | None = Field(
        None, description="US dollars per million tokens, by provider and model."
    )
    containment: Containment | None = Field(None, description="When an agent is cut off without waiting for a human.")
    flow: tuple[FlowRule, ...] | None = Field(None, description="What a run may no longer do after it touched certain data.")
    alerts: Alerts | None = Field(None, description="Who hears of what.")


class Platform(Kind):
    """The platform policy; a folder has at most one."""

    kind: Literal["Platform"] = Field(description="Always Platform.")
    spec: PlatformSpec = Field(description="What manifests may ask for at all.")


# ---------------------------------------------------------------------------------------------------------- kind: PolicyTest


class CallSpec(Model):
    """A call that an agent might make."""

    method: str = Field(description="The HTTP method.")
    url: str = Field(description="The whole URL.")
    headers: dict[str, str] = Field({}, description="Headers, by name.")
    body: JsonValue = Field(None, description="The body, sent as JSON.")


class Expectation(Model):
    """The decision that the call must get; what is not written is not compared."""

    verdict: Verdict = Field(description="What the broker does with it.")
    operation: str | None = Field(None, description="tool/operation that it is recognised as.")
    credential: Word | None = Field(None, description="The issuer of the credential that it gets.")
    code: Code | None = Field(None, description="Why it is denied.")
    pointer: str | None = Field(None, description="Where the first violation is, such as /path/owner.")


class Case(Model):
    """A call and the decision it must get."""

    name: Word = Field(description="A sentence that the case shows to be true.")
    call: CallSpec = Field(description="The call.")
    expect: Expectation = Field(description="The decision that it must get.")


class PolicyTestSpec(Model):
    """Cases of one agent."""

    agent: Name = Field(description="The agent that makes the calls.")
    cases: tuple[Case, ...] = Field(description="Calls and the decisions they must get.")


class PolicyTest(Kind):
    """Calls and the decisions they must get."""

    kind: Literal["PolicyTest"] = Field(description="Always PolicyTest.")
    spec: PolicyTestSpec = Field(description="Cases of one agent.")


KINDS: Mapping[str, type[Kind]] = MappingProxyType({"Tool": Tool, "Agent": Agent, "Platform": Platform, "PolicyTest": PolicyTest})
"""The kinds, by the word that `kind:` takes."""
