"""The words that the fields of manifests are made of, and the parts that several kinds share.

Law: whatever a value tells by itself is judged here. A secret is named by reference: a literal one is refused with
`secret_literal`, and no message repeats it.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from broker.manifest.addresses import parse_endpoint, parse_spiffe
from broker.policy.limits import NANO
from broker.policy.match import PathTemplate
from broker.policy.schema import ParameterSchema, SchemaError, json_pointer
from broker.policy.snapshot import Endpoint
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


def moment(text: str) -> float:
    """A date, which begins at 00:00 UTC, or a time with its zone (RFC 3339 section 5.6), in seconds since the epoch.

    Raises `ValueError`.
    """
    try:
        found = datetime.fromisoformat(text.upper()) if _MOMENT.fullmatch(text) else None
    except ValueError:
        found = None
    if found is None:
        raise refusal(_NO_MOMENT)
    try:
        return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC).timestamp()
    except OverflowError:  # in UTC it is before the year 1, or after 9999
        raise refusal(_NO_MOMENT) from None


_MOMENT = re.compile(r"\d{4}-\d\d-\d\d([Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d))?", re.ASCII)
_NO_MOMENT = "it should be a date or a time with its zone; write 2027-01-31 (from 00:00 UTC on) or 2027-01-31T17:00:00Z"


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


def literals(value: object, pointer: str) -> Iterator[str]:
    """Where in an issuer's fields a secret stands, by its form or by its field's name."""
    if isinstance(value, dict):
        for name, part in value.items():
            here = pointer + json_pointer(name)
            yield from (here,) if isinstance(part, str) and _SECRET_BY_NAME.fullmatch(name) else literals(part, here)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from literals(part, f"{pointer}/{index}")
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
Moment = Annotated[
    float,
    _text(
        moment, shown=Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d(T.+)?$", examples=["2027-01-31", "2027-01-31T17:00:00Z"])]
    ),
]
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
# RFC 4632.
Cidr = Annotated[str, _text(_cidr)]
Template = Annotated[str, AfterValidator(_template)]
BasicUser = Annotated[str, Field(pattern=r"^[!-9;-~]{0,128}$"), AfterValidator(_known_form)]
EndpointText = Annotated[Endpoint, _text(parse_endpoint, "endpoint_invalid")]
PathText = Annotated[PathTemplate, _text(PathTemplate.parse, "match_invalid")]


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


class Approvers(Model):
    """Who must say yes to exactly this call."""

    approvers: int = Field(1, ge=1, le=9, description="How many different people must approve.")
    groups: tuple[Word, ...] = Field((), description="Only people in one of these groups count; anyone's word if absent.")
    expires: Seconds = Field(3600, description="How long an approval may be waited for, and then used.")
