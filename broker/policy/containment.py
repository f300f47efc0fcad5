"""What stops an agent that turns anomalous, as data: detectors' rules, decoys, and how an agent stands.

Law: a rule says when it fires and what then happens; nothing here fires. An agent's standing only narrows what its manifest
gives: no action widens anything.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Action(StrEnum):
    """What happens when a rule fires; each holds until a person releases it, but for `alert`, which only tells."""

    ALERT = "alert"
    READ_ONLY = "read_only"
    HOLD = "hold"
    REVOKE_RUN = "revoke_run"
    REVOKE_AGENT = "revoke_agent"


class Detector(StrEnum):
    """What is looked for."""

    DENIED_BURST = "denied_burst"
    """`count` calls in `window` that the manifest does not permit or that can't be read."""
    PROBING = "probing"
    """`count` different hosts, tools and operations in `window` that are not declared for the agent."""
    UPSTREAM_FAILURES = "upstream_failures"
    """`count` calls of one tool, one after the other, that failed at the tool."""
    IDENTICAL_CALLS = "identical_calls"
    """`count` calls with the same operation and parameters in one run in `window`."""
    BUDGET_EXHAUSTED = "budget_exhausted"
    """A budget, or what a run may spend, has no room left."""
    WRITE_SPIKE = "write_spike"
    """`count` calls with effect write or destructive in `window`."""
    DESTRUCTIVE_SPIKE = "destructive_spike"
    """`count` calls with effect destructive in `window`."""
    UNDECLARED_HOST = "undeclared_host"
    """The first sight of a host that is not declared, for each agent."""
    HONEYTOKEN = "honeytoken"
    """A decoy was touched, which no honest call does."""
    SECRET_IN_REQUEST = "secret_in_request"  # noqa: S105 - a detector's name
    """Something in a request has the shape of a known kind of secret."""
    CREDENTIAL_IN_REQUEST = "credential_in_request"
    """A request holds a credential that the broker injected: it has leaked to the agent."""


COUNTED = frozenset(
    {
        Detector.DENIED_BURST, Detector.PROBING, Detector.UPSTREAM_FAILURES, Detector.IDENTICAL_CALLS, Detector.WRITE_SPIKE,
        Detector.DESTRUCTIVE_SPIKE,
    }
)  # fmt: skip
"""Those that fire at a number; the others fire at once."""
MOST_TARGETS = 64
"""Different targets of one agent that are told apart, and so the most that a rule about probing may count."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When a detector fires, and what then happens. `window` and `cooldown` in seconds; a streak (`window` 0) has no window.

    After it fired it is quiet about the same agent for `cooldown`. `shadow`: it records and alerts what it would have done.
    `rule` is where it stands (`file#pointer`), empty for a default.
    """

    detector: Detector
    action: Action = Action.ALERT
    count: int = 1
    window: int = 0
    cooldown: int = 600
    shadow: bool = False
    rule: str = ""


_MINUTE, _HOUR, _DAY = 60, 3600, 86400

DEFAULTS: tuple[Rule, ...] = (
    Rule(Detector.DENIED_BURST, Action.ALERT, 20, _MINUTE),
    Rule(Detector.DENIED_BURST, Action.ALERT, 200, _DAY, cooldown=_DAY),
    Rule(Detector.PROBING, Action.ALERT, 8, 10 * _MINUTE),
    Rule(Detector.PROBING, Action.ALERT, 20, _DAY, cooldown=_DAY),
    Rule(Detector.UPSTREAM_FAILURES, Action.ALERT, 20),
    Rule(Detector.IDENTICAL_CALLS, Action.ALERT, 60, 5 * _MINUTE, cooldown=_HOUR),
    Rule(Detector.BUDGET_EXHAUSTED, Action.ALERT, cooldown=_HOUR),
    Rule(Detector.WRITE_SPIKE, Action.ALERT, 300, 10 * _MINUTE, cooldown=_HOUR),
    Rule(Detector.DESTRUCTIVE_SPIKE, Action.ALERT, 20, 10 * _MINUTE),
    Rule(Detector.DESTRUCTIVE_SPIKE, Action.ALERT, 200, _DAY, cooldown=_DAY),
    Rule(Detector.UNDECLARED_HOST, Action.ALERT, cooldown=0),
    Rule(Detector.HONEYTOKEN, Action.REVOKE_AGENT),
    Rule(Detector.SECRET_IN_REQUEST, Action.ALERT),
    Rule(Detector.CREDENTIAL_IN_REQUEST, Action.REVOKE_AGENT),
)
"""What is on without a word about it. Only what no honest call does revokes; of the rest people are told.

No number of denials revokes: a batch of thousands has all of its calls denied within seconds after its schema was tightened.
What they do to traces of honest work and of attacks is in docs/reference/detectors.md.
"""


@dataclass(frozen=True, slots=True)
class Decoys:
    """What no honest call touches: host names, tools of the catalog, and references to credentials (`{env: …}`, `{file: …}`)."""

    hosts: frozenset[str] = frozenset()
    tools: frozenset[str] = frozenset()
    credentials: tuple[Mapping[str, str], ...] = field(default=(), hash=False)


NO_DECOYS = Decoys()


class Severity(StrEnum):
    """How much an alert matters."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class Route:
    """Alerts that have all of this (an empty part fits all), and are at least this severe, go to the sink `to`."""

    to: str
    severity: Severity = Severity.LOW
    team: str = ""
    oncall: str = ""
    agent: str = ""
    kind: str = ""


@dataclass(frozen=True, slots=True)
class PagerDutySink:
    """PagerDuty's Events API v2: references to routing keys, the default one and those of on-call contacts."""

    url: str
    routing_key: Mapping[str, str] = field(hash=False)
    oncall: Mapping[str, Mapping[str, str]] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class WebhookSink:
    """A receiver of signed alerts (Standard Webhooks): a reference to its secret, and its trust roots (a file's path) if any."""

    url: str
    secret: Mapping[str, str] = field(hash=False)
    ca: str = ""


PAGERDUTY = "pagerduty"
"""The name under which routes know PagerDuty."""


@dataclass(frozen=True, slots=True)
class Alerting:
    """Who hears of what: the first route that fits. `per_minute` bounds what one sink gets; `fallback` names a sink, or none."""

    routes: tuple[Route, ...] = ()
    sinks: Mapping[str, PagerDutySink | WebhookSink] = field(default_factory=dict, hash=False)
    fallback: str = ""
    per_minute: int = 30


NO_ALERTING = Alerting()
