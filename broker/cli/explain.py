"""`broker explain`: the decision on a call and how it came about. Nothing is sent, nothing is spent."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from broker import clock
from broker.cli import options
from broker.errors import UsageError
from broker.manifest.findings import printable
from broker.policy.snapshot import PolicySnapshot
from broker.protocols.problem import WORDS
from broker.rehearsal import Call, Rehearsal, Rehearsed


@click.command()
@click.option("--agent", required=True, help="The agent's name.")
@click.argument("method")
@click.argument("url")
@click.option("--data", default="", help="The request's body; JSON unless a content-type header says otherwise.")
@click.option("--header", "headers", multiple=True, metavar="NAME: VALUE", help="A request header; may be given again.")
@options.manifests
@options.as_json
def explain(*, agent: str, method: str, url: str, data: str, headers: tuple[str, ...], manifests: Path, as_json: bool) -> int:
    """Say what would happen to the call METHOD URL, and why. Ends with 0 for an allow, 1 for a denial."""
    snapshot, now = options.snapshot(manifests), clock.now()
    found = Rehearsal(snapshot, now).call(agent, Call(method, url, _headers(headers, data), os.fsencode(data)))
    document = _document(snapshot, agent, found, now)
    if as_json:
        click.echo(options.ascii_json(document))
    else:
        for line in _lines(document):
            click.echo(printable(line))
    return 0 if found.passes else 1


def _headers(headers: tuple[str, ...], data: str) -> tuple[tuple[str, str], ...]:
    if bad := next((header for header in headers if not header.partition(":")[0].strip() or ":" not in header), None):
        raise UsageError(f"{bad!r} is no header", "write it as in 'x-run-id: 7'")
    pairs = [(name.strip().lower(), value.strip()) for name, _, value in (header.partition(":") for header in headers)]
    if data and not any(name == "content-type" for name, _ in pairs):
        pairs.append(("content-type", "application/json"))
    return tuple(pairs)


def _document(snapshot: PolicySnapshot, agent: str, found: Rehearsed, now: float) -> dict[str, Any]:
    record = found.record
    steps = [step.format(agent=agent) for step in WORDS[record["code"]][1]] if record["code"] else []
    if agent not in snapshot.agents:  # and whoever only asks has no token that could be wrong
        steps = [f"Name one of the manifests' agents with --agent: {', '.join(sorted(snapshot.agents)) or 'there is none'}."]
    return {
        "verdict": record["verdict"],
        "code": record["code"],
        "detail": record["detail"] or "",
        "rule": record["rule"] or "",
        "agent": agent,
        "steps": dict(_steps(snapshot, found, now)),
        "violations": record["violations"],
        "next_steps": steps,
    }


def _steps(snapshot: PolicySnapshot, found: Rehearsed, now: float) -> Iterator[tuple[str, str]]:
    """What the broker found out, in order."""
    record, tool = found.record, snapshot.tools.get(found.record["tool"] or "")
    if agent := snapshot.agents.get(record["agent"].get("name", "")):
        yield "agent", f"{agent.name}, {agent.rule}"
    if tool is None:
        return
    yield "tool", f"{tool.name} ({tool.protocol}), {tool.rule}"
    if found.stripped:
        yield "stripped", ", ".join(found.stripped)
    if operation := tool.operations.get(record["operation"] or ""):
        yield "operation", f"{operation.name} ({operation.effect}), {operation.rule}"
    elif record["operation"]:
        yield "operation", record["operation"]
    if (credential := record["credential"]) and tool.credential:
        scopes = f", scopes {' '.join(credential['scopes'])}" if credential["scopes"] else ""
        life = f", for at most {credential['expires'] - now:.0f} s" if credential["expires"] else ""
        yield "credential", f"{credential['issuer']}{scopes}{life}, in {tool.credential.placed}"
    elif found.passes and tool.credential:
        yield "credential", "none: nobody granted this operation, and shadow mode grants nothing"


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield "{verdict} {code}: {detail}".format_map(document) if document["code"] else document["verdict"]
    for step, what in document["steps"].items():
        yield f"  {step:<11}{what}"
    for violation in document["violations"]:
        yield f"  {'violation':<11}{violation['pointer']}: {violation['message']} ({violation['rule']})"
    if document["rule"] and not document["violations"]:
        yield f"  {'rule':<11}{document['rule']}"
    for step in document["next_steps"]:
        yield f"  {'next':<11}{step}"
