"""`broker agents`: who the agents are, how they and their limits stand; and the kill switch."""

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click
import orjson

from broker.admin.client import Refused, ask
from broker.cli import options
from broker.containment.response import Containment
from broker.containment.standing import EVERYONE
from broker.errors import BrokerError, UsageError
from broker.manifest.findings import printable
from broker.manifest.load import load

_AGENTS = ("NAME", "OWNER", "STANDING", "TOKENS TODAY", "USD TODAY", "TOOLS")
_LIMITS = ("LIMIT", "SCOPE", "SPENT", "LEFT", "RENEWS")


@click.group()
def agents() -> None:
    """Show the agents and their limits; revoke and release them."""


@agents.command("list")
@options.state
@options.as_json
def list_(*, state: Path, as_json: bool) -> None:
    """List the agents.

    TOKENS and USD are what was used today (UTC), where the agent's manifest limits them by the day.
    """
    found = _asked(state, "/agents")
    _tell(found, table(_AGENTS, [_agent(each) for each in found["agents"]]), as_json=as_json)


@agents.command()
@click.argument("name")
@options.state
@options.as_json
def show(*, name: str, state: Path, as_json: bool) -> None:
    """Show who NAME is, what it may call, and how its limits stand.

    That is of each limit what is spent, what is left and when it renews; of limits per run the broker keeps no sum. With
    --json: agent {name, spiffe, owner, oncall}, token, namespace, tools {tool: [operation]}, and limits [{limit, written,
    scope, rule, unit, amount, spent, left, renews, renews_in, per_run}].
    """
    if not (found := _asked(state, f"/agents/{name}")):
        raise UsageError(f"no manifest names an agent {name!r}", "see `broker agents list`")
    _tell(found, described(found), as_json=as_json)


_reason = click.option("--reason", required=True, help="Why; it is recorded, and told to whoever is paged.")
_by = click.option("--as", "by", metavar="PERSON", default="", help="Who does it; the user of this terminal unless given.")


@agents.command()
@click.argument("name", required=False)
@_reason
@click.option("--run", "run_id", metavar="ID", help="Only this run; an empty ID is for the agent's calls without one.")
@click.option("--all", "everyone", is_flag=True, help="All agents: break-glass.")
@_by
@options.manifests
@options.state
@options.as_json
def revoke(
    *, name: str | None, reason: str, run_id: str | None, everyone: bool, by: str, manifests: Path, state: Path, as_json: bool
) -> None:
    """Revoke the agent NAME, now.

    New calls are denied, open ones cut, its credentials and tokens taken back. It holds until `broker agents release`, also
    over restarts, and on all brokers that share a Redis. Where no broker runs on this state, it holds from the next start; a
    NAME that is not in the manifests is revoked all the same, with a warning.
    """
    who, said = _target(name, reason, run_id, everyone=everyone)

    def offline(held: Containment, me: str) -> None:
        if not everyone:
            _warn_of_unknown(who, manifests)
        held.revoke(who, run_id, reason, me)

    folder = options.broker_state(state)
    done = options.act(folder, f"/agents/{who}/revoke", said, offline, by)
    words = "all agents are" if everyone else f"{who} is" if run_id is None else f"run {run_id!r} of {who} is"
    click.echo(orjson.dumps(done or {"agent": who, "revoked": said}) if as_json else f"{words} revoked")
    if done is None:
        click.echo("no broker runs on this state: it holds from the next start", err=True)


@agents.command()
@click.argument("name", required=False)
@_reason
@click.option("--run", "run_id", metavar="ID", help="Only what holds for this run.")
@click.option("--all", "everyone", is_flag=True, help="What holds for all agents at once; not what holds for one by its name.")
@_by
@options.state
@options.as_json
def release(*, name: str | None, reason: str, run_id: str | None, everyone: bool, by: str, state: Path, as_json: bool) -> None:
    """Let the agent NAME go on.

    What holds for it and for its runs is lifted. It needs a new token.
    """
    who, said = _target(name, reason, run_id, everyone=everyone)
    gone: list[Any] = []
    folder = options.broker_state(state)
    done = options.act(
        folder, f"/agents/{who}/release", said, lambda held, me: gone.extend(held.release(who, run_id, reason, me)), by
    )
    if done is None and not gone:
        raise Refused(f"nothing holds for {who!r} by its name")
    shown = "all agents are" if everyone else f"{who} is"
    click.echo(orjson.dumps(done or {"agent": who, "released": len(gone)}) if as_json else f"{shown} released")


def _target(name: str | None, reason: str, run_id: str | None, *, everyone: bool) -> tuple[str, dict[str, Any]]:
    """Whom it is about, and what the broker is told."""
    if bool(name) is everyone or (everyone and run_id is not None):
        raise UsageError("it is about one agent, perhaps one of its runs, or about all", "write a NAME, or --all")
    if not reason.strip():
        raise UsageError("a reason is needed; it is recorded", "write --reason")
    return EVERYONE if everyone else name or "", {"reason": reason, **({} if run_id is None else {"run_id": run_id})}


def _warn_of_unknown(name: str, manifests: Path) -> None:
    """A running broker knows its agents; without one, a name that is only mistyped is revoked, and nobody stopped."""
    try:
        snapshot = load(manifests).snapshot
    except UsageError:
        snapshot = None
    if snapshot is None:
        click.echo(f"the manifests in {manifests} can't be read: whether one names {name!r} was not checked", err=True)
    elif name not in snapshot.agents:
        click.echo(printable(f"warning: no manifest in {manifests} names an agent {name!r}; is it spelled so?"), err=True)


def _asked(state: Path, target: str) -> dict[str, Any]:
    folder = options.broker_state(state)
    if (answer := ask(folder.control_socket, "GET", target)) is None:
        raise UsageError(f"no broker runs on {folder.root}", "start it with `broker up`, or name another's folder with --state")
    return answer


def _tell(found: dict[str, Any], lines: Iterable[str], *, as_json: bool) -> None:
    click.echo(orjson.dumps(found) if as_json else "\n".join(lines))
    if found["unavailable"]:
        raise BrokerError(f"what is spent can't be told: {found['unavailable']}")


def _agent(each: dict[str, Any]) -> tuple[str, ...]:
    standing = ", ".join(each["standing"]) or "-"
    return (
        each["name"],
        each["owner"],
        standing,
        amount(each["tokens"], ""),
        amount(each["usd"], "usd"),
        ", ".join(each["tools"]) or "-",
    )


def described(found: dict[str, Any]) -> Iterator[str]:
    """One agent, line for line."""
    agent = found["agent"]
    proofs = (f"spiffe {agent['spiffe']}", "token", f"namespace {found['namespace']}")
    held = (agent["spiffe"], found["token"], found["namespace"])
    yield f"agent     {agent['name']}"
    yield f"owner     {agent['owner']}, on call {agent['oncall']}"
    yield f"identity  {', '.join(proof for proof, has in zip(proofs, held, strict=True) if has)}"
    tools = [f"{tool}: {', '.join(operations) or 'no operations'}" for tool, operations in found["tools"].items()]
    yield "tools     " + ("\n" + " " * 10).join(tools or ["none"])
    for held in found["restrictions"]:
        of = "" if held["run_id"] is None else f" {held['run_id'] or '(calls without a run ID)'}"
        yield printable(f"standing  {held['action']}{of}: {held['reason']} (by {held['by']})")
    if found["limits"]:
        yield ""
        yield from table(_LIMITS, [_limit(limit) for limit in found["limits"]])
    else:
        yield "limits    none"


def _limit(limit: dict[str, Any]) -> tuple[str, ...]:
    numbers = ("per run", "") if limit["per_run"] else (amount(limit[name], limit["unit"]) for name in ("spent", "left"))
    return limit["written"], limit["scope"], *numbers, _renewal(limit)


def _renewal(limit: dict[str, Any]) -> str:
    if not limit["renews_in"]:
        return "" if limit["renews"] is None else "now"
    local = datetime.fromisoformat(limit["renews"]).astimezone()
    return f"{local:%Y-%m-%d %H:%M}, in {timedelta(seconds=math.ceil(limit['renews_in']))}"


def amount(number: float | None, unit: str) -> str:
    """An amount for people: dollars to the cent, below one to a hundredth of it; bytes in the largest unit that they fill."""
    if number is None:
        return "-"
    if unit == "usd":
        return f"{number:,.{4 if 0 < number < 1 else 2}f} USD"
    if unit == "bytes":
        power = min(max(int(number).bit_length() - 1, 0) // 10, 4)
        return f"{number / 1024**power:,.1f} {'KMGT'[power - 1]}iB" if power else f"{number:,} B"
    return f"{number:,}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows under their head in aligned columns; the head is bold on a terminal."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield click.style(line, bold=True) if row is head else line
