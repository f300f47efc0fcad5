"""The four kinds that users write: Tool, Agent, Platform (in `platform.py`) and PolicyTest.

Law: this is the one description of them. The loader validates with it, and the JSON Schemas and the reference pages are
generated from it, so every field says what it means, and what is not a field is refused.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator

from broker.manifest.platform import Platform
from broker.manifest.words import (
    Approvers,
    BasicUser,
    Bytes,
    Ceilings,
    Cidr,
    Count,
    CountRate,
    EndpointText,
    Header,
    Kind,
    Model,
    Moment,
    Money,
    Name,
    OperationName,
    Params,
    PathText,
    Reference,
    Seconds,
    ServerTool,
    Spiffe,
    Template,
    Word,
    literals,
    refusal,
)
from broker.policy.match import PathTemplate
from broker.policy.providers import PROVIDERS
from broker.policy.types import Code, Effect, Verdict
from broker.redaction import REMEDY


class SigV4(Model):
    """What an AWS Signature Version 4 is for."""

    service: Name = Field(description="The service's name in signatures, such as s3.")
    region: Name = Field(description="The region, such as eu-west-1.")


class Placement(Model):
    """Where the credential goes in the request: into a header by a template, or by one of the other ways alone."""

    header: Header = Field("authorization", description="The header, in lower case.")
    template: Template = Field("Bearer {}", description="Its value; the credential goes to {}.")
    basic: BasicUser | None = Field(
        None, description="The user of Basic authentication (RFC 7617), perhaps empty; the credential is the password."
    )
    sigv4: SigV4 | None = Field(None, description="Signs the request for AWS.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if len(self.model_fields_set) > 1 and self.model_fields_set != {"header", "template"}:
            raise refusal("a credential goes to one place; write header and template, or basic, or sigv4")
        return self


class Credential(Model):
    """Which credential the broker adds to each call. The issuer may have fields of its own: docs/reference/issuers.md."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    issuer: Word = Field(description="Who makes it: static, jwt, or another issuer that this broker has.")
    secret: Reference | None = Field(None, description="Where the issuer finds its secret. Never the secret itself.")
    scopes: JsonValue = Field(None, description="What the credential is narrowed to; its shape is the issuer's.")
    audience: Word | None = Field(None, description="Whom a minted credential is for; the tool's name unless given.")
    ttl: Seconds | None = Field(None, description="How long a minted credential lives; the platform's max_ttl is the bound.")
    placement: Placement = Field(Placement.model_construct(), alias="as", description="Where it goes in the request.")

    @model_validator(mode="after")
    def _by_reference(self) -> Self:
        if pointer := next(literals(self.__pydantic_extra__, ""), None):
            raise refusal(f"this field holds a literal secret; {REMEDY}", "secret_literal", pointer)
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What is written for the issuer."""
        own = self.model_dump(include={"secret", "scopes", "audience", "ttl"}, exclude_unset=True)
        return own | self.__pydantic_extra__


class UpstreamSpec(Model):
    """How the endpoint is reached."""

    ca: Word | None = Field(None, description="A PEM file, in the manifests folder, of trust roots in place of the system's.")
    addresses: tuple[Cidr, ...] = Field(
        (), description="The private or loopback ranges that the host may resolve to, as CIDRs (RFC 4632)."
    )


class Match(Model):
    """How a call is recognised as this operation."""

    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] | None = Field(
        None, description="The HTTP method (rest, openai, anthropic)."
    )
    path: PathText | None = Field(
        None, description="The path below the endpoint; {name} is one segment, {+name} the rest (rest, openai, anthropic)."
    )
    tool: Word | None = Field(None, description="The MCP tool's name, where it differs from the operation's (mcp).")


class OperationSpec(Model):
    """One thing that the tool can do."""

    match: Match = Field(
        Match.model_construct(),
        description="How a call is recognised as this operation; a model provider's chat.completions, responses, embeddings or "
        "messages needs none.",
    )
    effect: Effect = Field(description="What it does to the world.")
    data: tuple[Word, ...] = Field((), description="The classes of data that it touches, such as pii or source-code.")
    params: Params = Field({}, description="A JSON Schema for each location: path, query and body, or arguments (mcp).")
    max_body: Bytes = Field(1 << 20, description="The largest request body, in bytes or such as 1MiB.")
    scrub: Literal["auto", "always", "unsafe_never"] = Field(
        "auto",
        description="Whether answers' bodies are read for the injected credential, to take it out: errors, events and what is "
        "up to 1MiB and no media (auto), every body (always), or none (unsafe_never). Headers always are.",
    )
    idempotency: Header | None = Field(
        None,
        description="The header by which the tool knows a write again that it gets twice. Where the agent sent none, the broker "
        "sets it, the same for the same request in the same run: docs/retries.md.",
        examples=["idempotency-key"],
    )
    description: str = Field("", description="What it does, to people.")


class ToolSpec(Model):
    """One endpoint and its operations."""

    protocol: Word = Field(description="What the endpoint speaks: rest, mcp, openai or anthropic.")
    endpoint: EndpointText = Field(
        description="Scheme, host, port and base path: the only destination.", examples=["https://api.github.com"]
    )
    upstream: UpstreamSpec = Field(UpstreamSpec.model_construct(), description="How the endpoint is reached.")
    egress: Literal["external", "internal"] | None = Field(
        None,
        description="Whether its calls leave the organisation, which flow rules ask. Unless said, it is internal if "
        "upstream.addresses lists ranges and none of them is loopback, since what listens there may lead anywhere.",
    )
    unsafe_plaintext: bool = Field(
        default=False,
        description="Lets an http:// endpoint elsewhere carry calls and credentials that anyone on the way can read.",
    )
    credential: Credential | None = Field(None, description="Which credential the broker adds to each call.")
    operations: dict[OperationName, OperationSpec] = Field(description="What the tool can do; all else is denied.")

    def match(self, name: str) -> Match:
        """How a call is recognised as this operation: as written, or where the provider's API of that name is."""
        written, api = self.operations[name].match, PROVIDERS.get(self.protocol, {}).get(name)
        if api is None or written.method or written.path or written.tool:
            return written
        return Match.model_construct(
            method="POST", path=PathTemplate.parse(api.path if self.endpoint.base_path else f"/v1{api.path}")
        )


class Tool(Kind):
    """A catalog entry: one endpoint plus its operations."""

    kind: Literal["Tool"] = Field(description="Always Tool.")
    spec: ToolSpec = Field(description="One endpoint and its operations.")


class Limits(Ceilings):
    """Bounds on what is spent; each holds on its own. A run is what the agent names so, or what it does without a pause."""

    runs: CountRate | None = Field(
        None, description="New runs per window. Without it, limits per run can be got around by new runs."
    )
    steps_per_run: int | None = Field(None, ge=0, description="Calls in one run.")
    identical_per_run: int | None = Field(None, ge=1, description="Calls with the same operation and parameters in one run.")
    time_per_run: Seconds | None = Field(None, description="Time from a run's first call to its last, such as 30m.")
    tokens_per_run: Count | None = Field(None, description="Model tokens in one run.")
    usd_per_run: Money | None = Field(None, description="US dollars spent on models in one run.")


class Identity(Model):
    """How the broker knows the agent: at least one way."""

    spiffe: Spiffe | None = Field(
        None, description="The SPIFFE ID in its client certificate.", examples=["spiffe://a.example/bot"]
    )
    token: bool = Field(default=False, description="Whether broker token may issue tokens for it.")
    namespace: Name | None = Field(None, description="The network namespace that its calls come from, by its name in /run/netns.")

    @model_validator(mode="after")
    def _any(self) -> "Identity":
        if not (self.spiffe or self.namespace or self.token):
            why = "no call could be known as its own; write token: true, a spiffe ID or a namespace"
            raise refusal(why, "identity_missing")
        return self


class Approval(Approvers):
    """Asks a human before each call."""

    when: Params | None = Field(None, description="Only calls whose parameters fit these schemas, by location, need it.")


class GrantSpec(Model):
    """The right to one operation, perhaps narrowed."""

    params: Params = Field({}, description="A JSON Schema for each location, in addition to the catalog's.")
    limits: Limits | None = Field(None, description="Bounds on this operation alone.")
    approval: Approval | None = Field(None, description="Asks a human before each call.")
    expires: Moment | None = Field(None, description="When it lapses by itself: a date (from 00:00 UTC on) or a time.")
    shadow_until: Moment | None = Field(
        None,
        description="Until then, calls of this operation that break its parameters' rules are recorded as would_deny and let "
        "through: docs/shadow.md.",
    )
    server_tools: tuple[ServerTool, ...] = Field(
        (),
        description="What a model provider may run or fetch by itself in these calls, by its word: a tool's type such as "
        "web_search, mcp, container, background, prompt, url (images and files by address), stored (files and earlier answers by "
        "ID), or the name of another member of the body.",
        examples=[["web_search", "url"]],
    )


class AgentTool(Model):
    """What an agent may do with one tool."""

    operations: dict[OperationName, GrantSpec] = Field(description="The operations it may call; write {} for no narrowing.")
    limits: Limits | None = Field(None, description="Bounds on this tool alone.")


class AgentSpec(Model):
    """Who the agent is and what it may do."""

    identity: Identity = Field(description="How the broker knows the agent.")
    mode: Literal["shadow", "enforce"] = Field(
        "enforce",
        description="shadow records what the manifest does not permit as would_deny, and lets it through to the catalog's hosts, "
        "until shadow_until: docs/shadow.md.",
    )
    shadow_until: Moment | None = Field(None, description="When mode: shadow ends by itself; the manifest is then enforced.")
    tools: dict[Name, AgentTool] = Field(description="What it may use; an empty map denies everything.")
    limits: Limits | None = Field(None, description="Bounds on all that it does.")
    callers: tuple[Name, ...] | None = Field(None, description="The agents that may call this one (protocol a2a).")

    @model_validator(mode="after")
    def _shadow_ends(self) -> Self:
        if self.mode == "shadow" and self.shadow_until is None:
            raise refusal("shadow mode needs an end; write shadow_until: DATE beside it", "shadow_without_end", "/mode")
        if self.mode == "enforce" and self.shadow_until is not None:
            why = "an end without mode: shadow means nothing; write mode: shadow beside it, or take it out"
            raise refusal(why, pointer="/shadow_until")
        return self


class Agent(Kind):
    """An agent's manifest: a principal of its own."""

    kind: Literal["Agent"] = Field(description="Always Agent.")
    spec: AgentSpec = Field(description="Who the agent is and what it may do.")


class CallSpec(Model):
    """A call that an agent might make: an HTTP request, or an operation of an MCP server or a model provider by its name."""

    method: str | None = Field(None, description="The HTTP method.")
    url: str | None = Field(None, description="The whole URL.")
    headers: dict[str, str] = Field({}, description="Headers, by name.")
    body: JsonValue = Field(None, description="The body, sent as JSON; of a model call, what its API is sent.")
    tool: Name | None = Field(None, description="In place of method and URL: the MCP server or model provider of the catalog.")
    operation: OperationName | None = Field(None, description="And which of its operations is called.")
    arguments: dict[str, JsonValue] | None = Field(None, description="What the MCP tool is called with.")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        http, named = {self.method is not None, self.url is not None}, {self.tool is not None, self.operation is not None}
        if (http, named) not in (({True}, {False}), ({False}, {True})) or (http == {True} and self.arguments is not None):
            raise refusal("a call is one thing; write method and url, or tool and operation (with arguments or body)")
        return self


class Expectation(Model):
    """The decision that the call must get; what is not written is not compared."""

    verdict: Verdict = Field(description="What the broker does with it.")
    operation: str | None = Field(None, description="tool/operation that it is recognised as.")
    credential: Word | None = Field(None, description="The issuer of the credential that it gets.")
    code: Code | None = Field(None, description="Why it is denied.")
    pointer: str | None = Field(None, description="Where the first violation is, such as /path/owner.")


class Spent(Model):
    """What was spent already: in every window that counts it, and in the call's run."""

    calls: Count | None = Field(None, description="Calls.")
    writes: Count | None = Field(None, description="Calls with effect write or destructive.")
    destructive: Count | None = Field(None, description="Calls with effect destructive.")
    runs: Count | None = Field(None, description="Runs.")
    bytes_out: Bytes | None = Field(None, description="Bytes of requests.")
    tokens: Count | None = Field(None, description="Model tokens.")
    input_tokens: Count | None = Field(None, description="Model input tokens.")
    output_tokens: Count | None = Field(None, description="Model output tokens.")
    cached_tokens: Count | None = Field(None, description="Cached model input tokens.")
    usd: Money | None = Field(None, description="US dollars.")


class StateSpec(Model):
    """What went before the call."""

    spent: Spent = Field(Spent.model_construct(), description="What the agent has spent already.")
    labels: tuple[Word, ...] = Field((), description="The labels (data classes) of the call's run.")
    approvals: int = Field(0, ge=0, le=9, description="How many people approve the call when they are asked.")


class Case(Model):
    """A call and the decision it must get."""

    name: Word = Field(description="A sentence that the case shows to be true.")
    call: CallSpec = Field(description="The call.")
    state: StateSpec = Field(StateSpec.model_construct(), description="What went before.")
    expect: Expectation = Field(description="The decision that it must get.")


class PolicyTestSpec(Model):
    """Cases of one agent."""

    agent: Name = Field(description="The agent that makes the calls.")
    cases: tuple[Case, ...] = Field(description="Calls and the decisions they must get.")


class PolicyTest(Kind):
    """Calls and the decisions they must get."""

    kind: Literal["PolicyTest"] = Field(description="Always PolicyTest.")
    spec: PolicyTestSpec = Field(description="Cases of one agent.")


KINDS: Mapping[str, type[Kind]] = MappingProxyType({kind.__name__: kind for kind in (Tool, Agent, Platform, PolicyTest)})
"""The kinds, by the word that `kind:` takes."""
