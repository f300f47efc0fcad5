"""Both ledgers behind one synchronous door, for tests that hold for either. Time is what a test says it is."""

import asyncio
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from broker.ledger.base import Balance, Granted, Refused, Spend
from broker.ledger.memory import MemoryLedger
from broker.ledger.redis import RedisLedger
from broker.policy.limits import Limit, Measure

CALL = {Measure.CALLS: 1}
_ids = count(1)


def limit(word: str, amount: int, per: int = 0, burst: int = 0, scope: str = "agent/a") -> Limit:
    return Limit(word, scope, amount, f"agents/a.yaml#/spec/limits/{word}", per, burst)


def spend(*limits: Limit, id: str = "", agent: str = "a", **known: Any) -> Spend:  # noqa: A002 - the field's name
    """One call under these limits; `amounts`, `run`, `fingerprint` as in `Spend`."""
    return Spend(id or f"d{next(_ids)}", agent, limits, **{"amounts": CALL, **known})


class Embedded:
    """The embedded ledger."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger()

    def reserve(self, wanted: Spend, now: float) -> Granted | Refused:
        return self.ledger.reserve(wanted, now)

    def settle(self, decision_id: str, spent: Mapping[Measure, int], now: float) -> None:
        self.ledger.settle(decision_id, spent, now)

    def refund(self, decision_id: str, now: float) -> None:
        self.ledger.refund(decision_id, now)

    def renew(self, now: float) -> None:
        self.ledger.renew(now)

    def balances(self, limits: tuple[Limit, ...], now: float) -> list[Balance]:
        try:
            self.ledger.balances(limits, now).send(None)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("the embedded ledger waits for nothing")

    def close(self) -> None:
        pass


class Shared(Embedded):
    """A ledger on a Redis, on its own event loop, that has told Redis all by the time a step is over."""

    def __init__(self, url: str, replica: str = "one", **known: Any) -> None:
        self._runner = asyncio.Runner()
        self.ledger = RedisLedger(url, replica, MemoryLedger(), **{"callers_clock": True, "grace": 0, **known})
        self._runner.run(self.ledger.__aenter__())

    def reserve(self, wanted: Spend, now: float) -> Granted | Refused:
        return self._runner.run(answered(self.ledger, wanted, now))

    def settle(self, decision_id: str, spent: Mapping[Measure, int], now: float) -> None:
        self._step(lambda: self.ledger.settle(decision_id, spent, now))

    def refund(self, decision_id: str, now: float) -> None:
        self._step(lambda: self.ledger.refund(decision_id, now))

    def renew(self, now: float) -> None:
        self._step(lambda: self.ledger.renew(now))

    def balances(self, limits: tuple[Limit, ...], now: float) -> list[Balance]:
        return self._runner.run(self.ledger.balances(limits, now))

    def heal(self) -> None:
        """Notice whatever happened to Redis, and wait until that is over."""

        async def healed() -> None:
            await self.ledger.drained()
            async with asyncio.timeout(20):
                while not self.ledger._healthy:
                    await asyncio.sleep(0.001)

        self._runner.run(healed())

    def close(self) -> None:
        self._runner.run(self.ledger.__aexit__())
        self._runner.close()

    def _step(self, what: Callable[[], None]) -> None:
        async def step() -> None:
            what()
            await self.ledger.drained()

        self._runner.run(step())


async def answered(ledger: RedisLedger, wanted: Spend, now: float) -> Granted | Refused:
    answer = ledger.reserve(wanted, now)
    return answer if isinstance(answer, Granted | Refused) else await answer
