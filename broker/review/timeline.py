"""One run of an agent as a timeline: each call with how it ended, and what was done about the run in between.

Laws: pure; records in the log's order come in, and what is not there is not made up: a call without an outcome is open, or the
broker fell before it could write one. A run ID only groups, so two agents that use the same one have two runs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from broker.errors import counted
from broker.review.clusters import named


@dataclass(slots=True)
class Run:
    """A run. `entries` are decisions, each with its outcome's record as `outcome` (None where there is none), and notices."""

    agent: str
    run_id: str
    began: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    spent: Counter[str] = field(default_factory=Counter)
    last: str = ""

    @property
    def document(self) -> dict[str, Any]:
        """For programs; `took_s` in seconds, `usd` in dollars; `tokens` are empty where no model was called."""
        calls = [entry for entry in self.entries if entry.get("event") == "decision"]
        usd = self.spent["usd"] or None
        return {
            "agent": self.agent,
            "run_id": self.run_id,
            "began": self.began,
            "took_s": round(_seconds(self.began, self.last), 6),
            "calls": len(calls),
            "denied": sum(call.get("verdict") in ("deny", "hold") for call in calls),
            "tokens": {name: amount for name, amount in self.spent.items() if name != "usd"},
            "usd": usd,
            "entries": self.entries,
        }


def runs(records: Iterable[Mapping[str, Any]], run_id: str) -> list[Run]:
    """The runs of this name, by the agent."""
    found: dict[str, Run] = {}
    open_calls: dict[str, dict[str, Any]] = {}
    for record in filter(_sound, records):
        agent = str((record.get("agent") or {}).get("name") or "")
        run = found.setdefault(agent, Run(agent, run_id, record["time"]))
        name = str(record.get("decision_id"))
        call = open_calls.get(name) if record.get("event") == "outcome" else None
        run.last = record["time"]
        if call is not None:
            call["outcome"] = dict(record)
        else:
            run.entries.append({**record, "outcome": None})
            if record.get("event") == "decision":
                open_calls[name] = run.entries[-1]
        run.spent.update({word: amount for word, amount in (record.get("tokens") or {}).items() if word != "estimated"})
        run.spent["usd"] += record.get("usd") or 0
    return list(found.values())


def _sound(record: Mapping[str, Any]) -> bool:
    """Whether the numbers are where they belong; in a log that somebody changed they may not be, which `verify` tells."""
    parts = [record.get(name) or {} for name in ("agent", "tokens", "upstream")]
    numbers = [record.get("usd") or 0, *(value for part in parts[1:] if isinstance(part, Mapping) for value in part.values())]
    return all(isinstance(part, Mapping) for part in parts) and all(isinstance(each, int | float) for each in numbers)


def told(run: Run) -> Iterator[str]:
    """A run for people, line by line; neither redacted nor printable yet."""
    about = run.document
    yield f"agent   {about['agent'] or '(not proven)'}"
    yield f"run     {about['run_id']}"
    yield f"began   {about['began']}, took {about['took_s']:.3f} s"
    yield f"calls   {about['calls']}, {about['denied']} denied"
    if tokens := about["tokens"]:
        price = "" if about["usd"] is None else f", {about['usd']:.4f} USD"
        yield f"used    {', '.join(f'{amount:,} {name}' for name, amount in tokens.items())} tokens{price}"
    for entry in run.entries:
        yield f"{_seconds(about['began'], entry['time']):>+10.3f} s  {'  '.join(filter(None, _entry(entry)))}"


def _entry(entry: Mapping[str, Any]) -> Iterator[str]:
    if entry.get("event") != "decision":
        yield f"     {entry.get('event')}"
        yield str(entry.get("kind") or "")
        yield str(entry.get("detail") or "")
        return
    yield f"{entry.get('step') or '-'!s:>3}  {entry.get('verdict')!s:<10}"
    yield str(entry.get("code") or "")
    yield named(*(str(entry.get(name) or "") for name in ("tool", "operation", "host")))
    yield _ending(entry)
    yield str(entry.get("decision_id"))


def _ending(entry: Mapping[str, Any]) -> str:
    if entry.get("verdict") not in ("allow", "would_deny"):
        return ""
    if not (outcome := entry["outcome"]):
        return "→ no end in the record"
    upstream = outcome.get("upstream") or {}
    status = upstream.get("status") or "no answer"
    took = f"{upstream.get('duration_ms') or 0:.0f} ms, {counted(upstream.get('bytes') or 0, 'byte')}"
    return f"→ {' '.join(str(word) for word in (status, outcome.get('code')) if word)}, {took}"


def _seconds(began: str, then: str) -> float:
    return (datetime.fromisoformat(then) - datetime.fromisoformat(began)).total_seconds()
