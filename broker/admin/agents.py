"""What an operator is told of agents: who they are, what they may do, and how their limits stand.

Law: a ledger that can't be asked takes nothing away of the rest; its numbers are null then, and `unavailable` says why.
"""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from broker.audit.record import timestamp
from broker.containment.standing import EVERYONE, Standing
from broker.ledger.base import Balance, Ledger, LedgerUnavailable
from broker.ledger.memory import PER_RUN
from broker.policy.limits import NANO, TOKENS, Kind, Limit, Measure
from broker.policy.snapshot import Agent, PolicySnapshot

_DAY_S = 86_400
_COUNTED = ("tokens", "usd")
_UNITS = {**dict.fromkeys(TOKENS, "tokens"), Measure.USD: "usd", Measure.BYTES_OUT: "bytes", Measure.RUNS: "runs"}


async def shown(agent: Agent, ledger: Ledger, standing: Standing, now: float) -> dict[str, Any]:
    """One agent. `now` is the ledger's time, in seconds since the epoch.

    Each of `limits` has `amount`, `spent`, `left` in its `unit` (`calls`, `runs`, `tokens`, `usd`, `bytes`, `seconds`), `renews`
    (RFC 3339) and `renews_in` (seconds); null where nothing renews or nothing is known. `per_run` limits have no numbers.
    """
    balances, unavailable = await _balances(agent.limits, ledger, now)
    return {
        "agent": agent.described,
        "token": agent.token,
        "namespace": agent.namespace,
        "tools": {tool: list(grants) for tool, grants in agent.tools.items()},
        "limits": [_limit(limit, balances.get(limit.key), now) for limit in agent.limits],
        "restrictions": [asdict(each) for each in (*standing.of(agent.name), *standing.of(EVERYONE))],
        "unavailable": unavailable,
    }


async def listed(snapshot: PolicySnapshot, ledger: Ledger, standing: Standing, now: float) -> dict[str, Any]:
    """All agents: `name`, `owner`, `tools`, `standing`, and what they used today of `tokens` and `usd` where a limit counts it.

    `standing` has each kind of restriction that holds: `revoke_agent`, `revoke_run`, `hold`, `read_only`; none is free.
    """
    every = snapshot.agents.values()
    daily = {agent.name: _daily(agent) for agent in every}
    balances, unavailable = await _balances((limit for limits in daily.values() for limit in limits.values()), ledger, now)
    used = {
        name: {word: _amount(limit, balances[limit.key].spent) for word, limit in limits.items() if limit.key in balances}
        for name, limits in daily.items()
    }
    unknown = dict.fromkeys(_COUNTED)
    agents = [
        {
            "name": agent.name,
            "owner": agent.owner,
            "tools": [*agent.tools],
            "standing": sorted({str(each.action) for each in (*standing.of(agent.name), *standing.of(EVERYONE))}),
            **unknown,
            **used[agent.name],
        }
        for agent in every
    ]
    return {"agents": agents, "unavailable": unavailable}


def _daily(agent: Agent) -> dict[str, Limit]:
    own = (limit for limit in agent.limits if limit.scope == f"agent/{agent.name}" and limit.per == _DAY_S)
    return {limit.word: limit for limit in own if limit.word in _COUNTED}


async def _balances(limits: Iterable[Limit], ledger: Ledger, now: float) -> tuple[dict[str, Balance], str]:
    try:
        return {each.limit.key: each for each in await ledger.balances(tuple(limits), now)}, ""
    except LedgerUnavailable as error:
        return {}, str(error)


def _limit(limit: Limit, balance: Balance | None, now: float) -> dict[str, Any]:
    most = limit.burst if limit.kind is Kind.RATE else limit.amount
    renews = balance.renews if balance else 0
    return {
        "limit": limit.word,
        "written": limit.written,
        "scope": limit.scope,
        "rule": limit.rule,
        "unit": "seconds" if limit.kind is Kind.RUN_TIME else _UNITS.get(limit.measure, "calls"),
        "amount": _amount(limit, most),
        "spent": _amount(limit, balance.spent) if balance else None,
        "left": _amount(limit, max(0, most - balance.spent)) if balance else None,
        "renews": timestamp(renews) if renews else None,
        "renews_in": round(max(0.0, renews - now), 3) if renews else None,
        "per_run": limit.kind in PER_RUN,
    }


def _amount(limit: Limit, amount: int) -> float:
    return amount / NANO if limit.measure is Measure.USD else amount
