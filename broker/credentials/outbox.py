"""Credentials that are to be taken back at their issuers, also after a restart.

Laws: what is handed in is on disk when `put` returns, sealed, for it holds credentials. It is tried until it is done or the
credential has ended by itself; nobody waits for it.
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import orjson
from cryptography.fernet import Fernet, InvalidToken

from broker import clock
from broker.credentials.base import CredentialUnavailable, Secret, Source
from broker.errors import counted
from broker.keys import write_private

log = logging.getLogger(__name__)

_MAX = 4096
_AT_ONCE = 32
_TIMEOUT_S = 10.0
_FIRST_S, _LAST_S = 1.0, 300.0
# One that says no end is tried for a week; one that does, an hour longer, since a clock may be that wrong.
_ENDLESS_S, _SLACK_S = 7 * 86_400.0, 3600.0


@dataclass(slots=True)
class Revocation:
    """What is to be taken back, by whose source, and from when on. `expires` and `due` are seconds since the epoch."""

    source: str
    handle: Secret = field(repr=False)
    expires: float | None
    due: float
    wait: float = _FIRST_S


Put = Callable[[Iterable[Revocation]], None]


class Outbox:
    """The list of them. `path` is where it lies; `seal` what it is encrypted with."""

    def __init__(
        self, path: Path, seal: Fernet, steady: Callable[[], float] = clock.steady, jitter: Callable[[], float] = random.random
    ) -> None:
        self._path, self._seal, self._steady, self._jitter = path, seal, steady, jitter
        self._waiting: dict[tuple[str, str], Revocation] = {}
        self._changed = asyncio.Event()
        self._restore()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, revocations: Iterable[Revocation]) -> None:
        """Take them in. Of one that is there already, the earlier time counts."""
        for new in revocations:
            key = (new.source, new.handle.reveal())
            old = self._waiting.get(key)
            if new.expires is None:
                new.expires = self._steady() + _ENDLESS_S
            if old is None or new.due < old.due:
                self._waiting[key] = new
        if (over := len(self._waiting) - _MAX) > 0:
            log.error("%s will not be taken back at the issuer: too many are waiting", counted(over, "credential"))
            soonest = sorted(self._waiting, key=lambda key: self._waiting[key].expires or 0.0)
            for key in soonest[:over]:
                del self._waiting[key]
        self._save()
        self._changed.set()

    async def run(self, sources: Mapping[str, Source]) -> None:
        """Take back what is due, for ever."""
        while True:
            self._changed.clear()
            await self.attempt(sources)
            next_due = min((each.due for each in self._waiting.values() if each.source in sources), default=math.inf)
            pause = min(next_due - self._steady(), _LAST_S)
            try:
                await asyncio.wait_for(self._changed.wait(), max(pause, 0.05))
            except TimeoutError:
                continue

    async def attempt(self, sources: Mapping[str, Source]) -> None:
        """One try of all that is due."""
        now = self._steady()
        for key in [key for key, each in self._waiting.items() if (each.expires or 0.0) + _SLACK_S <= now]:
            del self._waiting[key]
        due = [(key, each) for key, each in self._waiting.items() if each.due <= now and each.source in sources][:_AT_ONCE]
        if not due:
            return
        done = await asyncio.gather(*(self._done(each, sources[each.source]) for _, each in due))
        for (key, each), gone in zip(due, done, strict=True):
            if gone and self._waiting.get(key) is each:
                del self._waiting[key]
        self._save()

    async def _done(self, each: Revocation, source: Source) -> bool:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await source.revoke(each.handle)
        except (CredentialUnavailable, TimeoutError) as error:
            log.warning("a credential of %s is not taken back yet, and it is tried again: %s", each.source, error or "no answer")
        except Exception as error:  # noqa: BLE001 - its text and traceback could hold the credential
            log.error("the issuer %s is at fault while it takes back: %s", each.source, type(error).__name__)  # noqa: TRY400
        else:
            log.info("a credential of %s is taken back", each.source)
            return True
        each.due = self._steady() + each.wait * (0.5 + self._jitter())
        each.wait = min(each.wait * 2, _LAST_S)
        return False

    def _save(self) -> None:
        rows = [[each.source, each.handle.reveal(), each.expires, each.due] for each in self._waiting.values()]
        try:
            write_private(self._path, self._seal.encrypt(orjson.dumps(rows)))
        except OSError as error:
            log.error("what is to be taken back can't be saved (%s); it is lost with a restart", error.strerror)  # noqa: TRY400

    def _restore(self) -> None:
        try:
            rows = orjson.loads(self._seal.decrypt(self._path.read_bytes()))
        except FileNotFoundError:
            return
        except (OSError, InvalidToken, ValueError) as error:
            log.error("%s can't be read (%s): what was to be taken back is not", self._path, type(error).__name__)  # noqa: TRY400
            return
        for source, handle, expires, due in rows:
            self._waiting[source, handle] = Revocation(source, Secret(handle), expires, due)
