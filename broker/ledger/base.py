"""The interface of both ledgers, what goes in and comes out, and how they fail.

Laws: what a call may spend is taken in one atomic step before it leaves, all of it or nothing. It is corrected once, to what was
spent, or given back whole; both steps do nothing the second time (by decision ID). What is never corrected stays spent, but its
place among the open calls lapses after `LEASE_S` seconds without `renew`. Time is an argument and never runs backwards: an
earlier `now` than the last counts as the last.
"""

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Protocol

from broker.errors import BrokerError
from broker.policy.limits import Limit, Measure

LEASE_S = 60.0
"""How long a call keeps its place among the open ones without being renewed: what a killed broker held is free after that."""

RENEW_S = 20.0
"""How often `renew` is called, so that two may be missed."""

IDLE_S = 600.0
"""An agent's implicit run ends after this long without a call."""

NAMED_IDLE_S = 86_400.0
"""A named run is forgotten after this long without a call; naming it again begins a new one."""


class LedgerUnavailable(BrokerError):
    """Limits can't be checked now; the call is denied."""


@dataclass(frozen=True, slots=True)
class Spend:
    """What one call may spend. `amounts` is its upper bound by measure; a limit on what is 0 or not in it does not bear on it.

    `run` is the run ID that the call names, empty for the agent's implicit run, None where the call has none. One that is no
    `step` of its run (a protocol's own traffic) is held to that run's flow rules and leaves it as it is.
    `fingerprint` tells identical calls; `read` is whether the call changes nothing. Of the limits, the first that refuses is
    reported.
    """

    decision_id: str
    agent: str
    limits: tuple[Limit, ...]
    amounts: Mapping[Measure, int]
    run: str | None = None
    fingerprint: str = ""
    read: bool = False
    step: bool = True


@dataclass(frozen=True, slots=True)
class Granted:
    """All of it was reserved. `step` is the call's number in its run, which `began` then (whole seconds); 0 without a run.

    `degraded` says that only this broker's own share of the limits was checked.
    """

    step: int = 0
    degraded: bool = False
    began: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was reserved: `limit` has no room for `needed` beside what is `spent`. `retry_after` is in seconds, 0 for never.

    `trail` says by which calls the run came under a flow rule.
    """

    limit: Limit
    spent: int
    needed: int
    retry_after: float
    trail: str = ""


@dataclass(frozen=True, slots=True)
class Balance:
    """How a limit stands: `spent` in its measure's unit, with what is reserved; `renews` in seconds since the epoch, 0: never."""

    limit: Limit
    spent: int
    renews: float


class Ledger(Protocol):
    """What was spent. One object serves one broker; `now` is in seconds since the epoch."""

    def reserve(self, spend: Spend, now: float) -> "Granted | Refused | Awaitable[Granted | Refused]":
        """Take all of it, or nothing; an awaitable where the answer must be fetched. Raises `LedgerUnavailable`, either way."""

    def settle(self, decision_id: str, spent: Mapping[Measure, int], now: float) -> None:
        """The call ended: correct the measures named here to what was spent, and give back its place. Never raises."""

    def refund(self, decision_id: str, now: float) -> None:
        """The call never left: give back all that was reserved, but a run that it began has begun. Never raises."""

    def renew(self, now: float) -> None:
        """All calls that are open here keep their places for another `LEASE_S`."""

    async def balances(self, limits: tuple[Limit, ...], now: float) -> list[Balance]:
        """How these stand; of limits per run nothing is told. Raises `LedgerUnavailable`."""
