"""From written containment, flow and alerts to what the snapshot holds."""

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

from broker.manifest import platform
from broker.manifest.admission import Source
from broker.policy.containment import DEFAULTS, PAGERDUTY, Alerting, Decoys, Detector, PagerDutySink, Route, Rule, WebhookSink

Anchored = Callable[[Any], Any]
"""Makes the file that a reference names absolute: it is relative to the manifests folder."""

_Written = platform.Counted | platform.Different | platform.Instant | platform.Honeytoken


def rules(source: Source | None, spec: platform.Containment) -> tuple[Rule, ...]:
    """Of each detector what is written, or else its defaults."""
    return tuple(rule for detector in Detector for rule in _of(source, detector, getattr(spec, detector)))


def _of(source: Source | None, detector: Detector, written: _Written) -> Iterator[Rule]:
    defaults = [rule for rule in DEFAULTS if rule.detector is detector]
    if written is None or source is None:
        yield from defaults
        return
    one = not isinstance(written, tuple)
    for index, each in enumerate((written,) if isinstance(written, platform.InstantRule) else written):
        place = source.rule("spec", "containment", detector, *(() if one else (index,)))
        usual, count, window = defaults[0], getattr(each, "count", None), getattr(each, "window", None)
        yield Rule(
            detector,
            each.action or usual.action,
            usual.count if count is None else count,
            usual.window if window is None else window,
            each.cooldown if "cooldown" in each.model_fields_set else usual.cooldown,
            each.shadow,
            place,
        )


def decoys(spec: platform.Containment, anchored: Anchored) -> Decoys:
    """What no honest call touches."""
    written = spec.honeytoken or platform.Honeytoken.model_construct()
    return Decoys(frozenset(written.hosts), frozenset(written.tools), tuple(map(anchored, written.credentials)))


def alerting(spec: platform.Alerts, anchored: Anchored) -> Alerting:
    """Who hears of what."""
    sinks: dict[str, PagerDutySink | WebhookSink] = {
        name: WebhookSink(each.url, anchored(each.secret), anchored(each.ca)["file"] if each.ca else "")
        for name, each in spec.webhooks.items()
    }
    if pager := spec.pagerduty:
        oncall = {name: anchored(key) for name, key in pager.oncall.items()}
        sinks[PAGERDUTY] = PagerDutySink(pager.url, anchored(pager.routing_key), MappingProxyType(oncall))
    routes = (
        Route(each.to, each.match.severity, each.match.team, each.match.oncall, each.match.agent, each.match.kind)
        for each in spec.routes
    )
    return Alerting(tuple(routes), MappingProxyType(sinks), spec.fallback, spec.per_minute)
