"""Where a tool's name leads is judged after it was resolved, by Envoy, before it connects: with a name server of the test's own.

The witnesses listen at each address, in a network namespace in which they all are.
"""

import socket
import threading
from contextlib import suppress
from types import SimpleNamespace

import pytest
import stack
from conftest import OPERATIONS
from host import WHY_NOT, Host
from names import NameServer

pytestmark = [pytest.mark.envoy, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

PORT = 8099
PUBLIC = "11.0.0.1"  # as good as any that nobody has on this machine
REFUSED = {
    "private-10": "10.1.2.3",
    "private-172": "172.16.9.9",
    "private-192": "192.168.1.1",
    "loopback": "127.0.0.1",
    "loopback-far": "127.9.9.9",
    "link-local": "169.254.7.7",
    "metadata": "169.254.169.254",
    "azure": "168.63.129.16",
    "cgnat": "100.64.1.1",
    "this-host": "0.0.0.0",
    "benchmark": "198.18.0.9",
    "multicast": "224.0.0.1",
    "loopback-v6": "::1",
    "mapped": "::ffff:10.1.2.3",
    "nat64": "64:ff9b::a01:203",
    "sixtofour": "2002:a01:203::1",
    "teredo": "2001:0:a01:203::1",
    "unique-local": "fd00::9",
    "link-local-v6": "fe80::9",
    "site-local": "fec0::9",
    "documentation": "3fff::9",
    "segment-routing": "5f00::9",
    "metadata-v6": "fd00:ec2::254",
}


class Sink:
    """Answers every connection like a tool would, and counts them by the address that they came to."""

    def __init__(self) -> None:
        self.came: list[str] = []
        self._sockets = []
        for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            made = socket.socket(family, socket.SOCK_STREAM)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((address, PORT))
            made.listen()
            self._sockets.append(made)
            threading.Thread(target=self._serve, args=(made,), daemon=True).start()

    def _serve(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            self.came.append(connection.getsockname()[0])
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(ConnectionError):
            while connection.recv(65536):
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    def close(self) -> None:
        for each in self._sockets:
            each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture(scope="module")
def place():
    folder = stack.short_folder()
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    host = Host(folder)
    for address in (
        PUBLIC,
        *(each for each in REFUSED.values() if ":" not in each and each not in ("0.0.0.0", "127.0.0.1", "224.0.0.1")),
    ):
        host.run("ip", "address", "add", f"{address}/32", "dev", "lo")
    for address in (each for each in REFUSED.values() if ":" in each and each != "::1" and not each.startswith("::ffff")):
        host.run("ip", "-6", "address", "add", f"{address}/128", "dev", "lo", "nodad")

    def listening():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind(("127.0.0.1", 53))
        return NameServer(made)

    names, sink = host.inside(listening), host.inside(Sink)
    names.addresses = {f"{name}.test": (address,) for name, address in REFUSED.items()}
    names.addresses |= {
        "public.test": (PUBLIC,),
        "listed.test": ("10.1.2.3",),
        "rebinds.test": (PUBLIC,),
        "both.test": (PUBLIC, "10.1.2.3"),
    }
    tools = {name: {} for name in (*REFUSED, "public", "rebinds", "both")} | {
        "listed": {"upstream": {"addresses": ["10.1.2.0/24"]}}
    }
    manifests = stack.write_manifests(
        folder / "manifests",
        *(
            stack.tool(name, f"http://{name}.test:{PORT}", OPERATIONS, unsafe_plaintext=True, **spec)
            for name, spec in tools.items()
        ),
        stack.agent("coder", {name: {"operations": {"items.list": {}}} for name in tools}),
    )
    broker = stack.Broker(manifests, folder / "state", within=host.within)
    token = broker.token("coder")

    def call(tool):
        target = f"http://{broker.ready['base_url']}/{tool}/items"
        done = host.run("curl", "-sS", "-m", "20", "-w", "\n%{http_code}", "-H", f"x-broker-token: {token}", target)
        body, _, status = done.stdout.rpartition("\n")
        return int(status), body

    yield SimpleNamespace(call=call, names=names, sink=sink, broker=broker, host=host)
    broker.stop()
    names.close()
    sink.close()
    host.close()


@pytest.fixture(autouse=True)
def _fresh(place):
    place.sink.came.clear()


def resolved(place, tool):
    """The answer once Envoy knows the name's address; before, there is none to try."""
    return stack.until(lambda: (found := place.call(tool))[0] != 503 and found, 20, f"{tool} has no address")


def test_an_address_that_anybody_can_reach_is_connected_to(place):
    assert resolved(place, "public") == (200, "ok")
    assert place.sink.came == [PUBLIC]


def test_a_listed_range_may_be_private(place):
    assert resolved(place, "listed") == (200, "ok")
    assert place.sink.came == ["10.1.2.3"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_leads_inside_is_not_connected_to(place, name):
    status, body = resolved(place, name)
    assert (status, '"code": "upstream_untrusted"' in body) == (403, True), body
    assert place.sink.came == []


def test_a_name_with_an_address_inside_beside_one_outside_never_leads_inside(place):
    resolved(place, "both")
    found = {place.call("both")[0] for _ in range(10)}
    assert found <= {200, 403}
    assert set(place.sink.came) <= {PUBLIC}


def test_a_name_that_changes_its_address_to_one_inside_leads_nowhere_from_then_on(place):
    assert resolved(place, "rebinds") == (200, "ok")
    place.names.addresses["rebinds.test"] = ("127.0.0.1",)
    before = place.names.asked.count("rebinds.test")
    stack.until(lambda: place.names.asked.count("rebinds.test") > before, 30, "Envoy asked anew")
    place.sink.came.clear()
    status, _ = stack.until(lambda: (found := place.call("rebinds"))[0] == 403 and found, 20, "the new address is known")
    assert status == 403
    assert "127.0.0.1" not in place.sink.came


def test_nothing_is_looked_up_for_what_is_denied(place):
    token = place.broker.token("coder")
    proxy = f"http://coder:{token}@{place.broker.ready['proxy']}"
    for url in ("http://undeclared.test/", "https://undeclared.test/"):
        place.host.run("curl", "-sS", "-m", "10", "-x", proxy, url)
    place.host.run(
        "curl", "-sS", "-m", "10", "-H", f"x-broker-token: {token}", f"http://{place.broker.ready['base_url']}/undeclared.test/"
    )
    assert place.broker.decisions(code="host_not_declared")
    assert not [name for name in place.names.asked if "undeclared" in name]
