"""Both ledgers against a model that keeps every event and works everything out anew from all of them, each time.

Two brokers share a Redis that loses its data, its scripts and its connections now and then: nobody can tell by what is admitted.
"""

from dataclasses import dataclass, field
from math import ceil, floor
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from ledgers import Embedded, Shared, limit, spend

from broker.ledger import answers as module
from broker.ledger.base import IDLE_S, LEASE_S, NAMED_IDLE_S, Granted, Refused, Spend
from broker.policy.limits import Kind, Limit, Measure

WINDOWS = [limit("calls", 3, 10), limit("tokens", 50, 60), limit("runs", 2, 60, scope="team/t")]
RUNS = [limit("steps_per_run", 4), limit("tokens_per_run", 60), limit("identical_per_run", 2), limit("time_per_run", 100)]
CROWD, RATE = limit("concurrency", 2), limit("rate", 2, 8, 3)
POOL = [*WINDOWS, *RUNS, CROWD, RATE]


@dataclass
class Event:
    """A call that was admitted, the number of its run, and what became of it: None while it is open, {} refunded."""

    spend: Spend
    at: float
    run: int
    first: bool
    lapses: float
    taken: dict[str, int]
    end: dict[Measure, int] | None = None
    refunded: bool = False

    def spent(self, bound: Limit) -> int:
        taken = self.taken.get(bound.key, 0)
        if self.refunded:
            return taken if bound.measure is Measure.RUNS else 0
        counted = bound.kind in (Kind.WINDOW, Kind.RUN)
        return (self.end or {}).get(bound.measure, taken) if counted and taken else taken


@dataclass
class Model:
    now: float = 0.0
    events: list[Event] = field(default_factory=list)
    buckets: dict[str, list[tuple[str, float]]] = field(default_factory=dict)

    def reserve(self, wanted: Spend, now: float) -> Granted | Refused:
        self.now = now = max(self.now, now)
        run = [each for each in self.events if (each.spend.agent, each.spend.run) == (wanted.agent, wanted.run)]
        idle = NAMED_IDLE_S if wanted.run else IDLE_S
        number = run[-1].run if run else 0
        if not run or now - run[-1].at >= idle:
            number += 1
        run = [each for each in run if each.run == number]
        taken = {}
        for bound in wanted.limits:
            if need := int(not run) if bound.measure is Measure.RUNS else wanted.amounts.get(bound.measure, 0):
                if refused := self._refused(bound, wanted, need, run, idle):
                    return refused
                taken[bound.key] = need
        self.events.append(Event(wanted, now, number, not run, now + LEASE_S, taken))
        for bound in wanted.limits:
            if bound.kind is Kind.RATE:
                self.buckets.setdefault(bound.key, []).append((wanted.decision_id, now))
        return Granted(len(run) + 1, began=float(floor(run[0].at if run else now)))

    def _refused(self, bound: Limit, wanted: Spend, need: int, run: list[Event], idle: float) -> Refused | None:
        now, last = self.now, run[-1].at if run else self.now
        match bound.kind:
            case Kind.WINDOW:
                spent, wait = self.window(bound), (floor(now / bound.per) + 1) * bound.per - now
            case Kind.RATE:
                wait = self.full_at(bound) - now + (need - bound.burst) * bound.per / bound.amount
                return Refused(bound, bound.burst, need, wait) if wait > 0 else None
            case Kind.CONCURRENCY:
                spent, wait = self.open(bound), 1.0
            case Kind.RUN_TIME:
                spent, need, wait = ceil(now - run[0].at) if run else 0, 0, last + idle - now
            case Kind.RUN:
                spent, wait = sum(each.spent(bound) for each in run), last + idle - now
            case Kind.IDENTICAL:
                same = [each for each in run if each.spend.fingerprint == wanted.fingerprint]
                spent, wait = sum(each.spent(bound) for each in same), last + idle - now
        return Refused(bound, spent, need, wait if need <= bound.amount else 0) if spent + need > bound.amount else None

    def window(self, bound: Limit) -> int:
        return sum(each.spent(bound) for each in self.events if each.at // bound.per == self.now // bound.per)

    def full_at(self, bound: Limit) -> float:
        full = 0.0
        for _, at in self.buckets.get(bound.key, []):
            full = max(full, at) + bound.per / bound.amount
        return max(full, self.now)

    def open(self, bound: Limit) -> int:
        return sum(
            bound.key in each.taken and not each.refunded and each.end is None and each.lapses > self.now for each in self.events
        )

    def close(self, decision_id: str, spent: dict[Measure, int] | None, now: float) -> None:
        self.now = max(self.now, now)
        for each in self.events:
            if each.spend.decision_id == decision_id and not each.refunded and each.end is None:
                each.refunded, each.end = spent is None, spent
                for taken in self.buckets.values():
                    if spent is None and taken[-1:] and taken[-1][0] == decision_id:
                        taken.pop()

    def renew(self, now: float) -> None:
        self.now = max(self.now, now)
        for each in self.events:
            if each.end is None and not each.refunded and each.lapses > self.now:
                each.lapses = self.now + LEASE_S


class Machine(RuleBasedStateMachine):
    calls = Bundle("calls")
    url = ""
    brokers = 0

    def __init__(self) -> None:
        super().__init__()
        self.pool = [bound for bound in POOL if bound is not RATE or self.brokers < 2]
        self.model, self.now, self.places = Model(), 1_800_000_000.0, {}
        if self.brokers:
            redis.Redis.from_url(self.url).flushall()
        self.desks = [Shared(self.url, f"b{number}") for number in range(self.brokers)] or [Embedded()]

    def teardown(self) -> None:
        for desk in self.desks:
            desk.close()

    def desk(self, call: Spend) -> Any:
        """A call is reserved and ended at the same broker."""
        return self.desks[self.places.setdefault(call.decision_id, len(self.places) * 2 // 3) % len(self.desks)]

    @rule(seconds=st.sampled_from([0.5, 1, 5, 10, 31, 59.5, 60, 599.5, 600, -3, -100]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        target=calls,
        chosen=st.lists(st.sampled_from(range(len(POOL))), min_size=1, max_size=4, unique=True),
        tokens=st.sampled_from([0, 1, 20, 40, 61]),
        run=st.sampled_from(["", "", "r"]),
        fingerprint=st.sampled_from("fg"),
    )
    def reserve(self, chosen: list[int], tokens: int, run: str, fingerprint: str) -> Spend:
        limits = [self.pool[index] for index in chosen if index < len(self.pool)]
        wanted = spend(*limits, amounts={Measure.CALLS: 1, Measure.TOKENS: tokens}, run=run, fingerprint=fingerprint)
        assert self.desk(wanted).reserve(wanted, self.now) == self.model.reserve(wanted, self.now)
        return wanted

    @rule(call=calls, tokens=st.sampled_from([0, 5, 45]), told=st.booleans())
    def settle(self, call: Spend, tokens: int, *, told: bool) -> None:
        spent = {Measure.TOKENS: tokens} if told and call.amounts[Measure.TOKENS] else {}
        self.desk(call).settle(call.decision_id, spent, self.now)
        self.model.close(call.decision_id, spent, self.now)

    @rule(call=calls)
    def refund(self, call: Spend) -> None:
        self.desk(call).refund(call.decision_id, self.now)
        self.model.close(call.decision_id, None, self.now)

    @rule()
    def renew(self) -> None:
        for desk in self.desks:
            desk.renew(self.now)
        self.model.renew(self.now)

    @invariant()
    def balances_agree(self) -> None:
        bounds = (WINDOWS[0], WINDOWS[1], WINDOWS[2], CROWD)
        self.model.now = max(self.model.now, self.now)
        for desk in self.desks:
            told = [each.spent for each in desk.balances(bounds, self.now)]
            assert told == [*(self.model.window(bound) for bound in bounds[:3]), self.model.open(CROWD)]


class Faulty(Machine):
    @rule(words=st.sampled_from([("FLUSHALL",), ("SCRIPT", "FLUSH"), ("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")]))
    def redis_fails(self, words: tuple[str, ...]) -> None:
        with redis.Redis.from_url(self.url) as client:
            client.execute_command(*words)
        for desk in self.desks:
            desk.heal()
        self.model.renew(self.now)  # whoever joins again keeps the places of what is open there


@pytest.mark.parametrize(
    ("machine", "brokers"), [(Machine, 0), (Machine, 1), (Faulty, 2)], ids=["embedded", "redis", "faulty redis"]
)
def test_whatever_happens_in_whatever_order_a_ledger_admits_what_the_model_admits(request, monkeypatch, machine, brokers):
    monkeypatch.setattr(module, "SLOW_S", 10)  # a busy machine is not what this is about

    class Chosen(machine):
        url = request.getfixturevalue("redis_server").url if brokers else ""

    Chosen.brokers = brokers
    run_state_machine_as_test(
        Chosen, settings=settings(max_examples=50 if brokers else 200, deadline=None, suppress_health_check=list(HealthCheck))
    )
