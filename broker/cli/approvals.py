"""`broker approvals`: the calls that wait for people, and what they say of them."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import orjson

from broker.admin.client import ask
from broker.cli import options
from broker.errors import UsageError
from broker.manifest.findings import printable


@click.group()
def approvals() -> None:
    """See the calls that wait for people, and approve or reject them."""


@approvals.command("list")
@click.option("--all", "every", is_flag=True, help="Also those that were answered.")
@options.state
@options.as_json
def list_(*, every: bool, state: Path, as_json: bool) -> None:
    """List the calls that wait, with exactly what will be sent.

    With --json: approvals [{id, status, approvers, approved_by, rejected_by, groups, asked, expires, why, agent, owner, run_id,
    operation, effect, method, url, content_type, headers, params, body, decision_id}]; times in seconds since the epoch.
    """
    found = _answer(state, "GET", "/approvals")["approvals"]
    shown = [each for each in found if every or each["status"] == "waiting"]
    if as_json:
        click.echo(orjson.dumps({"approvals": shown}))
        return
    lines = [printable(line) for each in shown for line in described(each)]
    click.echo("\n".join(lines) or "nothing waits")


_reason = click.option("--reason", default="", help="Why; it is recorded.")
_by = click.option("--as", "by", metavar="PERSON", default="", help="Who says so; the user of this terminal unless given.")


@approvals.command()
@click.argument("approval")
@_reason
@_by
@options.state
@options.as_json
def approve(*, approval: str, as_json: bool, **said: Any) -> None:
    """Let the call APPROVAL pass, once.

    It passes when the agent makes it again unchanged.
    """
    _vote(approval, "approve", as_json=as_json, **said)


@approvals.command()
@click.argument("approval")
@_reason
@_by
@options.state
@options.as_json
def reject(*, approval: str, as_json: bool, **said: Any) -> None:
    """Say no to the call APPROVAL.

    One no is enough, also after others have approved.
    """
    _vote(approval, "reject", as_json=as_json, **said)


def _vote(approval: str, word: str, *, reason: str, by: str, state: Path, as_json: bool) -> None:
    stands = _answer(state, "POST", f"/approvals/{approval}/{word}", {"reason": reason, "by": by or options.me()})
    more = stands["approvers"] - len(stands["approved_by"])
    words = f"{approval} is {stands['status']}" + (f" for {more} more" if stands["status"] == "waiting" else "")
    click.echo(orjson.dumps(stands) if as_json else words)


def _answer(state: Path, method: str, target: str, said: dict[str, str] | None = None) -> dict[str, Any]:
    folder = options.broker_state(state)
    if (answer := ask(folder.control_socket, method, target, said)) is None:
        raise UsageError(f"no broker runs on {folder.root}", "start it with `broker up`, or name another's folder with --state")
    return answer


def described(each: dict[str, Any]) -> Iterator[str]:
    """One call for people, line for line, with all that they are to judge."""
    until = datetime.fromtimestamp(each["expires"], UTC).astimezone()
    yield f"{each['id']}  {each['status']}: {len(each['approved_by'])} of {each['approvers']}, until {until:%Y-%m-%d %H:%M:%S}"
    named = {
        "agent": f"{each['agent']} ({each['owner']})" if "owner" in each else each["agent"],
        "run": each["run_id"] or "(without a run ID)",
        "call": f"{each['operation']} ({each['effect']})" if "effect" in each else each["operation"],
        "why": each["why"],
        "only": " or ".join(each["groups"]),
        "sends": f"{each['method']} {each['url']}" if "url" in each else _UNKNOWN,
        "type": each.get("content_type", ""),
    }
    yield from (f"  {word:<7}{value}" for word, value in named.items() if value)
    yield from (f"  {'with':<7}{name}: {value}" for name, value in each.get("headers", {}).items())
    yield from (f"  {'' if number else 'body':<7}{line}" for number, line in enumerate(each.get("body", "").splitlines()))


_UNKNOWN = "(not known since the broker was restarted; known again once the agent makes the call again)"
