"""The must-deny canary: what must not pass is tried through every door, for ever, and Envoy's own configuration is looked at.

Laws: what it asks for is nobody's and leads nowhere, so that no answer but a refusal is right. Whatever else comes, or nothing,
is a failure: readiness is red and people are told until it is refused again.
"""

import asyncio
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import orjson

from broker.admin.client import fetch
from broker.dataplane.assertion import unguarded
from broker.dataplane.site import Site

_DOORS_EVERY = 5  # looks at the configuration: each try at a door stands in the record, in the way of whoever reads it
_TIMEOUT_S = 5.0
_HOST = "must-deny.invalid"  # RFC 6761 section 6.4: resolves nowhere
_RUN = "must-deny-canary"  # by which the record's readers know its calls
_REFUSED = (401, 403, 407)


class Canary:
    """Looks at the configuration at each test, and at every fifth, or while one was open, tries the doors too."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._number = count(1)
        self._open = ""

    async def test(self) -> str:
        """What is wrong, empty for nothing."""
        if next(self._number) % _DOORS_EVERY == 0 or self._open:
            self._open = "a door could not be tried"
            self._open = await self.doors()
        return self._open or await self.configuration()

    async def doors(self) -> str:
        """Try each door; what is wrong, empty for nothing."""
        for door, address, request in self._requests():
            status = await _status(address, request)
            if status not in _REFUSED:
                return f"the {door} door answers {status or 'nothing'} to what nobody may do"
        return ""

    async def configuration(self) -> str:
        """Look at what Envoy runs; what is wrong, empty for nothing."""
        status, dump = await asyncio.to_thread(fetch, Path(self._site.admin_socket), "GET", "/config_dump")
        problems = unguarded(orjson.loads(dump)) if status == 200 else [f"Envoy does not show its configuration ({status})"]  # noqa: PLR2004
        return "; ".join(problems[:3])

    def _requests(self) -> Iterator[tuple[str, tuple[str, int], str]]:
        rest = f"HTTP/1.1\r\nhost: {_HOST}:443\r\nx-run-id: {_RUN}\r\nconnection: close\r\n\r\n"
        proxy, base_url = self._site.reached
        yield "proxy (CONNECT)", proxy, f"CONNECT {_HOST}:443 {rest}"
        yield "proxy", proxy, f"GET http://{_HOST}/ {rest.replace(':443', '')}"
        yield "base-url", base_url, f"GET /{_HOST}/ {rest}"


async def _status(address: tuple[str, int], request: str) -> int:
    """The status of the answer; 0 where none comes, which is an answer of a door that is shut."""
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(request.encode())
            line = await reader.readline()
        finally:
            writer.close()
    parts = line.split(b" ")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0
