"""From a revocation at one broker to the last byte of what was open at all of them: three brokers on one Redis."""

import shutil
import subprocess
import time
from contextlib import ExitStack, closing
from statistics import median
from typing import Any

import httpx

from tests import stack
from tests.redis_server import RedisServer
from tests.streams import Events, Listener, base_url_stream

_BROKERS, _AGENT = 3, "cut"
_OPERATIONS = {"items.list": {"match": {"method": "GET", "path": "/items/{+rest}"}, "effect": "read"}}


def measure(*, quick: bool) -> list[dict[str, Any]]:
    """Seconds over all streams of all rounds, half of them idle, for the broker that was told and for the others."""
    streams, rounds = (12, 1) if quick else (100, 5)
    took: dict[str, list[float]] = {"the broker that was told": [], "the others": []}
    with ExitStack() as running:
        folder = stack.short_folder()
        running.callback(shutil.rmtree, folder)
        events, redis = running.enter_context(closing(Events())), running.enter_context(closing(RedisServer()))
        loopback = {"addresses": ["127.0.0.0/8"]}
        stack.write_manifests(
            folder / "manifests",
            stack.tool("events", f"http://127.0.0.1:{events.port}", _OPERATIONS, upstream=loopback),
            stack.agent(_AGENT, {"events": {"operations": {"items.list": {}}}}),
        )
        brokers = []
        for number in range(_BROKERS):
            brokers.append(stack.Broker(folder / "manifests", folder / f"s{number}", {"BROKER_REDIS_URL": redis.url}))
            running.callback(brokers[-1].stop)
        token = _verb(brokers[0], "token", "bench", "--operator")
        with httpx.Client(headers={"authorization": f"Bearer {token}"}, base_url=brokers[0].admin) as operator:
            for _ in range(rounds):
                for broker in brokers:
                    broker.token(_AGENT)
                opened = [_opened(brokers[number % _BROKERS], number) for number in range(streams)]
                began = time.monotonic()
                operator.post(f"/agents/{_AGENT}/revoke", json={"reason": "measured"}).raise_for_status()
                for number, each in enumerate(opened):
                    if not each.ended.wait(10):
                        raise SystemExit("a stream was still open 10 s after the revocation")
                    took["the others" if number % _BROKERS else "the broker that was told"].append(each.ended_at - began)
                    each.close()
                operator.post(f"/agents/{_AGENT}/release", json={"reason": "measured"}).raise_for_status()
                _released(brokers)
    return [{"name": name, "streams": len(seconds), **_shares(sorted(seconds))} for name, seconds in took.items()]


def _opened(broker: stack.Broker, number: int) -> Listener:
    listener = base_url_stream(broker, _AGENT, f"/events/items/{'busy' if number % 2 else 'idle'}")
    if not listener.began.wait(20) or not listener.answer.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"a stream did not open: {listener.answer[:200]!r}")
    return listener


def _released(brokers: list[stack.Broker]) -> None:
    for broker in brokers:
        broker._tokens.clear()  # noqa: SLF001 - an old one no longer counts
        url = f"{broker.base_url}/events/nothing"

        def is_free(broker: stack.Broker = broker, url: str = url) -> bool:
            broker._tokens.clear()  # noqa: SLF001
            return "agent_revoked" not in httpx.get(url, headers={"x-broker-token": broker.token(_AGENT)}).text

        stack.until(is_free)


def _shares(ordered: list[float]) -> dict[str, float]:
    last = len(ordered) - 1
    return {"p50_s": median(ordered), "p99_s": ordered[min(last, len(ordered) * 99 // 100)], "most_s": ordered[last]}


def _verb(broker: stack.Broker, *words: str) -> str:
    command = [*stack.BROKER, *words, "--state", str(broker.state)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
