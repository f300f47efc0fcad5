"""Revocations, pushed into memory so that asking costs nothing, and rebuilt from the audit log at start.

Law: a revocation is in force before anything else happens, and only a recorded one is.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from broker.identity import Principal


class Revocations:
    """Per agent, the moment (seconds since the epoch) up to which its tokens no longer count."""

    def __init__(self) -> None:
        self._tokens_before: dict[str, float] = {}

    def revoke_tokens(self, agent: str, until: float) -> None:
        """Take back every token of `agent` that was issued up to `until`."""
        self._tokens_before[agent] = max(until, self._tokens_before.get(agent, 0.0))

    def taken_back(self, principal: Principal) -> bool:
        """Whether the token behind this identity was taken back."""
        return 0 < principal.issued <= self._tokens_before.get(principal.agent, 0.0)

    def replay(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Apply the revocation records of an audit log, in order."""
        for record in records:
            revoked = record.get("revoked")
            if record.get("event") == "revocation" and isinstance(revoked, Mapping):
                self.revoke_tokens(str(record["agent"]["name"]), float(revoked["tokens_until"]))
