"""What may be spent: limits as data, and what one call spends of them.

Laws: all amounts are whole numbers, US dollars in billionths, so that no sum depends on its order. A limit's key names whose it
is and what it counts, never how much it allows: a changed amount takes nothing back of what is spent. What a call may cost is
reserved before it leaves, at its upper bound.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache

from broker.policy.approval import Approval
from broker.policy.types import Code, Decision, Effect, ModelCall, Usage, deny

NANO = 1_000_000_000
"""Billionths of a US dollar in one."""


class Kind(StrEnum):
    """How a limit counts."""

    RATE = "rate"
    """A token bucket of `burst` calls, refilled with `amount` calls in `per` seconds."""
    WINDOW = "window"
    """At most `amount` in each window of `per` seconds. Windows begin at whole multiples since the epoch: days at 00:00 UTC."""
    CONCURRENCY = "concurrency"
    """At most `amount` calls open at once."""
    RUN = "run"
    """At most `amount` in one run."""
    RUN_TIME = "run_time"
    """No call later than `amount` seconds after the run's first."""
    IDENTICAL = "identical"
    """At most `amount` calls of one run with the same operation and parameters."""
    FLOW = "flow"
    """No call once the run has all labels in `after`: a flow rule. It counts nothing."""


class Measure(StrEnum):
    """What is counted."""

    CALLS = "calls"
    WRITES = "writes"
    DESTRUCTIVE = "destructive"
    RUNS = "runs"
    BYTES_OUT = "bytes_out"
    TOKENS = "tokens"
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    CACHED_TOKENS = "cached_tokens"
    USD = "usd"


TOKENS = frozenset({Measure.TOKENS, Measure.INPUT_TOKENS, Measure.OUTPUT_TOKENS, Measure.CACHED_TOKENS})
_OF_MODELS = TOKENS | {Measure.USD}
_BUDGETS = _OF_MODELS | {Measure.BYTES_OUT}

WORDS: Mapping[str, tuple[Kind, Measure]] = {
    "rate": (Kind.RATE, Measure.CALLS),
    "concurrency": (Kind.CONCURRENCY, Measure.CALLS),
    **{str(measure): (Kind.WINDOW, measure) for measure in Measure},
    "steps_per_run": (Kind.RUN, Measure.CALLS),
    "tokens_per_run": (Kind.RUN, Measure.TOKENS),
    "usd_per_run": (Kind.RUN, Measure.USD),
    "time_per_run": (Kind.RUN_TIME, Measure.CALLS),
    "identical_per_run": (Kind.IDENTICAL, Measure.CALLS),
    "approval": (Kind.WINDOW, Measure.CALLS),
    "label": (Kind.RUN, Measure.CALLS),
    "flow": (Kind.FLOW, Measure.CALLS),
}
"""What manifests may write under `limits`, and how each is counted; the last three are the broker's own: `once`, `labels`."""


_PER = {0: "", 1: "/s", 60: "/minute", 3600: "/hour", 86400: "/day"}


@dataclass(frozen=True, slots=True)
class Limit:
    """One bound, as a manifest or the platform policy writes it.

    `word` is the field that it was written in, `scope` whose it is (`agent/NAME`, `agent/NAME/TOOL`, `agent/NAME/TOOL/OPERATION`,
    `team/NAME`, `environment/NAME`), `rule` where it stands (`file#pointer`). `amount` is in the measure's unit (dollars in
    billionths, a run's time in seconds), `per` in seconds; `burst` is a rate's alone, `after` (labels) and `unless` (who may
    lift it) a flow rule's. `key` is what the ledger counts under.
    """

    word: str
    scope: str
    amount: int
    rule: str
    per: int = 0
    burst: int = 0
    after: tuple[str, ...] = ()
    unless: Approval | None = None
    kind: Kind = field(init=False)
    measure: Measure = field(init=False)
    key: str = field(init=False)

    def __post_init__(self) -> None:
        kind, measure = WORDS[self.word]
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "measure", measure)
        object.__setattr__(self, "key", f"{self.scope}:{measure}:{kind}:{self.per}")

    @property
    def code(self) -> Code:
        """What a call over it is denied with."""
        if self.kind is Kind.FLOW:
            return Code.FLOW_FORBIDDEN
        if self.word == "approval":
            return Code.APPROVAL_REQUIRED
        if self.kind is Kind.CONCURRENCY:
            return Code.CONCURRENCY_LIMITED
        if self.measure in _BUDGETS:
            return Code.BUDGET_EXHAUSTED
        return Code.RATE_LIMITED if self.kind in (Kind.RATE, Kind.WINDOW) else Code.STEPS_EXHAUSTED

    def said(self, amount: int) -> str:
        """An amount of what is counted, for people."""
        if self.kind is Kind.RUN_TIME:
            return f"{amount} s"
        if self.measure is Measure.BYTES_OUT:
            return _bytes(amount)
        return f"{amount / NANO:.6f}".rstrip("0").rstrip(".") + " USD" if self.measure is Measure.USD else f"{amount:,}"

    @property
    def written(self) -> str:
        """The limit as a manifest writes it: `calls: 20/hour`."""
        return f"{self.word}: {self.said(self.amount)}{_PER.get(self.per, f'/{self.per} s')}"

    def refusal(self, spent: int, needed: int, retry_after: float, trail: str = "") -> Decision:
        """The denial of a call for which there is no room; `trail` says how the run came under a flow rule."""
        if self.kind is Kind.FLOW:
            return deny(
                self.code, f"this run may not do that after it touched {' and '.join(self.after)}: {trail}", rule=self.rule
            )
        needs = f", and this call may need {self.said(needed)}" if needed > 1 else ""
        detail = f"no room under {self.written} of {self.scope}: {self.said(spent)} spent{needs}"
        return deny(self.code, detail, rule=self.rule, retry_after=math.ceil(retry_after))

    def bears_on(self, effect: Effect | None, *, model: bool) -> bool:
        """Whether calls with this effect are counted; `model` for calls of model providers.

        `effect` is None for a protocol's own housekeeping, which is no call: it has a rate and sends bytes, nothing else.
        """
        if effect is None:
            return self.kind is Kind.RATE or self.measure is Measure.BYTES_OUT
        if self.measure is Measure.WRITES:
            return effect is not Effect.READ
        if self.measure is Measure.DESTRUCTIVE:
            return effect is Effect.DESTRUCTIVE
        return model or self.measure not in _OF_MODELS


_FOREVER_S = 10**10  # in one window since the epoch, until the year 2286
_UNBOUNDED = 2**53


def once(approval_id: str, rule: str) -> Limit:
    """That an approval is good for one call: consumed like any limit, in the same step."""
    return Limit("approval", f"approval/{approval_id}", 1, rule, _FOREVER_S)


@cache
def label(name: str) -> Limit:
    """That a call gives its run this label: a counter that bounds nothing, so that a call given back takes its label along."""
    return Limit("label", f"label/{name}", _UNBOUNDED, "")


def _bytes(amount: int) -> str:
    """`50MiB` for a round number, as manifests write it; else all digits."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if amount and amount % size == 0:
            return f"{amount // size:,}{unit}"
    return f"{amount:,}"


@dataclass(frozen=True, slots=True)
class Price:
    """What a model costs, in billionths of a US dollar per million tokens.

    `cached` is for input read from a cache; `cache_write` for input written to one (Anthropic charges at most twice the input).
    """

    input: int
    output: int
    cached: int
    cache_write: int

    def of(self, usage: Usage) -> int:
        """The cost in billionths of a US dollar, rounded up."""
        plain = usage.input - usage.cached - usage.cache_write
        read = plain * self.input + usage.cached * self.cached + usage.cache_write * self.cache_write
        return -(-(read + usage.output * self.output) // 1_000_000)


def bound(model: ModelCall, price: Price | None) -> dict[Measure, int]:
    """The most that a model call may spend, by measure; no dollars where the model has no price."""
    most = Usage(model.input_tokens, (model.max_output or 0) * model.choices)
    # Whether input will be written to a cache, which may cost more, only the provider knows.
    dearest = replace(price, input=max(price.input, price.cached, price.cache_write)) if price else None
    return {**used(most, dearest), Measure.CACHED_TOKENS: most.input}


def used(usage: Usage, price: Price | None) -> dict[Measure, int]:
    """What a model call has spent, by measure; no dollars where the model has no price."""
    spent = {
        Measure.TOKENS: usage.input + usage.output,
        Measure.INPUT_TOKENS: usage.input,
        Measure.OUTPUT_TOKENS: usage.output,
        Measure.CACHED_TOKENS: usage.cached,
    }
    return {**spent, Measure.USD: price.of(usage)} if price else spent


def called(size: int) -> dict[Measure, int]:
    """What every call spends; `size` is what it sends, in bytes. Which of it counts is up to `bears_on`."""
    return {Measure.CALLS: 1, Measure.WRITES: 1, Measure.DESTRUCTIVE: 1, Measure.BYTES_OUT: size}


def unpriced(limits: Iterable[Limit], model: str) -> Decision | None:
    """The denial of a call whose cost nobody knows, where dollars are limited: that limit could not be kept."""
    limit = next((limit for limit in limits if limit.measure is Measure.USD), None)
    why = f"the platform's prices don't have the model {model!r}, so its cost can't be held to {{}} of {{}}"
    return deny(Code.BUDGET_EXHAUSTED, why.format(limit.word, limit.scope), rule=limit.rule) if limit else None
