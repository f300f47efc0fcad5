"""What the platform team writes: who may spend how much, what stops an agent, and who is told."""

from typing import Annotated, Literal, Self, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from broker.manifest.words import (
    Approvers,
    Ceilings,
    Kind,
    Model,
    Money,
    Name,
    PemFile,
    Reference,
    Seconds,
    Spiffe,
    TrustDomain,
    Url,
    Word,
    refusal,
)
from broker.policy.containment import MOST_TARGETS, PAGERDUTY, Action, Severity
from broker.policy.types import Effect


class Team(Model):
    """A team that owns agents."""

    oncall: Word = Field("", description="Who is paged about its agents.")
    ceilings: Ceilings | None = Field(None, description="Bounds on all that its agents do together.")


class ModelPrice(Model):
    """US dollars per million tokens of one model."""

    input: Money = Field(description="Of input.")
    output: Money = Field(description="Of output.")
    cached: Money | None = Field(None, description="Of input that is read from the provider's cache; as input if absent.")
    cache_write: Money | None = Field(None, description="Of input that is written to it (Anthropic); twice the input if absent.")


class PlatformCredentials(Model):
    """Bounds on credentials."""

    max_ttl: Seconds = Field(3600, description="The longest life of an issued credential, such as 15m.")
    own: Literal["strip", "refuse"] = Field(
        "strip", description="What becomes of a credential that an agent sends itself: it is taken off, or the call is refused."
    )


class SpireSpec(Model):
    """The SPIRE agent on Envoy's machine, which gives Envoy its own SVID and the trust bundles."""

    # As much as fits into a Unix socket's address, and nothing that means more than itself in a gRPC target.
    socket: Annotated[str, Field(pattern="^/[A-Za-z0-9._/-]{1,106}$")] = Field(
        description="Its Unix socket (socket_path in its configuration)."
    )
    svid: Spiffe | None = Field(
        None, description="The SPIFFE ID that Envoy shows at the proxy door; the first that SPIRE has for Envoy if absent."
    )


class PlatformIdentity(Model):
    """What proves an agent's identity by certificate; one of the two."""

    trust_bundles: dict[TrustDomain, PemFile] = Field(
        {}, description="X.509 authorities by SPIFFE trust domain, each as a PEM file."
    )
    spire: SpireSpec | None = Field(
        None, description="The SPIRE agent on Envoy's machine, which gives Envoy its own SVID and the trust bundles."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.spire and self.trust_bundles:
            why = "SPIRE gives the bundles itself; take trust_bundles out, and federate other domains in SPIRE"
            raise refusal(why, pointer="/trust_bundles")
        return self


class InstantRule(Model):
    """What happens when a detector fires, which this one does at once."""

    action: Action | None = Field(None, description="What then happens; the detector's default if absent.")
    cooldown: Seconds = Field(600, description="How long it is then quiet about the same agent.")
    shadow: bool = Field(default=False, description="Record and alert what would have been done, and don't do it.")


class CountedRule(InstantRule):
    """When a detector fires, and what then happens."""

    count: Annotated[int, Field(ge=1, le=100_000)] | None = Field(None, description="How many; the detector's default if absent.")
    window: Seconds | None = Field(None, description="Within which time; the detector's default if absent. A streak has none.")


class DifferentRule(CountedRule):
    """When a detector fires that counts different things, each of which is remembered; and what then happens."""

    count: Annotated[int, Field(ge=1, le=MOST_TARGETS)] | None = Field(
        None, description="How many; the detector's default if absent."
    )


class Honeytoken(InstantRule):
    """Decoys, which no honest call touches, and what happens when one is."""

    hosts: tuple[Word, ...] = Field((), description="Host names, without a port; none of them may be a tool's.")
    tools: tuple[Name, ...] = Field((), description="Tools of the catalog that no manifest may list.")
    credentials: tuple[Reference, ...] = Field((), description="Planted credentials, by reference.")


def _written_as(value: object) -> str:
    return "[list]" if isinstance(value, list | tuple) else "[text]" if isinstance(value, str) else "[one]"


# By what is written, so that a mistake is reported as one of a rule, and not as one of each thing that might stand there.
_Rule = TypeVar("_Rule")
OneOrMore = Annotated[Annotated[_Rule, Tag("[one]")] | Annotated[tuple[_Rule, ...], Tag("[list]")], Discriminator(_written_as)]
Counted = OneOrMore[CountedRule] | None
Different = OneOrMore[DifferentRule] | None
Instant = OneOrMore[InstantRule] | None


class Containment(Model):
    """What is looked for in each agent's calls, and what happens then: a rule or a list; [] turns a detector off."""

    denied_burst: Counted = Field(None, description="Calls that the manifest does not permit, or that can't be read.")
    probing: Different = Field(None, description="Different hosts, tools and operations that are not declared.")
    upstream_failures: Counted = Field(None, description="Calls of one tool, one after the other, that failed there.")
    identical_calls: Counted = Field(None, description="Calls with the same operation and parameters.")
    write_spike: Counted = Field(None, description="Calls with effect write or destructive.")
    destructive_spike: Counted = Field(None, description="Calls with effect destructive.")
    budget_exhausted: Instant = Field(None, description="A budget has no room left.")
    undeclared_host: Instant = Field(None, description="The first sight of each host that is not declared.")
    secret_in_request: Instant = Field(None, description="Something in a request has the shape of a known kind of secret.")
    credential_in_request: Instant = Field(None, description="A request holds a credential that the broker injected.")
    honeytoken: Honeytoken | None = Field(None, description="Decoys, which no honest call touches.")


class FlowDeny(Model):
    """Which calls; what is not written fits all."""

    effect: Effect | None = Field(None, description="Calls with this effect; write stands for destructive too.")
    egress: Literal["external", "internal"] | None = Field(
        None, description="Calls to tools outside, or inside, the organisation."
    )


class FlowRule(Model):
    """What a run may no longer do after it touched certain data."""

    after: tuple[Word, ...] = Field(
        min_length=1, description="Labels (data classes); the rule holds once the run has all of them."
    )
    deny: FlowDeny = Field(description="The calls that are then denied.")
    unless: (
        Annotated[Annotated[Literal["approval"], Tag("[text]")] | Annotated[Approvers, Tag("[one]")], Discriminator(_written_as)]
        | None
    ) = Field(None, description="approval, or how many approvers: such a call passes when people approved it.")


class PagerDuty(Model):
    """PagerDuty's Events API v2."""

    routing_key: Reference = Field(description="The integration key of the service that is paged, by reference.")
    oncall: dict[Word, Reference] = Field({}, description="Other keys by on-call contact: those of manifests and teams.")
    url: Url = Field("https://events.pagerduty.com/v2/enqueue", description="Where events go.")


class Webhook(Model):
    """A receiver of signed alerts (Standard Webhooks 1.0)."""

    url: Url = Field(description="Where alerts are posted.")
    secret: Reference = Field(description="What signs them, by reference: whsec_ and base64.")
    ca: PemFile | None = Field(None, description="{file: PATH}: trust roots in place of the system's.")


class AlertMatch(Model):
    """Which alerts; what is not written fits all."""

    severity: Severity = Field(Severity.LOW, description="Alerts at least this severe.")
    team: Word = Field("", description="Alerts about agents of this team.")
    oncall: Word = Field("", description="Alerts about agents with this on-call contact.")
    agent: Word = Field("", description="Alerts about this agent.")
    kind: Word = Field("", description="Alerts of this kind: a detector's name, revocation, release, approval, self_test, …")


class AlertRoute(Model):
    """Alerts that fit go to one sink; the first route that fits counts."""

    match: AlertMatch = Field(AlertMatch.model_construct(), description="Which alerts.")
    to: Word = Field(description="pagerduty, or the name of a webhook.")


class Alerts(Model):
    """Who hears of what. Each alert is recorded, whether or not a route fits it."""

    routes: tuple[AlertRoute, ...] = Field((), description="In order; the first that fits counts.")
    pagerduty: PagerDuty | None = Field(None, description="PagerDuty's Events API v2.")
    webhooks: dict[Name, Webhook] = Field({}, description="Receivers of signed alerts, by name.")
    fallback: Word = Field("", description="The sink for what can't be delivered: pagerduty, or the name of a webhook.")
    per_minute: Annotated[int, Field(ge=1, le=10_000)] = Field(
        30, description="Alerts that one sink gets in a minute; what is more is told as one number."
    )

    @property
    def sinks(self) -> frozenset[str]:
        """The names that routes may say."""
        return frozenset(self.webhooks) | ({PAGERDUTY} if self.pagerduty else set())


class Admission(Model):
    """What manifests must keep to be admitted at all. Where this stands, be it empty, each rule here holds for all agents."""

    tools: tuple[Name, ...] | None = Field(
        None, description="The approved tools: a manifest may list no others. Absent: every tool of the catalog."
    )


class PlatformSpec(Model):
    """What manifests may ask for at all; every part is optional."""

    admission: Admission | None = Field(
        None,
        description="Rules for manifests: the owner is one of teams, an on-call contact is known (the agent's or its team's), an "
        "operation that destroys pins a parameter to listed values or needs approval. Absent: these are warnings.",
    )

    teams: dict[Word, Team] = Field({}, description="The teams that own agents (their metadata.owner).")
    environment: Word = Field("", description="The name of this environment, such as production.")
    ceilings: Ceilings | None = Field(None, description="Bounds on all that is done in this environment.")
    ledger: dict[Literal["unsafe_reads_without_redis"], bool] = Field(
        {}, description="unsafe_reads_without_redis: true lets reads pass on each broker's own limits while Redis is away."
    )
    identity: PlatformIdentity = Field(
        PlatformIdentity.model_construct(), description="What proves an agent's identity by certificate; one of the two."
    )
    credentials: PlatformCredentials = Field(PlatformCredentials.model_construct(), description="Bounds on credentials.")
    prices: dict[Word, dict[Word, ModelPrice]] = Field(
        {}, description="What models cost, by provider (the tool's name, or else its protocol) and model."
    )
    containment: Containment = Field(
        Containment.model_construct(), description="When an agent is cut off without waiting for a human."
    )
    flow: tuple[FlowRule, ...] = Field((), description="What a run may no longer do after it touched certain data.")
    alerts: Alerts = Field(Alerts.model_construct(), description="Who hears of what.")


class Platform(Kind):
    """The platform policy; a folder has at most one."""

    kind: Literal["Platform"] = Field(description="Always Platform.")
    spec: PlatformSpec = Field(description="What manifests may ask for at all.")
