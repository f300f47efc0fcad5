"""An upstream that gives back every request header: in bodies, error pages, headers, redirects and events, in each encoding.

`/body/ENCODING`, `/error/ENCODING`, `/headers/ENCODING`, `/redirect/ENCODING` and, for `app` alone, `/events/ENCODING`: one event
per place at which the authorization header can be cut in two. ENCODING is a key of `ENCODINGS`, in a URL.

It writes with other code than the scrubber reads: what both would get wrong in the same way, no test could see.
"""

import asyncio
import base64
import html
import json
import xml.sax.saxutils
from collections.abc import Callable, Iterable, Iterator
from urllib.parse import quote, quote_plus, unquote, urlencode

import orjson
from stack import Seen

Written = tuple[bytes, bytes, bytes]
"""What stands before, the part that nothing but the value decides, what stands behind."""


def _plainly(write: Callable[[str], str | bytes]) -> Callable[[str], Written]:
    def written(value: str) -> Written:
        text = write(value)
        return b"", text if isinstance(text, bytes) else text.encode(), b""

    return written


def _in_base64(before: int, after: int, further: Callable[[str], str] = str, *, url: bool = False) -> Callable[[str], Written]:
    """As part of a longer base64 text. What no surrounding changes is the value's own."""
    encode = base64.urlsafe_b64encode if url else base64.b64encode

    def written(value: str) -> Written:
        octets = value.encode()
        one, other = (encode(fill * before + octets + fill * 3).decode() for fill in (b"\x00", b"\xff"))
        own = [place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] == pair[1] != "="]
        text = encode(b"x" * before + octets + b"z" * after).decode()
        cut = (text[: own[0]], text[own[0] : own[-1] + 1], text[own[-1] + 1 :])
        return tuple(further(part).encode() for part in cut)  # type: ignore[return-value]

    return written


def _dumped(value: str) -> str:
    return json.dumps(value)[1:-1]


def _go(value: str) -> str:
    text = orjson.dumps(value).decode()[1:-1]
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _dotnet(value: str) -> str:
    return "".join(f"\\u{ord(each):04X}" if each in "\"&'+<>`" or not each.isascii() else _dumped(each) for each in value)


def _slashed(value: str) -> str:
    return _dumped(value).replace("/", "\\/")


def _every_octet(value: str) -> str:
    return "".join(f"%{octet:02X}" for octet in value.encode())


def _component(value: str) -> str:
    return quote(value, "!'()*")


ENCODINGS: dict[str, Callable[[str], Written]] = {
    "plain": _plainly(str),
    "in a URL": _plainly(lambda value: quote(value, "")),
    "in a URL, in lower case": _plainly(lambda value: "".join(_lower(each) for each in value)),
    "in a path": _plainly(quote),
    "in a form": _plainly(lambda value: urlencode({"": value})[1:]),
    "in a URL by JavaScript": _plainly(_component),
    "in a URL, every octet": _plainly(_every_octet),
    "in a URL, every octet, in lower case": _plainly(lambda value: _every_octet(value).lower()),
    "in JSON": _plainly(_dumped),
    "in JSON as UTF-8": _plainly(lambda value: orjson.dumps(value)[1:-1]),
    "in JSON in JSON": _plainly(lambda value: _dumped(_dumped(value))),
    "in JSON by Go": _plainly(_go),
    "in JSON by .NET": _plainly(_dotnet),
    "in JSON with slashes escaped": _plainly(_slashed),
    "in HTML": _plainly(html.escape),
    "in XML": _plainly(lambda value: xml.sax.saxutils.escape(value, {'"': "&quot;", "'": "&apos;"})),
    "in hex": _plainly(lambda value: value.encode().hex()),
    "in upper-case hex": _plainly(lambda value: value.encode().hex().upper()),
    **{f"in base64 behind {before} before {after}": _in_base64(before, after) for before in range(4) for after in range(3)},
    **{f"in base64url behind {before}": _in_base64(before, 2, url=True) for before in range(3)},
    **{f"in base64 behind {before}, in a form": _in_base64(before, 1, quote_plus) for before in range(3)},
    **{f"in base64 behind {before}, in JSON by PHP": _in_base64(before, 1, _slashed) for before in range(3)},
}


def _lower(character: str) -> str:
    text = quote(character, "")
    return text if text == character else text.lower()


def shown(text: bytes, value: str) -> list[str]:
    """The encodings in which `text` shows `value`."""
    return [name for name, written in ENCODINGS.items() if written(value)[1] in text]


def encoded(value: str, encoding: str) -> bytes:
    return b"".join(ENCODINGS[encoding](value))


def answer(seen: Seen) -> tuple[int, dict[str, str], bytes]:
    """For `stack.Upstream`."""
    _, form, encoding = unquote(seen.path).split("/", 2)
    page = b"\n".join(name.encode() + b": " + encoded(value, encoding) for name, value in seen.headers)
    match form:
        case "error":
            return 502, {"content-type": "text/html"}, b"<h1>Bad gateway</h1><pre>" + page + b"</pre>"
        case "headers":
            return 200, _reflected(seen.headers, encoding), b"{}"
        case "redirect":
            reflected = _reflected(seen.headers, encoding)
            return 302, {"location": "https://elsewhere.example/?back=" + "&".join(reflected.values())}, b""
        case _:
            return 200, {"content-type": "text/plain"}, page


def _reflected(headers: Iterable[tuple[str, str]], encoding: str) -> dict[str, str]:
    return {f"x-echo-{name.lower()}": encoded(value, encoding).decode("latin-1") for name, value in headers}


def events(value: str, encoding: str) -> Iterator[tuple[bytes, bytes]]:
    """An event with `value` for each place to cut it at, in two pieces."""
    text = encoded(value, encoding)
    for place in range(1, len(text)):
        yield b"event: echo\ndata: " + text[:place], text[place:] + b"\n\n"


async def app(scope: dict, receive: Callable, send: Callable) -> None:
    """For `e2e.serving.Served`."""
    headers = [(name.decode(), value.decode("latin-1")) for name, value in scope["headers"]]
    _, form, encoding = scope["path"].split("/", 2)
    streams = form == "events"
    status, fields, body = (200, {"content-type": "text/event-stream"}, b"") if streams else answer(
        Seen(scope["method"], quote(scope["path"]), tuple(headers), b"")
    )  # fmt: skip
    raw = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    for pieces in events(dict(headers).get("authorization", ""), encoding) if streams else ():
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)  # a write of its own
    await send({"type": "http.response.body", "body": body})
