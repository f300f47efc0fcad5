"""How agents stand: what was done to them and not lifted, which tokens no longer count, and what of theirs is open.

Laws: a restriction has an ID and is lifted by naming it, so one that somebody adds meanwhile stays: of a revocation and a release
at the same time, the revocation wins, whatever the clocks say. Asking costs a look into a dictionary. Whoever opens something for
an agent enters it here first and asks how the agent stands afterwards, so that nothing slips in between.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from broker.identity import Principal
from broker.policy.containment import Action
from broker.policy.evaluate import View
from broker.policy.types import Code

log = logging.getLogger(__name__)

EVERYONE = "*"
"""The agent of a restriction that is on all of them; no manifest can have this name."""

MOST_RUNS = 20
"""So many revoked runs of one agent revoke the agent: it names new runs faster than they can be revoked."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """What was done to an agent (or `EVERYONE`), by whom and why.

    `run_id` is None where it is on the whole agent, and else the run, empty for the calls without a run ID. `at` is in seconds
    since the epoch.
    """

    id: str
    action: Action
    agent: str
    run_id: str | None
    reason: str
    by: str
    at: float

    @property
    def notice(self) -> dict[str, Any]:
        """As it is recorded and told to other brokers."""
        return {"kind": "restriction", **asdict(self)}

    @classmethod
    def read(cls, notice: Mapping[str, Any]) -> "Restriction":
        """The reverse of `notice`. Raises `KeyError` or `ValueError`."""
        known = {name: notice[name] for name in ("id", "agent", "run_id", "reason", "by", "at")}
        return cls(action=Action(notice["action"]), **known)

    @property
    def why(self) -> str:
        """Why, in a few words."""
        return f"{self.reason} (by {self.by})"


class Standing:
    """The restrictions that hold, and the moments up to which agents' tokens no longer count."""

    def __init__(self) -> None:
        self._holding: dict[str, dict[str, Restriction]] = {}
        self._lifted: set[str] = set()
        self._tokens_before: dict[str, float] = {}

    def restrict(self, new: Restriction) -> None:
        """From now on it holds, unless it was lifted already. A revocation takes back all tokens issued up to its moment."""
        if new.action is Action.REVOKE_AGENT:
            self.revoke_tokens(new.agent, new.at)
        if new.id not in self._lifted:
            self._holding.setdefault(new.agent, {})[new.id] = new

    def lift(self, ids: Iterable[str]) -> None:
        """These hold no longer, also if they come to be known only later."""
        self._lifted.update(ids)
        for held in self._holding.values():
            for gone in held.keys() & self._lifted:
                del held[gone]
        self._holding = {agent: held for agent, held in self._holding.items() if held}

    def forget(self, restriction: Restriction) -> None:
        """As if this one had never been."""
        self._holding.get(restriction.agent, {}).pop(restriction.id, None)
        self._tokens_before.pop(restriction.agent, None)
        self._holding = {agent: held for agent, held in self._holding.items() if held}

    def revoke_tokens(self, agent: str, until: float) -> None:
        """Tokens of `agent` that were issued up to `until` no longer count."""
        self._tokens_before[agent] = max(until, self._tokens_before.get(agent, 0.0))

    def taken_back(self, principal: Principal) -> bool:
        """Whether the token behind this identity was taken back."""
        before = max(self._tokens_before.get(principal.agent, 0.0), self._tokens_before.get(EVERYONE, 0.0))
        return 0 < principal.issued <= before

    def of(self, agent: str) -> list[Restriction]:
        """What holds for this agent by its name, the first first."""
        return list(self._holding.get(agent, {}).values())

    @property
    def all(self) -> list[Restriction]:
        """What holds for anyone."""
        return [each for held in self._holding.values() for each in held.values()]

    def view(self, agent: str, run_id: str | None) -> View:
        """How an agent stands in one of its runs; None is for what belongs to no run (a tunnel)."""
        if not self._holding:
            return FREE
        held = {
            _FIELDS[each.action]: each.id
            for name in (agent, EVERYONE)
            for each in self._holding.get(name, {}).values()
            if each.run_id is None or each.run_id == run_id
        }
        return View(**held)


FREE = View()
_FIELDS = {Action.REVOKE_AGENT: "revoked", Action.REVOKE_RUN: "revoked", Action.READ_ONLY: "read_only", Action.HOLD: "hold"}


@dataclass(slots=True, eq=False)
class Opened:
    """A call or tunnel that is open. `run_id` is None for a tunnel; `cut` ends it, hearing why, and a code if none is revoked."""

    agent: str
    run_id: str | None
    cut: Callable[..., object]
    decision_id: str = ""


class OpenCalls:
    """What is open, by agent."""

    def __init__(self) -> None:
        self._open: dict[str, set[Opened]] = {}

    def enter(self, opened: Opened) -> Opened:
        """It is open from now on."""
        self._open.setdefault(opened.agent, set()).add(opened)
        return opened

    def leave(self, opened: Opened) -> None:
        """It has ended, or can't be cut any more. Does nothing the second time."""
        if known := self._open.get(opened.agent):
            known.discard(opened)
            if not known:
                del self._open[opened.agent]

    def cut(self, restriction: Restriction) -> int:
        """Cut what a revocation is about; how many these were."""
        named = list(self._open.values()) if restriction.agent == EVERYONE else [self._open.get(restriction.agent, set())]
        found = [each for known in named for each in known if restriction.run_id in (None, each.run_id)]
        return self._cut(found, restriction.why)

    def cut_off(self, decision_ids: Collection[str] | None) -> int:
        """Cut these calls, or (None) all that is open, of a broker that has not heard of others for long; how many these were."""
        found = [
            each for known in self._open.values() for each in known if decision_ids is None or each.decision_id in decision_ids
        ]
        return self._cut(found, "this broker has been cut off from the shared ledger for too long", Code.LEDGER_UNAVAILABLE)

    def _cut(self, found: list[Opened], *why: str) -> int:
        for each in found:
            self.leave(each)
            try:
                each.cut(*why)
            except Exception:  # the others must be cut, whatever is wrong with this one
                log.exception("a call of %s could not be cut", each.agent)
        return len(found)

    def __contains__(self, agent: str) -> bool:
        return agent in self._open

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))
