"""The four kinds that users write (Tool, Agent, Platform, PolicyTest), and before them the words that their fields are made of.

Law: this file is the one description of them. The loader validates with it, and the JSON Schemas and the reference pages are
generated from it, so every field says what it means, and what is not a field is refused. Whatever a value tells by itself is
judged here. A secret is named by reference: a literal one is refused with `secret_literal`, and no message repeats it.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PlainValidator,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from broker.manifest.addresses import parse_endpoint, parse_spiffe
from broker.policy.containment import MOST_TARGETS, PAGERDUTY, Action, Severity
from broker.policy.limits import NANO
from broker.policy.match import PathTemplate
from broker.policy.providers import PROVIDERS
from broker.policy.schema import ParameterSchema, SchemaError, json_pointer
from broker.policy.snapshot import Endpoint
from broker.policy.types import Code, Effect, Verdict
from broker.redaction import REMEDY, redacted


class Model(BaseModel):
    """The base of all parts: strict, frozen, and nothing but what is declared."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def refusal(why: str, code: str = "field_invalid", pointer: str = "") -> PydanticCustomError:
    """The refusal of a value, or of what is at `pointer` in it: what is wrong; what to write. It must not quote the value."""
    return PydanticCustomError(code, "{why}", {"why": why, "pointer": pointer})


def _text(parse: Callable[[str], object], code: str = "field_invalid", shown: Any = str) -> PlainValidator:
    """Text that `parse` turns into what is meant, or refuses by a `ValueError`; `shown` is its type in the JSON Schema."""

    def read(value: object) -> object:
        if not isinstance(value, str):
            raise refusal("it should be a valid string")
        try:
            return parse(value)
        except ValueError as error:
            raise refusal(str(error), code) from None

    return PlainValidator(read, json_schema_input_type=shown)


def _quantity(units: Mapping[str, int], example: str) -> Callable[[str], int]:
    shape = re.compile(rf"([1-9][0-9]{{0,8}})({'|'.join(units)})")

    def read(text: str) -> int:
        if not (found := shape.fullmatch(text)):
            raise refusal(f"it should be a whole number with one of {', '.join(filter(None, units))}; write it as in {example}")
        return int(found[1]) * units[found[2]]

    return read


_SIZES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_THOUSANDS = {"": 1, "k": 1_000, "M": 1_000_000, "G": 1_000_000_000}
_WINDOWS = {"s": 1, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400}
_bytes = _quantity(_SIZES, "1MiB")
_seconds = _quantity({"s": 1, "m": 60, "h": 3600, "d": 86400}, "5m")


def _amount(units: Mapping[str, int], example: str, parts: int = 1) -> Callable[[object], int]:
    """A reader of numbers with a unit; what it gives is in `parts` of one, and those are whole."""
    shape = re.compile(rf"([0-9]{{1,9}})(?:\.([0-9]{{1,9}}))?({'|'.join(units)})")

    def read(value: object) -> int:
        found = shape.fullmatch(str(value)) if isinstance(value, str | int | float) else None
        billionths = int(found[1] + (found[2] or "").ljust(9, "0")) * units[found[3]] * parts if found else 1
        if billionths % NANO:
            one_of = f" with one of {', '.join(filter(None, units))} or none" if len(units) > 1 else ""
            raise refusal(f"it should be a number{one_of}; write it as in {example}")
        return billionths // NANO

    return read


class Rate(NamedTuple):
    """So much per time: an amount in the unit of what is counted, and the time in seconds."""

    amount: int
    per: int


def _rate(units: Mapping[str, int], example: str, parts: int = 1) -> Callable[[str], Rate]:
    amount = _amount(units, example, parts)

    def read(text: str) -> Rate:
        number, _, window = text.partition("/")
        if window not in _WINDOWS:
            raise refusal(f"it should be an amount per {', '.join(_WINDOWS)}; write it as in {example}")
        return Rate(amount(number), _WINDOWS[window])

    return read


def _cidr(text: str) -> str:
    if "/" not in text:
        raise refusal("it should be an address range in CIDR form; write 127.0.0.1/32 for one address")
    return str(ipaddress.ip_network(text))


def _schema(value: object) -> ParameterSchema:
    if not isinstance(value, dict):
        raise refusal("it should be a JSON Schema; write a mapping")
    try:
        return ParameterSchema(value, "")
    except SchemaError as error:
        raise refusal(f"{error.message[:300]}; write JSON Schema 2020-12", "schema_invalid", error.pointer) from None


def _reference(value: object) -> object:
    if isinstance(value, str):
        raise refusal(f"this field holds a literal secret; {REMEDY}", "secret_literal")
    if isinstance(value, dict) and len(value) != 1:
        raise refusal("a secret is named by exactly one of env and file; write {env: NAME} or {file: PATH}")
    return value


def _template(value: str) -> str:
    if redacted(value) != value or re.search(r"(?=[^{}\s]*[0-9])[A-Za-z0-9_+/=.~-]{12}", value):
        raise refusal(f"the template holds a literal secret; {REMEDY}", "secret_literal")
    if value.count("{}") != 1 or not value.isascii() or not value.isprintable():
        raise refusal('it should be one line of ASCII with {} once, where the credential goes; write it as in "Bearer {}"')
    return value


def _known_form(value: str) -> str:
    if redacted(value) != value:
        raise refusal(f"this field holds a literal secret; {REMEDY}", "secret_literal")
    return value


_SECRET_BY_NAME = re.compile(r"(^|.*_)(secret|password|passphrase|token|key|assertion|jwt|pem)", re.IGNORECASE)


def _literals(value: object, pointer: str) -> Iterator[str]:
    """Where in an issuer's fields a secret stands, by its form or by its field's name."""
    if isinstance(value, dict):
        for name, part in value.items():
            here = pointer + json_pointer(name)
            yield from (here,) if isinstance(part, str) and _SECRET_BY_NAME.fullmatch(name) else _literals(part, here)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _literals(part, f"{pointer}/{index}")
    elif isinstance(value, str) and redacted(value) != value:
        yield pointer


_RESERVED = frozenset(
    {"connection", "content-length", "content-type", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)


def _header(value: str) -> str:
    if value in _RESERVED or value.startswith(("x-broker-", "x-envoy-", "x-forwarded-", "proxy-")):
        raise refusal("this header belongs to HTTP or to the broker; name the header that the tool reads itself")
    return value


def _url(text: str) -> str:
    try:
        endpoint = parse_endpoint(text.rstrip("/"))
    except ValueError as error:
        raise refusal(str(error)) from None
    local = endpoint.host == "localhost" or (endpoint.host[-1:].isdigit() and ipaddress.ip_address(endpoint.host).is_loopback)
    if endpoint.scheme == "http" and not (local or endpoint.host == "::1"):
        raise refusal("secrets would travel in plain text; write an https URL")
    return text


# Also a label of DNS and a segment of a path.
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,62})$")]
# Wide enough for every MCP tool name.
OperationName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
# Free text that names something outside the broker.
Word = Annotated[str, Field(min_length=1, max_length=256)]
Seconds = Annotated[int, _text(_seconds, shown=Annotated[str, Field(pattern="^[1-9][0-9]{0,8}[smhd]$", examples=["5m", "1h"])])]
# Up to 1 GiB, as a number or with a unit.
Bytes = Annotated[
    int,
    BeforeValidator(lambda value: _bytes(value) if isinstance(value, str) else value, json_schema_input_type=int | str),
    Field(ge=0, le=1 << 30, examples=["1MiB", 65536]),
]
# k, M and G are thousands, millions and billions.
_PER = "/(s|min|minute|h|hour|d|day)$"
_MONEY = r"^[0-9]{1,9}(\.[0-9]{1,9})?"
_COUNT, _SIZE = _MONEY + "[kMG]?", _MONEY + "(KiB|MiB|GiB)?"
CountRate = Annotated[Rate, _text(_rate(_THOUSANDS, "20/hour"), shown=Annotated[str, Field(pattern=_COUNT + _PER)])]
SizeRate = Annotated[Rate, _text(_rate(_SIZES, "50MiB/day"), shown=Annotated[str, Field(pattern=_SIZE + _PER)])]
MoneyRate = Annotated[Rate, _text(_rate({"": 1}, "50/day", NANO), shown=Annotated[str, Field(pattern=_MONEY + _PER)])]
Count = Annotated[
    int, PlainValidator(_amount(_THOUSANDS, "200k"), json_schema_input_type=int | Annotated[str, Field(pattern=_COUNT + "$")])
]
# In billionths; as a number or, since YAML rounds none, in quotes.
Money = Annotated[
    int,
    PlainValidator(_amount({"": 1}, "2.50", NANO), json_schema_input_type=float | Annotated[str, Field(pattern=_MONEY + "$")]),
]
Params = dict[str, Annotated[ParameterSchema, PlainValidator(_schema, json_schema_input_type=dict[str, JsonValue])]]
Reference = Annotated[dict[Literal["env", "file"], Word], BeforeValidator(_reference)]
ServerTool = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
# RFC 9110 section 5.1, in lower case.
Header = Annotated[str, Field(pattern=r"^[a-z0-9!#$%&'*+.^_`|~-]{1,128}$"), AfterValidator(_header)]
Spiffe = Annotated[str, _text(parse_spiffe, "spiffe_invalid")]
TrustDomain = Annotated[str, Field(pattern="^[a-z0-9._-]{1,255}$")]
PemFile = Annotated[dict[Literal["file"], Word], Field(min_length=1)]
# To which the broker itself sends secrets: https, or loopback.
Url = Annotated[Word, AfterValidator(_url)]


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


class SigV4(Model):
    """What an AWS Signature Version 4 is for."""

    service: Name = Field(description="The service's name in signatures, such as s3.")
    region: Name = Field(description="The region, such as eu-west-1.")


class Placement(Model):
    """Where the credential goes in the request: into a header by a template, or by one of the other ways alone."""

    header: Header = Field("authorization", description="The header, in lower case.")
    template: Annotated[str, AfterValidator(_template)] = Field("Bearer {}", description="Its value; the credential goes to {}.")
    basic: Annotated[str, Field(pattern=r"^[!-9;-~]{0,128}$"), AfterValidator(_known_form)] | None = Field(
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
        if pointer := next(_literals(self.__pydantic_extra__, ""), None):
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
    addresses: tuple[Annotated[str, _text(_cidr)], ...] = Field(
        (), description="The private or loopback ranges that the host may resolve to, as CIDRs (RFC 4632)."
    )


class Match(Model):
    """How a call is recognised as this operation."""

    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] | None = Field(
        None, description="The HTTP method (rest, openai, anthropic)."
    )
    path: Annotated[PathTemplate, _text(PathTemplate.parse, "match_invalid")] | None = Field(
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
    endpoint: Annotated[Endpoint, _text(parse_endpoint, "endpoint_invalid")] = Field(
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


class Ceilings(Model):
    """Bounds on what is spent by all that they stand above; each holds on its own."""

    rate: CountRate | None = Field(
        None, description="Calls per time, evenly: a bucket of `burst` calls that refills at this pace."
    )
    burst: Annotated[int, Field(ge=1)] | None = Field(
        None, description="The size of the rate's bucket; the rate's amount if absent."
    )
    concurrency: int | None = Field(None, ge=0, description="Calls that may be open at once.")
    calls: CountRate | None = Field(
        None, description="Calls per window, such as 20/hour. Windows begin at the full hour or day, UTC."
    )
    writes: CountRate | None = Field(None, description="Calls with effect write or destructive per window.")
    destructive: CountRate | None = Field(None, description="Calls with effect destructive per window.")
    bytes_out: SizeRate | None = Field(
        None, description="Bytes of request bodies, paths and queries per window, such as 50MiB/day."
    )
    tokens: CountRate | None = Field(None, description="Model tokens, input and output, per window, such as 2M/day.")
    input_tokens: CountRate | None = Field(None, description="Model input tokens, cached ones too, per window.")
    output_tokens: CountRate | None = Field(None, description="Model output tokens per window.")
    cached_tokens: CountRate | None = Field(None, description="Model input tokens read from the provider's cache, per window.")
    usd: MoneyRate | None = Field(None, description="US dollars spent on models per window, by the platform's prices.")

    @model_validator(mode="after")
    def _bucket(self) -> Self:
        if self.burst and not self.rate:
            raise refusal("burst is the size of a rate's bucket; write a rate beside it", pointer="/burst")
        return self


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
    namespace: Name | None = Field(None, description="The network namespace that its calls come from.")

    @model_validator(mode="after")
    def _any(self) -> "Identity":
        if not (self.spiffe or self.namespace or self.token):
            why = "no call could be known as its own; write token: true, a spiffe ID or a namespace"
            raise refusal(why, "identity_missing")
        return self


class Approvers(Model):
    """Who must say yes to exactly this call."""

    approvers: int = Field(1, ge=1, le=9, description="How many different people must approve.")
    groups: tuple[Word, ...] = Field((), description="Only people in one of these groups count; anyone's word if absent.")
    expires: Seconds = Field(3600, description="How long an approval may be waited for, and then used.")


class Approval(Approvers):
    """Asks a human before each call."""

    when: Params | None = Field(None, description="Only calls whose parameters fit these schemas, by location, need it.")


class GrantSpec(Model):
    """The right to one operation, perhaps narrowed."""

    params: Params = Field({}, description="A JSON Schema for each location, in addition to the catalog's.")
    limits: Limits | None = Field(None, description="Bounds on this operation alone.")
    approval: Approval | None = Field(None, description="Asks a human before each call.")
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
    mode: Literal["shadow", "enforce"] = Field("enforce", description="shadow records what would be denied, and lets it through.")
    tools: dict[Name, AgentTool] = Field(description="What it may use; an empty map denies everything.")
    limits: Limits | None = Field(None, description="Bounds on all that it does.")
    callers: tuple[Name, ...] | None = Field(None, description="The agents that may call this one (protocol a2a).")


class Agent(Kind):
    """An agent's manifest: a principal of its own."""

    kind: Literal["Agent"] = Field(description="Always Agent.")
    spec: AgentSpec = Field(description="Who the agent is and what it may do.")


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


class PlatformSpec(Model):
    """What manifests may ask for at all; every part is optional."""

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


KINDS: Mapping[str, type[Kind]] = MappingProxyType({kind.__name__: kind for kind in (Tool, Agent, Platform, PolicyTest)})
"""The kinds, by the word that `kind:` takes."""
