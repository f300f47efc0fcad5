"""What is tested again and again while the broker runs, and who is told when the result changes."""

import asyncio
import faulthandler
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

log = logging.getLogger(__name__)


class Watch:
    """`failure` says what is wrong, empty when nothing is; `on_change` hears it when it changes.

    `test` says what is wrong, empty for nothing. What can't be tested is failed.
    """

    def __init__(
        self, name: str, test: Callable[[], Awaitable[str]], on_change: Callable[[str], None], every_s: float = 60.0
    ) -> None:
        self._name, self._test, self._on_change, self._every_s = name, test, on_change, every_s
        self.failure = ""

    async def run(self) -> None:
        """Test for ever."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                failure = await self._test()
            except Exception as error:  # a test that can't be made is failed
                log.exception("%s could not be made", self._name)
                failure = f"it could not be made ({type(error).__name__})"
            before, self.failure = self.failure, failure
            if failure != before:
                self._on_change(failure)


HUNG_S = 30.0


async def alive(picture: Path) -> None:
    """End this process where its event loop stands still so long, with a picture of where each thread was, without any value.

    What hangs can neither be asked nor cut what an agent has open. Whoever keeps it running starts it again.
    """
    descriptor = os.open(picture, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        try:
            while True:
                faulthandler.dump_traceback_later(HUNG_S, exit=True, file=file)
                await asyncio.sleep(HUNG_S / 4)
        finally:
            faulthandler.cancel_dump_traceback_later()
