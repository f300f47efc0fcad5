"""What catalog entries say to issuers: the base of their settings, how a wrong one is told, and the scopes of one operation.

Law: a message names the field and the remedy, never the value.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import Field, ValidationError, WithJsonSchema

from broker.credentials.base import CredentialUnavailable, Occasion
from broker.manifest.models import Model, Word

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


def problems(model: type[Model], settings: Mapping[str, Any], issuer: str) -> list[str]:
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
    """The scopes of this operation: by its name, or else by its effect. A protocol's housekeeping is a read.

    Raises `CredentialUnavailable` where the entry has a map and neither is in it.
    """
    if not isinstance(scopes, Mapping):
        return tuple(scopes or ())
    name, effect = (occasion.operation.name, occasion.operation.effect.value) if occasion.operation else ("", "read")
    for word in (name, effect):
        if word in scopes:
            return tuple(scopes[word])
    what = f"the scopes of {occasion.tool.name!r} name neither the operation {name!r} nor the effect {effect}"
    raise CredentialUnavailable(what, "add one of them, if only with an empty list")
