"""The words and quantities that fields of a manifest are made of, each with its pattern, its unit and its reason to be refused.

Law: a secret is named by reference. A literal one is refused with `secret_literal`, and no message ever repeats it.
"""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

CUSTOM_CODES = frozenset({"secret_literal", "identity_missing"})
"""Codes of findings that fields raise themselves; every other refusal of a value is `field_invalid`."""


class Model(BaseModel):
    """The base of all parts: strict, frozen, and nothing but what is declared."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def invalid(sentence: str) -> PydanticCustomError:
    """The refusal of a value, in one sentence that says what to write. It must not quote the value."""
    return PydanticCustomError("field_invalid", "{sentence}", {"sentence": sentence})


_SIZE = re.compile(r"([1-9][0-9]{0,8})(|KiB|MiB|GiB)\Z")
_DURATION = re.compile(r"([1-9][0-9]{0,8})([smhd])\Z")
_BYTES = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _size(value: object) -> object:
    if isinstance(value, str):
        if not (found := _SIZE.match(value)):
            raise invalid("a size is a number of bytes, or a number with KiB, MiB or GiB, such as 1MiB")
        return int(found[1]) * _BYTES[found[2]]
    return value


def _duration(value: object) -> object:
    if not isinstance(value, str) or not (found := _DURATION.match(value)):
        raise invalid("a duration is a number with s, m, h or d, such as 5m")
    return int(found[1]) * _SECONDS[found[2]]


def _cidr(value: str) -> str:
    try:
        if "/" in value:
            return str(ipaddress.ip_network(value))
    except ValueError:
        pass
    raise invalid("an address range is in CIDR form without host bits, such as 10.20.0.0/16, or 127.0.0.1/32 for one address")


# Forms that the issuers of well-known credentials reserve, so that a match is hardly ever anything else.
_KNOWN_SECRET = re.compile(
    r"\b(?:[sr]k[-_](?:live|test|ant|proj|svcacct)[-_][\w-]{6,}|sk-[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abeoprs]-[\w-]{10,}|A[KS]IA[A-Z0-9]{16}\b|AIza[\w-]{30,}|whsec_\w{16,}|npm_[A-Za-z0-9]{30,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.)|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_TOKEN_LIKE = re.compile(r"(?=[^{}\s]*[0-9])[A-Za-z0-9_+/=.~-]{12,}")
REMEDY = "put it into the environment or a file, name that as secret: {env: NAME} or secret: {file: PATH}, and revoke this one"
"""What to do about a `secret_literal`."""


def redacted(text: str) -> str:
    """The text without credentials of well-known forms."""
    return _KNOWN_SECRET.sub("[redacted]", text)


def _literal(where: str) -> PydanticCustomError:
    return PydanticCustomError("secret_literal", "{where} holds a literal secret", {"where": where})


def _reference(value: object) -> object:
    if isinstance(value, str):
        raise _literal("this field")
    return value


def _template(value: str) -> str:
    if redacted(value) != value or _TOKEN_LIKE.search(value):
        raise _literal("the template")
    if value.count("{}") != 1 or not value.isascii() or not value.isprintable():
        raise invalid('a template is one line of ASCII with {} once, where the credential goes, such as "Bearer {}"')
    return value


_RESERVED = frozenset(
    {"connection", "content-length", "content-type", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)


def _header(value: str) -> str:
    if value in _RESERVED or value.startswith(("x-broker-", "x-envoy-", "x-forwarded-", "proxy-")):
        raise invalid("this header belongs to HTTP or to the broker; name the header that the tool reads its credential from")
    return value


Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,62})$")]
"""Tools, agents and files' own names: also a label of DNS and a segment of a path."""
OperationName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
"""Operations: wide enough for every MCP tool name."""
Word = Annotated[str, Field(min_length=1, max_length=256)]
"""Free text that names something outside the broker."""
Duration = Annotated[
    int,
    BeforeValidator(_duration),
    WithJsonSchema({"type": "string", "pattern": "^[1-9][0-9]{0,8}[smhd]$", "examples": ["5m", "1h"]}),
]
"""Seconds, written `30s`, `5m`, `1h` or `1d`."""
Size = Annotated[
    int,
    BeforeValidator(_size),
    Field(ge=0, le=1 << 30),
    WithJsonSchema(
        {
            "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[1-9][0-9]{0,8}(KiB|MiB|GiB)?$"}],
            "examples": ["1MiB", 65536],
        }
    ),
]
"""Bytes up to 1 GiB, written as a number or with KiB, MiB or GiB."""
_PER = "/(s|min|minute|h|hour|day)$"
CountRate = Annotated[str, Field(pattern=rf"^[0-9]{{1,9}}[kMG]?{_PER}", examples=["20/hour", "2M/day"])]
"""A count per time, `k`, `M` and `G` being thousands, millions and billions."""
SizeRate = Annotated[str, Field(pattern=rf"^[0-9]{{1,9}}(KiB|MiB|GiB)?{_PER}", examples=["50MiB/day"])]
"""Bytes per time."""
MoneyRate = Annotated[str, Field(pattern=rf"^[0-9]{{1,9}}(\.[0-9]{{1,6}})?{_PER}", examples=["50/day"])]
"""US dollars per time."""
Cidr = Annotated[str, AfterValidator(_cidr)]
"""An address range (RFC 4632), in its canonical spelling."""
Header = Annotated[str, Field(pattern=r"^[a-z0-9!#$%&'*+.^_`|~-]{1,128}$"), AfterValidator(_header)]
"""A header's name in lower case (RFC 9110 section 5.1)."""
Template = Annotated[str, AfterValidator(_template)]
"""A header's value with `{}` where the credential goes."""
Schema = dict[str, JsonValue]
"""A JSON Schema 2020-12."""


class SecretSource(Model):
    """Where a secret is: exactly one of the two."""

    env: str | None = Field(
        None, description="The environment variable that holds it, in capitals.", pattern="^[A-Z_][A-Z0-9_]{0,127}$"
    )
    file: Word | None = Field(None, description="The file that holds it, and nothing else.")

    @model_validator(mode="after")
    def _one(self) -> "SecretSource":
        if (self.env is None) == (self.file is None):
            raise invalid("a secret is named by exactly one of env and file")
        return self


SecretReference = Annotated[SecretSource, BeforeValidator(_reference)]
"""A secret by reference; a literal one is refused."""
