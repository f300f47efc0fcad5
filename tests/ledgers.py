"""Both ledgers behind one synchronous door, for tests that hold for either. Time is what a test says it is."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from broker.ledger.base import Balance, Granted, Refused, Spend
from broker.ledger.memory import MemoryLedger
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
