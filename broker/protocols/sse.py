"""Server-sent events (WHATWG HTML section 9.2), cut out of a byte stream without touching a byte.

Laws: what goes in comes out, in order, however it was chunked; only whole events come out, and at most `MAX_EVENT` bytes wait for
their end. A stream's unfinished last event comes out never: by section 9.2.6 no client may dispatch it.
"""

import re

from broker.protocols.base import ResponseBlocked

MAX_EVENT = 4 * 1024 * 1024
"""The longest event (or JSON answer) that is held to be read, in bytes. The official MCP client stops at 1 MiB by default."""

# Atomic: CRLF is one line end, never a CR and then an empty line.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE = re.compile(rb"([^\r\n]*+)(\r\n|\n|\r|\Z)")
_BOM = b"\xef\xbb\xbf"
_LONGEST_END = 4


class Events:
    """An incremental splitter. The events it returns, joined, are the bytes it was fed."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes, each with its blank line. Raises `ResponseBlocked` when one grows too long."""
        scanned = max(0, len(self._waiting) - _LONGEST_END)
        self._waiting += chunk
        events: list[bytes] = []
        start = 0
        while match := _BLANK_LINE.search(self._waiting, max(start, scanned)):
            events.append(bytes(self._waiting[start : match.end()]))
            start = match.end()
        del self._waiting[:start]
        if len(self._waiting) > MAX_EVENT or any(len(event) > MAX_EVENT for event in events):
            raise ResponseBlocked(f"an event is longer than {MAX_EVENT} bytes, so it can't be read before it is passed on")
        return events


def data_of(event: bytes) -> bytes:
    """The event's data: its `data` lines joined by line feeds. Empty for comments, priming events and keep-alives."""
    return b"\n".join(value for line, _ in _LINE.findall(event) if (value := _data(line)) is not None)


def with_data(event: bytes, data: bytes) -> bytes:
    """The event with `data` (one line) in place of its first data line and without the others; all else as it was."""
    lines: list[bytes] = []
    placed = False
    for line, end in _LINE.findall(event):
        if _data(line) is None:
            lines.append(line + end)
        elif not placed:
            lines.append(b"data: " + data + end)
            placed = True
    return b"".join(lines)


def _data(line: bytes) -> bytes | None:
    # A client drops a byte order mark that begins the stream, so behind one there may be a data line too.
    name, _, value = line.removeprefix(_BOM).partition(b":")
    return value.removeprefix(b" ") if name == b"data" else None
