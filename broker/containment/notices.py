"""What holds for all brokers, as documents: when each is over, and how it is recorded.

A notice is JSON with an `id` and a `kind`: `restriction`, `release`, `tokens`, `asked`, `vote`, `used`, or an end (`expired`).
`docs/reference/audit.md` has their fields.
"""

from collections.abc import Mapping
from typing import Any

import orjson

Notice = Mapping[str, Any]


def ends(document: bytes) -> float:
    """When a notice is over, in seconds since the epoch; for ever later for one that stays."""
    if b'"expires":' not in document:
        return float("inf")
    notice = orjson.loads(document)
    return float(notice.get("expires") or notice["asked"]["expires"])


def read(notice_id: str, document: bytes) -> Notice:
    """What another broker says. Raises where it could not be let go one day, or would take another's place."""
    notice: Notice = orjson.loads(document)
    ends(document)
    if notice["id"] != notice_id:
        raise ValueError(f"it calls itself {notice['id']!r}")
    return notice


def recorded(notice: Notice) -> tuple[str, str, str] | None:
    """The event, the agent and the sentence by which a notice is recorded; None for a question, which the denial records."""
    match notice:
        case {"kind": "restriction", "agent": agent, "action": action, "by": by, "reason": reason, "run_id": run}:
            return "revocation", agent, f"{action}{f' {run!r}' if run is not None else ''} by {by}: {reason}"
        case {"kind": "tokens", "agent": agent, "by": by}:
            return "revocation", agent, f"tokens revoked by {by}"
        case {"kind": "release", "agent": agent, "by": by, "reason": reason}:
            return "release", agent, f"released by {by}: {reason}"
        case {
            "kind": "vote",
            "vote": {"approves": approves, "by": by, "of": of, "reason": reason},
            "asked": {"binding": binding},
        }:
            return (
                "approval",
                binding[0],
                f"{of} {'approved' if approves else 'rejected'} by {by}{f': {reason}' if reason else ''}",
            )
        case {"kind": "used" | "expired" as how, "of": of, "agent": agent}:
            return "approval", agent, f"{of} {how}"
    return None
