"""Approvals: what people are asked, what they answered, and for which call.

Laws: an answer is for one binding (agent, run, operation, everything of the request, revision) until it expires, and good for
one call: the ledger consumes it in the step in which it reserves, whoever asks at the same time. One no is a no. What was asked
before an agent was revoked is asked anew. Nothing here reads a clock; documents come in any order and any number of times.
"""

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.containment.standing import EVERYONE
from broker.policy.approval import Approval
from broker.policy.types import Json

MOST_WAITING = 32
"""Calls of one agent that wait for people at once: more, nobody reads, and each keeps its body."""

MOST_SHOWN = 65_536
"""Bytes of a body that a person is asked to judge; a longer one can't be approved."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that waits for people. `binding` is what their word is about; `shown` what they see of it.

    `at` and `expires` are in seconds since the epoch. `groups`: only people in one of them count; empty: anyone.
    """

    id: str
    binding: tuple[str, ...]
    approvers: int
    groups: tuple[str, ...]
    at: float
    expires: float
    why: str
    shown: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def about(cls, need: Approval, binding: tuple[str, ...], why: str, shown: Mapping[str, Any], at: float, id_: str) -> "Asked":  # noqa: PLR0913, PLR0917 - a question has as many parts
        """A new question."""
        return cls(id_, binding, need.approvers, tuple(sorted(need.groups)), at, at + need.expires, why, shown)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> "Asked":
        """From its JSON. Raises `KeyError`, `TypeError` or `ValueError`."""
        lists = {name: tuple(document[name]) for name in ("binding", "groups")}
        numbers = {"approvers": int(document["approvers"]), **{name: float(document[name]) for name in ("at", "expires")}}
        return cls(**{**document, **lists, **numbers})

    @property
    def agent(self) -> str:
        """Who wants to call."""
        return self.binding[0]

    def suffices(self, need: Approval) -> bool:
        """Whether at least as many are asked as `need` wants, and nobody outside its groups."""
        among = not need.groups or (bool(self.groups) and need.groups.issuperset(self.groups))
        return self.approvers >= need.approvers and among


@dataclass(frozen=True, slots=True)
class Vote:
    """A person's word on a question. `by` is the name; `approves` is False for a no."""

    of: str
    by: str
    groups: tuple[str, ...]
    approves: bool
    reason: str
    at: float

    @property
    def person(self) -> str:
        """Who that is, however the name is written: people say it themselves where no token does."""
        name = unicodedata.normalize("NFKC", self.by).casefold()
        return "".join(char for char in name if char.isprintable() and not char.isspace())


class Refusal(ValueError):
    """The word of this person can't be taken; the message says why."""


class Approvals:
    """What is asked and answered; `used` has the approvals that are consumed."""

    def __init__(self) -> None:
        self._asked: dict[str, Asked] = {}
        self._votes: dict[str, dict[str, Vote]] = {}
        self._used: set[str] = set()
        self._since: dict[str, float] = {}

    def ask(self, asked: Asked) -> None:
        """People are asked from now on, unless that came to an end already."""
        if asked.at > max(self._since.get(asked.agent, 0.0), self._since.get(EVERYONE, 0.0)):
            known = self._asked.get(asked.id)
            # A vote that is replayed brings its question without what was shown.
            self._asked[asked.id] = known if known and (known.shown or not asked.shown) else asked

    def hear(self, asked: Asked, vote: Vote) -> None:
        """A vote counts; one person has one, the first."""
        self.ask(asked)
        self._votes.setdefault(vote.of, {}).setdefault(vote.person, vote)

    def use(self, approval_id: str) -> None:
        """It is consumed."""
        self._used.add(approval_id)

    def cancel(self, agent: str, at: float) -> None:
        """Nothing counts any more that this agent (or `EVERYONE`) asked up to `at`."""
        self._since[agent] = max(at, self._since.get(agent, 0.0))
        for each in [each for each in self._asked.values() if agent in (each.agent, EVERYONE) and each.at <= at]:
            del self._asked[each.id]

    def forget(self, now: float) -> list[Asked]:
        """Let go of what expired; what of it was neither used nor rejected."""
        gone = [each for each in self._asked.values() if each.expires <= now]
        open_ = [each for each in gone if self.status(each, now=0.0) in ("waiting", "approved")]
        for each in gone:
            del self._asked[each.id]
            self._votes.pop(each.id, None)
            self._used.discard(each.id)
        return open_

    def status(self, asked: Asked, now: float) -> str:
        """`waiting`, `approved`, `rejected`, `used` or `expired`."""
        votes = self._votes.get(asked.id, {}).values()
        if asked.id in self._used:
            return "used"
        if any(not vote.approves for vote in votes):
            return "rejected"
        if asked.expires <= now:
            return "expired"
        return "approved" if len(votes) >= asked.approvers else "waiting"

    def found(self, binding: tuple[str, ...], need: Approval, now: float) -> tuple[Asked, str] | None:
        """What was asked about exactly this of all whom `need` wants, and how it stands.

        A no goes before all else, whomever it was asked of and by which broker.
        """
        told = [(each, self.status(each, now)) for each in self._asked.values() if each.binding == binding]
        same = [each for each in told if each[1] == "rejected" or each[0].suffices(need)]
        for wanted in ("rejected", "approved", "waiting"):
            if match := next((each for each in same if each[1] == wanted), None):
                return match
        return None

    def waiting(self, agent: str, now: float) -> int:
        """How many calls of this agent wait."""
        return sum(each.agent == agent and self.status(each, now) == "waiting" for each in self._asked.values())

    def judge(self, approval_id: str, vote: Vote, now: float) -> Asked:
        """The question that this vote is on. Raises `Refusal` where it can't be taken."""
        asked = self._asked.get(approval_id)
        if asked is None:
            raise Refusal(
                "no such approval waits; it may have expired, or the broker was restarted and the agent must call again"
            )
        status, votes = self.status(asked, now), self._votes.get(approval_id, {})
        if status != "waiting" and not (status == "approved" and not vote.approves):
            raise Refusal(f"it is {status} already")
        if vote.person in votes:
            raise Refusal(f"{vote.by} has said so already; another person must")
        if vote.approves and not asked.shown:
            raise Refusal("what it asks for is not known since the broker was restarted; the agent must make the call again")
        if vote.approves and asked.groups and not set(asked.groups) & set(vote.groups):
            raise Refusal(f"only people in {' or '.join(asked.groups)} may approve this; use an operator token that says so")
        return asked

    def described(self, asked: Asked, now: float) -> dict[str, Json]:
        """How it stands, as agents and people are told."""
        votes = self._votes.get(asked.id, {}).values()
        return {
            "id": asked.id,
            "status": self.status(asked, now),
            "approvers": asked.approvers,
            "groups": list(asked.groups),
            "approved_by": [vote.by for vote in votes if vote.approves],
            "rejected_by": [vote.by for vote in votes if not vote.approves],
            "expires": asked.expires,
        }

    def listed(self, now: float) -> Iterator[dict[str, Json]]:
        """All of them, the oldest first, with what is shown to people."""
        for asked in sorted(self._asked.values(), key=lambda each: each.at):
            agent, run_id, operation, *_ = asked.binding
            bound = {"agent": agent, "run_id": run_id, "operation": operation}
            yield {**self.described(asked, now), "asked": asked.at, "why": asked.why, **bound, **asked.shown}
