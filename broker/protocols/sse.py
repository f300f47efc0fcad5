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
# A client drops a byte order mark that begins the stream, so behind one there may be a data line too.
_DATA_LINE = re.compile(rb"(?<![^\r\n])(?:\xef\xbb\xbf)?data(?:: ?([^\r\n]*+))?(\r\n|\n|\r|\Z)")


class Events:
    """An incremental splitter. The events it returns, joined, are the bytes it was fed."""

    def __init__(self) -> None:
        self._waiting = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes, each with its blank line. Raises `ResponseBlocked` when one grows too long."""
        scanned = max(0, len(self._waiting) - 4)  # the longest end, CRLF CRLF, may have been cut
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
    return b"\n".join(value for value, _ in _DATA_LINE.findall(event))


def with_data(event: bytes, data: bytes) -> bytes:
    """The event, which has data, with `data` (one line) in place of its first data line and without the others."""
    before, _, end, after = _DATA_LINE.split(event, maxsplit=1)
    return before + b"data: " + data + end + _DATA_LINE.sub(b"", after)
