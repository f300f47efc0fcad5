"""A broker in numbers, for `/metrics`.

Laws: a label holds a name from the manifests, a code, or a word that stands here, never what an agent says: so nobody can make
series without end. A call pays for additions only; what can be asked is asked when somebody looks (`Standing`). Names follow
Prometheus' conventions, and OpenTelemetry's words where it has one (`error_type`, `token_type`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.audit.record import Ending
from broker.ledger.base import Balance
from broker.policy.limits import NANO, Kind, Limit, Measure
from broker.policy.snapshot import PolicySnapshot

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, of which no query here makes use

# From what a decision takes with all in memory to where an agent's own timeout is near.
_DECISION_S = (50e-6, 100e-6, 150e-6, 200e-6, 300e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3, 1)
# OpenTelemetry's for generative AI clients, which fit APIs as well, and one below them.
_CALL_S = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
# A shared ledger that takes more than 50 ms is away.
_RESERVE_S = (250e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3)

_DECISIONS = "Decisions, by verdict and code."
_TAKEN = "From a request's head to its recorded decision, without the wait for its body."
_CALLED = "From letting a call go to its end, however it ended; a stream ends with its last byte."
_ERRORS = (
    "Calls that went wrong upstream: 5xx, unreached (no connection), reset, timeout, untrusted (certificate or address), "
    "blocked (the broker withheld or cut the answer), other."
)
_TOKENS = "Tokens of model calls: input, output, and cached, which are a part of input."
_USD = "US dollars that model calls cost, by the platform's prices; calls of models without a price add 0."
_RESERVED = "From asking a shared ledger to its answer; nothing is counted with the embedded one."
_SHARE = "Where several brokers share a ledger, each shows its own part: sum over them."
_SPENT = (
    "Spent in the current window, with what open calls have reserved, in the limit's own unit (calls, bytes, tokens, "
    f"US dollars); there once a call has counted towards the limit. {_SHARE}"
)
_LIMIT = "What may be spent in one window of the limits in broker_budget_spent. Brokers that share a ledger all show the same."
_INFO = "1 for the revision that is in force; no series before there is one."
_CURRENT = "1 if what the manifests say is in force; 0 if there is nothing in force yet, or a change was refused."
_ACCEPTED = "1 if Envoy has accepted the configuration; 0 if it refused it or has not asked."
_WRITABLE = (
    "1 if the audit log could be written and put on the disk the last time; calls whose decision can't be written are denied."
)
_UP = "1 if limits can be checked; 0 while a shared ledger is away and calls are denied; always 1 for the embedded one."
_FINDINGS = "What detectors found, by detector and what was done about it; `shadow` for nothing."
_RESTRICTED = "Restrictions that hold, by action."
_TOLD = "Alerts by sink: delivered, failed (tries), suppressed (a repetition, or too many in a minute), dropped (told nobody)."
_WAITING = "Alerts that wait to be delivered."
_TESTED = "1 if the last self-test of revocation passed; 0 if an agent that is revoked is not cut off."
_OPEN = f"Calls that have reserved and not settled. {_SHARE}"


@dataclass(frozen=True, slots=True)
class Standing:
    """How a broker stands now. `revision` is empty before any configuration is in force; `current` says that the manifests are.

    `accepted` is Envoy's word on it. `open_calls` are those that are reserved and not settled. `restrictions` is by action,
    `alerts` by sink and result.
    """

    revision: str
    current: bool
    accepted: bool
    audit_writable: bool
    open_calls: int
    balances: Sequence[Balance] = ()
    self_test: bool = True
    restrictions: Mapping[str, int] = field(default_factory=dict)
    alerts: Mapping[tuple[str, str], int] = field(default_factory=dict)
    alerts_waiting: int = 0


class Metrics(Collector):
    """What was counted since this broker started. `ledger_up` is for whoever watches over a shared ledger to set."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.ledger_up = True
        self._standing: Standing | None = None
        self._decisions = cache(self._counter("broker_decisions", _DECISIONS, "verdict", "code").labels)
        self._decision_time = cache(self._histogram("broker_decision_duration_seconds", _TAKEN, _DECISION_S, "verdict").labels)
        self._call_time = cache(self._histogram("broker_upstream_duration_seconds", _CALLED, _CALL_S, "tool").labels)
        self._errors = cache(self._counter("broker_upstream_errors", _ERRORS, "tool", "error_type").labels)
        self._tokens = cache(self._counter("broker_tokens", _TOKENS, "agent", "model", "token_type").labels)
        self._findings = cache(self._counter("broker_findings", _FINDINGS, "detector", "action").labels)
        self._usd = cache(self._counter("broker_cost_usd", _USD, "agent", "model").labels)
        self._reserve_time = self._histogram("broker_ledger_reserve_duration_seconds", _RESERVED, _RESERVE_S)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def decided(self, verdict: str, code: str, took_ns: int | None) -> None:
        """A decision was recorded; `took_ns` is None where nobody waited for it."""
        self._decisions(verdict, code).inc()
        if took_ns is not None:
            self._decision_time(verdict).observe(took_ns / 1e9)

    def found(self, detector: str, action: str) -> None:
        """A detector found something."""
        self._findings(detector, action).inc()

    def waited_for_ledger(self, took_ns: int) -> None:
        """A shared ledger was asked, and waited for."""
        self._reserve_time.observe(took_ns / 1e9)

    def ended(self, agent: str, tool: str, model: str, ending: Ending, error: str) -> None:
        """An allowed call ended; `error` is what went wrong with its upstream, empty for nothing."""
        self._call_time(tool).observe(ending.duration_ms / 1e3)
        if error:
            self._errors(tool, error).inc()
        if used := ending.usage:
            for word, number in (("input", used.input), ("output", used.output), ("cached", used.cached)):
                self._tokens(agent, model, word).inc(number)
            self._usd(agent, model).inc(ending.usd or 0)

    def exposition(self, standing: Standing) -> bytes:
        """All of it in Prometheus' text format. Takes its time where there are many series: call it from a thread."""
        self._standing = standing
        return generate_latest(self.registry)

    def collect(self) -> Iterable[Metric]:
        """The gauges; none as long as nobody has looked."""
        if (now := self._standing) is None:
            return
        spent = GaugeMetricFamily("broker_budget_spent", _SPENT, labels=("scope", "limit"))
        limit = GaugeMetricFamily("broker_budget_limit", _LIMIT, labels=("scope", "limit"))
        for balance in now.balances:
            unit = NANO if balance.limit.measure is Measure.USD else 1
            labels = (balance.limit.scope, balance.limit.word)
            spent.add_metric(labels, balance.spent / unit)
            limit.add_metric(labels, balance.limit.amount / unit)
        info = GaugeMetricFamily("broker_configuration_info", _INFO, labels=("revision",))
        if now.revision:
            info.add_metric((now.revision,), 1)
        yield from (spent, limit, info)
        yield GaugeMetricFamily("broker_configuration_current", _CURRENT, now.current)
        yield GaugeMetricFamily("broker_envoy_accepted", _ACCEPTED, now.accepted)
        yield GaugeMetricFamily("broker_audit_writable", _WRITABLE, now.audit_writable)
        yield GaugeMetricFamily("broker_ledger_up", _UP, self.ledger_up)
        yield GaugeMetricFamily("broker_ledger_open_calls", _OPEN, now.open_calls)
        yield GaugeMetricFamily("broker_self_test_passed", _TESTED, now.self_test)
        yield GaugeMetricFamily("broker_alerts_waiting", _WAITING, now.alerts_waiting)
        restricted = GaugeMetricFamily("broker_restrictions", _RESTRICTED, labels=("action",))
        for action, number in sorted(now.restrictions.items()):
            restricted.add_metric((action,), number)
        told = CounterMetricFamily("broker_alerts", _TOLD, labels=("sink", "result"))
        for labels, number in sorted(now.alerts.items()):
            told.add_metric(labels, number)
        yield from (restricted, told)


def windows(snapshot: PolicySnapshot) -> Mapping[str, Limit]:
    """The limits of a snapshot that count in windows, by key."""
    limits = (limit for agent in snapshot.agents.values() for limit in agent.limits)
    return {limit.key: limit for limit in limits if limit.kind is Kind.WINDOW}
