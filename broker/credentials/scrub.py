"""Takes what was injected into a call out of its answer: the value itself, and as servers usually write it.

Laws: no spelling of a value passes, however the answer is cut into chunks; every other byte passes unchanged and in order. What
comes out depends on the bytes, never on where they were cut. Only what may be the beginning of a spelling waits for the next
chunk, and nothing waits longer than until the answer's end. Nothing here prints, or raises with, a value.

`spellings` is the whole list of what is found. Not found is what is compressed, encrypted, hashed, broken by line ends, escaped
otherwise, or encoded twice in another way than base64 in something, or JSON in JSON.
"""

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from urllib.parse import quote

import jsonschema_rs

MARKER = "[credential removed]"
"""Stands where a value stood. It needs no escape in JSON, HTML, a header or an event."""
SHORTEST = 8
"""A value of fewer characters is not looked for: it could be a word of any answer, and it can be guessed anyway."""

# What encoders of URLs leave as it is beside letters, digits and -._~ (a rest that forms and Java write as %7E).
_URL_SAFE = (
    "",  # RFC 3986; Go's QueryEscape, PHP
    "/",  # Python's quote
    "*",  # forms (WHATWG), Java
    "!*'()",  # JavaScript's encodeURIComponent
    "$&+=:@",  # Go's PathEscape
    "!#$&'()*+,/:;=?@",  # JavaScript's encodeURI
    "!$%&()*+,/:;=?@[\\]^`{|}",  # what a browser does to a query
)
# What encoders of JSON write as \uXXXX although they need not.
_JSON_ESCAPED = ("", "<>&", "<>&'", "\"<>&'+`")  # most; Go; PHP and Rails; .NET
# Quotes in HTML and XML: no attribute; attributes only; Python; Go and Jinja; Ruby and JavaScript; PHP; XML.
_QUOTES = (
    ('"', "'"), ("&quot;", "'"), ("&quot;", "&#x27;"), ("&#34;", "&#39;"), ("&quot;", "&#39;"), ("&quot;", "&#039;"),
    ("&quot;", "&apos;"),
)  # fmt: skip
_TO_BASE64URL = str.maketrans("+/", "-_")
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)  # what no encoder escapes, unless it escapes everything
_PERCENT, _UNICODE = re.compile(r"%[0-9A-F]{2}"), re.compile(r"\\u([0-9a-f]{4})")


def spellings(value: str) -> set[bytes]:
    """Every way to write `value` that is looked for; it has at least `SHORTEST` characters."""
    octets = {value.encode("utf-8", "replace"), value.encode("latin-1", "replace")}  # headers leave as Latin-1
    texts = {value, *(text for each in octets for text in _base64(each))}
    special = {text for text in texts if not _PLAIN.fullmatch(text)}
    escaped = {form for text in special for form in (*_url(text), *_html(text))}
    for _ in range(2):  # an MCP result is JSON, and its text often is JSON too
        special |= {form for text in special for form in _json(text)}
    whole = {form for each in octets for form in _every_octet(each)}
    return octets | {text.encode("utf-8", "replace") for text in texts | special | escaped | whole}


def _base64(octets: bytes) -> Iterator[str]:
    """Behind 0, 1 and 2 other octets: the characters that hold nothing but `octets`."""
    for before in range(3):
        text = base64.b64encode(bytes(before) + octets).decode()
        own = text[(before * 8 + 5) // 6 : (before + len(octets)) * 8 // 6]
        yield own
        yield own.translate(_TO_BASE64URL)


def _url(text: str) -> Iterator[str]:
    for safe in {"".join(each for each in safe if each in text) for safe in _URL_SAFE}:
        for encoding in ("utf-8",) if text.isascii() else ("utf-8", "latin-1"):
            quoted = quote(text, safe, encoding, "replace")
            for tilde in {quoted, quoted.replace("~", "%7E")}:
                for form in {tilde, tilde.replace("%20", "+")}:
                    yield form
                    yield _PERCENT.sub(lambda found: found[0].lower(), form)


def _html(text: str) -> Iterator[str]:
    for double, single in _QUOTES:
        form = html.escape(text, quote=False).replace('"', double).replace("'", single)
        mustache = form.replace("/", "&#x2F;").replace("`", "&#x60;").replace("=", "&#x3D;")
        for each in {form, mustache}:
            yield each
            yield each.encode("ascii", "xmlcharrefreplace").decode()


def _json(text: str) -> Iterator[str]:
    for ascii_only in (True, False):
        dumped = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        for slash in {dumped, dumped.replace("/", r"\/")}:
            for escaped in _JSON_ESCAPED:
                form = slash.replace(r"\"", '"') if '"' in escaped else slash
                for each in escaped:
                    form = form.replace(each, f"\\u{ord(each):04x}")
                yield form
                yield _UNICODE.sub(lambda found: rf"\u{found[1].upper()}", form)


def _every_octet(octets: bytes) -> Iterator[str]:
    for form in (octets.hex(), "%" + octets.hex("%")):
        yield form
        yield form.upper()


class Scrubber:
    """Finds the values of one lease. Values that are too short are left out; without any, everything passes."""

    __slots__ = ("_beginnings", "_heads", "_suspicion")

    def __init__(self, values: Iterable[str]) -> None:
        self._heads: dict[bytes, list[bytes]] = {}
        for literal in {form for value in _apart(values) for form in spellings(value)}:
            self._heads.setdefault(literal[:SHORTEST], []).append(literal)
        self._beginnings = tuple({head[:size] for head in self._heads for size in range(1, len(head))})
        # One pass for all heads at memory speed, and the engine is here already. `re` takes thirty times, `in` ten times as long.
        either = "|".join("".join(f"\\x{octet:02x}" for octet in head) for head in self._heads)
        self._suspicion = jsonschema_rs.Draft202012Validator({"pattern": either}, pattern_options=jsonschema_rs.RegexOptions())

    def __eq__(self, other: object) -> bool:
        """Whether both find the same."""
        return isinstance(other, Scrubber) and self._heads == other._heads

    def __hash__(self) -> int:
        """Of the beginnings of what is found."""
        return hash(frozenset(self._heads))

    def shown(self, data: bytes) -> bool:
        """Whether a value stands in it, as `scan` finds it; at memory speed also where it is made of the beginnings of one."""
        if not self._suspicion.is_valid(data.decode("latin-1")):
            return False
        return any(head in data and any(each in data for each in literals) for head, literals in self._heads.items())

    def header(self, value: str) -> tuple[str, int]:
        """A header's value without them, and how often one stood in it. The value is Latin-1, as it came."""
        clean, found, _ = self.scan(value.encode("latin-1", "replace"), last=True)
        return (clean.decode("latin-1"), found) if found else (value, 0)

    def stream(self) -> "ScrubbedStream":
        """For one body."""
        return ScrubbedStream(self)

    def scan(self, data: bytes, *, last: bool) -> tuple[bytes, int, int]:
        """What may pass (`data` itself if all of it may), how often a value stood in it, and from where on `data` must wait."""
        suspect = self._suspicion.is_valid(data.decode("latin-1"))
        if not suspect and (last or not data.endswith(self._beginnings)):
            return data, 0, len(data)
        places = [*(self._places(data) if suspect else ()), *self._cut_heads(data)]
        passed, at, found = bytearray(), 0, 0
        for start, end in sorted(places, key=lambda place: (place[0], -place[1])):  # at one start the longest goes first
            if start < at or (last and end > len(data)):
                continue
            passed += data[at:start]
            if end > len(data):
                return bytes(passed), found, start
            passed += MARKER.encode()
            at, found = end, found + 1
        return (bytes(passed + data[at:]) if found else data), found, len(data)

    def _places(self, data: bytes) -> Iterator[tuple[int, int]]:
        """Where a spelling begins and ends; one that goes on behind the data ends there."""
        for head, literals in self._heads.items():
            start = data.find(head)
            while start >= 0:
                for literal in literals:
                    end = start + len(literal)
                    if literal.startswith(data[start:end]):
                        yield start, end
                start = data.find(head, start + 1)

    def _cut_heads(self, data: bytes) -> Iterator[tuple[int, int]]:
        for start in range(max(0, len(data) - SHORTEST + 1), len(data)):
            if data[start:] in self._beginnings:
                yield start, len(data) + 1


class ScrubbedStream:
    """One body on its way, as a `ResponseFilter`. `found` counts what was replaced by now."""

    __slots__ = ("_held", "_scrubber", "found")

    def __init__(self, scrubber: Scrubber) -> None:
        self._scrubber, self._held, self.found = scrubber, b"", 0

    def feed(self, chunk: bytes, *, last: bool) -> bytes:
        """What the agent gets in place of `chunk`: the same object, where nothing was replaced or had to wait."""
        data = self._held + chunk if self._held else chunk
        passed, found, waits = self._scrubber.scan(data, last=last)
        self._held = data[waits:]
        self.found += found
        return passed


@lru_cache(maxsize=128)
def scrubber_of(values: tuple[str, ...]) -> Scrubber:
    """The scrubber for a lease's values, made once."""
    return Scrubber(values)


def _apart(values: Iterable[str]) -> set[str]:
    """Those long enough, without any that is another with little around it: `Bearer abc…` is found by its `abc…`."""
    known = {value for value in values if len(value) >= SHORTEST}
    return {value for value in known if not any(_is_around(value, other) for other in known if other != value)}


def _is_around(value: str, other: str) -> bool:
    before, inside, after = value.partition(other)
    return bool(inside) and max(len(before), len(after)) < SHORTEST
