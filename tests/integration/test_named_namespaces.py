"""`identity.namespace`: a namespace that others made, and that the broker finds by its name."""

import os
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import stack
from conftest import LOOPBACK, OPERATIONS
from host import WHY_NOT, Host, inside

pytestmark = [pytest.mark.envoy, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

API = "api.tool.test"
GRANTED = {"api": {"operations": {"items.list": {}}}}
# What docs/run.md says that such a namespace needs.
PREPARED = ("link set lo up", "route add local default dev lo table local", "route add default dev lo")


@pytest.fixture(scope="module")
def place():
    folder, ca = stack.short_folder(), stack.TestCA()
    host = Host(folder, API)
    certificate = ca.issue(folder / "certs", API)
    upstream = host.inside(lambda: stack.Upstream(certificate, port=443))
    manifests = stack.write_manifests(
        folder / "manifests",
        stack.tool("api", f"https://{API}", OPERATIONS, upstream={"ca": "ca.pem", **LOOPBACK}),
        agent("tenant"),
        agent("host", "own"),
    )
    (manifests / "ca.pem").write_text(ca.pem)
    host.run("mount", "--make-private", "-t", "tmpfs", "tmpfs", "/run/netns")
    broker = stack.Broker(manifests, folder / "state", within=host.within)
    yield Place(host, broker, upstream)
    broker.stop()
    upstream.close()
    host.close()
    shutil.rmtree(folder)


def agent(name, namespace="tenant-1"):
    return stack.agent(name, GRANTED, identity={"namespace": namespace})


class Place:
    def __init__(self, host, broker, upstream):
        self.host, self.broker, self.upstream = host, broker, upstream

    def make(self, name):
        self.ip("netns", "add", name)
        for line in PREPARED:
            self.ip("-n", name, *line.split())

    def ip(self, *words):
        assert self.host.run("ip", *words).returncode == 0

    def curl(self, *words, name="tenant-1"):
        within = ("nsenter", f"--net=/run/netns/{name}", "--", "env", "-i", f"PATH={os.environ['PATH']}")
        curl = ("curl", "-sS", "--max-time", "5", "--cacert", self.broker.ca, "--resolve", f"{API}:443:198.18.0.1", *words)
        return self.host.run(*within, *curl).stdout

    @contextmanager
    def tunnel(self):
        """Opened in the namespace; what is given sends one more call through it, for its status."""
        there = Path(f"/proc/{self.host.pid}/root/run/netns/tenant-1")
        with inside(there, lambda: socket.create_connection(("127.0.0.1", 1001), 5)) as door:
            head = f"CONNECT {API}:443 HTTP/1.1\r\nhost: {API}:443\r\n\r\n"
            assert stack.exchange_bytes(door, head.encode()).startswith(b"HTTP/1.1 200")
            with stack.tls(door, self.broker, API) as secure:
                get = f"GET /items HTTP/1.1\r\nhost: {API}\r\n\r\n".encode()
                yield lambda: int(stack.exchange_bytes(secure, get)[9:12])

    def served(self):
        return self.curl(f"https://{API}/items") == '{"path": "/items"}'

    def recorded(self, what):
        return [each for each in self.broker.records() if each["event"] == "config" and what in each["detail"]]


def test_whoever_is_in_it_is_the_agent_and_all_ends_with_the_name(place):
    assert place.curl(f"https://{API}/items") == ""
    place.make("tenant-1")
    stack.until(place.served, 10, "its doors are open")
    assert place.curl("--proxy", "http://127.0.0.1:1001", f"https://{API}/items") == '{"path": "/items"}'
    assert '"host_not_declared"' in place.curl("--proxy", "http://127.0.0.1:1001", "http://elsewhere.test/")
    assert {each["agent"]["name"] for each in place.broker.decisions(door="namespace")} == {"tenant"}
    [record] = place.recorded("namespace tenant-1")
    assert record["detail"] == "namespace tenant-1 is tenant's"

    place.ip("netns", "delete", "tenant-1")
    stack.until(lambda: not list((place.broker.state / "run").glob("namespace-*")), 10, "it is let go")
    place.make("tenant-1")
    stack.until(place.served, 10, "the one that has its name now has doors")

    with place.tunnel() as call:
        assert call() == 200
        stack.write_manifest(place.broker.manifests, agent("tenant", "elsewhere"))
        stack.write_manifest(place.broker.manifests, agent("heir"))
        stack.until(lambda: place.served() and place.broker.decisions()[-1]["agent"]["name"] == "heir", 10, "it is the other's")
        # What was opened as the former agent is nobody's now.
        assert call() == 401
    assert place.broker.decisions()[-1]["detail"] == "the namespace tenant-1 is this agent's no longer"


def test_the_brokers_own_namespace_gets_no_doors_by_any_name(place):
    place.host.run("touch", "/run/netns/own")
    place.host.run("mount", "--bind", "/proc/self/ns/net", "/run/netns/own")
    refused = "namespace own of host's gets no doors: this is the broker's own network namespace"
    stack.until(lambda: place.recorded(refused), 10, "it is refused")
    assert len(place.recorded(refused)) == 1
