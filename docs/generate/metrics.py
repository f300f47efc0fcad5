"""The metrics, from a broker in which everything has happened."""

from dataclasses import replace
from typing import Any

from broker.audit.record import Ending
from broker.ledger.base import Balance
from broker.metrics import Metrics, Standing
from broker.policy.limits import Limit
from broker.policy.types import Usage
from docs.generate.page import MADE, NOW, cell


def metrics() -> str:
    """Every metric with its type and labels, from what a broker shows once everything has happened in it."""
    families = [family for family in _shown_metrics().registry.collect() if family.name.startswith("broker_")]
    rows = "\n".join(_metric(family) for family in sorted(families, key=lambda family: family.name))
    return (
        f"{MADE}# Metrics\n\n"
        "`GET /metrics` on the admin port, in Prometheus' text format. A label's value is a name from the manifests, "
        "[a code](codes.md) or a word that stands here, never what an agent says. Counters begin at 0 with each start of a "
        "broker. Beside these there are the Python client's `process_…`. [A dashboard](../../compose/grafana/README.md) shows "
        f"them.\n\n| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n{rows}\n\n"
        "`scope` is `agent/NAME`, `agent/NAME/TOOL`, `agent/NAME/TOOL/OPERATION`, `team/NAME` or `environment/NAME`, and `limit` "
        "the word in the manifest: `tokens`, `usd`, `calls`, … Only limits by the window are shown; "
        "`broker agents show NAME` tells all of them.\n"
    )


def _metric(family: Any) -> str:
    if not family.samples:
        raise SystemExit(f"docs/generate/metrics.py lets nothing happen that {family.name} would count")
    labels = dict.fromkeys(label for sample in family.samples for label in sample.labels if label != "le")
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return f"| `{name}` | {family.type} | {', '.join(f'`{label}`' for label in labels)} | {cell(family.documentation)} |"


def _shown_metrics() -> Metrics:
    shown = Metrics()
    shown.decided("allow", "", 120_000)
    shown.waited_for_ledger(900_000)
    shown.ended("refund-bot", "openai", "gpt-5-mini", Ending(status=500, usage=Usage(9, 6, 3), usd=0.01), "5xx")
    balance = Balance(Limit("tokens", "agent/refund-bot", 2_000_000, "", per=86_400), 15, NOW)
    shown.found("probing", "alert")
    now = Standing("sha256:53b9…", current=True, accepted=True, audit_writable=True, open_calls=0, balances=[balance])
    shown.exposition(replace(now, restrictions={"revoke_agent": 1}, alerts={("pagerduty", "delivered"): 1}))
    return shown
