"""The embedded ledger on disk: a picture of it every so often, so that a restart replays seconds of the record and not a day.

Laws: the record is the truth and the picture only saves time. It names the record that it was taken after; where that one is not
in the log, with that hash, the picture counts for nothing and the whole day is replayed. Calls that are open when it is taken
have spent what they reserved.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from broker.audit import chain
from broker.audit.chain import Link
from broker.ledger.base import NAMED_IDLE_S
from broker.ledger.memory import MemoryLedger, Run
from broker.ledger.spending import replay
from broker.policy.snapshot import PolicySnapshot

log = logging.getLogger(__name__)


def take(ledger: MemoryLedger, link: Link) -> bytes:
    """The picture, of this moment, after the record `link`."""
    runs = [[*key, run.started, run.last, run.steps, run.counts] for key, run in ledger.runs.items()]
    counted = {"now": ledger.now, "windows": ledger.windows, "full_at": ledger.full_at, "runs": runs}
    return orjson.dumps({"seq": link.seq, "hash": link.hash, **counted})


def rebuild(ledger: MemoryLedger, path: Path, audit: Path, snapshot: PolicySnapshot, now: float) -> None:
    """Bring an empty ledger to where the log in `audit` left it; `path` is where the picture lies."""
    seq = _restore(ledger, path, audit)
    records = _records_after(audit, seq) if seq else _records_since(audit, now - NAMED_IDLE_S)
    replay(ledger, records, snapshot)
    log.info("the ledger is rebuilt from the record, %s", f"after its number {seq}" if seq else "as far as it can matter")


def _restore(ledger: MemoryLedger, path: Path, audit: Path) -> int:
    try:
        document: dict[str, Any] = orjson.loads(path.read_bytes())
        seq = int(document["seq"])
        if next(_records_after(audit, seq - 1))["hash"] != document["hash"]:
            return 0
        ledger.now, ledger.full_at = document["now"], document["full_at"]
        ledger.windows = {key: (window, spent) for key, (window, spent) in document["windows"].items()}
        ledger.runs = {(agent, run): Run(*rest) for agent, run, *rest in document["runs"]}
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return 0
    return seq


def _records_after(audit: Path, seq: int) -> Iterator[dict[str, Any]]:
    found = [path for path, _ in chain.segments(audit)]
    # A segment is named for its first record.
    begins = max((index for index, path in enumerate(found) if int(path.stem) <= seq + 1), default=0)
    records = (orjson.loads(line) for path in found[begins:] for line in chain.lines(path) if line.endswith(b"\n"))
    return (record for record in records if record["seq"] > seq)


def _records_since(audit: Path, since: float) -> Iterator[dict[str, Any]]:
    found = [path for path, _ in chain.segments(audit) if path.stat().st_mtime >= since]
    return (orjson.loads(line) for path in found for line in chain.lines(path) if line.endswith(b"\n"))
