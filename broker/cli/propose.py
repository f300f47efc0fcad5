"""`broker propose`: the narrowest manifest change that would allow certain denied calls, for a pull request.

Laws: the log and the manifests are read; only --write changes something, and that is the files of the manifests, each whole or
not at all. What is proposed passes `broker check` and permits those calls, or nothing is proposed.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from broker import clock
from broker.audit import AuditUnavailable
from broker.cli import options
from broker.containment.standing import EVERYONE
from broker.errors import BrokerError, UsageError, counted
from broker.manifest.diff import diff
from broker.manifest.findings import FORMATS, printable
from broker.policy.snapshot import PolicySnapshot
from broker.review.clusters import attacks, decisions, records, shadowed
from broker.review.draft import Draft, different, drafted, spoiling, wanted
from broker.review.propose import Record, Refused, is_sound
from broker.review.pullrequest import Proposal, printable_lines

_YAML = (".yaml", ".yml")
_MOST = 200  # different calls of one cluster: more, no list in a manifest should hold


_CUT = f"the cluster has over {_MOST} different calls; this is for the latest {_MOST} of them alone"
_BROKEN = "this is no record as this broker writes it; `broker audit verify` says whether somebody changed it"


class _Refused(BrokerError):
    """There is nothing to propose."""

    exit_code = 1


@click.command()
@click.argument("decision_ids", nargs=-1, metavar="[DECISION_ID]…")
@click.option("--cluster", default="", metavar="ID", help="The calls of a cluster, as `broker denials` shows it.")
@click.option("--shadow", is_flag=True, help="The calls of --agent that passed in shadow mode and would have been denied.")
@click.option("--agent", default="", metavar="NAME", help="Whose shadow traffic.")
@click.option("--write", is_flag=True, help="Apply the change to the manifests folder.")
@options.manifests
@options.state
@options.as_json
def propose(
    *,
    decision_ids: tuple[str, ...],
    cluster: str,
    shadow: bool,
    agent: str,
    write: bool,
    manifests: Path,
    state: Path,
    as_json: bool,
) -> int:
    """Print the narrowest change that would allow denied calls.

    It is a change of manifests, as a pull request: evidence, patch, and its effect.

    Takes decision IDs, a cluster, or an agent's shadow traffic. Ends with 1 where nothing can be proposed, and says why: for what
    could not be read, who was not known, what failed, what people, flow rules or limits forbid, decoys, and agents under
    containment. Of shadow traffic, what can't be proposed is left out and named.
    """
    if sum((bool(decision_ids), bool(cluster), shadow)) != 1 or shadow != bool(agent):
        raise UsageError("name what to propose for", "write decision IDs, or --cluster ID, or --shadow --agent NAME")
    now = clock.now()
    snapshot, loaded = options.compiled(manifests)
    with options.index(state) as index:
        if shadow:
            named: Iterable[Record] = shadowed(index, agent)
        else:
            named = records(index, cluster, _MOST + 1) if cluster else decisions(index, decision_ids)
        found, broken = _read(named)
        cut = bool(cluster) and len(found) > _MOST
        found = found[:_MOST] if cut else found
        found = different(found) if shadow else found
        hostile = attacks(index, now, found)
    _known(decision_ids, cluster, [*found, *(each.record for each in broken)])
    files = {path.relative_to(manifests).as_posix(): path.read_bytes() for path in loaded.files if path.suffix in _YAML}
    contained = _contained(state, snapshot.agents)
    edits, refused = wanted(snapshot, found, contained, hostile, now)
    while shadow and (odd := spoiling(edits, files, manifests, now)):
        found = [record for record in found if record["decision_id"] not in odd]
        broken += odd.values()
        edits, refused = wanted(snapshot, found, contained, hostile, now)
    refused += broken
    for each in refused:
        click.echo(printable(f"{each.record.get('decision_id')}: {each.why}"), err=True)
    if not edits or (refused and not shadow):
        raise _Refused(
            "nothing is proposed", f"see why above: {counted(len(refused), 'call')}" if refused else "nothing was denied"
        )
    edits = [replace(edit, notes=(*edit.notes, _CUT)) for edit in edits] if cut else edits
    made = _proposal(snapshot, drafted(edits, files, manifests), manifests, now)
    click.echo(_in_json(made, refused) if as_json else printable_lines(made.markdown), nl=as_json)
    if write:
        for path, (before, after) in made.texts.items():
            _replace(Path(path), before, after)
            click.echo(printable(f"{path} is changed; review it with git diff"), err=True)
    return 0


def _in_json(made: Proposal, refused: list[Refused]) -> str:
    shown = {"title": made.title, "markdown": made.markdown, "patch": made.patch, "files": sorted(made.texts)}
    left_out = [{"decision_id": each.record.get("decision_id"), "why": each.why} for each in refused]
    return options.ascii_json({**shown, "left_out": left_out})


def _read(named: Iterable[Record]) -> tuple[list[Record], list[Refused]]:
    """The records, and those that are none."""
    found, broken = list[Record](), list[Refused]()
    for record in named:
        if is_sound(record):
            found.append(record)
        else:
            broken.append(Refused(record, _BROKEN))
    return found, broken


def _known(decision_ids: tuple[str, ...], cluster: str, found: list[Record]) -> None:
    """Raise `UsageError` where the log does not hold what was named."""
    missing = set(decision_ids) - {str(record.get("decision_id")) for record in found}
    if missing or (cluster and not found):
        what = f"a cluster {cluster!r}" if cluster else f"the decision {min(missing)!r}"
        raise UsageError(printable(f"the log does not hold {what}"), "`broker denials` shows what it holds")


def _contained(state: Path, agents: Iterable[str]) -> frozenset[str]:
    """Which agents are under containment, as the log has it."""
    named = frozenset(each.agent for each in options.contained(state / "audit", _Unwritten()).standing.all)
    return frozenset(agents) if EVERYONE in named else named


class _Unwritten:
    """An audit sink for what is only replayed."""

    def append(self, record: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002 - the interface's
        raise AuditUnavailable("nothing is written by a proposal")


def _proposal(snapshot: PolicySnapshot, draft: Draft, manifests: Path, now: float) -> Proposal:
    """The change, checked. Raises `BrokerError`."""
    after = draft.after
    if after.snapshot is None:
        click.echo(FORMATS["text"](each for each in after.findings if each.severity == "error"), err=True, nl=False)
        raise _Refused("what would allow it does not pass `broker check`", "write the change by hand, or ask the platform team")
    if lost := [record["decision_id"] for record in draft.lost(now)]:
        raise _Refused(f"no change of the manifest allows {', '.join(lost[:3])}", "write it by hand")
    shown = {(manifests / file).as_posix(): pair for file, pair in draft.texts.items()}
    return Proposal(draft.edits, shown, diff(snapshot, after.snapshot))


def _replace(path: Path, before: str, after: str) -> None:
    """Write a file whole or not at all; it keeps its mode, and stays a link. What others wrote meanwhile stays too."""
    try:
        place = path.resolve(strict=True)
        with _alone_in(place.parent):
            if place.read_bytes() != before.encode():
                raise UsageError(f"{path} was changed meanwhile, and is left as it is", "run this again")
            _write(place, after)
    except OSError as error:
        raise UsageError(f"{path} can't be written: {error.strerror}", "make the folder writable, or apply the patch") from error


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other proposal is written there while the body runs."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
    finally:
        os.close(held)


def _write(place: Path, text: str) -> None:
    number, name = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    fresh = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(text.encode())
        fresh.chmod(place.stat().st_mode)
        fresh.replace(place)
    finally:
        fresh.unlink(missing_ok=True)
