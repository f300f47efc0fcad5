"""Whether a log is what the broker wrote: every line, every link, and the signed end.

Laws: reads only, as a stream, also while a broker writes. The checkpoint is read before the lines, so that a live log can only be
longer than it. Nothing found is ever silent: a missing folder is an error, a missing checkpoint a problem. After a problem the
walk goes on from what the line says of itself, so that one change is one problem.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from broker.audit import chain
from broker.audit.chain import START, Checkpoint, Link
from broker.errors import UsageError

_MAX_PROBLEMS = 100  # a reader has seen enough by then, and a hostile file must not fill the memory
_EVIDENCE = "keep the folder as evidence and compare it with a copy"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what, and what to do about it."""

    file: str
    line: int
    what: str
    advice: str = _EVIDENCE

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}; {self.advice}"


@dataclass(slots=True)
class Verified:
    """What a walk over a log found. It is what the broker wrote exactly when `problems` is empty (at most 100 are listed).

    `first` and `last` are sequence numbers (0: no records), `head` the last record's hash. `signed_at` is the checkpoint's time
    (RFC 3339), empty where there was no valid one or no key to check it with.
    """

    records: int = 0
    segments: int = 0
    first: int = 0
    last: int = 0
    head: str = chain.ZERO
    signed_at: str = ""
    problems: list[Problem] = field(default_factory=list)


def verify(directory: Path, public_key: Ed25519PublicKey | None) -> Verified:
    """Walk the log in `directory`. Without a key the chain is checked, but not who signed its end.

    Raises `UsageError` where there is no such folder or a file of it can't be read.
    """
    if not directory.is_dir():
        raise UsageError(f"there is no audit log in {directory}", "name the broker's state folder with --state")
    try:
        return _Walk(directory, public_key).run()
    except OSError as error:
        raise UsageError(f"the audit log can't be read: {error}", "run this as the user that the broker runs as") from error


class _Walk:
    def __init__(self, directory: Path, public_key: Ed25519PublicKey | None) -> None:
        self.directory = directory
        self.public_key = public_key
        self.result = Verified()
        self.before = START

    def run(self) -> Verified:
        checkpoint = self._checkpoint()
        found = chain.segments(self.directory)
        self.result.segments = len(found)
        for path, _ in found:
            for number, line in _lines(path):
                last = path == found[-1][0]
                if line.endswith(b"\n"):
                    self._line(path, number, line[:-1], checkpoint)
                elif not (last and chain.is_live(self.directory)):  # a live log may be in the middle of a write
                    advice = "start the broker, which sets it aside" if last else _EVIDENCE
                    self._problem(path, number, "the line is incomplete", advice)
        self.result.last, self.result.head = self.before.seq, self.before.hash
        if checkpoint and checkpoint.seq > self.before.seq:
            what = f"record {checkpoint.seq} was signed, but the log ends with record {self.before.seq}: its tail was cut off"
            self._problem(self.directory / chain.CHECKPOINT, 1, what)
        return self.result

    def _checkpoint(self) -> Checkpoint | None:
        path = self.directory / chain.CHECKPOINT
        try:
            checkpoint = Checkpoint.read(self.directory)
            if checkpoint is None:
                raise ValueError("there is no checkpoint, so nothing shows where the log must end")  # noqa: TRY301 - told as the others
            if self.public_key is not None:
                checkpoint.check(self.public_key)
                self.result.signed_at = checkpoint.time
        except ValueError as error:
            self._problem(path, 1, str(error))
            return None
        return checkpoint

    def _line(self, path: Path, number: int, line: bytes, checkpoint: Checkpoint | None) -> None:
        self.result.records += 1
        try:
            link = chain.read_link(line)
            self._follows(path, number, link)
        except ValueError as error:
            self._problem(path, number, str(error))
            claimed = chain.claimed_link(line)
            if claimed is None:
                return
            link = claimed
        if checkpoint and link.seq == checkpoint.seq and link.hash != checkpoint.hash:
            self._problem(path, number, f"record {link.seq} is not the one that was signed: the log was rewritten")
        self.result.first = self.result.first or link.seq
        self.before = link

    def _follows(self, path: Path, number: int, link: Link) -> None:
        if link.seq != self.before.seq + 1:
            what = f"record {link.seq} stands where {self.before.seq + 1} belongs: records were removed, inserted or moved"
        elif link.prev_hash != self.before.hash:
            what = f"record {link.seq} does not follow the record before it: one of them was replaced"
        elif number == 1 and path.name != chain.segment_name(link.seq):
            what = f"record {link.seq} begins a file that is named otherwise: files were renamed or added"
        else:
            return
        self._problem(path, number, what)

    def _problem(self, path: Path, number: int, what: str, advice: str = _EVIDENCE) -> None:
        if len(self.result.problems) < _MAX_PROBLEMS:
            self.result.problems.append(Problem(str(path), number, what, advice))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(chain.MAX_LINE):
            number += 1
            yield number, line
            if len(line) == chain.MAX_LINE and not line.endswith(b"\n"):
                return  # reported as incomplete; what follows can't be told apart from it
