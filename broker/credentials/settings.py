"""The terms of credentials: what catalog entries ask of issuers, and whether what issuers answer keeps to it.

Law: a message names the field and the remedy, never the value.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import Field, ValidationError, WithJsonSchema

from broker.credentials.base import CredentialUnavailable, Occasion
from broker.manifest.words import Model, Word

MAX_ANSWER = 65_536
"""The bytes that an issuer's answer may have."""

_Model = TypeVar("_Model", bound=Model)

# The loader has read it already, so it is a number here and text in the file.
Lifetime = Annotated[int, Field(gt=0), WithJsonSchema({"type": "string", "pattern": "^[1-9][0-9]{0,8}[smhd]$"})]
# RFC 6749 section 3.3: no space, quote or backslash.
Scope = Annotated[str, Field(pattern=r"^[!#-\[\]-~]{1,256}$")]
Scopes = tuple[Scope, ...] | dict[Word, tuple[Scope, ...]]


class Issued(Model):
    """What the entry of every issuer that asks someone else may say."""

    scopes: Scopes = Field(
        (), description="What the credential may do: a list, or a map from an operation's name or an effect to its list."
    )
    ttl: Lifetime | None = Field(None, description="How long a credential is used at most, such as 5m.")


def parsed(model: type[_Model], settings: Mapping[str, Any]) -> _Model:
    """The settings as their model. Raises `ValidationError`."""
    # By way of JSON, as the loader does it: a list is a list there, and strict models take it.
    return model.model_validate_json(orjson.dumps(dict(settings)))


def problems(model: type[Model], issuer: str, settings: Mapping[str, Any]) -> list[str]:
    """Each thing that is wrong with the settings, as a sentence with its remedy."""
    try:
        parsed(model, settings)
    except ValidationError as invalid:
        return [_sentence(dict(error), issuer) for error in invalid.errors(include_url=False, include_input=False)]
    return []


def _sentence(error: Mapping[str, Any], issuer: str) -> str:
    # A union's branches and a map's keys are no fields.
    field = ".".join(str(part) for part in error["loc"] if str(part).isidentifier() or isinstance(part, int))
    if error["type"] == "extra_forbidden":
        return f"the {issuer} issuer has no field {field}; correct its name, or take it out"
    if error["type"] == "missing":
        return f"the {issuer} issuer needs {field}; add it"
    why, _, advice = error["msg"].replace("Input should", "it should").partition("; ")
    return f"{field or 'the entry'} of the {issuer} issuer is not right: {why}; {advice or 'see docs/reference/issuers.md'}"


def scopes_of(scopes: Any, occasion: Occasion) -> tuple[str, ...]:
    """The scopes of this operation, of a list or a map of lists. Raises `CredentialUnavailable`, as `chosen`."""
    return tuple(chosen(scopes, occasion) if isinstance(scopes, Mapping) else scopes or ())


def chosen(scopes: Mapping[str, Any], occasion: Occasion, field: str = "") -> Any:
    """What a map has for this operation: by its name, or else by its effect. A protocol's housekeeping is a read.

    A map that holds `field` is no such map but itself what is asked for, unless `field` is also what an operation is called.
    Raises `CredentialUnavailable` where neither name nor effect is in it.
    """
    if field in scopes and not (isinstance(scopes[field], Mapping) and field in scopes[field]):
        return scopes
    name, effect = (occasion.operation.name, occasion.operation.effect.value) if occasion.operation else ("", "read")
    for word in (name, effect):
        if word in scopes:
            return scopes[word]
    what = f"the scopes of {occasion.tool.name!r} name neither the operation {name!r} nor the effect {effect}"
    raise CredentialUnavailable(what, "add one of them, if only an empty one")


def granted(value: object, asked: tuple[str, ...], issuer: str) -> tuple[str, ...]:
    """The scopes that an issuer says it gave; what was asked for where it says none. Raises `CredentialUnavailable`.

    Where none were asked for, those that it gives by itself are right.
    """
    if value is None:
        return asked
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CredentialUnavailable(f"the scopes that the issuer {issuer} answered can't be read", "see its documentation")
    if asked and not set(words) <= set(asked):
        what = f"the issuer {issuer} gave a wider credential than was asked for, and it is not used"
        raise CredentialUnavailable(what, "narrow the client's scopes at the issuer, or write all of them in scopes")
    return tuple(words)


def lifetime(value: object, ttl: int | None, issuer: str) -> float:
    """The seconds that a credential lives: what the issuer says, else the entry's `ttl`. Raises `CredentialUnavailable`."""
    if value is None and ttl is not None:
        return float(ttl)
    if value is None:
        what = f"the issuer {issuer} does not say how long its credential lives"
        raise CredentialUnavailable(what, "write a ttl that is no longer than it does")
    # Some servers write the number as text.
    seconds = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < _DIGITS else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not -_FOREVER_S < seconds < _FOREVER_S:
        raise CredentialUnavailable(f"the issuer {issuer} answered a life that is no number of seconds", "see its documentation")
    if seconds <= 0:
        raise CredentialUnavailable(f"the credential that the issuer {issuer} gave has ended already", "see its clock")
    return float(seconds)


def bare(value: object, issuer: str) -> str:
    """The credential in an answer: one line of visible ASCII. Raises `CredentialUnavailable`."""
    if not isinstance(value, str) or not _VISIBLE.fullmatch(value):
        what = f"the issuer {issuer} answered without a credential that can be sent"
        raise CredentialUnavailable(what, "see its documentation")
    return value


def document(content: bytes) -> Mapping[str, Any]:
    """The JSON object of an answer, empty where it is none."""
    try:
        read = orjson.loads(content)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


_DIGITS, _FOREVER_S = 12, 1e11
_VISIBLE = re.compile(r"[!-~]{1,16384}")
