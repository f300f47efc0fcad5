"""The must-deny canary, and the assertion over the configuration that a real Envoy runs: each hole that is cut is found."""

import asyncio
import copy
import json
import socketserver
import threading
from types import SimpleNamespace

import pytest
import stack
from host import WHY_NOT, Host

from broker.admin.client import fetch
from broker.canary import Canary
from broker.dataplane.assertion import unguarded
from broker.dataplane.compile import Written
from broker.dataplane.filters import EXT_PROC
from broker.dataplane.site import Namespace, Site
from broker.namespaces import Held
from broker.watch import Watch


def address(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


@pytest.fixture
def admin(world):
    return world.broker.state / "run" / "envoy-admin.sock"


@pytest.fixture
def dump(admin):
    status, body = fetch(admin, "GET", "/config_dump")
    assert status == 200
    return json.loads(body)


@pytest.fixture
def canary(world, admin):
    ready = world.broker.ready
    return Canary(Site(address(ready["proxy"]), address(ready["base_url"]), (), str(admin), ""))


def each(node, name):
    """Every value under this key, wherever."""
    if isinstance(node, dict):
        for key, part in node.items():
            if key == name:
                yield part
            yield from each(part, name)
    elif isinstance(node, list):
        for part in node:
            yield from each(part, name)


def typed(dump, kind):
    return next(found for found in each(dump, "typed_config") if found.get("@type", "").endswith(kind))


def filters(dump):
    return typed(dump, "HttpConnectionManager")["http_filters"]


def gate(dump):
    return next(found for found in filters(dump) if found["name"].endswith(".rbac"))["typed_config"]


def tool(dump):
    return next(found for found in each(dump, "cluster") if isinstance(found, dict) and found["name"].startswith("tool/"))


def route(dump, name):
    return next(found for routes in each(dump, "routes") for found in routes if found.get("name") == name)


def test_what_the_broker_made_of_envoy_has_no_hole(dump):
    assert unguarded(dump) == []


def allow_failure(dump):
    typed(dump, "ExternalProcessor")["failure_mode_allow"] = True


def without(name):
    def cut(dump):
        found = filters(dump)
        found[:] = [each for each in found if each["name"] != name]

    return cut


def gate_that_denies_nothing(dump):
    gate(dump)["rules"]["action"] = "LOG"


def no_rules(dump):
    del gate(dump)["rules"]


def another_filter(dump):
    filters(dump).insert(0, {"name": "envoy.filters.http.lua", "typed_config": {}})


def disabled_filter(dump):
    filters(dump)[-2]["disabled"] = True


def override(name, config, where="inner/plain"):
    return lambda dump: route(dump, where).setdefault("typed_per_filter_config", {}).update({name: config})


def tunnel_elsewhere(dump):
    # Envoy tells its routes in any order; a door without tunnels has one that refuses them.
    tunnels = (found for routes in each(dump, "routes") for found in routes if "connect_matcher" in found["match"])
    next(found for found in tunnels if "route" in found)["route"]["cluster"] = "tool/plain"


def door_past_the_processor(dump):
    chain(dump)["filters"] = [{"name": "tcp", "typed_config": {"@type": "x/envoy.TcpProxy", "cluster": "tool/plain"}}]


def unknown_door(dump):
    chain(dump)["filters"] = [{"name": "envoy.filters.network.echo"}]


def chain(dump):
    return next(found for chains in each(dump, "filter_chains") for found in chains)


def unchecked_addresses(dump):
    next(iter(tool(dump)["typed_extension_protocol_options"].values()))["http_filters"].pop(0)


def first_address_only(dump):
    tool(dump)["type"] = "LOGICAL_DNS"


@pytest.mark.parametrize(
    ("hole", "told"),
    [
        (allow_failure, "a filter lets requests pass when it fails"),
        (without(EXT_PROC), "not with the processor, the gate and the router"),
        (without("envoy.filters.http.rbac"), "not with the processor, the gate and the router"),
        (gate_that_denies_nothing, "its gate allows what nothing proves"),
        (no_rules, "its gate allows what nothing proves"),
        (another_filter, "envoy.filters.http.lua, which is not known here"),
        (disabled_filter, "disabled or optional"),
        (override(EXT_PROC, {"disabled": True}), f"it changes the filter {EXT_PROC}"),
        (override(EXT_PROC, {"overrides": {"processing_mode": {}}}), f"it changes the filter {EXT_PROC}"),
        (override("envoy.filters.http.rbac", {}), "it changes the filter envoy.filters.http.rbac"),
        (tunnel_elsewhere, "a tunnel leads to tool/plain past the processor"),
        (door_past_the_processor, "leads to tool/plain past the processor"),
        (unknown_door, "ends in envoy.filters.network.echo, which is not known here"),
        (unchecked_addresses, "connects to addresses that nobody checked"),
        (first_address_only, "of which only the first address is checked"),
        (lambda dump: dump.update(configs=[]), "Envoy has no doors"),
    ],
)
def test_each_hole_is_found(dump, hole, told):
    holed = copy.deepcopy(dump)
    hole(holed)
    assert any(told in problem for problem in unguarded(holed)), unguarded(holed)


def tried(world):
    return [each["host"] for each in world.broker.records(canary=True) if "must-deny" in (each.get("host") or "")]


def test_the_canary_is_refused_at_every_door_and_is_in_the_record(world, canary):
    before = len(tried(world))
    assert asyncio.run(canary.doors()) == ""
    assert tried(world)[before:] == ["must-deny.invalid:443", "must-deny.invalid", "must-deny.invalid"]
    assert asyncio.run(canary.configuration()) == ""
    assert not any(upstream.seen for upstream in world.upstreams)


def test_a_door_that_lets_it_pass_is_told(world, canary):
    # A plain server that answers everybody.
    canary._site = Site(canary._site.proxy, ("127.0.0.1", world.plain.port), (), canary._site.admin_socket, "")
    assert asyncio.run(canary.doors()) == "the base-url door answers 200 to what nobody may do"


# Namespaces: a host stands for one, with doors that are played.

FORBIDDEN, PASSED = b"HTTP/1.1 403 Forbidden\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"
SHUT = {1001: FORBIDDEN, 80: FORBIDDEN, 443: b""}


@pytest.fixture
def inside(tmp_path):
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    host = Host(tmp_path)
    with open(f"/proc/{host.pid}/ns/net") as namespace:  # noqa: PTH123 - its descriptor is needed
        held = Held(Namespace("1", "coder", ""), 1, namespace.fileno(), -1, Written((), (), ()))
        yield SimpleNamespace(host=host, held=held, answers=dict(SHUT), asked={})
    host.close()


def open_doors(inside):
    """Listen at the ports of its doors, and answer as `answers` says by then; what came to each is in `asked`."""

    class Door(socketserver.BaseRequestHandler):
        def handle(self):
            port = self.server.server_address[1]
            inside.asked.setdefault(port, []).append(self.request.recv(4096))
            self.request.sendall(inside.answers[port])

    for port in SHUT:
        server = inside.host.inside(lambda port=port: socketserver.TCPServer(("127.0.0.1", port), Door))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server


@pytest.mark.parametrize(
    ("port", "answer", "told"),
    [
        (1001, PASSED, "answers 200"),
        (80, PASSED, "answers 200"),
        (80, b"SSH-2.0-x\r\n", "answers without a status"),
        (443, b"\x16\x03\x03", "answers without a status"),
        (443, PASSED, "answers 200"),
    ],
)
def test_a_door_inside_a_namespace_that_lets_it_pass_is_told_until_it_is_shut(canary, inside, port, answer, told):
    servers, given = [*open_doors(inside)], []
    canary._in_turn = lambda: given.append(inside.held) or given[-1]
    try:
        inside.answers[port] = answer
        said = f"port {port} of a namespace of coder's {told} to what nobody may do"
        assert asyncio.run(canary.doors()) == said
        assert asyncio.run(canary.doors()) == said
        assert len(given) == 1, "another was tried before this one was shut"
        inside.answers |= SHUT
        assert [asyncio.run(canary.doors()) for _ in range(2)] == ["", ""]
        assert len(given) == 2
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
    lines = [each.split(b" HTTP/1.1")[0] for each in inside.asked[1001]]
    assert {b"CONNECT must-deny.invalid:443", b"GET http://must-deny.invalid/"} >= set(lines)
    if port != 1001:
        assert b"\r\nhost: must-deny.invalid\r\n" in inside.asked[80][-1]
        assert b"must-deny.invalid" in inside.asked[443][-1]


def test_an_agent_that_holds_all_connections_it_may_gives_no_alarm(canary, inside):
    servers = [*open_doors(inside)]
    canary._in_turn = lambda: inside.held
    inside.answers |= {1001: b"", 80: b""}
    try:
        assert asyncio.run(canary.doors()) == ""
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def test_a_namespace_whose_doors_are_gone_is_told_unless_it_has_ended(canary, inside):
    canary._in_turn = lambda: inside.held
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(canary.doors())
    inside.held.ended = True
    assert asyncio.run(canary.doors()) == ""


@pytest.mark.parametrize("shut", ["a door", "Envoy's own account"])
def test_what_can_not_be_tried_is_told_once_and_again_when_it_can(canary, shut):
    told, whole = [], canary._site
    watch = Watch("the canary", canary.test, told.append, every_s=0.01)
    away = ("127.0.0.1", stack.free_port())
    door = Site(away, whole.base_url, (), whole.admin_socket, "")
    canary._site = door if shut == "a door" else Site(whole.proxy, whole.base_url, (), "/nowhere", "")

    async def play():
        running = asyncio.create_task(watch.run())
        while len(told) < 2:
            if told:
                canary._site = whole
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(asyncio.wait_for(play(), 20))
    why = "ConnectionRefusedError" if shut == "a door" else "FileNotFoundError"
    assert told == [f"it could not be made ({why})", ""]
