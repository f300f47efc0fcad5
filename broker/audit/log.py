"""The audit log: append-only JSON lines that survive this process, and say so when they can't be written.

Laws: one writer (a lock that dies with its holder). A record is one whole line in one write, or nothing: what did not fit is cut
off again, the caller gets `AuditUnavailable`, and the next append tries afresh. No append waits for the disk: the page cache
survives kill -9, and `sync()`, once a second off the event loop, bounds what a power loss takes to that second. A log that does
not continue its own signed checkpoint is evidence: it is refused, not continued.
"""

import contextlib
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
from broker.audit.record import canonical, config_record, timestamp
from broker.audit.verify import verify
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
        self._signed: Link | None = None
        self._written = self._synced = True
        with contextlib.ExitStack() as files:
            self._files = files
            try:
                self._open(now, mono_ns)
            except OSError as error:
                why = f"the audit log in {directory} can't be opened: {error.strerror}"
                raise AuditUnavailable(why, "make the folder writable for the broker") from error
            self._files = files.pop_all()

    def _open(self, now: float, mono_ns: int) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        lock = os.open(self._directory / ".lock", _APPEND, 0o600)
        self._files.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = f"another broker is writing the audit log in {self._directory}"
            raise UsageError(why, "stop it, or give this one its own folder with --state") from None
        found = chain.segments(self._directory)
        path = found[-1][0] if found else self._directory / chain.segment_name(1)
        torn = _set_torn_line_aside(path) if found else ""
        self._head = _checked_head(self._directory, self._key)
        self._folder = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files.callback(os.close, self._folder)
        self._fd = os.open(path, _APPEND, 0o600)
        self._files.callback(lambda: os.close(self._fd))
        self._end = os.fstat(self._fd).st_size
        self._undo = False  # the file may hold bytes behind `_end` that no caller was told of
        self.sync(now)
        if torn:
            self.append(config_record(now, mono_ns, f"the last write was cut short by a crash; its {torn}"))

    @property
    def head(self) -> Link:
        """The last record."""
        return self._head

    @property
    def writable(self) -> bool:
        """Whether the last append and the last sync succeeded."""
        return self._written and self._synced

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
            self._written = False
            try:
                self._write(line, head.seq + 1)
            except OSError as error:
                why = f"the audit log in {self._directory} can't be written: {error.strerror}"
                advice = "free space or repair the disk; calls are denied until then and pass again by themselves"
                raise AuditUnavailable(why, advice) from error
            self._written = True
            self._head = Link(head.seq + 1, head.hash, entry["hash"])
            return entry

    def _write(self, line: bytes, seq: int) -> None:
        self._roll_back()
        status = os.fstat(self._fd)
        if status.st_nlink == 0 or status.st_size != self._end:
            why = f"the audit log in {self._directory} was deleted or changed by something else"
            raise AuditUnavailable(why, "keep what is left of it as evidence and restart the broker")
        if self._end and self._end + len(line) > self._segment_bytes:
            self._rotate(seq)
        self._undo = True
        if os.write(self._fd, line) != len(line):
            with contextlib.suppress(OSError):  # then the next append tries again, before it writes anything
                self._roll_back()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._end += len(line)
        self._undo = False

    def _roll_back(self) -> None:
        if self._undo:
            os.ftruncate(self._fd, self._end)
            self._undo = False

    def _rotate(self, seq: int) -> None:
        os.fdatasync(
            self._fd
        )  # at most what a second brought, once in 64 MiB; and first, so that a failure leaves no file behind
        fresh = os.open(self._directory / chain.segment_name(seq), _APPEND | os.O_EXCL, 0o600)
        os.close(self._fd)
        self._fd, self._end = fresh, 0

    def sync(self, now: float) -> None:
        """Put what was appended on the disk and sign the chain's end. Blocks on the disk: call it from a thread, once a second.

        Raises `AuditUnavailable`; the checkpoint before stays in place then.
        """
        with self._mutex:
            head = self._head
            if head == self._signed:
                return
            fd = os.dup(self._fd)  # rotation or close may take the other one away meanwhile
        try:
            os.fdatasync(fd)
            content = Checkpoint(head.seq, head.hash, timestamp(now)).sign(self._key).encode()
            fresh = self._directory / f"{chain.CHECKPOINT}.new"
            _write_file(fresh, content, os.O_TRUNC)
            fresh.replace(self._directory / chain.CHECKPOINT)
            os.fsync(self._folder)  # the rename, and the names of new segments
        except OSError as error:
            self._synced = False
            why = f"the audit log in {self._directory} can't be put on the disk: {error.strerror}"
            raise AuditUnavailable(why, "free space or repair the disk") from error
        finally:
            os.close(fd)
        self._signed, self._synced = head, True

    def close(self) -> None:
        """Let go of the files and of the lock. Does not sync. Appending afterwards raises `AuditUnavailable`."""
        with self._mutex:
            self._files.close()
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _set_torn_line_aside(path: Path) -> str:
    """Move a last line without its newline out of the log; what was done, or nothing. No caller was told that it was written."""
    keep = sum(len(line) for line in chain.lines(path) if line.endswith(b"\n"))
    with path.open("r+b") as file:
        file.seek(keep)
        if not (torn := file.read()):
            return ""
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
    """The end of the chain, checked from the segment of the signed checkpoint on: what is older is `verify`'s business.

    Without this, the next checkpoint would put our own signature under a log that someone cut or rewrote while we were away.
    """
    found = verify(directory, key.public_key(), tail=True)
    fresh = not found.records and not (directory / chain.CHECKPOINT).exists()
    if found.problems and not fresh:
        raise AuditTampered(
            f"the audit log in {directory} is not what was signed: {found.problems[0].what}",
            "run `broker audit verify`, then move the folder away as evidence (the broker starts a new log), or restore its key",
        )
    return found.end
