"""The embedded ledger on disk: a picture of it every so often, so that a restart replays seconds of the record and not a day.

Laws: the record is the truth and the picture only saves time. It names the record that it was taken after, and carries a hash of
itself; where that record is not in the log, or either hash is another, the picture counts for nothing and all that can still
matter is replayed. Calls that are open when it is taken have spent what they reserved.
"""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from broker.audit import chain
from broker.audit.chain import Link
from broker.audit.record import canonical
from broker.ledger.base import NAMED_IDLE_S
from broker.ledger.memory import MemoryLedger, Run
from broker.ledger.spending import replay
from broker.policy.limits import Kind
from broker.policy.snapshot import PolicySnapshot

log = logging.getLogger(__name__)


def take(ledger: MemoryLedger, link: Link) -> bytes:
    """The picture, of this moment, after the record `link`."""
    runs = [[*key, run.started, run.last, run.steps, run.counts, run.trail] for key, run in ledger.runs.items()]
    counted = {"now": ledger.now, "windows": ledger.windows, "full_at": ledger.full_at, "runs": runs}
    content = canonical({"after": link.hash, "seq": link.seq, **counted})
    return b'{"hash":"%s","ledger":%s}' % (hashlib.sha256(content).hexdigest().encode(), content)


def rebuild(ledger: MemoryLedger, path: Path, audit: Path, snapshot: PolicySnapshot, now: float) -> None:
    """Bring an empty ledger to where the log in `audit` left it; `path` is where the picture lies.

    Without a picture, a named run that has gone on for longer than a day (or its `time_per_run`) has spent nothing before that.
    """
    seq = _restore(ledger, path, audit)
    records = _records_after(audit, seq) if seq else _records_since(audit, now - _memory(snapshot))
    replay(ledger, records, snapshot)
    log.debug("the ledger is rebuilt from the record, %s", f"after its number {seq}" if seq else "as far as it can matter")


def _memory(snapshot: PolicySnapshot) -> float:
    """How long ago a call may have been that still counts, in seconds. No window is longer than a day."""
    limits = [limit for agent in snapshot.agents.values() for limit in agent.limits]
    buckets = [limit.burst * limit.per / limit.amount for limit in limits if limit.kind is Kind.RATE and limit.amount]
    return max([NAMED_IDLE_S, *buckets, *(limit.amount for limit in limits if limit.kind is Kind.RUN_TIME)])


def _restore(ledger: MemoryLedger, path: Path, audit: Path) -> int:
    try:
        picture = orjson.loads(path.read_bytes())
        document: dict[str, Any] = picture["ledger"]
        if hashlib.sha256(canonical(document)).hexdigest() != picture["hash"]:
            return 0
        seq = int(document["seq"])
        if next(_records_after(audit, seq - 1))["hash"] != document["after"]:
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
