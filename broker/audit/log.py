"""The audit log: append-only JSON lines that survive this process, and say so when they can't be written.

Laws: one writer (a lock that dies with its holder). A record is one whole line in one write, or nothing: what did not fit is cut
off again, the caller gets `AuditUnavailable`, and the next append tries afresh. No append waits for the disk: the page cache
survives kill -9, and `sync()`, once a second off the event loop, bounds what a power loss takes to that second. A log that does
not continue its own signed checkpoint is evidence: it is refused, not continued.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from broker.audit import AuditTampered, AuditUnavailable, chain
from broker.audit.chain import Checkpoint, Link
from broker.audit.record import canonical, config_record
from broker.errors import UsageError

SEGMENT_BYTES = 64 * 1_048_576  # one file opens in an editor, and a year of a busy broker is still some thousand files
_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class AuditLog:
    """An open log in `directory` (made if need be, mode 0700; files 0600). An `AuditSink`; threads may share it.

    `key` signs the checkpoints; `now` (seconds since the epoch) and `mono_ns` date the opening. Raises `UsageError` where another
    process holds it, `AuditTampered` where it is not what was signed, `AuditUnavailable` where the folder can't be used.
    """

    def __init__(
        self, directory: Path, key: Ed25519PrivateKey, now: float, mono_ns: int, *, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self._directory = directory
        self._key = key
        self._segment_bytes = segment_bytes
        self._mutex = threading.Lock()
        self._retired: list[int] = []  # rotated out, not yet known to be on the disk
        self._undo = False  # the file may hold bytes behind `_end` that no caller was told of
        self._signed: Link | None = None
        self._fds: list[int] = []
        try:
            self._open(now, mono_ns)
        except OSError as error:
            self.close()
            raise AuditUnavailable(
                f"the audit log in {directory} can't be opened: {error.strerror}", "make the folder writable for the broker"
            ) from error
        except BaseException:
            self.close()
            raise

    def _open(self, now: float, mono_ns: int) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        self._lock = self._keep(_locked(self._directory))
        torn = _set_torn_line_aside(self._directory)
        found = chain.segments(self._directory)
        self._head = _checked_head(self._directory, self._key)
        path, self._end = found[-1] if found else (self._directory / chain.segment_name(1), 0)
        self._fd = self._keep(os.open(path, _APPEND, 0o600))
        os.fchmod(self._fd, 0o600)
        self.sync(now)
        if torn:
            self.append(config_record(now, mono_ns, f"the last write was cut short by a crash; its {torn}"))

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    @property
    def head(self) -> Link:
        """The last record's place in the chain."""
        return self._head

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Give the record its `seq`, `prev_hash` and `hash` and write it; returns it so. Raises `AuditUnavailable`."""
        with self._mutex:
            head = self._head
            entry = {**record, "seq": head.seq + 1, "prev_hash": head.hash}
            try:
                entry["hash"] = chain.record_hash(entry)
                line = canonical(entry) + b"\n"
            except TypeError as error:
                raise AuditUnavailable(f"the record can't be written as JSON: {error}") from error
            if len(line) > chain.MAX_LINE:
                raise AuditUnavailable(f"the record is {len(line)} bytes long, and {chain.MAX_LINE} is the most")
            self._write(line, head.seq + 1)
            self._head = Link(head.seq + 1, head.hash, entry["hash"])
            return entry

    def _write(self, line: bytes, seq: int) -> None:
        try:
            self._roll_back()
            if self._end and self._end + len(line) > self._segment_bytes:
                self._rotate(seq)
            self._undo = True
            if os.write(self._fd, line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301 - a short write is a failed one
            self._end += len(line)
            self._undo = False
        except OSError as error:
            self._try_roll_back()
            raise AuditUnavailable(
                f"the audit log in {self._directory} can't be written: {error.strerror}",
                "free space or repair the disk; calls are denied until then and pass again by themselves",
            ) from error

    def _roll_back(self) -> None:
        if self._undo:
            os.ftruncate(self._fd, self._end)
            self._undo = False
        status = os.fstat(self._fd)
        if status.st_nlink == 0 or status.st_size != self._end:
            raise AuditUnavailable(
                f"the audit log in {self._directory} was deleted or changed by something else",
                "keep what is left of it as evidence and restart the broker",
            )

    def _try_roll_back(self) -> None:
        try:
            os.ftruncate(self._fd, self._end)
            self._undo = False
        except OSError:
            self._undo = True  # the next append tries again before it writes anything

    def _rotate(self, seq: int) -> None:
        fresh = self._keep(os.open(self._directory / chain.segment_name(seq), _APPEND | os.O_EXCL, 0o600))
        self._retired.append(self._fd)
        self._fd, self._end = fresh, 0

    def sync(self, now: float) -> None:
        """Put what was appended on the disk and sign the chain's end. Blocks on the disk: call it from a thread, once a second.

        Raises `AuditUnavailable`; the checkpoint before stays in place then.
        """
        with self._mutex:
            head = self._head
            if head == self._signed:
                return
            retired, self._retired = self._retired, []
            current = os.dup(self._fd)  # rotation or close may take the other one away meanwhile
        try:
            for fd in (*retired, current):
                os.fdatasync(fd)
            self._write_checkpoint(Checkpoint.sign(head, now, self._key))
        except OSError as error:
            self._retired += retired
            raise AuditUnavailable(
                f"the audit log in {self._directory} can't be put on the disk: {error.strerror}", "free space or repair the disk"
            ) from error
        finally:
            os.close(current)
        for fd in retired:
            self._fds.remove(fd)
            os.close(fd)
        self._signed = head

    def _write_checkpoint(self, checkpoint: Checkpoint) -> None:
        fresh = self._directory / f"{chain.CHECKPOINT}.new"
        _write_file(fresh, checkpoint.to_json(), os.O_TRUNC)
        fresh.replace(self._directory / chain.CHECKPOINT)
        folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the rename, and the names of new segments
        finally:
            os.close(folder)

    def close(self) -> None:
        """Let go of the files and of the lock. Does not sync. Appending afterwards raises `AuditUnavailable`."""
        with self._mutex:
            self._fd = -1
            while self._fds:
                os.close(self._fds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _locked(directory: Path) -> int:
    fd = os.open(directory / chain.LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise UsageError(
            f"another broker is writing the audit log in {directory}", "stop it, or give this one its own folder with --state"
        ) from None
    return fd


def _set_torn_line_aside(directory: Path) -> str:
    """Move a last line without its newline out of the log; what was done, or nothing. No caller was told that it was written."""
    found = chain.segments(directory)
    path, size = found[-1] if found else (directory, 0)
    keep = chain.whole_lines(path, size) if found else 0
    if keep == size:
        return ""
    with path.open("r+b") as file:
        file.seek(keep)
        torn = file.read()
        _write_file(path.with_name(f"{path.name}.torn"), torn, os.O_APPEND)  # on the disk before it leaves the log
        file.truncate(keep)
    return f"{len(torn)} bytes were moved to {path.name}.torn"


def _write_file(path: Path, content: bytes, flag: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flag, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(fd)


def _checked_head(directory: Path, key: Ed25519PrivateKey) -> Link:
    """The end of the chain, after walking back from it to the signed checkpoint: what is older is `verify`'s business.

    Without this, the next checkpoint would put our own signature under a log that someone cut or rewrote while we were away.
    """
    found = chain.segments(directory)
    try:
        checkpoint = Checkpoint.read(directory)
        if checkpoint is not None:
            checkpoint.check(key.public_key())
        return _walk_back(found, checkpoint)
    except ValueError as error:
        raise AuditTampered(
            f"the audit log in {directory} is not what was signed: {error}",
            "run `broker audit verify`, then move the folder away as evidence (the broker starts a new log), or restore its key",
        ) from None


def _walk_back(found: list[tuple[Path, int]], checkpoint: Checkpoint | None) -> Link:
    head: Link | None = None
    signed = (checkpoint.seq, checkpoint.hash) if checkpoint else (0, chain.ZERO)
    reached: tuple[int, str] | None = None  # the record that the walk must meet next, or met last
    for line in chain.backwards(found):
        if checkpoint is None:  # opening signs before the first record is written, so this one was taken away
            raise ValueError("there are records, but no checkpoint")
        link = chain.read_link(line)
        head = head or link
        if reached not in (None, (link.seq, link.hash)):
            raise ValueError(f"record {link.seq} is not the one that the next one follows")
        reached = (link.seq, link.hash)
        if link.seq <= signed[0]:
            break
        reached = (link.seq - 1, link.prev_hash)
    if (reached or (0, chain.ZERO)) != signed:
        raise ValueError(f"it has no record {signed[0]} with the hash in the checkpoint: records were cut off or rewritten")
    return head or chain.START
