"""Leases: what sources make, kept for as long as it may be used.

Laws: a lease belongs to one agent, one tool, one catalog entry and what the source narrows it to; nobody else is given it. It is
used no longer than its issuer, its entry and the platform allow, whichever is the least. Time is counted by a clock that nobody
sets, from the moment of asking. Each key is asked for once at a time, and one that fails holds up no other.
"""

import asyncio
import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

from broker import clock
from broker.credentials.base import CredentialUnavailable, Lease, Occasion, Renewing, Source
from broker.credentials.outbox import Put, Revocation

log = logging.getLogger(__name__)

# A lease is replaced this long before its end, or half its life before, so that none ends on its way.
MARGIN_S = 30.0
# Envoy waits 2 s for a command; an answer that comes later serves the next call.
WAIT_S, FLIGHT_S = 1.5, 10.0
# How long a failure stands for the same question.
FAILED_S = 1.0
_MAX = 10_000
_SLOW = "see whether the issuer is up and near; the call may be tried again"

_Key = tuple[Hashable, ...]
_Answer = Lease | CredentialUnavailable


@dataclass(slots=True, eq=False)
class _Entry:
    """What is known of one key; times by the steady clock.

    `born` is when the credential was asked for, though its lease may have been renewed since; `ends` is its end by the issuer.
    """

    lease: Lease | None = None
    born: float = 0.0
    use_until: float = 0.0
    ahead: float = 0.0
    ends: float | None = None
    failure: CredentialUnavailable | None = None
    again: float = 0.0
    flight: asyncio.Task[_Answer] | None = None


class Leases:
    """The issuer that a source makes. `put` takes what is to be taken back; `steady` gives seconds since the epoch."""

    def __init__(self, source: Source, put: Put, steady: Callable[[], float] = clock.steady, bound: int = _MAX) -> None:
        self.source, self.name = source, source.name
        self._put, self._steady, self._bound = put, steady, bound
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()

    def cached(self, occasion: Occasion, now: float) -> Lease | None:
        """The lease at hand; from some time before its end on, another is fetched while it still serves."""
        key = self._key(occasion)
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        steady = self._steady()
        if entry.lease is not None and steady < entry.use_until:
            if steady >= entry.ahead and steady >= entry.again and entry.flight is None:
                self._depart(key, entry, occasion, now)
            return entry.lease
        if entry.failure is not None and steady < entry.again:
            raise CredentialUnavailable(entry.failure.message, entry.failure.advice)
        return None

    async def issue(self, occasion: Occasion, now: float) -> Lease:
        """A lease, waited for together with all others who ask for the same."""
        if lease := self.cached(occasion, now):
            return lease
        key = self._key(occasion)
        entry = self._entries.setdefault(key, _Entry())
        if len(self._entries) > self._bound:
            self._forget([next(iter(self._entries))])
        flight = entry.flight or self._depart(key, entry, occasion, now)
        # `wait` leaves the flight alone when the time is over or the caller has gone.
        await asyncio.wait({flight}, timeout=WAIT_S)
        if not flight.done():
            raise CredentialUnavailable(f"the issuer {self.name} has not answered within {WAIT_S} s", _SLOW)
        answer = flight.result()
        if isinstance(answer, CredentialUnavailable):
            raise CredentialUnavailable(answer.message, answer.advice)
        return answer

    def drop(self, agent: str) -> None:
        """Forget all leases of this agent, those on their way too, and have them taken back at the issuer."""
        self._forget([key for key in self._entries if key[0] == agent])

    def _forget(self, keys: list[_Key]) -> None:
        gone = [self._entries.pop(key) for key in keys]
        self._take_back([(entry.lease, entry.ends) for entry in gone if entry.lease], self._steady())

    def _take_back(self, leases: list[tuple[Lease, float | None]], due: float) -> None:
        self._put(Revocation(self.name, lease.handle, ends, due) for lease, ends in leases if lease.handle)

    def _key(self, occasion: Occasion) -> _Key:
        agent = occasion.agent
        return (agent.name, agent.spiffe, occasion.tool.name, occasion.spec, self.source.narrowed(occasion))

    def _depart(self, key: _Key, entry: _Entry, occasion: Occasion, now: float) -> asyncio.Task[_Answer]:
        entry.flight = asyncio.get_running_loop().create_task(self._fly(key, entry, occasion, now))
        return entry.flight

    async def _fly(self, key: _Key, entry: _Entry, occasion: Occasion, now: float) -> _Answer:
        asked = self._steady()
        try:
            async with asyncio.timeout(FLIGHT_S):
                lease = await self._renewed(entry, occasion, now)
                if lease is None:
                    lease = await self.source.fetch(occasion, now)
                    entry.born = asked
            return self._kept(key, entry, lease, occasion, now, asked)
        except CredentialUnavailable as error:
            failure = error
        except TimeoutError:
            failure = CredentialUnavailable(f"the issuer {self.name} has not answered within {FLIGHT_S:.0f} s", _SLOW)
        except Exception as error:  # noqa: BLE001 - its text and traceback could hold the credential
            where = traceback.extract_tb(error.__traceback__)[-1]
            log.error("the issuer %s is at fault: %s in %s:%s", self.name, type(error).__name__, where.filename, where.lineno)  # noqa: TRY400
            failure = CredentialUnavailable(f"the issuer {self.name} failed ({type(error).__name__})", "see the broker's log")
        finally:
            entry.flight = None
        if entry.lease:
            log.warning("a lease of %s could not be replaced in time: %s", occasion.agent.name, failure)
        entry.failure, entry.again = failure, self._steady() + FAILED_S
        return failure

    async def _renewed(self, entry: _Entry, occasion: Occasion, now: float) -> Lease | None:
        """The same credential for longer, where its source can and the platform still lets it; else None."""
        steady, old = self._steady(), entry.lease
        left = (entry.ends or 0.0) - steady
        if old is None or not isinstance(self.source, Renewing) or entry.born + _most(occasion) - steady <= left + MARGIN_S:
            return None
        lease = await self.source.renew(old, occasion, now)
        return lease if lease and lease.expires and lease.expires - now > left + MARGIN_S else None

    def _kept(self, key: _Key, entry: _Entry, lease: Lease, occasion: Occasion, now: float, asked: float) -> Lease:  # noqa: PLR0913, PLR0917 - what is known when it lands
        arrived = self._steady()
        most = entry.born + _most(occasion) - asked
        left = most if lease.expires is None else lease.expires - now
        life = min(left, most)
        margin = min(MARGIN_S, life / 2)
        ends = None if lease.expires is None else asked + left
        if self._entries.get(key) is not entry:
            self._take_back([(lease, ends)], arrived)
            raise CredentialUnavailable(f"the leases of {occasion.agent.name!r} were dropped", "see whether the agent is revoked")
        if asked + life <= arrived:
            raise CredentialUnavailable(f"the credential that the issuer {self.name} gave has ended already", _ENDED)
        if ends is None or left > life:
            self._take_back([(lease, ends)], asked + life)
        # Its life may have begun when it was asked for; what it loses by that is within the margin, or the issuer is slow.
        entry.use_until = min(arrived + life - margin, asked + life)
        entry.ahead = max(entry.use_until - margin, (arrived + entry.use_until) / 2)
        entry.lease, entry.ends, entry.failure = replace(lease, expires=now + life), ends, None
        return entry.lease


def _most(occasion: Occasion) -> float:
    """How long one credential may be used, in seconds."""
    return float(min(occasion.spec.settings.get("ttl") or occasion.max_ttl, occasion.max_ttl))


_ENDED = "see how long its credentials live, and whether its clock is right"
