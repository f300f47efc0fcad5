"""The must-deny canary: what must not pass is tried through every door, for ever, and Envoy's own configuration is looked at.

Laws: what it asks for is nobody's and leads nowhere, so that no answer but a refusal is right. Whatever else comes, or nothing,
is a failure: readiness is red and people are told until it is refused again. Of the namespaces one is tried at a time, from
inside: a hundred of them make no more records than one.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NamedTuple

import orjson

from broker.admin.client import fetch
from broker.dataplane.assertion import unguarded
from broker.dataplane.site import DOOR_PORT, Site
from broker.namespaces import Held
from broker.policy.denials import MUST_DENY

_DOORS_EVERY = 5  # looks at the configuration: each try at a door stands in the record, in the way of whoever reads it
_TIMEOUT_S = 5.0
_RUN = "must-deny-canary"  # by which the record's readers know its calls
_REFUSED = ("401", "403", "407")
_CLOSED = ("",)
_REFUSED_INSIDE = (*_REFUSED, *_CLOSED)  # an agent that holds as many connections as it may leaves none for the canary


class _Try(NamedTuple):
    """What is sent to a door, and which answers refuse it. `made` is the socket, where not any will do."""

    door: str
    address: tuple[str, int]
    sent: bytes
    refused: tuple[str, ...] = _REFUSED
    made: Callable[[], socket.socket] | None = None


class Canary:
    """Looks at the configuration at each test, and at every fifth, or while one was open, tries the doors too.

    `in_turn` gives a namespace, each time another, or None where there are none.
    """

    def __init__(self, site: Site, in_turn: Callable[[], Held | None] = lambda: None) -> None:
        self._site, self._in_turn = site, in_turn
        self._number = count(1)
        self._open = ""
        self._held: Held | None = None

    async def test(self) -> str:
        """What is wrong, empty for nothing."""
        if next(self._number) % _DOORS_EVERY == 0 or self._open:
            self._open = "a door could not be tried"
            self._open = await self.doors()
        return self._open or await self.configuration()

    async def doors(self) -> str:
        """Try each door, those of one namespace included; what is wrong, empty for nothing."""
        return await _passed(self._outside()) or await self._namespace()

    async def _namespace(self) -> str:
        # One that was open is tried until it is shut, or gone.
        held = self._held = self._held if self._held and not self._held.ended else self._in_turn()
        if held is None:
            return ""
        failure = ""
        try:
            failure = await _passed(_inside(held))
        except OSError:
            if not held.ended:
                raise
        if held.ended or not failure:
            self._held, failure = None, ""
        return failure

    async def configuration(self) -> str:
        """Look at what Envoy runs; what is wrong, empty for nothing."""
        status, dump = await asyncio.to_thread(fetch, Path(self._site.admin_socket), "GET", "/config_dump")
        problems = unguarded(orjson.loads(dump)) if status == 200 else [f"Envoy does not show its configuration ({status})"]  # noqa: PLR2004
        return "; ".join(problems[:3])

    def _outside(self) -> Iterator[_Try]:
        proxy, base_url = self._site.reached
        yield _Try("the proxy door (CONNECT)", proxy, _CONNECT)
        yield _Try("the proxy door", proxy, _ABSOLUTE)
        yield _Try("the base-url door", base_url, _request(f"GET /{MUST_DENY}/"))


def _request(line: str) -> bytes:
    host = f"{MUST_DENY}:443" if line.startswith("CONNECT") else MUST_DENY
    return f"{line} HTTP/1.1\r\nhost: {host}\r\nx-run-id: {_RUN}\r\nconnection: close\r\n\r\n".encode()


_CONNECT, _ABSOLUTE = _request(f"CONNECT {MUST_DENY}:443"), _request(f"GET http://{MUST_DENY}/")


def _inside(held: Held) -> Iterator[_Try]:
    doors = (
        (DOOR_PORT, _CONNECT, _REFUSED_INSIDE),
        (DOOR_PORT, _ABSOLUTE, _REFUSED_INSIDE),
        (80, _request("GET /"), _REFUSED_INSIDE),
        (443, _hello(), _CLOSED),
    )
    for port, sent, refused in doors:
        yield _Try(f"port {port} of a namespace of {held.namespace.agent}'s", ("127.0.0.1", port), sent, refused, held.socket)


def _hello() -> bytes:
    """The first message of TLS, to a host that has no certificate here."""
    sent = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), sent, server_hostname=MUST_DENY).do_handshake()
    return sent.read()


async def _passed(tries: Iterable[_Try]) -> str:
    """Try them; what is wrong, empty for nothing."""
    for each in tries:
        answer = await _answer(each)
        if answer not in each.refused:
            return f"{each.door} answers {answer or 'nothing'} to what nobody may do"
    return ""


async def _answer(tried: _Try) -> str:
    """The status of the answer, or that it has none; empty where no answer comes, which is one of a door that is shut."""
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await _opened(tried)
        try:
            writer.write(tried.sent)
            said = await reader.read(4096)
        except ConnectionResetError:
            said = b""
        finally:
            writer.close()
    return said[9:12].decode("latin-1") if said.startswith(b"HTTP/1.") else "without a status" if said else ""


async def _opened(tried: _Try) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if tried.made is None:
        return await asyncio.open_connection(*tried.address)
    made = tried.made()
    try:
        await asyncio.get_running_loop().sock_connect(made, tried.address)
        return await asyncio.open_connection(sock=made)
    except BaseException:
        made.close()
        raise
