"""`broker agents`: who the agents are, and what each has left to spend; asked of the running broker."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import orjson

from broker.admin.client import ask
from broker.cli import options
from broker.errors import BrokerError, UsageError

_NONE = "-"
_AGENTS = ("NAME", "OWNER", "TOKENS TODAY", "USD TODAY", "TOOLS")
_LIMITS = ("LIMIT", "SCOPE", "SPENT", "LEFT", "RENEWS")


@click.group()
def agents() -> None:
    """Show the agents of a running broker and how their limits stand."""


@agents.command("list")
@options.state
@options.as_json
def list_(*, state: Path, as_json: bool) -> None:
    """List the agents.

    TOKENS and USD are what was used today (UTC), where the agent's manifest limits them by the day.
    """
    found = _asked(state, "/agents")
    click.echo(orjson.dumps(found) if as_json else table(_AGENTS, [_agent(each) for each in found["agents"]]))
    _complain(found)


@agents.command()
@click.argument("name")
@options.state
@options.as_json
def show(*, name: str, state: Path, as_json: bool) -> None:
    """Show who NAME is, what it may call, and of each limit what is spent, what is left and when it renews.

    Of limits per run the broker keeps no sum. With --json: agent {name, spiffe, owner, oncall}, token, namespace, tools
    {tool: [operation]}, and limits [{limit, written, scope, rule, unit, amount, spent, left, renews, renews_in, per_run}].
    """
    found = _asked(state, f"/agents/{name}")
    if not found:
        raise UsageError(f"no manifest names an agent {name!r}", "see `broker agents list`")
    click.echo(orjson.dumps(found) if as_json else "\n".join(_described(found)))
    _complain(found)


def _asked(state: Path, target: str) -> dict[str, Any]:
    folder = options.broker_state(state)
    if (answer := ask(folder.control_socket, "GET", target)) is None:
        raise UsageError(f"no broker runs on {folder.root}", "start it with `broker up`, or name another's folder with --state")
    return answer


def _complain(found: dict[str, Any]) -> None:
    if found["unavailable"]:
        raise BrokerError(f"what is spent can't be told: {found['unavailable']}")


def _agent(each: dict[str, Any]) -> tuple[str, ...]:
    return (
        each["name"],
        each["owner"],
        _amount(each["tokens"], ""),
        _amount(each["usd"], "usd"),
        ", ".join(each["tools"]) or _NONE,
    )


def _described(found: dict[str, Any]) -> Iterator[str]:
    agent = found["agent"]
    proofs = {"spiffe": agent["spiffe"], "token": "token" if found["token"] else "", "namespace": found["namespace"]}
    identity = ", ".join(proof if proof == name else f"{name} {proof}" for name, proof in proofs.items() if proof)
    yield f"agent     {agent['name']}"
    yield f"owner     {agent['owner']}, on call {agent['oncall']}"
    yield f"identity  {identity}"
    tools = [f"{tool}: {', '.join(operations) or 'no operations'}" for tool, operations in found["tools"].items()]
    for index, line in enumerate(tools or ["none"]):
        yield f"{'' if index else 'tools':<10}{line}"
    if found["limits"]:
        yield ""
        yield table(_LIMITS, [_row(limit) for limit in found["limits"]])
    else:
        yield "limits    none"


def _row(limit: dict[str, Any]) -> tuple[str, ...]:
    numbers = tuple(_amount(limit[name], limit["unit"]) for name in ("spent", "left"))
    if limit["per_run"]:
        numbers = "per run", ""
    return limit["written"], limit["scope"], *numbers, _renewal(limit)


def _renewal(limit: dict[str, Any]) -> str:
    if limit["renews"] is None:
        return ""
    if not limit["renews_in"]:
        return "now"
    local = datetime.fromisoformat(limit["renews"]).astimezone()
    return f"{local:%Y-%m-%d %H:%M}, in {span(limit['renews_in'])}"


def span(seconds: float) -> str:
    """A time in its two largest units: `5 h 12 min`."""
    parts, rest = [], max(1, round(seconds))
    for word, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        number, rest = divmod(rest, size)
        parts.append(f"{number} {word}" if number else "")
    first = next(index for index, part in enumerate(parts) if part)
    return " ".join(part for part in parts[first : first + 2] if part)


def _amount(amount: float | None, unit: str) -> str:
    """An amount for people: dollars to a ten-thousandth, bytes in the largest binary unit that they fill."""
    if amount is None:
        return _NONE
    if unit == "usd":
        return f"{amount:,.2f} USD" if amount >= 1 or not amount else f"{amount:.4f} USD"
    if unit == "bytes":
        power = min(max(int(amount).bit_length() - 1, 0) // 10, 4)
        return f"{amount / 1024**power:,.1f} {'KMGT'[power - 1]}iB" if power else f"{amount:,} B"
    return f"{amount:,} s" if unit == "seconds" else f"{amount:,}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under their head in aligned columns; the head is bold on a terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join((click.style(lines[0], bold=True), *lines[1:]))
