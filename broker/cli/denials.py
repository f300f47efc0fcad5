"""`broker denials`: what was denied, in clusters, for whoever reviews it; and what reviewers say of a cluster.

Law: reads the audit log and writes reviewers' labels beside it; it changes nothing that decides.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import click
import orjson

from broker import clock
from broker.audit.index import Index, Label
from broker.audit.record import timestamp
from broker.cli import options
from broker.errors import UsageError, counted
from broker.manifest.findings import printable
from broker.policy.denials import DenialKind
from broker.redaction import redacted
from broker.review.clusters import Cluster, clusters, exists, latest

_POLL_S = 1.0  # a person does not notice, and a busy broker's clusters are counted anew each time
_MOST = 50  # clusters under one heading; whoever is attacked with more reads them as JSON
_ARGS = 300  # characters of the arguments
_LABELS = ("expected", "attack", "missing-permission", "none")
_HEADINGS = {
    DenialKind.PERMISSION: "Not granted by the manifests",
    DenialKind.PEOPLE: "Up to people: approvals and flow rules",
    DenialKind.LIMIT: "Over a limit",
    DenialKind.CONTAINMENT: "Agents that were cut off",
    DenialKind.IDENTITY: "Identity not proven",
    DenialKind.MALFORMED: "Requests that could not be read in exactly one way",
    DenialKind.FAULT: "Faults of the broker, an issuer or an upstream",
}


@click.group(invoke_without_command=True)
@options.state
@options.moment("--since", "Only denials since then.")
@click.option("--agent", default="", metavar="NAME", help="Only of this agent.")
@click.option("--follow", "-f", is_flag=True, help="Go on: print each cluster that is new or grew, until interrupted.")
@options.as_json
@click.pass_context
def denials(context: click.Context, *, state: Path, since: float | None, agent: str, follow: bool, as_json: bool) -> None:
    """Show denied calls in clusters.

    A cluster is of one agent, one operation or host, one code and one rule. What manifests don't grant comes first, the most
    frequent first. "shadow" marks calls that passed and would have been denied.

    With --json: [{id, kind, agent, what, tool, operation, host, code, rule, shadow, count, first, last, ever_allowed, example,
    decision_ids, label: {label, note, by, at, expires} or null}]; with --follow one object a line.
    """
    if context.invoked_subcommand:
        context.default_map = {context.invoked_subcommand: {"state": str(state)}}
        return
    with options.index(state) as index:
        found = clusters(index, clock.now(), since, agent)
        if not follow:
            documents = [_document(index, each) for each in found] if as_json else []
            click.echo(options.ascii_json(documents) if as_json else _page(index, found, since, agent))
            return
        for each in _news(index, found, since, agent):
            click.echo(options.ascii_json(_document(index, each)) if as_json else "\n".join(_lines(index, each)))


@denials.command()
@click.argument("cluster")
@click.argument("label", type=click.Choice(_LABELS))
@click.option("--note", default="", metavar="TEXT", help="Why; shown with the cluster.")
@options.moment("--expires", "Until when the label holds; 30d is in 30 days.", ahead=True)
@options.state
@options.as_json
def label(*, cluster: str, label: str, note: str, expires: float | None, state: Path, as_json: bool) -> None:
    """Say of CLUSTER, for other reviewers, that it is LABEL.

    The label none takes the label off. Labels are kept beside the record, in STATE/review.db. They change nothing that the
    broker decides.
    """
    now = clock.now()
    if expires is not None and expires <= now:
        raise UsageError(f"{timestamp(expires)} is over", "name a time to come with --expires")
    with options.index(state) as index:
        if not exists(index, cluster):
            advice = "`broker denials` shows the IDs of clusters; each has twelve hex digits"
            raise UsageError(printable(redacted(f"the log holds no denials of a cluster {cluster!r}")), advice)
        index.label(cluster, None if label == "none" else Label(label, redacted(note), options.me(), now, expires))
    if as_json:
        click.echo(options.ascii_json({"cluster": cluster, "label": None if label == "none" else label}))
    else:
        click.echo(f"{cluster} has no label" if label == "none" else f"{cluster} is labelled {label}")


def _news(index: Index, found: list[Cluster], since: float | None, agent: str) -> Iterator[Cluster]:
    """Each cluster, and then, for ever, those that are new or grew."""
    counts: dict[str, int] = {}
    while True:
        yield from (each for each in found if counts.get(each.id) != each.count)
        counts = {each.id: each.count for each in found}
        while not index.update():
            time.sleep(_POLL_S)
        found = clusters(index, clock.now(), since, agent)


def _page(index: Index, found: Iterable[Cluster], since: float | None, agent: str) -> str:
    sections = ["\n".join(_section(index, kind, list(each))) for kind, each in groupby(found, key=lambda cluster: cluster.kind)]
    whose = f" to {agent}" if agent else ""
    return "\n\n".join(sections) or printable(
        f"nothing was denied{whose}{f' since {timestamp(since)}' if since is not None else ''}"
    )


def _section(index: Index, kind: DenialKind, found: list[Cluster]) -> Iterator[str]:
    yield click.style(f"{_HEADINGS[kind]} ({counted(sum(each.count for each in found), 'call')})", bold=True)
    for each in islice(found, _MOST):
        yield from _lines(index, each)
    if len(found) > _MOST:
        yield f"  … and {counted(len(found) - _MOST, 'cluster')} more; see them with --json, or fewer with --agent and --since"


def _lines(index: Index, each: Cluster) -> Iterator[str]:
    shadow = "  shadow: passed" if each.shadow else ""
    yield printable(
        f"  {each.id}  {each.count:>5,}x  {each.agent or '(no agent)'}  {each.what or '(no host)'}  {each.code}{shadow}"
    )
    allowed = "allowed at other times" if each.ever_allowed else "never allowed"
    when = _shown(each.first) if each.count == 1 else f"{_shown(each.first)} to {_shown(each.last)}"
    yield printable(f"      {when}, {allowed}{f'; {each.rule}' if each.rule else ''}")
    yield printable(f"      {_example(latest(index, each)[0])}")
    if each.label:
        until = f" until {_shown(each.label.expires)}" if each.label.expires else ""
        note = f": {redacted(each.label.note)}" if each.label.note else ""
        yield printable(f"      {each.label.label}{until}, says {each.label.by}{note}")


def _example(example: Mapping[str, Any]) -> str:
    """One call. Whatever the log says where a list or an object belongs, this does not fail on it."""
    call = f"{example['method'] or ''} {example['host'] or ''}{example['path'] or ''}".strip()
    named = example["args"] if isinstance(example["args"], dict) else {}
    args = orjson.dumps({where: said for where, said in named.items() if said}).decode()
    listed = example["violations"] if isinstance(example["violations"], list) else ()
    broken = "; ".join(f"{each.get('pointer')}: {each.get('message')}" for each in listed if isinstance(each, dict))
    shown = "" if args == "{}" else args if len(args) <= _ARGS else f"{args[:_ARGS]}…"
    return "  ".join(str(part) for part in (call, shown, broken or example["detail"], example["decision_id"]) if part)


def _shown(when: float) -> str:
    return f"{timestamp(when)[:19]}Z"


def _document(index: Index, each: Cluster) -> dict[str, Any]:
    label = each.label and {**asdict(each.label), "at": timestamp(each.label.at), "note": redacted(each.label.note)}
    if label and each.label and each.label.expires is not None:
        label["expires"] = timestamp(each.label.expires)
    example, decision_ids = latest(index, each)
    told = {name: value for name, value in asdict(each).items() if name not in ("since", "shapes")}
    found = {"example": example, "decision_ids": decision_ids, "label": label}
    return {**told, "first": timestamp(each.first), "last": timestamp(each.last), **found}
