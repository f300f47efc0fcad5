"""Credentials that are to be taken back at their issuers, also after a restart.

Laws: what is handed in is on disk when `put` returns, sealed, for it holds credentials; each in a file of its own, so that no
list is written again. It is tried until it is done or the credential has ended by itself; nobody waits for it.
"""

import asyncio
import contextlib
import hashlib
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
_FIRST_S, _LAST_S, _SHORTEST_S = 1.0, 300.0, 0.05
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
    """What waits. `folder` is where it lies, made if it is missing; `seal` is what it is encrypted with."""

    def __init__(
        self, folder: Path, seal: Fernet, steady: Callable[[], float] = clock.steady, jitter: Callable[[], float] = random.random
    ) -> None:
        self._folder, self._seal, self._steady, self._jitter = folder, seal, steady, jitter
        self._waiting: dict[str, Revocation] = {}
        self._changed = asyncio.Event()
        folder.mkdir(mode=0o700, exist_ok=True)
        for path in folder.glob("[!.]*"):
            self._restore(path)

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, revocations: Iterable[Revocation]) -> None:
        """Take them in. Of one that is there already, the earlier time counts."""
        for new in revocations:
            new.expires = new.expires or self._steady() + _ENDLESS_S
            name = hashlib.sha256(f"{new.source} {new.handle.reveal()}".encode()).hexdigest()
            if name in self._waiting and self._waiting[name].due <= new.due:
                continue
            self._waiting[name] = new
            row = [new.source, new.handle.reveal(), new.expires, new.due]
            try:
                write_private(self._folder / name, self._seal.encrypt(orjson.dumps(row)))
            except OSError as error:
                log.error("what is to be taken back can't be saved (%s); a restart loses it", error.strerror)  # noqa: TRY400
            self._changed.set()
        if (over := len(self._waiting) - _MAX) > 0:
            log.error("%s will not be taken back at the issuer: too many are waiting", counted(over, "credential"))
            for name in sorted(self._waiting, key=lambda name: self._waiting[name].expires or 0.0)[:over]:
                self._remove(name)

    async def run(self, sources: Mapping[str, Source]) -> None:
        """Take back what is due, for ever."""
        while True:
            self._changed.clear()
            await self.attempt(sources)
            next_due = min((each.due for each in self._waiting.values() if each.source in sources), default=math.inf)
            pause = min(next_due - self._steady(), _LAST_S)
            # Not `wait_for`: before Python 3.12 it may lose a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(pause, _SHORTEST_S)):
                    await self._changed.wait()

    async def attempt(self, sources: Mapping[str, Source]) -> None:
        """One try of what is due."""
        now = self._steady()
        for name in [name for name, each in self._waiting.items() if (each.expires or 0.0) + _SLACK_S <= now]:
            self._remove(name)
        due = [(name, each) for name, each in self._waiting.items() if each.due <= now and each.source in sources][:_AT_ONCE]
        done = await asyncio.gather(*(self._done(each, sources[each.source]) for _, each in due))
        for (name, _), gone in zip(due, done, strict=True):
            if gone:
                self._remove(name)

    async def _done(self, each: Revocation, source: Source) -> bool:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await source.revoke(each.handle)
        except (CredentialUnavailable, TimeoutError) as error:
            log.warning("a credential of %s is not taken back yet, and tried again: %s", each.source, str(error) or "no answer")
        except Exception as error:  # noqa: BLE001 - its text and traceback could hold the credential
            log.error("the issuer %s is at fault while it takes back: %s", each.source, type(error).__name__)  # noqa: TRY400
        else:
            log.info("a credential of %s is taken back", each.source)
            return True
        each.due = self._steady() + each.wait * (0.5 + self._jitter())
        each.wait = min(each.wait * 2, _LAST_S)
        return False

    def _remove(self, name: str) -> None:
        self._waiting.pop(name, None)
        (self._folder / name).unlink(missing_ok=True)

    def _restore(self, path: Path) -> None:
        try:
            source, handle, expires, due = orjson.loads(self._seal.decrypt(path.read_bytes()))
        except (OSError, InvalidToken, ValueError) as error:
            log.error("%s can't be read (%s): what was to be taken back is not", path, type(error).__name__)  # noqa: TRY400
        else:
            self._waiting[path.name] = Revocation(source, Secret(handle), expires, due)
