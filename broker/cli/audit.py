"""`broker audit`: read the evidence, and prove that it is whole.

Laws: reads only, also from a live broker. What an agent wrote reaches a terminal only in visible characters; `--json` prints the
lines as they are, for programs.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import click
import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from broker.audit import chain
from broker.audit.verify import Verified
from broker.audit.verify import verify as verify_log
from broker.errors import UsageError

_POLL = 0.2  # seconds; a person does not notice, and it costs one stat each time

_state = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".broker"),
    show_default=True,
    help="The broker's state folder.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def audit() -> None:
    """Read the audit log and prove that it is whole."""


@audit.command()
@_state
@click.option("--follow", "-f", is_flag=True, help="Go on with new records until interrupted.")
@click.option("--lines", "-n", type=click.IntRange(min=0), default=20, show_default=True, help="How many records to begin with.")
@_json
def tail(*, state: Path, follow: bool, lines: int, as_json: bool) -> None:
    """Print the last records, oldest first."""
    directory = state / "audit"
    if not directory.is_dir():
        raise UsageError(f"there is no audit log in {directory}", "name the broker's state folder with --state")
    found = chain.segments(directory)
    for line in reversed(list(islice(chain.backwards(found), lines))):
        click.echo(line if as_json else render(line))
    if follow:
        position = (found[-1][0].name, chain.whole_lines(*found[-1])) if found else ("", 0)
        try:
            for line in _follow(directory, *position):
                click.echo(line if as_json else render(line))
        except KeyboardInterrupt:
            return


def _follow(directory: Path, name: str, offset: int) -> Iterator[bytes]:
    """New whole lines behind `offset` of the segment `name`, and of the segments after it; waits for more forever."""
    while True:
        # The list comes first: when a later segment exists by then, nothing more is written to this one.
        later = [path.name for path, _ in chain.segments(directory) if path.name > name]
        size = 0
        if name:
            with (directory / name).open("rb") as file:
                file.seek(offset)
                content = file.read()
            size = content.rfind(b"\n") + 1
            yield from content[:size].splitlines()
            offset += size
        if later:
            name, offset = later[0], 0
        elif not size:
            time.sleep(_POLL)


def render(line: bytes) -> str:
    """One record for people: time, verdict, code, agent, what, decision, upstream status; no control characters."""
    try:
        record = orjson.loads(line)
        shown = "  ".join(part for part in _parts(record) if part)
    except (ValueError, TypeError, AttributeError):
        shown = f"(not a record) {line.decode('utf-8', 'backslashreplace')}"
    return visible(shown)


def _parts(record: dict[str, Any]) -> Iterator[str]:
    yield str(record.get("time", ""))
    yield f"{record.get('verdict') or record.get('event', '')!s:<10}"
    yield str(record.get("code") or "")
    yield str((record.get("agent") or {}).get("name") or "")
    yield _what(record)
    yield str(record.get("decision_id") or "")
    upstream = record.get("upstream") or {}
    yield f"upstream {upstream['status'] or 'did not answer'}" if "status" in upstream else ""


def _what(record: dict[str, Any]) -> str:
    if record.get("tool") and record.get("operation"):
        return f"{record['tool']}/{record['operation']}"
    if record.get("host"):
        return f"{record.get('method') or ''} {record['host']}{record.get('path') or ''}".strip()
    return str(record.get("tool") or record.get("detail") or "")


def visible(text: str) -> str:
    """Text with everything that a terminal might act on (controls, escapes, direction marks) written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


@audit.command()
@_state
@click.option(
    "--public-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="PEM file of the signing key's public half, such as a copy kept elsewhere.  [default: STATE/keys/audit.pub.pem]",
)
@_json
def verify(*, state: Path, public_key: Path | None, as_json: bool) -> None:
    """Check every record, every link and the signed end; exit 1 if the log is not what the broker wrote."""
    default = state / "keys" / "audit.pub.pem"
    key_file = public_key or (default if default.exists() else None)
    result = verify_log(state / "audit", _public_key(key_file) if key_file else None)
    if as_json:
        click.echo(orjson.dumps({"ok": not result.problems, **asdict(result)}))
    else:
        click.echo(_summary(result))
    if result.problems:
        raise click.exceptions.Exit(1)


def _summary(result: Verified) -> str:
    if result.problems:
        return "\n".join(visible(str(problem)) for problem in result.problems)
    signed = (
        f"checkpoint signed at {visible(result.signed_at)}" if result.signed_at else "checkpoint's signature not checked: no key"
    )
    return f"ok: {result.records} records in {result.segments} segments, chain unbroken to {result.head}, {signed}"


def _public_key(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"the public key {path} can't be read: {error}", "name a PEM file with --public-key") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"the key in {path} is not an Ed25519 key", "name the broker's audit.pub.pem")
    return key
