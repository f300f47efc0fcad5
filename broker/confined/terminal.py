"""The caller's terminal, lent to the command, which has a process group of its own.

Law: what the command sends to its group reaches nobody else of the caller's. A terminal sends its signals to, and lets itself be
read by, one group at a time (credentials(7)): it is lent only while it is ours, and taken back before this process stops or ends.
"""

import contextlib
import os
import signal
import stat
from collections.abc import Iterator

_PIPED = (0, 1)  # with a pipe at one of these, others of the group may use the terminal
_ASKING = (signal.SIGTTIN, signal.SIGTTOU)


class Terminal:
    """The terminal that controls this process, or none."""

    def __init__(self) -> None:
        self._lent, self._file = False, -1
        with contextlib.suppress(OSError):
            self._file = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)

    def __bool__(self) -> bool:
        return self._file >= 0

    def offer(self, group: int) -> None:
        """Lend it to a group that has not asked for it, unless this process is part of a pipeline."""
        if self and not any(stat.S_ISFIFO(os.fstat(number).st_mode) for number in _PIPED):
            self._lend(group)

    def stopped(self, group: int, number: int) -> None:
        """By this signal the group has stopped: lend it what it asks for if that is ours, else stop too."""
        if number in _ASKING and self._is_ours():
            self.go_on(group)
        else:
            self.take_back()
            os.kill(os.getpid(), signal.SIGSTOP)

    def go_on(self, group: int) -> None:
        """Have the group go on, with the terminal if that is ours."""
        self._lend(group)
        os.killpg(group, signal.SIGCONT)

    def take_back(self) -> None:
        """Have it again, if it was lent."""
        if self._lent:
            self._lent = False
            self._give(os.getpgrp())

    def _lend(self, group: int) -> None:
        if self._is_ours():
            self._lent = True
            self._give(group)

    def _is_ours(self) -> bool:
        with contextlib.suppress(OSError):  # it has hung up
            return os.tcgetpgrp(self._file) == os.getpgrp()
        return False

    def _give(self, group: int) -> None:
        with _without(signal.SIGTTOU), contextlib.suppress(OSError):
            os.tcsetpgrp(self._file, group)


@contextlib.contextmanager
def _without(number: signal.Signals) -> Iterator[None]:
    """Hold back the signal that stops who is in the background and gives the terminal away (tcsetpgrp(3))."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
