"""What a call spent, as the record says it, and the embedded ledger rebuilt from what the record says.

Laws: the two directions stand side by side here, so that what was written is what is counted after a restart. What every call
spends (one call, one write if it writes) is not written: the record's effect says it. A call with a decision and no outcome has
spent all that it reserved. Nothing that was open before a restart is open after it. A call counts whether or not its agent may
still make it.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from broker.ledger.base import Refused, Spend
from broker.ledger.memory import MemoryLedger
from broker.policy.limits import NANO, Limit, Measure, called, label, used
from broker.policy.snapshot import PolicySnapshot
from broker.policy.types import Effect, Json, Usage, Verdict

_ALWAYS = frozenset(called(0)) - {Measure.BYTES_OUT}


def reserved(amounts: Mapping[Measure, int], *, degraded: bool) -> dict[str, Json]:
    """The record's `limits` of a call that was let go: the upper bound of what it may spend."""
    noted = {str(name): _written(name, amount) for name, amount in amounts.items() if name not in _ALWAYS}
    return {"reserved": noted, "degraded": True} if degraded else {"reserved": noted}


def refused(answer: Refused) -> dict[str, Json]:
    """The record's `limits` of a call that a limit refused."""
    limit, measure = answer.limit, answer.limit.measure
    numbers = {"amount": limit.amount, "spent": answer.spent, "needed": answer.needed}
    said = {name: _written(measure, number) for name, number in numbers.items()}
    return {"refused": {"limit": limit.word, "scope": limit.scope, **said, "retry_after": round(answer.retry_after, 3)}}


def _written(measure: Measure, amount: int) -> Json:
    return amount / NANO if measure is Measure.USD else amount


def _read(noted: Mapping[str, Any]) -> dict[Measure, int]:
    return {Measure(name): round(amount * NANO) if name == Measure.USD else amount for name, amount in noted.items()}


def replay(ledger: MemoryLedger, records: Iterable[Mapping[str, Any]], snapshot: PolicySnapshot) -> None:
    """Count what an audit log's records, in order, say was spent, under the limits that are in force now."""
    limits = _by_scope(snapshot)
    for record in records:
        if record["event"] == "decision" and record["verdict"] in (Verdict.ALLOW, Verdict.WOULD_DENY):
            # Where several brokers count, others may have kept the run going: how far it was is in the record.
            ledger.take(_spend(record, limits, snapshot.environment), _seconds(record["time"]), record["step"] or 0)
        elif record["event"] == "outcome":
            ledger.settle(record["decision_id"], _spent(record), _seconds(record["time"]))
    ledger.grants.clear()
    ledger.open.clear()


def _by_scope(snapshot: PolicySnapshot) -> dict[str, dict[Limit, None]]:
    found: dict[str, dict[Limit, None]] = {}
    for agent in snapshot.agents.values():
        grants = (grant.limits for tool in agent.tools.values() for grant in tool.values())
        labels = (limit for limits in grants for limit in limits if limit.word == "label")
        for limit in (*agent.limits, *labels):
            found.setdefault(limit.scope, {})[limit] = None
    return found


def _spend(record: Mapping[str, Any], limits: Mapping[str, Iterable[Limit]], environment: str) -> Spend:
    agent, tool, operation = record["agent"], record["tool"], f"{record['tool']}/{record['operation']}"
    own = f"agent/{agent['name']}"
    given = (label(name).scope for name in record["data"])
    scopes = (f"{own}/{operation}", f"{own}/{tool}", own, f"team/{agent['owner']}", f"environment/{environment}", *given)
    # A protocol's own traffic has no effect, and is no step of a run.
    effect = Effect(record["effect"]) if record["effect"] else None
    model = record.get("model") is not None
    bearing = tuple(each for scope in scopes for each in limits.get(scope, ()) if each.bears_on(effect, model=model))
    noted = _read((record.get("limits") or {}).get("reserved", {}))
    run = (record["run_id"] or "") if effect else None
    fingerprint = f"{operation}/{record['args_hash']}"
    return Spend(record["decision_id"], agent["name"], bearing, {**called(0), **noted}, run, fingerprint)


def _spent(record: Mapping[str, Any]) -> dict[Measure, int]:
    tokens, usd = record.get("tokens"), record.get("usd")
    if not tokens:
        return {}
    told = used(Usage(tokens["input"], tokens["output"], tokens["cached"]), None)
    return told if usd is None else {**told, Measure.USD: round(usd * NANO)}


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
