"""Bytes, read in exactly one way or refused: JSON, forms, queries, and the request's head.

Law: if two readers could see two things in it, nobody gets to read it. Duplicate keys, other encodings than UTF-8, numbers that
readers round differently, half characters and sloppy percent-encoding are refused, never repaired. Every function takes linear
time and raises nothing but `Unreadable`, which never quotes a value.
"""

import json
import math
import re
from functools import lru_cache
from urllib.parse import unquote_to_bytes

import orjson

from broker.policy.types import Code, Json, Refusal, Request


class Unreadable(ValueError):
    """What was sent can't be read in exactly one way. `refusal` says why; `number` is the protocol's own error number for it."""

    def __init__(self, code: Code, detail: str, number: int | None = None) -> None:
        super().__init__(detail)
        self.refusal = Refusal(code, detail, protocol_code=number)


def must(condition: object, otherwise: str, code: Code = Code.PROTOCOL_VIOLATION, number: int | None = None) -> None:
    """Raise `Unreadable`, unless the condition holds."""
    if not condition:
        raise Unreadable(code, otherwise, number)


def json_value(body: bytes) -> Json:
    """One JSON text (RFC 8259), at most 254 levels deep; else `body_malformed`.

    What orjson can't write again is refused: half a surrogate pair, integers beyond 64 bits (readers round, wrap or fail), deep
    nesting (recursive readers behind us fail somewhere above 500 levels). The audit record, which it writes, couldn't hold them.
    """
    try:
        value: Json = _DECODER.decode(body.decode("utf-8"))
        orjson.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        why = str(error).partition(";")[0]  # behind it, Python may advise to lift its limit on digits
        raise Unreadable(Code.BODY_MALFORMED, f"the body is not a JSON text that all readers agree on: {why}") from None
    return value


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice (RFC 8259 section 4)")
    return found


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is NaN, or beyond what a double holds")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_finite)

# Visible ASCII and complete escapes. A raw ";" separates pairs for some readers and not for others; "#" ends a query for some.
_FORM = re.compile(r"(?:[!-\"$&-:<-~]|%[0-9A-Fa-f]{2})*+\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_BUT_LINES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def query(raw: str) -> dict[str, list[str]]:
    """The pairs of a raw query (without `?`), keys kept literally; else `protocol_violation`."""
    return _pairs(raw, Code.PROTOCOL_VIOLATION, "query", _CONTROL)


def form(body: bytes) -> dict[str, list[str]]:
    """The pairs of an `application/x-www-form-urlencoded` body; else `body_malformed`. Values may hold tabs and line ends."""
    return _pairs(body.decode("latin-1"), Code.BODY_MALFORMED, "form", _CONTROL_BUT_LINES)


def _pairs(raw: str, code: Code, what: str, forbidden: re.Pattern[str]) -> dict[str, list[str]]:
    must(_FORM.match(raw), f"the {what} has half a %-escape, or a raw character that must be escaped (; # space …)", code)
    found: dict[str, list[str]] = {}
    try:
        for pair in filter(None, raw.split("&")):
            key, _, value = pair.partition("=")
            found.setdefault(_decoded(key), []).append(_decoded(value))
    except UnicodeDecodeError:
        raise Unreadable(code, f"the {what}'s percent-encoding is not UTF-8") from None
    decoded = (text for key, values in found.items() for text in (key, *values)) if "%" in raw else ()
    must(not any(map(forbidden.search, decoded)), f"the {what} escapes a control character", code)
    return found


def _decoded(text: str) -> str:
    text = text.replace("+", " ")
    return unquote_to_bytes(text).decode("utf-8") if "%" in text else text


_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105 - RFC 9110 section 5.6.2
_METHOD = re.compile(_TOKEN)
_PARAMETER = rf"charset=(?:utf-8|\"utf-8\")|(?!charset=){_TOKEN}=(?:{_TOKEN}|\"[^\"\\]*\")"
_MEDIA_TYPE = re.compile(rf"[ \t]*({_TOKEN}/{_TOKEN})(?:[ \t]*;[ \t]*(?:{_PARAMETER})?)*+[ \t]*", re.IGNORECASE)
_ONCE = frozenset({"content-type", "content-length", "transfer-encoding", "content-encoding", "upgrade"})


def head(request: Request) -> None:
    """Nothing, for a request that is plain HTTP; raises where its head has two readings, or asks for another protocol.

    A repeated framing or content header, `Upgrade`, TRACE, CONNECT → `protocol_violation`; a compressed body →
    `encoding_not_allowed`, since the bytes judged must be the bytes the upstream reads.
    """
    method, named = request.method, [header for header in request.headers if header[0] in _ONCE]
    once = dict(named)
    must(_METHOD.fullmatch(method) and method not in ("TRACE", "CONNECT"), f"the method {method[:32]!r} is not passed on")
    must(len(once) == len(named), "a content or framing header is sent twice")
    plain = once.get("content-encoding", "").strip().lower() in ("", "identity")
    must(plain, "the body is compressed; send it with content-encoding identity", Code.ENCODING_NOT_ALLOWED)
    upgrade = "upgrade" in once or any("upgrade" in value.lower() for value in request.all("connection"))
    must(not upgrade, "upgrades (WebSocket, h2c) are not passed on")


@lru_cache(maxsize=256)  # agents send a handful of spellings, on every call
def media_type(stated: str) -> str:
    """The media type of a content-type header, in lower case, without parameters; empty when `stated` is.

    `encoding_not_allowed` when it is not one media type (RFC 9110 section 8.3), or its charset is not UTF-8.
    """
    match = _MEDIA_TYPE.fullmatch(stated)
    must(match or not stated, "the content-type is not one media type, of charset utf-8 if any", Code.ENCODING_NOT_ALLOWED)
    return match[1].lower() if match else ""
