"""Whether a log is what the broker wrote: every line, every link, and the signed end.

Laws: reads only, as a stream, also while a broker writes: the checkpoint is read before the lines, so that a live log can only be
longer than it, and a last line without its end is no record yet. Nothing found is ever silent: a missing folder is an error, a
missing checkpoint a problem. After a problem the walk goes on from what the line says of itself: one change is one problem.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from broker.audit import chain
from broker.audit.chain import START, Checkpoint, Link
from broker.errors import UsageError

_MAX_PROBLEMS = 100  # a reader has seen enough by then, and a hostile file must not fill the memory


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, and what."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}; keep the folder as evidence and compare it with a copy"


@dataclass(slots=True)
class Verified:
    """What a walk over a log found. It is what the broker wrote exactly when `problems` is empty (at most 100 are listed).

    `end` is the last record's link. `signed_at` is the checkpoint's time (RFC 3339), empty where there was no valid one or no key
    to check it with.
    """

    records: int = 0
    end: Link = START
    signed_at: str = ""
    problems: list[Problem] = field(default_factory=list)

    def problem(self, path: Path, number: int, what: str) -> None:
        """Note one, unless there are too many."""
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(Problem(str(path), number, what))


def verify(directory: Path, public_key: Ed25519PublicKey | None, *, tail: bool = False) -> Verified:
    """Walk the log in `directory`. Without a key the chain is checked, but not who signed its end.

    `tail` begins with the segment of the checkpoint. Raises `UsageError` where there is no such folder, or it can't be read.
    """
    if not directory.is_dir():
        raise UsageError(f"there is no audit log in {directory}", "name the broker's state folder with --state")
    try:
        return _walk(directory, public_key, tail=tail)
    except OSError as error:
        raise UsageError(f"the audit log can't be read: {error}", "run this as the user that the broker runs as") from error


def _walk(directory: Path, public_key: Ed25519PublicKey | None, *, tail: bool) -> Verified:
    found = Verified()
    checkpoint = _checkpoint(directory, public_key, found)
    paths = [path for path, _ in chain.segments(directory)]
    if tail and checkpoint:
        later = sum(path.name > chain.segment_name(checkpoint.seq) for path in paths)
        paths = paths[-later - 1 :]
    for path, number, line in _lines(paths):
        found.records += 1
        link, wrong = chain.read_link(line)
        if link:
            before = Link(link.seq - 1, "", link.prev_hash) if tail and found.records == 1 else found.end
            signed = checkpoint.hash if checkpoint and checkpoint.seq == link.seq else link.hash
            begins = chain.segment_name(link.seq) if number == 1 else path.name
            wrong = wrong or _misplaced(link, before, signed, renamed=path.name != begins)
            found.end = link
        if wrong:
            found.problem(path, number, wrong)
    if checkpoint and checkpoint.seq > found.end.seq:
        what = f"record {checkpoint.seq} was signed, but the log ends with record {found.end.seq}: its tail was cut off"
        found.problem(directory / chain.CHECKPOINT, 1, what)
    return found


def _checkpoint(directory: Path, public_key: Ed25519PublicKey | None, found: Verified) -> Checkpoint | None:
    what = "there is no checkpoint, so nothing shows where the log must end"
    try:
        if checkpoint := Checkpoint.read(directory, public_key):
            found.signed_at = checkpoint.time if public_key else ""
            return checkpoint
    except ValueError as error:
        what = str(error)
    found.problem(directory / chain.CHECKPOINT, 1, what)
    return None


def _misplaced(link: Link, before: Link, signed: str, *, renamed: bool) -> str:
    if link.seq != before.seq + 1:
        return f"record {link.seq} stands where {before.seq + 1} belongs: records were removed, inserted or moved"
    if link.prev_hash != before.hash:
        return f"record {link.seq} does not follow the record before it: one of them was replaced"
    if link.hash != signed:
        return f"record {link.seq} is not the one that was signed: the log was rewritten"
    if renamed:
        return f"record {link.seq} begins a file that is named otherwise: files were renamed or added"
    return ""


def _lines(paths: list[Path]) -> Iterator[tuple[Path, int, bytes]]:
    for path in paths:
        for number, line in enumerate(chain.lines(path), 1):
            if line.endswith(b"\n") or path != paths[-1] or len(line) == chain.MAX_LINE:
                yield path, number, line
