"""Whoever opens connections without end takes none from those who have one: Envoy keeps descriptors for what these need."""

import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import stack
from conftest import OPERATIONS

pytestmark = pytest.mark.envoy

DESCRIPTORS, CONNECTIONS = 400, 600  # what the broker's processes may have open, and what is opened


@pytest.fixture
def place() -> Iterator[SimpleNamespace]:
    folder = stack.short_folder()
    upstreams = [stack.Upstream() for _ in range(2)]
    granted = {f"tool-{number}": {"operations": {"items.list": {}}} for number in range(2)}
    addresses = {"addresses": ["127.0.0.0/8"]}
    stack.write_manifests(
        folder / "manifests",
        *(
            stack.tool(name, f"http://127.0.0.1:{upstream.port}", OPERATIONS, upstream=addresses)
            for name, upstream in zip(granted, upstreams, strict=True)
        ),
        stack.agent("caller", granted),
    )
    bounded = ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}", "--")
    broker = stack.Broker(folder / "manifests", folder / "state", within=bounded)
    yield SimpleNamespace(broker=broker, folder=folder)
    broker.stop()
    for each in upstreams:
        each.close()
    shutil.rmtree(folder)


def _call(place: SimpleNamespace, client: httpx.Client, tool: int) -> int:
    url = f"{place.broker.base_url}/tool-{tool}/items"
    return client.get(url, headers={"x-broker-token": place.broker.token("caller")}).status_code


def test_a_flood_of_connections_leaves_descriptors_to_the_calls_of_others(place):
    envoy = Path(f"/proc/{place.broker.child('envoy')}")
    with httpx.Client() as client, ExitStack() as held:
        assert _call(place, client, 0) == 200
        for _ in range(CONNECTIONS):
            held.enter_context(socket.create_connection(place.broker.proxy))
        # On the connection that was open before; the tool that nobody had called is connected to only now.
        assert [_call(place, client, tool) for tool in range(2)] == [200, 200]
        assert len(list((envoy / "fd").iterdir())) < DESCRIPTORS
    with httpx.Client() as client:
        stack.until(lambda: _call(place, client, 0) == 200, 10, "served once the flood is over")
