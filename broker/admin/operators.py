"""What people may ask of a broker and do about agents: by the control socket, or over TCP with an operator's token.

Law: whoever does something is named, and says why. Over the socket, which only the broker's own user can open, people say their
name themselves; over TCP a token says it.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from starlette.requests import Request

from broker.admin import agents
from broker.admin.api import Act
from broker.containment.response import Containment
from broker.containment.standing import EVERYONE
from broker.errors import UsageError
from broker.identity import Person, TokenAuthority
from broker.ledger.base import Ledger
from broker.policy.snapshot import PolicySnapshot

_LONGEST = 500  # characters of a reason


class Operators:
    """The acts, by `METHOD /path`. `now` and `steady` are in seconds since the epoch, the latter by the ledger's clock."""

    def __init__(
        self, snapshot: Callable[[], PolicySnapshot], ledger: Ledger, containment: Containment, steady: Callable[[], float]
    ) -> None:
        self._snapshot, self._ledger, self._containment, self._steady = snapshot, ledger, containment, steady

    @property
    def acts(self) -> Mapping[str, Act]:
        """All of them."""
        return {
            "GET /agents": self._listed,
            "GET /agents/{name:path}": self._shown,
            "POST /agents/{name:path}/tokens/revoke": self._revoke_tokens,
            "POST /agents/{name:path}/revoke": self._revoke,
            "POST /agents/{name:path}/release": self._release,
            "GET /approvals": self._approvals,
            "POST /approvals/{id}/approve": partial(self._vote, approves=True),
            "POST /approvals/{id}/reject": partial(self._vote, approves=False),
        }

    async def _listed(self, *_: object) -> dict[str, Any]:
        return await agents.listed(self._snapshot(), self._ledger, self._containment.standing, self._steady())

    async def _shown(self, path: Mapping[str, str], *_: object) -> dict[str, Any]:
        agent = self._snapshot().agents.get(path["name"])
        return await agents.shown(agent, self._ledger, self._containment.standing, self._steady()) if agent else {}

    def _revoke_tokens(self, path: Mapping[str, str], _: object, who: Person) -> dict[str, Any]:
        self._containment.revoke_tokens(path["name"], who.name)
        return {"agent": path["name"], "revoked": "tokens"}

    def _revoke(self, path: Mapping[str, str], said: Mapping[str, Any], who: Person) -> dict[str, Any]:
        name = path["name"]
        # An agent whose manifest was taken away makes no new call, but what it has open goes on until it is cut.
        if name != EVERYONE and name not in self._snapshot().agents and name not in self._containment.open:
            raise UsageError(f"no manifest names an agent {name!r}", "see `broker agents list`")
        done = self._containment.revoke(name, _run(said), _reason(said), who.name)
        return {"agent": name, "revoked": asdict(done)}

    def _release(self, path: Mapping[str, str], said: Mapping[str, Any], who: Person) -> dict[str, Any]:
        gone = self._containment.release(path["name"], _run(said), _reason(said), who.name)
        if not gone:
            raise ValueError(f"nothing holds for {path['name']!r} by its name; see `broker agents list`")
        return {"agent": path["name"], "released": [asdict(each) for each in gone]}

    def _approvals(self, *_: object) -> dict[str, Any]:
        return {"approvals": list(self._containment.listed())}

    def _vote(self, path: Mapping[str, str], said: Mapping[str, Any], who: Person, *, approves: bool) -> dict[str, Any]:
        reason = str(said.get("reason") or "")[:_LONGEST]
        return self._containment.vote(path["id"], who, reason, approves=approves)


def _run(said: Mapping[str, Any]) -> str | None:
    run = said.get("run_id")
    return None if run is None else str(run)


def _reason(said: Mapping[str, Any]) -> str:
    reason = said.get("reason")
    if not isinstance(reason, str) or not reason.strip():
        raise ValueError("a reason is needed; it is recorded")
    return reason.strip()[:_LONGEST]


def local(_: Request, said: Mapping[str, Any]) -> Person | None:
    """Whoever may open the socket, by the name that they say."""
    name = said.get("by")
    return Person(name[:_LONGEST] if isinstance(name, str) and name.strip() else "an operator")


def by_token(tokens: TokenAuthority, now: Callable[[], float]) -> Callable[[Request, Mapping[str, Any]], Person | None]:
    """Whose operator token a request brings (RFC 6750)."""

    def person(request: Request, _said: Mapping[str, Any]) -> Person | None:
        scheme, _space, token = request.headers.get("authorization", "").partition(" ")
        return tokens.operator(token.strip(), now()) if scheme.lower() == "bearer" else None

    return person
