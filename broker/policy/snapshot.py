"""The compiled configuration: manifests, catalog and platform policy, frozen under one revision.

Law: a snapshot is the seam between configuration and run time. Nothing in it changes after it was built, one exchange sees one
snapshot, and whatever is not in it is denied.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from broker.policy.approval import Approval
from broker.policy.containment import DEFAULTS, NO_ALERTING, NO_DECOYS, Alerting, Decoys, Rule
from broker.policy.limits import Limit, Price
from broker.policy.match import PathTemplate
from broker.policy.providers import MAX_OUTPUT
from broker.policy.schema import ParameterSchema
from broker.policy.types import Effect, ToolCall


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The only place a tool's calls go to. `base_path` has no trailing slash and is empty for the root."""

    scheme: str
    host: str
    port: int
    base_path: str = ""

    @property
    def authority(self) -> str:
        """`host` or `host:port`, as a client writes it: without the scheme's default port (RFC 9110 section 4.2)."""
        return self.host_port.removesuffix({"http": ":80", "https": ":443"}[self.scheme])

    @property
    def host_port(self) -> str:
        """`host:port`, as in a CONNECT request's target."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Upstream:
    """How a tool's endpoint is reached: its own trust roots (PEM; empty: the system's) and the private ranges it may live in."""

    ca_pem: str = ""
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CredentialSpec:
    """Which credential a tool's calls get: the issuer's word, its settings, and where the credential goes.

    `settings` is the issuer's part of the catalog entry, checked by the issuer when the snapshot was compiled. It holds
    references to secrets, never a secret. `header` is lower-case; `template` has one `{}`. In place of both, `basic` is the user
    of Basic authentication (RFC 7617), or `sigv4` the (service, region) that an AWS signature is for.
    """

    issuer: str
    # Not hashed, for mappings can't be, but compared: a spec may be a key.
    settings: Mapping[str, Any] = field(hash=False)
    header: str = "authorization"
    template: str = "Bearer {}"
    basic: str | None = None
    sigv4: tuple[str, str] | None = None

    @property
    def placed(self) -> str:
        """Where the credential goes, in words."""
        if self.sigv4:
            return "an AWS signature for {} in {}".format(*self.sigv4)
        return f"the header {self.header}" if self.basic is None else f"Basic authentication of {self.basic!r}"


DEFAULT_MAX_BODY = 1_048_576
"""Bytes of a request body, where the catalog says nothing."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing a tool can do, from the catalog.

    `method` and `template` are how REST recognises it, `alias` the MCP tool name. `schemas` maps a location to the catalog's
    schema. `max_body` is in bytes. `rule` is where it stands, `file#pointer`. `scrub` is whether answers are read for the
    credential: `auto`, `always` or `unsafe_never`. `idempotency` is the header by which the tool knows a write again that it gets
    twice, in lower case; empty where it has none.
    """

    name: str
    effect: Effect
    rule: str
    data: tuple[str, ...] = ()
    method: str = ""
    template: PathTemplate | None = None
    alias: str = ""
    schemas: Mapping[str, ParameterSchema] = field(default_factory=dict)
    max_body: int = DEFAULT_MAX_BODY
    scrub: str = "auto"
    idempotency: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A catalog entry: one endpoint and its operations, by name."""

    name: str
    owner: str
    protocol: str
    endpoint: Endpoint
    rule: str
    operations: Mapping[str, Operation]
    upstream: Upstream = Upstream()
    credential: CredentialSpec | None = None
    external: bool = True
    """Whether its calls leave the organisation."""

    @property
    def max_body(self) -> int:
        """The largest body that any of its operations takes, in bytes."""
        return max((operation.max_body for operation in self.operations.values()), default=0)


@dataclass(frozen=True, slots=True)
class Grant:
    """An agent's right to one operation: the manifest's schemas (each ANDed with the catalog's), and what else it asks for.

    Of a model provider's operation: the `models` that the manifest names, the `server_tools` (what the provider may run or fetch
    by itself), and `max_output`, the tokens that a call may generate which names no maximum.

    `limits` are all that bear on its calls: its own, then the tool's, the agent's, the team's and the environment's. `pins` maps
    a parameter to the only values that the schemas let it have. `expires` is when it lapses, `shadow_until` until when calls that
    break its rules for parameters pass all the same; both in seconds since the epoch.
    """

    rule: str
    schemas: Mapping[str, ParameterSchema] = field(default_factory=dict)
    approval: Approval | None = None
    limits: tuple[Limit, ...] = ()
    models: frozenset[str] = frozenset()
    server_tools: frozenset[str] = frozenset()
    max_output: int = MAX_OUTPUT
    pins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    expires: float = math.inf
    shadow_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Agent:
    """A principal: who it is, who answers for it, and what it may do. `tools` maps tool → operation → grant.

    `housekeeping` maps a tool to what limits its protocol's own traffic, `answers` to what limits that of it which answers the
    tool; `limits` are all of the agent's, however narrow. `shadow` has what it does not list of the catalog and may use all the
    same until `shadow_until`, with what then limits it: per tool and operation, under an empty name those that the catalog does
    not have.
    """

    name: str
    owner: str
    oncall: str
    rule: str
    tools: Mapping[str, Mapping[str, Grant]]
    spiffe: str = ""
    token: bool = False
    namespace: str = ""
    housekeeping: Mapping[str, tuple[Limit, ...]] = field(default_factory=dict)
    answers: Mapping[str, tuple[Limit, ...]] = field(default_factory=dict)
    limits: tuple[Limit, ...] = ()
    shadow: Mapping[str, Mapping[str, Grant]] = field(default_factory=dict)
    shadow_until: float = 0.0

    def bounds(self, call: ToolCall) -> tuple[Limit, ...]:
        """What limits a call that it may make."""
        if call.housekeeping:
            return (self.answers if call.answers else self.housekeeping)[call.tool]
        return self.used(call).limits

    def grants(self, tool: str) -> Mapping[str, Grant]:
        """All that it may use of a tool, with what it may use in shadow only."""
        return {**self.shadow.get(tool, {}), **self.tools.get(tool, {})} if self.shadow else self.tools.get(tool, {})

    def used(self, call: ToolCall) -> Grant:
        """The grant that an allowed call of an operation uses. Raises `KeyError` for one that it may not make."""
        return self.grants(call.tool)[call.operation or ""]

    def at(self, now: float) -> "Agent":
        """The agent as it stands at this time: shadow mode ends by itself."""
        return replace(self, shadow={}, shadow_until=0.0) if 0 < self.shadow_until <= now else self

    @property
    def described(self) -> dict[str, str]:
        """Who it is and who answers for it, as the record shows it."""
        return {"name": self.name, "spiffe": self.spiffe, "owner": self.owner, "oncall": self.oncall}


DEFAULT_SVID = "default"
"""SPIRE's word for the first SVID that it has for whoever asks (`default_svid_name` of its agent)."""


@dataclass(frozen=True, slots=True)
class Spire:
    """A SPIRE agent's Unix socket, and the SVID that the proxy door shows: a SPIFFE ID or `DEFAULT_SVID`."""

    socket: str
    svid: str = DEFAULT_SVID


@dataclass(frozen=True, slots=True)
class PolicySnapshot:
    """Everything that decides, under one `revision` (`sha256:` of the content).

    `hosts` maps (scheme, host, port) to the tools there (several only when their base paths don't nest). `trust_bundles` maps a
    SPIFFE trust domain to its X.509 authorities (PEM), unless `spire` has them. `max_ttl` bounds every issued credential, in
    seconds. `prices` is by provider and model. `unsafe_reads` lets reads pass on this broker's own limits while the shared ledger
    is away. `refuse_own` refuses calls that bring a credential of the agent's own, which else is taken off. `rules` are those of
    all detectors, `decoys` what no honest call touches, `alerting` who hears of it. `admission` says which tools manifests
    may list where the platform's rules for them are enforced, for people; it decides on no call.
    """

    revision: str
    agents: Mapping[str, Agent]
    tools: Mapping[str, Tool]
    hosts: Mapping[tuple[str, str, int], tuple[Tool, ...]]
    by_spiffe: Mapping[str, Agent]
    trust_bundles: Mapping[str, str] = field(default_factory=dict)
    spire: Spire | None = None
    max_ttl: int = 3600
    environment: str = ""
    prices: Mapping[tuple[str, str], Price] = field(default_factory=dict)
    unsafe_reads: bool = False
    refuse_own: bool = False
    rules: tuple[Rule, ...] = DEFAULTS
    decoys: Decoys = NO_DECOYS
    alerting: Alerting = NO_ALERTING
    admission: str = ""

    def price(self, tool: Tool, model: str) -> tuple[str, Price | None]:
        """The provider that a tool's models are priced under, and the model's price if it has one."""
        named = self.prices.get((tool.name, model))
        return (tool.name, named) if named else (tool.protocol, self.prices.get((tool.protocol, model)))


EMPTY = PolicySnapshot(revision="none", agents={}, tools={}, hosts={}, by_spiffe={})
"""What is in force before any configuration was loaded: nobody may do anything."""
