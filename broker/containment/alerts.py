"""Alerts on their way to people: who hears of what, and a durable queue for each sink.

Laws: `send` neither waits nor raises, so nothing that contains an agent is held up by telling of it; the alert is on disk when it
returns, sealed, for it holds names of agents and hosts. Alerts of one incident reach a sink in their order, each until it is
taken; a sink that fails holds up no other, nor does one alert the rest. What is left untold (a repetition, a storm, too many
that wait) is counted, and the audit record has it.
"""

import asyncio
import contextlib
import logging
import random
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cryptography.fernet import Fernet, InvalidToken

from broker import clock
from broker.containment.sinks import STORM, Alert, Notice, Refused, bounded, deliver, unpacked
from broker.credentials.base import CredentialUnavailable
from broker.keys import write_private
from broker.policy.containment import Alerting, Route, Severity

__all__ = ["Alert", "Alerts", "routed"]

log = logging.getLogger(__name__)

_MAX = 4096
_MINUTE_S = 60
_TIMEOUT_S = 10.0
_LAST_S = 300.0
_PATIENCE_S, _GIVE_UP_S = 300.0, 86_400.0
# Many that come at once cost one look through what waits.
_GATHER_S = 0.05
# A try may hold a thread of asyncio's few (six on two cores) for as long as a name's look-up takes, and issuers need some too.
_AT_ONCE, _AT_ONCE_AWAY = 2, 1
_RANK = {severity: rank for rank, severity in enumerate(Severity)}


def routed(alert: Alert, alerting: Alerting) -> tuple[str, ...]:
    """The sinks that hear of it: that of the first route that fits; none where none does.

    The end of an incident goes to each sink that a route gives the agent's alerts to, however severe and of whatever kind: one of
    them has the incident, and a receiver drops the end of what it has not.
    """
    fitting = [route.to for route in alerting.routes if _fits(route, alert)]
    return tuple(dict.fromkeys(fitting)) if alert.resolves else tuple(fitting[:1])


def _fits(route: Route, alert: Alert) -> bool:
    wanted = {"owner": route.team, "oncall": route.oncall, "name": route.agent}
    about = all(alert.agent.get(part, "") == value for part, value in wanted.items() if value)
    return about and (alert.resolves or (_RANK[alert.severity] >= _RANK[route.severity] and route.kind in ("", alert.kind)))


class _Minute:
    """How many a sink has had in this minute. Beyond the limit the highest severity has as much room again."""

    def __init__(self) -> None:
        self._minute, self._had = 0, Counter[str]()

    def room(self, sink: str, severity: Severity, limit: int, now: float) -> bool:
        """Whether there is room for one more, which is then taken."""
        if (minute := int(now // _MINUTE_S)) != self._minute:
            self._minute, self._had = minute, Counter()
        self._had[sink] += (free := self._had[sink] < limit * (2 if severity is Severity.HIGH else 1))
        return free


class Alerts:
    """What waits to be told. `folder` is where it lies, made if it is missing; `seal` is what it is encrypted with.

    `alerting` gives what is in force now; `source` is this host, to people. By sink are counted what was
    `delivered`; tries that `failed`; `suppressed`, what came again while it waited or was too many in its minute; and what was
    `dropped`: nobody was told.
    """

    def __init__(  # noqa: PLR0913 - the outside, which tests replace
        self,
        folder: Path,
        seal: Fernet,
        alerting: Callable[[], Alerting],
        *,
        source: str = "",
        now: Callable[[], float] = clock.now,
        steady: Callable[[], float] = clock.steady,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.delivered, self.failed, self.suppressed, self.dropped = (Counter[str]() for _ in range(4))
        self._folder, self._seal, self._alerting, self._source = folder, seal, alerting, source or socket.gethostname()
        self._now, self._steady, self._jitter = now, steady, jitter
        self._waiting: dict[str, Notice] = {}
        self._newest: dict[tuple[str, str], Notice] = {}
        self._fell: dict[str, None] = {}
        self._number, self._flying, self._away = 0, dict[str, str](), set[str]()
        self._admitted, self._departed = _Minute(), _Minute()
        self._changed = asyncio.Event()
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(folder.glob("[!.]*")):
            self._restore(path)

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def results(self) -> Mapping[tuple[str, str], int]:
        """What became of alerts, by sink and result."""
        results = {"delivered": self.delivered, "failed": self.failed, "suppressed": self.suppressed, "dropped": self.dropped}
        return {(sink, result): number for result, by_sink in results.items() for sink, number in by_sink.items()}

    def send(self, alert: Alert) -> None:
        """Have it told to whom it concerns. To be called in the thread of the event loop."""
        try:
            alerting = self._alerting()
            for sink in routed(alert, alerting):
                self._admit(alert, sink, alerting.per_minute)
        except Exception as error:  # noqa: BLE001 - whoever cuts an agent off must not fail because of telling it
            log.error("an alert of the kind %s can't be told: %s", alert.kind, type(error).__name__)  # noqa: TRY400

    async def run(self) -> None:
        """Tell what is due, for ever."""
        async with asyncio.TaskGroup() as flights:
            while True:
                self._changed.clear()
                self._depart(flights)
                # Not `wait_for`, which before Python 3.12 loses a cancellation that comes together with the event.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._pause()):
                        await self._changed.wait()
                await asyncio.sleep(_GATHER_S)

    async def attempt(self) -> None:
        """One try of what is due."""
        async with asyncio.TaskGroup() as flights:
            self._depart(flights)

    def _admit(self, alert: Alert, sink: str, limit: int) -> None:
        now = self._steady()
        if self._repeats(alert, sink):
            self.suppressed[sink] += 1
        elif alert.resolves or self._admitted.room(sink, alert.severity, limit, now):
            self._put(alert, sink, now)
        else:
            self.suppressed[sink] += 1
            ends = (now // _MINUTE_S + 1) * _MINUTE_S
            self._put(Alert(STORM, alert.severity, "", f"{STORM} {self._source} {sink} {ends:.0f}"), sink, ends)

    def _repeats(self, alert: Alert, sink: str) -> bool:
        """Whether the newest of its incident waits for the sink and says the same; then it is counted there."""
        waiting = self._newest.get((sink, alert.dedup_key))
        if waiting is None or waiting.alert.resolves != alert.resolves:
            return False
        waiting.repeated += 1
        if worse := _RANK[alert.severity] > _RANK[waiting.alert.severity]:
            waiting.alert = replace(waiting.alert, severity=alert.severity)
        # Written when the number has doubled: a flood costs a few writes, and after a restart it is at least half of what it was.
        if worse or waiting.repeated & (waiting.repeated - 1) == 0:
            self._save(waiting)
        return True

    def _put(self, alert: Alert, sink: str, due: float, **more: Any) -> None:
        if self._repeats(alert, sink):
            return
        self._number += 1
        name = f"{self._number:012}-{secrets.token_hex(8)}"
        new = Notice(name, sink, bounded(alert), self._now(), self._steady(), due, **more)
        # What goes out is what a restart would read.
        self._keep(unpacked(new.packed()))
        self._save(new)
        if len(self._waiting) > _MAX:
            oldest = next(each for severity in Severity for each in self._waiting.values() if each.alert.severity is severity)
            self._drop(oldest, "too many are waiting")
        self._changed.set()

    def _keep(self, notice: Notice) -> None:
        self._waiting[notice.name] = self._newest[notice.sink, notice.alert.dedup_key] = notice

    def _save(self, notice: Notice) -> None:
        try:
            write_private(self._folder / notice.name, self._seal.encrypt(notice.packed()))
        except OSError as error:
            log.error("an alert can't be saved (%s); a restart loses it", error.strerror)  # noqa: TRY400

    def _restore(self, path: Path) -> None:
        try:
            notice = unpacked(self._seal.decrypt(path.read_bytes()))
            self._number = max(self._number, int(notice.name.partition("-")[0]))
        except (OSError, InvalidToken, ValueError, TypeError, KeyError) as error:
            log.error("%s can't be read (%s): an alert is not told", path, type(error).__name__)  # noqa: TRY400
            return
        # The clock may have been set back meanwhile.
        now = self._steady()
        notice.born, notice.due = min(notice.born, now), min(notice.due, now + _MINUTE_S)
        self._keep(notice)
        if notice.fell:
            self._note_fall(notice.alert)

    def _depart(self, flights: asyncio.TaskGroup) -> None:
        alerting, now = self._alerting(), self._steady()
        for each in list(self._waiting.values()):
            if each.born + _GIVE_UP_S <= now:
                self._drop(each, "it was tried for a day")
            elif each.born + _PATIENCE_S <= now:
                self._fall(each, alerting.fallback)
        for each in self._ready(now):
            flying = sum(sink == each.sink for sink in self._flying.values())
            if flying >= (_AT_ONCE_AWAY if each.sink in self._away else _AT_ONCE):
                continue
            # After an outage, too, a sink gets no more than it may.
            exempt = each.alert.resolves or each.alert.kind == STORM
            if exempt or self._departed.room(each.sink, each.alert.severity, alerting.per_minute, now):
                self._flying[each.name] = each.sink
                flights.create_task(self._fly(each, alerting))

    def _ready(self, now: float) -> Iterable[Notice]:
        """The first of each incident at each sink, if it is due and not on its way; the most severe come first."""
        first: dict[tuple[str, str], Notice] = {}
        for each in self._waiting.values():
            first.setdefault((each.sink, each.alert.dedup_key), each)
        due = (each for each in first.values() if each.due <= now and each.name not in self._flying)
        return sorted(due, key=lambda each: (-_RANK[each.alert.severity], each.due))

    def _pause(self) -> float:
        """Until something may be due. Who waits for room gets some with the minute."""
        now = self._steady()
        times = (time for each in self._waiting.values() for time in (each.due, each.born + _PATIENCE_S))
        return min([_MINUTE_S - now % _MINUTE_S, *(time - now for time in times if time > now)])

    async def _fly(self, each: Notice, alerting: Alerting) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await deliver(each, alerting.sinks.get(each.sink), self._source, self._now())
        except Refused as refused:
            log.error("an alert of the kind %s is not taken: %s", each.alert.kind, refused)  # noqa: TRY400
            self._again(each)
            if self._fall(each, alerting.fallback):
                self._remove(each)
        except (CredentialUnavailable, TimeoutError) as error:
            level = logging.DEBUG if each.sink in self._away else logging.WARNING  # once, until it is told again
            log.log(level, "%s is not told yet, and tried again: %s", each.sink, str(error) or "no answer")
            self._again(each)
            self._away.add(each.sink)
        except Exception as error:  # noqa: BLE001 - its text and traceback could hold a secret
            log.error("telling %s is at fault: %s", each.sink, type(error).__name__)  # noqa: TRY400
            self._again(each)
        else:
            self._landed(each, alerting.fallback)
        finally:
            del self._flying[each.name]
            self._changed.set()

    def _landed(self, each: Notice, fallback: str) -> None:
        self.delivered[each.sink] += 1
        if each.alert.resolves and each.alert.dedup_key in self._fell:
            self._fall(each, fallback)
        self._remove(each)
        if each.sink in self._away:
            self._away.discard(each.sink)
            for other in self._waiting.values():
                if other.sink == each.sink and other.failures:
                    other.due = self._steady()

    def _again(self, each: Notice) -> None:
        self.failed[each.sink] += 1
        each.due = self._steady() + min(1 << min(each.failures, 9), _LAST_S) * (0.5 + self._jitter())
        each.failures += 1

    def _fall(self, each: Notice, fallback: str) -> bool:
        """Give it to the fallback too, once. False where there is no other sink than its own."""
        if not fallback or fallback == each.sink:
            return False
        if not each.fell:
            each.fell = True
            self._save(each)
            self._note_fall(each.alert)
            copy = replace(each.alert, details={**each.alert.details, "not_delivered_to": each.sink})
            self._put(copy, fallback, self._steady(), fell=True, repeated=each.repeated)
        return True

    def _note_fall(self, alert: Alert) -> None:
        """The fallback has to hear of the end of what it heard of."""
        self._fell.pop(alert.dedup_key, None)
        if not alert.resolves:
            self._fell[alert.dedup_key] = None
        if len(self._fell) > _MAX:
            del self._fell[next(iter(self._fell))]

    def _drop(self, each: Notice, why: str) -> None:
        log.error("%s is not told of an alert of the kind %s: %s", each.sink, each.alert.kind, why)
        self.dropped[each.sink] += 1
        self._remove(each)

    def _remove(self, each: Notice) -> None:
        self._waiting.pop(each.name, None)
        if self._newest.get(lane := (each.sink, each.alert.dedup_key)) is each:
            del self._newest[lane]
        with contextlib.suppress(OSError):
            (self._folder / each.name).unlink(missing_ok=True)
