"""Bytes, read in exactly one way or refused: JSON, forms, queries, and the request's head.

Law: if two readers could see two things in it, nobody gets to read it. Duplicate keys, other encodings than UTF-8, numbers that
readers round differently, half characters and sloppy percent-encoding are refused, never repaired. Every function is total and
takes linear time; what it returns instead of a value is a `Refusal`, and no refusal quotes a value.
"""

import json
import re
from functools import lru_cache
from itertools import accumulate
from urllib.parse import unquote_to_bytes

from broker.policy.types import Code, Json, Refusal, Request

MAX_DEPTH = 64
"""How deep JSON may nest, in levels. APIs use fewer than ten; recursive readers behind us fail somewhere above 500."""

_TEXT_OUTSIDE = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def json_value(body: bytes) -> Json | Refusal:
    """One JSON text (RFC 8259), or a `body_malformed` refusal that says what is wrong with it."""
    if _too_deep(body):
        return _malformed(f"JSON nests deeper than {MAX_DEPTH} levels")
    try:
        value: Json = _DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        return _malformed("the body is not UTF-8 (RFC 8259 section 8.1)")
    except json.JSONDecodeError as error:
        return _malformed(f"the body is not one JSON text: {error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:
        return _malformed(f"the body is JSON that readers disagree on: {error}")
    if _SURROGATE.search(body) and not _whole_characters(value):
        return _malformed("the body escapes half of a surrogate pair (RFC 8259 section 8.2)")
    return value


def _too_deep(body: bytes) -> bool:
    # Counting every bracket overestimates, but settles nearly every body at the cost of a memory scan.
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return False
    brackets = _TEXT_OUTSIDE.sub(b"", body).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > MAX_DEPTH


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same key twice (RFC 8259 section 4)")
    return found


def _integer(text: str) -> int:
    # Beyond 64 bits, readers round, wrap or fail (RFC 8259 section 6), and our own audit record could not hold it.
    if len(text) > len("-9223372036854775808") or not -(2**63) <= int(text) < 2**64:
        raise ValueError("an integer needs more than 64 bits")
    return int(text)


def _real(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is beyond what a double holds")
    return number


def _constant(_: str) -> float:
    raise ValueError("NaN and Infinity are not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_real, parse_constant=_constant)


def _whole_characters(value: Json) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _malformed(detail: str) -> Refusal:
    return Refusal(Code.BODY_MALFORMED, detail)


# Visible ASCII and complete escapes. A raw ";" separates pairs for some readers and not for others; "#" ends a query for some.
_FORM = re.compile(r"(?:[!-\"$&-:<-~]|%[0-9A-Fa-f]{2})*+\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_BUT_LINES = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def query(raw: str) -> dict[str, list[str]] | Refusal:
    """The pairs of a raw query (without `?`), keys kept literally, or a `protocol_violation`."""
    return _pairs(raw, Code.PROTOCOL_VIOLATION, "query", _CONTROL)


def form(body: bytes) -> dict[str, list[str]] | Refusal:
    """The pairs of an `application/x-www-form-urlencoded` body, or `body_malformed`. Values may hold tabs and line ends."""
    return _pairs(body.decode("latin-1"), Code.BODY_MALFORMED, "form", _CONTROL_BUT_LINES)


def _pairs(raw: str, code: Code, what: str, forbidden: re.Pattern[str]) -> dict[str, list[str]] | Refusal:
    if not _FORM.match(raw):
        return Refusal(
            code, f"the {what} has an incomplete %-escape, or a character that must be escaped (;, #, space, non-ASCII)"
        )
    found: dict[str, list[str]] = {}
    try:
        for pair in filter(None, raw.split("&")):
            key, _, value = pair.partition("=")
            found.setdefault(_decoded(key), []).append(_decoded(value))
    except UnicodeDecodeError:
        return Refusal(code, f"the {what}'s percent-encoding is not UTF-8")
    if "%" in raw and any(map(forbidden.search, (text for key, values in found.items() for text in (key, *values)))):
        return Refusal(code, f"the {what} escapes a control character")
    return found


def _decoded(text: str) -> str:
    if "+" in text:
        text = text.replace("+", " ")
    return unquote_to_bytes(text).decode("utf-8") if "%" in text else text


_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # noqa: S105 - RFC 9110 section 5.6.2
_METHOD = re.compile(_TOKEN)
_MEDIA_TYPE = re.compile(rf"[ \t]*({_TOKEN}/{_TOKEN})((?:[ \t]*;[ \t]*(?:{_TOKEN}=(?:{_TOKEN}|\"[^\"\\]*\"))?)*+)[ \t]*")
_PARAMETER = re.compile(rf"({_TOKEN})=(?:({_TOKEN})|\"([^\"\\]*)\")")
_ONCE = frozenset({"content-type", "content-length", "transfer-encoding", "content-encoding", "upgrade"})


def head(request: Request) -> Refusal | None:
    """Why a request's head can't be read in one way, or asks for another protocol; None when it is plain HTTP.

    A repeated framing or content header, `Upgrade`, TRACE, CONNECT → `protocol_violation`; a compressed body →
    `encoding_not_allowed`, since the bytes judged must be the bytes the upstream reads.
    """
    if not _METHOD.fullmatch(request.method) or request.method in ("TRACE", "CONNECT"):
        return Refusal(Code.PROTOCOL_VIOLATION, f"the method {request.method[:32]!r} is not passed on")
    named = [header for header in request.headers if header[0] in _ONCE]
    names = [name for name, _ in named]
    if len(names) != len(set(names)):
        return Refusal(Code.PROTOCOL_VIOLATION, "a content or framing header is sent twice")
    encoding = dict(named).get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        return Refusal(Code.ENCODING_NOT_ALLOWED, "the body is compressed; send it with content-encoding identity")
    if "upgrade" in names or any("upgrade" in value.lower() for value in request.all("connection")):
        return Refusal(Code.PROTOCOL_VIOLATION, "upgrades (WebSocket, h2c) are not passed on")
    return None


def media_type(request: Request, accepted: tuple[str, ...] = ()) -> str | Refusal:
    """The body's media type in lower case, without parameters; empty when none is sent.

    `encoding_not_allowed` when its charset is not UTF-8, or when it is none of `accepted` (empty: any).
    """
    media = _media_type(request.header("content-type") or "")
    if isinstance(media, Refusal) or not accepted or media in accepted:
        return media
    return Refusal(Code.ENCODING_NOT_ALLOWED, f"the body is {media or 'of no stated type'!r}; accepted: {', '.join(accepted)}")


@lru_cache(maxsize=256)  # agents send a handful of spellings, on every call
def _media_type(value: str) -> str | Refusal:
    if not value:
        return ""
    match = _MEDIA_TYPE.fullmatch(value)
    if match is None:
        return Refusal(Code.ENCODING_NOT_ALLOWED, "the content-type is not one media type (RFC 9110 section 8.3)")
    charsets = [token or quoted for name, token, quoted in _PARAMETER.findall(match[2]) if name.lower() == "charset"]
    if any(charset.lower() != "utf-8" for charset in charsets):
        return Refusal(Code.ENCODING_NOT_ALLOWED, "the charset is not utf-8, the only one that is accepted")
    return match[1].lower()
