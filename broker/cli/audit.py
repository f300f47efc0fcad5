"""`broker audit`: read the evidence, and prove that it is whole.

Laws: reads only, also from a live broker. What an agent wrote reaches a terminal only in visible characters; `--json` prints the
lines as they are, for programs. `query` and `run` keep an index beside the log (`review.db`), but what they print is the log's.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import click
import orjson
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from broker.audit import chain
from broker.audit.index import Wanted
from broker.audit.verify import Verified
from broker.audit.verify import verify as verify_log
from broker.cli import options
from broker.errors import UsageError
from broker.manifest.findings import printable
from broker.policy.types import Code, Effect, Verdict
from broker.redaction import redacted
from broker.review import timeline
from broker.review.clusters import hidden

_MOST_OF_RUN = 20_000  # records of a run; nobody reads more, and they are held in memory
_POLL_S = 0.2  # a person does not notice


@click.group()
def audit() -> None:
    """Read the audit log and prove that it is whole."""


@audit.command()
@options.state
@click.option("--lines", "-n", type=click.IntRange(min=0), default=20, show_default=True, help="How many.")
@click.option("--follow", "-f", is_flag=True, help="Go on with new records until interrupted.")
@options.as_json
def tail(*, state: Path, lines: int, follow: bool, as_json: bool) -> None:
    """Print the last records, oldest first."""
    directory = state / "audit"
    if not directory.is_dir():
        raise UsageError(f"there is no audit log in {directory}", "name the broker's state folder with --state")
    found = chain.segments(directory)
    for line in reversed(list(islice(chain.backwards(found), lines))):
        click.echo(line if as_json else render(line))
    for line in _new_lines(directory, *found[-1]) if follow and found else ():
        click.echo(line if as_json else render(line))


def _new_lines(directory: Path, segment: Path, position: int) -> Iterator[bytes]:
    """Whole lines written behind this position, in this segment and those after it, as they come."""
    while True:
        with segment.open("rb") as file:
            file.seek(position)
            for line in iter(file.readline, b""):
                if line.endswith(b"\n"):
                    position += len(line)
                    yield line[:-1]
        if newer := [path for path, _ in chain.segments(directory) if path > segment]:
            segment, position = newer[0], 0
        else:
            time.sleep(_POLL_S)


def render(line: bytes) -> str:
    """One record for people: time, verdict, code, agent, what, decision, upstream status; nothing unseen or secret."""
    try:
        record = orjson.loads(line)
        shown = "  ".join(str(part) for part in _parts(record) if part)
    except (ValueError, TypeError, AttributeError, KeyError):
        shown = f"(not a record) {line.decode('utf-8', 'backslashreplace')}"
    return printable(redacted(shown))


def _parts(record: dict[str, Any]) -> Iterator[Any]:
    yield record.get("time")
    yield f"{record.get('verdict') or record.get('event', '')!s:<10}"
    yield record.get("code")
    yield (record.get("agent") or {}).get("name")
    if record.get("tool") and record.get("operation"):
        yield f"{record['tool']}/{record['operation']}"
    elif record.get("host"):
        yield f"{record.get('method') or ''} {record['host']}{record.get('path') or ''}".strip()
    else:
        yield record.get("tool") or record.get("detail")
        yield (record.get("revision") or "")[:19]
    yield record.get("decision_id")
    if record.get("tool") or record.get("host"):
        yield record.get("detail")
    if upstream := record.get("upstream"):
        yield f"upstream {upstream['status'] or 'did not answer'}"


@audit.command()
@options.state
@options.as_json
def verify(*, state: Path, as_json: bool) -> int:
    """Check every record, every link and the signed end.

    Ends with 1 if the log is not what the broker wrote.
    """
    result = verify_log(state / "audit", _public_key(state / "keys" / "audit.pub.pem"))
    click.echo(orjson.dumps({"ok": not result.problems, **asdict(result)}) if as_json else _summary(result))
    return 1 if result.problems else 0


def _summary(result: Verified) -> str:
    if result.problems:
        return "\n".join(printable(str(problem)) for problem in result.problems)
    signed = f"signed at {result.signed_at}" if result.signed_at else "not checked: no key"
    return f"ok: {result.records} records, chain unbroken to {result.end.hash}, checkpoint {printable(signed)}"


def _public_key(path: Path) -> Ed25519PublicKey | None:
    if not path.exists():
        return None
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"the public key {path} can't be read: {error}", "put the broker's audit.pub.pem there") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"the key in {path} is not an Ed25519 key", "put the broker's audit.pub.pem there")
    return key


@audit.command()
@options.state
@click.option("--agent", metavar="NAME", help="Of this agent.")
@click.option("--run", metavar="ID", help="Of this run.")
@click.option("--tool", metavar="NAME", help="Of this tool.")
@click.option("--operation", metavar="NAME", help="Of this operation, or of what was tried where none matched.")
@click.option("--effect", type=click.Choice([*map(str, Effect)]), help="Decisions on calls with this effect.")
@click.option("--data", metavar="CLASS", help="Decisions on calls with this data class.")
@click.option("--code", type=click.Choice([*map(str, Code)]), metavar="CODE", help="With this code of denial.")
@click.option("--verdict", type=click.Choice([*map(str, Verdict)]), help="Decisions with this verdict.")
@options.moment("--since", "Not before this.")
@options.moment("--until", "Before this.")
@click.option("--limit", type=click.IntRange(min=0), default=1000, show_default=True, help="The last so many; 0 for all.")
@options.as_json
def query(*, state: Path, limit: int, as_json: bool, **wanted: Any) -> None:
    """Print the records that fit all of this, oldest first.

    With --json the records as they stand in the log, one a line; what is not ASCII in them is escaped.
    """
    printed = False
    with options.index(state) as index:
        found = index.find(Wanted(**wanted), limit + 1 if limit else 0)
        some = list(found) if limit else []
        for line, record in index.read(some[-limit:] or found):
            click.echo(_line(line, record) if as_json else render(line))
            printed = True
    if not printed and not as_json:
        click.echo("no record fits all of this", err=True)
    if len(some) > limit:
        click.echo(f"these are the last {limit}, and there are more; --limit 0 prints all", err=True)


def _line(line: bytes, record: dict[str, Any]) -> str:
    """A record's own line, unless that would show a credential or what a terminal might act on."""
    shown = hidden(record)
    return line.decode() if shown == record and line.isascii() and b"\x7f" not in line else options.ascii_json(shown)


@audit.command()
@click.argument("run_id")
@options.state
@click.option("--agent", default="", metavar="NAME", help="Only of this agent; others may use the same run ID.")
@options.as_json
def run(*, run_id: str, state: Path, agent: str, as_json: bool) -> int:
    """Print the run RUN_ID as a timeline.

    It shows each call, how it ended, and what was done about the run.

    With --json: [{agent, run_id, began, took_s, calls, denied, tokens, usd, entries: [the records, of a call with its outcome]}].
    """
    with options.index(state) as index:
        rows = list(islice(index.find(Wanted(agent=agent, run=run_id)), _MOST_OF_RUN + 1))
        found = timeline.runs(index.records(rows[:_MOST_OF_RUN]), run_id)
    if not found:
        whose = f" of {agent}" if agent else ""
        click.echo(
            printable(redacted(f"the log names no run {run_id!r}{whose}; `broker audit tail --json` shows run IDs")), err=True
        )
        return 1
    if as_json:
        click.echo(options.ascii_json(hidden([each.document for each in found])))
    else:
        click.echo("\n\n".join("\n".join(printable(redacted(line)) for line in timeline.told(each)) for each in found))
    if len(rows) > _MOST_OF_RUN:
        click.echo(f"these are its first {_MOST_OF_RUN} records; `broker audit query --run` prints all", err=True)
    return 0
