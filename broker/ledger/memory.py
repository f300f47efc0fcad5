"""The embedded ledger: one process, in memory, rebuilt from the audit log (`replay`).

Laws: nothing here waits, so a reservation is atomic by being one step of one thread: every limit is asked, then all is taken.
A counter is kept with the number of the window that it belongs to, a run's with the run: what is settled later than that is
dropped. A bucket refills by itself, so a call's share of it is given back only while nobody has taken from it since.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile

from broker.ledger.base import IDLE_S, LEASE_S, NAMED_IDLE_S, Balance, Granted, Refused, Spend
from broker.policy.limits import Kind, Limit, Measure, label

RUNS_KEPT = 10_000
"""How many runs of one agent are remembered, the most recent: else an agent that names a new one with each call fills the memory.
It gains nothing by that: the run that it names anew has spent nothing either."""

COUNTS_KEPT = 10_000
"""How many different calls of one run are remembered, the first forgotten first, and a tenth of them at once."""

_FORGET_S = 7200.0  # twice the longest call: what is older will never be settled
_EPSILON_S = 1e-6  # what a double of this size can't hold of a second

PER_RUN = frozenset({Kind.RUN, Kind.RUN_TIME, Kind.IDENTICAL, Kind.FLOW})
"""What only steps of a run are held to."""


@dataclass(slots=True)
class Run:
    """One run of an agent: its first call, its last, how many, and what was counted in it, by limit key or fingerprint.

    `trail` has, by label, the first call that this broker let go which gave the run that label.
    """

    started: float
    last: float
    steps: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    trail: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Grant:
    """A reservation: `taken` holds each limit, what was reserved of it, and from which window, or when the bucket is full."""

    spend: Spend
    at: float
    granted: Granted
    run: Run | None
    taken: list[tuple[Limit, int, float]]


class MemoryLedger:
    """See `Ledger`. Times are in seconds since the epoch.

    `windows` maps a key to (number of the window, spent), `full_at` to when a bucket is full again, `open` to the open calls and
    when each lapses. `runs` maps an agent and a run ID to the run, the least recent first; `grants` has what is not settled.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.windows: dict[str, tuple[int, int]] = {}
        self.full_at: dict[str, float] = {}
        self.open: dict[str, dict[str, float]] = {}
        self.runs: dict[tuple[str, str], Run] = {}
        self.grants: dict[str, Grant] = {}

    def reserve(self, spend: Spend, now: float) -> Granted | Refused:
        """See `Ledger.reserve`; never raises."""
        if known := self.grants.get(spend.decision_id):
            return known.granted
        now = self._advance(now)
        run = self._run(spend, now)
        charges = _charges(spend, run)
        for limit, need in charges:
            if refused := self._refusal(limit, spend, need, run, now):
                return refused
        return self._take(spend, charges, run, now)

    def take(self, spend: Spend, now: float, step: int = 0, began: float = 0.0) -> Granted:
        """Reserve without asking: what another ledger granted, or the record says was, as `step` of the run that began then."""
        now = self._advance(now)
        run = self._run(spend, now)
        if step and spend.run is not None:
            # Other brokers kept the run going, so how long it was idle here says nothing.
            run = self.runs.get((spend.agent, spend.run))
            if run is None or step == 1 or run.last < began:
                run = Run(now, now)
            run.started, run.steps = began or run.started, step - 1
        return self._take(spend, _charges(spend, run), run, now)

    def _advance(self, now: float) -> float:
        self.now = now = max(now, self.now)
        return now

    def _run(self, spend: Spend, now: float) -> Run | None:
        """The run that this call is a step of; one with no steps has not begun."""
        if spend.run is None:
            return None
        run = self.runs.get((spend.agent, spend.run))
        return run if run and now - run.last < idle(spend.run) else Run(now, now)

    def _refusal(self, limit: Limit, spend: Spend, need: int, run: Run | None, now: float) -> Refused | None:
        match limit.kind:
            case Kind.WINDOW:
                window, spent = self._window(limit, now)
                wait = (window + 1) * limit.per - now
            case Kind.RATE:
                return self._bucket_refusal(limit, need, now)
            case Kind.CONCURRENCY:
                spent, wait = self._crowd(limit, need, now), 1.0
            case _ if run is None:
                return None
            case Kind.RUN_TIME:
                spent, need, wait = math.ceil(now - run.started), 0, run.last + idle(spend.run) - now
            case Kind.FLOW:
                spent, need, wait = int(all(run.counts.get(label(name).key, 0) > 0 for name in limit.after)), 0, 0.0
            case Kind.RUN | Kind.IDENTICAL:
                spent, wait = run.counts.get(counted(limit, spend), 0), run.last + idle(spend.run) - now
        if spent + need <= limit.amount:
            return None
        trail = self.trail(limit, spend) if limit.kind is Kind.FLOW else ""
        return Refused(limit, spent, need, wait if need <= limit.amount else 0, trail)

    def _window(self, limit: Limit, now: float) -> tuple[int, int]:
        window = int(now // limit.per)
        stored = self.windows.get(limit.key)
        return stored if stored and stored[0] >= window else (window, 0)

    def _bucket_refusal(self, limit: Limit, need: int, now: float) -> Refused | None:
        if not limit.amount or need > limit.burst:
            return Refused(limit, 0, need, 0)
        # The generic cell rate algorithm (ITU-T I.371), virtual scheduling: a bucket is one moment, when it will be full again.
        wait = self._full(limit, now) - now + (need - limit.burst) * limit.per / limit.amount
        return Refused(limit, limit.burst, need, wait) if wait > _EPSILON_S else None

    def _full(self, limit: Limit, now: float) -> float:
        full_at, empty = self.full_at.get(limit.key, now), now + limit.burst * limit.per / max(limit.amount, 1)
        if full_at > empty:
            # No bucket is emptier than empty: one that was emptied at a slower rate refills at this one.
            self.full_at[limit.key] = full_at = empty
        return max(full_at, now)

    def _crowd(self, limit: Limit, need: int, now: float) -> int:
        calls = self.open.get(limit.key, {})
        if len(calls) + need > limit.amount:
            for lapsed in [decision_id for decision_id, until in calls.items() if until <= now]:
                del calls[lapsed]
        return len(calls)

    def _take(self, spend: Spend, charges: list[tuple[Limit, int]], run: Run | None, now: float) -> Granted:
        taken = [(limit, need, self._add(limit, spend, need, run, now)) for limit, need in charges]
        if run and spend.run is not None and spend.step:
            run.last, run.steps = now, run.steps + 1
            self.runs.pop((spend.agent, spend.run), None)
            self.runs[spend.agent, spend.run] = run
        granted = Granted(run.steps, began=run.started // 1) if run and spend.step else Granted()
        self.grants[spend.decision_id] = Grant(spend, now, granted, run, taken)
        return granted

    def _add(self, limit: Limit, spend: Spend, need: int, run: Run | None, now: float) -> float:
        """Charge one limit; the number of the window that it was charged to, or when the bucket is full."""
        match limit.kind:
            case Kind.WINDOW:
                window, spent = self._window(limit, now)
                self.windows[limit.key] = window, spent + need
                return window
            case Kind.RATE:
                self.full_at[limit.key] = full_at = self._full(limit, now) + need * limit.per / max(limit.amount, 1)
                return full_at
            case Kind.CONCURRENCY:
                self.open.setdefault(limit.key, {})[spend.decision_id] = now + LEASE_S
            case Kind.RUN | Kind.IDENTICAL if run:
                name = counted(limit, spend)
                run.counts[name] = run.counts.get(name, 0) + need
                if limit.word == "label":
                    run.trail.setdefault(name, f"{spend.fingerprint.rpartition('/')[0]} (decision {spend.decision_id})")
                if len(run.counts) > COUNTS_KEPT:
                    _forget_calls(run)
        return 0

    def settle(self, decision_id: str, spent: Mapping[Measure, int], now: float) -> None:
        """See `Ledger.settle`."""
        self.close(decision_id, spent, now)

    def refund(self, decision_id: str, now: float) -> None:
        """See `Ledger.refund`."""
        self.close(decision_id, None, now)

    def close(self, decision_id: str, spent: Mapping[Measure, int] | None, now: float) -> tuple[Grant, list[int]] | None:
        """End a reservation, settled or (None) refunded: it, and the change of each part that it took. None if it has ended."""
        self._advance(now)
        if (grant := self.grants.pop(decision_id, None)) is None:
            return None
        # Most calls spend just what they reserved.
        changes = [0] * len(grant.taken) if spent == {} else [_change(limit, need, spent) for limit, need, _ in grant.taken]
        for (limit, _, origin), change in zip(grant.taken, changes, strict=True):
            if limit.kind is Kind.CONCURRENCY:
                self.open[limit.key].pop(decision_id, None)
            elif change:
                self._correct(limit, grant, origin, change)
        return grant, changes

    def _correct(self, limit: Limit, grant: Grant, origin: float, change: int) -> None:
        match limit.kind:
            case Kind.WINDOW:
                stored, spent = self.windows[limit.key]
                if stored == origin:
                    self.windows[limit.key] = stored, spent + change
            case Kind.RATE if self.full_at[limit.key] == origin:
                self.full_at[limit.key] += change * limit.per / max(limit.amount, 1)
            case Kind.RUN | Kind.IDENTICAL if grant.run:
                name = counted(limit, grant.spend)
                if name in grant.run.counts:
                    grant.run.counts[name] += change
                    if grant.run.counts[name] <= 0:
                        grant.run.trail.pop(name, None)

    def trail(self, limit: Limit, spend: Spend) -> str:
        """By which calls the run got the labels of a flow rule, as far as they went through this broker."""
        known = self.runs.get((spend.agent, spend.run or ""))
        calls = known.trail if known else {}
        return ", ".join(f"{name} by {calls.get(label(name).key, 'a call through another broker')}" for name in limit.after)

    def renew(self, now: float) -> None:
        """See `Ledger.renew`. Forgets what can't matter any more."""
        now = self._advance(now)
        for decision_id in [each for each, grant in self.grants.items() if grant.at < now - _FORGET_S]:
            del self.grants[decision_id]
        for decision_id, grant in self.grants.items():
            for limit, _, _ in grant.taken:
                if limit.kind is Kind.CONCURRENCY and self.open[limit.key].get(decision_id, 0.0) > now:
                    self.open[limit.key][decision_id] = now + LEASE_S
        for key in [key for key, _ in takewhile(lambda each: now - each[1].last >= NAMED_IDLE_S, self.runs.items())]:
            del self.runs[key]
        if len(self.runs) > RUNS_KEPT:
            self._forget_runs()

    def _forget_runs(self) -> None:
        kept = Counter(agent for agent, _ in self.runs)
        for key in list(self.runs):
            if kept[key[0]] > RUNS_KEPT:
                kept[key[0]] -= 1
                del self.runs[key]

    async def balances(self, limits: tuple[Limit, ...], now: float) -> list[Balance]:
        """See `Ledger.balances`; never raises."""
        now = self._advance(now)
        return [balance for limit in limits if (balance := self._balance(limit, now))]

    def _balance(self, limit: Limit, now: float) -> Balance | None:
        match limit.kind:
            case Kind.WINDOW:
                window, spent = self._window(limit, now)
                return Balance(limit, spent, (window + 1) * limit.per)
            case Kind.RATE:
                full_at = self._full(limit, now)
                return Balance(limit, math.ceil((full_at - now) * limit.amount / limit.per), full_at)
            case Kind.CONCURRENCY:
                return Balance(limit, sum(until > now for until in self.open.get(limit.key, {}).values()), 0)
        return None


def idle(run: str | None) -> float:
    """After how long without a call a run has ended, in seconds."""
    return NAMED_IDLE_S if run else IDLE_S


def _charges(spend: Spend, run: Run | None) -> list[tuple[Limit, int]]:
    """The limits that bear on the call, each with what it needs of them."""
    amounts = spend.amounts if run is None or run.steps else {**spend.amounts, Measure.RUNS: 1}
    return [(limit, need) for limit in spend.limits if (need := amounts.get(limit.measure))]


def _forget_calls(run: Run) -> None:
    # What the run has spent stays; of calls, only those that are like one of long ago count anew.
    told = [name for name in run.counts if f":{Kind.IDENTICAL}:" in name]
    for name in told[: COUNTS_KEPT // 10]:
        del run.counts[name]


def counted(limit: Limit, spend: Spend) -> str:
    """Under which name a run counts it; of a flow rule, under which names it counts the labels, a line each."""
    if limit.kind is Kind.FLOW:
        return "\n".join(label(name).key for name in limit.after)
    return f"{limit.key}:{spend.fingerprint}" if limit.kind is Kind.IDENTICAL else limit.key


def _change(limit: Limit, need: int, spent: Mapping[Measure, int] | None) -> int:
    if spent is None:
        return 0 if limit.measure is Measure.RUNS else -need
    counted = limit.kind in (Kind.WINDOW, Kind.RUN)
    return spent.get(limit.measure, need) - need if counted else 0
