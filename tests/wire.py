"""Attacks, byte by byte: what no well-behaved client sends, by every door, and the proof that it came to nothing."""

import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import stack

PROXY, TUNNEL, TLS, BASE_URL = "proxy", "tunnel", "tls", "base-url"
DOORS = (PROXY, TUNNEL, TLS, BASE_URL)
"""Absolute-form at the plain proxy; plain HTTP in a tunnel; HTTPS in a tunnel; the reverse proxy."""

Pairs = tuple[tuple[str, str | bytes], ...]
JSON: Pairs = (("content-type", "application/json"),)


@dataclass(frozen=True)
class Answer:
    """What came back; `raw` is empty where the connection was closed without a word."""

    raw: bytes
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def read(cls, raw: bytes) -> "Answer":
        if raw.startswith(b"HTTP/1.1 100"):
            return cls.read(raw.partition(b"\r\n\r\n")[2])
        head, _, body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        words = first.split(" ")
        if not first.startswith("HTTP/1.") or len(words) < 2:
            return cls(raw)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return cls(raw, int(words[1]), headers, body)

    @property
    def decision_id(self) -> str:
        return self.headers.get("x-broker-decision-id", "")


def place(world: SimpleNamespace, door: str) -> str:
    """The `host:port` of the tool that a door's requests are for."""
    return f"localhost:{world.secure.port}" if door == TLS else f"127.0.0.1:{world.plain.port}"


@contextmanager
def opened(world: SimpleNamespace, door: str, name: str = "writer", *, alpn: str = "http/1.1") -> Iterator[socket.socket]:
    """A connection on which the door's requests can be written."""
    if door in (PROXY, BASE_URL):
        address = world.broker.proxy if door == PROXY else stack._address(world.broker.ready["base_url"])
        with socket.create_connection(address, timeout=5) as connection:
            yield connection
        return
    with stack.tunnel(world.broker, place(world, door), name) as (connection, answer):
        assert answer.startswith(b"HTTP/1.1 200"), answer
        if door == TUNNEL:
            yield connection
            return
        with stack.tls(connection, world.broker, "localhost", alpn=[alpn]) as inside:
            yield inside


def head(  # noqa: PLR0913 - a request has as many parts
    world: SimpleNamespace,
    door: str,
    method: str,
    path: str,
    headers: Pairs = (),
    *,
    host: str | None = None,
    target: str | None = None,
    version: str = "HTTP/1.1",
    name: str = "writer",
) -> bytes:
    """A request's head. `host` is the Host header and, at the proxy, the authority; None is the right one, empty none at all."""
    right = place(world, door) if host is None else host
    if target is None:
        target = {PROXY: f"http://{right}{path}", BASE_URL: f"/plain{path}"}.get(door, path)
    lines: list[tuple[str, str | bytes]] = [("host", right)] if right or host is None else []
    if door == PROXY:
        lines.append(("proxy-authorization", stack.basic(name, world.broker.token(name))))
    if door == BASE_URL:
        lines.append(("x-broker-token", world.broker.token(name)))
    written = b"".join(_bytes(key) + b": " + _bytes(value) + b"\r\n" for key, value in (*lines, *headers))
    return f"{method} ".encode() + _bytes(target) + f" {version}\r\n".encode() + written + b"\r\n"


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1")


def send(  # noqa: PLR0913, PLR0917 - the same
    world: SimpleNamespace,
    door: str,
    method: str,
    path: str,
    headers: Pairs = (),
    body: bytes | None = None,
    *,
    chunked: bool = False,
    trailers: bytes = b"",
    **options: Any,
) -> Answer:
    """One request and its answer. A body gets its framing, unless `headers` bring some."""
    if body is not None and not any(key.lower() in ("content-length", "transfer-encoding") for key, _ in headers):
        framing = ("transfer-encoding", "chunked") if chunked else ("content-length", str(len(body)))
        headers = (*headers, framing)
    data = head(world, door, method, path, headers, **options) + (chunks(body, trailers) if chunked and body else body or b"")
    with opened(world, door) as connection:
        return Answer.read(stack.exchange_bytes(connection, data))


def chunks(body: bytes, trailers: bytes = b"", size: int = 16_384) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n" + trailers + b"\r\n"


def certificate(connection: socket.socket, sni: str | None) -> bytes | None:
    """The certificate that a handshake with this SNI is shown, or None where it is shown none at all."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    connection.settimeout(5)
    try:
        with context.wrap_socket(connection, server_hostname=sni) as inside:
            return inside.getpeercert(binary_form=True)
    except (ssl.SSLError, ConnectionError):
        return None


class Watch:
    """What the upstreams and the record held before an attack, to tell what it added."""

    def __init__(self, world: SimpleNamespace) -> None:
        self._world = world
        self._before = len(world.broker.records())
        self._connections = [upstream.connections for upstream in world.upstreams]
        for upstream in world.upstreams:
            upstream.seen.clear()

    @property
    def decisions(self) -> list[dict[str, Any]]:
        return [record for record in self._world.broker.records()[self._before :] if record["event"] == "decision"]

    def untouched(self) -> None:
        """No upstream was sent a request or even connected to."""
        assert [upstream.seen for upstream in self._world.upstreams] == [[] for _ in self._world.upstreams]
        assert [upstream.connections for upstream in self._world.upstreams] == self._connections
        assert [record for record in self.decisions if record["verdict"] != "deny"] == []

    def refused(self, code: str, answer: Answer | None = None, status: int | None = None) -> dict[str, Any]:
        """The one denial that the attack got, with this code; its ID is the answer's."""
        try:
            stack.until(lambda: self.decisions)
        except AssertionError:
            raise AssertionError(f"no decision was recorded; the answer was {answer and answer.raw[:600]!r}") from None
        self.untouched()
        [record] = self.decisions
        shown = answer.raw[:1500] if answer else b""
        assert (record["verdict"], record["code"]) == ("deny", code), (record, shown)
        if answer is not None and status is not None:
            assert answer.status == status, (record, shown)
        if answer is not None and answer.raw:
            assert answer.decision_id == record["decision_id"], (record, shown)
        assert b"Traceback" not in shown
        return record
