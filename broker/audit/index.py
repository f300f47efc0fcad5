"""The index over the audit log: finds records without reading all of them.

Laws: derived, never evidence. Whatever it is asked for is answered with the log's own lines, read where it says that they lie. It
reads the log only, also while a broker writes, and of that only what was appended since; where the log is not the one that was
indexed (a file vanished, shrank, or no longer has the line that was its last) the index is made anew. A line that is no record
is passed over: `broker audit verify` judges it. The labels that reviewers give stay, whatever happens to the index.

A record is a row of some numbers and the names of its run and decision; what many records share is one row of `shape`. So what
is asked of millions of records is mostly asked of some hundred shapes.
"""

import errno
import hashlib
import heapq
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, NamedTuple, Self

import orjson

from broker.audit import chain
from broker.errors import UsageError
from broker.redaction import redacted

FILE = "review.db"
_VERSION = 1
_BATCH = 100_000  # lines in one transaction: some seconds in which another reader waits
_BUSY_S = 60.0  # how long a reader waits for another one's batch
_PLAIN = ("event", "verdict", "code", "rule", "tool", "effect", "host")
_SHAPE = ("agent", "operation", "data", *_PLAIN)
_CACHE_KIB = 65_536  # a million names of decisions come in no order
# Whole microseconds, since a float would not tell two records apart in some decades.
_MICRO = 1_000_000

_COLUMNS = ", ".join(_SHAPE)
_TABLES = f"""
CREATE TABLE segment (id INTEGER PRIMARY KEY, name TEXT UNIQUE, read INTEGER, last INTEGER, digest TEXT);
CREATE TABLE shape (id INTEGER PRIMARY KEY, {" TEXT NOT NULL, ".join(_SHAPE)} TEXT NOT NULL, UNIQUE ({_COLUMNS}));
CREATE TABLE record (
    id INTEGER PRIMARY KEY, time INTEGER, shape INTEGER, run TEXT, decision TEXT, segment INTEGER, start INTEGER, length INTEGER);
CREATE INDEX record_shape ON record (shape, time);
CREATE INDEX record_run ON record (run) WHERE run IS NOT NULL;
CREATE INDEX record_decision ON record (decision) WHERE decision IS NOT NULL;
"""
_WRITE_AHEAD = "PRAGMA journal_mode=WAL"  # so that whoever reads a long answer holds up nobody
_LABELS = "CREATE TABLE IF NOT EXISTS label (cluster TEXT PRIMARY KEY, label TEXT, note TEXT, by TEXT, at REAL, expires REAL)"
_ROW = "record.time, record.id, record.decision, segment.name, record.start, record.length"
_DENIED = "shape.code <> '' AND (shape.event = 'outcome' OR shape.verdict IN ('deny', 'hold', 'would_deny'))"
_FROM = "FROM record JOIN shape ON shape.id = record.shape JOIN segment ON segment.id = record.segment"


class Row(NamedTuple):
    """Where a record lies. Sorts by time (microseconds since the epoch), and at the same time as they were written."""

    time: int
    id: int
    decision_id: str | None
    segment: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Shape:
    """What many records have in common; empty text where a record does not say. `operation` as `tried` writes it.

    `count`, `first` and `last` (seconds since the epoch) are of those records of it that were asked for.
    """

    id: int
    agent: str
    operation: str
    data: str
    event: str
    verdict: str
    code: str
    rule: str
    tool: str
    effect: str
    host: str
    count: int = 0
    first: float = 0.0
    last: float = 0.0


@dataclass(frozen=True, slots=True)
class Label:
    """What a reviewer said of a cluster of denials. Times in seconds since the epoch; `expires` is None where it stays."""

    label: str
    note: str
    by: str
    at: float
    expires: float | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which records; None or empty where it does not matter. Times in seconds since the epoch, from `since` to before `until`."""

    agent: str | None = None
    run: str | None = None
    tool: str | None = None
    operation: str | None = None
    effect: str | None = None
    data: str | None = None
    code: str | None = None
    verdict: str | None = None
    since: float | None = None
    until: float | None = None

    def clause(self) -> tuple[str, list[Any]]:
        """As a condition of SQL, with its parameters."""
        same = {name: getattr(self, name) for name in ("agent", "tool", "effect", "code", "verdict")}
        asked: list[tuple[str, Any]] = [(f"shape.{name} = ?", value) for name, value in same.items() if value]
        asked += [("shape.operation = ?", tried(self.operation))] if self.operation else []
        asked += [("instr(shape.data, ?)", f" {self.data} ")] if self.data else []
        asked += [("record.run = ?", self.run)] if self.run else []
        asked += [("record.time >= ?", _micros(self.since))] if self.since is not None else []
        asked += [("record.time < ?", _micros(self.until))] if self.until is not None else []
        return " AND ".join(word for word, _ in asked) or "1", [value for _, value in asked]


@lru_cache(maxsize=4096)  # a catalog has few, and they come with every call
def tried(operation: str) -> str:
    """An operation's name as it is; of a request that matched none ("GET /v1/accounts/123"), each segment with a digit as `*`."""
    method, space, path = operation.partition(" ")
    if not space or not path.startswith("/"):
        return redacted(operation)
    segments = ("*" if any(map(str.isdigit, part)) else part for part in path.split("/"))
    return redacted(f"{method} {'/'.join(segments)}")


class Index:
    """The index of one state folder, open, and as far as `update` has brought it. Raises `UsageError` where it can't be used."""

    def __init__(self, state: Path) -> None:
        self._log = state / "audit"
        self._path = state / FILE
        if not self._log.is_dir():
            raise UsageError(f"there is no audit log in {self._log}", "name the broker's state folder with --state")
        self._files = ExitStack()
        with self._guarded():
            _make_private(self._path)
            self._db = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
            self._files.callback(self._db.close)
            self._db.execute(_WRITE_AHEAD)
            self._db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._files.close()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        again = "it is made again from the record, but the labels in it are lost"
        try:
            yield
        except sqlite3.OperationalError as error:
            advice = f"make the state folder writable for you, or if this file is damaged, delete it: {again}"
            raise UsageError(f"the index {self._path} can't be used: {error}", advice) from error
        except sqlite3.Error as error:
            raise UsageError(f"{self._path} is no index of the broker's: {error}", f"delete it: {again}") from error
        except UnicodeEncodeError:
            raise UsageError("an argument is not UTF-8", "write it in UTF-8") from None
        except OSError as error:
            what = f"{error.filename or self._path} can't be used: {error.strerror}"
            raise UsageError(what, "run this as a user who may read the audit log and write to the state folder") from error

    # Keeping up with the log.

    def update(self, progress: Callable[[int, int], object] = lambda _read, _all: None) -> int:
        """Index what the log has more; how many lines. `progress` hears after each batch how many bytes are read, of how many."""
        new = 0
        with self._guarded():
            while True:
                self._end()
                # A transaction for each batch: what is done stays done, and several readers share the work.
                self._db.execute("BEGIN IMMEDIATE")
                try:
                    batch, read, size = self._step()
                    self._db.execute("COMMIT")
                finally:
                    self._end()
                new += batch
                if batch < _BATCH:
                    # What is asked from now on is answered from one state of the index, whatever another reader does to it.
                    self._db.execute("BEGIN")
                    return new
                progress(read, size)

    def _end(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _step(self) -> tuple[int, int, int]:
        found = chain.segments(self._log)
        known = self._known(found)
        if known is None:
            self._make()
            known = {}
        batch = _Batch(self._db)
        for path, size in found:
            if batch.room and known.get(path.name, -1) < size:
                known[path.name] = batch.take(path, known.get(path.name), closed=path != found[-1][0])
        return _BATCH - batch.room, sum(known.values()), sum(size for _, size in found)

    def _known(self, found: Sequence[tuple[Path, int]]) -> dict[str, int] | None:
        """How far each segment was read; None where this is no index of this log."""
        if self._db.execute("PRAGMA user_version").fetchone() != (_VERSION,):
            return None
        known = self._db.execute("SELECT name, read, last, digest FROM segment ORDER BY name").fetchall()
        if [name for name, *_ in known] != [path.name for path, _ in found[: len(known)]]:
            return None
        for number, (name, read, last, digest) in enumerate(known, 1):
            size = found[number - 1][1]
            # A broker appends to the last segment only. Its last line holds its hash, and so all that was before it.
            if size < read or (size > read and number < len(known)) or _digest(self._log / name, last, read) != digest:
                return None
        return {name: read for name, read, *_ in known}

    def _make(self) -> None:
        names = ("segment", "shape", "record")
        script = "".join(f"DROP TABLE IF EXISTS {name};" for name in names) + _TABLES
        for statement in filter(str.strip, script.split(";")):
            self._db.execute(statement)
        self._db.execute(_LABELS)
        self._db.execute(f"PRAGMA user_version={_VERSION}")

    # Asking.

    def denied(self, wanted: Wanted) -> list[Shape]:
        """The shapes of those wanted records by which a call was denied, or would have been, or was ended by the broker."""
        where, values = wanted.clause()
        # CROSS JOIN: shapes first, since they are few. Of the records only the index is read then.
        asked = f"""SELECT shape.*, count(*), min(record.time) / 1e6, max(record.time) / 1e6
            FROM shape CROSS JOIN record ON record.shape = shape.id
            WHERE {_DENIED} AND {where} GROUP BY shape.id"""  # noqa: S608 - all values are parameters
        with self._guarded():
            return [Shape(*row) for row in self._db.execute(asked, values)]

    def allowed(self) -> set[tuple[str, str, str, str]]:
        """What was ever allowed, as agent, tool, operation and host."""
        with self._guarded():
            return set(self._db.execute("SELECT agent, tool, operation, host FROM shape WHERE verdict = 'allow'"))

    def latest(self, shapes: Iterable[int], since: float | None = None) -> Iterator[Row]:
        """The records of these shapes, latest first."""
        asked = f"SELECT {_ROW} {_FROM} WHERE record.shape = ? AND record.time >= ? ORDER BY record.time DESC, record.id DESC"
        start = -(2**63) if since is None else _micros(since)
        with self._guarded():
            each = (map(Row._make, self._db.execute(asked, (shape, start))) for shape in shapes)
            yield from heapq.merge(*each, reverse=True)

    def find(self, wanted: Wanted, last: int = 0) -> Iterator[Row]:
        """The wanted records in the log's order, all or the last so many."""
        where, values = wanted.clause()
        asked = f"SELECT {_ROW} {_FROM} WHERE {where} ORDER BY record.id"
        with self._guarded():
            whole = f"SELECT * FROM ({asked} DESC LIMIT {last}) ORDER BY 2" if last else asked  # noqa: S608 - a number
            yield from map(Row._make, self._db.execute(whole, values))

    def decided(self, decision_id: str) -> Iterator[Row]:
        """The records that bear on a decision, in the log's order."""
        with self._guarded():
            asked = f"SELECT {_ROW} {_FROM} WHERE record.decision = ? ORDER BY record.id"
            yield from map(Row._make, self._db.execute(asked, (decision_id,)))

    def read(self, rows: Iterable[Row]) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The log's lines, without their newlines, and what they say. What somebody made unreadable meanwhile is left out."""
        with self._guarded(), ExitStack() as opened:
            name, file = "", -1
            for row in rows:
                if row.segment != name:
                    opened.close()
                    name, file = row.segment, os.open(self._log / row.segment, os.O_RDONLY | os.O_CLOEXEC)
                    opened.callback(os.close, file)
                line = os.pread(file, row.length, row.start)[:-1]
                if (record := _record(line)) is not None:
                    yield line, record

    def records(self, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
        """What the log's lines say."""
        return (record for _, record in self.read(rows))

    # Labels.

    def labels(self, now: float) -> Mapping[str, Label]:
        """The labels of clusters that have not expired."""
        asked = "SELECT * FROM label WHERE expires IS NULL OR expires > ?"
        with self._guarded():
            return {cluster: Label(*said) for cluster, *said in self._db.execute(asked, (now,))}

    def label(self, cluster: str, label: Label | None) -> None:
        """Give a cluster this label, in the place of any other, or take its label off."""
        with self._guarded():
            self._end()
            if label is None:
                self._db.execute("DELETE FROM label WHERE cluster = ?", (cluster,))
            else:
                said = (cluster, label.label, label.note, label.by, label.at, label.expires)
                self._db.execute("INSERT OR REPLACE INTO label VALUES (?, ?, ?, ?, ?, ?)", said)


class _Batch:
    """What one transaction adds; there is `room` for so many lines more."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.room = _BATCH
        self._db = db
        self._shapes: dict[tuple[str, ...], int] = {}

    def take(self, path: Path, read: int | None, *, closed: bool) -> int:
        """Index lines of a segment from the byte `read` on; up to where."""
        if read is None:
            self._db.execute(
                "INSERT INTO segment (name, read, last, digest) VALUES (?, 0, 0, ?)", (path.name, _digest(path, 0, 0))
            )
        ((segment,),) = self._db.execute("SELECT id FROM segment WHERE name = ?", (path.name,))
        rows, last, end = [], 0, read or 0
        for line in _lines(path, end, closed=closed):
            last, end = end, end + len(line)
            if known := self._known(line):
                rows.append((*known, segment, last, len(line)))
            self.room -= 1
            if not self.room:
                break
        insert = "INSERT INTO record (time, shape, run, decision, segment, start, length) VALUES (?, ?, ?, ?, ?, ?, ?)"
        self._db.executemany(insert, rows)
        if end > (read or 0):
            digest = _digest(path, last, end)
            self._db.execute("UPDATE segment SET read = ?, last = ?, digest = ? WHERE id = ?", (end, last, digest, segment))
        return end

    def _known(self, line: bytes) -> tuple[int, int, str | None, str | None] | None:
        """Time, shape, run and decision; None where the line is no record."""
        if (record := _record(line)) is None:
            return None
        try:
            when = datetime.fromisoformat(record["time"])
            if when.tzinfo is None:
                return None
            time = _micros(when.timestamp())
            shape = _words(record)
            run, decision = _run(record), record.get("decision_id")
        except (ValueError, TypeError, AttributeError, LookupError, OverflowError):
            return None
        return time, self._shape(shape), run if isinstance(run, str) else None, decision if isinstance(decision, str) else None

    def _shape(self, shape: tuple[str, ...]) -> int:
        if shape not in self._shapes:
            marks = ", ".join("?" * len(_SHAPE))
            self._db.execute(f"INSERT OR IGNORE INTO shape ({_COLUMNS}) VALUES ({marks})", shape)  # noqa: S608 - our own names
            (found,) = self._db.execute(f"SELECT id FROM shape WHERE ({_COLUMNS}) = ({marks})", shape)  # noqa: S608 - the same
            self._shapes[shape] = found[0]
        return self._shapes[shape]


def _make_private(path: Path) -> None:
    """Make the file, where it is missing: SQLite would let others read it. What SQLite makes beside it has the same rights.

    It appears whole, with its write-ahead log on: readers that turned it on at the same time would find each other's locks.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))
    # Never opened by name once it is there: closing it would take this process's locks on it away (fcntl(2)).
    if path.exists():
        return
    with NamedTemporaryFile(dir=path.parent, prefix=path.name) as fresh:
        with closing(sqlite3.connect(fresh.name)) as made:
            made.execute(_WRITE_AHEAD)
        with suppress(FileExistsError):
            os.link(fresh.name, path)


def _lines(path: Path, start: int, *, closed: bool) -> Iterator[bytes]:
    """Lines from there on. What is too long for one comes in parts, and what has no newline only where nothing more comes."""
    with path.open("rb") as file:
        file.seek(start)
        while line := file.readline(chain.MAX_LINE):
            if not (closed or line.endswith(b"\n") or len(line) == chain.MAX_LINE):
                return
            yield line


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = orjson.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def shape_of(record: Mapping[str, Any]) -> Shape:
    """What a decision's record has in common with others."""
    words: Any = _words(record)
    return Shape(0, *words)


def _words(record: Mapping[str, Any]) -> tuple[str, ...]:
    agent, operation, classes = record.get("agent"), record.get("operation"), record.get("data")
    return (
        str(agent.get("name") or "") if agent else "",
        tried(operation) if isinstance(operation, str) else "",
        f" {' '.join(classes)} " if classes else "",  # between spaces, so that each can be looked for
        *[value if isinstance(value := record.get(name), str) else "" for name in _PLAIN],
    )


def _run(record: Mapping[str, Any]) -> Any:
    """The run that a record names: of a call, of an alert, or in a notice (the second of what an approval binds)."""
    notice = record.get("notice") or {}
    return record.get("run_id") or notice.get("run_id") or (notice["asked"]["binding"][1] if "asked" in notice else None) or None


def _digest(path: Path, start: int, end: int) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(end - start)).hexdigest()


def _micros(seconds: float) -> int:
    return round(seconds * _MICRO)
