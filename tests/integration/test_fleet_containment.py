"""Several brokers on one Redis: a revocation at one is everywhere within two seconds, and stays, whatever becomes of Redis."""

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace

import httpx
import pytest
import stack
from redis_server import RedisServer
from streams import Events, Listener, base_url_stream

pytestmark = pytest.mark.envoy

LOOPBACK = {"addresses": ["127.0.0.0/8", "::1/128"]}
OPERATIONS = {
    "items.list": {"match": {"method": "GET", "path": "/items/{+rest}"}, "effect": "read"},
    "items.create": {"match": {"method": "POST", "path": "/items"}, "effect": "write"},
}
GRANTED = {"operations": {"items.list": {}, "items.create": {"approval": {"approvers": 2}}}}
NAMES = ("rogue", "other", "flushed", "cut-off", "asking")
CUT_S = 2.0


def verb(broker, *words):
    command = [*stack.BROKER, *map(str, words), "--state", str(broker.state)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def fleet():
    redis, folder, ca = RedisServer(), stack.short_folder(), stack.TestCA()
    events, secure, plain = Events(), Events(ca.issue(folder / "certs", "localhost")), stack.Upstream()
    manifests = folder / "manifests"
    stack.write_manifests(
        manifests,
        stack.tool("events", f"http://127.0.0.1:{events.port}", OPERATIONS, upstream=LOOPBACK),
        stack.tool("secure", f"https://localhost:{secure.port}", OPERATIONS, upstream={"ca": "ca.pem", **LOOPBACK}),
        stack.tool("plain", f"http://127.0.0.1:{plain.port}", OPERATIONS, upstream=LOOPBACK),
        *(stack.agent(name, dict.fromkeys(("events", "secure", "plain"), GRANTED)) for name in NAMES),
    )
    (manifests / "ca.pem").write_text(ca.pem)
    brokers = [stack.Broker(manifests, folder / f"s{n}", {"BROKER_REDIS_URL": redis.url}) for n in range(3)]
    yield SimpleNamespace(redis=redis, brokers=brokers, events=events, secure=secure, plain=plain)
    for broker in brokers:
        broker.stop()
    for server in (events, secure, plain, redis):
        server.close()
    shutil.rmtree(folder)


def ready(broker):
    return httpx.get(f"{broker.admin}/readyz").status_code == 200


def code(broker, agent, path="/plain/items/x"):
    with broker.direct(agent) as client:
        answer = client.get(path)
    return answer.json().get("code", "ok") if answer.status_code != 200 else "ok"


def idle_tunnel(held, fleet, broker, agent):
    connection, answer = held.enter_context(stack.tunnel(broker, f"localhost:{fleet.secure.port}", agent))
    assert answer.startswith(b"HTTP/1.1 200"), answer
    return Listener(connection, b"")


def test_a_hundred_open_streams_and_tunnels_on_three_brokers_are_cut_within_two_seconds_and_no_call_passes_after(fleet):
    for broker in fleet.brokers:
        for name in ("rogue", "other"):
            broker.token(name)
    with ExitStack() as held:
        rogue, other = [], []
        for number in range(100):
            broker, path = fleet.brokers[number % 3], "/events/items/" + ("busy" if number % 2 else "idle")
            rogue.append(base_url_stream(broker, "rogue", path, f"r{number % 7}"))
        for number in range(15):
            rogue.append(idle_tunnel(held, fleet, fleet.brokers[number % 3], "rogue"))
            other.append(base_url_stream(fleet.brokers[number % 3], "other", "/events/items/idle"))
        for each in (*rogue, *other):
            held.callback(each.close)
        for each in (*rogue[:100], *other):
            assert each.began.wait(20)
            assert each.answer.startswith(b"HTTP/1.1 200"), each.answer[:300]
        keep_alive = [held.enter_context(broker.direct("rogue")) for broker in fleet.brokers]
        assert [client.get("/plain/items/x").status_code for client in keep_alive] == [200, 200, 200]

        operator = verb(fleet.brokers[0], "token", "ann", "--operator").strip()
        began = time.monotonic()
        httpx.post(
            f"{fleet.brokers[0].admin}/agents/rogue/revoke",
            json={"reason": "it lies"},
            headers={"authorization": f"Bearer {operator}"},
        ).raise_for_status()
        for each in rogue:
            assert each.ended.wait(max(0.0, began + 10 - time.monotonic()))
        took = sorted(each.ended_at - began for each in rogue)
        assert took[-1] <= CUT_S, took
        fleet.plain.seen.clear()
        assert [client.get("/plain/items/x").json()["code"] for client in keep_alive] == ["agent_revoked"] * 3
        assert fleet.plain.seen == []
        assert not any(each.ended.is_set() for each in other)
    for broker in fleet.brokers:
        [record] = [r for r in broker.records() if r["event"] == "revocation"]
        assert record["notice"]["reason"] == "it lies"


def test_a_revocation_survives_an_emptied_redis_and_a_broker_that_was_away_meanwhile(fleet):
    first, second, third = fleet.brokers
    os.kill(third.process.pid, signal.SIGKILL)
    third.stop()
    verb(first, "agents", "revoke", "flushed", "--reason", "before the flush")
    stack.until(lambda: code(second, "flushed") == "agent_revoked", CUT_S)
    fleet.redis.restart()
    third.start()
    for broker in fleet.brokers:
        stack.until(lambda broker=broker: ready(broker), 20)
        assert code(broker, "flushed") == "agent_revoked"
    # Now the one that revoked it is away and forgets: the others know, and tell it.
    verb(second, "agents", "release", "flushed", "--reason", "mended")
    for broker in fleet.brokers:
        stack.until(lambda broker=broker: code(broker, "flushed") != "agent_revoked", 5)
    os.kill(first.process.pid, signal.SIGKILL)
    first.stop()
    fleet.redis.restart()
    first.start()
    stack.until(lambda: ready(first), 20)
    assert code(first, "flushed") != "agent_revoked"


def test_what_a_broker_misses_while_redis_is_away_from_it_holds_before_it_serves_again(fleet):
    first, second, _ = fleet.brokers
    stack.until(lambda: ready(second), 20)
    os.kill(second.child("processor"), signal.SIGSTOP)  # it neither hears nor serves
    try:
        verb(first, "agents", "revoke", "cut-off", "--reason", "meanwhile")
    finally:
        os.kill(second.child("processor"), signal.SIGCONT)
    assert code(first, "cut-off") == "agent_revoked"
    seen = {code(second, "cut-off") for _ in range(50) if time.sleep(0.02) is None}
    assert "ok" not in {code(second, "cut-off") for _ in range(10)}, seen


def test_a_call_asked_about_at_one_broker_is_approved_at_others_and_passes_once_at_any(fleet):
    first, second, third = fleet.brokers
    for broker in fleet.brokers:
        stack.until(lambda broker=broker: ready(broker), 20)
        broker._tokens.clear()
        broker.token("asking")

    def post(broker):
        with broker.direct("asking") as client:
            return client.post("/plain/items", content=b'{"a": 1}', headers={"content-type": "application/json", "x-run-id": "r"})

    def listed(broker):
        return {each["id"]: each for each in json.loads(verb(broker, "approvals", "list", "--all", "--json"))["approvals"]}

    approval = post(first).json()["approval"]["id"]
    for broker in (second, third):
        stack.until(lambda broker=broker: approval in listed(broker), 5)
    assert listed(third)[approval]["body"] == '{"a": 1}'
    verb(second, "approvals", "approve", approval, "--as", "ann")
    stack.until(lambda: listed(third)[approval]["approved_by"] == ["ann"], 5)
    verb(third, "approvals", "approve", approval, "--as", "bob")
    for broker in fleet.brokers:
        stack.until(lambda broker=broker: listed(broker)[approval]["status"] == "approved", 5)
    fleet.plain.seen.clear()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda number: post(fleet.brokers[number % 3]).status_code, range(50)))
    assert answers.count(200) == len(fleet.plain.seen) == 1
