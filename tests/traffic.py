"""Calls from several threads at once, each with an ID in its path that no other call has, and what came of every one."""

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime
from typing import Any

import httpx
from stack import Broker, Seen, Upstream, until

Send = Callable[[str], httpx.Response]
Way = Callable[[], AbstractContextManager[Send]]


class Arrivals:
    """Which call reached an upstream, and when (seconds since the epoch), noted before the upstream answers it."""

    def __init__(self, upstream: Upstream) -> None:
        self.at: dict[str, float] = {}
        self.twice: list[str] = []
        answer = upstream.answer

        def noted(seen: Seen) -> tuple[int, dict[str, str], bytes]:
            call = _call_id(seen.path)
            (self.twice.append(call) if call in self.at else self.at.setdefault(call, time.time()))  # noqa: TID251
            return answer(seen)

        upstream.answer = noted


class Traffic:
    """What the threads of `traffic` did: the call's ID, and its status or the name of the connection error."""

    def __init__(self) -> None:
        self.answers: dict[str, int | str] = {}
        self.unwanted: list[str] = []
        self.stopping = False

    @property
    def passed(self) -> int:
        return sum(answer == 200 for answer in list(self.answers.values()))

    @property
    def refused(self) -> int:
        return len(self.answers) - self.passed

    def resumes(self, seconds: float = 15) -> None:
        """Wait until calls pass again, by themselves."""
        before = self.passed
        until(lambda: self.passed > before + 20, seconds, f"calls pass again; {self.answers.values()}")

    def runs(self) -> None:
        """Wait until calls pass at all, from every thread most likely."""
        until(lambda: self.passed > 50, 10, f"calls pass; {list(self.answers.values())[:5]}")


@contextmanager
def traffic(ways: Iterable[Way]) -> Iterator[Traffic]:
    """A thread for each of `ways`, which sends calls, one after the other, until the block ends."""
    found, numbers = Traffic(), itertools.count()

    def work(way: Way) -> None:
        with way() as send:
            while not found.stopping:
                call = f"c{next(numbers):07d}"
                try:
                    found.answers[call] = send(call).status_code
                except httpx.TransportError as error:
                    found.answers[call] = type(error).__name__
                    time.sleep(0.005)
                except Exception as error:  # noqa: BLE001 - a test must not lose what a thread met
                    found.unwanted.append(repr(error))
                    return

    threads = [threading.Thread(target=work, args=(way,), daemon=True) for way in ways]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        found.stopping = True
        for thread in threads:
            thread.join(20)


def through_base_url(broker: Broker, agent: str, tool: str) -> Way:
    """Calls at the base-url door, on one connection."""

    @contextmanager
    def way() -> Iterator[Send]:
        with broker.direct(agent) as client:
            yield lambda call: client.get(f"/{tool}/items/{call}")

    return way


def through_proxy(broker: Broker, agent: str, origin: str) -> Way:
    """Calls through the explicit proxy: absolute-form for `http://`, a tunnel with intercepted TLS for `https://`."""

    @contextmanager
    def way() -> Iterator[Send]:
        with broker.client(agent) as client:
            yield lambda call: client.get(f"{origin}/items/{call}")

    return way


def assert_no_fault_let_anything_out(broker: Broker, found: Traffic, *arrivals: Arrivals) -> dict[str, dict[str, Any]]:
    """Invariant 4, from both ends: what arrived was allowed before, and what was not answered with 200 was refused.

    Returns the allow records, by call ID.
    """
    assert found.unwanted == []
    allowed = {_call_id(record["path"]): record for record in broker.decisions(verdict="allow")}
    arrived: dict[str, float] = {}
    for each in arrivals:
        assert each.twice == []
        arrived |= each.at
    assert set(arrived) <= set(allowed), "something arrived without a recorded allow"
    assert set(arrived) <= set(found.answers), "something arrived that nobody sent"
    late = {call for call, at in arrived.items() if datetime.fromisoformat(allowed[call]["time"]).timestamp() > at}
    assert late == set(), "something arrived before its allow was recorded"
    passed = {call for call, answer in found.answers.items() if answer == 200}
    assert passed <= set(arrived), "a 2xx without an upstream"
    strange = {
        call: answer for call, answer in found.answers.items() if isinstance(answer, int) and answer != 200 and answer < 400
    }
    assert strange == {}
    return allowed


def _call_id(path: str) -> str:
    return path.partition("?")[0].rpartition("/")[2]
