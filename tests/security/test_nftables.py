"""The rules of `broker render nftables`, loaded by a real nft in a network namespace, against real sockets.

Two namespaces joined by a veth pair: a host, on which an agent runs as a user of its own, and the world. What leaves is watched
on the wire (AF_PACKET), so that a packet of any protocol counts. Every probe gets out without the rules; else it would prove
nothing.
"""

import itertools
import json
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from broker.dataplane.nftables import ruleset
from tests.namespaces import ip, namespace, within
from tests.stack import until

ROOT = Path(__file__).parents[2]
AGENT, OTHER_AGENT, SOMEONE = 3001, 3002, 3003
DOORS = (("127.0.0.1", 15001), ("127.0.0.1", 15002), ("::1", 15001))
USERS = {"refund-bot": str(AGENT), "support-triage": str(OTHER_AGENT)}
HOST, WORLD, HOST6, WORLD6, METADATA = "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "169.254.169.254"
TCP, UDP, PING, RAW = "SOCK_STREAM", "SOCK_DGRAM", "SOCK_DGRAM", "SOCK_RAW"
SENTINEL = 9  # the discard port (RFC 863)
MPTCP = 262  # IPPROTO_MPTCP: the kernel makes the socket that really connects
_names = itertools.count()

# Becomes a user, in a user namespace of its own if asked to, and keeps CAP_NET_RAW alone if asked to. It does not start another
# program: a test's Python may lie where only root may read.
_PR_SET_KEEPCAPS, _CAP_NET_RAW, _CAPABILITY_VERSION_3, _CLONE_NEWUSER = 8, 13, 0x20080522, 0x10000000
BECOME = f"""
import ctypes, encodings.idna, json, os, socket, struct, sys
uid, raw, apart = json.loads(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def done(result):
    if result:
        raise OSError(ctypes.get_errno(), "this can't be tried")
done(libc.prctl({_PR_SET_KEEPCAPS}, raw, 0, 0, 0))
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
if raw:
    only = 1 << {_CAP_NET_RAW}
    done(libc.capset(struct.pack("Ii", {_CAPABILITY_VERSION_3}, 0), struct.pack("6I", only, only, 0, 0, 0, 0)))
if apart:
    done(libc.unshare({_CLONE_NEWUSER}))
"""
# The agent: one packet, from whatever socket is asked for. A connection that is under way is ended by the process's end.
PROBE = """
kind, proto, address, port = json.loads(sys.argv[2])
family = socket.AF_INET6 if ":" in address else socket.AF_INET
made = socket.socket(family, getattr(socket, kind), proto)
made.setblocking(False)
try:
    if kind == "SOCK_STREAM":
        made.connect((address, port))
    else:
        echo = struct.pack("!BBHHH", 128 if family == socket.AF_INET6 else 8, 0, 0, 1, 1)
        made.sendto(echo if proto else b"probe", (address, port))
except OSError:
    pass
"""


@dataclass
class Host:
    """The two namespaces. `seen` is what passed by on the host's loopback device, and on the world's end of the wire."""

    inside: str
    outside: str
    taps: dict[str, socket.socket] = field(default_factory=dict)
    listeners: list[socket.socket] = field(default_factory=list)

    def nft(self, text: str) -> subprocess.CompletedProcess[str]:
        command = ["ip", "netns", "exec", self.inside, "nft", "-f", "-"]
        return subprocess.run(command, input=text, capture_output=True, text=True, check=False)

    def counters(self) -> dict[str, int]:
        listed = subprocess.check_output(["ip", "netns", "exec", self.inside, "nft", "-j", "list", "counters"])
        return {
            each["counter"]["name"]: each["counter"]["packets"] for each in json.loads(listed)["nftables"] if "counter" in each
        }

    def as_user(self, uid: int, script: str, *arguments: str, raw: bool = False, apart: bool = False) -> list[str]:
        how = json.dumps([uid, raw, apart])
        return ["ip", "netns", "exec", self.inside, sys.executable, "-c", BECOME + script, how, *arguments]

    def probe(self, what: tuple[str, int, str, int], uid: int = AGENT, *, apart: bool = False) -> list[bytes]:
        """Send it, and give the packets that passed by between it and a packet of root's that nothing holds up."""
        inside = ip_address(what[2]).is_loopback or what[2] in (HOST, HOST6)
        self.drain()
        subprocess.run(self.as_user(uid, PROBE, json.dumps(what), raw=what[0] == RAW, apart=apart), check=True)
        mark = f"sentinel {next(_names)}".encode()
        with within(self.inside, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as sender:
            sender.sendto(mark, ("127.0.0.1" if inside else WORLD, SENTINEL))
        seen = []
        tap = self.taps["inside" if inside else "outside"]
        while True:
            packet = tap.recv(65536)
            if packet.endswith(mark):
                return seen
            seen.append(packet)

    def drain(self) -> None:
        for tap in self.taps.values():
            tap.settimeout(0)
            while _received(tap):
                pass
            tap.settimeout(10)

    def listen(self, namespace: str, address: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        made = within(namespace, lambda: socket.create_server((address, port), family=family))
        made.settimeout(10)
        self.listeners.append(made)
        return made


def _received(tap: socket.socket) -> bytes:
    try:
        return tap.recv(65536)
    except BlockingIOError:
        return b""


def _tap(device: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))  # ETH_P_ALL
    made.bind((device, 0x0003))
    return made


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with namespace("nft", "sysctl") as inside, namespace() as outside:
        made = _joined(Host(inside, outside))
        yield made
        for opened in (*made.taps.values(), *made.listeners):
            opened.close()


def _joined(made: Host) -> Host:
    ends = ((made.inside, (HOST, HOST6)), (made.outside, (WORLD, WORLD6)))
    ip("-n", made.inside, "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", made.outside)
    for number, (name, own) in enumerate(ends):
        ip("-n", name, "link", "set", "wire", "address", _mac(number), "up")
        for address in own:
            # Without duplicate address detection, which takes a second.
            ip("-n", name, "address", "add", f"{address}/{64 if ':' in address else 24}", "dev", "wire", *_nodad(address))
        for other in ends[1 - number][1]:
            # And nobody is asked for, so that a packet leaves at once or never.
            ip("-n", name, "neighbour", "add", other, "lladdr", _mac(1 - number), "dev", "wire")
            ip("-n", name, "route", "add", "default", "via", other)
    ip("-n", made.outside, "address", "add", f"{METADATA}/32", "dev", "lo")
    # An agent that may send pings without a capability, as on most distributions.
    ping = ["sysctl", "-q", "-w", "net.ipv4.ping_group_range=0 65535"]
    subprocess.run(["ip", "netns", "exec", made.inside, *ping], check=True, capture_output=True)
    made.taps = {"inside": within(made.inside, lambda: _tap("lo")), "outside": within(made.outside, lambda: _tap("wire"))}
    return made


def _mac(number: int) -> str:
    return f"02:00:00:00:00:0{number}"


def _nodad(address: str) -> list[str]:
    return ["nodad"] if ":" in address else []


@pytest.fixture(autouse=True)
def _open(host: Host) -> Iterator[None]:
    yield
    host.nft("flush ruleset")


def _is(packet: bytes, proto: int, address: str, port: int) -> bool:
    """Whether this is a packet of that protocol to that address (and port, where the protocol has ports)."""
    six = packet[0] >> 4 == 6
    found, to, rest = (packet[6], packet[24:40], packet[40:]) if six else (packet[9], packet[16:20], packet[20:])
    ports = proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
    return found == proto and to == ip_address(address).packed and (not ports or struct.unpack("!H", rest[2:4])[0] == port)


_ICMP, _ICMP6, _EXPERIMENT = socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6, 253  # RFC 3692

CLOSED = [
    pytest.param((TCP, 0, WORLD, 443), id="TCP to the world"),
    pytest.param((TCP, 0, WORLD6, 443), id="TCP to the world over IPv6"),
    pytest.param((TCP, MPTCP, WORLD, 443), id="TCP by several paths"),
    pytest.param((TCP, MPTCP, WORLD6, 443), id="TCP by several paths over IPv6"),
    pytest.param((TCP, 0, WORLD, 15001), id="the door's port on another machine"),
    pytest.param((TCP, 0, METADATA, 80), id="the cloud's metadata"),
    pytest.param((UDP, 0, WORLD, 443), id="QUIC"),
    pytest.param((UDP, 0, WORLD6, 443), id="QUIC over IPv6"),
    pytest.param((UDP, 0, WORLD, 53), id="DNS"),
    pytest.param((UDP, 0, WORLD6, 53), id="DNS over IPv6"),
    pytest.param((PING, _ICMP, WORLD, 0), id="a ping"),
    pytest.param((PING, _ICMP6, WORLD6, 0), id="a ping over IPv6"),
    pytest.param((RAW, _ICMP, WORLD, 0), id="a raw ICMP packet"),
    pytest.param((RAW, _EXPERIMENT, WORLD, 0), id="a raw packet of an unknown protocol"),
    pytest.param((RAW, _EXPERIMENT, WORLD6, 0), id="a raw packet of an unknown protocol over IPv6"),
    pytest.param((TCP, 0, "127.0.0.1", 6379), id="a service on loopback"),
    pytest.param((TCP, 0, "::1", 6379), id="a service on loopback over IPv6"),
    pytest.param((TCP, 0, "127.0.0.2", 15001), id="the door's port at another loopback address"),
    pytest.param((TCP, 0, "::1", 15002), id="a port that is a door only over IPv4"),
    pytest.param((UDP, 0, "127.0.0.1", 15001), id="the door's port over UDP"),
    pytest.param((UDP, 0, "127.0.0.53", 53), id="the host's own resolver"),
    pytest.param((TCP, 0, "127.0.0.1", 15003), id="the admin port"),
    pytest.param((TCP, 0, HOST, 22), id="the host at its own address"),
    pytest.param((TCP, 0, HOST6, 22), id="the host at its own IPv6 address"),
    pytest.param((TCP, 0, HOST, 15001), id="the door's port at an address that is no door"),
]


def _on_the_wire(what: tuple[str, int, str, int]) -> tuple[int, str, int]:
    kind, proto, address, port = what
    if kind == TCP:
        return socket.IPPROTO_TCP, address, port
    return proto or socket.IPPROTO_UDP, address, port


@pytest.mark.parametrize("what", CLOSED)
def test_what_is_no_door_is_dropped_and_counted(host, what):
    wire = _on_the_wire(what)
    assert any(_is(packet, *wire) for packet in host.probe(what)), "it does not get out without the rules either"
    assert host.nft(ruleset(USERS, DOORS)).returncode == 0
    assert not any(_is(packet, *wire) for packet in host.probe(what))
    counted = host.counters()
    assert counted["agent-refund-bot-dropped"] >= 1
    assert counted["agent-refund-bot-doors"] == counted["agent-support-triage-dropped"] == counted["closed-dropped"] == 0
    # Others on the host are left alone.
    assert any(_is(packet, *wire) for packet in host.probe(what, SOMEONE))
    assert host.counters() == counted


def test_an_agent_in_a_user_namespace_of_its_own_is_the_same_user(host):
    what = (TCP, 0, WORLD, 443)
    assert any(_is(packet, *_on_the_wire(what)) for packet in host.probe(what, apart=True))
    host.nft(ruleset(USERS, DOORS))
    assert not any(_is(packet, *_on_the_wire(what)) for packet in host.probe(what, apart=True))
    assert host.counters()["agent-refund-bot-dropped"] >= 1


@pytest.mark.parametrize(("address", "port"), DOORS)
def test_a_door_is_reached_and_answers(host, address, port):
    host.nft(ruleset(USERS, DOORS))
    door = host.listen(host.inside, address, port)
    script = (
        f"import socket; made = socket.create_connection(({address!r}, {port}), 10); made.sendall(b'hello'); print(made.recv(9))"
    )
    with subprocess.Popen(host.as_user(AGENT, script), stdout=subprocess.PIPE, text=True) as agent:
        opened, _ = door.accept()
        with opened:
            assert opened.recv(5) == b"hello"
            opened.sendall(b"welcome")
            assert agent.communicate()[0] == "b'welcome'\n"
    counted = host.counters()
    assert counted["agent-refund-bot-doors"] >= 3
    assert counted["agent-refund-bot-dropped"] == 0


def test_a_door_is_on_this_host_whatever_address_it_is_given(host):
    assert host.nft(ruleset(USERS, ((WORLD, 15001),))).returncode == 0
    packets = host.probe((TCP, 0, WORLD, 15001))
    assert not any(_is(packet, socket.IPPROTO_TCP, WORLD, 15001) for packet in packets)
    assert host.counters()["agent-refund-bot-dropped"] >= 1


def test_two_agents_do_not_reach_each_other(host):
    """Nor does anyone from outside reach an agent: its answer is dropped, so no connection comes about."""
    script = (
        "import socket; made = socket.create_server(('', 8000)); print('ready', flush=True); made.settimeout(30); made.accept()"
    )
    host.nft(ruleset(USERS, DOORS))
    with subprocess.Popen(host.as_user(OTHER_AGENT, script), stdout=subprocess.PIPE, text=True) as listening:
        assert listening.stdout.readline() == "ready\n"
        packets = host.probe((TCP, 0, "127.0.0.1", 8000))
        assert not any(_is(packet, socket.IPPROTO_TCP, "127.0.0.1", 8000) for packet in packets)
        with within(host.outside, lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as caller:
            caller.settimeout(0)
            assert caller.connect_ex((HOST, 8000))
            until(lambda: host.counters()["agent-support-triage-dropped"], why="the answer is dropped")
        assert listening.poll() is None
        listening.kill()


def test_a_connection_from_before_the_rules_carries_nothing_more(host):
    sink = host.listen(host.outside, WORLD, 8443)
    script = f"""
import socket
made = socket.create_connection(({WORLD!r}, 8443), 10)
print("open", flush=True)
input()
made.sendall(b"late")
print("sent", flush=True)
input()
"""
    command = host.as_user(AGENT, script)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout.readline() == "open\n"
        opened, _ = sink.accept()
        host.nft(ruleset(USERS, DOORS))
        host.drain()
        agent.stdin.write("\n")
        agent.stdin.flush()
        assert agent.stdout.readline() == "sent\n"
        until(lambda: host.counters()["agent-refund-bot-dropped"], why="what it sent is dropped")
        opened.settimeout(0)
        with pytest.raises(BlockingIOError):
            opened.recv(9)
        # Without its program the connection has no user any more, and the kernel sends again what was not answered.
        agent.kill()
        agent.wait()
        until(lambda: host.counters()["closed-dropped"], why="what is sent after the end is dropped")
        with pytest.raises(BlockingIOError):
            opened.recv(9)
        opened.close()


def test_rules_are_replaced_whole_or_not_at_all(host):
    host.nft(ruleset(USERS, DOORS))
    assert host.nft("table inet neighbour {\n counter kept { packets 7 bytes 7 }\n}\n").returncode == 0
    assert host.nft(ruleset({"support-triage": str(OTHER_AGENT)}, DOORS)).returncode == 0
    assert set(host.counters()) == {"agent-support-triage-doors", "agent-support-triage-dropped", "closed-dropped", "kept"}
    refused = host.nft(ruleset({"refund-bot": "nobody-of-this-name"}, DOORS))
    assert refused.returncode != 0
    assert "User does not exist" in refused.stderr
    assert set(host.counters()) == {"agent-support-triage-doors", "agent-support-triage-dropped", "closed-dropped", "kept"}


def test_without_agents_the_rules_load_and_judge_nobody(host):
    assert host.nft(ruleset({}, DOORS)).returncode == 0
    assert host.counters() == {"closed-dropped": 0}


def test_what_is_checked_in_loads_where_the_users_exist(host):
    text = (ROOT / "netpol" / "nftables.nft").read_text()
    for number, name in enumerate(("campaign-writer", "code-reviewer", "invoice-reconciler", "refund-bot", "support-triage")):
        assert f'"{name}" : goto' in text
        text = text.replace(f'"{name}" :', f"{AGENT + number} :")
    assert host.nft(text).returncode == 0
