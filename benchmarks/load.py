"""The load: prebuilt bytes on keep-alive connections, one request under way on each, and nothing else.

Laws: as light as Python can be, since it shares the cores with what it measures: one thread, one epoll, no socket that blocks, no
parsing beyond "200 and ends as it must". Each answer is checked; the first one that is wrong ends the run. Runs as a process of
its own: a specification as JSON on stdin, one JSON object on stdout. Processor time is read at both ends of the same window.
"""

import gc
import json
import os
import select
import socket
import ssl
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

_TICKS = os.sysconf("SC_CLK_TCK")
_STUCK_S = 10.0
_RECEIVE = 65_536


@dataclass(frozen=True, slots=True)
class Load:
    """What to send where. Bytes travel as Latin-1 text. `pids` names the processes whose CPU time is read.

    `connect` opens a tunnel first; `tls_name` with `tls_ca` (a PEM file) speaks TLS then. An answer is whole when it ends in
    `ends`.
    """

    address: tuple[str, int]
    request: str
    ends: str
    connections: int
    seconds: float
    warm_s: float
    connect: str = ""
    tls_name: str = ""
    tls_ca: str = ""
    pids: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> bytes:
        """For a generator's stdin."""
        return json.dumps(asdict(self)).encode()


def run(load: Load) -> dict[str, Any]:
    """`{requests, seconds, latencies (sorted, seconds), cpu: {name: seconds}}` of the window after the warm-up."""
    request, ends = load.request.encode("latin-1"), load.ends.encode("latin-1")
    connections = {each.fileno(): each for each in (_opened(load) for _ in range(load.connections))}
    poll = select.epoll()
    for number in connections:
        poll.register(number, select.EPOLLIN)
    sent = dict.fromkeys(connections, 0.0)
    part = dict.fromkeys(connections, b"")
    latencies: list[float] = []
    begin = perf_counter() + load.warm_s
    end, cpu = begin + load.seconds, None
    for number, connection in connections.items():
        sent[number] = perf_counter()
        connection.send(request)
    while (now := perf_counter()) < end:
        if cpu is None and now >= begin:
            begin, end, cpu = now, now + load.seconds, _cpu(load.pids)
            latencies.clear()
        ready = poll.poll(_STUCK_S)
        if not ready:
            raise SystemExit(f"no answer within {_STUCK_S:.0f} s")
        for number, _ in ready:
            connection = connections[number]
            answer = part[number] + _received(connection)
            if not answer.endswith(ends):
                part[number] = answer
                _refuse_wrong(answer)
                continue
            _refuse_wrong(answer)
            now = perf_counter()
            latencies.append(now - sent[number])
            part[number], sent[number] = b"", now
            if connection.send(request) != len(request):
                raise SystemExit("a request did not fit into the socket's buffer")
    before = cpu or {}
    spent = {name: after - before[name] for name, after in _cpu(load.pids).items()}
    elapsed = perf_counter() - begin
    return {"requests": len(latencies), "seconds": elapsed, "latencies": sorted(latencies), "cpu": spent}


def _refuse_wrong(answer: bytes) -> None:
    if answer and not answer.startswith(b"HTTP/1.1 200"[: len(answer)]):
        raise SystemExit(f"an answer is not 200: {answer[:600].decode('latin-1')}")


def _received(connection: socket.socket) -> bytes:
    try:
        data = connection.recv(_RECEIVE)
    except (ssl.SSLWantReadError, BlockingIOError):  # a session ticket, or half a TLS record
        return b""
    if not data:
        raise SystemExit("a connection was closed")
    if isinstance(connection, ssl.SSLSocket) and (more := connection.pending()):
        data += connection.recv(more)
    return data


def _opened(load: Load) -> socket.socket:
    connection = socket.create_connection(load.address, timeout=_STUCK_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if load.connect:
        connection.sendall(load.connect.encode("latin-1"))
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += connection.recv(1) or b"\r\n\r\n"
        _refuse_wrong(answer)
    if load.tls_name:
        context = ssl.create_default_context(cafile=load.tls_ca)
        connection = context.wrap_socket(connection, server_hostname=load.tls_name)
    connection.setblocking(False)  # noqa: FBT003 - the standard library's signature
    return connection


def _cpu(pids: dict[str, int]) -> dict[str, float]:
    """User and system time of whole processes, in seconds (proc_pid_stat(5), fields 14 and 15)."""
    found = {}
    for name, pid in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[name] = (int(fields[11]) + int(fields[12])) / _TICKS
    return found


if __name__ == "__main__":
    gc.disable()
    given = json.load(sys.stdin)
    json.dump(run(Load(**{**given, "address": tuple(given["address"])})), sys.stdout)
