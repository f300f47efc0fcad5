"""Several brokers, each with an Envoy of its own, on one Redis: one count, whatever becomes of Redis or of a broker."""

import os
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest
import stack
from redis_server import RedisServer

LOOPBACK = {"addresses": ["127.0.0.0/8"]}
OPERATIONS = {
    "items.list": {"match": {"method": "GET", "path": "/items"}, "effect": "read"},
    "items.create": {"match": {"method": "POST", "path": "/items"}, "effect": "write"},
}

pytestmark = pytest.mark.envoy


@pytest.fixture(scope="module")
def fleet():
    """Three brokers on one Redis; agents `caller-N` with 100 calls a day each, and one upstream that counts."""
    redis, folder, upstream = RedisServer(), stack.short_folder(), stack.Upstream()
    granted = {"plain": {"operations": {"items.list": {}, "items.create": {}}}}
    stack.write_manifests(
        folder / "manifests",
        stack.tool("plain", f"http://127.0.0.1:{upstream.port}", OPERATIONS, upstream=LOOPBACK),
        *(stack.agent(f"caller-{number}", granted, limits={"calls": "100/day", "concurrency": 300}) for number in range(6)),
        stack.platform(ledger={"unsafe_reads_without_redis": False}),
    )
    env = {"BROKER_REDIS_URL": redis.url}
    brokers = [stack.Broker(folder / "manifests", folder / f"s{number}", env) for number in range(3)]
    yield SimpleNamespace(redis=redis, folder=folder, upstream=upstream, brokers=brokers)
    for broker in brokers:
        broker.stop()
    upstream.close()
    redis.close()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def _fresh(fleet):
    fleet.upstream.seen.clear()


def call(fleet, agent, number, method="GET"):
    with fleet.brokers[number % 3].direct(agent) as client:
        return client.request(method, "/plain/items")


def answers(fleet, agent, count):
    for broker in fleet.brokers:
        broker.token(agent)
    with ThreadPoolExecutor(20) as pool:
        return list(pool.map(lambda number: call(fleet, agent, number), range(count)))


def spent(fleet, agent, rounds=10):
    """Call until there is nothing left to spend: on a busy machine an answer of Redis may take too long, and that is a denial."""
    found = Counter()
    for _ in range(rounds):
        some = codes(answers(fleet, agent, 60))
        found += some
        if set(some) == {"rate_limited"}:
            return found
        served(fleet, agent)
    raise AssertionError(f"not spent after {rounds} rounds: {found}")


def codes(found):
    return Counter("ok" if answer.status_code == 200 else answer.json()["code"] for answer in found)


def served(fleet, agent):
    """Wait until each broker serves again, without spending anything: what is denied for its limits is checked."""
    for number in range(3):
        stack.until(lambda number=number: ready(fleet.brokers[number]), 15, f"broker {number} serves {agent} again")


def ready(broker):
    return httpx.get(f"{broker.admin}/readyz").status_code == 200


def test_a_start_with_a_ledger_that_answers_ends_what_a_killed_broker_left_and_warns_of_nothing(fleet):
    assert all(map(ready, fleet.brokers))
    for broker in fleet.brokers:
        [told] = [each["detail"] for each in broker.records() if each["event"] == "alert"]
        assert told == "limits can be checked again"
        assert f"WARNING ledger: {told}" not in broker.log()


def test_two_hundred_parallel_calls_over_three_brokers_are_a_hundred_upstream(fleet):
    found = codes(answers(fleet, "caller-0", 200))
    assert found["ok"] + found["rate_limited"] + found["ledger_unavailable"] == 200
    assert found["ok"] + spent(fleet, "caller-0")["ok"] == len(fleet.upstream.seen) == 100


@pytest.mark.parametrize(
    ("agent", "lose"),
    [
        pytest.param("caller-1", lambda redis: redis.command("FLUSHALL"), id="emptied"),
        pytest.param("caller-2", lambda redis: redis.restart(), id="restarted empty"),
    ],
)
def test_what_redis_loses_is_put_back_and_nobody_needs_a_restart(fleet, agent, lose):
    before = codes(answers(fleet, agent, 60))["ok"]
    assert before > 30
    lose(fleet.redis)
    stack.until(lambda: not all(map(ready, fleet.brokers)), 5, "a broker notices")
    served(fleet, agent)
    assert before + spent(fleet, agent)["ok"] == len(fleet.upstream.seen) == 100


def test_while_redis_is_stopped_calls_are_denied_and_afterwards_they_pass(fleet):
    served(fleet, "caller-3")
    fleet.redis.freeze()
    try:
        found = answers(fleet, "caller-3", 30)
    finally:
        fleet.redis.thaw()
    assert codes(found) == {"ledger_unavailable": 30}
    assert {answer.status_code for answer in found} == {503}
    assert fleet.upstream.seen == []
    served(fleet, "caller-3")
    assert codes(answers(fleet, "caller-3", 30))["ok"] > 0
    alerts = [record["detail"] for record in fleet.brokers[0].records() if record["event"] == "alert"]
    assert [detail for detail in alerts if detail.startswith("limits can't be checked")]
    assert "limits can be checked again" in alerts


def test_a_processor_that_is_killed_gives_back_nothing_that_was_spent(fleet):
    agent = "caller-4"
    before = codes(answers(fleet, agent, 60))["ok"]
    assert before > 30
    for broker in fleet.brokers[:2]:
        os.kill(broker.child("processor"), signal.SIGKILL)
    for broker in fleet.brokers:
        stack.until(lambda broker=broker: again(broker), 20, "the processor is back")
    assert before + spent(fleet, agent)["ok"] == len(fleet.upstream.seen) == 100


def again(broker):
    try:
        with broker.direct("caller-5") as client:
            return ready(broker) and client.delete("/plain/items").status_code == 403
    except httpx.HTTPError:
        return False


def test_where_the_platform_says_so_reads_pass_while_redis_is_away_counted_recorded_and_alerted():
    redis, folder, upstream = RedisServer(), stack.short_folder(), stack.Upstream()
    granted = {"plain": {"operations": {"items.list": {}, "items.create": {}}}}
    stack.write_manifests(
        folder / "manifests",
        stack.tool("plain", f"http://127.0.0.1:{upstream.port}", OPERATIONS, upstream=LOOPBACK),
        stack.agent("reader", granted, limits={"calls": "4/day"}),
        stack.platform(ledger={"unsafe_reads_without_redis": True}),
    )
    broker = stack.Broker(folder / "manifests", folder / "state", {"BROKER_REDIS_URL": redis.url})
    try:
        stack.until(lambda: ready(broker), 15)
        with broker.direct("reader") as client:
            assert client.get("/plain/items").status_code == 200
            redis.stop()
            stack.until(lambda: not ready(broker), 5, "the broker notices")
            assert [client.get("/plain/items").status_code for _ in range(2)] == [200, 200]
            assert client.post("/plain/items").json()["code"] == "ledger_unavailable"
            redis.start()
            stack.until(lambda: ready(broker), 15, "the broker has joined again")
            assert [client.get("/plain/items").status_code for _ in range(2)] == [200, 429]
        degraded = [bool((record["limits"] or {}).get("degraded")) for record in broker.decisions(verdict="allow")]
        assert degraded == [False, True, True, False]
        alerts = [record["detail"] for record in broker.records() if record["event"] == "alert"]
        assert [detail for detail in alerts if "reads pass on this broker's own limits" in detail]
        # To be stopped is no alarm.
        assert broker.stop() == 0
        assert alerts == [record["detail"] for record in broker.records() if record["event"] == "alert"]
    finally:
        broker.stop()
        upstream.close()
        redis.close()
        shutil.rmtree(folder)
