"""Ways out, tried: what an agent could do that does not mean to be governed. `broker doctor` runs them where an agent would be.

Laws: what answers is what counts. Inside an agent's namespace every address is its own, so that to be connected says nothing: out
is what was answered by anybody but the broker. Nothing is sent but harmless bytes; each try ends within seconds.
"""

import http.client
import ipaddress
import os
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_PATIENCE_S = 1.0
_HELLO = b"broker doctor\n"
_METADATA = (
    "169.254.169.254", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "::ffff:169.254.169.254",
    "fd00:ec2::254", "169.254.170.2", "100.100.100.200", "metadata.google.internal",
)  # fmt: skip
_UNDECLARED = "must-deny.invalid"
_HEADER = 12  # bytes of a DNS message, RFC 1035 section 4.1.1
_DECISION = "x-broker-decision-id"
_PORTS = {"other port 22": 22, "other port 8443": 8443, "other port 6443": 6443}


@dataclass(frozen=True, slots=True)
class Around:
    """What there is to reach. `world` are addresses outside, `sink` the port at which a witness listens there, 0 for none.

    `loopback` are ports of the host's loopback; `paths` Unix sockets that must not be seen; `declared` is an HTTPS host that the
    agent may reach, empty for none; `proxy` is `(host, port)`, None for none; `ca` is the broker's CA.
    """

    world: tuple[str, ...] = ("1.1.1.1", "2606:4700:4700::1111")
    sink: int = 0
    loopback: tuple[int, ...] = ()
    paths: tuple[str, ...] = ()
    declared: str = ""
    proxy: tuple[str, int] | None = None
    ca: str = ""

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "Around":
        """From its JSON."""
        lists = {name: tuple(document[name]) for name in ("world", "loopback", "paths")}
        return cls(**{**document, **lists, "proxy": tuple(document["proxy"]) if document["proxy"] else None})


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a probe; `out` says that something got out, or that what must be hidden is there."""

    what: str
    out: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """One way out: its name, what is right, and the try."""

    name: str
    expected: str
    attempt: Callable[[], Seen] = field(repr=False)

    def run(self) -> Seen:
        """Try it. What can't even be tried did not get out."""
        try:
            return self.attempt()
        except TimeoutError:
            return Seen("no answer")
        except (OSError, ssl.SSLError, http.client.HTTPException, ValueError) as error:
            return Seen(getattr(error, "strerror", None) or type(error).__name__)


def probes(around: Around) -> Iterator[Probe]:
    """All of them, in the order in which they are shown."""
    for host in around.world:
        ports = {**({"the witness": around.sink} if around.sink else {}), **_PORTS}
        yield from (Probe(f"TCP to {name}, {host}", "nothing", _tcp(host, port)) for name, port in ports.items())
        yield Probe(f"HTTP to an undeclared host, {host}", "refused by the broker", _http(host, _UNDECLARED))
        yield Probe(f"HTTPS to an undeclared host, {host}", "no certificate", _tls(host, _UNDECLARED, around.ca))
        yield Probe(f"UDP 443 (QUIC), {host}", "nothing", _udp(host, 443))
        yield from (Probe(f"UDP to the witness, {host}", "nothing", _udp(host, port)) for port in (around.sink,) if port)
        yield Probe(f"DNS over UDP, {host}", "no address", _dns(host, tcp=False))
        yield Probe(f"DNS over TCP, {host}", "no address", _dns(host, tcp=True))
        yield Probe(f"h2c upgrade, {host}", "refused by the broker", _http(host, _UNDECLARED, upgrade="h2c"))
        yield Probe(f"WebSocket, {host}", "refused by the broker", _http(host, _UNDECLARED, upgrade="websocket"))
    yield from (Probe(f"metadata at {host}", "refused by the broker", _http(host, host)) for host in _METADATA)
    yield Probe("raw socket (ICMP)", "not permitted", lambda: _raw(socket.AF_INET, socket.IPPROTO_ICMP))
    yield Probe("raw socket (TCP)", "not permitted", lambda: _raw(socket.AF_INET, socket.IPPROTO_TCP))
    yield Probe("packet socket", "not permitted", lambda: _raw(socket.AF_PACKET, 0))
    yield from (Probe(f"the host's loopback, port {port}", "nothing", _tcp("127.0.0.1", port)) for port in around.loopback)
    yield from (Probe(f"socket {Path(path).name}", "hidden", _unix(path)) for path in around.paths)
    yield Probe("another network namespace", "hidden", _namespaces)
    if around.proxy:
        yield from _by_proxy(around, around.proxy)


def _by_proxy(around: Around, proxy: tuple[str, int]) -> Iterator[Probe]:
    for name, target in (("an undeclared host", _UNDECLARED), ("an address", around.world[0]), ("metadata", _METADATA[0])):
        yield Probe(f"CONNECT to {name}", "refused by the broker", _connect(proxy, target))
    yield Probe("HTTP by the proxy", "refused by the broker", _http(proxy[0], _UNDECLARED, port=proxy[1], absolute=True))
    if around.declared:
        expected = "refused by the broker"
        yield Probe("CONNECT to a declared host, then another Host", expected, _mismatch(proxy, around.declared, around.ca))


def _open(host: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=kind)[0]
    made = socket.socket(family, kind, protocol)
    made.settimeout(_PATIENCE_S)
    try:
        made.connect(address)
    except OSError:
        made.close()
        raise
    return made


def _tcp(host: str, port: int) -> Callable[[], Seen]:
    def attempt() -> Seen:
        with _open(host, port):
            return Seen("connected", out=True)

    return attempt


def _udp(host: str, port: int) -> Callable[[], Seen]:
    def attempt() -> Seen:
        with _open(host, port, socket.SOCK_DGRAM) as made:
            made.send(_HELLO)
            return Seen(f"answered: {made.recv(64)!r}", out=True)

    return attempt


def _http(host: str, name: str, *, port: int = 80, upgrade: str = "", absolute: bool = False) -> Callable[[], Seen]:
    def attempt() -> Seen:
        shown = f"[{name}]" if ":" in name else name
        target = f"http://{shown}/" if absolute else "/"
        more = f"connection: Upgrade\r\nupgrade: {upgrade}\r\n" if upgrade else "connection: close\r\n"
        with _open(host, port) as made:
            made.sendall(f"GET {target} HTTP/1.1\r\nhost: {shown}\r\n{more}\r\n".encode())
            return _judged(made)

    return attempt


def _judged(made: socket.socket) -> Seen:
    """Only a refusal that carries the broker's decision is its own; any server can answer 403, and call itself Envoy."""
    answer = http.client.HTTPResponse(made)
    answer.begin()
    ours = answer.getheader(_DECISION) is not None
    return Seen(
        f"HTTP {answer.status}{' of the broker' if ours else ''}", out=not ours or answer.status < http.client.BAD_REQUEST
    )


def _tls(host: str, name: str, ca: str) -> Callable[[], Seen]:
    def attempt() -> Seen:
        with _open(host, 443) as plain, _context(ca).wrap_socket(plain, server_hostname=name) as made:
            made.sendall(f"GET / HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n".encode())
            return _judged(made)

    return attempt


def _context(ca: str) -> ssl.SSLContext:
    """Trusts whatever answers: who that is, is the question. With `ca`, the broker's own, nothing else passes for it."""
    context = ssl.create_default_context(cadata=ca) if ca else ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def _dns(server: str, *, tcp: bool) -> Callable[[], Seen]:
    def attempt() -> Seen:
        # RFC 1035 section 4.1: one question, A, IN, recursion desired.
        question = b"".join(bytes([len(part)]) + part for part in b"example.com".split(b".")) + b"\0\0\1\0\1"
        query = struct.pack("!HHHHHH", 0x6272, 0x0100, 1, 0, 0, 0) + question
        with _open(server, 53, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as made:
            made.sendall((struct.pack("!H", len(query)) if tcp else b"") + query)
            return resolved(query, made.recv(512)[2 * tcp :])

    return attempt


def resolved(query: bytes, answer: bytes) -> Seen:
    """What a name server answered, if it is one: the same ID, and a response (RFC 1035 section 4.1.1)."""
    if not answer:
        return Seen("no answer")
    if len(answer) < _HEADER or answer[:2] != query[:2] or not answer[2] & 0x80:
        return Seen("an answer that is no DNS", out=True)
    code, answers = answer[3] & 0xF, struct.unpack("!H", answer[6:8])[0]
    return Seen(f"{answers} addresses, code {code}", out=answers > 0)


def _raw(family: int, protocol: int) -> Seen:
    with socket.socket(family, socket.SOCK_RAW, protocol):
        return Seen("made", out=True)


def _unix(path: str) -> Callable[[], Seen]:
    def attempt() -> Seen:
        with closing(socket.socket(socket.AF_UNIX)) as made:
            made.connect(path)
            return Seen("connected", out=True)

    return attempt


def _namespaces() -> Seen:
    own, others = os.stat("/proc/self/ns/net").st_ino, 0  # noqa: PTH116 - the file behind the link
    for path in (*Path("/proc").glob("[0-9]*/ns/net"), *Path("/run/netns").glob("*")):
        with suppress(OSError):
            others += path.stat().st_ino != own
    return Seen(f"{others} seen" if others else "none seen", out=others > 0)


def _connect(proxy: tuple[str, int], target: str) -> Callable[[], Seen]:
    def attempt() -> Seen:
        with _open(*proxy) as made:
            return _opened(made, target)

    return attempt


def _opened(made: socket.socket, target: str) -> Seen:
    shown = f"[{target}]" if ":" in target else target
    made.sendall(f"CONNECT {shown}:443 HTTP/1.1\r\nhost: {shown}:443\r\n\r\n".encode())
    return _judged(made)


def _mismatch(proxy: tuple[str, int], declared: str, ca: str) -> Callable[[], Seen]:
    def attempt() -> Seen:
        with _open(*proxy) as plain:
            if not (opened := _opened(plain, declared)).out:
                return Seen(f"no tunnel: {opened.what}")
            with _context(ca).wrap_socket(plain, server_hostname=declared) as made:
                made.sendall(f"GET / HTTP/1.1\r\nhost: {_UNDECLARED}\r\nconnection: close\r\n\r\n".encode())
                return _judged(made)

    return attempt


def proxy_of(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """The proxy that variables name."""
    parts = urlsplit(environment.get("HTTPS_PROXY") or environment.get("https_proxy") or "")
    return (parts.hostname, parts.port or 80) if parts.hostname else None


def is_public(address: str) -> bool:
    """Whether an address is one that others can be reached at."""
    return not ipaddress.ip_address(address).is_loopback
